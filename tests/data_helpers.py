"""What the tests of the data sets share: configs, made-up archives, and the checks that replace published ones."""

import dataclasses
import io
import tarfile
import types

import numpy as np
from PIL import Image

from lipjax.training.data import ArrayDataset, load_dataset, prepared


def data_config(name="digits", data_dir="", **changes):
    """The config group `data`."""
    fields = {"path": "", "download": False, "validation_fraction": 0.1, "test_fraction": 0.2, "workers": 0}
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
