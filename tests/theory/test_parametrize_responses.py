"""BRO and LOT against the original code (golden files, 1e-9 in float64), dense matrices and exact limits."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import load, nhwc, relative
from tiers import everyday

from lipjax import _dft, activations, conv, linalg, operators, spectral
from lipjax.parametrize import bro, lot

pytestmark = pytest.mark.quick_compiles

PARITY = 1e-9
UNIT = 2.0**-53


def compare(layer, z, names, *, images=True):
    """Output and gradients of x and of the parameters by name. Returns: what the layer returns besides."""
    change = nhwc if images else jnp.asarray
    params = {name: jnp.asarray(z[f"param/{name}"]) for name in names}

    @jax.jit
    def run(x, params, cotangent):
        y, pull, rest = jax.vjp(layer, x, params, has_aux=True)
        return y, pull(cotangent), rest

    y, (grad_x, grads), rest = run(change(z["input/x"]), params, change(z["input/cotangent"]))
    assert relative(y, change(z["output/y"])) < PARITY
    assert relative(grad_x, change(z["output/grad_x"])) < PARITY
    for name in names:
        assert relative(grads[name], z[f"output/grad/{name}"]) < PARITY
    return rest


def kernel_of(weight):
    """(m, r, k, k) -> (k, k, r, m)."""
    return weight.transpose(2, 3, 1, 0)


def padded(x, k, blocks):
    """The layer: zeros around, the circular convolution, cropped. Returns: y and the blocks."""
    p = k // 2
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    n, blocks = x.shape[1], blocks(x.shape[1:3])
    y = operators.CircularConv.from_blocks(*blocks, x.shape[1:])(x)
    return y[:, p : n - p, p : n - p], blocks


@pytest.mark.parametrize(
    "case",
    everyday(
        ["bro_conv_up", "bro_conv_k1_s2", "lot_conv_start", "bro_conv_k5", "lot_conv_down"],
        *("bro_conv_up", "lot_conv_start"),
    ),
)
def test_convolution_of_the_original(case):
    z, meta = load(case)
    c = meta["constructor"]

    def layer(x, params):
        x, kernel = conv.space_to_depth(x, c["stride"]), kernel_of(params["weight"])
        if case.startswith("lot"):
            make = lambda size: lot.packed_response(kernel, size)  # noqa: E731
        else:  # the original has the kernel reflected in space
            options = {"in_channels": x.shape[-1], "out_channels": c["out_channels"]}
            make = lambda size: bro.packed_response(jnp.flip(kernel, (0, 1)), size, **options)  # noqa: E731
        y, blocks = padded(x, c["kernel_size"], make)
        return y + params["bias"], blocks

    blocks = compare(layer, z, ["weight", "bias"])
    n = z["input/x"].shape[-1] // c["stride"] + 2 * (c["kernel_size"] // 2)
    response = np.asarray(_dft.unpack(*blocks, (n, n)))
    assert relative(response, (z["output/Q_real"] + 1j * z["output/Q_imag"]).reshape(response.shape)) < PARITY
    if case.startswith("bro") and "rank" not in c:
        effective = z["param/weight"].shape[:2]
        assert effective == (max(response.shape[2:]), bro.rank(*response.shape[:1:-1], c["mask_level"]))


@pytest.mark.parametrize("case", everyday(["v2", "lot", "bro"], "v2"))
def test_backbone_of_the_original(case):
    """Layers with batch means; lot: the original places its response a pixel further, as zero taps before do."""
    z, meta = load(f"bronet_backbone_{case}")
    c = meta["constructor"]
    depth = c["depth"]

    def layer(x, params):
        means = []
        for i in range(depth):
            gamma = params["gamma"][i, :, 0, 0, 0]
            kernel = bro.residual(kernel_of(params["weights"][i]), gamma, num_layers=depth)
            if case != "v2":
                kernel = jnp.flip(kernel, (0, 1))
            if case == "lot":
                kernel = jnp.pad(kernel, ((0, 2), (0, 2), (0, 0), (0, 0)))
                make = functools.partial(lot.packed_response, kernel, backbone=True)
            else:
                make = functools.partial(bro.packed_response, kernel, ridge=bro.BACKBONE_RIDGE)
            if case == "v2":  # maps grow
                x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
                x = operators.CircularConv.from_blocks(*make(x.shape[1:3]), x.shape[1:])(x)
            else:
                x, _ = padded(x, 3, make)
            means.append(x.mean((0, 1, 2)))
            x = activations.maxmin(x - means[-1] + params["bias"][i])
        return x, jnp.stack(means)

    means = compare(layer, z, ["weights", "gamma", "bias"])
    before = z["param/running_mean"]
    assert relative(before + 0.1 * (means - before), z["output/running_mean_after"]) < PARITY


def test_dense_matrix_of_the_original():
    z, _ = load("bro_linear_half")

    def layer(x, params):
        matrix = bro.dense(params["weights"][0])
        return activations.maxmin(x @ matrix.T + params["bias"]), matrix

    assert relative(compare(layer, z, ["weights", "bias"], images=False), z["output/W"]) < PARITY
    matrix = jnp.asarray(z["param/weights"][0])
    assert relative(bro.dense(matrix, ridge=2e-5), z["output/W"]) > 1e-7  # control
    assert bro.rank(12, 12, 0.5) == matrix.shape[1]


def test_dense_stack_of_the_original():
    z, meta = load("bronet_mlp_bro")
    c = meta["constructor"]
    depth = c["depth"]

    def layer(x, params):
        v = bro.dense_residual(params["weights"], params["gamma"][..., 0], num_layers=depth)
        matrices = bro.dense(v, ridge=bro.BACKBONE_RIDGE)
        for i in range(depth):
            x = activations.maxmin(x @ matrices[i].T + params["bias"][i])
        return x, matrices

    assert relative(compare(layer, z, ["weights", "gamma", "bias"], images=False), z["output/W"]) < PARITY


def test_neck_of_the_original():
    z, meta = load("bronet_neck_bro")
    c = meta["constructor"]
    p, features = c["conv_patch_size"], c["feat_dim"]

    def layer(x, params, constant=True):
        kernel = bro.patches(params["kernel"].reshape(features, p, p, features).transpose(1, 2, 0, 3))
        matrix = bro.dense(params["weight"], out_features=c["out_dim"], constant_ridge=constant)
        x = conv.conv2d(x, kernel, strides=p, padding="VALID").transpose(0, 3, 1, 2).reshape(len(x), -1)
        return activations.maxmin(x @ matrix.T + params["bias"]), (kernel, matrix)

    kernel, matrix = compare(layer, z, ["kernel", "weight", "bias"])
    assert relative(kernel.transpose(3, 2, 0, 1), z["output/kernel"]) < PARITY
    assert relative(matrix, z["output/weight"]) < PARITY
    with pytest.raises(AssertionError):  # control: a ridge with a gradient is another gradient
        compare(functools.partial(layer, constant=False), z, ["kernel", "weight", "bias"])


# -- dense oracles ----------------------------------------------------------------------------------------------------


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def to_matrix(f, in_shape):
    units = jnp.eye(int(np.prod(in_shape))).reshape(-1, *in_shape)
    return np.asarray(f(units)).reshape(len(units), -1).T


@pytest.mark.parametrize(
    ("kernel_size", "size"),
    everyday(
        [((3, 3), (5, 6)), ((2, 4), (3, 4)), ((5, 2), (2, 3)), ((3, 3), (1, 1)), ((1, 1), (4, 3))],
        ((2, 4), (3, 4)),
    ),
)
def test_bro_is_the_reflector_of_the_whole_convolution(kernel_size, size):
    """Without e: I - 2 V (V^T V)^-1 V^T of the dense circulant V, in which no frequency enters, wherever taps wrap."""
    kernel = draw((*kernel_size, 2, 3))
    found = jax.jit(functools.partial(bro.packed_response, ridge=0.0), static_argnums=1)(jnp.asarray(kernel), size)
    op = operators.CircularConv.from_blocks(*found, (*size, 3))
    v = to_matrix(lambda x: conv.conv2d(x, jnp.asarray(kernel), padding="CIRCULAR"), (*size, 2))
    expected = np.eye(len(v)) - 2 * v @ np.linalg.solve(v.T @ v, v.T)
    dense = to_matrix(op, op.in_shape)
    condition = np.linalg.cond(v) ** 2
    limit = 20 * len(v) * UNIT * condition
    assert limit < 1e-9 and np.abs(dense - expected).max() < limit
    assert np.abs(dense @ dense.T - np.eye(len(v))).max() < limit and np.abs(dense - dense.T).max() < 10 * len(v) * UNIT
    np.testing.assert_allclose(np.trace(dense), size[0] * size[1] * (3 - 2 * 2), atol=1e-9)  # so many are -1
    shifted = jnp.asarray(np.pad(kernel, ((0, 1), (1, 0), (0, 0), (0, 0))))
    other = bro.packed_response(3 * shifted, size, ridge=0.0)  # neither place nor scale matters
    for a, b in zip(found, other, strict=True):
        np.testing.assert_allclose(a, b, atol=limit)
    cut = bro.packed_response(jnp.asarray(kernel), size, 2, 3, ridge=0.0)
    for a, b in zip(found, cut, strict=True):
        np.testing.assert_allclose(a[..., :2], b, rtol=0, atol=limit)


def as_complex(blocks):
    fixed, paired = map(np.asarray, blocks)
    return np.concatenate([fixed + 0j, paired[:, 0] + 1j * paired[:, 1]])


def test_bro_contracts_by_the_ridge_and_what_rounding_leaves():
    kernel = jnp.asarray(draw((3, 3, 3, 6)))
    for ridge in (1e-5, 1e-2):
        blocks = as_complex(bro.packed_response(kernel, (5, 4), ridge=ridge))
        v = as_complex(conv.packed_response(kernel, (5, 4)))
        s = np.linalg.svd(v, compute_uv=False)
        e = ridge * np.mean(s**2, 1, keepdims=True)
        wanted = np.concatenate([1 - 2 * s**2 / (s**2 + e), np.ones((len(s), 3))], 1)
        np.testing.assert_allclose(np.linalg.eigvalsh(blocks), np.sort(wanted, 1), rtol=0, atol=1e-12)


def test_lot_is_the_inverse_square_root():
    """Where it has converged; by eigenvalues, in which no iteration enters."""
    kernel = 0.05 * draw((3, 3, 4, 4)) + np.asarray(bro.unit_columns((3, 3, 4, 4)))
    found = as_complex(jax.jit(lot.packed_response, static_argnums=1)(jnp.asarray(kernel), (5, 4)))
    v = as_complex(conv.packed_response(jnp.asarray(kernel), (5, 4)))
    s = v @ v.conj().swapaxes(1, 2) + 1e-4 * np.eye(4)
    values, vectors = np.linalg.eigh(s)
    z = np.ones_like(values)  # the iteration on eigenvalues
    size = np.sqrt(np.sum(values**2, 1, keepdims=True)) + 1e-4
    for _ in range(10):
        z = z * (3 - z**2 * values / size) / 2
    expected = (vectors * (z / np.sqrt(size))[:, None]) @ vectors.conj().swapaxes(1, 2) @ v
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    exact = (vectors * (values**-0.5)[:, None]) @ vectors.conj().swapaxes(1, 2) @ v
    assert np.abs(found - exact).max() < 1e-2 and np.linalg.svd(found, compute_uv=False).max() < 1


def test_zero_and_dependent_columns():
    """Zero V gives the identity. A zero and a doubled column: the others are reflected, all derivatives are finite."""
    zero = jnp.zeros((3, 3, 2, 4))
    fixed, paired = bro.packed_response(zero, (4, 3))
    np.testing.assert_array_equal(fixed, np.broadcast_to(np.eye(4), fixed.shape))
    np.testing.assert_array_equal(paired[:, 0], np.broadcast_to(np.eye(4), paired[:, 0].shape))
    assert not paired[:, 1].any()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def value(kernel):
        blocks = (*bro.packed_response(kernel, (4, 3)), *lot.packed_response(kernel, (4, 3)))
        return sum(jnp.sum(jnp.sin(part) * draw(part.shape)) for part in blocks), blocks

    column = draw((3, 3, 1, 4))
    for kernel in (zero, np.concatenate([0 * column, column], 2), np.concatenate([2 * column, column], 2)):
        (_, blocks), gradient = value(jnp.asarray(kernel))
        assert np.isfinite(gradient).all()
        for fixed, paired in (blocks[:2], blocks[2:]):
            assert float(spectral.blocks_norm_bound(*map(np.asarray, (fixed, paired))).proved) < 1 + 1e-10
    (_, blocks), _ = value(jnp.asarray(np.concatenate([2 * column, column], 2)))
    single = bro.packed_response(jnp.asarray(column), (4, 3), ridge=0.0)
    assert relative(blocks[0], single[0]) < 1e-4  # the ridge: the span is reflected


@pytest.mark.mixed_dtypes
def test_nearly_dependent_columns_stay_finite_in_training_precision():
    """Columns differ by less than float32 sees: what keeps the pivots positive keeps numbers, norms and gradients."""
    base = draw((1, 1, 1, 40)).astype("float32")
    kernel = np.concatenate([base * (1 + 1e-6 * i) for i in range(20)], 2) + 1e-7 * draw((1, 1, 20, 40))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def value(kernel):
        blocks = bro.packed_response(kernel, (3, 3), ridge=bro.BACKBONE_RIDGE)
        return sum(jnp.sum(part**3) for part in blocks), blocks

    (_, blocks), gradient = value(jnp.asarray(kernel, jnp.float32))
    assert gradient.dtype == jnp.float32 and np.isfinite(gradient).all()
    norms = np.linalg.norm(as_complex([np.asarray(part, np.float64) for part in blocks]), 2, (1, 2))
    assert norms.max() < 1 + 20 * 2.0**-24
    columns = kernel[0, 0].astype("float32")
    gram = columns @ columns.T
    shift = np.float32(bro.BACKBONE_RIDGE * np.mean(np.diag(gram)))
    with pytest.raises(np.linalg.LinAlgError):  # control: as it is, the factorisation stops
        np.linalg.cholesky(gram + shift * np.eye(20, dtype="float32"))
    (_, blocks), _ = value(jnp.asarray(kernel, jnp.float64))  # as frozen
    assert float(spectral.blocks_norm_bound(*map(np.asarray, blocks)).proved) < 1 + 1e-9


def test_ranks():
    assert [bro.rank(8, 8, level) for level in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1, 2, 4, 6, 7]
    assert bro.rank(7, 7, 0.75) == 3 and bro.rank(7, 7, 0.75, "bronet") == 5
    assert bro.rank(3, 8, 1.0) == bro.rank(8, 3, 0.0) == 3 and bro.rank(588, 588) == 294
    for arguments in ((8, 8, 1.5), (8, 8, -0.1), (0, 3, 0.5), (8, 8, 0.5, "other")):
        with pytest.raises(ValueError, match="Expected a level from 0 to 1"):
            bro.rank(*arguments)
    for arguments in ((8, 8, 0.1), (1, 1, 1.0)):
        with pytest.raises(ValueError, match="a rank from 1 to .* gives 0: take another"):
            bro.rank(*arguments)


def test_misuse_says_what_was_expected():
    kernel = jnp.ones((3, 3, 2, 3))
    for call in (
        lambda: bro.packed_response(kernel.swapaxes(2, 3), (4, 4)),
        lambda: bro.packed_response(kernel, (4, 4), 4, 3),
        lambda: bro.packed_response(kernel, (4, 4), ridge=-1.0),
        lambda: bro.dense(jnp.ones((2, 3))),
        lambda: bro.patches(jnp.ones((1, 1, 2, 3))),
        lambda: inspect.unwrap(linalg.block_reflector)(jnp.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"Expected v \(\.\.\., m, r\) with r <= m, .* got shape"):
            call()
    with pytest.raises(ValueError, match="num_layers >= 1, got 0"):
        bro.residual(kernel, jnp.ones(3), num_layers=0)
    with pytest.raises(ValueError, match="num_iters >= 1, got 0"):
        lot.packed_response(kernel, (4, 4), num_iters=0)
