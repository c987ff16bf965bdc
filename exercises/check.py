"""Check exercises/estimators.py, function by function: is it right, or which mistake is it?

    python -m exercises.check                                      # every function
    python -m exercises.check rloo_advantages                      # one of them
    python -m exercises.check --file my.py
    python -m exercises.check --answers exercises/answers.json     # the questions
    python -m exercises.check --file my.py --answers my.json --json results.json  # for Gradescope

Your functions are called with made-up inputs, and what they return is compared with what the
scripts' own functions return. Where it differs, it is compared with what known mistakes return
(exercises/mistakes/). Nothing is trained. The exit code is 0 if all is right.
"""

import ast
import contextlib
import inspect
import itertools
import json
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from exercises import questions, worker
from exercises.mistakes import MISTAKES
from exercises.solutions import OUTPUTS, cases, expectation, right, rollouts
from exercises.world import World, cosine_and_projection
from plumbing import one_line, require

ROOT = Path(__file__).resolve().parent.parent
SHEET = ROOT / "exercises/estimators.py"
NAMES = list(vars(right))
POINTS = {"function": 0.5, "question": 1.0}  # a function can be pasted
QUOTES = '"' * 3
NOT_DONE = "not done yet"  # of worker.call and questions.judge


@dataclass
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """functions or questions to check; default: all"""
    file: str | None = None
    """file with your functions; default: exercises/estimators.py, or none if there are --answers"""
    answers: str | None = None
    """JSON file with your answers to the questions"""
    json: str | None = None
    """file to write the results to, as Gradescope reads them"""
    seed: int = 1
    """of the inputs and of the questions' world"""
    seconds: float = 3.0
    """time limit for each function"""


# -------------------------------------------------------------------------------- calling functions


class Student:
    """A process with the student's file, started again when a function has hung or ended it."""

    def __init__(self, path, seconds):
        self.path, self.seconds = path, seconds
        self.start()

    def start(self):
        """Returns nothing; self.error is one line if the file cannot be loaded, else None."""
        command = [sys.executable, "-m", "exercises.worker", str(Path(self.path).resolve())]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        self.receive(60)  # torch is imported
        wrong, late = self.receive(self.seconds)
        why = wrong or late
        self.error = f"{self.path} cannot be loaded: {why}" if why else None

    def receive(self, seconds):
        """The next answer, and None; or None, and why there is none."""
        killer, begin = threading.Timer(seconds, self.process.kill), time.monotonic()
        killer.start()
        try:
            return pickle.load(self.process.stdout), None
        except (EOFError, pickle.UnpicklingError):
            late = time.monotonic() - begin >= seconds
            return None, f"no answer within {seconds:g} s" if late else "it ended the process"
        finally:
            killer.cancel()

    def ask(self, what, name, arguments):
        """What the worker answers, and None; or None, and why there is no answer."""
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((what, name, arguments), self.process.stdin)
            self.process.stdin.flush()
        answer, why = self.receive(self.seconds)
        if why:
            self.stop()
            self.start()
        return answer, why

    def call(self, name, arguments):
        """Outcomes of worker.call, one for each case; or one line that says why there are none."""
        outcomes, why = self.ask("outcomes", name, arguments)
        return why or outcomes or f"there is no function {name} in {self.path}"

    def measure(self, name, rollout_arguments):
        """What worker.advantages returns; None also where that takes too long."""
        return self.ask("advantages", name, rollout_arguments)[0]

    def stop(self):
        self.process.kill()
        self.process.communicate()


# ------------------------------------------------------------------------------------------ judging


def equal(a, b):
    """Whether two outputs or gradients are the same: numbers to 1e-5, in float32 or float64."""
    if not (torch.is_tensor(a) and torch.is_tensor(b)):
        return a is None and b is None
    alike = kind(a) == kind(b) or not a.ndim
    return alike and a.shape == b.shape and bool(close(a, b).all())


def close(a, b):
    """Where two tensors have the same numbers."""
    return torch.isclose(a.double(), b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)


def kind(tensor):
    """float, int, bool; float16 and bfloat16 are their own kinds: half the digits would be lost."""
    if tensor.dtype in (torch.float32, torch.float64):
        return "float"
    if tensor.dtype in (torch.int32, torch.int64):
        return "int"
    return str(tensor.dtype).removeprefix("torch.")


def parts(outcome):
    """What is compared: dict (what, number) -> output, gradient, or whether there are gradients."""
    return {(what, i): value for what in ("outputs", "gradients", "grads")
            for i, value in enumerate(outcome[what])}


def differences(outcome, other):
    """The keys of the parts in which two outcomes differ."""
    a, b = parts(outcome), parts(other)
    same = lambda key: a[key] == b[key] if key[0] == "grads" else equal(a[key], b[key])
    return {key for key in a.keys() | b.keys() if not (key in a and key in b and same(key))}


def judge(name, arguments, outcomes):
    """What is wrong with a function's outcomes: a sentence and words of the docstring.

    None if it is right.
    """
    for i, (given, outcome) in enumerate(zip(arguments, outcomes)):
        if outcome["error"] == NOT_DONE:
            return NOT_DONE, ""
        if outcome["error"]:
            return outcome["error"] + settings(name, given), ""
        if outcome["changed"]:
            changed = ", ".join(outcome["changed"])
            return f"it changes its argument {changed} in place: copy first", ""
        wanted = worker.call(getattr(right, name), given)
        if wrong := differences(outcome, wanted):
            known = known_mistake(name, arguments, outcomes, i, wrong)
            return known or (first_difference(name, given, outcome, wanted), "")


def known_mistake(name, arguments, outcomes, i, wrong):
    """The mistake that returns the same in all parts that are wrong in case i, or None.

    If there are several: the most alike.
    """
    found = []
    for mistake in MISTAKES:
        if mistake.name == name:
            differing = [differences(outcome, worker.call(mistake.function, given))
                         for given, outcome in zip(arguments, outcomes)]
            if not differing[i] & wrong:
                found.append((sum(map(len, differing)), mistake.sentence, mistake.words))
    return min(found)[1:] if found else None


def first_difference(name, given, outcome, wanted):
    """One line about an outcome that is no known mistake."""
    labels = OUTPUTS.get(name, ("the result",))
    if len(outcome["outputs"]) != len(labels):
        return (f"it returns {len(outcome['outputs'])} value(s), should return {len(labels)}: "
                f"{', '.join(labels)}")
    for label, ours, theirs in zip(labels, wanted["outputs"], outcome["outputs"]):
        if not torch.is_tensor(theirs):
            return (f"{label} is {theirs}, should be a tensor of shape {tuple(ours.shape)} on "
                    f"{ours.device}")
        if ours.shape != theirs.shape:
            return f"{label} has shape {tuple(theirs.shape)}, should have {tuple(ours.shape)}"
        if ours.ndim and kind(ours) != kind(theirs):
            return f"{label} has dtype {theirs.dtype}, should have {ours.dtype}"
        if not equal(ours, theirs):
            return label + first_number(theirs, ours) + settings(name, given)
    leaves = [argument for argument, value in zip(parameters(name), given)
              if torch.is_tensor(value) and value.requires_grad]
    for leaf, ours, theirs in zip(leaves, wanted["gradients"], outcome["gradients"]):
        if not equal(ours, theirs):
            what = " is missing" if theirs is None else first_number(theirs, ours)
            return f"the value is right, but its gradient with respect to {leaf}{what}"
    return ("the values are right, but something carries gradients that should not, or the other "
            "way round")


def first_number(theirs, ours):
    """Index and values of the first number that differs."""
    index = (~close(theirs, ours)).nonzero()[0].tolist()
    found, wanted = theirs[tuple(index)].item(), ours[tuple(index)].item()
    return f"{index or ''} is {found:.6g}, should be {wanted:.6g}"


def parameters(name):
    return list(inspect.signature(getattr(right, name)).parameters)


def settings(name, given):
    """The arguments of a case that are no tensors, such as " (k = 4)"."""
    plain = [f"{key} = {value}" for key, value in zip(parameters(name), given)
             if not torch.is_tensor(value)]
    return f" ({', '.join(plain)})" if plain else ""


def bias(name, advantages, ok, seed):
    """A line about the expected gradient in the questions' world, or "" if it would tell nothing.

    Args: name; advantages (of worker.advantages); ok (whether the function is right); seed.
    """
    world = World(seed)
    rows, arguments = rollouts(world)[name]
    wanted = worker.advantages(getattr(right, name), arguments)
    if advantages is None or advantages.shape != wanted.shape or not advantages.isfinite().all():
        return ""
    true = world.gradient(world.scores)
    (mean, variance), (right_mean, least) = (expectation(each, rows, world)
                                             for each in (advantages, wanted))
    if not ok and equal(mean, right_mean) and equal(variance, least):
        return ""
    what = "expected gradient in the questions' world: "
    if (mean - true).norm() > 1e-5 * true.norm():
        cosine, projection = cosine_and_projection(mean, true)
        return (f"{what}cosine to the true gradient {cosine:.3f}, length along it "
                f"{projection:.3f}")
    return f"{what}the true gradient" + (
        "" if ok else f", but with {variance / least:.2f} times the variance")


def docstring_line(name, words, path):
    """The line of a function's docstring with these words, and its number; "" if there is none."""
    source = Path(path).read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name and ast.get_docstring(node):
            first, last = node.body[0].lineno, node.body[0].end_lineno
            for number, line in enumerate(source.splitlines()[first - 1 : last], first):
                if words in line:
                    return f"docstring, line {number}: {line.strip().removeprefix(QUOTES)}"
    return ""


def check_functions(student, names, seed):
    """Yield (name, whether it is right, lines of text) for each function of a Student."""
    all_cases, all_rollouts = cases(seed), rollouts(World(seed))
    for name in names:
        outcomes, advantages = student.call(name, all_cases[name]), None
        if name in all_rollouts and not isinstance(outcomes, str):
            advantages = student.measure(name, all_rollouts[name][1])
        yield name, *report(name, all_cases[name], outcomes, advantages, student.path, seed)


def report(name, arguments, outcomes, advantages, path, seed):
    """Whether a function is right, and lines of text about it.

    Args: name; arguments (of its cases); outcomes (of worker.call, or one line); advantages (of
    worker.advantages, or None); path; seed.
    """
    if isinstance(outcomes, str):
        return False, [outcomes]
    found = judge(name, arguments, outcomes)
    lines = [found[0]] if found else []
    if found and found[0] != NOT_DONE:
        lines.append(docstring_line(name, found[1], path) or docstring_line(name, found[1], SHEET))
    if advantages is not None:
        lines.append(bias(name, advantages, not found, seed))
    printed = "".join(outcome["printed"] for outcome in outcomes).strip()
    if printed:
        lines.append(f"it prints: {printed.splitlines()[0][:80]}")
    return not found, [line for line in lines if line]


# ------------------------------------------------------------------------------------------- output


def read_answers(path):
    """dict question -> number or list of numbers."""
    try:
        answers = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        answers = one_line(error)
    require(isinstance(answers, dict),
            f"--answers {path}: not a JSON object with your answers ({answers}); start from "
            "exercises/answers.json")
    return answers


def check_answers(answers, names, seed):
    """Yield (name, whether it is right, lines of text) for each question."""
    world = World(seed)
    for name in names:
        wrong = questions.judge(name, answers.get(name), world)
        yield name, wrong is None, [wrong] if wrong else []


def print_verdict(name, ok, lines):
    if lines == [NOT_DONE]:
        print(f"{name:20} {NOT_DONE}", flush=True)
        return
    print(f"{name:20} {'right' if ok else 'WRONG'}")
    for line in lines:
        print(" " * 8, line, flush=True)


def result(name, ok, lines):
    """A verdict as Gradescope reads it: a dict."""
    points = POINTS["function" if name in NAMES else "question"]
    return {"name": name, "score": points * ok, "max_score": points, "output": "\n".join(lines),
            "status": "passed" if ok else "failed"}


def main(args):
    path = args.file or (None if args.answers else str(SHEET))
    functions = NAMES if path else []
    asked = [question.__name__ for question in questions.QUESTIONS] if args.answers else []
    for name in args.names:
        require(name in functions + asked,
                f"{name}: no such exercise; there are {', '.join(functions + asked)}")
    require(path is None or Path(path).is_file(), f"--file {path}: no such file")
    require(args.json is None or Path(args.json).absolute().parent.is_dir(),
            f"--json {args.json}: no such folder")
    answers = read_answers(args.answers) if args.answers else {}
    functions, asked = ([name for name in names if name in (args.names or names)]
                        for names in (functions, asked))
    student = Student(path, args.seconds) if functions else None
    results = []
    if student and student.error:
        print(student.error)
        results = [result(name, False, [student.error]) for name in functions]
        functions = []
    for name, ok, lines in itertools.chain(check_functions(student, functions, args.seed),
                                           check_answers(answers, asked, args.seed)):
        print_verdict(name, ok, lines)
        results.append(result(name, ok, lines))
    if student:
        student.stop()
    right_ones = sum(found["status"] == "passed" for found in results)
    print(f"{right_ones} of {len(results)} right")
    if args.json:
        score = sum(found["score"] for found in results)
        Path(args.json).write_text(json.dumps({"score": score, "tests": results}, indent=1) + "\n")
    return right_ones == len(results)


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Args)))
