"""What an audit leaves beside its verdict: a table of the comparisons, and `results.json`.

comparisons = compare(outcomes)
console.print(comparison_table(outcomes, comparisons))
write_results(folder, outcomes, comparisons, verdict(outcomes, comparisons), settings, spent)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mobilellm_hf.audit.outcomes import Comparison, Outcomes
from mobilellm_hf.audit.verdict import Verdict
from mobilellm_hf.workspace import write_whole


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
