"""CRM against the papers' own code (golden file), against a loop over its definition, and where it could break."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import relative

from lipjax import certify, losses

pytestmark = pytest.mark.quick_compiles

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "crm_liplt.npz")
PARITY = 1e-9  # relative, float64: the golden files' own tolerance
SETTING = {"temperature": 5.0, "radius": 0.6, "weight": 15.0}
VARIANTS = {
    "crm_softmax": losses.crm,
    "crm_softmax_misclassified": functools.partial(losses.crm, include_misclassified=True),
    "crm_softmax_boosted": functools.partial(losses.crm, boosted=True),
    "crm_max": losses.crm_max,
}
SETTING_ARRAYS = {name: np.float64(value) for name, value in SETTING.items()}


@pytest.fixture(scope="module")
def golden():
    """Logits, labels and pairwise constants, ten of each; the setting."""
    setting = zip(("temperature", "radius", "weight"), ("alpha", "r0", "mu"), strict=True)
    setting = {name: jnp.asarray(GOLDEN[f"input/crm_{letter}"]) for name, letter in setting}
    return [jnp.asarray(GOLDEN[f"input/crm_{name}"]) for name in ("logits", "labels", "pairwise")], setting


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(name, logits, labels, lipschitz, setting):
    """The mean loss with its gradients by logits, lipschitz and the (traced) setting."""

    def mean_loss(logits, lipschitz, setting):
        return VARIANTS[name](logits, labels, lipschitz, **setting).mean()

    return jax.value_and_grad(mean_loss, (0, 1, 2))(logits, lipschitz, setting)


@pytest.mark.parametrize("name", VARIANTS)
def test_parity_of_values_and_gradients(name, golden):
    arguments, setting = golden
    value, (grad_logits, grad_lipschitz, _) = value_and_grads(name, *arguments, setting)
    assert relative(value, GOLDEN[f"output/{name}/loss"]) < PARITY
    assert relative(grad_logits, GOLDEN[f"output/{name}/grad_logits"]) < PARITY
    assert relative(grad_lipschitz, GOLDEN[f"output/{name}/grad_pairwise"]) < PARITY
    # Control: another variant is another loss, and so is another setting. (The only wrong example lies beyond r0.)
    same = {name} if name in ("crm_max", "crm_softmax_boosted") else {"crm_softmax", "crm_softmax_misclassified"}
    others = [GOLDEN[f"output/{other}/loss"] for other in VARIANTS if other not in same]
    others += [value_and_grads(name, *arguments, setting | {key: 1.1 * setting[key]})[0] for key in setting]
    assert min(relative(value, np.asarray(other)) for other in others) > 1e-4


def test_the_golden_radii_are_certified_radii(golden):
    (logits, labels, lipschitz), setting = golden
    radii = np.asarray(jax.jit(certify.certified_radius)(logits, lipschitz))
    assert relative(radii, GOLDEN["output/crm_radii"]) < PARITY
    # Control: the gate and the labels decide something.
    assert 0 < (radii < float(setting["radius"])).sum() < 10 and 0 < (logits.argmax(axis=1) == labels).sum() < 10


def by_definition(y, label, lipschitz, *, temperature, radius, weight, kind, include_misclassified, boosted):
    """One example in plain Python, from specs."""
    p = int(np.argmax(y))
    radii = [(y[p] - y[j]) / lipschitz[p, j] for j in range(len(y)) if j != p]
    probabilities = np.exp(y) / np.exp(y).sum()
    loss = -math.log(probabilities[label])
    if boosted:
        loss -= math.log(1 - max(q for j, q in enumerate(probabilities) if j != label))
    if min(radii) < radius and (p == label or include_misclassified):
        if kind == "crm":
            loss += weight * math.log(sum(math.exp(-temperature * r) for r in radii)) / temperature
        else:
            loss += weight * math.exp(-temperature * min(radii)) / temperature
    return loss


def random_case(seed=0, examples=60, classes=5):
    rng = np.random.default_rng(seed)
    y, labels = rng.normal(size=(examples, classes)) * 2, rng.integers(0, classes, examples)
    labels[::2] = y[::2].argmax(axis=1)
    return y, labels, rng.uniform(0.5, 3, (classes, classes))  # not symmetric: rows are the predicted class's


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("include_misclassified", [False, True])
@pytest.mark.parametrize("kind", ["crm", "crm_max"])
def test_definition(kind, include_misclassified, boosted):
    y, labels, lipschitz = random_case()
    options = {"include_misclassified": include_misclassified, "boosted": boosted}
    loss = jax.jit(functools.partial(getattr(losses, kind), **options))
    got = loss(jnp.asarray(y), jnp.asarray(labels), jnp.asarray(lipschitz), **SETTING)
    define = functools.partial(by_definition, kind=kind, **options)
    expected = [define(row, label, lipschitz, **SETTING) for row, label in zip(y, labels, strict=True)]
    assert got.shape == (60,)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    # The diagonal plays no role; control: other entries, their order and the gate do.
    diagonal = jnp.where(jnp.eye(5) == 1, jnp.nan, jnp.asarray(lipschitz))
    np.testing.assert_array_equal(loss(jnp.asarray(y), jnp.asarray(labels), diagonal, **SETTING), got)
    for changed in (lipschitz.T, lipschitz * 1.01):
        assert np.abs(loss(jnp.asarray(y), jnp.asarray(labels), jnp.asarray(changed), **SETTING) - got).max() > 1e-3
    wider = loss(jnp.asarray(y), jnp.asarray(labels), jnp.asarray(lipschitz), **(SETTING | {"radius": 1.0}))
    assert 0 < (np.asarray(wider) != np.asarray(got)).sum() < 60


@jax.jit
def soft_radius(y, labels, lipschitz, temperature):
    penalised = losses.crm(y, labels, lipschitz, temperature=temperature, radius=np.inf, weight=1.0)
    return losses.cross_entropy(y, labels) - penalised


@pytest.mark.parametrize("temperature", [0.5, 5.0, 500.0])
def test_the_soft_radius_lies_below_the_hard_one_by_at_most_its_slack(temperature):
    y, _, lipschitz = random_case(1)
    hard = np.asarray(jax.jit(certify.certified_radius)(y, lipschitz))
    soft = np.asarray(soft_radius(y, y.argmax(axis=1), lipschitz, temperature))
    slack = math.log(4) / temperature
    assert (soft <= hard + 1e-12).all() and (hard <= soft + slack + 1e-12).all()
    assert temperature == 500 or (hard - soft).max() > 1e-2 * slack  # control: the two differ


def finite(grads):
    return all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_stay_finite(name):
    """Ties, constants that are 0 or almost, large logits; everything misclassified, or beyond the gate."""
    run = functools.partial(value_and_grads, name, setting=SETTING_ARRAYS)
    some = jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)))
    ties = jnp.array([[0.0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 1], [-1, -1, -2, -2], [2, 2, 2, 1.5]])
    ones, distinct = jnp.ones((4, 4)), jnp.asarray(np.random.default_rng(3).uniform(0.5, 2, (4, 4)))
    pairs = jnp.kron(jnp.eye(2), jnp.ones((2, 2)))  # classes 0, 1 and 2, 3 reach each other, no others
    labels = jnp.array([0, 1, 2, 3, 0, 1])
    for logits in (some, ties, 300 * some, 1e-300 * some, 1e6 * ties):
        for lipschitz in (ones, distinct, pairs, 1 - pairs, 0 * ones, 1e-200 * ones, 1e-100 * ones, 1e200 * ones):
            for chosen in (labels, logits.argmax(axis=1), (logits.argmax(axis=1) + 1) % 4):
                value, grads = run(logits, chosen, lipschitz)
                assert np.isfinite(float(value)) and finite(grads), (logits, lipschitz, chosen)
    # Control: a NaN among logits or constants is not hidden by the gate.
    for logits, lipschitz in ((some.at[0, 0].set(jnp.nan), ones), (some, jnp.nan * ones)):
        value, grads = run(logits, logits.argmax(axis=1), lipschitz)
        assert np.isnan(float(value)) and not finite(grads)


@pytest.mark.parametrize("kind", ["crm", "crm_max"])
def test_rivals_that_cannot_reach_the_class_add_nothing(kind):
    labels = jnp.array([0])

    @jax.jit
    def jitted(logits, lipschitz):
        loss = getattr(losses, kind)(logits, labels, lipschitz, **SETTING)
        return (loss - losses.cross_entropy(logits, labels))[0]

    def penalty(logits, first_row):
        lipschitz = np.ones((len(logits), len(logits)))
        lipschitz[0] = first_row
        return float(jitted(np.array([logits]), lipschitz))

    two, three, tied = [1.0, 0.5], [1.0, 0.8, 0.5], [1.0, 1.0, 0.5]
    alone = penalty(two, [1, 1])
    np.testing.assert_allclose(penalty(three, [1, 0, 1]), alone, rtol=1e-14)
    assert abs(penalty(three, [1, 1, 1]) - alone) > 0.1  # control
    # What small constants tend to is the value at 0.
    np.testing.assert_allclose(penalty(three, [1, 1e-3, 1]), alone, rtol=1e-14)
    # A rival with the same logit is at distance 0, whatever the constant.
    np.testing.assert_allclose(penalty(tied, [1, 0, 1]), penalty(tied, [1, 1, 1]), rtol=1e-14)
    # No rival can reach the class: no finite radius, no penalty.
    assert penalty(three, [1, 0, 0]) == 0 != alone


@pytest.mark.parametrize("name", VARIANTS)
def test_outside_of_the_gate_it_is_cross_entropy(name):
    y, _, lipschitz = random_case(4)
    right, wrong = y.argmax(axis=1), (y.argmax(axis=1) + 1) % 5
    loss = jax.jit(functools.partial(VARIANTS[name], temperature=5.0, weight=15.0))
    plain = jax.jit(losses.boosted_cross_entropy if "boosted" in name else losses.cross_entropy)
    np.testing.assert_array_equal(loss(y, right, lipschitz, radius=0.0), plain(y, right))
    penalised = np.asarray(loss(y, wrong, lipschitz, radius=100.0)) != np.asarray(plain(y, wrong))
    assert penalised.all() == penalised.any() == ("misclassified" in name)
    assert (np.asarray(loss(y, right, lipschitz, radius=100.0)) != np.asarray(plain(y, right))).all()  # control


def test_the_gate_is_a_constant_and_gradients_flow_through_logits_and_constants():
    y, _, lipschitz = random_case(5)
    labels = y.argmax(axis=1)
    radii = np.asarray(jax.jit(certify.certified_radius)(y, lipschitz))

    def grads(rows):
        return value_and_grads("crm_softmax", y[rows], labels[rows], lipschitz, SETTING_ARRAYS)[1]

    inside, outside = np.flatnonzero(radii < 0.6)[:8], np.flatnonzero(radii > 0.6)[:8]
    assert len(inside) == len(outside) == 8
    assert not np.asarray(grads(outside)[1]).any() and float(grads(outside)[2]["radius"]) == 0
    by_logits, by_lipschitz, by_setting = grads(inside)
    assert float(by_setting["radius"]) == 0 and np.asarray(by_lipschitz).any()
    # Against differences of the mean loss.
    rng, step = np.random.default_rng(6), 1e-6
    dy, dl = rng.normal(size=(8, 5)), rng.normal(size=(5, 5))

    def at(h):
        moved = y[inside] + h * dy, labels[inside], lipschitz + h * dl
        return float(value_and_grads("crm_softmax", *moved, SETTING_ARRAYS)[0])

    slope = float(np.vdot(by_logits, dy) + np.vdot(by_lipschitz, dl))
    np.testing.assert_allclose((at(step) - at(-step)) / (2 * step), slope, rtol=1e-6)


def test_boosted_cross_entropy_is_stable():
    logits, labels = jnp.array([[800.0, 0.0, 1.0], [0.0, 800.0, 799.0], [0.0, 0.0, 800.0]]), jnp.array([1, 1, 2])
    got = jax.jit(losses.boosted_cross_entropy)(logits, labels)
    # -log p_label - log(1 - p_rival): the rival of the first example has all but e^-799 of the probability.
    first = 800 + 799 - math.log1p(math.exp(-1))
    second = math.log1p(math.exp(-1)) + math.log1p(math.exp(-1))
    np.testing.assert_allclose(got, [first, second, 0.0], rtol=1e-12)
    assert finite(jax.jit(jax.grad(lambda y: losses.boosted_cross_entropy(y, labels).sum()))(logits))


def test_one_class_alone_has_no_rival():
    logits, labels = jnp.array([[0.3], [-2.0]]), jnp.array([0, 0])
    for name in ("crm_softmax_boosted", "crm_max"):
        value, grads = value_and_grads(name, logits, labels, jnp.ones((1, 1)), SETTING_ARRAYS)
        assert float(value) == 0 and finite(grads)


def test_both_precisions(precision):
    dtype = jnp.float64 if precision == "x64" else jnp.float32
    y, labels, lipschitz = random_case(7)
    setting = {name: np.asarray(value, dtype) for name, value in SETTING.items()}
    for name in ("crm_softmax_boosted", "crm_max"):
        for small in (0.5, 0.0, 1e-30):  # the last one's square underflows in float32
            lipschitz[:, 2] = small
            arguments = jnp.asarray(y, dtype), jnp.asarray(labels), jnp.asarray(lipschitz, dtype)
            value, grads = value_and_grads(name, *arguments, setting)
            assert value.dtype == dtype and np.isfinite(value) and finite(grads)
