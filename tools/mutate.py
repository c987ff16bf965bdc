"""Mutation testing: make plausible mistakes, one at a time, and list those that no test catches.

    python -m tools.mutate rloo.py common.py --most 40
    python -m tools.mutate lab/gradient.py tasks/rouge.py --list

First, all tests run on the unchanged project. They must pass, and this records which lines each
test runs and how long it takes (kept next to --output; measured again when sources or tests have
changed). Then each edit is made in a copy of the project, and the tests that run its line are run
there, fastest first, until one fails. This happens in a child forked from a process that has
imported the heavy libraries but nothing from the project. An interrupted sweep picks up where it
stopped; survivors are tried again when the tests have changed.

A survivor means one of three things: a test is missing; the edit has no visible effect (a clamp
that never acts, a sum over one element); or the line is not needed. If fewer tests ran than there
are, a larger --seconds may find one that notices.

Not edited: texts (f-strings too, with what is computed in them), the defaults of flags, progress
bars, clocks, and how pictures look (sizes, colors, grids; but not what is drawn).
"""

import ast
import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "plumbing", "lab", "tools", "tasks", "exercises", "exercises/mistakes")
FILES = tuple(sorted(str(path.relative_to(ROOT)) for folder in FOLDERS
                     for path in (ROOT / folder).glob("*.py")
                     if path != Path(__file__).resolve()))
LIBRARIES = """torch numpy pyarrow.json datasets.packaged_modules.json.json transformers hypothesis
    matplotlib.pyplot transformers.models.auto.modeling_auto transformers.generation.utils
    transformers.models.gpt2.modeling_gpt2 transformers.models.llama.modeling_llama
    transformers.tokenization_utils_tokenizers torch.utils.tensorboard
    tensorboard.backend.event_processing.event_accumulator""".split()


# ---------------------------------------------------------------------------------------- the edits


table = lambda text: {first: rest for first, *rest in map(str.split, text.split(","))}
OPERATORS = table("""Add Sub, Sub Add, Mult Div, Div Mult, Pow Mult, FloorDiv Mult, Mod FloorDiv,
    BitAnd BitOr, BitOr BitAnd, Lt LtE Gt, LtE Lt GtE, Gt GtE Lt, GtE Gt LtE, Eq NotEq, NotEq Eq,
    Is IsNot, IsNot Is, In NotIn, NotIn In, And Or, Or And""")
METHODS = table("""min max, max min, mean sum, sum mean, argmax argmin, argmin argmax, amax amin,
    amin amax, any all, all any, square abs, std var, zeros_like ones_like, ones_like zeros_like,
    zeros ones, ones zeros, startswith endswith, endswith startswith, partition rpartition,
    rpartition partition""")
REMOVED = """flip cumsum detach exp log clamp abs sqrt sigmoid logsigmoid sign masked_fill squeeze
    unsqueeze flatten float lower strip sorted reversed""".split()
ROLES = [role.split() for role in (  # names that can be mistaken for each other within a function
    "logprobs old_logprobs ref_logprobs",
    "chosen_logprobs rejected_logprobs chosen_ref_logprobs rejected_ref_logprobs",
    "scores rewards advantages returns", "values old_values returns", "policy reference critic",
    "chosen rejected", "optimizer critic_optimizer", "scheduler critic_scheduler", "train test",
    "before after", "rows minibatch", "loss value_loss policy_loss", "grad_norm critic_grad_norm",
    "ours theirs", "found expected", "mean std", "low high", "a b", "x y", "prompts responses",
    "prompt_mask response_mask")]
COLUMNS = ROLES[-2:]  # also attributes of every Batch
LOOKS = """alpha bbox_inches bbox_to_anchor c capsize color dpi facecolor figsize fontsize frameon
    ha indent initial_indent layout linespacing linewidth loc marker markersize ncols s
    subsequent_indent va xytext zorder""".split()  # keywords
CLOCKS = ("perf_counter", "process_time", "monotonic", "elapsed")


def skipped(node, parent):
    """Whether no numbers depend on a node, or tests on a CPU cannot see it."""
    annotation = any(node is getattr(parent, name, None) for name in ("annotation", "returns"))
    default = isinstance(node, ast.ClassDef) and node.name.endswith("Args")  # a flag's is a choice
    message = (called(parent) == "require" and isinstance(parent, ast.Call)
               and node in parent.args[1:])
    told = (isinstance(node, (ast.Expr, ast.Call))
            and ast.unparse(node).startswith(("stop(", "tqdm.write(")))
    printed = called(node) == "print" and all(map(is_text, getattr(node, "value", node).args))
    look = isinstance(node, ast.keyword) and node.arg in ("device", *LOOKS)
    switch = (isinstance(parent, ast.keyword)  # to drop it is enough
              and isinstance(getattr(node, "value", None), bool))
    return (isinstance(node, (ast.Import, ast.ImportFrom, ast.arg)) or is_text(node)
            or annotation or default or message or told or printed or look or switch
            or isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            or node in getattr(parent, "decorator_list", [])
            or called(node) in ("tqdm", "set_postfix", "grid", "margins", "tight_layout")
            or is_timing(node, parent))


def is_timing(node, parent):
    """Whether a node reads a clock, on a line of its own or as the seconds in a dict."""
    simple = isinstance(node, (ast.Assign, ast.AugAssign, ast.BinOp))
    if simple and node.lineno == node.end_lineno:
        if any(word in ast.unparse(node) for word in CLOCKS):
            return True
    pairs = zip(parent.keys, parent.values) if isinstance(parent, ast.Dict) else []
    return any(value is node and getattr(key, "value", None) == "seconds" for key, value in pairs)


def is_text(node):
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and not isinstance(node.value, (bool, int, float)))


def called(node):
    """The name of the function that a call (or a call statement) calls; else None."""
    function = getattr(node.value if isinstance(node, ast.Expr) else node, "func", None)
    return getattr(function, "attr", getattr(function, "id", None))


def visit(node, statement=None, function=None):
    """Yield each node that may be edited, with its statement (or lambda) and function (or None)."""
    for child in ast.iter_child_nodes(node):
        if not skipped(child, node):
            inner = child if isinstance(child, (ast.stmt, ast.Lambda)) else statement
            yield child, inner, function
            around = child if isinstance(child, ast.FunctionDef) else function
            yield from visit(child, inner, around)


def changed(node, **fields):
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def mistakes(node, function):
    """Yield (node to replace, replacement node or text, description)."""
    yield from operator_mistakes(node)
    match node:
        case ast.UnaryOp():
            yield node, node.operand, f"{type(node.op).__name__} dropped"
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value), f"{value} to {not value}"
        case ast.Constant(value=value):
            for other in {0: [value + 1], 1: [value - 1, value + 1]}.get(value,
                                                                         [2 * value, -value]):
                yield node, ast.Constant(other), f"{value} to {other}"
        case ast.Slice():
            for bound, operator, end in (("lower", ast.Add(), 1), ("upper", ast.Sub(), -1)):
                if old := getattr(node, bound):
                    new = ast.BinOp(old, operator, ast.Constant(1))
                    yield old, new, f"{bound} bound {end:+d}"
                elif node.lower or node.upper:
                    yield node, changed(node, **{bound: ast.Constant(end)}), f"{bound} bound {end}"
        case ast.Call():
            yield from call_mistakes(node)
        case ast.Expr(value=ast.Call()) | ast.Break() | ast.Continue():
            yield node, "pass", f"dropped: {ast.unparse(node)}"
        case ast.AugAssign():
            yield node, "pass", f"dropped: {ast.unparse(node)}"
            yield node, ast.Assign([node.target], node.value, lineno=0), "set, not changed"
        case ast.Assign(targets=[target]):  # of an element, or of a name to what is made from it
            made_from_it = names(target) and names(target) <= names(node.value)
            if isinstance(target, ast.Subscript) or made_from_it:
                yield node, "pass", f"dropped: {ast.unparse(node)}"
        case ast.Name(id=name, ctx=ast.Load()) if function:
            for other in dict.fromkeys(role for roles in ROLES if name in roles for role in roles):
                if other in names_before(node, function) - {name}:
                    yield node, ast.Name(other), f"{name} to {other}"
        case ast.Attribute(attr=name, ctx=ast.Load()):
            for other in (role for roles in COLUMNS if name in roles for role in roles):
                if other != name:
                    yield node, changed(node, attr=other), f"{name} to {other}"


def operator_mistakes(node):
    """Yield the mistakes of operators, and of conditions."""
    joins_text = (isinstance(node, ast.BinOp)  # or paths: it would crash
                  and any(map(is_text, (node.left, node.right))))
    operators = getattr(node, "ops", [getattr(node, "op", None)])
    for i, operator in enumerate([] if joins_text else operators):
        for other in OPERATORS.get(type(operator).__name__, []):
            new = {"op": getattr(ast, other)()}
            if hasattr(node, "ops"):
                new = {"ops": [*operators[:i], new["op"], *operators[i + 1 :]]}
            yield node, changed(node, **new), f"{type(operator).__name__} to {other}"
    conditional = isinstance(node, (ast.If, ast.While, ast.IfExp))
    for test in [node.test] if conditional else getattr(node, "ifs", []):
        if not isinstance(test, (ast.UnaryOp, ast.Compare)):  # which are edited anyway
            yield test, ast.UnaryOp(ast.Not(), test), "condition negated"


def call_mistakes(node):
    """Yield the mistakes of a call: another function, none, fewer or swapped arguments."""
    target, name = node.func, called(node)
    method = isinstance(target, ast.Attribute)
    if name in METHODS and (method or name in ("min", "max", "any", "all")):
        (other,) = METHODS[name]
        new = changed(target, attr=other) if method else ast.Name(other)
        yield target, new, f"{name} to {other}"
    if name in REMOVED and (method or name in ("sorted", "reversed")):
        plain = not method or ast.unparse(target.value) in ("torch", "F", "math")  # not x.f()
        yield node, node.args[0] if plain else target.value, f"{name} dropped"
    for keyword in node.keywords:
        if keyword.arg not in (None, "device", *LOOKS):
            rest = [other for other in node.keywords if other is not keyword]
            yield node, changed(node, keywords=rest), f"{keyword.arg} dropped"
    simple = [isinstance(argument, (ast.Name, ast.Attribute)) for argument in node.args[:2]]
    if simple == [True, True] and name not in ("min", "max", "isinstance", "zip"):
        swapped = [*node.args[1::-1], *node.args[2:]]
        yield node, changed(node, args=swapped), "first two arguments swapped"


def names(node):
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def names_before(node, function):
    """A function's arguments, and the names that it has set above a node."""
    before = {child.id for child in ast.walk(function) if isinstance(child, ast.Name)
              and isinstance(child.ctx, ast.Store) and child.lineno < node.lineno}
    return before | {child.arg for child in ast.walk(function) if isinstance(child, ast.arg)}


def edits_of(name, source):
    """Every edit of a file, in order.

    Returns: list of dicts: file, line, description, new (the line), mutant (the file), lines (a
    test that runs any of them sees the edit), key (what changed to what, and in which function).
    """
    data, found, equal = source.encode(), {}, Counter()
    starts = [0, *itertools.accumulate(map(len, data.splitlines(keepends=True)))]
    for node, statement, function in visit(ast.parse(source)):
        for old, new, description in mistakes(node, function):
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            text = source_of(new, old)
            mutant = (data[:start] + text.encode() + data[end:]).decode()
            before = data[starts[old.lineno - 1] : end].decode()
            after = mutant.splitlines()[old.lineno - 1].strip()
            found.setdefault((start, end, text), {
                "file": name, "line": old.lineno, "description": description, "new": after,
                "mutant": mutant, "lines": lines_of(statement),
                "key": digest(name, getattr(function, "name", ""), before, after)})
    for edit in (edits := [found[place] for place in sorted(found)]):
        equal[edit["key"]] += 1
        edit["key"] += f"-{equal[edit['key']]}"  # to tell equal ones apart
    return edits


def source_of(new, old):
    """A replacement as text, in parentheses if it may bind less tightly than what it replaces."""
    text = new if isinstance(new, str) else ast.unparse(new)
    loose = (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.UnaryOp)
    power = isinstance(getattr(old, "op", None), ast.Pow)
    return f"({text})" if isinstance(new, loose) and (type(new) is not type(old) or power) else text


def lines_of(statement):
    """The lines of a statement; only the head of an if or for."""
    body, last = getattr(statement, "body", None), statement.end_lineno
    if isinstance(body, list) and not isinstance(statement, ast.FunctionDef):
        last = max(statement.lineno, body[0].lineno - 1)
    return set(range(statement.lineno, last + 1))


# -------------------------------------------------------------------------------- tests in children


class Watch:
    """A pytest plugin that records failures, and which lines of some files each test runs.

    Args: paths (dict path -> name of a file).
    """

    def __init__(self, paths):
        self.paths, self.tests, self.fixtures, self.failed = paths, {}, {}, []
        self.lines = self.imported = set()  # the latter: outside tests, or by an import
        self.importing = 0  # how many modules at the moment

    def trace(self, frame, event, argument):
        name = self.paths.get(frame.f_code.co_filename)
        if name is None:
            return None
        if frame.f_code.co_name == "<module>":
            self.importing += {"call": 1, "return": -1}.get(event, 0)
        (self.imported if self.importing else self.lines).add((name, frame.f_lineno))
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        """Lines run by a shared fixture count for every test that uses it."""
        outer = self.lines
        if fixturedef.scope != "function":
            self.lines = self.fixtures[fixturedef.argname] = set()
        try:
            return (yield)
        finally:
            self.lines = outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines = set()
        result = yield
        if item.nodeid in self.tests:  # it has passed
            shared = [self.fixtures[name] for name in item.fixturenames if name in self.fixtures]
            self.tests[item.nodeid]["lines"] = by_file(self.lines.union(*shared))
        self.lines = self.imported
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)  # none if a file's import fails
            lines = (crash.message if crash else str(report.longrepr)).strip().split("\n")
            self.failed.append(f"{report.nodeid}: {lines[0 if crash else -1]}")
        elif report.when == "call" and report.passed:
            self.tests[report.nodeid] = {"seconds": report.duration}

    pytest_collectreport = pytest_runtest_logreport


def by_file(lines):
    return {name: sorted(line for other, line in lines if other == name)
            for name in {name for name, _ in lines}}


def import_libraries():
    """Import what is slow to import, so that children can be forked.

    With one thread, nothing computed, and nothing from the project: in a child, pytest.ini puts the
    copy's folders before those of the project.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "MPLBACKEND": "agg"}
    sys.dont_write_bytecode = True
    tqdm.monitor_interval = 0  # no thread either
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()


def run_tests(folder, job):
    """In a child: run pytest in the project's copy.

    Writes folder/result.json: exit code and what Watch recorded.
    """
    import datasets
    import hypothesis

    os.setpgrp()  # of which the processes that tests start are part too
    tqdm._instances.clear()  # the parent's bar would change how bars print here
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder / "project")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("no shrinking", phases=phases)
    hypothesis.settings.load_profile("no shrinking")
    names = {str(path): str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*.py")}
    watch = Watch({path: name for path, name in names.items() if not name.startswith("tests/")})
    if "mutant" not in job:
        threading.settrace(watch.trace)
        sys.settrace(watch.trace)
    flags = ["-q", "-n0", "-p", "no:cacheprovider", "--assert=plain", "--basetemp",
             str(folder / "pytest")]
    code = int(pytest.main([*job["tests"], *job["flags"], *flags], plugins=[watch]))
    sys.settrace(None)
    write(folder / "result.json", {"code": code, "failed": watch.failed, "tests": watch.tests,
                                   "imported": by_file(watch.imported)})
    os._exit(0)


def in_children(jobs, original, workers):
    """Run jobs, each in its own copy of the project.

    Args: jobs (dicts: tests, flags, limit in seconds; for an edit also file and mutant); original
    (folder); workers. Yields (job, what run_tests wrote) as jobs end; None for jobs that took too
    long or crashed.
    """
    context, jobs, running = multiprocessing.get_context("fork"), list(jobs)[::-1], {}
    try:
        while jobs or running:
            while jobs and len(running) < workers:
                job, folder = jobs.pop(), Path(tempfile.mkdtemp(dir=original.parent))
                shutil.copytree(original, folder / "project")
                if "mutant" in job:
                    (folder / "project" / job["file"]).write_text(job["mutant"])
                child = context.Process(target=run_tests, args=(folder, job))
                child.start()
                running[child] = job, folder, time.monotonic() + job["limit"]
            multiprocessing.connection.wait([child.sentinel for child in running], timeout=1)
            for child, (job, folder, end) in list(running.items()):
                if not child.is_alive() or time.monotonic() > end:
                    del running[child]
                    end_group(child)
                    result = folder / "result.json"
                    yield job, json.loads(result.read_text()) if result.exists() else None
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        for child in running:
            end_group(child)


def end_group(child):
    """Kill a child, and what its tests have started and left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(contents))
    path.with_suffix(".part").rename(path)


# ---------------------------------------------------------------------------------------- the sweep


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[str, ...]] = FILES
    """files to edit, by their paths in the project; default: all but tests and this one"""
    list: bool = False
    """print the edits without running anything"""
    most: int = 0
    """edits per file, drawn at random; 0 for all"""
    seed: int = 1
    """random seed for drawing edits"""
    workers: int = 2
    """edits to try in parallel, each on one core"""
    seconds: float = 40.0
    """run the fastest tests for each edit, up to this many seconds in total as measured while
    being traced (about three times their normal time)"""
    timeout: float = 60.0
    """an edit counts as caught if its tests take this many seconds more than twice the recorded
    time"""
    tests: tuple[str, ...] = ("tests/test_*.py",)
    """test files; patterns work"""
    ignore: tuple[str, ...] = ("tests/test_processes.py",)
    """test files to leave out: it starts processes, which cannot be traced"""
    deselect: tuple[str, ...] = ("test_scripts_share_their_skeleton_line_by_line",
                                 "test_every_flag_is_read_and_explained",
                                 "test_the_six_steps_stand_in_the_same_order")
    """tests to leave out: they compare the scripts' text, but a mistake should be caught by what
    it does"""
    output: str = "runs/mutate.json"
    """JSON file for the results; the lines each test runs go to the same name with -lines"""


def digest(*texts):
    return hashlib.sha1("\n".join(texts).encode()).hexdigest()


def record(args, original):
    """Run the tests on the unchanged project, unless already recorded; stop if any fails.

    Returns: dict test file -> tests (id -> seconds, lines), imported (lines), key (a hash of what
    it depends on).
    """
    path = Path(args.output).with_name(Path(args.output).stem + "-lines.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    files = {str(file.relative_to(original)): file
             for pattern in args.tests for file in sorted(original.glob(pattern))}
    sources = [file.read_text() for file in sorted(original.rglob("*.py"))
               if not file.name.startswith("test_") and file.name != Path(__file__).name]
    keys = {name: digest(*sources, *args.deselect, file.read_text())
            for name, file in files.items() if name not in args.ignore}
    flags = ["-k", f"not ({' or '.join(args.deselect)})"] if args.deselect else []
    jobs = [{"tests": [name], "flags": flags, "limit": 1800} for name, key in keys.items()
            if known.get(name, {}).get("key") != key]
    failed, done = [], in_children(jobs, original, args.workers)
    for job, result in tqdm(done, "unchanged", len(jobs), unit="file"):
        (name,) = job["tests"]
        if not result or result["code"] not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            said = result["failed"] if result else []
            failed += said or [f"{name}: no result"]
        else:
            known[name] = {"key": keys[name], "tests": result["tests"],
                           "imported": result["imported"]}
            write(path, known)
    if failed:
        sys.exit("error: tests fail on the unchanged project:\n" + "\n".join(failed[:20]))
    return {name: known[name] for name in keys}


def tests_for(edit, recorded, most_seconds):
    """The fastest tests that run an edit's lines, how many there are, and how long these take.

    If none is seen to run them (they run when the file is imported, in another process, or never):
    tests that use the file, then others that stand beside its import.
    """
    every = [(values["seconds"], test, values["lines"].get(edit["file"], []))
             for file in recorded.values() if edit["file"] in file["imported"]
             for test, values in file["tests"].items()]
    seen = [(False, seconds, test) for seconds, test, lines in every
            if not edit["lines"].isdisjoint(lines)]
    tests = sorted(seen or [(not lines, seconds, test) for seconds, test, lines in every])
    tests = [(seconds, test) for _, seconds, test in tests]
    totals = list(itertools.accumulate(seconds for seconds, _ in tests))
    count = max(min(1, len(tests)), sum(total <= most_seconds for total in totals))
    # Among tests of similar duration, those of one file stay together: fixtures are made once.
    chosen = sorted(tests[:count], key=lambda pair: (math.frexp(pair[0])[1], pair[1]))
    return [test for _, test in chosen], len(tests), sum(totals[count - 1 : count])


def drawn_edits(args, original):
    """The edits to try, after printing how many there are in each file."""
    edits = []
    for name in args.files:
        found = edits_of(name, (original / name).read_text())
        place = lambda edit: digest(str(args.seed), edit["key"])  # barely depends on other edits
        order = sorted(map(place, found))[: args.most or None]
        drawn = [edit for edit in found if place(edit) in order]
        edits += drawn
        some = f", {len(drawn)} of them drawn" if len(drawn) < len(found) else ""
        print(f"{name:<24} {len(found):>4} edits{some}")
    return edits


def show(edit, note=""):
    print(f"\n{edit['file']}:{edit['line']}  {edit['description']}{note}\n    {edit['new']}")


def try_edits(edits, args, original):
    """Try the edits that have not been tried before. Returns: the result of each."""
    recorded, output, jobs, results = record(args, original), Path(args.output), [], {}
    if output.exists():
        results = {result["key"]: result for result in json.loads(output.read_text())}
    for edit in edits:
        tests, every, seconds = tests_for(edit, recorded, args.seconds)
        known = results.get(edit["key"], {"verdict": None})
        keys = [recorded[test.split("::")[0]]["key"] for test in tests]
        result = {name: edit[name] for name in ("key", "file", "line", "description", "new")}
        result |= {"ran": f"{len(tests)} of {every} tests", "tests": digest(*tests, *keys)}
        survived = known["verdict"] == "survived" and known["tests"] == result["tests"]
        if known["verdict"] == "caught" or survived:
            results[edit["key"]] = known | {"line": edit["line"]}
        elif tests:
            jobs.append(edit | {"tests": tests, "flags": ["-x"], "result": result,
                                "limit": 2 * seconds + args.timeout})
        else:
            results[edit["key"]] = result | {"verdict": "survived", "by": ""}
    running = in_children(jobs, original, args.workers)
    for job, done in tqdm(running, "edits", len(jobs), unit="edit"):
        done = done or {"code": 1, "failed": ["took too long, or crashed"]}
        failed = done["failed"] or [f"pytest ended with exit code {done['code']}"]
        by = failed[0] if done["code"] else ""
        results[job["key"]] = job["result"] | {"verdict": "caught" if by else "survived", "by": by}
        write(output, list(results.values()))
    return [results[edit["key"]] for edit in edits]


def sweep(args, original):
    """List the edits, or try them and print the survivors."""
    edits = drawn_edits(args, original)
    if args.list:
        for edit in edits:
            show(edit)
        return
    import_libraries()
    results = try_edits(edits, args, original)
    print(f"\n{'file':<24} edits caught  share")
    for name in (*args.files, "all"):
        caught = [result["verdict"] == "caught" for result in results
                  if name in (result["file"], "all")]
        share = sum(caught) / max(1, len(caught))
        print(f"{name:<24} {len(caught):>5} {sum(caught):>6} {share:>6.0%}")
    for result in results:
        if result["verdict"] == "survived":
            show(result, f" ({result['ran']})")


def main(args):
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        original = Path(folder).resolve() / "original"
        left_out = shutil.ignore_patterns(".git", ".[!g]*", "runs", "__pycache__")
        shutil.copytree(ROOT, original, ignore=left_out)
        sweep(args, original)


if __name__ == "__main__":
    main(tyro.cli(Args))
