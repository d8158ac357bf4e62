"""What evidence.py found of a claim, as tables on the terminal and as a page of Markdown."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mobilellm_hf.audit.statistics import paired_difference

REPLICATES, PARTLY, UNDECIDED, FAILS = "replicates", "replicates in part", "undecided", "does not replicate"


@dataclass(frozen=True)
class Figures:
    """A table: what its columns are called, and its lines."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Finding:
    """Of one claim of the paper.

    Attributes:
        claim: what the paper says, with the figure or table.
        design: what was trained and measured.
        outcome: REPLICATES; PARTLY, of a claim that says several things; UNDECIDED, where the intervals leave it
            open; or FAILS, where they say otherwise.
        said: in a sentence or two, with figures.
        pictures: files, to be shown.
    """

    name: str
    claim: str
    design: str
    outcome: str
    said: str
    figures: Sequence[Figures] = ()
    pictures: Sequence[Path] = ()


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval by Student's t."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def plain(self, digits: int = 3) -> str:
        """Of a figure that is no difference."""
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def negative(self) -> "Interval":
        return Interval(-self.mean, -self.high, -self.low)

    def above(self) -> bool:
        return self.low > 0

    def below(self) -> bool:
        return self.high < 0


def interval(values: Sequence[float], others: Sequence[float] | None = None) -> Interval:
    """Of the values of each seed, or of their differences from others of the same seeds."""
    found = paired_difference(values, [0.0] * len(values) if others is None else others)
    return Interval(found.mean, found.low, found.high)


def judged(*parts: Interval) -> str:
    """The outcome of a claim that says of each part that it is above 0; in part if more are than are below."""
    above, below = (sum(test(part) for part in parts) for test in (Interval.above, Interval.below))
    if above > below:
        return REPLICATES if above == len(parts) else PARTLY
    return FAILS if below else UNDECIDED


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of figures without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def show(finding: Finding, console: Console) -> None:
    console.print(f"\n{finding.name}: {finding.outcome}", style="bold", soft_wrap=True)
    console.print(finding.said, soft_wrap=True, highlight=False)
    for figures in finding.figures:
        table = Table(*figures.columns, title=figures.title)
        for line in figures.lines:
            table.add_row(*line)
        console.print(table)


def page(findings: Sequence[Finding], head: str, folder: Path) -> str:
    """The page, whose pictures lie in `folder` beside it."""
    parts = [head, "", "| claim | outcome |", "|---|---|"]
    parts += [f"| {finding.name} | {finding.outcome} |" for finding in findings]
    for finding in findings:
        parts += ["", f"## {finding.name}: {finding.outcome}"]
        said = {"The paper: ": finding.claim, "Here: ": finding.design, "": finding.said}
        parts += [
            line
            for start, text in said.items()
            if text
            for line in ("", textwrap.fill(start + text, 120, break_on_hyphens=False))
        ]
        for figures in finding.figures:
            parts += ["", f"{figures.title}:", "", "| " + " | ".join(figures.columns) + " |"]
            parts += ["|---" * len(figures.columns) + "|"]
            parts += ["| " + " | ".join(line) + " |" for line in figures.lines]
        for picture in finding.pictures:
            (folder / picture.name).write_bytes(picture.read_bytes())
            parts += ["", f"![{finding.name}]({picture.name})"]
    return "\n".join(parts) + "\n"
