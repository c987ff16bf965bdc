"""From the rows of a dataset, texts or conversations, to rows of token ids."""

import itertools
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy
import torch
from datasets.fingerprint import Hasher

from plumbing import chat, layouts
from plumbing.chat import is_conversation, prompt_tokens, reply_tokens, template_options
from plumbing.errors import one_line, require, stop
from plumbing.layouts import RESPONSES, joined_parts, split_row
from plumbing.processes import is_first
from plumbing.sources import load_dataset, text_columns

SYSTEM = {"system", "developer"}  # roles of the turn that --system-prompt would replace
# Why a row is dropped.
EMPTY, BLANK, IDENTICAL = "an empty prompt", "an empty response", "the same response twice"


# ---------------------------------------------------------------------------------- from row to row


def shorten(ids, length, tokenizer):
    """The last `length` token ids, at least one, with any BOS kept at the front."""
    if len(ids) <= length:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and length > 1 else []
    return head + ids[-max(1, length - len(head)) :]


@dataclass
class Preparation:
    """Makes rows with token ids out of a dataset's rows. Holds all that the result depends on."""

    what: str  # for one-line errors
    tokenizer: object
    sources: dict  # target -> column that the flags name for it
    targets: list  # the columns that a row has in the end, of prompt and RESPONSES
    responses: list  # the columns whose tokens count into the length
    tokenized: list  # the columns that get token ids: prompt, these, and completion
    chat: bool  # whether prompts are lists of messages
    wrap: bool  # whether prompts that are texts become messages
    system: str | None  # the system message to put before
    shorten_to: int | None  # tokens of prompt and longest response, to which to shorten the prompt

    def __call__(self, values, indices):
        """A batch of rows (dict of columns) with their numbers -> the columns that are new."""
        columns = [dict(zip(values, row)) for row in zip(*values.values())]
        rows = [self.prepare(row, index) for index, row in zip(indices, columns)]
        kept = [row for row in rows if row["prompt"]]
        if kept:
            self.tokenize(kept)
        for row in rows:
            if not row["prompt"]:
                row |= {name: [] for name in id_columns(self.tokenized)}
            replies = [row[f"{column}_ids"] for column in self.responses]
            row["num_tokens"] = len(row["prompt_ids"]) + max(map(len, replies), default=0)
            same = len(replies) == 2 and replies[0] == replies[1]  # of a pair
            blank = "completion" in self.responses and not as_reply(row["completion"]).strip()
            row["flaw"] = (EMPTY if not row["prompt_ids"] else IDENTICAL if same else
                           BLANK if blank else "")
            for name in row.keys() & RESPONSES:
                row[name] = as_reply(row[name])
        names = [*self.targets, *id_columns(self.tokenized), "num_tokens", "flaw"]
        return {name: [row[name] for row in rows] for name in names}

    def tokenize(self, rows):
        """Add the token ids of rows with a prompt."""
        prompts, options = ([row[name] for row in rows] for name in ("prompt", "options"))
        first = self.responses[0] if self.responses else None
        follows = [row[first][0]["role"] if first and isinstance(row[first], list) else "assistant"
                   for row in rows]
        ids = prompt_tokens(self.tokenizer, prompts, self.what, options, follows)
        for row, found in zip(rows, ids):
            row["prompt_ids"] = found
        for column in RESPONSES & {*self.tokenized}:
            replies = [row[column] for row in rows]
            found = reply_tokens(self.tokenizer, prompts, ids, replies, self.what, options)
            for row, response_ids in zip(rows, found):
                row[f"{column}_ids"] = response_ids
        for row in rows if self.shorten_to is not None else ():
            longest = max((len(row[f"{column}_ids"]) for column in self.responses), default=0)
            row["prompt_ids"] = shorten(row["prompt_ids"], self.shorten_to - longest,
                                        self.tokenizer)

    def prepare(self, row, index):
        """One row with its prompt and responses found and checked."""
        try:
            row = split_row(row, self.sources) | {"options": template_options(row)}
            for name in row.keys() & {"prompt", *RESPONSES}:
                row[name] = joined_parts(row[name])
        except Exception as error:
            stop(f"{self.what}: row {index} does not follow TRL's conventions: "
                 f"{type(error).__name__}: {one_line(error)}")
        if self.wrap and isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}] if row["prompt"] else []
        self.check(row, index)
        if self.system and row["prompt"] and row["prompt"][0]["role"] not in SYSTEM:
            row["prompt"] = [{"role": "system", "content": self.system}, *row["prompt"]]
        return row

    def check(self, row, index):
        """Exit with one line if a row's prompt or responses are neither texts nor messages."""
        is_turn = lambda turn: isinstance(turn, dict) and "role" in turn and (
            isinstance(turn.get("content"), str) or turn.get("tool_calls"))
        turns = row["prompt"] if self.chat and isinstance(row["prompt"], list) else []
        require(isinstance(row["prompt"], list if self.chat else str) and all(map(is_turn, turns)),
                f"{self.what}: column 'prompt' must hold text, or lists of messages with role and "
                f"content; row {index} does not")
        for column in row.keys() & RESPONSES:
            reply = row[column]
            if isinstance(reply, str):
                continue
            kind = "text, or lists of messages with role and content" if self.chat else "text"
            require(self.chat and is_conversation(reply) and all(map(is_turn, reply)),
                    f"{self.what}: column {column!r} must hold {kind}; row {index} does not")
            last = reply[-1] if reply else {}
            require(last.get("role") == "assistant" and isinstance(last.get("content"), str)
                    and last["content"].strip(),
                    f"{self.what}: in row {index}, the last turn of column {column!r} is not a "
                    "text of the assistant; remove that row, or its last turns (a conversation as "
                    "a prompt alone: --prompt-column messages)")


def id_columns(targets):
    """Names of the columns with the token ids of a prompt and its responses."""
    return [f"{target}_ids" for target in targets]


def as_reply(reply):
    """A response as text: of a conversation its last turn."""
    return reply if isinstance(reply, str) else reply[-1]["content"]


# ------------------------------------------------------------------------------------- whole splits


def load_rows(args, split, tokenizer, columns=("prompt",), max_length=None, first=None):
    """The (first) rows of a dataset split that are not too long. Prints how many are dropped.

    Args: args (a script's flags); split; tokenizer; columns ("prompt", and required responses);
    max_length (tokens of prompt, longest response and its EOS; default: args.max_prompt_length);
    first (maximum number of rows).
    Returns: datasets.Dataset with prompt (text, or messages), prompt_ids, num_tokens (with the
    longest response), completion, chosen and rejected (texts) if it has them, the token ids of the
    completion and of `columns` (with what ends them: see reply_tokens), and the dataset's other
    columns unchanged.
    """
    max_length = max_length or args.max_prompt_length
    what = f"dataset {args.dataset}, split {split}"
    dataset = load_dataset(args.dataset, split, args.dataset_config, text_columns(args))
    dataset = dataset.with_format(None)
    sources, example = find_columns(args, dataset, columns)
    wrap = bool(args.chat or args.system_prompt)
    preparation = Preparation(
        what, tokenizer, sources, targets=sorted({"prompt", *RESPONSES} & example.keys()),
        responses=columns[1:], tokenized=sorted({*columns, "completion"} & example.keys()),
        chat=wrap or not isinstance(example["prompt"], str), wrap=wrap, system=args.system_prompt,
        shorten_to=max_length if args.truncate_prompts else None)
    dataset = prepare_all(dataset, preparation, example)
    lengths, flaws = numpy.array(dataset["num_tokens"][:]), numpy.array(dataset["flaw"][:])
    long = f"more than {max_length} tokens"
    flaws = numpy.where((flaws == "") & (lengths > max_length), long, flaws)
    require(long not in flaws or "" in flaws,
            f"{what}: every row has {long}; raise --max-prompt-length or --max-length")
    require("" in flaws, f"{what}: every row has {' or '.join(numpy.unique(flaws))}")
    for flaw, count in zip(*numpy.unique(flaws, return_counts=True)):
        if flaw and is_first():
            print(f"{what}: dropped {count} of {len(dataset)} rows with {flaw}")
    return dataset.select(numpy.flatnonzero(flaws == "")[:first]).remove_columns("flaw")


def find_columns(args, dataset, columns):
    """Which columns the flags name for prompt and responses, and the first row split by them.

    Exits with one line if a required column is missing.
    """
    has = f"it has {', '.join(dataset.column_names)}"
    given = {target: getattr(args, f"{target}_column", None) for target in ("prompt", *RESPONSES)}
    sources = {target: name for target, name in given.items() if name in dataset.column_names}
    example = dataset[0]
    with suppress(Exception):  # told with the row's number later
        example = split_row(example, sources)
    for target in columns:
        require(target in sources or not given[target],
                f"--{target}-column {given[target]}: dataset {args.dataset} has no such column; "
                f"{has}")
        require(target in example, f"dataset {args.dataset}: has no column {target!r}; {has}; name "
                                   f"one with --{target}-column")
    return sources, example


def prepare_all(dataset, preparation, example):
    """Every row prepared. Found again in the cache of datasets by the next run, if it has files."""
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = {column: text if column in RESPONSES else dataset.features.get(column)
                for column in example}  # not to be guessed: first values may be null
    features |= {name: [number] for name in id_columns(preparation.tokenized)}
    features |= {"prompt": datasets.Json() if preparation.chat else text, "num_tokens": number,
                 "flaw": text}
    folders = [Path(file["filename"]).parent for file in dataset.cache_files]
    # Rows that an earlier version of the code has made do not count.
    code = [Path(file).read_text() for file in (__file__, chat.__file__, layouts.__file__)]
    if len(dataset) > 50_000 and is_first():
        datasets.enable_progress_bars()
    dataset = dataset.map(
        preparation, batched=True, with_indices=True, desc="tokenize",
        features=datasets.Features(features),
        remove_columns=list(dataset.features.keys() - features),
        new_fingerprint=Hasher.hash([dataset._fingerprint, preparation, code]),
        keep_in_memory=not all(os.access(folder, os.W_OK) for folder in folders))
    datasets.disable_progress_bars()
    return dataset


def batches(dataset, size, seed, skip=0):
    """Yield dicts of columns (lists of `size` values) for ever, reshuffled after each pass.

    The first `skip` of them are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    order = (row for _ in itertools.count()
             for row in torch.randperm(len(dataset), generator=generator).tolist())
    stream = itertools.islice(order, skip * size, None)
    while True:
        yield dataset[list(itertools.islice(stream, size))]
