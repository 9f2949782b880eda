"""BRO: orthogonal circular convolutions and dense matrices as block reflectors I - 2 V (V^H V + e I)^-1 V^H.

V is unconstrained; of a convolution, V is the response of a kernel from `rank` channels to m, at each frequency. Where
input and output have different numbers of channels, m is the larger and the reflector is cut.
Source: Lai et al. 2025, arXiv:2505.15174; ranks, ridges and starts as in its public code.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lipjax import conv, linalg

RIDGE = 1e-5
"""e over the mean of the diagonal of V^H V, in the layers of the paper's LipConvnet and in the neck of its BRONet."""

BACKBONE_RIDGE = 1e-7
"""The same in the other layers of BRONet."""


RULES = ("lipconvnet", "bronet")


def rank(in_channels: int, out_channels: int, level: float = 0.5, rule: str = "lipconvnet") -> int:
    """The number of columns of V, by which the reflector's eigenvalues are -1 (the others are 1).

    Of a square layer of c channels level times c, rounded down, but c - 1 for level 1 and 1 for level 0; rule
    "lipconvnet" takes 3 (c // 4) for level 3/4. With other numbers of channels the smaller of them, whatever the level.

    Args:
      in_channels, out_channels: of the layer.
      level: from 0 to 1.
      rule: "lipconvnet" or "bronet", as in the two parts of the paper's code.
    Returns: the rank, 1 to the larger number of channels.
    Raises: ValueError for other levels or rules, or where the rank is not from 1 to the larger number of channels.
    Example:
      >>> lipjax.parametrize.bro.rank(512, 512, 1 / 8), lipjax.parametrize.bro.rank(32, 64)
      (64, 32)
    """
    least, most = sorted((in_channels, out_channels))
    if not 0 <= level <= 1 or least < 1 or rule not in RULES:
        raise ValueError(
            f"Expected a level from 0 to 1, channels of at least 1 and a rule out of {', '.join(RULES)}, got level "
            f"{level}, {in_channels} -> {out_channels} channels and {rule!r}."
        )
    special = {1.0: most - 1, 0.0: 1} | ({0.75: 3 * (most // 4)} if rule == "lipconvnet" else {})
    found = special.get(float(level), int(most * level)) if least == most else least
    if not 1 <= found <= most:
        raise ValueError(
            f"A block reflector of {most} channels has a rank from 1 to {most}, but level {level} gives {found}: "
            "take another level, or more channels."
        )
    return found


def packed_response(
    kernel: Float[Array, "kh kw r m"],
    size: tuple[int, int],
    in_channels: int | None = None,
    out_channels: int | None = None,
    *,
    ridge: float = RIDGE,
) -> tuple[Float[Array, "a o i"], Float[Array, "q 2 o i"]]:
    """The blocks of a circular convolution of norm at most 1, one for each pair of frequencies +-f.

    The convolution with them is orthogonal but for e (and for what is cut off): its square blocks are Hermitian with
    eigenvalues 1 and 1 - 2 s^2 / (s^2 + e), s the singular values of V.

    Args:
      kernel: HWIO, from r to m channels, r <= m, any sides. Neither its scale nor its place matters: a shift is a phase
        of V, which cancels. Taps beyond the map are wrapped and summed. The paper's code has it reflected in space for
        its BRO layers and as it is here for the second version of BRONet's.
      size: (h, w) of the images, even or odd, zero padding included.
      in_channels, out_channels: at most m; None for m.
      ridge: e over the mean of the diagonal of V^H V, for each frequency.
    Returns: (fixed, paired), what `operators.CircularConv.from_blocks` takes.
    Raises: ValueError for channels that do not fit, or r > m.
    Error: of every block, that of `linalg.block_reflector`.
    Example: with one tap, V^H V = 1: a Householder reflection at every frequency.
      >>> kernel = jnp.zeros((1, 1, 1, 2)).at[0, 0, 0, 0].set(1.0)
      >>> fixed, paired = lipjax.parametrize.bro.packed_response(kernel, (4, 4), ridge=0.0)
      >>> fixed.shape, paired.shape, fixed[0].round(3).tolist()
      ((4, 2, 2), (6, 2, 2, 2), [[-1.0, 0.0], [0.0, 1.0]])
    """
    fixed, paired = conv.packed_response(kernel, size)
    fixed = linalg.block_reflector(fixed, ridge, rows=out_channels, columns=in_channels)
    parts = linalg.block_reflector_split(paired[:, 0], paired[:, 1], ridge, rows=out_channels, columns=in_channels)
    return fixed, jnp.stack(parts, 1)


def dense(
    matrix: Float[Array, "*batch m r"],
    in_features: int | None = None,
    out_features: int | None = None,
    *,
    ridge: float = RIDGE,
    constant_ridge: bool = False,
) -> Float[Array, "*batch o i"]:
    """The first rows and columns of the block reflector of V: a matrix of norm at most 1, if square nearly orthogonal.

    Args:
      matrix: V. in_features, out_features: at most m; None for m.
      ridge, constant_ridge: as of `linalg.block_reflector`. The neck of BRONet takes a constant.
    Returns: (out, in).
    Raises: ValueError for sizes that do not fit.
    """
    return linalg.block_reflector(matrix, ridge, rows=out_features, columns=in_features, constant_ridge=constant_ridge)


def patches(kernel: Float[Array, "kh kw i r"], *, ridge: float = RIDGE) -> Float[Array, "kh kw i r"]:
    """The kernel as a matrix V (i kh kw, r), and the first r rows of its reflector as a kernel again.

    With strides (kh, kw) and without padding windows do not overlap, and the norm of the convolution is the matrix's.

    Args: kernel: HWIO, r <= kh kw i; the channels of the input are the slowest index of V. ridge: a constant for the
      gradient.
    Returns: HWIO, r outputs.
    Raises: ValueError if there are more outputs than numbers in a patch.
    """
    kh, kw, i, r = kernel.shape
    v = kernel.transpose(2, 0, 1, 3).reshape(i * kh * kw, r)
    w = linalg.block_reflector(v, ridge, rows=r, constant_ridge=True)
    return w.T.reshape(i, kh, kw, r).transpose(1, 2, 0, 3)


def residual(
    weight: Float[Array, "kh kw r m"], gamma: Float[Array, " m"], *, num_layers: int
) -> Float[Array, "kh kw r m"]:
    """The kernel V = E + L^(-1/2) gamma * W of BRONet, E the first unit vectors at the middle tap, gamma per output.

    Args: weight: W, HWIO. num_layers: L, the depth of the stack.
    Raises: ValueError if num_layers < 1.
    """
    return unit_columns(weight.shape, weight.dtype) + _scale(num_layers) * gamma * weight


def dense_residual(
    weight: Float[Array, "*batch m r"], gamma: Float[Array, "*batch m"], *, num_layers: int
) -> Float[Array, "*batch m r"]:
    """The same of matrices: what `dense` takes. gamma: per row (output)."""
    eye = jnp.eye(*weight.shape[-2:], dtype=weight.dtype)
    return eye + _scale(num_layers) * gamma[..., None] * weight


def _scale(num_layers: int) -> float:
    if num_layers < 1:
        raise ValueError(f"Expected num_layers >= 1, got {num_layers}.")
    return num_layers**-0.5


def unit_columns(shape: tuple[int, ...], dtype: DTypeLike = float) -> Float[Array, "kh kw r m"]:
    """The kernel (kh, kw, r, m) of the first r unit vectors, at the tap (kh // 2, kw // 2)."""
    return jnp.zeros(shape, dtype).at[shape[0] // 2, shape[1] // 2].set(jnp.eye(*shape[2:], dtype=dtype))
