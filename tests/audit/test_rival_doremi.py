"""The update by hand, the stock Trainer against a plain loop, a killed run against an unbroken one."""

import json

import numpy as np
import pytest
import torch
from rival_cases import FakeStage, InterruptAt, Interrupted, StopAt, arguments, build_model, make_proxy
from transformers import Trainer

from mobilellm_hf.audit.proxy import MixtureRun, build_mixture, train_mixture
from mobilellm_hf.audit.rivals import doremi
from mobilellm_hf.audit.rivals.doremi import DoReMiCallback, doremi_update
from mobilellm_hf.nll import collate
from mobilellm_hf.training import MixtureCallback

UNIFORM = {"noise": 1 / 3, "up": 1 / 3, "down": 1 / 3}


def test_the_update_by_hand():
    before, excess = [0.5, 0.3, 0.2], [0.1, 0.0, 2.0]
    grown = [weight * np.e**score for weight, score in zip(before, excess)]
    expected = [0.999 * value / sum(grown) + 0.001 / 3 for value in grown]
    np.testing.assert_allclose(doremi_update(np.array(before), np.array(excess)), expected)
    twice = doremi_update(np.array(before), np.array(excess), step_size=2.0, smoothing=0.0)
    grown = [weight * np.e ** (2 * score) for weight, score in zip(before, excess)]
    np.testing.assert_allclose(twice, np.array(grown) / sum(grown))
    assert np.isfinite(doremi_update(np.array(before), np.array([1e4, 0.0, 0.0]))).all()


def token_losses(model, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """(predicted tokens,) of a row."""
    inputs = {name: row[name][None] for name in ("input_ids", "position_ids")}
    logits, targets = model(**inputs).logits[0, :-1], row["labels"][1:]
    return -logits.log_softmax(-1)[targets != -100].gather(-1, targets[targets != -100][:, None])[:, 0]


def plain_loop(proxy, reference, steps: int, rate: float, batch: int) -> tuple[list[np.ndarray], torch.nn.Module]:
    """Algorithm 1 with gradient descent, one row at a time; the weights after every step, and the model."""
    torch.manual_seed(0)
    mixture, model = build_mixture(proxy, MixtureRun("plain", UNIFORM, 0)), build_model(0).train()
    names, weights, excess, path = list(proxy.sources), [1 / 3] * 3, [0.0] * 3, []
    for step in range(steps):
        draws = range(batch * step, batch * step + batch)
        sources = mixture.locate(draws)[0]
        own = {number: [] for number in range(3)}
        for draw, source in zip(draws, sources.tolist()):
            row = mixture[draw]
            with torch.no_grad():
                above = token_losses(reference, row)
            own[source].append((token_losses(model, row), above))
        losses = {number: torch.cat([pair[0] for pair in pairs]) for number, pairs in own.items() if pairs}
        for number, loss in losses.items():
            reached = torch.cat([pair[1] for pair in own[number]])
            excess[number] = float(sum(max(float(a - b), 0.0) for a, b in zip(loss, reached))) / len(loss)
        grown = [weight * np.exp(score) for weight, score in zip(weights, excess)]
        weights = [(1 - 1e-3) * value / sum(grown) + 1e-3 / len(names) for value in grown]
        total = sum(weights[number] for number in losses)
        loss = sum(weights[number] / total * values.mean() for number, values in losses.items())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter -= rate * gradient
        path.append(np.array(weights))
    return path, model


@pytest.fixture(scope="module")
def reference():
    """A model that knows `up` better than a new one does."""
    torch.manual_seed(5)
    model = build_model(5)
    data = make_proxy("unused", {"up": 60, "down": 60}).sources["up"].with_format("torch")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(15):
        batch = collate(data[4 * step : 4 * step + 4])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("batch", [8, 2])
def test_the_trainer_does_what_a_plain_loop_does(tmp_path, reference, batch):
    """Of three sources, a batch of 8 has unlike counts, and one of 2 lacks some."""
    options = dict(optim="sgd", learning_rate=0.3, max_grad_norm=0.0, per_device_train_batch_size=batch)
    proxy = make_proxy(tmp_path, max_steps=6, **options)
    path, model = plain_loop(proxy, reference, 6, 0.3, batch)
    callback = DoReMiCallback(list(proxy.sources), tmp_path / "weights.json", reference)
    arm = train_mixture(proxy, UNIFORM, 0, tmp_path / "run", keep_model=True, callbacks=[callback])
    found = json.loads((tmp_path / "weights.json").read_text())
    np.testing.assert_allclose(found["mean"], np.mean(path, axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["last"], path[-1], rtol=1e-4)
    assert found["sources"] == list(proxy.sources)
    trained = type(model).from_pretrained(arm.model_folder)
    for (name, value), (_, expected) in zip(trained.named_parameters(), model.named_parameters()):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_that_is_ended_early_leaves_no_weights(tmp_path, reference):
    proxy = make_proxy(tmp_path, max_steps=6)
    mixture = build_mixture(proxy, MixtureRun("run", UNIFORM, 0))
    callback = DoReMiCallback(list(proxy.sources), tmp_path / "weights.json", reference)
    callbacks = [MixtureCallback(mixture), callback, StopAt(3)]
    Trainer(build_model(0), arguments(tmp_path, max_steps=6), train_dataset=mixture, callbacks=callbacks).train()
    assert not (tmp_path / "weights.json").exists()


class Watch(DoReMiCallback):
    """Notes every step's weights."""

    def update(self, model, batch):
        found = super().update(model, batch)
        self.seen = [*getattr(self, "seen", []), (batch.step, found.tolist(), self.memory["excess"])]
        return found


def test_a_source_that_a_batch_lacks_keeps_its_last_excess(tmp_path, reference):
    proxy = make_proxy(tmp_path, max_steps=12, per_device_train_batch_size=2)
    callback = Watch(list(proxy.sources), tmp_path / "weights.json", reference)
    train_mixture(proxy, UNIFORM, 0, tmp_path / "run", callbacks=[callback])
    mixture = build_mixture(proxy, MixtureRun("run", UNIFORM, 0))
    last = [0.0] * 3
    for step, _, excess in callback.seen:
        there = set(mixture.locate(range(2 * step, 2 * step + 2))[0].tolist())
        for number in range(3):
            assert (excess[number] == last[number]) == (number not in there)
        last = excess


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, reference):
    proxy, files = make_proxy(tmp_path, max_steps=24), []
    for stop in (None, 17):
        folder = tmp_path / str(stop)
        files.append(folder / "weights.json")
        if stop:
            callback = DoReMiCallback(list(proxy.sources), files[-1], reference)
            with pytest.raises(Interrupted):
                train_mixture(proxy, UNIFORM, 0, folder, callbacks=[callback, InterruptAt(stop)])
            assert not files[-1].exists()
        callback = Watch(list(proxy.sources), files[-1], reference)
        train_mixture(proxy, UNIFORM, 0, folder, callbacks=[callback])
        assert callback.seen[0][0] == (10 if stop else 0)
    assert files[0].read_text() == files[1].read_text()


def test_the_log_has_the_weights_and_the_model_is_left_as_it_was(tmp_path, reference):
    proxy, model = make_proxy(tmp_path, max_steps=3), build_model(0)
    mixture = build_mixture(proxy, MixtureRun("run", UNIFORM, 0))
    callback = Watch(list(proxy.sources), tmp_path / "weights.json", reference)
    callbacks = [MixtureCallback(mixture), callback]
    trainer = Trainer(model, arguments(tmp_path / "run", max_steps=3), train_dataset=mixture, callbacks=callbacks)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_weight/up" in entry]
    assert [entry["loss_weight/up"] for entry in logged] == [weights[1] for _, weights, _ in callback.seen]
    assert not model._forward_pre_hooks and not model._forward_hooks
    batch = collate({name: [value] for name, value in mixture[0].items() if name != "source_id" and name != "row_id"})
    assert model.train()(**batch).loss is not None


def test_what_the_reference_knows_better_gets_the_largest_weight(tmp_path):
    """The reference reads `up` ten times as often as the others; the other model, all alike."""
    proxy, stage = make_proxy(tmp_path, {"noise": 20, "up": 400, "down": 20}, max_steps=24), FakeStage()
    found = doremi(proxy, tmp_path / "doremi", seed=0, stage=stage)
    assert max(found.weights, key=found.weights.get) == "up" and sum(found.weights.values()) == pytest.approx(1)
    assert found.tokens == 3 * 24 * 8 * 16 and stage.total == 48 and stage.reached[-1] == 48
    assert found.details["reference_nll"]["up"] != found.details["reweighted_nll"]["up"]
    json.dumps(found.details)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("doremi/*/result.json")}
    proxy.tuning_probes.clear()  # which it does not look at
    assert doremi(proxy, tmp_path / "doremi", seed=0) == found
    assert len(times) == 2 and times == {file: file.stat().st_mtime_ns for file in times}
    (tmp_path / "doremi" / "reweighted" / "weights.json").unlink()
    with pytest.raises(ValueError, match="weights that DoReMi found, is missing"):
        doremi(proxy, tmp_path / "doremi", seed=0)


def test_bad_input_is_refused(tmp_path, reference):
    proxy = make_proxy(tmp_path, gradient_accumulation_steps=2)
    callback = DoReMiCallback(list(proxy.sources), tmp_path / "weights.json", reference)
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 2"):
        train_mixture(proxy, UNIFORM, 0, tmp_path / "run", callbacks=[callback])
    for options in (dict(step_size=0.0), dict(smoothing=1.0)):
        with pytest.raises(ValueError, match="step_size"):
            DoReMiCallback(["a"], tmp_path / "weights.json", reference, **options)
    other = make_proxy(tmp_path, max_steps=12)
    with pytest.raises(Interrupted):
        train_mixture(other, UNIFORM, 0, tmp_path / "other", callbacks=[InterruptAt(11)])
    callback = DoReMiCallback(list(proxy.sources), tmp_path / "weights.json", reference)
    with pytest.raises(ValueError, match="checkpoint of step 10 was not reweighted over the sources noise, up, down"):
        train_mixture(other, UNIFORM, 0, tmp_path / "other", callbacks=[callback])
