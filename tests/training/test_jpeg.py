"""simplejpeg decodes photographs for training to Pillow's pixels, or leaves them to Pillow."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from lipjax.errors import UserError
from lipjax.training.data import jpeg, stream
from lipjax.training.data.prepared import open_image


@pytest.fixture(autouse=True)
def fresh():
    jpeg._decoder.cache_clear()
    yield
    jpeg._decoder.cache_clear()


def photograph(mode="RGB", form="jpeg", size=(61, 47), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, form, **options)
    return file.getvalue()


def crop(encoded, resample="bilinear"):
    return stream.random_crop(encoded, 16, np.random.default_rng(3), "here", resample)


@pytest.mark.parametrize("quality", [30, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_pixels_are_those_of_pillow(quality, subsampling):
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        encoded = photograph(quality=quality, subsampling=subsampling, **options)
        pixels = jpeg.decoded(encoded)
        assert pixels is not None and pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.asarray(open_image(encoded, "").convert("RGB")))


@pytest.mark.parametrize("other", ["grey", "CMYK", "PNG", "cut short", "no image"])
def test_all_else_is_left_to_pillow(other):
    whole = photograph()
    encoded = {
        "grey": photograph("L"),
        "CMYK": photograph("CMYK"),
        "PNG": photograph(form="png"),
        "cut short": whole[: len(whole) // 2],
        "no image": b"\xff\xd8 broken",
    }[other]
    assert jpeg.decoded(encoded) is None and jpeg.decoded(whole) is not None
    if other in ("cut short", "no image"):
        with pytest.raises(UserError, match="here is damaged"):
            crop(encoded)
    else:
        assert crop(encoded).shape == (16, 16, 3)


def test_crops_do_not_depend_on_the_decoder(monkeypatch):
    encoded = photograph(quality=90)
    expected = {resample: crop(encoded, resample) for resample in stream.RESAMPLE}
    assert not np.array_equal(expected["bilinear"], expected["nearest"])
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # as if it were not installed
    jpeg._decoder.cache_clear()
    assert jpeg.decoded(encoded) is None
    for resample, pixels in expected.items():
        assert np.array_equal(crop(encoded, resample), pixels)


def test_a_decoder_that_rounds_otherwise_is_not_used(monkeypatch):
    import simplejpeg

    assert jpeg._agrees(simplejpeg)
    real = simplejpeg.decode_jpeg

    def other(encoded, **options):
        pixels = real(encoded, **options)
        pixels[-1, -1, 2] ^= 1
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", other)
    assert not jpeg._agrees(simplejpeg) and jpeg.decoded(photograph()) is None


def test_the_nearest_pixel_is_one_of_the_image():
    """Every fourth column is white: averages are grey, pixels are not."""
    stripes = np.zeros((80, 80, 3), np.uint8)
    stripes[:, ::4] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "png")
    assert set(np.unique(crop(file.getvalue(), "nearest"))) <= {0, 255}
    assert set(np.unique(crop(file.getvalue()))) - {0, 255}  # control
