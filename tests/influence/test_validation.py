"""Real retraining of a tiny model on two languages and noise; statistics against scipy and worked by hand."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.influence import InfluenceScorer, group_influence, validation
from mobilellm_hf.influence.validation import (
    half_subsets,
    leave_one_out_effects,
    linear_datamodeling_score,
    mixture_outcomes,
    mixture_spearman,
    retrain,
    sign_agreement,
    subset_outcomes,
)
from mobilellm_hf.nll import collate, mean_nll
from mobilellm_hf.training import NonFiniteLossError

TRAINING = dict(steps=30, batch_size=8, learning_rate=5e-3)
SHORT = dict(steps=3, batch_size=2, learning_rate=5e-3)


def build(seed: int, **changes) -> MobileLLMForCausalLM:
    return MobileLLMForCausalLM(
        MobileLLMConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=1, eos_token_id=2, **changes,
        )
    )  # fmt: skip


def rows(language: str, count: int, seed: int) -> Dataset:
    """Rows of 16 tokens: in "a" and "b", of different words, mostly one word follows another; "noise" is any word."""
    generator = torch.Generator().manual_seed(seed)
    if language == "noise":
        return Dataset.from_dict({"input_ids": torch.randint(3, 64, (count, 16), generator=generator).tolist()})
    follows = torch.randperm(20, generator=torch.Generator().manual_seed(ord(language)))
    words = torch.randint(20, (count, 16), generator=generator)
    regular = torch.rand(count, 16, generator=generator) < 0.9
    for position in range(1, 16):
        words[:, position] = torch.where(regular[:, position], follows[words[:, position - 1]], words[:, position])
    return Dataset.from_dict({"input_ids": (words + (3 if language == "a" else 23)).tolist()})


GROUPS = {"a": rows("a", 12, seed=0), "b": rows("b", 12, seed=1), "noise": rows("noise", 24, seed=2)}
DATASET = Dataset.from_dict({"input_ids": [ids for group in GROUPS.values() for ids in group["input_ids"]]})
PROBES = {"a": rows("a", 16, seed=3), "b": rows("b", 16, seed=4)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them take longer for so small a model
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> MobileLLMForCausalLM:
    """The model that scores, half way through a training run on everything."""
    torch.manual_seed(7)
    model, order = build(7), torch.randint(48, (15, 8), generator=torch.Generator().manual_seed(7))
    retrain(lambda seed: model, DATASET.with_format("torch")[:], PROBES, order, learning_rate=5e-3, seed=7)
    return model


def test_influence_ranks_subsets_as_retraining_does_and_random_scores_do_not(trained):
    subsets = half_subsets(48, 24, seed=0)
    outcomes = subset_outcomes(build, DATASET, PROBES, subsets, **TRAINING)
    assert outcomes.shape == (24, 2) and outcomes.dtype == torch.float64
    scores = InfluenceScorer(trained, PROBES).score(DATASET, allow_overlap=True)  # with 20 words, rows coincide
    found = linear_datamodeling_score(scores, subsets, outcomes)
    noise = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))
    random = linear_datamodeling_score(noise, subsets, outcomes[:, :1].expand(-1, 20))
    assert found.estimate.min() > 0.7 and found.low.min() > 0.3
    assert random.estimate.abs().mean() < 0.3 and random.estimate.abs().max() < 0.6
    assert torch.allclose(linear_datamodeling_score(-scores, subsets, outcomes).estimate, -found.estimate)
    assert (found.estimate - linear_datamodeling_score(scores.flip(1), subsets, outcomes).estimate).min() > 0.4


def test_influence_of_groups_ranks_random_mixtures(trained):
    weights, outcomes = mixture_outcomes(build, GROUPS, PROBES, 12, seeds=[0], **TRAINING)
    rho = group_influence(trained, GROUPS, PROBES)
    found = mixture_spearman(rho, weights, outcomes)
    assert found.models == 12 and found.estimate.min() > 0.7
    assert mixture_spearman(-rho, weights, outcomes).estimate.max() < -0.7


def test_influence_has_the_sign_of_what_is_missed_when_a_group_is_left_out(trained):
    effects = leave_one_out_effects(build, GROUPS, PROBES, seeds=[0, 1, 2], **TRAINING)
    assert effects.mean(0).sign().tolist() == [[1, -1], [-1, 1], [-1, -1]]  # missed where its language is spoken
    rho = group_influence(trained, GROUPS, PROBES)
    found = sign_agreement(rho, effects)
    assert found.cases == 6 and found.counted >= 4 and found.share == 1.0
    assert sign_agreement(-rho, effects).agreeing == 0


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    subsets, seen, built = half_subsets(48, 3, seed=0), [], []

    def stop_at_four(done, total):
        seen.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    def counted(seed):
        built.append(seed)
        return build(seed)

    kept = SHORT | dict(folder=tmp_path / "lds")
    with pytest.raises(KeyboardInterrupt):
        subset_outcomes(build, DATASET, PROBES, subsets, **kept, on_model=stop_at_four)
    assert seen == [(1, 6), (2, 6), (3, 6), (4, 6)]
    assert len(list((tmp_path / "lds").iterdir())) == 4 + 1  # and the settings
    torch.rand(1)  # the caller's random state decides nothing
    whole = subset_outcomes(build, DATASET, PROBES, subsets, **SHORT)
    assert torch.equal(subset_outcomes(counted, DATASET, PROBES, subsets, **kept), whole)
    assert built == [0, 0, 1]  # one to look at, and the two that were missing
    single = [subset_outcomes(counted, DATASET, PROBES, subsets, seeds=[seed], **kept) for seed in (0, 1)]
    assert torch.equal(sum(single) / 2, whole) and len(built) == 5
    reordered = subset_outcomes(counted, DATASET, dict(reversed(PROBES.items())), subsets.flip(0), **kept)
    assert torch.equal(reordered, whole.flip(0, 1)) and len(built) == 6


def test_what_has_no_outcome_leaves_nothing_in_the_folder(tmp_path):
    diverging = SHORT | dict(learning_rate=1e30, folder=tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"seed 0: .*nan.*lower learning_rate=1e\+30"):
        subset_outcomes(build, DATASET, PROBES, half_subsets(48, 1, seed=0), **diverging)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "setting, changes",
    [
        ("steps", dict(steps=4)), ("batch_size", dict(batch_size=3)), ("learning_rate", dict(learning_rate=1e-3)),
        ("model", dict(build_model=lambda seed: build(seed, attention_dropout=0.5))),
        ("model", dict(build_model=lambda seed: torch.manual_seed(seed + 1) and build(seed))),
        ("data", dict(dataset=DATASET.select(range(47, -1, -1)))),
        ("probes", dict(probes={"a": PROBES["a"], "b": PROBES["a"]})),
    ],
)  # fmt: skip
def test_a_folder_of_another_run_is_refused_by_the_setting_that_differs(tmp_path, setting, changes):
    run = dict(build_model=build, dataset=DATASET, probes=PROBES, subsets=half_subsets(48, 1, seed=0), seeds=[0])
    subset_outcomes(**run, **SHORT, folder=tmp_path)
    with pytest.raises(ValueError, match=f"is from a run with {setting}="):
        subset_outcomes(**run | SHORT | changes, folder=tmp_path)


def test_groups_in_another_order_are_other_data(tmp_path):
    mixture_outcomes(build, GROUPS, PROBES, 1, seeds=[0], **SHORT, folder=tmp_path)
    with pytest.raises(ValueError, match="is from a run with data="):
        mixture_outcomes(build, dict(reversed(GROUPS.items())), PROBES, 1, seeds=[0], **SHORT, folder=tmp_path)


def test_retraining_is_a_pure_function_of_its_arguments():
    data, order = DATASET.with_format("torch")[:], torch.arange(8).view(4, 2)

    def nll(order=order, seed=0, build=lambda seed: build(seed, attention_dropout=0.5)):
        return retrain(build, data, PROBES, order, learning_rate=1e-3, seed=seed)

    torch.manual_seed(1)
    first, state = nll(), torch.get_rng_state()
    torch.manual_seed(2)
    assert nll() == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(nll(**change) != first for change in (dict(seed=1), dict(order=order.flip(0)), dict(build=build)))


def test_retraining_is_what_the_trainer_does(tmp_path):
    ids = [row[: 4 + number % 12] for number, row in enumerate(DATASET["input_ids"])]
    data = Dataset.from_dict({"input_ids": ids}).with_format("torch")
    found = retrain(build, data[:], PROBES, torch.arange(40).view(10, 4), learning_rate=5e-3, seed=3)
    arguments = TrainingArguments(
        tmp_path, max_steps=10, per_device_train_batch_size=4, learning_rate=5e-3, warmup_steps=1, max_grad_norm=0.0,
        train_sampling_strategy="sequential", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    torch.manual_seed(3)
    model = build(3)
    Trainer(model, arguments, lambda rows: collate({"input_ids": [row["input_ids"] for row in rows]}), data).train()
    assert found == pytest.approx({name: mean_nll(model, probe) for name, probe in PROBES.items()}, rel=1e-5)


def test_models_read_what_they_are_told_to_and_nothing_else(monkeypatch):
    orders = []
    monkeypatch.setattr(validation, "retrain", lambda *a, **options: orders.append(a[3]) or dict.fromkeys(PROBES, 0.0))
    subsets = half_subsets(48, 2, seed=0)
    subset_outcomes(build, DATASET, PROBES, subsets, **TRAINING)
    for order, subset in zip(orders, subsets.repeat_interleave(2, 0), strict=True):
        counts = order.flatten().bincount(minlength=48)
        assert order.shape == (30, 8) and counts[subset].eq(10).all() and counts[~subset].eq(0).all()
    assert not torch.equal(orders[0], orders[1])
    assert (orders[0].flatten().diff() == 0).sum() < 30  # 9 of 239 by chance
    orders.clear()
    weights, _ = mixture_outcomes(build, GROUPS, PROBES, 3, alpha=0.5, seeds=[0], **TRAINING)
    for order, shares in zip(orders, weights, strict=True):
        counts = order.flatten().bincount(minlength=48)
        for group, share in zip(counts.split([12, 12, 24]), shares, strict=True):
            assert abs(group.sum() - 240 * share) <= len(group) and group.max() - group.min() <= 1
    more, alike = (mixture_outcomes(build, GROUPS, PROBES, 5, alpha=alpha, **TRAINING)[0] for alpha in (0.5, 1e4))
    assert torch.equal(more[:3], weights) and more.std() > 0.2 and (alike - 1 / 3).abs().max() < 0.02
    orders.clear()
    leave_one_out_effects(build, GROUPS, PROBES, seeds=[0, 1], **TRAINING)
    shares = [(order // 12).clamp(max=2).flatten().bincount(minlength=3) / 240 for order in orders]
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0, 1 / 2, 1 / 2], [1 / 2, 0, 1 / 2], [1 / 2, 1 / 2, 0]])
    assert torch.allclose(torch.stack(shares[::2]), expected, atol=0.05)


def test_half_subsets_are_random_halves():
    subsets = half_subsets(7, 400, seed=0)
    assert subsets.dtype == torch.bool and (subsets.sum(1) == 3).all()
    assert (subsets.double().mean(0) - 3 / 7).abs().max() < 0.1
    again, other = half_subsets(7, 400, seed=0), half_subsets(7, 400, seed=1)
    assert torch.equal(subsets, again) and not torch.equal(subsets, other)


def test_the_bootstrap_interval_holds_the_estimate_and_narrows_with_more_models():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    subsets = half_subsets(40, 400, seed=0)
    outcomes = -subsets.double() @ scores
    exact = linear_datamodeling_score(scores, subsets, outcomes)
    assert torch.stack((exact.estimate, exact.low, exact.high)).flatten().tolist() == pytest.approx([1] * 6)
    outcomes += 3 * torch.randn(400, 2, generator=generator, dtype=torch.float64)
    few, many = (linear_datamodeling_score(scores, subsets[:m], outcomes[:m]) for m in (40, 400))
    assert all(((found.low < found.estimate) & (found.estimate < found.high)).all() for found in (few, many))
    ratio = (few.high - few.low) / (many.high - many.low)
    assert ((ratio > 2) & (ratio < 5)).all()  # about sqrt(10)


def test_a_sample_without_a_finite_score_is_neither_for_its_subsets_nor_against_them():
    scores = torch.rand(20, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    subsets = half_subsets(20, 50, seed=0)
    scores[:6] = scores[6:].mean()
    outcomes = -subsets.double() @ scores
    flagged = scores.clone()
    flagged[:3], flagged[3:6] = float("nan"), float("inf")
    assert linear_datamodeling_score(flagged, subsets, outcomes).estimate.item() == pytest.approx(1)
    with pytest.raises(ValueError, match="no score on probe 0 is finite"):
        linear_datamodeling_score(torch.full_like(scores, float("nan")), subsets, outcomes)


def test_signs_are_compared_where_the_effect_is_beyond_noise():
    scores = torch.tensor([[6.0], [5.0], [1.0], [2.0], [float("nan")]])  # their mean is 3.5
    effects = torch.tensor([0.4, -0.3, -0.12, 0.09, 0.9])[None, :, None] + torch.tensor([-0.05, 0.05])[:, None, None]
    # Standard error 0.05: the fourth is within twice that, the fifth has no score; the second has the other sign.
    found = sign_agreement(scores, effects)
    assert (found.agreeing, found.counted, found.cases, found.share) == (2, 3, 4, 2 / 3)
    assert math.isnan(sign_agreement(scores, effects, min_standard_errors=100).share)


def test_what_does_not_fit_is_refused():
    scores, subsets, outcomes = torch.zeros(6, 2), half_subsets(6, 4, seed=0), torch.zeros(4, 2)
    for arguments in (
        (scores[:5], subsets, outcomes),
        (scores, subsets, outcomes[:3]),
        (scores, subsets, outcomes[:, :1]),
        (scores[:, 0], subsets, outcomes[:, 0]),
        (scores, subsets[:2], outcomes[:2]),
        (scores, subsets, outcomes / 0),
    ):
        with pytest.raises(ValueError, match=r"must be of shapes \(M, N\), \(N, C\) and \(M, C\)"):
            linear_datamodeling_score(*arguments)
    for effects in (torch.zeros(1, 6, 2), torch.zeros(2, 5, 2), torch.full((2, 6, 2), float("nan"))):
        with pytest.raises(ValueError, match="2 seeds or more"):
            sign_agreement(scores, effects)
    for bad in (subsets, half_subsets(48, 2, seed=0).double(), torch.zeros(1, 48, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"subsets must be bool of shape \(models, 48\)"):
            subset_outcomes(build, DATASET, PROBES, bad, **SHORT)
    with pytest.raises(ValueError, match="steps=0"):
        leave_one_out_effects(build, GROUPS, PROBES, **SHORT | dict(steps=0))
    with pytest.raises(ValueError, match="group 'b', row 0, has the token id 64"):
        mixture_outcomes(build, GROUPS | {"b": Dataset.from_dict({"input_ids": [[64] * 4]})}, PROBES, 1, **SHORT)
    with pytest.raises(ValueError, match="probe 'a' is empty"):
        mixture_outcomes(build, GROUPS, {"a": DATASET.select([])}, 1, **SHORT)
    with pytest.raises(ValueError, match="alpha=0 must be positive"):
        mixture_outcomes(build, GROUPS, PROBES, 1, alpha=0, **SHORT)
    with pytest.raises(ValueError, match="nothing is left"):
        leave_one_out_effects(build, {"a": DATASET}, PROBES, **SHORT)
    with pytest.raises(ValueError, match="count=1"):
        half_subsets(1, 1, seed=0)
