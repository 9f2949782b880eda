"""Published 1-Lipschitz networks of others: what they claim, what is proved, what float32 keeps, what an attack finds.

Run: python benchmarks/recertify.py --weights=DIR --cifar10=test_batch.bin --mnist=MNIST_DIR
     DIR: arrays of state dicts as NAME.npz, names of NETWORKS below; MNIST_DIR: the test set's two idx files, gzipped
Run: python benchmarks/recertify.py ... --networks=mlp_mnist_gnp_T05 --attacked=200

Prints Markdown: docs/recertified.md, which says where the weights are from.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import gzip
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from lanczos import lanczos_norm

import lipjax
from lipjax import attacks, interop, operators
from lipjax.certify import certified_accuracy
from lipjax.certify.deployment import deployment_report
from lipjax.certify.document import draw
from lipjax.evaluation import falsify

FLAGS = flags.FLAGS
flags.DEFINE_string("weights", None, "Directory with the arrays of the networks.", required=True)
flags.DEFINE_string("cifar10", None, "The official test_batch.bin.")
flags.DEFINE_string("mnist", None, "Directory with t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz.")
flags.DEFINE_integer("images", 10_000, "Test images to certify, the first ones.", lower_bound=1)
flags.DEFINE_integer("attacked", 1000, "How many of them to attack.", lower_bound=1)
flags.DEFINE_integer("steps", 50, "Steps of Auto-PGD, each on the cross-entropy and towards three rivals.")
flags.DEFINE_list("networks", None, "Names of networks; default: all.")

SORT = ("maxmin", {}, {"pairs": "neighbours", "first": "min"})
STRIDED = {"stride": 2, "padding": 1}
CONVOLUTIONAL = ("conv2d", SORT, "conv2d", SORT, "flatten", "linear", SORT, "linear")
DENSE = ("flatten", "linear", SORT, "linear", SORT, "linear")


@dataclasses.dataclass(frozen=True)
class Published:
    """A network of others: its layers in the places of the original's sequence, and its input.

    std: the number that all channels are divided by, so that a radius in its input is `std` times as long in pixels.
    """

    layers: tuple
    shape: tuple[int, int, int]
    radii: tuple[float, ...]
    mean: tuple[float, ...] = (0.0,)
    std: float = 1.0


_MNIST_RADII, _CIFAR_RADII = (0.3, 0.5, 1.0, 1.58), (36 / 255, 72 / 255, 108 / 255)
_CIFAR = Published(CONVOLUTIONAL, (3, 32, 32), _CIFAR_RADII, (0.4914, 0.4822, 0.4465), 0.225)
NETWORKS = {
    "cnna_cifar10_bjork_T1": _CIFAR,
    "cnna_cifar10_gnp_T05": _CIFAR,
    "convsmall_mnist_bjork_T100": Published(CONVOLUTIONAL, (1, 28, 28), _MNIST_RADII),
    "convsmall_mnist_gnp_T04": Published(CONVOLUTIONAL, (1, 28, 28), _MNIST_RADII),
    "mlp_mnist_gnp_T05": Published(DENSE, (1, 28, 28), _MNIST_RADII),
}


def frozen_network(published: Published, path: pathlib.Path) -> lipjax.FrozenNetwork:
    """The network of the arrays "PLACE.weight" and "PLACE.bias" of a file."""
    with np.load(path, allow_pickle=False) as file:
        state = dict(file)
    layers = []
    for place, kind in enumerate(published.layers):
        if isinstance(kind, tuple):
            layers.append(kind)
            continue
        arrays = {key: state.pop(f"{place}.{key}") for key in ("weight", "bias") if kind in ("conv2d", "linear")}
        layers.append((kind, arrays, STRIDED if kind == "conv2d" else {}))
    if state:
        raise app.UsageError(f"{path}: arrays that no layer takes: {sorted(state)}")
    options = {"input_mean": published.mean, "input_std": published.std}
    return lipjax.freeze(interop.from_sequential(layers, published.shape, **options))


def test_images(published: Published) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, h, w, c) and labels."""
    channels, height, width = published.shape
    if channels == 3:
        rows = np.fromfile(FLAGS.cifar10, np.uint8).reshape(-1, 1 + channels * height * width)
        pixels, labels = np.moveaxis(rows[:, 1:].reshape(-1, channels, height, width), 1, -1), rows[:, 0]
    else:
        folder = pathlib.Path(FLAGS.mnist)
        raw = [
            gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")
        ]
        pixels = np.frombuffer(raw[0], np.uint8, offset=16).reshape(-1, height, width, channels)
        labels = np.frombuffer(raw[1], np.uint8, offset=8)
    return np.ascontiguousarray(pixels[: FLAGS.images]), labels[: FLAGS.images].astype(np.int64)


def claimed_radii(logits: np.ndarray, std: float) -> np.ndarray:
    """The claim of the source: margin / sqrt(2) in the network's input, times its unit in pixels; in float32."""
    top = np.sort(logits, axis=1)
    return (top[:, -1] - top[:, -2]) / np.float32(2**0.5) * np.float32(std)


def layer_rows(frozen: lipjax.FrozenNetwork) -> list[tuple[str, float, float]]:
    """(name, proved norm, norm by Lanczos) of every linear layer, the head included."""
    pairs = zip(frozen.network.names, frozen.network.ops, strict=True)
    linear = [(name, op) for name, op in pairs if isinstance(op, operators.Conv | operators.Dense)]
    linear.append(("head", operators.Dense(frozen.network.head.matrix)))
    return [(name, op.bound().proved, lanczos_norm(op)) for name, op in linear]


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def report(name: str, published: Published) -> None:
    """Prints what is known of one network."""
    started = time.process_time()
    frozen = frozen_network(published, pathlib.Path(FLAGS.weights) / f"{name}.npz")
    pixels, labels = test_images(published)
    images = pixels / np.float64(255)
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), frozen.network)
    logits32 = np.concatenate([np.asarray(single(jnp.asarray(x, jnp.float32))) for x in np.array_split(images, 20)])
    claimed, found32 = claimed_radii(logits32, published.std), np.argmax(logits32, axis=1)
    certificate = frozen.certify(images)
    deployed = deployment_report(frozen, pixels, certificate, published.radii, labels=labels, pixel_max=255)
    print(f"\n## {name}\n\n| layer | proved norm - 1 | norm by Lanczos - 1 |\n|---|---|---|")
    rows = layer_rows(frozen)
    for layer, proved, attained in rows:
        print(f"| {layer} | {proved - 1:+.3e} | {attained - 1:+.3e} |")
    product = float(np.prod([proved for _, proved, _ in rows]))
    print(f"| all | {product - 1:+.3e} | |")
    print(f"\n{len(labels)} test images, clean accuracy {percent(np.mean(certificate.predictions == labels))} %.")
    constants = frozen.margin_lipschitz()[np.triu_indices(len(frozen.network.head.bias), 1)] * published.std / 2**0.5
    print(f"Proved constants of logit differences / claimed: {constants.min():.7f} to {constants.max():.7f}.")
    ratio = claimed[certificate.radii > 0] / certificate.radii[certificate.radii > 0]
    larger = np.sum(claimed > certificate.radii)
    print(f"Claimed radius above the proved one: {larger} images; claimed / proved: {ratio.min():.7f} to ", end="")
    print(f"{np.quantile(ratio, 0.99):.7f} (99 %) and {ratio.max():.7f}.")
    ball, gap = deployed["ball"], deployed["gap"]
    print(f"float32: logits off by {gap['largest']:.1e} at most, proved {deployed['bound']['largest']:.1e};", end=" ")
    print(f"the same class at {gap['same_class']} images.")
    chosen = draw(np.arange(len(labels)), FLAGS.attacked)
    some, truth = images[chosen].astype(np.float32), labels[chosen]
    attack = None
    for objective in ("cross_entropy", "targeted_dlr"):
        options: dict = {"num_steps": FLAGS.steps, "method": "apgd", "objective": objective, "num_targets": 3}
        more = attacks.attack_l2(single, some, truth, published.radii, **options)
        attack = more if attack is None else attack.nearer(more)
    margins = attacks.attack_within(single, some, found32[chosen], claimed[chosen], num_steps=FLAGS.steps)[1]
    search = attacks.lipschitz_lower_bound(
        single, some[:200], num_steps=FLAGS.steps, evaluate=lambda z: falsify.logits_and_errors(frozen, z, len(z))
    )
    print(f"Largest |f(x) - f(y)| / |x - y| found, in units of the input: 1 {search.whole * published.std - 1:+.3e}.")
    print(f"Attacked: {len(truth)} images; other classes inside of the claimed radius: {int(np.sum(margins > 0))}.")
    print("\n| radius | claimed | proved | float32 | attacked |\n|---|---|---|---|---|")
    for row, radius in zip(ball["radii"], published.radii, strict=True):
        shares = (
            certified_accuracy(found32, labels, claimed, radius),
            certified_accuracy(certificate.predictions, labels, certificate.radii, radius),
            row["accuracy"],
            float(np.mean(attack.distances > radius)),
        )
        print(f"| {radius:.4g} |", " | ".join(map(percent, shares)), "|")
    print(f"\n{time.process_time() - started:.0f} s of the processor.", flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"expected flags alone, got {argv[1:]}")
    unknown = sorted(set(FLAGS.networks or ()) - set(NETWORKS))
    if unknown:
        raise app.UsageError(f"--networks: expected names of {sorted(NETWORKS)}, got {unknown}")
    for name in FLAGS.networks or NETWORKS:
        data = "cifar10" if NETWORKS[name].shape[0] == 3 else "mnist"
        if getattr(FLAGS, data) is None:
            raise app.UsageError(f"{name} needs --{data}")
        report(name, NETWORKS[name])


if __name__ == "__main__":
    app.run(main)
