"""Networks of all operators, small ones, for tests of what float32 makes of them."""

import jax.numpy as jnp
import numpy as np

from lipjax import conv, operators


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


def grouped(rng, scale):
    """Groups, dilation (on a map of two pixels, too), transposed convolutions and channels in another order."""
    kernel = draw(rng, 3, 3, 2, 4, scale=0.3)
    skew = np.asarray(conv.skew_kernel(jnp.asarray(kernel), 2))
    transposed = operators.Conv(draw(rng, 3, 2, 1, 8, scale=scale / 3), (4, 4, 4), 2, ((1, 1), (0, 1)), 4)
    return (4, 4, 4), [
        operators.ChannelShuffle((4, 4, 4), 2),
        operators.Conv(draw(rng, 3, 3, 2, 8, scale=scale / 4), (4, 4, 4), 2, "ZERO", 2),
        operators.Bias(draw(rng, 8, scale=scale), (2, 2, 8)),
        operators.MaxMin((2, 2, 8)),
        operators.Conv(draw(rng, 3, 2, 1, 8, scale=scale / 2), (2, 2, 8), 1, "CIRCULAR", 8, (2, 3)),
        operators.ConvTranspose(transposed),
        operators.Bias(draw(rng, 4, scale=scale), (4, 4, 4)),
        operators.ChannelShuffle((4, 4, 4), 2, paired=True),
        operators.ConvExponential(skew, (4, 4, 4), 5, groups=2),
        operators.MaxMin((4, 4, 4)),
        operators.Flatten((4, 4, 4)),
        operators.Dense(draw(rng, 6, 64, scale=scale / 8)),
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
    return (8, 6, 1), [
        operators.ZeroPad((8, 6, 1), ((0, 1), (1, 1))),
        operators.CircularConv.from_blocks(*blocks, (9, 8, 1)),
        operators.Crop((9, 8, 3), ((1, 0), (1, 1))),
        operators.Bias(draw(rng, 3, scale=scale), (8, 6, 3)),
        operators.Flatten((8, 6, 3)),
        operators.Dense(draw(rng, 6, 144, scale=scale / 15)),
        operators.MaxMin((6,)),
    ]


def elementwise(rng, scale):
    kinds = (operators.ReLU, operators.Tanh, operators.Sigmoid, operators.Softplus)
    ops = [operators.Flatten((4, 4, 2)), operators.Dense(draw(rng, 6, 32, scale=scale / 6))]
    for kind in kinds:
        ops += [operators.Bias(draw(rng, 6, scale=scale), (6,)), kind((6,))]
        ops.append(operators.Dense(draw(rng, 6, 6, scale=scale / 2)))
    return (4, 4, 2), ops


def channelwise(rng, scale):
    """Thresholds, moduli and splines; a comparison behind a bias that may join a sum."""
    shape, ramps = (4, 4, 4), 0.5 * (np.arange(9) - 4.0)
    values = np.abs(ramps) * rng.choice([-1.0, 0.5, 1.0], (6, 1)) + 0.1 * draw(rng, 6, 9)
    return (4, 4, 2), [
        operators.Conv(draw(rng, 3, 3, 2, 4, scale=scale / 4), (4, 4, 2)),
        operators.Bias(draw(rng, 4, scale=scale), shape),
        operators.NActivation(-abs(draw(rng, 4, scale=scale)), abs(draw(rng, 4, scale=scale)), shape),
        operators.Conv(draw(rng, 1, 1, 4, 4, scale=scale / 2), shape),
        operators.PartialAbs(shape, 0.5),
        operators.Flatten(shape),
        operators.Dense(draw(rng, 6, 64, scale=scale / 8)),
        operators.Bias(draw(rng, 6, scale=scale), (6,)),
        operators.LinearSpline(values, rng.uniform(0.5, 2.0, 6), (6,), 0.5),
        operators.Dense(draw(rng, 6, 6, scale=scale / 3)),
    ]


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


def potential(rng, scale):
    """Steps and sandwiches: behind the normalisation, behind each other, strided, circular, with a value at 0."""
    shape, ops = (4, 4, 2), []
    conv = operators.Conv(draw(rng, 3, 3, 2, 3, scale=scale / 5), shape, 2)
    ops.append(operators.PotentialStep(conv, draw(rng, 3, scale=scale), operators.ReLU((2, 2, 3))))
    blocks = draw(rng, 4, 3, 5, scale=scale / 3), draw(rng, 6, 2, 3, 5, scale=scale / 3)
    circle = operators.CircularConv.from_blocks(*blocks, (4, 4, 5))
    ops.append(operators.Sandwich(circle, draw(rng, 3, scale=scale), operators.ReLU((4, 4, 3)), 3))
    ops += [operators.Flatten((4, 4, 3))]
    stacked = operators.Dense(draw(rng, 5, 54, scale=scale / 8))
    ops.append(operators.Sandwich(stacked, draw(rng, 5, scale=scale), operators.Sigmoid((5,)), 6))
    last = operators.Dense(draw(rng, 4, 6, scale=scale / 3))
    ops.append(operators.PotentialStep(last, draw(rng, 4, scale=scale), operators.Softplus((4,))))
    return shape, [*ops, operators.Bias(draw(rng, 6, scale=scale), (6,)), operators.MaxMin((6,))]


def tokens(rng, scale):
    """Maps of tokens, in which biases of two kinds and a pool follow sums."""
    shape = (4, 6, 8)
    return (4, 6, 2), [
        operators.PadChannels((4, 6, 2), 8),
        operators.PositionalBias(draw(rng, 4, 6, 1, scale=scale), shape),
        operators.Conv(draw(rng, 1, 1, 8, 8, scale=scale / 3), shape),
        operators.Shift(shape, 1),
        operators.Conv(draw(rng, 1, 1, 8, 8, scale=scale / 3), shape),
        operators.Bias(draw(rng, 8, scale=scale), shape),
        operators.PositionalBias(draw(rng, 4, 6, 1, scale=scale), shape),
        operators.MaxMin(shape),
        operators.L2Pool(shape, (2, 3)),
        operators.Bias(draw(rng, 8, scale=scale), (2, 3, 8)),
        operators.Flatten((2, 3, 8)),
        operators.Dense(draw(rng, 6, 48, scale=scale / 8)),
        operators.MaxMin((6,)),
    ]


NETWORKS = {
    f.__name__: f
    for f in (convolutional, grouped, circulant, factored, elementwise, channelwise, residual, potential, tokens)
}
