"""What completions are drawn from: a model of transformers, or whatever else can say which token comes next.

    run_sampled_task(task, ModelSampler(model), tokenizer, folder, stage, documents=rows)

An exported program has a sampler of its own, see `mobilellm_hf.export.evaluated`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from mobilellm_hf.curation.scoring import model_identity
from mobilellm_hf.evaluation.sampling import (
    Completion,
    SamplingSettings,
    context_of,
    eos_token_ids,
    sample_completions,
)


class CompletionSampler(Protocol):
    """Draws completions.

    Attributes:
        identity: changes with the weights.
        context: tokens of a prompt and its completion together; None where nothing limits them.
        eos_token_ids: each of them ends a completion.
    """

    identity: str
    context: int | None
    eos_token_ids: tuple[int, ...]

    def sample(
        self,
        prompts: Mapping[int, Sequence[int]],
        asked: Iterable[tuple[int, int]],
        settings: SamplingSettings,
        batch_size: int | None = None,
    ) -> Iterator[Completion]:
        """As `sample_completions`, which also says how (seed, document, sample) decide a completion."""


class ModelSampler:
    """A causal LM of transformers."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.identity = model_identity(model)
        self.context, self.eos_token_ids = context_of(model), eos_token_ids(model)

    def sample(
        self,
        prompts: Mapping[int, Sequence[int]],
        asked: Iterable[tuple[int, int]],
        settings: SamplingSettings,
        batch_size: int | None = None,
    ) -> Iterator[Completion]:
        return sample_completions(self.model, prompts, asked, settings, batch_size)
