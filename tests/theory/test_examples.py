"""Public functions say what they take, with shapes and units, and show an example that runs as it stands.

Examples may use `jax`, `jnp`, `np` and `lipjax` without importing them, and hold with x64 on and off. Those of the
methods of FrozenNetwork go on from the example of the class, with `os` and an empty `directory`.
"""

import dataclasses
import doctest
import inspect
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

import lipjax
import lipjax.interop
import lipjax.models
import lipjax.nn

FUNCTIONS = (
    *(f"linalg.{name}" for name in ("expm_skew", "cayley", "cholesky_orthogonalize")),
    *(f"linalg.{name}" for name in ("expm_truncated", "tangent", "geodesic_step", "polar")),
    *(f"manifold.{name}" for name in ("skew_adam", "labels", "partition", "orthogonal_parameters")),
    *(f"conv.{name}" for name in ("conv2d", "skew_kernel", "frequency_response", "apply_response", "space_to_depth")),
    *(f"parametrize.soc.{name}" for name in ("exponential", "exponential_response")),
    *(f"parametrize.aol.{name}" for name in ("modulus", "rescale_matrix", "rescale_kernel")),
    *("linalg.block_reflector", "parametrize.bro.rank", "parametrize.bro.packed_response"),
    "parametrize.lot.packed_response",
    *(f"parametrize.{name}" for name in ("sll.dense", "sll.conv", "cpl.contracted", "cpl.converged", "sandwich.dense")),
    *(f"activations.{name}" for name in ("maxmin", "householder", "householder2")),
    *(f"activations.{name}" for name in ("n_activation", "n_thresholds", "linear_spline", "spline_values")),
    *(f"pooling.{name}" for name in ("projection_pool", "max_pool_pairs")),
    *(f"spectral.{name}" for name in ("norm_bound", "norm_estimate", "power_iteration", "matrix_norm_bound")),
    "spectral.row_sum_bound",
    *(f"certify.{name}" for name in ("certified_radius", "mlp_radius", "certified_accuracy")),
    *(f"losses.{name}" for name in ("cross_entropy", "emma", "margin", "gloro", "trades", "crm", "crm_max")),
    *(
        f"losses.{name}"
        for name in ("certificate_regularization", "offset_cross_entropy", "scaled_offset_cross_entropy")
    ),
    *(f"losses.{name}" for name in ("logit_annealing", "cll", "kantorovich_rubinstein", "hinge", "hkr", "lse_hkr")),
    *(f"losses.{name}" for name in ("multi_margin", "margin_boosting", "class_counts")),
    *(f"bounds.{name}" for name in ("init_vectors", "margin_lipschitz_estimate", "margin_lipschitz_bound")),
    *(f"bounds.{name}" for name in ("liplt_vectors", "liplt_estimate", "liplt_bound")),
    *("network.make_network", "freeze", "attacks.pgd_l2", "attacks.attack_l2"),
    *(f"FrozenNetwork.{name}" for name in ("__call__", "certify", "predict", "margin_lipschitz", "lipschitz_report")),
    *(f"FrozenNetwork.{name}" for name in ("liplt_report", "head_report", "evaluate", "arrays")),
    *(f"FrozenNetwork.{name}" for name in ("save", "load", "margins", "norm_estimates", "export")),
    *("FrozenNetwork.to_onnx", "FrozenNetwork.to_torch_state", "nn.from_nnx"),
    *(f"zoo.{name}" for name in ("list", "load", "images", "card", "directory", "located", "add", "fetch")),
    *(f"attacks.{name}" for name in ("apgd_l2", "lipschitz_lower_bound")),
    *("parametrize.aoc.kernel", "parametrize.bcop.kernel", "interop.from_torch", "interop.from_sequential"),
    *("models.get_model", "parametrize.bcop.raw_shape"),
    *(f"parametrize.aoc.{name}" for name in ("compose", "projectors", "check_rank", "raw_shapes")),
    *(f"curvature.{name}" for name in ("estimate", "estimate_table", "top_rivals", "bound")),
)
CLASSES = (
    *(f"operators.{name}" for name in ("Dense", "Conv", "ConvExponential", "CircularConv", "ZeroPad", "Crop")),
    *(f"operators.{name}" for name in ("ConvTranspose", "ChannelShuffle", "PotentialStep", "Sandwich")),
    *(f"operators.{name}" for name in ("Shift", "PositionalBias", "L2Pool")),
    "FrozenNetwork",
)
# Compile for a second and longer.
DEAR = {
    *("parametrize.bro.packed_response", "parametrize.lot.packed_response", "parametrize.bcop.kernel"),
    *("parametrize.aoc.kernel", "parametrize.cpl.converged", "conv.apply_response", "attacks.attack_l2"),
    *("attacks.apgd_l2", "attacks.lipschitz_lower_bound"),
}
GLOBALS = {"jax": jax, "jnp": jnp, "np": np, "lipjax": lipjax}
FIELD = re.compile(r"^  (\w[\w, ]*):", re.MULTILINE)


def look_up(name):
    found = lipjax
    for part in name.split("."):
        found = getattr(found, part)
    return found


def block(text, heading):
    """What a docstring says below a line `heading:`, up to the next line that is not indented; "" without it."""
    found = re.search(rf"^{heading}:\n((?:  .*\n?|\n)+)", text, re.MULTILINE)
    return found.group(1) if found else ""


def complaints(function):
    """What the docstring of a function lacks."""
    text = inspect.getdoc(function) or ""
    wanted = [name for name in inspect.signature(function).parameters if name != "self"]
    said = {name.strip() for names in FIELD.findall(block(text, "Args")) for name in names.split(",")}
    missing = [f"a line in Args: for {name}" for name in wanted if name not in said]
    missing += [f"no argument {name}" for name in said if name not in wanted]
    missing += [] if re.search(r"^Returns:", text, re.MULTILINE) else ["Returns:"]
    return missing + ([] if doctest.DocTestParser().get_examples(text) else ["an example"])


def failures(name, text, names=GLOBALS):
    """The report of the examples in a docstring that do not give what they say; "" if all do."""
    test = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    report = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_it_takes(name):
    assert complaints(look_up(name)) == []


@pytest.mark.parametrize("name", CLASSES)
def test_an_operator_says_what_it_holds(name):
    found = look_up(name)
    said = FIELD.findall(block(inspect.getdoc(found), "Attributes"))
    assert said == [field.name for field in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else not said


@pytest.mark.x64_off
@pytest.mark.nightly
@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_an_example_gives_what_it_says_in_float32(name, tmp_path):
    """As a user meets it who has not set jax_enable_x64."""
    check_example(name, tmp_path)


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    "name", everyday([*FUNCTIONS, *CLASSES], *(name for name in (*FUNCTIONS, *CLASSES) if name not in DEAR))
)
def test_an_example_gives_what_it_says(name, tmp_path):
    check_example(name, tmp_path)


def check_example(name, tmp_path):
    text = inspect.getdoc(look_up(name))
    assert doctest.DocTestParser().get_examples(text)
    names = GLOBALS
    if name.startswith("FrozenNetwork."):  # they go on from the example of the class
        text = f"{inspect.getdoc(lipjax.FrozenNetwork)}\n\n{text}"
        names = GLOBALS | {"directory": tmp_path, "os": os}
    assert failures(name, text, names) == ""


def test_a_missing_line_and_a_wrong_example_are_noticed():
    def halve(x, y):
        """Halves.

        Args:
          x: a number.
          z: nothing.
        Example:
          >>> 4 / 2
          3.0
        """

    assert complaints(halve) == ["a line in Args: for y", "no argument z", "Returns:"]
    assert "Expected:\n    3.0\nGot:\n    2.0" in failures("halve", inspect.getdoc(halve))
    assert "an example" in complaints(lambda x: x)
    joined = inspect.getdoc(halve).replace("Example:\n  >>>", "Example: >>>")  # doctest passes over it
    assert joined != inspect.getdoc(halve)
    halve.__doc__ = joined
    assert "an example" in complaints(halve)
