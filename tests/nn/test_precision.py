"""bfloat16 activations: every operator follows, sums are float32, parameters and all that is estimated stay float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import equations, quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from lipjax import conv, operators
from lipjax.network import Application, _apply, make_network
from lipjax.training import step as steps
from lipjax.training.loop import Run

U16 = 2.0**-8  # of bfloat16: 8 bits
BFLOAT16 = {"narrow": jnp.bfloat16, "wide": jnp.float32}
SCHEDULE = {"epsilon": 0.1}


def examples():
    """(operator, how many roundings to bfloat16, each relative to the norm, reach its result) by its type's name."""
    keys = iter(jax.random.split(jax.random.key(0), 30))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    image, vector = (4, 4, 6), (6,)
    angles = normal(3)
    direction = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    skew = conv.skew_kernel(0.1 * normal(3, 3, 6, 6))
    square = operators.Conv(0.1 * normal(3, 3, 6, 6), image)
    # Entries of a map are rounded relative to its Frobenius norm: sqrt(rank) times the norm, at most 4 here but for
    # the discrete Fourier transform of 16 pixels, sqrt(16) as well; a result is rounded relative to its own.
    dense, fourier = 6, 16
    fixed, paired = conv.packed_response(skew, (4, 4))
    pairs = jnp.abs(direction)
    bias = operators.Bias(normal(6), image)
    return [
        (bias, 1),
        (operators.CircularConv.from_blocks(fixed, paired, image), fourier),
        (operators.CircularSeries(fixed, paired, image, 6, 3), 2 * fourier),
        (operators.ChannelShuffle(image, 2), 0),
        (operators.Conv(normal(3, 3, 6, 4), image, 2), dense),
        (operators.ConvTranspose(operators.Conv(normal(3, 3, 6, 4), image, 2)), dense),
        (operators.ConvExponential(skew, image, 3), 3 * dense),
        (operators.ConvExponential(skew, image, 3, fast_gradient=True), 3 * dense),
        (operators.Crop(image, ((1, 0), (0, 2))), 0),
        (operators.CropChannels(image, 2), 0),
        (operators.Dense(normal(5, 6)), dense),
        (operators.Flatten(image), 0),
        (operators.Householder(direction, image), 1),
        (operators.Householder2(jnp.stack([direction, pairs, pairs]), image), 1),
        (operators.L2Pool(image, (2, 1)), 1),
        (operators.LeakyReLU(image, 0.1), 1),
        (operators.LinearSpline(normal(6, 5), 1 + jnp.abs(normal(6)), image, 0.5), 2 * dense),
        (operators.MaxMin(vector), 0),
        (operators.MaxPoolPairs(vector), 0),
        (operators.NActivation(-jnp.abs(normal(6)), jnp.abs(normal(6)), image), 2),
        (operators.PadChannels(image, 8), 0),
        (operators.PartialAbs(image), 0),
        (operators.PositionalBias(normal(4, 4, 1), image), 1),
        (operators.PotentialStep(square, normal(6), operators.ReLU(image)), 2 * dense),
        (operators.ProjectionPool(pairs, image), 1),
        (operators.ReLU(image), 0),
        (operators.Residual((square, bias, operators.MaxMin(image))), 2 * dense),
        (
            operators.Sandwich(
                operators.Conv(0.1 * normal(3, 3, 6, 5), image), normal(5), operators.ReLU((4, 4, 5)), 2
            ),
            2 * dense,
        ),
        (operators.Shift(image, 1), 0),
        (operators.Sigmoid(image), 1),
        (operators.Softplus(image), 1),
        (operators.SpaceToDepth(image, 2), 0),
        (operators.Tanh(image), 1),
        (operators.ZeroPad(image, ((1, 0), (0, 2))), 0),
        (operators.Centered(square), 3 * dense),
        (operators.Centering(image), 2),
        (operators.Contraction(square), dense),
    ]


def test_every_operator_takes_bfloat16_under_strict_promotion():
    """Results and gradients of images are bfloat16, of parameters float32; the error is that of a few roundings."""
    ops = [op for op, _ in examples()]
    training_only = {"CircularSeries", "Centered", "Centering", "Contraction"}
    # A new operator needs an example.
    assert {type(op).__name__ for op in ops} == set(operators.OPERATORS) | training_only
    images = [jax.random.normal(jax.random.key(i), (5, *op.in_shape), jnp.bfloat16) for i, op in enumerate(ops)]

    def narrow(images, ops):
        return [_apply(x, (op,), **BFLOAT16)[0] for x, op in zip(images, ops, strict=True)]

    def narrow_with_gradients(images, ops):
        results, pull_back = jax.vjp(narrow, images, ops)
        return results, pull_back(results)

    def exact(images, ops):
        images, ops = jax.tree.map(lambda a: a.astype(jnp.float64), (images, ops))
        return [op(x) for x, op in zip(images, ops, strict=True)]

    with jax.numpy_dtype_promotion("strict"):
        results, (of_images, of_ops) = jax.jit(narrow_with_gradients)(images, ops)
        expected = jax.jit(exact)(images, ops)
    assert {a.dtype for a in (*results, *of_images)} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(of_ops)} == {jnp.dtype(jnp.float32)}
    for (op, roundings), x, y, z in zip(examples(), images, results, expected, strict=True):
        error = np.linalg.norm(np.asarray(y, np.float64) - z)
        size = max(np.linalg.norm(np.asarray(x, np.float64)), np.linalg.norm(z))
        assert error <= (roundings * U16 + 1e-5) * size, op
        # Control: what multiplies or adds is not exact.
        assert (error > 1e-4 * size) == (roundings > 0), op


def test_sums_are_float32():
    """Of 4096 and 8192 ones, in the forward and in the backward pass: in bfloat16 they would stop at 256."""
    shape = (64, 64, 2)
    ops = [
        ("conv/linear", operators.Conv(jnp.eye(2, dtype=jnp.float32)[None, None], shape)),
        ("conv/bias", operators.Bias(jnp.zeros(2, jnp.float32), shape)),
        ("flatten", operators.Flatten(shape)),
        ("dense/linear", operators.Dense(jnp.ones((2, 8192), jnp.float32))),
    ]
    network = make_network(ops, operators.LinearHead(jnp.eye(2, dtype=jnp.float32), jnp.zeros(2, jnp.float32)))
    x = jnp.ones((1, *shape), jnp.float32)

    def value(network):
        features, _ = network.features_and_means(x, Application("bfloat16"))
        return jnp.sum(features), features

    gradient, features = jax.jit(jax.grad(value, has_aux=True))(network)
    assert features.dtype == jnp.float32 and np.array_equal(features, [[8192, 8192]])
    kernel, bias = gradient.ops[0].kernel, gradient.ops[1].bias
    assert kernel.dtype == bias.dtype == jnp.float32
    assert np.array_equal(bias, [8192, 8192])  # 4096 pixels, each in two features
    assert np.array_equal(kernel[0, 0], np.full((2, 2), 8192))
    total, _ = jax.lax.scan(lambda s, one: (s + one, None), jnp.bfloat16(0), jnp.ones(4096, jnp.bfloat16))
    assert total == 256  # control


def test_means_are_those_of_float32():
    op = operators.Centered(operators.Dense(2 * jnp.eye(2, dtype=jnp.float32)))
    x = jnp.full((4096, 2), 1 + 2.0**-7, jnp.bfloat16)
    y, mean = jax.jit(op.with_mean)(x.astype(jnp.float32))
    _, means = jax.jit(lambda x: _apply(x, (op,), **BFLOAT16))(x)
    assert means[0].dtype == jnp.float32 and np.array_equal(means[0], mean) and np.array_equal(mean, [1 + 2.0**-7] * 2)
    assert np.array_equal(y, x.astype(jnp.float32))  # 2 x - x


def step_equations(**changes):
    run = Run(tiny_config(**{"model.depth": 2, "model.centering": True, **changes}), 0)
    step = steps.make_train_step(run.model, run.optimizer, run.config, run.mesh, run.pixel_max)
    batch = [jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.uint8), jax.ShapeDtypeStruct((16,), jnp.int32)]
    jaxpr = jax.make_jaxpr(step)(run.abstract_state, *batch, SCHEDULE)
    return list(equations(jaxpr.jaxpr)), jaxpr.out_avals


def products(found):
    return [e for e in found if e.primitive.name in ("conv_general_dilated", "dot_general")]


@pytest.mark.x64_off
def test_only_activations_are_bfloat16_in_a_step():
    found, out = step_equations(precision="bfloat16")
    assert all(a.dtype != jnp.bfloat16 for a in out)  # parameters, state, optimizer, metrics
    kinds = {jnp.dtype(jnp.bfloat16): [], jnp.dtype(jnp.float32): []}
    for equation in products(found):
        dtypes = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
        assert len(dtypes) == 1, equation
        kinds[dtypes.pop()].append(equation.params["precision"])
    # stem, two blocks, neck_conv, neck_dense: result and both gradients, less the gradient of the pixels.
    assert kinds[jnp.dtype(jnp.bfloat16)] == [None] * (3 * 5 - 1)
    # The head, forward and backward; all estimates at the highest precision.
    head = [precision for precision in kinds[jnp.dtype(jnp.float32)] if precision is None]
    assert len(head) == 3 and len(kinds[jnp.dtype(jnp.float32)]) > 10
    sums = [e for e in found if e.primitive.name.startswith(("reduce_sum", "cumsum", "reduce_max"))]
    assert len(sums) > 10 and all(e.invars[0].aval.dtype != jnp.bfloat16 for e in sums)
    plain, _ = step_equations()
    assert all(v.aval.dtype != jnp.bfloat16 for e in plain for v in e.outvars)  # control


@pytest.mark.x64_off
def test_validation_is_float32():
    run = Run(tiny_config(precision="bfloat16"), 0)
    prepare, evaluate = steps.make_eval_step(run.model, run.config, run.mesh, run.pixel_max)
    state = run.abstract_state
    network, constants = jax.eval_shape(prepare, state.params, state.lip)
    batch = [jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.uint8), jax.ShapeDtypeStruct((16,), jnp.int32)]
    programs = [jax.make_jaxpr(prepare)(state.params, state.lip), jax.make_jaxpr(evaluate)(network, constants, *batch)]
    for program in programs:
        found = list(equations(program.jaxpr))
        assert len(found) > 20 and all(v.aval.dtype != jnp.bfloat16 for e in found for v in e.outvars)


@pytest.mark.parametrize("scan", [False, True])
def test_gradients_are_those_of_float32_to_a_few_roundings(scan):
    keys = jax.random.split(jax.random.key(0), 5)
    ops: list = [("stem/linear", operators.Conv(jax.random.normal(keys[0], (3, 3, 1, 8), jnp.float32) / 3, (8, 8, 1)))]
    for i in range(1, 4):
        kernel = 0.1 * jax.random.normal(keys[i], (3, 3, 8, 8), jnp.float32)
        ops.append((f"block_{i}/linear", operators.Conv(kernel.at[1, 1].add(jnp.eye(8, dtype=jnp.float32)), (8, 8, 8))))
        ops.append((f"block_{i}/activation", operators.MaxMin((8, 8, 8))))
    ops.append(("flatten", operators.Flatten((8, 8, 8))))
    head = operators.LinearHead(jnp.zeros((2, 512), jnp.float32), jnp.zeros(2, jnp.float32))
    network, x = make_network(ops, head), jax.random.uniform(keys[4], (16, 8, 8, 1), jnp.float32)

    def value(network, plan):
        return jnp.sum(jnp.square(network.features_and_means(x, plan)[0]))

    gradient = jax.jit(jax.grad(value), static_argnums=1)
    one, other = (gradient(network, Application(precision, scan=scan)) for precision in ("float32", "bfloat16"))
    for i in (0, 1, 3, 5):
        a, b = one.ops[i].kernel, other.ops[i].kernel
        # Eight layers of roundings, forward and backward; pairs that are sorted the other way are nearly equal.
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
        assert 1e-4 < error < 16 * U16, (i, error)
