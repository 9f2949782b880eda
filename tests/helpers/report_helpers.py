"""The directory of a made-up run, and what is asked of every page about it."""

import html.parser
import json

import numpy as np

from lipjax import FrozenNetwork, network, operators

CLAIM = "For every x' with |x' - x|_2 < radius, the class at x' is that of x."
NUM_IMAGES, NUM_ATTACKED = 20, 10


def network_of_the_run():
    rng = np.random.default_rng(0)
    matrix, head = rng.normal(size=(5, 12)), rng.normal(size=(3, 5))
    ops = (operators.Flatten((2, 2, 3)), operators.Dense(matrix))
    last = operators.LinearHead(head, np.zeros(3))
    return matrix, FrozenNetwork(network.Network(ops, last, np.zeros(1), np.full(1, 0.5), ("flatten", "linear")))


def documents(sha256, seed=0, text="plain"):
    """certificate.json and report.json of a run that classifies 18 of 20 images correctly, radius 1/8, 2/8, …, 20/8."""
    labels, radii = np.arange(NUM_IMAGES) % 3, np.arange(1, NUM_IMAGES + 1) / 8
    predictions = np.where(np.arange(NUM_IMAGES) < 2, (labels + 1) % 3, labels)
    image_rows = [
        {"label": int(label), "prediction": int(prediction), "rival": 0, "margin": 1.0, "radius": float(radius)}
        for label, prediction, radius in zip(labels, predictions, radii, strict=True)
    ]
    exact = {"bound": 1.0, "method": "exact: a reordering", "details": {}}
    certificate = {
        "format": "lipjax-certificate",
        "schema": 3,
        "claim": CLAIM,
        "frozen_sha256": sha256,
        "data": {"name": "made up", "split": "test", "num_images": NUM_IMAGES, "of": 50, "sha256": "d" * 64},
        "config": {"num_epochs": 7, "model": {"name": "tinynet", "note": text}, "loss": {"name": "emma"}},
        "seed": seed,
        "step": 123,
        "precision": "float64 throughout",
        "versions": {"lipjax": "9.8.7"},
        "platform": "Some Machine",
        "layers": [
            {"name": "input", "type": "Normalize", "bound": 2.0, "method": "exact: 1 / min(input_std)", "details": {}},
            {"name": "flatten", "type": "Flatten", **exact},
            {
                "name": "linear",
                "type": "Dense",
                "bound": 5.4321004,
                "method": text,
                "details": {},
                "estimate": 5.4,
                "gap": 0.005944,
            },
            {
                "name": "series",
                "type": "ConvExponential",
                "bound": 1 + 2**-40,
                "method": "supremum",
                "details": {"num_terms": 3, "skew_norm": 1.0},
            },
        ],
        "liplt": {
            "layers": [{"name": "relu", "bound": 3.25, "product": 4.5}],
            "chains": [{"start": "input", "end": "relu", "bound": 3.125, "method": "dense", "details": {}}],
        },
        "margin_lipschitz": [[0, 1.5, 2.5], [1.5, 0, 3.5], [2.5, 3.5, 0]],
        "images": image_rows,
    }
    report = {
        "clean_accuracy": 0.9,
        "certified_accuracy": {"0.141176": 0.9, "0.75": 0.7},
        "attacked_accuracy": {"0.141176": 0.8, "0.75": 0.6},
        "float32_clean_accuracy": 0.9,
        "float32_certified_accuracy": {"0.141176": 0.8, "0.75": 0.5},
        "radii": [36 / 255, 0.75],
        "num_images": NUM_IMAGES,
        "num_attacked_images": NUM_ATTACKED,
        "seed": seed,
        "step": 123,
        "frozen_sha256": sha256,
    }
    return certificate, report


def write_run(directory, sha256="f" * 64, **changes):
    directory.mkdir(parents=True)
    certificate, report = documents(sha256, **changes)
    (directory / "certificate.json").write_text(json.dumps(certificate))
    (directory / "report.json").write_text(json.dumps(report))
    (directory / "config.json").write_text("{}")
    lines = [{"step": s, "split": "train", "loss": 3.0 / s} for s in (1, 2, 3)]
    lines += [{"step": 3, "split": "validation", "accuracy": 0.75, "certified_accuracy_estimate": 0.375}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "spl')
    return directory


def write_attack(directory, sha256="f" * 64):
    """Three images: the first is misclassified, no adversarial image is known of the last."""
    images = np.random.default_rng(1).uniform(0.25, 0.75, (3, 2, 2, 3)).astype(np.float32)
    points = images + np.float32(0.125)
    points[2] = np.nan
    run = json.loads((directory / "certificate.json").read_text())["images"][:3]
    arrays = {name: np.array([row[name] for row in run]) for name in ("label", "prediction", "radius")}
    distances = np.array([0.4375, 0.625, np.nan])
    np.savez(directory / "attack.npz", index=np.arange(3), image=images, point=points, distance=distances, **arrays)
    lipschitz = {"violations": 0, "num_pairs": 2, "of": 3, "largest_ratio": 0.8125, "mean_ratio": 0.5, "pairs": []}
    document = {
        "format": "lipjax-attack",
        "schema": 1,
        "frozen_sha256": sha256,
        "num_images": NUM_ATTACKED,
        "attacked_accuracy": {"0.141176": 0.7, "0.75": 0.65},
        "gate": {"num_images": 10, "violations": 0, "closest_ratio": 1.2345, "closest_index": 1},
        "lipschitz": {**lipschitz, "whole_lower": 4.0, "whole_proved": 5.0},
    }
    (directory / "attack.json").write_text(json.dumps(document))


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order, and collects text, references and elements."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.references, self.ids, self.parts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.parts.append(data)


def stands_alone(text):
    page = Page(text)
    assert all(r.startswith(("data:image/png;base64,", "#")) for r in page.references), page.references
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    return page
