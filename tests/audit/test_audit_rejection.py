"""What every arm of a rejection keeps, and that it reads no other row; models that are really trained."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from rival_cases import build_model, make_proxy, rows

from mobilellm_hf.audit.outcomes import ProbeSize, compare, read_outcomes
from mobilellm_hf.audit.proxy import build_mixture, train_mixtures
from mobilellm_hf.audit.rejection import (
    REJECTION,
    load_scores,
    matched,
    rejection_arms,
    rejection_runs,
    row_lengths,
    row_losses,
)
from mobilellm_hf.audit.verdict import verdict
from mobilellm_hf.nll import mean_nll

SIZES = {"noise": 60, "up": 60}
WEIGHTS = {"noise": 0.5, "up": 0.5}
RNG = np.random.default_rng(0)
SCORES = {"noise": RNG.normal(-1, 1, 60), "up": RNG.normal(1, 1, 60)}
OTHER = {name: values + RNG.normal(0, 1, 60) for name, values in SCORES.items()}
LOSSES = {name: RNG.normal(3, 1, 60) for name in SIZES}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_losses_and_lengths_of_rows(tmp_path):
    data, model = rows("up", 7, 0), build_model(0)
    found = row_losses(model, {"up": data}, batch_size=3)["up"]
    assert found == pytest.approx([mean_nll(model, data.select([number])) for number in range(7)], rel=1e-5)
    assert row_lengths(data).tolist() == [14] * 7  # of 16, two begin documents
    ragged = Dataset.from_dict({"input_ids": [[1, 2, 3], [1, 2]], "labels": [[1, 2, -100], [5, -100]]})
    assert row_lengths(ragged).tolist() == [1, 0] and math.isnan(row_losses(model, {"x": ragged})["x"][1])
    assert row_lengths(ragged.remove_columns("labels")).tolist() == [2, 1]


def test_matched_rows_are_as_many_in_every_stratum():
    figures = np.arange(100.0)[::-1].copy()
    keep = figures >= 70  # the three highest strata of ten
    drawn = [matched(keep, figures, np.random.default_rng(seed)) for seed in range(3)]
    assert all(np.array_equal(found, keep) for found in drawn)  # there is no other way
    some = np.zeros(100, dtype=bool)
    some[np.flatnonzero(figures >= 50)[::2]] = True
    found = matched(some, figures, np.random.default_rng(0))
    assert not np.array_equal(found, some)
    for low in range(0, 100, 10):
        stratum = (figures >= low) & (figures < low + 10)
        assert found[stratum].sum() == some[stratum].sum()
    ties = [matched(keep, np.zeros(100), np.random.default_rng(seed)) for seed in range(200)]
    assert all(chosen.sum() == 30 for chosen in ties)
    assert np.mean(ties, axis=0).min() > 0.15  # each as likely as another
    assert matched(np.ones(3, dtype=bool), np.array([np.nan, 1, 2]), np.random.default_rng(0)).all()


def test_what_every_arm_keeps(tmp_path):
    proxy = make_proxy(tmp_path, SIZES)
    arms = rejection_arms(proxy, WEIGHTS, SCORES, [0, 1], LOSSES, OTHER)
    names = ["keep_positive", "all_rows", "random_rows", "length_matched", "loss_matched", "flipped", "other_seed"]
    assert [arm.name for arm in arms] == names
    assert [arm.kind for arm in arms] == ["audited", "baseline", "baseline", "placebo", "placebo", "placebo", "rival"]
    keep = {arm.name: arm.keep for arm in arms}
    for seed, name in ((0, "noise"), (1, "up")):
        positive = SCORES[name] > 0
        assert np.array_equal(keep["keep_positive"][seed][name], positive) and keep["all_rows"][seed][name].all()
        assert np.array_equal(keep["flipped"][seed][name], ~positive)
        assert np.array_equal(keep["other_seed"][seed][name], OTHER[name] > 0)
        for matching in ("random_rows", "length_matched", "loss_matched"):
            assert keep[matching][seed][name].sum() == positive.sum()
            assert not np.array_equal(keep[matching][0][name], keep[matching][1][name])
        order = np.argsort(LOSSES[name])
        strata = [positive[part].sum() for part in np.array_split(order, 10)]
        assert [keep["loss_matched"][seed][name][part].sum() for part in np.array_split(order, 10)] == strata
    assert [arm.name for arm in rejection_arms(proxy, WEIGHTS, SCORES, [0])] == [*names[:4], "flipped"]


def test_scores_that_are_no_numbers_are_not_kept_and_an_empty_source_gives_its_share_away(tmp_path):
    proxy = make_proxy(tmp_path, SIZES)
    broken = {"noise": np.full(60, np.nan), "up": SCORES["up"]}
    arms = {arm.name: arm for arm in rejection_arms(proxy, WEIGHTS, broken, [0])}
    assert arms["keep_positive"].weights[0] == {"noise": 0.0, "up": 1.0} == arms["random_rows"].weights[0]
    assert arms["all_rows"].weights[0] == WEIGHTS == arms["flipped"].weights[0]
    with pytest.raises(ValueError, match="flipped would keep no row of any source"):
        rejection_arms(proxy, WEIGHTS, {name: np.ones(60) for name in SIZES}, [0])
    with pytest.raises(ValueError, match="keep_positive would keep no row"):
        rejection_arms(proxy, WEIGHTS, {name: -np.ones(60) for name in SIZES}, [0])
    with pytest.raises(ValueError, match=r"losses: of up, which has 60 rows, there is an array of shape \(50,\)"):
        rejection_arms(proxy, WEIGHTS, SCORES, [0], LOSSES | {"up": LOSSES["up"][:50]})
    with pytest.raises(ValueError, match="scores: of up, which has 60 rows, there is none"):
        rejection_arms(proxy, WEIGHTS, {"noise": SCORES["noise"]}, [0])


def test_arms_read_what_they_keep_and_equally_many_tokens(tmp_path):
    proxy = make_proxy(tmp_path, SIZES, max_steps=8)
    arms = rejection_arms(proxy, WEIGHTS, SCORES, [0, 1], LOSSES)
    runs = rejection_runs(proxy, arms, [0, 1], [0.01, 0.02])
    assert len(runs) == 6 * 2 * 2 == len({run.name for run in runs.values()})
    numbers = {
        tuple(row): (name, place) for name in SIZES for place, row in enumerate(proxy.sources[name]["input_ids"])
    }
    for arm in arms:
        run = runs[arm.name, 0.02, 1]
        assert run.steps == 8 and run.learning_rate == 0.02
        read = [numbers[tuple(row["input_ids"].tolist())] for row in build_mixture(proxy, run).__getitems__(range(64))]
        assert all(arm.keep[1][name][place] for name, place in read)
        assert Counter(name for name, _ in read) == {"noise": 32, "up": 32}
    charged = rejection_arms(proxy, WEIGHTS, SCORES, [0], LOSSES, OTHER, curation=0.25)
    steps = {name: run.steps for (name, _, _), run in rejection_runs(proxy, charged, [0], [0.01]).items()}
    assert {name for name, count in steps.items() if count == 8} == {arm.name for arm in charged} - {"all_rows"}
    assert steps["all_rows"] == 10
    few = {"noise": np.where(np.arange(60) < 3, 1.0, -1.0), "up": np.where(np.arange(60) < 3, 1.0, -1.0)}
    with pytest.raises(ValueError, match="keep_positive cannot be trained with seed 0 on the rows that it keeps, .*3"):
        rejection_runs(proxy, rejection_arms(proxy, WEIGHTS, few, [0]), [0], [0.01])


def test_a_rejection_is_trained_and_judged(tmp_path):
    """Of a source that holds counting up and noise, influence keeps the former: what the probe asks for."""
    proxy = make_proxy(tmp_path, {"up": 200}, max_steps=10, save_steps=10)
    mixed = concatenate_datasets([rows("up", 100, 0), rows("noise", 100, 0)])
    proxy = replace(proxy, sources={"web": mixed}, tokens_per_source={"web": 3200}, proportional={"web": 1.0})
    scores = {"web": np.where(np.arange(200) < 100, 1.0, -1.0)}
    seeds = [0, 1]
    arms = [arm for arm in rejection_arms(proxy, {"web": 1.0}, scores, seeds) if arm.name != "length_matched"]
    runs = rejection_runs(proxy, arms, seeds, [0.01])
    probes, sizes = {"up": rows("up", 10, 9)}, {"up": ProbeSize(140, 140)}
    train_mixtures(proxy, list(runs.values()), tmp_path / "plain", probes=probes)
    outcomes, spent = read_outcomes(proxy, arms, runs, tmp_path / "plain", sizes, ["up"], [])
    assert outcomes.bits.shape == (4, 1, 2, 1) and spent["flipped"]["tokens"] == 10 * 8 * 16
    comparisons = compare(outcomes, alpha=1.0)  # two seeds can show nothing at 0.05
    assert all(part.final.mean < 0 for part in comparisons)
    found = verdict(outcomes, comparisons, subject=REJECTION)
    assert found.headline.startswith("Rejection by influence helps: it is better than every baseline")
    assert (
        not any("permuted" in line for line in found.lines) and "Against the rejected rows: better." in found.lines[2]
    )


def test_scores_of_the_recipe_are_read_by_source(tmp_path):
    proxy = make_proxy(tmp_path, {"noise": 4, "up": 3})
    columns = {
        "row": list(range(7)), "source": ["up", "noise", "up", "noise", "noise", "up", "noise"], "tokens": [14] * 7,
        "code": [1.0, 2, 3, 4, 5, 6, 7], "math": [0.0, -4, 0, 0, 0, 0, 0],
    }  # fmt: skip
    columns["tokens"] = [row_lengths(proxy.sources[name])[0] for name in columns["source"]]
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "i.parquet")
    found = load_scores(tmp_path / "i.parquet", proxy.sources)
    assert found["up"].tolist() == [0.5, 1.5, 3.0] and found["noise"].tolist() == [-1.0, 2.0, 2.5, 3.5]
    assert load_scores(tmp_path / "i.parquet", proxy.sources, "math")["noise"].tolist() == [-4.0, 0, 0, 0]
    with pytest.raises(ValueError, match="score_rule='any' must be mean or one of code, math"):
        load_scores(tmp_path / "i.parquet", proxy.sources, "any")
    pyarrow.parquet.write_table(pyarrow.table(columns).drop_columns(["source"]), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="scores: .*none.parquet has no column 'source'"):
        load_scores(tmp_path / "none.parquet", proxy.sources)
    with pytest.raises(ValueError, match="scores 3 rows of up, and there are 5"):
        load_scores(tmp_path / "i.parquet", {"up": rows("up", 5, 0)})
    cut = rows("up", 3, 0).map(lambda row: {"labels": [-100] * 16})
    with pytest.raises(ValueError, match="or other ones"):
        load_scores(tmp_path / "i.parquet", {"up": cut})
