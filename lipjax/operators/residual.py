"""A map beside which its input goes on unchanged: the conventional residual block."""

import copy
from typing import Any

from lipjax.operators.base import Composite, operator
from lipjax.operators.training_only import Centers


@operator("ops", static=())
class Residual(Composite):
    """x -> x + g(x), g the operators `ops` in turn. Its Lipschitz constant is at most 1 + the product of theirs.

    Every operator of `ops` is compiled apart from the others where rounding errors are bounded (`FrozenNetwork`), so
    that they bound theirs, and this one none. A norm estimate takes a vector for each operator that needs one
    (`bounds.norm_estimates`).
    """

    ops: tuple
    adds_input = True
    _reason = "1 + the product of the operators' bounds"

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
            if isinstance(op, Composite | Centers):
                raise ValueError(f"operator {i}: {type(op).__name__} cannot stand inside a residual block.")
        self.check_parts()

    def parts(self) -> tuple:
        return self.ops

    def with_parts(self, parts: tuple) -> "Residual":
        other = copy.copy(self)  # not the constructor: parts may be circulants, which do not fit each other
        object.__setattr__(other, "ops", tuple(parts))
        return other

    def lipschitz_of(self, product: Any) -> Any:
        return 1 + product

    def _arrays_text(self):
        return ", ".join(map(repr, self.ops)) if isinstance(self.ops, tuple) else "?"
