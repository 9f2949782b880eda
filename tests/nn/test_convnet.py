"""Plain convolutional networks: shapes, initialisation, refusals, and weights of the original code."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import relative
from ml_collections import ConfigDict
from training_helpers import quick_compiles  # noqa: F401

from lipjax import UserError, bounds, freeze, interop
from lipjax.models import ConvNet, get_model
from lipjax.models.convnet import VARIANTS
from lipjax.nn import COLLECTION, ELEMENTWISE
from lipjax.training.config import default_config, load_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "crm_liplt.npz"
PARITY = 1e-9
SMALL = {"variant": "custom", "convs": ((4, 3, 1, 1), (6, 4, 2, 0)), "dense": (5,)}


def small(**options):
    return ConvNet((8, 10, 3), 4, **{**SMALL, **options})


def made(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *model.input_shape)))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Input of the first dense layer and all widths from there, of the papers' tables; kernels by hand from the same tables.
FOUR = 3 * 32 * 9 + 32 * 32 * 16 + 32 * 64 * 9 + 64 * 64 * 16
BIASES = 32 + 32 + 64 + 64
EIGHT = 64 * (3 * 9 + 64 * 9 + 64 * 16 + 3) + 128 * (64 * 9 + 128 * 9 + 128 * 16 + 3) + 256 * (128 * 9 + 256 * 16 + 2)
CASES = {
    ("4c3f", 28, 1): ((3136, 512, 512, 10), FOUR - 2 * 32 * 9 + BIASES),
    ("6c2f", 32, 3): ((1024, 512, 10), FOUR + 64 * 64 * 25 + BIASES + 2 * 64),
    ("6c2f", 64, 3): ((4096, 512, 200), FOUR + 64 * 64 * 25 + BIASES + 2 * 64),
    ("8c2f", 64, 3): ((9216, 256, 200), EIGHT),
}


@pytest.mark.parametrize(("variant", "side", "channels"), CASES)
def test_the_named_nets_have_the_papers_sizes(variant, side, channels):
    dense, convolutions = CASES[variant, side, channels]
    model = ConvNet((side, side, channels), dense[-1], variant=variant)
    model.check()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, channels)))["params"]
    matrices = [params[name]["matrix"].shape for name in sorted(params) if "matrix" in params[name]]
    assert matrices == [(out, width) for width, out in zip(dense, dense[1:], strict=False)]
    assert count({name: tree for name, tree in params.items() if name.startswith("conv")}) == convolutions
    assert {name for name, _, _ in CASES} == set(VARIANTS)


def test_an_activation_follows_every_layer_but_the_head():
    model = small()
    variables = made(model)
    network = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    layers = ("conv_01", "conv_02", "flatten", "dense_01")
    parts = [[n] if n == "flatten" else [f"{n}/linear", f"{n}/bias", f"{n}/activation"] for n in layers]
    assert network.names == tuple(sum(parts, []))
    assert set(variables[COLLECTION]["vectors"]) == {n for n in network.names if n.endswith("/linear")}
    assert network.ops[3].out_shape == (3, 4, 6) and network.head.in_shape == (5,)


def test_weights_and_biases_start_as_torchs():
    """U(-w, w) with w = 1 / sqrt(fan_in), whose variance is w^2 / 3."""
    model = small(convs=((64, 3, 1, 1), (64, 4, 2, 1)), dense=(256,))
    params = made(model)["params"]
    fans = {"conv_01": 27, "conv_02": 64 * 16, "dense_01": 64 * 4 * 5, "head": 256}
    assert set(fans) == set(params)
    for name, fan_in in fans.items():
        for leaf in params[name].values():
            scaled = np.asarray(leaf) * fan_in**0.5
            assert np.abs(scaled).max() <= 1
            # The standard error of the variance of n such numbers is sqrt(4 / (45 n)); five of those are allowed.
            assert abs(scaled.var() - 1 / 3) < 5 * (4 / (45 * scaled.size)) ** 0.5, name


def test_every_elementwise_activation_can_be_named():
    kinds = set()
    for activation in ELEMENTWISE:
        network = jax.eval_shape(
            lambda activation=activation: small(activation=activation).init_with_output(
                jax.random.key(0), method="build"
            )[0]
        )
        kinds.add(type(network.ops[2]))
    assert len(kinds) == len(ELEMENTWISE)


def test_a_net_certifies_and_liplt_lies_between_slopes_and_the_product():
    model = small(activation="leaky_relu", negative_slope=0.2, input_mean=0.5, input_std=0.5)
    model.check()
    variables = made(model)
    x = jax.random.uniform(jax.random.key(1), (3, 8, 10, 3))
    frozen = freeze(model, variables)
    logits, certificate = frozen(np.asarray(x)), frozen.certify(np.asarray(x))
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, x), rtol=1e-9)
    assert (certificate.radii > 0).all() and len(frozen.lipschitz_report()) == 11
    network = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    estimates = [
        np.asarray(jax.jit(estimate, static_argnums=2)(network, vectors, 50)[0])
        for estimate, vectors in (
            (bounds.margin_lipschitz_estimate, variables[COLLECTION]["vectors"]),
            (bounds.margin_liplt_estimate, bounds.init_liplt_vectors(network, jax.random.key(2))),
        )
    ]
    off = ~np.eye(4, dtype=bool)
    assert (estimates[1][off] < estimates[0][off]).all()
    # A sampled slope is below any true constant.
    moved = jax.jit(network)(x + 1e-3 * jax.random.normal(jax.random.key(3), x.shape))
    gaps = np.abs((moved - logits)[:, :, None] - (moved - logits)[:, None, :])
    lengths = np.linalg.norm(np.asarray(1e-3 * jax.random.normal(jax.random.key(3), x.shape)).reshape(3, -1), axis=1)
    assert (gaps[:, off] / lengths[:, None] < estimates[1][off]).all()


def test_the_slope_is_leaky_relus_alone():
    x = -jax.random.uniform(jax.random.key(1), (2, 8, 10, 3))
    variables = made(small())
    logits = {
        (name, slope): np.asarray(small(activation=name, negative_slope=slope).apply(variables, x))
        for name, slope in (("leaky_relu", 0.01), ("leaky_relu", 0.5), ("leaky_relu", 0.0), ("relu", 0.5))
    }
    assert (logits["leaky_relu", 0.0] == logits["relu", 0.5]).all()
    assert len({a.tobytes() for a in logits.values()}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "5c2f"}, "variant to be one of"),
        ({"variant": "8c2f"}, "'8c2f' has its own convs and dense"),
        ({"activation": "maxmin"}, "activation to be one of .*'relu'"),
        ({"activation": "leaky_relu", "negative_slope": 1.5}, "negative_slope between"),
        ({"dense": (0,)}, "dense to be a tuple of widths"),
        ({"dense": 512}, "dense"),
        ({"convs": ((4, 3, 1),)}, "every element of convs"),
        ({"convs": ((4, 3, 0, 1),)}, "every element of convs"),
        ({"convs": ((4, 3, 1, -1),)}, "every element of convs"),
        ({"convs": ((4, 3.0, 1, 1),)}, "convs"),
        ({"convs": (4, 3, 1, 1)}, "convs"),
        ({"convs": ((4, 4, 2, 0),) * 3}, r"images \(8, 10, 3\) are used up at convolution 2 of 3"),
        ({"depth": 3}, "depth"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    config = {"name": "convnet", **SMALL}
    get_model(config, input_shape=(8, 10, 3), num_classes=4)  # control
    with pytest.raises(UserError, match=message):
        get_model({**config, **options}, input_shape=(8, 10, 3), num_classes=4)


def test_a_saved_config_gives_the_same_net(tmp_path):
    config = default_config()
    config.model = ConfigDict({"name": "convnet", **SMALL, "convs": ((4, 3, 1, 1),)})
    (tmp_path / "config.json").write_text(json.dumps({"config": json.loads(config.to_json()), "seed": 0}))
    loaded, _ = load_config(tmp_path)
    assert loaded.model.convs == ((4, 3, 1, 1),) and loaded.model.dense == (5,)
    sizes = {"input_shape": (8, 10, 3), "num_classes": 4}
    assert get_model(loaded.model, **sizes) == get_model(config.model, **sizes)


# ---- weights of o4lc/CRM-LipLT ---------------------------------------------------------------------------------------


def original():
    with np.load(GOLDEN, allow_pickle=False) as file:
        arrays = dict(file)
    state = {name.removeprefix("param/"): a for name, a in arrays.items() if name.startswith("param/")}
    return arrays, state, json.loads(str(arrays["meta"]))["constructor"]


def test_logits_are_the_originals():
    arrays, state, options = original()
    model, variables = interop.from_torch("crm", state, **options)
    x = jnp.asarray(np.transpose(arrays["input/x"], (0, 2, 3, 1)))
    assert relative(jax.jit(model.apply)(variables, x), arrays["output/logits"]) < PARITY
    # Control: without the reordering of the first dense matrix's columns the logits are others.
    unordered = jax.tree.map(lambda a: a, variables)
    unordered["params"]["dense_01"]["matrix"] = jnp.asarray(state["linear.7.weight"])
    assert relative(jax.jit(model.apply)(unordered, x), arrays["output/logits"]) > 1e-2


def test_an_imported_network_has_the_structure_of_a_fresh_one():
    _, state, options = original()
    model, variables = interop.from_torch("crm", state, **options)
    fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.input_shape)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(fresh))


@pytest.mark.nightly
def test_other_layer_tuples_tanh_and_images_that_are_not_square():
    """Defaults of stride and padding; against a plain NCHW network with the original's flattening."""
    rng = np.random.default_rng(0)
    layers = [("conv2d", 2, 3, 3), ("conv2d", 3, 5, 2, 2), ("flatten", None), ("linear", 5 * 2 * 3, 4)]
    shapes = {"linear.0": (3, 2, 3, 3), "linear.2": (5, 3, 2, 2), "linear.5": (4, 30)}
    state = {f"{name}.weight": rng.standard_normal(shape) / 3 for name, shape in shapes.items()}
    state |= {f"{name}.bias": rng.standard_normal(shape[0]) for name, shape in shapes.items()}
    model, variables = interop.from_torch("crm", state, layers=layers, inputShape=(2, 6, 8), activation="tanh")
    x = rng.standard_normal((3, 2, 6, 8))
    y = x
    for name, strides in (("linear.0", 1), ("linear.2", 2)):
        y = jax.lax.conv_general_dilated(y, state[f"{name}.weight"], (strides, strides), "VALID")
        y = np.tanh(np.asarray(y) + state[f"{name}.bias"][:, None, None])
    expected = y.reshape(3, -1) @ state["linear.5.weight"].T + state["linear.5.bias"]
    assert relative(model.apply(variables, jnp.asarray(np.transpose(x, (0, 2, 3, 1)))), expected) < 1e-13


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    _, state, options = original()

    def refused(message, state_dict=state, **changes):
        with pytest.raises(ValueError, match=message):
            interop.from_torch("crm", state_dict, **{**options, **changes})

    refused(r"lacks \['linear.2.bias'\]", {name: a for name, a in state.items() if name != "linear.2.bias"})
    refused(r"extra \['linear.3.weight'\]", {**state, "linear.3.weight": np.zeros(3)})
    wrong = {**state, "linear.7.weight": np.zeros((24, 127))}
    refused(r"linear.7.weight: expected shape \(24, 128\), got \(24, 127\)", wrong)
    wrong = {**state, "linear.0.weight": np.zeros((4, 3, 3, 2))}
    refused(r"linear.0.weight: expected shape \(4, 3, 3, 3\), got \(4, 3, 3, 2\)", wrong)
    refused("activation: expected one of .*'gelu'", activation="gelu")
    refused("options .*got .*'depth'", depth=3)
    refused(r"inputShape: expected \(channels", inputShape=(768,))
    refused("linear layer at the end", layers=options["layers"][:4])
    narrow = ("linear", 127, 24)
    refused(r"takes the shape \(128,\).*got \('linear', 127, 24\)", layers=[*options["layers"][:4], narrow])
    refused(r"takes the shape \(3, 16, 16\)", layers=[("conv2dBatchNorm", 3, 4, 3, 1, 1), *options["layers"][1:]])
    interop.from_torch("crm", state, **options)  # control
