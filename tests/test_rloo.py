"""rloo.py: the worked example, and whole runs (the exact gradient is checked in test_exact.py)."""

import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import save_policy, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import rloo
from common import encode, token_logprobs
from plumbing import load_model


def test_worked_example_of_the_notes():
    """Three prompts with four responses each; the notes list them sample-major, this project is prompt-major."""
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
    assert not torch.allclose(rloo.compute_advantages(sample_major, k=4), slow)  # the wrong row order is not the same


@pytest.mark.parametrize("k", [2, 3, 5])
def test_advantages_against_the_equivalent_form(k):
    """A = k/(k-1) (R - mean of all k), in exact arithmetic; they sum to 0; k = 2 gives +-(R_1 - R_2)."""
    rewards = torch.randn(7 * k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    groups = rewards.view(7, k)
    advantages = rloo.compute_advantages(rewards, k)
    torch.testing.assert_close(advantages, (k / (k - 1) * (groups - groups.mean(1, keepdim=True))).flatten())
    torch.testing.assert_close(advantages.view(7, k).sum(1), torch.zeros(7, dtype=torch.float64))


def scalars(folder):
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in log.Scalars(name)] for name in log.Tags()["scalars"]}


def test_same_seed_same_run_bit_for_bit(world, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        policy = rloo.main(rloo.Args(**world.flags, seed=seed, output=str(tmp_path / name)))
        curves = {key: value for key, value in scalars(tmp_path / name).items() if key not in TIMES}
        runs[name] = policy.state_dict(), curves
    assert all(torch.equal(runs["a"][0][key], runs["b"][0][key]) for key in runs["a"][0])
    assert runs["a"][1] == runs["b"][1] and len(runs["a"][1]["objective/kl"]) == 3
    assert runs["a"][1] != runs["c"][1]


TIMES = {"time/seconds", "time/tokens_per_second"}


def test_evaluations_do_not_change_the_training(world, tmp_path):
    often = rloo.main(rloo.Args(**world.flags | {"eval_every": 1}, output=str(tmp_path / "often")))
    never = rloo.main(rloo.Args(**world.flags | {"eval_every": 0}, output=str(tmp_path / "never")))
    assert all(torch.equal(p, q) for p, q in zip(often.parameters(), never.parameters()))


def test_gradient_does_not_depend_on_the_micro_batch(world, tmp_path):
    gradients = []
    for tokens in (1, 30, 100_000):
        flags = world.flags | {"num_updates": 1, "microbatch_tokens": tokens, "max_grad_norm": 1e9}
        policy = rloo.main(rloo.Args(**flags, output=str(tmp_path / str(tokens))))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[0].norm() > 1e-3
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_the_run_is_wired_as_the_formula_says(world, tmp_path):
    """Scores = reward - missing-EOS penalty; rewards = scores - beta * KL; the KL is that to the reference."""
    (tmp_path / "reward.py").write_text("def two(completions, **_):\n    return [2.0] * len(completions)\n")
    reference = save_policy(tmp_path / "reference", world.tokenizer, seed=5)
    flags = world.flags | {"reference": reference, "reward": (f"{tmp_path}/reward.py:two",), "num_updates": 1}
    rloo.main(rloo.Args(**flags, beta=0.3, missing_eos_penalty=0.7, output=str(tmp_path / "run")))
    step = {name: points[0][1] for name, points in scalars(tmp_path / "run").items()}
    assert abs(step["objective/kl"]) > 0.1 and 0 < step["rollout/eos_rate"] < 1
    assert step["objective/scores"] == pytest.approx(2 - 0.7 * (1 - step["rollout/eos_rate"]), abs=1e-5)
    assert step["objective/rewards"] == pytest.approx(step["objective/scores"] - 0.3 * step["objective/kl"], abs=1e-4)

    rloo.main(rloo.Args(**flags | {"reference": None}, missing_eos_penalty=0.0, output=str(tmp_path / "own")))
    step = {name: points[0][1] for name, points in scalars(tmp_path / "own").items()}
    assert abs(step["objective/kl"]) < 1e-4 and step["objective/frac_reward_zero_std"] == 1


def test_run_folder_holds_what_the_readme_says(world, tmp_path):
    rloo.main(rloo.Args(**world.flags, output=str(tmp_path / "run")))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<eos>"
    assert loaded.dtype == torch.float32
    assert json.loads((tmp_path / "run" / "args.json").read_text())["k"] == 3
    assert set(json.loads((tmp_path / "run" / "evaluation.json").read_text())) == {"before", "after"}
    log = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    assert {"hyperparameters/text_summary", "samples/text_summary"} <= set(log.Tags()["tensors"])
    assert [step for step, _ in scalars(tmp_path / "run")["eval/score"]] == [0, 2, 3]
    for name in (
        "objective/scores",
        "objective/kl",
        "objective/rewards",
        "objective/entropy",
        "policy/loss",
        "policy/grad_norm",
        "policy/lr",
        "rollout/length",
        "rollout/eos_rate",
        "time/samples",
    ):
        assert len(scalars(tmp_path / "run")[name]) == 3


def test_a_run_raises_its_reward(world, tmp_path):
    """Reward: the share of the words a, b and c in the response. Thirty updates on a random policy must find it."""
    path = tmp_path / "reward.py"
    path.write_text(
        "def share(prompts, completions, **_):\n"
        "    return [sum(word in 'abc' for word in c.split()) / max(1, len(c.split())) for c in completions]\n"
    )
    flags = world.flags | {"reward": (f"{path}:share",), "num_updates": 30, "prompts_per_step": 8, "eval_prompts": 12}
    flags |= {"beta": 0.0, "missing_eos_penalty": 0.0}
    rloo.main(rloo.Args(**flags, output=str(tmp_path / "run")))
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["before"]["score"] < 0.4 and result["after"]["score"] > 0.8


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(world, tmp_path, capsys):
    flags = world.flags | {"lr": 1e30, "num_updates": 5, "eval_every": 0}
    with pytest.raises(SystemExit) as stopped:
        rloo.main(rloo.Args(**flags, output=str(tmp_path / "run")))
    (message,) = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert stopped.value.code == 1
    assert message.startswith("error: update 2: ") and "--lr" in message and str(tmp_path / "run") in message
    assert scalars(tmp_path / "run")["eval/score"]


def test_bfloat16_keeps_float32_weights_and_close_logprobs(world, tmp_path):
    policy = rloo.main(rloo.Args(**world.flags, dtype="bfloat16", output=str(tmp_path / "run")))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    batch = encode(world.tokenizer, token_ids(world.tokenizer, ["a b c", "d"]), ["e f", "a"], policy.device)
    low = token_logprobs(policy, batch, 1.0)
    policy = load_model(str(tmp_path / "run" / "model"), policy.device)
    full = token_logprobs(policy, batch, 1.0)
    assert low.dtype == torch.float32 and 1e-5 < (low - full).abs().max() < 0.3
