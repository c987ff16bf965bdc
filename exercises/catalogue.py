"""What check.py compares with: the right functions, inputs for them, and the mistakes that people make.

The right functions are the scripts' own. A mistake is a function that returns what somebody who makes it returns,
mostly the right function with other inputs. tests/test_exercises.py shows that no two mistakes look alike.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import raft  # noqa: E402
import reinforce  # noqa: E402
import reinforce_pp_baseline  # noqa: E402
import remax  # noqa: E402
import rloo  # noqa: E402
from questions import World  # noqa: E402

INF = float("inf")


# ------------------------------------------------------------------------------------------------- the right functions

def response_mask(responses, eos):
    lengths = [row.index(eos) + 1 if eos in row else len(row) for row in responses.tolist()]
    return torch.arange(responses.shape[1]) < torch.tensor(lengths).unsqueeze(1)  # (N, T)


def token_kl(logprobs, ref_logprobs, response_mask, estimator="k1"):
    """The scripts have k1 by token. k2 and k3 are terms of two losses, which are called for one token at a time."""
    one = torch.ones(1, 1, dtype=torch.bool)
    loss = {
        "k2": reinforce_pp_baseline.compute_kl_loss,
        "k3": lambda a, b: grpo.compute_loss(a, a, b, torch.zeros(1), one, INF, 1.0)[0],
    }
    if estimator == "k1":
        return common.token_kl(logprobs, ref_logprobs, response_mask)
    tokens = zip(logprobs.view(-1, 1, 1), ref_logprobs.view(-1, 1, 1))
    return torch.stack([loss[estimator](*pair) for pair in tokens]).view_as(logprobs) * response_mask


right = SimpleNamespace(
    response_mask=response_mask,
    token_kl=token_kl,
    sequence_rewards=common.sequence_rewards,
    token_rewards=common.token_rewards,
    rloo_advantages=rloo.compute_advantages,
    rloo_loss=rloo.compute_loss,
    reinforce_baseline=reinforce.compute_baseline,
    remax_advantages=remax.compute_advantages,
    ppo_advantages=ppo.compute_advantages,
    whiten_advantages=ppo.whiten_advantages,
    first_step_loss=lambda logprobs, advantages: ppo.compute_loss(logprobs, logprobs.detach(), advantages, INF)[0],
    ppo_loss=ppo.compute_loss,
    value_loss=ppo.compute_value_loss,
    grpo_advantages=grpo.compute_advantages,
    raft_best=raft.select_best,
    dpo_loss=dpo.compute_loss,
)
OUTPUTS = {  # where a function returns several
    "ppo_advantages": ("advantages", "returns"),
    "ppo_loss": ("the loss", "the number of clipped tokens"),
    "dpo_loss": ("the loss", "the chosen responses' rewards", "the rejected responses' rewards"),
}


# ------------------------------------------------------------------------------------------------------------- inputs

def cases(seed=1):
    """Inputs for each function: dict name -> list of arguments. The first that a mistake changes gives it away.

    12 rows are 3 prompts with 4 responses, of 2 to 6 tokens. The last case of three functions is the whole world of
    questions.py, so that the expected gradient can be computed from what they return (see `expected_gradient`).
    """
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    lengths = torch.tensor([6, 2, 3, 5, 2, 4, 6, 3, 2, 5, 3, 4])
    mask = torch.arange(6) < lengths.unsqueeze(1)  # (12, 6)
    short = torch.arange(6) < lengths.sub(1).unsqueeze(1)  # (12, 6), also with a response of a single token

    ended = torch.tensor([False, *[True] * 11])
    responses = torch.randint(3, 9, (12, 6), generator=generator)  # 2 is EOS
    responses[torch.arange(12), lengths - 1] = torch.where(ended, 2, 8)
    after = torch.tensor([[2], [0], [7]]).repeat(4, 1)  # padded with EOS, with 0, or followed by more tokens and an EOS
    responses = torch.where(mask, responses, after)
    responses[2, 5] = responses[5, 5] = 2

    scores, kl, baseline, values = random(12), random(12, 6) * mask, random(12), random(12, 6)
    rewards = random(12) + torch.tensor([0.0, 2.0, -1.0]).repeat_interleave(4)
    similar = torch.cat([rewards[:4], 1 + 0.01 * random(4), torch.full((4,), 0.5)])  # a small std, and none
    logprobs, ref_logprobs, old_logprobs = (-random(12, 6).abs() for _ in range(3))
    trained, other = (logprobs * mask).requires_grad_(), (ref_logprobs * mask).requires_grad_()
    advantages = random(12, 6)
    history = random(5).add(1).tolist()

    world = World(seed)
    draws = world.scores[world.draws(2)[0]].flatten().float()  # (98,)
    world_rewards, world_values = world.token_rewards().float(), (world.values[world.states] * world.mask).float()

    return {
        "response_mask": [(responses, 2)],
        "token_kl": [(logprobs, ref_logprobs, mask, estimator) for estimator in ("k1", "k2", "k3")],
        "sequence_rewards": [(scores, kl, 0.3)],
        "token_rewards": [(scores, kl, 0.3, mask), (scores, kl * short, 0.3, short)],
        "rloo_advantages": [(rewards, 4), (draws, 2)],
        "rloo_loss": [(trained, baseline)],
        "reinforce_baseline": [
            (history, "moving-average", 0, 0.9), (history, "moving-average", 2, 0.9),
            (history, "moving-average", 9, 0.9), (history, "ema", 0, 0.7), (history, "none", 0, 0.9),
            *[([], kind, 3, 0.9) for kind in ("none", "moving-average", "ema")],
        ],
        "remax_advantages": [
            (kl, baseline, mask), (world_rewards, world.scores[world.probs.argmax()].float().repeat(7), world.mask)],
        "ppo_advantages": [
            (kl, values * mask, mask, 0.9, 0.8), (kl * short, values * short, short, 1.0, 0.95),
            (world_rewards, world_values, world.mask, 1.0, 1.0)],
        "whiten_advantages": [(advantages, mask), (advantages[:1, :1], mask[:1, :1])],
        "first_step_loss": [(trained, advantages * mask)],
        "ppo_loss": [(trained, old_logprobs, advantages * mask, 0.2)],
        "value_loss": [(values.clone().requires_grad_(), values + 0.5 * random(12, 6), advantages, 0.2)],
        "grpo_advantages": [(similar, 4), (rewards, 4, False)],
        "raft_best": [(rewards, 4), (rewards, 3)],
        "dpo_loss": [
            (trained, other, old_logprobs * mask, logprobs.flip(0) * mask, 0.5),
            ((trained.detach() - 200 * mask).requires_grad_(), other, old_logprobs * mask, logprobs * mask, 1.0)],
    }


def expected_gradient(name, advantages, world):
    """The exact expectation of the gradient that advantages for the world's case give."""
    if name == "rloo_advantages":
        return world.draws(2)[1] @ world.estimates(advantages.double(), 2)
    return world.token_gradient(advantages)


# ----------------------------------------------------------------------------------------------------------- mistakes

NO_GRADIENT = "the loss carries no gradient: something detached it (.detach(), .item(), no_grad, numpy)"
WRONG_SIGN = "the sign is wrong: an optimizer minimizes, so good responses would become rarer"
SAMPLE_MAJOR = "you grouped rows sample-major: samples of different prompts are compared"


def scaled(function, factor):
    """Multiplies what a loss function returns first by factor(its first argument)."""
    def wrong(*given):
        outputs = function(*given)
        loss, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        return (factor(given[0]) * loss, *rest) if rest else factor(given[0]) * loss
    return wrong


def detached(function):
    """A loss function whose loss has no gradient."""
    def wrong(*given):
        outputs = function(*given)
        return tuple(map(torch.Tensor.detach, outputs)) if isinstance(outputs, tuple) else outputs.detach()
    return wrong


def only(estimator, wrong):
    """A token_kl that is wrong for one estimator."""
    return lambda logprobs, ref_logprobs, mask, kind="k1": (
        wrong(logprobs, ref_logprobs) * mask if kind == estimator else token_kl(logprobs, ref_logprobs, mask, kind))


def sample_major(function):
    """Groups row = sample * B + prompt, where row = prompt * k + sample is meant."""
    def wrong(rewards, k, *rest):
        return function(rewards.view(k, -1).t().flatten(), k, *rest).view(-1, k).t().flatten()
    return wrong


def others(rewards, k):
    """Each row's leave-one-out baseline."""
    return rewards - right.rloo_advantages(rewards, k)


def group_std(rewards, k, correction=1):
    return rewards.view(-1, k).std(1, correction=correction).repeat_interleave(k)


def placed(scores, mask):
    """The scores where token_rewards puts them."""
    return right.token_rewards(scores, torch.zeros(mask.shape), 0.0, mask)


def deltas(rewards, values, mask, gamma):
    return right.ppo_advantages(rewards, values, mask, gamma, 0.0)[0]


def accumulated(delta, values, mask, decay):
    """Advantages and returns from given deltas."""
    advantages = right.ppo_advantages(delta, torch.zeros_like(delta), mask, decay, 1.0)[0]
    return advantages, (advantages + values) * mask


def forward_in_time(rewards, values, mask, gamma, lam):
    delta = deltas(rewards, values, mask, gamma)
    advantages = accumulated(delta.flip(1), values, mask | True, gamma * lam)[0].flip(1) * mask
    return advantages, (advantages + values) * mask


def surrogate(ratio, advantages, low, high):
    """A loss like PPO's for something that is not its ratio."""
    free, bounded = ratio * advantages, ratio.clamp(low, high) * advantages
    return -torch.min(free, bounded).sum(), (bounded < free).sum()


def clipped_term(logprobs, old_logprobs, advantages, clip):
    return -((logprobs - old_logprobs).exp().clamp(1 - clip, 1 + clip) * advantages).sum()


def squared(values, returns):
    return (values - returns).square().sum() / 2


def near(values, old_values, value_clip):
    return old_values + (values - old_values).clamp(-value_clip, value_clip)


def outside(logprobs, old_logprobs, clip):
    return ((logprobs - old_logprobs).exp() - 1).abs() > clip


def with_count(count):
    """ppo_loss with another count of clipped tokens."""
    return lambda *given: (ppo.compute_loss(*given)[0], count(*given))


def ema_only(wrong):
    return lambda history, kind, window, decay: (
        wrong(history, decay) if kind == "ema" and history else right.reinforce_baseline(history, kind, window, decay))


def dpo_with(loss):
    """dpo_loss with the right rewards and another loss, from (n,) rewards with gradients and the beta."""
    def wrong(chosen, rejected, chosen_ref, rejected_ref, beta):
        rewards = [beta * (logprobs - ref).sum(1) for logprobs, ref in ((chosen, chosen_ref), (rejected, rejected_ref))]
        return loss(*rewards, beta), *(reward.detach() for reward in rewards)
    return wrong


# (function, what the mistake returns, what to say, words of the line of the docstring that says otherwise)
MISTAKES = [
    ("response_mask", lambda responses, eos: response_mask(responses, eos) & (responses != eos),
     "EOS is not in your mask, so the end is never trained and responses grow", "first EOS itself"),
    ("response_mask", lambda responses, eos: responses != eos,
     "you mask every EOS and nothing else: the mask has to be found by position, up to the first EOS, not by id",
     "all up to the first EOS"),
    ("response_mask", lambda responses, eos: F.pad(response_mask(responses, eos), (1, -1), value=True),
     "your mask goes one token too far, into the padding", "all up to the first EOS"),
    ("response_mask", lambda responses, eos: response_mask(responses, eos) & (responses == eos).any(1, keepdim=True),
     "you mask out responses that were cut off before an EOS: their tokens were sampled too", "cut off"),
    ("response_mask", lambda responses, eos: ~response_mask(responses, eos),
     "your mask is inverted: True means real", "Which tokens belong"),
    ("response_mask", lambda responses, eos: (
        (responses == eos).flip(1).cumsum(1).flip(1) > 0) | ~(responses == eos).any(1, keepdim=True),
     "your mask ends at the last EOS: what follows the first is not part of the response", "all up to the first EOS"),

    ("token_kl", only("k1", lambda logprobs, ref_logprobs: ref_logprobs - logprobs),
     "k1 has the wrong sign: KL would be rewarded, and the policy would run from the reference", "k1 ="),
    ("token_kl", only("k1", lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).abs()),
     "your k1 is an absolute value: single values may be negative, and only so is their mean the KL", "k1 ="),
    ("token_kl", only("k1", lambda logprobs, ref_logprobs: logprobs.exp() * (logprobs - ref_logprobs)),
     "you weight k1 by the probability of the token: tokens are sampled from pi already",
     "from tokens that were sampled"),
    ("token_kl", only("k2", lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).square()),
     "your k2 lacks the factor 1/2", "k2 ="),
    ("token_kl", only("k3", lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).expm1() - logprobs + ref_logprobs),
     "your k3 has its ratio upside down: it is pi_ref / pi, since the tokens were sampled from pi", "k3 ="),
    ("token_kl", only("k3", lambda logprobs, ref_logprobs: (ref_logprobs - logprobs).expm1() + ref_logprobs - logprobs),
     "the log in your k3 has the wrong sign, so k3 can be negative", "k3 ="),
    ("token_kl", only("k3", lambda logprobs, ref_logprobs: (ref_logprobs - logprobs).exp() + logprobs - ref_logprobs),
     "your k3 lacks the - 1: it is not 0 where the policies agree", "k3 ="),
    ("token_kl", lambda logprobs, ref_logprobs, mask, kind="k1": token_kl(logprobs, ref_logprobs, mask | True, kind),
     "you forgot the mask: the padding has KL too", "0 where masked"),

    ("sequence_rewards", lambda scores, kl, beta: right.sequence_rewards(scores, -kl, beta),
     "you add the KL: it would be rewarded", "R_i ="),
    ("sequence_rewards", lambda scores, kl, beta: right.sequence_rewards(scores, kl / kl.shape[1], beta),
     "you average the KL over tokens: long responses would get it cheaper", "sum of kl"),
    ("sequence_rewards", lambda scores, kl, beta: right.sequence_rewards(scores, kl, 1.0),
     "beta is missing", "beta *"),
    ("sequence_rewards", lambda scores, kl, beta: right.sequence_rewards(scores, kl.sum().view(1, 1), beta),
     "you sum the KL over the whole batch: each response pays for its own", "tokens of response i"),
    ("sequence_rewards", lambda scores, kl, beta: right.sequence_rewards(beta * scores, kl, beta),
     "beta multiplies the score too", "R_i ="),
    ("sequence_rewards", lambda scores, kl, beta: right.sequence_rewards(scores, kl[:, :1], beta),
     "you charge only the first token's KL", "sum of kl"),

    ("token_rewards", lambda scores, kl, beta, mask: right.token_rewards(scores, kl, beta, mask | True),
     "the score lands in the last column, which is padding for most responses", "last real token"),
    ("token_rewards", lambda scores, kl, beta, mask: -beta * kl + scores.unsqueeze(1) * mask,
     "every token gets the score: a response of 20 tokens would be paid 20 times", "plus the score at the last"),
    ("token_rewards", lambda scores, kl, beta, mask: F.pad(placed(scores, mask), (1, -1)) - beta * kl,
     "the score lands one token after the last, and is lost where a response fills the row", "last real token"),
    ("token_rewards", lambda scores, kl, beta, mask: placed(scores, mask).roll(-1, 1) - beta * kl,
     "the score lands one token before the last: EOS would not be paid for", "last real token"),
    ("token_rewards", lambda scores, kl, beta, mask: F.pad(scores.unsqueeze(1), (0, mask.shape[1] - 1)) - beta * kl,
     "the score lands on the first token", "last real token"),
    ("token_rewards", lambda scores, kl, beta, mask: right.token_rewards(scores, -kl, beta, mask),
     "you add the KL: it would be rewarded", "r_t ="),
    ("token_rewards", lambda scores, kl, beta, mask: right.token_rewards(
        scores, kl * (1 - placed(torch.ones(len(kl)), mask)), beta, mask),
     "the score replaces the last token's KL: it has to be added to it", "plus the score"),
    ("token_rewards", lambda scores, kl, beta, mask: right.token_rewards(scores, kl, 1.0, mask),
     "beta is missing", "beta *"),
    ("token_rewards", lambda scores, kl, beta, mask: (scores / mask.sum(1)).unsqueeze(1) * mask - beta * kl,
     "you spread the score evenly over the tokens", "at the last real token"),

    ("rloo_advantages", lambda rewards, k: (k - 1) / k * right.rloo_advantages(rewards, k),
     "your baseline contains the sample itself: you return (k - 1)/k of the right values", "mean of the other"),
    ("rloo_advantages", sample_major(right.rloo_advantages),
     SAMPLE_MAJOR, "prompt-major"),
    ("rloo_advantages", lambda rewards, k: rewards - (k - 1) / k * others(rewards, k),
     "you divided by k, not k - 1: the baseline is only (k - 1)/k of what it should be", "mean of the other"),
    ("rloo_advantages", lambda rewards, k: rewards - (k - 1) * others(rewards, k),
     "you subtract the sum of the others, not their mean", "mean of the other"),
    ("rloo_advantages", lambda rewards, k: -right.rloo_advantages(rewards, k),
     "the sign is wrong: the best responses would become less likely", "A_i ="),
    ("rloo_advantages", lambda rewards, k: right.rloo_advantages(rewards, len(rewards)),
     "your baseline is over the whole batch, not over the prompt's own samples", "same prompt"),
    ("rloo_advantages", others, "you return the baseline, not the reward minus the baseline", "A_i ="),
    ("rloo_advantages", lambda rewards, k: right.rloo_advantages(rewards, k) / group_std(rewards, k),
     "you divide by the std: that is GRPO's, and biased", "A_i ="),
    ("rloo_advantages", lambda rewards, k: rewards, "you subtract no baseline", "A_i ="),

    ("rloo_loss", scaled(right.rloo_loss, lambda logprobs: -1), WRONG_SIGN, "- sum_i"),
    ("rloo_loss", lambda logprobs, advantages: right.rloo_loss(
        logprobs / (logprobs != 0).sum(1, keepdim=True), advantages),
     "you average over a response's tokens: that favours short good and long bad responses", "sum of the log-probs"),
    ("rloo_loss", scaled(right.rloo_loss, lambda logprobs: 1 / logprobs.shape[1]),
     "you average over T, padding included: the gradient changes with the longest response of the batch",
     "sum of the log-probs"),
    ("rloo_loss", scaled(right.rloo_loss, lambda logprobs: 1 / len(logprobs)),
     "you divide by the number of rows, which the caller does: the gradient would depend on the micro-batch size",
     "A sum over rows"),
    ("rloo_loss", detached(right.rloo_loss), NO_GRADIENT, "Returns: scalar"),
    ("rloo_loss", lambda logprobs, advantages: -(advantages * logprobs.sum(1, keepdim=True)).sum(),
     "(n, 1) times (n,) is (n, n): every response gets everybody's advantage", "A_i log pi"),
    ("rloo_loss", lambda logprobs, advantages: right.rloo_loss(logprobs.exp() * (logprobs != 0), advantages),
     "you sum probabilities, not log-probs", "sum of the log-probs"),

    ("reinforce_baseline", lambda history, kind, window, decay: (
        sum(history) if kind == "moving-average" and not window else
        right.reinforce_baseline(history, kind, window, decay)),
     "you return the sum, not the mean", "the mean of the last"),
    ("reinforce_baseline", lambda history, kind, window, decay: (
        right.reinforce_baseline(history[:-1], kind, window, decay)),
     "you leave out the newest step: history holds past steps only, so all of them count", "all steps"),
    ("reinforce_baseline", lambda history, kind, window, decay: (
        right.reinforce_baseline(history[-1:], kind, window, decay)),
     "you return the last step's reward, whose noise is that of a single step", "the mean of the last"),
    ("reinforce_baseline", lambda history, kind, window, decay: right.reinforce_baseline(history, kind, 0, decay),
     "you ignore the window", "the mean of the last"),
    ("reinforce_baseline", lambda history, kind, window, decay: (
        right.reinforce_baseline(history[:window] if window else history, kind, 0, decay)),
     "your window holds the oldest steps: the newest are last in history", "oldest first"),
    ("reinforce_baseline", lambda history, kind, window, decay: (
        sum(history[-window:]) / window if kind == "moving-average" and window else
        right.reinforce_baseline(history, kind, window, decay)),
     "you divide by the window even while there are fewer steps", "the mean of the last"),
    ("reinforce_baseline", ema_only(lambda history, decay: right.reinforce_baseline(history, "ema", 0, 1 - decay)),
     "decay and 1 - decay are exchanged", "decay * b"),
    ("reinforce_baseline", ema_only(lambda history, decay: right.reinforce_baseline([0.0, *history], "ema", 0, decay)),
     "your EMA starts at 0: it lags behind for the first 1 / (1 - decay) steps", "starts at the first step"),
    ("reinforce_baseline", ema_only(lambda history, decay: right.reinforce_baseline(history[::-1], "ema", 0, decay)),
     "your EMA runs backwards in time: the oldest step weighs most", "oldest first"),
    ("reinforce_baseline", lambda history, kind, window, decay: right.reinforce_baseline(
        history, "moving-average" if kind == "none" else kind, window, decay),
     '"none" is no baseline: 0', '"none"'),

    ("remax_advantages", lambda rewards, baseline, mask: (rewards.cumsum(1) - baseline.unsqueeze(1)) * mask,
     "you sum the rewards up to token t: it is charged for the past, which it cannot change", "from token t on"),
    ("remax_advantages", lambda rewards, baseline, mask: (rewards - baseline.unsqueeze(1)) * mask,
     "the KL does not accumulate: you use each token's own reward only", "the sum of the rewards"),
    ("remax_advantages", lambda rewards, baseline, mask: (rewards.sum(1) - baseline).unsqueeze(1) * mask,
     "every token gets the whole response's sum: also the KL of the tokens before it", "from token t on"),
    ("remax_advantages", lambda rewards, baseline, mask: right.remax_advantages(rewards, -baseline, mask),
     "you add the baseline: no bias, but more variance than without one", "- baseline"),
    ("remax_advantages", lambda rewards, baseline, mask: right.remax_advantages(
        rewards - baseline.unsqueeze(1) * mask, 0 * baseline, mask),
     "the baseline is inside the sum, so it is subtracted once for each token that is left", "subtracted once"),
    ("remax_advantages", lambda rewards, baseline, mask: right.remax_advantages(rewards, baseline, mask | True),
     "the padding is not 0: it has minus the baseline", "0 where masked"),
    ("remax_advantages", lambda rewards, *given: right.remax_advantages(F.pad(rewards, (-1, 1)), *given),
     "your sum begins after token t: its own reward is lost, and with it the score of the last token", "r_t included"),
    ("remax_advantages", lambda rewards, baseline, mask: right.remax_advantages(rewards, 0 * baseline, mask),
     "you subtract no baseline", "- baseline"),

    ("ppo_advantages", lambda *given: right.ppo_advantages(*given[:4], 1.0),
     "you ignore lam", "A_t ="),
    ("ppo_advantages", lambda *given: right.ppo_advantages(*given[:3], 1.0, given[4]),
     "you ignore gamma", "delta_t ="),
    ("ppo_advantages", lambda *given: right.ppo_advantages(*given[:4], 0.0),
     "these are the deltas: nothing accumulates from later tokens", "A_t ="),
    ("ppo_advantages", lambda rewards, values, mask, gamma, lam: accumulated(
        rewards + (gamma - 1) * values, values, mask, gamma * lam),
     "your delta has V_t twice: the first has to be V_{t+1}, that of the next state", "delta_t ="),
    ("ppo_advantages", lambda rewards, values, mask, gamma, lam: right.ppo_advantages(
        rewards, F.pad(values, (-1, 1)), mask, gamma, lam),
     "the values are shifted by one token: you read V after the action, which it must not see", "before token t"),
    ("ppo_advantages", lambda rewards, values, mask, gamma, lam: right.ppo_advantages(
        rewards + gamma * values * placed(torch.ones(len(mask)), mask), values, mask, gamma, lam),
     "the last token bootstraps from its own V: after the last token there is no value", "After the last real token"),
    ("ppo_advantages", lambda rewards, values, mask, gamma, lam: accumulated(
        deltas(rewards, values, mask, gamma), values, mask, lam),
     "A_{t+1} is multiplied by lam alone: gamma is missing there", "A_t ="),
    ("ppo_advantages", lambda rewards, values, mask, gamma, lam: accumulated(
        deltas(rewards, values, mask, gamma * lam), values, mask, gamma * lam),
     "lam has crept into the delta: V_{t+1} is multiplied by gamma alone", "delta_t ="),
    ("ppo_advantages", forward_in_time,
     "you accumulate from the first token on: advantages look forward in time, so start at the last",
     "back to the first"),
    ("ppo_advantages", lambda *given: tuple(
        F.pad(output, (1, -1)) for output in right.ppo_advantages(*given)),
     "advantages are shifted by one token", "A_t ="),
    ("ppo_advantages", lambda *given: (right.ppo_advantages(*given)[0], right.ppo_advantages(*given[:4], 1.0)[1]),
     "your returns are the plain sums of rewards: the critic's target here is A + V", "returns_t ="),
    ("ppo_advantages", lambda *given: (right.ppo_advantages(*given)[0],) * 2,
     "your returns lack + V", "returns_t ="),
    ("ppo_advantages", lambda *given: right.ppo_advantages(*given)[::-1],
     "advantages and returns are exchanged", "Returns: advantages and returns"),

    ("whiten_advantages", lambda advantages, mask: ppo.whiten_advantages(advantages, mask) * (
        mask.sum() / (mask.sum() - 1)).sqrt(), "your std has N in its denominator, not N - 1", "n - 1"),
    ("whiten_advantages", lambda advantages, mask: ppo.whiten_advantages(advantages, mask | True) * mask,
     "mean and std count the padding", "over all real tokens"),
    ("whiten_advantages", lambda advantages, mask: ppo.whiten_advantages(advantages * mask, mask | True) * mask,
     "mean and std count the padding, as zeros: responses of other lengths would change them", "over all real tokens"),
    ("whiten_advantages", lambda advantages, mask: torch.cat(
        [ppo.whiten_advantages(row, keep) for row, keep in zip(advantages.split(1), mask.split(1))]),
     "you whiten each response by itself: all would be equally good on average", "of the batch together"),
    ("whiten_advantages", lambda advantages, mask: advantages / (advantages[mask].std() + 1e-8) * mask,
     "the mean is not subtracted", "(A - mean)"),
    ("whiten_advantages", lambda advantages, mask: (advantages - advantages[mask].mean()) * mask,
     "you do not divide by the std", "(A - mean)"),
    ("whiten_advantages", lambda advantages, mask: (advantages - advantages[mask].mean()) / (
        advantages[mask].var() + 1e-8) * mask, "you divide by the variance, not by the std", "(A - mean)"),
    ("whiten_advantages", lambda advantages, mask: (advantages - advantages[mask].mean()) / (
        advantages[mask].std() + 1e-8), "the padding is not 0 afterwards", "0 where masked"),
    ("whiten_advantages", lambda advantages, mask: (advantages - advantages[mask].mean()) * (
        1 / advantages[mask].std() if len(mask) > 1 else float("nan")) * mask,
     "a single token has no std: NaN, and with it every weight, after one such batch", "0 if all are equal"),

    ("first_step_loss", lambda logprobs, advantages: ppo.compute_loss(logprobs, logprobs, advantages, INF)[0],
     "gradient flows through old_logprobs: it cancels that of logprobs, and nothing is learned",
     "pi_old is a constant"),
    ("first_step_loss", detached(right.first_step_loss),
     "the loss carries no gradient: only pi_old is a constant, the numerator of the ratio is not",
     "its gradient is not 0"),
    ("first_step_loss", lambda logprobs, advantages: -(logprobs * advantages).sum(),
     "you use log pi where the ratio stands: the gradient is right, but the value is another", "- sum_t ratio_t"),
    ("first_step_loss", scaled(right.first_step_loss, lambda logprobs: -1), WRONG_SIGN, "- sum_t ratio_t"),
    ("first_step_loss", lambda logprobs, advantages: -(logprobs.exp() * advantages).sum(),
     "you do not divide by pi_old: frequent tokens would get larger steps", "ratio_t = pi"),

    ("ppo_loss", lambda logprobs, old, advantages, clip: (
        -ppo.compute_loss(logprobs, old, -advantages, clip)[0], ppo.compute_loss(logprobs, old, -advantages, clip)[1]),
     "max instead of min: you take the optimistic of the two terms, so clipping no longer holds the policy back",
     "min( ratio_t"),
    ("ppo_loss", lambda logprobs, old, advantages, clip: (
        clipped_term(logprobs, old, advantages, clip), ppo.compute_loss(logprobs, old, advantages, clip)[1]),
     "you use the clipped term alone: a token that went too far the wrong way could never come back", "min( ratio_t"),
    ("ppo_loss", lambda logprobs, old, advantages, clip: ppo.compute_loss(logprobs, old, advantages, INF),
     "nothing is clipped", "clip(ratio_t"),
    ("ppo_loss", lambda logprobs, old, advantages, clip: ppo.compute_loss(old, logprobs, advantages, clip),
     "your ratio is upside down: pi_old / pi", "pi(y_t) / pi_old(y_t)"),
    ("ppo_loss", scaled(ppo.compute_loss, lambda logprobs: -1), WRONG_SIGN, "- sum_t"),
    ("ppo_loss", lambda logprobs, old, advantages, clip: surrogate(logprobs - old, advantages, 1 - clip, 1 + clip),
     "your ratio is a difference of log-probs: exp is missing", "pi(y_t) / pi_old(y_t)"),
    ("ppo_loss", lambda logprobs, old, advantages, clip: surrogate((logprobs - old).exp(), advantages, -clip, clip),
     "you clip the ratio to -clip ... clip: the range is around 1", "1 - clip"),
    ("ppo_loss", scaled(ppo.compute_loss, lambda logprobs: 1 / len(logprobs)),
     "you divide by the number of rows, which the caller does", "A sum over rows"),
    ("ppo_loss", scaled(ppo.compute_loss, lambda logprobs: 1 / logprobs.numel()),
     "you average over all positions, padding included: the gradient changes with the longest response",
     "A sum over rows"),
    ("ppo_loss", lambda logprobs, old, advantages, clip: surrogate(
        (logprobs - old).sum(1, keepdim=True).exp(), advantages, 1 - clip, 1 + clip),
     "you use one ratio for the whole response: that is another algorithm (GSPO, TRL's RLOO)", "per token"),
    ("ppo_loss", detached(ppo.compute_loss), NO_GRADIENT, "scalar with gradients"),
    ("ppo_loss", lambda logprobs, old, *given: ppo.compute_loss(logprobs, logprobs.detach(), *given),
     "your ratio is always 1: you detached logprobs instead of using old_logprobs", "pi(y_t) / pi_old(y_t)"),
    ("ppo_loss", with_count(lambda logprobs, old, advantages, clip: outside(logprobs, old, clip).sum()),
     "your count of clipped tokens counts padding too, and tokens whose gradient is not cut", "counts as clipped"),
    ("ppo_loss", with_count(lambda logprobs, old, advantages, clip: (
        outside(logprobs, old, clip) & (logprobs != 0)).sum()),
     "your count of clipped tokens has all outside the range, also those whose gradient is not cut",
     "counts as clipped"),
    ("ppo_loss", with_count(lambda logprobs, *given: ppo.compute_loss(logprobs, *given)[1] / logprobs.numel()),
     "you return the share of clipped tokens: the number is wanted, which can be summed over micro-batches",
     "the number of clipped tokens"),

    ("value_loss", scaled(ppo.compute_value_loss, lambda values: 2), "the factor 1/2 is missing", "1/2"),
    ("value_loss", lambda values, old, returns, clip: torch.min(
        (values - returns).square(), (near(values, old, clip) - returns).square()).sum() / 2,
     "min instead of max: you take the smaller error, so the clip does not hold V back", "max("),
    ("value_loss", lambda values, old, returns, clip: torch.max(
        (values - returns).square(), (values.clamp(-clip, clip) - returns).square()).sum() / 2,
     "you keep V itself within +- value_clip: the range is around the old value", "within V_old_t"),
    ("value_loss", lambda values, old, returns, clip: squared(values, returns), "nothing is clipped", "max("),
    ("value_loss", lambda values, old, returns, clip: squared(near(values, old, clip), returns),
     "you use the clipped term alone: where V is too far from V_old, it gets no gradient back", "max("),
    ("value_loss", scaled(ppo.compute_value_loss, lambda values: 1 / values.numel()),
     "you average over all positions, padding included: the loss is a sum", "sum_t max("),
    ("value_loss", detached(ppo.compute_value_loss), NO_GRADIENT, "Returns: scalar"),

    ("grpo_advantages", lambda rewards, k, scale_std=True: right.grpo_advantages(rewards, k, False) / (
        group_std(rewards, k, correction=0) + 1e-4), "your std has N in its denominator, not N - 1", "k - 1 in its"),
    ("grpo_advantages", lambda rewards, k, scale_std=True: right.grpo_advantages(rewards, len(rewards), scale_std),
     "mean and std are over the whole batch, not over the prompt's own samples", "of the same prompt"),
    ("grpo_advantages", lambda rewards, k, scale_std=True: k / (k - 1) * right.grpo_advantages(rewards, k, scale_std),
     "your mean leaves the response out: that is RLOO's baseline", "r_i included"),
    ("grpo_advantages", sample_major(right.grpo_advantages),
     SAMPLE_MAJOR, "prompt-major"),
    ("grpo_advantages", lambda rewards, k, _=True: right.grpo_advantages(rewards, k, False) / group_std(rewards, k),
     "nothing is added to the std: a prompt whose rewards are all equal gives 0 / 0", "1e-4"),
    ("grpo_advantages", lambda rewards, k, scale_std=True: right.grpo_advantages(rewards, k, False) / (
        group_std(rewards, k) + 1e-8), "you add 1e-8 to the std, as some codes do: here it is 1e-4", "1e-4"),
    ("grpo_advantages", lambda rewards, k, scale_std=True: right.grpo_advantages(rewards, k, False),
     "you never divide by the std", "(r_i - mean) /"),
    ("grpo_advantages", lambda rewards, k, scale_std=True: right.grpo_advantages(rewards, k, True),
     "you divide by the std even with scale_std=False", "scale_std=False"),
    ("grpo_advantages", lambda rewards, k, scale_std=True: right.grpo_advantages(rewards, k, False) / (
        group_std(rewards, k).square() + 1e-4), "you divide by the variance, not by the std", "(r_i - mean) /"),
    ("grpo_advantages", lambda *given: -right.grpo_advantages(*given),
     "the sign is wrong: the best responses would become less likely", "(r_i - mean) /"),

    ("raft_best", lambda rewards, k: right.raft_best(rewards, k) % k,
     "you return the number within the group: the row is prompt * k + that", "in the whole batch"),
    ("raft_best", lambda rewards, k: right.raft_best(-rewards, k), "you pick the worst response", "highest reward"),
    ("raft_best", lambda rewards, k: right.raft_best(rewards.view(k, -1).t().flatten(), k) % k * (
        len(rewards) // k) + torch.arange(len(rewards) // k),
     SAMPLE_MAJOR, "prompt-major"),
    ("raft_best", lambda rewards, k: rewards[right.raft_best(rewards, k)],
     "you return the rewards of the best responses, not their row numbers", "The row number"),
    ("raft_best", lambda rewards, k: rewards.topk(len(rewards) // k).indices.sort().values,
     "you pick the best of the whole batch: each prompt has to keep one", "of each prompt"),
    ("raft_best", lambda rewards, k: rewards.topk(len(rewards) // k).indices,
     "you pick the best of the whole batch, in order of reward: each prompt has to keep one", "of each prompt"),

    ("dpo_loss", lambda chosen, rejected, chosen_ref, rejected_ref, beta: right.dpo_loss(
        chosen, rejected, 0 * chosen_ref, 0 * rejected_ref, beta),
     "the reference is missing: nothing keeps the policy near it", "log(pi / pi_ref)"),
    ("dpo_loss", lambda *given: right.dpo_loss(*given[:4], 1.0), "beta is missing", "beta *"),
    ("dpo_loss", dpo_with(lambda chosen, rejected, beta: -F.logsigmoid(rejected - chosen).sum()),
     "your margin has the wrong sign: the rejected responses would become more likely", "r_chosen - r_rejected"),
    ("dpo_loss", lambda chosen, rejected, chosen_ref, rejected_ref, beta: right.dpo_loss(
        rejected, chosen, rejected_ref, chosen_ref, beta),
     "chosen and rejected are exchanged", "r_chosen - r_rejected"),
    ("dpo_loss", lambda chosen, rejected, chosen_ref, rejected_ref, beta: right.dpo_loss(
        chosen_ref, rejected_ref, chosen, rejected, beta),
     "your ratio is upside down: pi_ref / pi", "log(pi / pi_ref)"),
    ("dpo_loss", lambda *given: right.dpo_loss(*(x / (x != 0).sum(1, keepdim=True) for x in given[:4]), given[4]),
     "you average over a response's tokens: DPO's ratio is that of whole responses", "sum of the log-probs"),
    ("dpo_loss", scaled(dpo.compute_loss, lambda chosen_logprobs: 1 / len(chosen_logprobs)),
     "you average over the pairs: the loss is a sum, which the caller divides", "sum over pairs"),
    ("dpo_loss", dpo_with(lambda chosen, rejected, beta: -(chosen - rejected).sigmoid().sum()),
     "the log is missing", "log sigmoid"),
    ("dpo_loss", scaled(dpo.compute_loss, lambda chosen_logprobs: -1), WRONG_SIGN, "- sum over pairs"),
    ("dpo_loss", dpo_with(lambda chosen, rejected, beta: -beta * F.logsigmoid((chosen - rejected) / beta).sum()),
     "beta is outside the sigmoid: it belongs to the implicit rewards", "with the implicit reward"),
    ("dpo_loss", detached(dpo.compute_loss), NO_GRADIENT, "scalar with gradients"),
    ("dpo_loss", lambda chosen, rejected, chosen_ref, rejected_ref, beta: (
        right.dpo_loss(chosen, rejected, chosen_ref, rejected_ref, beta)[0], beta * (chosen - chosen_ref).sum(1),
        beta * (rejected - rejected_ref).sum(1)),
     "the implicit rewards still carry gradients: they would keep the whole graph in memory", "without gradients"),
    ("dpo_loss", dpo_with(lambda chosen, rejected, beta: -(chosen - rejected).sigmoid().log().sum()),
     "log(sigmoid(x)) is -inf for very negative x: use a function that computes both at once", "Margins of -100"),
]
