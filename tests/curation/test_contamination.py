"""Documents that hold benchmark items: planted ones are found and named, others are not; what is misspelt is named."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset

from mobilellm_hf.curation.contamination import (
    BENCHMARKS,
    Benchmarks,
    contamination_report,
    find_contamination,
    load_benchmarks,
)
from mobilellm_hf.data.corpora import CorpusError


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(5_000)}" for _ in range(words))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_planted_items_are_found_and_named(num_proc):
    items = {"math": [prose(seed, 40) for seed in range(10)], "code": [prose(seed, 25) for seed in range(20, 25)]}
    texts = [prose(seed, 100) for seed in range(100, 120)]
    texts[3] += f" {items['math'][7]}"
    texts[5] = items["code"][2]
    texts[8] += " " + " ".join(items["math"][0].split()[10:23]) + " " + items["code"][2]
    texts[9] += " " + " ".join(items["math"][0].split()[10:22])
    benchmarks = Benchmarks(items)
    documents = Dataset.from_dict({"text": texts, "source": ["s"] * 20})
    found = find_contamination(documents, benchmarks, num_proc=num_proc)
    assert np.flatnonzero(found.contaminated).tolist() == [3, 5, 8]
    assert found.benchmark[[3, 5, 8, 9]].tolist() == ["math", "code", "code", ""]
    assert found.item[[3, 5, 8, 9]].tolist() == [7, 2, 2, -1]
    np.testing.assert_allclose(found.coverage[[3, 5, 8]], [28 / 128, 1, 13 / 126], rtol=1e-5)
    assert [pairs.tolist() for pairs in found.hits["math"]] == [[3, 8], [7, 0]]
    assert contamination_report(found, benchmarks) == {
        "math": {"documents": 2, "items_found": 2, "items": 10},
        "code": {"documents": 2, "items_found": 1, "items": 5},
    }


def test_fewer_words_find_more_and_coverage_less():
    benchmarks = Benchmarks({"math": [prose(1, 40)]})
    texts = [prose(2, 100) + " " + " ".join(prose(1, 40).split()[:9]), prose(1, 40)]
    documents = Dataset.from_dict({"text": texts})
    assert find_contamination(documents, benchmarks).contaminated.tolist() == [False, True]
    assert find_contamination(documents, benchmarks, n=8).contaminated.tolist() == [True, True]
    assert find_contamination(documents, benchmarks, n=8, min_coverage=0.5).contaminated.tolist() == [False, True]


def test_local_copies_are_read_by_their_columns(tmp_path):
    rows = [{"question": f"How many are {n}?", "answer": f"#### {n}", "level": n} for n in range(3)]
    file = write(tmp_path / "gsm8k.jsonl", rows)
    choices = [{"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}}]
    nested = write(tmp_path / "arc.jsonl", choices)
    Dataset.from_list(rows).to_parquet(tmp_path / "ours.parquet")
    found = load_benchmarks(
        [
            {"name": "gsm8k", "path": file},
            {"name": "arc_easy", "path": nested},
            {"name": "ours", "path": str(tmp_path / "ours.parquet"), "columns": ["question", "level"]},
        ]
    )
    assert found.items["gsm8k"] == [f"How many are {n}?\n#### {n}" for n in range(3)]
    assert found.items["arc_easy"] == ["Which?\none\ntwo"]
    assert found.items["ours"][2] == "How many are 2?\n2"
    assert found.digest() == Benchmarks(dict(found.items)).digest()
    assert found.digest() != Benchmarks({**found.items, "ours": found.items["ours"][:2]}).digest()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gsm8", r"no benchmark 'gsm8'\. Did you mean gsm8k\? There are gsm8k, math500"),
        ("zzz", r"no benchmark 'zzz'\. There are gsm8k, .*; give others a path"),
        ({"path": "x.jsonl"}, "has the fields name, path, columns"),
        ({"name": "gsm8k", "file": "x"}, "has the fields name, path, columns"),
        ({"name": "ours", "path": "x.jsonl"}, "ours needs columns"),
        ({"name": "gsm8k", "path": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"name": "math500", "path": "{}"}, "has no column 'problem'. Its columns: question, answer"),
        ({"name": "arc_easy", "path": "{}", "columns": ["answer.text"]}, "the column 'answer.text' has no 'text' in"),
        ({"name": "ours", "path": "{}", "columns": ["empty"]}, "no item has any text in empty"),
    ],
)
def test_what_is_misspelt_or_missing_is_named(tmp_path, entry, message):
    file = write(tmp_path / "items.jsonl", [{"question": "How many?", "answer": "3", "empty": " "}])
    if isinstance(entry, dict):
        entry = {key: value.format(file) if key == "path" else value for key, value in entry.items()}
    with pytest.raises(CorpusError, match=message):
        load_benchmarks([entry])


def test_a_benchmark_is_named_once_and_a_broken_line_by_its_number(tmp_path):
    file = write(tmp_path / "items.jsonl", [{"question": "How many?", "answer": "3"}])
    with pytest.raises(CorpusError, match="gsm8k is named twice"):
        load_benchmarks([{"name": "gsm8k", "path": file}] * 2)
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": ')
    with pytest.raises(CorpusError, match=r"broken.jsonl, line 2"):
        load_benchmarks([{"name": "gsm8k", "path": str(tmp_path / "broken.jsonl")}])


def test_without_the_hub_the_remedy_is_a_local_copy():
    with pytest.raises(CorpusError, match=r"gsm8k could not be loaded from openai/gsm8k .*path: items.jsonl"):
        load_benchmarks(["gsm8k"])


def test_the_benchmarks_of_tables_8_and_9_are_there():
    names = "gsm8k math500 aime24 aime25 humaneval mbpp livecodebench mmlu arc_easy arc_challenge boolq piqa siqa"
    assert {*names.split(), "hellaswag", "openbookqa", "winogrande"} == set(BENCHMARKS)
    assert all(benchmark.columns and "/" in benchmark.hub_id for benchmark in BENCHMARKS.values())
