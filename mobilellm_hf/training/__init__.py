"""Callbacks for the stock `transformers.Trainer`: what a MobileLLM run reads, learns from and watches.

live_mixture.py    a mixture under the Trainer: its state in checkpoints, the loss of each source
resampling.py      influence decides during training what is read next; rounds.py, scored_parts.py, fused_scores.py
distillation.py    the KL divergence from a teacher as the model's own loss; divergence.py, teacher.py
teacher_cache.py   a teacher's probabilities on disk, for every student and phase
monitors.py        NLL on probe sets, and a loss that is no number; rank_me.py, throughput.py
stage.py           a whole stage from a YAML file; arguments.py
sft.py             supervised fine-tuning with TRL; sft_arguments.py, sft_data.py
grpo.py            reinforcement with TRL; grpo_arguments.py, grpo_data.py, pass_rate.py
plots.py, tables.py   what is shown at the end
"""

from mobilellm_hf.training.distillation import DistillationCallback
from mobilellm_hf.training.live_mixture import MixtureCallback
from mobilellm_hf.training.monitors import NonFiniteLossError, ProbeNLLCallback, StopOnNonFiniteLoss
from mobilellm_hf.training.rank_me import RankMeCallback
from mobilellm_hf.training.resampling import InfluenceResamplingCallback, PhaseEndedError
from mobilellm_hf.training.teacher_cache import TeacherCache
from mobilellm_hf.training.throughput import ThroughputCallback

__all__ = [
    "DistillationCallback",
    "InfluenceResamplingCallback",
    "MixtureCallback",
    "NonFiniteLossError",
    "PhaseEndedError",
    "ProbeNLLCallback",
    "RankMeCallback",
    "StopOnNonFiniteLoss",
    "TeacherCache",
    "ThroughputCallback",
]
