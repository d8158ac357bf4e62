"""The products of per-sample gradients with C directions, taken while a model's backward pass runs.

Two uses of one mechanism:

- **Scoring**: forward and backward through the activations, and instead of every weight's gradient the samples'
  products with the directions. The cost is that of a training step on the same samples.
- **Inside a training step** (`parameter_gradients=True`): the weights' gradients come out of the same matrices, so
  autograd, gradient accumulation, DDP and the optimizer see what they always see.

Linear layers run as an autograd function of their own; embeddings and norms are tapped behind their output. What a
backward needs goes through autograd's saved tensors, so gradient checkpointing frees it as usual. Our own class keeps
its loss without logits: the head's products are taken a chunk of tokens at a time, where the chunk's gradient is.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from mobilellm_hf.influence.inner_products import LowRank, embedding_products, norm_products
from mobilellm_hf.influence.tapped_layers import Tap, TappedCrossEntropy, TappedLinear, rms_norm_eps
from mobilellm_hf.modeling import MobileLLMForCausalLM
from mobilellm_hf.modeling.loss_mobilellm import linear_causal_lm_loss


class UnsupportedModuleError(ValueError):
    """A module whose gradient products are not known to be exact."""


class GradientProducts:
    """A context in which a model's backward passes leave `products`: (samples, C), or (samples, positions, C).

    Args:
        model: a causal LM of transformers, not wrapped.
        directions: parameter name, as in `model.named_parameters()`, -> (C, *shape) in fp32 or fp64, or `LowRank`.
            A parameter without a direction does not count.
        per_token: keep each position's share. The share of a weight is that of the position it was applied to.
        parameter_gradients: whether weights get their gradients too.

    Raises:
        UnsupportedModuleError: a direction belongs to a module that is not a Linear, an Embedding or an RMSNorm.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        directions: Mapping[str, torch.Tensor | LowRank],
        per_token: bool = False,
        parameter_gradients: bool = False,
    ):
        self.model, self.directions = model, directions
        self.per_token, self.parameter_gradients = per_token, parameter_gradients
        self.products: torch.Tensor | None = None
        if not directions:
            raise ValueError("no parameter counts: the curvature or `exclude` left none")
        device = next(model.parameters()).device
        self.anchor = None if parameter_gradients else torch.zeros((), requires_grad=True, device=device)
        if vars(model).get("_influence_products") is not None:
            raise RuntimeError("this model is in a training step that takes influence: leave that context first")
        self.shape = (0, 0)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._restore: list[tuple[object, str, object, object]] = []
        first = next(iter(directions.values()))
        self._count = len(first.left if isinstance(first, LowRank) else first)
        self._patches = self._plan()

    def begin(self, samples: int, positions: int) -> None:
        """Starts a batch: the next backward pass is of this many samples and positions."""
        self.shape = (samples, positions)
        shape = (samples, positions, self._count) if self.per_token else (samples, self._count)
        self.products = next(self.model.parameters()).new_zeros(shape, dtype=torch.float64)

    def direction(self, parameter: nn.Parameter | None) -> torch.Tensor | LowRank | None:
        return self.directions.get(self._names.get(id(parameter))) if parameter is not None else None

    def _plan(self) -> list[tuple[nn.Module, Callable]]:
        """What runs in the place of which module's forward."""
        plan, owned = [], set()
        for path, module in self.model.named_modules():
            own = {key: self._names.get(id(p)) for key, p in module._parameters.items() if p is not None}
            counted = [name for name in own.values() if name in self.directions]
            owned.update(counted)
            plain = "forward" not in vars(module) and set(own) <= {"weight", "bias"}
            if plain and isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
                if counted and (module.max_norm is not None or module.scale_grad_by_freq):
                    raise UnsupportedModuleError(f"{path}: an Embedding with max_norm or scale_grad_by_freq")
                plan.append((module, self._embedding(path, module)))
            elif plain and counted and isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                plan.append((module, self._linear(path, module)))
            elif plain and counted and (eps := rms_norm_eps(module)) is not None:
                plan.append((module, self._norm(path, module, eps)))
            elif counted:
                raise UnsupportedModuleError(
                    f"{path} is a {type(module).__name__}, whose gradient products are not known to be exact (Linear, "
                    f"Embedding and RMSNorm are): leave its parameters out with exclude={counted}"
                )
            elif module is self.model.get_input_embeddings():  # of another kind, and excluded: an anchor all the same
                plan.append((module, self._anchored(module)))
        if unknown := set(self.directions) - owned:
            raise ValueError(f"the model has no parameter {sorted(unknown)[0]!r}")
        return plan

    def __enter__(self) -> "GradientProducts":
        self._patch(self.model, "_influence_products", self)
        for module, forward in self._patches:
            self._patch(module, "forward", forward)
        for module in self.model.modules():  # the model, or what an adapter's wrapper holds
            if isinstance(module, MobileLLMForCausalLM):
                self._patch(module, "fused_loss", self._fused_loss(module))
        return self

    def __exit__(self, *exception) -> None:
        while self._restore:
            target, name, former, value = self._restore.pop()
            if vars(target).get(name) is not value:
                continue  # somebody has wrapped it since, and keeps a function that does nothing more
            if former is None:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, former)

    def _patch(self, target: object, name: str, value: object) -> None:
        self._restore.append((target, name, vars(target).get(name), value))
        object.__setattr__(target, name, value)

    def _linear(self, path: str, module: nn.Linear) -> Callable:
        directions = self.direction(module.weight), self.direction(module.bias)
        return lambda inputs: TappedLinear.apply(inputs, module.weight, module.bias, self, path, directions)

    def _embedding(self, path: str, module: nn.Embedding) -> Callable:
        forward, direction = module.forward, self.direction(module.weight)

        def products(ids: torch.Tensor, output_grad: torch.Tensor) -> None:
            if direction is not None:
                ids = self.by_sample(path, ids[..., None])[..., 0]
                output_grad = self.by_sample(path, output_grad)
                self.add(embedding_products(direction, ids, output_grad, module.padding_idx, self.per_token))

        return lambda ids: Tap.apply(forward(ids), ids, self.anchor, products)

    def _anchored(self, module: nn.Module) -> Callable:
        forward = module.forward
        return lambda ids, *args: Tap.apply(forward(ids, *args), ids, self.anchor, lambda *_: None)

    def _norm(self, path: str, module: nn.Module, eps: float) -> Callable:
        forward, direction = module.forward, self.direction(module.weight)

        def products(inputs: torch.Tensor, output_grad: torch.Tensor) -> None:
            inputs, output_grad = self.by_sample(path, inputs), self.by_sample(path, output_grad)
            self.add(norm_products(direction, inputs, output_grad, eps, self.per_token))

        return lambda inputs: Tap.apply(forward(inputs), inputs, None, products)

    def _fused_loss(self, model: MobileLLMForCausalLM) -> Callable:
        fused_loss, weight = model.fused_loss, model.lm_head.weight

        def cross_entropy(*arguments):
            return TappedCrossEntropy.apply(*arguments, self, self.direction(weight))

        def tapped_loss(hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return fused_loss(hidden_states, labels, **kwargs)
            return linear_causal_lm_loss(hidden_states, weight, labels, cross_entropy=cross_entropy, **kwargs)

        return tapped_loss

    def by_sample(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """(samples, positions or a multiple, width) of a module's input, output or gradient."""
        samples, positions = self.shape
        flat = tensor.dim() == 2 and len(tensor) == samples * positions
        batched = tensor.dim() > 2 and len(tensor) == samples and (not self.per_token or tensor.shape[1] == positions)
        if not (flat or batched):
            raise UnsupportedModuleError(
                f"{path} works on a tensor of shape {tuple(tensor.shape)}, in which the {samples} samples of "
                f"{positions} positions cannot be told apart: leave its parameters out with exclude=['{path}.*']"
            )
        return tensor.reshape(samples, -1, tensor.shape[-1])

    def add(self, products: torch.Tensor) -> None:
        if self.per_token and products.shape[1] != self.products.shape[1]:  # several heads at a position
            products = products.unflatten(1, (self.products.shape[1], -1)).sum(2)
        self.products += products


def flag_not_finite(scores: torch.Tensor) -> torch.Tensor:
    """NaN in every place of a sample's (dimension 0) that has a score which is not finite."""
    bad = ~scores.flatten(1).isfinite().all(1)
    return scores.masked_fill(bad.view(-1, *[1] * (scores.dim() - 1)), torch.nan)
