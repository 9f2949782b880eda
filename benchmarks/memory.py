"""Memory: what compiled training steps need, by their switches; and what the process does with what it has freed.

Run: python benchmarks/memory.py --config=configs/liresnet.py:cifar10 [--config.batch_size=...] [--steps=TEXT]
Compiles the whole step for the devices that JAX sees and runs nothing. Printed are the seconds to trace and lower and
to compile, the bytes of temporary arrays (what the switches change) and of arguments and results (the state, once: it
is donated), and the FLOPs that XLA counts, for which a loop runs once.

TEXT is comma-separated steps, each made of switches with a + between: plain, bfloat16, accumulationN, rematN, scan.
"""

import ctypes
import os
import re
import sys
import time
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # the numbers of glibc's mallopt
_STEPS = (
    "plain,bfloat16,accumulation8,accumulation8+bfloat16,remat4,"
    "scan,scan+remat1,scan+remat4,scan+remat4+bfloat16,scan+remat4+accumulation8"
)


def keep_freed_memory() -> bool:
    """Makes glibc keep what the process frees, instead of giving it back and clearing pages again at the next step.

    XLA on the CPU allocates its temporary arrays anew at every call, and glibc gives blocks beyond 32 MB back at once:
    a third of the training step of a layer was spent in page faults. Call it before JAX starts its threads.

    Returns: whether it did; False without glibc, where nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))
    )


def switched(config, text: str):
    """The config with the switches of one step, such as "remat4+accumulation8"."""
    changes = {}
    for switch in text.split("+"):
        numbered = re.fullmatch(r"(accumulation|remat)(\d+)", switch)
        if numbered:
            changes[numbered[1]] = int(numbered[2])
        elif switch == "bfloat16":
            changes["precision"] = switch
        elif switch == "scan":
            changes["scan"] = True
        elif switch != "plain":
            sys.exit(f"--steps: expected plain, bfloat16, accumulationN, rematN or scan, got {switch!r}.")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update(changes)
    return config


def compiled_step(config) -> tuple[Any, tuple[float, float]]:
    """The compiled training step of a config on made-up shapes, and the seconds that it took (lowering, compiling)."""
    import jax
    from made_up import abstract_batch, batch_step, made_up_run

    run = made_up_run(config)
    train_step, schedule = batch_step(run)
    start = time.perf_counter()
    with jax.default_matmul_precision(config.matmul_precision):
        lowered = train_step.lower(run.abstract_state, *abstract_batch(run), schedule)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return compiled, (middle - start, time.perf_counter() - middle)


def main(argv):
    """Prints one line for each step of --steps."""
    del argv
    import jax
    from absl import flags

    config = flags.FLAGS.config
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, "
        f"{config.model.name} on {config.data.name}, batch {config.batch_size}"
    )
    print(f"{'':28} {'lower':>7} {'compile':>8} {'temporary':>12} {'state':>10} {'GFLOP':>9}")
    for text in flags.FLAGS.steps.split(","):
        compiled, (lowering, compiling) = compiled_step(switched(config, text))
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        print(
            f"{text:28} {lowering:5.1f} s {compiling:6.1f} s {memory.temp_size_in_bytes / 2**20:8.1f} MiB "
            f"{memory.argument_size_in_bytes / 2**20:6.1f} MiB {cost['flops'] / 1e9:9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    from absl import app, flags
    from ml_collections import config_flags

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    config_flags.DEFINE_config_file("config", "configs/liresnet.py:cifar10", "The experiment whose step is compiled.")
    flags.DEFINE_string("steps", _STEPS, "Steps to compile, comma-separated.")
    app.run(main)
