"""README.md, docs/ and exercises/ against the code: commands, flags, links, metrics, tables."""

import contextlib
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

import common
import reward_model
from lab import family

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "exercises").glob("*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
README = TEXT["README.md"]
SCRIPTS = [f"{name}.py" for name in (*family.SCRIPTS, "rloo_minimal", "evaluate", "plot")]
MODULES = sorted(f"{folder}.{path.stem}" for folder in ("lab", "tools", "exercises")
                 for path in (ROOT / folder).glob("*.py") if "class Args" in path.read_text())
GROUPS = "objective|rollout|policy|value|rewards|time|eval"  # of metrics
OTHERS = {"--help", "--nproc-per-node", "--shutdown-timeout", "--logdir",
          "--index-url"}  # of torchrun, pip, ...


def module(name):
    """A script of the project by its file, or a module of lab, tools or exercises by its name."""
    return importlib.import_module(name.removesuffix(".py").replace("/", "."))


def without_code(text):
    """A page without its code blocks, so that only prose, tables and lists are left."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    +\S.*$", "", text, flags=re.MULTILINE)


# ------------------------------------------------------------------------------- commands and flags


LAUNCH = (r"(?:python|torchrun --nproc-per-node \d+) "
          r"(?:[\w/]+\.py\b|-m (?:lab|tools|exercises)\.\w+)")


def commands():
    """Every command of pages and docstrings, in code blocks and backticks, that runs our code.

    `python x.py ...`, `torchrun ... x.py ...` and `python -m lab.x ...`.
    """
    folders = (".", "plumbing", "tasks", "lab", "tools", "exercises")
    sources = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    docstrings = [path.read_text().split('"""')[1].replace("\\\\", "\\") for path in sources]
    for text in (*TEXT.values(), CONTRIBUTING, *docstrings):
        text = re.sub(r"\\\n\s*", "", text)
        yield from re.findall(rf"^ {{4,}}(?:.* && )?({LAUNCH}.*)$", text, re.MULTILINE)
        yield from re.findall(rf"`({LAUNCH}[^`\n]*)`", text)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_parse(command):
    words = [word for word in shlex.split(command, comments=True) if word != "--help"]
    if words[1] == "-m":
        name, flags = words[2], words[3:]
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file()
    else:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, flags = words[script], words[script + 1 :]
        assert (ROOT / name).is_file()
        assert name in SCRIPTS or name.startswith("tasks/"), "run it with python -m"
    if name in (*SCRIPTS, *MODULES):
        with contextlib.redirect_stderr(None):
            tyro.cli(module(name).Args, args=flags)
    else:  # it takes no flags
        assert not [word for word in flags if word.startswith("-")]


def test_there_are_commands():
    """Each script and each module is run somewhere, and none by the path of its file."""
    found = set(commands())
    assert len(found) > 45
    run = {words.removeprefix("python ").removeprefix("-m ").split()[0] for words in found
           if words.startswith("python ")}
    assert run >= {*SCRIPTS, *MODULES}
    for text in (*TEXT.values(), CONTRIBUTING):
        assert not re.search(r"python (lab|tools|exercises)/", text)


HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert not stop.code, name
"""


@pytest.mark.slow
def test_commands_find_what_they_import():
    """Started from the project's folder, without what pytest adds to python's path."""
    run = subprocess.run([sys.executable, "-c", HELP, *MODULES], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0 and run.stdout.count("usage: ") == len(MODULES), run.stderr


@pytest.mark.parametrize("page", TEXT)
def test_flags_are_flags_of_some_script(page):
    known = set(OTHERS)
    for name in (*SCRIPTS, *MODULES):
        for field in fields(module(name).Args):
            flag = field.name.replace("_", "-")
            known |= {f"--{flag}", f"--no-{flag}"}
    spans = re.findall(r"`([^`\n]+)`", without_code(TEXT[page]))
    mentioned = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert not mentioned - known


def test_versions_are_those_of_the_requirements():
    requirements = (ROOT / "requirements.txt").read_text().split()
    pins = [pin for text in TEXT.values() for pin in re.findall(r"\b[\w-]+==[\d.]+\d", text)]
    assert pins and set(pins) <= set(requirements)


# -------------------------------------------------------------------------------------------- links


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page):
    """The anchors of a page's headings."""
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT[page])
    assert len(links) > 5
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if target.suffix == ".md" and anchor:
            assert anchor in anchors(target), link


def test_links_to_functions_are_to_files_that_define_them():
    """By name: a line number would be wrong after the next edit."""
    found = 0
    for page, text in TEXT.items():
        assert "#L" not in text
        for name, path in re.findall(r"\[`(\w+)`\]\(([\w/.]+\.py)\)", text):
            if name != Path(path).stem:
                source = ((ROOT / page).parent / path).read_text()
                assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), (page, name)
                found += 1
    assert found > 35


def test_every_page_and_script_is_linked_from_the_readme():
    links = set(re.findall(r"\]\(([\w/.-]+)", README))
    assert links >= {*SCRIPTS, "common.py", "plumbing/__init__.py", "LICENSE", "CONTRIBUTING.md"}
    assert links >= TEXT.keys() - {"README.md"} and len(TEXT) >= 6


# ------------------------------------------------------------------------------- what the pages say


def test_the_readme_can_be_read_in_one_go():
    assert README.count("\n") <= 175


def changes(old, new):
    """The lines of `diff -U0`, without its two headers."""
    run = subprocess.run(["diff", "-U0", old, new], capture_output=True, text=True)
    return run.stdout.splitlines()[2:]


def test_the_diff_is_in_the_diff():
    """Every run of lines with - or + that the README shows stands in the real diff, in order."""
    (shown,) = re.findall(r"^```diff\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    real = "\n".join(["", *changes(ROOT / "rloo.py", ROOT / "remax.py"), ""])
    blocks = re.findall(r"^-.*\n(?:-.*\n)*|^\+.*\n(?:\+.*\n)*", shown, re.MULTILINE)
    assert len(blocks) >= 6 and "".join(blocks) == re.sub(r"^@@.*\n", "", shown, flags=re.MULTILINE)
    at = 0
    for block in blocks:
        at = real.find("\n" + block, at)
        assert at >= 0, block


def test_the_family_table_says_how_many_lines_are_new(tmp_path):
    rows = re.findall(r"^\| \[`(\w+\.py)`\].*\| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == len(family.FAMILY) - 1
    for script, lines in rows:
        for name in ("rloo.py", script):
            (tmp_path / name).write_text((ROOT / name).read_text().split('"""', 2)[2])
        new = sum(line.startswith("+") for line in changes(tmp_path / "rloo.py", tmp_path / script))
        assert abs(new - int(lines)) <= 5, script


def logged_metrics():
    """The names of all metrics that the scripts log, as they stand in the sources."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py")]
    sources = "".join(path.read_text() for path in paths)
    names = set(re.findall(rf'"((?:{GROUPS})/\w+)":', sources))  # written out
    for logged in re.findall(r"run\.log\(\{(.*?)\}\)", sources):  # of sft.py and reward_model.py
        names |= set(re.findall(r'"([\w/]+)":', logged))
    for function in (common.evaluate, reward_model.evaluate_pairs):  # logged as eval/<name>
        keys = re.findall(r'[\[{ ]"(\w+)"(?:\] =|:)', inspect.getsource(function))
        names |= {f"eval/{key}" for key in keys}
    # The names of these are put together elsewhere.
    return names | {"eval/score", "eval/gold", "objective/true_score"}


def test_every_logged_metric_is_explained():
    """And none is mentioned that is not logged."""
    first_cells = re.findall(r"^\| (.*?) \|", TEXT["docs/metrics.md"], re.MULTILINE)
    explained = set(re.findall(r"`([\w/]+)`", " ".join(first_cells)))
    mentioned = set(re.findall(rf"`((?:{GROUPS})/\w+)`", " ".join(TEXT.values())))
    assert len(logged_metrics()) > 35
    assert not logged_metrics() - explained and not mentioned - logged_metrics()


@pytest.mark.parametrize("page", TEXT)
def test_tables_are_whole(page):
    """A blank line before, a rule after the header, and as many cells in every row."""
    cells = lambda line: len(re.findall(r"(?<!\\)\|", line)) - 1
    lines = [*TEXT[page].splitlines(), ""]
    for i, line in enumerate(lines):
        if line.startswith("|"):
            assert line.endswith("|"), line
            if not lines[i - 1].startswith("|"):
                assert lines[i - 1] == "" and re.fullmatch(r"\|( ?--- ?\|)+", lines[i + 1]), line
            else:
                assert cells(line) == cells(lines[i - 1]), line
            assert not lines[i + 1] or lines[i + 1].startswith("|"), line
