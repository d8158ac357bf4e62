"""Releases to a Hub on the loopback interface: what is there afterwards, whatever the network did meanwhile."""

import hashlib
import json
import shutil

import pytest
from hub_cases import make_model
from hub_state import LOOKING, NARROW, READER, TOKEN

REPO, STAGE, BRANCH = "org/tiny-base", "midtrain-stage1", "tiny-midtrain-stage1"


def released(hub, repo=REPO, branch=BRANCH, kind="models") -> dict[str, str]:
    """path -> SHA-256 of what the branch holds."""
    files = hub.content(hub.repo(repo, kind), branch)
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items() if path != ".gitattributes"}


def assert_wholly_there(hub, done: dict) -> None:
    assert "error" not in done, done
    repo = hub.repo(REPO)
    assert released(hub) == done["value"]["files"]
    assert repo.branches[BRANCH] == done["value"]["commit"] == repo.tags[done["value"]["tag"]]
    assert repo.parents[done["value"]["commit"]] == repo.resolve("main")  # one commit on an empty branch


def assert_not_there(hub) -> None:
    if ("models", REPO) in hub.repos:
        assert released(hub, branch="main") == {} and released(hub, branch=BRANCH if _has(hub) else "main") == {}


def _has(hub) -> bool:
    return BRANCH in hub.repo(REPO).branches


def test_a_release_is_one_commit_and_a_tag(hub, client, model):
    done = client("release", str(model), REPO, STAGE, private=True)
    assert_wholly_there(hub, done)
    assert done["value"]["is_new"] and done["value"]["tag"] == "midtrain-stage1-v1"
    assert done["value"]["url"] == f"{hub.url}/{REPO}/tree/{BRANCH}"
    assert hub.repo(REPO).private and released(hub, branch="main") == {}
    assert hub.requests("POST", "/commit/") == 1
    names = {"README.md", "config.json", "model.safetensors", "modeling_mobilellm.py", "tokenizer.json",
             "training/settings.yaml", "training/mixture.yaml", "pictures/training.png"}  # fmt: skip
    assert names <= released(hub).keys()


def test_a_second_run_with_nothing_new_makes_no_commit(hub, client, model):
    first = client("release", str(model), REPO, STAGE)
    second = client("release", str(model), REPO, STAGE)
    assert not second["value"]["is_new"]
    assert [second["value"][name] for name in ("commit", "tag")] == [
        first["value"][name] for name in ("commit", "tag")
    ]
    assert hub.requests("POST", "/commit/") == 1 and len(hub.repo(REPO).tags) == 1


def test_new_weights_are_a_new_commit_without_the_files_that_went(hub, client, model):
    (model.parent / "conversations.yaml").write_text("[]")
    first = client("release", str(model), REPO, STAGE)
    assert "training/conversations.yaml" in released(hub)
    (model.parent / "conversations.yaml").unlink()
    make_model(model, seed=1)
    second = client("release", str(model), REPO, STAGE)
    assert second["value"]["is_new"] and second["value"]["tag"] == "midtrain-stage1-v2"
    assert released(hub) == second["value"]["files"] and "training/conversations.yaml" not in released(hub)
    assert hub.repo(REPO).parents[second["value"]["commit"]] == first["value"]["commit"]
    assert hub.repo(REPO).tags["midtrain-stage1-v1"] == first["value"]["commit"]


def test_stages_share_a_repository(hub, client, model):
    client("release", str(model), REPO, "midtrain", staging=str(model.parent / "a"))
    client("release", str(model), REPO, "pretrain", staging=str(model.parent / "b"))
    repo = hub.repo(REPO)
    assert repo.branches.keys() == {"main", "tiny-pretrain"} and repo.tags.keys() == {"midtrain-v1", "pretrain-v1"}
    # A branch begins with the repository's first commit, and not with the files of main.
    assert repo.commits[repo.parents[repo.branches["tiny-pretrain"]]].keys() == {".gitattributes"}


def somebody_writes(hub, branch=BRANCH):
    repo = hub.repo(REPO)
    files = {**repo.files(branch), "notes.txt": b"mine"}
    repo.branches[branch] = repo.commit(repo.branches[branch], files)
    return repo.branches[branch]


def test_a_branch_that_moved_is_reported_and_left(hub, client, model):
    client("release", str(model), REPO, STAGE)
    theirs = somebody_writes(hub)
    make_model(model, seed=1)
    done = client("release", str(model), REPO, STAGE)
    assert "MovedBranchError" in done["kinds"] and f"is at {theirs}" in done["error"]
    assert f"replace: {theirs[:12]}" in done["error"]
    assert hub.repo(REPO).branches[BRANCH] == theirs
    assert "MovedBranchError" in client("release", str(model), REPO, STAGE, replace="0" * 12)["kinds"]
    assert "MovedBranchError" in client("release", str(model), REPO, STAGE, replace=theirs[:6])["kinds"]
    done = client("release", str(model), REPO, STAGE, replace=theirs[:12])
    assert released(hub) == done["value"]["files"] and hub.repo(REPO).parents[done["value"]["commit"]] == theirs


def test_a_repository_of_others_is_not_overwritten(hub, client, model):
    hub.create(REPO)
    theirs = somebody_writes(hub, "main")
    done = client("release", str(model), REPO, "midtrain")
    assert "MovedBranchError" in done["kinds"] and hub.repo(REPO).branches["main"] == theirs


def test_a_branch_begins_where_a_squashed_history_does(hub, client, model):
    repo = hub.create(REPO)
    repo.branches["main"] = repo.commit(None, {".gitattributes": b"", "model.safetensors": b"another stage"})
    hub.fail("POST", "/commit/", status=400)
    assert "error" in client("release", str(model), REPO, STAGE)
    done = client("release", str(model), REPO, STAGE)
    assert released(hub) == done["value"]["files"]
    assert released(hub, branch="main").keys() == {"model.safetensors"}


def test_nothing_private_goes_to_a_public_repository(hub, client, model):
    hub.create(REPO)
    done = client("release", str(model), REPO, STAGE, private=True)
    assert f"{REPO} is public" in done["error"] and hub.repo(REPO).branches.keys() == {"main"}


def test_a_branch_that_moves_while_files_are_sent_is_left(hub, client, model):
    client("release", str(model), REPO, STAGE)
    make_model(model, seed=1)
    hub.before("POST", "/commit/", lambda: somebody_writes(hub))
    done = client("release", str(model), REPO, STAGE)
    assert "MovedBranchError" in done["kinds"] and "notes.txt" in released(hub)
    assert hub.requests("POST", "/commit/") == 2  # the first release's, and the one that was refused


@pytest.mark.parametrize("method, path", [
    ("POST", "/api/repos/create"), ("GET", "/refs"), ("POST", "/branch/"), ("POST", "/validate-yaml"),
    ("POST", "/commit/"), ("POST", "/tag/"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["500", "429", "cut"])
def test_one_failure_anywhere_is_tried_again(hub, client, model, method, path, kind):
    if kind == "cut":
        hub.cut(method, path)
    else:
        hub.fail(method, path, status=int(kind), **({"Retry_After": "7"} if kind == "429" else {}))
    done = client("release", str(model), REPO, STAGE)
    assert_wholly_there(hub, done)
    assert done["value"]["waited"] == [7.0 if kind == "429" else 1.0]
    assert "trying again" in done["printed"]


@pytest.mark.parametrize("method, path", [
    ("GET", "/commits/"), ("GET", "/tree/"), ("POST", "/preupload/"), ("POST", "/objects/batch"),
])  # fmt: skip
def test_what_huggingface_hub_tries_again_itself(hub, client, model, method, path):
    hub.fail(method, path, status=503, Retry_After="0")
    done = client("release", str(model), REPO, STAGE)
    assert_wholly_there(hub, done)
    assert done["value"]["waited"] == []


@pytest.mark.parametrize("fault", ["cut", "500", "429"])
def test_an_upload_that_breaks_in_the_middle_is_taken_up(hub, client, model, fault):
    if fault == "cut":
        hub.cut("PUT", "/_lfs/", after=10_000)
    else:
        hub.fail("PUT", "/_lfs/", status=int(fault), Retry_After="0")
    assert_wholly_there(hub, client("release", str(model), REPO, STAGE))


@pytest.mark.parametrize("path", ["/api/repos/create", "/branch/", "/commit/", "/tag/"])
def test_what_the_hub_does_without_an_answer_is_not_done_twice(hub, client, model, path):
    hub.lose_answer("POST", path)
    done = client("release", str(model), REPO, STAGE)
    assert_wholly_there(hub, done)
    assert hub.requests("POST", "/commit/") == 1 and len(hub.repo(REPO).tags) == 1


@pytest.mark.parametrize("method, path", [
    ("POST", "/api/repos/create"), ("POST", "/branch/"), ("POST", "/preupload/"), ("POST", "/objects/batch"),
    ("PUT", "/_lfs/"), ("POST", "/commit/"),
])  # fmt: skip
def test_a_release_that_fails_is_not_there_and_the_same_command_finishes_it(hub, client, model, method, path):
    hub.fail(method, path, status=400, times=9)
    done = client("release", str(model), REPO, STAGE)
    assert "HTTPError" in done["kinds"]  # of an upload too, which raises it from within a RuntimeError
    assert_not_there(hub)
    hub.faults.clear()
    assert_wholly_there(hub, client("release", str(model), REPO, STAGE))


def test_a_release_without_its_tag_gets_it(hub, client, model):
    hub.fail("POST", "/tag/", status=400)
    assert "error" in client("release", str(model), REPO, STAGE)
    done = client("release", str(model), REPO, STAGE)
    assert_wholly_there(hub, done)
    assert not done["value"]["is_new"] and hub.requests("POST", "/commit/") == 1


def test_a_commit_whose_answer_was_lost_is_known_when_other_weights_follow(hub, client, model):
    hub.lose_answer("POST", "/commit/")
    assert "error" in client("release", str(model), REPO, STAGE, attempts=1)
    make_model(model, seed=1)
    done = client("release", str(model), REPO, STAGE)
    assert done["value"]["is_new"] and released(hub) == done["value"]["files"]


def test_it_gives_up_after_so_many_attempts(hub, client, model):
    hub.fail("GET", "/refs", status=503, times=3)
    done = client("release", str(model), REPO, STAGE, attempts=3)
    assert "HfHubHTTPError" in done["kinds"] and hub.requests("GET", "/refs") == 3
    assert_not_there(hub)


@pytest.mark.parametrize("status", [401, 403, 404, 409])
def test_what_will_not_pass_is_not_tried_again(hub, client, model, status):
    hub.fail("POST", "/commit/", status=status)
    done = client("release", str(model), REPO, STAGE)
    assert "error" in done and hub.requests("POST", "/commit/") == 1
    assert_not_there(hub)
    assert_wholly_there(hub, client("release", str(model), REPO, STAGE))


def test_a_lost_ledger_stops_a_second_release_only_if_there_is_something_new(hub, client, model):
    client("release", str(model), REPO, STAGE)
    shutil.rmtree(model.with_name(f"{model.name}-release"))
    assert not client("release", str(model), REPO, STAGE)["value"]["is_new"]
    make_model(model, seed=1)
    assert client("release", str(model), REPO, STAGE)["value"]["is_new"]  # the ledger has learnt the commit again


def test_a_damaged_ledger_says_so(hub, client, model):
    client("release", str(model), REPO, STAGE)
    (model.with_name(f"{model.name}-release") / "releases.json").write_text("{")
    assert "releases.json is damaged" in client("release", str(model), REPO, STAGE)["error"]


def test_the_card_names_the_repository_of_the_stage_before(hub, client, model):
    before = model.with_name("tiny-pretrain")
    make_model(before)
    client("release", str(before), "org/before-base", "pretrain")
    settings = json.loads((model.parent / "settings.json").read_text())
    (model.parent / "settings.json").write_text(json.dumps(settings | {"model": str(before)}))
    client("release", str(model), "org/tiny", STAGE)
    card = hub.content(hub.repo("org/tiny"), "tiny-midtrain-stage1")["README.md"].decode()
    assert "base_model: org/before-base" in card and str(before) not in card


def test_access_is_told_in_a_sentence(hub, client):
    hub.create("org/open")
    hub.create("org/closed", private=True)
    assert client("access", "org/new")["value"] == "as tester, to a new repository"
    assert client("access", "org/open")["value"] == "as tester, to a public repository that exists"
    assert client("access", "org/closed", private=True)["value"].endswith("private repository that exists")
    assert client("access", "org/open", token=NARROW)["value"].startswith("as tester")
    refused = {
        ("org/new", None): "hf auth login",
        ("org/new", "hf_" + "x" * 34): "does not know the token",
        ("org/new", READER): "may only read",
        ("tester/new", NARROW): "no right to write to tester",
        ("org/new", LOOKING): "no right to write to org",
        ("strangers/new", TOKEN): "no member of strangers: release to one of tester, org, watched",
        ("watched/new", TOKEN): "may only read in watched",
    }
    for (repo, token), said in refused.items():
        done = client("access", repo, token=token)
        assert "AccessError" in done["kinds"] and said in done["error"], done
        assert token is None or token not in done["error"] + done["printed"]
    assert "is public" in client("access", "org/open", private=True)["error"]
    hub.protected.add("org/open")
    assert "may not write to org/open" in client("access", "org/open")["error"]


def test_a_collection_groups_repositories(hub, client):
    url = client("collect", "Small models", "org/a")["value"]
    assert client("collect", "Small models", "org/b")["value"] == url
    assert client("collect", "Small models", "org/b")["value"] == url
    ((slug, found),) = hub.collections.items()
    assert [item["id"] for item in found["items"]] == ["org/a", "org/b"]
    assert client("collect", slug, "org/c")["value"] == url and len(found["items"]) == 3
    assert "error" in client("collect", "org/none-0123456789abcdef01234567", "org/c")
