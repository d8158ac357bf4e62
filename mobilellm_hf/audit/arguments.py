"""What the YAML file of an audit says, and what of it is refused before anything is loaded or trained."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from transformers import AutoConfig

from mobilellm_hf.audit.arms import BASELINES, CURATION_SHARE, Weights, check_weights, load_weights
from mobilellm_hf.audit.rivals import doge, doremi, mixmin, regmix, similarity
from mobilellm_hf.audit.rivals.reweighting import check_batches
from mobilellm_hf.audit.statistics import ALPHA, check_seeds
from mobilellm_hf.data.mixture import MAX_EPOCHS
from mobilellm_hf.data.rows import check_entries
from mobilellm_hf.independent import check_new_models, check_whole_models
from mobilellm_hf.influence.leave_one_out_rows import declared_sources, streamed_sources
from mobilellm_hf.launch import option
from mobilellm_hf.modeling.configuration_mobilellm import MODEL_SIZES
from mobilellm_hf.training.arguments import StageArguments, StageTrainingArguments

DRAWN = (*BASELINES, "permuted", "random")
FINDERS = {"similarity": similarity, "regmix": regmix, "mixmin": mixmin, "doremi": doremi, "doge": doge}
ARMS = (*DRAWN, *FINDERS)
# What a rejection is compared with in any case.
REJECTION_ARMS = ("all_rows", "random_rows", "length_matched", "flipped")
GROUPS = ("tuning", "final", "unscored")
# Arms whose weights follow from how many tokens there are of each source.
SIZED = ("proportional", "sqrt_tokens", "similarity", "regmix", "doremi")
# What `influence.parquet` has beside a column a capability.
SCORE_COLUMNS = ("row", "source", "tokens")


@dataclass
class AuditArguments:
    mixture: str | None = option("file of the weights to audit: source: weight, or the same under a key weights")
    scores: str | None = option("influence.parquet of the sources' rows: audits the rejection by it, not the mixture")
    other_scores: str | None = option("with scores: those of another seed's model")
    score_rule: str = option("with scores: whose influence must be positive, mean or a capability", "mean")
    loss_model: str | None = option("with scores: folder or Hub id of the model by whose losses rows are matched")
    teacher: str | None = option("with scores: folder or Hub id of a teacher; arms are trained by it, too")
    others: dict = option("YAML only: name -> file of another tool's weights, an arm each", dict)
    sources: list[dict] = option(
        "YAML only: what there is to read: {name: CORPUS}, {catalog: SOURCE} or {rows: FOLDER}", list
    )
    source_tokens: dict = option(
        "YAML only: source -> tokens that there are of it; by default counted, but a stream has no end to count to",
        dict,
    )
    tuning_probes: dict = option(
        "YAML only: capability -> list of sources that the mixture was scored on; rivals may look at them", dict
    )
    final_probes: dict = option("YAML only: capability -> list of sources that decide, other text than those", dict)
    unscored_domains: dict = option("YAML only: domain -> list of sources that no method was tuned on", dict)
    rows_per_probe: int | None = option("a random choice of so many rows of each of a probe's sources", 256)
    overlap: Literal["error", "drop", "allow"] = option(
        "what to do with rows that share documents with a probe", "error"
    )
    arms: list[str] = option(f"what it is compared with, of {', '.join(ARMS)}", lambda: list(ARMS))
    seeds: list[int] = option(
        "of weights, order and placebos; every arm is trained with each, and too few are refused",
        lambda: list(range(10)),
    )
    learning_rates: list[float] | None = option("two or more; by default learning_rate and half of it")
    curation_share: float = option(
        "what finding the mixture cost, as a share of the training it is for; others train so much longer",
        round(CURATION_SHARE, 4),
    )
    proxy_share: float = option(
        "what one of these small models costs, as a share of that training; rivals are charged by it", 0.01
    )
    max_epochs: float = option("how often a source may be read, in every arm", MAX_EPOCHS)
    alpha: float = option("chance of any false finding among all arms, at one learning rate", ALPHA)
    model_size: str | None = option(f"shape of the models: {', '.join(MODEL_SIZES)}")
    model_config: dict = option("YAML only: fields of MobileLLMConfig, instead of model_size or beside it", dict)
    attn_implementation: str | None = option("sdpa, flash_attention_2, ...; by default transformers' choice")
    tokenizer: str | None = option("folder or Hub id")
    seq_length: int = option("tokens of a packed row", 2048)
    shuffle_buffer: int = option("documents among which a stream chooses the next", 10_000)
    dry_run: bool = option("measure the speed, say how long it would take, and train nothing", False)

    def __post_init__(self):
        self.seeds = numbers("seeds", self.seeds, int, "0, 1, 2")
        if self.learning_rates is not None:
            self.learning_rates = numbers("learning_rates", self.learning_rates, float, "6.0e-3, 3.0e-3")
        if not isinstance(self.arms, list):
            raise ValueError(f"arms is {self.arms!r}: write a list, such as [uniform, permuted]")
        for name, of in (("others", "name -> file of weights"), ("source_tokens", "source -> tokens")):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is {getattr(self, name)!r}: write {of}")
        self.source_tokens = {
            name: numbers(f"source_tokens.{name}", [tokens], float, "")[0]
            for name, tokens in self.source_tokens.items()
        }

    def stage(self) -> StageArguments:
        """What the functions of a training stage take."""
        names = ("model_size", "model_config", "attn_implementation", "tokenizer", "seq_length")
        return StageArguments(**{name: getattr(self, name) for name in names})

    def probes(self) -> dict[str, list[dict]]:
        """The entries of all probes, by group and name: "final math"."""
        groups = zip(GROUPS, (self.tuning_probes, self.final_probes, self.unscored_domains), strict=True)
        return {f"{group} {name}": entries for group, probes in groups for name, entries in probes.items()}

    def comparisons(self) -> int:
        if self.scores is not None:
            return len(REJECTION_ARMS) + (self.loss_model is not None) + (self.other_scores is not None)
        return len(self.arms) + len(self.others)


@dataclass
class AuditTrainingArguments(StageTrainingArguments):
    output_dir: str = option("folder of the audit; one of other data or models is refused", "runs/audit")

    def __post_init__(self):
        super().__post_init__()
        if self.seed != type(self).seed:
            raise ValueError(f"seed={self.seed}: an audit takes seeds, a list")


def numbers(field: str, values: Any, kind: type, example: str) -> list:
    """A list of numbers, also of those that YAML takes for text, such as 6e-3; a ValueError names the field."""
    if not isinstance(values, list):
        raise ValueError(f"{field} is {values!r}: write a list, such as [{example}]")
    found = []
    for value in values:
        try:
            number = kind(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{field}: {value!r} is no number") from error
        if isinstance(value, bool) or (not isinstance(value, str) and number != value):
            raise ValueError(f"{field}: {value!r} is no {'whole ' if kind is int else ''}number")
        found.append(number)
    return found


def check(args: AuditArguments, training: AuditTrainingArguments) -> None:
    """Raises a ValueError that names the field for what can be refused before anything is loaded."""
    if args.mixture is None and args.scores is None:
        raise ValueError("mixture: name the file of the weights to audit, --mixture FILE")
    check_scores(args)
    check_new_models(args.model_size, args.model_config, args.tokenizer)
    check_entries("sources", args.sources)
    check_sizes(args)
    check_probes(args)
    check_design(args, training)
    check_whole_models(training)
    if args.scores is None and {"doremi", "doge"} & set(args.arms):
        check_batches(training)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the picture at the end needs matplotlib: pip install 'mobilellm_hf[plots]'")
    if (names := declared_sources(args.sources)) is not None:
        check_names(args, names)


def check_sizes(args: AuditArguments) -> None:
    """Raises a ValueError if an arm needs the size of a stream, which nobody knows, or a size is none."""
    for name, tokens in args.source_tokens.items():
        if not 0 < tokens < math.inf:
            raise ValueError(f"source_tokens: {name} has {tokens!r}, which is no number of tokens")
    if args.scores is None:
        needing = [name for name in args.arms if name in SIZED]
    else:
        needing = [] if args.mixture is not None else ["a rejection without a mixture"]
    unknown = [name for name in streamed_sources(args.sources) if name not in args.source_tokens]
    if needing and unknown:
        raise ValueError(
            f"source_tokens: {needing[0]} takes its weights from the tokens that there are of each source, and "
            f"{', '.join(unknown)} {'is a stream' if len(unknown) == 1 else 'are streams'} of unknown size: write "
            f"source_tokens: {{{unknown[0]}: TOKENS}}, leave {', '.join(needing)} out, or set streaming: false"
        )


def check_scores(args: AuditArguments) -> None:
    for name in ("other_scores", "loss_model", "teacher"):
        if getattr(args, name) is not None and args.scores is None:
            raise ValueError(f"{name} is for the audit of a rejection: give scores, or leave it out")
    for name in ("scores", "other_scores"):
        file = getattr(args, name)
        if file is not None and not Path(file).is_file():
            raise ValueError(f"{name}: there is no file {file}")
        if file is not None:
            check_rule(name, file, args.score_rule)
    for name in ("loss_model", "teacher"):
        model = getattr(args, name)
        try:
            if model is not None:
                AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: there is no model at {model} ({error})") from error


def check_rule(field: str, file: str | Path, rule: str) -> list[str]:
    """The capabilities of a file of scores; a ValueError names the field if it is none, or knows no such rule."""
    try:
        columns = pyarrow.parquet.read_schema(file).names
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{field}: {file} is no parquet file ({error})") from error
    if missing := [name for name in ("source", "tokens") if name not in columns]:
        raise ValueError(f"{field}: {file} has no column {missing[0]!r}: give an influence.parquet of scores")
    capabilities = [name for name in columns if name not in SCORE_COLUMNS]
    if not capabilities or rule not in ("mean", *capabilities):
        raise ValueError(f"score_rule={rule!r} must be mean or one of {', '.join(capabilities)}, as {file} has them")
    return capabilities


def check_probes(args: AuditArguments) -> None:
    for field in ("tuning_probes", "final_probes", "unscored_domains"):
        probes = getattr(args, field)
        if not isinstance(probes, dict) or (not probes and field == "final_probes"):
            raise ValueError(f"{field} is {probes!r}: write capability -> list of sources")
        for name, entries in probes.items():
            check_entries(f"{field}.{name}", entries)
    if twice := sorted(set(args.final_probes) & set(args.unscored_domains)):
        raise ValueError(f"unscored_domains: {twice[0]!r} is a final probe too: give it another name")
    needing = [name for name in args.arms if name in FINDERS and name != "doremi"]
    if needing and args.scores is None and not args.tuning_probes:
        raise ValueError(f"tuning_probes: {needing[0]} finds its weights by them, and there are none")


def check_design(args: AuditArguments, training: AuditTrainingArguments) -> None:
    """Raises a ValueError unless the arms, seeds, rates and shares make an experiment."""
    if unknown := [name for name in args.arms if name not in ARMS]:
        raise ValueError(f"arms: there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if twice := [name for name in ARMS if args.arms.count(name) > 1]:
        raise ValueError(f"arms: {twice[0]} is there twice")
    for name in args.others:
        if not re.fullmatch(r"[\w.-]+", name) or name in ("mixture", *ARMS):
            raise ValueError(f"others: {name!r} cannot name an arm: use other letters, digits, '_', '-' or '.'")
    if not args.comparisons():
        raise ValueError("arms: there is nothing to compare the mixture with")
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < 2**32 for seed in args.seeds):
        raise ValueError(f"seeds={args.seeds} must be different whole numbers from 0 to 2**32 - 1")
    if not 0 < args.alpha < 1:
        raise ValueError(f"alpha={args.alpha} must be between 0 and 1")
    check_seeds(len(args.seeds), args.comparisons(), args.alpha)
    rates = learning_rates(args, training)
    if len(set(rates)) < len(rates) or not rates or min(rates) <= 0:
        raise ValueError(f"learning_rates={rates} must be different positive numbers")
    for name in ("curation_share", "proxy_share"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be a share, 0 or more and below 1")
    for name in ("seq_length", "rows_per_probe", "shuffle_buffer", "max_epochs"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"{name}={getattr(args, name)} must be positive")


def learning_rates(args: AuditArguments, training: AuditTrainingArguments) -> list[float]:
    return args.learning_rates or [training.learning_rate, training.learning_rate / 2]


def read_weights(args: AuditArguments, sources: list[str]) -> tuple[Weights, dict[str, Weights]]:
    """The audited weights, and those of other tools; a ValueError names the file and what is wrong in it."""
    others = {
        name: check_weights(given, sources, f"others.{name}") if isinstance(given, dict) else
        load_weights(given, sources) for name, given in args.others.items()
    }  # fmt: skip
    return load_weights(args.mixture, sources), others


def check_names(args: AuditArguments, sources: list[str]) -> None:
    """Raises a ValueError that names the file whose weights are not of these sources, or source_tokens."""
    if unknown := [name for name in args.source_tokens if name not in sources]:
        raise ValueError(f"source_tokens names {unknown[0]!r}; the sources are {', '.join(sources)}")
    if args.mixture is not None:
        read_weights(args, sources)
