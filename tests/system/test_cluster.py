"""Several processes as one run: the numbers of one, its files written once, an end of all with each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from absl import flags
from cluster_helpers import (
    ROOT,
    SLURM,
    WAIT,
    Processes,
    assert_agree,
    keep_until,
    launch,
    metrics,
)
from tiers import everyday
from training_helpers import (  # noqa: F401  quick_compiles is a fixture
    differing,
    final_state,
    interrupt_at,
    latest_step,
    quick_compiles,
    signal_in,
    tiny_config,
    trained,
)

from lipjax.errors import UserError
from lipjax.training import cluster, lock, stopping
from lipjax.training.loop import train

# Nine steps of 16 images, saved after 2, 3, 4, 6, 8 and 9, all of which stay.
WHOLE = {"mesh.data": -1, "checkpoint.keep": 10, "certify.attack_steps": 0}


# 1500 steps, to be stopped in; the neck's 16384 entries are enough to be stored in parts.
LONG = {"num_epochs": 500, "checkpoint.every_epochs": 100, "checkpoint.every_steps": 50, "model.neck_features": 256}


@pytest.mark.parametrize("meshes", [(1,), pytest.param((1, 4, 8), marks=pytest.mark.nightly)], ids=str)
@pytest.mark.x64_off
def test_two_processes_of_two_devices_are_one_run(tmp_path, meshes):
    with Processes(tiny_config(**WHOLE), tmp_path / "two") as processes:
        (code, out, err), (other_code, other_out, other_err) = processes.finish()
    assert (code, other_code) == (0, 0), f"{err}\n{other_err}"
    assert "4 x cpu" in out and "epoch 3/3" in out and "Written to" in out and other_out == ""
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "certificate.json", "report.json", "frozen"} <= written
    assert lock.LOCK not in written and len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    found = metrics(tmp_path / "two")
    assert_agree(found, metrics(trained()))  # of one process with one device
    for devices in meshes[1:]:
        train(tiny_config(**{"mesh.data": devices}), tmp_path / str(devices), 0)
        assert_agree(found, metrics(tmp_path / str(devices)))
    train(tiny_config(), tmp_path / "seed", 1)  # control
    with pytest.raises(AssertionError):
        assert_agree(found, metrics(tmp_path / "seed"))
    # What two processes saved in the middle of an epoch goes on in one.
    for devices in meshes:
        copy = tmp_path / f"on_{devices}"
        keep_until(tmp_path / "two", copy, 4)
        train(tiny_config(**WHOLE | {"mesh.data": devices}), copy, 0)
        assert metrics(copy)[:2] == found[:2]
        assert_agree(metrics(copy), found)
        assert latest_step(copy) == 9


@pytest.mark.nightly
@pytest.mark.x64_off
def test_eight_devices_go_on_as_two_processes_until_one_gets_sigterm(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 60)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(**LONG, **{"mesh.data": 8}), workdir, 0)
    assert latest_step(workdir) == 50
    (workdir / "metrics.jsonl").rename(tmp_path / "until_60.jsonl")
    with Processes(tiny_config(**LONG, **{"mesh.data": -1, "mesh.model": 2}), workdir) as processes:
        processes.wait_for(workdir / "metrics.jsonl", 5)
        processes.processes[1].send_signal(signal.SIGTERM)
        (code, out, err), (other_code, other_out, other_err) = processes.finish()
    assert (code, other_code, other_out) == (75, 75, ""), f"{err}\n{other_err}"
    assert "Resuming" in out and "from step 50 of 1500" in out and "Certifying" not in out
    step = latest_step(workdir)
    assert 50 < step < 1500 and f"Stopped by a signal after step {step} of 1500" in out
    assert not (workdir / "certificate.json").exists()
    # The first epochs after 50 are those of one process; later ones drift apart, as errors grow in training.
    before = [json.loads(line) for line in (tmp_path / "until_60.jsonl").read_text().splitlines()]
    common = [line for line in metrics(workdir) if line["step"] <= 60]
    assert [line["step"] for line in common] == [51, 54, 57, 60]
    assert_agree(common, before[-4:])
    # The neck was stored in two parts; one device takes it whole.
    config = tiny_config(**LONG)
    assert int(final_state(workdir, config).step) == step
    interrupt_at(monkeypatch, step + 1)
    with pytest.raises(KeyboardInterrupt):
        train(config, workdir, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_a_message(tmp_path, victim):
    with Processes(tiny_config(**LONG, **{"mesh.data": -1}), tmp_path / "run") as processes:
        processes.wait_for(tmp_path / "run" / "metrics.jsonl", 1)
        killed, survivor = processes.processes[victim], processes.processes[1 - victim]
        killed.kill()
        start = time.monotonic()
        _, err = survivor.communicate(timeout=WAIT)
        seconds = time.monotonic() - start
    # Ours, if a collective fails first; else that of JAX's coordination service, which aborts.
    assert survivor.returncode in (1, -signal.SIGABRT)
    assert "another one died" in err or "another task died" in err
    assert seconds < 2 * cluster.HEARTBEAT_SECONDS  # the heartbeat, and what a loaded machine adds


def test_processes_that_were_started_differently_say_so(tmp_path):
    second = ["--config.optimizer.learning_rate=0.5"]
    with Processes(tiny_config(**WHOLE), tmp_path / "run", second=second, slurm=True) as processes:
        for i, (code, out, err) in enumerate(processes.finish()):
            message = f"Error: process {i} of 2: the processes of a run must be started alike, but config.optimizer"
            assert code == 2 and out == "" and f"{message} (in process 1) differ from process 0" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_an_error_in_one_process_ends_the_others_with_a_word(tmp_path):
    with lock.exclusive(tmp_path / "run"):  # which only process 0 looks at, while process 1 waits for it
        with Processes(tiny_config(**WHOLE), tmp_path / "run") as processes:
            (code, out, err), (other_code, other_out, other_err) = processes.finish()
    assert (code, out, other_code, other_out) == (2, "", 2, "")
    assert f"Error: process 0 of 2: {tmp_path / 'run'} is in use by another training (process {os.getpid()} on" in err
    assert "Error: process 0 stopped with exit code 2: see its output. Start all processes again" in other_err


# In the middle of an epoch; at the end of one that neither validates nor saves; in the last step.
@pytest.mark.parametrize(
    ("step", "changes"),
    everyday([(4, {}), (2, {"checkpoint.every_epochs": 3}), (8, {})], (2, {"checkpoint.every_epochs": 3})),
)
@pytest.mark.x64_off
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, step, changes):
    config = tiny_config(**changes)
    with monkeypatch.context() as patch:
        signal_in(patch, step, signal.SIGTERM)
        assert launch(config, tmp_path) == os.EX_TEMPFAIL
    out = capsys.readouterr().out
    assert f"Stopped by SIGTERM after step {step + 1} of 9" in out and "The same command goes on" in out
    assert "Certifying" not in out and not (tmp_path / "certificate.json").exists()
    assert latest_step(tmp_path) == step + 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config, tmp_path, 0)
    if not changes:
        assert metrics(tmp_path) == metrics(trained())
    assert differing(final_state(tmp_path, config), final_state(trained(), config)) == []


HOLDER = """
import pathlib, sys
from lipjax.training import lock
with lock.exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_directory_is_for_one_run_at_a_time(tmp_path):
    directory = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=f"in use by another training .process {process.pid} on .*another --workdir"
        ):
            with lock.exclusive(directory):
                pass
        process.kill()  # what it held is free
    with lock.exclusive(directory):
        assert (directory / lock.LOCK).exists()
        (directory / "something").touch()
    assert [path.name for path in directory.iterdir()] == ["something"]
    with pytest.raises(UserError), lock.exclusive(tmp_path / "new" / "run"):
        raise UserError("of the config")
    assert not (tmp_path / "new" / "run").exists()


MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}


ALONE, FOUND = None, {}


@pytest.mark.parametrize(
    ("environment", "coordinator", "expected"),
    [
        ({}, None, ALONE),
        ({}, "none", ALONE),
        ({}, "auto", FOUND),
        (SLURM, None, FOUND),
        (SLURM, "none", ALONE),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None, ALONE),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None, ALONE),  # a shell in an allocation
        (MPI, None, FOUND),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None, ALONE),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, FOUND),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, ALONE),
    ],
)
def test_which_environments_mean_several_processes(monkeypatch, environment, coordinator, expected):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.initialize_arguments(coordinator, None, None) == expected


def test_sigterm_is_heeded_in_runs_that_resume_and_between_seeds(monkeypatch):
    service = {"last": 0, "stops_at": None}

    def sync_point(call):  # as JAX decides: the call after the latest one when the signal comes
        service["last"] = call
        return call == service["stops_at"]

    def signalled():
        service["stops_at"] = service["last"] + 1

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(stopping.multihost_utils, "reached_preemption_sync_point", sync_point)
    with stopping.preemption(cluster.leave) as preempted:
        assert not any(map(preempted, range(1, 5)))
    signalled()  # while the first seed is certified
    with stopping.preemption(cluster.leave) as preempted:
        assert preempted(501)  # the first step of the next one, which resumes
        assert preempted(502)
    service["stops_at"] = None
    with stopping.preemption(cluster.leave) as preempted:
        assert not preempted(1)  # control
        signalled()  # in the validation after the last step
        assert preempted(1)


def test_too_little_memory_is_advice_in_a_single_process_too(capsys):
    def fail(message):
        raise jax.errors.JaxRuntimeError(message)

    values = flags.FlagValues()
    cluster.define_flags(values)
    values(["test"])
    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
    assert cluster.launch(lambda: fail(message), "again", values) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and "config.accumulation, remat, precision and batch_size" in err
    with pytest.raises(jax.errors.JaxRuntimeError):  # control
        cluster.launch(lambda: fail("INTERNAL: x"), "again", values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", None, 0), "--coordinator=localhost:1234 needs --num_processes too"),
        (("localhost:1234", None, None), "needs --num_processes and --process_id too"),
        ((None, 2, 0), "--num_processes and --process_id need --coordinator=HOST:PORT"),
        (("auto", 2, None), "--num_processes need --coordinator"),
        (("localhost", 2, 0), "--coordinator: expected HOST:PORT, 'auto' or 'none', got 'localhost'"),
        (("localhost:99999", 2, 0), "expected HOST:PORT"),
        (("localhost:1234", 0, 0), "--num_processes: expected at least 1, got 0"),
        (("localhost:1234", 2, 2), "--process_id: expected 0 to 1, got 2"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, message):
    with pytest.raises(UserError, match=message):
        cluster.initialize_arguments(*arguments)


def test_flags_for_a_cluster_where_there_is_none(monkeypatch):
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="does not tell where the first one is"):
        cluster.initialize_arguments(None, None, None)
    good = {"coordinator_address": "[::1]:1234", "num_processes": 2, "process_id": 1}
    assert cluster.initialize_arguments("[::1]:1234", 2, 1) == good | {"cluster_detection_method": "deactivate"}


def test_an_address_where_processes_cannot_meet(monkeypatch):
    monkeypatch.setattr(cluster, "_MEET_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{address}: process 0 cannot listen there .*another port"):
            cluster.join(address, 2, 0)
    with pytest.raises(UserError, match=f"{address}: there was no process 0 for 0 s .*correct the address"):
        cluster.join(address, 2, 1)


def test_a_pod_that_nobody_announced_is_noticed(monkeypatch):
    cluster.check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one of 4 processes .* add --coordinator=auto"):
        cluster.check_joined()
