"""Every RL script end to end on a tiny world: it runs, logs, saves, repeats itself bit for bit, and finds a reward."""

import dataclasses
import difflib
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dpo

ROOT = Path(__file__).parent.parent
SCRIPTS = ["rloo", "reinforce", "remax", "grpo", "reinforce_pp", "vanilla_pg", "ppo", "raft"]
VARIANTS = [
    ("reinforce", {"baseline": "none"}),
    ("reinforce", {"baseline": "moving-average", "window": 2}),
    ("reinforce", {"baseline": "ema", "decay": 0.5}),
    ("grpo", {"scale_std": False, "length_mean": False, "epochs": 2, "minibatches": 2}),
    ("reinforce_pp", {"baseline": "group"}),
    ("reinforce_pp", {"normalize_scores": False, "whiten": False}),
    ("ppo", {"lam": 1.0, "whiten": False, "clip": float("inf"), "value_clip": float("inf"), "epochs": 2}),
    ("raft", {"rank_by": "score"}),
]


def run(name, world, output, **flags):
    script = importlib.import_module(name)
    return script.main(script.Args(**world.flags | flags, output=str(output)))


def scalars(folder):
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in log.Scalars(name)] for name in log.Tags()["scalars"]}


@pytest.mark.parametrize("name, flags", [(name, {}) for name in SCRIPTS] + VARIANTS)
def test_same_seed_same_run_bit_for_bit(name, flags, world, tmp_path):
    first, second = (run(name, world, tmp_path / folder, **flags) for folder in "ab")
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    a, b = scalars(tmp_path / "a"), scalars(tmp_path / "b")
    for metric in a.keys() - {"time/seconds", "time/tokens_per_second"}:
        assert a[metric] == b[metric]
    for metric in ("objective/scores", "objective/kl", "objective/rewards", "policy/loss", "policy/grad_norm"):
        assert len(a[metric]) == 3
    assert (tmp_path / "a" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", SCRIPTS)
def test_gradient_does_not_depend_on_the_micro_batch(name, world, tmp_path):
    gradients = []
    for tokens in (1, 100_000):
        policy = run(name, world, tmp_path / str(tokens), num_updates=1, microbatch_tokens=tokens, max_grad_norm=1e9)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    assert gradients[0].norm() > 1e-4
    assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()


@pytest.mark.parametrize("name, flags", [(name, {}) for name in SCRIPTS] + [("reinforce_pp", {"baseline": "group"})])
def test_a_run_raises_its_reward(name, flags, world, tmp_path):
    """Reward: the share of the words a, b and c in the response. Forty updates on a random policy must find it."""
    path = tmp_path / "reward.py"
    path.write_text(
        "def share(prompts, completions, **_):\n"
        "    return [sum(word in 'abc' for word in c.split()) / max(1, len(c.split())) for c in completions]\n"
    )
    flags |= {"reward": (f"{path}:share",), "num_updates": 40, "prompts_per_step": 12, "eval_prompts": 12}
    run(name, world, tmp_path / "run", **flags, beta=0.0, missing_eos_penalty=0.0)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["before"]["score"] < 0.4 and result["after"]["score"] > 0.7


def test_dpo_runs_repeats_itself_and_prefers_the_chosen(world, tmp_path):
    unused = {"k", "prompts_per_step"}
    flags = {name: value for name, value in world.flags.items() if name not in unused}
    flags |= {"eval_dataset": world.data, "batch_size": 12, "num_updates": 20, "microbatch_tokens": 100}
    runs = [dpo.main(dpo.Args(**flags, output=str(tmp_path / folder))) for folder in "ab"]
    assert all(torch.equal(p, q) for p, q in zip(runs[0].parameters(), runs[1].parameters()))
    a = scalars(tmp_path / "a")
    assert a["policy/loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert a["rewards/margins"][0][1] == pytest.approx(0, abs=1e-5)
    assert a["rewards/accuracies"][-1][1] == 1 and a["rewards/margins"][-1][1] > 0.5


def body(name):
    """The lines of a script below its docstring page."""
    return (ROOT / f"{name}.py").read_text().split('"""\n', 1)[1].splitlines()


# Lines of rloo.py that are gone, and lines that are new, in each script: a change of the shared skeleton that does not
# reach every script shows up here.
DIFFS = {
    "reinforce": 36,
    "remax": 30,
    "raft": 28,
    "grpo": 61,
    "reinforce_pp": 93,
    "vanilla_pg": 59,
    "ppo": 109,
    "dpo": 96,
}


@pytest.mark.parametrize("name", DIFFS)
def test_scripts_share_their_skeleton_line_by_line(name):
    matcher = difflib.SequenceMatcher(None, body("rloo"), body(name), autojunk=False)
    changed = sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")
    assert changed == DIFFS[name]


@pytest.mark.parametrize("name", ["rloo", *DIFFS])
def test_every_flag_is_read_and_explained(name):
    script = importlib.import_module(name)
    text = "\n".join(body(name))
    shared = (ROOT / "common.py").read_text() + (ROOT / "plumbing.py").read_text()
    for field in dataclasses.fields(script.Args):
        read = text.split("def main(args)")[1]
        assert f"args.{field.name}" in read or f"args.{field.name}" in shared or field.name.endswith("_column"), (
            field.name
        )
        definition = text.split(f"    {field.name}: ")[1]
        assert definition.splitlines()[1].startswith('    """'), field.name


def test_the_six_steps_stand_in_the_same_order():
    for name in ["rloo", *DIFFS]:
        numbers = re.findall(r"(\d)\. [a-z]", "\n".join(line for line in body(name) if line.strip().startswith("# ")))
        assert numbers == sorted(numbers) and numbers[-1] == "6", name
