"""What results come to in a column, and how tables, pictures and the Hub's files have them."""

import io
import math
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from matplotlib import image
from rich.console import Console

from mobilellm_hf.evaluation.metadata import card_results, hub_entries, why_not_public, write_metadata
from mobilellm_hf.evaluation.plots import plot_suite
from mobilellm_hf.evaluation.results import TaskResult, column_value, is_measured, is_whole, legend, shortfalls
from mobilellm_hf.evaluation.suites import SUITES, TASKS
from mobilellm_hf.evaluation.tables import suite_table, tasks_table
from mobilellm_hf.training.pass_rate import wilson_interval

PINNED = "allenai/openbookqa@388097ea7776314e93a529163e0fea805b8a6454"
BABER = f"baber/piqa@{'a' * 40}"


def at(task: str) -> str:
    return f"{TASKS[task].data.hub_id}@{TASKS[task].data.revision}"


def result(task: str, value: float, stderr: float | None = 0.02, source: str = PINNED, **fields) -> TaskResult:
    given = {"metric": "acc", "documents": TASKS[task].data.documents, "samples": 1, "seconds": 1.0, "details": {}}
    return TaskResult(task=task, value=value, stderr=stderr, source=source, **given | fields)


def test_a_result_comes_back_from_json():
    one = result("piqa", 0.5, details={"limit": 3, "metrics": {"acc,none": 0.5}})
    assert TaskResult.from_json(one.to_json()) == one


def test_a_column_of_one_task_has_wilsons_interval():
    column = column_value([result("piqa", 0.25, documents=200)])
    assert (column.low, column.high) == wilson_interval(50, 200) and str(column) == "25.0*\n19.5-31.4"
    assert column_value([result("piqa", 0.25)]).marks == ""
    for value in (0.0, 1.0):
        column = column_value([result("piqa", value, 0.0, documents=7)])
        assert column.low <= value <= column.high and column.high - column.low > 0.3


def test_a_column_of_several_is_their_mean_with_the_error_of_a_mean():
    column = column_value([result("piqa", 0.6, 0.03), result("boolq", 0.4, 0.04, details={"limit": 5}, documents=9)])
    half = 1.959964 * math.sqrt(0.03**2 + 0.04**2) / 2
    assert column.value == 0.5 and column.marks == "*" and column.low == pytest.approx(0.5 - half)
    assert column.high == pytest.approx(0.5 + half) and str(column).startswith("50.0*\n")
    for error in (None, 0.0):  # not defined; and all alike, which tells of no error
        column = column_value([result("piqa", 0.6, 0.03), result("boolq", 0.4, error)])
        assert column.low is None and str(column) == "50.0"


def printed(table) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue().splitlines()


def test_a_column_needs_all_of_its_tasks():
    suite = SUITES["base"]
    found = {name: result(name, 0.5) for name in suite.columns["CommonSense"]}
    lines = printed(suite_table(suite, "mine", 140_000_000, found))
    ours = [cell.strip() for cell in next(line for line in lines if "│ mine" in line).split("│")[1:-1]]
    assert ours == ["mine", "", "", "", "", "50.0", ""]
    assert [cell.strip() for cell in next(line for line in lines if "SmolLM2-135M" in line).split("│")[2:-1]] == [
        "0.4", "1.8", "3.8", "0.0", "50.7", "–",
    ]  # fmt: skip
    del found["piqa"]
    assert not any("50.0" in line for line in printed(suite_table(suite, "mine", 140_000_000, found)))


def test_partial_results_are_marked():
    partial = {"piqa": result("piqa", 0.5, documents=9, samples=2, details={"limit": 9})}
    lines = printed(tasks_table(partial))
    assert any("9 of 1,838 x 2*" in line for line in lines) and any(
        "* not the whole benchmark" in line for line in lines
    )
    assert not any("*" in line for line in printed(tasks_table({"piqa": result("piqa", 0.5)})))


def test_a_standard_error_that_says_nothing_is_not_shown():
    for error in (0.0, None):
        (line,) = (line for line in printed(tasks_table({"piqa": result("piqa", 0.0, error)})) if "piqa" in line)
        assert [cell.strip() for cell in line.split("│")[3:6]] == ["0.00", "–", "1,838"]
    (line,) = (line for line in printed(tasks_table({"piqa": result("piqa", 0.5, 0.004)})) if "piqa" in line)
    assert "0.40" in line and "–" not in line


def test_what_a_result_lacks_is_told():
    assert shortfalls(result("arc_easy", 1.0)) == [] and not why_not_public(result("piqa", 0.5, source=BABER))
    assert shortfalls(result("arc_easy", 1.0, documents=3)) == ["3 documents of 2,376"]
    assert shortfalls(result("math500_4shot", 1.0, documents=5_000)) == ["5,000 documents of 500"]
    first = result("math500_4shot", 1.0, documents=500, details={"limit": 500})  # of a file of 5,000
    assert "first 500 documents of more" in shortfalls(first)[0] and not is_whole(first)
    fields = {"documents": 2, "samples": 4, "details": {"own_max_new_tokens": 1_600}}
    assert shortfalls(result("aime24", 0.1, **fields)) == [
        "2 documents of 30", "4 samples of 64", "completions of 1,600 tokens at most",
    ]  # fmt: skip
    assert why_not_public(result("piqa", 0.5, source="/x/piqa.jsonl")) == "a local copy of baber/piqa"
    assert why_not_public(result("piqa", 0.5, source="baber/piqa@main")) == "no commit of baber/piqa was named"
    odd = f"/home/me/openbookqa@{'a' * 40}"  # a path that looks like a commit
    assert why_not_public(result("openbookqa", 0.5, source=odd)) == "a local copy of allenai/openbookqa"


@pytest.mark.parametrize("split", [1, 2])
def test_where_no_prompt_fits_there_is_no_value(split, tmp_path):
    """Nor where that is so of one task of a column's eight."""
    names = SUITES["base"].columns["CommonSense"] if split == 2 else ("mmlu",)
    found = {name: result(name, 0.25) for name in names}
    last = names[-1]
    details = {"prompts": 8, "truncated_prompts": 8}
    found[last] = result(last, 0.25, details=details)
    assert not is_measured(found[last]) and is_measured(result(last, 0.25, details=details | {"prompts": 9}))
    column = column_value(list(found.values()))
    assert (column.value, column.low, str(column)) == (None, None, "–‡")
    assert hub_entries({last: found[last]}) == {} and "no prompt fits the context" in why_not_public(found[last])
    lines = printed(tasks_table(found))
    (line,) = (line for line in lines if f"│ {last} " in line)
    assert [cell.strip() for cell in line.split("│")[3:5]] == ["–", "–"] and "25.00" not in line
    assert any("‡ no prompt fits the context, so there is no value" in line for line in lines)
    assert any("–‡" in line for line in printed(suite_table(SUITES["base"], "mine", 140_000_000, found)))
    assert plot_suite(SUITES["base"], "mine", 140_000_000, found, tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("one", "marks"),
    [
        (result("aime24", 0.5, samples=64), ""),
        (result("aime24", 0.5, samples=2), "*"),
        (result("aime24", 0.5, samples=64, details={"limit": 2}), "*"),
        (result("aime24", 0.5, samples=64, documents=29), "*"),
        (result("math500", 0.5, documents=5_000), "*"),
        (result("gsm8k_8shot", 0.5, details={"prompts": 1_319, "truncated_prompts": 1_319}), "‡"),
        (result("gsm8k_8shot", 0.5, details={"own_max_new_tokens": 9}), "*"),
        (result("gsm8k_8shot", 0.5, details={"truncated_prompts": 7}), "†"),
        (result("aime24", 0.5, details={"prompts_beyond_context": 7}), "*†"),
        (result("math500", 0.5, details={"prompts_beyond_context": 0}), ""),
    ],
)
def test_tables_and_pictures_say_what_a_value_is_not(one, marks, tmp_path):
    suite = next(suite for suite in SUITES.values() if one.task in suite.tasks)
    for table in (tasks_table({one.task: one}), suite_table(suite, "mine", 140_000_000, {one.task: one})):
        lines = " ".join(" ".join(printed(table)).split())
        assert {"*", "†", "‡"} & set(lines) == set(marks) and f"{marks} " in lines
        assert ("not the whole benchmark: fewer or other documents" in lines) is ("*" in marks)
        assert ("some prompts do not fit the context" in lines) is ("†" in marks)
    assert column_value([one]).marks == marks and is_whole(one) is ("*" not in marks)
    published = replace(one, source=f"{TASKS[one.task].data.hub_id}@{'a' * 40}")
    assert bool(card_results({one.task: published})) is not bool({"*", "‡"} & set(marks))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
        plot_suite(suite, "mine", 140_000_000, {one.task: one}, tmp_path / "picture.png")
    (panel,) = drawn[0].axes
    assert panel.get_title().rstrip("*†‡") + marks == panel.get_title()
    assert " ".join(drawn[0].get_supxlabel().split()) == legend(marks)


@pytest.mark.parametrize(("suite", "task"), [("base", "mmlu"), ("reasoning", "aime24")])
def test_a_picture_has_a_panel_a_column(suite, task, tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_suite(SUITES[suite], "mine", 140_000_000, {task: result(task, 0.0, 0.0)}, one)
    both = {task: result(task, 0.9), "gsm8k": result("gsm8k", 0.3), "gsm8k_8shot": result("gsm8k_8shot", 0.2)}
    plot_suite(SUITES[suite], "mine", 140_000_000, both, two)
    assert image.imread(two).shape[1] > image.imread(one).shape[1] > 300
    none = tmp_path / "none.png"
    assert not plot_suite(SUITES[suite], "mine", 140_000_000, {"piqa": result("piqa", 0.5)}, none)
    assert not none.exists()


def test_the_hub_gets_whole_results_of_pinned_data(tmp_path):
    found = {
        "openbookqa": result("openbookqa", 0.31234),
        "piqa": result("piqa", 0.5, source="/data/piqa.jsonl"),
        "boolq": result("boolq", 0.5, source=at("boolq"), details={"limit": 4}),
        "social_iqa": result("social_iqa", 0.4, source="lighteval/siqa@main"),
        "aime24": result("aime24", 0.1, source=at("aime24"), samples=63),
        "humaneval": result("humaneval", 0.1, source=at("humaneval"), details={"own_max_new_tokens": 32}),
        "arc_easy": result("arc_easy", 1.0, source=at("arc_easy"), documents=3),
    }
    assert list(hub_entries(found)) == ["openbookqa"]
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results/piqa.yaml").write_text("of an earlier run")
    assert write_metadata(tmp_path, "mine", found)
    assert [file.name for file in (tmp_path / ".eval_results").iterdir()] == ["openbookqa.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results/openbookqa.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/openbookqa", "main", 31.23)
    assert entry.dataset_revision == PINNED.partition("@")[2] and "0-shot, acc_norm" in entry.notes
    (listed,) = yaml.safe_load((tmp_path / "model_index.yaml").read_text())["model-index"]
    assert [entry["dataset"]["type"] for entry in listed["results"]] == ["allenai/openbookqa"]


def test_of_nothing_that_may_be_published_no_file_is_left(tmp_path):
    assert write_metadata(tmp_path, "mine", {"openbookqa": result("openbookqa", 0.3)})
    local = {"openbookqa": result("openbookqa", 0.3, source="/data/openbookqa.jsonl")}
    assert not write_metadata(tmp_path, "mine", local)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_notes_tell_of_conversations_and_of_prompts_that_did_not_fit():
    details = {"chat_template": True, "truncated_prompts": 1_200}
    found = {"openbookqa": result("openbookqa", 0.3, details=details)}
    told = "0-shot, acc_norm, as a conversation, 1,200 prompts did not fit the context"
    assert hub_entries(found)["openbookqa"].notes.startswith(f"{told}; openbookqa of")
    assert card_results(found)[0].dataset_name == f"openbookqa ({told})"


def test_a_model_card_takes_the_results(tmp_path):
    found = {"openbookqa": result("openbookqa", 0.31234), "piqa": result("piqa", 0.5, source=BABER)}
    found["boolq"] = result("boolq", 0.5, source=at("boolq"), details={"limit": 4})
    write_metadata(tmp_path, "mine", found)
    data = ModelCardData(model_name="mine", eval_results=card_results(found))
    head = yaml.safe_load(ModelCard(f"---\n{data.to_yaml()}\n---\ntext").data.to_yaml())
    assert head["model-index"] == yaml.safe_load((tmp_path / "model_index.yaml").read_text())["model-index"]
    listed = head["model-index"][0]["results"]
    assert [(entry["dataset"]["type"], entry["metrics"][0]["value"]) for entry in listed] == [
        ("allenai/openbookqa", 31.23), ("baber/piqa", 50.0),
    ]  # fmt: skip
    assert [entry["dataset"]["revision"] for entry in listed] == [PINNED.partition("@")[2], "a" * 40]
