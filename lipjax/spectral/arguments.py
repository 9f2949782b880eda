"""The methods that `norm_bound` and `norm_estimate` ask of an operator, and the errors for arguments that lack them."""

from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np


@runtime_checkable
class Bounded(Protocol):
    """An operator that has a proved norm."""

    @abstractmethod
    def bound(self) -> Any:
        """The proved upper bound of the norm, a `NormBound`. Raises: NotCertifiable if the arrays admit none."""


@runtime_checkable
class Estimated(Protocol):
    """An operator that can estimate its norm."""

    @abstractmethod
    def estimate(self, v, num_iters: int) -> Any:
        """(sigma, v): a differentiable estimate that may be low, by steps from v; and the vector to start from next."""


def check_operator(operator: Any, name: str, of_arrays: str) -> None:
    """Raises: ValueError for an array in the place of an operator."""
    if isinstance(operator, (np.ndarray, jax.Array, list, tuple)):
        raise ValueError(
            f"{name} takes an operator, such as operators.Dense(matrix) or operators.Conv(kernel, in_shape), got a "
            f"plain {type(operator).__name__} of shape {np.shape(operator)}: make one of it, or call {of_arrays}."
        )
