"""The data behind the catalog: Tables 5, 6 and 7 as printed, and what each line is on the Hub.

The numbers stand apart from the rest, in the order of the tables, so that they can be held against the paper. Which
data set a line means is what the README of the official repository links to. Columns, subsets and licences come from
the data sets' cards or, failing that, from public code that reads them. What was seen in neither is None, and
`unseen` says so. A licence of "unknown" is what the card says; None means that it says nothing.

Adding a source is one line in a table and one in `_DETAILS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PRE, MID, POST = "pretraining", "midtraining", "posttraining"
PHASES = {PRE: (1, 2), MID: (1, 2), POST: ("general", "reasoning")}
DOMAINS = ("code", "math", "knowledge", "combined")
BENCHMARK = "benchmark"

# Rows, tokens in billions, percent of phase 1 and of phase 2.
TABLE_5 = {
    "starcoder": (206_640_114, 263.8, 10.66, 0.52),
    "open_web_math": (6_117_786, 12.6, 6.93, 23.33),
    "fineweb_edu": (1_279_107_432, 1300, 63.75, 54.83),
    "wiki": (7_222_303, 3.7, 5.03, 0.14),
    "arxiv": (1_533_917, 28, 6.36, 1.32),
    "stackexchange": (29_249_120, 19.6, 5.03, 0.86),
    "algebraic_stack": (3_404_331, 12.6, 2.25, 1.26),
    "nemotron_science": (708_920, 2, None, 0.03),
    "nemotron_code": (10_108_883, 16, None, 0.72),
    "nemotron_math": (22_066_397, 15, None, 3.01),
    "cosmopedia": (31_064_744, 25, None, 2.70),
    "natural_reasoning": (1_145_824, 1.8, None, 3.18),
    "finemath": (48_283_984, 34, None, 8.01),
    "pes2o": (38_800_000, 50, None, 0.08),
}
# Millions of rows, percent of phase 1 and of phase 2. StarCoder is the source of Table 5, printed as 206 million rows.
TABLE_6 = {
    "dolmino_dclm": (606, 37.03, 6.51),
    "dolmino_flan": (57.3, 4.10, 0.72),
    "dolmino_pes2o": (38.8, 11.41, 2.01),
    "dolmino_wiki": (6.17, 2.66, 0.47),
    "dolmino_stackexchange": (2.48, 2.12, 2.00),
    "dolmino_math": (21, 11.63, 29.10),
    "nemotron_pretraining_code": (882, 20.69, 29.10),
    "nemotron_cc_math": (144, 3.45, 19.40),
    "starcoder": (206, 6.90, 9.70),
    BENCHMARK: (0.01, None, 0.97),
}
# Rows, and the phase that uses them.
TABLE_7 = {
    "tulu3": (866_000, "general"),
    "open_math_reasoning": (3_200_000, "reasoning"),
    "open_science_reasoning": (802_000, "reasoning"),
    "open_code_reasoning": (2_200_000, "reasoning"),
}
# The eight training sets behind the benchmark line of Table 6. The paper counts none of them: rows as their cards do.
BENCHMARK_ROWS = {
    "trivia_qa": 138_384,
    "openbookqa": 4_957,
    "natural_questions": 87_925,
    "piqa": 16_113,
    "gsm8k": 7_473,
    "boolq": 9_427,
    "arc_easy": 2_251,
    "arc_challenge": 1_119,
}


@dataclass(frozen=True)
class CatalogSource:
    """One line of the tables, or one of the benchmark sets that share a line.

    Attributes:
        name: what this catalog, and the column `source` of its rows, call it.
        hub_id: data set on the Hub.
        domain: the capability whose probing set it belongs to (section 2.1.1); "combined" for those in all three. Of
            sources beyond Table 5, what they are about.
        license: as the Hub tags it.
        rows: as printed; of benchmark sets, as their cards say.
        tokens: billions, where the table prints them.
        mix: stage -> the percentage printed for each of its phases. None is a dash. Benchmark sets repeat the one that
            they share; Table 7 prints none, there 100 says that the phase uses the set, all of it.
        columns: the text column; or those that `text_of` reads; or, of chat, either the messages, or the prompt and
            the response. None if unknown.
        subsets: configurations on the Hub that make up the source, or [None].
        split: on the Hub; "python+cpp" is both.
        data_files: patterns in the repository, or URLs, where a configuration will not do.
        text_of: composes a row's text from several columns.
        gated: the Hub asks for consent first.
        obstacle: why no name loads it, and the way round.
        unseen: what could not be checked.
        note: what is worth knowing before use.
    """

    name: str
    hub_id: str
    domain: str
    license: str | None
    rows: int
    tokens: float | None
    mix: Mapping[str, tuple[float | None, ...]]
    columns: tuple[str, ...] | None = ("text",)
    subsets: tuple[str | None, ...] = (None,)
    split: str = "train"
    data_files: tuple[str, ...] = ()
    text_of: Callable[[Mapping[str, Any]], str] | None = None
    gated: bool = False
    obstacle: str = ""
    unseen: str = ""
    note: str = ""

    @property
    def verified(self) -> bool:
        return not self.unseen

    @property
    def is_benchmark(self) -> bool:
        return self.name in BENCHMARK_ROWS

    @property
    def is_chat(self) -> bool:
        return self.name in TABLE_7


# How a row becomes text. The paper does not print its ways. The questions look as lm-evaluation-harness asks most of
# them, "Question: ...\nAnswer: ...", with the passage of BoolQ before; wrong choices are left out.


def _ask(question: str, answer: str) -> str:
    return f"Question: {question.strip()}\nAnswer: {answer.strip()}"


def _plain_text(row: Mapping[str, Any]) -> str:
    return _ask(row["question"], row["answer"])


def _trivia_text(row: Mapping[str, Any]) -> str:
    return _ask(row["question"], row["answer"]["value"])


def _list_text(row: Mapping[str, Any]) -> str:
    return _ask(row["question"], ", ".join(row["answer"]))


def _passage_text(row: Mapping[str, Any]) -> str:
    return f"{row['passage'].strip()}\n{_ask(row['question'], 'yes' if row['answer'] else 'no')}"


def _goal_text(row: Mapping[str, Any]) -> str:
    return _ask(row["goal"], row[("sol1", "sol2")[int(row["label"])]])


def _choice_text(row: Mapping[str, Any]) -> str:
    question = row["question_stem"] if "question_stem" in row else row["question"]
    return _ask(question, row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])])


def _turns_text(row: Mapping[str, Any]) -> str:
    return "\n\n".join([*(turn["content"].strip() for turn in row["input"]), row["output"].strip()])


def _reasoning_text(row: Mapping[str, Any]) -> str:
    """The question and the first model's response or, lacking one, the reference answer."""
    responses = [given["response"] for given in row["responses"] if given["response"]]
    return f"{row['question'].strip()}\n\n{(responses or [row['reference_answer']])[0].strip()}"


_NEMOTRON = "nvidia/Llama-Nemotron-Post-Training-Dataset"
_DOLMINO = "allenai/dolmino-mix-1124"
_REDPAJAMA = "togethercomputer/RedPajama-Data-1T"
_SCRIPT = "The repository has a loading script, which datasets 4 and later refuse; its files are read without it."
_ZST = "Reading .zst needs the package zstandard."
_NVIDIA = "NVIDIA Data Agreement for Model Training: training only."
_TURNS = dict(columns=("input", "output"), text_of=_turns_text, subsets=("SFT",))

# name -> data set, domain, licence, the rest. One paragraph a source reads better than one line a field.
# fmt: off
_DETAILS: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "starcoder": ("bigcode/starcoderdata", "code", "other", dict(
        columns=("content",), data_files=("*/train-*.parquet",), gated=True,
        unseen="whether the folders of issues, commits and notebooks have the column content",
        note="Those four folders have other columns than the languages, so no more than this one can be read of all. "
             "Every file keeps the licence of its repository.")),
    "open_web_math": ("open-web-math/open-web-math", "math", "odc-by", dict(
        note="The card counts 6,315,233 rows and 14.7B tokens.")),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "knowledge", "odc-by", dict(
        note="Its sample-10BT, sample-100BT and sample-350BT are subsets for less.")),
    "wiki": (_DOLMINO, "knowledge", "odc-by", dict(subsets=("wiki",),
        note="The same files as dolmino_wiki; Table 5 prints 7.22 million rows of them, Table 6 and the card 6.17.")),
    "arxiv": (_REDPAJAMA, "knowledge", None, dict(
        obstacle="its files are the URLs in its urls/arxiv.txt; download them and give their folder as name",
        note="The card refers to the licences of its parts.")),
    "stackexchange": (_REDPAJAMA, "code", None, dict(
        data_files=("https://data.together.xyz/redpajama-data-1T/v1.0.0/stackexchange/stackexchange.jsonl",),
        note="The card refers to the licences of its parts.")),
    "algebraic_stack": ("EleutherAI/proof-pile-2", "math", None, dict(
        data_files=("algebraic-stack/train/*.jsonl.zst",), note=f"The card names no licence. {_SCRIPT} {_ZST}")),
    "nemotron_science": (_NEMOTRON, "knowledge", "cc-by-4.0", dict(_TURNS, split="science")),
    "nemotron_code": (_NEMOTRON, "code", "cc-by-4.0", dict(_TURNS, split="code",
        note="The README links to code_v1.1.jsonl alone, the rows printed are those of the whole split.")),
    "nemotron_math": (_NEMOTRON, "math", "cc-by-4.0", dict(_TURNS, split="math",
        note="The README links to math_v1.1.jsonl alone, the rows printed are those of the whole split.")),
    "cosmopedia": ("HuggingFaceTB/cosmopedia", "combined", "apache-2.0", dict(
        subsets=("auto_math_text", "khanacademy", "openstax", "stanford", "stories", "web_samples_v1",
                 "web_samples_v2", "wikihow"))),
    "natural_reasoning": ("facebook/natural_reasoning", "combined", "cc-by-nc-4.0", dict(
        columns=("question", "reference_answer", "responses"), text_of=_reasoning_text,
        note="Not for commercial use.")),
    "finemath": ("HuggingFaceTB/finemath", "math", "odc-by", dict(subsets=("finemath-3plus",),
        note="The README links to this subset, whose tokens the table prints. It has 21.4 million rows; those printed "
             "are of all four subsets together.")),
    "pes2o": ("allenai/peS2o", "combined", "odc-by", dict(
        data_files=("data/v2/train-*.json.gz",), note=f"{_SCRIPT} Version 2 is the one of 38.8 million rows.")),
    "dolmino_dclm": (_DOLMINO, "knowledge", "odc-by", dict(subsets=("dclm",),
        note=f"The card gives this part CC-BY-4.0. {_ZST}")),
    "dolmino_flan": (_DOLMINO, "knowledge", "odc-by", dict(subsets=("flan",))),
    "dolmino_pes2o": (_DOLMINO, "combined", "odc-by", dict(subsets=("pes2o",))),
    "dolmino_wiki": (_DOLMINO, "knowledge", "odc-by", dict(subsets=("wiki",))),
    "dolmino_stackexchange": (_DOLMINO, "code", "odc-by", dict(subsets=("stackexchange",),
        note="The card gives this part CC-BY-SA.")),
    "dolmino_math": (_DOLMINO, "math", "odc-by", dict(
        data_files=("data/math/dolmino_math_synth/**/*.jsonl", "data/math/gsm8k/main/train/*.jsonl.zst",
                    "data/math/mathcoder2-synthmath/**/*.jsonl", "data/math/metamath-owmfilter/**/*.jsonl.gz",
                    "data/math/tinyGSM-MIND/**/*.jsonl.gz", "data/math/tulu_math/**/*.jsonl"),
        unseen="whether the files of these folders agree in their columns",
        note="Its configuration math also reads the test set of GSM8K, which these patterns leave out, and 7,270 rows "
             f"of CodeSearchNet with other columns. Parts are Apache-2.0, MIT and CC-BY-SA-4.0. {_ZST}")),
    "nemotron_pretraining_code": ("nvidia/Nemotron-Pretraining-Code-v1", "code", "other", dict(
        columns=None, subsets=("Synthetic-Code",), gated=True, unseen="the name of the text column",
        note=f"{_NVIDIA} Most of the rows printed are of the subset Nemotron-Code-Metadata, which has no text: it "
             "names repositories, commits and paths on GitHub.")),
    "nemotron_cc_math": ("nvidia/Nemotron-CC-Math-v1", "math", "other", dict(
        subsets=("3", "4plus", "4plus_MIND"), gated=True,
        unseen="which of the subsets were used",
        note=f"{_NVIDIA} All three have some 190 million rows, more than printed.")),
    "trivia_qa": ("mandarjoshi/trivia_qa", "knowledge", "unknown", dict(
        columns=("question", "answer"), subsets=("rc.nocontext",), text_of=_trivia_text,
        note="The rows of rc, to which the README links, without their evidence, which the text does not use.")),
    "openbookqa": ("allenai/openbookqa", "knowledge", "unknown", dict(
        columns=("question_stem", "choices", "answerKey"), subsets=("main",), text_of=_choice_text)),
    "natural_questions": ("google-research-datasets/nq_open", "knowledge", "cc-by-sa-3.0", dict(
        columns=("question", "answer"), subsets=("nq_open",), text_of=_list_text)),
    "piqa": ("baber/piqa", "knowledge", "unknown", dict(
        columns=("goal", "sol1", "sol2", "label"), text_of=_goal_text,
        note="A copy in Parquet of ybisk/piqa, whose loading script datasets 4 and later refuse; the licence is what "
             "the card of the original says.")),
    "gsm8k": ("openai/gsm8k", "math", "mit", dict(
        columns=("question", "answer"), subsets=("main",), text_of=_plain_text)),
    "boolq": ("google/boolq", "knowledge", "cc-by-sa-3.0", dict(
        columns=("question", "answer", "passage"), text_of=_passage_text)),
    "arc_easy": ("allenai/ai2_arc", "knowledge", "cc-by-sa-4.0", dict(
        columns=("question", "choices", "answerKey"), subsets=("ARC-Easy",), text_of=_choice_text)),
    "arc_challenge": ("allenai/ai2_arc", "knowledge", "cc-by-sa-4.0", dict(
        columns=("question", "choices", "answerKey"), subsets=("ARC-Challenge",), text_of=_choice_text)),
    "tulu3": ("allenai/tulu-3-sft-olmo-2-mixture-0225", "combined", None, dict(
        columns=("messages",), note="The card names no licence; the mixture before it was odc-by.")),
    "open_math_reasoning": ("nvidia/OpenMathReasoning", "math", "cc-by-4.0", dict(
        columns=("problem", "generated_solution"), split="cot", note="The split cot is the one of 3.2 million rows.")),
    "open_science_reasoning": ("nvidia/OpenScienceReasoning-2", "knowledge", "cc-by-4.0", dict(
        columns=("input", "output"))),
    "open_code_reasoning": ("nvidia/OpenCodeReasoning-2", "code", "cc-by-4.0", dict(
        columns=("question", "r1_generation"), subsets=("train",), split="python+cpp",
        unseen="which revision has the 2.2 million rows printed; the card says 2.57",
        note='The column question holds "-": the text is looked up in TACO, APPS, CodeContests or open-r1/codeforces '
             "by the columns dataset, split and index.")),
}
# fmt: on


def _source(name: str) -> CatalogSource:
    hub_id, domain, license, details = _DETAILS[name]
    tokens, mix = None, {}
    if name in TABLE_6:
        millions, *mix[MID] = TABLE_6[name]
        rows = round(millions * 1_000_000)
    if name in TABLE_5:
        rows, tokens, *mix[PRE] = TABLE_5[name]
    if name in BENCHMARK_ROWS:
        rows, mix[MID] = BENCHMARK_ROWS[name], TABLE_6[BENCHMARK][1:]
    if name in TABLE_7:
        rows, used_in = TABLE_7[name]
        mix[POST] = [100 if phase == used_in else None for phase in PHASES[POST]]
    mix = {stage: tuple(percentages) for stage, percentages in mix.items()}
    return CatalogSource(name, hub_id, domain, license, rows, tokens, mix, **details)


SOURCES = {name: _source(name) for name in _DETAILS}
