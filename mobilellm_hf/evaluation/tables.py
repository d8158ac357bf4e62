"""Tables for the terminal: what there is to run, what a run would ask, what it found, and the paper's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from mobilellm_hf.evaluation.documents import EXTENSIONS, file_names
from mobilellm_hf.evaluation.paper_tables import rows_near
from mobilellm_hf.evaluation.plan import Planned
from mobilellm_hf.evaluation.results import (
    NO_VALUE,
    TaskResult,
    column_value,
    documents_of,
    is_measured,
    legend,
    marks_of,
)
from mobilellm_hf.evaluation.suites import LmEvalTask, Suite, Task, TaskData


def how(task: Task, result: TaskResult | None = None, samples: int | None = None) -> str:
    """How a task is asked, and what of it was special in the run that `result` is of. samples: instead of its own."""
    if isinstance(task, LmEvalTask):
        chat = result is not None and "chat_template" in result.details
        return f"{task.shots}-shot, {task.metric}" + (", as a conversation" if chat else "")
    samples = samples or (task.samples if result is None else result.samples)
    return f"n={samples}, T={task.temperature:g}, top_p={task.top_p:g}"


def suites_table(suite: Suite) -> Table:
    """The tasks of a suite, their data sets and what local copies are called. Names are whole at any width."""
    caption = f"a local copy may also end in {' or '.join(EXTENSIONS[1:])}, and what is asked go without its split"
    table = Table(title=f"Suite {suite.name}, {suite.table}", caption=caption, show_lines=True)
    table.add_column("task\n(column)", no_wrap=True)
    table.add_column("how", overflow="fold")
    table.add_column("data set@revision\nfiles in data_dir", overflow="fold")
    for column, names in suite.columns.items():
        for task in (suite.tasks[name] for name in names):
            hub = f"{task.data.hub_id}@{(task.data.revision or 'none pinned')[:12]}"
            table.add_row(f"{task.name}\n({column})", how(task), f"{hub}\n{_local_names(task.data)}")
    return table


def _local_names(data: TaskData) -> str:
    """`mmlu_test.jsonl and mmlu_dev.jsonl`, with `or` between names for the same documents."""
    splits = [data.split] + ([data.example_split] if data.example_split else [])
    names = [file_names(data, split)[: len(EXTENSIONS) * len(data.files) : len(EXTENSIONS)] for split in splits]
    return " and ".join(" or ".join(alike) for alike in names)


def plan_table(plan: Sequence[Planned], limit: int | None, samples: int | None) -> Table:
    table = Table(title="What would be run")
    table.add_column("task", no_wrap=True)
    table.add_column("how", overflow="fold")
    table.add_column("from", overflow="fold")
    for column in ("documents", "requests"):
        table.add_column(column, justify="right", no_wrap=True)
    for planned in plan:
        name, asked = planned.task.name, how(planned.task, samples=samples)
        if planned.problem:
            table.add_row(name, asked, "not run", "", "")
            continue
        counts = (planned.documents(limit), planned.requests(limit, samples))
        table.add_row(name, asked, planned.source.label, *(f"{count:,}" for count in counts))
    return table


def tasks_table(results: Mapping[str, TaskResult]) -> Table:
    """Values and standard errors. An error of 0 is not shown: all documents came out alike, which tells of none."""
    table = Table(title="Tasks, per cent", caption=legend(marks_of(results.values())) or None)
    table.add_column("task", no_wrap=True)
    for column in ("metric", "value", "std. error", "documents", "seconds"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, result in results.items():
        measured = is_measured(result)
        value = f"{100 * result.value:.2f}" if measured else NO_VALUE
        error = f"{100 * result.stderr:.2f}" if measured and result.stderr else NO_VALUE
        asked = documents_of(result) + marks_of([result])
        table.add_row(name, result.metric, value, error, asked, f"{result.seconds:.0f}")
    return table


def suite_table(suite: Suite, name: str, parameters: int, results: Mapping[str, TaskResult]) -> Table:
    """Our row, with 95% intervals, above the paper's rows of models of that size. A column needs all of its tasks."""
    marks = marks_of(results[task] for task in suite.tasks if task in results)
    caption = ["below ours its 95% interval", *filter(None, [legend(marks)])]
    table = Table(title=f"{suite.table}, per cent", caption="; ".join(caption))
    table.add_column("model", overflow="fold")
    for column in suite.columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(name, *our_cells(suite, results), style="bold")
    for row in rows_near(suite.name, parameters):
        table.add_row(row.name, *("–" if value is None else f"{value:.1f}" for value in row.values.values()))
    return table


def our_cells(suite: Suite, results: Mapping[str, TaskResult]) -> list[str]:
    return [
        str(column_value([results[name] for name in names])) if all(name in results for name in names) else ""
        for names in suite.columns.values()
    ]
