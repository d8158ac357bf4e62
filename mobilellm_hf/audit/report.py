"""What an audit says: a verdict in words, a table of the comparisons behind it, and `results.json`.

    comparisons = compare(outcomes)
    found = verdict(outcomes, comparisons)
    found.headline       # "The mixture is better than every baseline, but not shown to be better than its own ..."
    print("\n".join(found.lines))

Better or worse means: after Holm's correction for the number of arms, at every learning rate that was tried. A mixture
helps if it is better than every baseline and every placebo, and on domains that nobody scored not worse than any
baseline. What is not shown is said to be not shown, with the difference that would have been found: that nothing was
found is no proof that there is nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mobilellm_hf.audit.outcomes import BETTER, UNDECIDED, WORSE, Comparison, Outcomes
from mobilellm_hf.audit.statistics import PairedDifference
from mobilellm_hf.workspace import write_whole

MIXTURE = "The mixture"
DEPENDS = "depends on the learning rate"
NAMES = {
    "sqrt_tokens": "tokens^0.5",
    "permuted": "its own weights permuted",
    "random": "random weights",
    "similarity": "weights by similarity alone",
    "all_rows": "all rows",
    "random_rows": "as many random rows",
    "length_matched": "as many rows of equal lengths",
    "loss_matched": "as many rows of equal losses",
    "flipped": "the rejected rows",
    "other_seed": "rows kept by another seed's scores",
}
HELPS, HARMS, UNPROVEN, MIXED = "helps", "harms", "no evidence", "mixed"


@dataclass(frozen=True)
class Verdict:
    """In a word ("helps", "harms", "no evidence", "mixed"), a sentence or two, and what stands behind them."""

    word: str
    headline: str
    lines: list[str]


def over_learning_rates(results: Iterable[str]) -> str:
    """What holds of the results at each learning rate: "better" or "worse" if at every one, "undecided" if not.

    "depends on the learning rate" if it is better at one and worse at another.
    """
    found = set(results)
    if {BETTER, WORSE} <= found:
        return DEPENDS
    return found.pop() if len(found) == 1 else UNDECIDED


def verdict(
    outcomes: Outcomes, comparisons: Sequence[Comparison], notes: Sequence[str] = (), subject: str = MIXTURE
) -> Verdict:
    """What a sceptic would sign.

    Args:
        notes: of how the arms were trained, to stand with the limits.
        subject: what is audited, as a sentence begins with it.
    """
    final: dict[str, dict[str, str]] = {"baseline": {}, "placebo": {}, "rival": {}}
    unscored: dict[str, str] = {}
    for arm in outcomes.arms[1:]:
        own = [part for part in comparisons if part.other == arm.name]
        final[arm.kind][arm.name] = over_learning_rates(part.result for part in own)
        unscored[arm.name] = over_learning_rates(part.unscored_result for part in own)
    word, headline = _headline(final["baseline"], final["placebo"], subject)
    if lost := [name for name in final["baseline"] if unscored[name] == WORSE]:
        word = MIXED if word == HELPS else word
        headline += f" On domains that nobody scored it is worse than {_names(lost)}."
    lines = [_against(other, comparisons, result) for found in final.values() for other, result in found.items()]
    lines += [_worst_line(comparisons), _unscored_line(outcomes, unscored), *notes, *_limits(outcomes, subject)]
    return Verdict(word, headline, lines)


def _headline(baselines: Mapping[str, str], placebos: Mapping[str, str], subject: str) -> tuple[str, str]:
    both = {**baselines, **placebos}
    of_result = {result: [name for name in both if both[name] == result] for result in (WORSE, DEPENDS)}
    changes = ""
    if below := [name for name in of_result[WORSE] if name in placebos]:
        changes = f" It is worse than {_names(below)}."
    if unstable := of_result[DEPENDS]:
        changes += f" Against {_names(unstable)} the answer turns round with the learning rate."
    beaten = [name for name in baselines if baselines[name] == BETTER]
    unbeaten = [name for name in baselines if name not in beaten]
    equal = [name for name in placebos if placebos[name] != BETTER]
    if worse := [name for name in of_result[WORSE] if name in baselines]:
        return HARMS, f"{subject} harms: it is worse than {_names(worse)}.{changes}"
    if not baselines:
        return UNPROVEN, f"No baseline was trained, so whether it helps is open.{changes}"
    if not beaten:
        return (
            UNPROVEN,
            f"No evidence that it helps: no baseline is shown to be worse than {_inside(subject)}.{changes}",
        )
    if unbeaten:
        return MIXED, (
            f"{subject} is better than {_names(beaten)}, but there is no evidence that it is better than "
            f"{_names(unbeaten)}.{changes}"
        )
    if not placebos:
        return MIXED, (
            f"{subject} is better than every baseline. No placebo was trained, so that whether it would be without "
            "what it was scored for is open."
        )
    if equal:
        return MIXED, (
            f"{subject} is better than every baseline, but not shown to be better than {_names(equal)}: there is no "
            f"evidence that what it was scored for is the reason.{changes}"
        )
    return HELPS, f"{subject} helps: it is better than every baseline and every placebo, at every learning rate."


def _inside(subject: str) -> str:
    """As it stands within a sentence."""
    return subject[0].lower() + subject[1:]


def _names(names: Sequence[str]) -> str:
    spoken = [NAMES.get(name, name) for name in names]
    return spoken[0] if len(spoken) == 1 else f"{', '.join(spoken[:-1])} and {spoken[-1]}"


def _against(other: str, comparisons: Sequence[Comparison], result: str) -> str:
    own = [comparison for comparison in comparisons if comparison.other == other]
    figures = "; ".join(f"{spell(part.final)} at {part.learning_rate:g}, p {part.p_value:.3g}" for part in own)
    words = {
        BETTER: "better", WORSE: "worse", DEPENDS: "better at one learning rate, worse at another",
        UNDECIDED: "no evidence of a difference",
    }[result]  # fmt: skip
    if result == UNDECIDED:
        alone = [part for part in own if part.result != UNDECIDED]
        if alone:
            words = f"{alone[0].result} at {alone[0].learning_rate:g}, not at every learning rate"
        else:
            most = max(part.final.detectable for part in own)
            words += f" (one of {most:.4f} would be found four times in five by a single t-test)"
    return f"Against {NAMES.get(other, other)}: {words}. {figures}"


def spell(difference: PairedDifference) -> str:
    """-0.0123 [-0.0200, -0.0046]"""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _worst_line(comparisons: Sequence[Comparison]) -> str:
    """Where the mixture does worst against any baseline."""
    own = [part for part in comparisons if part.kind == "baseline"] or list(comparisons)
    part = max(own, key=lambda part: part.per_probe[part.worst].mean)
    found = part.per_probe[part.worst]
    if found.low > 0:
        means = "it loses there"
    elif found.high < 0:
        means = "it wins even there"
    else:
        means = "whether it loses there is open"
    where = f"{spell(found)} against {NAMES.get(part.other, part.other)} at {part.learning_rate:g}"
    return f"Worst domain: {part.worst}, {where}: {means}."


def _unscored_line(outcomes: Outcomes, results: Mapping[str, str]) -> str:
    """results: arm -> what holds of the unscored domains at all learning rates."""
    if not outcomes.unscored:
        return "Unscored domains: none were given, so what the mixture does beyond its probes is open."
    parts = [
        f"{result} than {_names(names)}"
        for result in (BETTER, WORSE)
        if (names := [name for name in results if results[name] == result])
    ]
    return f"Unscored domains: {', '.join(parts) or 'no evidence of a difference from any arm'}."


def _limits(outcomes: Outcomes, subject: str) -> list[str]:
    """What these figures do not say."""
    lines = []
    if subject == MIXTURE and "permuted" not in [arm.name for arm in outcomes.arms]:
        lines.append("Its own weights permuted were not among the arms: any weights as uneven may do as well.")
    if len(outcomes.learning_rates) == 1:
        lines.append("One learning rate: at another the ranking of mixtures can be another.")
    lines.append("One size of model and one budget: what holds here need not hold at another.")
    return lines


def comparison_table(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> Table:
    """A line for each arm and learning rate; bits per byte, below 0 the mixture is better."""
    caption = (
        f"mean of {len(outcomes.seeds)} seeds ± half of its 95% interval (Student); p: exact sign flips, after Holm's "
        "correction for the arms; the worst domain is picked after the fact"
    )
    table = Table(
        title="The mixture minus each arm, bits per byte; below 0 the mixture is better", caption=caption,
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for name, justify in (
        ("against", "left"), ("rate", "right"), ("final probes", "right"), ("p", "right"), ("unscored", "right"),
        ("worst domain", "right"), ("", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "worst domain")
    for part in comparisons:
        half = (part.final.high - part.final.low) / 2
        table.add_row(
            part.other, f"{part.learning_rate:g}", f"{part.final.mean:+.4f} ±{half:.4f}", f"{part.p_value:.3g}",
            "-" if part.unscored is None else f"{part.unscored.mean:+.4f}",
            f"{part.worst} {part.per_probe[part.worst].mean:+.4f}", part.result,
        )  # fmt: skip
    return table


def write_results(
    folder: Path,
    outcomes: Outcomes,
    comparisons: Sequence[Comparison],
    found: Verdict,
    settings: Mapping[str, Any],
    spent: Mapping[str, Any],
) -> None:
    """`results.json`: the verdict, every comparison, every arm's weights and every figure of every seed.

    Args:
        spent: arm -> what it trained on, as plain values.
    """
    document = {
        "verdict": asdict(found),
        "comparisons": [
            asdict(part) | {"result": part.result, "unscored_result": part.unscored_result, "worst": part.worst}
            for part in comparisons
        ],
        "arms": {
            arm.name: {
                "kind": arm.kind, "curation": arm.curation, "weights": arm.weights, "details": arm.details,
                "spent": spent[arm.name],
                "bits_per_byte": _by_learning_rate(outcomes, number),
            }
            for number, arm in enumerate(outcomes.arms)
        },
        "final": list(outcomes.final), "unscored": list(outcomes.unscored), "seeds": list(outcomes.seeds),
        "learning_rates": list(outcomes.learning_rates), "settings": dict(settings),
    }  # fmt: skip
    text = json.dumps(_without_nan(document), indent=1)
    write_whole(folder / "results.json", lambda path: path.write_text(text))


def _by_learning_rate(outcomes: Outcomes, arm: int) -> dict[str, dict[str, list[float]]]:
    """learning rate -> probe -> a figure a seed."""
    return {
        f"{learning_rate:g}": {
            name: outcomes.bits[arm, place, :, probe].tolist() for probe, name in enumerate(outcomes.probes)
        }
        for place, learning_rate in enumerate(outcomes.learning_rates)
    }


def _without_nan(value: Any) -> Any:
    """JSON has none: null says that there is no figure."""
    if isinstance(value, Mapping):
        return {str(name): _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
