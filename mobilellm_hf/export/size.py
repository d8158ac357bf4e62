"""What an export will need, told before it begins, and what its file is made of, told after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from rich.table import Table
from transformers import PreTrainedModel

from mobilellm_hf.export.quantization import BITS, Quantization
from mobilellm_hf.modeling import MobileLLMConfig, MobileLLMForCausalLM

# The stages of torch.export and of the lowering hold the weights several times over, beside the program's own copy;
# quantized ones at a byte each. Upper bounds: in 8da4w with a context of 32,768 the 140M took 2.6 GB and the 950M 6.7,
# where these make 3.0 and 10.2.
MEMORY_PER_BYTE_OF_FP32, MEMORY_QUANTIZED = 4.0, 2.0
MEMORY_OF_THE_LIBRARIES = 1_500_000_000
# Graph, names, alignment: 0.15 MB in the file of the 140M.
SLACK = 2_000_000
GROUP_SCALE_BYTES, ROW_SCALE_BYTES = 2, 4
PARTS = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "feed_forward": "feed-forward"}


def stored_bytes(model: PreTrainedModel, quantization: Quantization) -> dict[str, int]:
    """Bytes of every part as it will be stored; the model may be on the meta device.

    Of an embedding that is one table with the head nothing is stored besides, or, in groups, its scales: XNNPACK's are
    in bfloat16.
    """
    sizes = dict.fromkeys([*PARTS.values(), "norms"], 0)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        part = next((part for key, part in PARTS.items() if key in name.split(".")), "norms")
        scheme, group_size = quantization.stores(name, module)
        if scheme in BITS:
            scales = weight.numel() // group_size
            scale_bytes = GROUP_SCALE_BYTES if scheme == "8da4w" else ROW_SCALE_BYTES
            sizes[part] += weight.numel() * BITS[scheme] // 8 + scales * scale_bytes
        else:
            sizes[part] += weight.numel() * quantization.dtype.itemsize
        if part == "embedding" and quantization.one_table:
            groups = weight.numel() // group_size if quantization.linear == "8da4w" else 0
            sizes[part] = groups * ROW_SCALE_BYTES
    return sizes


def shared_bytes(config: MobileLLMConfig, quantization: Quantization) -> int:
    """Of the table that embedding and head are, where they are one."""
    values = config.vocab_size * config.hidden_size if quantization.one_table else 0
    return values * BITS.get(quantization.linear, 32) // 8


def cache_bytes(config: MobileLLMConfig, context: int, cache_dtype: torch.dtype) -> int:
    """Of keys and values, in memory as the model runs; the file holds none."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * context * width * cache_dtype.itemsize


def shape_of(config: MobileLLMConfig) -> MobileLLMForCausalLM:
    """The model without its weights."""
    with torch.device("meta"):
        return MobileLLMForCausalLM(config)


def check_room(
    name: str, config: MobileLLMConfig, quantization: Quantization, context: int, cache_dtype: torch.dtype
) -> int:
    """Bytes of memory that the export of the model `name` will take at most.

    Raises:
        MemoryError: there are fewer; the message has both numbers.
    """
    parameters = sum(weight.numel() for weight in shape_of(config).parameters())
    factor = MEMORY_QUANTIZED if quantization.linear.startswith("8da") else MEMORY_PER_BYTE_OF_FP32
    memory = int(parameters * 4 * factor) + MEMORY_OF_THE_LIBRARIES
    memory += cache_bytes(config, context, cache_dtype)
    if memory > (free := free_memory()):
        raise MemoryError(
            f"model={name}: its export takes about {memory / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
            f"close other programs, or give a max_seq_len below {context:,}"
        )
    return memory


def check_disk(folder: Path, config: MobileLLMConfig, quantization: Quantization, tokenizer_bytes: int) -> None:
    """Raises an OSError with both numbers where the disk of a folder to be has no room for what will be written."""
    disk = sum(stored_bytes(shape_of(config), quantization).values()) + tokenizer_bytes + SLACK
    disk += shared_bytes(config, quantization)  # which are written twice before they are stored once
    if disk > (free := shutil.disk_usage(folder.resolve().parent).free):
        raise OSError(
            f"output={folder}: program and tokenizer take about {disk / 1e6:.0f} MB, and its disk has "
            f"{free / 1e6:.0f} MB free"
        )


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the machine, or of the control group (a container's) if that has less.

    What the kernel keeps of files counts as used by a group, and is given back when memory is short.
    """
    free = psutil.virtual_memory().available
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(counts["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no group, or one without a limit: "max"
        return free


def size_table(parts: Mapping[str, int], path: Path) -> Table:
    """Parts as they are stored, and what is left of the file: graph, names, alignment."""
    total = os.path.getsize(path)
    table = Table("part", "MB", "share", title=f"{path.name}: {total / 1e6:.1f} MB")
    for name, size in [*parts.items(), ("graph and alignment", total - sum(parts.values()))]:
        table.add_row(name, f"{size / 1e6:.2f}", f"{size / total:.1%}")
    return table
