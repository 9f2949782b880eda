"""What float32 changes: a proved bound on |float32 logit - exact logit|, and the gap that is measured.

A certificate speaks of exact arithmetic on the frozen float64 arrays. A machine that evaluates the network in float32
has an error of its own, which is reported beside the claim, never inside it. docs/soundness.md, section 13, says which
machines are meant and derives every constant.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import conv, operators
from lipjax._float32 import LARGEST, LEAST, ROOM, UNIT_ROUNDOFF, HeadConstants, gamma32, locals_of
from lipjax._float64 import FLOOR, advance, check_arithmetic, finish, float64_on_cpu, propagate
from lipjax.certify import Certificate, radius_of
from lipjax.frozen import FrozenNetwork
from lipjax.network import Network
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


@jax.jit
def _propagate_conv(op, norm, error, x):
    """As `propagate`, and | |A||x| | of every image: the same sums that the operator's own bound takes."""
    sums = conv.conv2d(jnp.abs(x), jnp.abs(op.kernel), strides=op.strides, padding=op.padding)
    return *propagate(op, norm, error, x), operators.norm_per_image(sums)


def _observe(op, norms, error, x):
    """The operator's output in float64, the bound of its error, and |x| and | |A||x| | for `Local`."""
    images, weighted = np.asarray(x).reshape(len(x), -1), np.zeros(len(x))
    length = np.linalg.norm(images, axis=1)
    if isinstance(op, operators.Conv):
        x, error, weighted = _propagate_conv(op, norms, error, x)
    else:
        x, error = advance(op, norms, error, x)
    if isinstance(op, operators.Dense):
        weighted = np.linalg.norm(np.abs(images) @ np.abs(op.matrix).T, axis=1)
    return x, error, length, np.asarray(weighted)


def _head_local(head, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a head adds in float32 at features x: a bound (b, k) of its error, and of its largest number (b,)."""
    features = x.shape[1]
    length, lost = np.linalg.norm(x, axis=1, keepdims=True), 8 * LEAST * features
    if isinstance(head, operators.LinearHead):
        sums = np.abs(x) @ np.abs(head.matrix).T + np.abs(head.bias)
        local = gamma32(features + 8) * sums + lost * (1 + np.linalg.norm(head.matrix, axis=1) + length)
        return local, np.max(sums, axis=1)
    hidden = head.w1.shape[0]
    sums = np.abs(x) @ np.abs(head.w1).T + np.abs(head.b1)
    unit_error = gamma32(features + 8) * sums + lost * (1 + np.linalg.norm(head.w1, axis=1) + length)
    units = softplus_of(x @ head.w1.T + head.b1, np)
    unit_error = unit_error + (18 + 2 * units) * UNIT_ROUNDOFF
    units = units + 2 * unit_error
    outer = units @ np.abs(head.w2).T + np.abs(head.b2)
    lost = 8 * LEAST * hidden * (1 + np.linalg.norm(head.w2, axis=1) + np.linalg.norm(units, axis=1, keepdims=True))
    local = unit_error @ np.abs(head.w2).T + gamma32(hidden + 8) * outer + lost
    return local, np.maximum(np.max(sums, axis=1), np.max(outer, axis=1))


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Of n images: logits (n, k) in float64; l2 errors (n,) of the features in float64 and float32; errors (n, k) that
    the head adds in float64, and in float32 at the computed features."""

    logits: np.ndarray
    error64: np.ndarray
    error32: np.ndarray
    head64: np.ndarray
    head32: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        """How far the features of the two evaluations may be from each other: (n,)."""
        return self.error64 + self.error32


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
        for norm, local in zip((row.bound for row in rows), self._locals, strict=True):
            self._limit(local.gain)
            self.spread = ((norm + local.slope) * self.spread + local.slope * self.lipschitz) * ROOM
            self.lipschitz *= norm * ROOM
        self._limit(self.head.gain)

    def _limit(self, gain: float) -> None:
        self.reach = min(self.reach, LARGEST / max(gain * (self.lipschitz + self.spread) * ROOM, 2.0**-1000))

    def evaluate(self, images, batch_size: int) -> _Evaluation:
        if batch_size < 1:
            raise ValueError(f"Expected a batch_size of at least 1, got {batch_size}.")
        check_arithmetic()
        images = self._frozen._check_images(images)
        none, size = np.empty((0, self._frozen.num_classes)), min(batch_size, len(images))
        parts: list[tuple[np.ndarray, ...]] = [(none, np.empty(0), np.empty(0), none, none)]
        # NaN and what overflows end as infinite bounds.
        with float64_on_cpu(), np.errstate(over="ignore", invalid="ignore"):
            network = jax.tree.map(jnp.asarray, self._frozen.network)
            for start in range(0, len(images), max(size, 1)):
                batch = images[start : start + size]
                padding = [(0, size - len(batch))] + [(0, 0)] * (images.ndim - 1)
                parts.append(tuple(a[: len(batch)] for a in self._batch(network, np.pad(batch, padding))))
        return _Evaluation(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _batch(self, network: Network, images: np.ndarray) -> tuple[np.ndarray, ...]:
        x, error64 = jnp.asarray(images), jnp.full(len(images), FLOOR)
        flat = images.reshape(len(images), -1)
        error = (gamma32(5) * np.linalg.norm(flat, axis=1) + 4 * LEAST * math.sqrt(flat.shape[1])) * ROOM
        for op, row, local in zip((network.normalize, *network.ops), self._rows, self._locals, strict=True):
            distance = error + np.asarray(error64)
            x, error64, length, weighted = _observe(op, row.norms, error64, x)
            largest = local.offset + local.gain * (length + distance)
            error = row.bound * error + local.absolute + local.relative * length + local.slope * distance
            error = (error + local.weighted * weighted) * ROOM
            error = np.where(largest <= LARGEST, error, np.inf)
        logits, head64 = map(np.asarray, finish(network.head, x))
        head32, largest = _head_local(self._frozen.network.head, np.asarray(x))
        distance = error + np.asarray(error64)
        inside = np.isfinite(distance) & (largest + self.head.gain * distance <= LARGEST)
        head32 = np.where(inside[:, None], head32 * ROOM, np.inf)
        return logits, np.asarray(error64), np.where(inside, error, np.inf), head64, head32

    def bound(self, found: _Evaluation) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            total = self.head.lipschitz * found.error32[:, None] + found.head32
            total = (total + self.head.slope * found.distance[:, None]) * ROOM
        return np.where(np.isnan(total), np.inf, total)

    def radii(self, found: _Evaluation, predictions: np.ndarray) -> np.ndarray:
        """(n,): inside, every float32 evaluation gives the prediction; 0 where that is not even so at the image."""
        rows, head = np.arange(len(predictions)), self._frozen._head_lipschitz[predictions]

        def both(values):  # the prediction's and each rival's
            return values + values[rows, predictions][:, None]

        slope = np.broadcast_to(self.head.slope, found.logits.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = found.logits[rows, predictions][:, None] - found.logits
            slack = head * found.distance[:, None] + both(found.head64) + both(found.head32)
            slack = (slack + both(slope) * found.distance[:, None]) * ROOM + operators.gamma(2) * np.abs(gaps)
            per_unit = self._frozen.margin_lipschitz()[predictions] + head * self.spread
            per_unit = (per_unit + both(slope) * (self.spread + self.lipschitz)) * ROOM
            radii = radius_of(np.nextafter(gaps - slack, -np.inf), per_unit)
        radii[rows, predictions] = np.inf
        # With a single class there is nothing to confuse, but float32 may still overflow.
        bounded = np.isfinite(found.error32) & np.isfinite(found.head32).all(axis=1)
        return np.where(bounded, np.minimum(radii.min(axis=1, initial=np.inf), self.reach), 0.0)


def float32_error(frozen: FrozenNetwork, images, batch_size: int = 256) -> np.ndarray:
    """Proved bounds of |float32 logit - exact logit| for every machine of which ASSUMPTIONS are true.

    Args: images: (n, *in_shape), floats in [0, 1]; the machine gets them rounded to float32, or divides 8-bit ones.
    Returns: (n, k) float64; infinite where float32 might overflow, and for NaN pixels: then nothing is claimed.
    Raises: UserError for other images; NotCertifiable naming the layer that has no proved norm, or whose float32 error
      nobody bounds.
    """
    analysis = _Analysis(frozen)
    return analysis.bound(analysis.evaluate(images, batch_size))


_logits = jax.jit(lambda network, pixels: network(pixels))


def _float32_logits(frozen: FrozenNetwork, images, batch_size: int) -> np.ndarray:
    """The logits of the network as one float32 program on JAX's default device, products at the highest precision."""
    with np.errstate(over="ignore"):
        network = jax.tree.map(lambda a: jnp.asarray(a.astype(np.float32)), frozen.network)
    parts = [np.empty((0, frozen.num_classes), np.float32)]
    with jax.default_matmul_precision("highest"):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].astype(np.float32)
            parts.append(np.asarray(_logits(network, jnp.asarray(batch))))
    return np.concatenate(parts)


def _gap(found: np.ndarray, logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        gap = np.abs(found.astype(np.float64) - logits)
    return np.where(np.isnan(gap), np.inf, gap)


def float32_gap(frozen: FrozenNetwork, images, batch_size: int = 256) -> np.ndarray:
    """Measured |float32 logit - frozen(images)|, (n, k): one program on JAX's default device, highest precision.

    What one machine did with these images; `float32_error` is the proof. Infinite where a logit is not finite.
    Raises: UserError for images of another shape, type or range.
    """
    logits = frozen(images, batch_size)
    return _gap(_float32_logits(frozen, frozen._check_images(images), batch_size), logits)


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
    frozen: FrozenNetwork, images, certificate: Certificate, radii: tuple[float, ...] = (), batch_size: int = 256
) -> dict:
    """What to say about float32 beside a certificate, JSON-ready.

    Args: images: those of the certificate. radii: pixel units, at which to compare the two kinds of claims.
    Returns: "dtype", "device", "assumptions", "num_images";
      "bound" and "gap", each with "largest" and "median" over images of the largest of an image's logits, null where
      infinite, the former with the number of images "without" a bound, the latter with the number in the "same_class";
      "point": POINT_CLAIM and the number of images;
      "ball": BALL_CLAIM, how many images have a positive radius in exact arithmetic ("certified") and in float32
      ("float32"), the median of the ratio of the two over the former, and for each of `radii` the fraction of images
      beyond it in "exact" arithmetic and in "float32". For an MLP head float32 radii rest on global Lipschitz constants
      alone.
    Raises: ValueError if certificate and images differ in number; as `float32_error`.
    """
    if len(certificate.predictions) != len(images):
        raise ValueError(f"Expected the certificate's {len(certificate.predictions)} images, got {len(images)}.")
    analysis = _Analysis(frozen)
    found = analysis.evaluate(images, batch_size)
    bound, predictions = analysis.bound(found), certificate.predictions
    logits = _float32_logits(frozen, frozen._check_images(images), batch_size)
    at_image = analysis.radii(found, predictions)
    inside = np.minimum(at_image, certificate.radii)
    certified = certificate.radii > 0
    ratios = inside[certified] / certificate.radii[certified]
    device = next(iter(jnp.zeros(()).devices()))
    return {
        "dtype": "float32",
        "device": f"{device.platform} ({device.device_kind})",
        "assumptions": ASSUMPTIONS,
        "num_images": len(images),
        "bound": _statistics(bound) | {"without": int(np.sum(~np.isfinite(bound).all(axis=1)))},
        "gap": _statistics(_gap(logits, found.logits))
        | {"same_class": int(np.sum(np.argmax(logits, axis=1) == predictions))},
        "point": {"claim": POINT_CLAIM, "num_images": int(np.sum(at_image > 0))},
        "ball": {
            "claim": BALL_CLAIM,
            "certified": int(np.sum(certified)),
            "float32": int(np.sum(inside > 0)),
            "median_ratio": float(np.median(ratios)) if ratios.size else None,
            "radii": [
                {
                    "radius": float(radius),
                    "exact": float(np.mean(certificate.radii > radius)) if len(images) else None,
                    "float32": float(np.mean(inside > radius)) if len(images) else None,
                }
                for radius in radii
            ],
        },
    }
