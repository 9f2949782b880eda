"""The pictures of README.md and of the site's first page, from what lies in the repository.

Run: python docs/pictures.py

- _static/discs.png: the last picture of theory.ipynb, as it was drawn when the notebook was executed.
- _static/zoo.svg: certified accuracy over radius of the networks of the zoo, from their certificates.
tests/system/test_site.py holds that both are what this would write.
"""

import base64
import json
import pathlib

import numpy as np

import lipjax

HERE = pathlib.Path(__file__).resolve().parent
TO = HERE / "_static"


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


def draw_zoo(path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lipjax"  # the same file each time
    import matplotlib.pyplot as plt

    radii = np.linspace(0, 2, 201)
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
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
