"""Errors of float32 deployments: a proved bound on |float32 logit - exact logit|, and the gap that is measured.

A certificate speaks of exact arithmetic on the frozen float64 arrays. A machine that evaluates the network in float32
has an error of its own, which is reported beside the claim, never inside it. docs/soundness.md, section 13, says which
machines are meant and derives every constant.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import operators
from lipjax.bounds import LayerBound
from lipjax.certify.certificate import Certificate, radius_of
from lipjax.certify.float32 import HeadConstants, Local, locals_of
from lipjax.certify.float32_sums import LEAVES, MOVED, SUMS, errors_at_images, sum_errors
from lipjax.certify.float64 import add, carry, check_arithmetic, finish, float64_on_cpu, propagate
from lipjax.certify.frozen import FrozenNetwork
from lipjax.network import Network
from lipjax.numerics import (
    ENLARGEMENT32,
    LARGEST,
    LEAST_NORMAL32,
    UNDERFLOW_OF_OPERATOR,
    UNIT_ROUNDOFF32,
    gamma,
    gamma32,
)
from lipjax.operators.softplus import softplus_of

ASSUMPTIONS = (
    "Arrays and pixels are rounded to IEEE binary32 and so is every operation, to nearest, quotients and roots within "
    "4 units of 2^-24; sums of products are taken in any order, with or without fused multiply-adds, but without TF32, "
    "bfloat16, Winograd, FFT or Strassen products; subnormal numbers may become zero; elementary functions err as "
    "little as docs/soundness.md, section 13, allows, and operators are merged only as it says there."
)
POINT_CLAIM = (
    "At so many images every float32 evaluation of this kind gives the class reported: all exact margins are proved to "
    "exceed the bound of the float32 error of the difference of the two logits."
)
BALL_CLAIM = (
    "For every x' with |x' - x|_2 < float32 radius, every float32 evaluation of this kind gives the class reported for "
    "x: the bound of the float32 error is one for the whole ball, and the radius is at most the certified one."
)


def _pixels(frozen: FrozenNetwork, images, pixel_max: int | None) -> np.ndarray:
    """Images of a batch in float64, divided by pixel_max if there is one."""
    return frozen.check_images(images if pixel_max is None else np.asarray(images) / np.float64(pixel_max))


@dataclasses.dataclass(frozen=True)
class _Values:
    """Of a batch, in front of an operator: its images in float64, how far they are from the exact ones, and two bounds
    (2, b) of how far those of binary32 are from the exact ones, infinite where its range may be left: the first is for
    these images, the second is continued to a ball around them by Lipschitz constants. Inside a composite "exact" is
    what exact parts make of the input that each evaluation computed, and `apart` (2, b) how far these two are apart."""

    x: jax.Array
    error64: jax.Array
    errors: np.ndarray
    apart: np.ndarray | float = 0.0

    @property
    def length(self) -> np.ndarray:
        return np.linalg.norm(np.asarray(self.x).reshape(len(self.x), -1), axis=1)

    @property
    def distances(self) -> np.ndarray:
        """The largest distance of the two evaluations from each other: (2, b)."""
        return self.errors + np.asarray(self.error64) + self.apart


def _inside(errors: np.ndarray, largest: np.ndarray) -> np.ndarray:
    return np.where(largest <= LARGEST, errors * ENLARGEMENT32, np.inf)


def _advance(op, row: LayerBound, local: Local, at: _Values) -> _Values:
    """The state of the recursion after an operator, given the one before it."""
    if isinstance(op, operators.Composite):
        end = _Values(at.x, jnp.zeros_like(at.error64), np.zeros_like(at.errors), at.distances)
        for part, bound, own in zip(op.parts(), row.parts, local.parts, strict=True):
            end = _advance(part, bound, own, end)
        total, error64, reach = end.x, end.error64, end.length + end.distances
        errors = row.claimed * at.errors + end.errors
        if op.adds_input:
            total, error64 = add(at.x, end.x, end.error64)
            reach = reach + at.length + at.distances
            errors += local.absolute + local.relative * reach + local.sums * (at.length + at.distances)
        return _Values(total, carry(row.claimed, at.error64, error64), _inside(errors, reach), row.claimed * at.apart)
    length, distances = at.length, at.distances
    errors = row.claimed * at.errors + local.absolute + local.relative * length + local.slope * distances
    if isinstance(op, SUMS):
        options = local.inner, local.bias, local.leaves, local.whole
        errors += np.asarray(errors_at_images(op, *options, at.x, distances[0]))
    x, error64 = propagate(op, row.claimed, at.error64, at.x)
    largest = local.offset + local.gain * (length + distances)
    return _Values(x, error64, _inside(errors, largest), row.claimed * at.apart * ENLARGEMENT32)


def _head_local(head, x: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of a head in binary32: its largest number (b,) at features x, and two bounds (2, b, k) of its errors.

    The first is for all features within a distance (b,) of x, the second, at x, is continued by `HeadConstants`.
    """

    def layer(matrix, bias, x, further, moved=0.0):
        """Sizes and values of sums, and their errors; sizes and values may be greater by `moved`."""
        sizes, values = np.abs(x) @ np.abs(matrix).T + np.abs(bias) + moved, x @ matrix.T + bias
        terms, lengths = np.count_nonzero(matrix, axis=1), np.linalg.norm(matrix, axis=1)
        errors = sum_errors(sizes, np.abs(values) + moved, terms, further, LEAVES + MOVED)
        lost = 8 * LEAST_NORMAL32 * matrix.shape[1] * (1 + lengths + np.linalg.norm(x, axis=1, keepdims=True))
        return sizes, values, errors + lost

    distance = distance[:, None]
    if isinstance(head, operators.LinearHead):
        sizes, _, errors = layer(head.matrix, head.bias, x, distance * np.linalg.norm(head.matrix, axis=1))
        return np.max(sizes, axis=1), errors
    weights, further = np.abs(head.w2), distance * np.linalg.norm(head.w1, axis=1)
    sizes, values, errors = layer(head.w1, head.b1, x, further)
    units = softplus_of(values, np)
    errors = errors + (18 + 2 * (units + further)) * UNIT_ROUNDOFF32
    moved = 2 * np.max(errors, axis=0)
    outer, _, own = layer(head.w2, head.b2, units, further @ weights.T, moved @ weights.T)
    lost = 8 * LEAST_NORMAL32 * head.w2.shape[1] * np.linalg.norm(moved, axis=1)[:, None]
    return np.maximum(np.max(sizes, axis=1), np.max(outer, axis=1)), errors @ weights.T + own + lost


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Of n images: logits (n, k) in float64; l2 errors of the features in float64 (n,) and float32 (n, 2); errors that
    the head adds, in float64 (n, k), and in float32 (n, 2, k) at the computed features. Pairs are as in `_Values`."""

    logits: np.ndarray
    error64: np.ndarray
    error32: np.ndarray
    head64: np.ndarray
    head32: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """The largest distance of the features of the two evaluations from each other: (n, 2)."""
        return self.error64[:, None] + self.error32


class _Analysis:
    """The constants of a network in float32.

    At x' with |x' - x|_2 <= r all bounds are those at x with errors that are larger by `spread` r and features that are
    further by `lipschitz` r, as long as r is at most `reach`: else something might leave the range of binary32.
    """

    def __init__(self, frozen: FrozenNetwork):
        """Raises: NotCertifiable naming the layer that has no proved norm or no bound of its float32 error."""
        network, rows = frozen.network, frozen.lipschitz_report()
        self._frozen, self._rows = frozen, rows
        self._locals = locals_of(network, rows)
        self.head = HeadConstants(network.head)
        self.lipschitz, self.spread, self.reach = 1.0, gamma32(5), math.inf
        for row, local in zip(rows, self._locals, strict=True):
            self.spread, self.lipschitz = self._follow(row, local, self.spread, self.lipschitz)
        self._limit(self.head.gain, self.lipschitz + self.spread)

    def _follow(self, row: LayerBound, local: Local, spread: float, lipschitz: float) -> tuple[float, float]:
        """`spread` and `lipschitz` behind an operator, from those in front of it."""
        if not local.parts:
            self._limit(local.gain, lipschitz + spread)
            spread = ((row.claimed + local.slope) * spread + local.slope * lipschitz) * ENLARGEMENT32
            return spread, lipschitz * row.claimed * ENLARGEMENT32
        inner, through = 0.0, spread + lipschitz  # of the machine's own input, and of what exact parts make of it
        for part, own in zip(row.parts, local.parts, strict=True):
            inner, through = self._follow(part, own, inner, through)
        both = spread + lipschitz + inner + through
        self._limit(1.0, both)
        added = local.relative * both + local.sums * (spread + lipschitz)
        return (row.claimed * spread + inner + added) * ENLARGEMENT32, lipschitz * row.claimed * ENLARGEMENT32

    def _limit(self, gain: float, further: float) -> None:
        self.reach = min(self.reach, LARGEST / max(gain * further * ENLARGEMENT32, 2.0**-1000))

    def evaluate(self, images, batch_size: int, pixel_max: int | None = None) -> _Evaluation:
        if batch_size < 1:
            raise ValueError(f"Expected a batch_size of at least 1, got {batch_size}.")
        check_arithmetic()
        none, size = np.empty((0, self._frozen.num_classes)), min(batch_size, len(images))
        pairs = np.empty((0, 2)), np.empty((0, 2, self._frozen.num_classes))
        parts: list[tuple[np.ndarray, ...]] = [(none, np.empty(0), pairs[0], none, pairs[1])]
        # NaN and what overflows end as infinite bounds.
        with float64_on_cpu(), np.errstate(over="ignore", invalid="ignore"):
            network = jax.tree.map(jnp.asarray, self._frozen.network)
            for start in range(0, len(images), max(size, 1)):
                batch = _pixels(self._frozen, images[start : start + size], pixel_max)
                padding = [(0, size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
                parts.append(tuple(a[: len(batch)] for a in self._batch(network, np.pad(batch, padding))))
        return _Evaluation(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _batch(self, network: Network, images: np.ndarray) -> tuple[np.ndarray, ...]:
        flat = images.reshape(len(images), -1)
        lost = 4 * LEAST_NORMAL32 * math.sqrt(flat.shape[1])
        error = (gamma32(5) * np.linalg.norm(flat, axis=1) + lost) * ENLARGEMENT32
        at = _Values(jnp.asarray(images), jnp.full(len(images), UNDERFLOW_OF_OPERATOR), np.stack([error, error]))
        for op, row, local in zip((network.normalize, *network.ops), self._rows, self._locals, strict=True):
            at = _advance(op, row, local, at)
        logits, head64 = map(np.asarray, finish(network.head, at.x))
        distances = at.distances
        largest, head32 = _head_local(self._frozen.network.head, np.asarray(at.x), distances[0])
        inside = np.isfinite(distances) & (largest + self.head.gain * distances <= LARGEST)
        head32 = np.where(inside[:, :, None], head32 * ENLARGEMENT32, np.inf).swapaxes(0, 1)
        return logits, np.asarray(at.error64), np.where(inside, at.errors, np.inf).T, head64, head32

    def bound(self, found: _Evaluation) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            total = self.head.lipschitz * found.error32[:, :1] + found.head32[:, 0]
            total = (total + self.head.slope * found.distances[:, :1]) * ENLARGEMENT32
        return np.where(np.isnan(total), np.inf, total)

    def radii(self, found: _Evaluation, predictions: np.ndarray) -> np.ndarray:
        """(n,): inside, every float32 evaluation gives the prediction; 0 where that is not even so at the image."""
        rows, head = np.arange(len(predictions)), self._frozen.head_lipschitz[predictions]

        def both(values):  # the prediction's and each rival's
            return values + values[rows, predictions][:, None]

        slope, distance = np.broadcast_to(self.head.slope, found.logits.shape), found.distances[:, 1]
        head32 = found.head32[:, 1]
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = found.logits[rows, predictions][:, None] - found.logits
            slack = head * distance[:, None] + both(found.head64) + both(head32)
            slack = (slack + both(slope) * distance[:, None]) * ENLARGEMENT32 + gamma(2) * np.abs(gaps)
            per_unit = self._frozen.margin_lipschitz()[predictions] + head * self.spread
            per_unit = (per_unit + both(slope) * (self.spread + self.lipschitz)) * ENLARGEMENT32
            radii = radius_of(np.nextafter(gaps - slack, -np.inf), per_unit)
        radii[rows, predictions] = np.inf
        # With a single class there is nothing to confuse, but float32 may still overflow.
        bounded = np.isfinite(distance) & np.isfinite(head32).all(axis=1)
        return np.where(bounded, np.minimum(radii.min(axis=1, initial=np.inf), self.reach), 0.0)


def float32_error(frozen: FrozenNetwork, images, batch_size: int = 256) -> np.ndarray:
    """Proved bounds of |float32 logit - exact logit| for every machine of which ASSUMPTIONS are true.

    Args: images: (n, *in_shape), floats in [0, 1]; the machine gets them rounded to float32, or divides 8-bit ones.
    Returns: (n, k) float64; infinite where float32 might overflow, and for NaN pixels: then nothing is claimed.
    Raises: UserError for other images; NotCertifiable naming the layer that has no proved norm, or whose float32 error
      nobody bounds.
    """
    analysis = _Analysis(frozen)
    return analysis.bound(analysis.evaluate(frozen.check_images(images), batch_size))


_logits = jax.jit(lambda network, pixels: network(pixels))


def _float32_logits(frozen: FrozenNetwork, images, batch_size: int, pixel_max: int | None = None) -> np.ndarray:
    """The logits of the network as one float32 program on JAX's default device, products at the highest precision."""
    with np.errstate(over="ignore"):
        network = jax.tree.map(lambda a: jnp.asarray(a.astype(np.float32)), frozen.network)
    parts = [np.empty((0, frozen.num_classes), np.float32)]
    with jax.default_matmul_precision("highest"):
        for start in range(0, len(images), batch_size):
            batch = _pixels(frozen, images[start : start + batch_size], pixel_max).astype(np.float32)
            parts.append(np.asarray(_logits(network, jnp.asarray(batch))))
    return np.concatenate(parts)


def _gap(found: np.ndarray, logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        gap = np.abs(found.astype(np.float64) - logits)
    return np.where(np.isnan(gap), np.inf, gap)


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def _statistics(values: np.ndarray) -> dict:
    """The largest and the median over images of the largest of each image's logits; None: infinite, or no image."""
    worst = values.max(axis=1, initial=0.0)
    if not worst.size:
        return {"largest": None, "median": None}
    # Not of the mean of two, one of which may be infinite.
    return {"largest": _number(worst.max()), "median": _number(np.sort(worst)[(len(worst) - 1) // 2])}


def deployment_report(
    frozen: FrozenNetwork,
    images,
    certificate: Certificate,
    radii: tuple[float, ...] = (),
    batch_size: int = 256,
    *,
    labels=None,
    pixel_max: int | None = None,
) -> dict:
    """The entry about float32 beside a certificate, JSON-ready.

    Args: images: those of the certificate. radii: pixel units, at which to compare the two kinds of claims. labels:
      (n,), for the accuracies. pixel_max: images are whole numbers, divided by this batch by batch; None: floats in
      [0, 1].
    Returns: "dtype", "device", "assumptions", "num_images";
      "bound" and "gap", each with "largest" and "median" over images of the largest of an image's logits, null where
      infinite, the former with the number of images "without" a bound, the latter with the number in the "same_class";
      "point": POINT_CLAIM, the number of images, and with labels "accuracy", the fraction where that class is right;
      "ball": BALL_CLAIM, how many images have a positive radius in exact arithmetic ("certified") and in float32
      ("float32"), the median of the ratio of the two over the former, and for each of `radii` the fraction of images
      beyond it in "exact" arithmetic and in "float32", and with labels "accuracy", the latter among images of the
      right class; with both of these, "curve" is that accuracy at radii further apart by 1/40 of the largest, up to 1.6
      times it. For an MLP head float32 radii rest on global Lipschitz constants alone.
    Raises: ValueError if certificate and images differ in number; as `float32_error`.
    """
    if len(certificate.predictions) != len(images):
        raise ValueError(f"Expected the certificate's {len(certificate.predictions)} images, got {len(images)}.")
    analysis = _Analysis(frozen)
    found = analysis.evaluate(images, batch_size, pixel_max)
    bound, predictions = analysis.bound(found), certificate.predictions
    logits = _float32_logits(frozen, images, batch_size, pixel_max)
    at_image = analysis.radii(found, predictions)
    inside = np.minimum(at_image, certificate.radii)
    certified = certificate.radii > 0
    ratios = inside[certified] / certificate.radii[certified]
    device = next(iter(jnp.zeros(()).devices()))

    def accuracy(robust):
        if labels is None:
            return {}
        return {"accuracy": float(np.mean(robust & (predictions == labels))) if len(images) else None}

    def row(radius):
        robust = inside > radius
        exact, single = (float(np.mean(r)) if len(images) else None for r in (certificate.radii > radius, robust))
        return {"radius": float(radius), "exact": exact, "float32": single} | accuracy(robust)

    curve = {}
    if radii and labels is not None:
        grid = max(radii) * np.arange(1, 65) / 40
        curve["curve"] = [{"radius": float(radius)} | accuracy(inside > radius) for radius in grid]
    return {
        "dtype": "float32",
        "device": f"{device.platform} ({device.device_kind})",
        "assumptions": ASSUMPTIONS,
        "num_images": len(images),
        "bound": _statistics(bound) | {"without": int(np.sum(~np.isfinite(bound).all(axis=1)))},
        "gap": _statistics(_gap(logits, found.logits))
        | {"same_class": int(np.sum(np.argmax(logits, axis=1) == predictions))},
        "point": {"claim": POINT_CLAIM, "num_images": int(np.sum(at_image > 0))} | accuracy(at_image > 0),
        "ball": {
            "claim": BALL_CLAIM,
            "certified": int(np.sum(certified)),
            "float32": int(np.sum(inside > 0)),
            "median_ratio": float(np.median(ratios)) if ratios.size else None,
            "radii": [row(radius) for radius in radii],
            **curve,
        },
    }
