"""Runs a .pte in Python, with ExecuTorch's runtime and the operators that a phone has.

    model = OnDeviceModel("runs/device")
    for text in model.stream([{"role": "user", "content": "What is 2 + 2?"}], max_new_tokens=100):
        print(text, end="", flush=True)
    print(model.generate("Return the derivative of"))

A prompt is taken in pieces of the program's bound. What the cache still holds of an earlier prompt is not computed
again, so that the turns of a conversation cost their own tokens only.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mobilellm_hf.export.program import CONTEXT, METHOD, PIECE, PROGRAM, VOCABULARY
from mobilellm_hf.export.requirements import need_executorch
from mobilellm_hf.export.runtime import load_module

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        text: without the prompt and special tokens.
        token_ids: with the one that ended it, if one did.
        ended_by: `eos`, `max_new_tokens` or `context`: the cache is full.
        prompt_tokens: of the prompt; `computed` of them were not in the cache yet.
        prefill_seconds, decode_seconds: until the first token is known, and from there on.
    """

    text: str
    token_ids: tuple[int, ...]
    ended_by: Literal["eos", "max_new_tokens", "context"]
    prompt_tokens: int
    computed: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding; the first token is the prefill's."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        return self.text


class OnDeviceModel:
    """A .pte and its tokenizer.

    Args:
        path: a .pte, or a folder with one.
        tokenizer: by default the one beside the .pte; or the folder of one.
        threads: of ExecuTorch's pool, which all models of the process share; None leaves it. Attention over an fp32
            cache multiplies by PyTorch's BLAS, which has threads of OpenMP's besides, in each of the pool's:
            OMP_NUM_THREADS=1 leaves the cores to the pool. A bfloat16 cache needs no BLAS.

    Attributes:
        context: positions of the KV cache.
        vocabulary: how many tokens there are; None if the program does not say.
        prefill: tokens of one call at most.
        eos_token_ids: what ends an answer.

    Raises:
        ValueError: it is no .pte of a language model, is damaged, from another version of ExecuTorch, or has no
            tokenizer.
        ImportError: ExecuTorch is missing; the message says how to install it.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        threads: int | None = None,
    ):
        need_executorch()
        self.path = _find_program(Path(path))
        self._module = load_module(self.path, threads)
        methods = self._module.method_names()
        self.prefill = self._module.run_method(PIECE)[0]
        self.context = self._module.run_method(CONTEXT)[0] if CONTEXT in methods else self.prefill
        self.eos_token_ids = frozenset(self._module.run_method("get_eos_ids") if "get_eos_ids" in methods else ())
        self.vocabulary = self._module.run_method(VOCABULARY)[0] if VOCABULARY in methods else None
        self.tokenizer = tokenizer
        if tokenizer is None or isinstance(tokenizer, str | Path):
            self.tokenizer = _load_tokenizer(tokenizer or self.path.parent)
        self._cached: list[int] = []  # tokens whose keys and values the cache holds

    def logits(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """Logits (vocabulary,) after tokens that stand at position `start`; those before them are in the cache.

        Raises:
            ValueError: there are no tokens, one is outside the vocabulary, or the cache has no room for them.
        """
        if not len(token_ids):
            raise ValueError("there are no tokens to compute logits of")
        self._check_vocabulary(token_ids)
        if start < 0 or start > len(self._cached) or start + len(token_ids) > self.context:
            raise ValueError(
                f"positions {start} to {start + len(token_ids)} must begin within the {len(self._cached)} that are "
                f"cached and end within the context of {self.context}"
            )
        del self._cached[start:]
        for first in range(0, len(token_ids), self.prefill):
            piece = torch.tensor([list(token_ids[first : first + self.prefill])])
            positions = torch.arange(start + first, start + first + piece.shape[1])
            output = self._module.run_method(METHOD, (piece, positions))[0]
            self._cached += piece[0].tolist()
        return output[0, -1]

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        """The runtime would read whatever lies beside the embedding."""
        size = self.vocabulary
        if size is not None and (min(token_ids) < 0 or max(token_ids) >= size):
            wrong = next(token for token in token_ids if not 0 <= token < size)
            raise ValueError(f"token {wrong:,} is outside the vocabulary of {size:,}: is the tokenizer this model's?")

    def logits_after(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits (vocabulary,) after a text from its first token on; what the cache holds of it is not computed again.

        Raises:
            ValueError: there are no tokens, or more than the context holds.
        """
        # The last token is computed in any case: its logits are what is asked for.
        known = self.cached_of(token_ids)
        return self.logits(token_ids[known:], known)

    def cached_of(self, token_ids: Sequence[int]) -> int:
        """How many of a text's first tokens need not be computed; never the last."""
        return _shared_length(self._cached, token_ids[:-1])

    def forget(self) -> None:
        """The next text is computed from its first token on, as if nothing had been read before it."""
        self._cached.clear()

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a text, of messages in the chat template, or as they are.

        Raises:
            ValueError: messages, and the tokenizer has no chat template; or it is none of these.
        """
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if len(prompt) and isinstance(prompt[0], Mapping):
            if self.tokenizer.chat_template is None:
                raise ValueError(f"the tokenizer of {self.path} has no chat template: give the prompt as a text")
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise ValueError(
                "a prompt is a text, a list of token ids, or a list of messages of role and content"
            ) from error

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_at_eos: bool = True,
    ) -> Generator[str, None, Generation]:
        """Yields text as soon as it is whole characters; returns the `Generation`.

        Streams of one model may take turns. They share its cache: each computes again what another has overwritten.

        Args:
            prompt: a text, token ids, or messages of `role` and `content`.
            max_new_tokens: None: until the answer or the context ends.
            temperature: 0 takes the likeliest token.
            top_p: the likeliest tokens whose probabilities sum to it are drawn from.

        Raises:
            ValueError: the prompt is empty or fills the context; an argument is out of range.
        """
        tokens = self.encode(prompt)
        _check_sampling(max_new_tokens, temperature, top_p)
        if not tokens or len(tokens) >= self.context:
            raise ValueError(
                f"the prompt has {len(tokens):,} tokens and must have 1 to {self.context - 1:,}, so that one more "
                f"fits the context of {self.path}"
            )
        return self._stream(tokens, max_new_tokens, _Sampler(temperature, top_p, seed), stop_at_eos)

    def generate(self, prompt: Prompt, max_new_tokens: int | None = None, **options) -> Generation:
        """As `stream`, all at once."""
        stream = self.stream(prompt, max_new_tokens, **options)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value

    def _stream(
        self, prompt: list[int], limit: int | None, sample: _Sampler, stop_at_eos: bool
    ) -> Generator[str, None, Generation]:
        began = time.perf_counter()
        known = self.cached_of(prompt)
        logits = self.logits(prompt[known:], known)
        decoder, texts, made = DecodeStream(skip_special_tokens=True), [], []
        prefilled = time.perf_counter()
        while True:
            made.append(sample(logits))
            if text := decoder.step(self.tokenizer.backend_tokenizer, made[-1]):
                texts.append(text)
                yield text
            ended_by = self._end(made, len(prompt), limit, stop_at_eos)
            if ended_by:
                break
            # One token, unless another text has been in the cache since.
            logits = self.logits_after([*prompt, *made])
        done = time.perf_counter()
        return Generation(
            "".join(texts),
            tuple(made),
            ended_by,
            len(prompt),
            len(prompt) - known,
            prefilled - began,
            done - prefilled,
        )

    def _end(self, made: list[int], prompt: int, limit: int | None, stop_at_eos: bool) -> str | None:
        if stop_at_eos and made[-1] in self.eos_token_ids:
            return "eos"
        if limit is not None and len(made) >= limit:
            return "max_new_tokens"
        return "context" if prompt + len(made) >= self.context else None


class _Sampler:
    def __init__(self, temperature: float, top_p: float, seed: int | None):
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)
        warpers = [TemperatureLogitsWarper(temperature)] if temperature else []
        self._warpers = LogitsProcessorList([*warpers, *([TopPLogitsWarper(top_p)] if top_p < 1 else [])])
        self._greedy = not temperature

    def __call__(self, logits: torch.Tensor) -> int:
        if self._greedy:
            return int(logits.argmax())
        scores = self._warpers(None, logits[None].float())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))


def _check_sampling(max_new_tokens: int | None, temperature: float, top_p: float) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be over 0 and at most 1")


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:  # at once, as it is at every token that is decoded
        return length
    return next((index for index in range(length) if first[index] != second[index]), length)


def _find_program(path: Path) -> Path:
    if path.is_dir():
        path = path / PROGRAM
    if not path.is_file():
        raise ValueError(f"{path} does not exist: recipes/export.py writes one")
    return path


def _load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no tokenizer that loads: give one (tokenizer=)") from error
