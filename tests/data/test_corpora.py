import gzip
import json
import sys
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from mobilellm_hf.data.corpora import CorpusError, load_corpus, split_by_hash
from mobilellm_hf.data.documents import cut_document

LONG = "This document number {} is long enough to be kept, having more than sixty-four letters in its only sentence."


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Loading writes to the cache of `datasets`; keep it out of the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def records(count, **extra):
    return [{"text": LONG.format(n), **extra} for n in range(count)]


def texts(count):
    return [LONG.format(n) for n in range(count)]


def write_every_format(folder):
    write_lines(folder / "a.jsonl", records(3))
    (folder / "b.json").write_text(json.dumps(records(3), indent=1))
    Dataset.from_list(records(3)).to_parquet(folder / "c.parquet")
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in records(3))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.parquet", "d.jsonl.gz"])
def test_every_format_gives_the_same_rows(folder, name, streaming):
    write_every_format(folder)
    corpus = load_corpus(str(folder / name), domain="math", streaming=streaming)
    assert isinstance(corpus, IterableDataset) == streaming
    assert list(corpus) == [{"text": text, "source": name[0], "domain": "math"} for text in texts(3)]


def test_a_text_file_is_one_document_unless_told_otherwise(folder):
    lines = [LONG.format("\u00e9"), LONG.format(2), "", LONG.format(3)]
    (folder / "notes.txt").write_text("\n".join(lines), encoding="utf-8")
    name = str(folder / "notes.txt")
    assert load_corpus(name)["text"][:] == ["\n".join(lines)]
    assert load_corpus(name, sample_by="line")["text"][:] == [lines[0], lines[1], lines[3]]
    assert load_corpus(name, sample_by="paragraph").num_rows == 2


def test_folders_and_patterns(folder):
    (folder / "deep").mkdir()
    write_lines(folder / "one.jsonl", records(2))
    write_lines(folder / "deep" / "two.jsonl", records(5))
    assert sorted(load_corpus(str(folder))["text"]) == texts(5)
    assert sorted(load_corpus(str(folder / "*.jsonl"))["text"]) == texts(2)
    corpus = load_corpus(str(folder / "**" / "*.jsonl"))
    assert sorted(corpus["text"]) == texts(5)
    assert set(corpus["source"]) == {"files"}
    (folder / "three.txt").write_text(LONG)
    with pytest.raises(CorpusError, match=r"mixes the formats \.jsonl, \.txt"):
        load_corpus(str(folder))


def test_names_with_brackets_are_files(folder):
    assert load_corpus(write_lines(folder / "part[1].jsonl", records(2))).num_rows == 2


def test_text_column_source_and_domain(folder):
    rows = [{"body": text, "text": "not this", "source": "own", "n": 1} for text in texts(2)]
    name = write_lines(folder / "posts.jsonl", rows)
    assert load_corpus(name, text_column="body")[0] == {"text": texts(1)[0], "source": "posts", "domain": "unknown"}
    name = write_lines(folder / "own.jsonl", records(2, source="own", domain="code"))
    assert load_corpus(name)[0]["source"] == "own"
    assert load_corpus(name, source="mine")[0] == {"text": texts(1)[0], "source": "mine", "domain": "code"}


def test_empty_and_repeated_rows_are_dropped(folder):
    text = LONG.format(0)
    values = [text, None, "", "  short  ", text.replace(" ", "  \n"), text, LONG.format(1)]
    name = write_lines(folder / "rows.jsonl", [{"text": value} for value in values])
    assert load_corpus(name)["text"][:] == texts(2)
    assert load_corpus(name, min_characters=5)["text"][:] == [text, "  short  ", LONG.format(1)]
    # A stream cannot know what it will have seen: it only drops what is nearly empty.
    assert len(list(load_corpus(name, streaming=True))) == 4


def test_saved_data_sets(folder):
    rows = Dataset.from_list(records(4, source="own", domain="code"))
    rows.save_to_disk(folder / "single")
    DatasetDict(train=rows, test=rows.select([3])).save_to_disk(folder / "splits")
    assert load_corpus(str(folder / "single")).to_list() == rows.to_list()
    assert load_corpus(str(folder / "splits"), split="test")["text"][:] == [LONG.format(3)]
    assert len(list(load_corpus(str(folder / "splits"), streaming=True))) == 4
    with pytest.raises(CorpusError, match="no split 'probe'. Its splits: train, test"):
        load_corpus(str(folder / "splits"), split="probe")


def test_the_embedded_corpus_by_name():
    corpus = load_corpus("embedded:codec_tables,licences", split="probe")
    assert set(corpus["source"]) == {"codec_tables", "licences"}
    assert set(corpus["domain"]) == {"code", "knowledge"}
    assert set(load_corpus("embedded:licences", source="mine", split="test")["source"]) == {"mine"}
    assert "codec" in next(iter(load_corpus("embedded:codec_tables", streaming=True)))["text"]
    with pytest.raises(CorpusError, match="nonsense.*stdlib"):
        load_corpus("embedded:nonsense")
    with pytest.raises(CorpusError, match="no split 'dev'. Its splits: train, probe, test"):
        load_corpus("embedded:licences", split="dev")


def test_a_missing_file_is_answered_with_close_names(folder):
    write_lines(folder / "train.jsonl", records(1))
    with pytest.raises(CorpusError, match="no file .*trian.jsonl.* Did you mean .*/train.jsonl?"):
        load_corpus(str(folder / "trian.jsonl"))
    with pytest.raises(CorpusError, match="Nor is there a folder .*nowhere"):
        load_corpus(str(folder / "nowhere" / "train.jsonl"))
    with pytest.raises(CorpusError, match="No file matches"):
        load_corpus(str(folder / "*.parquet"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("e.jsonl", b"", "e.jsonl is empty"),
        ("e.docx", b"PK", r"format \.docx cannot be read.*\.jsonl"),
        ("e.txt", b"fine\ncaf\xe9 \n", r"e\.txt is not UTF-8: byte 0xe9 at offset 8, line 2"),
        ("e.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "byte 0xff at offset 24, line 2"),
        ("e.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: Expecting value"),
        ("e.jsonl", b'{"text": "a"}\n["b"]\n', 'line 2 is a list, not an object such as {"text"'),
        ("e.jsonl", b'{"body": "a", "id": 1}\n', "no column 'text'. Its columns: body, id"),
        ("e.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2: the text column 'text' holds a int"),
        ("e.jsonl", b'{"text": ""}\n{"text": null}\n', "Nothing is left of .*none of its 2 rows has 64 characters"),
        ("e.json", b'[{"text": "a"},\n {"text" "b"}]', "line 2: Expecting ':' delimiter"),
        ("e.json", b'[{"body": "a"}]', "no column 'text'. Its columns: body"),
        ("e.json", b'[{"text": "a"}, 7]', "item 2 is a int"),
        ("e.parquet", b"not parquet", "e.parquet is not a readable parquet file"),
    ],
)
def test_bad_files_are_explained(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(str(folder / name))


def test_parquet_columns_are_checked(folder):
    Dataset.from_dict({"text": [[1, 2]], "id": ["a"]}).to_parquet(folder / "ids.parquet")
    with pytest.raises(CorpusError, match="'text' holds list.*text_column"):
        load_corpus(str(folder / "ids.parquet"))
    with pytest.raises(CorpusError, match="no column 'body'. Its columns: text, id"):
        load_corpus(str(folder / "ids.parquet"), text_column="body")


@pytest.mark.parametrize(
    "bad_line, message",
    [(b'{"text": "caf\xe9"}', "byte 0xe9 at offset .*, line 12001"), (b'{"text": ', "line 12001: Expecting value")],
)
def test_a_fault_beyond_the_checked_megabyte_is_still_located(folder, bad_line, message):
    good = b"".join(json.dumps(row).encode() + b"\n" for row in records(12_000))
    assert len(good) > 1 << 20
    (folder / "big.jsonl").write_bytes(good + bad_line + b"\n" + good)
    with pytest.raises(CorpusError, match=message):
        load_corpus(str(folder / "big.jsonl"))


def test_a_saved_data_set_without_the_text_column(folder):
    Dataset.from_dict({"question": ["a"], "answer": ["b"]}).save_to_disk(folder / "qa")
    with pytest.raises(CorpusError, match="no column 'text'. Its columns: question, answer"):
        load_corpus(str(folder / "qa"))


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="Could not load the Hub data set nobody/nothing.*HF_HUB_OFFLINE"):
        load_corpus("nobody/nothing")


def test_the_hub_gets_subset_split_and_revision(monkeypatch):
    asked = {}

    def load_dataset(name, subset, **options):
        asked.update(name=name, subset=subset, **options)
        return Dataset.from_dict({"content": texts(2), "meta": [{"a": 1}, {"a": 2}]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    corpus = load_corpus("org/fine-math", subset="4plus", revision="v1", split="test", text_column="content")
    assert asked == {"name": "org/fine-math", "subset": "4plus", "split": "test", "revision": "v1", "streaming": False}
    assert corpus[1] == {"text": LONG.format(1), "source": "fine-math", "domain": "unknown"}


def test_split_by_hash_keeps_groups_together_and_the_fractions():
    dataset = Dataset.from_list([{"id": n, "group": f"g{n % 500}", "source": "ab"[n % 2]} for n in range(2_000)])
    splits = split_by_hash(dataset, {"train": 0.7, "test": 0.3}, key="group", within="source")
    assert sorted([*splits["train"]["id"], *splits["test"]["id"]]) == list(range(2_000))
    assert not set(splits["train"]["group"]) & set(splits["test"]["group"])
    assert abs(splits["train"].num_rows - 1_400) <= 8
    assert all(600 <= count <= 800 for count in Counter(splits["train"]["source"]).values())
    shuffled = split_by_hash(dataset.shuffle(seed=1), {"train": 0.7, "test": 0.3}, key="group", within="source")
    assert set(shuffled["test"]["group"]) == set(splits["test"]["group"])


def test_split_by_hash_moves_few_keys_when_rows_are_added():
    dataset = Dataset.from_dict({"text": [str(n) for n in range(2_000)]})
    before = set(split_by_hash(dataset.select(range(1_000)))["train"]["text"])
    after = split_by_hash(dataset)
    moved = before & {*after["probe"]["text"], *after["test"]["text"]}
    assert len(moved) < 50


def test_split_by_hash_fills_every_split_of_a_small_source():
    sources = ["few"] * 3 + ["many"] * 100
    dataset = Dataset.from_dict({"text": [f"text {n}" for n in range(103)], "source": sources})
    splits = split_by_hash(dataset, within="source")
    assert [Counter(split["source"])["few"] for split in splits.values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="Cannot split few 4 ways: it has 3 distinct keys"):
        split_by_hash(dataset, dict.fromkeys("wxyz", 0.25), within="source")


def test_split_by_hash_refuses_bad_arguments():
    dataset = Dataset.from_dict({"text": list("abcdef")})
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_hash(dataset, {"train": 0.8, "test": 0.1})
    with pytest.raises(ValueError, match="Cannot split by module: .*'text'"):
        split_by_hash(dataset, key="module")


@pytest.mark.parametrize("limit", [10, 50, 4_000])
def test_pieces_of_a_document_join_to_it_and_end_at_lines(limit):
    text = "".join(f"line {n}\n" + "\n" * (n % 5 == 0) + "x" * (60 * (n % 7 == 0)) for n in range(200))
    pieces = cut_document(text, limit)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= limit
    longest_line = max(map(len, text.splitlines()))
    if limit > longest_line:
        assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_a_document_is_cut_at_the_last_blank_line_of_its_second_half():
    functions = ["def a():\n    return 1\n\n", "def b():\n    return 2\n\n", "def c():\n    return 3\n"]
    assert cut_document("".join(functions), len("".join(functions)) - 2) == ["".join(functions[:2]), functions[2]]
    assert cut_document("") == []


def join(row):
    return f"{row['question']} {LONG.format(row['answer'])}" if row["answer"] is not None else None


def shout(row):
    return row["question"] + (row["missing"] if row["answer"] == 2 else LONG)


def count(row):
    return row["answer"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_text_of_composes_the_text_from_several_columns(folder, name, streaming):
    rows = Dataset.from_list([{"question": f"q{n}", "answer": n, "source": "own"} for n in range(3)])
    rows = rows.map(lambda row: {"answer": None if row["answer"] == 1 else row["answer"]})
    rows.to_json(folder / name) if name.endswith("jsonl") else rows.to_parquet(folder / name)
    corpus = load_corpus(str(folder / name), text_of=join, domain="math", streaming=streaming)
    assert list(corpus) == [
        {"text": f"q{n} {LONG.format(n)}", "source": "pairs", "domain": "math"} for n in (0, 2)
    ]  # fmt: skip


def test_text_of_that_fails_names_the_row_and_the_columns(folder):
    name = write_lines(folder / "pairs.jsonl", [{"question": f"q{n}", "answer": n} for n in range(3)])
    for streaming in (False, True):
        with pytest.raises(CorpusError, match=r"pairs.jsonl, row 2 \(columns: question, answer\): .*KeyError: 'missi"):
            list(load_corpus(name, text_of=shout, streaming=streaming))
    with pytest.raises(CorpusError, match="row 0 .* returned a int, not a string"):
        load_corpus(name, text_of=count)
    with pytest.raises(CorpusError, match="text_of must pickle: define it at the top level"):
        load_corpus(name, text_of=lambda row: row["question"])
    with pytest.raises(CorpusError, match="text_of must be a function .*'question'"):
        load_corpus(name, text_of="question")


def test_data_files_choose_files_of_a_local_folder(folder):
    (folder / "deep").mkdir()
    write_lines(folder / "deep" / "a.jsonl", records(2))
    with gzip.open(folder / "deep" / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": LONG.format(5)}))
    (folder / "notes.md").write_text(LONG)
    corpus = load_corpus(str(folder), data_files=["deep/*.jsonl", "deep/b*.gz"])
    assert sorted(corpus["text"]) == [*texts(2), LONG.format(5)]
    with pytest.raises(CorpusError, match="No file of the folder .* matches 'deep/c"):
        load_corpus(str(folder), data_files=["deep/*.jsonl", "deep/c*"])
    with pytest.raises(CorpusError, match="mixes the formats .jsonl, .md"):
        load_corpus(str(folder), data_files=["deep/a.jsonl", "*.md"])
    with pytest.raises(CorpusError, match="data_files must be a list"):
        load_corpus(str(folder), data_files="*.md")
    with pytest.raises(CorpusError, match="data_files or a subset .en., not both"):
        load_corpus("someone/else", data_files=["*.md"], subset="en")
    with pytest.raises(CorpusError, match="embedded corpus has no data_files"):
        load_corpus("embedded:stdlib", data_files=["*.py"])


def test_of_parquet_only_the_columns_needed_are_read(folder, monkeypatch):
    import datasets

    recorded = []
    load = datasets.load_dataset
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **options: recorded.append(options) or load(*a, **options))
    Dataset.from_list(records(2, source="own", domain="code", heavy="x" * 100)).to_parquet(folder / "wide.parquet")
    assert load_corpus(str(folder / "wide.parquet"))[0]["source"] == "own"
    assert recorded[0]["columns"] == ["text", "source", "domain"]


def test_files_of_the_hub_are_asked_for_by_repository_revision_and_pattern(monkeypatch):
    recorded = []

    def load(*args, **options):
        recorded.append((args, options))
        return Dataset.from_list(records(2))

    monkeypatch.setattr("datasets.load_dataset", load)
    url = "https://example.org/a.jsonl"
    corpus = load_corpus("org/data", data_files=["v2/a.json.gz", url], revision="refs/pr/1", streaming=True)
    assert corpus[0]["source"] == "data"
    files = ["hf://datasets/org/data@refs%2Fpr%2F1/v2/a.json.gz", url]
    assert recorded == [(("json",), {"data_files": files, "split": "train", "streaming": True})]
    with pytest.raises(CorpusError, match="data/train: files of the format .none. cannot be read. Known formats"):
        load_corpus("org/data", data_files=["data/train"])


def test_zstandard_is_asked_for_before_anything_is_fetched(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CorpusError, match="a.jsonl.zst is compressed with Zstandard.*pip install zstandard"):
        load_corpus("org/data", data_files=["a.jsonl.zst"])
    (folder / "b.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    with pytest.raises(CorpusError, match="b.jsonl.zst is compressed with Zstandard.*pip install zstandard"):
        load_corpus(str(folder))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_compressed_with_zstandard(folder, streaming):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps(row) + "\n" for row in records(3))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    assert [row["text"] for row in load_corpus(str(folder / "a.jsonl.zst"), streaming=streaming)] == texts(3)
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines.encode())[:-40])
    with pytest.raises(CorpusError, match="b.jsonl.zst"):
        list(load_corpus(str(folder / "b.jsonl.zst"), streaming=streaming))
