"""The model card of a network, made of its certificate, report and config."""

import json
import math
from typing import Any

import jax
import numpy as np

from lipjax.certify import FrozenNetwork
from lipjax.certify.certificate import CLAIM

_DATA = {
    "digits": "The 1,797 handwritten digits of 8 × 8 pixels inside scikit-learn (UCI, Alpaydin & Kaynak 1998)",
    "mnist": "MNIST, handwritten digits of 28 × 28 pixels (LeCun, Cortes & Burges 1998)",
    "cifar10": "CIFAR-10, photographs of 32 × 32 pixels (Krizhevsky 2009)",
    "cifar100": "CIFAR-100, photographs of 32 × 32 pixels (Krizhevsky 2009)",
}

ANOTHER_RUN = "another run"
"""The init_from of a config in the zoo whose training began from other weights, in the place of a path."""


def percent(value: float | None, down: bool = False) -> str:
    """A fraction as text with two decimals; what is proved is rounded down."""
    if value is None:
        return "–"
    return f"{math.floor(value * 1e4 + 1e-6) / 100:.2f} %" if down else f"{100 * value:.2f} %"


def _metadata(manifest: dict[str, Any], report: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """The front matter that Hugging Face's hub reads. JSON strings are YAML strings."""
    metrics = [("accuracy", "accuracy", report["clean_accuracy"])]
    for radius, value in report["certified_accuracy"].items():
        metrics.append(("certified_accuracy", f"proved at l2 radius {radius}", value))
    lines = ["---", "license: apache-2.0", "library_name: lipjax", "pipeline_tag: image-classification", "tags:"]
    lines += [f"- {tag}" for tag in ("jax", "certified-robustness", "lipschitz")]
    lines += ["datasets:", f"- {json.dumps(data['name'])}", "model-index:", f"- name: {json.dumps(manifest['name'])}"]
    lines += ["  results:", "  - task:", "      type: image-classification", "    dataset:"]
    lines += [f"      {key}: {json.dumps(value)}" for key, value in (("name", data["name"]), ("type", data["name"]))]
    lines += ["      split: test", "    metrics:"]
    for kind, name, value in metrics:
        lines += [f"    - type: {kind}", f"      name: {json.dumps(name)}", f"      value: {value!r}"]
    return [*lines, "---"]


def _table(report: dict[str, Any]) -> list[str]:
    single, attacked = report.get("float32_certified_accuracy", {}), report.get("attacked_accuracy", {})
    lines = ["| l2 radius, pixels in [0, 1] | proved | proved for the float32 program, too | under attack |"]
    lines += ["|---|---:|---:|---:|"]
    clean = (percent(report.get(name), True) for name in ("clean_accuracy", "float32_clean_accuracy"))
    lines += [f"| 0 (accuracy) | {' | '.join(clean)} | |"]
    for key, value in report["certified_accuracy"].items():
        columns = percent(value, True), percent(single.get(key), True), percent(attacked.get(key))
        lines.append(f"| {key} | {' | '.join(columns)} |")
    return lines


def _attack(report: dict[str, Any], options: dict[str, Any]) -> str:
    count = report.get("num_attacked_images", 0)
    if not count:
        return "Not attacked."
    which = f"{count} of the images" if count < report["num_images"] else f"All {count} images"
    ensemble = options["attack"] == "ensemble"
    kind = "Auto-PGD on the cross-entropy, Auto-PGD towards rivals, then Square" if ensemble else options["attack"]
    return (
        f"{which} were attacked ({kind}; {options['attack_steps']} steps a start, {options['attack_restarts']} random "
        "start), at the radii above, whose column is an upper bound of the robust accuracy, and inside their proved "
        "radii, where no class changed."
    )


def _float32(report: dict[str, Any]) -> str:
    found = report.get("float32", {})
    if "bound" not in found:
        return f"Errors of float32 are not bounded: {found.get('error', 'nobody computed it')}"
    bound, gap = found["bound"]["largest"], found["gap"]["largest"]
    limit = "without a bound on some image" if bound is None else f"proved to err by at most {bound:.2g}"
    return (
        f"Logits of a float32 program are {limit}; measured: {gap:.1g} on {found['device']}. What is assumed of the "
        f"program: {found['assumptions']}"
    )


def card_text(manifest: dict[str, Any], documents: dict[str, Any], frozen: FrozenNetwork) -> str:
    """The card as Markdown.

    Args: manifest: name, about and cost. documents: the run's certificate.json, report.json and config.json.
    """
    certificate, report = documents["certificate.json"], documents["report.json"]
    config, seed = documents["config.json"]["config"], documents["config.json"]["seed"]
    data, name, versions = certificate["data"], manifest["name"], certificate["versions"]
    count = int(sum(np.size(leaf) for leaf in jax.tree.leaves(frozen.network)))
    tested = (
        f"{data['num_images']:,} of its {data['of']:,} test images"
        if data["num_images"] < data["of"]
        else (f"all {data['of']:,} test images")
    )
    lines = [*_metadata(manifest, report, data), "", f"# {name}", "", manifest["about"], "", "## What is proved", ""]
    lines += [f"On {tested} of the data below:", "", *_table(report), "", f"> {CLAIM}", ""]
    lines += [f"`lipjax check zoo/{name}` proves it again. {_float32(report)}", "", "## Use", ""]
    lines += ["```python", "import lipjax", "", f'network = lipjax.zoo.load("{name}")']
    shape = ", ".join(map(str, frozen.in_shape))
    lines += [f"classes, radii = network.predict(images)  # (n, {shape}), floats in [0, 1]", "```", ""]
    lines += [
        f"{count:,} numbers, stored in {frozen.dtype}; SHA-256 of the frozen network {certificate['frozen_sha256']}."
    ]
    lines += [
        "",
        "## Data",
        "",
        f"{_DATA.get(data['name'], data['name'])}; pixels divided by {data['pixel_max']}. The "
        "test images had no part in training or in the choice of a checkpoint.",
        "",
        "## Training",
        "",
    ]
    lines += [
        f"Cost: {manifest['cost']}. Seed {seed}, {config['num_epochs']} epochs, model {config['model']['name']!r}, "
        f"loss {config['loss']['name']!r}; lipjax {versions['lipjax']}, JAX {versions['jax']}. "
    ]
    if config.get("init_from"):
        lines[-1] += (
            "It began from the weights of another run, which is not here (config.init_from): it cannot be repeated."
        )
    else:
        lines[-1] += "The same again:"
        lines += ["", f"    lipjax zoo retrain {name} --workdir=DIR"]
    lines += ["", "## Attack", "", _attack(report, config["certify"])]
    lines += [
        "",
        "## Limits",
        "",
        "A radius bounds changes of the pixels in l2 and nothing else: not rotations, not other "
        "norms, not images unlike the data. A wrong class may have a radius, too.",
    ]
    return "\n".join(lines) + "\n"
