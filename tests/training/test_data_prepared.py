"""Prepared data sets: the real TFDS builders on made-up archives in the official formats, and what is read back.

The archives are tiny, so the published checksums and counts are replaced; everything else is the code that users run.
"""

import dataclasses
import gzip
import importlib.util
import io
import json
import os
import shutil
import tarfile
import types
import zipfile

import numpy as np
import pytest
from data_helpers import (
    add_file,
    block_network,
    data_config,
    encoded,
    expect,
    load_arrays,
    random_images,
    rows,
)
from PIL import Image
from tensorflow_datasets.core import utils
from tensorflow_datasets.core.download import checksums, extractor
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.image_classification import cifar, mnist

from lipjax.errors import UserError
from lipjax.training.data import prepare, prepared, tiny_imagenet
from lipjax.training.prepare import main as prepare_main

BUILDERS = {"cifar10": cifar.Cifar10, "mnist": mnist.MNIST, "tiny_imagenet": tiny_imagenet.TinyImagenet}
ANIMALS = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture
def network(monkeypatch):
    return block_network(monkeypatch)


@pytest.fixture
def accept(monkeypatch):
    """Makes the checksums and counts of a made-up archive the expected ones."""

    def patch(name, data_dir, **counts):
        expect(monkeypatch, name, **counts)
        builder, folder = BUILDERS[name], data_dir / "downloads" / "manual"
        infos = {url: checksums.compute_url_info(folder / info.filename) for url, info in builder.url_infos.items()}
        monkeypatch.setattr(builder, "url_infos", infos)

    return patch


# ---- CIFAR-10 and MNIST


@pytest.fixture(scope="module")
def cifar_archive(tmp_path_factory):
    """data_dir with cifar-10-binary.tar.gz: five files of 20 records and a test file of 20; and the raw arrays."""
    data_dir = tmp_path_factory.mktemp("cifar")
    (data_dir / "downloads" / "manual").mkdir(parents=True)
    pixels = random_images(120, 3, 32, 32)
    labels = np.arange(120, dtype=np.uint8) % 10
    records = np.concatenate([labels[:, None], pixels.reshape(120, 3072)], axis=1)
    files = [f"data_batch_{index}.bin" for index in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(data_dir / "downloads" / "manual" / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for file, part in zip(files, np.split(records, 6), strict=True):
            add_file(archive, f"cifar-10-batches-bin/{file}", part.tobytes())
        add_file(archive, "cifar-10-batches-bin/batches.meta.txt", ("\n".join(ANIMALS) + "\n\n").encode())
    return data_dir, pixels.transpose(0, 2, 3, 1), labels


@pytest.fixture
def cifar_dir(cifar_archive, accept, network, tmp_path):
    """A prepared copy of the archive that a test may damage."""
    data_dir = cifar_archive[0]
    accept("cifar10", data_dir, train=100, test=20)
    prepare.prepare("cifar10", data_dir, download=False)
    shutil.copytree(data_dir / "cifar10", tmp_path / "cifar10")
    return tmp_path


def test_cifar10_is_prepared_and_read_as_it_was(cifar_archive, cifar_dir, network):
    _, images, labels = cifar_archive
    dataset = load_arrays(data_config("cifar10", cifar_dir), seed=0)
    assert network == []
    expected = types.SimpleNamespace(images=images, labels=labels)
    assert rows(dataset.train, dataset.validation, dataset.test) == rows(expected)
    test = types.SimpleNamespace(images=images[100:], labels=labels[100:])
    assert rows(dataset.test) == rows(test)  # the official test images, whatever the seed
    assert np.array_equal(np.bincount(dataset.validation.labels), np.ones(10))
    assert (dataset.class_names, dataset.num_classes, dataset.pixel_max) == (tuple(ANIMALS), 10, 255)
    again, other = (load_arrays(data_config("cifar10", cifar_dir), seed=seed) for seed in (0, 1))
    assert again.fingerprint("train") == dataset.fingerprint("train") != other.fingerprint("train")
    assert other.fingerprint("test") == dataset.fingerprint("test")


def test_prepared_files_respect_the_umask(cifar_archive, accept, network, tmp_path):
    accept("cifar10", cifar_archive[0], train=100, test=20)
    shutil.copytree(cifar_archive[0] / "downloads", tmp_path / "downloads")
    before = os.umask(0o027)
    try:
        prepare.prepare("cifar10", tmp_path, download=False)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "cifar10").rglob("*") if path.is_file()}
    assert "dataset_info.json" in found and set(found.values()) == {0o640}


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="nothing is replaced with TensorFlow")
def test_the_stand_ins_for_tensorflow_are_taken_back():
    before = extractor.tf, cifar.tf, image_feature._ImageEncoder._encode_image, utils.png_to_jpeg
    with pytest.raises(RuntimeError), prepare.without_tensorflow():
        assert extractor.tf is not before[0]
        raise RuntimeError
    after = extractor.tf, cifar.tf, image_feature._ImageEncoder._encode_image, utils.png_to_jpeg
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_the_command_prepares_once_and_then_says_where(cifar_archive, cifar_dir, capsys):
    command = ["cifar10", "--data_dir", str(cifar_archive[0])]
    assert prepare_main(command) == 0
    assert f"cifar10 is ready under {cifar_archive[0]}/cifar10/3.0.2" in capsys.readouterr().out
    assert prepare_main(["cifar10", "--data_dir", str(cifar_dir / "nowhere")]) == 2
    message = capsys.readouterr().err
    assert "nothing is fetched unless you ask" in message and "cifar-10-binary.tar.gz from https://" in message
    assert prepare_main(["imagenet", "--data_dir", str(cifar_dir)]) == 2
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in capsys.readouterr().err


def test_an_archive_with_another_checksum_is_refused(cifar_archive, tmp_path, network):
    shutil.copytree(cifar_archive[0] / "downloads", tmp_path / "downloads")
    with pytest.raises(UserError, match="not the published one, or damaged"):
        prepare.prepare("cifar10", tmp_path, download=False)
    assert prepared.find_prepared("cifar10", tmp_path) is None  # nothing half-made is left to be read


def test_a_broken_archive_is_refused(accept, tmp_path, network):
    archive = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not a tar")
    accept("cifar10", tmp_path)
    with pytest.raises(UserError, match="Preparing 'cifar10' .* failed"):
        prepare.prepare("cifar10", tmp_path, download=False)


def test_download_without_a_connection_fails_at_once(tmp_path, network):
    with pytest.raises(UserError, match="No connection"):
        load_arrays(data_config("cifar100", tmp_path, download=True))
    assert len(network) == 1  # the control: this is what use of the network looks like


def test_an_empty_version_folder_is_not_taken_for_a_data_set(tmp_path, network):
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(UserError, match="is not prepared"):
        load_arrays(data_config("cifar10", tmp_path))
    with pytest.raises(UserError, match="holds no dataset_info.json"):
        prepare.prepare("cifar10", tmp_path, download=False)


def edit_info(folder, **changes):
    file = folder / "cifar10" / "3.0.2" / "dataset_info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_damaged_or_foreign_prepared_data_are_refused(cifar_dir):
    folder = cifar_dir / "cifar10" / "3.0.2"
    config = data_config("cifar10", cifar_dir)
    (records,) = folder.glob("cifar10-train.array_record*")
    whole = records.read_bytes()
    middle = len(whole) // 2
    for broken in (b"", whole[:middle], whole[:middle] + bytes(5000) + whole[middle + 5000 :]):
        records.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            load_arrays(config)
    records.unlink()
    with pytest.raises(UserError, match="damaged"):
        load_arrays(config)
    records.write_bytes(whole)
    assert load_arrays(config).size("train") == 90  # the control: the same bytes are fine

    edit_info(cifar_dir, fileFormat="tfrecord")
    with pytest.raises(UserError, match="holds tfrecord files; lipjax reads array_record"):
        load_arrays(config)
    edit_info(cifar_dir, fileFormat="array_record")
    (folder / "features.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_arrays(config)
    (folder / "dataset_info.json").write_text("{ half")
    with pytest.raises(UserError, match="damaged"):
        load_arrays(config)


def test_too_few_records_are_refused(cifar_dir, monkeypatch):
    monkeypatch.setitem(prepared.PREPARED, "cifar10", dataclasses.replace(prepared.PREPARED["cifar10"], train=101))
    with pytest.raises(UserError, match=r"incomplete: expected {'train': 101, 'test': 20} .* found {.*100"):
        load_arrays(data_config("cifar10", cifar_dir))


def test_mnist_is_prepared_and_read_as_it_was(tmp_path, accept, network, monkeypatch):
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    expected = {}
    for part, name, count in (("train", "train", 30), ("test", "t10k", 10)):
        images, labels = random_images(count, 28, 28, 1, seed=count), np.arange(count, dtype=np.uint8) % 10
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
        expected[part] = types.SimpleNamespace(images=images, labels=labels)
    accept("mnist", tmp_path, train=30, test=10)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 30)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 10)
    prepare.prepare("mnist", tmp_path, download=False)
    dataset = load_arrays(data_config("mnist", tmp_path, validation_fraction=0.0))
    assert dataset.image_shape == (28, 28, 1)
    assert rows(dataset.train) == rows(expected["train"]) and rows(dataset.test) == rows(expected["test"])


def test_tiny_imagenet_is_prepared_from_its_archive(tmp_path, accept, network):
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    wnids = [f"n{index:08}" for index in np.random.default_rng(0).permutation(200)]
    names = sorted(wnids)
    images = random_images(210, 64, 64, 3)
    train, test = images[:200], images[200:]
    grey = train[7, ..., 0]
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(wnids) + "\n")
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", encoded(test[0]))
        for label, name in enumerate(names):
            root = f"tiny-imagenet-200/train/{name}"
            archive.writestr(f"{root}/{name}_boxes.txt", "")
            archive.writestr(f"{root}/images/", "")
            archive.writestr(f"{root}/images/{name}_0.JPEG", encoded(grey if label == 7 else train[label]))
        for index, image in enumerate(test):
            archive.writestr(f"tiny-imagenet-200/val/images/val_{index}.JPEG", encoded(image))
        lines = [f"val_{index}.JPEG\t{names[20 * index]}\t0\t0\t9\t9\n" for index in range(10)]
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(lines))
    accept("tiny_imagenet", tmp_path, train=200, test=10)
    prepare.prepare("tiny_imagenet", tmp_path, download=False)
    dataset = load_arrays(data_config("tiny_imagenet", tmp_path, validation_fraction=0.0))
    assert dataset.class_names == tuple(names) and dataset.image_shape == (64, 64, 3)

    def decoded(image):
        return np.asarray(Image.open(io.BytesIO(encoded(image))).convert("RGB"))

    for image, label in zip(dataset.train.images, dataset.train.labels, strict=True):
        assert np.array_equal(image, decoded(grey if label == 7 else train[label]))
    expected = types.SimpleNamespace(images=[decoded(image) for image in test], labels=[20 * i for i in range(10)])
    assert rows(dataset.test) == rows(expected)
