"""A Llama-3-style tokenizer of any vocabulary size, so that a tiny model needs no download and no licence agreement.

The paper's models use the Llama-3.2 tokenizer (128,256 ids). This one has its form: byte-level BPE, Llama 3's regular
expression, the special tokens after the BPE vocabulary in Llama's order, `<|begin_of_text|>` put in front of every
text. Only the vocabulary is learnt here, and it can be 50 times smaller: in a model of 15 layers and width 576 the
full vocabulary alone would be half of the parameters. What works with one tokenizer works with the other.

Unlike Llama 3's configuration, decoding never tidies spaces up, so any text comes back from its ids as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"
PAD_TOKEN = "<|finetune_right_pad_id|>"

# The first eleven of Llama 3.2's special tokens (its ids 128000 to 128010): all that have a meaning. The reserved ones
# among them keep their places, so that an offset from `<|begin_of_text|>` means the same in every vocabulary.
NAMED_SPECIAL_TOKENS = (
    BOS_TOKEN,
    EOS_TOKEN,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD_TOKEN,
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
# And all 256 (to 128255), the rest of which are reserved.
LLAMA3_SPECIAL_TOKENS = NAMED_SPECIAL_TOKENS + tuple(f"<|reserved_special_token_{n}|>" for n in range(3, 248))

# Llama 3's pre-tokenization: contractions, words, numbers in groups of three digits, punctuation, line ends, spaces.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUMBER_OF_BYTES = 256


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    all_special_tokens: bool = False,
    model_max_length: int = 32_768,
    show_progress: bool = True,
) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE vocabulary; equal texts in equal order give equal ids.

    Args:
        texts: documents, such as `dataset["text"]`. Read once.
        vocab_size: ids in all, special tokens included: the `vocab_size` of the model. With little text there may be
            fewer merges to learn than asked for; the tokenizer is then smaller, and the log says by how much.
        all_special_tokens: Llama 3's 256 instead of the 11 that have a meaning.
        model_max_length: tokens above which the tokenizer warns; the length the final models are trained for.
        show_progress: show a bar while merges are learnt.

    Returns:
        A tokenizer that adds `<|begin_of_text|>`, ends texts with `<|end_of_text|>` (by whoever asks for an end: it
        adds none), pads with `<|finetune_right_pad_id|>`, and has no chat template yet.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes and the special tokens, or there is no text.
        TypeError: `texts` is one string.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = LLAMA3_SPECIAL_TOKENS if all_special_tokens else NAMED_SPECIAL_TOKENS
    smallest = NUMBER_OF_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must be at least {smallest} ({NUMBER_OF_BYTES} bytes and {len(special_tokens)} "
            f"special tokens); it is {vocab_size}."
        )
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of documents, not one string; pass [text].")

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_at_least_one(texts), trainer)
    _add_special_tokens(tokenizer, special_tokens)
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning(
            "The texts gave a vocabulary of %d ids; %d were asked for. Train on more text, or set the "
            "model's vocab_size to the smaller number.",
            tokenizer.get_vocab_size(),
            vocab_size,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _at_least_one(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise ValueError("There are no texts to learn a tokenizer from.")


def _add_special_tokens(tokenizer, special_tokens: Iterable[str]) -> None:
    """Appends the special tokens to the vocabulary and puts `<|begin_of_text|>` in front of every text, as Llama 3."""
    from tokenizers import AddedToken, processors

    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(
            single=f"{BOS_TOKEN} $A",
            pair=f"{BOS_TOKEN} $A {BOS_TOKEN}:1 $B:1",
            special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))],
        ),
    ])  # fmt: skip


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises if the tokenizer can give an id that the model has no embedding for. Changes nothing.

    Args:
        tokenizer: any tokenizer of transformers.
        config: a model's configuration; its `vocab_size` counts.

    Raises:
        ValueError: naming both numbers and what to do.
    """
    largest = max(len(tokenizer) - 1, max(tokenizer.get_vocab().values()))
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives ids up to {largest}, but the model's vocab_size is {config.vocab_size}. Use the "
            f"tokenizer the model was trained with, or give a new model a vocab_size of at least {largest + 1}."
        )
