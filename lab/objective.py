"""What an estimator climbs where rewards are 0 or 1: its expected gradient as a function of p.

    python -m lab.objective                               # RLOO, GRPO and MaxRL
    python -m lab.objective rloo.py my_rloo.py --k 4 64

p is the probability that the policy's response is right. On policy and without a KL, the mean of
1/k sum_i A_i grad log pi(y_i) is f(p) grad p, since A depends on the rewards only
(GRPO without its 1/|y|, or with responses of equal length), and

    f(p) = E[ 1/k sum_i A_i (r_i - p) ] / (p (1 - p))

So the estimator climbs the function of p whose derivative is f: p where f is 1, 2 arcsin sqrt(p)
where it is 1/sqrt(p (1 - p)), log p where it is 1/p. The expectation is a sum over all numbers of
right responses, of the script's own `compute_advantages(rewards, k)`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import plot
from lab.blackbox import ROOT
from plumbing import load_module, require

LIMITS = {  # what it climbs -> its derivative
    "p": lambda p: 1.0, "2 arcsin √p": lambda p: (p * (1 - p)) ** -0.5, "log p": lambda p: 1 / p}
GRID = [i / 100 for i in range(1, 100)]


@dataclass
class Args:
    scripts: Annotated[tuple[str, ...], tyro.conf.Positional] = ("rloo.py", "grpo.py", "maxrl.py")
    """scripts whose compute_advantages takes rewards and k"""
    k: tuple[int, ...] = (2, 4, 16, 64)
    """responses per prompt, a curve each"""
    output: str = "runs/objective.png"
    """PNG file for the picture"""


def slope(compute_advantages, p, k):
    """f(p), where the mean gradient is f(p) grad p.

    Args: compute_advantages (function (rewards (k,), k) -> (k,)); p; k.
    """
    total = 0.0
    for right in range(k + 1):
        rewards = torch.tensor([1.0] * right + [0.0] * (k - right), dtype=torch.float64)  # (k,)
        advantages = compute_advantages(rewards, k)  # (k,)
        probability = math.comb(k, right) * p**right * (1 - p) ** (k - right)
        total += probability * (advantages * (rewards - p)).mean().item()
    return total / (p * (1 - p))


def draw(curves, path):
    """f against p, a panel for each script. Args: curves (dict script -> dict k -> list); path."""
    figure, axes = plot.plt.subplots(1, len(curves), figsize=(8.3, 3.6), sharey=True,
                                     squeeze=False, layout="constrained")
    for axis, (script, found) in zip(axes[0], curves.items()):
        for name, derivative in LIMITS.items():
            axis.plot(GRID, [derivative(p) for p in GRID], "k", alpha=0.3, linewidth=3)
            axis.annotate(name, (0.05, derivative(0.05)), xytext=(8, 4), fontsize=8,
                          textcoords="offset points")
        styles = plot.styles([f"k {k}" for k in found])
        for i, ((name, style), values) in enumerate(zip(styles.items(), found.values())):
            axis.plot(GRID, values, markevery=(8 * i % 33, 33), label=name, **style)
        axis.set(yscale="log", title=script, xlabel="p: share of right responses")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("f(p): the mean gradient is f(p) ∇p")
    axes[0, -1].legend(frameon=False)
    plot.save(figure, path)


def main(args):
    require(str(args.output).endswith(".png"),
            f"--output {args.output}: must be the name of a PNG file")
    require(args.k and 2 <= min(args.k) and max(args.k) <= 512,
            f"--k {' '.join(map(str, args.k))}: must be between 2 and 512")
    curves = {}
    for script in args.scripts:
        path = Path(script) if Path(script).is_file() else ROOT / script
        module = load_module(str(path.resolve()))
        require(hasattr(module, "compute_advantages"), f"{script}: has no compute_advantages")
        curves[script] = {k: [slope(module.compute_advantages, p, k) for p in GRID]
                          for k in args.k}
    print(f"| f(p) | {' | '.join(f'p {p}' for p in (0.05, 0.2, 0.5, 0.8, 0.95))} |")
    print("|---" * 6 + "|")
    for script, found in curves.items():
        for k, values in found.items():
            numbers = [f"{values[GRID.index(p)]:.2f}" for p in (0.05, 0.2, 0.5, 0.8, 0.95)]
            print(f"| `{script}`, k {k} | {' | '.join(numbers)} |")
    draw(curves, args.output)
    print(f"\npicture: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
