"""Make the runs of the papers' experiments, for lab/papers.py: each in a process of its own."""

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
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import evaluate
import plot
from common import no_grad_logprobs
from lab.experiments import COMMON, EXPERIMENTS, TUNED
from lab.results import CURVES, add, save, save_start, start, stored_arms
from plumbing import require
from tools import kill

ROOT = Path(__file__).resolve().parent.parent
SFT = "tasks/mini_tldr-sft"  # where runs start
EVERY_RUN = "--lr-schedule constant --save-every 0"  # a checkpoint only at the end
PROMPTS = "--eval-prompts 256"  # unless a command says otherwise


# ----------------------------------------------------------------------------------------- commands


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


def shown(command):
    """A command as one types it: a script in a folder runs as a module."""
    script, _, flags = command.partition(" ")
    module = script.removesuffix(".py").replace("/", ".")
    return f"-m {module} {flags}" if "/" in script else command


def folder_of(command, seed, output):
    """The folder of a run: its flags, without those that every run has."""
    name = command.removesuffix(EVERY_RUN).replace(PROMPTS, "").replace(".py", "").replace("--", "")
    return Path(output) / f"{re.sub('[^a-zA-Z0-9.]+', '_', name).strip('_')}_seed{seed}"


# ------------------------------------------------------------------------------------------ one run


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
        found["tax"] = evaluated(context, folder / "model", log, taxed)
    return found


def evaluated(context, policy, log, file):
    """What evaluate.py says of a policy: dict name -> number.

    Args: context; policy (folder); log; file (where it writes that; if there is one, it is read).
    """
    if not file.exists():
        call(context, evaluate.main, log,
             evaluate.Args(policies=(str(policy),), eval_prompts=250, output=str(file)))
    (numbers,) = json.loads(file.read_text())["policies"].values()
    return {name: round(value, 4) for name, value in numbers.items()}


# -------------------------------------------------------------------------------------- its numbers


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


# ---------------------------------------------------------------------------------- all that remain


def sweep(names, rates, args, end=math.inf):
    """Make the runs of some experiments that docs/results lacks, seed by seed, and save each.

    Args: names (of experiments); rates (see `chosen_rates`); args; end (no run starts after this
    time of time.monotonic).
    """
    plans, users = {name: commands(EXPERIMENTS[name], rates) for name in names}, {}
    for name, plan in plans.items():
        kept = {} if args.again else stored_arms(name)
        arms = {label: kept[label] if kept.get(label, {}).get("command") == command else
                {"command": command, "runs": {}} for label, command in plan.items()}
        for i, seed in enumerate(EXPERIMENTS[name].seeds):
            for label, command in plan.items():
                if str(seed) not in arms[label]["runs"]:
                    users.setdefault((i, command, seed), []).append((name, arms, label))
    runs = sorted(users, key=lambda run: run[0])  # the first seeds of all come first
    if not runs:
        return
    context = kill.processes()
    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    tax = {run: any(EXPERIMENTS[name].tax for name, *_ in users[run]) for run in runs}
    lag = {run: any(EXPERIMENTS[name].lag for name, *_ in users[run]) for run in runs}

    def in_time(run):
        _, command, seed = run
        job = command, seed, tax[run], lag[run]
        return finish(context, job, output) if time.monotonic() < end else None

    if any(tax.values()) and not start():
        save_start(evaluated(context, SFT, output / "start.log", output / "start.json"))
    with ThreadPoolExecutor(args.jobs) as pool:
        for run, numbers in zip(runs, tqdm(pool.map(in_time, runs), total=len(runs), unit="run")):
            for name, arms, label in users[run] if numbers else ():
                add(arms[label], run[-1], numbers, EXPERIMENTS[name])
                save(name, arms)
