"""One training step of LiResNet L6W64 with the recipe of 2024: ours against a formulation in PyTorch, in one process.

Run: python benchmarks/liresnet.py [--rounds=7]        (on one core: taskset -c 0 python ...)
Needs PyTorch beside requirements.txt (pip install torch); without it only our own times are shown.

The network is that of configs/cifar10_recipe_small.py: 821,514 parameters, batch 128, 3 power iterations a step; the
formulation is torch_liresnet.py, with NAdam, clipping and Lookahead, in both memory layouts (NCHW and NHWC). Neither
side augments images, and both take the same ones. Before anything is timed, logits and losses of both are compared for
the same random parameters. Medians over rounds in which every contender runs once, of time and of processor time, which
tells more where other work runs beside.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from made_up import made_up_run, random_batch
from memory import keep_freed_memory
from optional_torch import torch
from torch_liresnet import LiResNet

from lipjax.nn import COLLECTION
from lipjax.training import config_file, step
from lipjax.training.choices import update

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 7, "In each, every contender takes one step.")
EPSILON = 0.1
# Largest difference of logits, and of losses, over the largest: sums in another order.
ALLOWED = 1e-5


def random_parameters(params):
    """Random numbers in the shapes of ours: kernels and matrices of norms about 1, biases and factors near 0 and 1."""
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        z, name = rng.standard_normal(leaf.shape), path[-1].key
        if name in ("bias", "gamma"):
            return np.float32(0.1 * z + (name == "gamma"))
        fan_in = leaf.shape[-1] if leaf.ndim < 4 else np.prod(leaf.shape[:-1])  # (out, in), HWIO
        return np.float32(z * fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(drawn, params)


def compared(run, state, images, labels) -> dict[str, LiResNet]:
    """The formulation in both layouts, whose logits and losses are ours for the same parameters."""
    config, model = run.config, run.model
    params, vectors = jax.device_get((state.params, state.lip["vectors"]))
    rate, eps = config.optimizer.learning_rate, config.optimizer.eps
    pixels = np.asarray(images, np.float32) / run.pixel_max

    @jax.jit
    def ours(params, lip, pixels):
        variables = {"params": params, COLLECTION: lip}
        network, advanced = model.apply(variables, True, method="build", mutable=[COLLECTION])
        constants, _ = step.estimate_constants(network, advanced[COLLECTION], config.power_iterations, "product")
        logits = network(pixels)
        return logits, step.LOSSES[config.loss.name].apply(
            config.loss, step.Seen(logits, labels, constants["lipschitz"]), {"epsilon": EPSILON}
        ).mean()

    expected, expected_loss = map(np.asarray, ours(state.params, state.lip, pixels))
    targets, found = torch.tensor(np.asarray(labels)).long(), {}
    for layout in ("NCHW", "NHWC"):
        net = LiResNet(
            model,
            params,
            vectors,
            torch.device("cpu"),
            num_iters=config.power_iterations,
            optimizer=lambda p: torch.optim.NAdam(p, rate, eps=eps),
            clip_norm=config.optimizer.clip_norm,
            lookahead_period=config.optimizer.lookahead_period,
            channels_last=layout == "NHWC",
        )
        batch = torch.tensor(pixels.transpose(0, 3, 1, 2)).contiguous(memory_format=net.format)
        logits = net.logits(net.build(), batch).detach().numpy()
        off = np.abs(logits - expected).max() / np.abs(expected).max()
        off_loss = abs(float(net.loss(batch, targets, EPSILON).detach()) / expected_loss - 1)
        print(f"{layout}: logits off by {off:.1e}, loss by {off_loss:.1e}", flush=True)
        assert max(off, off_loss) < ALLOWED, f"the formulation in {layout} is another network: {off}, {off_loss}"
        found[f"PyTorch, {layout}"] = lambda net=net, batch=batch: net.step(batch, targets, EPSILON).item()
    return found


def main(argv):
    del argv
    keep_freed_memory()
    config, _ = config_file.read_config("cifar10_recipe_small", [])
    update(config, {"data.crop_padding": 0, "data.flip": False})
    run = made_up_run(config)
    images, labels = random_batch(run)
    state = run.fresh_state()
    carried = {"state": dataclasses.replace(state, params=jax.device_put(random_parameters(state.params)))}
    train_step = jax.jit(
        step.make_train_step(run.model, run.optimizer, config, run.mesh, run.pixel_max), donate_argnums=0
    )

    def ours() -> float:
        carried["state"], metrics = train_step(carried["state"], images, labels, {"epsilon": EPSILON})
        return float(metrics["loss"])

    contenders: dict[str, Any] = {"ours": ours}
    if torch is not None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        contenders |= compared(run, carried["state"], images, labels)
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
