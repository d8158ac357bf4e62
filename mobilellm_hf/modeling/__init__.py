"""The MobileLLM config and model classes, registered with the Auto classes of transformers on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_mobilellm import MODEL_SIZES, MobileLLMConfig
from .conversion import save_as_llama4_text
from .modeling_mobilellm import MobileLLMForCausalLM, MobileLLMForSequenceClassification, MobileLLMModel

AutoConfig.register("mobilellm", MobileLLMConfig, exist_ok=True)
MobileLLMConfig.register_for_auto_class()
for auto_class, model_class in {
    AutoModel: MobileLLMModel,
    AutoModelForCausalLM: MobileLLMForCausalLM,
    AutoModelForSequenceClassification: MobileLLMForSequenceClassification,
}.items():
    auto_class.register(MobileLLMConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "MODEL_SIZES",
    "MobileLLMConfig",
    "MobileLLMForCausalLM",
    "MobileLLMForSequenceClassification",
    "MobileLLMModel",
    "save_as_llama4_text",
]
