"""What resampling rows, probe samples, checkpoints and seeds does to rho of equation (5), which they are samples for.

    run = bootstrap_rho(joint, tokens, groups, folds, by_checkpoint, alpha)
    both = combine_seeds([run, RhoDraws.load(Path("runs/influence-seed1/bootstrap.npz"))])
    both.rho + both.total()                     # (draws, sources)

Each level is resampled with replacement, its units whole (blocks of neighbouring rows, folds of a probe), and moves
rho by an error of its own; the errors add up. That is the crossed bootstrap to first order: what it leaves out, the
interaction of rows and probe samples, is smaller by the number of either. Errors of few independent units are widened
by their sample variance and Student's quantile.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import torch

from mobilellm_hf.influence.folds import FoldTable
from mobilellm_hf.influence.mixing import group_means, joint_influence
from mobilellm_hf.influence.scoring import ScoringCheckpoint, combine
from mobilellm_hf.influence.student_t import student_t_quantile
from mobilellm_hf.workspace import write_whole

LEVEL = 0.05
DRAWS = 2_000
# The 97.5% point of the standard normal distribution.
Z_95 = 1.959963984540054
# Rows are resampled in so many blocks of neighbours at most, which often are of one document.
BLOCKS = 512
ROWS, PROBES, CHECKPOINTS, SEEDS = "rows", "probe samples", "checkpoints", "seeds"


@dataclass(frozen=True)
class RhoDraws:
    """rho of equation (5), and what resampling does to it.

    Attributes:
        rho: (S,) joint influence of each source, per token.
        errors: level -> (draws, S), how far each resampling of that level alone moves rho.
        units: level -> how many there were to resample: the fewest of any source, or capability; 1 tells nothing.
        seed: of the resampling. With it, runs over the same rows are resampled alike.
        capabilities: whose mean rho is.
        fingerprint: of the rows and the folds that were resampled.
    """

    sources: list[str]
    rho: np.ndarray
    errors: dict[str, np.ndarray]
    units: dict[str, int]
    seed: int = 0
    capabilities: tuple[str, ...] = ()
    fingerprint: str = ""

    def total(self) -> np.ndarray:
        """(draws, S) errors of all levels together."""
        return sum(self.errors.values())

    def save(self, path: Path) -> None:
        """To a file that `load` reads, for a mixture over several seeds."""
        errors = {f"error {level}": values for level, values in self.errors.items()}

        def write(partial: Path) -> None:
            with partial.open("wb") as stream:
                np.savez(
                    stream, sources=self.sources, rho=self.rho, units=list(self.units.values()), seed=self.seed,
                    capabilities=list(self.capabilities), fingerprint=self.fingerprint, **errors,
                )  # fmt: skip

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path) -> RhoDraws:
        """Raises a ValueError if there is no such file, or it does not say what was resampled."""
        if not path.exists():
            raise ValueError(f"{path} does not exist: score that seed first, with bootstraps of 2 or more")
        with np.load(path) as saved:
            errors = {name.removeprefix("error "): saved[name] for name in saved.files if name.startswith("error ")}
            units = dict(zip(errors, saved["units"].tolist(), strict=True))
            if missing := [name for name in ("seed", "capabilities", "fingerprint") if name not in saved.files]:
                raise ValueError(
                    f"{path} says nothing of its {missing[0]}: run the scoring of that seed again, which reads the "
                    "scores that it has"
                )
            return cls(
                saved["sources"].tolist(), saved["rho"], errors, units, int(saved["seed"]),
                tuple(saved["capabilities"].tolist()), str(saved["fingerprint"]),
            )  # fmt: skip


def bootstrap_rho(
    joint: torch.Tensor,
    tokens: torch.Tensor,
    groups: Sequence[str],
    folds: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    by_checkpoint: np.ndarray | None = None,
    alpha: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> RhoDraws:
    """Resamples what rho was estimated from.

    Args:
        joint: (N,) joint influence of each row, all checkpoints together (equation 4).
        tokens: (N,) predicted tokens of each row.
        groups: the source of each row; S of them.
        folds: of each capability (S, K) influence of each source on each fold of its probe, and (K,) samples a fold.
            Empty: probe samples are not resampled.
        by_checkpoint: (T, C, S) rho of each checkpoint on each capability, anything where it does not serve it.
        alpha: (T, C) weight of each checkpoint, 0 where it does not serve the capability; columns sum to 1.

    Raises:
        ValueError: a source has fewer than two rows with a finite score, or a probe fewer than two folds.
    """
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(groups))
    influence, weight = joint.double().numpy(), tokens.double().numpy()
    counted = np.isfinite(influence) & (weight > 0)
    member = np.array([names.index(group) for group in groups])
    rho, errors, blocks = np.zeros(len(names)), {ROWS: np.zeros((draws, len(names)))}, []
    for number, name in enumerate(names):
        own = counted & (member == number)
        if own.sum() < 2:
            raise ValueError(f"{name} has {own.sum()} rows with a finite score, and an interval needs two: score more")
        rho[number] = influence[own] @ weight[own] / weight[own].sum()
        errors[ROWS][:, number] = _row_errors(influence[own], weight[own], draws, rng)
        blocks.append(min(int(own.sum()), BLOCKS))
    units = {ROWS: min(blocks)}
    if len(folds):
        errors[PROBES] = sum(_fold_errors(values, sizes, draws, rng) for values, sizes in folds) / len(folds)
        units[PROBES] = min(len(sizes) for _, sizes in folds)
    if by_checkpoint is not None:
        errors[CHECKPOINTS] = _checkpoint_errors(by_checkpoint, alpha, draws, rng)
        units[CHECKPOINTS] = int((alpha > 0).sum(0).min())
    return RhoDraws(names, rho, errors, units, seed)


def bootstrap_scores(
    tables: Mapping[ScoringCheckpoint, pyarrow.Table],
    folds: Mapping[ScoringCheckpoint, FoldTable],
    capabilities: Sequence[str],
    draws: int,
    seed: int = 0,
    data: str = "",
) -> RhoDraws:
    """rho of scored data over these capabilities, and its errors under resampling.

    Args:
        folds: of each checkpoint as `fold_influence` has them; empty if probe samples are not to be resampled.
        data: what identifies the rows and the probes by their content.

    Raises:
        ValueError: as `bootstrap_rho`.
    """
    first = next(iter(tables.values()))
    sources, tokens = first["source"].to_pylist(), torch.from_numpy(first["tokens"].to_numpy().copy())
    joint = joint_influence(combine(tables, capabilities), capabilities)
    alpha = np.array([[c.step if name in c.capabilities else 0 for name in capabilities] for c in tables], dtype=float)
    alpha /= alpha.sum(0)

    def rho(checkpoint: ScoringCheckpoint, name: str) -> np.ndarray:
        if name not in checkpoint.capabilities:
            return np.zeros(len(dict.fromkeys(sources)))
        return group_means(torch.from_numpy(tables[checkpoint][name].to_numpy().copy()), tokens, sources)[1].numpy()

    together = []
    for column, name in enumerate(capabilities if folds else ()):
        serving = [(row, folds[c][name]) for row, c in enumerate(tables) if name in c.capabilities]
        influence = sum(alpha[row, column] * values for row, (values, _) in serving)
        together.append((influence, serving[0][1][1]))
    by_checkpoint = np.array([[rho(checkpoint, name) for name in capabilities] for checkpoint in tables])
    found = bootstrap_rho(joint, tokens, sources, together, by_checkpoint, alpha, draws, seed)
    sizes = [part.tolist() for _, part in together]
    text = json.dumps([data, sources, tokens.tolist(), sizes])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return replace(found, capabilities=tuple(sorted(capabilities)), fingerprint=fingerprint)


def _row_errors(influence: np.ndarray, weight: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) of a source's token-weighted mean, blocks of neighbouring rows resampled."""
    count = min(len(influence), BLOCKS)
    block = np.arange(len(influence)) * count // len(influence)
    tokens = np.bincount(block, weight, count)
    totals = np.bincount(block, weight * influence, count)
    chosen = rng.multinomial(count, np.full(count, 1 / count), draws)
    return _inflation(count) * (chosen @ totals / (chosen @ tokens) - totals.sum() / tokens.sum())


def _fold_errors(values: np.ndarray, sizes: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, S): the same folds are drawn for all sources, whose errors are one probe's."""
    if len(sizes) < 2:
        raise ValueError("a probe has samples for one fold only, and an interval needs two: take more of them")
    chosen = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), draws) * sizes
    shares = chosen / chosen.sum(1, keepdims=True) - sizes / sizes.sum()
    return _inflation(len(sizes)) * shares @ values.T


def _checkpoint_errors(values: np.ndarray, alpha: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, S). Checkpoints that serve the same capabilities are drawn together.

    Influence contracts as a model learns (Figure 5), all of it alike, which leaves a mixture as it is: each checkpoint
    is brought to the scale of the mean before it is compared. They are a choice along a run and no random sample, so
    their spread counts as it is, without a t quantile.
    """
    errors, serving = np.zeros((draws, values.shape[2])), alpha > 0
    for pattern in np.unique(serving, axis=1).T:
        columns, count = (serving == pattern[:, None]).all(0), int(pattern.sum())
        if count < 2:
            continue
        rho = np.einsum("tc,tcs->cs", alpha[pattern][:, columns], values[pattern][:, columns])
        scale = np.linalg.norm(rho, axis=1) / np.linalg.norm(values[pattern][:, columns], axis=2).clip(1e-300)
        chosen = rng.multinomial(count, np.full(count, 1 / count), draws)[..., None] * alpha[pattern][:, columns]
        shares = chosen / chosen.sum(1, keepdims=True) - alpha[pattern][:, columns]
        scaled = values[pattern][:, columns] * scale[..., None]
        errors += math.sqrt(count / (count - 1)) * np.einsum("btc,tcs->bs", shares, scaled)
    return errors / values.shape[1]


def _inflation(count: int) -> float:
    """What a bootstrap of few independent units is too narrow by: their sample variance, and Student's quantile."""
    return math.sqrt(count / (count - 1)) * student_t_quantile(count - 1, 1 - LEVEL) / Z_95


def combine_seeds(runs: Sequence[RhoDraws], seed: int = 0) -> RhoDraws:
    """The mean over runs whose models began with other seeds, and the spread between them as one more level.

    Each is brought to the scale of their mean first. The other levels keep what the runs have in common: the same
    rows and probes, resampled alike. Draws of their own would be noise that the mean over the runs takes out, although
    they all have the same rows.

    Raises:
        ValueError: the runs differ in sources, capabilities, rows, probes, or the number or the seed of the draws.
    """
    first = runs[0]
    for run in runs:
        _check_alike(first, run)
        if set(run.sources) != set(first.sources) or run.total().shape != first.total().shape:
            raise ValueError(
                f"the seeds were scored with other sources or bootstraps: {', '.join(run.sources)} and "
                f"{', '.join(first.sources)}, {len(run.total())} and {len(first.total())} draws"
            )
    if len(runs) == 1:
        return first
    orders = [[run.sources.index(name) for name in first.sources] for run in runs]
    norms = [np.linalg.norm(run.rho) for run in runs]
    scales = [np.mean(norms) / norm if norm > 0 else 1.0 for norm in norms]
    rhos = np.stack([scale * run.rho[order] for run, order, scale in zip(runs, orders, scales, strict=True)])
    errors = {}
    for level in dict.fromkeys(level for run in runs for level in run.errors):
        parts = [s * r.errors[level][:, o] for r, o, s in zip(runs, orders, scales, strict=True) if level in r.errors]
        errors[level] = np.mean(parts, axis=0)
    draws = len(first.total())
    chosen = np.random.default_rng([seed, len(runs)]).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), draws)
    errors[SEEDS] = _inflation(len(runs)) * (chosen / len(runs) - 1 / len(runs)) @ rhos
    units = {level: min(run.units[level] for run in runs if level in run.units) for level in errors if level != SEEDS}
    return replace(first, rho=rhos.mean(0), errors=errors, units=units | {SEEDS: len(runs)})


def _check_alike(first: RhoDraws, run: RhoDraws) -> None:
    if first.capabilities != run.capabilities:
        raise ValueError(
            f"the seeds were scored for other capabilities: {', '.join(run.capabilities)} and "
            f"{', '.join(first.capabilities)}: give both the same mixture_capabilities"
        )
    if first.seed != run.seed:
        raise ValueError(
            f"the seeds were resampled by seed={run.seed} and seed={first.seed}, so that the noise of the same rows "
            "would count as if it were of others: give both the same seed, which is not that of the models"
        )
    if first.fingerprint != run.fingerprint:
        raise ValueError(
            "the seeds were scored on other rows or probes: give both the same sources, probes, rows_per_source, "
            "rows_per_probe and probe_folds"
        )
