"""Errors of the public functions of `spectral` about arguments of the wrong kind."""

from typing import Any

import jax
import numpy as np


def check_operator(operator: Any, name: str, of_arrays: str) -> None:
    """Raises: ValueError for an array in the place of an operator."""
    if isinstance(operator, (np.ndarray, jax.Array, list, tuple)):
        raise ValueError(
            f"{name} takes an operator, such as operators.Dense(matrix) or operators.Conv(kernel, in_shape), got a "
            f"plain {type(operator).__name__} of shape {np.shape(operator)}: make one of it, or call {of_arrays}."
        )
