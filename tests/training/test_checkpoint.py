"""Checkpoints: what is restored is what was saved, on any mesh, and nothing else is ever taken for it."""

import errno
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training_helpers import scratch, tiny_config

from lipjax.errors import UserError
from lipjax.training import same_run
from lipjax.training.checkpoint import Checkpointer


def make_state(seed=0, features=8):
    key = jax.random.key(seed)
    params = {"kernel": jax.random.normal(key, (16, features), jnp.float32), "half": jnp.ones((4,), jnp.bfloat16)}
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "key": jax.random.key(7),
        "keys": jax.random.split(key, 3),
        "step": jnp.int32(seed),
    }


def abstract(state):
    return jax.eval_shape(lambda: state)


def plain(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def equal(left, right):
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(plain(a), plain(b)) for a, b in pairs)


@pytest.fixture
def saved(tmp_path):
    """A directory with the steps 1 and 2."""
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {"config": {"depth": 6}}, metric=0.5)
    return tmp_path / "checkpoints"


def test_round_trip_keeps_bits_structure_keys_and_meta(tmp_path, precision):
    state, meta = make_state(3), {"config": {"radii": [0.25], "name": "digits"}, "position": None}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None and checkpointer.best_step() is None
        assert checkpointer.save(3, state, meta)
    with Checkpointer(tmp_path) as checkpointer:
        restored, came = checkpointer.restore(abstract(state))
    assert equal(restored, state) and came == meta
    assert not equal(restored, make_state(4))  # control
    assert jax.random.uniform(restored["key"]) == jax.random.uniform(state["key"])


@pytest.mark.x64_off
def test_restores_onto_another_number_of_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state = make_state(1)

    def shard(leaf):
        return NamedSharding(mesh, PartitionSpec("data") if leaf.shape[:1] == (16,) else PartitionSpec())

    sharded = jax.device_put(state, jax.tree.map(shard, state))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shard(leaf)), state)
    for name, first, wanted in (("8 to 1", sharded, abstract(state)), ("1 to 8", state, target)):
        with Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.save(1, first, {})
            checkpointer.wait()
            restored, _ = checkpointer.restore(wanted)
        assert equal(restored, state)
        assert len(restored["params"]["kernel"].devices()) == (1 if name == "8 to 1" else 8)


def test_keeps_the_latest_and_the_best(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step, metric in ((1, 0.1), (2, 0.9), (3, 0.9), (4, float("nan")), (5, None), (6, 0.3)):
            checkpointer.save(step, make_state(step), {}, metric)
    with Checkpointer(tmp_path) as checkpointer:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5", "6"]
        assert (checkpointer.latest_step(), checkpointer.best_step()) == (6, 3)
        assert equal(checkpointer.restore(abstract(make_state()), checkpointer.best_step())[0], make_state(3))
        assert equal(checkpointer.restore(abstract(make_state()), 5)[0], make_state(5))


def test_saving_does_not_ask_whether_to_stop(tmp_path, monkeypatch):
    """Orbax would, by numbers of its own, and set back the count by which processes agree on that."""
    asked = []
    monkeypatch.setattr("orbax.checkpoint.utils.reached_preemption", lambda step: asked.append(step) or False)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
    assert asked == []
    with ocp.CheckpointManager(tmp_path / "by_itself") as manager:  # control
        manager.save(1, args=ocp.args.StandardSave({"a": np.zeros(2)}))
    assert asked


def test_without_a_metric_there_is_no_best_and_evaluation_takes_the_latest(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.save(2, make_state(2), {}, float("nan"))
        checkpointer.wait()
        assert checkpointer.best_step() is None
        assert equal(checkpointer.restore(abstract(make_state()), checkpointer.best_step())[0], make_state(2))


def test_an_existing_step_is_left_as_it_is(saved):
    with Checkpointer(saved) as checkpointer:
        assert not checkpointer.save(2, make_state(9), {})
        assert equal(checkpointer.restore(abstract(make_state()))[0], make_state(2))
        assert checkpointer.save(3, make_state(3), {})


def test_read_only_changes_nothing(saved):
    (saved / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(saved.rglob("*"))
    with Checkpointer(saved, read_only=True) as checkpointer:
        assert checkpointer.meta() == {"config": {"depth": 6}}
        with pytest.raises(ValueError, match="read_only"):
            checkpointer.save(3, make_state(3), {})
    assert sorted(saved.rglob("*")) == before
    Checkpointer(saved).close()
    assert sorted(saved.rglob("*")) != before  # control: a writer removes the half-written step


def test_a_state_of_another_model_is_refused(saved):
    wanted = abstract(make_state(features=12))
    wanted["params"]["bias"] = jax.ShapeDtypeStruct((12,), jnp.float32)
    wanted["step"] = jax.ShapeDtypeStruct((), jnp.int16)
    del wanted["params"]["half"]
    with Checkpointer(saved) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore(wanted)
    message = str(caught.value)
    assert str(saved / "2") in message and "choose another --workdir" in message
    assert "params.bias: float32[12] expected, but not saved" in message
    assert "params.half: bfloat16[4] saved, but not in this model" in message
    assert "params.kernel: expected float32[16, 12], saved float32[16, 8]" in message
    assert "and 1 more" in message


def test_a_wider_dtype_is_filled_without_loss(saved):
    wanted = abstract(make_state())
    wanted["params"]["kernel"] = jax.ShapeDtypeStruct((16, 8), jnp.float64)
    with Checkpointer(saved) as checkpointer:
        kernel = checkpointer.restore(wanted)[0]["params"]["kernel"]
    assert kernel.dtype == jnp.float64 and np.array_equal(kernel, make_state(2)["params"]["kernel"])


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:  # one bit in the middle, which Orbax alone would load as a slightly different weight
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_every_damaged_file_is_noticed(saved, tmp_path, how):
    marks = {"commit_success.txt", "_CHECKPOINT_METADATA"}  # they carry no data, and are not needed to restore
    names = [path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file() and path.name not in marks]
    assert len(names) > 8
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        damage(copy / name, how)
        with pytest.raises(UserError, match="remove that directory to go on from step 1"):
            with Checkpointer(copy) as checkpointer:
                checkpointer.restore(abstract(make_state()))
        shutil.rmtree(copy / "2")
        with Checkpointer(copy) as checkpointer:
            assert equal(checkpointer.restore(abstract(make_state()))[0], make_state(1))  # control: the advice works
        shutil.rmtree(copy)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(UserError, match="thesis.tex.*choose another --workdir"):
        Checkpointer(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "important"
    with pytest.raises(UserError, match="cannot be read"):
        Checkpointer(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="does not exist"):
        Checkpointer(tmp_path / "nothing", read_only=True)
    (tmp_path / "other" / "5").mkdir(parents=True)
    with Checkpointer(tmp_path / "other") as checkpointer, pytest.raises(UserError, match="not written by lipjax"):
        checkpointer.meta()
    with Checkpointer(tmp_path / "new") as checkpointer, pytest.raises(UserError, match="no complete step"):
        checkpointer.restore(abstract(make_state()))


def test_meta_must_be_json(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="JSON"):
        checkpointer.save(1, make_state(), {"config": object()})


@pytest.mark.parametrize("where", ["caller", "thread"])
def test_a_full_disk_names_the_last_good_step_and_keeps_it(saved, monkeypatch, where):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        raise full

    checkpointer = Checkpointer(saved)
    with monkeypatch.context() as patch:
        if where == "caller":
            patch.setattr(checkpointer._manager, "save", fail)
        else:
            patch.setattr("lipjax.training.damage.write_digests", fail)
        with pytest.raises(UserError, match="no space left.*last good step is 2.*free some space") as caught:
            checkpointer.save(3, make_state(3), {}, 0.9)
            checkpointer.wait()
        assert str(saved) in str(caught.value)
    assert checkpointer.latest_step() == 2 and sorted(path.name for path in saved.iterdir()) == ["1", "2"]
    assert checkpointer.save(3, make_state(3), {}, 0.9)  # space was freed
    checkpointer.close()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]
    with Checkpointer(saved) as checkpointer:
        assert equal(checkpointer.restore(abstract(make_state()))[0], make_state(3))


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from lipjax.training import checkpoint, damage
checkpointer = checkpoint.Checkpointer(sys.argv[1])
checkpointer.save(1, {"w": jnp.ones(4)}, {})
checkpointer.wait()
damage.write_digests = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # every file is written, none is committed
checkpointer.save(2, {"w": jnp.zeros(4)}, {})
checkpointer.wait()
"""


def test_a_process_killed_while_saving_costs_only_that_step(tmp_path):
    directory = tmp_path / "checkpoints"
    process = subprocess.run([sys.executable, "-c", KILLED, str(directory)], timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert any("tmp" in path.name for path in directory.iterdir())  # control: it was killed half-way
    with Checkpointer(directory) as checkpointer:
        target = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
        assert checkpointer.latest_step() == 1
        assert np.array_equal(checkpointer.restore(target)[0]["w"], np.ones(4))
        checkpointer.save(2, {"w": jnp.full(4, 2.0, jnp.float32)}, {})
        checkpointer.wait()
        assert np.array_equal(checkpointer.restore(target)[0]["w"], np.full(4, 2.0))
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


@pytest.mark.x64_off
def test_saving_does_not_wait_for_the_disk_and_survives_donation(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"w": jnp.zeros((1024, 256))}
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        for i in range(1, 4):
            state = step(state)
            checkpointer.save(i, state, {})
            state = step(state)  # the buffers being saved are given away
        checkpointer.wait()
        for i in range(1, 4):
            restored, _ = checkpointer.restore({"w": jax.ShapeDtypeStruct((1024, 256), jnp.float32)}, i)
            assert np.all(np.asarray(restored["w"]) == 2 * i - 1)


# A training that writes down how many steps it has done, which its death does not undo.
RECORDED = """
import os, sys
from lipjax.training import config, loop
record, original = os.open(sys.argv[3], os.O_RDWR | os.O_CREAT), loop.Run.batch_runner
def batch_runner(self, first_step):
    train_batch = original(self, first_step)
    def recorded(state, step, schedule):
        os.pwrite(record, b"%9d" % step, 0)
        return train_batch(state, step, schedule)
    return recorded
loop.Run.batch_runner = batch_runner
loop.train(config.load_config(sys.argv[1])[0], sys.argv[2], 0)
"""
EVERY = 2  # steps between saves, which take longer than the steps: most kills hit one
KILLABLE = {"batch_size": 4, "num_epochs": 60, "checkpoint.every_epochs": 5, "checkpoint.every_steps": EVERY}


def killed_and_resumed(tmp_path, kills):
    """Trains 720 steps, killed at random moments.

    Returns: of each kill (steps done, step that the next life began with, whether it left a half-written step).
    """
    config, chance = tiny_config(**KILLABLE), random.Random(kills)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({"config": same_run.plain(config), "seed": 0}))
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(scratch() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def start(name):
        command = [sys.executable, "-c", RECORDED, tmp_path / "config", tmp_path / name, tmp_path / f"{name}.steps"]
        root = pathlib.Path(__file__).resolve().parents[2]
        return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)

    def done(name):
        path = tmp_path / f"{name}.steps"
        return int(path.read_text() or 0) if path.exists() else 0

    def end_of(process):
        out, _ = process.communicate(timeout=1200)
        found = re.search(r"Resuming .* from step (\d+)", out)
        return process.returncode, int(found.group(1)) if found else 0

    deaths, began, halves = [], [], []
    for _ in range(kills):
        process, first = start("killed"), done("killed")
        while done("killed") == first and process.poll() is None:  # until it trains
            time.sleep(0.01)
        # Later kills come as soon as the sum of what is left allows.
        target = done("killed") + chance.uniform(0, 2 * (700 - done("killed")) / (kills + 1 - len(deaths)))
        while done("killed") < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        code, at = end_of(process)
        assert code == -signal.SIGKILL
        deaths.append(done("killed"))
        halves.append(any("tmp" in path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()))
        began.append(at)
    code, at = end_of(start("killed"))
    assert code == 0
    code, _ = end_of(start("whole"))
    assert code == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("killed", "whole")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 60 + 12
    return list(zip(deaths, [*began[1:], at], halves, strict=True))


@pytest.mark.nightly  # starts 22 processes; one that is killed while it saves has a test of its own above
def test_a_training_killed_at_any_moment_loses_less_than_two_intervals(tmp_path):
    """A save begins when the one before is on disk, so that at any moment all but the last one begun are complete.

    With `done` steps done the last one begun is of the last multiple of EVERY up to done (or done + 1, if the step of
    that moment was through), and the one before it is complete: it is at most 2 EVERY - 1 steps back.
    """
    found = killed_and_resumed(tmp_path, 20)
    assert len(found) == 20
    for done, resumed, _ in found:
        assert done - (2 * EVERY - 1) <= resumed <= done + 1 and resumed % EVERY == 0, found
    # Controls: the kills were at different steps, and some in the middle of a save.
    assert len({done for done, _, _ in found}) > 1 and any(half for _, _, half in found)
    lost, halves = [done - resumed for done, resumed, _ in found], sum(half for _, _, half in found)
    print(f"20 kills; lost steps: {lost}; {halves} half-written steps")
