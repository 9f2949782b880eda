"""The networks of a zoo: folders with a list of their files' hashes, which loading checks."""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lipjax.certify import FrozenNetwork
from lipjax.errors import UserError

HOME = pathlib.Path(__file__).parent
"""The folder of the networks that lipjax brings."""

MANIFEST = "zoo.json"
FORMAT, SCHEMA = "lipjax-zoo", 1
_IMAGES = "images.safetensors"
REQUIRED = (
    *("frozen/network.json", "frozen/network.safetensors", "certificate.json", _IMAGES),
    *("report.json", "config.json", "README.md"),
)
FILES = (*REQUIRED, "attack.json")
"""The files that a network of a zoo may have beside its list of hashes; all but the last it must have."""


def names(root: str | os.PathLike | None = None) -> list[str]:
    """The networks of a zoo, by name.

    Args:
      root: a folder of networks; None: those that lipjax brings.
    Returns: their names, sorted.
    Raises: UserError if there is no such folder.
    Example:
      >>> "digits_liresnet" in lipjax.zoo.list()
      True
    """
    root = HOME if root is None else pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"Expected a folder of networks, got {root}: give the folder that holds those of your zoo.")
    return sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}"))


def directory(name: str | os.PathLike, root: str | os.PathLike | None = None) -> pathlib.Path:
    """The folder of a network: a run's files, which `lipjax check` proves.

    Args:
      name: one of `list(root)`, or the path of a folder that `add` or `fetch` wrote.
      root: as of `list`.
    Returns: its path.
    Raises: UserError for an unknown name, and for a URL: nothing is fetched unasked.
    Example:
      >>> lipjax.zoo.directory("digits_liresnet").name
      'digits_liresnet'
    """
    text = os.fspath(name)
    if "://" in text:
        raise UserError(f"Nothing is fetched unasked: lipjax.zoo.fetch({text!r}, DIR) does, then load(DIR).")
    known = names(root)
    if text in known:
        return (HOME if root is None else pathlib.Path(root).expanduser()) / text
    path = pathlib.Path(text).expanduser()
    if root is None and (path / MANIFEST).is_file():
        return path
    raise UserError(f"Expected a network of the zoo ({', '.join(known)}) or the path of one, got {text!r}.")


def located(path: str) -> str:
    """The folder that "zoo/NAME" stands for on a command line.

    Args:
      path: as somebody typed it.
    Returns: the folder of lipjax's own network NAME; other paths, and a folder of this name, as they are.
    Raises: UserError for zoo/NAME if there is neither such a network nor a folder "zoo" here.
    Example:
      >>> lipjax.zoo.located("runs/mine")
      'runs/mine'
    """
    lead, _, name = path.partition("/")
    if lead != "zoo" or not name or os.path.exists(path):
        return path
    known = names()
    if name in known:
        return str(HOME / name)
    if os.path.exists(lead):  # one's own folder, in which nothing of this name lies
        return path
    raise UserError(f"Expected a network of the zoo ({', '.join(known)}) after zoo/, got {name!r}.")


def verified(folder: pathlib.Path) -> dict[str, Any]:
    """The list of a network's files, whose hashes are those of the files.

    Raises: UserError if the list or a file is missing, damaged or another one.
    """
    path = folder / MANIFEST
    try:
        manifest = read_manifest(path.read_bytes(), path)
        for file, digest in manifest["files"].items():
            found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
            if found != digest:
                raise UserError(f"{folder / file} hashes to {found}, but {path} says {digest}: get the network again.")
    except OSError as error:
        raise UserError(f"{folder} is not whole ({error}): get the network again.") from error
    return manifest


def read_manifest(data: bytes, path: Any) -> dict[str, Any]:
    """The list of a network's files from its bytes. Raises: UserError if it is damaged, or not of this format."""
    try:
        manifest = json.loads(data)
        if (manifest["format"], manifest["schema"]) != (FORMAT, SCHEMA):
            raise ValueError(f"expected format {FORMAT!r}, schema {SCHEMA}")
        files = manifest["files"]
        bad = [name for name in files if name not in FILES] + [name for name in REQUIRED if name not in files]
        if bad or not all(isinstance(digest, str) for digest in files.values()):
            raise ValueError(f"files are not those of a network: {bad}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or of another version ({error}): get the network again.") from error
    return manifest


def load(name: str | os.PathLike, root: str | os.PathLike | None = None) -> FrozenNetwork:
    """A network of a zoo, whose files have the hashes that they should have.

    Args:
      name: one of `list(root)`, or the path of a folder that `add` or `fetch` wrote.
      root: as of `list`.
    Returns: the frozen network that the certificate beside it is about: it certifies, predicts and exports. Takes no
      package beyond a bare installation, and no network.
    Raises: UserError for an unknown name, and for files that are missing, damaged or other ones.
    Example:
      >>> lipjax.zoo.load("digits_liresnet").in_shape
      (8, 8, 1)
    """
    folder = directory(name, root)
    manifest = verified(folder)
    frozen = FrozenNetwork.load(folder / "frozen")
    if not frozen.sha256() == manifest.get("frozen_sha256") == _certified(folder, "frozen_sha256"):
        raise UserError(f"{folder}: the certificate is about another network than the one beside it.")
    return frozen


def images(name: str | os.PathLike, root: str | os.PathLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The test images that lie beside a network's certificate: all of up to 1,000, otherwise 1,000 drawn by hash.

    Args:
      name, root: as of `load`.
    Returns: (n, h, w, c) float64 in [0, 1], and their labels (n,), integers.
    Raises: UserError for an unknown name, and for files that are missing, damaged or other ones.
    Example:
      >>> pixels, labels = lipjax.zoo.images("digits_liresnet")
      >>> pixels.shape, float(pixels.max())
      ((359, 8, 8, 1), 1.0)
    """
    folder = directory(name, root)
    verified(folder)
    file, pixel_max = _certified(folder, "sample", "file"), _certified(folder, "data", "pixel_max")
    if file != _IMAGES:  # the one whose hash is checked, and no path out of the folder
        raise UserError(f"{folder}: the certificate names {file!r}, but a zoo's images are in {_IMAGES!r}.")
    if type(pixel_max) not in (int, float) or not 0 < pixel_max < np.inf:
        raise UserError(f"{folder}: the certificate names {pixel_max!r} as the largest pixel, which is no such number.")
    try:
        arrays = load_file(folder / _IMAGES)
        return arrays["pixels"] / np.float64(pixel_max), arrays["labels"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / _IMAGES} holds no images of a certificate ({error!r}).") from error


def _certified(folder: pathlib.Path, *keys: str) -> Any:
    """An entry of a network's certificate. Raises: UserError if there is none."""
    path = folder / "certificate.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            entry = entry[key]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no certificate with {'.'.join(keys)} ({error!r}): certify the run again."
        ) from error
    return entry


def card(name: str | os.PathLike, root: str | os.PathLike | None = None) -> str:
    """The model card of a network: data, training and its cost, what is proved, in float32, too, and the attack.

    Args:
      name, root: as of `load`.
    Returns: Markdown with the metadata of Hugging Face's model cards in front.
    Raises: UserError for an unknown name, and for files that are missing, damaged or other ones.
    Example:
      >>> lipjax.zoo.card("digits_liresnet").splitlines()[:2]
      ['---', 'license: apache-2.0']
    """
    folder = directory(name, root)
    verified(folder)
    return (folder / "README.md").read_text(encoding="utf-8")
