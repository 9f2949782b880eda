"""Models by name: get_model(config.model, input_shape=..., num_classes=...)."""

from lipjax.errors import UserError
from lipjax.models.convnet import ConvNet
from lipjax.models.lipconvnet import LipConvnet
from lipjax.models.liresnet import LiResNet
from lipjax.nn import LipschitzModel

MODELS = {"convnet": ConvNet, "lipconvnet": LipConvnet, "liresnet": LiResNet}


def get_model(config, *, input_shape: tuple[int, int, int], num_classes: int, batch_size: int = 128) -> LipschitzModel:
    """The model that a config names.

    Args: config: `name` and the model's attributes, such as depth and width. input_shape: (h, w, c).
      batch_size: images per training step and device, by which layers choose how to compute.
    Raises: UserError for an unknown name or attribute, or sizes that the model cannot take.
    """
    options = dict(config)
    name = options.pop("name")
    if name not in MODELS:
        raise UserError(f"config.model.name: expected one of {sorted(MODELS)}, got {name!r}.")
    try:
        model = MODELS[name](input_shape=input_shape, num_classes=num_classes, batch_size=batch_size, **options)
        model.check()
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model does not describe a {name}: {error}") from error
    return model


__all__ = ["ConvNet", "LipConvnet", "LiResNet", "get_model"]


def __dir__() -> list[str]:
    return __all__
