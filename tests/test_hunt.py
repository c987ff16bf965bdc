"""exercises/hunt.py: a mended copy passes, however it is written; a bug or new damage does not."""

import ast
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
import torch
import tyro
from helpers import loop

from common import rollout
from exercises import hunt, hunt_check
from lab import gradient
from plumbing import (RunArgs, isolated_rng, load_module, load_policy, load_rows, load_tokenizer)
from tests.helpers import hunt_lines

ROOT = Path(__file__).parent.parent
BUGS, PLACES = hunt.load_bugs(ROOT / "exercises" / "bugs.txt")
NAMES = [f"{number}-{Path(bug['script']).stem}" for number, bug in enumerate(BUGS, 1)]
each_bug = pytest.mark.parametrize("bug", BUGS, ids=NAMES)
CHOSEN = "cabbccabcbca"  # in every process and Python: old copies can be checked next year


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
    """What hunt_check says of a text that is meant to mend a bug."""
    def check(text, bug, seed=1):
        copy, planted = tmp_path / "copy.py", tmp_path / "planted.py"
        copy.write_text(text)
        planted.write_text(planted_copy(bug, seed))
        return hunt_check.check(str(copy), str(ROOT / bug["script"]), str(planted))

    return check


def script(bug):
    return (ROOT / bug["script"]).read_text()


def key_of(bug, seed):
    return f"{seed} {BUGS.index(bug) + 1}"


def planted_copy(bug, seed=1, more=()):
    """A student's copy; `more` are further edits of the script."""
    return hunt.plant(bug | {"bug": [*bug["bug"], *more]}, PLACES, key_of(bug, seed))


def mended_copy(bug, seed=1, mend=()):
    """That copy in which only the bug is mended: by the script's own lines, or by other edits."""
    return hunt.plant(bug | {"bug": mend}, PLACES, key_of(bug, seed))


# ---------------------------------------------------------------------------------- the twelve bugs


def test_twelve_bugs_in_eleven_scripts():
    assert len(BUGS) == 12 and len({bug["script"] for bug in BUGS}) == 11
    assert all(len(bug["silenced"]) >= 2 for bug in BUGS)


@each_bug
def test_a_bug_fits_its_script(bug):
    """If not, a script's old text is no longer there: the top of hunt.py says how to edit a bug."""
    for seed in range(1, 9):
        planted = planted_copy(bug, seed)
        compile(planted, bug["script"], "exec")
        assert max(map(len, planted.splitlines())) <= 100
        for changes in bug["silenced"]:
            compile(planted_copy(bug, seed, changes), bug["script"], "exec")


def test_every_place_is_in_a_script_and_every_copy_has_many():
    fitting = {bug["script"]: {old for old, _ in PLACES if script(bug).count(old) == 1}
               for bug in BUGS}
    assert all(len(places) >= 10 for places in fitting.values())
    assert set.union(*fitting.values()) == {old for old, _ in PLACES}


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
    assert not any(hunt.choose(new, key_of(bug, seed)).strip() in text
                   for bug in BUGS for _, new in bug["bug"] for seed in range(1, 9))


@pytest.mark.slow
@each_bug
def test_the_other_places_compute_the_same(bug, check, monkeypatch):
    """To 1e-9. (python -m tests.helpers.hunt_places goes through every way to write them.)"""
    monkeypatch.setattr(hunt_check, "same", lambda found, expected: torch.allclose(
        found, expected, rtol=0, atol=1e-9 * (1 + expected.nan_to_num().abs().max()),
        equal_nan=True))
    text = mended_copy(bug)
    assert check(text, bug) == (True, f"mended: it computes what {bug['script']} computes")
    left, count = hunt.left_of(text, bug, PLACES, key_of(bug, 1))
    assert left >= 0.9 * count >= 10


@pytest.mark.slow
@each_bug
def test_the_bug_is_seen(bug, check):
    assert check(planted_copy(bug), bug) == (False, "the bug is still there")


@pytest.mark.slow
def test_a_symptom_quotes_the_share_of_responses_that_end():
    """Bug 10's command evaluates the embedded policy with its flags before it trains."""
    (command,), (symptom,) = [[bug[name] for bug in BUGS if "eval/eos_rate" in bug["symptom"]]
                              for name in ("commands", "symptom")]
    args = tyro.cli(load_module(str(ROOT / "ppo.py")).Args, args=shlex.split(command[0])[2:])
    tokenizer = load_tokenizer(str(ROOT / args.model))
    args.model, args.dataset = str(ROOT / args.model), str(ROOT / args.dataset)
    test = load_rows(args, args.test_split, tokenizer, first=args.eval_prompts)
    with isolated_rng(args.seed):
        batch = rollout(load_policy(args, "cpu"), tokenizer, test[:]["prompt_ids"], 1,
                        args.temperature, args.max_new_tokens)
    assert f"eval/eos_rate says {batch.ended.float().mean():.2f} before training" in symptom


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in BUGS if "lab/gradient.py" in bug["symptom"]],
                         ids=lambda bug: bug["script"])
def test_a_symptom_quotes_what_the_lab_says(bug, tmp_path, monkeypatch):
    """With the flags of its command: with others it may say nothing at all."""
    monkeypatch.chdir(ROOT)
    copy = tmp_path / "copy.py"
    copy.write_text(planted_copy(bug))
    (command,) = [command for command in bug["commands"] if "lab.gradient" in command]
    args = tyro.cli(gradient.Args, args=shlex.split(command.format(copy=copy))[3:])
    with loop.float64():
        world = gradient.make_world(args)
        right, wrong = (gradient.measure(row, world, args) for row in args.scripts)
    holds = {"no bias, but nine times the variance":
             wrong.bias < 1e-6 and round(wrong.variance / right.variance) == 9,
             "38 degrees away from the true one, and is a quarter as long":
             round(wrong.angle) == 38 and 0.2 < wrong.length < 0.3,
             "finds a bias": wrong.bias > 0.1}
    assert right.bias < 1e-6
    assert [holds[words] for words in holds if words in bug["symptom"]] == [True]


@pytest.mark.slow
def test_the_first_check_of_a_process_samples_as_the_second_does(tmp_path):
    """The tiny world's models are made once, and that must not move the random numbers."""
    path = tmp_path / "copy.py"
    path.write_text(planted_copy(BUGS[4]))
    command = [sys.executable, "-m", "exercises.hunt", "5", "--check", str(path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == f"{path}: the bug is still there\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@each_bug
def test_hiding_the_symptom_does_not_pass(bug, number, check):
    mended, message = check(planted_copy(bug, more=bug["silenced"][number]), bug)
    assert not mended
    assert message.startswith(("the bug is still there", "something else is different now"))


@pytest.mark.slow
def test_another_mend_of_the_same_bug_passes(check):
    """With other random numbers than the script's: what counts is what is made of the responses."""
    (bug,) = [bug for bug in BUGS if bug["script"] == "grpo.py"]
    lines = planted_copy(bug).splitlines(keepends=True)
    seeded = [line for line in lines if "with isolated_rng(" in line]
    assert len(seeded) == 1
    unseeded = seeded[0].partition("isolated_rng(")[0] + "torch.enable_grad():\n"
    assert check("".join(lines).replace(seeded[0], unseeded), bug)[0]


@pytest.mark.slow
def test_padding_left_out_of_the_loss_is_a_right_mend(check):
    """Where padding has a token of its own, as in the shipped tasks."""
    (bug,) = [bug for bug in BUGS if bug["script"] == "raft.py"]
    mend = [["        num_tokens = batch.response_mask[best].sum()\n",
             "        words = batch.responses != tokenizer.pad_token_id\n"
             "        num_tokens = words[best].sum()\n"],
            ["part = compute_loss(logprobs)", "part = compute_loss(logprobs * words[best[rows]])"]]
    assert check(mended_copy(bug, mend=mend), bug)[0]


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


# ------------------------------------------------------------------------------- whose copy it is


@each_bug
def test_the_script_itself_is_refused(bug, tmp_path):
    """Nor does another layout of it pass, without comments."""
    number, copy = BUGS.index(bug) + 1, tmp_path / "copy.py"
    for text in (script(bug), ast.unparse(ast.parse(script(bug)))):
        copy.write_text(text)
        mended, message = hunt.check(copy, number, bug, PLACES, seed=1)
        assert not mended and message.startswith("it is not your copy, or no longer: of ")
        assert (f"0 are left; give your copy's --seed, and mend {hunt.place(number, bug)} "
                "without") in message


def test_a_mended_copy_of_another_seed_is_refused(tmp_path):
    for number, bug in enumerate(BUGS, 1):
        copy = tmp_path / "copy.py"
        copy.write_text(mended_copy(bug, seed=2))
        mended, message = hunt.check(copy, number, bug, PLACES, seed=1)
        assert not mended and "it is not your copy" in message


def test_a_mend_may_put_back_a_third_of_the_places_and_leave_out_the_comments():
    for bug in BUGS:
        fitting = [old for old, _ in PLACES if script(bug).count(old) == 1]
        some = [place for place in PLACES if place[0] not in fitting[::3]]
        text = ast.unparse(ast.parse(hunt.plant(bug | {"bug": []}, some, key_of(bug, 1))))
        left, count = hunt.left_of(text, bug, PLACES, key_of(bug, 1))
        assert count / 2 <= left < count


def test_a_syntax_error_is_one_line(tmp_path):
    copy = tmp_path / "copy.py"
    copy.write_text(planted_copy(BUGS[0]) + "\nreturn (\n")
    line = planted_copy(BUGS[0]).count("\n") + 2
    assert hunt.check(copy, 1, BUGS[0], PLACES, 1) == (
        False, f"it stops in line {line}: SyntaxError: '(' was never closed")


# ----------------------------------------------------------------- no way around reading the copies


def test_choices_depend_on_the_key_and_are_the_same_within_a_copy():
    text = "«x¦y» = «a¦b¦«c¦d»»; «x¦y»"
    found = [hunt.choose(text, key) for key in range(40)]
    assert set(found) == {f"{name} = {value}; {name}" for name in "xy" for value in "abcd"}
    assert found == [hunt.choose(text, key) for key in range(40)]  # in every process, see below
    assert "".join(hunt.choose("«a¦b¦c»", key) for key in range(12)) == CHOSEN


def test_all_copies_import_the_same():
    imports = {text[text.index("    from common") : text.index("\nexcept ModuleNotFoundError")]
               for bug in BUGS for text in [planted_copy(bug)]}
    assert len(imports) == 1


@each_bug
def test_copies_vary_with_the_seed(bug):
    """Of the lines of a copy that are not the script's, few are in another seed's copy."""
    known = set(hunt.import_all(script(bug)).splitlines())
    one, other = ({*planted_copy(bug, seed).splitlines()} - known for seed in (1, 2))
    assert len(one & other) < 0.4 * len(one)


def test_students_who_do_not_read_do_not_find_the_bugs():
    counts, hits = hunt_lines.study(range(1, 21))
    for row in counts:
        assert row["places with some"] >= 6 and row["the bug's"] < 0.4 * row["unique lines"]
    mean = {name: sum(row[name] for row in hits) / len(hits) for name in hits[0]}
    assert 0.05 < mean["blind"] < 0.15 and max(mean.values()) < 0.3


def test_the_study_sees_places_that_repeat(monkeypatch):
    """As they did, one way to write each: then unique lines or the versions tell the bug."""
    monkeypatch.setattr(hunt_lines, "PLACES", [[old, hunt.choose(new, "")] for old, new in PLACES])
    _, hits = hunt_lines.study(range(1, 6))
    assert sum(row["most versions"] for row in hits) / len(hits) > 0.6


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
    file.write_text(mended_copy(RLOO, mend=[("    device = setup(args)\n", loop)]))
    monkeypatch.setattr(hunt, "SECONDS", 0.5)
    before = set(threading.enumerate())
    mended, message = hunt.check(file, 5, RLOO, PLACES, seed=1)
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
    assert len(set(places)) == 12 and all(Path(place).name == place for place in places)
    assert all(any(fnmatch(place, pattern) for pattern in patterns) for place in places)


def test_all_symptoms_are_listed(capsys):
    hunt.main(hunt.Args())
    text = capsys.readouterr().out
    assert all(hunt.place(number, bug) in text for number, bug in enumerate(BUGS, 1))


@pytest.mark.slow
def test_the_exit_code_says_whether_it_is_mended(tmp_path, capsys):
    texts = mended_copy(BUGS[4]), planted_copy(BUGS[4]), script(BUGS[4])
    for text, code in zip(texts, (0, 1, 1)):
        (tmp_path / "rloo.py").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            hunt.main(hunt.Args(number=5, check=str(tmp_path / "rloo.py")))
        assert stopped.value.code == code
    assert re.findall(r"rloo.py: (.*?)[:\n]", capsys.readouterr().out) == [
        "mended", "the bug is still there", "it is not your copy, or no longer"]


def test_the_command_to_check_names_the_seed(here, capsys):
    for seed, said in ((1, "exercises.hunt 3 --check"), (7, "exercises.hunt 3 --seed 7 --check")):
        hunt.main(hunt.Args(number=3, seed=seed))
        assert said in capsys.readouterr().out
        assert (here / "3.py").read_text() == planted_copy(BUGS[2], seed)
        (here / "3.py").unlink()


def test_bugs_of_your_own(tmp_path, here, capsys):
    bug = {"script": "rloo.py", "symptom": "It forgets.", "commands": ["python {copy}"],
           "bug": [["return -(advantages", "return (advantages"]], "silenced": []}
    (tmp_path / "my.json").write_text(json.dumps({"places": [], "bugs": [bug]}))
    hunt.main(hunt.Args(number=1, bugs=str(tmp_path / "my.json")))
    assert "return (advantages" in (here / "1.py").read_text()
    assert "It forgets." in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ({"number": 13}, "there are bugs 1 to 12"),
    ({"number": 0}, "there are bugs 1 to 12"),
    ({"check": "x.py"}, "--check x.py: give the number of the bug as well"),
    ({"number": 1, "check": "no/such.py"}, "--check no/such.py: no such file"),
    ({"bugs": "no/such.json"}, "--bugs no/such.json: cannot be read"),
    ({"bugs": str(ROOT / "README.md")}, "cannot be read"),
    ({"bugs": "wrong.json"}, "--bugs wrong.json: each bug needs"),
    ({"bugs": "places.json"}, "--bugs places.json: needs places and bugs"),
])
def test_bad_input_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text(json.dumps({"places": [], "bugs": [{"script": "rloo.py"}]}))
    Path("places.json").write_text(json.dumps({"bugs": []}))
    with pytest.raises(SystemExit) as stopped:
        hunt.main(hunt.Args(**flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
