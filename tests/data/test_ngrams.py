"""Shared passages against sets of word tuples; what counts as a word; the same hashes in every process."""

import copy
import logging
import pickle
import random
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from datasets import Dataset

from mobilellm_hf.data import ngrams
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
        # Hindi, and Arabic with vowel signs.
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e", 2),
        ("\u0643\u064e\u062a\u064e\u0628\u064e \u0627\u0644\u062f\u0651\u064e\u0631\u0652\u0633\u064e", 2),
        # Letters that no composed one stands for, and marks beyond U+FFFF.
        ("x\u0301y x\u0300y \U00011013\U00011038\U00011013", 3),
        # Marks belong to a Thai character, or a Chinese one with its variation, that is a word by itself.
        ("\u0e17\u0e35\u0e48\u0e17", 2),
        ("\u845b\U000e0100\u845b", 2),
        # Without a letter they are no word.
        ("\u0301 _\u093e \u0e35 \u2764\ufe0f", 0),
    ],
)
def test_words(text, words):
    assert len(word_hashes(text)) == words
    assert len(set(word_hashes(text).tolist())) == words


def test_words_are_equal_if_they_are_after_normalization():
    cafe = word_hashes("caf\u00e9")
    assert word_hashes("CAFE\u0301").tolist() == cafe.tolist() != word_hashes("cafe").tolist()
    assert word_hashes("(\u0301caf\u00e9)").tolist() == cafe.tolist()
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"
    assert word_hashes(f"in {hindi}, yes")[1] == word_hashes(hindi)[0] != word_hashes(hindi[:-1])[0]


def test_every_mark_continues_a_word_and_begins_none():
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)).startswith("M"):
            normal = unicodedata.normalize("NFKC", f"x{chr(code)}x")
            # Two marks have no form in NFKC but one that begins with a letter or a space.
            if all(unicodedata.category(mark).startswith("M") for mark in normal[1:-1]):
                assert len(word_hashes(f"x{chr(code)}x")) == 1 and len(word_hashes(chr(code))) == 0, hex(code)


def mixed(rng: random.Random) -> str:
    """Words, and what a cut could go wrong at: marks, wide letters, white space of several kinds, no white space."""
    pieces = ["a", "Bc", "d1", "e", "\u0301", "=", "\u0338", "\u03a3", "\u00e9", "_", ".", " ", "\n", "\r\n", "\u3000"]
    pieces += ["\u4f60", "\u597d", "\u3002", "\U000e0100", "\u0e19", "\u0e49", "\u0e33", "\u0928", "\u094d", "\uff76"]
    pieces += [
        "\uff9e",
        "\u1100",
        "\u1161",
        "\ufdfa",
        "\ud800",
        "\u2003",
        "\u200d",
        "\u01c6",
        "\U0001f600\ufe0f",
        "  ",
    ]
    return "".join(rng.choices(pieces, k=rng.randrange(150)))


@pytest.mark.parametrize("piece", [1, 7, 40])
def test_texts_in_pieces_are_as_in_one(piece, monkeypatch):
    rng = random.Random(piece)
    items = {name: [mixed(rng) for _ in range(20)] for name in "ab"}
    known = items["a"] + items["b"]
    texts = [mixed(rng) + rng.choice(known)[rng.randrange(9) :] + mixed(rng) for _ in range(60)] + known
    pairs = [(1, 1), (3, 1), (13, 2)]

    def results() -> list:
        indices = [NgramIndex.build(items, n, min_words) for n, min_words in pairs]
        shared = SharedText(items)
        found = [([index.matches(text) for text in texts], index.digest()) for index in indices]
        return [
            found,
            shared._equal,
            [shared(text) for text in texts],
            [list(ngrams._runs(text, 1)) for text in texts],
        ]

    whole = results()
    monkeypatch.setattr(ngrams, "PIECE", piece)
    assert max(len(list(ngrams._pieces(text))) for text in texts) > 2
    in_pieces = results()
    assert in_pieces[:3] == whole[:3]
    assert sum(map(bool, whole[0][2][0])) > 60
    for runs, (text, one) in zip(in_pieces[3], zip(texts, whole[3])):
        assert np.concatenate([*runs, []]).tolist() == np.concatenate([*one, []]).tolist(), text


def test_equal_texts_in_pieces_are_those_with_equal_words(monkeypatch):
    rng = random.Random(0)
    texts = [mixed(rng) for _ in range(100)]
    expected = [ngrams._digest(" ".join(text.split())) for text in texts]
    monkeypatch.setattr(ngrams, "PIECE", 3)
    assert [ngrams._digest(text) for text in texts] == expected


def test_large_tables_of_powers_are_not_kept(monkeypatch):
    words = word_hashes(sentence(0, 500))
    expected = span_hashes(words, 5).tolist()
    monkeypatch.setattr(ngrams, "_CACHED_POWERS", 256)
    ngrams._powers.cache_clear()
    assert span_hashes(words, 5).tolist() == expected
    assert span_hashes(words[:200], 5).tolist() == expected[:196]
    assert ngrams._powers.cache_info().currsize == 1


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


def test_copies_of_a_stream_share_the_index():
    texts = [sentence(seed, 50) for seed in range(30)]
    shared = SharedText({"p": texts[3:8]})
    documents = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    stream = leave_out(documents, shared, "my corpus")
    again = copy.deepcopy(stream)
    filters = [copied._ex_iterable.function.args[0] for copied in (stream, again)]
    assert filters[0] is not filters[1] and filters[1].shared is shared
    again.set_epoch(1)
    assert [row["text"] for row in again] == [row["text"] for row in stream] == texts[:3] + texts[8:]
    assert not shared.index._new
    assert pickle.loads(pickle.dumps(shared))(texts[3]) == ["p"]


def test_no_hash_is_found_by_chance():
    index = NgramIndex.build({"a": [sentence(seed, 400, 10**6) for seed in range(300)]})
    assert sum(bool(index.matches(sentence(seed, 400, 10**6))) for seed in range(1_000, 1_300)) == 0
    assert np.unique(index._hashes).size > 116_000
