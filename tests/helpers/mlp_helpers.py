"""Shared by the tests of MLP heads: the golden heads, random ones, and an attack on a head alone."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import operators

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def golden(classes):
    z = np.load(GOLDEN / f"crc_head_{classes}.npz")
    weights = [jnp.asarray(z[f"param/linear{layer}.{name}"]) for layer in (1, 2) for name in ("weight", "bias")]
    return z, jnp.asarray(z["input/features"]), weights


def random_arrays(classes=5, hidden=24, features=6, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = (hidden, features), (hidden,), (classes, hidden), (classes,)
    return [rng.normal(size=shape) * scale for shape in shapes]


def random_head(**kwargs):
    return [jnp.asarray(a) for a in random_arrays(**kwargs)]


@functools.partial(jax.jit, static_argnames=("num_steps", "starts"))
def _least_gaps(head, features, predicted, radius, num_steps, starts):
    def gap(delta, a, p, i):
        logits = head((a + delta)[None])[0]
        return logits[p] - logits[i]

    def one(a, p, r, i, key):
        def step(_, delta):
            g = jax.grad(gap)(delta, a, p, i)
            delta = delta - 0.1 * r * g / (jnp.linalg.norm(g) + 1e-30)
            return delta * jnp.minimum(1, r / jnp.linalg.norm(delta))

        start = jax.random.normal(key, a.shape)
        return gap(jax.lax.fori_loop(0, num_steps, step, start * r / jnp.linalg.norm(start)), a, p, i)

    from_starts = jax.vmap(one, (None, None, None, None, 0))
    against_rivals = jax.vmap(from_starts, (None, None, None, 0, None))
    of_images = jax.vmap(against_rivals, (0, 0, 0, None, None))
    keys = jax.random.split(jax.random.key(0), starts)
    return of_images(features, predicted, radius, jnp.arange(head.out_shape[0]), keys).min(2)


def head_attack(weights, features, radius, num_steps=60, starts=6):
    """The least logit difference to every rival that projected gradient steps find within the radii (b,): (b, k).

    Infinite for the predicted class.
    """
    head = operators.MLPHead(*weights)
    predicted = jnp.argmax(head(features), axis=1)
    gaps = np.array(_least_gaps(head, features, predicted, radius, num_steps, starts))
    gaps[np.arange(len(gaps)), np.asarray(predicted)] = np.inf
    return gaps
