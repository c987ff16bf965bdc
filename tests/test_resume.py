"""Runs ended in the middle go on as if nothing had happened; checkpoints are whole or refused."""

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import ROOT, Child, call_script, run_two, save_policy, scalars, wait_for

import rloo
from lab.family import FAMILY
from plumbing import parse, report, run
from plumbing.checkpoints import checksums
from tools import kill


pytestmark = pytest.mark.slow


def flags_of(script, world, **more):
    fields = {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    flags = world.flags | {"eval_dataset": world.data, "batch_size": 4, "num_updates": 6,
                           "save_every": 1, "reward_noise": 0.3} | more
    if script == "dapo" or script in FAMILY and FAMILY[script].binary:  # dapo: several rounds
        flags |= {"reward": (f"{ROOT}/tests/helpers/small_world.py:right",), "reward_noise": 0.0}
    return {name: value for name, value in flags.items() if name in fields}


def moments_of(script):
    """The first draw of two with both before update 4 of 6, and one at least after a checkpoint.

    Both early in an update: its mean time, start and end included, is several times its own.
    """
    draws = (kill.draw_moments(script, 6, kills=2, seed=seed) for seed in itertools.count())
    return next(moments for moments in draws
                if 1 < max(moments) < 4 and all(moment % 1 < 0.2 for moment in moments))


@pytest.mark.parametrize("script", kill.SCRIPTS)
def test_killed_at_random_moments_and_resumed_is_the_same_bit_for_bit(
        script, context, world, tmp_path):
    found, kills = kill.compare(context, script, flags_of(script, world), tmp_path / "runs",
                                moments_of(script))
    assert found == [] and kills == 2


def test_differences_are_named():
    """What is compared above: nested, with tensors, which have to be equal bit for bit."""
    outcome = {"weights": {"a": b"12"}, "curves": {"score": [(0, 1.0), (1, 2.0)]},
               "state": torch.tensor([1.0, 2.0])}
    assert kill.differences(outcome, outcome | {"state": torch.tensor([1.0, 2.0])}) == []
    for change, names in (
        ({"state": torch.tensor([1.0, 2.0 + 2e-7])}, ["run/state"]),
        ({"state": [1.0, 2.0]}, ["run/state"]),
        ({"state": None}, ["run/state"]),
        ({"weights": {}}, ["run/weights/a"]),
        ({"more": 1}, ["run/more"]),
        ({"curves": {"score": [(0, 1.0)]}}, ["run/curves/score"]),
        ({"curves": {"score": [(0, 1.5), (1, 2.5)]}},
         ["run/curves/score/0/1", "run/curves/score/1/1"]),
    ):
        assert kill.differences(outcome, outcome | change) == names
        assert kill.differences(outcome | change, outcome) == names


SLOW = """
import time
from pathlib import Path

calls = []


def reward(completions, **_):
    calls.append(1)
    if len(calls) == 6:  # the first are those of the evaluation before training
        Path(__file__).with_name("training").touch()
        time.sleep({seconds})
    return [1.0] * len(completions)
"""


def start(context, world, tmp_path, seconds=0):
    """A long run that is in its sixth call of the reward (which takes so many seconds) or later."""
    (tmp_path / "reward.py").write_text(SLOW.format(seconds=seconds))
    flags = flags_of("rloo", world, num_updates=2000, eval_every=0, save_every=0)
    flags |= {"reward": (f"{tmp_path}/reward.py:reward",), "output": tmp_path / "run"}
    process = Child(context, tmp_path, call_script, "rloo", flags)
    wait_for((tmp_path / "training").exists, process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_update_saves_and_says_how_to_go_on(number, context, world, tmp_path):
    process = start(context, world, tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    step = int(list((tmp_path / "run" / "checkpoints").iterdir())[0].name)
    assert (f"stopped after update {step}; to resume: python rloo.py --resume {tmp_path / 'run'}"
            in process.stdout)
    assert "Traceback" not in process.stderr
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    flags = flags_of("rloo", world, num_updates=step + 2, eval_every=0,
                     reward=(f"{tmp_path}/reward.py:reward",))
    rloo.main(rloo.Args(**flags, resume=str(tmp_path / "copy")))
    assert json.loads((tmp_path / "copy" / "evaluation.json").read_text())


def test_a_second_signal_ends_at_once(context, world, tmp_path):
    process = start(context, world, tmp_path, seconds=300)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "press Ctrl-C again to quit now" in process.stderr, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run of 4 updates, with checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    rloo.main(rloo.Args(**flags_of("rloo", world, num_updates=4), output=str(folder)))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(capsys, call, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return lines[0]


def resume(world, folder, script="rloo", **more):
    module = importlib.import_module(script)
    module.main(module.Args(**flags_of(script, world, num_updates=6) | more, resume=str(folder)))


def test_the_last_checkpoints_are_kept_small_and_whole(finished):
    found = sorted((finished / "checkpoints").iterdir())
    assert [path.name for path in found] == ["000003", "000004"]
    for path in found:
        assert json.loads((path / "checksums.json").read_text()) == checksums(path)
        assert (path / "policy" / "model.safetensors").is_file()


DAMAGES = {
    "truncated state": lambda last: (last / "state.pt").write_bytes(
        (last / "state.pt").read_bytes()[:-50]),
    "flipped bit in the weights": lambda last: flip(last / "policy" / "model.safetensors"),
    "flipped bit in the state": lambda last: flip(last / "state.pt"),
    "missing weights": lambda last: (last / "policy" / "model.safetensors").unlink(),
    "missing state": lambda last: (last / "state.pt").unlink(),
    "missing list": lambda last: (last / "checksums.json").unlink(),
    "damaged list": lambda last: (last / "checksums.json").write_text("{"),
    "a file too many": lambda last: (last / "policy" / "pytorch_model.bin").write_bytes(b"x"),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(damage, copy, world, capsys):
    DAMAGES[damage](copy / "checkpoints" / "000004")
    line = refused(capsys, lambda: resume(world, copy), copy)
    assert "000004" in line and "damaged or missing" in line and "delete that folder" in line
    shutil.rmtree(copy / "checkpoints" / "000004")
    resume(world, copy)


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def test_a_pickle_in_place_of_tensors_runs_nothing(copy, world, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = copy / "checkpoints" / "000004"
    torch.save({"state": Code()}, last / "state.pt")
    (last / "checksums.json").write_text(json.dumps(checksums(last)))
    line = refused(capsys, lambda: resume(world, copy), copy)
    assert "does not fit" in line
    assert not (tmp_path / "code-was-run").exists()


def test_what_cannot_go_on_is_refused(copy, world, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(copy, tmp_path / "none", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(copy, tmp_path / "flags")
    (tmp_path / "flags" / "args.json").write_text("{")
    for call, expected in [
        (lambda: resume(world, tmp_path / "absent"), "not a run folder"),
        (lambda: resume(world, tmp_path / "empty"), "not a run folder"),
        (lambda: resume(world, tmp_path / "none"), "has no checkpoint"),
        (lambda: resume(world, tmp_path / "flags"), "args.json is damaged"),
        (lambda: resume(world, copy, "ppo"), "a run of rloo.py"),
        (lambda: resume(world, copy, seed=2), "--seed 2: the run in"),
        (lambda: resume(world, copy, k=2), "--k 2: the run in"),
        (lambda: resume(world, copy, prompts_per_step=2), "--prompts-per-step 2: the run in"),
        (lambda: resume(world, copy, lr=0.5), "--lr 0.5: the run in"),
        (lambda: resume(world, copy, eval_every=1), "--eval-every 1: the run in"),
        (lambda: resume(world, copy, num_updates=3), "--num-updates 3: the run in"),
        (lambda: resume(world, copy, output=str(tmp_path / "new")), "--output"),
        (lambda: resume(world, copy, save_every=-1), "--save-every -1"),
        (lambda: resume(world, copy, keep=0), "--keep 0"),
    ]:
        assert expected in refused(capsys, call, tmp_path)


def test_the_log_goes_on_as_if_the_run_had_never_stopped(world, tmp_path, monkeypatch):
    """With a clock that ticks at each reading, twice an update. The last updates are made twice."""
    ticks = itertools.count()
    monkeypatch.setattr(run.time, "perf_counter", lambda: float(next(ticks)))
    folder = tmp_path / "run"
    rloo.main(rloo.Args(**flags_of("rloo", world, num_updates=5, keep=3), output=str(folder)))
    for name in ("000004", "000005"):  # as if killed after the log of update 5 was written
        shutil.rmtree(folder / "checkpoints" / name)
    resume(world, folder)
    curves = scalars(folder)
    for name, points in curves.items():
        expected = [0, 2, 4, 6] if name.startswith("eval/") else [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in points] == expected, name
    seconds, lengths = curves["time/seconds"][0][1], dict(curves["rollout/length"])
    assert curves["time/samples"] == [(step, 12.0 * step) for step in range(1, 7)]
    assert curves["time/seconds"] == [(step, seconds * step) for step in range(1, 7)]
    assert curves["time/tokens_per_second"] == [(step, pytest.approx(12 * lengths[step] / seconds))
                                                for step in range(1, 7)]


def test_another_model_shape_is_refused(copy, world, capsys, tmp_path):
    other = save_policy(tmp_path / "other", world.tokenizer, hidden=8)
    settings = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps(settings | {"model": other}))
    line = refused(capsys, lambda: resume(world, copy, model=other), copy)
    assert "does not fit this run's models" in line


def test_changed_flags_are_told(copy, world, capsys):
    resume(world, copy, keep=5, plain=True)
    output = capsys.readouterr().out
    assert ("note: --keep changed from 2 to 5" in output
            and "note: --plain changed from False to True" in output)
    assert "note: --num-updates changed from 4 to 6" in output and output.count("note: ") == 3
    rates = kill.outcome(copy)["curves"]["policy/lr"]  # linear, to 0 after the last update
    assert rates[3:] == [(4, pytest.approx(0.01 / 4)), (5, pytest.approx(0.01 * 2 / 6)),
                         (6, pytest.approx(0.01 / 6))]


def test_flags_that_are_not_given_are_the_runs_own(copy, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rloo.py", "--resume", str(copy), "--lr", "0.5"])
    args = parse(rloo.Args)
    settings = json.loads((copy / "args.json").read_text())
    assert args.lr == 0.5 and args.resume == str(copy) and args.output is None
    for name in ("model", "k", "num_updates", "dataset", "prompts_per_step"):
        assert getattr(args, name) == settings[name]
    assert args.reward == tuple(settings["reward"])


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(copy, world, capsys, monkeypatch):
    real = torch.save

    def full(contents, path):
        if contents["state"]["step"] == 6:
            raise OSError(28, "No space left on device")
        return real(contents, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        resume(world, copy)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert stopped.value.code == 1
    assert "checkpoint of update 6 cannot be written" in line and "No space left on device" in line
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["000004", "000005"]
    monkeypatch.undo()
    resume(world, copy)


def test_numbers_that_are_not_finite_stop_the_run_and_name_their_prompts(world, tmp_path, capsys,
                                                                         monkeypatch):
    """The fourth score of the training gives one nan."""
    real, calls = rloo.score, []

    def broken(reward_fns, tokenizer, batch, examples):
        calls.append(examples["prompt"])
        parts = real(reward_fns, tokenizer, batch, examples)
        if len(calls) == 4:
            parts["score"][4] = float("nan")
        return parts

    monkeypatch.setattr(rloo, "score", broken)
    with pytest.raises(SystemExit) as stopped:
        rloo.main(rloo.Args(**flags_of("rloo", world, num_updates=9, eval_every=0),
                            output=str(tmp_path / "run")))
    assert stopped.value.code == 1
    told = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert told["not finite"] == "scores" and told["prompts"] == [calls[-1][4 // world.flags["k"]]]
    assert f"update {told['update']}: scores is not finite" in capsys.readouterr().err
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert int(last.name) == told["update"] - 1


def test_a_collapse_is_told_once(capsys):
    metrics = lambda length, entropy, eos: {"rollout/length": torch.tensor(length),
                                            "objective/entropy": torch.tensor(entropy),
                                            "rollout/eos_rate": torch.tensor(eos)}
    for values, words in [
        ((8.0, 9.0, 0.0), "no response has ended with EOS"),
        ((1.0, 0.5, 1.0), "every response is empty"),
        ((8.0, 0.001, 1.0), "the entropy is close to 0"),
    ]:
        state = {}
        for _ in range(3 * report.PATIENCE):
            report.warn_if_collapsed(state, metrics(*values), 8)
        error = capsys.readouterr().err
        assert error.count("warning: ") == 1 and words in error
    state = {}
    for i in range(3 * report.PATIENCE):  # not in a row
        report.warn_if_collapsed(state, metrics(8.0, 9.0, 0.0 if i % 10 else 0.5), 8)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_are_killed_and_resume(shard, context, world, tmp_path):
    """One of two gets SIGKILL, and the run ends. Resumed by two, it ends like a whole one."""
    (tmp_path / "reward.py").write_text(
        "import os\nimport signal\n\ncalls = []\n\n\n"
        "def reward(completions, **_):\n    calls.append(1)\n"
        "    if len(calls) == 6 and os.environ['RANK'] == '1' and os.environ.get('DIE'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [float(len(text)) for text in completions]\n")
    flags = flags_of("rloo", world, reward=(f"{tmp_path}/reward.py:reward",), eval_every=0,
                     shard=shard, num_updates=5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run(flags, **environment):
        return run_two(context, tmp_path / "output", call_script, "rloo", flags, **environment)

    done = run(flags | {"output": whole})
    assert done.returncode == 0, done.stderr
    done = run(flags | {"output": killed}, DIE="1")
    assert done.returncode != 0
    assert 0 < kill.reached(killed) < 5
    done = run({"resume": killed, "shard": shard})
    assert done.returncode == 0, done.stderr
    assert kill.differences(kill.outcome(whole), kill.outcome(killed)) == []


def test_the_long_version_is_documented():
    assert "python -m tools.kill" in (ROOT / "README.md").read_text() and kill.Args().kills == 20
