"""The recipe as a user launches it: rivals and all, killed and taken up by two processes, and bad input."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from audit_cases import arguments, build_project
from rich.console import Console
from transformers import AutoTokenizer

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.audit import experiment
from mobilellm_hf.audit.arguments import check
from mobilellm_hf.audit.cost import rival_models
from mobilellm_hf.audit.rejection import row_lengths
from mobilellm_hf.independent import OwnProcess
from mobilellm_hf.progress import StageProgress
from mobilellm_hf.workspace import Workspace

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140"}
ALONE = OwnProcess(0, 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return build_project(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def audit(project: Path, *options: str, **fields) -> str:
    """What the audit prints."""
    args, training = arguments(project, *options)
    args = replace(args, **fields)
    console = Console(record=True, width=140, file=io.StringIO())
    check(args, training)
    experiment.run_audit(args, training, console, ALONE)
    return console.export_text()


@pytest.fixture(scope="module")
def finished(project) -> tuple[Path, str, dict]:
    """The folder, what was printed, and results.json before another audit in the folder replaces it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are compared with it have, since more round differently
    output = audit(project)
    torch.set_num_threads(threads)
    return project / "one", output, results_of(project / "one")


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def assert_same(found: object, expected: object) -> None:
    """Of the same keys and values, but for the rounding of another process."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    else:
        assert found == (expected if isinstance(expected, str | None) else pytest.approx(expected, rel=1e-4))


def test_a_mixture_of_what_is_asked_for_helps(finished):
    """Most of what the mixture reads is of the probe's kind, which uniform gives a third to."""
    folder, output, document = finished
    assert document["verdict"]["word"] == "mixed" and "No placebo was trained" in document["verdict"]["headline"]
    assert "8 models (arms: 2, seeds: 2, learning rates: 2)" in output and "tokens a second, measured on" in output
    assert "[3/4] models" in output and document["verdict"]["headline"] in output
    for part in document["comparisons"]:
        assert part["final"]["mean"] < -0.02 and part["p_value"] == 2 / 4 and part["result"] == "better"
        assert part["unscored"]["mean"] > 0 and part["worst"] == "math"
    arms = document["arms"]
    assert (arms["mixture"]["spent"]["steps"], arms["uniform"]["spent"]["steps"]) == (12, 14)  # 17.6% more
    assert arms["uniform"]["spent"]["tokens"] == 14 * 4 * 32
    rows = arms["mixture"]["spent"]["rows"]["1"]
    assert rows["noise"] == 0 and rows["code"] + rows["math"] == 48 and abs(rows["code"] - 0.8 * 48) <= 4
    assert 0 < arms["mixture"]["bits_per_byte"]["0.02"]["code"][0] < 8
    assert "mixture 17.6%; uniform nothing, so that they trained longer" in output
    assert (folder / "forest.png").stat().st_size > 10_000 and not list(folder.glob("arms/*/checkpoint-*"))


def test_another_mixture_in_the_folder_trains_its_own_arms_only(finished, project):
    (project / "other.yaml").write_text(yaml.safe_dump({"weights": {"noise": 100}}))
    before = {path.name: path.stat().st_mtime_ns for path in finished[0].glob("arms/*/result.json")}
    results = {path: path.stat().st_mtime_ns for path in finished[0].glob("arms/*/result.json")}
    output = audit(project, "--mixture", str(project / "other.yaml"), "--learning_rates", "2e-2")
    assert before and "4 models, 2 of them finished in an earlier run" in output
    assert all(path.stat().st_mtime_ns == written for path, written in results.items())
    kept = {path.name.rpartition("-")[0]: path for path in (finished[0] / "results").iterdir()}
    assert set(kept) == {"mine", "other"} and results_of(kept["mine"]) == finished[2]
    assert results_of(kept["other"]) == results_of(finished[0]) != finished[2]  # beside the arms are the latest
    assert (kept["mine"] / "forest.png").read_bytes() != (kept["other"] / "forest.png").read_bytes()
    assert "The mixture harms: it is worse than uniform." in output and "One learning rate" in output


def test_all_kinds_of_arms_and_what_finding_them_cost(project, tmp_path):
    names = "uniform proportional sqrt_tokens permuted random similarity regmix mixmin doremi doge".split()
    options = ("--output_dir", str(tmp_path), "--max_steps", "2", "--save_steps", "2", "--logging_steps", "1")
    args, training = arguments(project, *options)
    args = replace(args, arms=names, others={"theirs": {"math": 1.0}}, curation_share=0.1)
    with StageProgress(["weights"], Console(quiet=True)) as progress, progress.stage("weights") as stage:
        proxy, probes, _ = experiment.make_rows(args, training, Workspace(tmp_path, {}), stage)
        arms = {arm.name: arm for arm in experiment.make_arms(args, proxy, tmp_path / "rivals", stage)}
        again = experiment.make_arms(args, replace(proxy, build_model=None), tmp_path / "rivals", stage)
    assert list(arms) == ["mixture", *names[:5], *names[5:], "theirs"] and again == list(arms.values())
    assert [arms[name].kind for name in ("similarity", "regmix", "theirs")] == ["placebo", "rival", "rival"]
    assert arms["similarity"].weights[0]["code"] > 0.8 and arms["similarity"].curation == 0
    for name in ("regmix", "mixmin", "doremi", "doge"):
        assert arms[name].curation == pytest.approx(0.01 * arms[name].details["tokens"] / (2 * 4 * 32))
        assert sum(arms[name].weights[1].values()) == pytest.approx(1) and (tmp_path / "rivals" / name).is_dir()
    assert arms["regmix"].curation > 0.09  # nine models, and their probes
    assert (arms["mixture"].curation, arms["theirs"].curation, arms["permuted"].curation) == (0.1, 0.1, 0)
    assert set(probes) == {"code", "math"} and set(proxy.tuning_probes) == {"code"}
    assert rival_models(args) == {"regmix": 9, "mixmin": 3, "doremi": 2, "doge": 1}
    assert rival_models(replace(args, scores="influence.parquet")) == {}


def command(project: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    script = [str(ROOT / "recipes" / "audit.py"), "--config", str(project / "audit.yaml")]
    return [sys.executable, *launcher, *script, *options]


def test_a_kill_then_two_processes_find_the_same(project, finished):
    folder = project / "two"
    first = subprocess.Popen(
        command(project, "--output_dir", str(folder)), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(folder.glob("arms/*/result.json")) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    left = {file: file.stat().st_mtime_ns for file in folder.glob("arms/*/result.json")}
    assert 1 <= len(left) < 8 and not (folder / "results.json").exists()
    done = subprocess.run(
        command(project, "--output_dir", str(folder), processes=2), env=ENVIRONMENT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("[3/4] models") == 1 and "on 2 that do not slow each other down" in done.stdout
    assert all(file.stat().st_mtime_ns == written for file, written in left.items())
    assert_same(results_of(folder)["arms"], finished[2]["arms"])


def test_a_dry_run_trains_nothing(project, tmp_path):
    output = audit(project, "--dry_run", "--output_dir", str(tmp_path / "dry"))
    assert "8 models" in output and "At most" in output and not (tmp_path / "dry").exists()


def test_a_rejection_is_audited_plain_and_by_a_teacher(project, tmp_path):
    args, training = arguments(project, "--output_dir", str(tmp_path / "out"))
    with StageProgress(["rows"], Console(quiet=True)) as progress, progress.stage("rows") as stage:
        proxy, _, _ = experiment.make_rows(args, training, Workspace(tmp_path / "rows", {}), stage)
    names = [(source, number) for source, rows in proxy.sources.items() for number in range(len(rows))]
    columns = {
        "row": list(range(len(names))), "source": [name for name, _ in names],
        "tokens": [row_lengths(proxy.sources[name])[number] for name, number in names],
        "code": [float((source == "code") == (number % 4 > 0)) - 0.5 for source, number in names],
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "influence.parquet")
    shape = MobileLLMConfig(**args.model_config, vocab_size=len(AutoTokenizer.from_pretrained(args.tokenizer)))
    MobileLLMForCausalLM(shape).save_pretrained(tmp_path / "teacher")
    options = ("--max_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--output_dir", str(tmp_path / "out"))
    teacher, scores = str(tmp_path / "teacher"), str(tmp_path / "influence.parquet")
    with pytest.raises(ValueError, match="2 do not suffice for 4 comparisons"):
        audit(project, *options, scores=scores)
    args, training = arguments(project, *options, "--learning_rates", "2e-2")
    console = Console(record=True, width=140, file=io.StringIO())
    # Two seeds suffice to train; that they cannot decide, `check` would have said.
    experiment.run_audit(replace(args, scores=scores, mixture=None, teacher=teacher), training, console, ALONE)
    output = console.export_text()
    folders = sorted(path.parent.name for path in (tmp_path / "out").glob("rejection*/results.json"))
    assert len(folders) == 2 and folders[0] == "rejection" and folders[1].startswith("rejection-by-")
    plain, taught = (results_of(tmp_path / "out" / folder) for folder in folders)
    assert list(plain["arms"]) == ["keep_positive", "all_rows", "random_rows", "length_matched", "flipped"]
    kept = plain["arms"]["keep_positive"]["spent"]["rows"]["0"]
    assert (
        plain["arms"]["all_rows"]["weights"]["0"] == pytest.approx(dict(proxy.proportional))
        and sum(kept.values()) == 8
    )
    figures = [found["arms"]["all_rows"]["bits_per_byte"]["0.02"]["code"] for found in (plain, taught)]
    assert figures[0] != figures[1] and "Plain cross-entropy" in output and f"Distilled from {teacher}" in output


def test_settings_of_another_audit_are_refused(finished, project):
    with pytest.raises(ValueError, match="settings.json is from a run with max_steps=12, not 8"):
        audit(project, "--max_steps", "8")


def test_a_final_probe_that_methods_were_tuned_on_is_refused(project, tmp_path):
    shared = {"code": [{"name": f"{project}/tuning/code.jsonl"}]}
    with pytest.raises(ValueError, match="final_probes.code shares documents .* 'tuning_probes.code'"):
        audit(project, "--output_dir", str(tmp_path / "x"), final_probes=shared)
    domain = {"verse": shared["code"]}
    with pytest.raises(ValueError, match="unscored_domains.verse shares documents .* 'tuning_probes.code'"):
        audit(project, "--output_dir", str(tmp_path / "x"), unscored_domains=domain)
    sources = [{"name": f"{project}/final/code.jsonl"}, {"name": f"{project}/train/math.jsonl"}]
    with pytest.raises(ValueError, match="sources: code: the source shares documents with .*'final code'"):
        audit(project, "--output_dir", str(tmp_path / "x"), sources=sources, overlap="error")
    assert not (tmp_path / "x" / "settings.json").exists()


def test_weights_of_a_source_that_is_not_there_leave_the_folder_free(project, tmp_path):
    (tmp_path / "m.yaml").write_text("code: 0.5\nprose: 0.5\n")
    with pytest.raises(ValueError, match="m.yaml: weights: 'prose' is to have a share of 0.5, and there is no such"):
        audit(project, "--mixture", str(tmp_path / "m.yaml"), "--output_dir", str(tmp_path / "x"))
    assert not (tmp_path / "x" / "settings.json").exists()


def test_a_budget_that_no_cap_allows_is_refused_before_rivals_train(project, tmp_path):
    (tmp_path / "m.yaml").write_text("code: 1.0\n")
    options = ("--mixture", str(tmp_path / "m.yaml"), "--output_dir", str(tmp_path / "x"), "--max_steps", "2000")
    with pytest.raises(ValueError, match="mixture cannot be trained with seed 0: .*Lower max_steps"):
        audit(project, *options, "--arms", "uniform", "regmix", "--alpha", "0.9", "--seeds", "0", "1", "2")
    assert not (tmp_path / "x" / "rivals").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixture": None}, "mixture: name the file of the weights to audit"),
        ({"alpha": 0.05, "seeds": [0, 1, 2, 3, 4]}, "seeds: 5 do not suffice for 1 comparison\\. .*Take 6 seeds"),
        (
            {"arms": ["uniform", "permuted"], "alpha": 0.05, "seeds": [0, 1, 2, 3, 4, 5]},
            "6 do not suffice for 2 comparisons.*Take 7 seeds, or compare with 1 arm at most",
        ),
        ({"seeds": [0, 1, 2, 3, 4, 4]}, "seeds=.* must be different whole numbers"),
        ({"arms": ["regmax"]}, "arms: there is no arm 'regmax'; there are uniform"),
        ({"arms": []}, "there is nothing to compare"),
        ({"arms": ["uniform", "uniform"]}, "arms: uniform is there twice"),
        ({"arms": "uniform"}, "arms is 'uniform': write a list"),
        ({"others": ["x.yaml"]}, r"others is \['x.yaml'\]: write name -> file"),
        ({"seeds": 8}, r"seeds is 8: write a list, such as \[0, 1, 2\]"),
        ({"seeds": [0, 1.5]}, "seeds: 1.5 is no whole number"),
        ({"learning_rates": "6e-3"}, "learning_rates is '6e-3': write a list"),
        ({"learning_rates": ["fast"]}, "learning_rates: 'fast' is no number"),
        ({"source_tokens": {"code": 0}}, "source_tokens: code has 0.0, which is no number of tokens"),
        ({"source_tokens": [1e9]}, "source_tokens is .*: write source -> tokens"),
        ({"others": {"a/b": "x.yaml"}}, "others: 'a/b' cannot name an arm"),
        ({"others": {"uniform": "x.yaml"}}, "others: 'uniform' cannot name an arm"),
        ({"learning_rates": [1e-2, 1e-2]}, "learning_rates=.* must be different positive"),
        ({"learning_rates": [-1e-2, 1e-2]}, "learning_rates=.* must be different positive"),
        ({"curation_share": 1.2}, "curation_share=1.2 must be a share"),
        ({"proxy_share": -0.1}, "proxy_share=-0.1 must be a share"),
        ({"alpha": 0}, "alpha=0 must be between 0 and 1"),
        ({"max_epochs": 0}, "max_epochs=0 must be positive"),
        ({"final_probes": {}}, r"final_probes is \{\}: write capability"),
        ({"tuning_probes": {}, "arms": ["mixmin"]}, "tuning_probes: mixmin finds its weights by them"),
        ({"unscored_domains": {"code": [{"name": "embedded:stdlib"}]}}, "unscored_domains: 'code' is a final probe"),
        ({"sources": []}, "sources must be a list"),
        ({"teacher": "x"}, "teacher is for the audit of a rejection: give scores"),
        ({"scores": "nowhere.parquet"}, "scores: there is no file nowhere.parquet"),
        ({"model_config": {}}, "give model_size .* or model_config"),
        ({"model_size": "7B"}, "model_size='7B' must be one of"),
        ({"tokenizer": None}, "need a tokenizer"),
    ],
)
def test_what_makes_no_audit_is_refused_before_anything_is_loaded(project, fields, message):
    args, training = arguments(project)
    check(args, training)
    with pytest.raises(ValueError, match=message):
        check(replace(args, **fields), training)


def test_declared_sources_are_compared_with_the_weights_at_once(project):
    args, training = arguments(project)
    with pytest.raises(ValueError, match="mine.json: weights: 'code' is to have a share of 0.8"):
        check(replace(args, sources=[{"name": "embedded:stdlib,sympy_docs"}]), training)
    with pytest.raises(ValueError, match="source_tokens names 'prose'; the sources are stdlib, sympy_docs"):
        named = [{"name": "embedded:stdlib,sympy_docs"}]
        check(replace(args, sources=named, source_tokens={"prose": 1e9}), training)
    with pytest.raises(ValueError, match="seed=3: an audit takes seeds"):
        arguments(project, "--seed", "3")
    args, training = arguments(project, "--arms", "doge", "--gradient_accumulation_steps", "2")
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 2, but DoReMi and DoGE"):
        check(replace(args, alpha=0.9), training)
