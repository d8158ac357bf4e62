"""Run by torchrun from test_fused.py: scores inside a DDP training step against one process's; FSDP2 is refused."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from influence_cases import build, relative_error, rows
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mobilellm_hf.influence import InfluenceScorer

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
model, dataset = build().train(), rows(9, seed=1).select(range(1, 9))  # each predicts as many tokens
scorer = InfluenceScorer(model, {"code": rows(4, 5), "math": rows(4, 6)})
expected = scorer.score(dataset)
columns = {name: dataset.with_format("torch")[name][:] for name in ("input_ids", "labels", "position_ids")}
model(**columns).loss.backward()
joint = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()
own = slice(4 * rank, 4 * rank + 4)
with scorer.in_training_step() as influence:
    wrapped = DistributedDataParallel(model)
    wrapped(**{name: value[own] for name, value in columns.items()}).loss.backward()
    scores = influence.take()
errors = torch.tensor([
    relative_error(scores, expected[own]),
    max(relative_error(p.grad, joint[name]) for name, p in model.named_parameters()),
])  # fmt: skip
dist.all_reduce(errors, dist.ReduceOp.MAX)
fully_shard(sharded := build())
try:
    InfluenceScorer(sharded, {"code": rows(4, 5)})
    refused = ""
except ValueError as error:
    refused = str(error)
if rank == 0:
    figures = dict(scores=errors[0].item(), gradients=errors[1].item(), refused=refused)
    (Path(sys.argv[1]) / "figures.json").write_text(json.dumps(figures))
dist.destroy_process_group()
