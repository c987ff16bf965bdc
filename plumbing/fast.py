"""The passes of common.py sooner, with the same numbers. Not needed to understand an algorithm.

- Rows with the same prompt share its pass through the model, and continue from its keys and
  values.
- While sampling, the cache has room for every token to come, and finished rows leave the batch.
- A micro-batch holds rows of similar length, and siblings (rows with the same prompt) stay
  together.

What is chosen from the logits, and what is read from them, is passed in by common.py, which has the
plain form of each pass. tests/test_shared_prompts.py compares the two; --plain forces the plain
one.
"""

import copy

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

LEAVE = 1 / 8  # of the rows finished: then they leave, since it takes a copy of the others' cache
SIMILAR = 3 / 4  # of the longest row's length: rows that run together after their prompts
COPY = 1 / 8  # of a token's pass: what a copy of a prompt token's keys and values counts


def fits(model):
    """Whether a model can be run like this. plumbing/tryout.py finds out."""
    return getattr(model, "is_fast", False)


def samples(model):
    """Whether it can also be sampled from like this: a sharded one needs all processes in step."""
    return fits(model) and not getattr(model, "is_sharded", False)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def prompt_numbers(batch):
    """Which prompt each row has: equal numbers for equal prompts, from 0. Returns (N,)."""
    prompts = batch.prompts.masked_fill(~batch.prompt_mask, -1)
    return prompts.unique(dim=0, return_inverse=True)[1]


# ------------------------------------------------------------------------------------ micro-batches


def divide(model, max_tokens, groups, rows):
    """Divide row numbers into parts of at most `max_tokens` tokens with padding, or of one row.

    A prompt that the model runs once for several rows counts once, and COPY for each further copy
    of its keys and values.

    Args: model; max_tokens; groups (Batches whose rows i belong together); rows (n,). Returns: list
    of index tensors.
    """
    longest = lambda masks: torch.stack([mask.sum(1) for mask in masks]).amax(0).tolist()
    prompt_lengths = longest([batch.prompt_mask for batch in groups])
    lengths = longest([batch.response_mask for batch in groups])
    prompts = prompt_numbers(groups[0]).tolist()
    sizes = dict(sorted(zip(prompts, zip(lengths, prompt_lengths))))  # the longest row's, by prompt

    def tokens(part):
        P, T = (max(numbers[row] for row in part) for numbers in (prompt_lengths, lengths))
        B = len({prompts[row] for row in part}) if model.shares_prompts else len(part)
        return (B * P + len(part) * T + int((len(part) - B) * P * COPY)) * len(groups)

    parts = [[]]
    place = lambda row: (sizes[prompts[row]], prompts[row], lengths[row])
    for row in sorted(rows.tolist(), key=place):
        if parts[-1] and tokens([*parts[-1], row]) > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part, dtype=torch.long) for part in parts]


# ----------------------------------------------------------------------------------------- sampling


def sample(policy, prompts, prompt_mask, k, ends, max_new_tokens, choose):
    """Sample a response for each row; the k rows of a prompt share its pass through the model.

    Args: policy; prompts, prompt_mask (N, P), N = B * k, prompt-major; k; ends (ids that end a
    response); max_new_tokens; choose (function (logits (n, V), rows (n,)) -> tokens (n,) and their
    log-probs (n,)).
    Returns: responses, response_mask (N, T), ended (N,), logprobs (N, T).
    """
    device, N = prompts.device, len(prompts)
    responses = torch.zeros((N, max_new_tokens), dtype=torch.long, device=device)  # (N, T)
    response_mask = torch.zeros_like(responses, dtype=torch.bool)  # (N, T)
    ended = torch.zeros(N, dtype=torch.bool, device=device)  # (N,)
    active = torch.arange(N, device=device)  # (n,), the rows in the cache
    finished = torch.zeros_like(ended)  # (n,)
    with torch.autocast(device.type, enabled=False):  # keeps what the model's own casts to the end
        mask = prompt_mask[::k]  # (B, P)
        output = policy(input_ids=prompts[::k], attention_mask=mask, position_ids=positions(mask),
                        use_cache=True, logits_to_keep=1)
        cache = select_rows(with_room(output.past_key_values, max_new_tokens), active // k)
        mask = prompt_mask  # (n, P)
        logits = output.logits[active // k, -1]  # (n, V)
        logprobs = logits.new_zeros(N, max_new_tokens, dtype=torch.promote_types(
            logits.dtype, torch.float32))  # (N, T)
        for t in range(max_new_tokens):
            tokens, chosen = choose(logits, active)  # (n,)
            rows = active[~finished]
            responses[rows, t], logprobs[rows, t] = tokens[~finished], chosen[~finished]
            response_mask[rows, t] = True
            finished = finished | torch.isin(tokens, ends)
            ended[active] = finished
            if finished.all() or t + 1 == max_new_tokens:
                break
            if finished.sum() > len(active) * LEAVE:
                stay = (~finished).nonzero().squeeze(1)
                cache, active, mask = select_rows(cache, stay), active[stay], mask[stay]
                finished, tokens = finished[stay], tokens[stay]
            mask = F.pad(mask, (0, 1), value=True)  # (n, P + t + 1)
            output = policy(input_ids=tokens.unsqueeze(1), attention_mask=mask,
                            position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache,
                            use_cache=True)
            logits = output.logits[:, -1]
    return responses[:, : t + 1], response_mask[:, : t + 1], ended, logprobs[:, : t + 1]


# --------------------------------------------------------------------------- numbers for each token


def token_numbers(model, batch, pick):
    """`pick` (function (logits (n, t, V), tokens (n, t)) -> (n, t)) for each response token.

    Returns: (N, T), with gradients; arbitrary where masked.
    """
    def run(keep, **inputs):
        output = model(**inputs, logits_to_keep=keep)
        return output.logits, output.past_key_values

    return at_responses(model, batch, run, pick)


def classifier_numbers(model, batch, last):
    """As common.classifier_outputs, with gradients: (N, T), or (N, 1 + T) with the last."""
    def run(keep, **inputs):
        output = model.base_model(**inputs)
        hidden = output.last_hidden_state[:, -keep:].to(model.score.weight.dtype)
        return model.score(hidden), output.past_key_values  # (n, keep, 1)

    return at_responses(model, batch, run, lambda outputs, _: outputs.squeeze(2), last)


def at_responses(model, batch, run, pick, last=False):
    """A number for the last prompt token and for each response token, with gradients.

    Rows with the same prompt share its pass and continue from its keys and values, rows of similar
    length together. If no two rows do, or the model can't (with --shard, where all processes must
    make the same passes, and --gradient-checkpointing, which would fill the cache twice), each row
    is one pass, without the columns that are padding in all rows.

    Args: model; batch; run (function (keep, **inputs) -> outputs at the last `keep` tokens (n,
    keep, D), and the cache); pick (function (outputs (n, t, D), the tokens that follow (n, t)) ->
    (n, t)); last (whether the last response token gets a number too). Returns: (N, T), or (N, 1 +
    T) with the last; arbitrary where masked.
    """
    width = batch.responses.shape[1] + last
    lengths = batch.response_mask.sum(1) + int(last) - 1  # (N,), response tokens that are read
    P = max([1, *batch.prompt_mask.sum(1).tolist()])
    T = max([0, *lengths.tolist()])
    ids = torch.cat([batch.prompts[:, -P:], batch.responses[:, :T]], 1)  # (N, P + T)
    mask = torch.cat([batch.prompt_mask[:, -P:], batch.response_mask[:, :T]], 1)  # (N, P + T)
    numbers = prompt_numbers(batch)  # (N,)
    rows = torch.arange(len(batch), device=numbers.device)
    first = torch.zeros_like(numbers.unique()).scatter(0, numbers, rows)  # (B,), one row of each
    if len(first) == len(batch) or not model.shares_prompts:
        output, _ = run(T + 1, input_ids=ids, attention_mask=mask, position_ids=positions(mask),
                        use_cache=False)
        return F.pad(pick(output, batch.responses[:, : T + 1]), (0, width - 1 - T))

    prompt_mask = mask[first, :P]  # (B, P)
    output, cache = run(1, input_ids=ids[first, :P], attention_mask=prompt_mask,
                        position_ids=positions(prompt_mask), use_cache=True)
    found = [F.pad(pick(output[numbers], batch.responses[:, :1]), (0, width - 1))]  # of (N, width)
    order = lengths.argsort(descending=True)
    while len(order) and (t := lengths[order[0]].item()) > 0:
        similar = (lengths[order] > SIMILAR * t).sum()
        rows, order = order[:similar], order[similar:]
        row_mask = mask[rows, : P + t]  # (n, P + t)
        output, _ = run(t, input_ids=ids[rows, P : P + t], attention_mask=row_mask,
                        position_ids=positions(row_mask)[:, P:],
                        past_key_values=select_rows(cache, numbers[rows]))
        part = F.pad(pick(output, batch.responses[rows, 1 : 1 + t]), (1, width - 1 - t))
        found.append(torch.zeros_like(found[0]).index_copy(0, rows, part))
    return sum(found)


# ---------------------------------------------------------------------------------- keys and values


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, with room for more tokens: each step writes only its own."""

    def __init__(self, layer, room):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys = layer.keys.to(layer.values.dtype)  # which autocast does at each token
        self.values = layer.values
        self.buffers = [F.pad(states, (0, 0, 0, room)) for states in (self.keys, self.values)]

    def update(self, keys, values, *args, **kwargs):
        start, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        for buffer, states in zip(self.buffers, (keys, values)):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def with_room(cache, room):
    """A cache with room for so many more tokens in the layers that keep all of them."""
    cache.layers = [layer if layer.is_sliding else RoomyLayer(layer, room)
                    for layer in cache.layers]
    return cache


def select_rows(cache, rows):
    """A copy of a cache with the given rows, differentiable."""
    # As flat rows: several times as fast as states[rows], and backward too.
    select = lambda states: states.flatten(1).index_select(0, rows).unflatten(1, states.shape[1:])
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        if isinstance(layer, RoomyLayer):
            layer.buffers = [select(states) for states in layer.buffers]
            layer.keys, layer.values = (states[:, :, : layer.keys.shape[2]]
                                        for states in layer.buffers)
        else:
            layer.keys, layer.values = select(layer.keys), select(layer.values)
    return part
