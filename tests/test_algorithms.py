"""Every RL script on a tiny world: it runs, logs, saves, repeats itself and finds a reward."""

import ast
import dataclasses
import difflib
import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import ROOT, scalars

import dpo
import ppo
from lab.family import FAMILY, SAMPLING, SCRIPTS
from plumbing import parse

VARIANTS = [
    ("reinforce", {"baseline": "ema", "decay": 0.5}),
    ("grpo", {"scale_std": False, "length_mean": False, "epochs": 2, "minibatches": 2}),
    ("ppo", {"lam": 1.0, "whiten": False, "clip": float("inf"), "value_clip": float("inf"),
             "epochs": 2}),
]


TIMES = {"time/seconds", "time/tokens_per_second"}


def run(name, world, output, **flags):
    script = importlib.import_module(name)
    return script.main(script.Args(**world.flags | flags, output=str(output)))


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", VARIANTS)
def test_same_seed_same_run_bit_for_bit(name, flags, world, tmp_path):
    first, second = (run(name, world, tmp_path / folder, **flags) for folder in "ab")
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    a, b = scalars(tmp_path / "a"), scalars(tmp_path / "b")
    assert a.keys() == b.keys()
    for metric in a.keys() - TIMES:
        assert a[metric] == b[metric]
    for metric in ("objective/scores", "objective/kl", "objective/rewards", "policy/loss",
                   "policy/grad_norm"):
        assert len(a[metric]) == 3
    assert (tmp_path / "a" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_another_seed_is_another_run(world, tmp_path):
    for seed in (1, 2):
        run("rloo", world, tmp_path / str(seed), seed=seed, num_updates=1)
    first, second = (scalars(tmp_path / str(seed)) for seed in (1, 2))
    assert first["objective/kl"] != second["objective/kl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLING)
def test_a_run_raises_its_reward(name, world, tmp_path):
    """Reward: the share of the words a, b and c in the response, or whether it is above one half.

    Twenty updates must find it.
    """
    path = tmp_path / "reward.py"
    path.write_text("def share(prompts, completions, **_):\n"
                    "    return [sum(word in 'abc' for word in c.split()) / max(1, len(c.split())) "
                    "for c in completions]\n\n"
                    "def most(prompts, completions, **_):\n"
                    "    return [float(s > 0.5) for s in share(prompts, completions)]\n")
    reward = "most" if FAMILY[name].binary else "share"
    flags = {"reward": (f"{path}:{reward}",), "num_updates": 20, "lr": 2e-2}
    flags |= {"prompts_per_step": 12, "eval_prompts": 12, "eval_every": 0}
    flags |= {"minibatches": 1} if name == "dapo" else {}  # its step is too large for four
    run(name, world, tmp_path / "run", **flags, beta=0.0, missing_eos_penalty=0.0)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["before"]["score"] < 0.4 and result["after"]["score"] > 0.8


def test_dapo_draws_further_prompts_from_all_of_the_training_data(world, tmp_path, monkeypatch):
    """Not from as many as there are to evaluate on, of which there is one here."""
    script, seen = importlib.import_module("dapo"), []
    real = script.rollout

    def rollout(policy, tokenizer, prompt_ids, *flags, **more):
        seen.append({tuple(ids) for ids in prompt_ids})
        return real(policy, tokenizer, prompt_ids, *flags, **more)

    monkeypatch.setattr(script, "rollout", rollout)
    text = "def same(prompts, **_):\n    return [1.0] * len(prompts)\n"
    (tmp_path / "reward.py").write_text(text)
    run("dapo", world, tmp_path / "run", reward=(f"{tmp_path}/reward.py:same",), num_updates=1,
        eval_every=0, eval_prompts=1, max_rounds=4, missing_eos_penalty=0.0, overlong_penalty=0.0)
    assert len(seen) == 4 and len(set.union(*seen[1:])) > 1


@pytest.mark.slow
def test_dpo_prefers_the_chosen(world, tmp_path):
    unused = {"k", "prompts_per_step"}
    flags = {name: value for name, value in world.flags.items() if name not in unused}
    flags |= {"eval_dataset": world.data, "batch_size": 12, "num_updates": 20,
              "microbatch_tokens": 100}
    dpo.main(dpo.Args(**flags, output=str(tmp_path / "run")))
    curves = scalars(tmp_path / "run")
    assert curves["policy/loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert curves["rewards/margins"][0][1] == pytest.approx(0, abs=1e-5)
    assert curves["rewards/accuracies"][-1][1] == 1 and curves["rewards/margins"][-1][1] > 0.5


def body(name):
    """The lines of a script below its docstring page."""
    return (ROOT / f"{name}.py").read_text().split('"""\n', 1)[1].splitlines()


@pytest.mark.parametrize("name", [name for name in FAMILY if FAMILY[name].relative])
def test_scripts_share_their_skeleton_line_by_line(name):
    """Below the docstring page, whatever the indentation: a change that misses a script shows."""
    relative, most = FAMILY[name].relative, FAMILY[name].changed
    a, b = ([line.strip() for line in body(script)] for script in (relative, name))
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    changed = sum(max(i2 - i1, j2 - j1)
                  for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")
    assert changed <= most


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained(name):
    script = importlib.import_module(name)
    shared = "".join(path.read_text()
                     for path in [ROOT / "common.py", *(ROOT / "plumbing").glob("*.py")])
    read = "\n".join(body(name)).split("def main(args)")[1] + shared
    for field in dataclasses.fields(script.Args):
        assert f"args.{field.name}" in read or field.name.endswith("_column"), field.name
        owner = next(cls for cls in script.Args.__mro__ if field.name in cls.__annotations__)
        source = ast.parse(Path(sys.modules[owner.__module__].__file__).read_text())
        (definition,) = (node for node in ast.walk(source)
                         if getattr(node, "name", None) == owner.__name__)
        flags = [getattr(getattr(node, "target", None), "id", None) for node in definition.body]
        text = definition.body[flags.index(field.name) + 1]  # of the line below
        assert isinstance(text, ast.Expr) and isinstance(text.value.value, str), field.name


@pytest.mark.parametrize("name", FAMILY)
def test_the_evaluations_of_a_default_run_draw_a_curve(name):
    args = importlib.import_module(name).Args()
    assert args.num_updates / args.eval_every >= 8


def test_help_shows_every_flag_once_and_the_algorithms_own_last(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--help"])
    with pytest.raises(SystemExit):
        parse(ppo.Args)
    text = capsys.readouterr().out
    for field in dataclasses.fields(ppo.Args):
        flag = f"--{field.name.replace('_', '-')}"
        assert len(re.findall(rf"^[│ ]{{1,3}}{flag}[ ,]", text, re.MULTILINE)) == 1, flag
    places = [text.index(words) for words in ("--device ", "--chat", "--eval-every",
                                              "--reward-noise", "--k ", "--lam ")]
    assert places == sorted(places)


def test_flags_from_the_command_line_arrive(monkeypatch):
    words = "ppo.py --lam 0.5 --no-whiten --chat --keep 3 --reward a b --reward-weights 1 2".split()
    monkeypatch.setattr(sys, "argv", words)
    args = parse(ppo.Args)
    given = dict(lam=0.5, whiten=False, chat=True, keep=3, reward=("a", "b"),
                 reward_weights=(1.0, 2.0))
    assert args == ppo.Args(**given)


def test_the_six_steps_stand_in_the_same_order():
    for name in FAMILY:
        numbers = re.findall(r"(\d)\. [a-z]", "\n".join(line for line in body(name)
                                                        if line.strip().startswith("# ")))
        assert numbers == sorted(numbers) and numbers[-1] == "6", name
