"""A saved folder loads with trust_remote_code=True where this package is not installed."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from mobilellm_hf import MobileLLMForCausalLM, MobileLLMForSequenceClassification, MobileLLMModel

LOAD = """
import sys
sys.modules["mobilellm_hf"] = None  # importing it raises ImportError
import torch, transformers
folder, ids, out, auto = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(model.config) is type(config)
with torch.no_grad():
    torch.save(model(torch.load(ids))[0], out)
if auto == "AutoModelForCausalLM":
    # what was loaded as remote code can be trained and saved as such again
    ids = torch.load(ids)
    model.train()(ids, labels=ids).loss.backward()
    model.save_pretrained(out + "-again")
"""


@pytest.mark.parametrize(
    "model_class, auto_class",
    [
        (MobileLLMForCausalLM, "AutoModelForCausalLM"),
        (MobileLLMForCausalLM, "AutoModel"),  # what vLLM asks for
        (MobileLLMForSequenceClassification, "AutoModelForSequenceClassification"),
    ],
)
def test_a_saved_folder_brings_its_code(tiny_config, tmp_path, tokens, run_python, model_class, auto_class):
    model = model_class(tiny_config(num_labels=3)).eval()
    folder, ids, out = (tmp_path / name for name in ("folder", "ids", "out"))
    model.save_pretrained(folder)
    files = ["configuration_mobilellm.py", "loss_mobilellm.py", "modeling_mobilellm.py"]
    assert sorted(path.name for path in folder.glob("**/*.py")) == files
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_mobilellm.MobileLLMModel"
    torch.save(tokens(), ids)
    run_python("-c", LOAD, folder, ids, out, auto_class)
    with torch.no_grad():
        expected = (model.model if auto_class == "AutoModel" else model)(tokens())[0]
    assert torch.equal(torch.load(out), expected)
    if auto_class == "AutoModelForCausalLM":
        again = tmp_path / "out-again"
        assert sorted(path.name for path in again.glob("**/*.py")) == files
        assert json.loads((again / "config.json").read_text())["auto_map"] == auto_map
        with torch.no_grad():
            assert torch.equal(MobileLLMForCausalLM.from_pretrained(again).eval()(tokens()).logits, expected)


def test_every_class_writes_the_whole_auto_map(make_model, tiny_config, tmp_path):
    for number, model in enumerate((make_model(), MobileLLMModel(tiny_config()))):
        model.save_pretrained(tmp_path / str(number))
        auto_map = json.loads((tmp_path / str(number) / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
            "AutoModel": "modeling_mobilellm.MobileLLMModel",
            "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
            "AutoModelForSequenceClassification": "modeling_mobilellm.MobileLLMForSequenceClassification",
        }


def test_a_model_that_fsdp2_has_sharded_saves_its_code(make_model, tmp_path):
    """FSDP2 gives the model a class of its own, which transformers would look up in torch's files."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make_model()
        fully_shard(model)
        assert type(model).__name__.startswith("FSDP")
        whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=whole)
    finally:
        dist.destroy_process_group()
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "configuration_mobilellm.py", "loss_mobilellm.py", "modeling_mobilellm.py",
    }  # fmt: skip
