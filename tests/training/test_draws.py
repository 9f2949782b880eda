"""Subsets of test images: drawn by hash, so that the order of a data set has no part in what a subset says."""

import io
import json
import shutil

import numpy as np
import pytest
from checker_helpers import Forger
from rich.console import Console
from training_helpers import made_up_images, npz_file, quick_compiles, tiny_config  # noqa: F401

from lipjax import __main__ as program
from lipjax import checker
from lipjax.certify.document import draw
from lipjax.evaluation.evaluate import certify_run
from lipjax.training.loop import train


def test_draws_are_nested_and_those_of_the_checker():
    assert draw(np.arange(20), 5).tolist() == checker.drawn(20, 5) == [0, 10, 11, 15, 18]
    thousand = set(draw(np.arange(10_000), 1000).tolist())
    assert set(draw(np.arange(10_000), 100).tolist()) < thousand and len(thousand) == 1000
    assert min(np.histogram(list(thousand), 10, (0, 10_000))[0]) > 70  # from everywhere
    assert draw(np.arange(7), 7).tolist() == draw(np.arange(7), 99).tolist() == list(range(7))
    # Of images in another order the same ones are drawn; places are ascending.
    mixed = np.random.default_rng(0).permutation(10_000)
    assert set(mixed[draw(mixed, 1000)].tolist()) == thousand
    # A part of what was drawn is what would have been drawn from all.
    indices = draw(np.arange(10_000), 1000)
    assert np.array_equal(indices[draw(indices, 50)], draw(np.arange(10_000), 50))


@pytest.fixture(scope="module")
def sorted_run(tmp_path_factory):
    """A run on data whose test images lie class by class: the 20 first are of the first class."""
    images, labels = made_up_images(60, seed=1)
    order = np.argsort(labels, kind="stable")
    path = npz_file("by_class", test_images=images[order], test_labels=labels[order])
    config = tiny_config(
        **{"data.path": str(path), "num_epochs": 2, "certify.num_images": 12, "certify.attack_steps": 2}
    )
    directory, out = tmp_path_factory.mktemp("by_class") / "run", io.StringIO()
    train(config, directory, 0)
    certify_run(directory, config, 0, console=Console(file=out, width=200))
    return directory, config, path, out.getvalue()


@pytest.mark.x64_off
def test_a_set_sorted_by_class_gives_an_honest_subset(sorted_run, capsys):
    directory, _, path, text = sorted_run
    document = json.loads((directory / "certificate.json").read_text())
    labels = [row["label"] for row in document["images"]]
    assert min(labels.count(label) for label in range(3)) >= 2  # control: the first 12 are all of one class
    assert document["data"]["indices"] == draw(np.arange(60), 12).tolist()
    assert "Certifying 12 of 60 test images" in text and "Attacking 12 of 60 test images" in text
    # With the whole set at hand the checker finds each row's image at its place.
    code, lines = checker.check(directory)
    assert code == 0 and "about 12 of the 60 images of the data set (drawn by hash)" in lines, lines
    code, lines = checker.check(directory, data=path)
    assert code == 0 and "all 12 images evaluated again" in "\n".join(lines)
    assert "the images are those of the data set's hash" in lines
    capsys.readouterr()
    assert program.main(["attack", str(directory), "--num_images", "5", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "Attacking 5 of 60 test images" in out and "Attack on 12 of 60 test images" in out
    with np.load(directory / "attack.npz") as file:
        assert file["index"].tolist() == document["data"]["indices"]
        assert file["label"].tolist() == labels
    assert program.main(["report", str(directory)]) == 0
    page = (directory / "report.html").read_text()
    assert "Proved for 12 of the 60 test images of npz:by_class.npz, drawn by hash, and for no others." in page
    place = document["data"]["indices"][3]
    assert f"Image {place}: " in page and "of 12 of 60 test images" in page


@pytest.mark.x64_off
def test_the_checker_says_when_images_were_chosen_and_refuses_false_places(sorted_run, tmp_path):
    directory, _, path, _ = sorted_run

    def with_indices(indices, total=60):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        f = Forger(copy)
        f.certificate["data"]["indices"], f.certificate["data"]["of"] = indices, total
        if indices is None:
            del f.certificate["data"]["indices"]
        f.write()
        report = json.loads((copy / "report.json").read_text())
        (copy / "report.json").write_text(json.dumps(report | {"of": total}))
        return copy

    honest = draw(np.arange(60), 12).tolist()
    assert checker.check(with_indices(honest))[0] == 0
    others = [*honest[:-1], honest[-1] + 1]
    code, lines = checker.check(with_indices(others))
    assert code == 0 and "about 12 of the 60 images of the data set (NOT drawn by hash, but chosen otherwise)" in lines
    code, lines = checker.check(with_indices(None))
    assert code == 0 and any("the first ones, not drawn by hash" in line for line in lines)
    # With the data set at hand such places are found out.
    assert checker.check(with_indices(others), data=path)[0] == 1
    assert checker.check(with_indices(None), data=path)[0] == 1
    for false in (honest[::-1], honest[:-1], [*honest[:-1], 60], [-1, *honest[1:]], [0.5, *honest[1:]], "all", {}):
        code, lines = checker.check(with_indices(false))
        assert code == 1 and any("indices: expected 12 different places" in line for line in lines), false
    for total in (11, "60", 12.0, True):
        assert checker.check(with_indices(honest, total))[0] == 1
    code, lines = checker.check(with_indices(honest, 2**50))  # no draw from so many is repeated
    assert code == 1 and any("draws are checked of" in line for line in lines)
    copy = with_indices(honest)
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(report | {"of": 59}))
    code, lines = checker.check(copy)
    assert code == 1 and any("report.json, of" in line for line in lines)
