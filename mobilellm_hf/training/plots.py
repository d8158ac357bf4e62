"""Pictures of training runs, from their logs."""

from collections.abc import Mapping
from pathlib import Path

# run name -> probe name -> [(step, NLL), ...]
ProbeCurves = Mapping[str, Mapping[str, list[tuple[int, float]]]]


def plot_probe_nll(runs: ProbeCurves, path: str | Path, tokens_per_step: int) -> None:
    """One panel a probe, one line a run: held-out NLL (nats per token) over training tokens, from the second point on.

    The point before the first step is left out: it is the same for all runs and would flatten the rest.
    """
    from matplotlib.figure import Figure

    probes = list(next(iter(runs.values())))
    figure = Figure(figsize=(3.4 * len(probes), 3.2), layout="constrained")
    panels = figure.subplots(1, len(probes), squeeze=False)
    for panel, probe in zip(panels[0], probes, strict=True):
        for (name, curves), color in zip(runs.items(), ("#4878a8", "#d65f5f", "#6acc64", "#956cb4", "#8c613c")):
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
