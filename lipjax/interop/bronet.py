"""BRONets."""

import dataclasses

import numpy as np

from lipjax.interop.entries import Entry, choose, conv_kernel, known_options, plain
from lipjax.models import BRONet
from lipjax.nn import COLLECTION


def bronet(state_dict: dict, options: dict) -> tuple[BRONet, list[Entry]]:
    """BRONet of ntuaislab/BRONet, of which the blocks and the dense layers are stacked arrays."""
    del state_dict
    sizes = {"depth": 12, "width": 256, "input_size": 32, "num_classes": 10, "dense_width": 2048, "linear_num": 8}
    kinds = {"backbone_type": "bro", "neck_conv_type": "cholesky", "neck_linear_type": None, "dense_type": "bro"}
    ranks = {"backbone_weight_rank_ratio": 0.25, "dense_weight_rank_ratio": 0.5}
    rest = {"depth_1": None, "depth_2": None, "neck_conv_patch_size": 4, "use_lln": True, "num_lc_iter": 10}
    given = known_options("bronet", options, {**sizes, **kinds, **ranks, **rest, "act_name": "MinMax"})
    choose(given, "act_name", {"MinMax": "maxmin"})
    version = choose(given, "backbone_type", {"bro": "1", "brov2": "2", "hybridbrov2": "hybrid 2"})
    dense = choose(given, "dense_type", {"bro": "bro", "cholesky": "cholesky"})
    if given["neck_linear_type"] not in (None, dense):
        raise ValueError(f"neck_linear_type: expected dense_type's {dense!r}, got {given['neck_linear_type']!r}.")
    depth, first = given["depth"], 0
    if version.startswith("hybrid"):
        first = depth // 2 if given["depth_1"] is None else given["depth_1"]
        depth -= first
    side, width, patch = given["input_size"], given["width"], given["neck_conv_patch_size"]
    stems = {32: (5, 2, 2), 64: (5, 2, 2), 224: (14, 14, 0)}
    if side not in stems:
        raise ValueError(f"input_size: expected one of {sorted(stems)}, got {side}.")
    kernel, strides, padding = stems[side]
    neck = choose(given, "neck_conv_type", {"bro": "bro", "cholesky": "cholesky", "l2": "norm"})
    model = BRONet(
        (side, side, 3),
        given["num_classes"],
        0.5,
        depth=depth,
        width=width,
        rank=given["backbone_weight_rank_ratio"],
        residual_depth=first,
        crop=version == "1",
        stem_kernel=kernel,
        stem_strides=strides,
        stem_padding=padding,
        neck=neck,
        neck_patch=patch,
        neck_features=given["dense_width"],
        dense=dense,
        dense_depth=given["linear_num"],
        dense_rank=given["dense_weight_rank_ratio"],
        head_normalize=bool(given["use_lln"]),
    )
    entries = [conv_kernel("stem.0.weight", "stem", "kernel"), plain("stem.0.bias", "stem", "bias")]
    entries += _stack("conv_1", "residual", first, turned=False)
    # Of a response's two conventions the first version has the one in which the taps are turned by 180 degrees.
    entries += _stack("conv", "block", depth, turned=version == "1")
    if neck == "cholesky":
        back = lambda s: (s[3], s[0] * s[1] * s[2])  # noqa: E731
        entries.append(Entry("neck.kernel", "params", ("neck_conv", "kernel"), _cholesky_patches(patch), back))
    elif neck == "bro":
        back = lambda s: (s[0] * s[1] * s[2], s[3])  # noqa: E731
        turn = lambda a: np.transpose(a.reshape(-1, patch, patch, a.shape[1]), (1, 2, 0, 3))  # noqa: E731
        entries.append(Entry("neck.kernel", "params", ("neck_conv", "kernel"), turn, back))
    entries += [plain("neck.weight", "neck_dense", "matrix"), plain("neck.bias", "neck_dense", "bias")]
    if given["linear_num"]:
        gamma = Entry("linear.gamma", "params", ("dense", "gamma"), lambda a: a[..., 0], lambda s: (*s, 1))
        entries += [plain("linear.weights", "dense", "weight"), gamma, plain("linear.bias", "dense", "bias")]
    return model, [*entries, plain("head.weight", "head", "matrix"), plain("head.bias", "head", "bias")]


def _cholesky_patches(patch: int):
    return lambda matrix: np.transpose(matrix.reshape(len(matrix), -1, patch, patch), (2, 3, 1, 0))


def _stack(there: str, here: str, depth: int, turned: bool) -> list[Entry]:
    """The arrays of all blocks of a stack, which are one array there."""
    entries: list[Entry] = []
    for i in range(depth):
        block, part = f"{here}_{i + 1:02d}", (i, depth)
        kernel = conv_kernel(f"{there}.weights", block, "weight")
        if turned:
            upright = kernel.transform
            kernel = dataclasses.replace(kernel, transform=lambda a, f=upright: np.flip(f(a), (0, 1)).copy())
        gamma = Entry(f"{there}.gamma", "params", (block, "gamma"), np.ravel, lambda s: (*s, 1, 1, 1))
        mean = dataclasses.replace(plain(f"{there}.running_mean", block, "mean"), collection=COLLECTION)
        of_block = (kernel, gamma, plain(f"{there}.bias", block, "bias"), mean)
        entries += [dataclasses.replace(entry, part=part) for entry in of_block]
    return entries
