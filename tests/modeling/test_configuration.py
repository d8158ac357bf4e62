"""The config: published sizes, round trips, refusals."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.modeling import MODEL_SIZES

# Counted from the published checkpoints.
PARAMETERS = {"140M": 140_248_512, "360M": 359_431_168, "950M": 949_685_760}


@pytest.mark.parametrize("size", PARAMETERS)
def test_a_published_size_has_exactly_its_parameters(size):
    with torch.device("meta"):
        model = MobileLLMForCausalLM(MobileLLMConfig.for_size(size))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.head_dim == 64


def test_the_default_is_the_smallest_size():
    assert MobileLLMConfig().to_dict() == MobileLLMConfig.for_size("140M").to_dict()
    assert set(MODEL_SIZES) == set(PARAMETERS)


def test_for_size_takes_any_other_field():
    theta = {"rope_type": "default", "rope_theta": 8e6}
    fields = dict(max_position_embeddings=32768, rope_parameters=theta, num_hidden_layers=3)
    config = MobileLLMConfig.for_size("360M", **fields)
    assert (config.hidden_size, config.num_hidden_layers) == (1024, 3)
    assert config.max_position_embeddings == 32768
    assert config.rope_parameters["rope_theta"] == 8e6
    assert MobileLLMConfig.for_size("360M").rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_an_unknown_size_is_refused_by_naming_the_sizes():
    with pytest.raises(ValueError, match="'125M'.*140M, 360M, 950M"):
        MobileLLMConfig.for_size("125M")


FIELDS = dict(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-4,
    eos_token_id=[2, 3],
    pad_token_id=0,
    tie_word_embeddings=False,
    attention_dropout=0.1,
    rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
    rope_interleaved=False,
    use_qk_norm=False,
    layer_repeats=2,
    id2label={0: "no", 1: "yes", 2: "perhaps"},
)


@pytest.mark.parametrize("load", [MobileLLMConfig.from_pretrained, AutoConfig.from_pretrained])
def test_every_field_survives_saving_and_loading(tmp_path, load):
    config = MobileLLMConfig(**FIELDS, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is MobileLLMConfig
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": loaded.name_or_path}
    for field, value in FIELDS.items():
        assert getattr(loaded, field) == value, field
    assert loaded.dtype == torch.bfloat16


def test_loading_takes_overrides(tmp_path):
    MobileLLMConfig(**FIELDS).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, rms_norm_eps=1e-3).rms_norm_eps == 1e-3


def test_config_json_says_what_it_is(tmp_path):
    MobileLLMConfig(**FIELDS).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "mobilellm"
    assert set(written["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    }


def test_auto_classes_build_the_model(tiny_config):
    model = AutoModelForCausalLM.from_config(tiny_config())
    assert type(model) is MobileLLMForCausalLM


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_attention_heads=4, num_key_value_heads=3), "num_attention_heads=4.*num_key_value_heads=3"),
        (dict(head_dim=15), "head_dim=15"),
        (dict(hidden_size=60, num_attention_heads=4), "head_dim=15"),
        (dict(num_hidden_layers=3, layer_repeats=2), "num_hidden_layers=3.*layer_repeats=2"),
        (dict(layer_repeats=0), "layer_repeats=0"),
        (dict(hidden_size="wide"), "hidden_size"),
    ],
)
def test_an_impossible_shape_is_refused(tiny_config, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize("model_type", ["qwen3", "llama4", "gpt2"])
@pytest.mark.parametrize("read", ["from_dict", "from_pretrained"])
def test_another_architecture_is_refused(tmp_path, model_type, read):
    content = {"model_type": model_type, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"model_type='{model_type}'"):
        getattr(MobileLLMConfig, read)(content if read == "from_dict" else tmp_path)
