"""Names of classes and accuracies class by class: saved, reported, printed, on the page, and proved by the checker."""

import io
import json
import math
import shutil

import jax
import numpy as np
import pytest
from checker_helpers import NETWORKS, Forger, contents, write_run
from rich.console import Console
from training_helpers import read

from lipjax import FrozenNetwork, checker
from lipjax.errors import UserError
from lipjax.evaluation.classes import class_report, print_classes
from lipjax.evaluation.html.page import write_reports

NAMES = ("cat", "hot dog", "Öre", "<b>[bold]\x1b[31m")  # of the four classes of `mlp_network`
RADII = {"0.01": 0.01, "0.05": 0.05}


# ---- the frozen network


def test_class_names_are_saved_and_loaded_beside_the_network(tmp_path):
    network = FrozenNetwork(jax.tree.map(np.asarray, NETWORKS["mlp_network"]()))
    assert network.class_names is None
    network.save(tmp_path / "plain")
    assert FrozenNetwork.load(tmp_path / "plain").class_names is None
    named = FrozenNetwork(network.network, list(NAMES))
    named.save(tmp_path / "named")
    assert read(tmp_path / "named" / "network.json")["class_names"] == list(NAMES)
    loaded = FrozenNetwork.load(tmp_path / "named")
    assert loaded.class_names == NAMES and loaded.sha256() == network.sha256()
    document = read(tmp_path / "named" / "network.json")
    del document["class_names"]  # as older versions wrote it
    (tmp_path / "named" / "network.json").write_text(json.dumps(document))
    assert FrozenNetwork.load(tmp_path / "named").class_names is None


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", ""], ["a", "b", "c", 4], "abcd", {"a": 1}, 5], ids=str)
def test_names_that_do_not_fit_the_classes_are_refused(honest, tmp_path, names):
    shutil.copytree(honest, tmp_path, dirs_exist_ok=True)
    network = FrozenNetwork.load(tmp_path / "frozen")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        with pytest.raises(ValueError, match="Expected class_names as 4 texts"):
            FrozenNetwork(network.network, names)
    path = tmp_path / "frozen" / "network.json"
    path.write_text(json.dumps(read(path) | {"class_names": names}))
    with pytest.raises(UserError, match="Expected class_names as 4 texts"):
        FrozenNetwork.load(tmp_path / "frozen")
    code, lines = checker.check(tmp_path)
    assert code == 1 and any("frozen/network.json, class_names: expected one text" in line for line in lines)
    path.write_text(json.dumps(read(path) | {"class_names": ["a", "b", "c", "d"]}))
    assert checker.check(tmp_path)[0] == 0  # control


# ---- counted, and proved by the checker


def counted(rows, radii, num_classes, names):
    """What `class_report` should give, by loops over rows of a certificate."""
    table = []
    for label in range(num_classes):
        own = [row for row in rows if row["label"] == label]

        def share(test, own=own):
            return sum(row["prediction"] == row["label"] and test(row) for row in own) / len(own) if own else None

        certified = {key: share(lambda row, r=r: row["radius"] > r) for key, r in radii.items()}
        entry = {"class": label, "name": names and names[label], "num_images": len(own)}
        table.append({**entry, "clean_accuracy": share(lambda row: True), "certified_accuracy": certified})
    confusion = [
        [sum((row["label"], row["prediction"]) == (i, j) for row in rows) for j in range(num_classes)]
        for i in range(num_classes)
    ]
    return table, confusion


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    directory = tmp_path_factory.mktemp("honest")
    write_run(directory, NETWORKS["mlp_network"]())
    return directory


def named_run(honest, directory, report=True):
    """A run of `mlp_network` whose classes have names and are reported, one of them without an image."""
    shutil.copytree(honest, directory, dirs_exist_ok=True)
    frozen = FrozenNetwork.load(directory / "frozen")
    FrozenNetwork(frozen.network, NAMES).save(directory / "frozen")
    forger = Forger(directory)
    rows = forger.rows
    if report:
        arrays = [np.array([row[name] for row in rows]) for name in ("prediction", "label", "radius")]
        forger.report |= class_report(*arrays, RADII, 4, NAMES)
        (directory / "report.json").write_text(json.dumps(forger.report))
    return rows


def test_a_report_counts_class_by_class_and_the_checker_proves_it(honest, tmp_path):
    rows = named_run(honest, tmp_path)
    report = read(tmp_path / "report.json")
    table, confusion = counted(rows, RADII, 4, NAMES)
    assert report["per_class"] == table and report["confusion"] == confusion
    present = [row for row in table if row["num_images"]]
    assert 1 < len(present) < 4 and any(0 < row["certified_accuracy"]["0.05"] < 1 for row in present)  # control
    assert report["mean_over_classes"]["clean_accuracy"] == pytest.approx(
        np.mean([row["clean_accuracy"] for row in present]), rel=1e-15
    )
    total = sum(row["num_images"] * row["clean_accuracy"] for row in present) / len(rows)
    assert math.isclose(total, report["clean_accuracy"]) and np.trace(confusion) == round(total * len(rows))
    code, lines = checker.check(tmp_path)
    assert code == 0, lines


FORGERIES = {
    "accuracy": (lambda r: r["per_class"][_present(r)].update(clean_accuracy=1.0 - 1e-9), "per_class"),
    "proved": (lambda r: r["per_class"][_present(r)]["certified_accuracy"].update({"0.05": 1.0001}), "per_class"),
    "count": (lambda r: r["per_class"][0].update(num_images=99), "per_class"),
    "name": (lambda r: r["per_class"][0].update(name="dog"), "per_class"),
    "class left out": (lambda r: r["per_class"].pop(), "per_class"),
    "all left out": (lambda r: r.pop("per_class"), "per_class"),
    "mean": (lambda r: r["mean_over_classes"].update(clean_accuracy=1.5), "mean_over_classes"),
    "confusion": (lambda r: r["confusion"][0].__setitem__(1, 77), "confusion"),
    "no matrix": (lambda r: r.update(confusion=None), "confusion"),
}


def _present(report):
    return next(row["class"] for row in report["per_class"] if row["num_images"])


@pytest.mark.parametrize("case", FORGERIES)
def test_false_numbers_of_a_class_are_refused(honest, tmp_path, case):
    named_run(honest, tmp_path)
    forge, field = FORGERIES[case]
    report = read(tmp_path / "report.json")
    forge(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    before = contents(tmp_path)
    code, lines = checker.check(tmp_path)
    assert code == 1 and [line for line in lines if line.startswith(f"report.json, {field}")], lines
    assert contents(tmp_path) == before


def test_a_report_without_classes_is_accepted(honest, tmp_path):
    named_run(honest, tmp_path, report=False)
    assert "per_class" not in read(tmp_path / "report.json") and checker.check(tmp_path)[0] == 0


# ---- printed


def printed(report):
    console = Console(file=io.StringIO(), width=120, color_system="truecolor", force_terminal=True)
    print_classes(report, "0.05", "0.05", console)
    return console.file.getvalue()


def a_report(num_classes, num_images, names=None):
    rng = np.random.default_rng(0)
    labels = np.arange(num_images) % (num_classes - 1)  # the last class has no image
    predictions = np.where(rng.random(num_images) < 0.7, labels, (labels + 1) % num_classes)
    return class_report(predictions, labels, rng.random(num_images) / 5, RADII, num_classes, names)


def test_the_table_shows_every_class_of_few_and_the_lowest_of_many():
    text = printed(a_report(4, 60, NAMES))
    assert all(name in text for name in ("cat", "hot dog", "Öre", r"<b>[bold]\x1b[31m"))
    assert "<b>[bold]\x1b" not in text  # what a name holds does not reach the terminal
    report = a_report(30, 3000)
    lines = printed(report).splitlines()
    assert "The lowest 5 of 30 classes (report.json has all)" in lines[0]
    shares = sorted(row["certified_accuracy"]["0.05"] for row in report["per_class"] if row["num_images"])
    shown = [line for line in lines if " %" in line]
    assert [f"{100 * share:.2f} %" in line for share, line in zip(shares[:5], shown, strict=True)] == [True] * 5
    label = int(shown[0].split("class ")[1].split()[0])
    assert f"class {label + 1} ({report['confusion'][label][label + 1]})" in shown[0]


# ---- the page


def test_a_page_shows_the_classes(honest, tmp_path):
    rows = named_run(honest, tmp_path / "run")
    forger = Forger(tmp_path / "run")
    certificate = forger.certificate | {"config": {}, "seed": 0, "step": 1, "versions": {}}
    certificate |= {"precision": "float64", "platform": "here"}
    report = forger.report | {"seed": 0, "num_attacked_images": 12, "attacked_accuracy": {"0.01": 1.0, "0.05": 1.0}}
    (tmp_path / "run" / "certificate.json").write_text(json.dumps(certificate))
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    (path,) = write_reports([tmp_path / "run"])
    page = path.read_text()
    assert "<h2>Classes</h2>" in page and "hot dog" in page and "&lt;b&gt;[bold]" in page and "<b>[bold]" not in page
    table, confusion = counted(rows, RADII, 4, NAMES)
    section = page.split("<h2>Classes</h2>")[1].split("</section>")[0]
    for row in table:
        cells = section.split('<th scope="row">')[row["class"] + 1].split("</tr>")[0]
        assert f">{row['num_images']}<" in cells
        for value in (row["clean_accuracy"], *row["certified_accuracy"].values()):
            assert (f">{100 * value:.2f}<" if value is not None else "–") in cells
    absent = sum(row["num_images"] == 0 for row in table)
    assert absent and f"Classes without an image, which do not enter the mean: {absent}." in section
    matrix = section.split("Confusion matrix")[1]
    for label, line in enumerate(confusion):
        cells = matrix.split('<th scope="row">')[label + 1].split("</tr>")[0]
        assert [cell.split(">")[-1] for cell in cells.split("</td>")[:-1]][-4:] == [str(n or "–") for n in line]
    shutil.rmtree(tmp_path / "run" / "frozen")
    write_reports([tmp_path / "run"])
    assert "class 1" in path.read_text() and "hot dog" not in path.read_text()  # control
