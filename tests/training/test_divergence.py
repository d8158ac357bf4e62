"""The distillation loss and its gradients against the same written out from all the logits in fp64."""

import pytest
import torch
import torch.nn.functional as F
from distillation_cases import distance
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobilellm_hf.modeling import loss_mobilellm
from mobilellm_hf.modeling.loss_mobilellm import linear_causal_lm_loss
from mobilellm_hf.training.divergence import (
    DistillationLoss,
    LinearDistillation,
    LogitsDistillation,
    TeacherLogits,
    TopKBuckets,
)

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 21, 16, 24, 50
ALPHAS, TEMPERATURES = (1.0, 0.3, 0.0), (1.0, 2.0)


@pytest.fixture(autouse=True)
def seed_and_chunks(monkeypatch):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(loss_mobilellm, "LOSS_CHUNK_ELEMENTS", 4 * VOCABULARY)  # several, the last one ragged


class Case:
    """Hidden states, heads, labels (some ignored) and token weights of a student and a teacher, drawn in fp64."""

    def __init__(self, dtype=torch.double, students=VOCABULARY, teachers=VOCABULARY, scale=1.0, rounded=None):
        rounded = rounded or dtype
        self.hidden, self.weight = (
            (scale * torch.randn(rows, WIDTH)).to(rounded).to(dtype).requires_grad_() for rows in (TOKENS, students)
        )
        self.teacher_hidden, self.teacher_weight = (
            torch.randn(rows, TEACHER_WIDTH).to(rounded).to(dtype) for rows in (TOKENS, teachers)
        )
        self.teacher_bias = torch.randn(teachers).to(rounded).to(dtype)
        self.labels = torch.randint(min(students, teachers), (TOKENS,))
        self.labels[3] = self.labels[10:14] = -100
        self.token_weights = torch.rand(TOKENS, dtype=torch.double)

    def teacher(self):
        return TeacherLogits(self.teacher_hidden, self.teacher_weight, self.teacher_bias)

    def linear(self, loss, targets, token_nll=None, weighted=True):
        weights = self.token_weights if weighted else None
        total = LinearDistillation.apply(
            self.hidden, self.weight, self.labels, weights, -100, token_nll, loss, targets
        )
        return total.detach(), *torch.autograd.grad(total, (self.hidden, self.weight))

    def from_logits(self, loss, targets, token_nll=None):
        logits = F.linear(self.hidden, self.weight)
        total = LogitsDistillation.apply(logits, self.labels, self.token_weights, -100, token_nll, loss, targets)
        return total.detach(), *torch.autograd.grad(total, (self.hidden, self.weight))

    def exact(self, temperature, alpha, divergence=None, weighted=True):
        """fp64, from all the logits, by autograd; divergence(student logits, teacher logits, T) -> (tokens,)."""
        hidden, weight, teacher_hidden, teacher_weight, bias = (
            tensor.detach().double()
            for tensor in (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.teacher_bias)
        )
        hidden.requires_grad_()
        weight.requires_grad_()
        logits, teacher = F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight, bias)
        kl = (divergence or whole_divergence)(logits, teacher, temperature)
        nll = F.cross_entropy(logits, self.labels, reduction="none", ignore_index=-100)
        terms = alpha * temperature**2 * kl + (1 - alpha) * nll
        terms = (terms * self.token_weights if weighted else terms)[self.labels != -100]
        return terms.sum().detach(), *torch.autograd.grad(terms.sum(), (hidden, weight))


def whole_divergence(logits, teacher, temperature):
    """What `vocabulary="shared_prefix"` promises: the teacher cut and renormalised, the student whole."""
    common = min(logits.shape[1], teacher.shape[1])
    student_log = (logits / temperature).log_softmax(-1)[:, :common]
    teacher_log = (teacher[:, :common] / temperature).log_softmax(-1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


def bucketed_divergence(k):
    """k + 1 outcomes, both distributions raised to 1 / T and normalised again."""

    def divergence(logits, teacher, temperature):
        ids = teacher.topk(k, -1).indices
        outcomes = []
        for distribution in (logits.softmax(-1), teacher.softmax(-1)):
            kept = distribution.gather(-1, ids)
            outcome = torch.cat((kept, distribution.scatter(-1, ids, 0.0).sum(-1, keepdim=True)), -1)
            outcome = outcome ** (1 / temperature)
            outcomes.append(outcome / outcome.sum(-1, keepdim=True))
        student, teacher = outcomes
        return (teacher * (teacher / student).log()).sum(-1)

    return divergence


def buckets_of(case, k):
    teacher = F.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias)[case.labels != -100].double()
    top, ids = teacher.topk(k, -1)
    tail = teacher.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return TopKBuckets(torch.cat((top, tail), -1).log_softmax(-1), ids)


def assert_near(ours, true, tolerance):
    for value, expected in zip(ours, true, strict=True):
        assert value.isfinite().all() and distance(value, expected) < tolerance


@pytest.mark.parametrize("teachers, students", [(50, 50), (50, 56), (56, 50)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_loss_and_gradients_are_those_of_all_the_logits(alpha, temperature, teachers, students):
    for dtype, tolerance in ((torch.double, 1e-12), (torch.float, 2e-6)):
        case = Case(dtype, students, teachers)
        true = case.exact(temperature, alpha)
        assert_near(case.linear(DistillationLoss(temperature, alpha), case.teacher()), true, tolerance)
        assert_near(case.from_logits(DistillationLoss(temperature, alpha), case.teacher()), true, tolerance)
        logits = F.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias)
        given = TeacherLogits(logits)
        assert_near(case.linear(DistillationLoss(temperature, alpha), given), true, tolerance)


@pytest.mark.parametrize("k", [1, 8, 49])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_cached_loss_is_its_definition_by_brute_force(alpha, temperature, k):
    for dtype, tolerance in ((torch.double, 1e-12), (torch.float, 4e-6)):
        case = Case(dtype)
        case.labels[0] = buckets_of(case, k).ids[0, 0]  # a label among the top k; most are not at k = 1
        true = case.exact(temperature, alpha, bucketed_divergence(k))
        assert_near(case.linear(DistillationLoss(temperature, alpha), buckets_of(case, k)), true, tolerance)
        assert_near(case.from_logits(DistillationLoss(temperature, alpha), buckets_of(case, k)), true, tolerance)


def test_the_cached_loss_is_a_lower_bound_that_grows_to_the_whole_with_k():
    case = Case()
    whole, *gradient = case.exact(1.0, 1.0)
    losses, cosines = [], []
    for k in (1, 2, 4, 8, 16, 32, 49):
        loss, *grads = case.linear(DistillationLoss(1.0, 1.0), buckets_of(case, k))
        losses.append(loss)
        cosines.append(F.cosine_similarity(grads[1].flatten(), gradient[1].flatten(), dim=0))
    assert losses == sorted(losses) and cosines == sorted(cosines)
    assert losses[0] < 0.9 * whole
    assert losses[-1] == pytest.approx(whole.item(), rel=1e-12) and cosines[-1] == pytest.approx(1.0)


def test_a_students_tail_below_the_rounding_of_one_keeps_its_digits():
    """Its mass is e^-60: 1 minus the rest is zero in fp32 and in fp64."""
    case = Case(torch.float)
    buckets = buckets_of(case, 4)
    logits = torch.randn(TOKENS, VOCABULARY)
    kept = (case.labels != -100).nonzero()
    logits[kept, buckets.ids] += 60.0
    results = []
    for dtype in (torch.float, torch.double):
        leaf = logits.to(dtype).requires_grad_()
        options = (case.labels, None, -100, None, DistillationLoss(1.0, 1.0), buckets)
        total = LogitsDistillation.apply(leaf, *options)
        results.append((total.detach(), *torch.autograd.grad(total, leaf)))
    assert_near(*results, 2e-6)
    tail = results[1][1][kept[:, 0]].scatter(-1, buckets.ids, 0.0).sum(-1)  # of a gradient that sums to Q - P
    torch.testing.assert_close(tail, -buckets.log_probabilities[:, -1].exp())


@pytest.mark.parametrize("height", [200.0, 2000.0])
@pytest.mark.parametrize("kind", ["whole", "cached"])
def test_extreme_logits_stay_finite_and_right(height, kind):
    """One logit of the student stands so far above that fp32 probabilities of all others are zero."""
    case = Case(torch.float, scale=0.1)
    with torch.no_grad():
        case.hidden.abs_().add_(0.5)
        case.weight[17] += 2 * height / WIDTH
    targets, divergence = (
        (case.teacher(), None) if kind == "whole" else (buckets_of(case, 8), log_space_bucketed_divergence(8))
    )
    for temperature in TEMPERATURES:
        ours = case.linear(DistillationLoss(temperature, 0.5), targets)
        assert_near(ours, case.exact(temperature, 0.5, divergence), 1e-5)


def log_space_bucketed_divergence(k):
    def divergence(logits, teacher, temperature):
        ids = teacher.topk(k, -1).indices
        student, teacher = (
            torch.cat((z.gather(-1, ids), z.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)), -1)
            for z in (logits, teacher)
        )
        student, teacher = ((outcome / temperature).log_softmax(-1) for outcome in (student, teacher))
        return (teacher.exp() * (teacher - student)).sum(-1)

    return divergence


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_near_to_fp64_as_the_unfused_loss(autocast):
    case = Case(torch.float if autocast else torch.bfloat16, rounded=torch.bfloat16)
    true = case.exact(1.0, 0.5, weighted=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = case.linear(DistillationLoss(1.0, 0.5), case.teacher(), weighted=False)
        logits = F.linear(case.hidden, case.weight).float()
        with torch.autocast("cpu", enabled=False):  # the teacher's precision is its own
            teacher = F.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias).float()
        kept = case.labels != -100
        nll = F.cross_entropy(logits, case.labels, reduction="none", ignore_index=-100)
        total = (0.5 * whole_divergence(logits, teacher, 1.0) + 0.5 * nll)[kept].sum()
        unfused = (total.detach(), *torch.autograd.grad(total, (case.hidden, case.weight)))
    for value, theirs, expected in zip(ours, unfused, true, strict=True):
        assert value.dtype == theirs.dtype
        assert distance(value, expected) <= 1.5 * distance(theirs, expected) + 1e-6


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of a tensor that any operation returned, and how many different ones had it."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_no_tensor_of_the_size_of_the_logits_is_ever_built(temperature):
    tokens, vocabulary = 512, 1000
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    labels, loss = torch.randint(vocabulary, (tokens,)), DistillationLoss(temperature, 0.5)
    teacher = torch.randn(tokens, 12), torch.randn(vocabulary, 12)
    buckets = TopKBuckets(torch.randn(tokens, 9).log_softmax(-1), torch.rand(tokens, vocabulary).topk(8).indices)
    loss_mobilellm.LOSS_CHUNK_ELEMENTS = 16 * vocabulary
    for targets in (TeacherLogits(*teacher), buckets):
        with LargestTensor() as seen:
            LinearDistillation.apply(hidden, weight, labels, None, -100, None, loss, targets).backward()
        assert 4 * 16 * vocabulary <= max(seen.storages.values()) <= 4 * 17 * vocabulary
        # student's logits, teacher's, their ratio and the softmax at T = 1, at most
        assert sum(size >= 4 * 16 * vocabulary for size in seen.storages.values()) <= 4
    logits = torch.randn(tokens, vocabulary, requires_grad=True)
    for targets in (TeacherLogits(*teacher), buckets):
        with LargestTensor() as seen:
            LogitsDistillation.apply(logits, labels, None, -100, None, loss, targets).backward()
        full = [size for size in seen.storages.values() if size >= 4 * tokens * vocabulary]
        assert len(full) <= 2  # the gradient, and autograd's own copy into `.grad`


def test_each_tokens_nll_and_the_sums_of_the_parts_are_left_behind():
    case = Case()
    kept = case.labels != -100
    logits, teacher = (
        F.linear(case.hidden, case.weight),
        F.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias),
    )
    nll = F.cross_entropy(logits, case.labels, reduction="none", ignore_index=-100) * case.token_weights
    kl = (whole_divergence(logits, teacher, 2.0) * case.token_weights)[kept].sum()
    for way in (case.linear, case.from_logits):
        token_nll, loss = torch.full((TOKENS,), torch.nan).double(), DistillationLoss(2.0, 0.5)
        way(loss, case.teacher(), token_nll)
        torch.testing.assert_close(token_nll, nll.detach())
        way(loss, case.teacher(), token_nll)
        expected = torch.stack((kl, nll[kept].sum(), torch.tensor(kept.sum()))).detach() * 2
        torch.testing.assert_close(loss.sums, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing(frozen):
    case = Case()
    true = dict(zip(("hidden", "weight"), case.exact(1.0, 0.5)[1:]))
    getattr(case, frozen).requires_grad_(False)
    total = LinearDistillation.apply(
        case.hidden,
        case.weight,
        case.labels,
        case.token_weights,
        -100,
        None,
        DistillationLoss(1.0, 0.5),
        case.teacher(),
    )
    total.backward()
    trained = {"hidden": "weight", "weight": "hidden"}[frozen]
    assert distance(getattr(case, trained).grad, true[trained]) < 1e-12 and getattr(case, frozen).grad is None


def test_a_batch_that_predicts_nothing_has_no_loss_and_zero_gradients():
    case = Case()

    def cross_entropy(*arguments):
        return LinearDistillation.apply(*arguments, DistillationLoss(1.0, 1.0), case.teacher())

    nothing = torch.full((1, TOKENS), -100)
    loss = linear_causal_lm_loss(case.hidden[None], case.weight, nothing, cross_entropy=cross_entropy)
    loss.backward()
    assert loss.isnan() and not case.hidden.grad.any() and not case.weight.grad.any()


def test_second_derivatives_are_refused():
    case = Case()
    total = LinearDistillation.apply(
        case.hidden, case.weight, case.labels, None, -100, None, DistillationLoss(1.0, 1.0), case.teacher()
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, case.hidden, create_graph=True)


def test_a_teachers_logits_are_of_its_own_precision_under_autocast():
    states, weight, out = torch.randn(5, 8), torch.randn(9, 8), torch.empty(5, 9, dtype=torch.double)
    with torch.autocast("cpu", torch.bfloat16):
        TeacherLogits(states, weight).fill(torch.arange(5), out)
    assert torch.equal(out, F.linear(states, weight).double())
