"""Radii of the MLP head: the papers' certificates, attack on the head, edges. test_mlp.py holds the proofs."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mlp_helpers import GOLDEN, golden, head_attack, random_head
from tiers import everyday

from lipjax import certify, curvature, operators
from lipjax.certify.radius import minorant_radius
from lipjax.parametrize import lln

pytestmark = pytest.mark.quick_compiles

PARITY = 1e-9
mpmath.mp.dps = 50


@functools.partial(jax.jit, static_argnames="method")
def pair_radii(features, weights, labels, rivals, curvatures, method):
    """`mlp_radius` of the two-class head of every label and rival: (b, r). curvatures (b, r, 2): m and M."""
    w1, b1, w2, b2 = weights

    def one(a, label, rival, sides):
        table = jnp.zeros((2, 2)).at[0, 1].set(sides[0]).at[1, 0].set(sides[1])
        pair = jnp.stack([label, rival])
        return certify.mlp_radius(a[None], w1, b1, w2[pair], b2[pair], method, table)[0]

    return jax.vmap(jax.vmap(one, (None, None, 0, 0)))(features, labels, rivals, curvatures)


def test_minorant_radius_does_not_cancel():
    one = jnp.ones(1)
    got = minorant_radius(one / 2, one[None], jnp.zeros((1, 1)), 1e-12 * one, jnp)
    exact = 2 * mpmath.mpf(0.5) / (1 + mpmath.sqrt(1 + 2 * mpmath.mpf(1e-12) * mpmath.mpf(0.5)))
    assert abs(float(got[0]) / float(exact) - 1) <= 4 * 2**-53 and float(got[0]) <= 0.5
    assert (np.sqrt(1 + 2e-12 * 0.5) - 1) / 1e-12 > 0.5  # control: the textbook form


def test_minorant_radius_is_the_best_multiplier_of_the_dual_problem():
    rng = np.random.default_rng(0)
    gradient, step = rng.normal(size=(2, 400, 3)) * [[[1.0]], [[0.3]]]
    m, value = rng.uniform(0.1, 3, 400), rng.normal(size=400)
    got = minorant_radius(value, gradient, step, m, np)
    eta = np.linspace(0, 1, 20001)[:-1, None] / m
    residual = sum((step[:, i] + eta * gradient[:, i]) ** 2 for i in range(3))
    dual = np.max(np.sum(step**2, axis=1) + 2 * eta * value - residual / (1 - eta * m), axis=0)
    assert (got > 0).sum() > 100 and (got == 0).sum() > 30
    np.testing.assert_allclose(got**2, np.maximum(dual, 0), rtol=1e-4, atol=1e-6)
    assert (got**2 >= dual * (1 - 1e-12))[dual > 0].all()  # the grid cannot beat it


@pytest.mark.parametrize("classes", everyday([10, 20], 20))
def test_parity_with_the_papers_code(classes):
    z, features, weights = golden(classes)
    out = {name.rpartition("/")[2]: z[name] for name in z.files if "/all_rivals/" in name}
    labels, rivals = jnp.asarray(z["input/labels"]), jnp.asarray(out["rivals"])
    np.testing.assert_allclose(operators.MLPHead(*weights)(features), z["output/logits"], rtol=PARITY)
    sides = jnp.stack([jnp.asarray(out["closed_form_m"]), jnp.asarray(out["closed_form_M"])], -1)
    closed = np.asarray(pair_radii(features, weights, labels, rivals, sides, "closed_form"))
    # A two-class head predicts whichever is larger; the original gives wrong labels the radius with a minus sign.
    np.testing.assert_allclose(closed, np.abs(out["cert_closed_form"]), rtol=PARITY)

    exact = jnp.stack([jnp.asarray(out["curv_m"]), jnp.asarray(out["curv_M"])], -1)
    sharp = np.asarray(pair_radii(features, weights, labels, rivals, exact, "closed_form"))
    dual = np.asarray(pair_radii(features, weights, labels, rivals, exact, "dual"))
    assert (dual >= sharp).all() and np.median(dual / sharp) > 1.2
    # Nowhere below the original, which stops at the last multiplier of a bisection and not at the best, and returns 0
    # where the residual of its Newton steps is not below 1e-6; ours needs no threshold.
    original = np.abs(out["cert_dual"])
    assert (dual >= original * (1 - PARITY)).all()
    assert (original == 0).any() and (dual[original == 0] > 0).all()
    reached = original > 0
    assert np.quantile(dual[reached] / original[reached], 0.2) < 1 + 2e-3  # mostly they agree

    if classes == 20:  # the original's default, without the ten last rivals: not sound, and nothing of ours
        for name in ("rivals", "cert_closed_form", "curv_m"):
            np.testing.assert_allclose(z[f"output/shortcut9/{name}"], out[name][:, :9], rtol=PARITY)
        assert (z["output/shortcut9/radius_closed_form"] >= z["output/all_rivals/radius_closed_form"]).all()


@pytest.mark.parametrize("classes", everyday([10, 20], 20))
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


def test_no_attack_inside_the_radius():
    _, features, weights = golden(10)
    features = jnp.concatenate([features, jnp.asarray(np.random.default_rng(0).normal(size=(24, features.shape[1])))])
    for method in ("closed_form", "dual"):
        radius = certify.mlp_radius(features, *weights, method=method)
        assert (head_attack(weights, features, radius * (1 - 1e-9)) > 0).all()
        # Control: further out the attack succeeds.
        assert (head_attack(weights, features, radius * 4).min(1) < 0).mean() > 0.9
    # The dual radius is not far from what the attack needs.
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
    assert np.isinf(np.asarray(certify.mlp_radius(features[:1], w1, b1, w2[:1], b2[:1]))).all()
    assert certify.mlp_radius(features[:0], w1, b1, w2, b2).shape == (0,)


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
            got = certify.mlp_radius(features, *weights, method=method, num_steps=2)
            if weights is large:
                table = curvature.norm_table(jnp.linalg.norm(weights[0], 2), weights[2])
                np.testing.assert_array_equal(got, certify.mlp_radius(features, *weights, method, table, num_steps=2))
    assert calls == [20]


@pytest.mark.x64_off
def test_float32_and_the_gradient():
    weights = random_head()
    features = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)))
    table = curvature.norm_table(jnp.linalg.norm(weights[0]), weights[2])
    closed = certify.mlp_radius(features, *weights, curvature=table)
    dual = certify.mlp_radius(features, *weights, method="dual", curvature=table, num_steps=3)
    assert closed.dtype == dual.dtype == jnp.float32
    assert (closed > 0).all() and (dual >= closed).all() and (dual > closed).any()
    grads = jax.grad(lambda *args: certify.mlp_radius(*args, curvature=table).sum(), (0, 1, 3))(features, *weights)
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
