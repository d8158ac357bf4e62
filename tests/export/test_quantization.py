"""What quantization does to every layer, against its definition, and what it refuses."""

import pytest
import torch
from export_cases import eager_logits, random_tokens, tiny_config, tiny_model

from mobilellm_hf import MobileLLMConfig
from mobilellm_hf.export.quantization import Quantization, read_back


@pytest.mark.parametrize(("size", "group"), [("140M", 32), ("360M", 128), ("950M", 128)])
def test_group_sizes_are_the_papers(size, group):
    assert Quantization.for_config("8da4w", MobileLLMConfig.for_size(size)).group_size == group


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """By its definition: integer times the scale of its group."""
    values = weight.qdata.double().unflatten(1, (-1, weight.block_size[1]))
    return (values * weight.scale.double()[..., None]).flatten(1)


@pytest.mark.parametrize("linear", ["8da4w", "8da8w"])
def test_weights_are_within_half_a_step_of_what_they_were(linear):
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = Quantization.for_config(linear, model.config).apply(model)
    assert len(layers) == 2 * 7 + 2
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight
        assert read_back(weight) == layer
        bits = 4 if "4" in layer.scheme else 8
        assert -(2 ** (bits - 1)) <= weight.qdata.min().item() < weight.qdata.max().item() < 2 ** (bits - 1)
        error = (dequantized(weight) - before[f"{name}.weight"].double()).unflatten(1, (-1, layer.group_size))
        # The scale makes the squared error small: an outlier may be cut, so the bound is on the mean
        assert error.abs().mean() < 0.3 * weight.scale.abs().mean(), name


@pytest.mark.parametrize(
    ("linear", "options", "fields", "shared"),
    [
        ("8da4w", {}, {}, True),
        ("8da4w", {"group_size": 64, "fall_back": True}, {}, True),
        ("8da4w", {"embedding_group_size": 32}, {}, True),
        ("8da4w", {"embedding_group_size": 0}, {}, False),
        ("8da4w", {"embedding": "8w"}, {}, False),
        ("8da4w", {"group_size": 128, "fall_back": True}, {}, False),  # the head falls back to 8 bits
        ("8da4w", {}, {"tie_word_embeddings": False}, False),
        ("8da8w", {"embedding": "8w"}, {}, True),
        ("8da8w", {}, {}, False),
    ],
)
def test_a_tied_embedding_is_one_table_with_a_head_of_as_many_bits(linear, options, fields, shared):
    model = tiny_model(**fields)
    quantization = Quantization.for_config(linear, model.config, **options)
    layers = quantization.apply(model)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert quantization.one_table == shared == (embedding.qdata.data_ptr() == head.qdata.data_ptr())
    assert embedding.activation_quantization is None and head.activation_quantization is not None
    assert layers["model.embed_tokens"].scheme == quantization.embedding
    if shared:
        assert layers["model.embed_tokens"].group_size == layers["lm_head"].group_size
        assert torch.equal(dequantized(embedding), dequantized(head))


def test_a_model_that_only_says_that_it_is_tied_is_refused_before_anything_is_changed():
    model = tiny_model(tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="the weights of embedding and head differ: give embedding_group_size: 0"):
        Quantization.for_config("8da4w", model.config).apply(model)
    for linear, embedding in (("none", "none"), ("8da8w", "8w")):
        with pytest.raises(ValueError, match="differ: save the model with tie_word_embeddings: false"):
            Quantization.for_config(linear, model.config, embedding=embedding).apply(model)
    assert read_back(model.lm_head.weight).scheme == "float32"
    Quantization.for_config("8da4w", model.config, embedding_group_size=0).apply(model)
    assert not torch.equal(model.lm_head.weight.qdata, model.model.embed_tokens.weight.qdata)


def test_what_is_not_quantized_is_one_table_but_in_bf16():
    assert Quantization.for_config("none", tiny_config()).one_table
    assert not Quantization.for_config("bf16", tiny_config()).one_table


def test_scales_are_what_xnnpack_stores():
    model = tiny_model()
    Quantization.for_config("8da4w", model.config).apply(model)
    scale = model.lm_head.weight.scale
    assert torch.equal(scale, scale.bfloat16().float()) and scale.dtype == torch.float32


def test_more_bits_are_nearer_to_what_was():
    tokens = random_tokens(40)
    exact = eager_logits(tiny_model(), tokens)
    errors = []
    for linear, embedding in (("8da4w", "4w"), ("8da4w", "8w"), ("8da8w", "8w"), ("none", "none")):
        model = tiny_model()
        Quantization.for_config(linear, model.config, embedding=embedding).apply(model)
        errors.append((eager_logits(model, tokens) - exact).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[2] > 0 and errors[3] == 0


def test_bf16_is_of_everything():
    model = tiny_model()
    layers = Quantization.for_config("bf16", model.config).apply(model)
    assert {layer.scheme for layer in layers.values()} == {"bfloat16"}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_group_that_does_not_divide_is_refused_before_anything_is_changed():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"group_size=64 does not divide the 96 inputs of .*down_proj"):
        Quantization.for_config("8da4w", model.config, group_size=64).apply(model)
    assert read_back(model.lm_head.weight).scheme == "float32"


def test_or_falls_back_to_eight_bits_when_asked():
    model = tiny_model()
    layers = Quantization.for_config("8da4w", model.config, group_size=64, fall_back=True).apply(model)
    fallen = {name for name, layer in layers.items() if layer.scheme == "8da8w"}
    assert fallen == {f"model.layers.{n}.feed_forward.down_proj" for n in range(2)}
    assert {layers[name].group_size for name in fallen} == {96}
    assert layers["lm_head"].scheme == "8da4w" and layers["lm_head"].group_size == 64


def test_groups_of_the_embedding():
    model = tiny_model()
    layers = Quantization.for_config("8da4w", model.config, embedding="8w", embedding_group_size=32).apply(model)
    assert (layers["model.embed_tokens"].scheme, layers["model.embed_tokens"].group_size) == ("8w", 32)


@pytest.mark.parametrize(
    ("linear", "options", "message"),
    [
        ("int4", {}, "quantize='int4' must be one of none, bf16, 8da8w, 8da4w"),
        ("8da8w", {"group_size": 32}, "group_size=32 is of 8da4w"),
        ("8da4w", {"group_size": 48}, "group_size=48 must be a multiple of 32"),
        ("8da4w", {"group_size": -32}, "group_size=-32 must be a multiple of 32"),
        ("8da4w", {"embedding": "2w"}, "embedding='2w' must be one of none, 4w, 8w"),
        ("none", {"embedding_group_size": 32}, "the embedding is not quantized"),
        ("8da4w", {"embedding_group_size": 48}, "embedding_group_size=48 must be even and divide hidden_size=64"),
    ],
)
def test_what_does_not_fit_is_named(linear, options, message):
    with pytest.raises(ValueError, match=message):
        Quantization.for_config(linear, tiny_config(), **options)
