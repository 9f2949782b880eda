"""AOL and its twins against the authors' code (golden files), dense norms and row sums; gradients at entries of 0."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

from lipjax import conv, operators, spectral
from lipjax.parametrize import aol

pytestmark = pytest.mark.quick_compiles

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PARITY = 1e-9


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file if key != "meta"}


def nhwc(a):
    return jnp.asarray(np.moveaxis(a, 1, -1))


def hwio(a):
    return jnp.asarray(np.transpose(a, (2, 3, 1, 0)))


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


RAW = "parametrizations.weight.original"
CONVOLUTIONS = {  # file: name of the raw kernel, padding, options
    "aol_conv_rect": (RAW, "ZERO", {}),
    "aol_conv_dirac": (RAW, "CIRCULAR", {}),
    "aol_conv_zero": (RAW, "ZERO", {}),
    "lbdn_aol_conv": ("kernel", "ZERO", {"rows": "outputs", "epsilon": 0.0}),
}


@pytest.mark.parametrize("file", everyday(CONVOLUTIONS, "aol_conv_dirac", "lbdn_aol_conv"))
def test_parity_of_convolutions(file):
    (name, padding, options), z = CONVOLUTIONS[file], load(file)
    relu = jax.nn.relu if file.startswith("lbdn") else lambda y: y

    @jax.jit
    def run(x, raw, bias, cotangent):
        def layer(x, raw, bias):
            return relu(conv.conv2d(x, aol.rescale_kernel(raw, **options), padding=padding) + bias)

        y, pull = jax.vjp(layer, x, raw, bias)
        return y, pull(cotangent)

    raw = hwio(z[f"param/{name}"])
    y, grads = run(nhwc(z["input/x"]), raw, jnp.asarray(z["param/bias"]), nhwc(z["input/cotangent"]))
    assert relative(aol.rescale_kernel(raw, **options), hwio(z["output/kernel"])) < PARITY
    assert relative(y, nhwc(z["output/y"])) < PARITY
    assert relative(grads[0], nhwc(z["output/grad_x"])) < PARITY
    assert relative(grads[1], hwio(z[f"output/grad/{name}"])) < PARITY
    assert relative(grads[2], z["output/grad/bias"]) < PARITY


def test_the_derivative_of_the_modulus_at_zero_decides_the_gradient_at_the_first_step(monkeypatch):
    """At the original's initial kernel nearly all entries of the Gram matrix are 0."""
    z = load("aol_conv_dirac")
    raw, cotangent = hwio(z[f"param/{RAW}"]), nhwc(z["input/cotangent"])

    def value(raw):
        return jnp.sum(conv.conv2d(nhwc(z["input/x"]), aol.rescale_kernel(raw), padding="CIRCULAR") * cotangent)

    expected = hwio(z[f"output/grad/{RAW}"])
    assert relative(jax.grad(value)(raw), expected) < PARITY
    monkeypatch.setattr(aol, "modulus", jnp.abs)  # control
    assert relative(jax.grad(value)(raw), expected) > 0.1


@pytest.mark.parametrize("file", everyday(["aol_dense_down", "lbdn_aol_fc"], "aol_dense_down"))
def test_parity_of_dense_layers(file):
    z, own = load(file), file.startswith("aol")
    name, options = (RAW, {}) if own else ("weights", {"epsilon": 0.0})
    relu = (lambda y: y) if own else jax.nn.relu

    def layer(x, raw, bias):
        return relu(x @ aol.rescale_matrix(raw, **options).T + bias)

    raw = jnp.asarray(z[f"param/{name}"])
    y, pull = jax.vjp(layer, jnp.asarray(z["input/x"]), raw, jnp.asarray(z["param/bias"]))
    grads = pull(jnp.asarray(z["input/cotangent"]))
    assert relative(aol.rescale_matrix(raw, **options), z["output/weight"]) < PARITY
    assert relative(y, z["output/y"]) < PARITY
    for got, field in zip(grads, ("grad_x", f"grad/{name}", "grad/bias"), strict=True):
        assert relative(got, z[f"output/{field}"]) < PARITY


# ---- norms ---------------------------------------------------------------------------------------------------------


def dense_norm(kernel, size, padding, strides=1):
    op = operators.Conv(kernel, (*size, kernel.shape[2]), strides, padding)
    x = jnp.eye(int(np.prod(op.in_shape))).reshape(-1, *op.in_shape)
    return np.linalg.norm(np.asarray(op(x)).reshape(len(x), -1), 2)


def kernels():
    rng = np.random.default_rng(0)
    return {
        "normal": rng.normal(size=(3, 3, 3, 4)),
        "ones": np.ones((3, 3, 3, 4)),
        "large": 1e4 * rng.normal(size=(3, 3, 3, 4)),
        "graded": rng.normal(size=(3, 3, 3, 4)) * 10.0 ** rng.integers(-3, 3, (3, 3, 1, 1)),
        "near a tap": np.eye(3, 4) * (np.arange(9) == 4).reshape(3, 3, 1, 1) + 0.01 * rng.normal(size=(3, 3, 3, 4)),
    }


@pytest.mark.parametrize("rows", aol.ROWS)
@pytest.mark.parametrize("name", kernels())
def test_norms_are_at_most_one_and_powers_lose_less(name, rows):
    """Up to the rounding of row sums, about 50 terms of 1e-16 each, and the row sums of G alone prove it."""
    raw, norms = jnp.asarray(kernels()[name]), []
    for iterations in (1, 2, 3):
        kernel = aol.rescale_kernel(raw, rows=rows, iterations=iterations)
        found = [dense_norm(kernel, (5, 4), padding) for padding in ("CIRCULAR", "ZERO")]
        norms.append(max([*found, dense_norm(kernel, (4, 4), "ZERO", 2)]))
        assert norms[-1] < 1 + 1e-13
    assert norms[0] <= norms[1] * (1 + 1e-9) and norms[1] <= norms[2] * (1 + 1e-9)
    kernel = np.asarray(aol.rescale_kernel(raw, rows=rows))
    assert spectral.row_sum_bound(kernel).proved < 1 + 1e-12
    if name == "normal":
        assert norms[0] < 0.8 and norms[2] > norms[0] + 0.1  # of inputs and of outputs, on this map
        # Control: without the displacements it is no contraction.
        matrix = raw.reshape(-1, 4)
        careless = raw / jnp.sqrt(jnp.abs(matrix @ matrix.T).sum(axis=0)).reshape(3, 3, 3, 1)
        assert dense_norm(careless, (5, 4), "CIRCULAR") > 1.05


@pytest.mark.parametrize("rows", aol.ROWS)
def test_the_square_of_the_gram_matrix_is_that_of_the_map(rows):
    """iterations = 2 on one tap, by matrices."""
    raw = np.random.default_rng(1).normal(size=(5, 3))
    gram = np.abs(
        (raw.T @ raw if rows == "inputs" else raw @ raw.T) @ (raw.T @ raw if rows == "inputs" else raw @ raw.T)
    )
    scale = (gram.sum(axis=0) + aol.EPSILON) ** -0.25
    expected = raw * scale if rows == "inputs" else scale[:, None] * raw
    got = aol.rescale_matrix(jnp.asarray(raw), rows=rows, iterations=2)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert np.linalg.norm(expected, 2) <= 1


@pytest.mark.parametrize("rows", aol.ROWS)
@pytest.mark.parametrize("epsilon", [0.0, aol.EPSILON])
def test_channels_of_zeros_stay_zeros_with_finite_gradients(rows, epsilon):
    """Theirs without epsilon divides 0 by 0."""
    raw = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 4, 4))).at[:, :, 1].set(0.0).at[..., 2].set(0.0)
    for iterations in (1, 2):
        options = {"rows": rows, "iterations": iterations, "epsilon": epsilon}
        kernel, pull = jax.vjp(lambda k, o=options: aol.rescale_kernel(k, **o), raw)
        gradient = pull(jnp.ones_like(kernel))[0]
        assert np.isfinite(kernel).all() and np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0
        assert not kernel[:, :, 1].any() and not kernel[..., 2].any()
    zero, pull = jax.vjp(lambda k: aol.rescale_kernel(k, rows=rows, epsilon=epsilon), jnp.zeros_like(raw))
    assert not zero.any() and np.isfinite(pull(jnp.ones_like(raw))[0]).all()


def test_what_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="one of .'inputs', 'outputs'., the channels that are rescaled, got 'rows'"):
        aol.rescale_matrix(jnp.eye(2), rows="rows")
    with pytest.raises(ValueError, match="iterations >= 1"):
        aol.rescale_kernel(jnp.ones((1, 1, 2, 2)), iterations=0)
