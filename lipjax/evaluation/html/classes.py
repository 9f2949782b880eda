"""The part of an HTML report about classes: their accuracies, and which are mistaken for which."""

import numpy as np

from lipjax.certify.radius import radius_key, radius_label
from lipjax.evaluation.classes import class_report
from lipjax.evaluation.html.data import CertifiedRun
from lipjax.evaluation.html.parts import DASH, Markup, folded, percent, section, table, tag

# Up to so many classes the confusion matrix is shown whole; of more, so many of its largest entries.
_WHOLE, _LARGEST = 25, 50


def classes_section(run: CertifiedRun) -> Markup:
    """Accuracies by class and the confusion matrix, counted from the rows of the certificate."""
    count = max(len(run.class_names), int(max(run.labels.max(), run.predictions.max())) + 1)
    radii = {radius_key(radius): radius for radius in run.report["radii"]}
    found = class_report(run.predictions, run.labels, run.radii, radii, count)
    confusion = np.array(found["confusion"])

    def cell(value, total):
        return DASH if value is None else percent(round(value * total), total)

    rows = []
    for row in found["per_class"]:
        values = (row["clean_accuracy"], *(row["certified_accuracy"][key] for key in radii))
        cells = (cell(value, row["num_images"]) for value in values)
        rows.append([run.class_name(row["class"]), row["num_images"], *cells])
    means = found["mean_over_classes"]
    values = (means["clean_accuracy"], *(means["certified_accuracy"][key] for key in radii))
    rows.append(["mean over classes", "", *(f"{100 * value:.2f} %" for value in values)])
    columns = [("class", ""), ("images", "number"), ("clean", "number")]
    columns += [(f"proved at {radius_label(radius)}", "number") for radius in radii.values()]
    absent = sum(row["num_images"] == 0 for row in found["per_class"])
    caption = "Accuracy of each class on the test set; radii in pixels from 0 to 1."
    caption += f" Classes without an image, which do not enter the mean: {absent}." if absent else ""
    accuracies = table(caption, columns, rows)
    if count > _WHOLE:
        accuracies = folded(f"Accuracies of {count} classes", accuracies)
    return section("Classes", accuracies, folded("Confusion matrix", *_confusion(run, confusion)))


def _confusion(run: CertifiedRun, confusion: np.ndarray) -> tuple[Markup, ...]:
    count = len(confusion)
    if count <= _WHOLE:
        columns = [("class of the image", ""), *((run.class_name(label), "number") for label in range(count))]
        rows = [[run.class_name(label), *(n or DASH for n in line)] for label, line in enumerate(confusion.tolist())]
        return (table("How many images of the class in a row are taken for the class in a column.", columns, rows),)
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(wrong, axis=None, kind="stable")[::-1][:_LARGEST]
    pairs = [divmod(int(place), count) for place in places]
    rows = [[run.class_name(i), run.class_name(j), int(wrong[i, j])] for i, j in pairs if wrong[i, j]]
    if not rows:
        return (tag("p", "No image is taken for another class."),)
    columns = [("class", ""), ("taken for", ""), ("images", "number")]
    return (table(f"The {len(rows)} most frequent confusions; report.json holds the whole matrix.", columns, rows),)
