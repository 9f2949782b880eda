"""The independent checker: it proves honest certificates of every family, and nothing that was tampered with."""

import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from mlp_helpers import random_arrays

from lipjax import __main__ as command_line
from lipjax import bounds, checker, conv, document, operators
from lipjax.frozen import FrozenNetwork
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
        ("circular", operators.CircularConv.from_blocks(draw(rng, 1, 6, 8), draw(rng, 4, 2, 6, 8), (3, 3, 8))),
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


NETWORKS = {f.__name__: f for f in (sorted_network, many_operators, mlp_network, elementwise_network, residual_network)}
COUNT = 12


def fingerprint(pixels, labels):
    digest = hashlib.sha256(b"pixel_max 255\n")
    for array in (pixels, labels.astype("<i4")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def accuracies(rows, radii):
    right = [row["label"] == row["prediction"] for row in rows]
    certified = {
        f"{r:.6g}": float(np.mean([a and row["radius"] > r for a, row in zip(right, rows, strict=True)])) for r in radii
    }
    return {"clean_accuracy": float(np.mean(right)), "certified_accuracy": certified, "radii": list(radii)}


def write_run(directory, network):
    """A run's directory with an honest certificate, and the frozen network."""
    frozen = FrozenNetwork(jax.tree.map(lambda a: np.asarray(a, np.float64), network))
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            write_run(directory, NETWORKS[name]())
            made[name] = directory
        return made[name]

    return get


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NETWORKS)
def test_honest_certificates_are_proved(runs, name):
    before = contents(runs(name))
    code, lines = checker.check(runs(name))
    assert code == 0, lines
    assert any("every bound proved" in line for line in lines)
    assert any(f"all {COUNT} images" in line for line in lines)
    assert contents(runs(name)) == before  # nothing is written
    rows = json.loads((runs(name) / "certificate.json").read_text())["images"]
    assert max(row["radius"] for row in rows) > 1e-3  # control: something is claimed


class Forger:
    """Changes a run, and recomputes every hash as an attacker would."""

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


def flip_bit(f):
    f.arrays["ops/conv/kernel"].view(np.uint8).reshape(-1)[0] ^= 1
    f.write(hashes=False)


def flip_bit_of_layout(f):
    f.op("conv")["in_shape"] = [40, 52, 3]
    f.write(hashes=False)


def larger_weights(f):
    f.arrays["ops/conv/kernel"] *= 1 + 1e-6
    f.write()


def other_weights(f):
    f.arrays["ops/dense/matrix"] *= -1
    f.write()


def lower_bound(f):
    f.layer("wide")["bound"] *= 1 - 1e-6
    f.write()


def lower_bound_and_what_follows(f):
    f.layer("dense")["bound"] *= 0.9
    f.certificate["margin_lipschitz"] = [[0.9 * v for v in row] for row in f.constants]
    f.set_radii()
    f.write()


def lower_bound_of_input(f):
    f.layer("input")["bound"] *= 1 - 2**-50
    f.write()


def lower_bound_of_activation(f):
    f.layer("act")["bound"] = 1 - 2**-53
    f.write()


def lower_constant(f):
    f.constants[0][1] *= 1 - 1e-8
    f.set_radii()
    f.write()


def negative_constant(f):
    f.constants[1][0] = -1.0
    f.write()


def swap_label(f):
    f.rows[3]["label"] = (f.rows[3]["label"] + 1) % 4
    f.write()


def swap_label_everywhere(f):
    f.rows[0]["label"] = f.rows[0]["prediction"]
    f.images["labels"][0] = f.rows[0]["prediction"]
    f.images["labels"][4] = f.rows[4]["label"] = f.rows[4]["prediction"]
    f.write()


def swap_prediction(f):
    row = f.rows[2]
    row["prediction"], row["rival"] = row["rival"], row["prediction"]
    f.set_margin(row, row["margin"])
    f.write()


def raise_radius(f):
    f.rows[1]["radius"] = math.nextafter(f.rows[1]["radius"], 1)
    f.write()


def raise_margin(f):
    f.set_margin(f.rows[1], f.rows[1]["margin"] * (1 + 1e-9))
    f.write()


def forget_a_rival(f):
    x = f.images["pixels"][5] / np.float64(255)
    frozen = FrozenNetwork.load(f.directory / "frozen")
    (p,), (margins,) = frozen.margins(x[None])
    quotients = {i: margins[i] / f.constants[p][i] for i in range(4) if i not in (p, f.rows[5]["rival"])}
    rival = min(quotients, key=quotients.__getitem__)
    f.set_margin(f.rows[5], float(margins[rival]), rival)
    f.write()


def other_rival(f):
    """A smaller radius, against a class that does not limit it."""
    row = f.rows[6]
    radius = row["radius"]
    row["rival"] = next(i for i in range(4) if i not in (row["prediction"], row["rival"]))
    f.set_margin(row, 0.5 * radius * f.constants[row["prediction"]][row["rival"]])
    f.write()


def other_mean(f):
    f.arrays["input_mean"] += 0.01
    f.write()


def smaller_std(f):
    f.arrays["input_std"] *= 0.5
    f.write()


def negative_std(f):
    f.arrays["input_std"] *= -1
    f.write()


def wrong_hash(f):
    f.layout["sha256"] = "0" * 64
    f.write(hashes=False)


def wrong_hash_of_images(f):
    f.certificate["sample"]["sha256"] = "0" * 64
    f.write(hashes=False)


def nan_in_array(f):
    f.arrays["head/bias"][0] = np.nan
    f.write()


def single_precision(f):
    f.arrays["head/bias"] = f.arrays["head/bias"].astype(np.float32)
    f.write()


def short_bias(f):
    f.arrays["ops/bias/bias"] = f.arrays["ops/bias/bias"][:1]
    f.write()


def missing_array(f):
    del f.arrays["ops/bias/bias"]
    f.write()


def array_that_nobody_reads(f):
    f.arrays["ops/conv/other"] = np.zeros(1)
    f.write()


def shadowed_array(f):
    f.op("bias")["bias"] = [0.0] * 4
    f.write()


def other_stride(f):
    f.op("conv")["strides"] = [4, 5]
    f.write()


def other_padding(f):
    f.op("wide")["padding"] = "CIRCULAR"
    f.write()


def unknown_operator(f):
    f.op("act")["type"] = "BatchNorm"
    f.layer("act")["type"] = "BatchNorm"
    f.write()


def unknown_method(f):
    f.layer("conv")["method"] = "power iteration"
    f.write()


def grid_that_is_too_small(f):
    f.layer("conv")["details"]["grid"][1] = 1
    f.write()


def rows_of_layers_left_out(f):
    f.certificate["layers"].pop(4)
    f.write()


def changed_image(f):
    f.images["pixels"][7, 3, 3] ^= 128
    f.write()


def changed_index(f):
    f.images["indices"][0] = 1
    f.write()


def images_left_out(f):
    f.images = {name: np.ascontiguousarray(a[1:]) for name, a in f.images.items()}
    f.certificate["sample"]["num_images"] -= 1
    f.write()


def rows_left_out(f):
    del f.rows[4]
    f.write()


def rows_left_out_everywhere(f):
    keep = [i for i in range(COUNT) if i != 4]
    f.certificate["images"] = [f.rows[i] for i in keep]
    f.images = {name: np.ascontiguousarray(a[keep]) for name, a in f.images.items()}
    f.images["indices"] = np.arange(COUNT - 1)
    f.certificate["data"]["num_images"] = f.certificate["sample"]["num_images"] = COUNT - 1
    f.write()


def other_scale(f):
    f.certificate["data"]["pixel_max"] = 254
    f.write()


def other_claim(f):
    f.certificate["claim"] = f.certificate["claim"].replace("l2", "l-infinity")
    f.write()


def better_report(f):
    f.report["certified_accuracy"]["0.05"] = 1.0
    f.write(report=False)


def report_at_another_radius(f):
    f.report["certified_accuracy"]["9.99"] = 1.0
    f.write(report=False)


def clean_accuracy(f):
    f.report["clean_accuracy"] = 1.0
    f.write(report=False)


def infinite_radius(f):
    f.rows[0]["radius"] = 10**400
    f.write(report=False)


def true_as_prediction(f):
    f.rows[0]["prediction"] = True
    f.write(report=False)


def unknown_field(f):
    f.rows[0]["nonce"] = 3
    f.write()


def huge_grid(f):
    f.layer("conv")["details"]["grid"] = [10**6, 10**6]
    f.write()


def loop_transformation_of_another_network(f):
    f.certificate["liplt"] = {"chains": []}
    f.write()


def accuracies_of_no_images(f):
    f.rows.clear()
    f.certificate["data"]["num_images"] = f.report["num_images"] = f.certificate["sample"]["num_images"] = 0
    f.certificate["sample"]["is_split"] = False
    f.images = {name: array[:0] for name, array in f.images.items()}
    f.write(report=False)


SORTED = {
    huge_grid: "layers, conv (Conv): grid [",
    loop_transformation_of_another_network: "certificate.json, liplt",
    accuracies_of_no_images: "report.json: accuracies of no images",
    unknown_field: "certificate.json, images[0]: expected label",
    flip_bit: "network.safetensors, ops/conv/kernel",
    flip_bit_of_layout: "network.json, sha256",
    larger_weights: "layers, conv (Conv): the bound",
    other_weights: "certificate.json, images[",
    lower_bound: "layers, wide (Conv): the bound",
    lower_bound_and_what_follows: "layers, dense (Dense): the bound",
    lower_bound_of_input: "layers, input (Normalize): the bound",
    lower_bound_of_activation: "layers, act (MaxMin): the bound",
    lower_constant: "margin_lipschitz[0][1]",
    negative_constant: "certificate.json, margin_lipschitz",
    swap_label: "certificate.json, images[3]: label",
    swap_label_everywhere: "certificate.json, data",
    swap_prediction: "certificate.json, images[2]: prediction",
    raise_radius: "certificate.json, images[1]: radius",
    raise_margin: "certificate.json, images[1]: margin",
    forget_a_rival: "certificate.json, images[5]: radius",
    other_rival: "certificate.json, images[6]: rival",
    other_mean: "certificate.json, images[",
    smaller_std: "layers, input (Normalize)",
    negative_std: "input_std is not positive",
    wrong_hash: "network.json, sha256",
    wrong_hash_of_images: "images.safetensors: hashes to",
    nan_in_array: "network.safetensors, head/bias: expected finite",
    single_precision: "network.safetensors, head/bias: expected finite float64",
    short_bias: "network.json, bias (Bias)",
    missing_array: "network.json, bias (Bias): the array ops/bias/bias is missing",
    array_that_nobody_reads: "ops/conv/other: an array that no operator has",
    shadowed_array: "network.json, bias (Bias): expected the fields",
    other_stride: "network.json, bias: takes",
    other_padding: "layers, wide (Conv)",
    unknown_operator: "operators of type 'BatchNorm' cannot be checked",
    unknown_method: "layers, conv (Conv): the method 'power iteration' is not known",
    grid_that_is_too_small: "layers, conv (Conv): grid [",
    rows_of_layers_left_out: "certificate.json, layers",
    changed_image: "certificate.json, data",
    changed_index: "images.safetensors, indices",
    images_left_out: "images.safetensors, indices",
    rows_left_out: "certificate.json, data",
    rows_left_out_everywhere: "certificate.json, data",
    other_scale: "images.safetensors: labels or pixels do not fit",
    other_claim: "certificate.json, claim",
    better_report: "report.json, certified_accuracy[0.05]",
    report_at_another_radius: "report.json, certified_accuracy[9.99]",
    clean_accuracy: "report.json, clean_accuracy",
    infinite_radius: "certificate.json, images[0]",
    true_as_prediction: "certificate.json, images[0]",
}


def not_skew(f):
    kernel = f.arrays["ops/exponential/kernel"]
    kernel[0, 0, 0, 1] = np.nextafter(kernel[0, 0, 0, 1], 1)
    f.write()


def lower_skew_norm(f):
    f.layer("exponential")["details"]["skew_norm"] *= 0.5
    f.write()


def lower_gain(f):
    f.layer("exponential")["bound"] *= 1 - 1e-8
    f.write()


def more_terms(f):
    f.op("exponential")["num_terms"] = 6
    f.layer("exponential")["details"]["num_terms"] = 6
    f.write()


def long_direction(f):
    f.arrays["ops/fold/direction"] *= 3
    f.write()


def side_of_sector(f):
    f.arrays["ops/sectors/directions"][1, 1] *= -1
    f.write()


def lower_bound_of_blocks(f):
    f.layer("circular")["bound"] *= 1 - 1e-7
    f.write()


def larger_block(f):
    f.arrays["ops/circular/paired"][2] *= 3
    f.write()


def lower_bound_of_small_map(f):
    f.layer("small")["bound"] *= 1 - 1e-7
    f.write()


def twist_around(f):
    f.layer("around")["details"]["twist"] = [1, 0]
    f.write()


MANY = {
    not_skew: "network.json, exponential (ConvExponential): the kernel is not skew",
    lower_skew_norm: "layers, exponential (ConvExponential): |J|",
    lower_gain: "layers, exponential (ConvExponential): the bound",
    more_terms: "exponential",
    long_direction: "network.json, fold (Householder): direction of lengths",
    side_of_sector: "network.json, sectors (Householder2): directions with a negative",
    lower_bound_of_blocks: "layers, circular (CircularConv): the bound",
    larger_block: "layers, circular (CircularConv): the bound",
    lower_bound_of_small_map: "layers, small (Conv): the bound",
    twist_around: "layers, around (Conv): grid",
}


def lower_bound_of_block(f):
    f.layer("block")["bound"] *= 1 - 1e-7
    f.write()


def lower_bound_inside(f):
    row = f.layer("block")
    row["details"]["parts"][0]["bound"] *= 1 - 1e-6
    f.write()


def part_left_out(f):
    del f.layer("block")["details"]["parts"][2]
    f.write()


def other_part(f):
    f.layer("vectors")["details"]["parts"][1]["type"] = "Tanh"
    f.write()


def part_that_is_no_number(f):
    f.layer("vectors")["details"]["parts"][1]["bound"] = None
    f.write()


def larger_weights_inside(f):
    f.arrays["ops/vectors/2/matrix"] *= 1 + 1e-6
    f.write()


def other_weights_inside(f):
    f.arrays["ops/vectors/2/matrix"] *= -1
    f.write()


def bias_inside_of_another_shape(f):
    f.arrays["ops/block/1/bias"] = f.arrays["ops/block/1/bias"][:2]
    f.write()


def array_missing_inside(f):
    del f.arrays["ops/block/0/kernel"]
    f.write()


def operator_left_out_inside(f):
    del f.op("vectors")["ops"][2]
    del f.arrays["ops/vectors/2/matrix"]
    f.write()


def block_in_a_block(f):
    f.op("vectors")["ops"][1] = {"type": "Residual", "ops": []}
    f.write()


def name_inside(f):
    f.op("block")["ops"][2]["name"] = "act"
    f.write()


def ops_that_are_no_list(f):
    f.op("block")["ops"] = 3
    f.write()


RESIDUAL = {
    lower_bound_of_block: "layers, block (Residual): the bound",
    lower_bound_inside: "layers, block (Residual): operator 0 (Conv): the bound",
    part_left_out: "layers, block (Residual): details state no bounds",
    other_part: "layers, vectors (Residual): operator 1 (Softplus): stated of a 'Tanh'",
    part_that_is_no_number: "layers, vectors (Residual): operator 1 (Softplus): bound",
    larger_weights_inside: "layers, vectors (Residual): operator 2 (Dense): the bound",
    other_weights_inside: "certificate.json, images",
    bias_inside_of_another_shape: "network.json, block (Residual): a bias of shape (2,)",
    array_missing_inside: "network.json, block (Residual): the array ops/block/0/kernel is missing",
    operator_left_out_inside: "network.json, vectors (Residual): (5,) cannot be added to (48,)",
    block_in_a_block: "network.json, vectors (Residual): an operator that cannot stand",
    name_inside: "network.json, block (Residual): expected the fields ['in_shape']",
    ops_that_are_no_list: "network.json, block (Residual): ops is no list",
}


def raise_mlp_radii(f):
    for row in f.rows:
        row["radius"] *= 1 + 1e-8
    f.write()


def lower_curvature(f):
    f.certificate["head"]["curvatures"][0][2] *= 0.99
    f.write()


def lower_norm_of_head(f):
    f.certificate["head"]["norm"] *= 1 - 1e-8
    f.write()


def no_minorants(f):
    for name in ("minorant_images", "minorant_rivals", "minorant_points"):
        f.images[name] = f.images[name][:0]
    f.write()


def other_minorants(f):
    f.images["minorant_points"] += np.float32(0.3)
    f.write()


MLP = {
    raise_mlp_radii: "certificate.json, images[",
    lower_curvature: "certificate.json, head (MLPHead): curvature",
    lower_norm_of_head: "certificate.json, head (MLPHead): |W1|",
    no_minorants: "cannot be proved against class",
    other_minorants: "cannot be proved against class",
}


def steeper_slope(f):
    f.op("leaky")["negative_slope"] = -1.5
    f.write()


def other_slope(f):
    f.op("leaky")["negative_slope"] = -0.9
    f.write()


def scale_constants(f, factor):
    f.certificate["margin_lipschitz"] = [[factor * value for value in row] for row in f.constants]
    f.set_radii()
    f.write()


def negative_chain(f):
    row = f.certificate["liplt"]["chains"][0]
    row |= {"bound": -1.01 * row["bound"], "method": "Cholesky of the banded Gram matrix of the composition"}
    scale_constants(f, 1e-9)


def lower_chain(f):
    f.certificate["liplt"]["chains"][1]["bound"] *= 0.99
    scale_constants(f, 0.999)


def lower_chains_that_no_constant_needs(f):
    for row in f.certificate["liplt"]["chains"]:
        row["bound"] = 0.0
    scale_constants(f, 1e6)


def lower_transformed_constants(f):
    scale_constants(f, 0.999)


def chain_left_out(f):
    f.certificate["liplt"]["chains"].pop(2)
    f.write()


def chain_stated_twice(f):
    f.certificate["liplt"]["chains"] += [dict(f.certificate["liplt"]["chains"][0], bound=0.0)]
    f.write()


ELEMENTWISE = {
    negative_chain: "is not a number of at least 0",
    lower_chain: "certificate.json, liplt: chain from",
    lower_chains_that_no_constant_needs: "certificate.json, liplt: chain from",
    lower_transformed_constants: "certificate.json, margin_lipschitz",
    chain_left_out: "is missing",
    chain_stated_twice: "stated twice",
    steeper_slope: "network.json, leaky (LeakyReLU): negative_slope",
    other_slope: "certificate.json, ",
}
TAMPERINGS = [
    pytest.param(name, forge, place, id=forge.__name__)
    for name, table in (
        ("sorted_network", SORTED),
        ("many_operators", MANY),
        ("mlp_network", MLP),
        ("elementwise_network", ELEMENTWISE),
        ("residual_network", RESIDUAL),
    )
    for forge, place in table.items()
]


@pytest.mark.parametrize(("name", "forge", "place"), TAMPERINGS)
def test_tamperings_are_caught_at_their_place(runs, tmp_path, name, forge, place):
    directory = tmp_path / "run"
    shutil.copytree(runs(name), directory)
    forge(Forger(directory))
    code, lines = checker.check(directory)
    assert code == 1 and any(place in line for line in lines), lines


@pytest.mark.parametrize("name", NETWORKS)
def test_writing_the_files_anew_is_no_tampering(runs, tmp_path, name):
    shutil.copytree(runs(name), tmp_path / "run")
    Forger(tmp_path / "run").write()
    assert checker.check(tmp_path / "run")[0] == 0


@pytest.mark.parametrize("last", ["circular", "exponential"])
def test_what_follows_the_last_activation_need_not_be_composed(tmp_path, last):
    """From there on LipLT then takes the product of norms."""
    shape, rng = (2, 2, 2), np.random.default_rng(8)
    turn = np.asarray(conv.skew_kernel(jnp.asarray(draw(rng, 1, 1, 2, 2))))
    ends = {
        "circular": operators.CircularConv.from_blocks(np.tile(np.eye(2), (4, 1, 1)), np.zeros((0, 2, 2, 2)), shape),
        "exponential": operators.ConvExponential(turn, shape, 12),
    }
    ops = [
        ("first", operators.Conv(np.diag([1.0, 0.01]).reshape(1, 1, 2, 2), shape)),
        ("act", operators.ReLU(shape)),
        ("second", operators.Conv(np.diag([0.01, 1.0]).reshape(1, 1, 2, 2), shape)),
        ("again", operators.ReLU(shape)),
        ("last", ends[last]),
        ("flat", operators.Flatten(shape)),
    ]
    frozen = write_run(tmp_path, make_network(ops, operators.LinearHead(np.eye(3, 8), 0.1 * rng.normal(size=3))))
    constants = frozen.margin_lipschitz()
    product = bounds.margin_lipschitz_bound(frozen.network)
    assert (constants < 0.8 * product)[~np.eye(3, dtype=bool)].all()
    code, lines = checker.check(tmp_path)
    assert code == 0 and any("LipLT" in line for line in lines), lines
    rows = json.loads((tmp_path / "certificate.json").read_text())
    rows["margin_lipschitz"] = (0.6 * constants).tolist()
    (tmp_path / "certificate.json").write_text(json.dumps(rows))
    assert checker.check(tmp_path)[0] == 1


def test_what_the_rounding_analysis_does_not_cover_is_refused():
    with pytest.raises(checker.Unproved, match="more than 9,000,000 numbers"):
        checker.OPERATORS["Flatten"]({"in_shape": [3001, 3000, 1]})


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "certificate.json").unlink(), "certificate.json is missing"),
        (lambda d: (d / "images.safetensors").unlink(), "images.safetensors is missing"),
        (lambda d: (d / "frozen/network.json").unlink(), "network.json is missing"),
        (lambda d: (d / "certificate.json").write_bytes((d / "certificate.json").read_bytes()[:-90]), "is damaged"),
        (lambda d: (d / "images.safetensors").write_bytes((d / "images.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda d: (d / "frozen/network.safetensors").write_bytes(b"abc"), "network.safetensors is damaged"),
        (lambda d: (d / "report.json").write_bytes(b"\xff"), "report.json is damaged"),
        (lambda d: edit(d / "certificate.json", '"schema": 2', '"schema": 1'), "expected format .* schema 2"),
        (lambda d: edit(d / "frozen/network.json", '"schema": 1', '"schema": 9'), "schema 1, got"),
        (lambda d: edit(d / "certificate.json", '"bound": 1.0', '"bound": NaN'), "NaN is no number"),
        (lambda d: edit(d / "certificate.json", '"schema": 2', '"schema": 2, "schema": 2'), "a key is there twice"),
        (lambda d: edit(d / "certificate.json", '"images": [', '"images": 3, "others": ['), "images is no list"),
        (lambda d: edit(d / "frozen/network.json", '"ops": [', '"ops": 3, "others": ['), "ops is no list"),
    ],
)
def test_unreadable_files_are_one_error(runs, tmp_path, capsys, damage, message):
    shutil.copytree(runs("sorted_network"), tmp_path / "run")
    damage(tmp_path / "run")
    assert checker.run(tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and captured.err.startswith("Error: ")
    assert re.search(message, captured.err)


def test_a_class_that_cannot_be_proved_does_not_count_as_correct(tmp_path):
    """Two translations by 2^120 cancel exactly, but not in float64."""
    shape = (1, 2, 1)
    shift = jnp.full(1, 2.0**120)
    ops = [
        ("up", operators.Bias(shift, shape)),
        ("down", operators.Bias(-shift, shape)),
        ("f", operators.Flatten(shape)),
    ]
    write_run(tmp_path, make_network(ops, operators.LinearHead(jnp.eye(2), jnp.asarray([100.0, 0.0]))))
    f = Forger(tmp_path)
    assert all(row["radius"] == 0 for row in f.rows)
    for row in f.rows:
        row["prediction"], row["rival"], row["label"] = 1, 0, 1
    f.images["labels"][:] = 1
    f.certificate["data"]["sha256"] = fingerprint(f.images["pixels"], f.images["labels"])
    f.write()
    code, lines = checker.check(tmp_path)
    assert code == 1 and any("whose class is not proved" in line for line in lines), lines


def test_the_command_line(runs, tmp_path, capsys):
    assert command_line.main(["check", str(runs("sorted_network"))]) == 0
    assert "proved" in capsys.readouterr().out
    for seed in (0, 1):
        shutil.copytree(runs("sorted_network"), tmp_path / f"seed_{seed}")
    assert command_line.main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("images evaluated again") == 2
    raise_radius(Forger(tmp_path / "seed_1"))
    assert command_line.main(["check", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "seed_0: proved" in captured.out and "seed_1: NOT PROVED" in captured.err
    assert command_line.main(["check", str(tmp_path / "nowhere")]) == 2
    assert command_line.main(["check", "~nobody-of-this-name/run"]) == 2
    (tmp_path / "seed_1" / "certificate.json").unlink()  # a run without one is not passed over
    assert command_line.main(["check", str(tmp_path)]) == 2
    assert "seed_1/certificate.json is missing" in capsys.readouterr().err


def test_the_file_runs_alone(runs, tmp_path):
    """Copied, in a process that finds neither lipjax nor the working directory."""
    shutil.copy(checker.__file__, tmp_path / "checker.py")
    code = (
        "import json, runpy, sys\n"
        "sys.argv = ['checker.py', sys.argv[1]]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    result = stop.code\n"
        "import os\n"
        "print(json.dumps([result, sorted(sys.modules), os.environ['OPENBLAS_NUM_THREADS']]))"
    )
    command = [sys.executable, "-I", "-c", code, str(runs("sorted_network"))]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    result, modules, threads = json.loads(process.stdout.splitlines()[-1])
    assert result == 0 and threads == "1" and "numpy" in modules
    assert not [name for name in modules if name.split(".")[0] in ("jax", "jaxlib", "lipjax", "scipy", "threadpoolctl")]


def test_large_sets_are_sampled_by_hash(runs, tmp_path, monkeypatch):
    rows = [{"radius": 0.1 * i} for i in range(2500)]
    drawn = checker.sample_indices("a" * 64, "b" * 64, rows)
    assert drawn == document.sample_indices("a" * 64, "b" * 64, rows).tolist() and len(set(drawn)) == 1000
    assert min(np.histogram(drawn, 5, (0, 2500))[0]) > 100  # from everywhere
    rows[0] = {"radius": 1.0}
    assert checker.sample_indices("a" * 64, "b" * 64, rows) != drawn  # whoever changes a row draws anew
    assert checker.sample_indices("c" * 64, "b" * 64, rows) != checker.sample_indices("a" * 64, "b" * 64, rows)

    monkeypatch.setattr(checker, "SAMPLE", 5)
    monkeypatch.setattr(document, "SAMPLE", 5)
    write_run(tmp_path, elementwise_network())
    code, lines = checker.check(tmp_path)
    assert code == 0 and any("5 (drawn by hash) of 12 images" in line for line in lines), lines
    f = Forger(tmp_path)
    f.certificate["sample"]["is_split"] = True  # a part of a split is not the split
    f.write()
    assert any("certificate.json, data" in line for line in checker.check(tmp_path)[1])


def test_as_many_images_as_asked_for_are_evaluated_again(runs, tmp_path, monkeypatch, capsys):
    """Of a sample; of the whole data set, which must be the certificate's; a false row outside the sample is found."""
    everything = safetensors.numpy.load_file(runs("sorted_network") / "images.safetensors")  # the same images
    monkeypatch.setattr(checker, "SAMPLE", 5)
    monkeypatch.setattr(document, "SAMPLE", 5)
    for name in ("sorted_network", "mlp_network"):
        write_run(tmp_path / name, NETWORKS[name]())
    run = tmp_path / "sorted_network"
    whole, other = str(tmp_path / "all.npz"), tmp_path / "other.safetensors"
    np.savez(whole, test_images=everything["pixels"], test_labels=everything["labels"])

    def check(*options, directory=run):
        code = command_line.main(["check", str(directory), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    assert "3 (drawn by hash) of 12 images" in check("--images", "3")[1]
    f = Forger(run)
    subsets = [checker.sample_indices(f.certificate["frozen_sha256"], "x", f.rows, count) for count in (3, 5, 12)]
    assert set(subsets[0]) < set(subsets[1]) and subsets[2] == list(range(12))
    code, text = check("--images", "all")
    assert code == 2 and "holds 5 of 12 images: for more, give --data" in text
    code, text = check("--data", whole)
    assert code == 0 and "all 12 images evaluated again" in text and "those of the data set's hash" in text
    assert "7 (drawn by hash) of 12 images" in check("--data", whole, "--images", "7")[1]
    code, text = check("--data", whole, directory=tmp_path / "mlp_network")
    assert code == 2 and "--images 5 at most" in text

    changed = everything["pixels"].copy()
    changed[11, 0, 0, 0] ^= 1
    safetensors.numpy.save_file({"pixels": changed, "labels": everything["labels"]}, other)
    code, text = check("--data", str(other), "--images", "2")
    assert code == 1 and "but the certificate is about 12 with" in text
    wrong = {"expected the arrays": {"x": changed}, "one for each": {"images": changed, "labels": changed}}
    for message, arrays in wrong.items():
        np.savez(tmp_path / "wrong.npz", **arrays)
        code, text = check("--data", str(tmp_path / "wrong.npz"))
        assert code == 2 and message in text
    packed = io.BytesIO()
    np.savez(packed, **{name: everything[name] for name in ("pixels", "labels")})
    start = packed.getvalue().index(b"PK\x01\x02")  # the directory at its end: each damage there ends otherwise
    for place, bit in ((start, 1), (start + 6, 64), (start + 8, 1), (start + 10, 14)):
        data = bytearray(packed.getvalue())
        data[place] ^= bit
        (tmp_path / "wrong.npz").write_bytes(data)
        code, text = check("--data", str(tmp_path / "wrong.npz"))
        assert code == 2 and "wrong.npz is damaged" in text, (place - start, bit)
    (tmp_path / "wrong.npz").write_bytes(b"PK")
    assert check("--data", str(tmp_path / "wrong.npz"))[0] == 2
    assert check("--data", str(tmp_path / "none.npz"))[0] == 2
    for text in ("0", "-1", "some"):
        with pytest.raises(SystemExit):
            check(f"--images={text}")

    # Draws the sample anew until the raised margin lies outside: only the evaluation of all images finds it.
    for row in range(12):
        f = Forger(run)
        f.set_margin(f.rows[row], 10 * f.rows[row]["margin"] + 1)
        drawn = checker.sample_indices(f.certificate["frozen_sha256"], f.certificate["data"]["sha256"], f.rows)
        if row not in drawn:
            break
    f.images["indices"] = np.array(drawn)
    f.images |= {name: everything[name][drawn] for name in ("pixels", "labels")}
    f.write()
    assert check()[0] == 0
    code, text = check("--data", whole)
    assert code == 1 and f"images[{row}]: margin" in text


def test_bounds_by_cholesky_are_neither_below_nor_far_above_the_norm():
    rng = np.random.default_rng(0)
    for shape in ((5, 5), (40, 9), (9, 40), (1, 1), (64, 64)):
        for scale in (1e-200, 1.0, 1e150):
            matrix = scale * rng.normal(size=shape)
            norm = np.linalg.norm(matrix, 2)
            assert checker.matrix_below(matrix, Fraction(norm * (1 + 1e-10)))
            assert not checker.matrix_below(matrix, Fraction(norm * (1 - 1e-12)))
    ones = np.ones((256, 256))
    assert not checker.matrix_below(ones, Fraction(256) * (1 - Fraction(1, 2**53)))
    assert checker.matrix_below(ones, Fraction(256 * (1 + 1e-9)))


def test_tables_of_the_circle_are_rounded_correctly():
    import mpmath

    with mpmath.workdps(40):
        for n in (1, 3, 7, 12):
            cosines, sines = checker.circle(n)
            assert cosines.tolist() == [float(mpmath.cospi(mpmath.mpf(a) / n)) for a in range(2 * n)]
            assert sines.tolist() == [float(mpmath.sinpi(mpmath.mpf(a) / n)) for a in range(2 * n)]


@pytest.mark.parametrize("num_terms", [1, 3, 4, 5, 6, 12])
def test_the_supremum_of_the_series_is_decided(num_terms):
    theta = np.linspace(0, 2.5, 20001)
    values = sum((1j * theta) ** j / math.factorial(j) for j in range(num_terms + 1))
    supremum = np.abs(values).max()
    assert checker.series_below(num_terms, Fraction(2.5), Fraction(supremum * (1 + 1e-9)))
    assert not checker.series_below(num_terms, Fraction(2.5), Fraction(supremum * (1 - 1e-7)))
    assert checker.series_below(num_terms, Fraction(0), Fraction(1))  # of zero: the identity
    assert not checker.series_below(num_terms, Fraction(0), Fraction(1 - 2**-53))


def checked(operator):
    """The checker's operator, with a claim a little above its norm."""
    fields = {f: getattr(operator, f) for f in ("kernel", "matrix", "padding") if hasattr(operator, f)}
    if "kernel" in fields:
        fields["in_shape"] = list(operator.in_shape)
        fields["strides"] = list(conv.stride_pair(operator.strides))
    found = checker.OPERATORS[type(operator).__name__](fields)
    found.claim = Fraction(operator.bound().claim)
    return found


def dense(ops):
    x = np.eye(math.prod(ops[0].in_shape)).reshape(-1, *ops[0].in_shape)
    for op in ops:
        x = op.apply(x)
    return x.reshape(len(x), -1).T


def chains():
    rng = np.random.default_rng(7)
    zero = [
        operators.Conv(draw(rng, 3, 3, 2, 3), (12, 5, 2)),
        operators.Conv(draw(rng, 2, 3, 3, 2), (12, 5, 3), (2, 1)),
    ]
    growing = [operators.Conv(draw(rng, 3, 3, 1, 2), (9, 4, 1)), operators.Conv(draw(rng, 1, 3, 2, 4), (9, 4, 2))]
    around = [
        operators.Conv(draw(rng, 3, 2, 2, 3), (6, 8, 2), 1, "CIRCULAR"),
        operators.Conv(draw(rng, 3, 3, 3, 2), (6, 8, 3), (3, 2), "CIRCULAR"),
    ]
    return {"zero": zero, "growing": growing, "around": around}


@pytest.mark.parametrize("name", ["zero", "growing", "around"])
def test_norms_of_chains_are_neither_below_nor_far_above(name):
    ops = [checked(op) for op in chains()[name]]
    chain, norm = checker.Chain(ops), np.linalg.norm(dense(ops), 2)
    above, below = Fraction(norm * (1 + 1e-6)), Fraction(norm * (1 - 1e-9))
    assert chain.dense_below(above) and not chain.dense_below(below)
    assert chain.banded_below(above) and not chain.banded_below(below)
    details = {"grid": [2, 4], "twist": [0, 0]}
    method = "Cholesky per frequency of a block circulant"
    if name == "around":
        assert chain.circular_below(method, details, above) and not chain.circular_below(method, details, below)
    else:
        with pytest.raises(checker.Unproved, match="circular"):
            chain.circular_below(method, details, above)
    x, y = (np.random.default_rng(8).normal(size=(1, *shape)) for shape in (ops[0].in_shape, ops[0].out_shape))
    assert np.sum(ops[0].apply(x) * y) == pytest.approx(np.sum(x * ops[0].back(y)))
