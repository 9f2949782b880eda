"""LiResNet as a Flax module: sizes, initialisation, collections, and the configs that ship."""

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import tiny
from training_helpers import shipped_configs

from lipjax import bounds
from lipjax.errors import UserError
from lipjax.models import get_model
from lipjax.nn.model import COLLECTION
from lipjax.training import config_file
from lipjax.training.config import validate

DATA = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "tiny_imagenet": ((64, 64, 3), 200),
    "imagenet": ((224, 224, 3), 1000),
    "folder": ((32, 32, 3), 10),  # of any size: tests/training/test_config_file.py
}


def count(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def variables():
    return started(tiny())


def started(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def built(model, variables):
    return jax.jit(lambda v: model.apply(v, method="build"))(variables)


def test_operators_and_collections(variables):
    network = built(tiny(), variables)
    assert network.names == (
        *("stem/linear", "stem/bias", "stem/activation"),
        *("block_01/linear", "block_01/bias", "block_01/activation"),
        *("block_02/linear", "block_02/bias", "block_02/activation"),
        *("neck_conv/linear", "neck_conv/bias", "neck_conv/activation", "flatten"),
        *("neck_dense/linear", "neck_dense/bias", "neck_dense/activation"),
    )
    assert set(variables) == {"params", COLLECTION}
    assert set(variables[COLLECTION]["vectors"]) == {n for n in network.names if n.endswith("/linear")}
    np.testing.assert_allclose(np.linalg.norm(np.asarray(network.head.matrix), axis=1), 1, rtol=1e-6)
    # stem 3x3x1x4, two blocks 3x3x4x4 with gamma, neck 4x4x4x4, dense 16 -> 16, head 16 -> 3, biases
    assert count(variables["params"]) == 36 + 4 + 2 * (144 + 4 + 4) + 256 + 4 + 16 * 16 + 16 + 3 * 16 + 3


def test_call_is_build_then_apply_and_needs_no_state(variables):
    model = tiny()
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    expected = model.apply(variables, method="build")(x)
    np.testing.assert_array_equal(np.asarray(model.apply(variables, x)), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(model.apply({"params": variables["params"]}, x)), np.asarray(expected))


def test_initialisation(variables):
    params = variables["params"]
    stem = np.asarray(params["stem"]["kernel"]).reshape(9, 4)
    np.testing.assert_allclose(stem.T @ stem, np.eye(4), atol=1e-6)
    wide = started(tiny(width=64))["params"]
    block = np.asarray(wide["block_01"]["weight"])
    # Var = 1 / (9 C); the standard error of a variance of n normals is sqrt(2 / n) of it, and five of those are
    # allowed.
    assert abs(block.var() * 9 * 64 - 1) < 5 * (2 / block.size) ** 0.5
    assert (np.asarray(wide["block_01"]["gamma"]) == 1).all()


def test_head_without_normalisation():
    model = tiny(head_normalize=False)
    network = built(model, started(model))
    assert np.abs(np.linalg.norm(np.asarray(network.head.matrix), axis=1) - 1).min() > 1e-3


def test_every_operator_is_bounded_above_its_estimate(variables):
    network = built(tiny(), variables)
    sigmas, _ = jax.jit(bounds.norm_estimates, static_argnums=2)(network, variables[COLLECTION]["vectors"], 300)
    rows = {row.name: row.claimed for row in bounds.operator_bounds(jax.tree.map(np.asarray, network))}
    for name, sigma in sigmas.items():
        assert float(sigma) * (1 - 1e-5) <= rows[name] <= float(sigma) * 1.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 5}, "even width"),
        ({"depth": 0}, "depth"),
        ({"neck_features": 3}, "neck_features"),
        ({"stem_strides": 4}, "at least 4 x 4"),
        ({"stem_kernel": 30}, "does not fit"),
        ({"stem_kernel": 0}, "stem_kernel"),
        ({"stem_strides": -1}, "stem_strides"),
        ({"height": 3}, "height"),
        ({"name": "resnet50"}, "one of"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    config = {"name": "liresnet", "depth": 2, "width": 4, "stem_kernel": 3, "stem_strides": 1, "stem_padding": 1}
    assert get_model(config, input_shape=(8, 8, 1), num_classes=3).depth == 2
    with pytest.raises(UserError, match=message):
        get_model(config | options, input_shape=(8, 8, 1), num_classes=3)


def test_to_nnx():
    """Flax NNX users can wrap the models."""
    model = flax.nnx.bridge.ToNNX(tiny(), rngs=flax.nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    model = flax.nnx.bridge.lazy_init(model, x)
    assert model(x).shape == (2, 3)


PARAMETERS = {
    "liresnet:cifar10": 49_357_322,
    "liresnet:cifar100": 49_541_732,
    "liresnet:tiny_imagenet": 49_783_496,
    "liresnet:imagenet": 83_229_152,
    "cifar10_liresnet_small": 557_386,
    "recipe:cifar10": 82_944_010,
    "recipe:cifar100": 83_128_420,
    "recipe:tiny_imagenet": 133_664_968,
    "recipe:imagenet": 98_138_532,
    "cifar10_recipe_small": 821_514,
    "recipe:cifar100,small": 844_644,
    "recipe:tiny_imagenet,small": 874_952,
    "recipe:imagenet,small": 1_074_216,
}


def parameters_by_hand(m, num_classes, channels):
    """Stem, blocks with gamma and bias, neck convolution, dense layer, head: from the architecture's description."""
    w, out = m.width, m.neck_features or 4 * m.width
    stem = m.stem_kernel**2 * channels * w + w
    grid = (m.input_shape[0] // m.stem_strides // 4) ** 2  # 16 x 16 maps leave 4 x 4 of them
    neck = 16 * w * w + (w if m.neck == "free" else 0) + grid * w * out + out
    dense = m.dense_depth * (out * out + 2 * out)  # with gamma and bias
    return stem + m.depth * (9 * w * w + 2 * w) + neck + dense + num_classes * (out + 1)


def _everyday():
    """Plain files, and of each family the first variant; the other variants are nightly."""
    families = set()
    for name in shipped_configs():
        family, _, variant = name.partition(":")
        first = not variant or family not in families
        families.add(family)
        yield name if first else pytest.param(name, marks=pytest.mark.nightly)


@pytest.mark.parametrize("name", shipped_configs())
def test_configs_are_valid_and_locked(name):
    config, _ = config_file.read_config(name, [])
    assert config.is_locked
    validate(config)
    with pytest.raises(AttributeError):
        config.optimizer.lr = 1


@pytest.mark.parametrize("name", list(_everyday()))
def test_configs_are_of_the_stated_size(name):
    config, _ = config_file.read_config(name, [])
    shape, classes = DATA[config.data.name]
    if config.data.image_size:
        shape = (config.data.image_size, config.data.image_size, shape[2])
    model = get_model(config.model, input_shape=shape, num_classes=classes)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))["params"]
    if name in PARAMETERS:
        assert count(params) == PARAMETERS[name] == parameters_by_hand(model, classes, shape[-1])
