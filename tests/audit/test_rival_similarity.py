"""Counts and importance by hand, and rows that are worked out by brute force."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from rival_cases import make_proxy, rows

from mobilellm_hf.audit.rivals import similarity
from mobilellm_hf.audit.rivals.similarity import importance_shares, ngram_counts


def test_every_token_and_every_pair_within_a_document_is_counted():
    data = Dataset.from_dict({"input_ids": [[5, 6, 5, 6, 7], [5, 6]], "position_ids": [[0, 1, 2, 0, 1], [0, 1]]})
    counts = ngram_counts(data, buckets=1_000_003)
    # 5 and 6 three times, 7 once; 5-6 twice, 6-5 and 6-7 once; 5-6 over a boundary, and from row to row, not at all.
    assert Counter(counts[counts > 0].tolist()) == {3.0: 2, 2.0: 1, 1.0: 3}
    without = ngram_counts(data.remove_columns("position_ids"), buckets=1_000_003)
    assert without.sum() == counts.sum() + 1
    assert ngram_counts(data, buckets=7).sum() == counts.sum()
    ragged = ngram_counts(Dataset.from_dict({"input_ids": [[5, 6, 5], [6]]}), buckets=1_000_003)
    assert ragged.sum() == 6


def test_pairs_have_an_order_and_are_no_single_tokens():
    def buckets(ids: list[list[int]]) -> set[int]:
        return set(np.flatnonzero(ngram_counts(Dataset.from_dict({"input_ids": ids}), buckets=1_000_003)))

    assert len(buckets([[8, 9]]) & buckets([[9, 8]])) == 2  # the two single tokens
    assert len(buckets([[a, b] for a in range(20) for b in range(20)])) == 20 + 400
    assert len(buckets([[0, 1]])) == 3


def test_importance_by_hand():
    counts = np.array([[8.0, 2.0, 0.0], [0.0, 5.0, 5.0]])
    shares, target = np.array([0.75, 0.25]), np.array([0.2, 0.3, 0.5])
    # q = (0.6, 0.275, 0.125); p / q = (1/3, 12/11, 4)
    first = 0.75 * (0.8 / 3 + 0.2 * 12 / 11)
    second = 0.25 * (0.5 * 12 / 11 + 0.5 * 4)
    assert first + second == pytest.approx(1)
    np.testing.assert_allclose(importance_shares(counts, shares, target), [first, second])
    # What no source has is left out, and the rest sums to 1.
    np.testing.assert_allclose(
        importance_shares(np.pad(counts, ((0, 0), (0, 1))), shares, np.append(target, 3.0)), [first, second]
    )
    with pytest.raises(ValueError, match="share no token"):
        importance_shares(np.array([[1.0, 0.0], [1.0, 0.0]]), np.full(2, 0.5), np.array([0.0, 1.0]))


def test_a_probe_like_the_pool_leaves_the_shares_as_they_are():
    random = np.random.default_rng(0)
    counts, shares = random.uniform(0, 1, (3, 50)), np.array([0.5, 0.3, 0.2])
    pooled = shares @ (counts / counts.sum(1, keepdims=True))
    np.testing.assert_allclose(importance_shares(counts, shares, pooled), shares)
    np.testing.assert_allclose(importance_shares(counts * [[1], [7], [3]], shares, pooled), shares)


@pytest.mark.parametrize("probe", ["up", "down", "noise"])
def test_the_source_that_is_the_probe_gets_the_largest_weight(tmp_path, probe):
    proxy = make_proxy(tmp_path, probe=probe)
    found = similarity(proxy)
    assert max(found.weights, key=found.weights.get) == probe and found.tokens == 0
    assert sum(found.weights.values()) == pytest.approx(1)
    assert found.details["by_probe"][probe] == pytest.approx(found.weights)


def test_probes_weigh_alike_and_large_sources_start_ahead(tmp_path):
    proxy = make_proxy(tmp_path, {"noise": 300, "up": 50, "down": 50})
    proxy.tuning_probes["down"] = rows("down", 3, 5)
    found = similarity(proxy)
    both = [found.details["by_probe"][name] for name in ("up", "down")]
    for source, weight in found.weights.items():
        assert weight == pytest.approx((both[0][source] + both[1][source]) / 2, abs=0.02)
    assert both[0]["up"] > both[0]["down"] and both[1]["down"] > both[1]["up"]
    even = make_proxy(tmp_path, {"noise": 100, "up": 100, "down": 100})
    assert found.details["by_probe"]["up"]["noise"] > similarity(even).weights["noise"]


def test_bad_input_is_named(tmp_path):
    proxy = make_proxy(tmp_path)
    with pytest.raises(ValueError, match="buckets=1"):
        similarity(proxy, buckets=1)
    proxy.tuning_probes["empty"] = rows("up", 2, 1).select([])
    with pytest.raises(ValueError, match="tuning probe 'empty' has no rows"):
        similarity(proxy)
