"""Where a stage is released: the branch of its repository, named as the official ones, its tags and its card.

    facebook/MobileLLM-R1-950M-base     main                                    the second phase of mid-training
                                        MobileLLM-R1-950M-midtrain-stage1       and so on: one for each stage before
    facebook/MobileLLM-R1-950M          main                                    reasoning SFT
                                        MobileLLM-R1-950M-tulu3                 general SFT

GRPO has no official branch; here its name ends in -grpo.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass

from huggingface_hub.utils import validate_repo_id

from mobilellm_hf.training.arguments import STAGES as BASE_STAGES
from mobilellm_hf.training.sft_arguments import SFT_STAGES

MAIN = "main"
# Stages that are the `main` of their repository.
ON_DEVICE = "on-device"
FINAL = ("midtrain", "reasoning", ON_DEVICE, "quickstart")
SUFFIXES = BASE_STAGES | SFT_STAGES | {"grpo": "-grpo", ON_DEVICE: "", "quickstart": ""}
TAG = re.compile(r"(.+)-(?:v|step-)\d+(?:-\d+)?")
TEMPLATES = (
    dict.fromkeys((*BASE_STAGES, "quickstart"), "model_base.md")
    | dict.fromkeys((*SFT_STAGES, "grpo"), "model_reasoning.md")
    | {ON_DEVICE: "model_on_device.md"}
)
TITLES = {
    "pretrain-stage1": "first phase of pre-training",
    "pretrain": "pre-training",
    "midtrain-stage1": "first phase of mid-training",
    "midtrain": "base model, after mid-training",
    "general": "general SFT",
    "reasoning": "reasoning SFT",
    "grpo": "GRPO",
    ON_DEVICE: "for ExecuTorch",
    "quickstart": "trained by the quickstart",
}


@dataclass(frozen=True)
class Target:
    """A branch of a repository on the Hub.

    Attributes:
        repo: `org/name`.
        stage: one of `SUFFIXES`; of a data set "data".
        repo_type: "model" or "dataset".
    """

    repo: str
    stage: str
    repo_type: str = "model"

    def __post_init__(self):
        if self.repo.count("/") != 1:
            raise ValueError(f"repo={self.repo!r} must be org/name, or your-name/name")
        validate_repo_id(self.repo)
        if self.repo_type == "model" and self.stage not in SUFFIXES:
            close = difflib.get_close_matches(self.stage, SUFFIXES, n=1)
            hint = f". Did you mean {close[0]}?" if close else ""
            raise ValueError(f"stage={self.stage!r} must be one of {', '.join(SUFFIXES)}{hint}")

    @property
    def branch(self) -> str:
        if self.repo_type == "dataset" or self.stage in FINAL:
            return MAIN
        return self.repo.split("/")[1].removesuffix("-base") + SUFFIXES[self.stage]

    def tag_pattern(self) -> re.Pattern:
        return re.compile(rf"{re.escape(self.stage)}-v(\d+)")

    def next_tag(self, tags: Collection[str]) -> str:
        """midtrain-stage1-v1, then -v2: a release is tagged once and for all."""
        found = [self.tag_pattern().fullmatch(tag) for tag in tags]
        return f"{self.stage}-v{1 + max((int(match[1]) for match in found if match), default=0)}"


def parse_target(text: str) -> tuple[str, str, str | None]:
    """`org/name@stage`, @branch, @tag, or `org/name` -> repository, revision and, if it is said, the stage."""
    repo, _, revision = text.partition("@")
    if revision in SUFFIXES:
        return repo, Target(repo, revision).branch, revision
    Target(repo, "midtrain")  # whose check of the name is wanted
    of_tag = TAG.fullmatch(revision)
    return repo, revision or MAIN, of_tag[1] if of_tag and of_tag[1] in SUFFIXES else None
