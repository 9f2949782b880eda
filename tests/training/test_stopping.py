"""Signals: each that asks a run to stop makes it save first and end with an exit code of its own."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from absl import flags
from cluster_helpers import ROOT
from tiers import everyday
from training_helpers import (  # noqa: F401  quick_compiles is a fixture
    differing,
    final_state,
    latest_step,
    quick_compiles,
    signal_in,
    tiny_config,
    trained,
)

from lipjax import run
from lipjax.training import cluster, stopping
from lipjax.training.loop import train

REQUESTS = ("SIGTERM", "SIGHUP", "SIGUSR1")


@pytest.fixture(autouse=True)
def _as_a_terminal_starts_a_process():
    """These tests may themselves run under nohup or behind an `&`, and would then start with signals ignored."""
    handlers = dict.fromkeys((getattr(signal, name) for name in REQUESTS), signal.SIG_DFL)
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def launch(command):
    values = flags.FlagValues()
    cluster.define_flags(values)
    values(["train.py"])
    return cluster.launch(command, "interrupted", values)


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize(
    ("number", "name", "code"),
    everyday(
        [(signal.SIGHUP, "SIGHUP", 75), (signal.SIGUSR1, "SIGUSR1", 75), (signal.SIGINT, "Ctrl-C", 130)],
        (signal.SIGINT, "Ctrl-C", 130),
    ),
)
@pytest.mark.x64_off
def test_a_training_saves_before_it_stops(tmp_path, monkeypatch, capfd, number, name, code):
    config = tiny_config()
    before = [signal.getsignal(n) for n in (*stopping.REQUESTS, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signal_in(patch, 4, number)
        assert launch(lambda: run.run(config, tmp_path)) == code
    out, err = capfd.readouterr()
    assert f"Stopped by {name} after step 5 of 9, which is saved in {tmp_path / 'checkpoints'}. The same command" in out
    note = "Ctrl-C: the run stops after this step and saves it. Ctrl-C again stops at once.\n"
    assert err == (note if number == signal.SIGINT else "")
    assert latest_step(tmp_path) == 5 and not (tmp_path / "certificate.json").exists()
    assert [signal.getsignal(n) for n in (*stopping.REQUESTS, signal.SIGINT)] == before
    train(config, tmp_path, 0)
    assert differing(final_state(tmp_path, config), final_state(trained(), config)) == []


@pytest.mark.parametrize("name", REQUESTS)
def test_where_there_is_nothing_to_save_a_request_ends_the_command(capsys, name):
    def command():
        try:
            send(name)
            signal.pause()
        except Exception:  # whatever is going on does not take it for an error of its own
            pytest.fail("a request to stop is no Exception")

    assert launch(command) == os.EX_TEMPFAIL == 75
    assert f"Stopped by {name}. The same command goes on from the last checkpoint" in capsys.readouterr().out


@pytest.mark.x64_off
def test_a_certifying_run_ends_with_work_left(tmp_path, monkeypatch, capsys):
    shutil.copytree(trained(), tmp_path / "run")
    monkeypatch.setattr(run, "certify_run", lambda *_: send("SIGTERM"))
    assert launch(lambda: run.run(tiny_config(), tmp_path / "run")) == 75
    assert "is trained already" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*REQUESTS, "SIGINT"])
def test_what_a_process_was_started_to_ignore_stays_ignored(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does, and a script's `&`
    try:
        with stopping.outside_training(), stopping.preemption(pytest.fail) as stop:
            assert signal.getsignal(number) == signal.SIG_IGN
            send(name)
            assert not stop(1)
            other = "SIGHUP" if name != "SIGHUP" else "SIGTERM"
            send(other)
            assert stop(2) and stop.by == other  # control
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_request_after_the_last_question_counts_for_what_follows():
    with stopping.outside_training():
        with pytest.raises(stopping.Preempted, match="SIGUSR1"), stopping.preemption(pytest.fail) as stop:
            assert not stop(1)
            send("SIGUSR1")
        with stopping.preemption(pytest.fail) as stop:  # control: it was asked for
            send("SIGUSR1")
            assert stop(1)
    with pytest.raises(KeyboardInterrupt), stopping.preemption(pytest.fail) as stop:
        send("SIGINT")


def test_several_processes_hand_all_requests_to_jax(monkeypatch):
    """Its service listens for SIGTERM and agrees on a step."""
    handed = []
    before = signal.signal(signal.SIGTERM, lambda *_: handed.append("SIGTERM"))
    try:
        monkeypatch.setattr(stopping.jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(stopping.multihost_utils, "reached_preemption_sync_point", lambda call: len(handed) > 2)
        with stopping.preemption(pytest.fail) as stop:
            for name in ("SIGHUP", "SIGUSR1", "SIGTERM"):
                assert not stop(1)
                send(name)
            assert stop(1) and handed == ["SIGTERM"] * 3 and stop.code == 75
            send("SIGINT")
            assert stop.code == 130 and len(handed) == 4
        with stopping.preemption(pytest.fail) as stop:
            assert stop(1) and stop.by == "a signal"  # which another process got
    finally:
        signal.signal(signal.SIGTERM, before)


TWICE = """
import os, signal, sys, time
from lipjax.training import cluster, stopping
with stopping.preemption(cluster.leave) as stop:
    for _ in range(int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGINT)
    print("asked", stop(1), flush=True)
try:
    sys.exit(stop.code)
finally:
    print("in an orderly way", flush=True)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_the_second_ctrl_c_stops_at_once(times):
    command = [sys.executable, "-c", TWICE, str(times)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 130
    assert found.stdout == ("asked True\nin an orderly way\n" if times == 1 else "")
    assert found.stderr.count("Ctrl-C: the run stops after this step") == 1
    assert found.stderr.count("Stopped at once. The same command goes on from the last checkpoint.") == times - 1
