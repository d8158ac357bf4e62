# /// script
# dependencies = ["mobilellm_hf[plots,evaluation]"]
# ///
"""Evaluates a model on the paper's benchmarks: Table 8 for base models, Table 9 for post-trained ones.

    accelerate launch recipes/evaluate.py --model runs/140M/midtrain-phase2/MODEL --suite base
    accelerate launch recipes/evaluate.py --model facebook/MobileLLM-R1-950M --suite reasoning
    accelerate launch recipes/evaluate.py --model MODEL --tasks gsm8k_8shot humaneval --data_dir data --limit 100
    python recipes/evaluate.py --model runs/device --suite base              # a .pte, see recipes/export.py
    python recipes/evaluate.py --list_tasks true

What a killed run has answered stays; the same command asks for the rest. `--dry_run true` shows what would be asked.
`mobilellm_hf/evaluation/runner.py` says what the output folder gets, `mobilellm_hf/evaluation/suites.py` what there
is to run.
"""

from rich.console import Console

from mobilellm_hf.evaluation.arguments import EvaluationArguments
from mobilellm_hf.launch import launch


def evaluate(args: EvaluationArguments, console: Console) -> None:
    from mobilellm_hf.evaluation.runner import run_evaluation  # which needs lm-eval
    from mobilellm_hf.export.program import is_exported

    if args.model and is_exported(args.model):
        from mobilellm_hf.export.evaluated import context_on_device, load_on_device  # which need ExecuTorch

        run_evaluation(args, console, load=load_on_device, find_context=context_on_device)
    else:
        run_evaluation(args, console)


if __name__ == "__main__":
    launch(__doc__, (EvaluationArguments,), evaluate)
