"""Layers by name: every one of them in the skeletons, from training to a certificate that the checker proves again."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checker_helpers import write_run
from tiers import everyday
from training_helpers import quick_compiles, scratch  # noqa: F401

import lipjax
from lipjax import NotCertifiable, UserError, bounds, checker, losses
from lipjax.models import MODELS, get_model
from lipjax.nn import ALL_ACTIVATIONS, COLLECTION, LAYERS, LayeredModel, LinearHead, flatten, layer_fields
from lipjax.training.choices import LAYER, update
from lipjax.training.config import default_config, load_config, validate
from lipjax.training.same_run import plain

TINY = {"name": "compared", "num_blocks": 2, "block_depth": 1, "width": 4, "input_mean": (0.5,)}
SHAPE, CLASSES = (4, 4, 2), 3


def tiny(layer, **options):
    return get_model({**TINY, "layer": layer, **options}, input_shape=SHAPE, num_classes=CLASSES)


def trained(model, steps=2):
    """Some steps of gradient descent on random images, in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(4, *model.input_shape)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, 4))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def step(params, lip):
        def loss(params):
            held = {"params": params, COLLECTION: lip}
            network, changed = model.apply(held, True, method="build", mutable=[COLLECTION])
            constants, vectors = bounds.margin_lipschitz_estimate(network, lip["vectors"], 2)
            value = losses.margin(network(x), labels, constants, 0.1).mean()
            return value, {**changed[COLLECTION], "vectors": vectors}

        gradient, lip = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), lip, gradient

    params, lip = variables["params"], variables[COLLECTION]
    for _ in range(steps):
        params, lip, gradient = step(params, lip)
    flat = jax.tree_util.tree_leaves_with_path(gradient)
    assert all(np.isfinite(g).all() for _, g in flat)
    # Every array of weights trains.
    assert all(np.abs(g).max() > 0 for path, g in flat if np.ndim(g) > 1), [jax.tree_util.keystr(p) for p, _ in flat]
    return {"params": params, COLLECTION: lip}


# What rounding may add to the product of all proved norms.
ROUNDING = 1 + 1e-6


class Strided(LayeredModel):
    """One layer that halves the map and triples the channels, and a head."""

    def layers(self):
        return [self.conv("layer", 6, 3, 2), flatten], LinearHead(self.num_classes, name="head")


def proved(model, directory):
    """The frozen network after some training, and the product of its norms; the checker agrees with its certificate."""
    frozen = lipjax.freeze(model, trained(model))
    write_run(directory, frozen.network)
    code, lines = checker.check(directory)
    assert code == 0, lines
    return frozen, math.prod(row.claimed for row in frozen.lipschitz_report())


@pytest.mark.x64_off
@pytest.mark.parametrize("name", everyday(LAYERS, "plain", "cayley", "aoc", "sll"))
def test_every_layer_trains_freezes_and_certifies(name, tmp_path):
    product = proved(Strided(SHAPE, CLASSES, layer=name), tmp_path)[1]
    norm = LAYERS[name].norm
    assert product > ROUNDING if norm is None else product <= norm * ROUNDING  # control: nothing holds plain layers


@pytest.mark.x64_off
@pytest.mark.parametrize("name", everyday((n for n, layer in LAYERS.items() if layer.norm), "cayley"))
def test_the_network_of_the_comparison_is_proved_with_every_layer(name, tmp_path):
    frozen, product = proved(tiny(name), tmp_path)
    assert product <= LAYERS[name].norm * ROUNDING
    # The first features are the logits: sqrt(2) between any two of them.
    between = frozen.network.head.pairwise_bound()
    np.testing.assert_allclose(between[~np.eye(CLASSES, dtype=bool)], 2**0.5, rtol=1e-9)


POTENTIAL = {"width": 4, "conv_depth": 1, "conv_hidden": 3, "dense_depth": 1, "dense_hidden": 5, "pool": 2}
NETWORKS = {
    "sll": {"name": "potentialnet", **POTENTIAL},
    "cpl": {"name": "potentialnet", "layer": "cpl", **POTENTIAL},
    "aol": {"name": "patchnet", "patch": 2, "width": 4, "conv_depth": 1, "features": 2, "dense_depth": 2},
    "aol_conv": {"name": "concatnet", "num_blocks": 2, "block_depth": 2, "width": 4},
    "sandwich": {"name": "sandwichnet", "widths": (4,), "dense_widths": (6,)},
    "staged": {"name": "stagednet", "widths": (4, 6), "depths": (1, 0), "dense_widths": (4,), "centering": True},
    "bronet": {
        **{"name": "bronet", "depth": 1, "width": 4, "residual_depth": 1, "crop": False, "stem_kernel": 1},
        **{"stem_strides": 2, "stem_padding": 0, "neck": "norm", "neck_patch": 2, "neck_features": 6},
        **{"dense": "bro", "dense_depth": 1},
    },
}


@pytest.mark.x64_off
@pytest.mark.parametrize("name", everyday(NETWORKS, "aol"))
def test_networks_as_published_train_freeze_and_certify(name, tmp_path):
    model = get_model(NETWORKS[name], input_shape=SHAPE, num_classes=CLASSES)
    frozen, product = proved(model, tmp_path)
    rows = {row.name: row.claimed for row in frozen.lipschitz_report()}
    free = math.prod(rows.get(f"{layer}/linear", 1) for layer in ("stem", "residual_01"))  # whose norms nothing holds
    assert product <= free * ROUNDING
    assert (free == 1) == (name != "bronet")
    if "pool" in rows:  # sums of 2 x 2 pixels, channel by channel, over 2
        pool = frozen.network.ops[frozen.network.names.index("pool")]
        np.testing.assert_array_equal(pool.kernel, np.full((2, 2, 1, 4), 0.5))
        assert (pool.groups, pool.strides, rows["pool"]) == (4, 2, pytest.approx(1, abs=1e-9))


@pytest.mark.parametrize("name", everyday((name for name, layer in LAYERS.items() if layer.dense is not None), "aoc"))
def test_dense_counterparts(name):
    class Net(LayeredModel):
        def layers(self):
            return [flatten, self.dense("dense", 6)], self.orthonormal_head()

    model = Net((2, 2, 2), CLASSES, layer=name)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 2)))
    frozen = lipjax.freeze(model, variables)
    bound = math.prod(row.claimed for row in frozen.lipschitz_report() if row.name.startswith("dense"))
    assert LAYERS[name].norm is None or bound <= LAYERS[name].norm * ROUNDING
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 100, 8)))
    image = jax.jit(functools.partial(functools.reduce, lambda z, op: op(z), frozen.network.ops[1:]))
    far = np.linalg.norm(image(x) - image(y), axis=1) / np.linalg.norm(x - y, axis=1)
    assert far.max() <= bound and far.max() > 0.05 * bound and image(x).shape == (100, 6)


def test_layers_without_a_dense_counterpart_say_so():
    class Net(LayeredModel):
        def layers(self):
            return [flatten, self.dense("dense", 6)], self.orthonormal_head()

    with pytest.raises(ValueError, match="'soc' has no dense counterpart; those with one are"):
        jax.eval_shape(Net((2, 2, 2), CLASSES).init, jax.random.key(0), jnp.zeros((1, 2, 2, 2)))


@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
def test_every_activation_fits_the_skeleton(activation):
    model = tiny("plain", activation=activation, head="lln")
    network = jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), jnp.zeros((1, *SHAPE))), method="build"))
    kinds = {type(op).__name__ for name, op in zip(network.names, network.ops, strict=True) if "activation" in name}
    assert len(kinds) == 1


@pytest.mark.parametrize("layer", everyday(LAYERS, "soc_frequency", "cayley", "aoc", "bro", "sandwich", "plain"))
def test_lipconvnet_takes_every_layer(layer):
    """Shapes only: a convolution of stride 1, a strided one of one tap, an orthonormal head."""
    options = {"name": "lipconvnet", "layer": layer, "depth": 2, "num_blocks": 1, "width": 6, "head": "orthonormal"}
    model = get_model(options, input_shape=(4, 6, 3), num_classes=4)
    network = jax.eval_shape(
        lambda: model.apply(model.init(jax.random.key(0), jnp.zeros((1, 4, 6, 3))), method="build")
    )
    assert network.ops[-1].out_shape == (2 * 3 * 12,) and network.head.matrix.shape == (4, 72)


def test_the_network_of_the_comparison_has_the_papers_sizes():
    """Parameters in millions, widths XS to L: with kernels of 3x3, and of 1x1."""
    stated = {3: (1.57, 6.28, 25.1, 100.5), 1: (0.70, 2.8, 11.2, 44.8)}
    for kernel_size, millions in stated.items():
        for width, expected in list(zip((16, 32, 64, 128), millions, strict=True))[::kernel_size]:
            options = {"name": "compared", "layer": "plain", "width": width, "kernel_size": kernel_size}
            model = get_model(options, input_shape=(32, 32, 3), num_classes=10)
            shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
            assert abs(sum(a.size for a in jax.tree.leaves(shapes)) / 1e6 - expected) < 0.01 * expected


def test_both_channels_of_a_pair_stay_where_half_of_them_are_left_out():
    model = tiny("plain")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    network = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 4)))
    ends = [op for name, op in zip(network.names, network.ops, strict=True) if name.startswith("block1_end")]
    y = functools.reduce(lambda z, op: op(z), ends[:2], x)
    np.testing.assert_array_equal(y, np.asarray(x)[..., [0, 2]])  # halves are pairs: channels 0 and 2 are the first one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "aocc"}, "layer to be one of"),
        ({"layer": "aoc", "rank": 0}, "rank >= 1 or None"),
        ({"layer": "aoc", "method": "svd"}, "method to be one of"),
        ({"layer": "aoc", "num_iters": 2.5}, "num_iters to be int"),
        ({"layer": "cayley", "padding": "ZERO"}, r"'cayley' has no padding; .*layer=\"cayley\""),
        ({"layer": "soc", "padding": "ZERO", "train_terms": None}, "needs padding 'CIRCULAR'"),
        ({"layer": "aoc", "layer_options": {"scale": 0.5}}, r"'aoc' has the fields .*, got \['scale'\]"),
        ({"layer": "aoc", "width": 6}, "that 4 divides"),
        ({"layer": "aoc", "num_blocks": 3}, "8 pixels a side"),
        ({"layer": "aoc", "head": "mlp"}, "head to be one of"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    get_model({**TINY, "layer": "aoc"}, input_shape=SHAPE, num_classes=CLASSES)  # control
    with pytest.raises(UserError, match=message):
        get_model({**TINY, **options}, input_shape=SHAPE, num_classes=CLASSES)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_field_of_a_layer_reaches_its_module(layer):
    """Known to the model, with its own default in a config; another value makes another model."""
    config = default_config(model="compared", layer=layer)
    fields = layer_fields(layer)
    others = {name for owner in LAYERS.values() for name in owner.fields} - set(fields)
    assert config.model.layer == layer and set(fields) <= set(config.model) and not others & set(config.model)
    validate(config)
    sizes = {"input_shape": (32, 32, 3), "num_classes": CLASSES}
    reference = get_model(config.model, **sizes)
    assert reference.fields_of_layer() == {name: field.default for name, field in fields.items()}
    for name, field in fields.items():
        value = next(v for v in (*field.known, 3, 0.5, True) if v != field.default and _fits(field, name, v))
        other = default_config(model="compared", layer=layer)
        other.model[name] = value
        try:
            built = get_model(other.model, **sizes)
        except UserError as error:  # values that fit each other alone, such as an exact exponential
            assert "needs padding" in str(error)
            continue
        assert built.fields_of_layer()[name] == value
        kind, given = LAYERS[layer], {"kernel_size": 3, "name": None}
        given |= {} if kind.square else {"features": 4, "strides": 1}
        module = kind.conv(**given, **({} if kind.inner else {"activation": None}), **built.fields_of_layer())
        assert getattr(module, name) == value, name


def _fits(field, name, value):
    try:
        field.check(name, value)
    except ValueError:
        return False
    return True


def test_a_layer_brings_its_fields_and_takes_those_of_the_last_one_away(tmp_path):
    config = default_config(model="lipconvnet")
    update(config, {"model.layer": "aoc", "model.num_iters": 15, "model.padding": "ZERO"})
    assert config.model.num_iters == 15 and "train_terms" not in config.model
    update(config, {"model.layer": "rko"})  # what both have stays
    assert (config.model.num_iters, config.model.padding) == (15, "ZERO") and "rank" not in config.model
    update(config, {"model.name": "liresnet"})
    assert not {"layer", *layer_fields("rko")} & set(config.model)
    update(config, {"model.name": "compared", "model.layer": "soc"})
    assert config.model.train_terms == 5
    config.model.train_terms = None  # an integer that may be left out, for each config by itself
    assert default_config(model="compared", layer="soc").model.train_terms == 5
    (tmp_path / "config.json").write_text(json.dumps({"config": plain(config), "seed": 0}))
    assert load_config(tmp_path)[0].model.layer == "soc"
    with pytest.raises(UserError, match="config.model.layer: expected nothing, since liresnet has its own layers"):
        default_config(layer="soc")
    with pytest.raises(UserError, match="config.model.layer: expected one of"):
        default_config(model="lipconvnet", layer="socks")
    assert set(LAYER.names) == set(LAYERS)
    own = {name: set(MODELS[name].__dataclass_fields__) for name in MODELS if issubclass(MODELS[name], LayeredModel)}
    clashes = [(name, field) for name in own for layer in LAYERS for field in layer_fields(layer) if field in own[name]]
    assert clashes == []  # a field of config.model would mean two things


def test_what_has_no_bound_is_refused_by_name():
    """A control for the test of all layers: a promise is none."""
    model = Strided(SHAPE, CLASSES, layer="cholesky")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    network, _ = jax.jit(lambda v: model.apply(v, True, method="build", mutable=[COLLECTION]))(variables)
    with pytest.raises(NotCertifiable, match="Contraction"):
        bounds.margin_lipschitz_bound(jax.tree.map(np.asarray, network))
