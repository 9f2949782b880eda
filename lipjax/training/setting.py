"""A field that a choice brings into a config, with its default, comment and check (see choices.py)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """A field that a choice brings.

    Choices that share a field share the Setting: then its value stays when another one of them is chosen.

    Attributes: default: its type is that of all values. comment: what the field is, for --help and docs/config.md.
      optional: the type of values of a field that may be None as well.
      good: (value, whole config) -> whether the value can be used, and expected: what the error says if not.
    """

    default: Any
    comment: str
    optional: type | None = dataclasses.field(default=None, kw_only=True)
    good: Callable[[Any, Any], bool] = lambda value, config: True
    expected: str = ""

    def start(self) -> Any:
        """The value that a config starts with: the default, as a reference with the type where it may be None."""
        return config_dict.FieldReference(self.default, self.optional) if self.optional else self.default


def at_least_0(default: float | int, comment: str) -> Setting:
    return Setting(default, comment, lambda value, config: value >= 0, "at least 0")


def positive(default: float, comment: str) -> Setting:
    return Setting(default, comment, lambda value, config: 0 < value < math.inf, "a positive number")


def growth(default: float, comment: str) -> Setting:
    """A factor by which something is multiplied every epoch."""

    def moderate(factor, config) -> bool:
        return factor > 0 and config.num_epochs * abs(math.log10(factor)) < 30

    return Setting(default, comment, moderate, "a positive factor per epoch that stays within 1e30 over all of them")
