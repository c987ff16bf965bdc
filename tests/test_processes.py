"""Several processes do what one does, sharded or not; if one fails under torchrun, the run ends.

Only the last test starts torchrun. The others use processes that have imported everything.
"""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.families import save_family
from helpers import loop, two_processes
from helpers.two_processes import RUNS
from safetensors.torch import load_file
from test_loops import assert_close, compare, compare_evaluations
from helpers.tiny import ROOT, call_script, command_line, run_two, start_two, wait_for
from transformers import AutoModelForCausalLM

from tools import kill

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def both(context, tmp_path_factory):
    """Folder of what each of two processes has seen of every script's run, sharded and not."""
    folder = tmp_path_factory.mktemp("both")
    done = run_two(context, folder / "log", two_processes.main, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("how", ["", "-shard"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_the_second_implementation_does(name, how, both):
    seen, other = (
        SimpleNamespace(**torch.load(both / f"{name}{how}-{rank}.seen", weights_only=False))
        for rank in (0, 1))
    seen.args = SimpleNamespace(**seen.args)
    with loop.float64():
        compare(name, seen)
        compare_evaluations(name, seen)
    assert not other.metrics and not other.evaluations  # which only the first process logs
    for mine, theirs in zip([*seen.steps, seen.models, [seen.returned]],
                            [*other.steps, other.models, [other.returned]], strict=True):
        assert_close(mine, theirs, f"{name}: what the two processes have", tolerance=1e-15)


@pytest.mark.parametrize("how", ["", "-shard"])
def test_the_first_process_saves_one_ordinary_folder(how, both):
    seen = torch.load(both / f"rloo{how}-0.seen", weights_only=False)
    saved = AutoModelForCausalLM.from_pretrained(both / f"rloo{how}" / "model", dtype=torch.float64)
    assert all(torch.equal(a, b)
               for a, b in zip(saved.parameters(), seen["models"][0], strict=True))
    assert (sorted(path.name for path in (both / f"rloo{how}").iterdir()
                   if "tfevents" not in path.name)
            == ["args.json", "checkpoints", "evaluation.json", "model"])


def test_ranks_that_finish_their_rollouts_at_different_times(context, world, tmp_path):
    """More processes than prompts: nobody must wait for a process without work.

    With all that makes sharding harder: responses of every length, a tied head, a reward model with
    another tokenizer, bfloat16, checkpointing.
    """
    model = save_family(tmp_path / "qwen2", "qwen2")
    flags = world.flags | {"model": model, "prompts_per_step": 1, "num_updates": 3,
                           "dtype": "bfloat16"}
    flags |= {"shard": True, "gradient_checkpointing": True, "output": str(tmp_path / "run")}
    done = run_two(context, tmp_path, call_script, "rloo", flags)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f"{path}/model.safetensors")
                     for path in (model, tmp_path / "run" / "model"))
    assert before.keys() == after.keys()  # the tied head is saved once
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("script", ["reward_model", "sft", "dpo"])
def test_the_other_scripts_shard_too(script, context, world, tmp_path):
    """With evaluations between the checkpoints, which leave a sharded model's root whole."""
    flags = {"model": world.policy, "dataset": world.data, "device": "cpu", "num_updates": 4,
             "batch_size": 3, "eval_every": 1, "save_every": 1, "shard": True,
             "output": str(tmp_path / "run")}
    flags |= {"dpo": {"reward": (world.reward,), "eval_dataset": world.data,
                      "eval_prompts": 3}}.get(script, {})
    done = run_two(context, tmp_path, call_script, script, flags)
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    if script == "reward_model":  # its head has been divided by the rewards' std
        assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["std"] == (
            pytest.approx(1, abs=1e-3))
    if script == "dpo":
        flags = {"reference": world.policy, "reward": (world.reward,), "gold": "none",
                 "judge": "reward", "k": 2, "dataset": world.data, "device": "cpu", "shard": True,
                 "output": tmp_path / "evaluation.json"}
        policies = world.policy, str(tmp_path / "run" / "model")
        done = run_two(context, tmp_path / "evaluate", call_script, "evaluate", flags, policies)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1


SCORES = """
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
def flags(world, tmp_path):
    """Flags of rloo.py with a reward that writes a file when its process is training."""
    (tmp_path / "reward.py").write_text(SCORES)
    return world.flags | {"reward": (f"{tmp_path}/reward.py:reward",), "output": tmp_path / "run",
                          "eval_every": 0}


def test_sigterm_to_one_process_saves_a_checkpoint(flags, context, tmp_path):
    both = start_two(context, tmp_path / "log", call_script, "rloo",
                     flags | {"num_updates": 5000, "save_every": 0})
    wait_for((tmp_path / "training").exists, both[0])
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in both] == [128 + signal.SIGTERM] * 2
    assert "to resume: torchrun --nproc-per-node 2 rloo.py --resume" in both[0].stdout
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert path.name.isdigit() and (path / "checksums.json").is_file()


def test_a_mistake_is_told_once(flags, context, tmp_path):
    done = run_two(context, tmp_path / "log", call_script, "rloo", flags | {"k": 1})
    assert done.returncode != 0 and done.stderr.count("error: --k 1") == 1
    assert not (tmp_path / "run").exists()


def test_under_torchrun_a_process_that_fails_ends_the_run_with_its_error(flags, tmp_path):
    """Its checkpoints stay. (test_resume.py goes on from those of a run that lost a process.)"""
    words = command_line(flags | {"num_updates": 8, "save_every": 1})
    done = subprocess.run([*TORCHRUN, "rloo.py", *words], cwd=ROOT,
                          env={**os.environ, "FAIL": "1"}, text=True, capture_output=True,
                          timeout=120)
    assert done.returncode != 0 and "this process has had enough" in done.stderr
    assert 0 < kill.reached(tmp_path / "run") < 8
