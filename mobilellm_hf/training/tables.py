"""Tables of what a run read and how two runs compare, for the terminal."""

from collections.abc import Mapping

from rich.table import Table

from mobilellm_hf.data.mixture import SourceDraw


def draws_table(draws: Mapping[str, Mapping[str, SourceDraw]]) -> Table:
    """Per source: its share of each mix's rows, and how often it was read for it. draws: mix -> source -> draw."""
    table = Table(title="What was read: share of the rows, and how often the source was read")
    table.add_column("source", no_wrap=True)
    for name in draws:
        table.add_column(name, justify="right")
    total = {name: sum(draw.rows for draw in report.values()) for name, report in draws.items()}
    for source in next(iter(draws.values())):
        cells = [(report[source].rows / total[name], report[source].epochs) for name, report in draws.items()]
        table.add_row(source, *(f"{share:.1%}  {epochs:.2f}" for share, epochs in cells))
    return table


def probe_nll_table(final: Mapping[str, Mapping[str, float]]) -> Table:
    """Two runs' held-out NLL on each probe and on average, and which is lower. final: run -> probe -> NLL."""
    (left_name, left), (right_name, right) = final.items()
    table = Table(title="Held-out NLL, nats per token (lower is better)")
    table.add_column("test files")
    for column in (left_name, right_name, "difference", "better"):
        table.add_column(column, justify="right")
    mean = (sum(left.values()) / len(left), sum(right.values()) / len(right))
    for label, ours, theirs in [*((probe, left[probe], right[probe]) for probe in left), ("mean", *mean)]:
        better = left_name if ours < theirs else right_name if theirs < ours else "equal"
        table.add_row(label, f"{ours:.4f}", f"{theirs:.4f}", f"{ours - theirs:+.4f}", better)
    return table


def runs_table(title: str, final: Mapping[str, Mapping[str, float]]) -> Table:
    """NLL of several runs on each probe and on average, the lowest of a line in bold. final: run -> probe -> NLL."""
    table = Table(title=f"{title}, nats per token (lower is better)")
    table.add_column("test files")
    for name in final:
        table.add_column(name, justify="right")
    lines = {probe: [values[probe] for values in final.values()] for probe in next(iter(final.values()))}
    lines["mean"] = [sum(values.values()) / len(values) for values in final.values()]
    for label, values in lines.items():
        cells = [f"[bold]{value:.4f}[/bold]" if value == min(values) else f"{value:.4f}" for value in values]
        table.add_row(label, *cells)
    return table
