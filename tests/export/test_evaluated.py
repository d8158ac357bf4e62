"""The suites against an exported program, beside the same weights in lm-eval's own `hf` model and in our sampler."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
from export_cases import CONTEXT, tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mobilellm_hf import MobileLLMForCausalLM
from mobilellm_hf.evaluation.sampling import SamplingSettings, sample_completions
from mobilellm_hf.export.evaluated import OnDeviceLM, OnDeviceSampler, context_on_device, load_on_device
from mobilellm_hf.export.on_device import OnDeviceModel
from mobilellm_hf.export.program import is_exported

ROOT = Path(__file__).parents[2]
CONTEXTS = ["How many keys are there? There are", "How many keys are there? I see", "", "keys " * 120]
CONTINUATIONS = [" three", " two of them", " no"]


@pytest.fixture(scope="module")
def model(model_folder):
    return MobileLLMForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def hf(model):
    return HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=1)


@pytest.fixture(scope="module")
def on_device(exact):
    return OnDeviceModel(exact, tokenizer())


def requests(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, pair, index, ("", index, 1)) for index, pair in enumerate(arguments)]


def test_log_likelihoods_are_those_of_lm_evals_own_model(on_device, hf):
    asked = requests("loglikelihood", itertools.product(CONTEXTS, CONTINUATIONS))
    expected, found = hf.loglikelihood(asked, disable_tqdm=True), OnDeviceLM(on_device).loglikelihood(asked)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(logprob, 3) for logprob, _ in found}) == len(asked)


def test_completions_are_those_of_lm_evals_own_model(on_device, hf):
    lm, longest = OnDeviceLM(on_device), {"until": [], "max_gen_toks": 24}
    whole = hf.generate_until(requests("generate_until", [(context, longest) for context in CONTEXTS[:2]]))
    stop = whole[0][len(whole[0]) // 2 :][:3]  # which is then met on the way
    options = [longest, {"until": [stop], "max_gen_toks": 24}, {"until": stop, "max_gen_toks": 5, "do_sample": False}]
    asked = requests("generate_until", itertools.product([*CONTEXTS[:2], CONTEXTS[3]], options))
    found = lm.generate_until(asked)
    assert found == hf.generate_until(asked, disable_tqdm=True)
    assert stop in found[0] and stop not in found[1] and len(found[1]) < len(found[0])
    with pytest.raises(ValueError, match="asks for samples"):
        lm.generate_until(requests("generate_until", [("a", {"do_sample": True, "temperature": 1.0})]))


def test_samples_are_those_of_the_model(on_device, model):
    prompts = {3: tokenizer()(CONTEXTS[0])["input_ids"], 5: tokenizer()(CONTEXTS[1])["input_ids"]}
    asked = [(document, sample) for document in prompts for sample in range(4)]
    ends = tuple(range(0, 352, 12))
    settings = SamplingSettings(max_new_tokens=12, eos_token_ids=ends, temperature=0.9, top_p=0.9, seed=1)
    found = list(OnDeviceSampler(on_device).sample(prompts, asked, settings))
    expected = sample_completions(model, prompts, asked, settings)
    key = lambda completion: (completion.document, completion.sample)  # noqa: E731
    assert found == sorted(expected, key=key)
    assert len({completion.finished for completion in found}) == 2
    with pytest.raises(ValueError, match="document 3 has 128 tokens"):
        next(OnDeviceSampler(on_device).sample({3: [1] * CONTEXT}, [(3, 0)], settings))


def test_what_the_program_has_decided_is_refused(exact, small, tmp_path):
    assert is_exported(exact) and context_on_device(str(exact)) == CONTEXT
    loaded = load_on_device(str(small), tokenizer=tokenizer())
    assert loaded.settings["exported"]["quantization"]["linear"] == "8da4w" and loaded.parameters == 108_864
    assert loaded.identity != load_on_device(str(exact), tokenizer=tokenizer()).identity
    for field in ({"dtype": "bfloat16"}, {"attn_implementation": "sdpa"}, {"revision": "main"}):
        with pytest.raises(ValueError, match=f"{next(iter(field))}=.* exported program"):
            load_on_device(str(exact), tokenizer=tokenizer(), **field)
    shutil.copytree(exact, tmp_path / "no-report")
    (tmp_path / "no-report/export.json").write_text("{}")
    with pytest.raises(ValueError, match="no export.json"):
        load_on_device(str(tmp_path / "no-report"), tokenizer=tokenizer())
    (tmp_path / "no-report/model.safetensors").touch()
    assert not is_exported(tmp_path / "no-report") and not is_exported(tmp_path)


def test_the_recipe_runs_both_kinds_of_tasks_on_a_program(exact, tmp_path, monkeypatch, capsys):
    rows = [{"question": "How many keys?", "answer": "2+2=<<2+2=4>>4\n#### 4"} for _ in range(2)]
    data = tmp_path / "data"
    data.mkdir()
    sciq = [{"goal": "To dry a shirt,", "sol1": "hang it up.", "sol2": "drown it.", "label": 0}]
    for name, lines in (("gsm8k_test", rows), ("piqa_validation", sciq)):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    output = tmp_path / "out"
    options = f"--model {exact} --tasks piqa gsm8k --data_dir {data} --output_dir {output} --samples 2"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options.split(), "--max_new_tokens", "4"])
    import runpy

    runpy.run_path(str(ROOT / "recipes/evaluate.py"), run_name="__main__")
    found = json.loads((output / "results.json").read_text())
    assert set(found["tasks"]) == {"piqa", "gsm8k"} and not any("error" in task for task in found["tasks"].values())
    assert found["model"]["exported"]["kv_cache"] == "float32" and found["model"]["context"] == CONTEXT
