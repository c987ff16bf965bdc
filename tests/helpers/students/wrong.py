"""Wrong solutions as people write them: those of exercises/mistakes/, in the same order.

There the right functions get other inputs. Here every mistake is written out, so that both can be
compared.
"""

import torch
from torch.nn.functional import logsigmoid


def masks(real):
    """A response_mask that is real(row, t, eos) at every token."""
    return lambda responses, eos: torch.tensor(
        [[real(row, t, eos) for t in range(len(row))] for row in responses.tolist()])


def kls(kind, wrong, masked=True):
    """A token_kl with one wrong estimator, a function of log pi - log pi_ref and log pi."""
    def token_kl(logprobs, ref_logprobs, mask, estimator="k1"):
        x = logprobs - ref_logprobs
        values = {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x}[estimator]
        if estimator == kind:
            values = wrong(x, logprobs)
        return torch.where(mask, values, torch.zeros(())) if masked else values
    return token_kl


def placing(place, factor=None, sign=-1):
    """A token_rewards that calls place(row of rewards, length, score)."""
    def token_rewards(scores, kl, beta, mask):
        rewards = sign * (beta if factor is None else factor) * kl
        for row, length, score in zip(rewards, mask.sum(1).tolist(), scores.tolist()):
            place(row, length, score)
        return rewards
    return token_rewards


def add(row, where, score):
    row[where] += score


def replace(row, length, score):
    row[length - 1] = score


def after(row, length, score):
    if length < len(row):
        row[length] += score


def grouped(advantages):
    """A function of rewards (N,) and k, from one of rewards (B, k)."""
    return lambda rewards, k: advantages(rewards.view(-1, k), k).flatten()


def total(groups):
    return groups.sum(1, keepdim=True)


def others_subtracted(groups, k):
    return groups - (total(groups) - groups) / (k - 1)


def mean(history, window):
    last = history[-window:] if window else history
    return sum(last) / len(last)


def decayed(value, rewards, decay):
    for reward in rewards:
        value = decay * value + (1 - decay) * reward
    return value


def past(moving=mean, ema=lambda history, decay: decayed(history[0], history[1:], decay),
         none=lambda history, window: 0.0, history=lambda history: history):
    """A reinforce_baseline in which one kind is another function."""
    def baseline(rewards, kind, window, decay):
        rewards = history(rewards)
        if not rewards:
            return 0.0
        if kind == "ema":
            return ema(rewards, decay)
        return none(rewards, window) if kind == "none" else moving(rewards, window)
    return baseline


def probabilities(logprobs):
    return torch.where(logprobs == 0, 0, logprobs.exp())


def to_go(rewards):
    return torch.stack([rewards[:, t:].sum(1) for t in range(rewards.shape[1])], 1)


def whole(baseline):
    return baseline.unsqueeze(1)


def following(x):
    """Each token's next value, 0 after the last."""
    return torch.cat([x[:, 1:], torch.zeros(len(x), 1)], 1)


def before(x):
    return torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)


def backwards(deltas, decay):
    found, advantage = [], torch.zeros(len(deltas))
    for delta in deltas.unbind(1)[::-1]:
        advantage = delta + decay * advantage
        found.insert(0, advantage)
    return torch.stack(found, 1)


def gae(deltas=lambda r, v, mask, gamma, lam: r + gamma * following(v) - v,
        decay=lambda gamma, lam: gamma * lam,
        returns=lambda advantages, r, v, gamma: advantages + v, accumulate=backwards):
    def advantages(rewards, values, mask, gamma, lam):
        found = accumulate(deltas(rewards, values, mask, gamma, lam), decay(gamma, lam)) * mask
        return found, returns(found, rewards, values, gamma)
    return advantages


def own_value_at_the_end(r, v, mask, gamma, lam):
    last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
    return r + gamma * torch.where(last, v, following(v)) - v


def forwards(deltas, decay):
    return backwards(deltas.flip(1), decay).flip(1)


def read_after(rewards, values, mask, gamma, lam):
    return gae()(rewards, following(values), mask, gamma, lam)


def whitened(formula):
    """A whiten_advantages from a function of all advantages and the real ones."""
    return lambda advantages, mask: formula(advantages, advantages[mask]) * mask


def standard(advantages, real, **correction):
    return (advantages - real.mean()) / (real.std(**correction) + 1e-8)


def by_itself(advantages, mask):
    return torch.stack([standard(row, row[real]) * real for row, real in zip(advantages, mask)])


def zeros_counted(advantages, mask):
    filled = advantages * mask
    return standard(filled, filled) * mask


def guarded(advantages, mask):
    real = advantages[mask]
    if (real == real[0]).all():
        return torch.zeros(advantages.shape)
    return standard(advantages, real) * mask


def clipping(loss=lambda free, bounded: -torch.min(free, bounded).sum(),
             ratio=lambda new, old: (new - old).exp(), bounds=lambda clip: (1 - clip, 1 + clip),
             count=None):
    def ppo_loss(logprobs, old_logprobs, advantages, clip):
        ratios = ratio(logprobs, old_logprobs)
        free, bounded = ratios * advantages, ratios.clamp(*bounds(clip)) * advantages
        number = count(ratios, logprobs, free, bounded, clip) if count else (bounded < free).sum()
        return loss(free, bounded), number
    return ppo_loss


def pessimistic(free, bounded):
    return torch.min(free, bounded)


def errors(loss=lambda free, bounded: torch.max(free, bounded).sum() / 2,
           bounded=lambda values, old, clip: torch.clamp(values, old - clip, old + clip)):
    return lambda values, old, returns, clip: loss(
        (values - returns) ** 2, (bounded(values, old, clip) - returns) ** 2)


def scaled(formula):
    """A grpo_advantages that, if scale_std, is a function of centred rewards and rewards (B, k)."""
    def advantages(rewards, k, scale_std=True):
        groups = rewards.view(-1, k)
        centred = groups - groups.mean(1, keepdim=True)
        return (formula(centred, groups) if scale_std else centred).flatten()
    return advantages


def deviation(groups, **correction):
    return groups.std(1, keepdim=True, **correction)


def right_scale(centred, groups):
    return centred / (deviation(groups) + 1e-4)


def whole_batch(rewards, k, scale_std=True):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4 if scale_std else 1)


def left_out(rewards, k, scale_std=True):
    groups = rewards.view(-1, k)
    found = others_subtracted(groups, k)
    return (found / (deviation(groups) + 1e-4) if scale_std else found).flatten()


def other_order(rewards, k, scale_std=True):
    groups = rewards.view(k, -1)
    found = groups - groups.mean(0)
    return (found / (groups.std(0) + 1e-4) if scale_std else found).flatten()


def repeated(rewards, k, scale_std=True):
    groups = rewards.view(-1, k)
    found = rewards - groups.mean(1).repeat(k)
    return found / (groups.std(1).repeat(k) + 1e-4) if scale_std else found


def count(rewards, k):
    return len(rewards) // k


def prompts(rewards, k):
    return torch.arange(count(rewards, k))


def pairs(loss=lambda chosen, rejected, beta: -logsigmoid(chosen - rejected).sum(),
          reward=lambda logprobs, ref, beta: beta * (logprobs - ref).sum(1),
          logged=torch.Tensor.detach):
    def dpo_loss(chosen, rejected, chosen_ref, rejected_ref, beta):
        good, bad = reward(chosen, chosen_ref, beta), reward(rejected, rejected_ref, beta)
        return loss(good, bad, beta), logged(good), logged(bad)
    return dpo_loss


def exchanged(chosen, rejected, chosen_ref, rejected_ref, beta):
    return pairs()(rejected, chosen, rejected_ref, chosen_ref, beta)


def per_token(logprobs):
    return logprobs.sum(1) / (logprobs != 0).sum(1)


def shares(advantages, mean=lambda groups: groups.mean(1, keepdim=True)):
    """A maxrl_advantages from a function of rewards (B, k) and their means."""
    return lambda rewards, k: advantages(rewards.view(-1, k), mean(rewards.view(-1, k))).flatten()


def at_least_one(mean, k):
    return torch.where(mean == 0, torch.ones(()) / k, mean)


def of_mixed_groups(rewards, k):
    groups = rewards.view(k, -1)
    mean = groups.mean(0)
    return torch.where(mean == 0, 0, (groups - mean) / mean).flatten()


def log_ratios(new, old, mask):
    return (new - old).sum(1) / mask.sum(1)


def of_responses(ratio=lambda new, old, mask: log_ratios(new, old, mask).exp(),
                 loss=lambda free, bounded: -pessimistic(free, bounded).sum(),
                 bounds=lambda low, high: (1 - low, 1 + high),
                 count=lambda cut, lengths: (cut * lengths).sum()):
    """A gspo_loss."""
    def gspo_loss(logprobs, old_logprobs, advantages, mask, low, high):
        ratios = ratio(logprobs, old_logprobs, mask)
        free, bounded = ratios * advantages, ratios.clamp(*bounds(low, high)) * advantages
        return loss(free, bounded), count(bounded < free, mask.sum(1))
    return gspo_loss


def of_tokens_after_all(logprobs, old_logprobs, advantages, mask, low, high):
    ratio, a = (logprobs - old_logprobs).exp(), advantages[:, None] * mask
    free, bounded = ratio * a, ratio.clamp(1 - low, 1 + high) * a
    return -pessimistic(free, bounded).sum(), (bounded < free).sum()


def optimistic(logprobs, old_logprobs, advantages, mask, low, high):
    ratio = log_ratios(logprobs, old_logprobs, mask).exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.max(free, bounded).sum(), ((bounded > free) * mask.sum(1)).sum()


def weighted(weight=lambda ratio, most: ratio.detach().clamp(max=most),
             loss=lambda weights, a, logprobs, mask: -(weights * a * logprobs).sum(),
             ratio=lambda new, old: (new - old).exp()):
    """A cispo_loss."""
    def cispo_loss(logprobs, old_logprobs, advantages, mask, most):
        ratios = ratio(logprobs, old_logprobs)
        found = loss(weight(ratios, most), advantages[:, None] * mask, logprobs, mask)
        return found, ((ratios > most) & mask).sum()
    return cispo_loss


def as_in_ppo(logprobs, old_logprobs, advantages, mask, most):
    ratio, a = (logprobs - old_logprobs).exp(), advantages[:, None] * mask
    return -pessimistic(ratio * a, ratio.clamp(max=most) * a).sum(), ((ratio > most) & mask).sum()


def token_means(mean=lambda losses, mask, n: losses.sum() / n,
                loss=lambda free, bounded: -pessimistic(free, bounded),
                bounds=lambda low, high: (1 - low, 1 + high), masked=True,
                ratio=lambda new, old, mask: (new - old).exp()):
    """A dapo_loss."""
    def dapo_loss(logprobs, old_logprobs, advantages, mask, low, high, n):
        ratios = ratio(logprobs, old_logprobs, mask)
        a = advantages[:, None] * (mask if masked else 1)
        return mean(loss(ratios * a, ratios.clamp(*bounds(low, high)) * a), mask, n)
    return dapo_loss


WRONG = {
    "response_mask": [
        masks(lambda row, t, eos: eos not in row[: t + 1]),
        masks(lambda row, t, eos: row[t] != eos),
        masks(lambda row, t, eos: eos not in row[: max(0, t - 1)]),
        masks(lambda row, t, eos: eos in row and eos not in row[:t]),
        masks(lambda row, t, eos: eos in row[:t]),
        masks(lambda row, t, eos: eos in row[t:] or eos not in row),
    ],
    "token_kl": [
        kls("k1", lambda x, logprobs: -x),
        kls("k1", lambda x, logprobs: x.abs()),
        kls("k1", lambda x, logprobs: torch.exp(logprobs) * x),
        kls("k2", lambda x, logprobs: x**2),
        kls("k3", lambda x, logprobs: torch.exp(x) - 1 - x),
        kls("k3", lambda x, logprobs: torch.exp(-x) - 1 - x),
        kls("k3", lambda x, logprobs: torch.exp(-x) + x),
        kls(None, None, masked=False),
        lambda logprobs, ref_logprobs, mask, estimator="k1":
            kls(None, None, masked=False)(logprobs, ref_logprobs, mask, estimator) * mask,
    ],
    "sequence_rewards": [
        lambda scores, kl, beta: scores + beta * kl.sum(1),
        lambda scores, kl, beta: scores - beta * kl.mean(1),
        lambda scores, kl, beta: scores - kl.sum(1),
        lambda scores, kl, beta: scores - beta * kl.sum(),
        lambda scores, kl, beta: beta * (scores - kl.sum(1)),
        lambda scores, kl, beta: scores - beta * kl[:, 0],
    ],
    "token_rewards": [
        placing(lambda row, length, score: add(row, -1, score)),
        placing(lambda row, length, score: add(row, slice(length), score)),
        placing(after),
        placing(lambda row, length, score: add(row, length - 2, score)),
        placing(lambda row, length, score: add(row, 0, score)),
        placing(lambda row, length, score: add(row, length - 1, score), sign=1),
        placing(replace),
        placing(lambda row, length, score: add(row, length - 1, score), factor=1.0),
        placing(lambda row, length, score: add(row, slice(length), score / length)),
        lambda scores, kl, beta, mask:
            placing(lambda row, length, score: add(row, -1, score))(scores, kl, beta, mask) * mask,
    ],
    "rloo_advantages": [
        grouped(lambda groups, k: groups - groups.mean(1, keepdim=True)),
        lambda rewards, k: grouped(lambda groups, k: groups - (total(groups) - groups) / (k - 1))(
            rewards.view(k, -1).T.flatten(), k).view(-1, k).T.flatten(),
        grouped(lambda groups, k: groups - (total(groups) - groups) / k),
        grouped(lambda groups, k: groups - (total(groups) - groups)),
        grouped(lambda groups, k: (total(groups) - groups) / (k - 1) - groups),
        lambda rewards, k: rewards - (rewards.sum() - rewards) / (len(rewards) - 1),
        grouped(lambda groups, k: (total(groups) - groups) / (k - 1)),
        grouped(lambda groups, k: others_subtracted(groups, k) / deviation(groups)),
        grouped(lambda groups, k: groups),
        lambda rewards, k: rewards - (rewards.view(-1, k).sum(1).repeat(k) - rewards) / (k - 1),
    ],
    "rloo_loss": [
        lambda logprobs, advantages: (advantages * logprobs.sum(1)).sum(),
        lambda logprobs, advantages: -(advantages * per_token(logprobs)).sum(),
        lambda logprobs, advantages: -(advantages * logprobs.mean(1)).sum(),
        lambda logprobs, advantages: -(advantages * logprobs.sum(1)).mean(),
        lambda logprobs, advantages: -(advantages * logprobs.detach().sum(1)).sum(),
        lambda logprobs, advantages: -sum(a * row.sum() for a in advantages for row in logprobs),
        lambda logprobs, advantages: -(advantages * probabilities(logprobs).sum(1)).sum(),
    ],
    "reinforce_baseline": [
        past(moving=lambda history, window: sum(history[-window:] if window else history)),
        past(history=lambda history: history[:-1]),
        past(history=lambda history: history[-1:]),
        past(moving=lambda history, window: mean(history, 0)),
        past(moving=lambda history, window: mean(history[::-1], window)),
        past(moving=lambda history, window: sum(history[-window:]) / (window or len(history))),
        past(ema=lambda history, decay: decayed(history[0], history[1:], 1 - decay)),
        past(ema=lambda history, decay: decayed(0.0, history, decay)),
        past(ema=lambda history, decay: decayed(history[-1], history[-2::-1], decay)),
        past(none=mean),
    ],
    "remax_advantages": [
        lambda rewards, baseline, mask: (rewards.cumsum(1) - whole(baseline)) * mask,
        lambda rewards, baseline, mask: (rewards - whole(baseline)) * mask,
        lambda rewards, baseline, mask: whole(rewards.sum(1) - baseline) * mask,
        lambda rewards, baseline, mask: (to_go(rewards) + whole(baseline)) * mask,
        lambda rewards, baseline, mask: to_go((rewards - whole(baseline)) * mask),
        lambda rewards, baseline, mask: to_go(rewards) - whole(baseline),
        lambda rewards, baseline, mask: (to_go(rewards) - rewards - whole(baseline)) * mask,
        lambda rewards, baseline, mask: to_go(rewards) * mask,
        lambda rewards, baseline, mask: (to_go(rewards) - whole(baseline / mask.sum(1))) * mask,
    ],
    "ppo_advantages": [
        gae(decay=lambda gamma, lam: gamma),
        gae(lambda r, v, mask, gamma, lam: r + following(v) - v, lambda gamma, lam: lam),
        gae(decay=lambda gamma, lam: 0),
        gae(lambda r, v, mask, gamma, lam: r + gamma * v - v),
        read_after,
        gae(own_value_at_the_end),
        gae(decay=lambda gamma, lam: lam),
        gae(lambda r, v, mask, gamma, lam: r + gamma * lam * following(v) - v),
        gae(accumulate=forwards),
        lambda *given: tuple(map(before, gae()(*given))),
        gae(returns=lambda advantages, r, v, gamma: backwards(r, gamma)),
        gae(returns=lambda advantages, r, v, gamma: advantages),
        lambda *given: gae()(*given)[::-1],
        gae(returns=lambda advantages, r, v, gamma: to_go(r)),
        gae(lambda r, v, mask, gamma, lam: r + following(v) - v),
    ],
    "whiten_advantages": [
        whitened(lambda advantages, real: standard(advantages, real, correction=0)),
        whitened(lambda advantages, real: standard(advantages, advantages)),
        zeros_counted,
        by_itself,
        whitened(lambda advantages, real: advantages / (real.std() + 1e-8)),
        whitened(lambda advantages, real: advantages - real.mean()),
        whitened(lambda advantages, real: (advantages - real.mean()) / (real.std() ** 2 + 1e-8)),
        lambda advantages, mask: standard(advantages, advantages[mask]),
        whitened(standard),
        guarded,
    ],
    "first_step_loss": [
        lambda logprobs, advantages: -((logprobs - logprobs).exp() * advantages).sum(),
        lambda logprobs, advantages: -advantages.sum(),
        lambda logprobs, advantages: -(logprobs * advantages).sum(),
        lambda logprobs, advantages: ((logprobs - logprobs.detach()).exp() * advantages).sum(),
        lambda logprobs, advantages: -(logprobs.exp() * advantages).sum(),
        lambda logprobs, advantages: -((logprobs - logprobs.detach()).exp() * advantages).mean(),
    ],
    "ppo_loss": [
        clipping(lambda free, bounded: -torch.max(free, bounded).sum()),
        clipping(lambda free, bounded: -bounded.sum()),
        clipping(bounds=lambda clip: (0, torch.inf)),
        clipping(ratio=lambda new, old: (old - new).exp()),
        clipping(lambda free, bounded: pessimistic(free, bounded).sum()),
        clipping(ratio=lambda new, old: new - old),
        clipping(bounds=lambda clip: (-clip, clip)),
        clipping(lambda free, bounded: -pessimistic(free, bounded).sum(1).mean()),
        clipping(lambda free, bounded: -pessimistic(free, bounded).mean()),
        clipping(ratio=lambda new, old: (new.sum(1) - old.sum(1)).exp().unsqueeze(1)),
        clipping(lambda free, bounded: -pessimistic(free, bounded).sum().detach()),
        clipping(ratio=lambda new, old: (new - new.detach()).exp()),
        clipping(count=lambda ratio, new, free, bounded, clip: (abs(ratio - 1) > clip).sum()),
        clipping(count=lambda ratio, new, free, bounded, clip: (free != bounded).sum()),
        clipping(count=lambda ratio, new, free, bounded, clip: (bounded < free).float().mean()),
    ],
    "value_loss": [
        errors(lambda free, bounded: torch.max(free, bounded).sum()),
        errors(lambda free, bounded: torch.min(free, bounded).sum() / 2),
        errors(bounded=lambda values, old, clip: torch.clamp(values, -clip, clip)),
        errors(lambda free, bounded: free.sum() / 2),
        errors(lambda free, bounded: bounded.sum() / 2),
        errors(lambda free, bounded: torch.max(free, bounded).mean() / 2),
        errors(lambda free, bounded: torch.max(free, bounded).sum().item() / 2),
    ],
    "grpo_advantages": [
        scaled(lambda centred, groups: centred / (deviation(groups, correction=0) + 1e-4)),
        whole_batch,
        left_out,
        other_order,
        scaled(lambda centred, groups: centred / deviation(groups)),
        scaled(lambda centred, groups: centred / (deviation(groups) + 1e-8)),
        scaled(lambda centred, groups: centred),
        lambda rewards, k, scale_std=True: scaled(right_scale)(rewards, k),
        scaled(lambda centred, groups: centred / (deviation(groups) ** 2 + 1e-4)),
        lambda rewards, k, scale_std=True: -scaled(right_scale)(rewards, k, scale_std),
        lambda rewards, k, scale_std=True: scaled(
            lambda centred, groups: centred / (rewards.std() + 1e-4))(rewards, k, scale_std),
        repeated,
    ],
    "raft_best": [
        lambda rewards, k: rewards.view(-1, k).argmax(1),
        lambda rewards, k: rewards.view(-1, k).argmin(1) + k * prompts(rewards, k),
        lambda rewards, k: rewards.view(k, -1).argmax(0) * count(rewards, k) + prompts(rewards, k),
        lambda rewards, k: rewards.view(-1, k).amax(1),
        lambda rewards, k: rewards.argsort(descending=True)[: count(rewards, k)].sort().values,
        lambda rewards, k: rewards.argsort(descending=True)[: count(rewards, k)],
        lambda rewards, k: rewards.view(-1, k).argmax(1) + prompts(rewards, k),
    ],
    "dpo_loss": [
        pairs(reward=lambda logprobs, ref, beta: beta * logprobs.sum(1)),
        pairs(reward=lambda logprobs, ref, beta: (logprobs - ref).sum(1)),
        pairs(lambda chosen, rejected, beta: -logsigmoid(rejected - chosen).sum()),
        exchanged,
        pairs(reward=lambda logprobs, ref, beta: beta * (ref - logprobs).sum(1)),
        pairs(reward=lambda logprobs, ref, beta: beta * (per_token(logprobs) - per_token(ref))),
        pairs(lambda chosen, rejected, beta: -logsigmoid(chosen - rejected).mean()),
        pairs(lambda chosen, rejected, beta: -torch.sigmoid(chosen - rejected).sum()),
        pairs(lambda chosen, rejected, beta: logsigmoid(chosen - rejected).sum()),
        pairs(lambda chosen, rejected, beta: -beta * logsigmoid((chosen - rejected) / beta).sum()),
        pairs(lambda chosen, rejected, beta: -logsigmoid(chosen - rejected).sum().detach()),
        pairs(logged=lambda reward: reward),
        pairs(lambda chosen, rejected, beta: -torch.log(torch.sigmoid(chosen - rejected)).sum()),
        pairs(reward=lambda logprobs, ref, beta: beta * (logprobs - ref).mean(1)),
        lambda chosen, rejected, chosen_ref, rejected_ref, beta: (
            -logsigmoid(beta * (chosen - chosen_ref - rejected + rejected_ref)).sum(),
            beta * (chosen - chosen_ref).sum(1).detach(),
            beta * (rejected - rejected_ref).sum(1).detach()),
    ],
    "maxrl_advantages": [
        shares(lambda groups, mean: (groups - mean) / mean),
        shares(lambda groups, mean: (groups - mean) / (deviation(groups) + 1e-4)),
        shares(lambda groups, mean: groups - mean),
        shares(lambda groups, mean: groups / at_least_one(mean, groups.shape[1])),
        shares(lambda groups, mean: others_subtracted(groups, groups.shape[1])
               / at_least_one(mean, groups.shape[1])),
        shares(lambda groups, mean: (groups - mean) / total(groups).clamp(min=1)),
        shares(lambda groups, mean: (groups - mean) / mean, torch.mean),
        shares(lambda groups, mean: (groups - mean) / (mean + 1e-4)),
        of_mixed_groups,
    ],
    "gspo_loss": [
        of_tokens_after_all,
        of_responses(lambda new, old, mask: (new - old).sum(1).exp()),
        of_responses(lambda new, old, mask: (new - old).mean(1).exp()),
        of_responses(lambda new, old, mask: torch.where(mask, (new - old).exp(), 0).sum(1)
                     / mask.sum(1)),
        of_responses(lambda new, old, mask: log_ratios(old, new, mask).exp()),
        of_responses(loss=lambda free, bounded: pessimistic(free, bounded).sum()),
        optimistic,
        of_responses(loss=lambda free, bounded: -bounded.sum()),
        of_responses(bounds=lambda low, high: (1 - high, 1 + low)),
        of_responses(bounds=lambda low, high: (1 - low, 1 + low)),
        of_responses(count=lambda cut, lengths: cut.sum()),
        of_responses(loss=lambda free, bounded: -pessimistic(free, bounded).mean()),
        of_responses(loss=lambda free, bounded: -pessimistic(free, bounded).sum().detach()),
    ],
    "cispo_loss": [
        weighted(lambda ratio, most: ratio.clamp(max=most)),
        as_in_ppo,
        weighted(lambda ratio, most: torch.where(ratio > most, 0, ratio).detach()),
        weighted(loss=lambda weights, a, logprobs, mask: -(weights * a).sum()),
        lambda *given: (weighted(lambda ratio, most: ratio.detach().clamp(max=1 + most))(*given)[0],
                        (torch.exp(given[0] - given[1]) > 1 + given[4]).sum()),
        weighted(lambda ratio, most: ratio.detach()),
        weighted(lambda ratio, most: 1.0),
        weighted(ratio=lambda new, old: (old - new).exp()),
        weighted(loss=lambda weights, a, logprobs, mask: (weights * a * logprobs).sum()),
        weighted(loss=lambda weights, a, logprobs, mask: -(weights * a * logprobs)[mask].mean()),
    ],
    "dapo_loss": [
        token_means(lambda losses, mask, n: losses.sum() / mask.sum()),
        token_means(lambda losses, mask, n: losses.sum() / len(mask)),
        token_means(lambda losses, mask, n: losses.mean()),
        token_means(lambda losses, mask, n: (losses.sum(1) / mask.sum(1)).mean()),
        token_means(lambda losses, mask, n: losses.sum()),
        token_means(masked=False),
        token_means(bounds=lambda low, high: (1 - high, 1 + low)),
        token_means(bounds=lambda low, high: (1 - low, 1 + low)),
        token_means(loss=lambda free, bounded: -torch.max(free, bounded)),
        token_means(loss=lambda free, bounded: -bounded),
        token_means(ratio=lambda new, old, mask: log_ratios(new, old, mask).exp()[:, None]),
        token_means(lambda losses, mask, n: -losses.sum() / n),
        token_means(lambda losses, mask, n: losses.sum().detach() / n),
    ],
}
