"""JPEG photographs decoded by simplejpeg where it gives the pixels that Pillow gives, in less time."""

import functools
import io
from typing import Any

import numpy as np

_SUBSAMPLINGS = (0, 1, 2)  # Pillow's names of 4:4:4, 4:2:2 and 4:2:0
_COLOURS = "YCbCr"  # of photographs; whatever else there is (grey, CMYK, RGB) is left to Pillow


def decoded(encoded: bytes) -> np.ndarray | None:
    """The pixels of a photograph, uint8 (h, w, 3), as Pillow would decode them; None: Pillow is to do it.

    That is so for other files than JPEG of YCbCr colours, for damaged ones, about which Pillow decides, and where
    simplejpeg is not installed or another decoder than Pillow's (`_agrees`).
    """
    decoder = _decoder()
    if decoder is None:
        return None
    try:
        if decoder.decode_jpeg_header(encoded)[2] != _COLOURS:
            return None
        return decoder.decode_jpeg(encoded, strict=True)
    except ValueError:
        return None


@functools.cache
def _decoder() -> Any:
    """simplejpeg, or None without it, or if its libjpeg-turbo and Pillow's decode differently."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg if _agrees(simplejpeg) else None


def _agrees(decoder: Any) -> bool:
    """True if a decoder gives Pillow's pixels for made-up images of all subsamplings, of odd sides, progressive or not.

    Both packages bring a libjpeg-turbo of their own, and another version may round otherwise.
    """
    from PIL import Image  # here, because only image files need Pillow

    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    smooth = np.add.outer(np.arange(37), 2 * np.arange(51))[..., None] + 40 * np.arange(3)
    for pixels in (noise, smooth.astype(np.uint8)):
        for subsampling in _SUBSAMPLINGS:
            for progressive in (False, True):
                file = io.BytesIO()
                options = {"quality": 90, "subsampling": subsampling, "progressive": progressive}
                Image.fromarray(pixels).save(file, "jpeg", **options)
                expected = np.asarray(Image.open(file).convert("RGB"))
                try:
                    found = decoder.decode_jpeg(file.getvalue(), strict=True)
                except ValueError:
                    return False
                if not np.array_equal(found, expected):
                    return False
    return True
