"""Optimum's command line and its runtime class know the model as soon as the package is installed."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from export_cases import eager_logits, random_tokens, tiny_model, tokenizer
from optimum.executorch import ExecuTorchModelForCausalLM
from optimum.exporters.executorch.task_registry import task_registry
from packaging.requirements import Requirement

import mobilellm_hf.export.optimum as ours
from mobilellm_hf import save_as_llama4_text
from mobilellm_hf.export.program import read_weights
from mobilellm_hf.export.requirements import INSTALL, WITHOUT_DEPENDENCIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What `optimum-cli` makes of a llama4_text folder, in 8da4w."""
    folder = tmp_path_factory.mktemp("optimum")
    save_as_llama4_text(tiny_model(num_hidden_layers=1), folder / "model")
    tokenizer().save_pretrained(folder / "model")
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "executorch", "--model", folder / "model"]
    options = "--task text-generation --recipe xnnpack --qlinear 8da4w --qlinear_group_size 32 --qembedding 8w"
    run = subprocess.run([*command, *options.split(), "--output_dir", folder / "out"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder / "out"


def test_its_command_writes_our_graph_with_the_group_size_that_it_was_given(exported):
    weights = read_weights(exported / "model.pte")
    assert len(weights) == 6 + 1 and {(weight.datatype, weight.group_size) for weight in weights} == {("qbint4", 32)}


def test_its_class_loads_what_its_command_wrote(exported):
    model = ExecuTorchModelForCausalLM.from_pretrained(exported)
    assert (model.use_kv_cache, model.vocab_size) == (True, 352)
    prompt = random_tokens(20)
    eager = tiny_model(num_hidden_layers=1)
    ours.Quantization.for_config("8da4w", eager.config, embedding="8w").apply(eager)
    made = model.generate(prompt, max_seq_len=24)
    assert made[0] == int(eager_logits(eager, prompt)[-1].argmax())


def test_other_models_go_its_own_way():
    task = ours.TextGeneration(lambda name, **options: (name, options))
    config = type("Config", (), {"model_type": "qwen3"})()
    assert task("Qwen/Qwen3-0.6B", config=config, dtype="float32")[0] == "Qwen/Qwen3-0.6B"
    assert isinstance(task_registry["text-generation"], ours.TextGeneration)
    before = task_registry["text-generation"]
    ours.register()
    assert task_registry["text-generation"] is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qlinear": "fpa4w"}, "--qlinear fpa4w is not for XNNPACK"),
        ({"dtype": "float16"}, "--dtype float16 cannot be exported"),
        ({"dtype": "bfloat16", "qlinear": "8da4w"}, "--dtype bfloat16 cannot be exported with --qlinear"),
        ({"disable_dynamic_shapes": True}, "--disable_dynamic_shapes"),
        ({"device": "cuda"}, "--device cuda cannot be followed"),
        ({"revision": "v2"}, "--revision v2 cannot be followed"),
        ({"qembedding_encoder": "8w"}, "--qembedding_encoder 8w cannot be followed"),
        ({"qlinear_packing_format": "tile_packed_to_4d"}, "--qlinear_packing_format tile_packed_to_4d cannot be"),
        ({"max_seq_len": 1000}, "max_seq_len=1,000 is beyond the 128 positions"),
        ({"qlinear": "8da4w", "qlinear_group_size": 64}, "group_size=64 does not divide the 96 inputs"),
    ],
)
def test_options_that_cannot_be_followed_are_named(model_folder, options, message):
    with pytest.raises(ValueError, match=message):
        ours.build_graph(str(model_folder), **options)


def test_its_options_are_followed(model_folder):
    graph = ours.build_graph(
        str(model_folder), qlinear="8da4w,8da8w", qlinear_group_size=64, qembedding="4w", max_seq_len=64
    )
    assert graph.metadata["get_max_context_len"] == 64
    weight = graph.layers[0].feed_forward.down_proj.weight
    assert weight.target_dtype == torch.int8 and weight.block_size == (1, 96)


def test_what_is_installed_without_its_dependencies_works_with_the_versions_that_are_here():
    """The two that setup.py explains: each declares what it does not need or what would hold the rest back."""
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    makefile = (ROOT / "Makefile").read_text()
    for name in ("executorch", "optimum-executorch"):
        assert version(name) == pins[name]
        (wanted,) = (found for found in map(Requirement, WITHOUT_DEPENDENCIES) if found.name == name)
        assert pins[name] in wanted.specifier and "99" not in wanted.specifier and f'"{name}>=' in INSTALL
        assert re.search(rf"--no-deps .*\b{name}\b", makefile)
    assert int(version("transformers").split(".")[0]) == 5 and "rc" not in version("transformers")
