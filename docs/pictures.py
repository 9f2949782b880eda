"""The pictures of README.md and of the site's first page, from what lies in the repository.

Run: python docs/pictures.py

- _static/discs.png: the last picture of theory.ipynb, as it was drawn when the notebook was executed.
- _static/zoo.svg: certified accuracy over radius of the networks of the zoo, from their certificates.
- _static/scaling.svg: what one of many devices does of matrix functions, from benchmarks/results/stack_shares.json.
tests/system/test_site.py holds that they are what this would write. Other pictures of the first page lie beside the
pages that show them; a card whose picture is not there yet is left out (`only_there`).
"""

import base64
import json
import pathlib
import re

import numpy as np

import lipjax

HERE = pathlib.Path(__file__).resolve().parent
TO = HERE / "_static"
SHARES = HERE.parent / "benchmarks" / "results" / "stack_shares.json"

_CARD = re.compile(
    r":::{grid-item-card}(?:(?!^:::$).)*?!\[[^\]]*\]\((?P<picture>[^)]*)\)(?:(?!^:::$).)*?^:::\n\n?", re.M | re.S
)


def only_there(text: str, folder: pathlib.Path = HERE) -> str:
    """The text of a page without the cards whose picture is not in the folder, such as those of comparisons to come."""
    return _CARD.sub(lambda card: card[0] if (folder / card["picture"]).is_file() else "", text)


def discs() -> bytes:
    """The PNG of the notebook's last picture."""
    cells = json.loads((HERE / "theory.ipynb").read_text())["cells"]
    drawn = [
        output["data"]["image/png"]
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return base64.b64decode(drawn[-1])


def curves(radii: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> the fraction of test images that are right and proved beyond each radius, for the networks of the zoo."""
    found = {}
    for name in lipjax.zoo.list():
        rows = json.loads((lipjax.zoo.directory(name) / "certificate.json").read_text())["images"]
        right = np.array([row["label"] == row["prediction"] for row in rows])
        proved = np.array([row["radius"] for row in rows])
        found[name] = np.mean(right & (proved > radii[:, None]), axis=1)
    return found


def _axes():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lipjax"  # the same file each time
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, 3.4), layout="constrained")


def draw_scaling(path: pathlib.Path) -> None:
    """Shares of one device over the number of devices, both on logarithmic scales, beside the best there is."""
    found = json.loads(SHARES.read_text())
    devices = found["devices"]
    fig, ax = _axes()
    for (name, shares), marker in zip(found["shares"].items(), "os^D", strict=True):
        ax.plot(devices, shares, marker=marker, label=NAMES[name])
    ax.plot(devices, [1 / count for count in devices], "k--", linewidth=1, label="1 / devices, the best there is")
    ax.set(xscale="log", yscale="log", xlabel="devices", ylabel="operations of a device / of one alone")
    ax.set_xticks(devices, [str(count) for count in devices], minor=False)
    ax.minorticks_off()
    ax.set_yticks([1 / count for count in devices], [f"1/{count}" for count in devices])
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, metadata={"Date": None})


NAMES = {
    "cayley": "Cayley transform",
    "expm": "exponential of skew matrices",
    "cholesky": "Cholesky orthogonalisation",
    "reflector": "block reflector (BRO)",
}


def draw_zoo(path: pathlib.Path) -> None:
    radii = np.linspace(0, 2, 201)
    fig, ax = _axes()
    for name, accuracy in curves(radii).items():
        ax.plot(radii, 100 * accuracy, label=name)
    ax.set(xlabel="l2 radius, pixels in [0, 1]", ylabel="certified accuracy, %", xlim=(0, 2), ylim=(0, 100))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    TO.mkdir(exist_ok=True)
    (TO / "discs.png").write_bytes(discs())
    draw_zoo(TO / "zoo.svg")
    draw_scaling(TO / "scaling.svg")
