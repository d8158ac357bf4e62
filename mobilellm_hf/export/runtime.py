"""ExecuTorch's runtime in Python, without what exports: that would be resident beside every program.

`portable_lib`, the module that ExecuTorch has for this, imports the exporter for a class of warnings, and so do the
modules of its operators: 51 MB and a second at the least. Here the same libraries are loaded, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mobilellm_hf.export.program import METHOD, PIECE, REPORT, quiet, silent_runtime
from mobilellm_hf.export.requirements import INSTALL

# Bytes 4 to 8 of a program; the digits count incompatible changes of the format.
FILE_IDENTIFIER = b"ET"
# Folder -> pattern of the one library in it: the llama and the quantized operators.
KERNELS = {"extension/llm/custom_ops": "*custom_ops_aot_lib.*", "kernels/quantized": "*quantized_ops_aot_lib.*"}


def _runtime():
    """Raises an ImportError where ExecuTorch lacks a library."""
    from executorch.extension.pybindings import _C

    root = Path(_C.__file__).parents[2]
    for folder, pattern in KERNELS.items():
        libraries = list((root / folder).glob(pattern))
        if len(libraries) != 1:
            raise ImportError(f"{root / folder} has {len(libraries)} files {pattern} instead of one: {INSTALL}")
        torch.ops.load_library(libraries[0])
    return _C


def load_module(path: Path, threads: int | None = None):
    """The program in ExecuTorch's runtime, whose pool has that many threads from then on.

    Raises:
        ValueError: it is no .pte of a language model, is damaged, or from another version of ExecuTorch.
    """
    with open(path, "rb") as file:
        head = file.read(8)
    if head[4:6] != FILE_IDENTIFIER:
        raise ValueError(f"{path} is not an ExecuTorch program")
    with quiet(), silent_runtime():
        runtime = _runtime()
        runtime._threadpool_get_thread_count()  # which makes the pool, and tells of it
        if threads is not None:  # before the delegates take hold of the pool
            runtime._unsafe_reset_threadpool(threads)
        try:
            module = runtime._load_for_executorch(str(path))
            if missing := {METHOD, PIECE} - set(module.method_names()):
                raise ValueError(f"{path} is not a language model with a KV cache: it has no {' or '.join(missing)}")
            # The runtime looks for operators and delegates at the first token only.
            module.run_method(METHOD, (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)))
        except RuntimeError as error:
            raise ValueError(f"{path} does not load ({error}){_versions(path)}: export it again") from error
    return module


def _versions(path: Path) -> str:
    """What it was written with and what is here, if its folder tells."""
    import importlib.metadata

    try:
        written = json.loads((path.parent / REPORT).read_text())["versions"]["executorch"]
    except (OSError, ValueError, KeyError):
        return ""
    return f"; it was written with executorch {written}, and {importlib.metadata.version('executorch')} is installed"
