"""Proved radii for the MLP head, in NumPy float64. docs/soundness.md derives every error term."""

import dataclasses

import numpy as np
from threadpoolctl import threadpool_limits

from lipjax import curvature, spectral
from lipjax.certify.certificate import Certificate, Minorants, certify_radii, radius_of
from lipjax.certify.radius import best_minorant
from lipjax.numerics import ENLARGEMENT, ROOM, UNIT_ROUNDOFF, gamma
from lipjax.operators import MLPHead
from lipjax.operators.softplus import SIGMOID_ERROR, sigmoid_of, softplus_error, softplus_of
from lipjax.spectral import with_room
from lipjax.spectral.verified import parallel_map

_NUM_STEPS = 32
# Rows (an image and a rival) that are worked on at a time: their hidden units fit into caches and memory.
_ROWS = 64
# Added to every norm and error, so that what underflows is covered (docs/soundness.md).
_TINY = 2.0**-400


class MLPCertifier:
    """Proves how far features may move without changing the argmax of an MLP head, for many batches.

    Against each rival three lower bounds are known, and the largest counts: the margin divided by the global Lipschitz
    constant; the closed form with the curvature of `curvature.norm_table`; and the best minorant of a search, with the
    exact curvature. Only rivals that decide are taken further than the first: the radius is the least value over all
    rivals, so those whose lower bounds already lie above it do not matter.
    """

    def __init__(self, head: MLPHead):
        """Bounds the constants of the head.

        Raises: NotCertifiable if an entry is not finite or reaches 2^100.
        """
        self._lipschitz = head.pairwise_bound()
        self._w1, self._b1, self._w2, self._b2 = head.exact_arrays()
        self._norm = spectral.matrix_norm_bound(self._w1).claimed
        self._rows = _length(self._w1) * ENLARGEMENT + _TINY
        self._frobenius = float(_length(self._rows[None])[0]) * ENLARGEMENT + _TINY
        largest = np.stack([np.maximum(self._w2 - row, 0.0).max(axis=1) for row in self._w2])
        self._coarse = np.where(largest > 0, (self._norm**2 / 4 * largest) * (1 + gamma(8)) + _TINY, 0.0)
        self._fine: dict[tuple[int, int], float] = {}

    def document(self) -> dict:
        """The entry of a certificate about the head: the bound of |W1|, and all exact curvatures that were needed."""
        return {"norm": self._norm, "curvatures": [[*pair, self._fine[pair]] for pair in sorted(self._fine)]}

    def certify(
        self,
        predictions: np.ndarray,
        margins: np.ndarray,
        features: np.ndarray,
        feature_errors: np.ndarray,
        head_margins: np.ndarray,
        lipschitz: float,
    ) -> Certificate:
        """The certificate of n images.

        Args:
          predictions: (n,). margins: (n, k), lower bounds of logit[prediction] - logit[i] at the image.
          features: (n, d) as computed. feature_errors: (n,), bounds of their l2 distance to the exact ones.
          head_margins: (n, k), as margins, but at the computed features.
          lipschitz: proved Lipschitz constant of pixels -> features.
        """
        found: list[Minorants] = []
        radii = self.feature_radii(predictions, features, head_margins, found)
        # The exact features lie within feature_errors of the computed ones, around which the radii are. Another
        # evaluation is off by as much, and its proof of the radii rounds otherwise.
        with np.errstate(invalid="ignore"):
            inside = np.nextafter((radii - 2 * feature_errors[:, None]) * (1 - float(ROOM)), -np.inf)
        certificate = certify_radii(predictions, margins, radius_of(inside, np.full_like(inside, lipschitz)))
        return dataclasses.replace(certificate, minorants=Minorants.join(found, features.shape[1]))

    def feature_radii(
        self,
        predictions: np.ndarray,
        features: np.ndarray,
        margins: np.ndarray,
        minorants: list[Minorants] | None = None,
    ) -> np.ndarray:
        """Proved radii (n, k) around features (n, d) inside which the prediction's logit exceeds each rival's.

        Args: as in `certify`; margins at these features. Returns: in each row the least value over the rivals is as
        large as the methods make it, others may be less; 0 where nothing is proved, infinite for the prediction.
        What the search found is appended to minorants.
        """
        images = np.arange(len(predictions))
        radii = radius_of(margins, self._lipschitz[predictions])
        # What is not positive by now, also where something is NaN, stays 0.
        stage = np.where(radii > 0, 0, 2)
        radii[images, predictions], stage[images, predictions] = np.inf, 2
        with threadpool_limits(limits=1, user_api="blas"):
            while True:
                rivals = np.argmin(radii, axis=1)
                current = stage[images, rivals]
                if (current == 2).all():
                    return radii
                for reached in (0, 1):
                    chosen = np.flatnonzero(current == reached)
                    problem = features[chosen], predictions[chosen], rivals[chosen]
                    found, points = self._dual(*problem) if reached else (self._closed_form(*problem), None)
                    if points is not None and minorants is not None:
                        minorants.append(Minorants(chosen, rivals[chosen], points))
                    where = chosen, rivals[chosen]
                    radii[where] = np.maximum(radii[where], found)
                    stage[where] += 1

    def _closed_form(self, features, predictions, rivals) -> np.ndarray:
        coarse = self._coarse[predictions, rivals]

        def prove(rows):
            return self._prove(features[rows], features[rows], predictions[rows], rivals[rows], coarse[rows])

        return _by_rows(prove, len(predictions))

    def _dual(self, features, predictions, rivals) -> tuple[np.ndarray, np.ndarray]:
        """Radii (n,), and the points (n, d) whose minorants prove them, in single precision."""
        pairs = set(zip(predictions.tolist(), rivals.tolist(), strict=True))
        missing = sorted(pairs - self._fine.keys())
        bounds = parallel_map(lambda pair: with_room(curvature.bound(self._w1, self._w2, *pair)), missing)
        self._fine.update(zip(missing, bounds, strict=True))
        fine = np.array([self._fine[pair] for pair in zip(predictions.tolist(), rivals.tolist(), strict=True)])
        fine = np.minimum(fine, self._coarse[predictions, rivals])
        kept = np.empty(features.shape, np.float32)

        def prove(rows):
            a, p, i, m = features[rows], predictions[rows], rivals[rows], fine[rows]
            row, offset = self._w2[p] - self._w2[i], self._b2[p] - self._b2[i]

            def evaluate(points):  # nothing is concluded from the search, so that any softplus will do
                hidden = points @ self._w1.T + self._b1
                units = np.logaddexp(0, hidden)
                return np.sum(row * units, axis=1) + offset, (row * np.exp(hidden - units)) @ self._w1

            _, points = best_minorant(evaluate, a, m, _NUM_STEPS, np)
            # Any point proves something; certificates store it, in half the space.
            kept[rows] = points
            return self._prove(a, kept[rows].astype(np.float64), p, i, m)

        return _by_rows(prove, len(predictions)), kept

    def _prove(self, features, points, predictions, rivals, m) -> np.ndarray:
        """`certify.minorant_radius` around the features by the minorants at the points, with all errors: (n,)."""
        hidden, width = self._w1.shape
        row, offset = self._w2[predictions] - self._w2[rivals], self._b2[predictions] - self._b2[rivals]
        biases = np.abs(self._b2[predictions]) + np.abs(self._b2[rivals])

        # D and its gradient at the points, and bounds of their errors.
        sums = points @ self._w1.T + self._b1
        reach = (_length(points) * ENLARGEMENT + _TINY)[:, None]
        sum_error = gamma(width + 4) * ENLARGEMENT * (self._rows * reach + np.abs(self._b1))
        units, slopes, size = softplus_of(sums, np), sigmoid_of(sums, np), np.abs(row)
        value = np.sum(row * units, axis=1) + offset
        value_error = np.sum(size * (sum_error + softplus_error(units)), axis=1)
        value_error = (value_error + gamma(hidden + 8) * (np.sum(size * units, axis=1) + biases)) * ENLARGEMENT + _TINY
        weighted = row * slopes
        gradient = weighted @ self._w1
        unit_error = _length(size * (sum_error / 4 + SIGMOID_ERROR + 4 * UNIT_ROUNDOFF)) + _TINY
        weight_length = _length(weighted) + _TINY
        gradient_error = self._norm * unit_error + gamma(hidden + 4) * self._frobenius * weight_length
        gradient_error = gradient_error * ENLARGEMENT + _TINY

        # The radius, of which the numerator is taken low and the denominator high.
        up = 1 + gamma(width + 16)
        step = points - features
        moved, slope = _length(step) * up + _TINY, _length(gradient) * up + _TINY
        dot, bend = np.sum(gradient * step, axis=1), m / 2 * moved**2
        level_error = value_error + (gamma(width + 4) * slope + gradient_error) * moved
        level_error = level_error + gamma(16) * (np.abs(value) + np.abs(dot) + bend)
        level = value - dot - bend - level_error * ENLARGEMENT
        inner = _length(gradient + m[:, None] * step) * up + gradient_error + gamma(8) * (slope + m * moved) + _TINY
        outer = np.sqrt((slope + gradient_error) ** 2 + 2 * m * np.maximum(value + value_error, 0.0) * up)
        radius = np.nextafter(2 * level / ((inner + outer) * (1 + gamma(16))), 0.0)
        return np.where((level > 0) & np.isfinite(radius), radius, 0.0)


def _length(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(rows**2, axis=1))


def _by_rows(function, count: int) -> np.ndarray:
    """Calls the function with slices of all rows and joins what it returns; the chunks do not depend on the threads."""

    def quietly(rows: slice) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN end as radius 0
            return function(rows)

    chunks = [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]
    return np.concatenate([np.empty(0), *parallel_map(quietly, chunks)])
