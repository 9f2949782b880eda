"""The part of an HTML report that shows images, and the nearest images of other classes that attacks found."""

import numpy as np

from lipjax.evaluation.html.data import CertifiedRun
from lipjax.evaluation.html.parts import Markup, down, folded, png, section, tag

# So many images are shown, others folded away.
_SHOWN = 6
# Attacks by the names that attack files have for them, as a reader knows them.
_METHODS = {"apgd": "Auto-PGD", "pgd": "PGD", "square": "Square Attack"}


def gallery_section(run: CertifiedRun) -> Markup:
    """Cards of images drawn by hash; of each the nearest image of another class that any attack found."""
    title = "Images and their nearest adversarial ones"
    if run.attack is None:
        text = "No images are stored with this run. This command attacks it and stores some:"
        command = tag("pre", tag("code", "python -m lipjax attack DIR"))
        return section(title, tag("p", text), command)
    names = ("index", "row", "image", "radius", "point", "distance", "taken_for", "found_by")
    cards = [_card(run, *row) for row in zip(*(run.attack[name] for name in names), strict=True)]
    text = (
        "Inside its proved radius no image of another class exists; the nearest one that a search found lies further "
        "out. The bar shows how much of that distance is proved. Changes are enlarged, around grey. The images are "
        f"drawn by a hash of their number, not chosen.{_searched(run)}"
    )
    content: list[Markup] = [tag("p", text), tag("ul", *cards[:_SHOWN], class_="cards")]
    if len(cards) > _SHOWN:
        more = cards[_SHOWN:]
        content.append(folded(f"{len(more)} more images", tag("ul", *more, class_="cards")))
    return section(title, *content)


def _searched(run: CertifiedRun) -> str:
    """A sentence about the attacks behind the gallery, from attack.json."""
    attacks = (run.attack_notes or {}).get("attacks")
    if not isinstance(attacks, list):
        return ""
    said = []
    for attack in attacks:
        if isinstance(attack, dict) and "method" in attack:
            counts = [(attack[name], name) for name in ("steps", "restarts", "queries", "targets") if name in attack]
            options = [f"{count} {name[:-1] if name == 'restarts' and count == 1 else name}" for count, name in counts]
            name = " ".join(str(attack[field]) for field in ("method", "objective") if field in attack)
            said.append(f"{named(name)} ({', '.join(options)})")
    if not said:
        return ""
    return f" Searched by: {'; '.join(said)}. Of each image the nearest point that they found counts."


def named(way: str) -> str:
    """An attack that files call "apgd targeted_dlr", as "Auto-PGD, targeted dlr"."""
    method, _, objective = way.partition(" ")
    method = _METHODS.get(method, method)
    return f"{method}, {objective.replace('_', ' ')}" if objective else method


def _card(run: CertifiedRun, index, row, image, radius, point, distance, taken_for, found_by) -> Markup:
    label, prediction = int(run.labels[row]), int(run.predictions[row])
    pictures = [("image", image, f"test image {index}: {run.class_name(label)}")]
    text, bar = f"Proved radius {down(float(radius))}; no image of another class was found.", None
    # What leads away from a wrong class may have the right one.
    kind = "adversarial" if label == prediction else "another class"
    if np.isfinite(point).all() and distance > 0:
        change = point.astype(np.float64) - image
        gain = 0.5 / max(float(np.abs(change).max()), 1e-12)
        title = f"change ×{gain:.1f}" if gain < 10 else f"change ×{gain:.0f}"
        name = run.class_name(int(taken_for)) if taken_for >= 0 else None
        pictures += [
            (
                kind if name is None else f"taken for {name}",
                point,
                f"the nearest image of another class than the reported one found for image {index}"
                + ("" if name is None else f", taken for {name}"),
            ),
            (title, 0.5 + gain * change, f"the change of image {index}, enlarged around grey"),
        ]
        text = f"Proved radius {down(float(radius))}; {kind} at {distance:.4g}"
        text += f", found by {named(str(found_by))}." if found_by else "."
        share = 100 * min(1.0, float(radius) / float(distance))
        filled = tag("span", style=f"width: {share:.1f}%")
        bar = tag("div", filled, class_="bar", role="img", aria_label=f"{share:.0f} % of the distance is proved")
    shown = (
        tag("figure", tag("img", src=png(pixels), alt=alternative), tag("figcaption", caption))
        for caption, pixels, alternative in pictures
    )
    verdict = tag("span", f", taken for {run.class_name(prediction)}", class_="muted") if label != prediction else None
    heading = tag("h3", f"Image {index}: {run.class_name(label)}", verdict)
    return tag("li", heading, tag("div", *shown, class_="trio"), tag("p", text), bar)
