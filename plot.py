"""Plot learning curves of one or more runs from their TensorBoard logs to a PNG.

    python plot.py runs/rloo-*
    python plot.py runs/rloo-* runs/grpo-* --x samples --output runs/rloo-grpo.png

Lines are evaluations on held-out prompts; small dots are the same metric on each update's own
rollout (for eval/score that is objective/scores, which is less the missing-EOS penalty). Runs that
differ only in the seed (and in flags that do not change the result, such as --output) are one
curve: their mean, with a band of one standard deviation, except against the KL. Of runs with the
same flags and the same seed the last one named is drawn, which is the latest of `runs/rloo-*`.
"""

import itertools
import json
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.family import FAMILY
from plumbing import require

plt.switch_backend("agg")  # pictures are written, not shown

UNSEEN = {"seed", "output", "resume", "save_every", "keep", "device", "plain",
          "nproc_per_node"}  # flags that do not start another curve
AXES = {"updates": None, "samples": "time/samples", "seconds": "time/seconds", "kl": "eval/kl"}
TRAINING = {"eval/score": "objective/scores", "eval/kl": "objective/kl",
            "eval/length": "rollout/length", "eval/eos_rate": "rollout/eos_rate"}
NAMES = {"samples": "sampled responses", "seconds": "seconds of training",
         "score": "score", "gold": "gold reward", "win_rate": "win rate",
         "kl": "KL to the reference (nats)", "length": "response length (tokens)",
         "eos_rate": "share of responses with EOS"}
BOUNDS = {"kl": (0, np.inf), "length": (0, np.inf), "win_rate": (0, 1), "eos_rate": (0, 1),
          "accuracy": (0, 1)}  # between which a metric's mean lies, and so must its band


# ------------------------------------------------------------- what all pictures of the project use


# Okabe and Ito's colours for the colour-blind, without the yellow, which is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX*<>p"  # 11 of them and 7 colours, so that the same two meet again after 77
STYLES = [{"color": COLORS[i % 7], "marker": MARKERS[i % 11],
           "linestyle": ("-", "--", ":", "-.")[i // 7]} for i in range(28)]


def style(name):
    """The entry of STYLES that an algorithm of lab/family.py has in every picture."""
    return STYLES[list(FAMILY).index(name)]


def styles(names):
    """A style for each curve of a picture: dict name -> entry of STYLES, all different up to 28.

    A name that begins with an algorithm's, as "ppo", "ppo.py --lam 1" and "ppo, no clip" do, gets
    the algorithm's own style. A second one of the same algorithm, and every other name, gets one
    that is free.
    """
    found = {}
    for name in names:
        script = re.match(r"\w*", name)[0]
        if script in FAMILY and style(script) not in found.values():
            found[name] = style(script)
    free = itertools.cycle([one for one in STYLES if one not in found.values()] or STYLES)
    return {name: found.get(name) or next(free) for name in names}


def draw_curve(axis, x, y, band, metric, **style):
    """A line, and a band that is cut off where the metric has its bounds.

    Args: axis; x, y (n,); band (low and high, (n,) each, or None); metric (by TensorBoard name, or
    the last part of it); style (for axis.plot).
    """
    axis.plot(x, y, **{"markersize": 4.5, "linewidth": 1.3} | style)
    if band is not None:
        low, high = np.clip(band, *BOUNDS.get(metric.split("/")[-1], (-np.inf, np.inf)))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def save(figure, path):
    """Write a picture to a PNG, and its folder if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --------------------------------------------------------------------------------- learning curves


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders"""
    y: tuple[str, ...] = ("eval/score", "eval/gold", "eval/win_rate", "eval/kl")
    """metrics to plot, a panel each, by TensorBoard name; those that no run has are skipped"""
    x: str = "updates"
    """x-axis to plot them against: updates, samples, seconds or kl"""
    bands: bool = True
    """draw a standard deviation around the mean of several seeds"""
    training: bool = True
    """draw a dot for each update's rollout, where it has the metric too"""
    output: str = "runs/curves.png"
    """PNG file to write"""


def read_run(folder):
    """Settings (args.json) and scalars (name -> {step: value}) of one run folder."""
    path = Path(folder)
    require((path / "args.json").is_file(), f"{folder}: is not a run folder (it has no args.json)")
    log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    scalars = {name: {event.step: event.value for event in log.Scalars(name)}
               for name in log.Tags()["scalars"]}
    require(scalars, f"{folder}: its TensorBoard log holds no scalars")
    return json.loads((path / "args.json").read_text()), scalars


def read_curves(folders):
    """The runs behind each curve: dict label -> list of scalars (see `read_run`), one for a seed.

    A label is the script, flags that differ between its curves, and the number of seeds.
    """
    groups = defaultdict(dict)  # settings as JSON -> seed -> scalars
    for folder in folders:
        settings, scalars = read_run(folder)
        shared = {name: value for name, value in settings.items() if name not in UNSEEN}
        groups[json.dumps(shared)][settings.get("seed")] = scalars
    every = [json.loads(key) for key in groups]
    return {f"{label(settings, every)} ({len(runs)} seed{'s' * (len(runs) > 1)})":
            list(runs.values()) for settings, runs in zip(every, groups.values())}


def label(settings, all_settings):
    """Name of a group of runs: the script, and flags that differ between its groups."""
    same = [other for other in all_settings if other["script"] == settings["script"]]
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()
             if len({str(other.get(name)) for other in same}) > 1]
    return " ".join([settings["script"], *flags])


def points(runs, x, y):
    """Where all runs have a metric: (x, ys) of shapes (n,), a mean over the runs, and (runs, n)."""
    axis = AXES[x] if y.startswith("eval/") else TRAINING.get(AXES[x], AXES[x])
    curves = []  # dicts step -> (x, y)
    for scalars in runs:
        found = scalars.get(y, {})
        at = {step: step for step in found} if axis is None else {0: 0.0} | scalars.get(axis, {})
        curves.append({step: (at[step], value) for step, value in found.items() if step in at})
    steps = sorted(set.intersection(*map(set, curves)))
    both = np.array([[curve[step] for step in steps] for curve in curves]).reshape(len(runs), -1, 2)
    return both[..., 0].mean(0), both[..., 1]


def draw(axis, runs, args, y, label, style):
    """Draw one curve. Args: axis; runs (list of scalars); args; y (metric); label; style."""
    x, ys = points(runs, args.x, TRAINING.get(y, ""))  # of each update's rollout
    if args.training and len(x):
        axis.plot(x, ys.mean(0), ".", color=style["color"], markersize=3, alpha=0.35)
    x, ys = points(runs, args.x, y)
    if len(x):
        mean, std = ys.mean(0), ys.std(0)
        # The KL can decrease, and a band against it would cross itself.
        band = (mean - std, mean + std) if args.bands and len(runs) > 1 and args.x != "kl" else None
        draw_curve(axis, x, mean, band, y, label=label, **style)


def add_legend(figure, axes, training):
    """Above all panels, each curve of any of them once."""
    handles = {name: handle for axis in axes
               for handle, name in zip(*axis.get_legend_handles_labels())}
    names = [textwrap.fill(name, 64) for name in handles]
    if training:
        (handle,) = axes[0].plot([], [], ".", color="gray", markersize=4)
        handles["dots"], names = handle, [*names, "dots: rollouts of training"]
    columns = max(1, 124 // (10 + max(len(line) for name in names for line in name.split("\n"))))
    figure.legend(handles.values(), names, loc="outside upper center", ncols=columns, fontsize=8)


def report(curves):
    """Print how far each curve goes, and say so if they do not end together."""
    ends = [min(max(step for points in scalars.values() for step in points) for scalars in runs)
            for runs in curves.values()]
    for name, end in zip(curves, ends):
        print(f"{name}: {end} updates")
    if len(set(ends)) > 1:
        print("note: these curves do not end at the same update; to see one closely, name its runs "
              "alone")


def main(args):
    require(args.runs, "name at least one run folder")
    require(args.output.endswith(".png"), f"--output {args.output}: must be a .png file")
    require(args.x in AXES, f"--x {args.x}: unknown; choose from {', '.join(AXES)}")
    curves = read_curves(args.runs)
    ys = [y for y in args.y if any(y in scalars for runs in curves.values() for scalars in runs)]
    require(ys, f"--y {' '.join(args.y)}: no run has any of these metrics")

    columns = 3 if len(ys) % 3 == 0 else min(len(ys), 2)
    rows = -(-len(ys) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(8.3, 2.5 * rows + 0.1 * len(curves) + 0.3))
    for axis, y in itertools.zip_longest(axes.flat, ys):
        if y is None:
            axis.axis("off")
            continue
        for name, style in styles(curves).items():
            draw(axis, curves[name], args, y, name, style)
        axis.grid(alpha=0.3)
        axis.set_title(NAMES.get(y.removeprefix("eval/"), y), fontsize=10)
        axis.set_xlabel(NAMES.get(args.x, args.x), fontsize=9)
        axis.tick_params(labelsize=8)
    add_legend(figure, axes.flat, args.training and any(y in TRAINING for y in ys))
    save(figure, args.output)
    report(curves)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
