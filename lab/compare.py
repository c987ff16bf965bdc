"""Compare every algorithm on an embedded task, with several seeds and the same number of generated samples.

    python lab/compare.py

Finished runs in --output are kept, so you can stop and restart it. It draws compare-<task>.png, and writes and prints
compare-<task>.md: means over seeds with their standard deviations. Timings are meaningful only on an idle machine.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot  # noqa: E402

ALGORITHMS = {  # name -> script, flags
    "reinforce, no baseline": ("reinforce", ["--baseline", "none"]),
    "reinforce": ("reinforce", []),
    "rloo": ("rloo", []),
    "remax": ("remax", []),
    "grpo": ("grpo", []),
    "reinforce_pp": ("reinforce_pp", []),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", []),
    "vanilla_pg": ("vanilla_pg", []),
    "ppo": ("ppo", []),
    "raft": ("raft", []),
    "dpo": ("dpo", []),
}
MATH = "--model tasks/mini_math-sft --reward tasks/mini_math.py:accuracy --temperature 1 --max-new-tokens 5 "
TASKS = {  # flags for the scripts that sample, and for dpo.py; none: the defaults
    "mini_tldr": ([], []),
    "mini_math": (
        f"{MATH} --beta 0.001 --dataset tasks/mini_math.py:prompts".split(),
        f"{MATH} --beta 2 --dataset tasks/mini_math.py:comparisons --eval-dataset tasks/mini_math.py:prompts".split(),
    ),
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
    """Run one script unless it has already finished. Returns: peak resident memory in MB (None if unknown)."""
    memory = folder / "peak_memory.json"
    if not (folder / "evaluation.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted comparison
        command = [sys.executable, f"{script}.py", *flags, "--eval-every", "10", "--output", str(folder)]
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
    return 2 + rewards + (settings["script"] in ("ppo", "vanilla_pg"))


def measure(folder, memory):
    """The table's columns for one run: dict name -> number."""
    settings, scalars = plot.read_run(folder)
    values = {name: list(points.values()) for name, points in scalars.items()}
    after = json.loads((folder / "evaluation.json").read_text())["after"]
    return {
        "score": after["score"],
        "gold": after.get("gold"),
        "win rate": after.get("win_rate"),
        "early gold": np.mean(values["eval/gold"][1:6]),
        "KL": after["kl"],
        "length": after["length"],
        "s / update": values["time/seconds"][-1] / len(values["policy/loss"]),
        "tokens / s": np.median(values["time/tokens_per_second"]) if "time/tokens_per_second" in values else None,
        "samples": values["time/samples"][-1],
        "peak MB": memory,
        "models": models(settings),
    }


def main(args):
    for task in args.tasks:
        rows, folders = defaultdict(list), []
        base = Path(args.output).resolve() / task
        base.mkdir(parents=True, exist_ok=True)

        def job(name, seed):
            script, flags = ALGORITHMS[name]
            folder = base / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            memory = run(script, [*flags, *TASKS[task][script == "dpo"], "--seed", str(seed)], folder)
            return name, folder, measure(folder, memory)

        jobs = [(name, seed) for seed in range(1, args.seeds + 1) for name in args.algorithms]
        with ThreadPoolExecutor(args.jobs) as pool:
            done = pool.map(job, *zip(*jobs))
            for name, folder, numbers in tqdm(done, total=len(jobs), desc=task, unit="run"):
                rows[name].append(numbers)
                folders.append(str(folder))
        table(base.parent / f"compare-{task}.md", rows)
        picture = str(base.parent / f"compare-{task}.png")
        reward = ("eval/score", "eval/gold") if task == "mini_tldr" else ("eval/score",)  # where they differ
        axes = ("updates", "samples", "seconds")
        plot.main(plot.Args(runs=tuple(folders), y=(*reward, "eval/kl"), x=axes, output=picture))


def table(path, rows):
    """Write and print a Markdown table: mean +- standard deviation over the runs of each algorithm."""
    columns = list(next(iter(rows.values()))[0])
    lines = [["algorithm", *columns], ["---"] * (len(columns) + 1)]
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if run[column] is not None]
            digits = 0 if not values or abs(np.mean(values)) >= 100 else 2
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values else "–")
        lines.append([name, *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
