"""Proved upper bounds for the largest eigenvalue of Hermitian matrices: rounding helpers and Cholesky verification.

Every inequality used here is derived in docs/soundness.md, section 1; constants in `numerics`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np

from lipjax.errors import NotCertifiable
from lipjax.numerics import EXACT_UNDERFLOW, EXACT_UNIT_ROUNDOFF, exact_gamma

# Shifts start here: far below the rounding error of a scaled Gram matrix, but positive.
_FIRST_SHIFT = 2.0**-60
_FIRST_EXCESS, _GROWTH, _COARSE = 2.0**-40, 16.0, 1e-7
_EIGVALSH_SIDE, _SMALL_SIDE = 1024, 128


def float_up(x: Fraction) -> float:
    """The least double >= x. Raises NotCertifiable beyond the double range."""
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if math.isinf(value):
        raise NotCertifiable("the norm bound exceeds the float64 range; rescale the operator")
    return value if Fraction(value) >= x else math.nextafter(value, math.inf)


def sqrt_up(x: Fraction) -> float:
    """A double r with r^2 >= x, at most two units above the root. x must lie well inside the double range or be 0."""
    root = math.sqrt(float(x))
    while Fraction(root) ** 2 < x:
        root = math.nextafter(root, math.inf)
    return root


def scale_to_unit(array: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns (array * 2^-e, e) with the largest component in [1/2, 1), exact up to underflow; e = 0 for zeros.

    Takes and returns a C-contiguous float64 or complex128 array with finite entries.
    """
    parts = np.ascontiguousarray(array).reshape(-1).view(np.float64)
    exponent = math.frexp(float(np.abs(parts).max()))[1]
    return np.ldexp(parts, -exponent).view(array.dtype).reshape(array.shape), exponent


def sum_of_squares_up(array: np.ndarray) -> Fraction:
    """Upper bound of the sum of |entry|^2 of a scaled array."""
    parts = np.ascontiguousarray(array).reshape(-1).view(np.float64)
    return Fraction(float(np.sum(parts * parts))) / (1 - exact_gamma(parts.size + 2)) + EXACT_UNDERFLOW


def parallel_map(function: Callable[[Any], Any], items: Iterable[Any], most: int = 32) -> list[Any]:
    """Maps over items with a thread per available core, up to `most` (NumPy releases the GIL in the work done here)."""
    items = list(items)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(items), cores, most)
    if workers <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


@dataclasses.dataclass(frozen=True)
class GramFamily:
    """Hermitian positive semidefinite matrices G_0, ..., G_{count-1}, each known up to `error` in spectral norm.

    Attributes:
      side: side of every matrix.
      count: number of matrices.
      grams: array of indices (b,) -> the computed matrices (b, side, side), float64 or complex128. Only lower
        triangles are read, and of the diagonal only the real part; a fresh array that the caller may overwrite.
      error: bound on the distance between each G_f and the computed one, rounding included.
    """

    side: int
    count: int
    grams: Callable[[np.ndarray], np.ndarray]
    error: Fraction

    def chunks(self, indices: np.ndarray) -> list[np.ndarray]:
        size = min(max(1, 2**21 // self.side**2), 1024)
        return [indices[start : start + size] for start in range(0, len(indices), size)]


def _verify(gram: np.ndarray, shift: float) -> Fraction | None:
    """Returns `slack` with lambda_max(gram) <= shift + slack if floating Cholesky of shift I - gram completes.

    gram is (n, n) or a stack (b, n, n); for a stack the slack serves all. None if some factorisation fails.
    """
    n = gram.shape[-1]
    shifted = -gram
    diagonal = np.einsum("...ii->...i", shifted)  # a view
    pivots = shift + diagonal.real
    if not (pivots > 0).all():
        return None
    diagonal[...] = pivots
    try:
        factor = np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return None
    # A NaN anywhere in a row of the factor reaches its diagonal, and not every potrf stops there.
    roots = np.einsum("...ii->...i", factor).real
    if not (np.isfinite(roots).all() and (roots > 0).all()):
        return None
    # Twice Demmel's constant with one more rounding per entry (multiplication by reciprocals); twice that if complex.
    backward = exact_gamma((4 if np.iscomplexobj(gram) else 2) * (n + 4))
    trace = Fraction(float(pivots.sum(-1).max())) / (1 - exact_gamma(n))
    return backward / (1 - backward) * trace + 2 * EXACT_UNIT_ROUNDOFF * Fraction(float(pivots.max())) + EXACT_UNDERFLOW


def _lanczos(gram: np.ndarray, steps: int = 300) -> float:
    """Rayleigh quotient of the top Ritz vector after at most `steps` steps with full reorthogonalisation.

    A guess from below: unlike a Ritz value, a quotient does not exceed the norm when the basis has lost orthogonality.
    """
    n = gram.shape[-1]
    basis = np.zeros((min(steps, n), n), gram.dtype)
    alphas, betas = [], []
    v = np.random.default_rng(0).normal(size=n).astype(gram.dtype)
    v /= np.linalg.norm(v)
    for step in range(len(basis)):
        basis[step] = v
        w = gram @ v
        alphas.append(float(np.vdot(v, w).real))
        known = basis[: step + 1]
        for _ in range(2):
            w -= known.T @ (known.conj() @ w)
        beta = float(np.linalg.norm(w))
        last = step + 1 == len(basis) or beta <= 64 * np.finfo(gram.dtype).eps * abs(alphas[0])
        if last or step % 20 == 19:
            values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
            if last or beta * abs(vectors[-1, -1]) <= 1e-9 * values[-1]:
                v = known.T @ vectors[:, -1].astype(gram.dtype)
                break
        betas.append(beta)
        v = w / beta
    return float(np.vdot(v, gram @ v).real / np.vdot(v, v).real)


def _guess(gram: np.ndarray) -> float:
    """Estimates the largest eigenvalue; may be wrong, since nothing is concluded from it."""
    if gram.shape[-1] > _EIGVALSH_SIDE:
        # The Lanczos products read both triangles; they differ in rounding at most.
        return _lanczos(gram)
    return float(np.linalg.eigvalsh(gram)[-1])


def _raise_shift(gram: np.ndarray, shift: float) -> tuple[float, Fraction]:
    """Returns (new shift >= shift, slack) such that lambda_max(gram) <= new shift + slack, new shift nearly least."""
    slack = _verify(gram, shift)
    if slack is not None:
        return shift, slack
    top = max(_guess(gram), shift)
    excess, failed = _FIRST_EXCESS, 0.0
    while (slack := _verify(gram, top * (1 + excess))) is None:
        failed, excess = excess, excess * _GROWTH
        if not excess < 2.0**20:
            raise NotCertifiable("no Cholesky factorisation completed: the matrix is not numerically Hermitian")
    for _ in range(4 if excess > _COARSE else 0):
        # Only the shift changes, so that halving the logarithm of the excess costs one factorisation.
        middle = math.sqrt(failed * excess)
        if (better := _verify(gram, top * (1 + middle))) is None:
            failed = middle
        else:
            excess, slack = middle, better
    return top * (1 + excess), slack


def _estimates(stack: np.ndarray) -> np.ndarray:
    """Estimates the largest eigenvalue of every matrix of a stack (b, n, n), roughly for large n."""
    if stack.shape[-1] <= _SMALL_SIDE:
        return np.linalg.eigvalsh(stack)[:, -1]
    # One matrix after the other, in single precision: each stays in the cache for its 24 products.
    single = np.complex64 if np.iscomplexobj(stack) else np.float32
    return np.array([_lanczos(gram.astype(single), steps=24) for gram in stack])


def rank_members(family: GramFamily) -> tuple[np.ndarray, float]:
    """Orders the members by estimated norm, largest first, and estimates the largest eigenvalue of all."""
    parts = parallel_map(lambda chunk: _estimates(family.grams(chunk)), family.chunks(np.arange(family.count)))
    order = np.argsort(-np.concatenate(parts), kind="stable")
    return order, max(parallel_map(lambda member: _guess(family.grams(np.array([member]))[0]), order[:6]))


def is_below(family: GramFamily, order: np.ndarray, shift: float) -> bool:
    """True if floating Cholesky factorisations of every shift I - G_f complete, tried in the given order."""
    return all(_verify(family.grams(chunk), shift) is not None for chunk in family.chunks(order))


def largest_eigenvalue_bound(family: GramFamily, order: np.ndarray) -> tuple[Fraction, dict[str, float]]:
    """Proved upper bound of max_f lambda_max(G_f), f over the whole family.

    Args:
      family: the matrices.
      order: all indices, those of large norm preferably first.
    Returns: the bound as an exact fraction, and what was verified: `shift` (every shift I - G_f has a floating Cholesky
      factor) and `slack` (what rounding adds to it). The result does not depend on the number of threads.
    Raises: NotCertifiable if no factorisation completes.
    """
    shift, slacks = _FIRST_SHIFT, []
    for member in order[:4]:
        shift, slack = _raise_shift(family.grams(np.array([member]))[0], shift)
        slacks.append(slack)

    def verify(indices: np.ndarray, shift: float = shift) -> tuple[float, Fraction]:
        stack = family.grams(indices)
        slack = _verify(stack, shift)
        if slack is not None:
            return shift, slack
        slack = Fraction(0)
        for gram in stack:
            shift, one = _raise_shift(gram, shift)
            slack = max(slack, one)
        return shift, slack

    results = parallel_map(verify, family.chunks(order[4:]))
    shift = max([shift] + [result[0] for result in results])
    slack = max(slacks + [result[1] for result in results]) + family.error
    return Fraction(shift) + slack, {"shift": shift, "slack": float_up(slack)}


def response_family(stack: np.ndarray) -> GramFamily:
    """The Gram matrices, of the smaller side, of scaled matrices (f, m, n), real or complex."""
    count, rows, side = stack.shape
    tall = rows >= side

    def grams(indices: np.ndarray) -> np.ndarray:
        chosen = stack[indices]
        adjoint = chosen.conj().swapaxes(1, 2)
        return adjoint @ chosen if tall else chosen @ adjoint

    frobenius = max(sum_of_squares_up(block) for block in stack)
    relative = exact_gamma((4 if np.iscomplexobj(stack) else 1) * (max(rows, side) + 4))
    return GramFamily(min(rows, side), count, grams, relative * frobenius + EXACT_UNDERFLOW)


def isometry_bound(family: GramFamily, enough: float) -> tuple[Fraction, dict[str, float]] | None:
    """Upper bound of max_f lambda_max(G_f) for matrices that are all nearly the same multiple of the identity.

    For every number c, lambda_max(G) <= c + |G - c I|_F. Half as dear as one attempt by Cholesky, and without a guess.

    Args: enough: relative to c; where some distance exceeds it, None is returned, mostly after a first look.
    Returns: the bound, and `centre` = c and `residual`, the largest distance found, rounding included; or None.
    """
    indices = np.arange(family.count)
    centre = float(np.einsum("ii->i", family.grams(indices[:1])[0]).real.mean())

    def distance_squared(indices: np.ndarray) -> float:
        stack = family.grams(indices)
        np.einsum("...ii->...i", stack)[...] -= centre
        parts = np.ascontiguousarray(stack).view(np.float64).reshape(len(stack), -1)
        return float(np.sum(parts * parts, axis=1).max())

    limit = (enough * centre) ** 2
    if not distance_squared(indices[:1]) <= limit:
        return None
    squared = max(parallel_map(distance_squared, family.chunks(indices)))
    if not squared <= limit:
        return None
    # Subtracting c from the diagonal rounds by at most u times the result.
    computed = Fraction(sqrt_up(Fraction(squared) / (1 - exact_gamma(2 * family.side**2 + 4)) + EXACT_UNDERFLOW))
    residual = computed * (1 + 2 * EXACT_UNIT_ROUNDOFF) + family.error
    return Fraction(centre) + residual, {"centre": centre, "residual": float_up(residual)}
