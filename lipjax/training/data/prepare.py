"""Prepares a data set once, from archives on disk or from the network, for reading without TensorFlow.

Run: lipjax prepare NAME --data_dir DIR [--download]
With the name "export" it writes a split of a run's data set: see lipjax/training/export.py.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import pathlib
import types
import zipfile
from collections.abc import Iterator
from typing import Any

from lipjax.errors import UserError
from lipjax.training.data import prepared

IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(name: str, data_dir: pathlib.Path, *, download: bool) -> None:
    """Writes a data set's array_record files under data_dir, or checks those that are there.

    Archives under <data_dir>/downloads/manual are used first; with download=False nothing else is.

    Raises: UserError for an archive that is missing, damaged or not the published one, and for a failed download.
    """
    if prepared.find_prepared(name, data_dir) is None:
        _build(name, data_dir, download)
    prepared.open_prepared(name, data_dir)


def _build(name: str, data_dir: pathlib.Path, download: bool) -> None:
    tfds = prepared.import_tfds()
    from tensorflow_datasets.core.download import download_manager, extractor

    if name == "tiny_imagenet":
        importlib.import_module("lipjax.training.data.tiny_imagenet")  # registers the builder
    failures = (OSError, ValueError, KeyError, zipfile.BadZipFile, extractor.ExtractError)
    with without_tensorflow():
        builder = tfds.builder(prepared.PREPARED[name].builder, data_dir=data_dir, file_format=prepared.FILE_FORMAT)
        if os.path.exists(builder.data_dir):
            # TFDS would take the folder for a finished data set and do nothing.
            raise UserError(f"{builder.data_dir} exists but holds no dataset_info.json. Remove it and prepare again.")
        _check_archives(name, builder, data_dir, download)
        try:
            builder.download_and_prepare(file_format=prepared.FILE_FORMAT)
        except download_manager.NonMatchingChecksumError as error:
            raise UserError(
                f"An archive of {name!r} is not the published one, or damaged: {error}\n"
                f"Remove it from {prepared.manual_dir(data_dir)} and fetch it again."
            ) from error
        except failures as error:
            raise UserError(
                f"Preparing {name!r} in {data_dir} failed: {type(error).__name__}: {error}\n"
                "Check the network (or the archives), the free disk space and the permissions; nothing was left behind."
            ) from error


def _check_archives(name: str, builder: Any, data_dir: pathlib.Path, download: bool) -> None:
    """Looks for the archives before TFDS does: without a network it would retry for 200 seconds."""
    folder = prepared.manual_dir(data_dir)
    if name == "imagenet":
        missing = [archive for archive in IMAGENET_ARCHIVES if not (folder / archive).is_file()]
        if missing:
            raise UserError(
                f"ImageNet cannot be fetched without registering. Get {' and '.join(missing)} from "
                f"https://image-net.org/download-images, put them under {folder} and run\n"
                f"  {prepared.prepare_command(name, data_dir)}"
            )
        return
    missing = {url: info.filename for url, info in builder.url_infos.items() if not (folder / info.filename).is_file()}
    if not missing:
        return
    listing = "\n".join(f"  {filename} from {url}" for url, filename in missing.items())
    if not download:
        raise UserError(
            f"The archives of {name!r} are not under {folder}, and nothing is fetched unless you ask:\n{listing}\n"
            f"Put them there, or fetch them with\n  {prepared.prepare_command(name, data_dir)}"
        )
    import requests  # TFDS's own

    try:
        requests.head(next(iter(missing)), timeout=30)
    except requests.RequestException as error:
        raise UserError(f"No connection ({error}). Put these files under {folder} by hand:\n{listing}") from error


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Lets TFDS's builders run where TensorFlow is not installed; does nothing where it is.

    TFDS needs no TensorFlow to read array_record files, but its builders use it for three small things: opening local
    files, encoding PNG, and mending a few JPEGs of ImageNet. Installing 1.4 GB for that is not reasonable, so the
    names they look up stand for `open` and Pillow inside this context, and are put back after it.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from tensorflow_datasets.core import utils
    from tensorflow_datasets.core.features import image_feature

    gfile = types.SimpleNamespace(GFile=open, exists=os.path.exists)
    stand_in = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile), compat=types.SimpleNamespace(as_text=str))
    package = "tensorflow_datasets"
    modules = [
        f"{package}.core.download.extractor",
        f"{package}.image_classification.cifar",
        f"{package}.image_classification.mnist",
        f"{package}.datasets.imagenet2012.imagenet2012_dataset_builder",
        f"{package}.datasets.imagenet2012.imagenet_common",
    ]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(_replaced(importlib.import_module(module), "tf", stand_in))
        stack.enter_context(_replaced(image_feature._ImageEncoder, "_encode_image", _encode_image))
        stack.enter_context(_replaced(utils, "jpeg_cmyk_to_rgb", _to_rgb_jpeg))
        stack.enter_context(_replaced(utils, "png_to_jpeg", _to_rgb_jpeg))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _encode_image(encoder: Any, pixels: Any) -> bytes:
    """Stands for TFDS's `_ImageEncoder._encode_image`: uint8 (h, w, 1 or 3) to PNG or JPEG bytes."""
    from PIL import Image

    if pixels.dtype != "uint8" or len(pixels.shape) != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"Expected uint8 (h, w, 1 or 3), got {pixels.dtype} {pixels.shape}.")
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, encoder.encoding_format)
    return buffer.getvalue()


def _to_rgb_jpeg(image_bytes: bytes, quality: int = 100) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(image_bytes)).convert("RGB").save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()
