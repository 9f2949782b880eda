"""Orthogonal convolutions with an explicit kernel, from projectors: AOC, and the factor order of SC-Fac.

A projector P = Q Q^T (Q with orthonormal columns) makes the kernel of two taps P, I - P along one axis, whose symbol
P + (I - P) z is unitary. Products of such symbols, and of constant orthogonal matrices, are convolutions that preserve
norms: with circular padding for maps of any size, and with zeros on an infinite map. Cropping channels, or an iteration
that has not made Q orthonormal (P between 0 and I then), leaves a norm of at most 1. The kernel is that of an ordinary
`operators.Conv`; what certifies is the proved norm of the kernel that is stored.

Source: Boissin et al. 2025, arXiv:2501.07930, and its code orthogonium 0.0.4 (AOC); Su, Byeon & Huang 2022,
arXiv:2106.09121 (SC-Fac); Xiao et al. 2018, arXiv:1806.05393 (the factors).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax import _spread
from lipjax.parametrize import bjorck

Kernel = Float[Array, "kh kw i o"]
Raw = dict[str, Array]
Vectors = dict[str, bjorck.Vectors]

ORDERS = ("aoc", "scfac")


def compose(first: Kernel, second: Float[Array, "lh lw o p"]) -> Float[Array, "mh mw i p"]:
    """The kernel of `first`, then `second`, both of stride 1 (or `second` strided: the result has its stride).

    Taps (0, 0) aligned: out[t] = sum_u first[t - u] second[u]. Exact on an infinite map and with circular padding, up
    to a shift.

    Args:
      first: HWIO.
      second: HWIO, its inputs the outputs of `first`.
    Returns: HWIO, of kh + lh - 1 by kw + lw - 1 taps.
    Example:
      >>> lipjax.parametrize.aoc.compose(jnp.ones((3, 3, 2, 4)), jnp.ones((2, 2, 4, 8))).shape
      (4, 4, 2, 8)
    """
    lh, lw = second.shape[:2]

    def moved(y: int, x: int) -> Array:
        term = jnp.matmul(first, second[y, x], precision=lax.Precision.HIGHEST)
        return jnp.pad(term, ((y, lh - 1 - y), (x, lw - 1 - x), (0, 0), (0, 0)))

    terms = [moved(y, x) for y in range(lh) for x in range(lw)]
    return sum(terms[1:], terms[0])


def projectors(columns: Float[Array, "*batch c r"]) -> Float[Array, "*batch c c"]:
    """The projectors Q Q^T, symmetric up to rounding.

    Args:
      columns: Q, (..., c, r), with orthonormal columns.
    Returns: (..., c, c).
    Example:
      >>> lipjax.parametrize.aoc.projectors(jnp.array([[1.0], [0.0]])).tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    return _spread.gathered(_spread.product(columns, jnp.swapaxes(columns, -1, -2)))


def through(
    kernel: Kernel, projector: Float[Array, "o o"], axis: int, *, late: bool = False
) -> Float[Array, "mh mw i o"]:
    """The kernel, then the factor with taps P, I - P along axis 0 (height) or 1 (width); late: taps I - P, P.

    `compose` with that factor at half the price: K (I - P) is K - K P.
    """
    projected = jnp.matmul(kernel, projector, precision=lax.Precision.HIGHEST)
    taps = (kernel - projected, projected) if late else (projected, kernel - projected)

    def padded(x: Array, before: int) -> Array:
        return jnp.pad(x, [(before, 1 - before) if a == axis else (0, 0) for a in range(4)])

    return padded(taps[0], 0) + padded(taps[1], 1)


def check_rank(channels: int, rank: int | None) -> int:
    """The rank of projectors: rank, or half of the channels, rounded down, for None.

    Args:
      channels: that the projectors act on.
      rank: wanted, or None.
    Returns: the rank.
    Raises: ValueError unless 1 <= rank < channels.
    Example:
      >>> lipjax.parametrize.aoc.check_rank(9, None)
      4
    """
    rank = channels // 2 if rank is None else rank
    if channels < 2:
        raise ValueError(
            f"Expected at least 2 channels on the wider side of the layer, got {channels}: a single channel leaves "
            "nothing to project on. Take more features, or kernel_size = strides."
        )
    if not 1 <= rank < channels:
        raise ValueError(
            f"Expected a rank from 1 to {channels - 1} for projectors on {channels} channels (the larger of input and "
            f"output), got {rank}. None takes half of them, {channels // 2}."
        )
    return rank


def raw_shapes(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    strides: int = 1,
    *,
    rank: int | None = None,
    order: str = "aoc",
    groups: int = 1,
    dilation: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the raw arrays of a layer, by which it is routed.

    order "aoc", m = max(in_channels, out_channels), k = kernel_size, s = strides:
      k = s: "patch" (k, k, in, out), orthogonalised as the matrix of a patch (`bjorck.rko`);
      s = 1: "columns" (2 k, m, rank), of 2 k projectors;
      k > s > 1: "columns" of a convolution with k - s + 1 taps a side, of stride 1, to q = max(in, out // s^2)
        channels, and "patch" (s, s, q, out) that follows it; with dilation > 1 and in >= out those of s = 1.
    order "scfac", m = max(in s^2, out): "squares" (2, m, m) and "columns" (2 (k / s - 1), m, rank).
    With groups > 1 these of in / groups and out / groups channels, for each group: a further axis in front.

    Args:
      in_channels, out_channels: of the layer.
      kernel_size, strides: k and s, of both axes.
      rank: of the projectors; None for half of the channels that they act on, rounded down.
      order: "aoc" or "scfac".
      groups, dilation: as of `operators.Conv`.
    Returns: name -> shape.
    Raises: ValueError for channels, k or s below 1, k < s, a rank that does not fit, another order; with "scfac" if s
      does not divide k; for groups that do not divide the channels, and a dilation that has a factor with s.
    Example:
      >>> lipjax.parametrize.aoc.raw_shapes(16, 32, 3)
      {'columns': (6, 32, 16)}
    """
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"Expected groups >= 1 that divide the channels, got {groups} groups and {in_channels} -> {out_channels} "
            "channels."
        )
    if dilation < 1 or math.gcd(dilation, strides) > 1:
        raise ValueError(
            f"Expected a dilation >= 1 that has no factor in common with strides, got dilation {dilation} and strides "
            f"{strides}: some pixels would be read several times and others never, and nothing would be orthogonal."
        )
    sizes = in_channels // groups, out_channels // groups, kernel_size, strides
    shapes = _shapes_of_group(*sizes, rank, order, dilation)
    return shapes if groups == 1 else {name: (groups, *shape) for name, shape in shapes.items()}


def _shapes_of_group(
    in_channels: int, out_channels: int, k: int, s: int, rank: int | None, order: str, dilation: int
) -> dict[str, tuple[int, ...]]:
    if order not in ORDERS:
        raise ValueError(f"Expected an order out of {', '.join(ORDERS)}, got {order!r}.")
    if min(in_channels, out_channels, k, s) < 1:
        raise ValueError(
            "Expected channels, kernel_size and strides of at least 1, "
            f"got {in_channels} -> {out_channels} channels, kernel_size {k}, strides {s}."
        )
    if k < s:
        raise ValueError(
            f"Expected kernel_size >= strides, got kernel_size {k} and strides {s}: pixels between windows would be "
            f"lost, so no such convolution is orthogonal. Take kernel_size {s} or more."
        )
    if order == "scfac":
        if k % s:
            raise ValueError(
                f"Expected a kernel_size that strides divide (order 'scfac'), got kernel_size {k} and strides {s}. "
                f"Take {k - k % s} or {k - k % s + s}, or order 'aoc'."
            )
        channels, factors = max(in_channels * s**2, out_channels), k // s - 1
        shapes: dict[str, tuple[int, ...]] = {"squares": (2, channels, channels)}
        if factors:
            shapes["columns"] = (2 * factors, channels, check_rank(channels, rank))
        return shapes
    if k == s:
        return {"patch": (k, k, in_channels, out_channels)}
    shapes, to, side = {}, out_channels, k
    if s > 1 and not (dilation > 1 and in_channels >= out_channels):
        side = k - s + 1
        to = max(in_channels, out_channels // s**2)
        shapes["patch"] = (s, s, to, out_channels)
    channels = max(in_channels, to)
    return {"columns": (2 * side, channels, check_rank(channels, rank))} | shapes


def matrices(name: str, raw: Float[Array, "..."]) -> Float[Array, "*batch m n"]:
    """The matrices (..., m, n) that a raw array is orthogonalised as, of one group or of several."""
    if name != "patch":
        return raw
    return jax.vmap(bjorck.as_matrix)(raw) if raw.ndim == 5 else bjorck.as_matrix(raw)


def needs_vectors(name: str, shape: tuple[int, ...], method: str) -> bool:
    """True if an array is scaled by an estimate of its norm."""
    return bjorck.needs_vectors(method) and not (name == "columns" and _is_single(shape))


def _is_single(shape: tuple[int, ...]) -> bool:
    """True if columns (n, c, r) are divided by their length + 1e-8 instead, as the original does where c // 2 is 1."""
    return shape[-1] == 1 and shape[-2] < 4


def advance(raw: Raw, vectors: Vectors, num_iters: int) -> Vectors:
    """Moves the vectors by steps of power iteration (`bjorck.advance`).

    Args: raw: by name, of `raw_shapes`. vectors: {name: {"u", "v"}} for those arrays that `needs_vectors`.
    """
    return {name: bjorck.advance(matrices(name, raw[name]), of_array, num_iters) for name, of_array in vectors.items()}


def orthonormal(
    raw: Raw, vectors: Vectors, *, method: str = "bjorck", num_iters: int = bjorck.NUM_ITERS
) -> dict[str, Array]:
    """The raw arrays, orthogonalised: "columns" and "squares" as matrices, "patch" as an HWIO kernel."""

    def of_array(name: str, array: Array) -> Array:
        if name == "patch":
            options = {"strides": array.shape[0], "method": method, "num_iters": num_iters}
            return bjorck.rko(array, vectors.get(name, {}), **options)
        if name == "columns" and _is_single(array.shape):
            return bjorck.normalised(array[..., 0], bjorck.ORTHOGONIUM.floor)[..., None]
        return bjorck.orthogonalize(array, vectors.get(name, {}), method, num_iters)

    return {name: of_array(name, array) for name, array in raw.items()}


def kernel(
    raw: Raw,
    vectors: Vectors,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    strides: int = 1,
    *,
    order: str = "aoc",
    method: str = "bjorck",
    num_iters: int = bjorck.NUM_ITERS,
    groups: int = 1,
    dilation: int = 1,
) -> Kernel:
    """The kernel of an orthogonal convolution from unconstrained arrays, for `operators.Conv` with these strides.

    Orthogonal where the method converges: it preserves norms if out >= in strides^2, its adjoint does if out <=
    in strides^2, with circular padding on maps of any size that strides divide. A contraction otherwise, and with zero
    padding. A strided layer with more outputs than inputs is orthogonal only if its parts fit, as in the original.

    Args:
      raw: arrays of `raw_shapes`, float32 or float64.
      vectors: for those of them that `needs_vectors`, from `advance`; taken as they are, constants for the gradient.
      in_channels, out_channels, kernel_size, strides, order: as of `raw_shapes`.
      method, num_iters: of `bjorck.orthogonalize`.
      groups, dilation: those of the convolution; every group is orthogonal by itself.
    Returns: (kernel_size, kernel_size, in / groups, out), HWIO. The layer that goes back, from out to in channels, is
      `operators.ConvTranspose` of this one.
    Raises: ValueError as `raw_shapes`, and for arrays of other shapes.
    Source: of the module; routing as in orthogonium 0.0.4.
    Example: two channels, three taps a side; a circular map keeps its length.
      >>> from lipjax.parametrize import aoc, bjorck
      >>> raw = {name: jax.random.normal(jax.random.key(i), shape)
      ...        for i, (name, shape) in enumerate(aoc.raw_shapes(2, 2, 3).items())}
      >>> start = {name: bjorck.init_vectors(aoc.matrices(name, a).shape, jax.random.key(9)) for name, a in raw.items()
      ...          if aoc.needs_vectors(name, a.shape, "bjorck")}
      >>> kernel = aoc.kernel(raw, aoc.advance(raw, start, 50), 2, 2, 3, num_iters=30)
      >>> y = lipjax.conv.conv2d(jnp.ones((1, 4, 4, 2), kernel.dtype), kernel, padding="CIRCULAR")
      >>> kernel.shape, round(float(jnp.linalg.norm(y) / jnp.sqrt(32)), 3)
      ((3, 3, 2, 2), 1.0)
    """
    rank = raw["columns"].shape[-1] if "columns" in raw else None
    sizes = in_channels, out_channels, kernel_size, strides
    shapes = raw_shapes(*sizes, rank=rank, order=order, groups=groups, dilation=dilation)
    found = {name: tuple(array.shape) for name, array in raw.items()}
    if found != shapes:
        raise ValueError(f"Expected raw arrays {shapes}, got {found}: take those of `raw_shapes`.")
    if groups > 1:
        options = {"order": order, "method": method, "num_iters": num_iters, "dilation": dilation}
        own = functools.partial(_of_group, sizes=(in_channels // groups, out_channels // groups, *sizes[2:]), **options)
        parts = jax.vmap(own)(raw, vectors)
        return jnp.moveaxis(parts, 0, 3).reshape(*parts.shape[1:4], out_channels)
    made = orthonormal(raw, vectors, method=method, num_iters=num_iters)
    if order == "scfac":
        return separable(made["squares"], made.get("columns"), in_channels, out_channels, strides)
    if "columns" not in made:
        return made["patch"]
    if "patch" not in made:
        return reflected(made["columns"], in_channels, out_channels)
    return compose(reflected(made["columns"], in_channels, made["patch"].shape[2]), made["patch"])


def _of_group(raw: Raw, vectors: Vectors, sizes: tuple[int, ...], **options) -> Kernel:
    return kernel(raw, vectors, *sizes, **options)


def reflected(columns: Float[Array, "n c r"], in_channels: int, out_channels: int) -> Kernel:
    """AOC's product of orthonormal columns, n = 2 k: two reflections, cropped, then k - 1 pairs of factors.

    With P_0, ..., P_(2k-1) the projectors: C = (I - 2 P_0)(I - 2 P_1), the first min(in, out) columns of it; pair j is
    P_(k+1+j) along the width, then P_(2+j) along the height. More inputs than outputs: the transposed matrices of the
    layer that goes the other way, tap by tap, not flipped.

    Returns: (k, k, in, out). Source: Boissin et al. 2025, arXiv:2501.07930.
    """
    p, k = projectors(columns), columns.shape[0] // 2
    eye = jnp.eye(columns.shape[1], dtype=columns.dtype)
    narrow = min(in_channels, out_channels)
    # HWIO slices act from the right: they are the transposed matrices of the maps.
    kernel = _spread.product(eye - 2 * p[1], eye - 2 * p[0])[:narrow][None, None]
    for j in _order(k - 1):
        kernel = through(through(kernel, p[k + 1 + j], 1), p[2 + j], 0)
    return kernel.swapaxes(2, 3) if out_channels < in_channels else kernel


def _order(pairs: int) -> list[int]:
    """The order in which the original applies its pairs of factors: halves are merged while their number is even."""
    groups = [[j] for j in range(pairs)]
    while len(groups) % 2 == 0 and len(groups) > 1:
        half = len(groups) // 2
        groups = [first + second for first, second in zip(groups[:half], groups[half:], strict=True)]
    return sum(groups, [])


def separable(
    squares: Float[Array, "two c c"],
    columns: Float[Array, "n c r"] | None,
    in_channels: int,
    out_channels: int,
    strides: int = 1,
) -> Kernel:
    """SC-Fac's product: for each axis an orthogonal matrix, with factors multiplied to its two sides in turn.

    Along the height F = Q_0; its first, third, ... projector acts before it (taps P, I - P), the others after it (taps
    I - P, P). Likewise Q_1 along the width, after the height. Strides come by polyphase: the inputs are the pixels of
    a block, (channel, row, column).

    Args: squares: Q_0, Q_1. columns: of the projectors along the height, then of those along the width; None for none.
    Returns: (k, k, in, out), k = strides (n / 2 + 1). Source: Su, Byeon & Huang 2022, arXiv:2106.09121.
    """
    p = projectors(columns) if columns is not None else squares[:0]
    half = len(p) // 2
    lines = []
    for axis in range(2):
        line = squares[axis].T[None, None]
        for j, factor in enumerate(p[axis * half : (axis + 1) * half]):
            if j % 2:
                line = through(line, factor, axis, late=True)
            else:  # before the others: the transposed product, in which it comes last
                line = through(line.swapaxes(2, 3), factor, axis).swapaxes(2, 3)
        lines.append(line)
    side, s = half + 1, strides
    kernel = compose(*lines)[:, :, : in_channels * s**2, :out_channels]
    kernel = kernel.reshape(side, side, in_channels, s, s, out_channels)
    return kernel.transpose(0, 3, 1, 4, 2, 5).reshape(side * s, side * s, in_channels, out_channels)
