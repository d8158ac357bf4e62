"""RankMe: how many directions the model's last hidden states really use, watched while it trains (equation 8).

    trainer.add_callback(RankMeCallback(rows, every=100))      # logs `rank_me`
    rank_me(hidden_states)                                     # of (samples, hidden) vectors of one's own

It needs no labels: a value that falls says that representations collapse, one that rises that they spread. The most it
can be is the smaller of samples and hidden size, so take several times as many positions as the model is wide.
Garrido et al., 2210.02885.
"""

from __future__ import annotations

import inspect

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.nll import IGNORED_LABEL, check_predicted
from mobilellm_hf.training.monitors import PeriodicMonitor, evaluation_mode, own_batches

EPSILON = 1e-7
# Rows are read until they hold so many times the positions wanted, so that these come from many documents.
SPREAD = 4
SEED = 0


def rank_me(hidden_states: torch.Tensor, epsilon: float = EPSILON) -> float:
    """exp of the entropy of the singular values, as shares of their sum: equation (8).

    Args:
        hidden_states: (samples, hidden); taken in double precision, on the CPU.
        epsilon: added to each share, as in Garrido et al.

    Raises:
        ValueError: the hidden states are no matrix, have no samples or are all zero, or a value is not finite.
    """
    if hidden_states.dim() != 2 or hidden_states.numel() == 0:
        raise ValueError(f"hidden states must be (samples, hidden), not {tuple(hidden_states.shape)}")
    matrix = hidden_states.detach().cpu().double()
    if not matrix.isfinite().all():
        raise ValueError("hidden states hold NaN or infinity: the model's weights are ruined")
    values = torch.linalg.svdvals(matrix)
    if values.sum() == 0:
        raise ValueError("hidden states are all zero: they have no rank")
    shares = values / values.sum() + epsilon
    return torch.exp(-(shares * shares.log()).sum()).item()


class RankMeCallback(PeriodicMonitor):
    """Logs `rank_me` of the last hidden states before the first step, every `every` steps and after the last.

    Args:
        rows: rows as for `mean_nll`. Which of them, and which positions that predict a token, are used is a random
            choice that is always the same.
        every: steps between two figures.
        positions: hidden states taken, at most; at least twice the model's width says most.
        batch_size: rows of a batch, per process.

    Raises:
        ValueError: no position predicts a token.
    """

    def __init__(self, rows: Dataset, every: int, positions: int = 2048, batch_size: int = 16):
        super().__init__(every)
        if positions < 2:
            raise ValueError(f"positions={positions} must be at least 2")
        self.positions = positions
        self.rows = _spread_rows(rows, positions)
        self.batch_size = batch_size
        self._batches = None

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        if self._batches is None:
            self._batches = own_batches(self.rows, self.batch_size)
        found = []
        with evaluation_mode(model):
            for turn, (batch, weight) in enumerate(self._batches):
                inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
                hidden = last_hidden_states(model, inputs)[:, :-1].cpu()
                if weight:
                    found.append((turn, hidden[batch["labels"][:, 1:] != IGNORED_LABEL].float()))
        # In the order of the rows, however many processes they were shared out to.
        states = [states for _, states in sorted(gather_object(found), key=lambda item: item[0])]
        count = sum(map(len, states))
        check_predicted(count)
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))[: self.positions]
        return {"rank_me": rank_me(torch.cat(states)[chosen])}


def _spread_rows(rows: Dataset, positions: int) -> Dataset:
    """A random choice of rows that have some times as many tokens as positions are wanted."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen, tokens = [], 0
    for number in order:
        if tokens >= SPREAD * positions:
            break
        chosen.append(number)
        tokens += len(rows[number]["input_ids"])
    return rows.select(sorted(chosen))


def last_hidden_states(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, tokens, hidden), what the head gets, at the cost of one token's logits.

    The whole model is called and the backbone listened to: a backbone called by itself would find its embedding and
    norm sharded, under FSDP2.
    """
    outputs = []
    handle = model.get_decoder().register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    try:
        model(**inputs, **options, use_cache=False)
    finally:
        handle.remove()
    return outputs[0]
