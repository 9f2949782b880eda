"""Bounds and estimates of the norm of zero-padded convolutions, of this library and of others: error and time.

Run: python benchmarks/norm_bounds.py --figure=docs/norm_bounds.svg
     prints the tables of docs/bound_quality.md in Markdown, and draws them

Errors are against Lanczos in float64, times of the processor, without compilation, of the second of two calls.
Methods of others are written after their papers, for comparison alone: in plain float64, which proves nothing.

    Gram iteration   G <- G^H G per frequency of the circulant of n + k - 1 pixels (arXiv:2305.16173, 2402.00240)
    Toeplitz         row sums of the taps of the Gram map, squared n - 1 times more (arXiv:2402.00240; n = 1 is AOL's)
    tensor norm      sqrt(k k) times the norm of the kernel as a 4-tensor, by alternating steps (arXiv:2409.11859)
    Fantastic Four   sqrt(k k) times the least norm of four unfoldings (arXiv:1911.10258)
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from lanczos import lanczos_norm
from matplotlib.figure import Figure

from lipjax import operators
from lipjax.certify.float64 import float64_on_cpu
from lipjax.parametrize import aol, bcop
from lipjax.spectral import symbol, verified

FLAGS = flags.FLAGS
flags.DEFINE_string("figure", None, "Where to draw them, an SVG file.")
flags.DEFINE_integer("starts", 10, "Random starts of the tensor norm.", lower_bound=1)

PROVED, FORMULA, APPROACHED, ESTIMATE = "proved", "a bound but for rounding", "a bound, from below", "an estimate"
_MARKERS = {PROVED: "o", FORMULA: "o", APPROACHED: "^", ESTIMATE: "x"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A number for a convolution's norm, and what it is: PROVED; FORMULA, a bound in exact arithmetic; APPROACHED,
    that of a bound which is approached from below, so none if it has not been reached; ESTIMATE, below the norm."""

    name: str
    status: str
    value: Callable[[operators.Conv], float]


def autocorrelation(op: operators.Conv) -> float:
    """The proved bound for orthogonal kernels (docs/soundness.md, section 3a), here of any kernel."""
    scaled, exponent = verified.scale_to_unit(np.ascontiguousarray(np.swapaxes(op.kernel, 2, 3)))
    found = symbol.GramPolynomial(scaled).bound_everywhere(math.inf)
    return math.ldexp(verified.sqrt_up(found[0]), exponent) if found else math.nan


def row_sums(op: operators.Conv) -> float:
    """The proved bound by row sums with the best weights (docs/soundness.md, section 3b)."""
    bound = op.row_sum_bound()
    return bound.proved if bound else math.nan


def frequencies(kernel: np.ndarray, size: int) -> np.ndarray:
    """The blocks (f, o, i) of a circular convolution of size x size pixels."""
    blocks = np.fft.fft2(kernel, (size, size), axes=(0, 1))
    return np.swapaxes(blocks.reshape(size * size, *kernel.shape[2:]), 1, 2)


def squared(blocks: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """G^H G of scaled blocks, and the logarithms of the factors that were taken out."""
    norms = np.linalg.norm(blocks, axis=(1, 2))
    blocks = blocks / norms[:, None, None]
    return np.conj(np.swapaxes(blocks, 1, 2)) @ blocks, 2 * (logs + np.log(norms))


def gram_iteration(op: operators.Conv, steps: int) -> float:
    """sigma <= |G_t|_F^(1 / 2^t) of each frequency, after t steps."""
    size = op.in_shape[0] + op.kernel.shape[0] - 1
    half = size // 2 + 1  # the others are their conjugates
    blocks = frequencies(op.kernel, size).reshape(size, size, *op.kernel.shape[3:1:-1])[:, :half]
    blocks = blocks.reshape(-1, *blocks.shape[2:])
    logs = np.zeros(len(blocks))
    for _ in range(steps):
        blocks, logs = squared(blocks, logs)
    return float(np.exp((np.log(np.linalg.norm(blocks, axis=(1, 2))) + logs) / 2**steps).max())


def toeplitz(op: operators.Conv, steps: int) -> float:
    """The largest row sum of moduli of all taps of the Gram map after t squarings, to the power 1 / 2^t."""
    size = 2**steps * (op.kernel.shape[0] - 1) + 1  # so many taps; none wraps around
    blocks, log = frequencies(op.kernel, size), 0.0
    for _ in range(steps):
        scale = np.linalg.norm(blocks)  # the same for all frequencies
        blocks, log = blocks / scale, 2 * (log + math.log(scale))
        blocks = np.conj(np.swapaxes(blocks, 1, 2)) @ blocks
    taps = np.fft.ifft2(blocks.reshape(size, size, *blocks.shape[1:]), axes=(0, 1))
    return math.exp((math.log(np.abs(taps).sum(axis=(0, 1, 3)).max()) + log) / 2**steps)


def tensor_norm(op: operators.Conv, starts: int, steps: int = 100) -> float:
    """By alternating steps from several complex starts: it approaches the tensor norm from below."""
    rng, kernel, best = np.random.default_rng(0), op.kernel.astype(complex), 0.0
    for _ in range(starts):
        vectors = [rng.normal(size=n) + 1j * rng.normal(size=n) for n in kernel.shape]
        vectors = [v / np.linalg.norm(v) for v in vectors]
        value = 0.0
        for _ in range(steps):
            for axis in range(4):
                rest = kernel
                for other in reversed(range(4)):
                    if other != axis:
                        rest = np.tensordot(rest, vectors[other], (other, 0))
                value = float(np.linalg.norm(rest))
                vectors[axis] = np.conj(rest) / value
        best = max(best, value)
    return math.sqrt(math.prod(kernel.shape[:2])) * best


def fantastic_four(op: operators.Conv) -> float:
    """Unfoldings (kh i, kw o), (kh o, kw i), (kh kw i, o) and (kh kw o, i), their norms by SVD."""
    kh, kw, i, o = op.kernel.shape
    orders = ((0, 2, 1, 3), kh * i), ((0, 3, 1, 2), kh * o), ((0, 1, 2, 3), kh * kw * i), ((0, 1, 3, 2), kh * kw * o)
    unfoldings = (np.transpose(op.kernel, order).reshape(rows, -1) for order, rows in orders)
    return math.sqrt(kh * kw) * min(float(np.linalg.norm(matrix, 2)) for matrix in unfoldings)


_RESOLVED = 1e-7  # to which Lanczos converges: errors below are drawn there
_estimate = jax.jit(lambda op, v, steps: op.estimate(v, steps)[0], static_argnums=2)


def power_iteration(op: operators.Conv, steps: int) -> float:
    """From a random vector."""
    with float64_on_cpu():
        held = jax.tree.map(jnp.asarray, op)
        v = jnp.asarray(np.random.default_rng(0).normal(size=op.in_shape))
        return float(_estimate(held, v, steps))


METHODS = (
    Method("lipjax", PROVED, lambda op: op.bound().proved),
    Method("autocorrelation", PROVED, autocorrelation),
    Method("row sums", PROVED, row_sums),
    Method("Gram, 4 steps", FORMULA, lambda op: gram_iteration(op, 4)),
    Method("Gram, 6 steps", FORMULA, lambda op: gram_iteration(op, 6)),
    Method("Toeplitz, n = 1", FORMULA, lambda op: toeplitz(op, 1)),
    Method("Toeplitz, n = 3", FORMULA, lambda op: toeplitz(op, 3)),
    Method("tensor norm", APPROACHED, lambda op: tensor_norm(op, FLAGS.starts)),
    Method("Fantastic Four", FORMULA, fantastic_four),
    Method("power iteration, 10", ESTIMATE, lambda op: power_iteration(op, 10)),
    Method("power iteration, 100", ESTIMATE, lambda op: power_iteration(op, 100)),
)


def convolutions() -> dict[str, operators.Conv]:
    """By name; 3 x 3 taps, zeros of one pixel around."""

    def normal(channels: int) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(3, 3, channels, channels)) / (3 * math.sqrt(channels))

    def near_identity(channels: int) -> np.ndarray:
        kernel = 0.2 * normal(channels)
        kernel[1, 1] += np.eye(channels)
        return kernel

    with float64_on_cpu():
        matrices = np.linalg.qr(np.random.default_rng(1).normal(size=bcop.raw_shape(32, 32, 3)))[0]
        orthogonal = np.asarray(bcop.assemble(jnp.asarray(matrices), 32, 32, None))
        rescaled = np.asarray(aol.rescale_kernel(jnp.asarray(near_identity(32))))
    return {
        "random, 32 channels": operators.Conv(normal(32), (16, 16, 32)),
        "near the identity, 32": operators.Conv(near_identity(32), (16, 16, 32)),
        "near the identity, 64": operators.Conv(near_identity(64), (32, 32, 64)),
        "orthogonal (BCOP), 32": operators.Conv(orthogonal, (16, 16, 32)),
        "rescaled (AOL), 32": operators.Conv(rescaled, (16, 16, 32)),
    }


def measured(op: operators.Conv) -> list[tuple[Method, float, float]]:
    """(method, error relative to Lanczos, seconds)."""
    norm, rows = lanczos_norm(op), []
    for method in METHODS:
        method.value(op)
        started = time.process_time()
        value = method.value(op)
        rows.append((method, value / norm - 1, max(time.process_time() - started, 1e-5)))
    return rows


def draw(found: dict[str, list[tuple[Method, float, float]]], path: str) -> None:
    """A panel for each convolution: moduli of errors over seconds."""
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "lipjax", "font.size": 9, "legend.frameon": False}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
        colours = matplotlib.colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
        for panel, (name, rows) in zip(panels, found.items(), strict=False):
            for number, (method, error, seconds) in enumerate(rows):
                marker = "x" if error < 0 else _MARKERS[method.status]
                filled = "none" if method.status == FORMULA else colours[number]
                look = {"marker": marker, "s": 48, "color": colours[number], "facecolors": filled}
                panel.scatter(seconds, max(abs(error), _RESOLVED), label=method.name, **look)
            panel.set(title=name, xscale="log", yscale="log", ylim=(5e-8, 10))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        for panel in panels[len(found) :]:
            panel.axis("off")
        handles, labels = panels[0].get_legend_handles_labels()
        key = "disc: proved; circle: a bound but for\nrounding; triangle: a bound, approached\nfrom below"
        key += "; cross: below the norm"
        panels[-1].legend(handles, labels, loc="center", title=key)
        figure.supxlabel("seconds of the processor")
        figure.supylabel("|value / norm by Lanczos - 1|")
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"expected flags alone, got {argv[1:]}")
    found = {name: measured(op) for name, op in convolutions().items()}
    print("| | | " + " | ".join(found) + " |\n|" + "---|" * (len(found) + 2))
    for number, method in enumerate(METHODS):
        cells = (f"{100 * rows[number][1]:+.3g} %, {rows[number][2]:.2g} s" for rows in found.values())
        print(f"| {method.name} | {method.status} |", " | ".join(cells), "|")
    for name, op in convolutions().items():
        print(f"\nlipjax's method for {name}: {op.bound().method}.")
    if FLAGS.figure:
        draw(found, FLAGS.figure)


if __name__ == "__main__":
    app.run(main)
