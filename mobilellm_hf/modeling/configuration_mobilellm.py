"""MobileLLM configuration: one config for MobileLLM-R1 and for the classic MobileLLM family.

The fields are a dense subset of `llama4_text`, the format of the published MobileLLM-R1 checkpoints. Three switches
describe what the family varies: `rope_interleaved`, `use_qk_norm` and `layer_repeats`. A config.json of another
format that describes the same network (`llama4_text`, `llama`, the classic `mobilellm`) is translated on reading; one
that describes a different network is refused by the name and value of the field that makes it so.

This file and its siblings named `*_mobilellm.py` are copied into every saved folder, so that it loads with
`trust_remote_code=True` where this package is not installed: they import transformers and each other, nothing else.
"""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Llama4TextConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# Table 3 of MobileLLM-R1 (arXiv 2509.24945). The exact parameter counts are 140,248,512, 359,431,168 and 949,685,760.
MODEL_SIZES = {
    "140M": dict(
        num_hidden_layers=15, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=2048
    ),
    "360M": dict(
        num_hidden_layers=15, num_attention_heads=16, num_key_value_heads=4, hidden_size=1024, intermediate_size=4096
    ),
    "950M": dict(
        num_hidden_layers=22, num_attention_heads=24, num_key_value_heads=6, hidden_size=1536, intermediate_size=6144
    ),
}

# What the three formats name alike and mean alike.
_SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id "
    "bos_token_id eos_token_id attention_dropout rope_parameters"
).split()

_AUTO_MAP = {
    "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
    "AutoModel": "modeling_mobilellm.MobileLLMModel",
    "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mobilellm.MobileLLMForSequenceClassification",
}


@strict
class MobileLLMConfig(PreTrainedConfig):
    r"""Configuration of a MobileLLM model. The defaults are MobileLLM-R1-140M-base; see also `for_size`.

    Args:
        vocab_size: Rows of the embedding; 128,256 is the Llama 3 tokenizer's.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU feed-forward network (`intermediate_size_mlp` in `llama4_text`).
        num_hidden_layers: Depth: how many blocks a token passes through, a repeated block counted every time.
        num_attention_heads, num_key_value_heads: Grouped-query attention; the former is a multiple of the latter.
        head_dim: Width of one attention head. `None` means `hidden_size // num_attention_heads`.
        max_position_embeddings: Context length in tokens.
        rope_parameters: RoPE type and theta. Base models use theta 1e6 at 4k tokens, post-trained ones 8e6 at 32k.
        rope_interleaved: RoPE rotates adjacent pairs (MobileLLM-R1, Llama 4) or the two halves (MobileLLM, Llama).
        use_qk_norm: Weightless RMS norm of every query and key head after RoPE.
        layer_repeats: Each block's weights are applied this many times in a row (2 in MobileLLM-LS).
        tie_word_embeddings: The head is the embedding's matrix, as in all published models.
    """

    model_type = "mobilellm"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 1_000_000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128256
    hidden_size: int = 576
    intermediate_size: int = 2048
    num_hidden_layers: int = 15
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 128000
    # <|end_of_text|>, <|eom_id|>, <|eot_id|>
    eos_token_id: int | list[int] | None = field(default_factory=lambda: [128001, 128008, 128009])
    tie_word_embeddings: bool = True
    attention_dropout: float | int = 0.0
    rope_parameters: RopeParameters | dict | None = None
    rope_interleaved: bool = True
    use_qk_norm: bool = True
    layer_repeats: int = 1

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        # All entries at once: saving a causal LM would otherwise record its own class only, and vLLM's Transformers
        # backend asks for AutoModel.
        self.auto_map = dict(_AUTO_MAP)

    def validate_architecture(self):
        """Checked by `@strict` at construction and by `validate()`."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs")
        if self.layer_repeats < 1 or self.num_hidden_layers % self.layer_repeats:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} is not a multiple of layer_repeats={self.layer_repeats}"
            )

    @classmethod
    def for_size(cls, size: str, **overrides: Any) -> "MobileLLMConfig":
        """The shape of a published MobileLLM-R1 size (Table 3): "140M", "360M" or "950M".

        `overrides` are any other fields, for example `max_position_embeddings=32768`.

        Raises:
            ValueError: `size` is not one of the published sizes.
        """
        if size not in MODEL_SIZES:
            raise ValueError(
                f"unknown MobileLLM-R1 size {size!r}: choose one of {', '.join(MODEL_SIZES)}, "
                "or give MobileLLMConfig the widths themselves"
            )
        return cls(**{**MODEL_SIZES[size], **overrides})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _to_mobilellm(config_dict, str(pretrained_model_name_or_path)), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "MobileLLMConfig":
        return super().from_dict(_to_mobilellm(config_dict, "config"), **kwargs)

    def to_llama4_text(self) -> Llama4TextConfig:
        """The same network as a `llama4_text` config, the format of the published checkpoints.

        Raises:
            ValueError: llama4_text cannot express the network (halves-rotating RoPE, repeated layers).
        """
        for name, needed in (("rope_interleaved", True), ("layer_repeats", 1)):
            if getattr(self, name) != needed:
                raise ValueError(f"llama4_text cannot express {name}={getattr(self, name)!r}, only {needed!r}")
        return Llama4TextConfig(
            **{name: getattr(self, name) for name in _SHARED_FIELDS},
            intermediate_size=self.intermediate_size,
            intermediate_size_mlp=self.intermediate_size,
            use_qk_norm=self.use_qk_norm,
            tie_word_embeddings=self.tie_word_embeddings,
            moe_layers=[],
            no_rope_layers=[1] * self.num_hidden_layers,  # 1 means: use RoPE
            attn_temperature_tuning=False,
            # Equal to causal attention up to this length; 32768 is what the published configs say.
            attention_chunk_size=max(32768, self.max_position_embeddings),
            dtype=self.dtype,
        )


def _to_mobilellm(config_dict: dict[str, Any], origin: str) -> dict[str, Any]:
    """Translates a foreign config dict that describes a MobileLLM network; returns a native one unchanged."""
    model_type = config_dict.get("model_type")
    if model_type != "mobilellm" and config_dict.get("quantization_config"):
        _refuse(origin, "quantization_config", config_dict["quantization_config"], "its weights are packed")
    if model_type == "llama4_text":
        return _from_llama4_text(config_dict, origin)
    is_classic = model_type == "mobilellm" and not {"share_embedding", "layer_sharing"}.isdisjoint(config_dict)
    if model_type == "llama" or is_classic:
        return _from_classic(config_dict, origin)
    if model_type not in (None, "mobilellm"):
        raise ValueError(
            f"{origin}: model_type={model_type!r} is not a MobileLLM network (known: mobilellm, llama4_text, llama)"
        )
    return config_dict


def _refuse(origin: str, field: str, value: Any, why: str) -> None:
    raise ValueError(f"{origin}: {field}={value!r} is not a dense MobileLLM network: {why}")


def _from_llama4_text(config_dict: dict[str, Any], origin: str) -> dict[str, Any]:
    depth = config_dict.get("num_hidden_layers", Llama4TextConfig.num_hidden_layers)
    # A circulating 360M config has 22 entries for its 15 layers, which Llama4TextConfig refuses.
    by_layer = {name: config_dict[name][:depth] for name in ("no_rope_layers", "layer_types") if config_dict.get(name)}
    source = Llama4TextConfig(**{**config_dict, **by_layer})
    if source.moe_layers:
        _refuse(origin, "moe_layers", source.moe_layers, "these layers are mixtures of experts")
    if not all(source.no_rope_layers):
        _refuse(origin, "no_rope_layers", source.no_rope_layers, "0 marks a layer without RoPE")
    if source.attn_temperature_tuning:
        _refuse(origin, "attn_temperature_tuning", True, "queries would be rescaled by position")
    if source.attention_bias:
        _refuse(origin, "attention_bias", True, "its projections have no bias")
    chunk, context = source.attention_chunk_size, source.max_position_embeddings
    if "chunked_attention" in source.layer_types and chunk is not None and chunk < context:
        _refuse(origin, "attention_chunk_size", chunk, f"it cuts attention within the context of {context} tokens")
    return _native(source, intermediate_size=source.intermediate_size_mlp, use_qk_norm=source.use_qk_norm)


def _from_classic(config_dict: dict[str, Any], origin: str) -> dict[str, Any]:
    """Classic MobileLLM: `llama`, or the published `mobilellm` remote code (`share_embedding`, `layer_sharing`)."""
    config_dict = dict(config_dict)
    tied = bool(config_dict.pop("share_embedding", False)) or config_dict.get("tie_word_embeddings", False)
    repeats = 2 if config_dict.pop("layer_sharing", False) else 1
    source = LlamaConfig(**{**config_dict, "tie_word_embeddings": tied})
    for name in ("attention_bias", "mlp_bias"):
        if getattr(source, name):
            _refuse(origin, name, True, "its projections have no bias")
    return _native(
        source,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers * repeats,
        layer_repeats=repeats,
        rope_interleaved=False,
        use_qk_norm=False,
    )


def _native(source: PreTrainedConfig, **fields: Any) -> dict[str, Any]:
    common = {name: getattr(source, name) for name in _SHARED_FIELDS}
    labels = {name: getattr(source, name) for name in ("id2label", "label2id", "problem_type")}
    tied = dict(tie_word_embeddings=source.tie_word_embeddings, dtype=source.dtype)
    return {"model_type": "mobilellm", **common, **labels, **tied, **fields}


__all__ = ["MODEL_SIZES", "MobileLLMConfig"]
