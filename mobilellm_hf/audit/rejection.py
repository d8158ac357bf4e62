"""Does rejection help (equation 6, Figure 6)? What is kept for its influence, against as many rows kept otherwise.

    scores = load_scores("runs/influence/influence.parquet", proxy.sources)
    arms = rejection_arms(proxy, weights, scores, seeds=range(9), losses=row_losses(model, proxy.sources))
    runs = rejection_runs(proxy, arms, range(9), learning_rates=[3e-3, 1.5e-3])
    train_mixtures(proxy, list(runs.values()), folder / "plain", probes=probes)
    outcomes, _ = read_outcomes(proxy, arms, runs, folder / "plain", sizes, final, unscored)
    verdict(outcomes, compare(outcomes), subject=REJECTION).headline

    keep_positive    the rows whose influence is above 0
    all_rows         nothing is rejected
    random_rows      as many of each source, drawn anew for every seed
    length_matched   as many of each source and length: is it that long rows are kept?
    loss_matched     as many of each source and loss: is it that easy rows are kept?
    flipped          the rows that were rejected
    other_seed       the rows whose influence by another seed's model is above 0

`recipes/audit.py --scores` does it, with plain cross-entropy and, given a teacher, with distillation (Figure 6).

All arms read equally many tokens, of each source alike; `all_rows` reads for what the scores cost besides. What an arm
keeps less of it reads oftener, up to the cap on repetition. If the flipped arm does as well, the sign of the scores
says nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.audit.arguments import check_rule
from mobilellm_hf.audit.arms import Arm, Weights, arm_steps
from mobilellm_hf.audit.proxy import Keep, MixtureRun, Proxy, build_mixture
from mobilellm_hf.nll import IGNORED_LABEL, evaluation_batches

REJECTION = "Rejection by influence"
KEEP = "keep_positive"
# Strata of length or loss in which equally many rows are kept.
STRATA = 10

Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RejectionArm(Arm):
    """An arm that reads some rows only.

    Attributes:
        keep: seed -> source -> (rows,) bool.
    """

    keep: Mapping[int, Keep] = field(default_factory=dict)


def load_scores(file: str | Path, sources: Mapping[str, Dataset], rule: str = "mean") -> dict[str, np.ndarray]:
    """source -> (rows,) influence, of the `influence.parquet` that `recipes/score_influence.py` leaves.

    Args:
        rule: "mean" over the capabilities, or the name of one.

    Raises:
        ValueError: the file does not score these rows, one by one, or there is no such capability.
    """
    capabilities = check_rule("scores", file, rule)
    table = pyarrow.parquet.read_table(file)
    columns = [table[name].to_numpy() for name in (capabilities if rule == "mean" else [rule])]
    influence, of_source, tokens = (
        np.mean(columns, 0),
        np.array(table["source"].to_pylist()),
        table["tokens"].to_numpy(),
    )
    found = {}
    for name, rows in sources.items():
        own = np.flatnonzero(of_source == name)
        lengths = row_lengths(rows)
        if len(own) != len(rows) or not np.array_equal(tokens[own], lengths):
            raise ValueError(
                f"{file} scores {len(own)} rows of {name}, and there are {len(rows)}, or other ones: score the very "
                "rows that are trained on (without rows_per_source, with the same overlap)"
            )
        found[name] = influence[own]
    return found


def row_losses(model: PreTrainedModel, sources: Mapping[str, Dataset], batch_size: int = 16) -> dict[str, np.ndarray]:
    """source -> (rows,) mean NLL of each row's predicted tokens, nats; NaN where nothing is predicted."""
    return {name: _row_losses(model, rows, batch_size) for name, rows in sources.items()}


@torch.no_grad()
def _row_losses(model: PreTrainedModel, rows: Dataset, batch_size: int) -> np.ndarray:
    found = []
    for batch, _ in evaluation_batches(model, rows, batch_size):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED_LABEL, reduction="none").sum(1)
        found.append((nll / (labels != IGNORED_LABEL).sum(1)).double().cpu())
    return torch.cat(found).numpy()


def row_lengths(rows: Dataset) -> np.ndarray:
    """(rows,) predicted tokens of each."""
    if "labels" not in rows.column_names:
        return np.array([len(ids) - 1 for ids in rows["input_ids"]])
    return np.array([sum(label != IGNORED_LABEL for label in labels[1:]) for labels in rows["labels"]])


def kept_of(scores: Scores) -> dict[str, np.ndarray]:
    """source -> (rows,) bool: a finite influence above 0, equation (6)."""
    return {name: np.isfinite(values) & (values > 0) for name, values in scores.items()}


def matched(keep: np.ndarray, figures: np.ndarray, rng: np.random.Generator, strata: int = STRATA) -> np.ndarray:
    """(rows,) bool: as many random rows as `keep` has, in every one of equally large strata of a figure.

    Args:
        figures: (rows,) length or loss; rows that tie are put in order at random, NaN comes last.
    """
    shuffled = rng.permutation(len(keep))
    order = shuffled[np.argsort(figures[shuffled], kind="stable")]
    chosen = np.zeros(len(keep), dtype=bool)
    for stratum in np.array_split(order, min(strata, len(order))):
        chosen[rng.choice(stratum, int(keep[stratum].sum()), replace=False)] = True
    return chosen


def rejection_arms(
    proxy: Proxy,
    weights: Weights,
    scores: Scores,
    seeds: Sequence[int],
    losses: Scores | None = None,
    other_scores: Scores | None = None,
    curation: float = 0.0,
) -> list[RejectionArm]:
    """`keep_positive` first, then what it is compared with.

    Args:
        weights: source -> share of the tokens, alike in all arms. A source of which an arm keeps nothing gives its
            share to the others.
        scores: source -> (rows,) influence of each row.
        losses: source -> (rows,) of a model; without them there is no `loss_matched`.
        other_scores: of another seed's model; without them there is no `other_seed`.
        curation: what the scores cost, as a share of the training; `all_rows`, which needs none, trains longer by it.

    Raises:
        ValueError: scores do not fit the rows, or an arm would keep nothing or everything; the message names which.
    """
    for label, values in (("scores", scores), ("losses", losses), ("other_scores", other_scores)):
        if values is not None:
            _check_fit(label, values, proxy.sources)
    keep = kept_of(scores)
    flipped = {name: ~kept for name, kept in keep.items()}
    lengths = {name: row_lengths(rows) for name, rows in proxy.sources.items()}
    alike = {name: np.zeros(len(kept)) for name, kept in keep.items()}

    def drawn(figures: Scores, salt: int) -> dict[int, Keep]:
        rngs = {seed: np.random.default_rng([seed, salt]) for seed in seeds}
        return {seed: {name: matched(keep[name], figures[name], rng) for name in keep} for seed, rng in rngs.items()}

    make = partial(_arm, weights, seeds)
    arms = [
        make(KEEP, "audited", dict.fromkeys(seeds, keep), curation),
        make("all_rows", "baseline", dict.fromkeys(seeds, {name: np.ones_like(kept) for name, kept in keep.items()})),
        make("random_rows", "baseline", drawn(alike, 2), curation),
        make("length_matched", "placebo", drawn(lengths, 3), curation),
    ]
    if losses is not None:
        arms.append(make("loss_matched", "placebo", drawn(losses, 4), curation))
    arms.append(make("flipped", "placebo", dict.fromkeys(seeds, flipped), curation))
    if other_scores is not None:
        arms.append(make("other_seed", "rival", dict.fromkeys(seeds, kept_of(other_scores)), curation))
    return arms


def _check_fit(label: str, values: Scores, sources: Mapping[str, Dataset]) -> None:
    for name, rows in sources.items():
        if name not in values or np.shape(values[name]) != (len(rows),):
            found = "none" if name not in values else f"an array of shape {np.shape(values[name])}"
            raise ValueError(f"{label}: of {name}, which has {len(rows)} rows, there is {found}")


def _arm(
    weights: Weights, seeds: Sequence[int], name: str, kind: str, keep: Mapping[int, Keep], curation: float = 0.0
) -> RejectionArm:
    return RejectionArm(name, kind, {seed: _shares(name, weights, keep[seed]) for seed in seeds}, curation, keep=keep)


def _shares(arm: str, weights: Weights, keep: Keep) -> Weights:
    """The weights of the sources of which something is kept, as shares."""
    left = {name: weight if keep[name].any() else 0.0 for name, weight in weights.items()}
    total = sum(left.values())
    if total == 0:
        raise ValueError(f"{arm} would keep no row of any source that has a weight: there is nothing to compare")
    return {name: weight / total for name, weight in left.items()}


def rejection_runs(
    proxy: Proxy, arms: Sequence[RejectionArm], seeds: Sequence[int], learning_rates: Sequence[float]
) -> dict[tuple[str, float, int], MixtureRun]:
    """(arm, learning rate, seed) -> the run, seed by seed; a run's name has a digest of the rows it keeps.

    Raises:
        ValueError: what an arm keeps does not suffice within the cap on repetition; the message names the arm.
    """
    runs = {}
    for seed in seeds:
        for arm in arms:
            steps = arm_steps(arm, proxy.training.max_steps, arms[0].curation)
            keep, digest = arm.keep[seed], hashlib.sha256(str(steps).encode())
            for name in sorted(keep):
                digest.update(keep[name].tobytes() + str(arm.weights[seed][name]).encode())
            run = MixtureRun(
                f"{arm.name}-{digest.hexdigest()[:8]}-seed{seed}", arm.weights[seed], seed, steps, keep=keep
            )
            try:
                build_mixture(proxy, run)
            except ValueError as error:
                rows = {name: int(kept.sum()) for name, kept in keep.items()}
                raise ValueError(
                    f"{arm.name} cannot be trained with seed {seed} on the rows that it keeps, {rows}: {error}. Lower "
                    f"max_steps, or raise max_epochs ({proxy.max_epochs:g})"
                ) from error
            for rate in learning_rates:
                runs[arm.name, rate, seed] = replace(run, name=f"{run.name}-lr{rate:g}", learning_rate=rate)
    return runs
