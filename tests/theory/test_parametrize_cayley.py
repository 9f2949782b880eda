"""Cayley layers against the original code (golden files, 1e-9) and against dense matrices of the convolution."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import GOLDEN, hwio, nhwc, relative
from tiers import everyday

from lipjax import conv, linalg
from lipjax.parametrize import cayley

pytestmark = pytest.mark.quick_compiles

PARITY = 1e-9
UNIT = 2.0**-53
CONVS = ("up", "down", "k5", "s2", "s2_k4", "odd_size")
SIZES = [  # kernel sides, map; even, odd and not square, kernels beyond the map and a map of one pixel
    ((3, 3), (4, 4)),
    ((3, 3), (5, 6)),
    ((2, 4), (3, 4)),
    ((3, 3), (2, 2)),
    ((5, 2), (2, 3)),
    ((3, 3), (1, 1)),
    ((1, 1), (4, 3)),
]


def convolve(response, x):
    """By FFTs, which the library does not use."""
    spectrum = jnp.fft.rfft2(x, axes=(1, 2))
    return jnp.fft.irfft2(jnp.einsum("hfoi,bhfi->bhfo", response, spectrum), x.shape[1:3], axes=(1, 2))


def to_matrix(f, in_shape):
    """The dense matrix of a linear map on images."""
    units = jnp.eye(int(np.prod(in_shape))).reshape(-1, *in_shape)
    return np.asarray(f(units)).reshape(len(units), -1).T


def draw(kernel_size, c_in, c_out, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*kernel_size, c_in, c_out)))


@pytest.mark.parametrize("case", everyday(CONVS, "s2"))
def test_convolution_of_the_original(case):
    z = np.load(GOLDEN / f"cayley_conv_{case}.npz")
    constructor = json.loads(str(z["meta"]))["constructor"]
    block = constructor.get("stride", 1)

    def layer(x, kernel, bias, alpha):
        x = conv.space_to_depth(x, block)
        return convolve(cayley.response(kernel, alpha, x.shape[1:3]), x) + bias

    kernel, alpha = hwio(z["param/weight"]), jnp.asarray(z["param/alpha"])
    if case.startswith("s2"):  # the strided layer's kernel has half the side: 3 becomes 1
        assert kernel.shape[0] == max(1, constructor["args"][2] // 2)
    arguments = nhwc(z["input/x"]), kernel, jnp.asarray(z["param/bias"]), alpha
    n = z["input/x"].shape[-1] // block

    @jax.jit
    def everything(cotangent, *arguments):
        y, pullback = jax.vjp(layer, *arguments)
        kernel, alpha = arguments[1], arguments[3]
        return y, pullback(cotangent), cayley.response(kernel, alpha, (n, n)), cayley.initial_alpha(kernel, (n, n))

    cotangent = jnp.zeros_like(nhwc(z["output/y"])) if case == "odd_size" else nhwc(z["input/cotangent"])
    y, grads, response, initial = everything(cotangent, *arguments)
    assert relative(y, nhwc(z["output/y"])) < PARITY
    assert relative(everything(cotangent, *arguments[:3], 1.01 * alpha)[0], y) > 1e-6  # control
    if case == "odd_size":  # of this copy of the layer only the output is stored
        return
    stored = [z[f"output/grad{name}"] for name in ("_x", "/weight", "/bias", "/alpha")]
    for grad, expected in zip(grads, [nhwc(stored[0]), hwio(stored[1]), *stored[2:]], strict=True):
        assert relative(grad, expected) < PARITY
    q = (z["output/Q_real"] + 1j * z["output/Q_imag"]).reshape(response.shape)
    assert relative(response, q) < PARITY
    assert relative(initial, z["output/alpha_init"]) < PARITY


@pytest.mark.parametrize("case", ["up", "down"])
def test_linear_layer_of_the_original(case):
    z = np.load(GOLDEN / f"cayley_linear_{case}.npz")
    arguments = [jnp.asarray(z[name]) for name in ("input/x", "param/weight", "param/bias", "param/alpha")]
    layer = lambda x, weight, bias, alpha: x @ cayley.dense(weight, alpha).T + bias  # noqa: E731
    y, grads = jax.jit(lambda g, *a: (layer(*a), jax.vjp(layer, *a)[1](g)))(
        jnp.asarray(z["input/cotangent"]), *arguments
    )
    assert relative(cayley.dense(arguments[1], arguments[3]), z["output/Q"]) < PARITY
    assert relative(y, z["output/y"]) < PARITY
    for grad, name in zip(grads, ("_x", "/weight", "/bias", "/alpha"), strict=True):
        assert relative(grad, z[f"output/grad{name}"]) < PARITY
    assert relative(cayley.dense(arguments[1], 1.01 * arguments[3]), z["output/Q"]) > 1e-6  # control


@pytest.mark.parametrize(
    ("kernel_size", "size", "c_in", "c_out"),
    everyday(
        [(*sizes, 2, 2) for sizes in SIZES]
        + [(*sizes, *c) for sizes in (SIZES[1], SIZES[4]) for c in ((2, 3), (3, 2))],
        *[(*SIZES[1], 2, 2), (*SIZES[4], 2, 2), (*SIZES[4], 2, 3), (*SIZES[4], 3, 2)],
    ),
)
def test_the_convolution_is_orthogonal(kernel_size, size, c_in, c_out):
    """The dense matrix, wherever the kernel and the map end; and it is the transform of `conv2d`'s matrix."""
    kernel, alpha = draw(kernel_size, c_in, c_out), jnp.asarray(1.5)
    response = jax.jit(cayley.response, static_argnums=2)(kernel, alpha, size)
    assert response.shape == (size[0], size[1] // 2 + 1, c_out, c_in)
    dense = to_matrix(jax.jit(functools.partial(convolve, response)), (*size, c_in))
    gram = dense.T @ dense if c_in <= c_out else dense @ dense.T
    # 20 u (1 + |A|) of `linalg.cayley`; the FFTs and the product of the check add a few n u.
    limit = (20 * (1 + 2 * 1.5 + 1.5**2) + 10 * len(gram)) * UNIT
    assert np.linalg.norm(gram - np.eye(len(gram)), 2) <= limit
    if c_in == c_out:
        # (I + A)^-1 (I - A) of the whole convolution, A its skew part: no frequency enters.
        weight = np.asarray(kernel / cayley.initial_alpha(kernel, size) * alpha)
        whole = to_matrix(lambda x: conv.conv2d(x, jnp.asarray(weight), padding="CIRCULAR"), (*size, c_in))
        skew, eye = whole - whole.T, np.eye(len(whole))
        expected = np.linalg.solve(eye + skew, eye - skew)
        assert np.linalg.norm(dense - expected, 2) <= 2 * limit
        # Control: another alignment of the kernel is another matrix, save where shifts do nothing.
        if min(size) > 1 and kernel_size != (1, 1):
            assert np.linalg.norm(dense - np.roll(expected, c_in, 0), 2) > 1e-3


@pytest.mark.parametrize(("size",), everyday([((4, 6),), ((5, 3),)], ((5, 3),)))
def test_the_norm_is_that_of_the_half_grid(size):
    kernel = draw((3, 2), 2, 3)
    expected = np.linalg.norm(np.asarray(conv.frequency_response(kernel, size)).ravel())
    np.testing.assert_allclose(cayley.initial_alpha(kernel, size), expected, rtol=1e-13)
    # With that alpha the kernel itself is transformed, and its scale is all that alpha replaces.
    untouched = linalg.cayley(conv.frequency_response(kernel, size))
    np.testing.assert_allclose(cayley.response(kernel, jnp.asarray(expected), size), untouched, rtol=0, atol=1e-12)
    scaled = cayley.response(1e3 * kernel, jnp.asarray(expected), size)
    np.testing.assert_allclose(scaled, untouched, rtol=0, atol=1e-12)
    assert not np.allclose(linalg.cayley(1e3 * conv.frequency_response(kernel, size)), untouched)  # control


def test_packed_blocks_are_the_response():
    """Every frequency once: of a pair +-f the response holds the other one as the conjugate."""
    kernel, alpha, size = draw((3, 3), 2, 3), jnp.asarray(2.0), (4, 6)
    fixed, paired = cayley.packed_response(kernel, alpha, size)
    assert (fixed.shape, paired.shape) == ((4, 3, 2), (10, 2, 3, 2))
    response = np.asarray(cayley.response(kernel, alpha, size))
    assert np.array_equal(response[0, 0], fixed[0])
    for column in (0, 3):
        np.testing.assert_array_equal(response[3, column], response[1, column].conj())


def test_zero_arrays_give_an_isometry_and_finite_gradients():
    kernel, alpha, weight = jnp.zeros((3, 3, 2, 3)), jnp.asarray(1.5), draw((4, 3), 3, 2)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(kernel, matrix, alpha):
        response, dense = cayley.response(kernel, alpha, (4, 4)), cayley.dense(matrix, alpha)
        return jnp.sum(response.real * weight) + jnp.sum(dense * weight[0, 0, :, :1]), (response, dense)

    (_, (response, dense)), grads = run(kernel, jnp.zeros((3, 2)), alpha)
    assert np.array_equal(response, np.broadcast_to(np.eye(3, 2), response.shape))
    assert np.array_equal(dense, np.eye(3, 2))
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)
    assert all(bool((grad != 0).any()) for grad in grads[:2])  # so training leaves the point


@pytest.mark.parametrize("precision", everyday(["x64", "x32"], "x32"), indirect=True)
def test_orthogonality_survives_gradient_steps_in_training_precision(precision):
    """Float32 under jit, with x64 on and off; the loss pulls the kernel along, and the convolution stays orthogonal."""
    kernel, x = draw((3, 3), 2, 4).astype("float32"), draw((5, 5), 6, 2).astype("float32").transpose(2, 0, 1, 3)
    target = draw((5, 5), 6, 4, seed=1).astype("float32").transpose(2, 0, 1, 3)
    alpha = cayley.initial_alpha(kernel, (5, 5))

    @jax.jit
    def step(kernel, alpha):
        loss = lambda k, a: jnp.mean((convolve(cayley.response(k, a, (5, 5)), x) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss, (0, 1))(kernel, alpha)
        return kernel - 3 * grads[0], alpha - 3 * grads[1], value

    values = []
    for _ in range(15):
        kernel, alpha, value = step(kernel, alpha)
        values.append(float(value))
    assert kernel.dtype == alpha.dtype == "float32"
    assert values[-1] < 0.98 * values[0]
    y = jax.jit(convolve)(jax.jit(cayley.response, static_argnums=2)(kernel, alpha, (5, 5)), x)
    before, after = (np.linalg.norm(np.asarray(z).reshape(6, -1), axis=1) for z in (x, y))
    # 20 u (1 + |A|), and the FFTs' few u.
    limit = 2.0**-24 * (20 * (1 + float(alpha)) ** 2 + 20)
    np.testing.assert_allclose(after, before, rtol=limit)
    assert limit < 1e-2  # control: a contraction by one per cent would show


def test_no_factorisation_waits_for_the_threads_that_compute_it():
    """JAX 0.10 hangs on the CPU if as many batched LAPACK calls run at once as there are cores: there are none."""

    def value(kernel, transform):
        return jnp.sum(transform(kernel).real ** 3)

    def layer(kernel):
        return cayley.response(kernel, jnp.array(1.0), (4, 4))

    kernel = jnp.ones((3, 3, 4, 4))
    for transform, expected in ((layer, False), (jnp.linalg.inv, True)):  # the second is the control
        program = jax.jit(jax.grad(value), static_argnums=1).lower(kernel, transform).compile().as_text()
        assert ("lapack" in program) == expected
