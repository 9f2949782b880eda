"""Time that a certificate takes, and its independent check: side by side in one process.

Run: python benchmarks/certificate_speed.py
     LiResNet L12W512, mostly its bounds; then cifar10_liresnet_small, 10,000 images. Many minutes, on a quiet machine
Run: python benchmarks/certificate_speed.py --small
     both with tiny sizes, to see that everything works
Run: python benchmarks/certificate_speed.py --frozen=DIR/frozen --images=10000
     a trained network instead

Weights start as in training. Then some steps of gradient descent on the logarithms of the norms, from random vectors,
crowd the tops of the spectra, as the Lipschitz constant in a loss does. Images are random. The certifier's time is
that of `FrozenNetwork.lipschitz_report`, `margin_lipschitz` and `certify`; the checker's that of `checker.check`, with
all images evaluated again. Both read the same arrays and use all cores.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from lanczos import lanczos_norm
from made_up import sizes
from rich.console import Console
from rich.table import Table

import lipjax
from lipjax import bounds, checker
from lipjax.certify.document import write_certificate
from lipjax.evaluation.evaluate import certify_images
from lipjax.models import get_model
from lipjax.training import config_file

FLAGS = flags.FLAGS
flags.DEFINE_bool("small", False, "Tiny networks and few images.")
flags.DEFINE_string("frozen", None, "The folder of a frozen network, in place of the two of this script.")
flags.DEFINE_integer("images", None, "Images to certify (default: 4 of the large network, 10,000 of the small one).")
flags.DEFINE_integer("crowding_steps", 20, "Steps of gradient descent on the norms before a network is certified.")
flags.DEFINE_bool("lanczos", True, "Whether converged norms are found to compare the bounds with.")


def crowded(model, variables, num_steps: int):
    """The variables after gradient descent on the sum of the logarithms of all norm estimates."""
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state, vectors):
        def objective(params):
            network = model.apply({**variables, "params": params}, method="build")
            sigmas, advanced = bounds.norm_estimates(network, vectors, 2)
            return sum(jnp.log(sigma) for sigma in sigmas.values()), advanced

        gradient, vectors = jax.grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, vectors

    params, vectors = variables["params"], variables["lip"]["vectors"]
    state = optimizer.init(params)
    for _ in range(num_steps):
        params, state, vectors = step(params, state, vectors)
    return {**variables, "params": params}


def made_network(name: str, num_steps: int, **changes) -> lipjax.FrozenNetwork:
    config, _ = config_file.read_config(name, [])
    with config.unlocked():
        config.model.update(changes)
    shape, num_classes = sizes(config.data.name)
    model = get_model(config.model, input_shape=shape, num_classes=num_classes)
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))()
    return lipjax.freeze(model, crowded(model, variables, num_steps))


def seconds(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def checked(directory: pathlib.Path, *options) -> float:
    """Seconds of a check, which must succeed."""
    (code, lines), elapsed = seconds(lambda: checker.check(directory, *options))
    if code:
        raise RuntimeError("The checker did not prove an honest certificate:\n" + "\n".join(lines))
    return elapsed


def measure(console: Console, title: str, frozen: lipjax.FrozenNetwork, count: int, lanczos: bool) -> None:
    rows, proving = seconds(frozen.lipschitz_report)
    table = Table("what", "measured", "wanted", title=title)
    table.add_row("proving all bounds", f"{proving:.1f} s", "below 300 s (L12W512)")
    if lanczos:
        linear = [(row, op) for row, op in zip(rows[1:], frozen.network.ops, strict=True) if hasattr(op, "estimate")]
        above = np.prod([row.claimed / lanczos_norm(op) for row, op in linear]) - 1
        table.add_row("product of the bounds above that of converged norms", f"{above:.2%}", "at most 2 %")

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, *frozen.in_shape), dtype=np.uint8)
    batch = min(count, 256)
    frozen.certify(pixels[:batch] / np.float64(255), batch)  # compiles
    _, constants = seconds(frozen.margin_lipschitz)
    certificate, certifying = seconds(lambda: certify_images(frozen, pixels, 255, batch, console))
    table.add_row(f"certifying {count:,} images", f"{certifying:.1f} s", "below 300 s (10,000 of the small net)")

    labels = certificate.predictions
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        np.savez(directory / "data.npz", test_images=pixels, test_labels=labels)
        data = {"name": "random", "split": "test", "num_images": count, "of": count, "pixel_max": 255}
        data["sha256"] = checker.fingerprint(pixels, labels, 255)
        frozen.save(directory / "frozen")
        write_certificate(directory, frozen, certificate, pixels, labels, data, holds_split=count <= checker.SAMPLE)
        bounds_alone = checked(directory, 1)
        sampled, everything = checked(directory), checked(directory, None, directory / "data.npz")
    certified = proving + constants + certifying
    table.add_row("checking the bounds and one image", f"{bounds_alone:.1f} s", "")
    table.add_row("checking the sample", f"{sampled:.1f} s", "")
    table.add_row(f"checking all {count:,} images", f"{everything:.1f} s", "")
    table.add_row("check / certify, bounds", f"{bounds_alone / (proving + constants):.2f}", "at most 3")
    table.add_row("check / certify, everything", f"{everything / certified:.2f}", "at most 3")
    console.print(table)


def main(argv):
    del argv
    console = Console(width=110)
    if FLAGS.frozen:
        frozen = lipjax.FrozenNetwork.load(FLAGS.frozen)
        measure(console, FLAGS.frozen, frozen, FLAGS.images or 10_000, FLAGS.lanczos)
        return
    tiny = {"depth": 2, "width": 32} if FLAGS.small else {}
    for name, count in (("liresnet:cifar10", 4), ("cifar10_liresnet_small", 300 if FLAGS.small else 10_000)):
        frozen = made_network(name, FLAGS.crowding_steps, **tiny)
        measure(console, f"{name} {tiny or ''}", frozen, FLAGS.images or count, FLAGS.lanczos)
    console.print(f"{os.cpu_count()} cores; JAX {jax.__version__}")


if __name__ == "__main__":
    app.run(main)
