"""Pictures of influence: which source helps which capability, and the mixture that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mobilellm_hf.influence.uncertainty import UncertainWeights


def plot_influence(
    scores: torch.Tensor,
    sources: Sequence[str],
    capabilities: Sequence[str],
    weights: Mapping[str, float],
    path: str | Path,
    uncertain: UncertainWeights | None = None,
) -> None:
    """A heat map of source x capability beside bars of the mixture weights, the uniform weight marked.

    Args:
        scores: (sources, capabilities) influence, positive = helpful. Each column is shown as a share of its largest
            magnitude, since a capability's scale is that of its gradient and means nothing across columns.
        weights: source -> share of the training tokens.
        uncertain: adds what equation (5) says with its 95% interval, and the proportional share.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    relative = (scores / scores.abs().amax(0)).tolist()
    height = 1.6 + 0.34 * len(sources)
    figure = Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(relative, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for row, values in enumerate(relative):
        for column, value in enumerate(values):
            color = "white" if abs(value) > 0.6 else "black"
            left.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
    left.set_xticks(range(len(capabilities)), capabilities)
    left.set_yticks(range(len(sources)), sources)
    left.set_title("Influence on each capability\n(share of the column's largest)", fontsize=10)
    shares = [weights.get(source, 0.0) for source in sources]
    bars = right.barh(range(len(sources)), shares, color="#4878a8")
    largest = max(shares)
    if uncertain is None:
        right.bar_label(bars, [f"{share:.1%}" for share in shares], padding=3, fontsize=9)
    else:
        largest = max(largest, _add_intervals(right, sources, uncertain))
    right.axvline(1 / len(sources), color="gray", linestyle="--", label="uniform")
    right.set_yticks(range(len(sources)), [])
    right.set_ylim(len(sources) - 0.5, -0.5)
    right.set_xlim(0, largest * 1.15)
    right.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    right.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    right.set_title("Share of the training tokens", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _add_intervals(panel: Axes, sources: Sequence[str], uncertain: UncertainWeights) -> float:
    """Error bars of the unshrunk weights, and ticks at the proportional ones; returns the largest end."""
    ends = np.array([uncertain.intervals[source] for source in sources])
    middle = ends.mean(1) if uncertain.unshrunk is None else np.array([uncertain.unshrunk[name] for name in sources])
    places = np.arange(len(sources))
    spread = np.stack([middle - ends[:, 0], ends[:, 1] - middle]).clip(min=0)
    panel.errorbar(
        middle, places, xerr=spread, fmt="o", color="black", markersize=4, capsize=3, linewidth=1,
        label="by influence (equation 5), 95% interval",
    )  # fmt: skip
    shares = [uncertain.proportional[name] for name in sources]
    panel.plot(shares, places, "|", color="#d65f5f", markersize=16, markeredgewidth=2, label="proportional to tokens")
    return max(ends.max(), max(shares))


def plot_histograms(
    scores: Mapping[str, torch.Tensor], capabilities: Sequence[str], path: str | Path, format: str | None = None
) -> None:
    """Histograms of the samples' influence, a panel a capability and a curve a checkpoint (Figure 5 of the paper).

    As a model learns, influence contracts towards zero; what is left of zero is what equation (6) rejects.

    Args:
        scores: label of a checkpoint, in order of training -> (samples, capabilities).
        format: such as "png"; by default the path's extension.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(capabilities), 3.4), layout="constrained")
    panels = figure.subplots(1, len(capabilities), squeeze=False)[0]
    colors = colormaps["viridis"].resampled(max(2, len(scores)))
    for column, (panel, capability) in enumerate(zip(panels, capabilities, strict=True)):
        values = {label: part[:, column][part[:, column].isfinite()].numpy() for label, part in scores.items()}
        values = {label: part for label, part in values.items() if len(part)}
        if not values:
            continue
        # Without the outermost percent, which would make a line of all the rest.
        low, high = np.quantile(np.concatenate(list(values.values())), [0.005, 0.995])
        for number, (label, part) in enumerate(values.items()):
            rejected = f" ({(part <= 0).mean():.0%} not positive)"
            panel.hist(
                part, bins=60, range=(min(low, 0.0), max(high, 0.0)), histtype="step", density=True,
                color=colors(number), label=label + rejected,
            )  # fmt: skip
        panel.axvline(0, color="gray", linestyle="--", linewidth=1)
        panel.set_title(capability, fontsize=10)
        panel.set_xlabel("influence of a sample", fontsize=9)
        panel.set_yticks([])
        panel.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130, format=format)
