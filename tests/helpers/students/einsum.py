"""A right exercises/estimators.py with einsum. Not for those who take the course."""

import torch
from torch import einsum


def upper(T, factor=1.0):
    """(T, T) with factor^(column - row) on and above the diagonal."""
    steps = torch.arange(T)
    return (factor ** (steps - steps[:, None]).clamp(min=0)).triu()


def same_group(n, k):
    """(n, n), 1 where two rows have the same prompt."""
    group = torch.arange(n) // k
    return (group[:, None] == group).float()


def response_mask(responses, eos):
    T = responses.shape[1]
    earlier = einsum("ns,st->nt", (responses == eos).float(), upper(T) - torch.eye(T))
    return earlier == 0


def token_kl(logprobs, ref_logprobs, response_mask, estimator="k1"):
    x = torch.where(response_mask, logprobs - ref_logprobs, 0)
    return x if estimator == "k1" else 0.5 * x.pow(2) if estimator == "k2" else torch.expm1(-x) + x


def sequence_rewards(scores, kl, beta):
    return scores - beta * einsum("nt->n", kl)


def token_rewards(scores, kl, beta, response_mask):
    last = response_mask & ~torch.nn.functional.pad(response_mask, (0, 1))[:, 1:]
    return einsum("n,nt->nt", scores, last.float()) - beta * kl


def rloo_advantages(rewards, k):
    others = (same_group(len(rewards), k) - torch.eye(len(rewards))) / (k - 1)
    return rewards - others @ rewards


def rloo_loss(logprobs, advantages):
    return -einsum("nt,n->", logprobs, advantages)


def reinforce_baseline(history, kind, window, decay):
    n = len(history)
    if kind == "none" or n == 0:
        return torch.tensor(0.0)
    steps = torch.arange(n)
    if kind == "moving-average":
        weights = (steps >= n - (window or n)).double()
        return weights @ torch.tensor(history).double() / weights.sum()
    weights = (1 - decay) * decay ** (n - 1 - steps).double()
    weights[0] = decay ** (n - 1)
    return weights @ torch.tensor(history).double()


def remax_advantages(rewards, baseline, response_mask):
    to_go = einsum("ns,ts->nt", rewards, upper(rewards.shape[1]))
    return torch.where(response_mask, to_go - baseline[:, None], 0)


def ppo_advantages(rewards, values, response_mask, gamma, lam):
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = rewards + gamma * following - values
    advantages = einsum("ns,ts->nt", delta, upper(rewards.shape[1], gamma * lam)) * response_mask
    return advantages, advantages + values


def whiten_advantages(advantages, response_mask):
    weights = response_mask.double() / response_mask.sum()
    advantages = torch.where(response_mask, advantages, 0).double()
    centred = advantages - einsum("nt,nt->", weights, advantages)
    n = response_mask.sum().item()
    std = (einsum("nt,nt,nt->", weights, centred, centred) * n / max(n - 1, 1)).sqrt()
    return centred / (std + 1e-8) * response_mask


def first_step_loss(logprobs, advantages):
    return -einsum("nt,nt->", advantages, torch.exp(logprobs - logprobs.detach()))


def ppo_loss(logprobs, old_logprobs, advantages, clip):
    ratio = torch.exp(logprobs - old_logprobs)
    up, down = advantages.clamp(min=0), advantages.clamp(max=0)
    gain = up * ratio.clamp(max=1 + clip) + down * ratio.clamp(min=1 - clip)
    cut = (up > 0) & (ratio > 1 + clip) | (down < 0) & (ratio < 1 - clip)
    return -gain.sum(), cut.sum()


def value_loss(values, old_values, returns, value_clip):
    near = torch.minimum(torch.maximum(values, old_values - value_clip), old_values + value_clip)
    errors = torch.stack([values - returns, near - returns])
    return 0.5 * einsum("ent,ent->ent", errors, errors).amax(0).sum()


def grpo_advantages(rewards, k, scale_std=True):
    group = same_group(len(rewards), k)
    centred = rewards - group @ rewards / k
    std = (group @ centred.square() / (k - 1)).sqrt()
    return centred / (std + 1e-4) if scale_std else centred


def raft_best(rewards, k):
    return rewards.reshape(-1, k).max(1).indices + k * torch.arange(len(rewards) // k)


def dpo_loss(chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs, beta):
    policy = torch.stack([chosen_logprobs, rejected_logprobs])
    reference = torch.stack([chosen_ref_logprobs, rejected_ref_logprobs])
    rewards = beta * einsum("cnt->cn", policy - reference)
    margin = einsum("c,cn->n", torch.tensor([1.0, -1.0]), rewards)
    return torch.logaddexp(torch.zeros_like(margin), -margin).sum(), *rewards.detach()


def maxrl_advantages(rewards, k):
    mean = same_group(len(rewards), k) @ rewards / k
    return torch.where(mean > 0, rewards / mean - 1, 0)


def pessimistic(ratio, advantages, low, high):
    return torch.minimum(ratio * advantages, ratio.clip(1 - low, 1 + high) * advantages)


def gspo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high):
    lengths = response_mask.sum(1)
    ratio = (einsum("nt->n", logprobs - old_logprobs) / lengths).exp()
    objective = pessimistic(ratio, advantages, clip_low, clip_high)
    return -objective.sum(), lengths[objective < ratio * advantages].sum()


def cispo_loss(logprobs, old_logprobs, advantages, response_mask, max_ratio):
    ratio = (logprobs.detach() - old_logprobs).exp()
    loss = -einsum("nt,n,nt->", ratio.clip(max=max_ratio), advantages, logprobs)
    return loss, (ratio * response_mask > max_ratio).sum()


def dapo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high, num_tokens):
    ratio = (logprobs - old_logprobs).exp()
    objective = pessimistic(ratio, advantages[:, None], clip_low, clip_high)
    return -einsum("nt,nt->", objective, response_mask.float()) / num_tokens
