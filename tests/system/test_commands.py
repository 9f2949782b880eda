"""The command `lipjax`: predict, compare, train, the version, and what mistakes are told."""

import importlib
import json
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image
from test_cli import config_file, lipjax_command, train, workdir  # noqa: F401
from training_helpers import made_up_images, quick_compiles, scratch, tiny_config, trained  # noqa: F401

import lipjax
from lipjax import __main__ as program
from lipjax.evaluation import compare, evaluate
from lipjax.training import metrics
from lipjax.training.config import load_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def certified(workdir):  # noqa: F811
    evaluate.certify_run(workdir, *load_config(workdir))
    return workdir


@pytest.fixture
def files(tmp_path):
    """Four images of the made-up classes as PNG files, and their pixels."""
    images = made_up_images(4, seed=3)[0]
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    return paths, images / np.float64(255)


def test_the_console_script_is_this_command(lipjax_command):  # noqa: F811
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["lipjax"].partition(":")
    assert getattr(importlib.import_module(module), name) is program.main
    assert lipjax_command("--version") == (0, f"lipjax {lipjax.__version__}\n", "")
    code, out, _ = lipjax_command("--help")
    commands = ("train", "certify", "check", "attack", "report", "predict", "compare", "plan", "prepare")
    assert code == 0 and all(re.search(rf"^    {command} ", out, re.MULTILINE) for command in commands)
    code, out, _ = lipjax_command("train", "--help")
    assert code == 0 and "--config.optimizer.learning_rate=1e-3" in out
    code, out, _ = lipjax_command("prepare", "--help")
    assert code == 0 and out.startswith("usage: lipjax prepare ")
    code, _, err = lipjax_command("trian")
    assert code == 2 and "invalid choice: 'trian'" in err


@pytest.mark.x64_off
def test_lipjax_train_does_what_train_py_does(lipjax_command, tmp_path, monkeypatch):  # noqa: F811
    config = config_file(**{"num_epochs": 1, "certify.attack_steps": 0})
    monkeypatch.chdir(tmp_path)
    code, out, err = lipjax_command("train", f"--config={config}")
    assert (code, err) == (0, "") and "Written to runs/tiny" in out
    assert (tmp_path / "runs" / "tiny" / "certificate.json").exists()
    lines = out.splitlines()
    assert re.fullmatch(r"Compiling the training step \.\.\. \d+\.\d s", lines[1]) and lines[2].startswith("epoch 1/1")
    code, out, _ = lipjax_command("train", f"--config={config}")  # trained already: nothing is compiled
    assert code == 0 and "Compiling" not in out


@pytest.mark.x64_off
def test_quiet_commands_print_tables_and_warnings_alone(lipjax_command, tmp_path):  # noqa: F811
    config = config_file(**{"num_epochs": 1, "certify.attack_steps": 1})
    for command in (
        ("train", f"--config={config}", f"--workdir={tmp_path}", "-q"),
        ("train", "--quiet", f"--config={config}", f"--workdir={tmp_path}"),  # trained already
        ("certify", tmp_path, "-q"),
    ):
        code, out, err = lipjax_command(*command)
        assert (code, err) == (0, "") and "Accuracy on all 15 test images" in out
        assert not re.search("Training|Compiling|epoch|Certifying|Attacking|Bounding|Written|already|left", out), out
    (tmp_path / "adversarial.npz").write_bytes(b"no archive")
    code, out, _ = lipjax_command("attack", tmp_path, "--steps=1", "--quiet")
    assert code == 0 and "Attacking" not in out and "Written" not in out
    assert "adversarial.npz is damaged" in out  # a warning
    code, out, _ = lipjax_command("attack", tmp_path, "--steps=1")  # control
    assert "Attacking" in out and "Written to" in out
    code, out, _ = lipjax_command("train", "--help")
    assert "\n  -q, --quiet: " in out and "\n  --q:" not in out


@pytest.mark.x64_off
def test_predict_says_class_and_proved_radius(lipjax_command, certified, files, tmp_path):  # noqa: F811
    paths, pixels = files
    network = lipjax.FrozenNetwork.load(certified / "frozen")
    classes, radii = network.predict(pixels)
    code, out, err = lipjax_command("predict", certified, *paths)
    assert (code, err) == (0, "") and "Radii are proved" in out
    found = re.findall(r"│ (\S*\.png) +│ (.*?) +│ +(\S+) │", out)
    assert [row[0] for row in found] == [str(path) for path in paths]
    for (_, name, shown), label, radius in zip(found, classes, radii, strict=True):
        assert name == f"class {label}" and radius - 1e-4 < float(shown) <= radius  # never more than what is proved

    network.class_names = ("top", "middle", "a\x1b[31m name")
    network.save(tmp_path / "alone")  # as it is shipped: without a run around it
    code, out, err = lipjax_command("predict", tmp_path / "alone", paths[0])
    assert (code, err) == (0, "") and ("top", "middle", "a\\x1b[31m name")[classes[0]] in out


@pytest.mark.x64_off
def test_images_that_do_not_fit_are_refused(lipjax_command, certified, files, tmp_path):  # noqa: F811
    paths, _ = files
    other = tmp_path / "other.png"
    for image, message in (
        (np.zeros((9, 8), np.uint8), "is (9, 8) (height, width), the network takes (8, 8)"),
        (np.zeros((8, 8, 3), np.uint8), "is RGB, but the network takes"),
    ):
        Image.fromarray(image).save(other)
        code, _, err = lipjax_command("predict", certified, paths[0], other)
        assert code == 2 and f"{other} {message}" in err and err.count("\n") == 1
    other.write_text("no image")
    for file, message in ((other, "is not a readable image"), (tmp_path / "none.png", "No such file")):
        code, _, err = lipjax_command("predict", certified, file)
        assert code == 2 and str(file) in err and message in err
    code, _, err = lipjax_command("predict", tmp_path / "nothing", paths[0])
    assert code == 2 and "holds no training run" in err
    shutil.rmtree(certified / "frozen")
    code, _, err = lipjax_command("predict", certified, paths[0])
    assert code == 2 and "holds no frozen network" in err


@pytest.mark.x64_off
def test_images_are_resized_as_the_run_says(lipjax_command, certified, files, tmp_path):  # noqa: F811
    paths, _ = files
    config = json.loads((certified / "config.json").read_text())
    config["config"]["data"]["image_size"] = 8
    (certified / "config.json").write_text(json.dumps(config))
    Image.open(paths[0]).resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    code, out, err = lipjax_command("predict", certified, tmp_path / "large.png", paths[0])
    assert (code, err) == (0, "")
    names = re.findall(r"│ (class \d) ", out)
    assert len(names) == 2 and names[0] == names[1]


@pytest.mark.x64_off
def test_compare_shows_what_differs_and_what_to_select_by(lipjax_command, certified, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    shutil.copytree(certified, other)
    document = json.loads((other / "config.json").read_text())
    document["config"]["loss"]["epsilon"] = 0.5
    (other / "config.json").write_text(json.dumps(document))
    report = json.loads((other / "report.json").read_text())
    validation = report.pop("validation")  # as an older lipjax wrote it: metrics.jsonl says it
    assert validation == metrics.validation_metrics(other, report["step"]) and 0 < validation["accuracy"] <= 1
    report["certified_accuracy"]["0.25"] = 0.125
    report["float32_certified_accuracy"] = None  # of a network whose float32 error nobody bounds
    (other / "report.json").write_text(json.dumps(report))
    uncertified = tmp_path / "uncertified"
    shutil.copytree(trained(), uncertified)

    code, out, err = lipjax_command("compare", certified, other, uncertified)
    assert (code, err) == (0, "")
    rows = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := re.findall(r"│ +(.*?)(?= +│)", line)) > 1}
    assert rows["loss.epsilon"] == ["0.1411764705882353", "0.5", "0.1411764705882353"]
    assert not any(name.startswith("optimizer") for name in rows)  # what is equal is not shown
    accuracy = f"{100 * validation['accuracy']:.2f} %"
    first = next(line for line in out.splitlines() if line.startswith("│") and "  accuracy" in line)
    assert first.count(accuracy) >= 2  # of validation, in both
    assert rows["proved, at 0.25"][1:] == ["12.50 %", "-"]
    assert rows["proved for float32, too, at 0.25"][0].endswith(" %")
    assert rows["proved for float32, too, at 0.25"][1:] == ["-", "-"]
    table = out[out.index("validation images (select by these)") :]
    assert "test images" in table and "Choose by the rows" in table

    code, out, err = lipjax_command("compare", certified, other, "--write", tmp_path / "both" / "table")
    assert (code, err) == (0, "") and out.count("Written to") == 3  # other epsilons: no curves of one radius
    written = (tmp_path / "both" / "table.md").read_text()
    assert len(written.splitlines()) == 4 and "12.50" in written
    rows = json.loads((tmp_path / "both" / "table.json").read_text())["rows"]
    reported = json.loads((certified / "report.json").read_text())["certified_accuracy"]
    assert [row["proved"] for row in rows] == [[reported["0.1"], reported["0.25"]], [reported["0.1"], 0.125]]
    code, _, err = lipjax_command("compare", certified, uncertified, "--write", tmp_path / "table")
    assert code == 2 and "is not certified, which --write needs" in err

    (other / "report.json").write_text("{")
    code, _, err = lipjax_command("compare", other)
    assert code == 2 and "report.json is damaged" in err
    code, _, err = lipjax_command("compare", tmp_path / "nothing")
    assert code == 2 and "holds no training run" in err


def test_rows_of_reports_that_are_not_as_expected():
    def run(report, **config):
        return compare.ComparedRun("a", pathlib.Path("a"), {"seeds": [0], **config}, 0, report)

    runs = [run({"radii": [0.5], "certified_accuracy": {"0.5": 0.25}}, depth=1), run({}, width=2)]
    found = compare.rows(runs)
    assert found["config"] == [("depth", ["1", "-"]), ("width", ["-", "2"])]
    assert ("proved, at 0.5", ["25.00 %", "-"]) in found["test"]
    for report in ({"radii": 3}, {"radii": [0.1]}, {"radii": [], "certified_accuracy": []}):
        with pytest.raises(lipjax.UserError, match="is damaged"):
            compare.rows([run(report)])


@pytest.mark.parametrize("value", ["-3", "0", "1.5", "many"])
def test_a_number_of_images_to_check_is_positive(lipjax_command, tmp_path, value):  # noqa: F811
    code, _, err = lipjax_command("check", tmp_path, "--images", value)
    assert code == 2
    assert err.endswith(f"lipjax check: error: argument --images: expected a positive number or all, got '{value}'\n")


FULL = """
import resource, signal, sys
import numpy as np
from lipjax.errors import run_command
from lipjax.files import write_arrays, write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as a disk that is full behind so many bytes
"""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("a.json", "write_json(sys.argv[1], {'a': [0.1] * 10**5})"),
        ("a.safetensors", "write_arrays(sys.argv[1], {'a': np.zeros(10**5)})"),
    ],
)
def test_a_full_disk_is_told_with_the_path(tmp_path, name, call):
    assert resource.RLIMIT_FSIZE >= 0 and signal.SIGXFSZ  # else this test cannot work here
    path = tmp_path / name
    command = [sys.executable, "-c", f"{FULL}sys.exit(run_command(lambda: {call}, ''))", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and str(path) in done.stderr and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.x64_off
def test_another_model_by_its_name_alone_trains(train, tmp_path):  # noqa: F811
    """Of the default config's model, only what all models have is left."""
    changes = {"num_epochs": 1, "certify.attack_steps": 1, "certify.num_images": 4}
    arguments = [f"--config={config_file('swapped.py', **changes)}", f"--workdir={tmp_path / 'run'}"]
    arguments.append("--config.model.name=lipconvnet")
    code, _, err = train(*arguments)  # for 32 x 32 images
    assert code == 2 and "config.model does not describe a lipconvnet" in err and "num_blocks" in err
    smaller = ["--config.model.num_blocks=1", "--config.model.depth=1", "--config.model.width=4"]
    code, out, err = train(*arguments, *smaller)
    assert (code, err) == (0, "") and "Training lipconvnet" in out


@pytest.mark.nightly
@pytest.mark.x64_off
def test_own_images_train_by_name(lipjax_command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    images, labels = made_up_images(60)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / ("top", "middle", "bottom")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    quick = [
        "--config.num_epochs=1",
        "--config.certify.attack_steps=1",
        "--config.model.width=4",
        "--config.mesh.data=1",
    ]
    code, out, err = lipjax_command("train", "--config=own_images", "--config.data.path=photos", *quick)
    assert (code, err) == (0, "") and "Training liresnet" in out and "Written to runs/own_images" in out
    code, out, err = lipjax_command("predict", "runs/own_images", "photos/top/0.png", "photos/bottom/2.png")
    assert (code, err) == (0, "") and re.search(r"photos/top/0.png +│ (top|middle|bottom) ", out)
    code, _, err = lipjax_command("train", "--config=own_images", *quick)
    assert code == 2 and "config.data.path must say where your data are" in err
