"""Convolutions against explicit loops over taps, adjoints against inner products, the series against dense matrices."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from tiers import everyday

from lipjax import conv

pytestmark = pytest.mark.quick_compiles

CASES = [  # size, kernel, strides, padding
    ((5, 6), (3, 3), 1, "ZERO"),
    ((5, 6), (4, 2), 1, "ZERO"),
    ((7, 6), (5, 5), 2, "ZERO"),
    ((8, 8), (4, 4), 4, "VALID"),
    ((7, 5), (3, 2), (2, 1), ((1, 0), (0, 2))),
    ((6, 4), (3, 3), 1, "CIRCULAR"),
    ((6, 4), (3, 4), 2, "CIRCULAR"),
    ((2, 2), (3, 3), 1, "CIRCULAR"),
    ((1, 1), (3, 3), 1, "CIRCULAR"),
    ((2, 3), (7, 5), 1, "CIRCULAR"),
    ((3, 3), (1, 1), 2, "ZERO"),
    ((3, 2), (1, 1), 1, "ZERO"),
    ((3, 2), (1, 1), 1, "CIRCULAR"),
    ((2, 2), (1, 1), 1, ((2, 1), (0, 3))),
]


def conv_by_loops(x, kernel, strides, padding):
    """y[p] = sum_t K[t] x[s p + t - lo], tap by tap: nothing but index arithmetic."""
    (sh, sw) = (strides, strides) if isinstance(strides, int) else strides
    b, h, w, _ = x.shape
    kh, kw, _, c_out = kernel.shape
    if padding == "CIRCULAR":
        (lo_h, lo_w), (oh, ow) = ((kh - 1) // 2, (kw - 1) // 2), (h // sh, w // sw)
    else:
        named = {"ZERO": (((kh - 1) // 2,) * 2, ((kw - 1) // 2,) * 2), "VALID": ((0, 0), (0, 0))}
        (lo_h, hi_h), (lo_w, hi_w) = named.get(padding, padding) if isinstance(padding, str) else padding
        oh, ow = (h + lo_h + hi_h - kh) // sh + 1, (w + lo_w + hi_w - kw) // sw + 1
    y = np.zeros((b, oh, ow, c_out))
    for i, j, a, c in np.ndindex(oh, ow, kh, kw):
        row, col = sh * i + a - lo_h, sw * j + c - lo_w
        if padding == "CIRCULAR":
            row, col = row % h, col % w
        if 0 <= row < h and 0 <= col < w:
            y[:, i, j] += x[:, row, col] @ kernel[a, c]
    return y


def draw(size, kernel, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, *size, 3)), rng.normal(size=(*kernel, 3, 4))


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES)
def test_conv_is_the_sum_over_taps(size, kernel, strides, padding):
    x, k = draw(size, kernel)
    expected = conv_by_loops(x, k, strides, padding)
    got = np.asarray(conv.conv2d(jnp.asarray(x), jnp.asarray(k), strides=strides, padding=padding))
    assert got.shape == expected.shape
    # Sums of n products in any order differ by at most 2 n u times the sum of absolute products.
    terms = k.shape[0] * k.shape[1] * k.shape[2]
    bound = 2 * terms * 2.0**-53 * conv_by_loops(np.abs(x), np.abs(k), strides, padding)
    assert (np.abs(got - expected) <= bound).all()
    # Control: the comparison tells a kernel from one with its input channels swapped.
    assert np.abs(conv_by_loops(x, k[:, :, ::-1], strides, padding) - expected).max() > 1e-3


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), everyday(CASES, *CASES[2:7], CASES[9], CASES[-1]))
def test_adjoint(size, kernel, strides, padding):
    x, k = draw(size, kernel)
    y = conv.conv2d(jnp.asarray(x), jnp.asarray(k), strides=strides, padding=padding)
    z = np.random.default_rng(1).normal(size=y.shape)
    back = conv.conv2d_adjoint(jnp.asarray(z), jnp.asarray(k), in_size=size, strides=strides, padding=padding)
    assert back.shape == x.shape
    scale = np.sum(np.abs(np.asarray(y)) * np.abs(z)) + np.sum(np.abs(x) * np.abs(np.asarray(back)))
    assert abs(np.sum(np.asarray(y) * z) - np.sum(x * np.asarray(back))) <= 1e3 * 2.0**-53 * scale
    if min(size) > 1 and min(kernel) > 1:
        wrong = np.sum(x * np.asarray(back)[:, ::-1])
        assert abs(np.sum(np.asarray(y) * z) - wrong) > 1e-6 * scale


def test_zero_padding_is_not_xla_same_when_strided():
    x, k = (jnp.asarray(a) for a in draw((6, 6), (3, 3)))
    same = jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    ours = conv.conv2d(x, k, strides=2)
    assert same.shape == ours.shape and np.abs(np.asarray(same - ours)).max() > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, k: conv.conv2d(x[..., :2], k), "channels"),
        (lambda x, k: conv.conv2d(x, k, padding="SAME"), "padding"),
        (lambda x, k: conv.conv2d(x, k, padding=((0, -1), (0, 0))), "padding"),
        (lambda x, k: conv.conv2d(x, k, strides=0), "stride"),
        (lambda x, k: conv.conv2d(x, k, strides=4, padding="CIRCULAR"), "divisible"),
        (lambda x, k: conv.conv2d(x[:, :2], k, padding="VALID"), "does not fit"),
        (lambda x, k: conv.conv2d_adjoint(x, k, in_size=(6, 6)), "shape"),
    ],
)
def test_misuse_says_what_was_expected(call, message):
    x, k = (jnp.asarray(a) for a in draw((6, 6), (3, 3)))
    with pytest.raises(ValueError, match=message):
        call(x, k)


SKEW_CASES = [  # size, kernel, padding
    ((4, 5), (3, 3), "ZERO"),
    ((4, 5), (3, 5), "CIRCULAR"),
    ((2, 2), (3, 3), "CIRCULAR"),
    ((1, 1), (3, 3), "ZERO"),
    ((2, 3), (1, 1), "ZERO"),
]


def to_matrix(function, shape):
    """The dense matrix of a linear map of images, by applying it to the identity."""
    size = math.prod(shape)
    return np.asarray(function(jnp.eye(size).reshape(size, *shape))).reshape(size, -1).T


def draw_skew(kernel=(3, 3), channels=2, norm=2.0, seed=0):
    """A skew kernel with |A| <= norm: sqrt(kh kw) times the norm of the kernel as a matrix."""
    raw = np.random.default_rng(seed).normal(size=(*kernel, channels, channels))
    skew = np.asarray(conv.skew_kernel(jnp.asarray(raw)))
    return jnp.asarray(skew * (norm / math.sqrt(math.prod(kernel)) / np.linalg.norm(skew.reshape(-1, channels), 2)))


@pytest.mark.parametrize(("size", "kernel", "padding"), SKEW_CASES)
def test_skew_kernel_is_the_skew_part(size, kernel, padding):
    raw = jnp.asarray(np.random.default_rng(3).normal(size=(*kernel, 3, 3)))
    whole = to_matrix(lambda x: conv.conv2d(x, raw, padding=padding), (*size, 3))
    skew = to_matrix(lambda x: conv.conv2d(x, conv.skew_kernel(raw), padding=padding), (*size, 3))
    np.testing.assert_allclose(skew, (whole - whole.T) / 2, atol=1e-14)
    back = to_matrix(lambda x: conv.conv2d(x, conv.adjoint_kernel(raw), padding=padding), (*size, 3))
    np.testing.assert_allclose(back, whole.T, atol=1e-14)
    assert np.abs(whole + whole.T).max() > 0.1  # control


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_skew_kernel_is_skew_bit_for_bit(dtype, compiled):
    raw = np.random.default_rng(4).normal(size=(3, 5, 17, 17)).astype(dtype)
    raw *= 10.0 ** np.random.default_rng(5).integers(-20, 20, raw.shape).astype(dtype)
    make = jax.jit(conv.skew_kernel) if compiled else conv.skew_kernel
    kernel = np.asarray(make(jnp.asarray(raw)))
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(kernel, -np.flip(kernel, (0, 1)).swapaxes(2, 3))
    assert (raw != -np.flip(raw, (0, 1)).swapaxes(2, 3)).any()  # control


def test_skew_kernel_refuses_what_has_no_adjoint_of_its_shape():
    for shape in ((2, 3, 2, 2), (3, 2, 2, 2), (3, 3, 2, 3)):
        with pytest.raises(ValueError, match="odd sides and equal channels"):
            inspect.unwrap(conv.skew_kernel)(jnp.zeros(shape))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_space_to_depth_orders_channels_first(block):
    x = np.random.default_rng(6).normal(size=(2, 2 * block, 3 * block, 4))
    y = np.asarray(conv.space_to_depth(jnp.asarray(x), block))
    assert y.shape == (2, 2, 3, 4 * block**2)
    for i, j, c, a, b in np.ndindex(2, 3, 4, block, block):
        np.testing.assert_array_equal(y[:, i, j, (c * block + a) * block + b], x[:, i * block + a, j * block + b, c])
    np.testing.assert_array_equal(np.asarray(conv.depth_to_space(jnp.asarray(y), block)), x)


def test_blocks_that_do_not_fit_are_refused():
    x = jnp.zeros((1, 4, 6, 3))
    for block in (0, 3, 4):
        with pytest.raises(ValueError, match="block size"):
            conv.space_to_depth(x, block)
    for block in (0, 2):
        with pytest.raises(ValueError, match="block size"):
            conv.depth_to_space(x, block)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("size", "kernel", "padding"), SKEW_CASES)
def test_series_is_the_exponential_up_to_the_documented_error(size, kernel, padding, fast):
    k = draw_skew(kernel)
    apply = conv.series_exponential_fast_gradient if fast else conv.series_exponential
    skew = to_matrix(lambda x: conv.conv2d(x, k, padding=padding), (*size, 2))
    exact, norm = scipy.linalg.expm(skew), np.linalg.norm(skew, 2)
    for n in (1, 2, 4, 7):
        dense = to_matrix(lambda x, n=n: apply(x, k, num_terms=n, padding=padding), (*size, 2))
        powers = sum(np.linalg.matrix_power(skew, j) / math.factorial(j) for j in range(n + 1))
        np.testing.assert_allclose(dense, powers, atol=1e-13)
        error = np.linalg.norm(dense - exact, 2)
        assert error <= norm ** (n + 1) / math.factorial(n + 1) + 1e-13
        if norm > 0.5:
            assert error > norm ** (n + 2) / math.factorial(n + 2)  # control: one power more is too little


def sinc(t):
    return np.sinc(t / np.pi)


def test_fast_gradient_follows_the_sinc_law():
    shape, k = (3, 4, 2), draw_skew(norm=3.0)
    rng = np.random.default_rng(7)
    x, g = (jnp.asarray(a) for a in rng.normal(size=(2, 1, *shape)))
    direction = rng.normal(size=k.shape)

    def slopes(apply):
        function = jax.jit(lambda x, k: apply(x, k, num_terms=30))
        grad_x, grad_k = jax.jit(lambda g: jax.vjp(function, x, k)[1](g))(g)
        return np.asarray(grad_x), float(np.sum(np.asarray(grad_k) * direction))

    skew = to_matrix(lambda x: conv.conv2d(x, k), shape)
    change = to_matrix(lambda x: conv.conv2d(x, jnp.asarray(direction)), shape)
    thetas, basis = np.linalg.eigh(-1j * skew)
    entries = basis.conj().T @ change @ basis
    phase = np.exp(1j * np.add.outer(thetas, thetas) / 2)
    left, right = np.asarray(g).ravel() @ basis, basis.conj().T @ np.asarray(x).ravel()
    exact = (left @ (phase * sinc(np.subtract.outer(thetas, thetas) / 2) * entries) @ right).real
    damped = (left @ (phase * np.outer(sinc(thetas / 2), sinc(thetas / 2)) * entries) @ right).real
    (grad_x, slope), (fast_grad_x, fast_slope) = map(
        slopes, (conv.series_exponential, conv.series_exponential_fast_gradient)
    )
    assert slope == pytest.approx(exact, rel=1e-11) and fast_slope == pytest.approx(damped, rel=1e-11)
    assert abs(slope / fast_slope - 1) > 1e-3  # control: the two laws differ
    np.testing.assert_allclose(grad_x, fast_grad_x, atol=1e-13)


def test_fast_gradient_of_images_is_exact_for_kernels_that_are_not_skew(key):
    x, g = jax.random.normal(key, (2, 1, 4, 4, 2))
    k = jax.random.normal(key, (3, 3, 2, 2)) / 4
    found = [
        jax.jit(lambda x, f=f: jax.vjp(lambda x: f(x, k, num_terms=5, padding="CIRCULAR"), x)[1](g)[0])(x)
        for f in (conv.series_exponential, conv.series_exponential_fast_gradient)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-13)


@pytest.mark.parametrize("apply", [conv.series_exponential, conv.series_exponential_fast_gradient])
def test_series_refuses_what_it_cannot_compute(apply):
    apply, x, k = inspect.unwrap(apply), jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2))
    with pytest.raises(ValueError, match="num_terms >= 1"):
        apply(x, k, num_terms=0)
    with pytest.raises(ValueError, match="'ZERO' or 'CIRCULAR'"):
        apply(x, k, num_terms=3, padding="VALID")
    with pytest.raises(ValueError, match="odd sides"):
        apply(x, jnp.zeros((2, 2, 2, 2)), num_terms=3)
    with pytest.raises(ValueError, match="channels"):
        apply(x[..., :1], k, num_terms=3)
