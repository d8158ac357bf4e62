"""Texts that share passages, found by n-grams of words: what a benchmark, or a probe set, has in common with a corpus.

    index = NgramIndex.build({"gsm8k": questions})
    index.matches(document)             # which items it shares 13 words in a row with, and how much of it is shared
    SharedText({"code": probe_texts})(document)     # the probe sets that more than half of it is from

What counts as a word suits prose, code and scripts without spaces alike: letters and digits in a row, with their
combining marks, in lower case; a Chinese, Japanese, Thai, Lao, Burmese or Khmer character with its marks is a word by
itself. All else, underscores and marks without a letter too, separates. So layout, punctuation and markup do not hide
a copy. Words are hashed to 64 bits with fixed constants, the same in every process: in an index of a hundred million
n-grams, one document in a hundred million of a thousand words is found by chance.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

N = 13
# Texts with fewer words than n are looked for as a whole, anywhere, from so many words on; shorter ones are found
# only where they are all of a text, since a few common words in a row mean nothing.
MIN_WORDS = 8
# What files of a project have in common, such as licence headers, is less than this share of a document.
MAX_COVERAGE = 0.5
# Characters that are hashed at a time, which bounds the memory that a long text takes.
PIECE = 1 << 20

_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Pieces may begin with these: no word goes on with one, and normalization joins none to what is before it.
_CUT = re.compile("[\\s!-/:-@[-`{-~\u4e00-\u9fff]")
# Of ASCII, all that is no letter or digit becomes a space. The bytes of other words are above 127 and stay.
_TABLE = bytes(byte if byte > 127 or chr(byte).isalnum() else 32 for byte in range(256))
_BYTES = np.random.Generator(np.random.PCG64(1)).integers(1, 2**63, 256, dtype=np.uint64)
_BYTES[32] = 0
_BASE = np.uint64(0x9E3779B97F4A7C15)
# The largest table of powers that is kept, 1 MiB; a larger one takes less time than the text that it is for.
_CACHED_POWERS = 1 << 16


# Without combining marks; to look for them after each word takes half as long again, and most texts have none.
_WORDS = re.compile(f"[{_ALONE}]|[^\\W_{_ALONE}]+")


@functools.cache
def _marks() -> np.ndarray:
    """Whether a character is of category M, (0x110000,) bool; beyond U+1FFFF only variation selectors are."""
    found = np.zeros(0x110000, bool)
    for code in (*range(0x0300, 0x20000), *range(0xE0100, 0xE01F0)):
        found[code] = unicodedata.category(chr(code)).startswith("M")
    return found


@functools.cache
def _marked_words() -> re.Pattern[str]:
    """The pattern of a word, with its marks."""
    edges = np.flatnonzero(np.diff(_marks(), prepend=False, append=False))
    marks = "".join(f"{chr(start)}-{chr(end - 1)}" for start, end in edges.reshape(-1, 2).tolist())
    letters = f"[^\\W_{_ALONE}]"
    # `re` is slow to find that a character is in none of many ranges, so what mostly follows a word is tried first.
    mark = f"(?=[^\\w\\s!-/])[{marks}]"
    return re.compile(f"(?!{mark})[{_ALONE}](?:{mark})*|{letters}+(?:{mark}{letters}*)*")


def word_hashes(text: str) -> np.ndarray:
    """A hash of each word of a text, (words,), uint64."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        has_marks = _marks()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")].any()
        text = " ".join((_marked_words() if has_marks else _WORDS).findall(text))
    text = text.lower()
    letters = np.frombuffer(text.encode("utf-8", "surrogatepass").translate(_TABLE), np.uint8)
    is_letter = letters != 32
    framed = np.zeros(len(letters) + 2, bool)
    framed[1:-1] = is_letter
    edges = np.flatnonzero(framed[1:] != framed[:-1])
    lengths = edges[1::2] - edges[::2]
    if len(lengths) == 0:
        return np.zeros(0, np.uint64)
    # A polynomial in the letters of each word; here and below, integers wrap around 2**64 on purpose.
    starts = np.cumsum(lengths) - lengths
    places = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    powers = np.multiply.accumulate(np.full(int(lengths.max()), _BASE))
    return _mix(np.add.reduceat(_BYTES[letters[is_letter]] * powers[places], starts))


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of hardly more than PIECE characters, whose words one after another are those of the text."""
    start = 0
    while len(text) - start > PIECE and (cut := _CUT.search(text, start + PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _runs(text: str, n: int) -> Iterator[np.ndarray]:
    """Word hashes of a text, a piece at a time: each run but the first begins with the last n - 1 words of the one
    before, so each n words in a row are in one run. Only if the text has fewer does a run have fewer; it is all of it.
    """
    words, found = np.zeros(0, np.uint64), False
    for piece in _pieces(text):
        words = np.concatenate([words, word_hashes(piece)])
        if len(words) >= n:
            yield words
            words, found = words[len(words) - n + 1 :], True
    if len(words) and not found:
        yield words


def span_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """A hash of each `length` words in a row, (words - length + 1,), uint64; none if there are fewer words."""
    count = len(words) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    size = 1 << len(words).bit_length()
    powers, inverses = _powers(size) if size <= _CACHED_POWERS else _powers.__wrapped__(size)
    # The difference of two running sums is a polynomial in the words between them, shifted by their place.
    sums = np.cumsum(words * powers[: len(words)])
    spans = sums[length - 1 :].copy()
    spans[1:] -= sums[: count - 1]
    return _mix(spans * inverses[:count] + np.uint64(length))


@functools.lru_cache(maxsize=32)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers from 0 on of an odd number, and of its inverse modulo 2**64."""
    bases = _BASE, np.uint64(pow(int(_BASE), -1, 2**64))
    powers = [np.multiply.accumulate(np.full(count, base)) for base in bases]
    for found, base in zip(powers, bases):
        found *= pow(int(base), -1, 2**64)
    return tuple(powers)


def _mix(hashes: np.ndarray) -> np.ndarray:
    mixed = hashes * _BASE
    mixed ^= mixed >> np.uint64(29)
    return mixed


@dataclass(frozen=True)
class Matches:
    """What a text has in common with an index.

    Attributes:
        items: name and number of each item that it shares a span with, in their order.
        coverage: name -> the share of the text's n-grams that occur in it, for those that share one.
    """

    items: list[tuple[str, int]]
    coverage: dict[str, float]

    def __bool__(self) -> bool:
        return bool(self.items)


class NgramIndex:
    """Spans of n words, and the items they are from: 28 to 44 bytes for each. It pickles, as `datasets.map` asks.

    Args:
        n: words in a row that count as shared.
        min_words: items of fewer than n words, but so many, are looked for as a whole. Still shorter ones, and texts
            that are themselves shorter than n, match where the whole of both is equal.
    """

    def __init__(self, n: int = N, min_words: int = MIN_WORDS):
        if n < 1 or min_words < 1:
            raise ValueError(f"n ({n}) and min_words ({min_words}) must be positive")
        self.n, self.min_words = n, min_words
        self.names: list[str] = []
        self._counts: dict[str, int] = {}
        self._owners: list[tuple[int, int]] = []  # of each item the number of its name, and its own under that
        self._short: set[int] = set()
        self._new: list[tuple[np.ndarray, int]] = []
        self._hashes, self._items = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self._names = np.zeros(0, np.int64)

    @classmethod
    def build(cls, texts: Mapping[str, Iterable[str]], n: int = N, min_words: int = MIN_WORDS) -> NgramIndex:
        """An index of name -> items."""
        index = cls(n, min_words)
        for name, items in texts.items():
            for text in items:
                index.add(name, text)
        return index

    @property
    def counts(self) -> dict[str, int]:
        """Name -> its items."""
        return dict(self._counts)

    def add(self, name: str, text: str) -> None:
        """Adds an item; the items of a name are numbered as they come."""
        if name not in self._counts:
            self.names.append(name)
        spans, length = [], 0
        for words in _runs(text, self.n):
            length = min(self.n, len(words))
            spans.append(np.unique(span_hashes(words, length)))
        if length:
            self._new.append((np.unique(np.concatenate(spans)), len(self._owners)))
            if self.min_words <= length < self.n:
                self._short.add(length)
        self._owners.append((self.names.index(name), self._counts.get(name, 0)))
        self._counts[name] = self._counts.get(name, 0) + 1

    def __getstate__(self) -> dict:
        self._sort()
        return self.__dict__

    def _sort(self) -> None:
        if self._new:
            hashes = np.concatenate([self._hashes, *(found for found, _ in self._new)])
            sizes = [len(found) for found, _ in self._new]
            items = np.concatenate([self._items, np.repeat([item for _, item in self._new], sizes).astype(np.int32)])
            order = np.argsort(hashes, kind="stable")
            self._hashes, self._items, self._new = hashes[order], items[order], []
            self._names = np.array([name for name, _ in self._owners], np.int64)
            # Sixteen places for each hash: a look at one of them spares fifteen of sixteen searches in vain.
            self._shift = np.uint64(64 - 4 - len(hashes).bit_length())
            self._marks = np.zeros(1 << (64 - int(self._shift)), bool)
            self._marks[hashes >> self._shift] = True

    def digest(self) -> str:
        """What identifies the index: equal if and only if what was added is equal."""
        self._sort()
        digest = hashlib.blake2b(repr((self.n, self.min_words, self.names, self._owners)).encode(), digest_size=16)
        digest.update(self._hashes.astype("<u8").tobytes() + self._items.astype("<i4").tobytes())
        return digest.hexdigest()

    def matches(self, text: str) -> Matches:
        """The items that a text shares a span with, and how much of it each name covers."""
        self._sort()
        if not len(self._hashes):
            return Matches([], {})
        chosen: set[int] = set()
        covered, total = np.zeros(len(self.names), np.int64), 0
        for words in _runs(text, self.n):
            length = min(self.n, len(words))
            spans = span_hashes(words, length)
            total += len(spans)
            shorter = [span_hashes(words, fewer) for fewer in sorted(self._short) if fewer < length]
            found, items = self._look_up(np.concatenate([spans, *shorter]))
            if not len(items):
                continue
            chosen.update(np.unique(items).tolist())
            whole = found < len(spans)
            found, items = found[whole], items[whole]
            # Each span counts once for a name, however many of its items it is in.
            spans_of_names = np.unique(self._names[items] * len(spans) + found) // len(spans)
            covered += np.bincount(spans_of_names, minlength=len(self.names))
        owners = sorted(self._owners[item] for item in chosen)
        coverage = {self.names[name]: float(covered[name] / total) for name, _ in owners}
        return Matches([(self.names[name], number) for name, number in owners], coverage)

    def _look_up(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of spans that occur, and the items they occur in; a place for each of these."""
        places = np.flatnonzero(self._marks[spans >> self._shift])
        first = np.searchsorted(self._hashes, spans[places])
        known = self._hashes[np.minimum(first, len(self._hashes) - 1)] == spans[places]
        places, first = places[known], first[known]
        sizes = np.searchsorted(self._hashes, spans[places], "right") - first
        rows = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))
        return np.repeat(places, sizes), self._items[rows]


class SharedText:
    """Says which of several sets of texts a document is from: it equals one of them, or more than half of its n-grams
    occur in one set.

    Args:
        texts: name -> texts.
        n: words of an n-gram.
        max_coverage: share of a document's n-grams that may occur in a set.

    It pickles, and a deep copy of it is the object itself. Two texts are equal if they are after white space is
    normalised, as in `documents.FirstSeen`.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], n: int = N, max_coverage: float = MAX_COVERAGE):
        if not 0 <= max_coverage < 1:
            raise ValueError(f"max_coverage must be at least 0 and below 1, not {max_coverage}")
        self.max_coverage = max_coverage
        self.index = NgramIndex(n)
        self._equal: dict[str, set[bytes]] = {}
        for name, items in texts.items():
            seen = self._equal.setdefault(name, set())
            for text in items:
                if (digest := _digest(text)) not in seen:
                    seen.add(digest)
                    self.index.add(name, text)
        self.index._sort()

    def __deepcopy__(self, memo: dict) -> SharedText:
        # Nothing changes it from here on, and a stream is copied with all its filters for each pass over it.
        return self

    def __call__(self, text: str) -> list[str]:
        """The names of the sets that a document is from."""
        coverage = self.index.matches(text).coverage
        digest = _digest(text)
        return [
            name for name, seen in self._equal.items() if digest in seen or coverage.get(name, 0) > self.max_coverage
        ]


def _digest(text: str) -> bytes:
    """Of a text's words between single spaces."""
    digest, started, gap = hashlib.blake2b(digest_size=16), False, False
    for piece in _pieces(text):
        gap = gap or piece[:1].isspace()
        if words := piece.split():
            joined = " " * (started and gap) + " ".join(words)
            digest.update(joined.encode("utf-8", "surrogatepass"))
            started, gap = True, piece[-1].isspace()
    return digest.digest()


class _NotShared:
    """Whether texts are in none of the sets; a class, so that it pickles. Of a stream it logs what it leaves out."""

    def __init__(self, shared: SharedText, name: str, log: bool):
        self.shared, self.name, self.log, self.count = shared, name, log, 0

    def __call__(self, texts: list[str]) -> list[bool]:
        kept = [not self.shared(text) for text in texts]
        before, self.count = self.count, self.count + kept.count(False)
        # At the first one, and whenever their number has doubled.
        if self.log and self.count.bit_length() > before.bit_length():
            logger.info("%s: %d documents that probes hold are left out so far.", self.name, self.count)
        return kept


def leave_out(
    documents: Dataset | IterableDataset, shared: SharedText, name: str, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Documents (with a column `text`) without those that `shared` finds; their number is logged.

    Args:
        name: what the log calls the documents.
        num_proc: processes of `datasets.filter`; a stream has none.
    """
    from datasets import Dataset

    if not isinstance(documents, Dataset):
        return documents.filter(_NotShared(shared, name, log=True), input_columns="text", batched=True)
    kept = documents.filter(
        _NotShared(shared, name, log=False),
        input_columns="text",
        batched=True,
        num_proc=num_proc,
        desc="Leaving out probes",
    )
    logger.info(
        "%s: %d of %d documents are left out, since probes hold them.",
        name,
        len(documents) - len(kept),
        len(documents),
    )
    return kept
