# /// script
# dependencies = ["mobilellm_hf[plots,peft]"]
# ///
"""Fine-tunes a MobileLLM on conversations: general, or reasoning with a context that grows (Tables 4 and 7).

    accelerate launch recipes/sft.py --config recipes/tiny/sft_general.yaml
    accelerate launch --config_file recipes/accelerate/multi_node.yaml --main_process_ip FIRST_MACHINE \\
        recipes/sft.py --config recipes/950M/sft_reasoning.yaml

What a killed run has trained stays; the same command goes on, and on CPUs ends with the same weights to the bit.
`mobilellm_hf/training/sft.py` says what the output folder gets, `mobilellm_hf/data/chat_sources.py` how sets are
named.
"""

from mobilellm_hf.hub.arguments import CheckpointArguments, releasing
from mobilellm_hf.launch import launch
from mobilellm_hf.training.sft import run_sft
from mobilellm_hf.training.sft_arguments import SFTArguments, SFTTrainingArguments

if __name__ == "__main__":
    launch(__doc__, (SFTArguments, SFTTrainingArguments, CheckpointArguments), releasing(run_sft))
