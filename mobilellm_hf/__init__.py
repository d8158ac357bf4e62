"""MobileLLM-R1 (arXiv 2509.24945) for the Hugging Face stack.

Importing the package registers the model with transformers' Auto classes and nothing more: training, data and plots
are imported by the modules that use them.
"""

from .logs import silence_torchao

silence_torchao()  # which transformers imports, too

from .modeling import (  # noqa: E402
    MobileLLMConfig,
    MobileLLMForCausalLM,
    MobileLLMForSequenceClassification,
    MobileLLMModel,
    save_as_llama4_text,
)

__version__ = "0.1.0"

__all__ = [
    "MobileLLMConfig",
    "MobileLLMForCausalLM",
    "MobileLLMForSequenceClassification",
    "MobileLLMModel",
    "save_as_llama4_text",
]
