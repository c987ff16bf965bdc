"""lab/reuse.py: four ways to weight a rollout of another policy, and RLOO where it is its own."""

import pytest
import torch
from helpers import loop
from test_gradient import ROOT, SMALL, measure
from test_stale import lagging_world

import rloo
from lab import gradient, reuse

RATIOS = ("none", "token", "clip", "sequence")
ONE_STEP = "lab/reuse.py --minibatches 1 --ratio"


@pytest.mark.parametrize("ratio, weights", [
    ("none", [[1, 1, 0], [1, 1, 1]]), ("token", [[1.5, 0.5, 0], [1.25, 0.5, 2]]),
    ("clip", [[0, 0.5, 0], [1.25, 0, 2]]), ("sequence", [[0.75, 0.75, 0], [1.25, 1.25, 1.25]])])
def test_the_weight_of_every_token_by_hand(ratio, weights):
    """Ratios 1.5, 0.5 with advantage 3, and 1.25, 0.5, 2 with -1; the range is 0.8 to 1.2."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    old = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -3.0]])
    ratios = torch.tensor([[1.5, 0.5, 1.0], [1.25, 0.5, 2.0]])
    logprobs = (old + ratios.log()).masked_fill(~mask, 0.0).requires_grad_()
    advantages = torch.tensor([3.0, -1.0])
    reuse.compute_loss(logprobs, old, advantages, mask, ratio, 0.2).backward()
    wanted = -advantages[:, None] * torch.tensor(weights)
    torch.testing.assert_close(logprobs.grad, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", RATIOS)
def test_on_policy_every_ratio_is_rloo(ratio):
    ours, rloos = measure(f"{ONE_STEP} {ratio}"), measure("rloo.py")
    assert (ours.cosine, ours.length) == pytest.approx((1, 1), abs=1e-12)
    assert ours.variance == pytest.approx(rloos.variance, rel=1e-12)


@pytest.mark.slow
def test_off_policy_the_ratios_are_what_they_say():
    """None is rloo.py, a clip that never shuts is the token's ratio, the sequence's is unbiased."""
    world = lagging_world("policy", 0.03)
    with loop.float64():
        found = {name: gradient.measure(f"{name} --beta 0", world, SMALL) for name in (
            "rloo.py", "lab/importance.py", f"{ONE_STEP} clip --clip inf",
            *(f"{ONE_STEP} {ratio}" for ratio in RATIOS))}

    def numbers(name):
        result = found[f"{ONE_STEP} {name}" if name in RATIOS else name]
        return pytest.approx((result.cosine, result.length, result.variance), rel=1e-9)

    def is_as(ours, theirs):
        result = found[f"{ONE_STEP} {ours}"]
        return (result.cosine, result.length, result.variance) == numbers(theirs)

    assert is_as("none", "rloo.py") and is_as("sequence", "lab/importance.py")
    assert is_as("clip --clip inf", "token") and not is_as("clip", "token")
    assert found[f"{ONE_STEP} sequence"].bias < 1e-9
    assert min(found[f"{ONE_STEP} {ratio}"].bias for ratio in RATIOS[:3]) > 1e-3


def test_reuse_is_a_copy_of_rloo_with_the_steps_of_grpo():
    """Every line of its loop is one of theirs, but for the call of its loss."""
    assert reuse.compute_advantages.__code__.co_code == rloo.compute_advantages.__code__.co_code

    def lines(name):
        text = (ROOT / name).read_text().split("\ndef main(args):")[1]
        return [line.split("#")[0].strip() for line in text.splitlines()]

    known = {*lines("rloo.py"), *lines("grpo.py")}
    assert [line for line in lines("lab/reuse.py") if line not in known] == [
        "grad_clipped = 0",
        "part = compute_loss(logprobs, batch.old_logprobs[rows], advantages[rows],",
        "batch.response_mask[rows], args.ratio, args.clip)"]


def test_more_minibatches_than_responses_get_one_sentence(capsys):
    with pytest.raises(SystemExit):
        reuse.main(reuse.Args(k=2, prompts_per_step=1, minibatches=3))
    assert capsys.readouterr().err == ("error: --minibatches 3: a rollout has only 2 responses to "
                                       "divide\n")
