"""Layers by name: one skeleton of a network takes any convolution, with what goes with it, as `config.model.layer`.

A further layer is one entry of `LAYERS`: its module, and the fields that it brings to config.model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from lipjax.nn.cholesky import CholeskyDense
from lipjax.nn.explicit import AOC, BCOP, RKO, OrthoHead, OrthoLinear
from lipjax.nn.group_shuffle import GroupAndShuffle
from lipjax.nn.layers import ELEMENTWISE, Conv, Dense
from lipjax.nn.orthogonal import ACTIVATIONS, SOC, Cayley, CayleyHead, SOCHead
from lipjax.nn.potential import (
    CPLConv,
    CPLDense,
    SandwichConv,
    SandwichConvSpatial,
    SandwichDense,
    SandwichHead,
    SLLConv,
    SLLDense,
)
from lipjax.nn.responses import BROConv, BRODense, LOTConv
from lipjax.nn.scaled import AOLConv, AOLDense
from lipjax.parametrize import aol, bjorck, cpl, lot
from lipjax.parametrize.soc_forms import FORMS

ALL_ACTIVATIONS: dict[str, Callable] = {**ACTIVATIONS, **ELEMENTWISE}
"""Activations by name, those that mix channels and those that do not: in_shape -> operator."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field that a layer brings to config.model: an argument of its modules.

    Attributes: default: its type is that of all values. comment: what it is, for docs/config.md. known: the values that
      there are; (): all of its type. optional: the type of what may be None as well.
    """

    default: Any
    comment: str
    known: tuple = ()
    optional: type | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises: ValueError for a value of another type, or an unknown one."""
        if self.known and value not in self.known:
            raise ValueError(f"expected {name} to be one of {self.known}, got {value!r}.")
        kind = self.optional or type(self.default)
        numbers = (int, float) if kind is float else (kind,)
        if type(value) not in numbers and not (self.optional and value is None):
            raise ValueError(f"expected {name} to be {'a number' if kind is float else kind.__name__}, got {value!r}.")
        if kind is int and value is not None and value < 1:
            raise ValueError(f"expected {name} >= 1{' or None' if self.optional else ''}, got {value}.")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer by name: its modules, and the fields that it brings to a config.

    Attributes:
      about: a line about it. conv: (features=, kernel_size=, strides=, activation=, name=, and the fields) -> a layer.
      dense: likewise without kernel_size and strides; None: there is none. head: (num_classes, name=, and the fields)
        -> the head whose rows are orthonormal.
      fields: that config.model has for this layer. check: of their values together.
      strides: (kernel_size, strides) -> whether conv takes these strides; else pixels are reordered before it.
      square: conv and dense have as many channels out as in, and take no number of them: a skeleton appends zeros
        before them, or leaves channels out behind.
      inner: conv and dense have an activation inside, and take none to follow.
      norm: what the norm of its convolution is at most by construction; None: nothing is.
      per_batch: conv has an argument batch_size, by which it chooses how to compute.
    """

    about: str
    conv: Callable[..., Any]
    dense: Callable[..., Any] | None = None
    head: Callable[..., Any] = lambda num_classes, name, **fields: OrthoHead(num_classes, name=name)
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda given: None
    strides: Callable[[int, int], bool] = lambda kernel_size, strides: strides == 1
    square: bool = False
    inner: bool = False
    norm: float | None = 1.0
    per_batch: bool = False


def _always(kernel_size: int, strides: int) -> bool:
    return True


def _padding(default: str) -> Field:
    return Field(default, "of the layer's convolutions", ("ZERO", "CIRCULAR"))


_IDENTITY_START = Field(False, "a sandwich starts near its activation, not at random")
_RANK = Field(None, "of the projectors; None: half of the channels", optional=int)
_METHOD = Field("bjorck", "of orthogonalisation", bjorck.METHODS)
_ROWS = Field("inputs", "channels that are rescaled", aol.ROWS)
_STEPS = Field(bjorck.NUM_ITERS, "Björck's steps, of method bjorck")
_SCALE_TEXT = "that the kernel is normalised to by its reshaped norms (1x1 kernels: to 1); None: not at all"
_SOC_SCALE = Field(0.7, _SCALE_TEXT, optional=float)


def _soc_scale(scale: float | None, kernel_size: int) -> float | None:
    """The norm of a 1x1 kernel is exact, so that it is normalised to 1."""
    return 1.0 if scale is not None and kernel_size == 1 else scale


def _soc(features: int, kernel_size: int, strides: int, *, scale: float | None, **fields):
    return SOC(features, kernel_size, strides, scale=_soc_scale(scale, kernel_size), **fields)


def _group_shuffle(features: int, kernel_size: int, strides: int, *, scale: float | None, **fields):
    return GroupAndShuffle(features, kernel_size, strides, scale=_soc_scale(scale, kernel_size), **fields)


def _soc_head(num_classes: int, *, scale, train_terms, eval_terms, name, **fields):
    del fields
    scale = _soc_scale(scale, 1)
    return SOCHead(num_classes, scale=scale, train_terms=train_terms, eval_terms=eval_terms, name=name)


def _check_soc(given: Mapping[str, Any]) -> None:
    for name in ("train_terms", "eval_terms"):
        if given[name] is None and given["padding"] == "ZERO":
            raise ValueError(f"{name} None, the exact exponential, needs padding 'CIRCULAR'.")
    if given["padding"] == "ZERO" and given["form"] in ("response", "series"):
        raise ValueError(f"form {given['form']!r} works in the frequency domain, which needs padding 'CIRCULAR'.")
    _check_scale(given)


def _check_scale(given: Mapping[str, Any]) -> None:
    if given["scale"] is not None and not given["scale"] > 0:
        raise ValueError(f"expected scale > 0 or None, got {given['scale']}.")


_EXACT = {"padding": "CIRCULAR", "train_terms": None, "eval_terms": None}


def _cholesky(features: int, kernel_size: int, strides: int, *, activation, name, **fields):
    return RKO(features, kernel_size, strides, method="cholesky", activation=activation, name=name, **fields)


def _plain(features: int, kernel_size: int, strides: int, *, activation, name, padding: str):
    return Conv(features, kernel_size, strides, padding, activation=activation, name=name)


LAYERS: dict[str, Layer] = {
    "soc": Layer(
        "skew orthogonal convolution",
        _soc,
        head=_soc_head,
        fields={
            "padding": _padding("ZERO"),
            "train_terms": Field(5, "highest power of the series in a training step; None: all", optional=int),
            "eval_terms": Field(12, "likewise in evaluation and certification", optional=int),
            "scale": _SOC_SCALE,
            "form": Field("auto", "how it is computed: docs/orthogonal.md", FORMS),
            "fast_gradient": Field(False, "the approximate backward pass of arXiv:2211.08453"),
        },
        check=_check_soc,
        strides=_always,
        per_batch=True,
    ),
    "soc_frequency": Layer(
        "SOC in the frequency domain: circular padding, the exact exponential",
        functools.partial(_soc, **_EXACT),
        head=functools.partial(_soc_head, train_terms=None, eval_terms=None),
        fields={"scale": _SOC_SCALE},
        check=_check_scale,
        strides=_always,
        per_batch=True,
    ),
    "cayley": Layer("Cayley transform of every frequency's response", Cayley, head=CayleyHead, strides=_always),
    "bcop": Layer(
        "block convolution orthogonal parametrisation",
        BCOP,
        OrthoLinear,
        fields={"padding": _padding("CIRCULAR"), "rank": _RANK, "num_iters": dataclasses.replace(_STEPS, default=20)},
    ),
    "aoc": Layer(
        "adaptive orthogonal convolution",
        AOC,
        OrthoLinear,
        fields={"padding": _padding("CIRCULAR"), "rank": _RANK, "method": _METHOD, "num_iters": _STEPS},
        strides=lambda kernel_size, strides: kernel_size >= strides,
    ),
    "sc_fac": Layer(
        "separable complete factorisation, in the order of AOC's factors",
        functools.partial(AOC, order="scfac"),
        OrthoLinear,
        fields={"padding": _padding("CIRCULAR"), "rank": _RANK, "method": _METHOD, "num_iters": _STEPS},
        strides=lambda kernel_size, strides: kernel_size % strides == 0,
    ),
    "group_shuffle": Layer(
        "group-and-shuffle: skew orthogonal convolutions in groups, with the channels dealt out anew between them",
        _group_shuffle,
        head=_soc_head,
        fields={
            "groups": Field(2, "of channels, in the k x k layers"),
            "pointwise_groups": Field(2, "likewise in the 1 x 1 layers behind them"),
            "paired": Field(False, "neighbouring channels stay together"),
            "padding": _padding("ZERO"),
            "train_terms": Field(5, "highest power of the series in a training step"),
            "eval_terms": Field(12, "likewise in evaluation and certification"),
            "scale": _SOC_SCALE,
            "fast_gradient": Field(False, "the approximate backward pass of arXiv:2211.08453"),
        },
        check=_check_scale,
        strides=_always,
    ),
    "rko": Layer(
        "reshaped kernel orthogonalisation",
        RKO,
        OrthoLinear,
        fields={"padding": _padding("CIRCULAR"), "method": _METHOD, "num_iters": _STEPS},
        strides=lambda kernel_size, strides: kernel_size >= strides,
    ),
    "cholesky": Layer(
        "reshaped kernel orthogonalisation by Cholesky factors",
        _cholesky,
        CholeskyDense,
        fields={"padding": _padding("CIRCULAR")},
        strides=lambda kernel_size, strides: kernel_size >= strides,
    ),
    "bro": Layer(
        "block reflectors per frequency of the padded map",
        BROConv,
        BRODense,
        fields={"rank": Field(0.5, "of the reflectors, as a share of the channels")},
        strides=_always,
    ),
    "lot": Layer(
        "approximate inverse square roots per frequency of the padded map",
        LOTConv,
        fields={"num_iters": Field(lot.NUM_ITERS, "steps of the inverse square root")},
        strides=_always,
    ),
    "aol": Layer(
        "almost orthogonal: input channels rescaled by row sums of the Gram matrix",
        AOLConv,
        AOLDense,
        fields={"padding": _padding("CIRCULAR"), "rows": _ROWS},
    ),
    "spectral_rescaling": Layer(
        "AOL with row sums of a power of the Gram matrix, which loses less",
        functools.partial(AOLConv, rows="outputs"),
        functools.partial(AOLDense, rows="outputs"),
        fields={
            "padding": _padding("CIRCULAR"),
            "iterations": Field(2, "n: row sums of the Gram matrix to the power 2^(n - 1)"),
        },
    ),
    "sll": Layer(
        "SDP-based Lipschitz layer: a residual step whose outputs are scaled by row sums",
        SLLConv,
        SLLDense,
        fields={
            "padding": _padding("ZERO"),
            "epsilon": Field(0.0, "added to row sums (SLL) or squared norms (CPL)"),
        },
        square=True,
        inner=True,
    ),
    "cpl": Layer(
        "convex potential layer: a residual step divided by an estimate of a squared norm",
        CPLConv,
        CPLDense,
        fields={
            "padding": _padding("ZERO"),
            "epsilon": Field(cpl.EPSILON, "added to row sums (SLL) or squared norms (CPL)"),
            "power_iters": Field(1, "steps of the norm estimate in a training step"),
        },
        square=True,
        inner=True,
    ),
    "sandwich": Layer(
        "sandwich of two maps with a Cayley transform per frequency",
        SandwichConv,
        SandwichDense,
        head=lambda num_classes, name, **fields: SandwichHead(num_classes, name=name),
        fields={"identity_start": _IDENTITY_START},
        strides=_always,
        inner=True,
    ),
    "sandwich_spatial": Layer(
        "sandwich of two convolutions with zero padding, scaled by row sums",
        SandwichConvSpatial,
        SandwichDense,
        head=lambda num_classes, name, **fields: SandwichHead(num_classes, name=name),
        fields={"padding": _padding("ZERO"), "identity_start": _IDENTITY_START},
        inner=True,
    ),
    "plain": Layer(
        "an unconstrained convolution, whose norm is estimated and proved",
        _plain,
        Dense,
        fields={"padding": _padding("ZERO")},
        strides=_always,
        norm=None,
    ),
}


def layer_fields(name: str) -> Mapping[str, Field]:
    """The fields that a layer brings to config.model: none for an unknown one."""
    return LAYERS[name].fields if name in LAYERS else {}
