"""A decoder layer rearranged for XNNPACK: the same function, one delegate between two attentions instead of six.

- XNNPACK slices nothing whose length may vary. The halves of a rotated head are swapped by a product with a constant
  matrix, and no Linear is joined to another whose outputs go elsewhere: only query and key are one.
- Its rows are put in another order, never their values; each keeps its scales. The rows of a rotated pair are half a
  head apart, and the query heads stand with the key head that they share: the batch of `custom_sdpa` as they come.
- A mean of squares is a product with a constant vector: XNNPACK has no mean over the last dimension, and each norm
  would otherwise end a delegate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mobilellm_hf.export.quantization import with_fields
from mobilellm_hf.modeling import MobileLLMConfig
from mobilellm_hf.modeling.modeling_mobilellm import MobileLLMDecoderLayer


class KVCache(nn.Module):
    """Keys and values of one layer, each (kv heads, context, 1, head_dim), as buffers that the graph writes to."""

    def __init__(self, kv_heads: int, context: int, head_dim: int, dtype: torch.dtype):
        super().__init__()
        self.keys = nn.Buffer(torch.zeros(kv_heads, context, 1, head_dim, dtype=dtype), persistent=False)
        self.values = nn.Buffer(torch.zeros(kv_heads, context, 1, head_dim, dtype=dtype), persistent=False)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, scaling: float
    ) -> torch.Tensor:
        """Writes key and value (kv heads, tokens, 1, head_dim) from `start` on; causal attention to all up to there.

        query, and what comes out: (kv heads, tokens, heads of a kv head, head_dim).
        """
        torch.ops.llama.update_cache(key, self.keys, start)
        torch.ops.llama.update_cache(value, self.values, start)
        return torch.ops.llama.custom_sdpa(query, self.keys, self.values, start, None, 0.0, True, scaling)


class DeviceNorm(nn.Module):
    """RMS norm over the last dimension of width `size`; `weight` None: without one."""

    def __init__(self, size: int, eps: float, weight: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.size, self.eps, self.weight = size, eps, weight
        self.mean = nn.Buffer(torch.full((1, size), 1 / size, dtype=dtype), persistent=False)
        self.epsilon = nn.Buffer(torch.full((1,), eps, dtype=dtype), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float32:
            return F.rms_norm(hidden_states, (self.size,), self.weight, self.eps)  # which sums in fp32
        mean_of_squares = F.linear(hidden_states * hidden_states, self.mean)
        normed = hidden_states * torch.rsqrt(mean_of_squares + self.epsilon)
        return normed if self.weight is None else normed * self.weight


class DeviceLayer(nn.Module):
    """(hidden_states (1, tokens, width), cos and sin (1, tokens, 1, head_dim), start, cache) -> hidden_states."""

    def __init__(self, layer: MobileLLMDecoderLayer, config: MobileLLMConfig):
        super().__init__()
        attention = layer.self_attn
        self.head_dim, self.kv_heads = config.head_dim, config.num_key_value_heads
        self.groups, self.scaling = attention.num_key_value_groups, attention.scaling
        dtype, eps = layer.input_layernorm.weight.dtype, config.rms_norm_eps
        self.input_norm = DeviceNorm(config.hidden_size, eps, layer.input_layernorm.weight, dtype)
        self.post_attention_norm = DeviceNorm(config.hidden_size, eps, layer.post_attention_layernorm.weight, dtype)
        self.qk_norm = DeviceNorm(self.head_dim, eps, None, dtype) if config.use_qk_norm else nn.Identity()
        self.swap = nn.Buffer(torch.eye(self.head_dim, dtype=dtype).roll(self.head_dim // 2, 0), persistent=False)
        self.qk_proj = join((attention.q_proj, attention.k_proj), row_order(config))
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.feed_forward = layer.feed_forward

    def forward(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int, cache: KVCache
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attend(self.input_norm(hidden_states), cos, sin, start, cache)
        return hidden_states + self.feed_forward(self.post_attention_norm(hidden_states))

    def attend(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int, cache: KVCache
    ) -> torch.Tensor:
        # Here and below -1 stands for the tokens: XNNPACK reshapes to one length that is left open, not to a symbol.
        states = self.qk_proj(hidden_states).view(1, -1, self.kv_heads * (self.groups + 1), self.head_dim)
        states = self.qk_norm(states * cos + F.linear(states, self.swap) * sin)
        states, value = (
            part.view(-1, self.kv_heads, heads, self.head_dim).transpose(0, 1).to(cache.keys.dtype)
            for part, heads in ((states, self.groups + 1), (self.v_proj(hidden_states), 1))
        )  # (kv heads, tokens, queries and their key | 1, head_dim)
        query, key = states[:, :, : self.groups], states[:, :, self.groups :]
        output = cache.attend(query, key, value, start, self.scaling).transpose(0, 1)
        width = self.kv_heads * self.groups * self.head_dim
        return self.o_proj(output.to(hidden_states.dtype).reshape(1, -1, width))


def row_order(config: MobileLLMConfig) -> torch.Tensor:
    """Which row of the stacked query and key matrices stands where in the joined one.

    For each kv head its query heads and its key head; in a head the first members of all pairs, then the second ones.
    """
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = torch.arange((heads + kv_heads) * width).view(-1, width)
    query, key = rows.split((heads, kv_heads))
    rotated = torch.cat((query.view(kv_heads, -1, width), key.view(kv_heads, 1, width)), dim=1)
    if config.rope_interleaved:
        rotated = rotated.unflatten(-1, (-1, 2)).transpose(-1, -2)
    return rotated.flatten()


def swap_neighbours(values: torch.Tensor) -> torch.Tensor:
    """The last dimension's 0, 1, 2, 3, ... as 1, 0, 3, 2, ..."""
    return values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def for_swapped_inputs(linear: nn.Linear) -> nn.Linear:
    """The same function of inputs whose neighbours have changed places; quantized, in groups of an even size."""
    weight = linear.weight
    swapped = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    swapped.weight = nn.Parameter(with_fields(weight, qdata=swap_neighbours(weight.qdata)), requires_grad=False)
    return swapped


def shares_bytes(embedding: torch.Tensor, head: torch.Tensor) -> bool:
    """Whether two weights are the same 4-bit integers, two of which share a byte.

    ExecuTorch's embedding has the first of the two in the upper half of the byte, XNNPACK in the lower one.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    if not all(isinstance(weight, IntxUnpackedToInt8Tensor) for weight in (embedding, head)):
        return False
    return head.target_dtype == torch.int4 and embedding.qdata.data_ptr() == head.qdata.data_ptr()


def join(linears: tuple[nn.Linear, ...], order: torch.Tensor) -> nn.Linear:
    """One Linear whose outputs are those of all, quantized like them, its rows in another order."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tensors)[order]

    weights = [linear.weight for linear in linears]
    first = weights[0]
    if isinstance(first, IntxUnpackedToInt8Tensor):
        parts = [stack([getattr(weight, name) for weight in weights]) for name in first.tensor_data_names]
        kept = [getattr(first, name) for name in first.tensor_attribute_names]
        weight = IntxUnpackedToInt8Tensor(*parts, *kept)
    else:
        weight = stack([weight.data for weight in weights])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    return joined
