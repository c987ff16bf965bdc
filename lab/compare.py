"""Compare every algorithm on an embedded task, with several seeds and equally many samples.

    python -m lab.compare

Finished runs in --output are kept, so you can stop and restart it. It draws compare-<task>.png, and
writes and prints compare-<task>.md: means over seeds with their standard deviations. Timings are
meaningful only on an idle machine.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

import plot
from lab.family import FAMILY

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = {  # name in the table -> script, flags
    "reinforce, no baseline": ("reinforce", ["--baseline", "none"]),
    **{name: (name, []) for name in FAMILY},
}
MATH = ("--model tasks/mini_math-sft --reward tasks/mini_math.py:accuracy --temperature 1 "
        "--max-new-tokens 5")
PROMPTS, PAIRS = "tasks/mini_math.py:prompts", "tasks/mini_math.py:comparisons"
EVALUATION = "--eval-every 10 --eval-prompts 256".split()
TASKS = {  # flags for the scripts that sample, and for those that learn from pairs
    "mini_tldr": ([], []),
    "mini_math": (f"{MATH} --beta 0.001 --dataset {PROMPTS}".split(),
                  f"{MATH} --beta 2 --dataset {PAIRS} --eval-dataset {PROMPTS}".split()),
}


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    """tasks to run"""
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """algorithms to run, by their names in the table"""
    seeds: int = 3
    """number of seeds, from 1"""
    output: str = "runs/compare"
    """folder for runs, plots and tables"""
    jobs: int = 2
    """runs in parallel, each on one core"""


def run(script, flags, folder):
    """Run one script unless it has already finished.

    Returns: peak resident memory in MB (None if unknown).
    """
    memory = folder / "peak_memory.json"
    if not (folder / "evaluation.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted comparison
        command = [sys.executable, f"{script}.py", *flags, *EVALUATION, "--output", str(folder)]
        with open(f"{folder}.log", "w") as log:
            one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=one_core)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"error: {' '.join(command)} failed; its output is in {folder}.log")
        memory.write_text(json.dumps(usage.ru_maxrss / 1024))
    return json.loads(memory.read_text()) if memory.exists() else None


def models(settings):
    """Number of models a run holds: policy, reference, reward models, critic."""
    rewards = sum(".py:" not in name for name in settings["reward"])
    return 2 + rewards + FAMILY[settings["script"]].critic


def measure(folder, memory):
    """The table's columns for one run: dict name -> number."""
    settings, scalars = plot.read_run(folder)
    values = {name: list(points.values()) for name, points in scalars.items()}
    after = json.loads((folder / "evaluation.json").read_text())["after"]
    speeds = values.get("time/tokens_per_second")
    return {
        "score": after["score"],
        "gold": after.get("gold"),
        "win rate": after.get("win_rate"),
        "early gold": np.mean(values["eval/gold"][1:6]),
        "KL": after["kl"],
        "length": after["length"],
        "s / update": values["time/seconds"][-1] / len(values["policy/loss"]),
        "tokens / s": np.median(speeds) if speeds else None,
        "samples": values["time/samples"][-1],
        "peak MB": memory,
        "models": models(settings),
    }


def compare(task, args):
    """Run every algorithm with every seed on one task; write its table and its picture."""
    rows, folders = defaultdict(list), []
    base = Path(args.output).resolve() / task
    base.mkdir(parents=True, exist_ok=True)

    def job(name, seed):
        script, flags = ALGORITHMS[name]
        folder = base / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        flags = [*flags, *TASKS[task][not FAMILY[script].samples], "--seed", str(seed)]
        return name, folder, measure(folder, run(script, flags, folder))

    # mini_tldr has no scores of 0 and 1.
    names = [name for name in args.algorithms
             if task == "mini_math" or not FAMILY[ALGORITHMS[name][0]].binary]
    jobs = [(name, seed) for seed in range(1, args.seeds + 1) for name in names]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(job, *zip(*jobs))
        for name, folder, numbers in tqdm(done, total=len(jobs), desc=task, unit="run"):
            rows[name].append(numbers)
            folders.append(str(folder))
    table(base.parent / f"compare-{task}.md", rows)
    # On mini_math gold is the score, and the references are right too.
    ys = plot.Args.y if task == "mini_tldr" else ("eval/score", "eval/kl")
    plot.main(plot.Args(runs=tuple(sorted(folders)), y=ys, x="samples", bands=False,
                        training=False, output=str(base.parent / f"compare-{task}.png")))


def table(path, rows):
    """Write and print a Markdown table: mean +- standard deviation over each algorithm's runs."""
    columns = list(next(iter(rows.values()))[0])
    lines = [["algorithm", *columns], ["---"] * (len(columns) + 1)]
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if run[column] is not None]
            digits = 0 if not values or abs(np.mean(values)) >= 100 else 2
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values
                         else "–")
        lines.append([name, *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    path.write_text(text + "\n")
    print(text)


def main(args):
    for task in args.tasks:
        compare(task, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
