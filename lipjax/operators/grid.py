"""The circulants by which the norm of a zero-padded convolution is proved, as operators with norm estimates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import conv, spectral
from lipjax.operators.base import Composite, Estimated, Leaf, operator
from lipjax.operators.linear import Conv
from lipjax.operators.text import kernel_text
from lipjax.operators.training_only import Centered


@operator("kernel", static=("in_shape", "strides", "variants", "groups", "dilation"))
class Circulants(Estimated):
    """Convolutions with one kernel on several grids, periodic or antiperiodic along each side: estimates only.

    kernel: HWIO. in_shape: (v, h, w, c), of one vector for each of v variants, on as many pixels as its grid has.
    strides: a pair. variants: v pairs (grid, twist): numbers of blocks of `strides` pixels, and per side whether a
    period changes the sign.
    """

    kernel: Leaf
    in_shape: tuple[int, ...]
    strides: tuple[int, int]
    variants: tuple
    groups: int = 1
    dilation: int | tuple[int, int] = 1
    nonexpansive = False

    @property
    def out_shape(self) -> tuple[int, ...]:
        variants, height, width, _ = self.in_shape
        return variants, height // self.strides[0], width // self.strides[1], self.kernel.shape[-1]

    def __repr__(self):
        return f"Circulants({kernel_text(self.kernel, self.groups)}, {len(self.variants)} variants, in {self.in_shape})"

    def estimate(self, v, num_iters: int):
        """Differentiable estimate of the least of their norms. v: (*in_shape), start vectors.

        Returns: (sigma, v): the least of the variants' estimates; v without gradient.
        """
        sigmas, vectors = self._each(v, num_iters)
        return jnp.min(sigmas), vectors

    def _each(self, v, num_iters: int):
        """The estimate of each variant, (v,), and the vectors reached."""
        sigmas, vectors = [], jnp.zeros_like(v)
        for grid in dict.fromkeys(grid for grid, _ in self.variants):
            rows = np.array([i for i, (other, _) in enumerate(self.variants) if other == grid])
            h, w = self._size(grid)
            estimate = jax.vmap(lambda u, twist: spectral.power_iteration(*self._both(u, twist), u, num_iters))
            found, reached = estimate(v[rows, :h, :w], self._twists[rows])
            sigmas.append(found)
            vectors = vectors.at[rows, :h, :w].set(reached)
        return jnp.concatenate(sigmas), vectors

    def converge(self, v):
        """`estimate` where it has converged, of the one variant that is least at v: for norms outside of training.

        Returns: (sigma, v): the least norm of all variants, or a larger one if v is far from what is largest.
        """
        constant = jax.lax.stop_gradient(self)
        sigmas, _ = constant._each(v, 0)
        grids = tuple(dict.fromkeys(grid for grid, _ in self.variants))

        def of_grid(grid):
            h, w = self._size(grid)

            def converged(row):
                start, twist = v[row, :h, :w], self._twists[row]
                u = spectral.largest_vector(*constant._both(start, twist), start)
                sigma, u = spectral.power_iteration(*self._both(u, twist), u, 0)
                return sigma, v.at[row, :h, :w].set(u)

            return converged

        row = jnp.argmin(sigmas)
        which = jnp.asarray([grids.index(grid) for grid, _ in self.variants])[row]
        return jax.lax.switch(which, [of_grid(grid) for grid in grids], row)

    def _size(self, grid) -> tuple[int, int]:
        h, w = (n * s for n, s in zip(grid, self.strides, strict=True))
        return h, w

    @property
    def _twists(self):
        return jnp.asarray([twist for _, twist in self.variants])

    def _both(self, v, twist):
        """The map of one variant and its adjoint. v: a vector, for its shape alone."""

        def apply(x):
            return self._map(x, twist)

        def adjoint(y):
            return jax.linear_transpose(apply, v)(y)[0]

        return apply, adjoint

    def _map(self, x, twist):
        """The convolution of (h, w, c) with period (h, w), up to the sign; how taps are aligned changes no norm."""
        for axis in range(2):
            size, taps = x.shape[axis], conv.window(self.kernel.shape, self.dilation)[axis]
            places = np.arange(-((taps - 1) // 2), size + taps // 2)
            signs = 1 - 2 * (places // size % 2) * twist[axis]
            column = signs.astype(x.dtype).reshape(-1, *(1,) * (2 - axis))
            x = jnp.take(x, places % size, axis) * column
        options = {"strides": self.strides, "groups": self.groups, "dilation": self.dilation}
        highest = jax.lax.Precision.HIGHEST
        return conv.conv2d(x[None], self.kernel, padding="VALID", precision=highest, **options)[0]


def on_grid(op) -> Any:
    """A copy of an operator for norm estimation, whose estimates converge to the proved norm.

    A zero-padded convolution whose norm is proved by embedding it in circulants becomes these circulants. All other
    operators are kept.
    """
    if isinstance(op, Composite):
        return op.with_measured(tuple(map(on_grid, op.measured())))
    if isinstance(op, Centered):
        return on_grid(op.map)
    if type(op) is not Conv:
        return op
    *sides, per_group, outputs = op.kernel.shape
    of_group = (*sides, per_group, outputs // op.groups), (*op.in_shape[:2], per_group)
    used, variants = spectral.embeddings(*of_group, op.strides, op.pads, op.dilation)
    if not variants:
        return op
    kernel = op.kernel if used.all() else jnp.where(used[..., None, None], op.kernel, 0)
    strides = conv.stride_pair(op.strides)
    h, w = (max(grid[a] for grid, _ in variants) * strides[a] for a in range(2))
    shape = (len(variants), h, w, op.in_shape[2])
    return Circulants(kernel, shape, strides, tuple(variants), op.groups, op.dilation)
