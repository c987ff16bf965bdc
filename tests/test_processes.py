"""Several processes do what one does, sharded and not; under torchrun, a process that fails ends the run.

Only the tests at the end start torchrun itself. Processes that have imported everything do for the others.
"""

import json
import os
import signal
import subprocess
import sys

import first_update
import kill
import pytest
import torch
from families import save_family
from first_update import RUNS
from safetensors.torch import load_file
from tiny import ROOT, Child, call_script, command_line, run_two, wait_for
from transformers import AutoModelForCausalLM

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def updates(context, world, tmp_path_factory):
    """Folder with the first update of each script by one process, by two, and by two with sharded weights."""
    folder = tmp_path_factory.mktemp("updates")
    flags = {key: world.flags[key] for key in ("model", "reward", "gold", "dataset", "device", "max_new_tokens", "lr")}
    one = Child(context, folder / "one", first_update.main, folder, flags)
    assert one.wait(timeout=120) == 0, one.stderr
    two = run_two(context, folder / "two", first_update.main, folder, flags)
    assert two.returncode == 0, two.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("how", ["2", "2-shard"])
def test_two_processes_have_the_gradient_of_one(name, how, updates):
    one, two = (torch.load(updates / f"{name}-{how}.gradients") for how in ("1", how))
    assert len(one) == len(two) == (2 if name == "ppo" else 1)  # policy, and critic
    for a, b in zip(one, two):
        a, b = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (a, b))
        assert a.norm() > 1e-3
        assert (a - b).norm() < 1e-5 * a.norm()


@pytest.mark.parametrize("how", ["2", "2-shard"])
def test_the_first_process_saves_one_ordinary_folder(how, updates):
    one, two = (AutoModelForCausalLM.from_pretrained(updates / f"rloo-{how}" / "model") for how in ("1", how))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # Adam's first step divides by the gradient's size
    assert sorted(path.name for path in (updates / f"rloo-{how}").iterdir() if "tfevents" not in path.name) == [
        "args.json",
        "checkpoints",
        "evaluation.json",
        "model",
    ]


def test_ranks_that_finish_their_rollouts_at_different_times(context, world, tmp_path):
    """More processes than prompts, and responses of every length: a process without work must not be waited for.

    With all that makes sharding harder: a tied head, a reward model with another tokenizer, bfloat16, checkpointing.
    """
    model = save_family(tmp_path / "qwen2", "qwen2")
    flags = world.flags | {"model": model, "prompts_per_step": 1, "num_updates": 3, "dtype": "bfloat16"}
    flags |= {"shard": True, "gradient_checkpointing": True, "output": str(tmp_path / "run")}
    done = run_two(context, tmp_path, call_script, "rloo", flags)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f"{path}/model.safetensors") for path in (model, tmp_path / "run" / "model"))
    assert before.keys() == after.keys()  # the tied head is saved once
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("script", ["reward_model", "sft", "dpo"])
def test_the_other_scripts_shard_too(script, context, world, tmp_path):
    """With evaluations between the checkpoints, which leave a sharded model's root whole."""
    flags = {"model": world.policy, "dataset": world.data, "device": "cpu", "num_updates": 4, "batch_size": 3,
             "eval_every": 1, "save_every": 1, "shard": True, "output": str(tmp_path / "run")}  # fmt: skip
    flags |= {"dpo": {"reward": (world.reward,), "eval_dataset": world.data, "eval_prompts": 3}}.get(script, {})
    done = run_two(context, tmp_path, call_script, script, flags)
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    if script == "reward_model":  # its head has been divided by the rewards' std
        assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["std"] == pytest.approx(1, abs=1e-3)
    if script == "dpo":
        flags = {"reference": world.policy, "reward": (world.reward,), "gold": "none", "judge": "reward", "k": 2,
                 "dataset": world.data, "device": "cpu", "shard": True,
                 "output": tmp_path / "evaluation.json"}  # fmt: skip
        policies = world.policy, str(tmp_path / "run" / "model")
        done = run_two(context, tmp_path / "evaluate", call_script, "evaluate", flags, policies)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1


# ------------------------------------------------------------------------------------------------ torchrun itself


LENGTH = """
import os
from pathlib import Path

calls = []


def reward(completions, **_):
    calls.append(1)
    if len(calls) == 8:
        Path(__file__).with_name("training").touch()
    if os.environ.get("FAIL") == os.environ["RANK"]:
        assert len(calls) < 8, "this process has had enough"
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def torchrun(world, tmp_path):
    """Starts torchrun rloo.py with two processes; their reward writes a file when they are training."""
    (tmp_path / "reward.py").write_text(LENGTH)

    def start(environment=os.environ, **flags):
        flags = world.flags | {"reward": (f"{tmp_path}/reward.py:reward",), "output": tmp_path / "run"} | flags
        return subprocess.Popen([*TORCHRUN, "rloo.py", *command_line(flags)], cwd=ROOT, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    return start


def test_sigterm_to_one_process_saves_a_checkpoint(torchrun, tmp_path):
    process = torchrun(num_updates=5000, eval_every=0, save_every=0)
    wait_for((tmp_path / "training").exists, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert "to go on: torchrun --nproc-per-node 2 rloo.py --resume" in output
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert path.name.isdigit() and (path / "checksums.json").is_file()


def test_a_process_that_fails_ends_the_run_with_its_error(torchrun, context, world, tmp_path):
    """And what was saved goes on, like a run that nothing has happened to."""
    flags = {"num_updates": 8, "eval_every": 0, "save_every": 1}
    process = torchrun({**os.environ, "FAIL": "1"}, **flags)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "this process has had enough" in errors
    assert 0 < kill.reached(tmp_path / "run") < 8
    flags = world.flags | flags | {"reward": (f"{tmp_path}/reward.py:reward",)}
    for given in ({"resume": tmp_path / "run"}, flags | {"output": tmp_path / "whole"}):
        done = run_two(context, tmp_path / "output", call_script, "rloo", given)
        assert done.returncode == 0, done.stderr
    assert kill.differences(kill.outcome(tmp_path / "whole"), kill.outcome(tmp_path / "run")) == []


def test_a_mistake_is_told_once(torchrun, tmp_path):
    process = torchrun(k=1)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert errors.count("error: --k 1") == 1
    assert not (tmp_path / "run").exists()
