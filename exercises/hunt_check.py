"""Does a copy of a script compute what the script computes? hunt.py has the command.

The copy's own `main` runs in a tiny world in float64, and samples by itself. Then the script's `main` runs on the same
responses. The gradients of every optimizer step, everything logged and the files of the run must be the same. Nothing
of the two is retyped: gradients are read where the optimizers step, and numbers where TensorBoard gets them.
"""

import contextlib
import copy
import functools
import itertools
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from datasets import Dataset
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]

import common  # noqa: E402
import plumbing  # noqa: E402
import runs  # noqa: E402
from plumbing import batches, load_module, one_line  # noqa: E402
from tiny_world import make_model, make_tokenizer  # noqa: E402


# ------------------------------------------------------------------------------------------------------- the tiny world
# Named by the ordinary flags, for example --model exercises/hunt_check.py:policy.

TOKENIZER = make_tokenizer(words=6)
TOKENIZER.pad_token = TOKENIZER.eos_token
PROMPTS = ["a b c", "d", "e f a b", "b b", "c e d f a", "f"]
VALUE = dict(zip("abcdef", (1.0, -0.7, 0.4, 2.1, -1.3, 0.2)))
make = functools.cache(functools.partial(make_model, vocab_size=len(TOKENIZER)))


def policy():
    return copy.deepcopy(make(GPT2LMHeadModel, seed=1)), TOKENIZER


def reference():
    return copy.deepcopy(make(GPT2LMHeadModel, seed=2)), TOKENIZER


def critic():
    return copy.deepcopy(make(GPT2ForSequenceClassification, seed=3, num_labels=1)), TOKENIZER


def reward(prompts, completions, **_):
    """Depends on the prompt, and on a response's words and their order."""
    return [sum(VALUE[word] / (1 + place) for place, word in enumerate(text.split())) + 0.3 * len(prompt)
            for prompt, text in zip(prompts, completions)]


def prompts(split):
    rows = PROMPTS if split == "train" else PROMPTS[:2]
    return Dataset.from_dict({"prompt": rows, "completion": ["a b"] * len(rows)})


WORLD = {name: f"{__file__}:{name}" for name in ("policy", "reference", "critic", "reward", "prompts")}
ROWS = {}  # of the dataset, by split
BASE = dict(model=WORLD["policy"], reference=WORLD["reference"], critic=WORLD["critic"], reward=(WORLD["reward"],),
            dataset=WORLD["prompts"], gold="none", device="cpu", num_updates=2, prompts_per_step=3, eval_prompts=2,
            eval_every=0, lr=0.005, critic_lr=0.03, max_grad_norm=1e9)
SETTINGS = [  # each flag of an algorithm has at least two values in these
    dict(k=3, beta=0.3, temperature=0.7, max_new_tokens=6, missing_eos_penalty=0.5, microbatch_tokens=24,
         minibatches=2),
    dict(k=2, beta=0.1, temperature=1.3, max_new_tokens=3, missing_eos_penalty=2.0, microbatch_tokens=10_000,
         minibatches=1, max_grad_norm=0.5, lr=0.01, baseline="ema", decay=0.3, whiten=False, lam=0.5,
         gamma=0.9, value_clip=0.05, rank_by="score", scale_std=False, length_mean=False, normalize_scores=False),
    dict(k=4, beta=0.0, temperature=1.0, max_new_tokens=5, missing_eos_penalty=0.0, microbatch_tokens=30, minibatches=3,
         epochs=2, clip=0.05, lr=0.003, critic_lr=0.2, baseline="none", lam=1.0, clip_scores=1.0),
]


# ----------------------------------------------------------------------------------------------- what a script computes

def observe(path, flags, given=None):
    """Run a script's own main in the tiny world, in float64, and record what it computes.

    Args: path; flags (those that the script does not have are left out); given (what `observe` returned for a copy of
    the script: its responses are used, instead of new samples).
    Returns: namespace of numbers (dict name -> tensor: the gradients of every optimizer step, and everything logged),
    files (names of those in the run folder), updates (for each, its B prompts) and samples (what was sampled for
    training, and how).
    """
    module = load_module(path)
    seen = SimpleNamespace(numbers={}, updates=[], samples=[])
    optimizers, steps, shuffles, evaluating = [], Counter(), itertools.count(), []

    def seen_batches(*args):
        for examples in batches(*args):
            seen.updates.append(examples["prompt_ids"])
            yield examples

    def seen_sample(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, greedy=False, sample=common.sample):
        state, trained = torch.get_rng_state(), next(policy.parameters()).requires_grad
        batch = sample(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, greedy)
        if not evaluating:
            seen.samples.append(SimpleNamespace(update=len(seen.updates), batch=batch, greedy=greedy, state=state,
                                                how=(trained, temperature, max_new_tokens)))
        return batch

    def given_rollout(*_, greedy=False):
        return sampled(given, len(seen.updates), greedy)

    def seen_microbatches(model, max_tokens, *args, **kwargs):
        seen.numbers[f"--microbatch-tokens in update {len(seen.updates)}"] = torch.tensor(float(max_tokens))
        return common.microbatches(model, max_tokens, *args, **kwargs)

    def same_rows(args, split, tokenizer, **kwargs):
        key = (split, *kwargs.items())
        if key not in ROWS:  # it takes half of the time of a run
            ROWS[key] = plumbing.load_rows(args, split, tokenizer, **kwargs)
        return ROWS[key]

    def seen_evaluate(*args, **kwargs):
        evaluating.append(True)
        found = common.evaluate(*args, **kwargs)
        evaluating.pop()
        return found

    def seen_step(optimizer, *_):
        if optimizer not in optimizers:
            optimizers.append(optimizer)
        model = ("policy", "critic")[optimizers.index(optimizer)]
        steps[model] += 1
        seen.numbers[f"the gradient of the {model} in optimizer step {steps[model]}"] = torch.cat([
            torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten()
            for weight in optimizer.param_groups[0]["params"]])

    def seen_scalar(writer, name, value, step, **_):
        if not name.startswith("time/"):
            seen.numbers[f"{name} of update {step}"] = torch.tensor(float(value))

    def same_shuffle(n, generator=None, randperm=torch.randperm, **_):  # however many numbers were drawn before
        return randperm(n, generator=generator or torch.Generator().manual_seed(next(shuffles)))

    replaced = [(common, "sample", seen_sample), (runs, "batches", seen_batches), (module, "evaluate", seen_evaluate),
                (torch, "randperm", same_shuffle), (SummaryWriter, "add_scalar", seen_scalar),
                (module, "microbatches", seen_microbatches), (module, "load_rows", same_rows)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.callback(register_optimizer_step_pre_hook(seen_step).remove)
        for owner, name, new in replaced + [(module, "rollout", given_rollout)] * bool(given):
            stack.enter_context(patch.object(owner, name, new))
        names = {field.name for field in fields(module.Args)} & flags.keys()
        module.main(module.Args(**{name: flags[name] for name in names}, output=f"{folder}/run"))
        seen.files = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*")
                            if file.is_file() and "tfevents" not in file.name)
    return seen


def rows_of(seen, update, greedy=False):
    """The responses sampled for an update: a Batch, and for each of its B prompts the numbers of its rows."""
    parts = [sample.batch for sample in seen.samples if (sample.update, sample.greedy) == (update, greedy)]
    if not parts:
        return None, [[] for _ in seen.updates[update - 1]]
    batch = common.concatenate(parts, TOKENIZER.pad_token_id)
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompts, batch.prompt_mask)]
    return batch, [[row for row, ids in enumerate(prompts) if ids == prompt] for prompt in seen.updates[update - 1]]


def sampled(seen, update, greedy):
    """The responses of an update as a Batch of N rows, prompt-major, in whatever order they were sampled."""
    batch, rows = rows_of(seen, update, greedy)
    return batch[torch.tensor(rows).flatten()]


# ------------------------------------------------------------------------------------------------------------ the check

def wrong_samples(seen, flags):
    """What is wrong with how a script has sampled: a list of sentences."""
    if len(seen.updates) != flags["num_updates"]:
        return [f"it makes {len(seen.updates)} of {flags['num_updates']} updates"]
    wrong = []
    for sample in seen.samples:
        trained, temperature, max_new_tokens = sample.how
        wrong += ["responses are not sampled from the policy that is trained"] * (not trained)
        wrong += [f"responses are sampled at temperature {temperature}"] * (temperature != flags["temperature"])
        wrong += [f"responses have up to {max_new_tokens} tokens"] * (max_new_tokens != flags["max_new_tokens"])
    states = [sample.state for sample in seen.samples if not sample.greedy]
    if any(torch.equal(*pair) for pair in itertools.combinations(states, 2)):
        wrong.append("two rollouts draw the same random numbers")
    counts = {len(rows) for update in range(1, len(seen.updates) + 1) for rows in rows_of(seen, update)[1]}
    wrong += [f"prompts have {count} responses" for count in counts - {flags["k"]}]
    return wrong


def same(found, expected):
    """Whether two tensors are equal up to rounding errors of other ways to compute them."""
    tolerance = 1e-9 + 1e-6 * expected.nan_to_num().abs().max()
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def sentence(name, found, expected):
    """A difference in words."""
    if not found.ndim:
        return f"{name} is {found:.4g}, not {expected:.4g}"
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    return (f"{name} is {(found - expected).norm() / expected.norm():.2g} of its length away from where it should be "
            f"(cosine {cosine:.3f}, length {found.norm():.3g} instead of {expected.norm():.3g})")


def compare(path, script, flags):
    """What a copy does differently from its script, given the same responses: a list of sentences."""
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
    wrong += [f"there is also {name}" for name in found.numbers.keys() - expected.numbers.keys() if "gradient" in name]
    return wrong + [f"there is no longer a file {name}" for name in set(expected.files) - set(found.files)]


def check(path, script, planted):
    """Whether a copy is mended. Args: path; script; planted (the copy as it was). Returns: (bool, message)."""
    def stop(message, **_):
        raise RuntimeError(message)

    try:
        with patch.object(plumbing, "stop", stop), patch.object(runs, "stop", stop):
            theirs, ours = (asdict(load_module(file).Args()) for file in (path, script))
            changed = [name for name in ours if theirs.get(name) != ours[name]]
            if changed:
                return False, f"something else is different now: the default of --{changed[0].replace('_', '-')}"
            for setting in SETTINGS:
                wrong = compare(path, script, BASE | setting)
                if wrong:
                    break
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        return False, f"it stops{f' in line {lines[-1]}' if lines else ''}: {type(error).__name__}: {one_line(error)}"
    if not wrong:
        return True, f"mended: it computes what {Path(script).name} computes"
    if set(wrong) & set(compare(planted, script, BASE | setting)):
        return False, "the bug is still there"
    flags = " ".join(f"--{name.replace('_', '-')} {setting[name]}" for name in setting if name in ours)
    return False, f"something else is different now: {wrong[0]}, with {flags}"
