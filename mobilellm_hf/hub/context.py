"""What the template of a model's card is given, from the facts of its files; also the prompt that its code asks.

context = context_of(Target(repo, stage), ModelFacts(folder), pictures, None, llama4=False, license="mit")
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from datasets import load_from_disk
from transformers import AutoTokenizer

from mobilellm_hf.export.requirements import INSTALL
from mobilellm_hf.hub.cards import SHAPE, Picture, architecture, own_description
from mobilellm_hf.hub.facts import ModelFacts
from mobilellm_hf.hub.programs import Program
from mobilellm_hf.hub.stages import ON_DEVICE, TITLES, Target
from mobilellm_hf.training.grpo_data import prompt_length

Messages = list[dict[str, str]]

NEW_TOKENS = {True: 512, False: 32}
NEUTRAL: Messages = [{"role": "user", "content": "Hello! What can you do?"}]
BARE: Messages = [{"role": "system", "content": ""}, *NEUTRAL]  # without the template's own system prompt
SHORT = 1024  # contexts in which no answer is long
NOT_MEASURED = "Of the model before quantization; the program was not measured.\n\n"
MEASURED_ELSEWHERE = "Of the model before quantization; what the program was measured on is under Evaluation.\n\n"


def context_of(
    target: Target,
    facts: ModelFacts,
    pictures: list[Picture],
    program: Program | None,
    llama4: bool,
    license: str | None,
) -> dict[str, Any]:
    """Everything but the metadata."""
    shape, alone = architecture(facts.config, facts.parameters), target.stage == ON_DEVICE
    if alone:
        shape.pop(SHAPE["dtype"], None)  # which is what was exported, and not as what
        if program.unties:
            shape.pop(SHAPE["tie_word_embeddings"], None)
    description = own_description(facts.folder, pictures)
    name = target.repo.split("/")[1]
    longest = NEW_TOKENS[facts.has_chat_template]
    context_length = facts.config["max_position_embeddings"]
    program_context = program.report["context"] if program else context_length
    messages, room = example_of(facts, min(context_length, program_context))
    measured = MEASURED_ELSEWHERE if facts.evaluation else NOT_MEASURED
    return {
        "target": target,
        "name": name,
        "title": name if target.branch == "main" else target.branch,
        "stage_title": TITLES[target.stage],
        "facts": facts,
        "architecture": shape,
        "description": description,
        "pictures": [picture for picture in pictures if f"]({picture.path})" not in description],
        "program": program.facts if program else None,
        "alone": alone,
        "before_quantization": measured if alone else "",
        "titles": TITLES,
        "messages": json.dumps(messages, ensure_ascii=False),
        "reasons_at_length": context_length > SHORT,
        "program_new_tokens": min(longest, program_context // 2, room),
        "executorch": INSTALL,
        "twin": llama4,
        "license": license,
        "new_tokens": min(longest, context_length // 2, room),
        "limits": list(_limits(facts, program_context if alone else context_length)),
    }


def _limits(facts: ModelFacts, context_length: int) -> Iterator[str]:
    yield f"Its context is {context_length:,} tokens, those that it generates included."
    if facts.evaluation is None:
        yield "No benchmark was run on it."
    for result in facts.evaluation or ():
        if limit := result.details.get("limit"):
            yield f"Of {result.task} {limit} documents were asked, not all."


def example_of(facts: ModelFacts, context: int) -> tuple[Messages, int]:
    """A prompt for the card's code, and the tokens that are left for the answer.

    It is one of the run's, which the model was taught to answer, if it leaves half of the context; else a neutral one,
    and for the shortest of contexts that without a system prompt.
    """
    if not facts.has_chat_template:
        return NEUTRAL, context
    tokenizer = AutoTokenizer.from_pretrained(facts.folder)
    for messages in (first_prompt(facts), NEUTRAL, BARE):
        room = context - prompt_length(tokenizer, messages) if messages else 0
        if room >= context // 2:
            break
    return messages, max(1, room)


def first_prompt(facts: ModelFacts) -> Messages | None:
    """The first one that the run held out or, if it held out none, was trained on; of the stages, GRPO keeps them."""
    folder = facts.run / "prompts"
    if not (folder / "dataset_dict.json").exists():
        return None
    parts = load_from_disk(folder)
    rows = parts["held_out" if "held_out" in parts else "train"]
    if "prompt" not in rows.column_names:
        return None
    return [{"role": turn["role"], "content": turn["content"]} for turn in rows[0]["prompt"]]
