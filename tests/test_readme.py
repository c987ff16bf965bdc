"""README.md, docs/ and exercises/ against the code: commands, flags, links, metric names, the diff
and the tables."""

import contextlib
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import pytest
import tyro

import common
import reward_model
from plumbing import load_module

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "exercises").glob("*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
README = TEXT["README.md"]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.stem not in ("common", "plumbing", "runs"))
LAB = sorted(str(path.relative_to(ROOT)) for folder in ("lab", "exercises") for path in (ROOT / folder).glob("*.py")
             if "class Args" in path.read_text())
GROUPS = "objective|rollout|policy|value|rewards|time|eval"  # of metrics
OTHERS = {"--help", "--nproc-per-node", "--shutdown-timeout", "--logdir", "--index-url"}  # of torchrun, pip, ...


def module(script):
    """A script of the project, by its path."""
    path = str(ROOT / script)
    return load_module(path) if "/" in script else importlib.import_module(script.removesuffix(".py"))


def without_code(text):
    """A page without its code blocks, so that only prose, tables and lists are left."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    +\S.*$", "", text, flags=re.MULTILINE)


# ------------------------------------------------------------------------------- commands and flags


def commands():
    """Every `python x.py ...` and `torchrun ... x.py ...` of pages and docstrings, in code blocks
    and backticks."""
    sources = [path for folder in (".", "tasks", "lab", "exercises") for path in (ROOT / folder).glob("*.py")]
    docstrings = [path.read_text().split('"""')[1].replace("\\\\", "\\") for path in sources]
    for text in (*TEXT.values(), *docstrings):
        text = re.sub(r"\\\n\s*", "", text)
        launch = r"((?:python|torchrun --nproc-per-node \d+) [\w/]+\.py\b"
        yield from re.findall(rf"^ {{4,}}(?:.* && )?{launch}.*)$", text, re.MULTILINE)
        yield from re.findall(rf"`{launch}[^`\n]*)`", text)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_parse(command):
    words = [word for word in shlex.split(command, comments=True) if word != "--help"]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    if words[script].startswith("tasks/"):
        assert len(words) == script + 1
        return
    with contextlib.redirect_stderr(None):
        tyro.cli(module(words[script]).Args, args=words[script + 1 :])


def test_there_are_commands():
    found = set(commands())
    assert len(found) > 45
    assert {words.split()[1] for words in found if words.startswith("python ")} >= {*SCRIPTS, "lab/compare.py"}


@pytest.mark.slow
@pytest.mark.parametrize("path", LAB)
def test_a_command_finds_the_files_that_it_imports(path, monkeypatch):
    """Started from the project's folder, python looks in the script's own."""
    folders = {ROOT, *(ROOT / name for name in ("lab", "exercises", "tasks", "tests"))}
    others = [entry for entry in sys.path if Path(entry).resolve() not in folders]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str((ROOT / path).parent), *others])
    with patch.dict(sys.modules):
        for name, imported in list(sys.modules.items()):
            if Path(getattr(imported, "__file__", None) or "/").parent in folders - {ROOT / "tests"}:
                del sys.modules[name]
        runpy.run_path(str(ROOT / path))


@pytest.mark.parametrize("page", TEXT)
def test_flags_are_flags_of_some_script(page):
    known = set(OTHERS)
    for script in (*SCRIPTS, *LAB):
        for field in fields(module(script).Args):
            known |= {f"--{prefix}{field.name.replace('_', '-')}" for prefix in ("", "no-")}
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


def test_links_to_functions_point_at_them():
    found = 0
    for page, text in TEXT.items():
        links = re.findall(r"\[`(\w+)`\]\(([\w/.]+)#L(\d+)\)", text)
        assert len(links) == len(re.findall(r"#L\d", text))
        for name, path, line in links:
            lines = ((ROOT / page).parent / path).read_text().splitlines()
            assert re.match(rf"\s*(def|class) {name}\b", lines[int(line) - 1]), (page, name, path)
        found += len(links)
    assert found > 45


def test_every_page_and_script_is_linked_from_the_readme():
    links = set(re.findall(r"\]\(([\w/.-]+)", README))
    assert links >= {*SCRIPTS, "common.py", "plumbing.py", "runs.py", "LICENSE", "CONTRIBUTING.md"}
    assert links >= TEXT.keys() - {"README.md"} and len(TEXT) >= 6


# ------------------------------------------------------------------------------- what the pages say


def test_the_readme_can_be_read_in_one_go():
    assert README.count("\n") <= 170


def changes(old, new):
    """The lines of `diff -U0`, without its two headers."""
    return subprocess.run(["diff", "-U0", old, new], capture_output=True, text=True).stdout.splitlines()[2:]


def test_the_diff_is_in_the_diff():
    """Every run of lines with - or + that the README shows stands in the real diff, in this order,
    without a gap."""
    (shown,) = re.findall(r"^```diff\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    real = "\n".join(["", *changes(ROOT / "rloo.py", ROOT / "remax.py"), ""])
    blocks = re.findall(r"^-.*\n(?:-.*\n)*|^\+.*\n(?:\+.*\n)*", shown, re.MULTILINE)
    assert len(blocks) >= 6 and "".join(blocks) == re.sub(r"^@@.*\n", "", shown, flags=re.MULTILINE)
    at = 0
    for block in blocks:
        at = real.find("\n" + block, at)
        assert at >= 0, block


def test_the_family_table_says_how_many_lines_are_new(tmp_path):
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 9
    for script, lines in rows:
        for name in ("rloo.py", script):
            (tmp_path / name).write_text((ROOT / name).read_text().split('"""', 2)[2])
        new = sum(line.startswith("+") for line in changes(tmp_path / "rloo.py", tmp_path / script))
        assert abs(new - int(lines)) <= 5, script


def logged_metrics():
    """The names of all metrics that the scripts log, as they stand in the sources."""
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    names = set(re.findall(rf'"((?:{GROUPS})/\w+)":', sources))  # written out
    for logged in re.findall(r"run\.log\(\{(.*?)\}\)", sources):  # of sft.py and reward_model.py
        names |= set(re.findall(r'"([\w/]+)":', logged))
    for function in (common.evaluate, reward_model.evaluate_pairs):  # logged as eval/<name>
        keys = re.findall(r'[\[{ ]"(\w+)"(?:\] =|:)', inspect.getsource(function))
        names |= {f"eval/{key}" for key in keys}
    return names | {"eval/score", "eval/gold", "objective/true_score"}  # whose names are put together elsewhere


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
