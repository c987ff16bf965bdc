"""lab/papers.py: statistics by hand, sweeps with fake runs, commands, the page and its numbers."""

import importlib
import json
import math
import re
import shlex
from dataclasses import replace

import matplotlib.image
import pytest
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from lab import papers
from lab.experiments import EXPERIMENTS, RATES, TUNED, Claim, Experiment

RUN = {"updates": [0, 20, 40], "score": [0.0, 1.0, 3.0], "gold": [4.0, 6.0, 5.0],
       "kl": [0.0, 2.0, 4.0], "samples": [0, 16, 32], "clipfrac": 0.25, "seconds": math.e}


def arms(**values):
    """Arms whose runs have nothing but a "height": label -> list of one number per seed."""
    return {label: {"runs": {str(seed): {"height": number}
                             for seed, number in enumerate(numbers, 1)}}
            for label, numbers in values.items()}


def test_intervals_by_hand():
    """Of 1 ... 5 and of 0 and 2.

    std sqrt(2.5), divided by sqrt(5) 0.70711, times 2.77645; std sqrt(2), half-width 12.7062.
    """
    wanted = (3, 3 - 1.96325, 3 + 1.96325)
    assert papers.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(wanted, abs=1e-4)
    assert papers.interval([0.0, 2.0]) == pytest.approx((1, -11.7062, 13.7062))


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 19, 30])
def test_tails_are_what_the_density_leaves(df):
    """Student's t, integrated from 0; beyond the quantile there is a fortieth on each side."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    for t in (0.0, 0.3, 1.0, 4.0, papers.quantile(df)):
        x = torch.linspace(0, t, 20_001, dtype=torch.float64)
        inside = torch.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x).item()
        both = papers.tails(t, df), papers.tails(-t, df)
        assert both[0] == both[1] == pytest.approx(1 - 2 * inside, abs=1e-7)
    assert papers.tails(papers.quantile(df), df) == pytest.approx(0.05, abs=1e-12)


def test_p_values_by_hand():
    """0 and 2: t is 1 with one degree of freedom, a half. The others decide nothing, or all."""
    assert papers.p_value([0.0, 2.0]) == pytest.approx(0.5)
    assert papers.p_value([1.0, math.nan]) == papers.p_value([0.0, 0.0]) == 1
    assert papers.p_value([2.0, 2.0]) == 0
    values = [0.1, 0.5, 0.2, 0.9]
    mean, low, _ = papers.interval(values)
    edge = [value - low for value in values]  # an interval that begins at 0
    assert papers.p_value(edge) == pytest.approx(0.05)


@pytest.mark.parametrize("p_values, sure", [
    # The third is below 3/5 of 5%, and takes the second with it, which is not below 2/5.
    ([0.9, 0.029, 0.001, 0.025, 0.041], [False, True, True, True, False]),
    ([0.06, 0.9], [False, False]), ([0.04], [True]), ([0.02, 0.9], [True, False]),
    ([0.03, 0.9], [False, False])])
def test_discoveries_by_hand(p_values, sure):
    assert papers.discoveries(p_values) == sure


@pytest.mark.parametrize("low, high, said", [
    (0.1, 0.3, "holds"), (-0.3, -0.1, "does not hold"), (-0.1, 0.3, "cannot tell"),
    (0.0, 0.3, "cannot tell"), (0.0, 0.0, "does not hold"), (math.nan, math.nan, "cannot tell")])
def test_verdicts(low, high, said):
    assert papers.verdict(low, high) == said


def test_differences_are_taken_seed_by_seed():
    """The seeds differ by far more than the arms do, and yet the claim holds."""
    claim, a = Claim("", "height", ("a",), ("b",)), [1.0, 11.0, 21.0]
    found = papers.judge(claim, arms(a=a, b=[0.5, 10.0, 20.5]))  # 0.5, 1, 0.5: half-width 0.717
    assert found[0] == pytest.approx(2 / 3) and found[3] == "cannot tell"
    mean, low, high, *found = papers.judge(claim, arms(a=a, b=[0.5, 10.4, 20.5]))
    assert mean == pytest.approx(1.6 / 3)
    assert (low, high) == pytest.approx((0.3899, 0.6768), abs=1e-4)
    assert found == ["holds", papers.p_value([0.5, 0.6, 0.5])]


def test_claims_add_and_subtract_arms_and_a_threshold():
    """(a + b) - c - 1, by seed: 1 + 2 - 1 - 1 = 1 and 3 + 4 - 2 - 1 = 4."""
    claim = Claim("", "height", ("a", "b"), ("c",), 1.0)
    mean, low, high, *_ = papers.judge(claim, arms(a=[1.0, 3.0], b=[2.0, 4.0], c=[1.0, 2.0]))
    assert (mean, high - mean) == pytest.approx((2.5, 1.5 * 12.7062)) and low < 0


@pytest.mark.parametrize("metric, value", [
    ("score", 2.0), ("final gold", 5.0), ("growth of score", 3.0), ("fall of gold", 1.0),
    ("clipfrac", 0.25), ("log seconds", 1.0), ("score at update 20", 1.0), ("gold at KL 0.5", 5.0),
    ("score each 32", 3.0), ("score at KL 3", 1 + 2 * (3**0.5 - 2**0.5) / (2 - 2**0.5))])
def test_measures_by_hand(metric, value):
    assert papers.measure(RUN, metric) == pytest.approx(value)


def test_a_kl_that_one_run_never_reaches_decides_nothing():
    assert math.isnan(papers.measure(RUN, "gold at KL 5"))
    assert math.isnan(papers.measure(RUN, "variance"))
    further = RUN | {"kl": [0.0, 2.0, 9.0]}
    found = papers.judge(Claim("", "gold at KL 5", ("a",)),
                         {"a": {"runs": {"1": RUN, "2": further, "3": further}}})
    assert found[3] == "cannot tell"


def test_evaluated_policies_are_measured_by_evaluate():
    assert papers.measure(RUN | {"tax": {"score": 7.0}}, "score") == 7.0


def test_the_rate_with_the_highest_score_is_chosen():
    runs = {f"{name} --lr {rate}": {"runs": {"100": {"score": [9.0, abs(i - j % 3) * -1.0]}}}
            for j, name in enumerate(TUNED) for i, rate in enumerate(RATES)}
    assert papers.chosen_rates(runs) == {name: RATES[j % 3] for j, name in enumerate(TUNED)}


# ------------------------------------------------------------------------------------------- sweeps


class FakeRuns:
    """Runs that only note their command, and fail after `most` of them."""

    def __init__(self):
        self.done, self.most = [], 100

    def __call__(self, context, function, log, command, folder):
        (folder / "checkpoints").mkdir(parents=True)  # fails if the folder is there
        papers.require(len(self.done) < self.most, "out of disk space")
        (folder / "note.json").write_text(json.dumps({"command": command}))
        self.done.append(command)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Two experiments of two arms that share one, with fake runs."""
    def pair(a, b):
        return Experiment("", "", {k: f"rloo.py --k {k}" for k in (a, b)}, [], [], seeds=2)

    runs = FakeRuns()
    monkeypatch.setattr(papers, "EXPERIMENTS", {"first": pair("2", "3"), "second": pair("3", "4")})
    monkeypatch.setattr(papers, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(papers.kill, "processes", lambda: None)
    monkeypatch.setattr(papers, "read_numbers",
                        lambda folder: json.loads((folder / "note.json").read_text()))
    monkeypatch.setattr(papers, "call", runs)
    return runs


def test_runs_that_experiments_share_are_made_once(fake, tmp_path):
    papers.sweep(["first", "second"], {"rloo.py": "0.1"},
                 papers.Args(output=str(tmp_path / "new" / "runs")))
    assert len(fake.done) == len(set(fake.done)) == 6
    runs = papers.read("second")["3"]["runs"]
    assert runs["2"]["command"] == f"rloo.py --k 3 --lr 0.1 {papers.EVERY_RUN} --seed 2"
    assert runs == papers.read("first")["3"]["runs"]


def test_an_interrupted_sweep_goes_on(fake, tmp_path):
    args = papers.Args(output=str(tmp_path / "runs"), jobs=1)
    fake.most = 3
    with pytest.raises(SystemExit):
        papers.sweep(["first"], {"rloo.py": "0.1"}, args)
    assert len(fake.done) == 3 and papers.read("first") is None
    fake.most = 100
    papers.sweep(["first"], {"rloo.py": "0.1"}, args)
    assert len(fake.done) == len(set(fake.done)) == 4
    assert [sorted(arm["runs"]) for arm in papers.read("first").values()] == [["1", "2"]] * 2


def test_saved_numbers_are_not_computed_again(fake, tmp_path):
    """Without the runs' folders: a reader has only docs/results. They are of one learning rate."""
    papers.sweep(["first"], {"rloo.py": "0.1"}, papers.Args(output=str(tmp_path / "runs")))
    before = papers.read("first")
    papers.sweep(["first"], {"rloo.py": "0.1"}, papers.Args(output=str(tmp_path / "elsewhere")))
    assert len(fake.done) == 4 and papers.read("first") == before
    papers.sweep(["first"], {"rloo.py": "0.2"}, papers.Args(output=str(tmp_path / "elsewhere")))
    assert len(fake.done) == 8
    again = papers.Args(output=str(tmp_path / "third"), again=True)
    papers.sweep(["first"], {"rloo.py": "0.2"}, again)
    assert len(fake.done) == 12


def test_the_length_of_wrong_answers_is_that_of_the_wrong_ones(tmp_path):
    """Of four answers on mini math two are wrong before training, with 2 and 5 tokens, then one."""
    (tmp_path / "args.json").write_text(json.dumps({"dataset": "tasks/mini_math.py:prompts"}))
    (tmp_path / "cost.json").write_text(json.dumps({"cpu_seconds": 7.129, "peak_mb": 3.0}))
    with SummaryWriter(tmp_path) as writer:
        for step, score in ((0, 0.5), (1, 0.25), (2, 0.75)):
            writer.add_scalar("eval/score", score, step)
        for step, samples in ((1, 8), (2, 16)):
            writer.add_scalar("time/samples", samples, step)
            writer.add_scalar("time/seconds", 1.5 * samples, step)
            writer.add_scalar("policy/clipfrac", 0.125 * step, step)

    def values(scores, lengths):
        return {"score": torch.tensor(scores), "length": torch.tensor(lengths)}, []

    state = {"before": values([1.0, 0, 0, 1], [9.0, 2, 5, 9]),
             "after": values([1.0, 1, 0, 1], [1.0, 1, 4, 1])}
    (tmp_path / "checkpoints" / "000002").mkdir(parents=True)
    torch.save({"state": state}, tmp_path / "checkpoints" / "000002" / "state.pt")
    assert papers.read_numbers(tmp_path) == {
        "updates": [0, 1, 2], "samples": [0, 8, 16], "score": [0.5, 0.25, 0.75],
        "clipfrac": 0.1875, "seconds": 12.0, "wrong_length_before": 3.5, "wrong_length_after": 4.0,
        "growth_of_wrong": 0.5, "cpu_seconds": 7.13, "peak_mb": 3.0}


@pytest.mark.slow
def test_a_real_run_with_its_evaluation(context, world, tmp_path, monkeypatch):
    """The numbers are those of the log, the cost is counted, and a second call runs nothing."""
    def call(context, function, log, *values):  # the evaluation, with the tiny world's models
        if function is papers.evaluate.main:
            values = [replace(values[0], reference=world.policy, reward=(world.reward,),
                              judge="reward", gold="none", dataset=world.data, eval_prompts=4,
                              max_new_tokens=6)]
        isolated(context, function, log, *values)

    isolated = papers.call
    monkeypatch.setattr(papers, "call", call)
    command = (f"rloo.py --model {world.policy} --reward {world.reward} --gold none "
               f"--dataset {world.data} --k 2 --num-updates 2 --prompts-per-step 4 "
               "--max-new-tokens 6 --eval-prompts 4 --eval-every 1 --device cpu")
    monkeypatch.setattr(papers, "folder_of", lambda command, seed, output: tmp_path / f"run{seed}")
    found = papers.finish(context, command, 3, True, None)
    _, scalars = papers.plot.read_run(tmp_path / "run3")
    assert found["updates"] == [0, 1, 2] and found["samples"] == [0, 8, 16]
    assert found["score"] == pytest.approx(list(scalars["eval/score"].values()), abs=1e-4)
    assert found["cpu_seconds"] > found["seconds"] > 0 and found["tax"]["perplexity"] > 1
    assert "--seed 3" in (tmp_path / "run3.log").read_text()
    assert papers.finish(None, command, 3, True, None) == found


@pytest.mark.slow
def test_a_failing_run_names_its_log(context, tmp_path, capsys):
    log = tmp_path / "run9.log"
    with pytest.raises(SystemExit):
        papers.call(context, papers.train, str(log), "rloo.py --k 1", tmp_path / "run9")
    assert str(log) in capsys.readouterr().err and "--k 1" in log.read_text()


@pytest.fixture
def figures(monkeypatch):
    """The pictures that are drawn."""
    found = []
    monkeypatch.setattr(papers.plot.plt, "close", found.append)
    return found


def test_a_picture_by_hand(fake, figures):
    """Scores of 1 and 3: mean 2, half-width 12.7062. The second arm's interval has no width."""
    more = RUN | {"score": [0.0, 3.0, 5.0], "kl": [0.0, 6.0, 14.0], "gold": [4.0, 8.0, 5.0],
                  "seconds": 3 * math.e}
    papers.EXPERIMENTS["first"].panels = [("updates", "score"), ("√kl", "gold"), ("", "seconds")]
    papers.RESULTS.mkdir()
    papers.draw("first",
                {"2": {"runs": {"1": RUN, "2": more}}, "3": {"runs": {"1": RUN, "2": RUN}}})
    height, width, _ = matplotlib.image.imread(papers.RESULTS / "first.png").shape
    assert width > 2 * height > 200
    (figure,) = figures
    curves, roots, points = figure.axes
    ours, theirs = curves.lines
    assert ours.get_xydata().tolist() == [[0, 0], [20, 2], [40, 4]]
    assert theirs.get_xydata().tolist() == [[0, 0], [20, 1], [40, 3]]
    band, narrow = ({*map(tuple, area.get_paths()[0].vertices.round(3))}
                    for area in curves.collections)
    assert band == {(0, 0), (20, -10.706), (20, 14.706), (40, -8.706), (40, 16.706)}
    assert narrow == {(0, 0), (20, 1), (40, 3)}
    assert roots.lines[0].get_xydata().round(9).tolist() == [[0, 4], [2, 7], [3, 5]]
    assert len(roots.collections) == 0  # the seeds differ in KL
    for i, (line, area) in enumerate(zip(points.lines[::3], points.collections)):
        mean, half = ((2 * math.e, 12.7062 * math.e), (math.e, 0))[i]
        assert line.get_xydata().tolist() == [[pytest.approx(mean), -i]]
        ends = [end for end, _ in area.get_segments()[0]]
        assert ends == pytest.approx([mean - half, mean + half])
    assert [label.get_text() for label in points.get_yticklabels()] == ["2", "3"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["steps (rollouts)", "√KL",
                                                           "CPU seconds per update"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["reward", "gold reward", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["2", "3"]


def test_the_numbers_of_a_run(tmp_path):
    """In the order of updates; seconds are per update; the share of clipped tokens is a mean."""
    with SummaryWriter(tmp_path) as writer:
        for step, score in ((0, 0.123456), (20, 2.0), (10, 1.0)):
            writer.add_scalar("eval/score", score, step)
            writer.add_scalar("eval/kl", score / 2, step)
        for step in range(1, 21):
            writer.add_scalar("time/samples", 16 * step, step)
            writer.add_scalar("time/seconds", 3.0 * step, step)
            writer.add_scalar("policy/clipfrac", 0.25 * (step % 2), step)
    (tmp_path / "args.json").write_text(json.dumps({"dataset": "tasks/mini_tldr.py:prompts"}))
    (tmp_path / "cost.json").write_text(json.dumps({"cpu_seconds": 61.23456, "peak_mb": 100.0}))
    assert papers.read_numbers(tmp_path) == {
        "updates": [0, 10, 20], "samples": [0, 160, 320], "score": [0.1235, 1.0, 2.0],
        "kl": [0.0617, 0.5, 1.0], "clipfrac": 0.125, "seconds": 3.0, "cpu_seconds": 61.23,
        "peak_mb": 100.0}


def test_the_longest_tuned_command_gives_the_rate():
    arms = {"a": "reinforce.py --baseline none --k 1", "b": "reinforce.py --k 1",
            "c": "rloo.py --lr 3"}
    rates = {"reinforce.py": "1", "reinforce.py --baseline none": "2"}
    assert papers.commands(Experiment("", "", arms, [], []), rates) == {
        "a": f"reinforce.py --baseline none --k 1 --lr 2 {papers.EVERY_RUN}",
        "b": f"reinforce.py --k 1 --lr 1 {papers.EVERY_RUN}",
        "c": f"rloo.py --lr 3 {papers.EVERY_RUN}"}


def test_rows_of_the_tables_by_hand(fake, monkeypatch):
    """Small numbers have four digits; a claim that a number is below a bound is told as such."""
    first = papers.EXPERIMENTS["first"]
    first.columns, first.source = ("score", "clipfrac", "variance"), "a paper"
    small = RUN | {"clipfrac": 0.001, "score": [0.0, 0.0, 0.0]}
    arms = {"2": {"runs": {"1": RUN, "2": RUN}}, "3": {"runs": {"1": small, "2": small}}}
    assert papers.arm_rows("first", arms) == [
        ["", "score", "clipfrac", "variance"], ["2", "2.00 ± 0.00", "0.25 ± 0.00", "–"],
        ["3", "0.0000 ± 0.0000", "0.0010 ± 0.0000", "–"]]
    first.claims = [Claim("grows", "growth of score", ("2",)),
                    Claim("more", "clipfrac", ("2",), ("3",), 0.2),
                    Claim("little", "clipfrac", (), ("3",), -0.05)]
    monkeypatch.setattr(papers, "saved", lambda: {"first": arms})
    told = [(said, cells[0], cells[2]) for said, cells in papers.claim_rows()]
    assert told == [("holds", "grows", "growth of score: 3.00 [3.00, 3.00] (above 0?)"),
                    ("holds", "more", "clipfrac: 0.25 [0.25, 0.25] (above 0.2?)"),
                    ("holds", "little", "clipfrac: 0.001 [0.001, 0.001] (below 0.05?)")]
    assert papers.claim_rows()[0][1] == [
        "grows", "a paper", told[0][2], "2", "**holds**", "holds",
        "`python -m lab.papers first --again`", "[first](results/first.png)"]


def test_the_list_says_what_was_run(fake, tmp_path, monkeypatch, capsys):
    """A run that two experiments share counts once."""
    papers.print_list()
    assert capsys.readouterr().out.count("not run yet") == 2
    monkeypatch.setattr(papers, "read_numbers", lambda folder: RUN | {"cpu_seconds": 90.0})
    claims = [Claim("a", "score", ("3",)), Claim("b", "score", ("3",), ("4",))]
    papers.EXPERIMENTS["second"].claims = claims
    papers.sweep(["first", "second"], {"rloo.py": "0.1"},
                 papers.Args(output=str(tmp_path / "runs")))
    papers.print_list()
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[1::2]] == [
        "4 runs, 6 CPU minutes; no claims", "4 runs, 6 CPU minutes; does not hold: 1, holds: 1"]
    assert papers.cost(papers.EXPERIMENTS) == (6, 9.0)


def test_what_is_run_and_drawn(monkeypatch):
    """First the learning rates; without --redraw. No panels, no picture."""
    calls = []

    def note(name, result):
        monkeypatch.setattr(papers, name,
                            lambda *given: calls.append((name, *given[:2])) or result)

    for name in ("sweep", "draw", "write_page", "print_list"):
        note(name, None)
    note("chosen_rates", "rates")
    monkeypatch.setattr(papers, "read", lambda name: f"arms of {name}")
    papers.main(papers.Args(("lr", "fig3")))
    assert calls == [
        ("sweep", ["lr"], {}), ("chosen_rates", "arms of lr"), ("sweep", ["lr", "fig3"], "rates"),
        ("draw", "fig3", "arms of fig3"), ("write_page",), ("print_list",)]
    calls.clear()
    papers.main(papers.Args(("all",), redraw=True))
    drawn = [name for _, *names in calls for name in names[:1]]
    assert drawn == [name for name in EXPERIMENTS if name != "lr"]
    calls.clear()
    papers.main(papers.Args())
    assert calls == [("print_list",)]


@pytest.mark.parametrize("flags, message", [
    ({"experiments": ("fig1", "fig9")}, "fig9: unknown experiment; choose from lr, fig2, "),
    ({"experiments": ("first",), "redraw": True}, "first: docs/results has no numbers of it yet"),
    ({"jobs": 0}, "--jobs 0: must be 1 or more"),
])
def test_bad_flags_get_one_line(flags, message, tmp_path, monkeypatch, capsys):
    if flags.get("redraw"):
        monkeypatch.setattr(papers, "RESULTS", tmp_path)
        monkeypatch.setitem(papers.EXPERIMENTS, "first", EXPERIMENTS["fig1"])
    with pytest.raises(SystemExit):
        papers.main(papers.Args(**flags))
    assert capsys.readouterr().err.startswith(f"error: {message}")


# ----------------------------------------------------------------------------- the real experiments


def test_every_command_parses():
    found = {command for experiment in EXPERIMENTS.values()
             for command in papers.commands(experiment, dict.fromkeys(TUNED, RATES[0])).values()}
    for command in found:
        script, *flags = shlex.split(command)
        module = importlib.import_module(script.removesuffix(".py"))
        tyro.cli(module.Args, args=[*flags, "--output", "x"])
    folders = {papers.folder_of(command, 1, "x").name for command in found}
    assert len(folders) == len(found) > 60 and max(map(len, folders)) < 230


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_are_about_the_experiments_arms(name):
    experiment = EXPERIMENTS[name]
    for claim in experiment.claims:
        assert {*claim.more, *claim.less} <= experiment.arms.keys()
    assert len({claim.text for claim in experiment.claims}) == len(experiment.claims)
    assert len(experiment.arms) <= len(papers.COLORS) or not experiment.panels


def test_the_page_agrees_with_the_saved_numbers(tmp_path, monkeypatch):
    page = papers.PAGE.read_text()
    monkeypatch.setattr(papers, "PAGE", tmp_path / "results.md")
    papers.PAGE.write_text(page)
    papers.write_page()
    assert papers.PAGE.read_text() == page


def sentences():
    """The page's sentences that draw conclusions, and the table of what each rests on."""
    text = papers.PAGE.read_text().partition("## What to make of it")[2].partition(papers.MARKER)[0]
    text, _, table = text.partition("<!--")
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    blocks = [" ".join(block.split()) for block in text.replace("\n- ", "\n\n").split("\n\n")]
    found = [sentence for block in blocks
             for sentence in re.split(r"(?<=[.)]) (?=[A-Z`*])", block) if sentence]
    return found, [line.split(" | ") for line in table.splitlines() if " | " in line]


def test_conclusions_say_no_more_than_the_verdicts_after_correction():
    """Every sentence rests on claims whose verdicts stand in the page's source, or on none."""
    judged, (found, table) = papers.judge_all(), sentences()
    assert len(found) > 30
    for words, experiment, claim, *verdict in table:
        assert any(words in sentence for sentence in found), words
        if experiment != "no claim":
            assert judged[experiment, claim][-1] == verdict[0], (words, claim)
    for sentence in found:
        rows = [row for row in table if row[0] in sentence]
        assert rows, f"rests on nothing: {sentence}"
        if {row[-1] for row in rows} == {"cannot tell"}:
            open_ = re.search("cannot be told|did not confirm", sentence)
            assert open_, f"sounds decided: {sentence}"


@pytest.mark.parametrize("edit", [
    # What is open, as if it were decided; another verdict than that of the numbers; nothing to
    # rest on.
    ("PPO and RAFT cannot be told\napart", "PPO and RAFT are\nthe same"),
    ("(gold) | cannot tell\nWhat was", "(gold) | holds\nWhat was"),
    ("*DPO is behind*", "*DPO is ahead*"), ("not\n  longer.\n", "not\n  longer. GRPO is best.\n"),
])
def test_a_sentence_that_says_more_is_noticed(edit, tmp_path, monkeypatch):
    page = papers.PAGE.read_text()
    assert page.count(edit[0]) == 1
    monkeypatch.setattr(papers, "PAGE", tmp_path / "results.md")
    papers.PAGE.write_text(page.replace(*edit))
    with pytest.raises(AssertionError):
        test_conclusions_say_no_more_than_the_verdicts_after_correction()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_saved_numbers_are_of_todays_commands(name):
    experiment, saved = EXPERIMENTS[name], papers.read(name)
    rates = {} if name == "lr" else papers.chosen_rates(papers.read("lr"))
    assert {label: arm["command"] for label, arm in saved.items()} == papers.commands(experiment,
                                                                                      rates)
    for arm in saved.values():
        assert sorted(map(int, arm["runs"])) == list(papers.seeds_of(experiment))
        assert all(("tax" in run) == experiment.tax for run in arm["runs"].values())
