"""One training step split into parametrise, apply and bound, as shares of the whole, in one process.

Run: python benchmarks/train_step.py --config=configs/digits.py [--config.batch_size=...]
Every part is jitted alone, with its gradient; the parts do not add up to the whole exactly, since XLA fuses across them
there.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from made_up import made_up_run, random_batch
from ml_collections import config_flags

from lipjax import bounds
from lipjax.nn import COLLECTION
from lipjax.training import objective, step

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "configs/digits.py", "The experiment whose step is measured.")
flags.DEFINE_integer("rounds", 7, "Rounds; in each, every part runs once. Medians are shown.")


def parts(config):
    """Jitted functions without arguments, by name: the whole step and its parts, all on the same made-up batch."""
    run = made_up_run(config)
    model, state = run.model, run.fresh_state()
    images, labels = random_batch(run)
    pixels = images / jnp.float32(run.pixel_max)
    loss = objective.LOSSES[config.loss.name]
    train_step = step.make_train_step(model, run.optimizer, config, run.mesh, run.pixel_max)
    whole = jax.jit(train_step)  # unlike a run's, keeps the state that it is given

    def build(params):
        return model.apply({"params": params, COLLECTION: state.lip}, method="build")

    network = jax.jit(build)(state.params)
    schedule = objective.loss_schedule(config.loss, config.num_epochs - 1, config.num_epochs)
    liplt = config.lipschitz == "liplt"
    estimate = bounds.margin_liplt_estimate if liplt else bounds.margin_lipschitz_estimate
    lipschitz, _ = jax.jit(estimate, static_argnums=2)(network, state.lip["vectors"], config.power_iterations)

    def parametrise(params):
        return sum(jnp.sum(a) for a in jax.tree.leaves(build(params)))

    def apply(net):
        return loss.apply(config.loss, objective.Seen(net(pixels), labels, lipschitz), schedule).mean()

    def bound(net):
        return estimate(net, state.lip["vectors"], config.power_iterations)[0].sum()

    gradients = {
        name: jax.jit(jax.grad(f)) for name, f in (("parametrise", parametrise), ("apply", apply), ("bound", bound))
    }
    return {
        "whole step": lambda: whole(state, images, labels, schedule),
        "parametrise": lambda: gradients["parametrise"](state.params),
        "apply": lambda: gradients["apply"](network),
        "bound": lambda: gradients["bound"](network),
    }


def main(argv):
    del argv
    functions = parts(FLAGS.config)
    times = {name: [] for name in functions}
    for round_number in range(FLAGS.rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if round_number:  # the first compiles
                times[name].append(time.perf_counter() - start)
    whole = statistics.median(times["whole step"])
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, "
        f"batch {FLAGS.config.batch_size}"
    )
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:12s} {1e3 * median:9.1f} ms  {median / whole:6.1%} of the step  (min {1e3 * min(values):.1f} ms)")


if __name__ == "__main__":
    app.run(main)
