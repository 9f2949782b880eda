"""lipjax predict: the classes of image files, each with the proved radius inside which it cannot change."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lipjax.certify import FrozenNetwork
from lipjax.errors import UserError
from lipjax.evaluation.classes import shown_name
from lipjax.evaluation.html.parts import down
from lipjax.training.config import load_config
from lipjax.training.data.images import read_images
from lipjax.training.data.stream import centre_crop

CLAIM = (
    "Radii are proved: no change of an image whose l2 norm (pixels in [0, 1]) is below its radius changes the class "
    "that the frozen network computes in exact arithmetic."
)


def load_images(directory: pathlib.Path, files: Sequence[str | os.PathLike], network: FrozenNetwork) -> np.ndarray:
    """Image files as float64 pixels (n, h, w, c) in [0, 1], prepared as the run in the directory prepared its own.

    Without a run's config.json, as when a frozen network was copied alone, images must have the network's size.
    Raises: UserError for a file that cannot be read, has another size, or colours where the network takes grey images.
    """
    size = 0
    if (directory / "config.json").exists():
        config, _ = load_config(directory)
        size = config.data.image_size
        if config.data.name == "imagenet":
            found = []
            for file in map(pathlib.Path, files):
                try:
                    found.append(centre_crop(file.read_bytes(), network.in_shape[0], str(file)))
                except OSError as error:
                    raise UserError(f"{file} cannot be read ({error.strerror or error}).") from error
            return np.stack(found) / np.float64(255)
    height, width, channels = network.in_shape
    return read_images(files, (height, width, channels), size) / np.float64(255)


def predict_files(directory: pathlib.Path, files: Sequence[str | os.PathLike]) -> list[tuple[str, str, float]]:
    """(file, name of its class, proved radius) of image files.

    Args: directory: of a certified run, or a frozen network's own.
    Raises: UserError as `load_images` and `FrozenNetwork.load`; NotCertifiable if a layer has no proved bound.
    """
    alone = (directory / "network.json").exists()
    network = FrozenNetwork.load(directory if alone else directory / "frozen")
    classes, radii = network.predict(load_images(directory, files, network))
    names = network.class_names or [None] * network.num_classes
    return [
        (str(file), shown_name({"class": label, "name": names[label]}), radius)
        for file, label, radius in zip(files, classes.tolist(), radii.tolist(), strict=True)
    ]


def print_predictions(found: list[tuple[str, str, float]], console: Console) -> None:
    """A row for each file; radii are rounded down."""
    table = Table()
    for column in ("file", "class"):
        table.add_column(column, overflow="fold")
    table.add_column("proved l2 radius", justify="right")
    for file, name, radius in found:
        table.add_row(Text(file), Text(name), Text(down(radius)))
    if not console.is_terminal:  # a file has no edge
        console.width = max(console.width, 40 + max(len(file) + len(name) for file, name, _ in found))
    console.print(table)
    console.print(CLAIM)
