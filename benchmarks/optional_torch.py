"""PyTorch, where it is installed: `torch` and `tf` (torch.nn.functional), or None and None."""

import importlib
from typing import Any

torch: Any
tf: Any
try:
    torch, tf = importlib.import_module("torch"), importlib.import_module("torch.nn.functional")
except ImportError:
    torch = tf = None
