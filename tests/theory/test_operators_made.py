"""Operators check types, shapes and numbers when they are made, and leave tree transformations alone."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import conv, operators
from lipjax.operators import (
    Bias,
    Centered,
    Centering,
    ChannelShuffle,
    CircularConv,
    CircularSeries,
    Contraction,
    Conv,
    ConvExponential,
    ConvTranspose,
    Crop,
    CropChannels,
    Dense,
    Flatten,
    Householder,
    Householder2,
    L2Pool,
    LeakyReLU,
    LinearHead,
    LinearSpline,
    MaxMin,
    MaxPoolPairs,
    MLPHead,
    NActivation,
    Normalize,
    PadChannels,
    PartialAbs,
    PositionalBias,
    PotentialStep,
    ProjectionPool,
    ReLU,
    Residual,
    Sandwich,
    Shift,
    Sigmoid,
    Softplus,
    SpaceToDepth,
    Tanh,
    ZeroPad,
)

IMAGE, EYE = (4, 4, 2), np.eye(2)
FIXED, PAIRED = np.ones((4, 2, 2)), np.ones((6, 2, 2, 2))
SIDE, THREE = np.stack([np.ones(1), np.zeros(1)]), np.stack([np.stack([np.ones(1), np.zeros(1)])] * 3)

# Each class made rightly.
MADE = {
    Bias: lambda: Bias(np.zeros(2), IMAGE),
    Centered: lambda: Centered(Dense(EYE)),
    ChannelShuffle: lambda: ChannelShuffle(IMAGE, 2),
    Centering: lambda: Centering(IMAGE),
    CircularConv: lambda: CircularConv.from_blocks(FIXED, PAIRED, IMAGE),
    CircularSeries: lambda: CircularSeries(FIXED, PAIRED, IMAGE, 2, 3),
    Contraction: lambda: Contraction(Dense(EYE)),
    Conv: lambda: Conv(np.ones((3, 3, 2, 5)), IMAGE),
    ConvExponential: lambda: ConvExponential(np.zeros((3, 3, 2, 2)), IMAGE, 5),
    ConvTranspose: lambda: ConvTranspose(Conv(np.ones((3, 3, 2, 5)), IMAGE)),
    Crop: lambda: Crop(IMAGE, ((1, 0), (0, 2))),
    CropChannels: lambda: CropChannels(IMAGE, 1),
    Dense: lambda: Dense(np.ones((3, 2))),
    Flatten: lambda: Flatten(IMAGE),
    Householder: lambda: Householder(SIDE, IMAGE),
    Householder2: lambda: Householder2(THREE, IMAGE),
    L2Pool: lambda: L2Pool(IMAGE, (2, 1)),
    LeakyReLU: lambda: LeakyReLU(IMAGE, 0.1),
    LinearHead: lambda: LinearHead(np.ones((3, 2)), np.zeros(3)),
    LinearSpline: lambda: LinearSpline(np.zeros((2, 5)), np.ones(2), IMAGE, 0.5),
    MaxMin: lambda: MaxMin(IMAGE),
    MaxPoolPairs: lambda: MaxPoolPairs(IMAGE),
    MLPHead: lambda: MLPHead(np.ones((4, 2)), np.zeros(4), np.ones((3, 4)), np.zeros(3)),
    NActivation: lambda: NActivation(-np.ones(2), np.zeros(2), IMAGE),
    Normalize: lambda: Normalize(np.zeros(1), np.ones(2), IMAGE),
    PadChannels: lambda: PadChannels(IMAGE, 3),
    PartialAbs: lambda: PartialAbs(IMAGE, 0.5),
    PotentialStep: lambda: PotentialStep(Dense(EYE), np.zeros(2), ReLU((2,))),
    ProjectionPool: lambda: ProjectionPool(SIDE, IMAGE),
    ReLU: lambda: ReLU(IMAGE),
    Residual: lambda: Residual((Dense(EYE), ReLU((2,)))),
    Sandwich: lambda: Sandwich(Dense(EYE), np.zeros(2), ReLU((2,)), 1),
    PositionalBias: lambda: PositionalBias(np.zeros((4, 4, 1)), IMAGE),
    Shift: lambda: Shift((4, 4, 9), 2),
    Sigmoid: lambda: Sigmoid(IMAGE),
    Softplus: lambda: Softplus(IMAGE),
    SpaceToDepth: lambda: SpaceToDepth(IMAGE, 2),
    Tanh: lambda: Tanh(IMAGE),
    ZeroPad: lambda: ZeroPad(IMAGE, ((1, 0), (0, 2))),
}
# ... and wrongly: by what, and what the message names.
WRONG = [
    (Bias, {"bias": np.zeros(40), "in_shape": (4, 4, 39)}, r"bias of shape \(39,\), got \(40,\)"),
    (Bias, {"bias": np.zeros((1, 2))}, r"bias of shape \(2,\)"),
    (Bias, {"bias": 0.5}, "Bias expects bias to be a NumPy or JAX array, got a float"),
    (Bias, {"bias": [0.5, 1.0]}, "array, got a list: np.asarray"),
    (Conv, {"kernel": np.ones((3, 3, 8, 5)), "in_shape": (4, 4, 7)}, r"HWIO kernel for images \(4, 4, 7\).*3, 3, 8, 5"),
    (Conv, {"kernel": np.ones((2, 5))}, "HWIO"),
    (Conv, {"in_shape": (32,)}, "HWIO"),
    (Conv, {"kernel": np.ones((9, 9, 2, 1)), "padding": "VALID"}, "does not fit"),
    (Conv, {"padding": "SAME"}, "padding"),
    (Conv, {"strides": 0}, "stride"),
    (Conv, {"strides": 3, "padding": "CIRCULAR"}, "divisible"),
    (Conv, {"groups": 0}, "groups >= 1, got 0"),
    (Conv, {"groups": True}, "groups >= 1, got True"),
    (Conv, {"groups": 3}, r"divides the 2 channels .* got 3 groups and shape \(3, 3, 2, 5\)"),
    (Conv, {"kernel": np.ones((3, 3, 1, 5)), "groups": 2}, r"divides the 2 channels .* shape \(3, 3, 1, 5\)"),
    (Conv, {"kernel": np.ones((3, 3, 2, 4)), "groups": 2}, r"kernel \(kh, kw, 2 / groups, out\)"),
    (Conv, {"dilation": 0}, "dilation >= 1 or a pair of them, got 0"),
    (Conv, {"dilation": 3, "padding": "VALID"}, r"kernel of \(7, 7\) does not fit"),
    (ConvExponential, {"kernel": np.zeros((3, 3, 3, 3))}, "odd sides"),
    (ConvExponential, {"kernel": np.zeros((3, 3, 2, 2)), "groups": 2}, "groups that divides the 2 channels"),
    (ConvExponential, {"kernel": np.zeros((3, 3, 1, 2))}, "odd sides"),
    (ConvTranspose, {"conv": Dense(np.ones((2, 2)))}, "expects a Conv, got a Dense"),
    (ChannelShuffle, {"groups": 3}, "groups >= 1 that divide the 2 channels, got 3"),
    (ChannelShuffle, {"groups": 0}, "groups >= 1 that divide the 2 channels, got 0"),
    (ChannelShuffle, {"paired": True}, "that divide the pairs of the 2 channels, got 2"),
    (ConvExponential, {"kernel": np.zeros((2, 2, 2, 2))}, "odd sides"),
    (CircularConv, {"response": np.ones((4, 4, 2, 2), complex), "in_shape": IMAGE}, "Expected a response"),
    (CircularSeries, {"fixed": FIXED[:3]}, "Expected blocks"),
    (CircularSeries, {"out_channels": 5}, "at least 5 channels"),
    (Crop, {"crops": ((2, 2), (0, 0))}, r"at least one of \(4, 4\) pixels"),
    (Crop, {"crops": ((2, -1), (0, 0))}, "whole numbers >= 0"),
    (ZeroPad, {"pads": ((2, -1), (0, 0))}, "whole numbers >= 0"),
    (ZeroPad, {"in_shape": (32,)}, "expects images"),
    (CropChannels, {"channels": 3}, "between 1 and 2"),
    (Dense, {"matrix": np.ones(3)}, r"matrix \(out, in\), got shape \(3,\)"),
    (Dense, {"matrix": np.ones((3, 0))}, "not empty"),
    (Dense, {"matrix": [[1.0, 2.0]]}, "Dense expects matrix to be a NumPy or JAX array, got a list"),
    (Householder, {"direction": np.ones((2, 3))}, "direction of shape"),
    (Householder, {"direction": 0 * SIDE}, "lengths between"),
    (Householder2, {"directions": THREE[:2]}, "directions of shape"),
    (ProjectionPool, {"direction": -SIDE}, ">= 0"),
    (L2Pool, {"regions": (3, 1)}, r"divide the size \(4, 4\), got \(3, 1\)"),
    (L2Pool, {"regions": (0, 1)}, "at least 1 each"),
    (L2Pool, {"delta": 0.0}, "between 2.-64 and 2.64, got 0.0: without one its gradient"),
    (L2Pool, {"delta": float("nan")}, "got nan"),
    (L2Pool, {"in_shape": (32,)}, "expects images"),
    (LeakyReLU, {"negative_slope": 2.0}, "between -1 and 1"),
    (LinearHead, {"bias": np.zeros(2)}, "bias"),
    (LinearSpline, {"values": np.zeros((2, 4))}, "odd number n >= 3 of knots"),
    (LinearSpline, {"values": np.zeros((2, 1))}, "odd number n >= 3 of knots"),
    (LinearSpline, {"values": np.zeros((3, 5))}, "values for 2 channels"),
    (LinearSpline, {"scale": np.ones(3)}, r"scale of shape \(2,\), got \(3,\)"),
    (LinearSpline, {"scale": np.array([1.0, 0.0])}, "scales of moduli between"),
    (LinearSpline, {"spacing": 0.3}, "a power of two, such as 0.25: 0.3"),
    (LinearSpline, {"spacing": 0.0}, "a power of two"),
    (NActivation, {"lower": np.zeros(3)}, r"lower of shape \(2,\), got \(3,\)"),
    (NActivation, {"upper": np.zeros((1, 2))}, r"upper of shape \(2,\)"),
    (PartialAbs, {"fraction": 0.25}, "of the 2 channels that is a whole number of them, without rounding, got 0.25"),
    (PartialAbs, {"fraction": 1.5}, r"a fraction in \[0, 1\]"),
    (PartialAbs, {"in_shape": (10,), "fraction": 0.1}, "without rounding"),
    (LinearHead, {"matrix": np.ones(2)}, "matrix"),
    (MaxMin, {"in_shape": (4, 4, 3)}, "even number"),
    (MLPHead, {"w2": np.ones((3, 5))}, "w2"),
    (Normalize, {"mean": np.zeros(3)}, "input_mean"),
    (Normalize, {"std": np.ones((1, 2))}, "input_std"),
    (PadChannels, {"channels": 1}, "at least 2"),
    (PositionalBias, {"bias": np.zeros(2)}, r"bias of shape \(4, 4, 1\), got \(2,\)"),
    (PositionalBias, {"bias": np.zeros((1, 4, 4, 1))}, r"bias of shape \(4, 4, 1\)"),
    (PositionalBias, {"bias": np.zeros((4, 4, 2))}, r"bias of shape \(4, 4, 1\)"),
    (PositionalBias, {"in_shape": (32,)}, "expects images"),
    (Shift, {"channels": 3}, "between 1 and c / 4 of its 9 channels"),
    (Shift, {"channels": 0}, "got 0"),
    (Shift, {"in_shape": (32,)}, "expects images"),
    (Residual, {"ops": (Dense(np.ones((3, 2))),)}, r"gives shape \(3,\), but the sum takes \(2,\)"),
    (Residual, {"ops": (Dense(EYE), ReLU((3,)))}, r"gives shape \(2,\), but operator 1 takes \(3,\)"),
    (PotentialStep, {"linear": ReLU((2,))}, "expects a linear map that is applied forward and back, .* got a ReLU"),
    (PotentialStep, {"bias": np.zeros((1, 2))}, r"PotentialStep expects a bias of shape \(2,\)"),
    (PotentialStep, {"activation": MaxMin((2,))}, r"slopes in \[0, 1\], got a MaxMin: its bound does not hold"),
    (PotentialStep, {"activation": LeakyReLU((2,), -0.5)}, "got a LeakyReLU of slopes between -0.5 and 1"),
    (PotentialStep, {"activation": ReLU((3,))}, r"gives shape \(2,\), but the ReLU takes \(3,\)"),
    (Sandwich, {"activation": LeakyReLU((2,), -1.0)}, "got a LeakyReLU of slopes between -1 and 1"),
    (
        Sandwich,
        {"linear": Conv(np.ones((1, 1, 1, 2)), IMAGE, groups=2), "activation": ReLU(IMAGE)},
        "one group, got 2: channels of groups",
    ),
    (Sandwich, {"outputs": 2}, "outputs between 1 and 1, .* got 2"),
    (Sandwich, {"outputs": 0}, "outputs between 1 and 1"),
    (SpaceToDepth, {"block": 3}, "divides"),
    *(
        (cls, {"in_shape": shape}, rf"{cls.__name__} expects an in_shape of sizes >= 1")
        for cls in (Flatten, ReLU, LeakyReLU, Tanh, Sigmoid, Softplus, MaxMin, MaxPoolPairs, SpaceToDepth, Bias)
        for shape in ((), (4, 0, 2), (4, -1, 2))
    ),
]


def test_every_class_is_looked_at():
    known = {cls for cls in vars(operators).values() if isinstance(cls, type) and hasattr(cls, "in_shape")}
    assert known <= set(MADE) and len(MADE) >= 26


@pytest.mark.parametrize("cls", MADE)
def test_trees_of_anything_are_left_alone(cls):
    op = MADE[cls]()
    leaves, structure = jax.tree.flatten(op)
    for odd in (None, object(), "x", 3, np.zeros((7, 7, 7, 7, 7))):
        made = jax.tree.unflatten(structure, [odd] * len(leaves))
        assert type(made) is cls
        assert all(a is odd for a in jax.tree.leaves(made, is_leaf=lambda x: x is None))
    abstract = jax.eval_shape(lambda: op)
    assert jax.tree.structure(abstract) == structure
    stacked = jax.tree.map(lambda a: np.stack([a, a]), op)
    if leaves:  # traced, not run: what is computed does not depend on it
        x = np.ones((2, 1, *op.in_shape))
        assert jax.eval_shape(jax.vmap(lambda o, x: o(x)), stacked, x).shape == (2, 1, *op.out_shape)
        jax.eval_shape(lambda stacked, x: jax.lax.scan(lambda carry, o: (carry, o(x)), 0, stacked), stacked, x[0])
    assert jax.tree.structure(copy.deepcopy(op)) == structure
    if cls is not CircularConv:  # which is made of other arguments than it holds
        assert jax.tree.structure(dataclasses.replace(op)) == structure


@pytest.mark.parametrize(("cls", "changes", "message"), WRONG)
def test_what_does_not_fit_is_refused_when_made(cls, changes, message):
    op = MADE[cls]()
    fields = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)} if cls is not CircularConv else {}
    if cls is not CircularConv:
        cls(**fields)  # control
    with pytest.raises(ValueError, match=message):
        cls(**fields | changes)
    traced = {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    if traced and not message.startswith(("lengths", ">=", "scales")):  # shapes are known to `jit`, too
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda arrays: cls(**fields | changes | arrays), traced)


def past_jaxtyping(cls, **fields):
    """What a constructor makes where jaxtyping, which only tests have, does not object first."""
    op = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(op, name, value)
    op.__post_init__()
    return op


NOT_WHOLE = [
    (ChannelShuffle, {"groups": 2.0, "paired": False}, "groups >= 1"),
    (ChannelShuffle, {"groups": "2", "paired": False}, "groups >= 1"),
    (ChannelShuffle, {"groups": True, "paired": False}, "groups >= 1"),
    (ChannelShuffle, {"groups": 2, "paired": 1}, "True or False"),
    (PadChannels, {"channels": 5.5}, "at least 4 channels"),
    (CropChannels, {"channels": 2.0}, "between 1 and 4 channels"),
    (SpaceToDepth, {"block": 2.0}, "a block >= 1"),
    (PartialAbs, {"fraction": None}, "a fraction in"),
    (LeakyReLU, {"negative_slope": "0"}, "a negative_slope between"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), NOT_WHOLE)
def test_what_is_no_number_of_the_kind(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        past_jaxtyping(cls, in_shape=(4, 4, 4), **fields)


@pytest.mark.parametrize("value", [2.0, None, "2", True, 0, (1.5, 1), (1, 2, 3), (True, 1)])
def test_strides_and_dilations_are_whole_numbers(value):
    for pair in (conv.stride_pair, conv.dilation_pair):
        inner = getattr(pair, "__wrapped__", pair)  # past jaxtyping, which only tests have
        with pytest.raises(ValueError, match="or a pair of them, got .*: it takes whole numbers"):
            inner(value)
        assert inner(np.int64(2)) == (2, 2) and inner([1, 2]) == (1, 2)


@pytest.mark.parametrize("shape", [4, None, "442", (4.0, 4, 2), (True, 4, 2), ((4, 4), 2), np.array([4, 4, 2])])
def test_what_is_no_shape(shape):
    for cls in (ReLU, MaxMin, Flatten):
        with pytest.raises(ValueError, match=f"{cls.__name__} expects an in_shape of sizes >= 1"):
            past_jaxtyping(cls, in_shape=shape)


def test_lists_of_sizes_become_tuples():
    op = past_jaxtyping(Conv, kernel=jnp.ones((3, 3, 2, 2)), in_shape=[4, np.int64(4), 2], strides=1, padding="ZERO")
    assert op.in_shape == IMAGE and all(type(n) is int for n in op.in_shape)
    assert jax.jit(lambda op, x: op(x))(op, jnp.ones((1, *IMAGE))).shape == (1, *IMAGE)
