"""What is no text falls, whatever is text in any script stays."""

import random

import pytest
from datasets import Dataset

from mobilellm_hf.curation.stages import curate
from mobilellm_hf.curation.text_filter import TextFilter, junk_share

SCRIPTS = [
    "Вода кипит при ста градусах, потому что давление пара равно давлению воздуха. " * 2,
    "水在一百度沸騰，因為蒸汽壓等於大氣壓。" * 5,
    "الماء يغلي عند مئة درجة لأن ضغط البخار يساوي ضغط الهواء " * 3,
    "सौ डिग्री पर पानी उबलता है क्योंकि वाष्प दाब वायु दाब के बराबर होता है " * 3,
    "🙂🚀 emoji, math 𝔸 ∀ε>0 ∃δ, combining é à and a zero-width\u200djoiner, soft\u00adhyphen " * 2,
    "def f(x):\r\n\treturn x + 1\f\n\n" * 6,
]


def verdicts(texts: list[str], folder, **options) -> list[str]:
    data = Dataset.from_list([{"text": text, "source": "s"} for text in texts])
    return curate(data, [TextFilter(**options)], folder).reports[0].table()["reason"].to_pylist()


def test_text_in_any_script_stays(tmp_path):
    assert verdicts(SCRIPTS, tmp_path) == [""] * len(SCRIPTS)


def test_junk_and_next_to_nothing_fall(tmp_path):
    binary = [
        random.Random(0).randbytes(4_000).decode("latin-1"),
        random.Random(0).randbytes(4_000).decode("utf-8", "replace"),
        "\ufffdl\ufffd words of Latin-1 read as UTF-8 " * 20,
        "\x7fELF" + "\x00" * 500 + "some name" * 9,
        "words of a text " * 20 + "\ue000\uf8ff" * 9,
    ]
    short = ["", " \n\t" * 100, "x" * 63, "x " * 63]
    texts = [*binary, "x" * 64, *short]
    found = verdicts(texts, tmp_path)
    assert found == ["binary data, not text"] * 5 + [""] + ["fewer than 64 characters"] * 4
    assert verdicts(texts, tmp_path / "low", min_characters=1)[5:] == ["", *["fewer than 1 characters"] * 2, "", ""]


def test_the_share_of_junk_decides(tmp_path):
    texts = ["\x00" * 5 + "x" * 995, "\x00" * 6 + "x" * 994]
    assert [junk_share(text) for text in texts] == [0.005, 0.006] and junk_share("") == 0
    assert verdicts(texts, tmp_path, max_junk=0.005) == ["", "binary data, not text"]
    assert verdicts(texts, tmp_path / "more", max_junk=0.01) == ["", ""]
    assert junk_share("x" * 100_000 + "\x00" * 100_000) == 0  # what lies behind is not read
    assert junk_share("\ud800" * 3 + "x") == 0.75


@pytest.mark.parametrize("num_proc", [None, 2])
def test_processes_say_the_same(num_proc, tmp_path):
    found = verdicts([*SCRIPTS, "x", "\x00" * 99] * 5, tmp_path, num_proc=num_proc)
    assert found == [*[""] * 6, "fewer than 64 characters", "binary data, not text"] * 5
