"""Callbacks for the stock `transformers.Trainer`: what a MobileLLM run watches and what makes it stop."""

from mobilellm_hf.training.monitors import NonFiniteLossError, ProbeNLLCallback, StopOnNonFiniteLoss

__all__ = ["NonFiniteLossError", "ProbeNLLCallback", "StopOnNonFiniteLoss"]
