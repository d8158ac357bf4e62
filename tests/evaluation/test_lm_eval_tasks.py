"""Our tasks beside lm-eval's own: prompts equal byte for byte, and graders on gold, shuffled and awkward answers."""

import importlib.metadata
import types
from pathlib import Path

import evaluate
import pytest
import yaml
from evaluation_cases import DOCUMENTS, GOLD, GivenLM, subjects, write_data
from lm_eval.tasks import TaskManager
from rich.console import Console

from mobilellm_hf.evaluation.documents import locate
from mobilellm_hf.evaluation.lm_eval_runner import quiet, run_lm_eval_task
from mobilellm_hf.evaluation.lm_eval_tasks import (
    CODE_LIMITS,
    FOLDER,
    build_parts,
    grade_minerva,
    minerva_answer,
    same_answer,
)
from mobilellm_hf.evaluation.recorded_lm import Team
from mobilellm_hf.evaluation.records import read_records
from mobilellm_hf.evaluation.results import is_whole
from mobilellm_hf.evaluation.suites import TASKS
from mobilellm_hf.progress import StageProgress
from mobilellm_hf.rewards.sandbox import Limits


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def ours(name: str, data: Path, **options):
    with quiet():
        source = locate(name, TASKS[name].data, data)
        return source, build_parts(TASKS[name], source, **options)


def stock(name: str, config: str, folder: Path, monkeypatch, **files: Path):
    """lm-eval's own task, read as users of lm-eval would give it local files. HumanEval and MBPP load a metric from
    the Hub, MATH asks for another antlr4: both when they are imported, and not for their prompts."""
    monkeypatch.setattr(evaluate, "load", lambda name: types.SimpleNamespace(compute=lambda **_: None))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.11" if "antlr4" in name else version(name))
    fields = {f"{split}_split": split if split in files else None for split in ("training", "validation", "test")}
    fields |= {"include": str(FOLDER / config), "num_fewshot": TASKS[name].shots, "dataset_path": "json"}
    fields |= {
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
    }
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump(fields))
    with quiet():
        (task,) = TaskManager(include_defaults=False).load([str(file)])["tasks"].values()
    return task


def requests_of(part) -> list[tuple]:
    with quiet():
        part.build_all_requests()
    return [request.args for request in part.instances]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_prompts_are_those_of_lm_eval_byte_for_byte(name, data, tmp_path, monkeypatch):
    spec = TASKS[name].data
    file = data / f"{spec.files[0]}_{spec.split}.jsonl"
    theirs = stock(name, TASKS[name].config, tmp_path, monkeypatch, **{spec.split: file})
    _, parts = ours(name, data)
    assert list(parts) == [theirs.task_name] and parts[theirs.task_name].VERSION == theirs.VERSION
    asked = requests_of(parts[theirs.task_name])
    assert len(asked) >= len(DOCUMENTS[name]) and asked == requests_of(theirs)


@pytest.mark.parametrize("subject", ["anatomy", "world_religions"])
def test_mmlu_is_asked_as_lm_eval_asks_it_subject_by_subject(subject, data, tmp_path, monkeypatch):
    _, parts = ours("mmlu", data)
    assert len(parts) == len(subjects()) == 57
    for split in ("test", "dev"):
        rows = [row for row in (data / f"mmlu_{split}.jsonl").read_text().splitlines() if f'"{subject}"' in row]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    files = {split: tmp_path / f"{split}.jsonl" for split in ("test", "dev")}
    asked = requests_of(parts[f"mmlu_{subject}"])
    assert asked == requests_of(stock("mmlu", f"mmlu/default/mmlu_{subject}.yaml", tmp_path, monkeypatch, **files))
    assert len(asked) == (3 if subject == "anatomy" else 2) * 4 and asked[0][0].count("Answer:") == 6


def test_the_shots_are_in_the_prompts(data):
    for name, mark in (("math500_4shot", "Problem:"), ("gsm8k_8shot", "Q:"), ("mbpp", "[BEGIN]")):
        (part,) = ours(name, data)[1].values()
        assert requests_of(part)[0][0].count(mark) == TASKS[name].shots + 1


def value_of(name: str, data: Path, answers: list, folder: Path, **options):
    source, parts = ours(name, data)
    with StageProgress([name], Console(quiet=True)) as progress, progress.stage(name) as stage:
        team = Team(GivenLM(answers))
        return run_lm_eval_task(TASKS[name], parts, team, folder, stage, source=source.label, **options)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_gold_answers_are_right_and_those_of_the_next_document_wrong(name, data, tmp_path):
    gold = GOLD[name]
    right = value_of(name, data, gold, tmp_path / "gold")
    assert right.value == 1.0 and right.documents == len(gold) and right.metric == TASKS[name].metric
    shuffled = [*gold[1:], gold[0]]
    # Two of the three sums of GSM8K are 7, and the third document is given the answer of the first.
    coincidences = 1 / 3 if name == "gsm8k_8shot" else 0.0
    assert value_of(name, data, shuffled, tmp_path / "shuffled").value == pytest.approx(coincidences)
    records = read_records(tmp_path / "gold")
    assert set(records["score"]) == {1.0} and set(records["task"]) == {name}
    if TASKS[name].metric.startswith("acc"):
        assert [records[row]["extracted"] for row in range(len(records)) if records[row]["sample"] == 0] == [
            str(place) for place in gold
        ]


def test_mmlu_is_the_mean_over_all_documents(data, tmp_path):
    result = value_of("mmlu", data, [0, 3, 2], tmp_path)  # of each subject the first is right, of anatomy the third
    assert result.value == pytest.approx(58 / 115) and result.documents == 115 and len(result.details["parts"]) == 57
    assert result.stderr > 0 and len(read_records(tmp_path)) == 115 * 4


@pytest.mark.parametrize(("limit", "documents"), [(1, 57), (2, 114), (3, 115)])
def test_mmlu_is_partial_if_one_of_its_parts_is(limit, documents, data, tmp_path):
    result = value_of("mmlu", data, [0, 3, 2], tmp_path, limit=limit)  # anatomy has 3 documents, the others have 2
    assert result.documents == documents and result.details.get("limit") == (limit if limit < 3 else None)
    assert not is_whole(result)  # of 115 documents, where MMLU has 14,042


@pytest.mark.parametrize(
    ("name", "completion", "right"),
    [
        ("gsm8k_8shot", " 3 + 4 = 7", 1.0),  # the last number counts
        ("gsm8k_8shot", " The answer is 7 cups.", 1.0),
        ("gsm8k_8shot", " The answer is $7.", 1.0),
        ("gsm8k_8shot", " The answer is 7. She had 3 before.", 0.0),
        ("gsm8k_8shot", " She has many.", 0.0),
        ("gsm8k_8shot", "", 0.0),
        ("humaneval", "    return b + a\n\n\n", 1.0),
        ("humaneval", "```python\n    return a + b\n```", 0.0),
        ("humaneval", "    return a - b\n", 0.0),
        ("humaneval", "    return (", 0.0),
        ("humaneval", "    exit(0)\n", 0.0),
        ("humaneval", "    while True: pass\n", 0.0),  # and the others are judged
        ("mbpp", "def double(x): return x + x\n", 1.0),
        ("mbpp", "def twice(x): return x + x\n", 0.0),
        ("mbpp", "```\ndef double(x): return x + x\n```", 0.0),
    ],
)
def test_completions_as_models_write_them(name, completion, right, data, tmp_path, monkeypatch):
    assert CODE_LIMITS.seconds == 10 and 0.9 * CODE_LIMITS.cpu_seconds > CODE_LIMITS.seconds  # wall time decides
    monkeypatch.setattr("mobilellm_hf.evaluation.lm_eval_tasks.CODE_LIMITS", Limits(seconds=1.0))
    filler = GOLD[name][1:]
    result = value_of(name, data, [completion, *filler], tmp_path)
    assert result.value == pytest.approx((right + len(filler)) / (1 + len(filler)))


@pytest.mark.parametrize(
    ("completion", "found", "right"),
    [
        ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}", True),
        ("Final Answer: The final answer is $\\frac12$. I hope it is correct.\n\nMore text", "\\frac{1}{2}", True),
        ("Final Answer: The final answer is $0.5$. I hope it is correct.", "0.5", True),
        ("Final Answer: The final answer is $x=\\frac{2}{4}$. I hope it is correct.", "\\frac{2}{4}", True),
        ("Final Answer: The final answer is $\\frac{1}{2}$ dollars. I hope it is correct.", "\\frac{1}{2}", True),
        ("Final Answer: The final answer is $\\frac{1}{3}$. I hope it is correct.", "\\frac{1}{3}", False),
        ("It is $\\boxed{\\frac{1}{2}}$.", "[invalidanswer]", False),  # Minerva reads no box
        ("", "[invalidanswer]", False),
    ],
)
def test_minervas_answers(completion, found, right):
    assert minerva_answer(completion) == found
    assert grade_minerva({"answer": "\\frac{1}{2}"}, [completion]) == {"exact_match": int(right)}


@pytest.mark.parametrize(
    ("prediction", "gold", "equal"),
    [
        ("40001", "40000", False),  # within SymPy's tolerance
        ("0.333333", "\\frac{1}{3}", False),
        ("0.25", "\\frac{1}{4}", True),
        ("-\\frac{2}{4}", "-.5", True),
        ("6/4", "\\frac{3}{2}", True),
        ("1/0", "1", False),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("x+1", "1+x", True),
        ("x+1", "x-1", False),
    ],
)
def test_numbers_are_compared_exactly_and_expressions_by_sympy(prediction, gold, equal):
    assert same_answer(prediction, gold) is equal


def test_an_answer_that_never_ends_is_no_answer(monkeypatch):
    monkeypatch.setattr("mobilellm_hf.evaluation.lm_eval_tasks.SYMBOLIC_SECONDS", 0.5)
    assert not same_answer("9^{9^{9^9}}", "1") and same_answer("2^{10}", "1024") and not same_answer("", "")


def test_tokens_of_a_completion_can_be_set(data):
    (part,) = ours("humaneval", data, max_new_tokens=17)[1].values()
    assert requests_of(part)[0][1]["max_gen_toks"] == 17
    (part,) = ours("humaneval", data)[1].values()
    assert requests_of(part)[0][1]["max_gen_toks"] == 1024


def test_a_subject_without_rows_is_named(data, tmp_path):
    folder = write_data(tmp_path / "data")
    rows = (folder / "mmlu_dev.jsonl").read_text().splitlines()
    (folder / "mmlu_dev.jsonl").write_text("\n".join(row for row in rows if '"virology"' not in row))
    with pytest.raises(ValueError, match="mmlu: .*mmlu_dev.jsonl has no rows of 1 subjects, such as virology"):
        ours("mmlu", folder)
