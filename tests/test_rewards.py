"""Python rewards as in TRL: what they get, what they may return, and what they may import."""

import importlib
import math
import pickle
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import CPU, encode, reward_args, scalars

import evaluate
import rloo
from common import score
from plumbing import load_function, load_module, load_rewards, rewards
from plumbing.rewards import Reward, call_function

NUMBERS = """
import numpy, torch
def none(completions, **_): return [None if text == "b" else 1.0 for text in completions]
def length(completions, **_): return [float(len(text)) for text in completions]
def tensor(completions, **_): return torch.ones(len(completions), requires_grad=True)
def column(completions, **_): return numpy.ones((len(completions), 1))
def tensors(completions, **_): return [torch.tensor([1.0])] * len(completions)
def scalars(completions, **_): return [numpy.float32(1)] * len(completions)
def bools(completions, **_): return [True] * len(completions)
async def later(completions, **_): return [1.0] * len(completions)
class Verifier:
    async def __call__(self, completions, **_): return [1.0] * len(completions)
verifier = Verifier()
def ids(completions, completion_ids, **_): return [float(sum(ids)) for ids in completion_ids]
def without(prompts, completions): return [1.0] * len(completions)
"""


@pytest.fixture
def numbers(tmp_path):
    (tmp_path / "numbers.py").write_text(NUMBERS)
    return f"{tmp_path}/numbers.py"


def call(function, prompts, completions, ids=None, **columns):
    examples = {"prompt": prompts, "prompt_ids": [[1]] * len(prompts), **columns}
    ids = ids or [[1]] * len(completions)
    return call_function(Reward("r", function=function), examples, completions, ids)


@pytest.mark.parametrize("name", ["tensor", "column", "tensors", "scalars", "bools", "later",
                                  "verifier", "without"])
def test_what_a_reward_may_return(name, numbers):
    function = load_function(f"{numbers}:{name}")
    for _ in range(2):  # an async function also when the loop has been used
        assert call(function, ["p", "q"], list("abcd")).tolist() == [1.0] * 4


def test_async_rewards_work_where_a_loop_is_running_and_keep_theirs(numbers):
    import asyncio

    loops = []

    async def reward(completions, **_):
        loops.append(asyncio.get_running_loop())
        return [2.0] * len(completions)

    async def notebook():
        return [call(reward, ["p"], ["a"]).tolist() for _ in range(2)]

    assert asyncio.run(notebook()) == [[2.0], [2.0]]
    assert loops[0] is loops[1] and loops[0].is_running()


def test_completion_ids_have_no_padding(world, numbers):
    args = reward_args(reward=(f"{numbers}:ids",), reward_weights=())
    batch = encode(world.tokenizer, [[1], [1]], ["a b c", "d"], CPU)
    rows = [world.tokenizer(text)["input_ids"] + [world.tokenizer.eos_token_id]
            for text in ("a b c", "d")]
    found = score(load_rewards(args, CPU), world.tokenizer, batch, {"prompt": ["a", "a"]})
    assert found["score"].tolist() == [float(sum(row)) for row in rows]
    assert not rewards.takes(lambda prompts, completions: None, "completion_ids")
    assert not rewards.takes(dict.get, "completion_ids")


def test_each_process_passes_its_slice(monkeypatch):
    monkeypatch.setattr(rewards, "rank_slice", lambda n: range(1, 2))
    seen = {}

    def reward(**columns):
        seen.update(columns)
        return [None, 5.0]

    found = call(reward, ["p", "q"], list("abcd"), [[1], [2], [3], [4]], answer=[7, 8])
    assert seen == {"prompts": ["q", "q"], "completions": ["c", "d"], "answer": [8, 8],
                    "completion_ids": [[3], [4]]}
    assert found[[0, 1, 3]].tolist() == [0.0, 0.0, 5.0] and found[2].isnan()


def test_a_function_may_change_what_it_gets():
    chats = [[{"role": "user", "content": "p"}], [{"role": "user", "content": "q"}]]
    tools, ids = [[{"name": "x"}], [{"name": "y"}]], [[1], [2], [3], [4]]

    def reward(prompts, completions, tools, completion_ids):
        for prompt, completion, ids in zip(prompts, completions, completion_ids):
            prompt.append(completion[0])
            ids.append(0)
        lengths = [float(len(prompt)) for prompt in prompts]
        tools[0].clear()
        tools[2][0]["name"] = "z"
        completions.clear()
        return lengths

    found = call(reward, chats, list("abcd"), ids, tools=tools)
    assert found.tolist() == [2.0, 2.0, 2.0, 2.0]
    assert chats == [[{"role": "user", "content": "p"}], [{"role": "user", "content": "q"}]]
    assert tools == [[{"name": "x"}], [{"name": "y"}]] and ids == [[1], [2], [3], [4]]


def test_none_does_not_count_and_others_do(world, numbers):
    args = reward_args(reward=(f"{numbers}:none", f"{numbers}:length"), reward_weights=(2.0, 0.5))
    batch = encode(world.tokenizer, [[1]] * 3, ["a", "b", "a a"], CPU)
    found = score(load_rewards(args, CPU), world.tokenizer, batch, {"prompt": ["a"] * 3})
    assert found["score"].tolist() == [2.5, 0.5, 3.5]  # 2 * 1 + 0.5 * 1, 0.5 * 1, 2 + 0.5 * 3
    assert found["reward/none"].nan_to_num(-1.0).tolist() == [1.0, -1.0, 1.0]
    # A classifier's NaN is no None: it stays, and check_finite stops the run.
    broken = {"reward/c": torch.tensor([math.nan]), "reward/f": torch.tensor([1.0])}
    parts = {"c": Reward("c"), "f": Reward("f", function=len)}
    both = SimpleNamespace(weights=[1.0, 1.0], parts=parts)
    assert rewards.weighted_sum(both, broken).isnan().all()


def test_none_is_left_out_of_the_means(world, tmp_path):
    (tmp_path / "r.py").write_text(
        "def some(completions, **_): return [None, 4.0] * (len(completions) // 2)\n"
        "def one(completions, **_): return [1.0] * len(completions)\n")
    flags = world.flags | dict(reward=(f"{tmp_path}/r.py:some", f"{tmp_path}/r.py:one"), k=2,
                               gold=f"{tmp_path}/r.py:some", num_updates=1,
                               missing_eos_penalty=0.0)
    rloo.main(rloo.Args(output=f"{tmp_path}/run", **flags))
    found = scalars(tmp_path / "run")
    assert found["objective/reward/some"] == [(1, 4.0)]
    assert found["objective/scores"] == [(1, 3.0)]  # 1 and 5
    assert [value for _, value in found["eval/gold"]] == [4.0, 4.0]
    nan = math.nan
    values = {"score": torch.ones(6), "gold": torch.tensor([nan, 4.0, 2.0, nan, 3.0, nan]),
              "win_rate": torch.tensor([nan, 1.0, nan, nan, 0.0, 1.0])}
    found = evaluate.summarize(values, list("abcdef"), 2)
    assert found["gold"] == 3.0 and found["win_rate"] == 0.75  # of two prompts
    assert found["win_rate+-"] == pytest.approx(0.25)  # std of 1 and 1/2, over sqrt(2)


# ------------------------------------------------------------------------------ files of functions

WITH_NEIGHBOUR = """
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from {helper} import value
def one(text): return value * len(text)
def pool(completions, start="fork", **_):
    with ProcessPoolExecutor(1, multiprocessing.get_context(start)) as executor:
        return list(executor.map(one, completions))
def f(completions, **_): return [one(text) for text in completions]
def spawn(completions, **_): return pool(completions, "spawn")
"""


def write(folder, name, value, helper):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(WITH_NEIGHBOUR.format(helper=helper))
    (folder / f"{helper}.py").write_text(f"value = {value}\n")
    return f"{folder}/{name}.py"


def test_a_file_imports_its_neighbours_and_is_pickled_for_a_pool(tmp_path):
    file = write(tmp_path / "one", "my_unique_reward", 2.0, "my_unique_helper")
    for name in ("f", "pool", "spawn"):
        found = call(load_function(f"{file}:{name}"), ["p"], ["a", "bbb"])
        assert found.tolist() == [2.0, 6.0]
    assert load_module(file).__name__ == "my_unique_reward"  # what the other process imports


def test_files_of_the_same_name_are_not_confused(tmp_path):
    files = [write(tmp_path / str(value), "json", value, "helper_of_same_name")
             for value in (2.0, 3.0, 2.5)]
    functions = [load_function(f"{file}:f") for file in files]
    assert [call(f, ["p"], ["ab"]).tolist() for f in functions] == [[4.0], [6.0], [5.0]]
    assert importlib.import_module("json").dumps([1]) == "[1]"  # nor with what is installed
    one = load_module(files[0]).one
    assert pickle.loads(pickle.dumps(one)) is one
    assert [load_function(f"{file}:f") for file in files] == functions


def test_changed_files_and_neighbours_are_read_again(tmp_path):
    file = write(tmp_path, "my_edited_reward", 2.0, "my_edited_helper")
    results = []
    for value in (2.0, 3.0, 3.0):
        (tmp_path / "my_edited_helper.py").write_text(f"value = {value}\n")  # of the same size
        results.append(call(load_function(f"{file}:f"), ["p"], ["ab"]).item())
        time.sleep(0.01)
    assert results == [4.0, 6.0, 6.0]
    before = load_module(file)
    assert load_module(file) is before
    with open(file, "a") as text:
        text.write("def f(completions, **_): return [9.0]\n")
    assert call(load_function(f"{file}:f"), ["p"], ["ab"]).item() == 9.0
    assert not (tmp_path / "__pycache__").exists()


def test_an_import_that_fails_can_be_mended(tmp_path, capsys):
    file = tmp_path / "my_broken_reward.py"
    file.write_text("import my_missing_helper\ndef f(**_): return [1.0]\n")
    with pytest.raises(SystemExit):
        load_module(str(file))
    assert capsys.readouterr().err == (f"error: {file}: cannot be imported: ModuleNotFoundError: "
                                       "No module named 'my_missing_helper'\n")
    assert "my_broken_reward" not in sys.modules
    (tmp_path / "my_missing_helper.py").write_text("")
    assert load_module(str(file)).f() == [1.0]
