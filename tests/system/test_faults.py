"""Broken surroundings: no space, no permission, a clock that jumps, bad bytes, a locale of ASCII. One sentence each."""

import errno
import io
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from cluster_helpers import CONFIG, ROOT, launch
from rich.console import Console
from training_helpers import quick_compiles, tiny_config, trained  # noqa: F401  quick_compiles is a fixture

from lipjax import files, run
from lipjax.errors import UserError, run_command
from lipjax.training import lock
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.loop import train
from lipjax.training.metrics import FILE_NAME, MetricWriter
from lipjax.training.same_run import plain

STATE = {"w": jnp.ones((64, 64)), "v": jnp.ones((8,)), "step": jnp.int32(1)}


# What a process may not write is limited to 2 kB a file, as by a quota; Python and TensorStore get EFBIG then.
FULL = """
import logging, resource, signal, sys
import jax.numpy as jnp
from absl import logging as absl_logging
from lipjax.errors import run_command
from lipjax.training.checkpoint import Checkpointer
absl_logging.use_absl_handler()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {str(i): jnp.ones((64, 64)) * i for i in range(30)}
def command():
    with Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        checkpointer.save(2, state, {})
sys.exit(run_command(command, ""))
"""


def test_a_save_that_fails_is_one_line(tmp_path):
    directory = tmp_path / "checkpoints"
    found = subprocess.run(
        [sys.executable, "-c", FULL, str(directory)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    lines = found.stderr.splitlines()
    assert found.returncode == 2 and len(lines) == 1, found.stderr
    assert lines[0].startswith(f"Error: checkpoint {directory} could not be saved: ")
    assert "the last good step is 1 and is kept" in lines[0]
    with Checkpointer(directory, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 1


def test_other_errors_of_threads_are_still_shown(capsys):
    """Control of the filters: they know Orbax's errors from those of others."""
    try:
        raise RuntimeError("Event loop is closed")
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    assert "RuntimeError: Event loop is closed" in capsys.readouterr().err
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    keep, logger = Keep(), logging.getLogger("asyncio")
    logger.addHandler(keep)
    try:
        logger.error("Task exception was never retrieved: mine")
        logger.error(f"Task exception was never retrieved: {os.sep}orbax{os.sep}x.py")
    finally:
        logger.removeHandler(keep)
    assert records == ["Task exception was never retrieved: mine"]


@pytest.mark.parametrize("jump", [86400.0, -86400.0])
def test_a_clock_that_jumps_by_a_day_fails_no_save(tmp_path, monkeypatch, jump):
    """At each 4th of the first moments at which the clock is read in a save, by whomever."""
    original, reads, at = time.time, [0], [0]

    def jumping():
        reads[0] += 1
        return original() + (jump if reads[0] > at[0] else 0.0)

    monkeypatch.setattr(time, "time", jumping)
    for number in range(12):
        with Checkpointer(tmp_path / str(number)) as checkpointer:
            at[0] = reads[0] + 4 * number
            assert checkpointer.save(1, STATE, {})
            checkpointer.wait()
            assert checkpointer.latest_step() == 1
        assert reads[0] > at[0]  # control: it did jump


def test_a_damaged_line_of_metrics_is_left_out_and_kept_elsewhere(tmp_path):
    lines = [json.dumps({"step": step, "split": "train", "loss": 0.5}).encode() + b"\n" for step in (1, 2, 3)]
    damaged = lines[0] + lines[1].replace(b"loss", b"lo\xffs") + b"\x00" * 8 + b"\n" + lines[2] + b'{"step": 4, "sp'
    (tmp_path / FILE_NAME).write_bytes(damaged)
    output = io.StringIO()
    with MetricWriter(tmp_path, resume_step=3, console=Console(file=output, width=1000)) as writer:
        writer.write(4, {"loss": 0.25})
    assert [json.loads(line)["step"] for line in (tmp_path / FILE_NAME).read_text().splitlines()] == [1, 3, 4]
    (copy,) = (tmp_path / "damaged").iterdir()
    assert copy.read_bytes() == damaged and copy.name.startswith(f"{FILE_NAME}-20")
    said = output.getvalue()
    assert f"{FILE_NAME} is damaged in line 2, 3, left out from here on; the whole file is kept as {copy}." in said
    # Control: a last line that is half written is what a killed process leaves, and is no damage.
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"step": 5, "sp')
    with MetricWriter(tmp_path, resume_step=4, console=Console(file=output, width=1000)):
        pass
    assert output.getvalue() == said and len(list((tmp_path / "damaged").iterdir())) == 1


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_a_file_in_the_place_of_the_directory(tmp_path, capsys, inside):
    (tmp_path / "file").write_text("mine")
    assert launch(tiny_config(), tmp_path / "file" / inside) == 2
    assert capsys.readouterr().err == (
        f"Error: --workdir: {tmp_path / 'file' / inside} is, or lies in, a file: choose a directory.\n"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_no_space_for_the_lock_names_its_path(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'run' / lock.LOCK} .No space left on device"):
        with lock.exclusive(tmp_path / "run"):
            pass


def test_no_space_for_a_file_names_its_path(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run_command(lambda: files.write_json(tmp_path / "report.json", {}), "") == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and str(tmp_path / "report.json") in err and err.count("\n") == 1


@pytest.fixture
def read_only(monkeypatch):
    """A function that makes a directory one of a read-only file system, also for root."""

    def make(directory):
        def guard(module, name, writes):
            original = getattr(module, name)

            def guarded(path, *arguments, **options):
                inside = isinstance(path, (str, os.PathLike)) and str(path).startswith(str(directory))
                if inside and writes(*arguments, **options):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                return original(path, *arguments, **options)

            monkeypatch.setattr(module, name, guarded)

        guard(io, "open", lambda mode="r", *_, **__: set(mode) & set("wax+"))
        guard(os, "open", lambda flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        for name in ("unlink", "rmdir", "rename", "replace"):
            guard(os, name, lambda *_, **__: True)
        original = os.mkdir

        def mkdir(path, *arguments, **options):
            if str(path).startswith(str(directory)) and not os.path.exists(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, "mkdir", mkdir)
        with pytest.raises(OSError, match="Read-only"):  # control
            (pathlib.Path(directory) / "new").write_text("x")

    return make


REPORT = {"clean_accuracy": 0.5, "certified_accuracy": {"0.1": 0.25}}


@pytest.mark.x64_off
def test_a_read_only_run_says_what_it_is(tmp_path, monkeypatch, read_only, capsys):
    finished, uncertified, half = (
        shutil.copytree(trained(), tmp_path / name) for name in ("finished", "uncertified", "half")
    )
    (finished / "report.json").write_text(json.dumps(REPORT))
    shutil.rmtree(half / "checkpoints" / "9")
    monkeypatch.setattr(run.reports, "print_table", lambda report, console: console.print(report["clean_accuracy"]))
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    read_only(tmp_path)
    capsys.readouterr()
    assert launch(tiny_config(), finished) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [
        f"{finished} is trained already, to step 9 of 9.",
        "0.5",
        f"{finished} cannot be written: its certificate and reports are left as they are.",
    ]
    for directory, message in (
        (uncertified, f"{uncertified} is not certified, and cannot be written: copy it to where it can.\n"),
        (half, f"{half} cannot be written, and holds step 8 of 9: make it writable, or copy it to where it can be "),
        (tmp_path / "new", f"cannot write {tmp_path / 'new' / '.lock'} (Read-only file system)"),
    ):
        assert launch(tiny_config(), directory) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"Error: {message}") and err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_a_directory_that_the_locale_cannot_name(tmp_path, capsys):
    name = os.fsencode("läufe").decode("ascii", "surrogateescape")  # as Python reads it in a locale of ASCII
    assert launch(tiny_config(), tmp_path / name) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"Error: --workdir: {tmp_path / 'l??ufe'} has letters") and err.count("\n") == 1
    assert "PYTHONUTF8=1" in err and list(tmp_path.iterdir()) == []


@pytest.mark.nightly  # compiles in a process of its own
def test_a_locale_of_ascii_changes_nothing(tmp_path):
    (tmp_path / "config").mkdir()
    saved = json.dumps({"config": plain(tiny_config(seeds=(0, 1))), "seed": 0})
    (tmp_path / "config" / "config.json").write_text(saved)
    (tmp_path / "run.py").write_text("# ±\n" + CONFIG.format(directory=str(tmp_path / "config")), encoding="utf-8")
    command = [sys.executable, "train.py", f"--config={tmp_path / 'run.py'}", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=1200)
    assert (found.returncode, found.stderr) == (0, b"") and b"2 runs" in found.stdout and b" ? " in found.stdout
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.x64_off
def test_training_into_a_damaged_record_goes_on(tmp_path, capsys):
    """All together, in a training: a bad byte in the metrics and a damaged checkpoint."""
    shutil.copytree(trained(), tmp_path / "run")
    metrics = tmp_path / "run" / FILE_NAME
    metrics.write_bytes(metrics.read_bytes().replace(b"loss", b"lo\xfe\xff", 1))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9" / "state")
    train(tiny_config(), tmp_path / "run", 0)
    said = capsys.readouterr().out
    assert "Checkpoint 9 is damaged" in said and f"{FILE_NAME} is damaged in line 1" in said
    assert "epoch 3/3" in said and len(metrics.read_text().splitlines()) == 5
