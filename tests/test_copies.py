"""Copies: scripts in a folder of their own, as a student takes them, and without what they need."""

import json
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from helpers.tiny import Child
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--num-updates", "2", "--device", "cpu"]
pytestmark = pytest.mark.slow


def run_copy(script, words, folder):
    """In another process: `python script words` in a folder, with nothing of this project loaded."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{ROOT}/"):
            del sys.modules[name]
    inside = lambda path: os.path.abspath(path).startswith(str(ROOT)) or not path
    sys.path[:] = [str(script.parent), *(path for path in sys.path if not inside(path))]
    sys.argv = [str(script), *words]
    os.chdir(folder)
    os.environ.pop("HF_HUB_OFFLINE")
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def python(context, tmp_path):
    """A function (script, *words): run that copy in an empty folder, and return its process."""
    def run(script, *words, folder=None):
        folder = folder or tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        process = Child(context, tmp_path / "log", run_copy, script, words, folder)
        process.wait(timeout=60)
        return process

    return run


def copy(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        whole = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        whole(ROOT / name, folder / name)
    return folder


def test_the_files_that_the_readme_names_train_from_another_folder(python, tmp_path):
    """`python /somewhere/rloo.py` finds the defaults beside the script, and writes where it is."""
    readme = (ROOT / "README.md").read_text()
    line = next(line for line in readme.splitlines() if line.strip().startswith("cp -r rloo.py"))
    names = shlex.split(line)[2:-1]  # cp -r ... FOLDER
    script = copy(tmp_path / "mine", *names) / "rloo.py"
    done = python(script, "--k", "2", "--eval-prompts", "4", *SHORT)
    assert done.poll() == 0, done.stderr
    run, = (tmp_path / "elsewhere" / "runs").iterdir()
    assert json.loads((run / "args.json").read_text())["num_updates"] == 2
    assert "win_rate" in json.loads((run / "evaluation.json").read_text())["after"]
    assert not (tmp_path / "mine" / "runs").exists()


def test_one_page_with_the_tasks(python, tmp_path):
    folder = copy(tmp_path / "mine", "rloo_minimal.py", "tasks")
    done = python(folder / "rloo_minimal.py", "--k", "2", *SHORT[:2], folder=folder)
    assert done.poll() == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(folder / "runs/rloo_minimal")


def test_one_page_with_a_model_prompts_and_a_reward_of_ones_own(python, world, tmp_path):
    """Edited as its docstring says: two functions replaced, and a model folder."""
    folder = copy(tmp_path / "mine", "rloo_minimal.py")
    page = folder / "rloo_minimal.py"
    head, rest = page.read_text().split("def load_prompts():")
    rest = rest[rest.index("@dataclass") :]
    page.write_text(head + '''def load_prompts():
    return ["a b c", "d"]


def reward(prompts, completions):
    return [float(len(y.split())) for x, y in zip(prompts, completions)]


''' + rest)
    done = python(page, "--model", world.policy, "--output", "out", *SHORT[:2], folder=folder)
    assert done.poll() == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(folder / "out")


@pytest.mark.parametrize("names, words, error", [
    (["rloo.py"], [], "No module named 'common'; copy common.py, plumbing/ and tasks/"),
    (["rloo.py", "common.py"], [], "No module named 'plumbing'; copy common.py, plumbing/"),
    (["rloo.py", "common.py", "plumbing"], [],
     "tasks/mini_tldr-sft: not found; copy the folder tasks to"),
    (["rloo.py", "common.py", "plumbing"], ["--model", "WORLD"],
     "tasks/mini_tldr.py: not found; copy the folder tasks to"),
    (["rloo_minimal.py"], [], "there is no folder tasks here; copy it, or replace load_prompts"),
    (["rloo_minimal.py", "tasks"], ["--model", "nowhere"], "--model nowhere: neither"),
])
def test_what_is_missing_is_said_in_one_line(names, words, error, python, world, tmp_path):
    """Without asking a hub, which would take half a minute."""
    folder = copy(tmp_path / "mine", *names)
    words = [world.policy if word == "WORLD" else word for word in words]
    done = python(folder / names[0], *words, folder=folder)
    assert done.poll() not in (0, None)
    message, = done.stderr.strip().splitlines()
    assert message.startswith("error: ") and error in message
    assert not (folder / "runs").exists()
