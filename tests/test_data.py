"""Datasets by TRL's conventions or by flags, and rewards that are several."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.families import save_family
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from helpers.tiny import CPU, data_args

import rloo
import sft
from common import encode
from plumbing import load_dataset, load_rows, load_tokenizer, shorten
from runs import load_rewards


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("qwen"), "qwen2")


@pytest.fixture
def rows(qwen, tmp_path):
    """Write rows to a file, and read them back through load_rows."""

    def read(rows, columns=("prompt",), max_length=200, first=None, **flags):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_rows(data_args(str(path), **flags), "train", load_tokenizer(qwen), list(columns), max_length, first)

    return read


def turn(role, content):
    return {"role": role, "content": content}


def test_columns_are_found_or_named(rows):
    given = [{"query": "a", "reply": "b", "other": 3, "prompt": "not this"}]
    found = rows(given, ["prompt", "completion"], prompt_column="query", completion_column="reply")[0]
    assert (found["prompt"], found["completion"], found["other"]) == ("a", "b", 3)
    assert rows([{"question": "a", "answer": "#### 1"}])[0]["prompt"] == "a"  # openai/gsm8k
    assert rows([{"prompt": "a"}], completion_column="reference")[0]["prompt"] == "a"  # not needed, not there


def test_chat_messages_go_through_the_template(rows, qwen):
    tokenizer = load_tokenizer(qwen)
    user = [turn("user", "What is 2 + 3?")]
    expected = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    for found in (rows([{"prompt": user}])[0], rows([{"prompt": user[0]["content"]}], chat=True)[0]):
        assert tokenizer.decode(found["prompt_ids"]) == expected
        assert found["prompt"] == user
    found = rows([{"prompt": "What is 2 + 3?"}], system_prompt="Be brief.")[0]
    assert tokenizer.decode(found["prompt_ids"]) == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected
    own = [turn("system", "Be kind."), *user]
    assert rows([{"prompt": own}], system_prompt="Be brief.")[0]["prompt"] == own
    plain = rows([{"prompt": "What is 2 + 3?"}])[0]
    assert tokenizer.decode(plain["prompt_ids"]) == "What is 2 + 3?"


def test_conversations_and_pairs_of_conversations(rows):
    talk = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    found = rows([{"messages": [*talk, turn("assistant", "d")]}], ["prompt", "completion"])[0]
    assert found["prompt"] == talk and found["completion"] == "d"
    pair = {"chosen": [*talk, turn("assistant", "good")], "rejected": [*talk, turn("assistant", "bad")]}
    found = rows([pair], ["prompt", "chosen", "rejected"])[0]
    assert found["prompt"] == talk and (found["chosen"], found["rejected"]) == ("good", "bad")


def test_the_prompt_of_hh_transcripts_is_what_both_share(rows):
    start = "\n\nHuman: What is 2 + 3?\n\nAssistant: Why?\n\nHuman: Please.\n\nAssistant:"
    pair = {"chosen": f"{start} It is 5.", "rejected": f"{start} It is none of your business."}
    found = rows([pair], ["prompt", "chosen", "rejected"])[0]
    assert found["prompt"] == start
    assert (found["chosen"], found["rejected"]) == (" It is 5.", " It is none of your business.")
    found = rows([pair], ["prompt", "completion"], completion_column="chosen")[0]  # what sft.py learns from
    assert (found["prompt"], found["completion"]) == (start, " It is 5.")
    other = {"chosen": "Say: hello there", "rejected": "Say: help me"}  # no turns: up to the last common word
    assert rows([other], ["prompt", "chosen", "rejected"])[0]["prompt"] == "Say: "


def test_long_prompts_are_left_out_and_counted_or_cut_off_at_the_left(rows, qwen, capsys):
    tokenizer = load_tokenizer(qwen)
    given = [{"prompt": "a b c d e f g h i j"}, {"prompt": "a b"}]
    assert [row["prompt"] for row in rows(given, max_length=10)] == ["a b"]
    assert "dropped 1 of 2 rows with more than 10 tokens" in capsys.readouterr().out
    kept = rows(given, max_length=10, truncate_prompts=True)
    assert len(kept) == 2 and len(kept[0]["prompt_ids"]) == 10
    assert kept[0]["prompt_ids"] == tokenizer(given[0]["prompt"])["input_ids"][-10:]
    both = rows([given[0] | {"completion": "x y z"}], ["prompt", "completion"], 12, truncate_prompts=True)
    assert len(both[0]["prompt_ids"]) == 12 - len(tokenizer("x y z")["input_ids"]) - 1  # and its EOS


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


def test_configurations_of_a_dataset(tmp_path):
    """A folder like a repository of the hub: main is taken where there are several, any other by its name."""
    folder = tmp_path / "data"
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / config / f"{split}.jsonl").write_text(json.dumps({"question": f"{config} {split}"}))
    listed = [
        {"config_name": config, "data_files": [{"split": s, "path": f"{config}/{s}.jsonl"} for s in ("train", "test")]}
        for config in ("main", "socratic")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")
    assert load_dataset(str(folder), "test")["question"][:] == ["main test"]
    assert load_dataset(str(folder), "train", "socratic")["question"][:] == ["socratic train"]


def test_several_rewards_are_weighted_and_logged_by_name(world, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def size(completions, **_):\n    return [float(len(c.split())) for c in completions]\n\n\n"
        "def one(completions, **_):\n    return [1.0] * len(completions)\n"
    )
    names = (f"{tmp_path}/rewards.py:size", f"{tmp_path}/rewards.py:one", world.reward)
    flags = world.flags | {"reward": names, "reward_weights": (0.5, -2.0, 3.0), "missing_eos_penalty": 0.0}
    rloo.main(rloo.Args(**flags, output=str(tmp_path / "run")))
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    for at in ("objective", "eval"):
        value = lambda name: [event.value for event in log.Scalars(f"{at}/{name}")]
        size, one, classifier = (value(f"reward/{name}") for name in ("size", "one", "reward"))
        total = value("scores" if at == "objective" else "score")
        assert one == [1.0] * len(total) and len(set(size)) > 1
        assert [0.5 * a - 2 * b + 3 * c for a, b, c in zip(size, one, classifier)] == pytest.approx(total, abs=1e-5)


def test_a_reward_may_have_any_name(world, tmp_path):
    (tmp_path / "a.py").write_text(
        "def score(completions, **_):\n    return [1.0] * len(completions)\n\n\n"
        "def kl(completions, **_):\n    return [100.0] * len(completions)\n"
    )
    names = (f"{tmp_path}/a.py:score", f"{tmp_path}/a.py:kl")
    load = SimpleNamespace(
        reward=names, reward_weights=(1.0, 0.5), gold="none", dataset="", dtype="float32", shard=False,
        microbatch_tokens=100,
    )  # fmt: skip
    reward_fn = load_rewards(load, world.tokenizer, CPU)["score"]
    found = reward_fn(encode(world.tokenizer, [[1]], ["a"], CPU), {"prompt": ["a"]})
    assert {name: value.tolist() for name, value in found.items()} == {
        "score": [51.0],
        "reward/score": [1.0],
        "reward/kl": [100.0],
    }


def test_sft_learns_from_a_messages_column(qwen, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [turn("user", "hi"), turn("assistant", "5")]}) for _ in "abcd"))
    fields = {field.name for field in dataclasses.fields(sft.Args)}
    assert {"chat", "system_prompt", "prompt_column", "dataset_config", "truncate_prompts"} <= fields
    flags = dict(model=qwen, dataset=str(path), num_updates=30, batch_size=4, lr=1e-2, warmup_updates=0, device="cpu")
    policy = sft.main(sft.Args(**flags, output=str(tmp_path / "run")))
    ids = load_rows(data_args(str(path)), "train", load_tokenizer(qwen), ["prompt"], 100)[0]["prompt_ids"]
    assert policy(torch.tensor([ids])).logits[0, -1].argmax() == load_tokenizer(qwen)("5")["input_ids"][0]
