"""Errors of sums in binary32: every order, with and without fused multiply-adds, up to a hostile machine."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deployment_helpers import U, draw, evaluate, numbers
from tiers import everyday

from lipjax import operators
from lipjax.certify import FrozenNetwork, deployment, float32
from lipjax.certify.float32_sums import LEAVES, SUMS, errors_at_images, sum_errors
from lipjax.certify.float64 import float64_on_cpu
from lipjax.network import make_network

SINGLE = np.float32


def rounded(value: Fraction) -> np.float32:
    """A fraction of numbers of binary32, rounded once: float64 holds it but for digits that decide no rounding here."""
    near = np.float32(float(value))
    around = [near, np.nextafter(near, SINGLE(np.inf)), np.nextafter(near, SINGLE(-np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.uint32)) % 2))


def tree(rng, kind, terms):
    """A nested pair for a random or an adverse order of terms."""
    order = list(rng.permutation(len(terms)))
    if kind == "climbing":  # to the largest partial sum first, which is left last
        order = [i for i in np.argsort(-terms) if terms[i] > 0] + [i for i in np.argsort(-terms) if terms[i] <= 0]
    if kind in ("chain", "climbing"):
        found = order[0]
        for i in order[1:]:
            found = (found, i)
        return found
    nodes = order
    while len(nodes) > 1:
        i = 0 if kind == "halves" else int(rng.integers(len(nodes) - 1))
        pair = nodes.pop(i), nodes.pop(i)
        nodes.append(pair) if kind == "halves" else nodes.insert(i, pair)
    return nodes[0]


def total(node, weights, x, fused):
    """The sum of products in binary32 as a tree says; where a leaf is added, its product may stay exact."""

    def product(i):
        return Fraction(float(weights[i])) * Fraction(float(x[i]))

    def value(node):
        if not isinstance(node, tuple):
            return Fraction(float(rounded(product(node))))
        a, b = node
        if fused and not isinstance(b, tuple):
            return Fraction(float(rounded(value(a) + product(b))))
        return Fraction(float(rounded(value(a) + value(b))))

    return value(node)


def hostile_terms(rng, n):
    """Weights in float64 and inputs in binary32: alternating, equal, graded, or just above and below powers of two."""
    x = np.abs(draw(rng, n)).astype(SINGLE) + SINGLE(1e-3)
    kinds = [
        draw(rng, n),
        np.abs(draw(rng, n)),
        draw(rng, n) * 2.0 ** rng.integers(-30, 30, n),
        np.where(np.arange(n) % 2 == 0, 1, -1) * (1 + rng.integers(-2, 3, n) * 2.0**-24) / x.astype(np.float64),
        np.where(np.arange(n) == 0, -1.0, 1 / n) / x.astype(np.float64),
    ]
    return kinds[int(rng.integers(len(kinds)))], x


def test_no_tree_of_additions_is_further_off():
    rng, shares = np.random.default_rng(0), []
    for _ in range(250):
        n = int(rng.integers(2, 40))
        exact_weights, x = hostile_terms(rng, n)
        weights = exact_weights.astype(SINGLE)
        terms = exact_weights * x
        exact = sum((Fraction(w) * Fraction(float(v)) for w, v in zip(exact_weights, x, strict=True)), Fraction(0))
        sizes, values = np.array([np.abs(terms).sum()]), np.array([float(exact)])
        first, smooth = sum_errors(sizes, values, n - 1)[:, 0] * (1 + 1e-12)
        assert 0 < first <= smooth
        for kind in ("chain", "climbing", "halves", "random"):
            error = float(abs(total(tree(rng, kind, terms), weights, x, bool(rng.integers(2))) - exact))
            assert error <= first, (kind, n)
            shares.append(error / smooth)
    assert max(shares) > 0.3  # control


def hurt(terms, leaves):
    """The sum of terms by a machine that errs upwards: its products by `leaves` roundings each, its additions, in the
    order that makes partial sums large, by as much as rounding to nearest may.
    """
    terms = terms + leaves * U * np.abs(terms)
    positive, negative = np.sort(terms[terms > 0])[::-1], np.sort(terms[terms <= 0])[::-1]
    found = 0.0
    for i, term in enumerate(np.concatenate([positive, negative])):
        found += term
        found += U * 2.0 ** np.floor(np.log2(abs(found))) if i and found else 0.0
    return found


def test_a_machine_that_errs_in_one_direction_comes_close():
    # So no bound that knows operations by their relative errors alone could be a third of this one.
    rng = np.random.default_rng(1)
    for n in (16, 64, 256, 1024):
        shares = []
        for _ in range(20):
            terms = draw(rng, n) * np.abs(draw(rng, n))
            terms *= np.sign(terms.sum())
            first, _ = sum_errors(np.abs(terms).sum()[None], terms.sum()[None], n - 1)[:, 0] * (1 + 1e-12)
            shares.append((hurt(terms, LEAVES) - terms.sum()) / first)
        assert max(shares) <= 1 and np.median(shares) > 0.6, shares
    # Control: of the products alone one might expect half as much and less.
    assert gamma_of_products(terms) > 1.9 * first


def gamma_of_products(terms):
    return len(terms) * U * np.abs(terms).sum()


def test_further_values_and_powers_of_two():
    sizes, values = np.array([1.5, 3.99, 4.0, 4.01]), np.array([1.5, 3.99, 4.0, 4.01])
    first, smooth = sum_errors(sizes, values, 1000)
    np.testing.assert_allclose(smooth / (1000 * U), sizes, rtol=3e-3)
    np.testing.assert_allclose(first / (1000 * U), [1.0, 2.0, 4.0, 4.0], rtol=5e-3)
    # What may be 4 or more a little further on rounds by twice as much.
    first, _ = sum_errors(sizes, values, 1000, further=0.02)
    np.testing.assert_allclose(first / (1000 * U), [1.0, 4.0, 4.0, 4.0], rtol=1e-2)
    assert np.isinf(sum_errors(sizes, values, 2**23)).all()
    found = sum_errors(np.array([np.inf, np.nan]), np.array([1.0, np.nan]), 3)
    assert not np.isfinite(found).any()


def whole_sums(ops, head_width):
    """Of the sums of a network: whether all that may join them is counted in them."""
    head = operators.LinearHead(np.zeros((2, head_width)), np.zeros(2))
    frozen = FrozenNetwork(jax.tree.map(np.asarray, make_network([(f"op{i}", op) for i, op in enumerate(ops)], head)))
    found = []
    for op, local in zip(
        frozen.network.ops, float32.locals_of(frozen.network, frozen.lipschitz_report())[1:], strict=True
    ):
        pairs = zip(op.ops, local.parts, strict=True) if local.parts else [(op, local)]
        found += [own.whole for part, own in pairs if isinstance(part, SUMS)]
    return found


def test_sums_that_something_may_join_take_no_powers_of_two():
    # 1.9 and 0.2 that joins it round like 2.1.
    first, smooth = sum_errors(np.array([1.9]), np.array([1.9]), 1000, whole=False)
    assert first == smooth > 1.8 * sum_errors(np.array([1.9]), np.array([1.9]), 1000)[0]
    dense, bias = (lambda: operators.Dense(np.eye(4))), operators.Bias(np.ones(4), (4,))
    assert whole_sums([dense(), bias, operators.MaxMin((4,)), dense()], 4) == [True, True]
    assert whole_sums([dense(), bias, bias], 4) == [False]
    assert whole_sums([dense(), operators.MaxMin((4,)), bias], 4) == [True]
    block = operators.Residual((dense(), bias, operators.MaxMin((4,)), dense(), bias))
    assert whole_sums([dense(), block, dense()], 4) == [True, True, False, True]
    assert whole_sums([dense(), operators.Residual((bias, dense(), operators.ReLU((4,))))], 4) == [False, True]
    assert whole_sums([dense(), operators.Residual((dense(), operators.ReLU((4,)))), bias], 4) == [True, True]
    shape = (2, 2, 1)
    conv = operators.Conv(np.ones((1, 1, 1, 1)), shape)
    assert whole_sums([conv, operators.Flatten(shape), bias], 4) == [False]
    wide = operators.Conv(np.ones((1, 1, 1, 3)), shape)
    cropped = [wide, operators.CropChannels((2, 2, 3), 1), operators.Bias(np.ones(1), shape), operators.Flatten(shape)]
    assert whole_sums(cropped, 4) == [True]


def global_constant(op, length):
    """What is proved for an operator's sums whatever its input."""
    head = operators.LinearHead(np.zeros((2, int(np.prod(op.out_shape)))), np.zeros(2))
    network = make_network([("op", op), ("flatten", operators.Flatten(op.out_shape))], head, 0.5)
    frozen = FrozenNetwork(jax.tree.map(np.asarray, network))
    local = float32.locals_of(frozen.network, frozen.lipschitz_report())[1]
    return local, local.sums * length


def skew(rng, channels, size):
    kernel = draw(rng, 3, 3, channels, channels)
    return size * (kernel - np.flip(kernel, (0, 1)).swapaxes(2, 3)) / np.sqrt(channels)


@pytest.mark.parametrize(
    ("name", "share"),
    everyday(
        [("conv", 0.45), ("padded", 0.25), ("series", 0.35), ("blocks", 0.3), ("many pixels", 0.4)],
        *[("conv", 0.45), ("blocks", 0.3)],
    ),
)
def test_errors_at_images_are_far_below_those_of_any_input(name, share):
    rng = np.random.default_rng(2)
    orthogonal = np.stack([np.linalg.qr(draw(rng, 32, 32))[0] for _ in range(4)])
    op = {
        "conv": lambda: operators.Conv(draw(rng, 3, 3, 16, 16), (6, 6, 16), padding="CIRCULAR"),
        "padded": lambda: operators.Conv(draw(rng, 3, 3, 16, 16), (2, 2, 16)),
        "series": lambda: operators.ConvExponential(skew(rng, 16, 0.3), (4, 4, 16), 8),
        "blocks": lambda: operators.CircularConv.from_blocks(orthogonal, np.zeros((0, 2, 32, 32)), (2, 2, 32)),
        "many pixels": lambda: operators.CircularConv.from_blocks(
            orthogonal[:4], np.stack([orthogonal[[0, 1]] / np.sqrt(2)] * 46), (8, 12, 32)
        ),
    }[name]()
    x = np.random.default_rng(3).normal(size=(8, *op.in_shape))
    length = np.linalg.norm(x.reshape(8, -1), axis=1)
    local, everywhere = global_constant(op, length)
    with float64_on_cpu():
        found = errors_at_images(op, local.inner, None, local.leaves, True, jnp.asarray(x), jnp.zeros(8))
        further = errors_at_images(op, local.inner, None, local.leaves, True, jnp.asarray(x), jnp.full(8, 1e-3))
    first, smooth = np.asarray(found)
    assert (first <= smooth * (1 + 1e-9)).all() and (smooth <= everywhere).all()
    assert np.median(first / everywhere) < share
    assert (first <= further[0]).all() and (further[0] < 2.1 * first).all()
    np.testing.assert_array_equal(further[1], smooth)


def test_bounds_of_a_network_follow_its_images():
    # 64 terms for each of 16 pixels; at the corners of a 2 x 2 map five of nine taps read the padding.
    rng = np.random.default_rng(4)
    ops = [
        ("conv", operators.Conv(draw(rng, 3, 3, 1, 16) / 3, (4, 4, 1), 2)),
        ("bias", operators.Bias(draw(rng, 16), (2, 2, 16))),
        ("maxmin", operators.MaxMin((2, 2, 16))),
        ("series", operators.ConvExponential(skew(rng, 16, 0.2), (2, 2, 16), 8)),
        ("conv2", operators.Conv(draw(rng, 3, 3, 16, 16) / 9, (2, 2, 16))),
        ("flatten", operators.Flatten((2, 2, 16))),
    ]
    head = operators.LinearHead(draw(rng, 3, 64) / 8, draw(rng, 3))
    frozen = FrozenNetwork(jax.tree.map(np.asarray, make_network(ops, head)))
    images = rng.uniform(0, 1, (6, 4, 4, 1))
    bound = deployment.float32_error(frozen, images)
    exact = evaluate(frozen.network, images, object)
    error = np.abs(numbers(evaluate(frozen.network, images, np.float32), object) - exact).astype(float)
    assert (error <= bound).all()
    print(bound.max(), error.max())
    assert bound.max() < 1e9
