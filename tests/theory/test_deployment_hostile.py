"""Networks made to mislead: classes that float32 gets wrong inside exact radii, and never inside float32 radii."""

import jax
import numpy as np
import pytest
from deployment_helpers import draw, float32_class, in_order
from tiers import everyday

from lipjax import operators
from lipjax.certify import FrozenNetwork, deployment, float32, float32_merging
from lipjax.network import make_network

# Orders of 0 ... n - 1, or None for halves of halves.
ORDERS = {
    "forwards": lambda n: np.arange(n),
    "backwards": lambda n: np.arange(n)[::-1],
    "inwards": lambda n: np.argsort(np.minimum(np.arange(n), np.arange(n)[::-1]), kind="stable"),
    "outwards": lambda n: np.argsort(-np.minimum(np.arange(n), np.arange(n)[::-1]), kind="stable"),
    "odd ones first": lambda n: np.argsort(np.arange(n) % 2 == 0, kind="stable"),
    "by halves": lambda n: None,
}


def orthogonal(rng, n):
    return np.linalg.qr(draw(rng, n, n))[0]


def layers(rng, kind):
    """Two orthogonal layers with their biases, and a head that makes radii exact wherever no fold is crossed."""
    if kind == "dense":
        first, second = (operators.Dense(orthogonal(rng, 16)) for _ in range(2))
    else:
        first = operators.Conv(orthogonal(rng, 4).reshape(2, 2, 1, 4), (4, 4, 1), 2, "VALID")
        second = operators.Conv(orthogonal(rng, 4).reshape(1, 1, 4, 4), (2, 2, 4))
    biases = [np.zeros(layer.out_shape[-1]) for layer in (first, second)]
    row = draw(rng, 16) / 4
    return (first, second), biases, operators.LinearHead(np.stack([row, -row]), np.zeros(2))


def assemble(linear, biases, head):
    first, second = linear
    ops = [operators.Flatten((4, 4, 1))] if isinstance(first, operators.Dense) else []
    for layer, bias in zip(linear, biases, strict=True):
        ops += [layer, operators.Bias(bias, layer.out_shape), operators.MaxMin(layer.out_shape)]
    ops += [] if isinstance(first, operators.Dense) else [operators.Flatten(second.out_shape)]
    network = make_network([(f"op{i}", op) for i, op in enumerate(ops)], head, 0.5)
    return FrozenNetwork(jax.tree.map(np.asarray, network))


def compensated(place, size, linear, biases, head):
    """The same function but for the last digits of float64: a bias that the next layer takes away again."""
    biases, sizes = [np.array(b) for b in biases], np.full(16, size)
    if place == "last layer":
        biases[1] += size
        # MaxMin commutes with the addition of one number.
        return assemble(linear, biases, operators.LinearHead(head.matrix, head.bias - head.matrix @ sizes))
    biases[0] += size
    second = linear[1]
    weights = second.matrix.T if isinstance(second, operators.Dense) else second.kernel[0, 0]
    biases[1] -= size * weights.sum(axis=0)
    return assemble(linear, biases, head)


def gradients(frozen, images, predictions):
    """Of the margins of two classes, unit length."""
    steps = 1e-5 * np.eye(16).reshape(16, *frozen.in_shape)
    found = []
    for image, p in zip(images, predictions, strict=True):
        logits = frozen(np.concatenate([image + steps, image - steps]))
        margins = logits[:, p] - logits[:, 1 - p]
        found.append((margins[:16] - margins[16:]).reshape(image.shape))
    found = np.stack(found)
    return found / np.linalg.norm(found.reshape(len(found), -1), axis=1)[:, None, None, None]


def float32_radii(frozen, images, certificate):
    analysis = deployment._Analysis(frozen)
    radii = analysis.radii(analysis.evaluate(images, 64), certificate.predictions)
    return np.minimum(radii, certificate.radii)


def wrong(frozen, points, predictions):
    """Which float32 classes of points are not these, by every order of summation and by XLA: (orders + 1, n)."""
    found = [float32_class(frozen, points, in_order(order)) for order in ORDERS.values()]
    found.append(deployment._float32_logits(frozen, points, len(points)).argmax(axis=1))
    return np.stack(found) != predictions


@pytest.mark.parametrize(
    ("kind", "place"),
    everyday(
        [(kind, place) for kind in ("dense", "conv") for place in ("first layer", "last layer")],
        ("conv", "first layer"),
        ("dense", "last layer"),
    ),
)
def test_biases_that_compensate_each_other(kind, place):
    parts = layers(np.random.default_rng(5), kind)
    images = np.random.default_rng(6).uniform(0.4, 0.6, (48, 4, 4, 1))
    plain = assemble(*parts)
    certificate = plain.certify(images)
    kept = certificate.radii > 1e-3  # away from ties, where no radius says anything
    images, exact = images[kept], certificate.radii[kept]
    ratios, flips = [], []
    for size in (0.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8):
        frozen = compensated(place, size, *parts)
        certificate = frozen.certify(images)
        # The same function, with the same radii up to rounding in float64.
        np.testing.assert_allclose(certificate.radii, exact, rtol=0, atol=1e-5)
        p = certificate.predictions
        away = -gradients(plain, images, p)
        radii = float32_radii(frozen, images, certificate)
        for share in (1 - 1e-9, 0.5):
            inside = images + away * (radii * share)[:, None, None, None]
            safe = radii > 0
            assert not wrong(frozen, inside, p)[:, safe].any(), size
        # Just inside of the exact radius, where float64 still has the class that is proved.
        near = images + away * (certificate.radii * (1 - 1e-5) - 1e-7)[:, None, None, None]
        assert (frozen(near).argmax(axis=1) == p).all()
        flips.append(int(wrong(frozen, near, p).any(axis=0).sum()))
        ratios.append(float(np.median(radii / certificate.radii)))
    # Control: float32 does get classes wrong inside exact radii, and the larger the biases, the less is claimed for it.
    assert flips[0] == 0 and min(flips[1:]) >= 5, flips
    assert ratios[0] > 0.999 and 1 - 1e-3 > ratios[1] > ratios[2] > 0.3 and ratios[3:] == [0.0] * 5, ratios


def detector(size):
    """Class 0 for sums of 14 pixels in the exact sense; between two large numbers most orders lose them."""
    weights = np.concatenate([[size], np.ones(14), [-size]])
    linear = operators.Dense(np.stack([weights, np.zeros(16)]))
    head = operators.LinearHead(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([-3.0, 3.0]))
    network = make_network([("flatten", operators.Flatten((4, 4, 1))), ("sum", linear)], head)
    return FrozenNetwork(jax.tree.map(np.asarray, network))


def test_networks_that_detect_the_order_of_summation():
    image = np.full((1, 4, 4, 1), 0.5)
    image[0, 0, 0, 0] = image[0, 3, 3, 0] = 0.75
    for size, told_apart in ((2.0**26, True), (2.0**30, True), (2.0**7, False)):
        frozen = detector(size)
        certificate = frozen.certify(image)
        assert certificate.predictions[0] == 0 and certificate.radii[0] > 0  # 7 - 3 in exact arithmetic
        radius = float32_radii(frozen, image, certificate)
        found = wrong(frozen, image, certificate.predictions)
        # Control: some orders see the pixels and others do not.
        assert found.any() == told_apart and not found.all()
        assert (radius[0] == 0) == told_apart
        if not told_apart:
            weights = frozen.network.ops[1].matrix[0].reshape(4, 4, 1)
            assert radius[0] > 0.9 * certificate.radii[0]
            points = image - weights / np.linalg.norm(weights) * radius[0] * (1 - 1e-9)
            assert not wrong(frozen, points, certificate.predictions).any()


@pytest.mark.parametrize("biases", [1, 2, 3, 46, 200])
def test_many_biases_that_join_one_sum(biases):
    """Each is an addition more, as large as the sum: 1 + b + ... + b - 1 with b just below half an ulp gives 0."""
    unit = 2.0**-24
    bias = np.float64(np.float32(0.999 * unit))
    ops = [("dense", operators.Dense(np.array([[1.0, -1.0]])))]
    ops += [(f"bias{i}", operators.Bias(np.array([bias]), (1,))) for i in range(biases)]
    frozen = FrozenNetwork(make_network(ops, operators.LinearHead(np.eye(2, 1), np.zeros(2))))
    image = np.ones((1, 2))
    proved = float(np.max(deployment.float32_error(frozen, image)))
    total = np.float32(1)
    for _ in range(biases):
        total += np.float32(bias)
    error = abs(float(total - np.float32(1)) - biases * bias)
    assert error == biases * bias  # nothing of the biases is left
    assert error <= proved
    assert np.isfinite(proved) == (biases <= 2)  # of more nothing is claimed; two are counted


def largest_growth(ops, channels):
    """By how much a bound of the errors of all versions of a channel may grow in norm, the largest of all channels."""
    growth = 0.0
    for bound in np.eye(channels):
        for op in ops:
            if isinstance(op, operators.MaxMin):  # either number may be of the version that is further off
                bound = np.tile(np.maximum(*np.split(bound, 2)), 2)
            elif isinstance(op, operators.ChannelShuffle):
                bound = np.asarray(op(bound.reshape(1, 1, 1, -1))).ravel()
        growth = max(growth, np.linalg.norm(bound))
    return growth


SHAPE = (1, 1, 4)
SORTS, MOVES = operators.MaxMin(SHAPE), operators.ChannelShuffle(SHAPE, 2)
BETWEEN = (
    operators.Bias(np.ones(4), SHAPE),
    operators.ReLU(SHAPE),
    operators.PositionalBias(np.ones((1, 1, 1)), SHAPE),
)


@pytest.mark.parametrize(
    ("ops", "growth"),
    [
        ((SORTS,), 2**0.5),
        ((SORTS, SORTS, SORTS), 2**0.5),
        ((SORTS, *BETWEEN, SORTS), 2**0.5),
        ((SORTS, MOVES, SORTS), 2.0),  # a factor that were kept across moved channels would be too small here
        ((SORTS, MOVES, SORTS, *BETWEEN, SORTS), 2.0),
    ],
    ids=["one", "three", "between", "moved", "moved once"],
)
def test_versions_of_pairs_grow_as_much_as_they_can(ops, growth):
    assert largest_growth(ops, 4) == pytest.approx(growth)
    bound = float32_merging.merged(ops, [float32.Local() for _ in ops])[1].most
    assert growth <= bound <= growth * (1 + 1e-5)


def test_a_potential_step_may_read_two_versions_of_its_input():
    """What lies in front of k steps is off 1 + 2 k times as much behind them, where the constant of each is 1."""
    forward, back = (operators.Dense(np.array([[a]])) for a in (1.0, -1.0))
    steps = [operators.PotentialStep(op, np.zeros(1), operators.ReLU((1,))) for op in (forward, back)]
    x, off = 1.0, 2.0**-10
    versions, exact, worst = [x - off, x + off], x, []
    for step in steps:
        exact, own = float(np.asarray(step(np.array([[exact]])))[0, 0]), float(step.linear.matrix[0, 0])
        # Those of a step share what its product made of one of the versions: of that which is worse.
        ways = [[v - 2 * own * max(own * read, 0.0) for v in versions] for read in versions]
        versions = max(ways, key=lambda found: max(abs(v - exact) for v in found))
        worst.append(max(abs(v - exact) for v in versions) / off)
    assert worst == [3, 5]
    for count, expected in enumerate(worst, 1):
        ops = [operators.Dense(np.eye(1)), operators.ReLU((1,)), operators.Bias(np.ones(1), (1,)), *steps[:count]]
        head = operators.LinearHead(np.ones((2, 1)), np.zeros(2))
        network = make_network([(f"op{i}", op) for i, op in enumerate(ops)], head)
        frozen = FrozenNetwork(jax.tree.map(np.asarray, network))
        rows = frozen.lipschitz_report()
        assert [row.claimed for row in rows[4:]] == pytest.approx([1.0] * count)
        alone = float32._locals((network.normalize, *ops), rows)[0][3].absolute
        assert expected <= float32.locals_of(frozen.network, rows)[3].absolute / alone <= expected * (1 + 1e-5)
