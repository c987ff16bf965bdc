"""The list of mistakes, and what several parts of the sheet need."""

from collections.abc import Callable
from typing import NamedTuple

NO_GRADIENT = ("the loss carries no gradient: something detached it (.detach(), .item(), no_grad, "
               "numpy)")
WRONG_SIGN = "the sign is wrong: an optimizer minimizes, so good responses would become rarer"
SAMPLE_MAJOR = "you grouped rows sample-major: samples of different prompts are compared"
TIMES_ZERO = "you mask by multiplying, but inf or NaN times 0 is NaN: use torch.where"
REPEAT = ("you used repeat, which puts the prompts' numbers on each other's rows: "
          "repeat_interleave keeps a prompt's k rows together")


class Mistake(NamedTuple):
    name: str  # of the exercise
    function: Callable  # returns what somebody who makes the mistake returns
    sentence: str  # to say
    words: str  # of the line of the docstring that says otherwise


MISTAKES = []


def mistake(name, sentence, words):
    """A decorator that adds a function to MISTAKES."""
    def add(function):
        MISTAKES.append(Mistake(name, function, sentence, words))
        return function

    return add


def sample_major(function, rewards, k, *rest):
    """The function's result for row = sample * B + prompt, where row = prompt * k + sample."""
    return function(rewards.view(k, -1).t().flatten(), k, *rest).view(-1, k).t().flatten()


def group_std(rewards, k, correction=1):
    """The std of each row's group: (N,)."""
    return rewards.view(-1, k).std(1, correction=correction).repeat_interleave(k)
