"""The scores of what a model trains on, taken inside its training steps, from one round of resampling to the next.

Between two rounds the probes' gradients are those of the earlier one: as old as the round, and free. What was heard so
far is written before every checkpoint, so a resumed run has lost none of it.
"""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.influence.fused import FusedInfluence
from mobilellm_hf.influence.scorer import InfluenceScorer
from mobilellm_hf.training.distillation import MARK as DISTILLATION
from mobilellm_hf.training.row_ids import RowIds
from mobilellm_hf.workspace import write_whole


class FusedScores:
    """Args:
    model: the unwrapped model that trains on `mixture`, whose rows come with `row_id`.
    folder: where directions and scores are kept for a resume.
    """

    def __init__(self, model: PreTrainedModel, mixture: MixtureDataset, folder: Path):
        if not mixture.emit_ids:
            raise ValueError("scores='fused' needs remove_unused_columns=False, or the Trainer drops the rows' ids")
        self.model, self.mixture, self.folder = model, mixture, folder
        self._row_ids = RowIds.attach(model)
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)
        self._context: AbstractContextManager | None = None
        self._influence: FusedInfluence | None = None
        self._capabilities = 0
        self._step = 0  # of the round whose directions are in use
        self._pending: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []

    def check_loss(self) -> None:
        """Raises a ValueError if the model trains on another loss than its own NLL. To be called before it trains."""
        own = vars(self.model).get("_influence_products") is not None  # which taps the loss, and does not replace it
        names = {"_loss_function", DISTILLATION} if own else {"fused_loss", "_loss_function"}
        if any(names & set(vars(module)) for module in self.model.modules()):
            raise ValueError(
                "scores='fused' are those of the loss that is trained on, and another callback has replaced the "
                "model's own (distillation does): use scores='separate'"
            )

    def _note(self, module, args, kwargs) -> None:
        if self._influence is not None and torch.is_grad_enabled():
            self._pending.append(self._row_ids.current.cpu())

    def listen(self, scorer: InfluenceScorer, step: int) -> None:
        """From the next training step on, with this scorer's directions."""
        if self._is_writer():
            tensors = {name: value.cpu().contiguous() for name, value in scorer.directions.items()}
            write_whole(self.folder / f"directions-{step}.safetensors", lambda path: save_file(tensors, path))
        self._start(scorer, step)

    def _start(self, scorer: InfluenceScorer, step: int) -> None:
        self._context, self._step = scorer.in_training_step(), step
        self._influence, self._capabilities = self._context.__enter__(), len(scorer.capabilities)

    def _stop(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
        self._context = self._influence = None

    def collect(self) -> None:
        """The scores of the step that has just ended."""
        if self._influence is not None:
            self._ids += self._pending
            self._scores.append(self._influence.take().cpu())
        self._pending = []

    def take(self) -> tuple[np.ndarray, torch.Tensor]:
        """Stops listening; what all ranks heard since the round before.

        Returns:
            (N,) `row_id`, sorted, and (N, C) scores; of a row that was read twice, their mean.
        """
        self._stop()
        ids, scores = self._joined()
        self._ids, self._scores = [], []
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts: list = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (ids, scores))
            ids, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        ids, scores = ids[ids >= 0], scores[ids >= 0]
        rows, places, counts = ids.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(rows), scores.shape[1], dtype=torch.float64).index_add_(0, places, scores)
        return rows.numpy(), total / counts[:, None]

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._scores:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, self._capabilities, dtype=torch.float64)
        return torch.cat(self._ids), torch.cat(self._scores)

    # Across a kill

    def save(self, step: int) -> None:
        """What was heard up to this step, for a resume from its checkpoint."""
        if self._influence is None:
            return
        heard = {"round": self._step, "scores": self._joined()}
        write_whole(self.folder / f"heard-{step}-{self._rank()}.pt", lambda path: torch.save(heard, path))
        heard = sorted(self.folder.glob(f"heard-*-{self._rank()}.pt"), key=lambda file: int(file.name.split("-")[1]))
        for file in heard[:-2]:
            file.unlink(missing_ok=True)
        if self._is_writer():
            used = {torch.load(file)["round"] for file in heard[-2:]}
            for file in self.folder.glob("directions-*.safetensors"):
                if int(file.stem.split("-")[1]) not in used:
                    file.unlink(missing_ok=True)

    def resume(self, step: int, capabilities: list[str]) -> None:
        """Goes on listening where the checkpoint of `step` was written.

        Raises:
            ValueError: its files are gone.
        """
        file = self.folder / f"heard-{step}-{self._rank()}.pt"
        if not file.exists():
            raise ValueError(
                f"{file} is missing: the fused scores of step {step} were not kept. Resume from one of the two newest "
                "checkpoints, on as many ranks as before, or use scores='separate' in a new run"
            )
        saved = torch.load(file)
        directions = load_file(self.folder / f"directions-{saved['round']}.safetensors")
        directions = {name: value.to(self.model.device) for name, value in directions.items()}
        self._start(InfluenceScorer.from_directions(self.model, directions, capabilities), saved["round"])
        ids, scores = saved["scores"]
        self._ids, self._scores = [ids], [scores]

    def close(self) -> None:
        self._stop()
        self._hook.remove()
        self._row_ids.detach()

    def _rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def _is_writer(self) -> bool:
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
