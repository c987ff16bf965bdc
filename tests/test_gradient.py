"""lab/gradient.py agrees with test_exact.py, and sees which edited copies of scripts are biased."""

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_exact as exact
import torch
from helpers import loop
from helpers.exact import Enumeration
from helpers.tiny import make_float64_critic
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dpo
import reinforce
import remax
import rloo
import vanilla_pg
from common import token_values
from lab import blackbox, gradient
from lab.family import FAMILY
from plumbing import load_module
from tools import kill

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SMALL = gradient.Args(k=2, length=2, prompts=1)  # 3 responses to a prompt are possible


def measure(command, args=SMALL):
    """The Result of a script, or the line that says why there is none."""
    with loop.float64():
        return gradient.attempt(command, gradient.make_world(args), args)


# ---------------------------------------------------------------------------- against test_exact.py


def sequence_loss(world, k):
    def loss(rows):
        advantages = rloo.compute_advantages(world.sequence_rewards(exact.BETA)[rows], k)
        return rloo.compute_loss(world.logprobs[rows], advantages) / k

    return loss


def remax_loss(world, k):
    rewards, baseline = world.token_rewards(exact.BETA), world.scores[world.greedy].expand(k)

    def loss(rows):
        advantages = remax.compute_advantages(rewards[rows], baseline, world.mask[rows])
        return remax.compute_loss(world.logprobs[rows], advantages) / k

    return loss


def vanilla_pg_loss(world, k):
    rewards = world.token_rewards(exact.BETA)

    def loss(rows):
        advantages, _ = vanilla_pg.compute_advantages(rewards[rows], world.values[rows],
                                                      world.mask[rows])
        return vanilla_pg.compute_loss(world.logprobs[rows], advantages) / k

    return loss


def reinforce_loss(world, k):
    rewards = world.sequence_rewards(exact.BETA)
    return lambda rows: reinforce.compute_loss(world.logprobs[rows], rewards[rows]) / k


SAME = {  # command -> function (world, k) that makes its loss
    "rloo.py": sequence_loss,
    "reinforce.py --baseline none": reinforce_loss,
    "remax.py": remax_loss,
    "vanilla_pg.py": vanilla_pg_loss,
    "ppo.py --lam 1 --no-whiten": lambda world, k: exact.ppo_loss(world, 1.0),
    "ppo.py --lam 0.95 --no-whiten": lambda world, k: exact.ppo_loss(world, 0.95),
    "ppo.py --lam 0 --no-whiten --clip inf": lambda world, k: exact.ppo_loss(world, 0.0),
    "ppo.py --lam 1": lambda world, k: exact.ppo_loss(world, 1.0, whiten=True),
    "reinforce_pp.py --no-normalize-scores": lambda world, k: exact.reinforce_pp_loss(world, True),
    "reinforce_pp_baseline.py --no-whiten":
        lambda world, k: exact.reinforce_pp_baseline_loss(world, k, exact.BETA),
    "grpo.py": lambda world, k: exact.grpo_loss(world, k, True, True, exact.BETA),
    "grpo.py --no-scale-std --no-length-mean":
        lambda world, k: exact.grpo_loss(world, k, False, False, exact.BETA),
    "grpo.py --no-length-mean --beta 0": lambda world, k: exact.grpo_loss(world, k, True, False),
}


def same_world(length, k):
    """The Args and the world of Enumeration(words=2, length)."""
    args = gradient.Args(words=2, length=length, prompts=1, k=k, beta=exact.BETA,
                         missing_eos_penalty=0.0)
    world, enumerated = gradient.make_world(args), Enumeration(words=2, length=length)
    world.scores, world.critic = enumerated.scores, make_float64_critic(3, seed=6)
    with torch.no_grad():
        world.critic.score.weight *= 3
    return args, world, enumerated


SLOW = [pytest.mark.slow]
QUICK = ("rloo.py", "ppo.py --lam 1", "grpo.py")


@pytest.mark.parametrize("command",
                         [pytest.param(name, marks=SLOW * (name not in QUICK)) for name in SAME])
def test_agrees_with_the_expectation_of_the_scripts_functions(command):
    args, world, enumerated = same_world(length=2, k=2)
    with loop.float64():
        found = gradient.measure(command, world, args)
        beta = 0.0 if "--beta 0" in command else exact.BETA
        cosine, projection = exact.bias(enumerated, SAME[command](enumerated, 2), 2, beta)
    assert (found.cosine, found.length) == pytest.approx((cosine, projection), abs=1e-9)
    assert found.bias**2 == pytest.approx(1 + (projection / cosine) ** 2 - 2 * projection, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILY if FAMILY[name].lab])
def test_every_algorithm_is_measured_as_what_its_formula_says(name):
    """Twice the same, and a copy under another name like the script that it is a copy of."""
    args, world, _ = same_world(length=1, k=2)
    with loop.float64():
        found, expected = (gradient.measure(f"{script}.py {FAMILY[name].lab[0]}", world, args)
                           for script in (name, FAMILY[name].formula or name))
    assert found == expected and found.draws > 0


KNOWN = {  # command -> k, and its name in test_exact.BIASED
    "ppo.py --lam 0.95 --no-whiten": (1, "ppo, lambda 0.95, wrong critic"),
    "ppo.py --lam 0 --no-whiten": (1, "ppo, lambda 0, wrong critic"),
    "grpo.py --no-scale-std --no-length-mean": (2, "grpo, KL k3 in the loss"),
    "reinforce_pp_baseline.py --no-whiten": (2, "reinforce_pp_baseline, k = 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", KNOWN)
def test_known_bias(command):
    k, name = KNOWN[command]
    args, world, _ = same_world(length=3, k=k)
    with loop.float64():
        found = gradient.measure(command, world, args)
    assert (found.cosine, found.length) == pytest.approx(exact.BIASED[name][1], abs=1e-3)


def assert_is(found, weighted, true, generated):
    """The Result is that of these (probability, gradient) pairs, added up one by one."""
    assert sum(weight for weight, _ in weighted) == pytest.approx(1, abs=1e-12)
    mean = sum(weight * gradient for weight, gradient in weighted)
    variance = sum(weight * (gradient - mean).norm() ** 2 for weight, gradient in weighted)
    variance *= generated
    along = (mean @ true / true.norm() ** 2).item()
    cosine = (mean @ true / (mean.norm() * true.norm())).item()
    assert found.cosine == pytest.approx(cosine, abs=1e-9)
    assert found.length == pytest.approx(along, abs=1e-9)
    assert found.bias == pytest.approx(((mean - true).norm() / true.norm()).item(), abs=1e-9)
    assert found.variance == pytest.approx((variance / true.norm() ** 2).item(), rel=1e-9)
    assert found.noise == pytest.approx((variance / true.norm() ** 2).item() / along**2, rel=1e-9)


@pytest.mark.parametrize("command", ["grpo.py", "ppo.py --lam 0 --no-whiten --clip inf"])
def test_variance_of_a_biased_script_is_the_plain_sum_over_draws(command):
    args, world, enumerated = same_world(length=2, k=2)
    with loop.float64():
        found = gradient.measure(command, world, args)
    loss, probs = SAME[command](enumerated, 2), enumerated.probs.detach()
    draws = [((probs[a] * probs[b]).item(), enumerated.gradient(loss(torch.tensor([a, b]))))
             for a, b in itertools.product(range(len(probs)), repeat=2)]
    assert_is(found, draws, enumerated.true_gradient(exact.BETA), generated=2)


def test_dpo_is_the_plain_sum_over_pairs():
    """Of two samples the better is likely the chosen one: sigmoid of how much better it is."""
    args = gradient.Args(length=2, prompts=2)
    with loop.float64():
        world = gradient.make_world(args)
        found = gradient.measure("dpo.py", world, args)
        logprobs = world.logprobs(args.temperature)
        ref_logprobs = world.logprobs(args.temperature, world.reference).detach()
        scores, pairs = world.scores - args.missing_eos_penalty * ~world.batch.ended, []
        for prompt, a, b in itertools.product(range(2), range(world.M), range(world.M)):
            first, second = prompt * world.M + a, prompt * world.M + b
            both = (logprobs[first].sum() + logprobs[second].sum()).exp() / 2  # of two prompts
            for chosen, rejected in ((first, second), (second, first)):
                loss, *_ = dpo.compute_loss(logprobs[[chosen]], logprobs[[rejected]],
                                            ref_logprobs[[chosen]], ref_logprobs[[rejected]],
                                            args.beta)
                gradients = torch.autograd.grad(loss, list(world.policy.parameters()),
                                                retain_graph=True)
                wins = torch.sigmoid(scores[chosen] - scores[rejected])
                pairs.append(((both * wins).item(),
                              torch.cat([part.flatten() for part in gradients])))
        true = world.true_gradient([0, 1], args.temperature, args.beta, args.missing_eos_penalty)
    assert_is(found, pairs, true, generated=2)


@pytest.mark.parametrize("bias, error, said", [
    (0.299, 0.1, "no bias seen: 0.30 ± 0.10"),
    (0.301, 0.1, "biased: points 60° off, 0.50 of the length"),
    (0.001, 0.0, "biased: points 60° off, 0.50 of the length"),
    (9e-7, 0.0, "unbiased to 1e-6"), (9e-7, 1e-7, "unbiased to 1e-6")])
def test_verdict_allows_three_standard_errors(bias, error, said):
    found = gradient.Result(cosine=0.5, length=0.5, bias=bias, error=error, variance=1.0, draws=9)
    assert found.verdict() == said


# ------------------------------------------------------------------------------------ edited copies


def edited(folder, script, *changes):
    """The path of a copy of a script in which texts are replaced; None is the end of the file."""
    text = (ROOT / script).read_text()
    for old, new in changes:
        assert old is None or text.count(old) == 1, old
        text = text + new if old is None else text.replace(old, new)
    path = folder / f"my_{Path(script).name}"
    path.write_text(text)
    return path


MORE = "        # 2. score"  # after the rollout
BASELINE = "(rewards.sum(1, keepdim=True) - rewards) / (k - 1)"
ADVANTAGES = "compute_advantages(rewards, args.k)"
SCORE_BEFORE_EOS = """
def token_rewards(scores, kl, beta, response_mask):
    rewards = -beta * kl
    rewards[torch.arange(len(scores)), (response_mask.sum(1) - 2).clamp(min=0)] += scores
    return rewards
"""
VALUE_AT_TOKEN = """
from common import classifier_outputs

@torch.no_grad()
def no_grad_values(critic, batch, max_tokens):
    return classifier_outputs(critic, batch, last=True)[:, 1:] * batch.response_mask
"""
RAW = "reinforce_pp.py", "--no-normalize-scores --no-whiten"
BROKEN = {  # script, flags, and what is replaced by what
    "the step goes down": ("rloo.py", "", ("return -(advantages", "return (advantages")),
    "the KL is rewarded": ("rloo.py", "", ("(scores, kl, args.beta)", "(scores, -kl, args.beta)")),
    "self in the baseline": ("rloo.py", "", (BASELINE, "rewards.mean(1, keepdim=True)")),
    "sample-major rows": ("rloo.py", "", ("rewards.view(-1, k)", "rewards.view(k, -1).T")),
    "the KL of one token": (
        *RAW, ("token_rewards(shaped, kl, args.beta, batch.response_mask)",
               "shaped.unsqueeze(1) - args.beta * kl"),
        ("rewards.flip(1).cumsum(1).flip(1)", "rewards")),
    "the KL of the next token": (
        "rloo.py", "", ("(scores, kl, args.beta)", "(scores, kl[:, 1:], args.beta)")),
    "1/length": (
        "rloo.py", "", ("logprobs.sum(1))", "logprobs.sum(1) / (logprobs != 0).sum(1))")),
    "std": (
        "rloo.py", "", ("(rewards - baseline)",
                        "((rewards - baseline) / (rewards.std(1, keepdim=True) + 1e-4))")),
    "EOS left out of the mask": (
        "rloo.py", "", (MORE, "        batch.response_mask &= batch.responses != "
                              f"tokenizer.eos_token_id\n{MORE}")),
    "GAE off by one": (
        "ppo.py", "--lam 1 --no-whiten",
        ("range(rewards.shape[1])", "range(rewards.shape[1] - 1)")),
    "the score before EOS": (*RAW, (None, SCORE_BEFORE_EOS)),
    "the critic read at the token": ("vanilla_pg.py", "", (None, VALUE_AT_TOKEN)),
    "no temperature in the reference": (
        "rloo.py", "", ("(reference, batch, args.temperature,", "(reference, batch, 1.0,")),
}
SOUND = {
    "a baseline from the other prompts": (
        "rloo.py", "",
        (BASELINE, "(rewards.sum() - rewards.sum(1, keepdim=True)) / (rewards.numel() - k)")),
    "a baseline from other prompts by their order": (
        "rloo.py", "", ("rewards.view(-1, k)", "rewards.view(k, -1)"),
        (BASELINE, "(rewards.sum(0, keepdim=True) - rewards) / (k - 1)")),
    "a constant baseline": ("rloo.py", "", (BASELINE, "1.7")),
    "a baseline that is added": ("rloo.py", "", ("(rewards - baseline)", "(rewards + baseline)")),
    "a baseline that main remembers": (
        "reinforce.py", "--k 1", ("    run = Run(", "    average = 0.0\n    run = Run("),
        ("rewards - baseline", "rewards - average\n"
         "        average = 0.9 * average + 0.1 * rewards.mean().item()")),
    "a baseline that run.state remembers": (
        "rloo.py", "",
        (ADVANTAGES, "rewards - run.state.get('average', 0.0)\n"
         "        average = run.state.get('average', 0.0) + 0.1 * rewards.mean().item()\n"
         "        run.state['average'] = average")),
    "several mini-batches": ("ppo.py", "--lam 1 --no-whiten --minibatches 2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_names_the_bias_of_a_broken_copy(name, tmp_path):
    script, flags, *changes = BROKEN[name]
    args = replace(SMALL, length=1, prompts=2) if name == "sample-major rows" else SMALL
    found = measure(f"{edited(tmp_path, script, *changes)} {flags}", args)
    assert found.bias > 1e-3
    if name in ("self in the baseline", "sample-major rows"):  # half of the rows' own
        assert found.verdict() == "the right direction, 0.50 of the length"
    else:
        assert found.verdict().startswith("biased: points ") and found.angle > 0.3
    if name == "the step goes down":
        assert found.verdict() == "biased: points 180° off, away from it, -1.00 of the length"


@pytest.mark.parametrize("name", SOUND)
def test_finds_no_bias_in_a_sound_copy(name, tmp_path):
    script, flags, *changes = SOUND[name]
    args = replace(SMALL, length=1, prompts=2) if "prompts" in name else SMALL
    found = measure(f"{edited(tmp_path, script, *changes)} {flags}", args)
    assert found.error == 0 and found.verdict() == "unbiased to 1e-6"
    if name == "a baseline that is added":  # which only the variance can tell
        assert found.variance > 1.2 * measure("rloo.py").variance


# ----------------------------------------------------------------------------------------- variance


def test_a_constant_reward_costs_variance_only_without_a_baseline():
    """By its square: with equal steps, the third difference is 0 and the second is not."""
    def variances(command, *constants):
        worlds = (gradient.Args(length=2, prompts=1, k=2, constant=constant)
                  for constant in constants)
        return [measure(command, world).variance for world in worlds]

    a, b, c, d = variances("reinforce.py --baseline none --k 1", 0.0, 3.0, 6.0, 9.0)
    assert c - 2 * b + a > 0.1 * a and d > 10 * a
    assert d - 3 * c + 3 * b - a == pytest.approx(0, abs=1e-9 * d)
    for command in ("rloo.py", "remax.py --k 1"):
        a, b = variances(command, 0.0, 9.0)
        assert b == pytest.approx(a)


def test_equal_numbers_of_responses():
    """Twice the responses have half the variance; ReMax's greedy ones count."""
    one, two = (gradient.Args(length=2, prompts=1, k=k, spread=0.0) for k in (1, 2))
    command = "reinforce.py --baseline none"
    assert measure(command, one).variance == pytest.approx(measure(command, two).variance)
    alone, pair = (measure("remax.py", world).variance for world in (one, two))
    assert 2 * pair / 3 == pytest.approx(alone / 2)


def test_sampled_where_there_are_too_many_draws():
    found, exactly = (measure("rloo.py", gradient.Args(length=2, prompts=1, k=3, draws=draws))
                      for draws in (9, 10))
    assert found.draws == 9 and found.error == pytest.approx(math.sqrt(found.variance / 3 / 9))
    assert found.verdict() == f"no bias seen: {found.bias:.2f} ± {found.error:.2f}"
    assert exactly.draws == 10 and exactly.error == 0


# -------------------------------------------------------------------------------------------- draws


def test_all_draws_by_hand():
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5]])

    def found(prompts, k, *order):
        return [list(part) for part in gradient.all_draws(probabilities, prompts, k, *order)]

    assert found([1], 2) == [[(2, 2), (2, 3), (3, 3)], [0.25, 0.5, 0.25]]
    assert found([1], 2, True) == [[(2, 2), (2, 3), (3, 2), (3, 3)], [0.25] * 4]
    assert found([0, 1], 1) == [[(0, 2), (0, 3), (1, 2), (1, 3)], [0.125, 0.125, 0.375, 0.375]]
    rows, weights = gradient.all_draws(probabilities, [0, 1], 3)
    assert len(rows) == 16 and rows[5] == (0, 0, 1, 2, 2, 3)
    assert weights[5].item() == pytest.approx(3 * 0.25**2 * 0.75 * 3 / 8)
    assert weights.sum().item() == pytest.approx(1)


def test_sampled_draws_have_the_policys_shares():
    torch.manual_seed(0)
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    rows, weights = gradient.sampled_draws(probabilities, [1, 0], 2, 4000)
    assert len(rows) == 4000 and weights.tolist() == pytest.approx([1 / 4000] * 4000)
    share = lambda place, row: sum(draw[place] == row for draw in rows) / 4000
    for place in (0, 1):
        assert share(place, 2) + share(place, 3) == 1
        assert share(place, 3) == pytest.approx(0.5, abs=0.03)
        assert share(2 + place, 0) + share(2 + place, 1) == 1
        assert share(2 + place, 1) == pytest.approx(0.75, abs=0.03)


def test_another_order_keeps_each_prompts_responses():
    draw = (0, 1, 2, 3, 4, 5, 6, 7)
    other = gradient.shuffled(draw, 4)
    assert other != draw and sorted(other[:4]) == [0, 1, 2, 3] and sorted(other[4:]) == [4, 5, 6, 7]


class Rows(list):
    """Instead of a Batch: the numbers of its rows."""

    def __getitem__(self, rows):
        return list(rows)


@pytest.mark.parametrize("gradient_of, same", [
    (lambda rows, update: sum(rows), True),
    (lambda rows, update: rows[0] + rows[2], False),
    # of the order that is checked last
    (lambda rows, update: rows[2] if max(rows) == 9 else sum(rows), False),
    (lambda rows, update: sum(rows) + update, True),  # main remembers something: it is started anew
    (lambda rows, update: rows[0] + rows[2] + update, False),
])
def test_draws_are_run_as_updates(gradient_of, same, monkeypatch):
    """In their order, with the greedy rows where those are asked for; the warm-up comes before."""
    def run(command, given, count, warmup, **flags):
        assert (command, warmup, flags) == ("my.py", gradient.WARMUP, {"flag": 1})
        before = [given(update, None, 2, False) for update in range(-warmup, 0)]
        assert before == [[i, i] for i in range(warmup)]
        assert given(0, None, 1, True) == [5, 6]
        rows = [given(update, None, 2, False) for update in range(count)]
        found = [1.0 + gradient_of(row, update) for update, row in enumerate(rows)]
        return [SimpleNamespace(batch=row, generated=4, gradient=torch.tensor([number]))
                for row, number in zip(rows, found, strict=True)]

    monkeypatch.setattr(blackbox, "run", run)
    draws = [(i, i + 1, i + 2, i + 3) for i in range(8)]  # k 2, two prompts
    warmup = [(i, i) for i in range(gradient.WARMUP)]
    found = gradient.run_draws("my.py", Rows(), draws, 2, [5, 6], warmup, {"flag": 1})
    assert found[0].tolist() == [[1.0 + gradient_of(draw, 0)] for draw in draws]
    assert found[1:] == (4, same)


def test_angles_of_cosines_that_are_rounded_past_1():
    result = gradient.Result(1.0, 1.0, 0.0, 0.0, 1.0, 1)
    for cosine, angle in ((1.0 + 1e-12, 0.0), (0.5, 60.0), (-1.0 - 1e-12, 180.0)):
        assert replace(result, cosine=cosine).angle == pytest.approx(angle)


# ---------------------------------------------------------------------------------------- the world


def true_values(world, beta, penalty):
    """The mean reward to go of every state (prompt, tokens so far), from texts: state -> value."""
    logprobs, ref_logprobs = (world.logprobs(world.temperature, model).tolist()
                              for model in (None, world.reference))
    eos, rows_of, values = world.tokenizer.eos_token_id, {}, {}
    for row, tokens in enumerate(world.batch.responses.tolist()):
        tokens = tuple(tokens[: int(world.batch.response_mask[row].sum())])
        rewards = [-beta * (logprobs[row][t] - ref_logprobs[row][t]) for t in range(len(tokens))]
        rewards[-1] += world.scores[row].item() - penalty * (tokens[-1] != eos)
        probability = math.exp(sum(logprobs[row]))
        for t in range(len(tokens)):
            rows = rows_of.setdefault((row // world.M, tokens[:t]), [])
            rows.append((probability, sum(rewards[t:])))
    for state, rows in rows_of.items():
        values[state] = sum(p * value for p, value in rows) / sum(p for p, _ in rows)
    return values


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_critic_knows_the_true_values_or_errs_by_chance(error):
    with loop.float64(), torch.no_grad():
        args = gradient.Args(length=2, words=2, prompts=2, critic_error=error)
        world = gradient.make_world(args)
        values = token_values(world.critic, world.batch).tolist()
        true = true_values(world, args.beta, args.missing_eos_penalty)
    assert len(true) == 2 * (1 + 2)
    errors = {}
    for row, tokens in enumerate(world.batch.responses.tolist()):
        for t in range(int(world.batch.response_mask[row].sum())):
            state = row // world.M, tuple(tokens[:t])
            wrong = values[row][t] - true[state]  # the same wherever the state occurs
            assert wrong == pytest.approx(errors.setdefault(state, wrong))
    if error:
        assert 0.3 < statistics.stdev(errors.values()) < 2
    else:
        assert max(map(abs, errors.values())) < 1e-6


def test_scores_have_the_mean_that_the_flags_say():
    args = gradient.Args(words=2, length=3, prompts=3, constant=1.0, spread=2.0)
    with loop.float64():
        world = gradient.make_world(args)
    probabilities = world.batch.old_logprobs.exp().prod(1)  # masked tokens have probability 1
    scores = world.scores - args.missing_eos_penalty * (world.batch.responses != 2).all(1)
    assert (probabilities * scores).view(3, -1).sum(1).tolist() == pytest.approx([3.0, -1.0, 3.0])
    assert world.scores.view(3, -1).std(1).mean().item() == pytest.approx(2, abs=0.5)
    assert [world.prompts[i] for i in (0, 1, 2)] == ["b a b", "a", "b b"]


# ------------------------------------------------------------------------------------ the black box


@pytest.mark.parametrize("command", ["ppo.py --minibatches 2 --epochs 2", "grpo.py", "raft.py",
                                     "lab/rloo_token.py"])
def test_the_weights_of_tokens_make_the_gradient(command):
    with loop.float64():
        args = gradient.Args(k=2, length=3, prompts=1)
        world = gradient.make_world(args)
        rows = [0, 2]
        given = lambda *_: world.batch[rows]
        (update,) = blackbox.run(command, given, **gradient.settings(args))
        loss = -(world.logprobs(args.temperature)[rows] * update.weights).sum() / len(rows)
        gradients = torch.autograd.grad(loss, list(world.policy.parameters()))
    assert update.gradient.norm() > 1e-3
    torch.testing.assert_close(torch.cat([part.flatten() for part in gradients]), update.gradient)
    assert update.generated == 2


def test_updates_are_counted_from_the_warm_up(tmp_path):
    """A script whose advantages grow with run.step: after one to warm up, it is 2."""
    command = str(edited(tmp_path, "rloo.py", (ADVANTAGES, f"{ADVANTAGES} * run.step")))
    with loop.float64():
        world = gradient.make_world(SMALL)
        run = lambda count, warmup: blackbox.run(command, lambda *_: world.batch[[0, 2]], count,
                                                 warmup, **gradient.settings(SMALL))
        (first,), (second, another) = run(1, 0), run(2, 1)
    torch.testing.assert_close(second.gradient, 2 * first.gradient)
    torch.testing.assert_close(another.gradient, second.gradient)


def test_a_script_that_does_not_fit_gets_one_line(tmp_path):
    again = ("rollout(policy, tokenizer, examples['prompt_ids'], args.k, args.temperature, "
             "args.max_new_tokens)")
    twice = edited(tmp_path, "rloo.py", (MORE, f"        {again}\n{MORE}"))
    early = edited(tmp_path, "raft.py", (MORE, f"        break\n{MORE}"))
    lines = {
        str(twice): "samples twice in an update",
        str(early): "stops after 1 of --num-updates ",
        "nothing.py": "nothing.py: no such file",
        "plot.py": "has no Run",
        "sft.py": "has no flag --beta",
        "rloo.py --kk 4": "--kk",
        "rloo.py --k 1": "--k 1: the baseline is the mean of the other",
    }
    for command, line in lines.items():
        found = measure(command)
        assert isinstance(found, str) and line in found and "\n" not in found, found
    fails = edited(tmp_path, "remax.py", ("(returns - baseline.", "(returns - baselin."))
    number = 1 + fails.read_text()[: fails.read_text().index("baselin.")].count("\n")
    said = f"NameError: name 'baselin' is not defined (my_remax.py, line {number})"
    assert measure(str(fails)) == said


def test_updates_start_from_the_state_and_the_random_numbers_after_the_warm_up(monkeypatch):
    seen = []

    def note(run, examples, **_):
        draws = run.state.setdefault("draws", [])
        draws.append(torch.rand(()).item())
        seen.append((run.step, *draws))

    monkeypatch.setattr(blackbox.BlackBox, "check_finite", note)
    with loop.float64():
        world = gradient.make_world(SMALL)
        blackbox.run("rloo.py", lambda *_: world.batch[[0, 2]], 3, warmup=2,
                     **gradient.settings(SMALL))
    (_, one), (_, _, two), (_, _, _, three) = seen[:3]
    assert len({one, two, three}) == 3
    assert seen == [(1, one), (2, one, two), *[(3, one, two, three)] * 3]


def test_updates_get_the_first_rows_of_the_data_or_the_chosen_ones(monkeypatch):
    seen, args = [], gradient.Args(k=2, length=1, prompts=2)
    monkeypatch.setattr(blackbox.BlackBox, "check_finite",
                        lambda run, examples, **_: seen.append(examples["prompt"]))
    with loop.float64():
        world = gradient.make_world(args)
        given, settings = lambda *_: world.batch[[0, 0, 2, 2]], gradient.settings(args)
        blackbox.run("rloo.py", given, 2, rows=lambda row: [1 + row, 2 + row], **settings)
        blackbox.run("rloo.py", given, **settings)
    a, b = world.prompts
    assert seen == [[b, a], [a, b], [a, b]]


@pytest.mark.parametrize("flags, line", [
    ({"words": 6, "length": 4},
     "--words 6 --length 4: 1555 responses to a prompt are too many; 200 are possible"),
    ({"prompts": 5}, "--prompts 5: must be between 1 and 4"),
    ({"prompts": 0}, "--prompts 0: must be between 1 and 4"),
    ({"k": 0}, "--k 0: must be between 1 and 8"),
    ({"words": 0}, "--words 0: must be between 1 and 6"),
    ({"length": 0}, "--length 0: must be between 1 and 6"),
    ({"draws": 0}, "--draws 0: must be between 1 and 1000000"),
    ({"beta": -0.1}, "--beta -0.1: must be 0 or more, and finite"),
    ({"peaked": 0.0}, "--peaked 0.0: must be positive and finite"),
    ({"critic_error": -1.0}, "--critic-error -1.0: must be 0 or more, and finite"),
    ({"temperature": 0.0}, "--temperature 0.0: must be positive and finite"),
    ({"at_optimum": True, "beta": 0.0}, "--at-optimum --beta 0.0: without a KL there is no optimum "
                                        "inside; give a positive --beta"),
    ({"at_optimum": True, "binary": True}, "--at-optimum --binary: its scores are not 0 and 1; use "
                                           "one of them"),
    ({"output": "a.pdf"}, "--output a.pdf: must be the name of a PNG file"),
])
def test_bad_flags(flags, line, capsys):
    with pytest.raises(SystemExit):
        gradient.main(gradient.Args(**flags))
    assert capsys.readouterr().err == f"error: {line}\n"


def test_the_rows_are_those_of_the_family():
    """Every algorithm, with the flags that it lists, and rloo_token.py after its relative."""
    assert gradient.SCRIPTS[:4] == ("rloo.py", "lab/rloo_token.py", "reinforce.py --baseline none",
                                    "reinforce.py")
    rows = {command.split(".py")[0] for command in gradient.SCRIPTS}
    assert {*FAMILY, "lab/rloo_token"} - rows == {name for name in FAMILY if FAMILY[name].binary}
    assert len(gradient.SCRIPTS) == 1 + sum(len(FAMILY[name].lab) for name in FAMILY)


def test_the_tables_columns():
    found = gradient.Result(cosine=0.8, length=0.5, bias=0.7, error=0.25, variance=3.0, draws=9,
                            k=2)
    backward = gradient.Result(cosine=-0.8, length=-0.5, bias=1.7, error=0.0, variance=30.0,
                               draws=9)
    results = {"a.py --k 2": [found], "b.py": [backward], "c.py": "no such file"}
    assert gradient.table(results).splitlines() == [
        "|  | k | cosine | length | bias | variance | at length 1 |  |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `a.py --k 2` | 2 | 0.800 | 0.500 | 0.700 ± 0.250 | 3 | 12 | no bias seen: 0.70 ± 0.25 |",
        "| `b.py` | – | -0.800 | -0.500 | 1.700 | 30 | – | biased: points 143° off, away from it, "
        "-0.50 of the length |",
        "| `c.py` | – | – | – | – | – | – | no such file |"]


def test_several_worlds_are_a_median_and_a_range():
    """Variances are multiples of the first script's in the same world, whose own are 2, 4 and 8."""
    first = [gradient.Result(1.0, 1.0, 0.0, 0.0, variance, 9, 4) for variance in (2.0, 4.0, 8.0)]
    other = [gradient.Result(0.8, 0.5, 0.7, 0.0, 2.0, 9, 1),
             gradient.Result(0.5, 2.0, 1.9, 0.0, 2.0, 9),
             gradient.Result(-0.5, -1.0, 2.5, 0.0, 2.0, 9)]
    results = {"a.py": first, "b.py": other, "c.py": "no such file"}
    assert gradient.table(results).splitlines()[2:] == [
        "| `a.py` | 4 | 1.00 | 1.00 | 0.00 | 1.00 | 1.00 | unbiased to 1e-6 |",
        "| `b.py` | 1 | 0.50 (-0.50 to 0.80) | 0.50 (-1.00 to 2.00) | 1.90 (0.70 to 2.50) | "
        "0.50 (0.25 to 1.00) | 4.00 (0.12 to inf) | points 37° to 120° off |",
        "| `c.py` | – | – | – | – | – | – | no such file |"]
    # Where the first one points away, nothing is a share of it; in the second world it is 0.5 / 4.
    rows = gradient.table({"b.py": [other[2], first[1]], "a.py": [first[0], other[1]]})
    assert rows.splitlines()[3].split(" | ")[6] == "0.12"
    rows = gradient.table({"b.py": [other[2], other[2]], "a.py": first[:2]})
    assert [row.split(" | ")[6] for row in rows.splitlines()[2:]] == ["–", "–"]


@pytest.mark.parametrize("command, flags, k, draws", [
    ("rloo.py", {}, 4, 15), ("ppo.py --lam 1", {}, 1, 3), ("rloo.py --k 3", {}, 3, 10),
    ("rloo.py", {"draws": 14}, 2, 6), ("ppo.py --k 3", {"draws": 2}, 3, 2),
    ("rloo.py", {"k": 3}, 3, 10), ("dpo.py", {}, None, 9),
    ("raft.py", {"prompts": 2, "draws": 224}, 2, 36)])
def test_k_is_the_scripts_own_where_it_can_be_counted(command, flags, k, draws):
    """Of three responses to a prompt: its own, or 2 if there are more rollouts than --draws."""
    found = measure(command, gradient.Args(length=2, **{"prompts": 1} | flags))
    assert (found.k, found.draws) == (k, draws)
    assert gradient.table({command: [found]}).splitlines()[2].split(" | ")[1] == str(k or "–")


def test_scores_of_0_and_1(tmp_path, capsys):
    """Where MaxRL has a row: with two responses it is RLOO, with four it is longer.

    By (1 - (1 - p)^3) / p, where p is the probability of the one response with the better score.
    """
    args = gradient.Args(scripts=("maxrl.py --k 2", "maxrl.py"), length=1, prompts=1, binary=True,
                         beta=0.0, output=f"{tmp_path}/a.png")
    with loop.float64():
        gradient.main(args)
        world = gradient.make_world(replace(args, missing_eos_penalty=0.0))
    assert sorted(world.scores.tolist()) == [0, 1]
    plain = gradient.make_world(replace(args, binary=False))
    assert torch.equal(world.scores == 1, plain.scores == plain.scores.max())
    p = (world.batch.old_logprobs.sum(1).exp() @ world.scores).item()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "maxrl" in line]
    assert [row[1] for row in rows] == ["2", "4"] and rows[0][-1] == "unbiased to 1e-6 |"
    assert rows[1][3] == f"{(1 - (1 - p) ** 3) / p:.3f}" and rows[1][2] == "1.000"
    assert gradient.rows_and_places(gradient.Args(binary=True))[0] == (*gradient.SCRIPTS,
                                                                       "maxrl.py")


def test_the_pictures_points():
    """Of worlds in which a step points the right way; of several, as multiples of the first's."""
    first = [gradient.Result(1.0, 1.0, 0.0, 0.0, variance, 9) for variance in (2.0, 4.0)]
    other = [gradient.Result(0.5, 2.0, 1.9, 0.0, 2.0, 9),
             gradient.Result(-0.5, -1.0, 2.5, 0.0, 2.0, 9)]
    away = gradient.Result(-0.5, -1.0, 2.5, 0.0, 2.0, 9)
    found = gradient.points({"a.py": first, "b.py": other, "c.py": "no such file"})
    assert found == {"a.py": ((0.0, 0.0), (1.0, 1.0)), "b.py": ((pytest.approx(60),), (0.25,))}
    one = gradient.points({"a.py": first[:1], "b.py": other[:1], "d.py": [away]})
    assert one == {"a.py": ((0.0,), (2.0,)), "b.py": ((pytest.approx(60),), (0.5,))}


def test_labels_of_near_points_are_one():
    """Points are near in a chain to the right, but not up or down. Their order is not the key's."""
    places = {(40, 5): [2, 7], (0, 0): [9], (20, 10): [3], (65, 0): [1], (40, 40): [4],
              (45, 14): [5]}
    assert gradient.labels(places, lambda place: place) == [
        ((40, 5), [2, 3, 7, 9]), ((40, 40), [4]), ((45, 14), [5]), ((65, 0), [1])]


def test_redrawn_worlds_differ_in_weights_scores_and_critic():
    with loop.float64():
        first, again, other = (gradient.make_world(SMALL, toy) for toy in (0, 0, 1))
        for part in (lambda world: world.logprobs(0.8),
                     lambda world: world.logprobs(0.8, world.reference),
                     lambda world: world.scores, lambda world: world.critic.score.weight):
            assert torch.equal(part(first), part(again))
            assert (part(first) - part(other)).abs().max() > 0.01


@pytest.mark.parametrize("command, step, text", [
    ("rloo.py", 0.0, "0.00"), ("grpo.py --no-scale-std --no-length-mean", 2.312, "2.31"),
    ("reinforce_pp_baseline.py --no-whiten", 1.305, "1.31")])
def test_at_the_optimum_only_a_kl_in_the_reward_stays(command, step, text):
    """The world of test_exact.py, which finds the same numbers with the scripts' functions."""
    args = gradient.Args(at_optimum=True, beta=0.5, k=2, prompts=1, words=2, length=3)
    world = gradient.make_world(args)
    with loop.float64():
        found = gradient.measure(command, world, args)
    assert found.bias == pytest.approx(step, abs=1e-3) and (found.bias < 1e-9) == (step == 0)
    assert gradient.table({command: [found]}).splitlines()[-1] == f"| `{command}` | 2 | {text} |"


def test_flags_at_their_limits():
    for flags in ({"beta": 0.0, "critic_error": 0.0, "k": 1, "prompts": 1, "words": 1, "length": 1,
                   "draws": 1},
                  {"k": 8, "prompts": 4, "words": 6, "length": 1}, {"words": 1, "length": 6}):
        gradient.check_args(gradient.Args(**flags))


def test_table_and_picture(tmp_path, capsys):
    args = gradient.Args(scripts=("rloo.py", "dpo.py", "nothing.py"), length=2, prompts=1,
                         output=f"{tmp_path}/new/a.png")
    with loop.float64():
        gradient.main(args)
        likely = gradient.make_world(args).logprobs(args.temperature).exp().prod(1).max()
    printed = capsys.readouterr().out
    assert printed.startswith("3 different responses to each prompt are possible; the most "
                              f"probable has probability {likely:.2f}; ")
    assert "\nk of them are sampled: each script's own default, or 2 where " in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| `")]
    assert [row[-1] for row in rows][0] == "unbiased to 1e-6 |" and "no such file" in rows[2][-1]
    assert rows[1][-1].startswith("biased") and (tmp_path / "new" / "a.png").stat().st_size > 10_000


def test_the_page_has_todays_numbers():
    """Of an example in the first world."""
    found = [measure("rloo.py", gradient.Args(k=2, length=3, beta=beta)).variance
             for beta in (0.3, 1.0)]
    page = (ROOT / "docs" / "lab.md").read_text()
    assert "this is RLOO | {:.3g} | {:.3g} |".format(*found) in page


# ------------------------------------------------------------------------------------ rloo_token.py


def test_rloo_token_is_a_copy_of_rloo_but_for_rewards_and_advantages():
    """The same flags, and a loop in which three lines differ. The skeleton moves in both."""
    ours, theirs = ((ROOT / name).read_text().split("@dataclass")[1].splitlines()
                    for name in ("lab/rloo_token.py", "rloo.py"))
    new = [ours for ours, theirs in zip(ours, theirs, strict=True) if ours != theirs]
    assert [line.split("#")[0].strip() for line in new] == [
        "rewards = token_rewards(scores, kl, args.beta, batch.response_mask)", "",
        "advantages = compute_advantages(rewards, batch.response_mask, args.k)"]


def test_rloo_token_by_hand():
    rloo_token = load_module(str(ROOT / "lab/rloo_token.py"))
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert rloo_token.compute_advantages(rewards, mask, 2).tolist() == [
        [-1.0, -2.0, -4.0], [1.0, 0.0, 0.0]]
    rewards = torch.cat([rewards, torch.tensor([[0.0, 3.0, 0.0]])])  # returns 7, 6, 4; 8; and 3, 3
    mask = torch.cat([mask, torch.tensor([[True, True, False]])])
    assert rloo_token.compute_advantages(rewards, mask, 3).tolist() == [
        [1.5, 0.5, -1.5], [3.0, 0.0, 0.0], [-4.5, -4.0, 0.0]]


def test_without_kl_rloo_token_does_what_rloo_does(world, tmp_path, monkeypatch):
    """All that a token then has to go is its response's score.

    Compared: what is checked, logged, shown and saved.
    """
    seen = []
    for script in (rloo, load_module(str(ROOT / "lab/rloo_token.py"))):
        folder, numbers, sizes = tmp_path / script.__name__.rpartition("/")[2], [], []

        def dry_run(policy, tokenizer, datasets, *_):
            sizes.append(list(map(len, datasets)))

        monkeypatch.setattr(script, "dry_run", dry_run)
        monkeypatch.setattr(script.Run, "check_finite",
                            lambda _, examples, **values: numbers.append(values))
        script.main(script.Args(**world.flags | {"eval_prompts": 3}, beta=0.0, output=str(folder)))
        log = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
        texts = [(event.step, event.tensor_proto.string_val)
                 for event in log.Tensors("samples/text_summary")]
        outcome = kill.outcome(folder)
        checked = [{name: torch.as_tensor(value).tolist() for name, value in values.items()}
                   for values in numbers]
        seen.append((sizes, texts, outcome["weights"].keys(), checked, outcome["curves"]))
    *ours, checked, curves = seen[0]
    *theirs, others_checked, others_curves = seen[1]
    assert ours == theirs and ours[0] == [[12, 3]]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(checked, others_checked, **close)
    torch.testing.assert_close(curves, others_curves, **close)


def test_rloo_token_takes_two_responses_at_least(capsys):
    rloo_token = load_module(str(ROOT / "lab/rloo_token.py"))
    with pytest.raises(SystemExit):
        rloo_token.main(rloo_token.Args(k=1))
    assert capsys.readouterr().err.startswith("error: --k 1: the baseline is the mean of the other "
                                              "k - 1 responses")


def test_rloo_token_has_a_little_less_variance():
    args = gradient.Args(length=2, prompts=1, beta=1.0)
    ours, rloos = measure("lab/rloo_token.py", args), measure("rloo.py", args)
    assert ours.verdict() == "unbiased to 1e-6" and ours.variance < rloos.variance
