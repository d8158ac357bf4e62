"""The suites against the paper's tables, and names that there are not."""

import re
import string

import pytest

from mobilellm_hf.evaluation.lm_eval_tasks import FOLDER
from mobilellm_hf.evaluation.paper_tables import PAPER_ROWS, rows_near
from mobilellm_hf.evaluation.suites import SUITES, TASKS, LmEvalTask, SampledTask, find_tasks

# Table 8 and 9, typed a second time from the paper: of each table rows from every group, whole.
TABLE_8 = """
SmolLM2-135M | 135M | 0.4 | 1.8 | 3.8 | 0.0 | 50.7 | –
MobileLLM-R1-140M-base | 140M | 4.6 | 16.3 | 5.4 | 15.9 | 44.3 | –
MobileLLM-R1-360M-base | 359M | 13.4 | 39.4 | 20.8 | 32.9 | 51.0 | 26.8
Qwen2.5-0.5B | 494M | 14.8 | 41.8 | 29.6 | 28.1 | 52.3 | 47.5
MobileLLM-R1-950M-base | 949M | 26.8 | 61.6 | 39.2 | 46.3 | 58.6 | 47.4
Gemma-3-1B-pt | 1.00B | 0.6 | 2.4 | 9.4 | 6.1 | 57.3 | 26.1
Qwen3-1.7B-Base | 2.03B | 38.5 | 76.2 | 56.4 | 47.6 | 60.9 | 62.1
"""
TABLE_9 = """
MobileLLM-R1-140M | 140M | 6.2 | 4.1 | – | – | 1.7
Gemma-3-270M-it | 268M | 6.8 | 8.4 | – | – | 0.0
MobileLLM-R1-360M | 359M | 28.4 | 24.5 | – | – | 5.1
Qwen3-0.6B | 596M | 73.0 | 79.2 | 11.3 | 17.0 | 14.9
MobileLLM-R1-950M | 949M | 74.0 | 67.5 | 15.5 | 16.3 | 19.9
DeepSeek-R1-Distill-Qwen-1.5B | 1.54B | 83.2 | 77.3 | 29.1 | 23.4 | 19.9
Qwen3-1.7B | 2.03B | 89.4 | 90.3 | 47.0 | 37.0 | 29.8
"""
SHOTS = {"math500_4shot": 4, "gsm8k_8shot": 8, "mbpp": 3, "humaneval": 0, "mmlu": 5}


@pytest.mark.parametrize(("suite", "printed", "count"), [("base", TABLE_8, 14), ("reasoning", TABLE_9, 16)])
def test_rows_are_those_of_the_paper(suite, printed, count):
    rows = {row.name: row for row in PAPER_ROWS[suite]}
    assert len(rows) == count
    for line in printed.strip().splitlines():
        name, size, *values = (cell.strip() for cell in line.split("|"))
        assert rows[name].millions == round(float(size[:-1]) * (1000 if size[-1] == "B" else 1))
        assert list(rows[name].values.values()) == [None if value == "–" else float(value) for value in values], name


def test_models_stand_beside_those_of_their_size():
    names = [row.name for row in rows_near("base", 140_248_512)]
    assert names == ["SmolLM2-135M", "MobileLLM-R1-140M-base"]
    assert [row.name for row in rows_near("reasoning", 949_685_760)] == [
        "Qwen2.5-0.5B-Instruct", "Qwen3-0.6B", "MobileLLM-R1-950M",
    ]  # fmt: skip
    assert len(rows_near("base", 5_000_000_000)) == 6 and rows_near("base", 1_000) == rows_near("base", 149_000_000)
    assert "SmolLM2-360M" in [row.name for row in rows_near("base", 150_000_000)]


def test_columns_are_tasks_with_the_papers_shots_and_samples():
    for suite in SUITES.values():
        assert [name for names in suite.columns.values() for name in names] == list(suite.tasks)
    assert set(SUITES["base"].tasks).isdisjoint(SUITES["reasoning"].tasks)
    base = SUITES["base"].tasks.values()
    assert all(isinstance(task, LmEvalTask) and task.shots == SHOTS.get(task.name, 0) for task in base)
    assert len(SUITES["base"].columns["CommonSense"]) == 8
    samples = {name: task.samples for name, task in SUITES["reasoning"].tasks.items()}
    assert samples == {"math500": 1, "gsm8k": 1, "aime24": 64, "aime25": 64, "livecodebench": 16}
    for task in SUITES["reasoning"].tasks.values():
        assert isinstance(task, SampledTask) and (task.temperature, task.top_p) == (0.6, 0.95)
        fields = {field for _, field, _, _ in string.Formatter().parse(task.prompt) if field}
        assert fields and fields <= task.data.columns.keys() and task.max_new_tokens == 30_000


def test_lm_eval_has_every_task_with_that_metric_filter_and_data_set():
    for task in SUITES["base"].tasks.values():
        files = sorted(FOLDER.glob(task.config))
        assert len(files) == (57 if task.name == "mmlu" else 1)
        text = _with_includes(files[0])
        assert f"dataset_path: {task.data.hub_id}" in text, task.name
        assert task.data.subset is None or f"dataset_name: {task.data.subset}" in text
        assert task.code or f"metric: {task.metric}" in text
        assert "metric: acc_norm" not in text or task.metric == "acc_norm"
        assert task.filter == "none" or re.search(rf'name: "?{task.filter}"?', text)
        assert re.search(rf"(test|validation)_split: {task.data.split}", text)


def _with_includes(file) -> str:
    text = file.read_text()
    included = re.search(r'"?include"?: "?([\w./-]+)', text)
    return text if included is None else text + _with_includes(file.parent / included[1])


def test_revisions_are_commits():
    revisions = {task.data.hub_id: task.data.revision for task in TASKS.values()}
    assert [name for name, revision in revisions.items() if revision is None] == ["lighteval/siqa"]
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in revisions.values() if revision)


def test_splits_have_the_sizes_that_are_known():
    """Typed a second time, from the cards of the data sets."""
    sizes = {
        "math500": 500, "gsm8k": 1319, "mbpp": 500, "humaneval": 164, "arc_easy": 2376, "arc_challenge": 1172,
        "boolq": 3270, "piqa": 1838, "social_iqa": 1954, "hellaswag": 10042, "openbookqa": 500, "winogrande": 1267,
        "mmlu": 14042, "aime24": 30, "aime25": 30, "livecodebench": 1055, "math500_4shot": 500, "gsm8k_8shot": 1319,
    }  # fmt: skip
    assert {name: task.data.documents for name, task in TASKS.items()} == sizes


def test_math500_is_not_read_from_a_file_of_all_of_math():
    assert TASKS["math500"].data.files == TASKS["math500_4shot"].data.files == ("math500",)


def test_tasks_are_found_once_in_order():
    assert [task.name for task in find_tasks(["reasoning"], ["mmlu", "gsm8k", "mmlu"])] == [
        "math500", "gsm8k", "aime24", "aime25", "livecodebench", "mmlu",
    ]  # fmt: skip
    assert find_tasks([], []) == []


@pytest.mark.parametrize(
    ("suites", "tasks", "message"),
    [
        (["bse"], [], "there is no suite 'bse'; there are base, reasoning. Did you mean base?"),
        ([], ["gsm8"], "there is no task 'gsm8'; there are math500_4shot, .*Did you mean gsm8k?"),
        ([], ["xyzzy"], "there is no task 'xyzzy'; there are [^?]*$"),
        ([], ["gsm8", "xyzzy", "piqua", "piqa"], r"are no tasks 'gsm8', 'xyzzy', 'piqua'; .*mean gsm8k, piqa\?$"),
        (["bse"], ["gsm8"], "there is no suite 'bse'.*Did you mean base.*; there is no task 'gsm8'"),
    ],
)
def test_names_that_there_are_not_are_refused_with_the_nearest(suites, tasks, message):
    with pytest.raises(ValueError, match=message):
        find_tasks(suites, tasks)
