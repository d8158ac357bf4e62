"""The shape of a MobileLLM with random weights as a GGUF file in Q4_0, for llama.cpp.

llama.cpp has no MobileLLM. Its `qwen3` is the nearest: the norms of query and key have weights and come before the
rotation instead of after it, which changes nothing of what is computed or read by an amount that could be timed.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from mobilellm_hf import MobileLLMConfig

ARCHITECTURE = "qwen3"


def write_gguf(config: MobileLLMConfig, path: Path, seed: int = 0) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(seed)
    for name, shape in _shapes(config).items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
        else:
            weight = random.standard_normal(shape, dtype=np.float32) * config.initializer_range
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(config: MobileLLMConfig) -> dict[str, tuple[int, ...]]:
    """The embedding is the head, too, as llama.cpp has it where there is no `output`."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * width, config.num_key_value_heads * width
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (config.vocab_size, hidden), "output_norm": (hidden,)}
    for layer in range(config.num_hidden_layers):
        parts = {
            "attn_norm": (hidden,), "attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden),
            "attn_q_norm": (width,), "attn_k_norm": (width,), "attn_output": (hidden, query), "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes
