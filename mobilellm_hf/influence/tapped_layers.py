"""Autograd functions that hand a layer's input and output gradient to whoever takes products of them.

What they keep between forward and backward is autograd's saved tensors and nothing else, so that gradient
checkpointing and offloading of activations work as for the layers themselves.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mobilellm_hf.influence.inner_products import bias_products, linear_products, norm_products
from mobilellm_hf.modeling.loss_mobilellm import chunk_loss

# Logits of the head that exist at once, for all products in one go (512 MiB in fp32): with fewer tokens a chunk, the
# directions are read from memory more often than it pays.
HEAD_CHUNK_ELEMENTS = 2**27


class Tap(torch.autograd.Function):
    """The identity behind a layer; calls `on_gradient(inputs, output_grad)` in the backward pass.

    `anchor`: None, or a scalar that requires gradients. A backward pass down to it visits every layer behind the tap
    and computes no parameter's gradient.
    """

    @staticmethod
    def forward(ctx, output, inputs, anchor, on_gradient):
        ctx.save_for_backward(inputs)
        ctx.on_gradient = on_gradient
        return output.view_as(output)

    @staticmethod
    def backward(ctx, output_grad):
        with exact_products(output_grad):
            ctx.on_gradient(ctx.saved_tensors[0], output_grad)
        anchor_grad = output_grad.new_zeros(()) if ctx.needs_input_grad[2] else None
        return output_grad, None, anchor_grad, None


def exact_products(tensor: torch.Tensor) -> torch.autocast:
    """Outside of a user's autocast, which would take even fp32 products in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


class TappedLinear(torch.autograd.Function):
    """`F.linear` whose backward takes the samples' products; the weights' gradients too if `sink` wants them.

    `directions`: of the weight and of the bias, or None. They are looked up beforehand, since under gradient
    checkpointing the saved weight comes back as another tensor.
    """

    @staticmethod
    def forward(ctx, inputs, weight, bias, sink, path, directions):
        ctx.save_for_backward(inputs, weight, bias)
        ctx.sink, ctx.path, ctx.directions = sink, path, directions
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx, output_grad):
        inputs, weight, bias = ctx.saved_tensors
        inputs_grad = None
        if ctx.needs_input_grad[0]:
            inputs_grad = (output_grad @ weight.to(output_grad.dtype)).to(inputs.dtype)
        with exact_products(output_grad):
            weight_grad, bias_grad = TappedLinear.take_products(ctx, inputs, output_grad, weight, bias)
        return inputs_grad, weight_grad, bias_grad, None, None, None

    @staticmethod
    def take_products(ctx, inputs, output_grad, weight, bias) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Leaves the products with the sink; returns the gradients of weight and bias if it wants them."""
        sink, weight_grad, bias_grad = ctx.sink, None, None
        samples, gradients = sink.by_sample(ctx.path, inputs), sink.by_sample(ctx.path, output_grad)
        if sink.parameter_gradients and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float))
        direction, bias_direction = ctx.directions
        if direction is not None:
            sink.add(linear_products(direction, samples, gradients, sink.per_token, weight_grad))
        elif weight_grad is not None:
            weight_grad += precise_matmul(gradients, samples)
        if bias_direction is not None:
            sink.add(bias_products(bias_direction, gradients, sink.per_token))
        if bias is not None and sink.parameter_gradients and ctx.needs_input_grad[2]:
            bias_grad = gradients.sum((0, 1), dtype=torch.float).to(bias.dtype)
        return None if weight_grad is None else weight_grad.to(weight.dtype), bias_grad


class TappedCrossEntropy(torch.autograd.Function):
    """`LinearCrossEntropy` that takes the samples' products with the head's directions on the way.

    Arguments as there: hidden_states (samples x positions, hidden), weight (vocabulary, hidden), labels and
    token_weights (samples x positions,). A chunk is a few whole samples, or a part of one.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, token_weights, ignore_index, token_nll, sink, direction):
        samples, positions = sink.shape
        dtype = torch.promote_types(weight.dtype, torch.float)
        device_type, ctx.weight_dtype = hidden_states.device.type, weight.dtype
        hidden_grad = torch.empty_like(hidden_states)
        wants_weight_grad = sink.parameter_gradients and ctx.needs_input_grad[1]
        weight_grad = torch.zeros_like(weight, dtype=dtype) if wants_weight_grad else None
        if torch.is_autocast_enabled(device_type):
            autocast = torch.get_autocast_dtype(device_type)
            hidden_states, weight = hidden_states.to(autocast), weight.to(autocast)
        kept = (labels != ignore_index)[:, None]
        targets = torch.where(kept, labels[:, None], 0)
        factors = kept.to(dtype) if token_weights is None else kept * token_weights[:, None].to(dtype)
        total = hidden_states.new_zeros((), dtype=dtype)
        products = torch.zeros_like(sink.products)
        chunks = list(_chunks(samples, positions, max(1, HEAD_CHUNK_ELEMENTS // len(weight))))
        longest = max((last - first) * (end - start) for first, last, start, end in chunks)
        buffer = hidden_states.new_empty((longest, len(weight)), dtype=dtype)
        for first, last, start, end in chunks:
            shape = (last - first, end - start, -1)
            part = slice(first * positions + start, (last - 1) * positions + end)
            hidden = hidden_states[part]
            nll, logits_grad = chunk_loss(buffer[: len(hidden)], hidden, weight, targets[part], factors[part])
            total += nll.sum()
            if token_nll is not None:
                token_nll[part] = nll.detach()[:, 0]
            hidden_grad[part] = logits_grad.to(hidden.dtype) @ weight
            hidden, logits_grad = hidden.view(shape), logits_grad.view(shape)
            with exact_products(hidden):
                if direction is not None:
                    target = products[first:last, start:end] if sink.per_token else products[first:last]
                    target += linear_products(direction, hidden, logits_grad, sink.per_token, weight_grad)
                elif weight_grad is not None:
                    weight_grad += precise_matmul(logits_grad, hidden)
        ctx.save_for_backward(hidden_grad, weight_grad, products)
        ctx.sink = sink
        return total

    @staticmethod
    def backward(ctx, total_grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("influence has no second derivative")
        hidden_grad, weight_grad, products = ctx.saved_tensors
        ctx.sink.add(products * total_grad)
        hidden_grad = hidden_grad.mul_(total_grad)
        weight_grad = None if weight_grad is None else weight_grad.mul_(total_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None


def _chunks(samples: int, positions: int, tokens: int):
    """(first sample, last, first position, last) of parts of at most so many tokens: whole samples or one's part."""
    whole = max(1, tokens // positions)
    step = positions if positions <= tokens else tokens
    for first in range(0, samples, whole):
        for start in range(0, positions, step):
            yield first, min(first + whole, samples), start, min(start + step, positions)


def precise_matmul(output_grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A Linear's weight gradient over a batch, in fp32 at least."""
    dtype = torch.promote_types(inputs.dtype, torch.float)
    return output_grad.flatten(0, 1).to(dtype).mT @ inputs.flatten(0, 1).to(dtype)


def rms_norm_eps(module: nn.Module) -> float | None:
    """The eps of an RMSNorm, by behaviour and not by name; None if the module is anything else.

    RMSNorm is whatever has one weight of one dimension whose gradient is that of x / rms(x) times the weight, or
    times one plus the weight.
    """
    if [name for name, p in module._parameters.items() if p is not None] != ["weight"] or module.weight.dim() != 1:
        return None
    if not module.weight.requires_grad:
        raise ValueError("a norm's weight was frozen after the scorer was made: make it anew")
    weight = module.weight
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(weight.dtype).eps if eps is None else eps
    # Not random, so that nobody's generator moves; of a small size, so that eps matters.
    wave = torch.arange(3 * len(weight), device=weight.device, dtype=torch.float).cos().view(1, 3, -1) * 0.01
    inputs, output_grad = (wave + 0.002).to(weight.dtype), wave.flip(1).to(weight.dtype)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(module(inputs), weight, output_grad)
        basis = torch.eye(len(weight), dtype=torch.promote_types(weight.dtype, torch.float), device=weight.device)
        expected = norm_products(basis, inputs, output_grad, eps, per_token=False)[0].to(gradient.dtype)
    except (RuntimeError, TypeError):
        return None
    tolerance = 0.02 if weight.dtype in (torch.bfloat16, torch.half) else 1e-4
    return eps if (gradient - expected).norm() <= tolerance * expected.norm() else None
