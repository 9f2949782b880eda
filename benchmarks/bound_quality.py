"""The gap between proved bounds and what is true: of every layer of trained networks, and of the whole.

Run: python benchmarks/bound_quality.py --workdir=DIR --workdir=OTHER
     DIR: a certified run of train.py. Prints tables in Markdown; docs/bound_quality.md says what they mean.

A layer's columns: the proved bound; its norm by Lanczos in float64, which is attained, hence a lower bound but for
rounding; how far the proof, the norm on the grid of the proof, and 10 power iterations from random vectors are from
that. Of a residual block the bound of Lanczos is 1 + the norm of its convolution, and what is attained is the largest
norm of its Jacobian at four images. The whole network's constants are those of logit differences: proved; from
converged norms; and the largest quotients |d(x) - d(y)| / |x - y| that a search found.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import app, flags
from lanczos import grid_norm, lanczos_norm, local_norm

from lipjax import FrozenNetwork, attacks, bounds, operators
from lipjax.certify.frozen import float64_on_cpu
from lipjax.evaluation import evaluate, falsify
from lipjax.operators.grid import Circulants, on_grid
from lipjax.training.config import load_config
from lipjax.training.data import load_dataset

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("workdir", None, "A certified run; several may be given.", required=True)
flags.DEFINE_integer("steps", 30, "Of the search for lower bounds where attack.json has none of as many; 0: none.")
_ITERATIONS, _CONVERGED, _IMAGES = 10, 300, 4


def pool(directory: pathlib.Path, frozen: FrozenNetwork) -> np.ndarray:
    """Test images of the run; without images.safetensors, which older runs lack, from its data set."""
    path = directory / "images.safetensors"
    if path.exists():
        scale = json.loads((directory / "certificate.json").read_text())["data"]["pixel_max"]
        return safetensors.numpy.load_file(path)["pixels"][:32] / np.float64(scale)
    config, seed = load_config(directory)
    dataset = load_dataset(config.data, seed)
    images, _ = evaluate.test_images(dataset, evaluate.drawn_indices(dataset, 32), 32)
    return images.reshape(-1, *frozen.in_shape) / np.float64(dataset.pixel_max)


def part_norms(op) -> list[tuple[float, float]]:
    """(norm by Lanczos, on the grid of its proof) of each operator whose norm is estimated."""
    found = []
    for part in op.ops if isinstance(op, operators.Residual) else (op,):
        if hasattr(part, "estimate"):
            norm, grid = lanczos_norm(part), on_grid(part)
            found.append((norm, grid_norm(grid) if isinstance(grid, Circulants) else norm))
        elif hasattr(part, "slope"):
            found.append((max(map(abs, part.slope)),) * 2)
    return found


def layers(frozen: FrozenNetwork, images: np.ndarray) -> tuple[list[str], dict[str, float]]:
    """Rows of the table, and the converged constants of the operators by name."""
    network, rows, converged = frozen.network, [], {}
    estimates = frozen.norm_estimates(num_iters=_ITERATIONS)
    bound = {row.name: row for row in frozen.lipschitz_report()}
    apply = jax.jit(lambda op, x: op(x))
    with float64_on_cpu():
        x = np.asarray(apply(network.normalize, jnp.asarray(images[:_IMAGES])))
    for name, op in zip(network.names, network.ops, strict=True):
        row, residual = bound[name], isinstance(op, operators.Residual)
        norms = part_norms(op)
        if residual or hasattr(op, "estimate"):
            norm, grid = (math.prod(values) + residual for values in zip(*norms, strict=True))
            attained = max(local_norm(op, image) for image in x) if residual else norm
            method = row.method if not residual else f"1 + ({row.parts[0].method})"
            gaps = [
                row.claimed / norm - 1,
                row.claimed / grid - 1,
                estimates[name] / norm - 1,
                row.claimed / attained - 1,
            ]
            cells = [name, row.type, method, f"{row.claimed:.6f}", f"{norm:.6f}", *(f"{100 * g:+.4f} %" for g in gaps)]
            rows.append(cells)
            converged[name] = norm
        elif norms:
            converged[name] = norms[0][0]
        with float64_on_cpu():
            x = np.asarray(apply(op, jnp.asarray(x)))
    return rows, converged


def converged_constants(frozen: FrozenNetwork, converged: dict[str, float]) -> np.ndarray:
    """(k, k): the certificate's formulas with converged norms in the place of proved ones."""
    network = frozen.network
    scale = math.prod(converged.values()) / float(np.min(network.input_std))
    with float64_on_cpu():
        table = scale * np.asarray(jax.tree.map(jnp.asarray, network.head).pairwise_lipschitz())
    if bounds.has_liplt(network):  # norms of chains by power iteration in float32, which takes norms at full precision
        single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network)
        vectors = bounds.init_liplt_vectors(single, jax.random.key(0))
        estimate = jax.jit(bounds.margin_liplt_estimate, static_argnums=2)
        table = np.minimum(table, np.asarray(estimate(single, vectors, _CONVERGED)[0], np.float64))
    return table


def found_by_search(directory: pathlib.Path, frozen: FrozenNetwork, images: np.ndarray) -> np.ndarray:
    """(k, k): lower bounds of the constants; NaN where none was searched."""
    path, table = directory / "attack.json", np.full((frozen.num_classes,) * 2, np.nan)
    if not FLAGS.steps:
        return table
    document = json.loads(path.read_text()) if path.exists() else {}
    if document.get("lipschitz") and document["steps"] >= FLAGS.steps and document["frozen_sha256"] == frozen.sha256():
        for pair in document["lipschitz"]["pairs"]:
            i, j = pair["classes"]
            table[i, j] = table[j, i] = pair["lower"]
        return table
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), frozen.network)
    with jax.default_matmul_precision("highest"):
        search = attacks.lipschitz_lower_bound(
            single, images, num_steps=FLAGS.steps, evaluate=lambda z: falsify.logits_and_errors(frozen, z, len(z))
        )
    return search.table(frozen.num_classes)


def report(directory: pathlib.Path) -> None:
    frozen = FrozenNetwork.load(directory / "frozen")
    images = pool(directory, frozen)
    print(f"\n## {directory.name}\n")
    titles = "layer", "type", "proof", "proved", "Lanczos", "proved above it"
    print("|", " | ".join([*titles, "above the grid's", f"{_ITERATIONS} iterations", "above what is attained"]), "|")
    print("|" + "---|" * (len(titles) + 3))
    rows, converged = layers(frozen, images)
    for row in rows:
        print("|", " | ".join(row), "|")
    certificate = json.loads((directory / "certificate.json").read_text())
    known = certificate["frozen_sha256"] == frozen.sha256()  # LipLT's proof may take minutes
    proved = np.array(certificate["margin_lipschitz"]) if known else frozen.margin_lipschitz()
    found = found_by_search(directory, frozen, images)
    tables = {"proved / converged norms": converged_constants(frozen, converged)}
    upper = np.triu(proved > 0, 1)
    if np.isfinite(found[upper]).any():
        tables["proved / found by search"] = found
    print("\n| constants of logit differences | least | median | largest |\n|---|---|---|---|")
    print("|", " | ".join(["proved", *(f"{f(proved[upper]):.4f}" for f in (np.min, np.median, np.max))]), "|")
    for title, table in tables.items():
        ratios = proved[upper] / np.where(table[upper] > 0, table[upper], np.nan)
        print("|", " | ".join([title, *(f"{f(ratios):.4f}" for f in (np.nanmin, np.nanmedian, np.nanmax))]), "|")


def main(argv):
    del argv
    for workdir in FLAGS.workdir:
        root = pathlib.Path(workdir)
        seeds = sorted(root.glob("seed_*/certificate.json"))
        for path in seeds or [root / "certificate.json"]:
            report(path.parent)


if __name__ == "__main__":
    app.run(main)
