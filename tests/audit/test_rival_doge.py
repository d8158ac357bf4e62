"""The update by hand, products against brute-force gradients, a killed run against an unbroken one."""

import json

import numpy as np
import pytest
import torch
from rival_cases import FakeStage, InterruptAt, Interrupted, build_model, make_proxy, rows

from mobilellm_hf.audit.proxy import MixtureRun, build_mixture, train_mixture
from mobilellm_hf.audit.rivals import doge
from mobilellm_hf.audit.rivals.doge import DoGECallback, batch_gradient, doge_update
from mobilellm_hf.nll import collate

UNIFORM = {"noise": 1 / 3, "up": 1 / 3, "down": 1 / 3}


def test_the_update_by_hand():
    before, products, norms = np.array([0.5, 0.3, 0.2]), np.array([0.6, -1.0, 30.0]), np.array([1.0, 0.5, 0.75])
    # The mean norm is 0.75: s / lr is 0.8; below 0; 40, above 5.
    grown = before * np.exp(0.01 * np.array([0.8, 0.0, 5.0]) / 0.05)
    np.testing.assert_allclose(doge_update(before, products, norms, 0.01), grown / grown.sum(), rtol=1e-5)
    grown = before * np.exp(0.01 * np.array([0.8, 0.0, 5.0]) / 0.5)
    np.testing.assert_allclose(doge_update(before, products, norms, 0.01, 0.5), grown / grown.sum(), rtol=1e-5)
    # One that is not known yet counts in no mean, and stays.
    unknown = doge_update(before, np.array([0.6, np.nan, 0.6]), np.array([1.0, np.nan, 0.5]), 0.01)
    grown = before * np.exp(0.01 * np.array([0.8, 0.0, 0.8]) / 0.05)
    np.testing.assert_allclose(unknown, grown / grown.sum(), rtol=1e-5)


def brute_force(model, data: list[dict[str, torch.Tensor]], max_norm: float | None) -> torch.Tensor:
    """The gradient of the mean NLL over all predicted tokens, flat, from full logits, a row at a time."""
    losses = []
    for row in data:
        logits = model(row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0, :-1]
        targets = row["labels"][1:]
        kept = targets != -100
        losses.append(-logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None])[:, 0])
    gradients = torch.autograd.grad(torch.cat(losses).mean(), list(model.parameters()))
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double()
    return flat if max_norm is None or flat.norm() <= max_norm else flat * max_norm / flat.norm()


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_autograd(max_norm, tied):
    model = build_model(0, tie_word_embeddings=tied).train()
    data = rows("up", 3, 0).with_format("torch")
    found = batch_gradient(model, collate(data[:]), max_norm)
    flat = torch.cat([part.flatten() for part in found]).double()
    torch.testing.assert_close(flat, brute_force(model, list(data), max_norm), rtol=1e-4, atol=1e-7)
    silent = {name: torch.full((1, 4), -100 if name == "labels" else 1) for name in ("input_ids", "labels")}
    assert batch_gradient(model, silent, max_norm) is None


class Watch(DoGECallback):
    """Notes what every step has had, and a copy of the model that it had it from."""

    def update(self, model, batch):
        before = self.weights
        copied = build_model(0).train()
        copied.load_state_dict(model.state_dict())
        found = super().update(model, batch)
        self.seen = [*getattr(self, "seen", []), (copied, batch, before, dict(self.memory), found)]
        return found


@pytest.mark.parametrize("max_norm", [1.0, None])
def test_the_trainer_takes_the_products_that_brute_force_does(tmp_path, max_norm):
    """Of two probes, whose 4 rows are all taken at each step."""
    proxy = make_proxy(tmp_path, max_steps=4, lr_scheduler_type="linear", optim="sgd", max_grad_norm=0.0)
    probes = {"up": rows("up", 4, 1), "down": rows("down", 4, 1)}
    callback = Watch(list(proxy.sources), tmp_path / "weights.json", probes, max_norm=max_norm)
    train_mixture(proxy, UNIFORM, 0, tmp_path / "run", callbacks=[callback])
    mixture = build_mixture(proxy, MixtureRun("run", UNIFORM, 0))
    path = []
    for step, (model, batch, before, memory, found) in enumerate(callback.seen):
        assert batch.step == step and batch.learning_rate == pytest.approx(1e-2 * (1 - step / 4))
        draws = range(8 * step, 8 * step + 8)
        sources, data = mixture.locate(draws)[0], mixture.__getitems__(draws)
        target = sum(brute_force(model, list(probe.with_format("torch")), max_norm) for probe in probes.values())
        gradients = [
            brute_force(model, [row for row, source in zip(data, sources) if source == number], max_norm)
            for number in range(3)
        ]
        np.testing.assert_allclose(memory["products"], [float(g @ target) for g in gradients], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(memory["norms"], [float(g.norm()) for g in gradients], rtol=1e-4)
        expected = doge_update(before, np.array(memory["products"]), np.array(memory["norms"]), batch.learning_rate)
        np.testing.assert_allclose(found, expected)
        path.append(found)
        if step + 1 < len(callback.seen):  # the model is trained on the weighted sum of the sources' gradients
            whole = [brute_force(model, [r for r, s in zip(data, sources) if s == n], None) for n in range(3)]
            moved = sum(weight * gradient for weight, gradient in zip(found, whole)) * batch.learning_rate
            flat = [
                torch.cat([p.flatten() for p in m.parameters()]).double() for m in (model, callback.seen[step + 1][0])
            ]
            torch.testing.assert_close(flat[0] - flat[1], moved, rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(json.loads((tmp_path / "weights.json").read_text())["mean"], np.mean(path, axis=0))


def test_probe_rows_are_other_ones_at_each_step_and_the_same_again(tmp_path):
    callback = DoGECallback(["a"], tmp_path / "weights.json", {"up": rows("up", 12, 1)}, probe_rows=2, seed=3)
    model = build_model(0)
    first, again, other = (callback._probe_gradient(model, step) for step in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    callback.seed = 4
    assert not torch.equal(first[0], callback._probe_gradient(model, 0)[0])


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path):
    """With batches of two, so that every source is missing now and then."""
    proxy, files = make_proxy(tmp_path, max_steps=24, per_device_train_batch_size=2), []
    for stop in (None, 17):
        folder = tmp_path / str(stop)
        files.append(folder / "weights.json")
        for at in [stop, None] if stop else [None]:
            callback = DoGECallback(list(proxy.sources), files[-1], proxy.tuning_probes)
            callbacks = [callback] if at is None else [callback, InterruptAt(at)]
            if at is None:
                train_mixture(proxy, UNIFORM, 0, folder, callbacks=callbacks)
            else:
                with pytest.raises(Interrupted):
                    train_mixture(proxy, UNIFORM, 0, folder, callbacks=callbacks)
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize("probe", ["up", "down"])
def test_the_source_that_is_the_probe_gets_the_largest_weight(tmp_path, probe):
    proxy, stage = make_proxy(tmp_path, probe=probe), FakeStage()
    found = doge(proxy, tmp_path / "doge", seed=0, stage=stage)
    assert max(found.weights, key=found.weights.get) == probe and sum(found.weights.values()) == pytest.approx(1)
    # Every batch twice, and 4 rows of the probe at each of 30 steps.
    assert found.tokens == 30 * (2 * 8 * 16 + 4 * 16) and stage.total == 30 and stage.reached[-1] == 30
    assert found.details["last_weights"][probe] > found.weights[probe]
    assert doge(proxy, tmp_path / "doge", seed=0) == found
    json.dumps(found.details)


def test_bad_input_is_refused(tmp_path):
    proxy = make_proxy(tmp_path)
    for options in (dict(probe_rows=0), dict(bregman=0.0)):
        with pytest.raises(ValueError, match="probe_rows"):
            doge(proxy, tmp_path / "doge", **options)
    silent = proxy.tuning_probes["up"].map(lambda row: {"labels": [5] + [-100] * 15})
    proxy.tuning_probes["silent"] = silent
    with pytest.raises(ValueError, match="tuning probe 'silent' has no predicted token"):
        doge(proxy, tmp_path / "doge")
