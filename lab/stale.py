"""A sampler that lags behind: a policy that has moved away from the one that made its rollouts.

Not a command; `python -m lab.gradient --stale` uses it. The world's policy pi_old samples, and pi,
which the scripts get, is a given KL(pi || pi_old) away, in one of two ways:

- "policy": STEPS steps of pi's own true gradient, as after several optimizer steps on a rollout;
- "random": a random direction in the space of the weights, as where another engine samples, or one
  in lower precision.

Their size is found by bisection. The KL is that of responses, in nats, averaged over the prompts.
"""

import copy
import math
import statistics

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import plot

LAGS = {"policy": "along the policy's own updates", "random": "in a random direction"}
STEPS = 4
HALVINGS = 24  # the KL is right to a few 1e-7 of it
# Besides the scripts of the family: the unbiased one, and PPO's ratio without its clip.
ROWS = ("lab/importance.py", "ppo.py --lam 1 --no-whiten --clip inf")


def lagging(world, lag, kl, seed):
    """A copy of the World whose policy has moved until KL(pi || pi_old) is `kl`.

    Args: world; lag (a key of LAGS); kl (in nats; 0: the world itself); seed (of the direction).
    Returns: None if the policy cannot move that far.
    """
    if kl == 0:
        return world
    moved = copy.copy(world)  # with the same sampler, scores and critic
    moved.policy = copy.deepcopy(world.sampler)
    generator = torch.Generator().manual_seed(1000 * seed + world.seed + 7)
    old = parameters_to_vector(world.sampler.parameters()).detach()  # (P,)
    noise = torch.randn(old.shape, generator=generator, dtype=old.dtype)  # (P,)

    def distance(size):
        """Move by steps of this size. Returns: the KL."""
        weights = old.clone()
        for _ in range(STEPS):
            vector_to_parameters(weights, moved.policy.parameters())
            weights = weights + size * (noise if lag == "random" else -moved.loss_gradient())
        vector_to_parameters(weights, moved.policy.parameters())
        return divergence(moved)

    low, high = 0.0, 1e-3 * math.sqrt(kl / distance(1e-3))  # near 0, the KL is quadratic
    while not distance(high) >= kl:
        if high > 1e6:
            return None
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(middle) < kl else (low, middle)
    return moved


@torch.no_grad()
def divergence(world):
    """KL(pi || pi_old) of the responses, in nats, at the world's temperature: mean over prompts."""
    logprobs, old_logprobs = (world.logprobs(world.temperature, model).sum(1)
                              for model in (world.policy, world.sampler))  # (B M,)
    return (logprobs.exp() * (logprobs - old_logprobs)).sum().item() / len(world.prompts)


# -------------------------------------------------------------------------------------- the picture


def draw(results, path):
    """Angle and length of each estimator's mean gradient against the KL; medians of the worlds.

    Args: results (dict (lag, kl) -> dict command -> list of Results, or one line); path.
    """
    lags = list(dict.fromkeys(lag for lag, _ in results))
    commands = dict.fromkeys(command for found in results.values() for command in found)
    styles = plot.styles(commands)
    figure, axes = plot.plt.subplots(2, len(lags), figsize=(8.3, 6 + 0.1 * len(styles)),
                                     sharex=True, sharey="row", squeeze=False,
                                     layout="constrained")
    for column, lag in zip(axes.T, lags):
        column[0].set_title(f"lag {LAGS[lag]}", fontsize=10)
        column[1].set(xscale="log", xlabel="KL(π ‖ π_old) in nats")
        for axis, name in zip(column, ("angle", "length")):
            for number, (command, points) in enumerate(curves(results, lag, name).items()):
                # Where curves coincide, the later one is the thinner.
                axis.plot(*zip(*points), label=command, linewidth=max(1.0, 3.5 - 0.3 * number),
                          **styles[command])
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("angle to the true gradient (degrees)")
    axes[1, 0].set_ylabel("length of the projection on it\n(share of its norm)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  frameon=False, fontsize=8)
    plot.save(figure, path)


def curves(results, lag, name):
    """Points (KL, median of the Results' attribute `name`): dict command -> list.

    Of the worlds in which it is a number.
    """
    found = {}
    for (other, kl), commands in results.items():
        for command, worlds in commands.items():
            if other == lag and kl > 0 and not isinstance(worlds, str):
                values = [getattr(result, name) for result in worlds]
                values = [value for value in values if not math.isnan(value)]
                if values:
                    found.setdefault(command, []).append((kl, statistics.median(values)))
    return found
