"""Networks of SDP-based Lipschitz layers and of convex potential layers."""

import dataclasses

import numpy as np
from flax.core import FrozenDict

from lipjax.interop.entries import Entry, conv_kernel, dense_matrix, known_options, plain, vector
from lipjax.models import PotentialNet


def sll(state_dict: dict, options: dict) -> tuple[PotentialNet, list[Entry]]:
    """LipschitzNetwork of araujoalexandre/Lipschitz-SLL-Networks, whose q of convolutions has no effect."""
    sizes = {"n_conv": 20, "n_dense": 7, "w": 45, "conv_inner_dim": 5, "dense_inner_dim": 2048, "n_classes": 10}
    given = known_options("sll", options, {**sizes, "dataset": "cifar10"})
    side = 64 if given["dataset"] == "tiny-imagenet" else 32
    width, convs, grid = given["w"], given["n_conv"], side // 4
    model = PotentialNet(
        (side, side, 3),
        given["n_classes"],
        layer="sll",
        width=width,
        conv_depth=convs,
        conv_hidden=given["conv_inner_dim"],
        dense_depth=given["n_dense"],
        dense_hidden=given["dense_inner_dim"],
    )
    entries: list[Entry] = []
    for i in range(1, convs + 1):
        there, here = f"model.{i}", f"conv_{i:02d}"
        entries += [
            conv_kernel(f"{there}.kernel", here, "kernel"),
            vector(f"{there}.bias", state_dict.get(f"{there}.bias", ()), here, "bias"),
        ]
        # All weights are the same, whatever q is: it multiplies and divides along one axis.
        entries.append(dataclasses.replace(plain(f"{there}.q", here, "theta"), transform=np.zeros_like))
    # The padding of channels, the convolutions, the pooling and the flattening come before.
    for i in range(1, given["n_dense"] + 1):
        there, here = f"model.{convs + 2 + i}", f"dense_{i:02d}"
        entries.append(dense_matrix(f"{there}.weight", (width, grid, grid), here, "matrix"))
        entries += [
            vector(f"{there}.bias", state_dict.get(f"{there}.bias", ()), here, "bias"),
            plain(f"{there}.q", here, "theta"),
        ]
    last = f"model.{convs + 3 + given['n_dense']}"
    entries.append(dense_matrix(f"{last}.weight", (width, grid, grid), "head", "matrix"))
    return model, [*entries, plain(f"{last}.bias", "head", "bias")]


def cpl(state_dict: dict, options: dict) -> tuple[PotentialNet, list[Entry]]:
    """ConvexPotentialLayerNetwork of MILES-PSL/Convex-Potential-Layer."""
    del state_dict
    sizes = {"depth": 8, "depth_linear": 3, "num_channels": 16, "conv_size": 2, "n_features": 100, "num_classes": 10}
    given = known_options("cpl", options, {**sizes, "use_lln": True})
    if not given["use_lln"]:
        raise ValueError("use_lln: expected True; the first features as logits have no parameters to take over.")
    width, grid = given["num_channels"], 8
    model = PotentialNet(
        (32, 32, 3),
        given["num_classes"],
        layer="cpl",
        layer_options=FrozenDict({"epsilon": 1e-4}),
        width=width,
        conv_depth=given["depth"],
        conv_hidden=given["conv_size"],
        dense_depth=given["depth_linear"],
        dense_hidden=given["n_features"],
    )
    entries: list[Entry] = []
    for i in range(given["depth"]):
        there, here = f"stable_block.{i}", f"conv_{i + 1:02d}"
        entries += [conv_kernel(f"{there}.kernel", here, "kernel"), plain(f"{there}.bias", here, "bias")]
    for i in range(1, given["depth_linear"] + 1):
        there, here = f"layers_linear.{i}", f"dense_{i:02d}"
        entries.append(dense_matrix(f"{there}.weights", (width, grid, grid), here, "matrix"))
        entries.append(plain(f"{there}.bias", here, "bias"))
    entries.append(dense_matrix("last_last.weight", (width, grid, grid), "head", "matrix"))
    return model, [*entries, plain("last_last.bias", "head", "bias")]
