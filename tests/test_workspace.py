"""What is finished stays, what is not is done again, other settings are refused."""

import pytest

from mobilellm_hf.workspace import Workspace


def test_a_finished_stage_is_not_built_again_and_an_unfinished_one_is(tmp_path):
    workspace, built = Workspace(tmp_path / "run", {"seed": 0}), []

    def build(path):
        assert not path.exists()
        path.mkdir(parents=True)
        (path / f"part {len(built)}").touch()
        built.append(path.name)
        if len(built) == 1:
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError):
        workspace.once("corpus", build)
    assert not (tmp_path / "run" / "corpus").exists()
    folder = Workspace(tmp_path / "run", {"seed": 0}).once("corpus", build)
    assert [path.name for path in folder.iterdir()] == ["part 1"]
    assert workspace.once("corpus", build) == folder and len(built) == 2


def test_other_settings_are_refused_by_name_and_value_once_something_was_made(tmp_path):
    Workspace(tmp_path, {"seed": 0, "steps": 1})
    Workspace(tmp_path, {"seed": 0, "steps": 100}).claim()
    with pytest.raises(ValueError, match=r"settings.json is from a run with steps=100, not 50: give another"):
        Workspace(tmp_path, {"seed": 0, "steps": 50})
    Workspace(tmp_path, {"seed": 0, "steps": 100})
    (tmp_path / "settings.json").write_text('{"seed"')
    with pytest.raises(ValueError, match="settings.json is damaged"):
        Workspace(tmp_path, {"seed": 0})


def test_the_last_whole_checkpoint_is_taken_and_a_torn_one_removed(tmp_path):
    workspace = Workspace(tmp_path, {})
    assert workspace.last_checkpoint("run") is None
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"log'), (100, None)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert workspace.last_checkpoint("run").name == "checkpoint-10"
    assert [path.name for path in workspace.checkpoints("run")] == ["checkpoint-5", "checkpoint-10"]
