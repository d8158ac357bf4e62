"""A classifier of quality: FineWeb-Edu's regression head by default, any sequence classifier by name.

    good = QualityClassifier("HuggingFaceFW/fineweb-edu-classifier", threshold=4.0)(documents)
    good = QualityClassifier("org/is-it-spam", label="ham", threshold=0.9)(documents)

With one output the score is that output (FineWeb-Edu's runs from 0 to 5, and the paper keeps what is above 4); with
several it is the probability of `label`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mobilellm_hf.curation.scoring import OnDocuments, length_batches, load_named, model_identity
from mobilellm_hf.curation.stages import CurationStage, StageInput, Verdict

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu-classifier"
CHARACTERS_PER_TOKEN = 32  # as for the judge: no more of a document is tokenized


class QualityClassifier(CurationStage):
    """Keeps the documents whose score is above a threshold.

    Args:
        model: Hub id or folder of a sequence classifier.
        threshold: what a score must exceed.
        label: for a classifier of several classes, the class (its name in `id2label`) whose probability is the score.
        max_length: tokens that are read of a document, its beginning; by default the model's context, 512 at most
            being what FineWeb-Edu's classifier was trained on.
        batch_tokens: of a batch, padding included; by default what the device takes, see `length_batches`.
    """

    def __init__(
        self,
        model: str | Path = FINEWEB_EDU,
        threshold: float = 4.0,
        *,
        label: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        max_length: int = 512,
        batch_tokens: int | None = None,
        name: str = "quality",
        per_shard: int = 1_024,
    ):
        self.model_name, self.threshold, self.label, self.revision = str(model), threshold, label, revision
        self.dtype, self.max_length, self.batch_tokens = dtype, max_length, batch_tokens
        self.name, self.per_shard = name, per_shard
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **self._scoring_settings(), "threshold": self.threshold}

    def _scoring_settings(self) -> dict[str, Any]:
        options = {"label": self.label, "max_length": self.max_length, "dtype": str(self.dtype)}
        return {"classifier": model_identity(self.model_name, self.revision), **options}

    def check(self) -> None:
        """Raises a ValueError if the classifier has no such label; loads no weights."""
        config = load_named(AutoConfig, "classifier", self.model_name, self.revision)
        self._column(config.num_labels, config.id2label)

    def release(self) -> None:
        self._model = None

    def _column(self, outputs: int, names: dict[int, str]) -> int:
        if outputs == 1:
            if self.label is not None:
                raise ValueError(f"{self.model_name} has one output and no class {self.label!r}: leave label out")
            return 0
        found = [number for number, name in names.items() if name == self.label]
        if not found:
            raise ValueError(f"{self.model_name} has several classes: label must be one of {list(names.values())}")
        return found[0]

    def _load(self) -> PreTrainedModel:
        if self._model is None:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.model_name, revision=self.revision, dtype=self.dtype
            )
            self._tokenizer = AutoTokenizer.from_pretrained(self.model_name, revision=self.revision)
            self._model = model.to(PartialState().device).eval()
        return self._model

    @torch.inference_mode()
    def score(
        self, texts: Sequence[str], sources: Sequence[str], on_documents: OnDocuments | None = None
    ) -> dict[str, np.ndarray]:
        """`score` (N,) float32 and `truncated` (N,) bool."""
        model = self._load()
        column = self._column(model.config.num_labels, model.config.id2label)
        context = getattr(model.config, "max_position_embeddings", None) or self.max_length
        limit = min(self.max_length, context)
        cut = [text[: limit * CHARACTERS_PER_TOKEN] for text in texts]
        encoded = self._tokenizer(cut, truncation=True, max_length=limit, split_special_tokens=True)
        rows = encoded["input_ids"]
        scores = np.empty(len(texts), np.float32)
        for batch in length_batches([len(row) for row in rows], self.batch_tokens):
            inputs = self._tokenizer.pad({"input_ids": [rows[index] for index in batch]}, return_tensors="pt")
            logits = model(**inputs.to(model.device)).logits.float()
            values = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, column]
            if not values.isfinite().all():
                raise ValueError(f"the scores of {self.model_name} are not finite in {self.dtype}: load it in float32")
            scores[batch] = values.cpu().numpy()
            if on_documents is not None:
                on_documents(len(batch))
        long = [
            bool(one.overflowing) or len(part) < len(text) for one, part, text in zip(encoded.encodings, cut, texts)
        ]
        return {"score": scores, "truncated": np.array(long, bool)}

    def decide(self, given: StageInput) -> Verdict:
        scores = given.scores_of(self, self._scoring_settings(), self.per_shard)
        values = scores.column("score")
        columns = {"score": values, "truncated": scores.column("truncated")}
        fallen = (~(values > self.threshold)).astype(np.int8)
        return Verdict(fallen, (f"score not above {self.threshold:g}",), columns)
