"""Models by name: get_model(config.model, input_shape=..., num_classes=...)."""

from lipjax.errors import UserError
from lipjax.models.bronet import BRONet
from lipjax.models.compared import ComparedConvNet
from lipjax.models.concatnet import ConcatNet
from lipjax.models.convnet import ConvNet
from lipjax.models.lipconvnet import LipConvnet
from lipjax.models.lipnext import LipNeXt
from lipjax.models.liresnet import LiResNet
from lipjax.models.patchnet import PatchNet
from lipjax.models.potentialnet import PotentialNet
from lipjax.models.sandwichnet import SandwichNet
from lipjax.models.stagednet import StagedNet
from lipjax.nn import LAYERS, LayeredModel, LipschitzModel, layer_fields

MODELS = {
    "bronet": BRONet,
    "compared": ComparedConvNet,
    "concatnet": ConcatNet,
    "convnet": ConvNet,
    "lipconvnet": LipConvnet,
    "lipnext": LipNeXt,
    "liresnet": LiResNet,
    "patchnet": PatchNet,
    "potentialnet": PotentialNet,
    "sandwichnet": SandwichNet,
    "stagednet": StagedNet,
}


def get_model(config, *, input_shape: tuple[int, int, int], num_classes: int, batch_size: int = 128) -> LipschitzModel:
    """The model that a config names.

    Args:
      config: a dict or ConfigDict: `name` and the model's attributes, such as depth and width, and beside `layer` the
        fields that the layer brings.
      input_shape: (h, w, c).
      num_classes: of the logits.
      batch_size: images per training step and device, by which layers choose how to compute.
    Returns: the Flax module; `lipjax.freeze(model, variables)` takes it.
    Raises: UserError for an unknown name or attribute, or sizes that the model cannot take.
    Example:
      >>> sizes = {"depth": 2, "width": 16, "stem_kernel": 2, "stem_strides": 2, "stem_padding": 0}
      >>> model = lipjax.models.get_model({"name": "liresnet", **sizes}, input_shape=(8, 8, 1), num_classes=10)
      >>> type(model).__name__, model.width
      ('LiResNet', 16)
    """
    options = dict(config)
    name = options.pop("name")
    if name not in MODELS:
        raise UserError(f"config.model.name: expected one of {sorted(MODELS)}, got {name!r}.")
    try:
        if issubclass(MODELS[name], LayeredModel):
            layer = options.get("layer", MODELS[name].layer)
            if layer not in LAYERS:
                raise ValueError(f"expected layer to be one of {tuple(LAYERS)}, got {layer!r}.")
            own = {field: options.pop(field) for field in layer_fields(layer) if field in options}
            from flax.core import FrozenDict  # here, so that without Flax lipjax.nn is what says so

            options["layer_options"] = FrozenDict({**options.get("layer_options", {}), **own})
            others = [field for field in options if any(field in layer_fields(other) for other in LAYERS)]
            if others:
                raise ValueError(
                    f"the layer {layer!r} has no {' and no '.join(others)}; a config file chooses it by "
                    f'default_config(model="{name}", layer="{layer}"), which sets the fields that it has.'
                )
        model = MODELS[name](input_shape=input_shape, num_classes=num_classes, batch_size=batch_size, **options)
        model.check()
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model does not describe a {name}: {error}") from error
    return model


__all__ = [
    "BRONet",
    "ComparedConvNet",
    "ConcatNet",
    "ConvNet",
    "LipConvnet",
    "LiResNet",
    "LipNeXt",
    "PatchNet",
    "PotentialNet",
    "SandwichNet",
    "StagedNet",
    "get_model",
]


def __dir__() -> list[str]:
    return __all__
