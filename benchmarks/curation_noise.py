"""The whole curation: which noise each of its steps removes, and what memory it takes as the data grow.

    python benchmarks/curation.py --only noise,memory

Noise: documents of the embedded corpus's held-out files, and 30% noise of six kinds in equal parts. The judge was
trained on other files of the same sources, for what `small_judge` teaches: whole or damaged, and which domain. Words
out of order and repeated lines are among the damages that it was taught; licences and menus are not. Of a document and
its near-duplicate, which are as good as each other, the one that falls first counts as the copy.

Memory: `curate` in a fresh process for 1, 2 and 4 times the documents, mapped from disk, all steps with their models.
A judge with random weights takes what one with others does.
"""

import argparse
import functools
import json
import random
import re
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from common import _status_bytes as status_bytes
from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars, load_from_disk
from rich.console import Console
from rich.table import Table

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.curation.ask_llm import AskLLM, Judge
from mobilellm_hf.curation.contamination import load_benchmarks
from mobilellm_hf.curation.deduplication import Embedder
from mobilellm_hf.curation.representative import Decontamination, SemanticDeduplication
from mobilellm_hf.curation.small_judge import GENERAL, PROMPTS, repeat_lines, shuffle_words, train_judge
from mobilellm_hf.curation.stages import KEPT, Curation, CurationStage, curate
from mobilellm_hf.curation.text_filter import TextFilter
from mobilellm_hf.data.embedded import load_embedded_corpus
from mobilellm_hf.data.tokenization import train_tokenizer

CLEAN = ("stdlib", "test_suites", "sympy_docs", "sympy_code", "python_reference", "numpy_docs")
KINDS = ("shuffled", "boilerplate", "near-duplicate", "other domain", "binary", "benchmark")
NONE, COPY = "clean", "near-duplicate"
SHARE = 0.3
JUDGE_TOKENS = 64
MENU = "Home|Products|About us|Contact|Log in|Sign up|Privacy policy|Terms of use|Cookies|Careers|Press|Share|Help"


@functools.cache
def embedded(*sources: str) -> DatasetDict:
    return load_embedded_corpus(sources or None)


# The mix


def benchmark_items(args: argparse.Namespace, folder: Path) -> list[dict]:
    """The entry of a benchmark, for `load_benchmarks`: a file that was given, or generated word problems."""
    if args.benchmark_file:
        return [{"name": "given", "path": args.benchmark_file, "columns": [args.benchmark_column]}]
    rng, rows = random.Random(1), []
    for _ in range(500):
        who, other = rng.sample("Ada Bo Chen Dora Emil Fay Gus Hana Ivo June".split(), 2)
        what = rng.choice("apples marbles stamps books coins shells pencils tickets".split())
        a, b, c = rng.randint(12, 99), rng.randint(2, 9), rng.randint(3, 60)
        rows.append(
            f"{who} has {a} {what} and buys {b} boxes with {c} {what} in each of them. {who} gives a third of all "
            f"the {what} to {other}, who had {rng.randint(2, 40)} before. How many {what} does {other} have now?"
        )
    file = folder / "items.jsonl"
    file.write_text("\n".join(json.dumps({args.benchmark_column: row}) for row in rows))
    return [{"name": "word problems", "path": str(file), "columns": [args.benchmark_column]}]


def near_copy(text: str, words: list[str], rng: random.Random) -> str:
    """One word in fifty replaced by another of the corpus, one at least; blanks at line ends, more blank lines."""
    parts = re.split(r"(\s+)", text)
    places = [place for place, part in enumerate(parts) if part.strip()]
    for place in rng.sample(places, max(1, len(places) // 50)):
        parts[place] = rng.choice(words)
    lines = "".join(parts).split("\n")
    return "\n".join(line + rng.choice(("", " ")) if line.strip() else rng.choice(("", "\n")) for line in lines)


def boilerplate(text: str, licence: str, rng: random.Random) -> str:
    """A licence, a menu or lines repeated, as likely."""
    kind = rng.randrange(3)
    if kind == 0:
        return licence
    menu = MENU.split("|")
    return repeat_lines(text, rng) if kind == 1 else "\n".join(rng.choice(menu) for _ in range(rng.randint(40, 200)))


def with_item(text: str, item: str, rng: random.Random) -> str:
    lines = text.split("\n")
    lines.insert(rng.randint(0, len(lines)), item)
    return "\n".join(lines)


def mixed(documents: Dataset, licences: list[str], items: list[str], seed: int = 0) -> tuple[Dataset, np.ndarray]:
    """Documents with the column `kind`, in random order, and (N,) the row that each near-duplicate copies, else -1."""
    rng, rows = random.Random(seed), documents.shuffle(seed=seed).to_list()
    # Three kinds use documents up; the share of noise is that of the mix.
    per_kind = round(SHARE * len(rows) / (len(KINDS) - (len(KINDS) - 3) * SHARE))
    shuffled, foreign, pasted = (rows[number * per_kind : (number + 1) * per_kind] for number in range(3))
    clean = rows[3 * per_kind :]
    words = [word for row in clean for word in row["text"].split()]
    out = [row | {"kind": NONE, "copy_of": -1} for row in clean]
    copied = rng.sample(range(len(clean)), per_kind)

    def add(kind: str, row: dict, text: str, copy_of: int = -1) -> None:
        out.append(row | {"text": text, "kind": kind, "copy_of": copy_of})

    for number in range(per_kind):
        like = rng.choice(clean)
        add("shuffled", shuffled[number], shuffle_words(shuffled[number]["text"], rng))
        add("boilerplate", like, boilerplate(like["text"], rng.choice(licences), rng))
        add(COPY, clean[copied[number]], near_copy(clean[copied[number]]["text"], words, rng), copied[number])
        home = rng.choice([row for row in clean if row["domain"] != foreign[number]["domain"]])
        add("other domain", home, foreign[number]["text"])
        add("binary", like, rng.randbytes(rng.randint(300, 3_000)).decode("utf-8", "replace"))
        add("benchmark", pasted[number], with_item(pasted[number]["text"], rng.choice(items), rng))
    order = rng.sample(range(len(out)), len(out))
    places = np.argsort(order)
    copies = [out[row]["copy_of"] for row in order]
    mix = Dataset.from_list([{name: out[row][name] for name in ("text", "source", "domain", "kind")} for row in order])
    return mix, np.array([places[row] if row >= 0 else -1 for row in copies])


# The hierarchy


def small_model(tokenizer) -> MobileLLMForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    return MobileLLMForCausalLM(MobileLLMConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **ids))


def hierarchy(judge: Judge, folder: Path, domains: dict[str, str], benchmarks: list[dict], options: dict) -> list:
    """The steps in the paper's order, with the prompts that the judge knows; there is no quality classifier."""
    for name, text in PROMPTS.items():
        (folder / f"{name}.txt").write_text(text)
    by_source = {source: folder / f"{domain}.txt" for source, domain in domains.items()}
    embedder = Embedder(options["embedder"], max_length=options["embed_length"], device="cpu")
    return [
        TextFilter(),
        AskLLM(judge, folder / f"{GENERAL}.txt", top=options["general_top"], name="ask-general"),
        AskLLM(judge, by_source, top=options["domain_top"], name="ask-domain"),
        Decontamination(load_benchmarks(benchmarks)),
        SemanticDeduplication(embedder, per_source=options["per_source"]),
    ]


def held_out(names: tuple[str, ...]) -> Dataset:
    splits = embedded(*names)
    return concatenate_datasets([splits["probe"], splits["test"]])


def trained_judge(args: argparse.Namespace) -> Judge:
    documents = embedded(*CLEAN)["train"]
    tokenizer = train_tokenizer(documents["text"], 4_096, show_progress=False)
    with Console(stderr=True).status("") as status:
        done: list[float] = []

        def on_step(loss: float) -> None:
            done.append(loss)
            loss = np.mean(done[-20:])
            status.update(f"training the judge: {len(done)} of {args.judge_steps} steps, loss {loss:.3f}")

        model, options = small_model(tokenizer), {"max_length": JUDGE_TOKENS, "on_step": on_step}
        return train_judge(model, tokenizer, documents, steps=args.judge_steps, **options)


def noise_table(args: argparse.Namespace) -> None:
    judge, documents = trained_judge(args), held_out(CLEAN)
    documents = documents.shuffle(seed=0).select(range(min(args.noise_documents, len(documents))))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        benchmarks = benchmark_items(args, folder)
        (items,) = load_benchmarks(benchmarks).items.values()
        mix, copy_of = mixed(documents, held_out(("licences",))["text"][:], list(items))
        domains = dict(zip(documents["source"][:], documents["domain"][:], strict=True))
        options = {"general_top": args.general_top, "domain_top": args.domain_top, "per_source": None}
        options |= {"embedder": args.embedder, "embed_length": None}
        stages = hierarchy(judge, folder, domains, benchmarks, options)
        result = curate(mix, stages, folder / "run")
        fell = steps_of_falling(result, len(mix))
    kinds = np.array(mix["kind"][:])
    for row in np.flatnonzero(copy_of >= 0):
        original = copy_of[row]
        if fell[original] < fell[row]:  # as good as each other: the first that falls is the copy
            kinds[row], kinds[original] = NONE, COPY
    print_noise(args, stages, kinds, fell, judge_auc(judge, mix, domains, stages))


def steps_of_falling(result: Curation, count: int) -> np.ndarray:
    """(N,) the number of the step at which a document fell, or of steps if it stayed."""
    fell = np.full(count, len(result.reports))
    for number, report in enumerate(result.reports):
        table = report.table(["document", "reason"])
        gone = np.array(table["reason"].to_pylist()) != KEPT
        fell[table["document"].to_numpy()[gone]] = number
    return fell


def judge_auc(judge: Judge, mix: Dataset, domains: dict[str, str], stages: list[CurationStage]) -> dict[str, dict]:
    """step -> kind -> how often a clean document has the better score. Of all documents, fallen before or not."""
    kinds, found = np.array(mix["kind"][:]), {}
    for stage in stages[1:3]:
        scores = stage.score(mix["text"][:], mix["source"][:])["score"]
        good = scores[kinds == NONE][:, None]
        bad = {kind: scores[kinds == kind] for kind in KINDS}
        found[stage.name] = {kind: (good > bad[kind]).mean() + (good == bad[kind]).mean() / 2 for kind in KINDS}
    return found


def print_noise(args: argparse.Namespace, stages: list, kinds: np.ndarray, fell: np.ndarray, auc: dict) -> None:
    clean = kinds == NONE
    table = Table(
        title=f"What falls where: {clean.sum():,} documents and {(~clean).sum():,} of noise; ask-general keeps "
        f"{args.general_top:.0%} of each source, ask-domain {args.domain_top:.0%} of the rest"
    )
    for column in ("step", *(f"{kind} ({(kinds == kind).sum()})" for kind in KINDS), f"clean ({clean.sum():,})"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=column == "step")
    for column in ("fall", "noise", "so far"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(stages):
        here, so_far = fell == number, fell <= number
        shares = [f"{here[kinds == kind].mean():.1%}" for kind in (*KINDS, NONE)]
        precision = [f"{(~clean)[rows].mean():.1%}" if rows.any() else "-" for rows in (here, so_far)]
        table.add_row(stage.name, *shares, f"{here.sum():,}", *precision)
    gone = fell < len(stages)
    shares = [f"{gone[kinds == kind].mean():.1%}" for kind in (*KINDS, NONE)]
    table.add_row("all", *shares, f"{gone.sum():,}", f"{(~clean)[gone].mean():.1%}", "")
    for name, areas in auc.items():
        table.add_row(f"AUC of {name}", *(f"{areas[kind]:.3f}" for kind in KINDS), "", "", "", "")
    console = Console(width=175)
    console.print(table)
    left, before = (~clean)[~gone].mean(), (~clean).mean()
    console.print(f"Noise in the mix {before:.1%}, in what stays {left:.1%} of {(~gone).sum():,} documents")


# Memory


def write_documents(folder: Path, count: int) -> None:
    """So many documents: those of the embedded corpus, and again from other lines on, so that all differ."""
    splits = embedded()
    rows = concatenate_datasets([splits[name] for name in sorted(splits)]).shuffle(seed=0).to_list()

    def documents():
        for number in range(count):
            row, turn = rows[number % len(rows)], number // len(rows)
            lines = row["text"].split("\n")
            start = turn * len(lines) // 8
            yield row | {"text": "\n".join([f"Part {turn}.", *lines[start:], *lines[:start]])}

    Dataset.from_generator(documents, cache_dir=str(folder / "cache")).save_to_disk(folder / "documents")


def curate_alone(folder: Path, options: dict, benchmarks: list[dict]) -> dict[str, float]:
    """Bytes at the peak of a curation in this process: all, and without pages that are mapped from files."""
    torch.set_num_threads(1)
    disable_progress_bars()
    anonymous, ended = [status_bytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            anonymous[0] = max(anonymous[0], status_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    documents = load_from_disk(folder / "documents")
    domains = dict(zip(documents["source"][:1_000], documents["domain"][:1_000], strict=True))
    judge = Judge(folder.parent / "judge", max_length=JUDGE_TOKENS, chat=False)
    result = curate(documents, hierarchy(judge, folder, domains, benchmarks, options), folder / "run")
    ended.set()
    watcher.join()
    found = {"kept": len(result.documents), "bytes": documents.data.nbytes}
    found["compared"] = result.reports[-1].table(["document"]).num_rows
    return found | {"peak": status_bytes("VmHWM"), "anonymous": anonymous[0]}


def memory_table(args: argparse.Namespace) -> None:
    texts = embedded("stdlib", "numpy_docs")["train"]["text"]
    tokenizer = train_tokenizer(texts, 4_096, show_progress=False)
    options = {"general_top": 0.5, "domain_top": 0.5, "per_source": 200, "embedder": args.embedder, "embed_length": 16}
    table = Table(title=f"Peak memory of a curation in a process of its own, {options['per_source']} a source at most")
    columns = ("documents", "MB of text", "compared", "kept", "peak MiB", "ratio", "without files, MiB", "ratio")
    for column in columns:
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as temporary:
        small_model(tokenizer).save_pretrained(f"{temporary}/judge")
        tokenizer.save_pretrained(f"{temporary}/judge")
        benchmarks, first = benchmark_items(args, Path(temporary)), None
        for scale in (1, 2, 4):
            folder, count = Path(temporary) / str(scale), scale * args.memory_documents
            folder.mkdir()
            write_documents(folder, count)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found = pool.submit(curate_alone, folder, options, benchmarks).result()
            first = first or found
            cells = [f"{count:,}", f"{found['bytes'] / 1e6:.1f}", f"{found['compared']:,}", f"{found['kept']:,}"]
            for name in ("peak", "anonymous"):
                cells += [f"{found[name] / 2**20:,.0f}", f"{found[name] / first[name]:.2f}"]
            table.add_row(*cells)
    Console(width=120).print(table)
