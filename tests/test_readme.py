"""Every Python block of README runs as it is printed, but for what needs the network or a finished quickstart."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# That of the export runs in tests/export, on an exported model.
NAMES = ("load", "train", "midtrain", "reward", "curate", "score", "sample", "watch", "export", "release")
BLOCKS = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", README, re.S), strict=True))


@pytest.fixture(scope="module")
def run_block(tmp_path_factory):
    """run_block(name, *replacements) -> stdout; the train block has run before in the same folder."""
    folder = tmp_path_factory.mktemp("readme")

    def run(name: str, *replacements: tuple[str, str]) -> str:
        code = BLOCKS[name]
        for old, new in replacements:
            assert old in code
            code = code.replace(old, new)
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout

    run("train")
    run.folder = folder
    return run


def test_there_are_ten_uses():
    assert README.count("```python") == len(BLOCKS) == 10


def test_midtraining_reweighs_the_sources(run_block):
    output = run_block("midtrain")
    weights = ast.literal_eval(re.search(r"^({.*?}) {'stdlib': SourceDraw", output, re.M)[1])
    assert sum(weights.values()) == pytest.approx(1) and weights["stdlib"] != 0.5
    assert "influence/positive" in output and "distillation/kl" in output


def test_rewards_are_what_the_comments_say(run_block):
    assert run_block("reward").split("\n")[:2] == ["[1.0, 0.0]", "[1.0]"]


def test_curation_says_what_it_kept(run_block):
    output = run_block("curate")
    decisions = pq.read_table(run_block.folder / "runs/curated/4-deduplication/decisions.parquet")
    kept = set(decisions["source"].to_pylist())
    assert kept == {"python_reference", "package_descriptions"} and all(name in output for name in kept)
    assert "'code': {'python_reference': " in output


def test_what_train_saved_is_loaded_and_generates(run_block):
    assert run_block("load", ("runs/quickstart/model", "runs/train/model")).startswith("<|begin_of_text|>def __init__")


def test_scores_inside_a_training_step_are_those_of_the_scorer(run_block):
    difference = run_block("score")
    values = [abs(float(value)) for value in re.findall(r"-?\d+\.\d+e?[-+]?\d*", difference)]
    assert len(values) == 8 and max(values) < 1e-2, difference


def test_samples_of_a_prompt_are_all_there(run_block):
    lines = run_block("sample").splitlines()
    assert sorted(int(line.split()[0]) for line in lines if re.match(r"\d+ (True|False) ", line)) == [*range(64)]


def test_perplexity_is_watched_on_both_sets(run_block):
    (run_block.folder / "data").mkdir()
    tasks = [{"prompt": "def one():\n", "canonical_solution": "    return 1\n"}]
    questions = [{"question": "What is 1 + 2?", "answer": "1 + 2 = 3\n#### 3"}]
    for name, rows in (("humaneval", tasks), ("gsm8k", questions)):
        (run_block.folder / "data" / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = ast.literal_eval(run_block("watch").strip().splitlines()[-1])
    assert {"perplexity/HumanEval", "perplexity/GSM8K"} <= figures.keys() and min(figures.values()) > 0


def test_release_writes_the_twin_and_a_page(run_block):
    output = run_block("release")
    assert '"llama4_text"' in (run_block.folder / "runs/train/llama4/config.json").read_text()
    assert Path(output.strip().splitlines()[-1]).name == "card.html"
