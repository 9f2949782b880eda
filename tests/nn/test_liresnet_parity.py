"""The blocks of LiResNet against the papers' own code (golden files), in float64 to 1e-9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import GOLDEN, hwio, nhwc, relative

from lipjax import activations, conv, operators
from lipjax.parametrize.residual import linear_residual

PARITY = 1e-9


def test_stem_convolution_and_its_norm():
    z = np.load(GOLDEN / "stem_conv.npz")

    def op(kernel):
        return operators.Conv(kernel, (16, 16, 3), 2, ((2, 2), (2, 2)))

    kernel, start = hwio(z["param/weight"]), nhwc(z["param/init_x"])[0]
    assert relative(op(kernel)(nhwc(z["input/x"])) + z["param/bias"], nhwc(z["output/y"])) < PARITY
    sigma, v = op(kernel).estimate(start, 10)
    assert relative(sigma, z["output/lipschitz_10"]) < PARITY
    assert relative(v, nhwc(z["output/init_x_after_10"])[0]) < PARITY
    assert relative(op(kernel).estimate(start, 2000)[0], z["output/lipschitz_2000"]) < PARITY
    converged = nhwc(z["input/init_x_converged"])[0]
    grad = jax.grad(lambda k: op(k).estimate(converged, 1)[0])(kernel)
    assert relative(grad, hwio(z["output/lipschitz_grad/weight"])) < PARITY
    # The proved bound lies above the dense SVD, and close.
    assert 0 <= op(kernel).bound().proved / float(z["output/lipschitz_exact"]) - 1 < 1e-8
    assert relative(op(kernel).estimate(start, 1)[0], z["output/lipschitz_10"]) > 1e-4  # control


@pytest.fixture(scope="module")
def stack():
    z = np.load(GOLDEN / "liresconv.npz")
    return z, hwio(z["param/weights"]), jnp.asarray(z["param/gamma"][:, :, 0, 0, 0]), jnp.asarray(z["param/bias"])


def block(weight, gamma):
    return operators.Conv(linear_residual(weight, gamma, num_layers=3), (8, 8, 8))


def vectors(a):
    return jnp.asarray(np.moveaxis(a.reshape(3, 8, 8, 8), 1, -1))


def product(weights, gamma, start, num_iters):
    found = [block(weights[i], gamma[i]).estimate(start[i], num_iters) for i in range(3)]
    return found[0][0] * found[1][0] * found[2][0], jnp.stack([v for _, v in found])


def test_stack_in_evaluation(stack):
    z, weights, gamma, bias = stack
    x = nhwc(z["input/x"])
    for i in range(3):
        x = activations.maxmin(block(weights[i], gamma[i])(x) + bias[i] - z["param/running_mean"][i])
    assert relative(x, nhwc(z["output/y_eval"])) < PARITY


def test_stack_lipschitz_estimate_and_its_gradients(stack):
    z, weights, gamma, _ = stack
    value, advanced = product(weights, gamma, vectors(z["param/init_x"]), 10)
    assert relative(value, z["output/lipschitz_10"]) < PARITY
    assert relative(advanced, vectors(z["output/init_x_after_10"])) < PARITY
    converged = vectors(z["input/init_x_converged"])
    grads = jax.grad(lambda w, g: product(w, g, converged, 1)[0], (0, 1))(weights, gamma)
    assert relative(grads[0], hwio(z["output/lipschitz_grad/weights"])) < PARITY
    assert relative(grads[1], z["output/lipschitz_grad/gamma"][:, :, 0, 0, 0]) < PARITY
    bounds = [block(weights[i], gamma[i]).bound().proved for i in range(3)]
    slack = np.array(bounds) / z["output/layer_norms_exact"] - 1
    assert (slack >= 0).all() and (slack < 1e-8).all()


def test_stack_in_training_with_the_mean_of_the_branch_subtracted(stack):
    """Our pieces put together as the original's train mode (centering as a layer comes later): forward, gradients."""
    z, weights, gamma, bias = stack

    def train_mode(x, weights, gamma, bias):
        means = []
        for i in range(3):
            kernel = linear_residual(weights[i], gamma[i], num_layers=3)
            branch = conv.conv2d(x, kernel) - x
            means.append(branch.mean((0, 1, 2)))
            x = activations.maxmin(x + branch + bias[i] - means[-1])
        return x, jnp.stack(means)

    x = nhwc(z["input/x"])
    y, means = train_mode(x, weights, gamma, bias)
    assert relative(y, nhwc(z["output/y_train"])) < PARITY
    assert relative(0.9 * z["param/running_mean"] + 0.1 * means, z["output/running_mean_after"]) < PARITY
    cotangent = nhwc(z["input/cotangent"])
    grads = jax.grad(lambda *a: jnp.sum(train_mode(*a)[0] * cotangent), (0, 1, 2, 3))(x, weights, gamma, bias)
    assert relative(grads[0], nhwc(z["output/grad_x"])) < PARITY
    assert relative(grads[1], hwio(z["output/grad/weights"])) < PARITY
    assert relative(grads[2], z["output/grad/gamma"][:, :, 0, 0, 0]) < PARITY
    assert relative(grads[3], z["output/grad/bias"]) < PARITY


def test_linear_residual_refuses_kernels_without_a_centre():
    with pytest.raises(ValueError, match="odd"):
        linear_residual(jnp.zeros((2, 2, 4, 4)), jnp.ones(4), num_layers=1)
