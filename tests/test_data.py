"""Datasets by TRL's conventions or by flags, and rewards that are several."""

import dataclasses
import json
import os
from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers.families import save_family
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from helpers.tiny import CPU, data_args, encode, make_tokenizer, reward_args

import rloo
import sft
from common import score
from plumbing import data, load_dataset, load_rewards, load_rows, load_tokenizer
from plumbing.data import shorten, split_row


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("qwen"), "qwen2")


@pytest.fixture
def rows(qwen, tmp_path):
    """Write rows to a file, and read them back through load_rows."""

    def read(rows, columns=("prompt",), max_length=200, first=None, **flags):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_rows(data_args(str(path), **flags), "train", load_tokenizer(qwen),
                         list(columns), max_length, first)

    return read


def turn(role, content):
    return {"role": role, "content": content}


def test_columns_are_found_or_named(rows):
    given = [{"query": "a", "reply": "b", "other": 3, "prompt": "not this"}]
    found = rows(given, ["prompt", "completion"], prompt_column="query",
                 completion_column="reply")[0]
    assert (found["prompt"], found["completion"], found["other"]) == ("a", "b", 3)
    assert rows([{"question": "a", "answer": "#### 1"}])[0]["prompt"] == "a"  # openai/gsm8k
    # The named column is not needed, and not there.
    assert rows([{"prompt": "a"}], completion_column="reference")[0]["prompt"] == "a"


def test_chat_messages_go_through_the_template(rows, qwen):
    tokenizer = load_tokenizer(qwen)
    user = [turn("user", "What is 2 + 3?")]
    expected = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    for found in (rows([{"prompt": user}])[0],
                  rows([{"prompt": user[0]["content"]}], chat=True)[0]):
        assert tokenizer.decode(found["prompt_ids"]) == expected
        assert found["prompt"] == user
    found = rows([{"prompt": "What is 2 + 3?"}], system_prompt="Be brief.")[0]
    assert (tokenizer.decode(found["prompt_ids"])
            == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected)
    own = [turn("system", "Be kind."), *user]
    assert rows([{"prompt": own}], system_prompt="Be brief.")[0]["prompt"] == own
    plain = rows([{"prompt": "What is 2 + 3?"}])[0]
    assert tokenizer.decode(plain["prompt_ids"]) == "What is 2 + 3?"


def test_conversations_and_pairs_of_conversations(rows):
    talk = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    found = rows([{"messages": [*talk, turn("assistant", "d")]}], ["prompt", "completion"])[0]
    assert found["prompt"] == talk and found["completion"] == "d"
    pair = {"chosen": [*talk, turn("assistant", "good")],
            "rejected": [*talk, turn("assistant", "bad")]}
    found = rows([pair], ["prompt", "chosen", "rejected"])[0]
    assert found["prompt"] == talk and (found["chosen"], found["rejected"]) == ("good", "bad")


def test_the_prompt_of_hh_transcripts_is_what_both_share(rows):
    start = "\n\nHuman: What is 2 + 3?\n\nAssistant: Why?\n\nHuman: Please.\n\nAssistant:"
    pair = {"chosen": f"{start} It is 5.", "rejected": f"{start} It is none of your business."}
    found = rows([pair], ["prompt", "chosen", "rejected"])[0]
    assert found["prompt"] == start
    assert (found["chosen"], found["rejected"]) == (" It is 5.", " It is none of your business.")
    # This is what sft.py learns from.
    found = rows([pair], ["prompt", "completion"], completion_column="chosen")[0]
    assert (found["prompt"], found["completion"]) == (start, " It is 5.")
    # Without turns: up to the last common word.
    other = {"chosen": "Say: hello there", "rejected": "Say: help me"}
    assert rows([other], ["prompt", "chosen", "rejected"])[0]["prompt"] == "Say: "


def test_long_prompts_are_left_out_and_counted_or_cut_off_at_the_left(rows, qwen, capsys):
    tokenizer = load_tokenizer(qwen)
    given = [{"prompt": "a b c d e f g h i j"}, {"prompt": "a b"}]
    assert [row["prompt"] for row in rows(given, max_length=10)] == ["a b"]
    assert "dropped 1 of 2 rows with more than 10 tokens" in capsys.readouterr().out
    kept = rows(given, max_length=10, truncate_prompts=True)
    assert len(kept) == 2 and len(kept[0]["prompt_ids"]) == 10
    assert kept[0]["prompt_ids"] == tokenizer(given[0]["prompt"])["input_ids"][-10:]
    both = rows([given[0] | {"completion": "x y z"}], ["prompt", "completion"], 12,
                truncate_prompts=True)
    assert len(both[0]["prompt_ids"]) == 12 - len(tokenizer("x y z")["input_ids"]) - 1  # its EOS


def test_empty_prompts_are_dropped_and_counted(rows, capsys):
    given = [{"prompt": "a b"}, {"prompt": ""}, {"prompt": "c"}]
    assert [row["prompt"] for row in rows(given)] == ["a b", "c"]
    assert "dropped 1 of 3 rows with an empty prompt" in capsys.readouterr().out


def test_a_bos_stays_in_front_of_a_shortened_prompt():
    tokenizer = SimpleNamespace(bos_token_id=1)
    assert shorten([1, 2, 3, 4], 3, tokenizer) == [1, 3, 4]
    assert shorten([5, 2, 3, 4], 3, tokenizer) == [2, 3, 4]
    assert shorten([1, 2], 3, tokenizer) == [1, 2]
    assert shorten([1, 2, 3], 1, tokenizer) == [3]


WORDS = "a b c d e f g h i j k l m n o p"
MIXED = [  # more than one batch; columns whose first values are all null
    {"prompt": WORDS[: i * 7 % 31], "completion": WORDS[: 1 + i * 5 % 23],
     "number": None if i < 1010 else i,
     "nested": {"list": [i] * (i % 3), "text": None if i < 1010 else "late"}}
    for i in range(1030)]
TALKS = [{"messages": [turn("user", WORDS[: i % 29]) | {"name": None if i < 1010 else "x"},
                       turn("assistant", f"{i}")]} for i in range(1030)]


@pytest.mark.slow
@pytest.mark.parametrize("given", [MIXED, TALKS])
@pytest.mark.parametrize("columns", [["prompt"], ["prompt", "completion"]])
@pytest.mark.parametrize("flags", [{}, {"truncate_prompts": True}, {"system_prompt": "Be brief."}])
def test_rows_are_the_same_as_computed_one_by_one(given, columns, flags, rows, qwen):
    tokenizer, expected = load_tokenizer(qwen), []
    for row in map(lambda row: split_row(row, {}), given):
        prompt = row["prompt"]
        if isinstance(prompt, str) and "system_prompt" in flags and prompt:
            prompt = [turn("user", prompt)]
        if isinstance(prompt, list) and "system_prompt" in flags:
            prompt = [turn("system", flags["system_prompt"]), *prompt]
        reply = row["completion"]
        reply = reply if isinstance(reply, str) else reply[0]["content"]
        start, whole = prompt, f"{prompt}{reply}"
        if isinstance(prompt, list):
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            start, whole = text, f"{text}{reply}<|im_end|>"
        ids, both, alone = (tokenizer(text)["input_ids"] for text in (start, whole, reply))
        reply_ids = both[len(ids):] if both[: len(ids)] == ids else alone
        reply_ids += [tokenizer.eos_token_id] * (reply_ids[-1] != tokenizer.eos_token_id)
        more = len(reply_ids) if "completion" in columns else 0
        if flags == {"truncate_prompts": True} and ids:
            ids = shorten(ids, 40 - more, tokenizer)
        if ids and len(ids) + more <= 40:
            expected.append(row | {"prompt": prompt, "prompt_ids": ids, "completion": reply,
                                   "completion_ids": reply_ids, "num_tokens": len(ids) + more})
    found = rows(given, columns, 40, **flags)
    assert found.to_list() == expected and len(expected) > 3
    assert found[[2, 0]] == {key: [expected[2][key], expected[0][key]] for key in expected[0]}


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """A function that loads a file of rows as a new process would, with an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data.jsonl"

    def load(rows, tokenizer, columns=("prompt",), max_length=40, **flags):
        text = "\n".join(map(json.dumps, rows))
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return load_rows(data_args(str(path), **flags), "train", tokenizer, columns, max_length)

    return load


def test_rows_are_tokenized_once(qwen, jsonl, tmp_path):
    before = jsonl(MIXED, load_tokenizer(qwen), ["prompt", "completion"]).to_list()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cache-*.arrow")}
    assert len(files) == 1
    assert jsonl(MIXED, load_tokenizer(qwen), ["prompt", "completion"], seed=7).to_list() == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cache-*.arrow")} == files
    assert (jsonl(MIXED[::-1], load_tokenizer(qwen), ["prompt", "completion"]).to_list()
            == before[::-1])


@pytest.mark.parametrize("edited_file", ["data", "chat", "layouts"])
def test_other_flags_tokenizers_or_code_do_not_see_each_others_rows(qwen, jsonl, tmp_path,
                                                                    monkeypatch, edited_file):
    rows = [{"prompt": "a b c d e f g h", "other": "x y", "completion": "z"}] * 2
    load = lambda tokenizer, columns=("prompt",), length=9, **flags: jsonl(
        rows, tokenizer, columns, length, **flags)[0]["prompt_ids"]
    tokenizer, changed, words = (load_tokenizer(qwen), load_tokenizer(qwen),
                                 "a b c d e f g h x y z".split())
    changed.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    results = [
        load(tokenizer, length=100),
        load(tokenizer, truncate_prompts=True),
        load(tokenizer, length=8, truncate_prompts=True),
        load(tokenizer, ("prompt", "completion"), truncate_prompts=True),
        load(tokenizer, length=100, chat=True),
        load(tokenizer, length=100, system_prompt="a"),
        load(tokenizer, length=100, system_prompt="b"),
        load(tokenizer, prompt_column="other"),
    ]
    assert len(set(map(tuple, results))) == len(results)
    assert load(changed, length=100, chat=True) == results[0] != results[4]
    for order in (words, words[::-1]):  # two tokenizers that had the same folder
        make_tokenizer(order).save_pretrained(tmp_path / "words")
        found = load_tokenizer(str(tmp_path / "words"))
        assert load(found) == [found.get_vocab()[word] for word in words[:8]]
    edited = data if edited_file == "data" else getattr(data, edited_file)
    monkeypatch.setattr(edited, "__file__", __file__)  # as if a student had edited it
    monkeypatch.setattr(data, "prompt_tokens", lambda *_: [[7], [7]])
    assert load(tokenizer, length=100) == [7]


def test_what_a_function_returns_is_never_kept(qwen, tmp_path):
    path = tmp_path / "rows.py"
    path.write_text("import datasets\n\ndef rows(split):\n"
                    "    return datasets.Dataset.from_list([{'prompt': split}])\n")
    for split in ("train", "test"):
        (row,) = load_rows(data_args(f"{path}:rows"), split, load_tokenizer(qwen), ["prompt"], 100)
        assert row["prompt"] == split


def test_a_folder_that_may_not_be_written_is_read(qwen, tmp_path, monkeypatch):
    datasets.Dataset.from_list(MIXED).save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    assert len(load_rows(data_args(str(tmp_path / "saved")), "train", load_tokenizer(qwen),
                         ["prompt"], 40)) > 3
    assert sorted((tmp_path / "saved").iterdir()) == before


def test_configurations_of_a_dataset(tmp_path):
    """A folder like a hub repository: main is taken of several, and any other by its name."""
    folder = tmp_path / "data"
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / config / f"{split}.jsonl").write_text(
                json.dumps({"question": f"{config} {split}"}))
    listed = [{"config_name": config, "data_files": [{"split": s, "path": f"{config}/{s}.jsonl"}
                                                     for s in ("train", "test")]}
              for config in ("main", "socratic")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")
    assert load_dataset(str(folder), "test")["question"][:] == ["main test"]
    assert load_dataset(str(folder), "train", "socratic")["question"][:] == ["socratic train"]


def test_several_rewards_are_weighted_and_logged_by_name(world, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def size(completions, **_):\n    return [float(len(c.split())) for c in completions]\n\n\n"
        "def one(completions, **_):\n    return [1.0] * len(completions)\n")
    names = (f"{tmp_path}/rewards.py:size", f"{tmp_path}/rewards.py:one", world.reward)
    flags = world.flags | {"reward": names, "reward_weights": (0.5, -2.0, 3.0),
                           "missing_eos_penalty": 0.0}
    rloo.main(rloo.Args(**flags, output=str(tmp_path / "run")))
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    for at in ("objective", "eval"):
        value = lambda name: [event.value for event in log.Scalars(f"{at}/{name}")]
        size, one, classifier = (value(f"reward/{name}") for name in ("size", "one", "reward"))
        total = value("scores" if at == "objective" else "score")
        assert one == [1.0] * len(total) and len(set(size)) > 1
        assert [0.5 * a - 2 * b + 3 * c
                for a, b, c in zip(size, one, classifier)] == pytest.approx(total, abs=1e-5)


def test_a_reward_may_have_any_name(world, tmp_path):
    (tmp_path / "a.py").write_text(
        "def score(completions, **_):\n    return [1.0] * len(completions)\n\n\n"
        "def kl(completions, **_):\n    return [100.0] * len(completions)\n")
    names = (f"{tmp_path}/a.py:score", f"{tmp_path}/a.py:kl")
    reward_fns = load_rewards(reward_args(reward=names, reward_weights=(1.0, 0.5)), CPU)
    found = score(reward_fns, world.tokenizer, encode(world.tokenizer, [[1]], ["a"], CPU),
                  {"prompt": ["a"]})
    assert {name: value.tolist() for name, value in found.items()} == {
        "score": [51.0], "reward/score": [1.0], "reward/kl": [100.0]}


def test_sft_learns_from_a_messages_column(qwen, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(
        json.dumps({"messages": [turn("user", "hi"), turn("assistant", "5")]}) for _ in "abcd"))
    fields = {field.name for field in dataclasses.fields(sft.Args)}
    assert {"chat", "system_prompt", "prompt_column", "dataset_config",
            "truncate_prompts"} <= fields
    flags = dict(model=qwen, dataset=str(path), num_updates=30, batch_size=4, lr=1e-2,
                 warmup_updates=0, device="cpu")
    policy = sft.main(sft.Args(**flags, output=str(tmp_path / "run")))
    ids = load_rows(data_args(str(path)), "train", load_tokenizer(qwen), ["prompt"],
                    100)[0]["prompt_ids"]
    assert (policy(torch.tensor([ids])).logits[0, -1].argmax()
            == load_tokenizer(qwen)("5")["input_ids"][0])
