"""A teacher's top-k probabilities on disk: what is in them, what survives, what is refused, and training from them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from distillation_cases import STUDENTS, arguments, build, build_teacher, distance, packed_rows, padded_rows
from distillation_cases import lone_documents as documents_of
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import mobilellm_hf
from mobilellm_hf.modeling import loss_mobilellm
from mobilellm_hf.training.distillation import DistillationCallback
from mobilellm_hf.training.divergence import DistillationLoss, LogitsDistillation
from mobilellm_hf.training.row_ids import RowIds
from mobilellm_hf.training.teacher_cache import TeacherCache

K = 8


@pytest.fixture(autouse=True)
def one_thread_seed_and_chunks(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(loss_mobilellm, "LOSS_CHUNK_ELEMENTS", 5 * 64)  # several chunks a batch


def write(folder, rows, teacher=None, batches=None, **options) -> TeacherCache:
    """batches: filled with the number of rows of every batch that the teacher ran."""
    on_batch = (lambda count: None) if batches is None else batches.append
    options = dict(top_k=K, batch_size=2, rows_per_shard=3) | options
    return TeacherCache.write(teacher or build_teacher(), rows, folder, on_batch=on_batch, **options)


def ragged_rows(count: int) -> Dataset:
    """Rows of 4 to 12 tokens without labels: every token is predicted but the first."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]}
    )


def true_log_probabilities(teacher, row) -> torch.Tensor:
    """(predicted tokens, vocabulary), one document at a time."""
    parts = []
    for ids, labels in documents_of(row):
        logits = teacher(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        parts.append(logits[torch.tensor(labels)[1:] != -100].log_softmax(-1))
    return torch.cat(parts)


@pytest.mark.parametrize("rows", [packed_rows, padded_rows, ragged_rows])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_what_is_cached_is_what_the_teacher_says_of_every_predicted_token(tmp_path, rows, kind):
    teacher, rows = build_teacher(kind), rows(8)
    cache, tokens = write(tmp_path / "cache", rows, teacher), 0
    for number, row in enumerate(rows):
        labels = row.get("labels") or row["input_ids"]
        found = cache.read([number], torch.tensor([labels]))
        true = true_log_probabilities(teacher, {"labels": labels, **row})
        tokens += len(true)
        assert found.ids.shape == (len(true), K) and found.log_probabilities.shape == (len(true), K + 1)
        assert torch.equal(found.ids.sort(-1).values, true.topk(K).indices.sort(-1).values)
        tail = true.scatter(-1, found.ids, -torch.inf).logsumexp(-1, keepdim=True)
        expected = torch.cat((true.gather(-1, found.ids), tail), -1)
        assert ((found.log_probabilities - expected) / expected).abs().max() < 1e-3  # fp16
        torch.testing.assert_close(found.log_probabilities.exp().sum(-1), torch.ones(len(true)))
    assert cache.tokens == tokens


def test_a_batch_is_read_in_its_own_order_from_several_shards_with_any_padding(tmp_path):
    rows = ragged_rows(8)
    cache = write(tmp_path / "cache", rows)
    alone = {number: cache.read([number], torch.tensor([rows[number]["input_ids"]])) for number in (7, 0, 4)}
    labels = torch.full((3, 15), -100)
    for place, number in enumerate(alone):
        ids = torch.tensor(rows[number]["input_ids"])
        labels[place, place : place + len(ids)] = ids
        labels[place, place] = -100  # never predicted, but by padding
    batch = cache.read(torch.tensor(list(alone)), labels)
    assert torch.equal(batch.ids, torch.cat([row.ids for row in alone.values()]))
    assert torch.equal(batch.log_probabilities, torch.cat([row.log_probabilities for row in alone.values()]))


def test_bytes_a_token_are_those_promised(tmp_path):
    teacher = build_teacher(vocab_size=70_000, hidden_size=8, num_hidden_layers=1)
    ids = torch.randint(3, 70_000, (4, 1001), generator=torch.Generator().manual_seed(0)).tolist()
    cache = write(tmp_path / "cache", Dataset.from_dict({"input_ids": ids}), teacher, top_k=32, rows_per_shard=4)
    assert cache.tokens == 4000 and cache.bytes_per_token == pytest.approx(194, abs=1)  # 32 x (4 + 2) + 2
    small = write(tmp_path / "small", ragged_rows(400), top_k=32, rows_per_shard=400)
    assert small.bytes_per_token == pytest.approx(32 * (2 + 2) + 2, rel=0.05)  # two bytes an id, and row starts
    assert small.read([0], torch.tensor([ragged_rows(400)[0]["input_ids"]])).ids.dtype == torch.long


def test_rows_that_predict_nothing_take_no_place(tmp_path):
    rows = packed_rows(4).map(
        lambda row, number: {"labels": row["labels"] if number == 1 else [-100] * 12}, with_indices=True
    )
    for rows_per_shard in (1, 4):
        cache = write(tmp_path / str(rows_per_shard), rows, rows_per_shard=rows_per_shard)
        assert cache.tokens == sum(label != -100 for label in rows[1]["labels"][1:])
        assert len(cache.read(range(4), torch.tensor(rows["labels"])).ids) == cache.tokens
        assert len(cache.read([3], torch.tensor(rows[3:]["labels"])).ids) == 0


# What survives.

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from distillation_cases import build_teacher, packed_rows
from mobilellm_hf.training.teacher_cache import TeacherCache
batches = []
def on_batch(rows):
    batches.append(rows)
    if len(batches) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
TeacherCache.write(build_teacher(), packed_rows(8), {folder!r}, top_k=8, batch_size=2, rows_per_shard=3,
    on_batch=on_batch)
"""


def run(*command) -> subprocess.CompletedProcess:
    paths = [str(Path(mobilellm_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def shards(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("shard-*"))}


def test_writing_goes_on_after_a_kill_and_redoes_what_is_damaged(tmp_path):
    rows, batches = packed_rows(8), []
    expected = shards(write(tmp_path / "expected", rows).folder)
    folder = tmp_path / "cache"
    killed = run("-c", KILLED.format(tests=str(Path(__file__).parent), folder=str(folder)))
    assert killed.returncode == -signal.SIGKILL and list(shards(folder)) == ["shard-00000.safetensors"]
    with pytest.raises(
        ValueError, match="not finished: 2 of 3 shards are missing or damaged, shard-00001.safetensors"
    ):
        TeacherCache(folder)
    (folder / "shard-00001.safetensors.partial").write_bytes(b"half")
    write(folder, rows, batches=batches)
    assert sum(batches) == 5 and shards(folder) == expected
    for damage in (expected["shard-00001.safetensors"][:-9], b"", bytes(100)):
        (folder / "shard-00001.safetensors").write_bytes(damage)
        batches.clear()
        write(folder, rows, batches=batches)
        assert sum(batches) == 3 and shards(folder) == expected
    batches.clear()
    write(folder, rows, batches=batches)
    assert not batches and shards(folder) == expected


WRITER = """
import os, sys
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from distillation_cases import build_teacher, packed_rows
from mobilellm_hf.training.teacher_cache import TeacherCache
on_batch = None if os.environ["RANK"] == "0" else lambda rows: print("the other read", rows)
TeacherCache.write(build_teacher(), packed_rows(8), {folder!r}, top_k=8, rows_per_shard=1, on_batch=on_batch)
PartialState().destroy_process_group()
"""


def test_processes_divide_the_shards_and_one_of_them_shows_progress(tmp_path):
    script, folder = tmp_path / "writer.py", tmp_path / "cache"
    script.write_text(WRITER.format(tests=str(Path(__file__).parent), folder=str(folder)))
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("teacher's top 8") == 1 and done.stdout.count("the other read 1") == 4
    assert shards(folder) == shards(write(tmp_path / "alone", packed_rows(8), rows_per_shard=1).folder)


# What is refused.


def test_the_cache_of_something_else_is_refused_by_the_name_of_the_field(tmp_path):
    rows, folder = packed_rows(8), tmp_path / "cache"
    cache = write(folder, rows)
    other_teacher = build_teacher()
    other_teacher.model.layers[1].mlp.up_proj.weight.data += 1e-3
    relabelled = rows.map(lambda row: {"labels": [-100, *row["labels"][1:-1], -100]})
    for field, arguments_ in {
        "top_k": dict(top_k=4),
        "teacher_weights": dict(teacher=other_teacher),
        "rows": dict(rows=rows.select(range(7))),
        "dataset": dict(rows=rows.select([1, 0, *range(2, 8)])),
        "rows_per_shard": dict(rows_per_shard=4),
        "vocabulary_size": dict(vocabulary_size=60),
    }.items():
        with pytest.raises(ValueError, match=rf"cache of something else: {field} is .* there and .* here"):
            write(folder, **dict(rows=rows) | arguments_)
    for other in (rows.select(range(7)), relabelled):
        with pytest.raises(ValueError, match="cache of something else: (rows|dataset) is"):
            cache.add_row_ids(other)
    with pytest.raises(ValueError, match="top_k=64 must be between 1 and 63"):
        write(tmp_path / "other", rows, top_k=64)
    with pytest.raises(ValueError, match=r"holds no teacher cache \(teacher_cache.json\): make one"):
        TeacherCache(tmp_path / "nowhere")
    assert json.loads((folder / "teacher_cache.json").read_text())["top_k"] == K


def train(folder, cache, rows, student=None, temperature=1.0, alpha=1.0, teacher=None, **options):
    student = student or build("mobilellm")
    options = dict(remove_unused_columns=False) | options
    callback = DistillationCallback(teacher or cache, temperature, alpha, **options.pop("callback", {}))
    Trainer(student, arguments(folder, **options), train_dataset=rows, callbacks=[callback]).train()
    return student


def test_training_refuses_rows_that_are_not_the_cached_ones(tmp_path):
    rows = packed_rows(8)
    cache = write(tmp_path / "cache", rows)
    with pytest.raises(ValueError, match="remove_unused_columns=True would drop the column row_id"):
        train(tmp_path, cache, cache.add_row_ids(rows), remove_unused_columns=True)
    with pytest.raises(ValueError, match="the batch has no row_id: add the column with TeacherCache.add_row_ids"):
        train(tmp_path, cache, rows)
    with pytest.raises(ValueError, match="row_id=-1 is not one of the 8 rows"):
        train(tmp_path, cache, rows.add_column("row_id", numpy.full(8, -1)))
    with pytest.raises(ValueError, match=r"row 0 has \d+ predicted tokens in the batch and \d+ in"):
        train(tmp_path, cache, cache.add_row_ids(rows).map(lambda row: {"labels": row["input_ids"]}))
    same_places = rows.map(lambda row: {"labels": [label if label < 0 else 3 for label in row["labels"]]})
    with pytest.raises(ValueError, match="row 0 predicts other tokens in the batch"):
        train(tmp_path, cache, same_places.add_column("row_id", numpy.arange(8)))
    with pytest.raises(ValueError, match="shard_teacher=True is for a model"):
        DistillationCallback(cache, shard_teacher=True)


def test_vocabularies_of_cache_and_student_are_compared(tmp_path):
    rows = packed_rows(8).map(lambda row: {"input_ids": [min(token, 55) for token in row["input_ids"]]})
    rows = rows.map(lambda row: {"labels": [min(label, 55) for label in row["labels"]]})
    cache = write(tmp_path / "cache", rows)
    rows = cache.add_row_ids(rows)
    cut, prefix = build("mobilellm", vocab_size=60), dict(callback=dict(vocabulary="shared_prefix"))
    for options in (dict(), prefix):
        with pytest.raises(
            ValueError, match="vocabulary of 64 and .* one of 60: write the cache with vocabulary_size=60"
        ):
            train(tmp_path, cache, rows, cut, **options)
    smaller = write(tmp_path / "cut", rows, vocabulary_size=60)
    train(tmp_path, smaller, rows, cut)
    padded = build("mobilellm", vocab_size=72)
    with pytest.raises(ValueError, match='one of 72: set vocabulary="shared_prefix"'):
        train(tmp_path, cache, rows, padded)
    train(tmp_path, cache, rows, padded, **prefix)


# Training.


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", STUDENTS)
def test_with_all_ids_but_one_it_trains_as_the_teacher_does(tmp_path, kind, temperature):
    """Then the bucket is the last id, and nothing is lost but fp16's rounding."""
    rows, teacher = packed_rows(8), build_teacher()
    cache = write(tmp_path / "cache", rows, teacher, top_k=63)
    cached = train(tmp_path, cache, cache.add_row_ids(rows), build(kind), temperature, 0.7)
    taught = train(tmp_path, cache, rows, build(kind), temperature, 0.7, teacher=teacher)
    for (name, value), true, first in zip(cached.named_parameters(), taught.parameters(), build(kind).parameters()):
        assert 0 < distance(value - first, true - first) < 2e-3, name


@pytest.mark.parametrize("rows", [packed_rows, padded_rows])
def test_both_kinds_of_loss_train_alike_from_a_cache(tmp_path, rows):
    """MobileLLM's, and that from logits, which an adapter on its head asks for."""
    rows = rows(8)
    cache = write(tmp_path / "cache", rows)
    students = []
    for head in (False, True):
        student = build("mobilellm", tie_word_embeddings=False)
        torch.manual_seed(2)
        targets = ["q_proj", *(["lm_head"] if head else [])]
        student = get_peft_model(student, LoraConfig(r=4, target_modules=targets))
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("q_proj.lora" in name)
            if "q_proj.lora_A" in name:
                torch.nn.init.constant_(parameter, 0.1)
        assert student.get_base_model().loss_needs_logits() == head
        students.append(train(tmp_path, cache, cache.add_row_ids(rows), student, 2.0, 0.7))
    q_proj = [[p for name, p in student.named_parameters() if "q_proj.lora" in name] for student in students]
    assert len(q_proj[0]) == len(q_proj[1]) == 4
    for first, second in zip(*q_proj):
        assert first.abs().sum() > 0 and distance(first, second) < 1e-5


def test_loss_and_gradient_come_nearer_to_the_whole_with_k(tmp_path):
    rows, teacher, student = packed_rows(8), build_teacher(), build("llama")
    labels = torch.tensor(rows["labels"])
    inputs = {name: torch.tensor(rows[name]) for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        logits, teacher_logits = (
            model(**inputs, use_cache=False).logits.flatten(0, 1) for model in (student, teacher)
        )
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    kept = shifted != -100
    whole = F.kl_div(
        logits.log_softmax(-1)[kept], teacher_logits.log_softmax(-1)[kept], log_target=True, reduction="sum"
    )
    true = (logits.softmax(-1) - teacher_logits.softmax(-1)) * kept[:, None]
    errors, cosines = [], []
    for k in (2, 8, 32):
        cache = write(tmp_path / str(k), rows, teacher, top_k=k)
        leaf = logits.clone().requires_grad_()
        targets = cache.read(range(8), labels)
        loss = LogitsDistillation.apply(leaf, shifted, None, -100, None, DistillationLoss(1.0, 1.0), targets)
        loss.backward()
        errors.append((whole - loss).item() / whole.item())
        cosines.append(F.cosine_similarity(leaf.grad.flatten(), true.flatten(), dim=0).item())
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    assert 0 < cosines[0] < cosines[1] < cosines[2] < 1


def test_row_ids_reach_all_who_ask_and_not_the_model():
    model, ids = build("llama"), torch.randint(3, 64, (2, 5))
    first, second = RowIds.attach(model), RowIds.attach(model)
    assert first is second and len(model._forward_pre_hooks) == 1
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    model(input_ids=ids, row_id=torch.tensor([4, 2]))
    assert first.current.tolist() == [4, 2] and seen == [{"input_ids"}]
    model(input_ids=ids)
    assert first.current is None
    first.detach()
    model(input_ids=ids, row_id=torch.tensor([1, 3]))
    assert second.current.tolist() == [1, 3]
    second.detach()
    assert len(model._forward_pre_hooks) == 1 and "_row_ids" not in vars(model)
