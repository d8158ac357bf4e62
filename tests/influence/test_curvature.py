"""Curvatures against dense algebra, a Trainer's own optimizer, and kronfluence where it is installed."""

import pytest
import torch
from influence_cases import build, predicting, probe_gradient, relative_error, rows, sample_gradients
from transformers import Trainer, TrainingArguments

from mobilellm_hf.influence import AdamCurvature, DataInfCurvature, InfluenceScorer
from mobilellm_hf.influence.curvature import embedding_and_final_names


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a stock Trainer, with weight decay for some parameters; and its trainer."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = TrainingArguments(
        folder, max_steps=3, save_steps=3, per_device_train_batch_size=2, weight_decay=0.1, adam_beta2=0.95,
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(build(), arguments, train_dataset=rows(6, seed=1))
    trainer.train()
    return folder / "checkpoint-3", trainer


def test_adam_reads_the_trainers_second_moments_by_name(trained):
    folder, trainer = trained
    model = trainer.model
    curvature = AdamCurvature.from_checkpoint(folder, model)
    optimizer = trainer.optimizer.optimizer
    directions = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    result = curvature.precondition(directions)
    assert len(optimizer.param_groups) == 2  # with and without weight decay, so that the order is not the model's
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.95**3)
        expected = directions[name] / (moments.sqrt() + 1e-8)
        assert torch.allclose(result[name], expected, rtol=1e-5), name
    live = AdamCurvature.from_optimizer(optimizer, model).precondition(directions)
    assert all(torch.equal(live[name], result[name]) for name in directions)


def test_a_missing_or_foreign_optimizer_is_named(trained, tmp_path):
    folder, trainer = trained
    with pytest.raises(ValueError, match="optimizer.pt does not exist.*save_only_model=False"):
        AdamCurvature.from_checkpoint(tmp_path, trainer.model)
    with pytest.raises(ValueError, match="it is of another model"):
        AdamCurvature.from_checkpoint(folder, build(num_hidden_layers=3))
    with pytest.raises(ValueError, match="moments of shape .* where model.layers.0.feed_forward.gate_proj"):
        AdamCurvature.from_checkpoint(folder, build(intermediate_size=50))
    model = build()
    with pytest.raises(ValueError, match="has no second moments"):
        AdamCurvature.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="no second moments of c"):
        AdamCurvature({"a": torch.ones(1), "b": torch.ones(1)}).precondition({"a": torch.ones(1), "c": torch.ones(1)})


@pytest.mark.parametrize("layers", ["all", "embedding_and_final"])
def test_datainf_is_its_closed_form(layers):
    model, fitted, dataset = build(), predicting(rows(6, seed=9)), rows(4, seed=1)
    probe_sets = {"code": rows(4, 5), "math": rows(4, 6)}
    model.double()
    scores = InfluenceScorer(model, probe_sets, DataInfCurvature(model, fitted, layers)).score(dataset)
    gradients, samples = sample_gradients(model, fitted), sample_gradients(model, dataset)
    names = [name for name, _ in model.named_parameters()]
    names = names if layers == "all" else embedding_and_final_names(names)
    assert ("model.layers.0.self_attn.q_proj.weight" in names) == (layers == "all")
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for column, probe in enumerate(probe_sets.values()):
        direction = probe_gradient(model, probe)
        for name in names:
            # H of DataInf as the mean of the inverses of rank-one matrices, by an explicit inverse of each
            flat = torch.stack([gradient[name].flatten() for gradient in gradients])
            damping = 0.1 * flat.pow(2).sum() / len(flat) / flat.shape[1]
            vector = direction[name].flatten()
            solved = torch.zeros_like(vector)
            for g in flat:
                if len(g) <= 1536:
                    solved += torch.linalg.solve(damping * torch.eye(len(g)).double() + torch.outer(g, g), vector)
                else:  # Sherman and Morrison, for the matrices that are too large to write down
                    solved += (vector - g * (g @ vector) / (damping + g @ g)) / damping
            solved /= len(flat)
            for row, sample in enumerate(samples):
                expected[row, column] += solved @ sample[name].flatten()
    assert relative_error(scores, expected) < 1e-9


def test_datainf_refuses_what_it_cannot_be_fitted_on():
    model, dataset = build(), rows(4, seed=1)
    with pytest.raises(ValueError, match="layers='last' must be"):
        DataInfCurvature(model, dataset, "last")
    with pytest.raises(ValueError, match="not empty .0 rows"):
        DataInfCurvature(model, dataset.select([]))


def test_ekfac_is_kronfluences_own_preconditioning(tmp_path):
    """Our products with its factors against its own pairwise scores of the same factors."""
    pytest.importorskip("kronfluence")
    from ekfac_reference import kronfluence_scores

    from mobilellm_hf.influence.ekfac import EKFACCurvature

    model, fitted, dataset = build("llama"), predicting(rows(40, seed=9)), predicting(rows(6, seed=1))
    probe = predicting(rows(4, 5))
    scorer = InfluenceScorer(model, {"code": probe}, EKFACCurvature(model, fitted))
    assert all("proj" in name for name in scorer.directions) and len(scorer.directions) == 14
    expected = kronfluence_scores(model, fitted, probe, dataset, tmp_path)
    assert relative_error(scorer.score(dataset)[:, 0], expected) < 1e-4


def test_ekfac_treats_a_bias_as_a_column_of_its_weight():
    pytest.importorskip("kronfluence")
    from mobilellm_hf.influence.ekfac import EKFACCurvature

    model, fitted = build("llama with biases"), predicting(rows(20, seed=9))
    scorer = InfluenceScorer(model, {"code": predicting(rows(4, 5))}, EKFACCurvature(model, fitted))
    assert len(scorer.directions) == 28 and scorer.directions["model.layers.0.mlp.up_proj.bias"].shape == (1, 48)
    assert scorer.score(predicting(rows(3, seed=1))).abs().min() > 0


def test_ekfac_says_what_to_install(monkeypatch):
    from mobilellm_hf.influence.ekfac import EKFACCurvature

    monkeypatch.setitem(__import__("sys").modules, "kronfluence.analyzer", None)
    with pytest.raises(ImportError, match="pip install --no-deps kronfluence"):
        EKFACCurvature(build(), rows(4, seed=1))
