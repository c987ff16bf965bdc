"""lab/compare.py: the columns of a run and the table by hand, and its sweep with fake runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from lab import compare
from lab.family import FAMILY

SETTINGS = {"script": "rloo", "reward": ["tasks/mini_tldr-reward"]}


def write_run(folder, settings=SETTINGS, after=None, tokens=()):
    """A finished run's folder, with a gold reward of 0, 1, 4 ... 36 at updates 0, 10 ... 60."""
    with SummaryWriter(folder) as writer:
        for i in range(7):
            writer.add_scalar("eval/gold", i**2, 10 * i)
        for step in range(1, 5):
            writer.add_scalar("policy/loss", 0.0, step)
            writer.add_scalar("time/seconds", 2.0 * step, step)
            writer.add_scalar("time/samples", 16 * step, step)
        for step, number in enumerate(tokens, 1):
            writer.add_scalar("time/tokens_per_second", number, step)
    (folder / "args.json").write_text(json.dumps(settings))
    after = after or {"score": 1.5, "gold": 6.0, "win_rate": 0.75, "kl": 2.0, "length": 20.0}
    (folder / "evaluation.json").write_text(json.dumps({"before": {}, "after": after}))


def test_the_columns_of_a_run_by_hand(tmp_path):
    write_run(tmp_path, tokens=(100.0, 300.0, 101.0, 103.0))
    assert compare.measure(tmp_path, 512.0) == {
        "score": 1.5, "gold": 6.0, "win rate": 0.75, "early gold": 11.0,  # 1, 4, 9, 16 and 25
        "KL": 2.0, "length": 20.0, "s / update": 2.0, "tokens / s": 102.0, "samples": 64.0,
        "peak MB": 512.0, "models": 3}


def test_what_a_run_does_not_have_is_none(tmp_path):
    write_run(tmp_path, after={"score": 1.0, "kl": 0.0, "length": 3.0})
    found = compare.measure(tmp_path, None)
    unknown = [name for name, value in found.items() if value is None]
    assert unknown == ["gold", "win rate", "tokens / s", "peak MB"]


@pytest.mark.parametrize("script, reward, number", [
    ("rloo", ["tasks/mini_tldr-reward"], 3), ("ppo", ["a", "b"], 5),
    ("vanilla_pg", ["tasks/mini_math.py:accuracy"], 3), ("dpo", ["x.py:f", "y"], 3)])
def test_models_are_policy_reference_rewards_and_critic(script, reward, number):
    assert compare.models({"script": script, "reward": reward}) == number


def test_the_algorithms_are_the_family_and_reinforce_without_a_baseline():
    assert list(compare.ALGORITHMS) == ["reinforce, no baseline", *FAMILY]
    flags = {name: flags for name, (_, flags) in compare.ALGORITHMS.items() if flags}
    assert flags == {"reinforce, no baseline": ["--baseline", "none"]}


def test_scripts_that_need_scores_of_0_and_1_run_on_mini_math_only(
        processes, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "measure", lambda folder, memory: {"peak MB": memory})
    monkeypatch.setattr(compare.plot, "main", lambda args: None)
    compare.main(compare.Args(algorithms=("rloo", "maxrl"), seeds=1, output=str(tmp_path / "new")))
    assert sorted(command[-1].removeprefix(f"{tmp_path}/new/")
                  for command in processes.commands) == [
        "mini_math/maxrl-1", "mini_math/rloo-1", "mini_tldr/rloo-1"]


def test_the_table_by_hand(tmp_path, capsys):
    """Mean ± the standard deviation of 1 and 2, which is 0.5.

    No decimals from 100 on; a dash where nothing is known.
    """
    row = lambda score, samples, gold: {"score": score, "samples": samples, "gold": gold}
    rows = {"raft": [row(0.5, 7, 1.0)],
            "rloo": [row(1.0, 100, None), row(2.0, 100, None)],
            "dpo": [row(-150.0, 99.0, 3.0), row(-150.0, 99.0, None)]}
    compare.table(tmp_path / "table.md", rows)
    table = ("| algorithm | score | samples | gold |\n| --- | --- | --- | --- |\n"
             "| raft | 0.50 ± 0.00 | 7.00 ± 0.00 | 1.00 ± 0.00 |\n"
             "| rloo | 1.50 ± 0.50 | 100 ± 0 | – |\n"
             "| dpo | -150 ± 0 | 99.00 ± 0.00 | 3.00 ± 0.00 |\n")
    assert (tmp_path / "table.md").read_text() == table == capsys.readouterr().out


@pytest.fixture
def processes(monkeypatch):
    """Fake processes, which only note their commands, and end as `processes.status` says."""
    seen = SimpleNamespace(commands=[], status=0)

    def start(command, cwd, stdout, stderr, env):
        assert cwd == compare.ROOT and env["OMP_NUM_THREADS"] == "1" and stdout is stderr
        seen.commands.append(command[1:])
        folder = Path(command[-1])
        folder.mkdir(parents=True)  # fails if it is there
        if not seen.status:
            (folder / "evaluation.json").write_text("{}")
        return SimpleNamespace(pid=7)

    def wait(pid, options):
        assert (pid, options) == (7, 0)  # which waits for the end
        return pid, seen.status, SimpleNamespace(ru_maxrss=3 * 1024)

    monkeypatch.setattr(compare.subprocess, "Popen", start)
    monkeypatch.setattr(compare.os, "wait4", wait)
    return seen


def test_a_run_is_made_once_and_again_if_it_was_interrupted(processes, tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        assert compare.run("rloo", ["--k", "2"], folder) == 3.0  # MB
    assert processes.commands == [["rloo.py", "--k", "2", "--eval-every", "10", "--eval-prompts",
                                   "256", "--output", str(folder)]]
    (folder / "evaluation.json").unlink()
    compare.run("rloo", ["--k", "2"], folder)
    assert len(processes.commands) == 2
    (folder / "peak_memory.json").unlink()
    assert compare.run("rloo", ["--k", "2"], folder) is None


def test_a_run_that_fails_ends_the_comparison_and_names_its_log(processes, tmp_path):
    processes.status = 256
    with pytest.raises(SystemExit) as stopped:
        compare.run("rloo", [], tmp_path / "run")
    assert f"its output is in {tmp_path / 'run'}.log" in stopped.value.code
    assert not (tmp_path / "run" / "peak_memory.json").exists()


def test_every_algorithm_runs_with_every_seed_and_is_drawn(processes, tmp_path, monkeypatch):
    drawn, flags, base = [], compare.TASKS["mini_math"], tmp_path / "new" / "runs"
    monkeypatch.setattr(compare, "measure", lambda folder, memory: {
        "seed": int(folder.name[-1]), "peak MB": memory})
    monkeypatch.setattr(compare.plot, "main", drawn.append)
    names = "reinforce, no baseline", "dpo"
    args = compare.Args(("mini_tldr", "mini_math"), names, seeds=2, output=str(base))
    compare.main(args)
    found = {command[-1]: command[:-6] for command in processes.commands}
    wanted, none = {}, ["--baseline", "none"]
    for seed in (1, 2):
        for folder, *command in (
                ("mini_tldr/reinforce-no-baseline", "reinforce.py", *none),
                ("mini_tldr/dpo", "dpo.py"),
                ("mini_math/reinforce-no-baseline", "reinforce.py", *none, *flags[0]),
                ("mini_math/dpo", "dpo.py", *flags[1])):
            wanted[f"{base}/{folder}-{seed}"] = [*command, "--seed", str(seed)]
    assert found == wanted
    assert (base / "compare-mini_math.md").read_text().splitlines()[2:] == [
        "| reinforce, no baseline | 1.50 ± 0.50 | 3.00 ± 0.00 |",
        "| dpo | 1.50 ± 0.50 | 3.00 ± 0.00 |"]
    assert [picture.y for picture in drawn] == [
        ("eval/score", "eval/gold", "eval/win_rate", "eval/kl"), ("eval/score", "eval/kl")]
    for task, picture in zip(("mini_tldr", "mini_math"), drawn, strict=True):
        assert picture.output == f"{base}/compare-{task}.png"
        assert picture.runs == tuple(sorted(folder for folder in found if task in folder))
        assert picture.x == "samples"
    compare.main(args)
    assert len(processes.commands) == 8  # none is made again
