"""Operations of a traced function, counted from its jaxpr: what every image and every parameter costs before XLA."""

import collections
import math

import jax
import numpy as np
from jax.extend import core

from lipjax._precision import PRODUCTS

# How a product is computed: bfloat16 operands, or float32 ones (and wider) at one of JAX's three precisions. A complex
# product is four real ones.
# "tf32x3" and "bfloat16x6": of three and of six products of parts of float32 numbers (`_precision`), counted once.
KINDS = ("bfloat16", "default", "high", "tf32x3", "bfloat16x6", "highest")
_PRECISIONS = {jax.lax.Precision.HIGH: "high"} | {precision: name for name, precision in PRODUCTS.items()}
_PRECISIONS[jax.lax.Precision.HIGHEST] = "highest"


def kind_of(itemsize: int, precision) -> str:
    """One of KINDS for a product of real operands of at most `itemsize` bytes; precision: of JAX, for one or both."""
    pair = precision if isinstance(precision, tuple) else (precision,)
    found = {_PRECISIONS.get(p, "default") for p in pair}
    return "bfloat16" if itemsize <= 2 else max(found, key=KINDS.index)


def window_pairs(size, kernel, out, stride, low, base_dilation, dilation) -> int:
    """Pairs (output, tap) of one axis of a convolution at which the tap meets a pixel: neither padding nor a hole."""
    position = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * dilation - low
    inside = (position >= 0) & (position <= (size - 1) * base_dilation) & (position % base_dilation == 0)
    return int(inside.sum())


def count(jaxpr) -> tuple[dict[str, float], list[str]]:
    """Floating-point operations of a (closed) jaxpr: of products, convolutions, Fourier transforms and factorisations.

    What is elementwise is left out. Loops count as often as they run; of `cond` the dearest branch counts, and inside
    `shard_map` every device.
    Returns: (operations by kind: one of KINDS, a multiplication and an addition being two;
      what could not be counted: loops of unknown length, counted once, and factorisations without a formula here).
    """
    totals: dict[str, float] = collections.defaultdict(float)
    unknown: set[str] = set()
    _add(getattr(jaxpr, "jaxpr", jaxpr), 1, totals, unknown)
    return dict(totals), sorted(unknown)


def _add(jaxpr, times, totals, unknown) -> None:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _COUNTED:
            kind, operations = _COUNTED[name](equation)
            totals[kind] += times * operations
        elif name in _UNCOUNTED:
            unknown.add(name)
        elif name == "cond":
            branches = [count(branch) for branch in params["branches"]]
            dearest, _ = max(branches, key=lambda found: sum(found[0].values()))
            for kind, operations in dearest.items():
                totals[kind] += times * operations
            unknown.update(*(missing for _, missing in branches))
        elif name == "custom_linear_solve":
            _add(params["jaxprs"].solve.jaxpr, times, totals, unknown)
        else:
            repeats = times
            if name == "scan":
                repeats *= params["length"]
            elif name == "shard_map":
                shape = dict(params["mesh"].shape)
                repeats *= math.prod(shape[axis] for axis in params["newly_manual_axes"])
            elif name == "while":
                unknown.add("a loop of unknown length")
            for inner in _inner(params.values()):
                _add(inner, repeats, totals, unknown)


def _inner(values):
    for value in values:
        if isinstance(value, core.ClosedJaxpr):  # pyright: ignore[reportPrivateImportUsage]
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _of_product(arrays, precision, multiplications) -> tuple[str, float]:
    is_complex = any(np.issubdtype(a.dtype, np.complexfloating) for a in arrays)
    itemsize = max(a.dtype.itemsize for a in arrays)
    return kind_of(itemsize, precision), 2.0 * multiplications * (4 if is_complex else 1)


def _dot_general(equation):
    left, right = (v.aval for v in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(left.shape[axis] for axis in contracted)
    return _of_product((left, right), equation.params["precision"], inner * math.prod(equation.outvars[0].aval.shape))


def _conv_general_dilated(equation):
    params, (left, right), out = equation.params, [v.aval for v in equation.invars], equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    pairs = math.prod(
        window_pairs(
            left.shape[numbers.lhs_spec[axis + 2]],
            right.shape[numbers.rhs_spec[axis + 2]],
            out.shape[numbers.out_spec[axis + 2]],
            params["window_strides"][axis],
            params["padding"][axis][0],
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
        for axis in range(len(params["window_strides"]))
    )
    maps = out.shape[numbers.out_spec[0]] * out.shape[numbers.out_spec[1]] * right.shape[numbers.rhs_spec[1]]
    return _of_product((left, right), params["precision"], maps * pairs)


def _fft(equation):
    array, lengths = equation.invars[0].aval, equation.params["fft_lengths"]
    points = math.prod(lengths)
    # For real data the half. The transformed axes hold n points, or n // 2 + 1 on the side of the frequencies.
    real = equation.params["fft_type"] not in (jax.lax.FftType.FFT, jax.lax.FftType.IFFT)
    transforms = math.prod(array.shape[: array.ndim - len(lengths)])
    return "highest", transforms * 5 * points * math.log2(max(points, 2)) * (0.5 if real else 1)


def _factorisation(operations):
    def counted(equation):
        array, *others = [v.aval for v in equation.invars]
        factor = 4 if np.issubdtype(array.dtype, np.complexfloating) else 1
        return "highest", factor * math.prod(array.shape[:-2]) * operations(array.shape[-2:], *others)

    return counted


def _solve(shape, right, left_side: bool) -> float:
    columns = right.shape[-1] if left_side else right.shape[-2]
    return float(shape[-1] ** 2 * columns)


_COUNTED = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "fft": _fft,
    "cholesky": _factorisation(lambda shape: shape[-1] ** 3 / 3),
    "lu": _factorisation(lambda shape: shape[0] * shape[1] * min(shape) - min(shape) ** 3 / 3),
    "triangular_solve": lambda equation: _factorisation(
        lambda shape, right: _solve(shape, right, equation.params["left_side"])
    )(equation),
}
_UNCOUNTED = {"eigh", "eig", "svd", "geqrf", "householder_product", "qr", "schur"}
