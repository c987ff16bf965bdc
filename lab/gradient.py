"""Bias and variance of the gradient that whole scripts compute, ours or your own, in seconds.

    python -m lab.gradient                                        # every algorithm of this project
    python -m lab.gradient rloo.py "lab/dialects.py:*-rloo"       # the same name in other libraries
    python -m lab.gradient rloo.py my_rloo.py "ppo.py --lam 0.9"  # any scripts, with flags
    python -m lab.gradient rloo.py "reinforce.py --baseline none" --constant 3
    python -m lab.gradient --toys 11                              # ranges over eleven worlds
    python -m lab.gradient --stale 0.01 0.1                       # rollouts of an older policy
    python -m lab.gradient --binary                               # scores of 0 and 1

In a world so small that every response can be written down, a script's own `main` makes an update
for every rollout that could be sampled, and the gradient is read where the policy's optimizer would
step. Weighted by the rollouts' probabilities, these gradients give the estimator's mean and
variance exactly. The true gradient is that of E[r] - beta KL(pi || pi_ref).

The table: k, the responses that are sampled to each prompt; the cosine of the mean gradient to the
true one; the length of its projection on it; the bias, the norm of their difference; the variance,
the trace of the covariance times the responses that an update generates (divide it by yours); that
variance once the step is rescaled to length 1. All but k and the cosine are shares of the true
gradient's norm, or of its square. With --toys, each number is the median (smallest to largest) over
worlds with other weights and scores, and the variances are multiples of the first script's in the
same world.

With --stale, the policy that is trained has moved away from the one that sampled, to a given KL
(lab/stale.py). old_logprobs and the rollouts' probabilities are those of the sampler, and the true
gradient is that of the policy that is trained.

A script fits if it has the form of rloo.py: Args, a `main` that calls `rollout` once per update,
and a Run that holds the policy. Its flags --beta, --temperature and --missing-eos-penalty also
define the gradient that it is compared with.
"""

import contextlib
import io
import itertools
import math
import random
import shlex
import statistics
import textwrap
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

import plot
from lab import blackbox, stale
from lab.family import FAMILY
from plumbing import (Between, NotNegative, Positive, check_ranges, load_module, one_line,
                      require)

WORLD = str(Path(__file__).resolve().parent / "tiny_world.py")
ROWS = [f"{name}.py {flags}".strip() for name in FAMILY for flags in FAMILY[name].lab]
SCRIPTS = (ROWS[0], "lab/rloo_token.py", *ROWS[1:])
BINARY = tuple(f"{name}.py" for name in FAMILY if FAMILY[name].binary)
WARMUP = 4  # updates before those that count, so that an average over past ones holds something


@dataclass
class Args:
    scripts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """scripts, each with flags if you put both in quotes; default: all of this project"""
    k: Annotated[int, Between(1, 8)] | None = None
    """responses per prompt, where the script's own flags do not say; default: the script's own k,
    or 2 if that makes more rollouts than --draws"""
    prompts: Annotated[int, Between(1, 4)] = 2
    """prompts per update, all different"""
    words: Annotated[int, Between(1, 6)] = 1
    """words besides EOS"""
    length: Annotated[int, Between(1, 6)] = 2
    """most tokens of a response, EOS included"""
    beta: NotNegative = 0.3
    """weight of the KL, where the script's own flags do not say"""
    temperature: Positive = 0.8
    """sampling temperature, where the script's own flags do not say"""
    missing_eos_penalty: float = 0.5
    """subtracted from the score of a response without EOS, where the script's own flags do not
    say"""
    constant: float = 0.0
    """mean score of the responses, less the penalty"""
    spread: float = 2.0
    """how far the mean scores of the prompts lie from that, the first above it, the second below,
    and so on"""
    peaked: Positive = 1.0
    """factor on the logits of policy and reference: above 1, fewer responses have most of the
    probability"""
    critic_error: NotNegative = 1.0
    """standard deviation of the critic's error, one for each state; 0 is a critic that knows the
    true values"""
    binary: bool = False
    """scores of 0 and 1, without a penalty: 1 where a response is better than the prompt's median;
    --constant and --spread do nothing"""
    at_optimum: bool = False
    """scores that make the policy the optimum of E[r] - beta KL, where the true gradient is 0;
    shares are of the gradient of E[r]"""
    stale: tuple[float, ...] = (0.0,)
    """KL(pi || pi_old), in nats, between the policy that is trained and the one that sampled; for
    several, a table each, of the worlds that can move that far"""
    lag: Literal["both", "policy", "random"] = "both"
    """with --stale, how they came apart: by the policy's own updates, in a random direction, or a
    table for both"""
    toys: Annotated[int, Between(1, 1000)] = 1
    """worlds with other weights and scores, over which to give ranges; the first is that of a
    single one"""
    draws: Annotated[int, Between(1, 10**6)] = 1500
    """rollouts per script; if more than this many are possible, this many are sampled"""
    seed: int = 1
    """random seed of the draws, and of the random direction"""
    output: str = "runs/gradient.png"
    """PNG file for the picture: bias against variance, or with --stale angle and length against
    the KL"""


@dataclass
class Result:
    """What an estimator's gradient is, over all draws.

    Shares are of the true gradient's norm, or its square. At the optimum, where the true gradient
    is 0, the gradient of E[r] takes its place; only the bias, which is the length of the mean
    gradient there, is still measured from 0.
    """

    cosine: float  # of the mean gradient to the true one
    length: float  # of the mean gradient's projection on the true one, as a share
    bias: float  # norm of the mean gradient less the true one, as a share
    error: float  # standard error of the bias; 0 if every draw was enumerated
    variance: float  # trace of the covariance times an update's generated responses, as a share
    draws: int
    k: int | None = None  # responses per prompt; None if it learns from pairs
    at_optimum: bool = False

    @property
    def angle(self):
        """In degrees; nan if the mean gradient is 0."""
        near = self.cosine if math.isnan(self.cosine) else max(-1.0, min(1.0, self.cosine))
        return math.degrees(math.acos(near))

    @property
    def noise(self):
        """The variance once rescaled to length 1; infinite if it points away from the true one."""
        return self.variance / self.length**2 if self.length > 0 else math.inf

    def verdict(self):
        if self.error and self.bias < 3 * self.error:
            return f"no bias seen: {self.bias:.2f} ± {self.error:.2f}"
        if self.bias < 1e-6:
            return "unbiased to 1e-6"
        if math.isnan(self.cosine):
            return "no step at all"
        if self.angle < 1e-3:
            return f"the right direction, {self.length:.2f} of the length"
        away = "away from it, " if self.cosine < 0 else ""
        digits = 0 if self.angle > 9.5 else 1
        angle = f"{self.angle:.{digits}f}°"
        return f"biased: points {angle} off, {away}{self.length:.2f} of the length"


def check_args(args):
    """Exit with a one-line error if a flag has an invalid value."""
    check_ranges(args)
    count = sum(args.words**n for n in range(args.length + 1))
    require(count <= 200, f"--words {args.words} --length {args.length}: {count} responses to a "
                          "prompt are too many; 200 are possible")
    require(args.beta > 0 or not args.at_optimum,
            f"--at-optimum --beta {args.beta}: without a KL there is no optimum inside; give a "
            "positive --beta")
    require(not (args.at_optimum and args.binary),
            "--at-optimum --binary: its scores are not 0 and 1; use one of them")
    for kl in args.stale:
        require(0 <= kl < math.inf, f"--stale {kl}: a KL must be 0 or more, and finite")
    require(not (args.at_optimum and any(args.stale)),
            "--at-optimum --stale: a policy that has moved is no longer the optimum; use one of "
            "them")
    require(str(args.output).endswith(".png"),
            f"--output {args.output}: must be the name of a PNG file")


def settings(args):
    """What a script's flags are by default: this world's. Its k is its own where args has none."""
    return ({} if args.k is None else {"k": args.k}) | dict(
        model=f"{WORLD}:policy", reference=f"{WORLD}:reference", critic=f"{WORLD}:critic",
        reward=(f"{WORLD}:reward",), gold="none", dataset=f"{WORLD}:prompts",
        eval_dataset=f"{WORLD}:prompts", device="cpu", plain=True,  # twice as fast on so little
        prompts_per_step=args.prompts, batch_size=1, epochs=1, minibatches=1,
        max_rounds=1, beta=args.beta, temperature=args.temperature,
        missing_eos_penalty=args.missing_eos_penalty, max_new_tokens=args.length)


def all_draws(probabilities, prompts, k, in_every_order=False):
    """Every way to sample k responses to each prompt: tuples of rows, prompt-major.

    Args: probabilities (B, M); prompts (numbers, one for each group of k); k; in_every_order
    (False: one order of the k responses to a prompt stands for all).
    Returns: list of D tuples, and the probability of each, (D,).
    """
    M, factorial = probabilities.shape[1], math.factorial
    choose = itertools.combinations_with_replacement
    single = list(itertools.product(range(M), repeat=k) if in_every_order else choose(range(M), k))

    def orders(draw):
        """In how many orders the same responses can come."""
        times = map(draw.count, set(draw))
        return 1 if in_every_order else factorial(k) // math.prod(map(factorial, times))

    def both(prompt):
        """Each draw for one prompt: its rows, and its probability."""
        return [(tuple(prompt * M + response for response in draw),
                 orders(draw) * probabilities[prompt][list(draw)].prod().item()) for draw in single]

    draws = list(itertools.product(*map(both, prompts)))
    return ([sum((rows for rows, _ in draw), ()) for draw in draws],
            torch.tensor([math.prod(weight for _, weight in draw) for draw in draws]))


def sampled_draws(probabilities, prompts, k, count):
    """`count` rollouts as they would be sampled: tuples of rows, and the weight of each."""
    M = probabilities.shape[1]
    columns = [prompt * M + torch.multinomial(probabilities[prompt], count * k, replacement=True)
               for prompt in prompts]  # of (count * k,)
    rows = torch.cat([column.view(count, k) for column in columns], 1)  # (count, B * k)
    return list(map(tuple, rows.tolist())), torch.full((count,), 1 / count)


def shuffled(draw, k):
    """The same k responses to each prompt in another order."""
    generator = random.Random(1)
    groups = [generator.sample(draw[i : i + k], k) for i in range(0, len(draw), k)]
    return sum(map(tuple, groups), ())


def run_draws(command, batch, draws, k, greedy, warmup, flags):
    """The gradient of a script's `main` for each of the rollouts.

    Args: command; batch (all responses); draws (tuples of its rows, one for each rollout); k;
    greedy (rows of the greedy responses); warmup (WARMUP tuples of rows); flags (see settings).
    Returns: (D, P), the number of responses that an update generates, and whether their order makes
    no difference.
    """
    def run(draws):
        def given(update, prompt_ids, wanted, is_greedy):
            require(wanted == (1 if is_greedy else k),
                    f"{command}: samples {wanted} responses per prompt, not --k {k}")
            # Update -1 is the last of the warm-up.
            return batch[list(greedy if is_greedy else [*draws, *warmup][update])]

        return blackbox.run(command, given, len(draws), WARMUP, **flags)

    some = slice(None, None, len(draws) // 5 + 1)
    others = [shuffled(draw, k) for draw in draws[some] if k > 1]
    updates = run([*draws, *others, draws[0]])
    require(updates[0].batch is not None, f"{command}: its main does not call `rollout`")
    found = torch.stack([update.gradient for update in updates])  # (D + ..., P)
    close = lambda a, b: (a - b).norm() <= 1e-9 * found.norm(dim=1).amax()
    if not close(found[0], found[-1]):
        # main remembers something outside of run.state: start it anew for each rollout
        found = torch.stack([run([draw])[0].gradient for draw in (*draws, *others)])
    same = all(map(close, found[: len(draws)][some], found[len(draws) :])) if others else True
    return found[: len(draws)], updates[0].generated, same


def all_rollouts(command, world, args, flags, batch, prompts):
    """The gradients of every rollout, or of a sample of them, in the world.

    Returns: gradients (D, P), their weights (D,), the responses that each needs, and whether these
    are all rollouts.
    """
    probabilities = batch.old_logprobs.sum(1).exp().view(-1, world.M)  # (B, M)
    torch.manual_seed(args.seed)
    warmup, _ = sampled_draws(probabilities, prompts, flags.k, WARMUP)
    greedy, M, k = [world.greedy(prompt) for prompt in prompts], world.M, flags.k
    for in_every_order in (False, True):
        possible = M**k if in_every_order else math.comb(M + k - 1, k)
        exact = possible ** len(prompts) <= args.draws
        draws, weights = (all_draws(probabilities, prompts, k, in_every_order) if exact
                          else sampled_draws(probabilities, prompts, k, args.draws))
        found, generated, same = run_draws(command, batch, draws, k, greedy, warmup, settings(args))
        if same or not exact:
            return found, weights, generated, exact
    return found, weights, generated, exact


def all_pairs(command, world, args, batch, scores):
    """The same for a script that learns from pairs.

    A pair is two samples, of which the better one is likely the chosen one.
    """
    probabilities = batch.old_logprobs.sum(1).exp().view(-1, world.M)  # (B, M)
    scores = scores.view(-1, world.M)  # (B, M)
    wins = torch.sigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))  # (B, M, M), Bradley, Terry
    both = probabilities.unsqueeze(2) * probabilities.unsqueeze(1)  # (B, M, M)
    weights = 2 * wins * both / args.prompts  # (B, M, M)
    require(weights.numel() <= args.draws,
            f"{command}: there are {weights.numel()} pairs, more than --draws")
    flags = settings(args) | {"dataset": f"{WORLD}:pairs"}
    # Pairs of a response with itself have no gradient; load_rows drops them.
    differ = ~torch.eye(world.M, dtype=torch.bool).expand(weights.shape).flatten()  # (B * M * M,)
    updates = blackbox.run(command, None, int(differ.sum()), rows=lambda update: [update],
                           replace={"make_batch": load_module(WORLD).make_batch}, **flags)
    found = torch.stack([update.gradient for update in updates])
    gradients = found.new_zeros(len(differ), found.shape[1])
    gradients[differ] = found
    return gradients, weights.flatten(), 2, True


def countable_k(command, world, args):
    """The k of a script whose flags do not say: its own, if all rollouts can be counted, or 2."""
    _, flags = blackbox.parse(command, **settings(args))
    own = getattr(flags, "k", 2)
    rollouts = math.comb(world.M + own - 1, own) ** args.prompts
    return own if rollouts <= args.draws else min(own, 2)


def measure(command, world, args):
    """The Result of a command such as "ppo.py --lam 0"."""
    args = replace(args, k=args.k or countable_k(command, world, args))
    _, flags = blackbox.parse(command, **settings(args))
    pairs = hasattr(flags, "rejected_column")
    for name in ("beta", "temperature", *(() if pairs else ("k", "prompts_per_step"))):
        require(hasattr(flags, name), f"{command}: has no flag --{name.replace('_', '-')}")
    penalty = getattr(flags, "missing_eos_penalty", args.missing_eos_penalty)
    prompts = [i % args.prompts for i in range(args.prompts if pairs else flags.prompts_per_step)]
    old_logprobs = world.logprobs(flags.temperature, world.sampler).detach()  # (B M, T)
    batch = replace(world.batch, old_logprobs=old_logprobs)
    found, weights, generated, exact = (
        all_pairs(command, world, args, batch, world.scores - penalty * ~batch.ended) if pairs
        else all_rollouts(command, world, args, flags, batch, prompts))  # (D, P), (D,)
    gradient = lambda beta: world.true_gradient(prompts, flags.temperature, beta, penalty)
    true = gradient(flags.beta)  # (P,)
    unit = gradient(0.0) if args.at_optimum else true  # (P,)
    mean = weights @ found  # (P,)
    variance = (weights @ (found - mean).square().sum(1) / unit.norm() ** 2).item()
    return Result(
        cosine=(mean @ unit / mean.norm() / unit.norm()).item(),
        length=(mean @ unit / unit.norm() ** 2).item(),
        bias=((mean - true).norm() / unit.norm()).item(),
        error=0.0 if exact else math.sqrt(variance / len(found)),
        variance=variance * generated, draws=len(found), k=None if pairs else flags.k,
        at_optimum=args.at_optimum)


def attempt(command, world, args):
    """The Result of a command, or one line that says why there is none."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return measure(command, world, args)
    except SystemExit:
        words = " ".join(line.strip(" │╭╮╰╯─-") for line in said.getvalue().splitlines())
        return " ".join(words.partition("error: ")[2].split() or words.split() or ["exits"])
    except Exception as error:
        name = Path(shlex.split(command)[0]).name
        lines = [f", line {frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
                 if Path(frame.filename).name == name]
        return f"{type(error).__name__}: {one_line(error)} ({name}{''.join(lines[-1:])})"


# ---------------------------------------------------------------------------------------- the table


def cells(result):
    """The numbers of one world as text."""
    error = f" ± {result.error:.3f}" if result.error > 0 else ""
    noise = f"{result.noise:.3g}" if result.length > 0 else "–"
    return [f"{result.cosine:.3f}", f"{result.length:.3f}", f"{result.bias:.3f}{error}",
            f"{result.variance:.3g}", noise, result.verdict()]


def middle_and_range(values):
    """The median (smallest to largest) as text; one number where they do not differ.

    Of the values that are numbers.
    """
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "–"
    found = statistics.median(values), min(values), max(values)
    middle, low, high = (f"{value:z.2f}" for value in found)
    return middle if low == high else f"{middle} ({low} to {high})"


def cells_of_toys(found, first):
    """The numbers of several worlds as text.

    Variances are multiples of the first script's in the same world; at length 1, of the worlds in
    which the first does not point away.
    """
    numbers = [[result.cosine for result in found], [result.length for result in found],
               [result.bias for result in found],
               [result.variance / other.variance for result, other in zip(found, first)],
               [result.noise / other.noise for result, other in zip(found, first)
                if other.length > 0]]
    angles = [result.angle for result in found if not math.isnan(result.cosine)]
    verdicts = {result.verdict().partition(":")[0] for result in found}
    said = " or ".join(verdicts)
    if "biased" in verdicts:
        said = f"points {min(angles):.0f}° to {max(angles):.0f}° off"
    return [*map(middle_and_range, numbers), said]


def table(results):
    """The results as a Markdown table.

    Args: results (dict command -> list of one Result per world, or one line).
    """
    worked = [found for found in results.values() if not isinstance(found, str)] or [[]]
    if any(result.at_optimum for result in worked[0]):
        # Equal rewards have no variance, and a step of 0 no direction.
        header = ["", "k", "mean step / gradient of E[r]"]
        row = lambda found: [middle_and_range([result.bias for result in found])]
    elif len(worked[0]) > 1:
        share = f" / that of `{next(iter(results))}`"
        header = ["", "k", "cosine", "length", "bias", f"variance{share}", f"at length 1{share}",
                  ""]
        row = lambda found: cells_of_toys(found, worked[0])
    else:
        header = ["", "k", "cosine", "length", "bias", "variance", "at length 1", ""]
        row = lambda found: cells(found[0])
    lines = [header, ["---"] * len(header)]
    for command, found in results.items():
        if isinstance(found, str):
            numbers = ["–"] * (len(header) - 2) + [found]
        else:
            numbers = [str(found[0].k or "–"), *row(found)]  # of pairs, there is no k
        lines.append([f"`{command}`", *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -------------------------------------------------------------------------------------- the picture


def points(results):
    """Angles and variances of each command: dict command -> two tuples.

    Of the worlds in which a step has a right length. If there are several, the variances are
    multiples of the first command's.
    """
    found, worked = {}, [worlds for worlds in results.values() if not isinstance(worlds, str)]
    for command, worlds in results.items():
        pairs = [] if isinstance(worlds, str) else [
            (result.angle, result.noise / (first.noise if len(worlds) > 1 else 1.0))
            for result, first in zip(worlds, worked[0]) if result.length > 0 and first.length > 0]
        if pairs:
            found[command] = tuple(zip(*pairs))
    return found


def draw(results, path):
    """A picture of all results: how far off the mean gradient points, and the variance.

    The variance is that of a step of length 1. Of several worlds the median, with lines from the
    smallest to the largest, and the variance as in the table.
    """
    several = any(len(worlds) > 1 for worlds in results.values() if not isinstance(worlds, str))
    share = "share of the true gradient's squared norm"
    share = f"as a multiple of that of {next(iter(results))}" if several else share
    figure, axes = plot.plt.subplots(figsize=(8.3, 4.6), layout="constrained")
    axes.set(yscale="log", xlabel="bias: angle between mean and true gradient (degrees)",
             ylabel=f"variance × responses, at length 1\n({share})")
    places = {False: {}, True: {}}  # whether it is biased -> place -> numbers in the key
    found = points(results)
    for number, (angles, noises) in enumerate(found.values(), 1):
        angle, noise = statistics.median(angles), statistics.median(noises)
        biased = max(angles) > 1e-3
        places[biased].setdefault((angle, noise), []).append(number)
        axes.hlines(noise, min(angles), max(angles), plot.COLORS[biased], alpha=0.3)
        axes.vlines(angle, min(noises), max(noises), plot.COLORS[biased], alpha=0.3)
    for biased, name in ((False, "no bias"), (True, "biased")):
        columns = zip(*places[biased] or [(math.nan, 1.0)])
        style = plot.STYLES[biased] | {"linestyle": ""}
        axes.plot(*columns, **style, markersize=6, label=name)
    axes.margins(0.35 if several else 0.15, 0.1)
    axes.xaxis.set_major_formatter(lambda angle, _: f"{angle:g}" if angle >= 0 else "")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, ncols=2)
    key = "\n".join(f"{number}  {command}" for number, command in enumerate(found, 1))
    axes.text(1.02, 0.9, key, transform=axes.transAxes, va="top", fontsize=8, linespacing=1.5)
    figure.draw_without_rendering()  # now pixels are known
    for biased, side, align in ((False, -1, "right"), (True, 1, "left")):
        for place, numbers in labels(places[biased], axes.transData.transform):
            text = textwrap.fill(", ".join(map(str, numbers)), 14)
            axes.annotate(text, place, xytext=(7 * side, 0), ha=align, va="center",
                          textcoords="offset points", fontsize=8)
    plot.save(figure, path)


def labels(places, pixel):
    """Place and numbers of each label: points that would hide each other's numbers share one.

    Args: places (dict place -> numbers); pixel (function (place) -> x and y).
    """
    found = []  # lists: x of the last point, y of the first, place of the last, numbers
    for place, numbers in sorted(places.items()):
        x, y = pixel(place)
        near = [label for label in found if x - label[0] < 25 and abs(y - label[1]) < 14]
        if near:
            near[0][:] = x, near[0][1], place, near[0][3] + numbers
        else:
            found.append([x, y, place, numbers])
    return [(place, sorted(numbers)) for _, _, place, numbers in found]


# --------------------------------------------------------------------------------------------- main


def make_world(args, toy=0):
    """The World of these flags, which the scripts' own flags name.

    Another `toy` has other weights and scores.
    """
    tiny_world = load_module(WORLD)
    tiny_world.world = tiny_world.World(
        args.words, args.length, args.prompts, args.temperature, args.beta,
        args.missing_eos_penalty, args.constant, args.spread, args.peaked, args.critic_error,
        args.at_optimum, toy, args.binary)
    return tiny_world.world


def describe(world, args):
    """Print how large the world is, how far from uniform, and what k is."""
    likely = world.batch.old_logprobs.sum(1).exp().view(args.prompts, -1).amax(1)  # (B,)
    numbers = (f"the most probable has probability {', '.join(f'{p:.2f}' for p in likely)}; the "
               f"true gradient's squared norm is {world.loss_gradient().norm() ** 2:.3g}"
               f"{' (in the first world)' * (args.toys > 1)}")
    default = ("each script's own default, or 2 where that makes more rollouts than --draws "
               f"{args.draws}")
    tqdm.write(f"{world.M} different responses to each prompt are possible; {numbers}.\n"
               f"k of them are sampled: {args.k or default} (where a script's flags do not say).\n")


def rows_and_places(args):
    """The commands of the table's rows, and the pairs (lag, KL) that get a table each."""
    scripts = args.scripts or SCRIPTS + BINARY * args.binary
    if not any(args.stale):
        return scripts, [("policy", 0.0)]
    lags = list(stale.LAGS) if args.lag == "both" else [args.lag]
    places = itertools.product(lags, sorted(set(args.stale)))
    return (args.scripts or (*scripts, *stale.ROWS),
            [(lag, kl) for lag, kl in places if kl or lag == lags[0]])  # nothing moves by 0


def main(args):
    check_args(args)
    if args.binary:
        args = replace(args, missing_eos_penalty=0.0)
    commands, places = rows_and_places(args)
    commands = [row for command in commands for row in blackbox.rows(command)]
    results = {place: {} for place in places}  # place -> command -> list of Results, or one line
    worlds = []  # pairs of a place and its World; first, since a KL may be out of reach
    for toy in range(args.toys):
        world = make_world(args, toy)
        if toy == 0:
            describe(world, args)
        lagging = [(place, stale.lagging(world, *place, args.seed)) for place in places]
        worlds += [(place, found) for place, found in lagging if found]
    moved = Counter(place for place, _ in worlds)  # how many worlds can move that far
    for lag, kl in places:
        require(moved[lag, kl], f"--stale {kl}: no policy is that far away, {stale.LAGS[lag]}; "
                                  "use a smaller KL")
    jobs = [*itertools.product(worlds, commands)]
    for (place, world), command in tqdm(jobs, unit="script", leave=False):
        load_module(WORLD).world = world
        found = results[place]
        if not isinstance(found.setdefault(command, []), str):
            one = attempt(command, world, args)
            found[command] = one if isinstance(one, str) else [*found[command], one]
    report(results, moved, args)


def report(results, moved, args):
    """Print the table of each place, and how many worlds can move there; draw the picture."""
    parts = []
    for (lag, kl), found in results.items():
        heading = f"KL(pi || pi_old) = {kl:g}"
        if kl:
            heading += f", {stale.LAGS[lag]}"
        if moved[lag, kl] < args.toys:
            heading += f" ({moved[lag, kl]} of {args.toys} worlds can move that far)"
        parts.append(f"{heading}:\n\n{table(found)}" if any(args.stale) else table(found))
    if not args.at_optimum:
        if any(args.stale):
            stale.draw(results, args.output)
        else:
            draw(*results.values(), args.output)
        parts.append(f"picture: {args.output}")
    print("\n\n".join(parts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    main(tyro.cli(Args))
