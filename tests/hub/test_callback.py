"""Checkpoints released while a Trainer trains, and a training that no failure of the Hub ends."""

import json

import pytest
from hub_cases import make_model
from hub_state import READER
from huggingface_hub import ModelCard

from mobilellm_hf.hub import ReleaseCallback, Target
from mobilellm_hf.hub.arguments import CheckpointArguments, releasing
from mobilellm_hf.hub.callback import FOLDER
from mobilellm_hf.training.arguments import StageArguments
from mobilellm_hf.training.grpo_arguments import GRPOArguments

REPO, BRANCH = "org/tiny-base", "tiny-pretrain"


def steps_on(hub) -> dict[str, int]:
    """tag -> step of the checkpoint that it names, from the card."""
    repo, found = hub.repo(REPO), {}
    for tag in repo.tags:
        card = hub.content(repo, tag)["README.md"].decode()
        found[tag] = int(card.split("goes on: step ")[1].split(".")[0])
    return found


def test_each_checkpoint_is_a_commit_on_the_stages_branch(hub, client, model, tmp_path):
    done = client("train", str(model), str(tmp_path / "out"), REPO, private=True)["value"]
    assert done["failures"] == [] and list(done["released"]) == [2, 4, 6] and done["waiting"] == []
    assert done["saved"] == ["checkpoint-6"]  # save_total_limit went on as ever
    assert steps_on(hub) == {"pretrain-step-2": 2, "pretrain-step-4": 4, "pretrain-step-6": 6}
    repo = hub.repo(REPO)
    assert repo.private and repo.branches.keys() == {"main", BRANCH}
    assert repo.tags["pretrain-step-6"] == repo.branches[BRANCH] == done["released"][6]
    files = hub.content(repo, BRANCH)
    assert {"model.safetensors", "tokenizer.json", "modeling_mobilellm.py", "README.md"} <= files.keys()
    assert not any(path.endswith((".pt", ".bin", ".pth")) for path in files)
    assert ModelCard(files["README.md"].decode()).data.pipeline_tag == "text-generation"
    assert json.loads(files["config.json"])["use_cache"]  # which training had turned off
    on_disk = (tmp_path / "out/checkpoint-6/model.safetensors").read_bytes()
    assert files["model.safetensors"] == on_disk
    assert not json.loads((tmp_path / "out/checkpoint-6/config.json").read_text())[
        "use_cache"
    ]  # which is left as it is


def test_a_hub_that_is_away_is_asked_again_at_the_next_save(hub, client, model, tmp_path):
    hub.fail("POST", "/api/repos/create", status=400, times=1)
    done = client("train", str(model), str(tmp_path / "out"), REPO)["value"]
    assert done["steps"] == 6 and list(done["released"]) == [2, 4, 6]
    (failure,) = done["failures"]
    assert failure.startswith("step 2 is not released yet: ")


def test_a_hub_that_stays_away_ends_no_training_and_the_next_run_sends_what_waits(hub, client, model, tmp_path):
    hub.fail("POST", "/api/repos/create", status=403, times=99)
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=4)["value"]
    assert done["steps"] == 4 and done["released"] == {} and done["waiting"] == ["checkpoint-2", "checkpoint-4"]
    assert done["failures"][-1].startswith("not released: steps 2, 4.")
    assert not hub.repos
    hub.faults.clear()
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=2)["value"]
    assert done["at_begin"] == [2, 4] and done["waiting"] == []
    assert steps_on(hub) == {
        "pretrain-step-2": 2,
        "pretrain-step-4": 4,
        "pretrain-step-2-2": 2,
    }  # the last of the new run


def test_the_oldest_are_let_go_when_too_many_wait(hub, client, model, tmp_path):
    hub.fail("POST", "/api/repos/create", status=400, times=99)
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=6, keep=2)["value"]
    assert done["waiting"] == ["checkpoint-4", "checkpoint-6"]
    assert "step 2 waited too long, and is let go" in done["failures"]


def test_a_cut_connection_in_an_upload_costs_nothing(hub, client, model, tmp_path):
    hub.cut("PUT", "/_lfs/", after=1000)
    hub.lose_answer("POST", "/commit/")
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=2)["value"]
    assert done["failures"] == [] and steps_on(hub) == {"pretrain-step-2": 2}
    assert hub.requests("POST", "/commit/") == 1


def test_another_training_in_the_same_folder_gets_tags_of_its_own(hub, client, model, tmp_path):
    client("train", str(model), str(tmp_path / "out"), REPO, steps=2)
    make_model(model, seed=1)
    client("train", str(model), str(tmp_path / "out"), REPO, steps=2)
    assert steps_on(hub) == {"pretrain-step-2": 2, "pretrain-step-2-2": 2}
    assert hub.repo(REPO).branches[BRANCH] == hub.repo(REPO).tags["pretrain-step-2-2"]


def test_a_training_elsewhere_does_not_overwrite_the_branch(hub, client, model, tmp_path):
    client("train", str(model), str(tmp_path / "one"), REPO, steps=2)
    make_model(model, seed=1)
    done = client("train", str(model), str(tmp_path / "two"), REPO, steps=2)["value"]
    assert any("was not released from" in line for line in done["failures"]) and done["steps"] == 2
    assert list(hub.repo(REPO).tags) == ["pretrain-step-2"]


def test_the_finished_model_goes_on_top_of_its_checkpoints(hub, client, model):
    """As recipes/release.py sends it from the folder of the run in which they were saved."""
    run = model.parent
    client("train", str(model), str(run), REPO, steps=2)
    done = client("release", str(model), REPO, "pretrain")
    assert done["value"]["is_new"] and hub.repo(REPO).branches[BRANCH] == done["value"]["commit"]
    make_model(model, seed=1)
    done = client("train", str(model), str(run), REPO, steps=4)["value"]
    assert done["failures"] == [] and hub.repo(REPO).branches[BRANCH] == done["released"][4]


def test_whatever_goes_wrong_here_the_training_goes_on(hub, client, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FOLDER).write_text("a file where its folder should be")
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=4)["value"]
    assert done["steps"] == 4 and done["released"] == {}
    assert [line.split(":")[0] for line in done["failures"]] == [
        "checkpoint 2 cannot be put aside", "checkpoint 4 cannot be put aside",
    ]  # fmt: skip


def test_a_token_that_may_not_write_is_refused_before_the_first_step_only(hub, client, model, tmp_path):
    done = client("train", str(model), str(tmp_path / "out"), REPO, token=READER)
    assert "AccessError" in done["kinds"] and "may only read" in done["error"]
    assert not (tmp_path / "out/checkpoint-2").exists()
    client("train", str(model), str(tmp_path / "out"), REPO, steps=2)
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=4, token=READER, resume=True)["value"]
    assert done["steps"] == 4 and done["waiting"] == ["checkpoint-4"]
    assert done["failures"][0].startswith("nobody knows yet whether the token may write: the token may only read")
    assert READER not in str(done)


def test_a_hub_that_is_away_when_training_begins_does_not_end_it(hub, client, model, tmp_path):
    hub.fail("GET", "/api/whoami-v2", status=400)
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=2)["value"]
    assert list(done["released"]) == [2] and len(done["failures"]) == 1


def test_a_tokenizer_is_loaded_by_its_name_for_a_trainer_without(hub, client, model, tmp_path):
    done = client("train", str(model), str(tmp_path / "out"), REPO, steps=2, tokenizer=str(model))["value"]
    assert done["failures"] == []
    files = hub.content(hub.repo(REPO), BRANCH)
    assert files["tokenizer.json"] == (model / "tokenizer.json").read_bytes()


def test_the_arguments_of_a_training_make_a_callback():
    assert CheckpointArguments().callbacks("pretrain") == []
    given = []

    def run(args, training, console, callbacks):
        given.extend(callbacks)

    for args in (StageArguments(stage="midtrain", model="org/before"), GRPOArguments(model="org/before")):
        releasing(run)(args, None, CheckpointArguments("org/name", release_private=True, release_license="mit"), None)
    assert [(found.target, found.private, found.license, found.tokenizer) for found in given] == [
        (Target("org/name", "midtrain"), True, "mit", "org/before"),
        (Target("org/name", "grpo"), True, "mit", "org/before"),
    ]
    with pytest.raises(ValueError, match="must be org/name"):
        CheckpointArguments("name").callbacks("pretrain")


def test_what_cannot_work_is_said_before_training(client, model, tmp_path):
    with pytest.raises(ValueError, match="must be org/name"):
        ReleaseCallback("name", "pretrain")
    with pytest.raises(ValueError, match="must be one of"):
        ReleaseCallback("org/name", "pretrained")
    done = client("callback_without_tokenizer", str(model), str(tmp_path / "out"))
    assert "give the tokenizer" in done["error"]
