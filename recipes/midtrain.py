# /// script
# dependencies = ["mobilellm_hf[plots]"]
# ///
"""Mid-trains a pre-trained MobileLLM: distillation from a teacher, and influence that decides what is read next.

    accelerate launch recipes/midtrain.py --config recipes/tiny/midtrain_phase1.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml \\
        recipes/midtrain.py --config recipes/140M/midtrain_phase1.yaml --teacher_cache runs/teacher

The paper's phases (equations 6 and 7, Tables 4 and 6) are two runs, the second from the model of the first. Without
`resample_every` the mixture stays as the YAML file has it; without a teacher the loss is the NLL. With `teacher_cache`
the teacher runs once over the rows and is then not needed again. Killed runs go on as in `pretrain.py`.
"""

from dataclasses import dataclass, field

from mobilellm_hf.hub.arguments import CheckpointArguments, releasing
from mobilellm_hf.launch import launch
from mobilellm_hf.training.arguments import StageArguments, StageTrainingArguments
from mobilellm_hf.training.stage import run_stage


@dataclass
class MidtrainArguments(StageArguments):
    stage: str = field(default="midtrain-stage1", metadata={"help": "midtrain-stage1 or midtrain (the second phase)"})
    seq_length: int = field(default=4096, metadata={"help": "tokens of a packed row"})

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise ValueError("model: mid-training goes on from a pre-trained one; give its folder or Hub id")
        if self.stage not in ("midtrain-stage1", "midtrain"):
            raise ValueError(f"stage={self.stage!r} must be midtrain-stage1 or midtrain")


@dataclass
class MidtrainTrainingArguments(StageTrainingArguments):
    """Table 4: peak 3.6e-4, linear to zero."""

    final_learning_rate: float = field(default=0.0, metadata={"help": "at the end, as a share of the peak"})


if __name__ == "__main__":
    launch(__doc__, (MidtrainArguments, MidtrainTrainingArguments, CheckpointArguments), releasing(run_stage))
