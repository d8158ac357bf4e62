"""The forest plot of an audit: the mixture minus every other arm, with intervals, at every learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobilellm_hf.audit.outcomes import UNDECIDED, Comparison, Outcomes
from mobilellm_hf.audit.statistics import PairedDifference
from mobilellm_hf.audit.verdict import NAMES
from mobilellm_hf.training.plots import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_forest(outcomes: Outcomes, comparisons: Sequence[Comparison], path: str | Path) -> Figure:
    """A panel each for the final probes, the unscored domains and the worst domain; a row an arm, a colour a rate.

    Left of 0 the mixture is better. Every seed is a faint dot. A filled mark is beyond Holm's correction; that of the
    worst domain, which is no test, never is.
    """
    from matplotlib.figure import Figure

    arms = [arm.name for arm in outcomes.arms[1:]]
    panels: list[tuple[str, Callable[[Comparison], PairedDifference], Callable[[Comparison], bool]]] = [
        ("final probes", lambda part: part.final, lambda part: part.result != UNDECIDED)
    ]
    if outcomes.unscored:
        panels.append(("unscored domains", lambda part: part.unscored, lambda part: part.unscored_result != UNDECIDED))
    panels.append(("worst domain, picked after the fact", lambda part: part.per_probe[part.worst], lambda part: False))
    size = (2.2 + 3.4 * len(panels), 1.5 + 0.42 * len(arms))
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for cell, (title, difference, beyond) in zip(cells, panels, strict=True):
        for part in comparisons:
            place = outcomes.learning_rates.index(part.learning_rate)
            spread = 0.3 * (place - (len(outcomes.learning_rates) - 1) / 2)
            _draw(cell, arms.index(part.other) + spread, difference(part), COLORS[place], beyond(part))
        cell.axvline(0, color="black", linewidth=1)
        cell.set_title(title, fontsize=9)
        cell.set_xlabel("bits per byte, mixture minus arm", fontsize=8)
        cell.tick_params(labelsize=8)
        cell.spines[["top", "right"]].set_visible(False)
    cells[0].set_yticks(range(len(arms)), [NAMES.get(name, name) for name in arms])
    cells[0].set_ylim(len(arms) - 0.5, -0.5)
    handles = [
        cells[0].plot([], [], "o", color=COLORS[place], label=f"learning rate {rate:g}")[0]
        for place, rate in enumerate(outcomes.learning_rates)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return figure


def _draw(cell: Axes, height: float, difference: PairedDifference, color: str, beyond: bool) -> None:
    cell.plot(
        difference.per_seed, np.full(len(difference.per_seed), height), ".", color=color, alpha=0.25, markersize=4
    )
    cell.plot([difference.low, difference.high], [height, height], color=color, linewidth=1.6)
    face = color if beyond else "white"
    cell.plot([difference.mean], [height], "o", color=color, markerfacecolor=face, markersize=5.5)
