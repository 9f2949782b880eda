"""Losses that compare classes over a whole batch (Kantorovich-Rubinstein), and the hinges that go with them.

Each is still one value per image, whose mean over the batch is the loss. Means over the images of a class need to know
how many there are: of the *whole* batch, also where it is divided over devices or micro-batches.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer

from lipjax.losses.logits import Labels, Logits, PerExample, own_class

Counts = Integer[Array, " k"]


def class_counts(labels: Labels, num_classes: int) -> Integer[Array, " k"]:
    """The number of labels of each class.

    Args:
      labels: (b,) integers in [0, k); others are not counted.
      num_classes: k.
    Returns: (k,), integers.
    Example:
      >>> lipjax.losses.class_counts(jnp.array([0, 2, 2]), 3).tolist()
      [1, 0, 2]
    """
    return jnp.sum(own_class(labels, num_classes), axis=0)


def kantorovich_rubinstein(logits: Logits, labels: Labels, *, class_counts: Counts | None = None) -> PerExample:
    """The Kantorovich-Rubinstein loss: each class's logit shall be larger on its own images than on others.

    The mean over the batch is -(1 / k) sum_j (mean of y_j over the images of class j - mean of y_j over the others).
    An absent class has its second mean alone.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      class_counts: (k,), the images of each class in the whole batch, if this is only a part of it; None: it is all.
    Returns: (b,), in units of logits; of a part, so that the mean over all images is the loss of the whole batch.
    Source: Serrurier et al. 2021, arXiv:2006.06520.
    Example: one image of each class.
      >>> loss = lipjax.losses.kantorovich_rubinstein(jnp.array([[3.0, 1.0], [2.0, 2.0]]), jnp.array([0, 1]))
      >>> loss.mean().item()  # -((3 - 2) + (2 - 1)) / 2
      -1.0
    """
    k = logits.shape[1]
    counts = _counted(labels, k) if class_counts is None else class_counts
    counts = counts.astype(logits.dtype)
    total = jnp.sum(counts)
    weights = jnp.where(own_class(labels, k), -1 / jnp.maximum(counts, 1.0), 1 / jnp.maximum(total - counts, 1.0))
    return (total / k) * jnp.sum(weights * logits, axis=1)


_counted = class_counts  # where an argument has its name


def hinge(logits: Logits, labels: Labels, *, margin) -> PerExample:
    """Hinges on logits: (1 / k) ((k - 1) max(0, margin / 2 - y_t) + sum_{j != t} max(0, margin / 2 + y_j)).

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      margin: between the label's logit and the others', in units of logits.
    Returns: (b,), in units of logits.
    Source: Serrurier et al. 2021, arXiv:2006.06520, in the form for several classes of the authors' code.
    Example: the label's logit is 0.5 short of its half, and the rival's 1.5 above.
      >>> lipjax.losses.hinge(jnp.array([[0.0, 1.0]]), jnp.array([0]), margin=1.0).item()
      1.0
    """
    k = logits.shape[1]
    missing = jnp.where(
        own_class(labels, k), (k - 1) * jax.nn.relu(margin / 2 - logits), jax.nn.relu(margin / 2 + logits)
    )
    return jnp.sum(missing, axis=1) / k


def hkr(logits: Logits, labels: Labels, *, margin, alpha, class_counts: Counts | None = None) -> PerExample:
    """Hinge and Kantorovich-Rubinstein loss: alpha `hinge` + (1 - alpha) `kantorovich_rubinstein`.

    Args:
      logits: (b, k).
      labels: (b,) integers in [0, k).
      margin: of the hinges, in units of logits.
      alpha: weight of the hinges, in [0, 1].
      class_counts: (k,), the images of each class in the whole batch, if this is only a part of it; None: it is all.
    Returns: (b,), in units of logits.
    Raises: ValueError if alpha is a number outside [0, 1].
    Source: Serrurier et al. 2021, arXiv:2006.06520.
    Example: logits that leave no hinge: the Kantorovich-Rubinstein part alone.
      >>> loss = lipjax.losses.hkr(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), jnp.array([0, 1]), margin=1.0, alpha=0.5)
      >>> loss.mean().item()
      -1.0
    """
    _check_alpha(alpha)
    transport = kantorovich_rubinstein(logits, labels, class_counts=class_counts)
    return alpha * hinge(logits, labels, margin=margin) + (1 - alpha) * transport


def lse_hkr(logits: Logits, labels: Labels, *, margin, alpha, temperature=1.0, penalty=1.0) -> PerExample:
    """HKR of the label against a soft maximum of its rivals, which does not couple the images of a batch.

    With p = t y_label and n = log(sum_{j != label} exp(s t y_j)) / s, s = 2 log(k - 1) / (margin penalty), of which
    n <= max + margin penalty / 2: alpha (max(0, margin / 2 - p) + max(0, margin / 2 + n)) + (1 - alpha) (n - p).

    Args:
      logits: (b, k), k > 1.
      labels: (b,) integers in [0, k).
      margin: in units of logits, > 0.
      alpha: weight of the hinges, in [0, 1].
      temperature: t > 0, a factor of the logits.
      penalty: how far the soft maximum may exceed the maximum, as a multiple of margin / 2, > 0.
    Returns: (b,), in units of logits.
    Raises: ValueError if alpha is a number outside [0, 1].
    Source: the code of Serrurier et al. 2021, arXiv:2006.06520 (deel-torchlip, 2025).
    Example: two classes, whose only rival is its own maximum.
      >>> lipjax.losses.lse_hkr(jnp.array([[1.0, -1.0]]), jnp.array([0]), margin=1.0, alpha=0.5).item()
      -1.0
    """
    _check_alpha(alpha)
    own, k = own_class(labels, logits.shape[1]), logits.shape[1]
    # A single rival is its own soft maximum at any sharpness; the formula's would be 0.
    sharpness = 2 * math.log(k - 1) / (margin * penalty) if k > 2 else 1.0
    scaled = temperature * logits
    label = jnp.take_along_axis(scaled, labels[:, None], axis=1)[:, 0]
    rivals = jax.nn.logsumexp(jnp.where(own, -jnp.inf, sharpness * scaled), axis=1) / sharpness
    hinges = jax.nn.relu(margin / 2 - label) + jax.nn.relu(margin / 2 + rivals)
    return alpha * hinges + (1 - alpha) * (rivals - label)


def _check_alpha(alpha) -> None:
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha, the weight of the hinges, must lie in [0, 1], and is {alpha}: divide it by 1 + alpha."
        )
