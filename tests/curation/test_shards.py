"""Scores in shards: what is whole stays, what is torn or another's is made anew, vectors are read as asked for."""

import random

import numpy as np
import pyarrow as pa
import pytest
from curation_cases import WordScorer, documents, save_judge, word_score
from datasets import Dataset

from mobilellm_hf.curation.scoring import (
    Rate,
    documents_key,
    key_of,
    length_batches,
    model_identity,
    score_documents,
    sources_of,
)


class TwoColumns(WordScorer):
    """A score and a vector of three numbers a text."""

    def score(self, texts, sources, on_documents=None):
        column = super().score(texts, sources, on_documents)["score"]
        return {"score": column, "vector": np.stack([column, -column, column + 1], 1).astype(np.float16)}


def score(data, scorer, folder, key="k", per_shard=10, rate=None) -> np.ndarray:
    return score_documents(data, scorer, folder, key, per_shard, rate or Rate()).column("score")


@pytest.mark.parametrize("count", [1, 10, 34])
def test_columns_and_vectors_come_back(count, tmp_path):
    data = documents(count)
    expected = np.array([word_score(text) for text in data["text"]], np.float32)
    scores = score_documents(data, TwoColumns(), tmp_path, "k", 10, Rate())
    np.testing.assert_array_equal(scores.column("score"), expected)
    vectors, whole = scores.vectors("vector"), np.stack([expected, -expected, expected + 1], 1).astype(np.float16)
    assert len(vectors) == count and len(list(tmp_path.iterdir())) == -(-count // 10)
    chosen = np.random.default_rng(0).integers(0, count, 50)
    for rows in (chosen, chosen.tolist(), slice(None), [count - 1], [0, 0]):
        np.testing.assert_array_equal(vectors[rows], whole[rows].astype(np.float32))


def test_whole_shards_stay_and_others_are_made_anew(tmp_path):
    data = documents(34)
    expected = score(data, WordScorer(), tmp_path)
    files = sorted(tmp_path.iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    scorer, counted = WordScorer(), []
    np.testing.assert_array_equal(score(data, scorer, tmp_path, rate=Rate(counted.append)), expected)
    assert scorer.scored == 0 and sum(counted) == 34
    files[1].write_bytes(files[1].read_bytes()[:-30])
    files[2].write_bytes(b"")
    files[3].unlink()
    np.testing.assert_array_equal(score(data, scorer, tmp_path, rate=Rate(counted.append)), expected)
    assert scorer.scored == 24 and sum(counted) == 68
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, before)] == [True, False, False, False]
    assert not list(tmp_path.glob("*.partial"))


def test_another_key_or_another_size_is_scored_again(tmp_path):
    data = documents(34)
    score(data, WordScorer(), tmp_path)
    for arguments in ({"key": "other"}, {"key": "other", "per_shard": 7}):
        scorer = WordScorer()
        found = score(data, scorer, tmp_path, **arguments)
        assert scorer.scored > 20 and found.tolist() == [np.float32(word_score(text)) for text in data["text"]]


def test_a_shard_of_another_size_is_not_taken_for_one_of_this(tmp_path):
    """The last of the larger shards has as many documents as a smaller one in the middle."""
    data = documents(30)
    score(data, WordScorer(), tmp_path, per_shard=20)
    found = score(data, WordScorer(), tmp_path, per_shard=10)
    assert found.tolist() == [np.float32(word_score(text)) for text in data["text"]]


def test_the_key_of_documents_is_of_texts_and_sources_in_order():
    data = documents(20)
    key = documents_key(data)
    assert documents_key(data.remove_columns("domain")) == key
    assert documents_key(data.select([*range(10), *range(10, 20)])) == key
    rows = data.to_list()
    swapped = [rows[1], rows[0], *rows[2:]]
    renamed = [rows[0] | {"source": rows[0]["source"] + "x"}, *rows[1:]]
    text, source = rows[0]["text"], rows[0]["source"]
    moved = [rows[0] | {"text": text + source[0], "source": source[1:]}, *rows[1:]]  # between the two
    keys = [documents_key(Dataset.from_list(changed)) for changed in (swapped, renamed, moved, rows[:-1])]
    assert len({key, *keys}) == 5
    assert key_of("a", "b") != key_of("ab") and key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_a_models_identity_is_its_weights(tmp_path):
    folder = save_judge(tmp_path / "judge")
    before = model_identity(folder)
    assert before == model_identity(str(folder)) and model_identity("org/m", "v1") != model_identity("org/m", "v2")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert model_identity(folder) != before
    file.write_bytes(whole)
    assert model_identity(folder) == before
    (folder / "tokenizer.json").write_text("{}")
    assert model_identity(folder) != before
    (folder / "more.safetensors").write_bytes(bytes(3 * 2**20))  # of which the middle is not read
    before = model_identity(folder)
    (folder / "more.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert model_identity(folder) != before


def test_sources_are_numbered():
    numbers, names = sources_of(documents(30))
    assert [names[number] for number in numbers] == documents(30)["source"][:]
    part = documents(30).select([7, 3, 20])  # through an index, as after a step
    numbers, names = sources_of(part)
    assert [names[number] for number in numbers] == part["source"][:]


def test_batches_hold_every_document_once_and_no_more_than_they_may():
    chance = random.Random(0)
    for _ in range(50):
        lengths = [chance.randint(0, 60) for _ in range(chance.randint(0, 40))]
        batches = list(length_batches(lengths, 100))
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        sizes = [max(lengths[index] for index in batch) * len(batch) for batch in batches]
        assert all(size <= 100 for size in sizes)
        longest = [lengths[batch[0]] for batch in batches]
        assert longest == sorted(longest, reverse=True)
        # No batch could have taken the next document too.
        assert all(top * (len(batch) + 1) > 100 for top, batch in zip(longest[:-1], batches[:-1]))
    assert list(length_batches([500, 3], 100)) == [[0], [1]]


def test_the_rate_is_of_what_was_scored():
    said, counted = [], []
    rate = Rate(counted.append, said.append)
    rate.found(1_000_000)
    rate.begin()
    rate.scored(3)
    assert counted == [1_000_000, 3] and len(said) == 1 and said[0].endswith(" documents/s")


def test_a_shard_of_another_layout_is_no_shard(tmp_path):
    data = documents(5)
    file = tmp_path / "shard-000000.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("score", pa.float32())])) as writer:
        writer.write_table(pa.table({"score": np.zeros(5, np.float32)}))
    assert score(data, WordScorer(), tmp_path).any()
