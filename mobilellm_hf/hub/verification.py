"""Whether what is on the Hub is what was released, and works for somebody who has nothing of it yet.

    report = verify("org/name", "main", release, say=print)

Into an empty cache the branch is downloaded; its files are compared by hash with the release's; the model is loaded
with and without this package, each in a process of its own, and its logits are compared with the local folder's; then
the card's code blocks run as they are printed. What was run is noted in `verification.json` beside the release, and
the next release of the same files says so in its card.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import snapshot_download
from rich.markup import escape
from rich.table import Table

from mobilellm_hf.hub.blocks import (
    WITHOUT,
    Record,
    clean_environment,
    code_blocks,
    run_block,
    run_python,
    weights_of,
)
from mobilellm_hf.hub.contents import TWIN
from mobilellm_hf.hub.files import CARD, WEIGHTS, ReleaseFile
from mobilellm_hf.hub.ledger import LEDGER, Ledger
from mobilellm_hf.hub.package import RECORD, Release
from mobilellm_hf.hub.releases import ATTRIBUTES

TOKENS = 64  # of the row whose logits are compared
# The same code gives the same numbers; the twin's code is transformers' own.
TOLERANCES = {"with this package": 0.0, "without it": 0.0, "as llama4_text, by transformers alone": 1e-4}
LOGITS = """
import json, sys, traceback
{imports}
import torch
from transformers import AutoModelForCausalLM
tokens, ways = int(sys.argv[1]), json.loads(sys.argv[2])
for folder, out, options in ways:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        ids = torch.arange(tokens) * 7919 % model.config.vocab_size
        with torch.no_grad():
            torch.save(model(ids[None]).logits, out)
    except Exception:
        with open(out + ".error", "w") as stream:
            stream.write(traceback.format_exc())
"""


@dataclass
class Report:
    """What was found: `checks` maps what was looked at to what was seen, `problems` are those that must not be."""

    commit: str
    checks: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, seen: str, good: bool) -> None:
        self.checks[what] = seen
        if not good:
            self.problems.append(f"{what}: {seen}")

    def table(self) -> Table:
        table = Table("what", "seen", title=f"Commit {self.commit}")
        for what, seen in self.checks.items():
            shown = escape(seen)
            table.add_row(escape(what), f"[red]{shown}[/red]" if f"{what}: {seen}" in self.problems else shown)
        return table


def verify(
    repo: str,
    revision: str,
    release: Release | None = None,
    model: Path | None = None,
    *,
    branch: str | None = None,
    repo_type: str = "model",
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """Downloads and tries a branch, or the commit of a tag.

    Args:
        release: what it should hold; without one, hashes are not compared and nothing is noted.
        model: the local folder whose logits it should have.
        branch: the one that the card's code names, if the revision is another name; its blocks find this commit there.
        say: told what is being looked at.

    Raises:
        HTTPError: the Hub does not answer, or has no such revision.
    """
    with TemporaryDirectory() as home:
        say("download")
        folder = Path(snapshot_download(repo, repo_type=repo_type, revision=revision, cache_dir=Path(home, "hub")))
        report = Report(folder.name)
        files = [
            ReleaseFile(str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*")) if path.is_file()
        ]
        files = [file for file in files if file.path != ATTRIBUTES]
        if release is not None:
            _compare_files(report, files, _as_sent(release))
        if branch not in (None, revision):
            reference = folder.parents[1] / "refs" / branch
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(folder.name)
        # A data set's blocks ask the Hub what there is, and the cache alone cannot say; they run no code of others.
        environment = clean_environment(Path(home), offline=repo_type == "model")
        if repo_type == "model" and any(file.path.endswith(WEIGHTS) for file in files):
            _compare_logits(report, folder, model, environment, say)
        _run_blocks(report, files, release, environment, say)
    return report


def _as_sent(release: Release) -> dict[str, str]:
    """path -> SHA-256; of the card and the record, which tell of later verifications too, as they were last sent."""
    now = {file.path: file.digests[0] for file in release.files}
    sent = Ledger(release.folder / LEDGER).released(release.target.repo, release.target.branch)
    then = {path: sent[path][0] for path in (CARD, RECORD) if path in sent}
    return {path: name for path, name in now.items() if not sent or path not in (CARD, RECORD)} | then


def _compare_files(report: Report, found: list[ReleaseFile], here: dict[str, str]) -> None:
    there = {file.path: file.digests[0] for file in found}
    wrong = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
    shown = [
        path + (" (only here)" if path not in there else " (only on the Hub)" if path not in here else "")
        for path in wrong
    ]
    report.add("files", f"differ: {', '.join(shown)}" if wrong else f"{len(here)} files, SHA-256 equal", not wrong)


def _compare_logits(
    report: Report, folder: Path, model: Path | None, environment: dict[str, str], say: Callable[[str], None]
) -> None:
    """Loads the model in processes that can and cannot import this package; the local folder is right."""
    say("loads with this package and without it")
    twin = folder / TWIN if (folder / TWIN).is_dir() else None
    with_package = _logits([(model, {}), (folder, {})], environment, "import mobilellm_hf")
    without = _logits([(folder, {"trust_remote_code": True}), (twin, {})], environment, WITHOUT)
    here = with_package[0]
    for (name, tolerance), there in zip(TOLERANCES.items(), (with_package[1], *without)):
        if isinstance(there, str):
            report.add(f"loads {name}", there, False)
        elif there is not None:
            here = there if here is None or isinstance(here, str) else here
            difference = (there - here).abs().max().item() if there.shape == here.shape else float("inf")
            shown = f"logits differ by {difference:.1e}, {tolerance:.0e} is allowed"
            report.add(f"loads {name}", shown, difference <= tolerance)


def _logits(
    ways: list[tuple[Path | None, dict[str, bool]]], environment: dict[str, str], imports: str
) -> list[torch.Tensor | str | None]:
    """(1, tokens, vocabulary) of each folder; an error as text; None for no folder."""
    with TemporaryDirectory() as scratch:
        outs = [Path(scratch) / f"{number}.pt" for number in range(len(ways))]
        given = [(str(way[0].resolve()), str(out), way[1]) for way, out in zip(ways, outs) if way[0] is not None]
        code = LOGITS.format(imports=imports)
        run_python(["-c", code, str(TOKENS), json.dumps(given)], environment, "loading models")
        return [_read(out) for out in outs]


def _read(out: Path) -> torch.Tensor | str | None:
    error = out.with_name(f"{out.name}.error")
    if error.exists():
        return error.read_text().strip().splitlines()[-1]
    return torch.load(out, weights_only=True) if out.exists() else None


def _run_blocks(
    report: Report,
    files: list[ReleaseFile],
    release: Release | None,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> None:
    card = next((file.read().decode() for file in files if file.path == CARD), "")
    if not card:
        report.add("card", "there is no README.md", False)
    weights = weights_of(files)
    same = release is not None and weights == weights_of(release.files)
    record = Record.load(release.folder / RECORD) if same else Record()
    for block in code_blocks(card).values():
        what = f"block {block.name}"
        if obstacle := block.obstacle():
            report.add(what, f"not run: {obstacle}", True)
            continue
        say(what)
        try:
            run_block(block, environment)
        except ValueError as error:
            report.add(what, str(error), False)
            continue
        report.add(what, "runs", True)
        record.note(block, weights, "the Hub")
    if same and record.blocks:
        record.save(release.folder / RECORD)
