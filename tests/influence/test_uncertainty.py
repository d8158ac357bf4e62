"""Intervals and shrinkage by simulation, where the truth is known, and against resampling by hand."""

import numpy as np
import pyarrow
import pytest
import torch
from accelerate import PartialState
from influence_cases import brute_force_scores, build, predicting, probe_gradient, rows

from mobilellm_hf.influence import mixture_weights
from mobilellm_hf.influence.bootstrap import RhoDraws, bootstrap_rho, bootstrap_scores, combine_seeds
from mobilellm_hf.influence.curvature import AdamCurvature, IdentityCurvature
from mobilellm_hf.influence.folds import fold_influence, load_folds, save_folds, split_into_folds
from mobilellm_hf.influence.scoring import ScoringCheckpoint
from mobilellm_hf.influence.uncertainty import proportional_mix, shrinkage, uncertain_weights

TRUTH = np.array([1.0, 0.6, 0.3, 0.1, 0.05])
FOLDS, SAMPLES, ROWS = 8, 64, 60


def world(rng: np.random.Generator, truth=TRUTH, row_noise=1.0, probe_noise=1.0, drift=0.0) -> dict:
    """What three checkpoints would find of rows and probe samples that are drawn around the truth."""
    count = len(truth)
    tokens = rng.integers(20, 40, size=(count, ROWS))
    of_row = rng.normal(0, row_noise, (count, ROWS))
    of_sample = rng.normal(0, probe_noise, (count, SAMPLES)) + rng.normal(0, probe_noise, SAMPLES)
    checkpoints = truth + rng.normal(0, drift, (3, count))
    alpha = np.array([1, 2, 3]) / 6
    seen = alpha @ checkpoints
    own = (of_row * tokens).sum(1) / tokens.sum(1)
    per_row = seen[:, None] + of_row + of_sample.mean(1)[:, None]
    per_fold = (seen + own)[:, None] + of_sample.reshape(count, FOLDS, -1).mean(2)
    return dict(
        joint=torch.tensor(per_row.ravel()), tokens=torch.tensor(tokens.ravel()),
        groups=[f"s{number}" for number in range(count) for _ in range(ROWS)],
        folds=[(per_fold, np.full(FOLDS, SAMPLES // FOLDS))],
        by_checkpoint=(checkpoints + own + of_sample.mean(1))[:, None], alpha=alpha[:, None],
    )  # fmt: skip


def equal_shares(count: int) -> dict[str, float]:
    return {f"s{number}": 1 / count for number in range(count)}


@pytest.mark.parametrize("noise", [dict(), dict(row_noise=3, probe_noise=0.1), dict(row_noise=0.1, probe_noise=2)])
def test_intervals_cover_the_truth(noise):
    rng, covered, weights_covered, runs = np.random.default_rng(1), 0.0, 0.0, 150
    weights = TRUTH / TRUTH.sum()
    for seed in range(runs):
        run = bootstrap_rho(**world(rng, **noise), draws=400, seed=seed)
        found = uncertain_weights(run, equal_shares(5))
        low, high = np.array(list(found.rho_intervals.values())).T
        covered += ((low <= TRUTH) & (high >= TRUTH)).mean() / runs
        low, high = np.array(list(found.intervals.values())).T
        weights_covered += ((low <= weights) & (high >= weights)).mean() / runs
    # 750 intervals, of which five share a world: two standard errors are 2.5 points at most.
    assert 0.92 < covered < 0.985 and 0.90 < weights_covered < 0.985


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_nothing_but_noise_keeps_the_baseline(level):
    rng, baseline, totals = np.random.default_rng(2), {"s0": 0.7, "s1": 0.2, "s2": 0.1}, 0
    for seed in range(100):
        found = uncertain_weights(bootstrap_rho(**world(rng, np.full(3, level)), draws=300, seed=seed), baseline)
        if found.shrinkage.factor == 1:
            totals += 1
            assert found.weights == pytest.approx(baseline) and "no evidence" in found.verdict()
    assert totals >= 90  # a test at the level of 5% errs in 5 of 100


def test_a_strong_signal_is_left_alone():
    found = uncertain_weights(bootstrap_rho(**world(np.random.default_rng(3), 100 * TRUTH), seed=0), equal_shares(5))
    assert found.shrinkage.factor < 0.001 and found.weights == pytest.approx(found.unshrunk, abs=1e-3)
    assert found.unshrunk == pytest.approx(dict(zip(found.unshrunk, TRUTH / TRUTH.sum())), abs=0.01)
    assert "the sources differ" in found.verdict()


def test_between_the_two_the_factor_is_the_share_of_noise():
    rng = np.random.default_rng(4)
    rho, errors = np.array([1.0, 0.0, 0.4]), rng.normal(0, 0.2, (5_000, 3))
    found = shrinkage(rho, errors)
    signal = ((rho - rho.mean()) ** 2).sum()
    assert found.signal == pytest.approx(signal) and found.noise == pytest.approx(2 * 0.04, rel=0.05)
    assert found.factor == pytest.approx(0.08 / signal, rel=0.05) and found.p_value < 0.01
    common = errors + rng.normal(0, 50, (5_000, 1))  # what moves all sources alike tells none apart
    assert shrinkage(rho, common).factor == pytest.approx(found.factor)
    run = RhoDraws(["a", "b", "c"], rho, {"rows": errors}, {"rows": 9})
    mixed = uncertain_weights(run, {"c": 0.5, "a": 0.2, "b": 0.3}, floor=0.1)
    unshrunk = mixture_weights(torch.tensor(rho), ["a", "b", "c"], 0.1)
    assert mixed.unshrunk == pytest.approx(unshrunk) and sum(mixed.weights.values()) == pytest.approx(1)
    target = {"a": 0.2, "b": 0.3, "c": 0.5}
    for name in target:
        expected = (1 - found.factor) * unshrunk[name] + found.factor * target[name]
        assert mixed.weights[name] == pytest.approx(expected)


def test_errors_are_those_of_resampling_by_hand():
    """Rows and probe samples drawn again from the whole table of both, which the scorer never makes."""
    rng = np.random.default_rng(5)
    table = rng.normal(0, 1, (3, 40, 16)) + rng.normal(0, 1, (3, 40, 1)) + rng.normal(0, 2, (1, 1, 16))
    tokens = rng.integers(5, 50, (3, 40))
    joint, groups = torch.tensor(table.mean(2).ravel()), np.repeat(["a", "b", "c"], 40).tolist()
    own = (table * tokens[..., None]).sum(1) / tokens.sum(1)[:, None]
    run = bootstrap_rho(joint, torch.tensor(tokens.ravel()), groups, [(own, np.ones(16))], draws=4_000)
    by_hand = []
    for _ in range(4_000):
        sample, means = rng.integers(0, 16, 16), []
        for source in range(3):
            row = rng.integers(0, 40, 40)
            drawn, weight = table[source][row][:, sample].mean(1), tokens[source][row]
            means.append((drawn * weight).sum() / weight.sum())
        by_hand.append(means)
    expected, found = np.cov(np.array(by_hand).T), np.cov(run.total().T)
    inflation = np.diag(found) / np.diag(expected)
    assert (inflation > 0.97).all() and (inflation < 1.35).all()  # few units count for less: 16 folds for 1.26 at most
    correlation = [matrix / np.sqrt(np.outer(np.diag(matrix), np.diag(matrix))) for matrix in (expected, found)]
    assert np.abs(correlation[0] - correlation[1]).max() < 0.1 and correlation[0][0, 1] > 0.3
    assert run.rho == pytest.approx(own.mean(1))


def test_checkpoints_that_only_contract_are_no_noise_and_those_that_disagree_are():
    alpha = np.array([[1, 0], [2, 0], [3, 1]]) / [6, 1]
    contracting = np.stack([np.outer([4, 1], TRUTH), np.outer([2, 1], TRUTH), np.outer([1, 1], TRUTH)])
    joint, groups = torch.arange(20.0), np.repeat([f"s{n}" for n in range(5)], 4).tolist()
    options = dict(tokens=torch.ones(20), groups=groups, alpha=alpha, draws=2_000)
    still = bootstrap_rho(joint, by_checkpoint=contracting, **options)
    assert np.abs(still.errors["checkpoints"]).max() < 1e-12 and still.units["checkpoints"] == 1
    turning = contracting.copy()
    turning[0, 0] = turning[0, 0][::-1]
    rho = (alpha[:, :1, None] * turning[:, :1]).sum((0, 1))
    scaled = turning[:, 0] * np.linalg.norm(rho) / np.linalg.norm(turning[:, 0], axis=1, keepdims=True)
    rng, by_hand = np.random.default_rng(6), []
    for _ in range(4_000):
        drawn = rng.integers(0, 3, 3)
        weight = alpha[drawn, 0] / alpha[drawn, 0].sum()
        by_hand.append(weight @ scaled[drawn] / 2)  # half of the joint influence is the other capability's
    moved = bootstrap_rho(joint, by_checkpoint=turning, **options).errors["checkpoints"]
    assert moved.std(0) == pytest.approx(np.sqrt(1.5) * np.std(by_hand, axis=0), rel=0.1, abs=1e-3)


def test_seeds_are_averaged_and_their_spread_counts(tmp_path):
    rng = np.random.default_rng(7)
    rhos = TRUTH + rng.normal(0, 0.05, (4, 5))
    runs = []
    for number, rho in enumerate(rhos):
        errors = {"rows": np.full((500, 5), 0.01)}
        runs.append(RhoDraws(list("abcde"), rho * (number + 1), errors, {"rows": 9}))  # on a scale of its own
    runs[1] = RhoDraws(list("edcba"), runs[1].rho[::-1], {"rows": runs[1].errors["rows"][:, ::-1]}, {"rows": 7})
    for number, run in enumerate(runs):
        run.save(tmp_path / f"{number}.npz")
    loaded = [RhoDraws.load(tmp_path / f"{number}.npz") for number in range(4)]
    both = combine_seeds(loaded)
    shares = both.rho / np.linalg.norm(both.rho)
    direction = (rhos / np.linalg.norm(rhos, axis=1, keepdims=True)).mean(0)
    assert shares == pytest.approx(direction / np.linalg.norm(direction)) and both.units == {"rows": 7, "seeds": 4}
    scaled = rhos / np.linalg.norm(rhos, axis=1, keepdims=True) * np.mean([np.linalg.norm(r.rho) for r in runs])
    standard_error = scaled.std(0, ddof=1) / 2
    assert both.errors["seeds"].std(0) == pytest.approx(standard_error * 3.182 / 1.96, rel=0.15)
    assert combine_seeds(loaded[:1]) is loaded[0]
    with pytest.raises(ValueError, match="other sources or bootstraps"):
        combine_seeds([both, RhoDraws(["a"], np.ones(1), {"rows": np.ones((500, 1))}, {"rows": 2})])
    with pytest.raises(ValueError, match="does not exist: score that seed first"):
        RhoDraws.load(tmp_path / "none.npz")
    np.savez(tmp_path / "old.npz", sources=["a"], rho=[1.0], units=[2], **{"error rows": np.ones((5, 1))})
    with pytest.raises(ValueError, match="old.npz says nothing of its seed: run the scoring of that seed again"):
        RhoDraws.load(tmp_path / "old.npz")


def scored(seed: int, columns=("code", "math"), shift: float = 0.0, tokens=range(10, 50), draws: int = 300):
    """A run over forty rows of two sources and two folds a probe; returns what was resampled."""
    checkpoint = ScoringCheckpoint("model", None, 1, ("code", "math"), "00-model")
    rng = np.random.default_rng(0)
    table = pyarrow.table({
        "row": range(40), "source": ["a", "b"] * 20, "tokens": list(tokens),
        "code": rng.normal(1 + shift, 1, 40), "math": rng.normal(1, 1, 40),
    })  # fmt: skip
    folds = {checkpoint: {name: (rng.normal(size=(2, 2)), np.array([3, 3])) for name in ("code", "math")}}
    return bootstrap_scores({checkpoint: table}, folds, list(columns), draws, seed)


def test_seeds_are_joined_only_if_they_were_resampled_alike(tmp_path):
    first = scored(0)
    first.save(tmp_path / "first.npz")
    again = RhoDraws.load(tmp_path / "first.npz")
    assert (again.seed, again.capabilities, again.fingerprint) == (0, ("code", "math"), first.fingerprint)
    both = combine_seeds([first, scored(0, shift=0.5)])
    assert both.errors["rows"].std(0) == pytest.approx(first.errors["rows"].std(0), rel=0.3)
    assert combine_seeds([both, scored(0, columns=("math", "code"))]).capabilities == ("code", "math")
    with pytest.raises(ValueError, match="resampled by seed=1 and seed=0, so that the noise of the same rows"):
        combine_seeds([again, scored(1)])
    with pytest.raises(ValueError, match="for other capabilities: code and code, math: give both the same mixture_c"):
        combine_seeds([again, scored(0, columns=["code"])])
    with pytest.raises(ValueError, match="on other rows or probes"):
        combine_seeds([again, scored(0, tokens=range(11, 51))])


@pytest.mark.parametrize("kind", ["identity", "adam"])
def test_the_folds_influence_is_the_products_by_autograd_and_averages_to_the_probes(tmp_path, kind):
    PartialState()
    model = build().double()
    moments = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    curvature = IdentityCurvature() if kind == "identity" else AdamCurvature(moments, eps=0.1)
    probes, samples = {"code": rows(7, 1), "math": rows(6, 2)}, {"a": rows(9, 3), "b": rows(5, 4)}
    found = fold_influence(tmp_path, model, probes, samples, lambda: curvature, 3, exclude=["*norm*"], batch_size=2)
    assert not list(tmp_path.glob("directions-*")) and not list(tmp_path.glob("gradient-*"))
    for name, probe in probes.items():
        influence, sizes = found[name]
        parts = split_into_folds(probe, 3)
        assert sizes.tolist() == [len(part) for part in parts] and sizes.sum() == len(predicting(probe))
        for number, part in enumerate([*parts, probe]):
            gradient = probe_gradient(model, part)
            direction = {key: value for key, value in gradient.items() if "norm" not in key}
            direction = curvature.precondition(direction)
            for place, own in enumerate(samples.values()):
                scores = brute_force_scores(model, own, [direction])[:, 0]
                tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in own])
                rho = ((scores * tokens).sum() / tokens.sum()).item()
                value = influence[place, number] if number < 3 else influence[place] @ sizes / sizes.sum()
                assert value == pytest.approx(rho, rel=1e-6)
    save_folds(tmp_path / "folds.json", found, ["a", "b"])
    again = load_folds(tmp_path / "folds.json", ["b", "a"])
    assert np.array_equal(again["math"][0], found["math"][0][::-1])


def test_folds_are_disjoint_and_spread_every_source_of_a_probe():
    probe = rows(21, 1).remove_columns("source").add_column("source", ["x"] * 12 + ["y"] * 9)
    parts = split_into_folds(probe, 4)
    seen = [tuple(row["input_ids"]) for part in parts for row in part]
    assert len(seen) == len(set(seen)) == 20  # the first row predicts nothing
    assert all({"x", "y"} == set(part["source"][:]) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2
    assert len(split_into_folds(probe, 50)) == 20
    with pytest.raises(ValueError, match="1 of its samples predict"):
        split_into_folds(probe.select([0, 1]), 4)


def test_the_proportional_mix_is_of_what_there_is():
    sources, tokens = ["a", "a", "b", "b"], [10, 30, 5, 5]
    assert proportional_mix(sources, tokens, {}, {}) == {"a": 0.8, "b": 0.2}
    assert proportional_mix(sources, tokens, {"a": 100, "b": 400}, {}) == {"a": 0.5, "b": 0.5}
    assert proportional_mix(sources, tokens, {"a": 100}, {"b": 6_000}) == {"a": 0.25, "b": 0.75}
    with pytest.raises(ValueError, match="says nothing of a"):
        proportional_mix(sources, tokens, {}, {"b": 5})
    with pytest.raises(ValueError, match="names 'c'; the sources are a, b"):
        proportional_mix(sources, tokens, {}, {"c": 5})


def test_what_cannot_be_resampled_or_mixed_says_so():
    with pytest.raises(ValueError, match="b has 1 rows with a finite score"):
        bootstrap_rho(torch.tensor([1.0, 2, 3, torch.nan]), torch.ones(4), ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="samples for one fold only"):
        bootstrap_rho(torch.ones(4), torch.ones(4), ["a"] * 4, [(np.ones((1, 1)), np.ones(1))])
    worse = RhoDraws(["a", "b"], np.array([-1.0, -9.0]), {"rows": np.zeros((100, 2))}, {"rows": 5})
    with pytest.raises(ValueError, match="no source has a positive influence"):
        uncertain_weights(worse, {"a": 0.5, "b": 0.5})
    noise = np.random.default_rng(0).normal(0, 20, (200, 2))
    unsure = RhoDraws(["a", "b"], np.array([-1.0, -9.0]), {"rows": noise}, {"rows": 5})
    unsure = uncertain_weights(unsure, {"a": 0.4, "b": 0.6})
    assert unsure.unshrunk is None and unsure.weights == {"a": 0.4, "b": 0.6} and 0.1 < unsure.undecided < 0.5
    with pytest.raises(ValueError, match="the proportional mix is of"):
        uncertain_weights(worse, {"a": 1.0})
