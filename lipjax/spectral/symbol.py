"""Gram matrices of convolutions, with proved errors: per frequency of an embedding circulant, or of the dense operator.

The embedding, the polyphase form and every rounding term are derived in docs/soundness.md, sections 2 and 3.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np

from lipjax._dft import twiddles
from lipjax.numerics import EXACT_UNDERFLOW, EXACT_UNIT_ROUNDOFF, exact_gamma
from lipjax.spectral import verified


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis: y[i] = sum_t K[t] x[s i + t - lo] for 0 <= i < out, x zero outside [0, size) or periodic."""

    taps: int
    size: int
    stride: int
    low: int
    out: int
    circular: bool

    def offsets(self) -> list[int | None]:
        """t - lo for each tap, None for a tap that only ever meets padding."""
        found: list[int | None] = []
        for offset in range(-self.low, self.taps - self.low):
            # The outputs i with 0 <= s i + offset < size.
            first, last = max(0, -(offset // self.stride)), min(self.out - 1, (self.size - 1 - offset) // self.stride)
            found.append(offset if self.circular or first <= last else None)
        return found

    def least_grid(self) -> int:
        """Least number n of blocks for which the operator is a compression of an n-periodic one."""
        if self.circular:
            return self.size // self.stride
        reach = self.stride * (self.out - 1) + self.taps - 1 - self.low
        return max(self.out, -(-(self.size + self.low) // self.stride), reach // self.stride + 1)


def without_idle_taps(kernel: np.ndarray, axes: tuple[Axis, Axis]) -> np.ndarray:
    """The kernel (HWIO) with zeros for the taps that only ever meet padding: the same operator."""
    rows, columns = (np.array([offset is not None for offset in axis.offsets()]) for axis in axes)
    return np.where((rows[:, None] & columns)[..., None, None], kernel, 0.0)


def polyphase(kernel: np.ndarray, axes: tuple[Axis, Axis]) -> np.ndarray:
    """The block taps P[q1, q2] of the kernel: (q1, q2, o, rho1 rho2 c) with t - lo = s q + rho, 0 <= rho < s.

    Idle taps must have been removed, and some tap be left; block columns that are zero throughout are left out. If o
    is the smaller side the taps are transposed, which transposes the symbol.
    """
    offsets = [axis.offsets() for axis in axes]
    used = [[d // axis.stride for d in found if d is not None] for found, axis in zip(offsets, axes, strict=True)]
    (s1, s2), (_, _, c, o) = (axis.stride for axis in axes), kernel.shape
    blocks = np.zeros((max(used[0]) - min(used[0]) + 1, max(used[1]) - min(used[1]) + 1, o, s1, s2, c))
    for t1, d1 in enumerate(offsets[0]):
        for t2, d2 in enumerate(offsets[1]):
            if d1 is not None and d2 is not None:
                place = d1 // s1 - min(used[0]), d2 // s2 - min(used[1]), slice(None), d1 % s1, d2 % s2
                blocks[place] = kernel[t1, t2].T
    blocks = blocks.reshape(*blocks.shape[:3], -1)
    blocks = blocks[..., blocks.any(axis=(0, 1, 2))]
    return np.ascontiguousarray(blocks.swapaxes(2, 3) if o < blocks.shape[3] else blocks)


def sum_of_norms_squared_up(taps: np.ndarray) -> Fraction:
    """Upper bound of (sum_t |K_t|_F)^2 over taps (q1, q2, m, n): bounds |sum_t |K_t| (x) shift_t|^2 for any shifts."""
    norms = [Fraction(verified.sqrt_up(verified.sum_of_squares_up(tap))) for row in taps for tap in row if tap.any()]
    return sum(norms, Fraction(0)) ** 2


def may_be_isometric(taps: np.ndarray, enough: float) -> bool:
    """True if sum_t K_t^T K_t is within `enough` of a multiple of the identity, relatively: a guess by one product."""
    flat = taps.reshape(-1, taps.shape[3])
    gram = flat.T @ flat
    centre = float(np.trace(gram)) / len(gram)
    gram[np.diag_indices_from(gram)] -= centre
    return bool(np.linalg.norm(gram) <= enough * centre)


def _meet(used: np.ndarray, d1: int, d2: int) -> bool:
    """True if two taps that are used lie (d1, d2) apart, d1 >= 0."""
    q1, q2 = used.shape
    low, high = max(0, -d2), min(q2, q2 - d2)
    return bool((used[: q1 - d1, low:high] & used[d1:, low + d2 : high + d2]).any())


class GramPolynomial:
    """G(omega) = K(omega)^H K(omega) = sum_d C_d e^(i omega d), C_d = sum_t K_t^T K_(t+d), for real taps.

    The products are formed once, not per frequency: 13 real ones for 3 x 3 taps.

    Attributes: error: bound on the spectral norm of computed minus exact G at any frequency of `family`.
    """

    def __init__(self, taps: np.ndarray):
        """taps: (q1, q2, m, n) float64, scaled (`scale_to_unit`)."""
        q1, q2, m, n = taps.shape
        self.taps, self.side = taps, n
        pairs = [(d1, d2) for d1 in range(q1) for d2 in range(1 - q2, q2) if d1 > 0 or d2 > 0]
        used = np.asarray(taps.any(axis=(2, 3)))
        pairs = [pair for pair in pairs if _meet(used, *pair)]  # between the taps of dilated kernels are zeros
        self.displacements = np.array(pairs, int).reshape(-1, 2)
        self.even, self.odd = np.empty((len(pairs) + 1, n * n)), np.empty((len(pairs), n * n))
        self.even[0] = self._product(0, 0).reshape(-1)

        def fill(index: int) -> None:
            product = self._product(*pairs[index])
            self.even[index + 1] = (product + product.T).reshape(-1)
            self.odd[index] = (product - product.T).reshape(-1)

        verified.parallel_map(fill, range(len(pairs)))
        terms = q1 * q2 * m + 2 * (len(pairs) + 1) + 8
        relative = 2 * exact_gamma(terms) + Fraction(1, 2**48)
        self.error = relative * sum_of_norms_squared_up(taps) + EXACT_UNDERFLOW

    def _product(self, d1: int, d2: int) -> np.ndarray:
        q1, q2, _, n = self.taps.shape
        low, high = max(0, -d2), min(q2, q2 - d2)
        left = self.taps[: q1 - d1, low:high].reshape(-1, n)
        return left.T @ self.taps[d1:, low + d2 : high + d2].reshape(-1, n)

    def bound_everywhere(self, enough: float) -> tuple[Fraction, dict[str, Any]] | None:
        """Upper bound of lambda_max(G(omega)) for all omega, on no grid; for G close to a multiple of the identity.

        c + |C_0 - c I|_F + sum_d max(|C_d + C_d^T|_F, |C_d - C_d^T|_F) + error, c the mean of the diagonal of C_0.

        Args: enough: relative to c; where the sum of norms, without the error, exceeds it, None is returned.
        Returns: the bound, and `lags`, how many C_d there are, `centre` = c and `residual`, all that is added to c.
        """
        constant, diagonal = self.even[0].copy(), slice(None, None, self.side + 1)
        centre = float(constant[diagonal].mean())
        constant[diagonal] -= centre
        # Subtracting c from the diagonal rounds by at most u times the result.
        total = Fraction(verified.sqrt_up(verified.sum_of_squares_up(constant))) * (1 + 2 * EXACT_UNIT_ROUNDOFF)
        limit = enough * Fraction(centre)
        for even, odd in zip(self.even[1:], self.odd, strict=True):
            if total > limit:
                return None
            squares = max(verified.sum_of_squares_up(even), verified.sum_of_squares_up(odd))
            total += Fraction(verified.sqrt_up(squares))
        if total > limit:
            return None
        residual = total + self.error
        details = {"lags": len(self.odd) + 1, "centre": centre, "residual": verified.float_up(residual)}
        return Fraction(centre) + residual, details

    def family(self, grid: tuple[int, int], twist: tuple[int, int]) -> verified.GramFamily:
        """The Gram matrices at omega = pi (2 j + twist) / grid per axis, one of each pair +-omega.

        An axis with a single tap has the same norms at every frequency and gets one.
        """
        (n1, n2), single = grid, [q == 1 for q in self.taps.shape[:2]]
        a1, a2 = (
            np.zeros(1, int) if one else 2 * np.arange(n) + odd for n, odd, one in zip(grid, twist, single, strict=True)
        )
        mesh = np.stack(np.meshgrid(a1, a2, indexing="ij"), -1).reshape(-1, 2)
        period = np.array([2 * n1, 2 * n2])
        code, mirrored = (pair @ [2 * n2, 1] for pair in (mesh, -mesh % period))
        mesh = mesh[code <= mirrored]
        tables = twiddles(n1), twiddles(n2)

        def grams(indices: np.ndarray) -> np.ndarray:
            phases = mesh[indices][:, None, :] * self.displacements % period
            (c1, s1), (c2, s2) = ((t[0][phases[..., a]], t[1][phases[..., a]]) for a, t in enumerate(tables))
            cosines, sines = c1 * c2 - s1 * s2, s1 * c2 + c1 * s2
            shape = (len(indices), self.side, self.side)
            real = (np.concatenate([np.ones((len(indices), 1)), cosines], 1) @ self.even).reshape(shape)
            if not sines.any():
                return real
            stack = np.empty(shape, np.complex128)
            stack.real, stack.imag = real, (sines @ self.odd).reshape(shape)
            return stack

        return verified.GramFamily(self.side, len(mesh), grams, self.error)


def dense_gram(kernel: np.ndarray, axes: tuple[Axis, Axis]) -> tuple[np.ndarray, Fraction]:
    """T^T T for the zero-padded convolution T itself: (h w c, h w c), and the bound on its error in spectral norm.

    kernel: HWIO float64, scaled. Each output pixel adds its window of M = K^T K, K as (o, kh kw c).
    """
    k1, k2, c, o = kernel.shape
    flat = kernel.reshape(-1, o)
    products = (flat @ flat.T).reshape(k1, k2, c, k1, k2, c)
    rows, columns = axes
    gram = np.zeros((rows.size, columns.size, c, rows.size, columns.size, c))

    def windows(axis: Axis) -> list[tuple[slice, slice]]:
        found = []
        for start in range(-axis.low, axis.stride * axis.out - axis.low, axis.stride):
            first, last = max(start, 0), min(start + axis.taps, axis.size)
            if first < last:
                found.append((slice(first, last), slice(first - start, last - start)))
        return found

    for x1, t1 in windows(rows):
        for x2, t2 in windows(columns):
            gram[x1, x2, :, x1, x2, :] += products[t1, t2, :, t1, t2, :]
    side = rows.size * columns.size * c
    error = 2 * exact_gamma(o + k1 * k2 + 4) * sum_of_norms_squared_up(kernel)
    return gram.reshape(side, side), error + EXACT_UNDERFLOW
