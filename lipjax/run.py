"""The work of train.py: trains, certifies and reports all seeds of a config."""

import json
import os
import pathlib

import jax
from rich.console import Console

from lipjax.certify.float64 import host_device
from lipjax.errors import UserError
from lipjax.evaluation import table as reports
from lipjax.evaluation.evaluate import certify_run
from lipjax.files import write_json
from lipjax.training import cluster, compile_cache, lock, stopping, warm_start
from lipjax.training.config import validate
from lipjax.training.loop import Run, train
from lipjax.training.same_run import plain
from lipjax.training.terminal import Terminal, progress_of


def run(config, workdir: str | os.PathLike, quiet: bool = False) -> dict:
    """Trains, certifies and reports every seed of a config; resumes what an earlier call on the same directory began.

    With one seed everything lies in workdir; with several, in workdir/seed_<n>, and workdir/report.json sums up.
    Of several processes all train, and process 0 writes and certifies while the others wait.
    Args: config: of `training.config.default_config`. quiet: prints the final table and warnings only.
    Returns: the report that is written to workdir/report.json; {} in other processes than 0.
    Raises: `stopping.Preempted` if a signal stopped it before its end.
    """
    validate(config)
    cluster.check_joined()
    host_device()  # certification needs it: better to know before training
    workdir, first = pathlib.Path(workdir).expanduser(), jax.process_index() == 0
    console = Terminal(quiet=quiet, silent=not first)
    _check_agreement(config)
    with lock.exclusive(workdir) as writable, compile_cache.kept_programs(config.compilation_cache):
        return _run(config, workdir, console) if writable else _look(config, workdir, console)


def _run(config, workdir: pathlib.Path, console: Console) -> dict:
    several, first = len(config.seeds) > 1, jax.process_index() == 0
    _check_layout(workdir, several)
    found = []
    if config.init_from and several:  # better to know before the first one has trained
        for seed in config.seeds:
            warm_start.check_images(config.init_from, Run(config, seed).data_identity)
    for seed in config.seeds:
        directory = workdir / f"seed_{seed}" if several else workdir
        trained = train(config, directory, seed, console=console)
        if seed == config.seeds[-1]:
            stopping.end_of_training()
        found.append(certify_run(directory, config, seed, trained, console))
        if first:
            reports.print_table(found[-1], console)
        cluster.wait(f"certified {seed}")
    if not first:
        return {}
    report = found[0]
    if several:
        report = reports.summarize(found)
        write_json(workdir / "report.json", report)
        reports.print_table(report, console)
    folders = "seed_*/" if several else ""
    files = f"{folders}certificate.json, {folders}certified_accuracy.png, report.json"
    progress_of(console).print(f"Written to {workdir}: {files}")
    return report


def _look(config, workdir: pathlib.Path, console: Console) -> dict:
    """`_run` for a directory that cannot be written: says what lies there.

    Returns: report.json. Raises: UserError if the runs are not trained to the end and certified.
    """
    several = len(config.seeds) > 1
    _check_layout(workdir, several)
    for seed in config.seeds:
        train(config, workdir / f"seed_{seed}" if several else workdir, seed, False, console)
    try:
        report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{workdir} is not certified, and cannot be written: copy it to where it can.") from error
    if jax.process_index() == 0:
        reports.print_table(report, console)
    console.print(f"{workdir} cannot be written: its certificate and reports are left as they are.")
    return report


def _check_agreement(config) -> None:
    """Raises: UserError if processes of the run have other code or another config."""
    cluster.check_agreement({"the code and its packages": cluster.code_identity()})
    groups = plain(config)
    data = groups["data"]
    for group, field in ((data, "data_dir"), (data, "download"), (data["generated"], "cache_dir")):
        del group[field]  # may be another on each machine; the images are compared
    cluster.check_agreement({f"config.{name}": value for name, value in groups.items()})


def _check_layout(workdir: pathlib.Path, several: bool) -> None:
    """Raises: UserError if the directory holds one run and several are asked for, or the other way round."""
    one, more = (workdir / "config.json").exists(), any(workdir.glob("seed_*/config.json"))
    if one and several or more and not several:
        holds, asked = ("one run", "several seeds") if several else ("runs of several seeds", "one seed")
        raise UserError(f"{workdir} holds {holds}, but config.seeds asks for {asked}: choose another --workdir.")
