"""Run a script's own `main` on given rollouts, and record its gradients, weights and numbers.

Nothing of the script is retyped, and little of it is touched: its `rollout`, if any, is replaced,
models, data and rewards are named by its ordinary flags, gradients are read where its optimizers
step, and numbers where TensorBoard gets them.
"""

import dataclasses
import random
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.tensorboard import SummaryWriter

import common
from helpers.oracle import Row
from plumbing import load_module

ROOT = Path(__file__).parents[2]


def token_logprobs(model, prompt, response, temperature):
    """Log-probs of one response's tokens, of a row alone and without padding: a list of floats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]  # (L, V)
    logprobs = (logits / temperature).log_softmax(-1)
    return [logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]


def random_responses(policy, words, eos, k, temperature, length, seed, prompt_ids):
    """k Rows for each prompt: they end at once, early, late, at the very last token or never."""
    rows = []
    for number, prompt in enumerate(prompt_ids):
        choose = random.Random(f"{seed} {number}")
        for sample in range(k):
            ends = (choose.choice([1, 2, length - 1, length, None])
                    if (number, sample) != (0, 0) else None)
            body = [choose.choice(words) for _ in range((ends or length + 1) - 1)]
            response = body + [eos] * (ends is not None)
            logprobs = token_logprobs(policy, prompt, response, temperature)
            rows.append(Row(list(prompt), response, ends is not None, logprobs, {}))
    return rows


def as_batch(rows, pad_id):
    """The project's Batch of given Rows, padded by hand."""
    P, T = max(len(row.prompt) for row in rows), max(len(row.response) for row in rows)
    before, after = [P - len(row.prompt) for row in rows], [T - len(row.response) for row in rows]
    return common.Batch(
        torch.tensor([[pad_id] * n + row.prompt for row, n in zip(rows, before)]),
        torch.tensor([[False] * n + [True] * (P - n) for n in before]),
        torch.tensor([row.response + [pad_id] * n for row, n in zip(rows, after)]),
        torch.tensor([[True] * (T - n) + [False] * n for n in after]),
        torch.tensor([row.ended for row in rows]),
        torch.tensor([[*row.old_logprobs, *[0.0] * n] for row, n in zip(rows, after)]))


def as_rows(batch):
    """The Rows of a Batch: lists without padding."""
    rows = []
    for i in range(len(batch)):
        mask = batch.response_mask[i]
        prompt = batch.prompts[i][batch.prompt_mask[i]].tolist()
        logprobs = batch.old_logprobs[i][mask].tolist()
        rows.append(Row(prompt, batch.responses[i][mask].tolist(), bool(batch.ended[i]), logprobs,
                        {}))
    return rows


@contextmanager
def float64():
    """Make new tensors float64, as the models are: the scripts' own, such as that of the scores."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def clone(tensors):
    return [None if tensor is None else getattr(tensor, "full_tensor", lambda t=tensor: t)().clone()
            for tensor in tensors]


def record(script, output, rollout=None, frozen=False, **flags):
    """Run `main` of a script with these flags in float64.

    Args: script (path, or name of a file of the project); output (run folder); rollout (a function
    (update, prompt_ids, args, greedy) -> Rows that replaces sampling; update counts from 0); frozen
    (True: the weights stay what they are in the beginning, so that every update's gradient is taken
    there); flags.
    Returns: a namespace of args; steps (for each optimizer, in the order of its first step, a list
    with the gradients of each step); metrics (one dict per update); evaluations (dict update ->
    dict); models (the trained ones' parameters at the end, as in steps); rollouts (for each update
    the prompts that it asked for); samples (the Batches of the evaluations); orders (what
    torch.randperm returned, in turn); draws (what torch.randn returned, in turn); texts (dict
    update -> the sampled responses' table in TensorBoard, a list of rows of cells); returned (the
    weights of the model that main returned).
    """
    path = str(script) if str(script).endswith(".py") else str(ROOT / f"{script}.py")
    module = load_module(path)
    names = {field.name for field in dataclasses.fields(module.Args)}
    args = module.Args(**{name: value for name, value in flags.items() if name in names},
                       output=str(output))
    seen = SimpleNamespace(args=args, steps=[], metrics={}, evaluations={}, rollouts=[], samples=[],
                           orders=[], draws=[], texts={})
    optimizers = []

    def given(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, at_once=None,
              greedy=False):
        expected = (1 if greedy else args.k, args.temperature, args.max_new_tokens)
        assert (k, temperature, max_new_tokens) == expected, "the rollout is not what the flags say"
        assert next(policy.parameters()).requires_grad, (
            "the rollout is not from the policy that is trained")
        if not greedy:
            seen.rollouts.append(prompt_ids)
        return as_batch(rollout(len(seen.rollouts) - 1, prompt_ids, args, greedy),
                        tokenizer.pad_token_id)

    def hook(optimizer, *_):
        if optimizer not in optimizers:
            optimizers.append(optimizer)
            seen.steps.append([])
        parameters = optimizer.param_groups[0]["params"]
        seen.steps[optimizers.index(optimizer)].append(clone(parameter.grad
                                                             for parameter in parameters))
        if frozen:
            for parameter in parameters:
                parameter.grad.zero_()  # Adam does not move without a gradient

    def add_scalar(self, name, value, step, **_):
        if name.startswith("eval/"):
            seen.evaluations.setdefault(step, {})[name.removeprefix("eval/")] = value
        else:
            seen.metrics.setdefault(step, {})[name] = value

    def add_text(self, name, text, step=None, **_):
        if name == "samples":
            seen.texts[step] = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]

    def evaluated(*args, real=common.rollout, **kwargs):
        seen.samples.append(real(*args, **kwargs))
        return seen.samples[-1]

    def randperm(*args, real=torch.randperm, **kwargs):
        seen.orders.append(real(*args, **kwargs).tolist())
        return torch.tensor(seen.orders[-1])

    def randn(*args, real=torch.randn, **kwargs):
        seen.draws.append(real(*args, **kwargs))
        return seen.draws[-1]

    with ExitStack() as stack:
        stack.enter_context(float64())
        stack.enter_context(patch.object(SummaryWriter, "add_scalar", add_scalar))
        stack.enter_context(patch.object(SummaryWriter, "add_text", add_text))
        stack.enter_context(patch.object(torch, "randperm", randperm))
        stack.enter_context(patch.object(torch, "randn", randn))
        stack.enter_context(patch.object(common, "rollout", evaluated))
        if rollout and hasattr(module, "rollout"):
            stack.enter_context(patch.object(module, "rollout", given))
        stack.callback(register_optimizer_step_pre_hook(hook).remove)
        seen.returned = clone(module.main(args).parameters())
    seen.models = [clone(optimizer.param_groups[0]["params"]) for optimizer in optimizers]
    seen.metrics = [seen.metrics[step] for step in sorted(seen.metrics)]
    return seen
