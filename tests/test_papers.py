"""lab/papers.py: statistics by hand, sweeps with fake runs, commands, the page and its numbers."""

import functools
import importlib
import json
import math
import re
import shlex
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from lab import claims, intervals, page, papers, results, sweep
from lab.experiments import COMMON, EXPERIMENTS, PPO, RATES, TUNED, Claim, Experiment

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
    assert intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(wanted, abs=1e-4)
    assert intervals.interval([0.0, 2.0]) == pytest.approx((1, -11.7062, 13.7062))


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 19, 30])
def test_tails_are_what_the_density_leaves(df):
    """Student's t, integrated from 0; beyond the quantile there is a fortieth on each side."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    for t in (0.0, 0.3, 1.0, 4.0, intervals.quantile(df)):
        x = torch.linspace(0, t, 20_001, dtype=torch.float64)
        inside = torch.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x).item()
        both = intervals.tails(t, df), intervals.tails(-t, df)
        assert both[0] == both[1] == pytest.approx(1 - 2 * inside, abs=1e-7)
    assert intervals.tails(intervals.quantile(df), df) == pytest.approx(0.05, abs=1e-12)


def test_p_values_by_hand():
    """0 and 2: t is 1 with one degree of freedom, a half. The others decide nothing, or all."""
    assert intervals.p_value([0.0, 2.0]) == pytest.approx(0.5)
    assert intervals.p_value([1.0, math.nan]) == intervals.p_value([0.0, 0.0]) == 1
    assert intervals.p_value([2.0, 2.0]) == 0
    values = [0.1, 0.5, 0.2, 0.9]
    mean, low, _ = intervals.interval(values)
    edge = [value - low for value in values]  # an interval that begins at 0
    assert intervals.p_value(edge) == pytest.approx(0.05)


@pytest.mark.parametrize("p_values, sure", [
    # The third is below 3/5 of 5%, and takes the second with it, which is not below 2/5.
    ([0.9, 0.029, 0.001, 0.025, 0.041], [False, True, True, True, False]),
    ([0.06, 0.9], [False, False]), ([0.04], [True]), ([0.02, 0.9], [True, False]),
    ([0.03, 0.9], [False, False])])
def test_discoveries_by_hand(p_values, sure):
    assert intervals.discoveries(p_values) == sure


@pytest.mark.parametrize("low, high, margin, said", [
    (0.1, 0.3, 0.5, "holds"), (-0.3, -0.1, 0.5, "does not hold"), (-0.1, 0.3, 0.0, "cannot tell"),
    (0.0, 0.3, 0.0, "cannot tell"), (0.0, 0.0, 0.0, "does not hold"),
    (math.nan, math.nan, 0.5, "cannot tell"), (-0.1, 0.3, 0.31, "too small"),
    (-0.1, 0.3, 0.3, "cannot tell"), (-0.3, 0.1, 0.3, "cannot tell")])
def test_verdicts(low, high, margin, said):
    assert intervals.verdict(low, high, margin) == said


def test_the_variance_of_prompts_is_added_once():
    """Seeds 1 ... 5 have a squared error of 0.5; prompts add 0.5 more: sqrt 1 times 2.77645."""
    mean, low, high = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.5)
    assert (mean, high - mean, mean - low) == pytest.approx((3, 2.77645, 2.77645), abs=1e-4)
    assert intervals.p_value([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == intervals.tails(3.0, 4)


def test_the_variance_of_prompts_by_hand():
    """A mean over prompts: pseudo-values are the prompts' numbers less their mean.

    1, 2, 6 and 1, 4, 4: deviations -2, -1, 3 and -2, 1, 1, covariance (4 - 1 + 3) / 2 = 3, over 3
    prompts 1. Prompts on which the halves disagree add nothing.
    """
    def effect(half, left_out):
        kept = [value for i, value in enumerate(half) if i != left_out]
        return sum(kept) / len(kept)

    assert intervals.prompt_variance(effect, [[1, 2, 6], [1, 4, 4]], 3) == pytest.approx(1)
    assert intervals.prompt_variance(effect, [[1, 2, 6], [6, 2, 1]], 3) == 0
    assert intervals.prompt_variance(lambda *_: math.nan, [[1, 2], [1, 2]], 2) == 0


def test_intervals_cover_other_seeds_and_other_prompts():
    """Of 300 simulated claims, with 8 seeds, 20 prompts and noise: about 95%, and 60% without.

    The true mean is 0. A seed adds noise of 0.1, a prompt of 1, each response of 1.
    """
    rng, covered, narrow = np.random.default_rng(0), 0, 0
    for _ in range(300):
        table = (rng.normal(0, 0.1, (8, 1)) + rng.normal(0, 1, 20) + rng.normal(0, 1, (8, 20)))

        def effect(half, left_out):
            means = table[half::2].mean(0)
            return (means if left_out is None else np.delete(means, left_out)).mean()

        values = table.mean(1).tolist()
        spread = intervals.prompt_variance(effect, [0, 1], 20)
        _, low, high = intervals.interval(values, spread)
        covered += low < 0 < high
        _, low, high = intervals.interval(values)
        narrow += low < 0 < high
    assert 0.92 < covered / 300 < 0.99 and narrow / 300 < 0.75


def test_differences_are_taken_seed_by_seed():
    """The seeds differ by far more than the arms do, and yet the claim holds."""
    claim, a = Claim("", "height", ("a",), ("b",)), [1.0, 11.0, 21.0]
    found = claims.judge(claim, arms(a=a, b=[0.5, 10.0, 20.5]))  # 0.5, 1, 0.5: half-width 0.717
    assert found[0] == pytest.approx(2 / 3) and found[3] == "cannot tell"
    mean, low, high, *found, _ = claims.judge(claim, arms(a=a, b=[0.5, 10.4, 20.5]))
    assert mean == pytest.approx(1.6 / 3)
    assert (low, high) == pytest.approx((0.3899, 0.6768), abs=1e-4)
    assert found == ["holds", intervals.p_value([0.5, 0.6, 0.5])]


def test_claims_add_and_subtract_arms_and_a_threshold():
    """(a + b) - c - 1, by seed: 1 + 2 - 1 - 1 = 1 and 3 + 4 - 2 - 1 = 4."""
    claim = Claim("", "height", ("a", "b"), ("c",), 1.0)
    mean, low, high, *_ = claims.judge(claim, arms(a=[1.0, 3.0], b=[2.0, 4.0], c=[1.0, 2.0]))
    assert (mean, high - mean) == pytest.approx((2.5, 1.5 * 12.7062)) and low < 0


@pytest.mark.parametrize("metric, value", [
    ("score", 2.0), ("final gold", 5.0), ("growth of score", 3.0), ("fall of gold", 1.0),
    ("clipfrac", 0.25), ("log seconds", 1.0), ("score at update 20", 1.0), ("gold at KL 0.5", 5.0),
    ("score each 32", 3.0), ("score at KL 3", 1 + 2 * (3**0.5 - 2**0.5) / (2 - 2**0.5))])
def test_measures_by_hand(metric, value):
    assert results.measure(RUN, metric) == pytest.approx(value)


def test_a_kl_that_one_run_never_reaches_decides_nothing():
    assert math.isnan(results.measure(RUN, "gold at KL 5"))
    assert math.isnan(results.measure(RUN, "variance"))
    further = RUN | {"kl": [0.0, 2.0, 9.0]}
    found = claims.judge(Claim("", "gold at KL 5", ("a",)),
                         {"a": {"runs": {"1": RUN, "2": further, "3": further}}})
    assert found[3] == "cannot tell"


def test_evaluated_policies_are_measured_by_evaluate():
    assert results.measure(RUN | {"tax": {"score": 7.0}}, "score") == 7.0


def test_the_rate_with_the_highest_score_is_chosen():
    """In the mean over all seeds; one of them has another best rate. Nothing before all are in."""
    def run(height):
        return {"score": [9.0, height]}

    seeds = EXPERIMENTS["lr"].seeds
    runs = {f"{name} --lr {rate}": {"runs": {str(seed): run(-abs(i - j % 7) + 9.0 * (seed == i))
                                             for seed in seeds}}
            for j, name in enumerate(TUNED) for i, rate in enumerate(RATES)}
    assert claims.chosen_rates(runs) == {name: RATES[j % 7] for j, name in enumerate(TUNED)}
    del runs["rloo.py --lr 3e-3"]["runs"]["105"]
    assert claims.chosen_rates(runs) == claims.chosen_rates(None) == {}


@pytest.mark.parametrize("metric, by", [
    ("score", 2.0), ("final gold", 1.0), ("growth of score", 3.0), ("fall of gold", 1.0),
    ("score at update 20", 1.0), ("gold at KL 0.5", 1.0), ("clipfrac", 0.25), ("log seconds", 1.0),
    ("kl", 3.0)])
def test_what_training_changes_by_hand(metric, by):
    assert claims.change(RUN, metric) == pytest.approx(by)


def test_what_training_changes_is_not_the_whole_of_a_number_that_was_there_before(monkeypatch):
    """Wrong answers had 3 tokens and have 3.2; perplexity was 1.2 and is 1.5."""
    run = RUN | {"wrong_length_after": 3.2, "growth_of_wrong": 0.2,
                 "tax": {"perplexity": 1.5, "score": 2.0}}
    assert claims.change(run, "wrong_length_after") == 0.2
    monkeypatch.setattr(claims, "start", dict)
    assert claims.change(run, "perplexity") == 0
    monkeypatch.setattr(claims, "start", lambda: {"perplexity": 1.2, "score": 9.0})
    assert claims.change(run, "perplexity") == pytest.approx(0.3)
    assert claims.change(run, "score") == -7  # evaluate.py's of both


def test_a_difference_is_too_small_within_a_tenth_of_what_training_changes():
    """Heights 2 above the start: margin 0.2. A bound of 0.5 has none, nor has a single arm."""
    close = {"a": {"runs": {"1": RUN, "2": RUN}},
             "b": {"runs": {"1": RUN | {"score": [0.0, 1.0, 3.2]},
                            "2": RUN | {"score": [0.0, 1.0, 2.81]}}}}
    claim = Claim("", "score", ("a",), ("b",))
    assert claims.margin_of(claim, close) == pytest.approx(0.2, abs=1e-3)
    assert claims.judge(claim, close)[3] == "cannot tell"  # 2 seeds
    same = {"a": close["a"], "b": {"runs": {"1": RUN | {"score": [0.0, 1.0, 3.001]},
                                            "2": RUN | {"score": [0.0, 1.0, 2.998]}}}}
    assert claims.judge(claim, same)[3] == "too small"
    assert claims.margin_of(claim._replace(least=0.5), same) == 0
    assert claims.margin_of(claim._replace(less=()), same) == 0
    around = {label: {"runs": {"1": RUN, "2": RUN | {"score": [0.0, -1.0, -3.0]}}}
              for label in ("a", "b")}
    assert claims.margin_of(claim, around) == 0  # seeds go up and down: training changes nothing


def halves(odd, even):
    """An arm's numbers on each prompt, for two evaluations of which the first is all 0."""
    return {half: {"seeds": [seed], "curves": {"score": [[0.0] * len(values), values]}}
            for half, seed, values in (("odd", 1, odd), ("even", 2, even))}


def test_the_prompts_share_of_a_claim_by_hand():
    """a - b on three prompts is 1, 2, 6 in one half and 1, 4, 4 in the other, as above: 1."""
    run = {"updates": [0, 20], "samples": [0, 16], "score": [0.0, 1.0]}
    both = {"a": {"runs": {"1": run, "2": run}, "prompts": halves([2.0, 4, 9], [4.0, 5, 6])},
            "b": {"runs": {"1": run, "2": run}, "prompts": halves([1.0, 2, 3], [3.0, 1, 2])}}
    claim = Claim("", "score", ("a",), ("b",))
    assert claims.prompts_share(claim, both) == pytest.approx(1)
    assert claims.prompts_share(claim._replace(metric="clipfrac"), both) == 0
    for arm in both.values():  # what evaluate.py measures is the end of training
        arm["runs"]["1"] = run | {"tax": {"score": 1.0, "perplexity": 1.0}}
        for half in arm["prompts"].values():
            half["curves"]["score"].insert(1, [5.0, 0.0, 1.0])
    assert claims.prompts_share(claim, both) == pytest.approx(1)
    assert claims.prompts_share(claim._replace(metric="perplexity"), both) == 0
    nothing = {half: {"seeds": [seed], "curves": {}} for half, seed in (("odd", 1), ("even", 2))}
    others = {label: arm | {"prompts": nothing} for label, arm in both.items()}
    assert claims.prompts_share(claim._replace(metric="clipfrac"), others) == 0
    del both["b"]["prompts"]["even"]  # one seed so far
    assert claims.prompts_share(claim, both) == 0


# ------------------------------------------------------------------------------------------- sweeps


class FakeRuns:
    """Runs that only note their command, and fail after `most` of them."""

    def __init__(self):
        self.done, self.most = [], 100

    def __call__(self, context, function, log, command, folder, lag):
        (folder / "checkpoints").mkdir(parents=True)  # fails if the folder is there
        sweep.require(len(self.done) < self.most, "out of disk space")
        note = {"command": command, "prompts": {"score": [[0.0, 1.0], [len(self.done), 2.0]]}}
        (folder / "note.json").write_text(json.dumps(note))
        self.done.append(command)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Two experiments of two arms that share one, with fake runs."""
    def pair(a, b):
        arms = {k: f"rloo.py --k {k}" for k in (a, b)}
        claim = Claim("", "final score", (a,), (b,))
        return Experiment("", "", arms, [claim], [], seeds=range(1, 3), tuned=True)

    runs = FakeRuns()
    lr = Experiment("", "", {}, [], [], seeds=range(101, 103))
    real = dict(EXPERIMENTS)
    EXPERIMENTS.clear()
    EXPERIMENTS.update(lr=lr, first=pair("2", "3"), second=pair("3", "4"))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sweep.kill, "processes", lambda: None)
    monkeypatch.setattr(sweep, "read_numbers",
                        lambda folder: json.loads((folder / "note.json").read_text()))
    monkeypatch.setattr(sweep, "call", runs)
    yield runs
    EXPERIMENTS.clear()
    EXPERIMENTS.update(real)


def test_runs_that_experiments_share_are_made_once(fake, tmp_path):
    sweep.sweep(["first", "second"], {"rloo.py": "0.1"},
                 papers.Args(output=str(tmp_path / "new" / "runs")))
    assert len(fake.done) == len(set(fake.done)) == 6
    runs = results.read("second")["3"]["runs"]
    ends = f"--lr 0.1 {sweep.PROMPTS} {sweep.EVERY_RUN}"
    assert runs["2"]["command"] == f"rloo.py --k 3 {ends} --seed 2"
    assert runs == results.read("first")["3"]["runs"]


def test_a_run_is_made_once_if_one_of_its_experiments_has_it_evaluated(fake, tmp_path, monkeypatch):
    """Two jobs would write into one folder. The numbers go to the experiment that asks for them."""
    monkeypatch.setattr(sweep, "evaluated", lambda *_: {"perplexity": 1.5, "score": 9.0})
    EXPERIMENTS["second"].tax = True
    sweep.sweep(["first", "second"], {"rloo.py": "0.1"},
                papers.Args(output=str(tmp_path / "runs"), jobs=8))
    assert len(fake.done) == len(set(fake.done)) == 6
    assert results.read("second")["3"]["runs"]["1"]["tax"]["perplexity"] == 1.5
    assert not any("tax" in run for arm in results.read("first").values()
                   for run in arm["runs"].values())


def test_the_policy_that_runs_start_from_is_evaluated_once(fake, tmp_path, monkeypatch):
    """If an experiment asks for evaluate.py's numbers."""
    done = []

    def evaluated(context, policy, log, file):
        done.append(policy)
        return {"perplexity": 1.5}

    monkeypatch.setattr(sweep, "evaluated", evaluated)
    args = papers.Args(output=str(tmp_path / "runs"), jobs=1)
    sweep.sweep(["first"], {"rloo.py": "0.1"}, args)
    assert done == [] and results.start() == {}
    EXPERIMENTS["second"].tax = True
    sweep.sweep(["second"], {"rloo.py": "0.1"}, args)
    sweep.sweep(["second"], {"rloo.py": "0.2"}, args)
    assert done.count("tasks/mini_tldr-sft") == 1 and len(done) == 1 + 2 * 2 * 2
    assert results.start() == {"perplexity": 1.5}
    assert results.read("second")["3"]["runs"]["1"]["tax"] == {"perplexity": 1.5}


def test_an_interrupted_sweep_goes_on(fake, tmp_path):
    args = papers.Args(output=str(tmp_path / "runs"), jobs=1)
    fake.most = 3
    with pytest.raises(SystemExit):
        sweep.sweep(["first"], {"rloo.py": "0.1"}, args)
    assert len(fake.done) == 3 and results.read("first") is None
    kept = results.stored_arms("first")  # seed by seed: both arms have the first one
    assert [sorted(arm["runs"]) for arm in kept.values()] == [["1", "2"], ["1"]]
    fake.most = 100
    sweep.sweep(["first"], {"rloo.py": "0.1"}, args)
    assert len(fake.done) == len(set(fake.done)) == 4
    assert [sorted(arm["runs"]) for arm in results.read("first").values()] == [["1", "2"]] * 2


def test_no_run_starts_after_its_time(fake, tmp_path, monkeypatch):
    clock = iter([30.0, 50.0, 61.0, 70.0])
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(clock))
    sweep.sweep(["first"], {"rloo.py": "0.1"},
                 papers.Args(output=str(tmp_path / "runs"), jobs=1), 60.0)
    assert [command.split()[2] for command in fake.done] == ["2", "3"]


def test_more_seeds_are_added_to_those_that_are_there(fake, tmp_path):
    """Prompts' numbers are means over the odd and the even seeds: runs 0, 2 and 4, 6 of the arm."""
    args = papers.Args(output=str(tmp_path / "runs"), jobs=1)
    sweep.sweep(["first"], {"rloo.py": "0.1"}, args)
    EXPERIMENTS["first"].seeds = range(1, 5)
    sweep.sweep(["first"], {"rloo.py": "0.1"}, args)
    assert len(fake.done) == len(set(fake.done)) == 8
    arm = results.read("first")["2"]
    assert list(arm["runs"]) == ["1", "2", "3", "4"]
    assert arm["prompts"] == {
        "odd": {"seeds": [1, 3], "curves": {"score": [[0.0, 1.0], [2.0, 2.0]]}},
        "even": {"seeds": [2, 4], "curves": {"score": [[0.0, 1.0], [4.0, 2.0]]}}}
    assert all("prompts" not in run for run in arm["runs"].values())


def test_saved_numbers_are_not_computed_again(fake, tmp_path):
    """Without the runs' folders: a reader has only docs/results. They are of one learning rate."""
    sweep.sweep(["first"], {"rloo.py": "0.1"}, papers.Args(output=str(tmp_path / "runs")))
    before = results.read("first")
    sweep.sweep(["first"], {"rloo.py": "0.1"}, papers.Args(output=str(tmp_path / "elsewhere")))
    assert len(fake.done) == 4 and results.read("first") == before
    sweep.sweep(["first"], {"rloo.py": "0.2"}, papers.Args(output=str(tmp_path / "elsewhere")))
    assert len(fake.done) == 8
    again = papers.Args(output=str(tmp_path / "third"), again=True)
    sweep.sweep(["first"], {"rloo.py": "0.2"}, again)
    assert len(fake.done) == 12
    assert results.read("first")["2"]["prompts"]["odd"]["seeds"] == [1]


def test_how_far_a_rollouts_use_moves_the_policy(monkeypatch):
    """Ratios of 2 and 1/2: 2 - 1 - log 2 and 1/2 - 1 + log 2 add up to 1/2; over two rows 1/4.

    Twice the same policy, as where it rolls out until a batch is full, is no use of a rollout.
    """
    class Batch:
        old_logprobs = torch.zeros(2, 2)

    now, lags = [torch.zeros(2, 2)], []
    monkeypatch.setattr(sweep, "no_grad_logprobs", lambda *given: now[0])
    rollout = sweep.measured(lambda *given: Batch(), lags)
    rollout("policy", "tokenizer", [], 2, 1.0)
    rollout("policy", "tokenizer", [], 2, 1.0)
    assert lags == []
    now[0] = torch.tensor([[math.log(2), -math.log(2)], [0.0, 0.0]])
    rollout("policy", "tokenizer", [], 2, 1.0)
    assert lags == [pytest.approx(0.25)]


def test_the_length_of_wrong_answers_is_that_of_the_wrong_ones(tmp_path):
    """Of four answers on mini math two are wrong before training, with 2 and 5 tokens, then one."""
    (tmp_path / "args.json").write_text(json.dumps({"dataset": "tasks/mini_math.py:prompts"}))
    (tmp_path / "cost.json").write_text(json.dumps({"cpu_seconds": 7.129, "peak_mb": 3.0}))
    torch.save([{"score": torch.tensor([1.0, 0.0])}], tmp_path / "evaluations.pt")
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
    assert sweep.read_numbers(tmp_path) == {
        "updates": [0, 1, 2], "samples": [0, 8, 16], "score": [0.5, 0.25, 0.75],
        "clipfrac": 0.1875, "seconds": 12.0, "wrong_length_before": 3.5, "wrong_length_after": 4.0,
        "growth_of_wrong": 0.5, "cpu_seconds": 7.129, "peak_mb": 3.0,
        "prompts": {"score": [[1.0, 0.0]]}}


@pytest.mark.slow
def test_a_real_run_with_its_evaluation(context, world, tmp_path, monkeypatch):
    """The numbers are those of the log, the cost is counted, and a second call runs nothing."""
    def call(context, function, log, *values):  # the evaluation, with the tiny world's models
        if function is sweep.evaluate.main:
            values = [replace(values[0], reference=world.policy, reward=(world.reward,),
                              judge="reward", gold="none", dataset=world.data, eval_prompts=4,
                              max_new_tokens=6)]
        isolated(context, function, log, *values)

    isolated = sweep.call
    monkeypatch.setattr(sweep, "call", call)
    command = (f"rloo.py --model {world.policy} --reward {world.reward} --gold none "
               f"--dataset {world.data} --k 2 --num-updates 2 --prompts-per-step 4 "
               "--max-new-tokens 6 --eval-prompts 4 --eval-every 1 --device cpu")
    monkeypatch.setattr(sweep, "folder_of", lambda command, seed, output: tmp_path / f"run{seed}")
    job = command, 3, True, True
    found = sweep.finish(context, job, None)
    _, scalars = page.plot.read_run(tmp_path / "run3")
    assert found["updates"] == [0, 1, 2] and found["samples"] == [0, 8, 16]
    assert found["score"] == pytest.approx(list(scalars["eval/score"].values()), abs=1e-4)
    assert found["cpu_seconds"] > found["seconds"] > 0 and found["tax"]["perplexity"] > 1
    assert "--seed 3" in (tmp_path / "run3.log").read_text()
    assert np.mean(found["prompts"]["score"], axis=1) == pytest.approx(found["score"], abs=1e-4)
    assert found["lag"] > 0
    assert sweep.finish(None, job, None) == found


@pytest.mark.slow
def test_a_failing_run_names_its_log(context, tmp_path, capsys):
    log = tmp_path / "run9.log"
    with pytest.raises(SystemExit):
        sweep.call(context, sweep.train, str(log), "rloo.py --k 1", tmp_path / "run9", False)
    assert str(log) in capsys.readouterr().err and "--k 1" in log.read_text()


@pytest.fixture
def figures(monkeypatch):
    """The pictures that are drawn."""
    found = []
    monkeypatch.setattr(page.plot.plt, "close", found.append)
    return found


def test_a_picture_by_hand(fake, figures):
    """Scores of 1 and 3: mean 2, half-width 12.7062. The second arm's interval has no width."""
    more = RUN | {"score": [0.0, 3.0, 5.0], "kl": [0.0, 6.0, 14.0], "gold": [4.0, 8.0, 5.0],
                  "seconds": 3 * math.e}
    EXPERIMENTS["first"].panels = [("updates", "score"), ("√kl", "gold"), ("", "seconds")]
    results.RESULTS.mkdir()
    page.draw("first",
                {"2": {"runs": {"1": RUN, "2": more}}, "3": {"runs": {"1": RUN, "2": RUN}}})
    height, width, _ = matplotlib.image.imread(results.RESULTS / "first.png").shape
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
    assert [axis.get_xlabel() for axis in figure.axes] == ["steps (rollouts)", "√KL (√nats)",
                                                           "CPU seconds per update"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["reward", "gold reward", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["2", "3"]


def test_a_picture_against_the_number_that_is_varied(fake, figures):
    """One curve of two points, with the intervals of two runs each, and ticks where they are.

    Scores of 1 and 3, lags of 1 and 9: the latter's geometric mean is 3, and its interval a factor.
    """
    first = EXPERIMENTS["first"]
    first.panels, first.varied = [("", "score"), ("", "lag")], "k"
    first.points = {"2": ("RLOO", 2), "3": ("RLOO", 3)}
    results.RESULTS.mkdir()
    more = RUN | {"score": [0.0, 3.0, 5.0], "lag": 9.0}
    arms = {"2": {"runs": {"1": RUN | {"lag": 1.0}, "2": more}},
            "3": {"runs": {"1": more, "2": more}}}
    page.draw("first", arms)
    (figure,) = figures
    ends = []
    for axis, points in zip(figure.axes, ([[2, 3], [3, 4]], [[2, 3], [3, 9]])):
        assert axis.lines[0].get_xydata() == pytest.approx(np.array(points))
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "3"]
        wide, narrow = (line[:, 1] for line in axis.collections[0].get_segments())
        ends.append(wide)
        assert narrow.tolist() == pytest.approx([points[1][1]] * 2)
    assert ends[0] == pytest.approx([3 - 12.7062, 3 + 12.7062], abs=1e-3)
    assert np.log(ends[1] / 3) == pytest.approx(12.7062 * math.log(3) * np.array([-1, 1]), abs=1e-3)
    assert page.cell(arms["2"], "lag") == "3.00"
    assert figure.axes[0].get_xlabel() == "k"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["RLOO"]


def test_a_picture_of_learning_rates_shows_where_runs_start(fake, figures):
    """Start 1, best 3: a line at 1, and the axis from 0 to 3.4, although a curve falls to -50."""
    first = EXPERIMENTS["first"]
    first.panels, first.varied = [("", "final score"), ("", "final kl")], "learning rate"
    first.points = {"2": ("RLOO", 1e-4), "3": ("RLOO", 3e-3)}
    high, low = ({"score": [1.0, end], "kl": [0.0, 1.0]} for end in (3.0, -50.0))
    page.draw("first", {"2": {"runs": dict.fromkeys("12", high)},
                        "3": {"runs": dict.fromkeys("12", low)}})
    score, kl = figures[0].axes
    assert score.get_ylim() == pytest.approx((0.0, 3.4))
    assert [list(line.get_ydata()) for line in score.lines][-1] == [1.0, 1.0]
    assert len(kl.lines) == len(score.lines) - 1 and kl.get_yscale() == "log"
    assert [label.get_text() for label in score.get_xticklabels()] == ["0.0001", "0.003"]


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
    torch.save([{"kl": torch.tensor([0.5]), "eos_rate": torch.ones(1)}] * 2,
               tmp_path / "evaluations.pt")
    assert sweep.read_numbers(tmp_path) == {
        "updates": [0, 10, 20], "samples": [0, 160, 320], "score": [0.1235, 1.0, 2.0],
        "kl": [0.0617, 0.5, 1.0], "clipfrac": 0.125, "seconds": 3.0, "cpu_seconds": 61.2346,
        "peak_mb": 100.0, "prompts": {"kl": [[0.5], [0.5]]}}


def test_the_longest_tuned_command_gives_the_rate():
    """If the experiment is tuned; otherwise all have the common one, unless one is given."""
    arms = {"a": "reinforce.py --baseline none --k 1", "b": "reinforce.py --k 1",
            "c": "rloo.py --lr 3", "d": "rloo.py --lr 3 --eval-prompts 8"}
    rates = {"reinforce.py": "1", "reinforce.py --baseline none": "2"}
    ends = f"{sweep.PROMPTS} {sweep.EVERY_RUN}"
    wanted = {"a": f"reinforce.py --baseline none --k 1 --lr 2 {ends}",
              "b": f"reinforce.py --k 1 --lr 1 {ends}",
              "c": f"rloo.py --lr 3 {ends}",
              "d": f"rloo.py --lr 3 --eval-prompts 8 {sweep.EVERY_RUN}"}
    assert sweep.commands(Experiment("", "", arms, [], [], tuned=True), rates) == wanted
    common = sweep.commands(Experiment("", "", arms, [], []), rates)
    assert common == wanted | {"a": f"reinforce.py --baseline none --k 1 --lr {COMMON} {ends}",
                               "b": f"reinforce.py --k 1 --lr {COMMON} {ends}"}


def test_rows_of_the_tables_by_hand(fake, monkeypatch):
    """Small numbers have four digits; a claim that a number is below a bound is told as such."""
    first = EXPERIMENTS["first"]
    first.columns, first.source = ("score", "clipfrac", "variance"), "a paper"
    small = RUN | {"clipfrac": 0.001, "score": [0.0, 0.0, 0.0]}
    arms = {"2": {"runs": {"1": RUN, "2": RUN}}, "3": {"runs": {"1": small, "2": small}}}
    assert page.arm_rows("first", arms) == [
        ["", "score", "clipfrac", "variance"], ["2", "2.00 ± 0.00", "0.25 ± 0.00", "–"],
        ["3", "0.0000 ± 0.0000", "0.0010 ± 0.0000", "–"]]
    first.claims = [Claim("grows", "growth of score", ("2",)),
                    Claim("more", "clipfrac", ("2",), ("3",), 0.2),
                    Claim("little", "clipfrac", (), ("3",), -0.05)]
    monkeypatch.setattr(claims, "saved", lambda: {"first": arms})
    monkeypatch.setattr(page, "read", lambda name: arms)
    told = [(said, cells[0], cells[2]) for said, cells in page.claim_rows(claims.judge_all())]
    assert told == [("holds", "grows", "growth of score: 3.00 [3.00, 3.00] (above 0?)"),
                    ("holds", "more", "clipfrac: 0.25 [0.25, 0.25] (above 0.2?)"),
                    ("holds", "little", "clipfrac: 0.001 [0.001, 0.001] (below 0.05?)")]
    assert page.claim_rows(claims.judge_all())[0][1] == [
        "grows", "a paper", told[0][2], "–", "2", "**holds**", "holds",
        "`python -m lab.papers first --again`", "[first](results/first.png)"]


def test_the_table_of_learning_rates_by_hand():
    """The best mean score is not the best end; gold falls below its start, or else the score."""
    def run(score, gold, kl):
        return {"score": [0.0, *score], "gold": [4.0, 4.0, gold], "kl": [0.0, 1.0, kl]}

    low, best, high = run((1, 1), 5.0, 1.0), run((2, 1), 4.5, 2.0), run((0.5, 1.5), 3.5, 9.0)
    good = run((1.7, 1.0), 5.0, 1.0)  # 1.35 of 1.5
    runs = {f"{name} --lr {rate}": {"runs": dict.fromkeys("12", low)}
            for name in TUNED for rate in RATES}
    runs["rloo.py --lr 1e-4"]["runs"] = dict.fromkeys("12", good)
    runs["rloo.py --lr 6e-4"]["runs"] = dict.fromkeys("12", best)
    runs["rloo.py --lr 3e-3"]["runs"] = {"1": high, "2": run((0.5, 1.5), 4.3, 9.0)}  # 3.9
    rows = page.rate_rows("lr", runs)
    assert rows[0] == ["", "best rate", "score there", "final score there", "final gold there",
                       "final kl there", "rises nine tenths as much at",
                       "ends below its start from"]
    assert rows[1] == ["rloo.py", "6e-4", "1.50 ± 0.00", "1.00 ± 0.00", "4.50 ± 0.00",
                       "2.00 ± 0.00", "1e-4, 6e-4", "3e-3"]
    assert rows[2][:2] == ["raft.py", "2.5e-5"] and rows[2][-1] == "–" and len(rows) == 15
    for label, arm in runs.items():
        end = -1.0 if label == "rloo.py --lr 1e-3" else 1.0
        arm["runs"] = {"1": {"score": [0.0, end]}}
    assert claims.breaking_rate(runs, "rloo.py") == "1e-3"


def test_the_largest_difference_is_a_share_of_what_training_changes(fake, monkeypatch):
    """Two runs gain 2.2 and two gain 2: the difference is 0.2 in each seed, and 0.2 / 2.1 is 10%.

    In a mean over the evaluations after the start; a number like those of the first arm is 0%.
    """
    more = RUN | {"score": [0.0, 1.2, 3.2]}
    arms = {"2": {"runs": {"1": more, "2": more}}, "3": {"runs": {"1": RUN, "2": RUN}},
            "4": {"runs": {"1": RUN, "2": RUN}}}
    EXPERIMENTS["first"].claims = [Claim("a", "score", ("2",), ("3",)),
                                   Claim("b", "score", ("3",), ("2",)),
                                   Claim("c", "score", ("3",), ("4",))]
    monkeypatch.setattr(claims, "saved", lambda: {"first": arms})
    monkeypatch.setattr(page, "read", lambda name: arms)
    assert [cells[3] for _, cells in page.claim_rows(claims.judge_all())] == ["10%", "10%", "0%"]


def test_an_end_of_an_interval_is_not_told_as_0():
    assert page.with_interval(0.5, 0.004, 0.996) == "0.500 [0.004, 0.996]"
    assert page.with_interval(0.5, 0.006, 0.996) == "0.50 [0.01, 1.00]"
    assert page.with_interval(-0.05, -0.09, -0.01) == "-0.050 [-0.090, -0.010]"
    assert page.with_interval(0.5, 0.0, 1.0) == "0.50 [0.00, 1.00]"


def test_verdicts_are_counted_by_groups_of_experiments():
    """After correction, and before it in brackets; a group without claims has no row."""
    judged = {
        ("fig1", "a"): ("holds", "cannot tell"), ("fig1", "b"): ("holds", "holds"),
        ("stale", "a"): ("too small", "too small")}
    assert page.counts(judged) == [
        ["experiments", "claims", "does not hold", "cannot tell", "too small", "holds"],
        ["at the common learning rate", "2", "0 (0)", "1 (0)", "0 (0)", "1 (2)"],
        ["several steps per rollout", "1", "0 (0)", "0 (0)", "1 (1)", "0 (0)"]]


def test_claims_at_both_rates_are_counted_by_their_verdicts():
    """After correction. Rows: at the common rate; columns: at their own."""
    judged = {
        ("fig1", "a"): ("cannot tell", "holds"), ("fig1", "b"): ("holds", "holds"),
        ("fig1", "c"): ("holds", "holds"), ("fig1", "own"): ("holds", "holds"),
        ("fig1_tuned", "a"): ("too small", "does not hold"),
        ("fig1_tuned", "b"): ("holds", "does not hold"), ("fig1_tuned", "c"): ("holds", "holds"),
        ("fig2_tuned", "a"): ("holds", "holds")}  # its common runs are being made again
    header, *rows = page.changes(judged)
    assert header[1:] == list(page.VERDICTS)
    assert {row[0]: row[1:] for row in rows} == {
        "does not hold": ["0"] * 4, "cannot tell": ["0"] * 4, "too small": ["0"] * 4,
        "holds": ["2", "0", "0", "1"]}


def test_the_list_says_what_was_run(fake, tmp_path, monkeypatch, capsys):
    """A run that two experiments share counts once."""
    def listed():
        papers.print_list()
        return [line.strip() for line in capsys.readouterr().out.splitlines()[3::2]]

    assert listed() == ["0 of 2 seeds, 0 CPU minutes, about 1 to go (after lr)"] * 2
    monkeypatch.setattr(sweep, "read_numbers", lambda folder: RUN | {
        "cpu_seconds": 90.0, "prompts": {"score": [[0.0, 0.0]] * 3}})
    EXPERIMENTS["first"].claims = []
    EXPERIMENTS["second"].claims = [Claim("a", "score", ("3",)),
                                    Claim("b", "score", ("3",), ("4",))]
    args = papers.Args(output=str(tmp_path / "runs"))
    sweep.sweep(["first", "second"], {"rloo.py": "0.1"}, args)
    EXPERIMENTS["first"].seeds = range(1, 4)
    EXPERIMENTS["second"].tuned = False
    assert listed() == ["2 of 3 seeds, 6 CPU minutes, about 3 to go (after lr)",
                        "2 of 2 seeds, 6 CPU minutes; does not hold: 1, holds: 1"]
    assert results.cost(EXPERIMENTS) == (6, 9.0)


def test_what_is_run_and_drawn(monkeypatch):
    """The runs with tuned rates come last, all within the same time. No panels, no picture."""
    calls, rates = [], {"rloo.py": "1"}

    def note(name):
        monkeypatch.setattr(papers, name, lambda *given: calls.append((name, *given[:2])))

    for name in ("sweep", "draw", "write_page", "print_list"):
        note(name)
    monkeypatch.setattr(papers, "chosen_rates", lambda arms: rates)
    monkeypatch.setattr(papers, "read", lambda name: f"arms of {name}")
    papers.main(papers.Args(("fig3_tuned", "lr", "fig3")))
    assert calls == [("sweep", ["lr", "fig3"], {}), ("sweep", ["fig3_tuned"], rates),
                     ("draw", "fig3_tuned", "arms of fig3_tuned"), ("draw", "lr", "arms of lr"),
                     ("draw", "fig3", "arms of fig3"), ("write_page",), ("print_list",)]
    calls.clear()
    papers.main(papers.Args(("all",), redraw=True))
    drawn = [name for _, *names in calls for name in names[:1]]
    assert drawn == list(EXPERIMENTS)
    calls.clear()
    papers.main(papers.Args())
    assert calls == [("sweep", [], {}), ("sweep", [], rates), ("print_list",)]
    rates.clear()
    calls.clear()
    papers.main(papers.Args(("all",)))
    assert [name for name, *_ in calls].count("sweep") == 1
    assert not any("tuned" in name for name in calls[0][1])


def test_all_time_is_for_both_sweeps(monkeypatch):
    """Both end at the same moment; all that have numbers are drawn again."""
    ends = []
    monkeypatch.setattr(papers, "sweep", lambda names, rates, args, end: ends.append(end))
    monkeypatch.setattr(papers, "chosen_rates", lambda arms: {"rloo.py": "1"})
    for name in ("draw", "write_page", "print_list"):
        monkeypatch.setattr(papers, name, lambda *given: None)
    before = papers.time.monotonic()
    papers.main(papers.Args(("all",), minutes=2.0))
    assert ends[0] == ends[1] and before + 120 <= ends[0] <= papers.time.monotonic() + 120
    monkeypatch.setattr(papers, "read", lambda name: None)
    papers.main(papers.Args(("all",), redraw=True))


@pytest.mark.parametrize("flags, message", [
    ({"experiments": ("fig1", "fig9")}, "fig9: unknown experiment; choose from lr, lr_math, "),
    ({"experiments": ("fig1_tuned",)}, "fig1_tuned: takes the learning rates that lr finds; run "),
    ({"minutes": 0.0}, "--minutes 0.0: must be above 0"),
    ({"experiments": ("first",), "redraw": True}, "first: docs/results has no numbers of it yet"),
    ({"jobs": 0}, "--jobs 0: must be 1 or more"),
])
def test_bad_flags_get_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    if flags.get("redraw"):
        monkeypatch.setitem(EXPERIMENTS, "first", EXPERIMENTS["fig1"])
    with pytest.raises(SystemExit):
        papers.main(papers.Args(**flags))
    assert capsys.readouterr().err.startswith(f"error: {message}")


# ----------------------------------------------------------------------------- the real experiments


def test_tuned_experiments_have_only_the_arms_whose_rate_is_open():
    """And the claims about them. ReMax with twice the budget has ReMax's rate."""
    fig2, tuned = EXPERIMENTS["fig2"], EXPERIMENTS["fig2_tuned"]
    assert fig2.arms.keys() - tuned.arms.keys() == {"PPO, λ 0.95, one step"}
    assert {claim.text for claim in fig2.claims} - {claim.text for claim in tuned.claims} == {
        f"{name} above PPO with one step per rollout{rest}" for name, rest in (
            ("RLOO", ", as RLOO has"), ("REINFORCE with a baseline", ""), ("vanilla PG", ""))} | {
        f"at the same KL (1), RLOO above {other}" for other in ("PPO", "REINFORCE")}
    assert not any("--lr " in command for experiment in EXPERIMENTS.values() if experiment.tuned
                   for command in experiment.arms.values())
    rates = dict.fromkeys(TUNED, "1") | {"remax.py": "7"}
    arms = sweep.commands(EXPERIMENTS["remax_tuned"], rates)
    assert " --lr 7 " in arms["ReMax, twice the budget"] and " --lr 1 " in arms["PPO, λ 0.95"]


def test_tuned_experiments_have_no_times_and_no_memory():
    """Which a learning rate does not change."""
    remax, tuned = EXPERIMENTS["remax"], EXPERIMENTS["remax_tuned"]
    assert len(remax.claims) - len(tuned.claims) == 2 and ("", "seconds") in remax.panels
    assert tuned.panels == remax.panels[:2] and tuned.columns == remax.columns[:4]
    assert ("cpu", "score") in EXPERIMENTS["budget_tuned"].panels  # that is what it is about


def test_every_command_parses():
    found = {command for experiment in EXPERIMENTS.values()
             for command in sweep.commands(experiment, dict.fromkeys(TUNED, RATES[0])).values()}
    for command in found:
        script, *flags = shlex.split(command)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        tyro.cli(module.Args, args=[*flags, "--output", "x"])
    folders = {sweep.folder_of(command, 1, "x").name for command in found}
    assert len(folders) == len(found) > 60 and max(map(len, folders)) + len(".log") <= 255


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_are_about_the_experiments_arms(name):
    experiment = EXPERIMENTS[name]
    for claim in experiment.claims:
        assert {*claim.more, *claim.less} <= experiment.arms.keys()
    assert len({claim.text for claim in experiment.claims}) == len(experiment.claims)
    curves = {curve for curve, _ in experiment.points.values()} or experiment.arms
    assert len(curves) <= len(page.plot.STYLES) or not experiment.panels
    assert experiment.points.keys() in (set(), experiment.arms.keys())


def test_the_page_agrees_with_the_saved_numbers(tmp_path, monkeypatch):
    text = page.PAGE.read_text()
    monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")
    page.PAGE.write_text(text)
    page.write_page()
    assert page.PAGE.read_text() == text


def sentences():
    """The page's sentences that draw conclusions, and the table of what each rests on."""
    text = page.PAGE.read_text().partition("## What came out against the papers")[2]
    text = text.partition("## How the runs were made")[0].partition("\n")[2]
    text, _, table = text.partition("<!--")
    text = re.sub(r"^(#|\||    |!\[).*$", "", text, flags=re.MULTILINE)  # only prose
    blocks = [" ".join(block.split()) for block in text.replace("\n- ", "\n\n").split("\n\n")]
    found = [sentence for block in blocks
             for sentence in re.split(r"(?<=[.)]) (?=[A-Z`*])", block) if sentence]
    return found, [line.split(" | ") for line in table.splitlines() if " | " in line]


@functools.cache
def judged_here():
    """`judge_all` of docs/results."""
    return claims.judge_all()


INTERVAL = r"[−\d.]+ \[[−\d.]+, [−\d.]+\]"


def spelled(claim, *values):
    """A claim's mean and interval as sentences give them: of a difference, how large it is."""
    values = [value + claim.least for value in values]
    if sum(values) < 0:
        low, high = sorted(-value for value in values[1:])
        values = [-values[0], low, high]
    return page.with_interval(*values).replace("-", "−")


def test_conclusions_say_no_more_than_the_verdicts_after_correction():
    """Every sentence rests on claims whose verdicts stand in the page's source, or on none."""
    judged, (found, table) = judged_here(), sentences()
    assert len(found) > 30
    for words, experiment, claim, *verdict in table:
        assert any(words in sentence for sentence in found), words
        if experiment != "no claim":
            assert judged[experiment, claim][-1] == verdict[0], (words, claim)
    for sentence in found:
        rows = [row for row in table if row[0] in sentence]
        assert rows, f"rests on nothing: {sentence}"
        told = {spelled(*judged[row[1], row[2]][:4]) for row in rows if row[1] != "no claim"}
        assert set(re.findall(INTERVAL, sentence)) <= told, f"other numbers: {sentence}"
        if {row[-1] for row in rows} == {"cannot tell"}:
            open_ = re.search("cannot be told|did not confirm", sentence)
            assert open_, f"sounds decided: {sentence}"
        if {row[-1] for row in rows} == {"too small"}:
            assert "too small" in sentence, f"says more than that it is small: {sentence}"


def ranks(values):
    """The mean rank of each, where some are the same."""
    return [sum(other < value for other in values) + values.count(value) / 2 for value in values]


def test_the_table_of_several_steps_and_its_correlations():
    """Its numbers are those of the runs; Spearman's correlations are those of its columns."""
    text = page.PAGE.read_text()
    rows = re.findall(r"^\| ([^|]+) \| (-?[\d.]+)[^|]*\| (-?[\d.]+)[^|]*((?:\| [^|]+){8})\|$", text,
                      re.MULTILINE)
    assert len(rows) == 10
    columns = [("stale_math", "score", 4), ("stale_math", "score", 16), ("stale_math", "lag", 4),
               ("stale_math", "lag", 16), ("stale", "final gold", 4), ("stale", "final gold", 16),
               ("stale", "lag", 4), ("stale", "lag", 16)]
    found = {column: [] for column in columns}
    for name, *_, cells in rows:
        for (experiment, metric, steps), cell in zip(columns, cells.split("|")[1:]):
            round_ = ", one round" if (name, experiment) == ("DAPO", "stale_math") else ""
            arm = results.read(experiment)[f"{name}{round_}, {steps} steps"]
            assert cell.strip() == page.cell(arm, metric), (name, experiment, steps)
            found[experiment, metric, steps].append(float(cell.split()[0]))
    cosines = {4: [float(near) for _, near, *_ in rows], 16: [float(far) for *_, far, _ in rows]}

    def correlations(of, part=slice(None)):
        """With the outcome on mini math and mini TL;DR, 4 and 16 steps, as text; of some rows."""
        pairs = [(ranks(of(experiment, steps)[part]), ranks(found[experiment, metric, steps][part]))
                 for experiment, metric, steps in columns if metric != "lag"]
        numbers = [f"{np.corrcoef(*pair)[0, 1]:.1f}".replace("-", "−") for pair in pairs]
        return f"{', '.join(numbers[:3])} and {numbers[3]}"

    text = " ".join(text.split())
    assert f"outcome is {correlations(lambda _, steps: cosines[steps])} (mini math" in text
    moved = correlations(lambda experiment, steps: found[experiment, "lag", steps])
    assert f"with the outcome is {moved}. Of ten," in text
    uncut, cut = (correlations(lambda _, steps: cosines[steps], part)
                  for part in (slice(4), slice(4, None)))
    assert f"cosine has {uncut}, among the six that do {cut}." in text
    assert [name for name, *_ in rows[:4]] == ["RLOO, sequence ratio", "RLOO, token ratio",
                                               "RLOO, no ratio", "CISPO"]


def test_the_numbers_of_the_sentences_on_more_steps():
    """Differences from one step that are said to be there exclude 0, and the others do not."""
    text = " ".join(page.PAGE.read_text().split())
    math_arms, arms = results.read("stale_math"), results.read("stale")

    def differences(arms, metric, steps):
        """Dict name -> interval of the difference from one step per rollout."""
        names = [label.removesuffix(", 1 steps") for label in arms if label.endswith(", 1 steps")]
        runs = {name: (arms[f"{name}, {steps} steps"]["runs"], arms[f"{name}, 1 steps"]["runs"])
                for name in names}
        return {name: intervals.interval([results.measure(more[seed], metric)
                                          - results.measure(one[seed], metric) for seed in one])
                for name, (more, one) in runs.items()}

    assert all(high < 0 for *_, high in differences(math_arms, "score", 16).values())
    after4 = differences(math_arms, "score", 4)
    del after4["DAPO"]  # dynamic sampling: the next sentence
    assert {name for name, (_, low, high) in after4.items() if low < 0 < high} == {
        "GRPO", "DAPO, one round", "REINFORCE++", "RLOO, clipped"}
    assert all(mean < 0 for name, (mean, *_) in after4.items() if name in {
        "PPO", "GSPO", "RLOO, no ratio", "RLOO, token ratio", "RLOO, sequence ratio", "CISPO"})
    assert all(low > 0 for _, low, _ in differences(arms, "score", 4).values())
    assert all(low < 0 for _, low, _ in differences(arms, "final gold", 4).values())

    def means(arms, metric, steps):
        return [page.middle(arm, metric)[0] for label, arm in arms.items()
                if label.endswith(f", {steps} steps")]

    ends = [f"between {min(values):.2f} and {max(values):.2f}"
            for values in (means(arms, "score", 1), means(arms, "score", 4))]
    assert f"from {ends[0]} to {ends[1]}, and no" in text
    assert f"one step it ends at {span(means(arms, 'final gold', 1), 1)}." in text
    dapo = [page.cell(math_arms[f"DAPO, {steps} steps"], "score") for steps in (16, 1)]
    assert "({} with 16 steps, {} with one)".format(*dapo) in text
    both = means(arms, "score", 4) + means(arms, "score", 16)
    assert f"its means are {span(both)} for all ten" in text


ONE = ("reinforce.py", "reinforce.py --baseline none", "vanilla_pg.py", PPO)  # response per prompt
FOUR = ("rloo.py", "raft.py", "reinforce_pp.py", "reinforce_pp_baseline.py")


def span(values, digits=2):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def test_the_numbers_of_the_section_on_learning_rates():
    """Those of the runs; the names in its lists are typed from the page."""
    text, arms = " ".join(page.PAGE.read_text().split()), results.read("lr")
    rates = claims.chosen_rates(arms)

    def at_best(metric, *names):
        return [claims.mean_of(results.measure, arms, name, rates[name], metric) for name in names]

    assert f"REINFORCE++ have a mean reward of {span(at_best('score', *ONE, *FOUR))}." in text
    lower = ("grpo.py", "cispo.py", "dapo.py")
    gspo, remax, dpo = (f"{at_best('score', f'{name}.py')[0]:.2f}"
                        for name in ("gspo", "remax", "dpo"))
    assert f"have {span(at_best('score', *lower))} and GSPO {gspo}, and a lower KL" in text
    assert f"{span(at_best('final kl', *lower, 'gspo.py'), 1)}, where those eight have " \
           f"{span(at_best('final kl', *ONE, *FOUR), 1)}." in text
    assert f"greedy, has {remax}, and DPO {dpo}." in text
    assert {name for name in TUNED if rates[name] == "6e-4"} == {
        "rloo.py", "raft.py", "reinforce.py", "vanilla_pg.py", "dpo.py"}
    assert [name for name in TUNED if rates[name] == "1e-3"] == ["reinforce.py --baseline none"]
    good = {name: claims.good_rates(arms, name) for name in TUNED}
    assert {name for name in TUNED if good[name] == ["3e-4", "6e-4", "1e-3"]} == {
        "raft.py", *ONE[:3]}
    assert {name for name in TUNED if good[name] == ["3e-4", "6e-4"]} == {
        "rloo.py", "grpo.py", PPO, *FOUR[2:]}
    assert {name for name in TUNED if good[name] == ["1e-4", "3e-4"]} == {"cispo.py", "dapo.py"}
    assert {name for name in TUNED if len(good[name]) == 1} == {"gspo.py", "remax.py", "dpo.py"}
    breaks = {name: claims.breaking_rate(arms, name) for name in TUNED}
    assert {name for name in TUNED if breaks[name] == "1e-3"} == {
        "cispo.py", "dapo.py", "reinforce_pp.py", "remax.py", "dpo.py"}
    assert breaks.pop("gspo.py") == "6e-4" and set(breaks.values()) == {"1e-3", "3e-3"}


def test_the_numbers_of_the_section_on_budgets():
    text = " ".join(page.PAGE.read_text().split())
    common, own = results.read("budget"), results.read("budget_tuned")

    def means(metric, *names, arms=common):
        return [page.middle(arms[name], metric)[0] for name in names]

    def after_ten_seconds(name):
        runs = list(common[name]["runs"].values())
        seconds, score = (np.mean(curves, 0) for curves in zip(*(
            (page.along(run, "cpu"), run["score"]) for run in runs)))
        return np.interp(10, seconds, score)

    assert f"end at {span(means('final score', *ONE))}, RLOO, RAFT and both REINFORCE++ at " \
           f"{span(means('final score', *FOUR))}." in text
    assert f"vanilla PG and PPO are at {span(means('score at update 60', *ONE))}." in text
    near = span([after_ten_seconds(name) for name in (*FOUR, ONE[0])])
    assert f"at {near}, and REINFORCE without one at {after_ten_seconds(ONE[1]):.2f}; va" in text
    assert f"every update, are at {span([after_ten_seconds(name) for name in ONE[2:]])}." in text
    assert f"ReMax is at {after_ten_seconds('remax.py'):.1f}." in text
    others = means("final score", "grpo.py", "gspo.py", "cispo.py", "dapo.py")
    (dpo,) = means("final score", "dpo.py")
    assert f"DAPO end at {span(others)} in 60 updates, and DPO at {dpo:.2f}." in text

    seeds = results.seeds_done(EXPERIMENTS["budget_tuned"], own)
    assert f"{seeds} of 20 seeds so far" in text or seeds == 20
    for names, words in (([ONE[0], *ONE[2:]], "vanilla PG and PPO end at {} with a gold reward of"),
                         (FOUR, "RLOO, RAFT and both REINFORCE++ at {} with")):
        score, gold = means("final score", *names, arms=own), means("final gold", *names, arms=own)
        assert f"{words.format(span(score))} {span(gold, 1)}" in text
    for name, metric in ((ONE[1], "growth of score"), ("dpo.py", "growth of gold")):
        assert means(metric, name, arms=own)[0] < 0  # fall apart


def test_the_numbers_of_the_section_on_own_rates():
    """Those of the runs and of the table of verdicts at both rates."""
    text = " ".join(page.PAGE.read_text().split())
    (_, *names), *rows = page.changes(judged_here())
    table = {word: dict(zip(names, map(int, row))) for word, *row in rows}
    both = sum(sum(row.values()) for row in table.values())
    changed = both - sum(table[word][word] for word in table)
    turned = table["holds"]["does not hold"] + table["does not hold"]["holds"]
    assert f"{changed} of the {both} claims that were tested at both have another verdict" in text
    decided = turned + table["holds"]["holds"] + table["does not hold"]["does not hold"]
    assert f"Of the {both} claims that were tested at both, {changed} have another verdict, and " \
           f"of the {decided} that were decided both times {turned} are turned round**" in text
    lr, rates = results.read("lr"), claims.chosen_rates(results.read("lr"))
    assert {float(rate) for rate in rates.values()} == {3e-4, 6e-4, 1e-3}

    def means(experiment, metric, leave_out=()):
        return [page.middle(arm, metric)[0] for label, arm in results.read(experiment).items()
                if label not in leave_out]

    *others, ppo = means("fig2_tuned", "final kl")
    assert f"at which it ends at a KL of {ppo:.1f}, and that of the others 6e-4, at which they " \
           f"end at {span(others, 1)}." in text
    near = [claims.mean_of(results.measure, lr, name, "3e-4", "final gold")
            for name in ("rloo.py", "reinforce.py", "vanilla_pg.py", PPO)]
    assert f"a gold reward of {span(near[:3])}, and PPO has {near[3]:.2f}." in text
    kl, gold = (means("remax_tuned", f"final {name}")[2] for name in ("kl", "gold"))
    assert f"leads to a KL of {kl:.1f}, and to a gold reward of {gold:.1f}, below the start" in text
    runs = results.read("remax_tuned")["REINFORCE, no baseline"]["runs"].values()
    assert gold < np.mean([run["gold"][0] for run in runs]) - 0.3
    for experiment, level in (("fig2", 1), ("fig3", 1), ("plus", 1.5)):  # why none is at a KL
        assert all(run["kl"][1] > level for arm in results.read(f"{experiment}_tuned").values()
                   for run in arm["runs"].values())
    assert f"ends at {span(means('plus_tuned', 'final gold'), 1)}, which was " \
           f"{span(means('plus', 'final gold', ['REINFORCE++, one step']), 1)}." in text


def test_the_table_of_own_rates_and_what_is_said_of_it():
    text, common, own = page.PAGE.read_text(), results.read("table1"), results.read("table1_tuned")
    rates = claims.chosen_rates(results.read("lr"))
    falls = []
    for label, arm in common.items():
        cells = [page.number(page.middle(arms[label], metric)[0])
                 for metric in ("score", "gold", "win_rate", "kl") for arms in (common, own)]
        rate = sweep.rate_of(EXPERIMENTS["table1"].arms[label], rates)
        assert f"| {' | '.join([label, rate, *cells])} |\n" in text
        _, low, high = intervals.interval([results.measure(run, "win_rate")
                                           - results.measure(arm["runs"][seed], "win_rate")
                                           for seed, run in own[label]["runs"].items()])
        falls.append((label, high < 0, low > 0))
    assert [label for label, falling, _ in falls if not falling] == ["RAFT, k 4", "DPO"]
    assert [label for label, _, rising in falls if rising] == ["DPO"]
    lr = results.read("lr")
    best_gold = {name: max(RATES, key=lambda rate: claims.mean_of(
        results.measure, lr, name, rate, "final gold")) for name in TUNED}
    assert {name for name in TUNED if best_gold[name] == rates[name]} == {
        PPO, "remax.py", "reinforce_pp_baseline.py"}
    assert sum(float(best_gold[name]) < float(rates[name]) for name in TUNED) == 11
    judged = judged_here()
    for experiment, text in [
            ("fig2", "REINFORCE with a baseline above PPO"),
            ("fig2", "REINFORCE with a baseline above vanilla PG"),
            ("fig2", "RLOO above REINFORCE with a baseline"), ("fig3", "RLOO above RAFT at k 4"),
            ("fig5", "RLOO's reward above RAFT's at β 0.1"),
            ("fig1", "PPO, λ 1 above PPO, λ 0.95"),
            ("plus", "REINFORCE++ above GRPO at the same responses")]:
        _, _, low, high, margin, _, verdict = judged[f"{experiment}_tuned", text]
        assert verdict in ("holds", "does not hold") and max(-low, high) < margin


def test_other_numbers_of_the_page():
    text = " ".join(page.PAGE.read_text().split())

    def mean(experiment, label, metric, digits=2):
        return f"{page.middle(results.read(experiment)[label], metric)[0]:.{digits}f}"

    kl = {label: mean("table1", label, "kl") for label in results.read("table1")}
    rloo, reinforce = kl["RLOO, k 4"], kl["REINFORCE, baseline"]
    assert f"to a KL of {kl['RAFT, k 4']}, and REINFORCE to {reinforce}." in text
    assert f"vanilla PG's KL is {kl['vanilla PG']}, RLOO's {rloo} and PPO's " \
           f"{kl['PPO, λ 0.95']}," in text
    assert f"its KL ends at {kl['DPO']}, and RLOO's at {rloo}." in text
    assert f"but by {mean('wrong', 'GRPO, no 1/length', 'growth_of_wrong')} without it." in text
    log_ratio = judged_here()[
        "remax", "ReMax at least 1.6 times as fast as PPO (log of CPU s per update)"][1] + 0.47
    assert f"but about {math.exp(log_ratio):.1f} times" in text

    def moved(experiment, steps, *names):
        return [page.middle(results.read(experiment)[f"{name}, {steps} steps"], "lag")[0]
                for name in names]

    uncut = "RLOO, sequence ratio", "RLOO, token ratio", "RLOO, no ratio", "CISPO"
    cut = "RLOO, clipped", "PPO", "GRPO", "GSPO", "REINFORCE++"
    both = {"stale": (*cut, "DAPO"), "stale_math": (*cut, "DAPO, one round")}
    assert f"by {span(moved('stale_math', 4, *uncut), 1)} nats on mini math, and those that clip " \
           f"by {span(moved('stale_math', 4, *both['stale_math']), 1)}; on mini TL;DR it is " \
           f"{span(moved('stale', 4, *uncut), 1)} against 0.2." in text
    assert {round(nats, 1) for nats in moved("stale", 4, *both["stale"])} == {0.2}
    far = [nats for name in both for nats in moved(name, 16, *both[name])]
    assert f"They do move on, to {span(far, 1)} nats with 16 steps" in text
    assert f"it moves {moved('stale_math', 16, 'PPO')[0]:.2f} nats" in text


@pytest.mark.parametrize("metric", ["score", "final kl"])
@pytest.mark.parametrize("name", ["stale", "stale_math"])
def test_seeds_of_both_machines_agree(name, metric):
    """Seeds 1 to 5 ran on a CPU, the others on a GPU: within 2.5 standard errors in every arm."""
    for label, arm in results.read(name).items():
        parts = [], []
        for seed, run in arm["runs"].items():
            parts[int(seed) > 5].append(results.measure(run, metric))
        error = math.sqrt(sum(np.var(part, ddof=1) / len(part) for part in parts))
        assert abs(np.mean(parts[0]) - np.mean(parts[1])) < 2.5 * error, label


@pytest.mark.parametrize("edit", [
    # What is open, as if it were decided; another verdict than that of the numbers; nothing to
    # rest on.
    ("Over the whole run it cannot be told.", "Over the whole run it does."),
    ("told | fig6 | σ 5: noise costs RAFT more than RLOO | cannot tell",
     "told | fig6 | σ 5: noise costs RAFT more than RLOO | holds"),
    ("*DPO is behind*", "*DPO is ahead*"),
    ("PPO and RLOO are above it.", "PPO and RLOO are above it. GRPO is best."),
    ("0.11 [0.10, 0.12]; training", "0.12 [0.10, 0.12]; training"),
])
def test_a_sentence_that_says_more_is_noticed(edit, tmp_path, monkeypatch):
    text = page.PAGE.read_text()
    words = r"\s+".join(map(re.escape, edit[0].split()))  # wherever the lines break
    assert len(re.findall(words, text)) == 1
    monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")
    page.PAGE.write_text(re.sub(words, edit[1], text))
    with pytest.raises(AssertionError):
        test_conclusions_say_no_more_than_the_verdicts_after_correction()


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if results.stored_arms(name)])
def test_saved_numbers_are_of_todays_commands(name):
    """Each arm has some of its seeds, and no others; those with prompts' numbers say which."""
    experiment, arms = EXPERIMENTS[name], results.stored_arms(name)
    plan = sweep.commands(experiment, claims.chosen_rates(results.read("lr")))
    assert {label: arm["command"] for label, arm in arms.items()} == plan
    for arm in arms.values():
        assert set(map(int, arm["runs"])) <= set(experiment.seeds)
        assert all(("tax" in run) == experiment.tax for run in arm["runs"].values())
        counted = [seed for half in arm.get("prompts", {}).values() for seed in half["seeds"]]
        assert len(counted) == len(set(counted)) and set(map(str, counted)) <= set(arm["runs"])
