"""The parts of an HTML report that say what was proved: in plain words, and as the certificate claims it."""

import math
from typing import Any

import numpy as np

from lipjax.certify.radius import radius_key, radius_label
from lipjax.errors import UserError
from lipjax.evaluation.html.data import CertifiedRun
from lipjax.evaluation.html.figures import num_certified
from lipjax.evaluation.html.parts import Markup, down, folded, percent, section, tag
from lipjax.evaluation.table import float32_line


def plain_words(run: CertifiedRun) -> Markup:
    """The meaning of the numbers, and what they do not mean, for somebody who has read no paper."""
    total, radius = len(run.labels), run.report["radii"][0]
    right, proved = int(np.sum(run.predictions == run.labels)), num_certified(run, radius)
    label = radius_label(radius)
    means = (
        f"The classifier is right on {right} of {total} test images. For {proved} of them, {percent(proved, total)} of "
        "all, a proof says more: whatever is done to the pixels, as long as the change is no larger than "
        f"{label}, the answer stays the same and right. The size of a change is the root of the sum of its squares, "
        f"with black at 0 and white at 1.{_sizes(run, radius)} This holds for every such change, also for those that "
        "nobody has thought of; it does not rest on having tried some."
    )
    limits = (
        "It is not claimed that other images are classified rightly or have a proof; nor anything about larger "
        "changes, even if they look harmless: a shift by a pixel, a rotation and another light are, as a rule, large "
        "in this sense. The proof is about the stored network in exact arithmetic; what a float32 program keeps of it "
        "is counted beside it."
    )
    return section("In plain words", tag("p", means, _attacked(run, proved, radius)), tag("p", limits))


def _sizes(run: CertifiedRun, radius: float) -> str:
    """Two changes of this size, if the size of an image is known."""
    if run.in_shape is None:
        return ""
    count = math.prod(run.in_shape)
    return (
        f" An image has {count} values here: all of them changed by {down(radius / math.sqrt(count), 2)}, or a single "
        f"one by {down(min(radius, 1.0), 3)}, is a change of that size."
    )


def _attacked(run: CertifiedRun, proved: int, radius: float) -> str:
    """The findings of a search about images without a proof; nothing unless all images were attacked."""
    total = len(run.labels)
    found = run.report["attacked_accuracy"].get(radius_key(radius))
    if found is None or run.report["num_attacked_images"] != total:
        return ""
    left = round(found * total)
    if not proved <= left < total:
        return ""
    return (
        f" Of the other {total - proved} images {total - left} are misclassified, or an attack found a change of that "
        f"size that fools the classifier; for the remaining {left - proved} neither is known."
    )


def claim_section(run: CertifiedRun) -> Markup:
    """The claim, word for word, what it covers, and what it does not."""
    data = run.certificate["data"]
    drawn = ", drawn by hash," if "indices" in data else ""
    summary, assumptions = _float32(run.report.get("float32"))
    points = (
        f"Proved for {data['num_images']} of the {data['of']} test images of {data['name']}{drawn} and for no others. "
        "An image counts as certified at ε if it is classified correctly and its radius is greater than ε.",
        f"Included: {run.certificate['precision']}.",
        summary,
        "Not covered: lower precision; changes that are not small in the l2 norm of the pixels, such as shifts and "
        "rotations.",
        "Accuracies under attack are no proofs but upper bounds: all other images are misclassified, or a search found "
        "an image of another class within the radius. Numbers called estimates prove nothing.",
    )
    quoted = tag("blockquote", tag("p", run.certificate["claim"]))
    more = None if assumptions is None else folded("What the float32 program is assumed to do", tag("p", assumptions))
    return section("What is claimed", quoted, tag("ul", *(tag("li", point) for point in points)), more)


def _float32(found: Any) -> tuple[str, str | None]:
    """A sentence about float32, and the assumptions that its proof rests on; None where nothing is proved."""
    if not isinstance(found, dict) or "error" in found:
        why = f" {float32_line(found)}" if isinstance(found, dict) else ""
        return f"Not covered: running the network in float32, which adds a rounding error of its own.{why}", None
    try:
        return f"{float32_line(found)} This is beside the claim, and rests on assumptions below.", found["assumptions"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"report.json: its part on float32 is damaged ({error!r}). Certify the run again.") from error
