"""A tiny world on disk that every script can run on, and processes that start quickly."""

import json
import os
import tempfile
from types import SimpleNamespace

# One thread in every process, also in those that tests start: threads of several processes would
# wait for each other.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HF_HUB_OFFLINE"] = "1"  # with a network or without, the tests see the same
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp()  # they leave the project alone,
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # and the user's cache

import pytest
import torch
from helpers.tiny import make_tokenizer, save_classifier, save_policy

from tools import kill

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def context():
    """A multiprocessing context whose processes have imported every script already."""
    return kill.processes()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Paths of a tiny policy, reward model and data, and flags for a short RL run. Read it only."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer("a b c d e f".split(), pad="<eos>")
    policy = save_policy(folder / "policy", tokenizer)
    reward = save_classifier(folder / "reward", policy, tokenizer)
    data = str(folder / "data.jsonl")
    rows = [{"prompt": " ".join("abcdef"[i * j % 6] for j in range(1, 2 + i % 5)),
             "completion": "a b", "chosen": "a b c", "rejected": "d e"} for i in range(12)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = dict(model=policy, reward=(reward,), gold="none", dataset=data, device="cpu", k=3,
                 num_updates=3, prompts_per_step=4, max_new_tokens=6, eval_prompts=4, eval_every=2,
                 lr=1e-2)
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, policy=policy, reward=reward,
                           data=data, flags=flags)
