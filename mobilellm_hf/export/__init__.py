"""MobileLLM on a device: export to ExecuTorch, and the exported program run in Python.

Importing it asks for nothing beside the package; the first export or loaded program asks for ExecuTorch. What runs a
program loads nothing of what makes one, which would be 150 MB more resident.
"""

from typing import Any

from .on_device import Generation, OnDeviceModel
from .quantization import Quantization

__all__ = ["Generation", "OnDeviceModel", "Quantization", "run_export"]


def __getattr__(name: str) -> Any:
    if name == "run_export":
        from .exporter import run_export

        return run_export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
