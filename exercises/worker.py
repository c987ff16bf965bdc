"""Calls a student's functions, in a process of its own that check.py starts: one that hangs or exits harms no other.

It reads (name, list of arguments) from standard input and writes the outcomes to standard output, as pickles. It is no
sandbox: the functions can do whatever the user can.
"""

import contextlib
import importlib.util
import inspect
import io
import os
import pickle
import sys
import traceback
import warnings

import torch


def load(path):
    """Import the file at `path`. Returns the module, or one line that says why not."""
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit too
        return f"{path} cannot be loaded: {one_line(error, path)}"
    return module


def one_line(error, path):
    """An exception's type and message in one line, with the last line of the file at `path` that it went through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:200]
    return f"{type(error).__name__}{': ' if message else ''}{message}" + (f" (line {line})" if line else "")


def copied(value):
    """A copy that the student's function may spoil."""
    if torch.is_tensor(value):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return list(value) if isinstance(value, list) else value


def plain(value):
    """What can be sent back: a tensor on the CPU (a number becomes one of shape ()), else a few words."""
    if torch.is_tensor(value):
        return value.detach() if value.device.type == "cpu" else f"a tensor on device {value.device}"
    if isinstance(value, (bool, int, float)):  # numpy's float64 is a float
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if value is None:
        return "None"
    kind = type(value)
    return f"a {kind.__name__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__name__}"


def call(function, arguments, path=""):
    """Call a function once. Returns its outcome: a dict.

    error: one line, or None. outputs: list of tensors or words. gradients: of the first output with respect to the
    arguments that require one, None where it does not depend on one; [] if it carries none. grads: whether each output
    carries gradients. changed: names of arguments that were changed in place. printed: what it wrote to standard output.
    """
    given, printed = [copied(value) for value in arguments], io.StringIO()
    outcome = dict(error=None, outputs=[], gradients=[], grads=[], changed=[])
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(action="ignore"):
            returned = function(*given)
        outputs = list(returned) if isinstance(returned, tuple) else [returned]
        outcome["grads"] = [torch.is_tensor(output) and output.requires_grad for output in outputs]
        leaves = [value for value in given if torch.is_tensor(value) and value.requires_grad]
        if leaves and outcome["grads"][:1] == [True] and outputs[0].numel() == 1 and outputs[0].device.type == "cpu":
            outcome["gradients"] = list(torch.autograd.grad(outputs[0].sum(), leaves, allow_unused=True))
        outcome["outputs"] = [plain(output) for output in outputs]
        names = inspect.signature(function).parameters
        outcome["changed"] = [name for name, before, after in zip(names, arguments, given) if differs(before, after)]
    except NotImplementedError:
        outcome["error"] = "not done yet"
    except BaseException as error:  # SystemExit too
        outcome["error"] = f"raises {one_line(error, path)}"
    return outcome | {"printed": printed.getvalue()}


def differs(before, after):
    return not torch.equal(before, after) if torch.is_tensor(before) else before != after


def main(path):
    """Answer requests until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is printed past sys.stdout must not get between the answers
    torch.set_num_threads(1)

    def answer(value):
        pickle.dump(value, answers)
        answers.flush()

    answer("torch is imported")
    module = load(path)
    answer(module if isinstance(module, str) else None)
    while request := pickle.load(requests):
        name, cases = request
        function = getattr(module, name, None)
        answer([call(function, arguments, path) for arguments in cases] if callable(function) else None)


if __name__ == "__main__":
    main(sys.argv[1])
