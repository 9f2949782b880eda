"""Losses of certified radii, and of what they are made of."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax.losses.logits import Labels, Lipschitz, Logits, PerExample, boosted_cross_entropy, cross_entropy, own_class


def label_radius(logits: Logits, labels: Labels, lipschitz: Lipschitz) -> PerExample:
    """min over rivals i != t of (y_t - y_i) / lipschitz[t, i], the certified radius of the label: negative if wrong.

    Args, returns: as `emma`, in pixel units; infinite if no rival can reach the label.
    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062.
    """
    own = own_class(labels, logits.shape[1])
    gaps = jnp.take_along_axis(logits, labels[:, None], axis=1) - logits
    constants = jnp.where(own, 0.0, lipschitz[labels])
    reachable = constants > 0
    ratios = gaps / jnp.where(reachable, constants, 1.0)
    unreachable = jnp.where(own | (gaps > 0), jnp.inf, jnp.minimum(gaps, 0.0))
    return jnp.min(jnp.where(reachable, ratios, unreachable), axis=1)


def certificate_regularization(logits: Logits, labels: Labels, lipschitz: Lipschitz, gamma) -> PerExample:
    """CR: cross-entropy - gamma max(0, radius), the radius of `label_radius`, differentiable in lipschitz too.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
      gamma: nats per pixel unit, >= 0.
    Returns: (b,), nats. An example whose label no rival can reach adds no radius.
    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062.
    Example: the radius is (3 - 1) / 2 = 1.
      >>> loss = lipjax.losses.certificate_regularization(
      ...     jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0), 0.1)
      >>> f"{loss.item():.4f}"  # log(1 + exp(-2)) - 0.1
      '0.0269'
    """
    radius = label_radius(logits, labels, lipschitz)
    radius = jax.nn.relu(jnp.where(jnp.isfinite(radius), radius, 0.0))
    return cross_entropy(logits, labels) - gamma * radius


def _gated_radii(logits: Logits, labels: Labels, lipschitz: Lipschitz, radius, include_misclassified: bool):
    """The gate of CRM, and what its penalties are made of; examples outside of the gate have radii 0.

    Returns: gate (b,); the least radius (b,); the radii (b, k) against each rival of the predicted class, finite; which
    of them count (b, k): not the class itself nor rivals that cannot reach it.
    """
    predicted = jnp.argmax(logits, axis=1)
    own = own_class(predicted, logits.shape[1])
    gaps = jnp.take_along_axis(logits, predicted[:, None], axis=1) - logits
    constants = jnp.where(own, 0.0, lipschitz[predicted])
    # Constants count as 0 if their squares underflow: derivatives of quotients by them would overflow.
    unreachable = constants <= jnp.finfo(constants.dtype).tiny ** 0.5
    radii = jnp.where(unreachable, 0.0, gaps) / jnp.where(unreachable, 1.0, constants)
    counts = ~(own | (unreachable & (gaps > 0)))
    least = jnp.min(jnp.where(counts, radii, jnp.inf), axis=1)
    gate = ~(least >= radius)  # a NaN passes, so that the loss shows it
    if not include_misclassified:
        gate &= predicted == labels
    outside = ~gate[:, None]
    return gate, jnp.where(gate, least, 0.0), jnp.where(outside, 0.0, radii), counts | outside


def crm(
    logits: Logits,
    labels: Labels,
    lipschitz: Lipschitz,
    *,
    temperature,
    radius,
    weight,
    include_misclassified: bool = False,
    boosted: bool = False,
) -> PerExample:
    """Certified Radius Maximization: cross-entropy - weight R_soft of every example whose certified radius is small.

    With the predicted class p, r_j = (y_p - y_j) / lipschitz[p, j] and R = min_{j != p} r_j, the certified radius,

        R_soft = -log(sum_{j != p} exp(-t r_j)) / t,   R_soft <= R <= R_soft + log(k - 1) / t,

    where R < radius and p is the label; elsewhere there is no penalty. Differentiable in logits and lipschitz; the
    predicted class and the gate are constants.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit, its diagonal ignored; a rival with constant 0 and a smaller logit adds
        nothing.
      temperature: t > 0, 1 / pixel unit.
      radius: the gate's, in pixel units.
      weight: lambda, in nats per pixel unit.
      include_misclassified: whether wrongly classified examples are penalised too, by the radius of the wrong class.
      boosted: whether `boosted_cross_entropy` takes the place of cross-entropy.
    Returns: (b,), nats; the mean over the batch is the paper's loss.
    Source: Fazlyab et al. 2023, arXiv:2310.00116.
    Example: one rival, so that R_soft is the radius (3 - 1) / 2 = 1.
      >>> loss = lipjax.losses.crm(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0),
      ...                          temperature=10.0, radius=2.0, weight=0.1)
      >>> f"{loss.item():.4f}"  # log(1 + exp(-2)) - 0.1
      '0.0269'
    """
    gate, _, radii, counts = _gated_radii(logits, labels, lipschitz, radius, include_misclassified)
    penalties = jax.nn.logsumexp(jnp.where(counts, -temperature * radii, -jnp.inf), axis=1) / temperature
    plain = (boosted_cross_entropy if boosted else cross_entropy)(logits, labels)
    return plain + weight * jnp.where(gate, penalties, 0.0)


def crm_max(
    logits: Logits,
    labels: Labels,
    lipschitz: Lipschitz,
    *,
    temperature,
    radius,
    weight,
    include_misclassified: bool = False,
    boosted: bool = False,
) -> PerExample:
    """CRM by the least radius alone: cross-entropy + weight exp(-t R) / t where `crm` subtracts weight R_soft.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored.
      temperature: t > 0, 1 / pixel unit.
      radius: the gate's, in pixel units.
      weight: lambda, in nats per pixel unit.
      include_misclassified: as in `crm`.
      boosted: as in `crm`.
    Returns: (b,), nats; the mean over the batch is the loss of the paper's code.
    Source: the code of Fazlyab et al. 2023, arXiv:2310.00116, whose default it is.
    Example: R = 1, at temperature 1.
      >>> loss = lipjax.losses.crm_max(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0),
      ...                              temperature=1.0, radius=2.0, weight=1.0)
      >>> f"{loss.item():.4f}"  # log(1 + exp(-2)) + exp(-1)
      '0.4948'
    """
    gate, least, _, _ = _gated_radii(logits, labels, lipschitz, radius, include_misclassified)
    plain = (boosted_cross_entropy if boosted else cross_entropy)(logits, labels)
    return plain + weight * jnp.where(gate, jnp.exp(-temperature * least) / temperature, 0.0)


def curvature_penalty(logits: Logits, labels: Labels, curvatures: Float[Array, "b r"], beta) -> PerExample:
    """Cross-entropy + beta times the mean curvature of each example's logit differences: for MLP heads.

    Args:
      logits (b, k), labels (b,).
      curvatures: (b, r), against r rivals of each label the larger of both sides' curvatures: with the table
        t = `curvature.estimate_table(...)` and rivals = `curvature.top_rivals(logits, labels, r)`,
        jnp.maximum(t, t.T)[labels[:, None], rivals]; or `curvature.estimate` of these pairs where there are many
        classes. The paper's code takes the 9 rivals with the largest logits.
      beta: weight.
    Returns: (b,), nats.
    Source: Singla & Feizi 2022, arXiv:2211.08453.
    """
    return cross_entropy(logits, labels) + beta * jnp.mean(curvatures, axis=1)


def cll(
    logits: Logits,
    labels: Labels,
    lipschitz: Lipschitz,
    *,
    epsilon,
    slack,
    shift,
    two_sided: bool = True,
    weight=0.0,
) -> PerExample:
    """Calibrated Lipschitz-margin loss: cross-entropy of radii, on a scale that is fixed by a radius and a probability.

        u_j = ((y_j - y_t) / lipschitz[t, j] + shift) / s,   u_t = -shift / s,   s = epsilon / log((2 - slack) / slack),

    + weight max_{i != j} lipschitz[i, j]^2. At distance epsilon from a boundary between two classes the probability of
    the nearer one is 1 - slack / 2. Gradients flow through the constants.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      lipschitz: (k, k), logits per pixel unit; the diagonal is ignored. Where one is 0, so that no perturbation changes
        the order of two classes, the difference of their logits takes the place of a radius.
      epsilon: half of the distance between classes that is calibrated for, in pixel units.
      slack: p of the paper, in (0, 1).
      shift: radius that rivals are raised by, in pixel units; in the paper epsilon.
      two_sided: whether the label is lowered by `shift`, too.
      weight: lambda, in nats.
    Returns: (b,), nats.
    Source: Losch et al. 2023, arXiv:2309.06166.
    Example: the rival is a radius of 1 away, and slack 0.5 makes s = 1 / log 3.
      >>> loss = lipjax.losses.cll(jnp.array([[3.0, 1.0]]), jnp.array([0]), jnp.full((2, 2), 2.0),
      ...                          epsilon=1.0, slack=0.5, shift=0.0)
      >>> f"{loss.item():.4f}"  # log(1 + 1/3)
      '0.2877'
    """
    own = own_class(labels, logits.shape[1])
    gaps = logits - jnp.take_along_axis(logits, labels[:, None], axis=1)
    constants = jnp.where(own, 1.0, lipschitz[labels])
    # As in `_gated_radii`: derivatives of quotients by constants whose squares underflow would overflow.
    constants = jnp.where(constants <= jnp.finfo(constants.dtype).tiny ** 0.5, 1.0, constants)
    raised = gaps / constants + jnp.where(own, -shift if two_sided else 0.0, shift)
    sigma = epsilon / (math.log(2 - slack) - math.log(slack))
    largest = jnp.max(jnp.where(jnp.eye(len(lipschitz), dtype=bool), 0.0, lipschitz))
    return cross_entropy(raised / sigma, labels) + weight * largest**2
