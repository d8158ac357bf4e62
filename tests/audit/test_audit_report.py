"""What is compared and what is said of it, on figures made so that the right verdict is known."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from mobilellm_hf.audit.arms import Arm
from mobilellm_hf.audit.outcomes import Outcomes, compare, probe_size
from mobilellm_hf.audit.plots import plot_forest
from mobilellm_hf.audit.report import comparison_table, write_results
from mobilellm_hf.audit.statistics import holm, sign_flip_p_value
from mobilellm_hf.audit.verdict import over_learning_rates, verdict
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.nll import mean_nll

KINDS = {
    "uniform": "baseline",
    "proportional": "baseline",
    "sqrt_tokens": "baseline",
    "permuted": "placebo",
    "random": "placebo",
    "regmix": "rival",
}
RATES, SEEDS = [0.01, 0.005], list(range(9))
FINAL, UNSCORED = ["code", "math"], ["poems", "laws"]


def outcomes(gaps: dict, noise: float = 0.01, rates=RATES, unscored=UNSCORED, seeds=SEEDS) -> Outcomes:
    """arm -> by how much its bits per byte are above the mixture's: a number, (rate,) or (rate, probe) of them."""
    probes = [*FINAL, *unscored]
    rng = np.random.default_rng(0)
    seed_level = rng.normal(2, 0.3, (1, len(rates), len(seeds), 1))  # which pairing takes out
    bits = seed_level + rng.normal(0, noise, (1 + len(gaps), len(rates), len(seeds), len(probes)))
    for number, gap in enumerate(gaps.values(), 1):
        gap = np.asarray(gap, dtype=float)
        bits[number] += gap.reshape(*gap.shape, *[1] * (2 - gap.ndim))[:, None, :] if gap.ndim else gap
    weights = {seed: {"a": 0.5, "b": 0.5} for seed in seeds}
    arms = [Arm("mixture", "audited", weights, 0.176), *(Arm(name, KINDS[name], weights) for name in gaps)]
    return Outcomes(arms, rates, seeds, FINAL, unscored, bits)


def judged(gaps: dict, **options):
    found = outcomes(gaps, **options)
    return verdict(found, compare(found))


BETTER_THAN_BASELINES = {"uniform": 0.1, "proportional": 0.1, "sqrt_tokens": 0.1}


# Bits per byte


def test_bits_per_byte_are_those_of_the_text(tmp_path):
    from rival_cases import build_model

    texts = ["The sum of three and four is seven.", "naïve café, 7 × 8", "def add(a, b): return a + b"] * 4
    tokenizer = train_tokenizer(texts, 400, show_progress=False)
    # A document a row: bos, text, eos; nothing of the text is cut.
    ids = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
           for text in texts]  # fmt: skip
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    size = probe_size(data, tokenizer)
    assert size.bytes == sum(len(text.encode()) for text in texts) and size.tokens == sum(len(row) - 1 for row in ids)
    model = build_model(0, vocab_size=len(tokenizer))
    nll = mean_nll(model, data)
    total = 0.0
    for row in ids:
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        total -= sum(log_probs[place, token].item() for place, (_, token) in enumerate(pairwise(row)))
    assert size.bits_per_byte(nll) == pytest.approx(total / math.log(2) / size.bytes, rel=1e-4)
    hidden = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * (len(row) - 1) + row[-1:] for row in ids]})
    with pytest.raises(ValueError, match="12 tokens of 0 bytes"):
        probe_size(hidden, tokenizer)


# Comparisons


def test_differences_are_paired_by_seed_and_corrected_for_the_arms():
    found = outcomes({"uniform": 0.02, "permuted": 0.0, "regmix": -0.02})
    comparisons = compare(found)
    assert [(part.other, part.learning_rate) for part in comparisons] == [
        (name, rate) for rate in RATES for name in ("uniform", "permuted", "regmix")
    ]
    for place, rate in enumerate(RATES):
        own = [part for part in comparisons if part.learning_rate == rate]
        by_hand = [
            [np.mean([found.bits[0, place, s, p] - found.bits[a, place, s, p] for p in (0, 1)]) for s in range(9)]
            for a in (1, 2, 3)
        ]
        assert [part.final.per_seed for part in own] == [pytest.approx(row) for row in by_hand]
        assert [part.p_value for part in own] == pytest.approx(holm([sign_flip_p_value(row) for row in by_hand]))
        beyond = [[found.bits[0, place, :, 2:].mean(1) - found.bits[a, place, :, 2:].mean(1)] for a in (1, 2, 3)]
        assert [part.unscored.mean for part in own] == pytest.approx([np.mean(row) for row in beyond])
        assert [part.unscored_p_value for part in own] == pytest.approx(
            holm([sign_flip_p_value(row[0]) for row in beyond])
        )
        assert own[0].per_probe["laws"].mean == pytest.approx(
            (found.bits[0, place, :, 3] - found.bits[1, place, :, 3]).mean()
        )
    assert [part.result for part in comparisons[:3]] == ["better", "undecided", "worse"]
    # Pairing takes the seeds' level out, which is 30 times the noise.
    assert all(part.final.high - part.final.low < 0.03 for part in comparisons)


def test_a_p_value_of_alpha_is_enough_and_more_is_not():
    part = compare(outcomes({"uniform": 0.1}, seeds=range(6)))[0]
    assert part.p_value == 2 / 64
    assert replace(part, alpha=2 / 64).result == "better" and replace(part, alpha=2 / 65).result == "undecided"


def test_the_worst_domain_is_that_where_most_is_lost():
    part = compare(outcomes({"uniform": [[0.1, 0.1, -0.3, 0.05]] * 2}))[0]
    assert part.worst == "poems" and part.per_probe["poems"].mean == pytest.approx(0.3, abs=0.02)
    assert part.result == "better" and part.unscored_result == "worse"


# Verdicts


def test_better_than_all_helps():
    found = judged(BETTER_THAN_BASELINES | {"permuted": 0.1, "random": 0.1})
    assert found.word == "helps"
    assert found.headline == (
        "The mixture helps: it is better than every baseline and every placebo, at every learning rate."
    )
    assert any("it wins even there" in line for line in found.lines)
    assert any(line.startswith("Unscored domains: better than uniform, proportional") for line in found.lines)


def test_better_than_baselines_but_not_than_its_own_weights_permuted_reads_as_it_is():
    found = judged(BETTER_THAN_BASELINES | {"permuted": 0.0, "random": 0.1})
    assert found.word == "mixed"
    assert found.headline == (
        "The mixture is better than every baseline, but not shown to be better than its own weights permuted: there "
        "is no evidence that what it was scored for is the reason."
    )
    worse = judged(BETTER_THAN_BASELINES | {"permuted": -0.1})
    assert worse.word == "mixed" and worse.headline.endswith("It is worse than its own weights permuted.")


def test_no_difference_is_no_evidence_and_says_what_would_have_been_found():
    found = judged({"uniform": 0.0, "proportional": 0.0, "permuted": 0.0})
    assert found.word == "no evidence" and found.headline.startswith(
        "No evidence that it helps: no baseline is shown to be worse than the mixture."
    )
    line = next(line for line in found.lines if line.startswith("Against uniform"))
    assert "no evidence of a difference (one of 0.0" in line and "at 0.01, p " in line and "at 0.005, p " in line
    assert "by a t-test of this arm at one learning rate; corrected for the arms, and at each" in line
    assert any("the worst of 16 differences, picked after the fact" in line for line in found.lines)  # 2 x 4 x 2
    assert any("no evidence of a difference from any arm" in line for line in found.lines)


def test_better_than_one_baseline_only():
    found = judged({"uniform": 0.1, "proportional": 0.0, "permuted": 0.1})
    assert found.word == "mixed" and found.headline == (
        "The mixture is better than uniform, but there is no evidence that it is better than proportional."
    )


def test_worse_than_a_baseline_harms_whatever_else():
    found = judged({"uniform": [[-0.1, -0.1, 0, 0]] * 2, "proportional": 0.1, "permuted": 0.1})
    assert found.word == "harms" and found.headline == (
        "The mixture harms: it is worse than uniform, though better than proportional and its own weights permuted."
    )
    alone = judged({"uniform": [[-0.1, -0.1, 0, 0]] * 2, "regmix": 0.1})
    assert alone.headline == "The mixture harms: it is worse than uniform."


def test_one_learning_rate_is_not_enough():
    found = judged({"uniform": [0.1, 0.0], "permuted": 0.1})
    assert found.word == "no evidence" and found.headline == (
        "No evidence that it helps at every learning rate: it is better than uniform at 0.01 only."
    )
    assert any("better at 0.01, not at every learning rate" in line for line in found.lines)
    here, there = [-0.1, -0.1, 0, 0], [0.0] * 4
    below = judged({"uniform": [there, here], "proportional": 0.1, "permuted": [here, there]})
    assert below.headline == (
        "The mixture is better than proportional, but there is no evidence that it is better than uniform. It is "
        "worse than uniform at 0.005 only. It is worse than its own weights permuted at 0.01 only."
    )
    partly = judged({"uniform": [0.1, 0.0], "proportional": 0.1, "permuted": 0.1}).headline
    assert partly.endswith("better than uniform at every learning rate. It is better than uniform at 0.01 only.")
    flipped = judged({"uniform": [0.1, -0.1], "permuted": 0.1})
    assert flipped.word == "no evidence"
    assert flipped.headline == (
        "No evidence that it helps at every learning rate: it is better than uniform at 0.01 only. Against uniform "
        "the answer turns round with the learning rate. On domains that nobody scored it is worse than uniform at "
        "0.005 only."
    )
    alone = judged(BETTER_THAN_BASELINES | {"permuted": 0.1}, rates=[0.01])
    assert alone.word == "helps" and any(line.startswith("One learning rate") for line in alone.lines)
    assert not any(line.startswith("One learning rate") for line in found.lines)


@pytest.mark.parametrize(
    "results, expected",
    [
        (["better", "better"], "better"), (["worse"], "worse"), (["better", "undecided"], "undecided"),
        (["better", "worse", "undecided"], "depends on the learning rate"), (["undecided"] * 2, "undecided"),
    ],
)  # fmt: skip
def test_what_holds_at_every_learning_rate(results, expected):
    assert over_learning_rates(results) == expected


def test_what_is_lost_where_nobody_scored_takes_help_back():
    lost = [[0.1, 0.1, -0.2, -0.2]] * 2
    found = judged(BETTER_THAN_BASELINES | {"uniform": lost, "permuted": 0.1})
    assert found.word == "mixed" and found.headline.endswith("nobody scored it is worse than uniform.")
    assert any(
        "Worst domain:" in line and "against uniform" in line and "its own interval is above 0, but" in line
        for line in found.lines
    )
    once = judged(BETTER_THAN_BASELINES | {"uniform": [[0.1] * 4, lost[0]], "permuted": 0.1})
    assert once.word == "mixed" and once.headline.endswith("nobody scored it is worse than uniform at 0.005 only.")
    assert any(
        line.endswith("better than uniform at 0.01 only, worse than uniform at 0.005 only.") for line in once.lines
    )
    none = judged(BETTER_THAN_BASELINES | {"permuted": 0.1}, unscored=[])
    assert none.word == "helps" and any("none were given" in line for line in none.lines)


def test_the_worst_domain_is_looked_for_against_baselines_alone():
    found = judged({"uniform": 0.1, "regmix": [[0.1, -0.5, 0.1, 0.1]] * 2})
    assert any("Worst domain:" in line and "against uniform" in line for line in found.lines)
    without = judged({"regmix": [[0.1, -0.5, 0.1, 0.1]] * 2})
    assert any("Worst domain: math" in line and "against regmix" in line for line in without.lines)


def test_without_placebos_or_baselines_it_stays_open():
    found = judged(BETTER_THAN_BASELINES)
    assert found.word == "mixed" and "No placebo was trained" in found.headline
    assert any("permuted were not among the arms" in line for line in found.lines)
    assert judged({"permuted": 0.1}).word == "no evidence"


@pytest.mark.parametrize("missing, spoken", [("sqrt_tokens", "tokens^0.5"), ("permuted", "its own weights permuted")])
def test_nothing_helps_that_was_not_put_to_every_test(missing, spoken):
    gaps = BETTER_THAN_BASELINES | {"permuted": 0.1, "random": 0.1}
    del gaps[missing]
    found = judged(gaps)
    assert found.word == "mixed" and found.headline.endswith(f"Not tried: {spoken}, so whether it helps is open.")
    assert any("not among the arms" in line.lower() and spoken.lower() in line.lower() for line in found.lines)


def test_rivals_are_reported_and_decide_nothing():
    found = judged(BETTER_THAN_BASELINES | {"permuted": 0.1, "regmix": -0.1})
    assert found.word == "helps" and any(line.startswith("Against regmix: worse.") for line in found.lines)


def test_notes_stand_with_the_limits():
    found = outcomes({"uniform": 0.1})
    lines = verdict(found, compare(found), ["The cap was met."]).lines
    assert "The cap was met." in lines and lines[-1].startswith("One size of model")


# What is shown


def test_the_table_has_a_line_for_each_arm_and_rate():
    found = outcomes({"uniform": 0.1, "permuted": 0.0})
    table = comparison_table(found, compare(found))
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["uniform", "permuted"] * 2 and cells[1] == ["0.01", "0.01", "0.005", "0.005"]
    assert cells[2][0] == "-0.0960 ±0.0049" and cells[6][:2] == ["better", "undecided"]
    console = Console(record=True, width=100)
    console.print(table)
    assert "uniform" in console.export_text() and "9 seeds" in table.caption


def test_the_forest_has_an_interval_for_each_comparison(tmp_path):
    found = outcomes({"uniform": [0.1, 0.0], "permuted": [0.0, 0.1], "regmix": 0.0})
    comparisons = compare(found)
    figure = plot_forest(found, comparisons, tmp_path / "forest.png")
    final, unscored, worst = figure.axes
    intervals = [line for line in final.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2][:6]
    assert [tuple(line.get_xdata()) for line in intervals] == [
        (part.final.low, part.final.high) for part in comparisons
    ]
    heights = [line.get_ydata()[0] for line in intervals]
    assert [round(height) for height in heights] == [0, 1, 2, 0, 1, 2] and len(set(heights)) == 6
    marks = [line for line in final.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    filled = [mark.get_markerfacecolor() != "white" for mark in marks]
    assert filled == [part.result != "undecided" for part in comparisons] and True in filled and False in filled
    assert [label.get_text() for label in final.get_yticklabels()] == ["uniform", "its own weights permuted", "regmix"]
    assert all(
        line.get_markerfacecolor() == "white"
        for line in worst.lines
        if line.get_marker() == "o" and line.get_xdata().any()
    )
    assert (tmp_path / "forest.png").read_bytes()[:4] == b"\x89PNG"
    assert len(plot_forest(outcomes({"uniform": 0.1}, unscored=[]), compare(outcomes({"uniform": 0.1}, unscored=[])),
                           tmp_path / "two.png").axes) == 2  # fmt: skip


def test_results_are_json_that_holds_every_figure(tmp_path):
    found = outcomes({"uniform": 0.1, "permuted": 0.0}, unscored=[])
    comparisons = compare(found)
    spent = {arm.name: {"steps": 10, "tokens": 160, "rows": {0: {"a": 5}}} for arm in found.arms}
    write_results(tmp_path, found, comparisons, verdict(found, comparisons), {"max_steps": 10}, spent)
    text = (tmp_path / "results.json").read_text()
    document = json.loads(text)
    assert "NaN" not in text and document["comparisons"][0]["unscored"] is None
    assert document["verdict"]["word"] == "mixed" and document["settings"] == {"max_steps": 10}
    figures = document["arms"]["uniform"]["bits_per_byte"]["0.005"]["math"]
    assert figures == found.bits[1, 1, :, 1].tolist() and document["arms"]["mixture"]["weights"]["8"] == {
        "a": 0.5,
        "b": 0.5,
    }
    first = document["comparisons"][0]
    assert first["final"]["p_value"] == 2 / 2**9 and first["p_value"] == 4 / 2**9 and first["result"] == "better"
    assert document["arms"]["mixture"]["spent"]["tokens"] == 160
