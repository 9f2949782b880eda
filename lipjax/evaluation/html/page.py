"""python -m lipjax report: one self-contained HTML page about a certified run."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lipjax.certify.radius import radius_key, radius_label
from lipjax.errors import UserError
from lipjax.evaluation.html.claim import claim_section, plain_words
from lipjax.evaluation.html.classes import classes_section
from lipjax.evaluation.html.data import CertifiedRun, finite, read_run
from lipjax.evaluation.html.figures import (
    accuracy_curve,
    attacked_clean,
    num_certified,
    radius_histogram,
    training_loss,
    validation_curves,
)
from lipjax.evaluation.html.gallery import gallery_section
from lipjax.evaluation.html.parts import (
    DASH,
    Markup,
    definitions,
    document,
    down,
    flat,
    folded,
    join,
    percent,
    section,
    table,
    tag,
    up,
)
from lipjax.evaluation.table import FLOAT32, NOT_ATTACKED, NOT_PROVED, part_of, summarize
from lipjax.files import replacing

FILE_NAME = "report.html"


def write_reports(directories: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Writes report.html into every run's directory; above several runs another one, which lists them.

    Returns: the files, the one to open first at the front.
    Raises: UserError if a file is missing, damaged or of another format; nothing is written then.
    """
    runs = [read_run(directory) for directory in directories]
    if any(run.report["radii"] != runs[0].report["radii"] for run in runs):
        raise UserError(
            f"The runs in {directories[0].parent} are certified at different radii, so no table fits them: certify "
            f"them alike, with python -m lipjax certify {directories[0].parent}."
        )
    pages = {path / FILE_NAME: _run_page(run) for path, run in zip(directories, runs, strict=True)}
    if len(runs) > 1:
        links = [f"{directory.name}/{FILE_NAME}" for directory in directories]
        pages = {directories[0].parent / FILE_NAME: _index_page(runs, links), **pages}
    for path, text in pages.items():
        _write(path, text)
    return list(pages)


def _write(path: pathlib.Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _run_page(run: CertifiedRun) -> str:
    title = _title(run)
    shown = (_header, plain_words, _accuracies, classes_section, gallery_section, _attack, claim_section)
    return document(title, tag("h1", title), *(part(run) for part in (*shown, _layers, _liplt, _training, _provenance)))


def _index_page(runs: list[CertifiedRun], links: list[str]) -> str:
    title = f"{_title(runs[0])}, {len(runs)} seeds"
    summary: Any = summarize([run.report for run in runs])["summary"]
    keys = [radius_key(radius) for radius in runs[0].report["radii"]]
    columns = [("seed", ""), ("clean", "number")]
    columns += [(f"{kind} at {radius_label(r)}", "number") for r in runs[0].report["radii"] for kind in _KINDS.values()]

    def cell(numbers, field, key):
        found = numbers.get(field)
        if found is None:
            return NOT_PROVED
        if key not in found:
            return NOT_ATTACKED
        found = found[key]
        mean, spread = (found["mean"], f" ± {100 * found['sd']:.2f}") if isinstance(found, dict) else (found, "")
        return f"{100 * mean:.2f}{spread} %"

    rows = []
    for run, link in zip(runs, links, strict=True):
        cells = [cell(run.report, field, key) for key in keys for field in _KINDS]
        name = tag("a", f"seed {run.report['seed']}", href=link)
        rows.append([name, f"{100 * run.report['clean_accuracy']:.2f} %", *cells])
    clean = summary["clean_accuracy"]
    clean = f"{100 * clean['mean']:.2f} ± {100 * clean['sd']:.2f} %"
    rows.append(["mean ± sd", clean, *(cell(summary, field, key) for key in keys for field in _KINDS)])
    caption = (
        f"Certified accuracies are proved in exact arithmetic; those of float32 are {FLOAT32}; those under attack are "
        "upper bounds. Each seed has a report of its own."
    )
    return document(title, tag("h1", title), tag("p", _described(runs[0])), table(caption, columns, rows, "wide"))


_KINDS = {
    "certified_accuracy": "certified",
    "float32_certified_accuracy": "float32, too,",
    "attacked_accuracy": "attacked",
}


def _title(run: CertifiedRun) -> str:
    model = run.certificate["config"].get("model", {}).get("name", "network")
    return f"Certified robustness of {model} on {run.certificate['data']['name']}"


def _described(run: CertifiedRun) -> str:
    """A sentence about what was trained, from the fields that this config has."""
    config = run.certificate["config"]
    model, loss = config.get("model", {}), config.get("loss", {})
    said = [f"{name} {model[name]}" for name in ("depth", "width", "layer", "activation", "head") if name in model]
    text = ", ".join([str(model.get("name", "network")), *said])
    text += f"; trained on {run.certificate['data']['name']}"
    text += f" with the loss {loss['name']}" if "name" in loss else ""
    text += f" for {config['num_epochs']} epochs" if "num_epochs" in config else ""
    return text + "."


def _header(run: CertifiedRun) -> Markup:
    total, radius = len(run.labels), run.report["radii"][0]
    attacked = run.report["attacked_accuracy"].get(radius_key(radius))
    num_attacked, every = run.report["num_attacked_images"], run.certificate["data"]["of"]
    of = "" if num_attacked == total else f", of {part_of(num_attacked, every)} images"
    clean = percent(int(np.sum(run.predictions == run.labels)), total)
    tiles = [
        ("clean accuracy", clean, f"of {part_of(total, every)} test images"),
        ("certified accuracy", percent(num_certified(run, radius), total), f"proved, at radius {radius_label(radius)}"),
        (FLOAT32, _float32_cell(run, radius), f"at radius {radius_label(radius)}"),
    ]
    if attacked is not None:
        words = f"upper bound, at radius {radius_label(radius)}{of}"
        tiles.append(("under attack", f"{100 * attacked:.2f} %", words))
    cells = (
        tag("li", tag("span", name, class_="muted"), tag("strong", value), tag("span", what, class_="muted"))
        for name, value, what in tiles
    )
    seed, step = run.certificate["seed"], run.certificate["step"]
    return join(
        tag("p", f"{_described(run)} Seed {seed}, checkpoint of step {step}."), tag("ul", *cells, class_="tiles")
    )


def _float32_cell(run: CertifiedRun, radius: float | None) -> Markup | str:
    """Of how many images what is proved holds for the float32 program, too; without a radius: their class alone."""
    found = run.report.get("float32_clean_accuracy" if radius is None else "float32_certified_accuracy")
    if found is None:
        return NOT_PROVED
    return percent(round((found if radius is None else found[radius_key(radius)]) * len(run.labels)), len(run.labels))


def _accuracies(run: CertifiedRun) -> Markup:
    total, attacked = len(run.labels), run.report["num_attacked_images"]

    def cell(count, of):
        return join(percent(count, of), " ", tag("small", f"{count} / {of}"))

    correct = run.predictions == run.labels
    clean = cell(round(attacked_clean(run) * attacked), attacked) if attacked else NOT_ATTACKED
    rows = [["0 (clean)", cell(int(np.sum(correct)), total), _float32_cell(run, None), clean]]
    for radius in run.report["radii"]:
        left = NOT_ATTACKED
        if attacked:
            left = cell(round(run.report["attacked_accuracy"][radius_key(radius)] * attacked), attacked)
        proved = cell(num_certified(run, radius), total)
        rows.append([radius_label(radius), proved, _float32_cell(run, radius), left])
    names = ("certified (proved)", FLOAT32, "under attack (upper bound)")
    columns = [("l2 radius", ""), *((name, "number") for name in names)]
    caption = "Accuracy on the test set; radii in pixels from 0 to 1."
    if attacked not in (0, total):
        caption += f" The attack ran on {part_of(attacked, run.certificate['data']['of'])} test images."
    figures = tag("div", accuracy_curve(run), radius_histogram(run), class_="figures")
    return section("Accuracy", figures, table(caption, columns, rows))


def _attack(run: CertifiedRun) -> Markup | None:
    """The section about attempts to break certificates and bounds, from attack.json."""
    if run.attack_notes is None:
        return None
    gate, search = run.attack_notes["gate"], run.attack_notes["lipschitz"]
    pairs = [
        ("images attacked inside their radius", gate["num_images"]),
        ("certificates found false", gate["violations"]),
        ("nearest change of class / radius", DASH if gate["closest_ratio"] is None else f"{gate['closest_ratio']:.4f}"),
    ]
    if search is not None:
        found, of_all = search["largest_ratio"], (search["whole_lower"], search["whole_proved"])
        pairs += [
            ("Lipschitz bounds found false", search["violations"]),
            (
                f"largest constant found / proved, of {search['num_pairs']} logit differences",
                DASH if found is None else f"{found:.4f}",
            ),
        ]
        if None not in of_all:
            pairs.append(("constant of all logits: found, proved", f"{down(of_all[0])}, {up(of_all[1])}"))
    text = (
        "A search tried to change classes inside the certified radii, and to find two images that the network maps "
        "further apart than the proved Lipschitz constants allow. Ratios near 1 mean tight certificates."
    )
    return section("Attempts to break the certificate", tag("p", text), definitions(pairs))


def _layers(run: CertifiedRun) -> Markup:
    rows = run.certificate["layers"]
    plain = [row for row in rows if row["bound"] == 1 and row["method"].startswith("exact")]

    def entry(row):
        estimate, gap = (row.get(field) for field in ("estimate", "gap"))
        return [
            row["name"],
            row["type"],
            up(row["bound"]),
            f"{estimate:.6g}" if finite(estimate) else DASH,
            f"{gap:.1e}" if finite(gap) else DASH,
            run.smallest.get(row["name"], DASH),
            row["method"],
        ]

    columns = [
        ("layer", ""),
        ("operator", ""),
        ("σ max ≤ (proved)", "number"),
        ("σ max (estimate)", "number"),
        ("gap", "number"),
        ("σ min", "number"),
        ("proof of the bound", "long"),
    ]
    total = 1.0
    for row in rows:
        total = math.nextafter(total * row["bound"], math.inf)
    product = up(total)
    text = (
        f"Proved bounds of the norms of all {len(rows)} layers before the head, rounded up; their product is "
        f"{product}. Estimates are by power iteration and may be low; gap is bound / estimate − 1. σ min is the least "
        "singular value, by the SVD in float64 where it was computed; with ≥, from the remainder of the exponential."
    )
    constants = run.certificate.get("margin_lipschitz")
    try:
        table_of = np.array(constants, np.float64)
        pairs = table_of[~np.eye(len(table_of), dtype=bool)]
    except (ValueError, TypeError, IndexError):
        pairs = np.empty(0)
    if pairs.size and np.isfinite(pairs).all():
        text += (
            f" The proved constants of logit differences, head included and per pixel unit, go from "
            f"{up(pairs.min())} to {up(pairs.max())}."
        )
    main = [entry(row) for row in rows if row not in plain]
    content = [tag("p", text), table("Layers whose norm was proved", columns, main)]
    if plain:
        kinds = ", ".join(sorted({row["type"] for row in plain}))
        summary = f"Layers of constant 1 by what they are: {len(plain)} ({kinds})"
        content.append(folded(summary, table("Layers of constant 1", columns, [entry(row) for row in plain])))
    return section("Layers", *content)


def _liplt(run: CertifiedRun) -> Markup | None:
    report = run.certificate.get("liplt")
    if report is None:
        return None
    text = "Proved Lipschitz constants from the normalised input to what each activation acts on, rounded up."
    constants = [[row["name"], up(row["bound"]), up(row["product"])] for row in report["layers"]]
    columns = [("up to", ""), ("LipLT", "number"), ("product of norms", "number")]
    chains = [[row["start"], row["end"], up(row["bound"]), row["method"]] for row in report["chains"]]
    chain_columns = [("from", ""), ("to", ""), ("norm ≤ (proved)", "number"), ("proof of the bound", "long")]
    return section(
        "LipLT",
        tag("p", text),
        table("Constants up to each activation", columns, constants),
        folded(f"{len(chains)} chains of linear layers", table("Norms of linear chains", chain_columns, chains)),
    )


def _training(run: CertifiedRun) -> Markup | None:
    figures = [made for made in (training_loss(run), validation_curves(run)) if made is not None]
    return section("Training", tag("div", *figures, class_="figures")) if figures else None


def _provenance(run: CertifiedRun) -> Markup:
    certificate = run.certificate
    data = certificate["data"]
    where = (
        ("frozen network", tag("code", certificate["frozen_sha256"])),
        (f"test images ({data['name']})", tag("code", data["sha256"])),
        ("seed", certificate["seed"]),
        ("step", certificate["step"]),
        ("certificate", f"schema {certificate.get('schema', DASH)}"),
        ("platform", certificate["platform"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())),
    )
    content = [
        tag("p", "Hashes are SHA-256. This command proves the bounds again, without lipjax and JAX:"),
        tag("pre", tag("code", "python -m lipjax check DIR")),
        tag("p", "DIR is the folder with certificate.json and frozen/.", class_="muted"),
        definitions(where),
        folded("Config", definitions(flat(certificate["config"]))),
    ]
    return section("Where this comes from", *content)
