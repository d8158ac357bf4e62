"""Runs a task of lm-eval part by part: a part that is finished is read, one that was interrupted goes on.

    result = run_lm_eval_task(task, parts, team, folder, stage, source="openai/gsm8k@cc7b047")

A part's folder gets `records.parquet` and, last, `result.json`; a task of several parts (MMLU) has a folder each.
Values and standard errors are lm-eval's own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import numpy as np
from lm_eval.api.metrics import pooled_sample_stderr
from lm_eval.api.task import ConfigurableTask

from mobilellm_hf.evaluation.lm_eval_tasks import minerva_answer
from mobilellm_hf.evaluation.recorded_lm import RecordedLM, Team
from mobilellm_hf.evaluation.records import Record, load_parts, write_finished
from mobilellm_hf.evaluation.results import TaskResult
from mobilellm_hf.evaluation.suites import LmEvalTask
from mobilellm_hf.progress import Stage
from mobilellm_hf.workspace import write_whole

RESULT_FILE, SECONDS_FILE = "result.json", "seconds.json"
INVALID = ("", "[invalid]", "[invalidanswer]")


def run_lm_eval_task(
    task: LmEvalTask,
    parts: Mapping[str, ConfigurableTask],
    team: Team,
    folder: Path,
    stage: Stage,
    *,
    source: str,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> TaskResult:
    """What the parts come to. Called in the main process.

    Args:
        folder: of this task, model and settings alone, but for the limit.
        limit: documents of each part; a run with a larger one asks for the others only.
        apply_chat_template: prompts are conversations, and examples turns of them.
    """
    results = []
    for number, (name, part) in enumerate(parts.items(), 1):
        own = folder / name if len(parts) > 1 else folder
        if len(parts) > 1:
            stage.say(f"{number} of {len(parts)}: {name}")
        found = _finished(own, limit)
        results.append(found or _run(task, part, team, own, stage, source, limit, apply_chat_template))
    return results[0] if len(results) == 1 else _pooled(task, results)


def _finished(folder: Path, limit: int | None) -> TaskResult | None:
    file = folder / RESULT_FILE
    found = json.loads(file.read_text()) if file.exists() else {}
    return TaskResult.from_json(found["result"]) if found and found["limit"] == limit else None


def _run(
    task: LmEvalTask,
    part: ConfigurableTask,
    team: Team,
    folder: Path,
    stage: Stage,
    source: str,
    limit: int | None,
    apply_chat_template: bool,
) -> TaskResult:
    lm = team.lead(folder, part.task_name if "*" in task.config else task.name, stage)
    with _clock(folder) as seconds, quiet():
        found = lm_eval.evaluate(
            lm, {"tasks": {part.task_name: part}}, limit=limit, bootstrap_iters=1, log_samples=True,
            apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template,
        )  # fmt: skip
    samples = [sample for sample in found["samples"][part.task_name] if sample["filter"] == task.filter]
    judged = {record.key: record for record in _records(task, part, lm, samples)}
    write_finished(folder, (load_parts(folder) | judged).values())
    result = _result(task, part, found["results"][part.task_name], len(samples), source)
    result.details["prompts"] = sum(len(sample["arguments"]) for sample in samples)
    if lm.truncated:
        result.details["truncated_prompts"] = lm.truncated
    if limit is not None and len(samples) < len(part.eval_docs):
        result.details["limit"] = limit
    if apply_chat_template:
        result.details["chat_template"] = True
    result = replace(result, seconds=seconds())
    kept = json.dumps({"limit": limit, "result": result.to_json()}, indent=2)
    write_whole(folder / RESULT_FILE, lambda path: path.write_text(kept))
    return result


@contextmanager
def _clock(folder: Path) -> Iterator[Any]:
    """Yields a function that says how many seconds all runs together took, but for those that were killed."""
    folder.mkdir(parents=True, exist_ok=True)
    file, began = folder / SECONDS_FILE, time.monotonic()
    earlier = json.loads(file.read_text()) if file.exists() else 0.0
    try:
        yield lambda: earlier + time.monotonic() - began
    finally:
        write_whole(file, lambda path: path.write_text(json.dumps(earlier + time.monotonic() - began)))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and remarks of lm-eval's, which would tear the progress display."""
    logger, shown = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _result(
    task: LmEvalTask, part: ConfigurableTask, metrics: Mapping[str, Any], documents: int, source: str
) -> TaskResult:
    values = {name: float(value) for name, value in metrics.items() if isinstance(value, float | int)}
    details: dict[str, Any] = {
        "lm_eval_task": part.task_name,
        "task_version": part.VERSION,
        "filter": task.filter,
        "shots": task.shots,
        "metrics": values,
    }
    if part.OUTPUT_TYPE == "generate_until":
        details["generation"] = dict(part.config.generation_kwargs)
    return TaskResult(
        task=task.name,
        metric=task.metric,
        value=values[f"{task.metric},{task.filter}"],
        stderr=values.get(f"{task.metric}_stderr,{task.filter}"),
        documents=documents,
        samples=1,
        seconds=0.0,
        source=source,
        details=details,
    )


def _pooled(task: LmEvalTask, results: Sequence[TaskResult]) -> TaskResult:
    """The mean over all documents, and the standard error as lm-eval pools those of the parts."""
    sizes = [result.documents for result in results]
    errors = [result.stderr for result in results]
    shared = ("filter", "shots", "generation", "chat_template")
    details = {name: results[0].details[name] for name in shared if name in results[0].details}
    if limits := {result.details["limit"] for result in results if "limit" in result.details}:
        (details["limit"],) = limits  # of the run; parts with fewer documents than that do not have it
    details["parts"] = {result.details["lm_eval_task"]: result.value for result in results}
    if all("prompts" in result.details for result in results):
        details["prompts"] = sum(result.details["prompts"] for result in results)
    if cut := sum(result.details.get("truncated_prompts", 0) for result in results):
        details["truncated_prompts"] = cut
    return replace(
        results[0],
        value=float(np.average([result.value for result in results], weights=sizes)),
        stderr=None if None in errors else pooled_sample_stderr(errors, sizes),
        documents=sum(sizes),
        seconds=sum(result.seconds for result in results),
        details=details,
    )


def _records(
    task: LmEvalTask, part: ConfigurableTask, lm: RecordedLM, samples: Sequence[Mapping[str, Any]]
) -> Iterator[Record]:
    for sample in samples:
        answers = [lm.answered[sample["doc_id"], index] for index in range(len(sample["arguments"]))]
        extracted = _extracted(task, part, sample, answers)
        verdict = {"score": float(sample[task.metric]), "target": str(sample["target"]), "extracted": extracted}
        for record in answers:
            yield replace(record, **verdict)


def _extracted(
    task: LmEvalTask, part: ConfigurableTask, sample: Mapping[str, Any], answers: Sequence[Record]
) -> str | None:
    """What was judged: the place of the choice, or what the filter left of the completion."""
    if part.OUTPUT_TYPE == "multiple_choice":
        rated = np.array([record.logprob for record in answers])
        if task.metric == "acc_norm":
            rated = rated / [len(choice) for choice in part.doc_to_choice(sample["doc"])]
        return str(int(rated.argmax()))
    if task.code:
        return None
    if part.task_name == "minerva_math500":
        found = minerva_answer(answers[0].completion)
    else:
        found = sample["filtered_resps"][0]
    return None if found in INVALID else found
