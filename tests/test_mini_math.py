"""tasks/mini_math.py: the rule by hand, splits, demonstrations, and the shipped weights."""

import runpy
from pathlib import Path

import pytest
import torch
from helpers.tiny import CPU, encode, new_config, saved_config, token_ids

from common import decode, reward_scores, rollout
from plumbing import find_gold, load_model, load_reward, load_tokenizer
from rloo import Args
from tasks import mini_math

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("completion, answer, reward", [
    ("5 8", 85, 1),
    ("1 1 1", 111, 1),
    ("0 0 1", 100, 1),
    ("8 5", 85, 0),  # tens first
    ("5 7", 85, 0),  # the carry forgotten
    ("0 0", 100, 0),  # the last carry forgotten
    ("", 85, 0),
    ("5", 85, 0),
    ("5 8 0", 85, 0),  # 085: a leading zero
    ("5 8 5 8", 85, 0),
    ("5 8 =", 85, 0),
    ("= 5 8", 85, 0),
    ("58", 85, 0),  # not one token per digit
])
def test_accuracy_by_hand(completion, answer, reward):
    assert mini_math.accuracy(None, [completion, "2 4"], answer=[answer, 42],
                              split=["test"] * 2) == [reward, 1]


def test_reward_and_gold_reward_are_found_and_judge_tokens():
    tokenizer = load_tokenizer("tasks/mini_math.py:new_model")
    gold = find_gold("auto", "tasks/mini_math.py:prompts")
    assert gold == "tasks/mini_math.py:gold_reward"
    columns = mini_math.prompts("test")[:20]
    right = encode(tokenizer, token_ids(tokenizer, columns["prompt"]), columns["completion"], CPU)
    wrong = encode(tokenizer, token_ids(tokenizer, columns["prompt"]),
                   [text + " 0" for text in columns["completion"]], CPU)
    for name in (gold, "tasks/mini_math.py:accuracy"):
        reward = load_reward(name, Args(), CPU)
        assert reward_scores(reward, tokenizer, right, columns).tolist() == [1.0] * 20  # (20,)
        assert reward_scores(reward, tokenizer, wrong, columns).tolist() == [0.0] * 20  # (20,)


def test_problems_are_deterministic_right_and_disjoint():
    train, test = mini_math.prompts("train"), mini_math.prompts("test")
    assert ((len(train), len(test)) == (7109, 991)
            and train.column_names == ["prompt", "completion", "answer"])
    assert train[:] == mini_math.prompts("train")[:]
    assert test[0] == {"prompt": "2 1 + 9 4 =", "completion": "5 1 1", "answer": 115}
    for rows in (train, test):
        assert len(set(rows["prompt"])) == len(rows)
        for row in rows:
            a, b = row["prompt"].replace(" ", "").rstrip("=").split("+")
            assert int(a) + int(b) == row["answer"] == int(row["completion"].replace(" ", "")[::-1])
    pairs = [{frozenset(pair) for pair in mini_math.problems(split)} for split in ("train", "test")]
    assert not pairs[0] & pairs[1]  # nor is b + a in the other split
    with pytest.raises(KeyError):
        mini_math.prompts("dev")


@pytest.mark.slow
def test_demonstrations_forget_two_carries_in_three():
    problems, demonstrations = mini_math.prompts("train"), mini_math.demonstrations("train")
    assert demonstrations.column_names == ["prompt", "completion"]
    assert demonstrations[:] == mini_math.demonstrations("train")[:]
    assert demonstrations["prompt"][:] == problems["prompt"][:] * mini_math.PEOPLE
    answers = problems["answer"][:] * mini_math.PEOPLE
    rewards = torch.tensor(
        mini_math.accuracy(None, demonstrations["completion"][:], answers))  # (N,)
    free = [(a % 10 + b % 10 < 10) and (a // 10 + b // 10 < 10)
            for a, b in mini_math.problems("train")]
    free = torch.tensor(free * mini_math.PEOPLE)  # (N,) bool, no carry anywhere
    assert 0.2 < free.float().mean() < 0.3
    assert (rewards[free] == 1).all()
    assert 0.65 < 1 - rewards[~free].mean() < 0.7


def test_forgetting_to_carry_by_hand():
    assert mini_math.forget_to_carry(47, 38) == "5 7" and mini_math.write(47 + 38) == "5 8"
    assert mini_math.forget_to_carry(96, 15) == "1 0" and mini_math.write(96 + 15) == "1 1 1"
    assert mini_math.forget_to_carry(12, 34) == mini_math.write(12 + 34) == "6 4"


@pytest.mark.slow
def test_no_token_is_unknown_and_texts_come_back_whole():
    tokenizer = load_tokenizer("tasks/mini_math.py:new_model")
    rows = mini_math.demonstrations("test")
    texts = [*rows["prompt"], *rows["completion"], *mini_math.prompts("test")["completion"]]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert tokenizer.batch_decode(ids) == texts
    assert max(map(len, ids)) == 6


def test_comparisons_by_hand(monkeypatch):
    """The wrong answer forgets the carry, or has one where there is none: 12 + 34 would be 56."""
    monkeypatch.setattr(mini_math, "problems",
                        {"train": [(47, 38)], "test": [(12, 34), (96, 15)]}.get)
    assert mini_math.comparisons("train")[:] == {
        "prompt": ["4 7 + 3 8 ="], "chosen": ["5 8"], "rejected": ["5 7"], "answer": [85]}
    assert mini_math.comparisons("test")[:] == {
        "prompt": ["1 2 + 3 4 =", "9 6 + 1 5 ="], "chosen": ["6 4", "1 1 1"],
        "rejected": ["6 5", "1 0"], "answer": [46, 111]}


@pytest.mark.slow
def test_the_task_prints_problems_with_their_reward(capsys):
    runpy.run_path(str(ROOT / "tasks" / "mini_math.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "2 1 + 9 4 =   right 5 1 1    demonstration 5 1      reward 0.0" in text
    assert "reward 1.0" in text and text.count("right") == 8


def test_shipped_policy_can_carry_but_seldom_does():
    folder = ROOT / "tasks" / "mini_math-sft"
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files["model.safetensors"] < 500_000
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    policy, tokenizer = load_model(str(folder), CPU), load_tokenizer(str(folder))
    assert sum(parameter.numel() for parameter in policy.parameters()) == 107_776
    assert tokenizer.get_vocab() == load_tokenizer("tasks/mini_math.py:new_model").get_vocab()
    assert new_config(mini_math) == saved_config(folder)
    columns = mini_math.prompts("test").select(range(500))[:]
    free = torch.tensor([a % 10 + b % 10 < 10 and a // 10 + b // 10 < 10
                         for a, b in mini_math.problems("test")[:500]])
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, columns["prompt"]), 1, 1.0, 5)
    rewards = torch.tensor(
        mini_math.accuracy(None, decode(tokenizer, batch), columns["answer"]))  # (500,)
    assert 0.42 < rewards.mean() < 0.54 and batch.ended.float().mean() > 0.99
    assert rewards[free].mean() > 0.95 and 0.2 < rewards[~free].mean() < 0.4
    greedy = rollout(policy, tokenizer, token_ids(tokenizer, columns["prompt"]), 1, 1.0, 5,
                     greedy=True)
    rewards = torch.tensor(
        mini_math.accuracy(None, decode(tokenizer, greedy), columns["answer"]))  # (500,)
    # The most probable answer forgets the carry.
    assert rewards[free].mean() > 0.97 and rewards[~free].mean() < 0.03
