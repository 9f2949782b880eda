"""The HTML report as pictures: curves, bars and the gallery, legible on a narrow screen, in light and dark."""

import json
import re

import numpy as np
import pytest
from report_helpers import stands_alone, write_attack, write_run

from lipjax import FrozenNetwork, network, operators
from lipjax.certify import deployment
from lipjax.errors import UserError
from lipjax.evaluation.html import data, figures, parts
from lipjax.evaluation.html.page import write_reports

# The made-up run has 20 images of the classes 0, 1, 2, 0, ... and radii 1/8 ... 20/8; the first two are misclassified.
CURVE = [(0.1, 0.85), (0.3, 0.75), (0.6, 0.65), (1.0, 0.55), (1.2, 0.45)]


@pytest.fixture
def directory(tmp_path):
    directory = write_run(tmp_path / "run")
    write_attack(directory)
    return directory


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_curve(directory, curve=CURVE):
    rows = [{"radius": radius, "accuracy": share} for radius, share in curve]
    ball = {"float32": 5, "certified": 6, "median_ratio": 0.9, "radii": [], "curve": rows}
    found = {"num_images": 7, "bound": {"largest": 0.02}, "gap": {"largest": 1e-6}, "ball": ball, "assumptions": "none"}
    change(directory / "report.json", float32=found)


def page_of(directory):
    write_reports([directory])
    return (directory / "report.html").read_text()


def test_the_page_fits_a_narrow_screen_and_both_schemes(directory):
    text = page_of(directory)
    page = stands_alone(text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    # Nothing is wider than a phone: lengths that could be are of an element that may shrink, or scroll in its own box.
    for number, unit in re.findall(r"(?<!max-)(?:min-)?width: ?([\d.]+)(px|rem|em|%|vw)", text):
        assert float(number) * {"px": 1, "rem": 16, "em": 16, "%": 3.9, "vw": 3.9}[unit] <= 390, (number, unit)
    assert not re.search(r"<(svg|img|table|td|div)[^>]* width=", text)
    assert "figure svg { display: block; width: 100%" in text and ".scroll { overflow-x: auto; max-width: 100%" in text
    for table in re.findall(r"<table", text):
        assert re.search(r'<div class="scroll"[^>]*><table', text), table
    assert len(re.findall(r'<div class="scroll"[^>]*><table', text)) == page.tags.count("table")
    # Every colour of the light scheme has one of the dark scheme, and figures have no other colours.
    light, rest = parts.STYLE.split("@media (prefers-color-scheme: dark)")
    light, dark = (set(re.findall(r"(--\w+): #", part)) for part in (light, rest))
    assert light == dark and set(re.findall(r"var\((--\w+)\)", text)) == light
    assert not re.findall(r"#[0-9a-f]{6}\b", text.split("</style>")[1])
    images = re.findall(r"<img[^>]*>", text)
    alternatives = [re.search(r'alt="([^"]+)"', image) for image in images]
    assert len(images) == 7 and all(alternatives) and len({found[1] for found in alternatives if found}) == 7
    svgs = re.findall(r"<svg[^>]*>", text)
    assert len(svgs) == 4 and all('role="img" aria-label="' in svg for svg in svgs)


def test_the_curve_of_float32_is_beside_the_certified_one(directory):
    old = page_of(directory)  # of a version that knew float32 at the reported radii alone
    with_curve(directory)
    text = page_of(directory)
    for page in (old, text):
        curve = page.split("<h2>Accuracy</h2>")[1].split("</figure>")[0]
        assert "certified (proved)" in curve and "float32, too (proved)" in curve and "Dotted" in curve
    assert old != text
    run = data.read_run(directory)
    grid = np.array([0.0, 0.05, 0.1, 0.11, 36 / 255, 0.2, 0.3, 0.31, 0.75, 0.8, 1.2, 1.3])
    # Down to the radius before at least as much is proved; 36/255 and 0.75 are the report's own.
    expected = [90, 85, 85, 80, 80, 75, 75, 65, 50, 55, 45, np.nan]
    shown = figures._float32_steps(run, grid)
    np.testing.assert_allclose(shown, expected)
    right = run.predictions == run.labels
    proved = np.array([100 * np.mean(right & (run.radii > radius)) for radius in grid])
    assert (shown[:-1] <= proved[:-1]).all()
    change(directory / "report.json", float32_certified_accuracy=None, float32_clean_accuracy=None)
    assert "float32, too (proved)" not in page_of(directory)


@pytest.mark.parametrize("curve", [[(0.3, 0.95)], [(2.4, 0.1)], [(0.3, None)], [("x", 0.1)], [(0.3, float("nan"))]])
def test_a_curve_that_proves_too_much_or_is_none_is_refused(directory, curve):
    with_curve(directory)
    write_reports([directory])  # control
    with_curve(directory, curve)
    with pytest.raises(UserError, match="report.json"):
        write_reports([directory])


def test_deployment_reports_have_the_curve():
    rng = np.random.default_rng(0)
    head = operators.LinearHead(rng.normal(size=(3, 12)), np.zeros(3))
    frozen = FrozenNetwork(
        network.Network((operators.Flatten((2, 2, 3)),), head, np.zeros(1), np.ones(1), ("flatten",))
    )
    images = rng.uniform(size=(20, 2, 2, 3))
    certificate = frozen.certify(images)
    labels = np.where(np.arange(20) < 5, (certificate.predictions + 1) % 3, certificate.predictions)
    radius = float(np.median(certificate.radii))
    ball = deployment.deployment_report(frozen, images, certificate, (radius,), labels=labels)["ball"]
    radii, shares = (np.array([row[name] for row in ball["curve"]]) for name in ("radius", "accuracy"))
    assert radii[-1] == pytest.approx(1.6 * radius) and len(radii) == 64
    exact = np.array([np.mean((certificate.radii > r) & (np.arange(20) >= 5)) for r in radii])
    shorter = np.array([np.mean((certificate.radii > 1.001 * r) & (np.arange(20) >= 5)) for r in radii])
    assert (shorter <= shares).all() and (shares <= exact).all() and 0.75 >= shares[0] > shares[-1]
    assert "curve" not in deployment.deployment_report(frozen, images, certificate, (radius,))["ball"]


def test_every_class_has_a_bar_of_what_is_proved(directory):
    text = page_of(directory)
    bars = re.findall(r'class="level" role="img" aria-label="([^"]*)">(.*?)</li>', text)
    # Of class 0 the images 0, 3, ..., 18, of which the first is misclassified and two have radii up to 0.75.
    rows = np.arange(20)
    expected = []
    for label in range(3):
        own = rows % 3 == label
        counts = [own & (rows >= 2), own & (rows >= 2) & ((rows + 1) / 8 > 36 / 255), own & (rows >= 6)]
        expected.append([100 * count.sum() / own.sum() for count in counts])
    for label, (said, drawn) in enumerate(bars):
        assert said.startswith(f"class {label}: clean ") and "; proved at 36/255 " in said and ", at 0.75 " in said
        widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", drawn)]
        assert widths == pytest.approx(expected[label], abs=0.05)
    assert len(bars) == 3 and len({tuple(row) for row in expected}) > 1


def test_plain_words_count_what_is_proved(tmp_path):
    directory = write_run(tmp_path / "run")
    page = stands_alone(page_of(directory))
    assert "is right on 18 of 20 test images. For 18 of them, 90.00 % of all, a proof says more" in page.text
    assert "no larger than 36/255" in page.text and "Of the other" not in page.text and "values here" not in page.text
    rows = json.loads((directory / "certificate.json").read_text())["images"]
    rows[2]["radius"] = 0.14  # below 36/255 = 0.1412
    change(directory / "certificate.json", images=rows)
    accuracies = {
        "certified_accuracy": {"0.141176": 0.85, "0.75": 0.7},
        "attacked_accuracy": {"0.141176": 0.85, "0.75": 1},
    }
    change(directory / "report.json", num_attacked_images=20, **accuracies)
    page = stands_alone(page_of(directory))
    assert "For 17 of them, 85.00 % of all" in page.text
    assert "Of the other 3 images 3 are misclassified, or an attack found" in page.text
    assert "for the remaining 0 neither is known" in page.text


def test_cards_say_what_the_files_say(directory):
    with np.load(directory / "attack.npz") as file:
        arrays = dict(file)
    assert "found by" not in page_of(directory)  # a file of an older version
    newer = {"taken_for": np.array([2, 1, -1]), "found_by": np.array(["apgd targeted_dlr", "square", ""])}
    np.savez(directory / "attack.npz", **arrays | newer)
    change(directory / "attack.json", attacks=[{"method": "ensemble", "steps": 20, "restarts": 1, "seed": 0}])
    page = stands_alone(page_of(directory))
    assert "taken for class 2 change ×4.0" in page.text and "found by Auto-PGD, targeted dlr." in page.text
    assert "found by Square Attack." in page.text and "Searched by: ensemble (20 steps, 1 restart)." in page.text
    np.savez(directory / "attack.npz", **arrays | newer | {"taken_for": np.array([0.5, 1, 2])})
    with pytest.raises(UserError, match=r"attack\.npz is damaged"):
        write_reports([directory])
