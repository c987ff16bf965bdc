"""Bug hunt: ten copies of the scripts, each with one planted bug. Find it, explain it, mend it.

    python -m exercises.hunt                                # the ten symptoms
    python -m exercises.hunt 1                              # write the copy with bug 1
    python -m exercises.hunt 1 --check reinforce_bug1.py    # is it mended, and all else whole?

A copy stands beside its script and runs as that does, with all of its flags. Each symptom comes
with commands that show it. A `diff` with the script shows several places that are written
differently: one is the bug, the others compute the same.

--check runs the file's own `main` in a tiny world, with several settings of its flags, and compares
every gradient and everything that is logged with what the script makes of the same sampled
responses (see hunt_check.py). The exit code is 0 if it is mended.

To plant bugs of your own, give a JSON file as --bugs: a list with an entry for each bug,

    {"script": "rloo.py", "symptom": "...", "commands": ["python {copy} --num-updates 20"],
     "bug": [["old text", "new text"], ...],     each old text occurs exactly once in the script
     "same": [["old text", "new text"], ...],    other places, written differently to no effect
     "silenced": [[["old text", "new text"], ...], ...]}    for the tests

Edits of the copy that are "silenced" hide the symptom, and must not pass.

bugs.txt holds the ten bugs, compressed so that nobody reads them by accident. To edit one, unpack
it with `base64 -d bugs.txt | gunzip > bugs.json`, and pack it again with `gzip -c bugs.json |
base64 > bugs.txt`.
"""

import base64
import contextlib
import gzip
import io
import json
import sys
import tempfile
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"script", "symptom", "commands", "bug", "same", "silenced"}  # of a bug
SECONDS = 60  # a check takes a few; a copy that takes longer has an endless loop


@dataclass
class Args:
    number: Annotated[int | None, tyro.conf.Positional] = None
    """number of the bug; without it, all symptoms are listed"""
    check: str | None = None
    """file in which you have mended it"""
    bugs: str = str(Path(__file__).with_name("bugs.txt"))
    """JSON file of bugs, plain or compressed"""


def require(ok, message):
    """Exit with `message` unless `ok`. (plumbing.require takes seconds to import.)"""
    if not ok:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


# ----------------------------------------------------------------------------------------- the bugs


def load_bugs(path):
    """The list of bugs in a JSON file, plain or compressed."""
    try:
        text = Path(path).read_text()
        is_plain = text.lstrip().startswith("[")
        bugs = json.loads(text if is_plain else gzip.decompress(base64.b64decode(text)))
    except (OSError, EOFError, ValueError) as error:
        require(False, f"--bugs {path}: cannot be read as JSON ({error})")
    require(all(bug.keys() == PARTS for bug in bugs),
            f"--bugs {path}: each bug needs {', '.join(sorted(PARTS))}")
    return bugs


def edit(text, changes, what):
    """Replace each old text by its new one."""
    for old, new in changes:
        found = text.count(old)
        require(found == 1, f"{what}: {old.strip()[:60]!r} occurs {found} times; it must occur "
                            "exactly once")
        text = text.replace(old, new)
    return text


def plant(bug):
    """The text of a script with its bug, and the other places that are written differently."""
    text = (ROOT / bug["script"]).read_text()
    return edit(text, [*bug["bug"], *bug["same"]], bug["script"])


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


def write(number, bug):
    """Write the copy with a bug; one that has been edited stays."""
    path, text = ROOT / place(number, bug), plant(bug)
    require(not path.exists() or path.read_text() == text,
            f"{place(number, bug)}: you have edited it; check it with --check, or delete it to "
            "start again")
    path.write_text(text)


def check(path, bug):
    """Whether a file is mended, and a message, in limited time."""
    require(Path(path).is_file(), f"--check {path}: no such file")
    from exercises import hunt_check  # loads torch and transformers, which the rest does not need

    found = [(False, f"it is still running after {SECONDS} seconds; is there a loop that never "
                     "ends?")]
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO())):
        planted = Path(folder) / "planted.py"
        planted.write_text(plant(bug))
        files = map(str, (path, ROOT / bug["script"], planted))
        work = lambda: found.append(hunt_check.check(*files))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(SECONDS)
    return found[-1]


def main(args):
    bugs = load_bugs(args.bugs)
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
        mended, message = check(args.check, bug)
        print(f"{args.check}: {message}")
        sys.exit(not mended)
    write(args.number, bug)
    tell(args.number, bug)
    print(f"    python -m exercises.hunt {args.number} --check {place(args.number, bug)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
