"""Augmentation against plain NumPy on each image, and its independence of the number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from lipjax.training import augment

pytestmark = pytest.mark.quick_compiles


def some_images(batch=64, height=8, width=6, channels=3):
    images = np.random.default_rng(0).integers(1, 256, (batch, height, width, channels), dtype=np.uint8)
    return jnp.asarray(images)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_each_crop_is_one_of_the_shifts_and_all_shifts_occur(padding):
    batch = 40 * (2 * padding + 1) ** 2
    images = some_images(batch, 8, 6)
    crops = np.asarray(augment.random_crop(jax.random.key(1), images, padding))
    padded = np.pad(np.asarray(images), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    seen = np.zeros((2 * padding + 1, 2 * padding + 1), int)
    for crop, source in zip(crops, padded, strict=True):
        matches = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if np.array_equal(crop, source[top : top + 8, left : left + 6])
        ]
        assert len(matches) == 1  # the pixels are random, so shifts cannot be confused
        seen[matches[0]] += 1
    # Each count is Binomial(batch, 1 / shifts), mean 40: eight standard deviations never happen.
    assert np.all(np.abs(seen - 40) < 8 * np.sqrt(40)) and (padding == 0 or seen.std() > 0)


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = some_images(1000)
    flipped = np.asarray(augment.random_flip(jax.random.key(2), images))
    same = np.all(flipped == np.asarray(images), axis=(1, 2, 3))
    mirrored = np.all(flipped == np.asarray(images)[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert abs(mirrored.sum() - 500) < 8 * np.sqrt(250)


def test_augment_follows_its_flags_and_keeps_uint8():
    images, key = some_images(), jax.random.key(3)
    assert np.array_equal(augment.augment(key, images, crop_padding=0, flip=False), images)
    both = augment.augment(key, images, crop_padding=2, flip=True)
    assert both.dtype == jnp.uint8 and both.shape == images.shape
    assert np.array_equal(both, augment.augment(key, images, crop_padding=2, flip=True))
    assert not np.array_equal(both, augment.augment(jax.random.key(4), images, crop_padding=2, flip=True))
    crop = augment.augment(key, images, crop_padding=2, flip=False)
    assert np.all((both == crop) | (both == crop[:, :, ::-1])) and not np.array_equal(both, crop)


@pytest.mark.parametrize("pixel_max", [16, 255])
def test_to_pixels_is_exact_division_in_float32(pixel_max):
    images = jnp.arange(pixel_max + 1, dtype=jnp.uint8).reshape(-1, 1, 1, 1)
    pixels = augment.to_pixels(images, pixel_max)
    assert pixels.dtype == jnp.float32
    assert pixels.min() == 0 and pixels.max() == 1
    # One float32 division: within half a unit in the last place of a number below 1, a little more where XLA
    # multiplies by the reciprocal.
    exact = np.arange(pixel_max + 1) / pixel_max
    assert np.all(np.abs(np.asarray(pixels).ravel() - exact) <= 2 * np.finfo(np.float32).eps)


def test_affine_without_motion_is_the_identity_and_with_a_shift_is_not():
    pixels = augment.to_pixels(some_images(8, 8, 8, 1), 255)
    key = jax.random.key(5)
    # Coordinates up to 8 carry rounding of a few 8 eps, and pixels differ by at most 1 from their neighbours.
    assert np.allclose(augment.random_affine(key, pixels), pixels, atol=32 * np.finfo(np.float32).eps, rtol=0)
    assert not np.allclose(augment.random_affine(key, pixels, max_shift=0.2), pixels, atol=0.01)


def test_affine_agrees_with_scipy_and_stays_in_range():
    height, width, rotation, scale, shift = 9, 8, 25.0, 0.2, 0.15
    key = jax.random.key(6)
    images = some_images(16, height, width, 2).astype(jnp.float32) / 255
    result = augment.random_affine(key, images, max_rotation=rotation, max_scale=scale, max_shift=shift)
    draws = np.asarray(jax.random.uniform(key, (16, 4), jnp.float32, -1, 1), np.float64)
    centre = (np.array([height, width]) - 1) / 2
    for image, moved, draw in zip(np.asarray(images), np.asarray(result), draws, strict=True):
        angle, factor = np.deg2rad(rotation) * draw[0], 1 + scale * draw[1]
        forward = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        inverse = np.linalg.inv(forward)
        offset = centre - inverse @ (centre + shift * draw[2:] * [height, width])
        for channel in range(2):
            # "grid-constant": 0 outside the image, interpolated towards at its border.
            expected = ndimage.affine_transform(image[..., channel], inverse, offset, order=1, mode="grid-constant")
            # Coordinates of size 10 in float32, times slopes of at most 2 per pixel.
            assert np.allclose(moved[..., channel], expected, atol=100 * np.finfo(np.float32).eps, rtol=0)
    assert result.min() >= 0 and result.max() <= 1
    assert result.dtype == images.dtype


@pytest.mark.parametrize("options", [{"max_scale": 1.0}, {"max_rotation": -1.0}, {"max_shift": -0.1}])
def test_affine_refuses_ranges_without_meaning(options):
    with pytest.raises(ValueError, match="Expected"):
        augment.random_affine(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), **options)
    with pytest.raises(ValueError, match="padding"):
        augment.random_crop(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), -1)


def test_result_does_not_depend_on_the_sharding_of_the_batch():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images = some_images(8 * len(devices))

    @jax.jit
    def view(key, images):
        pixels = augment.to_pixels(augment.augment(key, images, crop_padding=2, flip=True), 255)
        return augment.random_affine(key, pixels, max_rotation=10.0, max_scale=0.1, max_shift=0.1)

    key, sharded = jax.random.key(7), jax.device_put(images, spread)
    assert np.array_equal(view(key, images), view(key, sharded))
    program = view.lower(key, sharded).compile().as_text() or ""
    assert "fusion" in program and "all-gather" not in program
