"""The form of a frozen network in files: operators as arrays and a layout, and made of both again."""

import dataclasses
from typing import Any

import numpy as np

from lipjax import operators
from lipjax.network import Network


def arrays_of(prefix: str, part) -> dict[str, np.ndarray]:
    """The arrays of an operator or a head, by name: prefix/<field>, of a `Residual` prefix/<place>/<field>."""
    found = {}
    if isinstance(part, operators.Residual):
        for i, op in enumerate(part.ops):
            found |= arrays_of(f"{prefix}/{i}", op)
        return found
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, np.ndarray):
            found[f"{prefix}/{field.name}"] = np.ascontiguousarray(value)
    return found


def entry_of(op) -> dict[str, Any]:
    """The type of an operator and what it is made of beside arrays."""
    if isinstance(op, operators.Residual):
        return {"type": "Residual", "ops": [entry_of(part) for part in op.ops]}
    static = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}
    return {"type": type(op).__name__, **{k: v for k, v in static.items() if not isinstance(v, np.ndarray)}}


def _operator(entry: dict, prefix: str, arrays: dict[str, np.ndarray]):
    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    cls = operators.OPERATORS[entry["type"]]
    if cls is operators.Residual:
        return cls(tuple(_operator(part, f"{prefix}/{i}", arrays) for i, part in enumerate(entry["ops"])))
    fields = {f.name: entry.get(f.name, arrays.get(f"{prefix}/{f.name}")) for f in dataclasses.fields(cls)}
    # Some constructors take other arguments than the fields.
    make: Any = getattr(cls, "rebuild", cls)
    return make(**{name: tuples(value) for name, value in fields.items()})


def rebuild(document: dict, arrays: dict[str, np.ndarray]) -> Network:
    """The network of a layout, of `entry_of` for every operator, and of arrays by name.

    Raises: LookupError, TypeError, AttributeError, OverflowError or ValueError where they do not fit each other.
    """
    ops = [_operator(entry, f"ops/{entry['name']}", arrays) for entry in document["ops"]]
    cls = operators.HEADS[document["head"]]
    head = cls(**{f.name: arrays[f"head/{f.name}"] for f in dataclasses.fields(cls)})
    names = tuple(entry["name"] for entry in document["ops"])
    return Network(tuple(ops), head, arrays["input_mean"], arrays["input_std"], names)
