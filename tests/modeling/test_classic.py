"""The classic MobileLLM family (halves-rotating RoPE, no QK norm, repeated layers) against LlamaForCausalLM."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM, MobileLLMModel, save_as_llama4_text


@torch.no_grad()
def assert_same_logits(model, reference, ids):
    torch.testing.assert_close(model.eval()(ids).logits, reference.eval()(ids).logits, rtol=0, atol=1e-5)


def write_published_style(folder, reference, **fields):
    """As facebook/MobileLLM-125M is: its own remote code's config, and no head when it is the embedding."""
    kept = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    content = {
        "model_type": "mobilellm",
        "architectures": ["MobileLLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
            "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
        },
        "share_embedding": True,
        "layer_sharing": False,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "mlp_bias": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "use_cache": True,
        **{name: getattr(reference.config, name) for name in kept},
        **fields,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    if content["share_embedding"]:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_classic(make_llama, **fields):
    return make_llama(rms_norm_eps=1e-5, tie_word_embeddings=True, **fields)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4)])
def test_a_llama_folder_gives_its_logits(make_llama, tmp_path, tokens, transformers_warnings, tied, heads):
    theta = {"rope_type": "default", "rope_theta": 3e4}
    reference = make_llama(
        hidden_size=heads[0] * 8,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        rope_parameters=theta,
        rms_norm_eps=1e-3,
    )
    reference.save_pretrained(tmp_path)
    model = MobileLLMForCausalLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.config.rope_interleaved and not model.config.use_qk_norm
    assert model.config.rope_parameters == theta
    assert_same_logits(model, reference, tokens())
    assert transformers_warnings == []
    decoder = MobileLLMModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = reference.model(tokens()).last_hidden_state
        torch.testing.assert_close(decoder(tokens()).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("load", [MobileLLMForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("tied", [True, False])
def test_a_published_classic_folder_gives_its_logits(make_llama, tmp_path, tokens, transformers_warnings, load, tied):
    reference = make_classic(make_llama) if tied else make_llama(rms_norm_eps=1e-5, tie_word_embeddings=False)
    write_published_style(tmp_path / "classic", reference, share_embedding=tied)
    model = load(tmp_path / "classic")
    assert type(model) is MobileLLMForCausalLM
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same_logits(model, reference, tokens())
    greedy = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12)
    assert model.generate(tokens(), **greedy).tolist() == reference.generate(tokens(), **greedy).tolist()
    assert type(AutoModel.from_pretrained(tmp_path / "classic")) is MobileLLMModel
    assert not any("model_type" in message or "MISSING" in message for message in transformers_warnings)


def test_a_pickled_classic_folder_loads(make_llama, tmp_path, tokens):
    reference = make_classic(make_llama)
    write_published_style(tmp_path / "classic", reference)
    torch.save(load_file(tmp_path / "classic" / "model.safetensors"), tmp_path / "classic" / "pytorch_model.bin")
    (tmp_path / "classic" / "model.safetensors").unlink()
    assert_same_logits(MobileLLMForCausalLM.from_pretrained(tmp_path / "classic"), reference, tokens())


# Layer sharing: every block runs twice in a row, as in a Llama of twice the depth with each block copied.


@pytest.fixture
def shared(make_llama, tmp_path):
    """A MobileLLM-LS model of 2 blocks, depth 4, and its unrolled Llama."""
    blocks = make_classic(make_llama, num_hidden_layers=2)
    write_published_style(tmp_path / "ls", blocks, layer_sharing=True)
    unrolled = make_classic(make_llama, num_hidden_layers=4)
    weights = blocks.state_dict()
    unrolled.load_state_dict(
        {
            name: weights[
                name.replace(f"layers.{int(name.split('.')[2])}.", f"layers.{int(name.split('.')[2]) // 2}.")
                if ".layers." in name
                else name
            ]
            for name in unrolled.state_dict()
        }
    )
    return MobileLLMForCausalLM.from_pretrained(tmp_path / "ls").eval(), unrolled


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_shared_layers_give_the_unrolled_logits(shared, tokens, attention):
    model, unrolled = shared
    assert (model.config.num_hidden_layers, model.config.layer_repeats, len(model.model.layers)) == (4, 2, 2)
    for half in shared:
        half.set_attn_implementation(attention)
    assert_same_logits(model, unrolled, tokens())
    with torch.no_grad():
        ours, theirs = (half(tokens(), output_hidden_states=True).hidden_states for half in shared)
    assert len(ours) == 5
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_shared_layers_generate_the_unrolled_tokens(shared, tokens, cache):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    greedy = dict(attention_mask=mask, do_sample=False, max_new_tokens=16, min_new_tokens=16, pad_token_id=0)
    ours, theirs = (half.generate(ids, cache_implementation=cache, **greedy) for half in shared)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_a_shared_block_gets_the_sum_of_its_copies_gradients(shared, tokens, checkpointing):
    model, unrolled = (half.train() for half in shared)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(dict(use_reentrant=checkpointing))
    losses = [half(tokens(), labels=tokens(), use_cache=False).loss for half in (model, unrolled)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            start, block, end = name.replace("feed_forward", "mlp").split(".", 3)[1:]
            block = int(block)
            copies = (unrolled.get_parameter(f"model.layers.{2 * block + copy}.{end}").grad for copy in (0, 1))
            expected = sum(copies)
        else:
            expected = unrolled.get_parameter(name).grad
        assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("layer_sharing", [True, False])
def test_it_is_saved_under_native_names(make_llama, tmp_path, tokens, layer_sharing):
    write_published_style(tmp_path / "classic", make_classic(make_llama), layer_sharing=layer_sharing)
    model = MobileLLMForCausalLM.from_pretrained(tmp_path / "classic").eval()
    model.save_pretrained(tmp_path / "native")
    names = load_file(tmp_path / "native" / "model.safetensors").keys()
    assert "model.layers.1.feed_forward.up_proj.weight" in names
    assert not any(".mlp." in name for name in names)
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["model_type"] == "mobilellm" and config["layer_repeats"] == 1 + layer_sharing
    assert not {"share_embedding", "layer_sharing", "pretraining_tp", "mlp_bias"} & config.keys()
    again = MobileLLMForCausalLM.from_pretrained(tmp_path / "native").eval()
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": again.config.name_or_path}
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    for source in ("classic", "native"):
        with pytest.raises(ValueError, match="rope_interleaved=False"):
            save_as_llama4_text(MobileLLMForCausalLM.from_pretrained(tmp_path / source), tmp_path / "llama4")


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("published", [True, False])
def test_biases_are_refused_by_name(make_llama, tmp_path, field, published):
    if published:
        write_published_style(tmp_path / "folder", make_classic(make_llama), **{field: True})
    else:
        make_llama(**{field: True}).save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=f"{field}=True"):
        MobileLLMForCausalLM.from_pretrained(tmp_path / "folder")


def test_the_writer_of_a_llama_folder_gets_it_back(make_llama, tmp_path):
    """transformers' own class must go on loading it: a conversion is one of ours only."""
    make_llama().save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    assert MobileLLMConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 10_000.0
