"""Data sets that fit in memory: uint8 images and labels, their split by a seed, the fingerprint for certificates."""

import dataclasses
import hashlib

import numpy as np

from lipjax.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 (n, h, w, c), and their labels, int32 (n,). The arrays are read-only."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(f"Expected uint8 images (n, h, w, c), got {self.images.dtype} {self.images.shape}.")
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"Expected int32 labels ({len(self.images)},), one for each image, "
                f"got {self.labels.dtype} {self.labels.shape}."
            )
        self.images.setflags(write=False)
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A data set in host memory. A pixel in [0, 1] is `image / pixel_max`.

    notes: sentences for its owner: what was not read, what became of it, what is missing.
    """

    name: str
    train: Split
    validation: Split  # may be empty: validation_fraction = 0
    test: Split
    num_classes: int
    pixel_max: int = 255
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of every image."""
        height, width, channels = self.test.images.shape[1:]
        return height, width, channels

    def split(self, name: str) -> Split:
        """The split called "train", "validation" or "test"."""
        check_split(name)
        return getattr(self, name)

    def size(self, split: str) -> int:
        """The number of images in a split."""
        return len(self.split(split))

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) over pixel_max and over shape and bytes of the images and labels of a split, in order."""
        part = self.split(split)
        digest = hashlib.sha256(f"pixel_max {self.pixel_max}\n".encode())
        # Little-endian on every machine, so that two machines agree about the same data.
        for array in (part.images, part.labels.astype("<i4", copy=False)):
            digest.update(f"{array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def check_split(name: str) -> None:
    if name not in SPLITS:
        raise ValueError(f"Expected a split out of {SPLITS}, got {name!r}.")


def stratified_split(labels: np.ndarray, fraction: float, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Splits 0 … n-1 into the rest and a held-out part that takes the same share of every class.

    Args:
      labels: integers (n,).
      fraction: the share to hold out, 0 <= fraction < 1, rounded to whole images per class; one image of a class stays.
      seed: decides which images; the same on every platform and NumPy version.
      purpose: "validation" or "test". Draws for different purposes are independent.
    Returns: (rest, held_out), sorted, disjoint, together 0 … n-1.
    Raises: UserError if the fraction is out of range or too small to hold out anything.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"config.data.{purpose}_fraction must be at least 0 and below 1, got {fraction}.")
    order = np.argsort(stable_random_words(len(labels), seed, purpose), kind="stable")
    held_out = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out.append(members[: min(int(fraction * len(members) + 0.5), len(members) - 1)])
    held = np.sort(np.concatenate(held_out)) if held_out else np.empty(0, np.int64)
    if fraction > 0 and held.size == 0:
        raise UserError(
            f"config.data.{purpose}_fraction = {fraction} of {len(labels)} images in {len(held_out)} classes holds out "
            f"no image; give a larger fraction or more data."
        )
    return np.setdiff1d(np.arange(len(labels)), held, assume_unique=True), held


def stable_random_words(count: int, seed: int, purpose: str) -> np.ndarray:
    """`count` random uint64 that depend on seed and purpose alone: NumPy may change `permutation`, but not these."""
    if seed < 0:
        raise UserError(f"A data seed must be 0 or more, got {seed}.")
    entropy = [seed, *purpose.encode()]
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)


def split_by_seed(
    everything: Split, test: Split | None, *, validation_fraction: float, test_fraction: float, seed: int
) -> tuple[Split, Split, Split]:
    """Train, validation and test. The test split (where none is given) depends on test_fraction and seed alone.

    The validation split is a fraction of what the test split leaves, so changing it never moves an image into test.
    """
    if test is None:
        if test_fraction == 0:
            raise UserError("This data set has no test images of its own: config.data.test_fraction must be above 0.")
        rest, held = stratified_split(everything.labels, test_fraction, seed, "test")
        everything, test = everything.take(rest), everything.take(held)
    rest, held = stratified_split(everything.labels, validation_fraction, seed, "validation")
    return everything.take(rest), everything.take(held), test
