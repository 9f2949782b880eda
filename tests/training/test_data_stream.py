"""ImageNet as a stream: TFDS's own builder on a made-up archive, and batches that depend on seed and step alone."""

import dataclasses
import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest
from data_helpers import block_network, data_config, encoded, expect, take, write_imagenet

from lipjax.errors import UserError
from lipjax.training.data import StreamDataset, load_dataset, prepare, stream


def load_stream(data_dir, seed):
    dataset = load_dataset(data_config("imagenet", data_dir, validation_fraction=1 / 6), seed)
    assert isinstance(dataset, StreamDataset)
    return dataset


def held_out(dataset):
    return dataset.splits["validation"].indices


@pytest.fixture(scope="module")
def imagenet_archive(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def imagenet(imagenet_archive, monkeypatch):
    block_network(monkeypatch)
    expect(monkeypatch, "imagenet", train=24, test=10)
    prepare.prepare("imagenet", imagenet_archive, download=False)
    dataset = load_stream(imagenet_archive, seed=0)
    assert dataset.image_shape == (224, 224, 3)
    return dataclasses.replace(dataset, image_size=16)


def same(one, other):
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in pairs)


def shades(images):
    """Which training image each one is: they are of one grey, 20 i + label, give or take JPEG's rounding."""
    return [int(round((image.mean() - 0.5) / 10)) for image in images]


def test_imagenet_splits_are_disjoint_and_decided_by_the_seed(imagenet, imagenet_archive):
    assert [imagenet.size(name) for name in ("train", "validation", "test")] == [20, 4, 10]
    validation = held_out(imagenet)
    train = imagenet.splits["train"].indices
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(24))
    assert imagenet.num_classes == 1000
    same_seed, other_seed = (load_stream(imagenet_archive, seed) for seed in (0, 1))
    assert np.array_equal(held_out(same_seed), validation)
    assert not np.array_equal(held_out(other_seed), validation)


def test_training_batches_depend_on_seed_and_step_alone(imagenet):
    whole = take(imagenet.train_batches(8, seed=3), 8)
    assert all(images.shape == (8, 16, 16, 3) and images.dtype == np.uint8 for images, _ in whole)
    assert all(labels.dtype == np.int32 for _, labels in whole)
    assert same(whole, take(imagenet.train_batches(8, seed=3), 8))
    assert not same(whole, take(imagenet.train_batches(8, seed=4), 8))
    for start in (1, 5):
        assert same(whole[start:], take(imagenet.train_batches(8, seed=3, start_step=start), 8 - start))


def test_each_epoch_shows_every_image_once_in_a_new_order(imagenet):
    # Batches of 4 divide the 20 images, so that an epoch is five of them.
    epochs = [take(imagenet.train_batches(4, seed=3, start_step=5 * epoch), 5) for epoch in range(2)]
    orders = [[shade for images, _ in epoch for shade in shades(images)] for epoch in epochs]
    labels = [[int(label) for _, part in epoch for label in part] for epoch in epochs]
    seen = [sorted(zip(order, part, strict=True)) for order, part in zip(orders, labels, strict=True)]
    assert seen[0] == seen[1] and len(set(seen[0])) == 20
    assert orders[0] != orders[1]


@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_share_out_each_batch(imagenet, num_shards):
    whole = take(imagenet.train_batches(8, seed=3), 6)
    shards = [take(imagenet.train_batches(8, 3, 2, index, num_shards), 4) for index in range(num_shards)]
    for step, (images, labels) in enumerate(whole[2:]):
        for whole_part, place in ((images, 0), (labels, 1)):  # in the places where one process has them
            assert np.array_equal(np.concatenate([shard[step][place] for shard in shards]), whole_part)


@pytest.mark.parametrize(("num_shards", "batch_size"), [(1, 4), (2, 4), (4, 4), (1, 10), (2, 24)])
def test_evaluation_shows_every_image_once_in_full_batches(imagenet, num_shards, batch_size):
    everything = [
        take(imagenet.eval_batches("test", batch_size, index, num_shards), 100) for index in range(num_shards)
    ]
    assert all(len(batches) == -(-10 // batch_size) for batches in everything)
    records = imagenet.splits["test"]
    expected = [(records[i]["label"], stream.centre_crop(records[i]["image"], 16, "").tobytes()) for i in range(10)]
    found = []
    for images, labels in itertools.chain(*everything):
        assert images.shape == (batch_size // num_shards, 16, 16, 3)
        assert not images[labels < 0].any()
        found += [(int(label), image.tobytes()) for image, label in zip(images, labels, strict=True) if label >= 0]
    assert sorted(found) == sorted(expected)


def test_an_empty_validation_split_has_no_batches(imagenet):
    train, validation = stream.hold_out(imagenet.splits["test"], 0.0, 0)
    dataset = dataclasses.replace(imagenet, splits={"train": train, "validation": validation})
    assert list(dataset.eval_batches("validation", 4)) == []


def test_crops_are_those_of_the_paper():
    # A ramp along one axis: its value at a pixel is where the pixel comes from.
    width, height, size = 320, 160, 56
    ramp = np.broadcast_to(np.arange(width) * 255 / (width - 1), (height, width)).round().astype(np.uint8)
    image = encoded(ramp, "png")
    centre = stream.centre_crop(image, size, "")
    # Shorter side 160 -> 64: a scale of 0.4, so the 56 columns in the centre span 140 of the 320 original ones.
    assert centre.shape == (size, size, 3)
    span = (float(centre[0, -1, 0]) - float(centre[0, 0, 0])) / 255 * (width - 1) * size / (size - 1)
    assert abs(span - 140) < 3 and abs(centre.mean() - 127.5) < 1
    spans, starts = [], []
    generator = np.random.default_rng(0)
    for _ in range(300):
        row = stream.random_crop(image, size, generator, "")[0, :, 0].astype(float) / 255 * (width - 1)
        spans.append((row[-1] - row[0]) * size / (size - 1))
        starts.append(row[0])
    # Shorter side 160 -> 56 … 72: the crop spans 160 … 124.4 columns, anywhere.
    assert 120 < min(spans) < 130 and 155 < max(spans) < 164
    assert min(starts) < 10 and max(starts) > 160


def test_worker_processes_change_no_batch_and_end_with_the_iterator(imagenet, imagenet_archive):
    asked = data_config("imagenet", imagenet_archive, validation_fraction=1 / 6, workers=2)
    assert load_dataset(asked, 0).workers == 2
    before = set(multiprocessing.active_children())
    threads = take(imagenet.train_batches(40, 3, start_step=2, shard_index=1, num_shards=2), 4)
    batches = dataclasses.replace(imagenet, workers=2).train_batches(40, 3, 2, 1, 2)
    assert same(take(batches, 4), threads)  # 80 images, in three chunks of two processes
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.nightly
def test_worker_processes_leave_signals_to_the_run(imagenet):
    """A scheduler or Ctrl-C signals all processes of a run, which must read on until it has saved."""
    before = set(multiprocessing.active_children())
    threads = take(imagenet.train_batches(40, 3), 4)
    batches = dataclasses.replace(imagenet, workers=2).train_batches(40, 3)
    first = take(batches, 1)
    readers = set(multiprocessing.active_children()) - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        for reader in readers:
            os.kill(reader.pid, number)
    assert same(first + take(batches, 3), threads) and all(reader.is_alive() for reader in readers)
    batches.close()
    assert set(multiprocessing.active_children()) == before


def test_bad_shards_are_refused_and_a_damaged_record_is_named(imagenet):
    with pytest.raises(ValueError, match="6 images does not divide over 4 shards"):
        next(imagenet.train_batches(6, 0, 0, 0, 4))
    with pytest.raises(ValueError, match="0 <= shard_index < num_shards"):
        next(imagenet.eval_batches("test", 4, 2, 2))
    with pytest.raises(ValueError, match="Expected a split"):
        next(imagenet.eval_batches("val", 4))
    with pytest.raises(UserError, match="somewhere is damaged"):
        stream.centre_crop(b"\xff\xd8 broken", 16, "somewhere")


def test_the_fingerprint_of_a_stream_sees_images_labels_and_size(imagenet):
    reference = imagenet.fingerprint("test")
    assert reference == imagenet.fingerprint("test") != imagenet.fingerprint("validation")
    assert reference != dataclasses.replace(imagenet, image_size=17).fingerprint("test")
    reverse = stream.Subset(imagenet.splits["test"], np.arange(10)[::-1])
    assert reference != dataclasses.replace(imagenet, splits={"test": reverse}).fingerprint("test")
