"""RandAugment, operation by operation against Pillow with the magnitudes of torchvision, and how it draws them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lipjax.training import randaugment
from lipjax.training.randaugment import OPERATIONS

pytestmark = pytest.mark.quick_compiles

apply = jax.jit(randaugment.apply_operations, static_argnums=3)


def some_images(height, width, channels, batch=6):
    """Smooth shapes and noise, a dark, a bright, a constant and a two-valued one: as pictures are, and at the edges."""
    generator = np.random.default_rng(0)
    row, column = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(7 * row + k) * np.cos(5 * column - k) for k in range(channels)]
    smooth = 127 + 100 * np.stack(waves, -1) + generator.normal(0, 6, (batch, height, width, channels))
    images = np.clip(smooth, 0, 255).astype(np.uint8)
    images[1] = generator.integers(0, 256, images[1].shape)
    images[2] = images[2] // 3 + 7
    images[3] = 255 - images[3] // 5
    images[4] = 93
    images[5] = 40 * (images[5] > 127) + 100
    return images


def to_pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def pillow(image, name, sign, magnitude):
    """What torchvision makes Pillow do. Written from its documentation of the magnitudes."""
    width, height = image.size
    factor = float(np.float32(1 + sign * 0.03 * magnitude))
    moves = {
        "shear_x": (1, sign * 0.01 * magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * 0.01 * magnitude, 1, 0),
        "translate_x": (1, 0, -sign * int(150 / 331 * width * magnitude / 30), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -sign * int(150 / 331 * height * magnitude / 30)),
    }
    if name in moves:
        return image.transform(image.size, Image.Transform.AFFINE, moves[name], Image.Resampling.NEAREST)
    return {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(sign * magnitude, Image.Resampling.NEAREST),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "colour": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(magnitude / 7.5)),
        "solarize": lambda: ImageOps.solarize(image, 255 - 8.5 * magnitude),  # pyright: ignore[reportArgumentType]
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()


@functools.cache
def both(shape, magnitude):
    """{(operation, sign): (ours, Pillow's)} for `some_images(*shape)`."""
    images, found = some_images(*shape), {}
    for index, name in enumerate(OPERATIONS):
        for sign in (1, -1):
            codes, negative = np.full(len(images), index, np.int32), np.full(len(images), sign < 0)
            ours = np.asarray(apply(images, codes, negative, magnitude))
            theirs = [np.asarray(pillow(to_pillow(i), name, sign, magnitude)).reshape(i.shape) for i in images]
            found[name, sign] = ours, np.stack(theirs)
    return found


@pytest.mark.parametrize("shape", [(32, 28, 3), (20, 28, 1)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows_at_the_default_magnitude(name, shape):
    images = some_images(*shape)
    for sign in (1, -1):
        ours, theirs = both(shape, 9)[name, sign]
        assert ours.dtype == np.uint8
        if name == "autocontrast":
            # Pillow truncates value * (255 / span) - low * (255 / span) in double precision, which may fall just short
            # of an integer: one grey level, and only where the quotient is one.
            value, low, high = (a.astype(int) for a in (images, images.min((1, 2)), images.max((1, 2))))
            low, high = low[:, None, None], high[:, None, None]
            whole = (value - low) * 255 % np.maximum(high - low, 1) == 0
            assert np.array_equal(ours[~whole], theirs[~whole]) and np.all(np.abs(ours.astype(int) - theirs) <= 1)
        else:
            assert np.array_equal(ours, theirs)
        unchanged = name == "identity" or (name == "colour" and shape[2] == 1)
        assert np.array_equal(ours, images) == unchanged  # control: it does something


@pytest.mark.parametrize("magnitude", [20, 30])
def test_every_magnitude_is_pillows_within_a_grey_level(magnitude):
    for (name, sign), (ours, theirs) in both((32, 32, 3), magnitude).items():
        if name in (*randaugment.BLENDS, "autocontrast"):
            # Blends: Pillow adds in single precision and truncates; ours are floors of the exact hundredths.
            assert np.abs(ours.astype(int) - theirs).max() <= 1 and np.mean(ours != theirs) < 0.05, (name, sign)
        else:
            assert np.array_equal(ours, theirs), (name, sign)


def test_blends_are_exact_for_all_pairs_of_values_at_the_default_magnitude():
    values = np.arange(256, dtype=np.uint8)
    one, other = np.repeat(values[:, None], 256, 1), np.repeat(values[None], 256, 0)
    for sign in (1, -1):
        weight = 100 + sign * 27
        ours = np.clip((100 * one.astype(int) + weight * (other.astype(int) - one)) // 100, 0, 255)
        factor = float(np.float32(1 + sign * 0.27))
        assert np.array_equal(ours, Image.blend(Image.fromarray(one), Image.fromarray(other), factor))


def test_large_images_are_counted_in_parts():
    images = np.random.default_rng(1).integers(0, 256, (2, 96, 40, 3), dtype=np.uint8)
    counts = np.asarray(jax.jit(randaugment._histogram)(images.astype(np.int32)))
    assert randaugment._CHUNK < 96 * 40
    for image, found in zip(images, counts, strict=True):
        assert np.array_equal(found, [np.bincount(image[..., k].ravel(), minlength=256) for k in range(3)])


def test_half_of_the_images_get_two_operations_drawn_evenly(key, monkeypatch):
    calls = []

    def record(images, operations, negative, magnitude):
        calls.append((operations, negative, magnitude))
        return images

    monkeypatch.setattr(randaugment, "apply_operations", record)
    images = jnp.zeros((14_000, 1, 1, 3), jnp.uint8)
    drawn = jax.jit(lambda key: (randaugment.random_augment(key, images, probability=0.5), calls)[1])(key)
    (first, sign, magnitude), (second, other_sign, _) = jax.tree.map(np.asarray, drawn)
    assert magnitude == 9
    counts = np.bincount(first, minlength=14)
    # Binomials: 7000 images get none and are left to the identity, 500 get each; eight standard deviations.
    assert abs(counts[0] - 7500) < 8 * 60 and np.all(np.abs(counts[1:] - 500) < 8 * 22) and counts[1:].std() > 0
    treated = (first > 0) | (second > 0)
    assert abs(treated.mean() - 0.5 * (1 - 1 / 14**2)) < 8 * 0.0043
    assert abs(sign.mean() - 0.5) < 8 * 0.0043 and not np.array_equal(sign, other_sign)
    assert not np.array_equal(first[treated], second[treated])


def test_it_is_a_function_of_the_key_and_of_each_image_on_any_number_of_devices():
    images = np.tile(some_images(16, 12, 3), (8, 1, 1, 1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    view = jax.jit(functools.partial(randaugment.random_augment, probability=0.7, num_ops=2, magnitude=9))
    one = np.asarray(view(jax.random.key(1), images))
    sharded = jax.device_put(images, spread)
    assert np.array_equal(one, view(jax.random.key(1), sharded))
    assert not np.array_equal(one, view(jax.random.key(2), images))
    program = view.lower(jax.random.key(1), sharded).compile().as_text() or ""
    assert "fusion" in program and "all-gather" not in program and "all-to-all" not in program
    never = jax.jit(functools.partial(randaugment.random_augment, probability=0.0))
    assert np.array_equal(never(jax.random.key(1), images), images)


@pytest.mark.parametrize(("channels", "magnitude"), [(2, 9), (4, 9), (3, 31), (3, -1)])
def test_other_images_and_magnitudes_are_refused(key, channels, magnitude):
    images = jnp.zeros((1, 4, 4, channels), jnp.uint8)
    with pytest.raises(ValueError, match="a magnitude in 0 … 30"):
        randaugment.random_augment(key, images, probability=1.0, magnitude=magnitude)
