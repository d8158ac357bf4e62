"""The LM that keeps its answers: equal to lm-eval's own, nothing asked twice, memory that runs out, processes."""

import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from evaluation_cases import GOLD, ROOT, GivenLM, make_model, write_data
from lm_eval.api.instance import Instance
from rich.console import Console

from mobilellm_hf.evaluation import recorded_lm
from mobilellm_hf.evaluation.documents import locate
from mobilellm_hf.evaluation.lm_eval_runner import quiet, run_lm_eval_task
from mobilellm_hf.evaluation.lm_eval_tasks import build_parts
from mobilellm_hf.evaluation.models import batch_size_for, load_model, load_tokenizer
from mobilellm_hf.evaluation.recorded_lm import Order, Question, Team, answer
from mobilellm_hf.evaluation.records import load_parts, read_records
from mobilellm_hf.evaluation.results import is_measured
from mobilellm_hf.evaluation.suites import TASKS
from mobilellm_hf.progress import StageProgress

RATED = ["arc_easy", "piqa", "hellaswag", "winogrande"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data")
    make_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def evaluated(place):
    return load_model(str(place / "model"), tokenizer=load_tokenizer(str(place / "model")))


def run(name: str, place: Path, folder: Path, lm, **options):
    with quiet():
        source = locate(name, TASKS[name].data, place / "data")
        parts = build_parts(TASKS[name], source, max_new_tokens=24)
    with StageProgress([name], Console(quiet=True)) as progress, progress.stage(name) as stage:
        return run_lm_eval_task(TASKS[name], parts, Team(lm), folder, stage, source=source.label, **options)


@pytest.fixture(scope="module")
def stock(place) -> dict:
    """What lm-eval's `hf` model answers, loaded by lm-eval from the same folder: task -> samples."""
    tasks = {}
    with quiet():
        for name in [*RATED, "gsm8k_8shot"]:
            parts = build_parts(TASKS[name], locate(name, TASKS[name].data, place / "data"), max_new_tokens=24)
            tasks |= {name: next(iter(parts.values()))}
        found = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(place / "model"), "dtype": "float32"}, device="cpu",
            tasks=list(tasks.values()), batch_size=1, bootstrap_iters=1,
        )  # fmt: skip
    return {name: (found["samples"][part.task_name], found["results"][part.task_name]) for name, part in tasks.items()}


@pytest.mark.parametrize("name", RATED)
def test_loglikelihoods_are_those_of_lm_evals_own_model(name, place, evaluated, stock, tmp_path):
    result = run(name, place, tmp_path, evaluated.lm)
    samples, metrics = stock[name]
    theirs = {
        (sample["doc_id"], index): response[0][0]
        for sample in samples
        for index, response in enumerate(sample["resps"])
    }
    ours = {record.key: record.logprob for record in load_parts(tmp_path).values()}
    assert ours.keys() == theirs.keys() and len(ours) > 3
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4
    assert len(set(ours.values())) > 2
    for metric, value in result.details["metrics"].items():
        assert value == pytest.approx(metrics[metric]), metric


def test_a_choice_is_rated_by_its_length_where_the_metric_says_so(place, tmp_path):
    class Rating(GivenLM):
        def loglikelihood(self, requests, disable_tqdm=False):
            rated = super().loglikelihood(requests)
            given = {(1, 0): (-10.0, False), (1, 1): (-5.0, False), (1, 2): (-6.0, False)}
            return [given.get((request.doc_id, request.idx), one) for request, one in zip(requests, rated)]

    result = run("arc_easy", place, tmp_path, Rating(GOLD["arc_easy"]))  # "light and water" before "music"
    assert result.value == 1.0 and result.details["metrics"]["acc,none"] == pytest.approx(2 / 3)
    assert {record.extracted for record in load_parts(tmp_path).values() if record.document == 1} == {"0"}


def test_greedy_completions_are_those_of_lm_evals_own_model(place, evaluated, stock, tmp_path):
    run("gsm8k_8shot", place, tmp_path, evaluated.lm)
    samples = {sample["doc_id"]: sample["resps"][0][0] for sample in stock["gsm8k_8shot"][0]}
    records = read_records(tmp_path)
    assert dict(zip(records["document"], records["completion"])) == samples
    tokenizer = evaluated.tokenizer
    for record in records:
        assert record["tokens"] == len(tokenizer.encode(record["completion"], add_special_tokens=False)) > 0


def test_a_larger_limit_asks_for_the_others_only(place, tmp_path):
    first, second, third = (GivenLM(GOLD["gsm8k_8shot"]) for _ in range(3))
    result = run("gsm8k_8shot", place, tmp_path, first, limit=2)
    assert result.documents == 2 and result.details["limit"] == 2 and sorted(first.asked) == [(0, 0), (1, 0)]
    result = run("gsm8k_8shot", place, tmp_path, second)
    assert result.documents == 3 and "limit" not in result.details and second.asked == [(2, 0)]
    smaller = run("gsm8k_8shot", place, tmp_path, third, limit=1)
    assert smaller.documents == 1 and not third.asked and len(read_records(tmp_path)) == 3


def test_a_finished_task_is_read_and_not_run(place, tmp_path):
    run("piqa", place, tmp_path, GivenLM(GOLD["piqa"]))
    assert run("piqa", place, tmp_path, None).value == 1.0


class Failing(GivenLM):
    """Answers so many, telling each as lm-eval's models do, and then fails."""

    def __init__(self, answers: list, count: int, error: Exception):
        super().__init__(answers)
        self.count, self.error = count, error
        self.batch_size_per_gpu = self.batch_size = 8
        self.sizes: list[int] = []

    def generate_until(self, requests, disable_tqdm=False):
        self.sizes.append(self.batch_size_per_gpu)
        for request in requests[: self.count]:
            self.asked.append((request.doc_id, request.idx))
            self.cache_hook.add_partial("generate_until", request.args, self.answers[request.doc_id])
        if len(requests) > self.count:
            raise self.error
        return [self.answers[request.doc_id] for request in requests]


def test_memory_that_runs_out_halves_the_batch_and_asks_nothing_twice(place, tmp_path):
    lm = Failing(GOLD["math500_4shot"], 2, torch.OutOfMemoryError("CUDA out of memory."))
    assert run("math500_4shot", place, tmp_path, lm).value == 1.0
    assert lm.sizes == [8, 4] and lm.asked == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_memory_that_is_too_small_for_one_row_is_an_error(place, tmp_path):
    lm = Failing(GOLD["math500_4shot"], 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):
        run("math500_4shot", place, tmp_path, lm)
    assert lm.sizes == [8, 4, 2, 1]


def test_what_was_answered_before_an_error_is_kept(place, tmp_path):
    lm = Failing(GOLD["math500_4shot"], 3, RuntimeError("the cable was pulled"))
    with pytest.raises(RuntimeError, match="the cable was pulled"):
        run("math500_4shot", place, tmp_path, lm)
    assert len(load_parts(tmp_path)) == 3
    after = GivenLM(GOLD["math500_4shot"])
    assert run("math500_4shot", place, tmp_path, after).value == 1.0 and after.asked == [(3, 0)]


def test_equal_questions_get_equal_answers(tmp_path):
    questions = [Question(document, 0, "Q: 1+1?", {"until": ["\n"]}) for document in range(3)]
    lm = Failing(["2"] * 3, 1, RuntimeError("asked too much"))
    with pytest.raises(RuntimeError):  # of this LM, which was asked for all three
        answer(lm, Order("generate_until", "t", tmp_path, questions), lambda count: None)
    assert lm.asked == [(0, 0)] and [record.completion for record in load_parts(tmp_path).values()] == ["2"] * 3


def test_answers_are_written_while_others_are_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded_lm, "SECONDS_BETWEEN_WRITES", 0.0)
    seen = []

    class Watching(GivenLM):
        batch_size = 2

        def generate_until(self, requests, disable_tqdm=False):
            for request in requests:
                seen.append(len(load_parts(tmp_path)))
                self.cache_hook.add_partial("generate_until", request.args, "x")
            return ["x"] * len(requests)

    questions = [Question(document, 0, f"Q{document}", {}) for document in range(5)]
    counted = []
    answer(Watching(["x"] * 5), Order("generate_until", "t", tmp_path, questions), counted.append)
    assert seen == [0, 0, 2, 2, 4] and len(load_parts(tmp_path)) == 5 and sum(counted) == 5


def test_prompts_that_do_not_fit_are_counted(place, tmp_path):
    model = make_model(tmp_path / "short", context=1200)
    evaluated = load_model(str(model), tokenizer=load_tokenizer(str(model)))
    tokens = [len(evaluated.lm.tok_encode(record)) for record in read_prompts(place, tmp_path / "prompts")]
    assert min(tokens) > 1200 - 24
    result = run("gsm8k_8shot", place, tmp_path / "out", evaluated.lm)
    assert result.details["truncated_prompts"] == result.details["prompts"] == 3 and not is_measured(result)
    fits = run("piqa", place, tmp_path / "out2", evaluated.lm)
    assert "truncated_prompts" not in fits.details and fits.details["prompts"] == 4 and is_measured(fits)


@pytest.mark.parametrize(("beyond", "cut"), [(0, 0), (1, 0), (2, 1)])
def test_a_text_to_rate_may_have_a_token_more_than_the_context(beyond, cut, evaluated):
    """lm-eval's model does not read the last token: what is cut is the first of what it reads."""
    lm, choice = evaluated.lm, " a b"
    context = "a b" * 2000
    while len(lm.tok_encode(context + choice)) > lm.max_length + beyond:
        context = context[:-1]
    assert len(lm.tok_encode(context + choice)) == lm.max_length + beyond
    assert recorded_lm._truncated(lm, [Question(0, 0, context, choice), Question(1, 0, "a", " b")]) == cut
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.models.huggingface.eval_logger.warning", told.append)
        lm.loglikelihood([Instance("loglikelihood", {}, (context, choice), 0)], disable_tqdm=True)
    assert sum("exceeds model's maximum length" in line for line in told) == cut


def test_choices_of_a_question_are_dealt_together():
    questions = [
        Question(document, index, f"{'long ' * (document % 5)}{document}", f" choice {index}")
        for document in range(11)
        for index in range(4)
    ]
    shares = [recorded_lm.share_of(questions, process, 3) for process in range(3)]
    assert sorted(question.key for share in shares for question in share) == [question.key for question in questions]
    assert [len(share) for share in shares] == [16, 16, 12]
    contexts = [{question.context for question in share} for share in shares]
    assert not contexts[0] & contexts[1] and not contexts[0] & contexts[2] and not contexts[1] & contexts[2]
    assert [max(map(len, share)) for share in contexts] == [21, 21, 16]  # there are two of the longest


def test_likelihoods_are_summed_in_float32_whatever_the_model_calculates_in(place):
    """A long choice: in bfloat16 the sum of its hundreds of terms is kept to 8 bits."""
    tokenizer = load_tokenizer(str(place / "model"))
    half = load_model(str(place / "model"), tokenizer=tokenizer, dtype="bfloat16")
    context, choice = "The cup did not fit the box", " since it was too big for the box" * 20
    ((rated, _),) = half.lm.loglikelihood([Instance("loglikelihood", {}, (context, choice), 0)], disable_tqdm=True)
    read, target = half.lm._encode_pair(context, choice)
    with torch.no_grad():
        logits = half.lm.model(torch.tensor([read + target])[:, :-1]).logits
    assert logits.dtype == torch.bfloat16 and len(target) > 100
    rows = logits[0, -len(target) :].float().log_softmax(-1)
    expected = rows[range(len(target)), target].sum().item()
    assert rated == pytest.approx(expected, rel=1e-5)


def read_prompts(place: Path, folder: Path) -> list[str]:
    run("gsm8k_8shot", place, folder, GivenLM(GOLD["gsm8k_8shot"]))
    return read_records(folder)["prompt"]


def test_a_cpu_calculates_in_float32_unless_it_is_told_otherwise(place, tmp_path):
    model, tokenizer = str(tmp_path / "bfloat16"), load_tokenizer(str(place / "model"))
    load_model(str(place / "model"), tokenizer=tokenizer, dtype="bfloat16").lm.model.save_pretrained(model)
    assert load_model(model, tokenizer=tokenizer).settings == {"dtype": "float32"}
    assert load_model(model, tokenizer=tokenizer, dtype="bfloat16").settings == {"dtype": "bfloat16"}


def test_the_batch_is_what_memory_and_caches_hold(evaluated, monkeypatch):
    model, free = evaluated.lm.model, 2**30
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free}))
    vocabulary = model.config.vocab_size
    assert batch_size_for(model, 100, generates=False) == min(64, 1024 // 100, free // 4 // (12 * vocabulary * 100))
    assert batch_size_for(model, 5000, generates=False) == 1
    row = 2 * 2 * 1 * 16 * 1_000_000 * 4 + 12 * vocabulary
    assert batch_size_for(model, 1_000_000, generates=True) == free // 4 // row == 1
    assert batch_size_for(model, 100, generates=True) == 64


def test_two_processes_answer_as_one(place, tmp_path):
    """Also where one of them has nothing to do, and where one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [str(Path(__file__).with_name("recorded_lm_worker.py")), str(place), str(tmp_path)]
    done = subprocess.run([*command, *worker], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = ["RuntimeError process 1: ValueError: out of ink", "asked [2, 0]", "asked [1, 0]"]
    assert done.stdout.split("\n")[:3] == said
    single = load_model(str(place / "model"), tokenizer=load_tokenizer(str(place / "model")))
    for name in ("gsm8k_8shot", "arc_easy"):
        run(name, place, tmp_path / f"one-{name}", single.lm)
        ours, theirs = (read_records(tmp_path / f"{which}-{name}").to_list() for which in ("one", "two"))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)
            assert mine == other
