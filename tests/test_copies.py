"""Copies: scripts in a folder of their own, as a student takes them, and without what they need."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from plumbing import files

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def copy(folder, *names):
    folder.mkdir()
    for name in names:
        whole = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        whole(ROOT / name, folder / name)
    return folder


def python(script, *words, folder):
    """`python script words` in a folder, where nothing of this project can be found."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    return subprocess.run([sys.executable, script, *words], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=60)


def test_the_files_that_the_readme_names_train_from_another_folder(tmp_path):
    """`python /somewhere/rloo.py` finds the defaults beside the script, and writes where it is."""
    readme = (ROOT / "README.md").read_text()
    line, = (line for line in readme.splitlines() if line.strip().startswith("cp -r rloo.py"))
    script = copy(tmp_path / "mine", *shlex.split(line)[2:-1]) / "rloo.py"
    (tmp_path / "elsewhere").mkdir()
    done = python(script, "--k", "2", "--eval-prompts", "4", "--num-updates", "2",
                  folder=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    run, = (tmp_path / "elsewhere" / "runs").iterdir()
    assert json.loads((run / "args.json").read_text())["num_updates"] == 2
    assert "win_rate" in json.loads((run / "evaluation.json").read_text())["after"]
    assert not (tmp_path / "mine" / "runs").exists()


def test_one_page_with_the_tasks(tmp_path):
    folder = copy(tmp_path / "mine", "rloo_minimal.py", "tasks")
    done = python("rloo_minimal.py", "--k", "2", "--num-updates", "2", folder=folder)
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(folder / "runs/rloo_minimal")


def test_one_page_with_a_model_prompts_and_a_reward_of_ones_own(world, tmp_path):
    """Edited as its docstring says: two functions replaced, and a model folder."""
    page = copy(tmp_path / "mine", "rloo_minimal.py") / "rloo_minimal.py"
    head, rest = page.read_text().split("def load_prompts():")
    page.write_text(head + '''def load_prompts():
    return ["a b c", "d"]


def reward(prompts, completions):
    return [float(len(y.split())) for x, y in zip(prompts, completions)]


''' + rest[rest.index("@dataclass") :])
    done = python(page, "--model", world.policy, "--output", "out", "--num-updates", "2",
                  folder=page.parent)
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(page.parent / "out")


@pytest.mark.parametrize("names, error", [
    (["rloo.py"], "No module named 'common'; copy common.py, plumbing/ and tasks/"),
    (["rloo.py", "common.py"], "No module named 'plumbing'; copy common.py, plumbing/"),
    (["rloo.py", "common.py", "plumbing"],
     "tasks/mini_tldr-sft: not found; copy the folder tasks to"),
    (["rloo_minimal.py"], "there is no folder tasks here; copy it, or replace load_prompts"),
])
def test_what_is_missing_is_said_in_one_line(names, error, tmp_path):
    """Without asking a hub, which would take half a minute."""
    folder = copy(tmp_path / "mine", *names)
    done = python(names[0], folder=folder)
    assert done.returncode in (1, 2)
    message, = done.stderr.strip().splitlines()
    assert message.startswith("error: ") and error in message
    assert not (folder / "runs").exists()


def test_every_default_of_the_tasks_says_what_to_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "BESIDE", tmp_path)
    for ask in (lambda: files.check_path("model", "tasks/mini_tldr-sft"),
                lambda: files.load_function("tasks/mini_tldr.py:prompts")):
        with pytest.raises(SystemExit):
            ask()
        assert f"copy the folder tasks to {tmp_path}" in capsys.readouterr().err
