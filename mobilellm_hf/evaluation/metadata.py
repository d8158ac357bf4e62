"""Results as the Hub reads them: `.eval_results/*.yaml` in a model's repository, and the head of its model card.

    write_metadata(folder, "MobileLLM-R1-140M", results)
    card = ModelCardData(..., model_name="MobileLLM-R1-140M", eval_results=card_results(results))

Values are per cent. Both have the results whose documents were read from the Hub at a commit, which they name, and
that are the benchmark's. `why_not_public` says what another one lacks: it is over some of the documents, of fewer
samples or of completions cut elsewhere; no prompt fits the context; no commit was named; or it is over a local copy,
of which nothing but the number of documents is known. How a task was asked, and how many prompts did not fit the
context, is in the notes, and in the card's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from mobilellm_hf.evaluation.results import TaskResult, is_measured, prompts_cut, shortfalls
from mobilellm_hf.evaluation.suites import TASKS
from mobilellm_hf.evaluation.tables import how
from mobilellm_hf.workspace import write_whole

COMMIT = re.compile("[0-9a-f]{40}")


def why_not_public(result: TaskResult) -> str:
    """What keeps a result from the Hub's files; empty if nothing does."""
    reasons = shortfalls(result)
    if not is_measured(result):
        reasons.append("no prompt fits the context")
    if _revision(result) is None:
        hub_id = TASKS[result.task].data.hub_id
        on_hub = result.source.startswith(f"{hub_id}@")
        reasons.append(f"no commit of {hub_id} was named" if on_hub else f"a local copy of {hub_id}")
    return ", ".join(reasons)


def hub_entries(results: Mapping[str, TaskResult]) -> dict[str, EvalResultEntry]:
    """By task, for `.eval_results/TASK.yaml`."""
    return {
        name: EvalResultEntry(
            dataset_id=TASKS[name].data.hub_id,
            task_id=TASKS[name].data.subset or "default",
            value=_per_cent(result),
            dataset_revision=_revision(result),
            notes=f"{_how(result)}; {name} of mobilellm_hf",
        )
        for name, result in results.items()
        if not why_not_public(result)
    }


def card_results(results: Mapping[str, TaskResult]) -> list[EvalResult]:
    """For `ModelCardData(eval_results=...)`."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=TASKS[name].data.hub_id,
            dataset_name=f"{name} ({_how(result)})",
            dataset_config=TASKS[name].data.subset,
            dataset_split=TASKS[name].data.split,
            dataset_revision=_revision(result),
            metric_type=result.metric,
            metric_value=_per_cent(result),
        )
        for name, result in results.items()
        if not why_not_public(result)
    ]


def write_metadata(folder: Path, model_name: str, results: Mapping[str, TaskResult]) -> bool:
    """Writes both kinds of files if there is something for them, and says whether there was.

    What an earlier run wrote of results that are not published is removed.
    """
    entries = hub_entries(results)
    for name in TASKS:
        file = folder / ".eval_results" / f"{name}.yaml"
        if name in entries:
            _write_yaml(file, eval_result_entries_to_yaml([entries[name]]))
        else:
            file.unlink(missing_ok=True)
    if not entries:
        (folder / "model_index.yaml").unlink(missing_ok=True)
        return False
    index = eval_results_to_model_index(model_name, card_results(results))
    _write_yaml(folder / "model_index.yaml", {"model-index": index})
    return True


def _how(result: TaskResult) -> str:
    cut = prompts_cut(result)
    return how(TASKS[result.task], result) + (f", {cut:,} prompts did not fit the context" if cut else "")


def _write_yaml(file: Path, content: object) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def _per_cent(result: TaskResult) -> float:
    return round(100 * result.value, 2)


def _revision(result: TaskResult) -> str | None:
    """The commit that the documents were read at; None of local copies, and of what no commit was named for."""
    hub_id, _, revision = result.source.rpartition("@")
    return revision if hub_id == TASKS[result.task].data.hub_id and COMMIT.fullmatch(revision) else None
