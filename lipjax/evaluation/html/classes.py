"""The part of an HTML report about classes: their accuracies, and which are mistaken for which."""

import math

import numpy as np

from lipjax.certify.radius import radius_key, radius_label
from lipjax.evaluation.classes import class_report
from lipjax.evaluation.html.data import CertifiedRun
from lipjax.evaluation.html.parts import DASH, Markup, folded, section, table, tag

# Up to so many classes the confusion matrix is shown whole; of more, so many of its largest entries.
_WHOLE, _LARGEST = 25, 50
# Of more than _WHOLE classes so many have a bar: those of which the least is proved.
_WORST = 10


def classes_section(run: CertifiedRun) -> Markup:
    """Accuracies by class and the confusion matrix, counted from the rows of the certificate."""
    count = max(len(run.class_names), int(max(run.labels.max(), run.predictions.max())) + 1)
    radii = {radius_key(radius): radius for radius in run.report["radii"]}
    found = class_report(run.predictions, run.labels, run.radii, radii, count)
    confusion = np.array(found["confusion"])

    def cell(value):
        return DASH if value is None else f"{100 * value:.2f}"

    rows = []
    for row in found["per_class"]:
        values = (row["clean_accuracy"], *(row["certified_accuracy"][key] for key in radii))
        cells = map(cell, values)
        rows.append([run.class_name(row["class"]), row["num_images"], *cells])
    means = found["mean_over_classes"]
    values = (means["clean_accuracy"], *(means["certified_accuracy"][key] for key in radii))
    rows.append(["mean over classes", "", *map(cell, values)])
    columns = [("class", ""), ("images", "number"), ("clean", "number")]
    columns += [(f"proved at {radius_label(radius)}", "number") for radius in radii.values()]
    absent = sum(row["num_images"] == 0 for row in found["per_class"])
    caption = "Accuracy of each class on the test set in %; radii in pixels from 0 to 1."
    caption += f" Classes without an image, which do not enter the mean: {absent}." if absent else ""
    accuracies = folded(f"Accuracies of {count} classes in numbers", table(caption, columns, rows))
    confused = folded("Confusion matrix", *_confusion(run, confusion))
    return section("Classes", _bars(run, found["per_class"], radii), accuracies, confused)


def _bars(run: CertifiedRun, rows: list[dict], radii: dict[str, float]) -> Markup:
    """A bar of every class: its clean accuracy, and over it what is proved, darker at each larger radius."""
    keys = sorted(radii, key=radii.__getitem__)
    shown = [row for row in rows if row["num_images"]]
    words = "Accuracy of each class"
    if len(shown) > _WHOLE:
        shown = sorted(shown, key=lambda row: row["certified_accuracy"][keys[0]])[:_WORST]
        words = f"The {len(shown)} classes of which the least is proved"
    strengths = [f"{100 * (place + 1) / len(keys):.0f}%" for place in range(len(keys))]

    def level(share: float, strength: str | None) -> Markup:
        style = f"width: {100 * share:.1f}%"
        if strength is None:
            return tag("span", class_="clean", style=style)
        return tag("span", style=f"{style}; background: color-mix(in srgb, var(--proved) {strength}, var(--page))")

    bars = []
    for row in shown:
        shares = [row["certified_accuracy"][key] for key in keys]
        said = [f"{radius_label(radii[key])} {_floor(share)}" for key, share in zip(keys, shares, strict=True)]
        parts = [level(row["clean_accuracy"], None), *(level(*pair) for pair in zip(shares, strengths, strict=True))]
        text = f"{run.class_name(row['class'])}: clean {_floor(row['clean_accuracy'])}; proved at {', at '.join(said)}"
        bar = tag("span", *parts, class_="level", role="img", aria_label=text)
        bars.append(tag("li", tag("span", run.class_name(row["class"])), bar, tag("span", _floor(shares[0]))))
    names = ["clean", *(f"proved at {radius_label(radii[key])}" for key in keys)]
    legend = (
        tag("li", tag("span", level(1.0, strength), class_="level"), name)
        for name, strength in zip(names, [None, *strengths], strict=True)
    )
    caption = f"{words}, from 0 to 100 %; the number is what is proved at {radius_label(radii[keys[0]])}."
    content = tag("ul", *legend, class_="key"), tag("ul", *bars, class_="classes")
    return tag("figure", tag("figcaption", caption), *content)


def _floor(share: float) -> str:
    return f"{math.floor(1000 * share + 1e-9) / 10:.1f} %"


def _confusion(run: CertifiedRun, confusion: np.ndarray) -> tuple[Markup, ...]:
    count = len(confusion)
    if count <= _WHOLE:
        columns = [("class of the image", ""), *((run.class_name(label), "number") for label in range(count))]
        rows = [[run.class_name(label), *(n or DASH for n in line)] for label, line in enumerate(confusion.tolist())]
        return (
            table(
                "How many images of the class in a row are taken for the class in a column.", columns, rows, "matrix"
            ),
        )
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(wrong, axis=None, kind="stable")[::-1][:_LARGEST]
    pairs = [divmod(int(place), count) for place in places]
    rows = [[run.class_name(i), run.class_name(j), int(wrong[i, j])] for i, j in pairs if wrong[i, j]]
    if not rows:
        return (tag("p", "No image is taken for another class."),)
    columns = [("class", ""), ("taken for", ""), ("images", "number")]
    return (table(f"The {len(rows)} most frequent confusions; report.json holds the whole matrix.", columns, rows),)
