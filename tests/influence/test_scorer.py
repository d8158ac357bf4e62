"""Scores against every sample's own gradient by autograd in fp64, for each model, batch and option."""

import logging

import pytest
import torch
from influence_cases import (
    brute_force_scores,
    build,
    probe_gradient,
    ragged_rows,
    relative_error,
    rows,
    sample_gradients,
)
from peft import LoraConfig, get_peft_model

from mobilellm_hf.influence import InfluenceScorer, inner_products, rank_agreement, tapped_layers
from mobilellm_hf.influence.products import UnsupportedModuleError

CAPABILITIES = ("code", "math", "knowledge")


@pytest.fixture(autouse=True)
def several_blocks_and_chunks(monkeypatch):
    """Sizes at which a matrix is formed in several blocks, the last one shorter, and the head in several chunks."""
    monkeypatch.setattr(inner_products, "BLOCK_ELEMENTS", 3 * 32 * 7)
    monkeypatch.setattr(tapped_layers, "HEAD_CHUNK_ELEMENTS", 64 * 11)


def probes(packed: bool = True) -> dict:
    return {name: rows(4, seed, packed) for name, seed in zip(CAPABILITIES, (5, 6, 7), strict=True)}


def truth(model, dataset, probe_sets) -> torch.Tensor:
    model.double()
    expected = brute_force_scores(model, dataset, [probe_gradient(model, probe) for probe in probe_sets.values()])
    model.float()
    return expected


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["mobilellm", "llama", "llama with biases", "qwen3"])
def test_scores_are_the_inner_products_of_all_parameters_gradients(kind, packed):
    model, dataset, probe_sets = build(kind), rows(7, seed=1, packed=packed), probes(packed)
    expected = truth(model, dataset, probe_sets)
    scorer = InfluenceScorer(model, probe_sets)
    assert set(scorer.directions) == {name for name, _ in model.named_parameters()}
    scores = scorer.score(dataset, batch_size=3)
    assert scores.shape == (7, 3) and scores.dtype == torch.float64
    assert relative_error(scores, expected) < 1e-6
    assert scores[0].abs().max() == 0  # it predicts nothing


@pytest.mark.parametrize(
    "fields", [dict(tie_word_embeddings=False), dict(num_hidden_layers=4, layer_repeats=2), dict(pad_token_id=5)]
)
def test_fp64_models_are_scored_in_fp64(fields):
    model, dataset, probe_sets = build(**fields), rows(6, seed=1), probes()
    expected = truth(model, dataset, probe_sets)
    model.double()
    scores = InfluenceScorer(model, probe_sets).score(dataset, batch_size=4)
    assert relative_error(scores, expected) < 1e-12


@pytest.mark.parametrize("chunk_tokens", [5, 16, 40, 1000])
def test_the_heads_chunks_are_parts_of_a_row_or_several_rows(monkeypatch, chunk_tokens):
    monkeypatch.setattr(tapped_layers, "HEAD_CHUNK_ELEMENTS", 64 * chunk_tokens)
    model, dataset, probe_sets = build(), rows(5, seed=1), probes()
    expected = truth(model, dataset, probe_sets)
    model.double()
    scorer = InfluenceScorer(model, probe_sets)
    assert relative_error(scorer.score(dataset), expected) < 1e-12
    shares = scorer.score(dataset, per_token=True)
    assert relative_error(torch.stack([share.sum(0) for share in shares]), expected) < 1e-12


@pytest.mark.parametrize("kind", ["mobilellm", "llama"])
def test_rows_of_any_length_are_padded_and_come_back_in_order(kind):
    model, dataset = build(kind), ragged_rows([9, 16, 4, 16, 12, 2], seed=1)
    probe_sets = {"code": ragged_rows([7, 16], seed=2), "math": ragged_rows([11, 5, 6], seed=3)}
    expected = truth(model, dataset, probe_sets)
    scorer = InfluenceScorer(model, probe_sets)
    assert relative_error(scorer.score(dataset, batch_size=4), expected) < 1e-6
    shares = scorer.score(dataset, batch_size=4, per_token=True)
    assert [len(share) for share in shares] == [9, 16, 4, 16, 12, 2]
    assert relative_error(torch.stack([share.sum(0) for share in shares]), expected) < 1e-6


def test_rows_padded_on_the_left_are_scored_by_their_mask():
    model, plain = build("llama"), ragged_rows([9, 6, 12], seed=1)
    padded = plain.map(
        lambda row: {
            "input_ids": [0] * (12 - len(row["input_ids"])) + row["input_ids"],
            "labels": [-100] * (13 - len(row["labels"])) + row["labels"][1:],
            "attention_mask": [0] * (12 - len(row["input_ids"])) + [1] * len(row["input_ids"]),
        }
    )
    scorer = InfluenceScorer(model, {"code": ragged_rows([10, 10], seed=2)})
    # RoPE is relative, so where a row stands makes no difference but rounding.
    assert relative_error(scorer.score(padded), scorer.score(plain)) < 1e-5
    # Without labels every token is predicted but the first, on whichever side the padding is.
    assert relative_error(scorer.score(padded.remove_columns("labels")), scorer.score(plain)) < 1e-5


@pytest.mark.parametrize("kind", ["mobilellm", "llama", "qwen3"])
def test_a_tokens_share_is_that_of_the_position_where_weights_were_applied(kind):
    model, dataset, probe_sets = build(kind), rows(3, seed=1), probes()
    scorer = InfluenceScorer(model, probe_sets)
    shares = torch.stack(scorer.score(dataset, per_token=True))
    assert relative_error(shares.sum(1), scorer.score(dataset)) < 1e-6
    # Documents of a packed row do not see each other: the shares of one are its own score, as if it stood alone.
    predicted = torch.tensor([sum(label != -100 for label in labels[1:]) for labels in dataset["labels"]])
    for start, end in ((0, 7), (7, 16)):
        alone = dataset.map(
            lambda row, start=start, end=end: {name: row[name][start:end] for name in ("input_ids", "labels")},
            remove_columns=["position_ids", "source"],
        )
        own = torch.tensor([sum(label != -100 for label in labels[1:]) for labels in alone["labels"]])
        expected = scorer.score(alone) * (own / predicted.clamp(min=1))[:, None]
        assert relative_error(shares[:, start:end].sum(1), expected) < 1e-5


def test_gradient_checkpointing_changes_nothing():
    model, dataset, probe_sets = build(), rows(5, seed=1), probes()
    expected = InfluenceScorer(model, probe_sets).score(dataset)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    scores = InfluenceScorer(model, probe_sets).score(dataset, batch_size=5)
    assert torch.equal(scores, expected)
    assert len(calls) == 2 * (3 + 1)  # each layer ran twice: for three probes and one batch


def test_reentrant_checkpointing_is_refused_with_the_remedy():
    model = build()
    scorer = InfluenceScorer(model, probes())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        scorer.score(rows(3, seed=1))


def test_products_of_a_bf16_model_are_accumulated_in_fp32():
    """Against the fp32 products of the very tensors that the bf16 model computes, not against an fp32 model."""
    model = build(hidden_size=64, intermediate_size=128).bfloat16()
    inputs, grads = torch.randn(2, 300, 64).bfloat16(), torch.randn(2, 300, 128).bfloat16()
    direction = torch.randn(3, 128, 64)
    products = inner_products.linear_products(direction, inputs, grads)
    expected = torch.einsum("bso,bsi,coi->bc", grads.double(), inputs.double(), direction.double())
    assert relative_error(products, expected) < 1e-5
    scores = InfluenceScorer(model, probes()).score(rows(5, seed=1))
    reference = InfluenceScorer(model.float(), probes()).score(rows(5, seed=1))
    assert relative_error(scores, reference) < 0.05


@pytest.mark.parametrize("kind", ["llama", "mobilellm"])
def test_only_the_adapters_of_a_peft_model_count(kind):
    adapters = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(build(kind), adapters)
    dataset, probe_sets = rows(5, seed=1), probes()
    expected = truth(model, dataset, probe_sets)
    scorer = InfluenceScorer(model, probe_sets)
    assert scorer.directions and all("lora_" in name for name in scorer.directions)
    assert relative_error(scorer.score(dataset), expected) < 1e-6
    with scorer.in_training_step() as influence:
        inputs = {name: dataset.with_format("torch")[name][:] for name in ("input_ids", "labels", "position_ids")}
        model.train()(**inputs, use_cache=False).loss.backward()
        assert relative_error(influence.take(), expected) < 1e-6


def test_excluded_parameters_do_not_count():
    model, dataset, probe_sets = build(), rows(5, seed=1), probes()
    scores = InfluenceScorer(model, probe_sets, exclude=["model.embed_tokens.*", "*norm*"]).score(dataset)
    model.double()
    directions = [
        {name: value for name, value in probe_gradient(model, probe).items() if "proj" in name}
        for probe in probe_sets.values()
    ]
    assert relative_error(scores, brute_force_scores(model, dataset, directions)) < 1e-6
    with pytest.raises(ValueError, match="no parameter matches 'lm_haed"):
        InfluenceScorer(model.float(), probe_sets, exclude=["lm_haed.*"])


def test_probes_are_means_over_samples_or_over_tokens():
    model, dataset = build(), rows(4, seed=1)
    probe = ragged_rows([4, 16], seed=2)
    model.double()
    first, second = sample_gradients(model, probe)
    for average, weights in (("samples", (0.5, 0.5)), ("tokens", (3 / 18, 15 / 18))):
        direction = {name: weights[0] * first[name] + weights[1] * second[name] for name in first}
        scorer = InfluenceScorer(model, {"code": probe}, average=average)
        assert relative_error(scorer.score(dataset), brute_force_scores(model, dataset, [direction])) < 1e-12


def test_directions_of_full_rank_are_exact_and_low_ranks_agree_in_order():
    model, dataset, probe_sets = build(), rows(30, seed=1), probes()
    exact = InfluenceScorer(model, probe_sets).score(dataset)
    close, rough = (InfluenceScorer(model, probe_sets, rank=rank).score(dataset) for rank in (15, 2))
    assert rank_agreement(close, exact).min() > 0.9 > rank_agreement(rough, exact).min() > 0.3
    assert relative_error(close, exact) < relative_error(rough, exact)
    assert not torch.equal(close, exact)
    shares = InfluenceScorer(model, probe_sets, rank=15).score(dataset, per_token=True)
    assert relative_error(torch.stack([share.sum(0) for share in shares]), close) < 1e-5


def test_a_sample_with_an_infinite_gradient_is_flagged_and_spoils_no_other(caplog):
    model, dataset, probe_sets = build(), rows(6, seed=1), probes()
    scorer = InfluenceScorer(model, probe_sets)
    clean = scorer.score(dataset)
    marked = dataset.map(
        lambda row, index: {"input_ids": [63, *row["input_ids"][1:]] if index == 3 else row["input_ids"]},
        with_indices=True,
    ).map(lambda row: {"input_ids": [60 if i == 63 and n else i for n, i in enumerate(row["input_ids"])]})
    model.model.embed_tokens.weight.data[63] = float("inf")
    # Nobody else's logits may see that row of the tied head.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().nan_to_num(posinf=0.0))
    scorer = InfluenceScorer.from_directions(model, scorer.directions, CAPABILITIES)
    with caplog.at_level(logging.WARNING):
        scores = scorer.score(marked, batch_size=6)
    assert scores[3].isnan().all()
    assert scores[[0, 1, 2, 4, 5]].isfinite().all() and clean.isfinite().all()
    assert "row(s) 3 " in caplog.text


def test_the_model_is_left_as_it_was():
    model = build().train()
    model.model.norm.weight.grad = torch.ones(32)
    scorer, seen = InfluenceScorer(model, probes()), []
    scorer.score(rows(5, seed=1), batch_size=2, on_batch=seen.append)
    assert model.training and seen == [2, 2, 1]
    assert model.model.norm.weight.grad.tolist() == [1.0] * 32
    assert all(p.grad is None for name, p in model.named_parameters() if name != "model.norm.weight")
    assert not any("forward" in vars(module) for module in model.modules()) and "fused_loss" not in vars(model)


def test_bad_probes_and_data_are_named():
    model, good = build(), rows(3, seed=1)
    scorer = InfluenceScorer(model, probes())
    with pytest.raises(ValueError, match="probe 'math' is empty"):
        InfluenceScorer(model, {"code": good, "math": good.select([])})
    with pytest.raises(ValueError, match="no probe is given"):
        InfluenceScorer(model, {})
    beyond = good.map(lambda row: {"input_ids": [64, *row["input_ids"][1:]]})
    with pytest.raises(ValueError, match="row 0, has the token id 64, but the model's vocabulary has 64"):
        scorer.score(beyond)
    with pytest.raises(ValueError, match="the scored data set is empty"):
        scorer.score(good.select([]))
    with pytest.raises(ValueError, match="row 0 with probe 'math' .100%."):
        scorer.score(scorer.probes["math"])
    assert scorer.score(scorer.probes["math"], allow_overlap=True).shape == (4, 3)
    with pytest.raises(ValueError, match="curvature='adam'"):
        InfluenceScorer(model, probes(), curvature="adam")
    model.model.layers[1].feed_forward.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"probe 'code': the gradient of .* is not finite"):
        InfluenceScorer(model, probes())


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32))

    def forward(self, hidden_states):
        return hidden_states * self.weight


def test_a_module_that_is_not_known_to_be_exact_is_an_error_unless_excluded():
    model = build()
    model.model.layers[1].input_layernorm = Scaled()
    with pytest.raises(UnsupportedModuleError, match=r"model.layers.1.input_layernorm is a Scaled.*exclude="):
        InfluenceScorer(model, probes())
    scores = InfluenceScorer(model, probes(), exclude=["model.layers.1.input_layernorm.weight"]).score(rows(3, seed=1))
    assert scores.isfinite().all()
    model.model.layers[1].input_layernorm = torch.nn.LayerNorm(32, bias=False)  # no RMSNorm, whatever its fields
    with pytest.raises(UnsupportedModuleError, match="LayerNorm"):
        InfluenceScorer(model, probes())
    model = build()
    up_proj = model.model.layers[1].feed_forward.up_proj
    forward = up_proj.forward
    up_proj.forward = lambda inputs: 3 * forward(inputs)  # as wrappers of other libraries do
    with pytest.raises(UnsupportedModuleError, match="layers.1.feed_forward.up_proj is a Linear"):
        InfluenceScorer(model, probes())


class ScaledEmbedding(torch.nn.Embedding):
    def forward(self, ids):
        return 5 * super().forward(ids)


def test_an_embedding_of_another_kind_can_be_excluded_and_the_rest_is_exact():
    model, dataset = build("llama", tie_word_embeddings=False), rows(4, seed=1)
    model.model.embed_tokens = ScaledEmbedding(64, 32)
    with pytest.raises(UnsupportedModuleError, match="ScaledEmbedding"):
        InfluenceScorer(model, probes())
    scores = InfluenceScorer(model, probes(), exclude=["model.embed_tokens.*"]).score(dataset)
    model.double()
    directions = []
    for probe in probes().values():
        gradient = probe_gradient(model, probe)
        directions.append({name: value for name, value in gradient.items() if "embed_tokens" not in name})
    assert relative_error(scores, brute_force_scores(model, dataset, directions)) < 1e-6


def test_rows_that_predict_nothing_score_zero_even_alone():
    scorer = InfluenceScorer(build(), probes())
    assert scorer.score(ragged_rows([1], seed=1)).tolist() == [[0.0, 0.0, 0.0]]
    assert scorer.score(rows(1, seed=1)).tolist() == [[0.0, 0.0, 0.0]]
