"""The RL that the scripts share: batches, rollouts, log-probs and KL, rewards, values, metrics.

No estimators or losses. Each pass of a model stands here in its plain form; where plumbing/fast.py
fits the model, one line hands over to it, which gives the same numbers sooner.

Names and shapes are the same everywhere:

    B prompts, k samples for each, N = B * k rows; row = prompt * k + sample ("prompt-major")
    P prompt tokens (padded on the left), T response tokens (padded on the right), V words
"""

from dataclasses import dataclass, fields

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing import (call_function, eos_ids, equal_share, everywhere, fast, gather, isolated_rng,
                      keeps_cache, models_sharing_ids, my_parts, own_ids, own_rng, shares_ids,
                      sum_over_ranks, try_out, weighted_sum)

# -------------------------------------------------------------------------------------------- batch


@dataclass
class Batch:
    """N rows, each a prompt and one response."""

    prompts: torch.Tensor  # (N, P) token ids, padded on the left
    prompt_mask: torch.Tensor  # (N, P) bool
    responses: torch.Tensor  # (N, T) token ids, padded on the right
    response_mask: torch.Tensor  # (N, T) bool, True up to and including its EOS
    ended: torch.Tensor  # (N,) bool, True where the response has an EOS
    old_logprobs: torch.Tensor  # (N, T) log-probs under the policy that sampled, 0 where masked

    def __len__(self):
        return len(self.responses)

    def __getitem__(self, rows):
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))


def pad(rows, pad_id, side, device):
    """N lists of ids -> ids (N, L) and bool mask (N, L), padded on the "left" or "right"."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, True, pad_id, side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
    return ids.to(device), mask.bool().to(device)


def make_batch(tokenizer, prompt_ids, response_ids, device, ended=None):
    """A Batch of given responses, as if they had been sampled.

    Args: tokenizer; prompt_ids and response_ids (N lists of token ids each; see load_rows); device;
    ended (N bools: which responses end in EOS; default: all).
    """
    ended = [True] * len(response_ids) if ended is None else ended
    responses, response_mask = pad(response_ids, tokenizer.pad_token_id, "right", device)
    prompts = pad(prompt_ids, tokenizer.pad_token_id, "left", device)
    unknown = torch.zeros(responses.shape, device=device)
    return Batch(*prompts, responses, response_mask, torch.tensor(ended, device=device), unknown)


def decode(tokenizer, batch):
    """The N responses as text, without special tokens."""
    rows = [ids[mask] for ids, mask in zip(batch.responses, batch.response_mask)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def concatenate(batches, pad_id):
    """Join several Batches into one, padded to the longest prompt and response."""
    rows = lambda name, mask: [ids[keep] for batch in batches
                               for ids, keep in zip(getattr(batch, name), getattr(batch, mask))]
    device = batches[0].responses.device
    prompts = pad(rows("prompts", "prompt_mask"), pad_id, "left", device)
    responses = pad(rows("responses", "response_mask"), pad_id, "right", device)
    logprobs = pad_sequence(rows("old_logprobs", "response_mask"), True)
    return Batch(*prompts, *responses, torch.cat([batch.ended for batch in batches]), logprobs)


def repeat(values, k):
    """[a, b] -> [a, a, ..., b, b, ...]: one value per prompt -> one per row."""
    return [value for value in values for _ in range(k)]


def positions(mask):
    """Position ids (N, L) that count real tokens only, so left padding does not shift a prompt."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def model_inputs(batch):
    """Prompts and responses as a model takes them: dict of (N, P + T)."""
    mask = torch.cat([batch.prompt_mask, batch.response_mask], 1)
    return {"input_ids": torch.cat([batch.prompts, batch.responses], 1), "attention_mask": mask,
            "position_ids": positions(mask), "use_cache": False}


def minibatches(n, epochs, count):
    """Yield index tensors: 0 ... n - 1 in `count` parts, `epochs` times, reshuffled each time.

    Part sizes differ by at most one row. A single part is not shuffled and draws no random numbers.
    """
    for _ in range(epochs):
        rows = torch.randperm(n) if count > 1 else torch.arange(n)
        yield from rows.tensor_split(count)


def microbatches(model, max_tokens, *groups, rows=None):
    """Index tensors that together cover `rows` (default: all) once, within a budget of tokens.

    Row i of every group (one Batch, or chosen and rejected responses) lands in the same
    micro-batch, which has at most `max_tokens` tokens with padding, or one row. This changes memory
    and speed, but not a loss that is summed over micro-batches and divided by a count over the
    whole batch. Each of several processes gets its share of the rows.
    """
    rows = torch.arange(len(groups[0])) if rows is None else rows
    width = sum(batch.prompts.shape[1] + batch.responses.shape[1] for batch in groups)
    divide = lambda rows: rows.split(max(1, max_tokens // width))
    if fast.fits(model):
        divide = lambda rows: fast.divide(model, max_tokens, groups, rows)
    return my_parts(rows, divide, model)


# ------------------------------------------------------------------------------------------ rollout


def log_softmax(logits, temperature):
    """Log-probs under softmax(logits / temperature), in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits / temperature).log_softmax(-1)


def rollout(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, at_once=None,
            greedy=False):
    """`sample` in chunks of at most `at_once` responses per process (default: all at once).

    With several processes, each samples for its share of the prompts. Returns: Batch of all rows.
    """
    mine = equal_share(prompt_ids)
    size = max(1, (at_once or k * len(mine)) // k)  # prompts
    with own_rng():
        parts = [sample(policy, tokenizer, mine[start : start + size], k, temperature,
                        max_new_tokens, greedy) for start in range(0, len(mine), size)]
    batch = concatenate(sum(gather(parts), []), tokenizer.pad_token_id)
    return batch[: k * len(prompt_ids)]


@torch.no_grad()
def sample(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, greedy=False):
    """Sample k responses per prompt from exactly softmax(logits / temperature): no top-k, no top-p.

    Args: policy (causal LM); tokenizer; prompt_ids (B lists of token ids); k; temperature;
    max_new_tokens; greedy. Returns: Batch of N = B * k rows, prompt-major.
    """
    pad_id, ends = tokenizer.pad_token_id, eos_ids(policy, tokenizer)
    prompts, prompt_mask = pad(repeat(prompt_ids, k), pad_id, "left", policy.device)  # (N, P)

    def choose(logits, rows):
        """From the logits (n, V) of some rows, their next tokens and log-probs, (n,) each."""
        logprobs = log_softmax(logits, temperature)  # (n, V)
        # The Gumbel-max trick: the argmax of log-probs plus Gumbel noise is a sample from the
        # softmax. All N rows draw, so that a row's noise does not depend on which have finished.
        noise = logprobs.new_ones(len(prompts), logprobs.shape[1])  # (N, V)
        if not greedy:
            noise.exponential_()
        tokens = (logprobs - noise[rows].log()).argmax(1)  # (n,)
        return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)

    if fast.samples(policy):
        found = fast.sample(policy, prompts, prompt_mask, k, ends, max_new_tokens, choose)
        return Batch(prompts, prompt_mask, *found)

    ids, mask, cache, logprobs = prompts, prompt_mask, None, []  # (N, P)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (N,)
    for _ in range(max_new_tokens):
        new = ids if cache is None else ids[:, -1:]
        output = policy(input_ids=new, attention_mask=mask, past_key_values=cache,
                        use_cache=keeps_cache(policy),  # without one, the whole rows run each time
                        position_ids=positions(mask)[:, -new.shape[1] :], logits_to_keep=1)
        cache = output.get("past_key_values")
        tokens, chosen = choose(output.logits[:, -1], slice(None))  # (N,)
        ids = torch.cat([ids, tokens.masked_fill(ended, pad_id).unsqueeze(1)], 1)
        mask = torch.cat([mask, ~ended.unsqueeze(1)], 1)
        logprobs.append(chosen.masked_fill(ended, 0.0))
        ended = ended | torch.isin(tokens, ends)
        if everywhere(ended.all()):
            break
    P = prompts.shape[1]
    return Batch(prompts, prompt_mask, ids[:, P:], mask[:, P:], ended, torch.stack(logprobs, 1))


# --------------------------------------------------------------------------------- log-probs and KL


def token_logprobs(model, batch, temperature):
    """Log-prob of each response token under softmax(logits / temperature), with gradients.

    Returns: (N, T), 0 where masked.
    """
    def pick(logits, tokens):
        """Of the logits (n, t, V) before some tokens (n, t), these tokens' log-probs."""
        return log_softmax(logits, temperature).gather(2, tokens.unsqueeze(2)).squeeze(2)

    if fast.fits(model):
        logprobs = fast.token_numbers(model, batch, pick)
    else:
        T = batch.responses.shape[1]
        logits = model(**model_inputs(batch), logits_to_keep=T + 1).logits[:, :-1]  # (N, T, V)
        logprobs = pick(logits, batch.responses)
    return logprobs.masked_fill(~batch.response_mask, 0.0)


@torch.no_grad()
def no_grad_logprobs(model, batch, temperature, max_tokens):
    """`token_logprobs` in micro-batches, without gradients. Returns (N, T)."""
    logprobs = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(model, max_tokens, batch):
        logprobs[rows] = token_logprobs(model, batch[rows], temperature).to(logprobs.dtype)
    return sum_over_ranks(logprobs)


def token_kl(logprobs, ref_logprobs, response_mask):
    """Per-token estimate k1 = log pi - log pi_ref of KL(pi || pi_ref), for tokens sampled from pi.

    Unbiased, and the right choice in a reward, where its expected gradient is that of the KL.
    Single values and small-batch means are often negative. Returns (N, T). (Schulman 2020,
    "Approximating KL divergence")
    """
    return (logprobs - ref_logprobs) * response_mask


def sequence_rewards(scores, kl, beta):
    """R(x, y) = r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) (Ahmadian et al. 2024, section 2).

    Args: scores (N,); kl (N, T); beta. Returns: (N,).
    """
    return scores - beta * kl.sum(1)


def token_rewards(scores, kl, beta, response_mask):
    """r_t = -beta * kl_t, plus the score on the last token of the response (EOS, if there is one).

    Args: scores (N,); kl (N, T); beta; response_mask (N, T). Returns: (N, T), 0 where masked; each
    row sums to sequence_rewards.
    """
    rewards = -beta * kl  # (N, T)
    last = response_mask.sum(1) - 1  # (N,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores.to(rewards.dtype)
    return rewards


# ------------------------------------------------------------------------------- rewards and values


def classifier_outputs(model, batch, last):
    """What a one-label classifier says before each response token, and if `last` after the last.

    Returns: (N, T), or (N, 1 + T); arbitrary where masked.
    """
    if fast.fits(model):
        return fast.classifier_numbers(model, batch, last)
    P, T = batch.prompts.shape[1], batch.responses.shape[1]
    hidden = model.base_model(**model_inputs(batch)).last_hidden_state  # (N, P + T, hidden)
    hidden = hidden[:, P - 1 : P + T - 1 + last].to(model.score.weight.dtype)
    return model.score(hidden).squeeze(2)


def classifier_scores(model, batch):
    """A one-label classifier's output at each row's last real token, with gradients. Returns (N,).

    The position comes from the mask. transformers itself looks for the last id other than the pad
    id, which is the wrong position if pad and EOS are the same token.
    """
    outputs = classifier_outputs(model, batch, last=True)  # (N, 1 + T)
    return outputs.gather(1, batch.response_mask.sum(1, keepdim=True)).squeeze(1)


def token_values(critic, batch):
    """A one-label classifier's output before each response token, with gradients.

    The value must not see the action: V of the first token is read at the last prompt token, and so
    on. Returns (N, T), 0 where masked.
    """
    return classifier_outputs(critic, batch, last=False).masked_fill(~batch.response_mask, 0.0)


@torch.no_grad()
def no_grad_values(critic, batch, max_tokens):
    """`token_values` in micro-batches, without gradients. Returns (N, T)."""
    values = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(critic, max_tokens, batch):
        values[rows] = token_values(critic, batch[rows]).to(values.dtype)
    return sum_over_ranks(values)


@torch.no_grad()
def reward_scores(reward, tokenizer, batch, examples):
    """What one reward (see load_reward) says of each response. Returns (N,), NaN where it is None.

    A classifier gets the rollout's token ids if it shares the policy's tokenizer and chat template.
    Otherwise the text is tokenized again (messages by its own template), with what ends it if the
    response has ended. `examples` holds the dataset's B rows of the N = B * k rows of `batch`, as
    columns.
    """
    scores, texts = torch.zeros_like(batch.old_logprobs[:, 0]), decode(tokenizer, batch)  # (N,)
    if reward.function:
        ids = [row[mask].tolist() for row, mask in zip(batch.responses, batch.response_mask)]
        return sum_over_ranks(call_function(reward, examples, texts, ids).to(scores))
    if not shares_ids(reward, tokenizer, batch.responses, examples["prompt"]):
        ended = batch.ended.tolist()
        batch = make_batch(reward.tokenizer, *own_ids(reward, examples, texts, ended),
                           scores.device, ended)
    for rows in microbatches(reward.model, reward.max_tokens, batch):
        scores[rows] = classifier_scores(reward.model, batch[rows]).to(scores)
    return sum_over_ranks(scores)


def score(rewards, tokenizer, batch, examples, noise=True):
    """The score of each response, and what it is made of: dict name -> (N,).

    "score" is the weighted sum of the rewards. If there are several, each is also given as
    "reward/<name>". With --reward-noise, N(0, sigma^2) is added, and "true_score" is what it was
    (Ahmadian et al. 2024, section 5.2.2).

    Args: rewards (see load_rewards); tokenizer (the policy's); batch; examples (dict of columns,
    lists of B values); noise (False: without).
    """
    parts = {f"reward/{name}": reward_scores(reward, tokenizer, batch, examples)
             for name, reward in rewards.parts.items()}  # of (N,) each
    total = weighted_sum(rewards, parts)  # (N,)
    found = {"score": total} | (parts if len(parts) > 1 else {})
    if rewards.noise and noise:
        draws = torch.randn(len(total)).to(total)  # (N,), from the state that checkpoints hold
        found |= {"score": total + rewards.noise * draws, "true_score": total}
    return found


# --------------------------------------------------------------------------- evaluation and metrics


def dry_run(policy, tokenizer, datasets, rewards, args, *others):
    """Catch what would stop the run later: rows too long for a model, a reward that fails.

    Args: policy; tokenizer; datasets (list of what load_rows returns); rewards; args; others (more
    models that read the rows, such as the reference).
    Returns: what the rewards say of one response to each of two prompts, see `all_scores`.
    """
    try_out(policy, datasets, args, *others, *models_sharing_ids(rewards, tokenizer))
    examples = datasets[0][:2]
    texts = tokenizer(["text"] * len(examples["prompt"]))["input_ids"]
    batch = make_batch(tokenizer, examples["prompt_ids"], examples.get("completion_ids", texts),
                       policy.device)
    return all_scores(rewards, tokenizer, batch, examples)


def all_scores(rewards, tokenizer, batch, examples):
    """The score without noise, and what the held-out rewards say: dict name -> (N,)."""
    return score(rewards, tokenizer, batch, examples, noise=False) | {
        name: reward_scores(reward, tokenizer, batch, examples)
        for name, reward in rewards.held_out.items()}


def judge_scores(rewards, tokenizer, batch, examples):
    """What the judge of the win rate says of each response: a held-out reward, or the score.

    Returns: (N,).
    """
    if rewards.judge in rewards.held_out:
        return reward_scores(rewards.held_out[rewards.judge], tokenizer, batch, examples)
    return score(rewards, tokenizer, batch, examples, noise=False)["score"]


@torch.no_grad()
def evaluate(policy, reference, tokenizer, rewards, dataset, args, k=1, greedy=False, more=None):
    """Sample k responses to each held-out prompt and score them. Training's random state stays.

    Args: policy and reference (causal LMs); tokenizer; rewards; dataset (see load_rows; its
    completions, if any, are what the win rate compares with); args (temperature, max_new_tokens,
    microbatch_tokens, eval_batch_size, seed); k; greedy; more (function (batch) -> dict name ->
    (N,): further values).
    Returns: (values, completions): dict name -> (N,) floats on the CPU, and the N responses as
    text, prompt-major.
    """
    examples = dataset[:]
    with isolated_rng(args.seed):
        batch = rollout(policy, tokenizer, examples["prompt_ids"], k, args.temperature,
                        args.max_new_tokens, args.eval_batch_size, greedy)
        values = all_scores(rewards, tokenizer, batch, examples)  # name -> (N,)
        if "completion" in examples:
            given = make_batch(tokenizer, examples["prompt_ids"], examples["completion_ids"],
                               policy.device)  # B rows
            theirs = judge_scores(rewards, tokenizer, given, examples)  # (B,)
            values["win_rate"] = wins(values[rewards.judge], theirs.repeat_interleave(k))
        ref_logprobs = no_grad_logprobs(reference, batch, args.temperature,
                                        args.microbatch_tokens)  # (N, T)
        values["kl"] = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask).sum(1)
        values |= {"length": batch.response_mask.sum(1), "eos_rate": batch.ended}
        values |= more(batch) if more else {}
    values = {name: value.float().cpu() for name, value in values.items()}
    return values, decode(tokenizer, batch)


def wins(ours, theirs):
    """1 where our score is the higher one, 0 where it is the lower one, 1/2 for ties: (N,).

    NaN where one of them is (a reward that is None).
    """
    return (torch.sign(ours - theirs) + 1) / 2 + 0 * (ours - theirs)


def rollout_metrics(batch, parts, scores, kl, rewards, k):
    """Metrics that every algorithm logs about a rollout: means over its N rows or its B prompts.

    Args: batch; parts (dict name -> (N,), see `score`); scores (N,); kl (N, T); rewards (N,) or
    (N, T); k.
    """
    groups = scores.view(-1, k)  # (B, k)
    distinct = {(row // k, *ids) for row, ids in enumerate(batch.responses.tolist())}
    best = parts.get("true_score", parts["score"]).view(-1, k).amax(1)  # (B,)
    return {f"objective/{name}": part.nanmean() for name, part in parts.items()
            if name != "score"} | {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/best_of_k": best.mean(),
        "objective/kl": kl.sum(1).mean(),
        "objective/rewards": rewards.view(len(batch), -1).sum(1).mean(),
        "objective/frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
        "objective/entropy": -batch.old_logprobs.sum(1).mean(),
        "rollout/distinct": len(distinct) / len(batch),
        "rollout/length": batch.response_mask.sum() / len(batch),
        "rollout/eos_rate": batch.ended.float().mean(),
    }
