"""Run every script's main once on given rollouts, under torchrun, and save what each process has seen.

    torchrun --nproc-per-node 2 tests/helpers/two_processes.py FOLDER

Not a test by itself: see test_processes.py, which compares what is saved with the second implementation.
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import torch.distributed as dist  # noqa: E402
from helpers import loop  # noqa: E402

import plumbing  # noqa: E402
from test_loops import BASE, HERE, PAIRS, given_rollout  # noqa: E402

# 3 prompts, and 3 to evaluate on: neither can be divided by 2.
RUNS = {
    "rloo": ("rloo", {"reward": (f"{HERE}:reward", f"{HERE}:brevity")}),
    "reinforce": ("reinforce", {"baseline": "ema"}),
    "remax": ("remax", {"microbatch_tokens": 1}),
    "grpo": ("grpo", {"minibatches": 2}),
    "reinforce_pp": ("reinforce_pp", {"minibatches": 2, "epochs": 2}),
    "reinforce_pp-group": ("reinforce_pp", {"baseline": "group", "minibatches": 1}),
    "vanilla_pg": ("vanilla_pg", {}),
    "ppo": ("ppo", {"minibatches": 4}),
    "raft": ("raft", {}),
    "dpo": ("dpo", PAIRS | {"batch_size": 5}),
    "sft": ("sft", PAIRS),
    "reward_model": ("reward_model", PAIRS | {"model": f"{HERE}:critic", "gold": f"{HERE}:brevity"}),
}


def main(folder):
    for shard in (False, True):
        for name, (script, flags) in RUNS.items():
            output = folder / f"{name}{'-shard' * shard}"
            seen = loop.record(script, output, given_rollout, **BASE | flags, shard=shard)
            torch.save(vars(seen) | {"args": vars(seen.args)}, f"{output}-{dist.get_rank()}.seen")
    plumbing.close(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
