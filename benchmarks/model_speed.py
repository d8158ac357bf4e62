"""Training step and cached decoding of MobileLLM against transformers' models of the same shape.

    python benchmarks/model_speed.py                       # the 140M shape, about ten minutes on two cores
    python benchmarks/model_speed.py --turns 9 --threads 1

Llama4ForCausalLM computes the same function (it is the published checkpoints' own class); Qwen3ForCausalLM has a QK
norm too; LlamaForCausalLM has none and stands beside them for reference. A ratio above 1: MobileLLM is the faster or
smaller one.
"""

import argparse

import torch
from common import machine, measure_in_turns, print_table
from transformers import Llama4ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.modeling import MODEL_SIZES

OURS = "MobileLLM"


def build_models(size: str, dtype: torch.dtype, device: str) -> dict[str, torch.nn.Module]:
    config = MobileLLMConfig.for_size(size, bos_token_id=None, eos_token_id=None)
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
        "rope_parameters"
    ).split()
    shape = {name: getattr(config, name) for name in same} | dict(bos_token_id=None, eos_token_id=None)
    builders = {
        OURS: lambda: MobileLLMForCausalLM(config),
        "Llama4": lambda: Llama4ForCausalLM(config.to_llama4_text()),
        "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
        "Llama (no QK norm)": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
    }
    models = {}
    for name, build in builders.items():
        torch.manual_seed(0)
        models[name] = build().to(device=device, dtype=dtype)
    return models


def training_step(model: torch.nn.Module, input_ids: torch.Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model.train()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int):
    def decode() -> None:
        model.eval()
        model.generate(prompt, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)

    return decode


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--size", default="140M", choices=list(MODEL_SIZES), help="MobileLLM-R1 size whose shape all models take"
    )
    parser.add_argument("--batch", type=int, default=2, help="rows of a training step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt when decoding")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded, greedily, with a DynamicCache")
    parser.add_argument("--turns", type=int, default=7, help="counted turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    models = build_models(args.size, getattr(torch, args.dtype), args.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 128_000, (args.batch, args.length), generator=generator).to(args.device)
    print(machine())
    decoders = {name: decoding(model, tokens[:1, : args.prompt], args.new_tokens) for name, model in models.items()}
    weights = {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    decoded = measure_in_turns(decoders, args.turns, resident=weights)
    title = f"{args.size} shape, {args.dtype}: {args.new_tokens} tokens decoded after a prompt of {args.prompt}"
    print_table(title, decoded, OURS)
    steps = {name: training_step(model, tokens) for name, model in models.items()}
    with_adam_moments = {name: 3 * size for name, size in weights.items()}
    trained = measure_in_turns(steps, args.turns, resident=with_adam_moments)
    shape = f"{args.batch} x {args.length} tokens"
    title = f"{args.size} shape, {args.dtype}: training step (loss, gradients, AdamW), {shape}"
    print_table(title, trained, OURS)


if __name__ == "__main__":
    main()
