"""What every script of this project shares. No estimator and no policy loss lives here: those are the scripts' own.

What a training step is made of, in the order in which it uses it: rows of tokens, rollout, log-probs and KL, reward
scoring, evaluation and metrics. What has nothing to do with RL (loading models and data, run folders, error messages)
is in plumbing.py. Names and shapes are the same everywhere:

    B prompts, k samples for each, N = B * k rows; row = prompt * k + sample ("prompt-major")
    P prompt tokens (padded on the left), T response tokens (padded on the right), V words in the vocabulary
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from plumbing import (add_up, as_replies, as_text, check_positions, load_frozen_classifier, load_function, load_module,
                      load_tokenizer, one_line, own_generator, own_randomness, processes, prompt_tokens, require, share,
                      stop, table, total)


# ------------------------------------------------------------------------------------------------------- rows of tokens


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


def pad(rows, pad_id, side, device):
    """Lists of ids -> ids (N, L) and bool mask (N, L), padded on the "left" or "right"."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def encode(tokenizer, prompt_ids, completions, device, ended=True):
    """Batch of given texts, as if they had been sampled: a completion gets an EOS where `ended` (bool or N bools).

    Args: tokenizer; prompt_ids (N lists of token ids); completions (N str); device; ended.
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


def join(batch):
    """Each row's prompt and response in one: ids and mask (N, P + T), and T; without the columns that all rows pad.

    No rows become one placeholder, since models cannot run on nothing (see `microbatches`): use only the first N.
    """
    if len(batch) == 0:
        ids = torch.zeros((1, 2), dtype=torch.long, device=batch.prompts.device)
        return ids, ids == 0, 1
    P, T = batch.prompt_mask.sum(1).max().item(), batch.response_mask.sum(1).max().item()
    ids = torch.cat([batch.prompts[:, -P:], batch.responses[:, :T]], 1)
    return ids, torch.cat([batch.prompt_mask[:, -P:], batch.response_mask[:, :T]], 1), T


def repeat(values, k):
    """[a, b] -> [a, a, ..., b, b, ...]: what belongs to B prompts, for the N = B * k rows."""
    return [value for value in values for _ in range(k)]


def positions(mask):
    """Position ids (N, L) that count real tokens only: left padding must not shift a prompt."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def minibatches(n, epochs, count):
    """Yield index tensors: `epochs` times the numbers 0 ... n - 1, each time in a new order and in `count` parts.

    The parts differ by one row at most. A single part needs no new order, and draws no random numbers.
    """
    for _ in range(epochs):
        rows = torch.randperm(n) if count > 1 else torch.arange(n)
        yield from rows.tensor_split(count)


def microbatches(max_tokens, *groups, rows=None):
    """Yield index tensors that together cover `rows` (by default all) once, rows of like length together.

    Row i of every group goes together (one Batch; or two, of chosen and rejected responses). A micro-batch has at most
    `max_tokens` tokens, padding included; a single row that is longer comes alone. What is summed over micro-batches
    and divided by the whole batch's count does not depend on `max_tokens`: only memory and time do.

    Of several processes each gets its share of the rows, and all get equally many micro-batches, the last perhaps
    empty: the processes that hold a model's pieces (--shard) must run it together.
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

    rank, size = processes()
    shares = [divide(rows[other::size]) for other in range(size)]
    for i in range(max(map(len, shares))):
        yield torch.tensor(shares[rank][i] if i < len(shares[rank]) else [], dtype=torch.long)


# -------------------------------------------------------------------------------------------------------------- rollout


def eos_ids(policy, tokenizer):
    """Every token id that ends a response: the tokenizer's EOS and those of the model's generation config."""
    config = getattr(policy, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    more = more if isinstance(more, list) else [] if more is None else [more]
    return torch.tensor(sorted({tokenizer.eos_token_id, *more}))


def log_softmax(logits, temperature):
    """Log-probs of softmax(logits / temperature), in float32 at least."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def rollout(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, at_once=None, greedy=False):
    """Like `sample`, in parts: at most `at_once` responses (by default all) in each process at a time.

    Returns: Batch of N = B * k rows, prompt-major.
    """
    size = max(1, (at_once or k * len(prompt_ids)) // k) * processes()[1]  # prompts
    parts = [sample(policy, tokenizer, prompt_ids[i : i + size], k, temperature, max_new_tokens, greedy)
             for i in range(0, len(prompt_ids), size)]
    return concatenate(parts, tokenizer.pad_token_id)


def concatenate(batches, pad_id):
    """One Batch of several, padded to the longest prompt and response."""
    P, T = max(batch.prompts.shape[1] for batch in batches), max(batch.responses.shape[1] for batch in batches)
    left = lambda name, value: torch.cat([F.pad(x, (P - x.shape[1], 0), value=value)
                                          for x in (getattr(batch, name) for batch in batches)])
    right = lambda name, value: torch.cat([F.pad(x, (0, T - x.shape[1]), value=value)
                                           for x in (getattr(batch, name) for batch in batches)])
    return Batch(left("prompts", pad_id), left("prompt_mask", False), right("responses", pad_id),
                 right("response_mask", False), torch.cat([batch.ended for batch in batches]), right("old_logprobs", 0))


@torch.no_grad()
def sample(policy, tokenizer, prompt_ids, k, temperature, max_new_tokens, greedy=False):
    """Sample k responses for each prompt from exactly softmax(logits / temperature): no top-k, no top-p.

    The prompt runs through the model once for its k samples, and rows that have ended leave the batch. Of several
    processes each samples for its share of the prompts, and all get the whole batch.

    Args: policy (causal LM); tokenizer; prompt_ids (B lists of token ids); k; temperature; max_new_tokens; greedy
    (take the most probable token instead of a sample).
    Returns: Batch of N = B * k rows, prompt-major.
    """
    device = policy.device
    ends = eos_ids(policy, tokenizer).to(device)
    generator = own_generator(device)
    prompts, prompt_mask = pad(prompt_ids, tokenizer.pad_token_id, "left", device)  # (B, P)
    mine = share(len(prompts))
    fed = mine if len(mine) else range(1)  # a process without prompts runs the model on one that it throws away
    output = policy(input_ids=prompts[fed], attention_mask=prompt_mask[fed], position_ids=positions(prompt_mask[fed]),
                    use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(k)
    logits = output.logits[:, -1].repeat_interleave(k, 0)  # (n, V)
    mask = prompt_mask[fed].repeat_interleave(k, 0)  # (n, P), the context of the n rows still being written
    prompts, prompt_mask = prompts.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0)  # (N, P)

    N = len(prompts)
    responses = torch.zeros((N, max_new_tokens), dtype=torch.long, device=device)  # (N, T)
    response_mask = torch.zeros((N, max_new_tokens), dtype=torch.bool, device=device)  # (N, T)
    old_logprobs = torch.zeros((N, max_new_tokens), dtype=log_softmax(logits[:1], 1).dtype, device=device)  # (N, T)
    ended = torch.zeros(N, dtype=torch.bool, device=device)  # (N,)
    alive = torch.arange(N, device=device)[k * mine.start : k * mine.stop]  # (n,), the numbers of these rows
    for t in range(max_new_tokens):
        logprobs = log_softmax(logits, temperature)  # (n, V)
        # The Gumbel-max trick: the argmax of log-probs plus Gumbel noise is a sample from the softmax.
        noise = 0.0 if greedy else -torch.empty_like(logprobs).exponential_(generator=generator).log()
        tokens = (logprobs + noise).argmax(1, keepdim=True)  # (n, 1)
        n = len(alive)  # fewer than there are tokens only where a finished process keeps one row to run the model on
        responses[alive, t] = tokens[:n, 0]
        response_mask[alive, t] = True
        old_logprobs[alive, t] = logprobs.gather(1, tokens)[:n, 0]
        over = torch.isin(tokens[:n, 0], ends)  # (n,)
        ended[alive[over]] = True
        if not total(n - over.sum().item()) or t + 1 == max_new_tokens:
            break
        if over.any():
            going = (~over).nonzero().squeeze(1)
            alive = alive[going]
            going = going if len(going) else torch.zeros_like(tokens[:1, 0])
            mask, tokens = mask[going], tokens[going]
            cache.batch_select_indices(going)
        mask = F.pad(mask, (0, 1), value=True)  # (n, P + t + 1)
        output = policy(input_ids=tokens, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
    T = t + 1
    responses, response_mask, old_logprobs, ended = map(
        add_up, (responses[:, :T], response_mask[:, :T], old_logprobs[:, :T], ended))
    return Batch(prompts, prompt_mask, responses.masked_fill(~response_mask, tokenizer.pad_token_id), response_mask,
                 ended, old_logprobs)


# ----------------------------------------------------------------------------------------------------- log-probs and KL


def token_logprobs(model, batch, temperature):
    """Log-prob of each response token under softmax(logits / temperature), with gradients.

    Returns: (N, T), 0 where masked.
    """
    ids, mask, T = join(batch)
    # The logits at a position predict the next token: the last prompt position up to the last but one of the response.
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
                   logits_to_keep=T + 1)
    logprobs = log_softmax(output.logits[: len(batch), :-1], temperature)  # (N, T, V)
    logprobs = logprobs.gather(2, batch.responses[:, :T, None]).squeeze(2)  # (N, T)
    logprobs = logprobs.masked_fill(~batch.response_mask[:, :T], 0.0)
    return F.pad(logprobs, (0, batch.responses.shape[1] - T))


@torch.no_grad()
def frozen_logprobs(model, batch, temperature, max_tokens):
    """`token_logprobs` of a model that is not being trained, in micro-batches, without gradients. Returns (N, T)."""
    logprobs = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(max_tokens, batch):
        logprobs[rows] = token_logprobs(model, batch[rows], temperature).to(logprobs.dtype)
    return add_up(logprobs)


def token_kl(logprobs, ref_logprobs, response_mask):
    """Per-token estimate k1 = log pi - log pi_ref of KL(pi || pi_ref), for tokens sampled from pi. Returns (N, T).

    Unbiased, and the one that belongs in a reward: its expected gradient there is that of the KL. Single values, and
    means of small batches, are often negative. (Schulman 2020, "Approximating KL divergence")
    """
    return (logprobs - ref_logprobs) * response_mask


def sequence_rewards(scores, kl, beta):
    """R(x, y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)), one per response (Ahmadian et al. 2024, section 2).

    Args: scores (N,); kl (N, T); beta. Returns: (N,).
    """
    return scores - beta * kl.sum(1)


def token_rewards(scores, kl, beta, response_mask):
    """r_t = -beta * kl_t, plus the score on the last token of the response, EOS where there is one.

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

    The position comes from the mask. transformers itself looks for the last id that is not the pad id, which is the
    wrong one where pad and EOS are the same.
    """
    ids, mask, T = join(batch)
    output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    last = ids.shape[1] - T + batch.response_mask.sum(1) - 1  # (N,)
    hidden = output.last_hidden_state[torch.arange(len(batch), device=last.device), last]  # (N, hidden)
    return model.score(hidden.to(model.score.weight.dtype)).squeeze(1)


def token_values(critic, batch):
    """A one-label classifier's output at the state before each response token, with gradients.

    The value of a state must not see the action: V of response token t is read at the position before it, the last
    prompt token for the first one. Returns: (N, T), 0 where masked.
    """
    ids, mask, T = join(batch)
    output = critic.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    hidden = output.last_hidden_state[: len(batch), -T - 1 : -1]  # (N, T, hidden)
    values = critic.score(hidden.to(critic.score.weight.dtype)).squeeze(2)  # (N, T)
    return F.pad(values.masked_fill(~batch.response_mask[:, :T], 0.0), (0, batch.responses.shape[1] - T))


@torch.no_grad()
def frozen_values(critic, batch, max_tokens):
    """`token_values` in micro-batches, without gradients. Returns (N, T)."""
    values = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(max_tokens, batch):
        values[rows] = token_values(critic, batch[rows]).to(values.dtype)
    return add_up(values)


def load_reward(name, tokenizer, device, dtype, max_tokens, shard=False):
    """A function reward(batch, columns) -> (N,) from a classifier or from "path/to/file.py:function".

    A classifier is any one-label AutoModelForSequenceClassification on a causal model. It is given the very ids of the
    rollout where its tokenizer is the policy's, and the text encoded anew (chat messages with its own chat template),
    with an EOS where the response has one, where it is not.

    A python function is called as TRL does: function(prompts=..., completions=..., **columns), where columns are the
    dataset's other columns, each a list with one value per completion; it returns that many numbers. Completions are
    texts, or for a chat prompt lists of one message.

    `columns` holds the dataset's rows (lists of B values) that the N = B * k rows of `batch` belong to.
    """
    if ".py:" in name:
        function = load_function(name)

        def reward(batch, columns):
            k = len(batch) // len(columns["prompt"])
            mine = share(len(columns["prompt"]))
            own = {key: repeat(values[mine.start : mine.stop], k) for key, values in columns.items()}
            own["prompts"] = own.pop("prompt")
            own.pop("prompt_ids", None), own.pop("num_tokens", None)  # these are ours, not the dataset's
            rows = slice(k * mine.start, k * mine.stop)
            own["completions"] = as_replies(own["prompts"], decode(tokenizer, batch[rows]))
            rewards = torch.zeros(len(batch), device=device)  # (N,)
            rewards[rows] = torch.tensor(call(name, function, own))
            return add_up(rewards)

        return reward

    model = load_frozen_classifier(name, device, dtype, shard)
    reward_tokenizer = load_tokenizer(name)
    same_ids = reward_tokenizer.get_vocab() == tokenizer.get_vocab()
    rows_of_embedding = model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def reward(batch, columns):
        # A policy's vocabulary may be padded to more ids than the tokenizer has words, and they can be sampled.
        if not same_ids or batch.responses.max() >= rows_of_embedding:
            k = len(batch) // len(columns["prompt"])
            prompt_ids = repeat(prompt_tokens(reward_tokenizer, columns["prompt"], f"reward {name}"), k)
            batch = encode(reward_tokenizer, prompt_ids, decode(tokenizer, batch), device, batch.ended.tolist())
        rewards = torch.zeros(len(batch), device=device)  # (N,)
        for rows in microbatches(max_tokens, batch):
            rewards[rows] = classifier_scores(model, batch[rows])
        return add_up(rewards)

    return reward


def call(name, function, columns):
    """The values of a python reward function, one for each completion; stop in one line where it does not work."""
    if not columns["completions"]:
        return []
    try:
        values = [float(value) for value in function(**columns)]
    except Exception as error:
        stop(f"reward {name}: raised {type(error).__name__}: {one_line(error)}")
    count = len(columns["completions"])
    require(len(values) == count, f"reward {name}: returned {len(values)} values for {count} completions")
    odd = [value for value in values if not abs(value) < torch.finfo(torch.float32).max]
    require(not odd, f"reward {name}: returned {odd[:1]}; every value must be a finite number")
    return values


def find_gold(gold, dataset):
    """What --gold means: "auto" is the function gold_reward of the python file that --dataset names, if it has one."""
    path = dataset.rpartition(":")[0]
    if gold == "auto" and path.endswith(".py") and hasattr(load_module(path), "gold_reward"):
        return f"{path}:gold_reward"
    return None if gold in ("auto", "none") else gold


def load_measures(args, tokenizer, device):
    """The rewards of a run: "score", which is trained on, and "gold", only measured, where there is one.

    Each is a function measure(batch, columns) -> dict name -> (N,). Where --reward gives several, that of "score" also
    holds each of them, as "reward/<its name>"; "score" is their sum, weighted by --reward-weights.

    Args: args (reward, reward_weights, gold, dataset, dtype, shard, microbatch_tokens); tokenizer (the policy's);
    device.
    """
    load = lambda name: load_reward(name, tokenizer, device, args.dtype, args.microbatch_tokens, args.shard)
    weights = args.reward_weights or [1.0] * len(args.reward)
    require(len(weights) == len(args.reward),
            f"--reward-weights: has {len(weights)} numbers for {len(args.reward)} rewards; give one for each")
    names = [Path(name).name.rpartition(":")[2] for name in args.reward]
    names = [short if names.count(short) == 1 else full for short, full in zip(names, args.reward)]
    require(len(set(names)) == len(names), f"--reward: names {args.reward[0]} twice; give it a weight instead")
    functions = [load(name) for name in args.reward]

    def score(batch, columns):
        parts = [function(batch, columns) for function in functions]  # of (N,) each
        named = {f"reward/{name}": part for name, part in zip(names, parts)} if len(parts) > 1 else {}
        return {"score": sum(weight * part for weight, part in zip(weights, parts)), **named}

    gold = find_gold(args.gold, args.dataset)
    gold = gold and load(gold)
    return {"score": score} | ({"gold": lambda batch, columns: {"gold": gold(batch, columns)}} if gold else {})


# ----------------------------------------------------------------------------------------------- evaluation and metrics


@torch.no_grad()
def evaluate(policy, reference, tokenizer, measures, dataset, args, k=1, greedy=False, judge=None, rivals=None):
    """Sample k responses to each held-out prompt and measure them. Leaves the training's random numbers alone.

    Args: policy and reference (causal LMs); measures (see load_measures); dataset (rows of load_rows); args
    (temperature, max_new_tokens, microbatch_tokens, eval_batch_size, seed); judge (name of the measure that decides
    the win rate; by default the last); rivals (N texts to win against, and for each whether it ended; by default the
    dataset's completion column, if there is one).
    Returns: (values, completions): dict name -> (N,) floats on the CPU, and the N responses as text, prompt-major.
    """
    if rivals is None and "completion" in dataset.column_names:
        rivals = repeat(dataset["completion"][:], k), [True] * len(dataset) * k
    values, completions, judge = {}, [], judge or list(measures)[-1]
    with own_randomness(args.seed):
        size = max(1, args.eval_batch_size // k)
        for start in range(0, len(dataset), size):
            columns = dataset[start : start + size]
            batch = sample(policy, tokenizer, columns["prompt_ids"], k, args.temperature, args.max_new_tokens, greedy)
            ref_logprobs = frozen_logprobs(reference, batch, args.temperature, args.microbatch_tokens)  # (n, T)
            found = {}  # name -> (n,)
            for measure in measures.values():
                found |= measure(batch, columns)
            if rivals:
                texts, ended = (part[len(completions) :][: len(batch)] for part in rivals)
                others = encode(tokenizer, repeat(columns["prompt_ids"], k), texts, policy.device, ended)
                found["win_rate"] = wins(found[judge], measures[judge](others, columns)[judge])
            found["kl"] = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask).sum(1)
            found["length"] = batch.response_mask.sum(1)
            found["eos_rate"] = batch.ended
            for name, value in found.items():
                values.setdefault(name, []).append(value.float().cpu())
            completions += decode(tokenizer, batch)
    return {name: torch.cat(parts) for name, parts in values.items()}, completions


def wins(scores, other_scores):
    """1 where the first is better, 0 where it is worse, 1/2 where they are equal. Returns (N,)."""
    return (torch.sign(scores - other_scores) + 1) / 2


def rehearse(policy, tokenizer, datasets, measures, args):
    """Stop before the run starts where it would stop later: a prompt too long for the model, a reward that fails.

    Args: policy; tokenizer; datasets (list of rows of load_rows); measures (see load_measures); args (max_new_tokens,
    and lr, if there is one: a warning tells where it is that of the embedded tasks and the model is not).
    """
    size = sum(parameter.numel() for parameter in policy.parameters())
    if size > 20e6 and getattr(args, "lr", 0) > 1e-4 and processes()[0] == 0:
        print(f"warning: --lr {args.lr} is for tiny models; with {size / 1e6:.0f} million parameters, try 1e-6 to 1e-5")
    check_positions(policy, max(max(dataset["num_tokens"]) for dataset in datasets) + args.max_new_tokens)
    columns = datasets[0][:2]
    texts = columns.get("completion", [as_text(prompt) for prompt in columns["prompt"]])
    for measure in measures.values():
        measure(encode(tokenizer, columns["prompt_ids"], texts, policy.device), columns)


def rollout_metrics(batch, parts, scores, kl, rewards, k):
    """What every algorithm logs about a rollout: means over its N responses, and over its B prompts."""
    groups = scores.view(-1, k)  # (B, k)
    return {f"objective/{name}": part.mean() for name, part in parts.items() if name != "score"} | {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/kl": kl.sum(1).mean(),
        "objective/rewards": rewards.mean(),
        "objective/frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
        "objective/entropy": -batch.old_logprobs.sum(1).mean(),
        "rollout/length": batch.response_mask.sum(1).float().mean(),
        "rollout/eos_rate": batch.ended.float().mean(),
    }


def log_samples(writer, step, columns, tokenizer, batch, scores, kl, advantages, rows=8):
    """The first responses of a rollout, for TensorBoard's text tab."""
    if not writer:
        return
    prompts = map(as_text, repeat(columns["prompt"], len(batch) // len(columns["prompt"])))
    numbers = [[f"{value:.2f}" for value in row.tolist()] for row in torch.stack([scores, kl.sum(1), advantages], 1)]
    cells = [[p, c, *n] for p, c, n in zip(prompts, decode(tokenizer, batch[:rows]), numbers)]
    writer.add_text("samples", table(["prompt", "response", "score", "KL", "advantage"], cells), step)
