"""From the embedded corpus to rows: a small judge is trained, and chooses what stands for each source.

No judge can be had without a download, so the quickstart trains one on the corpus itself: it tells whole documents
from damaged ones, and the domains from each other. That is all it knows; see `curation.small_judge`.
"""

from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from mobilellm_hf.curation.ask_llm import AskLLM, Judge
from mobilellm_hf.curation.deduplication import Embedder
from mobilellm_hf.curation.funnel import FunnelStep, funnel, plot_funnel, write_samples
from mobilellm_hf.curation.representative import SemanticDeduplication
from mobilellm_hf.curation.scoring import sources_of
from mobilellm_hf.curation.small_judge import GENERAL, PROMPTS, train_judge
from mobilellm_hf.curation.stages import curate
from mobilellm_hf.curation.text_filter import TextFilter
from mobilellm_hf.data.corpora import load_corpus
from mobilellm_hf.data.documents import FirstSeen, cut_document
from mobilellm_hf.data.embedded import SOURCES, load_embedded_corpus
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.modeling import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.progress import Stage
from mobilellm_hf.quickstart.settings import JUDGE, PROBES, STUDENT, Settings, Shape
from mobilellm_hf.workspace import Workspace

JUDGE_TOKENS = 64  # of prompt and document
EMBEDDED_TOKENS = 64
# The splits from which the hierarchy chooses what stands for each source, and what these become.
CURATED = {"train": "candidates", "probe": "probe"}


def load_extra_source(entry: str) -> Dataset:
    """`DOMAIN:PATH_OR_ID` as documents of a few thousand characters."""
    domain, _, name = entry.partition(":")
    if domain not in PROBES or not name:
        raise ValueError(f"--extra-source {entry!r}: write DOMAIN:PATH_OR_ID, DOMAIN one of {', '.join(PROBES)}")
    rows = [
        {"text": piece, "source": row["source"], "domain": domain}
        for row in load_corpus(name, domain=domain)
        for piece in cut_document(row["text"])
    ]
    return Dataset.from_list(rows)


def build_corpus(workspace: Workspace, settings: Settings, stage: Stage) -> DatasetDict:
    def build(path: Path) -> None:
        # First, so that a misspelt file is found before anything is read.
        extras = [load_extra_source(entry) for entry in settings.extra_source]
        corpus = load_embedded_corpus()
        names = [*SOURCES, *(extra[0]["source"] for extra in extras)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}: rename the file of one --extra-source")
        # The probes are the embedded corpus's own, so an extra source is for training alone.
        known = FirstSeen()
        for split in corpus.values():
            known.batch(split["text"][:])
        extras = [extra.filter(known.batch, input_columns="text", batched=True) for extra in extras]
        corpus["train"] = concatenate_datasets([corpus["train"], *extras])
        corpus.save_to_disk(path)

    corpus = load_from_disk(workspace.once("corpus", build))
    size = sum(len(text.encode()) for split in corpus.values() for text in split["text"][:])
    stage.say(f"{len(set(corpus['train']['source'][:]))} sources, {size / 1e6:.1f} MB of text")
    return corpus


def build_tokenizer(workspace: Workspace, settings: Settings, corpus: DatasetDict) -> PreTrainedTokenizerBase:
    def build(path: Path) -> None:
        texts = corpus["train"]["text"][:]
        train_tokenizer(texts, settings.vocab_size, show_progress=False).save_pretrained(path)

    return AutoTokenizer.from_pretrained(workspace.once("tokenizer", build))


def build_judge(
    workspace: Workspace, settings: Settings, tokenizer: PreTrainedTokenizerBase, corpus: DatasetDict, stage: Stage
) -> Judge:
    """Trained on the training documents, and saved with its prompts, so that `recipes/curate.py` can use it too."""

    def build(path: Path) -> None:
        set_seed(settings.seed)
        stage.expect(settings.judge_steps)
        model = MobileLLMForCausalLM(model_config(settings, JUDGE, tokenizer)).to(PartialState().device)
        losses = []

        def on_step(loss: float) -> None:
            losses.append(loss)
            stage.advance()
            stage.say(f"loss {np.mean(losses[-20:]):.3f}")

        train_judge(
            model, tokenizer, corpus["train"], steps=settings.judge_steps, max_length=JUDGE_TOKENS,
            seed=settings.seed, on_step=on_step,
        )  # fmt: skip
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "prompts").mkdir()
        for name, text in PROMPTS.items():
            (path / "prompts" / f"{name}.txt").write_text(text)

    folder = workspace.once("judge", build)
    return Judge(folder, max_length=JUDGE_TOKENS, chat=False)


def build_curation(
    workspace: Workspace, settings: Settings, judge: Judge, corpus: DatasetDict, stage: Stage
) -> tuple[DatasetDict, list[FunnelStep]]:
    """The documents that stand for each source: of its training files the candidates to score, of others the probes.

    Returns them as splits, and the funnel of the candidates.
    """
    prompts = {name: workspace.folder / "judge" / "prompts" / f"{name}.txt" for name in PROMPTS}
    sizes = {split: limit_per_source(corpus[split], settings) for split in CURATED}
    stage.expect(sum(map(len, sizes.values())))
    found, steps = {}, []
    for split, name in CURATED.items():
        documents = sizes[split]
        domains = dict(zip(documents["source"][:], documents["domain"][:], strict=True))
        hierarchy = [
            TextFilter(),
            AskLLM(judge, prompts[GENERAL], top=0.5, name="ask-general"),
            AskLLM(judge, {source: prompts[domain] for source, domain in domains.items()}, top=0.5, name="ask-domain"),
            SemanticDeduplication(Embedder(max_length=EMBEDDED_TOKENS)),
        ]
        result = curate(documents, hierarchy, workspace.folder / "curation" / name)
        workspace.claim()
        stage.advance(len(documents))
        found[name] = result.documents
        if split == "train":
            steps = funnel(result.reports, list(domains))
            plot_funnel(steps, workspace.folder / "curation" / "funnel.png")
            write_samples(documents, result.reports, workspace.folder / "curation" / "samples.md", 2, settings.seed)
    kept = [f"{len(found[name]):,} of {len(sizes[split]):,} {name}" for split, name in CURATED.items()]
    stage.say(f"documents that stand for the rest: {', '.join(kept)}")
    return DatasetDict(found), steps


def limit_per_source(documents: Dataset, settings: Settings) -> Dataset:
    """A random choice of each source's documents."""
    codes, names = sources_of(documents)
    rng = np.random.default_rng(settings.seed)
    chosen = [rng.permutation(np.flatnonzero(codes == n))[: settings.documents_per_source] for n in range(len(names))]
    return documents.select(np.sort(np.concatenate(chosen)))


def build_rows(
    workspace: Workspace,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    corpus: DatasetDict,
    curated: DatasetDict,
    stage: Stage,
) -> DatasetDict:
    """Packed rows: all of "train" and "test", and of the curated documents "candidates" and "probe"."""

    def build(path: Path) -> None:
        packed = {}
        for name, split in {"train": corpus["train"], "test": corpus["test"], **curated}.items():
            packed[name], report = tokenize_and_pack(split, tokenizer, settings.seq_length, config=config)
            for line in report.sources:
                if line.rows == 0:
                    raise ValueError(
                        f"the source {line.source!r} has {line.tokens} tokens for {name}, less than one row of "
                        f"{settings.seq_length}: add text or raise --documents-per-source, in another output folder"
                    )
        DatasetDict(packed).save_to_disk(path)

    config = model_config(settings, STUDENT, tokenizer)
    rows = load_from_disk(workspace.once("rows", build))
    tokens = len(rows["train"]) * settings.seq_length
    stage.say(f"vocabulary {len(tokenizer):,}, {tokens / 1e6:.1f} M training tokens in rows of {settings.seq_length}")
    return rows


def model_config(settings: Settings, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> MobileLLMConfig:
    return MobileLLMConfig(
        vocab_size=settings.vocab_size,
        max_position_embeddings=settings.seq_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **vars(shape),
    )


def sample_rows(rows: Dataset, sources: tuple[str, ...], count: int, seed: int) -> Dataset:
    """Up to `count` random rows of the given sources."""
    chosen = rows.select([i for i, source in enumerate(rows["source"][:]) if source in sources]).shuffle(seed=seed)
    return chosen.select(range(min(count, len(chosen))))
