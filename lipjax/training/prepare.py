"""The command `lipjax prepare`: prepares a data set, or writes the held-out split of a run (`export`)."""

import argparse
import sys

from lipjax.errors import run_command
from lipjax.training.data import prepared
from lipjax.training.data.prepare import prepare


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["export"]:
        from lipjax.training import export  # here, because it reads configs, and with them imports JAX

        return export.main(argv[1:])
    parser = argparse.ArgumentParser(prog="lipjax prepare", description=__doc__)
    parser.add_argument("name", choices=tuple(prepared.PREPARED))
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--download", action="store_true", help="fetch the archives that are not on disk")
    arguments = parser.parse_args(argv)
    data_dir = prepared.resolve_data_dir(arguments.data_dir)

    def command() -> None:
        prepare(arguments.name, data_dir, download=arguments.download)
        print(f"{arguments.name} is ready under {prepared.find_prepared(arguments.name, data_dir)}")

    return run_command(command, "Interrupted. The same command begins again.")


if __name__ == "__main__":
    sys.exit(main())
