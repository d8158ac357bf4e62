"""Similarity alone: what sources get if text is resampled until its n-grams are as frequent as the probes'. No model.

    found = similarity(proxy)
    found.details["by_probe"]["math"]           # the weights that this probe alone would give

Each n-gram counts by its importance p(b) / q(b), its frequency in the probes over that in all sources together, as in
DSIR (2302.03169): pairs of tokens and single ones, hashed to 10,000 buckets. The weight of a source is the importance
of its n-grams times its share of them, w_j = share_j sum_b q_j(b) p(b) / q(b): its part of the resampled n-grams. DSIR
has words where this has tokens, and draws whole documents, whose importance is the product over their n-grams, so that
a handful outweighs all others. If influence finds nothing but likeness, it does no better than this.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from mobilellm_hf.audit.proxy import Proxy
from mobilellm_hf.audit.rivals.common import RivalWeights, check_proxy, named_weights, proportional_weights

BUCKETS = 10_000
_BASE = np.uint64(0x9E3779B97F4A7C15)


def ngram_counts(rows: Dataset, buckets: int = BUCKETS) -> np.ndarray:
    """(buckets,) how often single tokens and pairs of tokens that follow each other fall into each, float64.

    Args:
        rows: with `input_ids`; where `position_ids` start again, another document begins, and no pair goes over it.
    """
    columns = [name for name in ("input_ids", "position_ids") if name in rows.column_names]
    counts = np.zeros(buckets)
    for batch in rows.select_columns(columns).with_format("numpy").iter(1_000):
        ids = np.concatenate([np.asarray(row) for row in batch["input_ids"]]).astype(np.uint64)
        lengths = np.array([len(row) for row in batch["input_ids"]])
        starts = np.zeros(len(ids), bool)
        starts[np.cumsum(lengths) - lengths] = True
        if "position_ids" in batch:
            starts |= np.concatenate([np.asarray(row) for row in batch["position_ids"]]) == 0
        # A single token is the pair of it and of nothing; ids are counted from 1 on for it.
        pairs = (ids[:-1] + np.uint64(1), ids[1:] + np.uint64(1))
        followed = ~starts[1:]
        for first, second in ((np.zeros(len(ids), np.uint64), ids + np.uint64(1)), (p[followed] for p in pairs)):
            counts += np.bincount(_bucket(first, second, buckets), minlength=buckets)
    return counts


def _bucket(first: np.ndarray, second: np.ndarray, buckets: int) -> np.ndarray:
    hashes = first * _BASE  # wraps around 2**64, on purpose, here and below
    hashes = (hashes ^ (hashes >> np.uint64(29)) ^ second) * _BASE
    hashes ^= hashes >> np.uint64(32)
    return (hashes % np.uint64(buckets)).astype(np.int64)


def importance_shares(counts: np.ndarray, shares: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(sources,) w_j = share_j sum_b q_j(b) p(b) / q(b), which sum to 1; n-grams that no source has are left out.

    Args:
        counts: (sources, buckets) of the sources; each becomes the frequencies q_j.
        shares: (sources,) of the tokens; q = sum_j share_j q_j.
        target: (buckets,) frequencies or counts p of the probes.

    Raises:
        ValueError: the sources share no n-gram with the probes.
    """
    frequencies = counts / counts.sum(1, keepdims=True)
    pooled = shares @ frequencies
    known = pooled > 0
    weights = shares * (frequencies[:, known] @ (target[known] / pooled[known]))
    if not weights.sum() > 0:
        raise ValueError("the sources share no token with the probes: were they tokenized by the same tokenizer?")
    return weights / weights.sum()


def similarity(proxy: Proxy, *, buckets: int = BUCKETS) -> RivalWeights:
    """The weights by importance, the probes weighing alike.

    Raises:
        ValueError: a probe without rows, fewer than two buckets, or nothing that sources and probes share.
    """
    check_proxy(proxy)
    if buckets < 2:
        raise ValueError(f"buckets={buckets} must be 2 or more")
    counts = np.stack([ngram_counts(rows, buckets) for rows in proxy.sources.values()])
    targets = {name: ngram_counts(rows, buckets) for name, rows in proxy.tuning_probes.items()}
    targets = {name: target / target.sum() for name, target in targets.items()}
    shares = proportional_weights(proxy)
    weights = importance_shares(counts, shares, np.mean(list(targets.values()), axis=0))
    by_probe = {name: importance_shares(counts, shares, target) for name, target in targets.items()}
    details = {"by_probe": {name: named_weights(proxy, found) for name, found in by_probe.items()}}
    return RivalWeights(named_weights(proxy, weights), 0, details)
