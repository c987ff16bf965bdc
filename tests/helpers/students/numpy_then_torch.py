"""A right exercises/estimators.py in numpy. Not for those who take the course."""

import numpy as np
import torch
import torch.nn.functional as F


def response_mask(responses, eos):
    is_eos = responses.numpy() == eos
    return torch.from_numpy(np.cumsum(is_eos, axis=1) - is_eos == 0)


def token_kl(logprobs, ref_logprobs, response_mask, estimator="k1"):
    log_ratio = (ref_logprobs - logprobs).numpy().astype(np.float64)
    kl = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": np.exp(log_ratio) - 1 - log_ratio}
    return torch.from_numpy(np.where(response_mask.numpy(), kl[estimator], 0))


def sequence_rewards(scores, kl, beta):
    return torch.tensor(scores.numpy() - beta * kl.numpy().sum(-1))


def token_rewards(scores, kl, beta, response_mask):
    rewards, lengths = -beta * kl.numpy(), response_mask.numpy().sum(1)
    rewards[np.arange(len(rewards)), lengths - 1] += scores.numpy()
    return torch.from_numpy(rewards)


def rloo_advantages(rewards, k):
    groups = rewards.numpy().astype(np.float64).reshape(-1, k)
    return torch.from_numpy((k * groups - groups.sum(1, keepdims=True)).ravel() / (k - 1))


def rloo_loss(logprobs, advantages):
    return -torch.dot(logprobs.sum(-1), advantages)


def reinforce_baseline(history, kind, window, decay):
    if kind == "none" or len(history) == 0:
        return 0.0
    if kind == "moving-average":
        return np.mean(history[-window:] if window else history)
    average = np.float64(history[0])
    for reward in history[1:]:
        average += (1 - decay) * (reward - average)
    return average


def remax_advantages(rewards, baseline, response_mask):
    to_go = np.cumsum(rewards.numpy()[:, ::-1], axis=1)[:, ::-1]
    return torch.from_numpy((to_go - baseline.numpy()[:, None]) * response_mask.numpy())


def ppo_advantages(rewards, values, response_mask, gamma, lam):
    r, v, mask = (tensor.numpy() for tensor in (rewards, values, response_mask))
    returns, advantages = np.zeros_like(v), np.zeros_like(v)
    following, carried = 0.0, 0.0
    for t in range(r.shape[1] - 1, -1, -1):
        delta = r[:, t] + gamma * following - v[:, t]
        carried = np.where(mask[:, t], delta + gamma * lam * carried, 0.0)
        following = np.where(mask[:, t], v[:, t], 0.0)
        advantages[:, t], returns[:, t] = carried, carried + following
    return torch.from_numpy(advantages), torch.from_numpy(returns)


def whiten_advantages(advantages, response_mask):
    mask = response_mask.numpy()
    real = advantages.numpy().astype(np.float64)[mask]
    out = np.zeros(mask.shape)
    if np.ptp(real) > 0:
        out[mask] = (real - real.mean()) / (real.std(ddof=1) + 1e-8)
    return torch.from_numpy(out)


def first_step_loss(logprobs, advantages):
    old_logprobs = torch.tensor(logprobs.detach().numpy())
    return -(advantages * torch.exp(logprobs - old_logprobs)).sum()


def ppo_loss(logprobs, old_logprobs, advantages, clip):
    ratio = torch.exp(logprobs - old_logprobs)
    losses = torch.maximum(-advantages * ratio, -advantages * torch.clip(ratio, 1 - clip, 1 + clip))
    ratio, gain = ratio.detach().numpy(), advantages.numpy()
    cut = np.where(gain > 0, ratio > 1 + clip, (gain < 0) & (ratio < 1 - clip))
    return losses.sum(), int(np.sum(cut))


def value_loss(values, old_values, returns, value_clip):
    near = torch.where((values - old_values).abs() <= value_clip, values,
                       old_values + value_clip * torch.sign(values - old_values))
    return torch.maximum(F.mse_loss(values, returns, reduction="none"),
                         F.mse_loss(near, returns, reduction="none")).sum() / 2


def grpo_advantages(rewards, k, scale_std=True):
    groups = rewards.numpy().reshape(-1, k)
    advantages = groups - groups.mean(axis=1, keepdims=True)
    if scale_std:
        advantages = advantages / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return torch.tensor(advantages.reshape(-1))


def raft_best(rewards, k):
    groups = rewards.numpy().reshape(-1, k)
    return torch.from_numpy(np.argmax(groups, axis=1) + np.arange(0, groups.size, k))


def dpo_loss(chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs, beta):
    chosen = beta * (chosen_logprobs.sum(1) - chosen_ref_logprobs.sum(1))
    rejected = beta * (rejected_logprobs.sum(1) - rejected_ref_logprobs.sum(1))
    ones = torch.ones(len(chosen))
    loss = F.binary_cross_entropy_with_logits(chosen - rejected, ones, reduction="sum")
    return loss, chosen.detach(), rejected.detach()


def maxrl_advantages(rewards, k):
    groups = rewards.numpy().reshape(-1, k)
    solved = groups.sum(axis=1, keepdims=True)
    return torch.from_numpy((np.where(solved == 0, 0, k * groups / np.maximum(solved, 1) - 1)
                             * (solved > 0)).reshape(-1))


def gspo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high):
    lengths = response_mask.sum(1)
    log_ratio = (logprobs.sum(1) - old_logprobs.sum(1)) / lengths
    ratio, gain = log_ratio.detach().exp().numpy(), np.sign(advantages.numpy())
    high, low = ratio > np.float32(1 + clip_high), ratio < np.float32(1 - clip_low)
    cut = torch.from_numpy(np.where(gain > 0, high, (gain < 0) & low))
    bounds = torch.where(advantages > 0, 1 + clip_high, 1 - clip_low)
    return -(torch.where(cut, bounds, log_ratio.exp()) * advantages).sum(), lengths[cut].sum()


def cispo_loss(logprobs, old_logprobs, advantages, response_mask, max_ratio):
    ratio = np.exp(logprobs.detach().numpy() - old_logprobs.numpy())
    weights = torch.from_numpy(np.minimum(ratio, max_ratio).astype(np.float32))
    above = int(np.sum(ratio[response_mask.numpy()] > max_ratio))
    return -(weights * advantages[:, None] * logprobs).sum(), above


def dapo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high, num_tokens):
    rows = response_mask.nonzero()[:, 0]
    ratio = torch.exp(logprobs[response_mask] - old_logprobs[response_mask])
    terms = torch.stack([ratio, ratio.clamp(1 - clip_low, 1 + clip_high)]) * advantages[rows]
    return -terms.amin(0).sum() / num_tokens
