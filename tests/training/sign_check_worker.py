"""Run by torchrun from test_sign_check.py: two ranks check one sign, and one finds every NLL half a nat higher."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from mixture_cases import build, probes, training_rows

from mobilellm_hf.nll import mean_nll

sign_check = importlib.import_module("mobilellm_hf.training.sign_check")
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
sign_check.mean_nll = lambda *given: mean_nll(*given) + rank / 2
rows = training_rows()
scores = torch.arange(float(len(rows)))[:, None].expand(-1, 2)
found = sign_check.sign_check(build(), rows, scores, list(probes()), probes(), steps=1, learning_rate=1e-3, seeds=1)
(Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps(asdict(found)))
dist.barrier()  # or one process tears down what the other still listens to
dist.destroy_process_group()
