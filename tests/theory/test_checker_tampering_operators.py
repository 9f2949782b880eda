"""Tamperings of what a certificate states of operators, heads, residual blocks and LipLT, and where they are."""

import shutil

import numpy as np
import pytest
from checker_helpers import Forger, honest_runs

from lipjax import checker


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


def lower_constant_of_a_step(f):
    f.layer("around")["bound"] *= 1 - 1e-7
    f.write()


def lower_norm_of_a_step(f):
    f.layer("around")["details"]["linear"]["bound"] *= 1 - 1e-6
    f.write()


def a_step_below_one(f):
    f.layer("step")["bound"] = 1 - 2.0**-40
    f.write()


def a_step_of_another_kind_of_proof(f):
    f.layer("around")["method"] = checker.AT_MOST_ONE
    f.write()


def larger_weights_of_a_step(f):
    f.arrays["ops/around/linear/kernel"] *= 1 + 1e-6
    f.write()


def other_bias_of_a_step(f):
    f.arrays["ops/step/bias"] += 0.5
    f.write()


def longer_bias_of_a_step(f):
    f.arrays["ops/step/bias"] = np.zeros(4)
    f.write()


def lower_norm_of_the_way_back(f):
    f.layer("sandwich")["details"]["parts"][3]["bound"] *= 1 - 1e-6
    f.write()


def way_back_left_out(f):
    f.layer("sandwich")["details"]["parts"].pop()
    f.write()


def modulus_in_a_step(f):
    f.op("around")["activation"]["negative_slope"] = -1.0
    f.write()


def pairs_in_a_step(f):
    f.op("around")["activation"] = {"type": "MaxMin", "in_shape": [4, 3, 2]}
    f.write()


def series_in_a_step(f):
    f.op("around")["linear"] = {"type": "Flatten", "in_shape": [4, 3, 3]}
    del f.arrays["ops/around/linear/kernel"]
    f.write()


def step_in_a_step(f):
    f.op("last")["activation"] = {"type": "PotentialStep"}
    f.write()


def other_split(f):
    f.op("circle")["outputs"] = 2
    f.write()


def no_split(f):
    f.op("sandwich")["outputs"] = True
    f.write()


def lower_constant_of_a_sandwich(f):
    f.layer("circle")["bound"] *= 1 - 1e-8
    f.write()


def larger_block_of_a_sandwich(f):
    f.arrays["ops/circle/linear/paired"][1] *= 3
    f.write()


def no_row_of_the_map(f):
    del f.layer("circle")["details"]["linear"]
    f.write()


POTENTIAL = {
    lower_constant_of_a_step: "layers, around (PotentialStep): the bound",
    lower_norm_of_a_step: "layers, around (PotentialStep): the linear map (Conv): the bound",
    a_step_below_one: "layers, step (PotentialStep): the bound",
    a_step_of_another_kind_of_proof: "layers, around (PotentialStep): the method is that of a constant of 1, but",
    larger_weights_of_a_step: "layers, around (PotentialStep): the linear map (Conv): the bound",
    other_bias_of_a_step: "certificate.json, images",
    longer_bias_of_a_step: "network.json, step (PotentialStep): a bias of shape (4,)",
    lower_norm_of_the_way_back: "layers, sandwich (Sandwich): operator 3 (Dense): the bound",
    way_back_left_out: "layers, sandwich (Sandwich): details state no bounds",
    modulus_in_a_step: "network.json, around (PotentialStep): a LeakyReLU of slopes between -1 and 1",
    pairs_in_a_step: "network.json, around (PotentialStep): a MaxMin does not act on every component",
    series_in_a_step: "network.json, around (PotentialStep): a Flatten is no map of two paths",
    step_in_a_step: "network.json, last (PotentialStep): an operator that cannot stand",
    other_split: "network.json, ",
    no_split: "network.json, sandwich (Sandwich): outputs True",
    lower_constant_of_a_sandwich: "layers, circle (Sandwich): the bound",
    larger_block_of_a_sandwich: "layers, circle (Sandwich): the linear map (CircularConv): the bound",
    no_row_of_the_map: "layers, circle (Sandwich): the linear map (CircularConv): its details are missing",
}


def lower_bound_of_groups(f):
    f.layer("groups")["bound"] *= 1 - 1e-7
    f.write()


def other_method_of_groups(f):
    f.layer("groups")["method"] = f.layer("groups")["details"]["groups"][0]["method"]
    f.write()


def group_left_out(f):
    f.layer("groups")["details"]["groups"].pop()
    f.write()


def larger_group(f):
    f.arrays["ops/groups/kernel"][..., 2:] *= 3
    f.write()


def fewer_groups(f):
    f.op("groups")["groups"] = 1
    f.write()


def groups_that_divide_nothing(f):
    f.op("groups")["groups"] = 3
    f.write()


def groups_left_out(f):
    del f.op("groups")["groups"]
    f.write()


def groups_that_are_true(f):
    f.op("groups")["groups"] = True
    f.write()


def other_dilation(f):
    f.op("around")["dilation"] = 1
    f.write()


def huge_dilation(f):
    f.op("around")["dilation"] = [2**20, 2**20]
    f.write()


def twist_of_a_group(f):
    f.layer("around")["details"]["groups"][1]["details"]["twist"] = [1, 0]
    f.write()


def grid_of_a_group(f):
    f.layer("around")["details"]["groups"][0]["details"]["grid"] = [5, 6]
    f.write()


def lower_bound_of_transposed(f):
    f.layer("up")["bound"] *= 1 - 1e-7
    f.write()


def transposed_of_something_else(f):
    f.op("up")["conv"] = {"type": "Flatten", "in_shape": [6, 6, 4]}
    f.write()


def transposed_of_itself(f):
    f.op("up")["conv"] = {"type": "ConvTranspose", "conv": f.op("up")["conv"]}
    f.write()


def transposed_without_its_kernel(f):
    del f.arrays["ops/up/conv/kernel"]
    f.write()


def transposed_zero(f):
    f.layer("up").update(method="zero", bound=0.0)
    f.write()


def transposed_of_a_larger_map(f):
    f.op("up")["conv"]["in_shape"] = [7, 6, 4]
    f.write()


def other_order_of_channels(f):
    f.op("deal")["groups"] = 4
    f.op("pairs")["groups"] = 2
    f.write()


def groups_of_a_shuffle_that_divide_nothing(f):
    f.op("deal")["groups"] = 3
    f.write()


def pairs_that_are_a_number(f):
    f.op("pairs")["paired"] = 1
    f.write()


def lower_bound_of_a_shuffle(f):
    f.layer("deal")["bound"] = 1 - 1e-12
    f.write()


def group_that_is_not_skew(f):
    kernel = f.arrays["ops/exponential/kernel"]
    kernel[0, 0, 1, 3] = np.nextafter(kernel[0, 0, 1, 3], 1)
    f.write()


def lower_norm_of_groups(f):
    f.layer("exponential")["details"]["skew_norm"] *= 0.5
    f.write()


def larger_second_group(f):
    f.arrays["ops/exponential/kernel"][..., 2:] *= 3
    f.write()


GROUPED = {
    lower_bound_of_groups: "layers, groups (Conv): the bound",
    other_method_of_groups: "layers, groups (Conv): the method",
    group_left_out: "layers, groups (Conv): details state no proof of every group",
    larger_group: "layers, groups (Conv): the bound",
    fewer_groups: "network.json, groups (Conv): a kernel (3, 3, 2, 4) for images (6, 6, 4)",
    groups_that_divide_nothing: "network.json, groups (Conv): a kernel (3, 3, 2, 4) in 3 groups",
    groups_left_out: "network.json, groups (Conv): a kernel (3, 3, 2, 4) for images (6, 6, 4)",
    groups_that_are_true: "network.json, groups (Conv): ",
    other_dilation: "around",
    huge_dilation: "network.json, around (Conv): a dilated kernel of",
    twist_of_a_group: "layers, around (Conv): grid [6, 6] with twist [1, 0]",
    grid_of_a_group: "layers, around (Conv): grid [5, 6]",
    lower_bound_of_transposed: "layers, up (ConvTranspose): the bound",
    transposed_of_something_else: "network.json, up (ConvTranspose): an operator that cannot stand",
    transposed_of_itself: "network.json, up (ConvTranspose): an operator that cannot stand",
    transposed_without_its_kernel: "network.json, up (ConvTranspose): the array ops/up/conv/kernel is missing",
    transposed_zero: "layers, up (ConvTranspose): the method is that of a zero operator",
    transposed_of_a_larger_map: "network.json, bias: takes (6, 6, 4), but up gives (7, 6, 4)",
    other_order_of_channels: "certificate.json, liplt: chain from input to act2",
    groups_of_a_shuffle_that_divide_nothing: "network.json, deal (ChannelShuffle): 4 channels",
    pairs_that_are_a_number: "network.json, pairs (ChannelShuffle): groups 1",
    lower_bound_of_a_shuffle: "layers, deal (ChannelShuffle): the bound",
    group_that_is_not_skew: "network.json, exponential (ConvExponential): the kernel is not skew",
    lower_norm_of_groups: "layers, exponential (ConvExponential): |J|",
    larger_second_group: "layers, exponential (ConvExponential): |J|",
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
        ("many_operators", MANY),
        ("mlp_network", MLP),
        ("elementwise_network", ELEMENTWISE),
        ("residual_network", RESIDUAL),
        ("potential_network", POTENTIAL),
        ("grouped_network", GROUPED),
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
