"""Attacks: on a linear classifier the nearest other class is known exactly, and no attack may beat a certificate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_helpers import norms
from tiers import everyday
from training_helpers import quick_compiles  # noqa: F401

from lipjax import attacks, bounds, operators
from lipjax.attacks import lipschitz_search, pgd
from lipjax.certify import FrozenNetwork
from lipjax.network import make_network

pytestmark = pytest.mark.mixed_dtypes

SHAPE = (4, 4, 1)
# What PGD may lack of the optimum on a linear function, as a fraction of the radius. In n steps of 2.5 epsilon / n the
# tangent of half the angle to the optimum shrinks by exp(-2.5) or more: from a start at 135 degrees to 22 degrees and a
# lack of 0.08, from one at 90 degrees, which is what random starts are near in 16 dimensions, to 9 degrees and 0.013.
SHORT = 0.013


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """Two classes: the second where w . x + b > 0."""

    w: jax.Array
    b: jax.Array

    def __call__(self, x):
        score = x.reshape(len(x), -1) @ self.w + self.b
        return jnp.stack([jnp.zeros_like(score), score], axis=1)


@pytest.fixture
def linear():
    """A classifier, 20 images well inside the pixel box, their labels, and their exact distances to the other class."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=16)
    images = rng.uniform(0.4, 0.6, (20, *SHAPE))
    b = -0.5 * w.sum()
    score = images.reshape(20, -1) @ w + b
    model = Linear(jnp.asarray(w), jnp.asarray(b))
    return model, images, (score > 0).astype(np.int32), np.abs(score) / np.linalg.norm(w)


def test_pgd_finds_the_closed_form_optimum(linear, key):
    model, images, labels, distance = linear
    for factor, succeeds in ((1.02, True), (0.99, False)):
        for i in (0, 7, 13):
            one, label = jnp.asarray(images[i : i + 1]), jnp.asarray(labels[i : i + 1])
            radius = factor * distance[i]
            moved = attacks.pgd_l2(model, one, label, radius, key, num_steps=20)
            assert (int(np.argmax(model(moved), 1)[0]) != int(labels[i])) == succeeds
            # The objective is linear, so the optimum is the radius along w: its gap is known.
            gap = np.linalg.norm(model.w) * (radius - distance[i])
            found = (model(moved)[0, 1] - model(moved)[0, 0]) * (1 - 2 * labels[i])
            assert gap - SHORT * np.linalg.norm(model.w) * radius <= found <= gap + 1e-9


def test_attack_distances_are_the_first_radius_that_suffices(linear):
    model, images, labels, distance = linear
    radii = (0.02, 0.05, 0.1, 0.2)
    found = attacks.attack_l2(model, images, labels, radii, num_steps=30, batch_size=8)  # the last batch is not full
    expected = np.array([min((r for r in radii if r > d), default=np.inf) for d in distance])
    clear = np.all([np.abs(distance / r - 1) > 3 * SHORT for r in radii], axis=0)
    assert clear.sum() >= 8 and len(set(expected[clear])) >= 3  # control: the radii differ in what they reach
    assert np.array_equal(np.isinf(found.distances[clear]), np.isinf(expected[clear]))
    assert np.all(found.distances[clear] <= expected[clear] * (1 + 1e-9))
    assert np.all(found.distances >= distance * (1 - 1e-12))
    np.testing.assert_allclose(norms(found.points - images), np.where(np.isinf(found.distances), 0, found.distances))
    wrong = np.argmax(np.asarray(model(jnp.asarray(found.points))), 1) != labels
    assert np.array_equal(wrong, np.isfinite(found.distances))


def test_without_steps_only_the_images_themselves_count(linear):
    model, images, labels, _ = linear
    wrong = labels.copy()
    wrong[3] = 1 - wrong[3]
    found = attacks.attack_l2(model, images, wrong, (0.5,), num_steps=0)
    assert found.distances[3] == 0 and np.isinf(np.delete(found.distances, 3)).all()


@pytest.mark.parametrize("epsilon", [0.3, 5.0])
def test_pgd_stays_in_the_ball_and_in_the_box(epsilon, key):
    model = Linear(jnp.asarray(np.random.default_rng(1).normal(size=16)), jnp.asarray(0.0))
    images = np.random.default_rng(2).integers(0, 2, (30, *SHAPE)).astype(float)  # corners of the box
    labels = jnp.asarray(np.argmax(model(jnp.asarray(images)), 1).astype(np.int32))
    moved = np.asarray(attacks.pgd_l2(model, jnp.asarray(images), labels, epsilon, key, num_steps=10))
    assert moved.min() >= 0 and moved.max() <= 1
    assert np.all(norms(moved - images) <= epsilon * (1 + 1e-12))
    assert np.any(norms(moved - images) > 0.1 * epsilon)  # control: it moves
    projected = np.asarray(attacks.project_l2(jnp.asarray(images - 0.5), epsilon))
    np.testing.assert_allclose(norms(projected), np.minimum(norms(images - 0.5), epsilon))


@functools.cache
def small():
    """A network, its certificate for 40 images, and these: float64."""
    rng = np.random.default_rng(3)
    ops = [
        ("conv", operators.Conv(jnp.asarray(rng.normal(size=(3, 3, 1, 4))), SHAPE)),
        ("activation", operators.MaxMin((4, 4, 4))),
        ("flatten", operators.Flatten((4, 4, 4))),
    ]
    head = operators.LinearHead(jnp.asarray(rng.normal(size=(3, 64))), jnp.asarray(rng.normal(size=3)))
    network = make_network(ops, head)
    images = rng.uniform(size=(40, *SHAPE))
    return network, FrozenNetwork(jax.tree.map(np.asarray, network)).certify(images), images


def margins(logits, labels):
    logits, rows = np.array(logits), np.arange(len(labels))
    own = logits[rows, labels]
    logits[rows, labels] = -np.inf
    return logits.max(1) - own


logits_of = jax.jit(lambda network, x: network(x))


@functools.partial(jax.jit, static_argnames=("method", "options"))
def searched(network, images, labels, epsilon, key, method, options):
    attack = attacks.pgd_l2 if method == "pgd" else attacks.apgd_l2
    return attack(network, images, labels, epsilon, key, **dict(options))


def search(epsilon, method, seed=0, **options):
    """Points and their margins on the images of `small`, away from the predictions."""
    network, certificate, images = small()
    labels = certificate.predictions.astype(np.int32)
    key = jax.random.key(seed)
    arguments = network, jnp.asarray(images), jnp.asarray(labels), jnp.asarray(epsilon), key
    moved = searched(*arguments, method, tuple(options.items()))
    return np.asarray(moved), margins(logits_of(network, moved), labels)


def test_apgd_is_no_worse_than_pgd_at_equal_steps():
    network, certificate, images = small()
    epsilon = 3 * certificate.radii
    before = margins(logits_of(network, jnp.asarray(images)), certificate.predictions)
    found = {method: search(epsilon, method, num_steps=15, objective="margin")[1] for method in ("pgd", "apgd")}
    assert found["apgd"].mean() >= found["pgd"].mean()
    # Control: both are far from where they started, on each image.
    assert np.all(found["pgd"] > before + 0.5 * np.abs(before)) and np.all(found["apgd"] > found["pgd"] - 0.2)


def test_apgd_finds_the_closed_form_optimum(linear, key):
    model, images, labels, distance = linear
    radii = distance * np.where(np.arange(20) % 2, 1.001, 0.999)
    points, gaps = attacks.attack_within(model, images, labels, radii, num_steps=25)
    optimum = np.linalg.norm(model.w) * (radii - distance)
    # Far nearer than PGD of as many steps: the step has been halved until the direction is that of w.
    assert np.all(gaps <= optimum + 1e-9) and np.all(gaps >= optimum - 1e-4 * np.linalg.norm(model.w) * radii)
    assert np.array_equal(gaps > 0, np.arange(20) % 2 == 1)
    np.testing.assert_allclose(norms(points - images), radii, rtol=1e-6)


def test_the_checkpoints_are_those_of_the_paper():
    assert pgd.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert pgd.checkpoints(1) == [1] and pgd.checkpoints(0) == []


@pytest.mark.parametrize("method", everyday(["pgd", "apgd"], "apgd"))
def test_every_image_has_its_own_epsilon_and_the_box_is_optional(method):
    _, certificate, images = small()
    epsilon = certificate.radii * np.geomspace(0.1, 30, len(images))
    for box in ((0.0, 1.0), None):
        moved, _ = search(epsilon, method, num_steps=8, box=box)
        assert np.all(norms(moved - images) <= epsilon * (1 + 1e-12))
        assert np.median(norms(moved - images) / epsilon) > 0.9  # control: epsilon is used up
        assert (moved.min() >= 0 and moved.max() <= 1) == (box is not None)


@pytest.mark.nightly
def test_restarts_and_targets_only_help():
    _, certificate, _ = small()
    epsilon = 2 * certificate.radii
    once, thrice = (search(epsilon, "apgd", num_steps=5, restarts=n)[1] for n in (1, 3))
    assert np.all(thrice >= once) and np.any(thrice > once)
    both = search(epsilon, "apgd", num_steps=5, objective="targeted_margin")[1]
    entropy = search(epsilon, "apgd", num_steps=5, objective="cross_entropy")[1]
    # All rivals one after another: about as good as the best of them at each step, or better.
    assert both.mean() > once.mean() - 0.05 * np.abs(once).mean() and entropy.mean() > once.mean() - np.abs(once).mean()


def test_bad_options_are_refused(linear):
    model, images, labels, _ = linear
    with pytest.raises(ValueError, match="Expected a method of"):
        attacks.attack_l2(model, images, labels, (0.1,), num_steps=1, method="fgsm")
    with pytest.raises(ValueError, match="Expected an objective of"):
        attacks.attack_l2(model, images, labels, (0.1,), num_steps=1, objective="hinge")
    with pytest.raises(ValueError, match="at least one restart"):
        attacks.attack_l2(model, images, labels, (0.1,), num_steps=1, restarts=0)


def test_no_attack_comes_within_a_certified_radius():
    network, certificate, images = small()
    labels = certificate.predictions.astype(np.int32)
    radii = tuple(np.quantile(certificate.radii, [0.25, 0.5, 0.9]) * 3)
    found = attacks.attack_l2(network, images, labels, radii, num_steps=15)
    assert np.isfinite(found.distances).any()
    assert np.all(found.distances >= certificate.radii)
    assert np.any(found.distances < 30 * certificate.radii)  # control: radii inflated that much are refuted
    # Between the radii, too: bisection.
    assert not np.any(np.isclose(found.distances[:, None], radii, rtol=1e-6))
    points, gaps = attacks.attack_within(network, images, labels, certificate.radii, num_steps=15)
    assert np.all(gaps < 0) and np.all(norms(points - images) <= certificate.radii * (1 + 1e-12))
    assert np.any(attacks.attack_within(network, images, labels, 5 * certificate.radii, num_steps=15)[1] > 0)


def flat_head(rng, features, num_classes=4):
    return operators.LinearHead(jnp.asarray(rng.normal(size=(num_classes, features))), jnp.ones(num_classes))


def test_the_lipschitz_constant_of_a_linear_network_is_found_exactly():
    rng = np.random.default_rng(5)
    network = make_network([("flatten", operators.Flatten(SHAPE))], flat_head(rng, 16), 0.4, 0.25)
    images = rng.uniform(size=(6, *SHAPE))
    found = attacks.lipschitz_lower_bound(network, images, num_steps=3)
    matrix = np.asarray(network.head.matrix) / 0.25
    exact = np.linalg.norm(matrix[:, None] - matrix, axis=2)
    np.testing.assert_allclose(found.table(4), exact, rtol=1e-6)
    proved = bounds.margin_lipschitz_bound(jax.tree.map(np.asarray, network))
    assert np.all(found.table(4) <= proved) and not np.any(found.table(4)[found.pairs[:, 0], 3] > 1.01 * exact.max())
    # Of all logits, by power iteration; more steps come nearer.
    more = attacks.lipschitz_lower_bound(network, images, num_steps=100, num_starts=1)
    assert found.whole <= more.whole * (1 + 1e-9) <= np.linalg.norm(matrix, 2) * (1 + 2e-9)
    assert more.whole == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-6)
    # Each number is the quotient at two points that are given.
    x, y = found.points[:, 0], found.points[:, 1]
    apart = (x - y).reshape(len(x), -1) @ (matrix[found.pairs[:, 0]] - matrix[found.pairs[:, 1]]).T
    quotients = np.abs(np.diag(apart)) / norms(x - y)
    np.testing.assert_allclose(quotients, found.lower, rtol=1e-6)
    # A search in float32, confirmed in float64.
    single = jax.tree.map(lambda a: a.astype(jnp.float32), network)
    again = attacks.lipschitz_lower_bound(single, images, num_steps=3, evaluate=lambda x: network(jnp.asarray(x)))
    np.testing.assert_allclose(again.table(4), exact, rtol=1e-6)
    with pytest.raises(ValueError, match="Expected float64 logits"):
        attacks.lipschitz_lower_bound(single, images, num_steps=1, evaluate=lambda x: np.zeros((len(x), 4), np.float32))
    with pytest.raises(ValueError, match="Expected images, at least one step"):
        attacks.lipschitz_lower_bound(network, images[:0])


def families():
    """Networks of several kinds: (name, network)."""
    rng = np.random.default_rng(6)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 4)))
    flatten = ("flatten", operators.Flatten((4, 4, 4)))
    conv = ("conv", operators.Conv(kernel, SHAPE, padding="CIRCULAR"))
    w1, w2 = jnp.asarray(rng.normal(size=(5, 64))), jnp.asarray(rng.normal(size=(4, 5)))
    mlp = operators.MLPHead(w1, jnp.asarray(rng.normal(size=5)), w2, jnp.zeros(4))
    return {
        "maxmin": make_network([conv, ("max", operators.MaxMin((4, 4, 4))), flatten], flat_head(rng, 64), 0.5, 0.5),
        "relu": make_network([conv, ("relu", operators.ReLU((4, 4, 4))), flatten], flat_head(rng, 64)),
        "mlp": make_network([conv, ("max", operators.MaxMin((4, 4, 4))), flatten], mlp),
    }


@pytest.mark.parametrize("family", everyday(["maxmin", "relu", "mlp"], "mlp"))
def test_no_search_exceeds_a_proved_lipschitz_constant(family):
    network = families()[family]
    images = np.random.default_rng(7).uniform(size=(12, *SHAPE))
    found = attacks.lipschitz_lower_bound(network, images, num_steps=10, num_starts=2)
    proved = FrozenNetwork(jax.tree.map(np.asarray, network)).margin_lipschitz()
    table = found.table(4)
    assert np.all(table <= proved) and np.array_equal(table, table.T) and len(found.pairs) == 6
    # Controls: the search is near what is proved, and finds at least the gradients at the images, mostly more.
    assert np.max(table / np.where(proved > 0, proved, np.inf)) > 0.3
    gradients = jax.jit(jax.jacrev(lambda x: network(x).sum(0)))(jnp.asarray(images))
    at_images = [np.sqrt(((gradients[i] - gradients[j]) ** 2).sum((1, 2, 3))).max() for i, j in found.pairs]
    assert np.all(found.lower >= np.array(at_images) * (1 - 1e-6)) and np.any(found.lower > np.array(at_images) * 1.001)


def test_of_many_classes_the_likeliest_pairs_are_searched():
    rng = np.random.default_rng(8)
    network = make_network([("flatten", operators.Flatten(SHAPE))], flat_head(rng, 16, 12))
    images = rng.uniform(size=(9, *SHAPE))
    found = attacks.lipschitz_lower_bound(network, images, num_steps=1, num_starts=1)
    logits = np.asarray(logits_of(network, jnp.asarray(images)))
    expected = {tuple(sorted(row)) for row in np.argsort(-logits, axis=1)[:, :2].tolist()}
    assert {tuple(pair) for pair in found.pairs.tolist()} == expected
    assert np.isnan(found.table(12)).sum() == 12 * 11 - 2 * len(expected)


def hilly(x, xp):
    a, b = x[..., 0], x[..., 1]
    return xp.sin(4 * a) + 0.7 * xp.cos(5 * b) + 0.3 * a * b


def trace_of_auto_pgd(image, start, epsilon, num_steps, fired):
    """Algorithm 1 of arXiv:2003.01690 in the plane, from its description: the best point. Counts halvings by cause."""

    def gradient(x):
        slope = np.array([4 * np.cos(4 * x[0]) + 0.3 * x[1], -3.5 * np.sin(5 * x[1]) + 0.3 * x[0]])
        return slope / np.linalg.norm(slope)

    def project(x):
        return image + (x - image) * min(1.0, epsilon / np.linalg.norm(x - image))

    value = functools.partial(hilly, xp=np)
    x, previous, best, length = start, start, start, 2 * epsilon
    marks, last_mark, best_at_mark, halved, gains = pgd.checkpoints(num_steps), 0, value(start), False, 0
    for k in range(1, num_steps + 1):
        weight = 1.0 if k == 1 else 0.75
        ahead = project(x + length * gradient(x))
        previous, x = x, project(x + weight * (ahead - x) + (1 - weight) * (x - previous))
        gains += value(x) > value(previous)
        best = x if value(x) > value(best) else best
        if k in marks:
            few, stuck = gains < 0.75 * (k - last_mark), not halved and value(best) <= best_at_mark
            halved = few or stuck
            fired["few"] += few and not stuck
            fired["stuck"] += stuck and not few
            last_mark, best_at_mark, gains = k, value(best), 0
            length, x = (length / 2, best) if halved else (length, x)
    return best


@pytest.mark.parametrize("epsilon", [0.3, 1.5])
def test_auto_pgd_is_the_published_algorithm(epsilon):
    @jax.tree_util.register_static
    class Hilly:
        def __call__(self, x):
            value = hilly(x.reshape(len(x), 2), jnp)
            return jnp.stack([jnp.zeros_like(value), value], axis=1)

    images, key, num_steps = jnp.asarray(np.random.default_rng(3).normal(size=(40, 2, 1, 1))), jax.random.key(5), 40
    labels, options = jnp.zeros(40, jnp.int32), {"objective": "margin", "box": None}
    attack = jax.jit(lambda x: attacks.apgd_l2(Hilly(), x, labels, epsilon, key, num_steps=num_steps, **options))
    found = np.asarray(attack(images)).reshape(40, 2)
    # The random starts, as both attacks draw them.
    own = jax.random.fold_in(key, 0)
    noise = lipschitz_search.unit(jax.random.normal(own, images.shape, images.dtype))
    shares = jax.random.uniform(jax.random.fold_in(own, 1), (40,), images.dtype)
    starts = np.asarray(images + noise * shares[:, None, None, None] * epsilon).reshape(40, 2)
    fired = {"few": 0, "stuck": 0}
    flat = np.asarray(images).reshape(40, 2)
    expected = [trace_of_auto_pgd(a, b, epsilon, num_steps, fired) for a, b in zip(flat, starts, strict=True)]
    np.testing.assert_allclose(found, np.array(expected), atol=1e-9)
    assert fired["few"] > 0 and fired["stuck"] > 0  # control: each condition halved a step by itself
