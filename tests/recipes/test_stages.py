"""recipes/pretrain.py and recipes/midtrain.py end to end, in processes of their own: results, kills, refusals."""

import json
import os
import re
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from stage_cases import ROOT, command, make_project, run
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

import mobilellm_hf  # noqa: F401  registers the model
from mobilellm_hf.training.monitors import probe_history


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A pre-trained tiny model and what its mid-training needs."""
    folder = make_project(tmp_path_factory.mktemp("stages") / "project")
    done = run("pretrain", folder / "pretrain.yaml")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    (folder / "output.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def midtrained(project) -> Path:
    done = run("midtrain", project / "midtrain.yaml")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return project / "midtrain"


@pytest.fixture
def here(monkeypatch, capsys):
    """here(recipe, config, *options) runs a recipe in this process: (status, what it printed)."""
    verbosity = transformers_logging.get_verbosity()

    def run_here(recipe: str, config: Path, *options: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", command(recipe, config, *options)[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
        return ended.value.code, " ".join(capsys.readouterr().out.split())

    yield run_here
    transformers_logging.set_verbosity(verbosity)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_pretraining_leaves_a_model_its_log_a_picture_and_what_was_drawn(project):
    folder = project / "pretrain"
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-pretrain")
    assert model.config.use_cache and len(AutoTokenizer.from_pretrained(folder / "tiny-pretrain")) == 320
    assert not (folder / "tiny-pretrain" / "training_args.bin").exists()
    log = log_of(folder)
    curves = probe_history(log)
    assert [step for step, _ in curves["math"]] == [0, 6, 12, 18, 24]
    assert curves["math"][-1][1] < curves["math"][0][1] - 0.3
    assert {"rank_me", "tokens_per_second", "loss/code", "mixture/noise"} <= {key for entry in log for key in entry}
    assert (folder / "training.png").stat().st_size > 20_000
    document = yaml.safe_load((folder / "mixture.yaml").read_text())
    assert sum(drawn["rows"] for drawn in document["drawn"].values()) == 24 * 4
    assert document["weights"] == pytest.approx({"code": 1 / 3, "math": 1 / 3, "noise": 1 / 3})
    output = (project / "output.txt").read_text()
    assert "[2/3] training" in output and "NLL of the probes" in output and "tiny-pretrain: the model" in output


def test_the_same_command_again_changes_nothing(project):
    weights = project / "pretrain" / "tiny-pretrain" / "model.safetensors"
    before = load_file(weights)
    assert run("pretrain", project / "pretrain.yaml").returncode == 0
    assert all(torch.equal(value, load_file(weights)[name]) for name, value in before.items())


def test_midtraining_distils_resamples_and_survives_a_kill(project, midtrained):
    folder = midtrained
    log = log_of(folder)
    assert {"distillation/kl", "influence/positive", "influence/cost"} <= {key for entry in log for key in entry}
    assert {file.name for file in (folder / "mixture").glob("round-*")} == {f"round-{n}.parquet" for n in (6, 12, 18)}
    weights = yaml.safe_load((folder / "mixture.yaml").read_text())["weights"]
    assert weights != pytest.approx({"code": 1 / 3, "math": 1 / 3, "noise": 1 / 3}) and sum(
        weights.values()
    ) == pytest.approx(1)  # noqa: E501

    killed = project / "killed"
    process = subprocess.Popen(
        command("midtrain", project / "midtrain.yaml", "--output_dir", str(killed)), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not list(killed.glob("checkpoint-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "tiny-midtrain-stage1").exists()
    assert run("midtrain", project / "midtrain.yaml", "--output_dir", str(killed)).returncode == 0
    whole, resumed = (load_file(path / "tiny-midtrain-stage1" / "model.safetensors") for path in (folder, killed))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_teacher_is_cached_once_and_then_not_needed(project):
    options = [
        "--teacher_cache",
        str(project / "cache"),
        "--teacher_top_k",
        "16",
        "--max_steps",
        "8",
        "--resample_every",
        "4",
    ]
    done = run("midtrain", project / "midtrain.yaml", "--output_dir", str(project / "first"), *options)
    assert done.returncode == 0 and "teacher cache" in done.stdout, done.stderr[-3000:]
    again = run("midtrain", project / "midtrain.yaml", "--output_dir", str(project / "first"), *options)
    assert again.returncode == 0 and "finished in an earlier run" in again.stdout, again.stdout + again.stderr[-2000:]
    without = yaml.safe_load((project / "midtrain.yaml").read_text()) | {"output_dir": str(project / "second")}
    del without["teacher"]
    (project / "cached.yaml").write_text(yaml.safe_dump(without))
    done = run("midtrain", project / "cached.yaml", *options)
    assert done.returncode == 0 and "teacher cache" not in done.stdout, done.stdout[-3000:]
    whole, again = (
        load_file(project / name / "tiny-midtrain-stage1" / "model.safetensors") for name in ("first", "second")
    )
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_streams_are_read_like_rows(project):
    streams = yaml.safe_load((project / "pretrain.yaml").read_text()) | {"output_dir": str(project / "streams")}
    for entry in streams["sources"]:
        entry["streaming"] = True
    streams["shuffle_buffer"] = 0
    (project / "streams.yaml").write_text(yaml.safe_dump(streams))
    done = run("pretrain", project / "streams.yaml", "--max_steps", "8")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert yaml.safe_load((project / "streams" / "mixture.yaml").read_text())["drawn"]["math"]["rows"] >= 10


@pytest.mark.parametrize(
    "recipe, options, message",
    [
        ("pretrain", ["--seq_length", "65"], "seq_length=65 is beyond the model's max_position_embeddings=64"),
        ("pretrain", ["--tokenizer", "nowhere"], "tokenizer: none could be loaded from nowhere"),
        ("pretrain", ["--max_steps", "0"], "max_steps must be given: a mixture has no epochs"),
        ("pretrain", ["--learning_rate", "1e30"], "(is nan|is inf).*: lower the learning rate"),
        ("pretrain", ["--model", "nowhere"], "model is given, and so its shape"),
        ("midtrain", ["--model", "nowhere"], "(tokenizer|model): .*nowhere"),
        ("midtrain", ["--stage", "pretrain"], "stage='pretrain' must be midtrain-stage1 or midtrain"),
        ("midtrain", ["--resample_every", "23"], "every=23 and delay_steps=2 leave no round in 24 steps"),
        ("pretrain", ["--block_size", "8"], "settings.json is from a run with block_size=16, not 8"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_line(project, recipe, options, message, tmp_path, here):
    own = [] if "--block_size" in options else ["--output_dir", str(tmp_path / "out")]
    code, text = here(recipe, project / f"{recipe}.yaml", *options, *own)
    assert code == 2 and re.search("error: .*" + message, text), text


def test_malformed_rows_are_named_before_training(project, tmp_path, here):
    rows = load_from_disk(project / "pretrain" / "rows")["source math"]
    broken = rows.select(range(8)).to_list()
    broken[5]["labels"] = broken[5]["labels"][:-1]
    Dataset.from_list(broken).save_to_disk(tmp_path / "short")
    broken[5]["labels"], broken[6]["input_ids"] = broken[4]["labels"], [9999] * 32
    Dataset.from_list(broken).save_to_disk(tmp_path / "foreign")
    messages = {"short": "row 5, has 32 input_ids and 31 labels", "foreign": "row 6, has the token id 9999"}
    for name, message in messages.items():
        config = yaml.safe_load((project / "pretrain.yaml").read_text())
        config |= {"output_dir": str(tmp_path / "out"), "sources": [{"rows": str(tmp_path / name)}]}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"weights": {"math": 1.0}}))
        code, text = here("pretrain", tmp_path / "config.yaml")
        assert code == 2 and message in text, text


def test_two_processes_train_one_model(project, midtrained, tmp_path):
    launcher = [*command("midtrain", project / "midtrain.yaml")[:1], "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2"]  # fmt: skip
    options = ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2", "--ddp_backend", "gloo"]
    script = [str(ROOT / "recipes" / "midtrain.py"), "--config", str(project / "midtrain.yaml")]
    done = subprocess.run(
        [*launcher, *script, *options], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("What was read") == 1
    two, one = log_of(tmp_path / "two"), log_of(midtrained)
    first = [next(entry["loss/code"] for entry in log if "loss/code" in entry) for log in (two, one)]
    assert first[0] == pytest.approx(first[1], rel=1e-3)
