"""Frozen networks in files: saved, loaded, exported, and refused where damaged."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors
from frozen_helpers import frozen_network, small_model

import lipjax
from lipjax import operators
from lipjax.certify import FrozenNetwork
from lipjax.errors import UserError
from lipjax.network import make_network


@pytest.fixture(scope="module")
def model_and_variables():
    return small_model()


def test_save_and_load_give_the_same_certificate(tmp_path, model_and_variables):
    frozen = lipjax.freeze(*model_and_variables)
    frozen.save(tmp_path)
    loaded = FrozenNetwork.load(tmp_path)
    assert loaded.sha256() == frozen.sha256() and loaded.network.names == frozen.network.names
    x = np.random.default_rng(1).uniform(0, 1, (3, 8, 8, 1))
    first, second = frozen.certify(x), loaded.certify(x)
    np.testing.assert_array_equal(first.radii, second.radii)
    np.testing.assert_array_equal(first.margins, second.margins)
    other = frozen_network()
    assert other.sha256() != frozen.sha256()


def test_a_float32_network_takes_half_the_bytes_and_says_so(tmp_path, model_and_variables):
    wide, frozen = lipjax.freeze(*model_and_variables), lipjax.freeze(*model_and_variables, dtype="float32")
    assert frozen.dtype == "float32" and all(a.dtype == np.float64 for a in frozen.arrays().values())
    difference = max(np.abs(a - b).max() for a, b in zip(wide.arrays().values(), frozen.arrays().values(), strict=True))
    assert 0 < difference < 1e-6 and wide.sha256() != frozen.sha256()
    wide.save(tmp_path / "wide")
    frozen.save(tmp_path / "half")
    sizes = [(tmp_path / name / "network.safetensors").stat().st_size for name in ("half", "wide")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = FrozenNetwork.load(tmp_path / "half")
    assert loaded.sha256() == frozen.sha256() and loaded.dtype == "float32"
    with pytest.raises(ValueError, match="Expected float32 numbers"):
        FrozenNetwork(wide.network, dtype="float32")
    with pytest.raises(ValueError, match=r"dtype of \('float64', 'float32'\), got 'bfloat16'"):
        FrozenNetwork(wide.network, dtype="bfloat16")
    huge = make_network([("d", operators.Dense(np.diag([1.0, 1e60])))], operators.LinearHead(np.eye(2), np.zeros(2)))
    with pytest.raises(ValueError, match="finite"):
        lipjax.freeze(huge, dtype="float32")


def test_the_arrays_file_states_the_claim(tmp_path):
    frozen = frozen_network()
    for name in ("a", "b"):
        frozen.save(tmp_path / name)
    with safetensors.safe_open(tmp_path / "a" / "network.safetensors", "np") as file:
        about = json.loads(file.metadata()["lipjax"])
    assert about["sha256"] == frozen.sha256() and "exact real arithmetic" in about["claim"]
    files = [(tmp_path / name / "network.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def edit_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip_byte(d / "network.safetensors", -1), "hash"),
        (lambda d: (d / "network.safetensors").write_bytes(b"abc"), "damaged"),
        (lambda d: (d / "network.safetensors").unlink(), "missing"),
        (lambda d: (d / "network.json").unlink(), "missing"),
        (lambda d: (d / "network.json").write_text("{"), "damaged"),
        (lambda d: edit_json(d / "network.json", lambda j: j.update(schema=99)), "schema"),
        (lambda d: edit_json(d / "network.json", lambda j: j["ops"][0].update(type="Unknown")), "fit"),
        (lambda d: edit_json(d / "network.json", lambda j: j["ops"][0].update(padding="CIRCULAR")), "hash"),
        (lambda d: edit_json(d / "network.json", lambda j: j.update(sha256="0" * 64)), "hash"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    frozen_network().save(tmp_path)
    FrozenNetwork.load(tmp_path)  # control: undamaged files load
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        FrozenNetwork.load(tmp_path)


def test_the_arrays_cannot_be_made_writable_again(tmp_path):
    """Bounds are computed once: an array that changed after that would be certified with them."""
    matrix = np.eye(3)
    network = make_network([("dense", operators.Dense(matrix))], operators.LinearHead(np.eye(3), np.zeros(3)))
    frozen = FrozenNetwork(jax.tree.map(lambda a: np.asarray(a, np.float64), network))
    for array in frozen.arrays().values():
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)
    matrix[0, 0] = 100.0  # control: the caller's own array is another one
    assert frozen.network.ops[0].matrix[0, 0] == 1.0


@pytest.mark.parametrize("shape", [[], [3, 4, 5, 6], "wide", {}])
def test_a_damaged_layout_ends_as_one_error(tmp_path, shape):
    network = make_network(
        [("sort", operators.MaxMin((4,)))], operators.LinearHead(np.eye(4), np.zeros(4)), np.zeros(1), np.ones(1)
    )
    FrozenNetwork(jax.tree.map(lambda a: np.asarray(a, np.float64), network)).save(tmp_path)
    document = json.loads((tmp_path / "network.json").read_text())
    document["ops"][0]["in_shape"] = shape
    (tmp_path / "network.json").write_text(json.dumps(document))
    with pytest.raises(UserError):
        FrozenNetwork.load(tmp_path)


RUN_ELSEWHERE = """
import sys
import jax
import jax.export
import numpy as np
jax.config.update("jax_enable_x64", sys.argv[4] == "float64")
with open(sys.argv[1], "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2]).astype(sys.argv[4])))
assert not any(name.split(".")[0] in ("lipjax", "flax") for name in sys.modules)
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exported_program_runs_without_lipjax(tmp_path, model_and_variables, dtype):
    frozen = lipjax.freeze(*model_and_variables)
    (tmp_path / "program").write_bytes(frozen.export(dtype))
    images = np.random.default_rng(0).random((3, *frozen.in_shape))
    np.save(tmp_path / "images.npy", images)
    files = [str(tmp_path / name) for name in ("program", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-I", "-c", RUN_ELSEWHERE, *files, dtype], check=True, cwd=tmp_path)
    logits = np.load(files[2])
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits, frozen(images), rtol=0, atol=1e-4 if dtype == "float32" else 1e-12)
    if dtype == "float32":
        assert (logits != frozen(images)).any()  # control: it is the rounded network
    with pytest.raises(ValueError, match="float16"):
        frozen.export("float16")
