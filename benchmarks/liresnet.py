"""One training step of LiResNet L6W64 with the recipe of 2024: ours against a formulation in PyTorch, in one process.

Run: python benchmarks/liresnet.py [--rounds=7]        (on one core: taskset -c 0 python ...)
Needs PyTorch beside requirements.txt (pip install torch); without it only our own times are shown.

The network is that of configs/cifar10_recipe_small.py: 821,514 parameters, batch 128, 3 power iterations a step. The
formulation follows the papers and what is known of their code: blocks as x + convolution, centred; power iterations of
all blocks as one grouped convolution; Cholesky orthogonalisation with its gradient in closed form; EMMA; NAdam with
clipping and Lookahead. It runs in both memory layouts (NCHW and NHWC). Neither side augments images, and both take the
same ones. Before anything is timed, the logits of both are compared for the same parameters. Medians over rounds in
which every contender runs once, of time and of processor time, which tells more where other work runs beside.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from made_up import made_up_run, random_batch
from memory import keep_freed_memory
from optional_torch import tf, torch

from lipjax import interop
from lipjax.training import config_file, step
from lipjax.training.choices import update

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 7, "In each, every contender takes one step.")
DEPTH, WIDTH, FEATURES, DENSE, CLASSES, ITERATIONS, EPSILON = 6, 64, 256, 4, 10, 3, 0.1


def parameters() -> dict[str, np.ndarray]:
    """Random parameters and running means, named and laid out as those of the original `GloroNet`."""
    rng = np.random.default_rng(0)
    shapes = {
        "stem.0.weight": (WIDTH, 3, 5, 5),
        "conv.weights": (DEPTH, WIDTH, WIDTH, 3, 3),
        "neck.kernel": (WIDTH, 16 * WIDTH),
        "neck.weight": (FEATURES, 16 * WIDTH),
        "linear.weights": (DENSE, FEATURES, FEATURES),
        "head.weight": (CLASSES, FEATURES),
    }
    found = {
        name: rng.standard_normal(s) / np.prod(s[-3:] if len(s) > 3 else s[-1:]) ** 0.5 for name, s in shapes.items()
    }
    found["conv.gamma"], found["linear.gamma"] = np.ones((DEPTH, WIDTH, 1, 1, 1)), np.ones((DENSE, FEATURES, 1))
    biases = {
        "stem.0": (WIDTH,),
        "conv": (DEPTH, WIDTH),
        "neck": (FEATURES,),
        "linear": (DENSE, FEATURES),
        "head": (10,),
    }
    found |= {f"{name}.bias": np.zeros(shape) for name, shape in biases.items()}
    found["conv.running_mean"] = np.zeros((DEPTH, WIDTH))
    return {name: array.astype(np.float32) for name, array in found.items()}


class Formulation:
    """The training step in PyTorch. layout: of images, "NCHW" or "NHWC"."""

    def __init__(self, arrays: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray, layout: str):
        self.format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        self.p = {n: torch.tensor(a, requires_grad=True) for n, a in arrays.items() if n != "conv.running_mean"}
        self.mean = torch.tensor(arrays["conv.running_mean"])
        self.optimizer = torch.optim.NAdam(self.p.values(), lr=1e-5)
        self.slow = {name: tensor.detach().clone() for name, tensor in self.p.items()}
        pixels = torch.tensor(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        self.images, self.labels = pixels.contiguous(memory_format=self.format), torch.tensor(labels).long()
        self.vectors = torch.ones(1, 3, 32, 32), torch.ones(1, DEPTH * WIDTH, 16, 16)
        self.steps = 0

        class Orthogonal(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                gram = x @ x.mT
                ridge = 1e-3 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
                lower = torch.linalg.cholesky(gram + ridge[..., None, None] * torch.eye(gram.shape[-1]))
                w = torch.linalg.solve_triangular(lower, x, upper=False)
                ctx.save_for_backward(lower, w)
                return w

            @staticmethod
            def backward(ctx, *gradients):
                lower, w = ctx.saved_tensors
                of_x = torch.linalg.solve_triangular(lower.mT, gradients[0], upper=True)
                half = torch.tril(lower.mT @ torch.tril(-of_x @ w.mT))
                whole = half + torch.tril(half, -1).mT
                return torch.linalg.solve_triangular(lower.mT, whole @ w, upper=True) + of_x

        self.orthogonal = Orthogonal.apply

    def constant(self, blocks) -> Any:
        """The product of the norms of stem and blocks, by power iteration from the last vectors."""
        identity = torch.zeros(WIDTH, WIDTH, 3, 3)
        identity[range(WIDTH), range(WIDTH), 1, 1] = 1
        kernel, stem = (blocks + identity).reshape(-1, WIDTH, 3, 3), self.p["stem.0.weight"]
        v, w = self.vectors
        with torch.no_grad():
            for _ in range(ITERATIONS):
                v = tf.conv_transpose2d(
                    tf.conv2d(v, stem, stride=2, padding=2), stem, stride=2, padding=2, output_padding=1
                )
                v = v / v.norm()
                w = tf.conv_transpose2d(tf.conv2d(w, kernel, padding=1, groups=DEPTH), kernel, padding=1, groups=DEPTH)
                w = w.reshape(DEPTH, -1)
                w = (w / w.norm(dim=1, keepdim=True)).reshape(1, -1, 16, 16)
        self.vectors = v, w
        of_blocks = tf.conv2d(w, kernel, padding=1, groups=DEPTH).reshape(DEPTH, -1).norm(dim=1)
        return tf.conv2d(v, stem, stride=2, padding=2).norm() * of_blocks.prod()

    def logits(self, blocks) -> tuple[Any, Any, Any]:
        """(logits, normalised rows of the head, means of the blocks) of a step, in which means are the batch's."""
        p = self.p

        def minmax(x):
            first, second = x.chunk(2, dim=1)
            return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)

        x = minmax(tf.conv2d(self.images - 0.5, p["stem.0.weight"], p["stem.0.bias"], stride=2, padding=2))
        means = []
        for i in range(DEPTH):
            added = tf.conv2d(x, blocks[i].contiguous(memory_format=self.format), padding=1)
            means.append(added.mean((0, 2, 3)))
            x = minmax(x + added + (p["conv.bias"][i] - means[-1])[None, :, None, None])
        x = tf.conv2d(x, self.orthogonal(p["neck.kernel"]).reshape(WIDTH, WIDTH, 4, 4), stride=4).flatten(1)
        x = minmax(tf.linear(x, self.orthogonal(p["neck.weight"]), p["neck.bias"]))
        dense = torch.eye(FEATURES) + DENSE**-0.5 * p["linear.gamma"] * p["linear.weights"]
        for matrix, bias in zip(self.orthogonal(dense), p["linear.bias"], strict=True):
            x = minmax(tf.linear(x, matrix, bias))
        rows = tf.normalize(p["head.weight"], dim=1)
        return tf.linear(x, rows, p["head.bias"]), rows, torch.stack(means)

    def blocks(self) -> Any:
        return DEPTH**-0.5 * self.p["conv.gamma"] * self.p["conv.weights"]

    def step(self) -> float:
        blocks = self.blocks()
        constant = self.constant(blocks)
        logits, rows, means = self.logits(blocks)
        differences = (rows[self.labels][:, None] - rows[None]).square().sum(-1).clamp(min=1e-20).sqrt()
        own = tf.one_hot(self.labels, CLASSES).bool()
        z = logits - logits.gather(1, self.labels[:, None])
        reach = EPSILON * constant * differences
        part = (-z / reach.clamp(min=1e-8)).clamp(0.01, 1).detach()
        loss = tf.cross_entropy(torch.where(own, torch.zeros(()), z + part * reach), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.p.values(), 3.0)
        self.optimizer.step()
        self.mean = 0.9 * self.mean + 0.1 * means.detach()
        self.steps += 1
        if self.steps % 6 == 0:
            with torch.no_grad():
                for name, tensor in self.p.items():
                    self.slow[name] += 0.5 * (tensor - self.slow[name])
                    tensor.copy_(self.slow[name])
        return loss.item()


def main(argv):
    del argv
    keep_freed_memory()
    config, _ = config_file.read_config("cifar10_recipe_small", [])
    update(config, {"data.crop_padding": 0, "data.flip": False})
    run = made_up_run(config)
    images, labels = random_batch(run)
    arrays = parameters()
    train_step = jax.jit(
        step.make_train_step(run.model, run.optimizer, config, run.mesh, run.pixel_max), donate_argnums=0
    )
    carried = {"state": run.fresh_state()}

    def ours() -> float:
        carried["state"], metrics = train_step(carried["state"], images, labels, {"epsilon": EPSILON})
        return float(metrics["loss"])

    contenders: dict[str, Any] = {"ours": ours}
    if torch is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        options = {"depth": DEPTH, "width": WIDTH, "out_dim": FEATURES, "mlp_depth": DENSE}
        model, variables = interop.from_torch("liresnet", arrays, **options)
        network = model.apply(variables, True, method="build", mutable=["lip"])[0]
        expected = np.asarray(jax.jit(lambda x: network(x))(np.asarray(images, np.float32) / 255))
        for layout in ("NCHW", "NHWC"):
            theirs = Formulation(arrays, np.asarray(images), np.asarray(labels), layout)
            found = theirs.logits(theirs.blocks())[0].detach().numpy()
            difference = np.abs(found - expected).max() / np.abs(expected).max()
            assert difference < 1e-3, f"the formulation in {layout} is another network: {difference}"
            contenders[f"PyTorch, {layout}"] = theirs.step
    times: dict[str, list] = {name: [] for name in contenders}
    for turn in range(FLAGS.rounds + 1):
        for name, contender in contenders.items():
            start, used = time.perf_counter(), time.process_time()
            contender()
            if turn:  # the first compiles
                times[name].append((time.perf_counter() - start, time.process_time() - used))
    print(
        f"{len(os.sched_getaffinity(0))} cores, jax {jax.__version__}, torch {torch and torch.__version__}, batch 128"
    )
    for name, found in times.items():
        wall, used = (statistics.median(column) for column in zip(*found, strict=True))
        ratios = [statistics.median(a[k] / b[k] for a, b in zip(times["ours"], found, strict=True)) for k in (0, 1)]
        spent = f"{1e3 * wall:8.0f} ms, processor {1e3 * used:8.0f} ms"
        print(f"{name:14s} {spent}; ours takes {ratios[0]:.3f}, {ratios[1]:.3f} of it")


if __name__ == "__main__":
    app.run(main)
