"""What a model can do is asked of the model, on two short rows, rather than told by its name.

Asked when it is loaded, in float32, before autocast and sharding, so that rounding cannot pass for
a difference. No random number is drawn.
"""

import functools

import torch

from plumbing import fast
from plumbing.errors import one_line, require, stop
from plumbing.processes import everywhere, is_first, pick_threads

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1],
                     [0, 0, 1, 1, 1, 1, 1, 0]]).bool()  # (2, L): prompts and responses of two rows
PROMPT = 5  # the tokens of MASK, with padding, that are the prompt's


def outputs(model, ids, mask, positions, **kwargs):
    """What a causal LM (its logits) or a classifier's body says at each token.

    Args: model; ids, mask, positions (n, L); kwargs (for the model). Returns: (n, L, D), and all
    that the model returns.
    """
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions) | kwargs
    if hasattr(model, "score"):
        output = model.base_model(**inputs)
        return output.last_hidden_state, output
    output = model(**inputs, logits_to_keep=ids.shape[1])
    return output.logits, output


def agree(found, expected, power=1 / 2):
    """Whether two tensors differ by at most eps ** power of the largest number.

    In float32 that is 0.03%, and with power 2/3 0.002%. What another order of sums does is less:
    2e-6 in tiny models; an ignored position does more than 10%.
    """
    tolerance = max(torch.finfo(torch.float32).eps, torch.finfo(expected.dtype).eps) ** power
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@torch.no_grad()
def ask(name, model, tokenizer, plain=False):
    """Exit with one line if a model is not causal, or if padding changes what it says of a row.

    Sets what the passes need to know: model.keeps_cache (whether the sampler can continue a row
    from the model's cache), model.is_fast (whether plumbing/fast.py fits; not with `plain`) and
    model.longest (tokens of the longest row; None without a limit).

    Args: name; model (a causal LM, or a classifier with a head called `score`); tokenizer; plain.
    """
    ids, mask = some_ids(model, tokenizer), MASK.to(model.device)  # (2, L)
    positions = fast.positions(mask)  # (2, L)
    try:
        padded, _ = outputs(model, ids, mask, positions, use_cache=False)  # (2, L, D)
        alone = [read_alone(model, row[keep]) for row, keep in zip(ids, mask)]  # of (tokens, D)
        prompt = read_alone(model, ids[0, :PROMPT])  # (PROMPT, D)
    except Exception as error:
        stop(f"model {name}: cannot run as a causal language model ({type(error).__name__}: "
             f"{one_line(error)}); use a decoder-only model, such as Llama or Qwen")
    require(agree(prompt, alone[0][:PROMPT]),
            f"model {name}: a later token changes what {type(model).__name__} says of earlier ones,"
            " so it is an encoder, not a causal model; use a decoder-only one")
    require(agree(padded[mask], torch.cat(alone)),
            f"model {name}: padding changes what {type(model).__name__} says of a row (it does not "
            "follow position_ids or attention_mask), so log-probs would be wrong; use a model that "
            "does, such as Llama, Qwen or GPT-2")
    # In step, since the plain sampler and the fast one would wait for each other.
    model.keeps_cache = everywhere(continues(model, ids, mask, padded))
    fits = model.keeps_cache and everywhere(continues(model, ids, mask, padded, copied=True))
    model.is_fast, model.longest = fits and not plain, longest_row(model, ids[:1, :PROMPT])
    if not (fits or plain):
        say(f"model {name}: runs in the plain form of common.py, which is slower, since its cache "
            + ("cannot be copied for the responses to a prompt" if model.keeps_cache else
               "does not give the same numbers: each new token takes a pass over the whole row"))


def some_ids(model, tokenizer):
    """Token ids in the shape of MASK: words of the vocabulary, none of the special ones."""
    rows = model.get_input_embeddings().num_embeddings
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = [word for word in range(min(rows, len(tokenizer))) if word not in special] or [0]
    places = torch.arange(MASK.numel()) * len(words) // MASK.numel()
    return torch.tensor(words)[places].view(MASK.shape).to(model.device)


def read_alone(model, row):
    """What a model says at each token of one row without padding: (tokens, D)."""
    mask, positions = torch.ones_like(row).bool(), torch.arange(len(row), device=row.device)
    return outputs(model, row[None], mask[None], positions[None], use_cache=False)[0][0]


def continues(model, ids, mask, whole, copied=False):
    """Whether reading rows on from the model's cache gives what a whole pass does.

    As the plain sampler does it, token by token; if `copied`, as plumbing/fast.py: two responses
    continue from each prompt, by several tokens and by one.

    Args: model; ids, mask (2, L); whole (2, L, D): what a whole pass gives; copied.
    """
    L = ids.shape[1]
    ends = [PROMPT, L - 1, L] if copied else list(range(PROMPT, L + 1))
    rows = torch.tensor([0, 0, 1, 1] if copied else [0, 1], device=ids.device)
    try:
        found, output = outputs(model, ids[:, :PROMPT], mask[:, :PROMPT],
                                fast.positions(mask)[:, :PROMPT], use_cache=True)
        cache, parts = output.past_key_values, [found[rows]]
        if copied:
            cache = fast.select_rows(fast.with_room(cache, L - PROMPT), rows)
        ids, mask, whole = ids[rows], mask[rows], whole[rows]
        for start, end in zip(ends, ends[1:]):
            parts.append(outputs(model, ids[:, start:end], mask[:, :end],
                                 fast.positions(mask)[:, start:end], past_key_values=cache,
                                 use_cache=True)[0])
    except Exception:  # it keeps something else, or nothing
        return False
    return cache is not None and agree(torch.cat(parts, 1)[mask], whole[mask], 2 / 3)


def longest_row(model, ids):
    """The longest row whose length leaves what the model says of its first tokens as it is.

    Rotary embeddings may change with the length (LongRoPE), and then a whole row and its tokens one
    by one have different log-probs. Asked by position ids, so that no such row has to run.

    Args: model; ids (1, L). Returns: at most the model's number of positions; None for no limit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= ids.shape[1]:
        return limit
    positions, mask = torch.arange(ids.shape[1], device=ids.device)[None], torch.ones_like(ids)

    def says(length):
        """At the first tokens, if the last one has the position of a row of this length."""
        ends = positions.index_fill(1, positions[0, -1:], length - 1)
        return outputs(model, ids, mask.bool(), ends, use_cache=False)[0][:, :-1]

    expected, good, bad = says(ids.shape[1]), ids.shape[1], limit + 1
    while bad - good > 1:
        length = limit if bad > limit else (good + bad) // 2
        good, bad = (length, bad) if agree(says(length), expected) else (good, length)
    return good


def name_of(model):
    """What the user calls a model. `load_model` notes it."""
    return getattr(model, "given_name", type(model).__name__)


def keeps_cache(model):
    """Whether the sampler can continue from the model's cache. `ask` finds out."""
    return getattr(model, "keeps_cache", True)


@functools.cache
def say(message):
    """Print a line, once, in the first process."""
    if is_first():
        print(message)


# --------------------------------------------------------------------------- with the rows of a run


def try_out(model, datasets, args, *others):
    """Before training: see that the models can read all rows, and pick a number of threads.

    Args: model; datasets (what load_rows returns); args; others (further models that read them).
    """
    length = max(max(dataset["num_tokens"][:]) for dataset in datasets)
    length += getattr(args, "max_new_tokens", 0)
    lr = getattr(args, "lr", 0)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 20e6 and lr > 1e-4 and is_first():
        print(f"warning: --lr {lr} is for tiny models; with {size / 1e6:.0f} million parameters, "
              "try 1e-6 to 1e-5")
    for reader in (model, *others):
        check_length(reader, length)
        check_words(reader, rows_of(datasets) if unembedded(reader) else [])
    pick_threads(model)


def check_length(model, length):
    """Exit if rows are too long for a model's positions, or for what it can read in one way."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    remedy = "lower --max-prompt-length, --max-length or --max-new-tokens"
    require(not limit or length <= limit,
            f"rows of up to {length} tokens, including the response, do not fit the {limit} "
            f"positions of model {name_of(model)}; {remedy}")
    longest = getattr(model, "longest", None) or length
    require(length <= longest,
            f"rows of up to {length} tokens, including the response: beyond {longest}, model "
            f"{name_of(model)} changes its position embeddings, so that the sampler and the update "
            f"would see different log-probs; {remedy}")


def rows_of(datasets):
    """What each row of the datasets is called, and its texts as one."""
    for dataset in datasets:
        columns = {"prompt", "completion", "chosen", "rejected"} & set(dataset.column_names)
        for number, row in enumerate(dataset.select_columns(sorted(columns))):
            yield f"row {number} of the dataset", str(list(row.values()))


def unembedded(model):
    """The tokenizer's tokens for which a model has no embedding. `load_model` notes them."""
    return getattr(model, "unembedded", [])


def check_words(model, texts):
    """Exit if a text (of pairs: what it is, the text) has a token that the model cannot embed."""
    for what, text in texts:
        for word in unembedded(model):
            require(word not in text,
                    f"model {name_of(model)}: {what} has the token {word}, which was added to the "
                    "tokenizer, but has no embedding; load the model in transformers, call "
                    "model.resize_token_embeddings(len(tokenizer)), save it and name that folder")
