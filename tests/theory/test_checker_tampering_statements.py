"""False statements beside the radii: rows stated twice, names of radii, margins, rivals, methods, LipLT's constants."""

import json
import math
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from checker_helpers import Forger, honest_runs, mlp_network, write_run

from lipjax import checker, operators
from lipjax.certify.radius import radius_key
from lipjax.network import make_network


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return honest_runs(tmp_path_factory)


def curvature_stated_twice(f):
    """A false row, hidden behind a true one of the same pair."""
    rows = f.certificate["head"]["curvatures"]
    rows.insert(0, [*rows[0][:2], 0.0])
    f.write()


def other_rivals_without_margins(f):
    for row in f.rows:
        row["rival"] = next(i for i in range(4) if i not in (row["prediction"], row["rival"]))
        row["margin"] = None
    f.write()


def no_margins(f):
    for row in f.rows:
        row["margin"] = None
    f.write()


def other_rivals(f):
    for row in f.rows:
        row["rival"] = next(i for i in range(4) if i not in (row["prediction"], row["rival"]))
        row["margin"] = -1e9
    f.write()


def large_margins(f):
    for row in f.rows:
        row["margin"] += 1e-9
    f.write()


def orthogonal_by_construction(f):
    f.layer("dense")["method"] = "exact: orthogonal by construction"
    f.write()


def zero_matrix(f):
    f.layer("dense")["method"] = "zero"
    f.write()


def only_block_tap(f):
    f.layer("conv")["method"] = "Cholesky of the Gram matrix of the only block tap"
    f.write()


def method_of_an_activation(f):
    f.layer("act0")["method"] = "exact: slopes between 0 and 0.5"
    f.write()


def method_of_a_chain(f):
    f.certificate["liplt"]["chains"][0]["method"] = "exact: orthogonal by construction"
    f.write()


def method_inside(f):
    f.layer("vectors")["details"]["parts"][0]["method"] = "exact: orthogonal by construction"
    f.write()


def method_of_a_series(f):
    f.layer("exponential")["details"]["skew_norm_method"] = "sqrt(kh kw) times a guess"
    f.write()


def total_of_zero(f):
    f.certificate["liplt"]["total"] = 0.0
    f.write()


def lower_layer_constant(f):
    f.certificate["liplt"]["layers"][2]["bound"] *= 1 - 1e-9
    f.write()


def lower_layer_product(f):
    f.certificate["liplt"]["layers"][1]["product"] *= 1 - 1e-9
    f.write()


def layer_left_out(f):
    f.certificate["liplt"]["layers"].pop()
    f.write()


def slightly_further_rival(f):
    """Beyond rounding errors, but by less than 1e-9."""
    row = f.rows[0]
    p, first = row["prediction"], row["rival"]
    del f.rows[1:]
    f.images = {name: np.ascontiguousarray(array[:1]) for name, array in f.images.items()}
    f.certificate["data"]["num_images"] = f.certificate["sample"]["num_images"] = 1
    f.certificate["sample"]["is_split"] = False
    f.write()
    assert checker.check(f.directory)[0] == 0
    other = next(i for i in range(4) if i not in (p, first))
    low = checker_margin(f, 0, other)
    f.constants[p][other] = low / row["radius"] / (1 + 5e-10)
    f.set_margin(row, low * (1 - 1e-12), other)
    f.write()


def checker_margin(f, index, rival):
    files = checker.read_files(f.directory, None, None, checker.Budget())
    _, network = checker.build_network(files.layout, files.arrays)
    x = f.images["pixels"][[index]] / np.float64(255)
    for op in network.ops:
        x = op.apply(x)
    logits, _ = network.head.evaluate(x)
    return float(logits[0, f.rows[index]["prediction"]] - logits[0, rival])


CASES = {
    curvature_stated_twice: ("mlp_network", "is stated twice"),
    other_rivals_without_margins: ("mlp_network", "without a margin"),
    no_margins: ("mlp_network", "without a margin"),
    other_rivals: ("mlp_network", "limits the radius"),
    large_margins: ("mlp_network", "can be proved"),
    orthogonal_by_construction: ("sorted_network", "layers, dense (Dense): the method 'exact: orthogonal"),
    zero_matrix: ("sorted_network", "layers, dense (Dense): the method is that of a zero operator"),
    only_block_tap: ("sorted_network", "layers, conv (Conv): the method"),
    slightly_further_rival: ("sorted_network", "limits the radius"),
    method_of_an_activation: ("elementwise_network", "layers, act0 (ReLU): the method"),
    method_of_a_chain: ("elementwise_network", "liplt: chain from"),
    total_of_zero: ("elementwise_network", "liplt: expected chains and layers"),
    lower_layer_constant: ("elementwise_network", "liplt: layers, act2: bound"),
    lower_layer_product: ("elementwise_network", "liplt: layers, act1: product"),
    layer_left_out: ("elementwise_network", "liplt: layers are not those of"),
    method_inside: ("residual_network", "operator 0 (Dense): the method"),
    method_of_a_series: ("many_operators", "layers, exponential (ConvExponential): the method"),
}


@pytest.mark.parametrize(("forge", "name", "place"), [pytest.param(f, *row, id=f.__name__) for f, row in CASES.items()])
def test_false_statements_are_caught_at_their_place(runs, tmp_path, forge, name, place):
    directory = tmp_path / "run"
    shutil.copytree(runs(name), directory)
    forge(Forger(directory))
    code, lines = checker.check(directory)
    assert code == 1 and any(place in line for line in lines), lines


def test_rivals_of_an_mlp_head_that_are_as_near_may_be_stated(tmp_path):
    """Two classes with the same rows: either limits the radius."""
    network = mlp_network()
    head = network.head
    w2, b2 = head.w2.at[3].set(head.w2[2]), head.b2.at[3].set(head.b2[2])
    write_run(
        tmp_path,
        make_network(
            [("flat", network.ops[0]), ("dense", network.ops[1])], operators.MLPHead(head.w1, head.b1, w2, b2), 0.3, 0.5
        ),
    )
    assert checker.check(tmp_path)[0] == 0
    f = Forger(tmp_path)
    pairs = [row for row in f.rows if row["rival"] in (2, 3) and row["prediction"] < 2]
    for row in pairs:
        row["rival"] = 5 - row["rival"]
    f.write()
    assert pairs and checker.check(tmp_path)[0] == 0


def test_a_margin_of_one_class_says_nothing(tmp_path):
    shape = (1, 2, 1)
    write_run(
        tmp_path, make_network([("f", operators.Flatten(shape))], operators.LinearHead(jnp.eye(1, 2), jnp.ones(1)))
    )
    code, lines = checker.check(tmp_path)
    assert code == 0, lines
    f = Forger(tmp_path)
    assert all(row["margin"] is None for row in f.rows)
    f.rows[0]["margin"] = 1e9
    f.write()
    code, lines = checker.check(tmp_path)
    assert code == 1 and any("images[0]: margin" in line and "one class" in line for line in lines), lines


def test_a_tensor_named_twice_is_refused(runs, tmp_path):
    """Other readers might take the other one."""
    directory = tmp_path / "run"
    shutil.copytree(runs("sorted_network"), directory)
    path = directory / "frozen" / "network.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    entry = json.dumps({"head/bias": header["head/bias"]})[1:-1]
    text = json.dumps(header)[:-1] + f", {entry}}}"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + size :])
    code, lines = checker.check(directory)
    assert code == 2 and "network.safetensors is damaged (a key is there twice)" in lines[0], lines


def report_of(f, radii, certified):
    f.report |= {"radii": radii, "certified_accuracy": certified}
    f.write(report=False)
    return checker.check(f.directory)


def test_names_of_radii_do_not_round_up(runs, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(runs("sorted_network"), directory)
    f = Forger(directory)
    right = [row for row in f.rows if row["label"] == row["prediction"]]
    radius = sorted(row["radius"] for row in right)[-1]
    key = next(f"{radius:.{digits}g}" for digits in range(1, 7) if float(f"{radius:.{digits}g}") > radius)
    # All that is certified is said of a radius above it, to which its name was rounded.
    stated = math.nextafter(radius, 0)
    code, lines = report_of(f, [stated], {key: 1 / len(f.rows)})
    assert code == 1 and any("report.json, certified_accuracy" in line for line in lines), lines
    code, lines = report_of(f, [stated], {radius_key(stated): 1 / len(f.rows)})
    assert code == 0, lines
    # What earlier versions wrote is refused with what to do.
    fraction = sum(row["radius"] > 72 / 255 for row in right) / len(f.rows)
    code, lines = report_of(f, [72 / 255], {"0.282353": fraction})
    assert code == 1 and any("earlier versions rounded" in line and "'0.282352'" in line for line in lines), lines
    assert report_of(f, [72 / 255], {"0.282352": fraction})[0] == 0
    for radii in ([0.25, 0.25], [0.25, 0.2500001], [-1.0], [0]):
        code, lines = report_of(f, radii, {checker.shown(float(r)): 1.0 for r in radii})
        assert code == 1 and any("report.json, radii" in line for line in lines), lines


def test_printed_numbers_round_to_the_safe_side(runs):
    import decimal

    rng = np.random.default_rng(0)
    for value in [*rng.uniform(size=300), *10.0 ** rng.uniform(-300, 300, 300), 0.24999965, 5e-324, 0.0]:
        value = float(value)
        low, high = float(checker.shown(value)), float(checker.shown(value, decimal.ROUND_CEILING))
        assert low <= value <= high and high <= low * (1 + 1.1e-5) + 1e-300
        assert value == 0 or checker.shown(value) == radius_key(value)
    code, lines = checker.check(runs("sorted_network"))
    rows = json.loads((runs("sorted_network") / "certificate.json").read_text())["images"]
    largest = max(row["radius"] for row in rows if row["label"] == row["prediction"])
    (line,) = [line for line in lines if "largest certified radius" in line]
    assert code == 0 and float(line.split("largest certified radius ")[1].split(";")[0]) <= largest
