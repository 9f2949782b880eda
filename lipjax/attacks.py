"""Attacks: upper bounds of the robust accuracy, and attempts to break certificates."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


def _unit(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Each image scaled to l2 norm 1, zero images staying zero."""
    norm = jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
    return x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


def project_l2(delta: Float[Array, "b ..."], epsilon) -> Float[Array, "b ..."]:
    """Nearest point of the l2 ball of radius epsilon, image by image."""
    norm = jnp.sqrt(jnp.sum(delta**2, axis=tuple(range(1, delta.ndim)), keepdims=True))
    return delta * jnp.minimum(1.0, epsilon / jnp.maximum(norm, jnp.finfo(delta.dtype).tiny))


def pgd_l2(
    logits: Callable,
    images: Float[Array, "b ..."],
    labels: Int[Array, " b"],
    epsilon,
    key: PRNGKeyArray,
    *,
    num_steps: int,
    relative_step: float = 2.5,
) -> Float[Array, "b ..."]:
    """Projected gradient ascent on max_{i != label} logit_i - logit_label, from a random start, kept in the pixel box.

    Args:
      logits: function of images, differentiable. images: pixels in [0, 1]. labels: (b,), the classes to move away from.
      epsilon: l2 radius, pixel units. relative_step: step length times num_steps / epsilon.
    Returns: images of the same shape in [0, 1], within epsilon of the originals, at which the objective was largest.
    Source: Madry et al. 2018, arXiv:1706.06083, with l2 steps.
    """

    def objective(x):
        out = logits(x)
        own = labels[:, None] == jnp.arange(out.shape[1])
        gaps = jnp.max(jnp.where(own, -jnp.inf, out), axis=1) - jnp.sum(jnp.where(own, out, 0.0), axis=1)
        return jnp.sum(gaps), gaps

    ascend = jax.grad(objective, has_aux=True)
    columns = (slice(None),) + (None,) * (images.ndim - 1)

    def inside(delta):
        # Clipping to the box moves every pixel towards the original one, so it stays in the ball.
        return jnp.clip(images + project_l2(delta, epsilon), 0.0, 1.0)

    def body(_, carry):
        x, best, best_gap = carry
        gradient, gaps = ascend(x)
        better = gaps > best_gap
        best, best_gap = jnp.where(better[columns], x, best), jnp.where(better, gaps, best_gap)
        x = inside(x - images + relative_step * epsilon / num_steps * _unit(gradient))
        return x, best, best_gap

    noise = _unit(jax.random.normal(key, images.shape, images.dtype))
    lengths = jax.random.uniform(jax.random.fold_in(key, 1), images.shape[:1], images.dtype)[columns]
    start = inside(noise * lengths * epsilon)
    x, best, best_gap = jax.lax.fori_loop(
        0, num_steps, body, (start, images, jnp.full(images.shape[0], -jnp.inf, images.dtype))
    )
    gaps = objective(x)[1]
    return jnp.where((gaps > best_gap)[columns], x, best)


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """The nearest misclassified point found for each image: its distance (inf if none), itself (or the image)."""

    distances: np.ndarray
    points: np.ndarray


def attack_l2(
    network, images: np.ndarray, labels: np.ndarray, radii, *, num_steps: int, seed: int = 0, batch_size: int = 256
) -> AttackResult:
    """Runs `pgd_l2` at each radius and keeps, for each image, the nearest point that does not get the image's label.

    Args:
      network: a pytree that is called on pixels, such as a Network in float32.
      images: (n, ...) in [0, 1]. labels: (n,).
      radii: l2, pixel units. num_steps: at each radius; 0 only looks at the images themselves.
    """
    distances = np.full(len(images), np.inf)
    points = np.array(images)
    columns = (slice(None),) + (None,) * (images.ndim - 1)
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        count = len(images[rows])
        padding = [(0, batch_size - count if start else 0)]
        x = jnp.asarray(np.pad(images[rows], padding + [(0, 0)] * (images.ndim - 1)))
        y = jnp.asarray(np.pad(labels[rows], padding))
        for i, radius in enumerate([0.0, *sorted(radii)]):
            if radius and not num_steps:
                break
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), start), i)
            found = _attack_batch(network, x, y, radius, key, num_steps=num_steps if radius else 0)
            moved, wrong = (np.asarray(a)[:count] for a in found)
            length = np.sqrt(((moved.astype(np.float64) - images[rows]) ** 2).reshape(count, -1).sum(1))
            nearer = wrong & (length < distances[rows])
            points[rows] = np.where(nearer[columns], moved, points[rows])
            distances[rows] = np.where(nearer, length, distances[rows])
    return AttackResult(distances, points)


@functools.partial(jax.jit, static_argnames="num_steps")
def _attack_batch(network, x, y, radius, key, *, num_steps):
    if num_steps:
        x = pgd_l2(network, x, y, radius, key, num_steps=num_steps)
    return x, jnp.argmax(network(x), axis=1) != y
