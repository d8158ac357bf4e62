"""Sampled tasks from prompt to result: stored, judged, resumed, shared among processes; and the graders."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from sampled_task_cases import TASK, make_documents, make_model, make_tokenizer, run

from mobilellm_hf.evaluation import samplers
from mobilellm_hf.evaluation.estimates import estimates
from mobilellm_hf.evaluation.graders import MathGrader, grader_of
from mobilellm_hf.evaluation.records import Record, Records, read_records, write_finished, write_part
from mobilellm_hf.evaluation.suites import TASKS, TaskData
from mobilellm_hf.rewards.grading import extract_answer, official_equal
from mobilellm_hf.rewards.sandbox import SandboxError

WORKER = Path(__file__).with_name("sampled_task_worker.py")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, tokenizer):
    """The folder and result of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, model, tokenizer, batch_size=9, source="here")


def rows_of(folder):
    return read_records(folder).to_list()


def counting(monkeypatch) -> list[tuple[int, int]]:
    """The completions that are asked for from here on."""
    asked, sample = [], samplers.sample_completions

    def recording(model, prompts, keys, *rest):
        asked.extend(keys)
        return sample(model, prompts, keys, *rest)

    monkeypatch.setattr(samplers, "sample_completions", recording)
    return asked


def test_every_completion_is_stored_with_its_prompt_and_verdict(whole, tokenizer):
    folder, result = whole
    rows = rows_of(folder)
    assert [(row["document"], row["sample"]) for row in rows] == [(d, s) for d in range(7) for s in range(6)]
    for row in rows:
        document = row["document"]
        asked = [
            {"role": "system", "content": "Answer in {box}."},
            {"role": "user", "content": f"What is {document} + {document % 3}?"},
        ]
        assert row["prompt"] == tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert row["task"] == "sums" and row["target"] == str(document + document % 3)
        assert row["extracted"] == (extract_answer(row["completion"]) or None)
        right = row["extracted"] is not None and official_equal(row["extracted"], row["target"])
        assert row["score"] == float(right)
    assert {row["score"] for row in rows} == {0.0, 1.0}  # or the test would see nothing
    assert sorted(path.name for path in folder.iterdir()) == ["records.parquet", "seconds.json", "settings.json"]


def test_the_result_is_pass_at_1_and_what_else_there_is_to_know(whole):
    folder, result = whole
    rows = rows_of(folder)
    verdicts = [[row["score"] for row in rows if row["document"] == document] for document in range(7)]
    expected = estimates(verdicts)
    assert (result.task, result.metric, result.source) == ("sums", "pass@1", "here")
    assert (result.value, result.stderr) == (expected[1].value, expected[1].stderr)
    assert (result.documents, result.samples) == (7, 6) and result.seconds > 0
    details = result.details
    assert {k: found["value"] for k, found in details["pass_at_k"].items()} == {
        f"pass@{k}": expected[k].value for k in (1, 2, 4, 6)
    }
    assert details["mean_tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 42)
    assert 0 < details["share_cut_off"] == sum(row["tokens"] == 24 for row in rows) / 42 < 1
    assert details["share_without_answer"] == sum(row["extracted"] is None for row in rows) / 42 > 0
    assert details["prompts_beyond_context"] == 0 and "limit" not in details
    assert result == type(result).from_json(json.loads(json.dumps(result.to_json())))


def test_a_finished_run_is_not_run_again(whole, model, tokenizer, monkeypatch):
    asked = counting(monkeypatch)
    before, seconds = rows_of(whole[0]), json.loads((whole[0] / "seconds.json").read_text())
    again = run(whole[0], model, tokenizer, source="here")
    assert asked == [] and rows_of(whole[0]) == before
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(whole[1], seconds=0)
    assert again.seconds > seconds > 0


def test_a_killed_run_keeps_what_it_generated(whole, model, tokenizer, tmp_path, monkeypatch):
    killed = subprocess.run([sys.executable, str(WORKER), str(tmp_path), "killed"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {(row["document"], row["sample"]) for row in rows_of(tmp_path)}
    assert 5 <= len(kept) < 42
    asked = counting(monkeypatch)
    result = run(tmp_path, model, tokenizer, batch_size=5, source="here")
    assert sorted([*kept, *asked]) == [(d, s) for d in range(7) for s in range(6)]
    assert rows_of(tmp_path) == rows_of(whole[0])
    assert dataclasses.replace(result, seconds=0) == dataclasses.replace(whole[1], seconds=0)


def test_two_processes_find_what_one_does_also_after_one_of_them_failed(whole, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    done = subprocess.run([*command, str(tmp_path), "failing"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = dataclasses.replace(whole[1], seconds=0).to_json()
    errors = (
        ["process 1 failed: ValueError: no tests", "process 1 failed: RuntimeError: broken", "no space left"],
        ["no tests", "broken", "process 0 failed: OSError: no space left"],
    )
    for rank in range(2):
        report = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert report["result"] | {"seconds": 0} == expected
        assert report["errors"] == errors[rank] and report["kept"] == [0, 21 + 3, 42]
    assert rows_of(tmp_path) == rows_of(whole[0])


def test_an_error_leaves_all_completions_that_had_ended(model, tokenizer, tmp_path, monkeypatch):
    sample = samplers.sample_completions

    def failing(*arguments):
        yield from list(sample(*arguments))[:13]
        raise KeyboardInterrupt

    monkeypatch.setattr(samplers, "sample_completions", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, tokenizer)
    assert len(rows_of(tmp_path)) == 13


def test_a_completion_that_was_stored_without_its_verdict_is_judged(whole, model, tokenizer, tmp_path, monkeypatch):
    shutil.copy(whole[0] / "settings.json", tmp_path)
    rows = [Record(**row) for row in rows_of(whole[0])]
    for row in rows:
        judged = [] if row.document == 3 else [row]
        Records(tmp_path).append([*judged, dataclasses.replace(row, score=None, extracted=None)])
    asked = counting(monkeypatch)
    result = run(tmp_path, model, tokenizer, source="here")
    assert asked == [] and rows_of(tmp_path) == rows_of(whole[0])
    assert result.value == whole[1].value


def test_where_gold_answers_have_changed_completions_stay_and_are_judged_again(
    whole, model, tokenizer, tmp_path, monkeypatch
):
    folder, before = tmp_path / "copy", rows_of(whole[0])
    shutil.copytree(whole[0], folder)
    found = next(row["extracted"] for row in before if row["document"] == 2 and row["extracted"] and not row["score"])
    changed = make_documents().map(lambda row, n: {"a": f"#### {found}"} if n == 2 else {}, True)
    asked = counting(monkeypatch)
    result = run(folder, model, tokenizer, changed)
    after = rows_of(folder)
    assert asked == [] and [row["completion"] for row in after] == [row["completion"] for row in before]
    assert [row for row in after if row["document"] != 2] == [row for row in before if row["document"] != 2]
    for row in after[12:18]:
        right = row["extracted"] is not None and official_equal(row["extracted"], found)
        assert (row["target"], row["score"]) == (found, float(right))
    assert result.value != whole[1].value
    # A kill may leave the verdicts of another answer beside the file that has none: they do not count either.
    write_part(folder, [Record(**row) for row in after])
    write_finished(tmp_path / "other", [Record(**row | {"score": None}) for row in before])
    shutil.copy(tmp_path / "other/records.parquet", folder)
    run(folder, model, tokenizer, source="here")
    assert asked == [] and rows_of(folder) == before


def test_what_is_not_asked_for_is_not_judged(whole, model, tokenizer, tmp_path):
    shutil.copy(whole[0] / "settings.json", tmp_path)
    Records(tmp_path).append([dataclasses.replace(Record(**row), score=None) for row in rows_of(whole[0])])
    run(tmp_path, model, tokenizer, make_documents(3), samples=2)
    judged = {(row["document"], row["sample"]) for row in rows_of(tmp_path) if row["score"] is not None}
    assert judged == {(document, sample) for document in range(3) for sample in range(2)}


def test_fewer_documents_and_samples_come_first_and_more_go_on_from_them(
    whole, model, tokenizer, tmp_path, monkeypatch
):
    asked = counting(monkeypatch)
    some = run(tmp_path, model, tokenizer, limit=3, samples=2)
    assert (some.documents, some.samples, some.details["limit"]) == (3, 2, 3) and len(asked) == 6
    run(tmp_path, model, tokenizer)
    assert len(asked) == len(set(asked)) == 42
    assert rows_of(tmp_path) == rows_of(whole[0])


def test_prompts_beyond_the_context_are_wrong_and_counted(tokenizer, tmp_path):
    documents = make_documents(3).add_column("long", ["", "9 + " * 300, ""])
    documents = documents.map(lambda row: {"q": row["long"] + row["q"]})
    result = run(tmp_path, make_model(tokenizer), tokenizer, documents)
    rows = [row for row in rows_of(tmp_path) if row["document"] == 1]
    assert [(row["completion"], row["score"], row["tokens"]) for row in rows] == [("", 0.0, 0)] * 6
    assert result.details["prompts_beyond_context"] == 1
    assert result.details["share_cut_off"] == sum(row["tokens"] == 24 for row in rows_of(tmp_path)) / 18
    with pytest.raises(ValueError, match="the shortest of 3 prompts has .* tokens, and the model's context is 16"):
        run(tmp_path / "none", make_model(tokenizer, context=16), tokenizer, make_documents(3))


def test_another_model_settings_or_documents_are_refused(whole, model, tokenizer, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    with pytest.raises(ValueError, match="from a run with seed=0, not 1"):
        run(folder, model, tokenizer, seed=1)
    with pytest.raises(ValueError, match="from a run with max_new_tokens=24, not 9"):
        run(folder, model, tokenizer, max_new_tokens=9)
    other = make_model(tokenizer)
    other.lm_head.weight.data += 1
    with pytest.raises(ValueError, match="from a run with model="):
        run(folder, other, tokenizer)
    with pytest.raises(ValueError, match="completions of another prompt for document 2"):
        run(folder, model, tokenizer, make_documents().map(lambda row, n: {"q": "1" if n == 2 else row["q"]}, True))
    assert rows_of(folder) == rows_of(whole[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0 and documents=7 must be 1 or more"),
        ({"limit": 0}, "documents=0 must be 1 or more"),
        ({"documents": Dataset.from_list([{"q": "1", "b": "2"}])}, "no column 'a' .answer.; they have q, b"),
        ({"task": dataclasses.replace(TASK, temperature=0.0)}, "6 samples would be the same at temperature 0"),
        (
            {"task": dataclasses.replace(TASK, data=TaskData("none", "test", columns={"question": "q"}))},
            "its columns must name an answer or a solution",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(options, message, model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model, tokenizer, **options)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_a_chat_template_is_refused(model, tmp_path):
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="task sums asks a model that was taught to chat, and this tokenizer has no"):
        run(tmp_path, model, bare)


def math_grader(*golds: str) -> MathGrader:
    documents = Dataset.from_list([{"question": "?", "answer": gold} for gold in golds])
    return grader_of(TASKS["gsm8k"], documents)


GOLDS = [
    "18", r"so \boxed{\frac{3}{4}}", "#### 1,234", r"$\boxed{(2, 5]}$", r"\boxed{x^2 + 1}", r"\boxed{\text{even}}",
    r"\boxed{2\sqrt{3}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", "#### -7",
]  # fmt: skip


def test_gold_answers_are_right_and_other_ones_wrong():
    grader = math_grader(*GOLDS)
    for document in range(len(GOLDS)):
        for other in range(len(GOLDS)):
            found, score = grader.judge(document, rf"Hence \boxed{{{grader.target(other)}}}.")
            assert found is not None and score == float(document == other), (document, other)
    assert grader.unreadable() == 0 and math_grader("", "18").unreadable() == 1


def test_an_answer_of_which_the_rules_leave_nothing_is_counted_and_no_silence_is_right():
    grader = math_grader(r"on \boxed{\mbox{Saturday}}")
    assert grader.unreadable() == 1
    assert grader.judge(0, "I cannot tell.") == (None, 0.0)


@pytest.mark.parametrize(
    "completion, extracted, score",
    [
        ("", None, 0.0),
        ("I do not know.", None, 0.0),
        ("She makes 9 * 2 = 18 dollars.", "18", 1.0),  # no box: the last number
        ("The answer is 18.", "18", 1.0),
        (r"\boxed{17} no, \boxed{18}", "18", 1.0),  # the last of two boxes
        (r"\boxed{18} or \boxed{17}", "17", 0.0),
        (r"\boxed{18 \text{ dollars}}", "18", 1.0),
        (r"\boxed{\$18.00}", "18", 1.0),
        (r"\boxed{18 eggs}", "18", 1.0),
        (r"\boxed{18}. I hope that helps you with 3 things!", "18", 1.0),
        ("```python\nprint(9 * 2)\n```\nThe output is 18", "18", 1.0),
        ("```\n\\boxed{18}\n```", "18", 1.0),
        (r"<think>Is it 17? So \boxed{18}", "18", 1.0),  # never closed
        ("<think>9 * 2 = 18, and 16 - 3", "3", 0.0),
        (r"<think>\boxed{17}</think>It is \boxed{18}", "18", 1.0),
        (r"\boxed{18", "18", 1.0),  # cut off within the box
        (r"\boxed{}", None, 0.0),
        ("18" * 50_000, None, None),
    ],
)
def test_what_completions_usually_do_wrong(completion, extracted, score):
    found, verdict = math_grader("#### 18").judge(0, completion)
    if score is None:
        assert verdict == 0.0
    else:
        assert (found, verdict) == (extracted, score)


def test_a_machine_that_cannot_confine_code_is_refused_at_once(model, tokenizer, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise SandboxError("this machine cannot confine code")

    monkeypatch.setattr("mobilellm_hf.evaluation.graders.run_code", refuse)
    columns = TASKS["livecodebench"].data.columns
    with pytest.raises(ValueError, match="task livecodebench runs the model's code: this machine cannot confine code"):
        run(tmp_path, model, tokenizer, Dataset.from_list([dict.fromkeys(columns, "")]), TASKS["livecodebench"])
