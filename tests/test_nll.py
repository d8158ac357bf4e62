"""Mean NLL against the documents read one by one, and the model's mode."""

import pytest
import torch
from datasets import Dataset

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.nll import collate, evaluation_batches, mean_nll


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


def test_mean_nll_is_the_token_mean_of_the_documents_read_one_by_one():
    model, dataset = build().eval(), rows(5)
    total = tokens = 0.0
    for row in dataset.with_format("torch"):
        for start, end in ((0, 5), (5, 12)):
            ids = row["input_ids"][None, start:end]
            logits = model(ids).logits[0, :-1].log_softmax(-1)
            total -= logits.gather(-1, ids[0, 1:, None]).sum().item()
            tokens += end - start - 1
    assert mean_nll(model, dataset, batch_size=2) == pytest.approx(total / tokens, rel=1e-5)


def test_mean_nll_refuses_a_data_set_that_predicts_nothing():
    silent = rows(2).map(lambda row: {"labels": [-100] * 12})
    with pytest.raises(ValueError, match="no predicted token"):
        mean_nll(build(), silent)


def test_the_mode_comes_back_even_when_a_batch_fails():
    model = build().train()
    with pytest.raises(RuntimeError, match="cut off"):
        for _, predicted in evaluation_batches(model, rows(3), batch_size=2):
            assert not model.training and predicted == 2 * 10
            raise RuntimeError("cut off")
    assert model.training


def test_masks_of_row_ends_are_dropped_and_packed_rows_cannot_be_padded_in_front():
    ids = torch.arange(3, 9).repeat(2, 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    end, front = torch.tensor([[1] * 6, [1] * 4 + [0] * 2]), torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    batch = collate({"input_ids": ids, "position_ids": positions, "attention_mask": end})
    assert "attention_mask" not in batch and batch["labels"].tolist()[1] == [3, 4, 5, 6, -100, -100]
    batch = collate({"input_ids": ids, "attention_mask": front})
    assert torch.equal(batch["attention_mask"], front) and batch["labels"].tolist()[1] == [-100, -100, -100, 6, 7, 8]
    with pytest.raises(ValueError, match="cannot be padded in front"):
        collate({"input_ids": ids, "position_ids": positions, "attention_mask": front})
