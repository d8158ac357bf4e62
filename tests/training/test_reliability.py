"""Runs that are killed, that find the disk full, or that are given what cannot be trained on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mixture_cases import mixture, train
from safetensors.torch import load_file

from mobilellm_hf.training import MixtureCallback
from mobilellm_hf.workspace import Workspace

HERE = Path(__file__).parent


@pytest.mark.parametrize("mode", ["pretrain", "midtrain", "fused"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights_and_draws(tmp_path, mode):
    kills = 10 if mode != "fused" else 5
    command = [sys.executable, str(HERE / "kill_worker.py"), str(tmp_path), mode, str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=_one_thread())
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "kills.json").read_text()) == kills
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert torch.equal(value, killed[name]), name
    for step in range(1, 41):
        draws = [(tmp_path / name / "draws" / f"{step}.json").read_text() for name in ("whole", "killed")]
        assert draws[0] == draws[1], f"step {step}"


def _one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


FULL_DISK = """
import resource, sys
from mixture_cases import StopAt, mixture, train
from mobilellm_hf.training import MixtureCallback

class FullDisk(StopAt):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # less than a checkpoint's files

import mixture_cases
mixture_cases.StopAt = FullDisk
train(sys.argv[1], MixtureCallback(mixture()), stop_at=9)
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_one_thread())
    assert done.returncode != 0 and "File too large" in done.stderr
    last = Workspace(tmp_path.parent, {}).last_checkpoint(tmp_path.name)
    assert last == tmp_path / "checkpoint-5"
    whole, _ = train(tmp_path / "whole", MixtureCallback(mixture()))
    resumed, _ = train(tmp_path, MixtureCallback(mixture()), resume=str(last))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
