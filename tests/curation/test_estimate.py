"""What reaches each step, and the hours that come of it."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from curation_cases import PROMPT, documents, judge_model, save_classifier, tokenizer
from datasets import Dataset
from rich.console import Console

from mobilellm_hf.curation.ask_llm import AskLLM, Judge
from mobilellm_hf.curation.estimate import StageCost, cost_table, estimate
from mobilellm_hf.curation.quality import QualityClassifier
from mobilellm_hf.curation.representative import SemanticDeduplication


class Letters:
    """An embedder that counts letters."""

    def embed(self, texts, on_documents=None):
        vectors = [[text.count(letter) + 1.0 for letter in "aeiou"] for text in texts]
        return np.array(vectors, np.float32), np.zeros(len(texts), bool)

    def release(self):
        self.released = True


def test_documents_that_reach_each_step_follow_from_shares(tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    data, counted = documents(60), []
    reaching = {"code": 1e6, "math": 3e5, "wiki": 2e3}
    folder = save_classifier(tmp_path / "classifier")
    scores = QualityClassifier(folder).score(data["text"][:], data["source"][:])["score"]
    threshold = float(np.median(scores))
    quality = QualityClassifier(folder, threshold)
    first = estimate(quality, data, reaching, counted.append)
    assert sum(counted) == 60 and quality._model is None  # the warm-up is not counted
    assert first.name == "quality" and first.documents == sum(reaching.values())
    sources = np.array(data["source"][:])
    for source, count in reaching.items():
        rows = sources == source
        kept = (scores[rows] > threshold).sum()
        assert first.left[source] == pytest.approx(count * (kept + 1) / (rows.sum() + 2))
        assert abs(first.left[source] / count - kept / rows.sum()) < 0.2
    judge = Judge(judge_model("mobilellm"), tokenizer())
    second = estimate(AskLLM(judge, tmp_path / "prompt.txt", top=0.1), data, first.left)
    assert second.documents == pytest.approx(sum(first.left.values()))
    assert second.left == pytest.approx({source: count / 10 for source, count in first.left.items()})
    embedder = Letters()
    third = estimate(SemanticDeduplication(embedder, per_source=10_000), data, second.left)
    assert third.left == {source: min(count, 10_000) for source, count in second.left.items()} and embedder.released
    assert third.left["code"] == 10_000
    every = estimate(SemanticDeduplication(Letters(), per_source=None), data, second.left)
    assert every.left == second.left


def test_a_source_of_which_a_sample_keeps_none_is_not_nothing(tmp_path):
    data = Dataset.from_list([{"text": "a b c " * 20, "source": "s"}] * 8)
    cost = estimate(QualityClassifier(save_classifier(tmp_path / "c"), 1e9), data, {"s": 100.0, "unseen": 100.0})
    assert cost.left == pytest.approx({"s": 10.0, "unseen": 50.0})


class Clock:
    """Time that passes by documents scored: so many a second."""

    def __init__(self, per_second: float):
        self.now, self.per_second = 0.0, per_second

    def perf_counter(self) -> float:
        return self.now

    def score(self, texts, sources, on_documents=None):
        self.now += len(texts) / self.per_second
        return {}


def test_hours_are_documents_by_rate(monkeypatch):
    clock = Clock(25.0)
    monkeypatch.setattr("mobilellm_hf.curation.estimate.time", clock)
    stage = SimpleNamespace(name="any", score=clock.score, release=lambda: None, per_source=5)
    cost = estimate(stage, documents(10), {"a": 900_000.0, "b": 3.0})
    assert cost.per_second == pytest.approx(25.0) and cost.documents == 900_003
    assert cost.hours == pytest.approx(900_003 / 25 / 3600) and cost.left == {"a": 5, "b": 3.0}


def test_the_table_adds_the_hours_up():
    costs = [StageCost("quality", 7_200_000, 1_000.0, {}), StageCost("ask-general", 360_000, 10.0, {})]
    console = Console(file=io.StringIO(), width=140)
    console.print(cost_table(costs, "H100"))
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    cells = [line for line in lines if line]
    assert cells[0][:3] == ["quality", "7,200,000", "1,000.0"] and cells[0][3] == "2.0 h"
    assert cells[1][:3] == ["ask-general", "360,000", "10.0"] and cells[1][3] == "10.0 h"
    assert cells[2][3] == "12.0 h" and "200 GPU hours" in cells[2][0]
    assert "one H100" in console.file.getvalue()
