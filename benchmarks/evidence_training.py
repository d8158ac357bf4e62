"""Claims of evidence.py on training: influence that narrows, RankMe, staged fine-tuning (Figure 5, Tables 11, 2)."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.parquet
from evidence_data import CAPABILITIES
from evidence_lab import Job, Lab
from evidence_mixtures import score
from evidence_report import Figures, Finding, Interval, interval, judged, rank_correlation

PHASES = ("before", "after phase 1", "after phase 2")
ARMS = {"resampled": True, "plain": False}
RATES = (1.6e-2, 8e-3, 4e-3, 1e-3)
SFT_LENGTH = 384
# Of the seed of a stage to that of the next one, which would otherwise begin with the very rows that were read before.
NEW_ORDER = 1000
CANDIDATES = 256
TASKS = ("copying", "comparing", "sorting", "majority")
SFT_ARMS = ("reasoning only", "joint", "staged")


def base(lab: Lab, seed: int) -> Job:
    settings = lab.stage(lab.scale.steps, seed) | lab.new_model() | {"stage": "pretrain"}
    return Job("pretrain.py", f"base/{seed}", settings)


def base_model(lab: Lab, seed: int) -> str:
    return str(lab.folder / "base" / str(seed) / "model-pretrain")


def phase(lab: Lab, seed: int, arm: str, number: int) -> Job:
    before = base_model(lab, seed) if number == 1 else str(
        lab.folder / "phases" / f"{arm}-{seed}-1" / "model-midtrain-stage1"
    )  # fmt: skip
    steps = lab.scale.steps // 2
    settings = lab.stage(steps, seed + number * NEW_ORDER, lab.scale.learning_rate / 4) | {
        "stage": "midtrain-stage1" if number == 1 else "midtrain", "model": before,
    }  # fmt: skip
    if ARMS[arm]:
        settings |= {"resample_at_start": True, "resample_every": steps // 2, "candidates_per_source": CANDIDATES,
                     "sign_check": "off", "delay_steps": 4, "allow_overlap": True}  # fmt: skip
    return Job("midtrain.py", f"phases/{arm}-{seed}-{number}", settings)


def scored_model(lab: Lab, seed: int, arm: str, number: int) -> str:
    if number == 0:
        return base_model(lab, seed)
    name = "model-midtrain-stage1" if number == 1 else "model-base"
    return str(lab.folder / "phases" / f"{arm}-{seed}-{number}" / name)


def spreads(lab: Lab, seed: int, arm: str, number: int, curvature: str) -> tuple[dict[str, float], float]:
    """Of each capability, from the 5th to the 95th percentile of the influence; and the share of rows above 0."""
    name = "base" if number == 0 else arm
    table = pyarrow.parquet.read_table(
        lab.folder / "narrowing" / f"{name}-{seed}-{number}-{curvature}" / "influence.parquet"
    )
    values = {name: table[name].to_numpy() for name in CAPABILITIES}
    ranges = {name: float(np.subtract(*np.percentile(found, [95, 5]))) for name, found in values.items()}
    return ranges, float((np.mean(list(values.values()), 0) > 0).mean())


def narrowing(lab: Lab) -> Finding:
    seeds, curvatures = range(max(3, lab.scale.seeds - 2)), ("datainf", "identity")
    lab.run_all("models before mid-training", [base(lab, seed) for seed in seeds])
    for number in (1, 2):
        lab.run_all(f"phase {number}", [phase(lab, seed, arm, number) for seed in seeds for arm in ARMS])
    jobs = {}
    for seed in seeds:
        for arm in ARMS:
            for number in range(3):
                for curvature in curvatures:
                    name = f"narrowing/{'base' if number == 0 else arm}-{seed}-{number}-{curvature}"
                    checkpoints = [{"name": scored_model(lab, seed, arm, number), "step": 1}]
                    jobs[name] = score(lab, name, checkpoints, rows_per_source=lab.scale.rows_scored, bootstraps=0,
                                       probe_folds=0, curvature=curvature, overlap="drop")  # fmt: skip
    lab.run_all("influence through the phases", list(jobs.values()))
    lines, logs = [], {}
    for curvature in curvatures:
        for arm in ARMS:
            cells = [(seed, number) for seed in seeds for number in range(3)]
            found = {(seed, number): spreads(lab, seed, arm, number, curvature) for seed, number in cells}
            for number in (1, 2):
                log = {
                    name: [float(np.log(found[seed, number][0][name] / found[seed, 0][0][name])) for seed in seeds]
                    for name in CAPABILITIES
                }  # fmt: skip
                positive = statistics.mean(found[seed, number][1] for seed in seeds)
                logs[curvature, arm, number] = log
                shown = [as_ratio(interval(log[name])) for name in CAPABILITIES]
                lines.append([curvature, arm, PHASES[number], *shown, f"{positive:.0%}"])
    return narrowing_finding(lab, seeds, lines, logs)


def as_ratio(logs: Interval) -> str:
    return f"{np.exp(logs.mean):.2f} [{np.exp(logs.low):.2f}, {np.exp(logs.high):.2f}]"


def narrowing_finding(
    lab: Lab, seeds: Sequence[int], lines: list[list[str]], logs: Mapping[tuple[str, str, int], Mapping[str, list]]
) -> Finding:
    resampled, plain = (logs["datainf", arm, 2] for arm in ARMS)
    ratios = {name: interval(resampled[name]) for name in CAPABILITIES}
    beyond = ", ".join(f"{name} {as_ratio(interval(resampled[name], plain[name]))}" for name in CAPABILITIES)
    rejected = statistics.mean(
        lab.last(f"phases/resampled-{seed}-{number}", "influence/rejected") for seed in seeds for number in (1, 2)
    )
    said = (
        "By DataInf and after both phases the range is, as a multiple of that before, "
        f"{', '.join(f'{as_ratio(found)} on {name}' for name, found in ratios.items())}. Range with resampling as a "
        f"multiple of that without, seed by seed: {beyond}. Of all rows {rejected:.1%} were rejected by a phase's end."
    )
    return Finding(
        "Influence narrows over phases (Figure 5)",
        "from phase 1 to phase 2 of mid-training the range of influence scores narrows, as samples are dropped and "
        "the model learns from the rest.",
        f"{len(seeds)} seeds; two phases of {lab.scale.steps // 2} steps with rejection and reweighing, twice in each "
        f"by the influence of {CANDIDATES} rows of each source, and two that read all sources alike. The same "
        f"{lab.scale.rows_scored} rows of each source are scored before and after each phase; what is shown is the "
        "range from the 5th to the 95th percentile as a multiple of that before.",
        judged(*(found.negative() for found in ratios.values())), said,
        [Figures("Range of influence as a multiple of that before mid-training, 95% interval over seeds",
                 ["curvature", "training", "when", *CAPABILITIES, "rows above 0"], lines)],
    )  # fmt: skip


def rank_me(lab: Lab) -> Finding:
    seeds, steps = range(max(4, lab.scale.seeds - 1)), lab.scale.steps
    before = [
        Job("pretrain.py", f"rank-me/pretrain-{rate:g}-{seed}",
            lab.stage(steps, seed, rate) | lab.new_model() | {"stage": "pretrain"})
        for rate in RATES for seed in seeds
    ]  # fmt: skip
    rate_after = lab.scale.learning_rate / 4
    settings = {seed: lab.stage(steps, seed + NEW_ORDER, rate_after) | {"stage": "midtrain"} for seed in seeds}
    after = [
        Job("midtrain.py", f"rank-me/midtrain-{rate:g}-{seed}",
            settings[seed] | {"model": str(lab.folder / f"rank-me/pretrain-{rate:g}-{seed}/model-pretrain")})
        for rate in RATES for seed in seeds
    ]  # fmt: skip
    lab.run_all("pre-training at four learning rates", before)
    lab.run_all("mid-training of each", after)
    cells = [(rate, seed) for rate in RATES for seed in seeds]
    ranks = {(rate, seed): lab.last(f"rank-me/pretrain-{rate:g}-{seed}", "rank_me") for rate, seed in cells}
    nll = {
        (when, rate, seed): statistics.mean(
            lab.last(f"rank-me/{when}-{rate:g}-{seed}", f"probe_nll/{name}") for name in CAPABILITIES
        )
        for when in ("pretrain", "midtrain") for rate, seed in cells
    }  # fmt: skip
    lines = [
        [f"{rate:g}", interval([nll["pretrain", rate, seed] for seed in seeds]).plain(),
         interval([ranks[rate, seed] for seed in seeds]).plain(1),
         interval([nll["midtrain", rate, seed] for seed in seeds]).plain()]
        for rate in RATES
    ]  # fmt: skip

    def correlations(figure: Mapping) -> list[float]:
        """Seed by seed, with the quality after mid-training."""
        return [
            rank_correlation([figure[rate, seed] for rate in RATES], [-nll["midtrain", rate, seed] for rate in RATES])
            for seed in seeds
        ]

    tells = correlations(ranks), correlations({(rate, seed): -nll["pretrain", rate, seed] for rate, seed in cells})
    by_rank, by_nll, more = interval(tells[0]), interval(tells[1]), interval(*tells)
    rising = interval([rank_correlation(RATES, [ranks[rate, seed] for rate in RATES]) for seed in seeds])
    return Finding(
        "RankMe and the learning rate (Table 11)",
        "higher learning rates give pre-trained models of higher RankMe, which tells how good they are after "
        "mid-training, where their quality before it does not.",
        f"{len(RATES)} learning rates x {len(seeds)} seeds, {steps} steps, and as many of mid-training at one rate. "
        "Quality is the mean NLL of code, math and knowledge probes, not MMLU, which such models cannot answer; "
        "RankMe is that of the code probe's hidden states. Four rates are few points: intervals are over seeds only.",
        judged(rising, by_rank, more),
        f"Spearman's correlations, mean over seeds: of the learning rate and RankMe {rising}; with the quality after "
        f"mid-training {by_rank} of RankMe, {by_nll} of the quality before it, a difference of {more}.",
        [Figures("Mean over seeds with the 95% interval",
                 ["learning rate", "NLL before", "RankMe", "NLL after mid-training"], lines)],
    )  # fmt: skip


def conversations(lab: Lab, name: str, **more) -> dict:
    columns = {"prompt_column": "question", "response_column": "answer"}
    return {"name": str(lab.folder / "data" / "conversations" / f"{name}.jsonl"), **columns, **more}


def fine_tuning(lab: Lab, seed: int, model: str, kinds: Sequence[str], steps: int) -> dict:
    """Settings of a stage on general instructions, on reasoning, or on both alike."""
    general = [{"synthetic": [task], "count": 500} for task in TASKS]
    reasoning = [conversations(lab, "gsm8k-train"), conversations(lab, "algebra-train")]
    sets = {"general": general, "reasoning": reasoning}
    sources = [entry | {"weight": 1 / len(kinds) / len(sets[kind])} for kind in kinds for entry in sets[kind]]
    return without_final_rate(lab.training(steps, seed, lab.scale.learning_rate / 2)) | {
        "stage": "reasoning", "model": model, "model_name": "model", "sources": sources, "max_length": SFT_LENGTH,
        "weigh_by": "tokens", "probes": {
            "gsm8k": [conversations(lab, "gsm8k-test")], "algebra": [conversations(lab, "algebra-test")],
            "general": [{"synthetic": list(TASKS), "split": "probe", "count": 48}],
        },
        "rows_per_probe": 128, "monitor_every": steps, "per_device_train_batch_size": 3, "bf16": False,
        "activation_checkpointing": False,
    }  # fmt: skip


def without_final_rate(settings: Mapping) -> dict:
    return {name: value for name, value in settings.items() if name != "warmup_steps"} | {"warmup_steps": 0.1}


def staged_fine_tuning(lab: Lab) -> Finding:
    seeds, steps = range(lab.scale.seeds), lab.scale.steps // 2
    lab.run_all("models before fine-tuning", [base(lab, seed) for seed in seeds])
    first, second = [], []
    for seed in seeds:
        start = base_model(lab, seed)
        general = fine_tuning(lab, seed, start, ["general"], steps)
        first += [
            Job("sft.py", f"sft/general-{seed}", general | {"stage": "general"}),
            Job("sft.py", f"sft/reasoning only-{seed}", fine_tuning(lab, seed, start, ["reasoning"], steps)),
            Job("sft.py", f"sft/joint-{seed}", fine_tuning(lab, seed, start, ["general", "reasoning"], 2 * steps)),
        ]
        after = str(lab.folder / "sft" / f"general-{seed}" / "model-tulu3")
        second.append(Job("sft.py", f"sft/staged-{seed}", fine_tuning(lab, seed, after, ["reasoning"], steps)))
    lab.run_all("fine-tuning", first)
    lab.run_all("fine-tuning, second stage", second)
    probes = ("gsm8k", "algebra", "general")
    nll = {
        (arm, probe): [lab.last(f"sft/{arm}-{seed}", f"probe_nll/{probe}") for seed in seeds]
        for arm in SFT_ARMS for probe in probes
    }  # fmt: skip
    lines = [[arm, *(interval(nll[arm, probe]).plain() for probe in probes)] for arm in SFT_ARMS]
    differences = {
        other: {probe: interval(nll["staged", probe], nll[other, probe]) for probe in probes} for other in SFT_ARMS[:2]
    }
    lines += [[f"staged minus {other}", *map(str, found.values())] for other, found in differences.items()]
    decisive = {other: {probe: found[probe] for probe in probes[:2]} for other, found in differences.items()}
    return Finding(
        "Staged against joint fine-tuning (Table 2)",
        "general instructions first and reasoning then is better than both together, and than reasoning alone.",
        f"{len(seeds)} seeds; {steps} steps a stage, the joint arm {2 * steps} on as many tokens of both, so that all "
        "but `reasoning only` read equally much. Reasoning is GSM8K and MATH algebra. The general instructions are "
        "conversations made by rules, a stand-in for Tulu. Quality is the NLL of answers that were not trained on: "
        "such small models solve no problem of GSM8K.",
        judged(*(found.negative() for of in decisive.values() for found in of.values())),
        "NLL of staged minus that of another, on the two reasoning probes: " + "; ".join(
            f"{other} {', '.join(f'{found} on {probe}' for probe, found in of.items())}"
            for other, of in decisive.items()
        ) + ".",
        [Figures("NLL of held-out answers, nats a token, 95% interval over seeds", ["arm", *probes], lines)],
    )  # fmt: skip
