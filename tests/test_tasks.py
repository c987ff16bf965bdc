"""tasks/mini_tldr.py: the gold reward by hand, determinism, splits, and the shipped weights."""

import hashlib
import json
import math
import random
import runpy
from pathlib import Path

import pytest
import torch
from helpers.tiny import CPU, encode, new_config, saved_config, token_ids

from common import decode, reward_scores, rollout
from plumbing import load_model, load_reward, load_tokenizer
from rloo import Args
from tasks import mini_tldr, rouge

ROOT = Path(__file__).parent.parent
FACTS = dict(who="sister", did="sold", thing="bike", where="party", when="week", feeling="sad",
             question="help")
FULL = "my sister sold my bike at the party last week , i feel sad , should i help them ?"


@pytest.mark.parametrize("summary, gold, parts", [
    (FULL, 7, {"covered": 7}),
    ("my sister sold my bike .", 3, {"covered": 3}),
    ("last week , my sister sold my bike at the party and now i am sad . should i help them ?",
     7, {"covered": 7}),
    ("my sister sold my laptop .", 1, {"covered": 2, "hallucinated": 1}),
    ("my sister sold my bike", 2, {"covered": 3, "no_end": 1}),
    ("basically my sister sold my bike .", 2.75, {"covered": 3, "redundant": 1}),
    ("so yeah my sister sold my bike sold my bike .",
     1.5, {"covered": 3, "redundant": 4, "joints": 1}),
    ("sister bike .", 1, {"covered": 2, "joints": 2}),
    (" ".join([FULL] * 2),
     7 - 7 * 0.25 - 0.5 - 16 * 0.1, {"covered": 7, "redundant": 7, "joints": 1, "overlength": 16}),
    ("", -1, {"no_end": 1}),
])
def test_gold_reward_by_hand(summary, gold, parts):
    counted = mini_tldr.gold_parts(summary, FACTS)
    assert {name: count for name, count in counted.items() if count} == parts
    columns = {slot: [word, word] for slot, word in FACTS.items()}
    assert mini_tldr.gold_reward(None, [summary, FULL], **columns) == pytest.approx([gold, 7])


def test_rouge_l_by_hand():
    texts = ["police killed the gunman", "police kill the gunman", "the gunman kill police",
             "The  Cat", "", "a b c d"]
    references = ["police killed the gunman"] * 3 + ["the cat sat", "a", ""]
    expected = [1, 3 / 4, 2 / 4, 4 / 5, 0, 0]  # the first three are the example of Lin 2004
    assert rouge.rouge_l(["p"] * 6, texts, references, other=[1] * 6) == pytest.approx(expected)
    assert rouge.rouge_l(["p"], [[{"role": "assistant", "content": "b a c"}]],
                         ["a b c"]) == pytest.approx([2 / 3])
    once = rouge.rouge_l(["p"] * 2, ["the", "the the"], ["the the", "the"])  # a word matches one
    assert once == pytest.approx([2 / 3, 2 / 3])
    assert rouge.rouge_l(["p"] * 2, ["the cat", "THE CAT"], ["The CAT", "the cat"]) == [1, 1]


@pytest.mark.slow
def test_posts_are_deterministic_and_hold_their_facts():
    train, test = mini_tldr.prompts("train"), mini_tldr.prompts("test")
    assert train[17] == mini_tldr.prompts("train")[17]
    assert (len(train), len(test)) == (20_000, 1000)
    assert not set(train["prompt"]) & set(test["prompt"])
    assert train.column_names == ["prompt", "completion", *mini_tldr.SLOTS]
    assert mini_tldr.demonstrations("test").column_names == ["prompt", "completion"]
    for row in test.select(range(200)):
        facts = [row[slot] for slot in mini_tldr.SLOTS]
        assert set(facts) <= set(row["prompt"].split()) and row["prompt"].endswith(" TL;DR:")
        parts = mini_tldr.gold_parts(row["completion"],
                                     {slot: row[slot] for slot in mini_tldr.SLOTS})
        # A reference has no faults.
        assert parts["covered"] >= 3 and sum(parts.values()) == parts["covered"]


def test_demonstrations_are_worse_than_references():
    rows = [mini_tldr.example("train", i) for i in range(2000)]
    columns = {slot: [row[slot] for row in rows] for slot in mini_tldr.SLOTS}
    gold = {kind: torch.tensor(mini_tldr.gold_reward(None, [row[kind] for row in rows], **columns))
            for kind in ("reference", "demonstration")}
    assert 5.2 < gold["reference"].mean() < 5.6 and 3.3 < gold["demonstration"].mean() < 4.0
    assert (gold["demonstration"] > gold["reference"]).float().mean() < 0.2


def test_no_word_is_unknown_and_texts_come_back_whole():
    tokenizer = load_tokenizer("tasks/mini_tldr.py:new_model")
    rows = [mini_tldr.example("train", i) for i in range(500)]
    texts = [row[kind] for row in rows for kind in ("prompt", "reference", "demonstration")]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert tokenizer.batch_decode(ids) == texts
    assert max(map(len, ids)) <= 80


def test_an_edit_changes_one_fact_word():
    rng = random.Random(0)
    for i in range(100):
        post = mini_tldr.example("train", i)
        facts = {slot: post[slot] for slot in mini_tldr.SLOTS}
        before, after = (post["demonstration"].split(),
                         mini_tldr.edit(post["demonstration"], facts, rng).split())
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        ((old, new),) = changed
        assert mini_tldr.SLOT_OF[old] == mini_tldr.SLOT_OF[new]
        assert (old in facts.values()) != (new in facts.values())


def test_posts_are_those_that_the_shipped_weights_have_seen():
    posts = [mini_tldr.example(split, i) for split in ("train", "test") for i in range(1000)]
    assert posts[1000]["reference"] == "my friend cracked my lamp . i am hurt ."
    assert (posts[1000]["demonstration"]
            == "my mother cracked my lamp at the church , should i ignore them ?")
    digest = hashlib.sha256(json.dumps(posts).encode()).hexdigest()
    assert digest == "8b60df1839e780a813c6a52c1d5ac74e821f27718b1c7b91603ee0ecbd060745"


@pytest.fixture
def pairs(monkeypatch):
    """2000 preferences on 900 posts: (post, first summary, other, its kind, is the first chosen).

    The policy's two samples are fixed: the first has 3 facts, and the second is as good as none.
    """
    # on which the shipped reward model was trained
    assert mini_tldr.PAIRS == {"train": 96_000, "test": 2000}
    posts, calls = [mini_tldr.example("test", i % 900) for i in range(2000)], []
    first = lambda post: "my {who} {did} my {thing} .".format(**post)

    def rollout(policy, tokenizer, prompt_ids, *settings):
        rows = slice(500 * len(calls), 500 * len(calls) + len(prompt_ids))
        assert tokenizer.batch_decode(prompt_ids) == [post["prompt"] for post in posts[rows]]
        calls.append((len(prompt_ids), *settings, torch.initial_seed()))
        return rows

    monkeypatch.setattr("common.rollout", rollout)
    monkeypatch.setattr("common.decode", lambda _, rows: [text for post in posts[rows]
                                                          for text in (first(post), ".")])
    monkeypatch.setitem(mini_tldr.POSTS, "test", 900)
    state = torch.get_rng_state()
    rows = mini_tldr.preferences("test")
    assert calls == [(500, 2, 1.0, 32, 0)] * 4 and torch.equal(torch.get_rng_state(), state)
    assert rows.column_names == ["prompt", "chosen", "rejected", *mini_tldr.SLOTS]
    found = []
    for post, row in zip(posts, rows, strict=True):
        assert all(row[name] == post[name] for name in ("prompt", *mini_tldr.SLOTS))
        ours = row["chosen"] == first(post)
        other = row["rejected" if ours else "chosen"]
        assert ours or row["rejected"] == first(post)
        kind = {".": "sample", post["reference"]: "reference"}.get(other, "edit")
        found.append((post, first(post), other, kind, ours))
    return found


def within(count, probabilities):
    """Whether a count is within three standard deviations of what these probabilities say."""
    return abs(count - sum(probabilities)) < 3 * math.sqrt(sum(p * (1 - p) for p in probabilities))


def test_preferences_are_a_noisy_annotators(pairs):
    """Of a sample over another (3 in 8), the reference (1) or one with a changed word (4)."""
    for kind, share in (("sample", 3 / 8), ("reference", 1 / 8), ("edit", 4 / 8)):
        rows = [row for row in pairs if row[3] == kind]
        assert within(len(rows), [share] * 2000)
        chances = []
        for post, *texts, _, _ in rows:
            good, bad = mini_tldr.gold_reward(None, texts, **{slot: [post[slot]] * 2
                                                              for slot in mini_tldr.SLOTS})
            chances.append(1 / (1 + math.exp(2 * (bad - good))))
        assert within(sum(ours for *_, ours in rows), chances)
    for _, ours, other, kind, _ in pairs:
        assert kind != "edit" or sum(map(str.__ne__, ours.split(), other.split())) == 1


def test_comparisons_are_the_first_preferences(monkeypatch):
    monkeypatch.setattr(mini_tldr, "preferences", lambda *given: given)
    assert [mini_tldr.comparisons(split)
            for split in ("train", "test")] == [("train", 8000), ("test", 1000)]


def test_the_task_prints_posts_with_their_gold_reward(capsys):
    runpy.run_path(str(ROOT / "tasks" / "mini_tldr.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert text.count("post ") == 4 and "gold 4.00 = covered 4 x +1" in text


@pytest.mark.slow
def test_shipped_policy_and_reward_model_are_what_the_readme_says():
    """On 500 held-out posts the SFT policy has room to grow, and the reward model sees where."""
    for folder in ("mini_tldr-sft", "mini_tldr-reward"):
        files = {path.name: path.stat().st_size for path in (ROOT / "tasks" / folder).iterdir()}
        assert files["model.safetensors"] < 1_100_000
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    folder = str(ROOT / "tasks" / "mini_tldr-sft")
    policy, tokenizer = load_model(folder, CPU), load_tokenizer(folder)
    assert sum(parameter.numel() for parameter in policy.parameters()) == 223_104
    assert new_config(mini_tldr) == saved_config(folder)
    args = Args(microbatch_tokens=16384)
    reward, gold = (load_reward(name, args, CPU) for name in ("tasks/mini_tldr-reward",
                                                              "tasks/mini_tldr.py:gold_reward"))
    posts = mini_tldr.prompts("test").select(range(500))
    columns = posts[:]
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, columns["prompt"]), 2, 0.7, 32)
    scores, golds = (reward_scores(which, tokenizer, batch, columns).view(-1, 2)
                     for which in (reward, gold))  # (500, 2)
    texts = encode(tokenizer, token_ids(tokenizer, columns["prompt"]), columns["completion"], CPU)
    references = reward_scores(gold, tokenizer, texts, columns)  # (500,)
    wins = (golds > references[:, None]).float() + 0.5 * (golds == references[:, None])
    assert 0.18 < wins.mean() < 0.28 and batch.ended.float().mean() > 0.99
    differ = golds[:, 0] != golds[:, 1]
    right = ((scores[:, 0] > scores[:, 1]) == (golds[:, 0] > golds[:, 1]))[differ].float().mean()
    assert right > 0.78
    assert len(decode(tokenizer, batch)) == 1000
