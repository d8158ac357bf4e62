"""Weighted draws: shares, no repetition within an epoch, determinism."""

import collections
import logging

import pytest
from datasets import Dataset

from mobilellm_hf.data.mixture import draw_rows

ROWS = Dataset.from_dict({"row": list(range(300)), "source": ["a"] * 200 + ["b"] * 90 + ["c"] * 10})


def test_shares_follow_the_weights_and_no_row_repeats_before_all_were_seen():
    drawn, report = draw_rows(ROWS, {"a": 0.3, "b": 0.6, "c": 0.1}, 400, seed=3)
    counts = collections.Counter(drawn["source"][:])
    assert counts == {name: draw.rows for name, draw in report.items()}
    for name, weight in (("a", 0.3), ("b", 0.6), ("c", 0.1)):
        assert abs(counts[name] - 400 * weight) < 4 * (400 * weight * (1 - weight)) ** 0.5
    for name, size in (("a", 200), ("b", 90), ("c", 10)):
        rows = [row for row, source in zip(drawn["row"][:], drawn["source"][:]) if source == name]
        for start in range(0, len(rows), size):
            epoch = rows[start : start + size]
            assert len(set(epoch)) == len(epoch)
        assert report[name].epochs == pytest.approx(len(rows) / size)


def test_a_draw_is_a_function_of_its_seed():
    weights = {"a": 0.5, "b": 0.5}
    first, again, other = (draw_rows(ROWS, weights, 50, seed=seed)[0]["row"][:] for seed in (1, 1, 2))
    assert first == again != other
    assert first != sorted(first)


def test_a_source_without_weight_is_not_drawn_and_much_repetition_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        drawn, _ = draw_rows(ROWS, {"a": 0.0, "c": 1.0}, 50)
    assert set(drawn["source"][:]) == {"c"}
    assert "c is read 5.0 times" in caplog.text


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="shares that sum to 1"):
        draw_rows(ROWS, weights, 10)


def test_a_weight_for_a_source_without_rows_is_refused():
    with pytest.raises(ValueError, match="gives 'd' a weight of 0.500"):
        draw_rows(ROWS, {"a": 0.5, "d": 0.5}, 10)
