"""Claims of certificates by power iteration, beside what is proved, and one of them broken by an explicit input.

Run: python benchmarks/power_iteration.py --workdir=runs/demo
     the stored network of a run, certified by estimates of a few iterations, as is usual, and by proof
Run: python benchmarks/power_iteration.py
     a network whose certificate by power iteration is false, and the input that shows it, in rational arithmetic
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

import lipjax
from lipjax import bounds, certify, operators
from lipjax.certify.frozen import float64_on_cpu
from lipjax.network import Network

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Directory of a certified run.")
flags.DEFINE_string("data_dir", None, "Where its data set lies now.")
flags.DEFINE_list("iterations", ["1", "2", "5", "10", "50", "500"], "Power iterations, each from random vectors.")

CONSOLE = Console(soft_wrap=True, highlight=False)


def estimated_lipschitz(network, key, iterations: int) -> np.ndarray:
    """(k, k), float64: LipLT where it applies, otherwise the product of norms; by power iteration."""
    with float64_on_cpu():
        network = jax.tree.map(jnp.asarray, network)
        liplt = bounds.has_liplt(network)
        vectors = (bounds.init_liplt_vectors if liplt else bounds.init_vectors)(network, key)
        function = bounds.margin_liplt_estimate if liplt else bounds.margin_lipschitz_estimate
        return np.asarray(jax.jit(function, static_argnums=2)(network, vectors, iterations)[0])


def claimed_radii(logits: np.ndarray, lipschitz: np.ndarray) -> np.ndarray:
    with float64_on_cpu():
        return np.asarray(certify.certified_radius(jnp.asarray(logits), jnp.asarray(lipschitz)))


def compare(workdir: str) -> None:
    """Certified accuracy of a run's test images by estimates and by proof."""
    from lipjax.evaluation.evaluate import drawn_indices, test_images
    from lipjax.training.config import load_config
    from lipjax.training.loop import Run

    config, seed = load_config(workdir)
    with config.unlocked():
        config.data.data_dir = FLAGS.data_dir or config.data.data_dir
    run = Run(config, seed)
    indices = drawn_indices(run.dataset, config.certify.num_images)
    images, labels = test_images(run.dataset, indices, config.certify.batch_size)
    pixels = images / np.float64(run.pixel_max)
    frozen = lipjax.FrozenNetwork.load(os.path.join(workdir, "frozen"))
    certificate, logits = frozen.certify(pixels), frozen(pixels)
    predictions, proved = certificate.predictions, frozen.margin_lipschitz()
    off = ~np.eye(len(proved), dtype=bool)
    table = Table("constants", "mean over pairs / proved", *(f"certified at {r:.3g}" for r in config.certify.radii))

    def row(name, constants, radii):
        shares = [certify.certified_accuracy(predictions, labels, radii, r) for r in config.certify.radii]
        table.add_row(name, f"{(constants[off] / proved[off]).mean():.4f}", *(f"{100 * s:.2f} %" for s in shares))

    for iterations in map(int, FLAGS.iterations):
        estimate = estimated_lipschitz(frozen.network, jax.random.key(seed), iterations)
        row(f"{iterations} power iterations", estimate, claimed_radii(logits, estimate))
    row("proved", proved, certificate.radii)
    CONSOLE.print(f"{workdir}: {len(labels)} test images, clean accuracy {100 * np.mean(predictions == labels):.2f} %")
    CONSOLE.print(table)


def clustered_network(side: int = 16, seed: int = 0) -> tuple[lipjax.FrozenNetwork, np.ndarray]:
    """A linear classifier of side x side images, and the top right singular vector v of its only layer.

    The layer's singular values are 1 and then evenly spaced from 0.999 down to 0.7, like those of a layer that training
    with a Lipschitz penalty has flattened. The head reads the top left singular vector: logits +-(v (x - 1/2)).
    """
    rng, size = np.random.default_rng(seed), side * side
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    matrix = (left * np.concatenate([[1.0], np.linspace(0.999, 0.7, size - 1)])) @ right.T
    rows = np.stack([left[:, 0], -left[:, 0]])
    bias = -rows @ (matrix @ np.full(size, 0.5))
    shape = (side, side, 1)
    layers = operators.Flatten(shape), operators.Dense(matrix)
    head = operators.LinearHead(rows, bias)
    network = Network(layers, head, np.zeros(1), np.ones(1), ("flatten", "linear"))
    return lipjax.FrozenNetwork(network), right[:, 0].reshape(shape)


def rational(array) -> np.ndarray:
    return np.array([Fraction(float(v)) for v in np.ravel(array)], dtype=object).reshape(np.shape(array))


def exact_margin(frozen: lipjax.FrozenNetwork, image: np.ndarray) -> Fraction:
    """logit_0 - logit_1 of a `clustered_network`, without rounding."""
    matrix, head = rational(frozen.network.ops[1].matrix), frozen.network.head
    logits = rational(head.matrix) @ (matrix @ rational(image).ravel()) + rational(head.bias)
    return logits[0] - logits[1]


def break_one(iterations: int = 10) -> dict:
    """The claims about one image, and a changed class inside the claimed radius.

    Returns: `estimate`, `proved` (constants), `claimed` and `certified` radii, `distance` of the changed image, and
    `exact`: whether rational arithmetic confirms the change of class and distance < claimed.
    """
    frozen, direction = clustered_network()
    image = np.clip(0.5 + 0.3 * direction, 0, 1)
    estimate = estimated_lipschitz(frozen.network, jax.random.key(0), iterations)
    claimed = float(claimed_radii(frozen(image[None]), estimate)[0])
    certificate = frozen.certify(image[None])
    changed = image - 0.3 * (1 + 1e-9) * direction
    squared = sum((rational(changed) - rational(image)).ravel() ** 2)
    confirmed = exact_margin(frozen, image) > 0 > exact_margin(frozen, changed) and squared < Fraction(claimed) ** 2
    return {
        "iterations": iterations,
        "estimate": float(estimate[0, 1]),
        "proved": float(frozen.margin_lipschitz()[0, 1]),
        "claimed": claimed,
        "certified": float(certificate.radii[0]),
        "distance": float(squared) ** 0.5,
        "exact": bool(confirmed),
    }


def main(argv):
    del argv
    if FLAGS.workdir:
        compare(FLAGS.workdir)
        return
    table = Table("iterations", "constant", "claimed radius", "class changes at", "claim")
    for iterations in map(int, FLAGS.iterations):
        found = break_one(iterations)
        claim = "false" if found["exact"] else "not broken by this input"
        numbers = (f"{found[name]:.6f}" for name in ("estimate", "claimed", "distance"))
        table.add_row(str(iterations), *numbers, claim)
    table.add_row("proved", f"{found['proved']:.6f}", f"{found['certified']:.6f}", f"{found['distance']:.6f}", "true")
    CONSOLE.print(table)
    CONSOLE.print("False: rational arithmetic confirms another class, at a distance below the claimed radius.")


if __name__ == "__main__":
    app.run(main)
