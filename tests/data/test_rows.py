"""Rows from lists of named sources: text that is packed, saved rows as they are, and misspelt entries."""

import re

import pytest
from datasets import Dataset, DatasetDict

from mobilellm_hf import MobileLLMConfig
from mobilellm_hf.data.corpora import CorpusError
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.rows import check_entries, load_rows, load_sources
from mobilellm_hf.data.source_weights import source_weights
from mobilellm_hf.data.streaming import PackedStream
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
        ([{"name": "a.txt", "text_colum": "x"}], r"sources\[0\] has the field 'text_colum'.*Did you mean text_column"),
        ([{"name": "a.txt", "weight": 1}], r"sources\[0\] has the field 'weight'"),
        ([{"catalog": "finemth"}], r"sources\[0\]: The catalog has no source 'finemth'. Did you mean finemath"),
        ([{"catalog": "tulu3"}], r"sources\[0\]: tulu3 is chat, not text"),
        ([{"catalog": "arxiv"}], r"sources\[0\]: arxiv cannot be loaded by its name"),
        ([{"catalog": "wiki", "rows": "x"}], r"sources\[0\] must have either"),
        ([{"catalog": "wiki", "sources": ["x"]}], r"sources\[0\] has the field 'sources'"),
        ([{"rows": "x", "exclude": "y"}], r"sources\[0\] has the field 'exclude'; it may have rows, split, sources"),
        ([{"name": "a.txt", "exclude": "nowhere.jsonl"}], r"sources\[0\]: There is no file nowhere.jsonl"),
        ([{"catalog": "wiki", "exclude": []}], r"sources\[0\]: exclude must be a folder or file of texts"),
        ([{"name": "a.txt", "exclude": {"path": "x"}}], r"sources\[0\]: exclude must be a folder or file of texts"),
    ],
)
def test_misspelt_entries_are_refused_by_place_and_field(entries, message):
    with pytest.raises(ValueError, match=message):
        check_entries("sources", entries)


LINE = "some words to learn from, number {} of this little file, which is long enough to be kept as a document"


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Two files of documents."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, numbers in (("even", range(0, 60, 2)), ("odd", range(1, 60, 2))):
        Dataset.from_list([{"text": LINE.format(n)} for n in numbers]).to_json(tmp_path / f"{name}.jsonl")
    return tmp_path


def test_a_source_of_the_catalog_is_loaded_with_overrides(lines, tokenizer):
    check_entries(
        "sources", [{"catalog": "cosmopedia", "name": "x.jsonl"}, {"catalog": "gsm8k", "split": "train[:1%]"}]
    )
    rows = load_rows([{"catalog": "wiki", "name": str(lines / "even.jsonl")}], tokenizer, 16, CONFIG)
    assert set(rows["source"]) == {"wiki"}
    assert "number 58 of this" in "".join(tokenizer.batch_decode(rows["input_ids"][:]))


def test_streams_stand_beside_rows_and_one_source_is_one_stream(lines, tokenizer, saved):
    entries = [
        {"name": str(lines / f"{name}.jsonl"), "source": "numbers", "streaming": True} for name in ("even", "odd")
    ]
    entries += [{"rows": saved}, {"name": str(lines / "odd.jsonl")}]
    found = load_sources(entries, tokenizer, 8, CONFIG)
    assert list(found) == ["a", "b", "c", "odd", "numbers"]
    assert [len(found[name]) for name in ("a", "b", "c")] == [5, 7, 2] and set(found["b"]["source"]) == {"b"}
    stream = found["numbers"]
    assert isinstance(stream, PackedStream) and stream.repeat
    in_turn = [{"text": LINE.format(n), "source": "numbers", "domain": "unknown"} for n in range(60)]
    expected = tokenize_and_pack(Dataset.from_list(in_turn), tokenizer, 8)[0]
    everything = stream.rows(range(len(expected)))
    assert [row["input_ids"].tolist() for row in everything] == expected["input_ids"][:]
    shuffled = load_sources(entries, tokenizer, 8, CONFIG, shuffle_buffer=10, seed=1)["numbers"].rows(range(99))
    assert [row["input_ids"].tolist() for row in shuffled] != expected["input_ids"][:99]
    with pytest.raises(ValueError, match="numbers is given both as a stream and as rows"):
        load_sources([entries[0], {**entries[1], "streaming": False}], tokenizer, 8, CONFIG)


def test_of_a_stream_the_first_rows_are_taken(lines, tokenizer):
    entries = [{"name": str(lines / "odd.jsonl"), "streaming": True}]
    in_one_piece = load_rows([{"name": str(lines / "odd.jsonl")}], tokenizer, 8, CONFIG)
    assert load_rows(entries, tokenizer, 8, CONFIG, rows_per_source=5).to_list() == in_one_piece.to_list()[:5]
    assert load_rows(entries, tokenizer, 8, CONFIG, rows_per_source=10_000).to_list() == in_one_piece.to_list()
    with pytest.raises(ValueError, match="odd is read as a stream, .* streaming: false and a part of it"):
        load_rows(entries, tokenizer, 8, CONFIG)


def test_a_weighted_entry_is_one_source_even_if_its_rows_say_more(lines, tokenizer):
    rows = [{"text": LINE.format(n), "source": f"s{n % 2}", "domain": "code"} for n in range(20)]
    Dataset.from_list(rows).to_json(lines / "mixed.jsonl")
    entries = [{"name": str(lines / "mixed.jsonl"), "weight": 1.0}]
    check_entries("sources", entries, weights=True)
    assert set(load_rows(entries, tokenizer, 8, CONFIG)["source"]) == set(source_weights(entries)) == {"mixed"}


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_that_probes_hold_are_excluded_before_they_are_tokenized(lines, tokenizer, streaming, caplog):
    (lines / "probes").mkdir()
    Dataset.from_dict({"text": [LINE.format(n) for n in (0, 8)]}).to_parquet(lines / "probes" / "code.parquet")
    # White space and what surrounds a document are nothing; the other documents share one of eight 13-grams with it.
    around = f"To begin with. {LINE.format(10)} And more.".replace(" ", "\n ")
    Dataset.from_dict({"text": [around]}).to_json(lines / "math.jsonl")
    entry = {"name": str(lines / "even.jsonl"), "streaming": streaming}
    excluding = {**entry, "exclude": [str(lines / "probes"), str(lines / "math.jsonl")]}
    check_entries("sources", [excluding], weights=True)

    def numbers(entry: dict) -> list[int]:
        rows = load_rows([entry], tokenizer, 16, CONFIG, rows_per_source=1_000)
        return sorted(map(int, re.findall(r"number (\d+) of", "".join(tokenizer.batch_decode(rows["input_ids"][:])))))

    # The last row of a stream may be short of its end.
    assert {0, 8, 10} < set(numbers(entry))
    with caplog.at_level("INFO", "mobilellm_hf.data.ngrams"):
        assert set(numbers(entry)) - set(numbers(excluding)) == {0, 8, 10}
    assert f"even.jsonl: 3 {'documents' if streaming else 'of 30 documents'}" in caplog.text


@pytest.mark.parametrize("form", ["folder", "files", "pattern", "saved", "one file"])
def test_each_file_of_probes_is_a_set_by_itself(tmp_path, tokenizer, form, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    halves = [" ".join(f"{half}{n}" for n in range(80)) for half in ("left", "right")]
    # Each half has 68 of 160 13-grams of the first document; of the second, the left half has 68 of 108.
    documents = ["both " + " ".join(halves) + " to keep here", f"mostly {halves[0]} " + "and so on " * 13]
    Dataset.from_dict({"text": [*documents, LINE.format(1)]}).to_json(tmp_path / "documents.jsonl")
    probes = tmp_path / "probes"
    probes.mkdir()
    for name, texts in {"one": halves, "two": []}.items() if form == "one file" else zip("ab", zip(halves)):
        probe = Dataset.from_dict({"text": list(texts)})
        if form == "saved":
            probe.save_to_disk(probes / name)
        elif len(probe):
            probe.to_parquet(probes / f"{name}.parquet")
    files = sorted(map(str, probes.iterdir()))
    exclude = {"files": files + files[:1], "saved": files, "pattern": str(probes / "*.parquet")}.get(form, str(probes))
    entry = {"name": str(tmp_path / "documents.jsonl"), "exclude": exclude}
    check_entries("sources", [entry])
    rows = load_rows([entry], tokenizer, 16, CONFIG, rows_per_source=1_000)
    text = "".join(tokenizer.batch_decode(rows["input_ids"][:]))
    assert "mostly" not in text
    assert ("both" in text) == (form != "one file")


def test_an_entry_of_which_nothing_is_left_is_an_error(lines, tokenizer):
    entry = {"name": str(lines / "even.jsonl"), "exclude": str(lines / "even.jsonl")}
    with pytest.raises(CorpusError, match=r"nothing is left of .*even.jsonl: .*even.jsonl holds all of it"):
        load_rows([entry], tokenizer, 16, CONFIG)
    with pytest.raises(CorpusError, match="no column 'text'"):
        Dataset.from_dict({"body": ["x"]}).to_parquet(lines / "wrong.parquet")
        load_rows([{**entry, "exclude": str(lines / "wrong.parquet")}], tokenizer, 16, CONFIG)
