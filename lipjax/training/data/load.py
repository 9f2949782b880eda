"""`load_dataset`: from the config group `data` to a data set."""

import dataclasses
from typing import Any

import numpy as np

from lipjax.errors import UserError
from lipjax.training.data import local, prepared, stream
from lipjax.training.data.arrays import SPLITS, ArrayDataset, Split
from lipjax.training.data.images import resize, resized_name
from lipjax.training.data.stream import StreamDataset

IMAGENET_SIZE = 224  # pixels of an image given to the network, as in the papers
OWN_DATA = ("npz", "folder")
NAMES = ("digits", *prepared.PREPARED, *OWN_DATA)


def load_dataset(config: Any, seed: int) -> ArrayDataset | StreamDataset:
    """Loads the data set that `config` describes. Nothing is fetched unless config.download is True.

    Args:
      config: the config group `data`. Read by attribute:
        name: one of `NAMES`.
        path: the file ("npz") or folder ("folder") of your own data; "" otherwise.
        data_dir: where TFDS keeps prepared data; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets.
        download: prepare a data set that is not there, fetching its archive.
        image_size: pixels of both sides that images get: ImageNet's crops (0: 224), others by `images.resize` (0: as
          they are).
        workers: processes that read and decode what is streamed; 0: threads.
        resample: how training crops of what is streamed become smaller: one of `stream.RESAMPLE`.
        validation_fraction: the part of the training images held out for selection, 0 <= f < 1.
        test_fraction: the part held out for test where the data have no test split of their own: digits, folder, and
          npz without test_images.
      seed: decides which images are held out, 0 <= seed < 2**32.
    Raises: UserError, at once, for a data set that is not there or not as expected.
    """
    name, fraction = config.name, config.validation_fraction
    if name not in NAMES:
        raise UserError(f"config.data.name must be one of {', '.join(NAMES)}; got {name!r}.")
    if config.path and name not in OWN_DATA:
        raise UserError(
            f"config.data.path is for your own data (config.data.name npz or folder), not for {name!r}; "
            f"got {config.path!r}."
        )
    if name == "imagenet":
        return _load_imagenet(config, seed)
    if name in prepared.PREPARED:
        data_dir = _prepared_dir(config)
        return _finished(prepared.load_prepared(name, data_dir, validation_fraction=fraction, seed=seed), config)
    split = {"validation_fraction": fraction, "test_fraction": config.test_fraction, "seed": seed}
    if name == "digits":
        return _finished(local.load_digits(**split), config)
    if name == "npz":
        return _finished(local.load_npz(config.path, **split), config)
    return _finished(local.load_folder(config.path, image_size=config.image_size, **split), config)


def _finished(dataset: ArrayDataset, config: Any) -> ArrayDataset:
    """The data set with images of the size that is asked for, and a note about classes that have no test image."""
    size, notes = config.image_size, list(dataset.notes)
    if size and dataset.image_shape[:2] != (size, size):
        splits = {name: dataset.split(name) for name in SPLITS}
        splits = {name: Split(_resized(split.images, size), split.labels) for name, split in splits.items()}
        dataset = dataclasses.replace(dataset, name=resized_name(dataset.name, size), **splits)
    absent = np.setdiff1d(np.arange(dataset.num_classes), dataset.test.labels)
    if absent.size:
        names = dataset.class_names or tuple(map(str, range(dataset.num_classes)))
        shown = ", ".join(names[label] for label in absent[: local.NAMED])
        more = f" and {absent.size - local.NAMED} more" if absent.size > local.NAMED else ""
        notes.append(
            f"No test image of {absent.size} of {dataset.num_classes} classes ({shown}{more}): nothing will be known "
            "about them."
        )
    return dataclasses.replace(dataset, notes=tuple(notes))


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    made = [resize(image, size) for image in images]
    return np.stack(made) if made else np.empty((0, size, size, images.shape[3]), np.uint8)


def _load_imagenet(config: Any, seed: int) -> StreamDataset:
    sources, names = prepared.open_prepared("imagenet", _prepared_dir(config))
    train, validation = stream.hold_out(sources["train"], config.validation_fraction, seed)
    splits = {"train": train, "validation": validation, "test": sources["test"]}
    size = config.image_size or IMAGENET_SIZE
    return StreamDataset("imagenet", splits, len(names), size, 255, names, config.workers, config.resample)


def _prepared_dir(config: Any):
    """The data_dir of a prepared data set; prepares it first where the user asked for that."""
    data_dir = prepared.resolve_data_dir(config.data_dir)
    if prepared.find_prepared(config.name, data_dir) is None:
        if not config.download:
            raise prepared.not_prepared(config.name, data_dir)
        from lipjax.training.data.prepare import prepare  # here, because reading needs none of it

        prepare(config.name, data_dir, download=True)
    return data_dir
