"""Data sets that need no preparation: the digits inside scikit-learn, and a user's own npz file or folder per class."""

import pathlib
import zipfile
import zlib

import numpy as np

from lipjax.errors import UserError
from lipjax.training.data.arrays import ArrayDataset, Split, split_by_seed

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def load_digits(*, validation_fraction: float, test_fraction: float, seed: int) -> ArrayDataset:
    """The 1,797 handwritten digits of scikit-learn: 8 x 8, one channel, values 0 … 16 as they are.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    from sklearn import datasets  # here, because it takes a second to import and only this data set needs it

    pixels, labels = datasets.load_digits(return_X_y=True)
    everything = Split(pixels.reshape(-1, 8, 8, 1).astype(np.uint8), labels.astype(np.int32))
    train, validation, test = split_by_seed(
        everything, None, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed
    )
    return ArrayDataset("digits", train, validation, test, 10, 16, tuple(str(digit) for digit in range(10)))


def load_npz(path: str, *, validation_fraction: float, test_fraction: float, seed: int) -> ArrayDataset:
    """A user's arrays: `images` uint8 (n, h, w, c) or (n, h, w) and integer `labels` (n,) from 0.

    `test_images` and `test_labels` are the test split where the file has them; otherwise test_fraction is held out.
    """
    file = _existing(path, "npz", pathlib.Path.is_file)
    try:
        # Opened here, because np.load leaves a broken file open.
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{file} is not a readable npz file of plain arrays ({error}); write it with np.savez."
        ) from error
    pairs = [("images", "labels")] + [("test_images", "test_labels")] * (
        "test_images" in found or "test_labels" in found
    )
    missing = [name for pair in pairs for name in pair if name not in found]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: it holds {', '.join(found) or 'nothing'}.")
    splits = [_checked(found[images], found[labels], images, labels, file) for images, labels in pairs]
    everything, test = splits[0], splits[1] if len(splits) == 2 else None
    num_classes = _num_classes(everything.labels, file)
    if test is not None:
        if test.images.shape[1:] != everything.images.shape[1:]:
            raise UserError(
                f"{file}: test_images are {test.images.shape[1:]}, images are {everything.images.shape[1:]}; "
                "both must have the same size and channels."
            )
        if test.labels.max() >= num_classes:
            raise UserError(f"{file}: test_labels reach {test.labels.max()}, labels only {num_classes - 1}.")
    train, validation, test = split_by_seed(
        everything, test, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed
    )
    return ArrayDataset(f"npz:{file.name}", train, validation, test, num_classes)


def load_folder(path: str, *, validation_fraction: float, test_fraction: float, seed: int) -> ArrayDataset:
    """A user's images as PATH/class_name/*.png|jpg|jpeg, all of one size; classes are numbered in sorted order.

    Images become RGB, or one channel if every one of them is grey.
    """
    root = _existing(path, "folder", pathlib.Path.is_dir)
    names = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"{root} must hold one folder of images for each class, at least two; it holds {len(names)}.")
    images, labels = [], []
    for label, name in enumerate(names):
        inside = (file for file in (root / name).iterdir() if not file.name.startswith(".") and file.is_file())
        files = sorted(file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{root / name} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}.")
        for file in files:
            images.append(_read_image(file))
            labels.append(label)
            if images[-1].shape[:2] != images[0].shape[:2]:
                raise UserError(
                    f"{file} is {images[-1].shape[:2]} (height, width), the first image is {images[0].shape[:2]}; "
                    "resize them all to one size."
                )
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]
    array = np.stack(images)
    everything = Split(array if array.ndim == 4 else array[..., None], np.array(labels, np.int32))
    train, validation, test = split_by_seed(
        everything, None, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed
    )
    return ArrayDataset(f"folder:{root.name}", train, validation, test, len(names), 255, tuple(names))


def _existing(path: str, kind: str, is_right) -> pathlib.Path:
    if not path:
        raise UserError(f"config.data.name is {kind!r}, so config.data.path must say where your data are.")
    found = pathlib.Path(path).expanduser()
    if not is_right(found):
        what = "file" if kind == "npz" else "folder"
        raise UserError(f"config.data.path: there is no {what} {found} (looked for {found.absolute()}).")
    return found


def _read_image(file: pathlib.Path) -> np.ndarray:
    """uint8 (h, w) for a grey image, (h, w, 3) otherwise."""
    from PIL import Image  # here, because only image files need Pillow

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{file} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits.")
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{file} is not a readable image ({error}); mend or remove it.") from error


def _checked(images: np.ndarray, labels: np.ndarray, images_name: str, labels_name: str, file: pathlib.Path) -> Split:
    if images.dtype != np.uint8:
        raise UserError(
            f"{file}: expected {images_name} as uint8 with values 0 … 255, got {images.dtype}. If they are floats in "
            f"[0, 1], store np.round(255 * {images_name}).astype(np.uint8); radii are in units of pixel / 255."
        )
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise UserError(f"{file}: expected {images_name} (n, h, w, c) or (n, h, w), got {images.shape}.")
    if images.ndim == 4 and images.shape[3] > 4:
        raise UserError(f"{file}: {images_name} are {images.shape}; channels come last, (n, h, w, c), at most 4.")
    if images.max() <= 1:
        raise UserError(
            f"{file}: {images_name} hold nothing above 1. They look like [0, 1] images cast to uint8; values must span "
            "0 … 255."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{file}: expected {labels_name} as integers ({len(images)},), one for each image, "
            f"got {labels.dtype} {labels.shape}."
        )
    if labels.min() < 0 or labels.max() >= 2**31:
        raise UserError(f"{file}: {labels_name} must be 0 … k-1, got {labels.min()} … {labels.max()}.")
    return Split(images if images.ndim == 4 else images[..., None], labels.astype(np.int32))


def _num_classes(labels: np.ndarray, file: pathlib.Path) -> int:
    present = np.unique(labels)
    if len(present) < 2:
        raise UserError(f"{file}: there must be at least two classes, got the label {present[0]} alone.")
    if present[-1] != len(present) - 1:
        absent = np.setdiff1d(np.arange(len(present)), present)[0]
        raise UserError(
            f"{file}: labels must be 0 … k-1 and each must occur; they reach {present[-1]}, but {absent} never occurs. "
            "Number the classes from 0 without gaps."
        )
    return len(present)
