"""From and to llama4_text, the format of the published checkpoints."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Llama4ForCausalLM, Llama4TextConfig

from mobilellm_hf import (
    MobileLLMConfig,
    MobileLLMForCausalLM,
    MobileLLMForSequenceClassification,
    MobileLLMModel,
    save_as_llama4_text,
)


@torch.no_grad()
def assert_same_logits(model, reference, ids):
    torch.testing.assert_close(model.eval()(ids).logits, reference.eval()(ids).logits, rtol=0, atol=1e-5)


def assert_same_bytes(folder, other):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def rewrite_config(folder, drop=(), **fields):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))
    return path


@pytest.fixture
def published(make_llama4, tmp_path):
    """A folder like the published ones, and the reference that wrote it."""
    reference = make_llama4()
    reference.save_pretrained(tmp_path / "published")
    return tmp_path / "published", reference


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_a_published_folder_survives_the_way_there_and_back(make_llama4, tmp_path, tokens, tied, dtype):
    make_llama4(tie_word_embeddings=tied, eos_token_id=[2, 3]).to(dtype).save_pretrained(tmp_path / "published")
    model = MobileLLMForCausalLM.from_pretrained(tmp_path / "published")
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "native")
    again = MobileLLMForCausalLM.from_pretrained(tmp_path / "native")
    save_as_llama4_text(again, tmp_path / "back")
    for folder in ("native", "back"):
        assert_same_bytes(tmp_path / folder, tmp_path / "published")
    with torch.no_grad():
        reference, back = (
            Llama4ForCausalLM.from_pretrained(tmp_path / name)(tokens()).logits for name in ("published", "back")
        )
    assert torch.equal(back, reference)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "back"))
    inert = {"intermediate_size"}  # the width of the experts, of which there are none
    assert {key: value for key, value in before.items() if key not in inert} == {
        key: value for key, value in after.items() if key not in inert
    }
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "mobilellm"


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_a_published_folder_loads_without_a_warning(published, transformers_warnings, tokens, shards):
    folder, reference = published
    if shards:
        (folder / "model.safetensors").unlink()
        reference.save_pretrained(folder, max_shard_size=shards)
        assert len(list(folder.glob("*.safetensors"))) > 2
    model, info = MobileLLMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(model.config) is MobileLLMConfig and model.config.model_type == "mobilellm"
    assert_same_logits(model, reference, tokens())
    decoder = MobileLLMModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = reference.model(tokens()).last_hidden_state
        torch.testing.assert_close(decoder(tokens()).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert transformers_warnings == []


def test_a_classifier_starts_from_a_published_folder(published, transformers_warnings):
    folder, reference = published
    classifier = MobileLLMForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert classifier.score.weight.shape == (3, 64)
    for name, parameter in classifier.model.named_parameters():
        assert torch.equal(parameter, reference.model.get_parameter(name)), name
    assert all("model_type" not in message for message in transformers_warnings)


def test_generation_settings_come_along(published, tmp_path):
    folder, reference = published
    reference.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[2, 9])
    reference.save_pretrained(folder)
    model = MobileLLMForCausalLM.from_pretrained(folder)
    assert model.generation_config.to_diff_dict() == reference.generation_config.to_diff_dict()
    save_as_llama4_text(model, tmp_path / "back")
    back = Llama4ForCausalLM.from_pretrained(tmp_path / "back")
    assert back.generation_config.to_diff_dict() == reference.generation_config.to_diff_dict()


@pytest.mark.parametrize("layer_types", [None, ["chunked_attention"] * 4 + ["full_attention"]])
def test_a_360m_config_that_circulates_is_accepted(make_llama4, tmp_path, tokens, layer_types):
    """It lists 22 no_rope_layers, as for the 950M model, for its 15 layers; here three more than there are."""
    reference = make_llama4(num_hidden_layers=2)
    reference.save_pretrained(tmp_path)
    rewrite_config(tmp_path, no_rope_layers=[1, 1, 1, 1, 0], layer_types=layer_types)
    assert_same_logits(MobileLLMForCausalLM.from_pretrained(tmp_path), reference, tokens())


def test_the_width_is_intermediate_size_mlp(published):
    folder, _ = published
    rewrite_config(folder, intermediate_size=160)
    model = MobileLLMForCausalLM.from_pretrained(folder)
    assert model.config.intermediate_size == 96
    assert model.model.layers[0].feed_forward.up_proj.weight.shape == (96, 64)


@pytest.mark.parametrize(
    "fields, theta",
    [
        (dict(rope_theta=8e6, rope_scaling=None), 8e6),  # how transformers 4 wrote it
        (dict(rope_theta=20.0), 20.0),
        (dict(), 500_000.0),  # Llama 4's default, not MobileLLM's
    ],
    ids=["legacy", "legacy small", "absent"],
)
def test_legacy_rope_fields_are_read(published, tokens, fields, theta):
    folder, _ = published
    rewrite_config(folder, drop=["rope_parameters"], **fields)
    model = MobileLLMForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert_same_logits(model, Llama4ForCausalLM.from_pretrained(folder), tokens())


def test_legacy_rope_scaling_is_read(published, tokens):
    folder, _ = published
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    scaling["original_max_position_embeddings"] = 16
    rewrite_config(folder, drop=["rope_parameters"], rope_theta=1e4, rope_scaling=scaling)
    model = MobileLLMForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters == {**scaling, "rope_theta": 1e4}
    assert_same_logits(model, Llama4ForCausalLM.from_pretrained(folder), tokens())


REFUSED = {
    "one MoE layer": (dict(moe_layers=[1]), r"moe_layers=\[1\]"),
    "MoE by default": (dict(moe_layers=None), r"moe_layers=\[0, 1\]"),
    "NoPE layer": (dict(no_rope_layers=[1, 0]), r"no_rope_layers=\[1, 0\]"),
    "NoPE by default": (dict(no_rope_layers=None, no_rope_layer_interval=2), r"no_rope_layers=\[1, 0\]"),
    "temperature": (dict(attn_temperature_tuning=True), "attn_temperature_tuning=True"),
    "chunks": (dict(attention_chunk_size=255), "attention_chunk_size=255"),
    "bias": (dict(attention_bias=True), "attention_bias=True"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_another_network_is_refused_by_field_and_value(published, fields, message):
    folder, _ = published
    content = json.loads(rewrite_config(folder, drop=["layer_types"], **fields).read_text())
    for read in (
        lambda: MobileLLMForCausalLM.from_pretrained(folder),
        lambda: MobileLLMModel.from_pretrained(folder),
        lambda: MobileLLMConfig.from_pretrained(folder),
        lambda: MobileLLMConfig.from_dict(content),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_chunks_as_long_as_the_context_are_accepted(published, tokens):
    folder, reference = published
    rewrite_config(folder, attention_chunk_size=256)
    assert_same_logits(MobileLLMForCausalLM.from_pretrained(folder), reference, tokens(1, 200))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(rope_interleaved=False), "rope_interleaved=False"),
        (dict(layer_repeats=2), "layer_repeats=2"),
    ],
)
def test_what_llama4_text_cannot_express_is_not_written(make_model, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        save_as_llama4_text(make_model(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_plain_causal_lm_is_written(make_model, tmp_path):
    model = make_model()
    adapted = get_peft_model(make_model(), LoraConfig(target_modules="all-linear"))
    for wrong in (model.model, adapted):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            save_as_llama4_text(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_leaves_the_model_as_it_was(make_model, tmp_path, tokens):
    model = make_model()
    before = model(tokens()).logits
    save_as_llama4_text(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(model(tokens()).logits, before)
    assert model.config.model_type == "mobilellm"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_logits(model, Llama4ForCausalLM.from_pretrained(tmp_path), tokens())


LOAD_WITH_TRANSFORMERS_ALONE = """
import sys
sys.modules["mobilellm_hf"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert type(model).__name__ == "Llama4ForCausalLM", type(model)
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
"""


def test_plain_transformers_loads_what_was_saved(make_model, tmp_path, tokens, run_python):
    model = make_model()
    save_as_llama4_text(model, tmp_path / "folder")
    assert not list((tmp_path / "folder").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    torch.save(tokens(), tmp_path / "ids")
    run_python("-c", LOAD_WITH_TRANSFORMERS_ALONE, tmp_path / "folder", tmp_path / "ids", tmp_path / "logits")
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), model(tokens()).logits, rtol=0, atol=1e-5)


def test_the_config_alone_goes_both_ways(make_llama4):
    source = make_llama4(num_hidden_layers=3).config
    native = MobileLLMConfig.from_dict(source.to_dict())
    assert type(native) is MobileLLMConfig
    back = native.to_llama4_text()
    assert type(back) is Llama4TextConfig
    for field in "hidden_size head_dim moe_layers no_rope_layers rope_parameters attention_chunk_size".split():
        assert getattr(back, field) == getattr(source, field), field
    assert MobileLLMConfig.from_dict(back.to_dict()).to_dict() == native.to_dict()
    long = MobileLLMConfig.for_size("140M", max_position_embeddings=65536)
    assert long.to_llama4_text().attention_chunk_size >= 65536


@pytest.mark.parametrize("model_type", ["llama4_text", "llama"])
def test_packed_weights_of_another_format_are_refused(model_type):
    quantized = {"model_type": model_type, "quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(ValueError, match="quantization_config=.*bitsandbytes"):
        MobileLLMConfig.from_dict(quantized)
