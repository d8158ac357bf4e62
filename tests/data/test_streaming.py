"""Rows packed on the fly against `tokenize_and_pack`, in order and out of it, and in workers of a DataLoader."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, interleave_datasets
from torch.utils.data import DataLoader

from mobilellm_hf import MobileLLMConfig
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.streaming import PackedStream
from mobilellm_hf.data.tokenization import train_tokenizer

WORDS = ["alpha", "beta", "12", "+", "for", "in", "\n"]


def documents(count: int, seed: int = 0, longest: int = 60) -> Dataset:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(0, longest))) for _ in range(count)]
    return Dataset.from_dict({"text": texts, "source": ["web"] * count, "domain": ["code"] * count})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(100)["text"], 300, show_progress=False)


def packed(dataset, tokenizer, seq_length, **options):
    rows, report = tokenize_and_pack(dataset, tokenizer, seq_length, **options)
    return rows.remove_columns(["source", "domain"]).to_list(), report


def as_lists(rows):
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("seq_length", "longest"), [(2, 5), (7, 60), (64, 3), (128, 600)])
def test_equals_what_is_packed_in_one_piece(tokenizer, seq_length, longest, isolate, monkeypatch):
    monkeypatch.setattr("mobilellm_hf.data.streaming.DOCUMENTS_PER_BATCH", 7)
    dataset = documents(90, seq_length, longest)
    expected, report = packed(dataset, tokenizer, seq_length, isolate_documents=isolate)
    stream = PackedStream(dataset.to_iterable_dataset(), tokenizer, seq_length, isolate)
    rows = list(stream)
    assert {values.dtype for row in rows for values in row.values()} == {np.dtype("int32")}
    assert as_lists(rows) == expected
    assert (stream.report, stream.source) == (report, "web")
    assert as_lists(stream) == expected  # from the first document again
    assert as_lists(stream.rows(range(len(expected)))) == expected


def test_rows_by_number_read_no_more_than_they_must(tokenizer, monkeypatch):
    dataset = documents(200, 1)
    expected, _ = packed(dataset, tokenizer, 16)
    stream = PackedStream(dataset.to_iterable_dataset(), tokenizer, 16, window=4)
    opened = []
    one_pass = PackedStream._one_pass
    monkeypatch.setattr(PackedStream, "_one_pass", lambda self, n: opened.append(n) or one_pass(self, n))
    assert as_lists(stream.rows([0, 3, 4, 10])) == [expected[n] for n in (0, 3, 4, 10)]
    assert as_lists(stream.rows([7, 10, 8, 11])) == [expected[n] for n in (7, 10, 8, 11)]
    assert opened == [0]
    assert as_lists(stream.rows([7])) == [expected[7]]
    assert opened == [0, 0]
    with pytest.raises(IndexError, match="There is no row -1"):
        stream.rows([-1])


def test_the_end_of_a_stream_is_an_error_unless_it_repeats(tokenizer, monkeypatch):
    dataset = documents(40, 2)
    expected, report = packed(dataset, tokenizer, 32)
    count = len(expected)
    once = PackedStream(dataset.to_iterable_dataset(), tokenizer, 32)
    for _ in range(2):
        with pytest.raises(
            IndexError, match=rf"web has {count:,} rows of 32 tokens: there is no row {count}. .*repeat"
        ):
            once.rows([0, count])
    assert once.passes == 1 and as_lists(once.rows([count - 1])) == [expected[-1]]
    again = PackedStream(dataset.to_iterable_dataset(), tokenizer, 32, repeat=True)
    wanted = [0, count - 1, count, 2 * count + 3]
    assert as_lists(again.rows(wanted)) == [expected[n % count] for n in wanted]
    assert again.passes == 2 and again.report == report
    # Anew, and at once to a pass whose start is now known.
    far = pickle.loads(pickle.dumps(again))
    assert as_lists(far.rows([5 * count + 2])) == [expected[2]]
    opened = []
    one_pass = PackedStream._one_pass
    monkeypatch.setattr(PackedStream, "_one_pass", lambda self, n: opened.append(n) or one_pass(self, n))
    assert as_lists(pickle.loads(pickle.dumps(again)).rows([5 * count + 2, 7 * count])) == [expected[2], expected[0]]
    assert opened == [5, 6, 7]
    assert as_lists(again.rows([1, 5 * count + 2])) == [expected[1], expected[2]]
    assert again.passes == 5
    endless = iter(again)
    assert as_lists([next(endless) for _ in range(count + 2)]) == [*expected, *expected[:2]]


def test_a_shuffled_stream_has_the_same_order_each_time_it_is_read_and_another_in_the_next_pass(tokenizer):
    dataset = documents(60, 3)

    def open_stream():
        shuffled = dataset.to_iterable_dataset(num_shards=3).shuffle(seed=5, buffer_size=20)
        return PackedStream(shuffled, tokenizer, 16, repeat=True)

    stream = open_stream()
    count = len(list(PackedStream(dataset.to_iterable_dataset(), tokenizer, 16)))
    first, second = as_lists(stream.rows(range(count))), as_lists(stream.rows(range(count, 2 * count)))
    assert first != second != packed(dataset, tokenizer, 16)[0]
    assert sorted(i for row in first for i in row["input_ids"])[:50] == [
        *sorted(i for row in second for i in row["input_ids"])[:50]
    ]
    assert as_lists(stream.rows(range(count))) == first
    other = open_stream()
    assert as_lists(other.rows(range(count, 2 * count))) == second
    assert as_lists(other.rows(range(count))) == first


def test_a_stream_of_several_is_packed_as_one(tokenizer):
    parts = [documents(20, seed) for seed in (4, 5)]
    joined = interleave_datasets(
        [part.to_iterable_dataset() for part in parts], stopping_strategy="all_exhausted_without_replacement"
    )
    texts = [text for pair in zip(parts[0]["text"], parts[1]["text"], strict=True) for text in pair]
    in_turn = Dataset.from_dict({"text": texts, "source": ["web"] * 40, "domain": ["code"] * 40})
    assert as_lists(PackedStream(joined, tokenizer, 16)) == packed(in_turn, tokenizer, 16)[0]


def unbuffered_lines(path):
    """Documents from a file of which a process that was forked while it was read would take the next."""
    with open(path, "rb", buffering=0) as file:
        while line := file.readline():
            yield json.loads(line)


class Draws(torch.utils.data.Dataset):
    """As a mixture takes rows: by number, in the workers of a DataLoader."""

    def __init__(self, stream, count):
        self.stream, self.count = stream, count

    def __len__(self):
        return self.count

    def __getitems__(self, indices):
        return [{"input_ids": torch.from_numpy(row["input_ids"])} for row in self.stream.rows(indices)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_each_worker_of_a_loader_reads_the_whole_stream(tokenizer, tmp_path, context):
    dataset = documents(120, 6)
    dataset.to_json(tmp_path / "part.jsonl")
    expected = [row["input_ids"] for row in packed(dataset, tokenizer, 16)[0]]
    source = IterableDataset.from_generator(unbuffered_lines, gen_kwargs={"path": str(tmp_path / "part.jsonl")})
    stream = PackedStream(source, tokenizer, 16, repeat=True)
    stream.rows([3])  # opened in the parent, at a place that no worker must go on from
    draws = Draws(stream, len(expected) + 20)
    loader = DataLoader(draws, batch_size=8, num_workers=2, multiprocessing_context=context)
    rows = torch.cat([batch["input_ids"] for batch in loader]).tolist()
    assert rows == [*expected, *expected[:20]]
    assert stream.rows([4])[0]["input_ids"].tolist() == expected[4]


def test_what_is_pickled_starts_anew(tokenizer):
    stream = PackedStream(documents(40, 7).to_iterable_dataset(), tokenizer, 16)
    first = as_lists(stream.rows([0, 9]))
    copy = pickle.loads(pickle.dumps(stream))
    assert as_lists(copy.rows([0, 9])) == first
    assert as_lists(stream.rows([9])) == first[1:]


class Failing:
    """A document's text, whose source breaks off once: a lost connection."""

    def __init__(self, path):
        self.path = path

    def __call__(self, row, index):
        if index == 90 and not self.path.exists():
            self.path.touch()
            raise ConnectionError("lost")
        return row


def test_a_stream_that_breaks_off_can_be_asked_again(tokenizer, tmp_path):
    dataset = documents(120, 8)
    expected, _ = packed(dataset, tokenizer, 16)
    broken = dataset.to_iterable_dataset().map(Failing(tmp_path / "failed"), with_indices=True)
    stream = PackedStream(broken, tokenizer, 16)
    with pytest.raises(ConnectionError):
        stream.rows([len(expected) - 1])
    assert as_lists(stream.rows([len(expected) - 1])) == expected[-1:]


def test_what_cannot_be_packed_is_refused(tokenizer):
    dataset = documents(20)
    stream = dataset.to_iterable_dataset()
    with pytest.raises(TypeError, match="PackedStream reads a stream, not a Dataset: load with streaming=True"):
        PackedStream(dataset, tokenizer, 16)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        PackedStream(stream, tokenizer, 16, config=MobileLLMConfig(vocab_size=100))
    with pytest.raises(ValueError, match="seq_length must be at least 2"):
        PackedStream(stream, tokenizer, 1)
    with pytest.raises(ValueError, match="web has only .* tokens: no row of 100,000. Lower seq_length"):
        PackedStream(stream, tokenizer, 100_000, repeat=True).rows([0])
    with pytest.raises(ValueError, match="column.*source, domain"):
        list(PackedStream(stream.select_columns("text"), tokenizer, 16))
    with pytest.raises(ValueError, match="no documents"):
        list(PackedStream(stream.filter(lambda row: False), tokenizer, 16))
    two = Dataset.from_list([*documents(3), {"text": "alpha", "source": "books", "domain": "code"}])
    with pytest.raises(ValueError, match="web of code and books of code: load them one by one"):
        list(PackedStream(two.to_iterable_dataset(), tokenizer, 16))
