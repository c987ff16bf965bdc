"""lab/kl.py: where the KL goes, and whose gradient that then is."""

from dataclasses import replace

import pytest
import torch
from helpers import loop
from test_gradient import ROOT, SMALL
from test_stale import lagging_world

from lab import gradient

pytestmark = pytest.mark.slow
KINDS = ("reward-k1", "reward-k3", "loss-k2", "loss-k3", "loss-ratio-k3", "loss-whole-k2")
LAGS = {"none": ("policy", 0.0), "random": ("random", 0.05)}


def measure(kl, length, lag="none"):
    """The Result of lab/kl.py (of lab/importance.py, if kl is None), and the world."""
    world, args = lagging_world(*LAGS[lag], length=length), replace(SMALL, length=length)
    command = f"lab/kl.py --kl {kl}" if kl else "lab/importance.py"
    with loop.float64():
        return gradient.measure(command, world, args), world


def numbers(result):
    return (result.cosine, result.length, result.bias, result.variance)


@pytest.mark.parametrize("lag", LAGS)
def test_k1_in_the_reward_is_the_unbiased_script(lag):
    ours, theirs = (measure(kl, 2, lag)[0] for kl in ("reward-k1", None))
    assert numbers(ours) == pytest.approx(numbers(theirs), abs=1e-12) and ours.bias < 1e-9


UNBIASED = {  # length, lag -> kinds
    (1, "none"): {"reward-k1", "loss-k2", "loss-ratio-k3", "loss-whole-k2"},
    (2, "none"): {"reward-k1", "loss-whole-k2"},
    (1, "random"): {"reward-k1", "loss-ratio-k3"},
}


@pytest.mark.parametrize("length, lag", UNBIASED)
@pytest.mark.parametrize("kl", KINDS)
def test_which_are_unbiased(kl, length, lag):
    """With a single token there is no KL-to-go to miss; with two there is.

    A sampler that lags behind is corrected by the ratio of tokens if there is a single one.
    """
    found, _ = measure(kl, length, lag)
    assert (found.bias < 1e-9) == (kl in UNBIASED[length, lag])
    assert found.bias < 1e-9 or found.bias > 1e-3


def test_on_policy_the_ratio_makes_k2_of_k3():
    """Their mean gradients are the same, and so are those of every single rollout."""
    k2, ratio, plain = (measure(kl, 3)[0] for kl in ("loss-k2", "loss-ratio-k3", "loss-k3"))
    assert numbers(ratio) == pytest.approx(numbers(k2), abs=1e-12)
    assert abs(plain.bias - k2.bias) > 1e-2


@pytest.mark.parametrize("kl", ["loss-k3", "reward-k3"])
def test_what_k3_descends_instead(kl):
    """In the loss the opposite KL, here of a single token; in the reward the mean of a constant k3.

    The expected gradients by differentiating sums over the responses.
    """
    found, world = measure(kl, 1)
    logprobs, ref_logprobs = (world.logprobs(SMALL.temperature, model).sum(1)
                              for model in (None, world.reference))  # (M,)
    scores = world.scores - SMALL.missing_eos_penalty * ~world.batch.ended  # (M,)
    if kl == "loss-k3":
        penalty = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum()
    else:
        log_ratio = (ref_logprobs - logprobs).detach()
        penalty = (logprobs.exp() * (log_ratio.exp() - log_ratio - 1)).sum()
    loss = SMALL.beta * penalty - (logprobs.exp() * scores).sum()
    parts = torch.autograd.grad(loss, list(world.policy.parameters()))
    mean, true = torch.cat([part.flatten() for part in parts]), world.loss_gradient()
    assert found.length == pytest.approx((mean @ true / true.norm() ** 2).item(), abs=1e-9)
    assert found.bias == pytest.approx(((mean - true).norm() / true.norm()).item(), abs=1e-9)


def test_it_is_a_copy_of_importance_but_for_the_kl():
    ours, theirs = ([line.split("#")[0].strip() for line in
                     (ROOT / name).read_text().split("def main")[1].splitlines()]
                    for name in ("lab/kl.py", "lab/importance.py"))
    assert [line for line in ours if line not in theirs] == [
        'penalty = k3(logprobs, ref_logprobs) if args.kl == "reward-k3" else kl',
        'beta = args.beta if args.kl.startswith("reward") else 0.0',
        "rewards = sequence_rewards(scores, penalty, beta)",
        "part = compute_loss(logprobs, advantages[rows])",
        "part = part + args.beta * compute_kl_loss(logprobs, batch.old_logprobs[rows],",
        "ref_logprobs[rows], args.kl)",
        "(part / len(batch)).backward()",
        "loss += part.item() / len(batch)"]
