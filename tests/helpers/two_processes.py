"""Run every script's main on given rollouts, as one of two processes, and save what it has seen.

Not a test by itself: test_processes.py compares what is saved with the second implementation.
"""

import torch
import torch.distributed as dist
from test_loops import BASE, HERE, PAIRS, cases, given_rollout

from helpers import loop
from lab.family import FAMILY
from plumbing import leave

# 3 prompts, and 3 to evaluate on: neither can be divided by 2.
RUNS = {name: dict(cases(name)[-1]) for name in FAMILY} | {
    "rloo": {"reward": (f"{HERE}:reward", f"{HERE}:brevity")},
    "remax": {"microbatch_tokens": 1},
    "ppo": {"minibatches": 4},
    "dpo": PAIRS | {"batch_size": 5},
    "sft": PAIRS,
    "reward_model": PAIRS | {"model": f"{HERE}:critic", "gold": f"{HERE}:brevity"},
}


def main(folder):
    for shard in (False, True):
        for name, flags in RUNS.items():
            output = folder / f"{name}{'-shard' * shard}"
            flags = BASE | {"num_updates": 2} | flags
            seen = loop.record(name, output, given_rollout, **flags, shard=shard)
            torch.save(vars(seen) | {"args": vars(seen.args)}, f"{output}-{dist.get_rank()}.seen")
    leave()
