"""Generated images: read from disk by index, in batches that depend on seed and step, unseen by certificates."""

import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import take
from generated_helpers import CLASSES, COUNT, SHAPE, mixed_config, numbered_images, numbers, opened, write_npz
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
from lipjax.training.data import generated, open_generated, prepared
from lipjax.training.data.prepare import without_tensorflow


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
