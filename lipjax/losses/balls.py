"""Losses at the worst point of a ball: rivals are raised by a radius times their Lipschitz constant."""

import jax
import jax.numpy as jnp

from lipjax.losses.logits import Labels, Lipschitz, Logits, PerExample, cross_entropy, own_class


def shifted_logits(logits: Logits, labels: Labels, lipschitz: Lipschitz, epsilon, *, adaptive: bool) -> Logits:
    """z_i + rho_i epsilon m_i: the rivals' logits at the worst point of a ball, relative to the label's.

    Args:
      epsilon: radius in pixel units.
      adaptive: False for rho = 1; True for EMMA's rho = clip(-z_i / (epsilon m_i), 0.01, 1),
        constant under differentiation: the full ball where the example is certified against i, else as far as it is.
    Returns: (b, k), 0 in the column of the label.
    """
    own = own_class(labels, logits.shape[1])
    z = logits - jnp.take_along_axis(logits, labels[:, None], axis=1)
    reach = epsilon * jnp.where(own, 0.0, lipschitz[labels])
    if adaptive:
        reach = reach * jax.lax.stop_gradient(jnp.clip(-z / jnp.maximum(reach, 1e-8), 0.01, 1.0))
    return jnp.where(own, 0.0, z + reach)


def emma(logits: Logits, labels: Labels, lipschitz: Lipschitz, epsilon) -> PerExample:
    """Efficient Margin MAximization: cross-entropy of `shifted_logits` with the adaptive radius.

    Not the gradient of a function, since the radius factor is held constant under differentiation.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
      epsilon: l2 radius in pixel units.
    Returns: (b,), nats.
    Source: Hu et al. 2023, arXiv:2301.12549.
    Example: certified at 0.5, so the rival is raised by 0.5 * 2, from 2 to 1 below the label.
      >>> loss = lipjax.losses.emma(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0), 0.5)
      >>> f"{loss.item():.4f}"  # log(1 + exp(-1))
      '0.3133'
    """
    return cross_entropy(shifted_logits(logits, labels, lipschitz, epsilon, adaptive=True), labels)


def margin(logits: Logits, labels: Labels, lipschitz: Lipschitz, epsilon) -> PerExample:
    """Lipschitz-margin training: cross-entropy of the logits with epsilon m_i added to every rival.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
      epsilon: l2 radius in pixel units.
    Returns: (b,), nats.
    Source: Tsuzuku, Sato & Sugiyama 2018, arXiv:1802.04034.
    Example:
      >>> loss = lipjax.losses.margin(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0), 1.0)
      >>> f"{loss.item():.4f}"  # the rival reaches the label: log 2
      '0.6931'
    """
    return cross_entropy(shifted_logits(logits, labels, lipschitz, epsilon, adaptive=False), labels)


def bottom_logit(logits: Logits, lipschitz: Lipschitz, epsilon) -> PerExample:
    """y_bot = max_{i != j} (y_i + epsilon lipschitz[j, i]), j the predicted class: below y_j if certified.

    Args: as `emma`, without labels. Returns: (b,), in units of logits; for one class -inf.
    Source: Leino, Wang & Fredrikson 2021, arXiv:2102.08452.
    """
    predicted = jnp.argmax(logits, axis=1)
    raised = logits + epsilon * lipschitz[predicted]
    return jnp.max(jnp.where(own_class(predicted, logits.shape[1]), -jnp.inf, raised), axis=1)


def gloro(logits: Logits, labels: Labels, lipschitz: Lipschitz, epsilon) -> PerExample:
    """Cross-entropy over k + 1 classes, the last being the bottom logit.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
      epsilon: l2 radius in pixel units.
    Returns: (b,), nats.
    Source: Leino, Wang & Fredrikson 2021, arXiv:2102.08452.
    Example:
      >>> loss = lipjax.losses.gloro(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0), 0.5)
      >>> f"{loss.item():.4f}"  # log(1 + exp(-2) + exp(-1))
      '0.4076'
    """
    bottom = bottom_logit(logits, lipschitz, epsilon)
    return cross_entropy(jnp.concatenate([logits, bottom[:, None]], axis=1), labels)


def trades(logits: Logits, labels: Labels, lipschitz: Lipschitz, epsilon, *, weight: float = 1.0) -> PerExample:
    """TRADES-GloRo: cross-entropy + weight KL(softmax(y) | softmax([y, y_bot])).

    The divergence is softplus(y_bot - logsumexp(y)), since the two distributions differ by one normalising factor.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
      epsilon: l2 radius in pixel units.
      weight: lambda of the paper.
    Returns: (b,), nats.
    Source: Leino, Wang & Fredrikson 2021, arXiv:2102.08452, with Zhang et al. 2019, arXiv:1901.08573.
    Example: with weight 1 it is `gloro`.
      >>> loss = lipjax.losses.trades(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0), 0.5)
      >>> f"{loss.item():.4f}"
      '0.4076'
    """
    gap = bottom_logit(logits, lipschitz, epsilon) - jax.nn.logsumexp(logits, axis=1)
    return cross_entropy(logits, labels) + weight * jax.nn.softplus(gap)


def scaled_offset_cross_entropy(
    logits: Logits, labels: Labels, lipschitz: Lipschitz, *, offset, temperature
) -> PerExample:
    """Offset cross-entropy whose offset is a radius: t CE(y + offset m_j in the rivals' place, over t).

    `losses.offset_cross_entropy` asks all pairs of classes for the same margin, whatever their constants are; this one
    for the margin that certifies the radius. It is `margin` with a temperature.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored. Gradients flow through it.
      offset: l2 radius in pixel units.
      temperature: t > 0, in units of logits.
    Returns: (b,), in units of logits.
    Source: Prach & Lampert 2022, arXiv:2208.03160, with margins by Tsuzuku, Sato & Sugiyama 2018, arXiv:1802.04034.
    Example: the rival is raised by 0.5 * 2, from 2 to 1 below the label.
      >>> loss = lipjax.losses.scaled_offset_cross_entropy(
      ...     jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0), offset=0.5, temperature=0.5)
      >>> f"{loss.item():.4f}"  # log(1 + exp(-2)) / 2
      '0.0635'
    """
    shifted = shifted_logits(logits, labels, lipschitz, offset, adaptive=False)
    return temperature * cross_entropy(shifted / temperature, labels)


def logit_annealing(
    logits: Logits, labels: Labels, lipschitz: Lipschitz, epsilon, *, offset, temperature, power
) -> PerExample:
    """Logit annealing: t (1 - p)^power (-log p), so that images which are classified well stop pulling.

    p is the label's probability, softmax((s - offset e_label) / t), of the logits s of `shifted_logits` with EMMA's
    adaptive radius; epsilon 0 leaves the plain logits. (1 - p) is differentiated, too.

    Args:
      logits: (b, k), k > 1.
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
      epsilon: l2 radius in pixel units.
      offset: xi of the paper, in units of logits.
      temperature: t > 0, in units of logits.
      power: beta of the paper, 0 or at least 1: between, the gradient is not finite at p = 1.
    Returns: (b,), in units of logits.
    Source: Lai et al. 2025, arXiv:2505.15174 (offset 2, temperature 3/4, power 5).
    Example: a label that is as probable as its rival.
      >>> loss = lipjax.losses.logit_annealing(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0), 0.0,
      ...                                      offset=2.0, temperature=1.0, power=2.0)
      >>> f"{loss.item():.4f}"  # log(2) / 4
      '0.1733'
    """
    own = own_class(labels, logits.shape[1])
    scaled = (
        shifted_logits(logits, labels, lipschitz, epsilon, adaptive=True) - jnp.where(own, offset, 0.0)
    ) / temperature
    picked = jnp.take_along_axis(scaled, labels[:, None], axis=1)[:, 0]
    # -log p as a softplus: never negative, and as exact near p = 1 as 1 - p is.
    surprise = jax.nn.softplus(jax.nn.logsumexp(jnp.where(own, -jnp.inf, scaled), axis=1) - picked)
    return temperature * surprise * (-jnp.expm1(-surprise)) ** power
