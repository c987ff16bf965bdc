"""Pictures, tables and the page of the papers' experiments, for lab/papers.py."""

import math
import statistics

import numpy as np

import plot
from lab.claims import MARGIN, best_rate, breaking_rate, good_rates, judge_all
from lab.experiments import EXPERIMENTS
from lab.intervals import interval
from lab.results import RESULTS, cost, measure, read, seeds_done
from lab.sweep import shown

PAGE = RESULTS.parent / "results.md"
MARKER = "<!-- everything below is written by lab/papers.py -->"
VERDICTS = {"does not hold": "What does not hold here",
            "cannot tell": "What these runs cannot tell",
            "too small": "What is too small to matter here", "holds": "What holds here"}
GROUPS = {"at the common learning rate":
          lambda name: not name.startswith("stale") and not name.endswith("_tuned"),
          "at each algorithm's own": lambda name: name.endswith("_tuned"),
          "several steps per rollout": lambda name: name.startswith("stale")}


# ----------------------------------------------------------------------------------------- pictures


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
        mean, low, high = middle(arm, y)
        look = {name: looks[label][name] for name in ("color", "marker")}
        axis.errorbar(mean, -i, xerr=[[mean - low], [high - mean]], capsize=3, **look)
    axis.set_yticks([-i for i in range(len(arms))], list(arms))


def middle(arm, metric):
    """The mean over an arm's runs, and its 95% interval; of "lag" the geometric mean.

    The estimate of how far a rollout's use moves the policy is a mean of ratios, and one token with
    a ratio of thousands makes one seed's a hundred times that of the others.
    """
    values = [measure(run, metric) for run in arm["runs"].values()]
    if metric != "lag":
        return interval(values)
    return tuple(map(math.exp, interval([math.log(value) for value in values])))


def draw_against(axis, experiment, y, arms, looks):
    """Means of y, with 95% intervals, against the number that is varied; a curve for each look."""
    for curve, look in looks.items():
        found = [(number, *middle(arms[label], y))
                 for label, (other, number) in experiment.points.items() if other == curve]
        numbers, means, lows, highs = map(np.array, zip(*found))
        axis.errorbar(numbers, means, yerr=[means - lows, highs - means], capsize=2,
                      elinewidth=0.8, markersize=4.5, linewidth=1.3, **look)
    if experiment.varied == "learning rate" and y != "final kl":
        show_the_start(axis, [run[y.split()[-1]][0] for arm in arms.values()
                              for run in arm["runs"].values()])
    ticks = sorted({number for _, number in experiment.points.values()})
    axis.set_xscale("log")
    if y in ("final kl", "lag"):  # of which an estimator that runs away has far more
        axis.set_yscale("log", nonpositive="clip")
    axis.set_xticks(ticks, [f"{number:g}".replace("e-0", "e-") for number in ticks], rotation=30)
    axis.set_xticks([], minor=True)


def show_the_start(axis, starts):
    """A line where runs start, and not much below it: curves that fall apart leave the picture."""
    start = statistics.mean(starts)
    best = max(height for line in axis.lines for height in line.get_ydata())
    axis.axhline(start, color="gray", linewidth=0.8, zorder=0)
    axis.set_ylim(start - 0.5 * (best - start), best + 0.2 * (best - start))


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


# ------------------------------------------------------------------------------------------- tables


def markdown(rows):
    """A Markdown table. Args: rows (lists of str), the header first."""
    header, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *lines])


def number(value, digits=2):
    """As text; a dash if it is not a number."""
    return "–" if math.isnan(value) else f"{value:z.{digits}f}"


def with_interval(mean, low, high):
    """As text: three digits of small numbers, and of those of which an end would be told as 0."""
    digits = 3 if max(abs(low), abs(high)) < 0.1 or 0 < min(abs(low), abs(high)) < 0.005 else 2
    return "{} [{}, {}]".format(*(number(value, digits) for value in (mean, low, high)))


def cell(arm, metric):
    """Mean ± half of the 95% interval over an arm's runs; a dash if it has no such number."""
    mean, low, _ = middle(arm, metric)
    digits = 4 if abs(mean) < 0.01 else 2
    if math.isnan(mean) or metric == "lag":  # its interval has two unequal halves
        return number(mean, digits)
    return f"{number(mean, digits)} ± {number(mean - low, digits)}"


def arm_rows(name, arms):
    """The table of an experiment: a row for each arm."""
    columns = EXPERIMENTS[name].columns
    return [["", *columns], *([label, *(cell(arm, column) for column in columns)]
                              for label, arm in arms.items())]


def rate_rows(name, arms):
    """The table of an experiment that varies the learning rate: a row for each command."""
    columns = [column for column in EXPERIMENTS[name].columns if "length" not in column]
    rows = [["", "best rate", *(f"{column} there" for column in columns),
             "rises nine tenths as much at", "ends below its start from"]]
    for command in dict.fromkeys(curve for curve, _ in EXPERIMENTS[name].points.values()):
        best = best_rate(arms, command)
        cells = [cell(arms[f"{command} --lr {best}"], column) for column in columns]
        rows.append([command, best, *cells, ", ".join(good_rates(arms, command)),
                     breaking_rate(arms, command) or "–"])
    return rows


def claim_rows(judged):
    """One row of the page for each claim: (verdict, cells). Args: judged (see `judge_all`)."""
    rows = []
    for (name, _), (claim, *values, margin, said, corrected) in judged.items():
        mean, low, high = (value + claim.least for value in values)
        bound = f" (above {claim.least:g}?)" if claim.least or not claim.less else ""
        if not claim.more:  # the claim is that a number is below a bound
            mean, low, high, bound = -mean, -high, -low, f" (below {0 - claim.least:g}?)"
        largest = max(abs(low), abs(high)) / (margin / MARGIN) if margin else math.nan
        rows.append((corrected, [
            claim.text, EXPERIMENTS[name].source,
            f"{claim.metric}: {with_interval(mean, low, high)}{bound}",
            "–" if math.isnan(largest) else f"{largest:.0%}",
            f"{seeds_done(EXPERIMENTS[name], read(name))}", f"**{corrected}**", said,
            f"`python -m lab.papers {name} --again`", f"[{name}](results/{name}.png)"]))
    return rows


def counts(judged):
    """Of the claims of each group of experiments, how many have which verdict: rows of a table."""
    rows = [["experiments", "claims", *VERDICTS]]
    for group, belongs in GROUPS.items():
        said = [found[-2:] for (name, _), found in judged.items() if belongs(name)]
        numbers = [[verdicts.count(word) for verdicts in zip(*said)] for word in VERDICTS]
        if said:
            rows.append([group, f"{len(said)}",
                         *(f"{after} ({before})" for before, after in numbers)])
    return rows


def changes(judged):
    """How many claims have which verdict at the common rate and at their own: rows of a table."""
    pairs = [(common[-1], judged[f"{name}_tuned", text][-1])
             for (name, text), common in judged.items() if (f"{name}_tuned", text) in judged]
    return [["at the common rate ↓, at their own →", *VERDICTS],
            *([word, *(f"{pairs.count((word, other))}" for other in VERDICTS)]
              for word in VERDICTS)]


def write_page():
    """Bring docs/results.md up to date from the marker on: claims, then pictures and tables."""
    judged = judge_all()
    claims = claim_rows(judged)
    runs, minutes = cost(EXPERIMENTS)
    parts = [MARKER, f"{len(claims)} claims, {runs} runs, {minutes:.0f} CPU minutes. Verdicts, "
                     "after correction for their number (before it):", markdown(counts(judged)),
             "The claims that were tested at both rates, by their verdicts:",
             markdown(changes(judged))]
    header = ["claim", "source", "result: mean [95% interval]", "at most", "seeds",
              "verdict", "before correction", "command", "picture"]
    for said, heading in VERDICTS.items():
        rows = [cells for verdict, cells in claims if verdict == said]
        parts += [f"## {heading}", markdown([header, *rows])]
    parts.append("## Numbers and pictures\n\nMeans ± half of the 95% interval over seeds; "
                 "other prompts would change them a little more. Of the KL that the policy moves "
                 "while a rollout is used (lag) it is the geometric mean.")
    drawn = {name: arms for name in EXPERIMENTS
             if EXPERIMENTS[name].panels and (arms := read(name))}
    for name, arms in drawn.items():
        title = EXPERIMENTS[name].title
        parts += [f"### {name}: {title}", f"![{title}](results/{name}.png)"]
        if EXPERIMENTS[name].varied == "learning rate":
            parts.append(markdown(rate_rows(name, arms)))
        parts += [f"<details><summary>{len(arms)} rows, and their commands</summary>",
                  markdown(arm_rows(name, arms)),
                  "\n".join(f"    python {shown(arm['command'])}" for arm in arms.values()),
                  "</details>"]
    before = PAGE.read_text().partition(MARKER)[0]
    PAGE.write_text(before + "\n\n".join(parts) + "\n")
