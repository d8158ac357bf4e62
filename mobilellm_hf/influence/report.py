"""What a scored data set says: a table of sources, the mixture with its figures, and samples for a person to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from rich import box
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mobilellm_hf.influence.mixing import group_means, joint_influence, keep_mask, mixture_weights

EXCERPT = 800  # characters of a sample


@dataclass(frozen=True)
class SourceInfluence:
    """Figures of one source: token-weighted mean influence per capability and over them, and its share of the mix."""

    source: str
    rows: int
    tokens: int
    not_finite: int
    kept: float
    influence: dict[str, float]
    joint: float
    weight: float


def summarize(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    sources: Sequence[str],
    capabilities: Sequence[str],
    subset: Sequence[str] | None = None,
    floor: float = 0.0,
) -> list[SourceInfluence]:
    """Equations (4) to (6) of a scored data set.

    Args:
        scores: (N, C); a row that is not finite counts for nothing but `not_finite`.
        tokens: (N,) predicted tokens.
        sources: the source of each row.
        subset: the capabilities whose mean decides the mixture; all by default.

    Raises:
        ValueError: as `group_means` and `mixture_weights`.
    """
    joint = joint_influence(scores, capabilities, subset)
    names, rho = group_means(joint, tokens, sources)
    by_capability = {name: group_means(scores[:, i], tokens, sources)[1] for i, name in enumerate(capabilities)}
    weights = mixture_weights(rho, names, floor)
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
            )
        )
    return result


def mixture_document(summary: Sequence[SourceInfluence], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture's YAML: the weights, the figures that led to them, and what was scored with what."""
    figures = {
        line.source: {
            "rows": line.rows, "tokens": line.tokens, "rows_not_finite": line.not_finite,
            "rows_kept_by_equation_6": line.kept, "influence": line.influence, "joint_influence": line.joint,
        }
        for line in summary
    }  # fmt: skip
    return {"weights": {line.source: line.weight for line in summary}, "sources": figures, "scored": dict(settings)}


def influence_table(summary: Sequence[SourceInfluence], capabilities: Sequence[str]) -> Table:
    """One line a source; influence as a share of its column's largest, since its scale means nothing by itself."""
    title = "Influence of each source, and the mixture (equations 4 to 6)"
    # Without lines between columns, and narrow, it fits the 80 columns of a log file.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("source", min_width=max(len(line.source) for line in summary))
    for name in ("rows", *capabilities, "joint", "rows > 0", "weight"):
        table.add_column(name, justify="right")
    largest = {name: max(abs(line.influence[name]) for line in summary) or 1.0 for name in capabilities}
    joint = max(abs(line.joint) for line in summary)
    for line in sorted(summary, key=lambda line: -line.weight):
        own = [f"{line.influence[name] / largest[name]:.2f}" for name in capabilities]
        flag = f" ({line.not_finite} not finite)" if line.not_finite else ""
        table.add_row(
            line.source, f"{line.rows:,}{flag}", *own, f"{line.joint / joint:.2f}", f"{line.kept:.0%}",
            f"{line.weight:.1%}",
        )  # fmt: skip
    return table


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
