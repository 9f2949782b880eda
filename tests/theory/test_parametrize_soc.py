"""SOC against the papers' own code (golden files, 1e-9), the reshaped norms, and their normalisation."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import GOLDEN, hwio, nhwc, relative
from tiers import everyday

from lipjax import conv
from lipjax.operators.exponential import ConvExponential
from lipjax.parametrize import soc

PARITY = 1e-9
EXACT = ("s1_up", "s1_down", "s1_k1", "s2_up", "s2_down")
FAST = ("s1_up", "s1_down", "s2")
VECTORS = ("u1", "v1", "u2", "v2", "u3", "v3", "u4", "v4")


reshaped_norm = jax.jit(soc.reshaped_norm, static_argnums=2)


class Layer:
    """A golden file and the layer of the original that it describes, put together from our pieces."""

    def __init__(self, case, fast):
        self.z = np.load(GOLDEN / f"soc_{'fast_' if fast else ''}layer_{case}.npz")
        self.constructor = json.loads(str(self.z["meta"]))["constructor"]
        self.raw = hwio(self.z["param/weight" if fast else "param/random_conv_filter"])
        self.vectors = self.read_vectors("param/_" if fast else "param/")
        self.bias = jnp.asarray(self.z["param/bias"])
        self.kappa = 1.0 if fast else float(self.z["param/correction"][0])
        self.x, self.cotangent = nhwc(self.z["input/x"]), nhwc(self.z["input/cotangent"])

    def read_vectors(self, prefix):
        return {name: hwio(self.z[prefix + name]) for name in VECTORS}

    def kernel(self, raw, num_iters):
        skew = conv.skew_kernel(raw)
        sigma, _ = reshaped_norm(skew, self.vectors, num_iters)
        return soc.normalize(skew, sigma, self.kappa), sigma

    def __call__(self, x, raw, bias, num_terms, num_iters=0, exponential=soc.exponential):
        kernel, _ = self.kernel(raw, num_iters)
        x = conv.space_to_depth(x, self.constructor["stride"])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, kernel.shape[-1] - x.shape[-1])))
        return exponential(x, kernel, num_terms=num_terms)[..., : self.constructor["out_channels"]] + bias

    def evaluate(self, num_terms):
        return jax.jit(lambda *a: self(*a, num_terms=num_terms))(self.x, self.raw, self.bias)

    def gradients(self, **options):
        """The output in train mode, and the gradients of its product with the cotangent: x, raw filter, bias."""

        @jax.jit
        def run(g, *arguments):
            y, pullback = jax.vjp(lambda *a: self(*a, num_terms=5, num_iters=1, **options), *arguments)
            return y, pullback(g)

        return run(self.cotangent, self.x, self.raw, self.bias)


@pytest.fixture(scope="module", params=everyday(EXACT, "s1_k1", "s2_down"))
def layer(request):
    return Layer(request.param, fast=False)


@pytest.fixture(scope="module", params=everyday(FAST, "s2"))
def fast_layer(request):
    return Layer(request.param, fast=True)


@pytest.mark.quick_compiles
def test_layer_of_the_first_paper(layer):
    z = layer.z
    kernel, sigma = layer.kernel(layer.raw, 0)
    assert relative(sigma, z["output/sigma"]) < PARITY and relative(kernel, hwio(z["output/kernel"])) < PARITY
    assert relative(layer.evaluate(num_terms=12), nhwc(z["output/y_eval"])) < PARITY
    y, grads = layer.gradients()
    assert relative(y, nhwc(z["output/y_train"])) < PARITY
    assert relative(y, nhwc(z["output/y_eval"])) > PARITY  # control: the number of terms matters
    assert relative(grads[0], nhwc(z["output/grad_x_train"])) < PARITY
    assert relative(grads[1], hwio(z["output/grad_filter_train"])) < PARITY
    assert relative(grads[2], z["output/grad_bias_train"]) < PARITY


@pytest.mark.quick_compiles
def test_power_steps_of_the_first_paper(layer):
    z, start = layer.z, layer.read_vectors("input/power_")
    skew = conv.skew_kernel(layer.raw)
    sigma, advanced = reshaped_norm(skew, start, 1)
    assert relative(sigma, z["output/power1_sigma"]) < PARITY
    for name in VECTORS:
        assert relative(advanced[name], hwio(z[f"output/power1_{name}"])) < PARITY
        assert relative(start[name], hwio(z[f"output/power1_{name}"])) > 1e-3  # control
    exact = np.min(z["output/f4_exact"])
    # A few hundred steps find what the file has from a decomposition; none finds more.
    many, _ = reshaped_norm(skew, start, 400)
    assert exact * (1 - 1e-6) < float(many) <= exact * (1 + 1e-13)
    assert float(sigma) < exact * (1 - 1e-6) or skew.shape[0] == 1


@pytest.mark.quick_compiles
def test_layer_of_the_second_paper(fast_layer):
    z = fast_layer.z
    kernel, sigma = fast_layer.kernel(fast_layer.raw, 0)
    assert relative(sigma, z["output/sigma"]) < PARITY and relative(kernel, hwio(z["output/kernel"])) < PARITY
    assert relative(fast_layer.evaluate(num_terms=14), nhwc(z["output/y_eval"])) < PARITY
    for exponential, name in ((soc.exponential, "exact"), (soc.exponential_fast_gradient, "fast")):
        y, grads = fast_layer.gradients(exponential=exponential)
        assert relative(y, nhwc(z["output/y_train"])) < PARITY
        assert relative(grads[0], nhwc(z["output/grad_x"])) < PARITY
        assert relative(grads[1], hwio(z[f"output/grad_weight_{name}"])) < PARITY
        assert relative(grads[2], z["output/grad_bias"]) < PARITY
    assert relative(grads[1], hwio(z["output/grad_weight_exact"])) > 1e-3  # control: the fast gradient differs


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(exponential, x, kernel, g):
    y, pullback = jax.vjp(lambda x, k: exponential(x, k, num_terms=5), x, kernel)
    return y, *pullback(g)


@pytest.mark.quick_compiles
def test_fast_function_of_the_second_paper(fast_layer):
    z = fast_layer.z
    x, g, kernel = nhwc(z["input/fn_x"]), nhwc(z["input/fn_cotangent"]), hwio(z["output/kernel"])
    for exponential, name in ((soc.exponential, "exact"), (soc.exponential_fast_gradient, "fast")):
        y, grad_x, grad_kernel = value_and_gradients(exponential, x, kernel, g)
        assert relative(y, nhwc(z["output/fn_y"])) < PARITY
        assert relative(grad_x, nhwc(z["output/fn_grad_x"])) < PARITY
        assert relative(grad_kernel, hwio(z[f"output/fn_grad_kernel_{name}"])) < PARITY
    exact = hwio(z["output/fn_grad_kernel_exact"])
    cosine = jnp.vdot(exact, grad_kernel) / jnp.linalg.norm(exact) / jnp.linalg.norm(grad_kernel)
    assert 0.99 < float(cosine) < 0.99999


def test_bounds_of_the_second_papers_layers_lie_above_dense_norms(fast_layer):
    z = fast_layer.z
    kernel, _ = fast_layer.kernel(fast_layer.raw, 0)
    shape = nhwc(z["input/fn_x"]).shape[1:]
    for num_terms in (5, 14):
        found = ConvExponential(kernel, shape, num_terms).bound()
        assert float(z["output/J_norm_dense"]) <= found.details["skew_norm"] * (1 + 1e-12)
        # These maps have at most 4096 values: the dense operator itself was bounded.
        assert found.details["skew_norm"] <= float(z["output/J_norm_dense"]) * (1 + 1e-8)
        assert float(z[f"output/S{num_terms}_norm_dense"]) <= found.proved * (1 + 1e-12) < 1.005


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("kernel_shape",), everyday([((3, 3, 4, 4),), ((1, 1, 5, 5),), ((5, 3, 2, 2),)], ((5, 3, 2, 2),))
)
def test_estimates_reach_the_least_reshaped_norm(kernel_shape, key):
    kernel = conv.skew_kernel(jax.random.normal(key, kernel_shape))
    vectors = soc.init_vectors(kernel_shape, jax.random.key(1))
    assert set(vectors) == set(VECTORS)
    for i in range(1, 5):  # u and v share the axes of the kernel out
        shapes = zip(vectors[f"u{i}"].shape, vectors[f"v{i}"].shape, strict=True)
        assert all({a, b} == {1, n} for (a, b), n in zip(shapes, kernel_shape, strict=True))
        assert float(jnp.linalg.norm(vectors[f"u{i}"])) == pytest.approx(1)
    kh, kw, c, _ = kernel_shape
    array = np.asarray(kernel)
    norms = [
        np.linalg.norm(array.transpose(order).reshape(shape), 2)
        for order, shape in [
            ((3, 0, 2, 1), (c * kh, c * kw)),
            ((3, 1, 2, 0), (c * kw, c * kh)),
            ((3, 2, 0, 1), (c, -1)),
            ((3, 0, 1, 2), (-1, c)),
        ]
    ]
    sigma, advanced = reshaped_norm(kernel, vectors, 500)
    assert float(sigma) == pytest.approx(min(norms), rel=1e-6) and float(sigma) <= min(norms) * (1 + 1e-13)
    once, _ = reshaped_norm(kernel, vectors, 1)
    assert float(once) < min(norms) * (1 - 1e-4)  # control: an estimate is no bound
    again, _ = reshaped_norm(kernel, advanced, 0)
    assert float(again) == pytest.approx(float(sigma), rel=1e-12)
    # Normalised, the kernel's convolution obeys the factor sqrt(kh kw), on a map smaller than it too.
    for size in ((4, 4), (2, 2)):
        found = ConvExponential(soc.normalize(kernel, sigma, 0.7), (*size, c), 5, "CIRCULAR").bound()
        assert found.details["skew_norm"] <= 0.7 * (kh * kw) ** 0.5 * (1 + 1e-5)


@pytest.mark.quick_compiles
def test_gradient_of_the_norm_is_that_of_the_least_reshape(key):
    kernel = jax.random.normal(key, (3, 3, 4, 4))  # not skew: no two of the four norms coincide
    vectors = soc.init_vectors(kernel.shape, jax.random.key(1))
    _, vectors = reshaped_norm(kernel, vectors, 2000)
    grad, direction = jax.jit(jax.grad(lambda k: soc.reshaped_norm(k, vectors, 1)[0]))(kernel), jnp.cos(kernel)

    def least(k):
        k = np.asarray(k)
        orders = ((3, 0, 2, 1), (12, 12)), ((3, 1, 2, 0), (12, 12)), ((3, 2, 0, 1), (4, 36)), ((3, 0, 1, 2), (36, 4))
        return min(np.linalg.norm(k.transpose(order).reshape(shape), 2) for order, shape in orders)

    slope = (least(kernel + 1e-5 * direction) - least(kernel - 1e-5 * direction)) / 2e-5
    assert float(jnp.sum(grad * direction)) == pytest.approx(slope, rel=1e-6)
    # Nothing flows into the vectors, which advance without a trace.
    through = jax.jit(jax.grad(lambda k: sum(jnp.sum(v) for v in soc.reshaped_norm(k, vectors, 1)[1].values())))(kernel)
    assert not np.asarray(through).any() and np.asarray(grad).any()


@pytest.mark.parametrize(
    ("dtype", "compiled", "kappa"), [(np.float64, False, 0.7), (np.float64, True, 0.7), (np.float32, True, 1.0)]
)
def test_normalised_kernels_are_skew_bit_for_bit(dtype, compiled, kappa):
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 13, 13)).astype(dtype))
    vectors = {name: v.astype(dtype) for name, v in soc.init_vectors(raw.shape, jax.random.key(0)).items()}

    def make(raw):
        skew = conv.skew_kernel(raw)
        return soc.normalize(skew, soc.reshaped_norm(skew, vectors, 3)[0], kappa)

    kernel = np.asarray((jax.jit(make) if compiled else make)(raw))
    assert kernel.dtype == dtype and kernel.any()
    np.testing.assert_array_equal(kernel, -np.flip(kernel, (0, 1)).swapaxes(2, 3))


@functools.partial(jax.jit, static_argnums=0)
def value_and_slope(shape, raw, vectors):
    """A function of a layer's raw kernel, its gradient, and the kernel and vectors of the way."""

    def loss(raw):
        skew = conv.skew_kernel(raw)
        sigma, advanced = soc.reshaped_norm(skew, vectors, 1)
        kernel = soc.normalize(skew, sigma, 0.7)
        return jnp.sum(soc.exponential(jnp.ones(shape), kernel, num_terms=5)[..., 0]), (kernel, advanced)

    return jax.value_and_grad(loss, has_aux=True)(raw)


@pytest.mark.quick_compiles
@pytest.mark.parametrize("scale", [0.0, 1e-310, 1e-200, 1e-30, 1e200])
def test_zero_and_extreme_kernels_have_finite_values_and_gradients(scale):
    raw = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 3, 3)))
    vectors = soc.init_vectors(raw.shape, jax.random.key(0))
    _, vectors = reshaped_norm(conv.skew_kernel(raw), vectors, 50)
    shape = (1, 4, 4, 3)
    (value, (kernel, advanced)), grad = value_and_slope(shape, raw * scale, vectors)
    assert all(np.isfinite(np.asarray(a)).all() for a in (value, kernel, grad, *advanced.values()))
    (_, (unit, _)), expected = value_and_slope(shape, raw, vectors)
    if scale >= 1e-200:  # the function does not depend on the scale, so its gradient is that of the unit over the scale
        np.testing.assert_allclose(kernel, unit, rtol=1e-12)
        np.testing.assert_allclose(np.asarray(grad) * scale, expected, atol=1e-12 * float(jnp.abs(expected).max()))
    elif scale == 0:
        assert not np.asarray(kernel).any() and not np.asarray(grad).any() and float(value) == 16


def test_an_estimate_that_is_not_positive_gives_the_identity():
    kernel = conv.skew_kernel(jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 2, 2))))
    for sigma in (0.0, -1.0):
        assert not np.asarray(soc.normalize(kernel, jnp.asarray(sigma), 0.7)).any()
    assert np.asarray(soc.normalize(kernel, jnp.asarray(1.0), 0.7)).any()


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="num_iters >= 0"):
        soc.reshaped_norm(jnp.zeros((3, 3, 2, 2)), soc.init_vectors((3, 3, 2, 2), jax.random.key(0)), -1)


@pytest.mark.quick_compiles
@pytest.mark.x64_off
def test_training_a_layer_in_single_precision_keeps_its_promise(key):
    """After gradient steps with one power step each, the bound of the kernel is what the estimate promises."""
    raw = jax.random.normal(key, (3, 3, 6, 6)) / 6
    vectors = soc.init_vectors(raw.shape, jax.random.key(1))
    x, target = jax.random.normal(jax.random.key(2), (2, 4, 5, 5, 6))

    @functools.partial(jax.jit, static_argnums=2)
    def kernel_of(raw, vectors, num_iters):
        skew = conv.skew_kernel(raw)
        sigma, vectors = soc.reshaped_norm(skew, vectors, num_iters)
        return soc.normalize(skew, sigma, 0.7), vectors

    @jax.jit
    def step(raw, vectors):
        def loss(raw):
            kernel, advanced = kernel_of(raw, vectors, 1)
            return jnp.mean((soc.exponential_fast_gradient(x, kernel, num_terms=5) - target) ** 2), advanced

        (value, vectors), grad = jax.value_and_grad(loss, has_aux=True)(raw)
        return raw - 0.02 * grad, vectors, value

    _, vectors = kernel_of(raw, vectors, 50)
    values = []
    for _ in range(60):
        raw, vectors, value = step(raw, vectors)
        values.append(float(value))
    assert values[-1] < values[0] - 1e-3 and vectors["u1"].dtype == jnp.float32
    kernel, _ = kernel_of(raw, vectors, 0)
    assert ConvExponential(kernel, (5, 5, 6), 12).bound().proved == 1.0
    norms = [norm for norm, *_ in ConvExponential(kernel, (5, 5, 6), 12)._skew_norm_bounds(np.asarray(kernel, float))]
    assert 0.7 * 3 * 0.99 < min(norms[:2]) < 0.7 * 3 * 1.05
    # Without the normalisation the same raw kernel may have any norm.
    free = ConvExponential(conv.skew_kernel(raw) * 10, (5, 5, 6), 12)
    assert free.bound().proved > 1.0
