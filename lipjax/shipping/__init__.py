"""Networks for other programs: ONNX files, and arrays for layers of PyTorch."""

from lipjax.shipping.onnx_file import write_onnx
from lipjax.shipping.onnx_registry import TRANSLATIONS, translates
from lipjax.shipping.torch_state import torch_state

__all__ = ["TRANSLATIONS", "torch_state", "translates", "write_onnx"]


def __dir__() -> list[str]:
    return __all__
