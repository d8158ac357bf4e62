"""The graph in eager, with the operators of the device, against the model that it was made of."""

import copy

import pytest
import torch
from export_cases import CONTEXT, eager_logits, random_tokens, tiny_config, tiny_model

from mobilellm_hf.export.graph import OnDeviceGraph
from mobilellm_hf.export.layers import KVCache, join, row_order
from mobilellm_hf.export.quantization import Quantization


def run(graph: OnDeviceGraph, token_ids: list[int], pieces: list[int]) -> list[torch.Tensor]:
    """The logits after each piece."""
    found, start = [], 0
    for length in pieces:
        tokens = torch.tensor([token_ids[start : start + length]])
        with torch.no_grad():
            found.append(graph(tokens, torch.arange(start, start + length))[0, 0])
        start += length
    return found


@pytest.mark.parametrize(
    "fields",
    [{}, {"layer_repeats": 2}, {"rope_interleaved": False, "use_qk_norm": False}, {"num_key_value_heads": 4}],
    ids=["plain", "repeated layers", "classic", "no groups"],
)
def test_pieces_of_a_text_give_the_logits_of_the_whole(fields):
    model = tiny_model(**fields)
    tokens = random_tokens(40)
    expected = eager_logits(model, tokens)
    pieces = [16, 7, 1, 1, 14, 1]
    graph = OnDeviceGraph(copy.deepcopy(model), CONTEXT, 16, torch.float32)
    for length, logits in zip(torch.tensor(pieces).cumsum(0), run(graph, tokens, pieces)):
        assert torch.allclose(logits, expected[length - 1], atol=1e-5), length


def test_a_bfloat16_cache_holds_rounded_keys_and_values_and_nothing_else_is_rounded_more():
    model = tiny_model()
    tokens = random_tokens(40)
    exact = OnDeviceGraph(copy.deepcopy(model), CONTEXT, 16, torch.float32)
    rounded = OnDeviceGraph(copy.deepcopy(model), CONTEXT, 16, torch.bfloat16)
    a, b = (torch.stack(run(graph, tokens, [16, 16, 8])) for graph in (exact, rounded))
    assert 0 < (a - b).abs().max() < 0.02 * a.abs().max()
    # The first layer's keys do not depend on the cache
    assert torch.equal(exact.caches[0].keys.bfloat16(), rounded.caches[0].keys)


def test_the_cache_has_the_kv_heads_first_and_is_no_part_of_the_weights():
    cache = KVCache(2, 8, 4, torch.bfloat16)
    query, key, value = torch.randn(3, 2, 3, 1, 4).bfloat16()
    cache.attend(query, key, value, 5, 1.0)
    assert cache.keys.shape == (2, 8, 1, 4) and not cache.state_dict()
    assert torch.equal(cache.keys[:, 5:], key) and torch.equal(cache.values[:, 5:], value)
    assert not cache.keys[:, :5].any()


@pytest.mark.parametrize("linear", ["none", "8da4w", "8da8w"])
def test_joined_layers_compute_what_the_layers_did(linear):
    model = tiny_model()
    Quantization.for_config(linear, model.config).apply(model)
    attention = model.model.layers[0].self_attn
    inputs, order = torch.randn(5, 64), torch.randperm(128 + 64)
    parts = (attention.q_proj, attention.k_proj)
    expected = torch.cat([part(inputs) for part in parts], dim=-1)[:, order]
    assert torch.allclose(join(parts, order)(inputs), expected, atol=1e-6)


@pytest.mark.parametrize("group", [None, 0], ids=["one table", "two tables"])
def test_the_quantized_graph_gives_the_quantized_models_logits(group):
    model = tiny_model()
    Quantization.for_config("8da4w", model.config, embedding_group_size=group).apply(model)
    tokens = random_tokens(16)
    expected = eager_logits(model, tokens)[-1]
    graph = OnDeviceGraph(copy.deepcopy(model), CONTEXT, 16, torch.float32)
    assert graph.head_swaps == (group is None)
    found = run(graph, tokens, [16])[0]
    # Where a sum is rounded otherwise, an activation may be rounded to the next of its 8 bits
    assert (found - expected).square().mean() < 1e-3 * expected.var()


def test_every_row_is_in_the_joined_matrix_once():
    order = row_order(tiny_config())
    assert torch.equal(order.sort().values, torch.arange(192))
    # The first kv head's first query, its pairs apart; its key after its two queries
    assert order[:3].tolist() == [0, 2, 4] and order[16:18].tolist() == [1, 3]
    assert order[64:66].tolist() == [128, 130] and order[96] == 64


def test_a_later_text_does_not_see_what_an_earlier_one_left():
    graph = OnDeviceGraph(tiny_model(), CONTEXT, 16, torch.float32)
    short = random_tokens(12, seed=1)
    fresh = run(graph, short, [12])[0]
    run(graph, random_tokens(40), [16, 16, 8])
    assert torch.equal(run(graph, short, [12])[0], fresh)


def test_one_graph_is_for_all_lengths_up_to_the_bound():
    graph = OnDeviceGraph(tiny_model(num_hidden_layers=1), CONTEXT, 16)
    program = graph.export()["model"]
    assert 16 in {int(bound.upper) for bound in program.range_constraints.values() if bound.upper < 1000}
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("llama.custom_sdpa.default") == 1


def test_the_bound_is_no_longer_than_the_context():
    assert OnDeviceGraph(tiny_model(), 32, 512).prefill == 32
