"""An lm-eval LM that writes each answer down as it comes, shares the questions among processes, and asks none twice.

    team = Team(lm)
    if PartialState().is_main_process:
        with team:
            lm_eval.evaluate(team.lead(folder, "gsm8k_8shot", stage), ...)
    else:
        team.follow()                                                       # until the main process leaves `with`

lm-eval itself runs in the main process only: it builds prompts and judges there. The other processes answer. So a
process that fails, or has nothing to do, cannot leave others waiting, and questions are shared one by one.

Memory that runs out halves the batch; what was answered before stays.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.huggingface import HFLM

from mobilellm_hf.evaluation.models import batch_size_for
from mobilellm_hf.evaluation.records import Record, load_parts, write_part
from mobilellm_hf.progress import Stage

# Answers wait in memory for so long, or until there are so many.
SECONDS_BETWEEN_WRITES, MOST_UNWRITTEN = 2.0, 1_024
# Of so many texts that are the longest in characters, the longest in tokens decides the batch.
LONGEST_TRIED = 16


@dataclass(frozen=True)
class Question:
    """One request of lm-eval; `argument` is the text to rate, or how to generate."""

    document: int
    index: int
    context: str
    argument: str | Mapping[str, Any]

    @property
    def key(self) -> tuple[int, int]:
        return self.document, self.index

    @property
    def text(self) -> str:
        return self.context + (self.argument if isinstance(self.argument, str) else "")

    @property
    def new_tokens(self) -> int:
        return 0 if isinstance(self.argument, str) else self.argument.get("max_gen_toks", 256)


@dataclass(frozen=True)
class Order:
    """What all processes answer together."""

    method: str
    task: str
    folder: Path
    questions: Sequence[Question]


class Team:
    """All processes, each with the same LM. One leads, the others follow."""

    def __init__(self, lm: LM):
        self.lm = lm

    def lead(self, folder: Path, task: str, stage: Stage) -> RecordedLM:
        """The LM for one task, whose records are in `folder`."""
        return RecordedLM(self, folder, task, stage)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Dismisses the others. After Ctrl-C, which they got too, nobody is left to be told."""
        if kind is None or issubclass(kind, Exception):
            _broadcast(None)

    def follow(self) -> None:
        """Answers the main process's orders until it dismisses the team."""
        while (order := _broadcast(None)) is not None:
            self.answer(order, lambda count: None)

    def ask(self, order: Order, on_answers: Callable[[int], None]) -> list[Record]:
        """All processes' answers, in the main process.

        Raises:
            RuntimeError: a process failed; what was answered is on disk.
        """
        _broadcast(order)
        return self.answer(order, on_answers)

    def answer(self, order: Order, on_answers: Callable[[int], None]) -> list[Record]:
        state = PartialState()
        if state.num_processes == 1:
            return answer(self.lm, order, on_answers)
        own, failure = share_of(order.questions, state.process_index, state.num_processes), ""
        answered: list[Record] = []
        try:
            answered = answer(self.lm, replace(order, questions=own), on_answers)
        except Exception as error:
            failure = f"process {state.process_index}: {type(error).__name__}: {error}"
        outcomes = gather_object([(answered, failure)])
        if state.is_main_process and (failures := [failure for _, failure in outcomes if failure]):
            raise RuntimeError("; ".join(failures))
        return [record for records, _ in outcomes for record in records]


def share_of(questions: Sequence[Question], process: int, processes: int) -> list[Question]:
    """A process's questions: contexts are dealt in turn, the longest text first.

    The choices of one question stay together: where they are a token each, HFLM reads their context once.
    """
    longest: dict[str, int] = {}
    for question in questions:
        longest[question.context] = max(longest.get(question.context, 0), len(question.text))
    own = set(sorted(longest, key=longest.__getitem__, reverse=True)[process::processes])
    return [question for question in questions if question.context in own]


def _broadcast(order: Order | None) -> Order | None:
    held = [order]
    if PartialState().num_processes > 1:
        broadcast_object_list(held)
    return held[0]


class RecordedLM(LM):
    """Answers from a folder's records, and has the team answer what they lack.

    Attributes:
        answered: every answer of the task, by (document, index).
        truncated: prompts of which the model sees the end only, since they do not fit its context.
    """

    def __init__(self, team: Team, folder: Path, task: str, stage: Stage):
        super().__init__()
        self.team, self.folder, self.task, self.stage = team, folder, task, stage
        self.answered: dict[tuple[int, int], Record] = {}
        self.truncated = 0

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods; whether greedy decoding would give the text is not kept, and said to be False."""
        return [(record.logprob, False) for record in self._ask("loglikelihood", requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [record.completion for record in self._ask("generate_until", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("no task of the suites asks for it")

    def _ask(self, method: str, requests: list[Instance]) -> list[Record]:
        questions = [Question(request.doc_id, request.idx, *request.args) for request in requests]
        self.answered |= load_parts(self.folder)
        missing = [question for question in questions if question.key not in self.answered]
        self.truncated = _truncated(self.team.lm, questions)
        self.stage.expect(len(questions))
        self.stage.reach(len(questions) - len(missing))
        if missing:
            share = PartialState().num_processes  # others have done about as many
            order = Order(method, self.task, self.folder, missing)
            records = self.team.ask(order, lambda count: self.stage.advance(count * share))
            self.answered |= {record.key: record for record in records}
        self.stage.reach(len(questions))
        return [self.answered[question.key] for question in questions]

    @property
    def tokenizer_name(self) -> str:
        return self.team.lm.tokenizer_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.team.lm.apply_chat_template(chat_history, add_generation_prompt)


class _Notebook:
    """What lm-eval calls a cache hook: it is told every answer as soon as there is one."""

    def __init__(self, order: Order, lm: LM, on_answers: Callable[[int], None]):
        self.order, self.lm, self.on_answers = order, lm, on_answers
        self.answered: list[Record] = []
        self._written, self._wrote_at = 0, time.monotonic()
        self._waiting: dict[tuple[str, str], list[Question]] = defaultdict(list)
        for question in order.questions:
            self._waiting[self._place(question.context, question.argument)].append(question)

    @staticmethod
    def _place(context: str, argument: str | Mapping[str, Any]) -> tuple[str, str]:
        return context, argument if isinstance(argument, str) else ""

    @property
    def missing(self) -> list[Question]:
        return [question for questions in self._waiting.values() for question in questions]

    def add_partial(self, method: str, asked: tuple[str, Any], answer: Any) -> None:
        """Also answers who asked the same: decoding is greedy."""
        questions = self._waiting.pop(self._place(*asked), [])
        self.answered += [self._record(question, answer) for question in questions]
        self.on_answers(len(questions))
        unwritten = len(self.answered) - self._written
        batch = getattr(self.lm, "batch_size", 1)
        late = unwritten >= batch and time.monotonic() - self._wrote_at >= SECONDS_BETWEEN_WRITES
        if late or unwritten >= MOST_UNWRITTEN:
            self.write()

    def write(self) -> None:
        write_part(self.order.folder, self.answered[self._written :])
        self._written, self._wrote_at = len(self.answered), time.monotonic()

    def _record(self, question: Question, answer: Any) -> Record:
        place = (self.order.task, *question.key, question.context)
        if isinstance(question.argument, str):
            return Record(*place, question.argument, logprob=answer[0])
        return Record(*place, answer, tokens=_count(self.lm, answer))


def answer(lm: LM, order: Order, on_answers: Callable[[int], None]) -> list[Record]:
    """This process's answers, each on disk within seconds.

    Raises:
        Exception: of the model. What was answered before is on disk.
    """
    notebook = _Notebook(order, lm, on_answers)
    lm.set_cache_hook(notebook)
    _choose_batch_size(lm, order)
    try:
        while missing := notebook.missing:
            answers = _tried(lm, order.method, missing)
            if answers is None:
                lm.batch_size_per_gpu //= 2
                clear_device_cache(garbage_collection=True)
                continue
            for question, given in zip(missing, answers, strict=True):  # of an LM that does not tell as it goes
                notebook.add_partial(order.method, (question.context, question.argument), given)
    finally:
        notebook.write()
    return notebook.answered


def _tried(lm: LM, method: str, questions: Sequence[Question]) -> list[Any] | None:
    """The answers; None if the memory ran out and the batch can be made smaller."""
    try:
        return getattr(lm, method)([_instance(method, question) for question in questions], disable_tqdm=True)
    except RuntimeError as error:
        if not should_reduce_batch_size(error) or getattr(lm, "batch_size_per_gpu", 1) == 1:
            raise
        return None


def _instance(method: str, question: Question) -> Instance:
    argument = question.argument if isinstance(question.argument, str) else dict(question.argument)
    return Instance(method, {}, (question.context, argument), question.index, ("", question.document, 1))


def _choose_batch_size(lm: LM, order: Order) -> None:
    if isinstance(lm, HFLM) and order.questions and not lm.fixed_batch_size:
        new_tokens = max(question.new_tokens for question in order.questions)
        longest = min(lm.max_length, longest_text(lm, order.questions) + new_tokens)
        lm.batch_size_per_gpu = batch_size_for(lm.model, longest, new_tokens > 0)


def longest_text(lm: LM, questions: Sequence[Question]) -> int:
    """Tokens of the longest context and text to rate, or nearly."""
    texts = sorted({question.text for question in questions}, key=len)[-LONGEST_TRIED:]
    return max(len(lm.tok_encode(text)) for text in texts)


def _truncated(lm: LM, questions: Sequence[Question]) -> int:
    if not isinstance(lm, TemplateLM):  # others do not tell what they read of a text
        return 0
    rooms = [_room(lm, question) for question in questions]
    if longest_text(lm, questions) <= min(rooms):
        return 0
    lengths = {text: len(lm.tok_encode(text)) for text in {question.text for question in questions}}
    return sum(lengths[question.text] > room for question, room in zip(questions, rooms))


def _room(lm: TemplateLM, question: Question) -> int:
    """Tokens that a question may have. The last token of a text to rate is not read by the model, only rated."""
    return lm.max_length + 1 if isinstance(question.argument, str) else lm.max_length - question.new_tokens


def _count(lm: LM, completion: str) -> int:
    return len(lm.tok_encode(completion, add_special_tokens=False)) if hasattr(lm, "tok_encode") else 0
