"""A right exercises/estimators.py in plain loops. Not for those who take the course."""

import math

import torch


def response_mask(responses, eos):
    mask = torch.zeros(responses.shape, dtype=torch.bool)
    for i, row in enumerate(responses.tolist()):
        for t, token in enumerate(row):
            mask[i, t] = True
            if token == eos:
                break
    return mask


def token_kl(logprobs, ref_logprobs, response_mask, estimator="k1"):
    kl = torch.zeros(logprobs.shape)
    for i in range(len(kl)):
        for t in range(kl.shape[1]):
            if response_mask[i, t]:
                x = (logprobs[i, t] - ref_logprobs[i, t]).item()
                kl[i, t] = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) + x - 1}[estimator]
    return kl


def sequence_rewards(scores, kl, beta):
    return torch.tensor([scores[i].item() - beta * sum(kl[i].tolist()) for i in range(len(scores))])


def token_rewards(scores, kl, beta, response_mask):
    rewards = torch.zeros(kl.shape)
    for i in range(len(scores)):
        real = [t for t in range(kl.shape[1]) if response_mask[i, t]]
        for t in real:
            rewards[i, t] = -beta * kl[i, t]
        rewards[i, real[-1]] += scores[i]
    return rewards


def rloo_advantages(rewards, k):
    advantages = []
    for start in range(0, len(rewards), k):
        group = rewards[start : start + k].tolist()
        for i in range(k):
            other = group[:i] + group[i + 1 :]
            advantages.append(group[i] - sum(other) / len(other))
    return torch.tensor(advantages)


def rloo_loss(logprobs, advantages):
    loss = 0.0
    for row, advantage in zip(logprobs, advantages):
        for logprob in row:
            loss = loss - advantage * logprob
    return loss


def reinforce_baseline(history, kind, window, decay):
    if not history or kind == "none":
        return 0
    if kind == "moving-average":
        first = len(history) - window if window else 0
        recent = [reward for i, reward in enumerate(history) if i >= first]
        return sum(recent) / len(recent)
    average = None
    for reward in history:
        average = reward if average is None else decay * average + (1 - decay) * reward
    return average


def remax_advantages(rewards, baseline, response_mask):
    advantages = torch.zeros(rewards.shape)
    for i in range(rewards.shape[0]):
        for t in range(int(response_mask[i].sum())):
            advantages[i, t] = rewards[i, t:].sum() - baseline[i]
    return advantages


def ppo_advantages(rewards, values, response_mask, gamma, lam):
    advantages, returns = torch.zeros(rewards.shape), torch.zeros(rewards.shape)
    for i in range(len(rewards)):
        length = int(response_mask[i].sum())
        value = lambda t: values[i, t].item() if t < length else 0.0
        delta = [rewards[i, t].item() + gamma * value(t + 1) - value(t) for t in range(length)]
        for t in range(length):
            advantages[i, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
            returns[i, t] = advantages[i, t] + value(t)
    return advantages, returns


def whiten_advantages(advantages, response_mask):
    rows = zip(advantages.tolist(), response_mask.tolist())
    real = [a for row, keep in rows for a, is_real in zip(row, keep) if is_real]
    mean = sum(real) / len(real)
    if all(a == real[0] for a in real):
        return torch.zeros(advantages.shape)
    std = math.sqrt(sum((a - mean) ** 2 for a in real) / (len(real) - 1))
    out = torch.zeros(advantages.shape)
    for i in range(len(out)):
        for t in range(out.shape[1]):
            if response_mask[i, t]:
                out[i, t] = (advantages[i, t] - mean) / (std + 1e-8)
    return out


def first_step_loss(logprobs, advantages):
    loss = 0.0
    for row, weights in zip(logprobs, advantages):
        for logprob, weight in zip(row, weights):
            loss = loss - weight * (logprob - logprob.item()).exp()
    return loss


def ppo_loss(logprobs, old_logprobs, advantages, clip):
    loss, count = 0.0, 0
    for i in range(logprobs.shape[0]):
        for t in range(logprobs.shape[1]):
            a, ratio = advantages[i, t], (logprobs[i, t] - old_logprobs[i, t]).exp()
            free, bounded = ratio * a, max(1 - clip, min(1 + clip, ratio.item())) * a
            loss = loss - (free if free <= bounded else bounded)
            count += bool(bounded < free)
    return loss, count


def value_loss(values, old_values, returns, value_clip):
    loss = 0.0
    for i in range(values.shape[0]):
        for t in range(values.shape[1]):
            v, old, g = values[i, t], old_values[i, t], returns[i, t]
            w = old + torch.clip(v - old, -value_clip, value_clip)
            loss = loss + max((v - g) ** 2, (w - g) ** 2) / 2
    return loss


def grpo_advantages(rewards, k, scale_std=True):
    advantages = []
    for start in range(0, len(rewards), k):
        group = rewards[start : start + k].tolist()
        mean = sum(group) / k
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (k - 1)) + 1e-4 if scale_std else 1
        advantages += [(r - mean) / std for r in group]
    return torch.tensor(advantages)


def raft_best(rewards, k):
    best = []
    for start in range(0, len(rewards), k):
        best.append(max(range(start, start + k), key=lambda row: rewards[row].item()))
    return torch.tensor(best)


def dpo_loss(chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs, beta):
    loss, chosen, rejected = 0.0, [], []
    pairs = zip(chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs)
    for c, r, cr, rr in pairs:
        good, bad = beta * (c.sum() - cr.sum()), beta * (r.sum() - rr.sum())
        loss = loss + torch.nn.functional.softplus(bad - good)
        chosen.append(good.item())
        rejected.append(bad.item())
    return loss, torch.tensor(chosen), torch.tensor(rejected)


def maxrl_advantages(rewards, k):
    advantages = []
    for start in range(0, len(rewards), k):
        group = rewards[start : start + k].tolist()
        mean = sum(group) / k
        advantages += [(r - mean) / mean if mean else 0.0 for r in group]
    return torch.tensor(advantages)


def clipped(ratio, advantage, low, high):
    """A term of a clipped objective, and whether it is clipped."""
    free, bounded = ratio * advantage, max(1 - low, min(1 + high, ratio.item())) * advantage
    return (bounded, True) if bounded < free else (free, False)


def gspo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high):
    loss, count = 0.0, 0
    for i in range(len(advantages)):
        length = int(response_mask[i].sum())
        log_ratio = sum(logprobs[i, t] - old_logprobs[i, t] for t in range(length)) / length
        term, is_clipped = clipped(log_ratio.exp(), advantages[i], clip_low, clip_high)
        loss, count = loss - term, count + length * is_clipped
    return loss, count


def cispo_loss(logprobs, old_logprobs, advantages, response_mask, max_ratio):
    loss, count = 0.0, 0
    for i in range(logprobs.shape[0]):
        for t in range(int(response_mask[i].sum())):
            ratio = math.exp(logprobs[i, t].item() - old_logprobs[i, t].item())
            loss = loss - min(ratio, max_ratio) * advantages[i] * logprobs[i, t]
            count += ratio > max_ratio
    return loss, count


def dapo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high, num_tokens):
    loss = 0.0
    for i in range(logprobs.shape[0]):
        for t in range(int(response_mask[i].sum())):
            ratio = (logprobs[i, t] - old_logprobs[i, t]).exp()
            loss = loss - clipped(ratio, advantages[i], clip_low, clip_high)[0]
    return loss / num_tokens
