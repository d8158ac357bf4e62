"""MobileLLM: the dense, thin-and-deep decoder of MobileLLM-R1 (arXiv 2509.24945) and of its classic family.

Tensor names and layout are those of the published `llama4_text` checkpoints, so a checkpoint changes format by its
config.json alone. What this class does otherwise than transformers' `Llama4ForCausalLM`, with equal results:

- RoPE in real arithmetic (complex numbers do not export to phones). The rotated pairs come out as two halves: queries
  and keys share that order, and neither their inner products nor the QK norm can tell.
- The training loss is taken from the hidden states, in chunks of tokens, and full logits are never built: with a
  vocabulary of 128,256 they would be larger than the model. See `MobileLLMForCausalLM.forward`.
- One block can be applied several times in a row (`layer_repeats`), each application with a KV cache of its own.

This file is copied into every saved folder: it imports transformers and its siblings, nothing else of this package.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mobilellm import MobileLLMConfig
from .loss_mobilellm import linear_causal_lm_loss


@use_kernel_forward_from_hub("RMSNorm")
class MobileLLMRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MobileLLMRotaryEmbedding(nn.Module):
    """cos and sin of the rotation angles, fp32, one angle per pair: (batch or 1, tokens, 1, head_dim / 2)."""

    def __init__(self, config: MobileLLMConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        init_functions = {"default": self.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
        inv_freq, self.attention_scaling = init_functions[self.rope_type](config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MobileLLMConfig, **kwargs) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None, None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE in at least fp32. states: (batch, tokens, heads, head_dim); the rotated pairs come out as two halves."""
    precise = states.to(torch.promote_types(states.dtype, torch.float))
    pairs = precise.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    return torch.cat(
        (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1
    )


class MobileLLMAttention(nn.Module):
    def __init__(self, config: MobileLLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_width, kv_width = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        cache_layer: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # Queries and keys side by side: both are rotated and normed alike, and decoding counts operations, not bytes.
        states = torch.cat((self.q_proj(hidden_states), self.k_proj(hidden_states)), dim=-1).view(heads_shape)
        rotated = rotate(states, *position_embeddings, self.config.rope_interleaved)
        if self.config.use_qk_norm:
            rotated = F.rms_norm(rotated, (self.head_dim,), eps=self.config.rms_norm_eps)
        rotated = rotated.type_as(states).transpose(1, 2)
        key_heads = rotated.shape[1] // (self.num_key_value_groups + 1)
        query, key = rotated[:, :-key_heads], rotated[:, -key_heads:]
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx if cache_layer is None else cache_layer)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class MobileLLMMLP(nn.Module):
    def __init__(self, config: MobileLLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MobileLLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MobileLLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MobileLLMAttention(config, layer_idx)
        self.feed_forward = MobileLLMMLP(config)
        self.input_layernorm = MobileLLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MobileLLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.feed_forward(self.post_attention_layernorm(hidden_states))


class MobileLLMPreTrainedModel(PreTrainedModel):
    config: MobileLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MobileLLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MobileLLMDecoderLayer, "attentions": MobileLLMAttention}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # FSDP2 derives a class in torch's name, and transformers saves the code of the module that a class names.
        if cls.__module__.startswith("torch."):
            cls.__module__ = cls.__mro__[2].__module__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads `mobilellm`, `llama4_text`, `llama` and classic MobileLLM checkpoints; the config translates itself.

        Raises:
            ValueError: the checkpoint is not a dense MobileLLM network; the message names the field and its value.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and config.model_type != "mobilellm":
            kwargs["config"] = MobileLLMConfig.from_dict(config.to_dict())
        # Classic checkpoints name the feed-forward network `mlp`; no other name has that part.
        kwargs["key_mapping"] = {r"\.mlp\.": ".feed_forward.", **(kwargs.get("key_mapping") or {})}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        # Forget the renaming, or `save_pretrained` would undo it and write classic names under a mobilellm config.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        kept = [rule for rule in model._weight_conversions or () if rule.target_patterns != [".feed_forward."]]
        model._weight_conversions = kept or None
        return loaded


class _CacheNow:
    """A cache that the mask reads at its present length.

    flex_attention evaluates its mask inside the layers, and a StaticCache's length is a tensor that the first of them
    moves on: the mask of transformers 5.23 would be a step ahead.
    """

    def __init__(self, cache: Cache):
        self._cache = cache

    def __getattr__(self, name: str):
        return getattr(self._cache, name)

    def get_query_offset(self, *args):
        offset = self._cache.get_query_offset(*args)
        return offset.clone() if torch.is_tensor(offset) else offset


class MobileLLMModel(MobileLLMPreTrainedModel):
    """The decoder without a head. Returns the last hidden states (batch, tokens, hidden_size) after the final norm."""

    def __init__(self, config: MobileLLMConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            MobileLLMDecoderLayer(config, first) for first in range(0, config.num_hidden_layers, config.layer_repeats)
        )
        self.norm = MobileLLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MobileLLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # Not in a training step: nobody reads that cache, and with one the mask would not tell packed documents apart.
        if use_cache and past_key_values is None and not (self.training and torch.is_grad_enabled()):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        flex = self.config._attn_implementation == "flex_attention" and past_key_values is not None
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=_CacheNow(past_key_values) if flex else past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for depth in range(self.config.num_hidden_layers):
            hidden_states = self.layers[depth // self.config.layer_repeats](
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                cache_layer=depth,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def _select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last so many positions (0: all), these positions of every row, or (two dimensions) of each row its own."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


def _is_fsdp_group(head: nn.Module) -> bool:
    """Whether FSDP2 shards this Linear as a group of its own, as accelerate's plugin does: it derives a class then."""
    return type(head).__bases__[-1] is nn.Linear and hasattr(head, "unshard")


class MobileLLMForCausalLM(MobileLLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MobileLLMConfig):
        super().__init__(config)
        self.model = MobileLLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def loss_needs_logits(self) -> bool:
        """Whether the loss must see logits: another `loss_function` was set, or the head's matrix is not to be had.

        It is not when the head is quantized or has adapters, when it is sharded (a DTensor under tensor parallelism),
        and when accelerate brings weight and input together only as the head is called (`_hf_hook`: offloading).
        """
        head = self.lm_head
        gathered = _is_fsdp_group(head) and (self.tp_size or 1) == 1
        plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hasattr(head, "_hf_hook")
        # Hooks on the head want to be called, and ZeRO-3 leaves an empty weight until it is.
        plain = plain and not head._forward_hooks and not head._forward_pre_hooks
        plain = plain and head.weight.shape == (head.out_features, head.in_features)
        return hasattr(self, "_loss_function") or not (plain or gathered)

    def fused_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        head = self.lm_head
        if not _is_fsdp_group(head):
            return linear_causal_lm_loss(hidden_states, head.weight, labels, **kwargs)
        # The weight is whole only while the head is called, so the loss is computed in the place of its forward.
        head.forward = lambda hidden_states: linear_causal_lm_loss(hidden_states, head.weight, labels, **kwargs)
        try:
            return head(hidden_states)
        finally:
            del head.forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""Logits (batch, tokens, vocabulary), and with `labels` the mean NLL of the next tokens.

        Args:
            labels: (batch, tokens), -100 where nothing is predicted; shifted here, as everywhere in transformers.
            logits_to_keep: Compute logits for the last so many positions only (0: all), or for these positions.
            return_logits: `False` leaves `logits` None and takes the loss from the hidden states, in chunks. By
                default that happens in training mode with `labels`; in evaluation mode logits are returned. Second
                derivatives need `True`, and so does `torch.compile` with rows of many lengths: it compiles the
                chunks anew for each.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if return_logits is False and labels is None:
            raise ValueError("return_logits=False without labels leaves nothing to return; call `model.model` instead")
        if return_logits is None:
            return_logits = labels is None or not self.training
        logits = loss = None
        if return_logits or self.loss_needs_logits():
            logits = self.lm_head(_select_positions(outputs.last_hidden_state, logits_to_keep))
        if labels is not None and logits is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif labels is not None:
            loss = self.fused_loss(outputs.last_hidden_state, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MobileLLMForSequenceClassification(GenericForSequenceClassification, MobileLLMPreTrainedModel):
    """A linear `score` on the last token that is not padding (`config.pad_token_id`): `num_labels` logits a text."""

    def __init__(self, config: MobileLLMConfig):
        # The generic head's own __init__ builds the decoder through AutoModel, which in remote code would ask for
        # trust_remote_code a second time.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = MobileLLMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = [
    "MobileLLMForCausalLM",
    "MobileLLMForSequenceClassification",
    "MobileLLMModel",
    "MobileLLMPreTrainedModel",
]
