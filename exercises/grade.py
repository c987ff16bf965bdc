"""Grade a finished run: which thresholds of a rubric does its last evaluation meet?

    python rloo.py --num-updates 75 --eval-prompts 256 --output runs/graded
    python -m exercises.grade runs/graded
    python -m exercises.grade runs/graded --json results.json      # as Gradescope reads it

A run is graded only if it is comparable: trained within the rubric's number of samples, with the
flags that the rubric prescribes. The exit code is 0 if all thresholds are met.

    python -m exercises.grade runs/seed* --rubric my.json --calibrate

sets the thresholds of a rubric from five runs of a right solution: at the mean minus 4 standard
deviations (plus 4, where a metric must not be too high). With five seeds and four or five
thresholds, another run of the same solution meets all of them with 95% probability, if the metrics
are normally distributed: t prediction intervals, 98.75% or 99% for each, are 3.8 or 4.1 standard
deviations wide.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import plot
from plumbing import one_line, require

MARGIN = 4  # standard deviations


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders"""
    rubric: str = str(Path(__file__).with_name("rubric.json"))
    """JSON file with the budget, the flags and the thresholds"""
    json: str | None = None
    """file to write the grade of a single run to, as Gradescope reads it"""
    calibrate: bool = False
    """set the rubric's thresholds from these runs, instead of grading them"""


def read_rubric(path):
    """A rubric: a dict.

    samples: the most that a run may have sampled. flags: dict. thresholds: list of dicts (see
    `meets`).
    """
    require(Path(path).is_file(), f"--rubric {path}: no such file")
    try:
        rubric = json.loads(Path(path).read_text())
        assert rubric.keys() >= {"samples", "flags", "thresholds"}
        assert all(item.keys() >= {"metric", "bound", "points"} for item in rubric["thresholds"])
    except (ValueError, AssertionError, AttributeError) as error:
        require(False, f"--rubric {path}: not a rubric (JSON with samples, flags and thresholds) "
                       f"{one_line(error)}")
    return rubric


def read_run(folder):
    """A run's flags, the number of its samples, and its last evaluation (dict metric -> value)."""
    settings, scalars = plot.read_run(folder)
    path = Path(folder) / "evaluation.json"
    require(path.is_file(), f"{folder}: has no evaluation.json: the run has not finished; continue "
                            "it with --resume")
    last = {name: values[max(values)] for name, values in scalars.items()}
    try:
        evaluation = json.loads(path.read_text())["after"]
        assert all(abs(last[f"eval/{name}"] - value) < 1e-4 for name, value in evaluation.items())
    except (ValueError, KeyError, TypeError, AssertionError):
        require(False, f"{folder}: evaluation.json does not say what the run has logged; was it "
                       "edited?")
    return settings, last["time/samples"], evaluation


def not_comparable(rubric, settings, samples):
    """Why a run cannot be graded: a list of sentences."""
    wrong = [f"--{name.replace('_', '-')} is {settings.get(name)}, not {value}"
             for name, value in rubric["flags"].items() if settings.get(name) != value]
    if samples > rubric["samples"]:
        wrong.append(f"{samples:,.0f} samples, over the budget of {rubric['samples']:,}")
    return wrong


def meets(threshold, evaluation):
    """Whether an evaluation meets a threshold: its metric is "at least" or "at most" that value."""
    value = evaluation[threshold["metric"]]
    if threshold["bound"] == "at least":
        return value >= threshold["value"]
    return value <= threshold["value"]


def grade(folder, rubric):
    """Print a run's grade. Returns: what Gradescope reads, a dict."""
    settings, samples, evaluation = read_run(folder)
    wrong = not_comparable(rubric, settings, samples)
    tests = []
    print(f"{folder}: {settings['script']}.py, {samples:,.0f} samples")
    for reason in wrong:
        print(f"  not graded: {reason}")
    for threshold in rubric["thresholds"]:
        metric, most = threshold["metric"], threshold["points"]
        require(metric in evaluation, f"{folder}: its evaluation has no {metric}")
        name = f"{metric} {threshold['bound']} {threshold['value']}"
        value, met = evaluation[metric], meets(threshold, evaluation) and not wrong
        points = most * met
        tests.append({"name": name, "score": points, "max_score": most,
                      "status": "passed" if met else "failed",
                      "output": "\n".join(wrong) or f"it is {value:.3f}"})
        if not wrong:
            verdict = "met" if met else "NOT MET"
            print(f"  {name:<24}{value:>8.3f}   {verdict:<9}{points} of {most}")
    score = sum(test["score"] for test in tests)
    print(f"  {score} of {sum(test['max_score'] for test in tests)} points")
    return {"score": score, "tests": tests}


def calibrate(folders, path, rubric):
    """Set each threshold of the rubric from its metric's mean and std over these runs."""
    require(len(folders) >= 3, f"--calibrate: {len(folders)} runs say nothing about the spread; "
                               "give five seeds")
    found = []
    for folder in folders:
        settings, samples, evaluation = read_run(folder)
        wrong = not_comparable(rubric, settings, samples)
        require(not wrong, f"{folder}: cannot be used, {'; '.join(wrong)}")
        missing = {threshold["metric"] for threshold in rubric["thresholds"]} - evaluation.keys()
        require(not missing, f"{folder}: its evaluation has no {', '.join(sorted(missing))}")
        found.append(evaluation)
    for threshold in rubric["thresholds"]:
        values = [round(evaluation[threshold["metric"]], 4) for evaluation in found]
        mean, std = statistics.mean(values), statistics.stdev(values)
        sign = -1 if threshold["bound"] == "at least" else 1
        value = round(mean + sign * MARGIN * std, 2)
        threshold |= {"value": value, "mean": round(mean, 3), "std": round(std, 3), "runs": values}
        print(f"{threshold['metric']} {threshold['bound']} {value}: {mean:.3f} +- {std:.3f}")
    Path(path).write_text(json.dumps(rubric, indent=1) + "\n")


def main(args):
    rubric = read_rubric(args.rubric)
    require(args.runs, "name at least one run folder")
    folder = Path(args.json or ".").absolute().parent
    require(folder.is_dir(), f"--json {args.json}: there is no folder {folder}")
    if args.calibrate:
        calibrate(args.runs, args.rubric, rubric)
        return
    require(not args.json or len(args.runs) == 1,
            f"--json {args.json}: holds one grade; give one run folder")
    require(all("value" in item for item in rubric["thresholds"]),
            f"--rubric {args.rubric}: has thresholds without a value; set them with --calibrate")
    grades = [grade(folder, rubric) for folder in args.runs]
    if args.json:
        Path(args.json).write_text(json.dumps(grades[0], indent=1) + "\n")
    sys.exit(any(test["status"] == "failed" for found in grades for test in found["tests"]))


if __name__ == "__main__":
    main(tyro.cli(Args))
