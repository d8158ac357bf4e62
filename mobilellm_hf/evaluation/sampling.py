"""Samples n completions of each of many prompts; a prompt goes through the model once, and what has ended makes room.

    settings = SamplingSettings(temperature=0.6, top_p=0.95, max_new_tokens=30_000, eos_token_ids=(2,))
    asked = [(document, sample) for document in prompts for sample in range(64)]
    for completion in sample_completions(model, prompts, asked, settings):     # prompts: document -> token ids
        store(completion)                                                      # each as soon as it has ended

The keys and values of a prompt are kept once, see `prompt_cache`. A row whose completion has ended is given to the
next one asked for, so that one long completion does not hold up the others. Where memory runs out the younger half of
the rows is given up, and asked for again once there is room.

A completion is decided by (seed, document, sample) and the model: each one draws from random numbers of its own, and a
token is the inverse of the distribution function, in the order of ids, at the next of them. So it matters neither what
else is in the batch nor which completions an earlier run has left, but for rounding: products of matrices of other
shapes round differently, which changes a token only where the random number falls that close to a border between two.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import DynamicCache, PreTrainedModel

from mobilellm_hf.evaluation.prompt_cache import SharedPromptCache, check_sharable
from mobilellm_hf.training.monitors import evaluation_mode

ROWS_ON_CPU, ROWS_ON_ACCELERATOR = 32, 256
# The nucleus is looked for among so many of the likeliest tokens, and among all where they do not hold it.
CANDIDATES = 256
# Logits of so many rows are sorted or summed at a time: those of 64 rows and 128,256 tokens are 33 MB.
ROWS_DRAWN_TOGETHER = 16
# Rows are taken anew when a share of them is free: each time the prompts are stacked again.
LEAST_FREE = 1 / 8


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the smallest set of likeliest tokens is drawn from that holds this share, as `TopPLogitsWarper` has
            it.
        max_new_tokens: of a completion; the model's context may allow fewer.
        eos_token_ids: each of them ends a completion.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        if self.temperature < 0 or not np.isfinite(self.temperature):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0, and 1 at most")


@dataclass(frozen=True)
class Completion:
    """A completion that has ended.

    Attributes:
        token_ids: without the one that ended it.
        finished: the model ended it; otherwise it was cut off, at `max_new_tokens` or at the end of the context.
    """

    document: int
    sample: int
    token_ids: tuple[int, ...]
    finished: bool


class Row:
    """A completion in the making; `uniform` is where its next token is drawn."""

    def __init__(self, document: int, sample: int, limit: int, seed: int):
        self.document, self.sample, self.limit = document, sample, limit
        self.tokens: list[int] = []
        self._random = np.random.default_rng((seed, document, sample))
        self.uniform = self._random.random()

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.uniform = self._random.random()


def eos_token_ids(model: PreTrainedModel, *more: int | None) -> tuple[int, ...]:
    """What ends a text: the ids of the model's generation config, or else of its config, and these."""
    found = model.generation_config.eos_token_id
    found = getattr(model.config, "eos_token_id", None) if found is None else found
    listed = found if isinstance(found, list | tuple) else [found]
    return tuple(dict.fromkeys(token for token in (*listed, *more) if token is not None))


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens of a model's context, if its configuration knows them."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def room_for_completion(context: int | None, prompt_tokens: int, max_new_tokens: int) -> int:
    """New tokens that fit behind a prompt; 0 or less if it fills the context."""
    return max_new_tokens if context is None else min(max_new_tokens, context - prompt_tokens)


def default_batch_size(model: PreTrainedModel, tokens: int) -> int:
    """Completions at a time: many, since an accelerator says when its memory is full; on a CPU, where the system ends
    the process instead, 32, or as many as fit into half of the free memory at `tokens` tokens each."""
    if model.device.type != "cpu":
        return ROWS_ON_ACCELERATOR
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    return max(1, min(ROWS_ON_CPU, psutil.virtual_memory().available // 2 // row))


def sample_completions(
    model: PreTrainedModel,
    prompts: Mapping[int, Sequence[int]],
    asked: Iterable[tuple[int, int]],
    settings: SamplingSettings,
    batch_size: int | None = None,
) -> Iterator[Completion]:
    """Completions in the order in which they end.

    Args:
        prompts: document -> token ids.
        asked: (document, sample) of each completion. Put those of a document side by side: its prompt is kept while
            its samples are drawn.
        batch_size: the most completions at a time; fewer where memory runs out. By default `default_batch_size`.

    Raises:
        ValueError: before the first completion, if a prompt is empty or leaves no room in the model's context, the
            model's attention cannot share prompts, or `batch_size` is not 1 or more.
    """
    asked = list(asked)
    check_sharable(model)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    longest = 1
    for document in dict.fromkeys(document for document, _ in asked):
        count = len(prompts[document])
        room = room_for_completion(context_of(model), count, settings.max_new_tokens)
        if not count:
            raise ValueError(f"the prompt of document {document} is empty")
        if room < 1:
            raise ValueError(
                f"the prompt of document {document} has {count:,} tokens, and the model's context {count + room:,}: "
                "leave out what leaves no room for an answer"
            )
        longest = max(longest, count + room)
    rows = min(batch_size or default_batch_size(model, longest), max(1, len(asked)))
    sampler = _Sampler(model, prompts, asked, settings, rows)
    with evaluation_mode(model):
        while sampler.is_busy:
            yield from sampler.advance()


class _Sampler:
    """The rows of a batch and the completions that wait for one."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Mapping[int, Sequence[int]],
        asked: Sequence[tuple[int, int]],
        settings: SamplingSettings,
        capacity: int,
    ):
        self.model, self.prompts, self.settings, self.capacity = model, prompts, settings, capacity
        self.waiting = deque(asked)
        self.rows: list[Row] = []
        self.cache = SharedPromptCache()
        self.documents: list[int] = []  # of the cache's groups
        self.first_logits: list[torch.Tensor] = []  # (1, vocabulary) behind each group's prompt
        self.logits: torch.Tensor | None = None  # (rows, vocabulary), not yet drawn from

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.rows)

    def advance(self) -> list[Completion]:
        """One more token for every row; returns what has ended. Each part leaves all as it was if it fails."""
        try:
            if self.rows and self.logits is None:
                self.logits = self.cache.forward(self.model, [row.tokens[-1] for row in self.rows])
            self._fill()
            self._draw()
            return self._take_ended()
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or self.capacity == 1:
                raise
        # Here and not above, since the error holds on to what had been allocated.
        self._retreat()
        return []

    def _fill(self) -> None:
        """Gives free rows to those that wait."""
        free = self.capacity - len(self.rows)
        if not self.waiting or (self.rows and free < LEAST_FREE * self.capacity):
            return
        taken = list(itertools.islice(self.waiting, free))
        wanted = dict.fromkeys(document for document, _ in taken)
        used = set(self.cache.rows)
        keep = [group for group, document in enumerate(self.documents) if group in used or document in wanted]
        kept = [self.documents[group] for group in keep]
        new = [document for document in wanted if document not in kept]
        prompts, logits = zip(*map(self._read_prompt, new)) if new else ((), ())
        self.cache.regroup(keep, prompts)
        self.documents, self.first_logits = kept + new, [*(self.first_logits[group] for group in keep), *logits]
        groups = [self.documents.index(document) for document, _ in taken]
        given = [] if self.logits is None else [self.logits]
        given = torch.cat([*given, *(self.first_logits[group] for group in groups)])
        self.cache.add_rows(groups)
        # Nothing from here on can find the memory full.
        self.rows += map(self._row, taken)
        self.logits = given
        for _ in taken:
            self.waiting.popleft()

    def _row(self, asked: tuple[int, int]) -> Row:
        prompt = self.prompts[asked[0]]
        limit = room_for_completion(context_of(self.model), len(prompt), self.settings.max_new_tokens)
        return Row(*asked, limit, self.settings.seed)

    @torch.no_grad()
    def _read_prompt(self, document: int) -> tuple[DynamicCache, torch.Tensor]:
        # Without a config every layer keeps all tokens, also one that looks back a few only.
        input_ids, cache = torch.tensor([self.prompts[document]], device=self.model.device), DynamicCache()
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache, output.logits[:, -1]

    def _draw(self) -> None:
        uniforms = torch.tensor([row.uniform for row in self.rows], dtype=torch.double, device=self.logits.device)
        drawn = draw_tokens(self.logits, uniforms, self.settings.temperature, self.settings.top_p).tolist()
        for row, token in zip(self.rows, drawn, strict=True):
            row.add(token)
        self.logits = None

    def _take_ended(self) -> list[Completion]:
        ended = []
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            finished = row.tokens[-1] in self.settings.eos_token_ids
            if finished or len(row.tokens) == row.limit:
                token_ids = tuple(row.tokens[:-1] if finished else row.tokens)
                ended.append(Completion(row.document, row.sample, token_ids, finished))
                self._remove(index)
        return ended

    def _remove(self, index: int) -> None:
        """The last row takes the place of this one, here and in the cache."""
        self.rows[index] = self.rows[-1]
        self.rows.pop()
        self.cache.remove(index)
        if self.logits is not None:
            self.logits[index] = self.logits[-1]
            self.logits = self.logits[:-1]

    def _retreat(self) -> None:
        """Half the batch from here on: the rows with the fewest tokens wait for their turn again."""
        self.capacity //= 2
        while len(self.rows) > self.capacity:
            index = min(range(len(self.rows)), key=lambda index: len(self.rows[index].tokens))
            self.waiting.appendleft((self.rows[index].document, self.rows[index].sample))
            self._remove(index)
        self.cache.trim()
        clear_device_cache(garbage_collection=True)


@torch.no_grad()
def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """(rows,) ids drawn from logits (rows, vocabulary) at the points `uniforms` (rows,) of the distribution function.

    The distribution is that of transformers' TemperatureLogitsWarper and TopPLogitsWarper. Ids are in ascending order,
    so that it does not matter which of two tokens of nearly the same probability rounding puts first.
    """
    if temperature == 0:
        return logits.argmax(-1)
    parts = zip(logits.split(ROWS_DRAWN_TOGETHER), uniforms.split(ROWS_DRAWN_TOGETHER))
    return torch.cat([_draw_part(part.float() / temperature, points, top_p) for part, points in parts])


def _draw_part(scores: torch.Tensor, uniforms: torch.Tensor, top_p: float) -> torch.Tensor:
    if top_p == 1:
        return _at(scores.softmax(-1), uniforms)
    total = scores.logsumexp(-1, keepdim=True)
    likeliest, ids = scores.topk(min(CANDIDATES, scores.shape[1]))
    shares = (likeliest - total).exp()
    if bool((shares.sum(-1) < top_p).any()):  # of a flat distribution; sorting takes many times as long
        likeliest, ids = scores.sort(descending=True)
        shares = (likeliest - total).exp()
    likelier = shares.cumsum(-1) - shares
    shares = shares.masked_fill(likelier >= top_p, 0.0)
    ids, order = ids.sort(-1)
    return ids.gather(-1, _at(shares.gather(-1, order), uniforms)[:, None])[:, 0]


def _at(shares: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(rows,) the first place at which the sum of shares (rows, N) exceeds that part of the whole."""
    sums = shares.cumsum(-1, dtype=torch.double)
    return torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0].clamp(max=sums.shape[1] - 1)
