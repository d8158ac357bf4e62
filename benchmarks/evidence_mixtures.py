"""Claims of evidence.py on what is read: leave-one-out, the influence mix, and rejection (Figures 3, 4 and 6)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import yaml
from evidence_data import CAPABILITIES, SOURCES
from evidence_lab import SEQ_LENGTH, STUDENT, TEACHER, Job, Lab, saves
from evidence_report import FAILS, PARTLY, REPLICATES, UNDECIDED, Figures, Finding, Interval, interval, judged

from mobilellm_hf.audit.arguments import ARMS
from mobilellm_hf.audit.statistics import partial_rank_correlation

# Of the sources, the one that is nearest to broad text from the web.
BROADEST = "wikitext"
CHECKPOINTS = 3
# An arm of the audit that reads as much as the mixture, not longer by what the mixture cost to find.
EQUAL_TOKENS = "uniform_equal_tokens"
SHUFFLES = 10_000


def without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "seed"}


def leave_one_out(lab: Lab) -> Finding:
    scale = lab.scale
    lab.run_together(
        Job("leave_one_out.py", "leave-one-out", without_seed(lab.training(scale.steps, 0)) | lab.new_model() | {
            "sources": lab.sources(), "probes": lab.probes("final"), "rows_per_probe": 128, "seq_length": SEQ_LENGTH,
            "seeds": list(range(scale.seeds)), "monitor_every": scale.steps,
        })
    )  # fmt: skip
    folder = lab.folder / "leave-one-out"
    effects = yaml.safe_load((folder / "leave_one_out.yaml").read_text())["effects"]
    lines = [
        [source, *("{delta:+.3f} [{low:+.3f}, {high:+.3f}]".format(**effects[source][name]) for name in CAPABILITIES)]
        for source in effects
    ]
    hurts = [name for name in CAPABILITIES if effects[BROADEST][name]["low"] > 0]
    deltas = {(row["source"], row["capability"], row["seed"]): row["delta"] for row in lost(folder)}
    most, against = [], []
    for name in CAPABILITIES:
        next_one = max(set(effects) - {BROADEST}, key=lambda source: effects[source][name]["delta"])
        both = ([deltas[source, name, seed] for seed in range(scale.seeds)] for source in (BROADEST, next_one))
        most.append(interval(*both))
        against.append(f"on {name} than {next_one} {most[-1]}")
    said = (
        f"Without {BROADEST} the NLL rises (interval above 0) on {listed(hurts)}. It is missed more than the source "
        f"that is missed most beside it, by: {', '.join(against)}. Of {3 * len(effects)} intervals, each for itself, "
        "about one does not hold what it should."
    )
    return Finding(
        "Leave one out (Figure 3)",
        "without FineWeb-Edu, which is broad text from the web, all three capabilities lose most.",
        f"{scale.seeds} seeds x {len(SOURCES) + 1} models, equal shares and no text twice; {BROADEST} is the broadest "
        "source, though an encyclopedia and no web crawl. Three sources are of math and two of code, which stand in "
        f"for each other when one is left out; {BROADEST} has no such neighbour. Probes: HumanEval, GSM8K's and "
        "WikiText's test sets, of which GSM8K's and WikiText's are of a source's own kind.",
        judged(*most), said,
        [Figures("NLL without the source minus with all, nats a token, 95% interval over seeds",
                 ["left out", *CAPABILITIES], lines)],
        [folder / "heat_map.png"],
    )  # fmt: skip


def lost(folder: Path) -> list[dict]:
    """source, capability, seed, delta."""
    return pyarrow.parquet.read_table(folder / "leave_one_out.parquet").to_pylist()


def listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "none"


def score(lab: Lab, name: str, checkpoints: Any, **settings: Any) -> Job:
    """A job that scores the rows of all sources."""
    return Job("score_influence.py", name, {
        "checkpoints": checkpoints, "sources": lab.sources(), "probes": lab.probes("tuning"), "rows_per_probe": 64,
        "tokenizer": str(lab.folder / "data" / "tokenizer"), "seq_length": SEQ_LENGTH, "curvature": "datainf",
        "batch_size": 16, "rows_per_shard": 1024, **settings,
    })  # fmt: skip


def capability_mixture(lab: Lab) -> dict[str, dict[str, float]]:
    """The weights of equation (5) and the shrunk ones, by three models' checkpoints, each of its own domain."""
    every = lab.scale.steps // CHECKPOINTS
    jobs = []
    for name in CAPABILITIES:
        own = [source for source, capability in SOURCES.items() if capability == name]
        settings = lab.stage(CHECKPOINTS * every, 0, sources=own) | lab.new_model() | saves(every)
        settings |= {"stage": "pretrain", "save_total_limit": None}
        jobs.append(Job("pretrain.py", f"capability/{name}", settings))
    lab.run_all("models of one capability", jobs)
    folders = {
        name: [str(lab.folder / "capability" / name / f"checkpoint-{every * (number + 1)}") for number in
               range(CHECKPOINTS)]
        for name in CAPABILITIES
    }  # fmt: skip
    lab.run_together(score(lab, "influence", folders, rows_per_source=256))
    found = yaml.safe_load((lab.folder / "influence" / "mixture.yaml").read_text())["uncertainty"]
    if found["unshrunk"] is None:
        raise RuntimeError("equation (5) gives no weights, as no source helps: try more --steps")
    return {name: found[name] for name in ("unshrunk", "shrunk")}


def audit_settings(lab: Lab, seeds: int, steps: int) -> dict[str, Any]:
    rate = lab.scale.learning_rate
    return without_seed(lab.training(steps, 0)) | lab.new_model() | {
        "sources": lab.sources(), "tuning_probes": lab.probes("tuning"), "final_probes": lab.probes("final"),
        "unscored_domains": lab.probes("unscored", "geometry", "tests"), "rows_per_probe": 128,
        "seq_length": SEQ_LENGTH, "seeds": list(range(seeds)), "learning_rates": [rate, rate / 2], "overlap": "drop",
    }  # fmt: skip


def comparisons_of(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [part["other"], f"{part['learning_rate']:g}", str(of(part["final"])), f"{part['final']['p_value']:.3f}",
         f"{part['p_value']:.3f}", *(str(of(part["per_probe"][name])) for name in CAPABILITIES),
         str(of(part["unscored"]))]
        for part in results["comparisons"]
    ]  # fmt: skip


AUDIT_COLUMNS = ["against", "learning rate", "all probes", "p", "p (Holm)", *CAPABILITIES, "unscored domains"]


def of(difference: Mapping[str, float]) -> Interval:
    return Interval(difference["mean"], difference["low"], difference["high"])


def outcome_against(results: Mapping[str, Any], other: str) -> str:
    """By the intervals of the mean over probes, at every learning rate; no capability may be worse."""
    parts = [part for part in results["comparisons"] if part["other"] == other]
    outcome = judged(*(of(part["final"]).negative() for part in parts))
    worse = [name for part in parts for name, found in part["per_probe"].items() if of(found).above()]
    return PARTLY if outcome == REPLICATES and worse else outcome


def influence_mix(lab: Lab) -> Finding:
    scale, mixtures = lab.scale, capability_mixture(lab)
    file = lab.folder / "influence" / "equation_5.json"
    file.write_text(json.dumps(mixtures["unshrunk"]))
    settings = audit_settings(lab, scale.audit_seeds, scale.audit_steps)
    lab.run_together(
        Job("audit.py", "audit",
            settings | {"mixture": str(file), "arms": list(ARMS), "others": {
                "shrunk": mixtures["shrunk"], EQUAL_TOKENS: dict.fromkeys(SOURCES, 1 / len(SOURCES))}})
    )  # fmt: skip
    results = json.loads((lab.folder / "audit" / "results.json").read_text())
    weights = ", ".join(f"{name} {value:.2f}" for name, value in mixtures["unshrunk"].items())
    shrunk = ", ".join(f"{name} {value:.2f}" for name, value in mixtures["shrunk"].items())
    verdict = results["verdict"]
    return Finding(
        "Influence mix (Figure 4)",
        "the mixture by influence, found without the benchmarks, beats uniform sampling on code, math and knowledge.",
        f"three models of one capability each, {CHECKPOINTS} checkpoints of each, DataInf; equation (5) gives "
        f"{weights} (shrunk: {shrunk}). Then `recipes/audit.py` of this one mixture, beside baselines, placebos and "
        f"rivals: {scale.audit_seeds} seeds, {scale.audit_steps} steps. Arms whose weights cost nothing train 17.6% "
        f"longer, the price that the paper names for the scores; `{EQUAL_TOKENS}` is uniform without that, as in "
        "Figure 4, and decides the outcome here. Bits per byte on HumanEval, GSM8K's and WikiText's test sets, of "
        "which the last two are of a source's own kind; unscored are MATH's geometry and Python's own tests.",
        outcome_against(results, EQUAL_TOKENS),
        f"The audit, with all costs: {verdict['headline']}",
        [Figures("Bits per byte of the influence mix minus those of the other arm; below 0 it is better",
                 AUDIT_COLUMNS, comparisons_of(results))],
        [lab.folder / "audit" / "forest.png"],
    )  # fmt: skip


def agreement(lab: Lab) -> Finding:
    """Of what influence predicts and leave-one-out finds, cell by cell of source x capability."""
    figures = yaml.safe_load((lab.folder / "influence" / "mixture.yaml").read_text())["sources"]
    rows = lost(lab.folder / "leave-one-out")
    own = [float(capability == SOURCES[source]) for capability in CAPABILITIES for source in SOURCES]
    predicted = [place for name in CAPABILITIES for place in places([figures[s]["influence"][name] for s in SOURCES])]
    deltas = {cell: [] for cell in [(source, name) for name in CAPABILITIES for source in SOURCES]}
    for row in rows:
        deltas[row["source"], row["capability"]].append(row["delta"])
    means = [[float(np.mean(deltas[source, name])) for source in SOURCES] for name in CAPABILITIES]
    found = [place for values in means for place in places(values)]
    lines, shown = [], {}
    for name, within_own in (("influence", False), ("influence, given that", True)):
        value, *chance = (
            partial_rank_correlation(order, found, own) if within_own else correlation(order, found)
            for order in (predicted, *shuffles(predicted, own, within_own))
        )
        p_value = (1 + sum(abs(one) >= abs(value) - 1e-12 for one in chance)) / (1 + len(chance))
        lines.append([name, f"{value:+.3f}", f"{p_value:.3f}"])
        shown[name] = p_value < 0.05 and value > 0
    lines.append(["whether the source is of the capability", f"{correlation(own, found):+.3f}", ""])
    outcome = REPLICATES if shown["influence, given that"] else PARTLY if shown["influence"] else UNDECIDED
    return Finding(
        "Influence predicts leave-one-out (Figures 3 and 4 together)",
        "influence stands for what a source does to a capability, which leave-one-out measures by training.",
        f"the influence of each of {len(SOURCES)} sources on each of {len(CAPABILITIES)} capabilities by the models "
        "of one capability, against what leaving the source out does to the capability's final probe. Ranks within a "
        "capability, since scales differ; correlation over all cells with the mean over seeds of leave-one-out. The "
        f"cells are what varies: p is the share of {SHUFFLES:,} shuffles of the prediction, within a capability and, "
        "in the second line, among its own sources and among the others, that correlate as much.",
        outcome,
        "A prediction is worth something if it knows more than which source is of which capability.",
        [Figures("Rank correlation with the NLL that leaving the source out costs",
                 ["predicted by", "correlation", "p"], lines)],
    )  # fmt: skip


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def shuffles(predicted: Sequence[int], own: Sequence[float], within_own: bool) -> Iterator[np.ndarray]:
    """The prediction with its values dealt anew among the cells of a capability, or of a capability and of `own`."""
    generator, cells = np.random.default_rng(0), np.arange(len(predicted))
    group = cells // len(SOURCES) * 2 + (np.asarray(own, dtype=int) if within_own else 0)
    for _ in range(SHUFFLES):
        values = np.array(predicted)
        for number in np.unique(group):
            values[group == number] = generator.permutation(values[group == number])
        yield values


def places(values: Sequence[float]) -> list[int]:
    """0 for the smallest."""
    return np.argsort(np.argsort(values)).tolist()


def rejection(lab: Lab) -> Finding:
    scale = lab.scale
    bases = [
        Job("pretrain.py", f"base/{seed}", lab.stage(scale.steps, seed) | lab.new_model() | {"stage": "pretrain"})
        for seed in range(2)
    ]
    teacher = Job(
        "pretrain.py", "teacher", lab.stage(3 * scale.steps, 0, 3e-3) | lab.new_model(TEACHER) | {"stage": "pretrain"}
    )
    lab.run_all("models that score, and the teacher", [teacher, *bases])
    models = [str(lab.folder / "base" / str(seed) / "model-pretrain") for seed in range(2)]
    lab.run_all("influence of every row", [
        score(lab, f"scores/{seed}", [{"name": model, "step": scale.steps}], bootstraps=0, probe_folds=0,
              overlap="allow")
        for seed, model in enumerate(models)
    ])  # fmt: skip
    scores = [str(lab.folder / "scores" / str(seed) / "influence.parquet") for seed in range(2)]
    settings = audit_settings(lab, scale.rejection_seeds, scale.audit_steps) | {
        "tuning_probes": {}, "scores": scores[0], "other_scores": scores[1], "loss_model": models[0],
        "teacher": str(lab.folder / "teacher" / "model-pretrain"),
        "overlap": "allow",  # the very rows that are scored; what decides shares nothing with them
    }  # fmt: skip
    lab.run_together(Job("audit.py", "rejection", settings))
    found = {}
    for file in sorted((lab.folder / "rejection").glob("rejection*/results.json")):
        found["distillation" if "-by-" in file.parent.name else "cross-entropy"] = json.loads(file.read_text())
    outcomes = {outcome_against(results, "random_rows") for results in found.values()}
    return Finding(
        "Rejection, plain and distilled (Figure 6)",
        "what is left after samples without positive influence are dropped trains better than all of it, with "
        "cross-entropy and, by less, with distillation.",
        "every row scored by one model trained on all sources (DataInf), the rows above 0 kept; all_rows trains 17.6% "
        "longer, which the scores are charged with, while random_rows reads equal tokens and decides the outcome "
        f"here; {scale.rejection_seeds} seeds and {scale.audit_steps} steps of new models, where the paper goes on "
        f"from a trained one; a teacher of {TEACHER['hidden_size']} instead of {STUDENT['hidden_size']} dimensions.",
        outcomes.pop() if len(outcomes) == 1 else PARTLY if {REPLICATES, PARTLY} & outcomes else
        FAILS if FAILS in outcomes else UNDECIDED,
        " ".join(f"With {name}: {results['verdict']['headline']}" for name, results in found.items()),
        [Figures(f"With {name}: bits per byte of what is kept minus those of the other arm", AUDIT_COLUMNS,
                 comparisons_of(results)) for name, results in found.items()],
        [picture(lab.folder / "rejection")],
    )  # fmt: skip


def picture(folder: Path) -> Path:
    """The forest plot of the plain objective, under a name of its own."""
    named = folder / "rejection.png"
    named.write_bytes((folder / "rejection" / "forest.png").read_bytes())
    return named
