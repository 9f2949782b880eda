"""Layers of two paths through one linear map: potential steps x - 2 A^T f(A x + b) and sandwiches 2 A^T f(B x + b).

Both are contractive by the norm of a linear map that is stored once, and applied forward and back: A, and A beside B.
An ordinary bound takes them for the product, or one plus the product, of what they are made of (docs/soundness.md, 6a).
"""

import copy
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import spectral
from lipjax.operators.base import Composite, Elementwise, Factor, Leaf, operator
from lipjax.operators.chain import bound_row
from lipjax.operators.linear import Bias
from lipjax.spectral.verified import float_up

_SUCH = "ReLU, LeakyReLU of slopes >= 0, Tanh, Sigmoid and Softplus have such slopes."


@operator("ops", static=("adds_input",))
class Parts(Composite):
    """The operators `ops` in turn, and the input added if `adds_input`: a composite of which walks have replaced parts.

    It has no bound, and no network holds one but for the length of a walk.
    """

    ops: tuple
    adds_input: bool = False

    @property
    def in_shape(self):
        return self.ops[0].in_shape

    @property
    def out_shape(self):
        return self.ops[-1].out_shape

    def parts(self) -> tuple:
        return self.ops

    def with_parts(self, parts: tuple) -> "Parts":
        return Parts(tuple(parts), self.adds_input)

    def lipschitz_of(self, product: Any) -> Any:
        return product + 1 if self.adds_input else product


class _TwoPaths(Composite):
    """The base of both: a stored linear map, a bias of its outputs' channels, and an activation of slopes in
    [0, 1] between the ways forward and back.
    """

    linear: Any
    bias: Leaf
    activation: Any
    taken_apart = False
    _at_most_one = ""

    @property
    def in_shape(self):
        return tuple(self._forward().in_shape)

    @property
    def out_shape(self):
        return tuple(self._back().out_shape)

    def _forward(self) -> Factor:
        raise NotImplementedError

    def _back(self) -> Any:
        raise NotImplementedError

    def check(self) -> None:
        kind = type(self).__name__
        if not isinstance(self.linear, Factor):
            raise ValueError(
                f"{kind} expects a linear map that is applied forward and back, such as Dense, Conv or CircularConv, "
                f"got a {type(self.linear).__name__}."
            )
        self.linear.check()
        shape = tuple(self.linear.out_shape)
        if np.shape(self.bias) != (shape[-1],):
            raise ValueError(f"{kind} expects a bias of shape ({shape[-1]},), got {np.shape(self.bias)}.")
        if not isinstance(self.activation, Elementwise):
            raise ValueError(
                f"{kind} expects an activation that acts on every component alone, with slopes in [0, 1], got a "
                f"{type(self.activation).__name__}: its bound does not hold for it. {_SUCH}"
            )
        low, high = self.activation.slope
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"{kind} expects an activation of slopes in [0, 1], got a {type(self.activation).__name__} of slopes "
                f"between {low:g} and {high:g}: its bound does not hold for it. {_SUCH}"
            )
        if tuple(self.activation.in_shape) != shape:
            raise ValueError(
                f"{kind}: the linear map gives shape {shape}, but the {type(self.activation).__name__} takes "
                f"{tuple(self.activation.in_shape)}."
            )

    def parts(self) -> tuple:
        forward = self._forward()
        return forward, Bias(self.bias, forward.out_shape), self.activation, self._back()

    def with_parts(self, parts: tuple) -> Parts:
        return Parts(tuple(parts), self.adds_input)

    def measured(self) -> tuple:
        return (self.linear,)

    def with_measured(self, ops: tuple) -> Any:
        other = copy.copy(self)  # not the constructor: a circulant has no way back
        object.__setattr__(other, "linear", ops[0])
        return other

    def bound(self) -> spectral.NormBound:
        """`lipschitz_of` the claim for the stored map, whose row is details["linear"].

        details["parts"] are rows for error bounds to pass through the parts: columns of the map have no larger norm.
        """
        self.check()
        stored = bound_row("the linear map", self.linear, self._enough())
        back = {"type": type(self._back()).__name__, "bound": 2 * stored["bound"], "sigma": 2 * stored["sigma"]}
        middle = [bound_row(f"operator {i}", op) for i, op in enumerate(self.parts()[1:3], 1)]
        rest = {"method": "the bound of the stored map, of which these are columns", "details": {}}
        forward = {**stored, **rest}
        parts = [forward, *middle, {**back, "method": "twice the bound of the stored map", "details": {}}]
        value = self.lipschitz_of(Fraction(stored["bound"]))
        reason = self._at_most_one if value == 1 else self._reason
        return spectral.NormBound(float_up(Fraction(value)), reason, {"linear": stored, "parts": parts})

    def _enough(self) -> spectral.NormBound | None:
        """A bound of the stored map that is cheap, where a better one would not give a less constant."""
        return None

    def _arrays_text(self):
        return f"{self.linear!r}, {self.activation!r}"


@operator("linear", "bias", "activation", static=("nonexpansive",))
class PotentialStep(_TwoPaths):
    """x -> x - 2 A^T f(A x + b), with the exact adjoint of the stored A and slopes of f in [0, 1].

    Its Lipschitz constant is max(1, 2 |A|^2 - 1): 1 if |A| <= 1. The Jacobian I - 2 A^T S A, S diagonal with entries in
    [0, 1], is symmetric with eigenvalues between 1 - 2 |A|^2 and 1.

    Attributes:
      linear: A, a Dense, a Conv with any strides and padding, or a CircularConv.
      bias: b, (c,), of the channels of A's outputs.
      activation: f, an operator on A's outputs: ReLU, LeakyReLU (0 <= slope), Tanh, Sigmoid, Softplus, or another
        `Elementwise` of slopes in [0, 1]. Others, such as MaxMin or the absolute value, are refused.
      nonexpansive: a promise of who made A that |A| <= 1, so that training estimates nothing. `bound` ignores it.
    Source: Meunier et al. 2022, arXiv:2110.12690; Araujo et al. 2023, arXiv:2303.03169.
    Example: in one dimension with A = 1 and b = 0 it is x - 2 max(x, 0) = -|x|.
      >>> linear, bias = lipjax.operators.Dense(jnp.eye(1)), jnp.zeros(1)
      >>> step = lipjax.operators.PotentialStep(linear, bias, lipjax.operators.ReLU((1,)))
      >>> step(jnp.array([[3.0], [-2.0]])).ravel().tolist()
      [-3.0, -2.0]
    """

    linear: Any
    bias: Leaf
    activation: Any
    nonexpansive: bool = False
    adds_input = True
    _reason = "2 s^2 - 1, s the bound of the linear map"
    _at_most_one = "exact: 2 s^2 - 1 is at most 1, s the bound of the linear map"

    def _forward(self) -> Factor:
        return self.linear

    def _back(self) -> Any:
        return self.linear.transpose(-2.0)

    def _enough(self) -> spectral.NormBound | None:
        found = self.linear.row_sum_bound()
        return found if found is not None and found.claimed <= 1 else None

    def lipschitz_of(self, product: Any) -> Any:
        reach = 2 * product**2 - 1
        return jnp.maximum(reach, 1.0) if isinstance(product, jax.Array) else max(reach, 1)


@operator("linear", "bias", "activation", static=("outputs", "nonexpansive"))
class Sandwich(_TwoPaths):
    """x -> 2 A^T f(B x + b), with A and B stored side by side and slopes of f in [0, 1].

    Its Lipschitz constant is at most |[A B]|^2: 1 if |[A B]| <= 1, where the product of norms would be 2 |A| |B|.

    Attributes:
      linear: [A B], a Dense, Conv or CircularConv whose first `outputs` columns, or input channels, are A's.
      bias: b, (c,), of the channels of its outputs.
      activation: f, as of `PotentialStep`.
      outputs: how many features or channels the sandwich gives; static.
      nonexpansive: a promise that |[A B]| <= 1, as of `PotentialStep`.
    Source: Wang & Manchester 2023, arXiv:2301.11526.
    Example:
      >>> linear = lipjax.operators.Dense(jnp.array([[0.5, 0.5]]))
      >>> sandwich = lipjax.operators.Sandwich(linear, jnp.zeros(1), lipjax.operators.ReLU((1,)), outputs=1)
      >>> sandwich(jnp.array([[4.0]])).tolist(), sandwich.bound().proved < 0.5000001
      ([[2.0]], True)
    """

    linear: Any
    bias: Leaf
    activation: Any
    outputs: int
    nonexpansive: bool = False
    _reason = _at_most_one = "s^2, s the bound of the linear map"

    def check(self) -> None:
        super().check()
        columns = tuple(self.linear.in_shape)[-1]
        if isinstance(self.outputs, bool) or not isinstance(self.outputs, int) or not 1 <= self.outputs < columns:
            raise ValueError(
                f"Sandwich expects outputs between 1 and {columns - 1}, so that of the {columns} columns or input "
                f"channels of [A B] some are A's and some B's, got {self.outputs!r}."
            )
        self.linear.channels(0, self.outputs)  # a map that cannot be split raises here

    def _forward(self) -> Factor:
        return self.linear.channels(self.outputs, None)

    def _back(self) -> Any:
        return self.linear.channels(0, self.outputs).transpose(2.0)

    def lipschitz_of(self, product: Any) -> Any:
        return product**2
