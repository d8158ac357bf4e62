"""Every data set the paper trained on (Tables 5, 6 and 7), as arguments of `load_corpus` and as mixtures.

    load_corpus(**entry("open_web_math"))                       a source by its name in the catalog
    load_corpus(**entry("cosmopedia", subset="stanford"))       one subset of several; `entries` gives all
    load_corpus(**entry("arxiv", name="copies/arxiv"))          a local copy
    mixture("pretraining", 2)                                   shares of tokens that sum to 1
    SOURCES["gsm8k"].text_of(row)                               a question set's row as text
    python -m mobilellm_hf.data.catalog                         all of it as tables, with licences

The data themselves, and where each was seen, are in `catalog_sources.py`.
"""

from __future__ import annotations

import argparse
import difflib
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from mobilellm_hf.data.catalog_sources import (
    BENCHMARK,
    BENCHMARK_ROWS,
    MID,
    PHASES,
    POST,
    PRE,
    SOURCES,
    TABLE_6,
    CatalogSource,
)
from mobilellm_hf.data.local_files import CorpusError

__all__ = ["SOURCES", "CatalogSource", "check_printed", "describe", "entries", "entry", "find", "mixture", "printed"]

STREAMED_ROWS = 500_000
# Shares are multiples of 1 / SHARE_UNITS, so that their sum is 1 exactly, in whatever order they are added.
SHARE_UNITS = 2**40
TITLES = {
    PRE: "Pre-training (Table 5), percent of the tokens of phases 1 and 2",
    MID: "Mid-training (Table 6), percent of the tokens of phases 1 and 2",
    POST: "Post-training (Table 7), general and reasoning",
}
WIDTH = 119


def find(name: str) -> CatalogSource:
    """The source of this name.

    Raises:
        CorpusError: there is none; the message names those that are spelt much the same.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {', '.join(SOURCES)}."
        raise CorpusError(f"The catalog has no source {name!r}. {hint}")
    return SOURCES[name]


def entry(name: str, /, **given: Any) -> dict[str, Any]:
    """The keyword arguments of `load_corpus` for a source of the catalog.

    Sources of half a million rows or more are streamed.

    Args:
        given: arguments that replace the catalog's, such as `subset`, or as `name` a local copy of the files.

    Raises:
        CorpusError: there is no such source, it has several subsets and none is given, it is chat, or its files must
            be downloaded first. The message says what to do instead.
    """
    spec = find(name)
    if spec.is_chat:
        raise CorpusError(f"{name} is chat, not text. Fine-tune on {' and '.join(spec.columns)} of {spec.hub_id}.")
    arguments: dict[str, Any] = {"name": spec.hub_id, "source": name, "domain": spec.domain}
    if "name" not in given:
        if spec.obstacle:
            raise CorpusError(f"{name} cannot be loaded by its name: {spec.obstacle}.")
        if len(spec.subsets) > 1 and "subset" not in given:
            raise CorpusError(f"{name} has several subsets. Give one of {', '.join(spec.subsets)}, or call entries.")
        streaming = spec.rows >= STREAMED_ROWS
        arguments |= {"subset": spec.subsets[0], "split": spec.split, "streaming": streaming}
        if spec.data_files:
            arguments["data_files"] = list(spec.data_files)
    if spec.text_of:
        arguments["text_of"] = spec.text_of
    elif spec.columns:
        arguments["text_column"] = spec.columns[0]
    elif "text_column" not in given:
        raise CorpusError(f"{name}: give text_column. Not checked is {spec.unseen}.")
    if spec.is_benchmark:
        # A trivia question and its answer fall below the usual minimum.
        arguments["min_characters"] = 1
    arguments |= given
    return arguments


def entries(name: str, /, **given: Any) -> list[dict[str, Any]]:
    """`entry` for each of the subsets that make up a source. The rows of all carry the same `source`.

    Args:
        given: as for `entry`. A local copy (`name`) and a `subset` are one entry.
    """
    subsets = find(name).subsets
    if "name" in given or "subset" in given or subsets == (None,):
        return [entry(name, **given)]
    return [entry(name, subset=subset, **given) for subset in subsets]


def printed(stage: str, phase: int | str) -> dict[str, float]:
    """The percentages of a phase as Tables 5 and 6 print them, "benchmark" being one line; of Table 7, nothing.

    Args:
        stage: "pretraining", "midtraining" or "posttraining".
        phase: 1 or 2; of post-training, "general" or "reasoning".
    """
    column = _column(stage, phase)
    if stage == POST:
        return {}
    lines = {name: spec.mix[stage][column] for name, spec in SOURCES.items() if stage in spec.mix}
    if stage == MID:
        lines = {name: percent for name, percent in lines.items() if name not in BENCHMARK_ROWS}
        lines[BENCHMARK] = TABLE_6[BENCHMARK][1 + column]
    return {name: percent for name, percent in lines.items() if percent is not None}


def check_printed(stage: str, phase: int | str) -> float:
    """The sum in percent of what `printed` returns, which is 0 for Table 7.

    The columns of Tables 5 and 6 sum to 100.01, 99.99, 99.99 and 99.98: n numbers of two decimals can be off by n/200.

    Raises:
        CorpusError: rounding cannot explain the sum, so a number was mistyped.
    """
    percentages = printed(stage, phase).values()
    total = math.fsum(percentages)
    if percentages and abs(total - 100) > len(percentages) / 200 + 1e-9:
        raise CorpusError(f"The shares of {stage}, phase {phase}, sum to {total:.2f}%, which no rounding explains.")
    return total


def mixture(stage: str, phase: int | str) -> dict[str, float]:
    """Shares of tokens by source, renormalised so that they sum to 1 exactly; of Table 7, shares of examples.

    The 0.97% of the benchmark sets are divided in proportion to their rows. The paper does not say how they were. It
    counts 0.01 million rows for all eight, whose training sets have 0.27 million: they were sub-sampled in some way.
    Table 7 prints no shares, for its sets are used whole: theirs are those of their rows.

    Args:
        stage, phase: as for `printed`.
    """
    column = _column(stage, phase)
    weights = printed(stage, phase)
    if stage == POST:
        weights = {name: spec.rows for name, spec in SOURCES.items() if spec.is_chat and spec.mix[POST][column]}
    whole = weights.pop(BENCHMARK, 0)
    if whole:
        all_rows = sum(BENCHMARK_ROWS.values())
        weights |= {name: whole * rows / all_rows for name, rows in BENCHMARK_ROWS.items()}
    total = math.fsum(weights.values())
    units = {name: round(weight / total * SHARE_UNITS) for name, weight in weights.items()}
    units[max(units, key=units.__getitem__)] += SHARE_UNITS - sum(units.values())
    return {name: count / SHARE_UNITS for name, count in units.items()}


def describe(stage: str) -> str:
    """The table of a stage with the data sets, their licences and, below it, what to know of each."""
    from rich.console import Console
    from rich.table import Table

    # No box, and no percent signs: the longest id of a data set is to stand on one line of 119 characters.
    table = Table("source", "data set", "domain", box=None, pad_edge=False, collapse_padding=True)
    numbers = ["rows", *(["tokens"] if stage == PRE else []), *(f"{phase}" for phase in PHASES[stage])]
    for header in numbers:
        table.add_column(header, justify="right")
    table.add_column("licence")
    shown = {name: spec for name, spec in SOURCES.items() if stage in spec.mix}
    for name, spec in shown.items():
        tokens = [f"{spec.tokens:g}B"] if stage == PRE else []
        shares = [_percent(spec, stage, percent) for percent in spec.mix[stage]]
        table.add_row(name, spec.hub_id, spec.domain, f"{spec.rows:,}", *tokens, *shares, spec.license or "none named")
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(table)
    lines = [TITLES[stage], *(line.rstrip() for line in console.file.getvalue().splitlines()), ""]
    if stage == MID:
        lines.append(f"* The benchmark sets share {TABLE_6[BENCHMARK][2]}%, divided here by their rows.")
    for name, spec in shown.items():
        obstacle = f"Not loaded by name: {spec.obstacle}." if spec.obstacle else ""
        unseen = f"Not checked: {spec.unseen}." if spec.unseen else ""
        if text := " ".join(part for part in (spec.note, obstacle, unseen) if part):
            lines += textwrap.wrap(f"{name}: {text}", WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def _column(stage: str, phase: int | str) -> int:
    if phase not in PHASES.get(stage, ()):
        known = "; ".join(f"{name}: {', '.join(map(str, phases))}" for name, phases in PHASES.items())
        raise CorpusError(f"There is no phase {phase!r} of {stage!r}. The stages and their phases are {known}.")
    return PHASES[stage].index(phase)


def _percent(spec: CatalogSource, stage: str, percent: float | None) -> str:
    if percent is None:
        return "-"
    if stage == POST:
        return "all"
    if spec.is_benchmark:
        return f"{percent * spec.rows / sum(BENCHMARK_ROWS.values()):.3f}*"
    return f"{percent:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mobilellm_hf.data.catalog",
        description="Prints the data sets of Tables 5, 6 and 7 of the MobileLLM-R1 paper, with their licences.",
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"only these of: {', '.join(PHASES)}")
    options = parser.parse_args(arguments)
    if unknown := [stage for stage in options.stages if stage not in PHASES]:
        parser.error(f"there is no stage {unknown[0]!r}; the stages are {', '.join(PHASES)}")
    print("\n\n".join(describe(stage) for stage in options.stages or PHASES))


if __name__ == "__main__":
    main()
