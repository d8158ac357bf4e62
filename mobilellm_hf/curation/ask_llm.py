"""Ask-LLM (2402.09668): a causal LM is asked whether a document belongs in the set; P("1") is the document's score.

    judge = Judge("meta-llama/Llama-3.2-3B-Instruct")
    best = AskLLM(judge, "general", top=0.1)(documents)
    best = AskLLM(judge, {"finemath": "math", "wiki": "knowledge"}, top=0.1)(best)      # a prompt a source

The score is the probability of "1" among the two answers "1" and "0", from one forward pass a document: no text is
generated. What comes before the document in the prompt is the same for all, so its keys and values are computed once;
documents of like length share a batch; logits are taken of the last position alone. A prompt is a text file with
`{document}` in it; those in `prompts/` can be replaced by a path to your own. The paper does not publish its prompts.
"""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mobilellm_hf.curation.scoring import (
    OnDocuments,
    key_of,
    length_batches,
    load_named,
    model_identity,
    sources_of,
)
from mobilellm_hf.curation.stages import CurationStage, StageInput, Verdict, top_of_each_source

logger = logging.getLogger(__name__)

PLACEHOLDER = "{document}"
YES, NO = "1", "0"
# Longer documents than this many characters a token are cut before they are tokenized: a file of a gigabyte is not
# read to its end for the few thousand tokens that the judge sees.
CHARACTERS_PER_TOKEN = 32
# Chat templates that tell the day read this one: scores do not depend on when they were taken.
LEAST_ANSWERED = 0.1
DATE = "01 Jan 2025"


class JudgeError(ValueError):
    """A judge or a prompt that cannot give the score."""


def load_prompt(name: str | Path) -> str:
    """The text of a prompt: one of the package's (general, code, math, knowledge, combined) or a file of your own.

    Raises:
        JudgeError: there is no such prompt or file, or it does not have `{document}` exactly once.
    """
    path = Path(name)
    if not path.suffix and len(path.parts) == 1:
        folder = resources.files("mobilellm_hf.curation") / "prompts"
        names = sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
        if str(name) not in names:
            raise JudgeError(f"there is no prompt {str(name)!r}: there are {', '.join(names)}, or write a path (.txt)")
        text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JudgeError(f"the prompt {path} cannot be read: {error}") from error
    if text.count(PLACEHOLDER) != 1:
        raise JudgeError(f"the prompt {name} must contain {PLACEHOLDER} once, not {text.count(PLACEHOLDER)} times")
    return text


@dataclass
class Prompt:
    """A prompt as a judge reads it: token ids around the document, and those of the two answers."""

    before: list[int]
    after: list[int]
    yes: int
    no: int
    cache: DynamicCache | None = None


class Judge:
    """A causal LM that answers "1" or "0". It is loaded when it is first asked.

    Args:
        model: Hub id or folder, or a loaded model.
        tokenizer: by default that of `model`.
        max_length: tokens of prompt and document; by default the model's context. Longer documents are cut at their
            end, and counted.
        batch_tokens: of a batch, prompt and padding included; by default what the device takes, see `length_batches`.
        chat: whether the prompt is a user's turn in the tokenizer's chat template; by default if it has one.
        reuse_prefix: whether keys and values of what precedes the document are computed once. Models without a cache
            of keys and values, or with one that slides, read it with every document.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        max_length: int | None = None,
        batch_tokens: int | None = None,
        chat: bool | None = None,
        reuse_prefix: bool = True,
    ):
        self._given = (model, tokenizer)
        loaded = isinstance(model, PreTrainedModel)
        self.name = model.config.name_or_path or type(model).__name__ if loaded else str(model)
        self.revision, self.dtype, self.max_length = revision, dtype, max_length
        self.batch_tokens, self.chat, self.reuse_prefix = batch_tokens, chat, reuse_prefix
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._prompts: dict[str, Prompt] = {}

    def settings(self) -> dict[str, Any]:
        """What decides its scores."""
        options = {"dtype": str(self.dtype), "max_length": self.max_length, "chat": self.chat}
        model, tokenizer = self._given
        if tokenizer is not None:
            options["tokenizer"] = key_of(tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
        return {"judge": model_identity(model, self.revision), **options}

    def check(self, prompts: Sequence[str]) -> None:
        """Loads no weights. Raises what `score` would about the tokenizer and these prompts."""
        for prompt in prompts:
            self._room(self.prompt(prompt))

    def release(self) -> None:
        """Forgets the model, unless it was given loaded."""
        self._model = None
        for prompt in self._prompts.values():
            prompt.cache = None

    def score(
        self, texts: Sequence[str], prompt: str, on_documents: OnDocuments | None = None
    ) -> dict[str, np.ndarray]:
        """What the judge says of N texts, as columns (N,).

        `score` float32, P("1") among the two answers; `answered` float32, the probability that it gives one of them at
        all; `tokens` int32 read of the document; `truncated` bool.

        Args:
            prompt: the text of a prompt, see `load_prompt`.

        Raises:
            JudgeError: "1" or "0" are not one token after the prompt, the prompt leaves no room for a document, or
                the model's logits are not finite for it.
        """
        parts = self.prompt(prompt)
        ids, truncated = self.encode(texts, parts)
        scores, answered = np.empty(len(texts), np.float32), np.empty(len(texts), np.float32)
        # The prefix counts, too: its keys and values are repeated for every row.
        around = len(parts.before) + len(parts.after)
        for batch in length_batches([around + len(row) for row in ids], self.batch_tokens):
            logits = self._last_logits(parts, [ids[index] + parts.after for index in batch])
            logits = logits.float()
            answers = logits[:, [parts.yes, parts.no]]
            answered[batch] = (answers.logsumexp(-1) - logits.logsumexp(-1)).exp().cpu().numpy()
            if not answers.isfinite().all():
                raise JudgeError(f"the logits of {self.name} are not finite in {self.dtype}: load it in float32")
            scores[batch] = (answers[:, 0] - answers[:, 1]).sigmoid().cpu().numpy()
            if on_documents is not None:
                on_documents(len(batch))
        tokens = np.array([len(row) for row in ids], np.int32)
        return {"score": scores, "answered": answered, "tokens": tokens, "truncated": truncated}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            model, tokenizer = self._given
            self._tokenizer = tokenizer or load_named(AutoTokenizer, "judge", self.name, self.revision)
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            model, _ = self._given
            if not isinstance(model, PreTrainedModel):
                model = AutoModelForCausalLM.from_pretrained(self.name, revision=self.revision, dtype=self.dtype)
            self._model = model.to(PartialState().device).eval()
        return self._model

    def prompt(self, text: str) -> Prompt:
        """The parts of a prompt, checked."""
        if text not in self._prompts:
            before, after = self._chat_parts(text) if self._has_chat() else text.split(PLACEHOLDER)
            # A chat template writes the start token itself.
            start = self.tokenizer(before, add_special_tokens=not self._has_chat())["input_ids"]
            if (eos := self.tokenizer.eos_token_id) is not None and start[-1:] == [eos]:
                start = start[:-1]
            end = self._ids(after)
            self._prompts[text] = Prompt(start, end, *(self._answer(after, end, label) for label in (YES, NO)))
        return self._prompts[text]

    def _has_chat(self) -> bool:
        if self.chat and self.tokenizer.chat_template is None:
            raise JudgeError(f"the tokenizer of {self.name} has no chat template: chat=False")
        return self.tokenizer.chat_template is not None if self.chat is None else self.chat

    def _chat_parts(self, text: str) -> list[str]:
        turn = [{"role": "user", "content": text}]
        options = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
        parts = self.tokenizer.apply_chat_template(turn, **options).split(PLACEHOLDER)
        if len(parts) != 2:
            raise JudgeError(f"the chat template of {self.name} writes a turn {len(parts) - 1} times: chat=False")
        return parts

    def _answer(self, after: str, after_ids: list[int], label: str) -> int:
        """The one token that the answer is, where the prompt ends."""
        ids = self._ids(after + label)
        if ids[:-1] != after_ids or len(ids) != len(after_ids) + 1:
            found = self.tokenizer.convert_ids_to_tokens(ids[-3:])
            raise JudgeError(
                f"the answer {label!r} is not one token of {self.name} where the prompt ends (... {after[-20:]!r}): "
                f"it is read as {found}. End the prompt in a line break, or take another judge"
            )
        return ids[-1]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _config(self) -> PreTrainedConfig:
        model = self._given[0]
        return model.config if isinstance(model, PreTrainedModel) else self._loaded_config

    @cached_property
    def _loaded_config(self) -> PreTrainedConfig:
        return load_named(AutoConfig, "judge", self.name, self.revision)

    def _room(self, prompt: Prompt) -> int:
        """Tokens that the context leaves for a document."""
        context = getattr(self._config().get_text_config(), "max_position_embeddings", None)
        limit = min(value for value in (context, self.max_length, 2**31) if value is not None)
        if (room := limit - len(prompt.before) - len(prompt.after)) < 1:
            taken = len(prompt.before) + len(prompt.after)
            raise JudgeError(
                f"the prompt alone has {taken} tokens, and {self.name} reads {limit}: shorten it, or raise max_length"
            )
        return room

    def encode(self, texts: Sequence[str], prompt: Prompt) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of each text, as many as the prompt leaves room for, and (N,) bool, whether something was cut."""
        room = self._room(prompt)
        cut = [text[: room * CHARACTERS_PER_TOKEN] for text in texts]
        # What looks like a special token in a document is text: it cannot end the user's turn.
        ids = self.tokenizer(cut, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        long = [len(row) > room or len(part) < len(text) for row, part, text in zip(ids, cut, texts, strict=True)]
        return [row[:room] for row in ids], np.array(long, bool)

    @torch.inference_mode()
    def _last_logits(self, prompt: Prompt, rows: list[list[int]]) -> torch.Tensor:
        """(rows, vocabulary) of the position after each row, which is padded on its left."""
        cache = self._cache_of(prompt)
        shared = len(prompt.before) if cache is not None else 0
        if not shared:
            rows = [prompt.before + row for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        places = torch.arange(longest) - (longest - lengths)[:, None]
        inputs = {"input_ids": ids, "position_ids": places.clamp(min=0) + shared}
        if int(lengths.min()) < longest:
            inputs["attention_mask"] = torch.cat([torch.ones(len(rows), shared), places >= 0], 1).long()
        inputs = {name: values.to(self.model.device) for name, values in inputs.items()}
        if cache is not None:
            inputs["past_key_values"] = copy.deepcopy(cache)
            inputs["past_key_values"].batch_repeat_interleave(len(rows))
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs, use_cache=cache is not None).logits[:, -1]

    def _cache_of(self, prompt: Prompt) -> DynamicCache | None:
        """Keys and values of what precedes every document; None for a model that keeps none."""
        if prompt.cache is None and self.reuse_prefix and prompt.before and prompt.after:
            ids = torch.tensor([prompt.before], device=self.model.device)
            cache = getattr(self.model(input_ids=ids, use_cache=True), "past_key_values", None)
            # A sliding window would count the padding between the prefix and a short document.
            self.reuse_prefix = isinstance(cache, DynamicCache) and not any(cache.is_sliding)
            prompt.cache = cache if self.reuse_prefix else None
        return prompt.cache


class AskLLM(CurationStage):
    """Keeps the documents of every source that a judge finds best.

    Args:
        prompt: a name or path for `load_prompt`, or source -> one.
        top: the share of each source that stays (the paper: 10%).
        name: of the step.

    Raises:
        JudgeError: a prompt cannot be read.
        ValueError: `top` is no share.
    """

    def __init__(
        self,
        judge: Judge,
        prompt: str | Path | Mapping[str, str | Path] = "general",
        *,
        top: float = 0.1,
        name: str = "ask-llm",
        per_shard: int = 1_024,
    ):
        if not 0 < top <= 1:
            raise ValueError(f"{name}: top must be a share above 0 and up to 1, not {top}")
        self.judge, self.top, self.name, self.per_shard = judge, top, name, per_shard
        by_source = prompt if isinstance(prompt, Mapping) else None
        self._by_source = None if by_source is None else {s: load_prompt(p) for s, p in by_source.items()}
        self._for_all = load_prompt(prompt) if by_source is None else None

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **self._scoring_settings(), "top": self.top}

    def _scoring_settings(self) -> dict[str, Any]:
        return {**self.judge.settings(), "prompts": self._for_all if self._by_source is None else self._by_source}

    def check(self) -> None:
        """Raises a JudgeError if the judge's tokenizer cannot answer the prompts; no weights are loaded."""
        self.judge.check([self._for_all] if self._by_source is None else list(self._by_source.values()))

    def release(self) -> None:
        self.judge.release()

    def score(
        self, texts: Sequence[str], sources: Sequence[str], on_documents: OnDocuments | None = None
    ) -> dict[str, np.ndarray]:
        """As `Judge.score`, each text with the prompt of its source."""
        if self._by_source is None:
            return self.judge.score(texts, self._for_all, on_documents)
        out = {
            "score": np.empty(len(texts), np.float32),
            "answered": np.empty(len(texts), np.float32),
            "tokens": np.empty(len(texts), np.int32),
            "truncated": np.empty(len(texts), bool),
        }
        for prompt in dict.fromkeys(self._by_source[source] for source in sources):
            rows = [row for row, source in enumerate(sources) if self._by_source[source] == prompt]
            for name, values in self.judge.score([texts[row] for row in rows], prompt, on_documents).items():
                out[name][rows] = values
        return out

    def decide(self, given: StageInput) -> Verdict:
        sources, names = sources_of(given.documents)
        if self._by_source is not None and (unknown := set(names) - set(self._by_source)):
            raise ValueError(f"{self.name}: the source {min(unknown)!r} has no prompt; give one of each source")
        scores = given.scores_of(self, self._scoring_settings(), self.per_shard)
        values = scores.column("score")
        kept = top_of_each_source(values, sources, self.top)
        columns = {name: scores.column(name) for name in ("score", "answered", "tokens", "truncated")}
        if (typical := float(np.median(columns["answered"]))) < LEAST_ANSWERED:
            logger.warning(
                "%s: the judge gives its answers, 1 or 0, a probability of %.2g together: it was going to say "
                "something else. Check chat, the prompt, and whether it is a model that follows instructions.",
                self.name, typical,
            )  # fmt: skip
        return Verdict((~kept).astype(np.int8), (f"not among the best {self.top:.0%} of its source",), columns)
