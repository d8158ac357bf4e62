"""Tiny models, and the reference implementations of transformers with the same weights."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

import mobilellm_hf
from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM, save_as_llama4_text

TINY = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Models this small run fastest on one thread, and several test processes share the cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def randomize(model, seed=0):
    """Weights of a trained model's scale: at initialisation all norms are 1 and attention is almost uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_config():
    return lambda **fields: MobileLLMConfig(**{**TINY, **fields})


@pytest.fixture(scope="session")
def make_model(tiny_config):
    """make_model(**config fields) -> MobileLLMForCausalLM in evaluation mode."""
    return lambda seed=0, attention="sdpa", **fields: randomize(
        MobileLLMForCausalLM._from_config(tiny_config(**fields), attn_implementation=attention), seed
    )


@pytest.fixture
def make_pair(make_model, tmp_path):
    """make_pair(**config fields) -> (MobileLLMForCausalLM, Llama4ForCausalLM) with equal weights."""

    def make(attention="sdpa", seed=0, **fields):
        model = make_model(seed=seed, attention=attention, **fields)
        save_as_llama4_text(model, tmp_path / "llama4_text")
        reference = Llama4ForCausalLM.from_pretrained(tmp_path / "llama4_text", attn_implementation=attention)
        return model, reference.eval()

    return make


@pytest.fixture
def make_llama4():
    """make_llama4(**config fields) -> a dense Llama4ForCausalLM, the format of the published checkpoints."""

    def make(**fields):
        tiny = {key: value for key, value in TINY.items() if key != "intermediate_size"}
        dense = dict(
            intermediate_size=160,
            intermediate_size_mlp=TINY["intermediate_size"],
            head_dim=16,
            moe_layers=[],
            no_rope_layers=[1] * fields.get("num_hidden_layers", TINY["num_hidden_layers"]),
            attn_temperature_tuning=False,
            attention_chunk_size=32768,
            tie_word_embeddings=True,
        )
        return randomize(Llama4ForCausalLM(Llama4TextConfig(**{**tiny, **dense, **fields})))

    return make


@pytest.fixture
def make_llama():
    """make_llama(**config fields) -> LlamaForCausalLM, the network of the classic MobileLLM family."""
    return lambda **fields: randomize(LlamaForCausalLM(LlamaConfig(**{**TINY, **fields})))


@pytest.fixture(scope="session")
def tokens():
    """tokens(rows, columns) -> ids without the special ones; the same at every call."""
    return lambda rows=2, columns=24: torch.randint(
        3, TINY["vocab_size"], (rows, columns), generator=torch.Generator().manual_seed(7)
    )


@pytest.fixture
def transformers_warnings():
    """The warnings that transformers logs during the test; its logger need not propagate to pytest's."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def run_python(tmp_path_factory):
    """run_python(*command line) -> stdout of a new interpreter; it can import the package unless the code forbids."""

    def run(*command, **environment):
        root = str(Path(mobilellm_hf.__file__).parents[1])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules_cache")),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return run
