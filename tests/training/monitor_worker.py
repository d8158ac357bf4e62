"""Run by torchrun from test_monitors.py: the figures that two processes take of one model, whole and sharded."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_from_disk
from test_monitors import build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mobilellm_hf.training import ProbeNLLCallback
from mobilellm_hf.training.rank_me import RankMeCallback


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    data = load_from_disk(folder / "rows")
    for way in ("whole", "fsdp2"):
        model = build()
        if way == "fsdp2":
            mesh = init_device_mesh("cpu", (state.num_processes,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        forwards = []
        model.register_forward_hook(lambda module, args, output, forwards=forwards: forwards.append(1))
        figures = ProbeNLLCallback({"code": data, "one row": data.select([0])}, 1, 4).measure(model)
        figures |= RankMeCallback(data, every=1, positions=60, batch_size=4).measure(model)
        report = {"figures": figures, "forwards": len(forwards)}
        (folder / f"{way}-{state.process_index}.json").write_text(json.dumps(report))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
