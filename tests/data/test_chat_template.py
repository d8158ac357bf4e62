"""The chat template, against strings written by hand and the tokens that transformers says are the assistant's."""

import itertools
import re

import pytest
from jinja2.exceptions import TemplateError
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from mobilellm_hf.data.chat import attach_chat_template, chat_template, check_chat_tokenizer
from mobilellm_hf.data.tokenization import train_tokenizer

SYSTEM = "You are a helpful assistant. Reason step by step, and put a final answer within \\boxed{}."
BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["How are you, and what is 3 + 4? It is seven.\n\n<think>\nsystem user assistant</think>"] * 3
    return attach_chat_template(train_tokenizer(texts, 300, show_progress=False))


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def learnt(tokenizer, messages, **options) -> list[str]:
    """The runs of tokens that are the assistant's, as text."""
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    groups = itertools.groupby(zip(encoded["assistant_masks"], encoded["input_ids"]), key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in group]) for mask, group in groups if mask]


def test_one_turn_is_llama_3s_format_with_the_default_system_prompt(tokenizer):
    messages = [turn("user", "How are you?"), turn("assistant", "Well.")]
    expected = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant. Reason step by "
        "step, and put a final answer within \\boxed{}.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "How are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nWell.<|eot_id|>"
    )
    assert render(tokenizer, messages) == expected


def test_a_system_message_replaces_the_default_and_an_empty_one_leaves_the_turn_out(tokenizer):
    user = turn("user", "How?")
    assert render(tokenizer, [turn("system", " Be brief. "), user]) == (
        f"{BOS}{header('system')}Be brief.{EOT}{header('user')}How?{EOT}"
    )
    assert render(tokenizer, [turn("system", ""), user]) == f"{BOS}{header('user')}How?{EOT}"
    assert SYSTEM in render(tokenizer, [user])


def test_the_generation_prompt_opens_the_assistants_turn_and_an_answer_continues_it(tokenizer):
    messages = [turn("user", "What is 3 + 4?"), turn("assistant", "It is seven.")]
    prompt = render(tokenizer, messages[:1], add_generation_prompt=True)
    assert prompt.endswith(f"What is 3 + 4?{EOT}{header('assistant')}")
    assert render(tokenizer, messages) == prompt + "It is seven." + EOT
    ids = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(ids)] == ids


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_every_order_of_roles_renders_or_is_refused(tokenizer, length):
    for roles in itertools.product(("system", "user", "assistant"), repeat=length):
        rest = roles[1:] if roles[0] == "system" else roles
        good = list(rest) == [("user", "assistant")[place % 2] for place in range(len(rest))]
        messages = [turn(role, f"a{place}") for place, role in enumerate(roles)]
        if good:
            text = render(tokenizer, messages)
            assert re.findall(r"<\|start_header_id\|>(\w+)<", text)[-len(roles) :] == list(roles)
        else:
            with pytest.raises(TemplateError, match="roles must be user and assistant in turn"):
                render(tokenizer, messages)


def test_what_is_no_text_is_refused_with_its_place(tokenizer):
    with pytest.raises(TemplateError, match=r"message 2 \(assistant\) is not a string"):
        render(tokenizer, [turn("user", "a"), turn("assistant", None)])


THINKING = [
    turn("user", "a"), turn("assistant", "<think>\nb\n</think>\n\nc"),
    turn("user", "d"), turn("assistant", "<think>\ne\n</think>\n\nf"),
]  # fmt: skip


def test_thinking_stays_in_the_last_answer_and_goes_from_earlier_ones(tokenizer):
    text = render(tokenizer, THINKING)
    assert text.endswith(
        f"{header('user')}a{EOT}{header('assistant')}c{EOT}{header('user')}d{EOT}{header('assistant')}"
        f"<think>\ne\n</think>\n\nf{EOT}"
    )
    # The next question makes the last answer an earlier one.
    assert "think" not in render(tokenizer, [*THINKING, turn("user", "g")])
    kept = render(tokenizer, THINKING, keep_thinking=True)
    assert f"{header('assistant')}<think>\nb\n</think>\n\nc{EOT}" in kept


def test_an_answer_whose_thinking_was_dropped_is_not_learnt(tokenizer):
    assert learnt(tokenizer, THINKING) == [f"<think>\ne\n</think>\n\nf{EOT}"]
    assert learnt(tokenizer, THINKING, keep_thinking=True) == [
        f"<think>\nb\n</think>\n\nc{EOT}", f"<think>\ne\n</think>\n\nf{EOT}",
    ]  # fmt: skip


def test_thinking_of_its_own_key_is_written_in_front(tokenizer):
    message = turn("assistant", "c") | {"reasoning_content": " b\n"}
    assert render(tokenizer, [turn("user", "a"), message]).endswith(f"<think>\nb\n</think>\n\nc{EOT}")


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_mask_is_the_answers_and_their_ends_to_the_token(tokenizer, turns):
    messages = []
    for place in range(turns):
        messages += [turn("user", f"What is 3 + {place}?"), turn("assistant", f"  It is {place},\nseven.\n")]
    answers = [f"It is {place},\nseven.{EOT}" for place in range(turns)]
    assert learnt(tokenizer, messages) == answers
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    expected = sum(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers)
    assert sum(encoded["assistant_masks"]) == expected < len(encoded["input_ids"])
    assert learnt(tokenizer, messages[:-1]) == answers[:-1]


def test_a_conversation_comes_back_from_its_tokens(tokenizer):
    messages = [turn("system", "Be brief."), turn("user", "Wie\n\tgeht's? äö"), turn("assistant", "x  y\n\n z"),
                turn("user", "[1, 2] {a}"), turn("assistant", "\\boxed{7}")]  # fmt: skip
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    text = tokenizer.decode(ids)
    assert text == render(tokenizer, messages)
    found = re.findall(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", text, re.DOTALL)
    assert [turn(*pair) for pair in found] == messages
    assert ids.count(tokenizer.bos_token_id) == 1


def test_trl_finds_the_markers_and_the_end_of_turn_among_what_is_learnt(tokenizer):
    assert has_generation_markers(chat_template()) and is_chat_template_stop_token_trained(tokenizer)
    assert check_chat_tokenizer(tokenizer) is None


def test_the_template_is_saved_with_the_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == chat_template()


def test_a_tokenizer_without_the_tokens_is_refused_by_name():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match=r"no token <\|start_header_id\|>"):
        attach_chat_template(plain)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "chat template is missing"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "marks no answers"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
            "<|eot_id|>{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "marks no answers and their ends",
        ),
    ],
)
def test_a_template_from_which_no_answer_can_be_learnt_is_refused(tokenizer, template, message):
    own = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        with pytest.raises(ValueError, match=message):
            check_chat_tokenizer(tokenizer)
    finally:
        tokenizer.chat_template = own
