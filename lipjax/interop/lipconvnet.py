"""LipConvnets of the two papers on skew orthogonal convolutions."""

from collections.abc import Iterator

import numpy as np
from flax.core import FrozenDict

from lipjax.interop.entries import Entry, choose, conv_kernel, known_options, plain, vector
from lipjax.models import LipConvnet
from lipjax.nn import COLLECTION

_ACTIVATIONS = {"maxmin": "maxmin", "hh1": "householder", "hh2": "householder2"}
_POOLINGS = {"max": "max", "lip1": "projection"}


def _angles(state_dict: dict, prefix: str, activation: str, *path) -> Iterator[Entry]:
    names = {"householder": ["theta"], "projection": ["theta"], "householder2": ["theta0", "theta1", "theta2"]}
    for name in names.get(activation, []):
        yield vector(f"{prefix}.{name}", state_dict.get(f"{prefix}.{name}", ()), *path, name)


def soc(state_dict: dict, options: dict) -> tuple[LipConvnet, list[Entry]]:
    """LipConvNet of singlasahil14/SOC."""
    defaults = {"conv_name": "soc", "activation": "maxmin", "init_channels": 32, "block_size": 1, "num_classes": 10}
    given = known_options("soc", options, {**defaults, "input_side": 32, "lln": False})
    layer = choose(given, "conv_name", {"soc": "soc", "cayley": "cayley"})
    activation = choose(given, "activation", _ACTIVATIONS)
    side, per_block = given["input_side"], given["block_size"]
    model = LipConvnet(
        (side, side, 3),
        given["num_classes"],
        depth=5 * per_block,
        width=given["init_channels"],
        layer=layer,
        activation=activation,
        head="lln" if given["lln"] else "orthonormal",
    )
    entries = []
    for block in range(1, 6):
        for i in range(per_block):
            prefix, name = f"layer{block}.{i}", f"block{block}_conv{i}"
            entries += _soc_conv(state_dict, f"{prefix}.conv", name, layer, side // 2 ** (block - 1))
            entries += _angles(state_dict, f"{prefix}.activation", activation, name, "activation")
    if given["lln"]:
        entries += [plain("last_layer.weight", "head", "matrix"), plain("last_layer.bias", "head", "bias")]
    elif layer == "soc":
        entries += _soc_conv(state_dict, "last_layer", "head", layer, 1)
    else:
        entries += [plain(f"last_layer.{there}", "head", here) for there, here in _CAYLEY_DENSE]
    return model, entries


_CAYLEY_DENSE = (("weight", "matrix"), ("alpha", "alpha"), ("bias", "bias"))


def _soc_conv(state_dict: dict, prefix: str, name: str, layer: str, side: int) -> list[Entry]:
    bias = plain(f"{prefix}.bias", name, "bias")
    if layer == "cayley":
        # A kernel that exceeds its map was cropped by the padded transform of the original.
        return [
            conv_kernel(f"{prefix}.weight", name, "kernel", keep=side),
            plain(f"{prefix}.alpha", name, "alpha"),
            bias,
        ]
    correction = f"{prefix}.correction"
    if correction in state_dict:
        raw = np.shape(state_dict.get(f"{prefix}.random_conv_filter", ()))
        expected = 1.0 if raw[-1:] == (1,) else 0.7
        found = np.asarray(state_dict[correction]).reshape(-1)
        if found.shape != (1,) or abs(float(found[0]) - expected) > 1e-6:
            raise ValueError(f"{correction}: expected shape (1,) and the value {expected}, got {found}.")
    return [conv_kernel(f"{prefix}.random_conv_filter", name, "kernel"), bias, *_power_vectors(f"{prefix}.", name)]


def _power_vectors(prefix: str, name: str) -> Iterator[Entry]:
    """The vectors of the normalisation, OIHW there as the kernel is."""
    for which in ("u1", "v1", "u2", "v2", "u3", "v3", "u4", "v4"):
        path = (name, "kernel_vectors", which)
        back = lambda s: (s[3], s[2], s[0], s[1])  # noqa: E731
        yield Entry(f"{prefix}{which}", COLLECTION, path, lambda a: np.transpose(a, (2, 3, 1, 0)), back)


def improved(state_dict: dict, options: dict) -> tuple[LipConvnet, list[Entry]]:
    """LipConvNet of singlasahil14/improved_l2_robustness."""
    defaults = {"conv_name": "soc", "activation_name": "maxmin", "pooling_name": "max", "last_name": "crc_full"}
    sizes = {"init_channels": 32, "block_size": 1, "num_hidden": 4096, "num_classes": 10, "input_size": 32}
    given = known_options("improved_l2", options, {**defaults, **sizes})
    choose(given, "conv_name", {"soc": "soc"})
    activation = choose(given, "activation_name", _ACTIVATIONS)
    pooling = choose(given, "pooling_name", _POOLINGS)
    head = choose(given, "last_name", {"crc_full": "mlp", "lln": "lln"})
    side, per_block = given["input_size"], given["block_size"]
    mean, std = (
        tuple(np.asarray(state_dict.get(name, default), float).reshape(-1).tolist())
        for name, default in (("shift", (0.0,)), ("scale", (1.0,)))
    )
    model = LipConvnet(
        (side, side, 3),
        given["num_classes"],
        mean,
        std,
        depth=5 * per_block,
        width=given["init_channels"],
        variant="pooled",
        activation=activation,
        pooling=pooling,
        head=head,
        head_features=given["num_hidden"],
        layer_options=FrozenDict({"train_terms": 5, "eval_terms": 14, "scale": 1.0, "fast_gradient": True}),
    )
    entries = _improved_conv(state_dict, "init_layer", "stem", activation)
    for block in range(1, 6):
        for i in range(per_block):
            last = i == per_block - 1
            pooled = last and not (block == 5 and head == "mlp")
            entries += _improved_conv(
                state_dict, f"block{block}.{i}", f"block{block}_conv{i}", pooling if pooled else activation
            )
    if head == "mlp":
        for layer, weight, bias in (("linear1", "w1", "b1"), ("linear2", "w2", "b2")):
            entries += [plain(f"logits_layer.{layer}.weight", "head", weight)]
            entries += [plain(f"logits_layer.{layer}.bias", "head", bias)]
        same = ("logits_layer._u", COLLECTION, ("head", "vector"))
        entries.append(Entry(*same, lambda a: a, lambda shape: shape))
    else:
        entries += [plain("logits_layer.weight", "head", "matrix"), plain("logits_layer.bias", "head", "bias")]
    return model, entries


def _improved_conv(state_dict: dict, prefix: str, name: str, activation: str) -> list[Entry]:
    module = "pooling" if activation in ("max", "projection") else "activation"
    return [
        conv_kernel(f"{prefix}.ortho.weight", name, "kernel"),
        plain(f"{prefix}.ortho.bias", name, "bias"),
        *_power_vectors(f"{prefix}.ortho._", name),
        *_angles(state_dict, f"{prefix}.act", activation, name, module),
    ]
