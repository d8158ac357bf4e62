"""From raw text to a small MobileLLM whose data mix was chosen by influence. No download; about five minutes on a CPU.

    make quickstart
    accelerate launch recipes/quickstart.py --output-dir runs/quickstart
    accelerate launch recipes/quickstart.py --extra-source math:lecture_notes.txt --output-dir runs/notes

The embedded corpus has ten sources of clearly different worth. A proxy model is trained on all of them alike; the
influence of every source on held-out code, math and knowledge probes, at several of its checkpoints, gives a mixture
(equations 3 to 5 of MobileLLM-R1); then two models with the same start and the same budget are trained, one on that
mixture and one on the uniform mixture, and compared on test files that neither the training nor the scoring has seen.

Every stage leaves a folder that a person can open, and an interrupted run goes on where it stopped. What differs from
the paper: sizes, and one proxy for all capabilities where the paper trains one a capability.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars, load_from_disk
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers import logging as transformers_logging
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM, __version__
from mobilellm_hf.data.corpora import load_corpus
from mobilellm_hf.data.documents import FirstSeen, cut_document
from mobilellm_hf.data.embedded import SOURCES, load_embedded_corpus
from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.influence import average_checkpoints, group_influence, mixture_weights
from mobilellm_hf.influence.plots import plot_influence
from mobilellm_hf.progress import Stage, StageProgress, StageProgressCallback
from mobilellm_hf.training import ProbeNLLCallback, StopOnNonFiniteLoss
from mobilellm_hf.training.monitors import probe_history
from mobilellm_hf.training.plots import plot_probe_nll
from mobilellm_hf.training.tables import draws_table, probe_nll_table
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
STAGES = ("corpus", "tokenizer, rows", "proxy model", "influence", "influence mix", "uniform mix", "report")


@dataclass
class Settings:
    """Everything that decides the result."""

    steps: int
    proxy_steps: int
    rows_per_source: int
    rows_per_probe: int
    rows_per_test: int
    learning_rate: float
    extra_source: list[str]
    seed: int
    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    seq_length: int = 128
    batch_size: int = 4  # small: with so few tokens, the number of steps counts more than their precision
    checkpoints_scored: int = 3
    evaluations: int = 6


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
    config = model_config(settings, tokenizer)
    rows = load_from_disk(workspace.once("rows", build))
    tokens = len(rows["train"]) * settings.seq_length
    stage.say(f"vocabulary {len(tokenizer):,}, {tokens / 1e6:.1f} M training tokens in rows of {settings.seq_length}")
    return tokenizer, rows


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> MobileLLMConfig:
    return MobileLLMConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=settings.seq_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def sample_rows(rows: Dataset, sources: tuple[str, ...], count: int, seed: int) -> Dataset:
    """Up to `count` random rows of the given sources."""
    chosen = rows.select([i for i, source in enumerate(rows["source"][:]) if source in sources]).shuffle(seed=seed)
    return chosen.select(range(min(count, len(chosen))))


def train(
    workspace: Workspace,
    name: str,
    settings: Settings,
    config: MobileLLMConfig,
    rows: MixtureDataset,
    stage: Stage,
    steps: int,
    saves: int,
    tests: dict[str, Dataset] | None = None,
) -> list[dict]:
    """Trains one model from scratch, or takes an unfinished run up again; returns the trainer's log history."""
    folder = workspace.folder / name
    last = workspace.last_checkpoint(name)
    state = json.loads((last / "trainer_state.json").read_text()) if last else {"global_step": 0}
    if state["global_step"] >= steps:
        stage.say("finished in an earlier run")
        return state["log_history"]
    set_seed(settings.seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",  # the order of the rows is the mixture's draw
        learning_rate=settings.learning_rate,
        warmup_steps=steps // 10,
        lr_scheduler_type="polynomial",  # linear decay to a tenth of the peak, as in Table 4
        lr_scheduler_kwargs={"lr_end": settings.learning_rate / 10, "power": 1.0},
        weight_decay=0.1,
        adam_beta2=0.95,
        save_steps=max(1, steps // saves),
        save_total_limit=saves if tests is None else 2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    callbacks = [StopOnNonFiniteLoss(), StageProgressCallback(stage)]
    if tests:
        callbacks.append(ProbeNLLCallback(tests, every=max(1, steps // settings.evaluations)))
    trainer = Trainer(MobileLLMForCausalLM(config), arguments, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.state.log_history


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


@torch.no_grad()
def samples(model: MobileLLMForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, str]:
    set_seed(seed)
    texts = {}
    for name, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.6, top_p=0.95)
        texts[name] = tokenizer.decode(output[0], skip_special_tokens=True)
    return texts


def report(
    workspace: Workspace, settings: Settings, tokenizer: PreTrainedTokenizerBase, runs: dict[str, list[dict]]
) -> Table:
    """Saves the better model with its tokenizer, card and pictures; returns the table."""
    final = {name: {c: curve[-1][1] for c, curve in probe_history(log).items()} for name, log in runs.items()}
    winner = min(final, key=lambda name: sum(final[name].values()))

    def build(path: Path) -> None:
        checkpoint = workspace.last_checkpoint(winner.replace(" ", "-"))
        model = MobileLLMForCausalLM.from_pretrained(checkpoint)
        model.config.use_cache = True  # which the Trainer had turned off
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        # As a user will load it, which is the last thing to be sure of.
        loaded = AutoModelForCausalLM.from_pretrained(path).to(PartialState().device)
        texts = samples(loaded, tokenizer, settings.seed)
        plot_probe_nll(
            {name: probe_history(log) for name, log in runs.items()},
            path / "probe_nll.png",
            settings.batch_size * settings.seq_length,
        )
        (path / "influence.png").write_bytes((workspace.folder / "influence" / "influence.png").read_bytes())
        card = ModelCard.from_template(
            ModelCardData(library_name="transformers", pipeline_tag="text-generation", license="apache-2.0",
                          tags=["mobilellm", "influence"]),
            template_path=str(Path(__file__).parent.parent / "hub_cards" / "quickstart_model.md"),
            parameters=f"{model.num_parameters():,}", winner=winner, final=final, probes=PROBES, samples=texts,
            settings=vars(settings), tokens=f"{settings.steps * settings.batch_size * settings.seq_length:,}",
        )  # fmt: skip
        card.save(path / "README.md")

    workspace.once("model", build)
    return probe_nll_table(final)


def run(workspace: Workspace, settings: Settings, console: Console) -> None:
    with StageProgress(STAGES, console) as progress:
        with progress.stage(STAGES[0]) as stage:
            corpus = build_corpus(workspace, settings, stage)
        with progress.stage(STAGES[1]) as stage:
            tokenizer, rows = build_rows(workspace, settings, corpus, stage)
        config = model_config(settings, tokenizer)
        sources = list(dict.fromkeys(rows["train"]["source"][:]))
        uniform = {source: 1 / len(sources) for source in sources}
        with progress.stage(STAGES[2]) as stage:
            draws = settings.proxy_steps * settings.batch_size
            drawn = MixtureDataset(rows["train"], uniform, draws, seed=settings.seed + 1)
            train(
                workspace, "proxy", settings, config, drawn, stage, settings.proxy_steps, settings.checkpoints_scored
            )
        with progress.stage(STAGES[3]) as stage:
            weights = score_sources(workspace, settings, rows, sources, stage)
        tests = {c: sample_rows(rows["test"], s, settings.rows_per_test, settings.seed) for c, s in PROBES.items()}
        runs, draws = {}, {}
        for name, mix in zip(STAGES[4:6], (weights, uniform), strict=True):
            with progress.stage(name) as stage:
                drawn = MixtureDataset(rows["train"], mix, settings.steps * settings.batch_size, seed=settings.seed)
                draws[name] = drawn.report()
                folder = name.replace(" ", "-")
                runs[name] = train(
                    workspace, folder, settings, config, drawn, stage, settings.steps, settings.evaluations, tests
                )
        with progress.stage(STAGES[6]):
            table = report(workspace, settings, tokenizer, runs)
    console.print(draws_table(draws))
    console.print(table)
    console.print("One seed: an observation about this text and budget, not evidence for the method.", style="dim")
    folder = workspace.folder / "model"
    console.print(f"The better model, with its card, two pictures and samples, is in {folder}:", soft_wrap=True)
    console.print("  import mobilellm_hf; from transformers import AutoModelForCausalLM", soft_wrap=True)
    console.print(f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})", soft_wrap=True)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**32 - 1")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"), help="one subfolder a stage")
    parser.add_argument(
        "--steps", type=positive, default=600, help="training steps of each compared model, of 512 tokens"
    )
    parser.add_argument("--proxy-steps", type=positive, default=300, help="training steps of the model that scores")
    parser.add_argument(
        "--rows-per-source", type=positive, default=40, help="rows of a source whose gradient is taken"
    )
    parser.add_argument("--rows-per-probe", type=positive, default=48, help="rows of a probe whose gradient is taken")
    parser.add_argument(
        "--rows-per-test", type=positive, default=72, help="rows of a capability's held-out test files"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, after a tenth of the steps")
    parser.add_argument(
        "--extra-source",
        action="append",
        default=[],
        metavar="DOMAIN:PATH_OR_ID",
        help="one more source to weigh: code, math or knowledge, and a Hub id or a file, folder or glob of .jsonl "
        "(with a field `text`), .parquet, .txt, .md or .py; may be repeated",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the weights and of every draw")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    console = Console()
    try:
        if PartialState().num_processes > 1 or torch.cuda.device_count() > 1:
            raise ValueError(
                "quickstart runs in one process on one device: CUDA_VISIBLE_DEVICES=0 accelerate launch "
                "--num_processes 1"
            )
        settings = Settings(**{name: value for name, value in vars(args).items() if name != "output_dir"})
        versions = {"mobilellm_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        run(Workspace(args.output_dir, vars(settings) | versions), settings, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped", style="bold yellow")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
