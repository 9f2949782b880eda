"""Losses of logits and labels alone, and what all losses share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, "b k"]
Labels = Int[Array, " b"]
Lipschitz = Float[Array, "k k"]
PerExample = Float[Array, " b"]


def own_class(labels: Labels, num_classes: int):
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


def boosted_cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """Cross-entropy - log(1 - p), p the largest probability among the wrong classes.

    Args: logits (b, k), labels (b,). Returns: (b,), nats.
    Source: the code of Fazlyab et al. 2023, arXiv:2310.00116.
    """
    own = own_class(labels, logits.shape[1])
    rival = jnp.argmax(jnp.where(own, -jnp.inf, logits), axis=1)
    others = jnp.where(own_class(rival, logits.shape[1]) & ~own, -jnp.inf, logits)
    return cross_entropy(logits, labels) + jax.nn.logsumexp(logits, axis=1) - jax.nn.logsumexp(others, axis=1)


def offset_cross_entropy(logits: Logits, labels: Labels, *, offset, temperature) -> PerExample:
    """Cross-entropy that asks for a margin: t CE((y - offset e_label) / t), whose gradient does not vanish with t.

    With offset 0 and temperature 1 / tau it is the temperature loss CE(tau y) / tau.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      offset: taken from the label's logit, in units of logits; for a map to orthonormal logits that is 1-Lipschitz in
        all, 2 sqrt(2) r asks for the margin of radius 2 r.
      temperature: t > 0, in units of logits.
    Returns: (b,), in units of logits.
    Source: Prach & Lampert 2022, arXiv:2208.03160 (offset sqrt(2), temperature 1/4); the temperature alone:
      Bethune et al. 2022, arXiv:2104.05097.
    Example: the offset takes the label down to its rival.
      >>> loss = lipjax.losses.offset_cross_entropy(
      ...     jnp.array([[3.0, 1.0]]), jnp.array([0]), offset=2.0, temperature=0.25)
      >>> f"{loss.item():.4f}"  # log(2) / 4
      '0.1733'
    """
    lowered = jnp.where(own_class(labels, logits.shape[1]), logits - offset, logits)
    return temperature * cross_entropy(lowered / temperature, labels)


def multi_margin(logits: Logits, labels: Labels, *, margin, power=1.0) -> PerExample:
    """Hinges of all rivals: (1 / k) sum_{j != t} max(0, margin - y_t + y_j)^power.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      margin: in units of logits.
      power: at least 1.
    Returns: (b,), in units of logits to that power.
    Source: Meunier et al. 2022, arXiv:2110.12690, with margin 0.7; `multi_margin_loss` of PyTorch.
    Example: of a margin of 3, 1 is missing.
      >>> lipjax.losses.multi_margin(jnp.array([[3.0, 1.0]]), jnp.array([0]), margin=3.0).item()
      0.5
    """
    own = own_class(labels, logits.shape[1])
    missing = jax.nn.relu(margin + logits - jnp.take_along_axis(logits, labels[:, None], axis=1))
    return jnp.sum(jnp.where(own, 0.0, missing if power == 1 else missing**power), axis=1) / logits.shape[1]


def margin_boosting(logits: Logits, labels: Labels) -> PerExample:
    """Cross-entropy - mean over rivals j != t of log softmax(-y)_j, over k.

    The second term pushes all rivals down alike.

    Args:
      logits: (b, k), k > 1.
      labels: (b,) integers in [0, k).
    Returns: (b,), nats.
    Source: the code of Araujo et al. 2023, arXiv:2303.03169.
    Example: two equal logits, log(2) and half of it.
      >>> f"{lipjax.losses.margin_boosting(jnp.zeros((1, 2)), jnp.array([0])).item():.4f}"
      '1.0397'
    """
    k = logits.shape[1]
    rivals = jnp.where(own_class(labels, k), 0.0, jax.nn.log_softmax(-logits, axis=1))
    return cross_entropy(logits, labels) - jnp.sum(rivals, axis=1) / (k * (k - 1))
