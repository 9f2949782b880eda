"""The figures of an HTML report."""

import numpy as np

from lipjax.certify import certified_accuracy
from lipjax.certify.radius import radius_key, radius_label
from lipjax.evaluation.html.data import CertifiedRun, finite, float32_curve
from lipjax.evaluation.html.parts import ATTACKED, BETWEEN, MUTED, PROVED, SINGLE, Markup, down, figure, percent


def num_certified(run: CertifiedRun, radius: float) -> int:
    """The number of images that are classified correctly with a larger radius."""
    accuracy = certified_accuracy(run.predictions, run.labels, run.radii, radius)
    return round(accuracy * len(run.labels))


def attacked_clean(run: CertifiedRun) -> float:
    """The clean accuracy of the images that were attacked. Older reports do not say it, but took the first ones."""
    correct = run.predictions == run.labels
    stated = run.report.get("attacked_clean_accuracy")
    return float(np.mean(correct[: run.report["num_attacked_images"]])) if stated is None else float(stated)


def accuracy_curve(run: CertifiedRun) -> Markup:
    """Certified accuracy over the radius, that of float32 beside it, and the steps that are known of what is robust."""
    total, attacked = len(run.labels), run.report["num_attacked_images"]
    radii = sorted(run.report["radii"])
    grid = np.linspace(0, 1.6 * radii[-1], 400)
    shown = np.sort(np.where(run.predictions == run.labels, run.radii, 0.0))
    proved = 100 * (1 - np.searchsorted(shown, grid, side="right") / total)
    clean = 100 * float(np.mean(run.predictions == run.labels))
    proved[0] = clean
    single = _float32_steps(run, grid)
    marks = [100 * run.report["attacked_accuracy"][radius_key(radius)] for radius in radii if attacked]

    def draw(axes):
        if attacked:
            # Robust accuracy never rises with the radius, so each upper bound holds up to the next one.
            known = np.array([100 * attacked_clean(run), *marks])
            upper = known[np.searchsorted([0.0, *radii], grid, side="right") - 1]
            if attacked == total:  # otherwise the curves are about different images
                axes.fill_between(grid, proved, upper, where=upper >= proved, color=BETWEEN, linewidth=0)
            axes.plot(grid, upper, color=ATTACKED, linewidth=1.2, linestyle="--", label="attacked (upper bound)")
            axes.plot(radii, marks, "v", color=ATTACKED, markersize=5)
        axes.plot(grid, proved, color=PROVED, linewidth=2, label="certified (proved)")
        if single.size:
            axes.plot(grid, single, color=SINGLE, linewidth=1.4, linestyle=":", label="float32, too (proved)")
        axes.set(xlabel="l2 radius", ylabel="accuracy (%)", xlim=(0, grid[-1]), ylim=(0, 101))

    under_attack = [f", {mark:.2f} % under attack" for mark in marks] if attacked else [""] * len(radii)
    said = "; ".join(
        f"at {radius_label(r)} {percent(num_certified(run, r), total)} proved{rest}"
        for r, rest in zip(radii, under_attack, strict=True)
    )
    caption = "The robust accuracy lies in the shaded part: above what is proved, at most what the attack left."
    if attacked != total:
        caption = f"What is proved of {total} images, and at most what the attack left of {attacked} of them."
    if not attacked:
        caption = f"What is proved of {total} images. None was attacked."
    if single.size:
        caption += " Dotted: proved for every float32 program, too; between the radii known, at least so much."
    return figure(
        "curve",
        f"Accuracy over the l2 radius, from {clean:.1f} % at 0: {said}.",
        caption,
        draw,
    )


def _float32_steps(run: CertifiedRun, grid: np.ndarray) -> np.ndarray:
    """Percent proved for float32, too, at least, at the radii of a grid; NaN beyond those known, none without any."""
    known = float32_curve(run.report)
    if not known:
        return np.empty(0)
    radii, shares = np.array([(0.0, run.report["float32_clean_accuracy"]), *known]).T
    # What is proved never rises with the radius, so each number holds down to the radius before.
    return 100 * np.append(shares, np.nan)[np.searchsorted(radii, grid)]


def radius_histogram(run: CertifiedRun) -> Markup:
    correct = run.predictions == run.labels
    limit = float(np.quantile(run.radii, 0.995))
    if not 0 < limit < 1e6:
        limit = 1.0
    edges = np.linspace(0, limit, 31)
    above, zeros = int(np.sum(run.radii > limit)), int(np.sum(run.radii == 0))

    def draw(axes):
        groups = [np.minimum(run.radii[group], limit) for group in (correct, ~correct)]
        labels = ["classified correctly", "misclassified"]
        axes.hist(groups, edges, stacked=True, color=[PROVED, MUTED], label=labels, rwidth=0.9)
        axes.set(xlabel="proved l2 radius", ylabel="images", xlim=(0, limit))

    low, middle, high = (down(q) for q in np.quantile(run.radii, (0.25, 0.5, 0.75)))
    caption = f"Radii of all images: half of them lie between {low} and {high}, the median is {middle}."
    caption += f" The last bar also holds {above} larger ones." if above else ""
    caption += f" {zeros} are 0." if zeros else ""
    return figure("radii", f"Histogram of {len(run.radii)} radii. {caption}", caption, draw)


def training_loss(run: CertifiedRun) -> Markup | None:
    """The loss over the steps; None without metrics."""
    steps, loss = _series(run, "train", "loss")
    if not loss.size:
        return None

    def draw(axes):
        axes.plot(steps, loss, color=MUTED, marker="o" if len(loss) < 4 else None)
        axes.set(xlabel="step", ylabel="training loss")

    said = f"Training loss: {loss[0]:.3g} at step {steps[0]:.0f}, {loss[-1]:.3g} at step {steps[-1]:.0f}."
    return figure("loss", said, "Loss on the training batches.", draw)


def validation_curves(run: CertifiedRun) -> Markup | None:
    """Accuracy and estimated certified accuracy on the validation split; None without metrics."""
    shown = (
        ("accuracy", "accuracy", MUTED),
        ("certified accuracy (estimate)", "certified_accuracy_estimate", PROVED),
    )
    curves = [(name, _series(run, "validation", field), color) for name, field, color in shown]
    curves = [curve for curve in curves if curve[1].size]
    if not curves:
        return None

    def draw(axes):
        for name, (x, y), color in curves:
            axes.plot(x, 100 * y, color=color, marker="o" if len(y) < 4 else None, label=name)
        axes.set(xlabel="step", ylabel="validation (%)", ylim=(0, 101))

    last = "; ".join(f"{name} {100 * y[-1]:.1f} % at the end" for name, (_, y), _ in curves)
    caption = "On the validation split. The certified accuracy rests on estimated norms there and proves nothing."
    return figure("validation", f"On the validation split: {last}.", caption, draw)


def _series(run: CertifiedRun, split: str, name: str) -> np.ndarray:
    """(2, n): steps and values of a metric."""
    points = [(row["step"], row[name]) for row in run.metrics if row["split"] == split and finite(row.get(name))]
    return np.array(points, np.float64).reshape(-1, 2).T
