"""Greedy generation token by token as the reference generates, and through the pipeline."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

GREEDY = dict(do_sample=False, max_new_tokens=16, min_new_tokens=16)
NETWORKS = {
    "9/3": dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3),
    "4/4": dict(num_attention_heads=4, num_key_value_heads=4),
    "llama3": dict(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "no QK norm": dict(use_qk_norm=False),
}


# Not flex_attention with a static cache: in transformers 5.23 no model generates so (a BlockMask is not `contiguous`).
@pytest.mark.parametrize(
    "attention, cache",
    [("eager", None), ("eager", "static"), ("sdpa", None), ("sdpa", "static"), ("flex_attention", None)],
)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_greedy_generation_gives_the_reference_tokens(make_pair, tokens, network, attention, cache):
    model, reference = make_pair(attention, **network)
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    ids[1, :5], mask[1, :5] = model.config.pad_token_id, 0
    with torch.compiler.set_stance("force_eager"):  # flex_attention compiles for half a minute on a CPU
        ours = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)
        theirs = reference.generate(ids, attention_mask=mask, **GREEDY)
    assert ours.shape == (3, 28)
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[:, 12:].flatten().tolist())) > 8  # it does not just repeat one token


@pytest.mark.parametrize(
    "options", [dict(num_beams=3), dict(prompt_lookup_num_tokens=3), dict(use_cache=False)], ids=str
)
def test_other_ways_to_generate_give_the_reference_tokens(make_pair, tokens, options):
    model, reference = make_pair()
    ours, theirs = (half.generate(tokens(1, 12), **GREEDY, **options) for half in (model, reference))
    assert ours.tolist() == theirs.tolist()


def test_text_generation_pipeline(make_model):
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(253))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.padding_side = "left"
    model = make_model()
    generator = pipeline("text-generation", model=model, tokenizer=wrapped, device="cpu")
    prompts = ["w5 w7 w9 w200", "w17 w3"]
    outputs = generator(prompts, do_sample=False, max_new_tokens=6, batch_size=2, return_full_text=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([[words[word] for word in prompt.split()]])
        alone = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        assert output[0]["generated_text"].split() == wrapped.decode(alone, skip_special_tokens=True).split() != []
