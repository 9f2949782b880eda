"""Writes a split of a run's data set as one .npz file, such as the held-out test images of one's own folder.

Run: lipjax prepare export --workdir=DIR --split=test --output=FILE.npz
"""

import argparse
import json
import os
import pathlib

import numpy as np

from lipjax.errors import UserError, run_command
from lipjax.files import save_arrays
from lipjax.training.config import load_config
from lipjax.training.data import StreamDataset, load_dataset
from lipjax.training.data.arrays import SPLITS, Split


def export_split(
    workdir: str | os.PathLike,
    output: str | os.PathLike,
    split: str = "test",
    *,
    data_dir: str | None = None,
    path: str | None = None,
) -> Split:
    """Writes the images and labels of a split, as a run has them, with the names of the classes if they have some.

    The test split becomes test_images and test_labels, which `python -m lipjax check DIR --data FILE` reads; another
    one images and labels.

    Args: workdir: of one run, with config.json. data_dir, path: where the data lie now, if not where the config says.
    Returns: what was written.
    Raises: UserError if there is no run, its data are streamed or are not those of its certificate, or the file has
      another ending than .npz.
    """
    workdir, output = pathlib.Path(workdir).expanduser(), pathlib.Path(output).expanduser()
    if output.suffix != ".npz":
        raise UserError(f"--output must end in .npz, got {output}.")
    seeds = sorted(folder.parent.name for folder in workdir.glob("seed_*/config.json"))
    if seeds and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds several runs, each with a split of its own: give {workdir / seeds[0]}.")
    config, seed = load_config(workdir)
    with config.unlocked():
        config.data.data_dir = config.data.data_dir if data_dir is None else data_dir
        config.data.path = config.data.path if path is None else path
    dataset = load_dataset(config.data, seed)
    if isinstance(dataset, StreamDataset):
        raise UserError(f"{dataset.name} is streamed and too large for one file of arrays.")
    part = dataset.split(split)
    if len(part) == 0:
        raise UserError(f"The {split} split of {dataset.name} is empty.")
    if split == "test":
        _check_certified(workdir, dataset.fingerprint("test"))
    prefix = "test_" if split == "test" else ""
    arrays = {f"{prefix}images": part.images, f"{prefix}labels": part.labels}
    if dataset.class_names is not None:
        arrays["class_names"] = np.array(dataset.class_names)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(output, **arrays)
    return part


def _check_certified(workdir: pathlib.Path, digest: str) -> None:
    """Raises: UserError if there is a certificate, and it is about other test images."""
    path = workdir / "certificate.json"
    try:
        certified = json.loads(path.read_text(encoding="utf-8"))["data"]["sha256"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Certify the run again: python -m lipjax certify {workdir}"
        ) from error
    if certified != digest:
        raise UserError(
            f"The test images of this run are not those that {path} is about: the data were changed, or lie elsewhere "
            "(--path, --data_dir)."
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lipjax prepare export", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a run: the --workdir of train.py, or its seed_<n>")
    parser.add_argument("--output", required=True, help="the .npz file to write")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--data_dir", help="where the data set lies now (default: as configured)")
    parser.add_argument("--path", help="of your own data, where they lie now (default: as configured)")
    found = parser.parse_args(argv)

    def command() -> None:
        part = export_split(found.workdir, found.output, found.split, data_dir=found.data_dir, path=found.path)
        print(f"Written to {found.output}: {len(part)} {found.split} images and their labels.")
        if found.split == "test":
            print(
                f"Certificates are checked with it by\n  python -m lipjax check {found.workdir} --data {found.output}"
            )

    return run_command(command, "Interrupted. Nothing was written.")
