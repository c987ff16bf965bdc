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


def goes_on(prompt, role):
    """Whether a reply whose first turn has this role continues the last turn of the prompt."""
    last = prompt[-1]
    return last["role"] == role == "assistant" and isinstance(last.get("content"), str)


def render_prompt(tokenizer, prompt, what, options, follows="assistant"):
    """A conversation up to where a reply begins, whose first turn has the role `follows`.

    The assistant's turn is opened, or continued if the prompt ends with a text of the assistant.
    """
    is_open = goes_on(prompt, follows)
    return render(tokenizer, prompt, what, options, continue_final_message=is_open,
                  add_generation_prompt=follows == "assistant" and not is_open)


def render_reply(tokenizer, prompt, reply, what, options):
    """A rendered prompt, and what follows it when the turns of the reply are added."""
    start = render_prompt(tokenizer, prompt, what, options, reply[0]["role"])
    if goes_on(prompt, reply[0]["role"]):
        begun = prompt[-1] | {"content": prompt[-1]["content"] + reply[0]["content"]}
        prompt, reply = prompt[:-1], [begun, *reply[1:]]
    whole = render(tokenizer, [*prompt, *reply], what, options)
    require(whole.startswith(start),
            f"{what}: the chat template renders the prompt in another way once a reply follows, so "
            "their tokens cannot be told apart; give it as plain text, or use another template")
    return start, whole[len(start) :]


def turn_tail(tokenizer):
    """What the chat template puts after the assistant's text: all of it, and what ends the turn.

    That is the first added token, such as <|im_end|>, with what stands before it; without one all
    but white space. A line break may follow. Two texts, "" if there is no template.
    """
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    for start in ([], [{"role": "system", "content": "?"}]):  # which some templates want, or refuse
        with suppress(Exception):
            tail = tokenizer.apply_chat_template(start + talk, tokenize=False).rpartition(PROBE)[2]
            ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
            known = tokenizer.added_tokens_decoder
            ends = [known[id].content for id in ids if id in known and known[id].content.strip()]
            return tail, "".join(tail.partition(ends[0])[:2]) if ends else tail.rstrip()
    return "", ""


def turn_end(tokenizer):
    """The id of the added token that ends the assistant's turn in the chat template, or None."""
    ids = tokenizer(turn_tail(tokenizer)[1], add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and ids[-1] in tokenizer.added_tokens_decoder else None


def without_bos(tokenizer, texts):
    """Texts without a BOS that they begin with, if the tokenizer adds one itself."""
    adds = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [text.removeprefix(tokenizer.bos_token) for text in texts] if adds else texts


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
    else:
        prompts = without_bos(tokenizer, prompts)
    ids, end = tokenizer(prompts, add_special_tokens=not is_chat)["input_ids"], tokenizer.eos_token
    # Some tokenizers append EOS, but the response is still to come.
    return [row[:-1] if row[-1:] == [tokenizer.eos_token_id] and not text.endswith(end) else row
            for row, text in zip(ids, prompts)]


def reply_tokens(tokenizer, prompts, prompt_ids, replies, what, options=None, ended=None):
    """Token ids of replies where they follow their prompts, up to and including what ends them.

    That is the token that ends the assistant's turn in the chat template, and EOS after plain text.
    If there is none, EOS is added. An assistant's turn that a prompt ends with is continued.

    Args: tokenizer; prompts (texts, or lists of messages); prompt_ids (see prompt_tokens); replies
    (texts, or lists of messages); what and options (see prompt_tokens); ended (bools; default: all.
    The others have nothing that ends them).
    """
    is_chat, ended = not isinstance(prompts[0], str), ended or [True] * len(replies)
    if is_chat:
        tail, end = turn_tail(tokenizer)
        options = options or [{}] * len(prompts)
        pairs = []
        for prompt, reply, more, has_ended in zip(prompts, replies, options, ended):
            turns = as_turns(reply, (end, tokenizer.eos_token))
            start, text = render_reply(tokenizer, prompt, turns, what, more)
            pairs.append((start, text.removesuffix(tail) + (end if has_ended else "")))
    else:
        pairs = list(zip(without_bos(tokenizer, prompts), replies))
    rows = following(tokenizer, pairs, prompt_ids, not is_chat)
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    for ids, has_ended in zip(rows, ended):
        if has_ended and not (ids and ids[-1] in ends):
            ids.append(tokenizer.eos_token_id)
        elif not has_ended and ids and ids[-1] in ends:
            ids.pop()
    return rows


def as_turns(reply, ends):
    """A reply (text, or turns) as turns, without an end that is written at the end of its text."""
    turns = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    text = turns[-1]["content"]
    for end in filter(None, ends):
        text = text.removesuffix(end)
    return [*turns[:-1], turns[-1] | {"content": text}]


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
        is_shared = both["input_ids"][i][: len(first)] != first
        if first and tokenizer.is_fast and not is_shared:
            # An unknown word has the same id with and without a text that is stuck to it.
            last = both.token_to_chars(i, len(first) - 1)
            is_shared = last is not None and last.end > len(start)
        if is_shared:
            shared.append(i)
    texts, (line,) = [pairs[i][1] for i in shared], ids_of(["\n"])  # line: the ids of a line break
    after_line = ids_of(["\n" + text for text in texts])
    for i, after, alone in zip(shared, after_line, ids_of(texts)):
        rows[i] = after[len(line) :] if after[: len(line)] == line else alone
    return rows
