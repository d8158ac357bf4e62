"""Influence taken inside training steps: the weights' gradients and the samples' scores out of the same matrices."""

import functools
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from mobilellm_hf.influence.products import GradientProducts, flag_not_finite
from mobilellm_hf.nll import IGNORED_LABEL


class FusedInfluence(GradientProducts):
    """A context in which training steps leave the scores of their samples, to be fetched with `take`.

    The scores are of mean NLL, whatever the loss was divided or multiplied by on its way (gradient accumulation,
    `num_items_in_batch`, a scaler of mixed precision). With another loss inside the model, such as distillation, they
    are of that loss.
    """

    def __init__(self, model: PreTrainedModel, directions: Mapping[str, torch.Tensor]):
        super().__init__(model, directions, parameter_gradients=True)
        self._batches: list[dict] = []

    def __enter__(self) -> "FusedInfluence":
        super().__enter__()
        self._patch(self.model, "forward", self._recording(self.model.forward))
        return self

    def _recording(self, forward):
        """The model's forward; the batch's shape and, in the backward pass, the loss's scale are kept beside it."""

        @functools.wraps(forward)  # the Trainer drops columns that are not in its signature
        def recorded(*args, **kwargs):
            if not torch.is_grad_enabled() or not self._restore:  # evaluation; or the context was left meanwhile
                return forward(*args, **kwargs)
            if self._batches and self._batches[-1]["scale"] is None:
                raise RuntimeError("influence needs the backward pass of a batch before the forward pass of the next")
            labels = kwargs.get("labels")
            if labels is None:
                raise RuntimeError("influence in a training step needs the model's loss: pass `labels` to the model")
            self.begin(*labels.shape)
            tokens = (labels[:, 1:] != IGNORED_LABEL).sum(1)
            items = kwargs.get("num_items_in_batch")
            batch = {
                "products": self.products,
                "tokens": tokens,
                "items": tokens.sum() if items is None else items,
                "scale": None,
            }
            self._batches.append(batch)
            outputs = forward(*args, **kwargs)
            loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
            loss.register_hook(functools.partial(_note_scale, batch))
            return outputs

        return recorded

    def take(self) -> torch.Tensor:
        """(samples, C) float64 scores of all micro-batches since the last call, in order; on the model's device.

        A sample whose gradient is not finite scores NaN.

        Raises:
            RuntimeError: a micro-batch has had no backward pass, or its loss was not the model's own.
        """
        batches, self._batches = self._batches, []
        if any(batch["scale"] is None for batch in batches):
            raise RuntimeError(
                "a batch had no backward pass, or none through the model's own loss: pass `labels` to the model, and "
                "take the scores after `backward`"
            )
        parts = [
            batch["products"] * (batch["items"] / batch["scale"]) / batch["tokens"].clamp(min=1)[:, None]
            for batch in batches
        ]
        return flag_not_finite(torch.cat(parts)) if parts else torch.empty(0, self._count, dtype=torch.float64)


def _note_scale(batch: dict, gradient: torch.Tensor) -> None:
    if batch["scale"] is not None:
        raise RuntimeError("influence is taken in one backward pass a batch, and this is the second")
    batch["scale"] = gradient.detach()
