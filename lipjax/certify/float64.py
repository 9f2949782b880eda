"""Double precision on the host: where certificates are computed, and networks with bounds on their rounding errors.

Derivations: docs/soundness.md, sections 0 and 7.
"""

import contextlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from lipjax import operators
from lipjax.errors import NotCertifiable, UserError
from lipjax.network import Network
from lipjax.numerics import UNDERFLOW_OF_OPERATOR, gamma
from lipjax.spectral.arithmetic import check_rounding, operands, rounds_to_nearest


def host_device():
    """JAX's first CPU device. Raises: UserError if JAX_PLATFORMS leaves out the CPU, which certifies."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"Certificates are computed on the CPU, which JAX_PLATFORMS={platforms!r} leaves out: append ',cpu' to it."
        ) from error


@contextlib.contextmanager
def float64_on_cpu():
    """JAX in double precision on the host, whatever the process uses elsewhere.

    The precision of products is pinned: some settings of it compute products of float64 arrays in bfloat16.
    """
    host = host_device()
    with contextlib.ExitStack() as stack:
        for context in (jax.enable_x64(True), jax.default_device(host), jax.default_matmul_precision("highest")):
            stack.enter_context(context)
        if not jax.sharding.get_abstract_mesh().empty:  # a mesh of the user's, which goes before the default device
            mesh = Mesh(np.array([host]), ("host",), axis_types=(AxisType.Auto,))
            stack.enter_context(jax.set_mesh(mesh))
        yield


def checked_images(images, in_shape: tuple[int, ...]) -> np.ndarray:
    """Images in float64. Raises: UserError for another shape, a type that is rounded, pixels beyond [0, 1]."""
    images = np.asarray(images)
    shape = ", ".join(map(str, in_shape))
    if images.shape[1:] != in_shape:
        raise UserError(f"Expected images of shape (n, {shape}), got {images.shape}.")
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"Expected float32 or float64 images in [0, 1], got {images.dtype}: divide 8-bit ones by 255.")
    if images.dtype.itemsize > 8:
        raise UserError(f"Expected float64 images or shorter ones, got {images.dtype}, which would be rounded.")
    images = images.astype(np.float64)
    known = images[~np.isnan(images)]
    if known.size and not (known.min() >= 0 and known.max() <= 1):
        low, high = known.min(), known.max()
        raise UserError(f"Expected pixels in [0, 1], got values from {low:g} to {high:g}: rescale the images.")
    return images


# Each operator is compiled on its own. Compiled together, x -> W x + b becomes a sum that starts at b, whose rounding
# error neither operator's bound covers (docs/soundness.md).
@jax.jit
def propagate(op, norm, error, x):
    """An operator's output at the computed x, and a bound on its distance to the exact output at the exact input.

    norm: proved Lipschitz bound of the operator. error: (b,), bound on the distance of x to the exact input.
    """
    local = op.rounding_error(x) + UNDERFLOW_OF_OPERATOR * (1 + operators.norm_per_image(x))
    return op(x), (jnp.maximum(norm, UNDERFLOW_OF_OPERATOR) * error + local) * (1 + gamma(8))


@jax.jit
def add(x, y, error):
    """x + y, and a bound on its distance to the exact sum of x and what y is at most `error` (b,) away from."""
    total = x + y
    size = operators.norm_per_image(total)
    local = gamma(2) * size + UNDERFLOW_OF_OPERATOR * (1 + size)
    return total, (error + local) * (1 + gamma(8))


@jax.jit
def carry(norm, error, local):
    """A bound on the distance of an operator's output to the exact output at the exact input.

    norm, error: as of `propagate`. local: (b,), bound on the distance to the exact output at the computed input.
    """
    return (jnp.maximum(norm, UNDERFLOW_OF_OPERATOR) * error + local) * (1 + gamma(8))


def advance(op, norms, error, x):
    """`propagate`, for any operator: the parts of a composite one after another, each compiled on its own.

    norms: of `LayerBound.norms`.
    """
    if not isinstance(op, operators.Composite):
        return propagate(op, norms, error, x)
    norm, inner = norms
    y, local = x, jnp.zeros_like(error)
    for part, own in zip(op.parts(), inner, strict=True):
        y, local = propagate(part, own, local, y)
    if op.adds_input:
        y, local = add(x, y, local)
    return y, carry(norm, error, local)


@jax.jit
def finish(head, x):
    """Logits, and a bound on the head's own error of each."""
    floor = UNDERFLOW_OF_OPERATOR * (1 + operators.norm_per_image(x))
    return head(x), head.rounding_error(x) + floor[:, None]


def evaluate(network: Network, norms: tuple, x):
    """Logits, features, a bound on the l2 error of the features, and a bound on the head's own error of each logit."""
    if x.dtype != jnp.float64 or any(a.dtype != jnp.float64 for a in jax.tree.leaves(network)):
        raise ValueError("Certification runs in float64: an array of another type reached it.")
    error = jnp.full(x.shape[0], UNDERFLOW_OF_OPERATOR)
    for op, norm in zip((network.normalize, *network.ops), norms, strict=True):
        x, error = advance(op, norm, error, x)
    logits, head_error = finish(network.head, x)
    return logits, x, error, head_error


def evaluate_in_batches(network: Network, images: np.ndarray, norms: tuple, batch_size: int) -> list[np.ndarray]:
    """Evaluates any number of images on the host, as `evaluate` does one batch.

    A batch that is not full is padded to the next power of two: few images cost little, and few programs are made.
    """
    if batch_size < 1:
        raise ValueError(f"Expected a batch_size of at least 1, got {batch_size}.")
    none = np.empty((0, network.num_classes))
    parts = [[none, np.empty((0, *network.head.in_shape)), np.empty(0), none]]
    with float64_on_cpu():
        network = jax.tree.map(jnp.asarray, network)
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            size = min(batch_size, 1 << (len(batch) - 1).bit_length())
            padding = [(0, size - len(batch))] + [(0, 0)] * (images.ndim - 1)
            found = evaluate(network, norms, jnp.asarray(np.pad(batch, padding)))
            parts.append([np.asarray(a)[: len(batch)] for a in found])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


@jax.jit
def _probe(large, small, nan):
    return (large + small) - large, nan != nan


@jax.jit
def _sums_and_products(a, b, c, d):
    return a + b, c * d


def check_arithmetic() -> None:
    """Tests of NumPy what `check_rounding` tests, and the same of XLA; about a millisecond.

    Raises: NotCertifiable if this process does not compute as docs/soundness.md assumes.
    """
    check_rounding()
    flags = os.environ.get("XLA_FLAGS", "")
    with float64_on_cpu():
        difference, sees_nan = _probe(*(jnp.asarray(a, jnp.float64) for a in (1e16, 1.0, np.nan)))
        computed = map(np.asarray, _sums_and_products(*map(jnp.asarray, operands())))
    devices = difference.devices()
    if devices != {host_device()}:
        raise NotCertifiable(f"Certificates are computed on {host_device()}, but JAX computes on {devices} here.")
    if re.search(r"enable_fast_math(?!=(false|0)\b)", flags) or float(difference) != 0 or not bool(sees_nan):
        raise NotCertifiable(
            f"XLA computes with fast math, whose rounding errors nobody bounds: unset it in XLA_FLAGS ({flags!r})."
        )
    if not rounds_to_nearest(*computed):
        raise NotCertifiable("XLA does not round to nearest in this process: start a new one, to prove anything.")


def host_float64(array) -> np.ndarray:
    """An array on the host, floats as float64; other types, such as those of keys and counts, are kept."""
    array = np.asarray(jax.device_get(array))
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
