"""Is a copy of rloo_minimal.py ReMax now? The last exercise of the sheet's fourth part.

    cp rloo_minimal.py my_remax.py
    python -m exercises.page my_remax.py

The copy's own `main` makes two updates with k 2 and two with k 1, in a tiny world: other prompts,
another policy and another `reward`. Its gradients are read where its optimizer steps, and compared
with those that remax.py's functions give for the same responses; where they differ, with those of
known mistakes. load_prompts, reward, main and the flags of Args have to keep their names. The
exit code is 0 if it is ReMax.
"""

import contextlib
import io
import sys
import tempfile
from dataclasses import dataclass
from typing import Annotated, NamedTuple
from unittest.mock import patch

import torch
import transformers
import tyro
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import remax
import rloo
from exercises.worker import one_line
from lab.tiny_world import make_model, make_tokenizer
from plumbing import load_module

WORDS = 5
PROMPTS = ["a b c", "d", "e a b", "b b", "c e d a"]
FLAGS = dict(beta=0.5, temperature=0.7, lr=0.05, max_grad_norm=1e9, num_updates=2,
             prompts_per_step=4, max_new_tokens=5, missing_eos_penalty=1.5, seed=1)
T, PENALTY, TEMPERATURE = (FLAGS[name] for name in ("max_new_tokens", "missing_eos_penalty",
                                                    "temperature"))


@dataclass
class Args:
    page: Annotated[str, tyro.conf.Positional]
    """your copy of rloo_minimal.py"""


@contextlib.contextmanager
def float64():
    """In which floats are float64 by default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class Update(NamedTuple):
    policy: torch.nn.Module  # before the step
    gradient: torch.Tensor  # (parameters,)
    rows: list  # (prompt, completion) of each text whose reward was asked for


def reward(prompts, completions):
    """Of texts: depends on the prompt, and on a response's words and their order."""
    value = dict(zip("abcde", (1.0, -0.7, 0.4, 2.1, -1.3)))
    return [sum(value[word] / (1 + place) for place, word in enumerate(text.split()))
            + 0.3 * len(prompt) for prompt, text in zip(prompts, completions)]


def make_policy():
    """Some of its responses end at once, some late, some never."""
    return make_model(transformers.GPT2LMHeadModel, WORDS + 1, seed=6)


def run(path, k):
    """The Updates of a page's main, or one line that says why there are none."""
    module, policy, updates, rows = load_module(path), make_policy(), [], []

    def asked(prompts, completions):
        rows.extend(zip(prompts, completions))
        return reward(prompts, completions)

    def step(optimizer, *_):
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in policy.parameters()]
        before = make_policy()
        before.load_state_dict(policy.state_dict())
        updates.append(Update(before, torch.cat([x.flatten() for x in gradients]), rows[:]))
        rows.clear()

    loaders = (transformers.AutoModelForCausalLM, policy), (transformers.AutoTokenizer, tokenizer())
    hook = register_optimizer_step_pre_hook(step)
    try:
        with (contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder):
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            for loader, loaded in loaders:
                stack.enter_context(patch.object(
                    loader, "from_pretrained", lambda *_, loaded=loaded, **__: loaded))
            stack.enter_context(patch.object(module, "load_prompts", lambda: PROMPTS))
            stack.enter_context(patch.object(module, "reward", asked))
            module.main(module.Args(k=k, output=folder, **FLAGS))
    except (Exception, SystemExit) as error:
        return one_line(error, path)
    finally:
        hook.remove()
    return updates


def tokenizer():
    found = make_tokenizer(WORDS)
    found.pad_token = found.eos_token
    return found


# ------------------------------------------------------------------------------------ the judgement


class Parts(NamedTuple):
    """What the gradient of an update is made of."""

    k: int
    mask: torch.Tensor  # (N, T)
    logprobs: torch.Tensor  # (N, T), with gradients
    kl: torch.Tensor  # (N, T)
    scores: torch.Tensor  # (N,), less the penalty
    greedy: torch.Tensor  # (B,), the scores of the greedy responses, less the penalty
    penalties: torch.Tensor  # (B,), theirs
    greedy_kl: torch.Tensor  # (B,), of the whole response

    def rewards(self, beta=FLAGS["beta"]):
        return common.token_rewards(self.scores, self.kl, beta, self.mask)  # (N, T)

    def each(self, baseline):
        return baseline.repeat_interleave(self.k)  # (N,)


def advantages_of(parts, baseline=None, rewards=None):
    """ReMax's advantages (N, T), with another baseline (N,) or other rewards (N, T)."""
    return remax.compute_advantages(parts.rewards() if rewards is None else rewards,
                                    parts.each(parts.greedy) if baseline is None else baseline,
                                    parts.mask)


def whole(rewards, mask):
    """The sum of a row's rewards, for each of its tokens: (N, T)."""
    return rewards.sum(1, keepdim=True) * mask


MISTAKES = [  # (what its advantages are, what is wrong)
    (lambda parts: rloo.compute_advantages(parts.rewards().sum(1), parts.k).unsqueeze(1)
     * parts.mask,
     "the gradient is still RLOO's"),
    (lambda parts: advantages_of(parts, 0 * parts.scores),
     "no baseline is subtracted"),
    (lambda parts: whole(parts.rewards(), parts.mask) - parts.each(parts.greedy).unsqueeze(1)
     * parts.mask,
     "every token is charged for the KL of the whole response: take it from the token on"),
    (lambda parts: advantages_of(parts, rewards=parts.rewards(beta=0.0)),
     "the KL is missing in the rewards"),
    (lambda parts: advantages_of(parts, parts.each(parts.greedy + parts.penalties)),
     "a greedy response without EOS has to pay the penalty, too"),
    (lambda parts: advantages_of(parts, parts.each(parts.greedy - FLAGS["beta"] * parts.greedy_kl)),
     "the baseline is the greedy response's score: its KL is not part of it"),
    (lambda parts: advantages_of(parts, parts.greedy.repeat(parts.k)),
     "the greedy scores are on other prompts' rows: use repeat_interleave, not repeat"),
    (lambda parts: advantages_of(parts, -parts.each(parts.greedy)),
     "the baseline is added: it has to be subtracted"),
]


def encode(rows):
    """A Batch of (prompt, completion): a response with fewer than T words has ended in EOS."""
    words = tokenizer()
    responses = [words(text)["input_ids"] for _, text in rows]
    ended = [len(ids) < T for ids in responses]
    responses = [ids + [words.eos_token_id] * end for ids, end in zip(responses, ended)]
    prompts = [words(prompt)["input_ids"] for prompt, _ in rows]
    return common.make_batch(words, prompts, responses, "cpu", ended)


def sampled_and_greedy(update, k):
    """Of an update's rows, the N sampled ones; and the B greedy ones. None if there are no such."""
    N, found = k * FLAGS["prompts_per_step"], None
    for rows in (update.rows[:N], update.rows[-N:]):  # the greedy ones come last, or first
        prompts = [prompt for prompt, _ in rows[::k]]
        ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
        batch = common.rollout(update.policy, tokenizer(), ids, 1, TEMPERATURE, T, greedy=True)
        best = list(zip(prompts, common.decode(tokenizer(), batch)))
        if [prompt for prompt, _ in rows] == common.repeat(prompts, k):
            found = rows, best
            if rows != common.repeat(best, k):
                return found
    return found


def parts_of(update, k):
    """The Parts of an Update, or None if its rows are not k to each prompt, one after another."""
    if not (found := sampled_and_greedy(update, k)):
        return None
    batch, of_best = map(encode, found)
    now, reference = (lambda batch, model=model: common.token_logprobs(model, batch, TEMPERATURE)
                      for model in (update.policy, make_policy()))
    kl, best_kl = ((now(each) - reference(each)).detach() for each in (batch, of_best))
    penalties = [PENALTY * ~each.ended for each in (batch, of_best)]
    scores, greedy = (torch.tensor(reward(*zip(*rows))) - penalty
                      for rows, penalty in zip(found, penalties))
    return Parts(k, batch.response_mask, now(batch), kl, scores, greedy, penalties[1],
                 best_kl.sum(1))


def gradient(update, parts, advantages):
    loss = remax.compute_loss(parts.logprobs, advantages) / len(advantages)
    found = torch.autograd.grad(loss, list(update.policy.parameters()), retain_graph=True)
    return torch.cat([x.flatten() for x in found])


@float64()
def judge(path):
    """What is wrong with a page: one line, or None."""
    for k in (2, 1):
        updates = run(path, k)
        if isinstance(updates, str):
            return f"with --k {k}: {updates}"
        if len(updates) != FLAGS["num_updates"]:
            return f"it makes {len(updates)} steps in {FLAGS['num_updates']} updates"
        pairs = [(update, parts_of(update, k)) for update in updates]
        if None in [parts for _, parts in pairs]:
            return "reward does not get k responses to each prompt, one after another"
        if not all_alike(pairs, advantages_of):
            return f"with --k {k}: {what_is_wrong(pairs)}"


def what_is_wrong(pairs):
    """One line about Updates and their Parts, whose gradients are not ReMax's."""
    for mistake, sentence in MISTAKES:
        if all_alike(pairs, mistake):
            return sentence
    update, parts = pairs[0]
    wanted = gradient(update, parts, advantages_of(parts))
    product = update.gradient @ wanted / wanted.norm()
    return (f"your gradient is another: cosine to ReMax's {product / update.gradient.norm():.3f}, "
            f"length along it {product / wanted.norm():.3f}")


def all_alike(pairs, advantages):
    """Whether a function of the Parts gives the gradients of all Updates."""
    wanted = [gradient(update, parts, advantages(parts)) for update, parts in pairs]
    return all((update.gradient - found).norm() <= 1e-6 * found.norm()
               for (update, _), found in zip(pairs, wanted))


def main(args):
    wrong = judge(args.page)
    print(f"{args.page}: {wrong or 'it is ReMax'}")
    return wrong is None


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Args)))
