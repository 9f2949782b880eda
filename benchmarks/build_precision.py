"""The accuracy that config.build_precision costs: products of parts of float32 numbers, as on GPUs, on a CPU.

Run: python benchmarks/build_precision.py --part=matrices
     python benchmarks/build_precision.py --part=digits [--epochs=40] [--only=cayley]
XLA for CPUs has no TF32, so these products are simulated, by `simulated`. "matrices": how far from orthogonal the
results of matrix functions are, and from those in float64. "digits": networks trained with them, and certified as any
other: in float64, by bounds of the norms that came out. Both with plain TF32 beside them, which nothing in lipjax uses.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import contextlib
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lipjax import _precision, freeze, linalg
from lipjax.nn import COLLECTION
from lipjax.training import config_file, objective, step
from lipjax.training.choices import update
from lipjax.training.loop import Run

# (bits of a part's mantissa after the leading one, parts of a number, products (i, j) of part i with part j).
SPLIT = {
    "tf32": (10, 1, [(0, 0)]),
    "tf32x3": (10, 2, [(1, 0), (0, 1), (0, 0)]),
    "bfloat16x6": (7, 3, [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]),
}


def _parts(x: jax.Array, bits: int, count: int) -> list[jax.Array]:
    """x as a sum of numbers with so many bits, each the rest rounded to nearest, but for what the last one leaves."""
    found = []
    for _ in range(count):
        found.append(jax.lax.reduce_precision(x, 8, bits))
        x = x - found[-1]
    return found


def _product(x: jax.Array, y: jax.Array, kind: str) -> jax.Array:
    bits, count, pairs = SPLIT[kind]
    left, right = _parts(x, bits, count), _parts(y, bits, count)
    # Products of parts have at most 22 bits, so that float32 holds them exactly: only sums are rounded.
    products = (jnp.matmul(left[i], right[j], precision=jax.lax.Precision.HIGHEST) for i, j in pairs)
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def simulated(x: jax.Array, y: jax.Array, kind: str) -> jax.Array:
    """x @ y as tensor cores make it; its derivatives are made of such products, too.

    Every number is split into parts that the cores take, each the rest rounded to nearest; the products of parts that
    matter are added up in float32, the smallest first. The order in which one product's terms are added up is that of
    the CPU.

    Args: x, y: (..., m, k) and (..., k, n), float32. kind: of SPLIT.
    """
    return _product(x, y, kind)


def _backward(kind, kept, g):
    x, y = kept

    def of_shape(found, like):
        extra = found.ndim - like.ndim
        axes = (*range(extra), *(extra + i for i, n in enumerate(like.shape[:-2]) if n == 1 != found.shape[extra + i]))
        return jnp.sum(found, axes).reshape(like.shape)

    left, right = _product(g, jnp.swapaxes(y, -1, -2), kind), _product(jnp.swapaxes(x, -1, -2), g, kind)
    return of_shape(left, x), of_shape(right, y)


simulated.defvjp(lambda x, y, kind: (_product(x, y, kind), (x, y)), _backward)


@contextlib.contextmanager
def simulation(kind: str):
    """Inside, what would be products of that kind on a GPU is simulated, in training steps on the CPU, too."""
    if kind == "float32":
        yield
        return
    original, platforms = _precision.product, step.GPU

    def product(x, y):
        algorithm = not isinstance(_precision.precise(x.dtype), jax.lax.Precision)
        return simulated(x, y, kind) if algorithm else original(x, y)

    _precision.product, step.GPU = product, (*platforms, "cpu")
    jax.clear_caches()  # of traced functions
    try:
        yield
    finally:
        _precision.product, step.GPU = original, platforms
        jax.clear_caches()


KINDS = ("float32", *reversed(SPLIT))
FUNCTIONS = {
    "cayley": linalg.cayley,
    "expm_skew": lambda w: linalg.expm_skew((w - jnp.swapaxes(w, -1, -2)) / 2),
    "cholesky_orthogonalize": linalg.cholesky_orthogonalize,
}


def departures(name: str, kind: str, w: np.ndarray) -> tuple[float, float]:
    """(departure from what it is in float64, departure from orthogonality of both), spectral norms, largest of a batch.

    Args: name: of FUNCTIONS. kind: of KINDS. w: (..., n, n) float32.
    """
    with jax.enable_x64(True):
        exact = np.asarray(FUNCTIONS[name](jnp.asarray(w, jnp.float64)))
    # The context is a name of JAX's; `simulation` makes it the products that are asked for.
    with simulation(kind), _precision.products("float32" if kind == "float32" else "tf32x3"):
        found = np.asarray(FUNCTIONS[name](jnp.asarray(w)), np.float64)

    def gram(q):
        return np.swapaxes(q, -1, -2) @ q

    def largest(difference):
        return float(np.linalg.norm(difference, 2, (-2, -1)).max())

    return largest(found - exact), largest(gram(found) - gram(exact))


def matrices() -> None:
    print("| function, side | " + " | ".join(KINDS) + " |")
    print("|---" * (len(KINDS) + 1) + "|")
    for name in FUNCTIONS:
        for side in (64, 256, 512):
            w = np.random.default_rng(0).standard_normal((2, side, side)).astype(np.float32) / np.float32(side**0.5)
            found = [departures(name, kind, w) for kind in KINDS]
            print(f"| {name}, {side} | " + " | ".join(f"{d:.1e}, {o:.1e}" for d, o in found) + " |", flush=True)


NETWORKS = {
    "cholesky": ("digits", {"model.neck": "cholesky", "model.dense_depth": 2}),
    "cayley": ("digits_lipconvnet", {"model.layer": "cayley"}),
    "soc": ("digits_lipconvnet", {}),
}


def train(run: Run):
    """The last state of a run, without files."""
    state, train_batch = run.fresh_state(), run.batch_runner(0)
    for i in range(run.total_steps):
        schedule = objective.loss_schedule(run.config.loss, i // run.steps_per_epoch, run.config.num_epochs)
        state, metrics = train_batch(state, i, schedule)
    assert metrics["finite"]
    return state


def digits(epochs: int, only: str, kinds: list[str]) -> None:
    radii = (0.1, 0.25, 0.5)
    print("| network | products | seconds | accuracy | " + " | ".join(f"proved at {r}" for r in radii) + " | L |")
    print("|---" * (5 + len(radii)) + "|")
    for name, (family, changes) in NETWORKS.items():
        if only not in ("", name):
            continue
        for kind in kinds:
            config, _ = config_file.read_config(family, [])
            precision = "float32" if kind == "float32" else "tf32x3"
            update(config, {**changes, "num_epochs": epochs, "build_precision": precision})
            start = time.perf_counter()
            with simulation(kind):
                run = Run(config, 0)
                state = train(run)
            params, lip = jax.device_get((state.params, state.lip))
            frozen = freeze(run.model, {"params": params, COLLECTION: lip})
            dataset: Any = run.dataset
            part = dataset.split("test")
            certificate = frozen.certify(part.images / np.float64(run.pixel_max))
            right = certificate.predictions == part.labels
            shares = [right.mean(), *((right & (certificate.radii >= r)).mean() for r in radii)]
            largest = float(np.max(frozen.margin_lipschitz()))
            took = time.perf_counter() - start
            print(
                f"| {name} | {kind} | {took:.0f} | {' | '.join(f'{s:.2%}' for s in shares)} | {largest:.7f} |",
                flush=True,
            )


def main(argv):
    del argv
    if FLAGS.part == "matrices":
        matrices()
    else:
        digits(FLAGS.epochs, FLAGS.only, FLAGS.kinds)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_enum("part", "matrices", ["matrices", "digits"], "What is compared.")
    flags.DEFINE_integer("epochs", 40, "Of every network.")
    flags.DEFINE_enum("only", "", ["", *NETWORKS], "One network; all by default.")
    flags.DEFINE_list("kinds", list(KINDS), "Of products.")
    app.run(main)
