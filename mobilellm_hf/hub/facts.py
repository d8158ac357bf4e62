"""What is known of a model, read from the files that its run left; of what no file says, there is no fact.

    facts = ModelFacts(Path("runs/140M/midtrain-stage1/MobileLLM-R1-140M-midtrain-stage1"))
    facts.data, facts.hyperparameters, facts.probes         # None where the file is missing

A card is rendered from these, section by section: a section whose fact is None is not written, so a card cannot have a
number that no file bears out. What each file is called is said by the module that writes it (training/stage.py,
training/sft.py, training/grpo.py, evaluation/results.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mobilellm_hf.evaluation.results import TaskResult, legend, marks_of
from mobilellm_hf.evaluation.suites import SUITES
from mobilellm_hf.hub.files import read_json, read_json_lines, tensor_sizes, weight_files
from mobilellm_hf.hub.labels import DISTILLATION, HYPERPARAMETERS, RESAMPLING
from mobilellm_hf.hub.programs import Program
from mobilellm_hf.hub.results import SuiteFacts, check_identity, read_results, suite_facts
from mobilellm_hf.hub.sources import SourceFacts, described, is_hub_id, public_name, sources_of, unknown_licenses
from mobilellm_hf.training.monitors import PROBE_PREFIX, probe_history
from mobilellm_hf.training.pass_rate import PassRate

TOLD_BY = {"num_generations": "grpo", "proxy_steps": "quickstart"}


@dataclass(frozen=True)
class Row:
    """NLL of a probe before and after, in nats per token."""

    name: str
    before: float
    after: float


class ModelFacts:
    """The facts of a model's folder, of the run in whose folder it lies, and of its evaluation.

    Args:
        folder: of the model, or a Trainer's checkpoint.
        evaluation: what `recipes/evaluate.py` left.
        program: what is released in place of the model, and was evaluated.
    """

    def __init__(self, folder: Path, evaluation: Path | None = None, program: Program | None = None):
        self.folder, self.run, self._evaluation = folder, folder.resolve().parent, evaluation
        self._program = program

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @cached_property
    def parameters(self) -> int:
        """As the weights hold them: a head that is the embedding is counted once."""
        return sum(sum(tensor_sizes(self.folder / name).values()) for name in weight_files(self.folder))

    @cached_property
    def has_chat_template(self) -> bool:
        return (self.folder / "chat_template.jinja").exists()

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        path = self.run / "settings.json"
        return read_json(path) if path.exists() else None

    @cached_property
    def stage(self) -> str | None:
        """What the run says it is; of GRPO and the quickstart, fields that only they have say it."""
        settings = self.settings or {}
        return next((stage for name, stage in TOLD_BY.items() if name in settings), settings.get("stage"))

    @cached_property
    def step(self) -> int | None:
        """Of a checkpoint that a running training left."""
        state = self._state()
        return state["global_step"] if state else None

    def _state(self) -> dict[str, Any] | None:
        path = self.folder / "trainer_state.json"
        return read_json(path) if path.exists() else None

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        if state := self._state():
            return state["log_history"]
        path = self.run / "log.jsonl"
        return read_json_lines(path) if path.exists() else []

    @cached_property
    def probes(self) -> list[Row] | None:
        curves = probe_history(self.log) if any(PROBE_PREFIX in key for entry in self.log for key in entry) else {}
        rows = [Row(name, curve[0][1], curve[-1][1]) for name, curve in curves.items() if len(curve) > 1]
        return rows or None

    @cached_property
    def hyperparameters(self) -> dict[str, Any] | None:
        if self.settings is None or self.stage in (None, "quickstart"):  # whose settings are of several models
            return None
        # Of steps and epochs the Trainer heeds one: steps, if they are given.
        ignored = "num_train_epochs" if (self.settings.get("max_steps") or 0) > 0 else "max_steps"
        found = {name: value for name, value in self.settings.items() if value is not None and name != ignored}
        shown = {label: found[name] for name, label in HYPERPARAMETERS.items() if name in found}
        taken = max((entry.get("step", 0) for entry in self.log), default=0)
        return shown | ({"steps taken": taken} if taken and self.step is None else {}) or None

    @cached_property
    def tokens(self) -> int | None:
        """Of the rows that were read, as `mixture.yaml` counts them."""
        found = [source.tokens for source in self.data or () if source.tokens is not None]
        return sum(found) if found and self._document("mixture.yaml") else None

    @cached_property
    def distillation(self) -> dict[str, Any] | None:
        settings = self.settings or {}
        if not (settings.get("teacher") or settings.get("teacher_cache")):
            return None
        named = settings.get("teacher")
        teacher = {"teacher": public_name(named) if named else "a cache of its likeliest tokens"}
        return teacher | {label: settings[name] for name, label in DISTILLATION.items() if name in settings}

    @cached_property
    def resampling(self) -> dict[str, Any] | None:
        settings = self.settings or {}
        if not (settings.get("resample_every") or settings.get("resample_at_start")):
            return None
        shown = {label: settings[name] for name, label in RESAMPLING.items() if settings.get(name) is not None}
        if rounds := [entry for entry in self.log if "influence/positive" in entry]:
            last = rounds[-1]
            shown |= {"samples of positive influence in the last round": f"{last['influence/positive']:.1%}"}
            shown |= {"rows rejected": f"{last['influence/rejected']:.1%}"}
        return shown

    @cached_property
    def data(self) -> list[SourceFacts] | None:
        """What was read: of the mixture that was drawn, of conversations, or else of what the settings name."""
        named = {source.name: source for source in sources_of(self.settings or {})}
        weights = self._weights()
        if mixture := self._document("mixture.yaml"):
            drawn = mixture["drawn"]
            rows = sum(line["rows"] for line in drawn.values()) or 1
            found = {
                name: dict(share=line["rows"] / rows, rows=line["rows"], tokens=line["tokens"], epochs=line["epochs"])
                for name, line in drawn.items()
            }
        elif conversations := self._document("conversations.yaml"):
            read = sum(line["read"] for line in conversations) or 1
            found = {
                line["source"]: dict(share=line["read"] / read, rows=line["read"], dropped=line["dropped"])
                for line in conversations
            }
        elif self.influence_mixture is not None:
            found = dict.fromkeys(weights, {})
        else:
            found = {name: {} for name in named}
        return [
            _with_source(name, named, {"weight": weights.get(name), **figures}) for name, figures in found.items()
        ] or None

    @cached_property
    def weights_from(self) -> str | None:
        """The file of `training/` whose weights the table of data shows."""
        if self.data is None or all(source.weight is None for source in self.data):
            return None
        return "mixture.yaml" if self._document("mixture.yaml") else "influence_mixture.yaml"

    def _weights(self) -> dict[str, float]:
        """Source -> weight: the last ones of the mixture that was drawn, else those that influence gave."""
        if mixture := self._document("mixture.yaml"):
            return mixture["weights"]
        return yaml.safe_load(self.influence_mixture.read_text())["weights"] if self.influence_mixture else {}

    @cached_property
    def influence_mixture(self) -> Path | None:
        """The mixture that influence scores gave, where the run's settings or folder have one."""
        named = (self.settings or {}).get("weights")
        candidates = [Path(named)] if isinstance(named, str) else []
        candidates.append(self.run / "influence" / "mixture.yaml")
        return next((path for path in candidates if path.exists()), None)

    def _document(self, name: str) -> Any:
        """A YAML file that the finished run left; a checkpoint of a running one is not what it tells of."""
        path = self.run / name
        return yaml.safe_load(path.read_text()) if path.exists() and self.step is None else None

    @cached_property
    def pass_rate(self) -> dict[str, Any] | None:
        path = self.run / "pass_rate.json"
        if not path.exists() or self.step is not None:
            return None
        document = read_json(path)
        return document | {name: PassRate(**document[name]) for name in ("before", "after")}

    @cached_property
    def evaluation(self) -> list[TaskResult] | None:
        if self._evaluation is None:
            return None
        path = self._evaluation / "results.json"
        if not path.exists():
            raise ValueError(f"{self._evaluation} has no results.json: give the folder that recipes/evaluate.py wrote")
        check_identity(path, self.folder, self._program)
        return list(read_results(path).values()) or None

    @cached_property
    def model_index(self) -> list[dict[str, Any]] | None:
        """The results as the Hub reads them, as the evaluation wrote them."""
        path = self._evaluation / "model_index.yaml" if self._evaluation else None
        return yaml.safe_load(path.read_text())["model-index"] if path and path.exists() else None

    @cached_property
    def suites(self) -> list[SuiteFacts]:
        """The columns of the paper's tables, beside the paper's models of this size."""
        results = {result.task: result for result in self.evaluation or ()}
        found = [suite for suite in SUITES.values() if any(task in results for task in suite.tasks)]
        return [suite_facts(suite, results, self.parameters) for suite in found]

    @cached_property
    def stages_before(self) -> list[ModelFacts]:
        """The models that this one went on from, the first one first, as far as their folders are here."""
        before, seen, current = [], {self.run}, self
        while (named := (current.settings or {}).get("model")) and (Path(named) / "config.json").exists():
            current = ModelFacts(Path(named))
            if current.run in seen:
                break
            seen.add(current.run)
            before.append(current)
        return before[::-1]

    @cached_property
    def labelled_before(self) -> dict[str, ModelFacts]:
        """The stages before by name: what their settings say, else the run's folder, which no two stages share."""
        named: dict[str, ModelFacts] = {}
        for before in self.stages_before:
            label = before.stage or before.run.name
            named[label if label not in named else f"{label}-{len(named) + 1}"] = before
        return named

    @cached_property
    def data_before(self) -> list[SourceFacts]:
        """Sources that only the stages before have read."""
        names = {source.name for source in self.data or ()}
        read = {source.name: source for before in self.stages_before for source in before.data or ()}
        return [SourceFacts(name, s.hub_id, s.license) for name, s in read.items() if name not in names]

    @property
    def licensed(self) -> list[SourceFacts]:
        """All sources that this model has learnt from, as far as files say."""
        return [*(self.data or ()), *self.data_before]

    @cached_property
    def licenses_unknown(self) -> list[str]:
        return unknown_licenses(self.licensed)

    @cached_property
    def teacher(self) -> str | None:
        """Hub id of the model that this one was distilled from."""
        named = (self.settings or {}).get("teacher") or ""
        return named if is_hub_id(named) else None

    @cached_property
    def legend(self) -> str:
        """What the marks of results mean."""
        return legend(marks_of(self.evaluation or ()))


def _with_source(name: str, named: Mapping[str, SourceFacts], figures: Mapping[str, Any]) -> SourceFacts:
    known = named.get(name) or described(name)
    return SourceFacts(name, known.hub_id, known.license, **figures)
