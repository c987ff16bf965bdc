"""From texts and conversations to token ids: prompts, and replies as they stand after them."""

import json
from contextlib import suppress

from plumbing.errors import one_line, require, stop

PROBE = "zyx"  # a reply that no chat template contains


def is_conversation(value):
    """Whether a value is a list of messages, rather than text."""
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def template_options(row):
    """What a row's columns `tools` and `chat_template_kwargs` add to the chat template, as in TRL.

    Args: row (dict of columns). Returns: dict of arguments for apply_chat_template.
    """
    tools, more = row.get("tools"), row.get("chat_template_kwargs")
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    more = json.loads(more) if isinstance(more, str) and more else more
    return {"tools": without_none(tools) or None} | (without_none(more) or {})


def without_none(value):
    """A value without the keys that hold None, which tables put where other rows have a value."""
    if isinstance(value, dict):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def render(tokenizer, turns, what, options, **how):
    """A conversation as text, by the tokenizer's chat template."""
    require(tokenizer.chat_template,
            f"{what}: the prompts are chat messages, but the tokenizer has no chat template; use "
            "an instruction-tuned model, or plain-text prompts")
    turns = [{"content": ""} | without_none(turn) for turn in turns]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options, **how)
    except Exception as error:
        stop(f"{what}: the tokenizer's chat template rejects its messages: {one_line(error)}")


def render_prompt(tokenizer, prompt, what, options, follows="assistant"):
    """A conversation up to where a reply begins, whose first turn has the role `follows`.

    The assistant's turn is opened, or continued if the prompt ends with one.
    """
    opens = follows == "assistant"
    is_open = opens and prompt[-1]["role"] == "assistant"
    return render(tokenizer, prompt, what, options, add_generation_prompt=opens and not is_open,
                  continue_final_message=is_open)


def render_reply(tokenizer, prompt, reply, what, options):
    """A rendered prompt, and what follows it when the turns of the reply are added."""
    start = render_prompt(tokenizer, prompt, what, options, reply[0]["role"])
    if prompt[-1]["role"] == reply[0]["role"] == "assistant":
        begun = prompt[-1] | {"content": prompt[-1]["content"] + reply[0]["content"]}
        prompt, reply = prompt[:-1], [begun, *reply[1:]]
    whole = render(tokenizer, [*prompt, *reply], what, options)
    require(whole.startswith(start),
            f"{what}: the chat template renders the prompt in another way once a reply follows, so "
            "their tokens cannot be told apart; give it as plain text, or use another template")
    return start, whole[len(start) :]


def turn_end(tokenizer):
    """The id of the added token that ends the assistant's turn in the chat template, or None."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    known = tokenizer.added_tokens_decoder
    with suppress(Exception):  # no template, or one that wants other turns
        tail = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(PROBE)[2]
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        return next((id for id in ids if id in known and known[id].content.strip()), None)
    return None


def prompt_tokens(tokenizer, prompts, what, options=None, follows=None):
    """Token ids of prompts: text with the tokenizer's special tokens, messages by its template.

    Args: tokenizer; prompts (texts, or lists of messages); what (for a one-line error); options
    (a dict for each, see template_options); follows (the role of each reply's first turn).
    """
    is_chat = not isinstance(prompts[0], str)
    if is_chat:  # whose template adds the special tokens
        options = options or [{}] * len(prompts)
        follows = follows or ["assistant"] * len(prompts)
        prompts = [render_prompt(tokenizer, prompt, what, more, role)
                   for prompt, more, role in zip(prompts, options, follows)]
    ids, end = tokenizer(prompts, add_special_tokens=not is_chat)["input_ids"], tokenizer.eos_token
    # Some tokenizers append EOS, but the response is still to come.
    return [row[:-1] if row[-1:] == [tokenizer.eos_token_id] and not text.endswith(end) else row
            for row, text in zip(ids, prompts)]


def reply_tokens(tokenizer, prompts, prompt_ids, replies, what, options=None, ended=None):
    """Token ids of replies where they follow their prompts, up to and including what ends them.

    That is the token that ends the assistant's turn in the chat template, and EOS after plain text;
    if there is none, EOS is added. An assistant's turn that a prompt ends with is continued.

    Args: tokenizer; prompts (texts, or lists of messages); prompt_ids (see prompt_tokens); replies
    (texts, or lists of messages); what and options (see prompt_tokens); ended (bools; default: all.
    The others have nothing that ends them).
    """
    is_chat, ended = not isinstance(prompts[0], str), ended or [True] * len(replies)
    pairs = list(zip(prompts, replies))
    if is_chat:
        as_turns = lambda reply: ([{"role": "assistant", "content": reply}]
                                  if isinstance(reply, str) else reply)
        pairs = [render_reply(tokenizer, prompt, as_turns(reply), what, more)
                 for (prompt, reply), more in zip(pairs, options or [{}] * len(pairs))]
    rows = following(tokenizer, pairs, prompt_ids, not is_chat)
    end, eos = turn_end(tokenizer), tokenizer.eos_token_id
    if is_chat:  # a template may add a line break after the end
        rows = [ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids for ids in rows]
    has_end = [ids[-1:] in ([end], [eos]) for ids in rows]
    return [(ids if has else [*ids, eos]) if keep else ids[: len(ids) - has]
            for ids, has, keep in zip(rows, has_end, ended)]


def following(tokenizer, pairs, prompt_ids, special):
    """Token ids of texts where they follow others.

    Those of both together, less those of the first. If the two share a token: those that the text
    has after a line break, since some tokenizers put a space before a text that stands alone.

    Args: tokenizer; pairs (of texts); prompt_ids (of the first of each); special (whether these
    begin with the tokenizer's special tokens).
    """
    def ids_of(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    both = tokenizer([start + text for start, text in pairs], add_special_tokens=special)
    rows = [ids[len(first) :] for ids, first in zip(both["input_ids"], prompt_ids)]
    shared = []
    for i, ((start, _), first) in enumerate(zip(pairs, prompt_ids)):
        same = both["input_ids"][i][: len(first)] == first
        last = same and first and tokenizer.is_fast and both.token_to_chars(i, len(first) - 1)
        if not same or last and last.end > len(start):  # of unknown words only the end can tell
            shared.append(i)
    texts, (line,) = [pairs[i][1] for i in shared], ids_of(["\n"])
    lined = ids_of(["\n" + text for text in texts])
    for i, after, alone in zip(shared, lined, ids_of(texts)):
        rows[i] = after[len(line) :] if after[: len(line)] == line else alone
    return rows
