"""Kill a training script at random moments, resume it each time, and compare the results.

    python -m tools.kill --scripts rloo ppo --kills 20

Each script (all by default) is run on the embedded task, somewhat shortened: once uninterrupted,
and once killed by SIGKILL that many times, at moments drawn uniformly over its updates, including
while saving. Weights, optimizer state, schedule, random states and every logged point (except
times) must be bit-for-bit the same. `tests/test_resume.py` does the same with a tiny model and
fewer kills.
"""

import importlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.family import FAMILY, SCRIPTS
from plumbing import checkpoints, require

ROOT = Path(__file__).resolve().parent.parent
MODEL = "transformers.models.llama.modeling_llama"  # imported late, when such a model is loaded


def train(script, flags, folder, resume):
    """In a separate process: run a script's main, new or resumed, with output silenced."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    module = importlib.import_module(script)
    where = {"resume": str(folder)} if resume else {"output": str(folder)}
    module.main(module.Args(**flags, **where))


def processes():
    """A context whose processes start quickly.

    They are forked from one that has imported everything and computed nothing.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, EventAccumulator.__module__, MODEL])
    first = context.Process(target=int)  # waits for the imports
    first.start()
    first.join()
    return context


def reached(folder):
    """The update of the last checkpoint."""
    found = checkpoints(folder)
    return int(found[-1].name) if found else 0


def run(context, script, flags, folder, moment=None, seconds=0.0):
    """Start or resume a run, and kill it at `moment`. Returns whether it was killed.

    Moment 3.7 is 0.7 * `seconds` after the checkpoint of update 3 appears.
    """
    if folder.exists() and not reached(folder):
        shutil.rmtree(folder)  # killed before its first checkpoint: nothing to resume
    child = context.Process(target=train, args=(script, flags, folder, folder.exists()))
    child.start()
    while moment is not None and child.is_alive():
        if folder.exists() and reached(folder) >= int(moment):
            time.sleep(moment % 1 * seconds)
            child.kill()
        time.sleep(0.001)
    child.join()
    assert child.exitcode in (0, -9), f"{script} ended with exit code {child.exitcode}"
    return child.exitcode == -9


def outcome(folder):
    """The result of a run: dict name -> tensors, numbers and curves, without times."""
    last = checkpoints(folder)[-1]
    contents = torch.load(last / "state.pt", weights_only=True)
    contents["state"].pop("seconds", None)
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    times = {"time/seconds", "time/tokens_per_second"}
    curves = {name: [(event.step, event.value) for event in log.Scalars(name)]
              for name in log.Tags()["scalars"] if name not in times}
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in
               (*last.rglob("*.safetensors"), *(folder / "model").rglob("*.safetensors"))}
    return {"checkpoint": contents, "curves": curves, "weights": weights}


def differences(a, b, name="run"):
    """Names of the leaves where two outcomes differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in a.keys() | b.keys()
                for found in differences(a.get(key), b.get(key), f"{name}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b))
                for found in differences(*pair, f"{name}/{i}")]
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return [] if (torch.equal(a, b) if tensors else a == b) else [name]


def draw_moments(script, updates, kills, seed=0):
    """When to kill a run of so many updates: 3.7 is within update 4."""
    rng = random.Random(f"{script} {seed}")
    return sorted(rng.uniform(0, updates) for _ in range(kills))


def compare(context, script, flags, folder, moments):
    """What differs between an uninterrupted run and a killed one, and how often that was killed."""
    begin, updates = time.monotonic(), flags["num_updates"]
    run(context, script, flags, folder / "whole")
    seconds = (time.monotonic() - begin) / updates  # per update, startup and shutdown included
    killed = [run(context, script, flags, folder / "killed", moment, seconds) for moment in moments]
    run(context, script, flags, folder / "killed")
    return differences(outcome(folder / "whole"), outcome(folder / "killed")), sum(killed)


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    """scripts to run"""
    kills: int = 20
    """kills per script"""
    updates: int = 30
    """updates per run"""
    output: str = "runs/kill"
    """folder for the runs; must not exist yet"""


def main(args):
    output = Path(args.output).resolve()
    require(not output.exists(),
            f"--output {args.output}: already exists; choose another folder")
    context, bad = processes(), []
    for script in args.scripts:
        flags = {"num_updates": args.updates, "save_every": 1, "device": "cpu", "eval_every": 10}
        if script == "reward_model":  # its own pairs take minutes to sample; these take seconds
            flags["dataset"] = "tasks/mini_tldr.py:comparisons"
        if script in FAMILY:
            flags["eval_prompts"] = 16
        moments = draw_moments(script, args.updates, args.kills)
        found, kills = compare(context, script, flags, output / script, moments)
        said = f"differs in {', '.join(found[:3])}" if found else "the same"
        print(f"{script:<14} killed {kills} times: {said}", flush=True)
        bad += found
    sys.exit(bool(bad))


if __name__ == "__main__":
    main(tyro.cli(Args))
