"""Proxy, influence, mixes, teacher and mid-training of the quickstart, and what its models write."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.influence import AdamCurvature, average_checkpoints, group_influence, mixture_weights
from mobilellm_hf.influence.plots import plot_influence
from mobilellm_hf.modeling import MobileLLMForCausalLM
from mobilellm_hf.progress import Stage, StageProgressCallback
from mobilellm_hf.quickstart.data import sample_rows
from mobilellm_hf.quickstart.settings import PROBES, PROMPTS, Settings
from mobilellm_hf.training import (
    DistillationCallback,
    InfluenceResamplingCallback,
    MixtureCallback,
    ProbeNLLCallback,
    StopOnNonFiniteLoss,
)
from mobilellm_hf.training.arguments import StageTrainingArguments
from mobilellm_hf.workspace import Workspace


@dataclass
class Run:
    """A trained model: its Trainer's log, and the newest checkpoint."""

    log_history: list[dict]
    checkpoint: Path

    def model(self) -> MobileLLMForCausalLM:
        return MobileLLMForCausalLM.from_pretrained(self.checkpoint)


def train(
    workspace: Workspace,
    name: str,
    settings: Settings,
    make_model: Callable[[], MobileLLMForCausalLM],
    mixture: MixtureDataset,
    stage: Stage,
    steps: int,
    saves: int,
    *,
    keep: int = 2,
    learning_rate: float | None = None,
    final_learning_rate: float = 0.1,
    tests: dict[str, Dataset] | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Run:
    """Trains a model on a mixture, or takes an unfinished run up again.

    Args:
        keep: checkpoints that stay.
        callbacks: instead of a `MixtureCallback` alone.
    """
    last = workspace.last_checkpoint(name)
    state = json.loads((last / "trainer_state.json").read_text()) if last else {"global_step": 0}
    if state["global_step"] >= steps:
        stage.say("finished in an earlier run")
        return Run(state["log_history"], last)
    set_seed(settings.seed)
    save_steps = max(1, steps // saves)
    arguments = StageTrainingArguments(
        output_dir=str(workspace.folder / name),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=learning_rate or settings.learning_rate,
        final_learning_rate=final_learning_rate,
        warmup_steps=steps // 10,
        save_steps=save_steps,
        save_total_limit=keep,
        logging_steps=math.gcd(save_steps, 10),  # nothing is saved that was not looked at
        seed=settings.seed,
    )
    used = [*(callbacks or [MixtureCallback(mixture)]), StopOnNonFiniteLoss(), StageProgressCallback(stage)]
    if tests:
        used.append(ProbeNLLCallback(tests, every=max(1, steps // settings.evaluations)))
    trainer = Trainer(make_model(), arguments, train_dataset=mixture, callbacks=used)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return Run(trainer.state.log_history, workspace.last_checkpoint(name))


def score_sources(
    workspace: Workspace, settings: Settings, rows: DatasetDict, sources: list[str], stage: Stage
) -> dict[str, float]:
    """The mixture weights by influence; leaves every checkpoint's scores, the mixture and a picture in a folder."""

    def build(path: Path) -> None:
        samples = {s: sample_rows(rows["candidates"], (s,), settings.rows_per_source, settings.seed) for s in sources}
        probes = {c: sample_rows(rows["probe"], s, settings.rows_per_probe, settings.seed) for c, s in PROBES.items()}
        folders = workspace.checkpoints("proxy")[-settings.checkpoints_scored :]
        stage.expect(len(folders) * sum(len(part) for part in (*samples.values(), *probes.values())))
        scores = []
        for folder in folders:
            model = MobileLLMForCausalLM.from_pretrained(folder).to(PartialState().device)
            scores.append(group_influence(model, samples, probes, on_batch=stage.advance))
        steps = [int(folder.name.split("-")[1]) for folder in folders]
        influence = average_checkpoints(torch.stack(scores), steps)
        table = Dataset.from_list([
            {"step": step, "source": source, "capability": capability, "influence": score[row, column].item()}
            for step, score in zip(steps, scores, strict=True)
            for row, source in enumerate(sources)
            for column, capability in enumerate(PROBES)
        ])  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path / "scores.parquet")
        weights = mixture_weights(influence.mean(-1), sources)
        (path / "mixture.yaml").write_text(yaml.safe_dump({"weights": weights}, sort_keys=False))
        plot_influence(influence, sources, list(PROBES), weights, path / "influence.png")

    folder = workspace.once("influence", build)
    weights = yaml.safe_load((folder / "mixture.yaml").read_text())["weights"]
    best = max(weights, key=weights.get)
    none = [source for source, weight in weights.items() if weight == 0]
    stage.say(f"largest share: {best} ({weights[best]:.0%}); none: {', '.join(none) or 'no source'}")
    return weights


def midtrain(
    workspace: Workspace,
    name: str,
    settings: Settings,
    start: Run,
    weights: dict[str, float],
    rows: DatasetDict,
    teacher: Run,
    tests: dict[str, Dataset],
    stage: Stage,
) -> tuple[Run, MixtureDataset]:
    """A phase of mid-training: what the model itself finds helpful, learnt from the teacher's distributions.

    The first round is before the first step, as in equations (6) and (7), and the only one.
    """
    draws = settings.midtrain_steps * settings.batch_size
    mixture = MixtureDataset(
        rows["train"], weights, draws, seed=settings.seed + 1, block_size=settings.batch_size * 4,
        keep_folder=workspace.folder / name / "mixture",
    )  # fmt: skip
    probes = {c: sample_rows(rows["probe"], s, settings.rows_per_probe, settings.seed) for c, s in PROBES.items()}
    model = start.model().to(PartialState().device)
    resampling = InfluenceResamplingCallback(
        mixture,
        probes,
        at_start=True,
        curvature=AdamCurvature.from_checkpoint(start.checkpoint, model),
        candidates_per_source=settings.rows_per_source,
        batch_size=8,
        seed=settings.seed,
        allow_overlap=True,  # licences and tables repeat themselves from file to file
        sign_check=None,  # on so few rows and steps it would take as long as the phase, and tell little
    )
    distillation = DistillationCallback(teacher.model().to(PartialState().device))
    run = train(
        workspace, name, settings, lambda: model, mixture, stage, settings.midtrain_steps, 2,
        learning_rate=settings.learning_rate / 3, final_learning_rate=0.0, tests=tests,
        callbacks=[distillation, resampling],
    )  # fmt: skip
    if resampling.rounds:
        found = resampling.rounds[0]
        stage.say(f"{found.rejected:.1%} of the rows rejected, loss {run.log_history[-2]['loss']:.3f}")
    else:  # finished in an earlier run
        state = json.loads((run.checkpoint / "trainer_state.json").read_text())
        mixture.load_state_dict(state["stateful_callbacks"]["mobilellm_hf.mixture"])
    return run, mixture


@torch.no_grad()
def samples(model: MobileLLMForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, str]:
    set_seed(seed)
    texts = {}
    for name, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.6, top_p=0.95)
        texts[name] = tokenizer.decode(output[0], skip_special_tokens=True)
    return texts
