"""Data sets: small ones as uint8 arrays in host memory, ImageNet as a stream. TFDS, Grain and Pillow load on demand."""

from lipjax.training.data.arrays import ArrayDataset, Split, stratified_split
from lipjax.training.data.generated import GeneratedDataset, num_generated, open_generated
from lipjax.training.data.load import NAMES, load_dataset
from lipjax.training.data.stream import StreamDataset

__all__ = [
    "NAMES",
    "ArrayDataset",
    "GeneratedDataset",
    "Split",
    "StreamDataset",
    "load_dataset",
    "num_generated",
    "open_generated",
    "stratified_split",
]


def __dir__() -> list[str]:
    return __all__
