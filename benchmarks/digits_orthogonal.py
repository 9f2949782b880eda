"""Every head, activation, pooling and layer of LipConvnet on the digits, beside a linear classifier: what is proved.

Run: python benchmarks/digits_orthogonal.py --workdir=DIR [--epochs=40]
All train as configs/digits_lipconvnet.py says (seed 0), MLP heads by the curvature loss. The linear
classifier is trained on the same images by the margin loss at the same radius and certified with its exact constants.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from lipjax import losses
from lipjax.certify import FrozenNetwork
from lipjax.network import make_network
from lipjax.operators import Flatten, LinearHead
from lipjax.run import run
from lipjax.training import config_file
from lipjax.training.choices import update
from lipjax.training.data import load_dataset

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Gets a directory per network.", required=True)
flags.DEFINE_integer("epochs", 40, "Epochs of every network.")
flags.DEFINE_multi_string("only", [], "Name of a network, perhaps several times; all by default.")

MLP = {
    "model.head": "mlp",
    "model.variant": "pooled",
    "model.input_std": (0.4,),  # cross-entropy asks for no margin: at the config's temperature it is soon content
    "loss.name": "curvature",
    "loss.curvature_weight": 1.0,
}
NETWORKS = {
    "SOC, MaxMin, LLN": {},
    "SOC, zero padding": {"model.padding": "ZERO", "model.train_terms": 5, "model.eval_terms": 12},
    "Cayley": {"model.layer": "cayley"},
    "Householder": {"model.activation": "householder"},
    "Householder, order 2": {"model.activation": "householder2"},
    "orthonormal head": {"model.head": "orthonormal"},
    "free linear head": {"model.head": "linear"},
    "projection pooling": {"model.variant": "pooled", "model.pooling": "projection"},
    "MLP head": MLP,
}


def config_of(changes: dict, epochs: int):
    config, _ = config_file.read_config("digits_lipconvnet", [])
    update(config, {"num_epochs": epochs, **changes})
    return config


def linear_baseline(config) -> dict:
    """Clean and proved accuracies of W x + b, by key as in a report."""
    dataset: Any = load_dataset(config.data, 0)
    train, test = dataset.split("train"), dataset.split("test")
    pixels = jnp.asarray(train.images / dataset.pixel_max, jnp.float32)
    labels = jnp.asarray(train.labels, jnp.int32)
    size = int(np.prod(dataset.image_shape))
    head = LinearHead(jnp.zeros((dataset.num_classes, size)), jnp.zeros(dataset.num_classes))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 3000))

    @jax.jit
    def step(head: Any, state):
        def loss(head):
            flat = pixels.reshape(len(pixels), -1) - 0.5
            return losses.margin(head(flat), labels, head.pairwise_lipschitz(), config.loss.epsilon).mean()

        updates, state = optimizer.update(jax.grad(loss)(head), state)
        moved: Any = optax.apply_updates(head, updates)
        return moved, state

    parameters: Any = head
    state = optimizer.init(parameters)
    for _ in range(3000):
        head, state = step(head, state)
    network = make_network([("flatten", Flatten(dataset.image_shape))], head, 0.5, 1.0)
    frozen = FrozenNetwork(jax.tree.map(lambda a: np.asarray(a, np.float64), network))
    certificate = frozen.certify(test.images / np.float64(dataset.pixel_max))
    correct = certificate.predictions == test.labels
    return {
        "clean_accuracy": float(correct.mean()),
        "certified_accuracy": {str(r): float((correct & (certificate.radii > r)).mean()) for r in config.certify.radii},
    }


def main(argv):
    del argv
    rows = {"linear classifier": (linear_baseline(config_of({}, 1)), 0.0)}
    for name in FLAGS.only or NETWORKS:
        start = time.perf_counter()
        directory = pathlib.Path(FLAGS.workdir) / name.replace(", ", "_").replace(" ", "_")
        rows[name] = run(config_of(NETWORKS[name], FLAGS.epochs), directory), time.perf_counter() - start
    radii = list(rows["linear classifier"][0]["certified_accuracy"])
    print(f"| network | clean | {' | '.join(f'proved at {r}' for r in radii)} | seconds |")
    print("|---" * (len(radii) + 3) + "|")
    for name, (report, seconds) in rows.items():
        proved = [report["certified_accuracy"][r] for r in radii]
        cells = [f"{100 * value:.2f}" for value in (report["clean_accuracy"], *proved)]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    app.run(main)
