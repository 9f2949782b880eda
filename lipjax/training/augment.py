"""Random views of a batch inside `jit`: crop, flip, affine. Functions of (key, batch), on any number of devices."""

import math

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, Float, Key, Shaped, UInt8


def augment(
    key: Key[Array, ""], images: UInt8[Array, "b h w c"], *, crop_padding: int, flip: bool
) -> UInt8[Array, "b h w c"]:
    """Random crops after zero padding of `crop_padding` pixels (0: none), then random flips."""
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        images = random_crop(crop_key, images, crop_padding)
    return random_flip(flip_key, images) if flip else images


def random_crop(key: Key[Array, ""], images: Shaped[Array, "b h w c"], padding: int) -> Shaped[Array, "b h w c"]:
    """Shifts each image by its own uniform offset in -padding … padding along both axes; what enters is 0."""
    if padding < 0:
        raise ValueError(f"Expected a padding of 0 pixels or more, got {padding}.")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    cut = jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:]))
    return cut(padded, offsets)


def random_flip(key: Key[Array, ""], images: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2."""
    mirror = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)


def to_pixels(images: UInt8[Array, "b h w c"], pixel_max: int) -> Float[Array, "b h w c"]:
    """float32 pixels in [0, 1]: images / pixel_max."""
    return images.astype(jnp.float32) / pixel_max


def random_affine(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    *,
    max_rotation: float = 0.0,
    max_scale: float = 0.0,
    max_shift: float = 0.0,
) -> Float[Array, "b h w c"]:
    """Rotates, scales and shifts each image about its centre, by bilinear interpolation; outside an image is 0.

    Values stay in the range of {0} and the image, so pixels stay in [0, 1].

    Args:
      max_rotation: degrees; each image turns by a uniform angle in ± max_rotation.
      max_scale: each image grows by a uniform factor in 1 ± max_scale, 0 <= max_scale < 1.
      max_shift: each image moves by uniform fractions ± max_shift of its height and width.
    """
    if not 0 <= max_scale < 1 or max_rotation < 0 or max_shift < 0:
        raise ValueError(
            "Expected max_rotation >= 0, 0 <= max_scale < 1 and max_shift >= 0, "
            f"got {max_rotation}, {max_scale} and {max_shift}."
        )
    batch, height, width, _ = images.shape
    size = jnp.array([height, width], images.dtype)
    draws = jax.random.uniform(key, (batch, 4), images.dtype, -1, 1)
    angles, scales = math.radians(max_rotation) * draws[:, 0], 1 + max_scale * draws[:, 1]
    shifts = max_shift * draws[:, 2:]
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1).astype(images.dtype)

    def transform(image, angle, scale, shift):
        # Where each pixel of the result comes from: the inverse of "scale and rotate about the centre, then shift".
        centre = (size - 1) / 2
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        inverse = jnp.array([[cos, sin], [-sin, cos]]) / scale
        source = jnp.einsum("ij,hwj->ihw", inverse, grid - (centre + shift * size)[None, None])
        rows, columns = source + centre[:, None, None]
        return jax.vmap(lambda channel: ndimage.map_coordinates(channel, [rows, columns], order=1), -1, -1)(image)

    return jax.vmap(transform)(images, angles, scales, shifts)
