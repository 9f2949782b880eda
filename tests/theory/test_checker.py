"""The independent checker: it proves honest certificates of every family, and nothing that was tampered with."""

import io
import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checker_helpers import (
    COUNT,
    NETWORKS,
    Forger,
    contents,
    draw,
    elementwise_network,
    fingerprint,
    honest_runs,
    write_run,
)

from lipjax import __main__ as command_line
from lipjax import bounds, checker, conv, operators
from lipjax.certify import document
from lipjax.network import make_network


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return honest_runs(tmp_path_factory)


@pytest.mark.parametrize("name", NETWORKS)
def test_honest_certificates_are_proved(runs, name):
    before = contents(runs(name))
    code, lines = checker.check(runs(name))
    assert code == 0, lines
    assert any("every bound proved" in line for line in lines)
    assert any(f"all {COUNT} images" in line for line in lines)
    assert contents(runs(name)) == before  # nothing is written
    rows = json.loads((runs(name) / "certificate.json").read_text())["images"]
    assert max(row["radius"] for row in rows) > 1e-3  # control: something is claimed


@pytest.mark.parametrize("name", NETWORKS)
def test_writing_the_files_anew_is_no_tampering(runs, tmp_path, name):
    shutil.copytree(runs(name), tmp_path / "run")
    Forger(tmp_path / "run").write()
    assert checker.check(tmp_path / "run")[0] == 0


def test_float32_files_hold_the_float64_numbers_that_are_proved(runs, tmp_path):
    write_run(tmp_path / "run", NETWORKS["sorted_network"](), "float32")
    assert checker.check(tmp_path / "run")[0] == 0
    path = "frozen/network.safetensors"
    arrays = safetensors.numpy.load_file(tmp_path / "run" / path)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    safetensors.numpy.save_file({name: a.astype(np.float64) for name, a in arrays.items()}, tmp_path / "run" / path)
    assert checker.check(tmp_path / "run")[0] == 0  # the same numbers
    shutil.copytree(runs("sorted_network"), tmp_path / "other")  # control: numbers that only resemble those proved
    safetensors.numpy.save_file(arrays, tmp_path / "other" / path)
    code, lines = checker.check(tmp_path / "other")
    assert code == 1 and any("network.json, sha256" in line for line in lines)


@pytest.mark.parametrize("last", ["circular", "exponential"])
def test_what_follows_the_last_activation_need_not_be_composed(tmp_path, last):
    """From there on LipLT then takes the product of norms."""
    shape, rng = (2, 2, 2), np.random.default_rng(8)
    turn = np.asarray(conv.skew_kernel(jnp.asarray(draw(rng, 1, 1, 2, 2))))
    ends = {
        "circular": operators.CircularConv.from_blocks(np.tile(np.eye(2), (4, 1, 1)), np.zeros((0, 2, 2, 2)), shape),
        "exponential": operators.ConvExponential(turn, shape, 12),
    }
    ops = [
        ("first", operators.Conv(np.diag([1.0, 0.01]).reshape(1, 1, 2, 2), shape)),
        ("act", operators.ReLU(shape)),
        ("second", operators.Conv(np.diag([0.01, 1.0]).reshape(1, 1, 2, 2), shape)),
        ("again", operators.ReLU(shape)),
        ("last", ends[last]),
        ("flat", operators.Flatten(shape)),
    ]
    frozen = write_run(tmp_path, make_network(ops, operators.LinearHead(np.eye(3, 8), 0.1 * rng.normal(size=3))))
    constants = frozen.margin_lipschitz()
    product = bounds.margin_lipschitz_bound(frozen.network)
    assert (constants < 0.8 * product)[~np.eye(3, dtype=bool)].all()
    code, lines = checker.check(tmp_path)
    assert code == 0 and any("LipLT" in line for line in lines), lines
    rows = json.loads((tmp_path / "certificate.json").read_text())
    rows["margin_lipschitz"] = (0.6 * constants).tolist()
    (tmp_path / "certificate.json").write_text(json.dumps(rows))
    assert checker.check(tmp_path)[0] == 1


def test_what_the_rounding_analysis_does_not_cover_is_refused():
    with pytest.raises(checker.Unproved, match="more than 16,000,000 numbers"):
        checker.OPERATORS["Flatten"]({"in_shape": [4001, 4000, 1]})


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "certificate.json").unlink(), "certificate.json is missing"),
        (lambda d: (d / "images.safetensors").unlink(), "images.safetensors is missing"),
        (lambda d: (d / "frozen/network.json").unlink(), "network.json is missing"),
        (lambda d: (d / "certificate.json").write_bytes((d / "certificate.json").read_bytes()[:-90]), "is damaged"),
        (lambda d: (d / "images.safetensors").write_bytes((d / "images.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda d: (d / "frozen/network.safetensors").write_bytes(b"abc"), "network.safetensors is damaged"),
        (lambda d: (d / "report.json").write_bytes(b"\xff"), "report.json is damaged"),
        (lambda d: edit(d / "certificate.json", '"schema": 3', '"schema": 4'), "expected format .* schema 3"),
        (lambda d: edit(d / "certificate.json", '"schema": 3', '"schema": 2'), "schema 2, by an earlier .*certify the"),
        (lambda d: edit(d / "frozen/network.json", '"schema": 1', '"schema": 9'), "schema 1, got"),
        (lambda d: edit(d / "certificate.json", '"bound": 1.0', '"bound": NaN'), "NaN is no number"),
        (lambda d: edit(d / "certificate.json", '"schema": 3', '"schema": 3, "schema": 3'), "a key is there twice"),
        (lambda d: edit(d / "certificate.json", '"images": [', '"images": 3, "others": ['), "images is no list"),
        (lambda d: edit(d / "frozen/network.json", '"ops": [', '"ops": 3, "others": ['), "ops is no list"),
    ],
)
def test_unreadable_files_are_one_error(runs, tmp_path, capsys, damage, message):
    shutil.copytree(runs("sorted_network"), tmp_path / "run")
    damage(tmp_path / "run")
    assert checker.run(tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and captured.err.startswith("Error: ")
    assert re.search(message, captured.err)


def test_a_class_that_cannot_be_proved_does_not_count_as_correct(tmp_path):
    """Two translations by 2^120 cancel exactly, but not in float64."""
    shape = (1, 2, 1)
    shift = jnp.full(1, 2.0**120)
    ops = [
        ("up", operators.Bias(shift, shape)),
        ("down", operators.Bias(-shift, shape)),
        ("f", operators.Flatten(shape)),
    ]
    write_run(tmp_path, make_network(ops, operators.LinearHead(jnp.eye(2), jnp.asarray([100.0, 0.0]))))
    f = Forger(tmp_path)
    assert all(row["radius"] == 0 for row in f.rows)
    for row in f.rows:
        row["prediction"], row["rival"], row["label"] = 1, 0, 1
    f.images["labels"][:] = 1
    f.certificate["data"]["sha256"] = fingerprint(f.images["pixels"], f.images["labels"])
    f.write()
    code, lines = checker.check(tmp_path)
    assert code == 1 and any("whose class is not proved" in line for line in lines), lines


def test_the_command_line(runs, tmp_path, capsys):
    assert command_line.main(["check", str(runs("sorted_network"))]) == 0
    assert "proved" in capsys.readouterr().out
    for seed in (0, 1):
        shutil.copytree(runs("sorted_network"), tmp_path / f"seed_{seed}")
    assert command_line.main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("images evaluated again") == 2
    f = Forger(tmp_path / "seed_1")
    f.rows[1]["radius"] *= 1.1
    f.write()
    assert command_line.main(["check", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "seed_0: proved" in captured.out and "seed_1: NOT PROVED" in captured.err
    assert command_line.main(["check", str(tmp_path / "nowhere")]) == 2
    assert command_line.main(["check", "~nobody-of-this-name/run"]) == 2
    (tmp_path / "seed_1" / "certificate.json").unlink()  # a run without one is not passed over
    assert command_line.main(["check", str(tmp_path)]) == 2
    assert "seed_1/certificate.json is missing" in capsys.readouterr().err


def test_the_file_runs_alone(runs, tmp_path):
    """Copied, in a process that finds neither lipjax nor the working directory."""
    shutil.copy(checker.__file__, tmp_path / "checker.py")
    code = (
        "import json, runpy, sys\n"
        "sys.argv = ['checker.py', sys.argv[1]]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    result = stop.code\n"
        "import os\n"
        "print(json.dumps([result, sorted(sys.modules), os.environ['OPENBLAS_NUM_THREADS']]))"
    )
    command = [sys.executable, "-I", "-c", code, str(runs("sorted_network"))]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    result, modules, threads = json.loads(process.stdout.splitlines()[-1])
    assert result == 0 and threads == "1" and "numpy" in modules
    assert not [name for name in modules if name.split(".")[0] in ("jax", "jaxlib", "lipjax", "scipy", "threadpoolctl")]


def test_large_sets_are_sampled_by_hash(runs, tmp_path, monkeypatch):
    rows = [{"radius": 0.1 * i} for i in range(2500)]
    drawn = checker.sample_indices("a" * 64, "b" * 64, rows)
    assert drawn == document.sample_indices("a" * 64, "b" * 64, rows).tolist() and len(set(drawn)) == 1000
    assert min(np.histogram(drawn, 5, (0, 2500))[0]) > 100  # from everywhere
    rows[0] = {"radius": 1.0}
    assert checker.sample_indices("a" * 64, "b" * 64, rows) != drawn  # whoever changes a row draws anew
    assert checker.sample_indices("c" * 64, "b" * 64, rows) != checker.sample_indices("a" * 64, "b" * 64, rows)

    monkeypatch.setattr(checker, "SAMPLE", 5)
    monkeypatch.setattr(document, "SAMPLE", 5)
    write_run(tmp_path, elementwise_network())
    code, lines = checker.check(tmp_path)
    assert code == 0 and any("5 (drawn by hash) of 12 images" in line for line in lines), lines
    f = Forger(tmp_path)
    f.certificate["sample"]["is_split"] = True  # a part of a split is not the split
    f.write()
    assert any("certificate.json, data" in line for line in checker.check(tmp_path)[1])


def test_as_many_images_as_asked_for_are_evaluated_again(runs, tmp_path, monkeypatch, capsys):
    """Of a sample; of the whole data set, which must be the certificate's; a false row outside the sample is found."""
    everything = safetensors.numpy.load_file(runs("sorted_network") / "images.safetensors")  # the same images
    monkeypatch.setattr(checker, "SAMPLE", 5)
    monkeypatch.setattr(document, "SAMPLE", 5)
    for name in ("sorted_network", "mlp_network"):
        write_run(tmp_path / name, NETWORKS[name]())
    run = tmp_path / "sorted_network"
    whole, other = str(tmp_path / "all.npz"), tmp_path / "other.safetensors"
    np.savez(whole, test_images=everything["pixels"], test_labels=everything["labels"])

    def check(*options, directory=run):
        code = command_line.main(["check", str(directory), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    assert "3 (drawn by hash) of 12 images" in check("--images", "3")[1]
    f = Forger(run)
    subsets = [checker.sample_indices(f.certificate["frozen_sha256"], "x", f.rows, count) for count in (3, 5, 12)]
    assert set(subsets[0]) < set(subsets[1]) and subsets[2] == list(range(12))
    code, text = check("--images", "all")
    assert code == 2 and "holds 5 of 12 images: for more, give --data" in text
    code, text = check("--data", whole)
    assert code == 0 and "all 12 images evaluated again" in text and "those of the data set's hash" in text
    assert "7 (drawn by hash) of 12 images" in check("--data", whole, "--images", "7")[1]
    code, text = check("--data", whole, directory=tmp_path / "mlp_network")
    assert code == 2 and "--images 5 at most" in text

    changed = everything["pixels"].copy()
    changed[11, 0, 0, 0] ^= 1
    safetensors.numpy.save_file({"pixels": changed, "labels": everything["labels"]}, other)
    code, text = check("--data", str(other), "--images", "2")
    assert code == 1 and "but the certificate is about 12 with" in text
    wrong = {"expected the arrays": {"x": changed}, "one for each": {"images": changed, "labels": changed}}
    for message, arrays in wrong.items():
        np.savez(tmp_path / "wrong.npz", **arrays)
        code, text = check("--data", str(tmp_path / "wrong.npz"))
        assert code == 2 and message in text
    packed = io.BytesIO()
    np.savez(packed, **{name: everything[name] for name in ("pixels", "labels")})
    start = packed.getvalue().index(b"PK\x01\x02")  # the directory at its end: each damage there ends otherwise
    for place, bit in ((start, 1), (start + 6, 64), (start + 8, 1), (start + 10, 14)):
        data = bytearray(packed.getvalue())
        data[place] ^= bit
        (tmp_path / "wrong.npz").write_bytes(data)
        code, text = check("--data", str(tmp_path / "wrong.npz"))
        assert code == 2 and "wrong.npz is damaged" in text, (place - start, bit)
    (tmp_path / "wrong.npz").write_bytes(b"PK")
    assert check("--data", str(tmp_path / "wrong.npz"))[0] == 2
    assert check("--data", str(tmp_path / "none.npz"))[0] == 2
    for text in ("0", "-1", "some"):
        with pytest.raises(SystemExit):
            check(f"--images={text}")

    # Draws the sample anew until the raised margin lies outside: only the evaluation of all images finds it.
    for row in range(12):
        f = Forger(run)
        f.set_margin(f.rows[row], 10 * f.rows[row]["margin"] + 1)
        drawn = checker.sample_indices(f.certificate["frozen_sha256"], f.certificate["data"]["sha256"], f.rows)
        if row not in drawn:
            break
    f.images["indices"] = np.array(drawn)
    f.images |= {name: everything[name][drawn] for name in ("pixels", "labels")}
    f.write()
    assert check()[0] == 0
    code, text = check("--data", whole)
    assert code == 1 and f"images[{row}]: margin" in text
