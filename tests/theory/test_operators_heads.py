"""The MLP head and its softplus: rounding errors against mpmath, Lipschitz constants against gradients and search."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.test_util import check_grads

from lipjax.errors import NotCertifiable
from lipjax.operators import LinearHead, MLPHead, softplus

mpmath.mp.prec = 200
U = 2.0**-53


def random_head(classes=4, hidden=7, features=5, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (hidden, features), (hidden,), (classes, hidden), (classes,)
    return MLPHead(*(jnp.asarray(rng.normal(size=shape) * scale) for shape in shapes))


def exact_softplus(x):
    x = mpmath.mpf(float(x))
    return mpmath.log1p(mpmath.exp(x)) if x < 50 else x + mpmath.log1p(mpmath.exp(-x))


def exact_logits(head, x):
    matrix = lambda a: mpmath.matrix(np.asarray(a).tolist())  # noqa: E731
    sums = matrix(head.w1) * matrix(x) + matrix(head.b1)
    units = mpmath.matrix([mpmath.log1p(mpmath.exp(s)) if s < 50 else s + mpmath.exp(-s) for s in sums])
    return matrix(head.w2) * units + matrix(head.b2)


def hostile_points():
    rng = np.random.default_rng(0)
    edges = np.arange(-325, 326) / 8.0  # the table's intervals end there, and at 40 the exponential counts as 0
    tiny = 10.0 ** -np.arange(1, 320, 13)
    parts = [rng.uniform(-45, 45, 1500), rng.normal(size=500), edges, np.nextafter(edges, 99), np.nextafter(edges, -99)]
    return np.concatenate([*parts, tiny, -tiny, [0.0, -0.0, 700.0, -700.0, 1e300, -1e300]])


@pytest.mark.parametrize("where", ["numpy", "jax"])
def test_softplus_and_sigmoid_are_as_exact_as_they_claim(where, monkeypatch):
    x = hostile_points()
    if where == "numpy":
        got, slope = softplus.softplus_of(x, np), softplus.sigmoid_of(x, np)
    else:
        got, slope = np.asarray(jax.jit(softplus.softplus)(x)), np.asarray(jax.jit(softplus.sigmoid)(x))
    exact = [exact_softplus(a) for a in x]
    error = np.array([float(abs(mpmath.mpf(float(a)) - b)) for a, b in zip(got, exact, strict=True)])
    assert (error <= softplus.softplus_error(got)).all()
    exact = [1 / (1 + mpmath.exp(-mpmath.mpf(float(a)))) for a in x]
    slope_error = max(float(abs(mpmath.mpf(float(a)) - b)) for a, b in zip(slope, exact, strict=True))
    assert slope_error <= softplus.SIGMOID_ERROR
    # Control: the errors are there (docs/soundness.md derives 6.1 u + u s and 4.2 u, the code allows 16 u and 8 u).
    assert error.max() > 0.5 * U and slope_error > 0.5 * U
    # Control: shorter series would be noticed.
    for name in ("_EXP", "_ATANH"):
        with monkeypatch.context() as patch:
            patch.setattr(softplus, name, getattr(softplus, name)[:-4])
            worse = softplus.softplus_of(x, np)
        assert not (np.abs(worse - got) <= softplus.softplus_error(got)).all()


def test_softplus_at_the_edges_and_its_derivatives():
    edges = jnp.array([np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(softplus.softplus(edges), [np.nan, np.inf, 0])
    np.testing.assert_array_equal(softplus.sigmoid(edges), [np.nan, 1, 0])
    x = jnp.linspace(-50.0, 50.0, 81)
    ours, theirs = jax.grad(softplus.softplus), jax.grad(jax.nn.softplus)
    np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), rtol=0, atol=64 * U)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(theirs))(x), rtol=0, atol=64 * U)


@pytest.mark.x64_off
def test_float32_is_jaxs():
    x = jnp.linspace(-100.0, 100.0, 77)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(softplus.softplus(x), jax.nn.softplus(x))
    head = jax.tree.map(lambda a: a.astype(jnp.float32), random_head())
    assert jax.jit(lambda h, x: h(x))(head, jnp.ones((2, 5))).dtype == jnp.float32
    assert jax.jit(lambda h: h.pairwise_lipschitz())(head).dtype == jnp.float32


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-6])
def test_rounding_error_covers_the_exact_logits(scale):
    head = random_head(scale=scale, hidden=40, features=30)
    x = np.random.default_rng(1).normal(size=(12, 30)) * np.logspace(-3, 3, 12)[:, None]
    computed, bound = map(np.asarray, jax.jit(lambda h, x: (h(x), h.rounding_error(x)))(head, jnp.asarray(x)))
    worst = 0.0
    for row, logits, errors in zip(x, computed, bound, strict=True):
        for exact, logit, error in zip(exact_logits(head, row), logits, errors, strict=True):
            actual = float(abs(exact - mpmath.mpf(float(logit))))
            assert actual <= error
            worst = max(worst, actual / error)
    assert worst > 1e-4  # control: there are errors, and they are not absurdly far from the bound


def test_pairwise_constants_bound_all_gradients_and_are_nearly_reached():
    head = random_head(classes=3, hidden=4, features=6)
    estimate, proved = np.asarray(head.pairwise_lipschitz()), head.pairwise_bound()
    w1, w2 = np.asarray(head.w1), np.asarray(head.w2)
    norm = np.linalg.norm(w1, 2)
    naive = norm * np.linalg.norm(w2[:, None] - w2, axis=2)
    assert (np.diag(proved) == 0).all() and (estimate <= naive * (1 + 1e-12)).all()
    assert (estimate <= proved).all() and (proved <= naive * (1 + 1e-9)).all()
    # 8 steps of power iteration come near the norm.
    exact = (np.linalg.norm((w2 @ w1)[:, None] - w2 @ w1, axis=2) + naive) / 2
    np.testing.assert_allclose(proved, exact, rtol=1e-9)
    np.testing.assert_allclose(estimate, exact, rtol=0.02)
    # The gradient is W1^T (w s) with s in (0, 1): its norm is convex in s, so vertices are the worst.
    corners = np.array(np.meshgrid(*[[0.0, 1.0]] * 4)).reshape(4, -1)
    for i, j in ((0, 1), (1, 2)):
        worst = np.linalg.norm(w1.T @ ((w2[i] - w2[j])[:, None] * corners), axis=0).max()
        assert 0.5 * proved[i, j] < worst <= proved[i, j]


def test_pairwise_bound_of_equal_rows_and_of_what_is_too_large():
    head = random_head()
    same = MLPHead(head.w1, head.b1, jnp.ones((3, 7)), head.b2[:3])
    assert (same.pairwise_bound() == 0).all() and (np.asarray(same.pairwise_lipschitz()) == 0).all()
    grad = jax.grad(lambda w2: MLPHead(head.w1, head.b1, w2, head.b2[:3]).pairwise_lipschitz().sum())(same.w2)
    assert np.isfinite(np.asarray(grad)).all()
    for name, value in (("w1", np.nan), ("b1", np.inf), ("w2", 2.0**100), ("b2", -(2.0**101))):
        arrays = {field: getattr(head, field) for field in ("w1", "b1", "w2", "b2")}
        arrays[name] = arrays[name].at[(0,) * arrays[name].ndim].set(value)
        with pytest.raises(NotCertifiable, match=name):
            MLPHead(**arrays).pairwise_bound()
    with pytest.raises(NotCertifiable, match="too large"):
        LinearHead(jnp.full((2, 2), 1e305), jnp.zeros(2)).pairwise_bound()


def test_gradient_of_the_pairwise_constants(key):
    def total(w1, w2):
        return jnp.sum(MLPHead(w1, jnp.zeros(3), w2, jnp.zeros(2)).pairwise_lipschitz() * jnp.array([[0.0, 1], [2, 0]]))

    # A dominant singular value, so that power iteration has converged and its vector may count as constant.
    rng = np.random.default_rng(5)
    w1 = jnp.asarray(np.outer(rng.normal(size=3), rng.normal(size=4)) + 1e-3 * rng.normal(size=(3, 4)))
    check_grads(total, (w1, jnp.asarray(rng.normal(size=(2, 3)))), 1, modes=["rev"], rtol=1e-5)


def test_shapes_are_checked():
    head = random_head()
    head.check()
    assert head.in_shape == (5,) and head.out_shape == (4,)
    with pytest.raises(ValueError, match=r"\(b, 5\)"):
        head(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"w1 \(hidden, features\).*\(7, 5\), \(6,\)"):
        MLPHead(head.w1, head.b1[:6], head.w2, head.b2).check()
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        MLPHead(head.w1, head.b1, head.w2[:, :6], head.b2).check()
    with pytest.raises(ValueError, match="b2"):
        MLPHead(head.w1, head.b1, head.w2, head.b2[:, None]).check()
