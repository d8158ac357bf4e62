"""A small judge learns which domain a document is of and whether it is whole, also of those it never saw."""

import random

import numpy as np
import pytest
import torch
from curation_cases import WORDS
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.curation.ask_llm import Judge, JudgeError
from mobilellm_hf.curation.small_judge import (
    PROMPTS,
    _answers,
    damage,
    interleave,
    repeat_lines,
    shuffle_words,
    train_judge,
)
from mobilellm_hf.data.tokenization import train_tokenizer

PAIR = {name: PROMPTS[name] for name in ("general", "code", "math")}


def ordered(source: str, start: int, width: int = 4) -> str:
    """Lines of words in an order that can be learnt."""
    words = WORDS[source]
    lines = [[words[(start + place) % len(words)] for place in range(line, line + width)] for line in range(0, 20, 4)]
    return "\n".join(map(" ".join, lines))


def corpus(starts, widths=(4,)) -> Dataset:
    places = [(source, start, width) for source in ("code", "math") for start in starts for width in widths]
    return Dataset.from_list([{"text": ordered(*place), "source": place[0], "domain": place[0]} for place in places])


def small(kind=MobileLLMForCausalLM):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.12,
    )  # fmt: skip
    if kind is LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None))
    return MobileLLMForCausalLM(MobileLLMConfig(**shape))


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(corpus(range(13))["text"][:], 400, show_progress=False)


def test_held_out_documents_are_judged_well(words):
    train, held_out = corpus(range(14), (3, 5)), corpus(range(14), (4,))
    losses, options = [], dict(steps=250, batch_size=16, learning_rate=4e-3)
    judge = train_judge(small(), words, train, PAIR, **options, on_step=losses.append)
    assert len(losses) == 250 and np.mean(losses[-20:]) < 0.2 < np.mean(losses[20:40])
    texts, chance = held_out["text"][:], random.Random(9)
    for domain in ("code", "math"):
        scores = judge.score(texts, PAIR[domain])["score"]
        assert ((scores > 0.5) == (np.array(held_out["domain"][:]) == domain)).mean() > 0.9
    damaged = [shuffle_words(text, chance) for text in texts]
    whole, broken = (judge.score(part, PAIR["general"])["score"] for part in (texts, damaged))
    assert (whole[:, None] > broken).mean() > 0.8
    assert not judge.model.training


@pytest.mark.parametrize("kind", [MobileLLMForCausalLM, LlamaForCausalLM])
def test_branches_of_a_text_answer_as_if_asked_alone(kind, words):
    """The mask with which a judge is trained gives the logits that the judge gives."""
    model = small(kind).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    judge = Judge(model, words, max_length=64, chat=False)
    parts = [judge.prompt(text) for text in PROMPTS.values()]
    texts = [ordered("code", 2), "short", ordered("math", 5)]
    with torch.no_grad():
        logits = _answers(model, judge, parts, texts)
    for number, (part, prompt) in enumerate(zip(parts, PROMPTS.values())):
        found = logits[:, number, [part.yes, part.no]].softmax(-1)[:, 0].numpy()
        np.testing.assert_allclose(found, judge.score(texts, prompt)["score"], atol=1e-5)


def test_damage_keeps_the_words():
    chance, text, other = random.Random(0), ordered("code", 0), ordered("math", 0)
    indented = "def f():\n    return 1 + 2\n\n\tlast line here"
    shuffled = shuffle_words(indented, chance)
    assert sorted(shuffled.split()) == sorted(indented.split()) and shuffled != indented
    assert [line[: len(line) - len(line.lstrip())] for line in shuffled.split("\n")] == ["", "    ", "", "\t"]
    repeated = repeat_lines(text, chance).split("\n")
    assert set(repeated) <= set(text.split("\n")) and len(set(repeated)) <= 3 and len("".join(repeated)) >= len(text)
    assert repeat_lines("", chance) == "" and repeat_lines("\n\n", chance).strip() == ""
    mixed = interleave(text, other, chance).split("\n")
    assert sorted(mixed) == sorted(text.split("\n") + other.split("\n"))
    assert len({damage(text, other, chance) for _ in range(30)}) > 10


def test_training_twice_is_the_same(words):
    losses = [[], []]
    for part in losses:
        train_judge(small(), words, corpus(range(6)), PAIR, steps=3, batch_size=4, on_step=part.append)
    assert losses[0] == losses[1]
    other = []
    train_judge(small(), words, corpus(range(6)), PAIR, steps=3, batch_size=4, seed=1, on_step=other.append)
    assert other != losses[0]


def test_what_cannot_be_learnt_is_refused(words):
    data = corpus(range(4))
    with pytest.raises(JudgeError, match="no document is of the domain 'knowledge'; there are code, math"):
        train_judge(small(), words, data, PROMPTS, steps=1)
    unlike = {"general": "{document}\n\nWhole?\n", "code": "Code?\n{document}\n"}
    with pytest.raises(JudgeError, match="must be alike up to the document: put what differs behind it"):
        train_judge(small(), words, data, unlike, steps=1)
    with pytest.raises(JudgeError, match="the prompt alone has"):
        train_judge(small(), words, data, {"general": "{document}" + "word " * 80 + "\n"}, steps=1)
