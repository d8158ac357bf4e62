"""Mean gradients and group influence against per-sample autograd in fp64."""

import pytest
import torch
from datasets import Dataset
from influence_cases import build, probe_gradient, rows

from mobilellm_hf.influence import group_influence, mean_gradient


def brute_force(model: torch.nn.Module, dataset: Dataset) -> dict[str, torch.Tensor]:
    """Sum of every sample's own fp64 gradient of its summed NLL, from full logits, over the number of tokens."""
    model = model.double()
    total, tokens = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    for row in dataset.with_format("torch"):
        inputs = {key: row[key][None] for key in ("input_ids", "position_ids") if key in row}
        logits, targets = model(**inputs, use_cache=False).logits[0, :-1], row["labels"][1:]
        kept = targets != -100
        loss = -logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient
        tokens += int(kept.sum())
    model.float()
    return {name: value / tokens for name, value in total.items()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["mobilellm", "llama"])
def test_mean_gradient_is_the_mean_of_every_samples_gradient(kind, packed):
    model, dataset = build(kind), rows(7, seed=1, packed=packed)
    expected = brute_force(model, dataset)
    gradient = mean_gradient(model, dataset, batch_size=3)
    assert gradient.keys() == dict(model.named_parameters()).keys()
    for name, value in gradient.items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_group_influence_is_the_inner_product_with_the_probes_and_predicts_a_step():
    model = build("mobilellm")
    groups = {"a": rows(4, seed=2), "b": rows(5, seed=3)}
    probes = {"code": rows(3, seed=4), "math": rows(4, seed=2)}
    scores = group_influence(model, groups, probes, batch_size=2)
    for row, group in enumerate(groups.values()):
        left = brute_force(model, group)
        for column, probe in enumerate(probes.values()):
            right = probe_gradient(model, probe)
            model.float()
            expected = sum((left[name] * right[name]).sum() for name in left)
            assert abs(scores[row, column] - expected) <= 1e-5 * abs(expected)


def test_the_sign_is_positive_for_a_group_whose_training_step_lowers_the_probe_loss():
    from mobilellm_hf.nll import mean_nll

    model, group, probe = build("mobilellm"), rows(4, seed=2), rows(3, seed=4)
    score = group_influence(model, {"g": group}, {"p": probe})[0, 0]
    before, gradient, step = mean_nll(model.double(), probe), mean_gradient(model.float(), group), 1e-4
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            parameter -= step * gradient[name].double()
    drop = before - mean_nll(model, probe)
    assert drop == pytest.approx(step * score.item(), rel=2e-2)


def test_gradients_and_mode_of_the_model_are_left_as_they_were():
    model = build("mobilellm").train()
    model.model.norm.weight.grad = torch.ones(32)
    model.model.embed_tokens.weight.requires_grad_(False)
    seen = []
    gradient = mean_gradient(model, rows(5, seed=1), batch_size=2, on_batch=seen.append)
    assert model.training and model.model.norm.weight.grad.tolist() == [1.0] * 32
    assert all(p.grad is None for name, p in model.named_parameters() if name != "model.norm.weight")
    assert "model.embed_tokens.weight" not in gradient and "model.norm.weight" in gradient
    assert seen == [2, 2, 1]


def test_batches_of_a_bf16_model_are_summed_in_fp32():
    model, dataset = build("mobilellm").bfloat16().float(), rows(400, seed=1)
    expected = mean_gradient(model, dataset, batch_size=100)
    gradient = mean_gradient(model.bfloat16(), dataset, batch_size=1)
    for name, value in gradient.items():
        assert value.dtype == torch.float
        assert (value - expected[name]).norm() <= 0.02 * expected[name].norm(), name


def test_bad_data_sets_are_named():
    model, good = build("mobilellm"), rows(3, seed=1)
    silent = good.map(lambda row: {"labels": [-100] * 16})
    with pytest.raises(ValueError, match="source 'empty' is empty"):
        group_influence(model, {"empty": good.select([])}, {"p": good})
    with pytest.raises(ValueError, match="probe 'silent': the data set has no predicted token"):
        group_influence(model, {"g": good}, {"silent": silent})
    model.model.layers[1].feed_forward.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"probe 'p': the gradient of .* is not finite"):
        group_influence(model, {"g": good}, {"p": good})
