"""Models in Flax NNX: `flax.nnx.bridge.ToNNX` wraps them, and `from_nnx` gives back what `lipjax.freeze` takes."""

from typing import Any

from lipjax.nn.model import LipschitzModel

# How ToNNX and NNX name what is theirs, beside the variables of the model.
_OWN = ("to_nnx__", "_pytree__")


def from_nnx(module: Any) -> tuple[LipschitzModel, dict[str, Any]]:
    """The model inside an NNX module, and its variables as Linen has them.

    Args:
      module: `nnx.bridge.ToNNX(model, rngs=...)` after its `lazy_init`, trained or not.
    Returns: (model, variables), with the collections "params" and "lip": `lipjax.freeze(*from_nnx(module))` certifies.
    Raises: ValueError for another module, or one that is not initialised.
    Example: docs/nnx.md trains one.
      >>> import lipjax.nn
      >>> from flax import nnx
      >>> from lipjax.models import LiResNet
      >>> model = LiResNet((8, 8, 1), 3, depth=1, width=4, stem_kernel=2)
      >>> module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(jnp.zeros((1, 8, 8, 1)))
      >>> sorted(lipjax.nn.from_nnx(module)[1])
      ['lip', 'params']
    """
    from flax import nnx  # here, because it loads optax and Orbax
    from flax.nnx.bridge import variables as bridge

    if not isinstance(module, nnx.bridge.ToNNX) or not isinstance(module.to_nnx__module, LipschitzModel):
        raise ValueError(
            f"Expected nnx.bridge.ToNNX(model, rngs=...) around a model of lipjax, got a {type(module).__name__}: "
            "docs/nnx.md shows how to make one."
        )
    own = {name: value for name, value in vars(module).items() if not name.startswith(_OWN)}
    if not own:
        raise ValueError("Expected a module with variables: call its lazy_init with a batch of images first.")
    return module.to_nnx__module, dict(bridge.nnx_attrs_to_linen_vars(own))
