"""The proof of MLP heads' radii against mpmath, and what frozen networks with such heads claim against attack."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mlp_helpers import golden, head_attack, random_arrays, random_head
from tiers import everyday

from lipjax import attacks, certify, curvature, network, operators
from lipjax.certify import FrozenNetwork, radius
from lipjax.certify.certificate import certify_margins
from lipjax.certify.mlp import MLPCertifier

pytestmark = pytest.mark.quick_compiles

mpmath.mp.dps = 50


def exact_minorant_radius(weights, a, point, p, i, m):
    """`radius.minorant_radius` in 50 digits, from the definitions."""
    w1, b1, w2, b2 = (mpmath.matrix(np.asarray(w).tolist()) for w in weights)
    a, point = (mpmath.matrix(np.asarray(v).tolist()) for v in (a, point))
    sums = w1 * point + b1
    row = [w2[p, h] - w2[i, h] for h in range(w2.cols)]
    value = b2[p] - b2[i] + sum(r * mpmath.log1p(mpmath.exp(s)) for r, s in zip(row, sums, strict=True))
    weighted = mpmath.matrix([r / (1 + mpmath.exp(-s)) for r, s in zip(row, sums, strict=True)])
    gradient, step, m = w1.T * weighted, point - a, mpmath.mpf(float(m))
    square = lambda v: sum(x * x for x in v)  # noqa: E731
    level = value - sum(x * y for x, y in zip(gradient, step, strict=True)) - m / 2 * square(step)
    total = mpmath.sqrt(square(gradient + m * step)) + mpmath.sqrt(square(gradient) + 2 * m * value)
    return 2 * level / total if level > 0 else mpmath.mpf(0)


@pytest.mark.parametrize(("scale", "moved"), [(1.0, 0.0), (1.0, 0.1), (100.0, 1e-3), (1e-4, 1e-5), (1.0, 1e-9)])
def test_proved_radii_lie_below_the_exact_ones(scale, moved):
    weights = random_head(scale=scale, hidden=30, features=9)
    certifier = MLPCertifier(operators.MLPHead(*map(np.asarray, weights)))
    rng = np.random.default_rng(4)
    features = rng.normal(size=(30, 9))
    points = features + moved * rng.normal(size=features.shape) / scale
    logits = np.asarray(operators.MLPHead(*weights)(jnp.asarray(features)))
    order = np.argsort(-logits, axis=1)
    p, i = order[:, 0].tolist(), order[:, 1 + rng.integers(0, 3)].tolist()
    m = certifier._coarse[p, i]
    got = certifier._prove(features, points, p, i, m)
    exact = [exact_minorant_radius(weights, *row) for row in zip(features, points, p, i, m, strict=True)]
    loss = np.array([float(1 - mpmath.mpf(float(r)) / e) for r, e in zip(got, exact, strict=True) if e > 0])
    assert (loss > 0).all() and np.median(loss) < 1e-9 and len(loss) > 15
    assert all(r == 0 for r, e in zip(got, exact, strict=True) if e == 0)

    # Control: plain arithmetic does exceed the exact radius.
    def evaluate(b, p, i):
        row, sums = weights[2][p] - weights[2][i], weights[0] @ b + weights[1]
        return jnp.dot(row, jax.nn.softplus(sums)) + weights[3][p] - weights[3][i], (
            row * jax.nn.sigmoid(sums)
        ) @ weights[0]

    value, gradient = map(np.asarray, jax.vmap(evaluate)(points, np.array(p), np.array(i)))
    plain = radius.minorant_radius(value, gradient, points - features, m, np)
    assert any(mpmath.mpf(float(r)) > e > 0 for r, e in zip(plain, exact, strict=True))


def certified(weights, features):
    head = operators.MLPHead(*map(np.asarray, weights))
    certifier = MLPCertifier(head)
    logits = np.asarray(operators.MLPHead(*weights)(jnp.asarray(features)))
    p = logits.argmax(1)
    margins = logits[np.arange(len(p)), p][:, None] - logits
    return certifier.feature_radii(p, np.asarray(features), margins * (1 - 1e-12)), certifier


@pytest.mark.parametrize("classes", everyday([10, 20], 10))
def test_the_certifier_reaches_the_dual_radius_and_leaves_out_what_cannot_matter(classes):
    _, features, weights = golden(classes)
    radii, certifier = certified(weights, features)
    dual = np.asarray(certify.mlp_radius(features, *weights, method="dual"))
    assert (radii.min(1) <= dual * (1 + 1e-9)).all() and (radii.min(1) >= dual * (1 - 3e-3)).all()
    closed = np.asarray(certify.mlp_radius(features, *weights))
    assert (radii.min(1) > closed).all()
    # Exact curvatures of the pairs that decide only.
    assert 0 < len(certifier._fine) < classes * (classes - 1) / 4
    table = np.asarray(curvature.eigenvalue_table(weights[0], weights[2]))
    for pair, value in certifier._fine.items():
        assert table[pair] <= value <= table[pair] * (1 + 1e-9)


@pytest.mark.nightly
def test_the_certifier_with_a_hundred_classes():
    weights = random_head(classes=100, hidden=64, features=16, seed=5, scale=0.5)
    features = np.random.default_rng(6).normal(size=(40, 16))
    radii, certifier = certified(weights, features)
    table = curvature.eigenvalue_table(weights[0], weights[2])
    full = certify.mlp_radius(jnp.asarray(features), *weights, "dual", table)
    np.testing.assert_allclose(radii.min(1), full, rtol=2e-3)
    assert len(certifier._fine) < 300  # of 9900
    assert (head_attack(weights, jnp.asarray(features), jnp.asarray(radii.min(1)), starts=2, num_steps=20) > 0).all()
    coarse = certify.mlp_radius(jnp.asarray(features), *weights)
    assert np.median(radii.min(1) / np.asarray(coarse)) > 1.1  # control: the exact curvatures matter


def frozen_network(seed=0, scale=1.0, head_scale=0.7):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape) * scale  # noqa: E731
    ops = (
        operators.Flatten((2, 2, 1)),
        operators.Dense(draw(6, 4)),
        operators.Bias(draw(6), (6,)),
        operators.MaxMin((6,)),
    )
    head = operators.MLPHead(*random_arrays(classes=4, hidden=10, seed=seed, scale=head_scale))
    return FrozenNetwork(network.Network(ops, head, np.array([0.4]), np.array([0.5]), ("flat", "dense", "bias", "act")))


def nearest_attack(frozen, images, labels, radii):
    live = jax.tree.map(jnp.asarray, frozen.network)
    return attacks.attack_l2(live, images, labels, radii, num_steps=40).distances


@pytest.mark.mixed_dtypes
@pytest.mark.parametrize(("num_images", "num_radii"), everyday([(60, 5), (24, 2)], (24, 2)))
def test_frozen_certificates_hold_against_attack_and_are_larger_than_global_ones(num_images, num_radii):
    frozen = frozen_network()
    images = np.random.default_rng(1).uniform(0.3, 0.7, (num_images, 2, 2, 1))
    found = frozen.certify(images)
    predictions, margins = frozen.margins(images)
    np.testing.assert_array_equal(found.predictions, predictions)
    rows = np.arange(num_images)
    np.testing.assert_array_equal(found.margins, margins[rows, found.rivals])
    plain = certify_margins(predictions, margins, frozen.margin_lipschitz())
    assert (found.radii >= plain.radii).all() and np.median(found.radii / plain.radii) > 1.2
    grid = np.quantile(found.radii, np.linspace(0.1, 0.9, num_radii)).tolist() + [0.5, 1.0, 2.0]
    distances = nearest_attack(frozen, images, predictions, grid)
    assert (distances > found.radii).all()
    # Control: the attack does break radii that are four times as large.
    assert (distances < 4 * found.radii).any() and (distances < np.inf).mean() > 0.3


def test_a_tampered_certificate_is_noticed(monkeypatch):
    frozen = frozen_network()
    images = np.random.default_rng(1).uniform(0.3, 0.7, (60, 2, 2, 1))
    honest = MLPCertifier.feature_radii
    monkeypatch.setattr(MLPCertifier, "feature_radii", lambda *args: 5 * honest(*args))
    found = frozen.certify(images)
    distances = nearest_attack(frozen, images, found.predictions, np.quantile(found.radii, [0.2, 0.5, 0.8]).tolist())
    assert (distances < found.radii).any()


def test_frozen_margins_lie_below_exact_arithmetic():
    frozen = frozen_network(scale=30.0)
    images = np.random.default_rng(2).uniform(0, 1, (15, 2, 2, 1))
    predictions, lower = frozen.margins(images)
    _, dense, bias, _ = frozen.network.ops
    matrix = lambda a: mpmath.matrix(np.asarray(a).tolist())  # noqa: E731
    above = 0
    for image, p, row, computed in zip(images, predictions, lower, frozen(images), strict=True):
        x = (matrix(image.ravel()) - matrix([0.4] * 4)) / mpmath.mpf(0.5)
        h = matrix(dense.matrix) * x + matrix(bias.bias)
        h = [max(h[k], h[k + 3]) for k in range(3)] + [min(h[k], h[k + 3]) for k in range(3)]
        head = frozen.network.head
        sums = matrix(head.w1) * mpmath.matrix(h) + matrix(head.b1)
        exact = matrix(head.w2) * mpmath.matrix([mpmath.log1p(mpmath.exp(s)) for s in sums]) + matrix(head.b2)
        for i in range(4):
            if i != p:
                assert mpmath.mpf(float(row[i])) <= exact[int(p)] - exact[i]
                above += mpmath.mpf(float(computed[p] - computed[i])) > exact[int(p)] - exact[i]
    assert above > 5  # control: the computed margins exceed the exact ones


def test_errors_of_the_features_count():
    """A radius around the computed features is worth nothing nearer than the exact features may be."""
    frozen = frozen_network()
    images = np.random.default_rng(3).uniform(0, 1, (8, 2, 2, 1))
    logits, features, _, head_error = frozen._run_with_errors(images, 8)
    p = logits.argmax(1)
    margins = frozen._lower_margins(p, logits, np.zeros(8), head_error)
    certifier = MLPCertifier(frozen.network.head)
    radii = certifier.feature_radii(p, features, margins).min(1)
    certify_with = lambda error: certifier.certify(p, margins, features, error, margins, 2.0).radii  # noqa: E731
    # They count twice, and 2^-32 is left out, so that another evaluation proves the radius, too.
    room = 1 - 2.0**-32
    np.testing.assert_allclose(certify_with(np.zeros(8)), radii / 2 * room, rtol=1e-14)
    np.testing.assert_allclose(certify_with(radii / 8), radii * 3 / 8 * room, rtol=1e-14)
    assert (certify_with(radii / 2 * (1 + 1e-15)) == 0).all() and (certify_with(np.full(8, np.nan)) == 0).all()


def test_frozen_network_at_the_edges(tmp_path):
    frozen = frozen_network()
    images = np.full((3, 2, 2, 1), 0.5)
    images[1, 0, 0, 0] = np.nan
    found = frozen.certify(images)
    assert found.radii[1] == 0 and found.radii[0] == found.radii[2] > 0
    assert frozen.certify(np.zeros((0, 2, 2, 1))).radii.shape == (0,)
    zero = FrozenNetwork(
        network.Network(
            frozen.network.ops,
            jax.tree.map(np.zeros_like, frozen.network.head),
            frozen.network.input_mean,
            frozen.network.input_std,
            frozen.network.names,
        )
    )
    assert (zero.certify(images).radii == 0).all()
    frozen.save(tmp_path)
    again = FrozenNetwork.load(tmp_path).certify(images)
    np.testing.assert_array_equal(again.radii, found.radii)


@pytest.mark.x64_off
def test_certify_in_a_process_with_x64_off():
    found = frozen_network().certify(np.full((2, 2, 2, 1), 0.5, np.float32))
    assert jnp.ones(1).dtype == jnp.float32 and found.radii.dtype == np.float64 and (found.radii > 0).all()
