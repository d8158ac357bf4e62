"""The distillation loss alpha * T^2 * KL(teacher || student) + (1 - alpha) * NLL, a chunk of tokens at a time.

Neither model's logits exist for more than a chunk when there are hidden states and a head to take them from; from
given logits nothing of their size is built but their gradient. As in `modeling.loss_mobilellm` gradients are formed on
the way, in buffers that every chunk overwrites, and what is left for the backward pass is a multiplication.

    loss = DistillationLoss(temperature=2.0, alpha=0.5)
    targets = TeacherLogits(teacher_hidden, teacher_head.weight)
    total = LinearDistillation.apply(hidden, head.weight, labels, None, -100, None, loss, targets)
    (total / predicted).backward()

The teacher is either whole (`TeacherLogits`) or its k likeliest tokens and the mass of the rest (`TopKBuckets`).
"""

import torch

from mobilellm_hf.modeling import loss_mobilellm


def log_sum_exp_(logits: torch.Tensor) -> torch.Tensor:
    """(tokens, 1) log-sum-exp of each row; leaves the row's softmax in its place, and builds nothing of its size."""
    top, top_index = logits.max(-1, keepdim=True)
    probabilities = torch.softmax(logits, -1, out=logits)
    # By way of the largest probability, which cannot underflow.
    return top - probabilities.gather(-1, top_index).log()


def project(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = hidden_states @ weight.T + bias, where the weight is and in its dtype. out: (tokens, vocabulary)."""
    if hidden_states.dtype == weight.dtype == out.dtype and weight.device == out.device:
        torch.mm(hidden_states, weight.mT, out=out)
    else:
        out.copy_(hidden_states.to(weight.device, weight.dtype) @ weight.mT)
    if bias is not None:
        out.add_(bias.to(out.device))


def combined_gradient_(
    logits_grad: torch.Tensor, labels: torch.Tensor, alpha: float, hard: torch.Tensor | None = None, scale: float = 1.0
) -> None:
    """logits_grad * scale + (1 - alpha) * (hard - one-hot labels), in place. hard: NLL's softmax, if not in it."""
    if scale != 1.0:
        logits_grad.mul_(scale)
    if alpha == 1.0:
        return
    if hard is not None:
        logits_grad.add_(hard, alpha=1 - alpha)
    logits_grad.scatter_add_(-1, labels, torch.full_like(labels, alpha - 1, dtype=logits_grad.dtype))


class TeacherLogits:
    """The teacher's whole distributions, from its hidden states and head, or from its logits.

    A student with more ids than the teacher is compared to a teacher that gives them no probability, so that the loss
    drives the student's mass there to zero. A teacher with more ids is cut to the student's and renormalised.

    Args:
        states: (tokens, hidden) last hidden states, or (tokens, vocabulary) logits if there is no `weight`.
        weight: (vocabulary, hidden) the teacher's head, on any device; logits are computed where it is.
        bias: (vocabulary,) or None.
    """

    def __init__(self, states: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None):
        self.states, self.weight, self.bias = states, weight, bias
        self._buffers: list[torch.Tensor] = []

    def fill(self, index: torch.Tensor, out: torch.Tensor) -> None:
        """Logits of the tokens `index` over the first ids, as many as `out` (tokens, ids) has columns."""
        states, width = self.states[index.to(self.states.device)], out.shape[1]
        if self.weight is None:
            # A teacher that masks ids says minus infinity, which times a probability of zero would be no number.
            out.copy_(states[:, :width]).clamp_(min=torch.finfo(out.dtype).min / 4)
            return
        with torch.autocast(self.weight.device.type, enabled=False):  # a teacher's logits are of its own precision
            project(states, self.weight[:width], None if self.bias is None else self.bias[:width], out)

    def _reserve(self, logits: torch.Tensor, count: int) -> list[torch.Tensor]:
        """`count` buffers for as many rows as `logits` has: two of the common ids, the third of all."""
        ids = min(logits.shape[1], len(self.weight) if self.weight is not None else self.states.shape[1])
        if len(self._buffers) < count or len(self._buffers[0]) < len(logits):
            widths = (ids, ids, logits.shape[1])[:count]
            self._buffers = [logits.new_empty((len(logits), width)) for width in widths]
        return [buffer[: len(logits)] for buffer in self._buffers[:count]]

    def loss_(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        part: slice,
        labels: torch.Tensor,
        temperature: float,
        alpha: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL at this temperature and NLL, (tokens, 1) each; leaves the gradient of the loss in `logits`.

        logits: (tokens, vocabulary) the student's; index: (tokens,) which of the batch's tokens; part: which of its
        predicted ones; labels: (tokens, 1).
        """
        softened = temperature != 1.0
        teacher, ratio, *spare = self._reserve(logits, 3 if softened else 2)
        self.fill(index, teacher)
        hard = nll = None
        if softened:
            hard = spare[0].copy_(logits)
            nll = -logits.gather(-1, labels) + log_sum_exp_(hard)
            logits.div_(temperature)
            teacher.div_(temperature)
        torch.log_softmax(logits, -1, out=logits)
        torch.log_softmax(teacher, -1, out=teacher)
        nll = -logits.gather(-1, labels) if nll is None else nll
        common = logits[:, : teacher.shape[1]]
        torch.sub(teacher, common, out=ratio)
        kl = ratio.mul_(teacher.exp_()).sum(-1, keepdim=True)
        logits.exp_()
        common.sub_(teacher, alpha=1.0 if softened else alpha)
        combined_gradient_(logits, labels, alpha, hard, alpha * temperature if softened else 1.0)
        return kl, nll


class TopKBuckets:
    """The teacher's k likeliest tokens and one bucket for all others: a lower bound of the whole divergence.

    k + 1 outcomes, the ids and "any other token", make a distribution of the teacher and one of the student; the loss
    is the divergence of these two. At a temperature both are raised to 1 / T and normalised again, the bucket like any
    other outcome: its mass is one number, and how it would spread at another temperature is not in it.

    Args:
        log_probabilities: (predicted tokens, k + 1) log-probabilities at T = 1, the bucket last; normalised.
        ids: (predicted tokens, k) different ids.
    """

    def __init__(self, log_probabilities: torch.Tensor, ids: torch.Tensor):
        self.log_probabilities, self.ids = log_probabilities, ids

    def loss_(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        part: slice,
        labels: torch.Tensor,
        temperature: float,
        alpha: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As for `TeacherLogits.loss_`."""
        ids, teacher = self.ids[part], self.log_probabilities[part].to(logits.dtype)
        label_logits, kept = logits.gather(-1, labels), logits.gather(-1, ids)
        # The bucket's own log-sum-exp, not 1 minus the rest: a student's tail may be far below the rounding of 1.
        tail = log_sum_exp_(logits.scatter_(-1, ids, -torch.inf))
        buckets = torch.cat((kept, tail), -1)
        nll = buckets.logsumexp(-1, keepdim=True) - label_logits
        student = (buckets / temperature).log_softmax(-1)
        teacher = (teacher / temperature).log_softmax(-1)
        weights = teacher.exp()
        kl = torch.where(weights > 0, weights * (teacher - student), 0.0).sum(-1, keepdim=True)
        buckets_grad = alpha * temperature * (student.exp() - weights) + (1 - alpha) * buckets.softmax(-1)
        logits.mul_(buckets_grad[:, -1:]).scatter_(-1, ids, buckets_grad[:, :-1])
        combined_gradient_(logits, labels, alpha)
        return kl, nll


class DistillationLoss:
    """alpha * T^2 * KL + (1 - alpha) * NLL of tokens, and the sums of its parts: KL, NLL and tokens."""

    def __init__(self, temperature: float, alpha: float):
        self.temperature, self.alpha = temperature, alpha
        self.sums: torch.Tensor | None = None

    def chunk_(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        part: slice,
        labels: torch.Tensor,
        token_weights: torch.Tensor | None,
        token_nll: torch.Tensor | None,
        targets: TeacherLogits | TopKBuckets,
    ) -> torch.Tensor:
        """The loss summed over the tokens `index`, (); leaves its gradient in their `logits`.

        labels, token_weights and token_nll: (all of the batch's tokens,).
        """
        kl, nll = targets.loss_(logits, index, part, labels[index][:, None], self.temperature, self.alpha)
        if token_weights is not None:
            weights = token_weights[index][:, None].to(logits.dtype)
            logits.mul_(weights)
            kl, nll = kl * weights, nll * weights
        if token_nll is not None:
            token_nll[index] = nll[:, 0].to(token_nll.dtype)
        kl, nll = kl.sum(), nll.sum()
        self._count(kl, nll, len(index))
        return self.alpha * self.temperature**2 * kl + (1 - self.alpha) * nll

    def _count(self, kl: torch.Tensor, nll: torch.Tensor, tokens: int) -> None:
        if self.sums is None:
            dtype = torch.float if kl.device.type == "mps" else torch.double
            self.sums = torch.zeros(3, dtype=dtype, device=kl.device)
        self.sums += torch.stack((kl, nll, torch.full_like(kl, tokens)))


def chunks(kept: torch.Tensor, vocabulary: int) -> list[slice]:
    """Slices of `kept`, one a chunk of tokens."""
    size = max(1, loss_mobilellm.LOSS_CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, len(kept))) for start in range(0, len(kept), size)]


def buffer_for(parts: list[slice], like: torch.Tensor, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    longest = parts[0].stop if parts else 0
    return like.new_empty((longest, vocabulary), dtype=dtype)


class LinearDistillation(torch.autograd.Function):
    """Sum of the tokens' distillation losses, from the student's hidden states and its head's weight.

    What `linear_causal_lm_loss` calls in the place of `LinearCrossEntropy`, which see for the arguments; tokens that
    are not predicted cost nothing here. loss: what is summed; targets: the teacher.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, token_weights, ignore_index, token_nll, loss, targets):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        device_type, ctx.weight_dtype = hidden_states.device.type, weight.dtype
        precise = torch.promote_types(weight.dtype, torch.float)
        hidden_grad = torch.zeros_like(hidden_states) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        if token_nll is not None:
            token_nll.zero_()
        kept = (labels != ignore_index).nonzero()[:, 0]
        total = torch.zeros((), dtype=precise, device=hidden_states.device)
        parts = chunks(kept, len(weight))
        buffer = buffer_for(parts, hidden_states, len(weight), precise)
        for part in parts:
            index = kept[part]
            hidden, logits = hidden_states[index], buffer[: len(index)]
            project(hidden, weight, None, logits)
            total += loss.chunk_(logits, index, part, labels, token_weights, token_nll, targets)
            logits_grad = logits.to(hidden.dtype)
            if needs_hidden:
                hidden_grad[index] = (logits_grad @ weight).to(hidden_grad.dtype)
            if needs_weight and hidden.dtype == precise:
                weight_grad.addmm_(logits_grad.mT, hidden)
            elif needs_weight:
                weight_grad += logits_grad.mT @ hidden
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, total_grad):
        refuse_second_derivative()
        # In place: the two are this call's own, and nobody can ask for them twice without retain_graph.
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_grad = None if hidden_grad is None else hidden_grad.mul_(total_grad)
        weight_grad = None if weight_grad is None else weight_grad.mul_(total_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, *[None] * 6


class LogitsDistillation(torch.autograd.Function):
    """The same sum from the student's logits (tokens, vocabulary); only their gradient is of their size."""

    @staticmethod
    def forward(ctx, logits, labels, token_weights, ignore_index, token_nll, loss, targets):
        precise = torch.promote_types(logits.dtype, torch.float)
        logits_grad = torch.zeros_like(logits)
        if token_nll is not None:
            token_nll.zero_()
        kept = (labels != ignore_index).nonzero()[:, 0]
        total = torch.zeros((), dtype=precise, device=logits.device)
        parts = chunks(kept, logits.shape[1])
        buffer = buffer_for(parts, logits, logits.shape[1], precise)
        for part in parts:
            index = kept[part]
            chunk = buffer[: len(index)].copy_(logits[index])
            total += loss.chunk_(chunk, index, part, labels, token_weights, token_nll, targets)
            logits_grad[index] = chunk.to(logits.dtype)
        ctx.save_for_backward(logits_grad)
        return total

    @staticmethod
    def backward(ctx, total_grad):
        refuse_second_derivative()
        return ctx.saved_tensors[0].mul_(total_grad), *[None] * 6


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        raise RuntimeError("the distillation loss has no second derivative")
