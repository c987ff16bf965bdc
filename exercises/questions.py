"""Questions with numbers, about a world so small that it can be enumerated.

    python -m exercises.questions                # the world and the questions, as in README.md
    python -m exercises.questions --seed 2027    # another world, for another year

Answers are computed here when they are checked, with the scripts' own functions; none is stored. To
check yours:

    python -m exercises.check --answers exercises/answers.json
"""

import math
import textwrap
from dataclasses import dataclass

import torch
import tyro

import grpo
import ppo
import rloo
from exercises import newer
from exercises.world import BETA, World, cosine_and_projection, kl_of

TOLERANCE = 0.002  # relative, or absolute for answers below 1


def optimum_of(world, ref_probs, beta):
    """pi_ref exp(r / beta), normalized: (M,)."""
    weights = ref_probs * (world.scores / beta).exp()
    return weights / weights.sum()


def objective_of(world, probs, beta=BETA):
    """E[r] - beta KL(probs || pi_ref)."""
    return (probs @ world.scores).item() - beta * kl_of(probs, world.ref_probs)


# ------------------------------------------------------------------------------------ the questions


def kl(world):
    """KL(π ‖ π_ref) over whole responses, in nats."""
    return [kl_of(world.probs, world.ref_probs)]


def objective(world):
    """J(π) = E[r] − β·KL(π ‖ π_ref)."""
    return [objective_of(world, world.probs)]


def optimum(world):
    """J is highest at π* ∝ π_ref·exp(r/β). KL(π* ‖ π_ref); J(π*)."""
    best = optimum_of(world, world.ref_probs, BETA)
    return [kl_of(best, world.ref_probs), objective_of(world, best)]


def ascent(world, start=None, beta=BETA):
    """How near does a run come?

    Start at the logits log π and take 20 steps of size 0.3 along the exact gradient of J. Then
    J(π*) − J(π); KL(π ‖ π_ref).
    """
    logits = (world.policy if start is None else start).log()
    for _ in range(20):
        logits.requires_grad_()
        logprobs = world.token_logprobs(logits)  # (M, T)
        probs = logprobs.sum(1).exp()  # (M,)
        log_ratio = (logprobs - world.ref_logprobs).sum(1)  # (M,)
        (gradient,) = torch.autograd.grad((probs * (world.scores - beta * log_ratio)).sum(), logits)
        logits = logits.detach() + 0.3 * gradient
    probs = world.token_logprobs(logits).sum(1).exp()
    return [optimum(world)[1] - objective_of(world, probs), kl_of(probs, world.ref_probs)]


def variance(world, constant=0.0):
    """The variance of the gradient estimate 1/k·Σ A·∇ log π, with R = r.

    That is the sum of the variances of its nine numbers: for REINFORCE without a baseline, k = 1;
    RLOO, k = 2; RLOO, k = 4.
    """
    found = []
    for k in (1, 2, 4):
        rows, weights = world.draws(k)
        rewards = (world.scores + constant)[rows].flatten()  # (7^k * k,)
        advantages = rewards if k == 1 else rloo.compute_advantages(rewards, k)  # (7^k * k,)
        estimates = world.estimates(advantages, k)  # (7^k, 9)
        mean = weights @ estimates  # (9,)
        found.append((weights @ (estimates - mean).square()).sum().item())
    return found


def plus_ten(world):
    """The same three, if 10 is added to every score."""
    return variance(world, 10.0)


def group_std(world):
    """GRPO's advantages with k = 3, divided by the std, as the factor of ∇ log π.

    There is no 1/length, no clipping and no KL. The expected gradient's cosine to the gradient of
    E[r]; the length of its projection on it, in lengths of it.
    """
    rows, weights = world.draws(3)
    advantages = grpo.compute_advantages(world.scores[rows].flatten(), 3)
    expected = weights @ world.estimates(advantages, 3)
    return cosine_and_projection(expected, world.gradient(world.scores))


def length_mean(world):
    """RLOO with k = 2, but each response's log-prob is divided by its length in tokens.

    Cosine; projection, as above.
    """
    rows, weights = world.draws(2)
    advantages = rloo.compute_advantages(world.scores[rows].flatten(), 2)
    expected = weights @ world.estimates(advantages, 2, length_mean=True)
    return cosine_and_projection(expected, world.gradient(world.scores))


def best_of_n(world, n=4):
    """The best by score of n = 4 responses of π_ref.

    KL(best of n ‖ π_ref); the usual formula log n − (n − 1)/n.
    """
    order = world.scores.argsort()
    below = world.ref_probs[order].cumsum(0)  # (M,), the probability of a score at most as high
    probs = below**n - torch.cat([torch.zeros(1), below[:-1]]) ** n  # (M,)
    return [kl_of(probs, world.ref_probs[order]), math.log(n) - (n - 1) / n]


def gae(world):
    """Tokens as actions, with the table's V as critic.

    The score is on the last token; there is no KL and no whitening, and γ = 1. How far is the
    expected gradient of GAE's advantages from that of E[r], |difference| / |gradient|, for λ = 1;
    0.95; 0?
    """
    true, values = world.gradient(world.scores), world.values[world.states] * world.mask
    found = []
    for lam in (1.0, 0.95, 0.0):
        advantages, _ = ppo.compute_advantages(world.token_rewards(), values, world.mask, 1.0, lam)
        difference = world.token_gradient(advantages) - true  # (9,)
        found.append((difference.norm() / true.norm()).item())
    return found


FIRST = [kl, objective, optimum, ascent, variance, plus_ten, group_std, length_mean, best_of_n, gae]
QUESTIONS = FIRST + newer.QUESTIONS  # of the sheet's second part, and of its fourth

MISCONCEPTIONS = [  # (question, what a misconception gives, what is wrong with it)
    ("kl", lambda world: [kl_of(world.ref_probs, world.probs)],
     "this is KL(π_ref ‖ π): the expectation has to be taken under π, the policy that samples"),
    ("kl", lambda world: [kl(world)[0] / math.log(2)],
     "this is in bits: use the natural logarithm"),
    ("kl", lambda world: [kl(world)[0] / (world.probs @ world.mask.sum(1).double()).item()],
     "this is per token: the KL of a response is the sum over its tokens"),
    ("kl", lambda world: [(world.policy * (world.policy / world.reference).log()).sum().item()],
     "you added up the three states: a state counts only as often as π gets there"),
    ("objective", lambda world: [objective_of(world, world.probs, -BETA)],
     "you added the KL: it is a penalty"),
    ("objective", lambda world: [objective_of(world, world.probs, 0.0)],
     "this is E[r] alone: β·KL is missing"),
    ("objective", lambda world: [objective_of(world, world.probs, 1.0)],
     "the KL is not multiplied by β"),
    ("objective", lambda world: [objective_of(world, world.ref_probs)],
     "this is J(π_ref): the expectation has to be taken under π"),
    ("optimum", lambda world: tilted(world, world.ref_probs, 1 / BETA),
     "you took exp(β·r): r has to be divided by β"),
    ("optimum", lambda world: tilted(world, world.ref_probs, 1.0),
     "you took exp(r): r has to be divided by β"),
    ("optimum", lambda world: tilted(world, world.probs, BETA),
     "you tilted π: the optimum is π_ref tilted, wherever training starts"),
    ("optimum", lambda world: tilted(world, torch.ones(7, dtype=torch.float64), BETA),
     "you left π_ref out: exp(r/β) alone is the optimum with an entropy bonus, not with a KL to "
     "π_ref"),
    ("ascent", lambda world: ascent(world, world.reference), "you started at π_ref, not at π"),
    ("ascent", lambda world: ascent(world, beta=0.0),
     "you climbed E[r] alone: the gradient lacks that of −β·KL"),
    ("variance", lambda world: [k * k * x for k, x in zip((1, 2, 4), variance(world))],
     "you summed over the k responses: the estimate is their mean"),
    ("variance", lambda world: [variance(world)[0] / k for k in (1, 2, 4)],
     "1/k is what averaging alone would give: leave-one-out also changes what is averaged"),
    ("variance", lambda world: [*variance(world)[:2], variance(world)[1] / 2],
     "twice as many responses do more than halve the variance: the baseline gets better too"),
    ("plus_ten", variance,
     "a constant leaves every expected gradient as it is, but not every variance: without a "
     "baseline the constant multiplies ∇ log π"),
    ("group_std", lambda world: [1.0, 1.0],
     "dividing by the std is not only a rescaling: each draw has another std"),
    ("group_std", lambda world: [1.0, 2 / 3],
     "(k − 1)/k is right without the std; each draw has another std"),
    ("group_std", lambda world: [group_std(world)[0], math.sqrt(3 / 2) * group_std(world)[1]],
     "your std has k in its denominator: k − 1 is meant"),
    ("length_mean", lambda world: [1.0, 1.0],
     "dividing by the length is not only a rescaling: lengths differ"),
    ("best_of_n", lambda world: [best_of_n(world)[1]] * 2,
     "the formula holds where no two responses are alike; where responses have a probability of "
     "their own it is only an upper bound"),
    ("best_of_n", lambda world: [math.log(4)] * 2,
     "log n is what the single best of n would cost if it were known: its rank is random, so "
     "(n − 1)/n is saved"),
    ("gae", lambda world: [0.0, 0.0, 0.0],
     "a baseline never biases the gradient, but for λ < 1 V is more than a baseline: it stands in "
     "for the rewards to come"),
    *newer.MISCONCEPTIONS,
]


def tilted(world, base, beta):
    probs = optimum_of(world, base, beta)
    return [kl_of(probs, world.ref_probs), objective_of(world, probs)]


# ----------------------------------------------------------------------------------------- checking


def close(answer, value):
    """Both lists of numbers; TOLERANCE is relative for values above 1, absolute for those below."""
    near = [abs(a - v) <= TOLERANCE * max(1, abs(v)) for a, v in zip(answer, value)]
    return len(answer) == len(value) and all(near)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def judge(name, answer, world):
    """One line that says what is wrong with an answer (a number or a list of them), or None."""
    (right,) = [question(world) for question in QUESTIONS if question.__name__ == name]
    answer = answer if isinstance(answer, list) else [answer]
    if None in answer:
        return "not done yet"
    if not all(map(is_number, answer)):
        return f"{answer} should be {len(right)} number(s)"
    if len(answer) != len(right):
        return f"{len(answer)} number(s), should be {len(right)}"
    if close(answer, right):
        return None
    for question, wrong, sentence in MISCONCEPTIONS:
        if question == name and close(answer, wrong(world)):
            return sentence
    if len(right) == 1:
        return "wrong"
    which = [str(i) for i, (a, v) in enumerate(zip(answer, right), 1) if not close([a], [v])]
    return f"number {', '.join(which)} of {len(right)} is wrong"


@dataclass
class Args:
    seed: int = 1
    """which world"""


def main(args):
    print(World(args.seed).tables())
    for number, question in enumerate(QUESTIONS, 1):
        if question in (FIRST[0], newer.QUESTIONS[0]):
            print()
        text = f"{number}. `{question.__name__}`: {' '.join(question.__doc__.split())}"
        print(textwrap.fill(text, 120, subsequent_indent="   "))


if __name__ == "__main__":
    main(tyro.cli(Args))
