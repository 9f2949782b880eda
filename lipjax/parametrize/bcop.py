"""BCOP: orthogonal convolutions by block convolutions of projectors, as published first.

Source: Li et al. 2019, arXiv:1911.00937, and its code LConvNet.
"""

from jaxtyping import Array, Float

from lipjax.parametrize import bjorck
from lipjax.parametrize.aoc import Kernel, check_rank, projectors, through

NUM_ITERS = 20
"""Steps of Björck's iteration in the original."""


def raw_shape(in_channels: int, out_channels: int, kernel_size: int) -> tuple[int, int, int]:
    """The shape of the raw matrices: one for the channels, two for each further tap.

    Args:
      in_channels, out_channels: of the layer.
      kernel_size: k, of both axes.
    Returns: (2 k - 1, m, m), m = max(in_channels, out_channels).
    Raises: ValueError for numbers below 1.
    Example:
      >>> lipjax.parametrize.bcop.raw_shape(16, 32, 3)
      (5, 32, 32)
    """
    if min(in_channels, out_channels, kernel_size) < 1:
        raise ValueError(
            "Expected channels and kernel_size of at least 1, "
            f"got {in_channels} -> {out_channels} channels, kernel_size {kernel_size}."
        )
    channels = max(in_channels, out_channels)
    return 2 * kernel_size - 1, channels, channels


def kernel(
    raw: Float[Array, "n m m"],
    vectors: bjorck.Vectors,
    in_channels: int,
    out_channels: int,
    *,
    rank: int | None = None,
    num_iters: int = NUM_ITERS,
) -> Kernel:
    """The kernel of an orthogonal convolution of stride 1 from unconstrained square matrices.

    Args:
      raw: of `raw_shape`.
      vectors: u and v (n, m) of `bjorck.advance`, taken as they are; the gradient takes norms as constants.
      rank: of all projectors, their number of columns; None for m // 2.
      num_iters: steps of Björck's iteration. For Gaussian matrices 20 do not converge: it is a contraction then.
      in_channels, out_channels: of the convolution; more of one than of the other makes a contraction one way.
    Returns: (k, k, in, out), HWIO, k = (n + 1) / 2.
    Raises: ValueError for a rank that does not fit, or raw matrices of another shape.
    Source: Li et al. 2019, arXiv:1911.00937, Algorithm 2.
    Example: matrices that are orthogonal already; a circular map keeps its length.
      >>> from lipjax.parametrize import bcop, bjorck
      >>> raw = jnp.broadcast_to(jnp.eye(2), bcop.raw_shape(2, 2, 3))
      >>> start = bjorck.init_vectors(raw.shape, jax.random.key(0))
      >>> vectors = bjorck.advance(raw, start, 20, bjorck.LCONVNET)
      >>> kernel = bcop.kernel(raw, vectors, 2, 2)
      >>> y = lipjax.conv.conv2d(jnp.ones((1, 4, 4, 2), kernel.dtype), kernel, padding="CIRCULAR")
      >>> kernel.shape, round(float(jnp.linalg.norm(y) / jnp.sqrt(32)), 3)
      ((3, 3, 2, 2), 1.0)
    """
    k = (len(raw) + 1) // 2
    if tuple(raw.shape) != raw_shape(in_channels, out_channels, k):
        shape = raw_shape(in_channels, out_channels, k)
        raise ValueError(
            f"Expected raw matrices {shape} for {in_channels} -> {out_channels} channels, got {raw.shape}."
        )
    return assemble(
        bjorck.iterate(bjorck.scaled(raw, vectors, bjorck.LCONVNET), num_iters),
        in_channels,
        out_channels,
        None if k == 1 else check_rank(raw.shape[1], rank),
    )


def assemble(orthogonal: Float[Array, "n m m"], in_channels: int, out_channels: int, rank: int | None) -> Kernel:
    """BCOP's product of orthogonal matrices Q_0, ..., Q_(2k-2).

    H = Q_0, cropped; P_i the projector on the first `rank` columns of Q_i. Pair j is P_(2j+1) along the width, then
    P_(2j+2) along the height; in >= out: transposed tap by tap.
    """
    wide = max(in_channels, out_channels)
    narrow = min(in_channels, out_channels)
    down = in_channels > out_channels
    head = orthogonal[0][:, :narrow].T if down else orthogonal[0][:narrow, :wide]
    kernel = head[None, None]
    p = projectors(orthogonal[1:, :, :rank])
    for j in range(len(orthogonal) // 2):
        kernel = through(through(kernel, p[2 * j], 1), p[2 * j + 1], 0)
    return kernel.swapaxes(2, 3) if down else kernel
