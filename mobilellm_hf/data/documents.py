"""What every corpus shares: dropping empty and repeated documents, cutting long ones, splitting by hash.

Two decisions are worth knowing. Repetition is exact (after whitespace is normalised), never fuzzy: a fuzzy rule that
merges two licences also merges two sums that differ in one digit; near-duplicates are the curation stage's business,
which has embeddings to judge by. And a split is a property of a *group* (a file, a module), decided by a hash of the
group's name: it needs no random state, two machines agree on it, and the pieces of one file never straddle two splits.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

MIN_CHARACTERS = 64
MAX_CHARACTERS = 4_000
FRACTIONS = {"train": 0.8, "probe": 0.1, "test": 0.1}


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the parts' text, the same in every process (`hash` is not: PYTHONHASHSEED salts it)."""
    joined = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(joined.encode("utf-8"), digest_size=8).digest(), "big")


def is_long_enough(text: str, min_characters: int = MIN_CHARACTERS) -> bool:
    """Whether a text has at least `min_characters` characters that are not white space."""
    return sum(map(len, text.split())) >= min_characters


class FirstSeen:
    """Says whether a document is worth keeping: long enough, and not seen before by this object.

    Args:
        min_characters: fewest characters that are not white space.

    Example:
        >>> keep = FirstSeen(min_characters=3)
        >>> [keep(text) for text in ("a sum", "a", "a  sum\\n")]
        [True, False, False]
    """

    def __init__(self, min_characters: int = MIN_CHARACTERS):
        self.min_characters = min_characters
        self.seen: set[bytes] = set()

    def __call__(self, text: str) -> bool:
        if not is_long_enough(text, self.min_characters):
            return False
        # 16 bytes a document: a hundred million documents fit in memory, and collide with probability below 1e-22.
        digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16).digest()
        if digest in self.seen:
            return False
        self.seen.add(digest)
        return True

    def batch(self, texts: Sequence[str]) -> list[bool]:
        """The same for a column; the form `datasets.Dataset.filter(batched=True)` asks for."""
        return [self(text) for text in texts]


def drop_empty_and_repeated(dataset: Dataset, min_characters: int = MIN_CHARACTERS) -> Dataset:
    """Keeps the first of every set of equal documents, and none that is nearly empty.

    Args:
        dataset: map-style, with a column `text`.
        min_characters: fewest characters that are not white space.

    Returns:
        The rows that stay, in their order. Always one process: "seen before" is a statement about all rows.
    """
    keep = FirstSeen(min_characters)
    return dataset.filter(keep.batch, input_columns="text", batched=True, desc="Dropping empty and repeated documents")


def cut_document(text: str, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Cuts a long document into pieces of at most `max_characters`, at line boundaries.

    Within a piece's second half a blank line is preferred as the place to cut, since that is where functions and
    paragraphs end. Only a single line longer than `max_characters` is cut inside. The pieces join to the whole text.
    """
    lines = [
        line[start : start + max_characters]
        for line in text.splitlines(keepends=True)
        for start in range(0, len(line), max_characters)
    ]
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for line in lines:
        while current and size + len(line) > max_characters:
            cut = _last_blank_line(current)
            pieces.append("".join(current[:cut]))
            current = current[cut:]
            size -= len(pieces[-1])
        current.append(line)
        size += len(line)
    return pieces + ["".join(current)] if current else pieces


def _last_blank_line(lines: list[str]) -> int:
    """The index after the last blank line in the second half of `lines`, their number if there is none."""
    for index in range(len(lines) - 1, len(lines) // 2, -1):
        if not lines[index].strip():
            return index + 1
    return len(lines)


def split_by_hash(
    dataset: Dataset,
    fractions: Mapping[str, float] = FRACTIONS,
    *,
    key: str | Sequence[str] = "text",
    within: str | None = None,
) -> DatasetDict:
    """Splits a data set by a hash of `key`: rows with equal keys go together, and no random state is involved.

    The keys are ordered by their hash and this order is cut where the rows counted so far reach the fractions. So the
    shares come out right even when a few keys hold most rows, every split gets at least one key, and when rows are
    added only keys close to a cut can change their split.

    Args:
        dataset: map-style.
        fractions: name of each split and its share of the rows; they sum to 1.
        key: the column, or columns, that identify a group of rows to be kept together.
        within: a column; each value of it is split by itself, so it has rows in every split (use "source").

    Returns:
        One data set per entry of `fractions`, rows in their order.

    Raises:
        ValueError: the fractions are no partition of 1, a column is missing, or there are fewer keys than splits.
    """
    from datasets import DatasetDict

    columns = [key] if isinstance(key, str) else list(key)
    if any(share <= 0 for share in fractions.values()) or not math.isclose(sum(fractions.values()), 1.0):
        raise ValueError(f"The fractions of a split must be positive and sum to 1; they are {dict(fractions)}.")
    missing = [name for name in [*columns, *([within] if within else [])] if name not in dataset.column_names]
    if missing:
        raise ValueError(f"Cannot split by {', '.join(missing)}: the data set has the columns {dataset.column_names}.")

    strata: dict[str, dict[int, list[int]]] = {}
    stratum_of_row = dataset[within][:] if within else [f"a data set of {len(dataset)} rows"] * len(dataset)
    key_of_row = zip(*(dataset[name][:] for name in columns), strict=True)
    for row, (stratum, parts) in enumerate(zip(stratum_of_row, key_of_row, strict=True)):
        strata.setdefault(stratum, {}).setdefault(stable_hash(*parts), []).append(row)
    rows: dict[str, list[int]] = {name: [] for name in fractions}
    for stratum, groups in strata.items():
        if len(groups) < len(fractions):
            raise ValueError(f"Cannot split {stratum} {len(fractions)} ways: it has {len(groups)} distinct keys.")
        ordered = [groups[hashed] for hashed in sorted(groups)]
        cuts = _cut_points([len(group) for group in ordered], list(fractions.values()))
        for name, (start, end) in zip(fractions, itertools.pairwise(cuts), strict=True):
            rows[name] += itertools.chain.from_iterable(ordered[start:end])
    return DatasetDict({name: dataset.select(sorted(chosen)) for name, chosen in rows.items()})


def _cut_points(sizes: list[int], shares: list[float]) -> list[int]:
    """Where to cut a sequence of groups so that parts hold about `shares` of the rows and at least one group each."""
    totals = list(itertools.accumulate(sizes))
    cuts = [0]
    for number, share in enumerate(itertools.accumulate(shares[:-1]), start=1):
        nearest = bisect.bisect_right(
            [2 * total - size for total, size in zip(totals, sizes, strict=True)], 2 * share * totals[-1]
        )
        cuts.append(min(max(nearest, cuts[-1] + 1), len(sizes) - (len(shares) - number)))
    return [*cuts, len(sizes)]
