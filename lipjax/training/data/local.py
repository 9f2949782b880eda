"""Data sets that need no preparation: the digits inside scikit-learn, and a user's own npz file or folder per class."""

import collections
import pathlib
import zipfile
import zlib

import numpy as np

from lipjax.errors import UserError
from lipjax.training.data.arrays import ArrayDataset, Split, split_by_seed
from lipjax.training.data.images import BACKGROUND, SUFFIXES, ReadImage, read_image, resized_name

NAMED = 3  # files that a note names; the others it counts


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
    `class_names` (k,), texts, may name the classes.
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
    names = _class_names(found["class_names"], num_classes, file) if "class_names" in found else None
    return ArrayDataset(f"npz:{file.name}", train, validation, test, num_classes, class_names=names)


def load_folder(
    path: str, *, image_size: int, validation_fraction: float, test_fraction: float, seed: int
) -> ArrayDataset:
    """A user's images as PATH/class_name/FILE with the endings `SUFFIXES`; classes are numbered in sorted order.

    Images become RGB, or one channel if every one of them is grey. What is not read, and what is not as it is in the
    files, is told by the `notes` of the data set.

    Args: image_size: they become so large by `images.resize`; 0: all must have one size.
    """
    root = _existing(path, "folder", pathlib.Path.is_dir)
    names, files, labels, ignored = _listing(root)
    read: list[ReadImage] = []
    for file in files:
        read.append(read_image(file, image_size))
        shape, first = (image.pixels.shape[:2] for image in (read[-1], read[0]))
        if shape != first:
            raise UserError(
                f"{file} is {shape} (height, width), the first image is {first}; resize them all to one size, or let "
                "config.data.image_size say to how many pixels a side."
            )
    notes = [f"Not read in {root}: {_ignored(ignored, root)}."] if ignored else []
    pixels = _alike(read, files, root, notes)
    everything = Split(pixels, np.array(labels, np.int32))
    train, validation, test = split_by_seed(
        everything, None, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed
    )
    name = f"folder:{root.name}"
    if any(image.resized for image in read):
        name = resized_name(name, image_size)
    return ArrayDataset(name, train, validation, test, len(names), 255, names, tuple(notes))


def folder_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The image files of a folder per class, as `load_folder` reads them. Raises: UserError as there."""
    return _listing(root)[1]


def _listing(root: pathlib.Path) -> tuple[tuple[str, ...], list[pathlib.Path], list[int], list[pathlib.Path]]:
    """Class names, image files, their labels, and what else lies there but hidden files."""

    def inside(folder):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))

    names = tuple(folder.name for folder in inside(root) if folder.is_dir())
    if len(names) < 2:
        raise UserError(f"{root} must hold one folder of images for each class, at least two; it holds {len(names)}.")
    files, labels, ignored = [], [], [path for path in inside(root) if not path.is_dir()]
    for label, name in enumerate(names):
        paths = inside(root / name)
        known = [path for path in paths if path.is_file() and path.suffix.lower() in SUFFIXES]
        others = sorted({*paths} - {*known})
        if not known:
            held = f" but {_ignored(others, root)}" if others else ""
            raise UserError(f"{root / name} holds no image{held}; expected files ending in {', '.join(SUFFIXES)}.")
        files += known
        labels += [label] * len(known)
        ignored += others
    return names, files, labels, ignored


def _alike(read: list[ReadImage], files: list[pathlib.Path], root: pathlib.Path, notes: list[str]) -> np.ndarray:
    """Pixels (n, h, w, c) of images of one size, c = 1 if all are grey, and notes about what the files have else."""
    transparent = [file for file, image in zip(files, read, strict=True) if image.composited]
    if transparent:
        notes.append(
            f"Transparent in part, and put onto {BACKGROUND}: {len(transparent)} of {len(files)} images "
            f"({_some(transparent, root)})."
        )
    pixels = [image.pixels for image in read]
    grey, colour = ([file for file, a in zip(files, pixels, strict=True) if a.ndim == ndim] for ndim in (2, 3))
    if not colour:
        return np.stack(pixels)[..., None]
    if grey:
        few, kind = (grey, "Grey") if len(grey) < len(colour) else (colour, "In colour")
        notes.append(
            f"All images became RGB, because they disagree. {kind}: {len(few)} of {len(files)} ({_some(few, root)})."
        )
    return np.stack([a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in pixels])


def _ignored(paths: list[pathlib.Path], root: pathlib.Path) -> str:
    """A sentence about what was not read: files counted by the ends of their names, folders by name."""
    folders = [path for path in paths if path.is_dir()]
    kinds = collections.Counter(path.suffix.lower() or "without an ending" for path in paths if not path.is_dir())
    said = []
    if kinds:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        said.append(f"{kinds.total()} file{'s' * (kinds.total() > 1)} ({listed})")
    if folders:
        said.append(f"{len(folders)} nested folder{'s' * (len(folders) > 1)} ({_some(folders, root)})")
    return " and ".join(said)


def _some(paths: list[pathlib.Path], root: pathlib.Path) -> str:
    """The first of some paths."""
    shown = ", ".join(str(path.relative_to(root)) for path in paths[:NAMED])
    return shown + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")


def _existing(path: str, kind: str, is_right) -> pathlib.Path:
    if not path:
        raise UserError(f"config.data.name is {kind!r}, so config.data.path must say where your data are.")
    found = pathlib.Path(path).expanduser()
    if not is_right(found):
        what = "file" if kind == "npz" else "folder"
        raise UserError(f"config.data.path: there is no {what} {found} (looked for {found.absolute()}).")
    return found


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


def _class_names(names: np.ndarray, num_classes: int, file: pathlib.Path) -> tuple[str, ...]:
    if names.dtype.kind != "U" or names.shape != (num_classes,):
        raise UserError(
            f"{file}: expected class_names as texts ({num_classes},), one for each class, got {names.dtype} "
            f"{names.shape}. Store np.array(['cat', 'dog', ...])."
        )
    return tuple(map(str, names))


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
