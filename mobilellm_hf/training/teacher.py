"""A frozen causal LM that others learn from: its last hidden states where they determine the logits, else the logits.

Whether they do is tried out, once, on eight tokens: if the logits are bit for bit the head's product with the
decoder's output, the head can be applied to any chunk of tokens. They are not for a model that caps or scales its
logits (Gemma 2, Granite, Cohere) or whose head is quantized or adapted; then the teacher's whole logits are taken.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "position_ids")
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


class TeacherOutOfMemoryError(MemoryError):
    """The teacher does not fit beside the student."""


def model_name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} {model.config._name_or_path}".strip()


@contextmanager
def explained_out_of_memory(name: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    """Turns an allocation that fails inside into a `TeacherOutOfMemoryError` that says what can be done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(str(error))):
            raise
        raise TeacherOutOfMemoryError(
            f"the teacher {name} does not fit, in {dtype} on {device}: load it in a smaller dtype "
            "(dtype=torch.bfloat16), shard it over the processes (shard_teacher=True), take smaller batches, or write "
            "its top-k probabilities once with TeacherCache.write and train from those"
        ) from error


def load_teacher(name: str | Path, dtype: torch.dtype, device: torch.device | str | None) -> PreTrainedModel:
    """A causal LM from a folder or the Hub, in evaluation mode. device: None leaves it on the CPU.

    Raises:
        TeacherOutOfMemoryError: it does not fit.
    """
    with explained_out_of_memory(str(name), dtype, device or "cpu"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model if device is None else model.to(device)


def shard(model: PreTrainedModel, device_type: str) -> PreTrainedModel:
    """FSDP2 over all processes: every decoder layer a group, and the rest one.

    Raises:
        ValueError: no processes to shard it over.
    """
    if not dist.is_initialized():
        raise ValueError("shard_teacher=True needs several processes: start the training with torchrun or accelerate")
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Teacher:
    """A causal LM in evaluation mode, without gradients, on whatever device it is, FSDP2-sharded or not.

    Attributes:
        vocabulary_size: number of its logits.
        states_suffice: whether `states` are last hidden states, to be multiplied with `head`; else they are logits.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)
        self.name = model_name(model)
        self._accepts = set(inspect.signature(type(model).forward).parameters)
        parameter = next(model.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        self.states_suffice, self.vocabulary_size = self._try_out()

    @torch.no_grad()
    def states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(batch * tokens, hidden) last hidden states, or (batch * tokens, vocabulary) logits.

        inputs: `input_ids`, and `attention_mask` and `position_ids` (packed rows) if there are any; other keys are the
        student's own. Nothing of the forward pass but these states is kept.

        Raises:
            TeacherOutOfMemoryError: the forward pass does not fit.
        """
        inputs = {name: inputs[name].to(self._device) for name in INPUTS if inputs.get(name) is not None}
        if "input_ids" not in inputs:
            raise ValueError("the teacher reads input_ids, and the batch has none")
        if "position_ids" in inputs and "position_ids" not in self._accepts:
            raise ValueError(
                f"the teacher {self.name} takes no position_ids, which the batch has: do not pack its rows"
            )
        seen = {}
        options = {"logits_to_keep": 1} if self.states_suffice else {}
        with self._observed(seen), self._guarded():
            logits = self.model(**inputs, use_cache=False, **options).logits
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # or embedding and head would stay whole
        return (seen["hidden"] if self.states_suffice else logits).flatten(0, 1)

    @contextmanager
    def head(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """The head's weight (vocabulary, hidden) and bias, whole meanwhile; (None, None) if `states` are logits."""
        if not self.states_suffice:
            yield None, None
            return
        head = self.model.get_output_embeddings()
        group = next((module for module in (head, self.model) if isinstance(module, FSDPModule)), None)
        if group is not None:
            group.unshard()
        try:
            yield head.weight, head.bias
        finally:
            if group is not None:
                group.reshard()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        # The teacher has a precision of its own, whatever the student's autocast is.
        with (
            explained_out_of_memory(self.name, self._dtype, self._device),
            torch.autocast(self._device.type, enabled=False),
        ):
            yield

    @contextmanager
    def _observed(self, seen: dict) -> Iterator[None]:
        """Notes the decoder's last hidden states and what the head makes of what."""

        def note_hidden(module, args, output):
            seen["hidden"] = output[0]

        def note_head(module, args, output):
            seen["head"] = (args[0], output)

        hooked = ((self.model.get_decoder(), note_hidden), (self.model.get_output_embeddings(), note_head))
        handles = [module.register_forward_hook(hook) for module, hook in hooked if module is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _try_out(self) -> tuple[bool, int]:
        ids = torch.arange(8, device=self._device)[None] % self.model.config.get_text_config().vocab_size
        seen = {}
        with self._observed(seen), self._guarded():
            logits = self.model(input_ids=ids, use_cache=False).logits
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        head = self.model.get_output_embeddings()
        plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
        plain = plain and head.weight.is_floating_point() and "logits_to_keep" in self._accepts
        suffice = (
            plain
            and "hidden" in seen
            and torch.equal(seen["hidden"], seen["head"][0])
            and torch.equal(logits, seen["head"][1].to(logits.dtype))
        )
        return suffice, logits.shape[-1]
