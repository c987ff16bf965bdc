"""Models, rewards and data for tests of whole scripts, in float64, named by the ordinary flags.

For example --model tests/helpers/small_world.py:policy. Every call of a function returns the same
weights again. The models are GPT-2s: Llama's RMSNorm computes in float32 whatever the weights are.
"""

import copy
import functools

import torch
from datasets import Dataset
from helpers.tiny import make_float64_critic, make_float64_policy, make_tokenizer

WORDS = "a b c d e f".split()
PROMPTS = ["a b c", "d", "e f a b", "b b", "c e d f a"]
VALUE = dict(zip(WORDS, (1.0, -0.7, 0.4, 2.1, -1.3, 0.2)))


def tokenizer():
    return make_tokenizer(WORDS)


def two_words():
    """A tokenizer of two words and EOS: few enough to enumerate every response."""
    return make_tokenizer(WORDS[:2], pad="<eos>")


@functools.cache
def original(make, vocab_size, seed):
    """A model to be copied, which takes half the time of making it."""
    return make(vocab_size, seed)


def policy(seed=3, tokens=None):
    tokens = tokens or tokenizer()
    return copy.deepcopy(original(make_float64_policy, len(tokens), seed)), tokens


def reference():
    return policy(seed=4)


@functools.cache
def old_policy():
    """What the rollouts are sampled from: not the trained policy, so that ratios differ from 1."""
    model, tokens = policy()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model, tokens


def critic():
    return copy.deepcopy(original(make_float64_critic, len(tokenizer()), 6)), tokenizer()


def steep(make=policy):
    """A model whose loss is finite and whose gradient is not."""
    model, tokens = make()
    next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    return model, tokens


def steep_critic():
    return steep(critic)


def reward(prompts, completions, bonus, **_):
    """A score that depends on the prompt, the words, their order and the row's own column."""
    return [number + sum(VALUE[word] / (1 + place) for place, word in enumerate(text.split()))
            + 0.3 * len(prompt)
            for prompt, text, number in zip(prompts, completions, bonus)]


def brevity(completions, **_):
    return [-float(len(text.split())) for text in completions]


def right(completions, **_):
    """A success or a failure."""
    return [float(sum(VALUE[word] for word in text.split()) > 0) for text in completions]


def right_twice(completions, **_):
    """Binary for two responses, and not for more."""
    return right(completions) if len(completions) <= 2 else [0.5] * len(completions)


def constant(completions, **_):
    return [0.1] * len(completions)


def prompts(split):
    rows = {"prompt": PROMPTS, "bonus": [0.5, -1.0, 2.0, 0.0, 1.5],
            "completion": ["a", "b c", "d d", "e", "f a b"]}
    return Dataset.from_dict(rows if split == "train"
                             else {name: values[:3] for name, values in rows.items()})


def pairs(split):
    chosen, rejected = ["a d", "c", "d a f b", "f", "e"], ["b", "e e b", "a", "c d e f", "a c"]
    return Dataset.from_dict({**prompts("train").to_dict(), "chosen": chosen, "rejected": rejected})


def tied_pairs(split):
    """Every second pair has two responses of the same length: neither is the better one."""
    other = str.maketrans("abcdef", "bcdefa")
    return pairs(split).map(
        lambda row, i: {"rejected": row["chosen"].translate(other) if i % 2 else row["rejected"]},
        with_indices=True)


def long_prompt(split):
    """One prompt of the test split does not fit the models' 16 positions with a response."""
    rows = pairs(split)
    return rows if split == "train" else rows.map(lambda row: {"prompt": row["prompt"] + " c" * 10})


def enumerable_policy():
    return policy(tokens=two_words())


def enumerable_reference():
    return policy(seed=4, tokens=two_words())


def enumerable_critic():
    return copy.deepcopy(original(make_float64_critic, len(two_words()), 6)), two_words()


def enumerable_prompts(split):
    return Dataset.from_dict({"prompt": ["b a b", "a"], "bonus": [0.0, 1.5]})


def one_prompt(split):
    return enumerable_prompts(split).select([0])
