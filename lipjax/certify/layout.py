"""The form of a frozen network in files: operators as arrays and a layout, and made of both again."""

import dataclasses
from typing import Any

import numpy as np

from lipjax import operators
from lipjax.network import Network


def arrays_of(prefix: str, part) -> dict[str, np.ndarray]:
    """The arrays of an operator or a head, by name: prefix/<field>.

    Those of an operator in a field: prefix/<field>/<its field>; in a field of several: prefix/<place>/<its field>.
    """
    found = {}
    for name, value in _fields(part):
        if isinstance(value, np.ndarray):
            found[f"{prefix}/{name}"] = np.ascontiguousarray(value)
        elif isinstance(value, operators.Operator):
            found |= arrays_of(f"{prefix}/{name}", value)
        elif _is_operators(value):
            for i, op in enumerate(value):
                found |= arrays_of(f"{prefix}/{i}", op)
    return found


def _fields(part) -> list[tuple[str, Any]]:
    return [(field.name, getattr(part, field.name)) for field in dataclasses.fields(part)]


def _is_operators(value) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(op, operators.Operator) for op in value)


def entry_of(op) -> dict[str, Any]:
    """The type of an operator and what it is made of beside arrays."""

    def written(value):
        if isinstance(value, operators.Operator):
            return entry_of(value)
        return [entry_of(part) for part in value] if _is_operators(value) else value

    static = {name: written(value) for name, value in _fields(op) if not isinstance(value, np.ndarray)}
    defaults = {field.name: field.default for field in dataclasses.fields(op) if field.name in op._later}
    static = {name: value for name, value in static.items() if name not in defaults or value != defaults[name]}
    return {"type": type(op).__name__, **static}


def _operator(entry: dict, prefix: str, arrays: dict[str, np.ndarray]):
    def read(value, prefix):
        if isinstance(value, dict):
            return _operator(value, prefix, arrays)
        if isinstance(value, list):
            parent = prefix.rpartition("/")[0]
            return tuple(read(part, f"{parent}/{i}") for i, part in enumerate(value))
        return value

    cls = operators.OPERATORS[entry["type"]]
    stated = [f.name for f in dataclasses.fields(cls) if f.name in entry or f.name not in cls._later]
    fields = {name: entry.get(name, arrays.get(f"{prefix}/{name}")) for name in stated}
    return cls.rebuild(**{name: read(value, f"{prefix}/{name}") for name, value in fields.items()})


def rebuild(document: dict, arrays: dict[str, np.ndarray]) -> Network:
    """The network of a layout, of `entry_of` for every operator, and of arrays by name.

    Raises: LookupError, TypeError, AttributeError, OverflowError or ValueError where they do not fit each other.
    """
    ops = [_operator(entry, f"ops/{entry['name']}", arrays) for entry in document["ops"]]
    cls = operators.HEADS[document["head"]]
    head = cls(**{f.name: arrays[f"head/{f.name}"] for f in dataclasses.fields(cls)})
    names = tuple(entry["name"] for entry in document["ops"])
    return Network(tuple(ops), head, arrays["input_mean"], arrays["input_std"], names)
