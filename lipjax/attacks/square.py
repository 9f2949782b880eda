"""The Square attack for l2 balls: a random search that asks for logits alone, so that no masked gradient stops it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lipjax.attacks.pgd import PIXELS, Box, Keys, each, like, margin_of, move_inside, one_per_image

# After these of 10,000 queries the share of the pixels that a window covers is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_FULL = 10_000
_LEAST_SIDE = 3  # of windows, where the image is as large
_TILES = 5  # along a side of the first perturbation


def window_sides(num_queries: int, height: int, width: int, share: float = 0.1) -> np.ndarray:
    """The side of the windows in each query, (num_queries,) int: the root of `share` of the pixels, later of less.

    The share is halved after 0.1, 0.5, 2, 5, 10, 20, 40, 60 and 80 % of the queries. A side is at least 3 pixels and
    at most that of the image.
    """
    marks = np.array(_HALVINGS) * num_queries / _FULL
    shares = share / 2.0 ** (np.arange(num_queries)[:, None] > marks).sum(axis=1)
    sides = np.round(np.sqrt(shares * height * width)).astype(np.int32)
    return np.clip(sides, min(_LEAST_SIDE, height, width), min(height, width))


def _hill(rows: int, columns: int) -> np.ndarray:
    """eta^(rows, columns) of eq. 2, rows >= columns: concentric steps, highest in the middle."""
    n = rows // 2
    r, s = np.arange(1, rows + 1)[:, None], np.arange(1, columns + 1)[None]
    ring = n - np.maximum(np.abs(r - n - 1), np.abs(s - columns // 2 - 1))
    # sum_{k=0}^{ring} 1 / (n + 1 - k)^2
    return np.cumsum(1.0 / np.arange(n + 1, 0, -1) ** 2)[ring]


def hills(side: int) -> np.ndarray:
    """The perturbation of a window, (side, side), of l2 norm 1: a hill in its first columns, a valley in the others."""
    half = side // 2
    pattern = np.concatenate([_hill(side, half), -_hill(side, side - half)], axis=1)
    return pattern / np.linalg.norm(pattern)


def _tiles(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The first perturbation without its signs, (height, width), and the tile that each pixel belongs to (-1: none)."""
    side = max(min(height, width) // _TILES, 1)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    inner = slice(top, top + rows * side), slice(left, left + columns * side)
    pattern, tile = np.zeros((height, width)), np.full((height, width), -1)
    pattern[inner] = np.tile(hills(side), (rows, columns))
    tile[inner] = np.kron(np.arange(rows * columns).reshape(rows, columns), np.ones((side, side), int))
    return pattern, tile


def _length(x, axes=(1, 2)):
    return jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))


def _safe(x):
    """A divisor that is never 0; what is divided by it is then 0 itself."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def move_mass(
    delta: Float[Array, "b h w c"],
    pattern: Float[Array, "b h w"],
    first: Float[Array, "b h w"],
    second: Float[Array, "b h w"],
    signs: Float[Array, "b c"],
    epsilon: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """A proposal of l2 norm epsilon or less: what a second window held of the budget goes into a first one.

    Args: delta: the perturbation so far. pattern: of l2 norm 1, zero outside of the first window. first, second: 1
      inside of the windows, 0 elsewhere. signs: of the pattern, for each channel.
    Source: Andriushchenko et al. 2020, arXiv:1912.00049, Algorithm 3.
    """
    pattern, first, second = (a[..., None] for a in (pattern, first, second))
    epsilon, channels = epsilon[:, None, None, None], delta.shape[3]
    unused = jnp.maximum(epsilon**2 - jnp.sum(delta**2, axis=(1, 2, 3), keepdims=True), 0.0) / channels
    inside = delta * first
    shape = signs[:, None, None] * pattern + inside / _safe(_length(inside))
    both = jnp.maximum(first, second)
    available = jnp.sqrt(_length(delta * both) ** 2 + unused)
    return delta * (1 - both) + shape / _safe(_length(shape)) * available


def square_l2(
    logits: Callable,
    images: Float[Array, "b ..."],
    labels: Int[Array, " b"],
    epsilon,
    key: Keys,
    *,
    num_queries: int,
    share: float = 0.1,
    box: Box = PIXELS,
) -> Float[Array, "b ..."]:
    """Random search for a larger margin: each query moves perturbation from one square window into another.

    The search ends early where every image has another class.

    Args:
      logits: function of images; it need not be differentiable. images: inside the box. labels: (b,), the classes to
        move away from.
      epsilon: l2 radius, pixel units: a number, or (b,), one per image.
      key: one for all images, or (b,), one per image.
      num_queries: how often logits are asked for, at least 1. share: of the pixels that the first windows cover.
      box: lowest and highest pixel; None: pixels may take any value.
    Returns: images of the same shape within epsilon of the originals, of the largest margin that was found; constant
      under differentiation.
    Raises: ValueError for images that are not (b, h, w, c), and without a query.
    Source: Andriushchenko et al. 2020, arXiv:1912.00049, Algorithms 1 and 3.
    """
    if images.ndim != 4 or num_queries < 1:
        raise ValueError(f"Expected images (b, h, w, c) and at least one query, got {images.shape} and {num_queries}.")
    count, height, width, channels = images.shape
    dtype, epsilon = images.dtype, jnp.broadcast_to(jnp.asarray(epsilon, images.dtype), images.shape[:1])
    inside = move_inside(images, like(epsilon, images), box)
    key = key if one_per_image(key) else jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))

    pattern, tile = _tiles(height, width)
    signs = each(key, lambda k: jax.random.rademacher(k, (tile.max() + 1, channels), dtype))
    start = jnp.asarray(pattern, dtype)[..., None] * jnp.where(tile[..., None] >= 0, signs[:, tile], 0)
    points = inside(images + start / _safe(_length(start, (1, 2, 3))) * like(epsilon, images))

    sides = window_sides(num_queries, height, width, share)
    sizes = np.unique(sides)
    patterns = np.zeros((len(sizes), sizes.max(), sizes.max()))
    for place, side in enumerate(sizes):
        patterns[place, :side, :side] = hills(int(side))
    patterns = jnp.asarray(patterns, dtype)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]

    def window(numbers, side):
        """A window of this side in one image: the place of its corner, and an array that is 1 inside of it."""
        top = jnp.minimum(numbers[0] * (height - side + 1), height - side).astype(jnp.int32)
        left = jnp.minimum(numbers[1] * (width - side + 1), width - side).astype(jnp.int32)
        within = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        return top, left, within.astype(dtype)

    def draw(key, query):
        side, place = jnp.asarray(sides)[query], jnp.searchsorted(jnp.asarray(sizes), jnp.asarray(sides)[query])
        numbers = jax.random.uniform(jax.random.fold_in(key, query), (5 + channels,), dtype)
        top, left, first = window(numbers[:2], side)
        _, _, second = window(numbers[2:4], side)
        down, right = jnp.clip(rows - top, 0, side - 1), jnp.clip(columns - left, 0, side - 1)
        turned = numbers[4] < 0.5
        shape = patterns[place, jnp.where(turned, right, down), jnp.where(turned, down, right)] * first
        return shape, first, second, jnp.where(numbers[5:] < 0.5, -1.0, 1.0).astype(dtype)

    def query(state):
        number, points, margin = state
        proposed = move_mass(points - images, *jax.vmap(draw, (0, None))(key, number), epsilon)
        moved = inside(images + proposed)
        found = margin_of(logits(moved), labels)
        better = found > margin
        return number + 1, jnp.where(like(better, images), moved, points), jnp.where(better, found, margin)

    state = jnp.int32(1), points, margin_of(logits(points), labels)
    state = jax.lax.while_loop(lambda s: (s[0] < num_queries) & jnp.any(s[2] <= 0), query, state)
    return jax.lax.stop_gradient(state[1])


__all__ = ["hills", "move_mass", "square_l2", "window_sides"]
