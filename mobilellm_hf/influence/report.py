"""What a scored data set says: a table of sources, the mixture with its figures, and samples for a person to read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from rich import box
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mobilellm_hf.influence.mixing import group_means, joint_influence, keep_mask, mixture_weights
from mobilellm_hf.influence.uncertainty import UncertainWeights

EXCERPT = 800  # characters of a sample


@dataclass(frozen=True)
class SourceInfluence:
    """Figures of one source: token-weighted mean influence per capability and over them, and its share of the mix.

    Attributes:
        unshrunk: the share by equation (5), where `weight` may be another; None if no source has a positive influence.
        interval: 95% of it; None if nothing was resampled.
    """

    source: str
    rows: int
    tokens: int
    not_finite: int
    kept: float
    influence: dict[str, float]
    joint: float
    weight: float
    unshrunk: float | None = None
    interval: tuple[float, float] | None = None


def summarize(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    sources: Sequence[str],
    capabilities: Sequence[str],
    subset: Sequence[str] | None = None,
    floor: float = 0.0,
    uncertain: UncertainWeights | None = None,
    shrink: bool = True,
) -> list[SourceInfluence]:
    """Equations (4) to (6) of a scored data set.

    Args:
        scores: (N, C); a row that is not finite counts for nothing but `not_finite`.
        tokens: (N,) predicted tokens.
        sources: the source of each row.
        subset: the capabilities whose mean decides the mixture; all by default.
        uncertain: the weights with their intervals; by default equation (5) alone.
        shrink: whether the shrunk weights are those of the mixture.

    Raises:
        ValueError: as `group_means` and `mixture_weights`.
    """
    joint = joint_influence(scores, capabilities, subset)
    names, rho = group_means(joint, tokens, sources)
    by_capability = {name: group_means(scores[:, i], tokens, sources)[1] for i, name in enumerate(capabilities)}
    if uncertain is None:
        weights = mixture_weights(rho, names, floor)
    else:
        weights = uncertain.weights if shrink else uncertain.unshrunk or mixture_weights(rho, names, floor)
    kept, finite = keep_mask(scores, capabilities), scores.isfinite().all(1)
    member = torch.tensor([names.index(source) for source in sources])
    result = []
    for number, name in enumerate(names):
        own = member == number
        result.append(
            SourceInfluence(
                source=name,
                rows=int(own.sum()),
                tokens=int(tokens[own].sum()),
                not_finite=int((~finite[own]).sum()),
                kept=kept[own].double().mean().item(),
                influence={capability: values[number].item() for capability, values in by_capability.items()},
                joint=rho[number].item(),
                weight=weights[name],
                unshrunk=None if uncertain is None or uncertain.unshrunk is None else uncertain.unshrunk[name],
                interval=None if uncertain is None else uncertain.intervals[name],
            )
        )
    return result


def mixture_document(
    summary: Sequence[SourceInfluence],
    settings: Mapping[str, Any],
    uncertain: UncertainWeights | None = None,
    shrink: bool = True,
) -> dict[str, Any]:
    """The mixture's YAML: the weights, how sure they are, the figures that led to them, and what was scored with what.

    `weights` are those to train on; with `uncertain`, `weights_are` says which of the two.
    """
    figures = {
        line.source: {
            "rows": line.rows, "tokens": line.tokens, "rows_not_finite": line.not_finite,
            "rows_kept_by_equation_6": line.kept, "influence": line.influence, "joint_influence": line.joint,
        }
        for line in summary
    }  # fmt: skip
    document: dict[str, Any] = {"weights": {line.source: line.weight for line in summary}}
    if uncertain is not None:
        document["weights_are"] = (
            "shrunk towards the proportional mix (uncertainty.shrinkage); the paper's are uncertainty.unshrunk"
            if shrink
            else "those of equation (5), as in the paper, not shrunk; uncertainty.shrunk are"
        )
        document["uncertainty"] = _uncertainty(uncertain)
    return document | {"sources": figures, "scored": dict(settings)}


def _uncertainty(found: UncertainWeights) -> dict[str, Any]:
    return {
        "verdict": found.verdict(),
        "unshrunk": found.unshrunk,
        "intervals_of_unshrunk": {name: list(ends) for name, ends in found.intervals.items()},
        "intervals_of_joint_influence": {name: list(ends) for name, ends in found.rho_intervals.items()},
        "shrunk": found.weights,
        "proportional": found.proportional,
        "shrinkage": asdict(found.shrinkage),
        "formula": "weights = (1 - factor) * unshrunk + factor * proportional; factor = 1 if p_value > 0.05, else "
        "min(1, noise / signal); signal is the sources' squared differences in joint influence, noise what resampling "
        "alone makes of them",
        "resampled": found.units,
        "share_of_noise": found.by_level,
        "draws_without_positive_source": found.undecided,
    }


def influence_table(summary: Sequence[SourceInfluence], capabilities: Sequence[str]) -> Table:
    """One line a source; influence as a share of its column's largest, since its scale means nothing by itself."""
    title = "Influence of each source, and the mixture (equations 4 to 6)"
    # Without lines between columns, and narrow, it fits the 80 columns of a log file.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("source", min_width=max(len(line.source) for line in summary))
    resampled = summary[0].interval is not None
    for name in ("rows", *capabilities, "joint", "rows > 0", *(["eq. 5 [95%]"] if resampled else []), "weight"):
        table.add_column(name, justify="right")
    largest = {name: max(abs(line.influence[name]) for line in summary) or 1.0 for name in capabilities}
    joint = max(abs(line.joint) for line in summary) or 1.0
    for line in sorted(summary, key=lambda line: -line.weight):
        own = [f"{line.influence[name] / largest[name]:.2f}" for name in capabilities]
        flag = f" ({line.not_finite} not finite)" if line.not_finite else ""
        between = [_with_interval(line)] if resampled else []
        table.add_row(
            line.source, f"{line.rows:,}{flag}", *own, f"{line.joint / joint:.2f}", f"{line.kept:.0%}",
            *between, f"{line.weight:.1%}",
        )  # fmt: skip
    return table


def _with_interval(line: SourceInfluence) -> str:
    low, high = line.interval
    return f"{'none' if line.unshrunk is None else f'{line.unshrunk:.0%}'} [{100 * low:.0f}, {100 * high:.0f}]"


def examples(
    scores: torch.Tensor,
    rows: Dataset,
    capabilities: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
) -> str:
    """The most and the least helpful samples by joint influence and by each capability, as Markdown."""
    columns = {"all capabilities": joint_influence(scores, capabilities)}
    columns |= {name: scores[:, number] for number, name in enumerate(capabilities)}
    lines = [
        "# Samples by influence",
        "",
        "Positive is helpful. Texts are cut.",
        "",
    ]
    for title, values in columns.items():
        finite = values.isfinite().nonzero().flatten()
        order = finite[values[finite].argsort(descending=True)].tolist()
        ends = {"most": order[:count], "least": order[::-1][:count]}
        for end, chosen in ends.items():
            lines += [f"## {end} helpful to {title}", ""]
            for row in chosen:
                lines += [f"### row {row}, {rows[row]['source']}: {values[row]:+.3e}", ""]
                lines += ["```text", _excerpt(rows[row]["input_ids"], tokenizer), "```", ""]
    return "\n".join(lines)


def _excerpt(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    text = "no tokenizer: " + " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    return text[:EXCERPT].replace("```", "'''")
