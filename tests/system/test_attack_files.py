"""What attacks leave behind: of each image the strongest one, whatever attacks come later and however weak they are."""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from test_falsify import certified
from training_helpers import made_up_images, quick_compiles, read, tiny_config  # noqa: F401

from lipjax import __main__ as program
from lipjax.certify import FrozenNetwork
from lipjax.certify.document import draw
from lipjax.evaluation.evaluate import certify_run
from lipjax.evaluation.table import print_table, summarize

pytestmark = pytest.mark.x64_off
RADII = (0.5, 1.0)  # where these attacks differ
FILES = ("attack.json", "attack.npz", "adversarial.npz")
STRONG = {"certify.radii": RADII, "certify.attack_steps": 30, "certify.attack_queries": 50}


@pytest.fixture
def workdir(tmp_path):
    """A certified run that nobody has attacked yet."""
    shutil.copytree(certified(), tmp_path / "run")
    for name in FILES:
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


def kept(workdir):
    with np.load(workdir / "adversarial.npz") as file:
        return dict(file)


def certify(workdir, **changes):
    out = io.StringIO()
    console = Console(file=out, width=200)
    report = certify_run(workdir, tiny_config(**{"certify.radii": RADII, **changes}), 0, console=console)
    return report, out.getvalue()


def attack(workdir, *arguments):
    assert program.main(["attack", str(workdir), *map(str, arguments)]) == 0
    return read(workdir / "attack.json")


def distances(arrays, images):
    """Of all kept points from their images, by place in the data set."""
    places = arrays["index"][arrays["found"]]
    far = np.sqrt(((arrays["point"].astype(float) - images[places]) ** 2).sum((1, 2, 3)))
    return dict(zip(places.tolist(), far.tolist(), strict=True))


@pytest.mark.nightly
def test_a_weaker_attack_changes_nothing_for_the_worse(workdir):
    images, labels = made_up_images(15, seed=1)
    images = images / 255
    report, _ = certify(workdir, **STRONG)
    strong, before = read(workdir / "attack.json"), kept(workdir)
    assert report["attacked_accuracy"] == strong["attacked_accuracy"]
    assert report["attacked_accuracy"]["1"] < report["clean_accuracy"]  # it finds something
    # What is kept is of the other class than the reported one, in the box, and says how it was found.
    network = FrozenNetwork.load(workdir / "frozen")
    rows = before["index"][before["found"]]
    assert before["index"].tolist() == list(range(15)) and len(rows) > 0
    assert np.all(network(before["point"]).argmax(1) != network(images[rows]).argmax(1))
    assert before["point"].min() >= 0 and before["point"].max() <= 1
    ways = [json.loads(before["ways"][i]) for i in before["found_by"]]
    assert all({"method", "seed", "restart"} <= set(way) for way in ways)
    assert sum(strong["found_by"].values()) == np.sum(labels[rows] == network(images[rows]).argmax(1))

    # A weaker one by the command, on fewer images; by a certification with other settings; and one without steps.
    document = attack(workdir, "--method", "pgd", "--steps", 1, "--num_images", 3)
    assert document["attacked_accuracy"].keys() == {"0.1", "0.25"}  # at the radii of the run's own config
    assert document["num_images"] == 15 and [a["num_images"] for a in document["attacks"]] == [15, 3]
    assert (
        document["gate"]["num_images"]
        == strong["gate"]["num_images"]
        == sum(row["radius"] > 0 for row in read(workdir / "certificate.json")["images"])
    )
    largest = [{tuple(row["classes"]): row["lower"] for row in d["lipschitz"]["pairs"]} for d in (strong, document)]
    assert all(largest[1][pair] >= low for pair, low in largest[0].items())
    for changes in ({"certify.attack_steps": 1, "certify.attack_images": 2}, {"certify.attack_steps": 0}):
        again, _ = certify(workdir, **changes)
        assert again["num_attacked_images"] == 15
        for key, value in report["attacked_accuracy"].items():
            assert again["attacked_accuracy"][key] <= value
            assert read(workdir / "attack.json")["attacked_accuracy"][key] == again["attacked_accuracy"][key]
    after = kept(workdir)
    now, then = distances(after, images), distances(before, images)
    assert now.keys() >= then.keys() and all(now[place] <= then[place] * (1 + 1e-6) for place in then)


def test_a_stronger_attack_replaces_what_it_beats(workdir):
    weak, _ = certify(workdir, **{"certify.attack": "pgd", "certify.attack_steps": 1})
    assert read(workdir / "attack.json")["method"] == "pgd"
    before = kept(workdir)
    strong, text = certify(workdir, **STRONG)
    assert all(value <= weak["attacked_accuracy"][key] for key, value in strong["attacked_accuracy"].items())
    images = made_up_images(15, seed=1)[0] / 255
    then, now = distances(before, images), distances(kept(workdir), images)
    assert all(now[place] <= far * (1 + 1e-6) for place, far in then.items())
    assert any(now[place] < 0.95 * far for place, far in then.items())
    assert "Attacking all 15 test images at 2 radii" in text
    assert "apgd" in {json.loads(way)["method"] for way in kept(workdir)["ways"]}


def test_without_an_attack_none_is_reported(workdir, capsys):
    report, text = certify(workdir, **{"certify.attack_steps": 0})
    assert report["attacked_accuracy"] == {} and report["num_attacked_images"] == 0
    assert "Attacking" not in text and not (workdir / "attack.json").exists()
    for shown in (report, summarize([report, report])):
        out = io.StringIO()
        print_table(shown, Console(file=out, width=200))
        assert out.getvalue().count("not attacked") == 3
    assert program.main(["report", str(workdir)]) == 0
    page = (workdir / "report.html").read_text()
    assert "not attacked" in page and "None was attacked." in page and "% under attack" not in page
    assert program.main(["attack", str(workdir), "--steps", "0"]) == 2
    assert "With 0 steps nothing is attacked" in capsys.readouterr().err


def test_attacks_of_another_network_or_of_other_data_are_not_taken_over(workdir):
    certify(workdir, **STRONG)
    arrays = kept(workdir)
    for name in ("frozen_sha256", "data_sha256"):
        np.savez(workdir / "adversarial.npz", **arrays | {name: np.str_("0" * 64)})
        document = attack(workdir, "--steps", 1, "--num_images", 4, "--method", "pgd")
        assert document["num_images"] == 4 and len(document["attacks"]) == 1
    # What lies there about another network goes away when nothing is attacked.
    document = read(workdir / "attack.json") | {"frozen_sha256": "0" * 64}
    (workdir / "attack.json").write_text(json.dumps(document))
    np.savez(workdir / "adversarial.npz", **arrays | {"frozen_sha256": np.str_("0" * 64)})
    certify(workdir, **{"certify.attack_steps": 0})
    assert not any((workdir / name).exists() for name in FILES)


def test_what_is_kept_is_looked_at_again_not_believed(workdir):
    """Points of the image's own class, outside of the box or from nowhere count for nothing; damaged files are told."""
    certify(workdir, **STRONG)
    arrays, honest = kept(workdir), read(workdir / "attack.json")
    grey = np.full_like(arrays["point"], 0.5)
    same = (made_up_images(15, seed=1)[0][arrays["index"][arrays["found"]]] / 255).astype(np.float32)
    for false in (same, 1.5 + arrays["point"]):
        np.savez(workdir / "adversarial.npz", **arrays | {"point": false})
        report, _ = certify(workdir, **{"certify.attack_steps": 0})
        assert set(report["attacked_accuracy"].values()) == {report["clean_accuracy"]}
    np.savez(workdir / "adversarial.npz", **arrays)
    report, _ = certify(workdir, **{"certify.attack_steps": 0})
    assert report["attacked_accuracy"] == honest["attacked_accuracy"]  # control
    damages = (
        arrays | {"point": grey[1:]},
        arrays | {"found_by": arrays["found_by"] + 1000},
        arrays | {"index": arrays["index"][::-1]},
        arrays | {"ways": np.array(["{"] * len(arrays["ways"]))},
        {name: array for name, array in arrays.items() if name != "inside"},
    )
    for damaged in damages:
        np.savez(workdir / "adversarial.npz", **damaged)
        report, text = certify(workdir, **{"certify.attack_steps": 0})
        assert "adversarial.npz is damaged" in text and report["num_attacked_images"] == 0
    (workdir / "adversarial.npz").write_bytes(b"PK")
    assert "adversarial.npz is damaged" in certify(workdir, **{"certify.attack_steps": 0})[1]


def test_images_that_are_not_certified_now_are_kept(workdir):
    full, _ = certify(workdir, **STRONG)
    before = kept(workdir)
    part, _ = certify(workdir, **{"certify.num_images": 4, "certify.attack_steps": 1, "certify.attack": "pgd"})
    assert part["num_attacked_images"] == part["num_images"] == 4 and part["of"] == 15
    after = kept(workdir)
    assert after["index"].tolist() == list(range(15))
    rest = ~np.isin(before["index"][before["found"]], draw(np.arange(15), 4))
    there = np.isin(after["index"][after["found"]], before["index"][before["found"]][rest])
    assert np.array_equal(after["point"][there], before["point"][rest]) and rest.any()
    again, _ = certify(workdir, **{"certify.attack_steps": 0})
    assert again["num_attacked_images"] == 15
    assert all(again["attacked_accuracy"][key] <= value for key, value in full["attacked_accuracy"].items())
