"""Probe NLL and the non-finite stop, in the stock Trainer."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.nll import mean_nll
from mobilellm_hf.training import NonFiniteLossError, ProbeNLLCallback, StopOnNonFiniteLoss
from mobilellm_hf.training.monitors import probe_history
from mobilellm_hf.training.plots import plot_probe_nll


def build() -> MobileLLMForCausalLM:
    torch.manual_seed(0)
    return MobileLLMForCausalLM(
        MobileLLMConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def rows(count: int, seed: int = 0) -> Dataset:
    ids = torch.randint(3, 64, (count, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    positions = [[*range(5), *range(7)]] * count
    labels = [[-100, *row[1:5], -100, *row[6:]] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "position_ids": positions})


def arguments(folder, **options) -> TrainingArguments:
    defaults = dict(max_steps=4, per_device_train_batch_size=2, logging_steps=1, logging_nan_inf_filter=False,
                    report_to="none", disable_tqdm=True, use_cpu=True, save_steps=2, learning_rate=1e-3)  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def test_probe_nll_is_logged_before_during_and_after_and_survives_a_resume(tmp_path):
    probes = {"code": rows(3, seed=1), "math": rows(3, seed=2)}

    def train(folder, steps, resume=None):
        options = arguments(folder, max_steps=steps, lr_scheduler_type="constant")
        trainer = Trainer(build(), options, train_dataset=rows(16), callbacks=[ProbeNLLCallback(probes, every=2)])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    full = train(tmp_path / "full", 5)
    curves = probe_history(full.state.log_history)
    assert [step for step, _ in curves["code"]] == [0, 2, 4, 5]
    assert curves["math"][-1][1] == pytest.approx(mean_nll(full.model, probes["math"]))
    assert curves["code"][0][1] == pytest.approx(mean_nll(build(), probes["code"]))
    train(tmp_path / "cut", 2)
    resumed = train(tmp_path / "cut", 5, resume=str(tmp_path / "cut" / "checkpoint-2"))
    assert probe_history(resumed.state.log_history) == curves


@pytest.mark.parametrize("broken", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_ends_training_before_anything_is_saved(tmp_path, broken):
    model = build()

    class Poisoned(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            if self.state.global_step < 2:
                return loss
            if broken == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss

    trainer = Poisoned(model, arguments(tmp_path), train_dataset=rows(16), callbacks=[StopOnNonFiniteLoss()])
    with pytest.raises(NonFiniteLossError, match=rf"{broken} is nan at step 3: lower the learning rate \(0.001\)"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "hiding, message",
    [
        (dict(logging_nan_inf_filter=True), "logging_nan_inf_filter"),
        (dict(logging_steps=4, save_steps=2), "logging_steps=4 must divide the 2 steps"),
        (dict(logging_steps=500, save_strategy="no"), "logging_steps=500 must divide the 4 steps"),
        (dict(logging_strategy="no"), "sees only what is logged"),
    ],
)
def test_the_stop_refuses_a_trainer_that_hides_nan(tmp_path, hiding, message):
    options = arguments(tmp_path, **hiding)
    trainer = Trainer(build(), options, train_dataset=rows(4), callbacks=[StopOnNonFiniteLoss()])
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_the_picture_of_probe_nll_changes_with_the_curves(tmp_path):
    for name, value in (("a.png", 2.0), ("b.png", 1.0)):
        curves = {"code": [(0, 9.0), (5, 3.0), (10, value)]}
        plot_probe_nll({"influence mix": curves, "uniform mix": curves}, tmp_path / name, tokens_per_step=4096)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
