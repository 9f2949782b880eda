"""Training losses that ask for a certified margin: (logits, labels, lipschitz, ...) -> one value per example.

Everywhere lipschitz[i, j] bounds or estimates the Lipschitz constant of logit_i - logit_j in pixel units, labels are
integers in [0, k), epsilon is an l2 radius in pixel units, z_i = y_i - y_t with the label t, and m_i = lipschitz[t, i].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, "b k"]
Labels = Int[Array, " b"]
Lipschitz = Float[Array, "k k"]
PerExample = Float[Array, " b"]


def _own_class(labels: Labels, num_classes: int):
    return labels[:, None] == jnp.arange(num_classes, dtype=labels.dtype)


def cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """-log softmax(logits)[label], one value per example.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
    Returns: (b,), nats.
    Example: two equal logits.
      >>> f"{lipjax.losses.cross_entropy(jnp.zeros((1, 2)), jnp.array([0])).item():.4f}"
      '0.6931'
    """
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def shifted_logits(logits: Logits, labels: Labels, lipschitz: Lipschitz, epsilon, *, adaptive: bool) -> Logits:
    """z_i + rho_i epsilon m_i: the rivals' logits at the worst point of a ball, relative to the label's.

    Args:
      epsilon: radius in pixel units.
      adaptive: False for rho = 1; True for EMMA's rho = clip(-z_i / (epsilon m_i), 0.01, 1),
        constant under differentiation: the full ball where the example is certified against i, else as far as it is.
    Returns: (b, k), 0 in the column of the label.
    """
    own = _own_class(labels, logits.shape[1])
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
    return jnp.max(jnp.where(_own_class(predicted, logits.shape[1]), -jnp.inf, raised), axis=1)


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


def label_radius(logits: Logits, labels: Labels, lipschitz: Lipschitz) -> PerExample:
    """min over rivals i != t of (y_t - y_i) / lipschitz[t, i], the certified radius of the label: negative if wrong.

    Args, returns: as `emma`, in pixel units; infinite if no rival can reach the label.
    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062.
    """
    own = _own_class(labels, logits.shape[1])
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


def boosted_cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """Cross-entropy - log(1 - p), p the largest probability among the wrong classes.

    Args: logits (b, k), labels (b,). Returns: (b,), nats.
    Source: the code of Fazlyab et al. 2023, arXiv:2310.00116.
    """
    own = _own_class(labels, logits.shape[1])
    rival = jnp.argmax(jnp.where(own, -jnp.inf, logits), axis=1)
    others = jnp.where(_own_class(rival, logits.shape[1]) & ~own, -jnp.inf, logits)
    return cross_entropy(logits, labels) + jax.nn.logsumexp(logits, axis=1) - jax.nn.logsumexp(others, axis=1)


def _gated_radii(logits: Logits, labels: Labels, lipschitz: Lipschitz, radius, include_misclassified: bool):
    """The gate of CRM, and what its penalties are made of; examples outside of the gate have radii 0.

    Returns: gate (b,); the least radius (b,); the radii (b, k) against each rival of the predicted class, finite; which
    of them count (b, k): not the class itself nor rivals that cannot reach it.
    """
    predicted = jnp.argmax(logits, axis=1)
    own = _own_class(predicted, logits.shape[1])
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


__all__ = [
    "boosted_cross_entropy",
    "bottom_logit",
    "certificate_regularization",
    "crm",
    "crm_max",
    "cross_entropy",
    "curvature_penalty",
    "emma",
    "gloro",
    "label_radius",
    "margin",
    "shifted_logits",
    "trades",
]


def __dir__() -> list[str]:
    return __all__
