"""The commands: what they print, write and return, for good input and bad."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from training_helpers import npz_file, quick_compiles, scratch, tiny_config, trained  # noqa: F401

from lipjax import __main__ as program
from lipjax import attacks, certify, command, run
from lipjax.evaluation import evaluate
from lipjax.training.same_run import plain

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
import json
from lipjax.training.config import default_config

def get_config():
    config = default_config()
    values = json.loads('''{values}''')
    config.update({{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if not isinstance(v, dict)}})
    for group in (k for k, v in values.items() if isinstance(v, dict)):
        config[group].update({{k: tuple(v) if isinstance(v, list) else v for k, v in values[group].items()}})
    return config.lock()
"""


def config_file(name="tiny.py", **changes):
    path = scratch() / name
    path.write_text(CONFIG.format(values=json.dumps(plain(tiny_config(**changes)))))
    return path


@pytest.fixture
def train(capsys):
    """Runs train.py with arguments, in this process. Returns the exit code and what it printed."""

    def call(*arguments):
        code = command.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def lipjax_command(capsys):
    """Runs python -m lipjax with arguments, in this process."""

    def call(*arguments):
        try:
            code = program.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def workdir(tmp_path):
    shutil.copytree(trained(), tmp_path / "run")
    return tmp_path / "run"


def radii(directory):
    return [row["radius"] for row in json.loads((directory / "certificate.json").read_text())["images"]]


@pytest.mark.nightly
@pytest.mark.x64_off
def test_several_seeds_and_certify_again(train, lipjax_command, tmp_path):
    config = config_file(seeds=(0, 1), **{"certify.attack_steps": 0})
    code, out, err = train(f"--config={config}", f"--workdir={tmp_path}")
    assert (code, err) == (0, "")
    assert "seed 0: 3 epochs" in out and "seed 1: 3 epochs" in out and "2 runs" in out and "±" in out
    report = json.loads((tmp_path / "report.json").read_text())
    singles = [json.loads((tmp_path / f"seed_{seed}" / "report.json").read_text()) for seed in (0, 1)]
    clean = [single["clean_accuracy"] for single in singles]
    assert report["runs"] == singles and report["seeds"] == [0, 1]
    assert report["summary"]["clean_accuracy"] == {
        "mean": pytest.approx(np.mean(clean)),
        "sd": pytest.approx(np.std(clean, ddof=1)),
    }
    first = [radii(tmp_path / f"seed_{seed}") for seed in (0, 1)]
    assert first[0] != first[1] and max(first[0]) > 0

    (tmp_path / "report.json").unlink()
    code, out, err = lipjax_command("certify", tmp_path)
    assert (code, err) == (0, "")
    assert [radii(tmp_path / f"seed_{seed}") for seed in (0, 1)] == first
    again = json.loads((tmp_path / "report.json").read_text())
    assert again == report

    code, _, err = train(f"--config={config_file()}", f"--workdir={tmp_path}")
    assert code == 2 and "holds runs of several seeds, but config.seeds asks for one seed" in err


@pytest.mark.x64_off
def test_certify_takes_other_images_and_another_data_dir(lipjax_command, workdir):
    before = json.loads((workdir / "config.json").read_text())
    code, out, _ = lipjax_command("certify", workdir, "--num_images", 4, "--data_dir", "/elsewhere")
    assert code == 0 and "Accuracy on 4 of 15 test images" in out and len(radii(workdir)) == 4
    assert json.loads((workdir / "config.json").read_text()) == before
    code, _, err = lipjax_command("certify", workdir, "--num_images", -4)
    assert code == 2 and "config.certify.num_images" in err


BAD_FLAGS = {
    "unknown field": (["--config.optimizer.learning_rat=0.1"], "no such config field"),
    "unknown group": (["--config.optimiser.learning_rate=0.1"], "no such config field"),
    "value of another type": (["--config.batch_size=many"], "batch_size"),
    "value out of range": (
        ["--config.optimizer.learning_rate=-1"],
        "config.optimizer.learning_rate: expected positive",
    ),
    "unknown loss": (
        ["--config.loss.name=hinge"],
        "config.loss.name: expected one of ['certificate_regularization', 'cll', 'crm', 'crm_max', 'cross_entropy'",
    ),
    "unknown model": (
        ["--config.model.name=resnet"],
        "config.model.name: expected one of ['bronet', 'compared', 'concatnet', 'convnet'",
    ),
    "odd channels": (["--config.model.width=5"], "even width"),
    "not over the mesh": (["--config.mesh.data=8", "--config.batch_size=12"], "does not divide over 8 devices"),
    "missing data set": (["--config.data.name=cifar10", "--config.data.path="], "is not prepared"),
    "missing file": (["--config.data.path=/nowhere/data.npz"], "there is no file"),
    "stray argument": (["optimizer.learning_rate=0.1"], "fields are set as --config.field=value"),
    "unknown flag": (["--wrkdir=x"], "wrkdir"),
}


@pytest.mark.x64_off
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_arguments_end_with_one_message_and_code_2(train, tmp_path, case):
    arguments, message = BAD_FLAGS[case]
    extra = [f"--config.data.data_dir={tmp_path / 'data'}"]
    code, out, err = train(f"--config={config_file()}", f"--workdir={tmp_path / 'run'}", *extra, *arguments)
    assert code == 2 and message in err and err.startswith("Error: ") and err.count("Error: ") == 1
    assert "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Error: "),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def get_config(:", "SyntaxError"),
        (
            "from lipjax.training.config import default_config\n"
            "def get_config():\n  config = default_config().lock()\n  config.los = 1",
            "los",
        ),
    ],
)
def test_a_bad_config_file_ends_with_one_message(train, tmp_path, text, message):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    code, _, err = train(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and message in err and not (tmp_path / "run").exists()


@pytest.mark.x64_off
def test_bad_directories_are_refused_and_left_alone(train, lipjax_command, workdir, tmp_path):
    arguments = [f"--config={config_file()}", f"--workdir={workdir}"]
    code, _, err = train(*arguments, "--config.loss.epsilon=0.5")
    assert code == 2 and "config.loss.epsilon: 0.1411" in err and "0.5 now" in err

    code, _, err = train(*arguments, "--config.seeds=(0,1)")
    assert code == 2 and "holds one run, but config.seeds asks for several seeds" in err

    checkpoints = workdir / "checkpoints"
    largest = max((checkpoints / "9").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    code, _, err = lipjax_command("certify", workdir)  # which changes no checkpoint; training does (test_damage.py)
    assert code == 2 and "is damaged" in err and "remove that directory to go on from step" in err
    for other in checkpoints.iterdir():
        if other.name != "9":
            shutil.rmtree(other)
    code, _, err = train(*arguments)
    assert code == 2 and "is damaged" in err and "no other good one" in err
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()
    (checkpoints / "model.pt").write_text("foreign")
    code, _, err = train(*arguments)
    assert code == 2 and "not a checkpoint directory of lipjax" in err
    assert (checkpoints / "model.pt").read_text() == "foreign"
    code, _, err = lipjax_command("certify", tmp_path / "nothing")
    assert code == 2 and "holds no training run" in err
    code, _, err = lipjax_command("certify")
    assert code == 2 and "workdir" in err


@pytest.mark.x64_off
def test_a_full_disk_ends_with_one_message(train, workdir, monkeypatch):
    def full(path, document):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    before = sorted(p for p in workdir.rglob("*") if p.is_file())
    monkeypatch.setattr(evaluate, "write_json", full)
    code, _, err = train(f"--config={config_file()}", f"--workdir={workdir}")
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    assert set(before) <= {p for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.x64_off
def test_a_false_certificate_is_no_mistake_of_the_user(lipjax_command, workdir, monkeypatch):
    monkeypatch.setattr(attacks, "attack_l2", refuting)
    monkeypatch.setattr(evaluate.lipjax.FrozenNetwork, "certify", lambda s, x, b=256: inflated(honest(s, x, b)))
    code, _, err = lipjax_command("certify", workdir)
    assert code == 1 and err.startswith("Error: A certificate is false") and "Traceback" not in err
    assert (workdir / "counterexample.npz").exists()


honest, attack = evaluate.lipjax.FrozenNetwork.certify, attacks.attack_l2


def inflated(certificate):
    return certify.Certificate(certificate.predictions, certificate.rivals, certificate.margins, certificate.radii + 99)


def refuting(network, images, labels, radii, **options):
    return attack(network, images, labels, (3.0,), **options)


@pytest.mark.x64_off
def test_an_interrupt_says_that_the_run_can_go_on(train, lipjax_command, workdir, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    code, _, err = train(f"--config={config_file()}", f"--workdir={workdir}")
    assert code == 130 and err == "Interrupted. The same command goes on from the last checkpoint.\n"
    monkeypatch.setattr(evaluate, "load_best", interrupted)
    assert lipjax_command("certify", workdir)[0] == 130


def test_the_real_commands(tmp_path):
    """In new processes: nothing but our own lines, and the same certificate from `python -m lipjax certify`."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(scratch() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    environment.pop("JAX_PLATFORMS", None)  # as for a user: JAX looks for accelerators, and must not speak of it

    def call(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    path = npz_file()
    assert path.exists() and jax.config.read("jax_enable_x64")
    config = config_file("plain.py", **{"certify.attack_steps": 0})
    done = call("train.py", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Training liresnet with ") and lines[2].startswith("epoch 1/3  loss ")
    assert lines[1].startswith("Compiling the training step ... ") and lines[1].endswith(" s")
    assert "INFO" not in done.stdout and f"Written to {tmp_path / 'run'}" in lines[-1]
    first = radii(tmp_path / "run")
    done = call("-m", "lipjax", "certify", tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert radii(tmp_path / "run") == first and len(first) == 15
    done = call("train.py", "--config.no_such_field=1", f"--workdir={tmp_path / 'none'}")
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and not (tmp_path / "none").exists()
