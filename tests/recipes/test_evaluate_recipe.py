"""recipes/evaluate.py as a command: its exit status, its messages, and the YAML files beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import TrlParser

from mobilellm_hf.evaluation.arguments import EvaluationArguments
from mobilellm_hf.evaluation.suites import SUITES

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = sorted(RECIPES.rglob("evaluate*.yaml"))


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPES / "evaluate.py"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_tasks_are_listed():
    done = run("--list_tasks", "true")
    assert done.returncode == 0 and all(name in done.stdout for name in SUITES) and "humaneval" in done.stdout


def test_a_mistake_is_a_line_and_status_two():
    done = run("--model", "anything", "--suite", "bases")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: there is no suite 'bases'; there are base, reasoning. Did you mean base?" in done.stdout


def test_a_model_that_is_not_there_is_a_line_and_status_two():
    done = run("--model", "./runs/none", "--suite", "base", "--dry_run", "true")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: model: the folder ./runs/none does not exist" in done.stdout


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_ask_for_suites_and_tasks_that_there_are(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load(config.read_text())
    if folder := given.get("data_dir"):
        Path(folder).mkdir(parents=True)
    (arguments,) = TrlParser((EvaluationArguments,)).parse_args_and_config(["--config", str(config)])
    assert arguments.check() and all(getattr(arguments, name) == value for name, value in given.items())


@pytest.mark.parametrize("stage", ["base", "reasoning"])
def test_every_size_has_both_suites_in_full(stage):
    files = [RECIPES / size / f"evaluate_{stage}.yaml" for size in ("140M", "360M", "950M")]
    first = files[0].read_text()
    for file in files:
        assert file.read_text() == first.replace("140M", file.parent.name)
        given = yaml.safe_load(file.read_text())
        assert given["suite"] == [stage] and not {"limit", "samples", "max_new_tokens"} & given.keys()
