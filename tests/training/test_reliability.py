"""Runs that are killed, that find the disk full, or that are given what cannot be trained on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


TRAIN = """
import resource, sys
import mixture_cases
import torch
from mobilellm_hf.training import MixtureCallback

class FullDisk(mixture_cases.StopAt):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # less than a checkpoint's files

mixture_cases.StopAt = FullDisk
torch.set_num_threads(1)
folder, resume, full_at = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
callback = MixtureCallback(mixture_cases.mixture())
trainer, _ = mixture_cases.train(folder, callback, resume=resume, stop_at=full_at)
trainer.save_model(folder + "/model")
"""


def train_in_a_process(folder: Path, resume: str = "", full_at: int = 0) -> subprocess.CompletedProcess:
    """Each run in a new one: to the bit, sums depend on where in memory a process has its tensors."""
    command = [sys.executable, "-c", TRAIN, str(folder), resume, str(full_at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=_one_thread())


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    done = train_in_a_process(tmp_path / "full", full_at=9)
    assert done.returncode != 0 and "File too large" in done.stderr
    last = Workspace(tmp_path, {}).last_checkpoint("full")
    assert last == tmp_path / "full" / "checkpoint-5"
    for folder, resume in (("whole", ""), ("full", str(last))):
        done = train_in_a_process(tmp_path / folder, resume)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "full"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
