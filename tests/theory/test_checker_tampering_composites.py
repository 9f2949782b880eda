"""Tamperings of what a certificate states of composites and of convolutions in groups, and where they are."""

import numpy as np
import pytest
from checker_helpers import assert_caught, honest_runs

from lipjax import checker


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return honest_runs(tmp_path_factory)


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


def other_method_of_the_way_back(f):
    f.layer("step")["details"]["parts"][3]["method"] = "exact: a reordering"
    f.write()


def other_method_of_the_activation_inside(f):
    f.layer("around")["details"]["parts"][2]["method"] = "exact: slopes between 0 and 1"
    f.write()


def details_of_the_way_forward(f):
    f.layer("circle")["details"]["parts"][0]["details"] = 3
    f.write()


POTENTIAL = {
    other_method_of_the_way_back: "layers, step (PotentialStep): operator 3 (ConvTranspose): the method",
    other_method_of_the_activation_inside: "layers, around (PotentialStep): operator 2 (LeakyReLU): the method",
    details_of_the_way_forward: "layers, circle (Sandwich): operator 0 (CircularConv): its details",
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


TAMPERINGS = [
    pytest.param(name, forge, place, id=forge.__name__)
    for name, table in (
        ("residual_network", RESIDUAL),
        ("potential_network", POTENTIAL),
        ("grouped_network", GROUPED),
    )
    for forge, place in table.items()
]


@pytest.mark.parametrize(("name", "forge", "place"), TAMPERINGS)
def test_tamperings_are_caught_at_their_place(runs, tmp_path, name, forge, place):
    assert_caught(runs(name), tmp_path / "run", forge, place)
