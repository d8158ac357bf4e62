"""Documents that are both scored and probed: they would be found helpful for being the probe."""

from collections.abc import Iterator, Mapping

import numpy as np
from datasets import Dataset

# Tokens of a span that counts as shared; a shared document of twice that length contains one wherever rows begin.
SPAN = 16
_BASE = np.uint64(0x9E3779B97F4A7C15)


# What files of a project have in common, such as licence headers, is less than this share of a row.
MAX_SHARE = 0.5


def find_overlap(dataset: Dataset, probes: Mapping[str, Dataset]) -> dict[int, tuple[str, float]]:
    """Rows of `dataset` more than half of which occurs in a probe: row -> (the probe, the share that occurs there).

    A row is read as spans of 16 tokens, laid end to end, and searched for in the probes at every offset, so that a
    document is found wherever packing put it. A row shorter than a span counts as a whole. What all conversations
    begin with and none learns, such as a system prompt, is not looked at.
    """
    start = _shared_start([dataset, *probes.values()])
    known = {
        name: np.unique(np.concatenate([np.zeros(0, np.uint64), *(_every_span(ids[start:]) for ids in _rows(probe))]))
        for name, probe in probes.items()
    }
    found = {}
    for row, ids in enumerate(_rows(dataset)):
        spans = _every_span(ids[start:])[::SPAN]
        shares = {name: _share_in(spans, hashes) for name, hashes in known.items()}
        name = max(shares, key=shares.get, default=None)
        if name is not None and shares[name] > MAX_SHARE:
            found[row] = (name, shares[name])
    return found


def _share_in(spans: np.ndarray, known: np.ndarray) -> float:
    """known: sorted."""
    if len(spans) == 0 or len(known) == 0:
        return 0.0
    places = np.minimum(np.searchsorted(known, spans), len(known) - 1)
    return float((known[places] == spans).mean())


def refuse_overlap(
    dataset: Dataset, probes: Mapping[str, Dataset], remedy: str, *, what: str = "the scored data"
) -> None:
    """Raises a ValueError that says what the dataset is, the first rows that `find_overlap` finds, and the remedy."""
    if found := find_overlap(dataset, probes):
        first = [f"row {row} with probe {name!r} ({share:.0%})" for row, (name, share) in list(found.items())[:5]]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(f"{what} shares documents with the probes: {', '.join(first)}{more}. {remedy}")


def _rows(dataset: Dataset, column: str = "input_ids", dtype: type = np.uint64) -> Iterator[np.ndarray]:
    for batch in dataset.select_columns(column).with_format("numpy").iter(1_000):
        yield from (np.asarray(values).astype(dtype) for values in batch[column])


def _shared_start(datasets: list[Dataset]) -> int:
    """How many tokens all rows begin with alike and learn in none."""
    if any("labels" not in dataset.column_names for dataset in datasets):
        return 0
    start: np.ndarray | None = None
    for dataset in datasets:
        for ids, labels in zip(_rows(dataset), _rows(dataset, "labels", np.int64)):
            unlearnt = ids[: np.append(np.flatnonzero(labels != -100), len(ids))[0]]
            start = unlearnt if start is None else start
            length = min(len(start), len(unlearnt))
            start = start[: np.append(np.flatnonzero(start[:length] != unlearnt[:length]), length)[0]]
            if len(start) == 0:
                return 0
    return 0 if start is None else len(start)


def _every_span(ids: np.ndarray) -> np.ndarray:
    """A hash of the `SPAN` tokens from each position on; of all tokens, if there are fewer."""
    span = min(SPAN, len(ids))
    if span == 0:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(len(ids) - span + 1, np.uint64)
    for offset in range(span):  # wraps around 2**64, on purpose
        hashes = (hashes ^ (ids[offset : offset + len(hashes)] + np.uint64(1))) * _BASE
        hashes ^= hashes >> np.uint64(29)
    return hashes
