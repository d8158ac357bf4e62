"""What a release takes beside the model's own folder: the twin, the settings that made it, results and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from mobilellm_hf.hub.cards import Picture
from mobilellm_hf.hub.facts import ModelFacts
from mobilellm_hf.hub.files import INDEX, TOKENIZER, WEIGHTS, ReleaseFile, read_json
from mobilellm_hf.hub.sources import public_settings
from mobilellm_hf.modeling import MobileLLMConfig

TWIN = "llama4_text"
# Pictures of a run's folder and what they show; one of another name is shown under its name.
CAPTIONS = {
    "training": "Loss, probes and speed during training",
    "grpo": "Rewards, length of completions and pass rate during training",
    "histograms": "Influence of the rows that were scored",
    "heat_map": "Influence of each source on each capability",
    "influence": "Influence of each source on each capability, and the mixture that follows",
    "probe_nll": "NLL of held-out files during training",
    "midtraining": "What mid-training read, rejected and lost",
    "funnel": "Documents that each step of the curation kept",
}


def twin_files(folder: Path, files: Sequence[ReleaseFile]) -> list[ReleaseFile]:
    """`llama4_text/`: the same weights and tokenizer under a config.json of the published checkpoints' format.

    Raises:
        ValueError: llama4_text cannot express the network (see `MobileLLMConfig.to_llama4_text`).
    """
    config = MobileLLMConfig.from_pretrained(folder).to_llama4_text()
    config.architectures = ["Llama4ForCausalLM"]
    shared = [file for file in files if file.path in (*TOKENIZER, "generation_config.json", INDEX)]
    shared += [file for file in files if file.path.endswith(WEIGHTS)]
    twin = [ReleaseFile(f"{TWIN}/{file.path}", file.source) for file in shared]
    return [*twin, ReleaseFile(f"{TWIN}/config.json", config.to_json_string().encode())]


def run_files(facts: ModelFacts, evaluation: Path | None) -> list[ReleaseFile]:
    """`training/`: settings and mixtures of the run and of the stages before it; and the results of an evaluation."""
    files = [*_of_run(facts, "training")]
    for label, before in facts.labelled_before.items():
        files += _of_run(before, f"training/{label}")
    if evaluation is not None:
        files.append(ReleaseFile("evaluation/results.json", _public_results(evaluation / "results.json")))
        entries = sorted((evaluation / ".eval_results").glob("*.yaml"))
        files += [ReleaseFile(f".eval_results/{path.name}", path) for path in entries]
    return files


def _public_results(path: Path) -> bytes:
    """The results without paths of this machine, and without tasks that failed, whose errors are about it."""
    document = read_json(path)
    document["tasks"] = {name: entry for name, entry in document["tasks"].items() if "error" not in entry}
    return (json.dumps(public_settings(document), indent=2) + "\n").encode()


def _of_run(facts: ModelFacts, place: str) -> list[ReleaseFile]:
    files = []
    if facts.settings is not None:
        document = yaml.safe_dump(public_settings(facts.settings), sort_keys=False, allow_unicode=True)
        files.append(ReleaseFile(f"{place}/settings.yaml", document.encode()))
    if facts.influence_mixture is not None:
        document = public_settings(yaml.safe_load(facts.influence_mixture.read_text()))
        files.append(
            ReleaseFile(f"{place}/influence_mixture.yaml", yaml.safe_dump(document, sort_keys=False).encode())
        )
    names = () if facts.step is not None else ("mixture.yaml", "conversations.yaml", "pass_rate.json", "prompts.json")
    return files + [ReleaseFile(f"{place}/{name}", facts.run / name) for name in names if (facts.run / name).exists()]


def find_pictures(facts: ModelFacts, evaluation: Path | None) -> tuple[list[Picture], list[ReleaseFile]]:
    """Those of the model, its run, the influence that it began with, and its evaluation."""
    found = sorted(facts.folder.glob("*.png"))
    if facts.step is None:
        found += [*sorted(facts.run.glob("*.png")), *sorted((facts.run / "mixture").glob("*.png"))]
    if facts.influence_mixture is not None:
        found += sorted(facts.influence_mixture.parent.glob("*.png"))
    if evaluation is not None:
        found += sorted(evaluation.glob("*.png"))
    return as_pictures(found)


def as_pictures(paths: Sequence[Path]) -> tuple[list[Picture], list[ReleaseFile]]:
    """One of each name, with a caption."""
    by_name = {path.name: path for path in reversed(paths)}
    found = [path for path in paths if by_name[path.name] == path]
    pictures = [
        Picture(f"pictures/{path.name}", CAPTIONS.get(path.stem, path.stem.replace("_", " "))) for path in found
    ]
    return pictures, [ReleaseFile(f"pictures/{path.name}", path) for path in found]
