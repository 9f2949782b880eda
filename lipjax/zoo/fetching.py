"""`fetch`: a network of somebody's zoo from a URL, file by file, each with the hash that its list states."""

import hashlib
import http.client
import os
import pathlib
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request

from lipjax.errors import UserError
from lipjax.zoo.library import MANIFEST, read_manifest, verified

SCHEMES = ("https", "http", "file")
_REDIRECTED = {"https": ("https",), "http": ("https", "http")}  # from where to where: never to a weaker one
_MANIFEST_BYTES, _FILE_BYTES = 2**20, 2**32
_TIMEOUT = 60.0  # seconds without an answer


def fetch(url: str, folder: str | os.PathLike, sha256: str | None = None) -> pathlib.Path:
    """Downloads a network of a zoo. Nothing else in lipjax.zoo uses a network.

    Args:
      url: of the network's folder, which holds zoo.json: "https://example.org/zoo/mine". https, http or file.
      folder: where it goes, and appears whole or not at all; not there yet.
      sha256: of zoo.json, as somebody you trust states it. All other hashes follow from it. Without one the files are
        checked against each other only.
    Returns: the folder, which `load` takes.
    Raises: UserError for another scheme, a redirection to one, or from https to http, a file that does not come or has
      another hash, and a folder that is there.
    Example:
      >>> lipjax.zoo.fetch("https://example.org/zoo/mine", "mine")  # doctest: +SKIP
    """
    folder, scheme = pathlib.Path(folder).expanduser(), urllib.parse.urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise UserError(f"Expected a URL of {', '.join(SCHEMES)}, got {url!r}.")
    if folder.exists():
        raise UserError(f"{folder} is there already: give the name of a folder that is not.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        home = pathlib.Path(scratch)
        data = _download(url, MANIFEST, _MANIFEST_BYTES)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256.lower():
            raise UserError(f"{url}/{MANIFEST} hashes to {hashlib.sha256(data).hexdigest()}, not to {sha256}.")
        manifest = read_manifest(data, f"{url}/{MANIFEST}")
        (home / MANIFEST).write_bytes(data)
        for file in manifest["files"]:  # of the names in `FILES` alone: none leads out of the folder
            (home / file).parent.mkdir(exist_ok=True)
            (home / file).write_bytes(_download(url, file, _FILE_BYTES))
        verified(home)
        whole = home / "whole"
        whole.mkdir()
        for path in [path for path in home.iterdir() if path != whole]:
            shutil.move(path, whole / path.name)
        os.rename(whole, folder)
    return folder


class _Redirections(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in _REDIRECTED.get(urllib.parse.urlsplit(req.full_url).scheme, ()):
            raise UserError(f"{req.full_url} redirects to {newurl}: from https to https alone, and from http to both.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, file: str, limit: int) -> bytes:
    address = f"{url.rstrip('/')}/{file}"
    try:
        with urllib.request.build_opener(_Redirections).open(address, timeout=_TIMEOUT) as answer:
            data = answer.read(limit + 1)
    except UserError:  # a ValueError
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(f"{address} did not come ({error}).") from error
    if len(data) > limit:
        raise UserError(f"{address} is longer than {limit} bytes: not a file of a network.")
    return data
