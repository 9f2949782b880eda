"""Norms of matrices and convolutions by weighted row sums of their Gram matrices, of no frequency and no map.

The inequality, its rounding, and what the two sides are good for: docs/soundness.md, section 3b.
"""

import itertools
from fractions import Fraction

import numpy as np

from lipjax.numerics import EXACT_UNDERFLOW, exact_gamma
from lipjax.spectral import verified

# Steps towards the best weights, which are a Perron vector; nothing is concluded from how far they came.
_STEPS, _CLOSE, _LEAST = 200, 2.0**-44, 2.0**-60


def _lags(sides: tuple[int, int], strides: tuple[int, int]) -> list[tuple[int, int]]:
    """One of each pair of displacements +-d != 0 that are multiples of the strides and between two taps."""
    down, right = (range(0, side, step) for side, step in zip(sides, strides, strict=True))
    signed = [sign * d for d in right for sign in ((1, -1) if d else (1,))]
    return [(d1, d2) for d1, d2 in itertools.product(down, signed) if (d1, d2) > (0, 0)]


def squared_bound(taps: np.ndarray, strides: tuple[int, int]) -> Fraction:
    """Upper bound of the squared norm of y[p] = sum_t A_t x[s p + t] on all maps at once, by sums over rows of outputs.

    It is max_i sum_j N_ij w_j / w_i for N = sum_d |sum_t A_t A_(t+d)^T| over displacements d that are multiples of the
    strides, and any w > 0.

    Args: taps: (kh, kw, outputs, inputs), scaled (`scale_to_unit`). strides: s, per axis.
    """
    kh, kw, n, m = taps.shape
    lags = _lags((kh, kw), strides)

    def product(lag: tuple[int, int]) -> np.ndarray:
        d1, d2 = lag
        low, high = max(0, -d2), min(kw, kw - d2)
        first, second = taps[: kh - d1, low:high], taps[d1:, low + d2 : high + d2]
        # Side by side, so that one product adds over the taps, too.
        rows = [np.moveaxis(part, 2, 0).reshape(n, -1) for part in (first, second)]
        return rows[0] @ rows[1].T

    sums = np.abs(product((0, 0)))
    for found in verified.parallel_map(product, lags, most=8):
        size = np.abs(found)
        sums += size
        sums += size.T
    moduli = np.abs(taps).sum(axis=(0, 1))
    weights = _weights(sums)
    # Sums, products and quotients of numbers that are not negative: relative errors add up. A product's entry is a
    # sum of kh kw m terms, whose error the moduli bound.
    entry = verified.float_up(exact_gamma(kh * kw * m + 4))
    errors = entry * (moduli @ (moduli.T @ weights))
    largest = float(((sums @ weights + errors) / weights).max())
    return Fraction(largest) / (1 - exact_gamma(2 * len(lags) + kh * kw + 2 * n + m + 16)) + EXACT_UNDERFLOW


def _weights(sums: np.ndarray) -> np.ndarray:
    """Weights in [2^-60, 1] for which the largest row sum is nearly least: the best of several Perron steps."""
    weights = np.ones(len(sums))
    best, chosen = np.inf, weights
    least = float(np.diagonal(sums).min())
    for _ in range(_STEPS):
        image = sums @ weights
        ratios = image / weights
        top = float(ratios.max())
        if top < best:
            best, chosen = top, weights
        if not top - float(ratios.min()) > _CLOSE * top:  # the spectral radius lies between the two
            break
        # A common part of the diagonal changes no eigenvector, and without it the others fade sooner.
        weights = image - least * weights
        weights = np.maximum(weights / (weights.max() or 1.0), _LEAST)
    return chosen
