# /// script
# dependencies = ["mobilellm_hf[plots,rewards]"]
# ///
"""Trains a MobileLLM with GRPO on prompts whose answers can be checked, as in the paper's ablation.

    accelerate launch recipes/grpo.py --config recipes/tiny/grpo.yaml
    accelerate launch recipes/sft.py --config recipes/950M/sft_cold_start.yaml     # first, for a base model
    accelerate launch recipes/grpo.py --config recipes/950M/grpo.yaml

A killed run goes on from its last checkpoint with the prompts that it would have asked next; the same command does it.
`mobilellm_hf/training/grpo.py` says what the output folder gets, `mobilellm_hf/training/grpo_arguments.py` how prompts
and rewards are named.
"""

from mobilellm_hf.hub.arguments import CheckpointArguments, releasing
from mobilellm_hf.launch import launch
from mobilellm_hf.training.grpo import run_grpo
from mobilellm_hf.training.grpo_arguments import GRPOArguments, GRPOTrainingArguments

if __name__ == "__main__":
    launch(__doc__, (GRPOArguments, GRPOTrainingArguments, CheckpointArguments), releasing(run_grpo))
