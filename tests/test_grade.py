"""exercises/grade.py: thresholds, budgets, prescribed flags; the rubric says what its runs say."""

import json
import re
import statistics
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from exercises import grade

RUBRIC = Path(grade.__file__).with_name("rubric.json")
GOOD = {"gold": 5.8, "win_rate": 0.6, "kl": 3.0, "length": 19.0}


@pytest.fixture
def write_run(tmp_path):
    """A finished run's folder, as a Run writes it."""
    def write(name="run", after=GOOD, logged=None, samples=4800, **flags):
        folder = tmp_path / name
        settings = {"script": "rloo", "seed": 1, **json.loads(RUBRIC.read_text())["flags"], **flags}
        with SummaryWriter(folder) as writer:
            for step, share in ((0, 0.0), (25, 0.5), (75, 1.0)):
                for metric, value in (logged or after).items():
                    writer.add_scalar(f"eval/{metric}", value * share, step)
            writer.add_scalar("time/samples", samples / 3, 25)
            writer.add_scalar("time/samples", samples, 75)
        (folder / "args.json").write_text(json.dumps(settings))
        (folder / "evaluation.json").write_text(json.dumps({"before": {}, "after": after}))
        return str(folder)
    return write


def run(*folders, **flags):
    """The exit code of a grading."""
    with pytest.raises(SystemExit) as stopped:
        grade.main(grade.Args(runs=folders, **flags))
    return stopped.value.code


def test_a_good_run_gets_all_points(write_run, tmp_path, capsys):
    assert not run(write_run(), json=str(tmp_path / "results.json"))
    assert "10 of 10 points" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["score"] == 10 == sum(test["max_score"] for test in results["tests"])
    assert {test["status"] for test in results["tests"]} == {"passed"}
    assert {"name", "score", "max_score", "output"} <= results["tests"][0].keys()


@pytest.mark.parametrize("metric, value, points", [
    ("gold", 5.3, 6), ("win_rate", 0.5, 8), ("kl", 5.5, 8), ("length", 12.0, 9),
    ("length", 31.0, 9)])
def test_each_threshold_counts(metric, value, points, write_run, capsys):
    assert run(write_run(after=GOOD | {metric: value}))
    assert f"{points} of 10 points" in capsys.readouterr().out


def test_a_threshold_is_met_by_its_value():
    for bound, met in (("at least", [False, True, True]), ("at most", [True, True, False])):
        threshold = {"metric": "kl", "bound": bound, "value": 2.0}
        assert [grade.meets(threshold, {"kl": value}) for value in (1.9, 2.0, 2.1)] == met


@pytest.mark.parametrize("changes, reason", [
    ({"samples": 4864}, "4,864 samples, over the budget of 4,800"),
    ({"temperature": 0.1}, "--temperature is 0.1, not 0.7"),
    ({"reward": ["tasks/mini_tldr.py:gold_reward"]},
     "--reward is ['tasks/mini_tldr.py:gold_reward']"),
    ({"reference": "runs/other/model"}, "--reference is runs/other/model, not None"),
    ({"eval_prompts": 16}, "--eval-prompts is 16, not 256"),
])
def test_a_run_that_is_not_comparable_gets_no_points(changes, reason, write_run, tmp_path, capsys):
    assert run(write_run(**changes), json=str(tmp_path / "results.json"))
    text, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert f"not graded: {reason}" in text and "0 of 10 points" in text
    assert results["score"] == 0 and reason in results["tests"][0]["output"]


def test_several_runs(write_run, capsys):
    assert run(write_run("a"), write_run("b", after=GOOD | {"gold": 5.0}))
    assert re.findall(r"(\d+) of 10 points", capsys.readouterr().out) == ["10", "6"]


def test_the_shipped_thresholds_follow_from_their_runs():
    for threshold in json.loads(RUBRIC.read_text())["thresholds"]:
        mean, std = statistics.mean(threshold["runs"]), statistics.stdev(threshold["runs"])
        margin = {"at least": -grade.MARGIN, "at most": grade.MARGIN}[threshold["bound"]] * std
        assert len(threshold["runs"]) == 5
        assert threshold["value"] == pytest.approx(mean + margin, abs=0.006)


def test_calibration(write_run, tmp_path, capsys):
    golds = [5.6, 5.7, 5.8, 5.9, 6.0]
    folders = tuple(write_run(f"run{gold}", after=GOOD | {"gold": gold}) for gold in golds)
    path = tmp_path / "my.json"
    rubric = json.loads(RUBRIC.read_text())
    rubric["thresholds"] = [{"metric": "gold", "bound": "at least", "points": 3},
                            {"metric": "gold", "bound": "at most", "points": 1}]
    path.write_text(json.dumps(rubric))
    grade.main(grade.Args(runs=folders, rubric=str(path), calibrate=True))
    low, high = json.loads(path.read_text())["thresholds"]
    assert (low["value"], high["value"]) == (5.17, 6.43)  # 5.8 -+ 4 * 0.1581
    assert not run(folders[0], rubric=str(path)) and "4 of 4 points" in capsys.readouterr().out


def write_rubric(path, *thresholds):
    """A rubric's file without prescribed flags."""
    path.write_text(json.dumps({"samples": 4800, "flags": {}, "thresholds": thresholds}))
    return str(path)


def test_bad_input_is_one_line(write_run, tmp_path, capsys):
    good, unfinished = write_run("good"), write_run("unfinished")
    edited = write_run("edited", logged=GOOD | {"kl": 9.0})
    (Path(unfinished) / "evaluation.json").unlink()
    damaged = write_run("damaged")
    (Path(damaged) / "evaluation.json").write_text("{")
    (tmp_path / "wrong.json").write_text('{"samples": 1}')
    wrong = str(tmp_path / "wrong.json")
    gold = {"metric": "gold", "bound": "at least", "points": 1, "value": 5.0}
    kl = {"metric": "kl", "bound": "at most"}
    without_value = write_rubric(tmp_path / "open.json",
                                 {"metric": "beauty", "bound": "at least", "points": 1})
    without_points = write_rubric(tmp_path / "half.json", gold, kl)
    partly_open = write_rubric(tmp_path / "part.json", gold, kl | {"points": 1})
    gsm = write_run("gsm", after={"score": 1.0})
    for folders, flags, message in [
        ((), {}, "name at least one run folder"),
        ((str(tmp_path / "no"),), {}, "is not a run folder"),
        ((unfinished,), {}, "has no evaluation.json: the run has not finished"),
        ((edited,), {}, "does not say what the run has logged"),
        ((damaged,), {}, "does not say what the run has logged"),
        ((gsm,), {}, "its evaluation has no gold"),
        ((good,), {"rubric": "no.json"}, "--rubric no.json: no such file"),
        ((good,), {"rubric": wrong}, "not a rubric"),
        ((good,), {"rubric": without_points}, "not a rubric"),
        ((good,), {"rubric": partly_open}, "has thresholds without a value"),
        ((good, good), {"json": "x.json"}, "--json x.json: holds one grade"),
        ((good,), {"json": str(tmp_path / "missing" / "x.json")}, "x.json: there is no folder"),
        ((good,), {"rubric": without_value},
         "has thresholds without a value; set them with --calibrate"),
        ((good,) * 3, {"rubric": without_value, "calibrate": True}, "its evaluation has no beauty"),
        ((good, good), {"calibrate": True}, "2 runs say nothing about the spread"),
    ]:
        assert run(*folders, **flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
