"""The expected gradient of whole scripts, over every possible rollout: the true one, if claimed."""

import pytest
import torch
from helpers import loop
from helpers.expected import World

INF = float("inf")
UNBIASED = {
    "rloo": ("rloo", {"k": 2}),
    "reinforce without a baseline": ("reinforce", {"k": 1, "baseline": "none"}),
    "reinforce with the update before": ("reinforce", {"k": 1, "window": 1, "before": 2}),
    "reinforce with an EMA": ("reinforce", {"k": 1, "baseline": "ema", "decay": 0.0, "before": 2}),
    "remax": ("remax", {"k": 1}),
    "vanilla_pg with an arbitrary critic": ("vanilla_pg", {"k": 1}),
    "ppo with lambda 1 and no whitening": (
        "ppo", {"k": 1, "lam": 1.0, "whiten": False, "minibatches": 1}),
    "reinforce_pp without normalisation": (
        "reinforce_pp", {"k": 1, "normalize_scores": False, "whiten": False, "minibatches": 1}),
}


def world(dataset):
    found = World(dataset)
    for rows in found.groups.values():
        assert sum(torch.tensor(row.old_logprobs).sum().exp()
                   for row in rows).item() == pytest.approx(1, abs=1e-12)
    assert found.true_gradient().norm() > 0.1
    return found


SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (name != "rloo")) for name in UNBIASED]


@pytest.mark.parametrize("name", SLOW)
def test_the_expected_gradient_of_main_is_the_true_one(name, tmp_path):
    script, flags = UNBIASED[name]
    with loop.float64():
        enumerated = world("one_prompt" if flags["k"] > 1 else "enumerable_prompts")
        found = enumerated.expected_gradient(script, tmp_path / "run", **flags)
        assert (found - enumerated.true_gradient()).abs().max() < 1e-9


@pytest.mark.slow
def test_a_bias_would_show(tmp_path):
    """GRPO without std, length mean and KL: exactly (k - 1) / k of the true gradient."""
    with loop.float64():
        enumerated = World(beta=0.0)
        flags = {"scale_std": False, "length_mean": False}
        found = enumerated.expected_gradient("grpo", tmp_path / "run", k=2, **flags)
        assert (found - enumerated.true_gradient() / 2).abs().max() < 1e-9
