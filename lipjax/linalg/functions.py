"""Matrix functions that make orthogonal matrices: the exponential of skew-Hermitian ones, and the Cayley transform.

And nearly orthogonal ones: Cholesky orthogonalisation.

Products use Precision.HIGHEST: in bfloat16 or TF32 no result would be orthogonal.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Inexact

from lipjax import _spread
from lipjax.linalg import cholesky
from lipjax.linalg.parts import Parts, add, add_identity, adjoint, product, reciprocal, scaled, times

# exp on i[-theta, theta] as a polynomial of degree 8 in three products, in the form of Bader, Blanes & Casas:
#   a2 = a a,  a4 = a2 (x1 a + x2 a2),  p(a) = I + a + y2 a2 + (a2 + a4)(x4 I + x5 a + x6 a2 + x7 a4).
# Skew a have spectra on the imaginary axis, so instead of Taylor's coefficients these are the minimax ones of cosine
# and sine with p(0) = p'(0) = 1 (Remez' algorithm): theta is almost twice as large for the same error.
#   float32: theta = 1,    |p - exp| <= 1.6e-8 (0.27 u),  |p' - exp'| <= 1.2e-6
#   float64: theta = 0.11, |p - exp| <= 3.8e-17 (0.34 u), |p' - exp'| <= 2.6e-14
_THETA = {"float32": 1.0, "float64": 0.11}
_UNPOLISHED = {"float32": 2, "float64": 5}  # with that many squarings or fewer theta 2^s < 4: hardly any rounding
_COEFFICIENTS = {  # x1, x2, x4, x5, x6, x7, y2
    "float32": (
        *(0.15848147661235059, 0.039675447458745113, 0.36418863629904126, 0.10894883760373588),
        *(0.0099507635952837001, 0.015334233377671304, 0.13581134486570599),
    ),
    "float64": (
        *(0.1624967368901667, 0.040624868235103836, 0.36450385577690303, 0.10743597951781344),
        *(0.0094007494579682709, 0.015022881260585418, 0.13549614422309656),
    ),
}


def expm_skew(a: Inexact[Array, "*batch n n"]) -> Inexact[Array, "*batch n n"]:
    """The exponential of skew-symmetric or skew-Hermitian matrices: orthogonal or unitary. Matrix products only.

    Args:
      a: (..., n, n), a = -a^H up to rounding, float32, float64, complex64 or complex128. Inside of `jit`, `grad` or
        `vmap`, where numbers are not known, that is not checked, and for other matrices the result means nothing.
    Returns: exp(a), same shape and dtype.
    Raises: ValueError if the numbers are known and an entry of a + a^H exceeds a thousandth of the largest entry of a
      (small perturbations of any direction pass, as of numerical derivatives); and as `expm_skew_split`.
    Method, error, derivatives, source: as `expm_skew_split`.
    Example: half a turn.
      >>> lipjax.linalg.expm_skew(jnp.array([[0.0, -jnp.pi], [jnp.pi, 0.0]])).diagonal().round(3).tolist()
      [-1.0, -1.0]
    """
    square = a.ndim >= 2 and a.shape[-1] == a.shape[-2] and jnp.issubdtype(a.dtype, jnp.inexact)
    if square and not isinstance(a, Tracer) and not _is_skew(a):
        raise ValueError(
            f"expm_skew takes skew-Hermitian matrices, a = -a^H, got others (shape {a.shape}): (a - a^H) / 2 is the "
            "skew part of a; jax.scipy.linalg.expm takes any matrix."
        )
    return _expm_skew(a)


@jax.jit
def _is_skew(a):
    """True if a + a^H is at most 1e-3 times the largest entry; yes for NaN, which the result then shows."""
    departure = jnp.max(jnp.abs(a + jnp.conj(a.mT)), initial=0.0)
    return ~(departure > 1e-3 * jnp.max(jnp.abs(a), initial=0.0))


@jax.jit
def _expm_skew(a):
    if jnp.iscomplexobj(a):
        return lax.complex(*expm_skew_split(a.real, a.imag))
    return expm_skew_split(a)[0]


@jax.jit
def expm_skew_split(
    real: Float[Array, "*batch n n"], imag: Float[Array, "*batch n n"] | None = None
) -> tuple[Float[Array, "*batch n n"], Any]:
    """exp(real + i imag) of skew-Hermitian matrices in real arithmetic: XLA's complex products are slow.

    Scaling and squaring: a polynomial of degree 8 (3 products) of a / 2^s, then s squarings (1 product each). One s
    serves the whole batch: the least for which sqrt(min(|a^2|_1, |a^2|_F)) / 2^s <= theta for every matrix, theta = 1
    in float32 and 0.11 in float64. It depends on the data, so the squarings are a loop. Where theta 2^s >= 4 one
    Newton-Schulz step (2 products) takes off the departure from unitarity that the squarings have doubled again and
    again.

    Args:
      real: skew-symmetric (unchecked), float32 or float64.
      imag: symmetric (unchecked); None stands for zero.
    Returns: (real, imag) of the exponential U; imag is None if it was given so.
    Error: in spectral norm, u the unit roundoff: |U^H U - I| <= (8 + 2 sqrt(n)) u, and |U - exp(a)| <= c u (1 + |a|),
      c = 6 in float32 and 12.4 in float64, |a| the largest of the batch. Why: U - I = d is what is doubled, by 2 d +
      d^2, which rounds relative to |d_k| <= min(2^k theta, 2); this error is doubled s - k times, which adds up to
      about u |a| (3 + log2(1 / theta)) times what one product loses. Twice that sum was never reached on random
      matrices with n <= 128 and |a| <= 50, nor was the first bound: the constants are measured, not proved.
      Phases are lost, as in any method, when u |a| is not small; beyond |a| = 1e9 (float32) the result is not finite.
    Derivatives: reverse mode, once. The backward pass takes the polynomial's derivative and value from the forward
      pass, and 6 + 2 s + max(s - 1, 0) products. Along skew-Hermitian perturbations the gradient has the error of U
      and that of p'; along others it leaves out the Newton-Schulz step.
    Raises: ValueError for other dtypes, matrices that are not square or parts that differ in shape or dtype.
    Source: Bader, Blanes & Casas 2019, Computing the matrix exponential with an optimized Taylor polynomial
      approximation, doi:10.3390/math7121174; for skew-Hermitian matrices with Chebyshev instead of minimax
      polynomials, Bader, Blanes, Casas & Seydaoglu 2022, arXiv:2103.10132. Adjoint of the derivative: Higham 2008,
      Functions of Matrices.
    """
    if str(real.dtype) not in _THETA or real.ndim < 2 or real.shape[-1] != real.shape[-2]:
        raise ValueError(
            f"Expected square matrices (..., n, n) of 32 or 64 bits per real number, got {real.dtype} {real.shape}."
        )
    if imag is not None and (imag.shape, imag.dtype) != (real.shape, real.dtype):
        raise ValueError(
            f"Expected an imaginary part like the real one, {real.dtype} {real.shape}, got {imag.dtype} {imag.shape}."
        )
    return _spread.gathered(_exponential((real, imag)))


@jax.custom_vjp
def _exponential(a: Parts) -> Parts:
    return _exponential_forward(a)[0]


def _exponential_forward(a: Parts):
    # Everything is computed for d = exp - I: doubling by 2 d + d^2 rounds relative to |d|, not to |I + d|.
    start, derivative, squarings = jax.linearize(polynomial, a, has_aux=True)
    d = lax.fori_loop(0, squarings, lambda _, d: doubled(d), start)
    v = add_identity(1.0, d)
    v = lax.cond(squarings > _UNPOLISHED[str(v[0].dtype)], _newton_schulz, lambda v: v, v)
    return v, (start, derivative, squarings)


def _exponential_backward(residuals, g: Parts):
    # L_exp(a)^*[g] = L_exp(a)[g^H]^H: the derivative itself gives its adjoint, with no transposes but these two. The
    # derivatives of the squarings and of the polynomial commute, as all their matrices do: the loops come first, so
    # that XLA transposes g once, on entering them, instead of in every product.
    d, derivative, squarings = residuals

    def along(d, tangent):
        return add(product(d, tangent), product(tangent, d), scaled(2.0, tangent))

    def step(_, carry):
        d, tangent = carry
        d = doubled(d)
        return d, along(d, tangent)

    # The d of the forward pass are made again rather than kept; one squaring, the common case, makes none.
    tangent = lax.fori_loop(0, jnp.minimum(squarings, 1), lambda _, t: along(d, t), adjoint(g))
    _, tangent = lax.fori_loop(1, squarings, step, (d, tangent))
    return (adjoint(derivative(tangent)),)


_exponential.defvjp(_exponential_forward, _exponential_backward)


def polynomial(a: Parts) -> tuple[Parts, Array]:
    """p(a / 2^s) - I and s. a: skew-Hermitian, or of the same eigenvalues as some such matrix."""
    x1, x2, x4, x5, x6, x7, y2 = _COEFFICIENTS[str(a[0].dtype)]
    a2 = product(a, a)
    squarings = _squarings(lax.stop_gradient(a2))
    scale = jnp.ldexp(jnp.ones((), a[0].dtype), -squarings)  # a power of two: scaling rounds nothing
    a, a2 = scaled(scale, a), scaled(scale * scale, a2)
    a4 = product(a2, add(scaled(x1, a), scaled(x2, a2)))
    right = add(scaled(x7, a4), scaled(x6, a2), scaled(x5, a))
    return add(product(add(a4, a2), add_identity(x4, right)), scaled(y2, a2), a), squarings


def _squarings(a2: Parts) -> Array:
    """The least s >= 0 for which the norm bound of every a / 2^s is at most theta; 0 if that is not finite."""
    real, imag = a2
    squared = real**2 if imag is None else real**2 + imag**2
    frobenius = jnp.sqrt(jnp.sum(squared, (-2, -1)))
    rows = jnp.max(jnp.sum(jnp.sqrt(squared), -1), -1, initial=0.0)
    bound = jnp.max(jnp.minimum(rows, frobenius), initial=0.0)  # of |a|^2 = |a^2|, since a is normal
    exponent = jnp.ceil(0.5 * jnp.log2(bound / _THETA[str(real.dtype)] ** 2))
    return jnp.where(jnp.isfinite(bound), jnp.maximum(exponent, 0.0), 0.0).astype(jnp.int32)


def doubled(d: Parts) -> Parts:
    """(I + d)^2 - I."""
    return add(product(d, d), scaled(2.0, d))


def _newton_schulz(v: Parts) -> Parts:
    """v + v (I - v^H v) / 2: unitary to second order in the departure of v from unitarity."""
    half = scaled(-0.5, add_identity(-1.0, product(adjoint(v), v)))
    return add(v, product(v, half))


@jax.jit
def cayley(w: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch m n"]:
    """The Cayley transform: matrices with orthonormal columns (m >= n) or rows (m < n).

    With w = [U; V], U square, and A = U - U^H + V^H V: Q = [(I + A)^-1 (I - A); -2 V (I + A)^-1]. The Hermitian part of
    I + A is at least I, so it is never singular. A wide w is transposed (not conjugated) before and after. The inverse
    is an elimination by blocks, without pivoting (it needs none: the Hermitian parts of all Schur complements are at
    least I) and without LAPACK or complex numbers, mostly matrix products. LU factorisations can hang on the CPU:
    JAX 0.10 spreads a batch of them over the very threads that wait for it, and as many batches at once as there are
    cores, in a network of several layers, leave none to do the work.

    Args:
      w: (..., m, n), float or complex of 32 or 64 bits per real number.
    Returns: Q, same shape and dtype.
    Error: in spectral norm, u the unit roundoff: |Q^H Q - I| <= 20 u (1 + |A|), |Q - exact| <= 10 u (1 + |A|). Why:
      |(I + A)^-1| <= 1, so 1 + |A| bounds the condition number of the system; elimination ends with a step of Newton's
      iteration, which removes what it amplified. The constants are measured (n <= 128), not proved.
    Raises: ValueError for fewer than two axes.
    Source: Trockman & Kolter 2021, arXiv:2104.07167.
    Example: a rotation by a quarter turn.
      >>> lipjax.linalg.cayley(jnp.array([[0.0, 1.0], [0.0, 0.0]]))[1].round(3).tolist()
      [1.0, 0.0]
    """
    if w.ndim < 2:
        raise ValueError(f"cayley expects matrices (..., m, n), got an array of shape {w.shape}.")
    if w.shape[-2] < w.shape[-1]:
        return jnp.swapaxes(cayley(jnp.swapaxes(w, -1, -2)), -1, -2)
    parts = (w.real, w.imag) if jnp.iscomplexobj(w) else (w, None)
    real, imag = _spread.gathered(_cayley_parts(parts))
    return real if imag is None else lax.complex(real, imag)


def cayley_split(
    real: Float[Array, "*batch m n"], imag: Float[Array, "*batch m n"]
) -> tuple[Float[Array, "*batch m n"], Float[Array, "*batch m n"]]:
    """`cayley` by elimination, of a complex w given and returned as real and imaginary part."""
    if real.shape[-2] < real.shape[-1]:
        wide = cayley_split(jnp.swapaxes(real, -1, -2), jnp.swapaxes(imag, -1, -2))
        return jnp.swapaxes(wide[0], -1, -2), jnp.swapaxes(wide[1], -1, -2)
    return _spread.gathered(_cayley_parts((real, imag)))


def _cayley_parts(w: Parts) -> Parts:
    """[I - 2 A (I + A)^-1; -2 V (I + A)^-1] for a tall w = [U; V]."""
    n = w[0].shape[-1]
    upper, lower = (jax.tree.map(lambda part, rows=rows: part[..., rows, :], w) for rows in (slice(n), slice(n, None)))
    a = add(upper, scaled(-1.0, adjoint(upper)))
    if lower[0].shape[-2]:
        a = add(a, product(adjoint(lower), lower))
    inverse = _inverse(add_identity(1.0, a))
    # 2 (I + A)^-1 - I, without the rounding errors of an inverse close to I.
    top = add_identity(1.0, scaled(-2.0, product(a, inverse)))
    if not lower[0].shape[-2]:
        return top
    bottom = scaled(-2.0, product(lower, inverse))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], -2), top, bottom)


_BLOCK = 32  # sides of the pivot blocks; their elimination reads and writes them once per row


@jax.custom_vjp
def _inverse(m: Parts) -> Parts:
    """m^-1 for m whose Hermitian part is at least I."""
    x = _eliminate(m)
    # x + x (I - m x): what elimination has amplified is squared away, and the correction is too small to round much.
    return add(x, product(x, add_identity(1.0, scaled(-1.0, product(m, x)))))


def _inverse_forward(m: Parts):
    x = _inverse(m)
    return x, x


def _inverse_backward(x: Parts, g: Parts):
    transposed = adjoint(x)
    return (scaled(-1.0, product(product(transposed, g), transposed)),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


def _eliminate(m: Parts) -> Parts:
    """m^-1 by Gauss-Jordan elimination in place, block by block, the pivots in their order."""
    n = m[0].shape[-1]
    if n == 0:
        return m
    if n <= _BLOCK:
        return _eliminate_rows(m)
    if _spread.by_columns(m[0].shape):
        return _eliminate_columns(m)
    for start in range(0, n, _BLOCK):
        block = slice(start, min(start + _BLOCK, n))
        pivot = _eliminate_rows(jax.tree.map(lambda part, b=block: part[..., b, b], m))
        column = jax.tree.map(lambda part, b=block: part[..., :, b].at[..., b, :].set(0), m)
        row = product(pivot, jax.tree.map(lambda part, b=block: part[..., b, :], m))
        row = jax.tree.map(lambda part, inverse, b=block: part.at[..., :, b].set(inverse), row, pivot)
        rest = jax.tree.map(lambda part, b=block: part.at[..., :, b].set(0).at[..., b, :].set(0), m)
        rest = add(rest, scaled(-1.0, product(column, row)))
        m = jax.tree.map(lambda part, new, b=block: part.at[..., b, :].set(new), rest, row)
    return m


def _eliminate_columns(m: Parts) -> Parts:
    """`_eliminate` on devices that hold some columns each and send each other those of the pivot blocks."""
    n = m[0].shape[-1]

    def eliminate(columns: _spread.Columns, *parts: Array) -> tuple:
        m: Any = (*parts, None)[:2]
        size = _spread.panel(m[0].shape[-1])
        for start in range(0, n, size):
            block = slice(start, start + size)
            column = jax.tree.map(lambda part, start=start: columns.take(part, start, size), m)
            pivot = _eliminate_rows(jax.tree.map(lambda part, b=block: part[..., b, :], column))
            m = jax.tree.map(lambda part, old, start=start: columns.put(part, jnp.zeros_like(old), start), m, column)
            row = product(pivot, jax.tree.map(lambda part, b=block: part[..., b, :], m))
            row = jax.tree.map(lambda part, inverse, start=start: columns.put(part, inverse, start), row, pivot)
            column, m = jax.tree.map(lambda part, b=block: part.at[..., b, :].set(0), (column, m))
            m = add(m, scaled(-1.0, product(column, row)))
            m = jax.tree.map(lambda part, new, b=block: part.at[..., b, :].set(new), m, row)
        return tuple(part for part in m if part is not None)

    found: Any = (*_spread.with_columns(eliminate, *[part for part in m if part is not None]), None)
    return found[:2]


def _eliminate_rows(m: Parts) -> Parts:
    """m^-1 by Gauss-Jordan elimination in place, one row at a time."""
    n = m[0].shape[-1]
    index = jnp.arange(n)

    def step(k, m: Parts) -> Parts:
        here = index == k
        row = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, k, 1, -2), m)
        column = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, k, 1, -1), m)
        pivot = reciprocal(jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, k, 1, -1), row))
        one = jnp.ones((), m[0].dtype)
        row = times(pivot, (jnp.where(here, one, row[0]), None if row[1] is None else jnp.where(here, 0, row[1])))
        column = jax.tree.map(lambda part: jnp.where(here[:, None], 0, part), column)
        rest = jax.tree.map(lambda part: jnp.where(here, 0, part), m)
        rest = jax.tree.map(jnp.subtract, rest, times(column, row))
        return jax.tree.map(lambda part, new: jnp.where(here[:, None], new, part), rest, row)

    return lax.fori_loop(0, n, step, m)


@functools.partial(jax.jit, static_argnames=("ridge", "method"))
def cholesky_orthogonalize(
    w: Float[Array, "*batch m n"], ridge: float = 1e-3, *, method: str = "auto"
) -> Float[Array, "*batch m n"]:
    """W = L^-1 w, L L^T = w w^T + e I (m <= n): nearly orthonormal rows, or columns (m > n). A contraction.

    e = ridge times the mean of the diagonal of w w^T, one for each matrix. A singular value s of w becomes
    s / sqrt(s^2 + e) < 1: those far above sqrt(e) come close to 1, small ones stay small. So W is not orthogonal: what
    certifies is the proved norm of the operator that is made of it. A tall w is transposed before and after.

    Args:
      w: (..., m, n), float32 or float64; W is the same for c w, c > 0, but for under- and overflow of squares.
      ridge: > 0.
      method: how L and L^-1 are found. "products": by blocks, mostly matrix products, without LAPACK, which can hang on
        CPUs. "lapack": the linear algebra library of the device. "auto": products on CPUs.
    Returns: W, same shape and dtype; 0 for w = 0.
    Error: in spectral norm |W - exact| <= 4 u (m + n) |w|^2 / e, u the unit roundoff: measured, not proved.
    Derivatives: reverse mode, once, with e a constant, as in the paper's code; 2 products of m x m matrices and 3 with
      m x n ones, instead of going back through the factorisation.
    Raises: ValueError for fewer than two axes, ridge <= 0 or another method.
    Source: Hu et al. 2024, arXiv:2310.02513, with the shift of its public code.
    Example: the singular values 1, 1 become sqrt(1 / 2).
      >>> w = lipjax.linalg.cholesky_orthogonalize(jnp.eye(2), ridge=1.0)
      >>> (w @ w.T).round(3).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    if w.ndim < 2 or not ridge > 0 or method not in ("auto", "products", "lapack"):
        raise ValueError(
            "Expected (..., m, n), ridge > 0 and method 'auto', 'products' or 'lapack', "
            f"got {w.shape}, {ridge} and {method!r}."
        )
    if 0 in w.shape:
        return w
    if w.shape[-2] > w.shape[-1]:
        w = cholesky.orthogonalize(cholesky.transpose(w), ridge, method)
        return _spread.gathered(cholesky.transpose(w))
    return _spread.gathered(cholesky.orthogonalize(w, ridge, method))
