"""Documents that are both scored and probed: they would be found helpful for being the probe."""

from collections.abc import Iterator, Mapping

import numpy as np
from datasets import Dataset

# Tokens of a span that counts as shared; a shared document of twice that length contains one wherever rows begin.
SPAN = 16
_BASE = np.uint64(0x9E3779B97F4A7C15)


def refuse_overlap(dataset: Dataset, probes: Mapping[str, Dataset], max_share: float = 0.5) -> None:
    """Raises a ValueError that names the first rows of `dataset` of which more than `max_share` occurs in a probe.

    A row is read as spans of 16 tokens, laid end to end, and searched for in the probes at every offset, so that a
    document is found wherever packing put it. Less than `max_share` is what files of a project have in common, such
    as licence headers. A row shorter than a span counts as a whole.
    """
    known = {
        name: np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_every_span, _rows(probe))]))
        for name, probe in probes.items()
    }
    found = []
    for row, ids in enumerate(_rows(dataset)):
        spans = _every_span(ids)[::SPAN]
        for name, hashes in known.items():
            share = np.isin(spans, hashes).mean() if len(spans) else 0.0
            if share > max_share:
                found.append(f"row {row} with probe {name!r} ({share:.0%})")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"the scored data shares documents with the probes: {', '.join(found[:5])}{more}. Take them out of the "
            "probes or of the data, or pass allow_overlap=True"
        )


def _rows(dataset: Dataset) -> Iterator[np.ndarray]:
    for batch in dataset.select_columns("input_ids").with_format("numpy").iter(1_000):
        yield from (np.asarray(ids).astype(np.uint64) for ids in batch["input_ids"])


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
