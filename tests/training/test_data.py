"""Data sets in memory: digits, a user's own files, splits, fingerprints, and what bad input gets."""

import time

import numpy as np
import pytest
from data_helpers import block_network, data_config, load_arrays, rows
from PIL import Image
from sklearn import datasets

from lipjax.errors import UserError
from lipjax.training.data import NAMES, ArrayDataset, Split, stratified_split

SPLITS = ("train", "validation", "test")


def parts(dataset):
    return [dataset.split(name) for name in SPLITS]


@pytest.fixture
def network(monkeypatch):
    return block_network(monkeypatch)


# ---- digits and splits


def test_digits_are_scikit_learns_values_each_in_one_split():
    dataset = load_arrays(data_config(), seed=0)
    assert [dataset.size(name) for name in SPLITS] == [1293, 145, 359]
    assert (dataset.num_classes, dataset.pixel_max, dataset.image_shape) == (10, 16, (8, 8, 1))
    assert dataset.train.images.max() == 16 and dataset.train.images.min() == 0
    pixels, labels = datasets.load_digits(return_X_y=True)
    expected = Split(pixels.reshape(-1, 8, 8, 1).astype(np.uint8), labels.astype(np.int32))
    assert np.array_equal(expected.images.reshape(-1, 64), pixels)  # whole numbers: the cast loses nothing
    assert rows(*parts(dataset)) == rows(expected)


def test_the_seed_alone_decides_the_split():
    first, again, other = (load_arrays(data_config(), seed=seed) for seed in (0, 0, 1))
    for name in SPLITS:
        assert first.fingerprint(name) == again.fingerprint(name)
        assert first.fingerprint(name) != other.fingerprint(name)
    # Written down once, so that a new NumPy or platform that split differently would not pass unseen.
    assert first.fingerprint("test") == "ea2c8645558c3e897eee370028900ec8eb18ba9d6d61ef4eb31557b245c8ae51"


def test_validation_never_takes_test_images():
    none, tenth, half = (load_arrays(data_config(validation_fraction=part), 3) for part in (0.0, 0.1, 0.5))
    assert none.size("validation") == 0 and none.size("train") == 1438
    assert none.fingerprint("test") == tenth.fingerprint("test") == half.fingerprint("test")
    assert rows(none.train) == rows(half.train, half.validation)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.9])
def test_a_stratified_split_takes_its_share_of_every_class(fraction):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [1, 10, 57, 200]))
    rest, held = stratified_split(labels, fraction, seed=5, purpose="test")
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(268))
    for label, count in enumerate([1, 10, 57, 200]):
        share = np.sum(labels[held] == label)
        assert abs(share - fraction * count) <= 0.5 or (count, share) == (1, 0)  # the last image of a class stays
    if fraction:
        others = [
            stratified_split(labels, fraction, 6, "test")[1],
            stratified_split(labels, fraction, 5, "validation")[1],
        ]
        assert all(not np.array_equal(held, other) for other in others)


def test_a_fraction_that_is_out_of_range_or_holds_out_nothing_is_refused():
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="test_fraction must be"):
            load_arrays(data_config(test_fraction=fraction), 0)
    with pytest.raises(UserError, match="no test images of its own"):
        load_arrays(data_config(test_fraction=0.0), 0)
    with pytest.raises(UserError, match="holds out no image"):
        load_arrays(data_config(validation_fraction=1e-4), 0)
    with pytest.raises(UserError, match="seed must be 0 or more"):
        load_arrays(data_config(), -1)


# ---- fingerprints and the containers


def tiny_dataset(images, labels=(0, 1), **fields):
    split = Split(images, np.array(labels, np.int32))
    return ArrayDataset(
        **{"name": "tiny", "train": split, "validation": split, "test": split, "num_classes": 2, **fields}
    )


def test_the_fingerprint_sees_every_byte_and_the_scale():
    images = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    reference = tiny_dataset(images).fingerprint("test")
    assert reference == tiny_dataset(images.copy()).fingerprint("train")
    assert reference == tiny_dataset(np.asfortranarray(images)).fingerprint("test")  # layout is not content
    flipped = images.copy()
    flipped[1, 2, 3, 0] ^= 1
    others = [
        tiny_dataset(flipped),
        tiny_dataset(images, (1, 0)),
        tiny_dataset(images[::-1]),
        tiny_dataset(images.reshape(2, 4, 3, 1)),
        tiny_dataset(images, pixel_max=16),
    ]
    assert len({reference, *(other.fingerprint("test") for other in others)}) == 6


def test_splits_check_their_arrays_and_do_not_change():
    split = Split(np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="read-only"):
        split.images[0] = 1
    with pytest.raises(ValueError, match="Expected uint8 images"):
        Split(np.zeros((2, 3, 3, 1), np.float32), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="Expected int32 labels"):
        Split(np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="Expected a split"):
        tiny_dataset(np.zeros((2, 3, 3, 1), np.uint8)).fingerprint("training")


# ---- a user's own data


def some_arrays(count=60, channels=3, classes=3):
    generator = np.random.default_rng(1)
    shape = (count, 6, 5, channels) if channels else (count, 6, 5)
    return generator.integers(0, 256, shape, dtype=np.uint8), generator.permutation(np.arange(count) % classes)


def npz_dataset(folder, seed=0, **arrays):
    np.savez(folder / "own.npz", **arrays)
    return load_arrays(data_config(name="npz", path=str(folder / "own.npz")), seed)


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_npz_without_test_images_holds_some_out(tmp_path, channels):
    images, labels = some_arrays(channels=channels)
    dataset = npz_dataset(tmp_path, images=images, labels=labels)
    assert [dataset.size(name) for name in SPLITS] == [42, 6, 12]
    assert (dataset.num_classes, dataset.pixel_max, dataset.image_shape) == (3, 255, (6, 5, max(channels, 1)))
    assert rows(*parts(dataset)) == rows(Split(images.reshape(60, 6, 5, -1), labels.astype(np.int32)))


def test_npz_with_test_images_keeps_them(tmp_path):
    images, labels = some_arrays()
    dataset = npz_dataset(tmp_path, images=images, labels=labels, test_images=images[:9], test_labels=labels[:9])
    assert [dataset.size(name) for name in SPLITS] == [54, 6, 9]
    assert np.array_equal(dataset.test.images, images[:9]) and np.array_equal(dataset.test.labels, labels[:9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((60, 6, 5, 3))}, "expected images as uint8 .* got float64"),
        ({"images": np.zeros((60, 6, 5, 3), np.int64)}, "expected images as uint8 .* got int64"),
        ({"images": np.zeros((60, 30), np.uint8)}, r"expected images \(n, h, w, c\)"),
        ({"images": np.full((60, 3, 6, 5), 9, np.uint8)}, "channels come last"),
        ({"images": np.ones((60, 6, 5, 3), np.uint8)}, "nothing above 1"),
        ({"images": np.zeros((0, 6, 5, 3), np.uint8)}, r"expected images \(n, h, w, c\)"),
        ({"images": np.array([None] * 60)}, "not a readable npz"),
        ({"labels": np.zeros(59, int)}, r"expected labels as integers \(60,\)"),
        ({"labels": np.zeros(60)}, "expected labels as integers"),
        ({"labels": np.arange(60) - 1}, "must be 0 … k-1"),
        ({"labels": np.arange(60) % 3 + 1}, "0 never occurs"),
        ({"labels": np.arange(60) % 3 + 2**32}, "must be 0 … k-1"),
        ({"labels": np.zeros(60, int)}, "at least two classes"),
        ({"test_images": np.full((4, 6, 5, 3), 9, np.uint8)}, "lacks test_labels"),
        (
            {"test_images": np.full((4, 5, 5, 3), 9, np.uint8), "test_labels": np.zeros(4, int)},
            "must have the same size",
        ),
        ({"test_images": np.full((4, 6, 5, 3), 9, np.uint8), "test_labels": np.full(4, 3)}, "test_labels reach 3"),
    ],
)
def test_npz_with_bad_arrays_is_refused(tmp_path, change, message):
    images, labels = some_arrays()
    with pytest.raises(UserError, match=message):
        npz_dataset(tmp_path, **{"images": images, "labels": labels, **change})


def test_npz_that_is_missing_or_no_npz_is_refused(tmp_path):
    with pytest.raises(UserError, match="lacks images, labels: it holds x"):
        npz_dataset(tmp_path, x=np.zeros(3))
    for content in (b"", b"PK\x03\x04 broken", b"some text"):
        (tmp_path / "own.npz").write_bytes(content)
        with pytest.raises(UserError, match="not a readable npz"):
            load_arrays(data_config(name="npz", path=str(tmp_path / "own.npz")), 0)
    np.save(tmp_path / "own.npy", np.zeros(3))
    with pytest.raises(UserError, match="not a readable npz"):
        load_arrays(data_config(name="npz", path=str(tmp_path / "own.npy")), 0)
    with pytest.raises(UserError, match="there is no file .*nowhere.npz"):
        load_arrays(data_config(name="npz", path=str(tmp_path / "nowhere.npz")), 0)
    with pytest.raises(UserError, match="config.data.path must say where"):
        load_arrays(data_config(name="npz"), 0)


def image_folder(root, images, labels, mode=None):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = root / f"class_{label}" / f"{index:03}.{('png', 'PNG')[index % 2]}"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image).convert(mode).save(file, "png") if mode else Image.fromarray(image).save(file, "png")
    return data_config(name="folder", path=str(root))


def test_folder_reads_each_class_and_keeps_pixels(tmp_path):
    images, labels = some_arrays()
    config = image_folder(tmp_path, images, labels)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "class_0" / "notes.txt").write_text("not an image")
    dataset = load_arrays(config, 0)
    assert (dataset.num_classes, dataset.class_names) == (3, ("class_0", "class_1", "class_2"))
    assert rows(*parts(dataset)) == rows(Split(images, labels.astype(np.int32)))


def test_folder_of_grey_images_has_one_channel_unless_one_is_coloured(tmp_path):
    images, labels = some_arrays(channels=0)
    config = image_folder(tmp_path, images, labels)
    assert rows(*parts(load_arrays(config, 0))) == rows(Split(images[..., None], labels.astype(np.int32)))
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(tmp_path / "class_0" / "coloured.jpg")
    assert load_arrays(config, 0).image_shape == (6, 5, 3)


def test_bad_folders_are_refused(tmp_path):
    config = data_config(name="folder", path=str(tmp_path))
    with pytest.raises(UserError, match="at least two; it holds 0"):
        load_arrays(config, 0)
    images, labels = some_arrays()
    image_folder(tmp_path, images, labels)
    extra = tmp_path / "class_1" / "extra.png"
    Image.fromarray(np.zeros((6, 7, 3), np.uint8)).save(extra)
    with pytest.raises(UserError, match=r"extra.png is \(6, 7\) .* first image is \(6, 5\)"):
        load_arrays(config, 0)
    extra.write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match="extra.png is not a readable image"):
        load_arrays(config, 0)
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(extra)
    with pytest.raises(UserError, match="more than 8 bits"):
        load_arrays(config, 0)
    extra.unlink()
    (tmp_path / "class_9").mkdir()
    with pytest.raises(UserError, match="class_9 holds no image"):
        load_arrays(config, 0)
    with pytest.raises(UserError, match="there is no folder"):
        load_arrays(data_config(name="folder", path=str(tmp_path / "nowhere")), 0)


# ---- data sets that are not there


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet"])
def test_a_missing_data_set_says_so_at_once_without_the_network(tmp_path, network, name):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_arrays(data_config(name=name, data_dir=str(tmp_path)), 0)
    assert time.monotonic() - start < 2  # TFDS itself would retry for minutes
    assert network == []
    message = str(caught.value)
    assert f"{name!r} is not prepared: there is no {tmp_path}" in message
    assert f"lipjax prepare {name} --data_dir {tmp_path}" in message
    assert "pip install tensorflow-datasets" in message


def test_the_network_guard_of_these_tests_sees_an_attempt(network):
    import urllib.request

    with pytest.raises(OSError, match="no network"):
        urllib.request.urlopen("http://example.com", timeout=1)
    assert len(network) == 1


def test_unknown_names_and_stray_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="must be one of digits, mnist, cifar10.* got 'cifar'"):
        load_arrays(data_config(name="cifar"), 0)
    with pytest.raises(UserError, match="config.data.path is for your own data"):
        load_arrays(data_config(path=str(tmp_path)), 0)
    assert {"digits", "npz", "folder", "imagenet"} < set(NAMES)


def test_the_data_folder_falls_back_to_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    with pytest.raises(UserError, match=f"there is no {tmp_path}/tfds/mnist"):
        load_arrays(data_config(name="mnist"), 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"there is no {tmp_path}/elsewhere/mnist"):
        load_arrays(data_config(name="mnist", data_dir="~/elsewhere"), 0)
