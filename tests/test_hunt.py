"""exercises/hunt.py: a mended copy passes, however it is written; a bug or new damage does not."""

import json
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import patch

import pytest
import tyro

from exercises import hunt, hunt_check
from plumbing import RunArgs, load_module

ROOT = Path(__file__).parent.parent
BUGS = hunt.load_bugs(ROOT / "exercises" / "bugs.txt")
NAMES = [f"{number}-{Path(bug['script']).stem}" for number, bug in enumerate(BUGS, 1)]
each_bug = pytest.mark.parametrize("bug", BUGS, ids=NAMES)


@pytest.fixture(scope="module", autouse=True)
def remember():
    """A script that is given the same responses again is not run again."""
    seen, observe = {}, hunt_check.observe

    def remembered(path, flags, given=None):
        responses = given and [(rollout.update, rollout.batch.responses.tolist())
                               for rollout in given.rollouts]
        key = Path(path).read_text(), str(flags), str(responses)
        if key not in seen:
            seen[key] = observe(path, flags, given)
        return seen[key]

    with patch.object(hunt_check, "observe", remembered):
        yield


@pytest.fixture
def check(tmp_path):
    """What --check says of a text that is meant to mend a bug."""
    def check(text, bug):
        copy, planted = tmp_path / "copy.py", tmp_path / "planted.py"
        copy.write_text(text)
        planted.write_text(hunt.plant(bug))
        return hunt_check.check(str(copy), str(ROOT / bug["script"]), str(planted))

    return check


def script(bug):
    return (ROOT / bug["script"]).read_text()


# ------------------------------------------------------------------------------------- the ten bugs


def test_ten_bugs_in_nine_scripts():
    assert len(BUGS) == 10 and len({bug["script"] for bug in BUGS}) == 9
    assert all(len(bug["silenced"]) >= 2 and len(bug["same"]) >= 4 for bug in BUGS)


@each_bug
def test_a_bug_fits_its_script(bug):
    """If not, a script's old text is no longer there: the top of hunt.py says how to edit a bug."""
    planted = hunt.plant(bug)
    compile(planted, bug["script"], "exec")
    for changes in bug["silenced"]:
        compile(hunt.edit(planted, changes, "silenced"), bug["script"], "exec")


@each_bug
def test_commands_parse(bug):
    assert any("{copy}" in command for command in bug["commands"])
    for command in bug["commands"]:
        command = command.replace("-m lab.gradient", "lab/gradient.py")
        python, path, *words = shlex.split(command.format(copy=bug["script"]), comments=True)
        assert python == "python"
        tyro.cli(load_module(str(ROOT / path)).Args, args=words)


def test_nobody_reads_them_by_accident():
    pages = [path for path in ROOT.rglob("*") if path.suffix in (".py", ".md", ".json", ".txt")
             and not {"runs", ".venv"} & set(path.relative_to(ROOT).parts)]
    copies = [hunt.place(number, bug) for number, bug in enumerate(BUGS, 1)]
    text = "\n".join(path.read_text() for path in pages if path.name not in copies)
    assert "bugs.txt" in text
    assert not any(new.strip() in text for bug in BUGS for _, new in bug["bug"])


@pytest.mark.slow
@each_bug
def test_the_script_itself_passes(bug, check):
    said = f"mended: it computes what {bug['script']} computes"
    assert check(script(bug), bug) == (True, said)


@pytest.mark.slow
@each_bug
def test_the_other_places_compute_the_same(bug, check):
    """A copy in which only the bug is mended."""
    assert check(hunt.edit(script(bug), bug["same"], "same"), bug)[0]


@pytest.mark.slow
@each_bug
def test_the_bug_is_seen(bug, check):
    assert check(hunt.plant(bug), bug) == (False, "the bug is still there")


@pytest.mark.slow
def test_the_first_check_of_a_process_samples_as_the_second_does(tmp_path):
    """The tiny world's models are made once, and that must not move the random numbers."""
    path = tmp_path / "copy.py"
    path.write_text(hunt.plant(BUGS[4]))
    command = [sys.executable, "-m", "exercises.hunt", "5", "--check", str(path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == f"{path}: the bug is still there\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@each_bug
def test_hiding_the_symptom_does_not_pass(bug, number, check):
    mended, message = check(hunt.edit(hunt.plant(bug), bug["silenced"][number], "silenced"), bug)
    assert not mended
    assert message.startswith(("the bug is still there", "something else is different now"))


@pytest.mark.slow
def test_another_mend_of_the_same_bug_passes(check):
    """With other random numbers than the script's: what counts is what is made of the responses."""
    (bug,) = [bug for bug in BUGS if "isolated_rng(args.seed + run.step)" in hunt.plant(bug)]
    mended = hunt.plant(bug).replace("isolated_rng(args.seed + run.step)",
                                     "isolated_rng(args.seed + run.step * args.k + len(samples))")
    assert check(mended, bug)[0]


@pytest.mark.parametrize("script", sorted({bug["script"] for bug in BUGS}))
def test_each_flag_of_an_algorithm_has_two_values(script):
    """But for those of the world, and the window of past steps: after two updates there is one."""
    own = {field.name: field.default for field in fields(load_module(str(ROOT / script)).Args)
           if field.name not in vars(RunArgs())}
    values = {name: {str((hunt_check.BASE | setting).get(name, default))
                     for setting in hunt_check.SETTINGS} for name, default in own.items()}
    same = {name for name in values if len(values[name]) == 1}
    assert same - {*hunt_check.BASE, "lr_schedule", "warmup_updates", "seed"} <= {"window"}
    assert not {"lr", "critic_lr", "max_grad_norm"} & same


# ------------------------------------------------------------------------------------- other damage

RLOO = next(bug for bug in BUGS if bug["script"] == "rloo.py")
STEP = "        optimizer.step()\n"
LINE = script(RLOO).splitlines().index(STEP.rstrip()) + 1
NAN = "scores[0] = 0 / torch.zeros(())\n        "
DAMAGE = [  # old text of rloo.py, new text, what is said
    ("beta: NotNegative = 0.05", "beta: NotNegative = 0.0", "the default of --beta"),
    ('"policy/loss": loss, ', "", "there is no longer policy/loss of update 1"),
    ("        scheduler.step()\n", "", "policy/lr of update 2 is 0.005, not 0.0025"),
    ("            run.save_model(policy)\n", "", "there is no longer a file run/model/"),
    ("args.k, args.temperature,", "args.k, 1.0,", "responses are sampled at temperature 1.0"),
    ("1. rollout: k responses per prompt, with", "1.\n        args.k = 5  #",
     "prompts have 5 responses"),
    ("batch = rollout(policy", "batch = rollout(reference",
     "not sampled from the policy that is trained"),
    ("args.max_new_tokens, args.rollout", "args.max_new_tokens - 1, args.rollout",
     "responses have up to 5 tokens"),
    (STEP, STEP * 2, "the gradient of the policy in"),
    (STEP, "        raise ValueError('no')\n", f"it stops in line {LINE}: ValueError: no"),
    ("import torch\n", "import torhc\n",
     "cannot be imported: ModuleNotFoundError: No module named 'torhc'"),
    ("        run.log(metrics", "        break\n        run.log(metrics",
     "it makes 1 of 2 updates"),
    ("    run = Run(", "    return policy\n    run = Run(", "it makes 0 of 2 updates"),
    ("rewards = sequence_rewards(", f"{NAN}rewards = sequence_rewards(",
     "RuntimeError: update 1: scores is not finite (nan)"),
    ("microbatches(policy, args.microbatch_tokens, batch)", "[torch.arange(len(batch))]",
     "no longer --microbatch-tokens"),
]


@pytest.mark.slow
@pytest.mark.parametrize("old, new, said", DAMAGE, ids=[said for _, _, said in DAMAGE])
def test_other_damage_is_named(old, new, said, check):
    mended, message = check(hunt.edit(script(RLOO), [(old, new)], "rloo.py"), RLOO)
    assert not mended and said in message and "\n" not in message


@pytest.mark.slow
def test_a_flag_more_is_no_damage(check):
    more = ("    k: Count = 4\n", "    more: int = 1\n    k: Count = 4\n")
    assert check(hunt.edit(script(RLOO), [more], "rloo.py"), RLOO)[0]


@pytest.mark.slow
def test_every_optimizer_step_is_compared():
    """Two updates of two mini-batches are four steps of each of two models."""
    settings = hunt_check.BASE | hunt_check.SETTINGS[0]
    numbers = hunt_check.observe(str(ROOT / "ppo.py"), settings).numbers
    assert [name for name in numbers if "gradient" in name] == [
        f"the gradient of the {model} in optimizer step {step}"
        for step in "1234" for model in ("policy", "critic")]


def test_an_endless_loop_is_one_line(tmp_path, monkeypatch):
    stop, file = tmp_path / "stop", tmp_path / "endless.py"
    loop = (f"    import os, time\n    while not os.path.exists({str(stop)!r}):\n"
            "        time.sleep(0.01)\n")
    file.write_text(hunt.edit(script(RLOO), [("    device = setup(args)\n", loop)], "rloo.py"))
    monkeypatch.setattr(hunt, "SECONDS", 0.5)
    before = set(threading.enumerate())
    mended, message = hunt.check(file, RLOO)
    left = set(threading.enumerate()) - before
    assert len(left) == 1 and all(thread.daemon for thread in left)  # so that the command can end
    stop.touch()
    for thread in left:
        thread.join()
    assert not mended and "still running after 0.5 seconds" in message


# ------------------------------------------------------------------------------------- command line


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Copies are written to a temporary folder."""
    monkeypatch.setattr(hunt, "place", lambda number, bug: str(tmp_path / f"{number}.py"))
    return tmp_path


def test_a_copy_that_was_edited_is_not_overwritten(here, capsys):
    hunt.main(hunt.Args(number=3))
    hunt.main(hunt.Args(number=3))
    (here / "3.py").write_text("my work")
    with pytest.raises(SystemExit):
        hunt.main(hunt.Args(number=3))
    assert (here / "3.py").read_text() == "my work"
    assert "you have edited it" in capsys.readouterr().err


def test_copies_stand_beside_the_scripts_and_git_ignores_them():
    """So that they find what scripts import, and need no edit for it."""
    patterns = (ROOT / ".gitignore").read_text().split()
    places = [hunt.place(number, bug) for number, bug in enumerate(BUGS, 1)]
    assert len(set(places)) == 10 and all(Path(place).name == place for place in places)
    assert all(any(fnmatch(place, pattern) for pattern in patterns) for place in places)


def test_all_symptoms_are_listed(capsys):
    hunt.main(hunt.Args())
    text = capsys.readouterr().out
    assert all(hunt.place(number, bug) in text for number, bug in enumerate(BUGS, 1))


@pytest.mark.slow
def test_the_exit_code_says_whether_it_is_mended(tmp_path, capsys):
    planted = tmp_path / "rloo.py"
    planted.write_text(hunt.plant(BUGS[4]))
    right = ROOT / "rloo.py"
    for number, path, code in ((5, right, 0), (6, right, 1), (5, planted, 1)):  # 5 is rloo.py's
        with pytest.raises(SystemExit) as stopped:
            hunt.main(hunt.Args(number=number, check=str(path)))
        assert stopped.value.code == code
    assert re.findall(r"rloo.py: (.*?)[:\n]", capsys.readouterr().out) == [
        "mended", "something else is different now", "the bug is still there"]


def test_bugs_of_your_own(tmp_path, here, capsys):
    bug = {"script": "rloo.py", "symptom": "It forgets.", "commands": ["python {copy}"],
           "bug": [["return -(advantages", "return (advantages"]], "same": [], "silenced": []}
    (tmp_path / "my.json").write_text(json.dumps([bug]))
    hunt.main(hunt.Args(number=1, bugs=str(tmp_path / "my.json")))
    assert "return (advantages" in (here / "1.py").read_text()
    assert "It forgets." in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ({"number": 11}, "there are bugs 1 to 10"),
    ({"number": 0}, "there are bugs 1 to 10"),
    ({"check": "x.py"}, "--check x.py: give the number of the bug as well"),
    ({"number": 1, "check": "no/such.py"}, "--check no/such.py: no such file"),
    ({"bugs": "no/such.json"}, "--bugs no/such.json: cannot be read"),
    ({"bugs": str(ROOT / "README.md")}, "cannot be read"),
    ({"bugs": "wrong.json"}, "--bugs wrong.json: each bug needs"),
])
def test_bad_input_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text(json.dumps([BUGS[0], {"script": "rloo.py"}]))
    with pytest.raises(SystemExit) as stopped:
        hunt.main(hunt.Args(**flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
