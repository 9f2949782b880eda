"""The HTML report: what it says, that it stands alone, that text stays text, and what bad directories get."""

import json

import numpy as np
import pytest
from report_helpers import CLAIM, Page, network_of_the_run, stands_alone, write_attack, write_run

from lipjax import __main__
from lipjax.certify.radius import radius_key
from lipjax.evaluation.html import parts
from lipjax.evaluation.html.page import write_reports

HOSTILE = "<script>alert('1')</script>\"&<b>"


@pytest.fixture
def directory(tmp_path):
    return write_run(tmp_path / "run")


def test_a_page_says_what_is_proved_and_stands_alone(tmp_path):
    matrix, frozen = network_of_the_run()
    directory = write_run(tmp_path / "run", frozen.sha256())
    frozen.save(directory / "frozen")
    write_attack(directory, frozen.sha256())
    assert write_reports([directory]) == [directory / "report.html"]
    text = (directory / "report.html").read_text()
    page = stands_alone(text)
    expected = [
        "Certified robustness of tinynet on made up",
        CLAIM,
        "20 of the 50 test images",
        "float64 throughout",
        "Not covered: running the network in float32",
        # Of 18 correct images, of radii 3/8 … 20/8, 18 are above 36/255 and 14 above 0.75. Of the two attacks the
        # lower accuracy counts.
        "proved for the float32 program, too 80.00 % at radius 36/255",
        "certified (proved) proved for the float32 program, too under attack (upper bound)",
        "0 (clean) 90.00 % 18 / 20 90.00 % 80.00 % 8 / 10",
        "36/255 90.00 % 18 / 20 80.00 % 70.00 % 7 / 10",
        "0.75 70.00 % 14 / 20 50.00 % 60.00 % 6 / 10",
        # Proved bounds are rounded up: 5.4321004, 1 + 2^-40.
        "linear Dense 5.43211 5.4 5.9e-03 " + f"{np.linalg.svd(matrix, compute_uv=False)[-1]:.6g} plain",
        "series ConvExponential 1 + 9.1e-13 – – ≥ 0.9583 supremum",  # 1 - 1/4!
        "input Normalize 2 – – 2 ",
        "Layers of constant 1 by what they are: 1 (Flatten)",
        "go from 1.5 to 3.5",
        "relu 3.25 4.5",
        "input relu 3.125 dense",
        "Image 0: class 0 , taken for class 1",
        "Proved radius 0.25; another class at 0.625.",
        "Proved radius 0.375; no image of another class was found.",
        "another class at 0.4375.",
        "change ×4.0",
        "1.2345",
        "0.8125",
        frozen.sha256(),
        "d" * 64,
        "seed 0 step 123",
        "Some Machine",
        "lipjax 9.8.7",
        "num_epochs 7 model.name tinynet",
        "python -m lipjax check DIR",
    ]
    missing = [part for part in expected if part not in page.text]
    assert not missing, (missing, page.text)
    assert page.tags.count("svg") == 4 and page.tags.count("img") == 1 + 3 + 3 and page.tags.count("h1") == 1
    assert text.count('role="img" aria-label="') >= 4 and "at 36/255 90.00 % proved, 70.00 % under attack" in text


def test_what_is_missing_is_left_out(directory, capsys):
    (directory / "metrics.jsonl").unlink()
    certificate = json.loads((directory / "certificate.json").read_text())
    del certificate["liplt"], certificate["margin_lipschitz"], certificate["schema"]
    (directory / "certificate.json").write_text(json.dumps(certificate | {"config": {}}))
    assert __main__.main(["report", str(directory)]) == 0
    assert capsys.readouterr().out == f"Written to {directory / 'report.html'}\n"
    page = stands_alone((directory / "report.html").read_text())
    assert "python -m lipjax attack DIR" in page.text and page.tags.count("img") == 0
    assert page.tags.count("svg") == 2 and "Training" not in page.text and "LipLT" not in page.text
    assert "Certified robustness of network on made up" in page.text
    assert "linear Dense 5.43211 5.4 5.9e-03 – plain" in page.text


def test_float32_is_told_beside_the_claim(directory, capsys):
    path = directory / "report.json"
    report = json.loads(path.read_text())
    found = {
        "num_images": 7,
        "bound": {"largest": 0.02},
        "gap": {"largest": 1e-6},
        "ball": {"float32": 5, "certified": 6, "median_ratio": 0.9},
        "assumptions": "sums in any order, 1 < 2",
    }
    path.write_text(json.dumps(report | {"float32": found}))
    assert __main__.main(["report", str(directory)]) == 0
    page = stands_alone((directory / "report.html").read_text())
    assert "In float32 (7 images)" in page.text and "sums in any order, 1 < 2" in page.text
    assert "Not covered: running the network in float32" not in page.text
    path.write_text(json.dumps(report | {"float32": {"error": "no bound of a Strange layer"}}))
    assert __main__.main(["report", str(directory)]) == 0
    page = stands_alone((directory / "report.html").read_text())
    assert "Not covered: running the network in float32" in page.text
    assert "Nothing is proved for the float32 program: no bound of a Strange layer" in page.text
    nothing = {"float32_clean_accuracy": None, "float32_certified_accuracy": None}
    path.write_text(json.dumps(report | nothing))
    assert __main__.main(["report", str(directory)]) == 0
    page = stands_alone((directory / "report.html").read_text())
    assert "0.75 70.00 % 14 / 20 not proved" in page.text
    capsys.readouterr()
    # Float32 adds errors: nothing can be proved for it that is not proved in exact arithmetic.
    for field, value in (("clean", 0.95), ("clean", -0.1), ("certified", {"0.141176": 0.8, "0.75": 0.75})):
        path.write_text(json.dumps(report | {f"float32_{field}_accuracy": value}))
        assert __main__.main(["report", str(directory)]) == 2
        assert "proves more for float32" in capsys.readouterr().err
    path.write_text(json.dumps(report | {"float32": {"bound": 1}}))
    assert __main__.main(["report", str(directory)]) == 2
    assert "part on float32 is damaged" in capsys.readouterr().err


def test_an_attack_without_steps_replaces_none(directory):
    write_attack(directory)
    notes = json.loads((directory / "attack.json").read_text())
    for steps, shown in ((20, "65.00 %"), (0, "60.00 %")):
        changed = notes | {"steps": steps, "num_images": 20, "attacked_accuracy": {"0.141176": 0.7, "0.75": 0.65}}
        (directory / "attack.json").write_text(json.dumps(changed))
        write_reports([directory])
        text = (directory / "report.html").read_text()
        assert (shown in Page(text).text) and ("65.00 %" in Page(text).text) == (steps > 0)


def test_text_stays_text(tmp_path):
    directory = write_run(tmp_path / "run", text=HOSTILE)
    certificate = json.loads((directory / "certificate.json").read_text())
    for group, name in (("versions", "lipjax"), ("data", "name"), ("config", HOSTILE)):
        certificate[group][name] = HOSTILE
    certificate |= {"claim": HOSTILE, "platform": HOSTILE, "precision": HOSTILE}
    folder = tmp_path / "classes"
    certificate["config"]["data"] = {"name": "folder", "path": str(folder)}
    for name in ("a", "b", '<b class="x">&'):
        (folder / name).mkdir(parents=True)
    (directory / "certificate.json").write_text(json.dumps(certificate))
    write_attack(directory)
    write_reports([directory])
    text = (directory / "report.html").read_text()
    page = stands_alone(text)
    assert "b" not in page.tags and text.count("<script") == 0
    assert page.text.count(HOSTILE) >= 8 and 'Image 0: <b class="x">&' in page.text  # "<" sorts before letters


def test_several_runs_get_an_index(tmp_path):
    directories = [write_run(tmp_path / f"seed_{seed}", seed=seed) for seed in (3, 4)]
    report, certificate = (json.loads((directories[1] / f"{n}.json").read_text()) for n in ("report", "certificate"))
    rows = [row for row in certificate["images"] if row["label"] == row["prediction"]]
    for row in sorted((row for row in rows if row["radius"] > 0.75), key=lambda row: row["radius"])[:4]:
        row["radius"] = 0.75  # 10 of 20 images are left beyond it
    for r in report["radii"]:
        counted = sum(row["radius"] > r for row in rows)
        report["certified_accuracy"][radius_key(r)] = counted / len(certificate["images"])
    (directories[1] / "report.json").write_text(json.dumps(report))
    (directories[1] / "certificate.json").write_text(json.dumps(certificate))
    assert __main__.main(["report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert page.references == ["seed_3/report.html", "seed_4/report.html"]
    assert all((tmp_path / link).exists() for link in page.references)
    assert "seed 3 90.00 % 90.00 % 80.00 % 80.00 % 70.00 % 50.00 % 60.00 %" in page.text
    assert "60.00 ± 14.14 %" in page.text  # of 70 and 50
    assert "certified at 0.75 float32, too, at 0.75 attacked at 0.75" in page.text and "50.00 ± 0.00 %" in page.text
    report["radii"] = [0.75]
    (directories[1] / "report.json").write_text(json.dumps(report))
    before = (tmp_path / "report.html").read_bytes()
    assert __main__.main(["report", str(tmp_path)]) == 2 and (tmp_path / "report.html").read_bytes() == before


def edited(name, **changes):
    def damage(directory):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def truncated(name):
    def damage(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def other_radii(directory):
    with np.load(directory / "attack.npz") as file:
        arrays = dict(file)
    np.savez(directory / "attack.npz", **arrays | {"radius": arrays["radius"] + 1})


DAMAGES = {
    "no certificate": (lambda d: (d / "certificate.json").unlink(), "certificate.json is missing"),
    "no report": (lambda d: (d / "report.json").unlink(), "report.json is missing"),
    "no run": (lambda d: (d / "config.json").unlink(), "holds no training run"),
    "truncated certificate": (truncated("certificate.json"), "certificate.json is damaged"),
    "truncated report": (truncated("report.json"), "report.json is damaged"),
    "truncated attack": (truncated("attack.npz"), "attack.npz is damaged"),
    "truncated notes": (truncated("attack.json"), "attack.json is damaged"),
    "other format": (edited("certificate.json", format="lipjax-frozen-network"), "expected the format 'lipjax-cert"),
    "a list": (lambda d: (d / "certificate.json").write_text("[]"), "expected a JSON object, got list"),
    "no number": (lambda d: (d / "report.json").write_text('{"radii": [NaN]}'), "NaN is not JSON"),
    "no image": (edited("certificate.json", images=[]), "lacks what a report shows"),
    "infinite radius": (edited("certificate.json", images=[{"label": 0, "prediction": 0, "radius": "9"}]), "numbers"),
    "no layers": (edited("certificate.json", layers=None), "layers: expected list"),
    "another report": (edited("report.json", frozen_sha256="0"), "does not fit the certificate"),
    "accuracy above 1": (edited("report.json", clean_accuracy=1.5), "does not fit the certificate"),
    "other notes": (edited("attack.json", format="x"), "expected the format 'lipjax-attack'"),
    "other network": (edited("attack.json", frozen_sha256="0"), "is of another network"),
    "no gate": (edited("attack.json", gate=None), "lacks what a report shows"),
    "other radii": (other_radii, "attack.npz is of another certificate"),
    "metrics": (lambda d: (d / "metrics.jsonl").write_text("{\n{}\n"), "damaged in line 1"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_bad_directory_ends_with_one_message_and_code_2(directory, capsys, case):
    write_attack(directory)
    (directory / "report.html").write_text("old")
    damage, message = DAMAGES[case]
    damage(directory)
    assert __main__.main(["report", str(directory)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 1 and message in err, err
    assert (directory / "report.html").read_text() == "old"
    assert not list(directory.glob(".*"))


def test_another_frozen_network_is_refused(directory, capsys):
    network_of_the_run()[1].save(directory / "frozen")
    assert __main__.main(["report", str(directory)]) == 2
    assert "holds another network than the one that was certified" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", [0.1, 1.0, 2.5000000000000004, 1 + 2**-50, 1 - 2**-50, 123456.75, 3e-300, 0.0, 0.99995]
)
def test_rounded_bounds_stay_bounds(value):
    def number(text):
        first, sign, second = text.rpartition(" ")
        return float(second) if not sign else 1 + {"1 +": 1, "1 −": -1}[first] * float(second)

    low, high = (number(function(value)) for function in (parts.down, parts.up))
    assert low <= value <= high and high - low <= 2e-3 * value
