"""Operators: shapes, adjoints, bounds against dense SVDs, rounding errors against exact arithmetic, pytrees."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

from lipjax import operators
from lipjax.errors import NotCertifiable

run = jax.jit(lambda op, x: op(x))
run_back = jax.jit(lambda op, y: op.adjoint(y))
estimate = jax.jit(lambda op, v, num_iters: op.estimate(v, num_iters), static_argnums=2)
rounding_error = jax.jit(lambda op, x: op.rounding_error(x))


def to_matrix(op):
    """The dense matrix of a linear operator, by applying it to the identity."""
    size = int(np.prod(op.in_shape))
    images = run(op, np.eye(size).reshape(size, *op.in_shape))
    return np.asarray(images).reshape(size, -1).T


def conv_operator(kernel=(3, 3), size=(5, 4), strides=1, padding="ZERO", seed=0, channels=(2, 3)):
    values = np.random.default_rng(seed).normal(size=(*kernel, *channels))
    return operators.Conv(jnp.asarray(values), (*size, channels[0]), strides, padding)


def grouped(groups, kernel=(3, 3), size=(5, 4), channels=(2, 3), strides=1, padding="ZERO", dilation=1):
    values = np.random.default_rng(groups).normal(size=(*kernel, channels[0] // groups, channels[1]))
    return operators.Conv(jnp.asarray(values), (*size, channels[0]), strides, padding, groups, dilation)


LINEAR = {
    "dense tall": operators.Dense(jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)))),
    "dense wide": operators.Dense(jnp.asarray(np.random.default_rng(1).normal(size=(3, 9)))),
    "conv": conv_operator(),
    "conv strided": conv_operator(strides=2),
    "conv even": conv_operator((2, 4), (6, 6), padding="VALID"),
    "conv patches": conv_operator((4, 4), (8, 8), 4, "VALID"),
    "conv circular": conv_operator(padding="CIRCULAR", size=(4, 6), strides=2),
    "conv 1x1 map": conv_operator(size=(1, 1)),
    "conv groups": grouped(2, channels=(4, 6)),
    "conv depthwise dilated": grouped(4, channels=(4, 8), dilation=2),
    "conv groups circular strided dilated even": grouped(
        2, (2, 4), (6, 4), channels=(2, 4), strides=2, padding="CIRCULAR", dilation=(3, 2)
    ),
    "conv dilation beyond the map": grouped(1, (3, 3), (2, 2), dilation=3),
    "conv circular dilation beyond the map": grouped(1, (3, 3), (4, 3), padding="CIRCULAR", dilation=5),
    "transposed": operators.ConvTranspose(conv_operator(strides=2)),
    "transposed circular groups": operators.ConvTranspose(
        grouped(2, (3, 2), (4, 6), channels=(4, 4), strides=2, padding="CIRCULAR", dilation=2)
    ),
    "transposed unpadded": operators.ConvTranspose(grouped(1, (4, 4), (9, 8), strides=4, padding="VALID")),
    "conv kernel larger than map": conv_operator((5, 5), (2, 3), padding="CIRCULAR"),
}


EVERYDAY = ("dense wide", "conv", "conv strided", "conv circular", "conv groups circular strided dilated even")
EVERYDAY += ("conv dilation beyond the map", "transposed circular groups")


@pytest.mark.quick_compiles
@pytest.mark.parametrize("name", everyday(LINEAR, *EVERYDAY))
def test_shapes_adjoint_estimate_and_bound(name):
    op = LINEAR[name]
    matrix = to_matrix(op)
    assert matrix.shape == (np.prod(op.out_shape), np.prod(op.in_shape))
    rng = np.random.default_rng(0)
    y, v = rng.normal(size=(2, *op.out_shape)), rng.normal(size=op.in_shape)
    back = np.asarray(run_back(op, y)).reshape(2, -1)
    np.testing.assert_allclose(back, y.reshape(2, -1) @ matrix, atol=1e-12)
    norm = np.linalg.norm(matrix, 2)
    bound = op.bound()
    assert norm * (1 - 1e-13) <= bound.proved <= norm * 1.35
    sigma, advanced = estimate(op, v, 500)
    assert norm * 0.99 < float(sigma) <= norm * (1 + 1e-13) and advanced.shape == op.in_shape
    few, _ = estimate(op, v, 0)
    assert float(few) < norm * 0.999  # control: an estimate can be low, and then it is no bound


@pytest.mark.parametrize("name", LINEAR)
def test_a_batch_of_another_shape_is_refused(name):
    op = LINEAR[name]
    with pytest.raises(ValueError, match="expects a batch"):
        op(jnp.zeros((2, *op.in_shape, 1)))


def test_operators_are_pytrees_whose_shapes_are_static():
    op = conv_operator()
    leaves, tree = jax.tree.flatten(op)
    assert len(leaves) == 1
    doubled = jax.tree.unflatten(tree, [2 * leaves[0]])
    assert doubled.in_shape == op.in_shape and doubled.padding == op.padding
    x = jnp.ones((1, *op.in_shape))
    np.testing.assert_allclose(jax.jit(lambda o, a: o(a))(doubled, x), 2 * op(x), rtol=1e-14)


def test_structures_of_operators_of_different_types_differ():
    """jit takes a program by the structure of its arguments; JAX's own dataclass nodes compare fields alone."""
    structures = [jax.tree.structure(getattr(operators, name)((4,))) for name in ("MaxMin", "Flatten", "MaxPoolPairs")]
    assert len({*structures}) == 3
    assert not any(a == b for i, a in enumerate(structures) for b in structures[:i])
    assert structures[0] == jax.tree.structure(operators.MaxMin((4,))) != jax.tree.structure(operators.MaxMin((2,)))


def exact_dense(matrix, x):
    """The error-free product, as fractions."""
    return [sum(Fraction(float(m)) * Fraction(float(a)) for m, a in zip(row, x, strict=True)) for row in matrix]


@pytest.mark.parametrize("name", LINEAR)
def test_rounding_error_covers_the_distance_to_exact_arithmetic(name):
    op = LINEAR[name]
    # Values of both signs and many magnitudes: cancellation makes the relative error of single outputs large.
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, *op.in_shape)) * 10.0 ** rng.integers(-8, 8, (3, *op.in_shape))
    computed = np.asarray(run(op, x)).reshape(3, -1)
    claimed = np.asarray(rounding_error(op, x))
    matrix = to_matrix(op)
    largest = 0.0
    for row, got, bound in zip(x.reshape(3, -1), computed, claimed, strict=True):
        distance = sum((e - Fraction(float(g))) ** 2 for e, g in zip(exact_dense(matrix, row), got, strict=True))
        assert distance <= Fraction(float(bound)) ** 2
        largest = max(largest, float(distance) ** 0.5 / bound)
    assert largest > 0 or matrix.shape[1] == 2  # control: rounding does happen


def test_rounding_error_of_a_bias_and_of_the_head():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(4, 6)) * 10.0 ** rng.integers(-5, 5, (4, 6))
    bias = rng.normal(size=6)
    op = operators.Bias(jnp.asarray(bias), (6,))
    got, claimed = np.asarray(op(jnp.asarray(x))), np.asarray(op.rounding_error(jnp.asarray(x)))
    errors = []
    for i in range(4):
        exact = [Fraction(float(a)) + Fraction(float(b)) for a, b in zip(x[i], bias, strict=True)]
        distance = sum((e - Fraction(float(g))) ** 2 for e, g in zip(exact, got[i], strict=True))
        assert distance <= Fraction(float(claimed[i])) ** 2
        errors.append(distance)
    assert max(errors) > 0
    head = operators.LinearHead(jnp.asarray(rng.normal(size=(3, 6))), jnp.asarray(rng.normal(size=3)))
    logits, claimed = np.asarray(head(jnp.asarray(x))), np.asarray(head.rounding_error(jnp.asarray(x)))
    errors = []
    for i in range(4):
        exact = exact_dense(np.asarray(head.matrix), x[i])
        for j in range(3):
            error = abs(exact[j] + Fraction(float(head.bias[j])) - Fraction(float(logits[i, j])))
            assert error <= Fraction(float(claimed[i, j]))
            errors.append(error)
    assert max(errors) > 0


@pytest.mark.parametrize(
    "op", [operators.Bias(jnp.arange(4.0), (3, 3, 4)), operators.MaxMin((3, 3, 4)), operators.Flatten((3, 3, 4))]
)
def test_isometric_operators_never_stretch(op):
    x, y = np.random.default_rng(0).normal(size=(2, 50, *op.in_shape))
    moved = np.linalg.norm(np.asarray(run(op, x) - run(op, y)).reshape(50, -1), axis=1)
    apart = np.linalg.norm((x - y).reshape(50, -1), axis=1)
    assert (moved <= apart * (1 + 1e-14)).all() and op.bound().proved == 1.0
    if not isinstance(op, operators.MaxMin):
        np.testing.assert_allclose(moved, apart, rtol=1e-14)


def test_maxmin_sorts_halves_and_needs_pairs():
    y = operators.MaxMin((4,))(jnp.array([[1.0, 5.0, 3.0, 2.0]]))
    np.testing.assert_array_equal(np.asarray(y), [[3.0, 5.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="even number"):
        operators.MaxMin((3,))


def test_pairwise_bound_covers_the_exact_distances_of_rows():
    rng = np.random.default_rng(11)
    for scale in (1.0, 1e-280, 1e150):
        w = rng.normal(size=(4, 5)) * scale
        w[2] = w[0] * (1 + 1e-12)  # a difference that cancels
        w[3] = w[1]
        head = operators.LinearHead(jnp.asarray(w), jnp.zeros(4))
        bound = head.pairwise_bound()
        for i, j in np.ndindex(4, 4):
            exact = sum((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in zip(w[i], w[j], strict=True))
            assert exact <= Fraction(float(bound[i, j])) ** 2
            if exact:
                assert Fraction(float(bound[i, j])) ** 2 <= exact * Fraction(1 + 1e-12)
        assert bound[1, 3] == 0 and (np.diag(bound) == 0).all()
    with pytest.raises(NotCertifiable, match="finite"):
        operators.LinearHead(jnp.array([[1.0, np.inf]]), jnp.zeros(1)).pairwise_bound()


@pytest.mark.parametrize("rows", [3, 400])
def test_pairwise_lipschitz_and_its_gradient(rows):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 120)))
    head = lambda m: operators.LinearHead(m, jnp.zeros(rows))  # noqa: E731
    expected = np.linalg.norm(np.asarray(w)[:, None] - np.asarray(w)[None], axis=2)
    pairwise = jax.jit(lambda m: head(m).pairwise_lipschitz())
    np.testing.assert_allclose(np.asarray(pairwise(w)), expected, rtol=1e-12, atol=1e-300)
    grad = jax.jit(jax.grad(lambda m: pairwise(m)[0, 1]))(w)
    np.testing.assert_allclose(np.asarray(grad[0]), np.asarray(w[0] - w[1]) / expected[0, 1], rtol=1e-12)
    assert np.isfinite(np.asarray(jax.jit(jax.grad(lambda m: pairwise(m).sum()))(w))).all()
