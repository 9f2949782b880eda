"""`add`: a certified run becomes a network of a zoo."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

from lipjax.certify import FrozenNetwork
from lipjax.errors import UserError
from lipjax.files import write_json
from lipjax.zoo.cards import ANOTHER_RUN, card_text
from lipjax.zoo.library import FILES, FORMAT, HOME, MANIFEST, REQUIRED, SCHEMA, load

# Fields of a config that say where something lies on one machine.
_PATHS = (("data", "data_dir"), ("data", "path"), ("data", "generated", "path"), ("data", "generated", "cache_dir"))


def add(
    run: str | os.PathLike, name: str, *, about: str, cost: str, root: str | os.PathLike | None = None
) -> pathlib.Path:
    """Copies what is needed of a certified run, writes its model card, and lists all files with their hashes.

    Paths on this machine are left out of the copy. A network of this name that is there is replaced as soon as the new
    one is whole and loads, not before: `run` may be its own folder, whose card is then written anew.

    Args:
      run: a training run with a certificate, of one seed.
      name: letters, digits, "_" and "-": the name in the zoo.
      about: a line about the network.
      cost: of its training, and on what: "6 minutes on one core of an AMD EPYC".
      root: the zoo; None: the one that lipjax brings, in a checkout of it.
    Returns: the folder.
    Raises: UserError for a run without a certificate, or whose files do not belong to each other, and for such a name.
    Example:
      >>> lipjax.zoo.add("runs/digits", "mine", about="A trial.", cost="a minute", root="zoo")  # doctest: +SKIP
    """
    run, root = pathlib.Path(run).expanduser(), HOME if root is None else pathlib.Path(root).expanduser()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"Expected a name of letters, digits, '_' and '-', got {name!r}.")
    missing = [file for file in REQUIRED if file != "README.md" and not (run / file).is_file()]
    if missing:
        raise UserError(f"{run} is no certified run of one seed ({missing[0]} is missing): train and certify it first.")
    documents = {
        file: json.loads((run / file).read_text(encoding="utf-8"))
        for file in FILES
        if file.endswith("json") and (run / file).is_file()
    }
    frozen = FrozenNetwork.load(run / "frozen")
    sha256 = frozen.sha256()
    for file in ("certificate.json", "report.json"):
        if documents[file].get("frozen_sha256") != sha256:
            raise UserError(f"{run / file} is about another network than {run / 'frozen'}: certify the run again.")
    config = _without_paths(documents["config.json"]["config"])
    documents["config.json"]["config"] = config
    documents["certificate.json"]["config"] = _without_paths(documents["certificate.json"]["config"])
    folder = root / name
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is there and no network of a zoo: choose another name.")
    manifest: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA, "name": name, "frozen_sha256": sha256}
    manifest |= {"about": about, "cost": cost}
    card = card_text(manifest, documents, frozen)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as scratch:
        new, old = pathlib.Path(scratch, "new"), pathlib.Path(scratch, "old")
        (new / "frozen").mkdir(parents=True)
        for file in FILES:
            if file in ("certificate.json", "config.json"):
                write_json(new / file, documents[file], None)
            elif (run / file).is_file() and file != "README.md":
                shutil.copyfile(run / file, new / file)
        (new / "README.md").write_text(card, encoding="utf-8")
        here = [file for file in FILES if (new / file).is_file()]
        hashes = {file: hashlib.sha256((new / file).read_bytes()).hexdigest() for file in here}
        write_json(new / MANIFEST, manifest | {"files": hashes})
        load(new)
        replaces = folder.exists()
        if replaces:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if replaces:
                os.rename(old, folder)
            raise
    return folder


def _without_paths(config: dict) -> dict:
    config = json.loads(json.dumps(config))
    for *groups, field in _PATHS:
        place = config
        for group in groups:
            place = place.get(group, {})
        if field in place:
            place[field] = ""
    if config.get("init_from"):
        config["init_from"] = ANOTHER_RUN
    return config
