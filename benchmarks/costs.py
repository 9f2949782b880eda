"""Costs of a config: a training step and its parametrisation's part, the frozen network, the proof of its norms.

Run: python benchmarks/costs.py --config=compared:xs,1x1,aoc [--config.field=value ...]
          of the network as it is initialised; with --steps of a training step alone
     python benchmarks/costs.py DIR
          of a run that is trained and certified; written to DIR/costs.json, too
Prints a JSON object in the last line. Seconds are of the processor, of all threads, which other work on the machine
changes less than seconds of the clock, but changes. After a call that compiles: of a training step and of its
parametrisation the median of five, of freezing and of the frozen network the best of five. The proof is timed once,
from an empty cache. Training and the frozen network are timed in float32, freezing and the proof in float64.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lipjax
from lipjax.certify.float64 import float64_on_cpu, host_float64
from lipjax.errors import UserError, run_command
from lipjax.evaluation.evaluate import test_images
from lipjax.files import write_json
from lipjax.nn import COLLECTION
from lipjax.training import objective, sharding, step
from lipjax.training.config import load_config
from lipjax.training.config_file import read_config, split_arguments
from lipjax.training.loop import Run, load_best

FILE_NAME = "costs.json"
ROUNDS, BATCH = 5, 256


def call_time(function, *args, of=statistics.median) -> tuple[float, float]:
    """Seconds and processor seconds of a jitted function, each the median (of: min) of five calls after a first one."""
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*args))
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds, processor = (of(values) for values in zip(*found, strict=True))
    return seconds, processor


def step_time(run: Run) -> dict[str, float]:
    """Seconds and processor seconds of a training step, and the number of steps of an epoch.

    Raises: UserError if a value was not finite: such a step changes nothing, nor does any after it.
    """
    train_batch = run.batch_runner(0)
    schedule = objective.loss_schedule(run.config.loss, 0, run.config.num_epochs)
    held = {"state": run.fresh_state(), "step": 0, "metrics": {}}

    def next_step():  # the state is donated and comes back
        held["state"], held["metrics"] = train_batch(held["state"], held["step"], schedule)
        held["step"] += 1
        return held["state"], held["metrics"]

    with jax.default_matmul_precision(run.config.matmul_precision):
        seconds, processor = call_time(next_step)
    if not held["metrics"]["finite"]:
        raise UserError(f"the first {held['step']} training steps met a value that is not finite: change the config.")
    return {"seconds": seconds, "processor_seconds": processor, "steps_per_epoch": run.steps_per_epoch}


def parametrisation(run: Run) -> float:
    """Processor seconds, of a training step, from parameters to operators with their norm estimates, and back."""
    build = step.make_build(run.model, run.config, run.mesh)

    @jax.jit
    @sharding.spread_over(run.mesh)
    def there_and_back(params, lip):
        built, pull_back, _ = jax.vjp(lambda params: build(params, lip), params, has_aux=True)
        return pull_back(jax.tree.map(jnp.ones_like, built))[0]

    state = run.fresh_state()
    with jax.default_matmul_precision(run.config.matmul_precision):
        return call_time(there_and_back, state.params, state.lip)[1]


def freezing(run: Run, variables) -> float:
    """Processor seconds of building the network in float64."""
    variables = jax.tree.map(host_float64, variables)
    with float64_on_cpu():
        build = jax.jit(lambda v: run.model.apply(v, method="build"))
        return call_time(build, jax.tree.map(jnp.asarray, variables), of=min)[1]


def costs(run: Run, variables, frozen: lipjax.FrozenNetwork) -> dict[str, Any]:
    """All that is measured, for JSON. variables: of the model, that `frozen` was made of."""
    each, made = step_time(run), parametrisation(run)
    start = time.process_time()
    frozen.lipschitz_report()
    proof = time.process_time() - start
    deployed = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), frozen.network)
    images, _ = test_images(run.dataset, np.arange(min(BATCH, run.dataset.size("test"))), BATCH)
    pixels = jnp.asarray(images / run.dataset.pixel_max, jnp.float32)
    inference = call_time(jax.jit(lambda network, x: network(x)), deployed, pixels, of=min)[1]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params)),
        "step": each,
        "epoch_processor_seconds": each["processor_seconds"] * each["steps_per_epoch"],
        "parametrisation_processor_seconds": made,
        "parametrisation_share": made / each["processor_seconds"],
        "images_per_processor_second": len(pixels) / inference,
        "freezing_seconds": freezing(run, variables),
        "proof_seconds": proof,
    }


def of_run(directory: pathlib.Path) -> dict[str, Any]:
    """`costs` of a certified run; written to its directory."""
    config, seed = load_config(directory)
    run = Run(config, seed)
    variables, _, _ = load_best(directory, run)
    found = costs(run, variables, lipjax.FrozenNetwork.load(directory / "frozen"))
    write_json(directory / FILE_NAME, found)
    return found


def of_config(config) -> dict[str, Any]:
    """`costs` of a network as it is initialised."""
    run = Run(config, config.seeds[0])
    state = run.fresh_state()
    variables = {"params": state.params, COLLECTION: state.lip}
    return costs(run, variables, lipjax.freeze(run.model, variables))


def main(arguments: list[str]) -> None:
    name, rest = split_arguments([argument for argument in arguments if argument != "--steps"])
    if name is None:
        for directory in rest:
            print(json.dumps(of_run(pathlib.Path(directory))))
        return
    config, rest = read_config(name, rest)
    if rest:
        raise UserError(f"unexpected arguments {rest}; fields are set as --config.field=value")
    found = step_time(Run(config, config.seeds[0])) if "--steps" in arguments else of_config(config)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), "Interrupted."))
