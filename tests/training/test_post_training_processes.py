"""SFT and GRPO in two processes, as a user launches them: the same steps as one process makes, and what both count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sft_cases import ROOT, make_model, settings

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launch(recipe: str, config: Path, launcher: list[str], *options: str) -> None:
    command = [sys.executable, *launcher, str(ROOT / "recipes" / recipe), "--config", str(config), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    make_model(folder / "model")
    # An element with next to no gradient takes whole steps of Adam's, in a direction that rounding decides.
    sft = settings(folder) | {"max_steps": 4, "optim": "sgd", "learning_rate": 0.5}
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    grpo = {
        "model": str(folder / "model"), "model_name": "tiny-grpo", "rewards": [{"name": "accuracy"}],
        "sources": [{"synthetic": ["addition"], "count": 8}],
        "held_out": [{"synthetic": ["comparing"], "count": 5, "split": "probe"}],
        "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6,
        "learning_rate": 1e-3, "save_steps": 2, "bf16": False, "activation_checkpointing": False, "use_cpu": True,
    }  # fmt: skip
    (folder / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    return folder


def test_two_processes_fine_tune_as_one_that_accumulates(project):
    launch(
        "sft.py", project / "sft.yaml", [], "--output_dir", str(project / "one"), "--gradient_accumulation_steps", "2"
    )
    launch("sft.py", project / "sft.yaml", TWO, "--output_dir", str(project / "two"))
    one, two = (load_file(project / run / "tiny-tulu3" / "model.safetensors") for run in ("one", "two"))
    start = load_file(project / "model" / "model.safetensors")
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)
    logs = []
    for run in ("one", "two"):
        lines = (project / run / "log.jsonl").read_text().splitlines()
        logs.append([entry["probe_nll/sums"] for entry in map(json.loads, lines) if "probe_nll/sums" in entry])
        assert (project / run / "training.png").stat().st_size > 1_000
    assert logs[0] == pytest.approx(logs[1], abs=1e-4) and len(logs[0]) > 1
    conversations = [(project / run / "conversations.yaml").read_text() for run in ("one", "two")]
    assert conversations[0] == conversations[1]


def test_two_processes_reinforce_and_count_every_held_out_prompt_once(project):
    launch(
        "grpo.py",
        project / "grpo.yaml",
        TWO,
        "--output_dir",
        str(project / "grpo"),
        "--gradient_accumulation_steps",
        "1",
    )
    rate = json.loads((project / "grpo" / "pass_rate.json").read_text())
    assert rate["before"]["prompts"] == rate["after"]["prompts"] == 5 and rate["after"]["step"] == 2
    log = [json.loads(line) for line in (project / "grpo" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "rewards/accuracy/mean" in entry] == [1, 2]
    saved = load_file(project / "grpo" / "tiny-grpo" / "model.safetensors")
    assert saved.keys() == load_file(project / "model" / "model.safetensors").keys()
