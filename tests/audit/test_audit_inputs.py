"""What an audit reads: streams of unknown size, other data behind the same path, text that methods were tuned on."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from audit_cases import SOURCES, arguments, build_project, texts
from datasets import Dataset
from rich.console import Console
from rival_cases import build_model
from transformers import AutoTokenizer

from mobilellm_hf.audit import cost, experiment, settings
from mobilellm_hf.audit.arguments import check
from mobilellm_hf.audit.arms import build_arms
from mobilellm_hf.audit.proxy import MixtureRun, build_mixture
from mobilellm_hf.audit.settings import settings_of, teacher_digest
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.independent import OwnProcess
from mobilellm_hf.influence.leave_one_out_cost import MeasuredSpeed
from mobilellm_hf.progress import StageProgress
from mobilellm_hf.training.stage_data import load_tokenizer_and_config
from mobilellm_hf.workspace import Workspace


@pytest.fixture
def project(tmp_path) -> Path:
    return build_project(tmp_path)


def rows_of(project: Path, args, training, folder: str = "out"):
    with StageProgress(["rows"], Console(quiet=True)) as progress, progress.stage("rows") as stage:
        return experiment.make_rows(args, training, Workspace(project / folder, {}), stage)[0]


def streams(project: Path) -> list[dict]:
    return [{"name": f"{project}/train/{source}.jsonl", "streaming": source != "noise"} for source in SOURCES]


# Streams


def test_a_stream_can_give_all_that_a_model_reads_and_its_size_is_what_was_said(project):
    for source in ("code", "math"):
        lines = [json.dumps({"text": text}) for text in texts(source, 250, 0)]
        (project / "train" / f"{source}.jsonl").write_text("\n".join(lines))
    args, training = arguments(project, "--max_steps", "40")
    sizes = {"code": 9e9, "math": 1e9}
    args = replace(args, sources=streams(project), source_tokens=sizes, arms=["proportional"])
    check(args, training)
    proxy = rows_of(project, args, training)
    draws = 47 * 4  # 40 steps and 17.6% more
    assert len(proxy.sources["code"]) == len(proxy.sources["math"]) == draws + 64
    read = build_mixture(proxy, MixtureRun("all", {"code": 1.0, "math": 0.0, "noise": 0.0}, 0, 47)).report(draws)
    assert read["code"].rows == draws and read["code"].epochs < 1
    noise = len(proxy.sources["noise"]) * 32
    assert proxy.tokens_per_source["noise"] == noise and proxy.tokens_per_source["code"] == (draws + 64) * 32
    shares = {"code": 9e9, "math": 1e9, "noise": noise}
    expected = {name: count / sum(shares.values()) for name, count in shares.items()}
    assert proxy.proportional == pytest.approx(expected)
    audited = {"code": 0.5, "math": 0.25, "noise": 0.25}
    drawn = {arm.name: arm.weights[0] for arm in build_arms(audited, proxy.proportional, [0])}
    assert drawn["proportional"] == pytest.approx(expected)
    assert drawn["sqrt_tokens"]["code"] == pytest.approx(3 * drawn["sqrt_tokens"]["math"])
    assert len({tuple(drawn[name].values()) for name in ("uniform", "proportional", "sqrt_tokens")}) == 3


@pytest.mark.parametrize("arm", ["proportional", "sqrt_tokens", "similarity", "regmix", "doremi"])
def test_no_arm_guesses_the_size_of_a_stream(project, arm):
    args, training = arguments(project)
    args = replace(args, sources=streams(project), alpha=0.9)
    check(replace(args, arms=["uniform", "permuted", "mixmin"], seeds=[0, 1, 2]), training)
    with pytest.raises(ValueError, match=rf"source_tokens: {arm} takes .* code, math are streams .*{{code: TOKENS}}"):
        check(replace(args, arms=[arm]), training)
    with pytest.raises(ValueError, match="and math is a stream of unknown size"):
        check(replace(args, arms=[arm], source_tokens={"code": 1e9}), training)
    check(replace(args, arms=[arm], source_tokens={"code": 1e9, "math": 1e9}), training)


def test_numbers_that_yaml_takes_for_text_are_read(project):
    file = project / "audit.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("learning_rates", "- 0.0"))]
    file.write_text("\n".join([*lines, "learning_rates: [6e-3, 3e-3]", "source_tokens: {code: 1e9}"]))
    args, training = arguments(project)
    assert args.learning_rates == [0.006, 0.003] and args.source_tokens == {"code": 1e9}
    check(args, training)


# The same command on something else


def settings_now(project: Path, **fields) -> dict:
    args, training = arguments(project)
    return settings_of(replace(args, **fields), training, AutoTokenizer.from_pretrained(args.tokenizer))


def test_what_finding_the_mixture_cost_is_shared_unless_it_decides_the_rows(project):
    assert "curation_share" not in settings_now(project)
    assert settings_now(project, sources=streams(project), curation_share=0.3)["curation_share"] == 0.3


@pytest.mark.parametrize("large", [False, True])
def test_other_data_at_the_same_path_are_refused(project, monkeypatch, large):
    if large:
        monkeypatch.setattr(settings, "HASHED_BYTES", 0)
    Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "source": ["code"]}).save_to_disk(project / "rows")
    fields = {"sources": [{"rows": str(project / "rows")}], "unscored_domains": {}}
    first = settings_now(project, **fields)
    Workspace(project / "out", first).claim()
    Workspace(project / "out", settings_now(project, **fields))
    for place in ("final/code.jsonl", next((project / "rows").glob("*.arrow"))):
        file = project / place
        content = file.read_bytes()
        file.write_bytes(content[:-2] + b"#" + content[-1:])  # of the same length
        with pytest.raises(ValueError, match="settings.json is from a run with data_digests="):
            Workspace(project / "out", settings_now(project, **fields))
        file.write_bytes(content)
        assert (settings_now(project, **fields) == first) != large  # the content is known by itself, or the time
        Workspace(project / "out", first | settings_now(project, **fields) | {"data_digests": first["data_digests"]})


def test_another_tokenizer_at_the_same_path_is_refused(project):
    Workspace(project / "out", settings_now(project)).claim()
    shutil.rmtree(project / "tokenizer")
    train_tokenizer(texts("code", 60, 9), 300, show_progress=False).save_pretrained(project / "tokenizer")
    with pytest.raises(ValueError, match="settings.json is from a run with tokenizer_sha256="):
        Workspace(project / "out", settings_now(project))


def test_a_teacher_is_known_by_its_weights(tmp_path):
    build_model(0).save_pretrained(tmp_path / "teacher")
    first = teacher_digest(str(tmp_path / "teacher"))
    shutil.copytree(tmp_path / "teacher", tmp_path / "copy")
    build_model(1).save_pretrained(tmp_path / "teacher")
    assert len(first) == 8 and teacher_digest(str(tmp_path / "copy")) == first
    assert teacher_digest(str(tmp_path / "teacher")) != first


# Probes


@pytest.mark.parametrize("streaming", [False, True])
def test_no_row_that_methods_were_tuned_on_decides_whichever_rows_are_taken(project, streaming):
    every = [" ".join(texts("code", 10, seed)) for seed in range(8)]
    for name, part in (("tuning", every), ("final", every[:4])):
        (project / name / "code.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    args, _ = arguments(project)
    entry = {"name": f"{project}/tuning/code.jsonl", "streaming": streaming}
    args = replace(args, rows_per_probe=1, tuning_probes={"code": [entry]})
    tokenizer, config = load_tokenizer_and_config(args.stage())
    if streaming:  # of which the first row alone is looked at
        experiment.refuse_shared_probes(args, tokenizer, config)
        return
    with pytest.raises(ValueError, match="final_probes.code shares documents .*tuning_probes.code"):
        experiment.refuse_shared_probes(args, tokenizer, config)


# Rejections


def scores(project: Path, columns: tuple[str, ...] = ("source", "tokens", "code")) -> str:
    file = project / "influence.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: [1.0] for name in columns}), file)
    return str(file)


def test_a_rejection_is_refused_before_anything_is_loaded(project):
    args, training = arguments(project, "--gradient_accumulation_steps", "2")
    args = replace(args, scores=scores(project), arms=["doremi"], alpha=0.9, seeds=[0, 1, 2, 3])
    check(args, training)  # although DoReMi, which is no arm of a rejection, could not accumulate gradients
    for name in ("teacher", "loss_model"):
        with pytest.raises(ValueError, match=f"{name}: there is no model at {project}/nowhere"):
            check(replace(args, **{name: f"{project}/nowhere"}), training)
    with pytest.raises(ValueError, match="score_rule='any' must be mean or one of code"):
        check(replace(args, score_rule="any"), training)
    with pytest.raises(ValueError, match="source_tokens: a rejection without a mixture takes its weights"):
        check(replace(args, mixture=None, sources=streams(project)), training)
    scores(project, ("tokens", "code"))
    with pytest.raises(ValueError, match="scores: .*influence.parquet has no column 'source'"):
        check(args, training)
    (project / "influence.parquet").write_text("text")
    with pytest.raises(ValueError, match="scores: .*influence.parquet is no parquet file"):
        check(args, training)


# What it will cost


def seconds(text: str) -> float:
    number, unit = text.split()[:2]
    return float(number.replace(",", "")) * {"s": 1, "min": 60, "h": 3600}[unit.strip(",.")]


def estimated(monkeypatch, project: Path, *options: str, **fields) -> str:
    """What is printed where a step takes a second and a row of a probe nothing."""
    monkeypatch.setattr(cost, "measure_speed", lambda *given: MeasuredSpeed(1.0, 0.0))
    args, training = arguments(project, "--max_steps", "60", "--curation_share", "0", *options)
    console = Console(record=True, width=200, file=io.StringIO())
    cost.estimate(replace(args, **fields), training, build_model, console, OwnProcess(0, 2))
    return console.export_text()


def test_the_estimate_counts_what_rivals_train(monkeypatch, project):
    arms = ["uniform", "regmix", "mixmin", "doremi"]
    output = estimated(monkeypatch, project, arms=arms)
    assert (
        "Before them rivals train 14 models to find their weights, for 14 min: regmix 9, mixmin 3, doremi 2" in output
    )
    assert "20 models (arms: 5, seeds: 2, learning rates: 2)" in output and "At most 1.0 min a model" in output
    assert seconds(output.partition("a model, ")[2]) == pytest.approx((20 + 14) * 60, rel=0.03)
    assert seconds(output.partition("device, or ")[2]) == pytest.approx(17 * 60, rel=0.03)


def test_the_estimate_counts_the_teachers_forward_pass(monkeypatch, project):
    build_model(0, hidden_size=64, intermediate_size=96).save_pretrained(project / "teacher")
    plain = estimated(monkeypatch, project, scores="influence.parquet")
    output = estimated(monkeypatch, project, scores="influence.parquet", teacher=str(project / "teacher"))
    models, larger = 5 * 2 * 2, build_model(0, hidden_size=64, intermediate_size=96).num_parameters()
    taught = 60 * (1 + larger / build_model(0).num_parameters() / 3)
    assert f"{models} models" in plain and f"{2 * models} models" in output
    assert seconds(plain.partition("a model, ")[2]) == pytest.approx(models * 60, rel=0.03)
    assert seconds(output.partition("a model, ")[2]) == pytest.approx(taught, rel=0.03)
    assert seconds(output.partition("parameters, ")[2]) == pytest.approx(models * (60 + taught), rel=0.05)
