"""Float32 deployments: bounds against 50-digit arithmetic, for several ways to evaluate, and what is refused."""

import decimal
import json
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deployment_helpers import NETWORKS, U, apply, evaluate, float32_gap, frozen_network, numbers, pixels, times
from tiers import everyday

from lipjax import activations, bounds, operators, pooling
from lipjax.certify import FrozenNetwork, deployment, float32, float32_merging
from lipjax.certify.float32_sums import SUMS, errors_at_images
from lipjax.certify.float64 import float64_on_cpu
from lipjax.errors import NotCertifiable, UserError
from lipjax.network import make_network
from lipjax.operators import softplus as elementary


@pytest.fixture(autouse=True)
def _digits():
    with decimal.localcontext(prec=50):
        yield


IMAGES = 2  # decimal arithmetic takes its time
_apply = jax.jit(lambda op, x: op(x))


def operator_by_operator(frozen, images):
    network = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), frozen.network)
    x = jnp.asarray(images, jnp.float32)
    for op in (network.normalize, *network.ops, network.head):
        x = _apply(op, x)
    return np.asarray(x, np.float64)


def as_one_program(frozen, images):
    return deployment._float32_logits(frozen, images, len(images)).astype(np.float64)


def from_the_end(frozen, images):
    return evaluate(frozen.network, images, np.float32).astype(np.float64)


@pytest.mark.parametrize("name", everyday(NETWORKS, "elementwise", "residual"))
def test_no_float32_evaluation_is_further_off_than_proved(name):
    frozen = frozen_network(name)
    images = pixels(frozen, IMAGES)
    exact = evaluate(frozen.network, images, object)
    np.testing.assert_allclose(exact.astype(float), frozen(images, IMAGES), rtol=0, atol=1e-12)  # the same function
    bound, worst = deployment.float32_error(frozen, images), 0.0
    assert np.isfinite(bound).all()
    for run in (as_one_program, operator_by_operator, from_the_end):
        error = np.abs(numbers(run(frozen, images), object) - exact).astype(float)
        assert (error <= bound).all(), run
        worst = max(worst, error.max())
    assert worst > 1e-9  # control: float32 it was
    assert bound.max() < 4e3 * worst
    gap = float32_gap(frozen, images)
    assert (gap <= bound * (1 + 1e-6)).all() and gap.max() > 1e-9


ADDING = (
    "convolutional",
    "grouped",
    "circulant",
    "factored",
    "channelwise",
    "potential",
    "tokens",
)  # beside those above
EXACT = (
    operators.ChannelShuffle,
    operators.PartialAbs,
    operators.Flatten,
    operators.SpaceToDepth,
    operators.PadChannels,
    operators.CropChannels,
    operators.ZeroPad,
    operators.Crop,
    operators.MaxMin,
    operators.MaxPoolPairs,
    operators.ReLU,
    operators.Shift,
)


@pytest.mark.parametrize("name", everyday(NETWORKS, *ADDING))
def test_no_operator_adds_more_than_its_part(name):
    frozen = frozen_network(name)
    network = frozen.network
    x = (pixels(frozen, IMAGES).astype(np.float32) - np.float32(0.3)) / np.float32(0.7)
    parts = float32.locals_of(network, frozen.lipschitz_report())[1:]
    for op, local in zip(network.ops, parts, strict=True):
        exact, nowhere = apply(op, numbers(x, object), object), np.zeros(IMAGES)
        found = added(op, local, x.astype(np.float64), nowhere)
        single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), op)
        computed = [apply(op, x, np.float32), np.asarray(_apply(single, jnp.asarray(x)))]
        errors = [lengths((numbers(y, object) - exact).astype(float)) for y in computed]
        for allowed in found:
            assert all((error <= allowed).all() for error in errors), op
        if isinstance(op, EXACT):
            assert not np.any(errors)
        else:  # control
            assert np.max(errors / found[1]) > 1e-4, op
        x = computed[0]
    exact = apply(network.head, numbers(x, object), object)
    _, both = deployment._head_local(network.head, x.astype(np.float64), np.zeros(IMAGES))
    error = np.abs(numbers(apply(network.head, x, np.float32), object) - exact).astype(float)
    for allowed in both:
        assert (error <= allowed).all() and np.max(error / allowed) > 1e-3


def added(op, local, x, distance):
    """Both bounds of what an operator adds to inputs that are exactly x."""
    if isinstance(op, operators.Composite):
        error64 = np.zeros(len(x))
        at = deployment._Values(jnp.asarray(x, jnp.float64), jnp.asarray(error64), np.stack([distance, distance]))
        row = bounds.operator_bounds(network_of(op))[1]
        with float64_on_cpu():
            return deployment._advance(op, row, local, at).errors
    found = np.zeros((2, len(x))) + local.absolute + local.relative * lengths(x)
    if isinstance(op, SUMS):
        with float64_on_cpu():
            rest = op, local.inner, None, local.leaves, local.whole, jnp.asarray(x), jnp.asarray(distance)
            found = found + np.asarray(errors_at_images(*rest))
    return found


def network_of(op):
    rows = int(np.prod(op.out_shape))
    ops = [("op", op), ("flatten", operators.Flatten(op.out_shape))] if len(op.out_shape) == 3 else [("op", op)]
    return make_network(ops, operators.LinearHead(np.zeros((2, rows)), np.zeros(2)))


def lengths(x):
    return np.linalg.norm(x.reshape(len(x), -1), axis=1)


def dense_network(matrix, bias=0.0, mean=0.0):
    rows, columns = np.shape(matrix)
    ops = [("dense", operators.Dense(jnp.asarray(matrix))), ("bias", operators.Bias(jnp.full(rows, bias), (rows,)))]
    network = make_network(ops, operators.LinearHead(jnp.eye(rows), jnp.zeros(rows)), mean)
    return FrozenNetwork(jax.tree.map(np.asarray, network))


def test_long_sums_need_a_bound_that_grows_with_them():
    n = 4096
    frozen = dense_network(np.ones((2, n)))
    images = np.full((1, n), 0.1)
    exact = 0.1 * n
    error = np.abs(from_the_end(frozen, images) - exact).max()
    assert 20 * U * exact < error <= deployment.float32_error(frozen, images).min()
    assert error > 0.01 * deployment.float32_error(frozen, images).max()  # and is not vacuous


def test_a_bias_may_join_the_sum_before_it():
    # An accumulator that starts at the bias loses every term that is small beside it.
    n = 1000
    frozen = dense_network(np.full((1, n), -1.0), bias=250.0)
    images = np.random.default_rng(0).uniform(2e-6, 4e-6, (1, n))
    total = np.float32(250)
    for pixel in images[0].astype(np.float32):
        total = np.float32(total - pixel)
    error = abs(Decimal(float(total)) - (250 - sum(Decimal(p) for p in images[0])))
    assert 100 * U * 250 < error <= deployment.float32_error(frozen, images)[0, 0]


@pytest.mark.parametrize("make", [lambda s: operators.LeakyReLU(s, -1.0), lambda s: operators.LeakyReLU(s, 0.0)])
def test_what_is_compared_may_be_another_version_than_what_is_chosen(make):
    """A number -b, compared as 0+ and chosen as -2b, is off by (2 - slope) b: more than both versions are."""
    op, b = make((1,)), 2.0**-20
    exact, chosen = float(np.asarray(op(np.array([[-b]])))[0, 0]), -2 * b
    factor = float32_merging._COPIES[operators.LeakyReLU]
    assert b < abs(chosen - exact) <= factor * b
    errors = {}
    for kind in (make, lambda s: operators.ReLU(s)):
        ops = [("bias", operators.Bias(np.ones(1), (1,))), ("act", kind((1,)))]
        head = operators.LinearHead(np.ones((2, 1)), np.zeros(2))
        frozen = FrozenNetwork(make_network(ops, head))
        errors[kind] = float32.locals_of(frozen.network, frozen.lipschitz_report())[1].absolute
    one, other = errors.values()
    assert one == pytest.approx(factor * other)


@pytest.mark.parametrize("kind", [operators.Householder, operators.Householder2, operators.ProjectionPool])
def test_the_side_of_a_fold_may_be_that_of_another_version(kind):
    """z = (b, -b) / sqrt(2) below the line of the fold, compared as 0 and reflected as 2 z: off by 3 b."""
    z = np.array([1.0, -1.0]) / math.sqrt(2)
    assert np.linalg.norm(2 * z - z[::-1]) == pytest.approx(3)  # (1, 1) is the line: a fold makes (-1, 1) of it
    assert float32_merging._COPIES[kind] >= 3


def test_huge_and_tiny_numbers():
    frozen = frozen_network("elementwise", scale=1e14)
    images = pixels(frozen, 4)
    assert np.isinf(deployment.float32_error(frozen, images)).all()
    for scale in (1e3, 1e-3, 1e-9, 1e-20):
        frozen = frozen_network("elementwise", scale=scale)
        bound = deployment.float32_error(frozen, images)
        assert (float32_gap(frozen, images) <= bound * (1 + 1e-6)).all() and np.isfinite(bound).all()
    images[0, 0, 0, 0] = np.nan
    found = deployment.float32_error(frozen_network("elementwise"), images)
    assert np.isinf(found[0]).all() and np.isfinite(found[1:]).all()

    ones = np.ones((1, 2))
    frozen = dense_network([[1e39, 0.0]])
    assert np.isinf(deployment.float32_error(frozen, ones)).all()
    assert np.isinf(float32_gap(frozen, ones)).all()
    frozen = dense_network([[1e-30, 1e-38]])  # the second is flushed to zero, perhaps
    bound = deployment.float32_error(frozen, ones)
    assert (float32_gap(frozen, ones) <= bound).all() and bound.max() < 1e-33


@pytest.mark.parametrize("name", everyday(NETWORKS, "circulant", "residual", "potential"))
def test_bounds_of_a_ball_hold_at_its_points(name):
    frozen = frozen_network(name)
    analysis = deployment._Analysis(frozen)
    images = np.clip(pixels(frozen, 4), 0.3, 0.7)
    here = analysis.evaluate(images, 4)
    for radius in (1e-3, 0.3):
        step = np.random.default_rng(2).normal(size=images.shape)
        step *= radius / np.linalg.norm(step.reshape(4, -1), axis=1).max() * (1 - 1e-9)
        there = analysis.evaluate(np.clip(images + step, 0, 1), 4)
        assert (there.error32[:, 1] <= here.error32[:, 1] + analysis.spread * radius).all()
        further = analysis.head.slope * (analysis.spread + analysis.lipschitz) * radius
        assert (there.head32[:, 1] <= here.head32[:, 1] + further).all()


def test_the_report():
    frozen = frozen_network("elementwise")
    images = pixels(frozen, 20)
    certificate = frozen.certify(images, 4)
    radii = (0.0, float(np.median(certificate.radii)))
    report = deployment.deployment_report(frozen, images, certificate, radii, 4)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["dtype"] == "float32" and report["num_images"] == 20 and report["device"].startswith("cpu")
    bound = deployment.float32_error(frozen, images, 4).max(axis=1)
    assert report["bound"]["largest"] == bound.max() and report["bound"]["without"] == 0
    assert bound.min() < report["bound"]["median"] <= bound.max()
    assert 0 < report["gap"]["median"] <= report["gap"]["largest"] < report["bound"]["largest"]
    assert report["gap"]["same_class"] == report["point"]["num_images"] == 20
    ball = report["ball"]
    assert ball["certified"] == ball["float32"] == 20 and 0.9 < ball["median_ratio"] < 1
    assert [row["exact"] for row in ball["radii"]] == [1.0, float(np.mean(certificate.radii > radii[1]))]
    assert 0.3 < ball["radii"][1]["float32"] <= ball["radii"][1]["exact"]

    # Accuracies are of images whose class is right, of pixels that are divided batch by batch.
    whole = np.round(images * 255)
    certificate = frozen.certify(whole / 255, 4)
    labels = np.where(np.arange(20) < 5, 1 - np.minimum(certificate.predictions, 1), certificate.predictions)
    found = deployment.deployment_report(frozen, whole / 255, certificate, radii, 4, labels=labels)
    again = deployment.deployment_report(
        frozen, whole.astype(np.uint8), certificate, radii, 3, labels=labels, pixel_max=255
    )
    assert found["ball"] == again["ball"] and found["point"] == again["point"]
    assert found["point"]["accuracy"] == 0.75 and found["ball"]["radii"][0]["accuracy"] == 0.75
    exact = certificate.radii[5:] / radii[1]  # float32 shortens them a little
    assert np.sum(exact > 1.05) / 20 <= found["ball"]["radii"][1]["accuracy"] <= np.sum(exact > 1) / 20

    # Next to biases of this size float32 sees no margin, and takes the first class.
    turned = _with_offset(frozen.network, 2 - certificate.predictions[0], 2.0**28)
    report = deployment.deployment_report(turned, images, turned.certify(images, 4), radii, 4)
    assert report["point"]["num_images"] == report["ball"]["float32"] == 0 and report["ball"]["certified"] == 20
    assert report["gap"]["same_class"] < 20
    json.dumps(report, allow_nan=False)

    none = deployment.deployment_report(frozen, images[:0], frozen.certify(images[:0], 4), radii, 4)
    assert none["bound"]["largest"] is None and none["ball"]["radii"][0]["exact"] is None
    ones, overflowing = np.ones((1, 2)), dense_network([[1e30, 1e30]])
    found = deployment.deployment_report(overflowing, ones, overflowing.certify(ones, 1))
    assert found["bound"] == {"largest": None, "median": None, "without": 1} and found["point"]["num_images"] == 0
    with pytest.raises(ValueError, match="20 images, got 3"):
        deployment.deployment_report(frozen, images[:3], certificate)
    with pytest.raises(UserError, match="Expected images of shape"):
        deployment.float32_error(frozen, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="batch_size"):
        deployment.float32_error(frozen, images, 0)


def _with_offset(network, turn, offset):
    """The network with its classes in a turned order and the same number added to all logits."""
    rows = (np.roll(a, turn, axis=0) for a in (network.head.matrix, network.head.bias + offset))
    head = operators.LinearHead(*rows)
    return FrozenNetwork(type(network)(network.ops, head, network.input_mean, network.input_std, network.names))


def test_float32_classes_are_those_of_the_report_inside_its_radii():
    frozen = frozen_network("elementwise")
    images = np.clip(pixels(frozen, 8), 0.25, 0.75)
    certificate = frozen.certify(images, 4)
    analysis = deployment._Analysis(frozen)
    radii = analysis.radii(analysis.evaluate(images, 4), certificate.predictions)
    assert (radii > 0).all() and (radii <= certificate.radii).all()
    steps = 1e-6 * np.eye(32).reshape(32, *frozen.in_shape)
    for image, p, r, radius in zip(images, certificate.predictions, certificate.rivals, radii, strict=True):
        logits = frozen(np.concatenate([image + steps, image[None]]), 4)
        margins = logits[:, p] - logits[:, r]
        towards = ((margins[-1] - margins[:-1]) / 1e-6).reshape(image.shape)  # the rival
        moved = image + towards / np.linalg.norm(towards) * min(radius, 0.24) * (1 - 1e-9)
        assert as_one_program(frozen, np.stack([moved] * 4)).argmax(axis=1).tolist() == [p] * 4


class Doubled(operators.Dense):
    """Of a known class by inheritance only."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Unknown(operators.Flatten):
    pass


def test_unknown_operators_are_refused_by_name():
    head = operators.LinearHead(jnp.eye(4), jnp.zeros(4))
    network = make_network([("odd", Unknown((2, 2)))], head)
    jax.tree_util.register_pytree_node(Unknown, lambda op: ((), op.in_shape), lambda shape, _: Unknown(shape))
    with pytest.raises(NotCertifiable, match="odd: no bound of the float32 error is known .* type Unknown"):
        deployment.float32_error(FrozenNetwork(network), np.zeros((1, 2, 2)))
    known = set(float32._local.registry)
    blocks = {cls for cls in operators.OPERATORS.values() if issubclass(cls, operators.Composite)}
    assert set(operators.OPERATORS.values()) - blocks <= known and operators.Composite in known and Doubled not in known

    class Head(operators.LinearHead):
        pass

    with pytest.raises(NotCertifiable, match="head of type Head"):
        float32.HeadConstants(Head(np.eye(2), np.zeros(2)))


def float32_samples():
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.uniform(-130, 7, 2**17))
    near = rng.integers(0, 320, 2**15) / 8 + rng.integers(-2, 3, 2**15) * np.exp2(rng.uniform(-24, -18, 2**15))
    both = np.concatenate([[0.0], sizes, near, rng.uniform(0, 40, 2**17)]).astype(np.float32)
    return np.concatenate([both, -both])


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus"])
def test_elementary_functions_of_float32_err_as_little_as_assumed(name):
    x = float32_samples()
    exact = getattr(elementary, f"{name}_of")(x.astype(np.float64), np)
    allowed = {"tanh": 12 * U, "sigmoid": 8 * U, "softplus": (16 + 2 * exact) * U}[name] + 2.0**-126
    as_float64 = getattr(elementary, f"{name}_of")  # the same formulas in float32
    with np.errstate(under="ignore"):
        formulas = as_float64(x, np)
    library = np.asarray(jax.jit(getattr(elementary, name))(jnp.asarray(x)))
    assert formulas.dtype == library.dtype == np.float32
    for found in (formulas, library):
        share = np.max(np.abs(found - exact) / allowed)
        assert 0.01 < share < 0.8


@pytest.mark.parametrize(("name", "turned", "roundings"), [("fold", 2, 35), ("sectors", 4, 133), ("wedge", 1, 18)])
def test_rounded_directions_move_folds_by_little(name, turned, roundings):
    rng = np.random.default_rng(4)
    count = 20000
    lengths = rng.uniform(0.6, 1.9, (3, 1, count))
    turns = rng.choice([0.0, np.pi / 2, np.pi, 1.0], (3, count)) * rng.choice([1.0, 1e-3, 1e-9], (3, count))
    turns = np.where(rng.uniform(size=(3, count)) < 0.5, turns, rng.uniform(0, np.pi, (3, count)))
    turns = turns / 2 if name == "wedge" else turns
    directions = np.abs([np.cos(turns), np.sin(turns)]) if name == "wedge" else [np.cos(turns), np.sin(turns)]
    directions = np.abs(np.stack(directions, 1) * lengths) * np.array([1, 1])[:, None]
    # Points on the edges and close to them, on either side.
    p, q, r = directions
    edges = [p, times(p, q), times(times(p, q), r), (-times(p, r)[0], -times(p, r)[1]), (-p[0], -p[1])]
    edge = np.stack([np.stack(e) for e in edges])[rng.integers(0, 5, count), :, np.arange(count)].T
    turn = rng.choice([0.0, 1e-8, -1e-8, 1e-7, -1e-7, 1e-4, -0.5], count)
    z = np.stack(times((np.cos(turn), np.sin(turn)), edge)) * 2.0 ** rng.uniform(-20, 20, count)
    z = z.astype(np.float32).astype(np.float64)
    function = {
        "fold": lambda d, z: activations.fold(z, d[0]),
        "sectors": lambda d, z: activations.fold_sectors(z, d),
        "wedge": lambda d, z: pooling.wedge_distance(z, d[0]),
    }[name]
    run = jax.jit(lambda d, z: function(d, z.reshape(1, -1)).reshape(-1, count))
    rounded = directions.astype(np.float32)
    exact, moved = np.asarray(run(directions, z)), np.asarray(run(rounded.astype(np.float64), z))
    size = np.linalg.norm(z, axis=0)
    shift = np.linalg.norm(moved - exact, axis=0) / size
    assert 0.3 * U < shift.max() <= turned * U * 1.001 + 1e-14
    computed = np.asarray(run(rounded, z.astype(np.float32))).astype(np.float64)
    share = np.linalg.norm(computed - exact, axis=0) / size / (roundings * U)
    assert 0.01 < share.max() < 1
