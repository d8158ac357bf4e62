"""Run by torchrun from test_live_mixture.py: two ranks train on one mixture with influence resampling."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from mixture_cases import train
from test_resampling import resampling

torch.set_num_threads(1)
folder, batch = Path(sys.argv[1]), int(sys.argv[2])
callback = resampling()
trainer, read = train(folder, callback, per_device_train_batch_size=batch, save_steps=99, ddp_backend="gloo")
rounds = [{**asdict(found), "cost": 0} for found in callback.rounds]
losses = {name: value for name, value in trainer.state.log_history[2].items() if name.startswith("loss/")}
folder.mkdir(exist_ok=True)
result = {"read": read, "rounds": rounds, "losses": losses}
(folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
dist.barrier()  # or one process tears down what the other still listens to
dist.destroy_process_group()
