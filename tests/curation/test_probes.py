"""Probe sets: the paper's composition, reports, and training data without the documents that probes hold."""

import random

import pytest
from datasets import Dataset, IterableDataset

from mobilellm_hf.curation.probes import PROBE_SOURCES, compose_probes, keep_out, shared_with_training
from mobilellm_hf.data.catalog import SOURCES
from mobilellm_hf.data.catalog_sources import TABLE_5
from mobilellm_hf.data.tokenization import train_tokenizer


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def prose(seed: int, words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(5_000)}" for _ in range(words))


def documents(seeds, source="s") -> Dataset:
    return Dataset.from_dict({"text": [prose(seed) for seed in seeds], "source": [source] * len(seeds)})


REPRESENTATIVE = {"a": documents(range(3), "a"), "b": documents(range(10, 12), "b"), "both": documents([20], "both")}
COMPOSITION = {"code": ["a", "both"], "math": ["both", "b"]}


def test_the_composition_is_the_paper_s():
    used = {source for names in PROBE_SOURCES.values() for source in names}
    assert used == set(TABLE_5) and [len(names) for names in PROBE_SOURCES.values()] == [6, 7, 7]
    for source in used:
        served = [capability for capability, names in PROBE_SOURCES.items() if source in names]
        assert served == ([SOURCES[source].domain] if len(served) == 1 else ["code", "math", "knowledge"])
        assert (len(served) == 3) == (SOURCES[source].domain == "combined")


def test_a_source_may_serve_several_capabilities():
    tokenizer = train_tokenizer([prose(0)], 300, show_progress=False)
    probes, report = compose_probes(REPRESENTATIVE, COMPOSITION, tokenizer=tokenizer)
    assert probes["code"]["source"][:] == ["a", "a", "a", "both"]
    assert probes["math"]["text"][:] == [prose(20), prose(10), prose(11)]
    assert report.documents == {"code": {"a": 3, "both": 1}, "math": {"both": 1, "b": 2}}
    assert report.characters["math"] == {"both": len(prose(20)), "b": len(prose(10)) + len(prose(11))}
    assert report.tokens["code"]["both"] == len(tokenizer.encode(prose(20), add_special_tokens=False))
    assert report.missing == {"code": [], "math": []}


def test_missing_sources_are_an_error_or_reported():
    composition = {"code": ["a", "x", "none"], "math": ["x", "b"]}
    representative = {**REPRESENTATIVE, "none": documents([])}
    with pytest.raises(ValueError, match="no representative documents of none, x, .* some of a, b, both: .*skip"):
        compose_probes(representative, composition)
    probes, report = compose_probes(representative, composition, missing="skip")
    assert {name: len(probe) for name, probe in probes.items()} == {"code": 3, "math": 2}
    assert report.missing == {"code": ["x", "none"], "math": ["x"]} and report.tokens == {}
    with pytest.raises(ValueError, match="probe set of math is empty: there is nothing of x"):
        compose_probes(REPRESENTATIVE, {"code": ["a"], "math": ["x"]}, missing="skip")
    with pytest.raises(ValueError, match="error or skip"):
        compose_probes(REPRESENTATIVE, COMPOSITION, missing="ignore")


def training() -> Dataset:
    words = prose(10).split()
    texts = [prose(100), prose(1).replace(" ", "\n"), prose(20), " ".join(words[:50]) + " " + prose(101, 10)]
    texts += [" ".join(words[:30]) + " " + prose(102, 40), prose(103)]
    return Dataset.from_dict({"text": texts, "number": [*range(6)]})


@pytest.mark.parametrize("num_proc", [None, 2])
def test_what_probes_hold_is_counted_for_each_and_masked(num_proc):
    probes, _ = compose_probes(REPRESENTATIVE, COMPOSITION)
    found = shared_with_training(training(), probes, num_proc=num_proc)
    assert found.mask.tolist() == [False, True, True, True, False, False]
    assert found.counts == {"code": 2, "math": 2}


@pytest.mark.parametrize("streaming", [False, True])
def test_it_is_kept_out_of_data_sets_and_streams(streaming):
    probes, _ = compose_probes(REPRESENTATIVE, COMPOSITION)
    data = training().to_iterable_dataset() if streaming else training()
    left = keep_out(data, probes)
    assert isinstance(left, IterableDataset) == streaming
    assert [row["number"] for row in left] == [0, 4, 5]
