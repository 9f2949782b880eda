"""Compiles a training step of every family of models for a GPU that is not there, and counts the kernels it starts.

Run: python benchmarks/gpu_compile.py [--topology=h100:1] [--program="lipconvnet, cayley" ...]
Needs XLA's GPU compiler (pip install -e ".[gpu-plan]", in an environment of its own) and no GPU. The networks are those
of `PROGRAMS`, less deep and wide than published ones. A step that does not compile, computes in float64, transforms by
FFT, calls back the host or copies its state is shown, and ends in exit code 1.
"""

import os
import sys
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

from typing import Any

import jax
from absl import app, flags

from lipjax.errors import UserError
from lipjax.plan import hlo
from lipjax.plan.chips import parse_topology
from lipjax.plan.plan import compiled_step, cuda_plugin, planned_run, topology_devices, traced_step
from lipjax.training import config_file
from lipjax.training.choices import update
from lipjax.training.config import default_config

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", "h100:1", "GPUs to compile for, as for `lipjax plan`.")
flags.DEFINE_multi_string("program", [], "Names of PROGRAMS; none: all.")

_CIRCULAR = {"depth": 5, "padding": "CIRCULAR"}
_SMALL = {"depth": 2, "width": 64}
# Per name a shipped config, or a model on CIFAR-10, with its layer; then fields of config.model.
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "liresnet": ("liresnet:cifar10", _SMALL),
    "recipe": ("recipe:cifar10", _SMALL | {"neck_features": 128, "dense_depth": 2}),
    "bronet": ("bronet:cifar10", _SMALL | {"neck_features": 128, "dense_depth": 2}),
    "lipnext, manifold": ("lipnext:cifar10", {"depth": 4, "width": 128}),
    "lipnext, cholesky": ("cifar10_lipnext_small", {"depth": 2}),
    "lipnext, exponential": ("cifar10_lipnext_small", {"depth": 2, "orthogonal": "exponential"}),
    "lipconvnet, soc": ("lipconvnet:cifar10,plain", {"depth": 5}),
    "lipconvnet, soc by response": ("lipconvnet:cifar10,plain", _CIRCULAR | {"form": "response"}),
    "lipconvnet, soc by series": ("lipconvnet:cifar10,plain", _CIRCULAR | {"form": "series"}),
    "lipconvnet, soc exact": ("lipconvnet:cifar10,plain", _CIRCULAR | {"form": "response", "train_terms": None}),
    "lipconvnet, cayley": ("lipconvnet:cifar10,cayley", {"depth": 5}),
    "lipconvnet, mlp": ("lipconvnet:cifar10,mlp", {"depth": 5}),
    "lipconvnet, digits": ("digits_lipconvnet", {}),
    "convnet, 4c3f": ("mnist_4c3f_crm", {}),
    "convnet, 6c2f": ("crm:cifar10", {}),
    **{
        f"compared, {layer}": (f"compared:xs,{layer}", {"block_depth": 2})
        for layer in ("aol", "bcop", "cpl", "cayley", "lot", "sll", "soc")
    },
    **{
        f"potentialnet, {layer}": (f"potentialnet {layer}", {"conv_depth": 2, "dense_depth": 2, "dense_hidden": 256})
        for layer in ("sll", "cpl")
    },
    **{
        f"sandwichnet, {layer}": (f"sandwichnet {layer}", {"widths": (32, 64), "dense_widths": (128,)})
        for layer in ("sandwich", "sandwich_spatial")
    },
    **{
        f"stagednet, {layer}": (f"stagednet {layer}", {"widths": (32, 64), "depths": (1, 1), "dense_widths": (128,)})
        for layer in ("aoc", "bcop", "rko", "sc_fac")
    },
    "concatnet": ("concatnet aol", {"block_depth": 2}),
    "patchnet": ("patchnet aol", {"width": 64, "conv_depth": 2, "dense_depth": 2}),
}
# State that is written to a new place may be what a step hands out besides: metrics, of a few numbers.
_METRICS = 4096


def program_config(name: str) -> Any:
    """The config of one of PROGRAMS."""
    reference, fields = PROGRAMS[name]
    model, _, layer = reference.partition(" ")
    if layer:
        config = default_config(model, layer=layer)
        config.update_from_flattened_dict({"data.name": "cifar10", "data.validation_fraction": 0.02})
    else:
        config, _ = config_file.read_config(reference, [])
    with config.unlocked():
        update(config, {f"model.{field}": value for field, value in fields.items()})
    return config


def faults(compiled: jax.stages.Compiled) -> list[str]:
    """Things that a compiled training step does and none should, in words."""
    memory: Any = compiled.memory_analysis()
    copied = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = hlo.Program(compiled.as_text() or "").unwanted()
    return [*found, *([f"{copied} bytes of outputs take no argument's place"] if copied > _METRICS else [])]


def row(name: str, topology: str) -> tuple[str, list[str]]:
    """A line of the table for one of PROGRAMS, and its faults."""
    config, start = program_config(name), time.perf_counter()
    run = planned_run(config, topology_devices(parse_topology(topology)))
    try:
        compiled = compiled_step(run, traced_step(run))
    except jax.errors.JaxRuntimeError as error:
        return f"| {name} | does not compile |||||", [str(error).splitlines()[0][:300]]
    program = hlo.Program(compiled.as_text() or "")
    kernels = program.kernels()
    memory: Any = compiled.memory_analysis()
    some = " + loops of unknown length" if program.unknown_loops else ""
    cells = [
        name,
        f"{sum(kernels.values()):,}{some}",
        *(f"{kernels.get(kind, 0):,}" for kind in ("library", "triton")),
        f"{memory.temp_size_in_bytes / 2**20:.0f}",
        f"{time.perf_counter() - start:.0f}",
    ]
    return f"| {' | '.join(cells)} |", faults(compiled)


def main(_) -> None:
    if not cuda_plugin():
        sys.exit('XLA\'s GPU compiler is not installed: pip install -e ".[gpu-plan]"')
    unknown = set(FLAGS.program) - set(PROGRAMS)
    if unknown:
        sys.exit(f"--program: expected names of {list(PROGRAMS)}, got {sorted(unknown)}.")
    print("| step | kernels, at least | of libraries | of Triton | temporaries, MiB | compiled in, s |")
    print("|---|---|---|---|---|---|", flush=True)
    failed = False
    for name in FLAGS.program or PROGRAMS:
        try:
            line, wrong = row(name, FLAGS.topology)
        except UserError as error:
            sys.exit(str(error))
        print(line, *(f"FAULT: {fault}" for fault in wrong), sep="\n", flush=True)
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    app.run(main)
