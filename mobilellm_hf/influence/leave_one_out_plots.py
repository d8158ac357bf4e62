"""What leave-one-out has found: the heat map of Figure 3, the curves behind it, a table, and files of the figures."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from rich import box
from rich.table import Table

from mobilellm_hf.influence.leave_one_out import LeaveOneOutEffect, LeaveOneOutResult, LeaveOneOutRun, effects
from mobilellm_hf.training.plots import COLORS, LINE_STYLES
from mobilellm_hf.workspace import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEYOND_NOISE = "*: the 95% interval over seeds excludes 0"
ONE_SEED = "one seed: no interval"


def plot_heat_map(effect: LeaveOneOutEffect, path: str | Path) -> Figure:
    """Source x capability (Figure 3): how much higher the NLL is without the source; blue where the source helps.

    A cell has the mean over seeds and half the width of its interval; in bold, with an asterisk, if that excludes 0.
    All cells have one scale, which is centred at 0.
    """
    from matplotlib.figure import Figure

    delta, beyond = effect.delta.numpy(), effect.beyond_noise.numpy()
    limit = max(float(np.abs(delta).max()), 1e-12)
    size = (3.2 + 1.35 * len(effect.capabilities), 1.7 + 0.46 * len(effect.sources))
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(delta, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.ndindex(delta.shape):
        strong = bool(beyond[row, column])
        panel.text(
            column, row, cell_text(effect, row, column).replace(" ", "\n"), ha="center", va="center", fontsize=8,
            color="white" if abs(delta[row, column]) > 0.6 * limit else "black",
            fontweight="bold" if strong else "normal", linespacing=0.95,
        )  # fmt: skip
    panel.set_xticks(range(len(effect.capabilities)), effect.capabilities)
    panel.set_yticks(range(len(effect.sources)), effect.sources)
    panel.set_ylabel("source left out")
    seeds = ONE_SEED if len(effect.seeds) == 1 else f"mean of {len(effect.seeds)} seeds; {BEYOND_NOISE}"
    panel.set_title(f"What is lost without a source\n({seeds})", fontsize=9)
    figure.colorbar(image, label="NLL without it - NLL with all (nats per token)")
    figure.savefig(path, dpi=130)
    return figure


def plot_curves(results: Sequence[LeaveOneOutResult], path: str | Path) -> Figure:
    """A column a capability: NLL over training tokens, and below it what each source that is left out adds to it.

    The model of all sources is black. Lines are means over seeds, with a band from the lowest to the highest seed if
    there are several; differences are taken seed by seed. The point before the first step is left out: all models are
    alike there, and it would flatten the rest.
    """
    from matplotlib.figure import Figure

    capabilities = list(results[0].curves)
    curves = {result.run: result for result in results}
    sources = list(dict.fromkeys(result.run.left_out for result in results))
    seeds = list(dict.fromkeys(result.run.seed for result in results))
    figure = Figure(figsize=(3.5 * len(capabilities) + 2.2, 6.2), layout="constrained")
    panels = figure.subplots(2, len(capabilities), squeeze=False, sharex=True)
    for column, capability in enumerate(capabilities):
        values = {
            source: np.stack([_points(curves[LeaveOneOutRun(source, seed)], capability) for seed in seeds])
            for source in sources
        }
        tokens, unit = _tokens(results[0], capability)
        for number, source in enumerate(sources):
            color, style = _look(number, source)
            _draw(panels[0, column], tokens, values[source], color, style, source or "all sources")
            if source is not None:
                _draw(panels[1, column], tokens, values[source] - values[None], color, style, source)
        panels[0, column].set_title(capability, fontsize=10)
        panels[1, column].axhline(0, color="black", linewidth=1.6)
        panels[1, column].set_xlabel(unit, fontsize=9)
    panels[0, 0].set_ylabel("NLL (nats per token)", fontsize=9)
    panels[1, 0].set_ylabel("minus NLL with all sources", fontsize=9)
    for panel in panels.flatten():
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    labels = [label if label == "all sources" else f"without {label}" for label in labels]
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return figure


def _points(result: LeaveOneOutResult, capability: str) -> np.ndarray:
    """(points,) NLL from the second point on."""
    return np.array([nll for _, nll in result.curves[capability][1:]])


def _tokens(result: LeaveOneOutResult, capability: str) -> tuple[np.ndarray, str]:
    tokens = np.array([step for step, _ in result.curves[capability][1:]], float) * result.tokens_per_step
    sizes = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, "single"))
    size, name = next(pair for pair in sizes if tokens[-1] >= pair[0])
    return tokens / size, f"training tokens ({name})"


def _look(number: int, source: str | None) -> tuple[str, str]:
    if source is None:
        return "black", "-"
    turn, color = divmod(number - 1, len(COLORS))
    return COLORS[color], LINE_STYLES[turn % len(LINE_STYLES)]


def _draw(panel: Axes, tokens: np.ndarray, values: np.ndarray, color: str, style: str, label: str) -> None:
    """values: (seeds, points)."""
    width = 1.8 if label == "all sources" else 1.2
    marker = "o" if values.shape[1] < 15 else None
    panel.plot(
        tokens, values.mean(0), color=color, linestyle=style, linewidth=width, marker=marker, markersize=2.5,
        label=label,
    )  # fmt: skip
    if len(values) > 1:
        panel.fill_between(tokens, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def cell_text(effect: LeaveOneOutEffect, row: int, column: int) -> str:
    """+0.123 ±0.045*"""
    delta = effect.delta[row, column].item()
    half = (effect.high - effect.low)[row, column].item() / 2
    text = f"{delta:+.3f}" if math.isnan(half) else f"{delta:+.3f} ±{half:.3f}"
    return text + ("*" if effect.beyond_noise[row, column] else "")


def effect_table(effect: LeaveOneOutEffect) -> Table:
    """One line a source, those that help most on average first; mean over seeds and half the width of the interval."""
    note = ONE_SEED if len(effect.seeds) == 1 else f"mean of {len(effect.seeds)} seeds ± half the interval; "
    caption = note if len(effect.seeds) == 1 else note + BEYOND_NOISE
    title = "What is lost without a source (equation 1), nats per token; positive: it helps"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("left out", no_wrap=True)
    for name in (*effect.capabilities, "mean"):
        table.add_column(name, justify="right")
    means = effect.delta.mean(1)
    for row in means.argsort(descending=True, stable=True).tolist():
        cells = [cell_text(effect, row, column) for column in range(len(effect.capabilities))]
        table.add_row(effect.sources[row], *cells, f"{means[row]:+.3f}")
    return table


def write_results(folder: Path, results: Sequence[LeaveOneOutResult], settings: Mapping[str, Any]) -> None:
    """leave_one_out.parquet and .yaml, heat_map.png and curves.png.

    Each is whole or absent, also where several processes write it.

    Args:
        settings: what was trained with what, as plain values; noted in the YAML file.
    """
    effect = effects(results)
    table = pyarrow.table(_columns(effect))
    write_whole(folder / "leave_one_out.parquet", lambda path: pyarrow.parquet.write_table(table, path))
    document = {
        "effects": {source: _figures(effect, row) for row, source in enumerate(effect.sources)},
        "seeds": effect.seeds,
        "rows_read": {result.run.name: result.rows for result in results},
        "settings": dict(settings),
    }
    text = yaml.safe_dump(document, sort_keys=False)
    write_whole(folder / "leave_one_out.yaml", lambda path: path.write_text(text))
    for name, plot, data in (("heat_map.png", plot_heat_map, effect), ("curves.png", plot_curves, results)):
        # A picture's format follows from the end of its name, which an unfinished file's does not have.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            plot(data, Path(scratch) / name)
            os.replace(Path(scratch) / name, folder / name)


def _columns(effect: LeaveOneOutEffect) -> dict[str, list]:
    """Of the table with a line for each seed, source and capability."""
    cells = list(itertools.product(*map(range, effect.per_seed.shape)))
    return {
        "source": [effect.sources[source] for _, source, _ in cells],
        "capability": [effect.capabilities[capability] for *_, capability in cells],
        "seed": [effect.seeds[seed] for seed, *_ in cells],
        "nll_all": [effect.nll_all[seed, capability].item() for seed, _, capability in cells],
        "nll_without": [effect.nll_without[cell].item() for cell in cells],
        "delta": [effect.per_seed[cell].item() for cell in cells],
    }


def _figures(effect: LeaveOneOutEffect, row: int) -> dict[str, dict[str, float]]:
    """capability -> delta, low and high of a source."""
    return {
        capability: {name: round(getattr(effect, name)[row, column].item(), 6) for name in ("delta", "low", "high")}
        for column, capability in enumerate(effect.capabilities)
    }
