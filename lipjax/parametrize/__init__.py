"""Parametrisations: raw arrays to the arrays of operators, one method per file. Bounds never look in here."""

from lipjax.parametrize import (
    aoc,
    aol,
    bcop,
    bjorck,
    bro,
    cayley,
    cholesky,
    cpl,
    lln,
    lot,
    residual,
    sandwich,
    sll,
    soc,
    soc_forms,
    soc_frequency,
)

__all__ = [
    "aoc",
    "aol",
    "bcop",
    "bjorck",
    "bro",
    "cayley",
    "cholesky",
    "cpl",
    "lln",
    "lot",
    "residual",
    "sandwich",
    "sll",
    "soc",
    "soc_forms",
    "soc_frequency",
]


def __dir__() -> list[str]:
    return __all__
