"""What the command line of a release says, and what a training's says of releases while it goes on.

launch(__doc__, (StageArguments, StageTrainingArguments, CheckpointArguments), releasing(run_stage))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mobilellm_hf.hub.callback import ReleaseCallback
from mobilellm_hf.hub.facts import ModelFacts
from mobilellm_hf.hub.stages import SUFFIXES, Target
from mobilellm_hf.launch import option

OF_SENDING = ("repo", "collection", "replace", "private", "accept", "dry_run")


@dataclass
class ReleaseArguments:
    repo: str | None = option("org/name, or your-name/name; made if it does not exist")
    model: str | None = option("folder of the model and its tokenizer, in the folder of its run")
    stage: str | None = option(f"{', '.join(SUFFIXES)}; decides the branch. By default what the run's settings say")
    evaluation: str | None = option("folder that recipes/evaluate.py wrote")
    pte: str | None = option(
        "folder that recipes/export.py wrote, beside the weights; of the stage on-device in their place"
    )
    llama4: bool = option("also the llama4_text twin: for plain transformers, llama.cpp, MLX", False)
    data_set: str | None = option("release a data set instead: folder of a curation, of scores or of a teacher cache")
    license: str | None = option(
        "of what is released, as the Hub calls it: apache-2.0, ... By default what the model's own README.md says"
    )
    base_model: str | None = option("Hub id of the model it goes on from; by default what the run's settings say")
    collection: str | None = option("title or slug of a collection to put the repository into")
    private: bool = option("a new repository, or collection, is private", False)
    replace: str | None = option("commit of a branch that was not released from here, to release on top of it")
    accept: list[str] = option("files in which a finding of the secrets scan has been looked at, and is none", list)
    dry_run: bool = option("write the card and show what would be sent; no network", False)
    rehearse: Literal["auto", "yes", "no"] = option(
        "run the card's code blocks on the files before they are sent; auto: unless it is a dry run", "auto"
    )
    verify: str | None = option(
        "org/name@stage, or @tag: download a release and try it; with model, compare it with the folder"
    )

    def check(self) -> None:
        """Raises a ValueError that names the field for what can be refused before anything is read."""
        if self.verify is None and self.repo is None:
            raise ValueError("repo: say where to, org/name")
        if self.model is not None and self.data_set is not None:
            raise ValueError("give model or data_set, not both")
        if self.verify is None and self.model is None and self.data_set is None:
            raise ValueError("give either model or data_set: the folder that is released")
        for name in OF_SENDING if self.verify is not None else ():
            if getattr(self, name):
                raise ValueError(f"{name} is of a release, and verify is given, which sends nothing")
        if self.data_set is not None:
            for name in ("model", "evaluation", "pte", "base_model", "stage"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is of a model's release, and data_set is given")
            if self.llama4:
                raise ValueError("llama4 is of a model's release, and data_set is given")
        if self.replace is not None and len(self.replace) < 7:
            raise ValueError(f"replace={self.replace!r} must be 7 characters of the commit or more")
        for name in ("evaluation", "pte", "model", "data_set"):
            value = getattr(self, name)
            if value is not None and not Path(value).exists():
                raise ValueError(f"{name}: there is no {value}")

    def rehearses(self) -> bool:
        wanted = self.rehearse == "yes" or (self.rehearse == "auto" and not self.dry_run)
        return wanted and self.data_set is None  # whose block asks the Hub

    def target(self, repo: str, stage: str | None = None) -> Target:
        """The branch of the release.

        Args:
            stage: what is known of it, if no option says.

        Raises:
            ValueError: the stage is not said, or there is no such stage.
        """
        if self.data_set is not None:
            return Target(repo, "data", "dataset")
        stage = self.stage or stage or ModelFacts(Path(self.model)).stage
        if stage is None:
            raise ValueError(f"stage: no file says which stage {self.model} is of; give one of {', '.join(SUFFIXES)}")
        return Target(repo, stage)


@dataclass
class CheckpointArguments:
    release_repo: str | None = option("org/name: every checkpoint is released to the stage's branch as it is saved")
    release_private: bool = option("a new repository is private", False)
    release_license: str | None = option("of the checkpoints' weights, as the Hub calls it: apache-2.0, other, ...")

    def callbacks(self, stage: str, tokenizer: str | None = None) -> list[ReleaseCallback]:
        """One, or none if nothing is to be released.

        Args:
            tokenizer: folder or Hub id, for a Trainer that was given none.

        Raises:
            ValueError: the repository's name is wrong.
        """
        if self.release_repo is None:
            return []
        return [
            ReleaseCallback(
                self.release_repo, stage, private=self.release_private, license=self.release_license,
                tokenizer=tokenizer,
            )
        ]  # fmt: skip


def releasing(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run_stage`, `run_sft` or `run_grpo` for `launch`, with `CheckpointArguments` as a third group of arguments."""

    def run_and_release(args: Any, training: Any, release: CheckpointArguments, console: Console) -> Any:
        stage = getattr(args, "stage", "grpo")  # whose arguments name none
        return run(args, training, console, callbacks=release.callbacks(stage, args.tokenizer or args.model))

    return run_and_release
