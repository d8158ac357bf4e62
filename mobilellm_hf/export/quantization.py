"""Linear layers and the embedding in 4 or 8 bits (Appendix C), each layer accounted for.

    quantization = Quantization.for_config("8da4w", model.config)
    layers = quantization.apply(model)              # in place; name -> what it became, read back from the weights

`8da4w` is the paper's: weights in 4 bits with a scale for every group of 32 or 128 inputs, activations in 8 bits with
a scale a token, chosen as the model runs. A Linear that the group does not divide is an error, or falls back to 8
bits with a scale a row when that is asked for; torchao on its own would leave it in fp32 without a word. Scales are
rounded to bfloat16 at once, since XNNPACK stores them so: the model in eager is then the model on the device.

An embedding that is tied to the head stays one table with it, integers and scales, wherever both have as many bits: so
the file stores it once. Otherwise each gets scales of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mobilellm_hf.export.requirements import need_executorch

SCHEMES = ("none", "bf16", "8da8w", "8da4w")
EMBEDDINGS = ("none", "4w", "8w")
# XNNPACK's kernels take groups of a multiple of this.
GROUP_STEP = 32
# Appendix C: 128, but 32 for the 140M, whose width of 576 is no multiple of 128.
PAPER_GROUPS = (128, 32)
BITS = {"8da4w": 4, "8da8w": 8, "4w": 4, "8w": 8}
# The embedding that has the bits of such a head; in bf16 the head is stored transposed.
SAME_AS = {"none": "none", "8da8w": "8w", "8da4w": "4w"}


@dataclass(frozen=True)
class Quantization:
    """How a model is stored.

    Attributes:
        linear: `none` (fp32), `bf16` (everything), `8da8w` (a scale a row) or `8da4w` (a scale a group).
        group_size: inputs that share a scale in `8da4w`; None in the others.
        embedding: `none`, `4w` or `8w`.
        embedding_group_size: columns of the embedding that share a scale; 0: a whole row.
        one_table: the embedding is tied to the head and quantized like it: its values are the head's.
        fall_back: a Linear that the group does not divide becomes `8da8w`.
    """

    linear: str = "8da4w"
    group_size: int | None = 32
    embedding: str = "4w"
    embedding_group_size: int = 0
    fall_back: bool = False
    one_table: bool = False

    @classmethod
    def for_config(
        cls,
        linear: str,
        config: PreTrainedConfig,
        *,
        group_size: int | None = None,
        embedding: str | None = None,
        embedding_group_size: int | None = None,
        fall_back: bool = False,
    ) -> Quantization:
        """What is not given: the paper's group size for this model, a 4-bit embedding beside quantized layers, and
        for the embedding the scales of the head that it is tied to, else one a row.

        Raises:
            ValueError: a name is unknown, or a size does not fit the model; the message names the field.
        """
        if linear not in SCHEMES:
            raise ValueError(f"quantize={linear!r} must be one of {', '.join(SCHEMES)}")
        if group_size is not None and linear != "8da4w":
            raise ValueError(f"group_size={group_size} is of 8da4w; quantize is {linear!r}, leave it out")
        if embedding is None:
            embedding = "4w" if linear.startswith("8da") else "none"
        if embedding not in EMBEDDINGS:
            raise ValueError(f"embedding={embedding!r} must be one of {', '.join(EMBEDDINGS)}")
        if linear == "8da4w" and group_size is None:
            widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
            fitting = [size for size in PAPER_GROUPS if all(width % size == 0 for width in widths)]
            group_size = fitting[0] if fitting else PAPER_GROUPS[-1]
        made = cls(linear, group_size, embedding, embedding_group_size or 0, fall_back)
        made._check(config)
        return made._as_one_table(config, embedding_group_size)

    def _as_one_table(self, config: PreTrainedConfig, asked: int | None) -> Quantization:
        """With the embedding as a part of the head, if it can be and no other group size is asked for."""
        of_head = self.group_size or 0
        head_has_groups = config.hidden_size % (self.group_size or 1) == 0  # else it falls back to a scale a row
        if not config.tie_word_embeddings or not head_has_groups:
            return self
        if self.embedding != SAME_AS.get(self.linear) or asked not in (None, of_head):
            return self
        return replace(self, embedding_group_size=of_head, one_table=True)

    def _check(self, config: PreTrainedConfig) -> None:
        if self.group_size is not None and (self.group_size < 1 or self.group_size % GROUP_STEP):
            raise ValueError(f"group_size={self.group_size} must be a multiple of {GROUP_STEP}: XNNPACK has no other")
        size = self.embedding_group_size
        if size and self.embedding == "none":
            raise ValueError(f"embedding_group_size={size}, but the embedding is not quantized: embedding is 'none'")
        if size < 0 or size % 2 or (size and config.hidden_size % size):
            raise ValueError(f"embedding_group_size={size} must be even and divide hidden_size={config.hidden_size}")

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantized."""
        return torch.bfloat16 if self.linear == "bf16" else torch.float32

    def stores(self, name: str, module: nn.Module) -> tuple[str, int]:
        """What a module's weight becomes, and how many of its inputs share a scale (0: it has none).

        Raises:
            ValueError: the group does not divide a Linear and `fall_back` is off.
        """
        if isinstance(module, nn.Embedding) and self.embedding != "none":
            return self.embedding, self.embedding_group_size or module.embedding_dim
        if not isinstance(module, nn.Linear) or self.linear in ("none", "bf16"):
            return str(self.dtype).removeprefix("torch."), 0
        in_features = module.in_features
        if self.linear == "8da8w":
            return "8da8w", in_features
        if in_features % self.group_size == 0:
            return "8da4w", self.group_size
        if self.fall_back:
            return "8da8w", in_features
        raise ValueError(
            f"group_size={self.group_size} does not divide the {in_features} inputs of {name}: take a multiple of "
            f"{GROUP_STEP} that does, or group_fall_back: true, which gives such layers 8 bits and a scale a row"
        )

    def apply(self, model: PreTrainedModel) -> dict[str, QuantizedLayer]:
        """Quantizes in place and reads back what every Linear and Embedding has become.

        Raises:
            ValueError: the group does not divide a Linear, or embedding and head are no one table; before anything is
                changed.
            RuntimeError: a layer did not become what was asked for.
        """
        need_executorch()
        wanted = {
            name: self.stores(name, module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
        }
        embedding = model.get_input_embeddings()
        if self.one_table and embedding.weight is not model.lm_head.weight:
            # Where the head has a scale a row, or none, no other size leaves the embedding apart.
            apart = "give embedding_group_size: 0, which leaves them apart, or " if self.group_size else ""
            raise ValueError(
                "tie_word_embeddings is true, and the weights of embedding and head differ: "
                f"{apart}save the model with tie_word_embeddings: false"
            )
        model.to(self.dtype).requires_grad_(False)
        of_head = {embedding} if self.one_table and self.embedding != "none" else set()
        _quantize(model, wanted, of_head)
        if of_head:
            embedding.weight = nn.Parameter(
                with_fields(model.lm_head.weight, activation_quantization=None), requires_grad=False
            )
        found = {name: read_back(model.get_submodule(name).weight) for name in wanted}
        for name, (scheme, group_size) in wanted.items():
            if (found[name].scheme, found[name].group_size) != (scheme, group_size):
                raise RuntimeError(f"{name} was to become {scheme} with groups of {group_size} and is {found[name]}")
        return found


@dataclass(frozen=True)
class QuantizedLayer:
    """What a weight is: `8da4w` ... or the name of a dtype, and how many inputs share a scale (0: it has none)."""

    scheme: str
    group_size: int
    shape: tuple[int, ...]


def read_back(weight: torch.Tensor) -> QuantizedLayer:
    """What is in a weight, whatever it was meant to be."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    if not isinstance(weight, IntxUnpackedToInt8Tensor):
        return QuantizedLayer(str(weight.dtype).removeprefix("torch."), 0, tuple(weight.shape))
    bits = str(weight.target_dtype).removeprefix("torch.int")
    prefix = "8da" if weight.activation_quantization else ""
    return QuantizedLayer(f"{prefix}{bits}w", weight.block_size[-1], tuple(weight.shape))


def with_fields(weight: torch.Tensor, **changes) -> torch.Tensor:
    """A quantized weight with some of its parts replaced, the others not copied."""
    names = (*weight.tensor_data_names, *weight.tensor_attribute_names)
    return type(weight)(**{name: getattr(weight, name) for name in names} | changes)


def _quantize(model: PreTrainedModel, wanted: Mapping[str, tuple[str, int]], left_out: Set[nn.Module]) -> None:
    from torchao.quantization import quantize_

    for scheme in sorted({entry for entry in wanted.values() if entry[0] in BITS}):
        quantize_(
            model,
            _torchao_config(*scheme),
            lambda module, name, scheme=scheme: wanted.get(name) == scheme and module not in left_out,
        )
    for name, (scheme, _) in wanted.items():
        if scheme == "8da4w":
            weight = model.get_submodule(name).weight
            weight.scale = weight.scale.bfloat16().float()


def _torchao_config(scheme: str, group_size: int):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    dtype = getattr(torch, f"int{BITS[scheme]}")
    # Scales that make the squared error of the weights small, which rounding to the largest of a group does not.
    algorithm = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    if scheme.startswith("8da"):
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=PerGroup(group_size), intx_choose_qparams_algorithm=algorithm
        )
    return IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=PerGroup(group_size), intx_choose_qparams_algorithm=algorithm
    )
