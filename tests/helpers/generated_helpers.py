"""Files of generated images that say which they are, and configs that mix them with real ones."""

import numpy as np
from training_helpers import tiny_config

from lipjax.training.data import open_generated

COUNT = 50
SHAPE, CLASSES = (8, 8, 1), 3


def numbered_images(count=COUNT, channels=1):
    """Images that say in their first pixels which they are."""
    images = np.random.default_rng(7).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = (part[:, None] for part in np.divmod(np.arange(count), 256))
    return images, np.arange(count) % CLASSES


def numbers(images):
    return (256 * images[:, 0, 0, 0].astype(int) + images[:, 0, 1, 0]).tolist()


def write_npz(path, compressed=False, **changes):
    images, labels = numbered_images()
    arrays = {"image": images, "label": labels, **changes}
    (np.savez_compressed if compressed else np.savez)(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def mixed_config(path, **changes):
    """12 real and 4 generated images in every batch, so that the 48 real ones make an epoch of 4 steps."""
    fields = {"data.generated.path": str(path), "data.generated.per_batch": 4, "data.generated.crop_padding": 2}
    return tiny_config(**{**fields, "num_epochs": 2, **changes})


def opened(path, shape=SHAPE, pixel_max=255, **changes):
    return open_generated(mixed_config(path, **changes), shape, CLASSES, pixel_max)
