"""The quickstart's last model on a device: exported, asked what the model is asked, and timed beside it."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mobilellm_hf.data.synthetic_chat import load_synthetic_chat
from mobilellm_hf.export import OnDeviceModel, run_export
from mobilellm_hf.export.arguments import ExportArguments
from mobilellm_hf.progress import Stage, StagesWithin
from mobilellm_hf.quickstart.post_training import ANSWER_TOKENS, TASK
from mobilellm_hf.training.monitors import evaluation_mode
from mobilellm_hf.workspace import Workspace, write_whole

QUESTIONS_SHOWN = 3
# Tokens timed at once, and how many times; both take turns.
TIMED_TOKENS, TURNS = 48, 3
IN_PYTORCH, ON_DEVICE = "transformers, fp32", "device, 8da4w"


def put_on_device(workspace: Workspace, model: Path, stage: Stage) -> dict[str, Any]:
    """Exports a model as the paper does; returns answers, tokens a second and megabytes of both."""
    folder = workspace.folder / "device"
    if not folder.exists():
        run_export(ExportArguments(str(model), str(folder)), Console(quiet=True), StagesWithin(stage))
    found = folder / "beside_transformers.json"
    if not found.exists():
        measured = json.dumps(_beside_transformers(model, folder), indent=1)
        write_whole(found, lambda path: path.write_text(measured))
    result = json.loads(found.read_text())
    stage.say(f"{result['megabytes'][ON_DEVICE]:.1f} MB instead of {result['megabytes'][IN_PYTORCH]:.1f}")
    return result


@torch.no_grad()
def _beside_transformers(model: Path, device: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    program = OnDeviceModel(device, tokenizer, threads=torch.get_num_threads())
    questions = [row["messages"][:-1] for row in load_synthetic_chat([TASK], "probe", QUESTIONS_SHOWN)]
    with evaluation_mode(original):
        answers = {
            IN_PYTORCH: [_answer(original, tokenizer, question) for question in questions],
            ON_DEVICE: [program.generate(question, ANSWER_TOKENS).text for question in questions],
        }
        prompt = program.encode(questions[0])
        speeds = _tokens_per_second({
            IN_PYTORCH: lambda: _continue(original, prompt),
            ON_DEVICE: lambda: _continue_on_device(program, prompt),
        })  # fmt: skip
    sizes = {IN_PYTORCH: model / "model.safetensors", ON_DEVICE: program.path}
    return {
        "questions": [question[-1]["content"] for question in questions],
        "answers": answers,
        "tokens_per_second": speeds,
        "megabytes": {name: file.stat().st_size / 1e6 for name, file in sizes.items()},
    }


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: list[dict[str, str]]) -> str:
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _continue(model: PreTrainedModel, prompt: list[int]) -> int:
    """How many tokens were generated."""
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=TIMED_TOKENS, min_new_tokens=TIMED_TOKENS, do_sample=False
    )
    return made.shape[1] - len(prompt)


def _continue_on_device(program: OnDeviceModel, prompt: list[int]) -> int:
    """How many tokens were generated, the prompt computed as if it had never been read before."""
    program.forget()
    return len(program.generate(prompt, TIMED_TOKENS, stop_at_eos=False).token_ids)


def _tokens_per_second(ways: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Medians of what was generated in a second, prompt and all; the first turn is a warm-up."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, TURNS):
        for name, generate in ways.items():
            began = time.perf_counter()
            made = generate()
            if turn >= 0:
                speeds[name].append(made / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in speeds.items()}


def device_table(result: dict[str, Any]) -> Table:
    table = Table("", *result["answers"], title="The model in PyTorch, and exported for a phone (here, on this CPU)")
    for number, question in enumerate(result["questions"]):
        table.add_row(question, *(answers[number] for answers in result["answers"].values()))
    table.add_section()
    table.add_row("tokens/s", *(f"{speed:,.0f}" for speed in result["tokens_per_second"].values()))
    table.add_row("file, MB", *(f"{size:.1f}" for size in result["megabytes"].values()))
    return table
