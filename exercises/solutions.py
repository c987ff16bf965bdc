"""The right functions, which are the scripts' own, and inputs to call them with."""

from types import SimpleNamespace

import torch

import cispo
import common
import dapo
import dpo
import grpo
import gspo
import maxrl
import ppo
import raft
import reinforce
import reinforce_pp_baseline
import remax
import rloo

INF, NAN = float("inf"), float("nan")
BONUS = 10.0


# ------------------------------------------------------------------------------ the right functions


def response_mask(responses, eos):
    """As common.sample builds it."""
    lengths = [row.index(eos) + 1 if eos in row else len(row) for row in responses.tolist()]
    return torch.arange(responses.shape[1]) < torch.tensor(lengths).unsqueeze(1)  # (N, T)


def token_kl(logprobs, ref_logprobs, response_mask, estimator="k1"):
    """The scripts have k1 by token. k2 and k3 are terms of two losses, called for one token.

    They get log-probs that are 0 where masked.
    """
    logprobs, ref_logprobs = (torch.where(response_mask, x, 0) for x in (logprobs, ref_logprobs))
    if estimator == "k1":
        return common.token_kl(logprobs, ref_logprobs, response_mask)
    loss = {"k2": reinforce_pp_baseline.compute_kl_loss, "k3": k3}[estimator]
    tokens = zip(logprobs.view(-1, 1, 1), ref_logprobs.view(-1, 1, 1))
    return torch.stack([loss(*pair) for pair in tokens]).view_as(logprobs) * response_mask


def k3(logprob, ref_logprob):
    """GRPO's loss for one token with an advantage of 0. Args: (1, 1) each."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    return grpo.compute_loss(logprob, logprob, ref_logprob, torch.zeros(1), mask, INF, 1.0)[0]


def whiten_advantages(advantages, response_mask):
    """The script's, which gets advantages that are 0 where masked."""
    return ppo.whiten_advantages(torch.where(response_mask, advantages, 0), response_mask)


def first_step_loss(logprobs, advantages):
    return ppo.compute_loss(logprobs, logprobs.detach(), advantages, INF)[0]


def gspo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high):
    return gspo.compute_loss(logprobs, old_logprobs, old_logprobs, advantages, response_mask,
                             clip_low, clip_high, 0.0)


def cispo_loss(logprobs, old_logprobs, advantages, response_mask, max_ratio):
    return cispo.compute_loss(logprobs, old_logprobs, old_logprobs, advantages, response_mask,
                              max_ratio, 0.0)


def dapo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high, num_tokens):
    return dapo.compute_loss(logprobs, old_logprobs, old_logprobs, advantages, response_mask,
                             clip_low, clip_high, 0.0)[0] / num_tokens


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
    whiten_advantages=whiten_advantages,
    first_step_loss=first_step_loss,
    ppo_loss=ppo.compute_loss,
    value_loss=ppo.compute_value_loss,
    grpo_advantages=grpo.compute_advantages,
    raft_best=raft.select_best,
    dpo_loss=dpo.compute_loss,
    maxrl_advantages=maxrl.compute_advantages,
    gspo_loss=gspo_loss,
    cispo_loss=cispo_loss,
    dapo_loss=dapo_loss)
OUTPUTS = {  # where a function returns several
    "ppo_advantages": ("advantages", "returns"),
    "ppo_loss": ("the loss", "the number of clipped tokens"),
    "gspo_loss": ("the loss", "the number of tokens in clipped responses"),
    "cispo_loss": ("the loss", "the number of tokens above max_ratio"),
    "dpo_loss": ("the loss", "the chosen responses' rewards", "the rejected responses' rewards"),
}


# ------------------------------------------------------------------------------------------- inputs


def cases(seed=1):
    """Inputs for each function: dict name -> list of arguments.

    The first that a mistake changes gives it away. 12 rows are 3 prompts with 4 responses, of 2 to
    6 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    lengths = torch.tensor([6, 2, 3, 5, 2, 4, 6, 3, 2, 5, 3, 4])
    mask = torch.arange(6) < lengths.unsqueeze(1)  # (12, 6)
    short = torch.arange(6) < lengths.sub(1).unsqueeze(1)  # (12, 6), with responses of one token
    responses = padded_responses(lengths, mask, generator)  # (12, 6)
    scores, kl, baseline, values = random(12), random(12, 6) * mask, random(12), random(12, 6)
    rewards = random(12) + torch.tensor([0.0, 2.0, -1.0]).repeat_interleave(4)
    similar = torch.cat([rewards[:4], 1 + 0.01 * random(4), torch.full((4,), 0.5)])  # little std
    logprobs, ref_logprobs, old_logprobs = (-random(12, 6).abs() for _ in range(3))
    trained = (logprobs * mask).requires_grad_()
    other = (ref_logprobs * mask).requires_grad_()
    unlikely = (trained.detach() - 200 * mask).requires_grad_()
    advantages = random(12, 6)
    junk = torch.where(mask, advantages, torch.tensor([NAN, INF, -INF, 0.0, NAN, INF]))
    lagging = (trained, old_logprobs * mask, baseline, mask)
    solved = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    history = random(5).add(1).tolist()
    near_values = values + 0.5 * random(12, 6)
    return {
        "response_mask": [(responses, 2)],
        "token_kl": [*[(logprobs, ref_logprobs, mask, kind) for kind in ("k1", "k2", "k3")],
                     *[(junk, junk.flip(1), mask, kind) for kind in ("k1", "k2", "k3")]],
        "sequence_rewards": [(scores, kl, 0.3)],
        "token_rewards": [(scores, kl, 0.3, mask), (scores, kl * short, 0.3, short)],
        "rloo_advantages": [(rewards, 4), (rewards, 3)],
        "rloo_loss": [(trained, baseline)],
        "reinforce_baseline": [
            *[(history, "moving-average", window, 0.9) for window in (0, 2, 9)],
            (history, "ema", 0, 0.7), (history, "none", 0, 0.9),
            *[([], kind, 3, 0.9) for kind in ("none", "moving-average", "ema")]],
        "remax_advantages": [(kl, baseline, mask)],
        "ppo_advantages": [(kl, values * mask, mask, 0.9, 0.8),
                           (kl * short, values * short, short, 1.0, 0.95)],
        "whiten_advantages": [(advantages, mask), (advantages[:1, :1], mask[:1, :1]), (junk, mask)],
        "first_step_loss": [(trained, advantages * mask)],
        "ppo_loss": [(trained, old_logprobs, advantages * mask, 0.2)],
        "value_loss": [(values.clone().requires_grad_(), near_values, advantages, 0.2)],
        "grpo_advantages": [(similar, 4), (rewards, 4, False)],
        "raft_best": [(rewards, 4), (rewards, 3)],
        "dpo_loss": [(trained, other, old_logprobs * mask, logprobs.flip(0) * mask, 0.5),
                     (unlikely, other, old_logprobs * mask, logprobs * mask, 1.0)],
        "maxrl_advantages": [(solved, 4), (solved, 3)],
        "gspo_loss": [(*lagging, 0.2, 0.4)],
        "cispo_loss": [(*lagging, 1.5)],
        "dapo_loss": [(*lagging, 0.2, 0.4, 100)],
    }


def padded_responses(lengths, mask, generator):
    """Token ids (12, 6). The first response has no EOS, and what follows the others differs."""
    responses = torch.randint(3, 9, mask.shape, generator=generator)  # 2 is EOS
    responses[torch.arange(12), lengths - 1] = torch.tensor([8, *[2] * 11])
    after = torch.tensor([[2], [0], [7]]).repeat(4, 1)  # EOS again, 0, or more tokens
    responses = torch.where(mask, responses, after)
    responses[2, 5] = responses[5, 5] = 2  # and another EOS
    return responses


# ------------------------------------------------------------------------- the expected gradient


def rollouts(world):
    """Every rollout of two prompts in the questions' world, for functions that return advantages.

    The second prompt gives BONUS more for every response. rloo_advantages gets k = 2 responses to
    each, the others one.
    Returns: dict name -> rows (D, N), the numbers of the responses, and arguments: tensors with a
    first dimension of D, or what is the same for each rollout.
    """
    bonus = torch.tensor([[0.0], [BONUS]])  # (2, 1)
    scores, zeros = world.scores + bonus, torch.zeros_like(world.logprobs)  # (2, M), (M, T)
    rewards = torch.stack([common.token_rewards(row, zeros, 0.0, world.mask) for row in scores])
    values = (world.values[world.states] + bonus.unsqueeze(2)) * world.mask  # (2, M, T)
    rows, draws = world.draws(2)[0], world.draws(4)[0]  # (49, 2), (2401, 4)
    greedy = scores[:, world.probs.argmax()].expand(len(rows), 2)  # (49, 2)
    each, mask = torch.arange(2), world.mask[rows]
    return {
        "rloo_advantages": (draws, [scores[each.repeat_interleave(2), draws].float(), 2]),
        "remax_advantages": (rows, [rewards[each, rows].float(), greedy.float(), mask]),
        "ppo_advantages": (rows, [rewards[each, rows].float(), values[each, rows].float(), mask,
                                  1.0, 1.0])}


def expectation(advantages, rows, world):
    """Of the gradient 1/N sum_i sum_t A_it grad log pi(y_it), where every rollout is a batch.

    Args: advantages (D, N) or (D, N, T); rows (D, N), see `rollouts`; world.
    Returns: its mean (9,) and its variance, the sum of those of the nine numbers.
    """
    weights = world.probs[rows].prod(1)  # (D,)
    of_tokens = advantages.double().view(*rows.shape, -1) * world.mask[rows]  # (D, N, T)
    gradients = torch.einsum("dnt, dntg -> dg", of_tokens, world.score_functions[rows])
    gradients = gradients / rows.shape[1]  # (D, 9)
    mean = weights @ gradients
    return mean, weights @ (gradients - mean).square().sum(1)
