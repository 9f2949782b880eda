"""Layers that are used wrongly say so in one ValueError, before anything is computed."""

import jax
import pytest

from lipjax import nn

IMAGE, VECTOR = (4, 4, 4), (6,)
MISTAKES = [
    (nn.SLLConv, {"kernel_size": 0}, IMAGE, "SLLConv expects kernel_size to be a whole number >= 1, got 0"),
    (nn.SLLConv, {"hidden": -1}, IMAGE, "SLLConv expects hidden to be a whole number >= 1, got -1"),
    (nn.SLLDense, {"hidden": 0}, VECTOR, "SLLDense expects hidden to be a whole number >= 1, got 0"),
    (nn.CPLDense, {"power_iters": 0}, VECTOR, "CPLDense expects power_iters"),
    (nn.CPLConv, {"strides": 0}, IMAGE, "CPLConv expects strides to be a whole number >= 1, got 0"),
    (nn.SandwichConv, {"features": 4, "kernel_size": -1}, IMAGE, "SandwichConv expects kernel_size"),
    (nn.SandwichConvSpatial, {"features": 0}, IMAGE, "SandwichConvSpatial expects features"),
    (nn.SandwichHead, {"num_classes": 3}, IMAGE, r"SandwichHead takes vectors.*\(4, 4, 4\)"),
    (nn.AOLConv, {"features": 4, "kernel_size": (3, 0)}, IMAGE, r"AOLConv expects kernel_size.*\(3, 0\)"),
    (nn.AOLConv, {"features": 4}, VECTOR, r"AOLConv takes images.*\(6,\)"),
    (nn.AOLDense, {"features": True}, VECTOR, "AOLDense expects features"),
    (nn.ShiftBlocks, {"num_layers": 0, "shift": 1}, IMAGE, "ShiftBlocks expects num_layers"),
    (nn.ShiftBlocks, {"num_layers": 1, "shift": 1}, VECTOR, r"ShiftBlocks takes maps of tokens.*\(6,\)"),
    (nn.ShiftBlocks, {"num_layers": 1, "shift": 1, "orthogonal": "qr"}, IMAGE, "orthogonal to be one of .*'qr'"),
    (nn.ShiftBlocks, {"num_layers": 1, "shift": 1, "positions": "all"}, IMAGE, "positions to be one of .*'all'"),
    (nn.NActivation, {"rate": 0.0}, IMAGE, "NActivation expects a rate > 0, got 0.0"),
    (nn.NActivation, {"rate": -1.0}, IMAGE, "NActivation expects a rate > 0, got -1.0"),
    (nn.LinearSpline, {"knots": 4}, IMAGE, "odd number n >= 3 of knots"),
    (nn.LinearSpline, {"spacing": 0.3}, IMAGE, "a spacing that is a power of two"),
    (nn.GroupAndShuffle, {"features": 4, "groups": 0}, IMAGE, "SOC expects groups >= 1"),
]


@pytest.mark.parametrize(("layer", "fields", "shape", "message"), MISTAKES)
def test_one_error_says_what_was_expected(layer, fields, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: layer(**fields).init(jax.random.key(0), shape))
