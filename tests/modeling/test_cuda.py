"""On a GPU: bf16 through every attention kernel, compilation, the fused loss."""

import pytest
import torch
from transformers import Llama4ForCausalLM
from transformers.utils import is_flash_attn_2_available

from mobilellm_hf import MobileLLMForCausalLM, save_as_llama4_text
from mobilellm_hf.modeling import loss_mobilellm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs the flash-attn package"),
)
SHAPE = dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1, head_dim=64)


@pytest.fixture
def load(make_model, tmp_path):
    """load(class, dtype, attention) -> that class with the same bf16 weights, on the GPU."""
    save_as_llama4_text(make_model(**SHAPE).bfloat16(), tmp_path)

    def load(model_class, dtype, attention):
        model = model_class.from_pretrained(tmp_path, dtype=dtype, attn_implementation=attention)
        return model.to("cuda").eval()

    return load


def step(model, ids, **options):
    output = model(ids, labels=ids, use_cache=False, **options)
    output.loss.backward()
    gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return output.loss.item(), gradients


def error(ours, exact):
    return sum((ours[name] - exact[name]).norm() / exact[name].norm() for name in exact) / len(exact)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", FLASH])
def test_bf16_is_as_near_to_fp32_as_the_eager_reference_is(load, tokens, attention):
    ids = tokens(4, 128).to("cuda")
    exact, theirs, ours = (
        load(model_class, dtype, kernel)
        for model_class, dtype, kernel in (
            (Llama4ForCausalLM, torch.float, "eager"),
            (Llama4ForCausalLM, torch.bfloat16, "eager"),
            (MobileLLMForCausalLM, torch.bfloat16, attention),
        )
    )
    with torch.no_grad():
        logits = [model(ids).logits.float() for model in (exact, theirs, ours)]
    assert (logits[2] - logits[0]).abs().mean() <= 1.5 * (logits[1] - logits[0]).abs().mean()
    (true_loss, true), (their_loss, their), (our_loss, our) = (
        step(model.train(), ids) for model in (exact, theirs, ours)
    )
    assert abs(our_loss - true_loss) <= 1.5 * abs(their_loss - true_loss) + 1e-3
    assert error(our, true) <= 1.5 * error(their, true)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_whole_graph_compiles(load, tokens, monkeypatch, dtype, tolerance):
    monkeypatch.setattr(loss_mobilellm, "LOSS_CHUNK_ELEMENTS", 200 * 256)  # three chunks, the last ragged
    torch._dynamo.reset()
    ids = tokens(4, 128).to("cuda")
    model = load(MobileLLMForCausalLM, dtype, "sdpa")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=5 * tolerance)
    expected_loss, expected = step(model.train(), ids)
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert step(model, ids)[0] == pytest.approx(expected_loss, rel=tolerance)
    assert error(gradients, expected) <= tolerance


def test_generation_with_a_static_cache(load, tokens):
    """transformers compiles the decoding step here."""
    greedy = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12)
    ids = tokens(2, 12).to("cuda")
    ours = load(MobileLLMForCausalLM, torch.float, "sdpa").generate(ids, cache_implementation="static", **greedy)
    theirs = load(Llama4ForCausalLM, torch.float, "eager").generate(ids, **greedy)
    assert ours.tolist() == theirs.tolist()


def test_the_fused_loss_needs_no_room_for_logits():
    model = MobileLLMForCausalLM._from_config(
        MobileLLMForCausalLM.config_class(
            hidden_size=64, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1
        )
    )
    model = model.bfloat16().to("cuda").train()
    ids = torch.randint(128_000, (4, 2048), device="cuda")
    peaks = []
    for return_logits in (True, False):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        model(ids, labels=ids, use_cache=False, return_logits=return_logits).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0] / 4
