"""Does an influence score rank data the way retraining does? Asked of a model small enough to be trained many times.

    subsets = half_subsets(len(dataset), 50, seed=0)
    outcomes = subset_outcomes(build_model, dataset, probes, subsets, steps=99, batch_size=16, learning_rate=2e-3)
    print(linear_datamodeling_score(scorer.score(dataset), subsets, outcomes))

- `linear_datamodeling_score` (LDS, 2303.14186): do the samples' scores rank random halves of the data?
- `mixture_spearman`: do the sources' scores rank random mixtures of the sources?
- `sign_agreement`: is a source that scores above the others missed when it is left out?

Outcomes are mean NLL, where lower is better; the answers have the sign turned: 1 is a perfect score, 0 a random one.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from mobilellm_hf.influence.ranks import spearman
from mobilellm_hf.influence.scorer import check_rows
from mobilellm_hf.nll import COLUMNS, collate, mean_nll, predicted_tokens, summed_nll
from mobilellm_hf.training import NonFiniteLossError
from mobilellm_hf.workspace import Workspace

BuildModel = Callable[[int], PreTrainedModel]
DataSets = Mapping[str, Dataset]


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation on each probe, (C,), NaN for a constant; its 95% bootstrap interval over the `models`."""

    estimate: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    models: int


@dataclass(frozen=True)
class SignAgreement:
    """Of `cases` (a group on a probe), `counted` have an effect beyond noise, whose sign `agreeing` scores have."""

    agreeing: int
    counted: int
    cases: int

    @property
    def share(self) -> float:
        return self.agreeing / self.counted if self.counted else math.nan


def half_subsets(count: int, subsets: int, seed: int) -> torch.Tensor:
    """(subsets, count) bool: random halves of `count` samples, exactly count // 2 of them True."""
    if count < 2 or subsets < 1:
        raise ValueError(f"{count=} must be 2 or more, and {subsets=} positive")
    random = torch.rand(subsets, count, generator=torch.Generator().manual_seed(seed))
    return random.argsort(1).argsort(1) < count // 2


def retrain(
    build_model: BuildModel, rows: dict, probes: DataSets, order: torch.Tensor, *, learning_rate: float, seed: int
) -> dict[str, float]:
    """Mean NLL (nats per token) of every probe after a fresh model was trained on rows in the given order.

    A pure function of its arguments (on an accelerator as far as its kernels are), which leaves the caller's random
    state alone. AdamW without weight decay, a tenth of the steps warm-up, then a linear decay to zero.

    Args:
        build_model: seed -> a new model, on the device where it is to be trained. Torch is seeded already.
        rows: the data set's columns, `dataset.with_format("torch")[:]`; lists where rows differ in length.
        order: (steps, batch_size) the rows of each step.

    Raises:
        NonFiniteLossError: the NLL of the trained model is no number.
    """
    # The Trainer's steps (without clipping) in a plain loop: setting up a Trainer takes longer than a short run.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(seed).train()
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, len(order) // 10, len(order))
        for index in order:
            batch = collate({k: v[index] if torch.is_tensor(v) else [v[i] for i in index] for k, v in rows.items()})
            batch = {name: values.to(model.device) for name, values in batch.items()}
            loss = summed_nll(model, batch) / predicted_tokens(batch).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        outcome = {name: mean_nll(model, probe) for name, probe in probes.items()}
    if not all(map(math.isfinite, outcome.values())):
        raise NonFiniteLossError(f"NLL after retraining with seed {seed}: {outcome}; lower {learning_rate=}")
    return outcome


def subset_outcomes(
    build_model: BuildModel,
    dataset: Dataset,
    probes: DataSets,
    subsets: torch.Tensor,
    *,
    seeds: Sequence[int] = (0, 1),
    steps: int,
    batch_size: int,
    learning_rate: float,
    folder: str | Path | None = None,
    on_model: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """(M, C) float64: mean NLL of every probe after training on each subset, the mean over seeds.

    A model reads steps x batch_size rows, those of its subset equally often. All models of a seed start alike.

    Args:
        build_model: seed -> a new model.
        dataset: tokenized rows, as the probes: `input_ids`, and `labels`, `position_ids`, `attention_mask` if any.
        subsets: (M, N) bool, which of the N rows each of the M models reads.
        folder: keeps every finished model's outcome, so that an interrupted run goes on where it stopped, and more
            subsets or seeds cost only their own.
        on_model: called with (models done, models in all) after each (progress bars).

    Raises:
        ValueError: the subsets do not fit the data set, the model cannot read a data set, or the folder is of another
            model, data set (told by its fingerprint) or setting; the message names it.
    """
    if subsets.dtype != torch.bool or subsets.shape[1:] != (len(dataset),) or not subsets.any(1).all():
        raise ValueError(
            f"subsets must be bool of shape (models, {len(dataset)}), a column for each row of the data set, and none "
            f"of them empty, not {subsets.dtype} of shape {tuple(subsets.shape)}"
        )
    options = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate, folder=folder, on_model=on_model)
    return _outcomes(build_model, {"the data set": dataset}, probes, subsets, seeds=seeds, **options).mean(0)


def mixture_outcomes(
    build_model: BuildModel, groups: DataSets, probes: DataSets, mixtures: int, *, alpha: float = 1.0, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random mixtures of groups: their (M, G) weights, shares of the rows read, and `subset_outcomes`'s (M, C) NLL.

    Args:
        groups: name -> tokenized rows, as for `group_influence`. The rows of a group are read equally often.
        mixtures: how many; with a higher number, the first ones are the same.
        alpha: of the symmetric Dirichlet distribution of the weights; below 1, a mixture is mostly of few groups.
        options: steps, batch_size, learning_rate, seeds, folder and on_model of `subset_outcomes`, as the errors.
    """
    if mixtures < 1 or not alpha > 0:
        raise ValueError(f"{mixtures=} and {alpha=} must be positive")
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet([alpha] * len(groups), mixtures))
    return weights, _group_outcomes(build_model, groups, probes, weights, **options).mean(0)


def leave_one_out_effects(build_model: BuildModel, groups: DataSets, probes: DataSets, **options) -> torch.Tensor:
    """(seeds, G, C) float64: the NLL of every probe without a group, minus that with all groups in equal shares.

    As many rows are read without the group, other groups' in its place. So an effect is positive if the group helps
    more than the others do on average, not if it helps at all. Arguments and errors as for `mixture_outcomes`.
    """
    if len(groups) < 2:
        raise ValueError(f"groups={list(groups)}: with one left out, nothing is left")
    weights = torch.cat([torch.ones(1, len(groups)), 1 - torch.eye(len(groups))])
    outcomes = _group_outcomes(build_model, groups, probes, weights, **options)
    return outcomes[:, 1:] - outcomes[:, :1]


def linear_datamodeling_score(
    scores: torch.Tensor, subsets: torch.Tensor, outcomes: torch.Tensor, *, resamples: int = 1000, seed: int = 0
) -> RankCorrelation:
    """LDS: the rank correlation of a subset's summed scores with how well it trained a model, over subsets.

    Args:
        scores: (N, C) positive = helpful. A sample without a finite score counts as the mean of the others, neither
            for its subsets nor against them.
        subsets, outcomes: (M, N) bool and the (M, C) NLL that `subset_outcomes` returns for it.
        resamples, seed: of the bootstrap; the interval is its middle 95%.

    Raises:
        ValueError: shapes do not match, an outcome is not finite, or a probe has no finite score.
    """
    fits = subsets.shape == (len(outcomes), len(scores)) and outcomes.shape[1:] == scores.shape[1:]
    if not fits or scores.dim() != 2 or len(outcomes) < 3 or not outcomes.isfinite().all():
        raise ValueError(
            f"subsets or weights {tuple(subsets.shape)}, scores {tuple(scores.shape)} and outcomes "
            f"{tuple(outcomes.shape)} must be of shapes (M, N), (N, C) and (M, C), M 3 or more, and outcomes finite"
        )
    predicted, quality = (subsets.double() @ _mean_for_missing(scores)).mT, -outcomes.double().mT
    draws = torch.randint(len(outcomes), (resamples, len(outcomes)), generator=torch.Generator().manual_seed(seed))
    resampled = spearman(predicted[:, draws], quality[:, draws])
    low, high = resampled.nanquantile(0.025, 1), resampled.nanquantile(0.975, 1)
    return RankCorrelation(spearman(predicted, quality), low, high, len(outcomes))


def mixture_spearman(rho: torch.Tensor, weights: torch.Tensor, outcomes: torch.Tensor, **bootstrap) -> RankCorrelation:
    """As `linear_datamodeling_score`, over mixtures: of (G, C) `rho` weighted by the (M, G) weights of the groups."""
    return linear_datamodeling_score(rho, weights, outcomes, **bootstrap)


def sign_agreement(scores: torch.Tensor, effects: torch.Tensor, min_standard_errors: float = 2.0) -> SignAgreement:
    """How often a group that scores above the probe's mean is missed, and one that scores below is not.

    A case counts if its mean effect over seeds is beyond so many standard errors. Few seeds say little about the
    spread of one group's effect, so it is pooled over the groups of a probe.

    Args:
        scores: (G, C) influence; a group without a finite score is no case.
        effects: (seeds, G, C) of `leave_one_out_effects`, relative to the other groups as the signs here are.

    Raises:
        ValueError: shapes do not match, there is one seed only, or an effect is not finite.
    """
    if scores.dim() != 2 or effects.shape[1:] != scores.shape or len(effects) < 2 or not effects.isfinite().all():
        raise ValueError(
            f"effects {tuple(effects.shape)} must be finite, of 2 seeds or more, and fit scores {tuple(scores.shape)}"
        )
    effect, error = effects.double().mean(0), (effects.double().var(0).mean(0) / len(effects)).sqrt()
    counted = scores.isfinite() & (effect.abs() > min_standard_errors * error)
    filled = _mean_for_missing(scores)
    agreeing = counted & ((filled - filled.mean(0)).sign() == effect.sign())
    return SignAgreement(int(agreeing.sum()), int(counted.sum()), int(scores.isfinite().sum()))


def _mean_for_missing(scores: torch.Tensor) -> torch.Tensor:
    finite = torch.where(scores.isfinite(), scores.double(), math.nan)
    if (missing := finite.isnan().all(0)).any():
        raise ValueError(f"no score on probe {int(missing.nonzero()[0])} is finite: check the model that scored")
    return torch.where(finite.isnan(), finite.nanmean(0), finite)


def _group_outcomes(build_model, groups, probes, weights, **options) -> torch.Tensor:
    """(seeds, M, C) NLL for (M, G) shares of the groups."""
    sizes = torch.tensor([len(group) for group in groups.values()])
    data = {f"group {name!r}": group for name, group in groups.items()}
    return _outcomes(build_model, data, probes, (weights / sizes).repeat_interleave(sizes, 1), **options)


def _reading_order(weights: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(count,) row numbers in random order, each as often as its weight says, give or take one.

    Systematic sampling: independent draws would add noise to what the models are meant to differ in.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(weights), generator=generator)
    ends = weights[shuffled].double().cumsum(0)
    points = (torch.arange(count).double() + torch.rand(1, generator=generator)) * (ends[-1] / count)
    drawn = shuffled[torch.searchsorted(ends, points, right=True)]
    return drawn[torch.randperm(count, generator=generator)]


def _outcomes(
    build_model, data, probes, choices, *, steps, batch_size, learning_rate, seeds=(0, 1), folder=None, on_model=None
) -> torch.Tensor:
    """(seeds, M, C) NLL for (M, N) weights of the rows of all `data`."""
    if min(steps, batch_size, len(seeds), len(probes)) < 1 or not learning_rate > 0:
        raise ValueError(f"{steps=}, {batch_size=} and {learning_rate=} must be positive, seeds and probes not empty")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(0)
    for label, part in [*data.items(), *((f"probe {name!r}", probe) for name, probe in probes.items())]:
        check_rows(label, part, model)
    settings = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    settings["model"] = Hasher.hash([model.config.to_dict(), model.state_dict()])
    settings["data"] = [[label, part._fingerprint] for label, part in data.items()]
    settings["probes"] = {name: probe._fingerprint for name, probe in probes.items()}
    workspace = None if folder is None else Workspace(Path(folder), settings)
    columns = [name for name in COLUMNS if any(name in part.column_names for part in data.values())]
    rows = concatenate_datasets([part.select_columns(columns) for part in data.values()]).with_format("torch")[:]
    outcomes = torch.empty(len(seeds), len(choices), len(probes), dtype=torch.float64)
    for done, (choice, number) in enumerate(product(range(len(choices)), range(len(seeds))), start=1):
        order = _reading_order(choices[choice], steps * batch_size, seeds[number]).view(steps, batch_size)
        train = partial(retrain, build_model, rows, probes, order, learning_rate=learning_rate, seed=seeds[number])
        file = f"{Hasher.hash(order)}-{seeds[number]}.json"  # by what the model read, whichever subset of a call it is
        found = train() if workspace is None else json.loads(workspace.once(file, partial(_write, train)).read_text())
        outcomes[number, choice] = torch.tensor([found[name] for name in probes], dtype=torch.float64)
        if on_model is not None:
            on_model(done, outcomes[..., 0].numel())
    return outcomes


def _write(train: Callable[[], dict[str, float]], file: Path) -> None:
    outcome = json.dumps(train())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(outcome)
