"""Float32 deployments: bounds against 50-digit arithmetic, for several ways to evaluate, and what is refused."""

import decimal
import functools
import json
from decimal import Decimal

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from lipjax import _dft, _float32, activations, conv, deployment, operators, pooling
from lipjax.errors import NotCertifiable, UserError
from lipjax.frozen import FrozenNetwork
from lipjax.network import make_network
from lipjax.operators import softplus as elementary

U = 2.0**-24


@pytest.fixture(autouse=True)
def _digits():
    with decimal.localcontext(prec=50):
        yield


# ---- the function of a network, for arrays of Decimal (then it is the oracle) or of float32, sums from the end ----


def numbers(array, dtype):
    array = np.asarray(array)
    return array.astype(np.float32) if dtype == np.float32 else np.vectorize(Decimal, otypes=[object])(array)


def product(x, w):
    """(..., n) times (n, m), the last term first."""
    total = 0 * x[..., :1]
    for k in reversed(range(len(w))):
        total = total + x[..., k, None] * w[k]
    return total


def convolve(x, kernel, strides=1, padding="ZERO"):
    (kh, kw, _, o), pads = kernel.shape, conv.explicit_padding(kernel.shape[:2], padding)
    (sh, sw), mode = conv.stride_pair(strides), "wrap" if padding == "CIRCULAR" else "constant"
    rows, columns = conv.output_size(x.shape[1:3], (kh, kw), strides, padding)
    x = np.pad(x, ((0, 0), *pads, (0, 0)), mode)
    patches = [x[:, sh * i : sh * i + kh, sw * j : sw * j + kw] for i in range(rows) for j in range(columns)]
    patches = np.stack([p.reshape(len(x), -1) for p in patches], 1)
    return product(patches, kernel.reshape(-1, o)).reshape(len(x), rows, columns, o)


def transform_matrix(size, dtype):
    """Rows: fixed frequencies, then real and imaginary part of the paired ones."""
    (h, w), grid, rows = size, _dft.grid(size), []
    with mpmath.workdps(50):
        for frequencies, is_paired in ((grid.fixed, False), (grid.paired, True)):
            for f1, f2 in frequencies.tolist():
                turns = [(f1 * p * w + f2 * q * h) % (h * w) for p, q in np.ndindex(h, w)]
                scale = mpmath.sqrt(mpmath.mpf(1 + is_paired) / (h * w))
                for function in (mpmath.cos, lambda a: -mpmath.sin(a))[: 1 + is_paired]:
                    circle = [scale * function(2 * mpmath.pi * a / (h * w)) for a in range(h * w)]
                    circle = [Decimal(mpmath.nstr(value, 45)) for value in circle]
                    rows.append([circle[a] for a in turns])
    return np.array(rows).astype(dtype)


def circular(op, x, dtype):
    fixed, paired = (numbers(a, dtype) for a in (op.fixed, op.paired))
    b, h, w, c = x.shape
    matrix = transform_matrix((h, w), dtype)
    z = product(x.reshape(b, h * w, c).swapaxes(1, 2), matrix.T)  # (b, c, frequencies)
    out = [product(z[..., i], block.T) for i, block in enumerate(fixed)]
    for i, (real, imaginary) in enumerate(paired):
        re, im = z[..., len(fixed) + 2 * i], z[..., len(fixed) + 2 * i + 1]
        out.append(product(re, real.T) - product(im, imaginary.T))
        out.append(product(re, imaginary.T) + product(im, real.T))
    return product(np.stack(out, -1), matrix).swapaxes(1, 2).reshape(b, h, w, -1)


def square(d):
    size = d[0] * d[0] + d[1] * d[1]
    return (d[0] * d[0] - d[1] * d[1]) / size, 2 * d[0] * d[1] / size


def times(k, z):
    return k[0] * z[0] - k[1] * z[1], k[0] * z[1] + k[1] * z[0]


def fold(d, z):
    left = d[0] * z[1] - d[1] * z[0] >= 0
    folded = times(square(d), (z[0], -z[1]))
    return [np.where(left, a, b) for a, b in zip(z, folded, strict=True)]


def fold_sectors(directions, z):
    """By the sectors of docs/soundness.md, section 10, in the frame of the first ray."""
    p, q, r = directions
    x, y = times((p[0], -p[1]), z)
    edge = np.where(y >= 0, q[0], -r[0]), np.where(y >= 0, q[1], r[1])
    turn = edge[0] * abs(y) - edge[1] * x
    cone = (turn < 0) | ((turn == 0) & (x > 0))
    beyond = times(q, r)[0] * y - times(q, r)[1] * x > 0
    mirrored = z[0], -z[1]
    inside = [np.where(y >= 0, a, b) for a, b in zip(z, times(square(p), mirrored), strict=True)]
    turned = square(r)[0], -square(r)[1]
    outside = zip(times(turned, z), times(times(square(p), square(q)), mirrored), strict=True)
    return [np.where(cone, a, np.where(beyond, b, c)) for a, (b, c) in zip(inside, outside, strict=True)]


def wedge_distance(d, z, root):
    length = root(d[0] * d[0] + d[1] * d[1])
    cos, sin = d[0] / length, d[1] / length
    a, b = z[0], abs(z[1])
    return np.where(cos * a + sin * b < 0, root(a * a + b * b), cos * b - sin * a)


def softplus_of(x, dtype):
    if dtype == np.float32:
        return np.maximum(x, 0) + np.log1p(np.exp(-abs(x)))
    return np.vectorize(lambda v: max(v, Decimal(0)) + (1 + (-abs(v)).exp()).ln(), otypes=[object])(x)


def apply(op, x, dtype):
    of = lambda a: numbers(a, dtype)  # noqa: E731
    exact = dtype is object
    halves = np.split(x, 2, axis=-1) if x.shape[-1] % 2 == 0 else None
    match op:
        case operators.Bias():
            return x + of(op.bias)
        case operators.Dense():
            return product(x, of(op.matrix).T)
        case operators.Conv():
            return convolve(x, of(op.kernel), op.strides, op.padding)
        case operators.ConvExponential():
            y = x
            for k in range(op.num_terms, 0, -1):
                y = x + convolve(y, of(op.kernel), 1, op.padding) / of(float(k))
            return y
        case operators.CircularConv():
            return circular(op, x, dtype)
        case operators.ReLU():
            return np.maximum(x, 0 * x)
        case operators.LeakyReLU():
            return np.where(x > 0, x, of(op.negative_slope) * x)
        case operators.Tanh():
            tanh = np.vectorize(lambda v: 1 - 2 / (1 + (2 * v).exp()), otypes=[object])
            return tanh(x) if exact else np.tanh(x)
        case operators.Sigmoid():
            sigmoid = np.vectorize(lambda v: 1 / (1 + (-v).exp()), otypes=[object])
            return sigmoid(x) if exact else 1 / (1 + np.exp(-x))
        case operators.Softplus():
            return softplus_of(x, dtype)
        case operators.MaxMin():
            return np.concatenate([np.maximum(*halves), np.minimum(*halves)], -1)
        case operators.MaxPoolPairs():
            return np.maximum(*halves)
        case operators.Householder():
            return np.concatenate(fold(of(op.direction), halves), -1)
        case operators.Householder2():
            return np.concatenate(fold_sectors(of(op.directions), halves), -1)
        case operators.ProjectionPool():
            root = np.vectorize(Decimal.sqrt, otypes=[object]) if exact else np.sqrt
            return wedge_distance(of(op.direction), halves, root)
        case operators.Flatten():
            return x.reshape(len(x), -1)
        case operators.SpaceToDepth():
            (h, w, c), s = op.in_shape, op.block
            x = x.reshape(-1, h // s, s, w // s, s, c).transpose(0, 1, 3, 5, 2, 4)
            return x.reshape(-1, h // s, w // s, c * s * s)
        case operators.PadChannels():
            zeros = 0 * np.repeat(x[..., :1], op.channels - x.shape[-1], -1)
            return np.concatenate([x, zeros], -1)
        case operators.CropChannels():
            return x[..., : op.channels]
        case operators.Residual():
            y = x
            for part in op.ops:
                y = apply(part, y, dtype)
            return x + y
        case operators.LinearHead():
            return product(x, of(op.matrix).T) + of(op.bias)
        case operators.MLPHead():
            hidden = softplus_of(product(x, of(op.w1).T) + of(op.b1), dtype)
            return product(hidden, of(op.w2).T) + of(op.b2)
    raise AssertionError(op)


def evaluate(network, images, dtype):
    x = (numbers(images, dtype) - numbers(network.input_mean, dtype)) / numbers(network.input_std, dtype)
    for op in (*network.ops, network.head):
        x = apply(op, x, dtype)
    return x


# ---- networks of all operators ----


def draw(rng, *shape, scale=1.0):
    return rng.normal(size=shape) * scale


def direction(rng, n, highest=np.pi):
    angles = rng.uniform(0, highest, n)
    return np.stack([np.cos(angles), np.sin(angles)])


def convolutional(rng, scale):
    kernel = draw(rng, 3, 3, 4, 4, scale=0.2)
    skew = (kernel - np.flip(kernel, (0, 1)).swapaxes(2, 3)) / 2
    directions = np.stack([direction(rng, 3) for _ in range(3)])
    return (4, 4, 2), [
        operators.Conv(draw(rng, 3, 3, 2, 4, scale=scale / 4), (4, 4, 2)),
        operators.Bias(draw(rng, 4, scale=scale), (4, 4, 4)),
        operators.MaxMin((4, 4, 4)),
        operators.ConvExponential(skew, (4, 4, 4), 6),
        operators.Householder(direction(rng, 2), (4, 4, 4)),
        operators.Conv(draw(rng, 2, 3, 4, 6, scale=scale / 5), (4, 4, 4), (2, 1), "CIRCULAR"),
        operators.Bias(draw(rng, 6, scale=scale), (2, 4, 6)),
        operators.Householder2(directions, (2, 4, 6)),
        operators.MaxPoolPairs((2, 4, 6)),
        operators.Flatten((2, 4, 3)),
        operators.Dense(draw(rng, 6, 24, scale=scale / 5)),
    ]


def circulant(rng, scale):
    blocks = draw(rng, 4, 8, 10, scale=scale / 4), np.zeros((0, 2, 8, 10))
    return (4, 4, 2), [
        operators.SpaceToDepth((4, 4, 2), 2),
        operators.PadChannels((2, 2, 8), 10),
        operators.CircularConv.from_blocks(*blocks, (2, 2, 10)),
        operators.Bias(draw(rng, 8, scale=scale), (2, 2, 8)),
        operators.ProjectionPool(direction(rng, 4, np.pi / 2), (2, 2, 8)),
        operators.CropChannels((2, 2, 4), 3),
        operators.Flatten((2, 2, 3)),
        operators.Dense(draw(rng, 6, 12, scale=scale / 3)),
        operators.LeakyReLU((6,), 0.3),
    ]


def factored(rng, scale):
    """More pixels than one matrix of the transform takes."""
    blocks = draw(rng, 2, 3, 1, scale=scale), draw(rng, 35, 2, 3, 1, scale=scale)
    return (9, 8, 1), [
        operators.CircularConv.from_blocks(*blocks, (9, 8, 1)),
        operators.Flatten((9, 8, 3)),
        operators.Dense(draw(rng, 6, 216, scale=scale / 15)),
        operators.MaxMin((6,)),
    ]


def elementwise(rng, scale):
    kinds = (operators.ReLU, operators.Tanh, operators.Sigmoid, operators.Softplus)
    ops = [operators.Flatten((4, 4, 2)), operators.Dense(draw(rng, 6, 32, scale=scale / 6))]
    for kind in kinds:
        ops += [operators.Bias(draw(rng, 6, scale=scale), (6,)), kind((6,))]
        ops.append(operators.Dense(draw(rng, 6, 6, scale=scale / 2)))
    return (4, 4, 2), ops


def residual(rng, scale):
    """Blocks that follow each other, that end in a sum, begin with a fold, and have a value at 0."""
    shape, vectors = (4, 4, 4), (6,)
    return (4, 4, 2), [
        operators.Conv(draw(rng, 3, 3, 2, 4, scale=scale / 4), (4, 4, 2)),
        operators.Residual(
            (
                operators.Conv(draw(rng, 3, 3, 4, 4, scale=scale / 6), shape),
                operators.Bias(draw(rng, 4, scale=scale), shape),
                operators.MaxMin(shape),
            )
        ),
        operators.Residual((operators.MaxMin(shape), operators.Conv(draw(rng, 3, 3, 4, 4, scale=scale / 6), shape))),
        operators.Bias(draw(rng, 4, scale=scale), shape),
        operators.MaxMin(shape),
        operators.Flatten(shape),
        operators.Dense(draw(rng, 6, 64, scale=scale / 8)),
        operators.Residual(
            (
                operators.Dense(draw(rng, 5, 6, scale=scale / 3)),
                operators.Bias(draw(rng, 5, scale=scale), (5,)),
                operators.Sigmoid((5,)),
                operators.Dense(draw(rng, 6, 5, scale=scale / 3)),
            )
        ),
        operators.MaxMin(vectors),
    ]


NETWORKS = {f.__name__: f for f in (convolutional, circulant, factored, elementwise, residual)}


@functools.cache
def frozen_network(name, scale=1.0):
    rng = np.random.default_rng(0)
    _, ops = NETWORKS[name](rng, scale)
    head = operators.LinearHead(draw(rng, 3, 6, scale=scale), draw(rng, 3, scale=scale))
    if name == "circulant":
        head = operators.MLPHead(draw(rng, 5, 6), draw(rng, 5), draw(rng, 3, 5), draw(rng, 3))
    network = make_network([(f"op{i}", op) for i, op in enumerate(ops)], head, 0.3, 0.7)
    return FrozenNetwork(jax.tree.map(np.asarray, network))


def pixels(frozen, count, seed=1):
    images = np.random.default_rng(seed).uniform(0, 1, (count, *frozen.in_shape))
    images[0] = np.round(images[0] * 255) / 255
    return images


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


@pytest.mark.parametrize("name", NETWORKS)
def test_no_float32_evaluation_is_further_off_than_proved(name):
    frozen = frozen_network(name)
    images = pixels(frozen, 4)
    exact = evaluate(frozen.network, images, object)
    np.testing.assert_allclose(exact.astype(float), frozen(images, 4), rtol=0, atol=1e-12)  # the same function
    bound, worst = deployment.float32_error(frozen, images), 0.0
    assert np.isfinite(bound).all()
    for run in (as_one_program, operator_by_operator, from_the_end):
        error = np.abs(numbers(run(frozen, images), object) - exact).astype(float)
        assert (error <= bound).all(), run
        worst = max(worst, error.max())
    assert worst > 1e-9  # control: float32 it was
    assert bound.max() < 3e3 * worst
    gap = deployment.float32_gap(frozen, images, batch_size=4)
    assert (gap <= bound * (1 + 1e-6)).all() and gap.max() > 1e-9


EXACT = (
    operators.Flatten,
    operators.SpaceToDepth,
    operators.PadChannels,
    operators.CropChannels,
    operators.MaxMin,
    operators.MaxPoolPairs,
    operators.ReLU,
)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_operator_adds_more_than_its_part(name):
    frozen = frozen_network(name)
    network = frozen.network
    x = (pixels(frozen, 4).astype(np.float32) - np.float32(0.3)) / np.float32(0.7)
    parts = _float32.locals_of(network, frozen.lipschitz_report())[1:]
    for op, local in zip(network.ops, parts, strict=True):
        exact, absolute = apply(op, numbers(x, object), object), np.abs(x).astype(np.float64)
        sums = 0.0
        if isinstance(op, operators.Dense):
            sums = lengths(absolute @ np.abs(op.matrix).T)
        elif isinstance(op, operators.Conv):
            sums = lengths(convolve(absolute, np.abs(op.kernel), op.strides, op.padding))
        allowed = local.absolute + local.relative * lengths(absolute) + local.weighted * sums
        single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), op)
        found = [apply(op, x, np.float32), np.asarray(_apply(single, jnp.asarray(x)))]
        errors = [lengths((numbers(y, object) - exact).astype(float)) for y in found]
        assert all((error <= allowed).all() for error in errors), op
        if isinstance(op, EXACT):
            assert not np.any(errors)
        else:  # control
            assert np.max(errors / allowed) > 1e-4, op
        x = found[0]
    exact = apply(network.head, numbers(x, object), object)
    allowed, _ = deployment._head_local(network.head, x.astype(np.float64))
    error = np.abs(numbers(apply(network.head, x, np.float32), object) - exact).astype(float)
    assert (error <= allowed).all() and np.max(error / allowed) > 1e-3


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


def test_huge_and_tiny_numbers():
    frozen = frozen_network("elementwise", scale=1e14)
    images = pixels(frozen, 4)
    assert np.isinf(deployment.float32_error(frozen, images)).all()
    for scale in (1e3, 1e-3, 1e-9, 1e-20):
        frozen = frozen_network("elementwise", scale=scale)
        bound = deployment.float32_error(frozen, images)
        assert (deployment.float32_gap(frozen, images, 4) <= bound * (1 + 1e-6)).all() and np.isfinite(bound).all()
    images[0, 0, 0, 0] = np.nan
    found = deployment.float32_error(frozen_network("elementwise"), images)
    assert np.isinf(found[0]).all() and np.isfinite(found[1:]).all()

    ones = np.ones((1, 2))
    frozen = dense_network([[1e39, 0.0]])
    assert np.isinf(deployment.float32_error(frozen, ones)).all()
    assert np.isinf(deployment.float32_gap(frozen, ones, 1)).all()
    frozen = dense_network([[1e-30, 1e-38]])  # the second is flushed to zero, perhaps
    bound = deployment.float32_error(frozen, ones)
    assert (deployment.float32_gap(frozen, ones, 1) <= bound).all() and bound.max() < 1e-33


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_of_a_ball_hold_at_its_points(name):
    frozen = frozen_network(name)
    analysis = deployment._Analysis(frozen)
    images = np.clip(pixels(frozen, 4), 0.3, 0.7)
    here = analysis.evaluate(images, 4)
    for radius in (1e-3, 0.3):
        step = np.random.default_rng(2).normal(size=images.shape)
        step *= radius / np.linalg.norm(step.reshape(4, -1), axis=1).max() * (1 - 1e-9)
        there = analysis.evaluate(np.clip(images + step, 0, 1), 4)
        assert (there.error32 <= here.error32 + analysis.spread * radius).all()
        further = analysis.head.slope * (analysis.spread + analysis.lipschitz) * radius
        assert (there.head32 <= here.head32 + further).all()


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
    known = set(_float32._local.registry)
    assert set(operators.OPERATORS.values()) <= known and Doubled not in known

    class Head(operators.LinearHead):
        pass

    with pytest.raises(NotCertifiable, match="head of type Head"):
        _float32.HeadConstants(Head(np.eye(2), np.zeros(2)))


# ---- what the bounds of operators rest on ----


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
