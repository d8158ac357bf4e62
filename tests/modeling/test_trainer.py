"""The stock Trainer of transformers."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mobilellm_hf import MobileLLMForCausalLM


@pytest.fixture
def rows():
    """Eight rows of one repeated pattern each, so that a few steps can learn something."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 256, (4,), generator=generator).repeat(4) for _ in range(8)]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture
def train(tiny_config, tmp_path, rows):
    """train(**training arguments) -> the Trainer when it has finished."""

    def run(folder="run", resume=None, attention_dropout=0.0, **options):
        torch.manual_seed(0)
        arguments = dict(
            output_dir=tmp_path / folder,
            use_cpu=True,
            per_device_train_batch_size=4,
            max_steps=12,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            seed=1,
        )
        trainer = Trainer(
            model=MobileLLMForCausalLM(tiny_config(attention_dropout=attention_dropout)),
            args=TrainingArguments(**{**arguments, **options}),
            train_dataset=rows,
            eval_dataset=rows[:6],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_it_trains_and_evaluates(train, rows):
    trainer = train(eval_strategy="steps", eval_steps=6, per_device_eval_batch_size=4)
    assert len(losses(trainer)) == 12 and losses(trainer)[-1] < losses(trainer)[0] - 0.3
    evaluated = losses(trainer, "eval_loss")
    assert len(evaluated) == 2 and evaluated[-1] < math.log(256)
    # evaluation has logits, and they are the model's
    prediction = trainer.predict(rows[:6])
    assert prediction.predictions.shape == (6, 16, 256)
    assert prediction.metrics["test_loss"] == pytest.approx(evaluated[-1], rel=1e-5)


def test_a_resumed_run_is_bit_equal(train):
    dropout = dict(attention_dropout=0.1)  # so that the random state must be restored as well
    whole = train("whole", save_steps=6, **dropout)
    resumed = train("resumed", resume=str(whole.args.output_dir) + "/checkpoint-6", save_strategy="no", **dropout)
    assert losses(resumed)[-6:] == losses(whole)[-6:]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight


def test_gradient_accumulation_takes_the_mean_over_all_tokens(train, rows):
    """Rows with unequally many labels: the mean of the batches' means would be another loss."""
    for number, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][: 2 * number] = -100
    together = train("together", per_device_train_batch_size=8)
    in_parts = train("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert losses(in_parts) == pytest.approx(losses(together), rel=1e-4)


@pytest.mark.parametrize(
    "options, tolerance", [(dict(bf16=True), 2e-2), (dict(gradient_checkpointing=True), 1e-4)], ids=str
)
def test_it_trains_with(train, options, tolerance):
    plain, other = train("plain"), train("other", **options)
    assert other.model.dtype == torch.float
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)
    assert losses(other)[-1] < losses(other)[0] - 0.3
