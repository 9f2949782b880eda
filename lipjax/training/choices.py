"""Fields of a config that depend on a choice in it: of a loss, an optimizer, a schedule, a model, a layer.

A table such as `objective.LOSSES` or `nn.LAYERS` says for each name which fields the choice brings, with defaults,
comments and checks; `CHOICES` lists the tables. A new loss is one entry of its table.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from lipjax.models import MODELS
from lipjax.nn import LAYERS, Field, layer_fields
from lipjax.training.objective import LOSSES
from lipjax.training.optimizer import OPTIMIZERS, SCHEDULES
from lipjax.training.setting import Setting


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field whose value decides which other fields its group has.

    Attributes: group, field: config.<group>.<field>. noun: what is chosen, such as "loss". names: that can be chosen.
      brings: name -> {field: Setting}. within: the choices whose fields this one may bring.
    """

    group: str
    field: str
    noun: str
    names: tuple[str, ...]
    brings: Callable[[str], Mapping[str, Setting]]
    within: tuple["Choice", ...] = ()

    @property
    def path(self) -> str:
        return f"{self.group}.{self.field}"

    def own(self, name: Any) -> Mapping[str, Setting]:
        """The fields that a name brings: none, if it is not known."""
        return self.brings(name) if name in self.names else {}

    def owners(self, field: str) -> list[str]:
        """The names that bring a field."""
        return [name for name in self.names if field in self.brings(name)]

    def chosen(self, config: Any) -> Any:
        """The choice of a config, or of nested mappings; None where there is no such field."""
        return config.get(self.group, {}).get(self.field)

    def choose(self, config: Any, name: str) -> None:
        """Sets the field to a name, known or not, and takes the fields that it brings in the place of those before.

        What both bring keeps its value, and so do the other fields of the group.
        """
        group = config[self.group]
        after = self.own(name)
        before = dict(self.own(group.get(self.field))) if group.get(self.field) != name else {}
        if before:
            for inner in self.within:
                before |= inner.own(inner.chosen(config))
        with config.unlocked():
            group[self.field] = name
            for field, setting in before.items():
                if field in group and after.get(field) is not setting:
                    del group[field]
            for field, setting in after.items():
                if field not in group:
                    group[field] = setting.start()
            for inner in self.within:
                if inner.field in after:
                    inner.choose(config, group[inner.field])


def model_fields(name: str) -> dict[str, Setting]:
    """The attributes of a model that config.model may hold."""
    found, hints = {}, typing.get_type_hints(MODELS[name])
    for field in dataclasses.fields(MODELS[name]):
        if field.name not in (*_NOT_FIELDS, *OF_ALL_MODELS):
            optional = types.NoneType in (of := typing.get_args(hints[field.name])) and int in of
            found[field.name] = Setting(field.default, "", optional=int if optional else None)
    return found


@functools.cache
def _setting(field: Field) -> Setting:
    """The same Setting for equal fields, so that these keep their value. Its model checks values of config.model."""
    return Setting(field.default, field.comment, optional=field.optional)


def _layer_settings(name: str) -> dict[str, Setting]:
    return {field: _setting(about) for field, about in layer_fields(name).items()}


LAYER = Choice("model", "layer", "layer", tuple(LAYERS), _layer_settings)
MODEL = Choice("model", "name", "model", tuple(MODELS), model_fields, (LAYER,))
RECIPE = (
    Choice("loss", "name", "loss", tuple(LOSSES), lambda name: LOSSES[name].fields),
    Choice("optimizer", "name", "optimizer", tuple(OPTIMIZERS), lambda name: OPTIMIZERS[name].fields),
    Choice("optimizer", "schedule", "schedule", tuple(SCHEDULES), lambda name: SCHEDULES[name].fields),
)
"""The choices that every config makes beside the model, with fields that it must have."""

CHOICES = (MODEL, *RECIPE, LAYER)
"""The choices that decide which fields a group has, in the order of the arguments of `default_config`.

Not all models have a layer to choose.
"""

# Arguments of a model that training sets, and what all models have beside attributes of their own.
_NOT_FIELDS = ("input_shape", "num_classes", "batch_size", "layer_options", "parent", "name")
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
    """A saved config without the fields of losses, optimizers, schedules and layers which it did not choose.

    An older lipjax stored all fields, whichever were read.
    """
    found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    for choice in CHOICES[1:]:
        group: dict = found.get(choice.group, {})
        own = {field for c in CHOICES if c.group == choice.group for field in c.own(group.get(c.field))}
        if choice is LAYER and choice.field not in group:
            default = MODEL.own(group.get(MODEL.field)).get(LAYER.field)
            own |= set(LAYER.own(default.default)) if default else set()
        for field in set(group) - own:
            if choice.owners(field):
                del group[field]
    return found
