"""From raw text to a small MobileLLM whose data influence has chosen. No download; minutes on a CPU.

    make quickstart
    accelerate launch recipes/quickstart.py --output-dir runs/quickstart
    accelerate launch recipes/quickstart.py --extra-source math:lecture_notes.txt --output-dir runs/notes

The embedded corpus has ten sources of clearly different worth. A small judge chooses the documents that stand for
each (the hierarchy of section 2.1.1). A proxy model is trained on all sources alike; the influence of every source's
chosen documents on held-out code, math and knowledge probes, at several of its checkpoints, gives a mixture
(equations 3 to 5 of MobileLLM-R1); then two models with the same start and the same budget are trained, one on that
mixture and one on the uniform mixture, and compared on test files that neither the training nor the scoring has seen.
The model of the influence mix goes on: in two phases of mid-training it rejects what it finds unhelpful, reweighs the
sources (equations 5 to 7) and learns from a larger model, which is trained first. The best of the small models is
fine-tuned on questions and answers, half of which give up, and GRPO makes it answer, by rewarding right answers. What
comes of that is exported for a phone and asked the same.

Every stage leaves a folder that a person can open, and an interrupted run goes on where it stopped. What differs from
the paper: sizes, and one proxy for all capabilities where the paper trains one a capability.
"""

import argparse
import shutil
import sys
from pathlib import Path

import mobilellm_hf  # noqa: F401  # isort: skip  # first: it keeps torchao quiet, which transformers imports

import torch
import transformers
from accelerate import PartialState
from datasets import DatasetDict, disable_progress_bars
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from mobilellm_hf import MobileLLMForCausalLM, __version__
from mobilellm_hf.curation.funnel import funnel_table
from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.export.requirements import need_executorch
from mobilellm_hf.hub import Target, package_model
from mobilellm_hf.progress import StageProgress
from mobilellm_hf.quickstart.data import (
    build_corpus,
    build_curation,
    build_judge,
    build_rows,
    build_tokenizer,
    model_config,
    sample_rows,
)
from mobilellm_hf.quickstart.device import device_table, put_on_device
from mobilellm_hf.quickstart.post_training import fine_tune, reinforce
from mobilellm_hf.quickstart.settings import PROBES, STUDENT, TEACHER, Settings
from mobilellm_hf.quickstart.training import Run, midtrain, samples, score_sources, train
from mobilellm_hf.training.monitors import probe_history
from mobilellm_hf.training.pass_rate import PassRate, pass_rate_table
from mobilellm_hf.training.plots import plot_probe_nll, plot_training
from mobilellm_hf.training.tables import draws_table, probe_nll_table, runs_table
from mobilellm_hf.workspace import Workspace

MIXES = ("influence mix", "uniform mix")
PHASES = ("mid-training 1", "mid-training 2")
STAGES = (
    "corpus", "judge", "curation", "rows", "proxy model", "influence", *MIXES, "teacher", *PHASES, "fine-tuning",
    "reinforcement", "device", "report",
)  # fmt: skip


def compare_mixes(
    workspace: Workspace, settings: Settings, tokenizer: PreTrainedTokenizerBase, rows: DatasetDict, tests, progress
) -> tuple[dict[str, Run], dict[str, dict]]:
    """A proxy finds the sources' influence; one model is trained on the mixture that follows, one on all alike."""
    config = model_config(settings, STUDENT, tokenizer)
    sources = list(dict.fromkeys(rows["train"]["source"][:]))
    mixes = {MIXES[1]: dict.fromkeys(sources, 1 / len(sources))}

    def make_model() -> MobileLLMForCausalLM:
        return MobileLLMForCausalLM(config)

    with progress.stage("proxy model") as stage:
        draws = settings.proxy_steps * settings.batch_size
        drawn = MixtureDataset(rows["train"], mixes[MIXES[1]], draws, seed=settings.seed + 1)
        scored = settings.checkpoints_scored
        train(workspace, "proxy", settings, make_model, drawn, stage, settings.proxy_steps, scored, keep=scored)
    with progress.stage("influence") as stage:
        mixes[MIXES[0]] = score_sources(workspace, settings, rows, sources, stage)
    runs, read = {}, {}
    for name in MIXES:
        with progress.stage(name) as stage:
            drawn = MixtureDataset(
                rows["train"], mixes[name], settings.steps * settings.batch_size, seed=settings.seed
            )
            read[name] = drawn.report()
            folder, saves = name.replace(" ", "-"), settings.evaluations
            runs[name] = train(
                workspace, folder, settings, make_model, drawn, stage, settings.steps, saves, tests=tests
            )
    return runs, {"weights": mixes[MIXES[0]], "read": read}


def mid_train(
    workspace: Workspace, settings: Settings, tokenizer, rows: DatasetDict, tests, progress, start: Run, weights
) -> tuple[dict[str, Run], dict[str, dict]]:
    """A larger model is trained first, on the same mixture; the smaller one learns from it in two phases."""
    runs, read = {}, {}
    with progress.stage("teacher") as stage:
        config = model_config(settings, TEACHER, tokenizer)
        draws = settings.teacher_steps * settings.batch_size
        drawn = MixtureDataset(rows["train"], weights, draws, seed=settings.seed)
        runs["teacher"] = train(
            workspace, "teacher", settings, lambda: MobileLLMForCausalLM(config), drawn, stage,
            settings.teacher_steps, 2, tests=tests,
        )  # fmt: skip
    for name in PHASES:
        with progress.stage(name) as stage:
            folder = name.replace(" ", "-")
            runs[name], drawn = midtrain(
                workspace, folder, settings, start, weights, rows, runs["teacher"], tests, stage
            )
            start, weights, read[name] = runs[name], drawn.weights, drawn.report()
    return runs, read


def final_nll(run: Run) -> dict[str, float]:
    return {name: curve[-1][1] for name, curve in probe_history(run.log_history).items()}


def whole_curves(runs: dict[str, Run], settings: Settings) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The two mixes' curves, and mid-training's, which go on where the influence mix ends."""
    curves = {name: probe_history(runs[name].log_history) for name in MIXES}
    for number, name in enumerate(PHASES):
        before = settings.steps + number * settings.midtrain_steps
        found = probe_history(runs[name].log_history)
        # The first point is the last of the phase before, which a line needs; plots leave out one more.
        curves[name] = {
            probe: [curve[0], *((before + step, value) for step, value in curve)] for probe, curve in found.items()
        }
    return curves


def best_of(runs: dict[str, Run]) -> str:
    """Which of the small models is best on average."""
    return min((name for name in runs if name != "teacher"), key=lambda name: sum(final_nll(runs[name]).values()))


def report(
    workspace: Workspace,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    runs: dict[str, Run],
    winner: str,
    rates: dict,
) -> None:
    """Saves the best of the small models with its tokenizer, card and pictures."""
    final = {name: final_nll(run) for name, run in runs.items()}

    def build(path: Path) -> None:
        model = runs[winner].model()
        model.config.use_cache = True  # which the Trainer had turned off
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        # As a user will load it, which is the last thing to be sure of.
        loaded = AutoModelForCausalLM.from_pretrained(path).to(PartialState().device)
        texts = samples(loaded, tokenizer, settings.seed)
        tokens_per_step = settings.batch_size * settings.seq_length
        plot_probe_nll(whole_curves(runs, settings), path / "probe_nll.png", tokens_per_step)
        logs = {name: runs[name].log_history for name in PHASES}
        plot_training(logs, path / "midtraining.png", tokens_per_step)
        for picture in ("influence/influence.png", "reinforcement/grpo.png"):
            shutil.copy(workspace.folder / picture, path)
        card = ModelCard.from_template(
            ModelCardData(library_name="transformers", pipeline_tag="text-generation", license="apache-2.0",
                          tags=["mobilellm", "influence", "distillation"]),
            template_path=str(Path(__file__).parent.parent / "hub_cards" / "quickstart_model.md"),
            parameters=f"{model.num_parameters():,}", winner=winner, final=final, probes=PROBES, samples=texts,
            settings=vars(settings), tokens=f"{settings.steps * tokens_per_step:,}",
            rates={when: PassRate(**rates[when]) for when in ("before", "after")},
            midtrain_tokens=f"{settings.midtrain_steps * tokens_per_step:,}",
        )  # fmt: skip
        card.save(path / "README.md")

    workspace.once("model", build)


def run(workspace: Workspace, settings: Settings, console: Console) -> None:
    with StageProgress(STAGES, console) as progress:
        with progress.stage("corpus") as stage:
            corpus = build_corpus(workspace, settings, stage)
            tokenizer = build_tokenizer(workspace, settings, corpus)
        with progress.stage("judge") as stage:
            judge = build_judge(workspace, settings, tokenizer, corpus, stage)
        with progress.stage("curation") as stage:
            curated, steps = build_curation(workspace, settings, judge, corpus, stage)
        with progress.stage("rows") as stage:
            rows = build_rows(workspace, settings, tokenizer, corpus, curated, stage)
        tests = {c: sample_rows(rows["test"], s, settings.rows_per_test, settings.seed) for c, s in PROBES.items()}
        runs, found = compare_mixes(workspace, settings, tokenizer, rows, tests, progress)
        start, weights = runs["influence mix"], found["weights"]
        later, read = mid_train(workspace, settings, tokenizer, rows, tests, progress, start, weights)
        runs |= later
        winner = best_of(runs)
        with progress.stage("fine-tuning") as stage:
            tuned = fine_tune(workspace, settings, runs[winner], stage)
        with progress.stage("reinforcement") as stage:
            rates = reinforce(workspace, settings, tuned, stage)
        with progress.stage("device") as stage:
            on_device = put_on_device(workspace, workspace.folder / "reinforcement" / "model", stage)
        with progress.stage("report"):
            report(workspace, settings, tokenizer, runs, winner, rates)
    final = {name: final_nll(found) for name, found in runs.items()}
    console.print(funnel_table(steps))
    console.print("The judge was trained on this corpus: it tells whole from damaged documents, and domains apart.",
                  style="dim")  # fmt: skip
    console.print(draws_table(found["read"] | read))
    console.print(probe_nll_table({name: final[name] for name in MIXES}))
    shown = {"before": final[MIXES[0]], **{name: final[name] for name in (*PHASES, "teacher")}}
    console.print(runs_table("Mid-training on the influence mix, held-out NLL", shown))
    console.print(pass_rate_table(rates))
    console.print(device_table(on_device))
    console.print("One seed: an observation about this text and budget, not evidence for the method.", style="dim")
    folder = workspace.folder / "model"
    console.print(f"The best of the small models ({winner}), with its card, pictures and samples, is in {folder}:",
                  soft_wrap=True)  # fmt: skip
    console.print("  import mobilellm_hf; from transformers import AutoModelForCausalLM", soft_wrap=True)
    console.print(f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})", soft_wrap=True)
    release = package_model(folder, Target("your-name/MobileLLM-R1-quickstart", "quickstart"), llama4=True)
    page = release.write_preview()
    console.print(f"What a release of it would look like (nothing was sent) is in {page}. To send it:", soft_wrap=True)
    console.print(f"  python recipes/release.py --model {folder} --repo YOUR_NAME/MobileLLM-R1-quickstart --llama4",
                  soft_wrap=True)  # fmt: skip


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
    parser.add_argument("--judge-steps", type=positive, default=200, help="training steps of the judge of documents")
    parser.add_argument(
        "--documents-per-source", type=positive, default=300, help="documents of a source that the judge reads"
    )
    parser.add_argument(
        "--steps", type=positive, default=260, help="training steps of each compared model, of 512 tokens"
    )
    parser.add_argument("--proxy-steps", type=positive, default=240, help="training steps of the model that scores")
    parser.add_argument("--teacher-steps", type=positive, default=380, help="training steps of the larger model")
    parser.add_argument("--midtrain-steps", type=positive, default=80, help="training steps of each phase after it")
    parser.add_argument("--sft-steps", type=positive, default=80, help="steps of fine-tuning on questions and answers")
    parser.add_argument("--grpo-steps", type=positive, default=16, help="steps of GRPO, of 64 answers")
    parser.add_argument(
        "--rows-per-source", type=positive, default=32, help="rows of a source whose gradient is taken"
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
        need_executorch()  # which a late stage asks for
        settings = Settings(**{name: value for name, value in vars(args).items() if name != "output_dir"})
        versions = {"mobilellm_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        run(Workspace(args.output_dir, vars(settings) | versions), settings, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped", style="bold yellow")
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
