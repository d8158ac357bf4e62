"""What an audit says in words, such as a sceptic would sign.

    found = verdict(outcomes, compare(outcomes))
    found.headline       # "The mixture is better than every baseline, but not shown to be better than its own ..."
    print("\\n".join(found.lines))

Better or worse means: after Holm's correction for the number of arms, at every learning rate that was tried; what
holds at some of them is said with them. A mixture helps if it is better than every baseline and every placebo, all
baselines and its own weights permuted among them, and on domains that nobody scored at no learning rate worse than any
baseline. What is not shown is said to be not shown, with the difference that a single test would have found: that
nothing was found is no proof that there is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mobilellm_hf.audit.arms import BASELINES
from mobilellm_hf.audit.outcomes import BETTER, UNDECIDED, WORSE, Comparison, Outcomes
from mobilellm_hf.audit.statistics import PairedDifference

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
# Baselines and placebos without which nothing is said to help: of a mixture, and of a rejection.
NEEDED = (BASELINES, ("permuted",)), (("all_rows", "random_rows"), ("flipped",))

# (comparison) -> "better", "worse" or "undecided"
Result = Callable[[Comparison], str]


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
    """The verdict.

    Args:
        notes: of how the arms were trained, to stand with the limits.
        subject: what is audited, as a sentence begins with it.
    """
    final: dict[str, dict[str, str]] = {"baseline": {}, "placebo": {}, "rival": {}}
    by_arm = {arm.name: [part for part in comparisons if part.other == arm.name] for arm in outcomes.arms[1:]}
    for arm in outcomes.arms[1:]:
        final[arm.kind][arm.name] = over_learning_rates(part.result for part in by_arm[arm.name])
    compared = {name: by_arm[name] for kind in ("baseline", "placebo") for name in final[kind]}
    baselines = {name: by_arm[name] for name in final["baseline"]}
    word, headline = _headline(final["baseline"], final["placebo"], compared, subject)
    if lost := _than(baselines, _unscored, WORSE):
        word = MIXED if word == HELPS else word
        headline += f" On domains that nobody scored it is {' and '.join(lost)}."
    lines = [_against(other, by_arm[other], result) for found in final.values() for other, result in found.items()]
    lines += [_worst_line(comparisons), _unscored_line(outcomes, by_arm), *notes, *_limits(outcomes, subject)]
    return Verdict(word, headline, lines)


def _final(part: Comparison) -> str:
    return part.result


def _unscored(part: Comparison) -> str:
    return part.unscored_result


def _than(by_arm: Mapping[str, Sequence[Comparison]], result_of: Result, result: str) -> list[str]:
    """ "worse than uniform", "worse than random weights at 0.003 only": at every learning rate, then at some."""
    found: dict[str, list[str]] = {}
    for name, parts in by_arm.items():
        rates = [f"{part.learning_rate:g}" for part in parts if result_of(part) == result]
        if rates:
            found.setdefault("" if len(rates) == len(parts) else f" at {_listed(rates)} only", []).append(name)
    return [f"{result} than {_names(found[where])}{where}" for where in sorted(found)]


def _headline(
    baselines: Mapping[str, str],
    placebos: Mapping[str, str],
    compared: Mapping[str, Sequence[Comparison]],
    subject: str,
) -> tuple[str, str]:
    """baselines, placebos: arm -> what holds at all learning rates; compared: all of these, rate by rate."""
    both = {**baselines, **placebos}
    undecided = {name: compared[name] for name in both if both[name] == UNDECIDED}
    changes = ""
    if below := [name for name in placebos if placebos[name] == WORSE]:
        changes = f" It is worse than {_names(below)}."
    changes += "".join(f" It is {than}." for than in _than(undecided, _final, WORSE))
    if unstable := [name for name in both if both[name] == DEPENDS]:
        changes += f" Against {_names(unstable)} the answer turns round with the learning rate."
    beaten = [name for name in baselines if baselines[name] == BETTER]
    unbeaten = [name for name in baselines if name not in beaten]
    if worse := [name for name in baselines if baselines[name] == WORSE]:
        but = [name for name in both if both[name] == BETTER]
        though = f", though better than {_names(but)}" if but else ""
        return HARMS, f"{subject} harms: it is worse than {_names(worse)}{though}.{changes}"
    if not baselines:
        return UNPROVEN, f"No baseline was trained, so whether it helps is open.{changes}"
    open_ones = {name: compared[name] for name in unbeaten}
    if not beaten:
        return UNPROVEN, _unproven(open_ones, subject) + changes
    if unbeaten:
        partly = [f" It is {than}." for than in _than(open_ones, _final, BETTER)]
        return MIXED, (
            f"{subject} is better than {_names(beaten)}, but there is no evidence that it is better than "
            f"{_names(unbeaten)}{' at every learning rate' * bool(partly)}.{''.join(partly)}{changes}"
        )
    return _beyond_baselines(baselines, placebos, subject, changes)


def _unproven(baselines: Mapping[str, Sequence[Comparison]], subject: str) -> str:
    if partly := _than(baselines, _final, BETTER):
        return f"No evidence that it helps at every learning rate: it is {', '.join(partly)}."
    return f"No evidence that it helps: no baseline is shown to be worse than {subject[0].lower() + subject[1:]}."


def _beyond_baselines(
    baselines: Mapping[str, str], placebos: Mapping[str, str], subject: str, changes: str
) -> tuple[str, str]:
    """Of one that is better than every baseline that there is."""
    untried = [_untried(part, tried) for part, tried in zip(_needed(subject), (baselines, placebos), strict=True)]
    every = f"every baseline{' that was tried' * bool(untried[0])}"
    if not placebos:
        return MIXED, (
            f"{subject} is better than {every}. No placebo was trained, so that whether it would be without what it "
            "was scored for is open."
        )
    if equal := [name for name in placebos if placebos[name] != BETTER]:
        return MIXED, (
            f"{subject} is better than {every}, but not shown to be better than {_names(equal)}: there is no "
            f"evidence that what it was scored for is the reason.{changes}"
        )
    if missing := [*untried[0], *untried[1]]:
        return MIXED, (
            f"{subject} is better than every baseline and every placebo that was tried, at every learning rate. "
            f"Not tried: {_names(missing)}, so whether it helps is open."
        )
    return HELPS, f"{subject} helps: it is better than every baseline and every placebo, at every learning rate."


def _needed(subject: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return NEEDED[0] if subject == MIXTURE else NEEDED[1]


def _untried(needed: Sequence[str], tried: Iterable[str]) -> list[str]:
    return [name for name in needed if name not in tried]


def _names(names: Sequence[str]) -> str:
    return _listed([NAMES.get(name, name) for name in names])


def _listed(spoken: Sequence[str]) -> str:
    return spoken[0] if len(spoken) == 1 else f"{', '.join(spoken[:-1])} and {spoken[-1]}"


def _against(other: str, own: Sequence[Comparison], result: str) -> str:
    figures = "; ".join(f"{spell(part.final)} at {part.learning_rate:g}, p {part.p_value:.3g}" for part in own)
    words = {
        BETTER: "better", WORSE: "worse", DEPENDS: "better at one learning rate, worse at another",
        UNDECIDED: "no evidence of a difference",
    }[result]  # fmt: skip
    if result == UNDECIDED:
        alone = [part for part in own if part.result != UNDECIDED]
        if alone:
            rates = _listed([f"{part.learning_rate:g}" for part in alone])
            words = f"{alone[0].result} at {rates}, not at every learning rate"
        else:
            most = max(part.final.detectable for part in own)
            words += (
                f" (one of {most:.4f} would be found four times in five by a t-test of this arm at one learning rate; "
                "corrected for the arms, and at each of the rates, it takes more)"
            )
    return f"Against {NAMES.get(other, other)}: {words}. {figures}"


def spell(difference: PairedDifference) -> str:
    """-0.0123 [-0.0200, -0.0046]"""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _worst_line(comparisons: Sequence[Comparison]) -> str:
    """Where the mixture does worst against any baseline."""
    own = [part for part in comparisons if part.kind == "baseline"] or list(comparisons)
    part = max(own, key=lambda part: part.per_probe[part.worst].mean)
    found, looked_at = part.per_probe[part.worst], sum(len(part.per_probe) for part in own)
    if found.high < 0:
        means = "it wins even there"
    elif looked_at == 1:
        means = "it loses there" if found.low > 0 else "whether it loses there is open"
    else:
        above = f"its own interval is {'' if found.low > 0 else 'not '}above 0"
        means = f"{above}, but it is the worst of {looked_at} differences, picked after the fact, which tests nothing"
    where = f"{spell(found)} against {NAMES.get(part.other, part.other)} at {part.learning_rate:g}"
    return f"Worst domain: {part.worst}, {where}: {means}."


def _unscored_line(outcomes: Outcomes, by_arm: Mapping[str, Sequence[Comparison]]) -> str:
    if not outcomes.unscored:
        return "Unscored domains: none were given, so what the mixture does beyond its probes is open."
    parts = [than for result in (BETTER, WORSE) for than in _than(by_arm, _unscored, result)]
    return f"Unscored domains: {', '.join(parts) or 'no evidence of a difference from any arm'}."


def _limits(outcomes: Outcomes, subject: str) -> list[str]:
    """What these figures do not say."""
    lines, names = [], [arm.name for arm in outcomes.arms]
    if missing := _untried(_needed(subject)[0], names):
        lines.append(f"Not among the arms: {_names(missing)}.")
    if subject == MIXTURE and "permuted" not in names:
        lines.append("Its own weights permuted were not among the arms: any weights as uneven may do as well.")
    if len(outcomes.learning_rates) == 1:
        lines.append("One learning rate: at another the ranking of mixtures can be another.")
    lines.append("One size of model and one budget: what holds here need not hold at another.")
    return lines
