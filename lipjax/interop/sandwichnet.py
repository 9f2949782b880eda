"""Networks of sandwich layers."""

import numpy as np

from lipjax.interop.entries import Entry, conv_kernel, known_options, plain
from lipjax.models import SandwichNet


def _stacked(name: str, outputs: int, unflattened: tuple[int, ...] | None, *path: str) -> Entry:
    """A matrix [A B], of whose second part the columns may take the flattening of images (c, h, w)."""

    def transform(array):
        if unflattened is None:
            return array
        second = array[:, outputs:].reshape(-1, *unflattened).transpose(0, 2, 3, 1)
        return np.concatenate([array[:, :outputs], second.reshape(len(array), -1)], axis=1)

    return Entry(name, "params", path, transform, lambda s: s)


def lbdn(state_dict: dict, options: dict) -> tuple[SandwichNet, list[Entry]]:
    """DNN of acfr/LBDN, of Lipschitz constant 1."""
    del state_dict
    sizes = {"img_size": 32, "in_channels": 3, "num_classes": 10, "widths": None, "dense_widths": None}
    given = known_options("lbdn", options, {**sizes, "gamma": 1.0, "LLN": True})
    side = given["img_size"]
    if given["gamma"] != 1:
        raise ValueError(f"gamma: expected 1, got {given['gamma']}: leave a scale to the loss, or to input_std.")
    widths = given["widths"] or {32: (64, 128, 256), 64: (64, 128, 256, 512)}.get(side)
    if widths is None:
        raise ValueError(f"img_size: expected 32 or 64, or widths beside it, got {side}.")
    dense = tuple(given["dense_widths"] or (2048, 2048, 1024))
    model = SandwichNet(
        (side, side, given["in_channels"]),
        given["num_classes"],
        widths=tuple(widths),
        dense_widths=dense,
        head="lln" if given["LLN"] else "orthonormal",
    )
    entries: list[Entry] = []
    for i in range(2 * len(widths)):
        there, here = f"model.{i}", f"conv{i // 2 + 1}_{'ab'[i % 2]}"
        entries.append(conv_kernel(f"{there}.weight", here, "kernel"))
        entries += [plain(f"{there}.{name}", here, name) for name in ("bias", "psi", "alpha")]
    grid, first = side // 2 ** len(widths), 2 * len(widths) + 1  # the flattening comes before
    for i, width in enumerate(dense):
        there, here = f"model.{first + i}", f"dense_{i + 1:02d}"
        entries.append(_stacked(f"{there}.weight", width, (widths[-1], grid, grid) if i == 0 else None, here, "matrix"))
        entries += [plain(f"{there}.{name}", here, name) for name in ("bias", "psi", "alpha")]
    last = f"model.{first + len(dense)}"
    entries += [plain(f"{last}.weight", "head", "matrix"), plain(f"{last}.bias", "head", "bias")]
    return model, entries if given["LLN"] else [*entries, plain(f"{last}.alpha", "head", "alpha")]
