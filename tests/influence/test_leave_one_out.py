"""Equation (1) of models that are really trained, on two languages and noise; statistics against scipy and by hand."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.influence.leave_one_out import (
    LeaveOneOutResult,
    LeaveOneOutRun,
    check_no_repeats,
    effects,
    equal_shares,
    leave_one_out_runs,
    lock,
    read_results,
    result_file,
    student_t_quantile,
    train_missing,
    train_run,
)
from mobilellm_hf.influence.leave_one_out_plots import effect_table, plot_curves, plot_heat_map
from mobilellm_hf.nll import mean_nll
from mobilellm_hf.training import NonFiniteLossError

STEPS, BATCH = 24, 8
ALL, NO_A = LeaveOneOutRun(None, 0), LeaveOneOutRun("a", 0)


def build(seed: int) -> MobileLLMForCausalLM:
    return MobileLLMForCausalLM(
        MobileLLMConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def rows(language: str, count: int, seed: int) -> Dataset:
    """Rows of 16 tokens: in "a" and "b", of different words, mostly one word follows another; "noise" is any word."""
    generator = torch.Generator().manual_seed(seed)
    if language == "noise":
        return Dataset.from_dict({"input_ids": torch.randint(3, 64, (count, 16), generator=generator).tolist()})
    follows = torch.randperm(20, generator=torch.Generator().manual_seed(ord(language)))
    words = torch.randint(20, (count, 16), generator=generator)
    regular = torch.rand(count, 16, generator=generator) < 0.9
    for position in range(1, 16):
        words[:, position] = torch.where(regular[:, position], follows[words[:, position - 1]], words[:, position])
    return Dataset.from_dict({"input_ids": (words + (3 if language == "a" else 23)).tolist()})


SOURCES = {"a": rows("a", 130, seed=0), "b": rows("b", 130, seed=1), "noise": rows("noise", 130, seed=2)}
PROBES = {"a": rows("a", 16, seed=3), "b": rows("b", 16, seed=4)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(folder, **options) -> TrainingArguments:
    defaults = dict(
        max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=5e-3, logging_steps=4, save_steps=8,
        logging_nan_inf_filter=False, train_sampling_strategy="sequential", remove_unused_columns=False,
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return TrainingArguments(str(folder), **(defaults | options))


def train(run, folder, **options) -> LeaveOneOutResult:
    return train_run(run, build, SOURCES, PROBES, arguments(folder), folder, monitor_every=8, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, results) of three seeds of three sources."""
    folder, runs = tmp_path_factory.mktemp("runs"), leave_one_out_runs(list(SOURCES), [0, 1, 2])
    train_missing(runs, folder, lambda run: train(run, folder))
    return folder, read_results(runs, folder)


def test_the_effect_is_the_difference_of_models_trained_by_hand(finished, tmp_path):
    found = effects(finished[1])
    outcome = {}
    for run in (ALL, NO_A):
        set_seed(0)
        model = build(0)
        read = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in read_by(run)]
        Trainer(model, arguments(tmp_path / run.name, seed=0), train_dataset=read).train()
        outcome[run] = [mean_nll(model, probe) for probe in PROBES.values()]
    by_hand = torch.tensor(outcome[NO_A]) - torch.tensor(outcome[ALL])
    assert found.per_seed[0, 0].tolist() == pytest.approx(by_hand.tolist(), abs=1e-5)
    assert found.nll_all[0].tolist() == pytest.approx(outcome[ALL], abs=1e-5)


def read_by(run: LeaveOneOutRun, sources=SOURCES, draws=STEPS * BATCH) -> list[dict]:
    return equal_shares(run, sources, draws).__getitems__(range(draws))


def test_the_only_source_of_a_language_helps_it_and_nothing_else_does(finished):
    found = effects(finished[1])
    assert found.sources == ["a", "b", "noise"] and found.capabilities == ["a", "b"] and found.seeds == [0, 1, 2]
    assert found.delta.sign().tolist() == [[1, -1], [-1, 1], [-1, -1]]  # the others get its share
    assert found.beyond_noise[0, 0] and found.beyond_noise[1, 1] and found.low[0, 0] > 0.3
    assert torch.equal(found.per_seed, found.nll_without - found.nll_all[:, None])
    for result in finished[1]:
        assert [step for step, _ in result.curves["a"]] == [0, 8, 16, 24] and result.tokens_per_step == BATCH * 16
        assert result.rows.get(result.run.left_out, 0) == 0
    same_start = {result.curves["a"][0][1] for result in finished[1] if result.run.seed == 1}
    assert len(same_start) == 1  # models of one seed start alike


def test_shares_are_equal_and_no_row_is_read_twice():
    sources = {name: rows("noise", 130, seed) for seed, name in enumerate("abc")}  # whose rows can be told apart
    source_of = {tuple(row): name for name, data in sources.items() for row in data["input_ids"]}
    assert len(source_of) == 390
    orders = {}
    for run in leave_one_out_runs(list(sources), [0, 7]):
        draws = 256 if run.left_out else 320  # whole blocks, in which shares are exact
        read = [tuple(row["input_ids"].tolist()) for row in read_by(run, sources, draws)]
        assert len(set(read)) == len(read)
        counts = Counter(source_of[row] for row in read)
        assert run.left_out not in counts and len(counts) == (2 if run.left_out else 3)
        assert max(counts.values()) - min(counts.values()) <= 2
        for name in counts:
            orders.setdefault((run.seed, name), []).append([row for row in read if source_of[row] == name])
    for found in orders.values():  # whatever else is read, the rows of a source come in one order
        shortest = min(map(len, found))
        assert len(found) == 3 and all(order[:shortest] == found[0][:shortest] for order in found)
    assert orders[0, "a"][0][:20] != orders[7, "a"][0][:20]


def test_a_source_that_would_repeat_is_named_with_the_remedies():
    runs = leave_one_out_runs(list(SOURCES), [0, 1])
    check_no_repeats(runs, SOURCES, draws=256)
    few = SOURCES | {"b": SOURCES["b"].select(range(64))}
    check_no_repeats([ALL], few, draws=192)  # a third of which it gives, and without another a half
    with pytest.raises(
        ValueError, match=r"the 64 rows \(1,024 tokens\) of b .*96 \(1,536 tokens\).* max_steps .* to 66%"
    ):
        check_no_repeats(runs, few, draws=192)
    with pytest.raises(ValueError, match="rows .* of b do not suffice"):
        equal_shares(NO_A, few, 192)
    with pytest.raises(ValueError, match="Nor do those of a"):
        check_no_repeats(runs, few | {"a": SOURCES["a"].select(range(90))}, draws=192)


class Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_and_a_finished_one_is_left_alone(finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(NO_A, tmp_path, callbacks=[Interrupt(14)])
    assert [path.name for path in (tmp_path / NO_A.name).glob("checkpoint-*")] == ["checkpoint-8"]
    with pytest.raises(ValueError, match="result.json is missing: the run on without a, seed 0"):
        read_results([NO_A], tmp_path)
    resumed, trained = [], []

    class First(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            resumed.append(state.global_step)

    def go_on(run):
        trained.append(run)
        train(run, tmp_path, callbacks=[First()])

    train_missing([NO_A], tmp_path, go_on)
    train_missing([NO_A], tmp_path, go_on)
    assert trained == [NO_A] and resumed[0] == 8 and not list((tmp_path / NO_A.name).glob("checkpoint-*"))
    whole = next(result for result in finished[1] if result.run == NO_A)
    found = read_results([NO_A], tmp_path)[0]
    assert found.rows == whole.rows
    assert [nll for _, nll in found.curves["a"]] == pytest.approx([nll for _, nll in whole.curves["a"]], abs=1e-6)


def test_a_model_is_kept_if_asked_for_and_a_ruined_one_leaves_no_result(tmp_path):
    train(ALL, tmp_path, keep_models=True)
    assert (tmp_path / ALL.name / f"checkpoint-{STEPS}" / "model.safetensors").exists()
    with pytest.raises(NonFiniteLossError, match="no-a-seed0"):
        train_run(NO_A, build, SOURCES, PROBES, arguments(tmp_path, learning_rate=1e30), tmp_path)
    assert not result_file(NO_A, tmp_path).exists()
    result_file(ALL, tmp_path).write_text("{")
    with pytest.raises(ValueError, match="all-seed0/result.json is damaged .*: delete it"):
        read_results([ALL], tmp_path)


# Processes that share the work

RUNS = leave_one_out_runs(["a", "b", "c", "d", "e"], [0, 1])


def note(folder) -> None:
    """Works through all runs; what training would be is a line in a file of this process."""

    def record(run: LeaveOneOutRun) -> None:
        with (folder / f"{os.getpid()}.txt").open("a") as stream:
            stream.write(f"{run.name}\n")
        time.sleep(0.05)
        result_file(run, folder).write_text("{}")

    train_missing(RUNS, folder, record, poll_seconds=0.02)


def test_three_processes_train_every_model_once(tmp_path):
    workers = [multiprocessing.get_context("fork").Process(target=note, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    trained = [file.read_text().split() for file in tmp_path.glob("*.txt")]
    assert sorted(name for part in trained for name in part) == sorted(run.name for run in RUNS)
    assert len(trained) == 3 and min(map(len, trained)) >= 2


def test_what_a_killed_process_held_is_taken_over(tmp_path):
    file = tmp_path / ALL.name / "lock"
    file.parent.mkdir()
    code = """if True:
        import fcntl, sys, time
        file = open(sys.argv[1], "a")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("held", flush=True)
        time.sleep(100)"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with lock(file, wait=False) as mine:
        assert not mine
    waited, trained = [], []

    def kill(runs):
        waited.append(runs)
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    def record(run):
        trained.append(run)
        result_file(run, tmp_path).write_text("{}")

    train_missing([ALL], tmp_path, record, kill, poll_seconds=0.01)
    assert trained == [ALL] and waited[0] == [ALL]


# Statistics


def results_of(per_run: dict[tuple, list[float]]) -> list[LeaveOneOutResult]:
    return [
        LeaveOneOutResult(
            LeaveOneOutRun(*run), 100, {}, {f"p{i}": [(0, 4.0), (5, 3.0), (9, v)] for i, v in enumerate(nll)}
        )
        for run, nll in per_run.items()
    ]


def three_seeds() -> list[LeaveOneOutResult]:
    return results_of({
        (None, 0): [1.0, 2.0], ("x", 0): [1.5, 2.1], ("y", 0): [0.9, 2.3],
        (None, 1): [1.2, 2.2], ("x", 1): [1.8, 2.1], ("y", 1): [1.2, 2.5],
        (None, 2): [1.1, 2.1], ("x", 2): [1.5, 2.3], ("y", 2): [1.3, 2.3],
    })  # fmt: skip


def test_the_quantile_is_that_of_students_distribution():
    assert student_t_quantile(1) == pytest.approx(12.7062, abs=1e-4)  # as tables print it
    assert student_t_quantile(2) == pytest.approx(4.3027, abs=1e-4)
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 7, 30, 101):
        for level in (0.5, 0.95, 0.999):
            expected = stats.t.ppf((1 + level) / 2, degrees)
            assert student_t_quantile(degrees, level) == pytest.approx(expected, rel=1e-10)


def test_the_interval_is_that_of_paired_differences():
    found = effects(three_seeds())
    assert found.delta[0].tolist() == pytest.approx([0.5, 0.2 / 3])
    stats = pytest.importorskip("scipy.stats")
    for row in range(2):
        for column in range(2):
            paired = stats.ttest_rel(found.nll_without[:, row, column], found.nll_all[:, column])
            interval = paired.confidence_interval(0.95)
            cell = (found.low[row, column].item(), found.high[row, column].item())
            assert cell == pytest.approx((interval.low, interval.high), abs=1e-12)
            assert found.beyond_noise[row, column].item() == (paired.pvalue < 0.05)


def test_one_seed_has_no_interval():
    found = effects(three_seeds()[:3])
    assert found.low.isnan().all() and found.high.isnan().all() and not found.beyond_noise.any()
    assert found.delta.tolist() == [pytest.approx([0.5, 0.1]), pytest.approx([-0.1, 0.3])]


def test_probes_are_matched_by_name():
    """A run that was taken up again has its curves in another order, for a checkpoint sorts what it keeps."""
    results = three_seeds()
    turned = [replace(result, curves=dict(reversed(result.curves.items()))) for result in results]
    mixed = [result if number % 2 else other for number, (result, other) in enumerate(zip(results, turned))]
    mixed[0] = results[0]
    assert torch.equal(effects(mixed).delta, effects(results).delta)
    mixed[1] = replace(mixed[1], curves={"p0": [(9, 1.0)], "other": [(9, 1.0)]})
    with pytest.raises(ValueError, match=r"has the probes \['other', 'p0'\], not \['p0', 'p1'\]"):
        effects(mixed)


def test_a_run_that_is_missing_or_not_finite_is_named():
    with pytest.raises(ValueError, match="the run on without x, seed 2 is missing"):
        effects([result for result in three_seeds() if result.run != LeaveOneOutRun("x", 2)])
    broken = three_seeds()
    broken[3] = replace(broken[3], curves={"p0": [(9, float("nan"))], "p1": [(9, 2.0)]})
    with pytest.raises(ValueError, match="the run on all sources, seed 1 .*not finite"):
        effects(broken)


@pytest.mark.parametrize(
    "given, message",
    [
        ((["a"], [0]), "sources: there is only a: with one left out, nothing is left"),
        ((["a", "b"], []), r"seeds=\[\] must be one or more"),
        ((["a", "b"], [1, 1]), r"seeds=\[1, 1\] must be one or more different"),
        ((["a", "b"], [-1]), "whole numbers from 0"),
        ((["a", "b"], [0], ["c"]), "only: there is no source 'c'. The sources are a, b"),
        ((["a", "b"], [0], []), "only: no source is named"),
    ],
)
def test_runs_that_make_no_experiment_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        leave_one_out_runs(*given)


def test_only_some_sources_can_be_left_out():
    runs = leave_one_out_runs(["a", "b", "c"], [3, 1], only=["b"])
    assert [run.name for run in runs] == ["all-seed3", "no-b-seed3", "all-seed1", "no-b-seed1"]


# Pictures


def test_the_heat_map_has_a_number_in_each_cell_and_marks_those_beyond_noise(tmp_path):
    found = effects(three_seeds())
    panel, bar = plot_heat_map(found, tmp_path / "map.png").axes
    texts = {tuple(text.get_position()): text for text in panel.texts}
    assert len(texts) == 4 and texts[0, 0].get_text() == "+0.500\n±0.248*"
    assert texts[0, 0].get_fontweight() == "bold" and texts[1, 0].get_fontweight() == "normal"
    assert np.allclose(panel.images[0].get_array(), found.delta) and panel.images[0].get_clim() == (-0.5, 0.5)
    assert [label.get_text() for label in panel.get_yticklabels()] == ["x", "y"] and "nats" in bar.get_ylabel()
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    one = plot_heat_map(effects(three_seeds()[:3]), tmp_path / "one.png").axes[0]
    assert "one seed: no interval" in one.get_title() and one.texts[0].get_text() == "+0.500"


def test_the_curves_are_means_over_seeds_with_the_model_of_all_in_black(tmp_path):
    figure = plot_curves(three_seeds(), tmp_path / "curves.png")
    (first, second), (difference, _) = figure.axes[:2], figure.axes[2:]
    assert [line.get_label() for line in first.lines] == ["all sources", "x", "y"]
    assert first.lines[0].get_color() == "black" and len({line.get_color() for line in first.lines}) == 3
    assert first.lines[1].get_ydata().tolist() == pytest.approx([3.0, 1.6])  # from the second point on
    assert first.lines[1].get_xdata().tolist() == [500, 900] and "tokens" in difference.get_xlabel()
    assert difference.lines[0].get_ydata()[-1] == pytest.approx(0.5) and len(first.collections) == 3
    assert second.get_title() == "p1" and len(figure.legends[0].get_texts()) == 3
    assert (tmp_path / "curves.png").stat().st_size > 20_000


def test_the_table_begins_with_what_helps_most():
    table = effect_table(effects(three_seeds()))
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["x", "y"] and cells[1][0] == "+0.500 ±0.248*" and "3 seeds" in table.caption
    assert cells[3] == ["+0.283", "+0.150"]
    assert effect_table(effects(three_seeds()[:3])).caption == "one seed: no interval"
