"""Sizes of arrays as text, for the one line that an operator is in print: read off shapes, whatever the leaves are."""

from typing import Any


def sizes(leaf: Any, count: int) -> tuple:
    """The last `count` sides of an array; "?" for each where the leaf is no array of as many."""
    shape = getattr(leaf, "shape", ())
    known = isinstance(shape, tuple) and len(shape) >= count
    return shape[len(shape) - count :] if known else ("?",) * count


def matrix_text(matrix: Any) -> str:
    """16 -> 32: the sides of a matrix (out, in)."""
    outputs, inputs = sizes(matrix, 2)
    return f"{inputs} -> {outputs}"


def kernel_text(kernel: Any, groups: int = 1) -> str:
    """3x3, 16 -> 32: the sides and channels of an HWIO kernel, (kh, kw, in / groups, out)."""
    kh, kw, inputs, outputs = sizes(kernel, 4)
    inputs = inputs if inputs == "?" else inputs * groups
    return f"{kh}x{kw}, {inputs} -> {outputs}"
