"""Several processes as one run: how they find each other, agree and end together. JAX's runtime does the work."""

import atexit
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax._src import distributed  # for its client: jax.distributed offers neither keys nor barriers without a time-out
from jax.experimental import multihost_utils

import lipjax
from lipjax import streams
from lipjax.errors import UserError, run_command
from lipjax.training import stopping

AUTO, NONE = "auto", "none"
HEARTBEAT_SECONDS = 60
_FLAGS = ("coordinator", "num_processes", "process_id")
_FAILED = "lipjax/failed"
_FOREVER_MS = 2**31 - 1  # 24 days
# A process that failed leaves its word with process 0, which stays so long for the others to read it.
_LAST_WORD_SECONDS, _POLL_SECONDS = 6.0, 2.0
_MEET_SECONDS = 300.0
_ADVICE = "Start all processes again with the same command: they go on from the last checkpoint."

_over = threading.Event()
_met = threading.Event()
_stuck = threading.Event()  # a thread of this process is inside JAX and does not come back


def define_flags(flag_values: flags.FlagValues) -> None:
    """The flags of train.py that `launch` reads."""
    where = "host:port of process 0, at which the processes of a run meet; auto: as the cluster says; none: run alone"
    flags.DEFINE_string("coordinator", None, f"{where} (default: auto under srun and mpirun).", flag_values=flag_values)
    flags.DEFINE_integer("num_processes", None, "How many there are; with --coordinator.", flag_values=flag_values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0; with --coordinator.", flag_values=flag_values)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        HEARTBEAT_SECONDS,
        "A process that is silent for so long counts as dead.",
        lower_bound=5,
        flag_values=flag_values,
    )


def launch(command: Callable[[], object], interrupted: str, flag_values: flags.FlagValues) -> int:
    """`errors.run_command` as one process of several, or alone, as the flags and the cluster say.

    However one process ends before its work is done, the others end within seconds with a message that names it; if
    one vanishes, JAX's coordination service aborts them after --heartbeat_seconds (exit code 134, and a message that
    names it).
    Returns: the exit code; 75 (EX_TEMPFAIL) if a signal stopped the run before its end (`stopping.REQUESTS`), 130 if it
      was Ctrl-C.
    """
    stopped: list[int] = []

    def joined():
        join(**{name: flag_values[name].value for name in (*_FLAGS, "heartbeat_seconds")})
        try:
            command()
            wait("end")
        except stopping.Preempted as end:
            if not end.agreed:
                raise
            if jax.process_index() == 0:
                print(end, flush=True)
            wait("preempted")
            stopped.append(end.code)
        except UserError as error:
            if not _met.is_set():
                raise
            raise UserError(f"process {jax.process_index()} of {jax.process_count()}: {error}") from error

    with streams.guarded():
        try:
            with stopping.outside_training():
                code = run_command(joined, interrupted)
        except BaseException as error:  # also what is meant to end a process: the others would wait for this one
            code = _code_of(error)
            if code is None:
                raise
        if stopped:
            return stopped[0]
        if code and _met.is_set():
            _leave(code)
        if _stuck.is_set():
            _exit(code)
    return code


def _code_of(error: BaseException) -> int | None:
    """The exit code for what a command raised, after a word about it; None if it is to be raised."""
    several = _met.is_set()
    if isinstance(error, stopping.Preempted):
        print(error, flush=True)
        return error.code
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if not (exhausted or several):
        return None
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) and error.code else 1
    if not isinstance(error, jax.errors.JaxRuntimeError):
        traceback.print_exception(error)
        return 1
    if exhausted:
        what = "the devices have too little memory: see config.accumulation, remat, precision and batch_size"
    else:
        _over.wait(_LAST_WORD_SECONDS)  # another process may have said why
        what = "an operation of all processes failed, most likely because another one died: see its output"
    who = f"process {jax.process_index()}: " if several else ""
    advice = _ADVICE if several else "The same command goes on from the last checkpoint."
    print(f"Error: {who}{what} ({str(error).splitlines()[0][:200]}). {advice}", file=sys.stderr)
    return 1


def join(
    coordinator: str | None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int | None = None,
) -> None:
    """Makes this process one of several; must come before anything that makes JAX look for devices.

    Args: as the flags of `define_flags`. With coordinator=None a run has several processes only where srun, mpirun or
      a TPU pod say in the environment that they started more than one.
    Raises: UserError if the arguments contradict each other, or the processes do not find each other.
    """
    arguments = initialize_arguments(coordinator, num_processes, process_id)
    if arguments is None:
        return
    if arguments:
        _check_coordinator(arguments["coordinator_address"], arguments["process_id"])
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds or HEARTBEAT_SECONDS}
    # Of a failure after that time JAX would abort the process; this one ends before, with a message.
    options["initialization_timeout"] = int(2 * _MEET_SECONDS) + 60
    try:
        _interruptible(lambda: jax.distributed.initialize(**arguments, **options), _MEET_SECONDS)
    except TimeoutError as error:
        place = f" at {arguments['coordinator_address']}" if arguments else ""
        raise UserError(
            f"the processes of this run did not meet{place} within {_MEET_SECONDS:.0f} s. See that all are started, "
            "with the same --coordinator and --num_processes and a --process_id of their own, and whether process 0 "
            "is the one that listens there."
        ) from error
    except (ValueError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"the processes of this run did not find each other ({reason}). Give --coordinator=HOST:PORT with a free "
            "port of process 0, --num_processes and --process_id, or --coordinator=none to run alone."
        ) from error
    _met.set()
    watcher = threading.Thread(target=_watch, daemon=True)
    watcher.start()
    atexit.register(lambda: (_over.set(), watcher.join()))  # Python must not end while a thread is inside JAX


def _interruptible(function: Callable[[], object], seconds: float | None = None) -> None:
    """Calls what waits inside JAX, but in a thread, so that signals are heeded meanwhile.

    Raises: TimeoutError after so many seconds (the thread is left alone); what the function raises.
    """
    raised: list[BaseException] = []

    def call():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:
        if thread.is_alive():
            _stuck.set()
    if thread.is_alive():
        raise TimeoutError
    if raised:
        raise raised[0]


def initialize_arguments(coordinator, num_processes, process_id) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, or None for a run of one process."""
    numbers = {"num_processes": num_processes, "process_id": process_id}
    given = [f"--{name}" for name, value in numbers.items() if value is not None]
    if coordinator in (None, AUTO, NONE):
        if given:
            raise UserError(f"{' and '.join(given)} need --coordinator=HOST:PORT, the address of process 0.")
        if coordinator == NONE or coordinator is None and _launched() < 2:
            return None
        if coordinator is None and _OPEN_MPI in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ:
            raise UserError(
                "mpirun started several processes, but this Open MPI does not tell where the first one is: give "
                "--coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK, "
                "or --coordinator=none for runs of their own."
            )
        return {}
    missing = [f"--{name}" for name, value in numbers.items() if value is None]
    if missing:
        raise UserError(f"--coordinator={coordinator} needs {' and '.join(missing)} too.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator: expected HOST:PORT, {AUTO!r} or {NONE!r}, got {coordinator!r}.")
    if num_processes < 1:
        raise UserError(f"--num_processes: expected at least 1, got {num_processes}.")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id: expected 0 to {num_processes - 1}, got {process_id}.")
    return {"coordinator_address": coordinator, **numbers, "cluster_detection_method": "deactivate"}


def _check_coordinator(address: str, process_id: int) -> None:
    """Raises: UserError where JAX would end the process at once: a port that is taken, or nobody there."""
    host, _, port = address.rpartition(":")
    if process_id == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
        except OSError as error:
            raise UserError(
                f"--coordinator={address}: process 0 cannot listen there ({error.strerror}): take another port."
            ) from error
        return
    deadline = time.monotonic() + _MEET_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={address}: there was no process 0 for {_MEET_SECONDS:.0f} s ({error}): "
                    "start it, or correct the address."
                ) from error
        time.sleep(1)


_OPEN_MPI = "OMPI_COMM_WORLD_SIZE"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def _launched() -> int:
    """Number of processes that a launcher started. A shell inside an allocation of SLURM has not all of these."""
    if all(name in os.environ for name in _SLURM):
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ["SLURM_NTASKS"]))
    if _OPEN_MPI in os.environ:
        return int(os.environ[_OPEN_MPI])
    return len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))


def check_joined() -> None:
    """Raises: UserError if JAX sees several processes that have not met: a TPU pod, and no flag that says so."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"this is one of {jax.process_count()} processes of a TPU pod: add --coordinator={AUTO}.")


def wait(name: str) -> None:
    """Returns when all processes have come here, however long that takes. name: another one at each place and time."""
    if jax.distributed.is_initialized():
        _interruptible(lambda: _client().wait_at_barrier(f"lipjax/{name}", _FOREVER_MS))


def _client() -> Any:
    return distributed.global_state.client


def _watch() -> None:
    """Looks in a thread of its own whether another process failed, and then ends this one."""
    while not _over.wait(_POLL_SECONDS):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # not found: all is well
            which, code = _client().key_value_try_get(_FAILED).split()
            break
    else:
        return
    if not _over.wait(1.0):  # what fails here at the same time speaks for itself
        print(f"Error: process {which} stopped with exit code {code}: see its output. {_ADVICE}", file=sys.stderr)
        if jax.process_index() == 0:  # with it goes the service from which the others hear
            time.sleep(_LAST_WORD_SECONDS)
        _exit(int(code))


def leave(code: int) -> NoReturn:
    """Ends this process and, if there are others, those, without waiting for anything of this run."""
    if _met.is_set():
        _leave(code)
    _exit(code)


def _leave(code: int) -> NoReturn:
    """Ends this process and the others: not by JAX's shutdown, which would wait for them."""
    _over.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one failed before
        _client().key_value_set(_FAILED, f"{jax.process_index()} {code}")
    if jax.process_index() == 0:
        time.sleep(_LAST_WORD_SECONDS)
    _exit(code)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # closed, none, in a handler
            stream.flush()
    os._exit(code)


def check_agreement(values: Mapping[str, Any]) -> None:
    """Raises: UserError, in every process, naming what is not the same in all of them.

    Args: values: what it is called -> JSON data; the same names in every process.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in values.values()]
    everyone = multihost_utils.process_allgather(np.array([list(digest) for digest in digests], np.uint8))
    others = (everyone != everyone[0]).any(axis=2)  # (processes, values)
    differ = [
        f"{name} (in process {', '.join(map(str, np.flatnonzero(others[:, i])))})"
        for i, name in enumerate(values)
        if others[:, i].any()
    ]
    if differ:
        raise UserError(
            f"the processes of a run must be started alike, but {'; '.join(differ[:4])} differ from process 0: "
            "use the same code, flags, config and data everywhere."
        )


def code_identity() -> dict[str, str]:
    """Digest of lipjax's sources, and the versions of what computes."""
    root, digest = pathlib.Path(lipjax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"sources": digest.hexdigest(), **versions}


def global_array(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array on the devices of all processes, each of which has all of it and puts its parts."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
