"""What the YAML file of a training stage says: its model, its data, and the callbacks that decide what is learnt.

Two groups of fields, both of them options of the command line too: `StageArguments` below, and the Trainer's own
`TrainingArguments` with the paper's optimizer (Table 4) as defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import TrainingArguments

from mobilellm_hf.data.mixture import MAX_EPOCHS
from mobilellm_hf.data.rows import check_entries
from mobilellm_hf.data.source_weights import source_weights
from mobilellm_hf.launch import option
from mobilellm_hf.modeling.configuration_mobilellm import MODEL_SIZES

# The stages of the official repositories on the Hub, and what each appends to the base model's name.
STAGES = {
    "pretrain-stage1": "-pretrain-stage1",
    "pretrain": "-pretrain",
    "midtrain-stage1": "-midtrain-stage1",
    "midtrain": "-base",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class StageArguments:
    stage: Literal["pretrain-stage1", "pretrain", "midtrain-stage1", "midtrain"] = option(
        "which stage this is; names the model's folder as the official repositories do", "pretrain-stage1"
    )
    model: str | None = option("folder or Hub id of the stage before; without it a new model is made")
    model_size: str | None = option(f"shape of a new model: {', '.join(MODEL_SIZES)}")
    model_config: dict = option("YAML only: fields of MobileLLMConfig, instead of model_size or beside it", dict)
    model_name: str | None = option("name of the released models; by default MobileLLM-R1-SIZE")
    attn_implementation: str | None = option("sdpa, flash_attention_2, ...; by default transformers' choice")
    tokenizer: str | None = option("folder or Hub id; by default that of the model")
    sources: list[dict] = option(
        "YAML only: what is read: {name: CORPUS}, {catalog: SOURCE} or {rows: FOLDER}, perhaps with a weight each",
        list,
    )
    weights: dict | str | None = option(
        "shares of the tokens: a mixture.yaml, or YAML only {catalog: [STAGE, PHASE]} or {source: share}"
    )
    seq_length: int = option("tokens of a packed row", 2048)
    shuffle_buffer: int = option("documents among which a stream chooses the next", 10_000)
    max_epochs: float = option("how often a source may be read", MAX_EPOCHS)
    on_max_epochs: Literal["warn", "limit"] = option("what happens to a source that was read so often", "warn")
    block_size: int = option("rows in which the mixture's shares are met", 64)
    probes: dict = option(
        "YAML only: capability -> list of sources whose NLL is watched, and influence measured", dict
    )
    rows_per_probe: int | None = option("a random choice of so many rows of each of a probe's sources", 256)
    monitor_every: int | None = option("steps between two evaluations of probes and RankMe; by default a twentieth")
    rank_me: bool = option("whether RankMe (equation 8) is among them", True)
    teacher: str | None = option("folder or Hub id of the model to distil from")
    teacher_dtype: Literal["bfloat16", "float32"] = option("that the teacher is loaded in", "bfloat16")
    teacher_cache: str | None = option("folder of cached teacher probabilities; written first if there is a teacher")
    teacher_top_k: int = option("probabilities a token in a cache that is written", 32)
    shard_teacher: bool = option("divide the teacher among the processes", False)
    temperature: float = option("of the distillation", 1.0)
    alpha: float = option("share of the KL divergence in the loss; the NLL has the rest", 1.0)
    vocabulary: Literal["same", "shared_prefix"] = option("shared_prefix if only their padding differs", "same")
    resample_every: int | None = option("steps between two rounds of influence resampling; none by default")
    resample_at_start: bool = option("a round before the first step, as the paper's phases begin", False)
    curvature: Literal["adam", "identity"] = option("H of equation (2) in resampling", "adam")
    reject: Literal["nonpositive", "none"] = option("samples that are dropped (equation 6)", "nonpositive")
    reject_rule: str = option("whose influence must be positive: mean, any, or a capability", "mean")
    sign_check: Literal["refuse", "warn", "off"] = option(
        "before samples are dropped for the first time, train on the top and on the bottom tenth of their scores; "
        "refuse to go on where the bottom teaches more, or only warn. Costs six trainings of a fiftieth of max_steps, "
        "4 to 20 steps each",
        "refuse",
    )
    sign_check_steps: int | None = option("of each of those trainings, instead")
    reweigh: bool = option("whether sources get new weights (equation 5)", True)
    candidates_per_source: int | None = option("rows of each source that a round scores", 256)
    influence_scores: Literal["separate", "fused"] = option("in passes of their own, or inside training", "separate")
    floor: float = option("share of a source whose influence is not positive", 0.0)
    min_positive: float = option("a smaller share of positive samples ends the stage", 0.02)
    min_spread: float | None = option("so does influence that has narrowed to this share of the first round's")
    delay_steps: int = option("steps from a round to the first row that it decides; covers what is fetched ahead", 16)
    allow_overlap: bool = option("train on rows that share documents with a probe", False)

    def check(self) -> None:
        """Raises a ValueError that names the field for what can be refused before anything is loaded."""
        if self.model is None and self.model_size is None and not self.model_config:
            raise ValueError("give model (to go on from), or model_size or model_config (to begin)")
        if self.model is not None and (self.model_size or self.model_config):
            raise ValueError("model is given, and so its shape: leave out model_size and model_config")
        if self.model_size is not None and self.model_size not in MODEL_SIZES:
            raise ValueError(f"model_size={self.model_size!r} must be one of {', '.join(MODEL_SIZES)}")
        if self.model is None and self.tokenizer is None:
            raise ValueError("a new model needs a tokenizer: a folder, or a Hub id such as meta-llama/Llama-3.2-1B")
        check_entries("sources", self.sources, weights=True)
        source_weights(self.sources, self.weights)
        if not isinstance(self.probes, dict):
            raise ValueError(f"probes is {self.probes!r}: write capability -> list of sources")
        for capability, entries in self.probes.items():
            check_entries(f"probes.{capability}", entries)
        self._check_numbers()
        if self.influence_scores == "fused" and (self.distils() or self.resample_every is None):
            raise ValueError(
                "influence_scores: fused scores are heard between rounds (resample_every) and of the model's own loss "
                "(no teacher): use separate"
            )
        if self.resamples() and not self.probes:
            raise ValueError("influence resampling (resample_at_start, resample_every) needs probes")
        if self.reject_rule not in ("mean", "any", *self.probes):
            raise ValueError(f"reject_rule={self.reject_rule!r} must be mean, any or one of {', '.join(self.probes)}")

    def _check_numbers(self) -> None:
        for name in ("seq_length", "block_size", "rows_per_probe", "monitor_every", "teacher_top_k", "resample_every",
                     "candidates_per_source", "delay_steps", "sign_check_steps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 <= self.alpha <= 1 or self.temperature <= 0 or not 0 <= self.floor < 1:
            raise ValueError(
                f"alpha={self.alpha} must be between 0 and 1, temperature={self.temperature} positive, "
                f"floor={self.floor} at least 0 and below 1"
            )

    def distils(self) -> bool:
        return self.teacher is not None or self.teacher_cache is not None

    def resamples(self) -> bool:
        return self.resample_at_start or self.resample_every is not None

    def released_name(self) -> str:
        """The name of the stage's model, as on the Hub: MobileLLM-R1-140M-pretrain-stage1."""
        if self.model_name is not None:
            return self.model_name + STAGES[self.stage]
        return f"MobileLLM-R1-{self.model_size or 'custom'}{STAGES[self.stage]}"


@dataclass
class StageTrainingArguments(TrainingArguments):
    """The Trainer's arguments with Table 4's optimizer: AdamW (0.9, 0.95, 1e-8), weight decay 0.1.

    Decay acts on matrices and the embedding and not on norms, as the Trainer groups parameters; the paper leaves open
    whether it decays the embedding.
    """

    output_dir: str = option("folder of the run; one of other settings is refused", "runs/stage")
    final_learning_rate: float = option("learning rate at the end, as a share of the peak", 0.1)
    adam_beta2: float = option("of AdamW", 0.95)
    weight_decay: float = option("of AdamW; not on norms", 0.1)
    save_total_limit: int | None = option("checkpoints that are kept", 2)
    logging_nan_inf_filter: bool = option("must stay False, so that a NaN is seen and stops the run", False)
    remove_unused_columns: bool = option("must stay False: rows come with their ids", False)
    train_sampling_strategy: str = option("must stay sequential: the mixture decides the order", "sequential")
    report_to: None | str | list[str] = option("trackers: wandb, tensorboard, trackio, ...", "none")
    dataloader_pin_memory: bool = option("of the DataLoader", torch.cuda.is_available)
    ddp_find_unused_parameters: bool | None = option("every parameter is used in every step", False)
    disable_tqdm: bool | None = option("the recipe has a display of its own", True)

    def __post_init__(self):
        if not 0 <= self.final_learning_rate < 1:
            raise ValueError(f"final_learning_rate={self.final_learning_rate} must be a share of the peak, below 1")
        if self.lr_scheduler_type not in ("linear", "polynomial") or self.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type!r}: the learning rate falls linearly, as in Table 4, to "
                "final_learning_rate of its peak; leave lr_scheduler_type and lr_scheduler_kwargs out"
            )
        self.lr_scheduler_type = "polynomial"  # of power one: linear, to an end that "linear" cannot have
        self.lr_scheduler_kwargs = {"lr_end": self.final_learning_rate * self.learning_rate, "power": 1.0}
        super().__post_init__()
        if self.max_steps <= 0:
            raise ValueError("max_steps must be given: a mixture has no epochs")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps})")

    def global_batch(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size
