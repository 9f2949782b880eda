"""Tightness and speed of the proved bounds.

Run: python benchmarks/bounds.py
     small hostile operators against dense float64 SVDs
Run: python benchmarks/bounds.py --config=configs/liresnet.py:cifar10
     a whole network at initialisation: bounds and estimates against Lanczos, and the time that the bounds take
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from lanczos import lanczos_norm
from made_up import sizes
from rich.console import Console
from rich.table import Table

import lipjax
from lipjax import operators
from lipjax.certify.frozen import float64_on_cpu
from lipjax.models import get_model
from lipjax.training import config_file

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "A config file; without one, the table of small operators.")
flags.DEFINE_integer("iterations", 100, "Power iterations of the estimates of a whole network's norms.")


def hostile_operators():
    """(name, operator) pairs."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    eye = np.zeros((3, 3, 8, 8))
    eye[1, 1] = np.eye(8)
    q = np.linalg.qr(normal(60, 60))[0]
    dense = {
        "dense 40 x 90": normal(40, 90),
        "dense, all ones 200 x 200": np.ones((200, 200)),
        "dense, clustered spectrum (orthogonal)": q,
        "dense, clustered at the top": q @ np.diag(1 - 1e-9 * np.arange(60)) @ q.T,
        "dense, rank one": np.outer(normal(50), normal(70)),
        "dense, scale 1e-300": normal(30, 30) * 1e-300,
        "dense, scale 1e150": normal(30, 30) * 1e150,
        "dense 1 x 1": normal(1, 1),
    }
    convs = {
        "conv 3x3 on 8x8": (normal(3, 3, 4, 4), (8, 8), 1, "ZERO"),
        "conv, all ones 3x3 on 9x9": (np.ones((3, 3, 4, 4)), (9, 9), 1, "ZERO"),
        "conv, identity + small": (eye + 1e-3 * normal(3, 3, 8, 8), (8, 8), 1, "ZERO"),
        "conv 5x5 stride 2 on 11x7": (normal(5, 5, 3, 6), (11, 7), 2, "ZERO"),
        "conv, even kernel 4x2 on 7x6": (normal(4, 2, 3, 3), (7, 6), 1, "ZERO"),
        "conv 4x4 stride 4 on 16x16": (normal(4, 4, 3, 8), (16, 16), 4, "VALID"),
        "conv 3x3 on 1x1": (normal(3, 3, 5, 5), (1, 1), 1, "ZERO"),
        "conv 7x7 on 2x3, circular": (normal(7, 7, 3, 3), (2, 3), 1, "CIRCULAR"),
        "conv 3x3 circular stride 2 on 8x6": (normal(3, 3, 4, 4), (8, 6), 2, "CIRCULAR"),
        "conv, scale 1e-280": (normal(3, 3, 4, 4) * 1e-280, (6, 6), 1, "ZERO"),
        "conv 3x3x40 on 12x12 (embedding)": (normal(3, 3, 40, 40), (12, 12), 1, "ZERO"),
        "conv, identity + small x40 on 12x12 (embedding)": (
            np.pad(np.eye(40)[None, None], ((1, 1), (1, 1), (0, 0), (0, 0))) + 0.02 * normal(3, 3, 40, 40),
            (12, 12),
            1,
            "ZERO",
        ),
    }
    for name, matrix in dense.items():
        yield name, operators.Dense(matrix)
    for name, (kernel, size, strides, padding) in convs.items():
        yield name, operators.Conv(kernel, (*size, kernel.shape[2]), strides, padding)


def dense_norm(op) -> float:
    """Largest singular value of the operator's dense matrix, scaled to order one first."""
    with float64_on_cpu():
        scale = float(np.abs(jax.tree.leaves(op)[0]).max())
        op = jax.tree.map(lambda a: jnp.asarray(a / scale), op)
        size = int(np.prod(op.in_shape))
        columns = np.asarray(op(jnp.eye(size).reshape(size, *op.in_shape))).reshape(size, -1)
    return float(np.linalg.svd(columns, compute_uv=False)[0]) * scale


def small_table(console: Console) -> None:
    table = Table("operator", "dense SVD", "proved bound", "bound / SVD - 1", "method")
    for name, op in hostile_operators():
        norm, bound = dense_norm(op), op.bound()
        table.add_row(name, f"{norm:.12g}", f"{bound.proved:.12g}", f"{bound.proved / norm - 1:.1e}", bound.method)
    console.print(table)


def whole_network(console: Console, path: str) -> None:
    config, _ = config_file.read_config(path, [])
    shape, num_classes = sizes(config.data.name)
    model = get_model(config.model, input_shape=shape, num_classes=num_classes)
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))()
    frozen = lipjax.freeze(model, variables)
    start = time.perf_counter()
    rows = {row.name: row for row in frozen.lipschitz_report()}
    seconds = time.perf_counter() - start
    found = frozen.norm_estimates(num_iters=FLAGS.iterations)
    table = Table(
        "layer", "proved bound", "above Lanczos", f"power iteration ({FLAGS.iterations}) below Lanczos", "method"
    )
    over, under = 1.0, 1.0
    for name, op in zip(frozen.network.names, frozen.network.ops, strict=True):
        if name in found:
            row, norm = rows[name], lanczos_norm(op)
            over, under = over * row.claimed / norm, under * found[name] / norm
            gaps = f"{row.claimed / norm - 1:.1e}", f"{1 - found[name] / norm:.1e}"
            table.add_row(name, f"{row.claimed:.9f}", *gaps, row.method)
    console.print(table)
    console.print(
        f"All bounds: {seconds:.1f} s on {os.cpu_count()} cores. Products over all layers, against Lanczos: "
        f"bounds {over - 1:.2%} above, power iteration {1 - under:.2%} below."
    )


def main(argv):
    del argv
    console = Console(width=150)
    if FLAGS.config:
        whole_network(console, FLAGS.config)
    else:
        small_table(console)


if __name__ == "__main__":
    app.run(main)
