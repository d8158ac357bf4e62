"""Influence resampling: every so many steps, the model that is being trained decides what it reads next.

    callback = InfluenceResamplingCallback(mixture, probes, at_start=True)    # once, as the paper's phases begin
    callback = InfluenceResamplingCallback(mixture, probes, every=1_000)      # continuous use
    Trainer(model, arguments, train_dataset=mixture, callbacks=[callback])

A round scores candidates of every source with the model as it is (equation 2), rejects those that help no more
(equation 6), weighs the sources anew (equations 4 and 5), and applies both from a draw that no worker has fetched.
A phase that has nothing left to teach says so and ends. Before a first sample is dropped, a short training
on the top and on the bottom tenth of the scores tells whether their sign is to be trusted (`sign_check`). Rounds are a
function of the weights and the seed alone, so a run that was killed repeats them to the bit; all ranks share the
scoring and decide alike.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.data.shared_history import MAX_CHANGES
from mobilellm_hf.influence.curvature import AdamCurvature, Curvature
from mobilellm_hf.influence.overlap import refuse_overlap
from mobilellm_hf.influence.scorer import InfluenceScorer, check_parameters, check_rows
from mobilellm_hf.training.fused_scores import FusedScores
from mobilellm_hf.training.live_mixture import MixtureCallback, add_figures, draws_per_step, unwrap
from mobilellm_hf.training.rounds import Round, Rules, decide, write_round
from mobilellm_hf.training.scored_parts import ScoredParts
from mobilellm_hf.training.sign_check import LEARNING_RATE_SHARE, SignCheckError, save_sign_check, sign_check

logger = logging.getLogger(__name__)

STATE_KEY = "mobilellm_hf.resampling"


class PhaseEndedError(RuntimeError):
    """Training was asked to begin, or to go on, where influence has found nothing left to teach."""


class InfluenceResamplingCallback(MixtureCallback):
    """Rejects samples and reweighs sources by the influence that the model in training finds.

    Logged after each round: `influence/positive` and `influence/positive/<capability>` (shares of the scored
    samples), `influence/spread` (interquartile range of the mean influence, a share of the first round's),
    `influence/rejected` (share of all rows) and `influence/cost` (share of the training time so far), and in the round
    that drops the first samples `sign_check/...` (NLL of the probes before, after the top and after the bottom tenth,
    their difference and its 95% interval). Scores, pictures of all rounds, and the sign check with its verdict are in
    the folder `mixture` of the output folder.

    Args:
        mixture: the Trainer's `train_dataset`.
        probes: capability -> tokenized rows that nobody trains on.
        every: steps between two rounds; None: no round but at the start.
        curvature: "adam" (the optimizer's second moments; before its first step it has none, and a round at the start
            goes without), "identity", or a `Curvature`, such as that of the checkpoint that training begins with.
        reject: "nonpositive" as equation (6), or None to reweigh only.
        at_start: a round before the first step, whose decisions hold for every draw: equations (6) and (7).
        rule: whose influence must be positive: the "mean" over capabilities, "any", or one of them.
        reweigh: whether sources get new weights; if not, samples are rejected only.
        candidates_per_source: rows of each source that a round scores, chosen at random; None: all. Rows that are not
            scored stay as they were. Sources whose weight is zero are candidates too, and may get one; streams are
            not, and keep theirs.
        scores: "separate" passes over the candidates; or "fused": the scores of what was trained on since the last
            round, taken inside the training steps with the probe gradients of that round, at little more than their
            cost. The first fused round only begins to listen.
        floor: share of a source whose influence is not positive.
        min_positive: a smaller share of positive samples ends the phase.
        min_spread: so does a spread that has narrowed below this share of the first round's; None: never.
        allow_overlap: train on rows that share documents with a probe, which is an error otherwise.
        batch_size: rows of a batch in scoring.
        sign_check: "refuse": where the bottom tenth of the scores teaches more than the top tenth, by more than seeds
            vary, nothing is dropped and training stops; "warn": it goes on; None: no check. Of a run's first round
            that drops samples only.
        sign_check_steps: of each of its six trainings, at a tenth of the run's learning rate; by default a fiftieth of
            the run's steps, but 4 to 20. So it costs an eighth of a short run's steps, and 120 of a long one's, and
            the probes' NLL seven times.
        on_round: called with each `Round`, on every rank.

    Raises:
        ValueError: at the start of training, if a probe is empty, shares documents with the mixture, or does not fit
            the model; if the model is sharded; or if there is no time for a single round.
        PhaseEndedError: at the start of training, if a round there, or one that the checkpoint remembers, has ended
            the phase. No step is taken.
        SignCheckError: in a round (a ValueError), with the figures and the remedies.
    """

    def __init__(
        self,
        mixture: MixtureDataset,
        probes: Mapping[str, Dataset],
        every: int | None = None,
        curvature: Literal["adam", "identity"] | Curvature = "adam",
        reject: Literal["nonpositive"] | None = "nonpositive",
        *,
        at_start: bool = False,
        rule: str = "mean",
        reweigh: bool = True,
        candidates_per_source: int | None = 256,
        scores: Literal["separate", "fused"] = "separate",
        floor: float = 0.0,
        min_positive: float = 0.02,
        min_spread: float | None = None,
        allow_overlap: bool = False,
        batch_size: int = 8,
        sign_check: Literal["refuse", "warn"] | None = "refuse",
        sign_check_steps: int | None = None,
        seed: int = 0,
        delay_steps: int = 16,
        source_loss: bool = True,
        on_round: Callable[[Round], None] | None = None,
    ):
        super().__init__(mixture, delay_steps, source_loss)
        if isinstance(curvature, str):
            _check_choice("curvature", curvature, ("adam", "identity"))
        _check_choice("reject", reject, ("nonpositive", None))
        _check_choice("scores", scores, ("separate", "fused"))
        _check_choice("rule", rule, ("mean", "any", *probes))
        _check_choice("sign_check", sign_check, ("refuse", "warn", None))
        if sign_check_steps is not None and sign_check_steps < 1:
            raise ValueError(f"sign_check_steps={sign_check_steps} must be positive")
        if (every is not None and every < 1) or not probes or not 0 <= floor < 1:
            raise ValueError(f"every={every} must be positive, probes={list(probes)} not empty, floor={floor} a share")
        if every is None and not at_start:
            raise ValueError("give every, or at_start=True: else there is no round")
        if every is None and scores == "fused":
            raise ValueError("scores='fused' are heard between two rounds: give every")
        if reject is None and not reweigh:
            raise ValueError("with reject=None and reweigh=False a round would change nothing")
        self.probes, self.every, self.at_start = dict(probes), every, at_start
        self.curvature = curvature
        self.candidates_per_source, self.scores = candidates_per_source, scores
        self.rules = Rules(rule, reject is not None, reweigh, floor, min_positive, min_spread)
        self.allow_overlap, self.batch_size, self.seed, self.on_round = allow_overlap, batch_size, seed, on_round
        self.sign_check, self.sign_check_steps = sign_check, sign_check_steps
        self.rounds: list[Round] = []
        self._keep = np.ones(mixture.num_rows, dtype=bool)
        self._logged = 0  # rounds
        self._fused: FusedScores | None = None
        self._began = self._seconds = self._scoring = 0.0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 0:
            self.rounds, self._logged, self._seconds, self._scoring = [], 0, 0.0, 0.0
            self._keep = np.ones(self.mixture.num_rows, dtype=bool)
        super().on_train_begin(args, state, control, model=model, **kwargs)
        model = unwrap(model)
        check_parameters(model)
        for name, probe in self.probes.items():
            check_rows(f"probe {name!r}", probe, model)
        if self.rounds and self.rounds[-1].ended:
            raise PhaseEndedError(f"the phase ended at step {self.rounds[-1].step}: {self.rounds[-1].ended}")
        if self.every is not None and state.max_steps // self.every >= MAX_CHANGES:
            raise ValueError(f"every={self.every} makes more than {MAX_CHANGES} rounds in {state.max_steps} steps")
        if not self.allow_overlap and state.global_step == 0:
            remedy = "Take them out of the mixture or the probes, or set allow_overlap to True."
            refuse_overlap(
                self.mixture.select(np.arange(self.mixture.num_rows)), self.probes, remedy, what="the mixture"
            )
        if self.every is not None and self.every + self.delay_steps >= state.max_steps:
            raise ValueError(
                f"every={self.every} and delay_steps={self.delay_steps} leave no round in {state.max_steps} steps"
            )
        self._began = time.perf_counter()
        if self.scores == "fused":
            self._fused = FusedScores(model, self.mixture, Path(self.mixture.keep_folder))
            self._fused.check_loss()
            if state.global_step > 0 and (self.at_start or state.global_step >= self.every):
                self._fused.resume(state.global_step, list(self.probes))
        if self.at_start and state.global_step == 0:
            self._round(args, state, control, model, optimizer, from_draw=0)
            if self.rounds and self.rounds[-1].ended:
                self._detach()
                raise PhaseEndedError(f"the phase ends before it begins: {self.rounds[-1].ended}")

    def on_step_begin(self, args, state, control, **kwargs):
        if self._fused is not None:
            self._fused.check_loss()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._fused is not None:
            self._fused.collect()
        first_draw = (state.global_step + self.delay_steps) * draws_per_step(args)
        due = self.every is not None and state.global_step % self.every == 0
        if due and first_draw < state.max_steps * draws_per_step(args):
            self._round(args, state, control, unwrap(model), optimizer, first_draw)
        if self._fused is not None and control.should_save:
            self._fused.save(state.global_step)
        if control.should_save:
            self._store(state)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if self._fused is not None:
            self._fused.close()
            self._fused = None
        if self.rounds:
            logger.info(
                "influence: %d rounds, %.1f%% of the training time", len(self.rounds), 100 * self.rounds[-1].cost
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if logs is not None and "loss" in logs and len(self.rounds) > self._logged:
            self._logged = len(self.rounds)
            add_figures(state, logs, self.rounds[-1].figures())

    # A round

    def _round(self, args, state, control, model: PreTrainedModel, optimizer, from_draw: int) -> None:
        start = time.perf_counter()
        rows, scores = self._fused.take() if self._fused is not None else (None, None)
        scorer = InfluenceScorer(model, self.probes, self._curvature(optimizer, model), batch_size=self.batch_size)
        if self._fused is None:
            rows = self._candidates(state.global_step)
            scores = self._score(scorer, rows, state.global_step)
        if len(rows):
            self._apply(args, state, control, model, rows, scores, start, from_draw)
        else:
            self._scoring += time.perf_counter() - start
        if self._fused is not None:
            self._fused.listen(scorer, state.global_step)

    def _apply(
        self, args, state, control, model, rows: np.ndarray, scores: torch.Tensor, start: float, from_draw: int
    ):
        step, mixture = state.global_step, self.mixture
        first_spread = self.rounds[0].spread if self.rounds else None
        found, keep = decide(self.rules, mixture, list(self.probes), rows, scores, self._keep, step, first_spread)
        if self._must_check(found, keep):
            found.sign_check = self._check_sign(args, state, model, rows, scores)
        found.cost = self._cost(time.perf_counter() - start)
        self.rounds.append(found)
        write_round(Path(mixture.keep_folder), self.rounds, rows, scores, mixture, list(self.probes))
        if found.ended:
            control.should_training_stop = control.should_save = True
            logger.warning("step %d: %s; the phase ends here", step, found.ended)
        else:
            self._keep = keep
            found.from_draw = mixture.set_weights(found.weights, from_draw, None if keep.all() else keep)
        control.should_log = step > 0
        self._scoring += time.perf_counter() - start
        self._store(state)
        if self.on_round is not None:
            self.on_round(found)

    def _must_check(self, found: Round, keep: np.ndarray) -> bool:
        first = not any(earlier.sign_check for earlier in self.rounds)
        return self.sign_check is not None and first and self.rules.rejects and not found.ended and not keep.all()

    def _check_sign(self, args, state, model, rows: np.ndarray, scores: torch.Tensor) -> dict[str, float]:
        """The figures of the check; raises a SignCheckError if it is to be refused that the bottom wins."""
        folder, step = Path(self.mixture.keep_folder), state.global_step
        steps = self.sign_check_steps or min(20, max(4, state.max_steps // 50))
        found = sign_check(
            model, self.mixture.select(rows), scores, list(self.probes), self.probes, steps=steps,
            learning_rate=LEARNING_RATE_SHARE * args.learning_rate, rule=self.rules.rule,
            batch_size=args.train_batch_size, folder=folder / f"sign-check-{step}",
        )  # fmt: skip
        save_sign_check(folder / f"sign-check-{step}.json", found)
        message = f"sign check at step {step}: {found.verdict()}"
        if found.bottom_wins and self.sign_check == "refuse":
            raise SignCheckError(
                f"{message}. Nothing was dropped. Score with a model that was trained for longer, with another "
                "curvature or more rows a probe; or set reject: none and only reweigh; or sign_check: warn to drop "
                "them all the same, and the run goes on from its last checkpoint"
            )
        logger.log(logging.INFO if found.low > 0 else logging.WARNING, message)
        return found.figures()

    def _cost(self, seconds: float) -> float:
        """Share of the training time that rounds have taken, this one included."""
        spent = self._scoring + seconds
        return spent / max(1e-9, self._seconds + time.perf_counter() - self._began)

    def _curvature(self, optimizer, model: PreTrainedModel):
        if not isinstance(self.curvature, str):
            return self.curvature
        if self.curvature == "identity" or not optimizer.state_dict()["state"]:
            return "identity"
        return AdamCurvature.from_optimizer(optimizer, model)

    def _candidates(self, step: int) -> np.ndarray:
        """(rows,) the `row_id` of the rows that this round scores, sorted."""
        chosen = []
        for index, name in enumerate(self.mixture.sources):
            rows = self.mixture.rows_of(name)
            if self.candidates_per_source is not None and len(rows) > self.candidates_per_source:
                random = np.random.default_rng([self.seed, step, index])
                rows = random.choice(rows, self.candidates_per_source, replace=False)
            chosen.append(rows)
        return np.sort(np.concatenate(chosen))

    def _score(self, scorer: InfluenceScorer, rows: np.ndarray, step: int) -> torch.Tensor:
        """(rows, C) of all rows, on every rank: each scores its part, and keeps it on disk until all are done."""
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        parts = ScoredParts(Path(self.mixture.keep_folder), f"{step}-{rank}of{ranks}", scorer)
        scores = parts.score(self.mixture, rows[rank::ranks], self.batch_size)
        result = torch.empty(len(rows), len(self.probes), dtype=torch.float64)
        gathered: list[torch.Tensor] = [scores] * ranks
        if distributed:
            dist.all_gather_object(gathered, scores)
        for number, part in enumerate(gathered):
            result[number::ranks] = part
        parts.remove()
        return result

    # State

    def _store(self, state) -> None:
        super()._store(state)
        seconds = self._seconds + (time.perf_counter() - self._began if self._began else 0.0)
        state.stateful_callbacks[STATE_KEY] = {
            "settings": self._settings(),
            "rounds": [asdict(found) for found in self.rounds],
            "seconds": seconds,
            "scoring": self._scoring,
        }

    def _settings(self) -> dict:
        names = (
            "every", "at_start", "candidates_per_source", "scores", "seed", "delay_steps",
        )  # fmt: skip
        curvature = self.curvature if isinstance(self.curvature, str) else type(self.curvature).__name__
        return {name: getattr(self, name) for name in names} | {
            "probes": list(self.probes), "curvature": curvature, **asdict(self.rules)
        }  # fmt: skip

    def _restore(self, args, state) -> None:
        super()._restore(args, state)
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is None:
            raise ValueError(f"the checkpoint of step {state.global_step} was trained without influence resampling")
        for name, value in self._settings().items():
            if saved["settings"].get(name) != value:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} was resampled with {name}="
                    f"{saved['settings'].get(name)!r}, not {value!r}: resume with its settings"
                )
        self.rounds = [Round(**found) for found in saved["rounds"]]
        self._logged = len(self.rounds)
        self._seconds, self._scoring = saved["seconds"], saved["scoring"]
        keep = self.mixture.kept()
        self._keep = np.ones(self.mixture.num_rows, dtype=bool) if keep is None else keep


def _check_choice(name: str, value: object, choices: Sequence) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
