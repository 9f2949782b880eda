"""Reading data sets that TFDS has prepared as array_record files. Needs no TensorFlow and never the network."""

import dataclasses
import io
import os
import pathlib
import re
from typing import Any

import numpy as np

from lipjax.errors import UserError
from lipjax.training.data.arrays import ArrayDataset, Split, split_by_seed

INSTALL = "pip install tensorflow-datasets array_record importlib_resources pillow grain"
# TFDS's other formats are out: tfrecord needs TensorFlow to read, and parquet loses records silently (TFDS 4.9.10).
FILE_FORMAT = "array_record"


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """The place where TFDS keeps a data set, and what a complete one holds."""

    builder: str
    train: int  # images in the split "train"
    test_split: str  # the labelled split that serves as test
    test: int
    num_classes: int
    image_shape: tuple[int, int, int] | None  # None: photographs of any size


PREPARED = {
    "mnist": PreparedSet("mnist", 60_000, "test", 10_000, 10, (28, 28, 1)),
    "cifar10": PreparedSet("cifar10", 50_000, "test", 10_000, 10, (32, 32, 3)),
    "cifar100": PreparedSet("cifar100", 50_000, "test", 10_000, 100, (32, 32, 3)),
    # The labels of the test images of these two are not public; as everywhere, "validation" serves as test.
    "tiny_imagenet": PreparedSet("tiny_imagenet", 100_000, "validation", 10_000, 200, (64, 64, 3)),
    "imagenet": PreparedSet("imagenet2012", 1_281_167, "validation", 50_000, 1000, None),
}


def resolve_data_dir(data_dir: str) -> pathlib.Path:
    """The folder of prepared data: data_dir, else $TFDS_DATA_DIR, else ~/tensorflow_datasets as TFDS itself does."""
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def find_prepared(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """The folder of the newest prepared version of a data set, or None. Looks at the disk alone."""
    versions = [info.parent for info in (data_dir / PREPARED[name].builder).glob("*/dataset_info.json")]
    versions = [folder for folder in versions if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    return max(versions, key=lambda folder: tuple(map(int, folder.name.split("."))), default=None)


def not_prepared(name: str, data_dir: pathlib.Path) -> UserError:
    """The error for a data set that is not there: what is missing, where, and how to get it."""
    where = data_dir / PREPARED[name].builder / "*" / "dataset_info.json"
    return UserError(
        f"The data set {name!r} is not prepared: there is no {where}. Prepare it once with\n"
        f"  {prepare_command(name, data_dir)}\n"
        f"(leave --download out to use archives that you put under {manual_dir(data_dir)}). This needs\n  {INSTALL}\n"
        "but not TensorFlow. If it is prepared elsewhere, set config.data.data_dir; see docs/data.md."
    )


def prepare_command(name: str, data_dir: pathlib.Path) -> str:
    download = "" if name == "imagenet" else " --download"
    return f"lipjax prepare {name} --data_dir {data_dir}{download}"


def manual_dir(data_dir: pathlib.Path) -> pathlib.Path:
    """The folder into which a user puts archives that were fetched by hand."""
    return data_dir / "downloads" / "manual"


def import_tfds() -> Any:
    """TFDS, imported only when a data set needs it."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"This data set is read through TFDS, which is not here ({error}):\n  {INSTALL}") from error
    return tfds


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one prepared split, by index: `source[i]` is {"image": encoded bytes, "label": int}."""

    records: Any
    where: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([int(index)])[0]

    def read(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several records at once, which is about twice as fast."""
        try:
            found = self.records.__getitems__(indices)
        except Exception as error:  # damaged files raise whatever the parser that met them raises
            raise damaged(self.where, error) from error
        return [{"image": record["image"], "label": int(record["label"])} for record in found]


def open_prepared(name: str, data_dir: pathlib.Path) -> tuple[dict[str, Records], tuple[str, ...]]:
    """Opens train and test of a prepared data set.

    Returns: {"train": Records, "test": Records} and the class names.
    Raises: UserError if it is not there, of another file format, damaged or incomplete.
    """
    wanted = PREPARED[name]
    folder = find_prepared(name, data_dir)
    if folder is None:
        raise not_prepared(name, data_dir)
    tfds = import_tfds()
    sources = {}
    try:
        builder = tfds.builder_from_directory(folder)
        found = builder.info.file_format.value if builder.info.file_format else "unknown"
        counts = {split: info.num_examples for split, info in builder.info.splits.items()}
        names = tuple(builder.info.features["label"].names)
        if found == FILE_FORMAT:
            # The encoded bytes, so that one decoder (decode_image) decides about pixels: TFDS would take OpenCV if
            # installed; its JPEG pixels differ from Pillow's, and the fingerprint would depend on the machine.
            decoders = {"image": tfds.decode.SkipDecoding()}
            for split, stored in (("train", "train"), ("test", wanted.test_split)):
                if stored in counts:
                    sources[split] = Records(builder.as_data_source(stored, decoders=decoders), f"{folder} ({stored})")
    except Exception as error:  # as above
        raise damaged(str(folder), error) from error
    if found != FILE_FORMAT:
        raise UserError(
            f"{folder} holds {found} files; lipjax reads {FILE_FORMAT}, which needs no TensorFlow. Prepare it into "
            f"another folder with\n  {prepare_command(name, pathlib.Path('OTHER_DIR'))}\nand set config.data.data_dir."
        )
    expected = {"train": wanted.train, wanted.test_split: wanted.test}
    if {split: counts.get(split) for split in expected} != expected or len(names) != wanted.num_classes:
        raise UserError(
            f"{folder} is incomplete: expected {expected} images in {wanted.num_classes} classes, found {counts} in "
            f"{len(names)}. Remove that folder and prepare it again."
        )
    return sources, names


def load_prepared(name: str, data_dir: pathlib.Path, *, validation_fraction: float, seed: int) -> ArrayDataset:
    """Reads a small prepared data set into memory; its own test split stays, validation is a part of train."""
    sources, names = open_prepared(name, data_dir)
    everything, test = (_read_all(sources[split], PREPARED[name]) for split in ("train", "test"))
    train, validation, test = split_by_seed(
        everything, test, validation_fraction=validation_fraction, test_fraction=0.0, seed=seed
    )
    return ArrayDataset(name, train, validation, test, len(names), 255, names)


def _read_all(source: Records, wanted: PreparedSet, chunk: int = 1000) -> Split:
    shape = wanted.image_shape
    assert shape is not None, "photographs of any size are streamed, not read into memory"
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), chunk):
        records = source.read(list(range(start, min(start + chunk, len(source)))))
        for position, record in enumerate(records, start):
            where = f"record {position} of {source.where}"
            pixels = decode_image(record["image"], shape[2], where)
            if pixels.shape != shape or not 0 <= record["label"] < wanted.num_classes:
                raise damaged(where, f"image {pixels.shape}, label {record['label']}")
            images[position] = pixels
            labels[position] = record["label"]
    return Split(images, labels)


def decode_image(encoded: bytes, channels: int, where: str) -> np.ndarray:
    """Decodes PNG or JPEG bytes to uint8 (h, w, channels); a grey image takes three channels where 3 are asked for."""
    pixels = np.asarray(open_image(encoded, where).convert("L" if channels == 1 else "RGB"))
    return pixels if channels == 3 else pixels[..., None]


def open_image(encoded: bytes, where: str) -> Any:
    """The decoded Pillow image of PNG or JPEG bytes, or the UserError for a damaged one."""
    from PIL import Image  # here, because only prepared data sets and image files need Pillow

    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except (OSError, SyntaxError) as error:
        raise damaged(where, error) from error
    return image


def damaged(where: str, error: object) -> UserError:
    return UserError(f"{where} is damaged or not as lipjax expects ({error}). Remove that folder and prepare it again.")
