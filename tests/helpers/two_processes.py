"""Run every script's main on given rollouts, as one of two processes, and save what it has seen.

Not a test by itself: test_processes.py compares what is saved with the second implementation.
"""

import torch
import torch.distributed as dist
from test_loops import BASE, HERE, PAIRS, given_rollout

import plumbing
from helpers import loop

# 3 prompts, and 3 to evaluate on: neither can be divided by 2.
RUNS = {
    "rloo": ("rloo", {"reward": (f"{HERE}:reward", f"{HERE}:brevity")}),
    "reinforce": ("reinforce", {"baseline": "ema"}),
    "remax": ("remax", {"microbatch_tokens": 1}),
    "grpo": ("grpo", {"minibatches": 2}),
    "reinforce_pp": ("reinforce_pp", {"minibatches": 2, "epochs": 2}),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", {"minibatches": 1}),
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
            flags = BASE | {"num_updates": 2} | flags
            seen = loop.record(script, output, given_rollout, **flags, shard=shard)
            torch.save(vars(seen) | {"args": vars(seen.args)}, f"{output}-{dist.get_rank()}.seen")
    plumbing.leave()
