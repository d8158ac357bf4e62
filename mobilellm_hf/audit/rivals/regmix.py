"""RegMix (2407.01492) as Olmix (2602.12237) does it: a swarm of small models, a law of their losses, its best mixture.

    found = regmix(proxy, Path("runs/audit/rivals/regmix"), seed=0, models=18)
    found.details["laws"]["math"]               # c and t of the law that was fitted to this probe
    found.details["best_of_swarm"]              # the oracle: the best of the mixtures that were really trained

- The swarm: w ~ Dirichlet(s p^0.5 / Z), p the proportional mix, s over logspace(0.1, 5): from nearly one source to
  nearly p^0.5. What is above the cap on repetition goes to the other sources, and the law is fitted to the shares that
  were really read.
- The law of each probe: L(w) = exp(c) + exp(w . t), fitted by Huber's loss (delta 0.02).
- The mixture: the least mean_i L_i(w) + 0.05 KL(w || p) with w_j T <= 4 |D_j|, which is convex.

RegMix itself has no law: it fits LightGBM, or a linear regression, to the loss of one target over 512 models of 1M
parameters, draws 100,000 mixtures around p, and averages the best of them by prediction; no penalty keeps these near
p, and no cap counts repetition. Trees need hundreds of models; with the three a source that an audit can pay, they
would be constant. Olmix fits its law from 300 random starts; here from 10 that are computed, so that equal swarms have
equal laws. All models have one seed, and so start alike: what differs between them is the mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mobilellm_hf.audit.proxy import MixtureRun, Proxy, TrainedArm, train_mixtures
from mobilellm_hf.audit.rivals.common import (
    RivalWeights,
    RunsProgress,
    check_proxy,
    named_weights,
    probe_tokens,
    proportional_weights,
    repetition_caps,
)
from mobilellm_hf.audit.rivals.simplex import Minimum, cap_weights, minimise
from mobilellm_hf.progress import Stage

MODELS_PER_SOURCE = 3
STRENGTHS = (0.1, 5.0)
TEMPERATURE = 0.5
KL_PENALTY = 0.05
HUBER_DELTA = 0.02
# exp(c) as a share of the least loss that was seen, where fits start.
FLOORS = (0.01, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96, 0.99)


@dataclass(frozen=True)
class LogLinearLaw:
    """L(w) = exp(log_floor) + exp(w . slopes).

    Attributes:
        slopes: (sources,) t.
        error: root mean square of what the law misses the losses by that it was fitted to.
    """

    log_floor: float
    slopes: np.ndarray
    error: float

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(..., sources) -> (...,) losses."""
        return np.exp(self.log_floor) + np.exp(np.asarray(weights) @ self.slopes)


def swarm_weights(proportional: np.ndarray, models: int, seed: int, caps: np.ndarray | None = None) -> np.ndarray:
    """(models, sources) random mixtures, from peaked ones to flat ones.

    Args:
        proportional: (sources,) p.
        caps: (sources,) largest weights, as `cap_weights` takes them.
    """
    prior = proportional**TEMPERATURE
    prior = prior / prior.sum()
    random = np.random.default_rng(seed)
    strengths = np.geomspace(*STRENGTHS, models)
    drawn = np.stack([random.dirichlet(strength * prior) for strength in strengths])
    return drawn if caps is None else np.stack([cap_weights(weights, caps) for weights in drawn])


def fit_law(weights: np.ndarray, losses: np.ndarray, delta: float = HUBER_DELTA) -> LogLinearLaw:
    """The law of the least Huber loss (summed over the models), by L-BFGS from each of `FLOORS`.

    Args:
        weights: (models, sources) shares; losses: (models,) nats per token.

    Raises:
        ValueError: fewer models than the law has parameters, or a loss is not positive.
    """
    models, sources = weights.shape
    if models < sources + 1 or losses.shape != (models,):
        raise ValueError(f"{len(losses)} losses of {models} models do not determine a law of {sources + 1} parameters")
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise ValueError(f"the losses of the swarm must be positive and finite, not {losses.tolist()}")
    fits = [_fit_from(weights, losses, delta, floor) for floor in FLOORS]
    _, parameters = min(fits, key=lambda fit: fit[0])
    law = LogLinearLaw(float(parameters[0]), parameters[1:], 0.0)
    error = float(np.sqrt(np.mean((law(weights) - losses) ** 2)))
    return LogLinearLaw(law.log_floor, law.slopes, error)


def _fit_from(weights: np.ndarray, losses: np.ndarray, delta: float, floor: float) -> tuple[float, np.ndarray]:
    """Huber loss and (c, t) of a fit that starts where exp(c) is so large a share of the least loss."""
    above = np.log(losses - floor * losses.min())
    slopes = np.linalg.lstsq(weights, above, rcond=None)[0]  # weights sum to 1, so no intercept is needed
    start = np.concatenate([[np.log(floor * losses.min())], slopes])
    parameters = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    shares, targets = torch.tensor(weights, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        predicted = parameters[0].exp() + (shares @ parameters[1:]).exp()
        loss = torch.nn.functional.huber_loss(predicted, targets, delta=delta, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = closure().item()
    return (loss if np.isfinite(loss) else np.inf), parameters.detach().numpy()


def best_mixture(
    laws: list[LogLinearLaw], proportional: np.ndarray, caps: np.ndarray | None = None, penalty: float = KL_PENALTY
) -> Minimum:
    """The weights of the least mean_i L_i(w) + penalty x KL(w || p) under the caps."""

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logs = np.log(np.maximum(weights, 1e-300) / proportional)
        value = float(np.mean([law(weights) for law in laws]) + penalty * (weights @ logs))
        falls = np.mean([np.exp(weights @ law.slopes) * law.slopes for law in laws], axis=0)
        return value, falls + penalty * (logs + 1)

    return minimise(objective, proportional, caps)


def regmix(
    proxy: Proxy,
    folder: Path,
    *,
    seed: int = 0,
    models: int | None = None,
    penalty: float = KL_PENALTY,
    target_tokens: int | None = None,
    stage: Stage | None = None,
) -> RivalWeights:
    """Trains the swarm, or what is missing of it, and finds the mixture; processes share the models of a folder.

    Args:
        folder: of the swarm; a finished model leaves its result there, a killed one its last checkpoint.
        seed: of the mixtures that are drawn, and of every model.
        models: in the swarm; by default three a source.
        target_tokens: T of the cap on repetition; by default the tokens of a proxy.
        stage: shows the training steps of the swarm.

    Raises:
        ValueError: fewer than three models a source, a probe without rows, or too little data for T.
    """
    check_proxy(proxy)
    sources = len(proxy.sources)
    models = MODELS_PER_SOURCE * sources if models is None else models
    if models < MODELS_PER_SOURCE * sources:
        raise ValueError(
            f"models={models}: the law of {sources} sources has {sources + 1} parameters a probe and needs "
            f"{MODELS_PER_SOURCE * sources} models or more, three a source"
        )
    shares, caps = proportional_weights(proxy), repetition_caps(proxy, target_tokens)
    swarm = swarm_weights(shares, models, seed, repetition_caps(proxy, None))
    runs = [MixtureRun(f"swarm-{number}", named_weights(proxy, row), seed) for number, row in enumerate(swarm)]
    progress = RunsProgress(stage, proxy, runs, folder)
    arms = train_mixtures(proxy, runs, folder, callbacks=progress.callbacks, on_wait=progress.on_wait)
    read = np.stack([_shares_read(proxy, arm) for arm in arms])
    losses = np.array([[arm.probe_nll[name] for name in proxy.tuning_probes] for arm in arms])
    laws = [fit_law(read, column) for column in losses.T]
    found = best_mixture(laws, shares, caps, penalty)
    tokens = sum(arm.tokens for arm in arms) + models * probe_tokens(proxy)
    return RivalWeights(named_weights(proxy, found.weights), tokens, _details(proxy, read, losses, laws, found))


def _shares_read(proxy: Proxy, arm: TrainedArm) -> np.ndarray:
    """(sources,) shares of the tokens that a model has read."""
    length = {name: proxy.tokens_per_source[name] / len(rows) for name, rows in proxy.sources.items()}
    tokens = np.array([arm.rows[name] * length[name] for name in proxy.sources])
    return tokens / tokens.sum()


def _details(proxy: Proxy, read: np.ndarray, losses: np.ndarray, laws: list[LogLinearLaw], found: Minimum) -> dict:
    best = int(losses.mean(1).argmin())
    named = dict(zip(proxy.tuning_probes, laws, strict=True))
    return {
        "models": len(read),
        "laws": {
            name: {"c": law.log_floor, "t": _named_slopes(proxy, law), "rms_error": law.error}
            for name, law in named.items()
        },
        "predicted_nll": {name: float(law(found.weights)) for name, law in named.items()},
        "optimality_gap": found.gap,
        "best_of_swarm": {
            "weights": named_weights(proxy, read[best]),
            "nll": dict(zip(proxy.tuning_probes, losses[best].tolist(), strict=True)),
        },
        "swarm": [
            {"weights": named_weights(proxy, row), "nll": dict(zip(proxy.tuning_probes, nll.tolist(), strict=True))}
            for row, nll in zip(read, losses, strict=True)
        ],
    }


def _named_slopes(proxy: Proxy, law: LogLinearLaw) -> dict[str, float]:
    return dict(zip(proxy.sources, law.slopes.tolist(), strict=True))
