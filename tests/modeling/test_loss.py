"""The chunked loss and its gradients against the unfused loss of transformers, in fp64 where that is the measure."""

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from mobilellm_hf.modeling import loss_mobilellm
from mobilellm_hf.modeling.loss_mobilellm import linear_causal_lm_loss

VOCABULARY = 50
BATCH, TOKENS, WIDTH = 3, 7, 16


@pytest.fixture(params=[1, 4, 21, 1000], ids="{} tokens a chunk".format)
def chunk(request, monkeypatch):
    """21 tokens in chunks of 1, of 4 (the last one ragged), of 21 and in a larger one."""
    monkeypatch.setattr(loss_mobilellm, "LOSS_CHUNK_ELEMENTS", request.param * VOCABULARY)


@pytest.fixture
def head():
    """head(dtype) -> hidden states, weight (leaves) and labels with ignored ones among them."""
    hidden, weight = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(VOCABULARY, (BATCH, TOKENS))
    labels[0, 2] = labels[1, 4:] = labels[2, 0] = -100

    def make(dtype=torch.float, scale=1.0):
        leaves = ((scale * hidden).to(dtype), weight.to(dtype))
        return *(leaf.clone().requires_grad_() for leaf in leaves), labels.clone()

    return make


def unfused(hidden, weight, labels, **options):
    """transformers' loss from all the logits at once."""
    return ForCausalLMLoss(F.linear(hidden, weight), labels, vocab_size=VOCABULARY, **options)


def exact(hidden, weight, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None):
    """The same, written out in fp64."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    targets = F.pad(labels, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else shift_labels
    kept = targets != ignore_index
    log_probabilities = F.linear(hidden, weight)[kept].log_softmax(-1)
    total = -log_probabilities.gather(-1, targets[kept][:, None]).sum()
    loss = total / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def gradients(loss_function, hidden, weight, labels, **options):
    loss = loss_function(hidden, weight, labels, **options)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def distance(value, true):
    return ((value.double() - true.double()).norm() / true.double().norm()).item()


OPTIONS = {
    "mean": dict(),
    "num_items int": dict(num_items_in_batch=37),
    "num_items tensor": dict(num_items_in_batch=torch.tensor(37)),
    "ignore_index": dict(ignore_index=5),
    "shift_labels": dict(shift_labels=torch.tensor([3, 9, -100, 49, 0, 7, 7] * BATCH).view(BATCH, TOKENS)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_equal_the_unfused_ones(chunk, head, options):
    hidden, weight, labels = head()
    if "ignore_index" in options:
        labels[labels == -100] = options["ignore_index"]
    ours = gradients(linear_causal_lm_loss, hidden, weight, labels, **options)
    for value, true in zip(ours, exact(hidden, weight, labels, **options), strict=True):
        assert value.dtype == torch.float and value.shape == true.shape
        assert distance(value, true) < 1e-6


def test_fp64_stays_fp64(chunk, head):
    leaves = head(torch.double)
    for value, true in zip(gradients(linear_causal_lm_loss, *leaves), exact(*leaves), strict=True):
        assert value.dtype == torch.double
        assert distance(value, true) < 1e-13


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing(chunk, head, frozen):
    hidden, weight, labels = head()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_causal_lm_loss(hidden, weight, labels)
    true_loss, true_hidden, true_weight = exact(*head())
    assert distance(loss, true_loss) < 1e-6
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    trained, true = (weight, true_weight) if frozen == "hidden" else (hidden, true_hidden)
    assert distance(trained.grad, true) < 1e-6
    assert (hidden if frozen == "hidden" else weight).grad is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_half_precision_is_as_near_to_fp64_as_the_unfused_loss(chunk, head, autocast, scale):
    dtype = torch.float if autocast else torch.bfloat16
    results = []
    for loss_function in (linear_causal_lm_loss, unfused):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients(loss_function, *head(dtype, scale)))
    # fp64 from the same rounded inputs: the rounding of the inputs is nobody's error
    for ours, theirs, true in zip(*results, exact(*head(torch.bfloat16, scale)), strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours, true) <= 1.5 * distance(theirs, true) + 1e-6
    assert results[0][0].dtype == torch.float


def test_two_backward_passes_add_up(chunk, head):
    hidden, weight, labels = head()
    for rows in (slice(0, 1), slice(1, 3)):
        linear_causal_lm_loss(hidden[rows], weight, labels[rows], num_items_in_batch=15).backward()
    _, true_hidden, true_weight = exact(hidden, weight, labels, num_items_in_batch=15)
    assert distance(hidden.grad, true_hidden) < 1e-6
    assert distance(weight.grad, true_weight) < 1e-6


def test_a_second_backward_pass_over_one_graph_is_refused_not_wrong(head):
    """The gradients are handed out in place, see LinearCrossEntropy.backward."""
    loss = linear_causal_lm_loss(*head())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("height", [200.0, 2000.0])
@pytest.mark.parametrize("label", ["the high one", "another", "mixed"])
def test_extreme_logits_stay_finite_and_right(chunk, height, label):
    """One logit stands so far above that fp32 probabilities of all others are zero."""
    hidden, weight = torch.rand(1, 9, WIDTH) + 0.5, 0.1 * torch.randn(VOCABULARY, WIDTH)
    weight[17] += 2 * height / WIDTH
    labels = {"the high one": torch.full((1, 9), 17), "another": torch.full((1, 9), 3)}.get(label)
    labels = torch.tensor([[17, 3, 17, 3, 3, 4, 17, 17, 3]]) if labels is None else labels
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    ours = gradients(linear_causal_lm_loss, *leaves, labels)
    logits = F.linear(*leaves).detach()
    assert (logits[..., 17] - logits[..., :17].amax(-1)).min() > height / 2
    for value, true in zip(ours, exact(*leaves, labels), strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(num_items_in_batch=4), dict(num_items_in_batch=0)], ids=str)
def test_a_batch_without_labels_behaves_as_the_reference(chunk, head, options):
    results = []
    for loss_function in (linear_causal_lm_loss, unfused):
        hidden, weight, labels = head()
        results.append(gradients(loss_function, hidden, weight, torch.full_like(labels, -100), **options))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert ours.shape == () or not ours.any()  # zero gradients: a NaN loss must not reach the weights


# The loss within the model.


def named_gradients(model):
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [dict(), dict(num_items_in_batch=torch.tensor(50))], ids=["mean", "num_items"])
def test_a_training_step_equals_the_reference(monkeypatch, make_pair, tokens, tied, options):
    monkeypatch.setattr(loss_mobilellm, "LOSS_CHUNK_ELEMENTS", 5 * 256)
    model, reference = (half.train() for half in make_pair(tie_word_embeddings=tied))
    labels = tokens().masked_fill(torch.rand(2, 24) < 0.3, -100)
    ours, theirs = (half(tokens(), labels=labels, **options) for half in (model, reference))
    assert ours.logits is None  # the fused loss is what is compared
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    ours, theirs = named_gradients(model), named_gradients(reference)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert distance(grad, theirs[name]) < 1e-5, name


@pytest.mark.parametrize("frozen", ["model.embed_tokens.weight lm_head.weight", "model.layers model.norm"])
def test_a_training_step_with_a_frozen_part_equals_the_reference(make_pair, tokens, frozen):
    model, reference = (half.train() for half in make_pair(tie_word_embeddings=False))
    for half in (model, reference):
        for name, parameter in half.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen.split())))
        half(tokens(), labels=tokens()).loss.backward()
    ours, theirs = named_gradients(model), named_gradients(reference)
    assert ours.keys() == theirs.keys() != set()
    for name, grad in ours.items():
        assert distance(grad, theirs[name]) < 1e-5, name


def test_logits_are_returned_in_evaluation_or_on_demand(make_pair, tokens):
    model, reference = make_pair()
    with torch.no_grad():
        expected = reference(tokens(), labels=tokens())
        for training, return_logits, present in [
            (False, None, True),
            (True, None, False),
            (False, False, False),
            (True, True, True),
        ]:
            output = model.train(training)(tokens(), labels=tokens(), return_logits=return_logits)
            assert (output.logits is not None) == present
            torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
            if present:
                torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
        assert model.train()(tokens()).logits is not None  # without labels logits are all there is to return
        loss, cache = model(tokens(), labels=tokens(), use_cache=True, return_dict=False)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)


def test_a_loss_function_of_the_users_gets_logits(make_pair, tokens):
    model, reference = make_pair()

    def last_logit(logits, labels, vocab_size, **kwargs):
        assert logits.shape == (2, 24, vocab_size)
        return logits[0, -1, 3] * kwargs["num_items_in_batch"]

    model.train().loss_function = last_logit
    loss = model(tokens(), labels=tokens(), num_items_in_batch=2).loss
    torch.testing.assert_close(loss, 2 * reference(tokens()).logits[0, -1, 3], rtol=0, atol=2e-5)


def test_second_derivatives_are_refused_and_to_be_had_through_logits(make_model, tokens):
    model = make_model().train()
    weight = model.model.norm.weight
    with pytest.raises(RuntimeError, match="no second derivative: call the model with return_logits=True"):
        torch.autograd.grad(model(tokens(), labels=tokens()).loss, weight, create_graph=True)
    loss = model(tokens(), labels=tokens(), return_logits=True).loss
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), weight)[0].norm() > 0


def test_a_hook_on_the_head_is_called_in_training_too(make_model, tokens):
    model, seen = make_model().train(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(tokens(), labels=tokens()).loss.backward()
    assert seen == [(2, 24, model.config.vocab_size)]
    with pytest.raises(ValueError, match="return_logits=False without labels"):
        model(tokens(), return_logits=False)


def test_each_tokens_nll_is_left_where_it_is_asked_for(head, chunk):
    hidden, weight, labels = head(torch.double)
    weights, token_nll = torch.rand(BATCH, TOKENS).double(), torch.full((BATCH, TOKENS), torch.nan).double()
    total = linear_causal_lm_loss(hidden, weight, labels, 1, token_weights=weights, token_nll=token_nll)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = F.cross_entropy(F.linear(hidden, weight).mT, targets, reduction="none") * weights.roll(-1, 1)
    torch.testing.assert_close(token_nll, expected.detach())
    torch.testing.assert_close(total.detach(), token_nll.sum())
