"""Auto-PGD by automatic differentiation and, as lipjax does it, through the adjoints of operators, in one process.

Run: python benchmarks/attack_step.py --config=configs/cifar10_recipe_small.py [--batch=250] [--steps=5] [--rounds=3]
The network is the config's at the start of training, images are random. Seconds of processor time, the least of the
rounds, which alternate; in the place of a step, a gradient outside of any loop is what a step would cost at best.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from made_up import made_up_run
from ml_collections import config_flags

from lipjax import attacks
from lipjax.nn import COLLECTION

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", "configs/cifar10_recipe_small.py", "The experiment whose network is attacked."
)
flags.DEFINE_integer("batch", 250, "Images.")
flags.DEFINE_integer("steps", 5, "Of the attack.")
flags.DEFINE_integer("rounds", 3, "In each, every program runs once.")


def programs(run):
    """Compiled functions of (images, network), by name, and these."""
    state = run.fresh_state()
    variables = {"params": state.params, COLLECTION: state.lip}
    network: Any = jax.jit(lambda v: run.model.apply(v, method="build"))(variables)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(FLAGS.batch, *network.in_shape)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, network.num_classes, FLAGS.batch))

    def attack(logits, x):
        return attacks.apgd_l2(logits, x, labels, 0.5, jax.random.key(0), num_steps=FLAGS.steps)

    def loss(x, network):
        return jnp.sum(jax.nn.logsumexp(network(x), axis=1))

    functions = {
        "one gradient": jax.grad(loss),
        "automatic": lambda x, network: attack(lambda z: network(z), x),  # any function is differentiated so
        "adjoints": lambda x, network: attack(network, x),
    }
    return {name: jax.jit(f).lower(images, network).compile() for name, f in functions.items()}, (images, network)


def main(_):
    compiled, arguments = programs(made_up_run(FLAGS.config))
    seconds = {name: [] for name in compiled}
    for turn in range(FLAGS.rounds + 1):
        for name, function in compiled.items():
            start = time.process_time()
            jax.block_until_ready(function(*arguments))
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {FLAGS.batch}, {FLAGS.steps} steps")
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        orders = sorted(set(re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", compiled[name].as_text() or "")))
        print(f"{name:<12} {value:7.2f} s, convolutions {', '.join(orders)}")
    ideal = (FLAGS.steps + 1) * best["one gradient"]
    print(f"adjoints: {best['automatic'] / best['adjoints']:.2f} times as fast as automatic differentiation")
    print(f"adjoints: {best['adjoints'] / ideal:.2f} of {FLAGS.steps + 1} gradients outside of a loop")


if __name__ == "__main__":
    app.run(main)
