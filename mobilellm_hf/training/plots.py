"""Pictures of training runs, from their logs.

    plot_training(trainer.state.log_history, "training.png", tokens_per_step=16 * 2048)
    plot_training({"influence mix": first, "uniform mix": second}, "both.png", tokens_per_step=16 * 2048)

One picture holds whatever the logs do: a panel each for the loss, the loss by source, held-out NLL, RankMe, the
mixture, the influence of what was read, speed, learning rate and gradient norm. Lines are labelled where they
end, not in a legend: fourteen sources can be told apart so, and colours alone would not do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# run name -> probe name -> [(step, NLL), ...]
ProbeCurves = Mapping[str, Mapping[str, list[tuple[int, float]]]]
Log = Sequence[Mapping[str, Any]]
# name -> (steps, values)
Series = dict[str, tuple[np.ndarray, np.ndarray]]

COLORS = (
    "#4878a8", "#d65f5f", "#5aab54", "#956cb4", "#c98a2b", "#8c613c", "#d46bb0", "#3aa6b9", "#797979", "#93a02f",
    "#2f4b7c", "#a23b52", "#1f6f5c", "#b39ddb",
)  # fmt: skip
LINE_STYLES = ("-", "--", ":", "-.")
COLUMNS = 3
# With more points than this, single values are drawn faint and their moving average strong.
SMOOTHED_FROM = 60


@dataclass(frozen=True)
class _Panel:
    """One panel: the keys that it shows and what it calls them, or all keys of a prefix by the rest of their names."""

    title: str
    keys: Mapping[str, str]
    prefix: str = ""
    stacked: bool = False
    # Values that are far above the rest, as those of the first steps are, are cut off.
    cut: bool = False
    smooth: bool = False
    from_zero: bool = False
    percent: bool = False

    def series(self, log: Log) -> Series:
        """What a log holds of it; a name with a further slash is of another kind."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in log:
            for key, value in entry.items():
                name = self.keys.get(key)
                if name is None and self.prefix and key.startswith(self.prefix):
                    rest = key.removeprefix(self.prefix)
                    name = rest if "/" not in rest and key not in self.keys else None
                if name is not None:
                    found.setdefault(name, []).append((entry["step"], value))
        return {name: tuple(np.array(column, float) for column in zip(*points)) for name, points in found.items()}


LOSSES = {"loss": "loss", "distillation/kl": "KL to teacher", "distillation/nll": "NLL"}
PANELS = (
    _Panel("training loss (nats per token)", LOSSES, cut=True, smooth=True),
    _Panel("training loss by source (nats per token)", {}, "loss/", cut=True, smooth=True),
    _Panel("held-out NLL (nats per token)", {}, "probe_nll/", cut=True),
    _Panel("RankMe of the last hidden states", {"rank_me": "RankMe"}),
    _Panel("mixture (share of tokens)", {}, "mixture/", stacked=True, percent=True),
    _Panel("positive influence (share)", {"influence/positive": "mean"}, "influence/positive/", percent=True),
    _Panel("tokens per second", {"tokens_per_second": "tokens/s"}, smooth=True, from_zero=True),
    _Panel("MFU", {"mfu": "MFU"}, smooth=True, from_zero=True, percent=True),
    _Panel("learning rate", {"learning_rate": "learning rate"}),
    _Panel("gradient norm", {"grad_norm": "gradient norm"}, cut=True, smooth=True, from_zero=True),
)


def plot_training(logs: Log | Mapping[str, Log], path: str | Path, tokens_per_step: int | None = None) -> None:
    """Draws what the log histories of one or several runs hold, panel by panel; panels without data are left out.

    Args:
        logs: a trainer's `state.log_history`; or run name -> log history, to compare runs. In panels of several lines
            a run has its style of line, in others its colour; the mixture gets a panel for each run.
        path: of the picture; its extension says the format.
        tokens_per_step: the horizontal axis is then in training tokens, else in steps.

    Raises:
        ValueError: no log holds anything to draw.
    """
    from matplotlib.figure import Figure

    runs = dict(logs) if isinstance(logs, Mapping) else {"": logs}
    drawn: list[tuple[_Panel, str, dict[str, Series]]] = []
    for panel in PANELS:
        found = {run: series for run, log in runs.items() if (series := panel.series(log))}
        if panel.stacked:
            drawn += [(panel, f"{panel.title}{run and f', {run}'}", {run: series}) for run, series in found.items()]
        elif found:
            drawn.append((panel, panel.title, found))
    if not drawn:
        raise ValueError("the log histories hold nothing to draw: no loss, no probe, no mixture, no speed")
    names = dict.fromkeys(name for *_, found in drawn for series in found.values() for name in series)
    colors = dict(zip(names, (COLORS * len(names))[: len(names)]))
    lines = -(-len(drawn) // COLUMNS)
    columns = min(COLUMNS, len(drawn))
    figure = Figure(figsize=(4.9 * columns, 3.1 * lines + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    cells = figure.subplots(lines, columns, squeeze=False).flatten()
    last_step = max(steps[-1] for *_, found in drawn for series in found.values() for steps, _ in series.values())
    scale, unit = _axis(last_step, tokens_per_step)
    for cell, (panel, title, found) in zip(cells, drawn):
        draw = _draw_areas if panel.stacked else _draw_lines
        draw(cell, panel, found, list(runs), colors, scale, last_step)
        _finish(cell, panel, title, unit)
    for cell in cells[len(drawn) :]:
        cell.remove()
    if len(runs) > 1:
        _add_legend(figure, list(runs))
    figure.savefig(path, dpi=130)


def _axis(last_step: float, tokens_per_step: int | None) -> tuple[float, str]:
    """What a step is multiplied with, and what the horizontal axis then shows."""
    if tokens_per_step is None:
        return 1.0, "step"
    total = last_step * tokens_per_step
    for size, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if total >= size:
            return tokens_per_step / size, f"training tokens ({name})"
    return float(tokens_per_step), "training tokens"


def _draw_lines(
    cell: Axes, panel: _Panel, found: dict[str, Series], runs: list[str], colors: dict, scale: float, last_step: float
) -> None:
    names = list(dict.fromkeys(name for series in found.values() for name in series))
    alone = len(names) == 1
    ends, shown = [], []
    for run, series in found.items():
        style = "-" if alone else LINE_STYLES[runs.index(run) % len(LINE_STYLES)]
        for name, (steps, values) in series.items():
            color = COLORS[runs.index(run) % len(COLORS)] if alone else colors[name]
            strong = values
            if panel.smooth and len(values) >= SMOOTHED_FROM:
                strong = _smooth(values, len(values) // 25)
                cell.plot(steps * scale, values, color=color, linewidth=0.5, alpha=0.25)
            marker = "o" if len(values) < 15 else None
            cell.plot(
                steps * scale, strong, color=color, linewidth=1.4, linestyle=style, marker=marker, markersize=2.5
            )
            shown.append(strong)
            if run == next(reversed(found)) or alone:
                ends.append((strong[-1], _figure(strong[-1], panel) if alone else name, color))
    cell.set_xlim(0, last_step * scale)
    if panel.cut:
        _cut(cell, np.concatenate(shown))
    if panel.from_zero:
        cell.set_ylim(0, cell.get_ylim()[1] if panel.cut else 1.15 * max(map(np.nanmax, shown)))
    _label(cell, ends)


def _draw_areas(
    cell: Axes, panel: _Panel, found: dict[str, Series], runs: list[str], colors: dict, scale: float, last_step: float
) -> None:
    """Shares on top of each other, each held until the next is logged."""
    (series,) = found.values()
    steps = np.unique(np.concatenate([steps for steps, _ in series.values()] + [[last_step]]))
    shares = np.stack([_held(steps, *points) for points in series.values()])
    shares /= np.maximum(shares.sum(0), 1e-12)
    tops = shares.cumsum(0)
    for name, top, share in zip(series, tops, shares):
        cell.fill_between(
            steps * scale, top - share, top, step="post", color=colors[name], alpha=0.85, linewidth=0.4, edgecolor="w"
        )
    cell.set_xlim(0, last_step * scale)
    cell.set_ylim(0, 1)
    middles = tops[:, -1] - shares[:, -1] / 2
    _label(
        cell,
        [(middle, f"{name} {share:.0%}", colors[name]) for name, middle, share in zip(series, middles, shares[:, -1])],
    )


def _held(steps: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The last value logged at or before each step; before the first, the first."""
    return values[np.maximum(np.searchsorted(known, steps, side="right") - 1, 0)]


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of `window` values around each, of those there are at the ends; NaN counts for nothing."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (window // 2) + 1)
    sums = np.convolve(np.where(finite, values, 0), kernel, "same")
    return sums / np.maximum(np.convolve(finite, kernel, "same"), 1)


def _cut(cell: Axes, values: np.ndarray) -> None:
    """Leaves out the top if most values lie far below it."""
    finite = values[np.isfinite(values)]
    if len(finite) < 10:
        return
    low, usual, high = finite.min(), np.quantile(finite, 0.88), finite.max()
    if high - low > 1.5 * (usual - low) > 0:
        margin = 0.08 * (usual - low)
        cell.set_ylim(low - margin, usual + 2 * margin)


def _figure(value: float, panel: _Panel) -> str:
    if panel.percent:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.4g}"


def _label(cell: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Labels beside the panel at the heights where lines end, pushed apart where they would overlap."""
    low, high = cell.get_ylim()
    ends = sorted((end for end in ends if np.isfinite(end[0])), key=lambda end: end[0])
    heights = [min(max((value - low) / (high - low), 0.0), 1.0) for value, *_ in ends]
    places = _spread(heights, min(0.078, 1.06 / max(1, len(ends))))
    for (_, text, color), height, place in zip(ends, heights, places):
        arrow = dict(arrowstyle="-", color=color, linewidth=0.5, shrinkA=2, shrinkB=0, relpos=(0, 0.5))
        cell.annotate(
            text, (1.0, height), (1.045, place), "axes fraction", fontsize=7, color=color, va="center",
            annotation_clip=False, arrowprops=arrow,
        )  # fmt: skip


def _spread(heights: list[float], distance: float) -> list[float]:
    """Increasing heights moved as little as leaves this distance between any two, and none far outside [0, 1]."""
    places = np.array(heights)
    # Least squares under order: what each label would be if all stood `distance` apart, pooled where it decreases.
    shifts = distance * np.arange(len(places))
    pools: list[list[float]] = []  # of a sum and a count
    for wanted in places - shifts:
        pools.append([wanted, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    level = np.concatenate([np.full(int(count), total / count) for total, count in pools] or [places])
    top = 1.04 - shifts[-1] if len(shifts) else 0.0
    return (np.clip(level, -0.03, max(-0.03, top)) + shifts).tolist()


def _finish(cell: Axes, panel: _Panel, title: str, unit: str) -> None:
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    cell.set_title(title, fontsize=9, loc="left")
    cell.set_xlabel(unit, fontsize=8)
    cell.tick_params(labelsize=7.5)
    cell.spines[["top", "right"]].set_visible(False)
    if panel.percent:
        cell.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if "tokens_per_second" in panel.keys:
        cell.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if "learning_rate" in panel.keys:
        cell.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        cell.yaxis.get_offset_text().set_fontsize(7)


def _add_legend(figure: Any, runs: list[str]) -> None:
    """Which run has which colour, where runs are lines, and which style of line, where names are."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLORS[number % len(COLORS)], linestyle=LINE_STYLES[number % len(LINE_STYLES)], label=run)
        for number, run in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(runs), frameon=False, fontsize=9)


def plot_probe_nll(runs: ProbeCurves, path: str | Path, tokens_per_step: int) -> None:
    """One panel a probe, one line a run: held-out NLL (nats per token) over training tokens, from the second point on.

    The point before the first step is left out: it is the same for all runs and would flatten the rest.
    """
    from matplotlib.figure import Figure

    probes = list(next(iter(runs.values())))
    figure = Figure(figsize=(3.4 * len(probes), 3.2), layout="constrained")
    panels = figure.subplots(1, len(probes), squeeze=False)
    for panel, probe in zip(panels[0], probes, strict=True):
        for (name, curves), color in zip(runs.items(), COLORS):
            steps, values = zip(*curves[probe][1:], strict=True)
            tokens = [step * tokens_per_step / 1e3 for step in steps]
            panel.plot(tokens, values, marker="o", markersize=3, color=color, label=name)
            end = (tokens[-1], values[-1])
            panel.annotate(f"{values[-1]:.3f}", end, (0, 6), textcoords="offset points", fontsize=8, color=color)
        panel.set_title(probe, fontsize=10)
        panel.set_xlabel("training tokens (thousands)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out NLL (nats per token)")
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
