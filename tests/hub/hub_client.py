"""What tests ask of the client's process, which was started with the loopback Hub as its endpoint."""

import contextlib
import io
import logging
import os
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset
from huggingface_hub import HfApi
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from mobilellm_hf import MobileLLMForCausalLM
from mobilellm_hf.hub import (
    ReleaseCallback,
    Target,
    check_access,
    package_data_set,
    package_model,
    publish,
    verification,
)
from mobilellm_hf.hub.blocks import code_blocks
from mobilellm_hf.hub.callback import FOLDER
from mobilellm_hf.hub.collection import add_to_collection


def call(name: str, *arguments, **options) -> dict:
    """What the function of this module returns, or the error that it raises; and what was printed and logged."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            value = globals()[name](*arguments, **options)
        return {"value": value, "printed": printed.getvalue()}
    except Exception as error:  # some of them do not pickle
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"error": str(error), "kinds": kinds, "printed": printed.getvalue()}
    finally:
        logging.getLogger().removeHandler(handler)


def release(folder: str, repo: str, stage: str, token: str, staging: str | None = None, **options) -> dict:
    """Packages and publishes a model; `waited` has the seconds between attempts, which nobody waits for."""
    waited = []
    staging = Path(staging) if staging else None
    found = package_model(Path(folder), Target(repo, stage), staging=staging, llama4=options.pop("llama4", False))
    done = publish(found, api=HfApi(token=token), wait=waited.append, **options)
    files = {file.path: file.digests[0] for file in found.files}
    return {"commit": done.commit, "tag": done.tag, "is_new": done.is_new, "url": done.url, "waited": waited,
            "files": files}  # fmt: skip


def release_data_set(folder: str, repo: str, token: str) -> dict:
    done = publish(package_data_set(Path(folder), Target(repo, "data", "dataset")), api=HfApi(token=token))
    return {"commit": done.commit, "tag": done.tag, "is_new": done.is_new}


def access(repo: str, token: str | None, private: bool = False) -> str:
    return str(check_access(HfApi(token=token), repo, private=private))


def collect(collection: str, repo: str, token: str) -> str:
    return add_to_collection(HfApi(token=token), collection, repo, note="28,832 parameters")


def check(
    folder: str, repo: str, stage: str, token: str, llama4: bool = False, blocks: bool = True, tag: str | None = None
) -> dict:
    """Verifies what `release` has released, by its branch or by a tag, with logits of the local folder."""
    os.environ["HF_TOKEN"] = token
    target = Target(repo, stage)
    found = package_model(Path(folder), target, llama4=llama4)
    if not blocks:
        verification.code_blocks = lambda card: {}
    try:
        return asdict(verification.verify(repo, tag or target.branch, found, Path(folder), branch=target.branch))
    finally:
        verification.code_blocks = code_blocks
        del os.environ["HF_TOKEN"]


def train(
    folder: str, output: str, repo: str, token: str, steps: int = 6, resume: bool = False, tokenizer=None, **options
) -> dict:
    """Trains the model of a folder for some steps, saves every second one, and releases while it does.

    Args:
        tokenizer: a folder for the callback; the Trainer is given none then.
    """
    model = MobileLLMForCausalLM.from_pretrained(folder)
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, 6, 7, 8]] * 8})
    arguments = TrainingArguments(
        output, max_steps=steps, save_steps=2, save_total_limit=1, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    callback = ReleaseCallback(
        repo, "pretrain", api=HfApi(token=token), last_wait=60, tokenizer=tokenizer, **options
    )  # fmt: skip
    pauses = PauseCallback(callback)
    processing = None if tokenizer else AutoTokenizer.from_pretrained(folder)
    trainer = Trainer(
        model, arguments, train_dataset=rows, processing_class=processing, callbacks=[callback, pauses],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    saved, waiting = (
        sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (Path(output), Path(output) / FOLDER)
    )
    return {"released": callback.released, "failures": callback.failures, "steps": trainer.state.global_step,
            "saved": saved, "waiting": waiting, "at_begin": pauses.at_begin}  # fmt: skip


class PauseCallback(TrainerCallback):
    """Makes every save wait until what it began has ended, so that a test knows what happened when."""

    def __init__(self, callback: ReleaseCallback):
        self.callback = callback

    def on_train_begin(self, args, state, control, **kwargs):
        if self.callback._thread is not None:
            self.callback._thread.join(60)
        self.at_begin = list(self.callback.released)

    def on_save(self, args, state, control, **kwargs):
        if self.callback._thread is not None:
            self.callback._thread.join(60)


def callback_without_tokenizer(folder: str, output: str, token: str) -> None:
    arguments = TrainingArguments(output, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    callback = ReleaseCallback("org/name", "pretrain")
    rows = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, 6]]})
    Trainer(MobileLLMForCausalLM.from_pretrained(folder), arguments, train_dataset=rows, callbacks=[callback]).train()
