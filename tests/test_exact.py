"""Every estimator's expected first-step gradient against the true gradient of E[r] - beta KL.

A tiny GPT-2 in float64, every response enumerated, the scripts' own functions. Unbiased estimators
agree to 1e-8; for the others the bias is a number: the cosine between the two gradients, and the
length of the projection on the true one.
"""

import math

import pytest
import torch
from helpers.exact import Enumeration

import cispo
import common
import dapo
import dpo
import grpo
import gspo
import maxrl
import ppo
import raft
import reinforce
import reinforce_pp
import reinforce_pp_baseline
import remax
import rloo
import vanilla_pg
from common import sequence_rewards, token_rewards

BETA = 0.3
INF = float("inf")


@pytest.fixture(scope="module")
def world():
    world = Enumeration(words=2)
    assert world.probs.sum().item() == pytest.approx(1, abs=1e-12)
    assert world.true_gradient(BETA).abs().max() > 1e-2
    return world


def assert_unbiased(world, loss, draws, beta=BETA):
    difference = world.expected_gradient(loss, draws) - world.true_gradient(beta)
    assert difference.abs().max() < 1e-8


def bias(world, loss, draws, beta=BETA):
    """Cosine to the true gradient, and length of the projection on it."""
    true, expected = world.true_gradient(beta), world.expected_gradient(loss, draws)
    projection = (expected @ true / true.norm() ** 2).item()
    return (expected @ true / expected.norm() / true.norm()).item(), projection


# ----------------------------------------------------------------------------------------- unbiased


@pytest.mark.parametrize("k, beta", [(2, 0.0), (2, BETA), (3, BETA)])
def test_rloo(world, k, beta):
    rewards = world.sequence_rewards(beta)

    def loss(rows):
        return rloo.compute_loss(world.logprobs[rows],
                                 rloo.compute_advantages(rewards[rows], k)) / k

    assert_unbiased(world, loss, k, beta)


def test_rloo_with_four_words():
    world = Enumeration(words=3)
    rewards = world.sequence_rewards(BETA)
    loss = lambda rows: rloo.compute_loss(world.logprobs[rows],
                                          rloo.compute_advantages(rewards[rows], 2)) / 2
    assert_unbiased(world, loss, 2)


@pytest.mark.parametrize("kind", ["none", "moving-average", "ema"])
def test_reinforce_with_a_baseline_from_earlier_steps(world, kind):
    baseline = reinforce.compute_baseline([1.5, -0.5, 2.0], kind, window=2, decay=0.9)
    rewards = world.sequence_rewards(BETA)

    def loss(rows):
        return reinforce.compute_loss(world.logprobs[rows], rewards[rows] - baseline)

    assert_unbiased(world, loss, 1)


def test_remax(world):
    rewards = world.token_rewards(BETA)
    assert world.logprobs[world.greedy].exp().max() > 0.3
    baseline = world.scores[world.greedy].unsqueeze(0)

    def loss(rows):
        advantages = remax.compute_advantages(rewards[rows], baseline, world.mask[rows])
        return remax.compute_loss(world.logprobs[rows], advantages)

    assert_unbiased(world, loss, 1)


def test_vanilla_pg_with_an_arbitrary_critic(world):
    rewards = world.token_rewards(BETA)

    def loss(rows):
        advantages, _ = vanilla_pg.compute_advantages(rewards[rows], world.values[rows],
                                                      world.mask[rows])
        return vanilla_pg.compute_loss(world.logprobs[rows], advantages)

    assert world.values.abs().max() > 0.5
    assert_unbiased(world, loss, 1)


def ppo_loss(world, lam, whiten=False, clip=0.2, beta=BETA):
    rewards = world.token_rewards(beta)

    def loss(rows):
        advantages, _ = ppo.compute_advantages(rewards[rows], world.values[rows], world.mask[rows],
                                               1.0, lam)
        if whiten:
            advantages = ppo.whiten_advantages(advantages, world.mask[rows])
        return ppo.compute_loss(world.logprobs[rows], world.logprobs[rows].detach(), advantages,
                                clip)[0] / len(rows)

    return loss


@pytest.mark.parametrize("clip", [0.2, INF])
def test_ppo_with_lambda_1_and_no_whitening(world, clip):
    assert_unbiased(world, ppo_loss(world, 1.0, clip=clip), 1)


def reinforce_pp_loss(world, whiten):
    rewards = world.token_rewards(BETA)

    def loss(rows):
        advantages = reinforce_pp.compute_advantages(rewards[rows], world.mask[rows], whiten)
        old_logprobs = world.logprobs[rows].detach()
        return reinforce_pp.compute_loss(world.logprobs[rows], old_logprobs, advantages,
                                         0.2)[0] / len(rows)

    return loss


def test_only_with_the_kl_in_the_reward_is_the_optimum_a_fixed_point():
    """At pi = pi_ref exp(r / beta) / Z, where E[r] - beta KL is highest, RLOO's expected step is 0.

    Not so with k3 or k2 in the loss, which lack the KL to go. How long their step is depends on the
    toy: here it is longer than the gradient of E[r], in others it is shorter (python
    lab/gradient.py --at-optimum --toys 20). A mean that contains the response itself, which halves
    the reward's part for k = 2, would explain half of that gradient.
    """
    world, beta = Enumeration(words=2), 0.5
    # With this reward pi is the optimum.
    world.scores = beta * (world.logprobs - world.ref_logprobs).detach().sum(1)
    reward_gradient = world.true_gradient(0.0).norm()
    assert world.true_gradient(beta).norm() < 1e-12 < 0.1 < reward_gradient
    rewards = world.sequence_rewards(beta)
    loss = lambda rows: rloo.compute_loss(world.logprobs[rows],
                                          rloo.compute_advantages(rewards[rows], 2)) / 2
    assert world.expected_gradient(loss, 2).norm() < 1e-12
    size = lambda loss: (world.expected_gradient(loss, 2).norm() / reward_gradient).item()
    assert size(grpo_loss(world, 2, False, False, beta)) == pytest.approx(2.312, abs=1e-3)
    assert size(reinforce_pp_baseline_loss(world, 2, beta)) == pytest.approx(1.305, abs=1e-3)


def test_k3_in_the_loss_is_the_gradient_of_no_kl_of_the_sequence(world):
    """Token by token, with the prefixes held fixed, it is that of KL(pi_ref || pi).

    For the whole response this is nearly so.
    """
    log_ratio = lambda rows: world.ref_logprobs[rows] - world.logprobs[rows]  # (n, T)
    k3 = world.expected_gradient(
        lambda rows: (log_ratio(rows).exp() - log_ratio(rows) - 1).sum(), 1)
    logprobs, ref_logprobs = world.logprobs.sum(1), world.ref_logprobs.sum(1)  # (M,)
    backward = world.gradient((ref_logprobs.exp() * (ref_logprobs - logprobs)).sum())
    forward = world.gradient((world.probs * (logprobs - ref_logprobs)).sum())
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    assert cosine(k3, backward) == pytest.approx(0.966, abs=1e-3)
    assert cosine(k3, forward) == pytest.approx(0.926, abs=1e-3)


def test_reinforce_pp_without_normalisation(world):
    assert_unbiased(world, reinforce_pp_loss(world, whiten=False), 1)


# ------------------------------------------------------------------- unbiased for another objective


def binary_world():
    """Seven responses, each a success or a failure."""
    world = Enumeration(words=2, length=2)
    world.scores = (world.scores > 0).double()
    return world


def maxrl_loss(world, k, beta=0.0):
    def loss(rows):
        advantages = maxrl.compute_advantages(world.scores[rows], k)
        return maxrl.compute_loss(world.logprobs[rows],
                                  advantages - beta * world.kl[rows].sum(1)) / k

    return loss


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_maxrl_climbs_log_p_cut_off_after_k_minus_1_terms(k):
    world = binary_world()
    p = (world.probs * world.scores).sum().item()
    assert 0.1 < p < 0.9
    expected = world.true_gradient(0.0) * sum((1 - p) ** (j - 1) for j in range(1, k))
    assert (world.expected_gradient(maxrl_loss(world, k), k) - expected).abs().max() < 1e-12


def test_maxrl_subtracts_the_gradient_of_the_kl_whatever_p():
    world = binary_world()
    p = (world.probs * world.scores).sum().item()
    kl = world.true_gradient(BETA) - world.true_gradient(0.0)
    expected = world.true_gradient(0.0) * (1 + (1 - p)) + kl
    assert (world.expected_gradient(maxrl_loss(world, 3, BETA), 3) - expected).abs().max() < 1e-12
    assert kl.abs().max() > 1e-2


def test_maxrl_with_two_responses_is_rloo():
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    assert torch.equal(maxrl.compute_advantages(scores, 2), rloo.compute_advantages(scores, 2))
    more = maxrl.compute_advantages(scores, 4)
    assert more.tolist() == pytest.approx([-1, -1, -1, 3, 1 / 3, -1, 1 / 3, 1 / 3])


# ------------------------------------------------------------------------------ biased, by how much


def grpo_loss(world, k, scale_std, length_mean, beta=0.0):
    def loss(rows):
        advantages = grpo.compute_advantages(world.scores[rows], k, scale_std)
        logprobs = world.logprobs[rows]
        total, _ = grpo.compute_loss(logprobs, logprobs.detach(), world.ref_logprobs[rows],
                                     advantages, world.mask[rows], 0.2, beta, length_mean)
        return total / k

    return loss


def gspo_loss(world, k, beta=0.0):
    def loss(rows):
        logprobs, advantages = world.logprobs[rows], gspo.compute_advantages(world.scores[rows], k)
        return gspo.compute_loss(logprobs, logprobs.detach(), world.ref_logprobs[rows], advantages,
                                 world.mask[rows], 3e-4, 4e-4, beta)[0] / k

    return loss


def cispo_loss(world, k, beta=0.0):
    def loss(rows):
        logprobs, advantages = world.logprobs[rows], cispo.compute_advantages(world.scores[rows], k)
        return cispo.compute_loss(logprobs, logprobs.detach(), world.ref_logprobs[rows], advantages,
                                  world.mask[rows], 5.0, beta)[0] / world.mask[rows].sum()

    return loss


def reinforce_pp_baseline_loss(world, k, beta):
    """Without whitening."""

    def loss(rows):
        scores = reinforce_pp_baseline.center_scores(world.scores[rows], k)
        rewards = token_rewards(scores, world.kl[rows], 0.0, world.mask[rows])
        advantages = reinforce_pp_baseline.compute_advantages(rewards, world.mask[rows],
                                                              whiten=False)
        loss, _ = reinforce_pp_baseline.compute_loss(
            world.logprobs[rows], world.logprobs[rows].detach(), advantages, 0.2)
        return (loss + beta * reinforce_pp_baseline.compute_kl_loss(
            world.logprobs[rows], world.ref_logprobs[rows])) / k

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3])
def test_mean_centring_scales_the_gradient(world, k):
    """GRPO without std and length mean: exactly (k - 1) / k of the true gradient."""
    expected = world.expected_gradient(grpo_loss(world, k, False, False), k)
    assert (expected - (k - 1) / k * world.true_gradient(0.0)).abs().max() < 1e-8


def rloo_loss_with_k3(world):
    """RLOO with k3 = exp(-k1) - 1 + k1 in the reward: an unbiased value with a biased gradient."""
    k3 = (-world.kl).exp() - 1 + world.kl  # (M, T), 0 where masked
    rewards = sequence_rewards(world.scores, k3, BETA)
    return lambda rows: rloo.compute_loss(world.logprobs[rows],
                                          rloo.compute_advantages(rewards[rows], 2)) / 2


def rloo_loss_with_length_mean(world):
    rewards = world.sequence_rewards(BETA)
    lengths = world.mask.sum(1, keepdim=True)
    return lambda rows: rloo.compute_loss((world.logprobs / lengths)[rows],
                                          rloo.compute_advantages(rewards[rows], 2)) / 2


BIASED = {
    "grpo, std, k = 3": (
        lambda world: bias(world, grpo_loss(world, 3, True, False), 3, 0.0), (0.958, 0.643)),
    "grpo, length mean, k = 3": (
        lambda world: bias(world, grpo_loss(world, 3, False, True), 3, 0.0), (0.982, 0.287)),
    "grpo, both, k = 3": (
        lambda world: bias(world, grpo_loss(world, 3, True, True), 3, 0.0), (0.973, 0.260)),
    "gspo, k = 3: grpo's, both": (
        lambda world: bias(world, gspo_loss(world, 3), 3, 0.0), (0.973, 0.260)),
    "cispo, k = 3": (
        lambda world: bias(world, cispo_loss(world, 3), 3, 0.0), (0.967, 0.233)),
    "cispo, k = 2, KL k3 in the loss": (
        lambda world: bias(world, cispo_loss(world, 2, BETA), 2), (0.654, 0.063)),
    "grpo, KL k3 in the loss": (
        lambda world: bias(world, grpo_loss(world, 2, False, False, BETA), 2), (0.631, 0.225)),
    "reinforce_pp_baseline, k = 2": (
        lambda world: bias(world, reinforce_pp_baseline_loss(world, 2, BETA), 2), (0.906, 0.355)),
    "reinforce_pp_baseline, k = 3": (
        lambda world: bias(world, reinforce_pp_baseline_loss(world, 3, BETA), 3), (0.964, 0.539)),
    "reinforce_pp, whitening, N = 3": (
        lambda world: bias(world, reinforce_pp_loss(world, True), 3), (0.874, 0.468)),
    "ppo, whitening, N = 3": (
        lambda world: bias(world, ppo_loss(world, 1.0, whiten=True), 3), (0.980, 0.415)),
    "rloo, KL k3 in the reward": (
        lambda world: bias(world, rloo_loss_with_k3(world), 2), (0.970, 1.329)),
    "rloo, length mean": (
        lambda world: bias(world, rloo_loss_with_length_mean(world), 2), (0.981, 0.442)),
    "ppo, lambda 0.95, wrong critic": (
        lambda world: bias(world, ppo_loss(world, 0.95), 1), (0.999, 0.855)),
    "ppo, lambda 0, wrong critic": (
        lambda world: bias(world, ppo_loss(world, 0.0), 1), (-0.658, -0.703)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BIASED)
def test_known_bias(world, name):
    measure, expected = BIASED[name]
    assert measure(world) == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------------------------------- equivalences


def random_batch(n=6, T=5, seed=0):
    """Rewards, values (n, T) and a mask of ragged lengths, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([5, 1, 3, 2, 5, 4]).unsqueeze(1)  # (n, T)
    rewards, values = (torch.randn(n, T, generator=generator, dtype=torch.float64) * mask
                       for _ in range(2))
    return rewards, values, mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_plain_double_sum(gamma, lam):
    rewards, values, mask = random_batch()
    advantages, returns = ppo.compute_advantages(rewards, values, mask, gamma, lam)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        v = [*values[row, :length].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            plain = sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length))
            assert advantages[row, t].item() == pytest.approx(plain, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(plain + v[t], abs=1e-12)
        assert (advantages[row, length:] == 0).all() and (returns[row, length:] == 0).all()


def test_ppo_with_everything_off_is_vanilla_pg(world):
    rewards, values, mask = random_batch()
    advantages, returns = ppo.compute_advantages(rewards, values, mask, 1.0, 1.0)
    expected, expected_returns = vanilla_pg.compute_advantages(rewards, values, mask)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected_returns)
    rows = torch.arange(6)
    logprobs, weights = (world.logprobs[rows],
                         torch.randn(6, 3, dtype=torch.float64) * world.mask[rows])
    loss, clipped = ppo.compute_loss(logprobs, logprobs.detach(), weights, INF)
    difference = world.gradient(loss) - world.gradient(vanilla_pg.compute_loss(logprobs, weights))
    assert difference.abs().max() < 1e-12 and clipped == 0
    new_values = values + 1
    torch.testing.assert_close(ppo.compute_value_loss(new_values, values, returns, INF),
                               vanilla_pg.compute_value_loss(new_values, returns))


@pytest.mark.parametrize("k", [2, 3])
def test_grpo_and_reinforce_pp_group_are_mean_centred_rloo(k):
    scores = torch.randn(4 * k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    expected = (k - 1) / k * rloo.compute_advantages(scores, k)
    torch.testing.assert_close(grpo.compute_advantages(scores, k, scale_std=False), expected)
    torch.testing.assert_close(reinforce_pp_baseline.center_scores(scores, k), expected)


def test_ppo_clips_what_goes_too_far_and_counts_it():
    """Ratios 1.5 and 0.5, advantages of both signs: only moves that these ask for are stopped."""
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    loss, clipped = ppo.compute_loss(logprobs, torch.zeros(1, 5), advantages, 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2)) and clipped == 2
    values = ppo.compute_value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2),
                                    torch.tensor([1.0, 1.0]), 0.2)
    assert values.item() == pytest.approx((0.8**2 + 0.9**2) / 2)  # the first is held at 0.2


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_gspo_on_policy_is_grpo(world, beta):
    expected = world.expected_gradient(grpo_loss(world, 2, True, True, beta), 2)
    assert (world.expected_gradient(gspo_loss(world, 2, beta), 2) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("advantage, low, high, value, weights, clipped", [
    (1.0, 0.2, 0.2, 1.2, 0.0, 2),  # s = 1.5: as far as its advantage may take it
    (-1.0, 0.2, 0.2, -1.5, -0.75, 0),  # the other way it is free
    (1.0, 0.2, 0.6, 1.5, 0.75, 0), (1.0, 0.2, INF, 1.5, 0.75, 0)])
def test_gspo_clips_a_response_as_a_whole(advantage, low, high, value, weights, clipped):
    """Ratios 3 and 0.75 of two tokens: s = sqrt(2.25) = 1.5. The third is padding."""
    logprobs = torch.tensor([[3.0, 0.75, 1.0]]).log().requires_grad_()
    loss, count = gspo.compute_loss(logprobs, torch.zeros(1, 3), logprobs.detach(),
                                    torch.tensor([advantage]), torch.tensor([[True, True, False]]),
                                    low, high, 0.3)
    assert -loss.item() == pytest.approx(value) and count == clipped
    found = -torch.autograd.grad(loss, logprobs)[0][0, :2]  # where there is no padding
    assert found.tolist() == pytest.approx([weights, weights])  # s A / |y|


def test_cispo_weighs_tokens_and_loses_none():
    """Ratios 3, 1.5 and 0.5: GRPO with clip 0.2 loses the first two, or with A < 0 the last."""
    mask = torch.tensor([[True, True, True, False]])
    for advantage, kept_by_grpo in ((2.0, [False, False, True]), (-2.0, [True, True, False])):
        found = []
        for script, limits in ((cispo, (2.5, 0.0)), (grpo, (0.2, 0.0))):
            logprobs = torch.tensor([[3.0, 1.5, 0.5, 1.0]]).log().requires_grad_()
            loss, count = script.compute_loss(
                logprobs, torch.zeros(1, 4), logprobs.detach(), torch.tensor([advantage]), mask,
                *limits)
            found.append((-torch.autograd.grad(loss, logprobs)[0])[0].tolist())
            assert script is grpo or count == 1
        assert found[0] == pytest.approx([2.5 * advantage, 1.5 * advantage, 0.5 * advantage, 0.0])
        assert [weight != 0 for weight in found[1][:3]] == kept_by_grpo


def test_dapo_on_policy_is_cispo(world):
    """Both are GRPO's token mean there."""
    rows = torch.tensor([0, 3, 9])
    logprobs, advantages = world.logprobs[rows], dapo.compute_advantages(world.scores[rows], 3)
    found = [world.gradient(script.compute_loss(
        logprobs, logprobs.detach(), world.ref_logprobs[rows], advantages, world.mask[rows],
        *limits, BETA)[0]) for script, limits in ((dapo, (0.2, 0.28)), (cispo, (5.0,)))]
    assert (found[0] - found[1]).abs().max() < 1e-12 < 1e-2 < found[0].abs().max()


def test_dapo_clips_higher_than_lower():
    """Ratios 1.25, 1.3, 0.75 and 0.85, advantages of both signs."""
    logprobs = torch.tensor([[1.25, 1.3, 0.75, 0.85]]).log()
    for advantage, value, clipped in ((1.0, 1.25 + 1.28 + 0.75 + 0.85, 1),
                                      (-1.0, -1.25 - 1.3 - 0.8 - 0.85, 1)):
        loss, count = dapo.compute_loss(
            logprobs, torch.zeros(1, 4), logprobs, torch.tensor([advantage]),
            torch.ones(1, 4).bool(), 0.2, 0.28, 0.3)
        assert -loss.item() == pytest.approx(value) and count == clipped


def test_dapo_fills_a_batch_with_prompts_whose_scores_differ():
    """Prompts a ... f with two responses each, in two rounds; b, d and e give a signal."""
    def sampled(names, scores, length):
        responses = [[ord(name), sample] + [7] * (length - 2) for name in names
                     for sample in range(2)]
        batch = common.Batch(
            torch.tensor([[ord(name)] for name in names for _ in range(2)]),
            torch.ones(6, 1).bool(), torch.tensor(responses), torch.ones(6, length).bool(),
            torch.ones(6).bool(), torch.zeros(6, length))
        return {"prompt": list(names)}, batch, {"score": torch.tensor(scores) + 9}, (
            torch.tensor(scores))

    rounds = [sampled("abc", [1.0, 1.0, 0.0, 1.0, 0.0, 0.0], 3),
              sampled("def", [2.0, 0.0, 0.0, 3.0, 5.0, 5.0], 4)]
    for size, names, wanted in ((2, "bd", [0, 1, 2, 0]),
                                (4, "bdea", [0, 1, 2, 0, 0, 3, 1, 1])):
        examples, batch, parts, scores = dapo.fill(rounds, size, 2, 0)
        assert "".join(examples["prompt"]) == names and scores.tolist() == wanted
        assert (parts["score"] == scores + 9).all()
        assert batch.prompts[::2, 0].tolist() == list(map(ord, names))
        assert batch.responses[:, :2].tolist() == [[ord(name), i] for name in names for i in (0, 1)]
        assert batch.response_mask.sum(1).tolist()[:4] == [3, 3, 4, 4]


def test_reinforce_pp_normalises_over_the_tokens_of_the_whole_batch():
    rewards, _, mask = random_batch()
    advantages = reinforce_pp.compute_advantages(rewards, mask)
    tokens = advantages[mask]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-12)
    assert (tokens.std(correction=0).item() == pytest.approx(1, abs=1e-9)
            and (advantages[~mask] == 0).all())
    returns = reinforce_pp.compute_advantages(rewards, mask, whiten=False)
    assert returns[2, 0].item() == pytest.approx(rewards[2, :3].sum().item())
    scores = reinforce_pp.normalize_scores(torch.tensor([0.0, 0.0, 0.0, 4.0]), 1.5)
    assert scores.tolist() == pytest.approx([-1 / math.sqrt(3)] * 3 + [1.5])
    assert reinforce_pp_baseline.compute_kl_loss(torch.tensor([[1.0, 2.0]]),
                                                 torch.tensor([[0.0, 4.0]])).item() == 2.5


@pytest.mark.parametrize("score", [0.1, 0.3, -7.7])
def test_equal_scores_and_single_tokens_carry_no_signal(score):
    """In float32 the mean of 64 times 0.1 is not 0.1: scaled to std 1 it would be a signal."""
    assert reinforce_pp.normalize_scores(torch.full((64,), score), 10.0).tolist() == [0.0] * 64
    mask = torch.ones(64, 1).bool()
    assert ppo.whiten_advantages(torch.full((64, 1), score), mask).abs().max() == 0
    assert ppo.whiten_advantages(torch.tensor([[score]]), mask[:1]).tolist() == [[0.0]]
    assert reinforce_pp.compute_advantages(torch.tensor([[score]]), mask[:1]).tolist() == [[0.0]]


def test_reinforce_baselines_by_hand():
    history = [1.0, 2.0, 6.0]
    assert reinforce.compute_baseline([], "moving-average", 0, 0.9) == 0
    assert reinforce.compute_baseline(history, "none", 0, 0.9) == 0
    assert reinforce.compute_baseline(history, "moving-average", 0, 0.9) == 3
    assert reinforce.compute_baseline(history, "moving-average", 2, 0.9) == 4
    assert reinforce.compute_baseline(history, "ema", 0, 0.5) == pytest.approx(
        0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 6)


def test_a_baseline_is_subtracted():
    """Added, it would be just as unbiased, with more variance: only the value itself can tell."""
    rewards, mask = torch.tensor([[-0.5, 2.0, 0.0]]), torch.tensor([[True, True, False]])
    assert remax.compute_advantages(rewards, torch.tensor([1.0]),
                                    mask).tolist() == [[0.5, 1.0, 0.0]]
    advantages, returns = vanilla_pg.compute_advantages(rewards, torch.tensor([[1.0, 3.0, 0.0]]),
                                                        mask)
    assert advantages.tolist() == [[0.5, -1.0, 0.0]] and returns.tolist() == [[1.5, 2.0, 0.0]]


def test_grpo_by_hand():
    advantages = grpo.compute_advantages(torch.tensor([0.0, 2.0, 5.0, 5.0]), 2)
    assert advantages.tolist() == pytest.approx(
        [-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4), 0, 0])
    logprobs = torch.tensor([[-1.0, -1.0]])
    mask = torch.tensor([[True, True]])
    loss, _ = grpo.compute_loss(logprobs, logprobs, logprobs + math.log(2), torch.tensor([3.0]),
                                mask, 0.2, 0.5)
    assert loss.item() == pytest.approx(-3 + 0.5 * (2 - math.log(2) - 1))


def test_raft_keeps_the_best_of_each_prompt():
    assert raft.select_best(torch.tensor([1.0, 3.0, 2.0, 9.0, 8.0, 7.0]), 3).tolist() == [1, 3]
    assert raft.compute_loss(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])).item() == 6


def test_dpo_by_hand_and_its_gradient_at_the_reference(world):
    ones = torch.ones(1, 2)
    loss, chosen, rejected = dpo.compute_loss(-1 * ones, -3 * ones, -2 * ones, -2 * ones, 0.5)
    assert (chosen.item(), rejected.item()) == (1, -1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    a, b = world.logprobs[[1]], world.logprobs[[7]]
    loss, _, _ = dpo.compute_loss(a, b, a.detach(), b.detach(), 0.1)
    assert loss.item() == pytest.approx(math.log(2))
    difference = world.gradient(loss) - 0.05 * world.gradient(b.sum() - a.sum())
    assert difference.abs().max() < 1e-12
