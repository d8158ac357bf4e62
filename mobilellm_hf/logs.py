"""Keeps torchao quiet: where it is installed, transformers and peft import it, and it warns of itself each time.

It tells of each library of its own that is for another kind of machine, and PyTorch of how it registers its types.
"""

import logging


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not message.startswith("Failed to load") and "register_constant() on Enum" not in message


def silence_torchao() -> None:
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_is_news)
