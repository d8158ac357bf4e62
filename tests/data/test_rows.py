"""Rows from lists of named sources: text that is packed, saved rows as they are, and misspelt entries."""

import pytest
from datasets import Dataset, DatasetDict

from mobilellm_hf import MobileLLMConfig
from mobilellm_hf.data.corpora import CorpusError
from mobilellm_hf.data.rows import check_entries, load_rows
from mobilellm_hf.data.tokenization import train_tokenizer

CONFIG = MobileLLMConfig(vocab_size=512)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn from, " * 30, "def f(x): return x"], 300, show_progress=False)


@pytest.fixture
def saved(tmp_path):
    def rows(source: str, count: int) -> list[dict]:
        return [{"input_ids": [n] * 8, "labels": [n] * 8, "position_ids": [*range(8)], "source": source}
                for n in range(count)]  # fmt: skip

    train = Dataset.from_list(rows("a", 5) + rows("b", 7) + rows("c", 2))
    DatasetDict({"train": train, "probe": train.select(range(3))}).save_to_disk(tmp_path / "rows")
    return str(tmp_path / "rows")


def test_saved_rows_are_chosen_by_split_and_source(saved):
    assert len(load_rows([{"rows": saved}], None, 8, CONFIG)) == 14
    assert load_rows([{"rows": saved, "split": "probe"}], None, 8, CONFIG)["source"][:] == ["a"] * 3
    chosen = load_rows([{"rows": saved, "sources": ["c", "a"]}], None, 8, CONFIG)
    assert chosen["source"][:] == ["a"] * 5 + ["c"] * 2
    with pytest.raises(CorpusError, match="no split 'test'. Its splits: train, probe"):
        load_rows([{"rows": saved, "split": "test"}], None, 8, CONFIG)
    with pytest.raises(CorpusError, match="no source 'd'. Its sources: a, b, c"):
        load_rows([{"rows": saved, "sources": ["d"]}], None, 8, CONFIG)


def test_text_is_tokenized_and_packed_and_stands_beside_saved_rows(saved, tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("some words to learn from, " * 40)
    entries = [{"name": str(tmp_path / "notes.txt"), "domain": "knowledge"}, {"rows": saved, "sources": ["b"]}]
    rows = load_rows(entries, tokenizer, 8, CONFIG)
    assert list(dict.fromkeys(rows["source"][:])) == ["notes", "b"]
    assert {len(ids) for ids in rows["input_ids"][:]} == {8}
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<|begin_of_text|>some words")
    with pytest.raises(ValueError, match="is text: name the tokenizer"):
        load_rows(entries, None, 8, CONFIG)


def test_a_random_choice_of_each_source_is_a_function_of_the_seed(saved):
    first, again, other = (load_rows([{"rows": saved}], None, 8, CONFIG, 3, seed) for seed in (1, 1, 2))
    assert first["source"][:] == ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    assert first["input_ids"][:] == again["input_ids"][:] != other["input_ids"][:]
    assert len({tuple(ids) for ids in first["input_ids"][3:6]}) == 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], r"sources must be a list of sources such as"),
        ({"name": "embedded"}, "sources must be a list"),
        ([{"name": "embedded"}, "embedded"], r"sources\[1\] must have either a name .* or rows"),
        ([{"name": "embedded", "rows": "x"}], r"sources\[0\] must have either"),
        (
            [{"name": "embedded", "text_colunm": "x"}],
            r"sources\[0\] has the field 'text_colunm'; it may have",
        ),
        ([{"rows": "nowhere/rows"}], r"sources\[0\]: there is no folder nowhere/rows"),
    ],
)
def test_misspelt_entries_are_refused_by_place_and_field(entries, message):
    with pytest.raises(ValueError, match=message):
        check_entries("sources", entries)
