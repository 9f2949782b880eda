"""The trainer: data, train state, step, loop, checkpoints, evaluation."""

from typing import TYPE_CHECKING, Any

from lipjax.errors import require_extra

require_extra("train", "absl", "flax", "ml_collections", "optax", "orbax", "rich")

if TYPE_CHECKING:
    from lipjax.training.trained import load_trained

__all__ = ["load_trained"]


def __getattr__(name: str) -> Any:
    if name == "load_trained":  # on demand, because it takes Orbax and optax
        from lipjax.training.trained import load_trained

        return load_trained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
