"""A tiny chat model with digits in its vocabulary, arithmetic to ask it, and a run of such a task."""

from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.chat import attach_chat_template
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.evaluation.sampled_tasks import run_sampled_task
from mobilellm_hf.evaluation.samplers import ModelSampler
from mobilellm_hf.evaluation.suites import SampledTask, TaskData
from mobilellm_hf.progress import StageProgress

TASK = SampledTask(
    "sums", TaskData("none", "test", columns={"question": "q", "answer": "a"}), "What is {question}?", "math", 6,
    "Answer in {box}.", temperature=1.0, top_p=0.98, max_new_tokens=24,
)  # fmt: skip


def make_documents(count: int = 7) -> Dataset:
    return Dataset.from_list([{"q": f"{n} + {n % 3}", "a": f"so #### {n + n % 3}"} for n in range(count)])


def make_tokenizer():
    texts = [f"What is {n} + {n % 3}? Answer in {{box}}. \\boxed{{{n}}} the answer is" for n in range(60)] * 3
    return attach_chat_template(train_tokenizer(texts, 330, show_progress=False))


def make_model(tokenizer, context: int = 256) -> MobileLLMForCausalLM:
    torch.manual_seed(0)
    config = MobileLLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = MobileLLMForCausalLM(config)
    # Many ends, or no completion of random tokens would be short.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(5, 320, 15)]
    return model


def run(folder: Path, model, tokenizer, documents=None, task=TASK, **options):
    with StageProgress([task.name], Console(quiet=True)) as progress, progress.stage(task.name) as stage:
        documents = make_documents() if documents is None else documents
        return run_sampled_task(task, ModelSampler(model), tokenizer, folder, stage, documents=documents, **options)
