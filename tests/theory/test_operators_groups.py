"""Grouped, dilated and transposed convolutions and channel shuffles beyond shapes and norms (test_operators.py):
grids, proofs by taps, exponentials of groups, chains, saved networks.
"""

import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from soundness_helpers import strided
from test_operators import grouped, to_matrix
from tiers import everyday

import lipjax
from lipjax import FrozenNetwork, NotCertifiable, checker, conv, operators, spectral
from lipjax.certify.layout import layout_of
from lipjax.network import make_network
from lipjax.operators.grid import Circulants, on_grid
from lipjax.spectral import norms

pytestmark = pytest.mark.quick_compiles


def full(op, **changes):
    """The same convolution with one group and dilation 1, by its dense kernel."""
    kernel = jnp.asarray(conv.without_groups(np.asarray(op.kernel), op.groups, op.dilation))
    return operators.Conv(kernel, op.in_shape, op.strides, op.padding, **changes)


CASES = {
    "groups": grouped(2, channels=(4, 6)),
    "dilated": grouped(1, (3, 2), (7, 6), dilation=(2, 3)),
    "depthwise, strided, dilated": grouped(4, (2, 3), (6, 8), (4, 4), strides=2, dilation=3),
}


@pytest.mark.parametrize("name", CASES)
def test_dense_kernels_are_the_same_map(name, key):
    op = CASES[name]
    x = jax.random.normal(key, (2, *op.in_shape))
    np.testing.assert_allclose(full(op)(x), op(x), atol=1e-12)
    if op.groups > 1:  # control: other groups
        other = jnp.roll(op.kernel, 1, 3)
        assert np.abs(full(op)(x) - conv.conv2d(x, other, **op.options())).max() > 0.1


@pytest.mark.parametrize("name", everyday(CASES, "depthwise, strided, dilated"))
def test_estimates_on_the_grid_reach_the_proved_bound(name, key, monkeypatch):
    monkeypatch.setattr(norms, "_DENSE_SIDE", 0)
    op = CASES[name]
    grid, bound = on_grid(op), op.bound()
    assert isinstance(grid, Circulants)
    found = [part["method"] for part in bound.details.get("groups", [])] or [bound.method]
    assert all("block circulant" in method for method in found)
    sigma, v = jax.jit(lambda v: grid.estimate(v, 3000))(jax.random.normal(key, grid.in_shape))
    assert v.shape == grid.in_shape
    # The least over grids of the largest over groups is not below the largest of the least.
    assert bound.proved * (1 - 1e-4) <= float(sigma) <= bound.proved * 1.1
    assert bound.proved >= op.estimate(jax.random.normal(key, op.in_shape), 300)[0] * (1 - 1e-12)


@pytest.mark.parametrize(("dilation", "block"), [(1, 1), (3, 1), ((2, 5), 1), (3, 2)])
def test_dilated_orthogonal_kernels_are_bounded_by_their_taps(dilation, block, monkeypatch):
    """The lags grow with the dilation, the products do not change; of strides that have no factor with it as well."""
    monkeypatch.setattr(norms, "_TINY_SIDE", 0)
    kernel = strided(4, 4, 1, 2)
    op = operators.Conv(kernel, (16, 16, 4), 1, "ZERO", dilation=dilation)
    bound = op.bound()
    assert bound.method == spectral.EVERYWHERE and bound.details["lags"] == 13
    assert 1 <= bound.proved < 1 + 1e-11
    if block > 1:  # strides that divide nothing of it: every output reads other phases, and no longer an isometry
        skipping = operators.Conv(kernel, (8, 8, 4), block, "CIRCULAR", dilation=dilation)
        norm = np.linalg.norm(to_matrix(jax.tree.map(jnp.asarray, skipping)), 2)
        assert norm <= skipping.bound().proved <= norm * (1 + 1e-9)


def test_a_group_that_is_not_orthogonal_has_another_proof_than_the_others():
    kernels = [strided(4, 4, 1, 2, seed) for seed in range(3)]
    kernels[1] = kernels[1] * (1 + 1e-4 * np.random.default_rng(0).normal(size=kernels[1].shape))
    op = operators.Conv(np.concatenate(kernels, 3), (16, 16, 12), groups=3)
    bound = op.bound()
    methods = [part["method"] for part in bound.details["groups"]]
    assert methods[0] == methods[2] == spectral.EVERYWHERE != methods[1]
    assert bound.method == spectral.GROUPS and bound.claimed > bound.proved
    assert 1 + 1e-7 < bound.proved < 1 + 1e-3
    zero = operators.Conv(np.zeros((3, 3, 1, 4)), (4, 4, 4), groups=4).bound()
    assert (zero.proved, zero.method) == (0.0, "zero")
    partly = operators.Conv(np.concatenate([kernels[0], 0 * kernels[0]], 3), (16, 16, 8), groups=2).bound()
    assert [part["method"] for part in partly.details["groups"]] == [spectral.EVERYWHERE, "zero"]


def skew(groups, channels, seed=0, scale=1.0):
    raw = scale * np.random.default_rng(seed).normal(size=(3, 3, channels // groups, channels))
    return np.asarray(conv.skew_kernel(jnp.asarray(raw), groups))


@pytest.mark.parametrize("padding", everyday(["ZERO", "CIRCULAR"], "CIRCULAR"))
def test_exponentials_of_groups(padding, key):
    kernel = skew(2, 4, scale=0.2)
    op = operators.ConvExponential(jnp.asarray(kernel), (3, 4, 4), 8, padding, groups=2)
    plain = operators.Conv(jnp.asarray(kernel), (3, 4, 4), 1, padding, 2)
    matrix = to_matrix(plain)
    np.testing.assert_array_equal(matrix, -matrix.T)
    exact = scipy.linalg.expm(matrix)
    norm = np.linalg.norm(matrix, 2)
    assert np.abs(to_matrix(op) - exact).max() < norm**9 / 362880
    y = jax.random.normal(key, (1, 3, 4, 4))
    np.testing.assert_allclose(np.asarray(op.adjoint(y)).ravel(), to_matrix(op).T @ np.asarray(y).ravel(), atol=1e-13)
    bound = op.bound()
    assert norm <= bound.details["skew_norm"] and bound.proved == 1.0
    # Rounding: the error of one that computes in float64 is far below the bound, and no bound is zero.
    claimed = np.asarray(op.rounding_error(y))
    assert 0 < claimed[0] < 1e-11
    fast = operators.ConvExponential(jnp.asarray(kernel), (3, 4, 4), 8, padding, fast_gradient=True, groups=2)
    gradients = [jax.grad(lambda x, op=op: jnp.sum(jnp.sin(op(x))))(y) for op in (op, fast)]
    np.testing.assert_allclose(*gradients, atol=1e-13)


def test_every_group_of_an_exponential_must_be_skew_and_the_largest_counts():
    kernel = skew(2, 4).copy()
    kernel[0, 0, 1, 3] = np.nextafter(kernel[0, 0, 1, 3], 1)
    with pytest.raises(NotCertifiable, match="not bit for bit skew"):
        operators.ConvExponential(kernel, (3, 4, 4), 8, groups=2).bound()
    small, large = skew(1, 2, 1, 0.1), skew(1, 2, 2, 3.0)
    found = [
        operators.ConvExponential(np.concatenate(pair, 3), (3, 4, 4), 8, groups=2).bound()
        for pair in ((small, large), (large, small))
    ]
    alone = operators.ConvExponential(large, (3, 4, 2), 8).bound()
    assert found[0].proved == found[1].proved == alone.proved > 100


def test_fields_that_came_later_are_left_out_of_files_where_they_are_defaults(tmp_path):
    """Networks saved before there were groups have the hash they had."""

    def numbers(*shape):
        return np.sin(np.arange(np.prod(shape))).reshape(shape)

    ops = [
        ("conv", operators.Conv(numbers(3, 3, 2, 4), (4, 6, 2), 2)),
        ("around", operators.Conv(numbers(3, 3, 4, 4), (2, 3, 4), 1, "CIRCULAR")),
        (
            "exp",
            operators.ConvExponential(np.asarray(conv.skew_kernel(jnp.asarray(numbers(3, 3, 4, 4)))), (2, 3, 4), 5),
        ),
        ("flat", operators.Flatten((2, 3, 4))),
    ]
    head = operators.LinearHead(numbers(3, 24), np.zeros(3))
    frozen = lipjax.freeze(make_network(ops, head))
    entries = layout_of(frozen.network)["ops"]
    assert entries[0] == {"name": "conv", "type": "Conv", "in_shape": (4, 6, 2), "strides": 2, "padding": "ZERO"}
    assert "groups" not in entries[2]
    # Not of the kernels, whose sines may differ in the last place between machines: of the layout.
    assert json.dumps(entries[1], sort_keys=True) == (
        '{"in_shape": [2, 3, 4], "name": "around", "padding": "CIRCULAR", "strides": 1, "type": "Conv"}'
    )
    others = [
        ("conv", operators.Conv(numbers(3, 3, 1, 4), (4, 6, 2), 2, groups=2, dilation=(1, 2))),
        ("shuffle", operators.ChannelShuffle((2, 3, 4), 2, paired=True)),
        ("exp", operators.ConvExponential(skew(2, 4), (2, 3, 4), 5, groups=2)),
        ("up", operators.ConvTranspose(operators.Conv(numbers(2, 2, 1, 4), (4, 6, 2), 2, ((0, 0), (0, 0)), 2))),
        ("flat", operators.Flatten((4, 6, 2))),
    ]
    frozen = lipjax.freeze(make_network(others, operators.LinearHead(numbers(3, 48), np.zeros(3))))
    entries = layout_of(frozen.network)["ops"]
    assert (entries[0]["groups"], entries[0]["dilation"], entries[2]["groups"]) == (2, (1, 2), 2)
    assert entries[3]["conv"]["type"] == "Conv" and entries[3]["conv"]["groups"] == 2
    frozen.save(tmp_path)
    again = FrozenNetwork.load(tmp_path)
    assert again.sha256() == frozen.sha256() and repr(again) == repr(frozen)
    image = np.random.default_rng(0).uniform(size=(1, 4, 6, 2))
    np.testing.assert_array_equal(again(image), frozen(image))
    assert 0 < frozen.certify(image).radii[0] <= again.certify(image).radii[0]


def test_chains_of_loop_transformation_are_those_of_dense_kernels():
    """LipLT composes groups, dilation, transposition and shuffles; the same network of dense kernels says as much."""
    rng = np.random.default_rng(0)
    first = operators.Conv(rng.normal(size=(3, 3, 2, 4)), (4, 4, 4), 2, groups=2, dilation=(2, 1))
    down = operators.Conv(rng.normal(size=(2, 2, 1, 4)), (4, 4, 4), 2, "VALID", 4)
    shuffle = operators.ChannelShuffle((2, 2, 4), 2)
    order = np.asarray(shuffle(jnp.arange(16.0).reshape(1, 2, 2, 4))).reshape(-1).astype(int)
    head = operators.LinearHead(rng.normal(size=(3, 64)), np.zeros(3))

    up = operators.ConvTranspose(down)
    ops = [("first", first), ("act", operators.ReLU((2, 2, 4))), ("moved", shuffle), ("up", up)]
    ops += [("act2", operators.ReLU((4, 4, 4))), ("flat", operators.Flatten((4, 4, 4)))]
    frozen = lipjax.freeze(make_network(ops, head))
    found, report = frozen.margin_lipschitz(), frozen.liplt_report()
    assert report is not None and any("composition" in chain.method for chain in report.chains)
    flat = operators.Dense(np.asarray(to_matrix(jax.tree.map(jnp.asarray, first))))
    moved = operators.Dense(np.eye(16)[order])
    dense = operators.Dense(np.asarray(to_matrix(jax.tree.map(jnp.asarray, up))))
    ops = [("flat", operators.Flatten((4, 4, 4))), ("first", flat), ("act", operators.ReLU((16,))), ("moved", moved)]
    ops += [("up", dense), ("act2", operators.ReLU((64,)))]
    expected = lipjax.freeze(make_network(ops, head)).margin_lipschitz()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_that_only_meet_padding_are_proved_to_be_zero(groups):
    """Of a map of one pixel, stride 3 and such a padding, two taps meet zeros alone."""
    kernel = np.full((2, 2, 1, 2), 5.0)
    op = operators.Conv(kernel, (1, 1, groups), 3, ((3, 1), (2, 4)), groups)
    bound = op.bound()
    assert bound.proved == 0 and not np.any(np.asarray(jax.tree.map(jnp.asarray, op)(jnp.ones((1, *op.in_shape)))))
    fields = {"kernel": kernel, "in_shape": [1, 1, groups], "strides": 3, "groups": groups}
    mine = checker.Conv({**fields, "padding": [[3, 1], [2, 4]]})
    assert mine.proves(Fraction(0), mine.named(bound.method), bound.details)
    control = checker.Conv({**fields, "padding": [[3, 1], [3, 4]]})  # one column further, it meets the pixel
    with pytest.raises(checker.Unproved, match="zero operator, which it is not"):
        control.named(bound.method)
