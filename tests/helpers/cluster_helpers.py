"""train.py as several processes on this machine, and what they wrote."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
from absl import flags
from training_helpers import scratch

from lipjax import run
from lipjax.training import cluster
from lipjax.training.same_run import plain

ROOT = pathlib.Path(__file__).resolve().parents[2]


CONFIG = (
    "from lipjax.training.config import load_config\n\ndef get_config():\n    return load_config({directory!r})[0]\n"
)


# What gloo says of its connections, from several threads at once: lines may break after any piece.
GLOO = re.compile(
    r"(\[Gloo\] Rank |\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : )+"
)


WAIT = 1200  # seconds; for the two cores that also run other tests


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """train.py as several processes, each with devices of its own, as a user starts them."""

    def __init__(self, config, workdir, second=(), slurm=False, preamble="", count=2, devices=2):
        """second: arguments that only process 1 gets. slurm: the processes find each other as under srun.

        preamble: Python that all processes execute first.
        """
        path = workdir.with_suffix(".py")
        where = workdir.with_suffix(".config")
        where.mkdir(exist_ok=True)
        (where / "config.json").write_text(json.dumps({"config": plain(config), "seed": 0}))
        path.write_text(preamble + CONFIG.format(directory=str(where)))
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(scratch() / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        port, shared = str(free_port()), [f"--config={path}", f"--workdir={workdir}"]
        of_launcher = SLURM | {"SLURM_STEP_NODELIST": "localhost", "JAX_COORDINATOR_PORT": port} if slurm else {}

        def flags_of(i):
            meeting = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
            return [*shared, *([] if slurm else meeting)]

        self.processes = [
            subprocess.Popen(
                [sys.executable, "train.py", *flags_of(i), *arguments],
                cwd=ROOT,
                env=environment
                | of_launcher
                | ({"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": str(count)} if slurm else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, arguments in enumerate([(), second, *[()] * count][:count])
        ]

    def wait_for(self, path, lines):
        """Returns when a file has so many lines."""
        deadline = time.monotonic() + WAIT
        while not (path.exists() and path.read_text().count("\n") >= lines):
            assert all(process.poll() is None for process in self.processes) and time.monotonic() < deadline
            time.sleep(0.2)

    def close_output(self):
        """Closes the reader of process 0's standard output after its first line, as `head -n 1` does."""
        stream = self.processes[0].stdout
        assert stream is not None and stream.readline()
        stream.close()

    def finish(self):
        """[(exit code, standard output, standard error)], without what gloo says of its connections."""
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout=WAIT)
            lines = [line for line in out.splitlines() if not line or not GLOO.fullmatch(line)]
            found.append((process.returncode, "\n".join(lines), err))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_agree(ours, theirs):
    """Metrics of the same steps, to what float32 allows.

    Another order of adding 16 losses and their gradients changes them by some eps = 6e-8; each of nine Adam steps
    divides a gradient by its size, so that an error of eps times the batch's largest gradient may become one of 1e-5
    where an entry is small. A share of images may differ where one of 12 or 48 lies on the boundary, which none does.
    """
    assert [(line["step"], line["split"], *sorted(line)) for line in ours] == [
        (line["step"], line["split"], *sorted(line)) for line in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        for name in a.keys() - {"split"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} of step {a['step']}")


def keep_until(directory, target, step):
    """A copy of a run as it was when it had saved a step."""
    shutil.copytree(directory, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def launch(config, workdir):
    """A run in this process, as train.py starts it."""
    values = flags.FlagValues()
    cluster.define_flags(values)
    values(["train.py"])
    return cluster.launch(lambda: run.run(config, workdir), "interrupted", values)
