"""Before rejection drops anything: does a short training on the best tenth of the scores beat one on the worst?

    found = sign_check(model, rows, scores, list(probes), probes, steps=20, learning_rate=1e-3)
    found.bottom_wins, found.verdict()          # what `InfluenceResamplingCallback` refuses

Equation (6) trusts a sign, and influence can have the wrong one: of another checkpoint, another curvature, probes too
small. So both tenths are trained on from the model as it is: equal tokens at every step, the same places of a random
order, several orders. What decides is the probes' NLL afterwards. Training is by AdamW on the NLL of tokens, where the
run distils too. The model, its gradients and all random numbers are afterwards what they were.

It costs 2 x seeds x steps training steps and 2 x seeds + 1 evaluations of the probes, and the memory of a second
optimizer; processes share the trainings, and each that is finished stays on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.influence.mixing import joint_influence
from mobilellm_hf.influence.student_t import student_t_quantile
from mobilellm_hf.nll import IGNORED_LABEL, evaluation_batches, mean_nll, predicted_tokens, summed_nll
from mobilellm_hf.workspace import write_whole

SHARE = 0.1
SEEDS = 3
# Of the run's: at its peak a new optimizer's first steps undo more than they teach, whatever they are taken on.
LEARNING_RATE_SHARE = 0.1
# Fewer rows than these on each side would be learnt by heart.
MIN_ROWS = 8
MAX_PASSES = 4
ARMS = ("top", "bottom")


class SignCheckError(ValueError):
    """The samples that were about to be dropped teach more than those that would be kept."""


@dataclass(frozen=True)
class SignCheck:
    """What both trainings left.

    Attributes:
        rows: of each side.
        tokens: predicted tokens that each training saw.
        steps: of each training.
        before: capability -> NLL of its probe, nats per token.
        top, bottom: capability -> the same after training on that side, one figure a seed.
        difference: mean over seeds and capabilities of bottom - top; positive: the scores have the right sign.
        low, high: its 95% interval over seeds (Student's t); NaN with one seed.
    """

    rows: int
    tokens: int
    steps: int
    before: dict[str, float]
    top: dict[str, list[float]]
    bottom: dict[str, list[float]]
    difference: float
    low: float
    high: float

    @property
    def bottom_wins(self) -> bool:
        """Whether the bottom is better than the top by more than the seeds vary, be it that both unteach.

        One seed is taken at its word. A top whose NLL is no number loses; if the bottom's is none, nothing is shown.
        """
        figures = self.figures()
        if not math.isfinite(figures["sign_check/bottom"]):
            return False
        if not math.isfinite(figures["sign_check/top"]):
            return True
        return (self.difference if math.isnan(self.high) else self.high) < 0

    def figures(self) -> dict[str, float]:
        """What is logged."""
        sides = {name: float(np.mean(list(getattr(self, name).values()))) for name in ARMS}
        return {
            "sign_check/before": float(np.mean(list(self.before.values()))),
            "sign_check/top": sides["top"],
            "sign_check/bottom": sides["bottom"],
            "sign_check/difference": self.difference,
            "sign_check/low": self.low,
            "sign_check/high": self.high,
        }

    def verdict(self) -> str:
        found, seeds = self.figures(), len(next(iter(self.top.values())))
        if self.bottom_wins:
            says = "the bottom wins, so the sign is not to be trusted"
        elif not math.isfinite(found["sign_check/bottom"]):
            says = "no verdict, since the training on the bottom was ruined: lower the learning rate"
        elif not min(found["sign_check/top"], found["sign_check/bottom"]) < found["sign_check/before"]:
            says = "no verdict, since neither side teaches the probes anything"
        elif self.low > 0:
            says = "the top wins"
        else:
            says = "no verdict, since the seeds differ by as much as the sides"
        return (
            f"{says}: NLL of the probes {found['sign_check/before']:.4f} before, {found['sign_check/top']:.4f} after "
            f"{self.steps} steps on the top {self.rows} rows, {found['sign_check/bottom']:.4f} on the bottom ones; "
            f"difference {self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], {seeds} seeds, {self.tokens:,} "
            "tokens each"
        )


def sign_check(
    model: PreTrainedModel,
    rows: Dataset,
    scores: torch.Tensor,
    capabilities: Sequence[str],
    probes: Mapping[str, Dataset],
    *,
    steps: int,
    learning_rate: float,
    rule: str = "mean",
    seeds: int = SEEDS,
    batch_size: int = 8,
    folder: Path | None = None,
) -> SignCheck:
    """Trains on the tenth of the rows with the highest and with the lowest scores, and compares the probes' NLL.

    To be called by all processes, with the same model.

    Args:
        model: the unwrapped model; its trainable parameters are those that learn.
        rows: what was scored.
        scores: (N, C); rows that are not finite are on no side.
        probes: capability -> tokenized rows.
        steps: of each training; fewer if it would read its rows more than four times.
        learning_rate: the peak, reached after half of the steps.
        rule: as `keep_mask`: one capability, whose probe alone decides, or the mean of all ("mean", "any").
        seeds: orders of the rows.
        folder: where finished trainings stay, for a run that is interrupted; those of another model or of other rows
            are done again.

    Raises:
        ValueError: fewer than 16 rows have a finite score.
    """
    sides = _sides(scores, capabilities, rule)
    watched = dict(probes) if rule not in probes else {rule: probes[rule]}
    steps = max(1, min(steps, MAX_PASSES * len(sides["top"]) // batch_size))
    parts = {name: rows.select(places) for name, places in sides.items()}
    tokens = {name: _row_tokens(part) for name, part in parts.items()}
    start = [float(p.detach().double().norm()) for p in model.parameters()]
    settings = [steps, batch_size, learning_rate, sorted(watched), sides["top"], sides["bottom"], start]
    jobs = [(name, seed) for seed in range(seeds) for name in ARMS]
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name, seed in jobs[rank::ranks]:
        file = None if folder is None else folder / f"{name}-{seed}.json"
        saved = _read(file, settings)
        if saved is None:
            orders, budgets = _plan(tokens, seed, steps, batch_size)
            with _borrowed(model):
                _train(model, parts[name].select(orders), budgets, batch_size, learning_rate)
                saved = {probe: mean_nll(model, part, batch_size) for probe, part in watched.items()}
            _write(file, settings, saved)
        found[name, seed] = saved
    if ranks > 1:
        gathered: list[dict] = [found] * ranks
        dist.all_gather_object(gathered, found)
        found = {key: value for part in gathered for key, value in part.items()}
    before = [{probe: mean_nll(model, part, batch_size) for probe, part in watched.items()}]
    if ranks > 1:  # each of which may round differently, and all are to decide alike
        dist.broadcast_object_list(before)
    read = sum(sum(_plan(tokens, seed, steps, batch_size)[1]) for seed in range(seeds)) // seeds
    return _summary(found, before[0], len(sides["top"]), read, steps, seeds)


def _sides(scores: torch.Tensor, capabilities: Sequence[str], rule: str) -> dict[str, list[int]]:
    influence = joint_influence(scores, capabilities, [rule] if rule in capabilities else None)
    finite = influence.isfinite().nonzero().flatten()
    if len(finite) < 2 * MIN_ROWS:
        raise ValueError(
            f"{len(finite)} rows have a finite score, and the check of their sign needs {2 * MIN_ROWS}: score more "
            "(candidates_per_source), or leave the check out (sign_check: off)"
        )
    order = finite[influence[finite].argsort(descending=True, stable=True)].tolist()
    count = max(MIN_ROWS, round(SHARE * len(order)))
    return {"top": sorted(order[:count]), "bottom": sorted(order[-count:])}


def _row_tokens(rows: Dataset) -> np.ndarray:
    """(rows,) predicted tokens of each."""
    columns = rows.select_columns([name for name in ("input_ids", "labels") if name in rows.column_names])
    part = columns.with_format("numpy")
    return np.array([int((row["labels"][1:] != IGNORED_LABEL).sum()) if "labels" in row else len(row["input_ids"]) - 1
                     for row in part])  # fmt: skip


def _plan(tokens: Mapping[str, np.ndarray], seed: int, steps: int, batch_size: int) -> tuple[list[int], list[int]]:
    """The places of the rows of all steps, and the tokens of each step: what the side with fewer has."""
    random, count = np.random.default_rng([seed, 17]), len(tokens["top"])
    passes = -(-steps * batch_size // count)
    order = np.concatenate([random.permutation(count) for _ in range(passes)])[: steps * batch_size]
    budgets = [
        min(int(part[order[start : start + batch_size]].sum()) for part in tokens.values())
        for start in range(0, len(order), batch_size)
    ]
    return order.tolist(), budgets


def _train(
    model: PreTrainedModel, rows: Dataset, budgets: Sequence[int], batch_size: int, learning_rate: float
) -> None:
    """One step a batch, on its first `budget` predicted tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, len(budgets) // 2)
    for step, (batch, _) in enumerate(evaluation_batches(model, rows, batch_size)):
        kept = batch["labels"][:, 1:] != IGNORED_LABEL
        surplus = kept.flatten().cumsum(0).view(kept.shape) > budgets[step]
        batch["labels"][:, 1:][surplus] = IGNORED_LABEL
        loss = summed_nll(model, batch) / predicted_tokens(batch).sum().clamp(min=1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@contextmanager
def _borrowed(model: PreTrainedModel) -> Iterator[None]:
    """The model may learn meanwhile; afterwards its weights and gradients are to the bit what they were."""
    saved = [(p, p.detach().to("cpu", copy=True), p.grad) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in saved:
                parameter.copy_(value)
                parameter.grad = gradient


def _read(file: Path | None, settings: list) -> dict[str, float] | None:
    if file is None or not file.exists():
        return None
    saved = json.loads(file.read_text())
    return saved["nll"] if saved["settings"] == json.loads(json.dumps(settings)) else None


def _write(file: Path | None, settings: list, nll: Mapping[str, float]) -> None:
    if file is not None:
        write_whole(file, lambda path: path.write_text(json.dumps({"settings": settings, "nll": dict(nll)})))


def _summary(found: Mapping, before: dict[str, float], rows: int, tokens: int, steps: int, seeds: int) -> SignCheck:
    sides = {name: {probe: [found[name, seed][probe] for seed in range(seeds)] for probe in before} for name in ARMS}
    per_seed = np.mean([np.subtract(sides["bottom"][probe], sides["top"][probe]) for probe in before], axis=0)
    half = math.nan if seeds == 1 else student_t_quantile(seeds - 1) * per_seed.std(ddof=1) / math.sqrt(seeds)
    mean = float(per_seed.mean())
    return SignCheck(
        rows, tokens, steps, before, sides["top"], sides["bottom"], mean, float(mean - half), float(mean + half)
    )


def save_sign_check(file: Path, found: SignCheck) -> None:
    """As JSON: every figure and the verdict."""
    document = {"verdict": found.verdict(), **asdict(found)}
    write_whole(file, lambda path: path.write_text(json.dumps(document, indent=2)))
