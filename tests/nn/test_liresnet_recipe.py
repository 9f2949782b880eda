"""What the recipe of 2024 adds to LiResNet: against the original code to 1e-9, in training, and when it is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import GOLDEN, hwio, load, nhwc, relative
from tiers import everyday
from training_helpers import differing, quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

import lipjax
from lipjax import bounds, interop, losses, operators
from lipjax.errors import NotCertifiable
from lipjax.models import LiResNet
from lipjax.nn import COLLECTION, CholeskyConv, CholeskyDense, CholeskyStack, LinearResidual, advance_means
from lipjax.training.loop import Run

PARITY = 1e-9
NETS = sorted(path.stem for path in GOLDEN.glob("liresnet*.npz"))
RECIPE = {
    "model.neck": "cholesky",
    "model.dense_depth": 2,
    "model.centering": True,
    "model.small_init": True,
    "optimizer.name": "nadam",
    "optimizer.lookahead_period": 2,
}
SCHEDULE = {"epsilon": 0.1}


def run_through(ops, x):
    for _, op in ops:
        x = op(x)
    return x


def state_dict(name="liresnet_plainhead"):
    arrays, meta = load(name)
    state = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    return arrays, state, meta["constructor"]


def in_their_layout(grads, depth):
    """Gradients of our parameters under the original's names."""
    blocks = [grads[f"block_{i:02d}"] for i in range(1, depth + 1)]
    oihw = lambda a: np.transpose(a, (3, 2, 0, 1))  # noqa: E731
    neck = oihw(grads["neck_conv"]["kernel"])
    size = round((grads["neck_dense"]["matrix"].shape[1] / neck.shape[0]) ** 0.5)
    dense = np.asarray(grads["neck_dense"]["matrix"]).reshape(-1, size, size, neck.shape[0])
    return {
        "stem.0.weight": oihw(grads["stem"]["kernel"]),
        "stem.0.bias": grads["stem"]["bias"],
        "conv.weights": np.stack([oihw(block["weight"]) for block in blocks]),
        "conv.gamma": np.stack([block["gamma"] for block in blocks])[:, :, None, None, None],
        "conv.bias": np.stack([block["bias"] for block in blocks]),
        "neck.kernel": neck.reshape(len(neck), -1),
        "neck.weight": np.transpose(dense, (0, 3, 1, 2)).reshape(len(dense), -1),
        "neck.bias": grads["neck_dense"]["bias"],
        "linear.weights": grads["dense"]["weight"],
        "linear.gamma": grads["dense"]["gamma"][..., None],
        "linear.bias": grads["dense"]["bias"],
        "head.weight": grads["head"]["matrix"],
        "head.bias": grads["head"]["bias"],
    }


@pytest.mark.nightly
@pytest.mark.parametrize("name", NETS)
def test_a_whole_network_of_the_original(name):
    """Evaluation; then the loss of a training step, its gradients, the Lipschitz estimate and the running means."""
    arrays, state, options = state_dict(name)
    model, variables = interop.from_torch("liresnet", state, **options)
    x, labels = nhwc(arrays["input/x"]), jnp.asarray(arrays["input/labels"])
    network = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    features = jax.jit(lambda net, x: net.features(x))(network, x)
    assert relative(features, arrays["output/features_eval"]) < PARITY
    logits = network.head(features)
    assert relative(logits, arrays["output/logits_eval"]) < PARITY
    # By the rows that the head really applies: of length 1 where the last layer is normalised.
    constants = arrays["output/sub_lipschitz_eval"] * network.head.pairwise_lipschitz()
    assert relative(losses.bottom_logit(logits, constants, 36 / 255), arrays["output/trades_y_"][:, -1]) < PARITY
    unit_rows = jnp.abs(jnp.linalg.norm(network.head.matrix, axis=1) - 1).max() < 1e-12
    assert unit_rows == options.get("use_lln", True)
    depth, width = options["depth"], options["width"]
    starts = np.moveaxis(arrays["input/train_init_x/conv"].reshape(depth, width, 16, 16), 1, -1)
    vectors = {f"block_{i + 1:02d}/linear": jnp.asarray(starts[i]) for i in range(depth)}
    vectors["stem/linear"] = nhwc(arrays["input/train_init_x/stem"])[0]

    @jax.jit
    def step(params, x):
        def objective(params, x):
            network, advanced = model.apply(
                {"params": params, COLLECTION: variables[COLLECTION]}, True, method="build", mutable=[COLLECTION]
            )
            product, _ = bounds.feature_lipschitz_estimate(network, vectors, 1)
            features, means = network.features_and_means(x)
            logits = network.head(features)
            loss = losses.emma(logits, labels, product * network.head.pairwise_lipschitz(), 36 / 255).mean()
            return loss, (product, logits, advance_means(advanced[COLLECTION], means))

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)

    (loss, (product, logits, lip)), (grads, grad_x) = step(variables["params"], x)
    assert relative(product, arrays["output/sub_lipschitz_train"]) < PARITY
    margins = logits - jnp.take_along_axis(logits, labels[:, None], 1)
    assert relative(margins, arrays["output/emma_y_train"]) < PARITY
    assert relative(loss, arrays["output/emma_loss_train"]) < PARITY
    assert relative(np.moveaxis(grad_x, -1, 1), arrays["output/grad_x_train"]) < PARITY
    means = [lip[f"block_{i:02d}"]["mean"] for i in range(1, depth + 1)]
    assert relative(np.stack(means), arrays["output/running_mean_after"]) < PARITY
    ours = in_their_layout(grads, depth)
    assert set(ours) == {key.removeprefix("output/grad/") for key in arrays if key.startswith("output/grad/")}
    for there, grad in ours.items():
        assert relative(grad, arrays[f"output/grad/{there}"]) < PARITY, there
    assert relative(logits, arrays["output/logits_eval"]) > 1e-3  # control: batch means are not running means


@pytest.mark.parametrize("name", everyday(NETS, NETS[0]))
def test_the_proved_bound_of_an_imported_network_lies_closely_above_its_exact_norms(name):
    arrays, state, options = state_dict(name)
    model, variables = interop.from_torch("liresnet", state, **options)
    frozen = lipjax.freeze(model, variables)
    rows = {row.name: row.claimed for row in frozen.lipschitz_report()}
    found = np.prod(list(rows.values()))
    exact = float(arrays["output/sub_lipschitz_exact"])
    assert exact <= found <= exact * 1.02
    dense = [f"dense_{i:02d}/linear" for i in range(1, options["mlp_depth"] + 1)]
    assert all(rows[name] < 1 for name in ("neck_conv/linear", *dense))
    kinds = {type(op).__name__ for op in frozen.network.ops}
    assert kinds == {"Conv", "Dense", "Bias", "MaxMin", "Flatten"}
    x = nhwc(arrays["input/x"])
    assert relative(frozen(np.asarray(x)), arrays["output/logits_eval"]) < PARITY


def test_the_neck_is_the_originals():
    z, meta = load("map2vec")
    sizes = meta["constructor"]
    kernel = np.transpose(z["param/kernel"].reshape(6, 6, 4, 4), (2, 3, 1, 0))
    matrix = np.transpose(z["param/weight"].reshape(16, 6, 2, 2), (0, 2, 3, 1)).reshape(16, 24)

    def neck(x, kernel, matrix, bias):
        conv = CholeskyConv(sizes["feat_dim"], 4).apply({"params": {"kernel": kernel}}, (8, 8, 6))
        dense = CholeskyDense(sizes["out_dim"]).apply({"params": {"matrix": matrix, "bias": bias}}, (24,))
        return run_through([*conv, ("flatten", operators.Flatten((2, 2, 6))), *dense], x)

    args = nhwc(z["input/x"]), jnp.asarray(kernel), jnp.asarray(matrix), jnp.asarray(z["param/bias"])
    y, pull = jax.vjp(jax.jit(neck), *args)
    assert relative(y, z["output/y"]) < PARITY
    grads = pull(jnp.asarray(z["input/cotangent"]))
    assert relative(np.moveaxis(grads[0], -1, 1), z["output/grad_x"]) < PARITY
    assert relative(np.transpose(grads[1], (3, 2, 0, 1)).reshape(6, -1), z["output/grad/kernel"]) < PARITY
    back = np.transpose(np.asarray(grads[2]).reshape(16, 2, 2, 6), (0, 3, 1, 2)).reshape(16, 24)
    assert relative(back, z["output/grad/weight"]) < PARITY
    assert relative(grads[3], z["output/grad/bias"]) < PARITY


@pytest.mark.nightly
def test_the_dense_stack_is_the_originals():
    z, _ = load("liresmlp_cholesky")
    params = {name: jnp.asarray(z[f"param/{there}"]) for name, there in (("weight", "weights"), ("bias", "bias"))}
    params["gamma"] = jnp.asarray(z["param/gamma"][..., 0])
    stack = CholeskyStack(4, name="dense")

    def apply(x, params):
        return run_through(stack.apply({"params": params}, (12,)), x)

    ops = stack.apply({"params": params}, (12,))
    names = [name for name, _ in ops]
    assert names[:3] == ["dense_01/linear", "dense_01/bias", "dense_01/activation"] and len(names) == 12
    product = np.prod([op.bound().proved for name, op in ops if name.endswith("linear")])
    exact = float(z["output/lipschitz_eval"])
    assert exact <= product <= exact * (1 + 1e-9) and exact < 1
    y, pull = jax.vjp(jax.jit(apply), jnp.asarray(z["input/x"]), params)
    assert relative(y, z["output/y_eval"]) < PARITY and relative(y, z["output/y_train"]) < PARITY
    grad_x, grads = pull(jnp.asarray(z["input/cotangent"]))
    assert relative(grad_x, z["output/grad_x"]) < PARITY
    assert relative(grads["weight"], z["output/grad/weights"]) < PARITY
    assert relative(grads["gamma"][..., None], z["output/grad/gamma"]) < PARITY
    assert relative(grads["bias"], z["output/grad/bias"]) < PARITY


def test_centring_is_the_originals():
    """Training subtracts the batch's means, with gradient; evaluation the running ones, folded into the biases."""
    z, _ = load("liresconv")
    names = [f"block_{i}" for i in range(3)]
    weights, gammas = hwio(z["param/weights"]), jnp.asarray(z["param/gamma"][:, :, 0, 0, 0])
    params = [{"weight": w, "gamma": g, "bias": b} for w, g, b in zip(weights, gammas, z["param/bias"], strict=True)]
    lip = {name: {"mean": jnp.asarray(mean)} for name, mean in zip(names, z["param/running_mean"], strict=True)}

    def apply(x, params, train):
        ops = []
        for name, values in zip(names, params, strict=True):
            block = LinearResidual(3, centering=True, name=name)
            ops += block.apply({"params": values, COLLECTION: lip[name]}, (8, 8, 8), train)
        means = {}
        for name, op in ops:
            if isinstance(op, operators.Centered):
                x, means[name] = op.with_mean(x)
            else:
                x = op(x)
        return x, means

    x = nhwc(z["input/x"])
    assert relative(apply(x, params, False)[0], nhwc(z["output/y_eval"])) < PARITY
    (y, means), pull = jax.vjp(jax.jit(lambda x, p: apply(x, p, True)), x, params)
    assert relative(y, nhwc(z["output/y_train"])) < PARITY
    moved = advance_means(lip, means)
    assert relative(np.stack([moved[name]["mean"] for name in names]), z["output/running_mean_after"]) < PARITY
    grad_x, grads = pull((nhwc(z["input/cotangent"]), jax.tree.map(jnp.zeros_like, means)))
    assert relative(grad_x, nhwc(z["output/grad_x"])) < PARITY
    assert relative(np.stack([g["weight"] for g in grads]), hwio(z["output/grad/weights"])) < PARITY
    assert relative(np.stack([g["gamma"] for g in grads]), z["output/grad/gamma"][:, :, 0, 0, 0]) < PARITY
    assert relative(np.stack([g["bias"] for g in grads]), z["output/grad/bias"]) < PARITY


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    _, state, options = state_dict()
    without = {k: v for k, v in state.items() if k != "conv.running_mean"}
    with pytest.raises(ValueError, match=r"lacks \['conv.running_mean'\]"):
        interop.from_torch("liresnet", without, **options)
    with pytest.raises(ValueError, match=r"extra \['conv.shift'\]"):
        interop.from_torch("liresnet", {**state, "conv.shift": np.zeros(3)}, **options)
    with pytest.raises(ValueError, match=r"conv.gamma: .*\(2, 6, 1, 1, 1\).*\(2, 6\)"):
        interop.from_torch("liresnet", {**state, "conv.gamma": np.ones((2, 6))}, **options)
    with pytest.raises(ValueError, match=r"conv.weights: .*\(3, 6, 6, 3, 3\).*\(2, 6, 6, 3, 3\)"):
        interop.from_torch("liresnet", state, **{**options, "depth": 3})
    with pytest.raises(ValueError, match="options .*'widht'"):
        interop.from_torch("liresnet", state, widht=6, **options)
    with pytest.raises(ValueError, match="input_size: expected one of .*got 28"):
        interop.from_torch("liresnet", state, **{**options, "input_size": 28})
    with pytest.raises(ValueError, match="out_dim: expected at most the 96 features"):
        interop.from_torch("liresnet", state, **{**options, "out_dim": 98})


def recipe_model(**options):
    sizes = {"depth": 2, "width": 4, "stem_kernel": 3, "stem_strides": 1, "stem_padding": 1}
    added = {name.removeprefix("model."): value for name, value in RECIPE.items() if name.startswith("model.")}
    return LiResNet((8, 8, 1), 3, **{**sizes, **added, **options})


def initialised(model, key):
    return jax.jit(model.init)(key, jnp.zeros((1, 8, 8, 1)))


def built_to_train(model, variables):
    return jax.jit(lambda v: model.apply(v, True, method="build", mutable=[COLLECTION])[0])(variables)


def test_a_training_network_has_no_certificate_and_estimates_no_contraction(key):
    model = recipe_model()
    variables = initialised(model, key)
    network = built_to_train(model, variables)
    evaluated = jax.eval_shape(lambda v: model.apply(v, method="build"), variables)
    assert network.names == evaluated.names
    vectors = variables[COLLECTION]["vectors"]
    sigmas, _ = jax.eval_shape(lambda net: bounds.norm_estimates(net, vectors, 2), network)
    assert set(sigmas) == {"stem/linear", "block_01/linear", "block_02/linear"}
    assert set(vectors) == {name for name in evaluated.names if name.endswith("/linear")}  # evaluation estimates all
    with pytest.raises(NotCertifiable, match="block_01/linear: no proved Lipschitz bound .* Centered"):
        bounds.operator_bounds(jax.tree.map(np.asarray, network))
    contractive = built_to_train(recipe_model(centering=False), variables)
    with pytest.raises(NotCertifiable, match="neck_conv/linear: .* Contraction"):
        bounds.operator_bounds(jax.tree.map(np.asarray, contractive))


@pytest.mark.nightly
def test_blocks_start_near_the_identity(key):
    for small, expected in ((True, 1 / (9 * 32)), (False, (9 * 32) ** -0.5)):
        params = initialised(recipe_model(width=32, small_init=small, dense_depth=0, neck="free"), key)["params"]
        weight = np.asarray(params["block_01"]["weight"])
        assert abs(weight.std() / expected - 1) < 5 / (2 * weight.size) ** 0.5  # five standard errors


def losses_of(devices, num_steps, **changes):
    run = Run(tiny_config(**RECIPE, **{"mesh.data": devices, **changes}), 0)
    state, train_batch, found = run.fresh_state(), run.batch_runner(0), []
    for step in range(num_steps):
        state, metrics = train_batch(state, step, SCHEDULE)
        assert metrics["finite"]
        found.append(float(metrics["loss"]))
    return np.array(found), state, run


@pytest.mark.nightly
@pytest.mark.x64_off
def test_means_are_those_of_the_batch_of_all_devices():
    eps = 2.0**-23
    one, state, _ = losses_of(1, 4)
    eight, state8, _ = losses_of(8, 4)
    # As in tests/training/test_step.py: sums over the batch are associated differently.
    np.testing.assert_allclose(eight, one, rtol=1000 * eps)
    for block in ("block_01",):
        mean, mean8 = (np.asarray(s.lip[block]["mean"]) for s in (state, state8))
        assert np.abs(mean).max() > 1e-4  # control: they move
        np.testing.assert_allclose(mean8, mean, rtol=0, atol=1000 * eps * np.abs(mean).max())


@pytest.mark.x64_off
def test_a_trained_network_freezes_to_what_it_computes_and_certifies():
    _, state, run = losses_of(1, 3)
    fresh = run.fresh_state()
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    moved = differing(fresh, state)
    assert any("dense" in name and "weight" in name for name in moved) and any("mean" in name for name in moved)
    validated = run.validator()(state)
    assert np.isfinite(list(validated.values())).all()
    variables = {"params": state.params, COLLECTION: state.lip}
    frozen = lipjax.freeze(run.model, variables)
    images = np.random.default_rng(0).uniform(size=(5, 8, 8, 1))
    logits = jax.jit(run.model.apply)(variables, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(frozen(images), logits, rtol=0, atol=1e-4)
    certificate = frozen.certify(images)
    assert (certificate.radii >= 0).all() and certificate.radii.max() > 0
    # The estimates of training count contractions as 1, so the proved constant may lie a little below theirs.
    assert frozen.margin_lipschitz().max() >= validated["lipschitz_estimate"] * 0.95
