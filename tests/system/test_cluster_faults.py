"""Clusters of other sizes, restarts with other numbers of processes, and how a cluster ends when one of it does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from cluster_helpers import ROOT, Processes, assert_agree, free_port, keep_until, metrics
from tiers import everyday
from training_helpers import latest_step, quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from lipjax.training.loop import train

# A batch of 24 images is for 1, 2, 3, 4, 6, 8 devices; six steps of it, saved after 2, 4 and 6.
WHOLE = {"mesh.data": -1, "checkpoint.keep": 10, "batch_size": 24, "certify.attack_steps": 1}
LONG = {"num_epochs": 500, "checkpoint.every_epochs": 100, "checkpoint.every_steps": 50, "mesh.data": -1}

# One process leaves in the middle by what is no Exception.
LEAVES = """
import sys
from lipjax import run
if "--process_id={i}" in sys.argv:
    def leave(*_, **__):
        raise {error}
    run.train = leave
"""


@pytest.mark.parametrize(("error", "code", "word"), [("SystemExit('the reason')", 1, "the reason")])
def test_whatever_ends_one_process_ends_the_others(tmp_path, error, code, word):
    preamble = LEAVES.format(i=0, error=error)
    with Processes(tiny_config(**WHOLE), tmp_path / "run", preamble=preamble) as processes:
        start = time.monotonic()
        (first, _, err), (second, _, other_err) = processes.finish()
    assert (first, second) == (code, code) and word in err
    assert f"Error: process 0 stopped with exit code {code}: see its output. Start all processes again" in other_err
    assert time.monotonic() - start < 300  # and not when some barrier of JAX or Orbax gives up


@pytest.mark.nightly
@pytest.mark.x64_off
def test_a_cluster_outlives_the_reader_of_its_output(tmp_path):
    with Processes(tiny_config(**WHOLE), tmp_path / "run") as processes:
        processes.close_output()
        (code, _, err), (other_code, _, other_err) = processes.finish()
    assert (code, other_code) == (0, 0), f"{err}\n{other_err}"
    assert err.count("The standard output cannot be written any more (Broken pipe)") == 1 and other_err == ""
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "certificate.json", "report.json", "frozen"} <= written
    assert latest_step(tmp_path / "run") == 6


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.parametrize("count", [3, 4])
def test_three_and_four_processes_are_one_run(tmp_path, count):
    workdir = tmp_path / "run"
    with Processes(tiny_config(**WHOLE), workdir, count=count, devices=1, slurm=count == 3) as processes:
        found = processes.finish()
    assert [code for code, _, _ in found] == [0] * count, [err for _, _, err in found]
    assert f"{count} x cpu" in found[0][1] and "Written to" in found[0][1]
    assert all(out == "" for _, out, _ in found[1:])
    train(tiny_config(**WHOLE | {"mesh.data": 1}), tmp_path / "one", 0)
    assert_agree(metrics(workdir), metrics(tmp_path / "one"))
    train(tiny_config(**WHOLE | {"mesh.data": 1}), tmp_path / "seed", 1)  # control
    with pytest.raises(AssertionError):
        assert_agree(metrics(workdir), metrics(tmp_path / "seed"))


@pytest.mark.nightly
@pytest.mark.x64_off
def test_a_run_of_two_processes_goes_on_with_one_and_with_four(tmp_path):
    config = tiny_config(**WHOLE)
    with Processes(config, tmp_path / "two") as processes:
        assert [code for code, _, _ in processes.finish()] == [0, 0]
    whole = metrics(tmp_path / "two")
    for count in (1, 4):
        copy = tmp_path / f"on_{count}"
        keep_until(tmp_path / "two", copy, 4)
        with Processes(config, copy, count=count, devices=1) as processes:
            found = processes.finish()
        assert [code for code, _, _ in found] == [0] * count, [err for _, _, err in found]
        assert "from step 4 of 6" in found[0][1]
        assert_agree(metrics(copy), whole)
        assert latest_step(copy) == 6


@pytest.mark.nightly
def test_a_damaged_checkpoint_is_put_aside_by_one_process_of_two(tmp_path):
    config = tiny_config(**WHOLE)
    with Processes(config, tmp_path / "run") as processes:
        assert [code for code, _, _ in processes.finish()] == [0, 0]
    before = metrics(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "6" / "digests.json").write_text("{}")
    with Processes(config, tmp_path / "run") as processes:
        (code, out, err), (other_code, other_out, other_err) = processes.finish()
    assert (code, other_code, other_out) == (0, 0, ""), f"{err}\n{other_err}"
    assert out.count("Checkpoint 6 is damaged") == 1 and "from step 4 of 6" in out
    assert len(list((tmp_path / "run" / "damaged").iterdir())) == 1
    assert_agree(metrics(tmp_path / "run"), before)


@pytest.mark.nightly
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_any_signal_to_one_process_stops_and_saves_all(tmp_path, number, code):
    with Processes(tiny_config(**LONG), tmp_path / "run") as processes:
        processes.wait_for(tmp_path / "run" / "metrics.jsonl", 2)
        processes.processes[1].send_signal(number)
        (first, out, err), (second, _, other_err) = processes.finish()
    assert (first, second) == (75, code), f"{err}\n{other_err}"
    assert f"Stopped by a signal after step {latest_step(tmp_path / 'run')} of 1500" in out


@pytest.mark.nightly
def test_a_signal_while_it_certifies_ends_all(tmp_path):
    preamble = (
        "import time\nfrom lipjax import run\nrun.train = lambda *_, **__: None\n"
        "run.certify_run = lambda workdir, *_: ((workdir / 'begun').touch(), time.sleep(600))\n"
    )
    (tmp_path / "run").mkdir()
    with Processes(tiny_config(**WHOLE), tmp_path / "run", preamble=preamble) as processes:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        processes.processes[0].send_signal(signal.SIGTERM)
        start = time.monotonic()
        (code, out, err), (other_code, _, other_err) = processes.finish()
    assert (code, other_code) == (75, 75), f"{err}\n{other_err}"
    assert "Stopped by SIGTERM. The same command goes on" in out and time.monotonic() - start < 60
    assert "process 0 stopped with exit code 75" in other_err


MEET = """
import sys
from absl import flags
from lipjax.training import cluster
cluster._MEET_SECONDS = 3.0
values = flags.FlagValues()
cluster.define_flags(values)
values(["train.py", f"--coordinator=127.0.0.1:{sys.argv[1]}", "--num_processes=2", f"--process_id={sys.argv[2]}"])
sys.exit(cluster.launch(lambda: print("met"), "interrupted", values))
"""


@pytest.mark.parametrize(
    "who",
    everyday(["nobody joins process 0", "nobody is process 0", "a stranger is process 0"], "a stranger is process 0"),
)
def test_processes_that_do_not_meet_end_in_bounded_time_with_a_message(who):
    number = "0" if "joins" in who else "1"
    with contextlib.ExitStack() as stack:
        port = free_port()
        if "stranger" in who:  # who listens, but knows nothing of lipjax
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        command = [sys.executable, "-c", MEET, str(port), number]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        start = time.monotonic()
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        seconds = time.monotonic() - start
    assert found.returncode == 2 and found.stdout == "" and seconds < 60  # most of it imports
    if number == "0" or "stranger" in who:
        message = (
            f"Error: the processes of this run did not meet at 127.0.0.1:{port} within 3 s. See that all are started"
        )
    else:
        message = f"Error: --coordinator=127.0.0.1:{port}: there was no process 0 for 3 s"
    lines = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and lines[0].startswith(message), json.dumps(found.stderr)
    assert "Traceback" not in found.stderr and "Check failure stack trace" not in found.stderr
