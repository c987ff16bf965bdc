"""A dataset's columns, by TRL's conventions: which are the prompt of a row and its responses."""

import itertools
import re

from plumbing.chat import is_conversation

RESPONSES = {"completion", "chosen", "rejected"}  # columns that hold responses


def split_row(row, sources):
    """Find a row's prompt, and its completion, chosen and rejected if it has them.

    Of conversations, a reply is all that follows the prompt. "messages" are a prompt and a last
    turn. Chosen and rejected without a prompt have an implicit one, which both begin with: whole
    turns, or text up to the last line that begins with "Assistant:", if there is one. Conversations
    have it also beside a prompt that is text.

    Args: row (dict of columns); sources (dict target -> column that the flags name for it).
    """
    row = row | {target: row[column] for target, column in sources.items()
                 if target != "completion"}
    pair = row.get("chosen"), row.get("rejected")
    is_bare = "prompt" not in sources and not is_conversation(row.get("prompt"))
    if is_bare and is_conversation(row.get("messages")) and "completion" not in row:
        row["prompt"], row["completion"] = row["messages"][:-1], row.pop("messages")[-1:]
    elif is_bare and all(map(is_conversation, pair)) or "prompt" not in row and None not in pair:
        row["prompt"] = common_prefix(*pair)
        row["chosen"], row["rejected"] = (whole[len(row["prompt"]) :] for whole in pair)
    if "prompt" not in row and "question" in row:
        row["prompt"] = row["question"]
    if "completion" in sources:  # after the split: it may be the chosen response
        row["completion"] = row[sources["completion"]]
    for name in sorted(row.keys() & RESPONSES) if "prompt" in row else ():
        row["prompt"], row[name] = without_prompt(row["prompt"], row[name])
    return row


def without_prompt(prompt, reply):
    """A prompt and its reply, which may be a conversation that repeats the prompt."""
    if not is_conversation(reply) or not reply:
        return prompt, reply
    if is_conversation(prompt):
        same = (n for n in range(len(prompt), 0, -1) if prompt[-n:] == reply[:n])
        return prompt, reply[next(same, 0) :]
    if reply[0].get("role") == "assistant":
        return [{"role": "user", "content": prompt}], reply
    return reply[:-1], reply[-1:]


def common_prefix(chosen, rejected):
    """What two texts, or two conversations, share: of texts whole turns, or whole words."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))
    shared = chosen[: sum(1 for _ in pairs)]
    if not isinstance(chosen, str):
        return shared[: min(len(chosen), len(rejected)) - 1]  # a reply remains of each
    turns = list(re.finditer(r"^Assistant:", shared, re.MULTILINE))
    words = list(re.finditer(r"\s", shared))
    return shared[: turns[-1].end() if turns else words[-1].end() if words else 0]


def joined_parts(value):
    """A conversation in which each content that is a list of texts has become one text."""
    if not is_conversation(value):
        return value
    parts = lambda turn: turn.get("content") if isinstance(turn.get("content"), list) else []
    is_text = lambda part: isinstance(part, dict) and isinstance(part.get("text"), str)
    return [turn | {"content": "".join(part["text"] for part in parts(turn))}
            if parts(turn) and all(map(is_text, parts(turn))) else turn for turn in value]
