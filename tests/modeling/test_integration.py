"""What the model works with: checkpointing, compilation, packing, PEFT, other heads, offloading, other attention."""

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mobilellm_hf import MobileLLMForCausalLM, MobileLLMForSequenceClassification
from mobilellm_hf.modeling import loss_mobilellm


def step(model, ids, **options):
    """One training step: its loss and gradients."""
    output = model(ids, labels=ids, use_cache=False, **options)
    output.loss.backward()
    gradients = {
        name.removeprefix("_orig_mod."): parameter.grad.clone()  # the prefix is torch.compile's
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return output.loss.detach(), gradients


def assert_same_step(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert ours[1].keys() == theirs[1].keys() != set()
    for name, gradient in ours[1].items():
        assert (gradient - theirs[1][name]).norm() <= tolerance * theirs[1][name].norm(), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(make_pair, tokens, use_reentrant):
    model, reference = (half.train() for half in make_pair())
    model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    ours = step(model, tokens())
    assert len(calls) == 2  # forward, and again in backward
    assert_same_step(ours, step(reference, tokens()))


# inductor once, for it takes ten seconds a graph; the tracing is what depends on this model, and it is aot_eager's too
@pytest.mark.parametrize(
    "backend, dtype, layer_repeats",
    [("inductor", torch.float, 1), ("aot_eager", torch.bfloat16, 1), ("aot_eager", torch.float, 2)],
)
def test_the_whole_graph_compiles(make_model, tokens, monkeypatch, backend, dtype, layer_repeats):
    monkeypatch.setattr(loss_mobilellm, "LOSS_CHUNK_ELEMENTS", 20 * 256)  # three chunks, the last ragged
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=layer_repeats, layer_repeats=layer_repeats).to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    tolerance = 1e-5 if dtype == torch.float else 2e-2
    with torch.no_grad():
        expected = model(tokens()).logits
        torch.testing.assert_close(compiled(tokens()).logits, expected, rtol=0, atol=tolerance)
    expected = step(model.train(), tokens())
    compiled.train()
    assert compiled(tokens(), labels=tokens()).logits is None
    assert_same_step(step(compiled, tokens()), expected, tolerance)


def test_packed_rows_equal_separate_ones(make_pair, tokens):
    model, reference = make_pair()
    ids, lengths = tokens(1, 24), (7, 12, 5)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([reference(row).logits for row in ids.split(lengths, dim=1)], dim=1)
        unpacked = model(ids, use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert (packed - unpacked)[:, 7:].abs().amax(-1).min() > 0.01


@pytest.mark.parametrize(
    "targets, tied", [(["q_proj", "v_proj", "up_proj", "down_proj"], True), (["q_proj", "lm_head"], False)]
)
def test_lora_trains_and_merges(make_model, tokens, tmp_path, targets, tied):
    model = make_model(tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    config = LoraConfig(r=4, target_modules=targets, task_type=TaskType.CAUSAL_LM)
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = adapted(tokens(), labels=tokens()).loss
        loss.backward()
        with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
        assert all("lora_" in name for name in with_gradient) and len(with_gradient) >= 2 * len(targets)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():  # before any step the adapters do nothing, and the loss is the base model's
        torch.testing.assert_close(losses[0], base(tokens(), labels=tokens()).loss.item(), rtol=1e-6, atol=0)
    assert losses[-1] < losses[0] - 0.3
    adapted.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(tokens()).logits
        merged = adapted.merge_and_unload()
        assert type(merged) is MobileLLMForCausalLM
        reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
        for other in (merged, reloaded):
            torch.testing.assert_close(other(tokens()).logits, expected, rtol=0, atol=2e-5)


def test_lora_on_the_head_trains_the_head(make_model, tokens):
    """The fused loss reads the head's matrix; an adapter beside it must be seen nevertheless."""
    config = LoraConfig(r=4, target_modules=["lm_head"], task_type=TaskType.CAUSAL_LM)
    adapted = get_peft_model(make_model(tie_word_embeddings=False), config).train()
    torch.nn.init.normal_(adapted.base_model.model.lm_head.lora_B["default"].weight)
    loss, gradients = step(adapted, tokens())
    assert gradients.keys() == {f"base_model.model.lm_head.lora_{side}.default.weight" for side in "AB"}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        logits = adapted.eval()(tokens()).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, tokens()[:, 1:].flatten()))


def test_an_offloaded_head_is_brought_in_for_the_loss(make_pair, tokens):
    model, reference = (half.train() for half in make_pair())
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    assert offloaded.lm_head.weight.device.type == "meta"
    with torch.no_grad():
        losses = [half(tokens(), labels=tokens()).loss for half in (offloaded, reference)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [300, 200])
def test_resizing_the_vocabulary_keeps_the_tie(make_model, tokens, tmp_path, size):
    model = make_model()
    before = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, 256)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (size, 64) and model.config.vocab_size == size
    assert torch.equal(model.lm_head.weight[:kept], before[:kept])
    ids = tokens().clamp(max=size - 1)
    model.train()(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.shape == (size, 64)
    model.save_pretrained(tmp_path)
    again = MobileLLMForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification(make_llama, tokens, tmp_path, side):
    """Against LlamaForSequenceClassification: a llama folder with a `score` gives the same classifier."""
    reference = LlamaForSequenceClassification(copy.deepcopy(make_llama(num_labels=3).config)).eval()
    torch.nn.init.normal_(reference.score.weight)
    reference.save_pretrained(tmp_path / "llama")
    classifier = MobileLLMForSequenceClassification.from_pretrained(tmp_path / "llama")
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    part = slice(0, 6) if side == "left" else slice(14, 20)
    ids[1, part], mask[1, part] = 0, 0
    with torch.no_grad():
        ours, theirs = (half(ids, attention_mask=mask).logits for half in (classifier.eval(), reference))
    assert ours.shape == (2, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    classifier.save_pretrained(tmp_path / "native")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "native").eval()
    assert type(again) is MobileLLMForSequenceClassification
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits, ours)


def test_a_classifier_trains(tiny_config, tokens):
    classifier = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3)).train()
    labels = torch.tensor([0, 2, 1, 1])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = classifier(tokens(4, 10), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_attention_gets_what_the_caller_hands_down(make_model, tokens, monkeypatch):
    """vLLM's Transformers backend passes its `attention_instances` so, and finds a layer by its `layer_idx`."""
    seen = []

    def spy(module, query, key, value, attention_mask, scaling, dropout=0.0, attention_instances=None, **kwargs):
        seen.append((module.layer_idx, attention_instances, query.shape, key.shape, scaling))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "spy", spy)
    model = make_model(num_hidden_layers=3)
    instances = {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        expected = model(tokens()).logits
        model.set_attn_implementation("spy")
        torch.testing.assert_close(model(tokens(), attention_instances=instances).logits, expected)
        model.train()(tokens(), labels=tokens(), attention_instances=instances)
        hidden = model.eval().model(  # as vLLM calls it
            input_ids=None,
            inputs_embeds=model.get_input_embeddings()(tokens(1, 24)),
            use_cache=False,
            position_ids=torch.arange(24)[None],
            attention_instances=instances,
            return_dict=False,
        )[0]
    assert [entry[:2] for entry in seen] == [(layer, instances) for layer in range(3)] * 3
    assert seen[0][2:] == ((2, 4, 24, 16), (2, 2, 24, 16), 0.25)
    torch.testing.assert_close(model.lm_head(hidden), expected[:1])


def test_importing_the_package_imports_no_trainer_and_no_data(run_python):
    heavy = "trl datasets executorch matplotlib peft vllm lm_eval pandas"  # transformers itself imports torchao
    code = f"import sys, mobilellm_hf; print([name for name in {heavy.split()!r} if name in sys.modules])"
    assert run_python("-c", code).strip() == "[]"


def test_packed_documents_are_isolated_in_a_training_step_without_asking(make_model, tokens):
    model = make_model().train()
    positions = torch.arange(12).repeat(2)[None].expand(2, -1)
    labels = tokens().clone()
    labels[:, :13] = -100
    other = tokens().clone()
    other[:, :12] = tokens()[:, :12].flip(1)
    losses = [model(ids, labels=labels, position_ids=positions).loss for ids in (tokens(), other)]
    assert torch.equal(*losses)
