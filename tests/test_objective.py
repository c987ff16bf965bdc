"""lab/objective.py: the expected gradient for rewards 0 and 1, as a share of the gradient of p."""

import itertools
import math

import pytest
import torch

import grpo
import maxrl
import rloo
from lab import objective


@pytest.mark.parametrize("script", [rloo, grpo, maxrl])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_slope_is_that_of_a_softmax_policy_over_every_draw(script, k):
    """Four responses, two of them right: the mean gradient of all draws is f(p) grad p."""
    logits = torch.tensor([0.3, -0.8, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    p, mean = (logprobs.exp() * right).sum(), 0.0
    for draw in itertools.product(range(4), repeat=k):
        rows = torch.tensor(draw)
        advantages = script.compute_advantages(right[rows], k)
        probability = math.exp(logprobs[rows].sum().item())
        mean = mean + probability * (advantages * logprobs[rows]).mean()
    (expected,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (up,) = torch.autograd.grad(p, logits)
    found = objective.slope(script.compute_advantages, p.item(), k)
    torch.testing.assert_close(expected, found * up, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_what_rloo_and_grpo_climb(p):
    """RLOO p; GRPO with two responses p too, and with more and more of them 2 arcsin sqrt(p)."""
    for k in (2, 7, 64):
        assert objective.slope(rloo.compute_advantages, p, k) == pytest.approx(1, abs=1e-9)
    std = math.sqrt(0.5) + 1e-4  # of 0 and 1
    assert objective.slope(grpo.compute_advantages, p, 2) == pytest.approx(0.5 / std, abs=1e-9)
    limit = objective.LIMITS["2 arcsin √p"](p)
    errors = [abs(objective.slope(grpo.compute_advantages, p, k) / limit - 1)
              for k in (8, 64, 512)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_what_maxrl_climbs(p):
    """log p, cut off after k - 1 terms: 1/p (1 - (1 - p)^(k - 1)), which is p itself for k 2."""
    for k in (2, 3, 16):
        wanted = sum((1 - p) ** (j - 1) for j in range(1, k))
        assert objective.slope(maxrl.compute_advantages, p, k) == pytest.approx(wanted, abs=1e-9)
    limit = objective.LIMITS["log p"](p)
    assert objective.slope(maxrl.compute_advantages, p, 512) == pytest.approx(limit, rel=1e-9)


def test_table_and_picture(tmp_path, capsys):
    objective.main(objective.Args(k=(2, 3), output=f"{tmp_path}/new/a.png"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| f(p) | p 0.05 | p 0.2 | p 0.5 | p 0.8 | p 0.95 |"
    assert lines[2] == "| `rloo.py`, k 2 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |"
    assert lines[4] == "| `grpo.py`, k 2 | 0.71 | 0.71 | 0.71 | 0.71 | 0.71 |"
    assert lines[7] == "| `maxrl.py`, k 3 | 1.95 | 1.80 | 1.50 | 1.20 | 1.05 |" and len(lines) == 10
    assert (tmp_path / "new" / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, line", [
    ({"k": (4, 1)}, "--k 4 1: must be between 2 and 512"),
    ({"output": "a.pdf"}, "--output a.pdf: must be the name of a PNG file"),
    ({"scripts": ("dpo.py",)}, "dpo.py: has no compute_advantages"),
])
def test_bad_flags(flags, line, capsys):
    with pytest.raises(SystemExit):
        objective.main(objective.Args(**flags))
    assert capsys.readouterr().err == f"error: {line}\n"
