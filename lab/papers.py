"""Run the papers' experiments again at toy scale: a picture, a table and a verdict for each.

    python -m lab.papers                    # the list: what each shows, costs, seeds done, results
    python -m lab.papers fig1 fig3 table1   # runs what is missing, then draws; "all" for all
    python -m lab.papers all --minutes 170  # starts no run after 170 minutes
    python -m lab.papers fig1 --redraw      # only draws, from the numbers in docs/results
    python -m lab.papers fig1 --again       # makes the runs again, although docs/results has them

The numbers of each run are in docs/results as soon as it is finished, so you can stop a sweep and
start it again. It goes seed by seed through all experiments, those with tuned learning rates last,
and in the end each has its picture, and docs/results.md is brought up to date.

Unless an experiment's commands say otherwise, runs start from the SFT policy of mini TL;DR and
generate 960 responses, 16 per update, at a constant learning rate of 1e-4. An experiment named
"fig2_tuned" is "fig2" with the rate of each algorithm that has the highest mean score in "lr", over
seeds that are not used again, and without claims that do not depend on it (time, memory) or that
are about a KL which its policies pass before the first evaluation.

An interval is Student's, at 95%, over seeds, plus what other held-out prompts would change;
differences are taken seed by seed. A claim holds if its interval lies above 0, and does not hold if
it lies below (or is exactly 0). If the interval is within a tenth of what training changes, the
difference is too small to matter; otherwise these runs cannot tell. Of many claims some are decided
by chance. The page's verdicts are those that are left if at most 5% of all decisions are expected
to be wrong (Benjamini and Hochberg 1995).
"""

import math
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from lab.claims import chosen_rates, judge_all
from lab.experiments import EXPERIMENTS
from lab.page import VERDICTS, draw, write_page
from lab.results import cost, read, seeds_done, stored_arms
from lab.sweep import sweep
from plumbing import require


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


def print_list():
    """What each experiment shows, its seeds, what they cost, what is missing, and its results."""
    judged, rates = judge_all(), chosen_rates(read("lr"))
    for name, experiment in EXPERIMENTS.items():
        runs, minutes = cost([name])
        asked = len(set(experiment.arms.values())) * len(experiment.seeds)
        said = [found[-1] for (other, _), found in judged.items() if other == name]
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


def main(args):
    names = list(EXPERIMENTS) if args.experiments == ("all",) else list(args.experiments)
    for name in names:
        require(name in EXPERIMENTS, f"{name}: unknown experiment; choose from "
                                     f"{', '.join(EXPERIMENTS)}, or all")
    require(args.jobs >= 1, f"--jobs {args.jobs}: must be 1 or more")
    require(args.minutes > 0, f"--minutes {args.minutes}: must be above 0")
    every, rates = args.experiments == ("all",), chosen_rates(read("lr"))
    for name in names:
        require(every or rates or args.redraw or not EXPERIMENTS[name].tuned,
                f"{name}: takes the learning rates that lr finds; run lr first")
        require(every or read(name) or not args.redraw,
                f"{name}: docs/results has no numbers of it yet; run it without --redraw")
    if not args.redraw:
        end = time.monotonic() + 60 * args.minutes
        sweep([name for name in names if not EXPERIMENTS[name].tuned], {}, args, end)
        if rates := chosen_rates(read("lr")):
            sweep([name for name in names if EXPERIMENTS[name].tuned], rates, args, end)
    for name in names:
        if read(name) and EXPERIMENTS[name].panels:
            draw(name, read(name))
    if names:
        write_page()
    print_list()


if __name__ == "__main__":
    main(tyro.cli(Args))
