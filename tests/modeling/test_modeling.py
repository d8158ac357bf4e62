"""The forward pass against transformers' Llama4ForCausalLM with the same weights."""

import pytest
import torch
from transformers import DynamicCache, Llama4ForCausalLM, StaticCache

from mobilellm_hf import MobileLLMForCausalLM, MobileLLMModel, save_as_llama4_text

# name: config fields. The head ratios are those of 140M (9/3) and 360M, 950M (4), then none, one and wide heads.
NETWORKS = {
    "9/3": dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3),
    "8/2": dict(num_attention_heads=8, num_key_value_heads=2),
    "4/4": dict(num_attention_heads=4, num_key_value_heads=4),
    "4/1": dict(num_attention_heads=4, num_key_value_heads=1),
    "wide heads": dict(head_dim=32),
    "untied": dict(tie_word_embeddings=False),
    "no QK norm": dict(use_qk_norm=False),
    "large eps": dict(rms_norm_eps=1e-1),
    "linear": dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "dynamic": dict(
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "yarn": dict(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        use_qk_norm=False,  # the norm would hide yarn's attention scaling
    ),
    "llama3": dict(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
}
ATTENTION = ["eager", "sdpa", "flex_attention"]


@pytest.fixture(autouse=True)
def flex_uncompiled():
    """flex_attention as it is: compiling it takes a CPU half a minute a shape, and no backward exists there."""
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def assert_same_logits(model, reference, *inputs, where=None, **named):
    ours, theirs = model(*inputs, **named).logits, reference(*inputs, **named).logits
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    assert theirs.abs().max() > 1  # or the tolerance would mean nothing
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_logits_equal_the_reference(make_pair, tokens, network, attention):
    model, reference = make_pair(attention, **network)
    assert model.config._attn_implementation == reference.config._attn_implementation == attention
    assert_same_logits(model, reference, tokens())
    positions = torch.tensor([[5, 9, 10, 40, 41, 100], [0, 1, 2, 3, 4, 5]])
    assert_same_logits(model, reference, tokens(2, 6), position_ids=positions)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_published_format_folder_gives_its_logits(make_llama4, tokens, tmp_path, network):
    fields = dict(network)
    if "hidden_size" in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    reference = make_llama4(**fields)
    reference.save_pretrained(tmp_path)
    model = MobileLLMForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(model, reference, tokens())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make_pair, tokens, attention, side):
    model, reference = make_pair(attention, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, padding in enumerate((0, 3, 11)):
        part = slice(0, padding) if side == "left" else slice(20 - padding, 20)
        ids[row, part], mask[row, part] = model.config.pad_token_id, 0
    assert_same_logits(model, reference, ids, attention_mask=mask, where=mask.bool())
    # and each row alone, without padding, says the same
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            kept = mask[row].bool()
            alone = reference(ids[row : row + 1, kept]).logits[0]
            torch.testing.assert_close(padded[row, kept], alone, rtol=0, atol=1e-5)


def new_cache(kind, config):
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("padding", [0, 4])
def test_a_cache_filled_step_by_step_changes_nothing(make_pair, tokens, attention, kind, padding):
    model, reference = make_pair(attention, num_hidden_layers=3)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, pieces, start = new_cache(kind, model.config), [], 0
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        for width in (9, 1, 1, 4, 1, 1, 1, 2):  # a prompt, single steps and chunks
            part = slice(start, start + width)
            pieces.append(
                model(
                    ids[:, part],
                    attention_mask=mask[:, : part.stop] if padding else None,
                    position_ids=positions[:, part] if padding else None,  # else the model counts by the cache
                    past_key_values=cache,
                ).logits
            )
            start = part.stop
            assert cache.get_seq_length() == start
    assert start == 20
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@pytest.fixture
def make_bf16_trio(make_model, tmp_path):
    """-> model and reference in bf16, and the reference in fp32 with the same, rounded weights.

    They are loaded so: `model.bfloat16()` would round the RoPE frequencies too, in the reference as well.
    """

    def make(attention, **fields):
        save_as_llama4_text(make_model(**fields).bfloat16(), tmp_path)
        return [
            model_class.from_pretrained(tmp_path, dtype=dtype, attn_implementation=attention).eval()
            for model_class, dtype in (
                (MobileLLMForCausalLM, torch.bfloat16),
                (Llama4ForCausalLM, torch.bfloat16),
                (Llama4ForCausalLM, torch.float),
            )
        ]

    return make


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_qk_norm", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_as_near_to_fp32_as_the_reference_is(make_bf16_trio, tokens, attention, use_qk_norm, seed):
    trio = make_bf16_trio(attention, seed=seed, use_qk_norm=use_qk_norm)
    with torch.no_grad():
        ours, theirs, exact = (model(tokens(4, 64)).logits for model in trio)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    ours, theirs = (ours.float() - exact).abs(), (theirs.float() - exact).abs()
    assert ours.max() <= 1.5 * theirs.max()
    assert ours.mean() <= 1.5 * theirs.mean()


def test_rope_stays_exact_in_bf16(make_bf16_trio):
    """Positions and angles are fp32 whatever the weights are: in bf16 a position would be off by one at 257."""
    model, reference, _ = make_bf16_trio("eager")
    positions, like = torch.arange(3000, 3016)[None], torch.empty(1, dtype=torch.bfloat16)
    cos, sin = model.model.rotary_emb(like, positions)
    angles = reference.model.rotary_emb(like, positions)
    torch.testing.assert_close(torch.complex(cos[..., 0, :], sin[..., 0, :]), angles, rtol=0, atol=1e-6)
    theta = model.config.rope_parameters["rope_theta"]
    exact = positions[0, :, None].double() / theta ** (torch.arange(0, 16, 2).double() / 16)
    torch.testing.assert_close(cos[0, :, 0].double(), exact.cos(), rtol=0, atol=3e-4)  # fp32 positions near 3000


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions_are_recorded(make_pair, tokens, attention):
    model, reference = make_pair(attention, num_hidden_layers=3)
    wanted = dict(output_hidden_states=True, output_attentions=attention == "eager")
    with torch.no_grad():
        ours, theirs = model(tokens(), **wanted), reference(tokens(), **wanted)
    for field in ("hidden_states", "attentions") if attention == "eager" else ("hidden_states",):
        assert len(getattr(ours, field)) == len(getattr(theirs, field)) == (4 if field == "hidden_states" else 3)
        for own, other in zip(getattr(ours, field), getattr(theirs, field), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


def test_embeddings_can_be_given_instead_of_ids(make_pair, tokens):
    model, reference = make_pair()
    embedded = reference.model.embed_tokens(tokens()).detach()
    assert_same_logits(model, reference, inputs_embeds=embedded)
    for wrong in ({}, dict(input_ids=tokens(), inputs_embeds=embedded)):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 7, 23])], ids=str)
def test_logits_to_keep(make_pair, tokens, keep):
    model, reference = make_pair()
    with torch.no_grad():
        kept, full = model(tokens(), logits_to_keep=keep).logits, reference(tokens()).logits
    torch.testing.assert_close(kept, full[:, -keep:] if isinstance(keep, int) else full[:, keep], rtol=0, atol=1e-5)


def test_each_row_can_keep_positions_of_its_own(make_pair, tokens):
    model, reference = make_pair()
    chosen = torch.tensor([[0, 7], [5, 23]])
    mask = torch.zeros(2, 24, dtype=torch.bool).scatter_(1, chosen, True)
    with torch.no_grad():
        full = reference(tokens()).logits
        expected = torch.stack([full[row, positions] for row, positions in enumerate(chosen)])
        by_index, by_mask = (model(tokens(), logits_to_keep=keep).logits for keep in (chosen, mask))
    torch.testing.assert_close(by_index, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_mask, expected.flatten(0, 1), rtol=0, atol=1e-5)


def test_the_decoder_alone_and_as_a_tuple(make_pair, tokens):
    model, reference = make_pair()
    with torch.no_grad():
        expected = reference.model(tokens()).last_hidden_state
        backbone = MobileLLMModel(model.config).eval()
        backbone.load_state_dict(model.model.state_dict())
        torch.testing.assert_close(backbone(tokens()).last_hidden_state, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(backbone(tokens(), return_dict=False)[0], expected, rtol=0, atol=1e-5)
        assert backbone(tokens(), use_cache=False).past_key_values is None


def test_attention_dropout_acts_in_training_only(make_pair, tokens):
    model, reference = make_pair("eager", attention_dropout=0.5)
    assert_same_logits(model, reference, tokens())
    outputs = []
    for half in (model.train(), reference.train()):
        torch.manual_seed(3)
        outputs.append(half(tokens()).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)  # the same random numbers are drawn
    assert (outputs[0] - model.eval()(tokens()).logits).abs().max() > 0.01
