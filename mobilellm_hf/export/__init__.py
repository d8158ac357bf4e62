"""MobileLLM on a device: export to ExecuTorch, and the exported program run in Python.

Importing it asks for nothing beside the package; the first export or loaded program asks for ExecuTorch.
"""

from .exporter import run_export
from .on_device import Generation, OnDeviceModel
from .quantization import Quantization

__all__ = ["Generation", "OnDeviceModel", "Quantization", "run_export"]
