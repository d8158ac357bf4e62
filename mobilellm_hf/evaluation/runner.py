"""The paper's tables of a model: suites run task by task, each kept as soon as it is finished.

    recipes/evaluate.py calls `run_evaluation`.

A task that fails is told in the results and stops no other; the run then ends with an error. What an earlier run found
of it is then no longer among the results; its records stay. What a killed run has answered stays, and the same command
asks for the rest. One output folder is of one model:

    records/TASK/               every prompt, completion and verdict, `records.read_records`
    results.json                values, standard errors, sources, settings, versions
    SUITE.png                   the values with 95% intervals beside the paper's models of that size
    .eval_results/TASK.yaml     for the model's repository on the Hub
    model_index.yaml            for the head of its model card

The last two are written of what may be published, see `metadata`; the run's last lines say what was not, and why.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    raise ImportError(f'evaluation needs lm-eval: pip install "mobilellm_hf[evaluation]" ({error})') from error

from mobilellm_hf.evaluation.arguments import EvaluationArguments
from mobilellm_hf.evaluation.lm_eval_runner import run_lm_eval_task
from mobilellm_hf.evaluation.metadata import why_not_public, write_metadata
from mobilellm_hf.evaluation.models import Evaluated, load_context, load_model, load_tokenizer
from mobilellm_hf.evaluation.plan import Planned, make_plan
from mobilellm_hf.evaluation.plots import plot_suite
from mobilellm_hf.evaluation.recorded_lm import Team
from mobilellm_hf.evaluation.results import TaskResult, is_measured, prompts_cut
from mobilellm_hf.evaluation.sampled_tasks import run_sampled_task
from mobilellm_hf.evaluation.suites import SUITES, SampledTask
from mobilellm_hf.evaluation.tables import plan_table, suite_table, suites_table, tasks_table
from mobilellm_hf.progress import Stage, StageProgress
from mobilellm_hf.workspace import Workspace, write_whole

PACKAGES = ("mobilellm_hf", "lm_eval", "transformers", "torch", "datasets", "accelerate")


@dataclass
class Evaluation:
    """What is known of a model.

    Attributes:
        results: by task, of earlier runs too.
        errors: by task, of this run.
    """

    model: dict[str, Any]
    options: dict[str, Any]
    results: dict[str, TaskResult] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def run_evaluation(
    args: EvaluationArguments,
    console: Console,
    load: Callable[..., Evaluated] = load_model,
    find_context: Callable[[str, str | None], int] = load_context,
) -> Evaluation | None:
    """Evaluates a model on suites and tasks; None if it was only to show what there is.

    Args:
        load, find_context: called as `load_model` and `load_context` are, for another kind of model, such as
            `mobilellm_hf.export.evaluated` has. The tokenizer is read from `args.model`, unless another is named.

    Raises:
        ValueError: nothing of it can be run, which is found before the model is loaded; or, at the end, tasks failed,
            or in a dry run are known to.
    """
    if args.list_tasks:
        for suite in SUITES.values():
            console.print(suites_table(suite))
        return None
    tasks = args.check()
    args.check_folders()
    tokenizer = load_tokenizer(args.tokenizer or args.model, None if args.tokenizer else args.model_revision)
    with PartialState().main_process_first():
        plan = make_plan(args, tasks, tokenizer, find_context(args.model, args.model_revision))
    _tell(plan, console)
    if args.dry_run:
        console.print(plan_table(plan, args.limit, args.samples))
    _refuse_if_nothing_runs(plan)
    if args.dry_run:
        _refuse_if_any([planned.task.name for planned in plan if planned.problem], plan, "cannot be run")
        return None
    evaluated = load(
        args.model, tokenizer=tokenizer, revision=args.model_revision, dtype=args.dtype,
        attn_implementation=args.attn_implementation, batch_size=args.batch_size,
    )  # fmt: skip
    evaluation = _begin(args, evaluated, plan, console)
    _run(args, evaluated, [planned for planned in plan if not planned.problem], evaluation, console)
    if PartialState().is_main_process:
        _finish(Path(args.output_dir), evaluation, console)
    _refuse_if_any(list(evaluation.errors), plan, "failed", "; the others are kept")
    return evaluation


def _tell(plan: Sequence[Planned], console: Console) -> None:
    for planned in plan:
        if planned.problem:
            console.print(f"not run: {planned.problem}", style="yellow", markup=False, soft_wrap=True)


def _refuse_if_nothing_runs(plan: Sequence[Planned]) -> None:
    if all(planned.problem for planned in plan):
        raise ValueError("none of the tasks can be run: " + "; ".join(planned.problem for planned in plan))


def _refuse_if_any(names: Sequence[str], plan: Sequence[Planned], what: str, remark: str = "") -> None:
    if names:
        raise ValueError(f"{len(names)} of {len(plan)} tasks {what} ({', '.join(names)}){remark}")


def _begin(args: EvaluationArguments, evaluated: Evaluated, plan: list[Planned], console: Console) -> Evaluation:
    """What earlier runs have found of this model, and what cannot be run.

    The folder of another model is refused. That of a task with other settings is the task's problem.
    """
    folder = Path(args.output_dir)
    own = {"identity": evaluated.identity, **evaluated.settings}
    workspaces = [Workspace(folder, own)]
    runnable = [planned for planned in plan if not planned.problem]
    for planned in runnable:
        try:
            workspaces += _claimed(args, evaluated, planned, own)
        except ValueError as error:
            planned.problem = f"{planned.task.name}: {error}"
    _tell(runnable, console)
    _refuse_if_nothing_runs(plan)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        for workspace in workspaces:
            workspace.claim()
    errors = {planned.task.name: planned.problem for planned in plan if planned.problem}
    model = {"name": evaluated.name, "revision": args.model_revision, "parameters": evaluated.parameters}
    model |= {"context": evaluated.context, **own}
    file = folder / "results.json"
    found = json.loads(file.read_text())["tasks"] if file.exists() else {}
    known = {name: value for name, value in found.items() if "error" not in value and name not in errors}
    results = {name: TaskResult.from_json(value) for name, value in known.items()}
    return Evaluation(model, args.options(), results, errors)


def _claimed(
    args: EvaluationArguments, evaluated: Evaluated, planned: Planned, own: dict[str, Any]
) -> list[Workspace]:
    """The folder of a task of lm-eval; `run_sampled_task` sees to that of its own.

    Raises:
        ValueError: the model or the folder is not one for this task.
    """
    if isinstance(planned.task, SampledTask):
        if evaluated.sampler is None:
            raise ValueError(f"{evaluated.name} has no sampler, which tasks of many samples need")
        return []
    settings = planned.settings(args, own, evaluated.tokenizer)
    return [Workspace(_folder_of(Path(args.output_dir), planned), settings)]


def _folder_of(folder: Path, planned: Planned) -> Path:
    return folder / "records" / planned.task.name


def _run(
    args: EvaluationArguments, evaluated: Evaluated, plan: list[Planned], evaluation: Evaluation, console: Console
) -> None:
    team = Team(evaluated.lm)
    with StageProgress([planned.task.name for planned in plan], console) as progress:
        for planned in plan:
            name = planned.task.name
            with progress.stage(name) as stage:
                evaluation.results.pop(name, None)
                result, error = _attempt(functools.partial(_run_task, args, evaluated, team, planned, stage))
                if error:
                    evaluation.errors[name] = error
                    stage.say("failed")
                    console.print(f"{name} failed: {error.splitlines()[0]}", style="red", markup=False, soft_wrap=True)
                elif result is not None:
                    evaluation.results[name] = result
                    stage.say(_said(result))
                if PartialState().is_main_process:
                    _write_results(Path(args.output_dir), evaluation)


def _said(result: TaskResult) -> str:
    if not is_measured(result):
        return "no prompt fits the context: no value"
    cut = prompts_cut(result)
    lost = f", {cut:,} prompts do not fit the context" if cut else ""
    return f"{result.metric} {result.value:.1%}{lost}"


def _run_task(
    args: EvaluationArguments, evaluated: Evaluated, team: Team, planned: Planned, stage: Stage
) -> TaskResult | None:
    """The result, in the main process; `own_max_new_tokens` says that completions were cut elsewhere."""
    task, folder = planned.task, _folder_of(Path(args.output_dir), planned)
    if isinstance(task, SampledTask):
        result = run_sampled_task(
            task, evaluated.sampler, evaluated.tokenizer, folder, stage, documents=planned.source.load(),
            source=planned.source.label, limit=args.limit, samples=args.samples, max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size, seed=args.seed, allow_unconfined=args.allow_unconfined,
        )  # fmt: skip
    elif not PartialState().is_main_process:
        team.follow()
        return None
    else:
        with team:
            result = run_lm_eval_task(
                task, planned.parts, team, folder, stage, source=planned.source.label, limit=args.limit,
                apply_chat_template=args.apply_chat_template,
            )  # fmt: skip
    if args.max_new_tokens is not None and planned.generates:
        result.details["own_max_new_tokens"] = args.max_new_tokens
    return result


def _attempt(run: Callable[[], TaskResult | None]) -> tuple[TaskResult | None, str]:
    """A result, or the first error of any process, the same in all of them: a line, and where it came from."""
    result, error = None, ""
    try:
        result = run()
    except Exception as failure:
        kind = "" if isinstance(failure, ValueError) else f"{type(failure).__name__}: "
        error = f"{kind}{' '.join(str(failure).split())}\n{traceback.format_exc()}"
    errors = [error] if PartialState().num_processes == 1 else gather_object([error])
    return result, next((error for error in errors if error), "")


def _write_results(folder: Path, evaluation: Evaluation) -> None:
    tasks: dict[str, Any] = {name: result.to_json() for name, result in evaluation.results.items()}
    tasks |= {name: {"error": error} for name, error in evaluation.errors.items()}
    document = {
        "model": evaluation.model,
        "options": evaluation.options,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tasks": tasks,
    }
    text = json.dumps(document, indent=2)
    write_whole(folder / "results.json", lambda path: path.write_text(text))


def _finish(folder: Path, evaluation: Evaluation, console: Console) -> None:
    _write_results(folder, evaluation)
    name, parameters, results = Path(evaluation.model["name"]).name, evaluation.model["parameters"], evaluation.results
    written = ["results.json"] + (["records/"] if (folder / "records").exists() else [])
    if write_metadata(folder, name, results):
        written += [".eval_results/", "model_index.yaml"]
    console.print(tasks_table(results))
    for suite in SUITES.values():
        if any(task in results for task in suite.tasks):
            console.print(suite_table(suite, name, parameters, results))
            if plot_suite(suite, name, parameters, results, folder / f"{suite.name}.png"):
                written.append(f"{suite.name}.png")
    console.print(f"{folder}: {', '.join(written)}", markup=False, soft_wrap=True)
    held_back = {task: reason for task, result in results.items() if (reason := why_not_public(result))}
    if held_back:
        told = "; ".join(f"{task}: {reason}" for task, reason in held_back.items())
        console.print(f"not among the files for the Hub: {told}", markup=False, soft_wrap=True)
