"""What networks of all operators give for arrays of Decimal (an oracle) or of float32, sums from the end."""

import contextlib
import contextvars
import functools
from decimal import Decimal

import jax
import mpmath
import numpy as np
from deployment_networks import NETWORKS, draw

from lipjax import _dft, conv, operators
from lipjax.certify import FrozenNetwork, deployment
from lipjax.network import make_network

U = 2.0**-24


def numbers(array, dtype):
    array = np.asarray(array)
    return array.astype(np.float32) if dtype == np.float32 else np.vectorize(Decimal, otypes=[object])(array)


_ORDER = contextvars.ContextVar("order of summation", default=lambda n: np.arange(n)[::-1])


@contextlib.contextmanager
def in_order(order):
    """Sums of n terms in the order(n) of its indices, or halves by halves where that is None."""
    token = _ORDER.set(order)
    try:
        yield
    finally:
        _ORDER.reset(token)


def _by_halves(terms):
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def product(x, w):
    """(..., n) times (n, m), the last term first or as `in_order` says."""
    order = _ORDER.get()(len(w))
    if order is None:
        return _by_halves([x[..., k, None] * w[k] for k in range(len(w))])
    total = 0 * x[..., :1]
    for k in order:
        total = total + x[..., k, None] * w[k]
    return total


def float32_class(frozen, images, order):
    """Classes by float32 arithmetic with sums in an order: a context manager of `in_order`."""
    with order:
        return evaluate(frozen.network, images, np.float32).argmax(axis=1)


def convolve(x, kernel, strides=1, padding="ZERO"):
    (kh, kw, _, o), pads = kernel.shape, conv.explicit_padding(kernel.shape[:2], padding)
    (sh, sw), mode = conv.stride_pair(strides), "wrap" if padding == "CIRCULAR" else "constant"
    rows, columns = conv.output_size(x.shape[1:3], (kh, kw), strides, padding)
    x = np.pad(x, ((0, 0), *pads, (0, 0)), mode)
    patches = [x[:, sh * i : sh * i + kh, sw * j : sw * j + kw] for i in range(rows) for j in range(columns)]
    patches = np.stack([p.reshape(len(x), -1) for p in patches], 1)
    return product(patches, kernel.reshape(-1, o)).reshape(len(x), rows, columns, o)


def convolve_back(y, op, dtype):
    """The adjoint of a convolution: the products of its dense matrix, which is filled tap by tap."""
    kernel = numbers(conv.without_groups(op.kernel, op.groups, op.dilation), dtype)
    (kh, kw, c, o), pads = kernel.shape, conv.explicit_padding(kernel.shape[:2], op.padding)
    (h, w), (sh, sw), (rows, columns) = op.in_shape[:2], conv.stride_pair(op.strides), y.shape[1:3]
    matrix = np.full((rows, columns, o, h, w, c), 0 * kernel[0, 0, 0, 0])
    for i, j, s, t in np.ndindex(rows, columns, kh, kw):
        p, q = sh * i + s - pads[0][0], sw * j + t - pads[1][0]
        if op.padding == "CIRCULAR":
            p, q = p % h, q % w
        if 0 <= p < h and 0 <= q < w:
            matrix[i, j, :, p, q] += kernel[s, t].T
    return product(y.reshape(len(y), -1), matrix.reshape(rows * columns * o, -1)).reshape(len(y), h, w, c)


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


def spline(t, values, spacing):
    middle, channels = values.shape[1] // 2, np.arange(len(values))
    places = t / spacing
    first = np.clip(np.floor(places.astype(np.float64)).astype(int), -middle, middle - 1)
    left, right = values[channels, first + middle], values[channels, first + middle + 1]
    return left + (places - (first if values.dtype == object else first.astype(values.dtype))) * (right - left)


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
            kernel = conv.without_groups(op.kernel, op.groups, op.dilation)
            return convolve(x, of(kernel), op.strides, op.padding)
        case operators.ConvTranspose():
            return convolve_back(x, op.conv, dtype)
        case operators.ChannelShuffle():
            channels = np.arange(x.shape[-1]).reshape(-1, op.groups, 1 + op.paired)
            return x[..., channels.swapaxes(0, 1).ravel()]
        case operators.ConvExponential():
            y = x
            for k in range(op.num_terms, 0, -1):
                y = x + convolve(y, of(conv.without_groups(op.kernel, op.groups)), 1, op.padding) / of(float(k))
            return y
        case operators.CircularConv():
            return circular(op, x, dtype)
        case operators.ReLU():
            return np.maximum(x, 0 * x)
        case operators.LeakyReLU():
            return np.where(x > 0, x, of(op.negative_slope) * x)
        case operators.PartialAbs():
            return np.where(np.arange(x.shape[-1]) < op.channels, abs(x), x)
        case operators.NActivation():
            two = of(2.0)
            return np.maximum(x - two * of(op.upper), np.minimum(x - two * of(op.lower), -x))
        case operators.LinearSpline():
            return spline(x * of(op.scale), of(op.values), of(op.spacing)) / of(op.scale)
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
        case operators.ZeroPad():
            (top, bottom), (left, right) = op.pads
            zeros = 0 * np.repeat(x[:, :1], top + bottom, 1)
            x = np.concatenate([zeros[:, :top], x, zeros[:, top:]], 1)
            zeros = 0 * np.repeat(x[:, :, :1], left + right, 2)
            return np.concatenate([zeros[:, :, :left], x, zeros[:, :, left:]], 2)
        case operators.Crop():
            (top, bottom), (left, right) = op.crops
            return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
        case operators.PositionalBias():
            return x + of(op.bias)
        case operators.Shift():
            moved, n = x.copy(), op.channels
            for i, (step, axis) in enumerate(((-1, 1), (1, 1), (-1, 2), (1, 2))):
                moved[..., i * n : (i + 1) * n] = np.roll(x[..., i * n : (i + 1) * n], step, axis)
            return moved
        case operators.L2Pool():
            (h, w, c), (rows, columns) = op.in_shape, op.regions
            tokens = x.reshape(-1, rows, h // rows, columns, w // columns, c).transpose(0, 1, 3, 2, 4, 5)
            total = of(op.delta)
            for token in np.moveaxis(tokens.reshape(-1, rows, columns, h * w // rows // columns, c), 3, 0):
                total = total + token * token
            return np.vectorize(Decimal.sqrt, otypes=[object])(total) if exact else np.sqrt(total)
        case operators.Residual():
            y = x
            for part in op.ops:
                y = apply(part, y, dtype)
            return x + y
        case operators.PotentialStep() | operators.Sandwich():
            y = x
            for part in op.parts():
                y = apply(part, y, dtype)
            return x + y if op.adds_input else y
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


def float32_gap(frozen, images):
    """|float32 logit - frozen(images)|, (n, k), by one program, as reports measure it; infinite where it is NaN."""
    found = deployment._float32_logits(frozen, images, len(images))
    return deployment._gap(found, frozen(images, len(images)))
