"""Scores on disk: what a checkpoint is, shards that are whole or absent, and the sums over checkpoints."""

import json

import pyarrow.parquet
import pytest
import torch
from influence_cases import build, relative_error, rows

from mobilellm_hf.influence import InfluenceScorer
from mobilellm_hf.influence.directions import build_directions, make_curvature
from mobilellm_hf.influence.scoring import (
    combine,
    fingerprint,
    missing_shards,
    read_checkpoints,
    read_shards,
    score_shards,
)

PROBES = {"code": rows(3, 5), "math": rows(4, 6)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for step in (10, 30):
        model = build()
        torch.manual_seed(step)
        model.model.norm.weight.data += 0.1 * torch.randn(32)
        model.save_pretrained(root / f"checkpoint-{step}")
    (root / "checkpoint-30" / "trainer_state.json").write_text(json.dumps({"global_step": 33}))
    build(num_hidden_layers=3).save_pretrained(root / "deep")
    return root


def test_steps_are_read_or_asked_for(folders):
    first, second = read_checkpoints(
        [str(folders / "checkpoint-10"), str(folders / "checkpoint-30")], ["code", "math"]
    )
    assert (first.step, second.step) == (10, 33) and first.capabilities == ("code", "math")
    assert first.label == "00-checkpoint-10" and first.digest() != second.digest()
    assert read_checkpoints([str(folders / "deep")], ["code"])[0].step == 1
    with pytest.raises(ValueError, match="training step of .*deep cannot be told: write"):
        read_checkpoints([str(folders / "deep")] * 2, ["code"])
    named = read_checkpoints({"code": [{"name": str(folders / "deep"), "step": 5}]}, ["code"])
    assert named[0].step == 5 and named[0].capabilities == ("code",)


def test_bad_checkpoints_are_named(folders):
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        read_checkpoints([str(folders / "nowhere")], ["code"])
    with pytest.raises(ValueError, match="checkpoints are given for .'code'., but probes for .'code', 'math'."):
        read_checkpoints({"code": [str(folders / "deep")]}, ["code", "math"])
    with pytest.raises(
        ValueError, match="different architectures: num_hidden_layers is 2 in .*checkpoint-10 and 3 in .*deep"
    ):
        read_checkpoints([str(folders / "checkpoint-10"), {"name": str(folders / "deep"), "step": 1}], ["code"])
    for entry in ({"nmae": "x"}, {"name": str(folders / "deep"), "stepp": 3}, 7):
        with pytest.raises(ValueError, match="write a folder, org/name@revision or"):
            read_checkpoints([entry], ["code"])
    with pytest.raises(ValueError, match="must be a positive number, not -3"):
        read_checkpoints([{"name": str(folders / "deep"), "step": -3}], ["code"])
    for empty in ([], {"code": []}, {"code": "checkpoint-10"}):
        with pytest.raises(ValueError, match="must be a list"):
            read_checkpoints(empty, ["code"])


def test_shards_are_whole_or_missing_and_any_process_can_write_them(tmp_path):
    model, dataset = build(), rows(11, seed=1)
    scorer = InfluenceScorer(model, PROBES)
    expected = scorer.score(dataset)
    assert missing_shards(tmp_path, 11, 4) == [0, 1, 2]
    for rank in (1, 0):
        score_shards(scorer, dataset, tmp_path, [0, 1, 2][rank::2], 4, batch_size=2)
    assert len(list(tmp_path.iterdir())) == 3 and missing_shards(tmp_path, 11, 4) == []
    table = read_shards(tmp_path, 11, 4)
    assert table["row"].to_pylist() == list(range(11)) and set(table["source"].to_pylist()) == {"s"}
    assert table["tokens"].to_pylist() == [0] + [11] * 10
    scores = torch.tensor([table["code"].to_pylist(), table["math"].to_pylist()]).T
    assert relative_error(scores, expected) < 1e-6
    (tmp_path / "shard-00001.parquet").unlink()
    whole = (tmp_path / "shard-00002.parquet").read_bytes()
    (tmp_path / "shard-00002.parquet").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="shard-00001.parquet is missing or damaged"):
        read_shards(tmp_path, 11, 4)
    assert missing_shards(tmp_path, 11, 4) == [1, 2]
    seen = []
    score_shards(scorer, dataset, tmp_path, [1, 2], 4, batch_size=2, on_batch=seen.append)
    assert sum(seen) == 7 and read_shards(tmp_path, 11, 4).equals(table)
    assert not list(tmp_path.glob("*.partial"))


def test_directions_on_disk_are_the_scorers_own_and_are_not_taken_twice(tmp_path):
    model, dataset = build(), rows(5, seed=1)
    batches = []
    arguments = (tmp_path, model, PROBES, lambda: make_curvature("datainf", model, "", rows(5, 9), 8, "all"))
    directions = build_directions(*arguments, exclude=["*norm*"], on_batch=batches.append)
    scorer = InfluenceScorer.from_directions(model, directions, list(PROBES))
    expected = InfluenceScorer(
        model, PROBES, make_curvature("datainf", model, "", rows(5, 9), 8, "all"), exclude=["*norm*"]
    )
    assert relative_error(scorer.score(dataset), expected.score(dataset)) < 1e-6
    assert sum(batches) == 7
    (tmp_path / "directions-code-math.safetensors").unlink()
    (tmp_path / "gradient-math.safetensors").unlink()
    again = build_directions(*arguments, exclude=["*norm*"], on_batch=batches.append)
    assert sum(batches) == 7 + 4 and all(torch.equal(again[name], directions[name]) for name in directions)
    with pytest.raises(ValueError, match="curvature='hessian' must be one of identity, adam, datainf, ekfac"):
        make_curvature("hessian", model, "", dataset)


def test_each_capability_is_averaged_over_its_own_checkpoints(folders):
    names = [str(folders / f"checkpoint-{step}") for step in (10, 30)]
    spec = {"code": names, "math": [{"name": names[0], "step": 4}]}
    early, late, other = read_checkpoints(spec, ["code", "math"])
    tables = {
        early: pyarrow.table({"code": [1.0, 2.0]}),
        late: pyarrow.table({"code": [3.0, float("nan")]}),
        other: pyarrow.table({"math": [7.0, 8.0]}),
    }
    scores = combine(tables, ["code", "math"])
    assert scores[0].tolist() == pytest.approx([(10 * 1.0 + 33 * 3.0) / 43, 7.0])
    assert scores[1, 0].isnan() and scores[1, 1] == 8.0


def test_the_fingerprint_is_of_ids_and_labels_in_order():
    dataset = rows(3, seed=1)
    same = dataset.remove_columns("source")
    other = dataset.select([1, 0, 2])
    relabelled = dataset.map(lambda row: {"labels": [-100, *row["labels"][1:-1], -100]})
    assert fingerprint(dataset) == fingerprint(same)
    assert len({fingerprint(part) for part in (dataset, other, relabelled)}) == 3
