"""Run a script's own `main` on responses that we choose, and read what it would do to the policy.

Not a command; lab/gradient.py and lab/credit.py use it. Nothing of the script is retyped. In the
loaded module, `rollout` returns the Batch that we give, `Run` keeps no folder or log, `evaluate`
does nothing, and `token_logprobs` notes what flows back through it. Where the policy's optimizer
would step, its gradients are noted, and the weights stay as they are.
"""

import copy
import fnmatch
import functools
import shlex
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from unittest.mock import patch

import torch
import tyro
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import Batch
from plumbing import Run, load_module, random_states, require, set_random_states

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Update:
    """What one update of a script made of a rollout of N rows."""

    batch: Batch = None  # the rollout; None if the script asked for none
    generated: int = 0  # responses that it asked for: N, and greedy ones
    steps: list = field(default_factory=list)  # of (P,), the gradient at each step of the policy
    weights: torch.Tensor = None  # (N, T): the step is the mean over rows of sum_t w_t grad log pi

    @property
    def gradient(self):
        """(P,), the mean over its optimizer steps; weights do not move between them."""
        return sum(self.steps) / len(self.steps)


@dataclass
class Numbered(Batch):
    """A Batch that knows which rows of the rollout it holds."""

    numbers: torch.Tensor  # (N,)

    def __getitem__(self, rows):
        return Numbered(*(getattr(self, field.name)[rows] for field in fields(self)))


class BlackBox(Run):
    """A Run without folder and log. Its updates after the warm-up all start from the same state.

    Args: seen (list, to which each update is added); warmup (how many updates come before); stack
    (ExitStack of the run); the others are those of Run.
    """

    def __init__(self, seen, warmup, stack, script, args, tokenizer, **trained):
        self.seen, self.warmup, self.stack = seen, warmup, stack
        super().__init__(script, args, tokenizer, **trained)

    def open_log(self, settings):
        return None  # no run folder, no TensorBoard, no progress bar

    def updates(self, dataset, size):
        policy, self.optimizer, _ = self.trained["policy"]
        self.parameters = list(policy.parameters())
        self.stack.callback(register_optimizer_step_pre_hook(self.note_step).remove)
        weights = [parameter.detach().clone() for parameter in self.parameters]
        start = copy.deepcopy(self.state), random_states()
        for examples in super().updates(dataset, size):
            self.seen.append(Update())
            yield examples
            update = self.seen[-1]
            require(update.steps,
                    f"{self.name}.py: an update took no step of the policy's optimizer")
            if update.batch is not None:
                update.weights /= len(update.steps)
            if len(self.seen) <= self.warmup:
                start = copy.deepcopy(self.state), random_states()
            self.state = copy.deepcopy(start[0])
            set_random_states(start[1])
        require(all(map(torch.equal, weights, self.parameters)),
                f"{self.name}.py: moves the policy other than by a step of its optimizer")

    def note_step(self, optimizer, *_):
        if optimizer is self.optimizer:
            gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                         for parameter in self.parameters]
            self.seen[-1].steps.append(torch.cat([gradient.flatten() for gradient in gradients]))
        optimizer.zero_grad()  # without gradients, the step that follows does nothing

    def nothing(self, *_, **__):
        pass

    log = log_evaluation = save_model = checkpoint = nothing


def load(path):
    """The module of a file here or in the project."""
    return load_module(str((Path(path) if Path(path).is_file() else ROOT / path).resolve()))


def rows(command):
    """The commands of a command with a pattern such as "lab/dialects.py:trl-*": one for each match.
    """
    words = shlex.split(command)
    path, _, pattern = words[0].partition(":")
    names = fnmatch.filter(getattr(load(path), "DIALECTS", ()), pattern) if pattern else []
    return [shlex.join([f"{path}:{name}", *words[1:]]) for name in names] or [command]


def resolve(command):
    """What a command runs: a script, flags, and what takes the place of the script's functions.

    "lab/dialects.py:trl-rloo --k 4" is a row of that file's table DIALECTS, with more flags.
    Returns: path; list of words; function (the script's Args) -> dict name -> function.
    """
    path, *words = shlex.split(command)
    path, _, name = path.partition(":")
    if not name:
        return path, words, lambda args: {}
    table = getattr(load(path), "DIALECTS", {})
    require(name in table, f"{path}:{name}: no such row; it has {', '.join(table) or 'none'}")
    dialect = table[name]
    return dialect.script, shlex.split(dialect.flags) + words, dialect.functions


def parse(command, **settings):
    """Module and Args of a command such as "ppo.py --lam 0".

    Settings that the script has as flags replace its defaults.
    """
    path, words, _ = resolve(command)
    path, module = Path(path), load(path)
    table = getattr(module, "DIALECTS", {})
    require(not table, f"{path}: name a row of its table, such as {path}:{next(iter(table), '')}; "
                       f"'{path}:*' is all of them")
    for name in ("Args", "main", "Run"):
        require(hasattr(module, name),
                f"{path.name}: has no {name}; a script that fits has the form of rloo.py")
    known = {item.name for item in fields(module.Args)}
    default = module.Args(**{name: value for name, value in settings.items() if name in known})
    return module, tyro.cli(module.Args, args=words, default=default) if words else default


def run(command, given, count=1, warmup=0, rows=None, replace=None, **settings):
    """Run `main` of a script for `count` updates with weights that do not move.

    Args: command (such as "ppo.py --lam 0"; its flags win over the settings); given (function
    (update, prompt_ids, k, greedy) -> Batch that replaces sampling; update counts from 0, or from
    -warmup); count; warmup (updates before the first, for a script that remembers past rewards:
    before each of the `count` updates, run.state and the random states are what they were after
    these); rows (function (update) -> row numbers of the training data; default: the first ones);
    replace (dict name -> what `main` finds under that name instead); settings (defaults of flags,
    as far as the script has them).
    Returns: list of `count` Updates.
    """
    settings = dict(max_grad_norm=1e30, eval_every=0, save_every=0, eval_prompts=1) | settings
    module, args = parse(command, **settings | {"num_updates": warmup + count})
    functions, seen = resolve(command)[2](args), []
    for name in functions:
        require(hasattr(module, name),
                f"{command}: {Path(module.__file__).name} has no {name} to replace")

    def batches(dataset, size, *_):
        for update in range(-warmup, count):
            yield dataset[[i % len(dataset) for i in (rows(update) if rows else range(size))]]

    with ExitStack() as stack:
        replaced = {"Run": functools.partial(BlackBox, seen, warmup, stack),
                    "rollout": chosen_rollout(command, given, seen, warmup),
                    "token_logprobs": noted(getattr(module, "token_logprobs", None), seen),
                    "evaluate": lambda *_: None, **functions, **(replace or {})}
        for name in replaced.keys() & vars(module).keys():
            stack.enter_context(patch.object(module, name, replaced[name]))
        stack.enter_context(patch("plumbing.run.batches", batches))
        stack.enter_context(patch("plumbing.run.caught", nullcontext))
        stack.enter_context(patch("plumbing.tryout.pick_threads", lambda _: None))
        module.main(args)
    require(len(seen) == warmup + count,
            f"{command}: stops after {len(seen)} of --num-updates {warmup + count}")
    return seen[warmup:]


def chosen_rollout(command, given, seen, warmup):
    """What `main` finds as `rollout`: it returns the given responses, and notes them."""
    def rollout(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, at_once=None,
                greedy=False):
        update, batch = seen[-1], given(len(seen) - 1 - warmup, prompt_ids, k, greedy)
        update.generated += len(batch)
        if greedy:
            return batch
        require(update.batch is None, f"{command}: samples twice in an update, and not greedily")
        update.batch, update.weights = batch, torch.zeros_like(batch.old_logprobs)
        columns = (getattr(batch, item.name) for item in fields(Batch))
        return Numbered(*columns, torch.arange(len(batch)))

    return rollout


def noted(token_logprobs, seen):
    """What `main` finds as `token_logprobs`: it notes what flows back through the log-probs."""
    def run(model, batch, temperature):
        logprobs, weights = token_logprobs(model, batch, temperature), seen[-1].weights

        def note(gradient):
            weights.index_add_(0, batch.numbers, -len(weights) * gradient)

        if logprobs.requires_grad and isinstance(batch, Numbered):
            logprobs.register_hook(note)
        return logprobs

    return run
