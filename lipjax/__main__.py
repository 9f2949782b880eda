"""python -m lipjax certify WORKDIR: what is proved about a trained run."""

import argparse
import pathlib
import sys

from rich.console import Console

from lipjax.errors import UserError, run_command


def run_directories(workdir: str) -> list[pathlib.Path]:
    """The runs in a directory: itself, or its seed_* folders."""
    root = pathlib.Path(workdir).expanduser()
    if (root / "config.json").exists():
        return [root]
    seeds = sorted((path.parent for path in root.glob("seed_*/config.json")), key=lambda p: (len(p.name), p.name))
    if not seeds:
        raise UserError(f"{root} holds no training run (no config.json): give the --workdir of train.py.")
    return seeds


def certify(arguments) -> None:
    """Certifies every run in a directory again from its checkpoints."""
    from lipjax.certify import write_json
    from lipjax.training.config import load_config, validate
    from lipjax.training.evaluate import certify_run
    from lipjax.training.report import print_table, summarize

    console = Console(soft_wrap=True, highlight=False)
    directories, found = run_directories(arguments.workdir), []
    for directory in directories:
        config, seed = load_config(directory)
        with config.unlocked():
            if arguments.num_images is not None:
                config.certify.num_images = arguments.num_images
            if arguments.data_dir is not None:
                config.data.data_dir = arguments.data_dir
        validate(config)
        found.append(certify_run(directory, config, seed, console=console))
        print_table(found[-1], console)
        console.print(f"Written to {directory}: frozen/, certificate.json, report.json, certified_accuracy.png")
    if len(found) > 1:
        root = directories[0].parent
        write_json(root / "report.json", summarize(found))
        print_table(summarize(found), console)
        console.print(f"Written to {root}: report.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lipjax", description="Proved robustness certificates.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("certify", help="freeze and certify a trained run, and write what is proved")
    command.add_argument("workdir", help="the --workdir of train.py")
    command.add_argument("--num_images", type=int, help="only the first test images (default: as configured)")
    command.add_argument("--data_dir", help="where the data set lies now (default: as configured)")
    command.set_defaults(run=certify)
    arguments = parser.parse_args(argv)
    return run_command(lambda: arguments.run(arguments), "Interrupted.")


if __name__ == "__main__":
    sys.exit(main())
