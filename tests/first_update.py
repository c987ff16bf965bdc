"""Run the first update of several scripts, with one process or (under torchrun) several, and save what came out.

    python tests/first_update.py FOLDER WORLD        WORLD: JSON with a policy, a reward and a data file
    torchrun --nproc-per-node 2 tests/first_update.py FOLDER WORLD

The responses are sampled by the first run, which has one process, and read by the others. Not a test by itself: see
test_processes.py.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402

RUNS = {  # name -> script, flags
    "rloo": ("rloo", {}),
    "reinforce_pp": ("reinforce_pp", {"minibatches": 1}),
    "grpo": ("grpo", {}),
    "ppo": ("ppo", {"minibatches": 1}),
}


def main(folder, world):
    several = "WORLD_SIZE" in os.environ
    for name, (script, flags) in RUNS.items():
        script = importlib.import_module(script)
        gradients = []

        def clip_gradients(model, max_norm, real=script.clip_gradients, gradients=gradients):
            norm = real(model, 1e9)
            full = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            gradients.append([full(parameter.grad).clone() for parameter in model.parameters()])
            return norm

        def rollout(*args, path=folder / f"{name}.batch", **kwargs):
            batch = common.rollout(*args, **kwargs)
            if not path.exists():
                torch.save(vars(batch), path)
            return common.Batch(**torch.load(path))

        script.clip_gradients, script.rollout, close = clip_gradients, rollout, script.close
        script.close = lambda writer: None  # the next script goes on with the same processes
        for shard in (False, True) if several else (False,):
            gradients.clear()
            # 5 prompts, and 3 to evaluate on: neither can be divided by 2
            shape = dict(k=3, prompts_per_step=5, eval_prompts=3, num_updates=1, microbatch_tokens=40)
            where = folder / f"{name}-{2 if several else 1}{'-shard' * shard}"
            script.main(script.Args(**world | flags | shape, shard=shard, output=str(where)))
            if os.environ.get("RANK", "0") == "0":
                torch.save(gradients, f"{where}.gradients")
    if several:
        close(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
