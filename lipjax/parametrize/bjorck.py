"""Nearly orthogonal matrices from unconstrained ones: Björck's iteration, QR, the exponential, Cholesky.

Björck's iteration starts from the matrix divided by an estimate of its norm, whose vectors are state: `advance` moves
them, everything else takes them as they are. Whatever the vectors, a norm that is cheap and never too low keeps what
is iterated below 2 (`scaled`), so that the result is a contraction (before rounding), converged or not.
Source: Björck & Bowie 1971; Anil, Lucas & Grosse 2019, arXiv:1811.05381; Li et al. 2019, arXiv:1911.00937 (RKO).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax import _spread, linalg

Vectors = dict[str, Any]
"""u (..., m) and v (..., n): what estimates norms of matrices (..., m, n); empty for methods without an estimate."""

METHODS = ("bjorck", "qr", "exp", "cholesky")
"""The ways to orthogonalise a matrix (`orthogonalize`)."""

NUM_ITERS = 12
"""Steps of Björck's iteration, as in the code of AOC; that of BCOP takes 20."""


class Scaling(NamedTuple):
    """Details of dividing a matrix X by u^T X v: parity needs these details where the iteration does not converge.

    epsilon: added to u^T X v. floor: added to the length of a vector, whenever it is kept and whenever it is read.
    constant: whether the gradient takes the divisor as a constant.
    """

    epsilon: float
    floor: float
    constant: bool


ORTHOGONIUM = Scaling(1e-6, 1e-8, False)
"""As in the code of AOC."""

LCONVNET = Scaling(0.0, 0.0, True)
"""As in the code of BCOP."""

# Relative to the mean square of the rows: enough for a Cholesky factor of any Gram matrix to exist.
_QR_RIDGE = {"float32": 1e-5, "float64": 1e-13}
_CHOLESKY_RIDGE = 1e-5

product = _spread.product


def length(z: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """l2 norms along the last axis, kept: without under- or overflow of squares, and with gradient 0 at 0."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(z), -1, keepdims=True))
    positive = largest > 0
    largest = jnp.where(positive, largest, 1)
    squares = jnp.sum((z / largest) ** 2, -1, keepdims=True)
    return jnp.where(positive, largest * jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def normalised(z: Float[Array, "*batch n"], floor: float) -> Float[Array, "*batch n"]:
    """z / (|z| + floor) along the last axis; 0 at 0."""
    size = length(z)
    return z / jnp.where(size > 0, size + floor, 1)


def init_vectors(shape: tuple[int, ...], key: PRNGKeyArray) -> Vectors:
    """Random unit vectors for matrices of a shape (..., m, n), in JAX's default float type.

    They know nothing of the matrices: `advance` them before they scale anything.
    """
    keys = jax.random.split(key)
    sides = {"u": shape[:-1], "v": (*shape[:-2], shape[-1])}
    return {
        name: normalised(jax.random.normal(key, side), 0.0)
        for key, (name, side) in zip(keys, sides.items(), strict=True)
    }


def advance(
    matrix: Float[Array, "*batch m n"], vectors: Vectors, num_iters: int, scaling: Scaling = ORTHOGONIUM
) -> Vectors:
    """Moves the vectors by steps of power iteration: v from X^T u, then u from X v.

    A vector that the matrix maps to zero is kept. Nothing is differentiated.

    Args: matrix: X. vectors: of `init_vectors` or the last call. num_iters: steps, >= 0. scaling: its floor.
    Raises: ValueError if num_iters is negative.
    """
    if num_iters < 0:
        raise ValueError(f"advance: expected num_iters >= 0, got {num_iters}.")
    matrix, vectors = lax.stop_gradient((matrix, vectors))
    columns = jnp.swapaxes(matrix, -1, -2)

    def moved(to: Array, x: Array, kept: Array) -> Array:
        x = normalised(x, scaling.floor)
        image = jnp.matmul(to, x[..., None], precision=lax.Precision.HIGHEST)[..., 0]
        return jnp.where(jnp.any(image != 0, -1, keepdims=True), normalised(image, scaling.floor), kept)

    def step(_, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        u, v = pair
        v = moved(columns, u, v)
        return moved(matrix, v, u), v

    # A loop compiles once; few steps run faster without.
    pair = vectors["u"], vectors["v"]
    if num_iters <= 4:
        for i in range(num_iters):
            pair = step(i, pair)
    else:
        pair = lax.fori_loop(0, num_iters, step, pair)
    return {"u": pair[0], "v": pair[1]}


def norm_ceiling(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """|G^4|_F^(1/8), G the Gram matrix of the smaller side: from |X| up to n^(1/16) |X|, n that side. No gradient.

    n^(1/16) < 2 up to n = 65536.
    """
    matrix = lax.stop_gradient(matrix)
    m, n = matrix.shape[-2:]
    flat = matrix.reshape(*matrix.shape[:-2], m * n)
    size = length(flat)[..., None]
    unit = matrix / jnp.where(size > 0, size, 1)
    turned = jnp.swapaxes(unit, -1, -2)
    gram = product(unit, turned) if m < n else product(turned, unit)
    for _ in range(2):
        gram = product(gram, gram)
    fourth = length(gram.reshape(*gram.shape[:-2], -1))[..., 0]
    return size[..., 0, 0] * fourth ** (1 / 8)


def scaled(
    matrix: Float[Array, "*batch m n"], vectors: Vectors, scaling: Scaling = ORTHOGONIUM
) -> Float[Array, "*batch m n"]:
    """X / (u^T X v + epsilon): norms near 1 if the vectors are right, and at most 2 whatever they are.

    Args:
      matrix: X. vectors: as they are, constants under differentiation. scaling: details of the division.
    Returns: same shape; where u^T X v + epsilon is below half of `norm_ceiling`, X is divided by that instead.
    """
    u, v = (normalised(lax.stop_gradient(vectors[name]), scaling.floor) for name in ("u", "v"))
    image = jnp.matmul(matrix, v[..., None], precision=lax.Precision.HIGHEST)[..., 0]
    sigma = jnp.sum(u * image, -1) + scaling.epsilon
    divisor = jnp.maximum(sigma, norm_ceiling(matrix) / 2)
    divisor = jnp.where(divisor > 0, divisor, 1)[..., None, None]
    size = lax.stop_gradient(divisor)  # of order one first, lest the gradient's 1 / divisor^2 overflow
    return matrix / size if scaling.constant else matrix / size / (divisor / size)


def iterate(matrix: Float[Array, "*batch m n"], num_iters: int = NUM_ITERS) -> Float[Array, "*batch m n"]:
    """num_iters times W <- 1.5 W - 0.5 W W^T W: singular values g(s) = 1.5 s - 0.5 s^3, which tend to 1 from (0, 1].

    Differentiated step by step. |g| <= 1 on [0, 2]: after a step, norms up to 2 have become at most 1, converged or
    not. Zero singular values stay zero.

    Raises: ValueError if num_iters < 1.
    """
    if num_iters < 1:
        raise ValueError(f"Björck's iteration: expected num_iters >= 1, got {num_iters}.")
    wide = matrix.shape[-2] < matrix.shape[-1]

    def step(_, matrix: Array) -> Array:
        turned = jnp.swapaxes(matrix, -1, -2)
        cubic = product(product(matrix, turned), matrix) if wide else product(matrix, product(turned, matrix))
        return 1.5 * matrix - 0.5 * cubic

    return lax.fori_loop(0, num_iters, step, matrix)  # as a loop it compiles several times faster


def needs_vectors(method: str) -> bool:
    """True if a method divides by an estimate of the norm first; the results of the others do not depend on scales.

    Raises: ValueError for a method out of `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"Expected a method out of {', '.join(METHODS)}, got {method!r}.")
    return method in ("bjorck", "exp")


def orthogonalize(
    matrix: Float[Array, "*batch m n"], vectors: Vectors, method: str = "bjorck", num_iters: int = NUM_ITERS
) -> Float[Array, "*batch m n"]:
    """Matrices with nearly orthonormal columns (m >= n) or rows (m < n), of norm 1 at most up to rounding.

    Args:
      matrix: X, float32 or float64.
      vectors: of `advance`, read by "bjorck" and "exp" alone.
      method: "bjorck": num_iters steps from X / (u^T X v + 1e-6); 12 bring singular values of X from 1/100 of the
        largest up to 0.89, and from 1/10 up to 1. "qr": Q of X = Q R with positive diagonal (of X^T, if X is wide).
        "exp": the first rows and columns of the exponential of the skew part of the square that zeros make of
        X / (u^T X v + 1e-6). "cholesky": `linalg.cholesky_orthogonalize` with ridge 1e-5.
      num_iters: of "bjorck".
    Returns: same shape. Where X is rank-deficient, "bjorck", "qr" and "cholesky" give a rank-deficient contraction.
    Raises: ValueError for another method.
    """
    needs_vectors(method)
    if method == "bjorck":
        return _spread.gathered(iterate(scaled(matrix, vectors), num_iters))
    if method == "exp":
        return _exponential(scaled(matrix, vectors))
    if method == "cholesky":
        return linalg.cholesky_orthogonalize(matrix, _CHOLESKY_RIDGE)
    if matrix.shape[-2] >= matrix.shape[-1]:
        return jnp.swapaxes(_rows_of_qr(jnp.swapaxes(matrix, -1, -2)), -1, -2)
    return _rows_of_qr(matrix)


def _rows_of_qr(wide: Array) -> Array:
    """Q^T for X^T = Q R, X wide or square: L^-1 X, X X^T = L L^T. The second pass takes off what the first rounds."""
    ridge = _QR_RIDGE[str(wide.dtype)]
    return linalg.cholesky_orthogonalize(linalg.cholesky_orthogonalize(wide, ridge), ridge)


def _exponential(matrix: Array) -> Array:
    m, n = matrix.shape[-2:]
    side = max(m, n)
    square = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, side - m), (0, side - n)])
    return linalg.expm_skew((square - jnp.swapaxes(square, -1, -2)) / 2)[..., :m, :n]


def as_matrix(kernel: Float[Array, "kh kw i o"]) -> Float[Array, "o ikhkw"]:
    """The kernel as the matrix of a patch: (o, i kh kw)."""
    return kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1)


def rko(
    kernel: Float[Array, "kh kw i o"],
    vectors: Vectors,
    *,
    strides: int = 1,
    method: str = "bjorck",
    num_iters: int = NUM_ITERS,
) -> Float[Array, "kh kw i o"]:
    """Reshaped kernel orthogonalisation (RKO): the matrix (o, i kh kw) of a kernel, orthogonalised, over ceil(k / s).

    A pixel lies in at most ceil(kh / s) ceil(kw / s) windows, so the convolution's norm is at most 1. It is orthogonal
    if windows do not overlap (s = k), far from it otherwise.

    Args: kernel: raw, HWIO. vectors: for `as_matrix` of it. strides: s. method, num_iters: of `orthogonalize`.
    Returns: HWIO.
    Raises: ValueError unless 1 <= strides <= k, and as `orthogonalize`.
    Source: Li et al. 2019, arXiv:1911.00937; Serrurier et al. 2021, arXiv:2006.06520.
    """
    kh, kw, c_in, c_out = kernel.shape
    if not 1 <= strides <= min(kh, kw):
        raise ValueError(
            f"Expected strides from 1 to the kernel's side, got strides {strides} for {kh} x {kw} taps: pixels between "
            "windows would be lost. Take a kernel_size of at least strides."
        )
    matrix = orthogonalize(as_matrix(kernel), vectors, method, num_iters)
    windows = -(-kh // strides) * -(-kw // strides)
    return matrix.reshape(c_out, c_in, kh, kw).transpose(2, 3, 1, 0) / windows**0.5
