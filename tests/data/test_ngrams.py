"""Shared passages against sets of word tuples; what counts as a word; the same hashes in every process."""

import logging
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from mobilellm_hf.data.ngrams import NgramIndex, SharedText, leave_out, span_hashes, word_hashes


def sentence(seed: int, words: int, vocabulary: int = 2_000) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(words))


def grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    n = min(n, len(words))
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)] if words else []


@pytest.mark.parametrize("n", [1, 3, 13])
def test_items_and_coverage_are_those_of_sets_of_tuples(n):
    rng = random.Random(n)
    pieces = [sentence(seed, rng.randrange(1, 40), 30) for seed in range(40)]
    texts = {name: [" ".join(rng.choices(pieces, k=rng.randrange(1, 4))) for _ in range(15)] for name in "ab"}
    index = NgramIndex.build(texts, n, min_words=n)
    assert index.counts == {"a": 15, "b": 15}
    hits = 0
    for _ in range(200):
        text = " ".join(rng.choices(pieces, k=3)) + " " + sentence(rng.random(), 20, 10**6)
        spans, found = grams(text, n), index.matches(text)
        expected = [
            (name, number)
            for name, items in texts.items()
            for number, item in enumerate(items)
            if set(grams(item, n)) & set(spans)
        ]
        assert found.items == expected
        for name, items in texts.items():
            known = {gram for item in items for gram in grams(item, n)}
            share = sum(gram in known for gram in spans) / len(spans)
            assert found.coverage.get(name, 0.0) == pytest.approx(share)
        hits += bool(found)
    assert hits > 20


def test_layout_punctuation_and_case_are_nothing():
    plain = "def add x y return x y 1 the sum of both and one more than that"
    index = NgramIndex.build({"a": [plain]})
    for same in (
        "def add(x, y):\n    return x + y + 1  # The SUM of both,\tand -- one more than that!",
        "**def_add** x|y return $x_y$ 1... the *sum* of \u201cboth\u201d, and\u00a0one more than that",
        "\uff44\uff45\uff46 add x y return x y \uff11 the sum of both and one more than that",
    ):
        assert index.matches(same).coverage == {"a": 1.0}
    assert not index.matches(plain.replace("sum", "sun"))
    assert not index.matches(" ".join(reversed(plain.split())))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        (" .,;\n", 0),
        ("snake_case x2", 3),
        ("\u4f60\u597d\u4e16\u754c", 4),
        ("GPT\u6a21\u578b3", 4),
        ("\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", 2),
        ("\u0e2a\u0e27\u0e14", 3),
        ("na\u00efve caf\u00e9", 2),
        ("bad \ud800 surrogate", 2),
    ],
)
def test_words(text, words):
    assert len(word_hashes(text)) == words
    assert len(set(word_hashes(text).tolist())) == words


def test_passages_in_scripts_without_spaces_are_found():
    rng = random.Random(0)
    passage = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(40))
    index = NgramIndex.build({"zh": [passage]})
    assert index.matches("\u524d" + passage[5:20] + "\u5f8c").items == [("zh", 0)]
    assert not index.matches(passage[5:17] + "\u5f8c" + passage[18:30])


def test_hashes_differ_for_words_that_do():
    words = [f"{a}{b}{c}" for a in "abcxyz01" for b in "abcxyz01" for c in ("", "a", "0", "aa", "a" * 300)]
    assert len(set(word_hashes(" ".join(words)).tolist())) == len(set(words))
    spans = span_hashes(word_hashes(sentence(0, 5_000)), 3)
    assert len(spans) == 4_998 and len(set(spans.tolist())) == len(set(grams(sentence(0, 5_000), 3)))
    assert set(span_hashes(word_hashes("a a a"), 2)).isdisjoint(span_hashes(word_hashes("a a a"), 3))


def test_short_items_are_looked_for_as_a_whole():
    ten, three = sentence(1, 10), sentence(2, 3)
    index = NgramIndex.build({"b": [ten, three, ""]})
    assert index.matches(f"{sentence(3, 20)} {ten} {sentence(4, 20)}").items == [("b", 0)]
    assert index.matches(ten).coverage == {"b": 1.0}
    assert not index.matches(f"{sentence(3, 20)} {ten[:-1]}x {sentence(4, 20)}")
    assert not index.matches(f"{sentence(3, 20)} {three} {sentence(4, 20)}")
    assert index.matches(three.upper() + "?").items == [("b", 1)]
    assert not index.matches("") and not NgramIndex().matches(ten)


def test_items_may_be_added_after_a_search():
    index = NgramIndex.build({"a": [sentence(1, 20)]})
    assert not index.matches(sentence(2, 20))
    index.add("c", sentence(2, 20))
    index.add("a", sentence(2, 20))
    assert index.matches(sentence(2, 20)).items == [("a", 1), ("c", 0)]


def test_pickles_and_digests_are_the_same_in_every_process():
    code = (
        "import sys; from mobilellm_hf.data.ngrams import NgramIndex\n"
        "index = NgramIndex.build({'a': ['one two three four'] * 2, 'b': ['caf\\u00e9 \\u4f60']}, 2)\n"
        "sys.stdout.write(index.digest())"
    )
    index = NgramIndex.build({"a": ["one two three four"] * 2, "b": ["caf\u00e9 \u4f60"]}, 2)
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == index.digest()
    again = pickle.loads(pickle.dumps(index))
    assert again.digest() == index.digest() and again.matches("two three") == index.matches("two three")
    assert NgramIndex.build({"a": ["one two three four"], "b": ["caf\u00e9 \u4f60"]}, 2).digest() != index.digest()
    with pytest.raises(ValueError, match="must be positive"):
        NgramIndex(0)


def test_a_document_is_shared_if_equal_or_mostly_contained():
    probe, other = sentence(1, 200), sentence(2, 200)
    shared = SharedText({"code": [probe, "two words"], "math": [other, probe]})
    words = probe.split()
    assert shared(probe.replace(" ", "\n ")) == ["code", "math"]
    assert shared(other) == ["math"]
    assert shared(" ".join(words[:120])) == ["code", "math"]
    # 100 of 212 spans, then 120 of them.
    assert shared(" ".join(words[:112]) + " " + sentence(3, 112)) == []
    assert shared(" ".join(words[:150]) + " " + sentence(3, 100)) == ["code", "math"]
    assert shared("two  words\n") == ["code"] and shared("two words more") == []
    assert SharedText({"x": ["??"]})("? ?") == [] and SharedText({"x": ["? ?"]})("?  ?") == ["x"]
    with pytest.raises(ValueError, match="max_coverage"):
        SharedText({}, max_coverage=1.0)


@pytest.mark.parametrize("streaming", [False, True])
def test_shared_documents_are_left_out_and_counted(streaming, caplog):
    texts = [sentence(seed, 50) for seed in range(30)]
    documents = Dataset.from_dict({"text": texts, "source": ["s"] * 30})
    given = documents.to_iterable_dataset() if streaming else documents
    with caplog.at_level(logging.INFO, "mobilellm_hf.data.ngrams"):
        left = leave_out(given, SharedText({"p": texts[3:8]}), "my corpus")
        assert [row["text"] for row in left] == texts[:3] + texts[8:]
    assert type(left) is type(given)
    assert f"my corpus: 5 {'documents' if streaming else 'of 30 documents'}" in caplog.text


def test_no_hash_is_found_by_chance():
    index = NgramIndex.build({"a": [sentence(seed, 400, 10**6) for seed in range(300)]})
    assert sum(bool(index.matches(sentence(seed, 400, 10**6))) for seed in range(1_000, 1_300)) == 0
    assert np.unique(index._hashes).size > 116_000
