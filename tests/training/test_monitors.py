"""Probe NLL and the non-finite stop, in the stock Trainer."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.nll import mean_nll
from mobilellm_hf.training import NonFiniteLossError, ProbeNLLCallback, StopOnNonFiniteLoss
from mobilellm_hf.training.monitors import add_before_trackers, own_batches, probe_history
from mobilellm_hf.training.rank_me import RankMeCallback


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


class Tracker(TrainerCallback):
    """What a tracker would be sent."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append((state.global_step, {key: logs[key] for key in logs if key.startswith(("probe", "rank"))}))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_figures_reach_those_that_look_at_logs_at_their_own_step(tmp_path):
    before, after = Tracker(), Tracker()
    probe = ProbeNLLCallback({"code": rows(3, seed=1)}, every=3)
    options = arguments(tmp_path, max_steps=7, logging_steps=5)
    trainer = Trainer(build(), options, train_dataset=rows(16), callbacks=[before, probe, after])
    rank = RankMeCallback(rows(20), every=3, positions=50)
    add_before_trackers(trainer, rank)
    assert trainer.callback_handler.callbacks[0] is rank
    trainer.train()
    history = dict(probe_history(trainer.state.log_history)["code"])
    assert list(history) == [0, 3, 6, 7]
    assert [(step, figures) for step, figures in after.sent if "probe_nll/code" in figures] == [
        (step, {"probe_nll/code": value, "rank_me": figures["rank_me"]})
        for step, value in history.items() if step
        for logged, figures in after.sent if logged == step and figures
    ]  # fmt: skip
    assert [step for step, figures in before.sent if figures] == [3, 6, 7]
    assert not any("probe_nll/code" in figures for _, figures in before.sent)
    assert (5, {}) in after.sent  # a log of a step without figures repeats none
    # An unusual step of logging changes none of the losses' means.
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert list(losses) == [3, 5, 6, 7]


def test_probes_are_collated_once_and_a_silent_run_stays_silent(tmp_path, monkeypatch):
    collated = []
    from mobilellm_hf.training import monitors

    monkeypatch.setattr(monitors, "collate", lambda batch: collated.append(batch) or original(batch))
    original = sys.modules["mobilellm_hf.nll"].collate
    probe = ProbeNLLCallback({"code": rows(5, seed=1)}, every=1, batch_size=2)
    tracker = Tracker()
    options = arguments(tmp_path, logging_strategy="no")
    trainer = Trainer(build(), options, train_dataset=rows(16), callbacks=[probe, tracker])
    trainer.train()
    assert len(collated) == 3 and len(probe_history(trainer.state.log_history)["code"]) == 5
    assert [step for step, figures in tracker.sent if figures] == [4]  # the summary at the end, which always comes
    trainer = Trainer(build(), options, train_dataset=rows(16), callbacks=[Stop(), ProbeNLLCallback(probe.probes, 2)])
    trainer.add_callback(tracker := Tracker())
    trainer.train()
    # The last step of a run that is ended early is measured too; the figures of step 2, not logged, are not sent.
    assert [step for step, _ in probe_history(trainer.state.log_history)["code"]] == [0, 2, 3]
    assert [step for step, figures in tracker.sent if figures] == [3]
    unpredicted = rows(2).map(lambda row: {"labels": [-100] * 12})
    with pytest.raises(ValueError, match="no predicted token"):
        ProbeNLLCallback({"code": unpredicted}, every=1).measure(build())


def test_rows_of_different_lengths_and_a_small_last_batch():
    data = Dataset.from_list([row if n % 2 else {k: v[:7] for k, v in row.items()} for n, row in enumerate(rows(5))])
    measured = ProbeNLLCallback({"code": data}, every=1, batch_size=2).measure(build().train())
    assert measured["probe_nll/code"] == pytest.approx(mean_nll(build(), data), rel=1e-6)
    assert [weight for _, weight in own_batches(data, 2)] == [1.0] * 3


def test_two_processes_share_the_work_and_agree_with_one(tmp_path):
    data = rows(20, seed=3)
    data.save_to_disk(tmp_path / "rows")
    expected = ProbeNLLCallback({"code": data, "one row": data.select([0])}, 1, 4).measure(build())
    expected |= RankMeCallback(data, every=1, positions=60, batch_size=4).measure(build())
    worker = Path(__file__).with_name("monitor_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, str(worker), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for way in ("whole", "fsdp2"):
        ranks = [json.loads((tmp_path / f"{way}-{rank}.json").read_text()) for rank in range(2)]
        assert ranks[0]["figures"] == ranks[1]["figures"] == pytest.approx(expected, rel=1e-5)
        # Five batches, one batch, and the first 240 tokens of rows, of four rows each: half each, rounded up.
        assert ranks[0]["forwards"] == ranks[1]["forwards"] == 3 + 1 + 3
