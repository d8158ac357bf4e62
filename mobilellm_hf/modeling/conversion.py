"""MobileLLM -> llama4_text, so that plain transformers, vLLM, llama.cpp and MLX load a model without this package.

The other direction needs no function: `MobileLLMForCausalLM.from_pretrained` reads a llama4_text folder as it is.
"""

from pathlib import Path

import torch
from transformers import Llama4ForCausalLM

from .modeling_mobilellm import MobileLLMForCausalLM


def save_as_llama4_text(model: MobileLLMForCausalLM, folder: str | Path, **save_kwargs) -> None:
    """Writes `model` as a folder that `Llama4ForCausalLM.from_pretrained` loads; the tensors are equal byte for byte.

    `save_kwargs` go to `save_pretrained` (`max_shard_size`, `push_to_hub`, ...). Peak memory grows by nothing: the
    twin shares the model's tensors.

    Raises:
        ValueError: llama4_text cannot express the network (see `MobileLLMConfig.to_llama4_text`).
        TypeError: `model` is not a `MobileLLMForCausalLM` (merge adapters first).
    """
    if not isinstance(model, MobileLLMForCausalLM):
        raise TypeError(
            f"save_as_llama4_text takes a MobileLLMForCausalLM, not {type(model).__name__}; "
            "merge adapters first (PeftModel.merge_and_unload)"
        )
    config = model.config.to_llama4_text()
    with torch.device("meta"):
        twin = Llama4ForCausalLM(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.generation_config = model.generation_config
    twin.save_pretrained(folder, **save_kwargs)
