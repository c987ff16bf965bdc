"""Plot learning curves of one or more runs from their TensorBoard logs to a PNG.

    python plot.py runs/rloo-seed* --output curves.png

Runs that differ only in the seed (and in flags that do not change the result, such as --output)
form one curve: their mean, with a band of one standard deviation (except against the KL). Every
metric (--y) is plotted against every x-axis (--x).
"""

import itertools
import json
import re
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
# Okabe and Ito's colours for the colour-blind, without the yellow, which is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^vDPX*<>p"  # 11 of them and 7 colours, so that the same two meet again after 77
STYLES = [{"color": COLORS[i % 7], "marker": MARKERS[i % 11], "linestyle": ("-", "--", ":")[i // 7]}
          for i in range(21)]
AXES = {"updates": None, "samples": "time/samples", "seconds": "time/seconds", "kl": "eval/kl"}
NAMES = {"kl": "KL to the reference", "seconds": "training seconds"}


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders"""
    y: tuple[str, ...] = ("eval/score", "eval/gold", "eval/win_rate")
    """metrics to plot, by TensorBoard name; those that no run has are skipped"""
    x: tuple[str, ...] = ("updates", "samples", "seconds", "kl")
    """x-axes to plot them against: updates, samples, seconds, kl"""
    output: str = "runs/curves.png"
    """PNG file to write"""


def style(name):
    """The entry of STYLES that an algorithm of lab/family.py has in every picture."""
    return STYLES[list(FAMILY).index(name)]


def styles(names):
    """A style for each curve of a picture: dict name -> entry of STYLES, all different up to 21.

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


def read_run(folder):
    """Settings (args.json) and scalars (name -> {step: value}) of one run folder."""
    path = Path(folder)
    require((path / "args.json").is_file(), f"{folder}: is not a run folder (it has no args.json)")
    log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    scalars = {name: {event.step: event.value for event in log.Scalars(name)}
               for name in log.Tags()["scalars"]}
    require(scalars, f"{folder}: its TensorBoard log holds no scalars")
    return json.loads((path / "args.json").read_text()), scalars


def label(settings, all_settings):
    """Legend entry of a group of runs: the script, and flags that differ between its groups."""
    same = [other for other in all_settings if other["script"] == settings["script"]]
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()
             if len({str(other.get(name)) for other in same}) > 1]
    return " ".join([settings["script"], *flags])


def curve(scalars, x, y):
    """Points of one run: dict step -> (x, y), where both were logged (at step 0, x is 0)."""
    steps = {step: step for step in scalars[y]}
    xs = steps if AXES[x] is None else {0: 0.0, **scalars.get(AXES[x], {})}
    return {step: (xs[step], value) for step, value in scalars[y].items() if step in xs}


def draw(axis, runs, x, y, color):
    """Draw one group of runs: their mean, and a band of one standard deviation.

    Args: axis; runs (list of scalars, see `read_run`); x; y; color. Returns: the line and how many
    runs it stands for; None if there are no points.
    """
    curves = [curve(scalars, x, y) for scalars in runs if y in scalars]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return None
    points = np.array([[points[step] for step in steps] for points in curves])  # (runs, steps, 2)
    mean, std = points.mean(0), points[..., 1].std(0)  # (steps, 2), (steps,)
    (line,) = axis.plot(mean[:, 0], mean[:, 1], marker=".", color=color)
    if x != "kl":  # the KL can decrease, and the band would cross itself
        axis.fill_between(mean[:, 0], mean[:, 1] - std, mean[:, 1] + std, color=color, alpha=0.15)
    return line, len(curves)


def main(args):
    require(args.runs, "name at least one run folder")
    require(args.output.endswith(".png"), f"--output {args.output}: must be a .png file")
    for x in args.x:
        require(x in AXES, f"--x {x}: unknown; choose from {', '.join(AXES)}")
    groups = defaultdict(list)
    for folder in args.runs:
        settings, scalars = read_run(folder)
        settings = {name: value for name, value in settings.items() if name not in UNSEEN}
        groups[json.dumps(settings)].append(scalars)
    ys = [y for y in args.y if any(y in scalars for runs in groups.values() for scalars in runs)]
    require(ys, f"--y {' '.join(args.y)}: no run has any of these metrics")
    all_settings = [json.loads(key) for key in groups]
    colors = [*plt.colormaps["tab10"].colors, "black", "gold"]

    figure, axes = plt.subplots(len(ys), len(args.x), squeeze=False,
                                figsize=(3.6 * len(args.x), 2.7 * len(ys)))
    lines = {}
    for row, y in zip(axes, ys):
        for axis, x in zip(row, args.x):
            for i, (settings, runs) in enumerate(zip(all_settings, groups.values())):
                if drawn := draw(axis, runs, x, y, colors[i % len(colors)]):
                    line, count = drawn
                    seeds = f"({count} seed{'s' * (count > 1)})"
                    lines[f"{label(settings, all_settings)} {seeds}"] = line
            axis.grid(alpha=0.3)
            axis.set_xlabel(NAMES.get(x, x))
            axis.set_ylabel(y)
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=3,
                  bbox_to_anchor=(0.5, 1.0), fontsize=9)
    figure.tight_layout()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110, bbox_inches="tight")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
