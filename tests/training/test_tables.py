"""The tables say what they are given, and who is better."""

import io

from rich.console import Console

from mobilellm_hf.data.mixture import SourceDraw
from mobilellm_hf.training.tables import draws_table, probe_nll_table


def lines(table) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    rows = [line for line in console.file.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in rows]


def test_shares_and_epochs_of_every_mix():
    draws = {"a": {"x": SourceDraw(0.7, 30, 30 * 8, 1.5), "y": SourceDraw(0.3, 10, 10 * 8, 0.25)}}
    draws["b"] = {"x": SourceDraw(0.5, 20, 20 * 8, 1.0), "y": SourceDraw(0.5, 20, 20 * 8, 0.5)}
    assert lines(draws_table(draws)) == [
        ["x", "75.0%  1.50", "50.0%  1.00"],
        ["y", "25.0%  0.25", "50.0%  0.50"],
    ]


def test_the_lower_nll_is_the_better_one():
    table = probe_nll_table({"ours": {"code": 2.0, "math": 3.0}, "theirs": {"code": 1.5, "math": 3.5}})
    assert lines(table) == [
        ["code", "2.0000", "1.5000", "+0.5000", "theirs"],
        ["math", "3.0000", "3.5000", "-0.5000", "ours"],
        ["mean", "2.5000", "2.5000", "+0.0000", "equal"],
    ]
