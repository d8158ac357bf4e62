"""Callbacks for the stock `transformers.Trainer`: what a MobileLLM run reads, learns from and watches.

mixture.py       a live mixture under the Trainer: its state in checkpoints, the loss of each source
resampling.py    influence decides during training what is read next (equations 4 to 7)
monitors.py      NLL on probe sets, and a loss that is no number
"""

from mobilellm_hf.training.live_mixture import MixtureCallback
from mobilellm_hf.training.monitors import NonFiniteLossError, ProbeNLLCallback, StopOnNonFiniteLoss
from mobilellm_hf.training.resampling import InfluenceResamplingCallback

__all__ = [
    "InfluenceResamplingCallback",
    "MixtureCallback",
    "NonFiniteLossError",
    "ProbeNLLCallback",
    "StopOnNonFiniteLoss",
]
