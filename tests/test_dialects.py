"""lab/dialects.py: the libraries' own numbers, and what is general about the rows."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import loop

from lab import blackbox, dialects, gradient, stale
from tools import check_dialects

pytestmark = pytest.mark.slow
SMALL = gradient.Args(length=2, prompts=1, k=2, beta=0.0)  # 3 responses, 6 rollouts


def full(name):
    """The command of a script, or of a name of the table."""
    return name if ".py" in name else f"lab/dialects.py:{name}"


@functools.cache
def measure(name, kl=0.0, **flags):
    """The Result, at a random lag of this KL."""
    args = replace(SMALL, **flags)
    with loop.float64():
        world = stale.lagging(gradient.make_world(args), "random", kl, 1)
        gradient.load_module(gradient.WORLD).world = world
        return gradient.measure(full(name), world, args)


# ---------------------------------------------------------------- against the libraries, as numbers

# Loss and norm of the gradient that python -m tools.check_dialects printed for the package (TRL
# 1.16.0), verl v0.9.0 and OpenRLHF v0.11.0.
RECORDED = {
    "trl-rloo": (1.1638010, 2.9310936),
    "trl-reinforce-pp": (0.7641317, 1.9245057),
    "trl-grpo": (0.3115852, 0.3810804),
    "trl-grpo-1.9": (0.3113151, 0.3672747),
    "trl-grpo-0.15": (0.0061041, 0.2395031),
    "trl-grpo-batch": (0.4068826, 0.5300494),
    "trl-dr-grpo": (0.3589146, 0.4668001),
    "trl-dr-grpo-std": (0.2423440, 0.2963959),
    "trl-dapo": (0.3000170, 0.3810804),
    "trl-gspo": (0.1832363, 0.2629949),
    "trl-gspo-grpo": (0.1227536, 0.1699396),
    "trl-cispo": (0.0015464, 0.0511671),
    "trl-cispo-5": (-0.3533118, 0.5516130),
    "grpo.py": (0.1578196, 0.2926630),
    "dapo.py --max-rounds 1 --overlong-penalty 0": (0.2997469, 0.3672747),
    "gspo.py --clip-low 0.2 --clip-high 0.2 --beta 0": (0.0466824, 0.2168596),
    "cispo.py --max-ratio 1.2 --beta 0": (-0.0076829, 0.2234775),
    "verl-rloo": (0.3458290, 0.3087946),
    "verl-reinforce-pp": (0.1342942, 0.2012030),
    "verl-reinforce-pp-baseline": (0.1647664, 0.2000506),
    "verl-grpo": (0.2028952, 0.1573914),
    "verl-dr-grpo": (0.2215111, 0.1819717),
    "verl-dr-grpo-tokens": (0.2847999, 0.2339636),
    "verl-dapo": (0.2997676, 0.3672979),
    "verl-gspo": (0.0537845, 0.2156291),
    "verl-cispo": (-0.0107699, 0.2241134),
    "verl-ppo": (0.3069107, 0.1661249),
    "verl-opo": (0.1784549, 0.2036835),
    "openrlhf-rloo": (0.5288526, 0.7599194),
    "openrlhf-rloo-k3": (0.8617059, 1.0016163),
    "openrlhf-reinforce-pp": (0.2601270, 0.4207403),
    "openrlhf-reinforce-pp-baseline": (0.2805317, 0.4431042),
    "openrlhf-grpo": (0.1519543, 0.2546760),
    "openrlhf-dr-grpo": (0.3018086, 0.4687809),
    "openrlhf-gspo": (0.0466809, 0.2168762),
    "openrlhf-ppo": (0.5624620, 0.7577973),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_row_has_the_loss_and_the_gradient_of_its_library(name):
    with loop.float64():
        loss, grad = check_dialects.ours(full(name))
    assert (loss, grad.norm().item()) == pytest.approx(RECORDED[name], abs=3e-7)


def test_every_row_of_a_library_is_recorded_but_two():
    """Those two: ReMax without its ratio, and a PPO that the installed TRL no longer has."""
    others = {"verl-remax", "trl-ppo"} | {name for name in dialects.DIALECTS if "paper" in name}
    assert set(dialects.DIALECTS) - set(RECORDED) == others
    compared = [*check_dialects.TRL, *check_dialects.VERL, *check_dialects.OPENRLHF]
    assert [name.removeprefix("lab/dialects.py:") for name in compared] == [*RECORDED]


def test_the_page_has_these_numbers_and_every_row():
    page = (Path(__file__).parent.parent / "docs" / "dialects.md").read_text()
    assert all(f"`{name}`" in page for name in dialects.DIALECTS)
    for command in check_dialects.TRL:
        name = command.removeprefix("lab/dialects.py:")
        loss, norm = (f"{number:.7f}" for number in RECORDED[name])
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` | {loss} |"))
        assert norm in line


# ---------------------------------------------------------------------------------- numbers by hand

MASK = torch.tensor([[True, False], [True, True], [True, True], [True, True]])


def test_baselines_by_hand():
    rewards = torch.tensor([1.0, 3.0, 8.0])
    assert dialects.centred(rewards, 3).tolist() == [-3, -1, 4]
    assert dialects.leave_one_out(rewards, 3).tolist() == [-4.5, -1.5, 6]
    lengths = torch.tensor([1, 2, 1])
    assert dialects.optimal_baseline(rewards, lengths, 3).tolist() == [-2.75, -0.75, 4.25]
    found = dialects.optimal_baseline(rewards, lengths, 3, leave_out=True)
    assert found.tolist() == pytest.approx([1 - 14 / 3, 3 - 9 / 2, 8 - 7 / 3])


def test_stds_by_hand():
    """Of 0 and 2 it is sqrt(2), of 1 and 1 it is 0, of all four sqrt(2/3)."""
    rewards = torch.tensor([0.0, 2.0, 1.0, 1.0])
    found = dialects.over_group_std(rewards, 2, 1.0)
    assert found.tolist() == pytest.approx([-1 / (1 + 2**0.5), 1 / (1 + 2**0.5), 0, 0])
    std = (2 / 3) ** 0.5 + 1e-4
    found = dialects.over_batch_std(rewards, 2)
    assert found.tolist() == pytest.approx([-1 / std, 1 / std, 0, 0])
    assert dialects.normalized(torch.tensor([1.0, 3.0])).tolist() == pytest.approx(
        [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)])


def test_whitening_by_hand():
    """Seven tokens with mean 2 and squared deviations of 10 in all."""
    advantages = torch.tensor([[2.0, 0.0], [0.0, 4.0], [2.0, 2.0], [1.0, 3.0]])
    for whitened, variance in ((dialects.verl_whitened, 10 / 6),
                               (dialects.openrlhf_whitened, 10 / 7)):
        found = whitened(advantages, MASK)
        assert found[1].tolist() == pytest.approx([-2 / variance**0.5, 2 / variance**0.5])
        assert found[0].tolist() == [0, 0]


def test_a_token_mean_by_hand():
    """Four responses with seven tokens: what the script divides by 4 is to be divided by 7."""
    assert dialects.token_mean(7 * torch.ones(4, 2), MASK).tolist() == [[4.0, 4.0]] * 4


def test_clips_by_hand():
    """Ratios 1.5 and 2 per token are 3 for the response; the dual clip counts where A < 0."""
    logprobs, old = torch.tensor([[3.0, 4.0]]).log(), torch.tensor([[2.0, 2.0]]).log()
    for advantage, expected in ((1.0, -1.2), (-1.0, 3.0)):
        loss, _ = dialects.sequence_loss(logprobs, old, torch.tensor([advantage]), 0.2)
        assert loss.item() == pytest.approx(expected)
    ratio = torch.tensor([4.0, 4.0, 0.5, 0.5])
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    found = dialects.dual_clipped(ratio, advantages, 0.2, 0.28, 3.0)
    assert found.tolist() == pytest.approx([-3, 1.28, -0.8, 0.5])


def test_means_over_groups_and_by_a_constant_by_hand():
    """Ratios are 1: of the first two rows A is 1 on 3 tokens and of the others 2 on 4."""
    zeros = torch.zeros(4, 2)
    inputs = (zeros, zeros, zeros, torch.tensor([1.0, 1.0, 2.0, 2.0]), MASK)
    loss, _ = dialects.over_groups(dialects.trl_loss, 2)(*inputs, 0.2, 0.2, 0.0)
    assert (loss / 7).item() == pytest.approx(-(3 / 3 + 8 / 4) / 2)  # the script divides by 7
    loss, _ = dialects.over_constant(dialects.trl_loss, 5)(*inputs, 0.2, 0.0, False)
    assert loss.item() == pytest.approx(-11 / 5)


# ------------------------------------------------------------------ what is general, by enumeration


@pytest.mark.parametrize("command, flags", [
    ("trl-rloo", {}), ("trl-rloo", {"beta": 0.3, "k": 3}),
    ("paper-opo-leave-one-out", {"beta": 0.3, "k": 3}),
    # All responses have one token: then their mean is a mean over responses.
    ("verl-rloo", {"length": 1, "beta": 0.3}), ("openrlhf-rloo", {"length": 1, "beta": 0.3})])
def test_unbiased(command, flags):
    assert measure(command, **flags).verdict() == "unbiased to 1e-6"


@pytest.mark.parametrize("command, flags", [
    ("paper-opo", {"k": 3}), ("verl-rloo", {}), ("openrlhf-rloo", {}), ("trl-reinforce-pp", {}),
    ("openrlhf-rloo-k3", {"length": 1, "beta": 0.3})])
def test_biased(command, flags):
    assert measure(command, **flags).bias > 1e-3


def test_dr_grpo_is_rloo_but_for_a_constant():
    """(k - 1) / k of its length, over the maximum length; TRL's switch alone leaves the std in."""
    for name in ("trl-dr-grpo", "verl-dr-grpo"):
        found = measure(name)
        assert found.length == pytest.approx(1 / 2 / 2) and found.angle < 1e-3
    assert measure("trl-dr-grpo-std").angle > 0.1


SAME = [
    ("rloo.py", "trl-rloo"),
    ("trl-grpo", "trl-grpo-1.9", "trl-dapo", "trl-gspo"),
    ("grpo.py", "trl-grpo-0.15", "trl-gspo-grpo", "gspo.py"),
    ("verl-grpo", "verl-dapo", "verl-cispo"),
    ("verl-gspo", "gspo.py"),
    ("verl-rloo", "openrlhf-rloo"),
    ("verl-dr-grpo-tokens", "openrlhf-dr-grpo"),
]


@pytest.mark.parametrize("names", SAME)
def test_these_coincide_on_policy_without_a_kl(names):
    """But for the epsilon next to the std, which is 1e-4 or less."""
    first, *others = map(measure, names)
    for other in others:
        assert other.cosine == pytest.approx(first.cosine, abs=1e-5)
        assert other.length == pytest.approx(first.length, rel=1e-3)


def test_of_one_length_a_token_mean_is_the_mean():
    first, other = (measure(name, length=1) for name in ("remax.py", "verl-remax"))
    assert (other.cosine, other.length) == pytest.approx((first.cosine, first.length))


def test_trls_unset_bound_of_cispo_is_a_fifth_of_every_step():
    assert measure("trl-cispo").length == pytest.approx(measure("trl-grpo").length / 5)


def test_the_ratio_of_the_whole_response_is_right_off_policy_until_it_is_clipped():
    """TRL's RLOO without a KL. In GRPO, the level of the ratio makes a difference only here."""
    assert measure("trl-rloo --clip inf", kl=0.03).bias < 1e-9
    assert measure("trl-rloo", kl=0.03).bias > 1e-3
    assert measure("trl-grpo", kl=0.03).angle != pytest.approx(
        measure("trl-gspo", kl=0.03).angle, abs=0.01)


# --------------------------------------------------------------------------------------- the syntax


def test_rows_of_a_table():
    assert blackbox.rows("lab/dialects.py:trl-rloo") == ["lab/dialects.py:trl-rloo"]
    assert blackbox.rows("lab/dialects.py:*-ppo --beta 0") == [
        f"lab/dialects.py:{name}-ppo --beta 0" for name in ("trl", "verl", "openrlhf")]
    assert len(blackbox.rows("lab/dialects.py:*")) == len(dialects.DIALECTS)
    for other in ("rloo.py", "ppo.py --lam 0", "no.py", "rloo.py:a", "lab/dialects.py:no"):
        assert blackbox.rows(other) == [other]


def test_the_lab_takes_them_as_rows(tmp_path, capsys):
    with loop.float64():
        gradient.main(replace(SMALL, length=1, scripts=("rloo.py", "lab/dialects.py:*-remax"),
                              output=f"{tmp_path}/a.png"))
    *_, first, second, _, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("| `rloo.py` | ")
    assert second.startswith("| `lab/dialects.py:verl-remax` | ")


def test_flags_win_over_the_dialects(capsys):
    module, args = blackbox.parse("lab/dialects.py:trl-cispo --max-ratio 3 --beta 0.1", beta=0.5)
    assert Path(module.__file__).name == "cispo.py" and (args.max_ratio, args.beta) == (3, 0.1)
    for wrong, said in (
            (":trl-rlo", "no such row; it has trl-rloo, verl-rloo, openrlhf-rloo,"),
            ("", "name a row of its table, such as lab/dialects.py:trl-rloo; 'lab/dialects.py:*'")):
        with pytest.raises(SystemExit):
            blackbox.parse(f"lab/dialects.py{wrong}")
        assert capsys.readouterr().err.startswith(f"error: lab/dialects.py{wrong}: {said}")


def test_a_table_of_ones_own(tmp_path):
    """Its functions are in the script for its row only."""
    (tmp_path / "my.py").write_text("""
from types import SimpleNamespace
double = lambda rewards, k: 2 * (rewards - rewards.mean())
row = lambda **functions: SimpleNamespace(script="rloo.py", flags="--k 2",
                                          functions=lambda args: functions)
DIALECTS = {"twice": row(compute_advantages=double), "wrong": row(compute_advantage=double)}
""")
    with loop.float64():
        world = gradient.make_world(SMALL)
        twice, before = (gradient.measure(command, world, SMALL)
                         for command in (f"{tmp_path}/my.py:twice", "rloo.py --k 2"))
        said = gradient.attempt(f"{tmp_path}/my.py:wrong", world, SMALL)
    assert twice.length == pytest.approx(1) and before.length == pytest.approx(1)
    assert twice.variance == pytest.approx(before.variance)
    assert said == f"{tmp_path}/my.py:wrong: rloo.py has no compute_advantage to replace"


def test_the_list(capsys):
    dialects.main()
    said = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{said}" for name in dialects.DIALECTS)
