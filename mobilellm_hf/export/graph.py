"""The model as ExecuTorch runs it: a KV cache inside the graph, logits of the last token, prompts in bounded pieces.

    module = OnDeviceGraph(model, context=32_768, prefill=512)
    logits = module(input_ids, cache_position)              # eager, with the operators of the device
    exported = module.export()["model"]

The cache holds (kv heads, context, 1, head_dim): the kv heads are the batch of `custom_sdpa`, so that its matrix
product for one kv head takes all query heads that share it at once and walks through consecutive memory. In bfloat16
that halves what decoding reads at length; sums are taken in fp32 all the same. A prompt longer than `prefill` is fed
in pieces: the memory that is planned for activations grows with the longest piece, not with the context.
"""

from __future__ import annotations

import torch
from torch import nn

from mobilellm_hf.export.layers import (
    DeviceLayer,
    DeviceNorm,
    KVCache,
    for_swapped_inputs,
    shares_bytes,
    swap_neighbours,
)
from mobilellm_hf.export.requirements import need_executorch
from mobilellm_hf.modeling import MobileLLMForCausalLM

# Any length between 1 and the bound traces the same graph; 1 itself would be taken for a constant.
EXAMPLE_TOKENS = 3


class OnDeviceGraph(nn.Module):
    """(input_ids (1, tokens), cache_position (tokens,)) -> logits (1, 1, vocabulary) of the last token, fp32.

    It takes the model's weights over; the model itself is of no further use.

    Args:
        context: positions of the KV cache.
        prefill: tokens of one call at most; no more than `context`.
        cache_dtype: of keys and values.
    """

    def __init__(
        self,
        model: MobileLLMForCausalLM,
        context: int,
        prefill: int,
        cache_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        need_executorch()
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers torch.ops.llama

        self.config = config = model.config
        decoder = model.eval().model
        # An embedding row that no gradient reaches is of no use here, and the quantized operator does not know it.
        decoder.embed_tokens.padding_idx = None
        self.prefill = min(prefill, context)
        self.embed_tokens, self.rotary_emb, self.lm_head = decoder.embed_tokens, decoder.rotary_emb, model.lm_head
        self.layers = nn.ModuleList(DeviceLayer(layer, config) for layer in decoder.layers)
        weight = decoder.norm.weight
        # The bytes that the embedding reads rightly, the head reads in another order.
        self.head_swaps = shares_bytes(self.embed_tokens.weight, self.lm_head.weight)
        if self.head_swaps:
            self.lm_head, weight = for_swapped_inputs(self.lm_head), swap_neighbours(weight)
        self.norm = DeviceNorm(config.hidden_size, config.rms_norm_eps, weight, weight.dtype)
        self.caches = nn.ModuleList(
            KVCache(config.num_key_value_heads, context, config.head_dim, cache_dtype)
            for _ in range(config.num_hidden_layers)
        )

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        start = cache_position[0].item()
        hidden_states = self.embed_tokens(input_ids)
        angles = self.rotary_emb(hidden_states, cache_position.unsqueeze(0))
        cos, sin = (part.to(hidden_states.dtype) for part in angles)  # of every pair: (1, tokens, 1, head_dim / 2)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        for depth, cache in enumerate(self.caches):
            layer = self.layers[depth // self.config.layer_repeats]
            hidden_states = layer(hidden_states, cos, sin, start, cache)
        last = hidden_states[:, -1:]
        return self.lm_head(self.norm(swap_neighbours(last) if self.head_swaps else last)).float()

    @torch.no_grad()
    def export(self) -> dict[str, torch.export.ExportedProgram]:
        """The graph for 1 to `prefill` tokens, under the name that Optimum's recipes expect."""
        tokens = min(EXAMPLE_TOKENS, self.prefill)
        example = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.long),
            "cache_position": torch.arange(tokens),
        }
        length = torch.export.Dim("tokens", max=self.prefill)
        shapes = {"input_ids": {1: length}, "cache_position": {0: length}}
        return {"model": torch.export.export(self, (), example, dynamic_shapes=shapes, strict=False)}
