"""Estimate a run's memory from its models' configurations.

    python -m tools.memory --model EleutherAI/pythia-1b --algorithm ppo
    python -m tools.memory --recipes        # the table in docs/scaling.md

Parameter counts are exact (the model is built without storage), and so are the bytes kept for each
parameter: 16 if trained (weight, gradient, Adam's two moments), 4 if frozen, or 2 within the layers
in bfloat16 without --shard. The activations of a micro-batch, from what a transformer keeps for its
backward pass, and the logits are estimates; `tests/test_memory.py` compares them with a measured
case.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from lab.family import FAMILY, SAMPLING
from plumbing import stop
from plumbing.errors import explain

CONFIGS = {  # the published sizes, so that the table needs no network access
    "pythia-1b": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8,
        intermediate_size=8192),
    "pythia-6.9b": GPTNeoXConfig(
        vocab_size=50432, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        intermediate_size=16384),
    "llama-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        intermediate_size=11008),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True),
}
# Model, whether the reward is a model too, responses sampled at once, prompt and response tokens.
RECIPES = {
    "TL;DR, Pythia-1B": ("pythia-1b", True, 128, 512, 53),
    "TL;DR or HH, Pythia-6.9B": ("pythia-6.9b", True, 16, 512, 128),
    "HH, Llama-7B": ("llama-7b", True, 16, 512, 128),
    "GSM8K, Qwen2.5-0.5B": ("qwen2.5-0.5b", False, 256, 256, 300),
}


def count_parameters(config):
    """Number of parameters of a causal LM, counting tied ones once.

    It is built on the meta device, so it uses no memory.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def memory(config, critics, frozen, samples, prompt_length, response_length,
           microbatch_tokens=8192, gradient_checkpointing=False, bfloat16=False, processes=1):
    """Peak bytes on each device, by part.

    Args: config (the policy's; critic and reward model are assumed to be as large); critics (number
    of trained models besides the policy); frozen (number of models that are not trained); samples
    (responses a process samples at once); prompt_length and response_length (the longest, in
    tokens); microbatch_tokens; gradient_checkpointing; bfloat16 (autocast); processes (more than
    one: --shard).
    Returns: dict name -> bytes: "trained", "frozen", "update" (activations and logits of a
    micro-batch), "rollout" (keys and values of the samples). Update and rollout never coexist.
    """
    parameters, size = count_parameters(config), 2 if bfloat16 else 4
    layers, embedding = config.num_hidden_layers, config.vocab_size * config.hidden_size
    used = parameters - embedding
    inside = used if config.tie_word_embeddings else used - embedding  # cast for good if frozen
    cast = 2 * inside if bfloat16 and processes == 1 else 0
    copied = embedding + (used // layers if gradient_checkpointing else used)
    # Logits of the response tokens: as the model returns them, in float32, their softmax, and its
    # gradient.
    share = response_length / (prompt_length + response_length)
    logits = share * config.vocab_size * (size + 3 * 4)
    kept = activations(config, gradient_checkpointing, bfloat16)
    tokens = samples * (prompt_length + response_length)
    return {
        "trained": (1 + critics) * 16 * parameters // processes,
        "frozen": frozen * (4 * parameters - cast) // processes,
        "update": int(microbatch_tokens * (kept + logits)) + (2 * copied if bfloat16 else 0),
        "rollout": tokens * 2 * layers * key_value_width(config) * size,
    }


def key_value_width(config):
    """How many numbers a layer's keys have per token, and its values."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", heads) * width


def activations(config, gradient_checkpointing, bfloat16):
    """Bytes that an update keeps per token for the backward pass, without logits.

    Each layer keeps its input, two norms, queries, keys, values, the attention output and its
    projection, and the feed-forward's hidden values before and after the activation. Autocast keeps
    the residual stream and the norms in float32, plus bfloat16 copies (and a bfloat16 copy of every
    weight it has used, which is not counted here).
    """
    hidden, inner, size = config.hidden_size, config.intermediate_size, 2 if bfloat16 else 4
    gated = config.hidden_act in ("silu", "gelu_pytorch_tanh") and config.model_type != "gpt_neox"
    vectors = (30 if gated else 20) if bfloat16 else 6 * 4  # bytes per hidden dimension
    layer = vectors * hidden + (2 * key_value_width(config) + (4 if gated else 2) * inner) * size
    layers = config.num_hidden_layers
    return layers * hidden * 4 + layer if gradient_checkpointing else layers * layer


def total(parts):
    """The peak: what is always in memory, plus the larger of update and rollout."""
    return parts["trained"] + parts["frozen"] + max(parts["update"], parts["rollout"])


@dataclass
class Args:
    model: str = "tasks/mini_tldr-sft"
    """policy: hub name or folder (only its config is read)"""
    algorithm: Literal[tuple(SAMPLING)] = "rloo"
    """script to estimate"""
    reward_function: bool = False
    """the reward is a python function instead of a model as large as the policy"""
    samples: int = 64
    """responses a process samples at once: prompts times k, at most --rollout-batch-size"""
    prompt_length: int = 512
    """longest prompt in tokens"""
    response_length: int = 128
    """longest response in tokens"""
    microbatch_tokens: int = 8192
    """as in the scripts"""
    gradient_checkpointing: bool = False
    """as in the scripts"""
    bfloat16: bool = False
    """--dtype bfloat16"""
    processes: int = 1
    """number of devices; --shard is assumed if more than one"""
    recipes: bool = False
    """print the table in docs/scaling.md instead"""


def print_recipes():
    """The table in docs/scaling.md."""
    print("| | parameters | RLOO, 1 GPU | PPO, 1 GPU | RLOO, 8 GPUs | PPO, 8 GPUs |\n"
          "|---|---|---|---|---|---|")
    for name, (model, reward, *sizes) in RECIPES.items():
        config = CONFIGS[model]
        peaks = [total(memory(config, critics, 1 + reward, *sizes, 8192, True, True, gpus))
                 for gpus in (1, 8) for critics in (0, 1)]
        cells = [f"{peak / 1e9:.0f} GB" for peak in peaks]
        print(f"| {name} | {count_parameters(config) / 1e9:.2f} B | {' | '.join(cells)} |")


def main(args):
    if args.recipes:
        return print_recipes()
    try:
        config = AutoConfig.from_pretrained(args.model)
    except Exception as error:
        stop(f"--model {args.model}: {explain('model', args.model, error)}")
    parts = memory(config, int(FAMILY[args.algorithm].critic), 2 - args.reward_function,
                   args.samples, args.prompt_length, args.response_length, args.microbatch_tokens,
                   args.gradient_checkpointing, args.bfloat16, args.processes)
    for name, value in (parts | {"peak": total(parts)}).items():
        print(f"{name:<10}{value / 1e9:>10.3f} GB")


if __name__ == "__main__":
    main(tyro.cli(Args))
