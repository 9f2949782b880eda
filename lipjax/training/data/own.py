"""Size and number of the user's own images, found without reading all of them: for configs that are sized by them."""

import dataclasses
import pathlib
import zipfile

import numpy as np

from lipjax.errors import UserError
from lipjax.training.data.images import read_image
from lipjax.training.data.local import folder_files

NPZ_SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True)
class OwnImages:
    """kind: config.data.name, "npz" or "folder". size: (h, w) in pixels. count: images, without a test split of their
    own."""

    kind: str
    size: tuple[int, int]
    count: int


def describe(path: str, image_size: int = 0) -> OwnImages:
    """Looks at a folder of a folder per class, or at an npz file, as config.data.path names them.

    Args: image_size: config.data.image_size, in pixels; 0: the images keep their size.
    Raises: UserError if there are no images that can be read.
    """
    found = pathlib.Path(path).expanduser()
    if found.is_dir():
        files = folder_files(found)
        size, count, kind = read_image(files[0], image_size).pixels.shape[:2], len(files), "folder"
    elif found.suffix == NPZ_SUFFIX and found.is_file():
        shape = _shape(found)
        size, count, kind = shape[1:3], shape[0], "npz"
    else:
        raise UserError(f"config.data.path: there is no folder and no {NPZ_SUFFIX} file {found.absolute()}.")
    size = (image_size, image_size) if image_size else size
    return OwnImages(kind, (int(size[0]), int(size[1])), count)


def _shape(file: pathlib.Path) -> tuple[int, ...]:
    """Of the array "images" in an npz file, from its header."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open("images.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape = read(stream)[0]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is not an npz file with an array images ({error}); use np.savez.") from error
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(f"{file}: expected images (n, h, w, c) or (n, h, w), got {shape}.")
    return shape
