"""The gate: true certificates pass, false ones end the run with a counterexample; and the command that runs it."""

import dataclasses
import functools
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiers import everyday
from training_helpers import npz_file, quick_compiles, read, scratch, tiny_config, trained  # noqa: F401

from lipjax import __main__ as program
from lipjax import attacks, operators
from lipjax.certify import FrozenNetwork
from lipjax.certify.document import draw
from lipjax.certify.frozen import float64_on_cpu
from lipjax.errors import UserError
from lipjax.evaluation import attack_files, falsify
from lipjax.evaluation.evaluate import certify_run
from lipjax.network import Network, make_network
from lipjax.training.config import load_config, validate

SHAPE = (4, 4, 1)
CONSOLE = Console(file=io.StringIO())


@functools.cache
def linear():
    """A linear network, whose radii and constants are tight, 12 images well inside the box, and their certificate."""
    rng = np.random.default_rng(0)
    with float64_on_cpu():
        matrix = rng.normal(size=(3, 16))
        head = operators.LinearHead(jnp.asarray(matrix), jnp.asarray(-matrix @ np.full(16, 0.5)))
        network = make_network([("flatten", operators.Flatten(SHAPE))], head)
        frozen = FrozenNetwork(jax.tree.map(np.asarray, network))
    images = rng.integers(110, 145, (12, *SHAPE)).astype(np.uint8)
    return frozen, images, frozen.certify(images / 255)


SETTINGS = falsify.Settings(radii=(0.05, 0.1), steps=25, queries=50, batch_size=5)


def run(directory, certificate, lipschitz=None, whole=None, settings=SETTINGS):
    frozen, images, _ = linear()
    lipschitz = frozen.margin_lipschitz() if lipschitz is None else lipschitz
    whole = falsify.whole_bound(frozen.network.head, frozen.lipschitz_report()) if whole is None else whole
    return falsify.falsify(frozen, certificate, lipschitz, whole, images, 255, settings, directory)


def test_lower_bounds_of_constants_hold_where_large_numbers_cancel():
    """Logits near 0 of sums of 3072 products near 10: their rounding is far more than that of numbers of their size."""
    shape, rng = (32, 32, 3), np.random.default_rng(0)
    matrix = rng.normal(size=(3, 3072)) + 1
    head = operators.LinearHead(matrix, -matrix @ np.full(3072, 128 / 255))
    frozen = FrozenNetwork(Network((operators.Flatten(shape),), head, np.zeros(1), np.ones(1), ("flatten",)))
    images, proved = rng.integers(120, 136, (4, *shape)), frozen.margin_lipschitz()
    deployed = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), frozen.network)
    found = attacks.lipschitz_lower_bound(
        deployed,
        images / np.float32(255),
        num_steps=2,
        num_starts=2,
        evaluate=lambda points: falsify.logits_and_errors(frozen, points, 8),
    )
    exact = np.array([np.linalg.norm(matrix[i] - matrix[j]) for i, j in found.pairs])
    assert (found.lower <= exact).all() and (found.lower > (1 - 1e-6) * exact).all()
    assert (found.lower <= proved[tuple(found.pairs.T)]).all()
    assert found.whole <= np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("method", everyday(["ensemble", "apgd", "pgd"], "ensemble"))
def test_true_certificates_pass_and_are_nearly_reached(tmp_path, method):
    _, _, certificate = linear()
    found = run(tmp_path, certificate, settings=dataclasses.replace(SETTINGS, method=method))
    assert found.num_inside == 12 and list(tmp_path.iterdir()) == []
    ratio, index = found.closest
    assert 1 <= ratio < 1.5 and np.isfinite(found.attack.distances[index])
    frozen, _, _ = linear()
    proved = frozen.margin_lipschitz()
    np.testing.assert_allclose(found.search.table(3), proved, rtol=1e-6)
    assert np.all(found.search.table(3) <= proved)
    norm = np.linalg.norm(frozen.network.head.matrix, 2)
    assert 0.9 * norm < found.search.whole <= norm * (1 + 1e-9)


@pytest.mark.parametrize("factor", [1.001, 50.0])
def test_a_false_radius_is_refuted_by_an_attack_inside_it(tmp_path, factor):
    frozen, images, certificate = linear()
    false = certificate.radii.copy()
    false[4] *= factor  # one of them, on no radius that is attacked for all
    settings = dataclasses.replace(SETTINGS, radii=(1e-6,))
    with pytest.raises(RuntimeError, match="A certificate is false: 1 images change class inside their certified"):
        run(tmp_path, dataclasses.replace(certificate, radii=false), settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["counterexample.npz"]
    found = np.load(tmp_path / "counterexample.npz")
    assert found["index"].tolist() == [4] and np.array_equal(found["image"], images[[4]] / 255)
    assert np.sqrt(((found["point"] - found["image"]) ** 2).sum()) < false[4]
    assert frozen(found["point"]).argmax() != certificate.predictions[4]


def test_the_certificates_of_misclassified_images_are_attacked_too(tmp_path):
    """Labels play no part: what is certified is the class reported."""
    frozen, _, certificate = linear()
    swapped = dataclasses.replace(certificate, predictions=(certificate.predictions + 1) % 3)
    with pytest.raises(RuntimeError, match="A certificate is false: 12 images"):
        run(tmp_path, swapped)
    _, images, _ = linear()
    findings, everything = run(tmp_path, certificate), np.arange(12)
    for labels, right in ((certificate.predictions, True), ((certificate.predictions + 1) % 3, False)):
        part = attack_files.Images(images, labels, everything, 12, 255, "data")
        attacked = attack_files.Attacked(everything, part, certificate, findings, SETTINGS, None)
        distances = attacked.of_labels().distances
        assert np.all(distances >= certificate.radii) if right else np.all(distances == 0)


def test_a_false_lipschitz_constant_is_refuted_by_two_points(tmp_path):
    frozen, _, certificate = linear()
    false = frozen.margin_lipschitz().copy()
    false[0, 2] *= 0.999
    false[2, 0] *= 0.999
    with pytest.raises(RuntimeError, match="A Lipschitz bound is false: 1 of logit differences"):
        run(tmp_path, certificate, false)
    found = np.load(tmp_path / "counterexample.npz")
    assert found["pairs"].tolist() == [[0, 2]] and found["lower"] > found["proved"] == false[0, 2]
    row = frozen.network.head.matrix[0] - frozen.network.head.matrix[2]
    difference = (found["x"] - found["y"]).ravel()
    assert abs(row @ difference) / np.linalg.norm(difference) > false[0, 2]
    with pytest.raises(RuntimeError, match="A Lipschitz bound is false: that of all logits"):
        run(tmp_path, certificate, whole=0.5)


def test_without_steps_nothing_is_attacked(tmp_path):
    _, images, certificate = linear()
    found = run(tmp_path, certificate, settings=dataclasses.replace(SETTINGS, steps=0))
    assert (found.num_inside, found.closest, found.search) == (0, None, None)
    frozen, _, _ = linear()
    part = attack_files.Images(images, certificate.predictions, np.arange(12), 12, 255, "data")
    constants, none = (frozen.margin_lipschitz(), None), dataclasses.replace(SETTINGS, steps=0)
    attacked = attack_files.attack_images(tmp_path, frozen, certificate, *constants, part, none, 0, CONSOLE)
    assert attacked.of_labels() is None and len(attacked.rows) == 0
    assert attack_files.write_attack(tmp_path, frozen, attacked, *constants) is None
    assert list(tmp_path.iterdir()) == []  # what did not happen is not told


@functools.cache
def certified() -> pathlib.Path:
    """A finished run, certified. Copy it before changing anything in it."""
    directory = scratch() / "certified"
    shutil.copytree(trained(), directory)
    certify_run(directory, tiny_config(), 0, console=Console(file=io.StringIO()))
    return directory


@pytest.fixture
def workdir(tmp_path):
    shutil.copytree(certified(), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def command(capsys):
    def call(*arguments):
        try:
            code = program.main(["attack", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.x64_off
def test_the_command_attacks_what_was_certified(command, workdir):
    before, report = read(workdir / "attack.json"), read(workdir / "report.json")
    assert before["attacked_accuracy"] == report["attacked_accuracy"]
    assert (before["method"], before["steps"], before["restarts"], before["num_images"]) == ("ensemble", 5, 1, 15)
    for name in ("attack.json", "attack.npz", "adversarial.npz"):
        (workdir / name).unlink()  # what is kept otherwise: test_attack_files.py
    options = ["--objective", "margin", "--steps", 4, "--restarts", 2, "--num_images", 9]
    code, out, err = command(workdir, "--method", "pgd", *options)
    assert (code, err) == (0, "")
    assert "Attacking 9 of 15 test images" in out
    assert "Attack on 9 of 15 test images (pgd, margin, 4 steps, 2 restarts)" in out and "attack.npz" in out
    document, everything = read(workdir / "attack.json"), read(workdir / "certificate.json")["images"]
    chosen = draw(np.arange(15), 9)
    assert chosen.tolist() != list(range(9))
    rows = [everything[place] for place in chosen]
    assert (document["method"], document["steps"], document["num_images"]) == ("pgd", 4, 9)
    inside = sum(row["radius"] > 0 for row in rows)
    assert document["gate"]["num_images"] == inside > 0 and document["gate"]["violations"] == 0
    assert document["gate"]["closest_ratio"] > 1
    assert document["lipschitz"]["num_pairs"] == document["lipschitz"]["of"] == 3
    assert all(0 < row["lower"] <= row["proved"] for row in document["lipschitz"]["pairs"])
    assert 0 < document["lipschitz"]["whole_lower"] <= document["lipschitz"]["whole_proved"]
    for key in document["attacked_accuracy"]:
        proved = np.mean([row["radius"] > float(key) and row["label"] == row["prediction"] for row in rows])
        assert proved <= document["attacked_accuracy"][key] <= document["clean_accuracy"]

    with np.load(workdir / "attack.npz") as file:
        arrays = dict(file)
    network = FrozenNetwork.load(workdir / "frozen")
    assert arrays["index"].tolist() == chosen.tolist() and arrays["image"].dtype == arrays["point"].dtype == np.float32
    for field in ("label", "prediction", "radius"):
        assert arrays[field].tolist() == [row[field] for row in rows]
    found = np.isfinite(arrays["distance"])
    assert found.any() and np.array_equal(found, np.isfinite(arrays["point"]).all((1, 2, 3)))
    classes = network(arrays["point"][found]).argmax(1)
    assert np.all(classes != arrays["prediction"][found]) and np.all(arrays["taken_for"][found] == classes)
    assert np.all(arrays["taken_for"][~found] == -1) and np.all(arrays["found_by"] == np.where(found, "pgd margin", ""))
    lengths = np.sqrt(((arrays["point"][found].astype(float) - arrays["image"][found]) ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(arrays["distance"][found], lengths)
    assert np.all(lengths > arrays["radius"][found])


@pytest.mark.x64_off
def test_the_command_fails_on_a_false_certificate_and_overwrites_nothing(command, workdir):
    document = read(workdir / "certificate.json")
    for row in document["images"]:
        row["radius"] += 3
    (workdir / "certificate.json").write_text(json.dumps(document))
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    code, _, err = command(workdir)
    assert code == 1 and err.startswith("Error: A certificate is false") and "Traceback" not in err
    after = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    assert len(np.load(io.BytesIO(after.pop("counterexample.npz")))["index"]) > 0 and after == before


def edited(change):
    def apply(workdir):
        document = read(workdir / "certificate.json")
        change(document)
        (workdir / "certificate.json").write_text(json.dumps(document))

    return apply


def other_data(workdir):
    document = read(workdir / "config.json")
    images = np.load(npz_file())["test_images"][::-1]
    document["config"]["data"]["path"] = str(npz_file("reversed", test_images=images))
    (workdir / "config.json").write_text(json.dumps(document))


def other_shape(workdir):
    document = read(workdir / "config.json")
    arrays = {name: np.pad(array, ((0, 0), (4, 4), (4, 4), (0, 0))) for name, array in np.load(npz_file()).items()
              if name.endswith("images")}  # fmt: skip
    document["config"]["data"]["path"] = str(npz_file("larger", **arrays))
    (workdir / "config.json").write_text(json.dumps(document))


BAD = {
    "no certificate": (lambda w: (w / "certificate.json").unlink(), "has no certificate"),
    "no JSON": (lambda w: (w / "certificate.json").write_text('{"format": '), "certificate.json is damaged"),
    "a list": (lambda w: (w / "certificate.json").write_text("[1]"), "certificate.json is damaged"),
    "other schema": (edited(lambda d: d.update(schema=99)), "another version"),
    "a radius of text": (edited(lambda d: d["images"][0].update(radius="large")), "certificate.json is damaged"),
    "a negative radius": (edited(lambda d: d["images"][0].update(radius=-1.0)), "certificate.json is damaged"),
    "a class that is none": (edited(lambda d: d["images"][0].update(prediction=3)), "certificate.json is damaged"),
    "no constants": (edited(lambda d: d.pop("margin_lipschitz")), "certificate.json is damaged"),
    "other network": (edited(lambda d: d.update(frozen_sha256="0" * 64)), "another network"),
    "no network": (lambda w: shutil.rmtree(w / "frozen"), "holds no frozen network"),
    "damaged network": (lambda w: (w / "frozen" / "network.json").write_text("{"), "is damaged"),
    "other images": (other_data, "are not those that certificate.json"),
    "images of another shape": (other_shape, "takes images (8, 8, 1), but those of"),
}


@pytest.mark.x64_off
@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_with_one_message_and_nothing_is_written(command, workdir, case):
    spoil, message = BAD[case]
    spoil(workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    code, _, err = command(workdir)
    assert code == 2 and message in err and err.startswith("Error: ") and err.count("Error: ") == 1, err
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.x64_off
def test_bad_arguments_are_refused(command, workdir):
    for arguments, message in (
        (["--steps", "-1"], "config.certify.attack_steps"),
        (["--restarts", "0"], "config.certify.attack_restarts"),
        (["--num_images", "-3"], "config.certify.attack_images"),
        (["--targets", "0"], "config.certify.attack_targets"),
        (["--queries", "0"], "config.certify.attack_queries"),
        (["--objective", "hinge"], "invalid choice"),
        (["--method", "fgsm"], "invalid choice"),
    ):
        code, _, err = command(workdir, *arguments)
        assert code == 2 and message in err, err


@pytest.mark.x64_off
def test_the_config_of_an_older_run_loads(workdir):
    document = read(workdir / "config.json")
    for field in ("attack", "attack_restarts", "attack_objective", "attack_targets", "attack_queries"):
        del document["config"]["certify"][field]
    (workdir / "config.json").write_text(json.dumps(document))
    config, _ = load_config(workdir)
    assert (config.certify.attack, config.certify.attack_restarts) == ("ensemble", 1)
    with config.unlocked(), pytest.raises(UserError, match="config.certify.attack: expected one of"):
        config.certify.attack = "cw"
        validate(config)
