"""The recipe as a user launches it: one and two processes, killed and taken up again, more seeds, and bad input."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from datasets import load_from_disk
from rich.console import Console
from stage_cases import ROOT, make_project
from test_configs import load_recipe
from trl import TrlParser

from mobilellm_hf.data.catalog import mixture
from mobilellm_hf.independent import OwnProcess
from mobilellm_hf.influence.leave_one_out import leave_one_out_runs, read_results
from mobilellm_hf.influence.leave_one_out_cost import duration
from mobilellm_hf.influence.leave_one_out_rows import declared_sources, prepare_rows
from mobilellm_hf.progress import StageProgress
from mobilellm_hf.training.stage_data import load_tokenizer_and_config
from mobilellm_hf.workspace import Workspace

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140"}
STEPS, ROWS = 16, 16 * 4
SOURCES = ["code", "math", "noise"]
RUNS = leave_one_out_runs(SOURCES, [0, 1])
ALONE = OwnProcess(0, 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("leave_one_out") / "project")
    settings = yaml.safe_load((folder / "pretrain.yaml").read_text())
    names = (
        "model_config", "tokenizer", "probes", "seq_length", "per_device_train_batch_size", "learning_rate",
        "logging_steps", "use_cpu", "warmup_steps",
    )  # fmt: skip
    settings = {name: settings[name] for name in names} | {
        "sources": [{"name": f"{folder}/texts/{source}.jsonl"} for source in SOURCES],
        "output_dir": f"{folder}/one", "max_steps": STEPS, "save_steps": 4, "monitor_every": 4, "seeds": [0, 1],
        "overlap": "allow",  # three short sentences, over and over
    }  # fmt: skip
    (folder / "loo.yaml").write_text(yaml.safe_dump(settings))
    return folder


def command(project: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    script = [str(ROOT / "recipes" / "leave_one_out.py"), "--config", str(project / "loo.yaml")]
    return [sys.executable, *launcher, *script, *options]


@pytest.fixture(scope="module")
def finished(project) -> tuple[Path, str]:
    done = subprocess.run(command(project), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return project / "one", done.stdout


def arguments(project: Path, *options: str):
    recipe = load_recipe("leave_one_out")
    parser = TrlParser((recipe.LeaveOneOutArguments, recipe.LeaveOneOutTrainingArguments))
    return parser.parse_args_and_config(["--config", str(project / "loo.yaml"), *options])


def test_the_folder_holds_figures_pictures_and_no_checkpoint(finished):
    folder, output = finished
    results = read_results(RUNS, folder / "runs")
    assert all([step for step, _ in result.curves["math"]] == [0, 4, 8, 12, 16] for result in results)
    assert all(sum(result.rows.values()) == ROWS for result in results)
    table = pyarrow.parquet.read_table(folder / "leave_one_out.parquet").to_pylist()
    assert len(table) == 2 * 3 * 2
    line = next(line for line in table if (line["source"], line["capability"], line["seed"]) == ("math", "code", 1))
    with_all, without = (result.curves["code"][-1][1] for result in (results[4], results[6]))
    assert (line["nll_all"], line["nll_without"]) == (with_all, without) and line["delta"] == without - with_all
    document = yaml.safe_load((folder / "leave_one_out.yaml").read_text())
    effect = document["effects"]["math"]["math"]
    assert effect["low"] < effect["delta"] < effect["high"] and effect["delta"] > 0.05  # it is alone of its kind
    assert document["effects"]["code"]["code"]["delta"] > 0.05 and document["settings"]["max_steps"] == STEPS
    assert all((folder / name).stat().st_size > 10_000 for name in ("heat_map.png", "curves.png"))
    assert not list(folder.glob("runs/*/checkpoint-*"))
    assert "[2/3] models" in output and "What is lost without a source" in output and "±" in output


def test_a_kill_then_two_processes_and_one_more_seed_make_the_same_curves(project, finished):
    folder = project / "two"
    options = ("--output_dir", str(folder), "--keep_models")
    first = subprocess.Popen(
        command(project, *options, "--seeds", "0"), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (list(folder.glob("runs/*/result.json")) and unfinished(folder)) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    left = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/result.json")}
    assert 1 <= len(left) < 4 and unfinished(folder) and not (folder / "heat_map.png").exists()
    done = subprocess.run(
        command(project, *options, processes=2), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("What is lost") == 1  # one of the processes speaks
    assert all(file.stat().st_mtime_ns == written for file, written in left.items())
    assert read_results(RUNS, folder / "runs") == read_results(RUNS, finished[0] / "runs")  # to the bit
    assert all((folder / "runs" / run.name / f"checkpoint-{STEPS}").exists() for run in RUNS)


def unfinished(folder: Path) -> list[Path]:
    """Checkpoints of runs that have no result."""
    return [
        path for path in folder.glob("runs/*/checkpoint-*/trainer_state.json")
        if not (path.parents[1] / "result.json").exists()
    ]  # fmt: skip


def test_a_finished_experiment_is_reported_again_and_never_trained_again(finished, project, monkeypatch, capsys):
    recipe = load_recipe("leave_one_out")
    written = {file: file.stat().st_mtime_ns for file in finished[0].glob("runs/*/result.json")}
    (finished[0] / "heat_map.png").unlink()
    monkeypatch.setattr(recipe, "train_run", None)  # which would be called
    args, training = arguments(project, "--only", "math")[:2]
    recipe.check(args, training)
    recipe.run(args, training, Console(width=140), ALONE)
    output = capsys.readouterr().out
    assert "4 models, 4 of them finished in an earlier run" in output and (finished[0] / "heat_map.png").exists()
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
    with pytest.raises(ValueError, match="settings.json is from a run with max_steps=16, not 12"):
        recipe.run(args, replace_steps(training, 12), Console(quiet=True), ALONE)


def replace_steps(training, steps: int):
    training.max_steps = steps
    return training


def test_too_large_a_budget_leaves_the_folder_free_for_a_smaller_one(project, tmp_path):
    recipe = load_recipe("leave_one_out")
    args, training = arguments(project, "--output_dir", str(tmp_path / "out"), "--max_steps", "200")[:2]
    with pytest.raises(ValueError, match="235 rows .* of noise do not suffice.* Lower max_steps or the batch to 56%"):
        recipe.run(args, training, Console(quiet=True), ALONE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows.lock"]


def test_a_dry_run_says_what_it_would_cost_and_trains_nothing(project, tmp_path):
    recipe = load_recipe("leave_one_out")
    args, training = arguments(project, "--output_dir", str(tmp_path / "dry"))[:2]
    console = Console(record=True, width=200, file=io.StringIO())
    recipe.estimate(args, training, console, processes=2)
    output = console.export_text()
    assert "8 models (3 sources, if each entry is one; seeds: 2)" in output and "measured on 3 steps after 1" in output
    assert "50 GPU hours a data set, 400 in total" in output and "on 2 that do not slow" in output
    assert not (tmp_path / "dry").exists()
    assert [duration(x) for x in (2.5, 90, 7_200, 1.44e6)] == ["2.5 s", "1.5 min", "2.0 h", "400 h"]


def prepare(project: Path, folder: Path, sources: list[dict], draws: int, probes: dict | None = None, **options):
    args = arguments(project)[0]
    tokenizer, config = load_tokenizer_and_config(args.stage())
    with StageProgress(["rows"], Console(quiet=True)) as progress, progress.stage("rows") as stage:
        workspace = Workspace(folder, {})
        return prepare_rows(
            workspace, sources, probes or args.probes, tokenizer, 32, config, draws, stage=stage,
            **({"overlap": "allow"} | options),
        )  # fmt: skip


def test_of_a_stream_what_a_model_reads_is_kept_and_no_second_pass(project, tmp_path):
    streams = [{"name": f"{project}/texts/{name}.jsonl", "streaming": name != "code"} for name in SOURCES]
    sources, probes = prepare(project, tmp_path / "few", streams, draws=ROWS, shuffle_buffer=50)
    assert [len(sources[name]) for name in ("math", "noise")] == [(ROWS + 64) // 2 + 1] * 2  # without one of three
    assert set(sources["math"]["source"][:]) == {"math"} and set(probes) == {"code", "math"}
    whole, _ = prepare(project, tmp_path / "all", streams, draws=1_000_000)
    table, _ = prepare(project, tmp_path / "table", [{"name": s["name"]} for s in streams], draws=ROWS)
    assert whole["noise"]["input_ids"][:] == table["noise"]["input_ids"][:]  # one pass
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["rows", "rows.lock", "settings.json"]


def test_rows_of_a_probe_are_refused_or_dropped(project, tmp_path):
    probe = {"name": f"{project}/probes/math.jsonl"}
    texts = [{"name": f"{project}/texts/noise.jsonl"}, {"name": f"{project}/texts/code.jsonl"}]
    with pytest.raises(ValueError, match="sources: math: the source shares documents .*'math'"):
        prepare(project, tmp_path / "out", [probe, *texts], draws=8, overlap="error")
    with pytest.raises(ValueError, match="sources: there is only noise"):
        prepare(project, tmp_path / "out", texts[:1], draws=8)
    sources, _ = prepare(project, tmp_path / "out", texts, draws=8, overlap="drop")
    assert len(load_from_disk(tmp_path / "out" / "rows")["source noise"]) == len(sources["noise"]) > 100


def test_of_a_stream_rows_of_a_probe_are_refused_or_replaced_by_later_ones(project, tmp_path):
    (tmp_path / "math.jsonl").write_text((project / "texts/math.jsonl").read_text())
    noise = (project / "texts/noise.jsonl").read_text().splitlines()
    (tmp_path / "noise.jsonl").write_text("\n".join([*noise[:5], *noise]))
    probes = {"noise": [{"name": f"{tmp_path}/probe.jsonl"}]}
    (tmp_path / "probe.jsonl").write_text("\n".join(noise[:5]))
    streams = [{"name": f"{tmp_path}/{name}.jsonl", "streaming": True} for name in ("noise", "math")]
    with pytest.raises(ValueError, match="sources: noise: the source shares documents .*'noise'"):
        prepare(project, tmp_path / "out", streams, draws=8, probes=probes, overlap="error")
    sources, _ = prepare(project, tmp_path / "out", streams, draws=8, probes=probes, overlap="drop")
    needed = 8 + 64 + 1
    assert len(sources["noise"]) == len(sources["math"]) == needed  # although some were dropped
    only = [streams[0], {"name": f"{tmp_path}/probe.jsonl", "streaming": True}]
    with pytest.raises(ValueError, match="sources: every row of probe shares documents with the probes"):
        prepare(project, tmp_path / "none", only, draws=8, probes=probes, overlap="drop")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_config": {}}, "give model_size .* or model_config: models are trained from scratch"),
        ({"model_size": "1B"}, "model_size='1B' must be one of 140M"),
        ({"tokenizer": None}, "new models need a tokenizer"),
        ({"sources": [{"name": "embedded:stdlib", "weight": 1}]}, r"sources\[0\] has the field 'weight'"),
        ({"sources": [{"name": "embedded:stdlib"}]}, "sources: there is only stdlib"),
        ({"sources": [{"name": "embedded:stdlib,licences"}], "only": ["math"]}, "only: there is no source 'math'"),
        ({"sources": [{"rows": "nowhere"}]}, r"sources\[0\]: there is no folder nowhere"),
        ({"probes": {}}, "probes is {}: write capability"),
        ({"probes": {"code": [{"nmae": "embedded"}]}}, r"probes.code\[0\] must have either a name"),
        ({"seeds": [0, 0]}, r"seeds=\[0, 0\] must be one or more different"),
        ({"rows_per_probe": 0}, "rows_per_probe=0 must be positive"),
        ({"monitor_every": 0}, "monitor_every=0 must be positive"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_refusal_names_the_field(project, change, message):
    args, training = arguments(project)[:2]
    with pytest.raises(ValueError, match=message):
        load_recipe("leave_one_out").check(replace(args, **change), training)


def test_what_would_shard_or_replicate_a_model_is_refused(project, monkeypatch):
    args, training = arguments(project)[:2]
    with pytest.raises(ValueError, match="seed=3: leave one out takes seeds, a list"):
        arguments(project, "--seed", "3")
    monkeypatch.setattr(type(training), "n_gpu", 2)
    with pytest.raises(ValueError, match="one process on one device, not 1 on 2: launch with accelerate launch"):
        load_recipe("leave_one_out").check(args, training)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="every process trains whole models: launch with .*ddp.yaml"):
        load_recipe("leave_one_out").check(args, training)


def test_the_sized_file_reads_the_sources_of_phase_1_and_probes_none_of_them():
    config = yaml.safe_load((ROOT / "recipes" / "140M" / "leave_one_out.yaml").read_text())
    assert set(declared_sources(config["sources"])) == set(mixture("pretraining", 1))
    probed = {name for entries in config["probes"].values() for name in declared_sources(entries)}
    assert not probed & set(declared_sources(config["sources"]))
    tokens = config["max_steps"] * config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * 2048
    assert tokens / 6 < 3.7e9  # Wikipedia, the smallest source, is not read twice
    assert config["save_steps"] % config["logging_steps"] == 0
