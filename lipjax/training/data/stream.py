"""Data sets too large for memory: ImageNet, read by index through Grain, decoded and cropped on the host."""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import flags

from lipjax.errors import UserError
from lipjax.training import stopping
from lipjax.training.data import jpeg
from lipjax.training.data.arrays import check_split, stable_random_words
from lipjax.training.data.kept_buffers import KeptBuffers
from lipjax.training.data.prepared import open_image

Batch = tuple[np.ndarray, np.ndarray]
# Decoding releases the interpreter lock, so threads suffice for some cores; each may decode ahead a little.
NUM_THREADS = 16
CHUNK = 32  # images that a worker process hands over at a time
RESAMPLE = ("bilinear", "nearest")  # how training crops become smaller


@runtime_checkable
class Records(Protocol):
    """Records by index: {"image": encoded bytes, "label": int}."""

    @property
    def where(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some records of a source, in the given order."""

    records: Records
    indices: np.ndarray

    @property
    def where(self) -> str:
        return self.records.where

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[int(self.indices[index])]


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Of each `every` images, from the one at `first` on, the first `length`, one after the other; endless."""

    images: Any
    first: int
    length: int
    every: int

    def __len__(self) -> int:
        return 2**48  # more than a run has

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        piece, place = divmod(index, self.length)
        return self.images[self.first + piece * self.every + place]


@dataclasses.dataclass(frozen=True, eq=False)
class StreamDataset:
    """Batches of uint8 images (b, s, s, 3) and int32 labels (b,), s = image_size. A pixel in [0, 1] is image / 255.

    Training images: the shorter side resized to a uniform size in [s, 9 s / 7], then a random s x s crop. Not flipped:
    that is left to `augment`, on the device. Evaluation: the shorter side resized to 8 s / 7, then the centre crop.
    At s = 224 these are 224 … 288 and 256, as in the code of arXiv:2301.12549.

    resample: "bilinear", which averages over the pixels that become one, or "nearest", which takes one of them: less
    work, and other training images than the papers'. Evaluation is always bilinear.
    workers: processes that read and decode; 0: threads of this one. Batches are the same for any number. Processes are
    spawned, so that a program that asks for them must have its work under `if __name__ == "__main__":`.
    """

    name: str
    splits: Mapping[str, Records]  # train, validation, test
    num_classes: int
    image_size: int
    pixel_max: int = 255
    class_names: tuple[str, ...] | None = None
    workers: int = 0
    resample: str = "bilinear"
    notes: tuple[str, ...] = ()  # as of an ArrayDataset

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of every image of a batch."""
        return self.image_size, self.image_size, 3

    def size(self, split: str) -> int:
        """The number of images in a split."""
        check_split(split)
        return len(self.splits[split])

    def train_batches(
        self, batch_size: int, seed: int, start_step: int = 0, shard_index: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """Endless training batches, a function of (seed, step) alone.

        The epochs, each shuffled anew, form one endless sequence; step t takes its entries t B … (t + 1) B - 1, crops
        included, and shard i of n the i-th of n equal pieces of these. So the shards of a step, one after the other,
        are the same for every n, and starting at step t reads nothing of the steps before.

        Args:
          batch_size: B, the global batch; a shard yields B / num_shards images.
          seed: decides order and crops, 0 <= seed < 2**32.
          start_step: the step of the first batch.
        Raises: ValueError if the batch does not divide over the shards; UserError for a damaged record.
        """
        import grain  # here, because only streamed data sets need it

        _check_shards(batch_size, shard_index, num_shards)
        records = self.splits["train"]
        crop = functools.partial(_train_view, size=self.image_size, where=records.where, resample=self.resample)
        images = grain.MapDataset.source(records).seed(seed).shuffle().repeat().random_map(crop)
        share = batch_size // num_shards
        pieces = _Pieces(images, start_step * batch_size + shard_index * share, share, batch_size)
        return _batches(grain.MapDataset.source(pieces), (share, *self.image_shape), self.workers)

    def eval_batches(self, split: str, batch_size: int, shard_index: int = 0, num_shards: int = 1) -> Iterator[Batch]:
        """Every image of a split once, in order, in full batches: the last is filled up with black images labelled -1.

        Shard i of n takes every n-th image from the i-th. All shards yield ceil(size / batch_size) batches of
        batch_size / num_shards images, so that processes stay in step.
        """
        import grain  # as above

        _check_shards(batch_size, shard_index, num_shards)
        check_split(split)
        records = self.splits[split]
        crop = functools.partial(_eval_view, size=self.image_size, where=records.where)
        images = grain.MapDataset.source(records).map(crop)[shard_index::num_shards]
        per_shard = batch_size // num_shards
        steps = -(-len(records) // batch_size)
        return _batches(images, (per_shard, *self.image_shape), self.workers, steps)

    def images(self, split: str, indices: np.ndarray, batch_size: int) -> Batch:
        """The images of a split at these places, in this order, as `eval_batches` gives them, and their labels."""
        part = dataclasses.replace(self, splits={**self.splits, split: Subset(self.splits[split], indices)})
        parts = [(images[labels >= 0], labels[labels >= 0]) for images, labels in part.eval_batches(split, batch_size)]
        images, labels = (np.concatenate(a) for a in zip(*parts, strict=True))
        return images, labels

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) over image size, labels and encoded images of a split, in order. Reads the whole split."""
        check_split(split)
        records = self.splits[split]
        digest = hashlib.sha256(f"image_size {self.image_size} count {len(records)}\n".encode())
        for index in range(len(records)):
            record = records[index]
            digest.update(f"{record['label']} {len(record['image'])}\n".encode())
            digest.update(record["image"])
        return digest.hexdigest()


def hold_out(records: Records, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """(rest, validation) of the training records. Not stratified: that would read every label first.

    The validation part is a uniform random sample; each class is represented to within its sampling error.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"config.data.validation_fraction must be at least 0 and below 1, got {fraction}.")
    order = np.argsort(stable_random_words(len(records), seed, "validation"), kind="stable")
    count = int(fraction * len(records) + 0.5)
    return Subset(records, np.sort(order[count:])), Subset(records, np.sort(order[:count]))


# At the top of a module, so that worker processes can be told of them.
def _train_view(
    record: dict[str, Any], generator: np.random.Generator, size: int, where: str, resample: str
) -> tuple[np.ndarray, int]:
    return random_crop(record["image"], size, generator, where, resample), record["label"]


def _eval_view(record: dict[str, Any], size: int, where: str) -> tuple[np.ndarray, int]:
    return centre_crop(record["image"], size, where), record["label"]


def random_crop(
    encoded: bytes, size: int, generator: np.random.Generator, where: str, resample: str = "bilinear"
) -> np.ndarray:
    """The training view of `StreamDataset`: a random scale and place, resampled once from the original pixels."""
    from PIL import Image  # as in open_image

    pixels = jpeg.decoded(encoded)
    image = open_image(encoded, where).convert("RGB") if pixels is None else Image.fromarray(pixels)
    resized_short = generator.uniform(size, size * 9 / 7)
    side = size * min(image.size) / resized_short  # of the crop, in original pixels
    left, top = (generator.uniform(0, length - side) for length in image.size)
    return _resample(image, (size, size), (left, top, left + side, top + side), resample)


def centre_crop(encoded: bytes, size: int, where: str) -> np.ndarray:
    """The evaluation view of `StreamDataset`: resize the shorter side to 8/7 size, then cut out the centre."""
    image = open_image(encoded, where).convert("RGB")
    resized_short = round(size * 8 / 7)
    width, height = (round(length * resized_short / min(image.size)) for length in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return _resample(image, (width, height), None)[top : top + size, left : left + size]


def _resample(
    image: Any, size: tuple[int, int], box: tuple[float, float, float, float] | None, resample: str = "bilinear"
) -> np.ndarray:
    from PIL import Image  # as in open_image

    return np.asarray(image.resize(size, Image.Resampling[resample.upper()], box=box))


def _check_shards(batch_size: int, shard_index: int, num_shards: int) -> None:
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"Expected 0 <= shard_index < num_shards, got {shard_index} of {num_shards}.")
    if batch_size < 1 or batch_size % num_shards:
        raise ValueError(f"The batch of {batch_size} images does not divide over {num_shards} shards.")


def _decoded(images: Any, batch_size: int, workers: int) -> Generator[tuple[Any, Any], None, None]:
    """Decoded images and labels in order, some at a time: by threads, or by processes that take every n-th chunk."""
    import grain  # as above

    # Grain's default buffer of 500 elements is meant for whole batches; here an element is one image or a chunk.
    if workers == 0:
        options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=max(2 * batch_size, NUM_THREADS))
        for image, label in images.to_iter_dataset(options):
            yield (image,), (label,)
        return
    if not flags.FLAGS.is_parsed():  # Grain asks for its flags, also in a program that has none
        flags.FLAGS.mark_as_parsed()
    threads = max(NUM_THREADS // workers, 1)
    chunks = images.batch(CHUNK).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    processes = iter(chunks.mp_prefetch(options, worker_init_fn=stopping.ignore_in_reader))
    # Earlier than Python's own end of them, by SIGTERM, which they ignore.
    atexit.register(processes.close)
    try:
        yield from processes
    finally:
        atexit.unregister(processes.close)
        processes.close()


def _batches(images: Any, shape: tuple[int, ...], workers: int, steps: int | None = None) -> Iterator[Batch]:
    """Puts decoded images into batches of a shape; of so many steps if that is given, filled up with no images."""
    size, buffers = shape[0], KeptBuffers(shape)
    pixels, labels, count, done = None, np.empty(size, np.int32), 0, 0
    with contextlib.closing(_decoded(images, size, workers)) as decoded:
        for some, classes in decoded:
            first = 0
            while first < len(some):
                pixels = buffers.take() if pixels is None else pixels
                last = min(first + size - count, len(some))
                stop = count + last - first
                pixels[count:stop], labels[count:stop] = some[first:last], classes[first:last]
                first, count = last, stop
                if count == size:
                    batch, pixels = (pixels, labels), None
                    yield batch
                    del batch  # so that its memory is free when nobody reads it
                    labels, count, done = np.empty(size, np.int32), 0, done + 1
    while steps is not None and done < steps:
        pixels = buffers.take() if pixels is None else pixels
        pixels[count:], labels[count:] = 0, -1
        batch, pixels = (pixels, labels), None
        yield batch
        del batch
        labels, count, done = np.empty(size, np.int32), 0, done + 1
