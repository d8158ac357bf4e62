"""Run by test_reliability.py: trains in forked processes that are killed at random moments, until one comes through.

kill_worker.py FOLDER pretrain|midtrain|fused KILLS SEED
"""

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch
from mixture_cases import Reader, arguments, build, mixture, probes
from transformers import Trainer, TrainerCallback

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.training import (
    DistillationCallback,
    InfluenceResamplingCallback,
    MixtureCallback,
    ProbeNLLCallback,
    StopOnNonFiniteLoss,
)
from mobilellm_hf.workspace import Workspace

STEPS = 40


class KillAfter(TrainerCallback):
    """Kills the process some milliseconds after a step has begun: in its passes, its end, a round, or a save."""

    def __init__(self, steps: int, seconds: float):
        self.steps, self.seconds, self.seen = steps, seconds, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen += 1
        if self.seen == self.steps:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


class WriteDraws(TrainerCallback):
    """What every step has read, one file a step: of a step that is repeated, the last."""

    def __init__(self, reader: Reader, folder: Path):
        self.reader, self.folder, self.done = reader, folder, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{state.global_step}.json").write_text(json.dumps(self.reader.read[self.done :]))
        self.done = len(self.reader.read)


def teacher() -> MobileLLMForCausalLM:
    torch.manual_seed(7)
    return MobileLLMForCausalLM(MobileLLMConfig(**{**build().config.to_dict(), "hidden_size": 48, "head_dim": 12}))


def callbacks(mode: str) -> list[TrainerCallback]:
    data = mixture(STEPS * 8, keep_folder=None)
    watch = [ProbeNLLCallback(probes(), every=6), StopOnNonFiniteLoss()]
    if mode == "pretrain":
        return [MixtureCallback(data), *watch]
    options = dict(every=5, delay_steps=3, candidates_per_source=20, scores="fused" if mode == "fused" else "separate")
    resampling = InfluenceResamplingCallback(data, probes(), **options)
    return [resampling, *watch] if mode == "fused" else [DistillationCallback(teacher()), resampling, *watch]


def train(folder: Path, mode: str, kill: KillAfter | None) -> None:
    torch.set_num_threads(1)
    last = Workspace(folder, {}).last_checkpoint("run")
    reader, used = Reader(), callbacks(mode)
    data = next(callback.mixture for callback in used if hasattr(callback, "mixture"))
    used += [reader, WriteDraws(reader, folder / "draws"), *([kill] if kill else [])]
    options = dict(max_steps=STEPS, save_steps=4, logging_nan_inf_filter=False, lr_scheduler_type="linear")
    trainer = Trainer(build(), arguments(folder / "run", **options), train_dataset=data, callbacks=used)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.save_model(str(folder / "model"))


def run_in_child(folder: Path, mode: str, kill: KillAfter | None) -> int:
    """The signal that ended it, 0 if it came through."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder, mode, kill)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit(f"a run failed with status {os.WEXITSTATUS(status)}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


if __name__ == "__main__":
    folder, mode, kills, chance = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), random.Random(int(sys.argv[4]))
    assert run_in_child(folder / "whole", mode, None) == 0
    killed = 0
    while killed < kills:
        # Seldom further than the next checkpoint, so that ten kills fit into the run.
        kill = KillAfter(chance.randint(1, 6), chance.uniform(0, 0.04))
        if run_in_child(folder / "killed", mode, kill) == 0:
            break
        killed += 1
    assert (folder / "killed" / "model").exists() or run_in_child(folder / "killed", mode, None) == 0
    (folder / "kills.json").write_text(json.dumps(killed))
