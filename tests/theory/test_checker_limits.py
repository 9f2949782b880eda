"""What a directory may cost the checker, whoever made it: more is refused before the work is done."""

import json
import math
import os
import shutil
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from checker_helpers import Forger, draw, honest_runs

from lipjax import __main__ as command_line
from lipjax import checker


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return honest_runs(tmp_path_factory)


@pytest.fixture
def run_directory(runs, tmp_path):
    shutil.copytree(runs("sorted_network"), tmp_path / "run")
    return tmp_path / "run"


def within(directory, *, megabytes=400, seconds=20, **options):
    """The verdict, which must come soon and without much memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        found = checker.check(directory, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < seconds and peak < megabytes * 2**20
    return found


def stated_network(directory, ops, arrays, layers, classes=2):
    """A run without images, whose certificate states these operators: made without computing anything."""
    (directory / "frozen").mkdir(parents=True)
    names = [entry["name"] for entry in ops]
    layout = {"format": "lipjax-frozen-network", "schema": 1, "ops": ops, "head": "LinearHead"}
    rows = [{"name": "input", "type": "Normalize", "bound": 1.0, "method": "exact: 1 / min(input_std)", "details": {}}]
    rows += [
        {"name": name, "type": entry["type"], "method": method, "bound": 1e9, "details": details}
        for name, entry, (method, details) in zip(names, ops, layers, strict=True)
    ]
    certificate = {
        "format": "lipjax-certificate",
        "schema": 3,
        "claim": checker.CLAIM,
        "data": {"name": "none", "num_images": 0, "of": 0, "pixel_max": 255, "sha256": ""},
        "sample": {"file": "images.safetensors", "num_images": 0, "is_split": False},
        "layers": rows,
        "head": None,
        "liplt": None,
        "margin_lipschitz": [[1e9] * classes] * classes,
        "images": [],
    }
    shape = tuple(ops[0]["in_shape"])
    images = {
        "indices": np.zeros(0, np.int64),
        "labels": np.zeros(0, np.int64),
        "pixels": np.zeros((0, *shape), np.uint8),
    }
    arrays = {"input_mean": np.zeros(1), "input_std": np.ones(1), **arrays}
    for name, document in (("frozen/network.json", layout), ("certificate.json", certificate), ("report.json", {})):
        (directory / name).write_text(json.dumps(document | {"sha256": ""}))
    safetensors.numpy.save_file(arrays, directory / "frozen" / "network.safetensors")
    safetensors.numpy.save_file(images, directory / "images.safetensors")
    (directory / "report.json").write_text(json.dumps({"radii": [0.5], "certified_accuracy": {"0.5": 0.0}}))
    forger = Forger(directory)
    forger.write(report=False)
    return directory


def conv(name, in_shape, strides: int | list = 1):
    return {"name": name, "type": "Conv", "in_shape": in_shape, "strides": strides, "padding": "ZERO"}


FREQUENCIES = "Cholesky per frequency of a block circulant"


def small_and_huge(directory):
    """A few kilobytes, 144 million frequencies."""
    rng = np.random.default_rng(0)
    ops = [
        conv("large", [1500, 1500, 1]),
        conv("small", [1500, 1500, 1], 1500),
        {"name": "flat", "type": "Flatten", "in_shape": [1, 1, 1]},
    ]
    arrays = {
        "ops/large/kernel": rng.normal(size=(3, 3, 1, 1)),
        "ops/small/kernel": np.ones((1, 1, 1, 1)),
        "head/matrix": np.ones((2, 1)),
        "head/bias": np.zeros(2),
    }
    details = {"grid": [12000, 12000], "twist": [0, 0]}
    only = "Cholesky of the Gram matrix of the only block tap"
    layers = [(FREQUENCIES, details), (only, {}), ("exact: a reordering", {})]
    return stated_network(directory, ops, arrays, layers)


def many_taps(directory, taps=20_000):
    """Eight megabytes, every tap of which meets most pixels."""
    rng = np.random.default_rng(0)
    ops = [
        conv("long", [taps, 1, 5]),
        conv("small", [taps - 1, 1, 10], [taps, 1]),
        {"name": "flat", "type": "Flatten", "in_shape": [1, 1, 1]},
    ]
    arrays = {
        "ops/long/kernel": rng.normal(size=(taps, 1, 5, 10)),
        "ops/small/kernel": np.ones((1, 1, 10, 1)),
        "head/matrix": np.ones((2, 1)),
        "head/bias": np.zeros(2),
    }
    only = "Cholesky of the Gram matrix of the only block tap"
    layers = [(FREQUENCIES, {"grid": [2 * taps, 1], "twist": [0, 0]}), (only, {}), ("exact: a reordering", {})]
    return stated_network(directory, ops, arrays, layers)


def test_a_small_directory_with_a_huge_grid_is_refused(tmp_path):
    directory = small_and_huge(tmp_path)
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) < 6000
    code, lines = within(directory, megabytes=30)
    assert code == 2 and "layers, large (Conv): about" in lines[0] and "numbers at once" in lines[0]
    assert "--budget 2 raises" in lines[0], lines
    f = Forger(directory)
    f.layer("large")["details"]["grid"] = [1501, 1501]  # control: one that fits is computed, and proves the bound
    f.write(report=False)
    code, lines = within(directory, seconds=120)
    assert code == 1 and not any("layers" in line for line in lines), lines


@pytest.mark.nightly
def test_thousands_of_taps_are_refused(tmp_path):
    code, lines = within(many_taps(tmp_path / "fewer", 1500))  # control: without images, and with fewer taps
    assert code == 1 and not any("long" in line for line in lines), lines
    f = Forger(tmp_path / "fewer")
    f.layer("long")["method"] = checker.EVERYWHERE
    f.write(report=False)
    code, lines = within(tmp_path / "fewer")
    assert code == 1 and not any("long" in line for line in lines), lines
    directory = many_taps(tmp_path / "many")
    f = Forger(directory)
    count = 100
    row = {"label": 0, "prediction": 0, "rival": 1, "margin": None, "radius": 0.0}
    f.certificate["images"] = [dict(row) for _ in range(count)]
    f.certificate["data"]["num_images"] = f.certificate["sample"]["num_images"] = count
    f.images = {
        "indices": np.arange(count),
        "labels": np.zeros(count, np.int64),
        "pixels": np.zeros((count, 20_000, 1, 5), np.uint8),
    }
    f.write()
    code, lines = within(directory)
    assert (
        code == 2 and "100 images through long, which costs most" in lines[0] and "multiplications in all" in lines[0]
    ), lines


@pytest.mark.parametrize(
    "name", ["certificate.json", "report.json", "images.safetensors", "frozen/network.safetensors"]
)
def test_pipes_and_devices_are_refused(run_directory, name):
    path = run_directory / name
    path.unlink()
    os.mkfifo(path)
    code, lines = within(run_directory)
    assert code == 2 and lines == [f"{path} is no regular file"]
    path.unlink()
    path.symlink_to("/dev/zero")
    code, lines = within(run_directory)
    assert code == 2 and lines == [f"{path} is no regular file"]
    path.unlink()
    path.mkdir()
    assert within(run_directory)[0] == 2
    assert within(run_directory, data=str(path))[0] == 2


def test_links_to_honest_files_are_read(run_directory, tmp_path):
    (run_directory / "certificate.json").rename(tmp_path / "elsewhere.json")
    (run_directory / "certificate.json").symlink_to(tmp_path / "elsewhere.json")
    assert checker.check(run_directory)[0] == 0


def test_large_files_are_refused_before_they_are_read(run_directory, tmp_path):
    """Files with holes: their sizes are large, not what lies on the disk."""
    for name, size in (("certificate.json", 2**27), ("frozen/network.safetensors", 2**33)):
        path = run_directory / name
        before = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(size)
        code, lines = within(run_directory)
        assert code == 2 and name in lines[0] and "bytes, and the limit is" in lines[0], lines
        path.write_bytes(before)
    path = run_directory / "images.safetensors"
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 2**26))
        file.truncate(2**27)
    code, lines = within(run_directory)
    assert code == 2 and "bytes of its header, and the limit is" in lines[0], lines

    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file, file.open("images.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (3 * 2**30,)})
        for _ in range(3):
            stream.write(bytes(2**20))
    shutil.copyfile(bomb, tmp_path / "short.npz")
    data = bytearray(bomb.read_bytes())
    place = data.rindex(b"PK\x01\x02") + 24  # the unpacked size in the directory of the archive
    data[place : place + 4] = struct.pack("<I", 3 * 2**30)
    bomb.write_bytes(data)
    for name, message in (("bomb.npz", "bytes unpacked, and the limit"), ("short.npz", "is shorter than its shape")):
        with pytest.raises(checker.Unreadable, match=message):
            checker.read_split(tmp_path / name, checker.Budget())


def test_trusted_sources_may_cost_more(run_directory, monkeypatch, capsys):
    monkeypatch.setattr(checker, "WORK", 1.0)
    monkeypatch.setattr(checker, "WORK_PER_BYTE", 0.01)
    code, lines = checker.check(run_directory)
    assert code == 2 and "If you trust the source, --budget" in lines[0]
    factor = int(lines[0].split("--budget ")[1].split()[0])
    assert factor > 1
    assert checker.check(run_directory, budget=factor)[0] == 0
    assert command_line.main(["check", str(run_directory)]) == 2
    capsys.readouterr()
    assert command_line.main(["check", str(run_directory), "--budget", str(factor)]) == 0
    for text in ("0", "-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit):
            command_line.main(["check", str(run_directory), f"--budget={text}"])
    capsys.readouterr()


def test_tables_of_many_classes_are_refused(tmp_path):
    arrays = {"head/matrix": np.ones((20_000, 1)), "head/bias": np.zeros(20_000)}
    ops = [{"name": "flat", "type": "Flatten", "in_shape": [1, 1, 1]}]
    code, lines = within(stated_network(tmp_path, ops, arrays, [("exact: a reordering", {})]))
    assert code == 2 and "head (LinearHead): about" in lines[0] and "numbers at once" in lines[0], lines


def test_compositions_beyond_the_limits_are_refused(monkeypatch):
    rng = np.random.default_rng(0)
    ops = []
    for shape in ((3, 3, 2, 3), (3, 3, 3, 2)):
        fields = {"kernel": draw(rng, *shape), "in_shape": [12, 5, shape[2]], "strides": 1, "padding": "ZERO"}
        ops.append(checker.OPERATORS["Conv"](fields))
        ops[-1].claim = checker.Fraction(10)
    for limits in ({"NUMBERS": 50}, {"WORK": 1e4}):
        for name, value in limits.items():
            monkeypatch.setattr(checker, name, value)
        for way in ("dense_below", "banded_below"):
            with pytest.raises(checker.TooLarge, match=r"chain: about"):
                getattr(checker.Chain(ops, checker.Budget()), way)(checker.Fraction(100))
        monkeypatch.undo()
    chain = checker.Chain(ops, checker.Budget())
    assert chain.dense_below(checker.Fraction(100)) and chain.banded_below(checker.Fraction(100))


def test_the_series_of_an_exponential_is_decided_in_bounded_time():
    """A bound that touches the supremum from below is halved at for ever."""
    theta = np.linspace(1.0, 2.0, 2_000_001)
    values = np.abs(sum((1j * theta) ** j / math.factorial(j) for j in range(6)))
    start = time.process_time()
    for limit in (float(values.max()), np.nextafter(float(values.max()), 0), 1.0):
        assert checker.series_below(5, checker.Fraction(2), checker.Fraction(float(limit))) in (True, False)
    assert time.process_time() - start < 60
