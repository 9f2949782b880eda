"""From a trained run to its reports, and the gate that stops a false certificate."""

import dataclasses
import hashlib
import io
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console
from training_helpers import made_up_images, quick_compiles, read, tiny_config, trained  # noqa: F401

import lipjax
from lipjax import checker
from lipjax.attacks import AttackResult
from lipjax.certify import Certificate
from lipjax.certify.deployment import deployment_report
from lipjax.evaluation import table as reports
from lipjax.evaluation.evaluate import certify_run
from lipjax.training import loop
from lipjax.training.same_run import plain


@pytest.fixture
def workdir(tmp_path):
    shutil.copytree(trained(), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.x64_off
def test_a_certified_run_writes_what_is_proved(workdir):
    config = tiny_config()
    report = certify_run(workdir, config, 0, console=Console(file=io.StringIO()))
    written, document = read(workdir / "report.json"), read(workdir / "certificate.json")
    assert written == json.loads(json.dumps(report))
    assert (workdir / "certified_accuracy.png").read_bytes().startswith(b"\x89PNG")

    # The certificate and the frozen network agree with each other and with the data.
    network = lipjax.FrozenNetwork.load(workdir / "frozen")
    images, labels = made_up_images(15, seed=1)
    assert document["frozen_sha256"] == network.sha256() == report["frozen_sha256"]
    certificate = network.certify(images / 255)
    rows = document["images"]
    for field, values in (("label", labels), ("prediction", certificate.predictions), ("rival", certificate.rivals)):
        assert [row[field] for row in rows] == values.tolist()
    assert [row["radius"] for row in rows] == certificate.radii.tolist()
    assert [row["margin"] for row in rows] == certificate.margins.tolist()
    # What is proved for the float32 program, of all images.
    correct, single = certificate.predictions == labels, report["float32"]
    assert single["num_images"] == 15 and report["float32_clean_accuracy"] == np.mean(correct)
    whole = deployment_report(network, images / 255, certificate, tuple(config.certify.radii), 8, labels=labels)
    assert whole["ball"] == single["ball"] and whole["point"] == single["point"]
    shares = [row["accuracy"] for row in whole["ball"]["radii"]]
    assert list(report["float32_certified_accuracy"].values()) == shares
    assert report["float32_certified_accuracy"].keys() == report["certified_accuracy"].keys()
    digest = hashlib.sha256(b"pixel_max 255\n")
    for array in (images, labels.astype("<i4")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    data = {"name": "npz:data.npz", "split": "test", "num_images": 15, "of": 15, "pixel_max": 255}
    assert document["data"] == data | {"sha256": digest.hexdigest()}
    assert document["config"] == plain(config) and document["seed"] == 0 and document["step"] in (3, 6, 9)
    assert {"lipjax", "python", "jax", "numpy"} <= set(document["versions"]) and "float64" in document["precision"]

    code, lines = checker.check(workdir)
    assert code == 0, lines

    # Each layer: a proved bound, above the estimate by a known gap.
    layers = {row["name"]: row for row in document["layers"]}
    assert {"input", "stem/linear", "block_01/linear", "neck_conv/linear", "neck_dense/linear"} <= set(layers)
    for name in ("stem/linear", "block_01/linear", "neck_conv/linear", "neck_dense/linear"):
        row = layers[name]
        assert row["method"] and 0 <= row["gap"] < 0.02
        assert row["gap"] == pytest.approx(row["bound"] / row["estimate"] - 1, abs=1e-12)
    product = np.prod([row["bound"] for row in document["layers"]])
    matrix = np.asarray(network.network.head.matrix)
    pairwise = np.linalg.norm(matrix[:, None] - matrix[None], axis=-1)
    np.testing.assert_allclose(document["margin_lipschitz"], product * pairwise, rtol=1e-9, atol=1e-12)

    # The report by its own definitions, and the order that every report must have.
    correct = certificate.predictions == labels
    assert written["clean_accuracy"] == np.mean(correct) > 0.5
    for radius, key in ((0.1, "0.1"), (0.25, "0.25")):
        certified = np.mean(correct & (certificate.radii > radius))
        assert written["certified_accuracy"][key] == certified
        assert certified <= written["attacked_accuracy"][key] <= written["clean_accuracy"]
    assert written["certified_accuracy"]["0.1"] > 0  # control: the order is not that of zeros
    assert set(written["certified_accuracy"]) == set(written["attacked_accuracy"]) == {"0.1", "0.25"}
    assert (written["num_images"], written["num_attacked_images"]) == (15, 15)


@pytest.mark.x64_off
def test_only_the_images_asked_for(workdir):
    config = tiny_config(**{"certify.num_images": 7, "certify.attack_images": 3, "certify.radii": (36 / 255,)})
    report = certify_run(workdir, config, 0, console=Console(file=io.StringIO()))
    assert (report["num_images"], report["num_attacked_images"]) == (7, 3)
    assert list(report["certified_accuracy"]) == ["0.141176"]
    assert len(read(workdir / "certificate.json")["images"]) == 7


@pytest.mark.x64_off
def test_a_false_certificate_is_caught_and_nothing_is_reported(workdir, monkeypatch):
    honest = lipjax.FrozenNetwork.certify

    def inflated(self, images, batch_size=256):
        certificate = honest(self, images, batch_size)
        return dataclasses.replace(certificate, radii=1000 * certificate.radii + 10)

    monkeypatch.setattr(lipjax.FrozenNetwork, "certify", inflated)
    config = tiny_config(**{"certify.radii": (3.0,), "certify.attack_steps": 10})
    with pytest.raises(
        RuntimeError, match=r"A certificate is false: \d+ images change class inside their certified radius"
    ):
        certify_run(workdir, config, 0, console=Console(file=io.StringIO()))
    assert not (workdir / "report.json").exists() and not (workdir / "certificate.json").exists()
    found = np.load(workdir / "counterexample.npz")
    images, _ = made_up_images(15, seed=1)
    assert not (workdir / "frozen").exists()  # nothing of what was refuted stays
    run = loop.Run(config, 0)
    network = lipjax.freeze(run.model, loop.load_best(workdir, run)[0])
    assert len(found["index"]) > 0
    assert np.array_equal(found["image"], images[found["index"]] / 255)
    assert np.all(network(found["point"]).argmax(1) != network(found["image"]).argmax(1))
    assert found["point"].min() >= 0 and found["point"].max() <= 1


def certificate_of(predictions, radii):
    predictions = np.array(predictions)
    return Certificate(predictions, predictions * 0, np.ones(len(predictions)), np.array(radii))


def test_a_report_counts_what_its_words_say():
    labels = np.array([0, 1, 2, 1])
    certificate = certificate_of([0, 1, 2, 0], [0.3, 0.25, 0.1, 9.0])
    attack = AttackResult(np.array([np.inf, 0.26, 0.2]), np.zeros((3, 1, 1, 1)))
    report = reports.make_report(certificate, labels, (0.1, 0.25, 36 / 255), np.arange(3), attack, 9)
    assert report["clean_accuracy"] == 0.75
    # Strictly above the radius, so 0.25 and 0.1 do not count at theirs; the wrong image never counts.
    assert report["certified_accuracy"] == {"0.1": 0.5, "0.25": 0.25, "0.141176": 0.5}
    assert report["attacked_accuracy"] == {"0.1": 1.0, "0.25": pytest.approx(2 / 3), "0.141176": 1.0}
    assert (report["num_images"], report["of"], report["num_attacked_images"]) == (4, 9, 3)
    assert report["attacked_clean_accuracy"] == 1.0


def test_radii_are_shown_as_people_write_them():
    assert reports.radius_key(0.25) == "0.25" and reports.radius_key(36 / 255) == "0.141176"
    # Never above the radius: what is proved at the one would be said of the other.
    assert reports.radius_key(72 / 255) == "0.282352" and reports.radius_key(0.24999965) == "0.249999"
    rng = np.random.default_rng(0)
    radii = [*rng.uniform(size=500), *10.0 ** rng.uniform(-320, 300, 500), *(n / 255 for n in range(1, 600)), 5e-324]
    for radius in [float(r) for r in radii]:
        key, label = reports.radius_key(radius), reports.radius_label(radius)
        assert radius * (1 - 1e-5) <= float(key) <= radius or radius < 1e-300
        assert float(key) <= radius and len(key.split("e")[0].replace(".", "").strip("0")) <= 6
        assert eval(label) <= radius
    below = np.nextafter(36 / 255, 0)
    assert reports.radius_label(below) == reports.radius_key(below) == "0.141176"
    labels = {36 / 255: "36/255", 0.25: "0.25", 1.0: "1", 0.2: "0.2", 1.58: "1.58", 1.5: "1.5", 254 / 255: "254/255"}
    assert all(reports.radius_label(radius) == label for radius, label in labels.items())


def test_the_line_about_float32_never_rounds_a_bound_down():
    for largest in (0.0104, 0.0995, 2.35, 9.99e-5):
        found = {
            "num_images": 7,
            "of": 12,
            "bound": {"largest": largest},
            "gap": {"largest": 1.26e-6},
            "ball": {"float32": 5, "certified": 6, "median_ratio": 0.9},
        }
        line = reports.float32_line(found)
        assert largest <= float(re.search(r"proved below (\S+);", line)[1]) <= 1.11 * largest
        assert "(7 of 12 images)" in line and "1.3e-06 off" in line and "5 of 6 radii" in line and "90.0 %" in line
    overflow = {**found, "gap": {"largest": None}}
    assert "logits that are not finite, proved below" in reports.float32_line(overflow)
    nothing = {**found, "bound": {"largest": None}, "ball": {"float32": 0, "certified": 0, "median_ratio": None}}
    assert reports.float32_line(nothing).endswith("no error bound; 0 of 0 radii are proved for float32, too.")


def one_report(seed, clean, certified, attacked):
    return {
        "clean_accuracy": clean,
        "certified_accuracy": {"0.25": certified},
        "attacked_accuracy": {"0.25": attacked},
        "radii": [0.25],
        "num_images": 10,
        "of": 30,
        "num_attacked_images": 10,
        "seed": seed,
    }


def test_several_runs_give_mean_and_sample_standard_deviation():
    values = np.array([[0.9, 0.5, 0.7], [0.8, 0.6, 0.7], [0.7, 0.4, 0.9]])
    found = reports.summarize([one_report(seed, *row) for seed, row in enumerate(values)])
    clean, certified, attacked = values.T
    assert found["clean_accuracy"] == pytest.approx(clean.mean())
    assert found["summary"]["clean_accuracy"]["sd"] == pytest.approx(clean.std(ddof=1))
    assert found["summary"]["clean_accuracy"]["sd"] != pytest.approx(clean.std())  # control: not ddof 0
    for field, column in (("certified_accuracy", certified), ("attacked_accuracy", attacked)):
        assert found[field] == {"0.25": pytest.approx(column.mean())}
        stats = found["summary"][field]["0.25"]
        assert stats == {"mean": pytest.approx(column.mean()), "sd": pytest.approx(column.std(ddof=1))}
    assert found["seeds"] == [0, 1, 2] and len(found["runs"]) == 3
    out = io.StringIO()
    reports.print_table(found, Console(file=out, width=160))
    assert "80.00 % ± 10.00" in out.getvalue() and "50.00 % ± 10.00" in out.getvalue()
    assert "not proved" in out.getvalue()  # for float32, of which these reports say nothing


def float32_found(clean, certified):
    return {
        "num_images": 10,
        "bound": {"largest": 0.01},
        "gap": {"largest": 1e-6},
        "point": {"accuracy": clean},
        "ball": {"float32": 5, "certified": 6, "median_ratio": 0.9, "radii": [{"radius": 0.25, "accuracy": certified}]},
    }


def test_what_is_proved_for_float32_is_a_column():
    rows = [(0.9, 0.5, 0.7, 0.875, 0.375), (0.8, 0.6, 0.7, 0.75, 0.5)]
    found = [reports.add_float32(one_report(i, *row[:3]), float32_found(*row[3:])) for i, row in enumerate(rows)]
    assert found[0]["float32_clean_accuracy"] == 0.875 and found[0]["float32_certified_accuracy"] == {"0.25": 0.375}
    out = io.StringIO()
    reports.print_table(found[0], Console(file=out, width=160))
    heading, *table = [line for line in out.getvalue().splitlines() if "│" in line or "┃" in line]
    assert "certified (proved) ┃ proved for the float32 program, too ┃ under attack (upper bound)" in heading
    assert [re.findall(r"[\d.]+ %", line) for line in table] == [
        ["90.00 %", "87.50 %", "90.00 %"],
        ["50.00 %", "37.50 %", "70.00 %"],
    ]
    both = reports.summarize(found)
    assert both["float32_certified_accuracy"] == {"0.25": 0.4375} and both["float32_clean_accuracy"] == 0.8125
    reports.print_table(both, Console(file=out, width=160))
    assert "43.75 % ± 8.84" in out.getvalue()

    failed = reports.add_float32(one_report(0, 0.9, 0.5, 0.7), {"error": "head: nobody bounds it."})
    assert failed["float32_certified_accuracy"] is None and failed["float32_clean_accuracy"] is None
    out = io.StringIO()
    reports.print_table(failed, Console(file=out, width=160))
    assert out.getvalue().count("not proved") == 2
    assert "Nothing is proved for the float32 program: head: nobody bounds it." in out.getvalue()
    assert "float32_certified_accuracy" not in reports.summarize([failed, found[0]])


def test_the_table_names_the_images_that_were_attacked():
    report = one_report(0, 0.9, 0.5, 0.7) | {"num_attacked_images": 4}
    out = io.StringIO()
    reports.print_table(report, Console(file=out, width=120))
    assert "0.25" in out.getvalue() and "50.00 %" in out.getvalue() and "±" not in out.getvalue()
    assert "Accuracy on 10 of 30 test images" in out.getvalue()
    assert "The attack ran on 4 of 30 test images, drawn by hash." in out.getvalue()
