"""All that is to be known of a device, once one is at hand: speed, memory and correctness of training steps.

Run: python benchmarks/accelerator.py [--minutes=9] [--out=FILE.json] [--cases=...] [--precisions=...] [--small]
It ends within --minutes on whatever device JAX takes first (all of that kind that this process has): a case that would
begin too late is left out and named. Each line is printed when it is known, and stands in FILE, too. Exit code 1 if
a check fails.

The cases are the whole training steps of shipped configs, compiled as training compiles them, on made-up images. In
"float32" products are float32 proper (config.matmul_precision "highest"), in "tf32" what the device makes of float32 by
default (NVIDIA: TF32; TPU: bfloat16; CPU: float32), in "bfloat16" activations are (config.precision). Norm estimates
are float32 proper in all of them.

step: the median of three rounds, each of steps that are handed over without waiting. share: the seconds that the
products and convolutions of the step (`lipjax.plan.flops`) would take at the speeds of plain matrix products of side
--side that this process measures, kind by kind, of the seconds that the step takes. memory: arguments, results and
temporary arrays of the compiled step on each device. PyTorch: the step of torch_liresnet.py, without the augmentation.

check: two steps of a small network of the same layers, the same state and images, here and on the CPU in float32. They
differ by how products are rounded. With u the unit roundoff of a precision, `moved` is the root mean square by which
the CPU's loss moves when all parameters move by +-u of themselves (eight draws): one rounding of one operand of each
product. A sum of n numbers in float32 is off by about sqrt(n) u; the longest has n = pixels of the batch. So step
s = 1, 2 may be off by s sqrt(n) (moved + u loss) with u = 2^-24, and in another precision by 4 s sqrt(R) moved beside
that: its R roundings add up as independent ones do, of which 4 deviations are allowed. R = 6 for the operands of three
products a layer (forward, and two backward); 18 in bfloat16, where results of convolution, bias and activation are
rounded, too. Control: the same network with parameters larger by a part of themselves (`control`) must be off by more.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too

import jax
import jax.numpy as jnp
import numpy as np
import torch_liresnet

from lipjax import bounds, losses
from lipjax._precision import PRODUCTS
from lipjax.nn import COLLECTION
from lipjax.plan import flops
from lipjax.plan.plan import planned_dataset, traced_step
from lipjax.training import config_file, objective, sharding
from lipjax.training.config import validate
from lipjax.training.data import ArrayDataset, Split
from lipjax.training.loop import Run

_RESNET = {"model.depth": 2, "model.width": 8, "model.neck_features": 16, "power_iterations": 2, "batch_size": 8}
_CONVNET = {"model.depth": 5, "model.width": 4, "batch_size": 8}
_CIRCULAR = {"model.padding": "CIRCULAR"}
# Config, what is changed in it, and what makes its network small.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "liresnet": ("liresnet:cifar10", {}, _RESNET),
    "recipe": ("recipe:cifar10", {}, _RESNET | {"model.dense_depth": 1, "data.generated.per_batch": 6}),
    "cayley": ("lipconvnet:cifar10,cayley", {}, _CONVNET),
    "lipconvnet": ("lipconvnet:cifar10", {}, _CONVNET),  # zero padding: the spatial form
    "lipconvnet,auto": ("lipconvnet:cifar10", _CIRCULAR, _CONVNET),
    "lipconvnet,spatial": ("lipconvnet:cifar10", _CIRCULAR | {"model.form": "spatial"}, _CONVNET),
    "lipconvnet,response": ("lipconvnet:cifar10", _CIRCULAR | {"model.form": "response"}, _CONVNET),
    "lipconvnet,series": ("lipconvnet:cifar10", _CIRCULAR | {"model.form": "series"}, _CONVNET),
    "crm": (
        "mnist_4c3f_crm",
        {},
        {"model.variant": "custom", "model.convs": ((4, 4, 2, 1),), "model.dense": (8,), "batch_size": 8},
    ),
}
# In the order in which they are taken: what is measured last is left out first.
PRECISIONS = {
    "tf32": {"matmul_precision": "default", "precision": "float32"},
    "bfloat16": {"matmul_precision": "default", "precision": "bfloat16"},
    "float32": {"matmul_precision": "highest", "precision": "float32"},
}
_ROUNDINGS = {"tf32": 6, "bfloat16": 18}
STEPS, DRAWS, IMAGES = 2, 8, 64  # of checks; images that the data set has


def make_config(case: str, precision: str, small: bool) -> Any:
    """The config of a case; not locked."""
    name, changes, smaller = CASES[case]
    config, _ = config_file.read_config(name, [])
    with config.unlocked():
        for field, value in {**changes, **(smaller if small else {}), **PRECISIONS[precision]}.items():
            group, _, last = field.rpartition(".")
            (config[group] if group else config)[last] = value
    validate(config)
    return config


def unit_roundoff(precision: str, platform: str) -> float:
    """Half the distance from 1 to the next larger number that products see."""
    if precision == "bfloat16" or precision == "tf32" and platform == "tpu":
        return 2.0**-8
    if precision == "tf32" and platform in ("gpu", "cuda", "rocm"):
        return 2.0**-11
    return 2.0**-21 if platform == "tpu" else 2.0**-24  # a TPU's is made of six products of bfloat16 parts


@dataclasses.dataclass
class Step:
    """A compiled training step and what it takes, on some devices."""

    run: Run
    compiled: Any
    arguments: tuple
    operations: dict[str, float]
    compile_seconds: float

    @classmethod
    def make(cls, config, devices: list, images: int = 0) -> "Step":
        """images: that the made-up data set has; 0: as many as the real one."""
        mesh = sharding.make_mesh(-1, config.batch_size, devices=devices)
        planned = planned_dataset(config.data, 0)
        assert isinstance(planned, ArrayDataset)
        rng, count = np.random.default_rng(0), images or planned.size("train")
        pixels = rng.integers(0, planned.pixel_max + 1, (count, *planned.image_shape), dtype=np.uint8)
        labels = rng.integers(0, planned.num_classes, count).astype(np.int32)
        run = Run(config, 0, mesh, dataclasses.replace(planned, train=Split(pixels, labels)))
        start = time.perf_counter()
        traced = traced_step(run)
        with jax.default_matmul_precision(config.matmul_precision):
            compiled = traced.lower().compile()
        took = time.perf_counter() - start
        everywhere, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
        extra = None
        if run.num_generated:
            extra = jax.device_put((pixels[: run.num_generated], labels[: run.num_generated]), split)
        order = np.arange(count, dtype=np.int32)
        schedule = objective.loss_schedule(config.loss, 0, config.num_epochs)
        arguments = (*jax.device_put((pixels, labels, order), everywhere), 0, schedule, extra)
        return cls(run, compiled, arguments, flops.count(traced.jaxpr)[0], took)

    def __call__(self, state):
        return self.compiled(state, *self.arguments)

    @property
    def memory(self) -> int:
        """Bytes on each device; what is donated counts once."""
        stats = self.compiled.memory_analysis()
        parts = (getattr(stats, f"{part}_size_in_bytes") for part in ("argument", "output", "temp"))
        return sum(parts) - stats.alias_size_in_bytes


def seconds(function, least: float) -> float:
    """Median seconds of a call, of three rounds of at least so many seconds together; its results are awaited."""
    jax.block_until_ready(function())
    start = time.perf_counter()
    jax.block_until_ready(function())
    count, rounds = max(1, round(least / 3 / max(time.perf_counter() - start, 1e-6))), []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            found = function()
        jax.block_until_ready(found)
        rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def product_speeds(device, side: int, least: float) -> dict[str, float]:
    """Operations a second of plain matrix products of this side, by `flops.KINDS`; of those that the device has."""
    found = {}
    for kind in flops.KINDS:
        dtype, precision = (jnp.bfloat16, None) if kind == "bfloat16" else (jnp.float32, PRODUCTS.get(kind, kind))
        a = jax.device_put(jnp.full((side, side), 1 / side, dtype), device)
        product = jax.jit(lambda x, precision=precision: jnp.matmul(x, x, precision=precision))
        try:
            found[kind] = 2 * side**3 / seconds(lambda a=a, product=product: product(a), least)
        except (ValueError, jax.errors.JaxRuntimeError):  # CPUs do not multiply by parts
            if kind not in PRODUCTS:
                raise
    return found


def measure(case: str, precision: str, devices: list, speeds: dict[str, float], args) -> dict[str, Any]:
    """Speed and memory of a case's training step."""
    config = make_config(case, precision, args.small)
    step = Step.make(config, devices, IMAGES if args.small else 0)
    state = step.run.fresh_state()

    def one():
        nonlocal state
        state, metrics = step(state)
        return metrics

    took = seconds(one, args.seconds)
    ideal = sum(count / len(devices) / speeds[kind] for kind, count in step.operations.items())
    return {
        "batch": config.batch_size,
        "step_ms": 1e3 * took,
        "images_per_second": config.batch_size / took,
        "share_of_products": ideal / took,
        "tera_operations": sum(step.operations.values()) / 1e12,
        "memory_mib": step.memory / 2**20,
        "compile_s": step.compile_seconds,
        "finite": bool(one()["finite"]),  # False for good once a step met a value that is not
    }


def moved(params, relative: float, seed: int):
    """Every parameter moved by +-relative of itself."""
    rng, signs = np.random.default_rng(seed), np.array([-1, 1], np.float32)
    return jax.tree.map(lambda p: p * (1 + relative * rng.choice(signs, p.shape)), params)


def curve(step: Step, state: Any, change: Callable[[Any], Any] = lambda params: params) -> np.ndarray:
    """The losses of some steps from a state, which is copied."""
    state = jax.tree.map(jnp.copy, dataclasses.replace(state, params=change(state.params)))
    state, found = jax.device_put(state, step.run.shardings), []
    for _ in range(STEPS):
        state, metrics = step(state)
        found.append(float(metrics["loss"]))
    return np.array(found)


@functools.cache
def host_step(case: str) -> tuple[Step, Any, np.ndarray]:
    """(step, state, losses) of a case's small network in float32 on the CPU."""
    host = Step.make(make_config(case, "float32", True), [jax.devices("cpu")[0]], IMAGES)
    state = host.run.fresh_state()
    return host, state, curve(host, state)


@functools.cache
def moved_by(case: str, unit: float) -> np.ndarray:
    """By how much the losses of `host_step` move with parameters that move by +-unit of themselves: (STEPS,)."""
    host, state, expected = host_step(case)
    drawn = [curve(host, state, lambda p, seed=seed: moved(p, unit, seed)) - expected for seed in range(DRAWS)]
    return np.maximum.accumulate(np.sqrt(np.mean(np.square(drawn), axis=0)))


def check(case: str, precision: str, device) -> dict[str, Any]:
    """Two steps of the case's small network here against the CPU's: deviations as parts of what is allowed."""
    host, state, expected = host_step(case)
    here = curve(Step.make(make_config(case, precision, True), [device], IMAGES), state)
    unit = unit_roundoff(precision, device.platform)
    exact = unit_roundoff("float32", device.platform)
    pixels = host.run.config.batch_size * np.prod(host.run.dataset.image_shape[:2])
    allowed = np.sqrt(pixels) * (moved_by(case, exact) + exact * np.abs(expected))
    if unit > exact:
        allowed = allowed + 4 * np.sqrt(_ROUNDINGS[precision]) * moved_by(case, unit)
    allowed = allowed * np.arange(1, STEPS + 1)
    larger = min(1024 * np.sqrt(pixels) * exact, 0.25) if unit == exact else 64 * unit
    other = curve(host, state, lambda params: jax.tree.map(lambda p: p * np.float32(1 + larger), params))
    off, control = (np.max(np.abs(found - expected) / allowed).item() for found in (here, other))
    return {
        "loss_cpu": expected.tolist(),
        "loss_here": here.tolist(),
        "off": off,
        "control": float(larger),
        "control_off": control,
        "agrees": off <= 1,
        "control_fails": control > 1,
    }


def torch_row(precision: str, device, args) -> dict[str, Any]:
    """PyTorch's step of the case "liresnet", and its loss beside ours on the same weights and images."""
    torch = torch_liresnet.torch
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cpu" and device.platform != "cpu":
        return {"left out": "this PyTorch is for CPUs"}
    config = make_config("liresnet", "float32", args.small)
    run = Run(config, 0, sharding.make_mesh(1, config.batch_size, devices=[device]), planned_dataset(config.data, 0))
    state, epsilon = run.fresh_state(), config.loss.epsilon
    rng = np.random.default_rng(0)
    pixels = rng.random((config.batch_size, *run.dataset.image_shape), np.float32)
    labels = rng.integers(0, run.dataset.num_classes, config.batch_size).astype(np.int32)
    network: Any = run.model.apply({"params": state.params, COLLECTION: state.lip}, method="build")

    @jax.jit
    def our_loss(network, vectors, pixels):
        lipschitz, _ = bounds.margin_lipschitz_estimate(network, vectors, config.power_iterations)
        return losses.emma(network(pixels), labels, lipschitz, epsilon).mean()

    with jax.default_matmul_precision("highest"):
        ours = float(our_loss(network, state.lip["vectors"], pixels))
    params, vectors = jax.device_get((state.params, state.lip["vectors"]))
    images = torch.tensor(pixels, device=where).permute(0, 3, 1, 2)  # the channels last in memory
    targets = torch.tensor(labels, device=where).long()
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    net = torch_liresnet.LiResNet(
        run.model,
        params,
        vectors,
        where,
        num_iters=config.power_iterations,
        optimizer=lambda leaves: torch.optim.AdamW(leaves, rate, weight_decay=decay),
    )
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = precision != "float32"
    context = functools.partial(torch.autocast, where.type, torch.bfloat16) if precision == "bfloat16" else None
    loss = float(net.loss(images, targets, epsilon, context).detach())

    def one():
        found = net.step(images, targets, epsilon, context)
        if where.type == "cuda":
            torch.cuda.synchronize()
        return found

    took = seconds(one, args.seconds)
    unit, layers = unit_roundoff(precision, "gpu" if where.type == "cuda" else "cpu"), run.model.depth + 4
    # Sums in another order, or the roundings of the check above, in each layer.
    allowed = 64 * layers * unit if unit < 2**-20 else 4 * (_ROUNDINGS[precision] * layers) ** 0.5 * unit
    return {
        "step_ms": 1e3 * took,
        "images_per_second": config.batch_size / took,
        "loss_ours_float32": ours,
        "loss_torch": loss,
        "agrees": abs(loss - ours) <= allowed * abs(ours),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--side", type=int, default=0, help="of plain products (default: 8192; on a CPU 1024)")
    parser.add_argument("--small", action="store_true", help="small networks for the measurements, too")
    parser.add_argument("--out", default="", help="file for all numbers, JSON")
    args = parser.parse_args(argv)
    args.cases, args.precisions = args.cases.split(";"), args.precisions.split(",")
    for given, known in ((args.cases, CASES), (args.precisions, PRECISIONS)):
        if unknown := set(given) - set(known):
            parser.error(f"expected some of {list(known)}, got {sorted(unknown)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args, start = parse(argv), time.monotonic()
    devices = jax.local_devices()
    side = args.side or (1024 if devices[0].platform == "cpu" else 8192)
    results: dict[str, Any] = {"device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__}
    good, longest = True, {"": 0.0}

    def record(kind: str, name: str, found: dict[str, Any]) -> None:
        results[f"{kind} {name}".strip()] = found
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        )
        print(f"[{time.monotonic() - start:5.0f} s] {kind:8} {name:28} {shown}", flush=True)
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1)

    def attempt(kind: str, name: str, function) -> None:
        """Calls a function that makes a row, if there is time for one as long as the longest of its kind."""
        nonlocal good
        begin = time.monotonic()
        if begin - start + longest.get(kind, 0.0) > 60 * args.minutes:
            record(kind, name, {"left out": "no time"})
            return
        try:
            found = function()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = {"left out": "no memory"}
        except Exception as error:  # a row that cannot be made must not cost the others
            traceback.print_exc()
            found, good = {"failed": f"{type(error).__name__}: {error}"[:300]}, False
        longest[kind] = max(longest.get(kind, 0.0), time.monotonic() - begin)
        good = good and all(found.get(name, True) for name in ("agrees", "control_fails", "finite"))
        record(kind, name, found)

    print(f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}")
    speeds = product_speeds(devices[0], side, args.seconds)
    record("products", f"of side {side}", {f"{kind}_tflops": speed / 1e12 for kind, speed in speeds.items()})
    for precision in args.precisions:
        for case in args.cases:
            attempt("check", f"{case} {precision}", lambda c=case, p=precision: check(c, p, devices[0]))
            attempt("step", f"{case} {precision}", lambda c=case, p=precision: measure(c, p, devices, speeds, args))
            if case == "liresnet" and torch_liresnet.torch is not None:
                attempt("PyTorch", f"{case} {precision}", lambda p=precision: torch_row(p, devices[0], args))
    stats = devices[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        record("memory", "of the process at its peak", {"mib": stats["peak_bytes_in_use"] / 2**20})
    print("All checks hold." if good else "A check FAILED: see above.", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
