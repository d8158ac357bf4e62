"""Scores taken inside training steps: equal to those of scoring, beside gradients equal to autograd's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from influence_cases import build, relative_error, rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from mobilellm_hf.influence import InfluenceScorer, inner_products, tapped_layers


@pytest.fixture(autouse=True)
def several_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(inner_products, "BLOCK_ELEMENTS", 3 * 32 * 7)
    monkeypatch.setattr(tapped_layers, "HEAD_CHUNK_ELEMENTS", 64 * 11)


def probes() -> dict:
    return {name: rows(4, seed) for name, seed in (("code", 5), ("math", 6))}


def batch(dataset) -> dict[str, torch.Tensor]:
    columns = ("input_ids", "labels", "position_ids")
    return {name: dataset.with_format("torch")[name][:] for name in columns}


def gradients(model) -> dict[str, torch.Tensor]:
    result = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["mobilellm", "llama", "llama with biases", "qwen3"])
def test_gradients_are_autograds_and_scores_are_the_scorers(kind, checkpointing):
    model, dataset = build(kind), rows(7, seed=1)
    scorer = InfluenceScorer(model, probes())
    expected = scorer.score(dataset)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(**batch(dataset), use_cache=False).loss.backward()
    plain = gradients(model)
    with scorer.in_training_step() as influence:
        loss = model(**batch(dataset), use_cache=False).loss
        (loss * 3).backward()  # as a scaler would
        scores = influence.take()
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, 3 * plain[name]) < 1e-5, name
    assert relative_error(scores, expected) < 1e-6
    assert not any("forward" in vars(module) for module in model.modules())


def test_excluded_and_frozen_weights_train_or_rest_as_before():
    model, dataset = build(), rows(5, seed=1)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    scorer = InfluenceScorer(model, probes(), exclude=["*up_proj*", "model.embed_tokens.weight"])
    expected = scorer.score(dataset)
    model.train()
    model(**batch(dataset)).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with scorer.in_training_step() as influence:
        model(**batch(dataset)).loss.backward()
        assert relative_error(influence.take(), expected) < 1e-6
    assert model.model.layers[0].self_attn.q_proj.weight.grad is None
    for name, gradient in plain.items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-5, name


class TakeScores(TrainerCallback):
    def __init__(self, influence):
        self.influence, self.steps = influence, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(self.influence.take())


def test_a_trainer_with_gradient_accumulation(tmp_path):
    """Two micro-batches a step: the scores of a step are those of its samples at the weights before it."""
    dataset, probe_sets = rows(8, seed=1), probes()
    model = build().train()
    scorer = InfluenceScorer(model, probe_sets)
    expected = scorer.score(dataset.select(range(4)), batch_size=2)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        train_sampling_strategy="sequential", report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    with scorer.in_training_step() as influence:
        take = TakeScores(influence)
        Trainer(model, arguments, train_dataset=dataset, callbacks=[take]).train()
    assert [len(step) for step in take.steps] == [4, 4]
    assert relative_error(take.steps[0], expected) < 1e-5
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = build().train()
    Trainer(other, arguments, train_dataset=dataset).train()
    for name, parameter in other.named_parameters():
        assert relative_error(trained[name], parameter.detach()) < 1e-5, name


def test_evaluation_inside_the_context_is_not_recorded_and_a_foreign_loss_is_refused():
    model, dataset = build(), rows(3, seed=1)
    scorer = InfluenceScorer(model, probes())
    with scorer.in_training_step() as influence:
        with torch.no_grad():
            model(**batch(dataset), return_logits=False)
        assert influence.take().shape == (0, 2)
        model.train()
        model(**batch(dataset), return_logits=True).logits.sum().backward()
        with pytest.raises(RuntimeError, match="pass `labels` to the model"):
            influence.take()
        with pytest.raises(RuntimeError, match="pass `labels` to the model"):
            model(input_ids=batch(dataset)["input_ids"])


def test_what_would_mix_up_batches_is_refused():
    model, dataset = build().train(), rows(3, seed=1)
    scorer = InfluenceScorer(model, probes())
    with scorer.in_training_step() as influence:
        loss = model(**batch(dataset)).loss
        with pytest.raises(RuntimeError, match="backward pass of a batch before the forward pass of the next"):
            model(**batch(dataset))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="this is the second"):
            loss.backward()
        influence.take()
        for nested in (lambda: InfluenceScorer(model, probes()), lambda: scorer.score(dataset)):
            with pytest.raises(RuntimeError, match="leave that context first"):
                nested()
    assert scorer.score(dataset).isfinite().all()


def test_an_infinite_gradient_flags_its_sample_alone():
    model, dataset = build().train(), rows(4, seed=1)
    scorer = InfluenceScorer(model, probes())
    expected = scorer.score(dataset)
    with scorer.in_training_step() as influence:
        model(**batch(dataset)).loss.backward()
        influence._batches[0]["products"][2, 1] = float("inf")
        scores = influence.take()
    assert scores[2].isnan().all() and relative_error(scores[[1, 3]], expected[[1, 3]]) < 1e-6


def test_mixed_precision_takes_products_in_fp32():
    """The gradients of autocast's own step, whose bf16 tensors differ from fp32's by a percent or so."""
    model, dataset = build(hidden_size=64, intermediate_size=128).train(), rows(7, seed=1)
    scorer = InfluenceScorer(model, probes())

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(dataset)).loss
        loss.backward()
        return torch.cat([gradient.flatten() for gradient in gradients(model).values()])

    plain = step()
    with scorer.in_training_step() as influence:
        tapped = step()
        scores = influence.take()
    assert relative_error(tapped, plain) < 5e-3  # autograd rounds each weight's gradient to bf16
    # The scores are products of the gradients that were formed: their token-weighted sum is that of the batch's.
    tokens = (batch(dataset)["labels"][:, 1:] != -100).sum(1)
    directions = torch.cat([value.flatten(1) for value in scorer.directions.values()], 1)
    order = dict(zip(scorer.directions, scorer.directions.values(), strict=True))
    assert list(order) == [name for name, _ in model.named_parameters()]
    expected = directions.double() @ tapped.double() * tokens.sum()
    assert relative_error((scores * tokens[:, None]).sum(0), expected) < 1e-4


def test_two_ddp_processes_get_the_joint_gradients_and_the_scores_of_their_own_samples(tmp_path):
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["scores"] < 1e-6 and figures["gradients"] < 1e-5
    assert "is sharded (FSDP or tensor parallelism)" in figures["refused"]
