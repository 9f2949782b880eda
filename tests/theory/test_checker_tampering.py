"""Tamperings of a certificate, its network, its images and its report, and where the checker finds them."""

import math
import shutil

import numpy as np
import pytest
from checker_helpers import COUNT, Forger, honest_runs

from lipjax import checker
from lipjax.certify import FrozenNetwork


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return honest_runs(tmp_path_factory)


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


def half_precision(f):
    f.arrays["head/bias"] = f.arrays["head/bias"].astype(np.float16)
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
    half_precision: "network.safetensors, head/bias: expected finite float64",
    short_bias: "network.json, bias (Bias)",
    missing_array: "network.json, bias (Bias): the array ops/bias/bias is missing",
    array_that_nobody_reads: "ops/conv/other: an array that no operator has",
    shadowed_array: "network.json, bias (Bias): expected the fields",
    other_stride: "network.json, bias: takes",
    other_padding: "layers, wide (Conv)",
    unknown_operator: "operators of type 'BatchNorm' cannot be checked",
    unknown_method: "layers, conv (Conv): the method 'power iteration' is none for it",
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


@pytest.mark.parametrize(("forge", "place"), [pytest.param(*row, id=row[0].__name__) for row in SORTED.items()])
def test_tamperings_are_caught_at_their_place(runs, tmp_path, forge, place):
    directory = tmp_path / "run"
    shutil.copytree(runs("sorted_network"), directory)
    forge(Forger(directory))
    code, lines = checker.check(directory)
    assert code == 1 and any(place in line for line in lines), lines
