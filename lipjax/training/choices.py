"""Fields of a config that depend on a choice in it: of a loss, an optimizer, a schedule, a model.

A table such as `objective.LOSSES` says for each name which fields the choice brings, with defaults, comments and
checks; `CHOICES` lists the tables. A new loss is one entry of its table.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

from lipjax.models import MODELS
from lipjax.training.objective import LOSSES
from lipjax.training.optimizer import OPTIMIZERS, SCHEDULES
from lipjax.training.setting import Setting


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field whose value decides which other fields its group has.

    Attributes: group, field: config.<group>.<field>. noun: what is chosen, such as "loss". names: that can be chosen.
      brings: name -> {field: Setting}.
    """

    group: str
    field: str
    noun: str
    names: tuple[str, ...]
    brings: Callable[[str], Mapping[str, Setting]]

    @property
    def path(self) -> str:
        return f"{self.group}.{self.field}"

    def own(self, name: Any) -> Mapping[str, Setting]:
        """The fields that a name brings: none, if it is not known."""
        return self.brings(name) if name in self.names else {}

    def owners(self, field: str) -> list[str]:
        """The names that bring a field."""
        return [name for name in self.names if field in self.brings(name)]

    def choose(self, config: Any, name: str) -> None:
        """Sets the field to a name, known or not, and takes the fields that it brings in the place of those before.

        What both bring keeps its value, and so do the other fields of the group.
        """
        group = config[self.group]
        before, after = self.own(group[self.field]) if group[self.field] != name else {}, self.own(name)
        with config.unlocked():
            group[self.field] = name
            for field, setting in before.items():
                if field in group and after.get(field) is not setting:
                    del group[field]
            for field, setting in after.items():
                if field not in group:
                    group[field] = setting.default


def model_fields(name: str) -> dict[str, Any]:
    """The attributes of a model that config.model may hold, and their defaults (whole numbers that may be None: as a
    reference with the type)."""
    found, hints = {}, typing.get_type_hints(MODELS[name])
    for field in dataclasses.fields(MODELS[name]):
        if field.name not in (*_NOT_FIELDS, *OF_ALL_MODELS):
            optional = types.NoneType in (of := typing.get_args(hints[field.name])) and int in of
            found[field.name] = config_dict.FieldReference(field.default, int) if optional else field.default
    return found


def _model_settings(name: str) -> dict[str, Setting]:
    return {field: Setting(default, "") for field, default in model_fields(name).items()}


CHOICES = (
    Choice("model", "name", "model", tuple(MODELS), _model_settings),
    Choice("loss", "name", "loss", tuple(LOSSES), lambda name: LOSSES[name].fields),
    Choice("optimizer", "name", "optimizer", tuple(OPTIMIZERS), lambda name: OPTIMIZERS[name].fields),
    Choice("optimizer", "schedule", "schedule", tuple(SCHEDULES), lambda name: SCHEDULES[name].fields),
)
"""The choices that decide which fields a group has, in the order of the arguments of `default_config`."""

# Arguments of a model that training sets, and what all models have beside attributes of their own.
_NOT_FIELDS = ("input_shape", "num_classes", "batch_size", "parent", "name")
OF_ALL_MODELS = ("input_mean", "input_std", "logit_scale")


def update(config: Any, changes: Mapping[str, Any]) -> None:
    """Sets fields by "group.field", choices first, so that the fields which they bring are there.

    Example: update(config, {"loss.name": "crm", "loss.weight": 3.0})
    """
    with config.unlocked():
        for choice in CHOICES:
            if choice.path in changes:
                choice.choose(config, changes[choice.path])
        config.update_from_flattened_dict(dict(changes))


def without_others(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config without the fields that belong to losses, optimizers and schedules which it did not choose.

    An older lipjax stored all fields, whichever were read.
    """
    found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    for choice in CHOICES[1:]:
        group: dict = found.get(choice.group, {})
        own = {field for c in CHOICES if c.group == choice.group for field in c.own(group.get(c.field))}
        for field in set(group) - own:
            if choice.owners(field):
                del group[field]
    return found
