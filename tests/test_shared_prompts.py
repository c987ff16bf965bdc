"""Rows that share their prompt's pass: log-probs, values, scores and gradients stay the same."""

import pytest
import torch
from helpers.families import FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common import Batch, classifier_scores, microbatches, token_logprobs, token_values

LAYER_NORM = ("gpt2", "neox", "opt")  # the others' RMSNorm computes in float32 in any case


def ragged_batch(vocabulary, ks, seed=0):
    """Prompts of 3 to 13 tokens, prompt i with ks[i] responses of 1 to 10 tokens.

    Some are equal up to padding.
    """
    draw = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))
    N, P, T = sum(ks), 13, 10
    batch = Batch(torch.zeros(N, P, dtype=torch.long), torch.zeros(N, P, dtype=torch.bool),
                  torch.zeros(N, T, dtype=torch.long), torch.zeros(N, T, dtype=torch.bool),
                  torch.ones(N, dtype=torch.bool), torch.zeros(N, T, dtype=torch.float64))
    row = 0
    for k in ks:
        prompt = torch.randint(vocabulary, (number(3, P),), generator=draw)
        for _ in range(k):
            response = torch.randint(vocabulary, (number(1, T),), generator=draw)
            (batch.prompts[row, P - len(prompt) :],
             batch.prompt_mask[row, P - len(prompt) :]) = prompt, True
            (batch.responses[row, : len(response)],
             batch.response_mask[row, : len(response)]) = response, True
            row += 1
    return batch[torch.randperm(N, generator=draw)]  # as mini-batches mix them


def make(name, dtype, auto_class=AutoModelForCausalLM, **kwargs):
    torch.manual_seed(0)
    config = FAMILIES[name]()[1]
    config.update(kwargs)
    model = auto_class.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def outcome(model, function, batch, shares_prompts, max_tokens=10_000):
    """The function's values for each row, and the gradient of their weighted sum, in parts."""
    model.is_fast, model.shares_prompts = True, shares_prompts
    model.zero_grad()
    found = {}
    weights = torch.arange(1.0, 1 + batch.responses.numel(),
                           dtype=torch.float64).view(batch.responses.shape).sin()
    for rows in microbatches(model, max_tokens, batch):
        values = function(model, batch[rows])
        (values * weights[rows].view(len(rows), -1)[:, : values.view(len(rows), -1).shape[1]]
         .reshape(values.shape)).sum().backward()
        found |= dict(zip(rows.tolist(), values.detach()))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.stack([found[row] for row in range(len(batch))]), gradient


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected):
        assert (a - b).abs().max() < tolerance * max(1, b.abs().max())


LOGPROBS = lambda model, batch: token_logprobs(model, batch, 0.7)


@pytest.mark.parametrize("dtype", [torch.float64,
                                   pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ks", [(1, 2, 3, 4, 5), (2, 2), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_logprobs_are_those_of_the_plain_pass(name, ks, dtype):
    model = make(name, dtype)
    batch = ragged_batch(FAMILIES[name]()[0].vocab_size, ks)
    plain, shared = (outcome(model, LOGPROBS, batch, shares) for shares in (False, True))
    assert_same(shared, plain, 1e-10 if dtype == torch.float64 and name in LAYER_NORM else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("function", [token_values, classifier_scores])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_shared_values_and_scores_are_those_of_the_plain_pass(name, function):
    model = make(name, torch.float64, AutoModelForSequenceClassification, num_labels=1)
    batch = ragged_batch(FAMILIES[name]()[0].vocab_size, (3, 1, 4))
    plain, shared = (outcome(model, function, batch, shares) for shares in (False, True))
    assert_same(shared, plain, 1e-10 if name in LAYER_NORM else 1e-5)


@pytest.mark.parametrize("max_tokens", [1, 50, 100, 200])
def test_the_gradient_does_not_depend_on_which_siblings_meet(max_tokens):
    model, batch = make("gpt2", torch.float64), ragged_batch(300, (4, 3, 1, 4))
    plain, parts = (outcome(model, LOGPROBS, batch, False),
                    outcome(model, LOGPROBS, batch, True, max_tokens))
    assert_same(parts, plain, 1e-10)


def tokens_through(model, batch, shares_prompts):
    seen = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel()))
    model.is_fast, model.shares_prompts = True, shares_prompts
    token_logprobs(model, batch, 1.0)
    handle.remove()
    return sum(seen)


def test_a_prompt_runs_once_and_without_siblings_nothing_changes():
    model = make("gpt2", torch.float64)
    batch = ragged_batch(300, (4,))
    # The last token is only predicted.
    P, read = int(batch.prompt_mask[0].sum()), batch.response_mask.sum(1) - 1
    assert tokens_through(model, batch, False) == 4 * (P + int(read.max()))
    assert P + int(read.sum()) <= tokens_through(model, batch, True) <= P + int(read.sum()) / 0.75
    alone = ragged_batch(300, (1, 1, 1))
    assert tokens_through(model, alone, True) == tokens_through(model, alone, False)


def test_siblings_stay_together():
    batch = ragged_batch(300, (4, 4, 4, 4))
    numbers = batch.prompts.masked_fill(~batch.prompt_mask, -1).unique(
        dim=0, return_inverse=True)[1]
    model = make("gpt2", torch.float64)
    model.is_fast = model.shares_prompts = True
    parts = list(microbatches(model, 4 * 13, batch))
    assert len(parts) > 2 and sorted(torch.cat(parts).tolist()) == list(range(16))
    assert len(numbers[torch.cat(parts)].unique_consecutive()) == 4


def test_equal_ids_with_another_padding_are_another_prompt():
    """The pad id may be a word: "<pad> a" and "a" are the same row of ids with different masks."""
    model, batch = make("gpt2", torch.float64), ragged_batch(300, (2,))
    batch.prompts[1], batch.prompt_mask[1, -4:] = batch.prompts[0], True
    batch.prompt_mask[1, :-4] = False
    assert_same(outcome(model, LOGPROBS, batch, True), outcome(model, LOGPROBS, batch, False),
                1e-10)
