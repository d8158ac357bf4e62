"""Distillation in the stock Trainer: alpha * T^2 * KL(teacher || student) + (1 - alpha) * NLL as the model's own loss.

    trainer = Trainer(student, arguments, train_dataset=rows, callbacks=[DistillationCallback("org/teacher")])
    trainer.train()

The callback puts its loss where the model computes its own, inside `forward`: DDP, FSDP2, gradient accumulation and
checkpointing see nothing unusual, and any causal LM can be the student. For `MobileLLMForCausalLM` neither model's
logits are ever built. Evaluation, and whatever else calls the model in evaluation mode, gets the plain NLL.

A teacher too large to have beside the student is run once, see `teacher_cache.TeacherCache`.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from mobilellm_hf.modeling import MobileLLMForCausalLM
from mobilellm_hf.modeling.loss_mobilellm import linear_causal_lm_loss
from mobilellm_hf.training.divergence import (
    DistillationLoss,
    LinearDistillation,
    LogitsDistillation,
    TeacherLogits,
    TopKBuckets,
)
from mobilellm_hf.training.row_ids import ROW_ID, RowIds
from mobilellm_hf.training.teacher import Teacher, load_teacher, model_name, shard
from mobilellm_hf.training.teacher_cache import TeacherCache

VOCABULARIES = ("same", "shared_prefix")
MARK = "_distillation"


class DistillationCallback(TrainerCallback):
    """Trains the Trainer's model towards a teacher's next-token distributions.

    A token is distilled where it is predicted (its next token's label is not -100), and the sum over them is divided
    by `num_items_in_batch`, as the Trainer's own loss is. Each log of the loss also has `distillation/kl` and
    `distillation/nll`, their means per predicted token since the last (nats; the KL at the temperature, without T^2),
    over all processes: loss = alpha * T^2 * kl + (1 - alpha) * nll. They are in the saved log history, too. Callbacks
    see them that come after this one; for those of `report_to` insert it first:
    `trainer.callback_handler.callbacks.insert(0, callback)`.

    Args:
        teacher: a causal LM, a name or folder to load one from when training starts, or a `TeacherCache`. It is
            frozen, and no part of the student or of its checkpoints.
        temperature: softens both distributions.
        alpha: the divergence's share; the NLL has the rest.
        vocabulary: "same", or "shared_prefix" where only the padding of the embeddings differs: the teacher's ids
            beyond the student's are cut off, and its distribution normalised again; ids that only the student has are
            impossible for the teacher, so that the loss drives the student's mass on them to zero.
        tokenizers: of teacher and student, to be compared before the first step.
        dtype: that a teacher is loaded in. It computes in its own dtype, also under the student's autocast.
        device: where a teacher is moved; by default a loaded one goes to the student's device and a module stays.
        shard_teacher: divide the teacher among the processes (FSDP2).

    Raises:
        ValueError: when training starts, if vocabularies differ or the Trainer would keep the loss or `row_id` from
            this callback; the message names the field.
        TeacherOutOfMemoryError: the teacher does not fit, when training starts or at its first batch.

    Example:
        >>> callback = DistillationCallback("org/teacher", temperature=2.0, alpha=0.7)
        >>> Trainer(student, arguments, train_dataset=rows, callbacks=[callback]).train()
    """

    def __init__(
        self,
        teacher: PreTrainedModel | TeacherCache | str | Path,
        temperature: float = 1.0,
        alpha: float = 1.0,
        *,
        vocabulary: str = "same",
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        shard_teacher: bool = False,
    ):
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be between 0 and 1")
        if vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary={vocabulary!r} must be one of {', '.join(VOCABULARIES)}")
        if shard_teacher and isinstance(teacher, TeacherCache):
            raise ValueError("shard_teacher=True is for a model, and the teacher is a TeacherCache")
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha
        self.vocabulary, self.tokenizers = vocabulary, tokenizers
        self.dtype, self.device, self.shard_teacher = dtype, device, shard_teacher
        self._ready: Teacher | None = None
        self._installed: _Installed | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.remove()
        called = extract_model_from_parallel(model)
        former = vars(called).get(MARK)
        if former is not None and former.state is state:
            raise ValueError("the Trainer has two DistillationCallbacks, and a model one loss: remove one of them")
        if former is not None:  # of a training that failed
            former.remove()
        _check_arguments(args, isinstance(self.teacher, TeacherCache))
        _check_tokenizers(self.tokenizers)
        source = self.teacher if isinstance(self.teacher, TeacherCache) else self._prepare(called, args.device)
        _check_vocabulary(source, called, self.vocabulary)
        self._installed = _Installed(called, source, DistillationLoss(self.temperature, self.alpha), state)

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    def remove(self) -> None:
        """Leaves the model as it was before training. Done at the end of training; after a failed one, at the next."""
        if self._installed is not None:
            self._installed.remove()
        self._installed = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._installed is None or "loss" not in (logs or {}):
            return
        figures = self._installed.take_means(args.device)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def _prepare(self, student: nn.Module, student_device: torch.device) -> Teacher:
        if self._ready is not None:
            return self._ready
        device, model = self.device, self.teacher
        if isinstance(model, (str, Path)):
            device = None if self.shard_teacher else (device or student_device)
            model = load_teacher(model, self.dtype, device)
        elif {id(parameter) for parameter in model.parameters()} & {id(p) for p in student.parameters()}:
            raise ValueError(f"teacher and student ({model_name(model)}) share parameters: give the teacher a copy")
        elif device is not None:
            model = model.to(device)
        if self.shard_teacher:
            model = shard(model, student_device.type)
        self._ready = Teacher(model)
        return self._ready


class _Installed:
    """The loss within a model: hooks that run the teacher, and what computes the loss in the place of the model's own.

    called: what the training step calls, an adapter's wrapper perhaps; `model` is the causal LM inside. The teacher
    runs before the student does, when none of the student's activations exist yet.
    """

    def __init__(self, called: nn.Module, source: Teacher | TeacherCache, loss: DistillationLoss, state: object):
        self.called, self.source, self.loss, self.state = called, source, loss, state
        self.model = called.get_base_model() if hasattr(called, "get_base_model") else called
        if "_loss_function" in vars(self.model):
            raise ValueError("the student has a loss_function of its own, which distillation would replace: delete it")
        self._pending: Callable[[torch.Tensor, torch.Tensor | None], object] | None = None
        self._row_ids = RowIds.attach(called) if isinstance(source, TeacherCache) else None
        parameters = inspect.signature(type(called).forward).parameters
        self._names = [name for name in parameters if name != "self"]
        self._handles = [
            called.register_forward_pre_hook(self._before, with_kwargs=True),
            called.register_forward_hook(self._after),
        ]
        self._fused = isinstance(self.model, MobileLLMForCausalLM) and not self.model.loss_needs_logits()
        if self._fused:
            self.model.fused_loss = self._fused_loss(self.model.fused_loss)
        else:
            self.model.loss_function = self._loss_function(self.model.loss_function)
        object.__setattr__(called, MARK, self)

    def remove(self) -> None:
        if vars(self.called).get(MARK) is not self:
            return
        for handle in self._handles:
            handle.remove()
        if self._row_ids is not None:
            self._row_ids.detach()
        del self.model.__dict__["fused_loss" if self._fused else "_loss_function"]
        object.__delattr__(self.called, MARK)

    def _before(self, called: nn.Module, args: tuple, kwargs: dict) -> None:
        self._pending = None
        if not called.training or not torch.is_grad_enabled():
            return
        inputs = dict(zip(self._names, args)) | kwargs
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                "distillation needs the model's own loss, and this training step gives it no labels: train without "
                "compute_loss_func"
            )
        self._pending = self._cached(labels) if self._row_ids is not None else self._taught(inputs)

    def _taught(self, inputs: dict) -> Callable:
        states = self.source.states(inputs)

        def apply(function: Callable, *arguments) -> torch.Tensor:
            with self.source.head() as (weight, bias):
                return function(*arguments, self.loss, TeacherLogits(states, weight, bias))

        return apply

    def _cached(self, labels: torch.Tensor) -> Callable:
        if self._row_ids.current is None:
            raise ValueError(f"the batch has no {ROW_ID}: add the column with TeacherCache.add_row_ids")
        targets: TopKBuckets = self.source.read(self._row_ids.current.tolist(), labels)
        return lambda function, *arguments: function(*arguments, self.loss, targets)

    def _after(self, called: nn.Module, args: tuple, output: object) -> None:
        if self._pending is not None:
            self._pending = None
            raise RuntimeError(
                "the model was trained with a loss that is not distillation's: something has replaced its forward or "
                "its loss (use_liger_kernel, influence in a training step), or return_logits=True was given"
            )

    def _cross_entropy(self, states, weight, labels, token_weights, ignore_index, token_nll) -> torch.Tensor:
        """What `linear_causal_lm_loss` calls; with `weight` None the states are logits."""
        apply, self._pending = self._pending, None
        options = (labels, token_weights, ignore_index, token_nll)
        if weight is None:
            return apply(LogitsDistillation.apply, states, *options)
        return apply(LinearDistillation.apply, states, weight, *options)

    def _fused_loss(self, original: Callable) -> Callable:
        def fused_loss(hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
            if self._pending is not None:
                kwargs["cross_entropy"] = self._cross_entropy
            return original(hidden_states, labels, **kwargs)

        return fused_loss

    def _loss_function(self, original: Callable) -> Callable:
        def loss_function(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs) -> torch.Tensor:
            if self._pending is None:
                return original(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
            return linear_causal_lm_loss(logits, None, labels, cross_entropy=self._cross_entropy, **kwargs)

        return loss_function

    def take_means(self, device: torch.device) -> dict[str, float]:
        """Mean KL and NLL per predicted token of all processes since the last call."""
        sums, self.loss.sums = self.loss.sums, None
        if sums is None:
            sums = torch.zeros(3, device=device, dtype=torch.double)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        kl, nll, tokens = sums.tolist()
        return {"distillation/kl": kl / max(tokens, 1), "distillation/nll": nll / max(tokens, 1)}


def _check_arguments(args, cached: bool) -> None:
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} takes the loss out of the model, where "
            "distillation computes it: set it to 0; the teacher smooths the labels"
        )
    if args.n_gpu > 1:
        raise ValueError(f"distillation does not run in DataParallel ({args.n_gpu} GPUs): start with torchrun")
    if cached and args.remove_unused_columns:
        raise ValueError(
            f"remove_unused_columns=True would drop the column {ROW_ID}, by which the teacher's cache is read: set it "
            "to False"
        )


def _check_tokenizers(tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None) -> None:
    if tokenizers is None:
        return
    teacher, student = (tokenizer.get_vocab() for tokenizer in tokenizers)
    differing = sorted({*teacher.items()} ^ {*student.items()}, key=lambda entry: entry[1])
    if differing:
        token, _ = differing[0]
        raise ValueError(
            f"the tokenizers differ in {len(differing)} entries: {token!r} is id {teacher.get(token)} for the teacher "
            f"({tokenizers[0].name_or_path}) and {student.get(token)} for the student ({tokenizers[1].name_or_path})"
        )


def _check_vocabulary(source: Teacher | TeacherCache, student: nn.Module, vocabulary: str) -> None:
    cached = isinstance(source, TeacherCache)
    theirs = source.manifest["vocabulary_size"] if cached else source.vocabulary_size
    name = f"{source.manifest['teacher']} (cached in {source.folder})" if cached else source.name
    ours = student.config.get_text_config().vocab_size
    if theirs == ours or (vocabulary == "shared_prefix" and not (cached and theirs > ours)):
        return
    remedy = (
        f"write the cache with vocabulary_size={ours}, if only the padding of the embeddings differs"
        if cached and theirs > ours
        else 'set vocabulary="shared_prefix", if only the padding of the embeddings differs'
    )
    raise ValueError(
        f"the teacher {name} has a vocabulary of {theirs} and the student {model_name(student)} one of {ours}: "
        f"{remedy}"
    )
