"""Which cases of a dear test run every day: the others run the same code on other numbers, and are nightly."""

from collections.abc import Iterable

import pytest


def everyday(cases: Iterable, *chosen) -> list:
    """Cases for `pytest.mark.parametrize`, of which those that are not chosen are nightly.

    Args:
      cases: names, or tuples of arguments.
      chosen: those of every day, as they stand among the cases.
    Raises: ValueError for one that is not among the cases, or for none, which would leave no test of every day.
    Example: @pytest.mark.parametrize("name", everyday(LAYERS, "soc", "cayley"))
    """
    cases = list(cases)
    if not chosen or not all(case in cases for case in chosen):
        raise ValueError(f"Expected some of {cases} for every day, got {chosen}.")
    return [case if case in chosen else _nightly(case) for case in cases]


def _nightly(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly)
