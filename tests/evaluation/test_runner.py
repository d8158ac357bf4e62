"""Whole evaluations of a tiny model: what a folder gets, what is refused, what goes wrong, and a kill."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_cases import DOCUMENTS, GOLD, GivenLM, make_model, write_data
from rich.console import Console

from mobilellm_hf.evaluation import models
from mobilellm_hf.evaluation.arguments import EvaluationArguments
from mobilellm_hf.evaluation.models import Evaluated
from mobilellm_hf.evaluation.records import read_records
from mobilellm_hf.evaluation.runner import run_evaluation
from mobilellm_hf.evaluation.suites import SUITES, TASKS


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data")
    make_model(folder / "model")
    make_model(folder / "chat", chat=True)
    return folder


def arguments(place: Path, out: Path, **fields) -> EvaluationArguments:
    given = {"model": str(place / "model"), "data_dir": str(place / "data"), "output_dir": str(out)}
    return EvaluationArguments(**{**given, "max_new_tokens": 16, **fields})


def run(args: EvaluationArguments, **options) -> tuple[object, str]:
    text = io.StringIO()
    found = run_evaluation(args, Console(file=text, width=200), **options)
    return found, text.getvalue()


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_a_suite_leaves_values_records_a_table_and_a_picture(place, tmp_path):
    evaluation, shown = run(arguments(place, tmp_path, suite=["base"]))
    found = results(tmp_path)
    assert list(found["tasks"]) == list(SUITES["base"].tasks) == list(evaluation.results) and not evaluation.errors
    for name, result in found["tasks"].items():
        assert result["documents"] == (115 if name == "mmlu" else len(DOCUMENTS[name]))
        assert 0 <= result["value"] <= 1 and result["seconds"] > 0 and str(place / "data") in result["source"]
    records = read_records(tmp_path / "records")
    assert set(DOCUMENTS) < set(records["task"]) and None not in records["score"][:]
    assert found["model"]["parameters"] > 1000 and found["model"]["dtype"] == "float32"
    assert found["versions"].keys() >= {"lm_eval", "torch", "mobilellm_hf"}
    assert (tmp_path / "base.png").read_bytes()[:4] == b"\x89PNG" and not (tmp_path / "reasoning.png").exists()
    table = shown[shown.index("Table 8") :]
    assert all(column in table for column in SUITES["base"].columns) and "MobileLLM-R1-140M-base" in table
    mean = sum(found["tasks"][name]["value"] for name in SUITES["base"].columns["CommonSense"]) / 8
    row = next(line for line in table.splitlines() if "│ model " in line)  # the name of the folder
    ours = [cell.strip() for cell in row.split("│")[2:-1]]
    marked = [cell.endswith("*") for cell in ours]
    assert ours[4] == f"{100 * mean:.1f}*" and marked == [True] * 6  # and all are over few documents
    assert "own_max_new_tokens" not in found["tasks"]["mmlu"]["details"]


def test_a_chat_model_is_sampled_and_few_shot_tasks_can_be_conversations(place, tmp_path):
    fields = {"model": str(place / "chat"), "limit": 2, "samples": 3, "tasks": ["math500", "gsm8k_8shot"]}
    evaluation, shown = run(arguments(place, tmp_path, apply_chat_template=True, **fields))
    sampled, few_shot = evaluation.results["math500"], evaluation.results["gsm8k_8shot"]
    assert (sampled.documents, sampled.samples, sampled.metric) == (2, 3, "pass@1")
    assert few_shot.details["chat_template"] and "chat_template" not in sampled.details
    assert sampled.details["limit"] == few_shot.details["limit"] == 2
    assert "2 of 500 x 3*" in shown and "2 of 1,319*" in shown
    prompts = {row["task"]: row["prompt"] for row in read_records(tmp_path / "records")}
    assert prompts["gsm8k_8shot"].count("<|start_header_id|>user") == 9
    assert prompts["math500"].count("<|start_header_id|>user") == 1 and "\\boxed{}" in prompts["math500"]


def test_finished_tasks_are_not_run_again_and_others_join_them(place, tmp_path, monkeypatch):
    run(arguments(place, tmp_path, tasks=["piqa"]))
    before = results(tmp_path)["tasks"]["piqa"]
    asked = []
    monkeypatch.setattr(models.HFLM, "loglikelihood", lambda self, requests, **_: asked.append(requests))
    run(arguments(place, tmp_path, tasks=["piqa"]))
    monkeypatch.undo()
    run(arguments(place, tmp_path, tasks=["boolq"]))
    found = results(tmp_path)["tasks"]
    assert not asked and set(found) == {"piqa", "boolq"} and found["piqa"] == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 8}, "gsm8k_8shot/settings.json is from a run with max_new_tokens=16, not 8"),
        ({"model": "chat"}, "settings.json is from a run with identity='model .*, not 'chat "),
        ({"dtype": "bfloat16"}, "settings.json is from a run with dtype='float32', not 'bfloat16'"),
    ],
)
def test_a_folder_of_another_run_is_refused(fields, message, place, tmp_path):
    run(arguments(place, tmp_path, tasks=["gsm8k_8shot"]))
    before = (tmp_path / "results.json").read_text()
    if "model" in fields:
        fields = {"model": str(place / fields["model"])}
    with pytest.raises(ValueError, match=message):
        run(arguments(place, tmp_path, tasks=["gsm8k_8shot"], **fields))
    assert (tmp_path / "results.json").read_text() == before


def test_a_task_of_another_setting_stops_no_other(place, tmp_path):
    """What the setting does not touch is not refused either: texts are rated whatever a completion may have."""
    run(arguments(place, tmp_path, tasks=["gsm8k_8shot", "piqa"]))
    text = io.StringIO()
    args = arguments(place, tmp_path, tasks=["gsm8k_8shot", "piqa", "humaneval"], max_new_tokens=8)
    with pytest.raises(ValueError, match=r"1 of 3 tasks failed \(gsm8k_8shot\)"):
        run_evaluation(args, Console(file=text, width=200))
    found = results(tmp_path)["tasks"]
    assert "is from a run with max_new_tokens=16, not 8" in found["gsm8k_8shot"]["error"]
    assert found["humaneval"]["details"]["own_max_new_tokens"] == 8 and found["piqa"]["value"] >= 0
    assert "not run: gsm8k_8shot: " in text.getvalue() and "│ gsm8k_8shot" not in text.getvalue()


def test_an_earlier_result_of_a_task_that_cannot_be_planned_is_neither_shown_nor_kept(place, tmp_path):
    data = write_data(tmp_path / "data")
    run(arguments(place, tmp_path / "out", tasks=["piqa", "boolq"], data_dir=str(data)))
    (data / "boolq_validation.jsonl").rename(tmp_path / "away")
    text = io.StringIO()
    with pytest.raises(ValueError, match=r"1 of 2 tasks failed \(boolq\)"):
        run_evaluation(
            arguments(place, tmp_path / "out", tasks=["piqa", "boolq"], data_dir=str(data)), Console(file=text)
        )
    assert "error" in results(tmp_path / "out")["tasks"]["boolq"] and "│ boolq" not in text.getvalue()
    (tmp_path / "away").rename(data / "boolq_validation.jsonl")
    evaluation, shown = run(arguments(place, tmp_path / "out", tasks=["boolq"], data_dir=str(data)))
    assert list(evaluation.results) == ["piqa", "boolq"] and "│ boolq" in shown


def given_model(answers: list):
    """A loader of a model that is but an LM."""

    def load(name: str, *, tokenizer, **_) -> Evaluated:
        return Evaluated(name, "given 1", 140, 2048, GivenLM(answers), None, tokenizer)

    return load


def test_another_kind_of_model_does_the_tasks_of_lm_eval(place, tmp_path):
    args = arguments(place, tmp_path, model=str(place / "chat"), tasks=["math500", "gsm8k_8shot"])
    with pytest.raises(ValueError, match=r"1 of 2 tasks failed \(math500\)"):
        run(args, load=given_model(GOLD["gsm8k_8shot"]))
    found = results(tmp_path)
    assert found["tasks"]["gsm8k_8shot"]["value"] == 1.0 and found["model"]["identity"] == "given 1"
    assert re.match("math500: .*chat has no sampler", found["tasks"]["math500"]["error"])
    args.tasks = ["math500"]
    with pytest.raises(ValueError, match="none of the tasks can be run: math500: "):
        run(args, load=given_model([]))


@pytest.fixture
def hub(place, tmp_path, monkeypatch):
    """A cache of the Hub with a model, whose branch has two commits, and a tokenizer with one of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for repository, commit in (("model", "a" * 40), ("model", "b" * 40), ("tokenizer", "c" * 40)):
        folder = tmp_path / f"hub/models--someone--{repository}"
        shutil.copytree(place / "model", folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs/main").write_text(commit)
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_told_by_its_commit(place, tmp_path, hub):
    args = arguments(place, tmp_path / "out", model="someone/model", tasks=["piqa"])
    run(args)
    assert results(tmp_path / "out")["model"]["identity"] == f"someone/model@{'b' * 40}"
    (hub / "models--someone--model/refs/main").write_text("a" * 40)
    with pytest.raises(ValueError, match="is from a run with identity='someone/model@bbb"):
        run(args)


def test_the_revision_is_the_models_and_not_that_of_another_tokenizer(place, tmp_path, hub):
    args = arguments(place, tmp_path / "out", model="someone/model", tasks=["piqa"], model_revision="a" * 40)
    args.tokenizer = "someone/tokenizer"
    run(args)
    assert results(tmp_path / "out")["model"]["identity"] == f"someone/model@{'a' * 40}"


def test_other_documents_under_the_same_name_are_refused(place, tmp_path):
    data = write_data(tmp_path / "data")
    run(arguments(place, tmp_path / "out", tasks=["piqa"], data_dir=str(data)))
    file = data / "piqa_validation.jsonl"
    file.write_text(file.read_text().replace("jar", "box"))
    with pytest.raises(ValueError, match="is from a run with documents="):
        run(arguments(place, tmp_path / "out", tasks=["piqa"], data_dir=str(data)))


def test_what_cannot_be_run_is_told_and_the_rest_goes_on(place, tmp_path):
    """No template, a missing file, no room for an answer: three reasons, and one task that runs."""
    data = write_data(tmp_path / "data")
    (data / "boolq_validation.jsonl").unlink()
    model = make_model(tmp_path / "short", context=900)
    args = arguments(place, tmp_path / "out", model=str(model), data_dir=str(data), max_new_tokens=None)
    args.tasks = ["gsm8k", "boolq", "humaneval", "piqa"]
    text = io.StringIO()
    with pytest.raises(ValueError, match=r"3 of 4 tasks failed \(gsm8k, boolq, humaneval\); the others are kept"):
        run_evaluation(args, Console(file=text, width=300))
    said = text.getvalue()
    assert "gsm8k asks a model that was taught to chat, and the tokenizer has no chat template" in said
    assert re.search("boolq: .*has no boolq_validation.jsonl or boolq.jsonl .*put a copy of aps/super_glue", said)
    assert "humaneval generates up to 1,024 tokens, and the model's context has 900" in said
    found = results(tmp_path / "out")["tasks"]
    assert found["piqa"]["documents"] == 2 and all("error" in found[name] for name in ("gsm8k", "boolq", "humaneval"))


@pytest.mark.parametrize("task", ["piqa", "math500"])
def test_without_a_network_the_remedy_is_named(task, place, tmp_path):
    with pytest.raises(ValueError, match=f"{task}: its documents do not load .*Without a network give data_dir, with"):
        run(arguments(place, tmp_path / "out", model=str(place / "chat"), tasks=[task], data_dir=None))


def test_nothing_that_can_be_run_is_an_error_before_the_model_is_loaded(place, tmp_path):
    with pytest.raises(ValueError, match="none of the tasks can be run: math500 asks a model .*; gsm8k asks"):
        run(arguments(place, tmp_path / "out", tasks=["math500", "gsm8k"]), load=None)
    assert not (tmp_path / "out").exists()


def test_a_task_that_fails_stops_no_other(place, tmp_path, monkeypatch):
    class Broken(GivenLM):
        def loglikelihood(self, requests, disable_tqdm=False):
            raise RuntimeError("the fan stopped")

    run(arguments(place, tmp_path, tasks=["piqa"], limit=1))  # whose result does not stand for the others
    monkeypatch.setattr(models, "make_lm", lambda *_: Broken(GOLD["gsm8k_8shot"]))
    text = io.StringIO()
    with pytest.raises(ValueError, match=r"1 of 2 tasks failed \(piqa\)"):
        run_evaluation(arguments(place, tmp_path, tasks=["piqa", "gsm8k_8shot"]), Console(file=text, width=200))
    found = results(tmp_path)["tasks"]
    assert found["gsm8k_8shot"]["value"] == 1.0 and found["piqa"]["error"].startswith(
        "RuntimeError: the fan stopped\n"
    )
    assert "Traceback" in found["piqa"]["error"] and "piqa failed: RuntimeError: the fan stopped\n" in text.getvalue()
    assert "│ gsm8k_8shot" in text.getvalue() and "│ piqa" not in text.getvalue()
    monkeypatch.undo()
    run(arguments(place, tmp_path, tasks=["piqa", "gsm8k_8shot"]))
    assert (
        results(tmp_path)["tasks"]["piqa"]["documents"] == 2
        and results(tmp_path)["tasks"]["gsm8k_8shot"]["value"] == 1.0
    )


def test_a_machine_that_confines_nothing_runs_no_code(place, tmp_path, monkeypatch):
    monkeypatch.setattr("mobilellm_hf.rewards.sandbox.available_layers", frozenset)
    with pytest.raises(ValueError, match="humaneval runs code that the model wrote, and this machine cannot confine"):
        run(arguments(place, tmp_path, tasks=["humaneval"]))
    evaluation, _ = run(arguments(place, tmp_path, tasks=["humaneval"], allow_unconfined=True))
    assert evaluation.results["humaneval"].documents == 2


def test_a_dry_run_says_what_would_be_asked_of_what(place, tmp_path):
    args = arguments(place, tmp_path / "out", tasks=["arc_easy", "gsm8k_8shot", "mmlu"], dry_run=True)
    found, shown = run(args, load=None)
    lines = {line.split("│")[1].strip(): line.split("│")[4:6] for line in shown.splitlines() if line.startswith("│")}
    assert found is None and not (tmp_path / "out").exists()
    counts = {name: tuple(int(cell) for cell in cells) for name, cells in lines.items()}
    assert counts == {"arc_easy": (3, 12), "gsm8k_8shot": (3, 3), "mmlu": (115, 460)}
    args = arguments(place, tmp_path, model=str(place / "chat"), tasks=["math500"], samples=5, limit=2, dry_run=True)
    assert re.search(r"│ n=5, T=0.6, top_p=0.95 │.*│ +2 │ +10 │", run(args)[1])


def test_a_dry_run_cuts_nothing_and_fails_where_the_run_would(place, tmp_path):
    args = arguments(place, tmp_path / "out", tasks=["arc_challenge", "math500"], dry_run=True)
    text = io.StringIO()
    with pytest.raises(ValueError, match=r"1 of 2 tasks cannot be run \(math500\)"):
        run_evaluation(args, Console(file=text, width=80), load=None)
    lines = [line.split("│")[1:-1] for line in text.getvalue().splitlines() if line.startswith("│")]
    assert "".join(line[2].strip() for line in lines if line[2].strip() != "not run") == str(
        place / "data/arc_challenge_test.jsonl"
    )
    assert [line[0].strip() for line in lines if line[0].strip()] == ["arc_challenge", "math500"]
    args.tasks = ["math500"]
    with pytest.raises(ValueError, match="none of the tasks can be run: math500 asks"):
        run(args, load=None)
    assert not (tmp_path / "out").exists()


def test_the_last_lines_name_what_was_written_and_what_is_not_for_the_hub(place, tmp_path):
    _, shown = run(arguments(place, tmp_path, tasks=["arc_easy", "mmlu"], limit=1))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"settings.json", "results.json", "records", "base.png"}
    assert f"{tmp_path}: results.json, records/, base.png\n" in shown
    assert "not among the files for the Hub: arc_easy: 1 documents of 2,376, a local copy of allenai/ai2_arc" in shown
    assert "; mmlu: 57 documents of 14,042" in shown
    _, shown = run(arguments(place, tmp_path / "two", tasks=["arc_easy"]))  # one of CommonSense's eight
    assert f"{tmp_path / 'two'}: results.json, records/\n" in shown


def test_a_model_that_sees_ends_of_prompts_only_gets_no_value(place, tmp_path):
    model = make_model(tmp_path / "short", context=600)
    _, shown = run(arguments(place, tmp_path / "out", model=str(model), tasks=["gsm8k_8shot", "mmlu"]))
    row = next(line for line in shown.splitlines() if "│ gsm8k_8shot" in line)
    assert [cell.strip() for cell in row.split("│")[3:6]] == ["–", "–", "3 of 1,319*‡"]
    assert "no prompt fits the context: no value" in shown and "–*‡" in shown
    details = results(tmp_path / "out")["tasks"]["mmlu"]["details"]
    assert details["prompts"] == 460 and "truncated_prompts" not in details


def test_suites_and_tasks_are_listed_without_a_model():
    _, shown = run(EvaluationArguments(list_tasks=True))
    assert all(name in shown for suite in SUITES.values() for name in suite.tasks)
    assert "mmlu_test.jsonl and mmlu_dev.jsonl" in shown and "siqa_validation.jsonl" in shown
    assert "6e4ed1a2a79a" in shown and "none pinned" in shown and "n=64, T=0.6, top_p=0.95" in shown


@pytest.mark.parametrize("width", [40, 80])
def test_names_of_tasks_are_listed_whole_in_a_narrow_terminal(width):
    text = io.StringIO()
    run_evaluation(EvaluationArguments(list_tasks=True), Console(file=text, width=width))
    cells = [line.split("│")[1].strip() for line in text.getvalue().splitlines() if line.startswith("│")]
    assert set(TASKS) <= set(cells) and "…" not in text.getvalue()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "model: name the model"),
        ({}, "suite: name one or more of base, reasoning, or tasks"),
        ({"suite": ["bas"]}, "Did you mean base"),
        ({"tasks": ["humanevel"]}, "Did you mean humaneval"),
        ({"tasks": ["piqa"], "limit": 0}, "limit=0 must be 1 or more"),
        ({"tasks": ["piqa"], "samples": -1}, "samples=-1 must be 1 or more"),
        ({"tasks": ["piqa"], "batch_size": 0}, "batch_size=0"),
        ({"tasks": ["piqa"], "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"tasks": ["piqa"], "seed": -1}, "seed=-1 must be 0 or more"),
        ({"tasks": ["piqa"], "dtype": "float8"}, "dtype='float8' must be one of auto, float32"),
        ({"tasks": ["piqa"], "data_dir": "nowhere"}, "data_dir='nowhere' is no folder"),
        ({"tasks": ["piqa"], "revisions": ["piqa"]}, "revisions: 'piqa' must be written TASK=COMMIT"),
        ({"tasks": ["piqa"], "revisions": ["piqua=abc"]}, "there is no task 'piqua'.*Did you mean piqa"),
        ({"tasks": ["piqa"], "revisions": ["a=b", "c=d"]}, "there are no tasks 'a', 'c'"),
        ({"tasks": ["piqa"], "model": "runs/no/model"}, "model: the folder runs/no/model does not exist"),
        ({"tasks": ["piqa"], "tokenizer": "/no/where"}, "tokenizer: the folder /no/where does not exist"),
        ({"tasks": ["piqa"], "model": "no/model"}, "tokenizer: no/model is no folder or Hub model that loads"),
    ],
)
def test_bad_arguments_are_refused_by_name(fields, message, place, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(arguments(place, tmp_path / "out", **fields))
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_killed_goes_on_and_asks_nothing_twice(place, tmp_path):
    (tmp_path / "model").symlink_to(place / "model")
    (tmp_path / "data").symlink_to(place / "data")
    whole = arguments(tmp_path, tmp_path / "whole", tasks=["gsm8k_8shot", "math500_4shot"], batch_size=2)
    run(whole)
    worker = [sys.executable, str(Path(__file__).with_name("evaluation_worker.py")), str(tmp_path), "3"]
    done = subprocess.run(
        worker, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.split() == [str(-signal.SIGKILL), "0"], done.stderr
    first, second = (json.loads((tmp_path / f"asked-{number}.json").read_text()) for number in range(2))
    # Two batches of GSM8K's three documents and the first of MATH's four; the second was under way.
    assert len(first) == 3 + 2 and len(second) == 2 and not set(first) & set(second)
    unbroken, killed = (read_records(tmp_path / name / "records").to_list() for name in ("whole", "killed"))
    assert killed == unbroken and len(killed) == 7
    values = [
        {name: (task["value"], task["stderr"]) for name, task in results(tmp_path / folder)["tasks"].items()}
        for folder in ("whole", "killed")
    ]
    assert values[0] == values[1]
