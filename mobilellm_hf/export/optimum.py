"""What Optimum needs to know of MobileLLM: its task `text-generation` builds our graph for our models.

    optimum-cli export executorch --model DIR --task text-generation --recipe xnnpack --output_dir runs/device

    import mobilellm_hf.export.optimum
    model = ExecuTorchModelForCausalLM.from_pretrained("runs/device")

The command line finds `optimum_cli/register_mobilellm.py` by itself; in Python, importing this module is enough. Other
models go Optimum's own way. Its group sizes, which that way ignores, are honoured. What Optimum's runtime class takes
for the context is the longest piece of a prompt, as ExecuTorch's own exporters have it: it generates no further.
`OnDeviceModel` does, and so does the C++ runner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.constants import HUGGINGFACE_HUB_CACHE
from optimum.exporters.executorch.task_registry import discover_tasks, task_registry
from transformers import AutoConfig

from mobilellm_hf.export.arguments import ExportArguments
from mobilellm_hf.export.exporter import context_of, load_config
from mobilellm_hf.export.graph import OnDeviceGraph
from mobilellm_hf.export.program import metadata
from mobilellm_hf.export.quantization import Quantization
from mobilellm_hf.modeling import MobileLLMForCausalLM

TASK = "text-generation"
MODEL_TYPES = ("mobilellm", "llama4_text")
# Optimum's names for Linear layers -> (quantize, group_fall_back).
LINEAR = {None: ("none", False), "8da4w": ("8da4w", False), "8da8w": ("8da8w", False), "8da4w,8da8w": ("8da4w", True)}
# The custom attention and cache are in our graph in any case, and our code is what is installed.
FOLLOWED = {
    "qlinear", "qlinear_group_size", "qembedding", "qembedding_group_size", "max_seq_len", "dtype",
    "disable_dynamic_shapes", "use_custom_sdpa", "use_custom_kv_cache", "trust_remote_code", "config",
}  # fmt: skip
# What is passed where nobody asked for anything.
WITHOUT_EFFECT = {"cache_dir": HUGGINGFACE_HUB_CACHE, "revision": "main", "device": "cpu"}


class TextGeneration:
    """Optimum's task: (model name, options of its command line) -> a module with `export()` and `metadata`."""

    def __init__(self, others: Callable[..., torch.nn.Module]):
        self.others = others

    def __call__(self, model_name_or_path: str, **options: Any) -> torch.nn.Module:
        config = options.get("config") or AutoConfig.from_pretrained(model_name_or_path)
        if config.model_type not in MODEL_TYPES:
            return self.others(model_name_or_path, **options)
        return build_graph(model_name_or_path, **options)


def build_graph(name: str, **options: Any) -> OnDeviceGraph:
    """The graph that Optimum's recipes lower, as its options say.

    Raises:
        ValueError: an option that this model has no way to follow; the message names it.
    """
    arguments = _arguments(name, options)
    arguments.check()
    config = load_config(name)
    context = context_of(arguments, config)
    quantization = Quantization.for_config(
        arguments.quantize, config, group_size=arguments.group_size, embedding=arguments.embedding,
        embedding_group_size=arguments.embedding_group_size, fall_back=arguments.group_fall_back,
    )  # fmt: skip
    model = MobileLLMForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    eos = model.generation_config.eos_token_id
    quantization.apply(model)
    graph = OnDeviceGraph(model, context, arguments.prefill, getattr(torch, arguments.kv_cache))
    graph.metadata = metadata(config, context, graph.prefill, eos)
    return graph


def _arguments(name: str, options: dict[str, Any]) -> ExportArguments:
    for option, value in options.items():
        if option not in FOLLOWED and value and value != WITHOUT_EFFECT.get(option):
            raise ValueError(f"--{option} {value} cannot be followed in the export of {name}: leave it out")
    linear, dtype = options.get("qlinear"), options.get("dtype", "float32")
    if linear not in LINEAR:
        known = ", ".join(filter(None, LINEAR))
        raise ValueError(f"--qlinear {linear} is not for XNNPACK on a device: take one of {known}, or none")
    if dtype not in ("float32", "bfloat16") or (dtype == "bfloat16" and linear):
        raise ValueError(f"--dtype {dtype} cannot be exported{' with --qlinear' if linear else ''}: leave it out")
    if options.get("disable_dynamic_shapes"):
        raise ValueError("--disable_dynamic_shapes would take a prompt token by token: leave it out")
    quantize, fall_back = ("bf16", False) if dtype == "bfloat16" else LINEAR[linear]
    return ExportArguments(
        model=name,
        output="",
        max_seq_len=options.get("max_seq_len"),
        quantize=quantize,
        group_size=options.get("qlinear_group_size"),
        group_fall_back=fall_back,
        embedding=options.get("qembedding") or "none",
        # Optimum writes the file, in which one table with the head would be two.
        embedding_group_size=options.get("qembedding_group_size") or 0,
    )


def register() -> None:
    """Puts our task in front of Optimum's; a second call changes nothing."""
    discover_tasks()
    if not isinstance(task_registry[TASK], TextGeneration):
        task_registry[TASK] = TextGeneration(task_registry[TASK])


register()
