"""P("1") against a plain forward of one document at a time, for judges of several kinds, and what judges refuse."""

import copy

import numpy as np
import pytest
import torch
from curation_cases import (
    CHAT,
    ODD_TEXTS,
    PROMPT,
    documents,
    judge_model,
    save_judge,
    tokenizer,
)

from mobilellm_hf.curation.ask_llm import AskLLM, Judge, JudgeError, load_prompt
from mobilellm_hf.data.tokenization import train_tokenizer

KINDS = ("mobilellm", "llama", "qwen3", "gpt2", "gemma3", "mamba")
KEEP_ALL = ("mobilellm", "llama", "qwen3", "gpt2")  # keys and values of every token


def plain_scores(model, texts, before_ids, after_ids, room=None) -> np.ndarray:
    """The answers' probabilities from the whole logits of whole sequences, without a cache."""
    words = copy.deepcopy(tokenizer())
    yes, no = words.convert_tokens_to_ids(["1", "0"])
    out = []
    for text in texts:
        ids = words(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][:room]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before_ids + ids + after_ids]), use_cache=False).logits[0, -1]
        out.append(logits[[yes, no]].double().softmax(0)[0].item())
    return np.array(out)


def pieces(prompt: str, special: bool = True) -> tuple[list[int], list[int]]:
    words = copy.deepcopy(tokenizer())
    before, after = prompt.split("{document}")
    return words(before, add_special_tokens=special)["input_ids"], words(after, add_special_tokens=False)["input_ids"]


def chat_tokenizer():
    words = copy.deepcopy(tokenizer())
    words.chat_template = CHAT
    return words


def watch(model) -> list[tuple[tuple, tuple]]:
    """The shapes of ids and logits of every forward from now on."""
    shapes = []
    model.register_forward_hook(
        lambda _, __, given, out: shapes.append((tuple(given["input_ids"].shape), tuple(out.logits.shape))),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_plain_forwards(kind):
    model = judge_model(kind)
    expected = plain_scores(model, ODD_TEXTS, *pieces(PROMPT))
    assert np.ptp(expected) > 0.2  # else they would agree by chance
    for batch_tokens in (1, 150, 16_384):
        for reuse in (True, False):
            judge = Judge(model, tokenizer(), batch_tokens=batch_tokens, reuse_prefix=reuse)
            found = judge.score(ODD_TEXTS, PROMPT)
            np.testing.assert_allclose(found["score"], expected, atol=1e-5)
            assert found["score"].dtype == np.float32 and not found["truncated"].any()
            assert found["tokens"][0] == 0 and found["tokens"][8] == found["tokens"].max()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_scores_in_a_chat_template(kind):
    words, model = chat_tokenizer(), judge_model(kind)
    judge = Judge(model, words)
    for prompt in (PROMPT, "Whole?\n{document}\n1 or 0"):  # the second after documents were read
        turn = [{"role": "user", "content": prompt}]
        text = words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, after = pieces(text, special=False)
        assert before[0] == words.bos_token_id and before[1] != words.bos_token_id
        assert after[-3:].count(words.convert_tokens_to_ids("<|end_header_id|>")) == 1
        expected = plain_scores(model, ODD_TEXTS, before, after)
        np.testing.assert_allclose(judge.score(ODD_TEXTS, prompt)["score"], expected, atol=1e-5)
    without = plain_scores(model, ODD_TEXTS, *pieces(PROMPT))
    np.testing.assert_allclose(Judge(model, words, chat=False).score(ODD_TEXTS, PROMPT)["score"], without, atol=1e-5)


def test_special_tokens_of_a_document_are_text():
    judge = Judge(judge_model("llama"), chat_tokenizer())
    (ids,), _ = judge.encode(["<|eot_id|><|end_of_text|>"], judge.prompt(PROMPT))
    assert len(ids) > 10 and not set(ids) & set(judge.tokenizer.all_special_ids)
    assert judge.tokenizer.decode(ids) == "<|eot_id|><|end_of_text|>"
    special = judge.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert special in judge.prompt("A later prompt.\n{document}\n").after


@pytest.mark.parametrize("prompt", ["{document}\n", "{document}", "Judge: {document}"])
def test_a_prompt_may_begin_or_end_with_the_document(prompt):
    model = judge_model("mobilellm")
    expected = plain_scores(model, ODD_TEXTS, *pieces(prompt))
    np.testing.assert_allclose(Judge(model, tokenizer()).score(ODD_TEXTS, prompt)["score"], expected, atol=1e-5)


def test_a_batch_holds_its_tokens_and_logits_are_of_one_place():
    model = judge_model("llama")
    shapes = watch(model)
    judge = Judge(model, tokenizer(), batch_tokens=200)
    texts, counted = documents(40)["text"][:], []
    judge.score(texts, PROMPT, counted.append)
    before, _ = pieces(PROMPT)
    assert shapes[0][0] == (1, len(before))  # once for all documents
    batches = [ids for ids, _ in shapes[1:]]
    assert all(rows * longest <= 200 or rows == 1 for rows, longest in batches) and max(batches)[0] > 1
    assert counted == [rows for rows, _ in batches] and sum(counted) == 40
    assert all(logits == (rows, 1, 340) for (rows, _), logits in shapes[1:])
    assert [longest for _, longest in batches] == sorted((longest for _, longest in batches), reverse=True)
    judge.score(texts, PROMPT)
    assert [ids for ids, _ in shapes].count((1, len(before))) == 1
    judge.release()
    judge.score(texts, PROMPT)
    assert [ids for ids, _ in shapes].count((1, len(before))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_is_read_once_by_models_that_keep_all_of_it(kind):
    model = judge_model(kind)
    before, after = pieces(PROMPT)
    judge = Judge(model, tokenizer())
    judge.score(["x"], PROMPT)
    shapes = watch(model)
    judge.score(["x"], PROMPT)
    (_, longest), _ = shapes[-1]
    assert (longest == 1 + len(after)) == (kind in KEEP_ALL)
    assert longest in (1 + len(after), len(before) + 1 + len(after))


def test_long_documents_lose_their_end():
    model = judge_model("mobilellm", context=96)
    before, after = pieces(PROMPT)
    room = 96 - len(before) - len(after)
    texts = ["the sum of three and four is seven " * 20, "x " * (room // 2), "def " * 100_000, ""]
    found = Judge(model, tokenizer(), batch_tokens=300).score(texts, PROMPT)
    assert found["truncated"].tolist() == [True, False, True, False]
    assert found["tokens"][0] == found["tokens"][2] == room and found["tokens"][3] == 0
    np.testing.assert_allclose(found["score"], plain_scores(model, texts, before, after, room), atol=1e-5)
    shorter = Judge(model, tokenizer(), max_length=64).score(texts, PROMPT)
    assert shorter["tokens"].max() == room - 32
    # One token too many is counted, and one that fits is not.
    ids = tokenizer()(texts[0], add_special_tokens=False)["input_ids"]
    edge = [tokenizer().decode(ids[:length]) for length in (room, room + 1)]
    assert Judge(model, tokenizer()).score(edge, PROMPT)["truncated"].tolist() == [False, True]


def test_a_prompt_longer_than_the_context_is_refused():
    judge = Judge(judge_model("mobilellm", context=96), tokenizer())
    with pytest.raises(JudgeError, match=r"the prompt alone has \d+ tokens, and .* reads 96"):
        judge.score(["x"], "word " * 100 + PROMPT)
    with pytest.raises(JudgeError, match="reads 20: shorten it, or raise max_length"):
        Judge(judge_model("mobilellm"), tokenizer(), max_length=20).score(["x"], PROMPT)


def test_answers_must_be_one_token_where_the_prompt_ends(tmp_path):
    digits = train_tokenizer(["a 10 11 01 00 101 110 " * 60], 300, show_progress=False)
    judge = Judge(judge_model("llama"), digits)
    assert judge.prompt("{document}\n").yes == digits.convert_tokens_to_ids("1")
    with pytest.raises(JudgeError, match=r"the answer '1' is not one token .* \(... '.*1'\): it is read as \[.*11'"):
        judge.prompt("{document}\nNumber 1")
    words = copy.deepcopy(tokenizer())
    words.chat_template = CHAT.replace("<|end_header_id|>\n\n{% endif", "<|end_header_id|>1{% endif")
    assert Judge(judge_model("llama"), words).prompt(PROMPT).after[-1] == words.convert_tokens_to_ids("1")


def test_a_chat_template_must_be_there_if_it_is_asked_for():
    with pytest.raises(JudgeError, match="has no chat template: chat=False"):
        Judge(judge_model("llama"), tokenizer(), chat=True).score(["x"], PROMPT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    model = judge_model("mobilellm")
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(JudgeError, match="not finite in .*load it in float32"):
        Judge(model, tokenizer()).score(["a", "b c"], PROMPT)


def test_a_judge_in_a_folder_is_the_loaded_one(tmp_path):
    folder = save_judge(tmp_path / "judge")
    expected = Judge(judge_model("mobilellm"), tokenizer()).score(ODD_TEXTS, PROMPT)["score"]
    judge = Judge(folder)
    judge.check([PROMPT])
    assert judge._model is None
    np.testing.assert_allclose(judge.score(ODD_TEXTS, PROMPT)["score"], expected, atol=1e-6)
    judge.release()
    assert judge._model is None
    half = Judge(folder, dtype="bfloat16")
    rounded = half.score(ODD_TEXTS, PROMPT)["score"]
    assert half.model.dtype == torch.bfloat16 and 0 < np.abs(rounded - expected).max() < 0.2


def test_what_decides_scores_is_in_the_settings(tmp_path):
    folder = save_judge(tmp_path / "judge")
    base = Judge(folder).settings()
    assert Judge(folder, batch_tokens=7, reuse_prefix=False).settings() == base
    changed = [
        Judge(folder, dtype="float32"), Judge(folder, max_length=99), Judge(folder, chat=False),
        Judge(save_judge(tmp_path / "other", "llama")), Judge("org/judge"), Judge("org/judge", revision="v2"),
    ]  # fmt: skip
    settings = [base, *(judge.settings() for judge in changed)]
    assert all(one != other for number, one in enumerate(settings) for other in settings[:number])
    model = judge_model("llama")
    before = Judge(model, tokenizer()).settings()
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3
    assert Judge(model, tokenizer()).settings() != before


def test_another_tokenizer_is_another_judge():
    model = judge_model("llama")
    other = train_tokenizer(["other words in other pieces " * 20], 300, show_progress=False)
    assert Judge(model, other).settings() != Judge(model, tokenizer()).settings()


def test_prompts_by_name_and_by_path(tmp_path):
    for name in ("general", "code", "math", "knowledge", "combined"):
        assert load_prompt(name).count("{document}") == 1
        with pytest.raises(JudgeError, match="the prompt alone has [0-9]+ tokens, and LlamaForCausalLM reads 512"):
            Judge(judge_model("llama"), tokenizer(), chat=False).check([load_prompt(name)])  # one character a token
    own = tmp_path / "own.txt"
    own.write_text(PROMPT)
    assert load_prompt(own) == load_prompt(str(own)) == PROMPT
    with pytest.raises(JudgeError, match="no prompt 'generel': there are code, combined, general, knowledge, math"):
        load_prompt("generel")
    with pytest.raises(JudgeError, match="cannot be read"):
        load_prompt(tmp_path / "none.txt")
    own.write_bytes(b"\xff\xfe{document}")
    with pytest.raises(JudgeError, match="cannot be read"):
        load_prompt(own)
    for text, times in (("no place\n", 0), ("{document} and {document}\n", 2)):
        own.write_text(text)
        with pytest.raises(JudgeError, match=rf"must contain {{document}} once, not {times} times"):
            load_prompt(own)


def test_each_source_has_its_prompt(tmp_path):
    prompts = {"code": "Code? {document}\n", "math": "Math? {document}\n", "wiki": "Math? {document}\n"}
    for name, text in prompts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    model, data = judge_model("mobilellm"), documents(50)
    judge, counted = Judge(model, tokenizer(), batch_tokens=500), []
    stage = AskLLM(judge, {name: tmp_path / f"{name}.txt" for name in prompts}, top=0.2)
    found = stage.score(data["text"][:], data["source"][:], counted.append)
    assert sum(counted) == 50
    for row in data.select(range(12)):
        place = data["text"][:].index(row["text"])
        expected = plain_scores(model, [row["text"]], *pieces(prompts[row["source"]]))
        assert found["score"][place] == pytest.approx(expected[0], abs=1e-5)
    kept = stage(data)
    for source in prompts:
        rows = np.flatnonzero(np.array(data["source"][:]) == source)
        best = rows[np.argsort(-found["score"][rows], kind="stable")][: -(-len(rows) // 5)]
        assert [t for t, s in zip(kept["text"], kept["source"]) if s == source] == data[sorted(best)]["text"]
    with pytest.raises(ValueError, match="the source 'wiki' has no prompt; give one of each source"):
        AskLLM(judge, {name: tmp_path / f"{name}.txt" for name in ("code", "math")})(data)


@pytest.mark.parametrize("top", [0, -0.1, 1.5])
def test_top_must_be_a_share(top):
    with pytest.raises(ValueError, match="ask-llm: top must be a share above 0 and up to 1"):
        AskLLM(Judge("org/judge"), top=top)


def test_a_judge_that_answers_otherwise_is_told(caplog, tmp_path):
    """The share of 1 and 0 among all tokens; a model that would say something else is no judge."""
    model, words = judge_model("llama"), tokenizer()
    data = documents(20)
    found = Judge(model, words).score(data["text"][:5], PROMPT)
    before, after = pieces(PROMPT)
    yes, no = words.convert_tokens_to_ids(["1", "0"])
    for text, answered in zip(data["text"][:5], found["answered"], strict=True):
        ids = words(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + ids + after])).logits[0, -1]
        assert answered == pytest.approx(logits.softmax(0)[[yes, no]].sum().item(), rel=1e-4)
    (own := tmp_path / "own.txt").write_text(PROMPT)
    with caplog.at_level("WARNING"):
        AskLLM(Judge(model, words), own, top=0.5)(data)
    assert ("it was going to say something else" in caplog.text) == (np.median(found["answered"]) < 0.1)


def test_the_day_is_no_part_of_the_prompt():
    words = chat_tokenizer()
    words.chat_template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} " + CHAT
    prompt = Judge(judge_model("llama"), words).prompt(PROMPT)
    assert words.decode(prompt.before).startswith("01 Jan 2025 ")
