"""The training loss from hidden states: full logits are never built, nor is anything of their size.

With a vocabulary of 128,256 the logits of a batch are larger than the 140M model, and on a CPU the pages they occupy
cost more than the arithmetic on them. Like the model's file, this one is copied into every saved folder.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Logits that exist at once: those of 261 tokens of a 128k vocabulary (128 MiB in fp32).
LOSS_CHUNK_ELEMENTS = 2**25


def chunk_loss(
    buffer: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    factors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of a chunk's tokens times their `factors`, and the gradient of the sum by the logits, left in `buffer`.

    buffer: (tokens, vocabulary); hidden_states: (tokens, hidden); targets and factors: (tokens, 1), 0 for a token that
    does not count. Returns (tokens, 1) and (tokens, vocabulary).
    """
    if hidden_states.dtype == buffer.dtype:
        torch.mm(hidden_states, weight.mT, out=buffer)
    else:
        buffer.copy_(hidden_states @ weight.mT)
    target_logits = buffer.gather(-1, targets)
    # log-sum-exp by way of the largest probability, which cannot underflow
    top, top_index = buffer.max(-1, keepdim=True)
    probabilities = torch.softmax(buffer, -1, out=buffer)
    nll = top - probabilities.gather(-1, top_index).log() - target_logits
    logits_grad = probabilities.scatter_add_(-1, targets, torch.full_like(nll, -1.0)).mul_(factors)
    return torch.where(factors != 0, nll * factors, 0.0), logits_grad


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of token NLLs of the logits `hidden_states @ weight.T`, which exist for one chunk of tokens at a time.

    The gradients are formed on the way, while a chunk's probabilities are at hand: three matrix products, like the
    unfused loss, at a fraction of its memory. hidden_states: (tokens, hidden); weight: (vocabulary, hidden); labels:
    (tokens,), `ignore_index` where nothing is predicted; token_weights: (tokens,) or None, a factor for each NLL;
    token_nll: (tokens,) or None, filled with the terms of the sum.
    Probabilities and sums are fp32, or fp64 for fp64 weights.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, token_weights, ignore_index, token_nll=None):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        device_type, ctx.weight_dtype = hidden_states.device.type, weight.dtype
        precise = torch.promote_types(weight.dtype, torch.float)
        hidden_grad = torch.empty_like(hidden_states) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        kept = (labels != ignore_index)[:, None]
        targets = torch.where(kept, labels[:, None], 0)
        factors = kept.to(precise) if token_weights is None else kept * token_weights[:, None].to(precise)
        total = torch.zeros((), dtype=precise, device=hidden_states.device)
        chunk = max(1, LOSS_CHUNK_ELEMENTS // len(weight))
        # One buffer for every chunk, overwritten in place: fresh pages cost a CPU more than the arithmetic on them.
        buffer = hidden_states.new_empty((min(chunk, len(hidden_states)), len(weight)), dtype=precise)
        for start in range(0, len(hidden_states), chunk):
            part = slice(start, start + chunk)
            hidden = hidden_states[part]
            nll, logits_grad = chunk_loss(buffer[: len(hidden)], hidden, weight, targets[part], factors[part])
            total += nll.sum()
            if token_nll is not None:
                token_nll[part] = nll.detach()[:, 0]
            logits_grad = logits_grad.to(hidden.dtype)
            if needs_hidden:
                hidden_grad[part] = logits_grad @ weight
            if needs_weight and hidden.dtype == precise:
                weight_grad.addmm_(logits_grad.mT, hidden)
            elif needs_weight:
                weight_grad += logits_grad.mT @ hidden
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, total_grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError("the fused loss has no second derivative: call the model with return_logits=True")
        # In place: the two are this call's own, and nobody can ask for them twice without retain_graph.
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_grad = None if hidden_grad is None else hidden_grad.mul_(total_grad)
        weight_grad = None if weight_grad is None else weight_grad.mul_(total_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def linear_causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    cross_entropy: Callable[..., torch.Tensor] = LinearCrossEntropy.apply,
    token_nll: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss` from hidden states (batch, tokens, hidden) and the head's weight.

    labels: (batch, tokens), shifted here unless `shift_labels` is given. token_weights: (batch, tokens), a factor for
    the NLL of each label, shifted with them. cross_entropy: computes the sum in the place of `LinearCrossEntropy`.
    token_nll: (batch, tokens), filled with the NLL that each position's next token has, times its weight.
    Returns the sum over the predicted tokens divided by `num_items_in_batch`, by default their number; NaN with zero
    gradients if there is none.
    """
    if token_weights is not None:
        token_weights = (F.pad(token_weights, (0, 1))[..., 1:] if shift_labels is None else token_weights).reshape(-1)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(-1).to(hidden_states.device)
    token_nll = None if token_nll is None else token_nll.view(-1)
    hidden_states = hidden_states.flatten(0, -2)
    total = cross_entropy(hidden_states, weight, shift_labels, token_weights, ignore_index, token_nll)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    items = torch.as_tensor(num_items_in_batch, device=total.device)
    # Nothing to predict: the loss is NaN, as in transformers, but the gradients are zero and spare the weights.
    return (total / items.masked_fill(items == 0, 1)).masked_fill(items == 0, torch.nan)
