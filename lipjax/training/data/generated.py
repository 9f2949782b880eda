"""Generated images beside the real ones: read by index from disk, in batches that depend on seed and step alone."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console

from lipjax.errors import UserError
from lipjax.training.data import prepared
from lipjax.training.data.arrays import stable_random_words

Batch = tuple[np.ndarray, np.ndarray]
LAYOUT = (
    "Expected generated training images, values 0 … 255, of the size of the real ones, as\n"
    "  one .npz file with the arrays image, uint8 (n, h, w, c), and label, integers (n,) from 0: the code of\n"
    "  arXiv:2302.04638 says where to get such files for CIFAR-10 and CIFAR-100; or\n"
    "  a folder that TFDS prepared as array_record files, with the features image and label and a split train."
)
_STEPS = 2**31 - 1  # more than a run has
_THREADS, _AHEAD = 2, 4  # batches that are read at once, and in advance


@runtime_checkable
class Source(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...
    def read(self, indices: np.ndarray) -> Batch: ...


def num_generated(config: Any) -> int:
    """The number of the config.batch_size images of a step are generated; the others are real."""
    return config.data.generated.per_batch if config.data.generated.path else 0


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedDataset:
    """Batches of generated images, uint8 (b, h, w, c), and labels, int32 (b,).

    identity: what tells these images from others: their number and a checksum that the files themselves hold.
    """

    source: Source
    identity: dict[str, Any]

    def __len__(self) -> int:
        return len(self.source)

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0, shard_index: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Endless batches, a function of (seed, step) alone, read by threads in advance.

        The passes over the images, each shuffled anew, form one endless sequence; step t takes its entries
        t B … (t + 1) B - 1, and shard i of n the i-th of n equal pieces of these. Starting at step t reads nothing of
        the steps before.

        Args:
          batch_size: B, of all shards together.
          seed: decides the order, 0 <= seed < 2**32.
          start_step: the step of the first batch.
        Raises: ValueError if the batch does not divide over the shards; UserError for a damaged record.
        """
        import grain  # here, because only streamed data sets need it

        if not 0 <= shard_index < num_shards or batch_size < 1 or batch_size % num_shards:
            raise ValueError(
                "Expected 0 <= shard_index < num_shards and a batch that divides over the shards, "
                f"got {shard_index} of {num_shards} and {batch_size} images."
            )
        share = batch_size // num_shards
        steps = _Steps(lambda t: self.source.read(self._entries(t * batch_size + shard_index * share, share, seed)))
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        return iter(grain.MapDataset.source(steps)[start_step:].to_iter_dataset(options))

    def _entries(self, first: int, count: int, seed: int) -> np.ndarray:
        """Indices of `count` successive entries of the sequence of `batches`, from the one at `first`."""
        passes, places = np.divmod(np.arange(first, first + count), len(self))
        parts = [_order(len(self), seed, int(number))[places[passes == number]] for number in np.unique(passes)]
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The source that Grain reads ahead from: the batch of a step is the element of that number."""

    read: Any

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, index: int) -> Batch:
        return self.read(index)


@functools.lru_cache(maxsize=2)  # the pass that ends and the one that begins
def _order(count: int, seed: int, number: int) -> np.ndarray:
    return np.argsort(stable_random_words(count, seed, f"generated {number}"), kind="stable")


def open_generated(
    config: Any, image_shape: tuple[int, int, int], num_classes: int, pixel_max: int
) -> GeneratedDataset:
    """Opens the generated images that config.data.generated names; of the images it reads a few at most.

    Args:
      config: the whole config. Read by attribute: batch_size, and of data.generated:
        path: an .npz file or a folder of array_record files. cache_dir: where compressed images are unpacked to.
      image_shape, num_classes, pixel_max: of the real images.
    Raises: UserError, which says what is expected where, for files that are not there or not as expected.
    """
    group = config.data.generated
    path = pathlib.Path(group.path).expanduser()
    try:
        if pixel_max != 255:
            raise UserError(f"the real images have values 0 … {pixel_max}, so that none beside them can have 0 … 255")
        if path.is_dir():
            source, identity = _open_records(path, image_shape, num_classes)
        elif path.is_file():
            source, identity = _open_npz(path, group.cache_dir, image_shape, num_classes)
        else:
            raise UserError(f"there is no such file or folder (looked for {path.absolute()})")
    except UserError as error:
        raise UserError(
            f"config.data.generated.path = {group.path}: {error}.\n{LAYOUT}\nTo train without generated images: "
            f"--config.data.generated.path= --config.batch_size={config.batch_size - num_generated(config)}. "
            "See docs/data.md."
        ) from error
    return GeneratedDataset(source, identity)


def _check_images(shape: tuple[int, ...], dtype: Any, image_shape: tuple[int, int, int]) -> None:
    if dtype != np.uint8 or shape[1:] != image_shape or not shape[0]:
        raise UserError(f"image is {dtype} {shape}, expected uint8 (n, {', '.join(map(str, image_shape))})")


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"label reaches {labels.min()} … {labels.max()}, expected 0 … {num_classes - 1}")


# ---- npz


@dataclasses.dataclass(frozen=True)
class NpzSource:
    """Images mapped from a file, of which only what is read enters memory, and their labels."""

    images: np.memmap
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> Batch:
        return np.array(self.images[indices]), self.labels[indices]


def _open_npz(path: pathlib.Path, cache_dir: str, image_shape: tuple[int, int, int], num_classes: int) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [name for name in ("image", "label") if name not in members]
            if missing:
                raise UserError(f"it lacks {' and '.join(missing)} and holds {', '.join(members) or 'nothing'}")
            image, label = members["image"], members["label"]
            with archive.open(image) as stream:
                shape, fortran_order, dtype = _npy_header(stream)
            _check_images(shape, dtype, image_shape)
            with archive.open(label) as stream:
                label_shape, _, label_dtype = _npy_header(stream)
            if label_dtype.kind not in "iu" or label_shape != shape[:1]:
                raise UserError(f"label is {label_dtype} {label_shape}, expected integers ({shape[0]},)")
            with archive.open(label) as stream:
                labels = np.lib.format.read_array(stream, allow_pickle=False)
            _check_labels(labels, num_classes)
            file = path if image.compress_type == zipfile.ZIP_STORED else _unpacked(archive, image, path, cache_dir)
        with open(file, "rb") as stream:
            stream.seek(0 if file != path else _data_offset(stream, image))
            _npy_header(stream)
            offset = stream.tell()
        if offset + int(np.prod(shape)) > file.stat().st_size:
            raise ValueError("it is cut off")
        images = np.memmap(file, np.uint8, "r", offset, shape, "F" if fortran_order else "C")
    except UserError:
        raise
    except (ValueError, OSError, EOFError, NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"it is not a readable npz file of plain arrays ({error})") from error
    # The checksums of the arrays, by which the archive itself knows them: compressed or not, the same images are equal.
    identity = {"images": shape[0], "crc32": [f"{info.CRC:08x}" for info in (image, label)]}
    return NpzSource(images, labels.astype(np.int32)), identity


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) at the beginning of an array in NumPy's format."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of NumPy's format")
    return read(stream)


def _data_offset(stream: Any, member: zipfile.ZipInfo) -> int:
    """The place where an uncompressed member's bytes begin: after its header, which two lengths at its end complete."""
    stream.seek(member.header_offset + 26)
    return member.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: pathlib.Path, cache_dir: str) -> pathlib.Path:
    """The .npy file with the images of a compressed archive, made beside it or in cache_dir unless it is there."""
    folder = pathlib.Path(cache_dir).expanduser() if cache_dir else path.parent
    target = folder / f"{path.stem}.image-{member.CRC:08x}.npy"

    def is_whole() -> bool:
        return target.is_file() and target.stat().st_size == member.file_size

    if is_whole():
        return target
    elsewhere = "set config.data.generated.cache_dir to a folder with room"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{target.name}.lock") as alone:  # of all processes of a machine one unpacks
            if alone:
                for left in folder.glob(f".{target.name}.*.tmp"):  # of a process that was killed
                    left.unlink(missing_ok=True)
            if is_whole():
                return target
            free = shutil.disk_usage(folder).free
            if free < member.file_size:
                raise UserError(
                    f"its images are compressed, and unpacking them takes {member.file_size:,} bytes where {folder} "
                    f"has {free:,} free: {elsewhere}"
                )
            Console(stderr=True, soft_wrap=True, highlight=False).print(
                f"Unpacking the images of {path} once, to {target} ({member.file_size / 2**20:,.0f} MiB)."
            )
            temporary = folder / f".{target.name}.{uuid.uuid4().hex}.tmp"
            try:
                with open(temporary, "xb") as file:
                    with archive.open(member) as stream:
                        shutil.copyfileobj(stream, file, 2**24)
                    file.flush()
                    os.fsync(file.fileno())
                if not is_whole():  # without locks another process may have been faster, and have mapped its file
                    os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"its images are compressed and cannot be unpacked to {folder} ({error}): {elsewhere}"
        ) from error
    return target


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Waits until no other process is inside; gives whether none is, which a file system without locks cannot say."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


# ---- array_record


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Encoded images and labels in the array_record files of TFDS, decoded when they are read."""

    records: prepared.Records
    image_shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Batch:
        found = self.records.read([int(index) for index in indices])
        where, channels = self.records.where, self.image_shape[2]
        images = [prepared.decode_image(record["image"], channels, where) for record in found]
        labels = np.array([record["label"] for record in found], np.int32)
        for image in images:
            _check_images((1, *image.shape), image.dtype, self.image_shape)
        _check_labels(labels, self.num_classes)
        return np.stack(images), labels


def _open_records(path: pathlib.Path, image_shape: tuple[int, int, int], num_classes: int) -> Any:
    info = path / "dataset_info.json"
    if not info.is_file():
        raise UserError(f"there is no {info.name} in it: give the folder of the version, such as NAME/1.0.0")
    tfds = prepared.import_tfds()
    try:
        builder = tfds.builder_from_directory(path)
        found = builder.info.file_format.value if builder.info.file_format else "unknown"
        features, splits = set(builder.info.features), list(builder.info.splits)
        classes = getattr(builder.info.features["label"], "num_classes", None) if "label" in features else None
    except Exception as error:  # damaged files raise whatever the parser that met them raises
        raise UserError(f"its description is damaged ({error})") from error
    if found != prepared.FILE_FORMAT or not {"image", "label"} <= features or "train" not in splits:
        raise UserError(f"it holds {found} files with the features {sorted(features)} and the splits {splits}")
    if classes not in (None, num_classes):
        raise UserError(f"its labels are of {classes} classes, expected {num_classes}")
    try:
        data = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:  # as above
        raise UserError(f"its files are damaged or not all there ({error})") from error
    source = RecordSource(prepared.Records(data, str(path)), image_shape, num_classes)
    if len(source) == 0:
        raise UserError("it holds no images")
    source.read(np.array([0, len(source) - 1]))
    split = builder.info.splits["train"]
    digest = hashlib.sha256(f"{split.num_bytes} {list(split.shard_lengths)}\n".encode())
    for index in np.linspace(0, len(source) - 1, min(len(source), 64)).astype(int):  # records hold no checksum
        digest.update(source.records[int(index)]["image"])
    return source, {"images": len(source), "sha256": digest.hexdigest()}
