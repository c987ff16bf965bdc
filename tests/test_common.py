"""common.py: rollout, log-probs, masks, rewards, data."""

import json
import math
import random

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.tiny import (CPU, data_args, encode, load_scorer, make_policy, make_tokenizer,
                          reward_args, save_classifier, save_policy, token_ids)
from transformers import AutoModelForSequenceClassification, set_seed

from common import (Batch, evaluate, no_grad_logprobs, microbatches, minibatches, pad,
                    positions, rollout, sequence_rewards, token_kl, token_logprobs, wins)
from plumbing import (batches, eos_ids, isolated_rng, load_dataset, load_model, load_rewards,
                      load_rows, load_tokenizer, random_states, set_random_states)
from plumbing.rewards import Reward, Rewards

WORDS = "a b c d e f".split()
PROMPTS = ["a b c", "d", "e f a b c d", "f f"]


@pytest.fixture
def tokenizer():
    return make_tokenizer(WORDS)


@pytest.fixture(params=["plain", "fast"])
def policy(tokenizer, request):
    model = make_policy(len(tokenizer), tokenizer.eos_token_id)
    model.is_fast, model.shares_prompts = request.param == "fast", True
    return model


# ------------------------------------------------------------------------------------------ rollout


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_are_those_of_a_forward_pass(policy, tokenizer, temperature):
    """Prompts of different lengths, rows that end early: still what the model says of each row."""
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, PROMPTS), 8, temperature, 12)
    lengths = batch.response_mask.sum(1)
    assert lengths.min() < lengths.max() and batch.ended.any()
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(policy, batch, temperature), batch.old_logprobs,
                                   rtol=1e-4, atol=1e-5)
        for row in range(len(batch)):  # alone, without padding, against softmax(logits / T) itself
            ids = torch.cat([batch.prompts[row][batch.prompt_mask[row]],
                             batch.responses[row][batch.response_mask[row]]])
            logprobs = (policy(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
            alone = logprobs.gather(1, ids[1:, None])[-lengths[row] :, 0]
            torch.testing.assert_close(batch.old_logprobs[row][: lengths[row]], alone,
                                       rtol=1e-4, atol=1e-5)


def test_rollout_is_prompt_major_and_stops_at_the_first_eos(policy, tokenizer):
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, PROMPTS), 3, 1.0, 10)
    assert ([tokenizer.decode(p[m]) for p, m in zip(batch.prompts, batch.prompt_mask)]
            == [p for p in PROMPTS for _ in range(3)])
    for row in range(len(batch)):
        written = batch.responses[row][batch.response_mask[row]].tolist()
        assert batch.ended[row].item() == (tokenizer.eos_token_id in written)
        assert tokenizer.eos_token_id not in written[:-1]
        assert batch.ended[row] or len(written) == batch.responses.shape[1] == 10
        assert (batch.response_mask[row].tolist()
                == sorted(batch.response_mask[row].tolist(), reverse=True))
    assert (batch.old_logprobs[~batch.response_mask] == 0).all()


def test_rollout_samples_the_softmax_whatever_the_generation_config_says(policy, tokenizer):
    config = policy.generation_config
    (config.top_k, config.top_p, config.temperature, config.repetition_penalty,
     config.do_sample) = 1, 0.1, 9.0, 5.0, False
    torch.manual_seed(0)
    n, temperature = 4000, 0.7
    batch = rollout(policy, tokenizer, token_ids(tokenizer, ["a b c"]), n, temperature, 1)
    with torch.no_grad():
        ids = tokenizer("a b c", return_tensors="pt")["input_ids"]
        probs = (policy(ids).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(batch.responses[:, 0], minlength=len(probs))
    expected = n * probs
    common = expected > 5
    assert common.sum() >= 3
    chi2 = ((counts - expected) ** 2 / expected)[common].sum()
    assert chi2 < 25  # 7 degrees of freedom at most: exceeded once in a thousand


def test_greedy_rollout_takes_the_most_probable_token(policy, tokenizer):
    batch = rollout(policy, tokenizer, token_ids(tokenizer, PROMPTS), 1, 0.5, 5, greedy=True)
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            ids = tokenizer(prompt)["input_ids"]
            for token in batch.responses[row][batch.response_mask[row]].tolist():
                assert policy(torch.tensor([ids])).logits[0, -1].argmax() == token
                ids = [*ids, token]


@pytest.mark.parametrize("pad_token", [None, "<eos>", "<pad>"])
def test_eos_is_part_of_the_response_whatever_the_pad_token_is(pad_token, tmp_path):
    tokenizer = make_tokenizer(WORDS, pad=pad_token)
    folder = save_policy(tmp_path / "policy", tokenizer)
    tokenizer, policy = load_tokenizer(folder), load_model(folder, CPU)
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, PROMPTS), 8, 1.0, 12)
    assert batch.ended.any() and not batch.ended.all()
    last = batch.response_mask.sum(1) - 1
    last_tokens = batch.responses[torch.arange(len(batch)), last]
    assert ((last_tokens == tokenizer.eos_token_id) == batch.ended).all()
    logprobs = token_logprobs(policy, batch, 1.0)
    assert (logprobs[torch.arange(len(batch)), last] != 0).all()  # the EOS token itself is trained
    given = encode(tokenizer, token_ids(tokenizer, ["a b"]), ["c d"], CPU)
    assert given.responses[0].tolist() == tokenizer("c d")["input_ids"] + [tokenizer.eos_token_id]
    assert given.response_mask.all()


def test_every_eos_id_of_the_generation_config_ends_a_response(policy, tokenizer):
    other = tokenizer("f")["input_ids"][0]
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    assert eos_ids(policy, tokenizer).tolist() == sorted([tokenizer.eos_token_id, other])
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, PROMPTS), 16, 1.0, 12)
    last = batch.responses[torch.arange(len(batch)), batch.response_mask.sum(1) - 1]
    assert {tokenizer.eos_token_id, other} <= set(last[batch.ended].tolist())
    before_last = batch.response_mask.clone()
    before_last[torch.arange(len(batch)), batch.response_mask.sum(1) - 1] = False
    assert not torch.isin(batch.responses[before_last], eos_ids(policy, tokenizer)).any()


# ------------------------------------------------------------------------------------ log-probs, KL


def test_logprobs_do_not_depend_on_padding_or_on_the_other_rows(policy, tokenizer):
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, PROMPTS), 4, 1.0, 12)
    together = no_grad_logprobs(policy, batch, 1.0, 100_000)
    torch.testing.assert_close(no_grad_logprobs(policy, batch, 1.0, 1), together,
                               rtol=1e-4, atol=1e-5)
    wider = Batch(
        torch.nn.functional.pad(batch.prompts, (3, 0), value=4),
        torch.nn.functional.pad(batch.prompt_mask, (3, 0)),
        torch.nn.functional.pad(batch.responses, (0, 2), value=5),
        torch.nn.functional.pad(batch.response_mask, (0, 2)),
        batch.ended,
        torch.nn.functional.pad(batch.old_logprobs, (0, 2)))
    torch.testing.assert_close(no_grad_logprobs(policy, wider, 1.0, 500)[:, :-2], together,
                               rtol=1e-4, atol=1e-5)


def test_kl_is_policy_minus_reference_and_its_mean_is_the_kl(policy, tokenizer):
    assert token_kl(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -7.0]]),
                    torch.tensor([[True, False]])).tolist() == [[0.5, 0]]
    assert sequence_rewards(torch.tensor([2.0]), torch.tensor([[0.5, 1.0]]),
                            0.1).item() == pytest.approx(1.85)
    reference = make_policy(len(tokenizer), tokenizer.eos_token_id, seed=7)
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, ["a b c"]), 4000, 1.0, 1)
    kl = token_kl(batch.old_logprobs, no_grad_logprobs(reference, batch, 1.0, 10**6),
                  batch.response_mask).sum(1)
    ids = torch.tensor([tokenizer("a b c")["input_ids"]])
    with torch.no_grad():
        p, q = (model(ids).logits[0, -1].log_softmax(-1) for model in (policy, reference))
    exact = (p.exp() * (p - q)).sum()
    assert abs(kl.mean() - exact) < 4 * kl.std() / math.sqrt(len(kl)) and exact > 0.1


@pytest.mark.parametrize("shares", [True, False])
def test_microbatches_cover_every_row_once_within_the_budget(shares, policy, tokenizer):
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, token_ids(tokenizer, PROMPTS), 8, 1.0, 12)
    policy.shares_prompts = shares
    for budget in (1, 25, 60, 10_000):
        parts = list(microbatches(policy, budget, batch))
        assert sorted(torch.cat(parts).tolist()) == list(range(len(batch)))
        assert len(parts) == 1 if budget == 10_000 else len(parts) > 1
        for rows in parts:
            prompts = len(batch.prompts[rows].unique(dim=0)) if shares else len(rows)
            P, T = (mask[rows].sum(1).max() for mask in (batch.prompt_mask, batch.response_mask))
            if not policy.is_fast:  # all columns, for each row
                prompts, P, T = len(rows), batch.prompts.shape[1], batch.responses.shape[1]
            assert (len(rows) == 1
                    or prompts * P + len(rows) * T + (len(rows) - prompts) * P // 8 <= budget)
    assert (len(list(microbatches(policy, 60, batch, batch)))
            > len(list(microbatches(policy, 60, batch))))


@pytest.mark.parametrize("shares", [True, False])
def test_pairs_stay_within_the_budget_whichever_response_is_longer(shares, policy):
    """Both parts are padded to what a micro-batch holds: each pair's longer response counts."""
    lengths = torch.tensor([[1, 9], [9, 1], [2, 8], [8, 2], [1, 1], [9, 9]])  # (6, 2)
    prompts, long = torch.ones(6, 5, dtype=torch.bool), torch.arange(9)
    groups = [Batch(prompts.long(), prompts, mask.long(), mask, mask[:, 0], mask * 0.0)
              for mask in (long < length.unsqueeze(1) for length in lengths.T)]
    policy.shares_prompts = shares
    for budget in (28, 56, 84, 1000):
        parts = list(microbatches(policy, budget, *groups))
        assert sorted(torch.cat(parts).tolist()) == list(range(6))
        for rows in parts:
            prompts = 5 + (len(rows) - 1) * 5 // 8 if shares and policy.is_fast else 5 * len(rows)
            longest = lengths[rows].max() if policy.is_fast else 9
            assert len(rows) == 1 or 2 * (prompts + len(rows) * longest) <= budget


def test_a_prompt_that_runs_once_counts_once(policy):
    """Four rows of 100 + 10 tokens: 100 + 40, and 37 for 3 copies of the cache; 440 if unshared."""
    prompts, responses = (torch.ones(4, 100, dtype=torch.bool),
                          torch.ones(4, 10, dtype=torch.bool))
    batch = Batch(prompts.long(), prompts, responses.long(), responses, responses[:, 0],
                  responses * 0.0)
    for shares, whole in ((True, 100 + 40 + 37), (False, 440)):
        policy.shares_prompts = shares
        if policy.is_fast or not shares:
            assert [len(rows) for rows in microbatches(policy, whole, batch)] == [4]
            assert [len(rows) for rows in microbatches(policy, whole - 1, batch)] == [3, 1]


# ------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_reward_is_read_at_the_last_real_token(pad_token, tmp_path):
    """For each row alone, without padding: the head's output at EOS, or where it was cut off."""
    tokenizer = make_tokenizer(WORDS, pad=pad_token)
    folder = save_policy(tmp_path / "policy", tokenizer)
    score = load_scorer(save_classifier(tmp_path / "reward", folder, tokenizer), tokenizer, 60)
    model = load_model(str(tmp_path / "reward"), CPU, auto_class=AutoModelForSequenceClassification)
    torch.manual_seed(0)
    batch = rollout(load_model(folder, CPU), tokenizer, token_ids(tokenizer, PROMPTS), 4, 1.0, 8)
    assert batch.ended.any() and not batch.ended.all()
    scores = score(batch, {"prompt": PROMPTS})
    for row in range(len(batch)):
        ids = torch.cat([batch.prompts[row][batch.prompt_mask[row]],
                         batch.responses[row][batch.response_mask[row]]])
        with torch.no_grad():
            hidden = model.base_model(ids[None]).last_hidden_state
            torch.testing.assert_close(scores[row], model.score(hidden[0, -1])[0],
                                       rtol=1e-4, atol=1e-5)


def test_reward_model_with_another_tokenizer_gets_the_text_and_the_eos(tmp_path):
    mine, theirs = make_tokenizer(WORDS), make_tokenizer(WORDS[::-1])
    folder = save_policy(tmp_path / "theirs", theirs)
    reward = save_classifier(tmp_path / "reward", folder, theirs)
    batch = encode(mine, token_ids(mine, PROMPTS), ["a b", "c", "d e", "f"], CPU,
                   ended=[True, False, True, False])
    other = encode(theirs, token_ids(theirs, PROMPTS), ["a b", "c", "d e", "f"], CPU,
                   ended=[True, False, True, False])
    columns = {"prompt": PROMPTS}
    expected = load_scorer(reward, theirs, 1000)(other, columns)
    torch.testing.assert_close(load_scorer(reward, mine, 1000)(batch, columns), expected)
    all_ended = encode(theirs, token_ids(theirs, PROMPTS), ["a b", "c", "d e", "f"], CPU)
    assert not torch.allclose(load_scorer(reward, theirs, 1000)(all_ended, columns)[[1, 3]],
                              expected[[1, 3]])


def test_python_reward_gets_texts_and_the_columns_of_its_own_row(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("def check(prompts, completions, answer, completion):\n"
                    "    assert len(prompts) == len(completions) == len(answer) == 4\n"
                    "    return [10 * (p == 'a') + a + (c == 'c d') "
                    "for p, c, a in zip(prompts, completions, answer)]\n")
    tokenizer = make_tokenizer(WORDS)
    batch = encode(tokenizer, token_ids(tokenizer, ["a", "a", "b", "b"]), ["c d", "c", "c d", "d"],
                   CPU)
    score = load_scorer(f"{path}:check", tokenizer, 100)
    columns = {"prompt": ["a", "b"], "answer": [0.25, 0.5], "completion": ["x", "y"]}
    assert score(batch, columns).tolist() == [11.25, 10.25, 1.5, 0.5]


class EvaluateArgs:
    temperature, max_new_tokens, microbatch_tokens, eval_batch_size, seed = 1.0, 6, 1000, 3, 1


def rewards(score, judge="score", **held_out):
    """Rewards of functions (completions) -> numbers."""
    reward = lambda name, function: Reward(name, lambda completions, **_: function(completions))
    return Rewards({"score": reward("score", score)}, [1.0],
                   {name: reward(name, function) for name, function in held_out.items()}, judge)


def words(completions):
    return [float(len(text.split())) for text in completions]


def brevity(completions):
    return [-float(len(text.split())) for text in completions]


@pytest.fixture
def dataset(tokenizer):
    return as_rows(tokenizer, ["a b c"] * 4)


def as_rows(tokenizer, completions):
    """What load_rows makes of PROMPTS and these."""
    ids = [ids + [tokenizer.eos_token_id] for ids in token_ids(tokenizer, completions)]
    return Dataset.from_dict({"prompt": PROMPTS, "prompt_ids": token_ids(tokenizer, PROMPTS),
                              "completion": completions, "completion_ids": ids})


def test_evaluate_counts_wins_against_the_reference_texts(policy, tokenizer, dataset):
    found = [evaluate(policy, policy, tokenizer, rewards(words), dataset, EvaluateArgs, k=2)
             for _ in range(2)]
    values, completions = found[0]
    assert len(completions) == 8 and values["kl"].abs().max() < 1e-4
    assert (values["score"].tolist() == words(completions)
            and {1.0, 6.0} <= set(values["score"].tolist()))
    read = torch.tensor(words(completions)) + values["eos_rate"]
    assert (values["length"] >= read).all() and (values["length"] == read).any()  # <pad> is no word
    assert values["win_rate"].tolist() == [1 if n > 3 else 0 if n < 3 else 0.5
                                           for n in words(completions)]
    assert torch.equal(values["length"], found[1][0]["length"])


def test_ties_with_the_datasets_completions_count_half(policy, tokenizer):
    count = lambda completions: [float(text.count("a")) for text in completions]
    texts = ["a a a a a a a", "b", "a", ""]  # the first is longer than a sample can be
    values, completions = evaluate(policy, policy, tokenizer, rewards(count),
                                   as_rows(tokenizer, texts), EvaluateArgs, k=4)
    pairs = list(zip(count(completions), [7.0] * 4 + [0.0] * 4 + [1.0] * 4 + [0.0] * 4))
    expected = [1.0 if ours > theirs else 0.5 if ours == theirs else 0.0 for ours, theirs in pairs]
    assert values["win_rate"].tolist() == expected and {0.0, 0.5, 1.0} == set(expected)
    assert wins(values["score"], values["score"] + 1).tolist() == [0.0] * 16
    assert wins(torch.tensor([math.nan, 1.0]), torch.ones(2)).isnan().tolist() == [True, False]


def test_the_judge_decides_the_win_rate(policy, tokenizer, dataset):
    for judge, sign in (("score", 1), ("gold", -1), ("other", 1)):
        reward_fns = rewards(words, judge, gold=brevity, other=words)
        values, texts = evaluate(policy, policy, tokenizer, reward_fns, dataset, EvaluateArgs, k=2)
        assert values["win_rate"].tolist() == [(1 + sign * ((n > 3) - (n < 3))) / 2
                                               for n in words(texts)]
        assert {0.0, 1.0} <= set(values["win_rate"].tolist())
        assert (values["gold"].tolist() == brevity(texts)
                and values["other"].tolist() == words(texts))


@pytest.mark.parametrize("judge", ["score", "gold"])
def test_only_the_judge_reads_the_reference_texts(judge, policy, tokenizer, dataset):
    """The reward model need not, where a gold reward judges: it would be a fifth of the time."""
    read = []
    note = lambda name: lambda completions: read.append((name, completions)) or words(completions)
    reward_fns = rewards(note("score"), judge, gold=note("gold"))
    _, texts = evaluate(policy, policy, tokenizer, reward_fns, dataset, EvaluateArgs)
    assert read == [("score", texts), ("gold", texts), (judge, dataset["completion"][:])]


def test_the_gold_reward_judges_if_there_is_one(tmp_path):
    (tmp_path / "data.py").write_text("def gold_reward(completions, **_):\n"
                                      "    return [1.0] * len(completions)\n")
    args = reward_args(reward=(f"{tmp_path}/data.py:gold_reward",), reward_weights=(),
                       dataset=f"{tmp_path}/data.py:rows")
    for gold, judge in (("none", "score"), ("auto", "gold"),
                        (f"{tmp_path}/data.py:gold_reward", "gold")):
        args.gold = gold
        found = load_rewards(args, CPU)
        assert found.judge == judge and list(found.held_out) == ["gold"] * (judge == "gold")


def random_numbers():
    # The last two keep a second number for later.
    return [torch.rand(()).item(), random.gauss(), numpy.random.normal()]


@pytest.mark.parametrize("drawn", [0, 1])
def test_random_states_go_on_after_they_are_saved(drawn, tmp_path):
    set_seed(3)
    for _ in range(drawn):
        random_numbers()
    torch.save(random_states(), tmp_path / "states.pt")
    expected = [random_numbers() for _ in range(3)]
    set_seed(4)
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [random_numbers() for _ in range(3)] == expected


def test_isolated_random_numbers_change_no_others():
    set_seed(3)
    expected = [random_numbers() for _ in range(2)]
    set_seed(3)
    found = [random_numbers()]
    with isolated_rng(5):
        inside = random_numbers()
    found.append(random_numbers())
    with isolated_rng(5):
        assert random_numbers() == inside
    assert found == expected


# --------------------------------------------------------------------------------------------- data


ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "save_to_disk",
                                  "save_to_disk_splits", "folder", "function"])
def test_datasets_of_every_local_kind(kind, tmp_path):
    dataset, name = Dataset.from_list(ROWS), str(tmp_path / f"data.{kind}")
    if kind in ("jsonl", "json"):
        (tmp_path / f"data.{kind}").write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "csv":
        dataset.to_csv(name)
    elif kind == "parquet":
        dataset.to_parquet(name)
    elif kind == "save_to_disk":
        dataset.save_to_disk(name)
    elif kind == "save_to_disk_splits":
        DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(name)
    elif kind == "folder":
        (tmp_path / "data.folder").mkdir()
        dataset.to_parquet(tmp_path / "data.folder" / "train.parquet")
    else:
        (tmp_path / "make.py").write_text(
            "from datasets import Dataset\n\n\ndef rows(split):\n"
            f"    assert split == 'train'\n    return Dataset.from_list({ROWS})\n")
        name = f"{tmp_path / 'make.py'}:rows"
    assert load_dataset(name, "train").to_list() == ROWS


def test_batches_use_every_row_once_an_epoch_and_go_on_for_ever():
    dataset = Dataset.from_list(ROWS)
    stream = batches(dataset, 3, seed=1)
    rows = [prompt for _ in range(10) for prompt in next(stream)["prompt"]]  # 6 epochs of 5 rows
    for start in range(0, 30, 5):
        assert sorted(rows[start : start + 5]) == [f"p{i}" for i in range(5)]
    assert rows[:5] != rows[5:10]
    again = batches(dataset, 3, seed=1)
    assert next(again)["prompt"] == rows[:3]
    assert len(next(batches(dataset, 12, seed=1))["prompt"]) == 12


def test_long_prompts_are_left_out_and_counted(tokenizer, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": prompt})
                                                   for prompt in PROMPTS))
    kept = load_rows(data_args(str(tmp_path / "data.jsonl")), "train", tokenizer, ["prompt"], 3)
    assert kept["prompt"][:] == ["a b c", "d", "f f"]
    assert "dropped 1 of 4 rows with more than 3 tokens" in capsys.readouterr().out


def test_pad_and_positions():
    ids, mask = pad([[5], [6, 7, 8]], 9, "left", CPU)
    assert (ids.tolist() == [[9, 9, 5], [6, 7, 8]]
            and mask.tolist() == [[False, False, True], [True] * 3])
    assert positions(mask).tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize("n, count, sizes", [(12, 5, [3, 3, 2, 2, 2]), (6, 4, [2, 2, 1, 1]),
                                             (10, 4, [3, 3, 2, 2])])
def test_mini_batches_differ_by_one_row_at_most(n, count, sizes):
    torch.manual_seed(0)
    parts = list(minibatches(n, 2, count))
    assert [len(part) for part in parts] == 2 * sizes
    first, second = (torch.cat(epoch).tolist() for epoch in (parts[:count], parts[count:]))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second


def test_a_single_mini_batch_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert [part.tolist() for part in minibatches(3, 2, 1)] == [[0, 1, 2]] * 2
    assert torch.equal(torch.get_rng_state(), before)
