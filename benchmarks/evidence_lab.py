"""How evidence.py trains: recipes, each in a process of its own as a user launches them, two or more at a time.

    lab = Lab(folder, Scale(), processes=2)
    lab.run_all("capability models", [Job("pretrain.py", "capability/code", settings), ...])
    lab.run_together(Job("audit.py", "audit", settings))

What a job leaves is in `folder/NAME`, its YAML in `folder/configs`, what it printed in `folder/logs`. A finished job
is not repeated, and an interrupted one goes on, as the recipes do.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from evidence_data import CAPABILITIES, SOURCES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RECIPES = Path(__file__).parents[1] / "recipes"
SEQ_LENGTH = 128
BATCH_SIZE = 8
STUDENT = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
TEACHER = STUDENT | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Scale:
    """How much is trained: steps of a model, of BATCH_SIZE x SEQ_LENGTH tokens, and how often each is repeated."""

    steps: int = 120
    audit_steps: int = 60
    learning_rate: float = 6e-3
    audit_seeds: int = 9
    rejection_seeds: int = 8
    seeds: int = 5
    rows_scored: int = 64


def saves(every: int) -> dict[str, int]:
    """Steps between two checkpoints, and between two looks at the loss, of which one must be before each."""
    return {"save_steps": every, "logging_steps": math.gcd(every, 10)}


@dataclass(frozen=True)
class Job:
    """A recipe, the folder of its output inside the lab's, and what its YAML file says besides."""

    recipe: str
    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Lab:
    folder: Path
    scale: Scale
    processes: int
    console: Console

    def data(self, *path: str) -> dict[str, str]:
        """An entry of `sources` or `probes`: a file of text."""
        return {"name": str(self.folder.joinpath("data", *path).with_suffix(".jsonl"))}

    def sources(self, *names: str) -> list[dict]:
        return [self.data("train", name) for name in names or SOURCES]

    def probes(self, group: str, *names: str) -> dict[str, list[dict]]:
        return {name: [self.data(group, name)] for name in names or CAPABILITIES}

    def training(self, steps: int, seed: int, learning_rate: float | None = None) -> dict[str, Any]:
        """What the YAML file of any training says."""
        return {
            "max_steps": steps, "warmup_steps": steps // 10, "seed": seed, "use_cpu": True,
            "learning_rate": learning_rate or self.scale.learning_rate, "per_device_train_batch_size": BATCH_SIZE,
            **saves(steps),
        }  # fmt: skip

    def stage(
        self, steps: int, seed: int, learning_rate: float | None = None, sources: Sequence[str] = tuple(SOURCES)
    ) -> dict[str, Any]:
        """Of a stage of pre- or mid-training, which reads the sources alike."""
        return self.training(steps, seed, learning_rate) | {
            "sources": self.sources(*sources), "weights": dict.fromkeys(sources, 1 / len(sources)),
            "probes": self.probes("tuning"), "rows_per_probe": 64, "seq_length": SEQ_LENGTH, "monitor_every": steps,
            "model_name": "model",
        }  # fmt: skip

    def new_model(self, shape: Mapping[str, int] = STUDENT) -> dict[str, Any]:
        return {"model_config": dict(shape), "tokenizer": str(self.folder / "data" / "tokenizer")}

    def run_all(self, title: str, jobs: Sequence[Job]) -> None:
        """As many at a time as there are processes, one thread each.

        Raises:
            RuntimeError: one failed; with the end of what it printed.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress, ThreadPoolExecutor(self.processes) as pool:
            task = progress.add_task(title, total=len(jobs))
            started = [pool.submit(self._run, job) for job in jobs]
            for done in as_completed(started):
                if error := done.exception():
                    pool.shutdown(cancel_futures=True)
                    raise error
                progress.advance(task)
        if not self.console.is_terminal:
            self.console.print(f"{title}: {len(jobs)} done")

    def run_together(self, job: Job) -> None:
        """All processes at one job, whose own display is shown."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        self._run(job, launcher if self.processes > 1 else (), shown=True)

    def _run(self, job: Job, launcher: Sequence[str] = (), shown: bool = False) -> None:
        config, done = (self.folder / "configs" / f"{job.name}.{ending}" for ending in ("yaml", "done"))
        log = self.folder / "logs" / f"{job.name}.txt"
        text = yaml.safe_dump({**job.settings, "output_dir": str(self.folder / job.name)}, sort_keys=False)
        if done.exists() and done.read_text() == text and (self.folder / job.name).exists():
            return
        for file in (config, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(text)
        command = [sys.executable, *launcher, str(RECIPES / job.recipe), "--config", str(config)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if shown:
            code = subprocess.run(command, env=environment).returncode
        else:
            with log.open("w") as output:
                code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            said = "" if shown else f": {log} ends with\n{log.read_text()[-2000:]}"
            raise RuntimeError(f"{job.recipe} --config {config} ended with status {code}{said}")
        done.write_text(text)

    def log(self, name: str) -> list[dict[str, float]]:
        """What a training logged."""
        return [json.loads(line) for line in (self.folder / name / "log.jsonl").read_text().splitlines()]

    def last(self, name: str, figure: str) -> float:
        return [entry[figure] for entry in self.log(name) if figure in entry][-1]
