"""From a folder of images to a certificate that is checked with them: names, notes, the exported split."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from training_helpers import made_up_images, quick_compiles, tiny_config  # noqa: F401

from lipjax import FrozenNetwork, checker
from lipjax.errors import UserError
from lipjax.run import run
from lipjax.training.data import load_dataset
from lipjax.training.export import export_split
from lipjax.training.prepare import main as prepare_main

pytestmark = pytest.mark.x64_off

NAMES = ("cat", "dog", "pig")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """75 images in three folders, larger than the network takes, and a file that is no image."""
    root = tmp_path_factory.mktemp("animals")
    for index, (image, label) in enumerate(zip(*made_up_images(75), strict=True)):
        (root / NAMES[label]).mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).resize((24, 16)).save(root / NAMES[label] / f"{index:02}.bmp")
    (root / "readme.txt").write_text("my animals")
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "w"
    changes = {"data.name": "folder", "data.path": str(folder), "data.image_size": 8, "num_epochs": 2}
    changes |= {"loss.class_weights": "balanced", "certify.attack_steps": 0}
    run(tiny_config(**changes), directory)
    return directory


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "w")


def test_a_folder_is_trained_certified_exported_and_checked(folder, workdir, tmp_path, capsys):
    output = tmp_path / "new" / "test.npz"
    assert prepare_main(["export", f"--workdir={workdir}", "--split=test", f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert "15 test images" in said and f"python -m lipjax check {workdir} --data {output}" in said
    with np.load(output) as file:
        arrays = dict(file)
    assert arrays["test_images"].shape == (15, 8, 8, 1) and arrays["class_names"].tolist() == list(NAMES)
    code, lines = checker.check(workdir, math.inf, output)
    assert code == 0 and "the images are those of the data set's hash" in lines, lines

    # Control: another image, or the images in another order, are not those that were certified.
    for change in (lambda a: a + (np.arange(15) == 3).astype(np.uint8)[:, None, None, None], lambda a: a[::-1]):
        np.savez(tmp_path / "other.npz", **arrays | {"test_images": change(arrays["test_images"])})
        code, lines = checker.check(workdir, math.inf, tmp_path / "other.npz")
        assert code == 1 and "other.npz: 15 images with SHA-256" in lines[0]


def test_names_of_folders_and_the_size_reach_what_is_written(folder, workdir):
    assert FrozenNetwork.load(workdir / "frozen").class_names == NAMES
    report, certificate = (json.loads((workdir / name).read_text()) for name in ("report.json", "certificate.json"))
    assert [row["name"] for row in report["per_class"]] == list(NAMES)
    assert [row["num_images"] for row in report["per_class"]] == [5, 5, 5] == np.sum(report["confusion"], 1).tolist()
    assert certificate["data"]["name"] == f"folder:{folder.name}, resized to 8 x 8"


def test_training_says_what_was_not_read(folder, finished, tmp_path, capsys):
    changes = {"data.name": "folder", "data.path": str(folder), "data.image_size": 8, "num_epochs": 1}
    changes |= {"certify.attack_steps": 0, "optimizer.warmup_epochs": 0.0}
    run(tiny_config(**changes), tmp_path / "again")
    out = capsys.readouterr().out
    assert f"Not read in {folder}: 1 file (1 .txt)." in out
    for name in (*NAMES, "most often taken for"):
        assert name in out


def test_other_splits_are_exported_under_their_names(folder, workdir, tmp_path):
    dataset = load_dataset(
        tiny_config(**{"data.name": "folder", "data.path": str(folder), "data.image_size": 8}).data, 0
    )
    for split in ("train", "validation"):
        export_split(workdir, tmp_path / "part.npz", split)
        with np.load(tmp_path / "part.npz") as file:
            assert set(file.files) == {"images", "labels", "class_names"}
            assert np.array_equal(file["images"], dataset.split(split).images)
            assert np.array_equal(file["labels"], dataset.split(split).labels)


def test_what_cannot_be_exported_ends_with_one_message(folder, workdir, tmp_path, capsys):
    def refused(*arguments):
        assert prepare_main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and not (tmp_path / "out.npz").exists()
        return error

    where, output = f"--workdir={workdir}", f"--output={tmp_path / 'out.npz'}"
    assert "must end in .npz" in refused(where, f"--output={tmp_path / 'out.npy'}")
    assert "holds no training run" in refused(f"--workdir={tmp_path}", output)
    other = shutil.copytree(folder, tmp_path / "moved")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(other / "cat" / "more.png")
    assert "not those that" in refused(where, output, f"--path={other}")
    (other / "cat" / "more.png").unlink()
    export_split(workdir, tmp_path / "moved.npz", path=str(other))  # control
    (workdir / "certificate.json").write_text("{")
    assert "certificate.json is damaged" in refused(where, output)
    (workdir / "certificate.json").unlink()
    with pytest.raises(UserError, match="give .*seed_0"):
        shutil.copytree(workdir, tmp_path / "several" / "seed_0")
        export_split(tmp_path / "several", tmp_path / "out.npz")
    document = json.loads((workdir / "config.json").read_text())
    document["config"]["data"]["validation_fraction"] = 0.0
    (workdir / "config.json").write_text(json.dumps(document))
    assert "The validation split of" in refused(where, output, "--split=validation")
    assert prepare_main(["export", where, output]) == 0  # control
