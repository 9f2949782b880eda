"""LOT: convolutions whose blocks are (V V^H + e I)^(-1/2) V, by ten steps of a coupled Newton iteration.

Source: Xu, Li & Li 2022, arXiv:2210.11620, and its code; as a backbone, Lai et al. 2025, arXiv:2505.15174.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax import conv
from lipjax.linalg.parts import Parts, add_identity, adjoint, product, scaled

NUM_ITERS = 10
RIDGE = 1e-4


def packed_response(
    kernel: Float[Array, "kh kw i o"],
    size: tuple[int, int],
    *,
    num_iters: int = NUM_ITERS,
    backbone: bool = False,
) -> tuple[Float[Array, "r o i"], Float[Array, "q 2 o i"]]:
    """The blocks of a circular convolution of norm below 1, one for each pair of frequencies +-f.

    V is the kernel's response, S = V V^H + e I, n = |S|_F + 1e-4; Y = S / n, Z = I; num_iters times
    T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; the block is n^(-1/2) Z V. A singular value s of V ends at
    s / sqrt(s^2 + e) where the iteration has converged, which takes more steps the smaller (s^2 + e) / n is (ten reach
    3e-4), and below it otherwise.

    Args:
      kernel: HWIO, any sides, centred: tap (k - 1) // 2 lies on the output. Taps beyond the map are wrapped and summed.
      size: (h, w) of the images, even or odd, zero padding included.
      num_iters: >= 1.
      backbone: as in BRONet's "lot" mode: V over sqrt(h w), and e = 1e-5 times the mean of the diagonal of V V^H.
        Otherwise e = 1e-4.
    Returns: (fixed, paired), what `operators.CircularConv.from_blocks` takes.
    Raises: ValueError for num_iters < 1.
    Cost: three products of (out x out) matrices a step and frequency, and their derivatives: some fifty times BRO's.
    Example: the blocks of the identity are 1 / sqrt(1 + 1e-4).
      >>> fixed, _ = lipjax.parametrize.lot.packed_response(jnp.ones((1, 1, 1, 1)), (4, 4))
      >>> round(float(fixed[0, 0, 0]), 5)
      0.99995
    """
    if num_iters < 1:
        raise ValueError(f"Expected num_iters >= 1, got {num_iters}.")
    fixed, paired = conv.packed_response(kernel, size)
    if backbone:
        fixed, paired = (part / math.sqrt(size[0] * size[1]) for part in (fixed, paired))
    of_fixed, _ = _polar((fixed, None), num_iters, backbone)
    return of_fixed, jnp.stack(_polar((paired[:, 0], paired[:, 1]), num_iters, backbone), 1)


def _polar(v: Parts, num_iters: int, backbone: bool) -> Parts:
    real, imag = product(v, adjoint(v))
    diagonal = jnp.diagonal(real, axis1=-2, axis2=-1)
    shift = 1e-5 * jnp.mean(diagonal, -1)[..., None, None] if backbone else RIDGE
    s = real + shift * jnp.eye(real.shape[-1], dtype=real.dtype), imag
    squares = s[0] ** 2 if imag is None else s[0] ** 2 + s[1] ** 2
    # |S|_F >= e > 0, or the square root's derivative would not be finite for a zero kernel.
    total = jnp.sum(squares, (-2, -1), keepdims=True)
    size = jnp.sqrt(jnp.where(total == 0, 1, total)) + 1e-4
    y = scaled(1 / size, s)
    z: Parts = jnp.broadcast_to(jnp.eye(real.shape[-1], dtype=real.dtype), real.shape), imag
    z = z[0], None if imag is None else jnp.zeros_like(imag)

    def step(carry: tuple[Parts, Parts], _):
        y, z = carry
        t = add_identity(1.5, scaled(-0.5, product(z, y)))
        return (product(y, t), product(t, z)), None

    (_, z), _ = lax.scan(step, (y, z), length=num_iters)
    return scaled(1 / jnp.sqrt(size), product(z, v))
