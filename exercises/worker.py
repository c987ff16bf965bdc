"""Calls a student's functions, in a process of its own: one that hangs or exits harms no other.

check.py starts it as `python -m exercises.worker FILE`. It reads ("outcomes", name, list of
arguments) or ("advantages", name, arguments of all rollouts) from standard input, and writes what
`call` or `advantages` returns to standard output, as pickles. It is no sandbox: the functions can
do whatever the user can.
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
    """Import the file at `path`. Returns the module, or one line that says why it cannot be."""
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit too
        return one_line(error, path)
    return module


def one_line(error, path):
    """An exception's type and message, with the last line of the file that it went through."""
    if isinstance(error, SyntaxError):
        message, line = error.msg, error.lineno
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(path)]
        message, line = str(error), lines[-1] if lines else None
    message = " ".join(message.split())[:200]
    where = f" (line {line})" if line else ""
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"


def copied(value):
    """A copy that the student's function may spoil."""
    if torch.is_tensor(value):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return list(value) if isinstance(value, list) else value


def plain(value):
    """What can be sent back: a tensor on the CPU, also for a number, or a few words."""
    if torch.is_tensor(value):
        is_here = value.device.type == "cpu"
        return value.detach() if is_here else f"a tensor on device {value.device}"
    if isinstance(value, (bool, int, float)):  # numpy's float64 is a float
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if value is None:
        return "None"
    module, name = type(value).__module__, type(value).__name__
    return f"a {name}" if module == "builtins" else f"a {module}.{name}"


def call(function, arguments, path=""):
    """Call a function once. Returns its outcome: a dict.

    error: one line, or None. outputs: list of tensors or words. gradients: of the first output with
    respect to the arguments that require one, None where it does not depend on one; [] if it
    carries none. grads: whether each output carries gradients. changed: names of arguments that
    were changed in place. printed: what it wrote to standard output.
    """
    given, printed = [copied(value) for value in arguments], io.StringIO()
    outcome = dict(error=None, outputs=[], gradients=[], grads=[], changed=[])
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(action="ignore"):
            returned = function(*given)
        outputs = list(returned) if isinstance(returned, tuple) else [returned]
        outcome["grads"] = [torch.is_tensor(output) and output.requires_grad for output in outputs]
        outcome["gradients"] = gradients(outputs, given)
        outcome["outputs"] = [plain(output) for output in outputs]
        names = inspect.signature(function).parameters
        outcome["changed"] = [name for name, before, after in zip(names, arguments, given)
                              if differs(before, after)]
    except NotImplementedError:
        outcome["error"] = "not done yet"
    except BaseException as error:  # SystemExit too
        outcome["error"] = f"raises {one_line(error, path)}"
    return outcome | {"printed": printed.getvalue()}


def advantages(function, arguments):
    """What a function returns first for each of D rollouts: (D, ...). None if that cannot be had.

    Args: function; arguments (tensors with a first dimension of D, or what is the same for each).
    """
    D = next(len(value) for value in arguments if torch.is_tensor(value))
    columns = [value if torch.is_tensor(value) else [value] * D for value in arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            returned = [function(*map(copied, rollout)) for rollout in zip(*columns)]
            first = [value[0] if isinstance(value, tuple) else value for value in returned]
            return torch.stack(first).detach().cpu()
    except BaseException:  # SystemExit too
        return None


def gradients(outputs, given):
    """Of the first output, if it is a loss, with respect to each argument that requires one.

    0 where the argument is 0, which is masked: the caller drops what flows there.
    """
    leaves = [value for value in given if torch.is_tensor(value) and value.requires_grad]
    loss = outputs[0] if outputs else None
    is_number = torch.is_tensor(loss) and loss.numel() == 1 and loss.device.type == "cpu"
    if not (leaves and is_number and loss.requires_grad):
        return []
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [gradient if gradient is None else gradient.where(leaf != 0, 0)
            for gradient, leaf in zip(found, leaves)]


def differs(before, after):
    if not torch.is_tensor(before):
        return before != after
    return before.shape != after.shape or not before.isclose(after, 0, 0, equal_nan=True).all()


def main(path):
    """Answer requests until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What is printed past sys.stdout must not get between the answers.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)

    def answer(value):
        pickle.dump(value, answers)
        answers.flush()

    answer("torch is imported")
    module = load(path)
    answer(module if isinstance(module, str) else None)
    while request := pickle.load(requests):
        what, name, given = request
        function = getattr(module, name, None)
        if not callable(function):
            answer(None)
        elif what == "advantages":
            answer(advantages(function, given))
        else:
            answer([call(function, arguments, path) for arguments in given])


if __name__ == "__main__":
    main(sys.argv[1])
