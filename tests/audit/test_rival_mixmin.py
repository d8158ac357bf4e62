"""The weights are scipy's, documents have the probability of their tokens, and models of one source are trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from rival_cases import FakeStage, build_model, make_proxy, rows

from mobilellm_hf.audit.rivals import mixmin
from mobilellm_hf.audit.rivals.mixmin import best_ensemble, document_log_probs, steps_within_cap


def random_scores(seed: int, models: int = 4, documents: int = 30, tokens: int = 8):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, tokens, documents)
    return -random.gamma(2, 1, (models, documents)) * lengths / 2, lengths


def slsqp(objective, models: int):
    optimize = pytest.importorskip("scipy.optimize")
    return optimize.minimize(
        objective, np.full(models, 1 / models), bounds=[(0, 1)] * models, method="SLSQP",
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-15, "maxiter": 1_000},
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tokens", [8, 400])
def test_the_weights_are_those_of_a_generic_solver(seed, tokens):
    scores, lengths = random_scores(seed, tokens=tokens)
    top = scores.max(0)  # long documents have probabilities that no float can hold

    def objective(weights):
        return -np.mean((np.log(weights @ np.exp(scores - top)) + top) / lengths)

    found, expected = best_ensemble({"a": scores}, {"a": lengths}), slsqp(objective, 4)
    assert found.weights.sum() == pytest.approx(1) and found.steps <= 100
    assert found.value == pytest.approx(objective(found.weights))
    assert found.value <= expected.fun + found.gap + 1e-9 and found.gap < 1e-4


def test_probes_weigh_alike_whatever_their_size():
    (few, few_lengths), (many, many_lengths) = random_scores(0, documents=5), random_scores(1, documents=50)
    found = best_ensemble({"few": few, "many": many}, {"few": few_lengths, "many": many_lengths}, max_steps=2_000)

    def objective(weights):
        return sum(
            -np.mean(np.log(weights @ np.exp(scores)) / lengths) / 2
            for scores, lengths in ((few, few_lengths), (many, many_lengths))
        )

    assert found.value == pytest.approx(slsqp(objective, 4).fun, abs=1e-6)
    alone = best_ensemble({"many": many}, {"many": many_lengths}, max_steps=2_000)
    assert np.abs(alone.weights - found.weights).max() > 0.01


def test_a_model_that_is_better_everywhere_gets_all():
    scores, lengths = random_scores(2)
    scores[1] = scores.max(0) + 1
    assert best_ensemble({"a": scores}, {"a": lengths}).weights[1] > 0.999


def test_documents_have_the_probability_of_their_tokens():
    model, data = build_model(0).eval(), rows("up", 5, 0)
    data = data.map(lambda row, number: {"labels": [-100] * 16} if number == 2 else {}, with_indices=True)
    found, lengths = document_log_probs(model, data, batch_size=2)
    expected = []
    for row in (row for number, row in enumerate(data) if number != 2):
        for first, last in ((0, 9), (9, 16)):  # each document by itself
            ids = torch.tensor([row["input_ids"][first:last]])
            logits = model(ids, position_ids=torch.arange(last - first)[None]).logits[0, :-1].log_softmax(-1)
            expected.append(logits.gather(-1, ids[0, 1:, None]).sum().item())
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert lengths.tolist() == [8, 6] * 4
    whole, lengths = document_log_probs(model, data.remove_columns("position_ids"), batch_size=3)
    assert len(whole) == 4 and lengths.tolist() == [14] * 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, stage = tmp_path_factory.mktemp("mixmin"), FakeStage()
    proxy = make_proxy(folder, {"noise": 80, "up": 80, "down": 40})
    return proxy, folder, stage, mixmin(proxy, folder, seed=0, stage=stage)


def test_the_source_that_is_the_probe_gets_the_largest_weight(found):
    proxy, folder, stage, found = found
    assert max(found.weights, key=found.weights.get) == "up" and sum(found.weights.values()) == pytest.approx(1)
    # `down` has 40 rows: 4 passes are 160, in whole blocks of 64 that is 128, or 16 steps of 8.
    assert found.details["training_steps"] == {"noise": 30, "up": 30, "down": 16}
    assert found.tokens == (30 + 30 + 16) * 8 * 16 + 3 * 12 * 16
    assert stage.total == 76 and stage.reached[-1] == 76
    nll = {source: losses["up"] for source, losses in found.details["nll_of_one_source"].items()}
    assert min(nll, key=nll.get) == "up"
    # No model alone is better than the mixture of them, by documents.
    with np.load(folder / "only-up" / "log_probs.npz") as scores:
        assert found.details["ensemble_nll"] <= -np.mean(scores["log_probs/up"] / scores["lengths/up"]) + 1e-9
    assert not list(folder.glob("*/model"))
    json.dumps(found.details)


def test_what_was_trained_is_not_trained_again(found):
    proxy, folder, _, first = found
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*/*.npz")}
    assert mixmin(proxy, folder, seed=0) == first
    assert len(times) == 3 and times == {file: file.stat().st_mtime_ns for file in folder.glob("*/*.npz")}


def test_scores_that_are_lost_with_their_model_are_said_to_be(found, tmp_path):
    proxy, folder, _, _ = found
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "only-up" / "log_probs.npz").unlink()
    with pytest.raises(ValueError, match="only-up, and the model is trained again"):
        mixmin(proxy, tmp_path / "copy", seed=0)


def test_a_source_that_is_too_small_is_named(tmp_path):
    proxy = make_proxy(tmp_path, {"up": 15, "down": 80})
    with pytest.raises(ValueError, match="the 15 rows of up do not suffice"):
        mixmin(proxy, tmp_path / "out")
    assert steps_within_cap(proxy, "down") == 30 and not (tmp_path / "out").exists()
