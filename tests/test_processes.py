"""torchrun: several processes do what one does, sharded and not; a process that fails ends the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import save_family
from first_update import RUNS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command, **kwargs):
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def updates(world, tmp_path_factory):
    """Folder with the first update of each script by one process, by two, and by two with sharded weights."""
    folder = tmp_path_factory.mktemp("updates")
    flags = {key: world.flags[key] for key in ("model", "reward", "gold", "dataset", "device", "max_new_tokens", "lr")}
    for launcher in ([sys.executable], TORCHRUN):
        done = run([*launcher, "tests/first_update.py", str(folder), json.dumps(flags)])
        assert done.returncode == 0, done.stderr
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


def flags(world, tmp_path, **more):
    values = world.flags | {"reward": world.reward, "output": tmp_path / "run"} | more
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_ranks_that_finish_their_rollouts_at_different_times(world, tmp_path):
    """More processes than prompts, and responses of every length: a process without work must not be waited for.

    With all that makes sharding harder: a tied head, a reward model with another tokenizer, bfloat16, checkpointing.
    """
    model = save_family(tmp_path / "qwen2", "qwen2")
    more = flags(world, tmp_path, model=model, prompts_per_step=1, num_updates=3, dtype="bfloat16")
    done = run([*TORCHRUN, "rloo.py", *more, "--shard", "--gradient-checkpointing"])
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f"{path}/model.safetensors") for path in (model, tmp_path / "run" / "model"))
    assert before.keys() == after.keys()  # the tied head is saved once
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("script", ["reward_model", "sft", "dpo"])
def test_the_other_scripts_shard_too(script, world, tmp_path):
    """With evaluations between the checkpoints, which leave a sharded model's root whole."""
    given = {"model": world.policy, "dataset": world.data, "device": "cpu", "num_updates": 4, "batch_size": 3,
             "eval_every": 1, "save_every": 1, "output": tmp_path / "run"}  # fmt: skip
    given |= {"dpo": {"reward": world.reward, "eval_dataset": world.data, "eval_prompts": 3}}.get(script, {})
    given = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = run([*TORCHRUN, f"{script}.py", *given, "--shard"])
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    if script == "reward_model":  # its head has been divided by the rewards' std
        assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["std"] == pytest.approx(1, abs=1e-3)
    if script == "dpo":
        base = ["--reference", world.policy, "--reward", world.reward, "--gold", "none", "--judge", "reward"]
        base += ["--dataset", world.data, "--device", "cpu", "--k", "2", "--output", str(tmp_path / "evaluation.json")]
        done = run([*TORCHRUN, "evaluate.py", world.policy, str(tmp_path / "run" / "model"), *base, "--shard"])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1


def test_sigterm_to_one_process_saves_a_checkpoint(world, tmp_path):
    command = [*TORCHRUN, "rloo.py", *flags(world, tmp_path, num_updates=5000, eval_every=0, save_every=0)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    while not list((tmp_path / "run").glob("events*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(1)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "to go on: torchrun --nproc-per-node 2 rloo.py --resume" in output
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert path.name.isdigit() and (path / "checksums.json").is_file()


def test_a_process_that_fails_ends_the_run_with_its_error(world, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import os\n\ncalls = []\n\n\ndef reward(prompts, completions, **_):\n    calls.append(1)\n"
        "    assert len(calls) < 6 or os.environ['RANK'] == '0', 'the second process has had enough'\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    done = run([*TORCHRUN, "rloo.py", *flags(world, tmp_path, reward=f"{tmp_path}/reward.py:reward", num_updates=50)])
    assert done.returncode != 0
    assert "the second process has had enough" in done.stderr


def test_a_mistake_is_told_once(world, tmp_path):
    done = run([*TORCHRUN, "rloo.py", *flags(world, tmp_path, k=1)])
    assert done.returncode != 0
    assert done.stderr.count("error: --k 1") == 1
    assert not (tmp_path / "run").exists()


def test_shard_needs_several_processes(world, tmp_path):
    done = run([sys.executable, "rloo.py", *flags(world, tmp_path), "--shard"])
    assert done.returncode == 2 and done.stderr.startswith("error: --shard: there is one process")
