"""Radii of the MLP head: the papers' certificates, their proof in mpmath, attack, and the frozen network's claim."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from lipjax import attacks, certify, curvature, network, operators
from lipjax._mlp import MLPCertifier
from lipjax.frozen import FrozenNetwork

GOLDEN = pathlib.Path(__file__).parent / "golden"
PARITY = 1e-9
mpmath.mp.dps = 50


def golden(classes):
    z = np.load(GOLDEN / f"crc_head_{classes}.npz")
    weights = [jnp.asarray(z[f"param/linear{layer}.{name}"]) for layer in (1, 2) for name in ("weight", "bias")]
    return z, jnp.asarray(z["input/features"]), weights


def random_arrays(classes=5, hidden=24, features=6, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = (hidden, features), (hidden,), (classes, hidden), (classes,)
    return [rng.normal(size=shape) * scale for shape in shapes]


def random_head(**kwargs):
    return [jnp.asarray(a) for a in random_arrays(**kwargs)]


def pair_radii(features, weights, labels, rivals, curvatures, method):
    """`mlp_radius` of the two-class head of every label and rival: (b, r). curvatures (b, r, 2): m and M."""
    w1, b1, w2, b2 = weights

    def one(a, label, rival, sides):
        table = jnp.zeros((2, 2)).at[0, 1].set(sides[0]).at[1, 0].set(sides[1])
        pair = jnp.stack([label, rival])
        return certify.mlp_radius(a[None], w1, b1, w2[pair], b2[pair], method, table)[0]

    by_rival = jax.vmap(one, (None, None, 0, 0))
    return np.asarray(jax.jit(jax.vmap(by_rival))(features, jnp.asarray(labels), jnp.asarray(rivals), curvatures))


def test_minorant_radius_does_not_cancel():
    one = jnp.ones(1)
    got = certify.minorant_radius(one / 2, one[None], jnp.zeros((1, 1)), 1e-12 * one, jnp)
    exact = 2 * mpmath.mpf(0.5) / (1 + mpmath.sqrt(1 + 2 * mpmath.mpf(1e-12) * mpmath.mpf(0.5)))
    assert abs(float(got[0]) / float(exact) - 1) <= 4 * 2**-53 and float(got[0]) <= 0.5
    assert (np.sqrt(1 + 2e-12 * 0.5) - 1) / 1e-12 > 0.5  # control: the textbook form


def test_minorant_radius_is_the_best_multiplier_of_the_dual_problem():
    rng = np.random.default_rng(0)
    gradient, step = rng.normal(size=(2, 400, 3)) * [[[1.0]], [[0.3]]]
    m, value = rng.uniform(0.1, 3, 400), rng.normal(size=400)
    got = certify.minorant_radius(value, gradient, step, m, np)
    eta = np.linspace(0, 1, 20001)[:-1, None] / m
    residual = sum((step[:, i] + eta * gradient[:, i]) ** 2 for i in range(3))
    dual = np.max(np.sum(step**2, axis=1) + 2 * eta * value - residual / (1 - eta * m), axis=0)
    assert (got > 0).sum() > 100 and (got == 0).sum() > 30
    np.testing.assert_allclose(got**2, np.maximum(dual, 0), rtol=1e-4, atol=1e-6)
    assert (got**2 >= dual * (1 - 1e-12))[dual > 0].all()  # the grid cannot beat it


@pytest.mark.parametrize("classes", [10, 20])
@pytest.mark.parametrize("rivals", ["all_rivals", "shortcut9"])
def test_parity_with_the_papers_code(classes, rivals):
    if (classes, rivals) == (10, "shortcut9"):
        pytest.skip("with 10 classes the 9 rivals are all")
    z, features, weights = golden(classes)
    out = {name.rpartition("/")[2]: z[name] for name in z.files if f"/{rivals}/" in name}
    labels = z["input/labels"]
    logits = z["output/logits"]
    np.testing.assert_allclose(operators.MLPHead(*weights)(features), logits, rtol=PARITY)
    sides = jnp.stack([jnp.asarray(out["closed_form_m"]), jnp.asarray(out["closed_form_M"])], -1)
    closed = pair_radii(features, weights, labels, out["rivals"], sides, "closed_form")
    # A two-class head predicts whichever is larger; the original gives wrong labels the radius with a minus sign.
    np.testing.assert_allclose(closed, np.abs(out["cert_closed_form"]), rtol=PARITY)

    exact = jnp.stack([jnp.asarray(out["curv_m"]), jnp.asarray(out["curv_M"])], -1)
    dual = pair_radii(features, weights, labels, out["rivals"], exact, "dual")
    sharp = pair_radii(features, weights, labels, out["rivals"], exact, "closed_form")
    assert (dual >= sharp).all() and np.median(dual / sharp) > 1.2
    # Nowhere below the original, which stops at the last multiplier of a bisection and not at the best, and returns 0
    # where the residual of its Newton steps is not below 1e-6; ours needs no threshold.
    original = np.abs(out["cert_dual"])
    assert (dual >= original * (1 - PARITY)).all()
    assert (original == 0).any() and (dual[original == 0] > 0).all()
    reached = original > 0
    assert np.quantile(dual[reached] / original[reached], 0.2) < 1 + 2e-3  # mostly they agree


@pytest.mark.parametrize("classes", [10, 20])
def test_radii_over_all_rivals(classes):
    z, features, weights = golden(classes)
    right = z["input/labels"] == z["output/logits"].argmax(1)
    closed = np.asarray(certify.mlp_radius(features, *weights))
    np.testing.assert_allclose(closed[right], z["output/all_rivals/radius_closed_form"][right], rtol=PARITY)
    assert (closed > 0).all() and (z["output/all_rivals/radius_closed_form"][~right] < 0).all()
    dual = np.asarray(jax.jit(functools.partial(certify.mlp_radius, method="dual"))(features, *weights))
    original = z["output/all_rivals/radius_dual"]
    assert (dual[right] >= original[right] * (1 - PARITY)).all() and (dual > closed).all()


def test_nine_rivals_are_not_enough():
    """With more classes than ten the papers' code looks at the 9 rivals with the largest logits alone."""
    # Ten rivals that are hard to reach have larger logits than the one that is near.
    features = jnp.zeros((1, 3))
    w1, b1 = 1e-3 * jnp.eye(3), jnp.zeros(3)
    w2 = jnp.concatenate([jnp.zeros((11, 3)), jnp.array([[1e3, 0.0, 0.0]])]).at[1:11, 1].set(jnp.linspace(0.1, 0.2, 10))
    b2 = jnp.array([1.0] + [0.5] * 10 + [0.2]) - w2 @ jnp.full(3, np.log(2.0))
    logits = operators.MLPHead(w1, b1, w2, b2)(features)
    rivals = np.asarray(curvature.top_rivals(logits, jnp.array([0]), 9))[0]
    kept = np.append(0, rivals)
    assert 11 not in kept
    ours = certify.mlp_radius(features, w1, b1, w2, b2)
    shortcut = certify.mlp_radius(features, w1, b1, w2[kept], b2[kept])
    assert float(ours[0]) < 0.01 * float(shortcut[0])
    moved = features.at[0, 0].set(0.5 * float(shortcut[0]))
    assert int(jnp.argmax(operators.MLPHead(w1, b1, w2, b2)(moved))) == 11  # a false certificate


def test_lln_head_with_all_rivals():
    z = np.load(GOLDEN / "lln_head_rivals.npz")
    from lipjax.parametrize import lln

    head = operators.LinearHead(lln.normalize_rows(jnp.asarray(z["param/weight"])), jnp.asarray(z["param/bias"]))
    logits = head(jnp.asarray(z["input/features"]))
    np.testing.assert_allclose(logits, z["output/logits"], rtol=PARITY)
    labels, lipschitz = z["input/labels"], np.asarray(head.pairwise_lipschitz())
    rows = np.arange(8)[:, None]
    for kind in ("all_rivals", "shortcut9"):
        rivals = z[f"output/{kind}/rivals"]
        gaps = np.asarray(logits)[rows, labels[:, None]] - np.asarray(logits)[rows, rivals]
        np.testing.assert_allclose(gaps / lipschitz[labels[:, None], rivals], z[f"output/{kind}/cert"], rtol=PARITY)
    got = certify.certified_radius(logits, head.pairwise_lipschitz())
    np.testing.assert_allclose(got, z["output/all_rivals/cert"].min(1), rtol=PARITY)
    # Ten of the nineteen rivals go unseen by the shortcut; here none of them decides, by chance.
    assert z["output/shortcut9/rivals"].shape == (8, 9)
    ortho = certify.certified_radius(logits, jnp.full((20, 20), np.sqrt(2.0)))
    np.testing.assert_allclose(ortho, z["output/ortho_cert"].min(1), rtol=PARITY)


def head_attack(weights, features, radius, num_steps=60, starts=8, seed=0):
    """The least logit difference to any rival that projected gradient steps find within the radius: (b, k)."""
    head = operators.MLPHead(*weights)
    predicted = jnp.argmax(head(features), axis=1)

    def gap(delta, a, p, i):
        logits = head((a + delta)[None])[0]
        return logits[p] - logits[i]

    def one(a, p, r, i, key):
        def step(_, delta):
            g = jax.grad(gap)(delta, a, p, i)
            delta = delta - 0.1 * r * g / (jnp.linalg.norm(g) + 1e-30)
            return delta * jnp.minimum(1, r / jnp.linalg.norm(delta))

        start = jax.random.normal(key, a.shape)
        return gap(jax.lax.fori_loop(0, num_steps, step, start * r / jnp.linalg.norm(start)), a, p, i)

    keys = jax.random.split(jax.random.key(seed), starts)
    over = jax.vmap(
        jax.vmap(jax.vmap(one, (None, None, None, None, 0)), (None, None, None, 0, None)), (0, 0, 0, None, None)
    )
    gaps = np.array(jax.jit(over)(features, predicted, radius, jnp.arange(len(weights[3])), keys).min(2))
    gaps[np.arange(len(gaps)), np.asarray(predicted)] = np.inf
    return gaps


@pytest.mark.parametrize("method", ["closed_form", "dual"])
def test_no_attack_inside_the_radius(method):
    _, features, weights = golden(10)
    more = jnp.asarray(np.random.default_rng(0).normal(size=(24, features.shape[1])))
    features = jnp.concatenate([features, more])
    radius = certify.mlp_radius(features, *weights, method=method)
    assert (head_attack(weights, features, radius * (1 - 1e-9)) > 0).all()
    # Control: further out the attack succeeds, and the dual radius is not far from what it needs.
    assert (head_attack(weights, features, radius * 4).min(1) < 0).mean() > 0.9
    if method == "dual":
        assert (head_attack(weights, features, radius * 1.3).min(1) < 0).mean() > 0.4


def test_ties_nan_constant_heads_and_single_classes():
    w1, b1, w2, b2 = random_head(classes=3)
    features = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6))).at[1, 2].set(np.nan)
    for method in ("closed_form", "dual"):
        radius = functools.partial(certify.mlp_radius, method=method)
        got = np.asarray(radius(features, w1, b1, w2, b2))
        assert got[1] == 0 and got[0] > 0 and got[2] > 0
        tied = w2.at[1].set(w2[0]), b2.at[1].set(b2[0]).at[:2].add(100)
        assert (np.asarray(radius(features, w1, b1, *tied)) == 0).all()
        constant = np.asarray(radius(features, w1, b1, jnp.ones((3, 24)), jnp.arange(3.0)))
        np.testing.assert_array_equal(constant, [np.inf, 0, np.inf])
        assert (np.asarray(radius(features, w1, b1, w2, jnp.full(3, np.nan))) == 0).all()
        table = jnp.ones((3, 3)).at[:, 1].set(np.nan).at[1].set(np.nan)
        assert (np.asarray(radius(features, w1, b1, w2, b2, curvature=table)) == 0).all()
        assert np.isinf(np.asarray(radius(features[:1], w1, b1, w2[:1], b2[:1]))).all()
        assert radius(features[:0], w1, b1, w2, b2).shape == (0,)


def test_more_margin_and_less_curvature_give_more_radius():
    w1, b1, w2, b2 = random_head()
    features = jnp.asarray(np.random.default_rng(2).normal(size=(20, 6)))
    predicted = jnp.argmax(operators.MLPHead(w1, b1, w2, b2)(features), axis=1)
    table = curvature.eigenvalue_table(w1, w2)
    one = jax.jit(
        lambda a, b2, table, method: certify.mlp_radius(a[None], w1, b1, w2, b2, method, table)[0], static_argnums=3
    )
    for method in ("closed_form", "dual"):
        for a, p in zip(features[:5], predicted.tolist(), strict=False):
            radii = [float(one(a, b2.at[p].add(s), table, method)) for s in (0.0, 0.1, 0.5, 3.0)]
            assert np.all(np.diff(radii) > 0)
            radii = np.array([float(one(a, b2, table * s, method)) for s in (4.0, 2.0, 1.0, 0.0)])
            assert (radii[1:] >= radii[:-1] * (1 - PARITY)).all() and radii[-1] > radii[0]


def test_default_curvatures_depend_on_the_method_and_the_number_of_classes(monkeypatch):
    features = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6)))
    small, large = random_head(classes=20), random_head(classes=100)
    calls = []
    monkeypatch.setattr(curvature, "eigenvalue_table", lambda w1, w2: calls.append(len(w2)) or jnp.ones((20, 20)))
    for weights in (small, large):
        for method in ("closed_form", "dual"):
            got = certify.mlp_radius(features, *weights, method=method)
            if weights is large:
                table = curvature.norm_table(jnp.linalg.norm(weights[0], 2), weights[2])
                np.testing.assert_array_equal(got, certify.mlp_radius(features, *weights, method, table))
    assert calls == [20]


@pytest.mark.x64_off
def test_float32_under_jit_and_its_gradient():
    rng = np.random.default_rng(0)
    weights = random_head()
    features = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    table = curvature.norm_table(jnp.linalg.norm(weights[0]), weights[2])
    for method in ("closed_form", "dual"):
        run = jax.jit(functools.partial(certify.mlp_radius, method=method, curvature=table))
        assert run(features, *weights).dtype == jnp.float32 and (run(features, *weights) > 0).all()
        grads = jax.grad(lambda *args, run=run: run(*args).sum(), (0, 1, 3))(features, *weights)
        assert all(np.isfinite(np.asarray(g)).all() and np.abs(g).max() > 0 for g in grads)


def test_misuse():
    weights = random_head()
    features = jnp.zeros((2, 6))
    for options, message in (
        ({"method": "tight"}, "'closed_form' or 'dual'"),
        ({"num_steps": 0}, "num_steps"),
        ({"curvature": jnp.ones((4, 4))}, r"\(5, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            certify.mlp_radius(features, *weights, **options)
    with pytest.raises(ValueError, match=r"\(b, 6\)"):
        certify.mlp_radius(features[:, :4], *weights)
    with pytest.raises(ValueError, match="b1"):
        certify.mlp_radius(features, weights[0], weights[1][:3], *weights[2:])


# The proved radii.


def exact_minorant_radius(weights, a, point, p, i, m):
    """`certify.minorant_radius` in 50 digits, from the definitions."""
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
    plain = certify.minorant_radius(value, gradient, points - features, m, np)
    assert any(mpmath.mpf(float(r)) > e > 0 for r, e in zip(plain, exact, strict=True))


def certified(weights, features):
    head = operators.MLPHead(*map(np.asarray, weights))
    certifier = MLPCertifier(head)
    logits = np.asarray(operators.MLPHead(*weights)(jnp.asarray(features)))
    p = logits.argmax(1)
    margins = logits[np.arange(len(p)), p][:, None] - logits
    return certifier.feature_radii(p, np.asarray(features), margins * (1 - 1e-12)), certifier


@pytest.mark.parametrize("classes", [10, 20])
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


def test_frozen_certificates_hold_against_attack_and_are_larger_than_global_ones():
    frozen = frozen_network()
    images = np.random.default_rng(1).uniform(0.3, 0.7, (60, 2, 2, 1))
    found = frozen.certify(images)
    predictions, margins = frozen.margins(images)
    np.testing.assert_array_equal(found.predictions, predictions)
    rows = np.arange(60)
    np.testing.assert_array_equal(found.margins, margins[rows, found.rivals])
    plain = certify.certify_margins(predictions, margins, frozen.margin_lipschitz())
    assert (found.radii >= plain.radii).all() and np.median(found.radii / plain.radii) > 1.2
    grid = np.quantile(found.radii, [0.1, 0.3, 0.5, 0.7, 0.9]).tolist() + [0.5, 1.0, 2.0]
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
    np.testing.assert_allclose(certify_with(np.zeros(8)), radii / 2, rtol=1e-14)
    np.testing.assert_allclose(certify_with(radii / 4), radii * 3 / 8, rtol=1e-14)
    assert (certify_with(radii * (1 + 1e-15)) == 0).all() and (certify_with(np.full(8, np.nan)) == 0).all()


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
