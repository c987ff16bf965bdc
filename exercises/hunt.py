"""Bug hunt: twelve copies of the scripts, each with a planted bug. Find it, explain it, mend it.

    python -m exercises.hunt                                # the twelve symptoms
    python -m exercises.hunt 1                              # write the copy with bug 1
    python -m exercises.hunt 1 --check reinforce_bug1.py    # is it mended, and all else whole?

A copy stands beside its script and runs as that does, with all of its flags. Each symptom comes
with commands that show it. A `diff` with the script shows about a dozen places that are written
differently: one is the bug, the others compute the same up to rounding. Which way a place is
written, the bug's among them, depends on --seed, so that no two students have to have the same
copies. All copies import the same names, many of which they do not use.

--check first asks whether the file is still your copy: at least half of the lines that are written
differently to no effect have to be there, so the script itself does not pass. Then it runs the
file's own `main` in a tiny world, with several settings of its flags, and compares every gradient
and everything that is logged with what the script makes of the same sampled responses (see
hunt_check.py). The exit code is 0 if it is mended.

To plant bugs of your own, give a JSON file as --bugs:

    {"places": [["old text", "new text"], ...],   written differently to no effect, in every script
                                                  that has the old text exactly once
     "bugs": [{"script": "rloo.py", "symptom": "...", "commands": ["python {copy}"],
               "bug": [["old text", "new text"], ...],     each old text occurs exactly once
               "silenced": [[["old text", "new text"], ...], ...]}]}    for the tests

Within a text, «one¦other» stands for one of its parts, by --seed, and for the same one wherever it
occurs in a copy. Edits that are "silenced" hide the symptom, and must not pass.

bugs.txt holds the twelve bugs, compressed so that nobody reads them by accident. To edit one,
unpack it with `base64 -d bugs.txt | gunzip > bugs.json`, and pack it again with `gzip -c bugs.json
| base64 > bugs.txt`.
"""

import ast
import base64
import contextlib
import functools
import gzip
import io
import json
import random
import re
import sys
import tempfile
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lab.family import FAMILY

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"script", "symptom", "commands", "bug", "silenced"}  # of a bug
SECONDS = 60  # a check takes a few; a copy that takes longer has an endless loop


@dataclass
class Args:
    number: Annotated[int | None, tyro.conf.Positional] = None
    """number of the bug; without it, all symptoms are listed"""
    check: str | None = None
    """file in which you have mended it"""
    seed: int = 1
    """which copies, for example your student number; a check needs that of its copy"""
    bugs: str = str(Path(__file__).with_name("bugs.txt"))
    """JSON file of bugs, plain or compressed"""


def require(ok, message):
    """Exit with `message` unless `ok`. (plumbing.require takes seconds to import.)"""
    if not ok:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


# ----------------------------------------------------------------------------------------- the bugs


def load_bugs(path):
    """The bugs in a JSON file, plain or compressed, and the places that are written differently."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        is_plain = text.lstrip().startswith("{")
        found = json.loads(text if is_plain else gzip.decompress(base64.b64decode(text)))
    except (OSError, EOFError, ValueError) as error:
        require(False, f"--bugs {path}: cannot be read as JSON ({error})")
    require(found.keys() == {"places", "bugs"}, f"--bugs {path}: needs places and bugs")
    require(all(bug.keys() == PARTS for bug in found["bugs"]),
            f"--bugs {path}: each bug needs {', '.join(sorted(PARTS))}")
    return found["bugs"], found["places"]


def choose(text, key):
    """Put one of its parts for each «one¦other» in a text, inner ones first, chosen by the key."""
    while group := re.search("«([^«»]*)»", text):
        part = random.Random(f"{key} {group[1]}").choice(group[1].split("¦"))
        text = text.replace(group[0], part)
    return text


def edit(text, changes, what, key=""):
    """Replace each old text by its new one."""
    for old, new in changes:
        old, new = choose(old, key), choose(new, key)
        found = text.count(old)
        require(found == 1, f"{what}: {old.strip()[:60]!r} occurs {found} times; it must occur "
                            "exactly once")
        text = text.replace(old, new)
    return text


@functools.cache
def all_imports():
    """The import of all that scripts may need: dict package -> text."""
    common = (ROOT / "common.py").read_text()
    scripts = [common, *((ROOT / f"{name}.py").read_text() for name in FAMILY)]
    lists = re.findall(r"from plumbing import \((.*?)\)", "\n".join(scripts), re.DOTALL)
    names = {"common": re.findall(r"^(?:def|class) (\w+)", common, re.MULTILINE),
             "plumbing": re.findall(r"\w+", " ".join(lists))}
    starts = {package: f"    from {package} import (" for package in names}
    return {package: textwrap.fill(", ".join(sorted({*names[package]})), 99, initial_indent=start,
                                   subsequent_indent=" " * len(start)) + ")"
            for package, start in starts.items()}


def import_all(text):
    """A script with the imports of all scripts, so that a copy's do not tell what its bug needs."""
    for package, imports in all_imports().items():
        text = re.sub(rf"    from {package} import \(.*?\)", imports, text, flags=re.DOTALL)
    return text


def plant(bug, places, key):
    """The text of a script with its bug, and other places that are written differently."""
    text = edit((ROOT / bug["script"]).read_text(), bug["bug"], bug["script"], key)
    for old, new in places:
        if text.count(old) == 1:
            text = text.replace(old, choose(new, key))
    return import_all(text)


def place(number, bug):
    """The name of the copy with a bug, which stands in the project's folder."""
    return f"{Path(bug['script']).stem}_bug{number}.py"


# ------------------------------------------------------------------------------------------ actions


def tell(number, bug):
    """Print a bug's symptom and the commands that show it."""
    print(f"{number}. {place(number, bug)}\n")
    symptom = textwrap.fill(bug["symptom"], 96)
    print(textwrap.indent(symptom, "    ") + "\n")
    for command in bug["commands"]:
        print("    " + command.format(copy=place(number, bug)))
    print()


def write(number, bug, places, seed):
    """Write the copy with a bug; one that has been edited stays."""
    path, text = ROOT / place(number, bug), plant(bug, places, f"{seed} {number}")
    require(not path.exists() or path.read_text() == text,
            f"{place(number, bug)}: you have edited it, or it is that of another --seed; check it "
            "with --check, or delete it to start again")
    path.write_text(text)


def code(text):
    """The set of lines of a script, whatever its layout and comments."""
    return set(ast.unparse(ast.parse(text)).splitlines())


def left_of(text, bug, places, key):
    """How many of the lines that are written differently to no effect a text has: (left, all)."""
    script = (ROOT / bug["script"]).read_text()
    wrong = edit(script, bug["bug"], bug["script"], key)
    lines = code(plant(bug, places, key)) - code(script) - code(wrong)
    return len(lines & code(text)), len(lines)


def check(path, number, bug, places, seed):
    """Whether a file is mended, and a message, in limited time."""
    require(Path(path).is_file(), f"--check {path}: no such file")
    key = f"{seed} {number}"
    try:
        left, count = left_of(Path(path).read_text(errors="replace"), bug, places, key)
    except SyntaxError as error:
        return False, f"it stops in line {error.lineno}: SyntaxError: {error.msg}"
    if 2 * left < count:
        return False, (f"it is not your copy, or no longer: of {count} lines that --seed {seed} "
                       f"writes differently from {bug['script']} to no effect, {left} are left; "
                       f"give your copy's --seed, and mend {place(number, bug)} without changing "
                       "the rest of it")
    from exercises import hunt_check  # loads torch and transformers, which the rest does not need

    found = [(False, f"it is still running after {SECONDS} seconds; is there a loop that never "
                     "ends?")]
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO())):
        planted = Path(folder) / "planted.py"
        planted.write_text(plant(bug, places, key))
        files = map(str, (path, ROOT / bug["script"], planted))
        work = lambda: found.append(hunt_check.check(*files))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(SECONDS)
    return found[-1]


def main(args):
    bugs, places = load_bugs(args.bugs)
    require(args.number or not args.check,
            f"--check {args.check}: give the number of the bug as well")
    require(args.number is None or 1 <= args.number <= len(bugs),
            f"{args.number}: there are bugs 1 to {len(bugs)}")
    if args.number is None:
        for number, bug in enumerate(bugs, 1):
            tell(number, bug)
        return
    bug = bugs[args.number - 1]
    if args.check:
        mended, message = check(args.check, args.number, bug, places, args.seed)
        print(f"{args.check}: {message}")
        sys.exit(not mended)
    write(args.number, bug, places, args.seed)
    tell(args.number, bug)
    seed = "" if args.seed == Args.seed else f" --seed {args.seed}"
    print(f"    python -m exercises.hunt {args.number}{seed} --check {place(args.number, bug)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
