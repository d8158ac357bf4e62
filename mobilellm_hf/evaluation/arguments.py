"""What recipes/evaluate.py is asked: a model, suites and tasks, and where their documents are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from mobilellm_hf.evaluation.suites import SUITES, Task, find_tasks
from mobilellm_hf.launch import option

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvaluationArguments:
    model: str | None = option("folder or Hub id of the model to evaluate")
    model_revision: str | None = option("of a Hub id: branch, tag or commit")
    tokenizer: str | None = option("folder or Hub id; by default that of the model")
    suite: list[str] = option(f"suites to run, of {', '.join(SUITES)}", list)
    tasks: list[str] = option("tasks to run, besides those of the suites", list)
    output_dir: str = option("folder of results, records and pictures; of one model", "runs/evaluation")
    data_dir: str | None = option("folder with local copies of the data sets; then nothing is asked of the Hub")
    revisions: list[str] = option("TASK=COMMIT: instead of the revision of a data set that is pinned", list)
    limit: int | None = option(
        "the first so many documents of each task only, and of each of MMLU's 57 parts; results are marked"
    )
    samples: int | None = option("completions of each prompt of the tasks that sample, instead of theirs")
    max_new_tokens: int | None = option("tokens of a completion at most, instead of the task's")
    batch_size: int | None = option("rows at a time; by default what the memory holds")
    apply_chat_template: bool = option("ask few-shot tasks as conversations too", False)
    dtype: str = option(f"{', '.join(DTYPES)}; auto is that of the files, and float32 on a CPU", "auto")
    attn_implementation: str | None = option("sdpa, flash_attention_2, ...; by default transformers' choice")
    seed: int = option("of what is sampled", 0)
    allow_unconfined: bool = option("run the model's code without a sandbox where the machine has none", False)
    list_tasks: bool = option("show suites and tasks, and run nothing", False)
    dry_run: bool = option("show what would be asked, and of what, and load no model", False)

    def check(self) -> list[Task]:
        """The tasks that are asked for.

        Raises:
            ValueError: of what can be refused before anything is loaded; the message names the field.
        """
        if self.model is None:
            raise ValueError("model: name the model to evaluate, a folder or a Hub id")
        found = find_tasks(self.suite, self.tasks)
        if not found:
            raise ValueError(f"suite: name one or more of {', '.join(SUITES)}, or tasks; --list_tasks shows them")
        for name in ("limit", "samples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ValueError(f"data_dir={self.data_dir!r} is no folder")
        self.revision_of_tasks()
        return found

    def check_folders(self) -> None:
        """Raises a ValueError if the model or the tokenizer is neither a folder or file that exists nor a Hub id."""
        for name in ("model", "tokenizer"):
            value = getattr(self, name)
            if value is None or Path(value).exists():
                continue
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(f"{name}: the folder {value} does not exist, and no Hub id is written so") from error

    def revision_of_tasks(self) -> Mapping[str, str]:
        """`revisions` by task."""
        pairs = [entry.partition("=") for entry in self.revisions]
        for (_, _, revision), entry in zip(pairs, self.revisions):
            if not revision:
                raise ValueError(f"revisions: {entry!r} must be written TASK=COMMIT")
        find_tasks([], [task for task, _, _ in pairs])
        return {task: revision for task, _, revision in pairs}

    def options(self) -> dict[str, Any]:
        """Of the fields, those that decide results and are the same for all tasks."""
        return {
            name: getattr(self, name)
            for name in ("limit", "samples", "max_new_tokens", "apply_chat_template", "seed", "data_dir")
        }
