"""Generated images: read from disk by index, in batches that depend on seed and step, unseen by certificates."""

import itertools
import pathlib
import shutil
import zipfile

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from training_helpers import (  # noqa: F401  quick_compiles is a fixture
    differing,
    final_state,
    interrupt_at,
    made_up_images,
    npz_file,
    quick_compiles,
    scratch,
    tiny_config,
)

from lipjax.errors import UserError
from lipjax.evaluation import evaluate
from lipjax.training import augment, sharding
from lipjax.training import step as steps
from lipjax.training.config import validate
from lipjax.training.data import generated, open_generated, prepared
from lipjax.training.data.prepare import without_tensorflow
from lipjax.training.loop import Run, train

COUNT = 50
SHAPE, CLASSES = (8, 8, 1), 3
SCHEDULE = {"epsilon": 0.1}


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


class TinyGenerated(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=SHAPE, encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (image, label) in enumerate(zip(*numbered_images(), strict=True)):
            yield f"{index:04}", {"image": image, "label": int(label)}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The folder of 50 images that TFDS prepared as array_record files."""
    data_dir = tmp_path_factory.mktemp("records")
    with without_tensorflow():
        builder = TinyGenerated(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    return pathlib.Path(builder.data_dir)


@pytest.fixture(params=["stored", "compressed", "records"])
def dataset(request, tmp_path):
    if request.param == "records":
        return opened(request.getfixturevalue("records"))
    return opened(write_npz(tmp_path / "generated.npz", request.param == "compressed"))


def take(batches, count):
    return list(itertools.islice(batches, count))


# ---- the files


def test_every_layout_gives_the_images_and_labels_of_the_file(dataset):
    assert len(dataset) == COUNT
    images, labels = dataset.source.read(np.arange(COUNT))
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    order = numbers(images)  # TFDS shuffles what it prepares
    assert sorted(order) == list(range(COUNT))
    expected, classes = numbered_images()
    assert np.array_equal(images, expected[order]) and np.array_equal(labels, classes[order])
    one, _ = dataset.source.read(np.array([17, 3, 17]))
    assert np.array_equal(one, images[[17, 3, 17]])


def test_an_uncompressed_file_is_mapped_and_a_compressed_one_unpacked_once(tmp_path, capsys, monkeypatch):
    stored = opened(write_npz(tmp_path / "stored.npz"))
    assert isinstance(stored.source.images, np.memmap) and sorted(p.name for p in tmp_path.iterdir()) == ["stored.npz"]
    path = write_npz(tmp_path / "packed.npz", compressed=True)
    packed = opened(path)
    (unpacked,) = tmp_path.glob("packed.image-*.npy")
    assert isinstance(packed.source.images, np.memmap) and packed.source.images.filename == unpacked
    assert f"Unpacking the images of {path} once, to {unpacked}" in capsys.readouterr().err
    assert packed.identity == stored.identity and packed.identity["images"] == COUNT  # the same images
    before = unpacked.stat()
    opened(path)
    assert capsys.readouterr().err == "" and unpacked.stat() == before
    unpacked.write_bytes(unpacked.read_bytes()[:-1])  # as if another program had cut it off
    killed = tmp_path / f".{unpacked.name}.0123.tmp"  # what a killed process left
    killed.write_bytes(b"1")
    assert np.array_equal(opened(path).source.read(np.arange(3))[0], numbered_images()[0][:3])
    assert not killed.exists() and unpacked.stat().st_size == before.st_size
    # Other images under the same name are unpacked to another file, even while the old one lies there.
    write_npz(path, compressed=True, image=numbered_images()[0][::-1])
    other = opened(path)
    assert other.identity != packed.identity and numbers(other.source.read(np.array([0]))[0]) == [COUNT - 1]
    cached = opened(path, **{"data.generated.cache_dir": str(tmp_path / "cache" / "here")})
    assert cached.source.images.filename.parent == tmp_path / "cache" / "here"
    monkeypatch.setattr(generated.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(UserError, match=r"takes 3,328 bytes where .*elsewhere has 100 free: set .*cache_dir"):
        opened(path, **{"data.generated.cache_dir": str(tmp_path / "elsewhere")})
    monkeypatch.setattr(generated.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    monkeypatch.setattr(generated.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10**9))
    with pytest.raises(UserError, match=r"cannot be unpacked to .*elsewhere \(no room\): set"):
        opened(path, **{"data.generated.cache_dir": str(tmp_path / "elsewhere")})
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == [f".{other.source.images.filename.name}.lock"]


def test_opening_reads_a_little_of_a_large_file(tmp_path, monkeypatch):
    """64 MiB of images of which the file system stores nothing; whoever loaded them would allocate them."""
    import tracemalloc

    count = 2**20
    path = tmp_path / "large.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("image", (count, *SHAPE)), ("label", (count,))):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for _ in range(int(np.prod(shape)) // 2**20):
                    stream.write(bytes(2**20))
    read = []
    original = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: read.append(original(self, n)) or read[-1])
    tracemalloc.start()
    try:
        dataset = opened(path)
        images, _ = dataset.source.read(np.arange(0, count, 2**14))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(dataset) == count and images.shape == (64, *SHAPE)
    assert peak < 16 * 2**20 < path.stat().st_size  # the labels are in memory, as 4 bytes each and once as they were
    assert sum(map(len, read)) < 2 * 2**20


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": None}, "it lacks image and holds label"),
        ({"image": None, "label": None, "images": np.zeros(3)}, "it lacks image and label and holds images"),
        ({"image": numbered_images()[0] / 255}, r"image is float64 \(50, 8, 8, 1\), expected uint8 \(n, 8, 8, 1\)"),
        ({"image": numbered_images(channels=3)[0]}, r"image is uint8 \(50, 8, 8, 3\), expected"),
        ({"image": numbered_images()[0][..., 0]}, r"image is uint8 \(50, 8, 8\), expected"),
        ({"image": numbered_images()[0][:0], "label": np.zeros(0, int)}, r"image is uint8 \(0, 8, 8, 1\)"),
        ({"label": np.arange(COUNT) % 4}, "label reaches 0 … 3, expected 0 … 2"),
        ({"label": np.arange(COUNT) % 3 - 1}, "label reaches -1 … 1, expected 0 … 2"),
        ({"label": np.arange(COUNT - 1) % 3}, r"label is int64 \(49,\), expected integers \(50,\)"),
        ({"label": np.eye(3)[np.arange(COUNT) % 3]}, r"label is float64 \(50, 3\), expected integers"),
        ({"label": np.array([None] * COUNT)}, r"label is object \(50,\), expected integers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_what_is_expected_where(tmp_path, arrays, message):
    path = write_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        opened(path)
    said = str(caught.value)
    assert said.startswith(f"config.data.generated.path = {path}: ") and "array_record" in said
    assert "--config.data.generated.path= --config.batch_size=12." in said and "arXiv:2302.04638" in said


def test_files_that_are_missing_or_damaged_are_refused(tmp_path, records):
    with pytest.raises(UserError, match="there is no such file or folder .looked for /.*nowhere.npz"):
        opened("~/nowhere.npz")
    with pytest.raises(UserError, match="the real images have values 0 … 16"):
        opened(write_npz(tmp_path / "good.npz"), pixel_max=16)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:2000])
    with pytest.raises(UserError, match="not a readable npz file of plain arrays .File is not a zip file"):
        opened(tmp_path / "cut.npz")
    np.save(tmp_path / "array.npy", numbered_images()[0])
    with pytest.raises(UserError, match="not a readable npz file"):
        opened(tmp_path / "array.npy")
    packed = write_npz(tmp_path / "packed.npz", compressed=True)
    content = bytearray(packed.read_bytes())
    content[1500] ^= 255
    packed.write_bytes(content)
    with pytest.raises(UserError, match="not a readable npz file"):
        opened(packed)
    assert not list(tmp_path.glob("*packed.image*"))
    with pytest.raises(UserError, match="no dataset_info.json in it: give the folder of the version"):
        opened(records.parent)
    for name, message in (("dataset_info.json", "description is damaged"), ("features.json", "description is damaged")):
        broken = tmp_path / name.partition(".")[0] / "1.0.0"
        shutil.copytree(records, broken)
        (broken / name).write_text("{")
        with pytest.raises(UserError, match=message):
            opened(broken)
    with pytest.raises(UserError, match=r"image is uint8 \(1, 8, 8, 3\), expected uint8 \(n, 9, 9, 3\)"):
        opened(records, shape=(9, 9, 3))
    with pytest.raises(UserError, match="its labels are of 3 classes, expected 2"):
        open_generated(mixed_config(records), SHAPE, 2, 255)


# ---- the batches


def test_each_pass_shows_every_image_once_in_a_new_order(dataset):
    batches = take(dataset.batches(10, seed=3), 10)
    shown = [number for images, _ in batches for number in numbers(images)]
    assert sorted(shown[:COUNT]) == sorted(shown[COUNT:]) == list(range(COUNT)) and shown[:COUNT] != shown[COUNT:]
    assert all(np.array_equal(labels, np.array(numbers(images)) % CLASSES) for images, labels in batches)
    other = [number for images, _ in take(dataset.batches(10, seed=4), 5) for number in numbers(images)]
    assert other != shown[:COUNT]


@pytest.mark.parametrize("batch_size", [8, 12, 120])
def test_a_batch_depends_on_seed_and_step_alone_and_shards_share_it_out(tmp_path, batch_size):
    """Also where batches do not divide a pass, and where one holds more than a pass."""
    dataset = opened(write_npz(tmp_path / "generated.npz"))
    whole = take(dataset.batches(batch_size, seed=3), 9)
    shown = [number for images, _ in whole for number in numbers(images)]
    for start in range(0, len(shown) - COUNT, COUNT):
        assert sorted(shown[start : start + COUNT]) == list(range(COUNT))
    for start, shards in ((0, 1), (5, 1), (7, 2), (2, 4)):
        parts = [take(dataset.batches(batch_size, 3, start, index, shards), 2) for index in range(shards)]
        for step in (0, 1):
            for array in (0, 1):
                joined = np.concatenate([part[step][array] for part in parts])
                assert np.array_equal(joined, whole[start + step][array])
    with pytest.raises(ValueError, match="divides over the shards, got 0 of 7"):
        dataset.batches(batch_size, 3, 0, 0, 7)
    with pytest.raises(ValueError, match="got 2 of 2"):
        dataset.batches(batch_size, 3, 0, 2, 2)


class Broken:
    def __len__(self):
        return COUNT

    def __getitems__(self, indices):
        return [{"image": b"broken", "label": 0} for _ in indices]


def test_a_damaged_record_stops_the_batches():
    source = generated.RecordSource(prepared.Records(Broken(), "the folder"), SHAPE, CLASSES)
    with pytest.raises(UserError, match="the folder is damaged"):
        next(generated.GeneratedDataset(source, {}).batches(4, 0))


# ---- training


@pytest.fixture
def path(tmp_path):
    images, labels = made_up_images(COUNT, seed=9)
    return write_npz(tmp_path / "generated.npz", image=images, label=labels)


def seen_by(run, first, count):
    """The (images, labels) pairs, real and generated, that the steps from `first` on are given."""

    def look(state, images, labels, schedule):
        return state, (images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "make_train_step", lambda *_: look)
        train_batch, state, found = run.batch_runner(first), run.fresh_state(), []
        for step in range(first, first + count):
            state, batch = train_batch(state, step, SCHEDULE)
            found.append(jax.tree.map(np.asarray, batch))
    return found


@pytest.mark.x64_off
def test_every_step_has_its_share_of_real_and_generated_images(path):
    run = Run(mixed_config(path, **{"mesh.data": 4}), 0)
    assert run.steps_per_epoch == 4 and run.total_steps == 8
    assert "2 epochs of 4 steps of 16 images, 4 of them generated" in str(run)
    batches = seen_by(run, 0, 8)
    part = run.dataset.split("train")
    for (real, made), (real_labels, made_labels) in batches:
        assert len(real) == len(real_labels) == 12 and len(made) == len(made_labels) == 4
    with np.load(path) as file:
        source = [image.tobytes() for image in file["image"]]
    # Real: each of the 48 images once in each of the two epochs. Generated: the batches of the data set, none twice.
    for epoch in (0, 4):
        shown = [image.tobytes() for (real, _), _ in batches[epoch : epoch + 4] for image in real]
        assert sorted(shown) == sorted(image.tobytes() for image in part.images)
    shown = [image.tobytes() for (_, made), _ in batches for image in made]
    assert len(shown) == 32 == len({source.index(image) for image in shown})
    expected = take(opened(path).batches(4, 0), 8)
    for ((_, made), (_, labels)), (images, numbers) in zip(batches, expected, strict=True):
        assert np.array_equal(made, images) and np.array_equal(labels, numbers)
    later = seen_by(run, 3, 2)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (later, batches[3:5])), strict=True))


@pytest.mark.x64_off
def test_real_and_generated_images_are_augmented_apart_and_joined_on_their_devices(key):
    config = mixed_config("x")
    real, made = (np.random.default_rng(s).integers(1, 256, (n, 8, 8, 1), dtype=np.uint8) for s, n in ((0, 16), (1, 8)))
    labels = np.arange(16, dtype=np.int32), 100 + np.arange(8, dtype=np.int32)
    for count in (1, 8):
        mesh = sharding.make_mesh(count, 16)
        split, everywhere = sharding.batch_sharded(mesh), sharding.replicated(mesh)
        arrays = jax.device_put(((real, made), labels), split)
        arguments = jax.device_put(key, everywhere), *arrays
        view = jax.jit(lambda key, images, labels, mesh=mesh: steps.views(key, images, labels, config.data, 255, mesh))
        compiled = view.lower(*arguments).compile()
        pixels, joined = compiled(*arguments)
        order = np.asarray(joined)
        assert sorted(order) == sorted(np.concatenate(labels))
        assert order.reshape(count, -1)[:, : 16 // count].max() < 100  # on each device the real ones come first
        assert pixels.sharding.is_equivalent_to(split, 4)
        shown = {int(label): image for label, image in zip(order, np.asarray(pixels), strict=True)}
        # Whatever the number of devices: the real ones are cropped by 1 pixel, the generated ones by 2 and another key.
        keys = jax.random.split(key)[0], jax.random.fold_in(key, 3)
        for images, first, key_of, padding in ((real, 0, keys[0], 1), (made, 100, keys[1], 2)):
            moved = augment.random_crop(jax.random.split(key_of)[0], jax.numpy.asarray(images), padding)
            found = np.stack([shown[first + index] for index in range(len(images))])
            assert np.array_equal(found, augment.to_pixels(moved, 255)) and not np.array_equal(moved, images)
        program = compiled.as_text() or ""
        assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))


def test_randaugment_treats_the_cropped_image_before_it_becomes_pixels(key, monkeypatch):
    fields = {"data.randaugment.probability": 0.25, "data.randaugment.num_ops": 3, "data.randaugment.magnitude": 5}
    config, seen = tiny_config(**fields), []

    def record(key, images, **options):
        seen.append((jax.random.key_data(key), images, options))
        return images // 2

    monkeypatch.setattr(steps, "random_augment", record)
    images = jax.numpy.asarray(numbered_images(4)[0])
    pixels = steps.preprocess(key, images, config.data, 255)
    ((used, given, options),) = seen
    assert options == {"probability": 0.25, "num_ops": 3, "magnitude": 5}
    assert given.dtype == np.uint8 and np.array_equal(pixels, augment.to_pixels(given // 2, 255))
    plain = steps.preprocess(key, images, tiny_config().data, 255)
    assert len(seen) == 1 and np.array_equal(plain, augment.to_pixels(given, 255))  # the crop is what it was
    others = [jax.random.key_data(k) for k in (key, *jax.random.split(key), jax.random.fold_in(key, 3))]
    assert not any(np.array_equal(used, other) for other in others)


@pytest.mark.x64_off
def test_a_run_trains_resumes_bit_for_bit_and_certifies_without_the_generated_images(tmp_path, path, monkeypatch):
    config = mixed_config(path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, 0)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(config, parts, 0)
    train(config, parts, 0)
    assert differing(final_state(parts, config), final_state(whole, config)) == []
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    # Resuming with other generated images is refused; so is leaving them out.
    shutil.rmtree(parts / "checkpoints" / "8")
    saved = path.read_bytes()
    write_npz(path)
    with pytest.raises(UserError, match="the data set has other images or labels: generated"):
        train(config, parts, 0)
    with pytest.raises(UserError, match=r"config.data.generated.path: .*generated.npz' there, '' now"):
        train(mixed_config(""), parts, 0)
    path.unlink()
    with pytest.raises(UserError, match="there is no such file or folder"):
        train(config, parts, 0)
    report = evaluate.certify_run(whole, config, 0)  # needs the test split alone
    assert report["step"] in (4, 8)
    # Nor does a run that starts from this one need them.
    run = Run(mixed_config("", init_from=str(whole)), 0)
    assert any("params" in name for name in differing(run.fresh_state(), run._initialise()))
    assert set(run.training_identity) == {"train", "validation", "test"}
    path.write_bytes(saved)
    train(config, parts, 0)  # control
    assert differing(final_state(parts, config), final_state(whole, config)) == []


def test_missing_files_stop_a_run_before_it_writes_anything(tmp_path):
    config = mixed_config(tmp_path / "none.npz")
    with pytest.raises(UserError, match="none.npz: there is no such file or folder"):
        train(config, tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="per_batch = 4 does not divide over 8 devices"):
        Run(mixed_config("x", **{"mesh.data": 8}), 0)
    with pytest.raises(UserError, match="batch_size = 53 less 4 generated images exceeds the 48 .*lower"):
        Run(mixed_config("x", batch_size=53), 0)
    for per_batch in (0, 16):
        with pytest.raises(UserError, match="config.data.generated.per_batch: expected at least 1 and less than"):
            validate(mixed_config("x", **{"data.generated.per_batch": per_batch}))
    validate(mixed_config("", **{"data.generated.per_batch": 16}))  # no path, no generated images


def test_randaugment_is_refused_for_images_that_it_is_not_for():
    with pytest.raises(UserError, match="RandAugment is for values 0 … 255 .* digits has 0 … 16 in 1"):
        Run(tiny_config(**{"data.name": "digits", "data.path": "", "data.randaugment.probability": 0.5}), 0)
