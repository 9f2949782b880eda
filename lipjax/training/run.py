"""What train.py does: all seeds of a config, trained, certified and reported."""

import os
import pathlib

from rich.console import Console

from lipjax.certify import write_json
from lipjax.errors import UserError
from lipjax.frozen import host_device
from lipjax.training import report as reports
from lipjax.training.config import validate
from lipjax.training.evaluate import certify_run
from lipjax.training.loop import train


def run(config, workdir: str | os.PathLike) -> dict:
    """Trains, certifies and reports every seed of a config; resumes what an earlier call on the same directory began.

    With one seed everything lies in workdir; with several, in workdir/seed_<n>, and workdir/report.json sums up.
    Returns: the report that is written to workdir/report.json.
    """
    validate(config)
    host_device()  # certification needs it: better to know before training
    workdir, console = pathlib.Path(workdir).expanduser(), Console(soft_wrap=True, highlight=False)
    several = len(config.seeds) > 1
    _check_layout(workdir, several)
    found = []
    for seed in config.seeds:
        directory = workdir / f"seed_{seed}" if several else workdir
        trained = train(config, directory, seed)
        found.append(certify_run(directory, config, seed, trained, console))
        reports.print_table(found[-1], console)
    report = found[0]
    if several:
        report = reports.summarize(found)
        write_json(workdir / "report.json", report)
        reports.print_table(report, console)
    folders = "seed_*/" if several else ""
    console.print(f"Written to {workdir}: {folders}certificate.json, {folders}certified_accuracy.png, report.json")
    return report


def _check_layout(workdir: pathlib.Path, several: bool) -> None:
    """Raises: UserError if the directory holds one run and several are asked for, or the other way round."""
    one, more = (workdir / "config.json").exists(), any(workdir.glob("seed_*/config.json"))
    if one and several or more and not several:
        holds, asked = ("one run", "several seeds") if several else ("runs of several seeds", "one seed")
        raise UserError(f"{workdir} holds {holds}, but config.seeds asks for {asked}: choose another --workdir.")
