"""A release before it is sent: every file of it, the card last, in a folder where a person can look at it.

    release = package_model(Path("runs/140M/midtrain-stage1/MobileLLM-R1-140M-midtrain-stage1"), Target(repo, stage))
    release.write_preview()             # MODEL-release/: README.md, card.html, files.txt and the pictures
    release.refuse_leaks(token)

Weights stay where they are. Nothing here touches the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mobilellm_hf.hub.blocks import Record, code_blocks, run_block, staged_hub, weights_of
from mobilellm_hf.hub.cards import (
    license_of,
    model_metadata,
    render,
    to_html,
)
from mobilellm_hf.hub.contents import find_pictures, run_files, twin_files
from mobilellm_hf.hub.context import context_of
from mobilellm_hf.hub.facts import ModelFacts
from mobilellm_hf.hub.files import CARD, ReleaseFile, files_table, model_files
from mobilellm_hf.hub.leaks import scan
from mobilellm_hf.hub.ledger import LEDGER, Ledger
from mobilellm_hf.hub.programs import Program
from mobilellm_hf.hub.sources import SourceFacts, is_hub_id
from mobilellm_hf.hub.stages import ON_DEVICE, TEMPLATES, Target
from mobilellm_hf.workspace import write_whole

RECORD = "verification.json"


@dataclass(frozen=True)
class Release:
    """What is sent as one commit.

    Attributes:
        files: all of them, the card among them.
        left_out: of the model's folder, and why.
        notes: what a person should know before it is sent.
        licenses: of the data, by source.
        folder: where it is looked at, and what remembers what was sent from here.
        summary: what a collection says of it.
        license: of what is released, and who says so.
    """

    target: Target
    files: list[ReleaseFile]
    folder: Path
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    licenses: dict[str, str] = field(default_factory=dict)
    summary: str | None = None
    license: str | None = None

    @property
    def card(self) -> str:
        return next(file for file in self.files if file.path == CARD).read().decode()

    def write_preview(self) -> Path:
        """card.html and what it shows, README.md and files.txt; returns the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if file.path == CARD or file.path.endswith(".png"):
                write_whole(self.folder / file.path, lambda path, file=file: path.write_bytes(file.read()))
        page = self.folder / "card.html"
        title = f"{self.target.repo}, {self.target.branch}"
        write_whole(page, lambda path: path.write_text(to_html(self.card, title)))
        with (self.folder / "files.txt").open("w") as stream:
            Console(file=stream, width=119).print(files_table(self.files, self.left_out.items()))
        return page

    def refuse_leaks(self, token: str | None, accepted: Sequence[str] = ()) -> None:
        """Raises a ValueError that lists what must not be published.

        Args:
            token: of this session, which is looked for as it is.
            accepted: files whose findings have been looked at, and are none.
        """
        found = [finding for finding in scan(self.files, token) if finding.path not in accepted]
        if found:
            lines = "\n".join(f"  {finding}" for finding in found)
            raise ValueError(
                f"this must not be published:\n{lines}\nRemove it; or, if it is none, name the file under accept"
            )

    def rehearse(self, say: Callable[[str], object] = lambda name: None) -> Record:
        """Runs the card's blocks on these files as if they had been downloaded, and remembers which were run.

        Those that were run before with the same code and weights are not run again.

        Raises:
            BlockError: one of them fails.
        """
        weights, path = weights_of(self.files), self.folder / RECORD
        record = Record.load(path)
        if record.weights != weights:
            record = Record()
        with staged_hub(self.target.repo, self.target.branch, self.files) as environment:
            for block in code_blocks(self.card).values():
                if not block.obstacle() and not record.knows(block):
                    say(block.name)
                    run_block(block, environment)
                    record.note(block, weights, "these files, before they were sent")
                    record.save(path)
        return record


def release_folder(folder: Path) -> Path:
    """Beside a model or a data set: where a person looks at its release."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-release")


def package_model(
    folder: str | Path,
    target: Target,
    *,
    evaluation: Path | None = None,
    pte: Path | None = None,
    llama4: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    staging: Path | None = None,
) -> Release:
    """A model's release.

    Args:
        folder: of the model and its tokenizer, in the folder of its run.
        evaluation: what `recipes/evaluate.py` left.
        pte: what `recipes/export.py` made of the model, the folder or the .pte in it. Of the stage on-device it takes
            the place of the weights.
        llama4: whether `llama4_text/` is in it.
        license: of the weights, as the Hub calls it; by default what the metadata of the folder's own card say. None
            is not written into the card.
        base_model: Hub id; by default that of the settings, or where the stage before was released from here; of the
            stage on-device, where the model was.
        staging: where it is looked at; by default beside the model, or beside the program that takes its place.

    Raises:
        ValueError: a folder is not whole, or an option does not fit the stage; the message names it.
    """
    folder = Path(folder)
    files, left_out = model_files(folder)
    program = _program(pte, folder, target, llama4)
    alone = program is not None and target.stage == ON_DEVICE
    facts = ModelFacts(folder, evaluation, program if alone else None)
    if alone:
        files, left_out = [], {}
    if llama4:
        files += twin_files(folder, files)
    if program is not None:
        files += program.files(alone)
    pictures, picture_files = find_pictures(facts, evaluation)
    files += picture_files
    staging = staging or release_folder(program.folder if alone else folder)
    said_by = "as the option license says" if license else f"as {folder / CARD} says"
    license = license or license_of(folder / CARD)
    context = context_of(target, facts, pictures, program, llama4, license)
    context["card_data"] = _metadata(target, facts, program, license, base_model)
    files += run_files(facts, evaluation)
    files = with_card(TEMPLATES[target.stage], context, files, staging / RECORD)
    notes = _notes(facts, license, target.stage == ON_DEVICE and "base_model" not in context["card_data"])
    summary = f"{facts.parameters:,} parameters"
    return Release(
        target, files, staging, left_out, tuple(notes), licenses_of(facts.licensed), summary,
        f"{license}, {said_by}" if license else None,
    )  # fmt: skip


def _program(pte: Path | None, model: Path, target: Target, llama4: bool) -> Program | None:
    if target.stage == ON_DEVICE and pte is None:
        raise ValueError(f"stage={ON_DEVICE} releases a program: give pte, the folder that recipes/export.py wrote")
    if target.stage == ON_DEVICE and llama4:
        raise ValueError(f"stage={ON_DEVICE} releases no weights: leave out llama4")
    return Program(pte, model) if pte is not None else None


def _metadata(
    target: Target, facts: ModelFacts, program: Program | None, license: str | None, base_model: str | None
) -> str:
    alone = target.stage == ON_DEVICE
    base_model = base_model or _base_model(facts, target)
    return model_metadata(
        target.repo.split("/")[1], license=license, base_model=base_model,
        relation=("quantized" if alone else "finetune") if base_model else None,
        datasets=sorted({source.hub_id for source in facts.data or () if source.hub_id}),
        tags=["mobilellm", *(["executorch"] if program else [])], model_index=facts.model_index,
        library="executorch" if alone else "transformers",
    ).to_yaml()  # fmt: skip


def licenses_of(sources: Sequence[SourceFacts]) -> dict[str, str]:
    return {source.name: source.license or "not known" for source in sources}


def with_card(
    template: str, context: Mapping[str, Any], files: Sequence[ReleaseFile], record_file: Path
) -> list[ReleaseFile]:
    """The files, the card, and the record of those of its blocks that were run with these weights."""
    record = Record.load(record_file)
    if record.blocks:
        record = record.restricted(code_blocks(render(template, context)), weights_of(files))
    extra = [ReleaseFile(CARD, render(template, context, record).encode())]
    if record.blocks:
        document = {"weights": record.weights, "blocks": record.blocks}
        extra.append(ReleaseFile(RECORD, (json.dumps(document, indent=2) + "\n").encode()))
    return sorted([*files, *extra], key=lambda file: file.path)


def _base_model(facts: ModelFacts, target: Target) -> str | None:
    """The Hub id of the stage before or, of a program, of the model itself; None if it has none but this one."""
    if target.stage == ON_DEVICE:
        found = _released_to(facts.folder)
    else:
        named = (facts.settings or {}).get("model")
        found = named if named is None or is_hub_id(named) else _released_to(Path(named))
    return found if found != target.repo else None


def _released_to(folder: Path) -> str | None:
    return Ledger(release_folder(folder) / LEDGER).last_repo()


def _notes(facts: ModelFacts, license: str | None, base_is_missing: bool) -> Iterator[str]:
    if license is None:
        yield "no licence is named (license): nobody else may use the weights"
    if base_is_missing:
        yield "the card does not say what it was exported from: release that first, or name it (base_model)"
    if facts.data is None:
        yield "no file of the run says what it read: the card has no table of training data"
    if facts.licenses_unknown:
        yield f"the licences of {', '.join(facts.licenses_unknown)} are not known: look before you publish"
    if facts.teacher is not None:
        yield f"it learnt from {facts.teacher}: see whether that model's licence says what others may be called"
    if facts.evaluation is None:
        yield "without evaluation the card has no results of benchmarks"
