"""The recipe as a user launches it: one and two processes, killed and taken up again, and given bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.influence import AdamCurvature, InfluenceScorer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "score_influence.py"
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "COLUMNS": "140", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def rows(count: int, seed: int, source: str) -> list[dict]:
    ids = torch.randint(5, 300, (count, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "labels": row, "position_ids": [*range(16)], "source": source} for row in ids]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A trained model of two checkpoints with optimizer, saved rows of two sources and two probes, and a YAML file."""
    folder = tmp_path_factory.mktemp("influence")
    tokenizer = train_tokenizer(["words of some text to train on " * 20], 300, show_progress=False)
    torch.manual_seed(0)
    config = MobileLLMConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    train = Dataset.from_list(rows(9, 1, "plain") + rows(12, 2, "other"))
    probes = Dataset.from_list(rows(4, 3, "first") + rows(5, 4, "second"))
    DatasetDict({"train": train, "probe": probes}).save_to_disk(folder / "rows")
    arguments = TrainingArguments(
        folder / "model", max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Trainer(MobileLLMForCausalLM(config), arguments, train_dataset=train, processing_class=tokenizer).train()
    settings = {
        "output_dir": str(folder / "one"),
        "checkpoints": [str(folder / "model" / f"checkpoint-{step}") for step in (2, 4)],
        "sources": [{"rows": str(folder / "rows")}],
        "probes": {
            name: [{"rows": str(folder / "rows"), "split": "probe", "sources": [source]}]
            for name, source in (("code", "first"), ("math", "second"))
        },
        "curvature": "adam", "batch_size": 2, "rows_per_shard": 4, "floor": 0.1, "samples_shown": 2,
    }  # fmt: skip
    (folder / "score.yaml").write_text(yaml.safe_dump(settings))
    return folder


def command(workplace: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        launcher = "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no".split()
        launcher += ["--dynamo_backend", "no"]
    return [sys.executable, "-m", *launcher, str(RECIPE), "--config", str(workplace / "score.yaml"), *options]


def launch(workplace: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workplace, *options, processes=processes), env=ENVIRONMENT, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(workplace) -> tuple[Path, str]:
    done = launch(workplace)
    assert done.returncode == 0, done.stdout
    return workplace / "one", done.stdout


def scores(folder: Path) -> torch.Tensor:
    table = pyarrow.parquet.read_table(folder / "influence.parquet")
    assert table["row"].to_pylist() == list(range(21))
    return torch.tensor([table["code"].to_pylist(), table["math"].to_pylist()], dtype=torch.float64).T


def test_the_scores_are_equation_4_of_the_scorers(workplace, finished):
    folder, output = finished
    data = DatasetDict.load_from_disk(workplace / "rows")
    expected = 0
    for step in (2, 4):
        checkpoint = workplace / "model" / f"checkpoint-{step}"
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        probes = {name: data["probe"].select(part) for name, part in (("code", range(4)), ("math", range(4, 9)))}
        scorer = InfluenceScorer(model, probes, AdamCurvature.from_checkpoint(checkpoint, model))
        expected = expected + step / 6 * scorer.score(data["train"])
    assert (scores(folder) - expected).norm() < 1e-5 * expected.norm()
    assert "[4/4] results" in output and "Influence of each source" in output


def test_the_folder_holds_what_a_person_looks_at(finished):
    folder, _ = finished
    document = yaml.safe_load((folder / "mixture.yaml").read_text())
    assert sum(document["weights"].values()) == pytest.approx(1) and set(document["weights"]) == {"plain", "other"}
    scored = document["scored"]
    assert scored["curvature"] == "adam" and set(scored["weights_sha256_or_commit"]) == set(scored["steps"])
    assert len(scored["rows_sha256"]) == len(scored["probe_math_sha256"]) == 64
    joint = scores(folder).mean(1)
    for number, source in enumerate(("plain", "other")):
        own = joint[:9] if number == 0 else joint[9:]  # all rows have as many tokens
        assert document["sources"][source]["joint_influence"] == pytest.approx(own.mean().item(), rel=1e-6)
    for name in ("histograms.png", "heat_map.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    samples = (folder / "samples.md").read_text()
    best = int(joint.argmax())
    assert samples.index(f"row {best},") < samples.index("least helpful") and samples.count("```text") == 3 * 2 * 2
    assert not list(folder.glob("directions/*/*.safetensors"))  # of use only while scoring


def test_two_processes_and_a_kill_in_between_make_the_same_scores(workplace, finished):
    folder = workplace / "two"
    options = ("--output_dir", str(folder))
    process = subprocess.Popen(
        command(workplace, *options, processes=2), env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(folder.glob("scores/*/shard-*.parquet")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {file: file.stat().st_mtime_ns for file in folder.glob("scores/*/shard-*.parquet")}
    assert written and not (folder / "mixture.yaml").exists()
    done = launch(workplace, *options, processes=2)
    assert done.returncode == 0, done.stdout
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
    assert torch.equal(scores(folder), scores(finished[0]))
    assert done.stdout.count("Influence of each source") == 1  # one of the processes speaks


def test_rows_of_random_tokens_are_no_evidence_and_the_mixture_says_so(finished):
    folder, output = finished
    document = yaml.safe_load((folder / "mixture.yaml").read_text())
    found = document["uncertainty"]
    assert document["weights"] == found["proportional"] == pytest.approx({"plain": 9 / 21, "other": 12 / 21})
    assert found["shrinkage"]["factor"] == 1 and "no evidence: keep the baseline" in found["verdict"]
    assert found["resampled"] == {"rows": 9, "probe samples": 4, "checkpoints": 2}
    assert "No evidence: keep the baseline" in output and "eq. 5 [95%]" in output
    for name, (low, high) in found["intervals_of_unshrunk"].items():
        assert 0 <= low <= found["unshrunk"][name] <= high <= 1 and high - low > 0.2


def test_parts_of_probes_average_to_the_scores_and_other_seeds_join_in(workplace, finished):
    folder, _ = finished
    document = json.loads((folder / "scores" / "01-checkpoint-4" / "folds-8-32.json").read_text())
    parts = [
        pyarrow.parquet.read_table(file) for file in sorted((folder / "scores/01-checkpoint-4").glob("*.parquet"))
    ]
    joined, place = pyarrow.concat_tables(parts), document["sources"].index("plain")
    own = [
        score for score, source in zip(joined["code"].to_pylist(), joined["source"].to_pylist()) if source == "plain"
    ]
    entry = document["folds"]["code"]
    assert entry["samples"] == [1, 1, 1, 1]
    assert sum(entry["influence"][place]) / 4 == pytest.approx(sum(own) / len(own), rel=1e-4)
    options = ("--output_dir", str(workplace / "seed"), "--other_seeds", str(folder), "--fold_rows", "4")
    done = launch(workplace, *options)
    assert done.returncode == 0 and "seeds " in done.stdout, done.stdout
    found = yaml.safe_load((workplace / "seed" / "mixture.yaml").read_text())["uncertainty"]
    assert found["resampled"]["seeds"] == 2 and sum(found["share_of_noise"].values()) == pytest.approx(1)


def test_other_settings_are_refused_but_the_mixture_can_be_made_anew(workplace, finished):
    before = yaml.safe_load((finished[0] / "mixture.yaml").read_text())
    done = launch(workplace, "--curvature", "identity")
    assert done.returncode != 0 and "curvature='adam', not 'identity'" in done.stdout
    (finished[0] / "scores" / "00-checkpoint-2" / "shard-00001.parquet").unlink()  # what is missing is scored again
    options = ("--floor", "0.0", "--mixture_capabilities", "math", "--shrinkage", "none")
    done = launch(workplace, *options)
    assert done.returncode == 0, done.stdout
    after = yaml.safe_load((finished[0] / "mixture.yaml").read_text())
    assert after["weights"] == after["uncertainty"]["unshrunk"] != before["uncertainty"]["unshrunk"]
    assert "not shrunk" in after["weights_are"] and "equation (5) all the same" in done.stdout


def test_low_rank_scores_come_with_their_agreement(workplace):
    done = launch(workplace, "--output_dir", str(workplace / "rank"), "--rank", "4")
    assert done.returncode == 0 and "rank 4: " in done.stdout and "rank correlation code 0." in done.stdout, (
        done.stdout
    )


def test_bad_input_is_one_line_before_any_model_is_loaded(workplace):
    settings = yaml.safe_load((workplace / "score.yaml").read_text())
    probes = settings["probes"]
    shared = {"rows": str(workplace / "rows"), "sources": ["plain"]}
    cases = [
        ({"checkpoints": [str(workplace / "nowhere")]}, "checkpoints: there is no folder"),
        ({"probes": {}}, "probes is {}: write capability"),
        ({"probes": {"tokens": probes["code"]}}, "'tokens' cannot be a capability's name"),
        ({"floor": 1.5}, "floor=1.5 must be a share"),
        ({"rank": 0}, "rank=0 must be positive"),
        ({"probe_folds": 1}, "probe_folds=1: nothing varies in one"),
        ({"other_seeds": [str(workplace / "nowhere")]}, "bootstrap.npz does not exist: score that seed first"),
        ({"source_tokens": {"plain": -1}}, "source_tokens: plain has -1"),
        ({"probes": {"code": [{"nmae": "embedded"}]}}, "probes.code[0] must have either a name"),
        ({"checkpoints": {"code": settings["checkpoints"]}}, "checkpoints are given for ['code'], but probes for"),
        ({"probes": probes | {"math": [shared]}}, "row 0 with probe 'math' (100%)"),
        ({"batch_sise": 3}, "batch_sise"),
    ]
    file = workplace / "bad.yaml"
    for change, message in cases:
        file.write_text(yaml.safe_dump(settings | {"output_dir": str(workplace / "bad")} | change))
        done = subprocess.run(
            [sys.executable, str(RECIPE), "--config", str(file)], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 2 and message in done.stdout, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert not (workplace / "bad" / "scores").exists()


def test_help_and_the_shipped_configurations_agree_with_the_fields():
    done = subprocess.run([sys.executable, str(RECIPE), "--help"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "--curvature {identity,adam,datainf,ekfac}" in done.stdout
    for file in (ROOT / "recipes").glob("*/score_influence.yaml"):
        for name in yaml.safe_load(file.read_text()):
            assert f"--{name}" in done.stdout, (file, name)
