"""A map beside which its input goes on unchanged: the conventional residual block."""

import math
from fractions import Fraction

from lipjax import spectral
from lipjax.errors import NotCertifiable
from lipjax.operators.base import check_input, operator
from lipjax.spectral.verified import float_up


@operator("ops", static=())
class Residual:
    """x -> x + g(x), g the operators `ops` in turn. Its Lipschitz constant is at most 1 + the product of theirs.

    Every operator of `ops` is compiled apart from the others where rounding errors are bounded (`FrozenNetwork`), so
    that they bound theirs, and this one none. A norm estimate takes a vector for each operator that needs one
    (`bounds.norm_estimates`).
    """

    ops: tuple

    @property
    def in_shape(self):
        return self.ops[0].in_shape

    @property
    def out_shape(self):
        return self.ops[0].in_shape

    def check(self) -> None:
        if not isinstance(self.ops, tuple) or not self.ops:
            raise ValueError(f"Expected a tuple of at least one operator, got {self.ops!r}.")
        for i, op in enumerate(self.ops):
            if isinstance(op, Residual) or hasattr(op, "with_mean"):
                raise ValueError(f"operator {i}: {type(op).__name__} cannot stand inside a residual block.")
            getattr(op, "check", tuple)()
        following = (*self.ops[1:], self)
        for i, (op, after) in enumerate(zip(self.ops, following, strict=True)):
            if tuple(op.out_shape) != tuple(after.in_shape):
                expected = "the sum" if after is self else f"operator {i + 1}"
                raise ValueError(f"operator {i} gives shape {op.out_shape}, but {expected} takes {after.in_shape}.")

    def __call__(self, x):
        check_input(self, x)
        y = x
        for op in self.ops:
            y = op(y)
        return x + y

    def bound(self) -> spectral.NormBound:
        parts = []
        for i, op in enumerate(self.ops):
            kind = type(op).__name__
            if not hasattr(op, "bound"):
                raise NotCertifiable(f"operator {i}: no proved Lipschitz bound is known for one of type {kind}.")
            found = op.bound()
            claims = {"type": kind, "bound": float(found.claimed), "sigma": float(found.proved)}
            parts.append({**claims, "method": found.method, "details": found.details})
        # Of the claims, so that the checker's proofs of them carry over.
        product = math.prod((Fraction(part["bound"]) for part in parts), start=Fraction(1))
        return spectral.NormBound(float_up(1 + product), "1 + the product of the operators' bounds", {"parts": parts})
