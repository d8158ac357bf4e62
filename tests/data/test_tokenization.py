import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from mobilellm_hf.data.tokenization import (
    LLAMA3_SPECIAL_TOKENS,
    NAMED_SPECIAL_TOKENS,
    check_tokenizer,
    train_tokenizer,
)

TEXTS = [
    f"def add_{n}(a, b):\n    return a + b + {n}  # it's number {n * 37}\n\nThe sum of {n} and {n} is {2 * n}.\n"
    for n in range(300)
]
STRANGE = [
    "",
    " ",
    "\n\n \t\r\n  trailing  ",
    "don't , spaces . before ! punctuation ?",
    "12345678901234567890",
    "na\u00efve caf\u00e9, e\u0301 decomposed",
    "\u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7 \ufffd \x00\x01\x7f\u2028\u3000",
    "text with <|eot_id|> spelled in it",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, show_progress=False)


def random_texts(count=200):
    rng = random.Random(0)
    allowed = [n for n in range(0x110000) if not 0xD800 <= n <= 0xDFFF]
    return ["".join(map(chr, rng.sample(allowed, 40))) for _ in range(count)]


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_any_text_comes_back_from_its_ids(tokenizer, split_special_tokens):
    for text in [*STRANGE, *random_texts(), *TEXTS[:20]]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_special_tokens_follow_the_vocabulary_in_llamas_order(tokenizer):
    assert len(tokenizer) == 400
    first = 400 - len(NAMED_SPECIAL_TOKENS)
    assert tokenizer.convert_ids_to_tokens(list(range(first, 400))) == list(NAMED_SPECIAL_TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (first, first + 1, first + 4)
    # Ids of the published tokenizer: the end-of-message and end-of-turn tokens are 128008 and 128009.
    offset = {token: n for n, token in enumerate(LLAMA3_SPECIAL_TOKENS)}
    assert (offset["<|eom_id|>"], offset["<|eot_id|>"], offset["<|python_tag|>"]) == (8, 9, 10)
    assert offset["<|reserved_special_token_247|>"] == 255
    assert len(offset) == len(LLAMA3_SPECIAL_TOKENS) == 256


def test_all_256_special_tokens_on_request():
    tokenizer = train_tokenizer(TEXTS, 600, all_special_tokens=True, show_progress=False)
    assert len(tokenizer) == 600
    assert tokenizer.convert_ids_to_tokens(list(range(344, 600))) == list(LLAMA3_SPECIAL_TOKENS)


def test_a_text_begins_with_bos_and_has_no_eos(tokenizer):
    ids = tokenizer("return a")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "return a"
    pair = tokenizer("a", "b")["input_ids"]
    assert pair.count(tokenizer.bos_token_id) == 2


def test_padding_uses_the_pad_token(tokenizer):
    batch = tokenizer(["return", "return a + b + 1"], padding=True)
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id
    assert batch["attention_mask"][0][-1] == 0
    assert set(batch) == {"input_ids", "attention_mask"}


def test_pretokenization_is_llama3s(tokenizer):
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345\n\n  x")]
    # The apostrophe's ending stands alone, digits go in threes, and the last of the spaces stays with the word.
    assert words == ["it", "'s", "\u0120", "123", "45", "\u010a\u010a", "\u0120", "\u0120x"]


def test_merges_are_learnt(tokenizer):
    assert len(tokenizer.tokenize("return")) <= 2
    assert len(tokenizer.tokenize("zqxjkv")) == 6


def test_training_is_deterministic_across_processes(tokenizer):
    script = (
        "import json, sys; from mobilellm_hf.data.tokenization import train_tokenizer;"
        "print(json.dumps(train_tokenizer(json.load(sys.stdin), 400, show_progress=False).get_vocab()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        input=json.dumps(TEXTS),
    )
    assert json.loads(run.stdout) == tokenizer.get_vocab()


def test_saved_and_reloaded_by_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*STRANGE, *TEXTS[:20]]:
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert reloaded.decode(reloaded(text, add_special_tokens=False)["input_ids"]) == text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length"):
        assert getattr(reloaded, name) == getattr(tokenizer, name)
    assert reloaded.model_max_length == 32_768
    # Not seen in the ids above: an earlier transformers that loads these files would tidy spaces up if it were true.
    assert reloaded.clean_up_tokenization_spaces is False


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so(caplog):
    tokenizer = train_tokenizer(["ab ab"], 1_000, show_progress=False)
    assert len(tokenizer) < 300
    assert str(len(tokenizer)) in caplog.text and "1000" in caplog.text
    assert tokenizer.decode(tokenizer("\u00e9", add_special_tokens=False)["input_ids"]) == "\u00e9"


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="at least 267.*is 266"):
        train_tokenizer(TEXTS, 266)
    with pytest.raises(ValueError, match="at least 512"):
        train_tokenizer(TEXTS, 400, all_special_tokens=True)
    with pytest.raises(TypeError, match="not one string"):
        train_tokenizer("one text", 400)
    with pytest.raises(ValueError, match="no texts"):
        train_tokenizer([], 400, show_progress=False)


def test_check_tokenizer(tokenizer):
    config = SimpleNamespace(vocab_size=400)
    check_tokenizer(tokenizer, config)
    config.vocab_size = 399
    with pytest.raises(ValueError, match="ids up to 399.*vocab_size is 399.*at least 400"):
        check_tokenizer(tokenizer, config)
    assert config.vocab_size == 399 and len(tokenizer) == 400
