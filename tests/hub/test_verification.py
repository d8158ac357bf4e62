"""A release as somebody finds it who has nothing of it: files, logits, the code of its card."""

import json

import pytest
from hub_cases import make_model
from hub_state import TOKEN

from mobilellm_hf.hub import Target, package_model
from mobilellm_hf.hub.blocks import (
    Block,
    BlockError,
    Record,
    clean_environment,
    code_blocks,
    run_block,
    staged_hub,
    weights_of,
)

REPO, STAGE, BRANCH = "org/tiny-base", "midtrain-stage1", "tiny-midtrain-stage1"


def test_what_was_released_is_found_and_works(hub, client, model):
    """Downloaded into an empty cache: hashes, logits with and without this package and of the twin, and each block."""
    assert client("release", str(model), REPO, STAGE, llama4=True)["value"]["is_new"]
    # By its tag: the card's code names the branch.
    found = client("check", str(model), REPO, STAGE, llama4=True, tag=f"{STAGE}-v1")["value"]
    assert found["problems"] == [] and found["commit"] == hub.repo(REPO).branches[BRANCH]
    checks = found["checks"]
    assert "SHA-256 equal" in checks["files"]
    assert checks["loads with this package"].startswith("logits differ by 0.0e+00")
    assert checks["loads without it"].startswith("logits differ by 0.0e+00")
    assert "1e-04 is allowed" in checks["loads as llama4_text, by transformers alone"]
    assert {
        name: checks[f"block {name}"] for name in ("with-plugin", "without-plugin", "llama4_text")
    } == dict.fromkeys(("with-plugin", "without-plugin", "llama4_text"), "runs")
    assert checks["block vllm"].startswith("not run: bash")
    # The next release says so in its card, and only then is there something new.
    done = client("release", str(model), REPO, STAGE, llama4=True)["value"]
    card = hub.content(hub.repo(REPO), BRANCH)["README.md"].decode()
    assert done["is_new"] and card.count("from the Hub: torch ") == 3 and card.count("*Not run.*") == 2
    assert not client("release", str(model), REPO, STAGE, llama4=True)["value"]["is_new"]


def test_what_is_wrong_is_named(hub, client, model):
    client("release", str(model), REPO, STAGE)
    repo = hub.repo(REPO)
    files = dict(repo.files(BRANCH))
    files["tokenizer.json"] = files["tokenizer.json"].replace(b'"version"', b'"Version"')
    files["modeling_mobilellm.py"] = b"raise RuntimeError('spoilt')"
    repo.branches[BRANCH] = repo.commit(repo.branches[BRANCH], files)
    make_model(model, seed=7)
    files["mine.txt"] = b"other"
    del files["training/mixture.yaml"]
    repo.branches[BRANCH] = repo.commit(repo.branches[BRANCH], files)
    problems = client("check", str(model), REPO, STAGE, blocks=False)["value"]["problems"]
    assert problems[0] == (
        "files: differ: mine.txt (only on the Hub), model.safetensors, modeling_mobilellm.py, tokenizer.json, "
        "training/mixture.yaml (only here)"
    )
    assert problems[1].startswith("loads with this package: logits differ by ")
    assert problems[2].startswith("loads without it: ") and "spoilt" in problems[2]
    assert not (model.with_name(f"{model.name}-release") / "verification.json").exists()


def test_a_rehearsal_runs_the_card_before_anything_is_sent(model):
    release = package_model(model, Target(REPO, STAGE))
    said = []
    release.rehearse(said.append)
    assert said == ["with-plugin", "without-plugin"]
    release = package_model(model, Target(REPO, STAGE))
    assert release.card.count("from these files, before they were sent: torch ") == 2
    release.rehearse(said.append)
    assert len(said) == 2  # nothing is run twice
    document = json.loads((release.folder / "verification.json").read_text())
    assert document["blocks"].keys() == {"with-plugin", "without-plugin"}


def test_a_block_that_fails_stops_the_release(model):
    (model / "modeling_mobilellm.py").write_text("raise RuntimeError('spoilt')")
    release = package_model(model, Target(REPO, STAGE))
    record = Record()
    record.note(code_blocks(release.card)["with-plugin"], weights_of(release.files), "the Hub")
    record.save(release.folder / "verification.json")  # so that it is not run
    with pytest.raises(BlockError, match="the card's block without-plugin fails:[\\s\\S]*spoilt"):
        release.rehearse()
    assert Record.load(release.folder / "verification.json").blocks.keys() == {"with-plugin"}


def test_without_the_plugin_is_without_the_plugin(model):
    release = package_model(model, Target(REPO, STAGE))
    block = code_blocks(release.card)["without-plugin"]
    spy = Block(block.name, "python", "import importlib\nimportlib.import_module('mobilellm' + '_hf')")
    with staged_hub(REPO, BRANCH, release.files) as environment:
        with pytest.raises(BlockError, match="mobilellm_hf"):
            run_block(spy, environment)
        with pytest.raises(BlockError, match="took longer than 0 s"):
            run_block(block, environment, timeout=0.01)


def test_code_that_may_be_of_others_does_not_see_the_token(model, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    code = "import os, huggingface_hub\nprint(huggingface_hub.get_token(), os.environ.get('HF_TOKEN'))"
    block = Block("spy", "python", code)
    assert run_block(block, clean_environment(tmp_path, offline=True)) == "None None\n"
    assert run_block(block, clean_environment(tmp_path, offline=False)) == f"{TOKEN} {TOKEN}\n"


def test_the_hub_without_such_a_branch(hub, client, model):
    hub.create(REPO)
    done = client("check", str(model), REPO, STAGE)
    assert "error" in done and TOKEN not in done["error"]
