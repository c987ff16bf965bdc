"""The questions of the sheet's fourth part: derivations, MaxRL, OPO, which KL, a stale sampler.

They are asked and checked as those of questions.py are, in the same world.
"""

import torch

import grpo
import maxrl
import ppo
from exercises.solutions import right
from exercises.world import BETA, cosine_and_projection, kl_of
from lab.objective import slope

# ----------------------------------------------------------------------------------- what is needed


def gradients_of(world):
    """grad log pi of whole responses: (M, 9)."""
    return world.score_functions.sum(1)


def lengths(world):
    return world.mask.sum(1).double()  # (M,)


def loss_gradient(world, loss, probs):
    """The expected gradient (9,) of a loss, without that of the responses' probabilities.

    Args: world; loss (function (logprobs (M, T)) -> (M,)); probs (M,).
    """
    logits = world.logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(probs @ loss(world.token_logprobs(logits)), logits)
    return found.flatten()


def distance(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def k_loss(world, kind, tokens):
    """The gradient of E[k1], E[k2] or E[k3] as a term of the loss.

    Args: world; kind ("k1", "k2", "k3"); tokens (True: summed over tokens, False: of responses).
    """
    def loss(logprobs):
        given = logprobs, world.ref_logprobs, world.mask
        if not tokens:
            given = [x.sum(1, keepdim=True) for x in given[:2]] + [torch.ones(7, 1).bool()]
        return right.token_kl(*given, kind).sum(1)

    return loss_gradient(world, loss, world.probs)


def log_ratio(world):
    """log pi - log pi_ref of whole responses: (M,)."""
    return (world.logprobs - world.ref_logprobs).sum(1)


# ------------------------------------------------------------------------------------- derivations


def any_baseline(world):
    """b is a baseline.

    The length of the vector E[b·∇ log π(y)], if b is the score of another response, drawn
    independently from π; if b is the number of tokens of y.
    """
    other = world.probs @ world.scores * (world.probs @ gradients_of(world))
    return [other.norm().item(), world.gradient(lengths(world)).norm().item()]


def group_mean(world):
    """A_i = r_i − c·mean(r_1 … r_k), r_i included, as the factor of ∇ log π.

    The length of the expected gradient's projection on the gradient of E[r], in lengths of it, for
    k = 2 and c = 1; k = 4, c = 1; k = 4, c = 1/2.
    """
    return [shrunk(world, k, c) for k, c in ((2, 1.0), (4, 1.0), (4, 0.5))]


def shrunk(world, k, c):
    rows, weights = world.draws(k)
    rewards = world.scores[rows].flatten()
    centred = grpo.compute_advantages(rewards, k, scale_std=False)
    expected = weights @ world.estimates((1 - c) * rewards + c * centred, k)
    return cosine_and_projection(expected, world.gradient(world.scores))[1]


def kl_values(world):
    """x = log π(y) − log π_ref(y) of whole responses, y from π.

    E[k1] with k1 = x; E[k2] with k2 = x²/2; E[k3] with k3 = exp(−x) − 1 + x.
    """
    x = log_ratio(world)
    return [(world.probs @ k).item() for k in (x, x.square() / 2, (-x).exp() - 1 + x)]


def kl_gradients(world):
    """The same as terms of a loss: E[∇k] is compared with ∇KL(π ‖ π_ref), |difference| / |∇KL|.

    For k1; k2; k3. Then E[∇k3] compared with ∇KL(π_ref ‖ π) in the same way.
    """
    wanted = world.gradient(log_ratio(world))
    reverse = -(world.ref_probs @ gradients_of(world))
    found = [k_loss(world, kind, tokens=False) for kind in ("k1", "k2", "k3")]
    return [*[distance(each, wanted) for each in found], distance(found[2], reverse)]


# --------------------------------------------------------------------------------------- questions


def maxrl_order(world):
    """A response is right (its reward is 1) if its score is above 1, else wrong (0).

    p is the probability of a right one. MaxRL's advantages as the factor of ∇ log π: the expected
    gradient is a multiple of ∇p. Which one, for k = 2; 4; 8?
    """
    p = world.probs[world.scores > 1].sum().item()
    return [slope(maxrl.compute_advantages, p, k) for k in (2, 4, 8)]


def opo(world):
    """OPO's baseline is the mean of all k rewards, weighted with the responses' lengths in tokens.

    With k = 3 and A as the factor of ∇ log π: the expected gradient's cosine to the gradient of
    E[r]; the length of its projection on it, in lengths of it. Then the response itself is left out
    of its weighted mean: |difference| / |gradient|.
    """
    rows, weights = world.draws(3)
    rewards, length = world.scores[rows], lengths(world)[rows]  # (343, 3)
    sums = (length * rewards).sum(1, keepdim=True), length.sum(1, keepdim=True)
    published = rewards - sums[0] / sums[1]
    repaired = rewards - (sums[0] - length * rewards) / (sums[1] - length)
    found, other = (weights @ world.estimates(A.flatten(), 3) for A in (published, repaired))
    true = world.gradient(world.scores)
    return [*cosine_and_projection(found, true), distance(other, true)]


def which_kl(world):
    """k1, k2 and k3 of each token now, summed over the response, times β.

    The rest is exact. The expected gradient's cosine to the gradient of J, for k1 in the reward; k3
    in the reward; k2 in the loss; k3 in the loss.
    """
    true = world.gradient(world.scores - BETA * log_ratio(world))
    found = []
    for kind in ("k1", "k3"):
        k = right.token_kl(world.logprobs, world.ref_logprobs, world.mask, kind).sum(1)
        found.append(world.gradient(world.scores - BETA * k))
    for kind in ("k2", "k3"):
        found.append(world.gradient(world.scores) - BETA * k_loss(world, kind, tokens=True))
    return [cosine_and_projection(each, true)[0] for each in found]


def stale_sampler(world):
    """π_old = (3π + π_ref)/4 in each state has sampled, π is trained; A = r − E_old[r].

    KL(π ‖ π_old) of whole responses. The cosine to the gradient of E[r] at π of the expectation,
    over π_old, of A·∇ log π(y); of the same times π(y)/π_old(y); of the sum over tokens of
    A·ratio·∇ log π, with each token's own ratio π/π_old.
    """
    logprobs, probs, advantages = sampler(world)
    gradients = gradients_of(world)
    weights = probs * advantages
    of_tokens = (world.logprobs - logprobs).exp() * weights.unsqueeze(1)  # (M, T)
    found = [weights @ gradients, weights * world.probs / probs @ gradients,
             torch.einsum("mt, mtg -> g", of_tokens, world.score_functions)]
    true = world.gradient(world.scores)
    return [kl_of(world.probs, probs), *[cosine_and_projection(each, true)[0] for each in found]]


def stale_clip(world):
    """The last of them with PPO's loss, which clips each token's ratio to 1 ± 0.15.

    Cosine; projection. The share of the tokens sampled from π_old whose gradient is cut.
    """
    return clipped(world, 0.15)


def sampler(world):
    """The older policy's log-probs (M, T) and probabilities (M,), and the advantages (M,)."""
    logprobs = world.token_logprobs(((3 * world.policy + world.reference) / 4).log())
    probs = logprobs.sum(1).exp()
    return logprobs, probs, world.scores - probs @ world.scores


def clipped(world, clip):
    """Cosine and projection with PPO's loss, and the share of clipped tokens."""
    old_logprobs, probs, advantages = sampler(world)
    advantages = advantages.unsqueeze(1) * world.mask  # (M, T)

    def losses(logprobs):
        """PPO's loss and its number of clipped tokens, for each response: (M,) each."""
        rows = zip(logprobs.split(1), old_logprobs.split(1), advantages.split(1))
        return map(torch.stack, zip(*[ppo.compute_loss(*row, clip) for row in rows]))

    gradient = loss_gradient(world, lambda logprobs: next(losses(logprobs)), probs)
    _, counts = losses(world.logprobs)
    share = probs @ counts.double() / (probs @ lengths(world))
    return [*cosine_and_projection(-gradient, world.gradient(world.scores)), share.item()]


QUESTIONS = [any_baseline, group_mean, kl_values, kl_gradients, maxrl_order, opo, which_kl,
             stale_sampler, stale_clip]


def success(world):
    return world.probs[world.scores > 1].sum().item()


def outside(world):
    """The share of tokens whose ratio is outside stale_clip's range."""
    logprobs, probs, _ = sampler(world)
    far = (((world.logprobs - logprobs).exp() - 1).abs() > 0.15).sum(1).double()  # (M,)
    return (probs @ far / (probs @ lengths(world))).item()


def of_responses(world):
    """which_kl with the k's of whole responses instead of tokens."""
    x = log_ratio(world)
    true = world.gradient(world.scores - BETA * x)
    k3 = world.gradient(world.scores - BETA * ((-x).exp() - 1 + x))
    losses = [world.gradient(world.scores) - BETA * k_loss(world, kind, tokens=False)
              for kind in ("k2", "k3")]
    return [cosine_and_projection(each, true)[0] for each in (true, k3, *losses)]


MISCONCEPTIONS = [  # as in questions.py
    ("any_baseline", lambda world: [0.0, 0.0],
     "the length depends on y, so it cannot be taken out of the expectation over y"),
    ("any_baseline", lambda world: [world.gradient(world.scores).norm().item(),
                                    any_baseline(world)[1]],
     "you took the score of y itself: the other response has to be drawn independently"),
    ("group_mean", lambda world: [1.0, 1.0, 1.0],
     "the mean contains r_i, and that share of it is not independent of y_i"),
    ("group_mean", lambda world: [0.5, 0.75, 0.75],
     "half of the mean takes away half as much: only c/k of r_i is in the baseline"),
    ("group_mean", lambda world: [0.5, 0.75, 0.375],
     "c multiplies the mean alone, not the whole advantage"),
    ("kl_values", lambda world: [kl_values(world)[0]] * 3,
     "k2 is biased: only k1 and k3 have the KL as their expectation"),
    ("kl_values", lambda world: [*kl_values(world)[:2], kl_of(world.ref_probs, world.probs)],
     "your k3 is upside down: exp(−x) is π_ref/π"),
    ("kl_gradients", lambda world: [0.0, 0.0, 0.0, kl_gradients(world)[3]],
     "an unbiased value need not have an unbiased gradient: the expectation's own dependence on π "
     "is not differentiated"),
    ("kl_gradients", lambda world: [0.0, *kl_gradients(world)[1:]],
     "E[∇k1] is E[∇ log π] = 0, so that all of ∇KL is missing"),
    ("maxrl_order", lambda world: [1 / success(world)] * 3,
     "1/p is what an infinite k would give: k responses see k − 1 terms of it"),
    ("maxrl_order", lambda world: [(1 - (1 - success(world)) ** k) / success(world)
                                   for k in (2, 4, 8)],
     "this is one term too many: it is what r/mean would give, without a mean that is subtracted"),
    ("opo", lambda world: [1.0, 2 / 3, 0.0],
     "(k − 1)/k is right for equal weights: here they depend on y, too"),
    ("which_kl", lambda world: [1.0] * 4,
     "only k1 in the reward is exact: write down what the others are the gradient of"),
    ("which_kl", of_responses,
     "you took the k's of whole responses: here they are those of the tokens, summed"),
    ("stale_sampler", lambda world: [stale_sampler(world)[0], 1.0, 1.0, 1.0],
     "only the ratio of the whole response turns an expectation under π_old into one under π"),
    ("stale_sampler", lambda world: [kl_of(sampler(world)[1], world.probs),
                                     *stale_sampler(world)[1:]],
     "this is KL(π_old ‖ π): the expectation has to be taken under π"),
    ("stale_clip", lambda world: clipped(world, float("inf")),
     "nothing is clipped"),
    ("stale_clip", lambda world: [*stale_clip(world)[:2], outside(world)],
     "you counted all tokens outside the range: the gradient is cut only where the clipped term is "
     "the smaller one"),
]
