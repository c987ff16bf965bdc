"""The README against the code: its commands parse, its line numbers and its diff are right, its files exist."""

import contextlib
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from plumbing import load_module

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands():
    """Every `python x.py ...` and `torchrun ... x.py ...` of the README's code blocks and of the docstrings."""
    texts = [README, *(path.read_text().split('"""')[1].replace("\\\\", "\\") for path in ROOT.glob("*.py"))]
    texts += [path.read_text().split('"""')[1].replace("\\\\\n", "\\\n") for path in (ROOT / "tasks").glob("*.py")]
    for text in texts:
        text = re.sub(r"\\\n\s*", "", text)
        yield from re.findall(r"^    ((?:python|torchrun --nproc-per-node \d+) [\w/]+\.py.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_parse(command):
    words = shlex.split(command, comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[script].startswith("tasks/"):
        assert (ROOT / words[script]).is_file()
        return
    if words[script].startswith("lab/"):
        module = load_module(str(ROOT / words[script]))
    else:
        module = importlib.import_module(words[script].removesuffix(".py"))
    with contextlib.redirect_stderr(None):
        tyro.cli(module.Args, args=words[script + 1 :])


def test_there_are_commands():
    assert len(set(commands())) > 25


def test_links_point_at_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\(([\w/.]+)#L(\d+)\)", README)
    assert len(links) > 15
    for name, path, line in links:
        assert (ROOT / path).read_text().splitlines()[int(line) - 1].startswith(f"def {name}("), (name, path)
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_diff_is_the_diff():
    command = re.search(r"^    (diff <.*)$", README, re.MULTILINE).group(1)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"```diff\n{done.stdout}```" in README
