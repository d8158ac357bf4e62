"""From a graph to the bytes of a .pte for XNNPACK, and back: what the file says of itself.

program = lower(graph, metadata)
write_whole(path, lambda partial: write_program(program, partial))
read_weights(path)              # [StoredWeight(datatype='qbint4', group_size=32, shape=(576, 576)), ...]
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm_hf.export.graph import OnDeviceGraph
from mobilellm_hf.export.store_once import store_once
from mobilellm_hf.modeling import MobileLLMConfig

PROGRAM, REPORT = "model.pte", "export.json"  # of an exported folder
METHOD = "forward"
PIECE, CONTEXT = "get_max_seq_len", "get_max_context_len"  # tokens of one call, positions of the cache
VOCABULARY = "get_vocab_size"
# Of torch.export's scalar types, as ExecuTorch's runners count them.
SCALAR_TYPE_FLOAT = 6


def metadata(
    config: MobileLLMConfig, context: int, prefill: int, eos_token_id: int | list[int] | None = None
) -> dict[str, Any]:
    """The constant methods that ExecuTorch's llama runner and Optimum's runtime class ask a program for.

    `get_max_seq_len` is the longest piece that one call takes: the runner cuts a prompt into pieces of it.
    `get_max_context_len` is the size of the KV cache. `eos_token_id` is the generation's, if it has its own.
    """
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    values = {
        "get_bos_id": config.bos_token_id,
        "get_eos_ids": [eos] if isinstance(eos, int) else eos,
        VOCABULARY: config.vocab_size,
        "get_max_batch_size": 1,
        PIECE: prefill,
        CONTEXT: context,
        "get_n_layers": config.num_hidden_layers,
        "get_n_kv_heads": config.num_key_value_heads,
        "get_head_dim": config.head_dim,
        "get_dtype": SCALAR_TYPE_FLOAT,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    return {name: value for name, value in values.items() if value not in (None, [])}


def lower(graph: OnDeviceGraph, constants: dict[str, Any]):
    """The graph for XNNPACK, what it does not take for ExecuTorch's own kernels; an ExecutorchProgramManager."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    with quiet():
        edge = to_edge_transform_and_lower(
            {METHOD: graph.export()["model"]},
            partitioner=[XnnpackPartitioner()],
            # The verifier does not know the llama operators, and XNNPACK takes one dimension order only.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constants,
        )
        return edge.to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True,
                do_quant_fusion_and_const_prop=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )


def is_exported(name: str | Path) -> bool:
    """Whether this is a folder with a program and no weights of transformers."""
    folder = Path(name)
    return (folder / PROGRAM).is_file() and not any(folder.glob("*.safetensors"))


def write_program(program, path: Path) -> int:
    """Returns how many bytes would be in the file twice, and are there once."""
    with open(path, "wb") as file:
        program.write_to_file(file)
    return store_once(path)


@contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch and torch.export warn of their own inner workings dozens of times."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


@contextmanager
def silent_runtime() -> Iterator[None]:
    """ExecuTorch's runtime writes what it finds of the processor to standard error, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True)
class StoredWeight:
    """A quantized matrix in the file: `qbint4` has a scale for `group_size` inputs, `qcint8` one for a row."""

    datatype: str
    group_size: int
    shape: tuple[int, ...]


def read_weights(path: str | Path) -> list[StoredWeight]:
    """Every quantized weight that XNNPACK finds in a .pte."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnnpack
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(Path(path).read_bytes()).program
    plan = next(plan for plan in program.execution_plan if plan.name == METHOD)
    weights = []
    for delegate in plan.delegates:
        payload = program.backend_delegate_data[delegate.processed.index].data
        header = xnnpack.XNNHeader.from_bytes(payload[: xnnpack.XNNHeader.EXPECTED_LENGTH])
        graph = payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
        weights += _weights_of(_xnnpack_graph(graph))
    return weights


def read_operators(path: str | Path) -> list[str]:
    """The operators that a .pte runs outside XNNPACK."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(Path(path).read_bytes()).program
    plan = next(plan for plan in program.execution_plan if plan.name == METHOD)
    return [f"{operator.name}.{operator.overload}" for operator in plan.operators]


def _xnnpack_graph(flatbuffer: bytes) -> dict[str, Any]:
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnnpack
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory() as folder:
        schema, data = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(xnnpack._get_schema_bytes())
        data.write_bytes(flatbuffer)
        _flatc_decompile(folder, str(schema), str(data), ["--raw-binary"])
        return json.loads(Path(folder, "graph.json").read_text())


def _weights_of(graph: dict[str, Any]) -> Iterator[StoredWeight]:
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        # Activations are quantized too, a token at a time.
        if value["xvalue_union_type"] != "XNNQuantizedTensorValue" or "PerChannel" not in tensor["quant_params_type"]:
            continue
        shape = tuple(tensor["tensor_value"]["dims"])
        datatype = tensor["tensor_value"]["datatype"].removeprefix("xnn_datatype_")
        yield StoredWeight(datatype, tensor["quant_params"].get("group_size", shape[-1]), shape)
