"""LipNeXt-style networks: the function that they are, their proved norms, what a step costs, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checker_helpers import fingerprint
from tiers import everyday

import lipjax
from lipjax import bounds, checker, losses, operators
from lipjax.certify.document import write_certificate
from lipjax.models import LipNeXt, get_model
from lipjax.network import Application
from lipjax.nn.tokens import ORTHOGONAL
from lipjax.parametrize import exponential
from lipjax.plan.flops import count
from lipjax.training import config_file

SHAPE = (8, 8, 1)


def make(**options):
    sizes = {"tokens": 4, "width": 16, "depth": 2, "regions": 2, "neck_features": 8}
    model = LipNeXt(input_shape=SHAPE, num_classes=3, **{**sizes, **options})
    model.check()
    return model


def start(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.input_shape)))


def built(model, variables):
    return jax.jit(lambda v: model.apply(v, method="build"))(variables)


def built_to_train(model, variables):
    return jax.jit(lambda v: model.apply(v, True, method="build", mutable=["lip"])[0])(variables)


run = jax.jit(lambda op, x: op(x))


def moved(tokens, n):
    """Channel by channel: up, down, left, right, and those that stay."""
    out = tokens.copy()
    h, w = tokens.shape[1:3]
    for i, j in np.ndindex(h, w):
        for group, (p, q) in enumerate((((i + 1) % h, j), ((i - 1) % h, j), (i, (j + 1) % w), (i, (j - 1) % w))):
            out[:, i, j, group * n : (group + 1) * n] = tokens[:, p, q, group * n : (group + 1) * n]
    return out


def test_a_network_is_what_its_formula_says():
    """Written out in NumPy from the parameters, with patches taken by hand; R and M are used one after the other."""
    model = make(orthogonal="manifold", identity_start=False, shift=1 / 8, absolute=0.25)
    variables = start(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape), variables["params"])
    images = rng.uniform(size=(3, *SHAPE))
    x = np.zeros((3, 4, 4, 16))
    for i, j, a, b in np.ndindex(4, 4, 2, 2):
        x[:, i, j, 2 * a + b] = images[:, 2 * i + a, 2 * j + b, 0]
    p = params["block"]
    for i in range(2):
        mixed = moved((x + p["position"][i]) @ p["orthogonal_mix"][i].T, 2)
        x = mixed @ p["orthogonal_mix"][i] @ p["orthogonal_map"][i].T + p["bias"][i]
        x = np.where(np.arange(16) < 4, np.abs(x), x)
    pooled = np.sqrt((x.reshape(3, 2, 2, 2, 2, 16) ** 2).sum((2, 4)) + 1e-6).reshape(3, -1)
    network = built(model, {**variables, "params": params})
    place = network.names.index("flatten") + 1
    found = images
    for op in (network.normalize, *network.ops[:place]):
        found = run(op, found)
    np.testing.assert_allclose(found, pooled, rtol=1e-12)
    features = np.asarray(found) @ np.asarray(network.ops[place].matrix).T + network.ops[place + 1].bias
    features = np.concatenate([np.maximum(*np.split(features, 2, 1)), np.minimum(*np.split(features, 2, 1))], 1)
    logits = features @ np.asarray(network.head.matrix).T + network.head.bias
    np.testing.assert_allclose(run(network, images), logits, rtol=1e-10)
    assert np.abs(pooled[0] - pooled[1]).max() > 0.01  # control: images are told apart


VARIANTS = {
    "abs": {},
    "exponential": {"orthogonal": "exponential", "activation": "maxmin"},
    "manifold": {"orthogonal": "manifold", "positions": "shared"},
    "no premix": {"premix": False, "positions": "none", "neck": "l2", "activation": "maxmin"},
    "patches": {"neck": "patches", "stem": "conv", "activation": "maxmin"},
    "hybrid": {"residual_blocks": 1},
}
FREE = {"patches": ["stem/linear"], "hybrid": ["residual_01/linear"]}  # layers whose norms are not 1


IMAGES, LABELS = np.random.default_rng(2).uniform(size=(6, *SHAPE)), np.arange(6) % 3


def stepped(model, variables, count):
    """The variables after steps of gradient descent on a training step's network, matrices counted as 1."""

    @jax.jit
    def step(params):
        def loss(params):
            network = model.apply({**variables, "params": params}, True, method="build", mutable=["lip"])[0]
            constants = bounds.margin_lipschitz_estimate(network, variables["lip"]["vectors"], 1)[0]
            return losses.emma(network(jnp.asarray(IMAGES)), jnp.asarray(LABELS), constants, 0.1).mean()

        return optax.apply_updates(params, jax.tree.map(lambda g: -0.3 * g, jax.grad(loss)(params)))

    params = variables["params"]
    for _ in range(count):
        params = step(params)
    return {**variables, "params": params}


@pytest.mark.parametrize("name", everyday(VARIANTS, "manifold"))
def test_blocks_are_proved_near_1_at_the_start_and_after_steps(name):
    """Certificates bound what is stored. (On the manifold a step of another optimizer leaves it, and that is seen.)"""
    model = make(depth=1, **VARIANTS[name])
    variables = start(model)
    for steps in (0, 2):
        frozen = lipjax.freeze(model, stepped(model, variables, steps))
        report = frozen.lipschitz_report()
        linear = [row.claimed for row in report if row.name.startswith("block") and row.type == "Conv"]
        assert len(linear) == (1 if name == "no premix" else 2)
        if name == "manifold" and steps:
            assert max(linear) > 1.0001  # control: nothing is taken for granted
        else:
            assert 0.99 < min(linear) and max(linear) < 1 + 1e-8
        free = [row.name for row in report if row.claimed > 1 + 1e-8 and not row.name.startswith("block")]
        assert free == FREE.get(name, [])
    radii = frozen.certify(IMAGES).radii
    assert np.isfinite(radii).all() and (radii >= 0).all() and (radii > 0).any()


def test_a_training_step_estimates_no_norm_of_a_block():
    model = make()

    def estimated(build):  # traced, not run
        def estimates():
            variables = start(model)
            return bounds.norm_estimates(build(model, variables), variables["lip"]["vectors"], 1)[0]

        return {name.split("/")[0] for name in jax.eval_shape(estimates)}

    assert estimated(built_to_train) == set()
    assert estimated(built) == {"block_01", "block_02", "neck_dense"}


@pytest.mark.parametrize("kind", everyday(ORTHOGONAL, "cholesky"))
def test_where_matrices_start(kind):
    """R at random, M as the identity; then M R^T is R^T, up to the ridge of Cholesky."""
    model = make(orthogonal=kind, activation="maxmin")
    network = built(model, start(model))
    ops = dict(zip(network.names, network.ops, strict=True))
    mix, linear = (np.asarray(ops[f"block_01/{part}"].kernel[0, 0].T) for part in ("mix", "linear"))
    tolerance = 1e-2 if kind == "cholesky" else 1e-10
    np.testing.assert_allclose(mix @ mix.T, np.eye(16), atol=tolerance)
    np.testing.assert_allclose(linear, mix.T, atol=tolerance)
    assert np.abs(np.angle(np.linalg.eigvals(mix))).max() > 1.5  # control: far from the identity
    assert np.abs(mix - np.asarray(ops["block_02/mix"].kernel[0, 0].T)).max() > 0.1


def test_random_rotations_have_the_angles_that_were_drawn():
    for n in (1, 5):
        weight = np.asarray(exponential.random_weight(jax.random.key(n), (3, n, n)))
        np.testing.assert_array_equal(weight, -weight.swapaxes(1, 2))
        assert np.linalg.norm(weight, 2, (1, 2)).max() <= np.pi * (1 + 1e-12)
        assert n == 1 or np.abs(weight[0] - weight[1]).max() > 0.1
    np.testing.assert_allclose(np.linalg.det(jax.jit(exponential.dense)(weight)), 1, rtol=1e-12)


def test_weights_rounded_to_bfloat16_are_never_claimed_to_be_orthogonal():
    """Random orthogonal matrices of side 64, rounded: each norm is near 1.002, and that is what is proved."""
    model = make(orthogonal="manifold", width=64, identity_start=False, depth=1, premix=False, neck="l2")
    variables = start(model)
    claimed = []
    for dtype in (jnp.bfloat16, jnp.float32):
        params = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype).astype(jnp.float64), variables["params"])
        frozen = lipjax.freeze(model, {**variables, "params": params})
        row = next(row for row in frozen.lipschitz_report() if row.name == "block_01/linear")
        exact = np.linalg.norm(np.asarray(params["block"]["orthogonal_map"][0]), 2)
        assert exact <= row.claimed <= exact * (1 + 1e-7)
        claimed.append(row.claimed)
    assert 1.0005 < claimed[0] < 1.005 and 1 < claimed[1] < 1 + 1e-6


def test_a_block_costs_two_products_with_tokens():
    model = make(depth=3, neck="l2")
    variables = jax.eval_shape(lambda: start(model))
    batch, tokens, width, depth = 5, 16, 16, 3
    images = jnp.zeros((batch, *SHAPE))
    network = jax.eval_shape(lambda v: built(model, v), variables)
    found, unknown = count(jax.make_jaxpr(lambda n, x: n(x))(network, images))
    assert unknown == []
    assert sum(found.values()) == depth * 2 * 2 * batch * tokens * width**2 + 2 * batch * width * 3
    build = count(jax.make_jaxpr(lambda v: model.apply(v, method="build"))(variables))[0]
    merged = depth * 2 * width**3
    assert build["highest"] >= merged and build["highest"] < 100 * merged


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("lipnext:cifar10", (32, 32, 3), 10),
        ("lipnext:cifar100", (32, 32, 3), 100),
        ("lipnext:tiny_imagenet", (64, 64, 3), 200),
        ("lipnext:imagenet", (224, 224, 3), 1000),
        ("lipnext:imagenet,deep", (224, 224, 3), 1000),
    ],
)
def test_configs_have_the_published_sizes(name, shape, classes):
    """Two square matrices a block, and little else: 64 Mi numbers of L32W1024, and so on."""
    config, _ = config_file.read_config(name, [])
    model = get_model(config.model, input_shape=shape, num_classes=classes)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))["params"]
    found = sum(leaf.size for leaf in jax.tree.leaves(params))
    depth, width = model.depth, model.width
    squares = 2 * depth * width**2
    assert found == squares + depth * (width + 16 * 16) + classes * (width + 1) + 1
    published = {1024: 64 * 2**20, 2048: 256 * 2**20, 4096: 2**30, 2896: 1.07e9}[width]
    assert abs(squares / published - 1) < 0.01


def test_bfloat16_and_loops_change_nothing_but_rounding():
    model = make(depth=3)
    variables = jax.tree.map(lambda a: a.astype(jnp.float32), start(model))
    network = built_to_train(model, variables)
    images = jax.random.uniform(jax.random.key(1), (4, *SHAPE), jnp.float32)
    features = jax.jit(lambda network, x, how: network.features_and_means(x, how)[0], static_argnums=2)
    plain = np.asarray(jax.jit(lambda network, x: network.features(x))(network, images))
    looped = np.asarray(features(network, images, Application(scan=True)))
    np.testing.assert_allclose(looped, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    narrow = np.asarray(features(network, images, Application("bfloat16")))
    error = np.linalg.norm(narrow - plain) / np.linalg.norm(plain)
    assert 1e-5 < error < 0.05  # of bfloat16, but not more than a few of its roundings


def test_what_was_trained_is_checked_by_the_other_program(tmp_path):
    model = make(depth=1)
    variables = start(model)
    frozen = lipjax.freeze(model, stepped(model, variables, 2))
    assert frozen.sha256() != lipjax.freeze(model, variables).sha256()
    pixels = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8)
    certificate = frozen.certify(pixels / np.float64(255))
    about = {"name": "made up", "split": "test", "num_images": 6, "of": 6, "pixel_max": 255}
    labels = np.zeros(6, np.int32)
    frozen.save(tmp_path / "frozen")
    digest = fingerprint(pixels, labels)
    write_certificate(tmp_path, frozen, certificate, pixels, labels, about | {"sha256": digest}, holds_split=True)
    code, lines = checker.check(tmp_path)
    assert code == 0, lines
    again = lipjax.FrozenNetwork.load(tmp_path / "frozen")
    np.testing.assert_array_equal(again.certify(pixels / np.float64(255)).radii, certificate.radii)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 3}, r"tile the image: .* images \(8, 8\)"),
        ({"tokens": 0}, "tile the image"),
        ({"width": 3, "shift": 1 / 3}, "patches of 2 x 2 pixels have 4 numbers, more than width 3"),
        ({"shift": 1 / 5}, "whole number of the 16 channels, at least 1, got 0.2"),
        ({"shift": 1 / 32}, "0.5 channels"),
        ({"shift": 0.3125}, "at most 1/4"),
        ({"shift": 0.0}, "shift"),
        ({"absolute": 0.3}, "absolute to be a fraction"),
        ({"absolute": 0.0}, "absolute"),
        ({"absolute": 1.5}, "absolute"),
        ({"width": 17, "shift": 1 / 17, "activation": "maxmin"}, "even width"),
        ({"regions": 3}, "divide the grid of 4 x 4 tokens, got 3"),
        ({"neck_features": 7}, "even neck_features"),
        ({"depth": 0}, "depth >= 1"),
        ({"pool_delta": 0.0}, "pool_delta"),
        ({"orthogonal": "cayley"}, "orthogonal to be one of"),
        ({"neck": "mean"}, "neck to be one of"),
        ({"activation": "relu"}, "activation to be one of"),
        ({"positions": "learned"}, "positions to be one of"),
        ({"stem": "vit"}, "stem to be one of"),
        ({"residual_blocks": -1}, "residual_blocks >= 0"),
        ({"width": 17, "shift": 1 / 17, "residual_blocks": 1}, "residual_blocks >= 0, and an even width"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    make()  # control
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_maps_that_are_not_square():
    model = LipNeXt((4, 8, 3), 3, tokens=2, width=16, depth=1, regions=2, neck_features=4, activation="maxmin")
    model.check()
    network = jax.eval_shape(lambda: built(model, start(model)))
    assert dict(zip(network.names, network.ops, strict=True))["pool"].out_shape == (2, 2, 16)
    with pytest.raises(ValueError, match="square map"):
        LipNeXt((4, 8, 3), 3, tokens=2, width=16, depth=1, regions=2, neck="patches").check()
    assert isinstance(network.ops[0], operators.SpaceToDepth)
