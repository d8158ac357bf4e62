"""From raw corpora to small sets that stand for them, and to capability probes (section 2.1.1 of the paper).

stages.py          what a step is, and `curate`, which runs several
scoring.py         what a model says of every document: any number of processes, shards, resumable
text_filter.py     what is no text
quality.py         a classifier, FineWeb-Edu's or another
ask_llm.py         a causal LM as judge; its prompts are files in prompts/
contamination.py   what benchmarks contain
deduplication.py   near-duplicates by embeddings; kept_index.py, exact neighbours
representative.py  the hierarchy of these
probes.py          probe sets, and what training shares with them
funnel.py          what each step kept: table, picture, documents to read
estimate.py        what it would cost
corpus.py          documents of corpora and streams; arguments.py, a recipe's YAML file
small_judge.py     a judge for where none can be downloaded
"""

from mobilellm_hf.curation.ask_llm import AskLLM, Judge, JudgeError, load_prompt
from mobilellm_hf.curation.contamination import load_benchmarks
from mobilellm_hf.curation.deduplication import Embedder, deduplicate
from mobilellm_hf.curation.probes import compose_probes, keep_out, shared_with_training
from mobilellm_hf.curation.quality import QualityClassifier
from mobilellm_hf.curation.representative import AtMost, Decontamination, SemanticDeduplication, domain_prompts
from mobilellm_hf.curation.stages import AllRejectedError, Curation, CurationStage, curate
from mobilellm_hf.curation.text_filter import TextFilter

__all__ = [
    "AllRejectedError",
    "AskLLM",
    "AtMost",
    "Curation",
    "CurationStage",
    "Decontamination",
    "Embedder",
    "Judge",
    "JudgeError",
    "QualityClassifier",
    "SemanticDeduplication",
    "TextFilter",
    "compose_probes",
    "curate",
    "deduplicate",
    "domain_prompts",
    "keep_out",
    "load_benchmarks",
    "load_prompt",
    "shared_with_training",
]
