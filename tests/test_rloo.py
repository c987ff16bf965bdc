"""rloo.py: the worked example, and whole runs.

test_exact.py checks the exact gradient, and test_algorithms.py what holds for every script.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from helpers.tiny import ROOT, encode, save_policy, scalars, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import rloo
from common import token_logprobs
from plumbing import load_model


def test_worked_example_of_the_notes():
    """Three prompts, four responses each: sample-major in the notes, prompt-major here."""
    sample_major = torch.tensor([1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10.0])
    slow = torch.zeros(12)
    for i in range(12):
        others = [sample_major[j] for j in range(12) if j % 3 == i % 3 and j != i]
        slow[i] = sample_major[i] - sum(others) / 3
    assert slow[0] == 1 - (2 + 5 + 8) / 3 and slow[7].item() == pytest.approx(6 - (3 + 2 + 9) / 3)

    prompt_major = sample_major.view(4, 3).T.flatten()  # [1, 2, 5, 8,  2, 3, 6, 9,  3, 4, 7, 10]
    advantages = rloo.compute_advantages(prompt_major, k=4)
    torch.testing.assert_close(advantages, slow.view(4, 3).T.flatten())
    torch.testing.assert_close(advantages.view(3, 4).T.flatten(), slow)
    # The wrong row order is not the same.
    assert not torch.allclose(rloo.compute_advantages(sample_major, k=4), slow)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_advantages_against_the_equivalent_form(k):
    """A = k/(k-1) (R - mean of all k), exactly; they sum to 0; k = 2 gives +-(R_1 - R_2)."""
    rewards = torch.randn(7 * k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    groups = rewards.view(7, k)
    advantages = rloo.compute_advantages(rewards, k)
    torch.testing.assert_close(
        advantages, (k / (k - 1) * (groups - groups.mean(1, keepdim=True))).flatten())
    torch.testing.assert_close(advantages.view(7, k).sum(1), torch.zeros(7, dtype=torch.float64))


@pytest.mark.slow
def test_evaluations_do_not_change_the_training(world, tmp_path):
    often = rloo.main(rloo.Args(**world.flags | {"eval_every": 1}, output=str(tmp_path / "often")))
    never = rloo.main(rloo.Args(**world.flags | {"eval_every": 0}, output=str(tmp_path / "never")))
    assert all(torch.equal(p, q) for p, q in zip(often.parameters(), never.parameters()))


def test_the_run_is_wired_as_the_formula_says(world, tmp_path):
    """Scores = reward - missing-EOS penalty; rewards = scores - beta * KL to the reference."""
    (tmp_path / "reward.py").write_text("def two(completions, **_):\n"
                                        "    return [2.0] * len(completions)\n")
    reference = save_policy(tmp_path / "reference", world.tokenizer, seed=5)
    flags = world.flags | {"reference": reference, "reward": (f"{tmp_path}/reward.py:two",),
                           "num_updates": 1}
    rloo.main(rloo.Args(**flags, beta=0.3, missing_eos_penalty=0.7, output=str(tmp_path / "run")))
    step = {name: points[0][1] for name, points in scalars(tmp_path / "run").items()}
    assert abs(step["objective/kl"]) > 0.1 and 0 < step["rollout/eos_rate"] < 1
    assert step["objective/scores"] == pytest.approx(2 - 0.7 * (1 - step["rollout/eos_rate"]),
                                                     abs=1e-5)
    assert step["objective/rewards"] == pytest.approx(
        step["objective/scores"] - 0.3 * step["objective/kl"], abs=1e-4)

    rloo.main(rloo.Args(**flags | {"reference": None}, missing_eos_penalty=0.0,
                        output=str(tmp_path / "own")))
    step = {name: points[0][1] for name, points in scalars(tmp_path / "own").items()}
    assert abs(step["objective/kl"]) < 1e-4 and step["objective/frac_reward_zero_std"] == 1


def test_run_folder_holds_what_the_readme_says(world, tmp_path):
    rloo.main(rloo.Args(**world.flags, output=str(tmp_path / "run")))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<eos>"
    assert loaded.dtype == torch.float32
    assert json.loads((tmp_path / "run" / "args.json").read_text())["k"] == 3
    assert (set(json.loads((tmp_path / "run" / "evaluation.json").read_text()))
            == {"before", "after"})
    log = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    assert {"hyperparameters/text_summary", "samples/text_summary"} <= set(log.Tags()["tensors"])
    assert [step for step, _ in scalars(tmp_path / "run")["eval/score"]] == [0, 2, 3]
    for name in ("objective/scores", "objective/kl", "objective/rewards", "objective/entropy",
                 "policy/loss", "policy/grad_norm", "policy/lr", "rollout/length",
                 "rollout/eos_rate", "time/samples"):
        assert len(scalars(tmp_path / "run")[name]) == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(world, tmp_path, capsys):
    flags = world.flags | {"lr": 1e30, "num_updates": 5, "eval_every": 0}
    with pytest.raises(SystemExit) as stopped:
        rloo.main(rloo.Args(**flags, output=str(tmp_path / "run")))
    (message,) = [line for line in re.split("[\r\n]", capsys.readouterr().err)
                  if line.startswith("error: ")]
    assert stopped.value.code == 1
    assert (message.startswith("error: update 2: ") and "--lr" in message
            and str(tmp_path / "run") in message)
    assert scalars(tmp_path / "run")["eval/score"]


def test_bfloat16_keeps_float32_weights_and_close_logprobs(world, tmp_path):
    policy = rloo.main(rloo.Args(**world.flags, dtype="bfloat16", output=str(tmp_path / "run")))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    batch = encode(world.tokenizer, token_ids(world.tokenizer, ["a b c", "d"]), ["e f", "a"],
                   policy.device)
    low = token_logprobs(policy, batch, 1.0)
    policy = load_model(str(tmp_path / "run" / "model"), policy.device)
    full = token_logprobs(policy, batch, 1.0)
    assert low.dtype == torch.float32 and 1e-5 < (low - full).abs().max() < 0.3


@pytest.mark.slow
def test_copied_into_an_empty_folder_it_runs(tmp_path):
    """Into a term paper's folder, say: these files and nothing else of the project."""
    for name in ("rloo.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("plumbing", "tasks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "rloo.py", "--k", "4", "--num-updates", "2", "--eval-prompts", "16"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "model.safetensors").is_file() and "held-out prompts" in done.stdout


MODEL = """
import itertools
from helpers.tiny import make_policy, make_tokenizer

TOKENIZER = make_tokenizer("a b c d e f".split())
SEEDS, SAME = itertools.count(), make_policy(8, 1)

def new():
    return make_policy(8, 1, seed=next(SEEDS)), TOKENIZER

def same():
    return SAME, TOKENIZER
"""


def test_a_model_from_a_function_is_its_own_reference(world, tmp_path):
    """Each call returns other weights: the reference still is the initial policy, frozen."""
    (tmp_path / "my.py").write_text(MODEL)
    flags = world.flags | {"model": f"{tmp_path}/my.py:new", "num_updates": 2, "eval_every": 1}
    rloo.main(rloo.Args(**flags, output=str(tmp_path / "run")))
    (_, before), _, (_, after) = scalars(tmp_path / "run")["eval/kl"]
    assert abs(before) < 1e-5 < 1e-3 < abs(after)


def test_a_function_that_returns_the_same_model_again_is_refused(world, tmp_path, capsys):
    """The reference would be the policy itself, and the KL always 0."""
    (tmp_path / "my.py").write_text(MODEL)
    flags = world.flags | {"model": f"{tmp_path}/my.py:same", "output": str(tmp_path / "run")}
    with pytest.raises(SystemExit):
        rloo.main(rloo.Args(**flags))
    assert capsys.readouterr().err == (
        f"error: model {tmp_path}/my.py:same: the function returns the same model each time; let "
        "it make or load a new one at each call\n")
