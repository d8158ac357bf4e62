"""The stages of `recipes/quickstart.py`, from the text that a Python installation holds to a small mid-trained model.

Each leaves a folder that a person can open, and is skipped by a run that finds it there. They are ordinary uses of
this package, in the order in which a project of one's own would use it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

from mobilellm_hf.data.corpora import load_corpus
from mobilellm_hf.data.documents import FirstSeen, cut_document
from mobilellm_hf.data.embedded import SOURCES, load_embedded_corpus
from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.influence import AdamCurvature, average_checkpoints, group_influence, mixture_weights
from mobilellm_hf.influence.plots import plot_influence
from mobilellm_hf.modeling import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.progress import Stage, StageProgressCallback
from mobilellm_hf.training import (
    DistillationCallback,
    InfluenceResamplingCallback,
    MixtureCallback,
    ProbeNLLCallback,
    StopOnNonFiniteLoss,
)
from mobilellm_hf.training.arguments import StageTrainingArguments
from mobilellm_hf.workspace import Workspace

# What a capability is measured on: held-out files of the sources that a person would choose for it.
PROBES = {
    "code": ("stdlib",),
    "math": ("sympy_docs",),
    "knowledge": ("python_reference", "numpy_docs"),
}
PROMPTS = {
    "code": "def __init__(self,",
    "math": "Return the derivative of",
    "knowledge": "The following arguments are",
}


@dataclass
class Shape:
    """Of a model; the vocabulary and the length of rows are the run's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


@dataclass
class Settings:
    """Everything that decides the result."""

    steps: int
    proxy_steps: int
    teacher_steps: int
    midtrain_steps: int
    rows_per_source: int
    rows_per_probe: int
    rows_per_test: int
    learning_rate: float
    extra_source: list[str]
    seed: int
    vocab_size: int = 4096
    seq_length: int = 128
    batch_size: int = 4  # small: with so few tokens, the number of steps counts more than their precision
    checkpoints_scored: int = 3
    evaluations: int = 6


STUDENT = Shape(192, 512, 4, 3, 1)
TEACHER = Shape(256, 704, 4, 4, 1)


@dataclass
class Run:
    """A trained model: its Trainer's log, and the newest checkpoint."""

    log_history: list[dict]
    checkpoint: Path

    def model(self) -> MobileLLMForCausalLM:
        return MobileLLMForCausalLM.from_pretrained(self.checkpoint)


def load_extra_source(entry: str) -> Dataset:
    """`DOMAIN:PATH_OR_ID` as documents of a few thousand characters."""
    domain, _, name = entry.partition(":")
    if domain not in PROBES or not name:
        raise ValueError(f"--extra-source {entry!r}: write DOMAIN:PATH_OR_ID, DOMAIN one of {', '.join(PROBES)}")
    rows = [
        {"text": piece, "source": row["source"], "domain": domain}
        for row in load_corpus(name, domain=domain)
        for piece in cut_document(row["text"])
    ]
    return Dataset.from_list(rows)


def build_corpus(workspace: Workspace, settings: Settings, stage: Stage) -> DatasetDict:
    def build(path: Path) -> None:
        # First, so that a misspelt file is found before anything is read.
        extras = [load_extra_source(entry) for entry in settings.extra_source]
        corpus = load_embedded_corpus()
        names = [*SOURCES, *(extra[0]["source"] for extra in extras)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}: rename the file of one --extra-source")
        # The probes are the embedded corpus's own, so an extra source is for training alone.
        known = FirstSeen()
        for split in corpus.values():
            known.batch(split["text"][:])
        extras = [extra.filter(known.batch, input_columns="text", batched=True) for extra in extras]
        corpus["train"] = concatenate_datasets([corpus["train"], *extras])
        corpus.save_to_disk(path)

    corpus = load_from_disk(workspace.once("corpus", build))
    size = sum(len(text.encode()) for split in corpus.values() for text in split["text"][:])
    stage.say(f"{len(set(corpus['train']['source'][:]))} sources, {size / 1e6:.1f} MB of text")
    return corpus


def build_rows(
    workspace: Workspace, settings: Settings, corpus: DatasetDict, stage: Stage
) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    def build_tokenizer(path: Path) -> None:
        texts = corpus["train"]["text"][:]
        train_tokenizer(texts, settings.vocab_size, show_progress=False).save_pretrained(path)

    def build(path: Path) -> None:
        packed = {}
        for name, split in corpus.items():
            packed[name], report = tokenize_and_pack(split, tokenizer, settings.seq_length, config=config)
            for line in report.sources:
                if line.rows == 0:
                    raise ValueError(
                        f"the source {line.source!r} has {line.tokens} tokens for {name}, less than one row of "
                        f"{settings.seq_length}: add text, or leave it out in another output folder"
                    )
        DatasetDict(packed).save_to_disk(path)

    tokenizer = AutoTokenizer.from_pretrained(workspace.once("tokenizer", build_tokenizer))
    config = model_config(settings, STUDENT, tokenizer)
    rows = load_from_disk(workspace.once("rows", build))
    tokens = len(rows["train"]) * settings.seq_length
    stage.say(f"vocabulary {len(tokenizer):,}, {tokens / 1e6:.1f} M training tokens in rows of {settings.seq_length}")
    return tokenizer, rows


def model_config(settings: Settings, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> MobileLLMConfig:
    return MobileLLMConfig(
        vocab_size=settings.vocab_size,
        max_position_embeddings=settings.seq_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **vars(shape),
    )


def sample_rows(rows: Dataset, sources: tuple[str, ...], count: int, seed: int) -> Dataset:
    """Up to `count` random rows of the given sources."""
    chosen = rows.select([i for i, source in enumerate(rows["source"][:]) if source in sources]).shuffle(seed=seed)
    return chosen.select(range(min(count, len(chosen))))


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
        samples = {s: sample_rows(rows["train"], (s,), settings.rows_per_source, settings.seed) for s in sources}
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
