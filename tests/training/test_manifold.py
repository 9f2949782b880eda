"""Adam on the orthogonal group: traces in NumPy with SciPy's exponential, problems with known answers, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.sharding import AxisType
from tiers import everyday
from training_helpers import quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from lipjax import _spread, linalg, manifold
from lipjax.errors import UserError
from lipjax.training import optimizer
from lipjax.training.loop import Run

U32, U64 = 2.0**-24, 2.0**-53


def orthonormal(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    wide = shape[-2] < shape[-1]
    q = np.linalg.qr(np.swapaxes(x, -1, -2) if wide else x)[0]
    return np.swapaxes(q, -1, -2) if wide else q


def departure(x):
    """The largest |X^T X - I| in spectral norm, in double precision."""
    x = np.asarray(x, np.float64)
    x = np.swapaxes(x, -1, -2) if x.shape[-2] < x.shape[-1] else x
    return np.linalg.norm(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1]), 2, axis=(-2, -1)).max()


@functools.cache
def compiled_step(transform):
    """(gradients, state, parameters) -> parameters and state, by optax's rules."""

    def step(gradients, state, params):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def walk(transform, params, gradients):
    """The parameters after each update, by one compiled program for all of them, and the last state."""
    update, state, found = compiled_step(transform), transform.init(params), []
    for g in gradients:
        params, state = update(g, state, params)
        found.append(params)
    assert update._cache_size() == 1
    return found, state


# ---- the steps, by hand ----------------------------------------------------------------------------------------------


def skew_part(a):
    return (a - a.T) / 2


def trace(x, gradients, rate, b2, moments, period=None, part=0.5, retract=10**9, eps=1e-8):
    """Skew Adam of one square matrix, its Lookahead and its retraction, with dense exponentials and an SVD."""
    m, v, slow, total, found = np.zeros_like(x), np.zeros_like(x), x, np.zeros_like(x), []
    for t, g in enumerate(gradients, start=1):
        h = skew_part(x.T @ g) if moments == "skew" else g
        m, v = 0.9 * m + 0.1 * h, b2 * v + (1 - b2) * h**2
        d = -rate(t - 1) * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        d = d if moments == "skew" else skew_part(x.T @ d)
        x, total = x @ scipy.linalg.expm(d), total + d
        if period and (t % period == 0 or t % retract == 0):
            slow = slow @ scipy.linalg.expm(part * total)
            x, total = slow, np.zeros_like(x)
        if t % retract == 0:
            u, _, w = np.linalg.svd(x)
            x = slow = u @ w
        found.append(x)
    return np.array(found)


@pytest.mark.parametrize(
    ("moments", "b2", "more"),
    [
        ("skew", 0.999, {}),
        ("skew", 0.999, {"lookahead_period": 3, "retract_every": 7}),
        ("euclidean", 0.95, {"lookahead_period": 2, "lookahead_rate": 0.8}),
    ],
)
def test_steps_are_those_of_the_definition(moments, b2, more):
    start, gradients = orthonormal(2, 5, 5), np.random.default_rng(1).normal(size=(11, 2, 5, 5))
    rate = lambda count: 0.05 / (1 + count)  # noqa: E731
    transform = manifold.skew_adam(rate, moments=moments, exponential="exact", **more)
    found, state = walk(transform, jnp.asarray(start), jnp.asarray(gradients))
    given = {"period": more.get("lookahead_period"), "part": more.get("lookahead_rate", 0.5)}
    given["retract"] = more.get("retract_every", 100)
    for i in range(2):
        expected = trace(start[i], gradients[:, i], rate, b2, moments, **given)
        np.testing.assert_allclose(np.array(found)[:, i], expected, rtol=0, atol=1000 * U64)
        other = trace(start[i], gradients[:, i], rate, 0.5, moments, **given)
        assert np.abs(other - expected).max() > 1e-3  # control
        another = trace(
            start[i], gradients[:, i], rate, b2, {"skew": "euclidean", "euclidean": "skew"}[moments], **given
        )
        assert np.abs(another - expected).max() > 1e-2  # the two kinds of moments are two methods
    assert int(state.count) == 11


def test_lookahead_turns_half_as_far():
    """Rotations of the plane commute: at a synchronisation the angle is half of the sum of the steps."""
    transform = manifold.skew_adam(0.01, exponential=4, lookahead_period=4)
    g = jnp.array([[0.0, 1.0], [-1.0, 0.0]])  # a gradient that X's turning does not change: of the angle
    x, state, angles = jnp.eye(2), transform.init(jnp.eye(2)), []
    for _ in range(8):
        x, state = compiled_step(transform)(x @ g, state, x)
        angles.append(float(jnp.arctan2(x[1, 0], x[0, 0])))
    # Adam's steps in a steady direction are the rate.
    np.testing.assert_allclose(angles, 0.01 * np.array([1, 2, 3, 2, 3, 4, 5, 4]), rtol=1e-6)
    np.testing.assert_allclose(state.slow, x, atol=4 * U64)
    assert not np.asarray(state.travelled).any()


# ---- orthogonal for long ---------------------------------------------------------------------------------------------


def drift(transform, params, num_steps, seed=0):
    """The largest departure of every step, by noisy gradients, in one program."""

    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key, len(params))
        g = {name: jax.random.normal(k, p.shape) for k, (name, p) in zip(keys, params.items(), strict=True)}
        g = {name: g[name] + p[..., ::-1] for name, p in params.items()}  # something to go to
        updates, state = transform.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), {name: _gap(p) for name, p in params.items()}

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, transform.init(params)), jax.random.split(jax.random.key(seed), num_steps))

    (params, state), gaps = run(params)
    return params, state, {name: np.asarray(g) for name, g in gaps.items()}


def _gap(x):
    """|X^T X - I| in Frobenius norm, which is above the spectral norm."""
    x = jnp.swapaxes(x, -1, -2) if x.shape[-2] < x.shape[-1] else x
    gram = jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision="highest") - jnp.eye(x.shape[-1])
    return jnp.sqrt(jnp.sum(gram**2, (-2, -1)).max())


def three_shapes(dtype=jnp.float32):
    shapes = {"square": (2, 12, 12), "tall": (9, 4), "wide": (5, 11)}
    return {name: jnp.asarray(orthonormal(*shape), dtype) for name, shape in shapes.items()}


@pytest.mark.x64_off
@pytest.mark.parametrize("moments", everyday(manifold.MOMENTS, "skew"))
def test_a_thousand_steps_stay_orthogonal_in_float32(moments):
    transform = manifold.skew_adam(1e-2, moments=moments)
    names = ("square", "wide") if moments == "skew" else ("tall",)
    start = {name: three_shapes()[name] for name in names}
    params, state, gaps = drift(transform, start, 1000)
    for name, x in params.items():
        assert x.dtype == jnp.float32 and gaps[name].max() < 1e-5 and departure(x) < 1e-5
        # The last update was a retraction: what is left is rounding of X + (X_new - X), an ulp of each entry.
        assert departure(x) < 4 * np.sqrt(min(x.shape[-2:])) * U32
        assert np.abs(np.asarray(x) - three_shapes()[name]).max() > 0.3  # it has gone somewhere
    if moments == "skew":
        a, v = state.mu["square"], state.nu["square"]
        assert (a == -jnp.swapaxes(a, -1, -2)).all() and (v == jnp.swapaxes(v, -1, -2)).all() and np.asarray(a).any()


@pytest.mark.x64_off
def test_plain_adam_leaves():
    """The control of the test above."""
    _, _, gaps = drift(optax.adam(1e-2), {"tall": three_shapes()["tall"]}, 100)
    assert min(g.max() for g in gaps.values()) > 0.1


@pytest.mark.x64_off
def test_retractions_take_off_what_a_short_series_adds():
    """Steps of 0.3 radians at order 2 expand by t^4/8 each: visible at once, gone after each tenth step."""
    transform = manifold.skew_adam(0.1, exponential=2, retract_every=10)
    _, _, gaps = drift(transform, {"tall": three_shapes()["tall"]}, 40)
    for name in gaps:
        between, after = np.delete(gaps[name], np.s_[9::10]), gaps[name][9::10]
        assert after.max() < 3e-6 and between.max() > 1e-3, name


# ---- known answers ---------------------------------------------------------------------------------------------------


@functools.cache
def solver(moments):
    """(start, M) -> the last of 700 steps towards M, by rates that come down to 1e-5."""
    transform = manifold.skew_adam(optax.exponential_decay(0.2, 50, 0.5), b2=0.9, moments=moments)

    def solve(x, m):
        def step(carry, _):
            x, state = carry
            updates, state = transform.update(x - m, state, x)
            return (x + updates, state), None

        return jax.lax.scan(step, (x, transform.init(x)), None, 700)[0][0]

    return jax.jit(solve)


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)])
def test_procrustes(shape):
    """The matrix with orthonormal columns nearest to M is its polar factor, by an SVD and by gradient descent."""
    stretch = np.diag(np.random.default_rng(2).uniform(0.5, 2, min(shape)))
    answer, start = orthonormal(*shape, seed=3), orthonormal(*shape, seed=4)
    if shape[0] == shape[1]:  # two components: start in that of the answer
        start[:, 0] *= np.sign(np.linalg.det(start) * np.linalg.det(answer))
    m = answer @ stretch if shape[0] >= shape[1] else stretch @ answer
    np.testing.assert_allclose(solver("skew")(jnp.asarray(start), jnp.asarray(m)), answer, atol=1e-3)
    descent, target, aim = (a if shape[0] >= shape[1] else a.T for a in (start, m, answer))
    for _ in range(400):
        g = descent - target
        g = g - descent @ (descent.T @ g + g.T @ descent) / 2
        a, _, b = np.linalg.svd(descent - 0.3 * g, full_matrices=False)
        descent = a @ b
    np.testing.assert_allclose(descent, aim, atol=1e-6)
    assert np.abs(start - answer).max() > 0.3  # control


def test_euclidean_moments_stop_where_the_gradient_does():
    """Not where its tangent part does: divided by its size first, a steady normal gradient has a tangent part."""
    answer, start = orthonormal(5, 5, seed=3), orthonormal(5, 5, seed=4)
    start[:, 0] *= np.sign(np.linalg.det(start) * np.linalg.det(answer))
    stretched = answer @ np.diag([0.5, 0.8, 1.1, 1.5, 2.0])
    solve = solver("euclidean")
    np.testing.assert_allclose(solve(jnp.asarray(start), jnp.asarray(answer)), answer, atol=1e-3)
    assert np.abs(solve(jnp.asarray(answer), jnp.asarray(stretched)) - answer).max() > 0.05
    still = solver("skew")(jnp.asarray(answer), jnp.asarray(stretched))
    np.testing.assert_allclose(still, answer, atol=1e-3)


# ---- with the rest of optax ------------------------------------------------------------------------------------------


def model_parameters():
    mix = jnp.asarray(orthonormal(3, 4, 4), jnp.float32)
    ones = jnp.ones((2, 4), jnp.float32)
    return {"block": {"orthogonal_mix": mix, "bias": ones[0]}, "head": {"matrix": ones}}


def test_it_composes_with_clipping_and_other_optimisers():
    params, rng = model_parameters(), np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: (10 * rng.normal(size=p.shape)).astype(np.float32), params) for _ in range(4)]
    assert jax.tree.leaves(manifold.labels(params)) == ["rest", "orthogonal", "rest"]
    single = manifold.skew_adam(0.01, eps=0.1, exponential=4)
    both = manifold.partition(single, optax.adam(0.02, eps=0.1))
    found, _ = walk(optax.chain(optax.clip_by_global_norm(0.5), both), params, gradients)
    norms = [np.sqrt(sum(np.sum(a**2) for a in jax.tree.leaves(g))) for g in gradients]
    clipped = [jax.tree.map(lambda a, n=n: a * min(1, 0.5 / n), g) for g, n in zip(gradients, norms, strict=True)]
    mix = [p["block"]["orthogonal_mix"] for p in clipped]
    alone, _ = walk(single, params["block"]["orthogonal_mix"], mix)
    rest, _ = walk(optax.adam(0.02, eps=0.1), params["head"]["matrix"], [p["head"]["matrix"] for p in clipped])
    for end, expected in ((found[-1]["block"]["orthogonal_mix"], alone[-1]), (found[-1]["head"]["matrix"], rest[-1])):
        np.testing.assert_allclose(end, expected, atol=20 * U32)
    # Control: eps lets the size of gradients matter.
    unclipped, _ = walk(single, params["block"]["orthogonal_mix"], [g["block"]["orthogonal_mix"] for g in gradients])
    assert np.abs(unclipped[-1] - alone[-1]).max() > 1e-3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mix": 1.1 * np.eye(3)}, r"of the parameter \['mix'\] \|X\^T X - I\| is 0.364 in Frobenius norm"),
        ({"mix": np.ones((2, 3, 2))}, "nearest such matrix"),
        ({"bias": np.ones(3)}, r"the parameter \['bias'\] is float64 \(3,\)"),
        (np.eye(3, dtype=np.int32), "the parameter given is int32"),
        ({"nan": np.full((2, 2), np.nan)}, "is nan in Frobenius norm"),
    ],
)
def test_parameters_that_are_not_orthogonal_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        manifold.skew_adam(0.1).init(jax.tree.map(jnp.asarray, params))
    rounded = jnp.asarray(orthonormal(40, 40), jnp.bfloat16).astype(jnp.float32)
    with pytest.raises(ValueError, match="Frobenius"):
        manifold.skew_adam(0.1).init(rounded)
    manifold.skew_adam(0.1).init(linalg.polar(rounded))  # control


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moments": "both"}, "moments to be one of \\('skew', 'euclidean'\\), got 'both'"),
        ({"exponential": 5}, "exponential"),
        ({"learning_rate": 0.0}, "learning_rate to be a positive number or a schedule"),
        ({"b1": 1.0}, "b1"),
        ({"b2": 1.0}, "b2"),
        ({"eps": 0.0}, "eps"),
        ({"retract_every": 0}, "retract_every"),
        ({"lookahead_period": -1}, "lookahead_period"),
        ({"lookahead_rate": 1.5}, "lookahead_rate"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        manifold.skew_adam(**{"learning_rate": 0.1, **arguments})


def test_parameters_must_be_given():
    transform = manifold.skew_adam(0.1)
    with pytest.raises(ValueError, match="update\\(gradients, state, params\\)"):
        transform.update(jnp.eye(2), transform.init(jnp.eye(2)))


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_eight_devices_share_a_stack(monkeypatch):
    """Each moves its matrices, and the results are gathered: the products are of 2 of 16 matrices."""
    monkeypatch.setattr(_spread, "SMALL", 0)  # however small
    x, g = jnp.asarray(orthonormal(16, 6, 6)), jnp.asarray(np.random.default_rng(1).normal(size=(16, 6, 6)))
    transform = manifold.skew_adam(0.1, retract_every=2, lookahead_period=3)

    def several(x, g):
        def step(carry, _):
            x, state = carry
            updates, state = transform.update(g, state, x)
            return (x + updates, state), x

        (x, state), found = jax.lax.scan(step, (x, transform.init(x)), None, 4)
        return found, x, state.slow

    alone = jax.jit(several)(x, g)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        compiled = jax.jit(several, in_shardings=whole, out_shardings=whole).lower(x, g).compile()
        shared = compiled(*jax.device_put((x, g), whole))
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=200 * U64)
    products = [line for line in compiled.as_text().splitlines() if " dot(" in line]
    assert len(products) > 20 and all("f64[2,6,6]" in line.partition("=")[2] for line in products)
    single = [line for line in jax.jit(several).lower(x, g).compile().as_text().splitlines() if " dot(" in line]
    assert single and all("f64[16,6,6]" in line for line in single)  # control


# ---- training --------------------------------------------------------------------------------------------------------


def group(**changes):
    names = {"name": "manifold_adam", "schedule": "step", "warmup_epochs": 0.0, "clip_norm": 0.0, **changes}
    return tiny_config(**{f"optimizer.{name}": value for name, value in names.items()}).optimizer


@pytest.mark.x64_off
def test_the_entry_of_the_trainer_moves_both_kinds():
    """Nadam for the rest; Lookahead of both at the same steps: every third and the end of an epoch, the fifth."""
    params, rng = model_parameters(), np.random.default_rng(0)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(7)]
    config = group(others="nadam", lookahead_period=3, learning_rate=0.1, orthogonal_rate=0.2, exponential="exact")
    found, state = walk(optimizer.make_optimizer(config, 5, 100), params, gradients)
    mix = [g["block"]["orthogonal_mix"] for g in gradients]
    alone = manifold.skew_adam(0.02, exponential="exact", retract_every=5, lookahead_period=3)
    alone, _ = walk(alone, params["block"]["orthogonal_mix"], mix)
    rest = {name: p for name, p in params.items() if name == "head"}
    others = optimizer.make_optimizer(group(name="nadam", lookahead_period=3, learning_rate=0.1), 5, 100)
    others, _ = walk(others, rest, [{"head": g["head"]} for g in gradients])
    for t in range(7):
        np.testing.assert_allclose(found[t]["block"]["orthogonal_mix"], alone[t], rtol=0, atol=20 * U32)
        np.testing.assert_allclose(found[t]["head"]["matrix"], others[t]["head"]["matrix"], rtol=0, atol=50 * U32)
    slow = optimizer.slow_parameters(found[-1], state)  # of the sixth step
    np.testing.assert_allclose(slow["block"]["orthogonal_mix"], alone[5], rtol=0, atol=20 * U32)
    assert departure(slow["block"]["orthogonal_mix"]) < 1e-6
    usual = optimizer.make_optimizer(group(name="nadam", lookahead_period=3, learning_rate=0.1), 5, 100)
    assert departure(walk(usual, params, gradients)[0][-1]["block"]["orthogonal_mix"]) > 0.1  # control


@pytest.mark.x64_off
def test_a_model_without_orthogonal_parameters_is_refused():
    with pytest.raises(UserError, match='^config.optimizer.name = "manifold_adam" keeps .* none: take "adamw"'):
        Run(tiny_config(**{"optimizer.name": "manifold_adam"}), 0)
    optimizer.check_start(group(), model_parameters())
    stretched = {"block": {"orthogonal_mix": 2 * jnp.eye(3), "bias": jnp.ones(3)}}
    with pytest.raises(UserError, match="orthogonal_mix.*5.2 in Frobenius"):
        optimizer.check_start(group(), stretched)
    optimizer.check_start(group(name="adamw"), stretched)


def test_states_have_arrays_alone():
    """Orbax saves them, and `jax.eval_shape` of a fresh state is what a checkpoint is restored to."""
    transform = optimizer.make_optimizer(group(lookahead_period=2), 5, 2)
    fresh = jax.eval_shape(transform.init, model_parameters())
    params = model_parameters()
    _, after = jax.eval_shape(transform.update, params, fresh, params)
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert describe(fresh) == describe(after)
