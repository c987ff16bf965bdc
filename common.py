"""The RL that the scripts share: batches, rollouts, log-probs and KL, scores, values, metrics. No estimators or losses.

Names and shapes are the same everywhere:

    B prompts, k samples for each, N = B * k rows; row = prompt * k + sample ("prompt-major")
    P prompt tokens (padded on the left), T response tokens (padded on the right), V words in the vocabulary
"""

import functools
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from plumbing import (RoomyLayer, eos_ids, isolated_rng, pad, rank_and_world_size, rank_generator, rank_slice,
                      select_rows, sum_over_ranks)


# ---------------------------------------------------------------------------------------------------------------- batch

@dataclass
class Batch:
    """N rows, each a prompt and one response."""

    prompts: torch.Tensor  # (N, P) token ids, padded on the left
    prompt_mask: torch.Tensor  # (N, P) bool
    responses: torch.Tensor  # (N, T) token ids, padded on the right
    response_mask: torch.Tensor  # (N, T) bool, True up to and including the first EOS
    ended: torch.Tensor  # (N,) bool, True where the response has an EOS
    old_logprobs: torch.Tensor  # (N, T) log-probs under the policy that sampled the responses, 0 where masked

    def __len__(self):
        return len(self.responses)

    def __getitem__(self, rows):
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))


def encode(tokenizer, prompt_ids, completions, device, ended=True):
    """A Batch of given texts, as if they had been sampled.

    Args: tokenizer; prompt_ids (N lists of token ids); completions (N str); device; ended (bool, or N bools: whether a
    completion gets an EOS).
    """
    ended = [ended] * len(prompt_ids) if isinstance(ended, bool) else list(ended)
    responses = tokenizer(completions, add_special_tokens=False)["input_ids"]
    responses = [ids + [tokenizer.eos_token_id] * end for ids, end in zip(responses, ended)]
    responses, response_mask = pad(responses, tokenizer.pad_token_id, "right", device)
    prompts = pad(prompt_ids, tokenizer.pad_token_id, "left", device)
    unknown = torch.zeros(responses.shape, device=device)
    return Batch(*prompts, responses, response_mask, torch.tensor(ended, device=device), unknown)


def decode(tokenizer, batch):
    """The N responses as text, without special tokens."""
    rows = [ids[mask].tolist() for ids, mask in zip(batch.responses, batch.response_mask)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def repeat(values, k):
    """[a, b] -> [a, a, ..., b, b, ...]: one value per prompt -> one per row."""
    return [value for value in values for _ in range(k)]


def prompt_numbers(batch):
    """Which prompt each row has: equal numbers for equal prompts, from 0. Returns (N,)."""
    return batch.prompts.masked_fill(~batch.prompt_mask, -1).unique(dim=0, return_inverse=True)[1]


def positions(mask):
    """Position ids (N, L) that count real tokens only, so that left padding does not shift a prompt."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def minibatches(n, epochs, count):
    """Yield index tensors: 0 ... n - 1 split into `count` parts, `epochs` times, reshuffled each time.

    Part sizes differ by at most one row. A single part is not shuffled and draws no random numbers.
    """
    for _ in range(epochs):
        rows = torch.randperm(n) if count > 1 else torch.arange(n)
        yield from rows.tensor_split(count)


def microbatches(model, max_tokens, *groups, rows=None):
    """Yield index tensors that together cover `rows` (default: all) once, grouping rows of a prompt and similar length.

    Row i of every group (one Batch, or chosen and rejected responses) lands in the same micro-batch. It has at most
    `max_tokens` tokens with padding, or one row; a prompt that the model runs once for several rows (see `forward`)
    counts once, and an eighth for each further copy of its keys and values. This changes memory and speed, but not a
    loss that is summed over micro-batches and divided by a count over the whole batch. Each of several processes gets
    its share, in equally many micro-batches, some empty: holding parts of a sharded model, they must run it together.
    """
    prompt_lengths = torch.stack([batch.prompt_mask.sum(1) for batch in groups]).amax(0).tolist()
    lengths = torch.stack([batch.response_mask.sum(1) for batch in groups]).amax(0).tolist()
    prompts = prompt_numbers(groups[0]).tolist()
    longest = dict(sorted(zip(prompts, zip(lengths, prompt_lengths))))  # of each prompt's rows, which stay together
    rows = sorted(range(len(lengths)) if rows is None else rows.tolist(),
                  key=lambda row: (longest[prompts[row]], prompts[row], lengths[row]))

    def tokens(part):
        P, T = (max(numbers[row] for row in part) for numbers in (prompt_lengths, lengths))
        B = len({prompts[row] for row in part}) if getattr(model, "shares_prompts", True) else len(part)
        return (B * P + len(part) * T + (len(part) - B) * P // 8) * len(groups)

    def divide(rows):
        parts = [[]]
        for row in rows:
            if parts[-1] and tokens([*parts[-1], row]) > max_tokens:
                parts.append([])
            parts[-1].append(row)
        return parts

    rank, size = rank_and_world_size()
    turn = {prompt: i % size for i, prompt in enumerate(dict.fromkeys(prompts[row] for row in rows))}
    parts = [divide([row for row in rows if turn[prompts[row]] == other]) for other in range(size)]  # of all processes
    for i in range(max(map(len, parts))):
        yield torch.tensor(parts[rank][i] if i < len(parts[rank]) else [], dtype=torch.long)


# -------------------------------------------------------------------------------------------------------------- rollout

def log_softmax(logits, temperature):
    """Log-probs under softmax(logits / temperature), in at least float32."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def rollout(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, at_once=None, greedy=False):
    """`sample` in chunks of at most `at_once` responses per process (default: all at once). Returns: Batch."""
    size = max(1, (at_once or k * len(prompt_ids)) // k) * rank_and_world_size()[1]  # prompts
    with torch.autocast(policy.device.type, enabled=False):  # keeps what the model's own casts until the last token
        parts = [sample(policy, tokenizer, prompt_ids[i : i + size], k, temperature, max_new_tokens, greedy)
                 for i in range(0, len(prompt_ids), size)]
    return concatenate(parts, tokenizer.pad_token_id)


def concatenate(batches, pad_id):
    """Join several Batches into one, padded to the longest prompt and response."""
    P, T = max(batch.prompts.shape[1] for batch in batches), max(batch.responses.shape[1] for batch in batches)
    left = lambda name, value: torch.cat([F.pad(x, (P - x.shape[1], 0), value=value)
                                          for x in (getattr(batch, name) for batch in batches)])
    right = lambda name, value: torch.cat([F.pad(x, (0, T - x.shape[1]), value=value)
                                           for x in (getattr(batch, name) for batch in batches)])
    return Batch(left("prompts", pad_id), left("prompt_mask", False), right("responses", pad_id),
                 right("response_mask", False), torch.cat([batch.ended for batch in batches]), right("old_logprobs", 0))


@torch.no_grad()
def sample(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, greedy=False):
    """Sample k responses per prompt from exactly softmax(logits / temperature): no top-k, no top-p.

    Each prompt runs through the model once for its k samples, and finished rows leave the batch soon. With several
    processes, each samples for its slice of the prompts, and all get the whole batch.

    Args: policy (causal LM); tokenizer; prompt_ids (B lists of token ids); k; temperature; max_new_tokens; greedy.
    Returns: Batch of N = B * k rows, prompt-major.
    """
    device, generator = policy.device, rank_generator(policy.device)
    ends = eos_ids(policy, tokenizer).to(device)
    prompts, prompt_mask = pad(prompt_ids, tokenizer.pad_token_id, "left", device)  # (B, P)
    mine = rank_slice(len(prompts))
    prefill = mine if len(mine) else range(1)  # a process without prompts runs the model too, on one to discard
    output = policy(input_ids=prompts[prefill], attention_mask=prompt_mask[prefill],
                    position_ids=positions(prompt_mask[prefill]), use_cache=True, logits_to_keep=1)
    rows = torch.arange(len(prefill), device=device).repeat_interleave(k)  # (n,)
    cache, logits = output.past_key_values, output.logits[rows, -1]  # (n, V)
    cache.layers = [layer if layer.is_sliding else RoomyLayer(layer, max_new_tokens) for layer in cache.layers]
    cache = select_rows(cache, rows)
    mask = prompt_mask[prefill].repeat_interleave(k, 0)  # (n, P), the context of the n unfinished rows
    prompts, prompt_mask = prompts.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0)  # (N, P)

    N = len(prompts)
    responses = torch.zeros((N, max_new_tokens), dtype=torch.long, device=device)  # (N, T)
    response_mask = torch.zeros((N, max_new_tokens), dtype=torch.bool, device=device)  # (N, T)
    old_logprobs = torch.zeros((N, max_new_tokens), dtype=log_softmax(logits[:1], 1).dtype, device=device)  # (N, T)
    ended = torch.zeros(N, dtype=torch.bool, device=device)  # (N,)
    active = torch.arange(N, device=device)[k * prefill.start : k * prefill.stop]  # (n,), the rows in the cache
    first, count = active[0].item(), len(active)  # of this process
    finished = torch.full_like(active, not len(mine), dtype=torch.bool)  # (n,)
    for t in range(max_new_tokens):
        logprobs = log_softmax(logits, temperature)  # (n, V)
        # The Gumbel-max trick: the argmax of log-probs plus Gumbel noise is a sample from the softmax. Rows that have
        # left draw too, so that a row's numbers do not depend on when others leave.
        noise = torch.zeros(count, logprobs.shape[1], dtype=logprobs.dtype, device=device)
        noise = noise if greedy else -noise.exponential_(generator=generator).log()
        tokens = (logprobs + noise[active - first]).argmax(1)  # (n,)
        rows = active[~finished]
        responses[rows, t] = tokens[~finished]
        response_mask[rows, t] = True
        old_logprobs[rows, t] = logprobs[~finished, tokens[~finished]]
        finished |= torch.isin(tokens, ends)
        ended[active[finished]] = len(mine) > 0
        if not sum_over_ranks((~finished).sum().item()) or t + 1 == max_new_tokens:
            break
        if finished.sum() > len(active) / 8:  # not each at once: the others' keys and values have to be copied
            keep = (~finished).nonzero().squeeze(1) if not finished.all() else torch.zeros_like(active[:1])
            cache = select_rows(cache, keep)
            active, finished, mask, tokens = active[keep], finished[keep], mask[keep], tokens[keep]
        mask = F.pad(mask, (0, 1), value=True)  # (n, P + t + 1)
        output = policy(input_ids=tokens.unsqueeze(1), attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
    responses, response_mask, old_logprobs, ended = map(
        sum_over_ranks, (responses[:, : t + 1], response_mask[:, : t + 1], old_logprobs[:, : t + 1], ended))
    return Batch(prompts, prompt_mask, responses.masked_fill(~response_mask, tokenizer.pad_token_id), response_mask,
                 ended, old_logprobs)


# ----------------------------------------------------------------------------------------------------- log-probs and KL

def token_logprobs(model, batch, temperature):
    """Log-prob of each response token under softmax(logits / temperature), with gradients.

    Returns: (N, T), 0 where masked.
    """
    def outputs(keep, **inputs):
        output = model(**inputs, logits_to_keep=keep)
        return output.logits, output.past_key_values

    def pick(logits, rows, start):  # logits predict the next token: the first, at the last prompt token, token 0
        tokens = batch.responses[rows, start : start + logits.shape[1]]  # (n, t)
        return log_softmax(logits, temperature).gather(2, tokens.unsqueeze(2)).squeeze(2)

    return forward(model, outputs, pick, batch, last=False).masked_fill(~batch.response_mask, 0.0)


def forward(model, outputs, pick, batch, last):
    """A number for the last prompt token and for each response token, with gradients.

    Rows with the same prompt share its pass through the model and continue from its keys and values, rows of similar
    length together. If no two rows do, or the model can't (with --shard, where all processes must make the same passes,
    and --gradient-checkpointing, which would fill the cache twice), each row is one pass. The numbers are the same.

    Args: model; outputs (function (keep, **inputs) -> outputs at the last `keep` tokens (n, keep, D), and the cache);
    pick (function (outputs (n, t, D), rows, start) -> (n, t), the numbers of columns start, start + 1 ...); batch; last
    (whether the last response token gets a number too). Returns: (N, T), (N, 1 + T) with the last; arbitrary if masked.
    """
    width = batch.responses.shape[1] + last
    lengths = batch.response_mask.sum(1) + int(last) - 1  # (N,), of the part of a response that the model must read
    P, T = max([1, *batch.prompt_mask.sum(1).tolist()]), max([0, *lengths.tolist()])
    ids = torch.cat([batch.prompts[:, -P:], batch.responses[:, :T]], 1)  # (N, P + T)
    mask = torch.cat([batch.prompt_mask[:, -P:], batch.response_mask[:, :T]], 1)
    numbers = prompt_numbers(batch)  # (N,)
    rows = torch.arange(len(batch), device=numbers.device)
    first = torch.zeros_like(numbers.unique()).scatter(0, numbers, rows)  # a row of each prompt
    if len(first) == len(batch) or not getattr(model, "shares_prompts", True):
        if not len(batch):  # processes that hold parts of one sharded model must run it together: on a placeholder
            ids, mask = ids.new_zeros(1, P + T), mask.new_ones(1, P + T)
        output, _ = outputs(T + 1, input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        return F.pad(pick(output[: len(batch)], slice(None), 0), (0, width - 1 - T))

    prompt_mask = mask[first, :P]
    output, cache = outputs(1, input_ids=ids[first, :P], attention_mask=prompt_mask,
                            position_ids=positions(prompt_mask), use_cache=True)
    found = [F.pad(pick(output[numbers], slice(None), 0), (0, width - 1))]
    order = lengths.argsort(descending=True)
    while len(order) and (t := lengths[order[0]].item()) > 0:
        similar = (lengths[order] > 0.75 * t).sum()
        rows, order = order[:similar], order[similar:]
        row_mask = mask[rows, : P + t]
        output, _ = outputs(t, input_ids=ids[rows, P : P + t], attention_mask=row_mask,
                            position_ids=positions(row_mask)[:, P:], past_key_values=select_rows(cache, numbers[rows]))
        part = F.pad(pick(output, rows, 1), (1, width - 1 - t))
        found.append(torch.zeros_like(found[0]).index_copy(0, rows, part))
    return sum(found)


@torch.no_grad()
def no_grad_logprobs(model, batch, temperature, max_tokens):
    """`token_logprobs` in micro-batches, without gradients. Returns (N, T)."""
    logprobs = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(model, max_tokens, batch):
        logprobs[rows] = token_logprobs(model, batch[rows], temperature).to(logprobs.dtype)
    return sum_over_ranks(logprobs)


def token_kl(logprobs, ref_logprobs, response_mask):
    """Per-token estimate k1 = log pi - log pi_ref of KL(pi || pi_ref), for tokens sampled from pi. Returns (N, T).

    Unbiased, and the right choice in a reward, where its expected gradient is that of the KL. Single values and
    small-batch means are often negative. (Schulman 2020, "Approximating KL divergence")
    """
    return (logprobs - ref_logprobs) * response_mask


def sequence_rewards(scores, kl, beta):
    """R(x, y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)), one per response (Ahmadian et al. 2024, section 2).

    Args: scores (N,); kl (N, T); beta. Returns: (N,).
    """
    return scores - beta * kl.sum(1)


def token_rewards(scores, kl, beta, response_mask):
    """r_t = -beta * kl_t, plus the score on the last token of the response (EOS, if there is one).

    Args: scores (N,); kl (N, T); beta; response_mask (N, T). Returns: (N, T), 0 where masked; each row sums to
    sequence_rewards.
    """
    rewards = -beta * kl  # (N, T)
    last = response_mask.sum(1) - 1  # (N,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores.to(rewards.dtype)
    return rewards


# ------------------------------------------------------------------------------------------------------- reward scoring

def classifier_outputs(model, batch, last):
    """Output of a one-label sequence classifier at the last prompt token and at each response token. See `forward`."""
    def outputs(keep, **inputs):
        output = model.base_model(**inputs)
        hidden = output.last_hidden_state[:, -keep:].to(model.score.weight.dtype)  # (n, keep, hidden)
        return model.score(hidden), output.past_key_values
    return forward(model, outputs, lambda output, rows, start: output.squeeze(2), batch, last)


def classifier_scores(model, batch):
    """Output of a one-label sequence classifier at each row's last real token, with gradients. Returns (N,).

    The position comes from the mask. transformers itself looks for the last id other than the pad id, which is the
    wrong position if pad and EOS are the same token.
    """
    return classifier_outputs(model, batch, last=True).gather(1, batch.response_mask.sum(1, keepdim=True)).squeeze(1)


def token_values(critic, batch):
    """A one-label classifier's output before each response token, with gradients. Returns (N, T), 0 where masked.

    The value must not see the action: V of the first token is read at the last prompt token, and so on.
    """
    return classifier_outputs(critic, batch, last=False).masked_fill(~batch.response_mask, 0.0)


@torch.no_grad()
def no_grad_values(critic, batch, max_tokens):
    """`token_values` in micro-batches, without gradients. Returns (N, T)."""
    values = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(critic, max_tokens, batch):
        values[rows] = token_values(critic, batch[rows]).to(values.dtype)
    return sum_over_ranks(values)


# ----------------------------------------------------------------------------------------------- evaluation and metrics

@torch.no_grad()
def evaluate(policy, reference, tokenizer, reward_fns, dataset, args, k=1, greedy=False, judge=None, opponents=None):
    """Sample k responses to each held-out prompt and score them, without touching training's random state.

    Args: policy and reference (causal LMs); reward_fns (see runs.load_rewards); dataset (see load_rows); args
    (temperature, max_new_tokens, microbatch_tokens, eval_batch_size, seed); judge (name of the reward function that
    decides the win rate; default: the last); opponents (N scores of other responses, for the win rate; default: those
    of the dataset's completion column, if there is one).
    Returns: (values, completions): dict name -> (N,) floats on the CPU, and the N responses as text, prompt-major.
    """
    values, completions, judge = {}, [], judge or list(reward_fns)[-1]
    with isolated_rng(args.seed):
        if opponents is None and "completion" in dataset.column_names:
            opponents = completion_scores(reward_fns[judge], judge, tokenizer, dataset, args.eval_batch_size,
                                          policy.device).repeat_interleave(k)
        for examples in dataset.iter(max(1, args.eval_batch_size // k)):
            batch = rollout(policy, tokenizer, examples["prompt_ids"], k, args.temperature, args.max_new_tokens,
                            greedy=greedy)
            ref_logprobs = no_grad_logprobs(reference, batch, args.temperature, args.microbatch_tokens)  # (n, T)
            found = {}  # name -> (n,)
            for reward_fn in reward_fns.values():
                found |= reward_fn(batch, examples)
            if opponents is not None:
                better = found[judge].cpu() - opponents[len(completions) :][: len(batch)]
                found["win_rate"] = (torch.sign(better) + 1) / 2  # 1/2 for ties
            found["kl"] = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask).sum(1)
            found |= {"length": batch.response_mask.sum(1), "eos_rate": batch.ended}
            for name, value in found.items():
                values.setdefault(name, []).append(value.float().cpu())
            completions += decode(tokenizer, batch)
    return {name: torch.cat(parts) for name, parts in values.items()}, completions


@functools.lru_cache(maxsize=1)  # computed once a run
def completion_scores(reward_fn, name, tokenizer, dataset, at_once, device):
    """Scores of a dataset's completions: (n,), on the CPU. `name` is their name in what reward_fn returns."""
    return torch.cat([reward_fn(encode(tokenizer, rows["prompt_ids"], rows["completion"], device), rows)[name].cpu()
                      for rows in dataset.iter(at_once)])


def rollout_metrics(batch, parts, scores, kl, rewards, k):
    """Metrics that every algorithm logs about a rollout: means over its N responses or its B prompts.

    Args: batch; parts (dict name -> (N,), what makes up the scores); scores (N,); kl (N, T); rewards (N,) or (N, T); k.
    """
    groups = scores.view(-1, k)  # (B, k)
    rows = torch.cat([torch.arange(len(batch), device=scores.device)[:, None] // k, batch.responses], 1)  # (N, 1 + T)
    return {f"objective/{name}": part.mean() for name, part in parts.items() if name != "score"} | {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/best_of_k": parts.get("true_score", parts["score"]).view(-1, k).amax(1).mean(),
        "objective/kl": kl.sum(1).mean(),
        "objective/rewards": rewards.view(len(batch), -1).sum(1).mean(),
        "objective/frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
        "objective/entropy": -batch.old_logprobs.sum(1).mean(),
        "rollout/distinct": len(rows.unique(dim=0)) / len(batch),
        "rollout/length": batch.response_mask.sum(1).float().mean(),
        "rollout/eos_rate": batch.ended.float().mean(),
    }
