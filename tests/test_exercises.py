"""exercises/: right solutions pass in any style, mistakes are named, nothing stops the check."""

import doctest
import inspect
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.students.wrong import WRONG

from exercises import check, estimators, newer, questions, worker
from exercises.mistakes import MISTAKES
from exercises.solutions import cases, right, rollouts
from exercises.world import RESPONSES, World

ROOT = Path(__file__).parent.parent
STUDENTS = ROOT / "tests" / "helpers" / "students"
SHEET = str(ROOT / "exercises" / "estimators.py")
CASES = {seed: cases(seed) for seed in (1, 2027)}

MEASURED = rollouts(World())  # functions whose expected gradient is measured


def outcomes(name, function, seed=1):
    return [worker.call(function, arguments) for arguments in CASES[seed][name]]


def verdict(name, function, seed=1):
    """What check.py says about a function: whether it is right, and its lines.

    Without that about the expected gradient; `measured` has it.
    """
    return check.report(name, CASES[seed][name], outcomes(name, function, seed), None, SHEET, seed)


def measured(name, function, seed=1):
    """The line of check.py about the expected gradient of a function's advantages; "" if none."""
    _, arguments = rollouts(World(seed))[name]
    return check.bias(name, worker.advantages(function, arguments), verdict(name, function)[0],
                      seed)


# ------------------------------------------------------------------------------------ what is right


def test_the_examples_of_the_docstrings_are_what_the_scripts_return():
    """Numbers computed by hand, in every docstring."""
    tests = [test for test in doctest.DocTestFinder().find(estimators) if test.examples]
    assert {test.name.split(".")[-1] for test in tests} == set(check.NAMES)
    for test in tests:
        test.globs = vars(right) | {"torch": torch}
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("style", ["loops", "einsum", "numpy_then_torch"])
def test_right_solutions_pass_in_any_style(style):
    student = worker.load(str(STUDENTS / f"{style}.py"))
    for name, seed in itertools.product(check.NAMES, CASES):
        ok, lines = verdict(name, getattr(student, name), seed)
        assert ok and not lines, lines


def test_right_advantages_give_the_true_gradient():
    student = worker.load(str(STUDENTS / "loops.py"))
    for name, seed in itertools.product(MEASURED, CASES):
        said = measured(name, getattr(student, name), seed)
        assert said == "expected gradient in the questions' world: the true gradient"


def test_the_sheet_is_not_done_yet_but_has_the_right_functions_parameters():
    for name in check.NAMES:
        ours, theirs = (inspect.signature(getattr(owner, name)).parameters.values()
                        for owner in (estimators, right))
        defaults = lambda parameters: [parameter.default for parameter in parameters]
        assert defaults(ours) == defaults(theirs), name
        assert verdict(name, getattr(estimators, name)) == (False, ["not done yet"])


# ------------------------------------------------------------------------------------ what is wrong


def as_people_write_it(mistake):
    """The function of helpers/students/wrong.py, which has them in the same order."""
    sentences = [other.sentence for other in MISTAKES if other.name == mistake.name]
    return WRONG[mistake.name][sentences.index(mistake.sentence)]


@pytest.mark.parametrize("mistake", MISTAKES,
                         ids=lambda mistake: f"{mistake.name}-{mistake.function.__name__}")
def test_each_mistake_is_called_by_its_name(mistake):
    """As people make it, which is not how exercises/mistakes/ does."""
    ok, lines = verdict(mistake.name, as_people_write_it(mistake))
    assert not ok and lines[0] == mistake.sentence
    number, line = lines[1].removeprefix("docstring, line ").split(": ", 1)
    assert mistake.words in line
    assert line in Path(SHEET).read_text().splitlines()[int(number) - 1]


@pytest.mark.slow
def test_with_other_inputs_too():
    for mistake in MISTAKES:
        lines = verdict(mistake.name, as_people_write_it(mistake), 2027)[1]
        assert lines[0] == mistake.sentence


def test_there_are_many_mistakes_of_every_function():
    page = (ROOT / "exercises" / "instructors.md").read_text()
    assert f"Each of the {len(MISTAKES)} known mistakes" in page and len(MISTAKES) >= 40
    assert len({(mistake.name, mistake.sentence) for mistake in MISTAKES}) == len(MISTAKES)
    counts = Counter(mistake.name for mistake in MISTAKES)
    assert counts == {name: len(functions) for name, functions in WRONG.items()}
    assert WRONG.keys() == set(check.NAMES) and min(counts.values()) >= 4


def test_a_mistake_is_recognized_next_to_another():
    """A single token is not handled, which is another mistake; a wrong loss has the right count."""
    def whiten_advantages(advantages, mask):
        real = advantages[mask]
        return (advantages - real.mean()) / real.std(correction=0) * mask

    def ppo_loss(logprobs, old_logprobs, advantages, clip):
        loss, _ = right.ppo_loss(logprobs, old_logprobs, -advantages, clip)
        return -loss, right.ppo_loss(logprobs, old_logprobs, advantages, clip)[1]

    said = verdict("whiten_advantages", whiten_advantages)[1]
    assert said[0] == "your std has N in its denominator, not N - 1"
    assert verdict("ppo_loss", ppo_loss)[1][0].startswith("max instead of min")


def test_a_mistake_is_recognized_also_if_another_case_raises():
    ok, lines = verdict("rloo_advantages", lambda rewards, k: rewards if k == 4 else 1 / 0)
    assert not ok and lines[0] == "you subtract no baseline"


def test_inputs_are_the_same_in_every_process_and_move_no_random_numbers():
    state = torch.manual_seed(7).get_state()
    again = cases(1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, rows in CASES[1].items():
        for row, other in zip(rows, again[name], strict=True):
            assert not any(worker.differs(*pair) for pair in zip(row, other, strict=True))


def test_a_wrong_estimator_is_measured():
    """The mean of the group, not of the others: (k - 1) / k of the true gradient."""
    group_mean = lambda rewards, k: right.grpo_advantages(rewards, k, False)
    line = measured("rloo_advantages", group_mean)
    assert line.endswith("cosine to the true gradient 1.000, length along it 0.500")
    line = measured("ppo_advantages", lambda *given: right.ppo_advantages(*given[:4], 0.0))
    assert line.endswith("cosine to the true gradient 0.930, length along it 0.871")


def test_a_right_function_that_is_too_slow_for_all_rollouts_is_right():
    class Slow:
        path = SHEET

        def call(self, name, arguments):
            return outcomes(name, right.rloo_advantages)

        def measure(self, name, arguments):
            return None

    assert list(check.check_functions(Slow(), ["rloo_advantages"], 1)) == [
        ("rloo_advantages", True, [])]


def test_advantages_that_cannot_be_measured_get_no_line():
    for function in (lambda rewards, k: rewards[:3], lambda rewards, k: rewards * math.nan,
                     lambda rewards, k: 1 / 0, lambda rewards, k: rewards.tolist()):
        assert not measured("rloo_advantages", function)


@pytest.mark.slow
def test_no_wrong_function_is_told_that_its_gradient_is_the_true_one():
    """Nor that it is so with the variance of the right one."""
    for mistake in MISTAKES:
        if mistake.name in MEASURED:
            said = measured(mistake.name, as_people_write_it(mistake))
            assert not re.search("the true gradient$| 1.00 times", said), mistake


def rloo_then(change):
    """The right rloo_advantages, changed in the end."""
    return lambda rewards, k: change(right.rloo_advantages(rewards, k))


def another_gradient(logprobs, advantages):
    twice = right.rloo_loss(2 * logprobs, advantages)
    return twice - right.rloo_loss(logprobs.detach(), advantages)


UNKNOWN = [
    ("rloo_advantages", rloo_then(lambda advantages: 2 * advantages), "the result[0] is"),
    ("rloo_advantages", rloo_then(lambda advantages: advantages.view(-1, 4)),
     "the result has shape (3, 4), should have (12,)"),
    ("rloo_advantages", lambda rewards, k: None,
     "the result is None, should be a tensor of shape (12,) on cpu"),
    ("rloo_advantages", rloo_then(torch.Tensor.tolist), "the result is a list, should"),
    ("rloo_advantages", rloo_then(torch.Tensor.numpy), "the result is a numpy.ndarray"),
    ("rloo_advantages", rloo_then(lambda advantages: advantages.to("meta")),
     "the result is a tensor on device meta, should be"),
    ("rloo_advantages", rloo_then(torch.Tensor.half),
     "the result has dtype torch.float16, should have torch.float32"),
    ("rloo_advantages", lambda rewards, k: rewards / 0 * 0, "the result[0] is nan, should be"),
    ("rloo_advantages", lambda rewards, k: rewards.sub_(1),
     "it changes its argument rewards in place: copy first"),
    ("reinforce_baseline",
     lambda history, *how: history.append(0) or right.reinforce_baseline(history[:-1], *how),
     "it changes its argument history in place: copy first"),
    ("rloo_advantages", lambda rewards: rewards, "raises TypeError: "),
    ("rloo_advantages", lambda rewards, k: 1 / 0,
     "raises ZeroDivisionError: division by zero (k = 4)"),
    ("rloo_advantages", lambda rewards, k: sys.exit("bye"), "raises SystemExit: bye (k = 4)"),
    ("rloo_advantages", lambda rewards, k: input(), "raises "),
    ("rloo_advantages", lambda rewards, k: rewards.to("meta") / (1 / 0),
     "raises ZeroDivisionError"),
    ("response_mask", lambda *given: right.response_mask(*given).float(),
     "the result has dtype torch.float32, should"),
    ("raft_best", lambda rewards, k: right.raft_best(rewards, k).float(),
     "the result has dtype torch.float32, should"),
    ("ppo_loss", lambda *given: right.ppo_loss(*given)[0],
     "it returns 1 value(s), should return 2: the loss, the "),
    ("ppo_loss", lambda *given: (right.ppo_loss(*given)[0], 7),
     "the number of clipped tokens is 7, should be"),
    ("rloo_loss", lambda *given: right.rloo_loss(*given)[None],
     "the result has shape (1,), should have ()"),
    ("rloo_loss", another_gradient,
     "the value is right, but its gradient with respect to logprobs[0, 0] is"),
    ("dpo_loss", lambda chosen, rejected, *more: right.dpo_loss(chosen, rejected.detach(), *more),
     "the value is right, but its gradient with respect to rejected_logprobs is missing"),
    ("reinforce_baseline", lambda *given: 7, "the result is 7, should be"),
]


@pytest.mark.parametrize("name, function, line", UNKNOWN, ids=range(len(UNKNOWN)))
def test_anything_else_gets_one_line(name, function, line, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    ok, lines = verdict(name, function)
    assert not ok and lines[0].startswith(line) and "\n" not in lines[0]


def test_what_is_printed_is_shown_and_allowed():
    def function(rewards, k):
        print("hello\nworld")
        return right.rloo_advantages(rewards, k)

    ok, lines = verdict("rloo_advantages", function)
    assert ok and lines[-1] == "it prints: hello"
    ok, lines = verdict("rloo_advantages", lambda *given: print() or right.rloo_advantages(*given))
    assert ok and not any(line.startswith("it prints") for line in lines)


# -------------------------------------------------------------------------------------- whole files

UNRULY = """
import os, time


def token_kl(*given):
    while True:
        try:
            time.sleep(9)
        except BaseException:
            pass


def raft_best(*given):
    os._exit(0)


def value_loss(*given):
    return value_loss(*given)


right_loss = rloo_loss


def rloo_loss(*given):
    os.write(1, b"between the answers")
    return right_loss(*given)


def dpo_loss(*given):
    raise ValueError("two\\nlines")
"""


def run(capsys, *flags):
    ok = check.main(check.tyro.cli(check.Args, args=list(map(str, flags))))
    return ok, capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_one_function_harms_no_other(tmp_path, capsys, monkeypatch):
    """One hangs and cannot be interrupted, one ends the process, two fail. The others pass."""
    processes = []

    def start(*command, start=check.subprocess.Popen, **settings):
        processes.append(start(*command, **settings))
        return processes[-1]

    monkeypatch.setattr(check.subprocess, "Popen", start)
    path, results = tmp_path / "unruly.py", tmp_path / "results.json"
    path.write_text((STUDENTS / "loops.py").read_text() + UNRULY)
    ok, lines = run(capsys, "--file", path, "--json", results, "--seconds", 2)
    assert not ok and lines[-1] == "16 of 20 right"
    tests = {test["name"]: test for test in json.loads(results.read_text())["tests"]}
    wrong = {name: test["output"].splitlines()[0] for name, test in tests.items()
             if test["status"] == "failed"}
    assert wrong.pop("value_loss").startswith("raises RecursionError")
    last = len(path.read_text().splitlines())
    assert wrong == {"token_kl": "no answer within 2 s", "raft_best": "it ended the process",
                     "dpo_loss": f"raises ValueError: two lines (line {last}) (beta = 0.5)"}
    assert json.loads(results.read_text())["score"] == 8
    assert len(processes) == 3
    assert None not in [process.poll() for process in processes]  # none is left
    assert tests["rloo_loss"] == {"name": "rloo_loss", "score": 0.5, "max_score": 0.5, "output": "",
                                  "status": "passed"}


@pytest.mark.parametrize("text, line", [
    ("def f(:", "SyntaxError: invalid syntax (line 1)"),
    ("x = 1\nimport nothing_of_that_name", "ModuleNotFoundError: "),
    ("exit(3)", "SystemExit: 3 (line 1)"),
])
def test_a_file_that_cannot_be_loaded(tmp_path, text, line):
    path = tmp_path / "my.py"
    path.write_text(text)
    assert worker.load(str(path)).startswith(line)


@pytest.mark.slow
def test_a_broken_file_and_an_empty_one(tmp_path, capsys, monkeypatch):
    """Named by a relative path, from a folder that is not the project's."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text("def")
    assert run(capsys, "raft_best", "dpo_loss", "--file", "my.py", "--json", "results.json")[1] == [
        "my.py cannot be loaded: SyntaxError: invalid syntax (line 1)",
        "0 of 2 right"]
    tests = json.loads(Path("results.json").read_text())["tests"]
    assert [(test["name"], test["score"]) for test in tests] == [("raft_best", 0), ("dpo_loss", 0)]
    Path("my.py").write_text("")
    ok, lines = run(capsys, "raft_best", "dpo_loss", "--file", "my.py")
    assert not ok and lines == [
        "raft_best            WRONG",
        "         there is no function raft_best in my.py",
        "dpo_loss             WRONG",
        "         there is no function dpo_loss in my.py",
        "0 of 2 right"]


@pytest.mark.parametrize("flags, message", [
    (["--file", "nowhere.py"], "--file nowhere.py: no such file"),
    (["rlo"], "rlo: no such exercise; there are response_mask, "),
    (["--answers", "nowhere.json"],
     "--answers nowhere.json: not a JSON object with your answers ("),
    (["rloo_loss", "--answers", "exercises/answers.json"],
     "rloo_loss: no such exercise; there are kl, "),
    (["--json", "nowhere/results.json"], "--json nowhere/results.json: no such folder"),
])
def test_bad_flags_get_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        check.main(check.tyro.cli(check.Args, args=flags))
    assert capsys.readouterr().err.startswith(f"error: {message}")


# ------------------------------------------------------------------ what a student found wrong once


def sample_major(rewards, k):
    groups = rewards.view(k, -1)  # (k, B)
    return (groups - (groups.sum(0) - groups) / (k - 1)).flatten()


def whole_batch(rewards, k):
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


@pytest.mark.parametrize("function", [sample_major, whole_batch])
def test_a_baseline_from_other_prompts_has_no_bias_but_variance(function):
    """Each rollout is a batch of its own: else the baseline of one leaks into the next."""
    said = measured("rloo_advantages", function)
    assert re.search(r"the true gradient, but with [\d.]+ times the variance$", said)


@pytest.mark.parametrize("function", [
    lambda rewards, baseline, mask: to_go(rewards - baseline.unsqueeze(1) * mask),
    lambda rewards, baseline, mask: (to_go(rewards) - (baseline / mask.sum(1)).unsqueeze(1)) * mask,
], ids=["within the sum", "over the length"])
def test_a_wrong_baseline_of_remax_is_measured_where_it_is_not_0(function):
    assert "cosine to the true gradient 0." in measured("remax_advantages", function)


def to_go(rewards):
    return rewards.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("gamma, lam", [(None, 1.0), (1.0, None)], ids=["gamma", "lam"])
def test_the_gradient_is_left_out_where_it_tells_nothing(gamma, lam):
    """The world has gamma = lam = 1, where whoever ignores one of them is right."""
    function = lambda rewards, values, mask, right_gamma, right_lam: right.ppo_advantages(
        rewards, values, mask, gamma or right_gamma, lam or right_lam)
    assert verdict("ppo_advantages", function)[1][0].startswith("you ignore")
    assert measured("ppo_advantages", function) == ""


def test_a_value_clipped_around_the_return():
    """It computes what no clip at all does, so the sentence has to fit both."""
    def value_loss(values, old_values, returns, clip):
        near = returns + (values - returns).clamp(-clip, clip)
        return torch.max((values - returns) ** 2, (near - returns) ** 2).sum() / 2

    assert "around the return" in verdict("value_loss", value_loss)[1][0]


def test_the_docstring_mentions_the_single_token_that_is_asked_for():
    lines = verdict("whiten_advantages", lambda advantages, mask: (
        advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-8) * mask)[1]
    assert "single token" in lines[0] and "single token" in lines[1]


def test_a_product_of_two_sums():
    said = verdict("rloo_loss", lambda logprobs, advantages: -advantages.sum() * logprobs.sum())[1]
    assert "product of two sums" in said[0]


@pytest.mark.parametrize("name, function", [
    ("token_kl", lambda logprobs, ref_logprobs, mask, kind="k1": mask * {
        "k1": logprobs - ref_logprobs, "k2": (logprobs - ref_logprobs) ** 2 / 2,
        "k3": (ref_logprobs - logprobs).exp() - 1 + logprobs - ref_logprobs}[kind]),
    ("whiten_advantages", lambda advantages, mask: right.whiten_advantages(
        torch.where(mask, advantages, 0), mask) + advantages * 0),
])
def test_what_is_arbitrary_where_masked_may_be_infinite(name, function):
    ok, lines = verdict(name, function)
    assert not ok and "times 0 is NaN" in lines[0]


# ------------------------------------------------------------------------------------ the questions

WORLD = World()
POLICY, REFERENCE, SCORES = WORLD.policy.tolist(), WORLD.reference.tolist(), WORLD.scores.tolist()
STATES = {"": 0, "a": 1, "b": 2}


def probabilities(table):
    """Of every response, as a product over its tokens."""
    return [math.prod(table[STATES[text[:t]]]["ab.".index(token)] for t, token in enumerate(text))
            for text in RESPONSES]


PI, REF = probabilities(POLICY), probabilities(REFERENCE)


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q))


def mean_score(p):
    return sum(x * score for x, score in zip(p, SCORES))


def tilted(base, factor):
    """The distribution base exp(factor r): its KL to the reference, and its objective."""
    weights = [p * math.exp(factor * score) for p, score in zip(base, SCORES)]
    best = [weight / sum(weights) for weight in weights]
    return [kl(best, REF), mean_score(best) - 2 * kl(best, REF)]


def token_scores(table, text):
    """For each token, the gradient (9 numbers) of its log-prob by the logits of a softmax table.

    That is 1 - p for the token taken, and -p for the others.
    """
    for t, token in enumerate(text):
        found, state = [0.0] * 9, STATES[text[:t]]
        for other in range(3):
            found[3 * state + other] = ("ab."[other] == token) - table[state][other]
        yield found


def added(vectors):
    return [sum(numbers) for numbers in zip(*vectors)]


def scores_of(table):
    return [added(token_scores(table, text)) for text in RESPONSES]


GRADIENTS = scores_of(POLICY)
TRUE = [sum(p * score * g[j] for p, score, g in zip(PI, SCORES, GRADIENTS)) for j in range(9)]


def climbed(table, beta):
    """20 steps up the objective's gradient: what is left to the optimum, and the KL."""
    logits = [[math.log(p) for p in row] for row in table]
    for step in range(21):
        table = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits]
        p = probabilities(table)
        rewards = [score - beta * math.log(x / y) for score, x, y in zip(SCORES, p, REF)]
        weighted = list(zip(p, rewards, scores_of(table)))
        for j in range(9) if step < 20 else ():
            logits[j // 3][j % 3] += 0.3 * sum(x * reward * g[j] for x, reward, g in weighted)
    return [tilted(REF, 1 / 2)[1] - mean_score(p) + 2 * kl(p, REF), kl(p, REF)]


def estimates(k, advantages):
    """Every draw of k responses: its probability, and 1/k sum A grad log pi.

    Args: k; advantages (a function of its k scores).
    """
    for draw in itertools.product(range(7), repeat=k):
        pairs = list(zip(advantages([SCORES[i] for i in draw]), draw))
        estimate = [sum(a * GRADIENTS[i][j] for a, i in pairs) / k for j in range(9)]
        yield math.prod(PI[i] for i in draw), estimate


def mean_of(draws):
    return added([p * x for x in estimate] for p, estimate in draws)


def variances(constant):
    """Without a baseline, and with leave-one-out from 2 and 4 responses."""
    plain = lambda scores: [score + constant for score in scores]
    left_out = lambda scores: [x - (sum(scores) - x) / (len(scores) - 1) for x in scores]
    return [sum(p * math.dist(estimate, TRUE) ** 2 for p, estimate in estimates(k, advantages))
            for k, advantages in ((1, plain), (2, left_out), (4, left_out))]


def cosine_and_projection(gradient):
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    return [dot(gradient, TRUE) / math.sqrt(dot(gradient, gradient) * dot(TRUE, TRUE)),
            dot(gradient, TRUE) / dot(TRUE, TRUE)]


def over_std(scores):
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((x - mean) ** 2 for x in scores) / (len(scores) - 1))
    return [(x - mean) / (std + 1e-4) for x in scores]


def gae_error(lam):
    """How far the expected gradient is from the true one, as a share of it."""
    values, found = WORLD.values.tolist(), [0.0] * 9
    for text, p, score in zip(RESPONSES, PI, SCORES):
        advantage, following, reward = 0.0, 0.0, score
        for t, gradient in reversed(list(enumerate(token_scores(POLICY, text)))):
            value = values[STATES[text[:t]]]
            advantage = reward + following - value + lam * advantage
            following, reward = value, 0.0
            found = [x + p * advantage * g for x, g in zip(found, gradient)]
    return math.dist(found, TRUE) / math.hypot(*TRUE)


def test_the_answers_in_plain_loops():
    assert sum(PI) == pytest.approx(1) and sum(REF) == pytest.approx(1)
    assert WORLD.probs.tolist() == pytest.approx(PI)
    assert WORLD.gradient(WORLD.scores).tolist() == pytest.approx(TRUE)
    assert questions.kl(WORLD) == pytest.approx([kl(PI, REF)])
    assert questions.objective(WORLD) == pytest.approx([mean_score(PI) - 2 * kl(PI, REF)])
    assert questions.optimum(WORLD) == pytest.approx(tilted(REF, 1 / 2))
    z = sum(q * math.exp(x / 2) for q, x in zip(REF, SCORES))
    assert questions.optimum(WORLD)[1] == pytest.approx(2 * math.log(z))  # J(pi*) = beta log Z
    assert questions.ascent(WORLD) == pytest.approx(climbed(POLICY, 2))
    at_first = questions.optimum(WORLD)[1] - questions.objective(WORLD)[0]
    assert 0 < questions.ascent(WORLD)[0] < at_first
    assert questions.variance(WORLD) == pytest.approx(variances(0))
    assert questions.plus_ten(WORLD) == pytest.approx(variances(10))
    expected = mean_of(estimates(3, over_std))
    assert questions.group_std(WORLD) == pytest.approx(cosine_and_projection(expected))
    rows = list(zip(PI, SCORES, GRADIENTS, map(len, RESPONSES)))
    half = [sum(p * q * (x - y) * (a[j] / length - b[j] / other) / 2
                for p, x, a, length in rows for q, y, b, other in rows) for j in range(9)]
    assert questions.length_mean(WORLD) == pytest.approx(cosine_and_projection(half))
    best = [0.0] * 7
    for draw in itertools.product(range(7), repeat=4):
        best[max(draw, key=lambda i: SCORES[i])] += math.prod(REF[i] for i in draw)
    assert questions.best_of_n(WORLD) == pytest.approx([kl(best, REF), math.log(4) - 3 / 4])
    assert questions.gae(WORLD) == pytest.approx([0, gae_error(0.95), gae_error(0)], abs=1e-12)
    assert gae_error(1) == pytest.approx(0, abs=1e-12)  # unbiased, whatever the critic says


# -------------------------------------------------------------------- and those of the fourth part

LENGTHS = list(map(len, RESPONSES))
LENGTH_OF = dict(zip(SCORES, LENGTHS))  # no two responses have the same score
K = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}
SLOPE = {"k1": lambda x: 1, "k2": lambda x: x, "k3": lambda x: 1 - math.exp(-x)}  # of k by log pi
LOG_RATIOS = [math.log(p / q) for p, q in zip(PI, REF)]
OLDER = [[(3 * p + q) / 4 for p, q in zip(*rows)] for rows in zip(POLICY, REFERENCE)]
OLD = probabilities(OLDER)
RIGHT = sum(p for p, score in zip(PI, SCORES) if score > 1)  # the probability of a right response


def weighted(factors, gradients=GRADIENTS, probs=PI):
    """The sum of p * factor * gradient: 9 numbers."""
    return added([p * factor * x for x in g] for p, factor, g in zip(probs, factors, gradients))


def away(found, wanted):
    return math.dist(found, wanted) / math.hypot(*wanted)


def cosine(found, wanted=TRUE):
    return sum(a * b for a, b in zip(found, wanted)) / math.hypot(*found) / math.hypot(*wanted)


def tokens_of(text):
    """Of each token: log pi - log pi_ref, pi / pi_old, and the gradient of log pi."""
    for t, (token, gradient) in enumerate(zip(text, token_scores(POLICY, text))):
        state, taken = STATES[text[:t]], "ab.".index(token)
        p, q, old = (table[state][taken] for table in (POLICY, REFERENCE, OLDER))
        yield math.log(p / q), p / old, gradient


def minus(a, b):
    return [x - y for x, y in zip(a, b)]


def kls_of_tokens():
    """The cosines to the gradient of J, of k1 and k3 in the reward, and k2 and k3 in the loss."""
    wanted = weighted([r - 2 * x for r, x in zip(SCORES, LOG_RATIOS)])
    in_reward = lambda kind: weighted([r - 2 * sum(K[kind](x) for x, _, _ in tokens_of(text))
                                       for r, text in zip(SCORES, RESPONSES)])
    in_loss = lambda kind: minus(TRUE, weighted([2] * 7, [
        added([SLOPE[kind](x) * number for number in g] for x, _, g in tokens_of(text))
        for text in RESPONSES]))
    return [cosine(found, wanted) for found in (in_reward("k1"), in_reward("k3"), in_loss("k2"),
                                                in_loss("k3"))]


def stale(clip=math.inf):
    """The expected sum of A ratio grad log pi, and the shares of tokens: cut, and out of range."""
    mean = sum(p * score for p, score in zip(OLD, SCORES))
    found, cut, outside = [0.0] * 9, 0.0, 0.0
    for text, p, score in zip(RESPONSES, OLD, SCORES):
        for _, ratio, gradient in tokens_of(text):
            is_cut = ratio > 1 + clip if score > mean else ratio < 1 - clip
            found = [x + p * (score - mean) * ratio * (not is_cut) * g
                     for x, g in zip(found, gradient)]
            cut, outside = cut + p * is_cut, outside + p * (abs(ratio - 1) > clip)
    tokens = sum(p * length for p, length in zip(OLD, LENGTHS))
    return found, cut / tokens, outside / tokens


def opo(scores, leave_out=False):
    found = []
    for i, score in enumerate(scores):
        others = [x for j, x in enumerate(scores) if not (leave_out and i == j)]
        weights = [LENGTH_OF[x] for x in others]
        found.append(score - sum(w * x for w, x in zip(weights, others)) / sum(weights))
    return found


def maxrl_of(scores):
    rewards = [float(score > 1) for score in scores]
    mean = sum(rewards) / len(rewards)
    return [(reward - mean) / mean if mean else 0.0 for reward in rewards]


def newer_answers():
    yield [0, math.hypot(*weighted(LENGTHS))]
    yield [1 - 1 / 2, 1 - 1 / 4, 1 - 1 / 8]
    yield [sum(p * k(x) for p, x in zip(PI, LOG_RATIOS)) for k in K.values()]
    forward, reverse = weighted(LOG_RATIOS), weighted([-1] * 7, probs=REF)
    found = [weighted(map(slope, LOG_RATIOS)) for slope in SLOPE.values()]
    yield [*[away(each, forward) for each in found], away(found[2], reverse)]
    yield [sum((1 - RIGHT) ** j for j in range(k - 1)) for k in (2, 4, 8)]
    yield [*cosine_and_projection(mean_of(estimates(3, opo))), 0]
    yield kls_of_tokens()
    mean = sum(p * score for p, score in zip(OLD, SCORES))
    advantages = [score - mean for score in SCORES]
    yield [kl(PI, OLD), cosine(weighted(advantages, probs=OLD)), cosine(weighted(advantages)),
           cosine(stale()[0])]
    yield [*cosine_and_projection(stale(0.15)[0]), stale(0.15)[1]]


def test_the_newer_answers_in_plain_loops():
    for question, answer in zip(newer.QUESTIONS, newer_answers(), strict=True):
        assert question(WORLD) == pytest.approx(answer, abs=1e-6), question
    repaired = mean_of(estimates(3, lambda scores: opo(scores, leave_out=True)))
    assert repaired == pytest.approx(TRUE)
    of_p = weighted([score > 1 for score in SCORES])
    for k, multiple in zip((2, 4), newer.maxrl_order(WORLD)):  # every draw, not only their counts
        assert mean_of(estimates(k, maxrl_of)) == pytest.approx([multiple * x for x in of_p])


def newer_misconceptions():
    bound = math.hypot(*weighted(LENGTHS))
    yield from ([0, 0], [math.hypot(*TRUE), bound], [1, 1, 1], [1 / 2, 3 / 4, 3 / 4],
                [1 / 2, 3 / 4, 3 / 8], [kl(PI, REF)] * 3)
    yield [kl(PI, REF), sum(p * x * x / 2 for p, x in zip(PI, LOG_RATIOS)), kl(REF, PI)]
    forward, reverse = weighted(LOG_RATIOS), weighted([-1] * 7, probs=REF)
    found = weighted(map(SLOPE["k3"], LOG_RATIOS))
    yield from ([0, 0, 0, away(found, reverse)], [0, 0, away(found, forward), 0])
    yield from ([1 / RIGHT] * 3, [sum((1 - RIGHT) ** j for j in range(k)) for k in (2, 4, 8)])
    yield from ([1, 2 / 3, 0], [1] * 4)
    wanted = weighted([r - 2 * x for r, x in zip(SCORES, LOG_RATIOS)])
    k3_in_reward = weighted([r - 2 * K["k3"](x) for r, x in zip(SCORES, LOG_RATIOS)])
    k3_in_loss = minus(TRUE, weighted([2 * SLOPE["k3"](x) for x in LOG_RATIOS]))
    yield [1, cosine(k3_in_reward, wanted), 1, cosine(k3_in_loss, wanted)]
    lag, *cosines = list(newer_answers())[7]
    yield from ([lag, 1, 1, 1], [kl(OLD, PI), *cosines])
    yield from ([*cosine_and_projection(stale()[0]), 0],
                [*cosine_and_projection(stale(0.15)[0]), stale(0.15)[2]])


def misconceptions():
    """The wrong numbers, in the order of questions.MISCONCEPTIONS."""
    tables = [(p, q) for rows in zip(POLICY, REFERENCE) for p, q in zip(*rows)]
    length = sum(p * len(text) for p, text in zip(PI, RESPONSES))
    yield [kl(REF, PI)]
    yield [sum(p * math.log2(p / q) for p, q in zip(PI, REF))]
    yield [kl(PI, REF) / length]
    yield [kl(*zip(*tables))]
    yield from ([mean_score(PI) - beta * kl(PI, REF)] for beta in (-2, 0, 1))
    yield [mean_score(REF)]
    yield from (tilted(REF, 2), tilted(REF, 1), tilted(PI, 1 / 2), tilted([1.0] * 7, 1 / 2))
    yield from (climbed(REFERENCE, 2), climbed(POLICY, 0))
    one, two, four = variances(0)
    yield from ([one, 4 * two, 16 * four], [one, one / 2, one / 4], [one, two, two / 2])
    yield [one, two, four]
    cosine, projection = cosine_and_projection(mean_of(estimates(3, over_std)))
    yield from ([1, 1], [1, 2 / 3], [cosine, projection * math.sqrt(3 / 2)], [1, 1])
    yield from ([math.log(4) - 3 / 4] * 2, [math.log(4)] * 2, [0, 0, 0])
    yield from newer_misconceptions()


def test_each_misconception_is_told():
    pairs = zip(questions.MISCONCEPTIONS, misconceptions(), strict=True)
    for (question, _, sentence), numbers in pairs:
        assert questions.judge(question, list(map(float, numbers)), WORLD) == sentence


def test_answers_as_a_student_gives_them(tmp_path, capsys):
    template = json.loads((ROOT / "exercises" / "answers.json").read_text())
    assert list(template) == [question.__name__ for question in questions.QUESTIONS]
    assert len(template) == 19
    for question in questions.QUESTIONS:
        answer = template[question.__name__]
        assert len(question(WORLD)) == (len(answer) if isinstance(answer, list) else 1)
        assert questions.judge(question.__name__, answer, WORLD) == "not done yet"
        template[question.__name__] = [float(f"{number:.4g}") for number in question(WORLD)]
    template["kl"] = template["kl"][0]
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(template))
    ok, lines = run(capsys, "--answers", path)
    assert ok and lines[-1] == "19 of 19 right"
    last_year = run(capsys, "--answers", path, "--seed", 2)[1]
    assert last_year[-1] != "19 of 19 right"
    path.write_text(json.dumps({"kl": "0.3", "gae": [0, 0], "optimum": [math.nan, 2],
                                "variance": [7, 7, 7], "objective": 9}))
    lines = run(capsys, "--answers", path)[1]
    assert [line.strip() for line in lines if line.startswith("    ")] == [
        "['0.3'] should be 1 number(s)", "wrong", "number 1, 2 of 2 is wrong",
        "number 1, 2, 3 of 3 is wrong", "2 number(s), should be 3"]


def test_other_worlds_have_answers_too():
    for seed in range(2, 6):
        world = World(seed)
        answers = [number for question in questions.QUESTIONS for number in question(world)]
        assert all(map(math.isfinite, answers))
        assert questions.objective(world) != questions.objective(WORLD)


def test_the_sheet_has_the_world_and_the_questions(capsys):
    questions.main(questions.Args())
    first, second = capsys.readouterr().out.strip().split("\n\n11. ")
    page = (ROOT / "exercises" / "README.md").read_text()
    assert first in page and f"\n11. {second}\n" in page
