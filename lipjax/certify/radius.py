"""Radii as plain arithmetic, their names in reports, and the share of images that they certify."""

import decimal
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lipjax import curvature as curvatures
from lipjax.operators.heads import MLPHead
from lipjax.operators.softplus import sigmoid, softplus

# `mlp_radius` takes eigenvalues for its curvatures up to this many classes.
_MAX_EXACT_CLASSES = 20


# The search keeps this far from the multiplier 1/m, where the minorant's ball is centred at the point itself.
_MAX_MULTIPLIER = 0.999


def certified_radius(logits: Float[Array, "b k"], lipschitz: Float[Array, "i j"]) -> Float[Array, " b"]:
    """The l2 radius min over rivals i != j of (y_j - y_i) / lipschitz[j, i], j the predicted class.

    Plain arithmetic in the inputs' precision: with a proved `lipschitz` and exact logits a certificate, otherwise a
    number. `FrozenNetwork.certify` is the proof.

    Args:
      logits: (b, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
    Returns: (b,), >= 0, in pixel units; 0 on ties and where a value is NaN; infinite if no rival can be reached.
    Raises: ValueError if the shapes do not fit.
    Source: Tsuzuku, Sato & Sugiyama 2018, arXiv:1802.04034; all rivals as in arXiv:2108.04062.
    Example: the nearest rival is 2 below, and the difference changes by at most 4 per pixel unit.
      >>> lipjax.certify.certified_radius(jnp.array([[3.0, 1.0, 0.0]]), jnp.full((3, 3), 4.0)).tolist()
      [0.5]
    """
    k = logits.shape[-1]
    if lipschitz.shape != (k, k):
        raise ValueError(f"Expected lipschitz of shape ({k}, {k}) for logits {logits.shape}, got {lipschitz.shape}.")
    predicted = jnp.argmax(logits, axis=1)
    own = predicted[:, None] == jnp.arange(k)
    gaps = jnp.take_along_axis(logits, predicted[:, None], axis=1) - logits
    constants = lipschitz[predicted]
    reachable = constants > 0
    ratios = jnp.where(reachable, gaps / jnp.where(reachable, constants, 1.0), jnp.where(gaps > 0, jnp.inf, 0.0))
    radius = jnp.min(jnp.where(own, jnp.inf, ratios), axis=1)
    invalid = jnp.isnan(logits).any(axis=1) | jnp.where(own, False, ~(constants >= 0) | ~(gaps > 0)).any(axis=1)
    return jnp.where(invalid, 0.0, radius)


def minorant_radius(value, gradient, step, curvature, xp: Any):
    """The radius of a ball in which a function is positive, by its quadratic minorant at another point.

    If D has second derivatives above -m in every direction, then D(y) >= Q(y) = D(b) + g.(y - b) - m/2 |y - b|^2, with
    g = grad D(b). Q is positive in a ball around b + g/m, and a = b - s is as far from its boundary as

        r = 2 Q(a) / (|g + m s| + sqrt(|g|^2 + 2 m D(b))),

    if Q(a) > 0. For s = 0 this is the closed form 2d / (g + sqrt(g^2 + 2md)) of arXiv:2211.08453, written so that
    nothing cancels; for other s it is the largest lower bound that a multiplier gives in that paper's dual problem
    (docs/soundness.md).

    Args: value (b,), gradient (b, n): D and grad D at the points a + step; step (b, n); curvature (b,): m >= 0; xp: the
    arrays' module, numpy or jax.numpy. Returns: (b,), 0 where Q(a) is not positive, infinite where D is constant.
    """

    def length(squared):  # with gradient 0 at 0
        positive = squared > 0
        return xp.where(positive, xp.sqrt(xp.where(positive, squared, 1.0)), 0.0)

    level = value - xp.sum(gradient * step, axis=1) - curvature / 2 * xp.sum(step**2, axis=1)
    inner = length(xp.sum((gradient + curvature[:, None] * step) ** 2, axis=1))
    total = inner + length(xp.sum(gradient**2, axis=1) + 2 * curvature * value)
    radius = xp.where(total > 0, 2 * level / xp.where(total > 0, total, 1.0), xp.inf)
    return xp.where(level > 0, radius, 0.0)


def best_minorant(evaluate: Callable, points, curvature, num_steps: int, xp: Any):
    """Searches the minorant that gives the largest `minorant_radius` around each point.

    Starts at the points themselves (the closed form) and moves towards the nearest zero of D, at which the step is
    parallel to the gradient; steps are halved where they have made the radius smaller.

    Args: evaluate: (b, n) -> D (b,) and its gradient (b, n). points (b, n). curvature (b,). num_steps: evaluations, at
    least 1. xp: the arrays' module; with numpy the search ends early once it has stopped to gain.
    Returns: the radii (b,) and where they come from, (b, n).
    """

    def advance(state):
        step, best_step, best, last, damping = state
        value, gradient = evaluate(points + step)
        radius = minorant_radius(value, gradient, step, curvature, xp)
        damping = xp.where(radius < last, damping / 2, damping)
        best_step = xp.where((radius > best)[:, None], step, best_step)
        squared = xp.sum(gradient**2, axis=1)
        # The multiplier at which the linearised problem has its solution, as far as the minorants have a ball for it.
        multiplier = (value - xp.sum(gradient * step, axis=1)) / xp.where(squared > 0, squared, 1.0)
        end = xp.where(curvature > 0, _MAX_MULTIPLIER / xp.where(curvature > 0, curvature, 1.0), xp.inf)
        multiplier = xp.minimum(xp.maximum(multiplier, 0.0), end)
        step = step - damping[:, None] * (multiplier[:, None] * gradient + step)
        return step, best_step, xp.maximum(radius, best), radius, damping

    nowhere, zero = xp.zeros_like(points), xp.zeros_like(curvature)
    state = advance((nowhere, nowhere, zero, zero, xp.ones_like(curvature)))
    if xp is np:
        idle = 0
        for _ in range(num_steps - 1):
            before, state = state[2], advance(state)
            idle = 0 if (state[2] > before * (1 + 1e-3)).any() else idle + 1
            if idle == 3:
                break
    elif num_steps > 1:
        state = jax.lax.fori_loop(1, num_steps, lambda _, state: advance(state), state)
    return state[2], points + state[1]


def mlp_radius(
    features: Float[Array, "b n"],
    w1: Float[Array, "h i"],
    b1: Float[Array, " j"],
    w2: Float[Array, "k l"],
    b2: Float[Array, " o"],
    method: str = "closed_form",
    curvature: Float[Array, "p q"] | None = None,
    *,
    num_steps: int = 32,
) -> Float[Array, " b"]:
    """Radius around each feature vector a inside which W2 softplus(W1 a + b1) + b2 keeps its argmax: all rivals.

    Plain arithmetic in the inputs' precision; `FrozenNetwork.certify` is the proof. A network with this head keeps its
    class within the radius divided by the Lipschitz constant of its features.

    Args:
      features: (b, n).
      w1, b1: (h, n) and (h,), as in `operators.MLPHead`.
      w2, b2: (k, h) and (k,), one row for each class.
      method: "closed_form", by the gradient at a; "dual", at least that, by the gradients at up to num_steps points.
      curvature: (k, k), [i, j] the curvature from below of logit_i - logit_j or more, such as
        `curvature.eigenvalue_table`. By default `curvature.norm_table` with the SVD's |W1|, and for "dual" with up to
        20 classes `eigenvalue_table`; both are expensive, so inside a training step give a table.
      num_steps: >= 1, points that "dual" looks at.
    Returns: (b,), >= 0, in feature units; 0 on ties and where a value is NaN; infinite if no rival can be reached.
    Raises: ValueError for another method, shapes that do not fit, or num_steps below 1.
    Source: Singla & Feizi 2022, arXiv:2211.08453, with all rivals.
    Example: the nearest tie of the features (1, 0) is (1/2, 1/2), which the dual finds.
      >>> head = jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2)
      >>> f"{lipjax.certify.mlp_radius(jnp.array([[1.0, 0.0]]), *head, method='dual').item():.3f}"
      '0.707'
    """
    head = MLPHead(w1, b1, w2, b2)
    head.check()
    num_classes = w2.shape[0]
    if method not in ("closed_form", "dual") or num_steps < 1:
        raise ValueError(f"Expected method 'closed_form' or 'dual' and num_steps >= 1, got {method!r} and {num_steps}.")
    if curvature is not None:
        table = curvature
    elif method == "dual" and num_classes <= _MAX_EXACT_CLASSES:
        table = curvatures.eigenvalue_table(w1, w2)
    else:
        table = curvatures.norm_table(jnp.linalg.norm(w1, 2), w2)
    if table.shape != (num_classes, num_classes):
        raise ValueError(f"Expected curvature of shape ({num_classes}, {num_classes}), got {table.shape}.")
    return _mlp_radius(head, features, table, num_steps if method == "dual" else 1)


@functools.partial(jax.jit, static_argnums=3)
def _mlp_radius(head: MLPHead, features, curvature, num_steps: int):
    w1, b1, w2, b2 = head.w1, head.b1, head.w2, head.b2
    predicted = jnp.argmax(head(features), axis=1)

    def to_rival(rival):
        row, offset = w2[predicted] - w2[rival], b2[predicted] - b2[rival]

        def evaluate(points):
            hidden = points @ w1.T + b1
            return jnp.sum(row * softplus(hidden), axis=1) + offset, (row * sigmoid(hidden)) @ w1

        radius, _ = best_minorant(evaluate, features, curvature[predicted, rival], num_steps, jnp)
        return jnp.where(rival == predicted, jnp.inf, radius)

    return jnp.min(jax.lax.map(to_rival, jnp.arange(w2.shape[0])), axis=0)


def certified_accuracy(predictions, labels, radii, epsilon: float) -> float:
    """Fraction of images that are classified correctly with a radius above epsilon (the papers' VRA or CRA).

    Args:
      predictions: (n,) integers.
      labels: (n,) integers.
      radii: (n,), l2, pixel units.
      epsilon: l2, pixel units; strict, so that the closed ball is covered.
    Returns: a float in [0, 1].
    Raises: ValueError if the lengths differ or there is no image.
    Example: the first image is right, and certified at 36/255; the second is not.
      >>> lipjax.certify.certified_accuracy([0, 1], [0, 1], [0.3, 0.1], 36 / 255)
      0.5
    """
    predictions, labels, radii = (np.asarray(a) for a in (predictions, labels, radii))
    if not (predictions.shape == labels.shape == radii.shape and radii.size):
        raise ValueError(
            "Expected equally long predictions, labels and radii, at least one, "
            f"got {predictions.shape}, {labels.shape}, {radii.shape}."
        )
    return float(np.mean((predictions == labels) & (radii > epsilon)))


def radius_key(radius: float) -> str:
    """A radius as a key of report.json: a decimal number of six digits, never above it, as "0.25" or "0.141176".

    It names what is proved at the radius, so float(key) <= radius: where the nearest such number is larger it is
    rounded down, as 72/255 to "0.282352".
    """
    key = f"{radius:.6g}"
    if float(key) <= radius:
        return key
    return f"{float(decimal.Context(prec=6, rounding=decimal.ROUND_FLOOR).create_decimal_from_float(radius)):.6g}"


def radius_label(radius: float) -> str:
    """A radius for people: multiples of 1/255 as "36/255" unless they are short decimals, others as `radius_key`.

    A radius just below a multiple is not called by it: like a key, a label is never above its radius.
    """
    steps, key = round(radius * 255), radius_key(radius)
    multiple = steps > 0 and steps / 255 <= radius < (1 + 1e-6) * steps / 255
    return f"{steps}/255" if multiple and len(key) > 4 else key
