"""The sign check: whom it lets pass, what it leaves untouched, and what it costs a run that goes on after a kill."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mixture_cases import arguments, build, mixture, probes, rows, train, training_rows
from transformers import Trainer

from mobilellm_hf.influence import InfluenceScorer
from mobilellm_hf.nll import mean_nll
from mobilellm_hf.training import InfluenceResamplingCallback
from mobilellm_hf.training.sign_check import SignCheckError, _plan, _row_tokens, _train, sign_check

OPTIONS = dict(steps=6, learning_rate=3e-3, batch_size=4)


@pytest.fixture(scope="module")
def scored():
    """A model, its rows and their scores by influence."""
    model = build()
    data = training_rows()
    scores = InfluenceScorer(model, probes()).score(data)
    return model, data, scores + 1e-9 * torch.arange(len(data))[:, None]  # some rows are alike; now no two scores are


def check(model, data, scores, **options):
    return sign_check(model, data, scores, list(probes()), probes(), **(OPTIONS | options))


def test_the_right_sign_passes_and_the_wrong_one_does_not(scored):
    model, data, scores = scored
    right, wrong = check(model, data, scores), check(model, data, -scores)
    assert not right.bottom_wins and right.low > 0 and "the top wins" in right.verdict()
    assert wrong.bottom_wins and wrong.high < 0 and "the bottom wins" in wrong.verdict()
    assert right.top == wrong.bottom and right.difference == pytest.approx(-wrong.difference)
    assert right.rows == 16 and right.steps == 6
    figures = right.figures()
    assert (
        figures["sign_check/top"] < figures["sign_check/bottom"]
        and figures["sign_check/top"] < figures["sign_check/before"]
    )
    per_seed = [np.mean([right.bottom[name][seed] - right.top[name][seed] for name in right.top]) for seed in range(3)]
    assert right.difference == pytest.approx(np.mean(per_seed))
    half = 4.302653 * np.std(per_seed, ddof=1) / np.sqrt(3)
    assert (right.low, right.high) == pytest.approx((np.mean(per_seed) - half, np.mean(per_seed) + half))


def test_a_bottom_that_unteaches_less_than_the_top_wins(scored):
    model, data, scores = scored
    wild = check(model, data, scores, learning_rate=3.0, seeds=1)
    back, ahead = (replace(wild, difference=sign * abs(wild.difference)) for sign in (-1, 1))
    assert back.figures()["sign_check/bottom"] > back.figures()["sign_check/before"]
    assert back.bottom_wins and "the bottom wins" in back.verdict()
    assert not ahead.bottom_wins and "no verdict, since neither side teaches" in ahead.verdict()


def test_a_training_that_was_ruined_is_no_verdict_against_the_other(scored):
    model, data, scores = scored
    found, ruined = check(model, data, scores), {"easy": [float("nan")] * 3, "other": [2.0] * 3}
    nothing = dict.fromkeys(("difference", "low", "high"), float("nan"))
    below = replace(found, bottom=ruined, **nothing)
    assert not below.bottom_wins and "no verdict, since the training on the bottom was ruined" in below.verdict()
    above = replace(found, top=ruined, **nothing)
    assert above.bottom_wins and "the bottom wins" in above.verdict()
    assert not replace(above, bottom=ruined).bottom_wins


def test_ranks_that_measure_otherwise_decide_alike(tmp_path):
    worker = str(Path(__file__).parent / "sign_check_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, worker, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert str(first) == str(second)  # as text, since the interval of one seed is no number


def test_what_is_within_the_seeds_decides_nothing(scored):
    model, data, scores = scored
    within = replace(check(model, data, -scores), high=0.001)
    assert not within.bottom_wins and "the seeds differ by as much" in within.verdict()
    still = check(model, data, scores, learning_rate=0.0, seeds=1)
    assert still.difference == 0 and not still.bottom_wins and "no verdict" in still.verdict()


def test_nothing_of_the_model_or_of_chance_is_changed(scored):
    model, data, scores = scored
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(**{key: torch.tensor(data[:2][key]) for key in ("input_ids", "labels")}).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: gradient.clone() for name, gradient in gradients.items()}
    state, was = torch.get_rng_state(), model.train().training
    check(model, data, scores, seeds=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training == was
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is gradients[name] and torch.equal(parameter.grad, copies[name])
    with pytest.raises(IndexError):  # nor after a failure
        broken = {"easy": probes()["easy"].map(lambda row: {"input_ids": [999] * 12})}
        sign_check(model, data, scores[:, :1], ["easy"], broken, **OPTIONS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.zero_grad()


def test_the_trainings_are_those_of_a_plain_loop_on_equal_tokens(scored):
    model, data, scores = scored
    found = check(model, data, scores, seeds=1)
    order = scores.mean(1).argsort(descending=True)
    sides = {"top": sorted(order[:16].tolist()), "bottom": sorted(order[-16:].tolist())}
    tokens = {name: _row_tokens(data.select(places)) for name, places in sides.items()}
    places, budgets = _plan(tokens, 0, 6, 4)
    assert found.tokens == sum(budgets) and sorted(places[:16]) == list(range(16)) and len(places) == 24
    for name, expected in (("top", found.top), ("bottom", found.bottom)):
        fresh = build()
        optimizer = torch.optim.AdamW(fresh.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
        part = data.select(sides[name]).select(places).with_format("torch")
        for step in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 3)
            batch = part[4 * step : 4 * step + 4]
            fresh(**{key: batch[key] for key in ("input_ids", "labels", "position_ids")}).loss.backward()
            torch.nn.utils.clip_grad_norm_(fresh.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for probe, rows_of in probes().items():
            assert expected[probe][0] == pytest.approx(mean_nll(fresh, rows_of), rel=1e-4)


def test_a_side_of_longer_rows_gets_no_more_tokens(scored):
    model = scored[0]
    short = rows({"easy": 16}).map(lambda row: {"labels": [*row["labels"][:7], *[-100] * 5]})
    tokens = {"top": _row_tokens(rows({"other": 16})), "bottom": _row_tokens(short)}
    assert set(tokens["top"]) == {10} and set(tokens["bottom"]) == {6}
    places, budgets = _plan(tokens, 0, 3, 4)
    assert budgets == [24, 24, 24]
    read = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(int((kwargs["labels"][:, 1:] != -100).sum())), with_kwargs=True
    )
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    _train(model, rows({"other": 16}).select(places), budgets, 4, 1e-3)
    handle.remove()
    assert read == [24, 24, 24]
    model.load_state_dict(saved, strict=False)
    model.zero_grad()


def test_one_capability_decides_where_the_rule_names_it_and_few_rows_are_read_four_times(scored):
    model, data, scores = scored
    found = check(model, data, scores, rule="other", seeds=1, steps=100)
    assert list(found.top) == ["other"] and found.steps == 16 and np.isnan(found.low)
    assert not found.bottom_wins
    broken = scores.clone()
    broken[:145] = torch.nan
    with pytest.raises(ValueError, match="15 rows have a finite score, and the check of their sign needs 16"):
        check(model, data, broken)


def test_what_is_finished_stays_and_another_model_does_it_again(scored, tmp_path, monkeypatch):
    model, data, scores = scored
    first = check(model, data, scores, folder=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 6
    (tmp_path / "bottom-1.json").unlink()
    calls = []
    monkeypatch.setattr("mobilellm_hf.training.sign_check._train", lambda *given: calls.append(1) or _train(*given))
    assert check(model, data, scores, folder=tmp_path) == first and len(calls) == 1
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    again = check(model, data, scores, folder=tmp_path)
    assert len(calls) == 7 and again.before != first.before
    with torch.no_grad():
        model.model.norm.weight.div_(1.5)


def resampling(**options) -> InfluenceResamplingCallback:
    defaults = dict(every=None, at_start=True, candidates_per_source=None, batch_size=8)
    return InfluenceResamplingCallback(mixture(), probes(), **(defaults | options))


def flip(monkeypatch) -> None:
    """Scores of the wrong sign, as of a probe's gradient that was subtracted."""
    score = InfluenceScorer.score
    monkeypatch.setattr(InfluenceScorer, "score", lambda *given, **options: -score(*given, **options))


def test_a_run_logs_the_verdict_of_its_first_round(tmp_path, caplog):
    callback = resampling(every=5, delay_steps=4)
    with caplog.at_level(logging.INFO):
        trainer, _ = train(tmp_path, callback, max_steps=12)
    assert "sign check at step 0: the top wins" in caplog.text
    saved = json.loads((tmp_path / "mixture" / "sign-check-0.json").read_text())
    assert saved["difference"] > 0 and saved["steps"] == 4 and len(saved["top"]["easy"]) == 3
    assert trainer.state.log_history[0]["sign_check/difference"] == saved["difference"]
    assert [bool(found.sign_check) for found in callback.rounds] == [True, False]  # of the first that drops
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    restored = state["stateful_callbacks"]["mobilellm_hf.resampling"]["rounds"]
    assert restored[0]["sign_check"]["sign_check/difference"] == saved["difference"]


def test_a_wrong_sign_stops_the_run_before_anything_is_dropped(tmp_path, monkeypatch, caplog):
    flip(monkeypatch)
    refusing = resampling(sign_check_steps=6)
    trainer = Trainer(build(), arguments(tmp_path), train_dataset=refusing.mixture, callbacks=[refusing])
    with pytest.raises(SignCheckError, match="bottom wins.*Nothing was dropped.*sign_check: warn"):
        trainer.train()
    assert trainer.state.global_step == 0 and refusing.mixture.kept() is None and not refusing.rounds
    warned = resampling(sign_check="warn", sign_check_steps=6)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, warned, max_steps=2)
    assert "the bottom wins" in caplog.text and not warned.mixture.kept().all()


def test_no_check_where_nothing_is_dropped_or_none_is_asked_for(tmp_path, monkeypatch):
    flip(monkeypatch)
    for number, options in enumerate((dict(reject=None), dict(sign_check=None))):
        callback = resampling(**options)
        train(tmp_path / str(number), callback, max_steps=1)
        assert not callback.rounds[0].sign_check and not list((tmp_path / str(number)).glob("mixture/sign*"))
    with pytest.raises(ValueError, match="sign_check='on' must be one of 'refuse', 'warn', None"):
        resampling(sign_check="on")
    with pytest.raises(ValueError, match="sign_check_steps=0 must be positive"):
        resampling(sign_check_steps=0)
