"""lipjax: classifiers whose robustness is proved. `import lipjax` loads the theory; models and training apart."""

import importlib
import os
from typing import Any

# OpenBLAS threads beside XLA's make batched solves up to 1000 times slower and have corrupted the heap:
# https://github.com/jax-ml/jax/issues/39292
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from lipjax import (  # noqa: E402
    activations,
    attacks,
    bounds,
    certify,
    conv,
    curvature,
    linalg,
    losses,
    network,
    operators,
    parametrize,
    pooling,
    spectral,
    zoo,
)
from lipjax.certify import FrozenNetwork, freeze  # noqa: E402
from lipjax.errors import NotCertifiable, UserError  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "FrozenNetwork",
    "NotCertifiable",
    "UserError",
    "activations",
    "attacks",
    "bounds",
    "certify",
    "conv",
    "curvature",
    "freeze",
    "linalg",
    "losses",
    "network",
    "operators",
    "parametrize",
    "pooling",
    "spectral",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name == "manifold":  # on demand, because it takes optax
        return importlib.import_module("lipjax.manifold")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that tab completion shows: those above, and submodules such as lipjax.nn once they are imported."""
    loaded = (name for name, value in globals().items() if getattr(value, "__name__", None) == f"lipjax.{name}")
    return sorted({"__version__", *__all__, *(name for name in loaded if not name.startswith("_"))})
