"""The benchmarks of Tables 8 and 9 as data: how they are asked, where they come from, what a column measures.

    SUITES["base"].tasks            # math500_4shot, gsm8k_8shot, mbpp, ...: lm-eval's, greedy or by likelihood
    SUITES["reasoning"].tasks       # math500, gsm8k, aime24, ...: a chat model's samples
    find_tasks(["base"], ["aime24"])

The paper names its benchmarks and shots, not its prompts. Few-shot tasks are those of lm-eval that have the shots by
themselves (Minerva's 4 examples for MATH, the 8 chains of thought for GSM8K). Where lm-eval has both `acc` and
`acc_norm` (by characters), the column takes `acc_norm`; the results keep both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TaskData:
    """Where a task's documents come from.

    Attributes:
        split: that is asked.
        revision: a commit of the data set's repository on the Hub; None where none is pinned.
        columns: what the task calls a field -> the data set's column.
        files: what a local copy may be called, `NAME_SPLIT` or `NAME`, with .jsonl, .json or .parquet.
        example_split: that examples of the prompt are taken from, where they are not part of the task.
        hub_files: the JSON files of the split, where the repository has a script to read them, which is not run.
        documents: in the split; a result over another number is not the benchmark's. None where that is not known, and
            no result counts as the benchmark's.
    """

    hub_id: str
    split: str
    revision: str | None = None
    subset: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    example_split: str | None = None
    hub_files: tuple[str, ...] = ()
    documents: int | None = None


@dataclass(frozen=True)
class LmEvalTask:
    """A task of lm-eval.

    Attributes:
        config: its YAML under lm_eval/tasks; with a `*`, all of them together are the task.
        shots: examples in the prompt.
        metric, filter: of those that lm-eval computes, the one that the column shows.
        code: whether the model's completions are run, in the sandbox.
    """

    name: str
    config: str
    data: TaskData
    shots: int
    metric: str
    filter: str = "none"
    code: bool = False


@dataclass(frozen=True)
class SampledTask:
    """A task of Table 9: several completions of each prompt, drawn from a model that was taught to chat.

    Attributes:
        prompt: of the user, with the columns in braces.
        system: what the conversation begins with; None for the chat template's own beginning.
        grader: how a completion is judged: its answer as `rewards.grading` does, or by running its code.
        samples: completions of each prompt; pass@1 is their mean.
    """

    name: str
    data: TaskData
    prompt: str
    grader: Literal["math", "code"]
    samples: int = 1
    system: str | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 30_000


Task = LmEvalTask | SampledTask


@dataclass(frozen=True)
class Suite:
    """The columns of a table, each a task or the mean of several.

    Attributes:
        table: of the paper.
        columns: as the table calls them -> names of tasks.
        tasks: by name.
    """

    name: str
    table: str
    columns: Mapping[str, tuple[str, ...]]
    tasks: Mapping[str, Task]


def _columns(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# Revisions were the newest in November 2026, as published by others who pin them; for lighteval/siqa none was found.
# The numbers of documents are those that the data sets' cards state for the split.
MATH500 = TaskData(
    "HuggingFaceH4/MATH-500", "test", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "default",
    _columns("problem", "solution"), ("math500",), documents=500,
)  # fmt: skip
GSM8K = TaskData(
    "openai/gsm8k", "test", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c", "main",
    _columns("question", "answer"), ("gsm8k",), documents=1_319,
)  # fmt: skip
ARC_REVISION = "210d026faf9955653af8916fad021475a3f00453"
ARC_COLUMNS = _columns("question", "choices", "answerKey")

BASE_TASKS = (
    LmEvalTask("math500_4shot", "minerva_math/minerva_math500.yaml", MATH500, 4, "exact_match"),
    LmEvalTask("gsm8k_8shot", "gsm8k/gsm8k-cot.yaml", GSM8K, 8, "exact_match", "flexible-extract"),
    LmEvalTask(
        "mbpp", "mbpp/mbpp.yaml",
        TaskData("google-research-datasets/mbpp", "test", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", "full",
                 _columns("text", "test_list"), ("mbpp",), documents=500),
        3, "pass@1", code=True,
    ),
    LmEvalTask(
        "humaneval", "humaneval/humaneval.yaml",
        TaskData("openai/openai_humaneval", "test", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", None,
                 _columns("prompt", "test", "entry_point"), ("humaneval",), documents=164),
        0, "pass@1", "create_test", code=True,
    ),
    LmEvalTask(
        "arc_easy", "arc/arc_easy.yaml",
        TaskData("allenai/ai2_arc", "test", ARC_REVISION, "ARC-Easy", ARC_COLUMNS, ("arc_easy",),
                 documents=2_376),
        0, "acc_norm",
    ),
    LmEvalTask(
        "arc_challenge", "arc/arc_challenge.yaml",
        TaskData("allenai/ai2_arc", "test", ARC_REVISION, "ARC-Challenge", ARC_COLUMNS, ("arc_challenge",),
                 documents=1_172),
        0, "acc_norm",
    ),
    LmEvalTask(
        "boolq", "super_glue/boolq/default.yaml",
        TaskData("aps/super_glue", "validation", "3de24cf8022e94f4ee4b9d55a6f539891524d646", "boolq",
                 _columns("passage", "question", "label"), ("boolq",), documents=3_270),
        0, "acc",
    ),
    LmEvalTask(
        "piqa", "piqa/piqa.yaml",
        TaskData("baber/piqa", "validation", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", None,
                 _columns("goal", "sol1", "sol2", "label"), ("piqa",), documents=1_838),
        0, "acc_norm",
    ),
    LmEvalTask(
        "social_iqa", "siqa/siqa.yaml",
        TaskData("lighteval/siqa", "validation", None, None,
                 _columns("context", "question", "answerA", "answerB", "answerC", "label"), ("social_iqa", "siqa"),
                 documents=1_954),
        0, "acc",
    ),
    LmEvalTask(
        "hellaswag", "hellaswag/hellaswag.yaml",
        TaskData("Rowan/hellaswag", "validation", "218ec52e09a7e7462a5400043bb9a69a41d06b76", None,
                 _columns("ctx_a", "ctx_b", "activity_label", "endings", "label"), ("hellaswag",),
                 documents=10_042),
        0, "acc_norm",
    ),
    LmEvalTask(
        "openbookqa", "openbookqa/openbookqa.yaml",
        TaskData("allenai/openbookqa", "test", "388097ea7776314e93a529163e0fea805b8a6454", "main",
                 _columns("question_stem", "choices", "answerKey"), ("openbookqa",), documents=500),
        0, "acc_norm",
    ),
    LmEvalTask(
        "winogrande", "winogrande/default.yaml",
        TaskData("allenai/winogrande", "validation", "01e74176c63542e6b0bcb004dcdea22d94fb67b5", "winogrande_xl",
                 _columns("sentence", "option1", "option2", "answer"), ("winogrande",), documents=1_267),
        0, "acc",
    ),
    LmEvalTask(
        "mmlu", "mmlu/default/mmlu_*.yaml",
        TaskData("cais/mmlu", "test", "c30699e8356da336a370243923dbaf21066bb9fe", None,
                 _columns("question", "choices", "answer", "subject"), ("mmlu",), "dev",
                 documents=14_042),
        5, "acc",
    ),
)  # fmt: skip

# As the model cards of the published checkpoints ask.
MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
CODE_SYSTEM = (
    "You are a helpful and harmless assistant. You should think step-by-step before responding to the instruction "
    "below.\n\nPlease use python programming language only.\nYou must use ```python for just the final solution code "
    "block with the following format:\n```python\n# Your code here\n```"
)

REASONING_TASKS = (
    SampledTask("math500", MATH500, "{problem}", "math", system=MATH_SYSTEM),
    SampledTask("gsm8k", GSM8K, "{question}", "math", system=MATH_SYSTEM),
    SampledTask(
        "aime24",
        TaskData("Maxwell-Jia/AIME_2024", "train", "8d88b2876a82a080e2f172cc9b25d0d9d2cb4792", None,
                 {"problem": "Problem", "answer": "Answer"}, ("aime24",), documents=30),
        "{problem}", "math", 64, MATH_SYSTEM,
    ),
    SampledTask(
        "aime25",
        TaskData("math-ai/aime25", "test", "563bb8404243c5f09de6ec262f2db674fe5bce9b", None,
                 _columns("problem", "answer"), ("aime25",), documents=30),
        "{problem}", "math", 64, MATH_SYSTEM,
    ),
    SampledTask(
        "livecodebench",
        TaskData("livecodebench/code_generation_lite", "test", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
                 "release_v6",
                 _columns("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
                 ("livecodebench_v6", "livecodebench"), None,
                 ("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl", "test6.jsonl"),
                 1_055),
        "{question_content}", "code", 16, CODE_SYSTEM,
    ),
)  # fmt: skip

COMMONSENSE = ("arc_easy", "arc_challenge", "boolq", "piqa", "social_iqa", "hellaswag", "openbookqa", "winogrande")
SUITES = {
    "base": Suite(
        "base",
        "Table 8",
        {
            "MATH500": ("math500_4shot",),
            "GSM8K": ("gsm8k_8shot",),
            "MBPP": ("mbpp",),
            "HumanEval": ("humaneval",),
            "CommonSense": COMMONSENSE,
            "MMLU": ("mmlu",),
        },
        {task.name: task for task in BASE_TASKS},
    ),
    "reasoning": Suite(
        "reasoning",
        "Table 9",
        {
            "MATH500": ("math500",),
            "GSM8K": ("gsm8k",),
            "AIME'24": ("aime24",),
            "AIME'25": ("aime25",),
            "LCBv6": ("livecodebench",),
        },
        {task.name: task for task in REASONING_TASKS},
    ),
}
TASKS: dict[str, Task] = {name: task for suite in SUITES.values() for name, task in suite.tasks.items()}


def find_tasks(suites: Sequence[str], tasks: Sequence[str]) -> list[Task]:
    """All tasks of the suites and the tasks named besides, each once.

    Raises:
        ValueError: suites or tasks are unknown; the message names all of them, those that there are and the nearest.
    """
    problems = [_unknown("suite", suites, SUITES), _unknown("task", tasks, TASKS)]
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))
    names = [name for suite in suites for name in SUITES[suite].tasks]
    return [TASKS[name] for name in dict.fromkeys([*names, *tasks])]


def _unknown(what: str, names: Iterable[str], known: Mapping[str, object]) -> str:
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    if not unknown:
        return ""
    close = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    hint = f". Did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
    said = f"is no {what}" if len(unknown) == 1 else f"are no {what}s"
    return f"there {said} {', '.join(map(repr, unknown))}; there are {', '.join(known)}{hint}"
