"""What a curation kept, step by step and source by source: a table, a picture, and documents to read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset
from rich.table import Table

from mobilellm_hf.curation.stages import KEPT, StageReport, quantiles

SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class FunnelStep:
    """Documents that a step kept, by source, how many fell, by reason, and how many it read only in part."""

    name: str
    kept: dict[str, int]
    fallen: dict[str, int]
    truncated: int = 0


def funnel(reports: Sequence[StageReport], sources: Sequence[str]) -> list[FunnelStep]:
    """The steps in order, after a first one with what the corpora hold."""
    steps = []
    for report in reports:
        table = report.table()
        counts = table.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist()
        kept, fallen, reached = dict.fromkeys(sources, 0), {}, dict.fromkeys(sources, 0)
        for row in counts:
            reached[row["source"]] += row["count_all"]
            if row["reason"] == KEPT:
                kept[row["source"]] += row["count_all"]
            else:
                fallen[row["reason"]] = fallen.get(row["reason"], 0) + row["count_all"]
        if not steps:
            steps.append(FunnelStep("documents", reached, {}))
        truncated = int(pa.compute.sum(table["truncated"]).as_py()) if "truncated" in table.column_names else 0
        steps.append(FunnelStep(report.name, kept, fallen, truncated))
    return steps


def funnel_table(steps: Sequence[FunnelStep]) -> Table:
    """A line a source, a column a step; below it why documents fell."""
    table = Table(title="Documents that each step kept", show_footer=True)
    table.add_column("source", footer="all")
    for step in steps:
        table.add_column(step.name, justify="right", footer=f"{sum(step.kept.values()):,}")
    for source in steps[0].kept:
        table.add_row(source, *(f"{step.kept[source]:,}" for step in steps))
    return table


def reasons_table(steps: Sequence[FunnelStep]) -> Table:
    """Why documents fell, and how many."""
    table = Table("step", "why documents fell", "documents", title="Reasons")
    table.columns[2].justify = "right"
    for step in steps:
        for reason, count in sorted(step.fallen.items(), key=lambda item: -item[1]):
            table.add_row(step.name, reason, f"{count:,}")
    return table


def truncated_documents(steps: Sequence[FunnelStep]) -> list[str]:
    """A line for each step whose model read some documents only in part, kept or not."""
    return [
        f"{step.name}: {step.truncated:,} documents are longer than the model reads; it saw their beginning"
        for step in steps
        if step.truncated
    ]


def lost_sources(reports: Sequence[StageReport], steps: Sequence[FunnelStep]) -> list[str]:
    """A line for each source of which nothing is left: at which step, and how it had scored there."""
    lines = []
    for source in steps[0].kept:
        place = next((number for number, step in enumerate(steps) if step.kept[source] == 0), None)
        if not place:
            continue
        line = f"{source}: the step {steps[place].name!r} kept none of {steps[place - 1].kept[source]:,} documents"
        if "score" in reports[place - 1].columns():
            table = reports[place - 1].table(["source", "score"])
            scores = table.filter(pa.compute.equal(table["source"], source))["score"].to_numpy()
            line += f". Quantiles of the score: {quantiles(scores)}"
        lines.append(line)
    return lines


def plot_funnel(steps: Sequence[FunnelStep], path: str | Path, format: str | None = None) -> None:
    """What share of each source's documents is left after each step, on a logarithmic axis, and of all of them."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    places = range(len(steps))
    colors = colormaps["tab20"]
    for number, source in enumerate(steps[0].kept):
        counts = np.array([step.kept[source] for step in steps], float)
        counts[counts == 0] = np.nan
        panel.plot(places, counts, marker="o", markersize=4, color=colors(number % 20), label=source)
    totals = [sum(step.kept.values()) for step in steps]
    panel.plot(places, totals, marker="o", color="black", linewidth=2, label="all")
    for place, total in zip(places, totals, strict=True):
        above = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center", "fontsize": 9}
        panel.annotate(f"{total:,}", (place, total), **above)
    panel.set_yscale("log")
    panel.set_ylim(0.7, max(totals) * 2.5)
    panel.set_xticks(places, [step.name for step in steps])
    panel.set_ylabel("documents left")
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, format=format)


def write_samples(documents: Dataset, reports: Sequence[StageReport], path: Path, count: int, seed: int = 0) -> None:
    """A Markdown file with `count` random documents that each step kept, and as many of each reason to fall.

    Args:
        documents: what `curate` was given.
    """
    rng = np.random.default_rng(seed)
    lines = ["# Documents to read", ""]
    for report in reports:
        table = report.table()
        reasons = table["reason"].unify_dictionaries().combine_chunks()
        codes, names = reasons.indices.to_numpy(), reasons.dictionary.to_pylist()
        for reason in sorted(names, key=lambda name: name != KEPT):
            rows = np.flatnonzero(codes == names.index(reason))
            if not len(rows):
                continue
            lines += [f"## {report.name}: {'kept' if reason == KEPT else reason} ({len(rows):,})", ""]
            for row in rng.permutation(rows)[:count]:
                lines += _sample(documents, {name: table[name][int(row)].as_py() for name in table.column_names})
    path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")


def _sample(documents: Dataset, decision: dict) -> list[str]:
    known = ("document", "source", "reason")
    figures = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in decision.items()
        if name not in known and value is not None
    ]
    text = documents[decision["document"]]["text"]
    shown = text[:SHOWN_CHARACTERS] + (" ..." if len(text) > SHOWN_CHARACTERS else "")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", shown))])
    head = f"**{decision['source']}**, document {decision['document']:,}: {', '.join(figures) or 'no score'}"
    return [head, "", f"{fence}text", shown, fence, ""]
