"""Run a script's own `main` as a black box, on responses that we choose, and read what it would do to the policy.

Not a command; lab/gradient.py and lab/credit.py use it. Nothing of the script is retyped. In the loaded module,
`rollout` returns the Batch that we give, `Run` keeps no folder or log, `evaluate` does nothing, and `token_logprobs`
notes what flows back through it. Where the policy's optimizer would step, its gradients are noted, and the weights stay
as they are.
"""

import copy
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runs  # noqa: E402
from common import Batch  # noqa: E402
from plumbing import load_module, random_states, require, set_random_states  # noqa: E402


@dataclass
class Update:
    """What one update of a script made of a rollout of N rows."""

    batch: Batch = None  # the rollout; None if the script asked for none
    generated: int = 0  # responses that it asked for: N, and greedy ones
    steps: list = field(default_factory=list)  # for each step of the policy's optimizer, the loss's gradient (P,)
    weights: torch.Tensor = None  # (N, T): the step is the mean over rows of sum_t weight_t grad log pi(y_t)

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


def parse(command, **settings):
    """Module and Args of a command such as "ppo.py --lam 0". Settings that the script has replace its defaults."""
    path, *words = shlex.split(command)
    path = Path(path) if Path(path).is_file() else ROOT / path
    module = load_module(str(path.resolve()))
    for name in ("Args", "main", "Run"):
        require(hasattr(module, name), f"{path.name}: has no {name}; a script that fits has the form of rloo.py")
    known = {item.name for item in fields(module.Args)}
    default = module.Args(**{name: value for name, value in settings.items() if name in known})
    return module, tyro.cli(module.Args, args=words, default=default) if words else default


def run(command, given, count=1, warmup=0, rows=None, replace=None, **settings):
    """Run `main` of a script for `count` updates with weights that do not move.

    Args: command (such as "ppo.py --lam 0"; its flags win over the settings); given (function (update, prompt_ids, k,
    greedy) -> Batch that replaces sampling; update counts from 0, or from -warmup); count; warmup (updates before the
    first, for a script that remembers past rewards: before each of the `count` updates, run.state and the random states
    are what they were after these); rows (function (update) -> row numbers of the training data; default: the first
    ones); replace (dict name -> what `main` finds under that name instead); settings (defaults of flags, as far as the
    script has them).
    Returns: list of `count` Updates.
    """
    settings = dict(max_grad_norm=1e30, eval_every=0, save_every=0, eval_prompts=1) | settings
    module, args = parse(command, **settings | {"num_updates": warmup + count})
    seen = []

    class BlackBox(runs.Run):
        def open_log(self, settings):
            return None  # no run folder, no TensorBoard, no progress bar

        def updates(self, dataset, size):
            self.policy, self.optimizer, _ = self.trained["policy"]
            stack.callback(register_optimizer_step_pre_hook(self.note_step).remove)
            before = [parameter.detach().clone() for parameter in self.policy.parameters()]
            for update in range(-warmup, count):
                if update == 0:
                    snapshot = copy.deepcopy(self.state), random_states()
                if update >= 0:
                    self.state = copy.deepcopy(snapshot[0])
                    set_random_states(snapshot[1])
                self.state["step"] = warmup + update + 1
                self.noise = np.random.default_rng((self.args.seed, self.step))
                seen.append(Update())
                yield dataset[[i % len(dataset) for i in (rows(update) if rows else range(size))]]
                require(seen[-1].steps, f"{self.name}.py: an update took no step of the policy's optimizer")
                if seen[-1].batch is not None:
                    seen[-1].weights /= len(seen[-1].steps)
            same = all(map(torch.equal, before, self.policy.parameters()))
            require(same, f"{self.name}.py: moves the policy other than by a step of its optimizer")

        def note_step(self, optimizer, *_):
            if optimizer is self.optimizer:
                gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                             for parameter in self.policy.parameters()]
                seen[-1].steps.append(torch.cat([gradient.flatten() for gradient in gradients]))
            optimizer.zero_grad()  # without gradients, the step that follows does nothing

        def nothing(self, *_, **__):
            pass

        log = log_evaluation = save_model = checkpoint = nothing

    def rollout(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, at_once=None, greedy=False):
        update, batch = seen[-1], given(len(seen) - 1 - warmup, prompt_ids, k, greedy)
        update.generated += len(batch)
        if greedy:
            return batch
        require(update.batch is None, f"{command}: samples twice in an update, and not greedily")
        update.batch, update.weights = batch, torch.zeros_like(batch.old_logprobs)
        return Numbered(*(getattr(batch, item.name) for item in fields(Batch)), torch.arange(len(batch)))

    def token_logprobs(model, batch, temperature):
        logprobs = module_token_logprobs(model, batch, temperature)
        weights = seen[-1].weights

        def note(gradient):
            weights.index_add_(0, batch.numbers, -len(weights) * gradient)

        if logprobs.requires_grad and isinstance(batch, Numbered):
            logprobs.register_hook(note)
        return logprobs

    module_token_logprobs = getattr(module, "token_logprobs", None)
    replaced = {"Run": BlackBox, "rollout": rollout, "token_logprobs": token_logprobs, "evaluate": lambda *_: None,
                **(replace or {})}
    with ExitStack() as stack:
        stack.enter_context(patch.object(runs, "pick_threads", lambda *_: torch.get_num_threads()))
        stack.enter_context(patch.object(runs, "catch_signals", lambda: []))
        for name in replaced.keys() & vars(module).keys():
            stack.enter_context(patch.object(module, name, replaced[name]))
        module.main(args)
    require(len(seen) == warmup + count, f"{command}: stops after {len(seen)} of --num-updates {warmup + count}")
    return seen[warmup:]
