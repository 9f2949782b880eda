"""The command `lipjax plan`: reads a config, plans a step for each topology and prints the table."""

import os
from collections.abc import Iterable
from typing import Any

import jax
from rich.console import Console

from lipjax.errors import UserError
from lipjax.plan.chips import parse_topology
from lipjax.plan.plan import _NO_HARDWARE, make_plan
from lipjax.training import config_file


def read_config(name: str, overrides: list[str]) -> Any:
    """The config of a file, with fields set as train.py sets them. overrides: --config.field=value, ...

    Raises: UserError for a file or field that does not exist.
    """
    config, rest = config_file.read_config(name, overrides)
    if rest:
        raise UserError(f"unexpected arguments {rest}; fields are set as --config.field=value")
    return config


def run_plans(config: Any, topologies: Iterable[str], images_per_chip: int | None, console: Console) -> None:
    """Plans a config for topologies, by name, and prints a Markdown table with a column for each.

    Args: images_per_chip: sets config.batch_size to so many times the chips, for weak scaling; None: as configured.
    Raises: UserError if a step does not fit, when all is printed; see also `make_plan`.
    """
    from lipjax.plan.table import advice, table, warning  # here, because it is made of plans

    parsed = [parse_topology(name) for name in topologies]
    os.environ.update({name: value for name, value in _NO_HARDWARE.items() if name not in os.environ})
    try:  # a process that has its devices already keeps them
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(topology.count for topology in parsed))
    except RuntimeError:
        pass
    plans = []
    for topology in parsed:
        with config.unlocked():
            if images_per_chip is not None:
                config.batch_size = images_per_chip * topology.count
        console.print(f"Compiling the training step for {topology.name} ...", markup=False)
        plans.append(make_plan(config, topology))
        console.print(f"... {plans[-1].compile_seconds:.0f} s", markup=False)
    console.print(table(plans), markup=False)
    for plan in plans:
        if text := warning(plan):
            console.print(text, markup=False)
    problems = [advice(plan, config) for plan in plans if not plan.fits]
    if problems:
        raise UserError("\n".join(problems))
