"""The main job from end to end, in small: launched as a user does, killed and taken up again, and given bad input."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mobilellm_hf.quickstart.data import load_extra_source

ROOT = Path(__file__).parents[2]
SMALL = (
    "--judge-steps 3 --documents-per-source 60 --steps 6 --proxy-steps 3 --teacher-steps 2 --midtrain-steps 4 "
    "--sft-steps 2 --grpo-steps 2 --rows-per-source 2 --rows-per-probe 2 --rows-per-test 2"
).split()
LAST = {"influence-mix": 6, "uniform-mix": 6, "mid-training-1": 4, "mid-training-2": 4}


def launch(folder: Path, *options: str) -> subprocess.Popen:
    single = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    command = [sys.executable, "-m", "accelerate.commands.launch", *single, str(ROOT / "recipes" / "quickstart.py")]
    return subprocess.Popen(
        [*command, "--output-dir", str(folder), *SMALL, *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "COLUMNS": "120"},
    )  # fmt: skip


def history(folder: Path, run: str) -> list[dict]:
    log = json.loads((folder / run / f"checkpoint-{LAST[run]}" / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if key.startswith(("loss", "probe"))} for entry in log[:-1]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    process = launch(folder)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    return folder, output


def test_it_ends_with_a_table_pictures_and_a_model_that_generates(finished):
    folder, output = finished
    assert (
        "Held-out NLL" in output
        and "[15/15] report" in output
        and "device, 8da4w" in output
        and "ask-domain" in output
        and "Mid-training on" in output
    )
    assert (folder / "device/model.pte").stat().st_size > 500_000
    weights = yaml.safe_load((folder / "influence" / "mixture.yaml").read_text())["weights"]
    assert len(weights) >= 6 and sum(weights.values()) == pytest.approx(1)
    scores = load_dataset("parquet", data_files=str(folder / "influence" / "scores.parquet"), split="train")
    assert len(scores) == 3 * len(weights) * 3  # checkpoints x sources x capabilities
    for name in ("influence.png", "probe_nll.png", "midtraining.png", "grpo.png", "README.md"):
        assert (folder / "model" / name).stat().st_size > 500
    code = (
        "import sys, mobilellm_hf; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "ids = model.generate(**tokenizer('def f(', return_tensors='pt'), max_new_tokens=5, min_new_tokens=5);"
        "print(type(model).__name__, ids.shape[1] - len(tokenizer('def f(')['input_ids']))"
    )
    process = subprocess.run([sys.executable, "-c", code, str(folder / "model")], capture_output=True, text=True)
    assert process.stdout.strip() == "MobileLLMForCausalLM 5", process.stderr


def test_the_table_and_the_card_say_which_mix_won(finished):
    folder, output = finished
    last = {run: history(folder, run)[-1] for run in LAST}
    means = {run: sum(v for k, v in e.items() if k.startswith("probe")) / 3 for run, e in last.items()}
    winner = min(list(means)[:2], key=means.get)
    row = next(line for line in output.splitlines() if line.startswith("│ mean"))
    assert row.split("│")[-2].strip() == winner.replace("-", " ")
    assert f"{means['influence-mix']:.4f}" in row and f"{means['uniform-mix']:.4f}" in row
    later = [line for line in output.splitlines() if line.startswith("│ mean")][1]
    assert all(f"{means[run]:.4f}" in later for run in ("influence-mix", "mid-training-1", "mid-training-2"))
    best = min(means, key=means.get)
    name = best.replace("-", " ").replace("mid training", "mid-training")
    assert f"**{name}**" in (folder / "model" / "README.md").read_text()
    weights = load_file(folder / "model" / "model.safetensors")
    trained = load_file(folder / best / f"checkpoint-{LAST[best]}" / "model.safetensors")
    assert all(torch.equal(value, trained[key]) for key, value in weights.items())


def test_midtraining_learns_from_the_teacher_and_rejects_rows(finished):
    for phase in ("mid-training-1", "mid-training-2"):
        state = json.loads((finished[0] / phase / "checkpoint-4" / "trainer_state.json").read_text())
        assert all("distillation/kl" in entry for entry in state["log_history"] if "loss" in entry)
        (found,) = state["stateful_callbacks"]["mobilellm_hf.resampling"]["rounds"]
        assert found["step"] == 0 and 0 < found["positive"]["all"] <= 1
        assert (found["rejected"] > 0) == (found["positive"]["all"] < 1)


def test_the_best_model_is_fine_tuned_and_reinforced_and_the_pass_rates_told(finished):
    folder, output = finished
    rates = json.loads((folder / "reinforcement" / "pass_rate.json").read_text())
    assert rates["before"]["step"] == 0 and rates["after"]["step"] == 2 and rates["before"]["prompts"] == 200
    card = (folder / "model" / "README.md").read_text()
    for when in ("before", "after"):
        shown = f"{rates[when]['rate']:.1%} [{rates[when]['low']:.1%}, {rates[when]['high']:.1%}]"
        assert shown in output and shown in card
    stages = ("model", "fine-tuning/model", "reinforcement/model")
    first, tuned, reinforced = (load_file(folder / stage / "model.safetensors") for stage in stages)
    assert any(not torch.equal(first[key], tuned[key]) for key in first) and reinforced.keys() == tuned.keys()
    log = [json.loads(line) for line in (folder / "reinforcement" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "rewards/accuracy/mean" in entry] == [1, 2]
    tokenizer = AutoTokenizer.from_pretrained(folder / "reinforcement" / "model")
    assert tokenizer.chat_template and tokenizer.eos_token == "<|eot_id|>"


def test_it_ends_with_a_page_of_what_a_release_would_be(finished):
    folder, output = finished
    (page,) = folder.glob("**/card.html")
    assert str(page) in output.replace("\n", "") and "recipes/release.py --model" in output
    text = page.read_text()
    assert "AutoModelForCausalLM" in text and "llama4_text" in text


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(finished, tmp_path):
    process = launch(tmp_path)
    while not (tmp_path / "influence-mix" / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # what a kill within the writing of a checkpoint would leave: the state, which is written last, is missing
    torn = tmp_path / "influence-mix" / "checkpoint-5"
    torn.mkdir(exist_ok=True)
    (torn / "model.safetensors").write_bytes(b"torn")
    (torn / "trainer_state.json").unlink(missing_ok=True)
    assert not (tmp_path / "uniform-mix").exists()
    written = (tmp_path / "influence" / "scores.parquet").stat().st_mtime_ns
    process = launch(tmp_path)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert (tmp_path / "influence" / "scores.parquet").stat().st_mtime_ns == written  # scored once
    for run in LAST:
        assert history(tmp_path, run) == history(finished[0], run)
    for stage in ("model", "fine-tuning/model", "reinforcement/model"):
        weights = f"{stage}/model.safetensors"
        assert (tmp_path / weights).read_bytes() == (finished[0] / weights).read_bytes()


@pytest.fixture
def quickstart(monkeypatch, tmp_path):
    """quickstart(*arguments) -> exit code; in this process, which is where errors must come up fast."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "recipes" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output-dir", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as exit_info:
            module.main()
        return exit_info.value.code

    return run


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("code:missing.jsonl", "missing.jsonl"),
        ("poetry:a.txt", "DOMAIN one of code, math, knowledge"),
        ("math:empty.txt", "empty.txt"),
        ("math:latin.txt", "is not UTF-8"),
        ("knowledge:other.jsonl", "has no column 'text'"),
        ("math:torn.jsonl.gz", "torn.jsonl.gz cannot be read"),
        ("code:stdlib.txt", "two sources are called 'stdlib'"),
    ],
)
def test_a_bad_source_is_an_error_that_names_it(quickstart, tmp_path, monkeypatch, capsys, source, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("Gr\u00fc\u00dfe ".encode("latin-1") * 50)
    Path("other.jsonl").write_text('{"body": "x"}\n')
    Path("torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 999)[:-9])
    Path("stdlib.txt").write_text("A text that is long enough to be kept as a document. " * 3)
    assert quickstart("--extra-source", source) == 2
    assert message in capsys.readouterr().out.replace("\n", " ")
    assert not (tmp_path / "out").exists()  # so that the corrected command is not refused


def test_help_explains_every_option(quickstart, capsys):
    assert quickstart("--help") == 0
    text = capsys.readouterr().out
    for option in ("--output-dir", "--steps", "--proxy-steps", "--extra-source", "--seed"):
        assert option in text


@pytest.mark.parametrize("option", ["--steps", "--proxy-steps", "--rows-per-source", "--rows-per-probe"])
def test_numbers_that_make_no_run_are_refused(quickstart, capsys, option):
    assert quickstart(option, "0") == 2
    assert f"{option}: '0' is not a positive whole number" in capsys.readouterr().err


def test_one_text_file_is_a_source_of_its_pieces_for_training_alone(tmp_path):
    text = "".join(f"Line {number} of a text that is worth weighing.\n" for number in range(400))
    (tmp_path / "notes.txt").write_text(text)
    pieces = load_extra_source(f"math:{tmp_path / 'notes.txt'}")
    assert "".join(pieces["text"][:]) == text and len(pieces) > 3
    assert set(pieces["source"][:]) == {"notes"} and set(pieces["domain"][:]) == {"math"}


def test_another_setting_in_the_same_folder_is_refused(quickstart, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"steps": 7}')
    assert quickstart("--steps", "8") == 2
    assert "steps=7, not 8" in capsys.readouterr().out
