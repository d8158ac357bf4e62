"""Planted laws are recovered, the mixture is scipy's, and a swarm of really trained models finds what the probe is."""

import importlib
import json

import numpy as np
import pytest
from rival_cases import FakeStage, InterruptAt, Interrupted, make_proxy

from mobilellm_hf.audit.proxy import train_mixture
from mobilellm_hf.audit.rivals import regmix
from mobilellm_hf.audit.rivals.regmix import LogLinearLaw, best_mixture, fit_law, swarm_weights

regmix_module = importlib.import_module(
    "mobilellm_hf.audit.rivals.regmix"
)  # beside which the package has its function
PROPORTIONAL = np.array([0.5, 0.25, 0.15, 0.1])


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_law_is_recovered(seed):
    random = np.random.default_rng(seed)
    slopes, floor = random.normal(0, 0.6, 4), random.uniform(0.5, 2)
    weights = swarm_weights(PROPORTIONAL, 16, seed)
    law = fit_law(weights, floor + np.exp(weights @ slopes))
    np.testing.assert_allclose(np.exp(law.log_floor), floor, atol=1e-4)
    np.testing.assert_allclose(law.slopes, slopes, atol=1e-4)
    assert law.error < 1e-5
    np.testing.assert_allclose(law(weights[3]), floor + np.exp(weights[3] @ slopes), atol=1e-5)


def test_one_model_that_went_wrong_does_not_move_the_law():
    slopes, weights = np.array([0.4, -0.5, 0.2, 0.1]), swarm_weights(PROPORTIONAL, 24, 0)
    losses = 1.5 + np.exp(weights @ slopes)
    losses[5] += 1.0
    law = fit_law(weights, losses)
    fitted = np.delete(law(weights) - losses, 5)
    assert np.abs(fitted).max() < 0.02 and law.error == pytest.approx(np.sqrt(np.mean((law(weights) - losses) ** 2)))
    squares = fit_law(weights, losses, delta=100.0)  # quadratic everywhere
    assert np.abs(np.delete(squares(weights) - losses, 5)).max() > 3 * np.abs(fitted).max()


def test_the_swarm_goes_from_one_source_to_the_flattened_mix():
    swarm = swarm_weights(PROPORTIONAL, 400, 0)
    np.testing.assert_allclose(swarm.sum(1), 1)
    flat = PROPORTIONAL**0.5 / (PROPORTIONAL**0.5).sum()
    np.testing.assert_allclose(swarm.mean(0), flat, atol=0.05)
    assert swarm[:50].max(1).mean() > 0.9 > swarm[-50:].max(1).mean()
    np.testing.assert_array_equal(swarm, swarm_weights(PROPORTIONAL, 400, 0))
    assert not np.allclose(swarm, swarm_weights(PROPORTIONAL, 400, 1))
    # Dirichlet(s q): the variance of a weight is q (1 - q) / (s + 1); here at both ends of the strengths.
    for strength, part in (
        (0.1, swarm_weights(PROPORTIONAL, 4_000, 2)[:40]),
        (5.0, swarm_weights(PROPORTIONAL, 4_000, 2)[-40:]),
    ):
        assert part.std(0)[0] == pytest.approx(np.sqrt(flat[0] * (1 - flat[0]) / (strength + 1)), rel=0.35)
    capped = swarm_weights(PROPORTIONAL, 50, 0, np.array([0.6, 0.4, 0.3, 0.2]))
    assert (capped <= np.array([0.6, 0.4, 0.3, 0.2]) + 1e-12).all() and np.allclose(capped.sum(1), 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("caps", [None, np.array([0.4, 0.4, 0.3, 0.3])])
def test_the_mixture_is_that_of_a_generic_solver(seed, caps):
    optimize = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(seed)
    laws = [LogLinearLaw(0.1, random.normal(0, 1, 4), 0.0) for _ in range(3)]

    def objective(weights):
        kl = (weights * np.log(weights / PROPORTIONAL)).sum()
        return np.mean([np.exp(0.1) + np.exp(weights @ law.slopes) for law in laws]) + 0.05 * kl

    bounds = [(1e-12, cap) for cap in (np.ones(4) if caps is None else caps)]
    expected = optimize.minimize(
        objective, np.full(4, 0.25), bounds=bounds, method="SLSQP", options={"ftol": 1e-15, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    found = best_mixture(laws, PROPORTIONAL, caps)
    assert found.value == pytest.approx(expected.fun, abs=1e-7) and found.gap < 1e-7
    np.testing.assert_allclose(found.weights, expected.x, atol=2e-3)


def test_where_nothing_is_told_apart_the_mixture_is_proportional():
    found = best_mixture([LogLinearLaw(0.0, np.full(4, 0.3), 0.0)], PROPORTIONAL)
    np.testing.assert_allclose(found.weights, PROPORTIONAL, atol=1e-6)
    far = best_mixture([LogLinearLaw(0.0, np.array([1.0, -1.0, 0, 0]), 0.0)], PROPORTIONAL, penalty=100.0)
    np.testing.assert_allclose(far.weights, PROPORTIONAL, atol=0.02)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    """A swarm that is interrupted in its second model, and then trained to the end."""
    folder = tmp_path_factory.mktemp("swarm")
    proxy, stage = make_proxy(folder, max_steps=24), FakeStage()
    original = regmix_module.train_mixtures

    def interrupted(*args, callbacks, **options):
        return original(*args, callbacks=lambda run: [InterruptAt(15)] if run.name == "swarm-1" else [], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regmix_module, "train_mixtures", interrupted)
        with pytest.raises(Interrupted):
            regmix(proxy, folder, seed=0)
    assert (folder / "swarm-0" / "result.json").exists() and (folder / "swarm-1" / "checkpoint-10").exists()
    finished = (folder / "swarm-0" / "result.json").stat().st_mtime_ns
    found = regmix(proxy, folder, seed=0, stage=stage)
    assert (folder / "swarm-0" / "result.json").stat().st_mtime_ns == finished
    return proxy, folder, stage, found


def test_an_interrupted_swarm_ends_like_an_unbroken_one(swarm, tmp_path):
    proxy, _, _, found = swarm
    second = swarm_weights(np.full(3, 1 / 3), 9, 0, np.full(3, 4 * 1600 / (24 * 8 * 16)))[1]
    arm = train_mixture(proxy, dict(zip(proxy.sources, second / second.sum())), 0, tmp_path / "unbroken")
    assert arm.probe_nll == found.details["swarm"][1]["nll"]


def test_the_source_that_is_the_probe_gets_the_largest_weight(swarm):
    proxy, folder, stage, found = swarm
    assert max(found.weights, key=found.weights.get) == "up"
    assert sum(found.weights.values()) == pytest.approx(1)
    # 9 models of 24 steps of 8 rows of 16 tokens, and each has looked at 12 probe rows.
    assert found.tokens == 9 * (24 * 8 * 16 + 12 * 16)
    assert (
        stage.total == 216
        and stage.reached[0] == 24
        and stage.reached[-1] == 216
        and stage.note.endswith("of 9 models")
    )
    slopes = found.details["laws"]["up"]["t"]
    assert found.details["models"] == 9 and slopes["up"] < min(slopes["noise"], slopes["down"])
    best = min(found.details["swarm"], key=lambda entry: entry["nll"]["up"])
    assert found.details["best_of_swarm"] == best
    assert best["nll"]["up"] == min(
        json.loads(file.read_text())["probe_nll"]["up"] for file in folder.glob("*/result.json")
    )
    json.dumps(found.details)


def test_the_cap_on_repetition_holds_for_the_training_it_is_for(swarm):
    proxy, folder, _, found = swarm
    # 4 passes over the 1600 tokens of a source are 40% of 16,000.
    capped = regmix(proxy, folder, seed=0, target_tokens=16_000)
    assert max(capped.weights.values()) == pytest.approx(0.4) and found.weights["up"] > 0.4
    assert capped.details["swarm"] == found.details["swarm"]  # nothing was trained again
    with pytest.raises(ValueError, match="target_tokens=0"):
        regmix(proxy, folder, target_tokens=0)
    with pytest.raises(ValueError, match="at most 19,200 tokens"):
        regmix(proxy, folder, target_tokens=20_000)


def test_the_law_is_fitted_to_what_was_read(tmp_path, monkeypatch):
    """A source of 16 rows cannot give what the swarm's peaked mixtures want of it."""
    proxy = make_proxy(tmp_path, {"up": 16, "down": 200}, max_steps=16)
    seen = []
    monkeypatch.setattr(
        regmix_module, "fit_law", lambda shares, losses: seen.append(shares) or fit_law(shares, losses)
    )
    regmix(proxy, tmp_path, seed=3)
    for number, shares in enumerate(seen[0]):
        result = json.loads((tmp_path / f"swarm-{number}" / "result.json").read_text())
        read = result["rows"]
        assert result["weights"]["up"] <= 0.5  # more of it would be read for the fifth time
        np.testing.assert_allclose(shares, [read["up"] / 128, read["down"] / 128])
    assert seen[0][:, 0].max() <= 0.5


def test_bad_input_is_refused_before_anything_is_trained(tmp_path):
    proxy = make_proxy(tmp_path)
    with pytest.raises(ValueError, match=r"models=8: .* needs 9 models or more, three a source"):
        regmix(proxy, tmp_path / "out", models=8)
    with pytest.raises(ValueError, match="do not determine a law of 5"):
        fit_law(np.full((4, 4), 0.25), np.ones(4))
    with pytest.raises(ValueError, match="positive and finite"):
        fit_law(np.full((8, 4), 0.25), np.full(8, np.nan))
    assert not (tmp_path / "out").exists()
