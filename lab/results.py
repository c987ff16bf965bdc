"""The numbers of the papers' runs, for lab/papers.py: storage in docs/results, and measures."""

import json
import math
import statistics
from pathlib import Path

import numpy as np

from lab.experiments import EXPERIMENTS

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
CURVES = ("score", "gold", "win_rate", "kl", "length")
HALVES = ("odd", "even")  # seeds


# ------------------------------------------------------------------------------------------ storage


def stored_arms(name):
    """What docs/results has of an experiment: dict label -> {"command", "runs", "prompts"}."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def start():
    """What evaluate.py says of the policy that runs start from: dict; {} if it is not known yet."""
    path = RESULTS / "start.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save_start(numbers):
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "start.json").write_text(json.dumps(numbers, indent=1) + "\n")


def read(name):
    """An experiment's saved arms (see `stored_arms`); None if they have no two seeds in common."""
    arms, labels = stored_arms(name), EXPERIMENTS[name].arms.keys()
    if not labels <= arms.keys() or len(common_seeds(arms.values())) < 2:
        return None
    return arms


def save(name, arms):
    """Write an experiment's numbers to docs/results; the old file stays until they are written."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(label, ensure_ascii=False)}: {json.dumps(arm, separators=(',', ':'))}"
             for label, arm in arms.items()]
    new = RESULTS / f"{name}.json.new"
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.rename(RESULTS / f"{name}.json")


def add(arm, seed, numbers, experiment):
    """Add a run to an arm: its numbers, and to the mean over its half of the seeds, its prompts'.

    Args: arm ({"command", "runs", "prompts"}); seed; numbers (see `read_numbers`; what evaluate.py
    says goes to experiments that ask for it: another may have the same run); experiment.
    """
    prompts, unused = numbers["prompts"], {"prompts"} if experiment.tax else {"prompts", "tax"}
    arm["runs"][str(seed)] = {name: numbers[name] for name in numbers if name not in unused}
    halves = arm.setdefault("prompts", {})
    half = halves.setdefault(HALVES[seed % 2 == 0], {"seeds": [], "curves": {}})
    n = len(half["seeds"])
    for name in curves_of(experiment):
        new, old = np.array(prompts[name]), np.array(half["curves"].get(name, 0.0))  # (E, P)
        half["curves"][name] = ((old * n + new) / (n + 1)).round(2).tolist()
    half["seeds"].append(seed)


def curves_of(experiment):
    """The curves whose numbers on each prompt an experiment's claims need."""
    words = {word for claim in experiment.claims for word in claim.metric.lower().split()}
    return [name for name in CURVES if name in words]


def common_seeds(arms):
    """The seeds that all arms (of an iterable) have."""
    seeds = [set(arm["runs"]) for arm in arms]
    return sorted(set.intersection(*seeds), key=int) if seeds else []


def seeds_done(experiment, arms):
    """The number of an experiment's seeds that all of its arms have."""
    return len(set(map(str, experiment.seeds)) & set(common_seeds(arms.values())))


def cost(names):
    """Number of the saved runs of some experiments, and their CPU minutes.

    A run that several share counts once.
    """
    runs = {(arm["command"], seed): numbers["cpu_seconds"] for name in names
            for arm in stored_arms(name).values() for seed, numbers in arm["runs"].items()}
    return len(runs), sum(runs.values()) / 60


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
