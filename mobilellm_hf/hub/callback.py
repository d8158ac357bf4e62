"""Releases every checkpoint of a training to its stage's branch, while the training goes on.

    Trainer(..., callbacks=[ReleaseCallback("org/MobileLLM-R1-140M-base", "pretrain", private=True)])

`push_to_hub=True` of the Trainer never makes the branch that `hub_revision` names, and fails when the training ends;
it sends pickles, and its card is not one. This callback releases as `recipes/release.py` does: safetensors, code and
tokenizer, a card from the run's own files, one commit a checkpoint, tagged STAGE-step-N.

The training never waits for the network and never fails because of it. A checkpoint's files are linked aside when it
is saved, so that `save_total_limit` cannot take them away, and sent in a thread. What could not be sent is tried again
at the next save and when training ends, and by the next run in the same folder. Only a token that may not write is
refused, and only before the first step of all; a training that goes on is told, and goes on.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from mobilellm_hf.hub.access import AccessError, check_access
from mobilellm_hf.hub.files import CONFIG, CONFIGS, WEIGHTS, read_json
from mobilellm_hf.hub.package import package_model
from mobilellm_hf.hub.releases import publish
from mobilellm_hf.hub.stages import Target
from mobilellm_hf.workspace import write_whole

logger = logging.getLogger(__name__)

FOLDER = "checkpoints-release"
STATE = "trainer_state.json"


class ReleaseCallback(TrainerCallback):
    """Releases the checkpoints that a Trainer saves; the first process does it alone.

    Args:
        repo: `org/name`; made if it does not exist.
        stage: one of `stages.SUFFIXES`; decides the branch.
        private: what a new repository is.
        license: of the weights, as the Hub calls it.
        tokenizer: or its folder or Hub id, for a Trainer that has no `processing_class`.
        keep: checkpoints that wait at most while the network is away; of more the oldest are let go. Until then
            they take up the disk.
        last_wait: seconds that the end of the training waits for what is left; it is tried twice.

    Attributes:
        released: step -> commit.
        failures: what went wrong, as lines of text.

    Raises:
        ValueError: the repository's name or the stage is wrong.
        AccessError: when a training begins, and the Hub says that the token may not write there.
    """

    def __init__(
        self,
        repo: str,
        stage: str,
        *,
        private: bool = False,
        license: str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        keep: int = 3,
        last_wait: float = 600.0,
        api: HfApi | None = None,
    ):
        self.target = Target(repo, stage)
        self.private, self.license, self.keep, self.last_wait = private, license, keep, last_wait
        self.tokenizer = tokenizer
        self.released: dict[int, str] = {}
        self.failures: list[str] = []
        self._api = api or HfApi()
        self._folder: Path | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the folders that wait

    def on_train_begin(self, args, state, control, processing_class=None, **kwargs):
        self.tokenizer = processing_class or self.tokenizer
        if self.tokenizer is None:
            raise ValueError(
                "ReleaseCallback: give the tokenizer, which the Trainer was not given as processing_class"
            )
        if state.is_world_process_zero:
            if isinstance(self.tokenizer, str | Path):
                self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
            self._check_access(begins=state.global_step == 0)
            self._folder = Path(args.output_dir) / FOLDER
            with self._unharmed("what an earlier run left is not released yet"):
                self._send_in_a_thread()

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        with self._unharmed(f"checkpoint {state.global_step} cannot be put aside"):
            self._put_aside(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        with self._unharmed(f"step {state.global_step} is not released yet"):
            self._send_in_a_thread()

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        with self._unharmed("the last checkpoints are not released yet"):
            for _ in range(2):
                self._send_in_a_thread()
                if self._thread is not None:
                    self._thread.join(self.last_wait)
            if left := [step_of(folder) for folder in self._waiting()]:
                self._fail(
                    f"not released: steps {', '.join(map(str, left))}. They are in {self._folder}; the same training, "
                    "started again, sends them"
                )

    def _check_access(self, begins: bool) -> None:
        with self._unharmed("nobody knows yet whether the token may write", but=(AccessError,) if begins else ()):
            check_access(self._api, self.target.repo, private=self.private)

    @contextmanager
    def _unharmed(self, what: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """The training goes on whatever happens here; it is noted."""
        try:
            yield
        except Exception as error:
            if isinstance(error, but):
                raise
            self._fail(f"{what}: {error}")

    def _put_aside(self, checkpoint: Path) -> None:
        """Links the files of a checkpoint into a folder of its own; of another file system, copies them."""
        partial = self._folder / f"{checkpoint.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in checkpoint.iterdir():
            if path.name in (*CONFIGS, STATE) or path.suffix in (WEIGHTS, ".py"):
                _link(path, partial / path.name)
        _turn_the_cache_on(partial / CONFIG)
        self.tokenizer.save_pretrained(partial)
        settings = checkpoint.parent / "settings.json"
        if settings.exists():  # where facts look for it: beside the checkpoint's folder
            write_whole(self._folder / settings.name, lambda path: shutil.copyfile(settings, path))
        with self._lock:
            shutil.rmtree(self._folder / checkpoint.name, ignore_errors=True)
            partial.rename(self._folder / checkpoint.name)
            for old in self._waiting()[: -self.keep]:
                self._fail(f"step {step_of(old)} waited too long, and is let go")
                shutil.rmtree(old)

    def _waiting(self) -> list[Path]:
        """Checkpoints that were put aside and not yet released, the oldest first."""
        found = [path for path in self._folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=step_of)

    def _send_in_a_thread(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return  # which takes up what has come meanwhile
        if self._waiting():
            self._thread = threading.Thread(target=self._send, name="release", daemon=True)
            self._thread.start()

    def _send(self) -> None:
        """Sends what waits, in order, until nothing is left or one fails."""
        while waiting := self._waiting():
            folder, step = waiting[0], step_of(waiting[0])
            try:
                self.released[step] = self._release(folder, step)
            except Exception as error:
                if folder.exists():  # it was not let go meanwhile
                    self._fail(f"step {step} is not released yet: {error}")
                    return
            with self._lock:
                shutil.rmtree(folder, ignore_errors=True)

    def _release(self, folder: Path, step: int) -> str:
        release = package_model(folder, self.target, license=self.license, staging=self._folder)
        release.refuse_leaks(self._api.token or get_token())
        tag = f"{self.target.stage}-step-{step}"
        published = publish(release, private=self.private, tag=tag, api=self._api, attempts=3)
        logger.info("released step %d: %s", step, published.url)
        return published.commit

    def _fail(self, what: str) -> None:
        self.failures.append(what)
        logger.warning("release: %s", what)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def _turn_the_cache_on(config: Path) -> None:
    """Training had turned it off, and who generates with the checkpoint wants it; the checkpoint's own file stays."""
    document = read_json(config) | {"use_cache": True}
    write_whole(config, lambda path: path.write_text(json.dumps(document, indent=2) + "\n"))


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])
