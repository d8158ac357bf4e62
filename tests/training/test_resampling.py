"""Influence resampling in the stock Trainer: each decision against one made by hand from that step's checkpoint."""

import json
import logging
from dataclasses import asdict

import numpy as np
import pyarrow.parquet
import pytest
import torch
from mixture_cases import CAPABILITIES, arguments, build, drawn, mixture, probes, rows, train, training_rows
from transformers import AutoModelForCausalLM, Trainer

from mobilellm_hf.influence import AdamCurvature, InfluenceScorer
from mobilellm_hf.training import DistillationCallback, InfluenceResamplingCallback, PhaseEndedError, scored_parts


def resampling(data=None, **options) -> InfluenceResamplingCallback:
    defaults = dict(every=5, delay_steps=4, candidates_per_source=30, batch_size=7)
    return InfluenceResamplingCallback(data or mixture(), probes(), **(defaults | options))


def scored_by_hand(checkpoint, row_ids, curvature="adam") -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    curvature = AdamCurvature.from_checkpoint(checkpoint, model) if curvature == "adam" else curvature
    return InfluenceScorer(model, probes(), curvature).score(training_rows().select(row_ids))


@pytest.mark.parametrize("curvature", ["adam", "identity"])
def test_a_round_decides_by_the_equations_and_what_follows_is_drawn_so(tmp_path, curvature):
    callback = resampling(curvature=curvature)
    _, read = train(tmp_path, callback, max_steps=20)
    assert [found.step for found in callback.rounds] == [5, 10, 15]
    sources, keep = np.array(training_rows()["source"][:]), np.ones(160, dtype=bool)
    for found in callback.rounds:
        table = pyarrow.parquet.read_table(tmp_path / "mixture" / f"round-{found.step}.parquet")
        row_ids = table["row_id"].to_numpy()
        assert len(set(row_ids)) == 90 and table["source"].to_pylist() == sources[row_ids].tolist()
        scores = scored_by_hand(tmp_path / f"checkpoint-{found.step}", row_ids, curvature)
        saved = np.stack([table[name].to_numpy() for name in CAPABILITIES], 1)
        assert np.linalg.norm(saved - scores.numpy()) < 1e-5 * np.linalg.norm(saved)
        joint = scores.mean(-1).numpy()
        keep[row_ids] = joint > 0
        assert found.positive["all"] == pytest.approx((joint > 0).mean())
        assert found.positive["other"] == pytest.approx((scores[:, 1] > 0).double().mean().item())
        assert found.rejected == pytest.approx(1 - keep.mean())
        rho = {name: joint[sources[row_ids] == name].mean() for name in ("easy", "random", "other")}
        total = sum(max(0.0, value) for value in rho.values())
        assert found.weights == pytest.approx({name: max(0.0, value) / total for name, value in rho.items()})
        assert found.from_draw == 8 * (found.step + 4)
    data = callback.mixture
    data.emit_ids = True
    second, third = callback.rounds[1], callback.rounds[2]
    ids = [row["row_id"].item() for row in data.__getitems__(list(range(third.from_draw, 160)))]
    assert keep[ids].all()
    assert read == drawn(data)
    between = sources[
        [row["row_id"].item() for row in data.__getitems__(list(range(second.from_draw, third.from_draw)))]
    ]
    for name, weight in second.weights.items():
        assert abs((between == name).sum() - len(between) * weight) <= 3


def test_a_round_at_the_start_decides_for_every_draw(tmp_path):
    callback = resampling(at_start=True, every=None, candidates_per_source=None)
    model = build()
    model.save_pretrained(tmp_path / "start")
    trainer, read = train(tmp_path, callback, model, max_steps=10)
    (found,) = callback.rounds
    assert (found.step, found.from_draw, found.scored) == (0, 0, 160)
    joint = scored_by_hand(tmp_path / "start", np.arange(160), "identity").mean(-1).numpy()
    assert np.array_equal(callback.mixture.kept(), joint > 0)
    assert read == drawn(callback.mixture)[:80]
    assert trainer.state.log_history[0]["influence/positive"] == pytest.approx((joint > 0).mean())
    resumed = resampling(at_start=True, every=None, candidates_per_source=None)
    _, rest = train(tmp_path, resumed, resume=str(tmp_path / "checkpoint-5"), max_steps=10)
    assert rest == read[40:] and len(resumed.rounds) == 1


def test_a_round_that_is_interrupted_goes_on_with_what_it_has_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(scored_parts, "ROWS_PER_PART", 32)
    score, calls = scored_parts.ScoredParts._score, []

    def interrupted(self, rows, batch_size):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return score(self, rows, batch_size)

    options = dict(at_start=True, every=None, candidates_per_source=None)
    monkeypatch.setattr(scored_parts.ScoredParts, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", resampling(**options), max_steps=2)
    left = sorted(path.name for path in (tmp_path / "cut" / "mixture").iterdir())
    assert left == [f"scored-0-0of1-{number:06d}.pt" for number in range(3)]
    calls.clear()
    resumed, whole = resampling(**options), resampling(**options)
    train(tmp_path / "cut", resumed, max_steps=2)
    assert calls == [32, 32]  # of five parts
    assert not list((tmp_path / "cut" / "mixture").glob("scored-*"))
    calls.clear()
    monkeypatch.setattr(scored_parts.ScoredParts, "_score", score)
    train(tmp_path / "whole", whole, max_steps=2)
    assert resumed.rounds[0].weights == whole.rounds[0].weights
    assert np.array_equal(resumed.mixture.kept(), whole.mixture.kept())


def test_parts_that_another_model_has_scored_are_scored_again(tmp_path):
    model, data, rows = build(), mixture(), np.arange(20)
    scorer = InfluenceScorer(model, probes())
    first = scored_parts.ScoredParts(tmp_path, "0", scorer).score(data, rows, 8)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    scorer = InfluenceScorer(model, probes())
    again = scored_parts.ScoredParts(tmp_path, "0", scorer).score(data, rows, 8)
    assert not torch.allclose(first, again)
    torch.testing.assert_close(again, scorer.score(data.select(rows), 8))


def test_helpful_sources_gain_and_noise_loses(tmp_path):
    callback = resampling()
    trainer, _ = train(tmp_path, callback, max_steps=20)
    last = callback.rounds[-1]
    assert last.weights["random"] < 0.15 and last.weights["easy"] + last.weights["other"] > 0.85
    logged = [entry for entry in trainer.state.log_history if "influence/positive" in entry]
    assert [entry["step"] for entry in logged] == [5, 10, 15]
    assert logged[-1]["influence/rejected"] == last.rejected and 0 < logged[-1]["influence/cost"] < 1
    assert (tmp_path / "mixture" / "histograms.png").stat().st_size > 10_000
    assert {entry["mixture/random"] for entry in trainer.state.log_history[:-1]} == {
        0.4, *(found.weights["random"] for found in callback.rounds)
    }  # fmt: skip


@pytest.mark.parametrize("scores", ["separate", "fused"])
@pytest.mark.parametrize("stop, at_start", [(5, False), (8, False), (10, False), (3, True)])
def test_a_resumed_run_ends_with_the_same_weights_draws_and_rounds(tmp_path, scores, stop, at_start):
    whole = resampling(scores=scores, at_start=at_start)
    trainer, read = train(tmp_path / "whole", whole, save_steps=1)
    resumed = resampling(scores=scores, at_start=at_start)
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    if scores == "fused":  # what is kept beside the checkpoints is that of the newest
        train(tmp_path / "cut", resampling(scores=scores, at_start=at_start), save_steps=1, stop_at=stop)
        checkpoint = tmp_path / "cut" / f"checkpoint-{stop}"
    again, rest = train(checkpoint.parent, resumed, resume=str(checkpoint), save_steps=1)
    assert rest == read[8 * stop :]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert [asdict(found) | {"cost": 0} for found in resumed.rounds] == [
        asdict(found) | {"cost": 0} for found in whole.rounds
    ]


def test_fused_scores_are_those_of_the_rows_that_were_trained_on(tmp_path):
    """With a learning rate of zero the model stays that of the round, so its own scores are what must come out."""
    callback = resampling(scores="fused", curvature="identity")
    train(tmp_path, callback, learning_rate=0.0, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert [found.step for found in callback.rounds] == [10, 15]
    table = pyarrow.parquet.read_table(tmp_path / "mixture" / "round-10.parquet")
    data = mixture()
    data.emit_ids = True
    read = {row["row_id"].item() for row in data.__getitems__(list(range(40, 80)))}
    assert set(table["row_id"].to_pylist()) == read
    expected = scored_by_hand(tmp_path / "checkpoint-10", sorted(read), "identity").numpy()
    found = np.stack([table[name].to_numpy() for name in CAPABILITIES], 1)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_a_phase_that_has_nothing_left_to_teach_ends(tmp_path, caplog):
    seen = []
    callback = resampling(min_positive=1.0, on_round=seen.append)
    with caplog.at_level(logging.WARNING):
        trainer, _ = train(tmp_path, callback, save_steps=100)
    assert trainer.state.global_step == 5 and "the phase ends here" in caplog.text
    assert seen == callback.rounds and "of the samples have a positive influence" in seen[0].ended
    assert (tmp_path / "checkpoint-5" / "trainer_state.json").exists()
    assert seen[0].weights == pytest.approx({"easy": 0.4, "random": 0.4, "other": 0.2}) and seen[0].from_draw is None


def test_a_phase_that_has_ended_stays_ended(tmp_path):
    train(tmp_path, resampling(min_positive=1.0), save_steps=100)
    model = build()
    again = resampling(min_positive=1.0)
    with pytest.raises(PhaseEndedError, match="the phase ended at step 5: only .* have a positive influence"):
        train(tmp_path, again, model, resume=str(tmp_path / "checkpoint-5"), save_steps=100)
    assert len(again.rounds) == 1 and not list(tmp_path.glob("checkpoint-1*"))


def test_a_phase_that_ends_at_its_start_takes_no_step(tmp_path):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PhaseEndedError, match="the phase ends before it begins: only"):
        train(tmp_path, resampling(at_start=True, min_positive=1.0), model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not model._forward_pre_hooks


def test_a_mixture_can_be_trained_on_again(tmp_path):
    callback = resampling()
    first, read = train(tmp_path / "first", callback)
    callback.mixture.keep_folder = None
    second, again = train(tmp_path / "second", callback)
    assert again == read and [found.step for found in callback.rounds] == [5, 10, 15]
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in first.model.state_dict().items())


def test_the_cost_of_earlier_rounds_survives_a_resume(tmp_path):
    whole, resumed = resampling(), resampling()
    train(tmp_path, whole, save_steps=12, max_steps=20)
    train(tmp_path, resumed, resume=str(tmp_path / "checkpoint-12"))
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["mobilellm_hf.resampling"]
    assert 0 < saved["scoring"] < saved["seconds"] and resumed._scoring > saved["scoring"]


def test_a_narrowed_spread_ends_a_phase(tmp_path):
    callback = resampling(min_spread=10.0)
    trainer, _ = train(tmp_path, callback)
    assert (
        trainer.state.global_step == 5 and "narrowed to 100.0% of the first round's spread" in callback.rounds[0].ended
    )


@pytest.mark.parametrize("options", [dict(reject=None), dict(reweigh=False), dict(rule="any"), dict(rule="other")])
def test_what_a_round_may_change_can_be_chosen(tmp_path, options):
    callback = resampling(**options)
    train(tmp_path, callback, max_steps=10)
    (found,) = callback.rounds
    table = pyarrow.parquet.read_table(tmp_path / "mixture" / "round-5.parquet")
    scores = np.stack([table[name].to_numpy() for name in CAPABILITIES], 1)
    rules = {"any": (scores > 0).any(1), "other": scores[:, 1] > 0}
    positive = rules.get(options.get("rule"), scores.mean(1) > 0)
    kept = callback.mixture.kept()
    if "reject" in options:
        assert found.rejected == 0 and kept is None
    else:
        assert np.array_equal(kept[table["row_id"].to_numpy()], positive)
    assert (found.weights == pytest.approx({"easy": 0.4, "random": 0.4, "other": 0.2})) == ("reweigh" in options)


def test_rows_that_are_also_in_a_probe_are_refused(tmp_path):
    with pytest.raises(ValueError, match="(?s)probe.*Take them out of the mixture"):
        train(
            tmp_path,
            InfluenceResamplingCallback(mixture(), {"easy": training_rows().select(range(3))}, 5, delay_steps=2),
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(curvature="ekfac"), "curvature='ekfac' must be one of 'adam', 'identity'"),
        (dict(rule="mathematics"), "rule='mathematics' must be one of 'mean', 'any', 'easy', 'other'"),
        (dict(reject="all"), "reject='all'"),
        (dict(scores="free"), "scores='free'"),
        (dict(every=0), "every=0 must be positive"),
        (dict(every=None), "give every, or at_start=True"),
        (dict(every=None, at_start=True, scores="fused"), "heard between two rounds: give every"),
        (dict(reject=None, reweigh=False), "would change nothing"),
    ],
)
def test_options_are_checked_when_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        resampling(**options)


def test_what_does_not_fit_the_run_is_refused_at_its_start(tmp_path):
    with pytest.raises(ValueError, match="every=18 and delay_steps=4 leave no round in 20 steps"):
        train(tmp_path, resampling(every=18))
    foreign = rows({"easy": 3}).map(lambda row: {"input_ids": [99] * 12})
    with pytest.raises(ValueError, match="probe 'easy', row 0, has the token id 99"):
        train(tmp_path, InfluenceResamplingCallback(mixture(), {"easy": foreign}, 5, delay_steps=2))
    with pytest.raises(ValueError, match="scores='fused' needs remove_unused_columns=False"):
        train(tmp_path, resampling(scores="fused"), remove_unused_columns=True)


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("first", ["distillation", "resampling"])
def test_fused_scores_and_distillation_refuse_each_other_before_a_step(tmp_path, first, at_start):
    callbacks = [DistillationCallback(build()), resampling(scores="fused", at_start=at_start)]
    callbacks = callbacks if first == "distillation" else callbacks[::-1]
    data = next(callback.mixture for callback in callbacks if hasattr(callback, "mixture"))
    trainer = Trainer(build(), arguments(tmp_path), train_dataset=data, callbacks=callbacks)
    with pytest.raises(ValueError, match="another callback has replaced the model's own"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_distillation_and_resampling_share_a_run(tmp_path):
    """Rounds score the plain NLL, whatever the model trains on; the loss of each source is its NLL too."""
    callback = resampling()
    model, data = build(), callback.mixture
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=data, callbacks=[DistillationCallback(build("llama")), callback]
    )
    trainer.train()
    assert [found.step for found in callback.rounds] == [5, 10, 15]
    table = pyarrow.parquet.read_table(tmp_path / "mixture" / "round-10.parquet")
    scores = scored_by_hand(tmp_path / "checkpoint-10", table["row_id"].to_numpy())
    saved = np.stack([table[name].to_numpy() for name in CAPABILITIES], 1)
    assert np.linalg.norm(saved - scores.numpy()) < 1e-5 * np.linalg.norm(saved)
    for entry in trainer.state.log_history[:-1]:
        losses = [value for name, value in entry.items() if name.startswith("loss/")]
        assert min(losses) <= entry["distillation/nll"] <= max(losses)
        assert entry["loss"] == pytest.approx(entry["distillation/kl"], rel=1e-4)


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path):
    train(tmp_path, resampling(), max_steps=10)
    with pytest.raises(ValueError, match="was resampled with every=5, not 3: resume with its settings"):
        train(tmp_path, resampling(every=3), resume=str(tmp_path / "checkpoint-10"))
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["mobilellm_hf.resampling"]["rounds"][0]["step"] == 5


def test_the_model_is_left_as_it_was(tmp_path):
    model = build()
    train(tmp_path, resampling(scores="fused"), model, max_steps=12)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert "forward" not in vars(model) and "fused_loss" not in vars(model) and "_row_ids" not in vars(model)
