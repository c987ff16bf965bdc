"""lab/memory.py against what is really kept: exact for weights and Adam, within bounds for activations."""

from pathlib import Path

import pytest
import torch
from helpers.families import neox
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from common import Batch, token_logprobs
from plumbing import load_model, load_module

lab = load_module(str(Path(__file__).parent.parent / "lab" / "memory.py"))

SHAPE = dict(vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
CONFIGS = {"llama": LlamaConfig(**SHAPE, num_key_value_heads=2), "neox": GPTNeoXConfig(**SHAPE)}


def batch(n, prompt_length, response_length):
    torch.manual_seed(0)
    prompts = torch.randint(0, 1000, (n, prompt_length))
    responses = torch.randint(0, 1000, (n, response_length))
    mask = torch.ones_like(responses).bool()
    return Batch(prompts, torch.ones_like(prompts).bool(), responses, mask, mask[:, 0], mask.float())


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_gradients_and_adam_are_exact(family):
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    optimizer = torch.optim.Adam(model.parameters())
    token_logprobs(model, batch(2, 4, 4), 1.0).sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parts = lab.memory(CONFIGS[family], critics=1, frozen=1, samples=1, prompt_length=1, response_length=1)
    assert parts["trained"] == 2 * found
    assert parts["frozen"] == found // 4
    assert lab.memory(CONFIGS[family], 1, 1, 1, 1, 1, processes=4)["trained"] == found // 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_activations_are_estimated_within_a_quarter(family, checkpointing, dtype, tmp_path):
    """Measured: the bytes of all tensors that autograd saves in one micro-batch, each storage once, without weights."""
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    neox()[0].save_pretrained(tmp_path)  # any tokenizer
    model = load_model(str(tmp_path), torch.device("cpu"), dtype, gradient_checkpointing=checkpointing)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    shape = 8, 96, 32  # rows, tokens of prompt and of response
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(model, batch(*shape), 0.7)
    found = sum(storage.nbytes() for storage in saved.values())
    tokens = shape[0] * (shape[1] + shape[2])
    bfloat16 = dtype == "bfloat16"
    estimate = lambda checkpointing: lab.memory(CONFIGS[family], 0, 0, *shape, tokens, checkpointing, bfloat16)[
        "update"
    ]
    if checkpointing:  # the estimate has one layer more, which is there when the backward pass runs it again
        assert found < estimate(True) < estimate(False)
    else:
        assert 0.8 < estimate(False) / found < 1.25


def test_rollout_cache_is_what_the_model_makes():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    cache = model(torch.zeros((6, 10), dtype=torch.long), use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert lab.memory(CONFIGS["llama"], 0, 0, 6, 7, 3)["rollout"] == found
