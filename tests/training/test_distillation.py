"""DistillationCallback in the stock Trainer, against training steps written out from all the logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distillation_cases import (
    STUDENTS,
    arguments,
    build,
    build_teacher,
    distance,
    packed_rows,
    padded_rows,
    summed_parts,
)
from distillation_worker import ALPHA, CASES, TEMPERATURE, fsdp2, stock_trainer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainerState

import mobilellm_hf
from mobilellm_hf.influence import InfluenceScorer
from mobilellm_hf.modeling import loss_mobilellm
from mobilellm_hf.nll import mean_nll
from mobilellm_hf.training.distillation import DistillationCallback
from mobilellm_hf.training.teacher import Teacher
from mobilellm_hf.training.teacher_cache import TeacherCache


@pytest.fixture(autouse=True)
def one_thread_seed_and_chunks(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(loss_mobilellm, "LOSS_CHUNK_ELEMENTS", 5 * 64)  # several chunks a batch


def train(folder, student, rows, callback, **options):
    trainer = Trainer(student, arguments(folder, **options), train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def written_out(student, teacher, rows, temperature, alpha, steps=2):
    """Two SGD steps over four rows each, as `arguments` has them, and the parts' means of each."""
    means = []
    for step in range(steps):
        kl, nll, tokens = summed_parts(student, teacher, rows.select(range(4 * step, 4 * step + 4)), temperature)
        ((alpha * temperature**2 * kl + (1 - alpha) * nll) / tokens).backward()
        means.append(((kl / tokens).item(), (nll / tokens).item()))
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        student.zero_grad()
    return means


def assert_same_training(student, expected, start, tolerance):
    """The parameters moved alike: what they had before tells nothing."""
    for (name, value), true, first in zip(student.named_parameters(), expected.parameters(), start.parameters()):
        if (true != first).any():
            assert distance(value - first, true - first) < tolerance, name


@pytest.mark.parametrize("rows", [packed_rows, padded_rows])
@pytest.mark.parametrize("teacher", ["llama", "gemma2", "mobilellm"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_steps_of_the_stock_trainer_are_those_written_out(tmp_path, kind, teacher, rows):
    """fp64; two micro-batches a step, with unequal numbers of tokens; packed documents and padding on both sides."""
    student, expected, start = (build(kind).double() for _ in range(3))
    # Gemma 2 in fp32: its attention in fp64 makes NaN of padding on the left.
    teacher, rows = build_teacher(teacher).to(torch.float if teacher == "gemma2" else torch.double), rows(8)
    trainer = train(tmp_path, student, rows, DistillationCallback(teacher, TEMPERATURE, ALPHA))
    means = written_out(expected, teacher, rows, TEMPERATURE, ALPHA)
    assert_same_training(student, expected, start, 2e-5)  # Llama's norms and all angles are fp32
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (kl, nll) in zip(logs, means, strict=True):
        assert entry["distillation/kl"] == pytest.approx(kl, rel=1e-5)
        assert entry["distillation/nll"] == pytest.approx(nll, rel=1e-5)
        assert entry["loss"] == pytest.approx(ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * nll, rel=1e-5)
    assert not any(name.startswith("distillation") for name in trainer.state.log_history[-1])  # the run's summary


@pytest.mark.parametrize("kind", STUDENTS)
def test_logits_of_a_mobilellm_are_not_built_and_its_teachers_neither(tmp_path, kind):
    student, teacher, seen = build(kind), build_teacher(), []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda head, args, output: seen.append(output.shape[1]))
    hooked = student.lm_head._forward_hooks.copy()
    student.lm_head._forward_hooks.clear()  # a hook on the head wants to be called, and the loss would take logits
    train(tmp_path, student, packed_rows(8), DistillationCallback(teacher), max_steps=1)
    assert seen == [8, 1, 1]  # when it was tried out; then the one position that must be kept
    student.lm_head._forward_hooks.update(hooked)


@pytest.mark.parametrize("kind", STUDENTS)
def test_checkpointing_changes_nothing(tmp_path, kind):
    students = [build(kind) for _ in range(2)]
    for number, student in enumerate(students):
        options = dict(gradient_checkpointing=bool(number), gradient_checkpointing_kwargs={"use_reentrant": False})
        train(tmp_path, student, packed_rows(8), DistillationCallback(build_teacher()), **options)
    assert_same_training(*students, build(kind), 1e-5)


@pytest.mark.parametrize("kind", STUDENTS)
def test_bf16_autocast_trains_nearly_alike_and_leaves_the_teacher_its_precision(tmp_path, kind):
    students, dtypes = [build(kind) for _ in range(2)], []
    teacher = build_teacher()
    teacher.lm_head.register_forward_hook(lambda head, args, output: dtypes.append(output.dtype))
    for student, options in zip(students, (dict(), dict(bf16=True))):
        train(tmp_path, student, packed_rows(8), DistillationCallback(teacher), **options)
    assert set(dtypes) == {torch.float}
    assert_same_training(*students, build(kind), 0.1)
    assert any((a != b).any() for a, b in zip(*(student.parameters() for student in students)))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", STUDENTS)
def test_adapters_are_trained_as_written_out(tmp_path, kind, head):
    """With an adapter on the head MobileLLM's loss takes logits, too."""

    def adapted():
        torch.manual_seed(1)
        targets = ["q_proj", "down_proj", *(["lm_head"] if head else [])]
        model = get_peft_model(build(kind, tie_word_embeddings=False), LoraConfig(r=4, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.double()

    student, expected, start = adapted(), adapted(), adapted()
    teacher, rows = build_teacher().double(), packed_rows(8)
    train(tmp_path, student, rows, DistillationCallback(teacher, TEMPERATURE, ALPHA))
    written_out(expected, teacher, rows, TEMPERATURE, ALPHA)
    assert sum((a != b).any().item() for a, b in zip(student.parameters(), start.parameters())) >= 8
    assert_same_training(student, expected, start, 2e-5)


@pytest.mark.parametrize("kind", STUDENTS)
def test_evaluation_is_the_plain_nll_for_the_trainer_and_for_the_influence_scorer(tmp_path, kind):
    student, rows, found = build(kind), packed_rows(8), {}
    probes = {"a": packed_rows(3, seed=5)}

    class Evaluating(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            found["nll"] = mean_nll(model, rows)
            found["scores"] = InfluenceScorer(model, probes).score(rows)
            model.train()

    options = arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    callbacks = [DistillationCallback(build_teacher()), Evaluating()]
    trainer = Trainer(student, options, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.train()
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert not any(name.startswith("distillation") for name in evaluated)
    assert found["nll"] == pytest.approx(mean_nll(student, rows), rel=1e-6)  # now that the callback is gone
    assert evaluated["eval_loss"] == pytest.approx(found["nll"], rel=1e-5)
    torch.testing.assert_close(found["scores"], InfluenceScorer(student, probes).score(rows))


@pytest.mark.parametrize("kind", STUDENTS)
def test_nothing_is_left_behind_and_a_failed_training_can_be_retried(tmp_path, kind):
    student, teacher, rows = build(kind), build_teacher(), packed_rows(8)

    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    callback = DistillationCallback(teacher)
    for attempt in (callback, DistillationCallback(teacher), callback, callback):  # another's, and its own
        trainer = Trainer(student, arguments(tmp_path), train_dataset=rows, callbacks=[attempt, Failing()])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert len(student._forward_pre_hooks) == 1
    failed, student, expected = student, build(kind), build(kind)
    for model in (student, expected):
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=[callback])
        if model is student:
            trainer.add_callback(Failing())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            model.load_state_dict(expected.state_dict())
            trainer.remove_callback(Failing)
        trainer.train()
    assert_same_training(student, expected, build(kind), 1e-6)
    for model in (failed, student):
        assert vars(model).keys() - {"_is_accelerate_prepared"} == vars(build(kind)).keys()
        assert not model._forward_pre_hooks and not model._forward_hooks
    with pytest.raises(ValueError, match="two DistillationCallbacks"):
        Trainer(
            student, arguments(tmp_path), train_dataset=rows, callbacks=[callback, DistillationCallback(teacher)]
        ).train()


@pytest.mark.parametrize("kind", STUDENTS)
def test_resume_is_bit_equal_and_checkpoints_hold_the_student_alone(tmp_path, kind):
    teacher = build_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    options = dict(save_strategy="steps", save_steps=2, optim="adamw_torch", train_sampling_strategy="random")

    def run(folder, steps, resume=None):
        callback = DistillationCallback(tmp_path / "teacher", TEMPERATURE, ALPHA)
        settings = arguments(folder, max_steps=steps, **options)
        trainer = Trainer(build(kind), settings, train_dataset=packed_rows(16), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    full = run(tmp_path / "full", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4, str(tmp_path / "cut" / "checkpoint-2"))
    for name, value in full.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    logs = ([entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (full, resumed))
    first, second = logs
    assert first == second and len(first) == 4 and all("distillation/kl" in entry for entry in first)
    saved = TrainerState.load_from_json(str(tmp_path / "full" / "checkpoint-4" / "trainer_state.json"))
    assert saved.log_history == first
    weights = load_file(tmp_path / "full" / "checkpoint-4" / "model.safetensors")
    assert weights.keys() <= build(kind).state_dict().keys()
    assert len(list((tmp_path / "full" / "checkpoint-4").glob("*.safetensors"))) == 1


def test_the_teacher_is_no_part_of_the_student_while_it_trains(tmp_path):
    student, teacher, names = build("mobilellm"), build_teacher(), []
    own = [name for name, _ in student.named_modules()], list(student.state_dict())

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            names.append(([name for name, _ in model.named_modules()], list(model.state_dict())))

    trainer = Trainer(
        student,
        arguments(tmp_path),
        train_dataset=packed_rows(8),
        callbacks=[DistillationCallback(teacher), Looking()],
    )
    trainer.train()
    assert names == [own, own]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())


def test_logged_parts_are_means_over_all_tokens_since_the_last_log_and_others_see_them(tmp_path):
    student, expected, teacher, rows = build("mobilellm"), build("mobilellm"), build_teacher(), packed_rows(16)
    seen = []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    options = arguments(tmp_path, max_steps=4, logging_steps=2, learning_rate=0.0)
    callbacks = [DistillationCallback(teacher, TEMPERATURE), Reader()]
    Trainer(student, options, train_dataset=rows, callbacks=callbacks).train()
    with torch.no_grad():
        for number, logs in enumerate(seen[:2]):
            part = rows.select(range(8 * number, 8 * number + 8))
            kl, nll, tokens = summed_parts(expected, teacher, part, TEMPERATURE)
            assert logs["distillation/kl"] == pytest.approx((kl / tokens).item(), rel=1e-5)
            assert logs["distillation/nll"] == pytest.approx((nll / tokens).item(), rel=1e-5)


# Several processes.


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder, and what two processes made of every case, in one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    build_teacher().save_pretrained(folder / "teacher")
    TeacherCache.write(build_teacher(), packed_rows(8), folder / "cache", top_k=8, on_batch=lambda rows: None)
    worker = Path(__file__).with_name("distillation_worker.py")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker), str(folder))
    return folder, torch.load(folder / "results.pt")


def run(*command):
    """A new interpreter that can import the package; its output."""
    paths = [str(Path(mobilellm_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_two_processes_train_as_one(two_processes, case):
    folder, results = two_processes
    way, kind, teacher = case
    alone = {"stock_trainer": stock_trainer, "fsdp2": fsdp2}[way]
    expected = alone(folder, kind, "whole" if teacher != "cached" else teacher, 1)
    found, start = results[case], dict(build(kind).named_parameters())
    assert found["sharded"] == (way == "fsdp2")
    assert found.get("teacher_sharded", False) == (way == "fsdp2" and teacher in ("named", "sharded"))
    for name, value in found["parameters"].items():
        assert distance(value - start[name], expected["parameters"][name] - start[name]) < 1e-4, name
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


# What is refused.


def attempt(tmp_path, callback, student=None, rows=None, options=None, **trainer_options):
    settings = arguments(tmp_path, **(options or {}))
    Trainer(
        student or build("mobilellm"),
        settings,
        train_dataset=rows or packed_rows(8),
        callbacks=[callback],
        **trainer_options,
    ).train()


@pytest.mark.parametrize("sizes", [(56, 64), (72, 64)])
@pytest.mark.parametrize("kind", STUDENTS)
def test_vocabularies_of_different_sizes_are_refused_or_cut_on_demand(tmp_path, kind, sizes):
    teachers, students = sizes
    student, teacher = build(kind, vocab_size=students), build_teacher(vocab_size=teachers)
    message = (
        rf"teacher LlamaForCausalLM has a vocabulary of {teachers} and the student \w+ one of {students}: set vocabula"
    )
    with pytest.raises(ValueError, match=message):
        attempt(tmp_path, DistillationCallback(teacher), student)
    rows = packed_rows(8).map(lambda row: {"input_ids": [min(token, 55) for token in row["input_ids"]]})
    rows = rows.map(lambda row: {"labels": [min(label, 55) for label in row["labels"]]})
    attempt(tmp_path, DistillationCallback(teacher, vocabulary="shared_prefix"), student, rows)


def word_tokenizer(words):
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="-".join(words))


def test_tokenizers_that_differ_are_refused_by_a_token(tmp_path):
    left, right = word_tokenizer(["a", "b", "c"]), word_tokenizer(["a", "c", "b"])
    with pytest.raises(ValueError, match=r"differ in 4 entries: '[bc]' is id [12] for the teacher \(a-b-c\) and [12]"):
        attempt(tmp_path, DistillationCallback(build_teacher(), tokenizers=(left, right)))
    attempt(tmp_path, DistillationCallback(build_teacher(), tokenizers=(left, left)))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0.0), "temperature=0.0 must be positive"),
        (dict(alpha=1.5), "alpha=1.5 must be between 0 and 1"),
        (dict(vocabulary="prefix"), "vocabulary='prefix' must be one of same, shared_prefix"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationCallback(build_teacher(), **options)


def test_a_loss_that_would_not_be_distillations_is_refused_and_not_trained_with(tmp_path):
    callback, student = DistillationCallback(build_teacher()), build("mobilellm")
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 takes the loss out of the model"):
        attempt(tmp_path, callback, options=dict(label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="gives it no labels: train without compute_loss_func"):
        attempt(tmp_path, callback, compute_loss_func=lambda outputs, labels, **kwargs: outputs.logits.sum())
    with pytest.raises(ValueError, match="share parameters: give the teacher a copy"):
        attempt(tmp_path, DistillationCallback(student), student)
    with pytest.raises(ValueError, match="shard_teacher=True needs several processes"):
        attempt(tmp_path, DistillationCallback(build_teacher(), shard_teacher=True))
    student.loss_function = lambda logits, **kwargs: logits.sum()
    with pytest.raises(ValueError, match="has a loss_function of its own"):
        attempt(tmp_path, callback, student)

    class WithLogits(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(**inputs, return_logits=True).loss

    trainer = WithLogits(build("mobilellm"), arguments(tmp_path), train_dataset=packed_rows(8), callbacks=[callback])
    with pytest.raises(RuntimeError, match="a loss that is not distillation's"):
        trainer.train()


@pytest.mark.parametrize("kind, suffice", [("llama", True), ("mobilellm", True), ("gemma2", False)])
def test_hidden_states_are_taken_only_where_they_determine_the_logits(kind, suffice):
    model, ids = build_teacher(kind), torch.randint(3, 64, (2, 7))
    teacher = Teacher(model)
    assert teacher.states_suffice == suffice and teacher.vocabulary_size == 64
    states = teacher.states({"input_ids": ids, "labels": ids})
    with teacher.head() as (weight, bias), torch.no_grad():
        logits = states if weight is None else torch.nn.functional.linear(states, weight, bias)
        torch.testing.assert_close(logits, model(ids).logits.flatten(0, 1))
    with torch.autocast("cpu", torch.bfloat16):  # the student's, not its
        assert torch.equal(teacher.states({"input_ids": ids}), states)


WITHOUT_MEMORY = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from distillation_cases import arguments, build, build_teacher, packed_rows
from transformers import Trainer
from mobilellm_hf.training.distillation import DistillationCallback

def limit(extra):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))

student = build("mobilellm")
teacher = {teacher}
trainer = Trainer(student, arguments({folder!r}), train_dataset=packed_rows(8), callbacks=[
    DistillationCallback(teacher, dtype=torch.float)])
limit({extra})
try:
    trainer.train()
except MemoryError as error:
    print(type(error).__name__, trainer.state.global_step, error)
"""


@pytest.mark.parametrize("when", ["load", "forward"])
def test_a_teacher_that_does_not_fit_is_explained(tmp_path, when):
    """Allocations really fail, in a process of little address space."""
    big = dict(vocab_size=64, hidden_size=48, num_hidden_layers=2)
    if when == "load":
        build_teacher(**big, intermediate_size=200_000).save_pretrained(tmp_path / "teacher")  # 230 MB
        teacher, extra = repr(str(tmp_path / "teacher")), 100 * 2**20
    else:
        teacher, extra = f"build_teacher(**{big}, intermediate_size=400_000)", 16 * 2**20  # 38 MB an activation
    tests = str(Path(__file__).parent)
    code = WITHOUT_MEMORY.format(tests=tests, folder=str(tmp_path / "run"), teacher=teacher, extra=extra)
    printed = run("-c", code)
    name = str(tmp_path / "teacher") if when == "load" else "LlamaForCausalLM"
    assert f"TeacherOutOfMemoryError 0 the teacher {name} does not fit, in torch.float32 on cpu" in printed
    for remedy in ("dtype=torch.bfloat16", "shard_teacher=True", "TeacherCache.write"):
        assert remedy in printed


def test_other_errors_of_the_teacher_are_its_own(tmp_path):
    teacher = build_teacher()
    with pytest.raises(OSError, match="nowhere"):
        attempt(tmp_path, DistillationCallback(tmp_path / "nowhere"))
    teacher.model.layers[0].register_forward_hook(lambda *args: (_ for _ in ()).throw(RuntimeError("of its own")))
    with pytest.raises(RuntimeError, match="of its own"):
        attempt(tmp_path, DistillationCallback(teacher))
