"""Whole LipConvnet-5: ours against the papers' PyTorch formulation and against plain convolutions, in one process.

Run: python benchmarks/lipconvnet.py [--batch 128] [--width 32] [--rounds 5] [--parts train,inference]
                                    [--system-memory]
Needs PyTorch beside requirements.txt (pip install torch); without it only our own times are shown.

The formulation of the papers is written here as they describe it: the series of a skew, normalised, zero-padded
convolution by torch.nn.functional.conv2d, with 5 terms in training and 12 at inference, all layers at the width of
their wider side; every layer and mode in the memory layout (NCHW or NHWC) that was faster for it alone. Ours is
padding="CIRCULAR" with the same numbers of terms. Plain convolutions: one k x k convolution per layer from the
reordered channels (4 c at stride 2) to the features kept, which is the linear map that ours applies, in the faster of
XLA and torch, layout by layer. Medians of rounds in which every contender runs once. Freed memory stays with the
process (memory.py) for all of them, but for --system-memory.

What the compiled inference shows (two cores of an AVX-512 EPYC, 210 GFLOP/s, batch 128; jax.profiler):
  - of 3.2 GFLOP in blocks and 0.7 in transforms 19 ms would remain at the speed of large products. The products with
    blocks take 21 of 29 ms, those of layers 2 to 5 at 150 to 180 GFLOP/s, that of layer 1 (12 channels in) on one core.
  - the rest is some 40 passes over memory. On this virtual machine they cost 10 ms more for tens of seconds at a time
    (29 or 39 ms; perhaps while its cores share no cache), of which plain convolutions show nothing. Hence layer 1
    writes its results once (`_dft.apply_blocks`), and nothing is transposed around the blocks.
  - XLA's loops over a transpose that ends in a reshape of the last axis do 1 element in 2.4 ns per core, loops that
    keep the axes 7 times as many: space-to-depth is a stack of its places (0.26 ms for 0.85 in layer 3).
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from memory import keep_freed_memory
from optional_torch import tf, torch

from lipjax import activations, conv, losses
from lipjax.models import LipConvnet
from lipjax.nn import COLLECTION

TRAIN_TERMS, EVAL_TERMS, CLASSES = 5, 12, 10


def layer_shapes(width: int) -> list[tuple[int, int, int, int]]:
    """(side of the map, channels in, features, kernel size) of the five layers, after space-to-depth."""
    shapes, channels, side = [], 3, 32
    for i in range(5):
        side, features = side // 2, 2 * width * 2**i
        shapes.append((side, 4 * channels, features, 1 if i == 4 else 3))
        channels = features
    return shapes


def seconds(function, *arguments, repeat: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        jax.block_until_ready(function(*arguments))
    return (time.perf_counter() - start) / repeat


def compare(contenders: dict, rounds: int) -> dict[str, float]:
    """Median seconds of functions without arguments; each runs once per round, after one round that compiles."""
    times = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, function in contenders.items():
            took = seconds(function)
            if turn:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


# --- ours


def our_parts(width: int, batch: int):
    """(training step, frozen inference), functions without arguments."""
    model = LipConvnet((32, 32, 3), CLASSES, width=width, layer_options={"padding": "CIRCULAR"}, batch_size=batch)
    x = jax.random.uniform(jax.random.key(1), (batch, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(2), (batch,), 0, CLASSES)
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, lip, opt_state):
        def objective(params):
            network, advanced = model.apply(
                {"params": params, COLLECTION: lip}, True, method="build", mutable=[COLLECTION]
            )
            return losses.cross_entropy(network(x), labels).mean(), advanced[COLLECTION]

        (loss, lip), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), lip, opt_state, loss

    params, lip = variables["params"], variables[COLLECTION]
    opt_state = optimizer.init(params)
    network = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    apply = jax.jit(lambda net, x: net(x))
    return lambda: step(params, lip, opt_state)[3], lambda: apply(network, x)


# --- the papers' formulation


class TorchLayer:
    """One SOC layer: raw filter, power-iteration vectors, bias; forward by p convolutions."""

    def __init__(self, side, channels, features, k, layout):
        self.features, self.k, self.pad, self.layout = features, k, k // 2, layout
        m = self.m = max(channels, features)
        generator = torch.Generator().manual_seed(m)
        self.raw = torch.randn(m, m, k, k, generator=generator).div_(m**0.5).requires_grad_()
        self.bias = torch.zeros(features, requires_grad=True)
        self.u = [torch.randn(n, generator=generator) for n in (m * k, m * k, m, m * k * k)]
        self.cached = None

    def kernel(self, train: bool):
        skew = (self.raw - self.raw.transpose(0, 1).flip(2, 3)) / 2
        m, k = self.m, self.k
        views = (
            skew.permute(0, 2, 1, 3).reshape(m * k, m * k),
            skew.permute(0, 3, 1, 2).reshape(m * k, m * k),
            skew.reshape(m, m * k * k),
            skew.permute(0, 2, 3, 1).reshape(m * k * k, m),
        )
        sigmas = []
        for i, view in enumerate(views):
            with torch.no_grad():
                v = tf.normalize(view.t() @ self.u[i], dim=0)
                u = tf.normalize(view @ v, dim=0)
                if train:
                    self.u[i] = u
            sigmas.append(u @ (view @ v))
        return skew * ((0.7 if k > 1 else 1.0) / torch.stack(sigmas).min())

    def series(self, x, kernel, terms: int):
        total = term = x
        for j in range(1, terms + 1):
            term = tf.conv2d(term, kernel, padding=self.pad) / j
            total = total + term
        return total[:, : self.features]

    def prepare(self, x):
        channels = x.shape[1]
        if channels < self.m:
            x = tf.pad(x, (0, 0, 0, 0, 0, self.m - channels))
        return x.contiguous(memory_format=self.layout)

    def __call__(self, x, train: bool):
        if train:
            kernel = self.kernel(True)
        elif self.cached is None:
            kernel = self.cached = self.kernel(False)
        else:
            kernel = self.cached
        kernel = kernel.contiguous(memory_format=self.layout)
        y = self.series(self.prepare(x), kernel, TRAIN_TERMS if train else EVAL_TERMS)
        return y + self.bias[:, None, None]


def torch_maxmin(x):
    a, b = x.chunk(2, dim=1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def faster_layout(make, run):
    """The layout in which run(make(layout)) is faster, best of three each."""
    taken = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = make(layout)
        run(layer)
        taken[layout] = min(seconds(run, layer) for _ in range(3))
    return min(taken, key=lambda layout: taken[layout])


def torch_net(width: int, batch: int, train: bool):
    layers = []
    for side, channels, features, k in layer_shapes(width):
        x = torch.randn(batch, channels, side, side)

        def run(layer, x=x):
            if not train:
                with torch.no_grad():
                    return layer(x, False)
            layer.raw.grad = None
            return layer(x.detach().requires_grad_(), True).square().sum().backward()

        layout = faster_layout(functools.partial(TorchLayer, side, channels, features, k), run)
        layers.append(TorchLayer(side, channels, features, k, layout))
    head = torch.randn(CLASSES, 32 * width).requires_grad_()

    def forward(x, train):
        for layer in layers:
            x = torch_maxmin(layer(tf.pixel_unshuffle(x, 2), train))
        return tf.normalize(head, dim=1) @ x.flatten(1).t()

    return layers, head, forward


def torch_parts(width: int, batch: int):
    x, labels = torch.rand(batch, 3, 32, 32), torch.randint(0, CLASSES, (batch,))
    layers, head, forward = torch_net(width, batch, train=True)
    optimizer = torch.optim.SGD([p for layer in layers for p in (layer.raw, layer.bias)] + [head], 1e-9, momentum=0.9)

    def step():
        optimizer.zero_grad()
        tf.cross_entropy(forward(x, True).t(), labels).backward()
        optimizer.step()

    _, _, frozen = torch_net(width, batch, train=False)

    def inference():
        with torch.no_grad():
            frozen(x, False)

    return step, inference


# --- plain convolutions of the same shapes


def plain_parts(width: int, batch: int) -> dict:
    """One function per layer and library (and layout): the convolution alone, with the activation of our network."""
    found = {}
    for i, (side, channels, features, k) in enumerate(layer_shapes(width)):
        kernel = jax.random.normal(jax.random.key(i), (k, k, channels, features)) / (k * k * channels) ** 0.5
        x = jax.random.normal(jax.random.key(9 + i), (batch, side, side, channels))
        apply = jax.jit(lambda x, kernel: activations.maxmin(conv.conv2d(x, kernel)))
        found[i, "XLA"] = lambda apply=apply, x=x, kernel=kernel: apply(x, kernel)
        if torch is None:
            continue
        for layout in (torch.contiguous_format, torch.channels_last):
            weight = torch.randn(features, channels, k, k).contiguous(memory_format=layout)
            image = torch.randn(batch, channels, side, side).contiguous(memory_format=layout)

            def run(weight=weight, image=image, k=k):
                with torch.no_grad():
                    torch_maxmin(tf.conv2d(image, weight, padding=k // 2))

            found[i, f"torch {str(layout).rpartition('.')[2]}"] = run
    return found


def gflops_of_sgemm(n: int = 1024) -> float:
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * n**3 / min(seconds(product, a, a) for _ in range(5)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="train,inference")
    parser.add_argument("--system-memory", action="store_true")
    args = parser.parse_args()
    if not args.system_memory:
        keep_freed_memory()
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, batch {args.batch}, width {args.width}"
    )
    print(f"a plain sgemm of this run: {gflops_of_sgemm():.0f} GFLOP/s")
    our_step, our_inference = our_parts(args.width, args.batch)
    if torch is None:
        print("PyTorch is not installed: pip install torch for the papers' formulation. Our own times:")
        step = inference = None
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        step, inference = torch_parts(args.width, args.batch)
    if "train" in args.parts.split(","):
        found = compare({"ours": our_step} | ({} if step is None else {"papers": step}), args.rounds)
        _show("training step", found)
    if "inference" in args.parts.split(","):
        plain = plain_parts(args.width, args.batch)
        contenders = {"ours": our_inference} | ({} if inference is None else {"papers": inference}) | plain
        found = compare(contenders, args.rounds)
        best = {i: min((found[key], key[1]) for key in plain if key[0] == i) for i in range(5)}
        found = {name: found[name] for name in ("ours", "papers") if name in found}
        found["plain convolutions"] = sum(took for took, _ in best.values())
        _show("inference", found)
        print("  plain, by layer:", ", ".join(f"{1e3 * took:.2f} ms ({which})" for took, which in best.values()))


def _show(title: str, found: dict[str, float]) -> None:
    print(title)
    for name, took in found.items():
        print(f"  {name:20s} {1e3 * took:9.1f} ms   {took / found['ours']:6.2f} x ours")


if __name__ == "__main__":
    main()
