"""Adam among orthogonal matrices: how far rounding and short series lead away, and what a step costs.

Run: python benchmarks/manifold.py
Drift: four 64 x 64 matrices in float32, 100 updates towards others by noisy gradients, never retracted. Cost: processor
time in units of one product of eight 256 x 256 matrices, the least of several calls.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipjax import linalg, manifold


def orthogonal(*shape: int) -> jax.Array:
    return jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=shape))[0], jnp.float32)


def departure(x: jax.Array) -> float:
    """The largest |X^T X - I| in spectral norm, in double precision."""
    matrices = np.asarray(x, np.float64)
    return np.linalg.norm(np.swapaxes(matrices, -1, -2) @ matrices - np.eye(x.shape[-1]), 2, axis=(-2, -1)).max()


def drift(rate: float, exponential: str) -> float:
    """The departure after 100 updates, from a start that has 3e-7."""
    transform = manifold.skew_adam(rate, exponential=exponential, retract_every=10**9)
    start = orthogonal(4, 64, 64)

    def step(carry, key):
        x, state = carry
        gradient = jax.random.normal(key, x.shape) - start[::-1]
        updates, state = transform.update(gradient, state, x)
        return (x + updates, state), None

    keys = jax.random.split(jax.random.key(0), 100)
    return departure(jax.jit(lambda x: jax.lax.scan(step, (x, transform.init(x)), keys)[0][0])(start))


def costs(calls: int = 7) -> dict[str, float]:
    """Processor time of steps, retractions and updates, in products."""
    x = orthogonal(8, 256, 256)
    g = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    wanted = {"product": (product, (x, g)), "tangent": (linalg.tangent, (x, g)), "retraction": (linalg.polar, (x,))}
    direction = linalg.tangent(x, g)
    for norm in (0.04, 0.2, 0.9, 1.5):
        z = direction * (norm / jnp.linalg.norm(direction, axis=(-2, -1)).max())
        for order in ("taylor", "exact"):
            wanted[f"step of norm {norm}, {order}"] = (functools.partial(linalg.geodesic_step, order=order), (x, z))
    for name, transform in {"skew_adam": manifold.skew_adam(1e-3), "optax.adam": optax.adam(1e-3)}.items():
        wanted[f"update of {name}"] = (jax.jit(transform.update), (g, transform.init(x), x))
    least = dict.fromkeys(wanted, np.inf)
    for _ in range(calls):
        for name, (function, arguments) in wanted.items():
            begin = time.process_time()
            jax.block_until_ready(function(*arguments))
            least[name] = min(least[name], time.process_time() - begin)
    return {name: seconds / least["product"] for name, seconds in least.items()}


def main() -> None:
    for rate in (1e-3, 4e-3, 1e-2, 3e-2):
        print(
            f"rate {rate:g}: drift {drift(rate, 'taylor'):.1e} by series, {drift(rate, 'exact'):.1e} exact", flush=True
        )
    for name, units in costs().items():
        print(f"{name}: {units:.1f} products")


if __name__ == "__main__":
    main()
