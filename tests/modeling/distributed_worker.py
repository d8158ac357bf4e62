"""Run by torchrun from test_distributed.py: trains tiny models in several ways; rank 0 writes the outcome as JSON."""

import json
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from mobilellm_hf import MobileLLMForCausalLM
from mobilellm_hf.modeling import loss_mobilellm

loss_mobilellm.LOSS_CHUNK_ELEMENTS = 9 * 128  # several chunks


def ddp(model, optimizer_class, folder):
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, optimizer_class(model.parameters())


def fsdp2(model, optimizer_class, folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, optimizer_class(model.parameters())


def fsdp2_accelerate(model, optimizer_class, folder):
    """`Accelerator.prepare` shards on GPUs only; this is the part of it that does, given what it reads of itself."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["MobileLLMDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        torch_device_mesh={("fsdp",): init_device_mesh("cpu", (dist.get_world_size(),))},
        parallelism_config=SimpleNamespace(fsdp_dim_names=["fsdp"]),
        device=torch.device("cpu"),
    )
    model = fsdp2_prepare_model(accelerator, model)
    return model, optimizer_class(model.parameters())


def fsdp2_transformers(model, optimizer_class, folder):
    """The model's own plan: `_fsdp_plan` and the config's `base_model_fsdp_plan`."""
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = MobileLLMForCausalLM.from_pretrained(folder, distributed_config=config)
    return model, optimizer_class(model.parameters())


def tensor_parallel(model, optimizer_class, folder):
    """The model's own plan: `_tp_plan` and the config's `base_model_tp_plan`."""
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = MobileLLMForCausalLM.from_pretrained(folder, distributed_config=config)
    return model, optimizer_class(model.parameters())


def run(case, folder, rows):
    torch.manual_seed(0)
    model = MobileLLMForCausalLM.from_pretrained(folder)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def optimizer_class(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2)

    model, optimizer = globals()[case["way"]](model, optimizer_class, folder)
    # In tensor parallelism every rank sees every row; elsewhere each has its share.
    mine = rows if case["way"] == "tensor_parallel" else rows.chunk(dist.get_world_size())[dist.get_rank()]
    model.train()
    losses, fused = [], True
    for _ in range(case["steps"]):
        output = model(input_ids=mine, labels=mine, use_cache=False)
        fused = fused and output.logits is None
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = output.loss.detach().clone()
        dist.all_reduce(mean)
        losses.append((mean / dist.get_world_size()).item())
    norms, sharded = {}, False
    for name, parameter in model.named_parameters():
        sharded = sharded or isinstance(parameter, DTensor)
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        norms[name.removeprefix("module.")] = whole.detach().double().norm().item()
    return {"losses": losses, "fused": fused, "norms": norms, "sharded": sharded}


def main():
    path = sys.argv[1]
    with open(path) as file:
        cases = json.load(file)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, case in cases.items():
        rows = torch.tensor(case["rows"])
        results[name] = run(case, case["folder"], rows)
    if dist.get_rank() == 0:
        with open(path + ".out", "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
