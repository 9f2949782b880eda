"""Networks made to mislead the float64 evaluation: no radius may be larger than exact rational arithmetic allows."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import operators
from lipjax.certify import FrozenNetwork
from lipjax.certify.frozen import float64_on_cpu
from lipjax.errors import NotCertifiable, UserError
from lipjax.network import Network, make_network

U = 2.0**-53


def frozen(ops, matrix, bias, std=1.0):
    with float64_on_cpu():
        head = operators.LinearHead(jnp.asarray(matrix, float), jnp.asarray(bias, float))
        ops = [(f"op{i}", jax.tree.map(lambda a: jnp.asarray(a, float), op)) for i, op in enumerate(ops)]
        return FrozenNetwork(jax.tree.map(np.asarray, make_network(ops, head, 0.0, std)))


def dense(matrix):
    return operators.Dense(np.asarray(matrix, float))


def exact_logits(network, image):
    """Dense, Bias and MaxMin in rational arithmetic, without the library's operators."""
    z = [Fraction(float(v)) / Fraction(float(network.input_std[0])) for v in image]
    for part in (*network.ops, network.head):
        if isinstance(part, operators.Dense | operators.LinearHead):
            z = [
                sum((Fraction(float(w)) * v for w, v in zip(row, z, strict=True) if w), Fraction(0))
                for row in part.matrix
            ]
        if isinstance(part, operators.Bias | operators.LinearHead):
            z = [v + Fraction(float(b)) for v, b in zip(z, part.bias, strict=True)]
        if isinstance(part, operators.MaxMin):
            half = len(z) // 2
            pairs = list(zip(z[:half], z[half:], strict=True))
            z = [max(p) for p in pairs] + [min(p) for p in pairs]
    return z


def sum_that_starts_at_the_bias():
    """Compiled together, W x + b loses every product, each half an ulp of b."""
    weights = np.zeros((2, 784))
    weights[0] = 0.99 * U
    return frozen([dense(weights), operators.Bias(np.ones(2), (2,))], np.eye(2), [0, 784 * U / 2]), np.ones(784)


def underflowing_product():
    ops = [dense([[1e-160], [0]]), dense(1e-160 * np.eye(2)), dense(1e300 * np.eye(2))]
    return frozen(ops, [[1e20, 0], [0, 0]], [0, 0.5]), np.ones(1)


def subnormal_weight():
    return frozen([dense([[1e-310], [0]]), dense(1e308 * np.eye(2))], [[100, 0], [0, 0]], [0, 0.5]), np.ones(1)


def subnormal_weights_and_maxmin():
    ops = [dense([[1e-310], [2e-310]]), operators.MaxMin((2,)), dense(1e308 * np.eye(2))]
    return frozen(ops, [[100, 0], [0, 0]], [0, 0.5]), np.ones(1)


def underflowing_norm():
    weights = np.zeros((2, 784))
    weights[0] = 0.99 * U
    weights[:, 0] = 1
    ops = [dense(2.0**-565 * weights), dense(2.0**565 * np.eye(2))]
    return frozen(ops, np.eye(2), [0, 600 * 0.99 * U]), np.ones(784)


def subnormal_head():
    return frozen([dense(2.0**-400 * np.diag([1, 0]))], 2.0**-640 * np.eye(2), [0, 2.0**-1021]), np.ones(2)


def tiny_std():
    ops = [dense(1e-100 * np.eye(2)), operators.Bias(np.array([-1.0, 1.0]), (2,))]
    return frozen(ops, np.eye(2), [0, 0], std=1e-100), np.array([1.0, 1e-17])


CASES = [
    sum_that_starts_at_the_bias,
    underflowing_product,
    subnormal_weight,
    subnormal_weights_and_maxmin,
    underflowing_norm,
    subnormal_head,
    tiny_std,
]


@pytest.mark.parametrize("batch_size", [1, 2, 256])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_margins_lie_below_exact_arithmetic(case, batch_size):
    network, image = case()
    predictions, lower = network.margins(image[None], batch_size)
    exact = exact_logits(network.network, image)
    p = predictions[0]
    assert Fraction(float(lower[0, 1 - p])) <= exact[p] - exact[1 - p]
    found = network.certify(image[None], batch_size)
    assert found.radii[0] == 0 or exact[found.predictions[0]] == max(exact)


def test_the_cases_do_mislead():
    """Control: what float64 computes without error bounds prefers the wrong class, or by too much, in these cases."""
    misled = 0
    for case in CASES[1:5]:
        network, image = case()
        computed = network(image[None])[0]
        exact = exact_logits(network.network, image)
        misled += int(np.argmax(computed) != max(range(2), key=lambda i: exact[i]))
    assert misled >= 3
    network, image = sum_that_starts_at_the_bias()

    @jax.jit
    def fused(net, x):
        return net(x)

    with float64_on_cpu():
        computed = np.asarray(fused(jax.tree.map(jnp.asarray, network.network), jnp.asarray(image[None])))[0]
    exact = exact_logits(network.network, image)
    assert abs(Fraction(float(computed[0])) - exact[0]) > Fraction(50 * U)  # far beyond one rounding of each sum


def test_an_ambient_matmul_precision_changes_nothing():
    network = frozen([dense(np.eye(2))], [[1 + 2**-10, 0], [0, 1]], [0, 2**-11])
    image = np.ones((1, 2))
    expected = network.certify(image)
    jax.clear_caches()
    with jax.default_matmul_precision("BF16_BF16_F32"):
        got = network.certify(image)
        with jax.enable_x64(True):
            poor = network.network(jnp.asarray(image))
    assert expected.predictions[0] == got.predictions[0] == 0
    assert got.radii[0] == expected.radii[0] > 0
    assert float(poor[0, 0]) < float(poor[0, 1])  # control: unpinned, the wrong class wins


def holding(op, *arrays):
    """The operator with other arrays, past the checks of its constructor."""
    return jax.tree.unflatten(jax.tree.structure(op), arrays)


def test_a_bias_that_would_broadcast_is_refused():
    bias = holding(operators.Bias(np.zeros(1), (1,)), np.zeros(9))
    weights = operators.Dense(np.concatenate([np.ones((1, 9)), np.zeros((1, 9))]))
    head = operators.LinearHead(np.eye(2), np.array([0, 4.5]))
    with pytest.raises(ValueError, match="bias of shape"):
        FrozenNetwork(Network((bias, weights), head, np.zeros(1), np.ones(1), ("bias", "dense")))


DENSE, HEAD = operators.Dense(np.eye(3)), operators.LinearHead(np.eye(3), np.zeros(3))


@pytest.mark.parametrize(
    ("ops", "head", "mean"),
    [
        ((holding(DENSE, np.ones(3)),), HEAD, np.zeros(1)),
        ((DENSE,), holding(HEAD, np.eye(3), np.zeros(1)), np.zeros(1)),
        ((DENSE,), HEAD, np.zeros(2)),
        ((holding(operators.Conv(np.ones((1, 1, 3, 3)), (1, 1, 3)), np.ones((1, 1, 1, 3))),), HEAD, np.zeros(1)),
    ],
)
def test_arrays_of_other_shapes_are_refused(ops, head, mean):
    with pytest.raises(ValueError, match="Expected|expects"):
        FrozenNetwork(Network(ops, head, mean, np.ones(1), ("op",)))


def test_frozen_arrays_are_copies_that_cannot_be_written():
    weights = np.eye(2)
    with float64_on_cpu():
        network = make_network([("d", operators.Dense(jnp.eye(2)))], operators.LinearHead(jnp.eye(2), jnp.zeros(2)))
    network = jax.tree.map(np.asarray, network)
    network = Network((operators.Dense(weights),), network.head, network.input_mean, network.input_std, network.names)
    made = FrozenNetwork(network)
    weights *= 100
    assert made.margin_lipschitz()[0, 1] < 1.5
    with pytest.raises(ValueError, match="read-only"):
        made.network.ops[0].matrix[0, 0] = 100


def test_what_cannot_be_certified(monkeypatch):
    huge = frozen([dense(np.eye(2))], [[1.7e308, 0], [0, 1]], [0, 0])
    with pytest.raises(NotCertifiable, match="too large"):
        huge.certify(np.ones((1, 2)))
    plain = frozen([dense(np.eye(2))], np.eye(2), [0, 0.5])
    with pytest.raises(UserError, match="longdouble|float128|rounded"):
        plain.certify(np.ones((1, 2), np.longdouble))
    assert plain.certify(np.full((2, 2), np.nan)).radii.tolist() == [0, 0]
    flag = "--xla_cpu_enable_fast_math"
    for harmless in ("", f"{flag}=false", f"{flag}=0 --xla_cpu_fast_math_honor_nans=false"):
        monkeypatch.setenv("XLA_FLAGS", harmless)
        assert plain.certify(np.ones((1, 2))).radii[0] > 0  # control
    for spelling in (flag, f"{flag}=true", f"{flag}=1", f"--xla_other=0 {flag}"):
        monkeypatch.setenv("XLA_FLAGS", spelling)
        with pytest.raises(NotCertifiable, match="fast math"):
            plain.certify(np.ones((1, 2)))
    monkeypatch.setenv("XLA_FLAGS", "")
    # What fast math gives.
    monkeypatch.setattr("lipjax.certify.float64._probe", lambda large, small, nan: (small, nan != nan))
    with pytest.raises(NotCertifiable, match="fast math"):
        plain.certify(np.ones((1, 2)))


def test_one_class_and_infinite_constants():
    one = frozen([dense(np.eye(2))], [[1, 0]], [0])
    assert one.certify(np.ones((1, 2))).radii[0] == np.finfo(float).max
    infinite = frozen([dense(1e200 * np.eye(2)), dense(1e200 * np.eye(2))], np.eye(2), [0, 0])
    assert infinite.certify(np.array([[1.0, 0.5]])).radii[0] == 0
