"""Staged networks of adaptive orthogonal convolutions."""

import numpy as np
from flax.core import FrozenDict

from lipjax.interop.entries import Entry, choose, conv_kernel, dense_matrix, known_options, plain
from lipjax.models import StagedNet
from lipjax.nn import COLLECTION
from lipjax.parametrize import aoc


def orthogonium(state_dict: dict, options: dict) -> tuple[StagedNet, list[Entry]]:
    """StagedCNN of deel-ai/orthogonium, of adaptive orthogonal convolutions and OrthoLinear."""
    sizes = {"img_shape": (3, 32, 32), "dim_repeats": ((64, 2), (128, 2)), "dim_nb_dense": (256, 2), "n_classes": 10}
    kinds = {"norm": None, "last_layer_type": "global", "kernel_size": 3, "padding_mode": "circular"}
    given = known_options("orthogonium", options, {**sizes, **kinds})
    if given["norm"] not in (None, "BatchCentering"):
        raise ValueError(f"norm: expected None or 'BatchCentering', got {given['norm']!r}.")
    padding = choose(given, "padding_mode", {"circular": "CIRCULAR", "zeros": "ZERO"})
    head = choose(given, "last_layer_type", {"global": "orthonormal", "classwise": "lln"})
    if given["kernel_size"] % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd one, got {given['kernel_size']}.")
    (channels, height, width), stages = given["img_shape"], [tuple(stage)[:2] for stage in given["dim_repeats"]]
    units, repeats = given["dim_nb_dense"] or (0, 0)
    model = StagedNet(
        (height, width, channels),
        given["n_classes"],
        layer="aoc",
        layer_options=FrozenDict({"padding": padding}),
        widths=tuple(features for features, _ in stages),
        depths=tuple(depth for _, depth in stages),
        dense_widths=(units,) * repeats,
        kernel_size=given["kernel_size"],
        centering=given["norm"] is not None,
        head=head,
    )
    entries: list[Entry] = []
    place = 0  # of a layer in the original's sequence, where its normalisation (or nothing) and activation follow
    for name, features, strides in model.convolutions():
        entries += _convolution(f"{place}", name, channels, features, given["kernel_size"], strides)
        entries += _biases(state_dict, place, name, features, model.centering)
        channels, place = features, place + 3
    shrink = 2 ** (len(stages) - 1)
    flat: tuple[int, ...] | None = (channels, height // shrink, width // shrink)
    place += 1  # the flattening
    for i, features in enumerate(model.dense_widths, start=1):
        name = f"dense_{i:02d}"
        entries += _matrix(f"{place}", name, flat)
        entries += _biases(state_dict, place, name, features, model.centering)
        flat, place = None, place + 3
    if head == "lln":
        entries.append(dense_matrix(f"{place}.parametrizations.weight.original", flat, "head", "matrix"))
    else:
        entries += _matrix(f"{place}", "head", flat)
    return model, [*entries, *_biases(state_dict, place, "head", given["n_classes"], False)]


def _vectors(there: str, name: str, array: str, to_ours, batched: bool) -> list[Entry]:
    """The vectors of a norm estimate, columns there, and of convolutions in a batch."""

    def back(shape):
        return (1, *shape, 1) if batched else (*shape, 1)

    def entry(side):
        path = (name, "vectors", array, side)
        return Entry(f"{there}.parametrizations.{side}.original", COLLECTION, path, to_ours(side), back)

    return [entry("u"), entry("v")]


def _convolution(there: str, name: str, inputs: int, outputs: int, kernel_size: int, strides: int) -> list[Entry]:
    """The raw arrays of one convolution, which are numbered there if they are two."""
    shapes = aoc.raw_shapes(inputs, outputs, kernel_size, strides)
    entries: list[Entry] = []
    for i, (array, shape) in enumerate(shapes.items(), start=1):
        weight = f"{there}.parametrizations.weight" + f"_{i}" * (len(shapes) > 1)
        if array == "columns":  # a single group is an axis of length 1 there
            entries.append(Entry(f"{weight}.original", "params", (name, array), lambda a: a[0], lambda s: (1, *s)))
        else:
            entries.append(conv_kernel(f"{weight}.original", name, array))
        if aoc.needs_vectors(array, shape, "bjorck"):
            inner = ".pi" if array == "patch" else ""
            entries += _vectors(f"{weight}.0{inner}", name, array, lambda side: lambda a: a[0, ..., 0], True)
    return entries


def _matrix(there: str, name: str, unflattened: tuple[int, ...] | None) -> list[Entry]:
    """The matrix of one dense layer, and the vectors of its norm estimate, of which v lies where the inputs do."""
    weight = f"{there}.parametrizations.weight"
    raw = dense_matrix(f"{weight}.original", unflattened, name, "matrix")

    def to_ours(side):
        return (lambda a: raw.transform(a.T)[0]) if side == "v" else lambda a: a[:, 0]

    return [raw, *_vectors(f"{weight}.0", name, "matrix", to_ours, False)]


def _biases(state_dict: dict, place: int, name: str, features: int, centred: bool) -> list[Entry]:
    """A layer's bias, zero where there is none there; of a centred layer it is a part of the mean, to the same end."""
    own = f"{place}.bias"
    if centred:
        norm, here = f"{place + 1}", f"{name}_centred"
        further = (f"{norm}.running_num_batches", *((own,) if own in state_dict else ()))

        def mean(total, batches, bias=0.0):
            return total / max(float(np.reshape(batches, ())), 1.0) - bias

        moved = Entry(f"{norm}.running_mean", COLLECTION, (here, "mean"), mean, lambda s: s, further=further)
        return [moved, plain(f"{norm}.bias", here, "bias")]
    if own in state_dict:
        return [plain(own, name, "bias")]
    weight = next(
        (n for n in state_dict if n.startswith(f"{place}.parametrizations.") and n.endswith(".original")), own
    )
    shape = np.shape(state_dict.get(weight, ()))
    return [Entry(weight, "params", (name, "bias"), lambda a: np.zeros(features, a.dtype), lambda s: shape)]
