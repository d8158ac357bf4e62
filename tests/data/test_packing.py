import itertools
import random

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaConfig, LlamaForCausalLM

from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.tokenization import train_tokenizer

SOURCES = (("stories", "knowledge"), ("sums", "math"), ("loops", "code"))


def documents(count, seed=0, longest=60):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        source, domain = rng.choice(SOURCES)
        words = rng.choices(["alpha", "beta", "12", "+", "for", "in", "\n"], k=rng.randint(0, longest))
        rows.append({"text": " ".join(words), "source": source, "domain": domain})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(200)["text"], 320, show_progress=False)


def pack_by_hand(dataset, tokenizer, seq_length, isolate):
    """The packer written the slow way: one token after the other, source by source in order of appearance."""
    streams = {}
    for row in dataset:
        ids = tokenizer.encode(row["text"], add_special_tokens=False, split_special_tokens=True)
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        streams.setdefault((row["source"], row["domain"]), []).extend((token, n == 0) for n, token in enumerate(ids))
    rows, tails = [], {}
    for (source, domain), stream in streams.items():
        tails[source] = len(stream) % seq_length
        for start in range(0, len(stream) - seq_length + 1, seq_length):
            row = {"input_ids": [], "labels": [], "position_ids": [], "source": source, "domain": domain}
            position = 0
            for token, is_first in stream[start : start + seq_length]:
                position = 0 if is_first else position
                row["input_ids"].append(token)
                row["labels"].append(-100 if is_first and isolate else token)
                row["position_ids"].append(position)
                position += 1
            if not isolate:
                del row["position_ids"]
            rows.append(row)
    return rows, tails


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("seq_length, longest", [(2, 5), (7, 60), (64, 60), (64, 2), (128, 600)])
def test_equals_the_packer_written_by_hand(tokenizer, seq_length, longest, isolate):
    dataset = documents(90, seed=seq_length, longest=longest)
    packed, report = tokenize_and_pack(dataset, tokenizer, seq_length, isolate_documents=isolate, batch_size=11)
    rows, tails = pack_by_hand(dataset, tokenizer, seq_length, isolate)
    assert packed.to_list() == rows
    assert {line.source: line.tail_tokens for line in report.sources} == tails


def test_rows_do_not_depend_on_batches_or_processes(tokenizer):
    dataset = documents(120, seed=1)
    reference = tokenize_and_pack(dataset, tokenizer, 48)[0].to_list()
    for batch_size, num_proc in [(1, None), (17, None), (13, 2)]:
        packed, _ = tokenize_and_pack(dataset, tokenizer, 48, batch_size=batch_size, num_proc=num_proc)
        assert packed.to_list() == reference


def test_no_token_is_lost_but_the_reported_tails(tokenizer):
    dataset = documents(150, seed=2)
    packed, report = tokenize_and_pack(dataset, tokenizer, 32)
    expected = sum(len(tokenizer.encode(text, add_special_tokens=False)) + 2 for text in dataset["text"])
    assert sum(line.tokens for line in report.sources) == expected
    assert packed.num_rows * 32 + report.tail_tokens == expected
    assert sum(line.documents for line in report.sources) == 150
    assert all(line.tokens == 32 * line.rows + line.tail_tokens for line in report.sources)
    assert f"{report.sources[0].tail_tokens:,} tokens left over" in str(report)


def test_a_source_in_two_domains_is_packed_apart(tokenizer):
    rows = [{"text": "alpha beta " * 30, "source": "web", "domain": domain} for domain in ("code", "math") * 3]
    packed, report = tokenize_and_pack(Dataset.from_list(rows), tokenizer, 16)
    assert [(line.domain, line.documents) for line in report.sources] == [("code", 3), ("math", 3)]
    assert [domain for domain, _ in itertools.groupby(packed["domain"])] == ["code", "math"]


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    rows = [{"text": "alpha <|end_of_text|> beta " * 10, "source": "web", "domain": "code"}]
    eos = tokenizer.eos_token_id
    letters, _ = tokenize_and_pack(Dataset.from_list(rows), tokenizer, 16)
    assert sum(row.count(eos) for row in letters["input_ids"]) <= 1
    parsed, _ = tokenize_and_pack(Dataset.from_list(rows), tokenizer, 16, parse_special_tokens=True)
    assert sum(row.count(eos) for row in parsed["input_ids"]) >= 8


def test_a_second_run_comes_from_the_cache(tokenizer, tmp_path, monkeypatch):
    documents(60, seed=3).save_to_disk(tmp_path / "corpus")
    first, _ = tokenize_and_pack(Dataset.load_from_disk(tmp_path / "corpus"), tokenizer, 32)

    def fail(*args, **kwargs):
        raise AssertionError("tokenized again")

    monkeypatch.setattr("mobilellm_hf.data.packing.Tokenize.__call__", fail)
    monkeypatch.setattr("mobilellm_hf.data.packing._Pack.__call__", fail)
    second, _ = tokenize_and_pack(Dataset.load_from_disk(tmp_path / "corpus"), tokenizer, 32)
    assert second.to_list() == first.to_list()
    with pytest.raises(AssertionError, match="again"):
        tokenize_and_pack(Dataset.load_from_disk(tmp_path / "corpus"), tokenizer, 31)


def test_transformers_keeps_attention_inside_the_documents_of_a_row(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    packed, _ = tokenize_and_pack(documents(30, seed=4, longest=10), tokenizer, 40)
    row = {name: torch.tensor([packed[0][name]]) for name in ("input_ids", "position_ids", "labels")}
    with torch.no_grad():
        together = model(**row, use_cache=False)
        starts = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
        alone = [model(ids[None], use_cache=False).logits[0] for ids in row["input_ids"][0].tensor_split(starts[1:])]
        losses = [
            torch.nn.functional.cross_entropy(logits[:-1], row["input_ids"][0, start + 1 : start + len(logits)])
            * (len(logits) - 1)
            for start, logits in zip(starts, alone, strict=True)
        ]
    assert len(starts) > 2
    torch.testing.assert_close(together.logits[0], torch.cat(alone), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.loss, sum(losses) / (40 - len(starts)), atol=1e-5, rtol=1e-4)


def test_a_source_too_small_for_a_row_is_reported(tokenizer, caplog):
    rows = [
        {"text": "alpha beta " * 50, "source": "big", "domain": "code"},
        {"text": "12", "source": "tiny", "domain": "math"},
    ]
    packed, report = tokenize_and_pack(Dataset.from_list(rows), tokenizer, 24)
    assert set(packed["source"]) == {"big"}
    assert "tiny has only 3 tokens" in caplog.text
    assert report.sources[1].tail_tokens == 3
    with pytest.raises(ValueError, match="lower seq_length"):
        tokenize_and_pack(Dataset.from_list(rows), tokenizer, 10_000)


def test_input_that_cannot_be_packed_is_refused(tokenizer):
    dataset = documents(5)
    with pytest.raises(TypeError, match="DatasetDict.*choose a split"):
        tokenize_and_pack(DatasetDict(train=dataset), tokenizer, 8)
    with pytest.raises(TypeError, match="without streaming"):
        tokenize_and_pack(dataset.to_iterable_dataset(), tokenizer, 8)
    with pytest.raises(ValueError, match="domain.*'text', 'source'"):
        tokenize_and_pack(dataset.remove_columns("domain"), tokenizer, 8)
    with pytest.raises(ValueError, match="no documents"):
        tokenize_and_pack(dataset.select([]), tokenizer, 8)
    with pytest.raises(ValueError, match="at least 2.*is 1"):
        tokenize_and_pack(dataset, tokenizer, 1)
    endless = train_tokenizer(["alpha"], 320, show_progress=False)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize_and_pack(dataset, endless, 8)


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused_before_any_work(tokenizer):
    config = LlamaConfig(vocab_size=len(tokenizer) - 1)
    empty = Dataset.from_dict({"text": [], "source": [], "domain": []})
    with pytest.raises(ValueError, match=f"vocab_size is {len(tokenizer) - 1}"):
        tokenize_and_pack(empty, tokenizer, 16, config=config)
