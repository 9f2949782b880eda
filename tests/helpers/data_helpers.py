"""Shared by the tests of the data sets: configs, made-up archives, and the checks that replace published ones."""

import dataclasses
import io
import itertools
import tarfile
import types

import numpy as np
from PIL import Image

from lipjax.training.data import ArrayDataset, load_dataset, prepared


def data_config(name="digits", data_dir="", **changes):
    """The config group `data`."""
    fields = {"path": "", "download": False, "validation_fraction": 0.1, "test_fraction": 0.2, "workers": 0}
    fields |= {"image_size": 0, "resample": "bilinear"}
    return types.SimpleNamespace(name=name, data_dir=str(data_dir), **{**fields, **changes})


def load_arrays(config, seed=0) -> ArrayDataset:
    dataset = load_dataset(config, seed)
    assert isinstance(dataset, ArrayDataset)
    return dataset


def rows(*splits):
    """All (label, image) pairs of some splits, in an order that does not depend on theirs."""
    pairs = [pair for split in splits for pair in zip(split.images, split.labels, strict=True)]
    return sorted((int(label), image.tobytes()) for image, label in pairs)


def block_network(monkeypatch):
    """Blocks the network; the list that it returns fills with what tried to use it."""
    attempts = []

    def blocked(*address, **_):
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", blocked)
    monkeypatch.setattr("socket.socket.connect", blocked)
    return attempts


def expect(monkeypatch, name, **counts):
    """Makes the counts of a made-up archive those of the complete data set."""
    monkeypatch.setitem(prepared.PREPARED, name, dataclasses.replace(prepared.PREPARED[name], **counts))


def random_images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def encoded(image, kind="jpeg"):
    """The bytes of an image file, of an array or a Pillow image."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def add_file(archive, name, content):
    """Adds bytes to a tar archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_imagenet(data_dir):
    """Writes ImageNet's archives: 24 training images of two classes, one of them CMYK, and 10 for test.

    Returns: data_dir.
    """
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    sizes = [(40, 60), (60, 40), (33, 33)] * 4
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for label, wnid in enumerate(("n01440764", "n01739381")):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for index, size in enumerate(sizes):
                    pixels = np.full((*size, 3), 20 * index + label, np.uint8)
                    image = Image.fromarray(pixels)
                    name = f"{wnid}_{index}.JPEG"
                    if label == 1 and index == 0:
                        name, image = f"{wnid}_1309.JPEG", image.convert("CMYK")  # TFDS mends the images of this name
                    add_file(images, name, encoded(image))
            add_file(train, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as test:
        for index, size in enumerate(sizes[:10]):
            pixels = random_images(1, *size, 3, seed=index)[0]
            add_file(test, f"ILSVRC2012_val_{index:08}.JPEG", encoded(pixels))
    return data_dir


def take(batches, count):
    """The first batches of a stream."""
    return list(itertools.islice(batches, count))
