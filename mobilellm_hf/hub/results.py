"""What an evaluation found, as a card shows it: read from `results.json`, beside the paper's rows.

check_identity(path, model, None)           # a ValueError if it is of other weights
suite_facts(suite, read_results(path), parameters)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mobilellm_hf.curation.scoring import model_identity
from mobilellm_hf.evaluation.paper_tables import rows_near
from mobilellm_hf.evaluation.results import TaskResult, column_value, marks_of
from mobilellm_hf.evaluation.suites import TASKS, Suite
from mobilellm_hf.hub.files import read_json
from mobilellm_hf.hub.programs import Program

HASHED = re.compile(r" [0-9a-f]{32}$")  # of `model_identity`, where it names a folder's weights
PROGRAM_HASH = re.compile(r"[0-9a-f]{64}")  # of a program that was evaluated


@dataclass(frozen=True)
class SuiteFacts:
    """A table of the paper: its columns, what was measured here, and rows as the paper prints them, in per cent."""

    table: str
    columns: tuple[str, ...]
    measured: tuple[str, ...]
    printed: dict[str, tuple[str, ...]]


def check_identity(path: Path, model: Path, program: Program | None) -> None:
    """Raises a ValueError unless results are of this model or, if that is released in its place, of the program."""
    identity = read_json(path)["model"]["identity"]
    if program is not None:
        if identity != program.file.digests[0]:
            raise ValueError(f"{path} is not of the program {program.path}: evaluate {program.folder}")
    elif PROGRAM_HASH.fullmatch(identity):
        raise ValueError(f"{path} is of an exported program and not of {model}: evaluate the model")
    elif (found := HASHED.search(identity)) and not model_identity(model).endswith(found[0]):
        raise ValueError(f"{path} is of other weights than those of {model}: evaluate these")


def suite_facts(suite: Suite, results: Mapping[str, TaskResult], parameters: int) -> SuiteFacts:
    """A column is filled if all of its tasks were run."""
    cells = []
    for names in suite.columns.values():
        whole = all(name in results for name in names)
        cells.append(str(column_value([results[name] for name in names])) if whole else "")
    rows = {
        row.name: tuple("" if value is None else f"{value:.1f}" for value in row.values.values())
        for row in rows_near(suite.name, parameters)
    }
    return SuiteFacts(suite.table, tuple(suite.columns), tuple(cells), rows)


def cuts_of(result: TaskResult) -> list[str]:
    """What stands behind the marks of a result, with counts; empty for a result that has none."""
    if not marks_of([result]):
        return []
    details, completions = result.details, result.documents * result.samples
    wanted = getattr(TASKS[result.task], "samples", 1)
    found = [f"{result.documents:,} documents were asked, not all"] if "limit" in details else []
    if result.samples < wanted:
        found.append(f"{result.samples} samples of each document and not {wanted}")
    if "own_max_new_tokens" in details:
        found.append(f"completions end at {details['own_max_new_tokens']:,} tokens, at the latest")
    if "share_cut_off" in details:
        found.append(f"{round(details['share_cut_off'] * completions):,} of {completions:,} completions were cut off")
    if beyond := details.get("prompts_beyond_context"):
        found.append(f"{beyond:,} of {result.documents:,} prompts do not fit the context and were not asked")
    if truncated := details.get("truncated_prompts"):
        found.append(f"of {truncated:,} prompts the model saw the end only")
    return found


def read_results(path: Path) -> dict[str, TaskResult]:
    """Task -> result of an evaluation, as evaluation/runner.py writes them; without the tasks that failed."""
    tasks = read_json(path)["tasks"]
    return {name: TaskResult.from_json(entry) for name, entry in tasks.items() if "error" not in entry}
