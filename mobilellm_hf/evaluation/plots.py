"""A picture of a suite: our values with their intervals beside the paper's models of that size."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from mobilellm_hf.evaluation.paper_tables import rows_near
from mobilellm_hf.evaluation.results import NO_VALUE, TaskResult, column_value, legend
from mobilellm_hf.evaluation.suites import Suite

OURS, PAPER = "#d65f5f", "#9db4cc"


def plot_suite(suite: Suite, name: str, parameters: int, results: Mapping[str, TaskResult], path: Path) -> bool:
    """Draws a panel for each column of which all tasks have a result, and says whether there was one."""
    from matplotlib.figure import Figure

    found = {
        column: column_value([results[task] for task in tasks])
        for column, tasks in suite.columns.items()
        if all(task in results for task in tasks)
    }
    if not found:
        return False
    rows = rows_near(suite.name, parameters)
    figure = Figure(figsize=(1.6 + 1.9 * len(found), 1.4 + 0.32 * (len(rows) + 1)), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    names = [row.name for row in rows] + [name]
    for panel, (column, ours) in zip(panels, found.items()):
        values = [row.values[column] for row in rows]
        panel.barh(range(len(rows)), [value or 0.0 for value in values], color=PAPER)
        panel.barh(len(rows), 100 * (ours.value or 0.0), color=OURS)
        if ours.low is not None:
            spread = [[100 * (ours.value - ours.low)], [100 * (ours.high - ours.value)]]
            panel.errorbar(100 * ours.value, len(rows), xerr=spread, color="black", capsize=3)
        end = ours.high or ours.value or 0.0
        told = NO_VALUE if ours.value is None else f"{100 * ours.value:.1f}"
        panel.text(100 * end, len(rows), f"  {told}", va="center", fontsize=7)
        for place, value in enumerate(values):
            panel.text(value or 0.0, place, " –" if value is None else f" {value:g}", va="center", fontsize=7)
        panel.set_title(column + ours.marks, fontsize=9)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set_xlim(left=0)
        panel.margins(x=0.25)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{suite.table}: per cent, with 95% intervals of ours", fontsize=9)
    if note := legend("".join(ours.marks for ours in found.values())):
        figure.supxlabel(textwrap.fill(note, 24 * (len(found) + 1)), fontsize=7)
    figure.savefig(path, dpi=130)
    return True
