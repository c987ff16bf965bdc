"""Does a copy of a script compute what the script computes? hunt.py has the command.

The copy's own `main` runs in a tiny world in float64, and samples by itself. Then the script's
`main` runs on the same responses. The gradients of every optimizer step, everything logged and the
files of the run must be the same. Nothing of the two is retyped: gradients are read where the
optimizers step, and numbers where TensorBoard gets them.
"""

import contextlib
import copy
import functools
import itertools
import tempfile
import traceback
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import randperm
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

import common
from common import Batch, concatenate, evaluate, microbatches, sample
from lab.tiny_world import make_model, make_tokenizer
from plumbing import batches, errors, load_module, load_rows, one_line, run

# ----------------------------------------------------------------------------------- the tiny world
# Named by the ordinary flags, for example --model exercises/hunt_check.py:policy.


TOKENIZER = make_tokenizer(words=6)
TOKENIZER.pad_token = "f"  # a token of its own, which nobody writes, as in the shipped tasks
PROMPTS = ["a b c", "d", "e c a b", "b b", "c e d b a", "e"]
VALUE = dict(zip("abcde", (1.0, -0.7, 0.4, 2.1, -1.3)))


@functools.cache
def make(kind, seed, **kwargs):
    model = make_model(kind, len(TOKENIZER), seed, **kwargs)
    if kind is GPT2LMHeadModel:
        bias = torch.zeros(len(TOKENIZER), dtype=torch.float64)  # of the logits
        bias[TOKENIZER.pad_token_id] = -1e4
        model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def policy():
    return copy.deepcopy(make(GPT2LMHeadModel, seed=1)), TOKENIZER


def reference():
    return copy.deepcopy(make(GPT2LMHeadModel, seed=2)), TOKENIZER


def critic():
    return copy.deepcopy(make(GPT2ForSequenceClassification, seed=3, num_labels=1)), TOKENIZER


def reward(prompts, completions, **_):
    """Depends on the prompt, and on a response's words and their order."""
    of_words = lambda words: sum(VALUE[word] / (1 + place) for place, word in enumerate(words))
    return [of_words(text.split()) + 0.3 * len(prompt)
            for prompt, text in zip(prompts, completions)]


def prompts(split):
    rows = PROMPTS if split == "train" else PROMPTS[:2]
    return Dataset.from_dict({"prompt": rows, "completion": ["a b"] * len(rows)})


WORLD = {name: f"{__file__}:{name}"
         for name in ("policy", "reference", "critic", "reward", "prompts")}
BASE = dict(model=WORLD["policy"], reference=WORLD["reference"], critic=WORLD["critic"],
            reward=(WORLD["reward"],), dataset=WORLD["prompts"], gold="none", device="cpu",
            num_updates=2, prompts_per_step=3, eval_prompts=2, eval_every=0, lr=0.005,
            critic_lr=0.03, max_grad_norm=1e9)
SETTINGS = [  # each flag of an algorithm has at least two values in these
    dict(k=3, beta=0.3, temperature=0.7, max_new_tokens=6, missing_eos_penalty=0.5,
         microbatch_tokens=24, minibatches=2),
    dict(k=2, beta=0.1, temperature=1.3, max_new_tokens=3, missing_eos_penalty=2.0,
         microbatch_tokens=10_000, minibatches=1, max_grad_norm=0.5, lr=0.01, baseline="ema",
         decay=0.3, whiten=False, lam=0.5, gamma=0.9, value_clip=0.05, rank_by="score",
         scale_std=False, length_mean=False, normalize_scores=False,
         clip_low=0.02, clip_high=0.05, max_ratio=1.02),
    dict(k=4, beta=0.0, temperature=1.0, max_new_tokens=5, missing_eos_penalty=0.0,
         microbatch_tokens=30, minibatches=3, epochs=2, clip=0.05, lr=0.003, critic_lr=0.2,
         baseline="none", lam=1.0, clip_scores=1.0),
]


# --------------------------------------------------------------------------- what a script computes


class Rollout(NamedTuple):
    """What was sampled for training, and how."""

    update: int
    batch: Batch
    greedy: bool
    random_state: torch.Tensor  # before
    trained: bool  # whether the model that sampled is one that is trained
    temperature: float
    max_new_tokens: int


class Seen:
    """What a script computes. Its methods stand in for functions that the script calls.

    numbers: dict name -> tensor: the gradients of every optimizer step, and everything logged.
    updates: for each, the token ids of its B prompts. rollouts: list of Rollouts. files: names of
    those in the run folder.
    """

    def __init__(self, module, given):
        """Args: module (the script); given (a Seen, whose responses are used, or None)."""
        self.module, self.given = module, given
        self.numbers, self.updates, self.rollouts, self.files = {}, [], [], []
        self.optimizers, self.steps = [], Counter()
        self.shuffles, self.evaluating = itertools.count(), False

    def replaced(self):
        """What stands in for what: (owner, name, function)."""
        found = [(common, "sample", self.sample), (run, "batches", self.batches),
                 (torch, "randperm", self.randperm),
                 (SummaryWriter, "add_scalar", self.add_scalar),
                 (self.module, "evaluate", self.evaluate),
                 (self.module, "microbatches", self.microbatches),
                 (self.module, "load_rows", same_rows)]
        return found + [(self.module, "rollout", self.rollout)] if self.given else found

    def batches(self, *args):
        for examples in batches(*args):
            self.updates.append(examples["prompt_ids"])
            yield examples

    def sample(self, policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, greedy=False):
        state, trained = torch.get_rng_state(), next(policy.parameters()).requires_grad
        batch = sample(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, greedy)
        if not self.evaluating:
            self.rollouts.append(Rollout(len(self.updates), batch, greedy, state, trained,
                                         temperature, max_new_tokens))
        return batch

    def rollout(self, *_, greedy=False):
        """The given responses, prompt-major, in whatever order they were sampled."""
        batch, rows = rows_of(self.given, len(self.updates), greedy)
        return batch[torch.tensor(rows).flatten()]

    def microbatches(self, model, max_tokens, *args, **kwargs):
        name = f"--microbatch-tokens in update {len(self.updates)}"
        self.numbers[name] = torch.tensor(float(max_tokens))
        return microbatches(model, max_tokens, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self.evaluating = True
        found = evaluate(*args, **kwargs)
        self.evaluating = False
        return found

    def step(self, optimizer, *_):
        if optimizer not in self.optimizers:
            self.optimizers.append(optimizer)
        model = ("policy", "critic")[self.optimizers.index(optimizer)]
        self.steps[model] += 1
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad
                     for weight in optimizer.param_groups[0]["params"]]
        name = f"the gradient of the {model} in optimizer step {self.steps[model]}"
        self.numbers[name] = torch.cat([gradient.flatten() for gradient in gradients])

    def add_scalar(self, name, value, step, **_):
        if not name.startswith("time/"):
            self.numbers[f"{name} of update {step}"] = torch.tensor(float(value))

    def randperm(self, n, generator=None, **_):
        """The same shuffles, however many random numbers were drawn before."""
        generator = generator or torch.Generator().manual_seed(next(self.shuffles))
        return randperm(n, generator=generator)


ROWS = {}  # of the dataset, by split


def same_rows(args, split, tokenizer, **kwargs):
    """load_rows, which takes half of the time of a run, once for each split."""
    key = (split, *kwargs.items())
    if key not in ROWS:
        ROWS[key] = load_rows(args, split, tokenizer, **kwargs)
    return ROWS[key]


def observe(path, flags, given=None):
    """Run a script's own main in the tiny world, in float64. Returns: what is Seen of it.

    Args: path; flags (those that the script does not have are left out); given (what `observe`
    returned for a copy of the script: its responses are used, instead of new samples).
    """
    module = load_module(path)
    seen = Seen(module, given)
    flags = {field.name: flags[field.name] for field in fields(module.Args) if field.name in flags}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.callback(register_optimizer_step_pre_hook(seen.step).remove)
        for owner, name, function in seen.replaced():
            stack.enter_context(patch.object(owner, name, function))
        module.main(module.Args(**flags, output=f"{folder}/run"))
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        seen.files = sorted(str(file.relative_to(folder)) for file in files
                            if "tfevents" not in file.name)
    return seen


def rows_of(seen, update, greedy=False):
    """The responses of an update: a Batch, and the row numbers of each of its B prompts."""
    prompts = seen.updates[update - 1]
    parts = [rollout.batch for rollout in seen.rollouts
             if (rollout.update, rollout.greedy) == (update, greedy)]
    if not parts:
        return None, [[] for _ in prompts]
    batch = concatenate(parts, TOKENIZER.pad_token_id)
    found = [ids[mask].tolist() for ids, mask in zip(batch.prompts, batch.prompt_mask)]
    return batch, [[row for row, ids in enumerate(found) if ids == prompt] for prompt in prompts]


# ---------------------------------------------------------------------------------------- the check


def wrong_samples(seen, flags):
    """What is wrong with how a script has sampled: a list of sentences."""
    if len(seen.updates) != flags["num_updates"]:
        return [f"it makes {len(seen.updates)} of {flags['num_updates']} updates"]
    wrong = []
    for rollout in seen.rollouts:
        if not rollout.trained:
            wrong.append("responses are not sampled from the policy that is trained")
        if rollout.temperature != flags["temperature"]:
            wrong.append(f"responses are sampled at temperature {rollout.temperature}")
        if rollout.max_new_tokens != flags["max_new_tokens"]:
            wrong.append(f"responses have up to {rollout.max_new_tokens} tokens")
    states = [rollout.random_state for rollout in seen.rollouts if not rollout.greedy]
    if any(torch.equal(*pair) for pair in itertools.combinations(states, 2)):
        wrong.append("two rollouts draw the same random numbers")
    counts = {len(rows) for update in range(1, len(seen.updates) + 1)
              for rows in rows_of(seen, update)[1]}
    return wrong + [f"prompts have {count} responses" for count in counts - {flags["k"]}]


def same(found, expected):
    """Whether two tensors are equal up to rounding errors of other ways to compute them."""
    tolerance = 1e-9 + 1e-6 * expected.nan_to_num().abs().max()
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def sentence(name, found, expected):
    """A difference in words."""
    if not found.ndim:
        return f"{name} is {found:.4g}, not {expected:.4g}"
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    share = (found - expected).norm() / expected.norm()
    return (f"{name} is {share:.2g} of its length away from where it should be (cosine "
            f"{cosine:.3f}, length {found.norm():.3g} instead of {expected.norm():.3g})")


def compare(path, script, flags):
    """What a copy does differently from its script, given the same responses: sentences."""
    found = observe(path, flags)
    wrong = wrong_samples(found, flags)
    if wrong:
        return wrong
    expected = observe(script, flags, given=found)
    for name, value in expected.numbers.items():
        other = found.numbers.get(name)
        if other is None:
            wrong.append(f"there is no longer {name}")
        elif not same(other, value):
            wrong.append(sentence(name, other, value))
    more = found.numbers.keys() - expected.numbers.keys()
    wrong += [f"there is also {name}" for name in more if "gradient" in name]
    gone = set(expected.files) - set(found.files)
    return wrong + [f"there is no longer a file {name}" for name in gone]


def last_words(text, **_):
    """In place of what plumbing prints before it exits."""
    raise RuntimeError(text.removeprefix("error: "))


def check(path, script, planted):
    """Whether a copy is mended, and a message.

    Args: path; script; planted (the copy as it was). Returns: (bool, message).
    """
    try:
        with patch.object(errors.tqdm, "write", last_words):
            theirs, ours = (asdict(load_module(file).Args()) for file in (path, script))
            changed = [flag(name) for name in ours if theirs.get(name) != ours[name]]
            if changed:
                return False, f"something else is different now: the default of {changed[0]}"
            for setting in SETTINGS:
                wrong = compare(path, script, BASE | setting)
                if wrong:
                    break
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f" in line {frame.lineno}" for frame in frames if frame.filename == path]
        where = lines[-1] if lines else ""
        return False, f"it stops{where}: {type(error).__name__}: {one_line(error)}"
    if not wrong:
        return True, f"mended: it computes what {Path(script).name} computes"
    if set(wrong) & set(compare(planted, script, BASE | setting)):
        return False, "the bug is still there"
    flags = " ".join(f"{flag(name)} {value}" for name, value in setting.items() if name in ours)
    return False, f"something else is different now: {wrong[0]}, with {flags}"


def flag(name):
    return f"--{name.replace('_', '-')}"
