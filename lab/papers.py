"""Run the papers' experiments again at toy scale: a picture, a table and a verdict for each.

    python -m lab.papers                    # the list: what each shows, costs, seeds done, results
    python -m lab.papers fig1 fig3 table1   # runs what is missing, then draws; "all" for all
    python -m lab.papers all --minutes 170  # starts no run after 170 minutes
    python -m lab.papers fig1 --redraw      # only draws, from the numbers in docs/results
    python -m lab.papers fig1 --again       # makes the runs again, although docs/results has them

The numbers of each run are in docs/results as soon as it is finished, so you can stop a sweep and
start it again. It goes seed by seed through all experiments, and in the end each has its picture,
and docs/results.md is brought up to date.

Unless an experiment's commands say otherwise, runs start from the SFT policy of mini TL;DR and
generate 960 responses, 16 per update, at a constant learning rate of 1e-4. An experiment named
"fig2_tuned" is "fig2" with the rate of each algorithm that has the highest mean score in "lr", over
seeds that are not used again.

An interval is Student's, at 95%, over seeds, plus what other held-out prompts would change;
differences are taken seed by seed. A claim holds if its interval lies above 0, and does not hold if
it lies below (or is exactly 0). If the interval is within a tenth of what training changes, the
difference is too small to matter; otherwise these runs cannot tell. Of many claims some are decided
by chance: "after correction" are those that are still decided if at most 5% of the page's decisions
may be wrong (Benjamini and Hochberg 1995).
"""

import functools
import importlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from tqdm import tqdm

import evaluate
import plot
from common import no_grad_logprobs
from lab.experiments import COMMON, EXPERIMENTS, RATES, TUNED
from lab.intervals import (discoveries, interval, p_value, prompt_variance, undecided,
                           verdict)
from plumbing import require
from tools import kill

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
MARKER = "<!-- everything below is written by lab/papers.py -->"
VERDICTS = {"does not hold": "What does not hold here",
            "cannot tell": "What these runs cannot tell",
            "too small": "What is too small to matter here", "holds": "What holds here"}
EVERY_RUN = "--lr-schedule constant --save-every 0"  # a checkpoint only at the end
PROMPTS = "--eval-prompts 256"  # unless a command says otherwise
CURVES = ("score", "gold", "win_rate", "kl", "length")
MARGIN = 0.1  # of what training changes: a smaller difference does not matter
HALVES = ("odd", "even")  # seeds


@dataclass
class Args:
    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """experiments to run, by their names in the list; "all" for all of them"""
    jobs: int = 2
    """runs in parallel, each on one core"""
    minutes: float = math.inf
    """start no further run after so many minutes"""
    redraw: bool = False
    """run nothing: draw pictures and tables from the numbers in docs/results"""
    again: bool = False
    """make the runs again, even if docs/results has their numbers, which go; finished ones in
    --output are kept"""
    output: str = "runs/papers"
    """folder for the runs"""


# --------------------------------------------------------------------------------------------- runs


def commands(experiment, rates):
    """The full command of each arm, without the seed: dict label -> command.

    Args: experiment; rates (see `chosen_rates`; only tuned experiments read it).
    """
    full = {}
    for label, command in experiment.arms.items():
        if "--lr " not in command:
            command += f" --lr {rate_of(command, rates) if experiment.tuned else COMMON}"
        if "--eval-prompts " not in command:
            command += f" {PROMPTS}"
        full[label] = f"{command} {EVERY_RUN}"
    return full


def rate_of(command, rates):
    """The chosen rate of the longest command in TUNED that this one begins with."""
    return rates[max((name for name in TUNED if command.startswith(name)), key=len)]


def folder_of(command, seed, output):
    """The folder of a run: its flags, without those that every run has."""
    name = command.removesuffix(EVERY_RUN).replace(PROMPTS, "").replace(".py", "").replace("--", "")
    return Path(output).resolve() / f"{re.sub('[^a-zA-Z0-9.]+', '_', name).strip('_')}_seed{seed}"


def train(command, folder, lag):
    """Run one script into a folder, and write what it cost, and the prompts' numbers, beside it.

    Args: command; folder; lag (whether to note how far the policy moves during a rollout's use).
    """
    time.perf_counter = time.process_time  # so time/seconds is CPU time, whoever else is busy
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    evaluations, lags = [], []

    class NotedRun(module.Run):
        def log_evaluation(self, evaluation):
            evaluations.append(evaluation[0])
            super().log_evaluation(evaluation)

    module.Run = NotedRun
    if lag:
        module.rollout = measured(module.rollout, lags)
    module.main(tyro.cli(module.Args, args=[*flags, "--output", str(folder)]))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cost = {"cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mb": (usage.ru_maxrss - before) / 1024}
    if lag:
        cost["lag"] = statistics.mean(lags)
    (folder / "cost.json").write_text(json.dumps(cost))
    torch.save(evaluations, folder / "evaluations.pt")


def measured(rollout, lags):
    """A script's `rollout` that first notes KL(pi_old || pi), if the rollout before was used.

    Args: rollout; lags (list to append to: sum over tokens of ratio - 1 - log ratio, in nats, mean
    over responses; an unbiased estimate, since the tokens come from pi_old).
    """
    last = []

    def noting(policy, tokenizer, prompt_ids, k, temperature, *others):
        for batch in last:
            logprobs = no_grad_logprobs(policy, batch, temperature, 4096)  # (N, T)
            log_ratio = logprobs - batch.old_logprobs  # (N, T)
            kl = (log_ratio.exp() - 1 - log_ratio).sum(1).mean().item()
            if kl > 1e-6:  # the same policy may roll out several times (dynamic sampling)
                lags.append(kl)
        last[:] = [rollout(policy, tokenizer, prompt_ids, k, temperature, *others)]
        return last[0]

    return noting


def alone(function, log, *values):
    """Call function(*values) on one thread, with its output in a file. For its own process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*values)


def call(context, function, log, *values):
    """`alone`, in a new process. Exits if it fails."""
    process = context.Process(target=alone, args=(function, log, *values))
    process.start()
    process.join()
    require(process.exitcode == 0, f"a run failed; its command and output are in {log}")


def finish(context, job, output):
    """Make one run, and evaluate.py's of its policy if that is asked for, unless that is done.

    Args: context (of processes); job (command, seed, tax, lag: see Experiment); output.
    Returns: its numbers (see `read_numbers`), with those of evaluate.py as "tax".
    """
    command, seed, tax, lag = job
    folder = folder_of(command, seed, output)
    numbers, taxed, log = folder / "numbers.json", folder / "tax.json", f"{folder}.log"
    if not numbers.exists():
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted sweep
        Path(log).write_text(f"python {shown(command)} --seed {seed}\n")
        call(context, train, log, f"{command} --seed {seed}", folder, lag)
        numbers.write_text(json.dumps(read_numbers(folder)))
        shutil.rmtree(folder / "checkpoints")
    found = json.loads(numbers.read_text())
    if tax:
        if not taxed.exists():
            call(context, evaluate.main, log, evaluate.Args(
                policies=(str(folder / "model"),), eval_prompts=250, output=str(taxed)))
        (policy,) = json.loads(taxed.read_text())["policies"].values()
        found["tax"] = {name: round(value, 4) for name, value in policy.items()}
    return found


def read_numbers(folder):
    """What pictures and tables need of one run: curves over its evaluations, and what it cost.

    "prompts" has the curves of each of the P held-out prompts: name -> (evaluations, P).
    """
    settings, scalars = plot.read_run(folder)
    steps = sorted(scalars["eval/score"])
    samples = {0: 0} | scalars["time/samples"]
    numbers = {"updates": steps, "samples": [int(samples[step]) for step in steps]}
    for name in CURVES:
        if f"eval/{name}" in scalars:
            numbers[name] = [round(scalars[f"eval/{name}"][step], 4) for step in steps]
    if "policy/clipfrac" in scalars:
        numbers["clipfrac"] = round(statistics.mean(scalars["policy/clipfrac"].values()), 5)
    seconds = scalars["time/seconds"]
    numbers["seconds"] = round(max(seconds.values()) / max(seconds), 4)  # per update
    if "mini_math" in settings["dataset"]:
        numbers |= wrong_lengths(folder)
    cost = json.loads((folder / "cost.json").read_text())
    evaluations = torch.load(folder / "evaluations.pt", weights_only=True)
    prompts = {name: [values[name].tolist() for values in evaluations]
               for name in CURVES if name in evaluations[0]}
    return numbers | {name: round(value, 4) for name, value in cost.items()} | {"prompts": prompts}


def wrong_lengths(folder):
    """Lengths of the wrong answers, before and after training, from a run's checkpoint."""
    path = next((folder / "checkpoints").glob("*/state.pt"))
    state, numbers = torch.load(path, weights_only=True)["state"], {}
    for when in ("before", "after"):
        values, _ = state[when]
        wrong = values["length"][values["score"] == 0]
        numbers[f"wrong_length_{when}"] = round(wrong.mean().item(), 4)
    growth = numbers["wrong_length_after"] - numbers["wrong_length_before"]
    return numbers | {"growth_of_wrong": round(growth, 4)}


# ----------------------------------------------------------------------------------------- measures


def at_kl(run, name, kl):
    """A run's curve `name` where its KL first reaches `kl`; nan if it does not.

    Between two evaluations it is taken as linear in √KL, as rewards are near the start (Gao et al.
    2023).
    """
    roots, root = [math.sqrt(max(0.0, value)) for value in run["kl"]], math.sqrt(kl)
    for i in range(1, len(roots)):
        if roots[i] >= root:
            share = (root - roots[i - 1]) / (roots[i] - roots[i - 1])
            return run[name][i - 1] + share * (run[name][i] - run[name][i - 1])
    return math.nan


def measure(run, metric):
    """One number of one run.

    "score", "gold": mean over the evaluations after the start, that is, the height of the curve.
    "final score": of the last one. "score each 320": mean over the evaluations after 320, 640 ...
    responses. "score at update 60"; "gold at KL 3" (interpolated). "growth of length": last less
    first. "fall of gold": highest less last. "log seconds". Others are numbers of the run. What
    evaluate.py says (`tax`) comes first. nan if it has no such number.
    """
    if metric in run.get("tax", {}):
        return run["tax"][metric]
    kind, name = metric.split()[0], metric.split()[-1]
    curve = run.get(name, math.nan)
    if metric == name:
        return statistics.mean(curve[1:]) if isinstance(curve, list) else curve
    if kind == "final":
        return curve[-1]
    if kind == "growth":
        return curve[-1] - curve[0]
    if kind == "fall":
        return max(curve) - curve[-1]
    if kind == "log":
        return math.log(curve)
    if " each " in metric:
        points = [value for value, samples in zip(run[kind], run["samples"])
                  if samples and samples % int(name) == 0]
        return statistics.mean(points)
    if " at KL " in metric:
        return at_kl(run, kind, float(name))
    return run[kind][run["updates"].index(int(name))]  # at update


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


def common_seeds(arms):
    """The seeds that all arms (of an iterable) have."""
    seeds = [set(arm["runs"]) for arm in arms]
    return sorted(set.intersection(*seeds), key=int) if seeds else []


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

    (first_row, *_), *_ = next(iter(used.values()))["prompts"]["odd"]["curves"].values()
    prompts = len(first_row)  # P
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
    """MARGIN of what training changes, a mean over the claim's runs; 0 for a claim with a bound."""
    if not claim.less or not claim.more or claim.least:
        return 0.0
    return MARGIN * statistics.mean(abs(change(run, claim.metric))
                                    for label in (*claim.more, *claim.less)
                                    for run in arms[label]["runs"].values())


def change(run, metric):
    """What training has changed of a metric; the metric itself if that is a change, or a cost.

    0 for what only evaluate.py says (perplexity, variance), which has not read the initial policy.
    """
    value, (first, *_, last) = measure(run, metric), metric.split() * 2
    if first == "log":
        return 1.0
    if metric == "wrong_length_after":
        return run["growth_of_wrong"]
    curve = run.get(last if first == "final" else first)
    if isinstance(curve, list):
        return value - curve[0]
    return 0.0 if metric in run.get("tax", {}) else value


def chosen_rates(arms):
    """The learning rate of each tuned command: dict command -> rate.

    Args: arms (of the experiment "lr"), or None.
    Returns: {} if a run is missing.
    """
    experiment = EXPERIMENTS["lr"]
    if not arms or seeds_done(experiment, arms) < len(experiment.seeds):
        return {}

    def score(name, rate):
        return statistics.mean(measure(run, "score")
                               for run in arms[f"{name} --lr {rate}"]["runs"].values())

    return {name: max(RATES, key=functools.partial(score, name)) for name in TUNED}


def seeds_done(experiment, arms):
    """The number of an experiment's seeds that all of its arms have."""
    return len(set(map(str, experiment.seeds)) & set(common_seeds(arms.values())))


# ------------------------------------------------------------------------------ pictures and tables


AXES = {"updates": "steps (rollouts)", "samples": "responses", "score": "reward",
        "gold": "gold reward", "win_rate": "win rate", "kl": "KL to the reference (nats)",
        "√kl": "√KL (√nats)", "length": "response length (tokens)",
        "seconds": "CPU seconds per update", "cpu": "CPU seconds of training",
        "wrong_length_after": "length of wrong answers", "variance": "variance of the reward",
        "final gold": "gold reward at the end", "final score": "reward at the end",
        "final kl": "KL to the reference at the end (nats)",
        "lag": "KL(π_old ‖ π) after a rollout (nats)"}


def draw(name, arms):
    """Write an experiment's picture: a panel with curves, or with one point per arm, for each."""
    experiment = EXPERIMENTS[name]
    panels, points = experiment.panels, experiment.points
    curves = dict.fromkeys(curve for curve, _ in points.values()) if points else arms
    looks = {label: look | {"label": label} for label, look in plot.styles(curves).items()}
    rows = 1 if len(panels) < 4 else 2
    columns = len(panels) // rows
    figure, axes = plot.plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                     figsize=(4 * columns, 3 * rows + 0.15 * len(curves)))
    for axis, (x, y) in zip(axes.flat, panels):
        if points:
            draw_against(axis, experiment, y, arms, looks)
        elif x:
            for label, arm in arms.items():
                draw_curve(axis, list(arm["runs"].values()), x, y, looks[label])
        else:
            draw_marks(axis, y, arms, looks)
        axis.set_xlabel(experiment.varied or AXES.get(x or y, x or y))
        if x or points:
            axis.set_ylabel(AXES.get(y, y))
        axis.grid(alpha=0.3)
    if any(x for x, _ in panels) or points:
        plot.add_legend(figure, axes.flat, training=False)
    plot.save(figure, RESULTS / f"{name}.png")


def draw_marks(axis, y, arms, looks):
    """Mean of y and its 95% interval, a line for each arm."""
    for i, (label, arm) in enumerate(arms.items()):
        mean, low, high = interval([measure(run, y) for run in arm["runs"].values()])
        look = {name: looks[label][name] for name in ("color", "marker")}
        axis.errorbar(mean, -i, xerr=[[mean - low], [high - mean]], capsize=3, **look)
    axis.set_yticks([-i for i in range(len(arms))], list(arms))


def draw_against(axis, experiment, y, arms, looks):
    """Means of y, with 95% intervals, against the number that is varied; a curve for each look."""
    for curve, look in looks.items():
        found = [(number, *interval([measure(run, y) for run in arms[label]["runs"].values()]))
                 for label, (other, number) in experiment.points.items() if other == curve]
        numbers, means, lows, highs = map(np.array, zip(*found))
        axis.errorbar(numbers, means, yerr=[means - lows, highs - means], capsize=2,
                      elinewidth=0.8, markersize=4.5, linewidth=1.3, **look)
    ticks = sorted({number for _, number in experiment.points.values()})
    axis.set_xscale("log")
    if y in ("final kl", "lag"):  # of which an estimator that runs away has far more
        axis.set_yscale("log", nonpositive="clip")
    axis.set_xticks(ticks, [f"{number:g}" for number in ticks], rotation=30)
    axis.set_xticks([], minor=True)


def draw_curve(axis, runs, x, y, look):
    """The mean of y against the mean of x over runs, with its 95% band."""
    mean, *band = zip(*(interval(list(values)) for values in zip(*(run[y] for run in runs))))
    xs = [statistics.mean(values) for values in zip(*(along(run, x) for run in runs))]
    xs = [math.sqrt(max(0.0, value)) for value in xs] if x == "√kl" else xs
    # The KL differs between seeds, and can fall.
    plot.draw_curve(axis, xs, mean, None if "kl" in x else band, y, **look)


def along(run, x):
    """Where a run's evaluations lie on the axis x."""
    if x == "cpu":
        return [run["seconds"] * update for update in run["updates"]]
    return run[x.removeprefix("√")]


def markdown(rows):
    """A Markdown table. Args: rows (lists of str), the header first."""
    header, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *lines])


def number(value, digits=2):
    """As text; a dash if it is not a number."""
    return "–" if math.isnan(value) else f"{value:z.{digits}f}"


def arm_rows(name, arms):
    """The table of an experiment: mean ± half of the 95% interval, for each arm and column."""
    rows = [["", *EXPERIMENTS[name].columns]]
    for label, arm in arms.items():
        cells = []
        for column in EXPERIMENTS[name].columns:
            mean, low, _ = interval([measure(run, column) for run in arm["runs"].values()])
            digits = 4 if abs(mean) < 0.01 else 2
            cells.append("–" if math.isnan(mean) else
                         f"{number(mean, digits)} ± {number(mean - low, digits)}")
        rows.append([label, *cells])
    return rows


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


def claim_rows():
    """One row of the page for each claim: (verdict, cells)."""
    rows = []
    for (name, _), (claim, *values, margin, said, corrected) in judge_all().items():
        mean, low, high = (value + claim.least for value in values)
        bound = f" (above {claim.least:g}?)" if claim.least or not claim.less else ""
        if not claim.more:  # the claim is that a number is below a bound
            mean, low, high, bound = -mean, -high, -low, f" (below {0 - claim.least:g}?)"
        digits = 3 if max(abs(low), abs(high)) < 0.1 else 2
        here = "{} [{}, {}]".format(*(number(value, digits) for value in (mean, low, high)))
        small = f"± {number(margin, digits)}" if margin else "–"
        rows.append((said, [
            claim.text, EXPERIMENTS[name].source, f"{claim.metric}: {here}{bound}", small,
            f"{seeds_done(EXPERIMENTS[name], read(name))}", f"**{said}**", corrected,
            f"`python -m lab.papers {name} --again`", f"[{name}](results/{name}.png)"]))
    return rows


def write_page():
    """Bring docs/results.md up to date from the marker on: claims, then pictures and tables."""
    claims = claim_rows()
    runs, minutes = cost(EXPERIMENTS)
    count = lambda verdicts: ", ".join(f"{said} {verdicts.count(said)}" for said in VERDICTS)
    parts = [MARKER, f"{len(claims)} claims: {count([said for said, _ in claims])}. After "
                     f"correction for their number: {count([cells[6] for _, cells in claims])}. "
                     f"{runs} runs, {minutes:.0f} CPU minutes."]
    header = ["claim", "source", "result: mean [95% interval]", "too small within", "seeds",
              "verdict", "after correction", "command", "picture"]
    for said, heading in VERDICTS.items():
        rows = [cells for verdict, cells in claims if verdict == said]
        parts += [f"## {heading}", markdown([header, *rows])]
    parts.append("## Numbers and pictures\n\nMeans ± half of the 95% interval over seeds; "
                 "other prompts would change them a little more.")
    drawn = {name: arms for name in EXPERIMENTS
             if EXPERIMENTS[name].panels and (arms := read(name))}
    for name, arms in drawn.items():
        title = EXPERIMENTS[name].title
        parts += [f"### {name}: {title}", f"![{title}](results/{name}.png)",
                  markdown(arm_rows(name, arms)),
                  "\n".join(f"    python {shown(arm['command'])}" for arm in arms.values())]
    before = PAGE.read_text().partition(MARKER)[0]
    PAGE.write_text(before + "\n\n".join(parts) + "\n")


def shown(command):
    """A command as one types it: a script in a folder runs as a module."""
    script, _, flags = command.partition(" ")
    module = script.removesuffix(".py").replace("/", ".")
    return f"-m {module} {flags}" if "/" in script else command


def cost(names):
    """Number of the saved runs of some experiments, and their CPU minutes.

    A run that several share counts once.
    """
    runs = {(arm["command"], seed): numbers["cpu_seconds"] for name in names
            for arm in stored_arms(name).values() for seed, numbers in arm["runs"].items()}
    return len(runs), sum(runs.values()) / 60


def print_list():
    """What each experiment shows, its seeds, what they cost, what is missing, and its results."""
    judged, rates = judge_all(), chosen_rates(read("lr"))
    for name, experiment in EXPERIMENTS.items():
        runs, minutes = cost([name])
        asked = len(set(experiment.arms.values())) * len(experiment.seeds)
        said = [found[-2] for (other, _), found in judged.items() if other == name]
        counts = ", ".join(f"{word}: {said.count(word)}" for word in VERDICTS if word in said)
        arms = stored_arms(name)
        done = seeds_done(experiment, arms) if experiment.arms.keys() <= arms.keys() else 0
        line = f"{done} of {len(experiment.seeds)} seeds, {minutes:.0f} CPU minutes"
        if done < len(experiment.seeds):
            each = minutes / runs if runs else 0.3  # minutes
            line += f", about {(asked - runs) * each:.0f} to go"
        if experiment.tuned and not rates:
            line += " (after lr)"
        print(f"{name:<10} {experiment.title} ({experiment.source})\n{'':<10} {line}"
              + (f"; {counts}" if counts else ""))


# --------------------------------------------------------------------------------------------- main


def sweep(names, rates, args):
    """Make the runs of some experiments that docs/results lacks, seed by seed, and save each.

    Args: names (of experiments); rates (see `chosen_rates`); args.
    """
    plans, users = {name: commands(EXPERIMENTS[name], rates) for name in names}, {}
    for name, plan in plans.items():
        experiment = EXPERIMENTS[name]
        kept = {} if args.again else stored_arms(name)
        arms = {label: kept[label] if kept.get(label, {}).get("command") == command else
                {"command": command, "runs": {}} for label, command in plan.items()}
        for i, seed in enumerate(experiment.seeds):
            for label, command in plan.items():
                if str(seed) not in arms[label]["runs"]:
                    job = command, seed, experiment.tax, experiment.lag
                    users.setdefault((i, job), []).append((name, arms, label))
    jobs = sorted(users, key=lambda user: user[0])  # the first seeds of all come first
    context = kill.processes() if jobs else None
    Path(args.output).mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes

    def in_time(job):
        return finish(context, job[1], args.output) if time.monotonic() < end else None

    with ThreadPoolExecutor(args.jobs) as pool:
        for job, numbers in zip(jobs, tqdm(pool.map(in_time, jobs), total=len(jobs), unit="run")):
            for name, arms, label in users[job] if numbers else ():
                add(arms[label], job[1][1], numbers, curves_of(EXPERIMENTS[name]))
                save(name, arms)


def curves_of(experiment):
    """The curves whose numbers on each prompt an experiment's claims need."""
    words = {word for claim in experiment.claims for word in claim.metric.lower().split()}
    return [name for name in CURVES if name in words]


def add(arm, seed, numbers, curves):
    """Add a run to an arm: its numbers, and to the mean over its half of the seeds, its prompts'.

    Args: arm ({"command", "runs", "prompts"}); seed; numbers (see `read_numbers`); curves (names).
    """
    prompts = numbers["prompts"]
    arm["runs"][str(seed)] = {name: value for name, value in numbers.items() if name != "prompts"}
    halves = arm.setdefault("prompts", {})
    half = halves.setdefault(HALVES[seed % 2 == 0], {"seeds": [], "curves": {}})
    n = len(half["seeds"])
    for name in curves:
        new, old = np.array(prompts[name]), np.array(half["curves"].get(name, 0.0))  # (E, P)
        half["curves"][name] = ((old * n + new) / (n + 1)).round(2).tolist()
    half["seeds"].append(seed)


def save(name, arms):
    """Write an experiment's numbers to docs/results; the old file stays until they are written."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(label, ensure_ascii=False)}: {json.dumps(arm, separators=(',', ':'))}"
             for label, arm in arms.items()]
    new = RESULTS / f"{name}.json.new"
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.rename(RESULTS / f"{name}.json")


def stored_arms(name):
    """What docs/results has of an experiment: dict label -> {"command", "runs", "prompts"}."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read(name):
    """An experiment's saved arms (see `stored_arms`); None if they have no two seeds in common."""
    arms, labels = stored_arms(name), EXPERIMENTS[name].arms.keys()
    if not labels <= arms.keys() or len(common_seeds(arms.values())) < 2:
        return None
    return arms


def main(args):
    names = list(EXPERIMENTS) if args.experiments == ("all",) else list(args.experiments)
    for name in names:
        require(name in EXPERIMENTS, f"{name}: unknown experiment; choose from "
                                     f"{', '.join(EXPERIMENTS)}, or all")
    require(args.jobs >= 1, f"--jobs {args.jobs}: must be 1 or more")
    require(args.minutes > 0, f"--minutes {args.minutes}: must be above 0")
    rates = chosen_rates(read("lr"))
    for name in names:
        require(rates or args.redraw or not EXPERIMENTS[name].tuned or args.experiments == ("all",),
                f"{name}: takes the learning rates that lr finds; run lr first")
        require(read(name) or not args.redraw,
                f"{name}: docs/results has no numbers of it yet; run it without --redraw")
    if names and not args.redraw:
        sweep([name for name in names if rates or not EXPERIMENTS[name].tuned], rates, args)
    for name in names:
        if read(name) and EXPERIMENTS[name].panels:
            draw(name, read(name))
    if names:
        write_page()
    print_list()


if __name__ == "__main__":
    main(tyro.cli(Args))
