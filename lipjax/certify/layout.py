"""The form of a frozen network in files: operators as arrays and a layout, and made of both again."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from lipjax import operators
from lipjax.errors import UserError
from lipjax.files import write_arrays, write_json
from lipjax.network import Network

SCHEMA = 1
FORMAT = "lipjax-frozen-network"
DTYPES = ("float64", "float32")


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


def arrays_of_network(network: Network) -> dict[str, np.ndarray]:
    """All arrays of a network by name: ops/<name>/<field>, head/<field>, input_mean, input_std."""
    parts = [(f"ops/{name}", op) for name, op in zip(network.names, network.ops, strict=True)]
    found = {}
    for prefix, op in [*parts, ("head", network.head)]:
        found |= arrays_of(prefix, op)
    return {**found, "input_mean": network.input_mean, "input_std": network.input_std}


def layout_of(network: Network) -> dict[str, Any]:
    """A network as network.json has it, beside its arrays."""
    ops = [{"name": name, **entry_of(op)} for name, op in zip(network.names, network.ops, strict=True)]
    return {"ops": ops, "head": type(network.head).__name__}


def sha256_of(network: Network) -> str:
    """Hash of a network: its layout and the bytes of its arrays in float64."""
    digest = hashlib.sha256(json.dumps(layout_of(network), sort_keys=True).encode())
    for name, array in sorted(arrays_of_network(network).items()):
        digest.update(f"\n{name} {list(array.shape)}\n".encode() + array.astype("<f8").tobytes())
    return digest.hexdigest()


def array_hashes_of(network: Network) -> dict[str, str]:
    """SHA-256 of the bytes of every array in float64, by name."""
    found = sorted(arrays_of_network(network).items())
    return {name: hashlib.sha256(array.astype("<f8").tobytes()).hexdigest() for name, array in found}


def check_dtype(network: Network, dtype: str) -> None:
    """Raises: ValueError unless a file with arrays of this dtype holds the network's float64 numbers."""
    if dtype not in DTYPES:
        raise ValueError(f"Expected a dtype of {DTYPES}, got {dtype!r}.")
    if dtype == "float32":
        arrays = jax.tree_util.tree_leaves_with_path(network)
        bad = [jax.tree_util.keystr(path) for path, a in arrays if not np.array_equal(rounded(a), a)]
        if bad:
            raise ValueError(
                f"Expected float32 numbers, so that files can hold them, and these are not: {', '.join(bad)}. "
                'lipjax.freeze(..., dtype="float32") rounds a network.'
            )


def rounded(array) -> np.ndarray:
    """The float32 numbers nearest to those of an array, as float64; infinite beyond their range."""
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float32).astype(np.float64)


def dtype_of(arrays: dict[str, np.ndarray]) -> str:
    """The type in which a file holds arrays: "float32" if all are of it."""
    return "float32" if arrays and all(array.dtype == np.float32 for array in arrays.values()) else "float64"


def in_float64(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same numbers, those of float32 arrays in float64."""
    return {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in arrays.items()}


def save_network(
    directory: str | os.PathLike, network: Network, class_names: Sequence[str] | None, dtype: str, claim: str
) -> None:
    """Writes network.safetensors, whose metadata state the claim and the hash, then network.json."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    digest = sha256_of(network)
    arrays = {name: array.astype(dtype) for name, array in arrays_of_network(network).items()}
    about = {"format": FORMAT, "schema": SCHEMA, "sha256": digest}
    metadata = json.dumps({**about, "claim": claim, "certificate": "certificate.json, where there is one"})
    # One entry: safetensors writes several in an order of its own, and equal networks would make unequal files.
    write_arrays(directory / "network.safetensors", arrays, {"lipjax": metadata})
    names = None if class_names is None else list(class_names)
    write_json(directory / "network.json", {**about, **layout_of(network), "class_names": names})


def read_network(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The document and the arrays of a saved network. Raises: UserError if they are missing, damaged or of others."""
    directory = pathlib.Path(directory)
    try:
        document = json.loads((directory / "network.json").read_text())
        arrays = safetensors.numpy.load_file(directory / "network.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{directory} holds no frozen network: {error.filename} is missing.") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory}: the frozen network is damaged ({error}). Freeze it again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("schema") != SCHEMA:
        raise UserError(
            f"{directory}/network.json is not of format {FORMAT!r}, schema {SCHEMA}: made by another version?"
        )
    return document, arrays


def checked_names(names: Any, num_classes: int) -> tuple[str, ...] | None:
    """Names of classes as a tuple. Raises: ValueError unless they are None, or one text for each class."""
    if names is None:
        return None
    texts = isinstance(names, list | tuple) and all(isinstance(name, str) and name for name in names)
    if not texts or len(names) != num_classes:
        raise ValueError(f"Expected class_names as {num_classes} texts, one for each class, got {names!r:.200}.")
    return tuple(map(str, names))
