"""What a run needs: tools/memory.py against what is kept, casts, micro-batches and threads."""

import importlib
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES, neox, save_family
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import rloo
from common import Batch, no_grad_logprobs, rollout, token_logprobs
from lab.family import FAMILY, SAMPLING
from plumbing import load_classifier, load_model, load_tokenizer, processes, prompt_tokens
from plumbing.models import fitting_tokens, freeze
from plumbing.processes import pick_threads
from tools import memory

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHAPE = dict(vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
             intermediate_size=512)
CONFIGS = {"llama": LlamaConfig(**SHAPE, num_key_value_heads=2), "neox": GPTNeoXConfig(**SHAPE)}


def batch(n, prompt_length, response_length):
    torch.manual_seed(0)
    prompts = torch.randint(0, 1000, (n, prompt_length))
    responses = torch.randint(0, 1000, (n, response_length))
    mask = torch.ones_like(responses).bool()
    return Batch(prompts, torch.ones_like(prompts).bool(), responses, mask, mask[:, 0],
                 mask.float())


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_gradients_and_adam_are_exact(family):
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    optimizer = torch.optim.Adam(model.parameters())
    token_logprobs(model, batch(2, 4, 4), 1.0).sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    for state in optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parts = memory.memory(CONFIGS[family], critics=1, frozen=1, samples=1, prompt_length=1,
                          response_length=1)
    assert parts["trained"] == 2 * found
    assert parts["frozen"] == found // 4
    assert memory.memory(CONFIGS[family], 1, 1, 1, 1, 1, processes=4)["trained"] == found // 2


@pytest.mark.parametrize("family", CONFIGS)
def test_frozen_weights_in_bfloat16_are_exact_but_for_norms(family):
    model = freeze(AutoModelForCausalLM.from_config(CONFIGS[family]), "bfloat16")
    found = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    estimate = memory.memory(CONFIGS[family], 1, 1, 1, 1, 1, bfloat16=True)["frozen"]
    assert estimate <= found < 1.005 * estimate
    sharded = memory.memory(CONFIGS[family], 1, 1, 1, 1, 1, bfloat16=True, processes=2)["frozen"]
    assert sharded == 2 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_activations_are_estimated_within_a_quarter(family, checkpointing, dtype, tmp_path):
    """Measured: the bytes of what autograd saves in one micro-batch.

    That is of all tensors, each storage once, without weights.
    """
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    neox()[0].save_pretrained(tmp_path)  # any tokenizer
    model = load_model(str(tmp_path), torch.device("cpu"), dtype,
                       gradient_checkpointing=checkpointing)
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

    def estimate(checkpointing):
        parts = memory.memory(CONFIGS[family], 0, 0, *shape, tokens, checkpointing,
                              dtype == "bfloat16")
        return parts["update"]

    if checkpointing:  # the estimate has one layer more, for when the backward pass runs it again
        assert found < estimate(True) < estimate(False)
    else:
        assert 0.8 < estimate(False) / found < 1.25


def test_rollout_cache_is_what_the_model_makes():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    cache = model(torch.zeros((6, 10), dtype=torch.long), use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.memory(CONFIGS["llama"], 0, 0, 6, 7, 3)["rollout"] == found


def test_estimates_by_hand():
    """For 10 tokens, half of them of responses.

    The llama has 1,240,192 parameters, 128,000 of them in each embedding.
    """
    def update(family, **more):
        return memory.memory(CONFIGS[family], 0, 0, 1, 1, 1, microbatch_tokens=10, **more)["update"]

    saved = {"gradient_checkpointing": True}
    logits = 1000 // 2 * (4 + 12)
    # Hidden vectors, keys and values of 2 heads, gate, up and their products.
    layer = 4 * (6 * 128 + 2 * 64 + 4 * 512)
    assert update("llama") == 10 * (4 * layer + logits) == 551_040
    assert update("llama", **saved) == 10 * (4 * 4 * 128 + layer + logits) == 218_240
    assert update("neox") == 10 * (4 * 4 * (6 * 128 + 2 * 128 + 2 * 512) + logits) == 407_680
    silu = GPTNeoXConfig(**SHAPE, hidden_act="silu")  # another activation is no gate
    assert memory.memory(silu, 0, 0, 1, 1, 1, microbatch_tokens=10)["update"] == update("neox")
    logits, layer = 1000 // 2 * (2 + 12), 30 * 128 + 2 * (2 * 64 + 4 * 512)
    assert update("llama", bfloat16=True) == 10 * (4 * layer + logits) + 2 * 1_240_192 == 2_878_064
    assert update("llama", bfloat16=True, **saved) == (
        10 * (4 * 4 * 128 + layer + logits) + 2 * (128_000 + 1_112_192 // 4)) == 984_496
    assert update("neox", bfloat16=True, **saved) < update("neox", bfloat16=True)

    tied = LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)
    frozen = lambda config: memory.memory(config, 0, 3, 1, 1, 1, bfloat16=True)["frozen"]
    assert frozen(CONFIGS["llama"]) == 3 * (4 * 1_240_192 - 2 * (1_240_192 - 2 * 128_000))
    assert frozen(tied) == 3 * (4 * 1_112_192 - 2 * (1_112_192 - 128_000))
    assert memory.memory(tied, 0, 0, 6, 7, 3, bfloat16=True)["rollout"] == 6 * 10 * 4 * 2 * 64 * 2


def test_the_scripts_with_a_critic_are_those_of_the_family_that_have_one():
    scripts = {name: importlib.import_module(name) for name in SAMPLING}
    assert {name: FAMILY[name].critic for name in SAMPLING} == {
        name: hasattr(script.Args, "critic") for name, script in scripts.items()}


def test_the_command_passes_its_flags_on_and_prints_the_peak(monkeypatch, capsys):
    parts, calls = {"trained": 4e9, "frozen": 2e9, "update": 1e9, "rollout": 3e9}, []

    def note(config, *given):
        calls.append((config.hidden_size, *given))
        return parts

    monkeypatch.setattr(memory, "memory", note)
    memory.main(memory.Args())
    memory.main(memory.Args(algorithm="ppo", reward_function=True, samples=1, prompt_length=2,
                            response_length=3, microbatch_tokens=4, gradient_checkpointing=True,
                            bfloat16=True, processes=5))
    assert calls == [(64, 0, 2, 64, 512, 128, 8192, False, False, 1),
                     (64, 1, 1, 1, 2, 3, 4, True, True, 5)]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:5]] == [
        ["trained", "4.000", "GB"], ["frozen", "2.000", "GB"], ["update", "1.000", "GB"],
        ["rollout", "3.000", "GB"], ["peak", "9.000", "GB"]]
    assert memory.total(parts | {"update": 7e9}) == 13e9


def test_the_page_has_the_table_of_recipes(capsys):
    memory.main(memory.Args(recipes=True))
    assert "\n\n" + capsys.readouterr().out + "\n" in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_in_bfloat16_is_smaller_and_gives_the_same_numbers(family, tmp_path):
    model = load_model(save_family(tmp_path, family), CPU, "bfloat16")
    tokenizer = load_tokenizer(str(tmp_path))
    prompt_ids = prompt_tokens(tokenizer, ["The cat sat", "What is 2 + 3?"], "test")
    torch.manual_seed(0)
    sampled = rollout(model, tokenizer, prompt_ids, 2, 1.0, 6)
    before = no_grad_logprobs(model, sampled, 1.0, 100)
    layers = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    frozen = freeze(model, "bfloat16")
    assert torch.equal(no_grad_logprobs(frozen, sampled, 1.0, 100), before)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.dtype == torch.bfloat16 for p in layers)
    assert sum(p.numel() for p in frozen.parameters() if p.dtype == torch.bfloat16) > 1000
    embedding = frozen.get_input_embeddings().weight
    assert embedding.dtype == torch.float32  # what is added to it stays exact
    again = freeze(load_model(str(tmp_path), CPU), "float32")
    assert {p.dtype for p in again.parameters()} == {torch.float32}


class Casts(TorchDispatchMode):
    """Counts casts of matrices of one shape to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cast = function is torch.ops.aten._to_copy.default
        cast = cast and kwargs.get("dtype") == torch.bfloat16
        self.count += cast and args[0].shape == self.shape
        return function(*args, **kwargs)


def test_a_rollout_in_bfloat16_casts_each_weight_once(world):
    policy, tokenizer = load_model(world.policy, CPU, "bfloat16"), load_tokenizer(world.policy)
    with Casts(policy.model.layers[0].mlp.up_proj.weight.shape) as casts:
        batch = rollout(policy, tokenizer, [[2, 3], [4]], 3, 1.0, 6)
    assert batch.responses.shape[1] > 2
    assert casts.count == 2 * 2  # gate and up of two layers


def test_microbatches_fit_the_model_on_a_cpu(tmp_path):
    shape = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8)
    LlamaConfig(**shape, vocab_size=8192).save_pretrained(tmp_path / "medium")
    LlamaConfig(**shape, vocab_size=128_000).save_pretrained(tmp_path / "words")
    assert fitting_tokens(rloo.Args().model, CPU) == 8192
    medium = 2**27 // (24 * 8 * 512 + 3 * 8192)
    assert fitting_tokens(str(tmp_path / "medium"), CPU) == medium == 1092
    assert fitting_tokens(str(tmp_path / "words"), CPU) == 278
    assert fitting_tokens(str(tmp_path / "words"), torch.device("cuda")) == 8192
    assert fitting_tokens("file.py:model", CPU) == 8192


@pytest.fixture
def threads(monkeypatch):
    """Pretends that there are 4 threads, and that a table (number -> seconds) says how fast."""
    state = {"now": 4, "speed": {}}

    class Timer:
        def __init__(self, call):
            call()

        def autorange(self):
            return 10, 10 * state["speed"][state["now"]]

    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["now"])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: state.update(now=number))
    monkeypatch.setattr(processes.timeit, "Timer", Timer)
    return state


@pytest.mark.parametrize("speed, expected", [
    ({1: 3.0, 2: 2.0, 4: 1.0}, 4),
    ({1: 0.8, 2: 0.9, 4: 1.0}, 4),  # not clearly faster
    ({1: 0.5, 2: 0.6, 4: 9.0}, 1),
    ({1: 1.0, 2: 0.5, 4: 9.0}, 2),
])
def test_threads_are_fewer_where_the_model_is_clearly_faster(speed, expected, world, threads,
                                                             capsys):
    threads["speed"] = speed
    pick_threads(load_model(world.policy, CPU))
    assert threads["now"] == expected
    assert f"{expected} of 4 threads" in capsys.readouterr().out


def test_the_users_number_of_threads_stays(world, threads, monkeypatch, capsys):
    """For a reward model without a pad token, too, where transformers takes one row at most."""
    model = load_classifier(world.reward, CPU)
    threads["speed"] = {1: 0.1, 2: 1.0, 4: 1.0}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    pick_threads(model)
    assert threads["now"] == 4 and capsys.readouterr().out == ""
    monkeypatch.delenv("OMP_NUM_THREADS")
    pick_threads(model)
    assert threads["now"] == 1


def test_a_resumed_run_keeps_its_number_of_threads(world, threads, monkeypatch, tmp_path):
    """Also if another is faster today, but not against OMP_NUM_THREADS."""
    flags, folder = world.flags | {"num_updates": 1}, str(tmp_path / "run")
    threads["speed"] = {1: 9.0, 2: 0.1, 4: 9.0}
    rloo.main(rloo.Args(**flags, output=folder))
    assert threads["now"] == 2
    threads |= {"now": 4, "speed": {1: 0.1, 2: 9.0, 4: 9.0}}
    rloo.main(rloo.Args(**flags | {"num_updates": 2}, resume=folder))
    assert threads["now"] == 2
    threads["now"] = 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    rloo.main(rloo.Args(**flags | {"num_updates": 3}, resume=folder))
    assert threads["now"] == 4
