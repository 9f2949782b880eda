"""Attempts to break the bounds of heads and of whole networks, as test_soundness.py does those of operators."""

import functools
import math
from fractions import Fraction

import jax
import numpy as np
from hypothesis import strategies as st
from soundness_helpers import (
    PATTERNS,
    array_of,
    arrays,
    few_and_nightly_many,
    integers,
    looseness,
    power,
    scaled,
    search,
    squared_gain,
)

from lipjax import FrozenNetwork, bounds, operators
from lipjax.network import make_network


@st.composite
def linear_heads(draw):
    classes, features = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    matrix = draw(arrays(classes, features))
    if draw(st.booleans()):
        matrix[-1] = matrix[0]
    return functools.partial(operators.LinearHead, matrix, np.zeros(classes))


@few_and_nightly_many
def test_pairwise_bounds_of_heads_are_never_below(examples):
    def check(head):
        matrix, exponent = integers(head.matrix)
        table = head.pairwise_bound()
        for i, j in np.ndindex(table.shape):
            row = matrix[i] - matrix[j]
            looseness(table[i, j], Fraction(int(sum(row * row))), power(exponent))
            assert (table[i, j] == 0) == (not row.any())

    search(check, linear_heads(), examples)


@st.composite
def mlp_heads(draw):
    classes, hidden, features = (draw(st.integers(1, n)) for n in (4, 6, 6))
    w1, w2 = (
        scaled(
            array_of(draw(st.sampled_from(PATTERNS)), shape, draw(st.integers(0, 2**32))), draw(st.integers(-30, 20))
        )
        for shape in ((hidden, features), (classes, hidden))
    )
    slopes = np.array(draw(st.lists(st.integers(0, 8), min_size=hidden, max_size=hidden)), dtype=object)
    return lambda: (operators.MLPHead(w1, np.zeros(hidden), w2, np.zeros(classes)), slopes)


@few_and_nightly_many
def test_pairwise_bounds_of_mlp_heads_are_never_below(examples):
    """Whatever the slopes of the hidden units in [0, 1], here multiples of 1/8."""

    def check(example):
        head, slopes = example
        (w1, e1), (w2, e2) = integers(head.w1), integers(head.w2)
        table = head.pairwise_bound()
        for i, j in np.ndindex(table.shape):
            row = ((w2[i] - w2[j]) * slopes) @ w1
            looseness(table[i, j], Fraction(int(sum(row * row))), power(e1 + e2 - 3))

    search(check, mlp_heads(), examples)


@st.composite
def chains(draw):
    widths = draw(st.lists(st.integers(1, 6), min_size=3, max_size=5))
    slope = draw(st.sampled_from([(0.0, 1.0), (0.25, 1.0), (-0.5, 1.5), (-1.0, 1.0), (-1.0, 0.5), (0.0, 0.25)]))
    exponents = [draw(st.integers(-40, 40)) for _ in widths[1:]]
    weights = [
        np.ldexp(array_of(draw(st.sampled_from(PATTERNS)), (n, m), draw(st.integers(0, 2**32))), exponent)
        for m, n, exponent in zip(widths[:-1], widths[1:], exponents, strict=True)
    ]
    factors = [[draw(st.integers(0, 4)) for _ in range(n)] for n in widths[1:-1]]
    return lambda: ([operators.Dense(w) for w in weights], slope, factors)


@few_and_nightly_many
def test_liplt_is_never_below_a_choice_of_slopes(examples, record_testsuite_property):
    """x -> D x is an activation that the bound speaks of, for every diagonal D with entries in [alpha, beta]."""
    found = []

    def check(example):
        layers, slope, factors = example
        pairwise, report = bounds.liplt_bound(layers, slope)
        matrix, exponent = integers(layers[0].matrix)
        low, high = (int(8 * s) for s in slope)
        for layer, steps in zip(layers[1:], factors, strict=True):
            # alpha + k (beta - alpha) / 4 in units of 1/32
            diagonal = np.array([4 * low + k * (high - low) for k in steps], dtype=object)
            weights, e = integers(layer.matrix)
            matrix, exponent = weights @ (diagonal[:, None] * matrix), exponent + e - 5
        gain = squared_gain(matrix)
        found.append(looseness(report.total, gain, power(exponent)) if gain else 0.0)
        for i, j in np.ndindex(pairwise.shape):
            row = matrix[i] - matrix[j]
            looseness(pairwise[i, j], Fraction(int(sum(row * row))), power(exponent))

    search(check, chains(), examples)
    record_testsuite_property("looseness, LipLT, median", float(np.median(found)))
    assert min(found) < 1e-6  # some choices are the worst case


SHAPE, HIDDEN, CLASSES = (2, 2, 2), 5, 3


@st.composite
def affine_networks(draw):
    """Normalisation, flattening, a dense layer, a bias and a head of fixed shapes; an image; perhaps equal rows."""
    pattern, seed = st.sampled_from(PATTERNS), st.integers(0, 2**32)
    matrix = scaled(array_of(draw(pattern), (HIDDEN, math.prod(SHAPE)), draw(seed)), draw(st.integers(-100, 100)))
    rng = np.random.default_rng(draw(seed))
    head = scaled(array_of(draw(pattern), (CLASSES, HIDDEN), draw(seed)), draw(st.integers(-20, 20)))
    bias = rng.normal(size=CLASSES) * draw(st.sampled_from([0.0, 1e-12, 1.0]))
    if draw(st.booleans()):
        head[2], bias[2] = head[0], bias[0]
    mean = rng.random(SHAPE[-1]) * draw(st.sampled_from([0.0, 1.0]))
    std = draw(st.sampled_from([0.25, 1.0, 0.3, 7.0])) * np.ones(1)
    shift = rng.normal(size=HIDDEN) * float(np.abs(matrix).max()) * draw(st.sampled_from([0.0, 1e-9, 1.0]))
    images = rng.random((2, *SHAPE))

    def make():
        layers = [
            ("flatten", operators.Flatten(SHAPE)),
            ("linear", operators.Dense(matrix)),
            ("bias", operators.Bias(shift, (HIDDEN,))),
        ]
        network = make_network(layers, operators.LinearHead(head, bias), mean, std)
        return FrozenNetwork(jax.tree.map(np.asarray, network)), images

    return make


def rational(array) -> np.ndarray:
    return np.array([Fraction(float(v)) for v in np.asarray(array).ravel()], dtype=object).reshape(np.shape(array))


@few_and_nightly_many
def test_certified_radii_are_never_above_the_distance_to_the_boundary(examples):
    certified = []

    def check(example):
        frozen, images = example
        network = frozen.network
        certificate = frozen.certify(images)
        _, dense, bias = network.ops
        matrix, weights = rational(dense.matrix), rational(network.head.matrix)
        std = Fraction(float(network.input_std[0]))
        mean = rational(np.broadcast_to(network.input_mean, SHAPE)).ravel()
        jacobian = weights @ matrix / std
        for image, prediction, radius in zip(images, certificate.predictions, certificate.radii, strict=True):
            features = matrix @ ((rational(image).ravel() - mean) / std) + rational(bias.bias)
            logits = weights @ features + rational(network.head.bias)
            for rival in range(CLASSES):
                if rival == prediction or radius == 0:
                    continue
                margin, row = logits[prediction] - logits[rival], jacobian[prediction] - jacobian[rival]
                assert margin > 0
                assert Fraction(float(radius)) ** 2 * sum(row * row) <= margin**2
            certified.append(radius > 0)

    search(check, affine_networks(), examples)
    assert 0.1 < np.mean(certified) < 1  # control: neither vacuous nor blind to ties
