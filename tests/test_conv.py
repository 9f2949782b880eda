"""Convolutions against explicit loops over taps, and adjoints against inner products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import conv

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


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES)
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
