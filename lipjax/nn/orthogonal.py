"""Layers whose linear map is orthogonal by construction, activations with angles, and the heads that go with them."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lipjax import activations, conv, operators, pooling
from lipjax.nn.channelwise import LinearSpline, NActivation
from lipjax.nn.layers import COLLECTION, NamedOperators, symmetric_uniform, torch_linear, with_bias
from lipjax.parametrize import cayley, soc, soc_forms

# Power iterations of the reshaped norms before the first step: as many as the papers' code makes now and then.
_START_ITERS = 50


def _skew_kernel(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    scale: float | None,
    iters: int,
    train: bool,
    groups: int = 1,
):
    """Declares a raw kernel and returns its skew part, normalised to `scale` by the least of its reshaped norms.

    The vectors of the norm estimates are state; they advance by `iters` steps where a training step builds. With groups
    raw kernels and vectors of the shape have a further axis in front; each is normalised by its own norm, and they come
    back side by side: (kh, kw, c, c groups).
    """
    each = jax.vmap if groups > 1 else lambda function, in_axes=0: function
    lead = (groups,) if groups > 1 else ()
    raw = module.param(name, nn.initializers.normal(shape[-1] ** -0.5), (*lead, *shape))
    kernel = each(conv.skew_kernel)(raw)

    def norms(vectors, steps):
        return each(lambda k, v: soc.reshaped_norm(k, v, steps))(kernel, vectors)

    if scale is not None:

        def start():
            key = module.make_rng("params")
            keys = jax.random.split(key, groups) if groups > 1 else key
            vectors = each(lambda key: soc.init_vectors((shape[0], shape[1], shape[2], shape[3]), key))(keys)
            return norms(jax.tree.map(lambda v: v.astype(raw.dtype), vectors), _START_ITERS)[1]

        vectors = module.variable(COLLECTION, f"{name}_vectors", start)
        sigma, advanced = norms(vectors.value, iters if train else 0)
        if train and not module.is_initializing() and module.is_mutable_collection(COLLECTION):
            vectors.value = jax.lax.stop_gradient(advanced)
        kernel = each(lambda k, s: soc.normalize(k, s, scale))(kernel, sigma)
    if groups == 1:
        return kernel
    return jnp.moveaxis(kernel, 0, 3).reshape(*shape[:3], groups * shape[3])


class SOC(nn.Module):
    """Skew orthogonal convolution: the exponential of a convolution with a skew kernel, bias, activation.

    The function is fixed by: padding; train_terms and eval_terms, the highest power of the series in a training step
    and otherwise (None: the exact exponential, for circular padding); scale, to which the kernel is normalised by its
    reshaped norms (None: not at all). strides by space-to-depth, kernel size unchanged. `form` says how it is computed
    ("auto", "spatial", "response", "series": see `soc_forms.operators_of`), fast_gradient how it is differentiated.
    groups: parts of the channels, each with an exponential of its own, computed in the form "spatial".
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: str = "ZERO"
    train_terms: int | None = 5
    eval_terms: int | None = 12
    scale: float | None = 0.7
    form: str = "auto"
    fast_gradient: bool = False
    normalization_iters: int = 1
    batch_size: int = 128
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin
    groups: int = 1

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        ops: list = []
        shape = tuple(in_shape)
        if self.strides > 1:
            ops.append(operators.SpaceToDepth(shape, self.strides))
            shape = ops[0].out_shape
        channels, groups = max(shape[-1], self.features), self.groups
        if groups < 1 or channels % groups:
            raise ValueError(
                f"SOC expects groups >= 1 that divide its {channels} channels (the larger of what comes in, strides^2 "
                f"times the input's, and features), got {groups}."
            )
        size = (self.kernel_size, self.kernel_size, channels // groups, channels // groups)
        kernel = _skew_kernel(self, "kernel", size, self.scale, self.normalization_iters, train, groups)
        ops += soc_forms.operators_of(
            kernel,
            shape,
            self.features,
            num_terms=self.train_terms if train else self.eval_terms,
            padding=self.padding,
            promised_norm=None if self.scale is None else self.kernel_size * self.scale,
            form=self.form,
            train=train,
            batch_size=self.batch_size,
            fast_gradient=self.fast_gradient,
            # One answer in training and out of it: the same norms are then estimated in both. Where it is yes, a kernel
            # of one tap counts as 1 in training, and evaluation estimates its norm.
            other_terms=self.eval_terms if train else self.train_terms,
            groups=groups,
        )
        return with_bias(self, ops, self.use_bias, self.activation, symmetric_uniform(self.features**-0.5))


class Cayley(nn.Module):
    """Cayley convolution (circular): per frequency the Cayley transform of the kernel's response; bias, activation.

    strides by space-to-depth; a strided kernel has half the size (at least 1), as in the paper's code. alpha, the norm
    of the response before the transform, is a parameter that starts at the kernel's own norm.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        ops: list = []
        shape, side = tuple(in_shape), self.kernel_size
        if self.strides > 1:
            ops.append(operators.SpaceToDepth(shape, self.strides))
            shape, side = ops[0].out_shape, max(1, side // self.strides)
        size, fan_in = (shape[0], shape[1]), side**2 * shape[-1]
        kernel = self.param("kernel", symmetric_uniform(fan_in**-0.5), (side, side, shape[-1], self.features))
        alpha = self.param("alpha", lambda key: cayley.initial_alpha(kernel, size))

        def blocks(on):
            return cayley.packed_response(kernel, alpha, on, size)

        ops.append(operators.conv_of_blocks(blocks, side, shape, nonexpansive=True, train=train))
        return with_bias(self, ops, self.use_bias, self.activation, symmetric_uniform(fan_in**-0.5))


class Householder(nn.Module):
    """`operators.Householder` with an angle for each pair of channels, pi / 2 at the start."""

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...]):
        _check_pairs(in_shape)
        theta = self.param("theta", nn.initializers.constant(np.pi / 2), (in_shape[-1] // 2,))
        return operators.Householder(activations.householder_direction(theta), tuple(in_shape))


class Householder2(nn.Module):
    """`operators.Householder2` with three angles for each pair of channels, U(0, pi) at the start."""

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...]):
        _check_pairs(in_shape)
        thetas = [self.param(f"theta{i}", nn.initializers.uniform(np.pi), (in_shape[-1] // 2,)) for i in range(3)]
        return operators.Householder2(activations.householder2_directions(*thetas), tuple(in_shape))


class ProjectionPool(nn.Module):
    """`operators.ProjectionPool` with an angle for each pair of channels, U(0, pi) at the start."""

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...]):
        _check_pairs(in_shape)
        theta = self.param("theta", nn.initializers.uniform(np.pi), (in_shape[-1] // 2,))
        return operators.ProjectionPool(pooling.wedge_direction(theta), tuple(in_shape))


def _check_pairs(in_shape: tuple[int, ...]) -> None:
    if in_shape[-1] % 2:
        raise ValueError(f"Paired activations need an even number of channels, got shape {tuple(in_shape)}.")


ACTIVATIONS: dict[str, Callable] = {
    "maxmin": operators.MaxMin,
    "householder": lambda shape: Householder(name="activation")(shape),
    "householder2": lambda shape: Householder2(name="activation")(shape),
    "n_activation": lambda shape: NActivation(name="activation")(shape),
    "linear_spline": lambda shape: LinearSpline(name="activation")(shape),
    "partial_abs": operators.PartialAbs,
}
POOLINGS: dict[str, Callable] = {
    "max": operators.MaxPoolPairs,
    "projection": lambda shape: ProjectionPool(name="pooling")(shape),
}


class SOCHead(nn.Module):
    """Logits by orthonormal rows: the first rows of the exponential of a skew matrix, and a bias.

    Attributes: as SOC's; a 1x1 kernel's norm is exact, so scale is the norm of the skew matrix.
    """

    num_classes: int
    train_terms: int | None = 5
    eval_terms: int | None = 12
    scale: float | None = 1.0
    normalization_iters: int = 1

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> operators.LinearHead:
        side = max(in_shape[-1], self.num_classes)
        kernel = _skew_kernel(self, "kernel", (1, 1, side, side), self.scale, self.normalization_iters, train)
        terms = self.train_terms if train else self.eval_terms
        matrix = soc_forms.orthonormal_rows(kernel[0, 0].T, self.num_classes, terms)[:, : in_shape[-1]]
        bias = self.param("bias", symmetric_uniform(self.num_classes**-0.5), (self.num_classes,))
        return operators.LinearHead(matrix, bias)


class CayleyHead(nn.Module):
    """Logits by orthonormal rows (or columns, with more classes than features): the Cayley transform of a matrix."""

    num_classes: int

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> operators.LinearHead:
        weight = self.param("matrix", torch_linear, (self.num_classes, in_shape[-1]))
        alpha = self.param("alpha", lambda key: jnp.linalg.norm(weight))
        bias = self.param("bias", symmetric_uniform(in_shape[-1] ** -0.5), (self.num_classes,))
        return operators.LinearHead(cayley.dense(weight, alpha), bias)


class MLPHead(nn.Module):
    """Logits by one hidden layer, W2 softplus(W1 x + b1) + b2, certified by its curvature.

    Its state has a place for the top right singular vector of W1, "vector", where estimates of the curvature start.
    """

    num_classes: int
    hidden_features: int = 4096

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> operators.MLPHead:
        width, hidden = in_shape[-1], self.hidden_features
        w1 = self.param("w1", torch_linear, (hidden, width))
        b1 = self.param("b1", symmetric_uniform(width**-0.5), (hidden,))
        w2 = self.param("w2", torch_linear, (self.num_classes, hidden))
        b2 = self.param("b2", symmetric_uniform(hidden**-0.5), (self.num_classes,))
        self.variable(COLLECTION, "vector", lambda: jax.random.normal(self.make_rng("params"), (width,), w1.dtype))
        return operators.MLPHead(w1, b1, w2, b2)
