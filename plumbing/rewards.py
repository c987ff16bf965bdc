"""Rewards: one-label classifiers and python functions, as the flags name them. common.py scores."""

import asyncio
import copy
import inspect
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from plumbing.chat import prompt_tokens, reply_tokens, template_options
from plumbing.errors import one_line, require, stop
from plumbing.files import find, load_function, load_module
from plumbing.models import freeze, load_classifier, load_tokenizer
from plumbing.processes import rank_slice
from plumbing.tryout import check_length

OURS = {"prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "num_tokens"}  # of load_rows


@dataclass
class Reward:
    """A reward model with its tokenizer, or a python function."""

    name: str
    function: Callable | None = None  # (prompts, completions, **columns) -> numbers, as in TRL
    model: torch.nn.Module | None = None  # a causal model with a one-label head called `score`
    tokenizer: object = None
    max_tokens: int = 0  # of a micro-batch


@dataclass
class Rewards:
    """What a run maximizes, and what it only logs."""

    parts: dict  # name -> Reward: the score is their weighted sum
    weights: list  # as many
    held_out: dict  # name -> Reward: only logged
    judge: str  # what decides the win rate: "score", or the name of a held-out reward
    noise: float = 0.0  # standard deviation of the noise on each score in training


def load_reward(name, args, device, loaded=None):
    """The Reward of a name: a classifier (hub name or folder) or "path/to/file.py:function".

    Args: name; args (a script's flags); device; loaded (dict name -> Reward: those that need not be
    loaded again).
    """
    loaded = {} if loaded is None else loaded
    if name not in loaded and ".py:" in name:
        loaded[name] = Reward(name, function=load_function(name))
    elif name not in loaded:
        model = load_classifier(name, device, args.dtype, args.shard, args.plain)
        model = freeze(model, args.dtype)
        loaded[name] = Reward(name, model=model, tokenizer=load_tokenizer(name),
                              max_tokens=args.microbatch_tokens)
    return loaded[name]


def load_rewards(args, device, noise=0.0):
    """The Rewards of a run, by --reward, --reward-weights and --gold, with noise in training."""
    weights = args.reward_weights or [1.0] * len(args.reward)
    require(len(weights) == len(args.reward), f"--reward-weights: {len(weights)} weights for "
                                              f"{len(args.reward)} rewards; give one for each")
    twice = [name for name in args.reward if args.reward.count(name) > 1]
    require(not twice,
            f"--reward: {''.join(twice[:1])} is given twice; use --reward-weights instead")
    names = [Path(name).name.rpartition(":")[2] for name in args.reward]
    names = names if len(set(names)) == len(names) else args.reward
    loaded, gold = {}, find_gold(args.gold, args.dataset)
    parts = {name: load_reward(full, args, device, loaded)
             for name, full in zip(names, args.reward)}
    held_out = {"gold": load_reward(gold, args, device, loaded)} if gold else {}
    return Rewards(parts, weights, held_out, "gold" if gold else "score", noise)


def find_gold(gold, dataset):
    """What --gold names: "auto" is the function gold_reward in the file of --dataset, if any."""
    path = find(dataset).rpartition(":")[0]
    if gold == "auto" and path.endswith(".py") and hasattr(load_module(path), "gold_reward"):
        return f"{path}:gold_reward"
    return None if gold in ("auto", "none") else gold


def shares_ids(reward, tokenizer, responses, prompts):
    """Whether a classifier can read the policy's token ids (N, T) as they are.

    Not if it would render conversations in another way, by a chat template of its own.
    """
    # A policy's vocabulary may be padded beyond the tokenizer's, and extra ids can be sampled.
    known = responses.max() < reward.model.get_input_embeddings().num_embeddings
    same = (isinstance(prompts[0], str)
            or reward.tokenizer.chat_template in (None, tokenizer.chat_template))
    return known and same and reward.tokenizer.get_vocab() == tokenizer.get_vocab()


def models_sharing_ids(rewards, tokenizer):
    """The reward models of a run (Rewards) that read the policy's token ids."""
    return [reward.model for reward in (*rewards.parts.values(), *rewards.held_out.values())
            if reward.model and reward.tokenizer.get_vocab() == tokenizer.get_vocab()]


def own_ids(reward, examples, texts, ended):
    """A reward model's own token ids of the prompts and of N texts that answer them.

    Args: reward; examples (dict of columns, lists of B values); texts (N, prompt-major); ended (N
    bools). Returns: two lists of N lists of ids.
    """
    k = len(texts) // len(examples["prompt"])
    rows = [dict(zip(examples, row)) for row in zip(*examples.values()) for _ in range(k)]
    prompts, options = [row["prompt"] for row in rows], list(map(template_options, rows))
    what = f"reward {reward.name}"
    ids = prompt_tokens(reward.tokenizer, prompts, what, options)
    replies = reply_tokens(reward.tokenizer, prompts, ids, texts, what, options, ended)
    check_length(reward.model, max(len(start) + len(reply) for start, reply in zip(ids, replies)))
    return ids, replies


def call_function(reward, examples, completions, completion_ids):
    """Call a python reward, as TRL does: function(prompts, completions, **columns) -> numbers.

    The dataset's other columns are lists of one value per completion, each a copy that the function
    may change. Completions are texts, or one-message lists for chat prompts. With several
    processes, each calls the function for its slice of the prompts.

    Args: reward; examples (dict of columns, lists of B values); completions (N texts,
    prompt-major); completion_ids (their N lists of token ids, which the function gets if it takes
    them). Returns: (N,), NaN where the function says None, 0 in rows that other processes handle.
    """
    k, mine = len(completions) // len(examples["prompt"]), rank_slice(len(examples["prompt"]))
    values = torch.zeros(len(completions))  # (N,)
    if not len(mine):
        return values
    columns = {name: [copy.deepcopy(rows[i]) for i in mine for _ in range(k)]
               for name, rows in examples.items() if name not in OURS}
    columns["prompts"] = columns.pop("prompt")
    rows = slice(k * mine.start, k * mine.stop)
    columns["completions"] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(columns["prompts"], completions[rows])]
    if takes(reward.function, "completion_ids"):
        columns["completion_ids"] = copy.deepcopy(completion_ids[rows])
    values[rows] = checked_values(reward, columns)
    return values


def takes(function, name):
    """Whether a function has a parameter of this name, or **kwargs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one that is not written in python
        return False
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD
               for parameter in parameters)


def checked_values(reward, columns):
    """A python reward's numbers as a tensor, NaN for None; exits with one line otherwise."""
    count = len(columns["completions"])
    try:
        values = reward.function(**columns)
        if inspect.isawaitable(values):
            values = wait_for(values)
    except Exception as error:
        stop(f"reward {reward.name}: raised {type(error).__name__}: {one_line(error)}")
    try:
        if isinstance(values, (str, dict, set)):
            raise TypeError
        values = [value.item() if hasattr(value, "item") else value for value in values]
        values = [None if value is None else float(value) for value in values]
    except Exception:
        stop(f"reward {reward.name}: returned {one_line(repr(values))[:80]}; it must return a list "
             "of numbers")
    require(len(values) == count,
            f"reward {reward.name}: returned {len(values)} values for {count} completions")
    bad = [value for value in values
           if value is not None and not abs(value) < torch.finfo(torch.float32).max]
    require(not bad, f"reward {reward.name}: returned {bad[:1]}; every value must be a finite "
                     "number, or None")
    return torch.tensor([math.nan if value is None else value for value in values])


def wait_for(awaitable):
    """The result of an async function.

    All run in one event loop, in a thread of its own: a notebook's own loop is busy, and what an
    async function keeps, such as connections, belongs to the loop of its first call.
    """
    async def result():
        return await awaitable

    return asyncio.run_coroutine_threadsafe(result(), event_loop()).result()


@cache
def event_loop():
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def weighted_sum(rewards, parts):
    """The sum of weight * part over the rewards that say something of a row. Returns (N,).

    A python reward that returns None for a row does not count for it, as in TRL. Exits with one
    line if none of them counts.

    Args: rewards (Rewards); parts (dict of (N,), in the same order, NaN for None).
    """
    total, silent = 0.0, True
    for weight, reward, part in zip(rewards.weights, rewards.parts.values(), parts.values()):
        none = part.isnan() & (reward.function is not None)  # (N,)
        total, silent = total + weight * part.masked_fill(none, 0.0), silent & none
    names = ", ".join(reward.name for reward in rewards.parts.values())
    require(not silent.any(), f"reward {names}: returned None for a response, and no other reward "
                              "has a number for it; return a number, or add a reward that does")
    return total


def require_binary(scores, args):
    """Exit with a one-line error unless the scores (N,) are all 0 or 1, and the flags keep them so.

    Args: scores; args (missing_eos_penalty and reward_noise are read).
    """
    for flag in ("missing_eos_penalty", "reward_noise"):
        value = getattr(args, flag)
        require(value == 0, f"--{flag.replace('_', '-')} {value}: the scores must stay 0 or 1; set "
                            "it to 0")
    others = scores[(scores != 0) & (scores != 1)]
    require(not len(others), f"--reward {' '.join(args.reward)}: a score is "
                             f"{others[:1].sum():.3g}, and this algorithm needs 0 or 1, failure or "
                             "success; use such a reward, as tasks/mini_math.py:accuracy is")


def as_text(prompt):
    """A prompt as plain text: itself, or its chat messages, one per line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
