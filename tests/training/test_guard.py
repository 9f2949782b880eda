"""Values that are not finite: the step that meets one and all after it change nothing, and the message says where."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from training_helpers import (  # noqa: F401  quick_compiles is a fixture
    differing,
    final_state,
    latest_step,
    quick_compiles,
    tiny_config,
    trained,
)

from lipjax.errors import UserError
from lipjax.plan import plan
from lipjax.training import guard, objective
from lipjax.training.loop import Run, train

pytestmark = pytest.mark.x64_off
SCHEDULE = {"epsilon": 0.1}


def bad(flags):
    return [name for name, good in flags.items() if not good]


def test_a_step_that_is_not_finite_and_all_after_it_change_nothing_but_the_count():
    run = Run(tiny_config(), 0)
    train_batch, look = run.batch_runner(0), run.batch_runner(1, diagnose=True)
    state, metrics = train_batch(run.fresh_state(), 0, SCHEDULE)
    before = jax.tree.map(jnp.copy, state)
    assert metrics["finite"] and int(state.step) == 1
    lost, metrics = train_batch(jax.tree.map(jnp.copy, state), 1, SCHEDULE | {"epsilon": math.nan})
    assert not metrics["finite"] and differing(before, lost) == [".step"] and int(lost.step) == -2
    after, metrics = train_batch(lost, 2, SCHEDULE)  # a good batch
    assert not metrics["finite"] and differing(before, after) == [".step"] and int(after.step) == -2
    # Run again with flags, on that state: of the batch that was lost, with what it was lost by, and without.
    _, flags = look(jax.tree.map(jnp.copy, after), 1, SCHEDULE | {"epsilon": math.nan})
    gradients = [f"gradient of {name}" for name in ("block_01", "head", "neck_conv", "neck_dense", "stem")]
    assert bad(flags["before"]) == []
    assert bad(flags["during"])[:7] == ["loss", *gradients, "sum of the gradients' squares"]
    assert "logits" in flags["during"] and "norm estimates" in flags["during"]
    assert bad(look(after, 1, SCHEDULE)[1]["during"]) == []
    moved, metrics = train_batch(state, 1, SCHEDULE)  # control
    assert metrics["finite"] and len(differing(before, moved)) > 10


def test_the_guard_costs_a_few_comparisons_however_many_parameters_there_are():
    """Not one for each array: as many in a deeper network, and few. A step with all flags is the control."""

    def comparisons(depth):
        return plan.traced_step(Run(tiny_config(**{"model.depth": depth}), 0)).lower().as_text().count("is_finite")

    few = comparisons(1)
    assert 0 < few == comparisons(3) < 8
    run = Run(tiny_config(), 0)
    flags = jax.eval_shape(lambda state: guard.state_flags(state, ""), run.abstract_state)
    text = jax.jit(lambda state: guard.state_flags(state, "")).lower(run.abstract_state).as_text()
    assert len(flags) == 7 and text.count("is_finite") > 2 * few


def test_nan_stops_the_run_says_where_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    config, original = tiny_config(), objective.epsilon_at
    with monkeypatch.context() as patch:
        patch.setattr(objective, "epsilon_at", lambda c, epoch, n: original(c, epoch, n) if epoch < 1 else float("nan"))
        with pytest.raises(UserError, match=r"step 4 \(epoch 2\): not finite were loss, gradient of block_01, "):
            train(config, tmp_path, 0)
    assert latest_step(tmp_path) == 3
    train(config, tmp_path, 0)  # control: without the NaN it goes on, from a state that the NaN did not touch
    assert differing(final_state(tmp_path, config), final_state(trained(), config)) == []


@pytest.mark.nightly
def test_a_learning_rate_that_overflows_is_seen_before_anything_is_saved(tmp_path):
    changes = {"learning_rate": 3e38, "warmup_epochs": 0.0, "weight_decay": 10.0}
    config = tiny_config(
        **{f"optimizer.{name}": value for name, value in changes.items()}, **{"checkpoint.every_steps": 1}
    )
    said = "step 1 (epoch 1): not finite were updated parameters of block_01"
    with pytest.raises(UserError, match=re.escape(said) + ".*another --workdir"):
        train(config, tmp_path, 0)
    assert latest_step(tmp_path) is None


def test_parameters_that_a_step_left_are_what_the_next_one_names():
    run = Run(tiny_config(), 0)
    state = run.fresh_state()
    head = {name: leaf.at[...].set(math.inf) for name, leaf in state.params["head"].items()}
    state = dataclasses.replace(state, params={**state.params, "head": head})
    state, metrics = run.batch_runner(1)(state, 1, SCHEDULE)
    assert not metrics["finite"]
    with pytest.raises(UserError, match=r"step 2 \(epoch 1\): not finite were parameters of head, as step 1 left them"):
        guard.stop(run, state, 1)


def test_a_value_that_is_finite_the_second_time_is_blamed_on_the_machine():
    run = Run(tiny_config(), 0)
    state = run.fresh_state()
    with pytest.raises(UserError, match=r"step 1 \(epoch 1\): a value was not finite, but none was when .* once more"):
        guard.stop(run, state, 0)


def test_marks_of_a_batch_that_was_lost():
    steps = jnp.array([0, 5, -1, -6])
    assert guard.batches_seen(steps).tolist() == [0, 5, 0, 5]
    assert guard.after(steps, jnp.array(True)).tolist() == [1, 6, -1, -6]
    assert guard.after(steps, jnp.array(False)).tolist() == [-1, -6, -1, -6]
