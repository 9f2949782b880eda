"""The share of a plain matrix product's speed that a training step reaches, and the cost of its Lipschitz estimate.

Run: XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/flop_share.py \
         --config=configs/liresnet.py:cifar10
The step's floating-point operations are counted by XLA in the compiled program, per device; matrix products and steps
take turns in one process, and medians are compared. The step is timed again with one power iteration: the difference,
per iteration, is what an iteration costs.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from made_up import batch_step, made_up_run, random_batch
from ml_collections import config_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "configs/liresnet.py:cifar10", "The experiment whose step is measured.")
flags.DEFINE_integer("rounds", 3, "Rounds; in each, everything runs once. Medians are shown.")
flags.DEFINE_integer("side", 4096, "Side of the matrices.")


def compiled_step(config):
    """(compiled step, its state, images, labels, schedule), on all devices."""
    run = made_up_run(config)
    jitted, schedule = batch_step(run)
    args = run.fresh_state(), *random_batch(run), schedule
    return jitted.lower(*args).compile(), *args


def products(side: int):
    """(jitted products of float32 matrices on one device and, by blocks of rows, on all; their operands)."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    a = jnp.asarray(np.random.default_rng(0).standard_normal((side, side)), jnp.float32)
    rows = jax.device_put(a, jax.NamedSharding(mesh, jax.P("data")))
    everywhere = jax.device_put(a, jax.NamedSharding(mesh, jax.P()))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=FLAGS.config.matmul_precision))
    return {"one device": (product, (a, a)), "all devices": (product, (rows, everywhere))}


def seconds(function, *args) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def main(argv):
    del argv
    config = FLAGS.config
    iterations = config.power_iterations
    with jax.default_matmul_precision(config.matmul_precision):
        whole, *args = compiled_step(config)
        with config.unlocked():
            config.power_iterations = 1
        short = compiled_step(config)[0]
    state, *rest = args
    references = products(FLAGS.side)
    times = {name: [] for name in ("step", "step with one iteration", *references)}
    for round_number in range(FLAGS.rounds + 1):
        found = {name: seconds(function, *operands)[0] for name, (function, operands) in references.items()}
        found["step"], (state, _) = seconds(whole, state, *rest)  # the state is donated and comes back
        found["step with one iteration"], (state, _) = seconds(short, state, *rest)
        if round_number:  # the first one warms up
            for name, value in found.items():
                times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    count = jax.device_count()
    counted: Any = whole.cost_analysis()
    flops = counted["flops"] * count
    reached = flops / median["step"]
    product = 2 * FLAGS.side**3 / min(median[name] for name in references)
    device = jax.devices()[0].device_kind
    print(f"{count} x {device}, {os.cpu_count()} cores, jax {jax.__version__}, batch {config.batch_size}")
    print(f"step {median['step']:.3f} s, {flops / 1e9:.0f} GFLOP: {reached / 1e9:.0f} GFLOP/s")
    print(f"matrix product of side {FLAGS.side}: {product / 1e9:.0f} GFLOP/s; the step reaches {reached / product:.1%}")
    if iterations > 1:
        each = (median["step"] - median["step with one iteration"]) / (iterations - 1)
        share = each * iterations / median["step"]
        print(f"{iterations} power iterations: {share:.1%} of the step")


if __name__ == "__main__":
    app.run(main)
