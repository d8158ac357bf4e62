"""H^-1 of equation (2), applied to the probes' gradients once, so that it costs nothing per scored sample.

- identity: none. First order, as TracIn.
- `AdamCurvature`: the optimizer's own second moments, which a checkpoint's `optimizer.pt` already holds; H is
  diag(sqrt(v) + eps), by which Adam's step on a sample lowers the probe's loss. The cheapest one that knows the scale
  of each weight, and the one to begin with.
- `DataInfCurvature`: the closed form of DataInf (2310.00902) that AutoMixer (2506.21910) and so MobileLLM-R1 use.
- `EKFACCurvature`, in `influence.ekfac`: Kronecker factors through the library kronfluence, an extra.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer

from mobilellm_hf.influence.gradients import exact_attention
from mobilellm_hf.nll import evaluation_batches, summed_nll

Directions = dict[str, torch.Tensor]


class Curvature(Protocol):
    """What a scorer does to the probes' gradients. Parameters left out of the result do not count in the scores."""

    def precondition(self, directions: Directions) -> Directions:
        """parameter name -> (C, *shape), to the same after H^-1."""


class IdentityCurvature:
    def precondition(self, directions: Directions) -> Directions:
        return directions


class AdamCurvature:
    """H = diag(sqrt(v) + eps), v the bias-corrected second moments of Adam or AdamW.

    Args:
        second_moments: parameter name -> v, bias-corrected.
    """

    def __init__(self, second_moments: Mapping[str, torch.Tensor], eps: float = 1e-8):
        self.second_moments, self.eps = second_moments, eps

    @classmethod
    def from_checkpoint(cls, folder: str | Path, model: PreTrainedModel) -> "AdamCurvature":
        """Of the `optimizer.pt` that a Trainer wrote beside a checkpoint of `model`.

        Raises:
            ValueError: the file is missing, is of another optimizer or of a model of other shapes.
        """
        file = Path(folder) / "optimizer.pt"
        if not file.exists():
            raise ValueError(
                f"{file} does not exist: the adam curvature needs a checkpoint that the Trainer saved with its "
                "optimizer (save_only_model=False), and not under FSDP, which keeps it in another form"
            )
        # In the order in which the Trainer groups them: with weight decay, then without.
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        ordered = sorted(trained, key=lambda item: item[0] not in decayed)
        return cls._from_state(torch.load(file, map_location="cpu", weights_only=True), ordered, str(file))

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> "AdamCurvature":
        """Of a running optimizer.

        Raises:
            ValueError: it has taken no step yet, or is another kind of optimizer.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if unknown := [p for p in parameters if id(p) not in names]:
            raise ValueError(f"the optimizer holds {len(unknown)} parameters that the model does not have")
        return cls._from_state(optimizer.state_dict(), [(names[id(p)], p) for p in parameters], "the optimizer")

    @classmethod
    def _from_state(cls, state: dict, parameters: list[tuple[str, nn.Parameter]], label: str) -> "AdamCurvature":
        groups = {index: group for group in state["param_groups"] for index in group["params"]}
        if len(groups) != len(parameters):
            raise ValueError(
                f"{label} has {len(groups)} parameters, the model {len(parameters)}: it is of another model"
            )
        moments = {}
        for index, (name, parameter) in zip(groups, parameters, strict=True):
            entry = state["state"].get(index)
            if entry is None or "exp_avg_sq" not in entry:
                raise ValueError(
                    f"{label} has no second moments (exp_avg_sq) of {name}: train with Adam or AdamW first"
                )
            if entry["exp_avg_sq"].shape != parameter.shape:
                raise ValueError(
                    f"{label} has second moments of shape {tuple(entry['exp_avg_sq'].shape)} where {name} has "
                    f"{tuple(parameter.shape)}: it is of another model"
                )
            correction = 1 - groups[index]["betas"][1] ** float(entry["step"])
            moments[name] = entry["exp_avg_sq"] / correction
        return cls(moments, next(iter(groups.values()))["eps"])

    def precondition(self, directions: Directions) -> Directions:
        if missing := set(directions) - set(self.second_moments):
            raise ValueError(f"the optimizer has no second moments of {sorted(missing)[0]}")
        return {
            name: value / (self.second_moments[name].to(value.device, value.dtype).sqrt() + self.eps)
            for name, value in directions.items()
        }


class DataInfCurvature:
    """DataInf's closed form, every parameter tensor l a layer of its own, as AutoMixer applies it.

        lambda_l = damping / (n d_l) * sum_i ||g_il||^2
        H_l^-1 v = 1 / (n lambda_l) * sum_i [ v - (v . g_il) / (lambda_l + ||g_il||^2) g_il ]

    Costs two passes over the rows of `dataset`, one by one.

    Args:
        model: the model that is to score.
        dataset: a sample of the training data, g_i the gradients of the mean NLL of its rows; a hundred rows do.
        layers: "embedding_and_final" (embeddings, last decoder layer, last norm and head; the other parameters do not
            count, as in AutoMixer) or "all".
        damping: 0.1 in the paper.
        on_batch: called with the number of rows done, twice over the data set (progress bars).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dataset: Dataset,
        layers: Literal["embedding_and_final", "all"] = "embedding_and_final",
        damping: float = 0.1,
        on_batch: Callable[[int], None] | None = None,
    ):
        if layers not in ("embedding_and_final", "all"):
            raise ValueError(f"layers={layers!r} must be 'embedding_and_final' or 'all'")
        if damping <= 0 or len(dataset) == 0:
            raise ValueError(f"damping={damping} must be positive, and the data set not empty ({len(dataset)} rows)")
        self.model, self.dataset, self.layers, self.damping = model, dataset, layers, damping
        self.on_batch = on_batch

    def precondition(self, directions: Directions) -> Directions:
        if self.layers == "embedding_and_final":
            names = embedding_and_final_names(list(directions))
            directions = {name: directions[name] for name in names}
        norms = {name: [] for name in directions}
        products = {name: [] for name in directions}
        for gradient in self._gradients(directions):
            for name, value in gradient.items():
                norms[name].append(value.pow(2).sum(dtype=torch.float64))
                products[name].append((directions[name].flatten(1) @ value.flatten()).double())
        count, result, factors = len(self.dataset), {}, {}
        for name, direction in directions.items():
            norm = torch.stack(norms[name])
            damping = self.damping * norm.mean() / direction[0].numel()
            if not (damping > 0 and damping.isfinite()):
                raise ValueError(f"the gradients of {name} are zero, or not finite, on the rows DataInf is fitted on")
            factors[name] = torch.stack(products[name]) / (damping + norm)[:, None] / (count * damping)  # (n, C)
            result[name] = direction / damping.to(direction.dtype)
        for row, gradient in enumerate(self._gradients(directions)):
            for name, value in gradient.items():
                factor = factors[name][row].to(value.dtype).view(-1, *[1] * value.dim())
                result[name] -= factor * value
        return result

    def _gradients(self, directions: Directions):
        """Every row's gradient of mean NLL."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in directions}
        with exact_attention(self.model.device):
            for batch, predicted in evaluation_batches(self.model, self.dataset, batch_size=1):
                loss = summed_nll(self.model, batch) / max(1, predicted)
                gradients = torch.autograd.grad(loss, list(parameters.values()))
                yield {name: g.to(directions[name].dtype) for name, g in zip(parameters, gradients, strict=True)}
                if self.on_batch is not None:
                    self.on_batch(1)


def embedding_and_final_names(names: list[str]) -> list[str]:
    """Parameters outside the decoder layers, and those of the last one."""
    depths = {name: re.search(r"\.(\d+)\.", name) for name in names}
    last = max((int(found[1]) for found in depths.values() if found), default=0)
    return [name for name, found in depths.items() if found is None or int(found[1]) == last]
