"""python -m lab.gradient --stale: how far the policy moves, and what its estimators then are."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import loop
from test_gradient import ROOT, SMALL, assert_is, edited, measure
from torch.nn.utils import parameters_to_vector

from lab import gradient, stale

pytestmark = pytest.mark.slow
PLACES = [*itertools.product(stale.LAGS, (0.01, 0.03))]


@functools.cache
def made(lag, kl, seed, **flags):
    with loop.float64():
        return stale.lagging(gradient.make_world(replace(SMALL, **flags)), lag, kl, seed)


def lagging_world(lag, kl, seed=1, **flags):
    """The World in which the policy has moved away from its sampler, where scripts look for it."""
    world = made(lag, kl, seed, **flags)
    gradient.load_module(gradient.WORLD).world = world
    return world


def step(world):
    """(P,), from the weights of the sampler to those of the policy."""
    old, new = (parameters_to_vector(model.parameters()).detach()
                for model in (world.sampler, world.policy))
    return new - old


def response_logprobs(world, model, temperature):
    """Of each response's tokens, of a row alone and without padding: list of (t,), with gradients.
    """
    batch, found = world.batch, []
    for row in range(len(batch)):
        prompt = batch.prompts[row][batch.prompt_mask[row]].tolist()
        response = batch.responses[row][batch.response_mask[row]].tolist()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]  # (L, V)
        logprobs = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)  # (t, V)
        found.append(logprobs[range(len(response)), response])
    return found


# ----------------------------------------------------------------------------- how the policy moves


@pytest.mark.parametrize("lag, kl", [("policy", 1e-6), ("policy", 0.1), ("random", 0.01),
                                     ("random", 0.5)])
def test_the_policy_is_as_far_away_as_asked(lag, kl):
    """By a sum over the responses to both prompts, one at a time."""
    world = lagging_world(lag, kl, words=2, prompts=2)
    with torch.no_grad():
        new, old = (response_logprobs(world, model, SMALL.temperature)
                    for model in (world.policy, world.sampler))
    found = sum(math.exp(a.sum()) * (a.sum() - b.sum()).item() for a, b in zip(new, old)) / 2
    assert found == pytest.approx(kl, rel=1e-6)


def test_its_own_updates_are_four_equal_steps_down_its_own_losss_gradient(monkeypatch):
    """Each from where the last one has led, the first from the sampler."""
    World = gradient.load_module(gradient.WORLD).World
    seen, true_gradient = [], World.true_gradient

    def note(world, prompts, *flags):
        found = true_gradient(world, prompts, *flags)
        seen.append((step(world), found, list(prompts), flags))
        return found

    monkeypatch.setattr(World, "true_gradient", note)
    with loop.float64():
        world = stale.lagging(gradient.make_world(replace(SMALL, prompts=2)), "policy", 0.05, 1)
    *places, last = *(place for place, *_ in seen[-4:]), step(world)
    assert places[0].abs().max() == 0
    size = ((places[0] - places[1]).norm() / seen[-4][1].norm()).item()
    assert size > 1e-3
    for here, there, (_, down, prompts, flags) in zip(places, (*places[1:], last), seen[-4:]):
        torch.testing.assert_close(here - there, size * down)
        assert prompts == [0, 1] and flags == (0.8, 0.3, 0.5)


def test_a_random_direction_is_one_per_seed_and_world():
    with loop.float64():
        steps = [step(lagging_world("random", kl, seed))
                 for kl, seed in ((0.01, 1), (0.1, 1), (0.01, 2))]
        other = step(stale.lagging(gradient.make_world(SMALL, 1), "random", 0.01, 1))
    cosines = [torch.cosine_similarity(steps[0], other, 0).item() for other in (*steps[1:], other)]
    assert cosines[0] == pytest.approx(1, abs=1e-9) and max(map(abs, cosines[1:])) < 0.2
    assert steps[1].norm() > 2 * steps[0].norm()


def test_without_a_lag_the_world_is_todays():
    """The same object, so that every digit is; and a sampler that is the policy."""
    with loop.float64():
        world = gradient.make_world(SMALL)
        assert all(stale.lagging(world, lag, 0.0, 1) is world for lag in stale.LAGS)
    assert world.sampler is world.policy
    assert gradient.rows_and_places(gradient.Args(stale=(0.0,))) == (gradient.SCRIPTS,
                                                                    [("policy", 0.0)])


def test_what_stays_where_the_policy_moves():
    """Scores, critic and greedy response are those of the world and its sampler."""
    with loop.float64():
        world = gradient.make_world(SMALL)
        moved = stale.lagging(world, "random", 0.5, 1)
        assert torch.equal(moved.scores, world.scores) and moved.sampler is world.policy
        assert torch.equal(moved.critic.score.weight, world.critic.score.weight)
        assert torch.equal(moved.batch.old_logprobs, world.batch.old_logprobs)


# ---------------------------------------------------------------------- against sums over all draws


def pair_loss(command, rewards, logprobs, old, ref, beta):
    """The loss of two responses, a function (a, b), from the formulas; rewards are a list."""
    def value(row, under):
        return rewards[row] - beta * (under[row] - ref[row]).sum().item()

    def clipped(row, advantage):
        ratio = (logprobs[row] - old[row]).exp()
        return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()

    def loss(a, b):
        if command.startswith("grpo"):
            half = (rewards[a] - rewards[b]) / 2
            return -(clipped(a, half) + clipped(b, -half)) / 2
        if command.startswith("rloo"):  # as if the sampler were the policy
            difference, weights = value(a, old) - value(b, old), (1.0, 1.0)
        else:
            difference = value(a, logprobs) - value(b, logprobs)
            weights = [(logprobs[row] - old[row]).sum().exp().item() for row in (a, b)]
        return -difference * (weights[0] * logprobs[a].sum() - weights[1] * logprobs[b].sum()) / 2

    return loss


@pytest.mark.parametrize("lag, kl", PLACES)
@pytest.mark.parametrize("command", [
    "rloo.py", "rloo.py --temperature 1.3", "lab/importance.py",
    "grpo.py --no-scale-std --no-length-mean --beta 0"])
def test_a_stale_estimator_is_the_plain_sum_over_draws(command, lag, kl):
    """Draws are weighted by the sampler's probabilities, the truth is that of the policy."""
    world = lagging_world(lag, kl)
    temperature = 1.3 if "1.3" in command else SMALL.temperature
    beta = 0.0 if "--beta 0" in command else SMALL.beta
    with loop.float64():
        found = gradient.measure(command, world, SMALL)
        logprobs, old, ref = (response_logprobs(world, model, temperature)
                              for model in (world.policy, world.sampler, world.reference))
        old, ref = ([row.detach() for row in rows] for rows in (old, ref))
        rewards = (world.scores - SMALL.missing_eos_penalty * ~world.batch.ended).tolist()
        parameters = list(world.policy.parameters())

        def grad(loss):
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            return torch.cat([part.flatten() for part in parts])

        loss = pair_loss(command, rewards, logprobs, old, ref, beta)
        draws = [((old[a].sum() + old[b].sum()).exp().item(), grad(loss(a, b)))
                 for a, b in itertools.product(range(3), repeat=2) if a != b]
        same = sum(row.sum().exp().item() ** 2 for row in old)  # two equal ones have no gradient
        draws.append((same, torch.zeros_like(draws[0][1])))
        true = grad(-sum(new.sum().exp() * (reward - beta * (new.sum() - r.sum()))
                         for new, reward, r in zip(logprobs, rewards, ref)))
    assert_is(found, draws, true, generated=2)
    assert (found.bias < 1e-9) == (command == "lab/importance.py")


# ------------------------------------------------------------------------------ the unbiased script


@pytest.mark.parametrize("lag, kl", [("policy", 0.001), ("policy", 0.3), ("random", 0.5)])
def test_importance_weights_are_unbiased_at_every_lag(lag, kl):
    args, world = replace(SMALL, length=3), lagging_world(lag, kl, length=3)
    with loop.float64():
        assert gradient.measure("lab/importance.py --beta 1", world, args).bias < 1e-9
        assert gradient.measure("rloo.py", world, args).bias > 1e-3


def test_old_logprobs_of_the_current_policy_show(tmp_path):
    """A planted error, which on policy is none; and PPO's clip then never shuts."""
    planted = "batch.old_logprobs = no_grad_logprobs(policy, batch, args.temperature, 8192)"
    score = "        # 2. score"
    command = str(edited(tmp_path, "lab/importance.py", (score, f"        {planted}\n{score}")))
    assert measure(command).verdict() == "unbiased to 1e-6"
    for lag in stale.LAGS:
        world = lagging_world(lag, 0.03)
        with loop.float64():
            found = gradient.measure(command, world, SMALL)
        assert found.verdict().startswith("biased: points ") and found.angle > 3


def test_where_the_policy_samples_importance_is_rloo():
    ours, rloos = measure("lab/importance.py"), measure("rloo.py")
    assert (ours.cosine, ours.length) == pytest.approx((1, 1), abs=1e-12)
    assert ours.variance == pytest.approx(rloos.variance, rel=1e-12)


def test_importance_is_a_copy_of_rloo_but_for_the_weights():
    """The same functions and flags, and a loop in which two lines differ and three are more."""
    ours, theirs = ([line.split("#")[0].strip() for line in
                     (ROOT / name).read_text().split("def compute_advantages")[1].splitlines()]
                    for name in ("lab/importance.py", "rloo.py"))
    new = [line for line in ours if line and line not in theirs]
    assert new == [
        "logprobs = no_grad_logprobs(policy, batch, args.temperature,",
        "kl = token_kl(logprobs, ref_logprobs, batch.response_mask)",
        "weights = (logprobs - batch.old_logprobs).sum(1).exp()",
        "advantages = weights * compute_advantages(rewards, args.k)"]
    assert len(ours) == len(theirs) + 3


# -------------------------------------------------------------------------- the tables, the picture


def test_a_table_for_each_lag_and_kl(tmp_path, capsys):
    args = gradient.Args(scripts=("rloo.py", "nothing.py"), length=1, prompts=1,
                         stale=(0.03, 0.01, 0.03), output=f"{tmp_path}/new/a.png")
    with loop.float64():
        gradient.main(args)
    printed = capsys.readouterr().out.split("KL(pi || pi_old) = ")[1:]
    assert [part.partition(":")[0] for part in printed] == [
        "0.01, along the policy's own updates", "0.03, along the policy's own updates",
        "0.01, in a random direction", "0.03, in a random direction"]
    for (lag, kl), part in zip(PLACES, printed):
        with loop.float64():
            found = gradient.measure("rloo.py", lagging_world(lag, kl, length=1), args)
        assert gradient.table({"rloo.py": [found]}) in part and "no such file |" in part
    assert (tmp_path / "new" / "a.png").stat().st_size > 10_000


def test_worlds_that_cannot_move_that_far_are_left_out(tmp_path, capsys):
    """The table is that of the others, and says how many they are."""
    args = gradient.Args(scripts=("rloo.py",), length=1, prompts=1, stale=(0.1, 1.0), lag="policy",
                         toys=4, output=f"{tmp_path}/a.png")
    with loop.float64():
        worlds = [gradient.make_world(args, toy) for toy in range(4)]
        moved = [stale.lagging(world, "policy", 1.0, args.seed) for world in worlds]
        assert 1 < len([world for world in moved if world]) < 4
        gradient.main(args)
        found = []
        for world in filter(None, moved):
            gradient.load_module(gradient.WORLD).world = world
            found.append(gradient.measure("rloo.py", world, args))
    near, far = capsys.readouterr().out.split("KL(pi || pi_old) = ")[1:]
    assert near.startswith("0.1, along the policy's own updates:\n")
    assert far.startswith(f"1, along the policy's own updates ({len(found)} of 4 worlds can move "
                          "that far):\n")
    assert gradient.table({"rloo.py": found}) in far


def test_the_rows_and_places_of_the_flags():
    commands, places = gradient.rows_and_places(gradient.Args(stale=(0.1, 0.0), lag="random"))
    assert commands == (*gradient.SCRIPTS, *stale.ROWS)
    assert places == [("random", 0.0), ("random", 0.1)]
    _, places = gradient.rows_and_places(gradient.Args(stale=(0.1, 0.0)))
    assert places == [("policy", 0.0), ("policy", 0.1), ("random", 0.1)]
    commands, places = gradient.rows_and_places(gradient.Args(scripts=("a.py",), stale=(0.1,)))
    assert commands == ("a.py",) and places == [("policy", 0.1), ("random", 0.1)]


def test_curves_are_medians_over_worlds_by_kl():
    def results(*lengths):
        return [gradient.Result(1.0, length, 0.0, 0.0, 1.0, 9) for length in lengths]

    found = stale.curves({
        ("policy", 0.0): {"a.py": results(9.0)}, ("policy", 0.1): {"a.py": results(1.0, 3.0, 8.0),
                                                                   "b.py": "no such file"},
        ("policy", 0.2): {"a.py": results(4.0, 6.0), "b.py": "no such file"},
        ("random", 0.1): {"a.py": results(7.0)}}, "policy", "length")
    assert found == {"a.py": [(0.1, 3.0), (0.2, 5.0)]}


def test_a_gradient_of_zero_has_no_angle():
    """As where a clip zeroes every step. Medians are those of the other worlds."""
    nothing = gradient.Result(math.nan, 0.0, 1.0, 0.0, 0.0, 9)
    right = gradient.Result(1.0, 0.5, 0.5, 0.0, 1.0, 9)
    assert math.isnan(nothing.angle) and nothing.verdict() == "no step at all"
    assert gradient.middle_and_range([math.nan, 0.5, 0.7, math.nan, 0.6]) == "0.60 (0.50 to 0.70)"
    assert gradient.middle_and_range([math.nan]) == "–"
    results = {("policy", 0.1): {"a.py": [nothing, right], "b.py": [nothing]}}
    assert stale.curves(results, "policy", "angle") == {"a.py": [(0.1, 0.0)]}
    away = gradient.Result(0.0, 0.5, 0.5, 0.0, 1.0, 9)
    said = gradient.cells_of_toys([nothing, away], [right, right])[-1]
    assert said.startswith("points 90° to 90° off")


@pytest.mark.parametrize("flags, line", [
    ({"stale": (0.1, -0.1)}, "--stale -0.1: a KL must be 0 or more, and finite"),
    ({"stale": (math.inf,)}, "--stale inf: a KL must be 0 or more, and finite"),
    ({"stale": (math.nan,)}, "--stale nan: a KL must be 0 or more, and finite"),
    ({"stale": (0.1,), "at_optimum": True}, "--at-optimum --stale: a policy that has moved is no "
                                            "longer the optimum; use one of them"),
    ({"stale": (1e12,), "lag": "random", "length": 1, "prompts": 1},
     "--stale 1000000000000.0: no policy is that far away, in a random direction; "
     "use a smaller KL"),
])
def test_bad_flags(flags, line, capsys):
    with pytest.raises(SystemExit), loop.float64():
        gradient.main(gradient.Args(**flags))
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
