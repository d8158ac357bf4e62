# /// script
# dependencies = ["mobilellm_hf[plots]"]
# ///
"""Pre-trains a MobileLLM on a weighted mixture, which influence can change on the way (Tables 4 and 5).

    accelerate launch recipes/pretrain.py --config recipes/tiny/pretrain.yaml
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml \\
        recipes/pretrain.py --config recipes/140M/pretrain_phase1.yaml --output_dir runs/140M/pretrain-stage1

Any number of processes reads the same mixture. What a killed run has trained stays; the same command goes on, and on
CPUs ends with the same weights to the bit. `mobilellm_hf/training/stage.py` says what the output folder gets.
"""

from mobilellm_hf.hub.arguments import CheckpointArguments, releasing
from mobilellm_hf.launch import launch
from mobilellm_hf.training.arguments import StageArguments, StageTrainingArguments
from mobilellm_hf.training.stage import run_stage

if __name__ == "__main__":
    launch(__doc__, (StageArguments, StageTrainingArguments, CheckpointArguments), releasing(run_stage))
