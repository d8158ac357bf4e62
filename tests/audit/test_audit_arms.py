"""What arms read and for how long, with models that are really trained; weights of files, baselines and placebos."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from rival_cases import InterruptAt, Interrupted, build_model, make_proxy, rows
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

from mobilellm_hf.audit.arms import (
    BASELINES,
    CURATION_SHARE,
    Arm,
    arm_runs,
    arm_steps,
    baseline,
    build_arms,
    load_weights,
    permuted,
    random_weights,
    training_notes,
)
from mobilellm_hf.audit.proxy import MixtureRun, build_mixture, proportional, read_arm, train_mixture, train_mixtures
from mobilellm_hf.nll import mean_nll
from mobilellm_hf.training import NonFiniteLossError

SOURCES = ["noise", "up", "down"]
SIZES = {"noise": 40, "up": 100, "down": 60}
TOKENS = {name: count * 16 for name, count in SIZES.items()}
MIX = {"noise": 0.0, "up": 0.75, "down": 0.25}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_by(proxy, run) -> list[dict]:
    draws = (run.steps or proxy.training.max_steps) * 8
    return build_mixture(proxy, run).__getitems__(range(draws))


# A run


def test_an_arm_is_what_the_trainer_trains_by_hand(tmp_path):
    proxy = make_proxy(tmp_path, SIZES, max_steps=12, save_steps=6)
    final = {"down": rows("down", 10, 5)}
    arm = train_mixture(proxy, MIX, 3, tmp_path / "own", steps=10, probes=final, keep_model=True)
    set_seed(3)
    model, training = build_model(3), replace_fields(proxy.training, max_steps=10, output_dir=str(tmp_path / "hand"))
    read = read_by(proxy, MixtureRun("x", MIX, 3, 10))
    Trainer(model, replace_fields(training, seed=3), train_dataset=read).train()
    assert arm.probe_nll == {"down": pytest.approx(mean_nll(model, final["down"]), abs=1e-6)}
    kept = AutoModelForCausalLM.from_pretrained(arm.model_folder)
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), model.state_dict().values()))
    assert arm.tokens == 10 * 8 * 16 == sum(arm.rows.values()) * 16 and arm.rows["noise"] == 0
    assert not list((tmp_path / "own").glob("checkpoint-*"))


def replace_fields(training, **fields):
    training = type(training)(**{name: getattr(training, name) for name in ("output_dir", "max_steps")} | dict(
        per_device_train_batch_size=8, learning_rate=training.learning_rate, lr_scheduler_type="constant",
        logging_steps=1, train_sampling_strategy="sequential", remove_unused_columns=False, report_to="none",
        disable_tqdm=True, use_cpu=True, save_strategy="no",
    ))  # fmt: skip
    for name, value in fields.items():
        setattr(training, name, value)
    return training


def test_a_finished_run_is_read_and_another_one_in_its_place_is_refused(tmp_path):
    proxy = make_proxy(tmp_path, SIZES, max_steps=4, save_steps=2)
    first = train_mixture(proxy, MIX, 0, tmp_path / "arm")
    broken = replace(proxy, build_model=None)  # which would be called
    assert train_mixture(broken, MIX, 0, tmp_path / "arm") == first and first.model_folder is None
    with pytest.raises(ValueError, match="result.json is of a run with seed=0, not 1"):
        train_mixture(broken, MIX, 1, tmp_path / "arm")
    with pytest.raises(ValueError, match=r"is of a run with weights="):
        train_mixture(broken, MIX | {"up": 0.25, "down": 0.75}, 0, tmp_path / "arm")
    with pytest.raises(ValueError, match="is of a run with keep=None"):
        train_mixture(broken, MIX, 0, tmp_path / "arm", keep={"up": np.arange(100) < 50})
    kept = train_mixture(proxy, MIX, 0, tmp_path / "arm", keep_model=True)  # trained again for its model, alike
    assert kept.probe_nll == first.probe_nll and (kept.model_folder / "model.safetensors").exists()
    (tmp_path / "arm" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="result.json is damaged .*: delete it"):
        train_mixture(broken, MIX, 0, tmp_path / "arm")
    with pytest.raises(ValueError, match="the run other is not finished"):
        read_arm(proxy, MixtureRun("other", MIX, 0), tmp_path)


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path):
    proxy = make_proxy(tmp_path, SIZES, max_steps=12, save_steps=4)
    whole = train_mixture(proxy, MIX, 0, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_mixture(proxy, MIX, 0, tmp_path / "killed", callbacks=[InterruptAt(9)])
    assert (tmp_path / "killed" / "checkpoint-8").exists()
    assert train_mixture(proxy, MIX, 0, tmp_path / "killed") == whole


def test_kept_rows_alone_are_read(tmp_path):
    proxy = make_proxy(tmp_path, SIZES, max_steps=4)
    keep = {"up": np.arange(100) % 3 == 0}
    allowed = {tuple(row) for row in proxy.sources["up"].select(np.flatnonzero(keep["up"]))["input_ids"]}
    all_up = {tuple(row) for row in proxy.sources["up"]["input_ids"]}
    found = [tuple(row["input_ids"].tolist()) for row in read_by(proxy, MixtureRun("x", MIX, 0, keep=keep))]
    assert len([row for row in found if row in all_up]) >= 20 and not (set(found) & all_up) - allowed


class RuinAfterLastLoss(TrainerCallback):
    """What a step does whose loss was still a number."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("options, callbacks", [({"learning_rate": 1e30}, []), ({}, [RuinAfterLastLoss()])])
def test_a_ruined_run_leaves_no_result(tmp_path, options, callbacks):
    steps = 1 if callbacks else 4
    proxy = make_proxy(tmp_path, SIZES, max_steps=steps, save_steps=steps, **options)
    with pytest.raises(NonFiniteLossError, match="arm"):
        train_mixture(proxy, MIX, 0, tmp_path / "arm", callbacks=callbacks)
    assert not (tmp_path / "arm" / "result.json").exists()


def test_another_learning_rate_scales_the_end_of_the_schedule_and_leaves_the_proxy_alone(tmp_path):
    options = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3, "power": 1.0}}
    proxy = make_proxy(tmp_path, SIZES, max_steps=4, save_steps=2, **options)
    half = proxy.with_learning_rate(5e-3).training
    assert (half.learning_rate, half.lr_scheduler_kwargs) == (5e-3, {"lr_end": 5e-4, "power": 1.0})
    assert proxy.training.learning_rate == 1e-2 and proxy.training.lr_scheduler_kwargs["lr_end"] == 1e-3
    runs = [MixtureRun("a", MIX, 0, learning_rate=5e-3), MixtureRun("b", MIX, 0)]
    slow, fast = train_mixtures(proxy, runs, tmp_path)
    direct = train_mixture(proxy.with_learning_rate(5e-3), MIX, 0, tmp_path / "direct")
    assert slow.probe_nll == direct.probe_nll != fast.probe_nll


# Weights


def test_shares_of_a_mixture_are_met_and_no_source_is_read_too_often(tmp_path):
    proxy = make_proxy(tmp_path, {"noise": 8, "up": 100, "down": 100}, max_steps=32)
    run = MixtureRun("x", {"noise": 0.5, "up": 0.25, "down": 0.25}, 0)
    names = {tuple(row): name for name, part in proxy.sources.items() for row in part["input_ids"]}
    rows_read = [tuple(row["input_ids"].tolist()) for row in read_by(proxy, run)]
    counts, each = Counter(names[row] for row in rows_read), Counter(rows_read)
    assert build_mixture(proxy, run).report()["noise"].epochs == 4.0
    assert counts["noise"] == 32 and max(each.values()) == 4  # 8 rows, four times
    assert abs(counts["up"] - counts["down"]) <= 8 and sum(counts.values()) == 256
    free = read_by(replace(proxy, max_epochs=100.0), run)
    assert sum(names[tuple(row["input_ids"].tolist())] == "noise" for row in free) == 128


def test_baselines():
    assert baseline("uniform", TOKENS) == dict.fromkeys(SOURCES, 1 / 3)
    assert baseline("proportional", TOKENS) == {"noise": 0.2, "up": 0.5, "down": 0.3}
    roots = {name: count**0.5 for name, count in SIZES.items()}
    expected = {name: root / sum(roots.values()) for name, root in roots.items()}
    assert baseline("sqrt_tokens", TOKENS) == pytest.approx(expected)


def test_the_proxys_own_shares_are_those_of_its_tokens(tmp_path):
    proxy = make_proxy(tmp_path, SIZES)
    assert proxy.tokens_per_source == TOKENS and proportional(proxy.sources) == baseline("proportional", TOKENS)


def test_placebos_are_drawn_anew_for_every_seed_and_again_alike():
    weights = {"a": 0.6, "b": 0.3, "c": 0.1, "d": 0.0}
    drawn = [permuted(weights, seed) for seed in range(200)]
    assert all(sorted(found.values()) == [0.0, 0.1, 0.3, 0.6] and found != weights for found in drawn)
    assert len({tuple(found.values()) for found in drawn}) == 23 and drawn[5] == permuted(weights, 5)
    assert all(permuted({"a": 0.5, "b": 0.5, "c": 0.0}, seed)["c"] == 0.5 for seed in range(20))
    with pytest.raises(ValueError, match="all equal, so there is nothing to permute"):
        permuted({"a": 0.5, "b": 0.5}, 0)
    random = np.array([list(random_weights(["a", "b", "c"], seed).values()) for seed in range(2_000)])
    assert np.allclose(random.sum(1), 1) and random.min() >= 0 and np.allclose(random.mean(0), 1 / 3, atol=0.02)
    assert np.allclose(random.var(0), 1 / 18, atol=0.005)  # Dirichlet(1, 1, 1)


def test_arms_are_the_mixture_then_what_it_is_compared_with():
    found = [Arm("regmix", "rival", dict.fromkeys([0, 1], MIX), 0.02)]
    arms = build_arms(MIX, TOKENS, [0, 1], found=found, curation_share=0.1)
    assert [arm.name for arm in arms] == ["mixture", *BASELINES, "permuted", "random", "regmix"]
    assert [arm.kind for arm in arms] == ["audited", *["baseline"] * 3, "placebo", "placebo", "rival"]
    assert [arm.curation for arm in arms] == [0.1, 0, 0, 0, 0, 0, 0.02]
    assert arms[4].weights[0] == permuted(MIX, 0) and arms[5].weights[0] != arms[5].weights[1]
    with pytest.raises(ValueError, match="there is no arm 'unifrom'; there are uniform"):
        build_arms(MIX, TOKENS, [0], ["unifrom"])
    with pytest.raises(ValueError, match="regmix is there twice"):
        build_arms(MIX, TOKENS, [0], found=found * 2)


def test_all_arms_cost_alike_once_curation_is_charged(tmp_path):
    proxy = make_proxy(tmp_path, SIZES, max_steps=50)
    found = [
        Arm("cheap", "rival", dict.fromkeys([0, 1], MIX), 0.05),
        Arm("dear", "rival", dict.fromkeys([0, 1], MIX), 1.0),
    ]
    arms = build_arms(MIX, TOKENS, [0, 1], ["uniform"], found, CURATION_SHARE)
    steps = {arm.name: arm_steps(arm, 50, CURATION_SHARE) for arm in arms}
    assert steps == {"mixture": 50, "uniform": 59, "cheap": 56, "dear": 29}  # 50 x 1.176 / (1 + what it cost)
    runs = arm_runs(proxy, arms, [0, 1], [0.01, 0.005])
    assert len(runs) == 4 * 2 * 2 and all(run.steps == steps[name] for (name, _, _), run in runs.items())
    assert len({run.name for run in runs.values()}) == 16
    assert {(run.learning_rate, run.seed) for run in runs.values()} == {(r, s) for r in (0.01, 0.005) for s in (0, 1)}
    again = arm_runs(proxy, build_arms(MIX | {"up": 0.7, "down": 0.3}, TOKENS, [0], ["uniform"]), [0], [0.01])
    assert again["uniform", 0.01, 0] == runs["uniform", 0.01, 0]  # so another audit finds it trained
    assert again["mixture", 0.01, 0].name != runs["mixture", 0.01, 0].name
    with pytest.raises(ValueError, match="dear: its curation is nan"):
        arm_steps(Arm("dear", "rival", {}, float("nan")), 50, 0.1)


def test_an_arm_that_cannot_be_read_within_the_cap_is_named(tmp_path):
    proxy = make_proxy(tmp_path, {"noise": 8, "up": 20, "down": 20}, max_steps=30)
    arms = build_arms({"noise": 0.2, "up": 0.4, "down": 0.4}, proxy.tokens_per_source, [0], ["uniform"])
    with pytest.raises(ValueError, match=r"^mixture cannot be trained with seed 0: .*raise max_epochs \(4\)"):
        arm_runs(replace(proxy), arms, [0], [0.01])


def test_what_was_charged_and_what_the_cap_changed_are_noted(tmp_path):
    """A source is stopped at the block before its fourth pass is over, and so need not reach four."""
    proxy = make_proxy(tmp_path, {"noise": 25, "up": 200, "down": 200}, max_steps=32)
    arms = [
        Arm("mixture", "audited", {0: {"noise": 0.0, "up": 0.5, "down": 0.5}}, 0.176),
        Arm("uniform", "baseline", {0: dict.fromkeys(SOURCES, 1 / 3)}),
        Arm("regmix", "rival", {0: {"noise": 0.6, "up": 0.2, "down": 0.2}}, 0.02),
    ]  # fmt: skip
    runs = arm_runs(proxy, arms, [0], [0.01, 0.005], 0.176)
    spent = {}
    for arm in arms:
        run = runs[arm.name, 0.01, 0]
        drawn = build_mixture(proxy, run).report(run.steps * 8)
        spent[arm.name] = {"rows": {0: {name: draw.rows for name, draw in drawn.items()}}}
        assert all(draw.epochs < 4 for draw in drawn.values())
    read, total = spent["regmix"]["rows"][0]["noise"], runs["regmix", 0.01, 0].steps * 8
    assert read < 0.4 * total and spent["uniform"]["rows"][0]["noise"] < 101
    charged, *cut = training_notes(proxy, arms, runs, spent)
    assert charged == (
        "Charged for curation, as a share of the training: mixture 17.6%, regmix 2.0%; uniform nothing, so that they "
        "trained longer."
    )
    assert len(cut) == 2
    for line, name, steps, share in zip(cut, ("uniform", "regmix"), (38 * 8, total), (1 / 3, 0.6), strict=True):
        gave, _, asked = line.removesuffix("%.").partition(", instead of ")
        given = spent[name]["rows"][0]["noise"] / steps
        assert gave == f"The cap on repetition changed {name}: noise gave {given:.1%} of the rows"
        assert float(asked) == pytest.approx(100 * share, abs=1)
    free = replace(proxy, max_epochs=1e6)
    assert training_notes(free, arms[1:2], runs, {"uniform": {"rows": {0: uncapped(free, runs)}}}) == []
    assert training_notes(proxy, arms[:1], runs, spent) == [
        "Charged for curation, as a share of the training: mixture 17.6%."
    ]


def uncapped(proxy, runs) -> dict[str, int]:
    run = runs["uniform", 0.01, 0]
    return {name: draw.rows for name, draw in build_mixture(proxy, run).report(run.steps * 8).items()}


# Files of weights


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.yaml", yaml.safe_dump({"weights": MIX, "rho": {"up": 3}}), MIX),
        ("b.json", json.dumps({"up": 0.99999, "down": 1e-05}), {"noise": 0.0, "up": 0.99999, "down": 1e-05}),
        ("c.txt", "up: 25\ndown: 75\n", {"noise": 0.0, "up": 0.25, "down": 0.75}),
        ("d.json", json.dumps({"weights": {"noise": 1}}), {"noise": 1.0, "up": 0.0, "down": 0.0}),
    ],
)
def test_weights_of_any_tool_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    found = load_weights(tmp_path / name, SOURCES)
    assert found == pytest.approx(expected) and list(found) == SOURCES


@pytest.mark.parametrize(
    "text, message",
    [
        ("up: 0.5\ndown: 0.4\n", r"mix.yaml: weights must sum to 1.*they sum to 0.9: up 0.5, down 0.4"),
        ("up: 0.5\ndwon: 0.5\n", "mix.yaml: weights: 'dwon' is to have a share of 0.5.*Did you mean down?"),
        ("up: 1.5\ndown: -0.5\n", "mix.yaml: weights: down is -0.5: it must be a number, 0 or more"),
        ("up: half\n", "mix.yaml: weights: up is 'half'"),
        ("- up\n", "mix.yaml holds no weights"),
        ("weights: [0.5, 0.5]\n", "mix.yaml: weights: weights is "),
        ("{up: 1", "mix.yaml cannot be read"),
        (None, "mix.yaml cannot be read"),
    ],
)
def test_a_file_that_holds_no_mixture_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "mix.yaml", SOURCES)
