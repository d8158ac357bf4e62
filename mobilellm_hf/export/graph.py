"""The model as ExecuTorch runs it: a KV cache inside the graph, logits of the last token, prompts in bounded pieces.

    module = OnDeviceGraph(model, context=32_768, prefill=512)
    logits = module(input_ids, cache_position)              # eager, with the operators of the device
    exported = module.export()["model"]

The cache holds [kv heads, context, 1, head_dim]: the kv heads are the batch of `custom_sdpa`, so that its matrix
product for one kv head takes all query heads that share it at once and walks through consecutive memory. In bfloat16
that halves what decoding reads at length; sums are taken in fp32 all the same. A prompt longer than `prefill` is fed
in pieces: the memory that is planned for activations grows with the longest piece, not with the context.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from mobilellm_hf.export.requirements import need_executorch
from mobilellm_hf.modeling import MobileLLMForCausalLM

ATTENTION = "executorch_kv_cache"
# Any length between 1 and the bound traces the same graph; 1 itself would be taken for a constant.
EXAMPLE_TOKENS = 3


class KVCache(nn.Module):
    """Keys and values of one layer, each (kv heads, context, 1, head_dim), as buffers that the graph writes to."""

    def __init__(self, kv_heads: int, context: int, head_dim: int, dtype: torch.dtype):
        super().__init__()
        self.keys = nn.Buffer(torch.zeros(kv_heads, context, 1, head_dim, dtype=dtype), persistent=False)
        self.values = nn.Buffer(torch.zeros(kv_heads, context, 1, head_dim, dtype=dtype), persistent=False)

    def update(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        """key, value: (1, kv heads, tokens, head_dim), written from position `start` on."""
        for new, cache in ((key, self.keys), (value, self.values)):
            torch.ops.llama.update_cache(new.squeeze(0).unsqueeze(2).to(cache.dtype), cache, start)


def cached_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    kv_cache: KVCache,
    start: int,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention of `tokens` queries to all positions up to their own; query: (1, heads, tokens, head_dim)."""
    kv_cache.update(key, value, start)
    heads, tokens, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    grouped = query.to(kv_cache.keys.dtype).view(kv_heads, heads // kv_heads, tokens, head_dim).transpose(1, 2)
    output = torch.ops.llama.custom_sdpa(
        grouped, kv_cache.keys, kv_cache.values, start, None, 0.0, True, scaling
    )  # (kv heads, tokens, heads of a kv head, head_dim)
    return output.permute(1, 0, 2, 3).reshape(1, tokens, heads, head_dim).to(query.dtype), None


AttentionInterface.register(ATTENTION, cached_attention)


class OnDeviceGraph(nn.Module):
    """(input_ids (1, tokens), cache_position (tokens,)) -> logits (1, 1, vocabulary) of the last token, fp32.

    It takes the model over: its attention is exchanged.

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

        config = model.config
        config._attn_implementation = ATTENTION
        # An embedding row that no gradient reaches is of no use here, and the quantized operator does not know it.
        model.model.embed_tokens.padding_idx = None
        self.model, self.config, self.prefill = model.eval(), config, min(prefill, context)
        self.caches = nn.ModuleList(
            KVCache(config.num_key_value_heads, context, config.head_dim, cache_dtype)
            for _ in range(config.num_hidden_layers)
        )

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        decoder = self.model.model
        start = cache_position[0].item()
        hidden_states = decoder.embed_tokens(input_ids)
        position_embeddings = decoder.rotary_emb(hidden_states, cache_position.unsqueeze(0))
        for depth, cache in enumerate(self.caches):
            hidden_states = decoder.layers[depth // self.config.layer_repeats](
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=None,
                kv_cache=cache,
                start=start,
            )
        return self.model.lm_head(decoder.norm(hidden_states[:, -1:])).float()

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
