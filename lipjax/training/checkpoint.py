"""Checkpoints: the one module that knows Orbax. Asynchronous, atomic; keep-last to resume, keep-best to evaluate."""

import contextlib
import errno
import importlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lipjax.errors import UserError
from lipjax.training import cluster, damage

FORMAT = {"format": "lipjax.checkpoint", "version": 1}
_TEMPORARY = ".orbax-checkpoint-tmp"
_ADVICE = "choose another --workdir"

_ORBAX = f"{os.sep}orbax{os.sep}"


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs the tracebacks of its threads before it raises them, and asyncio those of what Orbax gave up.

    What matters of them is in the error of this module.
    """
    trace = record.exc_info[2] if record.exc_info else None
    places = [record.pathname, record.getMessage(), *(frame.filename for frame in traceback.extract_tb(trace))]
    return not any(_ORBAX in place for place in places)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_of_orbax)


def _of_closed_loop(error: BaseException | None, trace: TracebackType | None) -> bool:
    """True for an error such as TensorStore prints after a failed save, when Orbax's loop is closed."""
    return isinstance(error, RuntimeError) and trace is not None and trace.tb_frame.f_code.co_name == _FROM_THREADS


def _without_threads(kind, error, trace, otherwise=sys.excepthook) -> None:
    if not _of_closed_loop(error, trace):
        otherwise(kind, error, trace)


def _without_unraisable(found, otherwise=sys.unraisablehook) -> None:
    if not _of_closed_loop(found.exc_value, found.exc_traceback):
        otherwise(found)


_FROM_THREADS = "call_soon_threadsafe"
sys.excepthook, sys.unraisablehook = _without_threads, _without_unraisable


class _SteadyClock:
    """Stands for the module `time` where Orbax measures time-outs: the clock on the wall may jump."""

    time, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)


for _name in ("future", "signaling_client"):
    with contextlib.suppress(ImportError):  # another Orbax may measure elsewhere
        vars(importlib.import_module(f"orbax.checkpoint._src.futures.{_name}"))["time"] = _SteadyClock

_opened = itertools.count(1)


class Checkpointer:
    """Saves and restores (state, meta) pairs under one directory; use it as a context manager.

    Of the saved steps the `keep` latest stay, and the one with the largest metric. A step appears only once it is
    complete: a process killed while saving leaves a temporary directory, which the next writer removes. A step
    carries digests of its files, because Orbax by itself loads a flipped bit without a word.
    `read_only` opens an existing directory without touching it, so that it is safe beside a running training.

    Every process of a multi-process run must make the same calls.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        best_metric: str = "metric",
        read_only: bool = False,
        repaired: Callable[[str], object] | None = None,
    ):
        """Opens or creates `directory`.

        Args:
          directory: where the steps live; one run per directory.
          keep: number of latest steps to keep, at least 1.
          best_metric: the name under which the metric of `save` is stored; larger is better.
          read_only: never write, create or clean up.
          repaired: if given, damaged steps are moved aside (`damage.set_aside`), and it gets a line about each of them.
        Raises: UserError if the directory is not a checkpoint directory of lipjax or cannot be used, or is to be
          repaired and holds no good step.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(os.path.abspath(directory))
        self._best_metric = best_metric
        self._read_only = read_only
        self._saving = -1
        self._verified: set[int] = set()
        self._keep = keep
        self._failed = False
        self._check_ours()
        if repaired is not None:
            if read_only:
                raise ValueError("what is read_only cannot be repaired")
            if jax.process_index() == 0:
                self._verified = damage.set_aside(self.directory, repaired)
            cluster.wait(f"checkpoints {next(_opened)}")  # before the others look into the directory
        self._manager = self._open()

    def save(self, step: int, state: Any, meta: dict[str, Any], metric: float | None = None) -> bool:
        """Starts to save and returns as soon as the state is copied; an error shows at the next call of any method.

        Args:
          step: a step that exists already is left as it is.
          state: a pytree of arrays; typed PRNG keys and optax states are fine.
          meta: JSON data (the config, the position of the data iterator, ...).
          metric: what keep-best ranks by, larger is better; None or NaN ranks last.
        Returns: whether a save was started.
        Raises: UserError if this or the previous save failed (a full disk); the last good step stays.
        """
        if self._read_only:
            raise ValueError("this Checkpointer was opened with read_only=True")
        document = {**FORMAT, "step": int(step), "meta": meta}
        try:
            json.dumps(document)
        except TypeError as error:
            raise ValueError(f"meta must be plain JSON data (dict, list, str, numbers): {error}") from error
        value = None if metric is None or math.isnan(metric) else float(metric)
        if step in self._manager.all_steps():
            return False
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(document))
        self.wait()  # before `_saving` changes, which the thread of the previous save reads
        self._saving = step
        try:
            return self._manager.save(step, args=args, metrics={self._best_metric: value}, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def wait(self) -> None:
        """Returns once the running save is on disk. Raises: UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def latest_step(self) -> int | None:
        """The latest complete step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the largest metric (the later of equals), or None if no step was saved with one."""
        step = self._manager.best_step()
        return None if step is None or self._rank(self._manager.metrics(step)) == -math.inf else step

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` saved with a step (default: the latest), without reading the state.

        Raises: UserError as for `restore`.
        """
        step = self._existing(step)
        self._verify(step)
        try:
            document = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:
            raise self._corrupt(step, _first_line(error)) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT["format"]:
            raise UserError(f"{self._place(step)} was not written by lipjax; {_ADVICE}")
        if document.get("version") != FORMAT["version"]:
            expected, came = FORMAT["version"], document.get("version")
            raise UserError(
                f"{self._place(step)} has format version {came}, this lipjax reads version {expected}; "
                "use the lipjax that wrote it, or choose another --workdir"
            )
        return document["meta"]

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores a step (default: the latest).

        Args:
          abstract_state: the expected pytree of `jax.ShapeDtypeStruct`, as from `jax.eval_shape`. A leaf's sharding
            says where to put it (default: the first local device) and may differ from that of the saved run.
        Returns: (state, meta).
        Raises: UserError if the step does not exist, is damaged, or holds a state of other structure, shapes or
          dtypes (a dtype may widen).
        """
        step = self._existing(step)
        meta = self.meta(step)
        self._check_structure(step, abstract_state)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=device if getattr(leaf, "sharding", None) is None else leaf.sharding
            ),
            abstract_state,
        )
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
            return jax.block_until_ready(restored["state"]), meta
        except Exception as error:
            raise self._corrupt(step, _first_line(error)) from error

    def lacking(self, abstract_state: Any, step: int | None = None) -> list[str]:
        """Names of the leaves of a state that a step was saved without. Raises: UserError as `meta`."""
        step = self._existing(step)
        return sorted(_leaves(abstract_state).keys() - self._saved(step).keys())

    def close(self) -> None:
        """Waits for the running save and lets go of the directory. Raises: UserError if that save failed."""
        if self._failed:
            return
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            return  # another process died, and can finish no save
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            error.add_note(f"Besides: {failure}")

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only and jax.process_index() == 0:
            for path in self.directory.glob(f"*{_TEMPORARY}*"):  # here, not by Orbax, which does it some time later
                shutil.rmtree(path, ignore_errors=True)
        latest = preservation_policy.LatestN(self._keep)
        best = preservation_policy.BestN(get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=self._rank,
            preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            create=not self._read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        try:
            manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
            # It asks with numbers of its own whether to stop, which sets back the count by which the processes of a run
            # agree on that (`stopping.preemption`); lipjax decides when to save, so that it need not know.
            manager.reached_preemption = lambda step: False
            return manager
        except (OSError, ValueError, TypeError, KeyError) as error:
            for step in self._steps_on_disk():
                self._verify(step)
            raise UserError(f"{self._place()} cannot be opened ({_first_line(error)}); {_ADVICE}") from error

    def _rank(self, metrics: Any) -> float:
        value = metrics.get(self._best_metric) if isinstance(metrics, dict) else None
        return -math.inf if value is None else float(value)

    def _place(self, step: int | None = None) -> str:
        return f"checkpoint {self.directory if step is None else self.directory / str(step)}"

    def _check_ours(self) -> None:
        try:
            if not self.directory.exists():
                if self._read_only:
                    raise UserError(f"{self._place()} does not exist; train first, or give the --workdir of a training")
                return
            names = [path.name for path in self.directory.iterdir() if not path.name.startswith(".")]
        except OSError as error:
            raise UserError(f"{self._place()} cannot be read ({_first_line(error)}); {_ADVICE}") from error
        foreign = [name for name in names if not damage.STEP.fullmatch(name) and _TEMPORARY not in name]
        if foreign:
            raise UserError(
                f"{self._place()} should hold step directories only, but holds {sorted(foreign)[0]!r}: "
                f"it is not a checkpoint directory of lipjax; {_ADVICE}"
            )

    def _existing(self, step: int | None) -> int:
        steps = self._manager.all_steps()
        if not steps:
            raise UserError(f"{self._place()} holds no complete step; train first, or give the --workdir of a training")
        if step is not None and step not in steps:
            raise UserError(f"{self._place()} holds the steps {sorted(steps)}, not {step}")
        return max(steps) if step is None else step

    def _steps_on_disk(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if damage.STEP.fullmatch(path.name))

    def _write_digests(self) -> None:
        """Runs in Orbax's thread when all files are written, just before the step gets its final name."""
        if jax.process_index() == 0:
            for path in self.directory.glob(f"{self._saving}{_TEMPORARY}*"):
                damage.write_digests(path)

    def _verify(self, step: int) -> None:
        if step in self._verified or jax.process_index() != 0:
            return
        what = damage.damage_of(self.directory / str(step))
        if what is not None:
            raise self._corrupt(step, what)
        self._verified.add(step)

    def _saved(self, step: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of what was saved, as of `_leaves`."""
        self._verify(step)
        try:
            metadata = self._manager.item_metadata(step)
            return _leaves(metadata.state.tree)  # pyright: ignore[reportOptionalMemberAccess]
        except Exception as error:
            raise self._corrupt(step, _first_line(error)) from error

    def _check_structure(self, step: int, abstract_state: Any) -> None:
        expected, saved = _leaves(abstract_state), self._saved(step)
        lines = []
        for name in sorted({*expected, *saved}):
            want, came = expected.get(name), saved.get(name)
            if want is None:
                lines.append(f"{name}: {_show(came)} saved, but not in this model")
            elif came is None:
                lines.append(f"{name}: {_show(want)} expected, but not saved")
            elif want[0] != came[0] or jax.numpy.promote_types(want[1], came[1]) != want[1]:
                lines.append(f"{name}: expected {_show(want)}, saved {_show(came)}")
        if lines:
            shown = "\n  ".join(lines[:5]) + (f"\n  and {len(lines) - 5} more" if len(lines) > 5 else "")
            raise UserError(
                f"{self._place(step)} was written by another model or config:\n  {shown}\n"
                "choose another --workdir, or the config of that run"
            )

    def _remedy(self, step: int) -> str:
        others = [other for other in self._steps_on_disk() if other != step]
        return f"remove that directory to go on from step {others[-1]}" if others else _ADVICE

    def _corrupt(self, step: int, what: str) -> UserError:
        return UserError(f"{self._place(step)} is damaged ({what}); {self._remedy(step)}")

    def _save_failed(self, error: Exception) -> Exception:
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            self._failed = True
            return error  # another process died; the directory is not to blame
        # What Orbax leaves of the save when it gives up; the garbage collector would tell of it at any time after.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        # Orbax raises the error of a failed save again at every later call, so this manager is of no more use.
        if jax.process_count() > 1:  # where another takes all processes, of which perhaps only this one failed
            self._failed = True
            latest = max(self._steps_on_disk(), default=None)
        else:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()
            latest = self.latest_step()
        good = "no step was saved before" if latest is None else f"the last good step is {latest} and is kept"
        cause = "no space left on the device" if full else _first_line(error)
        remedy = "free some space" if full else "check the directory"
        return UserError(f"{self._place()} could not be saved: {cause}; {good}; {remedy} and start again to resume")


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Path → (shape, dtype) of each leaf, typed PRNG keys as the integers they are saved as."""
    result = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        result[jax.tree_util.keystr(path, simple=True, separator=".")] = (tuple(leaf.shape), leaf.dtype)
    return result


def _show(leaf: tuple[tuple[int, ...], Any] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"
