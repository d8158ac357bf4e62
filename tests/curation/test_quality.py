"""Classifiers made on the spot against the pipeline of transformers, one document at a time."""

import numpy as np
import pytest
from curation_cases import ODD_TEXTS, documents, save_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mobilellm_hf.curation.quality import QualityClassifier

TEXTS = [*ODD_TEXTS, "[SEP] [PAD] [CLS] of the sum", *documents(12)["text"]]
LABELS = ("spam", "ham", "eggs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    return save_classifier(folder / "regression"), save_classifier(folder / "classes", LABELS)


def by_pipeline(folder, function: str, texts: list[str]) -> list[dict[str, float]]:
    words = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ask = pipeline("text-classification", model=model, tokenizer=words, device="cpu")
    options = {"function_to_apply": function, "top_k": None, "truncation": True, "max_length": 64}
    return [{one["label"]: one["score"] for one in ask(text, **options)} for text in texts]


@pytest.mark.parametrize("batch_tokens", [1, 200, 16_384])
def test_one_output_is_the_score(folders, batch_tokens):
    expected = np.array([list(row.values())[0] for row in by_pipeline(folders[0], "none", TEXTS)])
    assert np.ptp(expected) > 0.3
    counted = []
    stage = QualityClassifier(folders[0], batch_tokens=batch_tokens)
    found = stage.score(TEXTS, [""] * len(TEXTS), counted.append)
    np.testing.assert_allclose(found["score"], expected, atol=1e-5)
    assert sum(counted) == len(TEXTS) and (len(counted) <= 2) == (batch_tokens == 16_384)


@pytest.mark.parametrize("label", LABELS)
def test_the_probability_of_a_class_is_the_score(folders, label):
    expected = np.array([row[label] for row in by_pipeline(folders[1], "softmax", TEXTS)])
    assert np.ptp(expected) > 0.05
    found = QualityClassifier(folders[1], label=label, batch_tokens=300).score(TEXTS, [""] * len(TEXTS))
    np.testing.assert_allclose(found["score"], expected, atol=1e-5)


def test_documents_above_the_threshold_stay(folders):
    data = documents(60)
    scores = QualityClassifier(folders[0]).score(data["text"][:], data["source"][:])["score"]
    threshold = float(scores[7])  # which does not exceed itself
    kept = QualityClassifier(folders[0], threshold)(data)
    assert 0 < len(kept) < 59 and kept["text"][:] == data.select(np.flatnonzero(scores > threshold))["text"][:]


def test_what_is_cut_is_counted(folders):
    words = AutoTokenizer.from_pretrained(folders[0])
    sentence = words.decode(words("the sum of three and four is seven " * 20, add_special_tokens=False)["input_ids"])
    ids = words(sentence, add_special_tokens=False)["input_ids"]
    texts = [words.decode(ids[:62]), words.decode(ids[:63]), "sum", "the " * 100_000, " " * 100_000 + "the"]
    found = QualityClassifier(folders[0]).score(texts, [""] * 5)
    assert found["truncated"].tolist() == [False, True, False, True, True]
    assert found["score"][0] == pytest.approx(found["score"][1], abs=1e-5)
    shorter = QualityClassifier(folders[0], max_length=16).score(texts, [""] * 5)
    assert shorter["truncated"].tolist() == [True, True, False, True, True]
    assert shorter["score"][0] != pytest.approx(found["score"][0], abs=1e-3)


def test_labels_must_be_the_classifiers(folders):
    for label in (None, "bacon"):
        with pytest.raises(ValueError, match=r"several classes: label must be one of \['spam', 'ham', 'eggs'\]"):
            QualityClassifier(folders[1], label=label).check()
    with pytest.raises(ValueError, match="has one output and no class 'ham': leave label out"):
        QualityClassifier(folders[0], label="ham").check()
    with pytest.raises(ValueError, match="classifier: .*nowhere is no folder or Hub model that loads"):
        QualityClassifier(folders[0] / "nowhere").check()
    stage = QualityClassifier(folders[1], label="ham")
    stage.check()
    assert stage._model is None


def test_what_decides_scores_is_in_the_settings(folders):
    base = QualityClassifier(folders[1], label="ham", threshold=0.5)
    same = QualityClassifier(folders[1], label="ham", threshold=0.5, batch_tokens=9, per_shard=3)
    assert base.settings() == same.settings()
    for change in ({"label": "spam"}, {"threshold": 0.6}, {"max_length": 32}, {"dtype": "float32"}):
        other = QualityClassifier(folders[1], **{"label": "ham", "threshold": 0.5, **change})
        assert other.settings() != base.settings()
    assert QualityClassifier(folders[0]).settings() != QualityClassifier(folders[1]).settings()
