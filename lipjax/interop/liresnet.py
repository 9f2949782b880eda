"""LiResNets."""

import dataclasses

import numpy as np

from lipjax.interop.entries import Entry, choose, conv_kernel, dense_matrix, known_options, patch_kernel, plain
from lipjax.models import LiResNet
from lipjax.nn import COLLECTION


def liresnet(state_dict: dict, options: dict) -> tuple[LiResNet, list[Entry]]:
    """GloroNet of hukkai/liresnet, of which the blocks and the dense layers are stacked arrays."""
    del state_dict
    sizes = {"depth": 12, "width": 128, "input_size": 32, "num_classes": 10, "out_dim": 2048, "mlp_depth": 8}
    given = known_options("liresnet", options, {**sizes, "use_lln": True, "num_lc_iter": 10, "act_name": "MinMax"})
    choose(given, "act_name", {"MinMax": "maxmin"})
    wrong = [name for name in sizes if type(given[name]) is not int or given[name] < 1]
    if wrong:
        raise ValueError(f"Expected positive integers for {wrong}, got {[given[name] for name in wrong]}.")
    depth, width, side, features = given["depth"], given["width"], given["input_size"], given["out_dim"]
    patch = round((width / 3) ** 0.5)
    stems = {32: (5, 2, 2), 64: (5, 2, 2), 224: (patch, patch, 0)}
    if side not in stems:
        raise ValueError(f"input_size: expected one of {sorted(stems)}, got {side}.")
    kernel, strides, padding = stems[side]
    model = LiResNet(
        (side, side, 3),
        given["num_classes"],
        0.5,
        depth=depth,
        width=width,
        stem_kernel=kernel,
        stem_strides=strides,
        stem_padding=padding,
        neck_features=features,
        head_normalize=bool(given["use_lln"]),
        neck="cholesky",
        dense_depth=given["mlp_depth"],
        centering=True,
        small_init=True,
    )
    grid = ((side + 2 * padding - kernel) // strides + 1) // 4
    if features > width * grid**2:
        # The original orthogonalises rows even then; here columns are, which is another matrix.
        raise ValueError(f"out_dim: expected at most the {width * grid**2} features of the map, got {features}.")
    entries = [conv_kernel("stem.0.weight", "stem", "kernel"), plain("stem.0.bias", "stem", "bias")]
    for i in range(depth):
        block, part = f"block_{i + 1:02d}", (i, depth)
        kernel_entry = conv_kernel("conv.weights", block, "weight")
        gamma = Entry("conv.gamma", "params", (block, "gamma"), np.ravel, lambda s: (*s, 1, 1, 1))
        mean = dataclasses.replace(plain("conv.running_mean", block, "mean"), collection=COLLECTION)
        of_block = (kernel_entry, gamma, plain("conv.bias", block, "bias"), mean)
        entries += [dataclasses.replace(entry, part=part) for entry in of_block]
    entries += [
        Entry("neck.kernel", "params", ("neck_conv", "kernel"), patch_kernel, lambda s: (s[3], s[0] * s[1] * s[2])),
        dense_matrix("neck.weight", (width, grid, grid), "neck_dense", "matrix"),
        plain("neck.bias", "neck_dense", "bias"),
    ]
    if given["mlp_depth"]:
        gamma = Entry("linear.gamma", "params", ("dense", "gamma"), lambda a: a[..., 0], lambda s: (*s, 1))
        entries += [plain("linear.weights", "dense", "weight"), gamma, plain("linear.bias", "dense", "bias")]
    entries += [plain("head.weight", "head", "matrix"), plain("head.bias", "head", "bias")]
    return model, entries
