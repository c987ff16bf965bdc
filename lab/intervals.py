"""Intervals and verdicts for lab/papers.py: Student's t over seeds, and the share of the prompts.

All differences are taken seed by seed, since runs of one seed are evaluated on the same prompts and
begin with the same ones.
"""

import functools
import math
import statistics

FALSE_DISCOVERIES = 0.05  # the share of the page's decisions that may be wrong


def tails(t, df):
    """Probability that Student's t is further from 0 than t, on either side.

    Args: t; df (degrees of freedom). (Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4)
    """
    angle, odd = math.atan2(abs(t), math.sqrt(df)), df % 2
    term = math.cos(angle) if odd else 1.0
    total = term if df > 1 else 0.0
    for n in range(2 + odd, df - 1, 2):
        term *= math.cos(angle) ** 2 * (n - 1) / n
        total += term
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


@functools.cache
def quantile(df):
    """The t beyond which Student's t lies in 5% of all cases, on both sides together."""
    low, high = 0.0, 20.0
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        low, high = (middle, high) if tails(middle, df) > 0.05 else (low, middle)
    return high


def standard_error(values, prompts=0.0):
    """Of the mean over seeds, for other seeds and other prompts.

    Args: values (one float per seed, 2 or more); prompts (variance that the choice of the prompts
    adds, see `prompt_variance`).
    """
    return math.sqrt(statistics.variance(values) / len(values) + prompts)


def interval(values, prompts=0.0):
    """Mean, and Student's 95% interval for it: (mean, low, high); nan if a value is.

    Args: see `standard_error`.
    """
    if any(map(math.isnan, values)):
        return math.nan, math.nan, math.nan
    mean = statistics.mean(values)
    half = quantile(len(values) - 1) * standard_error(values, prompts)
    return mean, mean - half, mean + half


def p_value(values, prompts=0.0):
    """Of Student's two-sided test that the mean is 0; 1 if a value is nan, or if all are 0.

    Args: see `standard_error`.
    """
    if any(map(math.isnan, values)) or not any(values):
        return 1.0
    error = standard_error(values, prompts)
    return tails(statistics.mean(values) / error, len(values) - 1) if error else 0.0


def prompt_variance(effect, halves, prompts):
    """Variance of an effect that comes from the choice of the held-out prompts.

    The variance over seeds contains that of the sampled responses, and so does any variance over
    prompts; counted twice, it would widen every interval. But the samples of two halves of the
    seeds are independent, and their prompts are the same: what the two halves' jackknife
    pseudo-values have in common comes from the prompts.

    Args: effect (function (half, left_out) -> float, the effect over all prompts but one; None: but
    none); halves (two); prompts (their number P).
    Returns: float, at least 0; 0 if the effect is nan.
    """
    pseudo = []
    for half in halves:
        full = effect(half, None)
        pseudo.append([(prompts - 1) * (full - effect(half, left_out))
                       for left_out in range(prompts)])
    if any(map(math.isnan, pseudo[0] + pseudo[1])):
        return 0.0
    return max(0.0, statistics.covariance(*pseudo)) / prompts


def discoveries(p_values, share=FALSE_DISCOVERIES):
    """Which differences from 0 are decided if at most this share of decisions may be wrong.

    Returns: list of bool. (Benjamini and Hochberg 1995, procedure (1).)
    """
    ranked = sorted(p_values)
    limit = max((p for i, p in enumerate(ranked, 1) if p <= share * i / len(ranked)),
                default=-1.0)
    return [p <= limit for p in p_values]


def verdict(low, high, margin=0.0):
    """What a 95% interval says about a claim that a number is above 0.

    Args: low; high; margin (a difference too small to matter).
    """
    if low > 0:
        return "holds"
    if high <= 0:
        return "does not hold"
    return undecided(low, high, margin)


def undecided(low, high, margin):
    """What an interval says where it is open on which side of 0 the number lies."""
    return "too small" if -margin < low and high < margin else "cannot tell"
