"""The mixture: token shares, one order for any number of workers, live changes, and what is refused."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from mobilellm_hf.data.draws import Cursor, RandomOrder
from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.streaming import PackedStream
from mobilellm_hf.data.tokenization import train_tokenizer

SIZES = {"a": 300, "b": 500, "c": 40}
SOURCES = np.repeat(list(SIZES), list(SIZES.values()))
WEIGHTS = {"a": 0.5, "b": 0.45, "c": 0.05}
KEEP = np.random.default_rng(0).random(840) > 0.3


def rows(order=None) -> Dataset:
    """Rows that say in their tokens which row they are."""
    ids = [[number] * 6 for number in range(840)]
    dataset = Dataset.from_dict({"input_ids": ids, "position_ids": [[0, 1, 2, 0, 1, 2]] * 840, "source": SOURCES})
    return dataset if order is None else dataset.select(order)


def mixture(**options) -> MixtureDataset:
    return MixtureDataset(rows(), WEIGHTS, **(dict(num_draws=2000) | options))


def numbers(mixture, draws=None) -> list[int]:
    draws = range(len(mixture)) if draws is None else draws
    return [row["input_ids"][0].item() for row in mixture.__getitems__(list(draws))]


def test_rows_come_whole_and_say_which_they_are():
    data = mixture()
    data.emit_ids = True
    row = data[11]
    number = row["input_ids"][0].item()
    assert {name: value.tolist() for name, value in row.items()} == {
        "input_ids": [number] * 6, "labels": [number] * 6, "position_ids": [0, 1, 2, 0, 1, 2], "row_id": number,
        "source_id": "abc".index(SOURCES[number]),
    }  # fmt: skip
    assert all(value.dtype == torch.int64 for value in row.values())
    sources, _ = data.locate(range(2000))
    assert [data.sources[source] for source in sources] == SOURCES[numbers(data)].tolist()


def test_no_row_repeats_before_all_of_its_source_were_seen():
    drawn = np.array(numbers(mixture()))
    for name, size in SIZES.items():
        read = drawn[SOURCES[drawn] == name]
        for start in range(0, len(read), size):
            part = read[start : start + size]
            assert len(set(part)) == len(part)
        report = mixture().report()[name]
        assert (report.rows, report.tokens) == (len(read), 6 * len(read))
        assert report.epochs == pytest.approx(len(read) / size)
        assert abs(report.rows - 2000 * WEIGHTS[name]) < 6  # the last block is not whole


def test_a_data_set_that_was_shuffled_is_read_by_its_own_order():
    order = np.random.default_rng(1).permutation(840)
    plain, shuffled = mixture(), MixtureDataset(rows(order), {"b": 1.0}, 500)
    assert sorted(numbers(shuffled)) == sorted(np.flatnonzero(SOURCES == "b"))
    shuffled.emit_ids = plain.emit_ids = True
    assert order[shuffled[3]["row_id"]] == shuffled[3]["input_ids"][0]


def test_rows_given_by_source_are_numbered_one_after_the_other():
    parts = {name: rows().filter(lambda row, name=name: row["source"] == name) for name in SIZES}
    data, joint = MixtureDataset(parts, WEIGHTS, 2000), mixture()
    data.emit_ids = True
    assert numbers(data) == numbers(joint)
    assert all(row["row_id"] == row["input_ids"][0] for row in data.__getitems__(list(range(50))))
    for made in (data, joint):
        chosen = np.array([839, 3, 799, 300])
        assert made.select(chosen)["input_ids"][:] == [[number] * 6 for number in chosen]
        assert [made.sources[source] for source in made.source_of(chosen)] == ["c", "a", "b", "b"]
        assert made.rows_of("c").tolist() == list(range(800, 840))


def test_weights_are_shares_of_tokens_where_rows_differ_in_length():
    lengths = {"long": 12, "short": 3}
    dataset = Dataset.from_dict({
        "input_ids": [[0] * lengths[name] for name in ("long", "short") for _ in range(50)],
        "source": ["long"] * 50 + ["short"] * 50,
    })  # fmt: skip
    report = MixtureDataset(dataset, {"long": 0.5, "short": 0.5}, 1000).report()
    assert report["long"].tokens == pytest.approx(report["short"].tokens, rel=0.02)
    assert report["long"].rows == pytest.approx(200, abs=2)


@pytest.mark.parametrize("workers, context", [(2, "fork"), (4, "fork"), (2, "spawn")])
def test_workers_read_what_one_process_reads_and_follow_a_change(workers, context, tmp_path):
    expected = changed(mixture(keep_folder=tmp_path / "one"), DataLoader(mixture(), batch_size=10), apply=False)
    plain = mixture(keep_folder=tmp_path / "plain")
    plain.set_weights({"a": 0.1, "b": 0.9}, 1300, KEEP)
    data = mixture(keep_folder=tmp_path / "many")
    loader = DataLoader(data, batch_size=10, num_workers=workers, multiprocessing_context=context)
    assert changed(data, loader) == numbers(plain)
    assert numbers(plain)[:1344] == expected[:1344]
    after = np.array(numbers(plain)[1344:])
    assert KEEP[after].all() and abs((SOURCES[after] == "a").mean() - 0.1) < 0.01 and "c" not in SOURCES[after]


def changed(data, loader, apply=True) -> list[int]:
    read = []
    for number, batch in enumerate(loader):
        read += batch["input_ids"][:, 0].tolist()
        if number == 100 and apply:
            assert 1009 <= data.fetched() < 1300
            assert data.set_weights({"a": 0.1, "b": 0.9}, 1300, KEEP) == 1344
    return read


def test_a_resumed_mixture_goes_on_without_a_replay(tmp_path):
    data = mixture(keep_folder=tmp_path)
    data.set_weights({"a": 0.1, "b": 0.9}, 1300, KEEP)
    data.set_weights({"a": 1.0}, 1500)
    state = json.loads(json.dumps(data.state_dict()))
    resumed = mixture(keep_folder=tmp_path)
    numbers(resumed, range(1500))  # in vain: what was fetched before does not count
    resumed.load_state_dict(state)
    assert resumed.fetched() == -1
    assert numbers(resumed, range(1200, 2000)) == numbers(data)[1200:]
    assert resumed.state_dict() == state and resumed.report() == data.report()
    assert pickle.loads(pickle.dumps(resumed))[1999]["input_ids"].equal(data[1999]["input_ids"])
    assert resumed.weights_at(1343) == WEIGHTS and resumed.weights == {"a": 1.0, "b": 0.0, "c": 0.0}


def test_what_was_saved_must_fit(tmp_path):
    data = mixture(keep_folder=tmp_path)
    data.set_weights({"a": 0.1, "b": 0.9}, 1300, KEEP)
    state = data.state_dict()
    for options, field in ((dict(seed=1), "seed"), (dict(block_size=32), "block_size")):
        with pytest.raises(ValueError, match=f"the saved mixture has {field}="):
            mixture(**options).load_state_dict(state)
    with pytest.raises(ValueError, match="first_weights"):
        MixtureDataset(rows(), {"a": 1.0}, 2000).load_state_dict(state)
    (tmp_path / "keep-0001.npy").write_bytes(b"torn")
    with pytest.raises(ValueError, match="keep-0001.npy, the rows that an influence round kept, is missing"):
        mixture(keep_folder=tmp_path).load_state_dict(state)


def test_a_restart_forgets_all_but_the_first_weights(tmp_path):
    data = mixture(keep_folder=tmp_path)
    before = numbers(data)
    with pytest.raises(ValueError, match="was fetched already"):
        data.set_weights({"a": 1.0}, 64)
    data.restart()
    data.set_weights({"a": 0.1, "b": 0.9}, 64, KEEP)
    data.restart()
    assert numbers(data) == before and data.kept() is None


def test_a_moved_run_is_resumed_where_it_lies_now(tmp_path):
    data = mixture(keep_folder=tmp_path / "old")
    data.set_weights({"a": 0.1, "b": 0.9}, 1300, KEEP)
    state = data.state_dict()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = mixture(keep_folder=tmp_path / "new")
    moved.load_state_dict(state)
    assert np.array_equal(moved.kept(), KEEP)


def test_rejected_rows_cost_one_look_at_the_mask_a_pass():
    asked = []

    def keep(generation):
        asked.append(generation)
        return np.arange(1000) % 3 > 0

    order = RandomOrder(1000, 0, keep)
    for first in range(0, 600, 10):
        order.read(Cursor(), first, 10, 1)
    assert asked == [1]


def test_a_change_takes_effect_where_nobody_has_read():
    data = mixture()
    numbers(data, range(100))
    assert data.set_weights({"a": 1.0}) == 128
    with pytest.raises(ValueError, match=r"draw 64 was fetched already \(up to 99\)"):
        data.set_weights({"b": 1.0}, 64)
    data.set_weights({"b": 1.0}, 640)
    with pytest.raises(ValueError, match="precedes the last change"):
        data.set_weights({"a": 1.0}, 320)
    data.set_weights({"c": 1.0}, 640)  # instead
    assert {SOURCES[number] for number in numbers(data, range(640, 700))} == {"c"}
    assert {SOURCES[number] for number in numbers(data, range(128, 640))} == {"a"}


def test_many_passes_warn_once_or_are_the_limit(caplog):
    with caplog.at_level(logging.WARNING):
        data = mixture()
        data.set_weights(WEIGHTS, 640)
    assert caplog.text.count("will be read") == 0
    with caplog.at_level(logging.WARNING):
        data = mixture(max_epochs=2)
        data.set_weights(WEIGHTS, 640)
    assert caplog.text.count("a will be read 3.3 times") == 1 and "b will be" not in caplog.text
    limited = mixture(max_epochs=3, on_max_epochs="limit").report()
    assert limited["a"].epochs <= 3 and limited["c"].epochs <= 3 and sum(d.rows for d in limited.values()) == 2000
    with pytest.raises(ValueError, match="every source of the mixture was read 1 times"):
        mixture(max_epochs=1, on_max_epochs="limit")


def test_a_refused_change_leaves_the_mixture_as_it_was():
    data = mixture(max_epochs=3, on_max_epochs="limit")
    before = numbers(mixture(max_epochs=3, on_max_epochs="limit"))
    with pytest.raises(ValueError, match="every source"):
        data.set_weights({"c": 1.0}, 64)
    assert numbers(data) == before


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"a": 0.5, "b": 0.4}, "shares that sum to 1"),
        ({"a": 1.5, "b": -0.5}, "shares that sum to 1"),
        ({"a": float("nan"), "b": 1.0}, "shares that sum to 1"),
        ({"a": 0.5, "d": 0.5}, "names 'd'; the rows are of a, b, c"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        MixtureDataset(rows(), weights, 10)


def test_a_source_without_rows_cannot_be_drawn(tmp_path):
    data = mixture(keep_folder=tmp_path)
    with pytest.raises(ValueError, match="gives 'c' a weight of 0.500, but no row of it is kept"):
        data.set_weights({"a": 0.5, "c": 0.5}, 64, SOURCES != "c")
    with pytest.raises(ValueError, match=r"keep has the shape \(3,\), the mixture 840 rows"):
        data.set_weights(WEIGHTS, 64, [True] * 3)
    with pytest.raises(ValueError, match="not source, which a mixture weighs"):
        MixtureDataset(rows().remove_columns("source"), WEIGHTS, 10)
    with pytest.raises(ValueError, match="not input_ids: tokenize"):
        MixtureDataset(Dataset.from_dict({"text": ["x"], "source": ["a"]}), {"a": 1.0}, 10)
    with pytest.raises(IndexError):
        data[2000]


def stream(**options):
    """One source that is read as it comes, rows of six tokens that say which document they are of."""
    tokenizer = train_tokenizer([f"number {number}" for number in range(1000)], 280, show_progress=False)
    documents = Dataset.from_dict({
        "text": [f"number {number} " * 3 for number in range(400)], "source": ["s"] * 400, "domain": ["d"] * 400,
    }).to_iterable_dataset()  # fmt: skip
    return PackedStream(documents, tokenizer, 6, repeat=True, **options)


def test_a_stream_is_a_source_like_any_other():
    expected = tokenize_and_pack(Dataset.from_list(list(stream().dataset)), stream().tokenizer, 6)[0]
    parts = {"a": rows().filter(lambda row: row["source"] == "a"), "s": stream()}
    data = MixtureDataset(parts, {"a": 0.25, "s": 0.75}, 800)
    sources, places = data.locate(range(800))
    read = data.__getitems__(list(range(800)))
    own = [row["input_ids"].tolist() for row, source in zip(read, sources, strict=True) if source == 1]
    assert own == [expected[number % len(expected)]["input_ids"] for number in range(len(own))]
    assert places[sources == 1].tolist() == list(range(len(own))) and abs(len(own) - 600) < 16
    data.emit_ids = True
    assert data[int(np.flatnonzero(sources == 1)[0])]["row_id"] == -1 and data.num_rows == 300
    loader = DataLoader(MixtureDataset(parts, {"a": 0.25, "s": 0.75}, 800), batch_size=16, num_workers=2)
    assert [row for batch in loader for row in batch["input_ids"].tolist()] == [
        row["input_ids"].tolist() for row in read
    ]
    again = MixtureDataset(parts, {"a": 0.25, "s": 0.75}, 800)
    assert [row["input_ids"].tolist() for row in again.__getitems__(list(range(600, 800)))] == [
        row["input_ids"].tolist() for row in read[600:]
    ]
    assert data.report()["s"].epochs == 0.0
