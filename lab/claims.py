"""What the runs say of the papers' claims, for lab/papers.py."""

import statistics

import numpy as np

from lab.experiments import EXPERIMENTS, RATES, TUNED
from lab.intervals import (discoveries, interval, p_value, prompt_variance, undecided,
                           verdict)
from lab.results import HALVES, common_seeds, measure, read, seeds_done, start

MARGIN = 0.1  # of what training changes: a smaller difference does not matter


def effect(claim, number):
    """What a claim says is above 0. Args: claim; number (function label -> its metric)."""
    return sum(map(number, claim.more)) - sum(map(number, claim.less)) - claim.least


def judge(claim, arms):
    """What the runs say of a claim: (mean, low, high, verdict, p-value, margin).

    Args: claim (see lab/experiments.py); arms (see `read`).
    """
    labels = (*claim.more, *claim.less)
    values = [effect(claim, lambda label: measure(arms[label]["runs"][seed], claim.metric))
              for seed in common_seeds(arms[label] for label in labels)]
    spread, margin = prompts_share(claim, arms), margin_of(claim, arms)
    mean, low, high = interval(values, spread)
    return mean, low, high, verdict(low, high, margin), p_value(values, spread), margin


def prompts_share(claim, arms):
    """The variance of a claim's effect from the choice of prompts; 0 where it is not known."""
    used = {label: arms[label] for label in (*claim.more, *claim.less)}
    if any("prompts" not in arm or set(arm["prompts"]) != set(HALVES) for arm in used.values()):
        return 0.0

    def curves(arm, half):
        """The arm's mean run on all prompts (last column), and without each of them: (E, P + 1)."""
        found = {}
        for name, rows in arm["prompts"][half]["curves"].items():
            table = np.array(rows)  # (E, P)
            total = table.sum(1, keepdims=True)  # (E, 1)
            left_out = (total - table) / (table.shape[1] - 1)  # (E, P)
            found[name] = np.concatenate([left_out, total / table.shape[1]], 1).tolist()
        return found

    kept = next(iter(used.values()))["prompts"]["odd"]["curves"]
    if not kept:  # the experiment's claims are about other numbers than those of prompts
        return 0.0
    prompts = len(next(iter(kept.values()))[0])  # P
    halves = [{label: curves(arm, half) for label, arm in used.items()} for half in HALVES]
    first = {label: next(iter(arm["runs"].values())) for label, arm in used.items()}

    def on_prompts(half, left_out):
        column = -1 if left_out is None else left_out

        def number(label):
            run = {name: [row[column] for row in rows] for name, rows in half[label].items()}
            axes = {name: first[label][name] for name in ("updates", "samples")}
            # evaluate.py measures the trained policy, on nearly the same prompts.
            taxed = claim.metric in run and claim.metric in first[label].get("tax", {})
            return measure(axes | run, f"final {claim.metric}" if taxed else claim.metric)

        return effect(claim, number)

    return prompt_variance(on_prompts, halves, prompts)


def margin_of(claim, arms):
    """MARGIN of what training changes, a mean over the claim's arms; 0 for a claim with a bound."""
    if not claim.less or not claim.more or claim.least:
        return 0.0
    changes = [statistics.mean(change(run, claim.metric) for run in arms[label]["runs"].values())
               for label in (*claim.more, *claim.less)]
    return MARGIN * statistics.mean(map(abs, changes))


def change(run, metric):
    """What training has changed of a metric; the metric itself if that is a change, or a cost.

    What evaluate.py says is compared with what it says of the policy that runs start from.
    """
    value, (first, *_, last) = measure(run, metric), metric.split() * 2
    if metric in run.get("tax", {}):
        return value - start().get(metric, value)
    if metric == "wrong_length_after":
        return run["growth_of_wrong"]
    curve = run.get(last if first == "final" else first)
    if isinstance(curve, list):
        return value - curve[0]
    return value


def saved():
    """The saved numbers of every experiment that makes claims: dict name -> arms."""
    return {name: arms for name in EXPERIMENTS
            if EXPERIMENTS[name].claims and (arms := read(name))}


def judge_all():
    """Every claim of the page: dict (experiment, claim's text) -> what is to be said of it.

    That is (claim, mean, low, high, margin, verdict, corrected verdict). The last is the plain one,
    or what is left of it where it may well be chance (see `discoveries`).
    """
    found = {(name, claim.text): (claim, *judge(claim, arms)) for name, arms in saved().items()
             for claim in EXPERIMENTS[name].claims}
    decided, judged = discoveries([p for *_, p, _ in found.values()]), {}
    for (key, (claim, mean, low, high, said, _, margin)), sure in zip(found.items(), decided):
        # low == high: all are the same. Where the p-value decides nothing, the size may.
        corrected = said if sure or low == high else undecided(low, high, margin)
        judged[key] = claim, mean, low, high, margin, said, corrected
    return judged


def chosen_rates(arms):
    """The learning rate of each tuned command: dict command -> rate.

    Args: arms (of the experiment "lr"), or None.
    Returns: {} if a run is missing.
    """
    experiment = EXPERIMENTS["lr"]
    if not arms or seeds_done(experiment, arms) < len(experiment.seeds):
        return {}
    return {name: best_rate(arms, name) for name in TUNED}


def best_rate(arms, name):
    """The rate with the highest mean score of a command's arms in "lr" or "lr_math"."""
    return max(RATES, key=lambda rate: mean_of(measure, arms, name, rate, "score"))


def good_rates(arms, name):
    """The rates at which the score rises at least nine tenths as much as at the best one."""
    gains = {rate: mean_of(change, arms, name, rate, "score") for rate in RATES}
    return [rate for rate in RATES if gains[rate] >= (1 - MARGIN) * max(gains.values())]


def breaking_rate(arms, name):
    """The lowest rate at which a policy ends below where it began: in gold, if there is one.

    Returns: None if no rate does.
    """
    first_run, *_ = arms[f"{name} --lr {RATES[0]}"]["runs"].values()
    metric = "growth of gold" if "gold" in first_run else "growth of score"
    return next((rate for rate in RATES if mean_of(measure, arms, name, rate, metric) < 0), None)


def mean_of(number, arms, name, rate, metric):
    """`measure` or `change` of a metric: the mean over the seeds of a command at one rate."""
    return statistics.mean(number(run, metric)
                           for run in arms[f"{name} --lr {rate}"]["runs"].values())
