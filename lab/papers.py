"""Run the papers' experiments again at toy scale: a picture, a table and a verdict for each.

    python -m lab.papers                    # the list: what each shows, costs, and its last result
    python -m lab.papers fig1 fig3 table1   # runs what is missing, then draws; "all" for all
    python -m lab.papers fig1 --redraw      # only draws, from the numbers in docs/results
    python -m lab.papers fig1 --again       # makes the runs again, although docs/results has them

Finished runs are kept, so you can stop a sweep and start it again. Each experiment leaves its
numbers and its picture in docs/results, and docs/results.md is brought up to date.

Unless an experiment's commands say otherwise, runs start from the SFT policy of mini TL;DR and
generate 960 responses, 16 per update, at a constant learning rate. The rate of each algorithm is
the one of RATES with the highest mean score over 40 updates from seed 100, which is not used again.
An interval is Student's, at 95%, over seeds; differences are taken seed by seed, since runs of one
seed see the same prompts. A claim holds if its interval lies above 0, does not hold if it lies
below (or is exactly 0), and otherwise these runs cannot tell. Of many claims some are decided by
chance: "after correction" are those that are still decided if at most 5% of the page's decisions
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
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

import evaluate
import plot
from lab.experiments import EXPERIMENTS, RATES, TUNED
from plumbing import require
from tools import kill

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
MARKER = "<!-- everything below is written by lab/papers.py -->"
VERDICTS = {"does not hold": "What does not hold here",
            "cannot tell": "What these runs cannot tell", "holds": "What holds here"}
EVERY_RUN = "--lr-schedule constant --save-every 0"  # a checkpoint only at the end
FALSE_DISCOVERIES = 0.05  # the share of the page's decisions that may be wrong


@dataclass
class Args:
    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """experiments to run, by their names in the list; "all" for all of them"""
    jobs: int = 2
    """runs in parallel, each on one core"""
    redraw: bool = False
    """run nothing: draw pictures and tables from the numbers in docs/results"""
    again: bool = False
    """make the runs again, even if docs/results has their numbers; finished ones in --output are
    kept"""
    output: str = "runs/papers"
    """folder for the runs"""


# --------------------------------------------------------------------------------------------- runs


def commands(experiment, rates):
    """The full command of each arm, without the seed: dict label -> command.

    Args: experiment; rates (see `chosen_rates`).
    """
    full = {}
    for label, command in experiment.arms.items():
        if "--lr " not in command:
            tuned = max((name for name in TUNED if command.startswith(name)), key=len)
            command += f" --lr {rates[tuned]}"
        full[label] = f"{command} {EVERY_RUN}"
    return full


def folder_of(command, seed, output):
    """The folder of a run: its flags, without those that every run has."""
    name = command.removesuffix(EVERY_RUN).replace(".py", "").replace("--", "")
    return Path(output).resolve() / f"{re.sub('[^a-zA-Z0-9.]+', '_', name).strip('_')}_seed{seed}"


def train(command, folder):
    """Run one script into a folder, and write what it cost to cost.json."""
    time.perf_counter = time.process_time  # so time/seconds is CPU time, whoever else is busy
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    module.main(tyro.cli(module.Args, args=[*flags, "--output", str(folder)]))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cost = {"cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mb": (usage.ru_maxrss - before) / 1024}
    (folder / "cost.json").write_text(json.dumps(cost))


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


def finish(context, command, seed, tax, output):
    """Run one command with one seed, and evaluate.py on its policy if `tax`, unless that is done.

    Returns: its numbers (see `read_numbers`), with those of evaluate.py as "tax".
    """
    folder = folder_of(command, seed, output)
    numbers, taxed, log = folder / "numbers.json", folder / "tax.json", f"{folder}.log"
    if not numbers.exists():
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted sweep
        Path(log).write_text(f"python {command} --seed {seed}\n")
        call(context, train, log, f"{command} --seed {seed}", folder)
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
    """What pictures and tables need of one run: curves over its evaluations, and what it cost."""
    settings, scalars = plot.read_run(folder)
    steps = sorted(scalars["eval/score"])
    samples = {0: 0} | scalars["time/samples"]
    numbers = {"updates": steps, "samples": [int(samples[step]) for step in steps]}
    for name in ("score", "gold", "win_rate", "kl", "length"):
        if f"eval/{name}" in scalars:
            numbers[name] = [round(scalars[f"eval/{name}"][step], 4) for step in steps]
    if "policy/clipfrac" in scalars:
        numbers["clipfrac"] = round(statistics.mean(scalars["policy/clipfrac"].values()), 5)
    seconds = scalars["time/seconds"]
    numbers["seconds"] = round(max(seconds.values()) / max(seconds), 4)  # per update
    if "mini_math" in settings["dataset"]:
        numbers |= wrong_lengths(folder)
    cost = json.loads((folder / "cost.json").read_text())
    return numbers | {name: round(value, 2) for name, value in cost.items()}


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


# --------------------------------------------------------------------------------------- statistics


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


def interval(values):
    """Mean, and Student's 95% interval for it: (mean, low, high); nan if a value is.

    Args: values (2 floats or more).
    """
    if any(map(math.isnan, values)):
        return math.nan, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    mean, half = statistics.mean(values), quantile(len(values) - 1) * error
    return mean, mean - half, mean + half


def p_value(values):
    """Of Student's two-sided test that the mean is 0; 1 if a value is nan, or if all are 0."""
    if any(map(math.isnan, values)) or not any(values):
        return 1.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return tails(statistics.mean(values) / error, len(values) - 1) if error else 0.0


def discoveries(p_values, share=FALSE_DISCOVERIES):
    """Which differences from 0 are decided if at most this share of decisions may be wrong.

    Returns: list of bool. (Benjamini and Hochberg 1995, procedure (1).)
    """
    ranked = sorted(p_values)
    limit = max((p for i, p in enumerate(ranked, 1) if p <= share * i / len(ranked)),
                default=-1.0)
    return [p <= limit for p in p_values]


def verdict(low, high):
    """What an interval says about a claim that a number is above 0."""
    return "holds" if low > 0 else "does not hold" if high <= 0 else "cannot tell"


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


def judge(claim, arms):
    """The interval of a claim, its verdict and its p-value: (mean, low, high, verdict, p).

    Args: claim (see lab/experiments.py); arms (label -> {"runs": {seed: numbers}}).
    """
    def total(labels, seed):
        return sum(measure(arms[label]["runs"][seed], claim.metric) for label in labels)

    seeds = [set(arms[label]["runs"]) for label in (*claim.more, *claim.less)]
    values = [total(claim.more, seed) - total(claim.less, seed) - claim.least
              for seed in sorted(set.intersection(*seeds))]
    mean, low, high = interval(values)
    return mean, low, high, verdict(low, high), p_value(values)


def chosen_rates(arms):
    """The learning rate of each tuned command: dict command -> rate.

    Args: arms (of the experiment "lr").
    """
    def score(name, rate):
        return measure(arms[f"{name} --lr {rate}"]["runs"]["100"], "score")

    return {name: max(RATES, key=functools.partial(score, name)) for name in TUNED}


# ------------------------------------------------------------------------------ pictures and tables


COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
          "#999999"]  # Okabe and Ito
MARKERS = "osD^vP*X"
AXES = {"updates": "steps (rollouts)", "samples": "responses", "score": "reward",
        "gold": "gold reward", "win_rate": "win rate", "kl": "KL to the reference", "√kl": "√KL",
        "length": "response length (tokens)", "seconds": "CPU seconds per update",
        "wrong_length_after": "length of wrong answers", "variance": "variance of the reward"}


def draw(name, arms):
    """Write an experiment's picture: a panel with curves, or with one point per arm, for each."""
    panels = EXPERIMENTS[name].panels
    figure, axes = plot.plt.subplots(1, len(panels), squeeze=False,
                                     figsize=(4.2 * len(panels), 3.4))
    for axis, (x, y) in zip(axes[0], panels):
        for i, (label, arm) in enumerate(arms.items()):
            runs = list(arm["runs"].values())
            style = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 5}
            if x:
                draw_curve(axis, runs, x, y, label, style)
            else:
                mean, low, high = interval([measure(run, y) for run in runs])
                axis.errorbar(mean, -i, xerr=[[mean - low], [high - mean]], capsize=3, **style)
        axis.set_xlabel(AXES.get(x or y, x or y))
        if x:
            axis.set_ylabel(AXES.get(y, y))
        else:
            axis.set_yticks([-i for i in range(len(arms))], list(arms))
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="lower center", ncols=4, bbox_to_anchor=(0.5, 1.0),
                      fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=100, bbox_inches="tight")
    plot.plt.close(figure)


def draw_curve(axis, runs, x, y, label, style):
    """The mean of y against the mean of x over runs, with its 95% band."""
    points = [interval(list(values)) for values in zip(*(run[y] for run in runs))]
    mean, low, high = zip(*points)
    columns = zip(*(run[x.removeprefix("√")] for run in runs))
    xs = [statistics.mean(values) for values in columns]
    xs = [math.sqrt(max(0.0, value)) for value in xs] if x == "√kl" else xs
    axis.plot(xs, mean, label=label, **style)
    if "kl" not in x:  # the KL differs between seeds, and can fall
        axis.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)


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

    That is (claim, mean, low, high, verdict, corrected verdict). The last is the plain verdict, or
    "cannot tell" where that may well be chance (see `discoveries`).
    """
    found = {(name, claim.text): (claim, *judge(claim, arms)) for name, arms in saved().items()
             for claim in EXPERIMENTS[name].claims}
    decided, judged = discoveries([p for *_, p in found.values()]), {}
    for (key, (claim, mean, low, high, said, _)), sure in zip(found.items(), decided):
        corrected = said if sure or low == high else "cannot tell"  # low == high: all are 0
        judged[key] = claim, mean, low, high, said, corrected
    return judged


def claim_rows():
    """One row of the page for each claim: (verdict, cells)."""
    rows = []
    for (name, _), (claim, *values, said, corrected) in judge_all().items():
        mean, low, high = (value + claim.least for value in values)
        bound = f" (above {claim.least:g}?)" if claim.least or not claim.less else ""
        if not claim.more:  # the claim is that a number is below a bound
            mean, low, high, bound = -mean, -high, -low, f" (below {0 - claim.least:g}?)"
        digits = 3 if max(abs(low), abs(high)) < 0.1 else 2
        here = "{} [{}, {}]".format(*(number(value, digits) for value in (mean, low, high)))
        rows.append((said, [
            claim.text, EXPERIMENTS[name].source, f"{claim.metric}: {here}{bound}",
            str(EXPERIMENTS[name].seeds), f"**{said}**", corrected,
            f"`python -m lab.papers {name} --again`", f"[{name}](results/{name}.png)"]))
    return rows


def write_page():
    """Bring docs/results.md up to date from the marker on: claims, then pictures and tables."""
    claims = claim_rows()
    runs, minutes = cost(EXPERIMENTS)
    count = lambda verdicts: [verdicts.count(said) for said in VERDICTS]
    not_so, open_, so = count([said for said, _ in claims])
    less, more_open, fewer = count([cells[5] for _, cells in claims])
    parts = [MARKER, f"{len(claims)} claims: {so} hold, {not_so} do not, and for {open_} these "
                     f"runs cannot tell. After correction for their number: {fewer}, {less} and "
                     f"{more_open}. {runs} runs, {minutes:.0f} CPU minutes."]
    header = ["claim", "source", "result: mean [95% interval]", "seeds", "verdict",
              "after correction", "command", "picture"]
    for said, heading in VERDICTS.items():
        rows = [cells for verdict, cells in claims if verdict == said]
        parts += [f"## {heading}", markdown([header, *rows])]
    parts.append("## Numbers and pictures\n\nMeans ± half of the 95% interval.")
    for name, arms in saved().items():
        title = EXPERIMENTS[name].title
        parts += [f"### {name}: {title}", f"![{title}](results/{name}.png)",
                  markdown(arm_rows(name, arms)),
                  "\n".join(f"    python {arm['command']}" for arm in arms.values())]
    before = PAGE.read_text().partition(MARKER)[0]
    PAGE.write_text(before + "\n\n".join(parts) + "\n")


def cost(names):
    """Number of the saved runs of some experiments, and their CPU minutes.

    A run that several share counts once.
    """
    runs = {(arm["command"], seed): numbers["cpu_seconds"] for name in names if read(name)
            for arm in read(name).values() for seed, numbers in arm["runs"].items()}
    return len(runs), sum(runs.values()) / 60


def print_list():
    """What each experiment shows, what it cost, and its last result."""
    judged = judge_all()
    for name, experiment in EXPERIMENTS.items():
        found = [said for (other, _), (*_, said, _) in judged.items() if other == name]
        counts = [f"{said}: {found.count(said)}" for said in VERDICTS if said in found]
        done = "not run yet"
        if read(name):
            done = "{} runs, {:.0f} CPU minutes; ".format(*cost([name]))
            done += ", ".join(counts) or "no claims"
        print(f"{name:<8} {experiment.title} ({experiment.source})\n{'':<8} {done}")


# --------------------------------------------------------------------------------------------- main


def seeds_of(experiment):
    """Its seeds; those of the learning rates are not reported elsewhere."""
    return range(1, experiment.seeds + 1) or [100]


def stored():
    """Every run in docs/results: dict (command, seed, whether evaluated) -> numbers."""
    runs = {}
    for path in RESULTS.glob("*.json"):
        for arm in json.loads(path.read_text()).values():
            for seed, numbers in arm["runs"].items():
                runs[arm["command"], int(seed), "tax" in numbers] = numbers
    return runs


def sweep(names, rates, args):
    """Run what is missing of some experiments; save the numbers of each as soon as it is complete.

    Args: names (of experiments); rates (see `chosen_rates`); args.
    """
    known, waiting = {} if args.again and names != ["lr"] else stored(), defaultdict(list)
    plans = {name: commands(EXPERIMENTS[name], rates) for name in names}
    for name in names:
        for seed in seeds_of(EXPERIMENTS[name]):
            for command in plans[name].values():
                job = command, seed, EXPERIMENTS[name].tax
                if job not in known:
                    waiting[job].append(name)
    missing = {name: sum(name in users for users in waiting.values()) for name in names}
    for name in names:
        if not missing[name]:
            save(name, plans[name], known)
    context = kill.processes() if waiting else None
    Path(args.output).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda job: finish(context, *job, args.output), waiting)
        results = tqdm(results, total=len(waiting), unit="run")
        for (job, users), numbers in zip(waiting.items(), results):
            known[job] = numbers
            for name in users:
                missing[name] -= 1
                if not missing[name]:
                    save(name, plans[name], known)


def save(name, plan, known):
    """Write an experiment's numbers to docs/results."""
    experiment, arms = EXPERIMENTS[name], {}
    for label, command in plan.items():
        runs = {str(seed): known[command, seed, experiment.tax] for seed in seeds_of(experiment)}
        arms[label] = {"command": command, "runs": runs}
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(label, ensure_ascii=False)}: {json.dumps(arm)}"
             for label, arm in arms.items()]
    (RESULTS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(name):
    """An experiment's saved numbers; None if an arm is missing.

    Returns: dict label -> {"command", "runs": {seed: numbers}}.
    """
    path = RESULTS / f"{name}.json"
    arms = json.loads(path.read_text()) if path.exists() else {}
    return arms if EXPERIMENTS[name].arms.keys() <= arms.keys() else None


def main(args):
    names = list(EXPERIMENTS) if args.experiments == ("all",) else list(args.experiments)
    for name in names:
        require(name in EXPERIMENTS, f"{name}: unknown experiment; choose from "
                                     f"{', '.join(EXPERIMENTS)}, or all")
    require(args.jobs >= 1, f"--jobs {args.jobs}: must be 1 or more")
    if names and not args.redraw:
        sweep(["lr"], {}, args)
        sweep(names, chosen_rates(read("lr")), args)
    for name in names:
        require(read(name),
                f"{name}: docs/results has no numbers of it yet; run it without --redraw")
        if EXPERIMENTS[name].panels:
            draw(name, read(name))
    if names:
        write_page()
    print_list()


if __name__ == "__main__":
    main(tyro.cli(Args))
