"""What can be told of a document without a model: that it is no text, or next to none.

    documents = TextFilter()(documents)

Binary data that was read as text is full of control characters and of U+FFFD, which stands for bytes that are none.
Text of any language passes: whether it is worth reading is a question for the models behind this step.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import PartialState

from mobilellm_hf.curation.stages import CurationStage, StageInput, Verdict, map_texts
from mobilellm_hf.data.documents import MIN_CHARACTERS, is_long_enough

# Control characters but tab, line feed, form feed and carriage return; lone surrogates; private use; U+FFFD to U+FFFF.
JUNK = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufffd-\uffff]")
CHARACTERS_READ = 100_000


class TextFilter(CurationStage):
    """Drops documents that are nearly empty or binary.

    Args:
        min_characters: fewest characters that are not white space.
        max_junk: the largest share of characters, among the first 100,000, that belong in no text. An escape or two
            in a program's output is none; binary files have a tenth and more.
        num_proc: processes; the work is `datasets`'.
    """

    def __init__(
        self,
        min_characters: int = MIN_CHARACTERS,
        max_junk: float = 0.02,
        *,
        num_proc: int | None = None,
        name: str = "text",
    ):
        self.min_characters, self.max_junk, self.num_proc, self.name = min_characters, max_junk, num_proc, name

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "min_characters": self.min_characters, "max_junk": self.max_junk}

    def decide(self, given: StageInput) -> Verdict:
        with PartialState().main_process_first():  # the others find it in `datasets`' cache
            fallen = map_texts(given.documents, self._fallen, self.num_proc)["fallen"].astype(np.int8)
        given.rate.found(len(fallen))
        return Verdict(fallen, (f"fewer than {self.min_characters} characters", "binary data, not text"))

    def _fallen(self, texts: Sequence[str]) -> dict[str, list[int]]:
        short = [not is_long_enough(text, self.min_characters) for text in texts]
        return {"fallen": [1 if s else 2 * (junk_share(t) > self.max_junk) for s, t in zip(short, texts, strict=True)]}


def junk_share(text: str) -> float:
    """The share of characters that belong in no text, among the first 100,000."""
    head = text[:CHARACTERS_READ]
    return len(JUNK.findall(head)) / max(1, len(head))
