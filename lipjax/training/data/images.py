"""Image files as pixels: which formats are read, what is grey, where transparency goes, how images become one size."""

import dataclasses
import os
import pathlib
import struct
from collections.abc import Iterable

import numpy as np

from lipjax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# Transparent pixels are put onto this, as image viewers and web pages mostly do.
BACKGROUND = "white"


@dataclasses.dataclass(frozen=True)
class ReadImage:
    """An image file, read.

    Attributes: pixels: uint8, (h, w) of a grey image, (h, w, 3) of another. composited: whether some of its pixels were
      transparent, and were put onto `BACKGROUND`. resized: whether it had another size in the file.
    """

    pixels: np.ndarray
    composited: bool
    resized: bool


def read_image(file: str | os.PathLike, image_size: int = 0) -> ReadImage:
    """Reads one image file of 8 bits a channel.

    Grey are the modes of one grey channel, with transparency or without, and palettes of greys; other images are RGB.

    Args: image_size: as `resize`; 0: the image keeps its size.
    Raises: UserError for a file that is no image, is damaged, has more bits or holds several images.
    """
    from PIL import Image  # here, because only image files need Pillow

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{file} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits.")
            # Cameras write JPEG files of this kind whose further images are previews.
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames > 1:
                raise UserError(f"{file} holds {frames} images; store each in a file of its own.")
            pixels, composited = _pixels(image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is not a readable image ({error}); mend or remove it.") from error
    resized = image_size > 0 and pixels.shape[:2] != (image_size, image_size)
    return ReadImage(resize(pixels, image_size) if resized else pixels, composited, resized)


def _pixels(image) -> tuple[np.ndarray, bool]:
    from PIL import Image

    grey, palette, composited = image.mode in ("1", "L", "LA", "La"), image.mode in ("P", "PA"), False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        composited = image.getchannel("A").getextrema()[0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    pixels = np.array(image.convert("RGB"))
    if palette:
        grey = bool((pixels == pixels[..., :1]).all())
    return (np.ascontiguousarray(pixels[..., 0]) if grey else pixels), composited


def resize(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """The centre square of an image, resized to image_size x image_size pixels.

    Its shorter side decides the scale and the longer one is cut off at both ends, so that nothing is distorted. The
    filter is Pillow's bilinear one, which averages over all pixels where it makes an image smaller.

    Args: pixels: uint8 (h, w) or (h, w, c). Returns: the same with h = w = image_size; of that size already, as it is.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    if height == width == image_size:
        return pixels
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    planes = pixels.reshape(height, width, -1)
    made = [
        Image.fromarray(np.ascontiguousarray(planes[..., i])).resize(
            (image_size, image_size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        for i in range(planes.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in made], axis=-1).reshape(image_size, image_size, *pixels.shape[2:])


def resized_name(name: str, image_size: int) -> str:
    """The name of a data set whose images were resized: it says what certificates are about, images after that."""
    return f"{name}, resized to {image_size} x {image_size}"


def read_images(files: Iterable[str | os.PathLike], image_shape: tuple[int, int, int], image_size: int) -> np.ndarray:
    """Image files as a network takes them that was trained on a folder: uint8 (n, h, w, c).

    Args: image_shape: (h, w, c) of the network's images. image_size: config.data.image_size of its training.
    Raises: UserError for a file as in `read_image`, of another size, or in colour where the network takes grey ones.
    """
    height, width, channels = image_shape
    found = []
    for file in map(pathlib.Path, files):
        pixels = read_image(file, image_size).pixels
        if pixels.shape[:2] != (height, width):
            raise UserError(f"{file} is {pixels.shape[:2]} (height, width), the network takes {(height, width)} alone.")
        if channels not in (1, 3) or (pixels.ndim == 3 and channels == 1):
            kind = "grey" if pixels.ndim == 2 else "RGB"
            raise UserError(f"{file} is {kind}, but the network takes images of {channels} channel(s).")
        found.append(pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], channels, axis=2))
    return np.stack(found) if found else np.empty((0, *image_shape), np.uint8)
