"""Convolution of NHWC images with HWIO kernels as a linear map: padding, the adjoint, the skew part of a kernel."""

import numbers

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Padding = str | tuple[tuple[int, int], tuple[int, int]]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def stride_pair(strides: int | tuple[int, int]) -> tuple[int, int]:
    """Strides of both axes as a pair. Raises: ValueError if one is below 1."""
    return _pair(strides, "stride")


def dilation_pair(dilation: int | tuple[int, int]) -> tuple[int, int]:
    """Distances between taps along both axes as a pair. Raises: ValueError if one is below 1."""
    return _pair(dilation, "dilation")


def _pair(value, name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(
        isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 1 for n in pair
    ):
        raise ValueError(f"Expected a {name} >= 1 or a pair of them, got {value!r}: it takes whole numbers.")
    return int(pair[0]), int(pair[1])


def window(kernel_size: tuple[int, ...], dilation: int | tuple[int, int] = 1) -> tuple[int, int]:
    """Sides of what an output reads: d (k - 1) + 1 pixels, which padding and sizes of dilated kernels go by."""
    (kh, kw), (dh, dw) = kernel_size[:2], dilation_pair(dilation)
    return dh * (kh - 1) + 1, dw * (kw - 1) + 1


def check_groups(in_channels: int, kernel_shape: tuple[int, ...], groups: int) -> None:
    """Raises: ValueError unless the kernel, (kh, kw, in_channels / groups, out), has outputs that groups divide."""
    per_group, outputs = kernel_shape[2:]
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"Expected a number of groups >= 1, got {groups!r}.")
    if groups == 1 and per_group != in_channels:
        raise ValueError(f"Expected an HWIO kernel for {in_channels} channels, got shape {tuple(kernel_shape)}.")
    if in_channels % groups or outputs % groups or per_group * groups != in_channels:
        raise ValueError(
            f"Expected a number of groups that divides the {in_channels} channels of the images and the outputs, and a "
            f"kernel (kh, kw, {in_channels} / groups, out), got {groups} groups and shape {tuple(kernel_shape)}."
        )


def without_groups(kernel: np.ndarray, groups: int = 1, dilation: int | tuple[int, int] = 1) -> np.ndarray:
    """The kernel of the same convolution with one group and dilation 1: zeros between groups and between taps.

    Args: kernel: (kh, kw, in / groups, out). Returns: (*window, in, out).
    """
    kh, kw, per_group, outputs = kernel.shape
    own, (dh, dw) = outputs // groups, dilation_pair(dilation)
    full = np.zeros((*window((kh, kw), dilation), per_group * groups, outputs), kernel.dtype)
    for g in range(groups):
        ours = slice(g * own, (g + 1) * own)
        full[::dh, ::dw, g * per_group : (g + 1) * per_group, ours] = kernel[..., ours]
    return full


def explicit_padding(kernel_size: tuple[int, ...], padding: Padding) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns added on each side of the image.

    Args:
      kernel_size: (kh, kw); of dilated kernels the `window`, here and in `output_size`.
      padding: "ZERO" ((k - 1) // 2 on both sides, as the papers' code), "VALID" (none), "CIRCULAR" ((k - 1) // 2 low
        and the rest of k - 1 high, filled by wrapping) or explicit ((lo, hi), (lo, hi)) zeros.
    Returns: ((lo, hi), (lo, hi)). Raises: ValueError for any other padding.
    """
    low = [(k - 1) // 2 for k in kernel_size]
    if padding == "ZERO":
        return (low[0], low[0]), (low[1], low[1])
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding == "CIRCULAR":
        return (low[0], kernel_size[0] - 1 - low[0]), (low[1], kernel_size[1] - 1 - low[1])
    try:
        (a, b), (c, d) = padding
        pads = ((int(a), int(b)), (int(c), int(d)))
    except (TypeError, ValueError):
        pads = None
    if pads is None or min(*pads[0], *pads[1]) < 0:
        raise ValueError(f"Expected padding 'ZERO', 'VALID', 'CIRCULAR' or ((lo, hi), (lo, hi)) >= 0, got {padding!r}.")
    return pads


def output_size(
    size: tuple[int, ...], kernel_size: tuple[int, ...], strides: int | tuple[int, int], padding: Padding
) -> tuple[int, ...]:
    """Height and width after a convolution: (n + lo + hi - k) // s + 1 per axis.

    Raises: ValueError if the kernel does not fit, or a circular convolution's size is no multiple of its stride.
    """
    steps, pads = stride_pair(strides), explicit_padding(kernel_size, padding)
    if padding == "CIRCULAR" and any(n % s for n, s in zip(size, steps, strict=True)):
        raise ValueError(f"A circular convolution needs sizes divisible by its strides, got {size} and {steps}.")
    out = tuple((n + lo + hi - k) // s + 1 for n, k, s, (lo, hi) in zip(size, kernel_size, steps, pads, strict=True))
    if min(out) < 1:
        raise ValueError(f"A kernel of {kernel_size} does not fit images of {size} with padding {padding!r}.")
    return out


def _pad_input(x: Float[Array, "b h w c"], kernel_size: tuple[int, ...], padding: Padding):
    """Returns the image with its circular padding filled in, and the zero padding that is left to do."""
    pads = explicit_padding(kernel_size, padding)
    if padding == "CIRCULAR":
        return jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap"), ((0, 0), (0, 0))
    return x, pads


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "ZERO",
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    precision: lax.Precision | None = None,
) -> Float[Array, "b hh ww o"]:
    """Cross-correlation y[p] = sum_t K[t] x[s p + d t - lo].

    Args:
      x: images, NHWC, any unit.
      kernel: HWIO; (kh, kw, c / groups, o) for groups.
      strides: one number or one for each axis.
      padding: see `explicit_padding`. "ZERO" differs from XLA's SAME when strided; "CIRCULAR" sums taps beyond the map.
      groups: how many parts channels are divided into; part g of the outputs reads part g of the inputs alone.
      dilation: d, the distance between taps: one number or one for each axis.
      precision: of the products; None takes JAX's default.
    Returns: (b, (h + lo + hi - d (kh - 1) - 1) // s + 1, ..., o), in the unit of x.
    Raises: ValueError if channels or sizes do not fit.
    Example: three taps of 1 add each pixel to its neighbours.
      >>> lipjax.conv.conv2d(jnp.arange(4.0).reshape(1, 1, 4, 1), jnp.ones((1, 3, 1, 1))).ravel().tolist()
      [1.0, 3.0, 6.0, 5.0]
    """
    if x.shape[-1] != kernel.shape[2] * groups:
        raise ValueError(
            f"Expected images with {kernel.shape[2] * groups} channels (kernel HWIO {kernel.shape}), got {x.shape}."
        )
    check_groups(x.shape[-1], kernel.shape, groups)
    reads = window(kernel.shape, dilation)
    output_size(x.shape[1:3], reads, strides, padding)
    x, pads = _pad_input(x, reads, padding)
    if kernel.shape[:2] == (1, 1) and (groups, stride_pair(strides), pads) == (1, (1, 1), ((0, 0), (0, 0))):
        # One matrix for all pixels: XLA for CPU computes it as a product in half the time of a convolution.
        return jnp.matmul(x, kernel[0, 0], precision=precision)
    return lax.conv_general_dilated(
        x,
        kernel,
        stride_pair(strides),
        pads,
        rhs_dilation=dilation_pair(dilation),
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
        precision=precision,
    )


def conv2d_adjoint(
    y: Float[Array, "b hh ww c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    in_size: tuple[int, ...],
    strides: int | tuple[int, int] = 1,
    padding: Padding = "ZERO",
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    precision: lax.Precision | None = None,
) -> Float[Array, "b h w j"]:
    """The adjoint of `conv2d` on images of height and width `in_size`: <conv2d(x), y> = <x, conv2d_adjoint(y)>.

    Args, errors: as `conv2d`. Returns: (b, *in_size, i groups).
    """
    reads = window(kernel.shape, dilation)
    steps, pads = stride_pair(strides), explicit_padding(reads, padding)
    out = output_size(in_size, reads, strides, padding)
    if y.shape[1:] != (*out, kernel.shape[3]):
        raise ValueError(f"Expected outputs of shape (b, {out[0]}, {out[1]}, {kernel.shape[3]}), got {y.shape}.")
    if padding == "CIRCULAR":
        kwargs = {
            "strides": strides,
            "padding": "VALID",
            "precision": precision,
            "groups": groups,
            "dilation": dilation,
        }
        padded = tuple(n + lo + hi for n, (lo, hi) in zip(in_size, pads, strict=True))
        return _fold(conv2d_adjoint(y, kernel, in_size=padded, **kwargs), in_size, pads)
    check_groups(kernel.shape[2] * groups, kernel.shape, groups)
    if kernel.shape[:2] == (1, 1) and (groups, steps, pads) == (1, (1, 1), ((0, 0), (0, 0))):
        return jnp.matmul(y, kernel[0, 0].T, precision=precision)
    # The correlation with the flipped kernel reaches every input that an output has read; the others stay zero.
    grown = tuple(
        (k - 1 - lo, n + lo - s * (m - 1) - 1)
        for n, k, s, m, (lo, _) in zip(in_size, reads, steps, out, pads, strict=True)
    )
    return lax.conv_general_dilated(
        y,
        adjoint_kernel(kernel, groups),
        (1, 1),
        grown,
        lhs_dilation=steps,
        rhs_dilation=dilation_pair(dilation),
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
        precision=precision,
    )


def _fold(x: Float[Array, "b h w c"], size: tuple[int, ...], pads) -> Float[Array, "b hh ww c"]:
    """The adjoint of circular padding: every padded pixel is added to the one that it copies."""
    for axis, (n, (lo, _)) in enumerate(zip(size, pads, strict=True), start=1):
        target = (jnp.arange(x.shape[axis]) - lo) % n
        moved = jnp.moveaxis(x, axis, 0)
        x = jnp.moveaxis(jnp.zeros((n, *moved.shape[1:]), x.dtype).at[target].add(moved), 0, axis)
    return x


def adjoint_kernel(kernel: Float[Array, "kh kw i o"], groups: int = 1) -> Float[Array, "kh kw j p"]:
    """Taps in reverse order, channels swapped, within each group: (kh, kw, o / groups, i groups).

    With an odd window, "ZERO" or "CIRCULAR", and stride 1, it is the kernel of the adjoint.
    """
    kh, kw, per_group, outputs = kernel.shape
    parts = jnp.flip(kernel, (0, 1)).reshape(kh, kw, per_group, groups, outputs // groups)
    return parts.transpose(0, 1, 4, 3, 2).reshape(kh, kw, outputs // groups, groups * per_group)


def check_square(kernel: Float[Array, "kh kw i o"], groups: int = 1) -> None:
    """Raises: ValueError for an even side or unequal channels, inside a group."""
    kh, kw, per_group, outputs = kernel.shape
    if not (kh % 2 and kw % 2) or per_group * groups != outputs:
        of_groups = f" in {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"Expected an HWIO kernel with odd sides and equal channels{of_groups}, got shape {kernel.shape}."
        )


def skew_kernel(kernel: Float[Array, "kh kw i c"], groups: int = 1) -> Float[Array, "kh kw i c"]:
    """(K - K*) / 2, K* the kernel of the adjoint: its stride-1 convolution A, "ZERO" or "CIRCULAR", has A^T = -A.

    Args:
      kernel: HWIO (kh, kw, c, c), odd sides, any numbers; (kh, kw, c / groups, c) for groups.
      groups: as of `conv2d`; each has a skew kernel of its own.
    Returns: the same shape, bit for bit the negative of its own adjoint, also under jit.
    Raises: ValueError for an even side or unequal channels. Source: Singla & Feizi 2021, arXiv:2105.11417.
    Example:
      >>> lipjax.conv.skew_kernel(jnp.array([0.0, 5.0, 1.0]).reshape(1, 3, 1, 1)).ravel().tolist()
      [-0.5, 0.0, 0.5]
    """
    check_square(kernel, groups)
    return (kernel - adjoint_kernel(kernel, groups)) / 2
