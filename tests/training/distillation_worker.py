"""Run by torchrun from test_distillation.py: two processes distill in several ways; rank 0 saves what became of it.

python distillation_worker.py FOLDER: cached targets are in FOLDER/cache, the teacher in FOLDER/teacher.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from distillation_cases import arguments, build, packed_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerState

from mobilellm_hf.modeling import loss_mobilellm
from mobilellm_hf.training.distillation import DistillationCallback
from mobilellm_hf.training.teacher import Teacher
from mobilellm_hf.training.teacher_cache import TeacherCache

loss_mobilellm.LOSS_CHUNK_ELEMENTS = 5 * 64  # several chunks
TEMPERATURE, ALPHA, STEPS, LEARNING_RATE = 2.0, 0.6, 2, 0.1


def make_callback(folder: Path, teacher: str) -> DistillationCallback:
    if teacher == "cached":
        return DistillationCallback(TeacherCache(folder / "cache"), TEMPERATURE, ALPHA)
    model = folder / "teacher" if teacher == "named" else AutoModelForCausalLM.from_pretrained(folder / "teacher")
    options = dict(dtype=torch.float, shard_teacher=teacher != "whole")
    return DistillationCallback(model, TEMPERATURE, ALPHA, **options)


def stock_trainer(folder: Path, kind: str, teacher: str, processes: int) -> dict:
    """DDP under torchrun. Two processes take one micro-batch each, one process both of them."""
    student, rows = build(kind), packed_rows(8)
    if teacher == "cached":
        rows = TeacherCache(folder / "cache").add_row_ids(rows)
    options = arguments(
        folder / "trainer", gradient_accumulation_steps=2 // processes, remove_unused_columns=teacher != "cached"
    )
    trainer = Trainer(student, options, train_dataset=rows, callbacks=[make_callback(folder, teacher)])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return outcome(student, [[entry[f"distillation/{part}"] for part in ("kl", "nll")] for entry in logs])


def fsdp2(folder: Path, kind: str, teacher: str, processes: int) -> dict:
    student, rows = build(kind), packed_rows(8).with_format("torch")
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in student.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
    args = SimpleNamespace(device=torch.device("cpu"), n_gpu=0, label_smoothing_factor=0, remove_unused_columns=False)
    callback, state, logs = make_callback(folder, teacher), TrainerState(), []
    callback.on_train_begin(args, state, None, model=student)
    optimizer = torch.optim.SGD(student.train().parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        batch = rows[4 * step : 4 * step + 4] | {"row_id": torch.arange(4 * step, 4 * step + 4)}
        tokens = (batch["labels"][:, 1:] != -100).sum()
        if teacher != "cached":
            del batch["row_id"]
        if processes > 1:
            batch = {name: values.chunk(processes)[dist.get_rank()] for name, values in batch.items()}
        loss = student(**batch, num_items_in_batch=tokens, use_cache=False).loss
        (loss * processes).backward()
        optimizer.step()
        optimizer.zero_grad()
        state.log_history.append({"loss": loss.item(), "step": 0})
        callback.on_log(args, state, None, logs={"loss": loss.item()})
        logs.append([state.log_history[-1][f"distillation/{part}"] for part in ("kl", "nll")])
    callback.on_train_end(args, state, None)
    found = outcome(student, logs)
    if processes > 1 and isinstance(callback._ready, Teacher):
        callback._ready.states(batch)  # after which nothing of it stays whole
        parameters = callback._ready.model.parameters()
        found["teacher_sharded"] = all(isinstance(parameter, DTensor) for parameter in parameters)
    return found


def outcome(student: torch.nn.Module, logs: list) -> dict:
    parameters, sharded = {}, False
    for name, parameter in student.named_parameters():
        sharded = sharded or isinstance(parameter, DTensor)
        parameters[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
    return {"parameters": parameters, "logs": logs, "sharded": sharded}


# how it is distributed, the student, the teacher
CASES = [
    *(("stock_trainer", kind, teacher) for kind in ("mobilellm", "llama") for teacher in ("whole", "cached")),
    *(("fsdp2", kind, teacher) for kind in ("mobilellm", "llama") for teacher in ("whole", "named", "cached")),
    ("fsdp2", "mobilellm", "sharded"),
]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {case: globals()[case[0]](folder, *case[1:], dist.get_world_size()) for case in CASES}
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
