"""What decides the models of an audit, the data, the tokenizer and the teacher by their content and not their path.

    Workspace(folder, settings_of(args, training, tokenizer))       # refuses the folder of another audit

Files are known by the SHA-256 of their content, above 64 MiB by size and time of change: so a large file that was only
copied anew is refused too, and what is on the Hub is known by its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import mobilellm_hf
from mobilellm_hf.audit.arguments import AuditArguments, AuditTrainingArguments
from mobilellm_hf.data.local_files import find_files, looks_local
from mobilellm_hf.data.rows import expand_entry
from mobilellm_hf.influence.leave_one_out_rows import streamed_sources
from mobilellm_hf.influence.scoring import ScoringCheckpoint
from mobilellm_hf.training.stage import DECISIVE

# What audits in one folder may differ in: which arms there are, and what is made of them.
ARM_FIELDS = (
    "mixture", "arms", "seeds", "others", "scores", "other_scores", "score_rule", "loss_model", "teacher",
)  # fmt: skip
UNSHARED = ("learning_rates", "curation_share", "proxy_share", "alpha")
# Of larger files the content is not read.
HASHED_BYTES = 64 * 2**20


def settings_of(
    args: AuditArguments, training: AuditTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What decides a model of given weights, steps, seed and learning rate, which are its own."""
    settings = dataclasses.asdict(args) | {name: getattr(training, name) for name in DECISIVE}
    settings["mixed_precision"] = getattr(training, "mixed_precision", None)  # which accelerate's file can say, too
    settings |= {"rows_per_step": training.global_batch(), "mobilellm_hf": mobilellm_hf.__version__}
    settings |= {"tokenizer_sha256": tokenizer_digest(tokenizer), "data_digests": data_digests(args)}
    for name in (*ARM_FIELDS, *UNSHARED, "seed", "dry_run", "attn_implementation"):
        if name != "curation_share" or not streamed_sources(args.sources):  # it says how much of a stream is kept
            del settings[name]
    return settings


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, of the rules where they are at hand, and of the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return hashlib.sha256(f"{rules} {sorted(tokenizer.special_tokens_map.items())}".encode()).hexdigest()


def data_digests(args: AuditArguments) -> dict[str, str]:
    """ "sources" and each probe -> a digest of all its local files; absent where there are none."""
    groups = {"sources": args.sources, **args.probes()}
    found = {}
    for name, entries in groups.items():
        digest, files = hashlib.sha256(), 0
        for entry in entries:
            for file in _files(entry):
                digest.update(_identity(file))
                files += 1
        if files:
            found[name] = digest.hexdigest()
    return found


def _files(entry: Mapping[str, Any]) -> Iterator[Path]:
    """The local files that an entry of a YAML file reads, and those whose documents it leaves out."""
    excluded = entry.get("exclude", ())
    places = [(name, None) for name in ([excluded] if isinstance(excluded, str) else excluded)]
    for given in expand_entry(entry):
        place = given.get("rows", given.get("name"))
        if "rows" in given or looks_local(place):
            places.append((place, given.get("data_files")))
    for place, patterns in places:
        folder = Path(place).expanduser()
        if folder.is_dir() and patterns is None:
            yield from sorted(file for file in folder.rglob("*") if file.is_file())
        else:
            yield from find_files(place, [patterns] if isinstance(patterns, str) else patterns)[1]


def _identity(file: Path) -> bytes:
    """Of the content alone, or above 64 MiB of size and time of change; not of the path, which the settings have."""
    status = file.stat()
    if status.st_size > HASHED_BYTES:
        return f"{status.st_size} {status.st_mtime_ns}".encode()
    return hashlib.sha256(file.read_bytes()).digest()


def teacher_digest(teacher: str) -> str:
    """Eight digits that identify a teacher's weights, or its commit on the Hub: of the folder of what it taught."""
    identity = ScoringCheckpoint(teacher, None, 0, (), "teacher").digest()
    return hashlib.sha256((identity or teacher).encode()).hexdigest()[:8]
