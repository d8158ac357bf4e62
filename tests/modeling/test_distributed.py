"""Two processes train as one does on the joint batch: DDP, FSDP2 in three ways, tensor parallelism; CPU and gloo."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Llama4ForCausalLM

from mobilellm_hf import MobileLLMForCausalLM, save_as_llama4_text

STEPS = 4
PLAIN, UNTIED, REPEATED = dict(), dict(tie_word_embeddings=False), dict(num_hidden_layers=4, layer_repeats=2)
# name: how it is distributed (a function of distributed_worker.py), the model, gradient checkpointing
CASES = {
    "ddp": ("ddp", "plain", False),
    "ddp untied": ("ddp", "untied", False),
    "ddp repeated checkpointed": ("ddp", "repeated", True),
    "fsdp2": ("fsdp2", "plain", False),
    "fsdp2 untied": ("fsdp2", "untied", False),
    "fsdp2 repeated": ("fsdp2", "repeated", False),
    "fsdp2 checkpointed": ("fsdp2", "plain", True),
    "accelerate": ("fsdp2_accelerate", "plain", False),
    "accelerate untied": ("fsdp2_accelerate", "untied", False),
    "transformers": ("fsdp2_transformers", "plain", False),
    "transformers untied": ("fsdp2_transformers", "untied", False),
    "tensor parallel": ("tensor_parallel", "plain", False),
    "tensor parallel untied": ("tensor_parallel", "untied", False),
}
# Here every process has only its rows of the head, and the loss is taken from the gathered logits.
UNFUSED = {"tensor parallel", "tensor parallel untied"}


ROWS = 4


@pytest.fixture(scope="module")
def folders(make_model, tmp_path_factory):
    """One saved model of each kind."""
    folders = {}
    for name, fields in (("plain", PLAIN), ("untied", UNTIED), ("repeated", REPEATED)):
        folders[name] = tmp_path_factory.mktemp(name)
        make_model(**fields).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def trained(folders, tokens, run_python, tmp_path_factory):
    """What two processes made of every case, in one launch: starting them takes longer than the training."""
    path = tmp_path_factory.mktemp("distributed") / "cases.json"
    common = dict(steps=STEPS, rows=tokens(ROWS, 20).tolist())
    path.write_text(
        json.dumps(
            {
                name: dict(way=way, folder=str(folders[kind]), checkpointing=checkpointing, **common)
                for name, (way, kind, checkpointing) in CASES.items()
            }
        )
    )
    worker = Path(__file__).with_name("distributed_worker.py")
    run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, worker, path)
    return json.loads(path.with_name("cases.json.out").read_text())


@pytest.fixture(scope="module")
def alone(folders, tokens, tmp_path_factory):
    """What one process makes of the joint batch: with transformers' Llama 4 where it can express the network."""
    results = {}
    for kind, folder in folders.items():
        model = MobileLLMForCausalLM.from_pretrained(folder)
        options = dict(return_logits=True)  # the unfused loss
        if kind != "repeated":
            llama4 = tmp_path_factory.mktemp("llama4")
            save_as_llama4_text(model, llama4)
            model, options = Llama4ForCausalLM.from_pretrained(llama4), {}
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        losses = []
        for _ in range(STEPS):
            loss = model(tokens(ROWS, 20), labels=tokens(ROWS, 20), **options).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        norms = {name: parameter.detach().double().norm().item() for name, parameter in model.named_parameters()}
        results[kind] = {"losses": losses, "norms": norms}
    return results


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(trained, alone, case):
    ours, theirs = trained[case], alone[CASES[case][1]]
    assert theirs["losses"][-1] < theirs["losses"][0] - 0.5
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-5)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert ours["sharded"] == (CASES[case][0] != "ddp")


@pytest.mark.parametrize("case", CASES)
def test_the_fused_loss_is_in_use(trained, case):
    assert trained[case]["fused"] == (case not in UNFUSED)
