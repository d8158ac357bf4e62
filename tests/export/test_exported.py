"""The .pte in the runtimes that load it (ours, Optimum's, the C++ llama runner) against the model in eager."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import (
    CONTEXT,
    eager_logits,
    export,
    random_tokens,
    report,
    tiny_model,
    tokenizer,
)
from optimum.executorch import ExecuTorchModelForCausalLM

from mobilellm_hf import MobileLLMForCausalLM
from mobilellm_hf.export import OnDeviceModel, Quantization
from mobilellm_hf.export.exporter import verify
from mobilellm_hf.export.graph import OnDeviceGraph
from mobilellm_hf.export.program import StoredWeight, read_operators, read_weights
from mobilellm_hf.quickstart.device import _continue_on_device

# An empty system message leaves the template's own out, which the context has no room for.
MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "How many keys?"}]


def step_by_step(model: OnDeviceModel, tokens: list[int], prefilled: int) -> torch.Tensor:
    """Logits after the prefill and after every token that follows."""
    rows = [model.logits(tokens[:prefilled])]
    rows += [model.logits(tokens[at : at + 1], at) for at in range(prefilled, len(tokens))]
    return torch.stack(rows)


def test_the_exact_program_gives_the_models_logits(exact, model_folder):
    model = MobileLLMForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokens = random_tokens(24 + 64)  # a prefill of two pieces, 64 decoding steps
    expected = eager_logits(model, tokens)[23:]
    found = step_by_step(OnDeviceModel(exact), tokens, 24)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-4


def test_the_small_program_gives_the_logits_of_the_same_quantization(small, model_folder):
    model = MobileLLMForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokens = random_tokens(24 + 64)
    exact = eager_logits(model, tokens)[23:]
    Quantization.for_config("8da4w", model.config, group_size=64, fall_back=True).apply(model)
    expected = eager_logits(model, tokens)[23:]
    found = step_by_step(OnDeviceModel(small), tokens, 24)
    error, cost = (found - expected).square().mean(), (expected - exact).square().mean()
    assert error < 0.02 * cost


def test_the_file_has_the_weights_that_were_asked_for(small, exact):
    found = read_weights(small / "model.pte")
    assert found.count(StoredWeight("qcint8", 96, (64, 96))) == 2  # down_proj, which the group does not divide
    assert {weight.group_size for weight in found if weight.datatype == "qbint4"} == {64}
    # Query and key are one.
    shapes = [weight.shape for weight in found if weight.datatype == "qbint4"]
    each = [(192, 64), (64, 64), (64, 128), (96, 64), (96, 64)]
    assert sorted(shapes) == sorted([*each, *each, (352, 64)]) and len(found) == 2 * 6 + 1
    assert "quantized_decomposed::embedding_4bit.out" in read_operators(small / "model.pte")
    assert read_weights(exact / "model.pte") == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantize": "bf16"}, 2e-4),
        ({"quantize": "8da8w", "embedding": "8w"}, 1e-10),
        ({"quantize": "8da4w", "embedding": "4w", "embedding_group_size": 16}, 1e-10),
    ],
    ids=["bf16", "8 bits", "groups of the embedding"],
)
def test_other_quantizations_run_as_they_do_in_eager(tmp_path, options, error):
    """`error`: squared, as a part of the logits' variance; bf16 is rounded in other places in eager."""
    model = tiny_model(num_hidden_layers=1)
    # Weights of 1 leave the 8-bit embedding on the halves of the next rounding to 8 bits, which may go either way.
    model.model.layers[0].input_layernorm.weight.data.uniform_(0.5, 1.5)
    for part in (model, tokenizer()):
        part.save_pretrained(tmp_path / "model")
    output = export(tmp_path / "model", tmp_path / "out", prefill=16, kv_cache="float32", **options)
    program, tokens = OnDeviceModel(output), random_tokens(40)
    settings = dict(options)
    Quantization.for_config(settings.pop("quantize"), model.config, **settings).apply(model)
    expected = eager_logits(model, tokens)[23:]
    found = step_by_step(program, tokens, 24)
    assert (found - expected).square().mean() < error * expected.var()


@pytest.mark.parametrize(("embedding", "operator"), [("8w", "embedding_byte"), ("none", "aten::embedding")])
def test_a_file_with_another_embedding_is_found_out(small, embedding, operator):
    def graph_with(embedding: str) -> OnDeviceGraph:
        model = tiny_model()
        quantization = Quantization.for_config(
            "8da4w", model.config, group_size=64, embedding=embedding, fall_back=True
        )
        quantization.apply(model)
        return OnDeviceGraph(model, CONTEXT, 16)

    verify(small / "model.pte", graph_with("4w"))
    with pytest.raises(RuntimeError, match=f"its embedding runs .*embedding_4bit.*, not .*{operator}"):
        verify(small / "model.pte", graph_with(embedding))
    with pytest.raises(RuntimeError, match="embedding and head, one table, are in it as two"):
        verify(small / "model.pte", graph_with("4w"), stored_twice=1)


def test_the_report_has_every_layer_and_the_sizes_add_up(small):
    told = report(small)
    assert told["layers"]["model.layers.1.feed_forward.down_proj"] == "8da8w/96"
    assert told["layers"]["model.embed_tokens"] == "4w/64" and len(told["layers"]) == 2 * 7 + 2
    assert told["bytes"]["embedding"] == 352 * 4  # the scales: its values are the head's
    assert told["bytes"]["head"] == 352 * 64 // 2 + 352 * 2
    assert told["bytes"]["norms"] == 5 * 64 * 4
    size = (small / "model.pte").stat().st_size
    assert sum(told["bytes"].values()) < size < sum(told["bytes"].values()) + 60_000
    assert (told["context"], told["prefill"]) == (CONTEXT, 16)


def test_messages_are_answered_in_the_chat_template(exact, model_folder):
    device, model = OnDeviceModel(exact), MobileLLMForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    prompt = tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    made = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    stream, texts = device.stream(MESSAGES, 12), []
    while True:
        try:
            texts.append(next(stream))
        except StopIteration as end:
            answer = end.value
            break
    assert prompt.shape[1] > 16  # more than one piece
    assert list(answer.token_ids) == made and answer.prompt_tokens == prompt.shape[1]
    assert "".join(texts) == answer.text == str(answer) == tokenizer().decode(made, skip_special_tokens=True)


def test_what_the_cache_holds_is_not_computed_again(exact):
    device = OnDeviceModel(exact)
    prompt = random_tokens(30)
    first = device.generate(prompt, 5, stop_at_eos=False)
    # The last token was made, and is not yet in the cache
    longer = [*prompt, *first.token_ids, 7, 8]
    second = device.generate(longer, 5, stop_at_eos=False)
    assert (first.computed, second.computed) == (30, 3)
    other = device.generate([*prompt[:10], 9, 9], 5, stop_at_eos=False)
    assert other.computed == 2
    assert second.token_ids == OnDeviceModel(exact).generate(longer, 5, stop_at_eos=False).token_ids
    again = device.generate(prompt, 5, stop_at_eos=False)
    assert again.token_ids == first.token_ids


def test_streams_that_take_turns_say_what_each_says_alone(exact):
    prompts = [random_tokens(20, seed=seed) for seed in (1, 2)]
    alone = [OnDeviceModel(exact).generate(prompt, 8, stop_at_eos=False) for prompt in prompts]
    device = OnDeviceModel(exact)
    streams = [device.stream(prompt, 8, stop_at_eos=False) for prompt in prompts]
    answers = {}
    while len(answers) < len(streams):
        for number, stream in enumerate(streams):
            try:
                next(stream)
            except StopIteration as end:
                answers.setdefault(number, end.value)
    assert alone[0].token_ids != alone[1].token_ids
    assert [answers[number].token_ids for number in range(2)] == [answer.token_ids for answer in alone]


def test_what_is_forgotten_is_computed_again(exact):
    device, prompt = OnDeviceModel(exact), random_tokens(30)
    first = device.generate(prompt, 5, stop_at_eos=False)
    device.forget()
    again = device.generate(prompt, 5, stop_at_eos=False)
    assert again.computed == 30 and again.token_ids == first.token_ids
    # The quickstart's speed is of what fits the context
    assert _continue_on_device(device, random_tokens(CONTEXT - 20)) == 20


def test_the_end_of_the_context_ends_an_answer(exact):
    device = OnDeviceModel(exact)
    answer = device.generate(random_tokens(90), stop_at_eos=False)
    assert answer.ended_by == "context" and len(answer.token_ids) == CONTEXT - 90
    assert device.generate(random_tokens(CONTEXT - 1), stop_at_eos=False).ended_by == "context"
    for count in (0, CONTEXT, CONTEXT + 50):
        with pytest.raises(ValueError, match=f"the prompt has {count} tokens and must have 1 to {CONTEXT - 1}"):
            next(device.stream(random_tokens(count)))


def test_eos_ends_an_answer(exact):
    device = OnDeviceModel(exact)
    assert device.eos_token_ids == {tokenizer().eos_token_id, tokenizer().convert_tokens_to_ids("<|eot_id|>")}
    answer = device.generate(random_tokens(30), 20, stop_at_eos=False)
    device.eos_token_ids = frozenset({answer.token_ids[3]})
    ended = device.generate(random_tokens(30), 20)
    first = answer.token_ids.index(answer.token_ids[3])
    assert ended.ended_by == "eos" and ended.token_ids == answer.token_ids[: first + 1]


def test_sampling_repeats_with_its_seed_and_follows_the_probabilities(exact):
    device = OnDeviceModel(exact)
    prompt = random_tokens(20)
    settings = {"temperature": 1.0, "stop_at_eos": False}
    draws = [device.generate(prompt, 10, seed=seed, **settings).token_ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    greedy = device.generate(prompt, 10, stop_at_eos=False).token_ids
    assert device.generate(prompt, 10, top_p=1e-6, seed=3, **settings).token_ids == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(exact, options, message):
    with pytest.raises(ValueError, match=message):
        OnDeviceModel(exact).generate([1, 2], **options)


def test_a_position_that_nothing_leads_to_is_refused(exact):
    device = OnDeviceModel(exact)
    with pytest.raises(ValueError, match="positions 3 to 4 must begin within the 0"):
        device.logits([1], 3)
    with pytest.raises(ValueError, match="no tokens"):
        device.logits([])


def test_optimums_class_generates_the_same(small):
    device = OnDeviceModel(small)
    prompt = random_tokens(8)
    made = ExecuTorchModelForCausalLM.from_pretrained(small).generate(prompt, max_seq_len=16)
    assert made == list(device.generate(prompt, 8).token_ids)[: len(made)] and made


def test_the_llama_runner_generates_the_same(small):
    """In a process of its own, since the runner ends the process where it is not content."""
    code = """
import sys
from executorch.extension.llm.custom_ops import custom_ops
from executorch.kernels import quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
runner = TextLLMRunner(sys.argv[1] + "/model.pte", sys.argv[1] + "/tokenizer.json")
said = []
config = GenerationConfig(echo=False, max_new_tokens=12, temperature=0.0, num_bos=1)
runner.generate(sys.argv[2], config, said.append)
print("SAID" + repr("".join(said)))
"""
    device = OnDeviceModel(small)
    # Three pieces. The binding takes no piece of text that is no UTF-8, which untrained weights write at times.
    prompt = "How many keys are there, and how many cups does a person have who has none?"
    command = [sys.executable, "-c", code, str(small), prompt]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answer = device.generate(prompt, 12)
    assert output.rpartition("SAID")[2].strip() == repr(answer.text)
    assert answer.prompt_tokens > 2 * 16


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: data[:4] + b"ET99" + data[8:],
            "does not load .*written with executorch .*: export it again",
        ),
        (lambda data: data.replace(b"llama::custom_sdpa", b"llama::custom_sdpX"), "does not load .*written with"),
        (lambda data: b"PK\x03\x04" + bytes(200), "is not an ExecuTorch program"),
        (lambda data: data[: len(data) // 2], "does not load"),
    ],
    ids=["another version", "an operator that is not here", "another format", "cut"],
)
def test_a_file_that_does_not_load_says_so(exact, tmp_path, damage, message):
    for file in exact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.pte").write_bytes(damage((exact / "model.pte").read_bytes()))
    with pytest.raises(ValueError, match=message):
        OnDeviceModel(tmp_path)


def test_a_folder_without_a_tokenizer_takes_one(exact, tmp_path):
    (tmp_path / "model.pte").write_bytes((exact / "model.pte").read_bytes())
    for name in ((), ("config.json",)):  # config.json is what Optimum's command leaves
        for file in name:
            (tmp_path / file).write_bytes((exact / file).read_bytes())
        with pytest.raises(ValueError, match=r"has no tokenizer that loads: give one \(tokenizer=\)"):
            OnDeviceModel(tmp_path)
    expected = OnDeviceModel(exact).encode("How?")
    assert OnDeviceModel(tmp_path, tokenizer()).encode("How?") == expected
    assert OnDeviceModel(tmp_path, exact).encode("How?") == expected


def test_only_tokens_of_the_vocabulary_reach_the_runtime(exact):
    device = OnDeviceModel(exact)
    assert device.generate([device.vocabulary - 1], max_new_tokens=1).token_ids
    for token in (-1, device.vocabulary, 10**9):
        with pytest.raises(ValueError, match=f"token {token:,} is outside the vocabulary of {device.vocabulary:,}"):
            device.generate([5, token], max_new_tokens=1)


def test_what_is_no_prompt_is_refused(exact):
    device = OnDeviceModel(exact)
    for prompt in (device.tokenizer("How?"), device.tokenizer("How?", return_tensors="pt")["input_ids"], [1.5]):
        with pytest.raises(ValueError, match="a prompt is a text, a list of token ids, or a list of messages"):
            device.encode(prompt)
    assert device.encode(torch.tensor([5, 6])) == [5, 6]


def test_a_folder_without_a_program_says_so(model_folder):
    with pytest.raises(ValueError, match=r"model\.pte does not exist"):
        OnDeviceModel(model_folder)


def test_the_readme_streams_an_answer(small):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "OnDeviceModel" in block)
    code = code.replace("runs/device", str(small)).replace("Eli draws b b c b b c b. Which most?", "How?")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.strip() and not process.stderr, process.stderr
