"""LipLT: how tight, what its estimate costs beside a training step, what its proof takes.

Run: python benchmarks/liplt.py --part=tightness [--depths=2,3,4,5,6,8,10] [--seeds=5] [--width=16] [--negative_slope=0]
     MLPs on the 8x8 digits of scikit-learn, at initialisation (as torch's) and trained with cross-entropy: proved
     product of norms, proved LipLT, LipSDP and a sampled lower bound; geometric means over the seeds, as Markdown
Run: python benchmarks/liplt.py --part=cost [--rounds=7]
     value and gradient of the estimate beside forward and backward of cross-entropy at batch 512, float32: 6C2F at 5
     iterations, 4C3F at 10; medians of interleaved rounds, of which only the ratios mean anything on a shared machine
Run: python benchmarks/liplt.py --part=bound [--variant=4c3f]
     time of the proved constants of a net at initialisation, their ratio to the converged estimate, chain by chain
LipSDP (Fazlyab et al. 2019, arXiv:1906.04893: LipSDP-Neuron, diagonal multipliers) needs cvxpy and its solver Clarabel,
which are no dependencies of lipjax: `pip install cvxpy`; without them its column stays empty. What a semidefinite
solver finds is no proof: here its multipliers are taken, and the constant that they give is evaluated in float64,
rounding not accounted for. The sampled lower bound is the largest norm of exact Jacobians over the points of a search.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import importlib.util
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from made_up import sizes
from ml_collections import ConfigDict
from sklearn.datasets import load_digits

import lipjax
from lipjax import bounds, operators
from lipjax.certify.frozen import float64_on_cpu
from lipjax.models import get_model

FLAGS = flags.FLAGS
flags.DEFINE_enum("part", "tightness", ["tightness", "cost", "bound"], "What is measured.")
flags.DEFINE_list("depths", ["2", "3", "4", "5", "6", "8", "10"], "tightness: numbers of dense layers.")
flags.DEFINE_integer("seeds", 5, "tightness: nets per row.")
flags.DEFINE_integer("width", 16, "tightness: neurons of every hidden layer.")
flags.DEFINE_float("negative_slope", 0.0, "tightness: of leaky ReLU; 0 is ReLU.")
flags.DEFINE_integer("epochs", 100, "tightness: of training, by Adam at 2e-3, batches of 128.")
flags.DEFINE_integer("max_hidden", 150, "tightness: LipSDP is left out for more hidden neurons in total.")
flags.DEFINE_integer("rounds", 7, "cost: rounds; in each, everything runs once. Medians are shown.")
flags.DEFINE_enum("variant", "4c3f", ["4c3f", "6c2f"], "bound: the net.")
flags.DEFINE_integer("iterations", 400, "bound: power iterations of the converged estimate.")

NETS = {"6c2f": ("cifar10", 5), "4c3f": ("mnist", 10)}
"""Data set, by whose shapes the net is made, and the power iterations of its recipe (arXiv:2310.00116)."""

BATCH = 512


def print_table(header: list[str], rows: list[list[str]]) -> None:
    for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print("| " + " | ".join(cells) + " |", flush=True)


def initial_mlp(key, sizes: list[int]) -> list[tuple[jax.Array, ...]]:
    """[(W, b)], all entries U(+-1 / sqrt(fan_in))."""

    def layer(i, fan_in, out):
        keys, scale = jax.random.split(jax.random.fold_in(key, i)), fan_in**-0.5
        shapes = (out, fan_in), (out,)
        return tuple(jax.random.uniform(k, s, minval=-scale, maxval=scale) for k, s in zip(keys, shapes, strict=True))

    return [layer(i, *pair) for i, pair in enumerate(zip(sizes[:-1], sizes[1:], strict=True))]


def apply_mlp(layers, x, low: float):
    for w, b in layers[:-1]:
        x = jax.nn.leaky_relu(x @ w.T + b, low)
    return x @ layers[-1][0].T + layers[-1][1]


def trained_mlp(key, layers, x, y, low: float):
    """The layers after training with cross-entropy. Loops and batches are traced: for `vmap` over keys and layers."""
    optimizer, batch = optax.adam(2e-3), 128

    def step(carry, chosen):
        layers, state = carry

        def loss(layers):
            logits = apply_mlp(layers, x[chosen], low)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[chosen]).mean()

        updates, state = optimizer.update(jax.grad(loss)(layers), state)
        return (optax.apply_updates(layers, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(x))
        return jax.lax.scan(step, carry, order[: len(x) // batch * batch].reshape(-1, batch))

    carry = layers, optimizer.init(layers)
    return jax.lax.scan(epoch, carry, jax.random.split(key, FLAGS.epochs))[0][0]


def jacobian_grams(layers, x: np.ndarray, low: float) -> np.ndarray:
    """J J^T (b, 10, 10) of the exact Jacobians at points x (b, n), none of which lies on a kink but by chance."""
    slopes = []
    for w, b in layers[:-1]:
        z = x @ w.T + b
        slopes.append(np.where(z > 0, 1.0, low))
        x = z * slopes[-1]
    rows = np.broadcast_to(layers[-1][0], (len(x), *layers[-1][0].shape))
    for (w, _), slope in zip(reversed(layers[1:-1]), reversed(slopes[1:]), strict=True):
        rows = (rows * slope[:, None]) @ w
    rows = rows * slopes[0][:, None]
    first = layers[0][0]
    return rows @ (first @ first.T) @ rows.swapaxes(1, 2)


def row_distances(grams: np.ndarray) -> np.ndarray:
    """Of all pairs i < j: (b, 45)."""
    i, j = np.triu_indices(grams.shape[1], 1)
    return np.sqrt(np.maximum(grams[:, i, i] + grams[:, j, j] - 2 * grams[:, i, j], 0))


@jax.jit
def _ascend(layers, x, low, smoothing):
    """Points on the way up of Adam from x, every tenth step: on a smooth stand-in for the norm of the Jacobian.

    ReLU's Jacobian is constant in pieces, so slopes are sigmoids of what the activation acts on, over `smoothing` times
    its own spread; and the norm is (sum of sigma_i^16)^(1/16).
    """

    def objective(x):
        slopes, a = [], x
        for w, b in layers[:-1]:
            z = a @ w.T + b
            soft = jax.nn.sigmoid(z / (smoothing * jax.lax.stop_gradient(jnp.std(z) + 1e-12)))
            slopes.append(low + (1 - low) * soft)
            a = jnp.where(z > 0, z, low * z)
        rows = jnp.broadcast_to(layers[-1][0], (len(x), *layers[-1][0].shape))
        for (w, _), slope in zip(reversed(layers[:-1]), reversed(slopes), strict=True):
            rows = (rows * slope[:, None]) @ w
        gram = rows @ rows.swapaxes(1, 2)
        trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None] + 1e-30
        power = gram / trace
        for _ in range(3):
            power = power @ power
        return jnp.sum(jnp.log(trace[:, 0, 0]) + jnp.log(jnp.trace(power, axis1=1, axis2=2)) / 8)

    optimizer = optax.adam(0.1)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(-jax.grad(objective)(x), state)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    _, path = jax.lax.scan(step, (x, optimizer.init(x)), length=100)
    return jnp.asarray(path)[9::10]


def sampled_lower_bound(layers, data: np.ndarray, low: float) -> tuple[float, float]:
    """Largest spectral norm of a Jacobian found, and the mean over pairs of the largest |J_i - J_j| found, in float64.

    Points: the data, Gaussian ones of several scales, gradient ascent from the best of them, then random steps from the
    best. The whole space counts, as the bounds are global.
    """
    rng = np.random.default_rng(0)
    best = np.zeros((0, data.shape[1]))
    top, pairs = np.zeros(0), np.zeros(layers[-1][0].shape[0] * (layers[-1][0].shape[0] - 1) // 2)

    def visit(points):
        nonlocal best, top, pairs
        grams = jacobian_grams(layers, points, low)
        norms = np.sqrt(np.maximum(np.linalg.eigvalsh(grams)[:, -1], 0))
        pairs = np.maximum(pairs, row_distances(grams).max(axis=0))
        points, norms = np.concatenate([best, points]), np.concatenate([top, norms])
        order = np.argsort(-norms)[:64]
        best, top = points[order], norms[order]

    visit(data)
    for scale in (0.3, 1.0, 3.0, 10.0):
        visit(data[rng.integers(len(data), size=1000)] + scale * rng.normal(size=(1000, data.shape[1])))
    starts = np.concatenate([best, data[rng.integers(len(data), size=64)], rng.normal(size=(64, data.shape[1]))])
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), layers)
    for smoothing in (0.3, 0.1, 0.03):
        path = _ascend(single, jnp.asarray(starts, jnp.float32), low, smoothing)
        visit(np.asarray(path, np.float64).reshape(-1, data.shape[1]))
        starts[: len(best)] = best
    for scale in np.repeat(np.geomspace(1.0, 0.01, 10), 4):
        visit(np.repeat(best, 16, axis=0) + scale * rng.normal(size=(16 * len(best), data.shape[1])))
    return float(top[0]), float(pairs.mean())


def lipsdp(cvxpy, weights: list[np.ndarray], slope: tuple[float, float]) -> float:
    """LipSDP-Neuron. Its matrix is block tridiagonal and splits, with nothing lost, into one inequality per activation:

        [S_{k-1} + 2 alpha beta W^T T W, -(alpha + beta) W^T T;  ., 2 T - S_k] >= 0,   T diagonal, T >= 0,

    with S_0 = rho I and S_{L-1} = W_L^T W_L; the constant is sqrt(rho). Weights are scaled to norm one, and the input
    is replaced by what the first layer sees of it.
    """
    alpha, beta = slope
    scales = [np.linalg.norm(w, 2) for w in weights]
    ws = [w / s for w, s in zip(weights, scales, strict=True)]
    if ws[0].shape[0] < ws[0].shape[1]:
        ws[0] = np.linalg.qr(ws[0].T)[1].T
    sizes = [w.shape[1] for w in ws]
    rho = cvxpy.Variable()
    last = ws[-1].T @ ws[-1]
    stored = [rho * np.eye(sizes[0]), *(cvxpy.Variable((n, n), symmetric=True) for n in sizes[1:-1]), last]
    multipliers = [cvxpy.Variable(n, nonneg=True) for n in sizes[1:]]
    constraints = []
    for w, t, before, after in zip(ws[:-1], multipliers, stored[:-1], stored[1:], strict=True):
        t, cross = cvxpy.diag(t), -(alpha + beta) * w.T @ cvxpy.diag(t)
        block = cvxpy.bmat([[before + 2 * alpha * beta * w.T @ t @ w, cross], [cross.T, 2 * t - after]])
        constraints.append((block + block.T) / 2 >> 0)
    cvxpy.Problem(cvxpy.Minimize(rho), constraints).solve(solver="CLARABEL")
    found = [np.maximum(t.value, 0) for t in multipliers]
    least = min(_constant_of(ws, found, slope, shift) for shift in np.geomspace(1e-10, 1e-2, 33))
    return float(np.sqrt(least) * np.prod(scales))


def _constant_of(ws, multipliers, slope, shift: float) -> float:
    """rho that these multipliers, raised a little, give: S_k eliminated from the last to the first; inf if none."""
    alpha, beta = slope
    stored = ws[-1].T @ ws[-1]
    for w, t in zip(reversed(ws[:-1]), reversed(multipliers), strict=True):
        t = t + shift * np.linalg.norm(stored, 2)
        try:
            factor = np.linalg.cholesky(2 * np.diag(t) - stored)
        except np.linalg.LinAlgError:
            return float("inf")
        cross = np.linalg.solve(factor, t[:, None] * w)
        stored = (alpha + beta) ** 2 * cross.T @ cross - 2 * alpha * beta * (w.T * t) @ w
    return float(np.linalg.eigvalsh(stored)[-1])


def tightness_values(cvxpy, layers, data, low: float) -> dict[str, float]:
    """Every column's value for one net."""
    weights, slope = [w for w, _ in layers], (low, 1.0)
    pairwise, report = bounds.liplt_bound([operators.Dense(w) for w in weights], slope)
    pairs = ~np.eye(len(pairwise), dtype=bool)
    norms = [operators.Dense(w).bound().proved for w in weights[:-1]]
    sampled, sampled_pairs = sampled_lower_bound(layers, data, low)
    small = sum(len(w) for w in weights[:-1]) <= FLAGS.max_hidden
    values = {
        "product": report.product,
        "LipLT": report.total,
        "LipSDP": lipsdp(cvxpy, weights, slope) if cvxpy and small else np.nan,
        "sampled": sampled,
        "pairs: product": float(np.prod(norms) * operators.LinearHead(*layers[-1]).pairwise_bound()[pairs].mean()),
        "pairs: LipLT": float(pairwise[pairs].mean()),
        "pairs: sampled": sampled_pairs,
    }
    if sampled > values["LipLT"] or sampled_pairs > values["pairs: LipLT"]:
        raise AssertionError(f"A Jacobian refutes the proved bounds: {values}.")
    return values


def tightness() -> None:
    low = FLAGS.negative_slope
    cvxpy = importlib.import_module("cvxpy") if importlib.util.find_spec("cvxpy") else None
    if cvxpy is None:
        print("cvxpy is not installed (pip install cvxpy): the column LipSDP stays empty.", file=sys.stderr)
    x, y = load_digits(return_X_y=True)
    x, order = x / 16, np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    train, test = slice(0, 1437), slice(1437, None)
    fit = jax.jit(jax.vmap(trained_mlp, (0, 0, None, None, None)), static_argnums=4)
    to_logits = jax.jit(jax.vmap(apply_mlp, (0, None, None)), static_argnums=2)
    rows: list[dict[str, str]] = []
    for depth in map(int, FLAGS.depths):
        sizes = [64, *[FLAGS.width] * (depth - 1), 10]
        keys = jax.random.split(jax.random.key(depth), FLAGS.seeds)
        initial = jax.jit(jax.vmap(lambda key, sizes=sizes: initial_mlp(key, sizes)))(keys)
        trained = fit(keys, initial, jnp.asarray(x[train], jnp.float32), jnp.asarray(y[train]), low)
        for name, stacked in (("random", initial), ("trained", trained)):
            host = jax.tree.map(lambda a: np.asarray(a, np.float64), stacked)
            nets = [jax.tree.map(lambda a, i=i: a[i], host) for i in range(FLAGS.seeds)]
            values = [tightness_values(cvxpy, layers, x, low) for layers in nets]
            mean = {key: float(np.exp(np.mean([np.log(v[key]) for v in values]))) for key in values[0]}
            logits = to_logits(stacked, jnp.asarray(x[test], jnp.float32), low)
            row = {"L, weights": f"{depth}, {name}", "accuracy": ""}
            if name == "trained":
                row["accuracy"] = f"{100 * float((logits.argmax(2) == y[test]).mean()):.1f}"
            row |= {key: "" if np.isnan(value) else f"{value:.3g}" for key, value in mean.items()}
            row["product / LipLT"] = f"{mean['product'] / mean['LipLT']:.2f}"
            row["LipLT / sampled"] = f"{mean['LipLT'] / mean['sampled']:.2f}"
            rows.append(row)
            print(f"{row}", file=sys.stderr)
    print(
        f"\nMLPs 64-{FLAGS.width}-...-10 on 8x8 digits, slopes [{low:g}, 1], {FLAGS.seeds} seeds, geometric means; "
        f"trained: {FLAGS.epochs} epochs, cross-entropy, mean test accuracy in %. Pairs: mean over i < j of the "
        "constant of logit_i - logit_j.\n"
    )
    print_table(list(rows[0]), [list(row.values()) for row in rows])


# Cost and proof.


def convnet(variant: str):
    """(model, variables, network) at initialisation, and the shape of its images."""
    shape, num_classes = sizes(NETS[variant][0])
    model = get_model(ConfigDict({"name": "convnet", "variant": variant}), input_shape=shape, num_classes=num_classes)
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))()
    return model, variables, jax.jit(lambda v: model.apply(v, method="build"))(variables), shape


def cost_functions(variant: str) -> dict[str, Any]:
    """Jitted functions without arguments, by name: values and gradients with respect to all weights."""
    _, _, network, shape = convnet(variant)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(BATCH, *shape)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, network.num_classes, BATCH))
    num_iters, pairs = NETS[variant][1], network.num_classes * (network.num_classes - 1)

    def cross_entropy(network, images):
        return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()

    def mean_of(estimate):
        def mean(network, vectors):
            lipschitz, vectors = estimate(network, vectors, num_iters)
            return lipschitz.sum() / pairs, vectors

        return mean

    step = jax.jit(jax.value_and_grad(cross_entropy))
    liplt = jax.jit(jax.value_and_grad(mean_of(bounds.margin_liplt_estimate), has_aux=True))
    product = jax.jit(jax.value_and_grad(mean_of(bounds.margin_lipschitz_estimate), has_aux=True))
    chain_vectors = bounds.init_liplt_vectors(network, jax.random.key(1))
    vectors = bounds.init_vectors(network, jax.random.key(1))
    return {
        "step": lambda: step(network, images),
        "liplt": lambda: liplt(network, chain_vectors),
        "product": lambda: product(network, vectors),
    }


def cost() -> None:
    rows = []
    for variant, (_, num_iters) in NETS.items():
        functions = cost_functions(variant)
        times = {name: [] for name in functions}
        for _ in range(FLAGS.rounds + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                jax.block_until_ready(function())
                times[name].append(time.perf_counter() - start)
        first = {name: values.pop(0) for name, values in times.items()}  # compiles
        median = {name: statistics.median(values) for name, values in times.items()}
        ratio = {name: np.median(np.array(values) / times["step"]) for name, values in times.items()}
        cells = [f"{1e3 * median[name]:.0f}" for name in ("step", "liplt")]
        cells += [f"{ratio['liplt']:.3f}", f"{ratio['product']:.4f}", f"{first['liplt'] - median['liplt']:.0f}"]
        rows.append([variant, str(num_iters), *cells])
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, float32, batch {BATCH}\n")
    header = ["net", "iterations", "forward + backward, ms", "LipLT, ms", "LipLT ratio", "product ratio"]
    print_table([*header, "compiling LipLT, s"], rows)


def bound() -> None:
    model, variables, network, _ = convnet(FLAGS.variant)
    frozen = lipjax.freeze(model, variables).network
    clocks = time.perf_counter, time.process_time
    start = [clock() for clock in clocks]
    proved, report = bounds.margin_liplt_bound(frozen)
    seconds, cpu_seconds = (clock() - begun for clock, begun in zip(clocks, start, strict=True))
    product = bounds.margin_lipschitz_bound(frozen)
    chain = lambda net: [*net.ops, operators.Dense(net.head.matrix)]  # noqa: E731
    estimate = jax.jit(lambda ops, vectors, n: bounds.liplt_estimate(ops, vectors, n), static_argnums=2)
    vectors = bounds.liplt_vectors(chain(network), jax.random.key(1))
    _, found = estimate(chain(network), vectors, FLAGS.iterations)
    with float64_on_cpu():  # what float32 converged to, measured in float64
        double = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (chain(frozen), found.vectors))
        converged, found = jax.device_get(estimate(*double, 0))
    pairs = ~np.eye(len(proved), dtype=bool)
    ratios = proved[pairs] / converged[pairs]
    print(
        f"{FLAGS.variant} at initialisation. Proved pairwise LipLT: {seconds:.0f} s on {os.cpu_count()} cores, "
        f"{cpu_seconds:.0f} s of processor time. Means over pairs: proved LipLT {proved[pairs].mean():.6g}, estimate "
        f"after {FLAGS.iterations} iterations {converged[pairs].mean():.6g}, proved product "
        f"{product[pairs].mean():.6g}. Proved / estimate: {ratios.min():.6f} to {ratios.max():.6f}. "
        f"Product / LipLT: {np.mean(product[pairs] / proved[pairs]):.3f}.\n"
    )
    estimates = [float(norm) for norms in found.norms for norm in norms]
    rows = [
        [f"{row.start} to {row.end}", f"{row.claimed:.6g}", f"{row.claimed / norm - 1:.1e}", row.method]
        for row, norm in zip(report.chains, estimates, strict=True)
    ]
    print_table(["chain", "proved", "above the estimate", "method"], rows)


def main(argv):
    del argv
    {"tightness": tightness, "cost": cost, "bound": bound}[FLAGS.part]()


if __name__ == "__main__":
    app.run(main)
