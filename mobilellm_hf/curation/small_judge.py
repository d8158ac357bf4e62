"""A judge for where none can be downloaded: a small model that learns to answer the prompts from labels.

    judge = train_judge(model, tokenizer, documents, PROMPTS, steps=300, max_length=64)

What it learns is what the labels say and no more: whether a document is whole or was damaged (words out of order,
lines repeated, two documents interleaved), and which domain its source was given. An instruction-tuned model judges
what a small one cannot, such as whether a text reasons. The quickstart, the tests and the benchmark use it.

That the same document has different answers to different prompts is what a small model learns last. So each document
of a batch is read once and asked every prompt, in branches that do not see each other.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from mobilellm_hf.curation.ask_llm import Judge, JudgeError, Prompt

GENERAL = "general"
# What follows the document is short, for every prompt is read with every document of a batch.
PROMPTS = {
    GENERAL: "{document}\n\nWhole?\n",
    "code": "{document}\n\nCode?\n",
    "math": "{document}\n\nMath?\n",
    "knowledge": "{document}\n\nKnowledge?\n",
}


def shuffle_words(text: str, rng: random.Random) -> str:
    """The words in another order, in the white space of the text as it was."""
    lines = [line.split() for line in text.split("\n")]
    words = [word for line in lines for word in line]
    rng.shuffle(words)
    left = iter(words)
    indents = [line[: len(line) - len(line.lstrip())] for line in text.split("\n")]
    return "\n".join(indent + " ".join(next(left) for _ in line) for indent, line in zip(indents, lines, strict=True))


def repeat_lines(text: str, rng: random.Random) -> str:
    """As long as the text, of a few of its lines again and again."""
    lines = [line for line in text.split("\n") if line.strip()] or [text]
    chosen = [rng.choice(lines) for _ in range(3)]
    out: list[str] = []
    while sum(map(len, out)) < len(text):
        out.append(rng.choice(chosen))
    return "\n".join(out)


def interleave(text: str, other: str, rng: random.Random) -> str:
    """Lines of two documents in turn."""
    pairs = zip(text.split("\n"), other.split("\n"), strict=False)
    return "\n".join(line for pair in pairs for line in (pair if rng.random() < 0.5 else pair[::-1]))


def damage(text: str, other: str, rng: random.Random) -> str:
    kind = rng.randrange(3)
    return (shuffle_words, repeat_lines)[kind](text, rng) if kind < 2 else interleave(text, other, rng)


def train_judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    prompts: Mapping[str, str] = PROMPTS,
    *,
    steps: int,
    batch_size: int = 24,
    learning_rate: float = 6e-3,
    max_length: int = 64,
    seed: int = 0,
    on_step: Callable[[float], None] | None = None,
) -> Judge:
    """Trains the answers to all prompts together, and returns the judge.

    Args:
        model: a causal LM whose attention takes a mask of (batch, 1, T, T); trained where it is.
        documents: with `text` and `domain`.
        prompts: "general" -> the prompt answered by whether a document is whole; each other name is a domain, whose
            prompt is answered by whether the document is of it. They are alike up to the document.
        max_length: tokens of prompt and document.
        on_step: called with the loss of each step, in nats an answer.

    Raises:
        JudgeError: the prompts differ before the document, or no document is of a prompt's domain.
    """
    judge = Judge(model, tokenizer, max_length=max_length, chat=False)
    parts = [judge.prompt(text) for text in prompts.values()]
    if any(part.before != parts[0].before for part in parts):
        raise JudgeError("the prompts must be alike up to the document: put what differs behind it")
    rng = random.Random(seed)
    draw = _labelled_texts(documents, list(prompts), rng)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for _ in range(steps):
        texts, labels = zip(*(draw() for _ in range(batch_size)), strict=True)
        logits = _answers(model, judge, parts, texts)
        wanted = [[part.yes if label else part.no for part, label in zip(parts, row, strict=True)] for row in labels]
        loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor(wanted, device=logits.device).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(loss.item())
    model.eval()
    return judge


def _labelled_texts(
    documents: Dataset, prompts: Sequence[str], rng: random.Random
) -> Callable[[], tuple[str, list[bool]]]:
    """Draws a text, every domain as often, half of them damaged, with its answer to each prompt."""
    texts, of_domain = documents["text"][:], {}
    for row, domain in enumerate(documents["domain"][:]):
        of_domain.setdefault(domain, []).append(row)
    if missing := [name for name in prompts if name != GENERAL and name not in of_domain]:
        raise JudgeError(f"no document is of the domain {missing[0]!r}; there are {', '.join(of_domain)}")

    def draw() -> tuple[str, list[bool]]:
        domain = rng.choice(list(of_domain))
        text, whole = texts[rng.choice(of_domain[domain])], rng.random() < 0.5
        text = text if whole else damage(text, texts[rng.choice(of_domain[domain])], rng)
        return text, [whole if name == GENERAL else name == domain for name in prompts]

    return draw


def _answers(model: PreTrainedModel, judge: Judge, prompts: Sequence[Prompt], texts: Sequence[str]) -> torch.Tensor:
    """(texts, prompts, vocabulary) logits after each prompt; a text's prompts all follow it and see it alone."""
    tails = [prompt.after for prompt in prompts]
    rows = [prompts[0].before + ids for ids in judge.encode(texts, prompts[0])[0]]
    longest, width = max(map(len, rows)), sum(map(len, tails))
    ids = torch.zeros(len(rows), longest + width, dtype=torch.long)
    places, sees = torch.zeros_like(ids), torch.eye(longest + width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        text = slice(longest - len(row), longest)  # padded on its left
        ids[number, text] = torch.tensor(row)
        places[number, text] = torch.arange(len(row))
        sees[number, text, text] = torch.ones(len(row), len(row), dtype=torch.bool).tril()
        end = longest
        for tail in tails:
            branch = slice(end, end := end + len(tail))
            ids[number, branch] = torch.tensor(tail)
            places[number, branch] = len(row) + torch.arange(len(tail))
            sees[number, branch, text] = True
            sees[number, branch, branch] = torch.ones(len(tail), len(tail), dtype=torch.bool).tril()
    ends = longest - 1 + torch.tensor([len(tail) for tail in tails]).cumsum(0)
    inputs = {"input_ids": ids, "position_ids": places, "attention_mask": sees[:, None]}
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    return model(**inputs, logits_to_keep=ends.to(model.device), use_cache=False).logits.float()
