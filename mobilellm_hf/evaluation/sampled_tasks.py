"""A task of Table 9: n completions of each prompt, each judged and kept as it comes, to pass@1 and pass@k.

    result = run_sampled_task(TASKS["aime24"], sampler, tokenizer, folder / "aime24", stage, documents=rows)
    result.value, result.stderr                     # pass@1 over 64 samples of each of 30 documents
    read_records(folder / "aime24")                 # every prompt, completion and verdict

Processes share the completions evenly, not the documents: 64 samples of 30 problems keep 8 GPUs equally busy. Judging
runs in threads beside the sampling. What has ended is on disk within seconds, and the same command asks for the rest
only; a completion that was stored but not yet judged is judged then. More samples, or more documents, go on from what
is there, too, since sample 7 of document 3 is the same in any run with the same seed, see `sampling`. Where a gold
answer or tests have changed, what was judged by them is judged again.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mobilellm_hf.evaluation.estimates import estimates
from mobilellm_hf.evaluation.graders import Grader, grader_of
from mobilellm_hf.evaluation.journal import Journal
from mobilellm_hf.evaluation.live_code_bench import NO_CODE
from mobilellm_hf.evaluation.records import Record, Records, load_parts, write_finished
from mobilellm_hf.evaluation.results import TaskResult
from mobilellm_hf.evaluation.samplers import CompletionSampler
from mobilellm_hf.evaluation.sampling import SamplingSettings, room_for_completion
from mobilellm_hf.evaluation.suites import SampledTask
from mobilellm_hf.progress import Stage
from mobilellm_hf.workspace import Workspace

Key = tuple[int, int]  # document, sample


@dataclass(frozen=True)
class _Prompt:
    text: str
    token_ids: list[int]
    room: int  # for new tokens; 0 or less where the prompt fills the context


def run_sampled_task(
    task: SampledTask,
    sampler: CompletionSampler,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stage: Stage,
    *,
    documents: Dataset,
    source: str = "",
    limit: int | None = None,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    allow_unconfined: bool = False,
) -> TaskResult:
    """Draws the completions that `folder` has not yet, judges them, and sums all up. Called by all processes at once.

    Args:
        folder: of this task and model alone.
        documents: rows with the columns that the task names.
        source: of the documents, for the result.
        limit: the first so many documents only.
        samples, max_new_tokens: in place of the task's.
        batch_size: see `sample_completions`.
        allow_unconfined: run the model's code with limits alone where the machine has no more to give, see `run_code`.

    Raises:
        ValueError: before anything is generated, if the tokenizer has no chat template, a column is missing, no prompt
            fits the context, the machine cannot confine code, or `folder` is of another model, other documents or
            other settings.
        ImportError: math-verify is not installed and an answer needs it.
    """
    samples = task.samples if samples is None else samples
    rows = documents.select(range(min(len(documents), len(documents) if limit is None else limit)))
    _check(task, tokenizer, len(rows), samples)
    settings = SamplingSettings(
        max_new_tokens or task.max_new_tokens, _ends(sampler, tokenizer), task.temperature, task.top_p, seed
    )
    asked = list(itertools.product(range(len(rows)), range(samples)))
    with _together():
        grader = grader_of(task, rows, allow_unconfined)
        prompts = _prompts(grader, tokenizer, sampler.context, len(rows), settings.max_new_tokens)
        records = _claim(folder, task, settings, sampler, prompts)
    with _together():  # all have read what this may write anew
        _forget_other_verdicts(records, grader, len(rows), stage)
    missing = [key for key in asked if key not in records.found]
    _show_found(stage, len(asked), len(missing))
    unjudged = [key for key in asked if key in records.found and records.found[key].score is None]
    new = _completed(task, sampler, tokenizer, grader, prompts, _own(missing), settings, batch_size, stage)
    seconds = _keep(records, grader, itertools.chain(map(records.found.get, _own(unjudged)), new))
    known = load_parts(folder)
    result = _summed_up(task, [known[key] for key in asked], prompts, settings, samples)
    result.details["gold_answers_not_parsed"] = grader.unreadable()
    if len(rows) < len(documents):
        result.details["limit"] = len(rows)
    return replace(result, source=source, seconds=seconds)


def _check(task: SampledTask, tokenizer: PreTrainedTokenizerBase, documents: int, samples: int) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"task {task.name} asks a model that was taught to chat, and this tokenizer has no chat template: "
            "fine-tune the model (recipes/sft.py), or take a suite for base models"
        )
    if samples < 1 or documents < 1:
        raise ValueError(f"task {task.name}: samples={samples} and documents={documents} must be 1 or more")
    if samples > 1 and task.temperature == 0:
        raise ValueError(f"task {task.name}: its {samples} samples would be the same at temperature 0: ask for one")


def _ends(sampler: CompletionSampler, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    found = (*sampler.eos_token_ids, tokenizer.eos_token_id)
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _prompts(
    grader: Grader, tokenizer: PreTrainedTokenizerBase, context: int | None, count: int, max_new_tokens: int
) -> list[_Prompt]:
    conversations = [grader.messages(document) for document in range(count)]
    texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    prompts = [
        _Prompt(text, token_ids, room_for_completion(context, len(token_ids), max_new_tokens))
        for text, token_ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)
    ]
    if all(prompt.room < 1 for prompt in prompts):
        raise ValueError(
            f"the shortest of {count} prompts has {min(len(prompt.token_ids) for prompt in prompts):,} tokens, and "
            f"the model's context is {context:,}"
        )
    return prompts


def _claim(
    folder: Path, task: SampledTask, settings: SamplingSettings, sampler: CompletionSampler, prompts: Sequence[_Prompt]
) -> Records:
    """What the folder has; one of another run is refused: other settings, another model, or other prompts."""
    names = ("max_new_tokens", "eos_token_ids", "temperature", "top_p", "seed")
    decoding = {name: getattr(settings, name) for name in names}
    workspace = Workspace(folder, {"task": task.name, "model": sampler.identity, **decoding})
    records = Records(folder)
    for (document, _), record in records.found.items():
        if document < len(prompts) and record.prompt != prompts[document].text:
            raise ValueError(
                f"{folder} has completions of another prompt for document {document} (other documents, or another "
                "chat template): give another output folder, or delete that one to start again"
            )
    if PartialState().is_main_process:
        workspace.claim()
    return records


def _forget_other_verdicts(records: Records, grader: Grader, documents: int, stage: Stage) -> None:
    """Where a gold answer or tests have changed since, completions stay, to be judged again."""
    other = {
        key: replace(record, target=grader.target(record.document), extracted=None, score=None)
        for key, record in records.found.items()
        if record.document < documents and record.target != grader.target(record.document)
    }
    if not other:
        return
    records.found = {**records.found, **other}
    stage.say(f"{len(other):,} completions of other gold answers or tests: judged again")
    if PartialState().is_main_process:  # and not as one more part, since the verdict of another one would count
        write_finished(records.folder, records.found.values())


def _own(items: Iterable[Any]) -> list[Any]:
    """This process's share."""
    return list(items)[PartialState().process_index :: PartialState().num_processes]


@contextmanager
def _together() -> Iterator[None]:
    """An error of one process is one of all: the others would wait for it for ever."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if PartialState().num_processes > 1:
        errors = gather_object([failure and f"{type(failure).__name__}: {failure}"])
        for rank, error in enumerate(errors):
            if error and not failure:
                failure = RuntimeError(f"process {rank} failed: {error}")
    if failure:
        raise failure


def _keep(records: Records, grader: Grader, unjudged: Iterable[Record]) -> float:
    """Judges and stores them, and makes one file of what all processes have; the wall time of all runs so far."""
    with _together(), Journal(records, lambda record: _judged(grader, record)) as journal:
        for record in unjudged:
            journal.add(record)
    with _together():
        records.finish()
    return journal.seconds


def _judged(grader: Grader, record: Record) -> Record:
    extracted, score = grader.judge(record.document, record.completion)
    return replace(record, extracted=extracted, score=score)


def _show_found(stage: Stage, asked: int, missing: int) -> None:
    stage.expect(asked)
    stage.advance(asked - missing)
    if missing < asked:
        stage.say(f"{asked - missing:,} completions of an earlier run")


def _completed(
    task: SampledTask,
    sampler: CompletionSampler,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    prompts: Sequence[_Prompt],
    keys: Sequence[Key],
    settings: SamplingSettings,
    batch_size: int | None,
    stage: Stage,
) -> Iterator[Record]:
    """A record of each, as they end; what is not asked for want of room has an empty completion."""

    def record(key: Key, completion: str, tokens: int = 0) -> Record:
        stage.advance(PartialState().num_processes)  # which take equal shares
        return Record(task.name, *key, prompts[key[0]].text, completion, grader.target(key[0]), tokens=tokens)

    fitting = [key for key in keys if prompts[key[0]].room > 0]
    for key in keys:
        if prompts[key[0]].room < 1:
            yield record(key, "")
    if not fitting:
        return
    token_ids = {document: prompts[document].token_ids for document, _ in fitting}
    began, tokens = time.monotonic(), 0
    for completion in sampler.sample(token_ids, fitting, settings, batch_size):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        tokens += len(completion.token_ids) * PartialState().num_processes
        stage.say(f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
        yield record((completion.document, completion.sample), text, len(completion.token_ids))


def _summed_up(
    task: SampledTask,
    records: Sequence[Record],
    prompts: Sequence[_Prompt],
    settings: SamplingSettings,
    samples: int,
) -> TaskResult:
    """pass@1 and what else there is to know. `records`: document by document."""
    count, documents = len(records), len(records) // samples
    scores = [record.score for record in records]
    found = estimates([scores[start : start + samples] for start in range(0, count, samples)])
    rooms = [prompts[record.document].room for record in records]
    cut = [record.tokens >= room > 0 for record, room in zip(records, rooms)]
    details: dict[str, Any] = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "mean_tokens": sum(record.tokens for record in records) / count,
        "share_cut_off": sum(cut) / count,
        "share_without_answer": sum(record.extracted is None for record in records) / count,
        "prompts_beyond_context": sum(room < 1 for room in rooms) // samples,
        "pass_at_k": {
            f"pass@{k}": {"value": estimate.value, "stderr": estimate.stderr} for k, estimate in found.items()
        },
    }
    if task.grader == "code":
        details["how_code_fared"] = dict(Counter(record.extracted or NO_CODE for record in records))
    return TaskResult(task.name, "pass@1", found[1].value, found[1].stderr, documents, samples, 0.0, "", details)
