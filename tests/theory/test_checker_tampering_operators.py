"""Tamperings of what a certificate states of operators, heads and LipLT, and where they are."""

import math

import numpy as np
import pytest
from checker_helpers import assert_caught, honest_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return honest_runs(tmp_path_factory)


def not_skew(f):
    kernel = f.arrays["ops/exponential/kernel"]
    kernel[0, 0, 0, 1] = np.nextafter(kernel[0, 0, 0, 1], 1)
    f.write()


def lower_skew_norm(f):
    f.layer("exponential")["details"]["skew_norm"] *= 0.5
    f.write()


def skew_norm_beyond_floats(f):
    f.layer("exponential")["details"]["skew_norm"] = 1e308
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


def other_margin(f):
    f.op("around_it")["pads"] = [[1, 0], [1, 1]]
    f.write()


def negative_margin(f):
    f.op("margin")["crops"] = [[2, -1], [1, 1]]
    f.write()


def no_pixel_left(f):
    f.op("margin")["crops"] = [[4, 0], [1, 1]]
    f.write()


def huge_margin(f):
    f.op("around_it")["pads"] = [[2**23, 2**23], [2**23, 2**23]]
    f.write()


def flat_margin(f):
    f.op("around_it")["pads"] = [1, 1]
    f.write()


def lower_bound_of_crop(f):
    f.layer("margin")["bound"] = 1 - 2.0**-53
    f.write()


def other_method_of_crop(f):
    f.layer("margin")["method"] = "exact: zeros appended"
    f.write()


MANY = {
    not_skew: "network.json, exponential (ConvExponential): the kernel is not skew",
    lower_skew_norm: "layers, exponential (ConvExponential): |J|",
    skew_norm_beyond_floats: "layers, exponential (ConvExponential): skew_norm 1e+308",
    lower_gain: "layers, exponential (ConvExponential): the bound",
    more_terms: "exponential",
    long_direction: "network.json, fold (Householder): direction of lengths",
    side_of_sector: "network.json, sectors (Householder2): directions with a negative",
    lower_bound_of_blocks: "layers, circular (CircularConv): the bound",
    larger_block: "layers, circular (CircularConv): the bound",
    lower_bound_of_small_map: "layers, small (Conv): the bound",
    twist_around: "layers, around (Conv): grid",
    other_margin: "certificate.json, images[",
    negative_margin: "network.json, margin (Crop): margins",
    no_pixel_left: "network.json, margin (Crop): crops",
    huge_margin: "network.json, around_it (ZeroPad): ",
    flat_margin: "network.json, around_it (ZeroPad): margins",
    lower_bound_of_crop: "layers, margin (Crop): the bound",
    other_method_of_crop: "layers, margin (Crop): the method",
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


def other_number_moved(f):
    f.op("shift")["channels"] = 2
    f.write()


def shift_of_no_channels(f):
    f.op("shift")["channels"] = 0
    f.write()


def other_regions(f):
    f.op("pool")["regions"] = [2, 2]
    f.write()


def regions_that_overlap(f):
    f.op("pool")["regions"] = [1.5, 2]
    f.write()


def as_many_regions_in_other_places(f):
    f.op("pool")["regions"] = [1, 2]
    f.op("flat")["in_shape"] = [1, 2, 6]
    f.arrays["head/matrix"] = f.arrays["head/matrix"][:, :12]
    f.write()


def no_delta(f):
    f.op("pool")["delta"] = 0
    f.write()


def other_delta(f):
    f.op("pool")["delta"] = 1e-6
    f.write()


def bias_for_each_channel(f):
    f.arrays["ops/position/bias"] = np.zeros(6)
    f.write()


def bias_that_copies(f):
    f.arrays["ops/position/bias"] = np.zeros((2, 3, 4, 1))
    f.write()


def longer_matrix(f):
    f.arrays["ops/second/kernel"] *= 1 + 1e-6
    f.write()


def bound_of_a_pool_below_1(f):
    f.layer("pool")["bound"] = math.nextafter(1, 0)
    f.write()


TOKENS = {
    other_number_moved: "network.json, shift (Shift): four times 2 of 6 channels",
    shift_of_no_channels: "network.json, shift (Shift): four times 0 of 6",
    other_regions: "network.json, pool (L2Pool): [2, 2] regions of a map of (3, 4)",
    regions_that_overlap: "network.json, pool (L2Pool): regions [1.5, 2]",
    as_many_regions_in_other_places: "certificate.json, ",
    no_delta: "network.json, pool (L2Pool): delta 0",
    other_delta: "certificate.json, images",
    bias_for_each_channel: "network.json, position (PositionalBias): a bias of shape (6,)",
    bias_that_copies: "network.json, position (PositionalBias): a bias of shape (2, 3, 4, 1)",
    longer_matrix: "layers, second (Conv): the bound",
    bound_of_a_pool_below_1: "layers, pool (L2Pool): the bound",
}


TAMPERINGS = [
    pytest.param(name, forge, place, id=forge.__name__)
    for name, table in (
        ("many_operators", MANY),
        ("mlp_network", MLP),
        ("elementwise_network", ELEMENTWISE),
        ("token_network", TOKENS),
    )
    for forge, place in table.items()
]


@pytest.mark.parametrize(("name", "forge", "place"), TAMPERINGS)
def test_tamperings_are_caught_at_their_place(runs, tmp_path, name, forge, place):
    assert_caught(runs(name), tmp_path / "run", forge, place)
