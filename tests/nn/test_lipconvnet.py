"""LipConvnets: sizes, forms of one function, proofs about frozen networks, training with every head."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiers import everyday
from training_helpers import equations, final_state, npz_file, quick_compiles, scratch, tiny_config  # noqa: F401

from lipjax import FrozenNetwork, NotCertifiable, UserError, bounds, freeze, losses, operators
from lipjax.evaluation import evaluate
from lipjax.models import LipConvnet, get_model
from lipjax.nn import COLLECTION, LAYERS
from lipjax.training import loop, step

SMALL = {"depth": 2, "num_blocks": 2, "width": 4, "padding": "CIRCULAR"}
# One block: a 3x3 convolution of stride 1 and a 1x1 one of stride 2.
BLOCK = {"num_blocks": 1, "width": 4, "padding": "CIRCULAR"}


def named(input_shape, options):
    """The model of a config: fields of SOC are for SOC."""
    if options.get("layer", "soc") != "soc":
        options = {name: value for name, value in options.items() if name not in LAYERS["soc"].fields}
    return get_model({"name": "lipconvnet", **options}, input_shape=input_shape, num_classes=4)


def small(**options):
    return named((8, 8, 3), {**SMALL, **options})


def one_block(**options):
    return named((6, 4, 3), {**SMALL, **BLOCK, **options})


def made(model, seed=0, dtype=jnp.float64):
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *model.input_shape)))
    return jax.tree.map(lambda a: a.astype(dtype), variables)


def built(model, variables, train=False):
    return jax.jit(lambda v: model.apply(v, train, method="build"))(variables)


run = jax.jit(lambda network, x: network(x))


# From specs of the papers' code: raw parameters in millions for depths 5, 10, ..., 40, 10 classes.
PLAIN = (17.7, 20.9, 24.1, 27.2, 30.4, 33.5, 36.6, 39.8)
POOLED = (25.2, 30.2, 35.1, 40.1, 45.1, 50.1, 55.1, 60.0)


@pytest.mark.parametrize(
    ("variant", "depths"),
    everyday(
        [("plain", (1, 2)), ("pooled", (1,)), ("plain", range(3, 9)), ("pooled", range(2, 9))],
        ("plain", (1, 2)),
        ("pooled", (1,)),
    ),
)
def test_parameter_counts_at_published_width(variant, depths):
    options = {"head": "orthonormal"} if variant == "plain" else {"head": "mlp", "activation": "householder"}
    for n in depths:
        millions = (PLAIN if variant == "plain" else POOLED)[n - 1]
        model = LipConvnet((32, 32, 3), 10, depth=5 * n, variant=variant, **options)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        counted = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert abs(counted / 1e6 - millions) < 0.06, n


@pytest.mark.nightly
@pytest.mark.parametrize("terms", [5, 12, None])
def test_the_forms_compute_one_function(terms):
    """In float32 to 1e-5; the exact exponential as a series of as many terms as the norm asks for."""
    with jax.enable_x64(False):
        x = jax.random.normal(jax.random.key(1), (3, 6, 4, 3))
        outputs = {}
        for form in ("spatial", "response", "series"):
            model = one_block(train_terms=terms, form=form)
            network = built(model, made(model, dtype=jnp.float32), train=True)
            expected = {"spatial": "ConvExponential", "response": "CircularConv", "series": "CircularSeries"}[form]
            assert expected in {type(op).__name__ for op in network.ops}
            outputs[form] = np.asarray(run(network, x))
        for form in ("response", "series"):
            np.testing.assert_allclose(outputs[form], outputs["spatial"], atol=1e-5)
        other = one_block(train_terms=3, form="spatial")  # control
        different = np.asarray(run(built(other, made(other, dtype=jnp.float32), True), x))
        assert np.abs(outputs["spatial"] - different).max() > 1e-4


def test_auto_takes_one_of_the_forms_and_the_response_outside_of_training():
    model = small()

    def kinds_of(train):  # traced, not run
        return {type(op).__name__ for op in jax.eval_shape(lambda: built(model, made(model), train)).ops}

    kinds, evaluated = kinds_of(True), kinds_of(False)
    assert kinds & {"ConvExponential", "CircularConv", "CircularSeries"}
    assert "CircularConv" in evaluated and not evaluated & {"ConvExponential", "CircularSeries"}


@pytest.mark.nightly
def test_a_training_step_advances_the_vectors_and_evaluation_does_not():
    model = one_block(head="orthonormal")
    variables = made(model)

    @functools.partial(jax.jit, static_argnums=1)
    def state_after(variables, train):
        return model.apply(variables, train, method="build", mutable=[COLLECTION])[1]

    advanced = state_after(variables, True)
    before, after = (jax.tree.leaves(v[COLLECTION]) for v in (variables, advanced))
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after, strict=True))
    kept = state_after(variables, False)
    for a, b in zip(before, jax.tree.leaves(kept[COLLECTION]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"train_terms": 6, "scale": 0.7}, 1),  # longer than 1 in training alone, and its 1x1 layer not
        ({"train_terms": 5, "scale": 1.2, "padding": "ZERO"}, 1),
        ({"train_terms": 5, "eval_terms": None, "scale": None, "form": "response"}, 2),
        ({"train_terms": 4, "scale": 0.7}, 0),
        ({"train_terms": None, "eval_terms": None, "scale": None}, 0),
    ],
)
def test_the_same_norms_are_estimated_in_training_and_out_of_it(options, count):
    model = one_block(**options)

    def vectors(train):
        def build():
            variables = model.init(jax.random.key(0), jnp.zeros((1, *model.input_shape)))
            network, _ = model.apply(variables, train, method="build", mutable=[COLLECTION])
            return bounds.init_vectors(network, jax.random.key(0)), variables[COLLECTION]["vectors"]

        found, initial = jax.eval_shape(build)
        assert all(vector.shape == initial[name].shape for name, vector in found.items())
        return set(found)

    # Which training counts as 1: an ordinary convolution, whose norm only evaluation estimates, as of explicit kernels.
    one_tap = {"block1_conv1/linear"}
    assert vectors(True) | one_tap == vectors(False) and len(vectors(True)) == count


def test_forms_whose_norms_cannot_be_estimated_alike_are_refused():
    changes = {"model.form": "spatial", "model.train_terms": 6, "model.eval_terms": None, "model.scale": 1.2}
    with pytest.raises(UserError, match='norms of .*_conv0/linear.* Set config.model.form to "response"'):
        loop.Run(training_config(**changes), 0)
    loop.Run(training_config(**changes | {"model.form": "response"}), 0)  # control


VARIANTS = {
    "soc, response": {},
    "soc, exact": {"train_terms": None, "eval_terms": None, "scale": None, "head": "orthonormal"},
    "soc, zero padding": {"padding": "ZERO", "activation": "householder"},
    "cayley": {"layer": "cayley", "head": "orthonormal", "activation": "householder2"},
    "pooled": {"variant": "pooled", "pooling": "projection", "head": "linear", "scale": 1.0},
    "mlp": {"variant": "pooled", "head": "mlp", "head_features": 12},
}


@pytest.mark.parametrize("name", everyday(VARIANTS, "mlp"))
def test_frozen_networks_certify_save_and_load(name, tmp_path):
    model = small(input_std=0.5, **VARIANTS[name])
    variables = made(model, dtype=jnp.float32)
    frozen = freeze(model, variables)
    # Every layer is orthogonal, or 1-Lipschitz: the product of the proved bounds is 1 / std and no more.
    product = np.prod([row.claimed for row in frozen.lipschitz_report()])
    assert 2 <= product <= 2 * (1 + 1e-8)
    images = np.random.default_rng(0).random((6, 8, 8, 3))
    logits = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32)))
    np.testing.assert_allclose(frozen(images), logits, atol=2e-5)
    certificate = frozen.certify(images)
    assert (certificate.radii > 0).all()
    assert (frozen.margins(images)[0] == certificate.predictions).all()
    # Proved, and no larger than what the plain formula gives without rounding errors.
    frozen.save(tmp_path)
    again = FrozenNetwork.load(tmp_path)
    np.testing.assert_array_equal(again(images), frozen(images))
    np.testing.assert_array_equal(again.certify(images).radii, certificate.radii)
    document = json.loads((tmp_path / "network.json").read_text())
    assert [op["type"] for op in document["ops"]] == [type(op).__name__ for op in frozen.network.ops]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["soc, response", "soc, zero padding", "cayley", "mlp"])
def test_no_perturbation_inside_the_radius_changes_the_class(name):
    """Steps straight at the nearest boundary of the linearised network; outside the radius they do change it."""
    model = small(input_std=0.5, **VARIANTS[name])
    frozen = freeze(model, made(model, dtype=jnp.float32))
    images = 0.25 + 0.5 * np.random.default_rng(1).random((8, 8, 8, 3))
    certificate = frozen.certify(images)
    network = jax.tree.map(jnp.asarray, frozen.network)
    rows = jnp.arange(len(images))

    @jax.jit
    @jax.grad
    def climb(x):
        y = network(x)
        return jnp.sum(y[rows, certificate.rivals] - y[rows, certificate.predictions])

    def attacked(scale):
        x = images
        for _ in range(30):
            direction = np.asarray(climb(jnp.asarray(x)))
            direction = direction / np.sqrt((direction**2).sum((1, 2, 3), keepdims=True))
            radii = scale * certificate.radii[:, None, None, None]
            x = x + radii / 10 * direction
            moved = x - images
            length = np.sqrt((moved**2).sum((1, 2, 3), keepdims=True))
            x = images + moved * np.minimum(1, radii / length)
        return np.argmax(np.asarray(run(network, jnp.asarray(x))), axis=1) != certificate.predictions

    assert not attacked(1 - 1e-9).any()
    assert attacked(30.0).any()  # control


def test_a_kernel_that_is_not_skew_is_not_certified():
    model = small(padding="ZERO")
    frozen = freeze(model, made(model))
    ops = list(frozen.network.ops)
    index = next(i for i, op in enumerate(ops) if isinstance(op, operators.ConvExponential))
    kernel = ops[index].kernel.copy()
    kernel[0, 0, 0, 0] = np.nextafter(kernel[0, 0, 0, 0], 1)
    ops[index] = dataclasses.replace(ops[index], kernel=kernel)
    tampered = FrozenNetwork(dataclasses.replace(frozen.network, ops=tuple(ops)))
    with pytest.raises(NotCertifiable, match=f"{frozen.network.names[index]}.*skew"):
        tampered.margin_lipschitz()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5}, "multiple of num_blocks"),
        ({"width": 3}, "even width"),
        ({"num_blocks": 4, "depth": 4}, "multiples of 16"),
        ({"layer": "bcob"}, "layer to be one of"),
        ({"layer_options": {"rank": 2}}, "layer 'soc' has the fields .* got"),
        ({"head": "ortho"}, "head to be one of"),
        ({"padding": "SAME"}, "padding"),
        ({"padding": "ZERO", "eval_terms": None}, "needs padding 'CIRCULAR'"),
        ({"train_terms": 0}, "train_terms >= 1"),
        ({"scale": -1.0}, "scale > 0"),
        ({"form": "fourier"}, "form to be one of"),
        ({"padding": "ZERO", "form": "series"}, "form"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        get_model({"name": "lipconvnet", **SMALL, **options}, input_shape=(8, 8, 3), num_classes=4)


def training_config(**changes):
    config = tiny_config(**{k: v for k, v in changes.items() if not k.startswith("model.")})
    options = {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")}
    with config.unlocked():
        config.model = ConfigDict(
            {
                "name": "lipconvnet",
                **SMALL,
                **BLOCK,
                "input_mean": (0.5,),
                "input_std": (1.0,),
                "head": "lln",
                **options,
            }
        )
        config.certify.attack_steps = 0  # tests/system/test_falsify.py attacks
    return config.lock()


MLP = {"model.head": "mlp", "model.variant": "pooled", "model.head_features": 10, "loss.name": "curvature"}


@pytest.mark.x64_off
def test_a_step_with_the_curvature_of_an_mlp_head_is_traced_with_the_shapes_of_its_state():
    """Not run: the numbers of its loss are those of the test below."""
    images, labels = jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.uint8), jax.ShapeDtypeStruct((16,), jnp.int32)
    counted = []
    for loss in ("curvature", "cross_entropy"):
        run = loop.Run(training_config(**{**MLP, "loss.name": loss}), 0)
        train_step = step.make_train_step(run.model, run.optimizer, run.config, run.mesh, run.pixel_max)
        traced, (state, metrics) = jax.make_jaxpr(train_step, return_shape=True)(run.abstract_state, images, labels, {})
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, run.abstract_state)
        assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
        counted.append(len(list(equations(traced.jaxpr))))
    assert counted[0] > counted[1]  # control: without it there is less to do


@pytest.mark.x64_off
@pytest.mark.parametrize("classes", [4, 21])  # a table of all pairs; the pairs of every image
def test_the_curvature_loss_of_a_step_is_that_of_the_exact_curvatures(classes):
    """Of one feature: a Hessian is then one number, sum_h w^-_h w1_h^2 / 4, which power iteration gives exactly."""
    rng = np.random.default_rng(0)
    w1, b1, w2, b2 = (rng.normal(size=s).astype(np.float32) for s in ((6, 1), (6,), (classes, 6), (classes,)))
    network = types.SimpleNamespace(head=operators.MLPHead(*map(jnp.asarray, (w1, b1, w2, b2))))
    logits, labels = rng.normal(size=(5, classes)).astype(np.float32), rng.integers(0, classes, 5)
    constants, lip = {"lipschitz": jnp.ones((classes, classes))}, {"head": {"vector": jnp.ones(1)}}
    config = ConfigDict({"name": "curvature", "curvature_weight": 5.0})
    seen = jnp.asarray(logits), jnp.asarray(labels)
    found = step._per_example_loss(config, network, lip, *seen, constants, {}, None)
    # table[i, j]: how far logit i less logit j bends downwards; the larger of both sides counts.
    table = (np.maximum(w2[None] - w2[:, None], 0) * w1[:, 0] ** 2).sum(2) / 4
    order = [[i for i in np.argsort(-row) if i != label][:9] for row, label in zip(logits, labels, strict=True)]
    curvatures = np.maximum(table, table.T)[labels[:, None], np.array(order)]
    expected = losses.curvature_penalty(*seen, jnp.asarray(curvatures), 5.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Controls: one side alone is another loss, and so is cross-entropy.
    for other in (table[labels[:, None], np.array(order)], 0 * curvatures):
        assert np.abs(losses.curvature_penalty(*seen, jnp.asarray(other), 5.0) / expected - 1).max() > 0.01


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.parametrize(
    "changes",
    [
        MLP,
        {"model.layer": "cayley", "model.head": "orthonormal", "loss.name": "certificate_regularization"},
        {"model.activation": "householder2", "model.padding": "ZERO", "model.fast_gradient": True},
    ],
)
def test_training_certifies_and_resumes(changes, tmp_path):
    config = training_config(**changes)
    run = loop.train(config, tmp_path, 0)
    report = evaluate.certify_run(tmp_path, config, 0, run)
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert report["clean_accuracy"] >= report["certified_accuracy"]["0.1"] >= report["certified_accuracy"]["0.25"]
    assert abs(np.prod([layer["bound"] for layer in certificate["layers"]]) - 1) < 1e-8
    # The estimate of training is what the proof says, up to what float32 and power iteration leave open.
    images, _ = evaluate.test_images(run.dataset, evaluate.drawn_indices(run.dataset, 0), 8)
    state = final_state(tmp_path, config)
    prepare, _ = step.make_eval_step(run.model, config, run.mesh, run.pixel_max)
    network, constants = prepare(state.params, state.lip)
    pixels = jnp.asarray(images / np.float32(run.pixel_max), jnp.float32)
    features = network.features(pixels)
    estimated = np.asarray(step.radius_estimate(network, constants, features, network.head(features)))
    frozen = freeze(run.model, {"params": state.params, COLLECTION: state.lip})
    proved = frozen.certify(np.asarray(pixels))
    assert (proved.radii >= 0.9 * estimated - 1e-4).all()


@pytest.mark.nightly
@pytest.mark.x64_off
def test_a_head_is_trained_on_frozen_features(tmp_path):
    first = training_config(**{"num_epochs": 1})
    loop.train(first, tmp_path / "first", 0)
    changes = {"train_head_only": True, "init_from": str(tmp_path / "first"), "optimizer.weight_decay": 0.1}
    config = training_config(**{"model.head": "linear", **changes})
    loop.train(config, tmp_path / "second", 0)
    before, after = final_state(tmp_path / "first", first), final_state(tmp_path / "second", config)
    for name in before.params:
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before.params[name], after.params[name])
        assert all(jax.tree.leaves(same)) == (name != "head"), name
    # Heads of other shapes start afresh; other layers are refused.
    other = training_config(**{**changes, "model.head": "mlp", "model.head_features": 6})
    features = before.params["head"]["matrix"].shape[1]
    assert loop.Run(other, 0).fresh_state().params["head"]["w1"].shape == (6, features)
    with pytest.raises(UserError, match="other layers than config.model"):
        loop.Run(training_config(**{**changes, "model.width": 6}), 0).fresh_state()
    with pytest.raises(UserError, match="split them by another seed"):
        loop.Run(config, 1).fresh_state()
    with pytest.raises(UserError, match="no training run"):
        loop.Run(training_config(**{**changes, "init_from": str(tmp_path / "nowhere")}), 0).fresh_state()


def test_the_curvature_loss_needs_an_mlp_head():
    with pytest.raises(UserError, match="curvature"):
        loop.Run(training_config(**{"loss.name": "curvature"}), 0)
