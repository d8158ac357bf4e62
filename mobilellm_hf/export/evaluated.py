"""An exported program as the suites want it: what quantization and a shorter cache cost in accuracy is a number.

    run_evaluation(args, console, load=load_on_device, find_context=context_on_device)
    python recipes/evaluate.py --model runs/device --suite base         # the same: the folder has a model.pte

A program gives the logits of the last token only, and one text at a time: a text is rated token by token, which a
model of transformers does at once. What two texts begin with is computed once, so the choices of a question, and the
samples of a prompt, cost their own tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from transformers import PreTrainedTokenizerBase

from mobilellm_hf.evaluation.models import Evaluated
from mobilellm_hf.evaluation.sampling import Completion, Row, SamplingSettings, draw_tokens, room_for_completion
from mobilellm_hf.export.on_device import OnDeviceModel
from mobilellm_hf.export.program import REPORT

DEFAULT_NEW_TOKENS = 256  # lm-eval's


def context_on_device(name: str, revision: str | None = None) -> int:
    """Positions of the KV cache of a program."""
    return OnDeviceModel(name).context


def load_on_device(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    batch_size: int | None = None,
) -> Evaluated:
    """Loads a program as `load_model` loads a model.

    Args:
        name: folder that recipes/export.py has written.
        dtype, attn_implementation, revision: decided when it was exported, so they can but be left out.
        batch_size: one, whatever is said.

    Raises:
        ValueError: it is no such folder, or something is asked for that the program has decided.
    """
    decided = {"dtype": (dtype, "auto"), "attn_implementation": (attn_implementation, None)}
    decided["model_revision"] = (revision, None)
    for field, (given, free) in decided.items():
        if given != free:
            raise ValueError(f"{field}={given!r}: {name} is an exported program, which has decided that: leave it out")
    parameters, kept = _reported(name)
    model = OnDeviceModel(name, tokenizer)
    sampler = OnDeviceSampler(model)
    lm = OnDeviceLM(model)
    return Evaluated(name, sampler.identity, parameters, model.context, lm, sampler, tokenizer, {"exported": kept})


def _reported(name: str) -> tuple[int, dict[str, Any]]:
    """Of an exported folder: how many parameters, and what tells its program from others of the same weights."""
    try:
        report = json.loads(Path(name, REPORT).read_text())
        return report["parameters"], {key: report[key] for key in ("model", "quantization", "kv_cache", "context")}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} has no {REPORT} that tells what was exported ({error}): export it again") from error


class OnDeviceLM(TemplateLM):
    """Log-likelihoods and greedy completions of an `OnDeviceModel`, encoded and cut as lm-eval's `hf` does."""

    def __init__(self, model: OnDeviceModel):
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, model.tokenizer, model.context

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # as the tokenizer does by itself, but for a text that has its first token
            prefix = self.tokenizer.decode(self.prefix_token_id)
            options = {"add_special_tokens": False} if has_bos_prefix(string, prefix) else {}
        else:
            options = {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        # Texts that begin alike one after the other, so that the cache holds what they share.
        for place in sorted(range(len(requests)), key=lambda place: requests[place][1] + requests[place][2]):
            texts, context, continuation = requests[place]
            answers[place] = self._rate((context + continuation)[-(self.max_length + 1) :], len(continuation))
            self.cache_hook.add_partial("loglikelihood", texts, answers[place])
        return [answers[place] for place in range(len(requests))]

    def _rate(self, tokens: list[int], count: int) -> tuple[float, bool]:
        """The sum of the last `count` tokens' log-probabilities, and whether each was the likeliest."""
        total, greedy = 0.0, True
        for end in range(max(1, len(tokens) - count), len(tokens)):
            logits = self.model.logits_after(tokens[:end])
            total += logits.log_softmax(-1)[tokens[end]].item()
            greedy = greedy and int(logits.argmax()) == tokens[end]
        return total, greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task of the suites asks for it")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, arguments: Mapping[str, Any]) -> str:
        options = normalize_gen_kwargs(dict(arguments), DEFAULT_NEW_TOKENS)
        if options["do_sample"]:
            raise ValueError("a program on a device answers lm-eval's tasks greedily; this one asks for samples")
        ends = self.tokenizer.decode(self.eot_token_id)
        stops, limit = handle_stop_sequences(options["until"], ends), options["max_gen_toks"]
        prompt, made, text = self.tok_encode(context)[-(self.max_length - limit) :], [], ""
        while len(made) < limit and not any(stop in text for stop in stops if stop):
            made.append(int(self.model.logits_after(prompt + made).argmax()))
            if made[-1] in self.model.eos_token_ids:
                break
            text = self.tokenizer.decode(made, skip_special_tokens=True)
        text = postprocess_generated_text(text, stops, None)
        self.cache_hook.add_partial("generate_until", (context, arguments), text)
        return text


class OnDeviceSampler:
    """Completions one after the other, decided by (seed, document, sample) as `sample_completions` has it."""

    def __init__(self, model: OnDeviceModel):
        self.model, self.context = model, model.context
        self.eos_token_ids = tuple(sorted(model.eos_token_ids))
        self.identity = hashlib.sha256(model.path.read_bytes()).hexdigest()

    def sample(
        self,
        prompts: Mapping[int, Sequence[int]],
        asked: Iterable[tuple[int, int]],
        settings: SamplingSettings,
        batch_size: int | None = None,
    ) -> Iterator[Completion]:
        for document, sample in asked:
            prompt = list(prompts[document])
            room = room_for_completion(self.context, len(prompt), settings.max_new_tokens)
            if not prompt or room < 1:
                raise ValueError(
                    f"the prompt of document {document} has {len(prompt):,} tokens, and the program's context "
                    f"{self.context:,}: leave out what leaves no room for an answer"
                )
            yield self._complete(prompt, Row(document, sample, room, settings.seed), settings)

    def _complete(self, prompt: list[int], row: Row, settings: SamplingSettings) -> Completion:
        finished = False
        while not finished and len(row.tokens) < row.limit:
            logits, point = self.model.logits_after(prompt + row.tokens), torch.tensor([row.uniform]).double()
            row.add(int(draw_tokens(logits[None], point, settings.temperature, settings.top_p)))
            finished = row.tokens[-1] in settings.eos_token_ids
        return Completion(row.document, row.sample, tuple(row.tokens[:-1] if finished else row.tokens), finished)
