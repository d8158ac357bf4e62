"""The mixture under the stock Trainer: order, checkpoints, the loss of each source, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mixture_cases import build, drawn, mixture, train
from peft import LoraConfig, get_peft_model

from mobilellm_hf.nll import collate, predicted_tokens, summed_nll
from mobilellm_hf.training import MixtureCallback

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "options",
    [{}, dict(dataloader_num_workers=2), dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)],
)
def test_the_trainer_reads_draw_after_draw(tmp_path, options):
    _, read = train(tmp_path, MixtureCallback(mixture(), source_loss=False), max_steps=15, save_steps=99, **options)
    assert read == drawn(mixture())[:120]


def test_a_resumed_run_reads_on_and_ends_with_the_same_weights(tmp_path):
    whole, read = train(tmp_path / "whole", MixtureCallback(mixture()))
    train(tmp_path / "cut", MixtureCallback(mixture()), max_steps=10)
    resumed, rest = train(
        tmp_path / "cut", MixtureCallback(mixture()), resume=str(tmp_path / "cut" / "checkpoint-10"), max_steps=20
    )
    assert rest == read[80:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    histories = [
        [
            {k: v for k, v in entry.items() if k.startswith(("loss", "mixture/"))}
            for entry in run.state.log_history[:-1]
        ]
        for run in (whole, resumed)
    ]
    assert histories[0] == histories[1]


def expected_losses(model, draws: range) -> dict[str, float]:
    data, totals = mixture(), {}
    sources, _ = data.locate(draws)
    for row, source in zip(data.__getitems__(list(draws)), sources, strict=True):
        batch = collate({name: [value] for name, value in row.items()})
        total = totals.setdefault(data.sources[source], [0.0, 0])
        total[0] += summed_nll(model.double(), batch).item()
        total[1] += int(predicted_tokens(batch).sum())
    return {f"loss/{name}": total / count for name, (total, count) in totals.items()}


@pytest.mark.parametrize("kind", ["mobilellm", "llama", "lora"])
def test_the_loss_of_each_source_is_that_of_its_tokens(tmp_path, kind):
    model = build("mobilellm" if kind == "lora" else kind)
    model.config.use_cache = False
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    callback = MixtureCallback(mixture())
    options = dict(learning_rate=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=4)
    trainer, _ = train(tmp_path, callback, model, max_steps=8, save_steps=8, **options)
    for start, entry in zip((0, 32), trainer.state.log_history, strict=False):
        found = {name: value for name, value in entry.items() if name.startswith("loss/")}
        assert found == pytest.approx(
            expected_losses(build("mobilellm" if kind == "lora" else kind), range(start, start + 32)), rel=1e-5
        )
        assert entry["mixture/easy"] == pytest.approx(0.4)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert "_row_ids" not in vars(model)


def test_figures_reach_later_callbacks_and_the_saved_history(tmp_path):
    trainer, _ = train(tmp_path, MixtureCallback(mixture()), max_steps=5)
    saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    assert saved[4]["loss/easy"] == trainer.state.log_history[4]["loss/easy"]


def test_without_ids_there_is_no_loss_per_source_and_it_is_said(tmp_path, caplog):
    trainer, _ = train(tmp_path, MixtureCallback(mixture()), max_steps=2, remove_unused_columns=True)
    assert "no loss per source" in caplog.text
    assert not any(name.startswith("loss/") for name in trainer.state.log_history[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(train_sampling_strategy="random"), "set train_sampling_strategy='sequential', not 'random'"),
        (dict(max_steps=21), "21 steps of 8 rows need a mixture of num_draws=168, not 160"),
        (dict(ignore_data_skip=True), "ignore_data_skip=True"),
        (dict(dataloader_num_workers=8), "8 workers fetch 18 batches ahead, more than delay_steps=16 covers"),
    ],
)
def test_a_mixture_that_would_be_misread_is_refused_at_the_start(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, MixtureCallback(mixture()), **options)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_another_mixture_is_not_resumed(tmp_path):
    train(tmp_path, MixtureCallback(mixture()), max_steps=5)
    checkpoint = str(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="the saved mixture has seed=0, this one 3"):
        train(tmp_path, MixtureCallback(mixture(seed=3)), resume=checkpoint)
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    state["stateful_callbacks"].pop("mobilellm_hf.mixture")
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="the checkpoint of step 5 was trained without this mixture"):
        train(tmp_path, MixtureCallback(mixture()), resume=checkpoint)


def torchrun(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(HERE / "live_mixture_worker.py")
    done = subprocess.run([*command, script, str(folder), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_read_what_one_reads_and_decide_alike(tmp_path):
    from test_resampling import resampling

    torchrun(tmp_path / "two", "4")
    one, read = train(tmp_path / "one", resampling(), save_steps=99)
    results = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for step in range(20):
        both = results[0]["read"][4 * step : 4 * step + 4] + results[1]["read"][4 * step : 4 * step + 4]
        assert both == read[8 * step : 8 * step + 8]
    assert results[0]["rounds"] == results[1]["rounds"]
    expected = [callback for callback in one.callback_handler.callbacks if hasattr(callback, "rounds")][0].rounds
    for found, alone in zip(results[0]["rounds"], expected, strict=True):
        assert found["from_draw"] == alone.from_draw
        assert found["weights"] == pytest.approx(alone.weights, abs=1e-3)
    for name, value in results[0]["losses"].items():
        assert value == pytest.approx(one.state.log_history[2][name], rel=1e-4), name
