"""From a dataset's columns, texts or conversations, to rows of token ids. Columns follow TRL's."""

import itertools
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy
import torch
from datasets.fingerprint import Hasher

from plumbing.errors import one_line, require, stop
from plumbing.processes import is_first
from plumbing.sources import load_dataset, text_columns

RESPONSES = {"completion", "chosen", "rejected"}  # columns that hold responses


# ---------------------------------------------------------------------------------- from row to row


def split_row(row, sources):
    """Find a row's prompt, and its completion, chosen and rejected if it has them.

    A conversation ("messages") is a prompt and a final reply. Chosen and rejected texts without a
    prompt have an implicit one: their common prefix, up to the last "Assistant:" if there is one.

    Args: row (dict of columns); sources (dict target -> column that the flags name for it).
    """
    named = {target: row[sources[target]] for target in ("prompt", "chosen", "rejected")
             if target in sources}
    row = row | named
    if "prompt" not in row and "messages" in row:
        row["prompt"], row["completion"] = row["messages"][:-1], row.pop("messages")[-1:]
    if "prompt" not in row and "chosen" in row and "rejected" in row:
        shared = common_prefix(row["chosen"], row["rejected"])
        row["prompt"] = shared
        row["chosen"], row["rejected"] = row["chosen"][len(shared):], row["rejected"][len(shared):]
    if "prompt" not in row and "question" in row:
        row["prompt"] = row["question"]
    if "completion" in sources:  # after the split: it may be the chosen response
        row["completion"] = row[sources["completion"]]
    for name in row.keys() & RESPONSES:
        if isinstance(row[name], list) and row[name]:
            row[name] = row[name][-1]["content"]
    return row


def common_prefix(chosen, rejected):
    """What two texts, or two lists of messages, share: of texts whole turns, or whole words."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))
    shared = chosen[: sum(1 for _ in pairs)]
    if not isinstance(chosen, str):
        return shared
    turn = shared.rfind("Assistant:")
    return shared[: turn + len("Assistant:")] if turn >= 0 else shared[: shared.rfind(" ") + 1]


def prompt_tokens(tokenizer, prompts, what):
    """Token ids of prompts: text with the tokenizer's special tokens, messages by its template.

    Args: tokenizer; prompts (texts, or lists of messages); what (for a one-line error).
    """
    if not prompts or isinstance(prompts[0], str):
        ids, end = tokenizer(prompts)["input_ids"] if prompts else [], tokenizer.eos_token_id
        # Some tokenizers append EOS, but the response is still to come.
        return [row[:-1] if row and row[-1] == end and not text.endswith(tokenizer.eos_token)
                else row for row, text in zip(ids, prompts)]
    require(tokenizer.chat_template,
            f"{what}: the prompts are chat messages, but the tokenizer has no chat template; use "
            "an instruction-tuned model, or plain-text prompts")
    try:
        texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        stop(f"{what}: the tokenizer's chat template rejects its messages: {one_line(error)}")
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has added them


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
    chat: bool  # whether prompts are lists of messages
    wrap: bool  # whether prompts that are texts become messages
    system: str | None  # the system message to put before
    shorten_to: int | None  # tokens of prompt and longest response, to which to shorten the prompt

    def __call__(self, values, indices):
        """A batch of rows (dict of columns) with their numbers -> the columns that are new."""
        columns = [dict(zip(values, row)) for row in zip(*values.values())]
        rows = [self.prepare(row, index) for index, row in zip(indices, columns)]
        new = {column: [row[column] for row in rows] for column in self.targets}
        given = [prompt for prompt in new["prompt"] if prompt]
        found = iter(prompt_tokens(self.tokenizer, given, self.what))
        prompt_ids = [next(found) if prompt else [] for prompt in new["prompt"]]
        responses = [self.tokenizer(new[column], add_special_tokens=False)["input_ids"]
                     for column in self.responses]
        longest = [max(map(len, ids)) + 1 for ids in zip(*responses)] or [0] * len(rows)  # with EOS
        if self.shorten_to is not None:
            prompt_ids = [ids and shorten(ids, self.shorten_to - more, self.tokenizer)
                          for ids, more in zip(prompt_ids, longest)]
        lengths = [len(ids) + more if ids else 0 for ids, more in zip(prompt_ids, longest)]
        return new | {"prompt_ids": prompt_ids, "num_tokens": lengths}  # 0: an empty prompt

    def prepare(self, row, index):
        """One row with its prompt and responses found and checked."""
        try:
            row = split_row(row, self.sources)
        except Exception as error:
            stop(f"{self.what}: row {index} does not follow TRL's conventions: "
                 f"{type(error).__name__}: {one_line(error)}")
        if self.wrap and isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}] if row["prompt"] else []
        self.check(row, index)
        if self.system and row["prompt"] and row["prompt"][0]["role"] != "system":
            row["prompt"] = [{"role": "system", "content": self.system}, *row["prompt"]]
        return row

    def check(self, row, index):
        """Exit with one line if a row's prompt or responses are neither texts nor messages."""
        turns = row["prompt"] if self.chat and isinstance(row["prompt"], list) else []
        whole = all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)
        require(isinstance(row["prompt"], list if self.chat else str) and whole,
                f"{self.what}: column 'prompt' must hold text, or lists of messages with role and "
                f"content; row {index} does not")
        for column in row.keys() & RESPONSES:
            require(isinstance(row[column], str),
                    f"{self.what}: column {column!r} must hold text; row {index} does not")


# ------------------------------------------------------------------------------------- whole splits


def load_rows(args, split, tokenizer, columns=("prompt",), max_length=None, first=None):
    """The (first) rows of a dataset split that are not too long. Prints how many are dropped.

    Args: args (a script's flags); split; tokenizer; columns ("prompt", and required responses);
    max_length (tokens of prompt, longest response and its EOS; default: args.max_prompt_length);
    first (maximum number of rows).
    Returns: datasets.Dataset with prompt (text, or messages), prompt_ids, num_tokens (with the
    longest response), completion, chosen and rejected (texts) if it has them, and the dataset's
    other columns unchanged.
    """
    max_length = max_length or args.max_prompt_length
    what = f"dataset {args.dataset}, split {split}"
    dataset = load_dataset(args.dataset, split, args.dataset_config, text_columns(args))
    dataset = dataset.with_format(None)
    sources, example = find_columns(args, dataset, columns)
    wrap = bool(args.chat or args.system_prompt)
    preparation = Preparation(
        what, tokenizer, sources, sorted({"prompt", *RESPONSES} & example.keys()), columns[1:],
        wrap or not isinstance(example["prompt"], str), wrap, args.system_prompt,
        max_length if args.truncate_prompts else None)
    dataset = prepare_all(dataset, preparation, example)
    lengths = numpy.array(dataset["num_tokens"][:])
    empty, long = lengths == 0, lengths > max_length
    require(not empty.all(), f"{what}: every prompt is empty")
    require(not (empty | long).all(), f"{what}: every row has more than {max_length} tokens; raise "
                                      "--max-prompt-length or --max-length")
    for why, drop in (("an empty prompt", empty), (f"more than {max_length} tokens", long)):
        if drop.any() and is_first():
            print(f"{what}: dropped {drop.sum()} of {len(dataset)} rows with {why}")
    return dataset.select(numpy.flatnonzero(~(empty | long))[:first])


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
    features |= {"prompt": datasets.Json() if preparation.chat else text, "prompt_ids": [number],
                 "num_tokens": number}
    folders = [Path(file["filename"]).parent for file in dataset.cache_files]
    code = Path(__file__).read_text()  # rows that an earlier version has made do not count
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
