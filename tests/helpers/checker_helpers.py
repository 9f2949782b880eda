"""Runs with honest certificates, and the forger who changes them."""

import hashlib
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from mlp_helpers import random_arrays

import lipjax
from lipjax import checker, conv, operators
from lipjax.certify import document
from lipjax.network import make_network


def draw(rng, *shape):
    """Random numbers of a size that keeps norms near 1."""
    return rng.normal(size=shape) / math.sqrt(shape[1] if len(shape) == 2 else math.prod(shape[:-1]) or 1)


def angles(rng, *shape):
    """Directions (*lead, 2, n) without a negative component."""
    theta = rng.uniform(0.1, 1.4, shape)
    return np.stack([np.cos(theta), np.sin(theta)], -2)


def linear_head(rng, classes, features):
    return operators.LinearHead(3 * draw(rng, classes, features), 0.1 * rng.normal(size=classes))


def sorted_network():
    rng = np.random.default_rng(0)
    ops = [
        ("conv", operators.Conv(draw(rng, 3, 3, 2, 4), (40, 52, 2), 4)),  # too large for its dense operator
        ("bias", operators.Bias(0.1 * rng.normal(size=4), (10, 13, 4))),
        ("act", operators.MaxMin((10, 13, 4))),
        ("wide", operators.Conv(draw(rng, 3, 3, 4, 5), (10, 13, 4), (2, 1))),
        ("flat", operators.Flatten((5, 13, 5))),
        ("dense", operators.Dense(draw(rng, 6, 5 * 13 * 5))),
    ]
    return make_network(ops, linear_head(rng, 4, 6), np.array([0.3, 0.4]), np.array([0.5, 0.6]))


def many_operators():
    rng = np.random.default_rng(1)
    skew = np.asarray(conv.skew_kernel(jnp.asarray(2 * draw(rng, 3, 3, 4, 4))))
    ops = [
        ("small", operators.Conv(draw(rng, 2, 3, 2, 4), (6, 6, 2), 1, ((1, 0), (1, 1)))),
        ("exponential", operators.ConvExponential(skew, (6, 6, 4), 5)),
        ("fold", operators.Householder(angles(rng, 2), (6, 6, 4))),
        ("patches", operators.SpaceToDepth((6, 6, 4), 2)),
        ("around", operators.Conv(draw(rng, 5, 3, 16, 6), (3, 3, 16), 1, "CIRCULAR")),
        ("sectors", operators.Householder2(angles(rng, 3, 3), (3, 3, 6))),
        ("pad", operators.PadChannels((3, 3, 6), 8)),
        ("around_it", operators.ZeroPad((3, 3, 8), ((0, 1), (1, 1)))),
        ("circular", operators.CircularConv.from_blocks(draw(rng, 2, 6, 8), draw(rng, 9, 2, 6, 8), (4, 5, 8))),
        ("margin", operators.Crop((4, 5, 6), ((1, 0), (1, 1)))),
        ("pool", operators.ProjectionPool(angles(rng, 3), (3, 3, 6))),
        ("crop", operators.CropChannels((3, 3, 3), 2)),
        ("flat", operators.Flatten((3, 3, 2))),
        ("larger", operators.MaxPoolPairs((18,))),
    ]
    return make_network(ops, linear_head(rng, 3, 9), 0.5, 0.25)


def mlp_network():
    rng = np.random.default_rng(2)
    ops = [("flat", operators.Flatten((4, 4, 1))), ("dense", operators.Dense(draw(rng, 10, 16)))]
    weights = random_arrays(classes=4, hidden=24, features=10, seed=3, scale=0.7)
    return make_network(ops, operators.MLPHead(*map(jnp.asarray, weights)), 0.3, 0.5)


def elementwise_network():
    rng = np.random.default_rng(4)
    ops = [("flat", operators.Flatten((3, 4, 1)))]
    kinds = (operators.ReLU, operators.Tanh, operators.Sigmoid, operators.Softplus)
    for i, kind in enumerate(kinds):
        ops += [(f"dense{i}", operators.Dense(draw(rng, 8 + i, 7 + i if i else 12))), (f"act{i}", kind((8 + i,)))]
    ops += [("last", operators.Dense(draw(rng, 5, 11))), ("leaky", operators.LeakyReLU((5,), 0.25))]
    return make_network(ops, linear_head(rng, 3, 5))


def residual_network():
    rng = np.random.default_rng(6)
    shape = (4, 3, 4)
    branch = (
        operators.Conv(draw(rng, 3, 3, 4, 4), shape),
        operators.Bias(0.1 * rng.normal(size=4), shape),
        operators.MaxMin(shape),
    )
    inner = operators.Dense(draw(rng, 5, 48)), operators.Softplus((5,)), operators.Dense(draw(rng, 48, 5))
    ops = [
        ("block", operators.Residual(branch)),
        ("flat", operators.Flatten(shape)),
        ("vectors", operators.Residual(inner)),
    ]
    return make_network(ops, linear_head(rng, 3, 48), 0.2, 0.5)


def potential_network():
    """Steps and sandwiches of all kinds of linear maps; of one step the norm is below 1."""
    rng = np.random.default_rng(7)
    shape = (4, 3, 2)
    strided = operators.Conv(0.2 * draw(rng, 3, 3, 2, 3), shape, 2)
    blocks = draw(rng, 2, 4, 5), draw(rng, 5, 2, 4, 5)
    circle = operators.CircularConv.from_blocks(*blocks, (4, 3, 5))
    around = operators.Conv(draw(rng, 3, 2, 3, 2), (4, 3, 3), 1, "CIRCULAR")
    stacked = operators.Dense(draw(rng, 4, 41))
    ops = [
        ("step", operators.PotentialStep(strided, 0.1 * rng.normal(size=3), operators.ReLU((2, 2, 3)))),
        ("circle", operators.Sandwich(circle, 0.1 * rng.normal(size=4), operators.ReLU((4, 3, 4)), 3)),
        ("around", operators.PotentialStep(around, 0.1 * rng.normal(size=2), operators.LeakyReLU((4, 3, 2), 0.25))),
        ("flat", operators.Flatten((4, 3, 3))),
        ("sandwich", operators.Sandwich(stacked, 0.1 * rng.normal(size=4), operators.Tanh((4,)), 5)),
        ("last", operators.PotentialStep(operators.Dense(draw(rng, 3, 5)), np.zeros(3), operators.Softplus((3,)))),
    ]
    return make_network(ops, linear_head(rng, 3, 5), 0.2, 0.5)


def grouped_network():
    """Groups, dilation, transposition and shuffles, with activations that LipLT takes."""
    rng = np.random.default_rng(8)
    skew = np.asarray(conv.skew_kernel(jnp.asarray(2 * draw(rng, 3, 3, 2, 4)), 2))
    down = operators.Conv(draw(rng, 2, 2, 1, 4), (6, 6, 4), 2, "VALID", 4)
    ops = [
        ("groups", operators.Conv(draw(rng, 3, 3, 2, 4), (6, 6, 4), 2, groups=2)),
        ("act", operators.ReLU((3, 3, 4))),
        ("deal", operators.ChannelShuffle((3, 3, 4), 2)),
        ("up", operators.ConvTranspose(down)),
        ("bias", operators.Bias(0.1 * rng.normal(size=4), (6, 6, 4))),
        ("act2", operators.ReLU((6, 6, 4))),
        ("around", operators.Conv(draw(rng, 3, 3, 2, 4), (6, 6, 4), 1, "CIRCULAR", 2, 2)),
        ("again", operators.Conv(draw(rng, 3, 2, 1, 4), (6, 6, 4), 2, "CIRCULAR", 4, (2, 3))),
        ("act3", operators.ReLU((3, 3, 4))),
        ("exponential", operators.ConvExponential(skew, (3, 3, 4), 5, groups=2)),
        ("pairs", operators.ChannelShuffle((3, 3, 4), 1, paired=True)),
        ("flat", operators.Flatten((3, 3, 4))),
    ]
    return make_network(ops, linear_head(rng, 3, 36), 0.3, 0.5)


def token_network():
    rng = np.random.default_rng(8)
    shape = (3, 4, 6)
    ops = [
        ("pad", operators.PadChannels((3, 4, 2), 6)),
        ("position", operators.PositionalBias(0.1 * rng.normal(size=(3, 4, 1)), shape)),
        ("first", operators.Conv(draw(rng, 1, 1, 6, 6), shape)),
        ("shift", operators.Shift(shape, 1)),
        ("second", operators.Conv(draw(rng, 1, 1, 6, 6), shape)),
        ("act", operators.MaxMin(shape)),
        ("pool", operators.L2Pool(shape, (3, 2), 0.01)),
        ("flat", operators.Flatten((3, 2, 6))),
    ]
    return make_network(ops, linear_head(rng, 3, 36), 0.2, 0.5)


NETWORKS = {
    f.__name__: f
    for f in (
        sorted_network,
        many_operators,
        mlp_network,
        elementwise_network,
        residual_network,
        potential_network,
        grouped_network,
        token_network,
    )
}


COUNT = 12


def fingerprint(pixels, labels):
    digest = hashlib.sha256(b"pixel_max 255\n")
    for array in (pixels, labels.astype("<i4")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def accuracies(rows, radii):
    right = [row["label"] == row["prediction"] for row in rows]
    certified = {}
    for r in radii:
        counted = [a and row["radius"] > r for a, row in zip(right, rows, strict=True)]
        certified[checker.shown(float(r))] = float(np.mean(counted))
    return {"clean_accuracy": float(np.mean(right)), "certified_accuracy": certified, "radii": list(radii)}


def write_run(directory, network, dtype="float64"):
    """A run's directory with an honest certificate, and the frozen network, whose files hold numbers of this dtype."""
    frozen = lipjax.freeze(jax.tree.map(lambda a: np.asarray(a, np.float64), network), dtype=dtype)
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (COUNT, *frozen.in_shape), dtype=np.uint8)
    certificate = frozen.certify(pixels / np.float64(255), COUNT)
    labels = np.where(np.arange(COUNT) % 4, certificate.predictions, 0)
    data = {"name": "made up", "split": "test", "num_images": COUNT, "of": COUNT, "pixel_max": 255}
    data["sha256"] = fingerprint(pixels, labels)
    frozen.save(directory / "frozen")
    written = document.write_certificate(directory, frozen, certificate, pixels, labels, data, holds_split=True)
    report = accuracies(written["images"], (0.01, 0.05))
    report |= {"num_images": COUNT, "frozen_sha256": frozen.sha256()}
    (directory / "report.json").write_text(json.dumps(report))
    return frozen


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Forger:
    """Changes a run, and recomputes every hash as an attacker would."""

    layout: dict
    certificate: dict
    report: dict

    def __init__(self, directory):
        self.directory = directory
        self.paths = {"layout": "frozen/network.json", "certificate": "certificate.json", "report": "report.json"}
        for name, path in self.paths.items():
            setattr(self, name, json.loads((directory / path).read_text()))
        self.arrays = safetensors.numpy.load_file(directory / "frozen/network.safetensors")
        self.images = safetensors.numpy.load_file(directory / "images.safetensors")

    @property
    def rows(self):
        return self.certificate["images"]

    @property
    def constants(self):
        return self.certificate["margin_lipschitz"]

    def layer(self, name):
        return next(row for row in self.certificate["layers"] if row["name"] == name)

    def op(self, name):
        return next(entry for entry in self.layout["ops"] if entry["name"] == name)

    def set_margin(self, row, margin, rival=None):
        """A row that agrees with itself."""
        row["rival"] = row["rival"] if rival is None else rival
        row["margin"] = margin
        row["radius"] = math.nextafter(margin / self.constants[row["prediction"]][row["rival"]], 0)

    def set_radii(self):
        for row in self.rows:
            self.set_margin(row, row["margin"])

    def write(self, hashes=True, report=True):
        if hashes:
            digest = hashlib.sha256(json.dumps({k: self.layout[k] for k in ("ops", "head")}, sort_keys=True).encode())
            for name, array in sorted(self.arrays.items()):
                digest.update(f"\n{name} {list(array.shape)}\n".encode() + array.tobytes())
            own = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in self.arrays.items()}
            sha = digest.hexdigest()
            self.layout["sha256"] = self.certificate["frozen_sha256"] = self.report["frozen_sha256"] = sha
            self.certificate["arrays"] = own
        if report:
            self.report |= accuracies(self.rows, self.report["radii"]) | {"num_images": len(self.rows)}
        safetensors.numpy.save_file(self.arrays, self.directory / "frozen/network.safetensors")
        safetensors.numpy.save_file(self.images, self.directory / "images.safetensors")
        if hashes:
            data = (self.directory / "images.safetensors").read_bytes()
            self.certificate["sample"]["sha256"] = hashlib.sha256(data).hexdigest()
        for name, path in self.paths.items():
            (self.directory / path).write_text(json.dumps(getattr(self, name)))


def honest_runs(tmp_path_factory):
    """A function: name of a network -> directory of a run with its honest certificate, made once."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            write_run(directory, NETWORKS[name]())
            made[name] = directory
        return made[name]

    return get


def assert_caught(run, directory, forge, place):
    """A copy of an honest run that is forged is refused, with the place in one of the lines."""
    shutil.copytree(run, directory)
    forge(Forger(directory))
    code, lines = checker.check(directory)
    assert code == 1 and any(place in line for line in lines), lines
