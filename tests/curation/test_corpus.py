"""Documents of corpora and streams: all of them, once, however often the reading was interrupted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from curation_cases import documents

from mobilellm_hf.curation import corpus
from mobilellm_hf.curation.corpus import open_documents, sample_documents, stream_key
from mobilellm_hf.curation.scoring import Rate
from mobilellm_hf.data.corpora import CorpusError, load_corpus
from mobilellm_hf.data.rows import expand_entry

COUNT = 50


@pytest.fixture
def files(tmp_path):
    """The same documents as three .jsonl files and as one of Parquet; every fifth is too short."""
    rows = documents(COUNT).to_list()
    for row in rows[::5]:
        row["text"] = "short"
    (tmp_path / "jsonl").mkdir()
    for number in range(3):
        lines = "".join(json.dumps(row) + "\n" for row in rows[number::3])
        (tmp_path / "jsonl" / f"{number}.jsonl").write_text(lines)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet", row_group_size=8)
    return tmp_path


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus, "DOCUMENTS_PER_SHARD", 7)


def stream(place) -> dict:
    return {"name": str(place), "streaming": True}


class Stop(Exception):
    """As a kill between two shards; the one that is being written is whole or absent."""


def stop_after(shards: int) -> Rate:
    """Shards of this reading; those found on disk count as one."""
    left = [shards]

    def on_documents(count: int) -> None:
        left[0] -= count > 0
        if left[0] == 0:
            raise Stop

    return Rate(on_documents)


@pytest.mark.parametrize("kind", ["jsonl", "all.parquet"])
@pytest.mark.parametrize("most", [29, 1_000])
def test_an_interrupted_stream_loses_and_repeats_nothing(kind, most, files):
    entry = stream(files / kind)
    expected = list(load_corpus(str(files / kind), streaming=True))[:most]
    assert len(expected) == min(40, most)
    whole = open_documents([entry], files / "whole", Rate(), most)
    assert whole.to_list() == expected and whole.column_names == ["text", "source", "domain"]
    for shards in (1, 2, 4):
        folder = files / f"run{shards}"
        with pytest.raises(Stop):
            open_documents([entry], folder, stop_after(shards), most)
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.arrow")}
        assert len(before) == shards
        counted = []
        assert open_documents([entry], folder, Rate(counted.append), most).to_list() == expected
        assert sum(counted) == len(expected) and counted[0] == 7 * shards
        assert {file: file.stat().st_mtime_ns for file in before} == before
    folder = files / "often"  # interrupted again and again
    for _ in range(3):
        with pytest.raises(Stop):
            open_documents([entry], folder, stop_after(2 if list(folder.glob("*/*.arrow")) else 1), most)
    assert open_documents([entry], folder, Rate(), most).to_list() == expected


def test_a_shard_without_its_place_is_read_again(files):
    entry, folder = stream(files / "jsonl"), files / "run"
    with pytest.raises(Stop):
        open_documents([entry], folder, stop_after(2), 100)
    (state,) = folder.glob("*/state.json")
    shutil.copy(state, files / "state.json")
    with pytest.raises(Stop):
        open_documents([entry], folder, stop_after(2), 100)  # found, and one more
    shutil.copy(files / "state.json", state)
    expected = list(load_corpus(str(files / "jsonl"), streaming=True))
    assert open_documents([entry], folder, Rate(), 100).to_list() == expected


def test_what_is_read_is_not_read_again(files):
    entry = stream(files / "jsonl")
    first = open_documents([entry], files / "run", Rate(), 30).to_list()
    before = {file: file.stat().st_mtime_ns for file in (files / "run").rglob("*") if file.is_file()}
    counted = []
    assert open_documents([entry], files / "run", Rate(counted.append), 30).to_list() == first
    assert sum(counted) == 30
    assert {file: file.stat().st_mtime_ns for file in (files / "run").rglob("*") if file.is_file()} == before
    assert len(open_documents([entry], files / "run", Rate(), 35)) == 35  # another number is another reading


def test_a_stream_needs_a_number_of_documents_and_has_some(files):
    with pytest.raises(ValueError, match="jsonl is read as a stream, which may not end: give max_documents"):
        open_documents([stream(files / "jsonl")], files / "run", Rate())
    (files / "empty.jsonl").write_text('{"text": "short"}\n' * 9)
    for _ in range(2):
        with pytest.raises(CorpusError, match="empty.jsonl holds no document: check the split"):
            open_documents([stream(files / "empty.jsonl")], files / "run", Rate(), 10)


def test_a_data_set_is_limited_by_a_choice_that_the_seed_makes(files):
    entry = {"name": str(files / "jsonl")}
    everything = open_documents([entry], files / "run", Rate()).to_list()
    assert len(everything) == 40 and not (files / "run").exists()
    chosen = open_documents([entry], files / "run", Rate(), 12, seed=1).to_list()
    places = [everything.index(row) for row in chosen]
    assert len(places) == 12 and places == sorted(set(places)) != list(range(12))
    assert open_documents([entry], files / "other", Rate(), 12, seed=1).to_list() == chosen
    assert open_documents([entry], files / "run", Rate(), 12, seed=2).to_list() != chosen
    assert open_documents([entry], files / "run", Rate(), 40, seed=1).to_list() == everything


def test_entries_of_all_kinds_are_joined_in_their_order(files):
    large = pa.schema([(name, pa.large_string()) for name in ("text", "source", "domain")])
    rows = documents(9, seed=3).to_list()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, large), files / "large.parquet")
    (files / "plain.txt").write_text("A file of text is one document, which has no source but its name. " * 3)
    entries = [
        stream(files / "jsonl"), {"name": str(files / "large.parquet")},
        {"name": str(files / "plain.txt"), "domain": "wiki"}, stream(files / "all.parquet"),
    ]  # fmt: skip
    found = open_documents(entries, files / "run", Rate(), 20).to_list()
    assert found[20:29] == rows and found[29]["source"] == "plain" and found[29]["domain"] == "wiki"
    assert len(found) == 50 and sorted(found[:20][0]) == ["domain", "source", "text"]


def test_a_sample_is_of_every_source_with_what_it_has_in_all(files):
    rows = open_documents([{"name": str(files / "jsonl")}], files / "run", Rate()).to_list()
    counts = {source: [row["source"] for row in rows].count(source) for source in ("code", "math", "wiki")}
    sample, totals = sample_documents([{"name": str(files / "jsonl")}], 4)
    assert totals == pytest.approx(counts)
    taken = np.unique(sample["source"][:], return_counts=True)
    assert dict(zip(*taken)) == {source: min(4, count) for source, count in counts.items()}
    assert all(row in rows for row in sample.to_list())
    _, totals = sample_documents([{"name": str(files / "jsonl")}], 4, max_documents=20)
    assert totals == pytest.approx({source: count / 2 for source, count in counts.items()})
    _, totals = sample_documents([stream(files / "jsonl") | {"source": "s", "domain": "d"}], 10, max_documents=5_000)
    assert sum(totals.values()) == pytest.approx(5_000)
    with pytest.raises(ValueError, match="is a stream of unknown length: give max_documents"):
        sample_documents([stream(files / "jsonl")], 4)


def test_a_sample_of_an_empty_stream_is_refused(files):
    (files / "empty.jsonl").write_text('{"text": "short"}\n' * 9)
    with pytest.raises(ValueError, match="empty.jsonl holds no document"):
        sample_documents([stream(files / "empty.jsonl")], 4, max_documents=10)


def test_streams_have_keys_whatever_reads_their_rows(files):
    """Sources of the catalog have functions among their arguments, and local files change."""
    config = yaml.safe_load((Path(__file__).parents[2] / "recipes/paper/curate.yaml").read_text())
    arguments = [given for entry in config["sources"] for given in expand_entry(entry)]
    assert len({stream_key(given, 10) for given in arguments}) == len(arguments)
    assert any(callable(value) for given in arguments for value in given.values())
    place = files / "all.parquet"
    key = stream_key({"name": str(place)}, 10)
    place.write_bytes(place.read_bytes() + b" ")
    assert stream_key({"name": str(place)}, 10) != key


def test_the_subsets_of_an_entry_share_its_documents():
    entries = [{"catalog": "cosmopedia"}, {"name": "embedded:stdlib"}]
    shares = [most for _, most in corpus._with_limits(entries, 1_003)]
    assert sum(shares[:-1]) == shares[-1] == 1_003 and max(shares[:-1]) - min(shares[:-1]) == 1
