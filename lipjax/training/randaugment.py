"""RandAugment inside `jit`: random operations of one magnitude for each image, in integers, with the pixels of Pillow.

Source: Cubuk et al. 2019, arXiv:1909.13719. Operations, magnitudes and defaults are torchvision's, for Pillow images:
31 magnitudes, the nearest pixel, black where nothing was. They agree with Pillow in every pixel, but for single ones
of "autocontrast" and, at other magnitudes than the default 9, of the blends, by one grey level: Pillow rounds in
floating point and then truncates, here quotients are exact.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, UInt8

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("brightness", "colour", "contrast", "sharpness")
OPERATIONS = ("identity", *MOVES, *BLENDS, "posterize", "solarize", "autocontrast", "equalize")
MAX_MAGNITUDE = 30
CHANNELS = (1, 3)
# Pixels of an image that are counted at once: bounds the memory of the one-hot matrices.
_CHUNK = 1024


def random_augment(
    key: Key[Array, ""], images: UInt8[Array, "b h w c"], *, probability: float, num_ops: int = 2, magnitude: int = 9
) -> UInt8[Array, "b h w c"]:
    """To each image, with the given probability, `num_ops` operations drawn with replacement from all 14.

    Those that have a direction go either way with probability 1/2.

    Args:
      images: values 0 … 255, one channel or RGB.
      magnitude: 0 … 30, of every operation that has one.
    Raises: ValueError for another number of channels or another magnitude.
    """
    apply_key, operation_key, sign_key = jax.random.split(key, 3)
    batch = len(images)
    applies = jax.random.bernoulli(apply_key, probability, (batch,))
    drawn = jax.random.randint(operation_key, (batch, num_ops), 0, len(OPERATIONS), jnp.int32)
    negative = jax.random.bernoulli(sign_key, shape=(batch, num_ops))
    for n in range(num_ops):
        chosen = jnp.where(applies, drawn[:, n], OPERATIONS.index("identity"))
        images = apply_operations(images, chosen, negative[:, n], magnitude)
    return images


def apply_operations(
    images: UInt8[Array, "b h w c"], operations: Int[Array, "b"], negative: Bool[Array, "b"], magnitude: int
) -> UInt8[Array, "b h w c"]:
    """The operation `OPERATIONS[operations[i]]` on image i; negative: in the other direction, if it has one.

    All operations are computed for all images and one is chosen: none waits for another, on any device.

    Raises: as `random_augment`.
    """
    if images.shape[3] not in CHANNELS or not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(
            f"Expected images of {CHANNELS} channels and a magnitude in 0 … {MAX_MAGNITUDE}, "
            f"got {images.shape[3]} channels and magnitude {magnitude}."
        )
    x = images.astype(jnp.int32)
    kept_bits = 8 - round(magnitude / 7.5)
    table = jnp.asarray(_coefficients(images.shape[1], images.shape[2], magnitude))
    coefficients = table[operations, negative.astype(jnp.int32)]

    def where(names, value, otherwise):
        chosen = jnp.isin(operations, jnp.array([OPERATIONS.index(name) for name in names], jnp.int32))
        return jnp.where(chosen[:, None, None, None], value, otherwise)

    weight = 100 + 3 * magnitude * (1 - 2 * negative.astype(jnp.int32))
    result = jax.vmap(_move)(x, coefficients)
    result = where(BLENDS, _blend(x, where, weight[:, None, None, None]), result)
    result = where(("posterize",), x & ~(2 ** (8 - kept_bits) - 1), result)
    result = where(("solarize",), jnp.where(2 * x < 510 - 17 * magnitude, x, 255 - x), result)
    result = where(("autocontrast",), _autocontrast(x), result)
    return where(("equalize",), _equalize(x), result).astype(jnp.uint8)


def _coefficients(height: int, width: int, magnitude: int) -> np.ndarray:
    """int32 (operation, direction, 6): a … f of x' = a x + b y + c, y' = d x + e y + f, in 65536ths of a pixel.

    (x', y') is the place in the image of which the pixel (x, y) of the result is a copy. Rounded as Pillow does.
    """
    table = np.empty((len(OPERATIONS), 2, 6), np.int32)
    for direction, sign in enumerate((1, -1)):
        shear = sign * 0.01 * magnitude
        shift_x, shift_y = (sign * int(150 / 331 * size * magnitude / 30) for size in (width, height))
        angle = -math.radians(sign * magnitude % 360)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        centre_x, centre_y = width / 2, height / 2
        matrices = {
            "shear_x": (1, shear, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, shear, 1, 0),
            "translate_x": (1, 0, -shift_x, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, -shift_y),
            "rotate": (
                *(cos, sin, centre_x - cos * centre_x - sin * centre_y),
                *(-sin, cos, centre_y + sin * centre_x - cos * centre_y),
            ),
        }
        for index, name in enumerate(OPERATIONS):
            a, b, c, d, e, f = matrices.get(name, (1, 0, 0, 0, 1, 0))
            entries = (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)  # from the centres of the pixels
            table[index, direction] = [math.floor(65536 * entry + 0.5) for entry in entries]
    return table


def _move(x: Int[Array, "h w c"], coefficients: Int[Array, "6"]) -> Int[Array, "h w c"]:
    height, width, channels = x.shape
    a, b, c, d, e, f = coefficients
    row, column = jnp.mgrid[:height, :width].astype(jnp.int32)
    from_x, from_y = (a * column + b * row + c) >> 16, (d * column + e * row + f) >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    source = jnp.where(inside, from_y * width + from_x, 0)
    return jnp.where(inside[..., None], x.reshape(-1, channels)[source], 0)


def _blend(x, where, weight):
    """The blends: away from (weight > 100, a percentage) or towards what lacks colour, contrast, detail or light."""
    grey = x if x.shape[3] == 1 else (19595 * x[..., :1] + 38470 * x[..., 1:2] + 7471 * x[..., 2:] + 32768) >> 16
    count = x.shape[1] * x.shape[2]
    mean = (2 * grey.sum((1, 2, 3), keepdims=True, dtype=jnp.int32) + count) // (2 * count)
    lacking = where(("colour",), grey, where(("contrast",), mean, where(("sharpness",), _smooth(x), 0)))
    return jnp.clip((100 * lacking + weight * (x - lacking)) // 100, 0, 255)


def _smooth(x):
    """Means over 3 x 3 pixels, the middle one with weight 5; the border stays."""
    height, width = x.shape[1:3]
    if height < 3 or width < 3:
        return x
    total = 4 * x[:, 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total = total + x[:, row : row + height - 2, column : column + width - 2]
    return x.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)


def _autocontrast(x):
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    return jnp.where(high > low, (x - low) * 255 // jnp.maximum(high - low, 1), x)


def _equalize(x):
    counts = _histogram(x)
    last = jnp.sum(x == x.max((1, 2), keepdims=True), (1, 2), dtype=jnp.int32)
    step = ((x.shape[1] * x.shape[2] - last) // 255)[..., None]
    before = jnp.cumsum(counts, 2, dtype=jnp.int32) - counts
    table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    table = jnp.where(step > 0, table, jnp.arange(256, dtype=jnp.int32))
    look_up = jax.vmap(jax.vmap(lambda entries, channel: entries[channel], (0, -1), -1))
    return look_up(table, x)


def _histogram(x: Int[Array, "b h w c"]) -> Int[Array, "b c 256"]:
    """The number of times that each value occurs in each channel of each image.

    By products of one-hot matrices of the upper and the lower four bits, which are exact at any precision and fast
    where additions to random places are not.
    """
    batch, height, width, channels = x.shape
    rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * width <= _CHUNK))
    chunks = jnp.moveaxis(x.reshape(batch, height // rows, rows * width, channels), 1, 0)

    def add(total, chunk):
        upper, lower = (jax.nn.one_hot(bits, 16, dtype=jnp.float32) for bits in (chunk >> 4, chunk & 15))
        found = jnp.einsum("bpci,bpcj->bcij", upper, lower, preferred_element_type=jnp.float32)
        return total + found.astype(jnp.int32), None

    total, _ = jax.lax.scan(add, jnp.zeros((batch, channels, 16, 16), jnp.int32), chunks)
    return total.reshape(batch, channels, 256)
