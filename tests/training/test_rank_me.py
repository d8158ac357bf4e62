"""RankMe against numpy and known cases, and its callback in the stock Trainer."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.training.rank_me import RankMeCallback, last_hidden_states, rank_me

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def build() -> MobileLLMForCausalLM:
    torch.manual_seed(0)
    return MobileLLMForCausalLM(MobileLLMConfig(**SIZES, num_key_value_heads=2, bos_token_id=1, eos_token_id=2))


def rows(count: int, seed: int = 0, longest: int = 12) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def by_hand(matrix: np.ndarray) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum() + 1e-7
    return np.exp(-(shares * np.log(shares)).sum())


def test_equals_numpy():
    matrix = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 20)
    assert rank_me(matrix) == pytest.approx(by_hand(matrix.double().numpy()), rel=1e-9)
    assert 1 < rank_me(matrix) < 20


def test_known_cases():
    assert rank_me(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rank_me(torch.linalg.qr(torch.randn(40, 16))[0]) == pytest.approx(16, rel=1e-4)
    assert rank_me(torch.outer(torch.rand(40), torch.rand(16))) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))), rel=1e-4
    )
    assert rank_me(torch.eye(8, dtype=torch.bfloat16) * 7) == pytest.approx(8, rel=1e-4)
    for bad, message in [
        (torch.zeros(3, 3), "all zero"),
        (torch.full((2, 2), torch.nan), "NaN"),
        (torch.ones(3), "must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            rank_me(bad)


def test_the_callback_takes_the_states_that_predict_a_token():
    model, data = build(), rows(6)
    figure = RankMeCallback(data, every=1, positions=1_000, batch_size=4).measure(model.train())["rank_me"]
    assert model.training
    states = []
    with torch.no_grad():
        for row in data:
            hidden = model.eval().model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
            states.append(hidden[1:-1])  # the first label is that of the third token
    assert figure == pytest.approx(by_hand(torch.cat(states).double().numpy()), rel=1e-5)
    again = RankMeCallback(data, every=1, positions=10, batch_size=2)
    assert again.measure(model) == again.measure(model) != {"rank_me": figure}
    assert again.measure(model)["rank_me"] < 10
    big = rows(500)
    few = RankMeCallback(big, every=1, positions=20)
    assert 20 <= sum(map(len, few.rows["input_ids"][:])) < 200  # no more than a part of the rows is run
    assert few.rows["input_ids"][:] != big["input_ids"][: len(few.rows)]


def test_any_causal_model_and_adapters_will_do():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    ids = torch.randint(0, 64, (2, 7))
    expected = llama(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(last_hidden_states(llama, {"input_ids": ids}), expected)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = adapted(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    torch.testing.assert_close(last_hidden_states(adapted, {"input_ids": ids}), expected)


def test_in_the_trainer(tmp_path):
    options = TrainingArguments(output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, use_cpu=True,
                                report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=5)  # fmt: skip
    data = rows(16, longest=4)
    trainer = Trainer(
        build(), options, train_dataset=data, callbacks=[RankMeCallback(rows(20), every=2, positions=64)]
    )
    trainer.train()
    logged = [(entry["step"], entry["rank_me"]) for entry in trainer.state.log_history if "rank_me" in entry]
    assert [step for step, _ in logged] == [0, 2, 4, 5]
    assert logged[0][1] != logged[-1][1] and all(1 < value <= 32 for _, value in logged)
    with pytest.raises(ValueError, match="every=0"):
        RankMeCallback(data, every=0)
    with pytest.raises(ValueError, match="positions=1 must be"):
        RankMeCallback(data, every=1, positions=1)
