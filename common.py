"""The RL that the scripts share: batches, rollouts, log-probs and KL, scores, values, metrics. No estimators or losses.

Names and shapes are the same everywhere:

    B prompts, k samples for each, N = B * k rows; row = prompt * k + sample ("prompt-major")
    P prompt tokens (padded on the left), T response tokens (padded on the right), V words in the vocabulary
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from plumbing import (call_reward, eos_ids, isolated_rng, load_frozen_classifier, load_function, load_tokenizer, pad,
                      prompt_tokens, rank_and_world_size, rank_generator, rank_slice, sum_over_ranks)


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


def model_inputs(batch):
    """Prompts and responses concatenated: ids and mask (N, P + T), and T, without columns that are all padding.

    An empty batch becomes one placeholder row, since models cannot run on zero rows (see `microbatches`).
    """
    if len(batch) == 0:
        ids = torch.zeros((1, 2), dtype=torch.long, device=batch.prompts.device)
        return ids, ids == 0, 1
    P, T = batch.prompt_mask.sum(1).max().item(), batch.response_mask.sum(1).max().item()
    ids = torch.cat([batch.prompts[:, -P:], batch.responses[:, :T]], 1)
    return ids, torch.cat([batch.prompt_mask[:, -P:], batch.response_mask[:, :T]], 1), T


def repeat(values, k):
    """[a, b] -> [a, a, ..., b, b, ...]: one value per prompt -> one per row."""
    return [value for value in values for _ in range(k)]


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


def microbatches(max_tokens, *groups, rows=None):
    """Yield index tensors that together cover `rows` (default: all) once, grouping rows of similar length.

    Row i of every group (one Batch, or chosen and rejected responses) lands in the same micro-batch. A micro-batch has
    at most `max_tokens` tokens, padding included; a longer row gets its own. A loss that is summed over micro-batches
    and divided by a count over the whole batch does not depend on `max_tokens`; only memory and speed do.

    With several processes, each gets its share of the rows, and all get the same number of micro-batches, the last of
    which may be empty: processes that hold parts of one sharded model must run it together.
    """
    prompt_lengths = torch.stack([batch.prompt_mask.sum(1) for batch in groups]).amax(0).tolist()
    lengths = torch.stack([batch.response_mask.sum(1) for batch in groups]).amax(0).tolist()
    rows = range(len(lengths)) if rows is None else rows.tolist()
    rows = sorted(rows, key=lambda row: (lengths[row], prompt_lengths[row]))

    def divide(rows):
        parts, P, T = [[]], 0, 0
        for row in rows:
            P, T = max(P, prompt_lengths[row]), max(T, lengths[row])
            if parts[-1] and (len(parts[-1]) + 1) * (P + T) * len(groups) > max_tokens:
                parts.append([])
                P, T = prompt_lengths[row], lengths[row]
            parts[-1].append(row)
        return parts

    rank, size = rank_and_world_size()
    parts = [divide(rows[other::size]) for other in range(size)]  # of all processes
    for i in range(max(map(len, parts))):
        yield torch.tensor(parts[rank][i] if i < len(parts[rank]) else [], dtype=torch.long)


# -------------------------------------------------------------------------------------------------------------- rollout


def log_softmax(logits, temperature):
    """Log-probs under softmax(logits / temperature), in at least float32."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def rollout(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, at_once=None, greedy=False):
    """`sample` in chunks of at most `at_once` responses per process (default: all at once). Returns: Batch."""
    size = max(1, (at_once or k * len(prompt_ids)) // k) * rank_and_world_size()[1]  # prompts
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

    Each prompt runs through the model once for its k samples, and finished rows leave the batch. With several
    processes, each samples for its slice of the prompts, and all get the whole batch.

    Args: policy (causal LM); tokenizer; prompt_ids (B lists of token ids); k; temperature; max_new_tokens; greedy
    (take the most probable token instead of sampling).
    Returns: Batch of N = B * k rows, prompt-major.
    """
    device = policy.device
    ends = eos_ids(policy, tokenizer).to(device)
    generator = rank_generator(device)
    prompts, prompt_mask = pad(prompt_ids, tokenizer.pad_token_id, "left", device)  # (B, P)
    mine = rank_slice(len(prompts))
    prefill = mine if len(mine) else range(1)  # a process without prompts runs the model too, on one to discard
    output = policy(input_ids=prompts[prefill], attention_mask=prompt_mask[prefill],
                    position_ids=positions(prompt_mask[prefill]), use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(k)
    logits = output.logits[:, -1].repeat_interleave(k, 0)  # (n, V)
    mask = prompt_mask[prefill].repeat_interleave(k, 0)  # (n, P), the context of the n unfinished rows
    prompts, prompt_mask = prompts.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0)  # (N, P)

    N = len(prompts)
    responses = torch.zeros((N, max_new_tokens), dtype=torch.long, device=device)  # (N, T)
    response_mask = torch.zeros((N, max_new_tokens), dtype=torch.bool, device=device)  # (N, T)
    old_logprobs = torch.zeros((N, max_new_tokens), dtype=log_softmax(logits[:1], 1).dtype, device=device)  # (N, T)
    ended = torch.zeros(N, dtype=torch.bool, device=device)  # (N,)
    active = torch.arange(N, device=device)[k * mine.start : k * mine.stop]  # (n,), indices of the unfinished rows
    for t in range(max_new_tokens):
        logprobs = log_softmax(logits, temperature)  # (n, V)
        # The Gumbel-max trick: the argmax of log-probs plus Gumbel noise is a sample from the softmax.
        noise = 0.0 if greedy else -torch.empty_like(logprobs).exponential_(generator=generator).log()
        tokens = (logprobs + noise).argmax(1, keepdim=True)  # (n, 1)
        n = len(active)  # fewer than tokens only when a finished process keeps one row to discard
        responses[active, t] = tokens[:n, 0]
        response_mask[active, t] = True
        old_logprobs[active, t] = logprobs.gather(1, tokens)[:n, 0]
        finished = torch.isin(tokens[:n, 0], ends)  # (n,)
        ended[active[finished]] = True
        if not sum_over_ranks(n - finished.sum().item()) or t + 1 == max_new_tokens:
            break
        if finished.any():
            unfinished = (~finished).nonzero().squeeze(1)
            active = active[unfinished]
            unfinished = unfinished if len(unfinished) else torch.zeros_like(tokens[:1, 0])
            mask, tokens = mask[unfinished], tokens[unfinished]
            cache.batch_select_indices(unfinished)
        mask = F.pad(mask, (0, 1), value=True)  # (n, P + t + 1)
        output = policy(input_ids=tokens, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
    T = t + 1
    responses, response_mask, old_logprobs, ended = map(
        sum_over_ranks, (responses[:, :T], response_mask[:, :T], old_logprobs[:, :T], ended))
    return Batch(prompts, prompt_mask, responses.masked_fill(~response_mask, tokenizer.pad_token_id), response_mask,
                 ended, old_logprobs)


# ----------------------------------------------------------------------------------------------------- log-probs and KL


def token_logprobs(model, batch, temperature):
    """Log-prob of each response token under softmax(logits / temperature), with gradients.

    Returns: (N, T), 0 where masked.
    """
    ids, mask, T = model_inputs(batch)
    # Logits predict the next token, so read from the last prompt position to the second-to-last response position.
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
                   logits_to_keep=T + 1)
    logprobs = log_softmax(output.logits[: len(batch), :-1], temperature)  # (N, T, V)
    logprobs = logprobs.gather(2, batch.responses[:, :T, None]).squeeze(2)  # (N, T)
    logprobs = logprobs.masked_fill(~batch.response_mask[:, :T], 0.0)
    return F.pad(logprobs, (0, batch.responses.shape[1] - T))


@torch.no_grad()
def no_grad_logprobs(model, batch, temperature, max_tokens):
    """`token_logprobs` in micro-batches, without gradients. Returns (N, T)."""
    logprobs = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(max_tokens, batch):
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


def classifier_scores(model, batch):
    """Output of a one-label sequence classifier at each row's last real token, with gradients. Returns (N,).

    The position comes from the mask. transformers itself looks for the last id other than the pad id, which is the
    wrong position if pad and EOS are the same token.
    """
    ids, mask, T = model_inputs(batch)
    output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    last = ids.shape[1] - T + batch.response_mask.sum(1) - 1  # (N,)
    hidden = output.last_hidden_state[torch.arange(len(batch), device=last.device), last]  # (N, hidden)
    return model.score(hidden.to(model.score.weight.dtype)).squeeze(1)


def token_values(critic, batch):
    """A one-label classifier's output at the state before each response token, with gradients.

    The value must not see the action, so V for response token t is read one position earlier (for the first token, at
    the last prompt token). Returns: (N, T), 0 where masked.
    """
    ids, mask, T = model_inputs(batch)
    output = critic.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    hidden = output.last_hidden_state[: len(batch), -T - 1 : -1]  # (N, T, hidden)
    values = critic.score(hidden.to(critic.score.weight.dtype)).squeeze(2)  # (N, T)
    return F.pad(values.masked_fill(~batch.response_mask[:, :T], 0.0), (0, batch.responses.shape[1] - T))


@torch.no_grad()
def no_grad_values(critic, batch, max_tokens):
    """`token_values` in micro-batches, without gradients. Returns (N, T)."""
    values = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(max_tokens, batch):
        values[rows] = token_values(critic, batch[rows]).to(values.dtype)
    return sum_over_ranks(values)


def load_reward(name, tokenizer, device, dtype, max_tokens, shard=False):
    """A function reward(batch, examples) -> (N,), from a classifier or from "path/to/file.py:function".

    A classifier is any one-label AutoModelForSequenceClassification on a causal model. It gets the rollout's token ids
    if it shares the policy's tokenizer; otherwise the text is tokenized again (chat messages with its own chat
    template), with an EOS if the response has one. For functions see plumbing.call_reward.

    `examples` holds the dataset rows (lists of B values) that the N = B * k rows of `batch` belong to.
    """
    if ".py:" in name:
        function = load_function(name)

        return lambda batch, examples: sum_over_ranks(
            call_reward(name, function, examples, decode(tokenizer, batch)).to(device))

    model = load_frozen_classifier(name, device, dtype, shard)
    reward_tokenizer = load_tokenizer(name)
    same_ids = reward_tokenizer.get_vocab() == tokenizer.get_vocab()
    rows_of_embedding = model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def reward(batch, examples):
        # A policy's vocabulary may be padded beyond the tokenizer's, and the extra ids can be sampled.
        if not same_ids or batch.responses.max() >= rows_of_embedding:
            k = len(batch) // len(examples["prompt"])
            prompt_ids = repeat(prompt_tokens(reward_tokenizer, examples["prompt"], f"reward {name}"), k)
            batch = encode(reward_tokenizer, prompt_ids, decode(tokenizer, batch), device, batch.ended.tolist())
        rewards = torch.zeros(len(batch), device=device)  # (N,)
        for rows in microbatches(max_tokens, batch):
            rewards[rows] = classifier_scores(model, batch[rows])
        return sum_over_ranks(rewards)

    return reward


# ----------------------------------------------------------------------------------------------- evaluation and metrics


@torch.no_grad()
def evaluate(policy, reference, tokenizer, reward_fns, dataset, args, k=1, greedy=False, judge=None, opponents=None):
    """Sample k responses to each held-out prompt and score them, without touching training's random state.

    Args: policy and reference (causal LMs); reward_fns (see runs.load_rewards); dataset (see load_rows); args
    (temperature, max_new_tokens, microbatch_tokens, eval_batch_size, seed); judge (name of the reward function that
    decides the win rate; default: the last); opponents (N texts to compare with, and N bools: whether each ended;
    default: the dataset's completion column, if there is one).
    Returns: (values, completions): dict name -> (N,) floats on the CPU, and the N responses as text, prompt-major.
    """
    if opponents is None and "completion" in dataset.column_names:
        opponents = repeat(dataset["completion"][:], k), [True] * len(dataset) * k
    values, completions, judge = {}, [], judge or list(reward_fns)[-1]
    with isolated_rng(args.seed):
        size = max(1, args.eval_batch_size // k)
        for start in range(0, len(dataset), size):
            examples = dataset[start : start + size]
            batch = sample(policy, tokenizer, examples["prompt_ids"], k, args.temperature, args.max_new_tokens, greedy)
            ref_logprobs = no_grad_logprobs(reference, batch, args.temperature, args.microbatch_tokens)  # (n, T)
            found = {}  # name -> (n,)
            for reward_fn in reward_fns.values():
                found |= reward_fn(batch, examples)
            if opponents:
                texts, ended = (part[len(completions) :][: len(batch)] for part in opponents)
                others = encode(tokenizer, repeat(examples["prompt_ids"], k), texts, policy.device, ended)
                found["win_rate"] = wins(found[judge], reward_fns[judge](others, examples)[judge])
            found["kl"] = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask).sum(1)
            found["length"] = batch.response_mask.sum(1)
            found["eos_rate"] = batch.ended
            for name, value in found.items():
                values.setdefault(name, []).append(value.float().cpu())
            completions += decode(tokenizer, batch)
    return {name: torch.cat(parts) for name, parts in values.items()}, completions


def wins(scores, other_scores):
    """1 where the first score is higher, 0 where it is lower, 1/2 for ties. Returns (N,)."""
    return (torch.sign(scores - other_scores) + 1) / 2


def rollout_metrics(batch, parts, scores, kl, rewards, k):
    """Metrics that every algorithm logs about a rollout: means over its N responses or its B prompts.

    Args: batch; parts (dict name -> (N,), the rewards that make up the scores); scores (N,); kl (N, T); rewards (N,),
    or (N, T), summed here; k.
    """
    groups = scores.view(-1, k)  # (B, k)
    return {f"objective/{name}": part.mean() for name, part in parts.items() if name != "score"} | {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/kl": kl.sum(1).mean(),
        "objective/rewards": rewards.view(len(batch), -1).sum(1).mean(),
        "objective/frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
        "objective/entropy": -batch.old_logprobs.sum(1).mean(),
        "rollout/length": batch.response_mask.sum(1).float().mean(),
        "rollout/eos_rate": batch.ended.float().mean(),
    }
