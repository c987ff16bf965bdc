"""A slow, plain second implementation of the algorithms, to check the real training loops against.

Everything is written one row and one token at a time, as in the papers: no padding, no masks, no
batches. Numbers that need a gradient are scalar tensors, all other numbers are floats.

Notation: row i is one response y_i, t runs over its tokens, s_i is its score, k is the number of
responses to each prompt, kl_t = log pi_old - log pi_ref of token t, R_i = s_i - beta sum_t kl_t.
"""

import math
from dataclasses import dataclass

import torch

CLIPPED = ("grpo", "gspo", "cispo", "dapo", "reinforce_pp", "reinforce_pp_baseline",
           "ppo")  # several epochs, mini-batches
TOKEN_MEAN = ("cispo", "dapo")  # the loss of a mini-batch is a mean over its tokens, not its rows
WITH_CRITIC = ("vanilla_pg", "ppo")
SUPERVISED = ("sft", "reward_model")  # trained with AdamW


@dataclass
class Row:
    """One prompt and one response to it, without padding."""

    prompt: list[int]
    response: list[int]  # up to and including EOS, if the response ended
    ended: bool
    old_logprobs: list[float]  # under the policy that sampled the response, one per token
    parts: dict[str, float]  # the value of each reward function, in the order of flags.reward
    noise: float = 0.0  # on its score


# --------------------------------------------------------------------------------------- statistics


def mean(values):
    return math.fsum(values) / len(values)


def variance(values, ddof):
    """sum (x - mean)^2 / (n - ddof)"""
    center = mean(values)
    return math.fsum((x - center) ** 2 for x in values) / (len(values) - ddof)


def sample_std(values):
    """The standard deviation with n - 1 in the denominator; a single value has none."""
    if len(values) == 1:
        return math.nan
    return math.sqrt(variance(values, 1))


def all_equal(values):
    return all(x == values[0] for x in values)


def groups(values, k):
    """Cut a prompt-major list into one list of k values per prompt."""
    return [values[start : start + k] for start in range(0, len(values), k)]


def flatten(lists):
    return [x for values in lists for x in values]


# ---------------------------------------------------------------- what the models say about one row


def token_logprobs(model, row, temperature):
    """log pi(y_t | x, y_<t) for every response token: a list of scalar tensors."""
    ids = torch.tensor([row.prompt + row.response])
    logits = model(input_ids=ids).logits[0]
    logprobs = []
    for t, token in enumerate(row.response):
        before = len(row.prompt) + t - 1
        logprobs.append(torch.log_softmax(logits[before] / temperature, dim=-1)[token])
    return logprobs


def token_values(critic, row):
    """V_t for every response token, read one position before it: V must not see the action."""
    ids = torch.tensor([row.prompt + row.response])
    hidden = critic.base_model(input_ids=ids).last_hidden_state[0]
    return [critic.score(hidden[len(row.prompt) + t - 1])[0] for t in range(len(row.response))]


def last_token_score(model, row):
    """The classifier's output at the last token of prompt + response, a scalar tensor."""
    ids = torch.tensor([row.prompt + row.response])
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    return model.score(hidden[-1])[0]


def reference_logprobs(reference, row, temperature):
    """log pi_ref of every response token, as floats. Without a reference the KL divergence is 0."""
    if reference is None:
        return list(row.old_logprobs)
    with torch.no_grad():
        return [logprob.item() for logprob in token_logprobs(reference, row, temperature)]


def true_score(row, flags):
    """sum_j weight_j * part_j"""
    parts = list(row.parts.values())
    weights = flags.reward_weights or [1.0] * len(parts)
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def row_score(row, flags):
    """s_i = sum_j weight_j * part_j + noise - penalty * [the response did not end]"""
    score = true_score(row, flags) + row.noise
    if not row.ended:
        score -= flags.missing_eos_penalty
    if hasattr(flags, "overlong_penalty"):  # DAPO: linear within the last C tokens, 1 at the last
        buffer = flags.overlong_buffer or max(1, flags.max_new_tokens // 5)
        late = len(row.response) - (flags.max_new_tokens - buffer)
        if late > 0:
            score -= flags.overlong_penalty * late / buffer
    return score


# ------------------------------------------------------------------------------------ the optimizer


class Adam:
    """Adam (Kingma & Ba 2015); with weight_decay, AdamW (Loshchilov & Hutter 2019).

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p - lr * m_hat / (sqrt(v_hat) + eps)
    with m_hat = m / (1 - b1^n) and v_hat = v / (1 - b2^n)
    """

    def __init__(self, model, weight_decay=0.0):
        self.parameters = list(model.parameters())
        self.weight_decay = weight_decay
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]
        self.n = 0

    def step(self, loss, lr, max_grad_norm):
        """One step down the gradient of the loss.

        Returns: the clipped gradients, and their norm before clipping.
        """
        for p in self.parameters:
            p.grad = None
        loss.backward()
        unused = [p.grad is None for p in self.parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                     for p in self.parameters]
        norm = math.sqrt(sum((g * g).sum().item() for g in gradients))
        gradients = [g * min(1.0, max_grad_norm / (norm + 1e-6)) for g in gradients]

        self.n += 1
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.parameters, gradients)):
                p.grad = None
                if unused[i]:
                    continue
                p.copy_(p * (1 - lr * self.weight_decay))
                self.m[i] = 0.9 * self.m[i] + (1 - 0.9) * g
                self.v[i] = 0.999 * self.v[i] + (1 - 0.999) * g * g
                m_hat = self.m[i] / (1 - 0.9**self.n)
                v_hat = self.v[i] / (1 - 0.999**self.n)
                p.copy_(p - lr * m_hat / (torch.sqrt(v_hat) + 1e-8))
        return gradients, norm


def schedule(flags, u):
    """The factor on the learning rate after u updates: u / warm-up, then the schedule."""
    warmup, total = flags.warmup_updates, flags.num_updates
    if u < warmup:
        return u / max(1, warmup)
    if flags.lr_schedule == "constant":
        return 1.0
    if flags.lr_schedule == "linear":
        return max(0.0, (total - u) / max(1, total - warmup))
    if flags.lr_schedule == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (u - warmup) / max(1, total - warmup))))
    raise ValueError(flags.lr_schedule)


def cut(order, pieces):
    """Cut a permutation into consecutive parts, equal up to one element, the larger ones first."""
    parts, start = [], 0
    for i in range(pieces):
        size = len(order) // pieces + (1 if i < len(order) % pieces else 0)
        parts.append(order[start : start + size])
        start += size
    return parts


# -------------------------------------------------------------------------------------- the rollout


class Rollout:
    """The rows of one update, with everything that stays fixed during its steps."""

    def __init__(self, update, flags, reference):
        self.rows = update["rows"]
        self.greedy = update.get("greedy") or []
        self.k = samples_per_prompt(update, flags)
        self.true_scores = [true_score(row, flags) for row in self.rows]
        self.scores = [row_score(row, flags) for row in self.rows]
        self.ref = [reference_logprobs(reference, row, flags.temperature) for row in self.rows]
        self.kl = []  # kl_t of every row
        for row, ref in zip(self.rows, self.ref):
            self.kl.append([old - r for old, r in zip(row.old_logprobs, ref, strict=True)])
        self.R = [s - flags.beta * sum(kl) for s, kl in zip(self.scores, self.kl)]
        self.tokens = sum(len(row.response) for row in self.rows)


def samples_per_prompt(update, flags):
    """k: flags.k, or else the number of rows at the start that share the first row's prompt."""
    if getattr(flags, "k", None) is not None:
        return flags.k
    rows = update["rows"]
    if update.get("greedy"):
        return len(rows) // len(update["greedy"])
    k = 1
    while k < len(rows) and rows[k].prompt == rows[0].prompt:
        k += 1
    return k


def kl_to_go(kl, t):
    """sum_{u >= t} kl_u"""
    return sum(kl[t:])


def whole_response(rollout, values):
    """Give every token of row i the same number, values[i]."""
    return [[value] * len(row.response) for value, row in zip(values, rollout.rows)]


# --------------------------------------------------------------------------------------- advantages
# Each function returns A_t for every token of every row: a list of lists of floats.


def rloo_advantages(rollout):
    """RLOO (Ahmadian et al. 2024): A_i = R_i - 1/(k-1) sum_{j != i} R_j"""
    advantages = []
    for group in groups(rollout.R, rollout.k):
        for i in range(len(group)):
            others = group[:i] + group[i + 1 :]
            advantages.append(group[i] - mean(others))
    return whole_response(rollout, advantages)


def reinforce_baseline(flags, past):
    """b, from the mean R of each past update (never of this one); 0 at the first update."""
    if flags.baseline == "none" or not past:
        return 0.0
    if flags.baseline == "moving-average":
        return mean(past[-flags.window :]) if flags.window > 0 else mean(past)
    if flags.baseline == "ema":
        b = past[0]
        for value in past[1:]:
            b = flags.decay * b + (1 - flags.decay) * value
        return b
    raise ValueError(flags.baseline)


def remax_advantages(rollout, flags, greedy_scores):
    """ReMax (Li et al. 2023): A_t = s_i - beta sum_{u >= t} kl_u - s_greedy"""
    advantages = []
    for i, kl in enumerate(rollout.kl):
        greedy = greedy_scores[i // rollout.k]
        advantages.append([rollout.scores[i] - flags.beta * kl_to_go(kl, t) - greedy
                           for t in range(len(kl))])
    return advantages


def maxrl_advantages(rollout, flags):
    """MaxRL (2026), algorithm 1: over the K of k responses that succeed, 1/K for each and 1/k less.

    The mean over the k responses of A_i grad log pi is 1/K sum_{i succeeds} grad log pi - 1/k sum_i
    grad log pi: A_i = k/K - 1, or -1, and 0 where K is 0. The KL is a penalty without a baseline.
    """
    advantages = []
    for group in groups(rollout.scores, rollout.k):
        successes = sum(group)
        for score in group:
            advantages.append((rollout.k / successes if score == 1 else 0.0) - 1.0
                              if successes else 0.0)
    return whole_response(rollout, [a - flags.beta * sum(kl)
                                    for a, kl in zip(advantages, rollout.kl)])


def grpo_advantages(rollout, flags):
    """GRPO (Shao et al. 2024): A_i = (r_i - mean(r_1..r_k)) / (std(r_1..r_k) + 1e-4)"""
    advantages = []
    for group in groups(rollout.scores, rollout.k):
        for score in group:
            advantage = score - mean(group)
            if flags.scale_std:
                advantage = advantage / (sample_std(group) + 1e-4)
            advantages.append(advantage)
    return whole_response(rollout, advantages)


def has_signal(group, flags):
    return not all_equal([row_score(row, flags) for row in group])


def batch_is_full(rounds, flags):
    """DAPO: whether as many prompts as an update needs have scores that differ."""
    all_groups = [group for rows in rounds for group in groups(rows, flags.k)]
    return sum(has_signal(group, flags) for group in all_groups) >= flags.prompts_per_step


def dynamic_sampling(rounds, flags):
    """DAPO (Yu et al. 2025): the rows of the prompts with a signal, and others where they lack."""
    if len(rounds) == 1:
        return rounds[0]
    all_groups = [group for rows in rounds for group in groups(rows, flags.k)]
    good = [group for group in all_groups if has_signal(group, flags)]
    bad = [group for group in all_groups if not has_signal(group, flags)]
    return flatten((good + bad)[: flags.prompts_per_step])


def reinforce_pp_shaped(rollout, flags, group_baseline):
    """Every row's shaped score in REINFORCE++ (Hu 2024) and its variant with a group baseline."""
    scores = rollout.scores
    if group_baseline:
        return [score - mean(group) for group in groups(scores, rollout.k) for score in group]
    if not flags.normalize_scores:
        return list(scores)
    if all_equal(scores):
        return [0.0] * len(scores)
    center, std = mean(scores), math.sqrt(variance(scores, 0))
    return [max(-flags.clip_scores, min(flags.clip_scores, (s - center) / std)) for s in scores]


def reinforce_pp_advantages(rollout, flags, shaped, group_baseline):
    """A_t = (G_t - mean) / sqrt(max(var, 1e-8)), with G_t = shaped_i - beta sum_{u >= t} kl_u."""
    returns = []
    for i, kl in enumerate(rollout.kl):
        beta = 0.0 if group_baseline else flags.beta
        returns.append([shaped[i] - beta * kl_to_go(kl, t) for t in range(len(kl))])
    if not flags.whiten:
        return returns
    center, var = mean(flatten(returns)), variance(flatten(returns), 0)
    return [[(g - center) / math.sqrt(max(var, 1e-8)) for g in row] for row in returns]


def vanilla_pg_advantages(rollout, flags, old_values):
    """G_t = s_i - beta sum_{u >= t} kl_u and A_t = G_t - V_t. Returns (advantages, returns)."""
    advantages, returns = [], []
    for i, kl in enumerate(rollout.kl):
        g = [rollout.scores[i] - flags.beta * kl_to_go(kl, t) for t in range(len(kl))]
        returns.append(g)
        advantages.append([g[t] - old_values[i][t] for t in range(len(kl))])
    return advantages, returns


def ppo_advantages(rollout, flags, old_values):
    """GAE (Schulman et al. 2016). Returns (advantages, returns).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = sum_l (gamma lam)^l delta_{t+l},  G_t = A_t + V_t
    """
    advantages, returns = [], []
    for i, kl in enumerate(rollout.kl):
        values, length = old_values[i], len(kl)
        deltas = []
        for t in range(length):
            reward = -flags.beta * kl[t]
            next_value = 0.0
            if t == length - 1:
                reward += rollout.scores[i]
            else:
                next_value = values[t + 1]
            deltas.append(reward + flags.gamma * next_value - values[t])
        row = []
        for t in range(length):
            row.append(sum((flags.gamma * flags.lam) ** m * deltas[t + m]
                           for m in range(length - t)))
        advantages.append(row)
        returns.append([row[t] + values[t] for t in range(length)])
    if flags.whiten:
        tokens = flatten(advantages)
        if len(tokens) == 1:
            advantages = [[0.0]]
        else:
            center, std = mean(tokens), sample_std(tokens)
            advantages = [[(a - center) / (std + 1e-8) for a in row] for row in advantages]
    return advantages, returns


# -------------------------------------------------------------------------------- losses of one row


def gradient_loss(logprobs, advantages):
    """- sum_t A_t log pi(y_t)"""
    return -sum(a * logprob for a, logprob in zip(advantages, logprobs, strict=True))


def clipped_terms(logprobs, row, advantages, low, high):
    """PPO's min(ratio_t A_t, clip(ratio_t, 1-low, 1+high) A_t) of every token; the clipped."""
    terms, count = [], 0
    for logprob, old, a in zip(logprobs, row.old_logprobs, advantages, strict=True):
        ratio = torch.exp(logprob - old)
        unclipped = ratio * a
        clipped = torch.clamp(ratio, 1 - low, 1 + high) * a
        terms.append(min(unclipped, clipped))
        if clipped.item() < unclipped.item():
            count += 1
    return terms, count


def gspo_row_loss(flags, row, logprobs, ref, advantages):
    """GSPO (Zheng et al. 2025): - min(s A, clip(s, 1 - low, 1 + high) A) + beta * mean of k3.

    s = (pi(y|x) / pi_old(y|x))^(1/|y|), a single number; A is the same at every token.
    """
    length, a = len(logprobs), advantages[0]
    s = torch.exp(sum(logprobs) - sum(row.old_logprobs)) ** (1 / length)
    clipped = min(max(s, 1 - flags.clip_low), 1 + flags.clip_high)
    surrogate, count = s * a, 0
    if clipped * a < surrogate:
        surrogate, count = clipped * a, length
    kl = sum(torch.exp(r - logprob) - (r - logprob) - 1 for r, logprob in zip(ref, logprobs))
    return flags.beta * kl / length - surrogate, count


def cispo_row_loss(flags, row, logprobs, ref, advantages):
    """CISPO (MiniMax 2025): sum_t [ - sg(min(w_t, max)) A log pi(y_t) + beta k3_t ]"""
    loss, count = 0.0, 0
    for logprob, old, r, a in zip(logprobs, row.old_logprobs, ref, advantages, strict=True):
        weight = math.exp(logprob.item() - old)
        if weight > flags.max_ratio:
            weight, count = flags.max_ratio, count + 1
        k3 = torch.exp(r - logprob) - (r - logprob) - 1
        loss = loss - weight * a * logprob + flags.beta * k3
    return loss, count


def clipped_row_loss(kind, flags, row, logprobs, ref, advantages):
    """The row's loss in GRPO, DAPO, REINFORCE++ (kind "reinforce_pp" or "group") and PPO.

    Returns: the loss, and the number of tokens that are clipped.
    """
    if kind == "gspo":
        return gspo_row_loss(flags, row, logprobs, ref, advantages)
    if kind == "cispo":
        return cispo_row_loss(flags, row, logprobs, ref, advantages)
    low, high = ((flags.clip_low, flags.clip_high) if kind == "dapo"
                 else (flags.clip, flags.clip))
    terms, count = clipped_terms(logprobs, row, advantages, low, high)
    loss = 0.0
    for t in range(len(terms)):
        loss = loss - terms[t]
        if kind in ("grpo", "dapo"):  # k3 = pi_ref / pi - log(pi_ref / pi) - 1
            log_ratio = ref[t] - logprobs[t]
            loss = loss + flags.beta * (torch.exp(log_ratio) - log_ratio - 1)
        if kind == "group":  # k2 = 1/2 (log pi - log pi_ref)^2
            loss = loss + flags.beta * 0.5 * (logprobs[t] - ref[t]) ** 2
    if kind == "grpo" and flags.length_mean:
        loss = loss / len(terms)
    return loss, count


def critic_row_loss(name, flags, values, old_values, returns):
    """1/2 sum_t (V_t - G_t)^2; in PPO 1/2 sum_t max((V - G)^2, (Vclip - G)^2)"""
    loss = 0.0
    for v, old, g in zip(values, old_values, returns, strict=True):
        error = (v - g) ** 2
        if name == "ppo":
            v_clip = old + torch.clamp(v - old, -flags.value_clip, flags.value_clip)
            error = max(error, (v_clip - g) ** 2)
        loss = loss + 0.5 * error
    return loss


def best_rows(rollout, flags):
    """RAFT (Dong et al. 2023): the index of each prompt's first row with the highest value."""
    values = {"reward": rollout.R, "score": rollout.scores}[flags.rank_by]
    kept = []
    for start in range(0, len(values), rollout.k):
        best = start
        for i in range(start, start + rollout.k):
            if values[i] > values[best]:
                best = i
        kept.append(best)
    return kept


def nll_loss(policy, rows, temperature):
    """- sum of log pi over all the rows' tokens / number of tokens"""
    total, tokens = 0.0, 0
    for row in rows:
        total = total - sum(token_logprobs(policy, row, temperature))
        tokens += len(row.response)
    return total / tokens


def dpo_reward(policy, reference, row, flags):
    """beta * sum_t (log pi - log pi_ref)"""
    ref = reference_logprobs(reference, row, flags.temperature)
    logprobs = token_logprobs(policy, row, flags.temperature)
    return flags.beta * sum(logprob - r for logprob, r in zip(logprobs, ref, strict=True))


def pair_loss(chosen, rejected, center=0.0):
    """Mean over the pairs of - log sigmoid(c - r) + center * (c + r)^2"""
    total = 0.0
    for c, r in zip(chosen, rejected, strict=True):
        total = total - torch.nn.functional.logsigmoid(c - r) + center * (c + r) ** 2
    return total / len(chosen)


# ----------------------------------------------------------------------------------------- training


def train(name, flags, updates, policy, reference=None, critic=None):
    """Train the policy (and critic) in place.

    Returns: one dict per optimizer step, and one of metrics per update. For the online algorithms
    an update's last step also has "samples": score, KL and first advantage of each row.
    """
    adam = Adam(policy, flags.weight_decay if name in SUPERVISED else 0.0)
    critic_adam = Adam(critic) if name in WITH_CRITIC else None
    past = []  # the mean R of each past update, for reinforce
    samples = 0
    steps, metrics = [], []
    for u, update in enumerate(updates):
        factor = schedule(flags, u)
        if name in ("dpo", "sft", "reward_model"):
            new_steps, numbers = pairs_or_sft_update(name, flags, update, policy, reference, adam,
                                                     factor)
            samples += 2 * len(update.get("pairs", []))
        else:
            rollout = Rollout(update, flags, reference)
            new_steps, numbers = rl_update(name, flags, update, rollout, policy, critic, adam,
                                           critic_adam, factor, past)
            past.append(mean(rollout.R))
            samples += update.get("sampled", len(rollout.rows)) + len(rollout.greedy)
            if "rounds" in update:
                numbers["rollout/rounds"] = update["rounds"]
        if name not in SUPERVISED:
            clipped = [step["policy_norm"] > flags.max_grad_norm for step in new_steps]
            numbers["policy/grad_norm"] = new_steps[-1]["policy_norm"]
            numbers["policy/grad_clipped"] = sum(clipped) / len(clipped)
            numbers["policy/lr"] = flags.lr * factor
            numbers["time/samples"] = float(samples)
        steps.extend(new_steps)
        metrics.append(numbers)
    return steps, metrics


def pairs_or_sft_update(name, flags, update, policy, reference, adam, factor):
    """One update (one step) of DPO (Rafailov et al. 2023), SFT or a Bradley-Terry reward model."""
    numbers = {}
    if name == "sft":
        loss = nll_loss(policy, update["rows"], 1.0)
    elif name == "reward_model":
        chosen = [last_token_score(policy, c) for c, _ in update["pairs"]]
        rejected = [last_token_score(policy, r) for _, r in update["pairs"]]
        loss = pair_loss(chosen, rejected, flags.center)
    else:
        chosen = [dpo_reward(policy, reference, c, flags) for c, _ in update["pairs"]]
        rejected = [dpo_reward(policy, reference, r, flags) for _, r in update["pairs"]]
        loss = pair_loss(chosen, rejected)
        cs, rs = [c.item() for c in chosen], [r.item() for r in rejected]
        numbers["rewards/chosen"] = mean(cs)
        numbers["rewards/rejected"] = mean(rs)
        numbers["rewards/margins"] = mean([c - r for c, r in zip(cs, rs)])
        numbers["rewards/accuracies"] = mean([float(c > r) for c, r in zip(cs, rs)])
    gradients, norm = adam.step(loss, flags.lr * factor, flags.max_grad_norm)
    if name == "dpo":
        numbers["policy/loss"] = loss.item()
    else:
        numbers.update({"loss": loss.item(), "grad_norm": norm, "lr": flags.lr * factor})
    return [{"policy": gradients, "policy_norm": norm}], numbers


def rl_update(name, flags, update, rollout, policy, critic, adam, critic_adam, factor, past):
    """One update of an online algorithm: the advantages, then one or several optimizer steps."""
    rows = rollout.rows
    numbers = rollout_metrics(rollout)
    rewards = rollout.R  # what the shaped rewards of each row sum to
    kind = name
    if name in WITH_CRITIC:
        with torch.no_grad():
            old_values = [[v.item() for v in token_values(critic, row)] for row in rows]

    if name == "rloo":
        advantages = rloo_advantages(rollout)
    elif name == "reinforce":  # A_i = R_i - b
        b = reinforce_baseline(flags, past)
        advantages = whole_response(rollout, [R - b for R in rollout.R])
        numbers["objective/baseline"] = b
    elif name == "remax":
        greedy_scores = [row_score(row, flags) for row in rollout.greedy]
        advantages = remax_advantages(rollout, flags, greedy_scores)
        numbers["objective/baseline"] = mean(greedy_scores)
    elif name == "maxrl":
        advantages = maxrl_advantages(rollout, flags)
    elif name in ("grpo", "gspo", "cispo", "dapo"):
        advantages = grpo_advantages(rollout, flags)
        rewards = rollout.scores
    elif name in ("reinforce_pp", "reinforce_pp_baseline"):
        group_baseline = (name == "reinforce_pp_baseline"
                          or getattr(flags, "baseline", "none") == "group")
        kind = "group" if group_baseline else "reinforce_pp"
        shaped = reinforce_pp_shaped(rollout, flags, group_baseline)
        advantages = reinforce_pp_advantages(rollout, flags, shaped, group_baseline)
        beta = 0.0 if group_baseline else flags.beta
        rewards = [score - beta * sum(kl) for score, kl in zip(shaped, rollout.kl)]
    elif name == "vanilla_pg":
        advantages, returns = vanilla_pg_advantages(rollout, flags, old_values)
    elif name == "ppo":
        advantages, returns = ppo_advantages(rollout, flags, old_values)
    elif name == "raft":
        kept = best_rows(rollout, flags)
        numbers["objective/best_score"] = mean([rollout.scores[i] for i in kept])
    else:
        raise ValueError(name)
    numbers["objective/rewards"] = mean(rewards)

    parts = [list(range(len(rows)))]  # the indices of the rows of each step
    if name in CLIPPED:
        parts = []
        for epoch in range(flags.epochs):
            order = update["orders"][epoch] if flags.minibatches > 1 else list(range(len(rows)))
            parts.extend(cut(order, flags.minibatches))

    if name == "raft":
        firsts = [float(i in kept) for i in range(len(rows))]
    else:
        firsts = [row_advantages[0] for row_advantages in advantages]
    samples = [(score, sum(kl), first)
               for score, kl, first in zip(rollout.scores, rollout.kl, firsts)]

    steps, clipped_tokens = [], 0
    for part in parts:
        loss = 0.0
        if name == "raft":
            loss = nll_loss(policy, [rows[i] for i in kept], flags.temperature)
        else:
            for i in part:
                logprobs = token_logprobs(policy, rows[i], flags.temperature)
                if name in CLIPPED:
                    row_loss, count = clipped_row_loss(kind, flags, rows[i], logprobs,
                                                       rollout.ref[i], advantages[i])
                    clipped_tokens += count
                else:
                    row_loss = gradient_loss(logprobs, advantages[i])
                number = (sum(len(rows[j].response) for j in part) if name in TOKEN_MEAN
                          else len(part))
                loss = loss + row_loss / number
        gradients, norm = adam.step(loss, flags.lr * factor, flags.max_grad_norm)
        numbers["policy/loss"] = loss.item()
        step = {"policy": gradients, "policy_norm": norm}

        if name in WITH_CRITIC:
            loss = 0.0
            for i in part:
                values = token_values(critic, rows[i])
                loss = (loss + critic_row_loss(name, flags, values, old_values[i], returns[i])
                        / len(part))
            gradients, norm = critic_adam.step(loss, flags.critic_lr * factor, flags.max_grad_norm)
            numbers["value/loss"] = loss.item()
            step["critic"] = gradients
            step["critic_norm"] = norm
        steps.append(step)
    steps[-1]["samples"] = samples

    if name in CLIPPED:
        numbers["policy/clipfrac"] = clipped_tokens / (flags.epochs * rollout.tokens)
    if name in WITH_CRITIC:
        numbers["value/explained_variance"] = explained_variance(flatten(returns),
                                                                 flatten(old_values))
    return steps, numbers


# --------------------------------------------------------------------------- metrics and evaluation


def rollout_metrics(rollout):
    """What is known about a rollout before the update's first step."""
    rows = rollout.rows
    numbers = {
        "objective/scores": mean(rollout.scores),
        "objective/scores_std": sample_std(rollout.scores),
        "objective/best_of_k": mean([max(group)
                                     for group in groups(rollout.true_scores, rollout.k)]),
        "objective/kl": mean([sum(kl) for kl in rollout.kl]),
        "objective/frac_reward_zero_std": mean([float(all_equal(g))
                                                for g in groups(rollout.scores, rollout.k)]),
        "objective/entropy": mean([-sum(row.old_logprobs) for row in rows]),
        "rollout/distinct": len({(i // rollout.k, *row.response)
                                 for i, row in enumerate(rows)}) / len(rows),
        "rollout/length": mean([len(row.response) for row in rows]),
        "rollout/eos_rate": mean([float(row.ended) for row in rows]),
    }
    if len(rows[0].parts) > 1:
        for part in rows[0].parts:
            numbers[f"objective/reward/{part}"] = mean([row.parts[part] for row in rows])
    if any(row.noise for row in rows):
        numbers["objective/true_score"] = mean(rollout.true_scores)
    return numbers


def explained_variance(returns, values):
    """1 - var(G - V) / var(G), over all tokens; nan where var(G) is 0 or undefined."""
    if len(returns) < 2 or all_equal(returns):
        return math.nan
    return 1 - variance([g - v for g, v in zip(returns, values)], 1) / variance(returns, 1)


def evaluation(policy, reference, rows, flags, scores, opponents=None):
    """Means over the rows. The policy is needed only through each row's old_logprobs."""
    kls = []
    for row in rows:
        ref = reference_logprobs(reference, row, flags.temperature)
        kls.append(sum(old - r for old, r in zip(row.old_logprobs, ref, strict=True)))
    numbers = {
        "score": mean(scores),
        "kl": mean(kls),
        "length": mean([len(row.response) for row in rows]),
        "eos_rate": mean([float(row.ended) for row in rows]),
    }
    if opponents is not None:
        wins = [1.0 if s > o else 0.5 if s == o else 0.0
                for s, o in zip(scores, opponents, strict=True)]
        numbers["win_rate"] = mean(wins)
    return numbers


def perplexity(policy, rows):
    """exp(- sum of log pi / number of tokens), at temperature 1"""
    with torch.no_grad():
        return math.exp(nll_loss(policy, rows, 1.0).item())


def classifier_score(model, row):
    """The reward model's score of one row, as a float."""
    with torch.no_grad():
        return last_token_score(model, row).item()


def pair_metrics(rewards, golds=None):
    """How well rewards (c, r) of chosen and rejected order the pairs, and agree with gold ones."""
    both = flatten(rewards)
    numbers = {"accuracy": mean([float(c > r) for c, r in rewards]), "mean": mean(both),
               "std": sample_std(both)}
    if golds is not None:
        agree = []
        for (c, r), (gold_c, gold_r) in zip(rewards, golds, strict=True):
            if gold_c != gold_r:
                agree.append(float((c > r) == (gold_c > gold_r)))
        numbers["gold_accuracy"] = mean(agree) if agree else math.nan
        numbers["gold_spearman"] = correlation(ranks(both), ranks(flatten(golds)))
    return numbers


def ranks(values):
    """The rank of each value, from 1; equal values share the mean of their ranks."""
    result = []
    for x in values:
        smaller = sum(1 for y in values if y < x)
        equal = sum(1 for y in values if y == x)
        result.append(smaller + (equal + 1) / 2)
    return result


def correlation(xs, ys):
    """Pearson's correlation; nan where one of the lists is constant."""
    if all_equal(xs) or all_equal(ys):
        return math.nan
    mx, my = mean(xs), mean(ys)
    covariance = sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / len(xs)
    return covariance / math.sqrt(variance(xs, 0) * variance(ys, 0))
