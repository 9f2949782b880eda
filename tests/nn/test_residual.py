"""Conventional residual blocks: against exact arithmetic, in bounds, estimates, files, training, and where refused."""

import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import tiny
from rich.console import Console
from training_helpers import quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

import lipjax
from lipjax import FrozenNetwork, bounds, checker, operators
from lipjax.errors import NotCertifiable, UserError
from lipjax.evaluation import evaluate
from lipjax.evaluation.html.page import write_reports
from lipjax.models import get_model
from lipjax.network import make_network
from lipjax.nn import COLLECTION
from lipjax.training import loop


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))


def convolve(x, kernel):
    """Zero padding, stride 1, odd sides; NumPy numbers or Fractions."""
    (kh, kw), (h, w) = kernel.shape[:2], x.shape[:2]
    y = np.zeros((h, w, kernel.shape[3]), kernel.dtype)
    for i, j, a, b in np.ndindex(h, w, kh, kw):
        p, q = i + a - kh // 2, j + b - kw // 2
        if 0 <= p < h and 0 <= q < w:
            y[i, j] = y[i, j] + x[p, q] @ kernel[a, b]
    return y


def reference(op, x, of):
    """One image under an operator, in NumPy; of: array -> the numbers to compute with."""
    match op:
        case operators.Conv():
            assert (op.strides, op.padding) == (1, "ZERO")
            return convolve(x, of(op.kernel))
        case operators.Dense():
            return of(op.matrix) @ x
        case operators.Bias():
            return x + of(op.bias)
        case operators.MaxMin():
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([np.maximum(a, b), np.minimum(a, b)], -1)
        case operators.Flatten():
            return x.reshape(-1)
        case operators.LinearHead():
            return of(op.matrix) @ x + of(op.bias)
        case operators.Residual():
            y = x
            for part in op.ops:
                y = reference(part, y, of)
            return x + y
    raise AssertionError(op)


def fractions(array):
    return np.vectorize(Fraction, otypes=[object])(np.asarray(array, np.float64))


def block(rng, h=3, w=2, c=4):
    shape = (h, w, c)
    parts = operators.Conv(draw(rng, 3, 3, c, c), shape), operators.Bias(draw(rng, c), shape), operators.MaxMin(shape)
    return operators.Residual(parts)


def residual_network(seed=0):
    """Two blocks of images, one of vectors."""
    rng = np.random.default_rng(seed)
    parts = operators.Dense(draw(rng, 6, 24)), operators.MaxMin((6,)), operators.Dense(draw(rng, 24, 6))
    vectors = operators.Residual(parts)
    ops = [("first", block(rng)), ("second", block(rng)), ("flat", operators.Flatten((3, 2, 4))), ("third", vectors)]
    return make_network(ops, operators.LinearHead(draw(rng, 3, 24), draw(rng, 3)), 0.5, 0.25)


def frozen_network(seed=0):
    return FrozenNetwork(jax.tree.map(np.asarray, residual_network(seed)))


def to_matrix(function, shape):
    columns = jax.vmap(function)(jnp.eye(int(np.prod(shape))).reshape(-1, *shape))
    return np.asarray(columns).reshape(columns.shape[0], -1).T


def test_margins_are_below_the_exact_ones_and_close():
    frozen = frozen_network()
    images = np.random.default_rng(1).uniform(size=(3, 3, 2, 4))
    predictions, margins = frozen.margins(images, 4)
    for image, p, lower in zip(images, predictions, margins, strict=True):
        x = (fractions(image) - Fraction(0.5)) / Fraction(0.25)
        for op in (*frozen.network.ops, frozen.network.head):
            x = reference(op, x, fractions)
        slack = [float(x[p] - value - Fraction(float(low))) for value, low in zip(x, lower, strict=True)]
        assert 0 < min(slack) <= max(slack) < 1e-10
    np.testing.assert_allclose(frozen(images, 4)[-1], x.astype(float), rtol=1e-12)
    certificate = frozen.certify(images, 4)
    assert (certificate.radii > 0).all()


def test_the_bound_is_one_plus_the_product():
    rng = np.random.default_rng(2)
    first, second = draw(rng, 5, 8), draw(rng, 8, 5)
    op = operators.Residual((operators.Dense(first), operators.Tanh((5,)), operators.Dense(second)))
    norms = [np.linalg.norm(np.asarray(m), 2) for m in (first, second)]
    found = op.bound()
    assert 0 <= found.proved / (1 + norms[0] * norms[1]) - 1 < 1e-8
    assert [part["type"] for part in found.details["parts"]] == ["Dense", "Tanh", "Dense"]
    assert json.loads(json.dumps(found.details)) == found.details
    # The norm of the sum of both paths is less: what a linear block has.
    linear = np.linalg.norm(np.eye(8) + np.asarray(second @ first), 2)
    assert linear < found.proved - 0.1
    # Attained by g = c x.
    scaled = operators.Residual((operators.Dense(jnp.eye(3) * 0.5),))
    assert 1.5 <= scaled.bound().proved < 1.5 * (1 + 1e-8)
    assert operators.Residual((operators.Dense(jnp.zeros((3, 3))),)).bound().proved == 1


def test_the_estimate_converges_to_the_bound_from_below(key):
    frozen = frozen_network()
    network = jax.tree.map(jnp.asarray, frozen.network)
    vectors = bounds.init_vectors(network, key)
    assert set(vectors) == {"first/0", "second/0", "third/0", "third/2"}
    estimate = jax.jit(bounds.norm_estimates, static_argnums=2)
    early, _ = estimate(network, vectors, 1)
    late, vectors = estimate(network, vectors, 2000)
    for row in frozen.lipschitz_report():
        if row.name in late:
            assert float(early[row.name]) < float(late[row.name]) <= row.claimed < float(late[row.name]) * (1 + 1e-5)
    assert set(late) == {"first", "second", "third"}
    product, _ = jax.jit(bounds.feature_lipschitz_estimate, static_argnums=2)(network, vectors, 1)
    proved = bounds.product_bound(frozen.lipschitz_report())
    assert float(product) == pytest.approx(proved, rel=1e-5)

    # By hand: d(1 + |A|)/dA = u v^T.
    def value(kernel):
        (conv, *rest), old = network.ops[0].ops, network.ops
        changed = operators.Residual((operators.Conv(kernel, conv.in_shape), *rest))
        moved = type(network)((changed, *old[1:]), network.head, network.input_mean, network.input_std, network.names)
        return bounds.norm_estimates(moved, vectors, 1)[0]["first"]

    kernel = network.ops[0].ops[0].kernel
    direction = jnp.cos(jnp.arange(kernel.size, dtype=float)).reshape(kernel.shape)
    slope = float(jnp.vdot(jax.jit(jax.grad(value))(kernel), direction))
    norm = [
        np.linalg.norm(to_matrix(lambda x, k=k: operators.Conv(k, x.shape)(x[None])[0], (3, 2, 4)), 2)
        for k in (kernel - 1e-5 * direction, kernel + 1e-5 * direction)
    ]
    assert slope == pytest.approx((norm[1] - norm[0]) / 2e-5, rel=1e-4)


def test_slopes_of_activations_inside_count(key):
    op = operators.Residual((operators.Dense(jnp.eye(3) * 2), operators.Sigmoid((3,))))
    network = make_network([("block", op)], operators.LinearHead(jnp.eye(3), jnp.zeros(3)))
    found, _ = bounds.norm_estimates(network, bounds.init_vectors(network, key), 5)
    assert float(found["block"]) == pytest.approx(1.5) and op.bound().proved == pytest.approx(1.5)


def test_a_saved_network_comes_back(tmp_path):
    frozen = frozen_network()
    frozen.save(tmp_path)
    assert {"ops/first/0/kernel", "ops/first/1/bias", "ops/third/2/matrix"} <= set(frozen.arrays())
    loaded = FrozenNetwork.load(tmp_path)
    images = np.random.default_rng(1).uniform(size=(2, 3, 2, 4))
    np.testing.assert_array_equal(loaded.certify(images, 2).radii, frozen.certify(images, 2).radii)
    assert loaded.sha256() == frozen.sha256() != frozen_network(1).sha256()
    document = json.loads((tmp_path / "network.json").read_text())
    assert [part["type"] for part in document["ops"][0]["ops"]] == ["Conv", "Bias", "MaxMin"]
    document["ops"][0]["ops"][0]["padding"] = "CIRCULAR"
    (tmp_path / "network.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="hash"):
        FrozenNetwork.load(tmp_path)
    for broken in ([], None, [{"type": "Conv"}], [{"type": "Residual", "ops": document["ops"][0]["ops"]}]):
        document["ops"][0]["ops"] = broken
        (tmp_path / "network.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match="fit each other"):
            FrozenNetwork.load(tmp_path)


def test_blocks_that_do_not_fit_are_refused():
    dense, wide = operators.Dense(jnp.eye(4)), operators.Dense(jnp.ones((6, 4)))
    head = operators.LinearHead(jnp.eye(4), jnp.zeros(4))
    cases = [
        ((), "at least one operator"),
        ((wide,), r"operator 0 gives shape \(6,\), but the sum takes \(4,\)"),
        ((wide, dense), r"operator 0 gives shape \(6,\), but operator 1 takes \(4,\)"),
        ((operators.Residual((dense,)),), "operator 0: Residual cannot stand"),
        ((operators.Centered(dense),), "operator 0: Centered cannot stand"),
    ]
    for ops, message in cases:
        with pytest.raises(ValueError, match=message):
            operators.Residual(ops)
    with pytest.raises(ValueError, match=r"Expected a matrix \(out, in\)"):
        operators.Dense(jnp.ones(3))
    odd = make_network([("block", operators.Residual((operators.Contraction(dense),)))], head)
    with pytest.raises(NotCertifiable, match=r"block \(Residual\): operator 0: .* type Contraction"):
        bounds.operator_bounds(odd)
    with pytest.raises(ValueError, match=r"Residual expects a batch \(b, 4\)"):
        operators.Residual((dense,))(jnp.ones((2, 3)))
    # The arrays of both would be saved under one name.
    with pytest.raises(ValueError, match="f/0 names an operator and a part of the Residual f"):
        make_network([("f", operators.Residual((dense,))), ("f/0", dense)], head)
    make_network([("f", operators.Residual((dense,))), ("f/1", dense)], head)  # control

    with pytest.raises(TypeError, match="Wrong defines __call__, but parts.. and adds_input define a Composite"):

        class Wrong(operators.Residual):
            def __call__(self, x):
                return x + super().__call__(x)

    class Doubled(operators.Residual):
        pass

    with pytest.raises(ValueError, match="expected a Residual, not a subclass, got Doubled"):
        make_network([("f", Doubled((dense,)))], head)


def test_liplt_refuses_it_by_name():
    op = operators.Residual((operators.Dense(jnp.eye(4)), operators.ReLU((4,))))
    ops = [("block", op), ("act", operators.ReLU((4,)))]
    network = make_network(ops, operators.LinearHead(jnp.eye(4), jnp.zeros(4)))
    assert not bounds.has_liplt(network)
    with pytest.raises(NotCertifiable, match=r"block \(Residual\): LipLT takes linear operators"):
        bounds.margin_liplt_bound(network)
    assert FrozenNetwork(jax.tree.map(np.asarray, network)).margin_lipschitz()[0, 1] == pytest.approx(2 * 2**0.5)


def test_the_model_is_the_papers_alternative_to_its_block(key):
    model, x = tiny(block="conventional"), jnp.zeros((1, 8, 8, 1))
    variables: dict = jax.jit(model.init)(key, x)
    linear: dict = jax.jit(tiny().init)(key, x)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, linear["params"])
    assert {"block_01/residual/0", "block_02/residual/0"} < set(variables[COLLECTION]["vectors"])
    variables["params"]["block_01"]["bias"] = jnp.arange(4.0) / 10
    frozen = lipjax.freeze(model, variables)
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 1))
    # The blocks in NumPy, from the parameters alone; the layers around them as they are.
    stages = dict(zip(frozen.network.names, frozen.network.ops, strict=True))
    features = images
    apply = jax.jit(lambda op, x: op(x))
    for name in ("stem/linear", "stem/bias", "stem/activation"):
        features = np.asarray(apply(stages[name], features))
    for name in ("block_01", "block_02"):
        params = {n: np.asarray(a, np.float64) for n, a in variables["params"][name].items()}
        added = [convolve(f, params["gamma"] * params["weight"] / np.sqrt(2)) + params["bias"] for f in features]
        a, b = np.split(np.stack(added), 2, axis=-1)
        features = features + np.concatenate([np.maximum(a, b), np.minimum(a, b)], -1)
    for name in list(stages)[5:]:
        features = np.asarray(apply(stages[name], features))
    np.testing.assert_allclose(frozen(images, 2), np.asarray(apply(frozen.network.head, features)), rtol=1e-9)
    single = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32)))
    np.testing.assert_allclose(single, frozen(images, 2), atol=1e-5)
    rows = {row.name: row.claimed for row in frozen.lipschitz_report()}
    assert rows["block_01/residual"] > 1.5  # control: the branch is not nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block": "dense"}, "expected block to be one of"), ({"block": "conventional", "centering": True}, "centering")],
)
def test_the_model_refuses_blocks_that_it_has_not(options, message):
    config = {"name": "liresnet", "depth": 1, "width": 4, "stem_strides": 1, **options}
    with pytest.raises(UserError, match=message):
        get_model(config, input_shape=(8, 8, 1), num_classes=3)


@pytest.mark.nightly
@pytest.mark.x64_off
def test_a_run_trains_certifies_is_checked_and_reported(tmp_path):
    config = tiny_config(**{"model.block": "conventional", "model.stem_strides": 1})
    run = loop.train(config, tmp_path, 0)
    report = evaluate.certify_run(tmp_path, config, 0, run, Console(quiet=True))
    assert report["float32"]["bound"]["without"] == 0
    code, lines = checker.check(tmp_path)
    assert code == 0, lines
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    row = next(row for row in certificate["layers"] if row["name"] == "block_01/residual")
    # 200 iterations on a trained convolution.
    assert row["type"] == "Residual" and 0 <= row["gap"] < 0.01 and len(row["details"]["parts"]) == 3
    assert json.loads((tmp_path / "attack.json").read_text())["lipschitz"]["largest_ratio"] <= 1
    write_reports([tmp_path])
    assert "block_01/residual" in (tmp_path / "report.html").read_text()
