"""NAdam and Lookahead of the recipe against traces in NumPy, and which parameters are validated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_helpers import final_state, interrupt_at, quick_compiles, tiny_config  # noqa: F401  a fixture

from lipjax.training import optimizer
from lipjax.training.loop import Run, load_best, train

EPS32 = 2.0**-23


def group(**changes):
    config = tiny_config(**{f"optimizer.{name}": value for name, value in changes.items()}).optimizer
    with config.unlocked():
        config.update({"schedule": "step", "warmup_epochs": 0.0, "clip_norm": 0.0})
    return config


def nadam_trace(p, gradients, rate, eps, decay):
    """torch.optim.NAdam, momentum_decay 0.004, from its documentation; in double precision."""
    m, v, product, found = np.zeros_like(p), np.zeros_like(p), 1.0, []
    for t, g in enumerate(gradients, start=1):
        g = g + decay * p
        mu, following = (0.9 * (1 - 0.5 * 0.96 ** (i * 0.004)) for i in (t, t + 1))
        product *= mu
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        denominator = np.sqrt(v / (1 - 0.999**t)) + eps
        p = p - rate * (1 - mu) / (1 - product) * g / denominator
        p = p - rate * following / (1 - product * following) * m / denominator
        found.append(p)
    return np.array(found)


def run_optimizer(transform, params, gradients):
    state, found = transform.init(params), []
    update = jax.jit(lambda g, s, p: transform.update(g, s, p))
    for g in gradients:
        updates, state = update({"matrix": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(params["matrix"]))
    return np.array(found), state


@pytest.mark.parametrize(("eps", "decay"), [(1e-8, 0.0), (0.5, 0.25)])
def test_nadam_is_torchs(eps, decay, precision):
    rng = np.random.default_rng(0)
    gradients, start = rng.normal(size=(40, 2, 3)), rng.normal(size=(2, 3)).astype(np.float32)
    config = group(name="nadam", learning_rate=0.01, eps=eps, weight_decay=decay)
    params = {"matrix": jnp.asarray(start)}
    found, state = run_optimizer(optimizer.make_optimizer(config, 1000, 1), params, gradients)
    expected = nadam_trace(start.astype(np.float64), gradients, 0.01, eps, decay)
    # 40 roundings of parameters of order one, and of updates of 0.01 with a handful of roundings each.
    np.testing.assert_allclose(found, expected, rtol=0, atol=60 * EPS32)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))
    if eps == 1e-8:
        others, _ = run_optimizer(optax.nadam(0.01), params, gradients)
        assert np.abs(others - expected).max() > 1e-3  # control: optax's has no schedule of the momentum


def test_nadams_momentum_starts_near_half_of_beta_1():
    """With eps large, the first update is (c_1 g + c_2 g / 10) / (|g| + eps): its coefficients by hand."""
    mu1, mu2 = (0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2))
    assert 0.45 < mu1 < 0.4502
    transform = optimizer.scale_by_torch_nadam(1.0)
    updates, _ = transform.update(jnp.array([3.0]), transform.init(jnp.zeros(1)))
    expected = 3 * (1 + mu2 / (1 - mu1 * mu2) * 0.1) / 4
    np.testing.assert_allclose(updates, [expected], rtol=10 * EPS32)


def lookahead_trace(p, gradients, rate, period, part, steps_per_epoch):
    """SGD with momentum inside; the first synchronisation sets the slow parameters."""
    velocity, slow, found = np.zeros_like(p), None, []
    for t, g in enumerate(gradients, start=1):
        velocity = 0.9 * velocity + g
        p = p - rate * velocity
        if t % period == 0 or t % steps_per_epoch == 0:
            slow = p if slow is None else slow + part * (p - slow)
            p = slow
        found.append(p)
    return np.array(found)


@pytest.mark.parametrize(("period", "steps_per_epoch"), [(6, 10), (6, 12), (6, 4), (1, 5)])
def test_lookahead_is_the_recipes(period, steps_per_epoch):
    rng = np.random.default_rng(1)
    gradients, start = rng.normal(size=(25, 2, 3)), rng.normal(size=(2, 3)).astype(np.float32)
    config = group(name="sgd", learning_rate=0.1, lookahead_period=period)
    transform = optimizer.make_optimizer(config, steps_per_epoch, 1000)
    found, state = run_optimizer(transform, {"matrix": jnp.asarray(start)}, gradients)
    expected = lookahead_trace(start.astype(np.float64), gradients, 0.1, period, 0.5, steps_per_epoch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=200 * EPS32)
    ends = steps_per_epoch * (25 // steps_per_epoch)
    _, state = run_optimizer(transform, {"matrix": jnp.asarray(start)}, gradients[:ends])
    np.testing.assert_allclose(found[ends - 1], state.slow["matrix"], rtol=2 * EPS32, atol=EPS32)
    plain = optimizer.make_optimizer(group(name="sgd", learning_rate=0.1), steps_per_epoch, 1000)
    assert np.abs(run_optimizer(plain, {"matrix": jnp.asarray(start)}, gradients)[0] - expected).max() > 0.01  # control


def test_lookahead_with_the_whole_way_is_the_optimiser_itself():
    gradients = np.random.default_rng(2).normal(size=(9, 3))
    options = {"name": "nadam", "learning_rate": 0.1}
    runs = [
        run_optimizer(optimizer.make_optimizer(group(**options, **more), 4, 9), {"matrix": jnp.ones(3)}, gradients)[0]
        for more in ({}, {"lookahead_period": 3, "lookahead_rate": 1.0})
    ]
    np.testing.assert_allclose(*runs, rtol=10 * EPS32)


def test_training_the_head_alone_under_lookahead_moves_nothing_else():
    config = group(name="nadam", lookahead_period=2, weight_decay=0.1)
    params = {"conv": {"kernel": jnp.ones(3)}, "head": {"matrix": jnp.ones(3)}}
    transform = optimizer.make_optimizer(config, 10, 1, head_only=True)
    state, moved = transform.init(params), params
    for _ in range(5):
        updates, state = transform.update(jax.tree.map(jnp.ones_like, params), state, moved)
        moved = optax.apply_updates(moved, updates)
    np.testing.assert_array_equal(moved["conv"]["kernel"], params["conv"]["kernel"])
    assert (np.asarray(moved["head"]["matrix"]) < 1).all()


def test_slow_parameters_are_taken_once_there_are_any():
    params, slow = {"a": jnp.ones(2)}, {"a": jnp.full(2, 3.0)}
    synchronised = optimizer.LookaheadState(jnp.int32(7), slow, ())
    assert optimizer.slow_parameters(params, synchronised) is slow
    before = optimizer.LookaheadState(jnp.int32(2), {"a": jnp.zeros(2)}, ())
    assert optimizer.slow_parameters(params, before) is params
    assert optimizer.slow_parameters(params, optax.EmptyState()) is params


@pytest.mark.nightly
@pytest.mark.x64_off
def test_what_is_kept_as_the_best_is_the_slow_parameters(tmp_path):
    """Also where another run starts from it."""
    changes = {"optimizer.lookahead_period": 2, "optimizer.name": "nadam", "num_epochs": 2}
    config = tiny_config(**changes)  # three steps an epoch
    run = train(config, tmp_path / "first", 0)
    variables, state, step = load_best(tmp_path / "first", run)
    assert step in (3, 6)

    def differ(a, b):
        return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    assert differ(variables["params"], state.opt_state.slow) < 1e-6
    second = tiny_config(**changes, init_from=str(tmp_path / "first"))
    after = Run(second, 0).fresh_state()
    assert differ(after.params, variables["params"]) == 0
    run = Run(second, 0)
    train_batch = run.batch_runner(0)
    schedule = {"epsilon": 0.1}
    state = after
    for i in range(2):
        state, _ = train_batch(state, i, schedule)
    # Adam's steps are at most about the rate: the slow parameters are near those it started from, not near 0.
    assert differ(state.params, variables["params"]) < 0.5 and differ(state.params, state.opt_state.slow) < 1e-6


@pytest.mark.nightly
@pytest.mark.x64_off
def test_between_epochs_the_slow_parameters_count_and_a_run_goes_on_as_it_was(tmp_path, monkeypatch):
    """Three steps an epoch, a synchronisation after every third one, a checkpoint at step 4; nothing is validated."""
    changes = {"optimizer.lookahead_period": 3, "optimizer.name": "nadam", "data.validation_fraction": 0.0}
    config = tiny_config(**changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", 0)
    variables, state, step = load_best(tmp_path / "stopped", Run(config, 0))
    assert step == 4
    pairs = list(zip(*map(jax.tree.leaves, (variables["params"], state.opt_state.slow, state.params)), strict=True))
    assert all(np.array_equal(found, slow) for found, slow, _ in pairs)
    assert any(not np.array_equal(found, fast) for found, _, fast in pairs)  # control
    for name in ("stopped", "whole"):
        train(config, tmp_path / name, 0)
    ends = [final_state(tmp_path / name, config) for name in ("stopped", "whole")]
    keys = [jax.tree.leaves((end.params, end.opt_state)) for end in ends]
    assert all(np.array_equal(a, b) for a, b in zip(*keys, strict=True))
