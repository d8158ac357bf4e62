"""What a release holds, what it leaves out, and what is refused before anything is sent."""

import io
import json
import pickle

import pytest
import torch
from hub_cases import make_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4ForCausalLM

from mobilellm_hf import MobileLLMForCausalLM, save_as_llama4_text
from mobilellm_hf.hub import Target, package_data_set, package_model
from mobilellm_hf.hub.files import model_files
from mobilellm_hf.hub.sources import is_hub_id, public_name, public_settings, without_places
from mobilellm_hf.hub.stages import parse_target
from mobilellm_hf.hub.verification import Report

TARGET = Target("org/tiny-base", "midtrain-stage1")


def test_pickles_and_strangers_stay_at_home(model):
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (model / name).write_bytes(pickle.dumps({}))
    (model / "notes.txt").write_text("mine")
    files, left_out = model_files(model)
    assert left_out.keys() == {"optimizer.pt", "training_args.bin", "rng_state.pth", "notes.txt"}
    assert "pickle" in left_out["optimizer.pt"]
    assert {file.path for file in files}.isdisjoint(left_out)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def shard(model, *names):
    """The weights under the first name, and an index that names all."""
    (model / "model.safetensors").rename(model / names[0])
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {name: name for name in names}})
    )


def test_only_weights_that_transformers_loads_are_released_and_counted(model):
    data = (model / "model.safetensors").read_bytes()
    for name in ("model-00001-of-00002.safetensors", "adapter_model.safetensors"):
        (model / name).write_bytes(data)
    (model / "model.safetensors.index.json").write_text("{}")
    release = package_model(model, TARGET)
    assert release.left_out.keys() == {
        "model-00001-of-00002.safetensors", "adapter_model.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    assert "| parameters | 25,120 |" in release.card and release.summary == "25,120 parameters"
    shard(model, "model-00001-of-00001.safetensors")
    paths = {file.path for file in package_model(model, TARGET).files}
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} <= paths
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() == 25_120  # it finds them, too


@pytest.mark.parametrize("spoil, said", [
    (lambda m: (m / "config.json").unlink(), "has no config.json"),
    (lambda m: (m / "config.json").write_text("{"), "config.json is damaged"),
    (lambda m: (m / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama', not mobilellm"),
    (lambda m: (m / "model.safetensors").unlink(), "has no model.safetensors: load it"),
    (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "but pytorch_model.bin, a pickle"),
    (lambda m: shorten(m / "model.safetensors"), "damaged or cut short"),
    (lambda m: (m / "modeling_mobilellm.py").unlink(), "modeling_mobilellm.py is missing"),
    (lambda m: (m / "tokenizer.json").unlink(), "has no tokenizer"),
    (lambda m: shard(m, "model-1-of-2.safetensors", "model-2-of-2.safetensors"), "names model-2-of-2.safetensors"),
    (lambda m: (m.parent / "log.jsonl").write_text('{"step": 1}\n{"st'), "log.jsonl is damaged"),
])  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(model, spoil, said):
    spoil(model)
    with pytest.raises(ValueError, match=said):
        package_model(model, TARGET)


def test_a_config_without_auto_map_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json has no auto_map"):
        package_model(model, TARGET)


def test_the_twin_is_the_one_that_conversion_writes(model, tmp_path):
    release = package_model(model, TARGET, llama4=True)
    for file in release.files:
        path = tmp_path / "there" / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read())
    ours = MobileLLMForCausalLM.from_pretrained(model)
    save_as_llama4_text(ours, tmp_path / "converted")
    twin, converted = tmp_path / "there" / "llama4_text", tmp_path / "converted"
    assert (twin / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    ignored = ("dtype", "transformers_version", "use_cache")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (twin, converted)]
    assert [{k: v for k, v in c.items() if k not in ignored} for c in configs][0] == {
        k: v for k, v in configs[1].items() if k not in ignored
    }
    loaded, ids = Llama4ForCausalLM.from_pretrained(twin), torch.arange(60)[None]
    assert torch.allclose(loaded(ids).logits, ours(ids).logits, atol=1e-5)
    tokens = [AutoTokenizer.from_pretrained(folder)("the sum").input_ids for folder in (twin, model)]
    assert tokens[0] == tokens[1]


def test_settings_of_the_stages_before_come_along(model, tmp_path):
    before = tmp_path / "earlier" / "tiny-pretrain"
    make_model(before)
    (before.parent / "settings.json").write_text(json.dumps({"stage": "pretrain", "learning_rate": 0.00407}))
    settings = json.loads((model.parent / "settings.json").read_text())
    (model.parent / "settings.json").write_text(json.dumps(settings | {"model": str(before)}))
    release = package_model(model, TARGET)
    found = {file.path: file.read() for file in release.files if file.path.startswith("training/")}
    assert b"learning_rate: 0.00407" in found["training/pretrain/settings.yaml"]
    assert "Stages before it, the first one first: pre-training; `training/`" in release.card


def test_stages_without_settings_have_their_runs_name_and_two_of_one_stage_have_two(model, tmp_path):
    folders = [tmp_path / name / "checkpoint-7" for name in ("first-run", "second-run", "third-run")]
    for folder in folders:
        make_model(folder)
    for folder, before in zip(folders[1:], folders):
        (folder.parent / "settings.json").write_text(json.dumps({"stage": "general", "model": str(before)}))
    (model.parent / "settings.json").write_text(json.dumps({"stage": "reasoning", "model": str(folders[-1])}))
    release = package_model(model, Target("org/tiny", "reasoning"))
    (model.parent / "settings.json").write_text("{}")
    paths = [file.path for file in release.files]
    assert {"training/general/settings.yaml", "training/general-3/settings.yaml"} <= set(paths)
    assert len(paths) == len(set(paths)) and "checkpoint-7" not in release.card


@pytest.mark.parametrize("repo, stage, branch", [
    ("org/MobileLLM-R1-950M-base", "midtrain", "main"),
    ("org/MobileLLM-R1-950M-base", "midtrain-stage1", "MobileLLM-R1-950M-midtrain-stage1"),
    ("org/MobileLLM-R1-950M-base", "pretrain", "MobileLLM-R1-950M-pretrain"),
    ("org/MobileLLM-R1-950M-base", "pretrain-stage1", "MobileLLM-R1-950M-pretrain-stage1"),
    ("org/MobileLLM-R1-950M", "general", "MobileLLM-R1-950M-tulu3"),
    ("org/MobileLLM-R1-950M", "reasoning", "main"),
    ("org/MobileLLM-R1-950M", "grpo", "MobileLLM-R1-950M-grpo"),
])  # fmt: skip
def test_branches_are_named_as_the_official_ones(repo, stage, branch):
    assert Target(repo, stage).branch == branch
    assert parse_target(f"{repo}@{stage}") == (repo, branch, stage)


def test_targets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="Did you mean pretrain"):
        Target("org/name", "pretraining")
    with pytest.raises(ValueError, match="must be org/name"):
        Target("name", "pretrain")
    with pytest.raises(ValueError, match="na me"):
        Target("org/na me", "pretrain")
    assert parse_target("org/name") == ("org/name", "main", None)
    assert parse_target("org/name@v7") == ("org/name", "v7", None)
    assert parse_target("org/name@pretrain-v12") == ("org/name", "pretrain-v12", "pretrain")
    assert parse_target("org/name@grpo-step-40-2") == ("org/name", "grpo-step-40-2", "grpo")


def test_tags_count_the_releases_of_a_stage():
    assert Target("o/n", "pretrain").next_tag([]) == "pretrain-v1"
    assert Target("o/n", "pretrain").next_tag(["pretrain-v2", "pretrain-v11", "pretrain-stage1-v40"]) == "pretrain-v12"


def test_names_and_settings_say_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_id("meta-llama/Llama-3.1-8B-Instruct") and not is_hub_id("runs/model") and not is_hub_id("a/b.jsonl")
    assert not is_hub_id("/home/me/model") and not is_hub_id("runs/a/b")
    assert public_name("/home/me/teacher") == "teacher" and public_name("org/teacher") == "org/teacher"
    settings = {"a": "/home/me/x y.jsonl", "b": ["~/y", "runs/z", 3], "c": {"d": "org/name"}}
    assert public_settings(settings) == {"a": "x y.jsonl", "b": ["y", "runs/z", 3], "c": {"d": "org/name"}}
    assert public_settings("math:/home/me/notes.txt") == "math:notes.txt"
    assert public_settings(["file:///home/me/n.txt", "C:\\Users\\me\\n.txt"]) == ["n.txt", "n.txt"]
    text = "see (/home/me/a b/c.txt, `~/d/e.py`), file:///tmp/x/y. and C:\\Users\\me\\z"
    assert without_places(text) == "see (a b/c.txt, `e.py`), y. and z"
    for text in ("https://example.org/a/b", "a and/or b, 1/2, /think", "train[:6%]", "embedded:stdlib,sympy_docs"):
        assert public_settings(text) == text


def test_names_with_brackets_are_shown_as_they_are(model):
    (model / "notes[red].txt").write_text("mine")
    release = package_model(model, TARGET)
    release.write_preview()
    assert "notes[red].txt: left out" in (release.folder / "files.txt").read_text()
    report = Report("c", {"files [1]": "list[/int]"}, ["files [1]: list[/int]"])
    console = Console(file=io.StringIO(), width=100)
    console.print(report.table())
    assert "files [1]" in console.file.getvalue() and "list[/int]" in console.file.getvalue()


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        package_data_set(tmp_path / "none", Target("org/d", "data", "dataset"))
    (tmp_path / "a.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match="write the Arrow files as parquet"):
        package_data_set(tmp_path, Target("org/d", "data", "dataset"))
