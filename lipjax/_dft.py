"""The discrete Fourier transform of real images as products with matrices whose entries have a stated error.

An h x w image has h w real coefficients, in an orthonormal basis of real sinusoids. The frequencies f with 2 f = 0
modulo (h, w), the `fixed` ones, are real: r = 1, 2 or 4 of them. Of the others one of each pair +-f is kept, the
`paired` ones, q = (h w - r) / 2 of them, as real and imaginary part. Nothing is redundant and nothing is complex: a
spectrum is an array (h w, b, c), first the fixed rows, then (real, imaginary) for every paired frequency.

Matrix products rather than an FFT: their rounding error can be bounded (docs/soundness.md, section 4b), and up to
32 x 32 images with channels last they are also several times faster than FFTs and the transposes around them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Complex, Float

Size = tuple[int, ...]  # (h, w)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
_HALF, _QUARTER = Fraction(1, 2), Fraction(1, 4)
_DIGITS = Context(prec=50)  # whatever the caller's rounding, traps and limits
# Up to this many pixels the transform is one product with the whole matrix.
DENSE = 64
# Up to this many entries the second product is a batch of matrices, the same one for most columns.
_STACKED = 2**19


def _taylor(r: Fraction, cosine: bool) -> Decimal:
    """cos(pi r) or sin(pi r) for 0 <= r <= 1/4, within 1e-40."""
    with localcontext(_DIGITS):
        x = _PI * r.numerator / r.denominator
        term = Decimal(1) if cosine else x
        total, k = term, 0 if cosine else 1
        while abs(term) > Decimal("1e-48"):
            term = -term * x * x / ((k + 1) * (k + 2))
            total, k = total + term, k + 2
        return total


def _cos_pi(r: Fraction) -> Decimal:
    """cos(pi r) within 1e-40, exact at multiples of 1/2."""
    r = abs(r) % 2
    r = 2 - r if r > 1 else r
    if r > _HALF:
        return _cos_pi(1 - r).copy_negate()  # a minus sign would round as the caller's context says
    return _taylor(_HALF - r, cosine=False) if r > _QUARTER else _taylor(r, cosine=True)


def _read_only(table: np.ndarray) -> np.ndarray:
    table.setflags(write=False)
    return table


@functools.lru_cache(maxsize=64)
def twiddles(n: int) -> tuple[np.ndarray, np.ndarray]:
    """cos(pi a / n) and sin(pi a / n) for a = 0, ..., 2 n - 1, each within 2^-53."""
    angles = [Fraction(a, n) for a in range(2 * n)]
    cosines = np.array([float(_cos_pi(r)) for r in angles])
    return _read_only(cosines), _read_only(np.array([float(_cos_pi(r - _HALF)) for r in angles]))


def _scaled_circle(n: int, numerator: int, denominator: int) -> tuple[np.ndarray, np.ndarray]:
    """s cos(2 pi a / n) and s sin(2 pi a / n), a = 0, ..., n - 1, s the root of the fraction; each correctly rounded.

    Up to 1e-38, that is: all but the exact zeros have a relative error of at most 2^-53 (1 + 1e-20).
    """
    with localcontext(_DIGITS):
        scale = (Decimal(numerator) / denominator).sqrt()
        angles = [Fraction(2 * a, n) for a in range(n)]
        return (
            np.array([float(scale * _cos_pi(r)) for r in angles]),
            np.array([float(scale * _cos_pi(r - _HALF)) for r in angles]),
        )


def _self_conjugate(n: int) -> list[int]:
    return [0] if n % 2 else [0, n // 2]


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The frequencies (f1, f2) of h x w images, in the order of a spectrum's rows.

    Attributes:
      size: (h, w).
      fixed: (r, 2), those equal to their own negative.
      paired: (q, 2), one of each pair of others, 0 <= f1 < h and 0 <= f2 <= w // 2: first those of the columns f2 = 0
        and w / 2 (if w is even), which hold their own mirror image; then the others, column by column.
      num_mirrored: how many of `paired` lie in the former.
    """

    size: Size
    fixed: np.ndarray
    paired: np.ndarray
    num_mirrored: int


@functools.lru_cache(maxsize=256)
def grid(size: Size) -> Grid:
    """The frequencies of images of a size (h, w)."""
    h, w = size
    columns = _self_conjugate(w)
    fixed = [(f1, f2) for f2 in columns for f1 in _self_conjugate(h)]
    mirrored = [(f1, f2) for f2 in columns for f1 in range(1, (h + 1) // 2)]
    others = [(f1, f2) for f2 in range(1, (w + 1) // 2) for f1 in range(h)]
    paired = np.array(mirrored + others, int).reshape(-1, 2)
    return Grid((h, w), _read_only(np.array(fixed)), _read_only(paired), len(mirrored))


def _dense_matrix(size: Size) -> np.ndarray:
    """All rows of the transform: (h w, h w)."""
    (h, w), frequencies = size, grid(size)
    p, q = np.divmod(np.arange(h * w), w)
    angles = [
        (np.outer(f[:, 0] * w, p) + np.outer(f[:, 1] * h, q)) % (h * w) for f in (frequencies.fixed, frequencies.paired)
    ]
    (real, _), (cosines, sines) = (_scaled_circle(h * w, s, h * w) for s in (1, 2))
    pairs = np.stack([cosines[angles[1]], -sines[angles[1]]], 1).reshape(-1, h * w)
    return np.concatenate([real[angles[0]], pairs])


def _column_matrices(h: int, num_special: int) -> tuple[np.ndarray, np.ndarray]:
    """The transform down the columns, for the special ones (f2 = 0 and w / 2, all real) and for each other column.

    The rows of the first are fixed, then pairs; those of the second (f1, part), its columns (part, pixel).
    """
    line, r, eye = _dense_matrix((h, 1)), len(_self_conjugate(h)), np.eye(num_special)
    special = np.concatenate([np.kron(eye, line[:r]), np.kron(eye, line[r:])])
    cosines, sines = _scaled_circle(h, 1, h)
    angles = np.outer(np.arange(h), np.arange(h)) % h
    c, s = cosines[angles], sines[angles]
    other = np.stack([np.stack([c, s], 1), np.stack([-s, c], 1)], 1)  # (c + i s)^* times (real + i imaginary)
    return special, other.reshape(2 * h, 2 * h)


@functools.lru_cache(maxsize=64)
def _tables(size: Size) -> tuple[np.ndarray, ...]:
    """The factors of the transform: (all,) for small images, (rows, columns), or (rows, special and other columns).

    Every one is, exactly, an orthogonal matrix (or a stack of them) with each entry rounded once.
    """
    h, w = size
    if h * w <= DENSE:
        return (_read_only(_dense_matrix(size)),)
    rows = _dense_matrix((1, w))
    special, other = _column_matrices(h, len(_self_conjugate(w)))
    if special.shape != other.shape or w // 2 * other.size > _STACKED:
        return tuple(map(_read_only, (rows, special, other)))
    repeated = np.broadcast_to(other, (w // 2 - 1, *other.shape))
    return _read_only(rows), _read_only(np.concatenate([special[None], repeated]))


def factors(size: Size) -> tuple[np.ndarray, ...]:
    """The tables that `steps` multiplies by, for programs in other languages: one, or that of rows and of columns."""
    return _tables(size)


def transform_error(size: Size) -> float:
    """e such that `spectrum` and `image` in float64 err by at most e |input|_2, but for underflow."""
    h, w = size
    total = 0.0
    for side in (h * w,) if h * w <= DENSE else (w, 2 * h):
        # |computed - P z| <= gamma_(K+2) |P||z|, the rounding of P included, and | |P| |_2 <= |P|_F = sqrt(K).
        error = (side + 3) * 2.0**-53 * math.sqrt(side)
        total += error + total * error
    return total * (1 + 2.0**-40)


def whole(z: Array) -> Array:
    """z, as a result that compilers compute before they take parts of it.

    XLA's GPU compiler (JAX 0.10.2) fuses a product, the slice of its rows and their reshape to matrices into the next
    product, and then stops with "Couldn't find output tile sizes".
    """
    return lax.optimization_barrier(z)


# Below, no reshape merges the batch with an axis before it: sharded over devices, it would have to be gathered.


def _product(table: np.ndarray, z: Array, precision: Any) -> Array:
    """table @ z along the first axis of z; for a stack of tables, each along the second axis of one entry of z."""
    stacked = table.ndim - 2
    dimensions = (((1 + stacked,), (stacked,)), (tuple(range(stacked)), tuple(range(stacked))))
    return lax.dot_general(jnp.asarray(table, z.dtype), z, dimensions, precision=precision)


def _down_columns(tables: tuple[np.ndarray, ...], z: Float[Array, "w h b c"], precision: Any) -> Array:
    """The second product: (w, h, b, c) -> the same shape, rows (special columns; column, frequency and part)."""
    w, h, b, c = z.shape
    if len(tables) == 1:
        return _product(tables[0], z.reshape(w // 2, 2 * h, b, c), precision).reshape(w, h, b, c)
    s = len(_self_conjugate(w))
    special = _product(tables[0], z[:s].reshape(s * h, b, c), precision)
    others = z[s:].reshape((w - s) // 2, 2 * h, b, c).swapaxes(0, 1)
    others = _product(tables[1], others, precision).swapaxes(0, 1)
    return jnp.concatenate([special.reshape(s, h, b, c), others.reshape(w - s, h, b, c)])


def steps(size: Size, inverse: bool = False, absolute: bool = False) -> list[tuple[int, Callable[..., Array]]]:
    """The products that `spectrum`, or with `inverse` `image`, consists of: one up to `DENSE` pixels, then two.

    Every one is exactly orthogonal but for the rounding of its table. All results have the batch as last axis but one,
    except images, which have it first.

    Args: absolute: with the tables' absolute values instead, for bounds of sums of products.
    Returns: the number of terms of each sum at most, and a function (array, precision) -> array.
    """
    (h, w), tables = size, _tables(size)
    tables = tuple(map(np.abs, tables)) if absolute else tables
    if inverse:
        first, *rest = (table.swapaxes(-1, -2) for table in tables)
        if not rest:
            return [(h * w, lambda z, p: _product(first, z, p).reshape(h, w, *z.shape[1:]).transpose(2, 0, 1, 3))]
        columns = 2 * h, lambda z, p: _down_columns(tuple(rest), z.reshape(w, h, *z.shape[1:]), p)
        return [columns, (w, lambda z, p: _product(first, z, p).transpose(2, 1, 0, 3))]
    first, *rest = tables
    if not rest:
        return [
            (h * w, lambda x, p: _product(first, x.transpose(1, 2, 0, 3).reshape(h * w, x.shape[0], x.shape[3]), p))
        ]
    rows = w, lambda x, p: _product(first, x.transpose(2, 1, 0, 3), p)
    return [rows, (2 * h, lambda z, p: _down_columns(tuple(rest), z, p).reshape(h * w, *z.shape[2:]))]


# Each is the other's adjoint. JAX's own transpose of a product with a table puts the pixels last, which copies whole
# images twice. A primitive because JAX has no other linear function with a transpose of its own that can also be mapped
# over (`jax.custom_derivatives.linear_call` cannot).
_transform_p = Primitive("lipjax_dft")


def _transform(x: Array, *, size: Size, inverse: bool, precision: Any) -> Array:
    for _, step in steps(size, inverse):
        x = step(x, precision)
    return x if inverse else whole(x)


def _transform_shape(x: Any, *, size: Size, inverse: bool, precision: Any) -> Any:
    (h, w), b, c = size, x.shape[0 if not inverse else 1], x.shape[-1]
    return ShapedArray((b, h, w, c) if inverse else (h * w, b, c), x.dtype)


def _transform_mapped(arrays: Any, axes: Any, **kwargs: Any) -> Any:
    # What is mapped over becomes channels.
    x = jnp.moveaxis(arrays[0], axes[0], -1)
    y = _transform_p.bind(x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]), **kwargs)
    return y.reshape(*y.shape[:-1], *x.shape[-2:]), y.ndim


_transform_p.def_impl(_transform)
_transform_p.def_abstract_eval(_transform_shape)
mlir.register_lowering(_transform_p, mlir.lower_fun(_transform, multiple_results=False))
ad.deflinear2(_transform_p, lambda g, _, inverse, **kwargs: [_transform_p.bind(g, inverse=not inverse, **kwargs)])
batching.primitive_batchers[_transform_p] = _transform_mapped


def spectrum(x: Float[Array, "b h w c"], precision: lax.Precision | None = None) -> Float[Array, "n b c"]:
    """The coefficients of real images, n = h w, rows as in the module's docstring: of the same norm."""
    return _transform_p.bind(x, size=x.shape[1:3], inverse=False, precision=precision)


def image(z: Float[Array, "n b c"], size: Size, precision: lax.Precision | None = None) -> Float[Array, "b h w c"]:
    """The inverse, and adjoint, of `spectrum`."""
    return _transform_p.bind(z, size=tuple(size), inverse=True, precision=precision)


def apply_blocks(
    z: Float[Array, "n b i"],
    fixed: Float[Array, "r o i"],
    paired: Float[Array, "q 2 o i"],
    precision: lax.Precision | None = None,
) -> Float[Array, "n b o"]:
    """Multiplies every coefficient of a spectrum by its block.

    Args: fixed, paired: one real block for each fixed frequency, (real, imaginary) for each paired one.
    """
    (r, o, i), (_, b, _), q = fixed.shape, z.shape, len(paired)
    # Splits rather than slices: their transposes, in the backward pass, are concatenations without padding.
    real, both = lax.split(z, (r, 2 * q))
    y = lax.dot_general(real, fixed, (((2,), (2,)), ((0,), (0,))), precision=precision)
    if not q:
        return y
    both = both.reshape(q, 2, b, i)
    if 2 * i <= o:
        # Few channels in: [z, i z] times [R I], so that the larger results are written once, and by the product.
        re, im = lax.split(both, (1, 1), axis=1)
        both = jnp.concatenate([jnp.concatenate([re, -im], 3), jnp.concatenate([im, re], 3)], 1)
        table = jnp.concatenate(lax.split(paired, (1, 1), axis=1), 3).reshape(q, o, 2 * i)
        both = lax.dot_general(both, table, (((3,), (2,)), ((0,), (0,))), precision=precision)
        return jnp.concatenate([y, both.reshape(2 * q, b, o)])
    # One real product of (2 b x i) with (i x 2 o): all four of the real and imaginary parts, (q, 2, b, 2 o).
    table = paired.reshape(q, 2 * o, i)
    parts = lax.dot_general(both, table, (((3,), (2,)), ((0,), (0,))), precision=precision)
    of_real, of_imaginary = lax.split(parts, (1, 1), axis=1)
    (rr, ri), (ir, ii) = (lax.split(part, (o, o), axis=3) for part in (of_real, of_imaginary))
    both = jnp.concatenate([rr - ii, ri + ir], 1)
    return jnp.concatenate([y, both.reshape(2 * q, b, o)])


def adjoint_blocks(fixed: Float[Array, "r o i"], paired: Float[Array, "q 2 o i"]) -> tuple[Array, Array]:
    """The conjugate transposes of all blocks."""
    real, imaginary = paired[:, 0].swapaxes(1, 2), paired[:, 1].swapaxes(1, 2)
    return fixed.swapaxes(1, 2), jnp.stack([real, -imaginary], 1)


def tap_phases(kernel_size: tuple[int, ...], size: Size, frequencies: np.ndarray) -> np.ndarray:
    """exp(2 pi i f (t - lo) / n) for frequencies (m, 2) and all taps, lo = (k - 1) // 2: complex128, (m, kh kw)."""
    factors = []
    for axis in range(2):
        n, k = size[axis], kernel_size[axis]
        cosines, sines = twiddles(n)
        angles = 2 * np.outer(frequencies[:, axis], np.arange(k) - (k - 1) // 2) % (2 * n)
        factors.append(cosines[angles] + 1j * sines[angles])
    return (factors[0][:, :, None] * factors[1][:, None, :]).reshape(len(frequencies), kernel_size[0] * kernel_size[1])


@functools.lru_cache(maxsize=64)
def packed_tap_phases(kernel_size: tuple[int, ...], size: Size) -> np.ndarray:
    """`tap_phases` as real rows in the order of a spectrum: (h w, kh kw)."""
    frequencies = grid(size)
    fixed, paired = (tap_phases(kernel_size, size, f) for f in (frequencies.fixed, frequencies.paired))
    rows = np.stack([np.real(paired), np.imag(paired)], 1).reshape(-1, fixed.shape[1])
    return _read_only(np.concatenate([np.real(fixed), rows]))


def pack(response: Complex[Any, "h f o i"], size: Size) -> tuple[Any, Any]:
    """The blocks (fixed, paired) of a response on the half grid of `numpy.fft.rfft2`, (h, w // 2 + 1, o, i).

    In the columns that are their own mirror image it takes the Hermitian part (R[j] + conj R[-j]) / 2, which is all
    that the exact inverse transform to real images uses. NumPy arrays give NumPy arrays.
    """
    xp: Any = np if isinstance(response, np.ndarray) else jnp
    (h, w), g, k = size, grid(size), grid(size).num_mirrored

    def at(f: np.ndarray) -> Any:
        return response[f[:, 0], f[:, 1]]

    here = at(g.paired)
    mirror = at(-g.paired[:k] % np.array([h, w])).conj()
    blocks = xp.concatenate([(here[:k] + mirror) / 2, here[k:]])
    return at(g.fixed).real, xp.stack([blocks.real, blocks.imag], 1)


def unpack(fixed: Any, paired: Any, size: Size) -> Any:
    """The response, (h, w // 2 + 1, o, i), complex, of the blocks: `pack` gives them back."""
    numpy = isinstance(paired, np.ndarray)
    g, (h, w) = grid(size), size
    mirrored = paired[: g.num_mirrored]
    real = [fixed, paired[:, 0], mirrored[:, 0]]
    imaginary = [0 * fixed, paired[:, 1], -mirrored[:, 1]]
    places = np.concatenate([g.fixed, g.paired, -g.paired[: g.num_mirrored] % np.array([h, w])])
    order = np.lexsort((places[:, 1], places[:, 0]))
    if numpy:
        values = np.concatenate(real) + 1j * np.concatenate(imaginary)
    else:
        values = lax.complex(jnp.concatenate(real), jnp.concatenate(imaginary))
    return values[order].reshape(h, w // 2 + 1, *fixed.shape[1:])
