"""What train.py does: all seeds of a config, trained, certified and reported."""

import os
import pathlib

from rich.console import Console

from lipjax.certify import write_json
from lipjax.training import report as reports
from lipjax.training.config import validate
from lipjax.training.evaluate import certify_run
from lipjax.training.loop import train


def run(config, workdir: str | os.PathLike) -> dict:
    """Trains, certifies and reports every seed of a config; resumes what an earlier call on the same directory began.

    With one seed everything lies in workdir; with several, each seed has workdir/seed_<n>, and workdir/report.json has mean and sd.
    Returns: the report that is written to workdir/report.json.
    """
    validate(config)
    workdir, console = pathlib.Path(workdir).expanduser(), Console()
    several = len(config.seeds) > 1
    found = []
    for seed in config.seeds:
        directory = workdir / f"seed_{seed}" if several else workdir
        if several:
            console.print(f"Seed {seed}")
        trained = train(config, directory, seed)
        found.append(certify_run(directory, config, seed, trained, console))
        if several:
            reports.print_table(found[-1], console=console)
    report = found[0]
    summary = None
    if several:
        summary = reports.summarize(found)
        report = {
            "clean_accuracy": summary["clean_accuracy"]["mean"],
            **{
                field: {key: value["mean"] for key, value in summary[field].items()}
                for field in ("certified_accuracy", "attacked_accuracy")
            },
            **{field: found[0][field] for field in ("radii", "num_images", "num_attacked_images")},
            "summary": summary,
            "seeds": list(config.seeds),
            "runs": found,
        }
        write_json(workdir / "report.json", report)
    reports.print_table(report, summary, console)
    console.print(f"Written to {workdir}: {'seed_*/' if several else ''}certificate.json, certified_accuracy.png, report.json")
    return report
