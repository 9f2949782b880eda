"""The network in which 1-Lipschitz layers were compared."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax.core import FrozenDict

from lipjax.interop.entries import Entry, choose, known_options
from lipjax.models import ComparedConvNet


def _dealt(channels: int) -> np.ndarray:
    """Our order of channels by the original's: those of even number, then those of odd, so that halves are pairs."""
    return np.concatenate([np.arange(0, channels, 2), np.arange(1, channels, 2)])


def _vector(name: str, order, *path: str) -> Entry:
    """A number for each channel, in our order."""
    return Entry(name, "params", path, lambda a: a.reshape(-1)[order], lambda s: s)


def _kernel(name: str, rows, columns, *path: str) -> Entry:
    """A convolution kernel, OIHW there, with outputs and inputs in our order."""
    every = slice(None)

    def transform(array):
        ordered = array[every if rows is None else rows][:, every if columns is None else columns]
        return np.transpose(ordered, (2, 3, 1, 0))

    return Entry(name, "params", path, transform, lambda s: (s[3], s[2], s[0], s[1]))


def _aol(prefix: str, name: str, order) -> list[Entry]:
    weight = f"{prefix}.parametrizations.weight.original"
    return [_kernel(weight, order, order, name, "kernel"), _vector(f"{prefix}.bias", order, name, "bias")]


def _potential(prefix: str, name: str, order, weights: str) -> list[Entry]:
    """A residual layer: its inputs are in our order, and what is inside is in the original's."""
    found = [_kernel(f"{prefix}.{weights}", None, order, name, "kernel")]
    return [*found, _vector(f"{prefix}.bias", slice(None), name, "bias")]


def _sll(prefix: str, name: str, order) -> list[Entry]:
    theta = Entry(f"{prefix}.q", "params", (name, "theta"), lambda a: np.log(np.abs(a) + 1e-6), lambda s: s)
    return [*_potential(prefix, name, order, "kernel"), theta]


def _cpl(prefix: str, name: str, order) -> list[Entry]:
    return _potential(prefix, name, order, "kernel")


# The original's class of a convolution: our name, its fields, and the entries of one of them.
_CONVS: dict[str, tuple[str, dict[str, Any], Callable[[str, str, Any], list[Entry]]]] = {
    "AOLConv2d": ("aol", {"padding": "CIRCULAR"}, _aol),
    "CPLConv2d": ("cpl", {"epsilon": 1e-6}, _cpl),
    "SLLConv2d": ("sll", {"epsilon": 1e-6}, _sll),
}


def compared(state_dict: dict, options: dict) -> tuple[ComparedConvNet, list[Entry]]:
    """SimplifiedConvNet of berndprach/1LipschitzLayersCompared."""
    del state_dict
    sizes = {"base_width": 16, "nrof_blocks": 5, "nrof_layers_per_block": 5, "kernel_size": 3, "nrof_classes": 10}
    given = known_options("compared", options, {"get_conv": "AOLConv2d", "get_activation": "MaxMin", **sizes})
    activation = choose(given, "get_activation", {"MaxMin": "maxmin"})
    layer, fields, entries_of = _CONVS[choose(given, "get_conv", {name: name for name in _CONVS})]
    width, blocks, depth = (given[name] for name in ("base_width", "nrof_blocks", "nrof_layers_per_block"))
    model = ComparedConvNet(
        (2**blocks, 2**blocks, 3),
        given["nrof_classes"],
        layer=layer,
        layer_options=FrozenDict(fields),
        width=width,
        num_blocks=blocks,
        block_depth=depth,
        kernel_size=given["kernel_size"],
        activation=activation,
    )
    entries = entries_of("FirstConv", "first", _dealt(width))
    for block in range(1, blocks + 1):
        order = _dealt(width * 2 ** (block - 1))
        for i in range(depth):
            # Of every layer two modules there: itself and its activation.
            entries += entries_of(f"Block{block}.{2 * i}", f"block{block}_conv{i}", order)
    entries += entries_of("ClassificationHead.0", "last", np.arange(width * 2**blocks))
    return model, entries
