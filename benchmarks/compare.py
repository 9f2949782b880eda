"""Configs compared at equal cost: trains, certifies and attacks one after the other, and keeps every number.

Run: python benchmarks/compare.py layers --workdir=DIR --budget="20 processor minutes"
     python benchmarks/compare.py losses --workdir=DIR --budget="10 epochs" --seeds=0,1 --only=emma,crm
     python benchmarks/compare.py layers --costs
          what each config costs, without training it: benchmarks/results/layers_costs.json
     python benchmarks/compare.py --page
          writes the tables and pictures of docs/layers.md and docs/losses.md from benchmarks/results/
     Other configs: --configs compared:xs,aoc digits, with --results=FILE.json. Fields of all: --config.field=value

A budget is of training steps alone, the same for each config: so many "epochs", "minutes" of the clock, or "processor
minutes", which a busy machine changes less. Minutes become the nearest number of whole epochs, the same for all seeds,
by timing some steps first; less than one epoch is refused. What a config gives in epochs (warm-up, the start of a decay
or of CRM's weight, growth per epoch) becomes the same part of the run.

What was done is skipped: a row of the results for each config, fields, seed and budget. The same command goes on with
what was interrupted, from its last checkpoint: Ctrl-C, SIGTERM, or a kill of this process. A run that fails, or that a
machine without memory kills, has a row that says why; --again tries it again. Several comparisons may write one results
file. How much is attacked does not make another row: take a row out of its file, and the same command, with other
--config.certify.attack_* fields, certifies and attacks what was trained, in the same --workdir.
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from compare_results import PAGES, ROOT, STUDIES, Results, locked, write_pages

from lipjax.errors import UserError, run_command
from lipjax.evaluation import records
from lipjax.evaluation.compare import read_compared
from lipjax.files import write_json
from lipjax.training.config_file import read_config

WORK_LEFT, INTERRUPTED = os.EX_TEMPFAIL, 130
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Fields that are counted in epochs, and factors per epoch.
_IN_EPOCHS = {"optimizer.warmup_epochs": float, "optimizer.decay_from": float, "loss.weight_start_epoch": round}
_PER_EPOCH = ("loss.weight_growth", "loss.radius_growth")
_UNITS = ("epochs", "minutes", "processor minutes")


class Stopped(BaseException):
    """A signal or a child that a signal has stopped ends the comparison; code: the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def parse_budget(text: str) -> tuple[float, str]:
    """(amount, unit) of "10 epochs", "20 minutes" or "4 processor minutes". Raises: UserError for anything else."""
    amount, _, unit = text.strip().partition(" ")
    unit = unit.strip() if unit.endswith("s") else f"{unit.strip()}s"
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if unit not in _UNITS or not 0 < value < float("inf") or (unit == "epochs" and value != int(value)):
        raise UserError(f'--budget: expected "10 epochs", "20 minutes" or "4 processor minutes", got {text!r}.')
    return value, unit


def epochs_within(amount: float, unit: str, step: dict[str, float] | None) -> int:
    """The nearest number of whole epochs. step: seconds and processor_seconds of one, and steps_per_epoch; for minutes.

    Raises: UserError if the budget is less than one epoch.
    """
    if step is None or unit == "epochs":
        return int(amount)
    each = step["seconds"] if unit == "minutes" else step["processor_seconds"]
    epoch = each * step["steps_per_epoch"] / 60
    if amount < epoch:
        raise UserError(f"--budget: expected at least an epoch, which takes {epoch:.3g} {unit}, got {amount:g} {unit}.")
    return round(amount / epoch)


def fields_of_budget(config: Any, epochs: int) -> list[str]:
    """Arguments that make a config as long as the budget; validations at twenty places, and saves in between."""
    found = {"num_epochs": epochs, "checkpoint.every_epochs": max(1, epochs // 20), "checkpoint.every_steps": 50}
    longer = epochs / config.num_epochs
    for name in (*_IN_EPOCHS, *_PER_EPOCH):
        group, field = name.split(".")
        if field in config[group]:
            value = config[group][field]
            found[name] = _IN_EPOCHS[name](value * longer) if name in _IN_EPOCHS else value ** (1 / longer)
    return [f"--config.{name}={value}" for name, value in found.items()]


def run_child(command: Sequence[str]) -> tuple[int, str]:
    """Runs a command in the repository. Returns: its exit code, and what it printed at the end.

    A signal that ends this process is handed on, and waited for: what is trained is saved.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as child:
        try:
            output = ""
            for line in child.stdout or ():
                print(line, end="", flush=True)
                output = (output + line)[-4000:]
        except BaseException:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
    return child.returncode, output


def provenance() -> dict[str, Any]:
    """Commit, hardware, and how busy the machine is: the mean number of processes that want to run, in a minute."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "lipjax", "configs", "benchmarks/*.py")
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    model = next(iter(names), platform.processor() or platform.machine())
    return {
        "commit": git("rev-parse", "--short=7", "HEAD") + (" and changes" if changed else ""),
        "hardware": f"{os.cpu_count()} cores, {model}",
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def fields_for_key(fields: Iterable[str]) -> list[str]:
    """The fields that say what is measured: not where data lies, nor how much is attacked, which has a column."""
    elsewhere = ("--config.data.data_dir=", "--config.data.download", "--config.checkpoint.", "--config.certify.attack")
    return sorted(field for field in fields if not field.startswith(elsewhere))


def compare(
    configs: Sequence[str],
    budget: tuple[float, str],
    seeds: Sequence[int],
    fields: Sequence[str],
    results: Results,
    workdir: pathlib.Path,
    again: bool = False,
    child=run_child,
) -> list[str]:
    """Runs what has no row yet, one after the other, the first seed of all configs first.

    Args: fields: --config.field=value, for all configs. child: `run_child`.
    Returns: names of the runs that failed. Raises: Stopped if a run was stopped by a signal.
    """
    failed = []
    for seed in seeds:
        for config in configs:
            key = {"config": config, "fields": fields_for_key(fields), "seed": seed}
            key["budget"] = "{:g} {}".format(*budget)
            found = results.find(key)
            name = f"{config}, seed {seed}, {key['budget']}"
            if found is not None and not (again and "failed" in found):
                print(f"{name}: done already.", flush=True)
                continue
            print(f"{name}: begins.", flush=True)
            row = one_run(key, budget, fields, workdir, child, results)
            results.put(key, {**row, **key})
            if "failed" in row:
                failed.append(f"{name}: {row['failed']}")
    return failed


def measure_costs(
    configs: Sequence[str], fields: Sequence[str], results: Results, again: bool = False, child=run_child
) -> list[str]:
    """Measures what has no row yet, as `compare` does, by benchmarks/costs.py. Returns: names of what failed."""
    failed = []
    for config in configs:
        key = {"config": config, "fields": fields_for_key(fields)}
        found = results.find(key)
        if found is not None and not (again and "failed" in found):
            print(f"{config}: measured already.", flush=True)
            continue
        about = provenance()
        code, output = child([sys.executable, "benchmarks/costs.py", f"--config={config}", *fields])
        row = _failed(code, output, about) if code else {"costs": _last_json(output), **about}
        results.put(key, {**key, "name": variant_of(config), **row})
        if "failed" in row:
            failed.append(f"{config}: {row['failed']}")
    return failed


def variant_of(config: str) -> str:
    return config.partition(":")[2] or config


def _last_json(output: str) -> dict[str, Any]:
    """The last line that a JSON object begins: what a library warns of may stand behind it."""
    return json.loads(next((line for line in reversed(output.splitlines()) if line.startswith("{")), ""))


def _place(workdir: pathlib.Path, key: dict[str, Any]) -> pathlib.Path:
    slug = re.sub(r"[^\w]+", "_", key["config"])
    return workdir / f"{slug}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}"


def one_run(
    key: dict[str, Any],
    budget: tuple[float, str],
    fields: Sequence[str],
    workdir: pathlib.Path,
    child,
    results: Results,
) -> dict[str, Any]:
    """Trains, certifies and measures one run, or goes on with it. Returns: its row without the key.

    Its directory holds plan.json: how many epochs, where it began, and the commits of all sessions. The epochs are
    those of a row of another seed; without one, what they were read from lies beside the directories, for all seeds.
    """
    about = provenance()
    python, wanted = sys.executable, f"--config={key['config']}"
    config, _ = read_config(key["config"], list(fields))
    directory = _place(workdir, key)
    plan_file = directory / "plan.json"
    if plan_file.exists():
        plan = json.loads(plan_file.read_text())
    else:
        step, seedless = None, {name: value for name, value in key.items() if name != "seed"}
        known = results.find(seedless, having="epochs")
        if known is None and budget[1] != "epochs":
            timed = _place(workdir, seedless).with_suffix(".json")
            with locked(timed):
                if not timed.exists():
                    code, output = child([python, "benchmarks/costs.py", "--steps", wanted, *fields])
                    if code:
                        return _failed(code, output, about)
                    write_json(timed, _last_json(output))
            step = json.loads(timed.read_text())
        try:
            epochs = known["epochs"] if known else epochs_within(*budget, step)
            plan = {"epochs": epochs, "step": step, "about": about, "commits": []}
        except UserError as error:
            return {"failed": str(error), **about}
        directory.mkdir(parents=True, exist_ok=True)
    plan["commits"] = list(dict.fromkeys([*plan["commits"], about["commit"]]))
    write_json(plan_file, plan)
    about = {**plan["about"], "commit": ", ".join(plan["commits"])}
    arguments = [wanted, *fields, *fields_of_budget(config, plan["epochs"]), f"--config.seeds=({key['seed']},)"]
    code, output = child([python, "-m", "lipjax", "train", *arguments, f"--workdir={directory}"])
    if code:
        return _failed(code, output, about)
    code, output = child([python, "benchmarks/costs.py", str(directory)])
    if code:
        return _failed(code, output, about)
    run = read_compared(directory)
    row = records.record(variant_of(key["config"]), run.seed, run.config["loss.epsilon"], run.report, directory)
    command = shlex.join(["lipjax", "train", *(a for a in arguments if not a.startswith("--config.data.data_dir="))])
    costs = json.loads((directory / "costs.json").read_text())
    return {**row, "costs": costs, "epochs": plan["epochs"], "command": command, **about}


def _failed(code: int, output: str, about: dict[str, Any]) -> dict[str, Any]:
    """The row of a run that failed. Raises: Stopped if it did not fail, but was stopped."""
    if code in (WORK_LEFT, INTERRUPTED) or -code in STOPS:
        raise Stopped(code if code > 0 else 128 - code)
    if code < 0:  # SIGKILL: too little memory, for one
        return {"failed": f"ended by signal {-code} ({signal.strsignal(-code)})", **about}
    last = (output.strip().splitlines() or [f"exit code {code}"])[-1]
    return {"failed": last.removeprefix("Error: "), **about}


def _stop(number: int, frame: Any) -> None:
    del frame
    raise Stopped(128 + number)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=tuple(STUDIES), help="a list of configs by name")
    parser.add_argument("--configs", nargs="+", default=[], help="configs in the place of a study's, or beside them")
    parser.add_argument("--only", default="", help="names of variants, by commas: the others are left out")
    parser.add_argument("--results", type=pathlib.Path, help="default: benchmarks/results/STUDY.json")
    parser.add_argument("--workdir", type=pathlib.Path, help="where runs lie; kept until they are done, at least")
    parser.add_argument("--budget", default="10 epochs", help='"10 epochs", "20 minutes" or "4 processor minutes"')
    parser.add_argument("--seeds", default="0", help="by commas")
    parser.add_argument("--costs", action="store_true", help="of a training step, freezing, proof and inference alone")
    parser.add_argument("--again", action="store_true", help="runs that failed are tried again")
    parser.add_argument("--page", action="store_true", help="write the tables and pictures of docs/, and run nothing")
    arguments, fields = parser.parse_known_args(argv)
    unknown = [field for field in fields if not field.startswith("--config.")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.page:
        write_pages(ROOT / page for page in PAGES)
        return
    configs = STUDIES.get(arguments.study, []) + arguments.configs
    only = [name for name in arguments.only.split(",") if name]
    configs = [c for c in configs if not only or re.split("[:,]", c)[-1] in only]
    study = arguments.study and f"{arguments.study}{'_costs' if arguments.costs else ''}"
    path = arguments.results or (study and ROOT / "benchmarks" / "results" / f"{study}.json")
    if not configs or not path or not (arguments.costs or arguments.workdir):
        parser.error("give a study, or --configs with --results, and --workdir")
    signal.signal(signal.SIGTERM, _stop)
    results, again = Results(path), arguments.again
    if arguments.costs:
        failed = measure_costs(configs, fields, results, again)
    else:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        workdir = arguments.workdir.expanduser().absolute()
        failed = compare(configs, parse_budget(arguments.budget), seeds, fields, results, workdir, again)
    if failed:
        raise UserError("these runs failed:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    try:
        sys.exit(run_command(lambda: main(sys.argv[1:]), "Interrupted. The same command goes on."))
    except Stopped as stopped:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(stopped.code)
