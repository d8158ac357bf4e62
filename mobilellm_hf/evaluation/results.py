"""What a task came to, a value with its standard error, and what several come to together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mobilellm_hf.evaluation.suites import TASKS
from mobilellm_hf.training.pass_rate import Z_95, wilson_interval

PARTIAL, CUT, ALL_CUT = "*", "†", "‡"
MEANING = {
    PARTIAL: "not the whole benchmark: fewer or other documents, fewer samples or completions cut elsewhere",
    CUT: "some prompts do not fit the context",
    ALL_CUT: "no prompt fits the context, so there is no value",
}
NO_VALUE = "–"


@dataclass(frozen=True)
class TaskResult:
    """The value of one metric on one task.

    Attributes:
        task: as the suite calls it.
        metric: what `value` is a mean of, such as `exact_match` or `pass@1`.
        value: a share, from 0 to 1.
        stderr: standard error of `value` over documents; None where it is not defined.
        documents: how many were asked.
        samples: completions of each document; 1 for greedy decoding and for likelihoods.
        seconds: wall time that all runs together took for it, but for what a killed one could not say.
        source: the data, `HUB_ID@REVISION` or a file.
        details: what else there is to know: other metrics, settings, `limit` where not all documents were asked,
            `own_max_new_tokens` where completions were cut elsewhere than the task says, `prompts` of the
            tasks of lm-eval, and `truncated_prompts` where some of them do not fit the context.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    samples: int
    seconds: float
    source: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskResult:
        return cls(**values)


def shortfalls(result: TaskResult) -> list[str]:
    """What makes it another value than the benchmark's, such as `3 documents of 2,376`; of a whole one nothing.

    A local copy is known by its number of documents alone.
    """
    task, details = TASKS[result.task], result.details
    samples, found = getattr(task, "samples", 1), []
    if result.documents != task.data.documents:
        found.append(f"{result.documents:,} documents of {_count(task.data.documents)}")
    elif "limit" in details:
        found.append(f"the first {result.documents:,} documents of more than the benchmark has")
    if result.samples < samples:
        found.append(f"{result.samples} samples of {samples}")
    if "own_max_new_tokens" in details:
        found.append(f"completions of {details['own_max_new_tokens']:,} tokens at most")
    return found


def is_whole(result: TaskResult) -> bool:
    """Whether it is the benchmark's value: of all documents, as many samples, and completions of its length."""
    return not shortfalls(result)


def documents_of(result: TaskResult) -> str:
    """How many were asked, of how many, and how often: `3 of 2,376`, `30 x 64`."""
    whole = TASKS[result.task].data.documents
    asked = f"{result.documents:,}" + (f" of {_count(whole)}" if result.documents != whole else "")
    return asked + (f" x {result.samples}" if result.samples > 1 else "")


def _count(documents: int | None) -> str:
    return "an unknown number" if documents is None else f"{documents:,}"


def prompts_cut(result: TaskResult) -> int:
    """Prompts that the model saw the end of, or that were not asked, since they do not fit its context."""
    return sum(result.details.get(name, 0) for name in ("truncated_prompts", "prompts_beyond_context"))


def is_measured(result: TaskResult) -> bool:
    """Whether the model saw any prompt as a whole. Where it saw ends of prompts only, its answers say nothing."""
    return prompts_cut(result) < result.details.get("prompts", math.inf)


def marks_of(results: Iterable[TaskResult]) -> str:
    """What readers of a value must know, of the keys of `MEANING`."""
    results = list(results)
    partial = not all(is_whole(result) for result in results)
    cut = any(prompts_cut(result) and is_measured(result) for result in results)
    return PARTIAL * partial + CUT * cut + ALL_CUT * (not all(map(is_measured, results)))


def legend(marks: str) -> str:
    """What the marks mean, in the order of `MEANING`."""
    return "; ".join(f"{mark} {meaning}" for mark, meaning in MEANING.items() if mark in marks)


@dataclass(frozen=True)
class ColumnValue:
    """The mean of a column's tasks, with a 95% interval and the marks of its tasks; None of what was not measured."""

    value: float | None
    low: float | None
    high: float | None
    marks: str

    def __str__(self) -> str:
        """In per cent, as the paper's tables have it."""
        if self.value is None:
            return f"{NO_VALUE}{self.marks}"
        spread = "" if self.low is None else f"\n{100 * self.low:.1f}-{100 * self.high:.1f}"
        return f"{100 * self.value:.1f}{self.marks}{spread}"


def column_value(results: Sequence[TaskResult]) -> ColumnValue:
    """The mean over tasks, each with the same weight.

    The interval of a single task is Wilson's over its documents, which for several samples of each is rather too wide
    than too narrow. That of several is normal, with the standard errors of the tasks, which are independent; None
    where one is not defined, or 0 since all documents of a task came out alike.
    """
    marks = marks_of(results)
    if not all(map(is_measured, results)):
        return ColumnValue(None, None, None, marks)
    value = sum(result.value for result in results) / len(results)
    if len(results) == 1:
        low, high = wilson_interval(value * results[0].documents, results[0].documents)
        return ColumnValue(value, min(low, value), max(high, value), marks)
    errors = [result.stderr for result in results]
    if not all(errors):
        return ColumnValue(value, None, None, marks)
    half = Z_95 * math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return ColumnValue(value, max(0.0, value - half), min(1.0, value + half), marks)
