"""Steps one after the other: what falls and why, what is done again and what is not."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from curation_cases import WordScorer, documents, judge_model, save_classifier, tokenizer, word_score
from datasets import Dataset

from mobilellm_hf.curation.ask_llm import AskLLM, Judge
from mobilellm_hf.curation.quality import QualityClassifier
from mobilellm_hf.curation.representative import AtMost
from mobilellm_hf.curation.scoring import Rate
from mobilellm_hf.curation.stages import AllRejectedError, CurationStage, Verdict, curate, top_of_each_source


class Best(CurationStage):
    """Keeps the best share of each source, by a score that can be computed by hand."""

    def __init__(self, top, name="best", scorer=None, version=0):
        self.top, self.name, self.scorer, self.version = top, name, scorer or WordScorer(), version

    def settings(self):
        return {"name": self.name, "top": self.top, "version": self.version}

    def decide(self, given):
        values = given.scores_of(self.scorer, {"version": self.version}, 10).column("score")
        sources = np.asarray(given.documents["source"][:])
        kept = top_of_each_source(values, np.unique(sources, return_inverse=True)[1], self.top)
        return Verdict((~kept).astype(np.int8), ("not the best",), {"score": values})


class DropWords(CurationStage):
    """Drops documents that contain a word; each falls for the first of them, and refers to the first such document."""

    def __init__(self, *words, name="words"):
        self.words, self.name = words, name
        self.decided = 0

    def settings(self):
        return {"name": self.name, "words": self.words}

    def decide(self, given):
        self.decided += 1
        texts = given.documents["text"][:]
        found = [next((n for n, word in enumerate(self.words, 1) if word in text.split()), 0) for text in texts]
        first = [found.index(number) if number else -1 for number in found]
        reasons = tuple(f"has {word}" for word in self.words)
        return Verdict(np.array(found, np.int8), reasons, {}, {"like": np.array(first)})


def rows(report, *columns):
    return list(zip(*(report.table()[name].to_pylist() for name in columns)))


def test_documents_fall_for_a_reason_and_keep_their_number(tmp_path):
    data = documents(80)
    words = DropWords("history", "seven", "index")
    steps = [Best(0.5), words, AtMost(3)]
    result = curate(data, steps, tmp_path)
    texts, sources = data["text"][:], data["source"][:]
    left = list(range(80))
    best = []
    for source in set(sources):
        of_source = sorted((n for n in left if sources[n] == source), key=lambda n: -word_score(texts[n]))
        best += of_source[: -(-len(of_source) // 2)]
    score = [np.float32(word_score(text)) for text in texts]
    expected = [(n, sources[n], "" if n in best else "not the best", score[n]) for n in left]
    assert rows(result.reports[0], "document", "source", "reason", "score") == expected
    left = sorted(best)
    why = {n: next((word for word in words.words if word in texts[n].split()), None) for n in left}
    first = {word: next(n for n in left if why[n] == word) for word in set(why.values())}
    expected = [(n, f"has {why[n]}" if why[n] else "", first[why[n]] if why[n] else -1) for n in left]
    assert rows(result.reports[1], "document", "reason", "like") == expected
    assert len({reason for _, reason, _ in expected}) > 2
    left = [n for n in left if not why[n]]
    assert [number for number, _ in rows(result.reports[2], "document", "reason")] == left
    kept = []
    for source in set(sources):
        kept += sorted((n for n in left if sources[n] == source), key=lambda n: -score[n])[:3]
    assert result.numbers.tolist() == sorted(kept)
    assert result.documents["text"][:] == [texts[n] for n in sorted(kept)]
    assert result.scores.tolist() == [score[n] for n in sorted(kept)]
    assert [report.name for report in result.reports] == ["best", "words", "limit"]


def test_a_step_alone_is_a_function_of_documents(tmp_path):
    data = documents(40)
    expected = curate(data, [Best(0.2)], tmp_path / "a").documents.to_list()
    assert Best(0.2)(data).to_list() == expected
    stage = Best(0.2)
    assert stage(data, tmp_path / "b").to_list() == expected
    assert (tmp_path / "b" / "1-best" / "decisions.parquet").exists()


@pytest.mark.parametrize("share", [0.001, 0.1, 1 / 3, 0.5, 0.7, 1.0])
def test_top_share_of_each_source(share):
    rng = np.random.default_rng(0)
    sources = rng.choice(6, 200, p=[0.5, 0.3, 0.1, 0.05, 0.04, 0.01])
    scores = rng.integers(0, 12, 200).astype(np.float32)  # with ties
    scores[rng.random(200) < 0.1] = np.nan
    scores[sources == 4] = np.nan
    kept = top_of_each_source(scores, sources, share)
    for source in range(6):
        rows = [row for row in range(200) if sources[row] == source and not np.isnan(scores[row])]
        count = next(n for n in range(len(rows) + 1) if n >= share * len(rows) - 1e-9)
        best = sorted(rows, key=lambda row: (-scores[row], row))[:count]
        assert np.flatnonzero(kept & (sources == source)).tolist() == sorted(best)
        assert len(best) >= min(1, len(rows))


def test_a_tenth_of_ten_is_one():
    for count in (10, 30, 70, 100, 1_000):
        assert top_of_each_source(np.arange(count, dtype=float), np.zeros(count), 0.1).sum() == count / 10
    for share, kept in ((0.07, 7), (0.55, 55)):  # times 100 a little more than that in floating point
        assert top_of_each_source(np.arange(100.0), np.zeros(100), share).sum() == kept
    assert top_of_each_source(np.arange(11.0), np.zeros(11), 0.1).sum() == 2


def test_what_is_finished_is_not_done_again(tmp_path):
    data, words, scorer = documents(60), DropWords("history"), WordScorer()
    counted = {}

    def follow(stage, count):
        counted.setdefault(stage.name, []).append(0)

        def add(number):
            counted[stage.name][-1] += number

        return Rate(add)

    first = curate(data, [words, Best(0.5, scorer=scorer)], tmp_path, follow)
    assert first.scores.tolist() == [np.float32(word_score(text)) for text in first.documents["text"]]
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    again = curate(data, [words, Best(0.5, scorer=scorer)], tmp_path, follow)
    assert words.decided == 1 and scorer.scored == len(first.reports[1].table()) < 60
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert again.documents.to_list() == first.documents.to_list() and (again.scores == first.scores).all()
    assert counted["best"] == [scorer.scored] * 2


def test_a_moved_threshold_scores_nothing_again(tmp_path):
    data = documents(60)
    scorer = WordScorer()
    few = curate(data, [Best(0.1, scorer=scorer)], tmp_path)
    many = curate(data, [Best(0.6, scorer=scorer)], tmp_path)
    assert scorer.scored == 60 and len(few.documents) < len(many.documents)
    curate(data, [Best(0.6, scorer=scorer, version=1)], tmp_path)
    assert scorer.scored == 120


def test_a_moved_threshold_runs_no_model_again(tmp_path):
    data, model, forwards = documents(30), judge_model("mobilellm"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    judge, prompt = Judge(model, tokenizer()), tmp_path / "own.txt"
    prompt.write_text("Keep?\n{document}\n")
    few = curate(data, [AskLLM(judge, prompt, top=0.1, per_shard=8)], tmp_path / "judge")
    count = len(forwards)
    many = curate(data, [AskLLM(judge, prompt, top=0.9, per_shard=8)], tmp_path / "judge")
    assert len(forwards) == count > 0 and len(few.documents) < len(many.documents)
    prompt.write_text("Drop?\n{document}\n")
    curate(data, [AskLLM(judge, prompt, top=0.1, per_shard=8)], tmp_path / "judge")
    assert len(forwards) > count

    folder = save_classifier(tmp_path / "classifier")
    result = curate(data, [QualityClassifier(folder, -100.0, per_shard=8)], tmp_path / "quality")
    assert len(result.documents) == 30
    threshold = float(np.median(result.scores))
    stage = QualityClassifier(folder, threshold, per_shard=8)
    assert len(curate(data, [stage], tmp_path / "quality").documents) == 15 and stage._model is None


def test_other_documents_settings_or_steps_before_are_another_run(tmp_path):
    data, scorer, words = documents(40), WordScorer(), DropWords("history")
    curate(data, [Best(0.5, scorer=scorer), words], tmp_path)
    curate(data, [Best(0.4, scorer=scorer), words], tmp_path)
    assert words.decided == 2 and scorer.scored == 40
    changed = data.to_list()
    changed[3]["text"] += " more"
    curate(Dataset.from_list(changed), [Best(0.4, scorer=scorer), words], tmp_path)
    assert words.decided == 3 and scorer.scored == 80
    more = DropWords("history", "seven")
    curate(Dataset.from_list(changed), [Best(0.4, scorer=scorer), more], tmp_path)
    assert more.decided == 1 and scorer.scored == 80


def test_a_torn_file_of_decisions_is_made_again(tmp_path):
    data, scorer = documents(40), WordScorer()
    expected = curate(data, [Best(0.5, scorer=scorer)], tmp_path)
    file = expected.reports[0].decisions
    whole = expected.reports[0].table()
    for damage in (lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-1], lambda raw: b"", lambda raw: None):
        raw = damage(file.read_bytes())
        file.unlink() if raw is None else file.write_bytes(raw)
        result = curate(data, [Best(0.5, scorer=scorer)], tmp_path)
        assert result.reports[0].table() == whole and scorer.scored == 40
    pyarrow.parquet.write_table(pa.table({"x": [1]}), file)  # another program's
    assert curate(data, [Best(0.5, scorer=scorer)], tmp_path).reports[0].table() == whole


def test_what_cannot_be_curated_is_refused(tmp_path):
    data = documents(9)
    with pytest.raises(ValueError, match="there are no documents to curate: every corpus is empty"):
        curate(data.select([]), [Best(0.5)], tmp_path)
    for column in ("text", "source"):
        with pytest.raises(ValueError, match=f"no column '{column}'; their columns: "):
            curate(data.remove_columns(column), [Best(0.5)], tmp_path)
    with pytest.raises(ValueError, match="two steps are called 'best': give one of them another name"):
        curate(data, [Best(0.5), AtMost(3), Best(0.4)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_steps_are_checked_before_the_first_runs(tmp_path):
    first = DropWords("history")
    with pytest.raises(ValueError):
        curate(documents(9), [first, QualityClassifier(tmp_path / "nowhere")], tmp_path / "run")
    assert first.decided == 0


def test_when_all_fall_the_error_says_where_scores_lie(tmp_path):
    folder = save_classifier(tmp_path / "classifier")
    data = documents(21)
    scores = QualityClassifier(folder).score(data["text"][:], data["source"][:])["score"]
    with pytest.raises(AllRejectedError) as caught:
        curate(data, [AtMost(100), QualityClassifier(folder, 50.0, name="edu")], tmp_path / "run")
    message = str(caught.value)
    assert "the step 'edu' kept none of 21 documents (21 score not above 50)" in message
    for name, share in (("0%", 0), ("50%", 0.5), ("90%", 0.9), ("100%", 1)):
        assert f" {name} {np.quantile(scores, share):.4g}" in message
    assert "'threshold': 50.0" in message
    # The scores are not lost: a lower threshold goes on.
    stage = QualityClassifier(folder, -50.0, name="edu")
    assert len(curate(data, [AtMost(100), stage], tmp_path / "run").documents) == 21 and stage._model is None


def test_when_all_fall_without_scores_the_reasons_are_counted(tmp_path):
    data = Dataset.from_list([{"text": f"a {word}", "source": "s"} for word in ("x", "y", "y")])
    with pytest.raises(AllRejectedError, match=r"kept none of 3 documents \(1 has x, 2 has y\)\. Lower"):
        curate(data, [DropWords("x", "y")], tmp_path)
    steps = [DropWords("x"), DropWords("y", name="other")]
    with pytest.raises(AllRejectedError, match=r"the step 'other' kept none of 2 documents"):
        curate(data, steps, tmp_path)


class NoNumber(WordScorer):
    def score(self, texts, sources, on_documents=None):
        return {"score": np.full(len(texts), np.nan, np.float32)}


def test_scores_that_are_no_numbers_keep_nothing(tmp_path):
    with pytest.raises(AllRejectedError, match="kept none of 9 documents") as caught:
        curate(documents(9), [Best(0.5, scorer=NoNumber())], tmp_path)
    assert "Quantiles" not in str(caught.value)
