"""What one round of influence resampling finds and decides, and what it leaves on disk to look at."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from mobilellm_hf.influence.mixing import group_means, joint_influence, keep_mask, mixture_weights
from mobilellm_hf.influence.plots import plot_histograms
from mobilellm_hf.workspace import write_whole

if TYPE_CHECKING:
    from mobilellm_hf.data.mixture import MixtureDataset


# The newest rounds are drawn; all are on disk.
ROUNDS_SHOWN = 12


@dataclass
class Round:
    """One round.

    Attributes:
        step: training step at whose end it took place.
        scored: rows.
        positive: share of them with a positive influence: by the rule, and by capability.
        spread: interquartile range of the mean influence, in units of its own.
        relative_spread: as a share of the first round's.
        rejected: share of all rows that are not read from now on.
        weights: source -> share of the tokens; as before if the phase ended.
        from_draw: draw from which they apply; None if the phase ended.
        cost: share of the training time that rounds have taken so far.
        ended: why the phase ends here; empty if it goes on.
        sign_check: figures of the check before the first samples were dropped, in that round; else empty.
    """

    step: int
    scored: int
    positive: dict[str, float]
    spread: float
    relative_spread: float
    rejected: float
    weights: dict[str, float] = field(default_factory=dict)
    from_draw: int | None = None
    cost: float = 0.0
    ended: str = ""
    sign_check: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """What is logged."""
        positive = {f"influence/positive/{name}": share for name, share in self.positive.items() if name != "all"}
        return (
            positive
            | self.sign_check
            | {
                "influence/positive": self.positive["all"],
                "influence/spread": self.relative_spread,
                "influence/rejected": self.rejected,
                "influence/cost": self.cost,
            }
        )


@dataclass(frozen=True)
class Rules:
    """What a round may change, and when a phase ends; as `InfluenceResamplingCallback` has them."""

    rule: str
    rejects: bool
    reweighs: bool
    floor: float
    min_positive: float
    min_spread: float | None


def decide(
    rules: Rules,
    mixture: MixtureDataset,
    capabilities: list[str],
    rows: np.ndarray,
    scores: torch.Tensor,
    keep: np.ndarray,
    step: int,
    first_spread: float | None,
) -> tuple[Round, np.ndarray]:
    """The round, and which rows are kept from now on.

    Args:
        rows: (N,) `row_id` of the scored rows.
        scores: (N, C).
        keep: (all rows,) what was kept up to now.
        first_spread: of the first round; None if this is it.
    """
    positive = keep_mask(scores, capabilities, rules.rule)
    if rules.rejects:
        keep = keep.copy()
        keep[rows] = positive.numpy()
    joint = joint_influence(scores, capabilities)
    low, high = np.quantile(joint[joint.isfinite()].numpy(), [0.25, 0.75]) if joint.isfinite().any() else (0.0, 0.0)
    first = high - low if first_spread is None else first_spread
    shares = {"all": positive.double().mean().item()}
    shares |= {name: (scores[:, column] > 0).double().mean().item() for column, name in enumerate(capabilities)}
    found = Round(
        step, len(rows), shares, float(high - low), float((high - low) / first) if first > 0 else 0.0,
        float(1 - keep.mean()), mixture.weights,
    )  # fmt: skip
    means = source_means(mixture, rows, scores)
    found.ended = _ended(rules, found, means)
    if not found.ended:
        weights = reweigh(mixture, means if rules.reweighs else None, keep, rules.floor)
        found.weights = weights or mixture.weights
        found.ended = "" if weights else "no source with a weight keeps a row"
    return found, keep


def _ended(rules: Rules, found: Round, means: dict[str, float]) -> str:
    if found.positive["all"] < rules.min_positive:
        return f"only {found.positive['all']:.1%} of the samples have a positive influence"
    if rules.reweighs and not any(mean > 0 for mean in means.values()):
        return "no source has a positive influence"
    if rules.min_spread is not None and found.relative_spread < rules.min_spread:
        return f"influence has narrowed to {found.relative_spread:.1%} of the first round's spread"
    return ""


def source_means(mixture: MixtureDataset, rows: np.ndarray, scores: torch.Tensor) -> dict[str, float]:
    """source -> rho of equation (5): the mean over capabilities of its samples' influence, by predicted tokens.

    Sources of which no sample has a finite score are absent.
    """
    tokens = torch.from_numpy(mixture.predicted_tokens(rows))
    joint = scores.mean(-1)
    counted = joint.isfinite() & (tokens > 0)
    groups = [mixture.sources[index] for index in mixture.source_of(rows[counted.numpy()]).tolist()]
    names, rho = group_means(joint[counted], tokens[counted], groups) if groups else ([], torch.empty(0))
    return dict(zip(names, rho.tolist(), strict=True))


def reweigh(
    mixture: MixtureDataset, means: dict[str, float] | None, keep: np.ndarray, floor: float
) -> dict[str, float]:
    """Weights by equation (5) of the sources that were scored and keep rows; what the others have stays theirs.

    Args:
        means: source -> influence; None leaves all weights, but for sources that keep no row.

    Returns:
        source -> share; nothing if no source is left.
    """
    weights = mixture.weights
    readable = {name: name in mixture.streams or keep[mixture.rows_of(name)].any() for name in mixture.sources}
    if means is not None:
        scored = [name for name in means if readable[name]]
        share = sum(weights[name] for name in means)
        if any(means[name] > 0 for name in scored):
            new = mixture_weights(torch.tensor([means[name] for name in scored], dtype=torch.float64), scored, floor)
            weights |= dict.fromkeys(means, 0.0) | {name: share * weight for name, weight in new.items()}
    weights = {name: weight if readable[name] else 0.0 for name, weight in weights.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()} if total > 0 else {}


def write_round(
    folder: Path,
    rounds: list[Round],
    rows: np.ndarray,
    scores: torch.Tensor,
    mixture: MixtureDataset,
    capabilities: list[str],
) -> None:
    """`round-STEP.parquet` with the scores, and `histograms.png` of all rounds, both by one process a machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return
    columns = {"row_id": rows, "source": [mixture.sources[index] for index in mixture.source_of(rows)]}
    columns |= {name: scores[:, column].numpy() for column, name in enumerate(capabilities)}
    target = folder / f"round-{rounds[-1].step}.parquet"
    write_whole(target, lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path))
    shown = {}
    for found in rounds[-ROUNDS_SHOWN:]:
        file = folder / f"round-{found.step}.parquet"
        if file.exists():
            table = pyarrow.parquet.read_table(file)
            shown[f"step {found.step:,}"] = torch.tensor(
                np.stack([table[name].to_numpy() for name in capabilities], 1)
            )
    write_whole(folder / "histograms.png", lambda path: plot_histograms(shown, capabilities, path, "png"))
