"""The algorithms of the project, each listed once. Tests, lab and tools read this table.

A new algorithm is a copy of its relative, edited; a row here; its formula in
tests/helpers/oracle.py; and its row in the docs (see CONTRIBUTING.md).
"""

from dataclasses import dataclass

INF = float("inf")


@dataclass(frozen=True)
class Algorithm:
    """One script."""

    relative: str | None  # the script that it is a diff of
    changed: int  # how many lines of code may differ from it; more means that a skeleton has moved
    variants: tuple[dict, ...] = ()  # flags that change the algorithm, each set of them tested
    lab: tuple[str, ...] = ("",)  # flags of its rows in the table of lab/gradient.py, if it has any
    critic: bool = False  # whether it trains a second model
    samples: bool = True  # whether it makes rollouts; if not, it learns from pairs
    least_k: int = 2  # responses per prompt that it needs
    binary: bool = False  # whether scores have to be 0 or 1
    formula: str | None = None  # in tests/helpers/oracle.py; default: one with the script's name


FAMILY = {
    "rloo": Algorithm(None, 0),
    "reinforce": Algorithm("rloo", 36, (
        {"baseline": "none"},
        {"window": 2, "num_updates": 5},
        {"baseline": "ema", "num_updates": 4},
        {"baseline": "ema", "decay": 0.3, "num_updates": 4},
    ), lab=("--baseline none", ""), least_k=1),
    "remax": Algorithm("rloo", 30, lab=("--k 1", "--k 4"), least_k=1),
    "maxrl": Algorithm("rloo", 20, lab=(), binary=True),  # lab.gradient has its row with --binary
    "grpo": Algorithm("rloo", 64, (
        {"scale_std": False, "length_mean": False},
        {"scale_std": False},
        {"length_mean": False},
    ), lab=("--no-scale-std --no-length-mean", "")),
    "gspo": Algorithm("grpo", 25, (
        {"clip_low": 0.02, "clip_high": 0.05, "minibatches": 3},
        {"clip_low": INF, "clip_high": INF, "scale_std": False, "epochs": 2},
    )),
    "cispo": Algorithm("grpo", 25, (
        {"max_ratio": 1.05, "minibatches": 3},
        {"max_ratio": INF, "scale_std": False, "epochs": 2},
    )),
    "dapo": Algorithm("grpo", 60, (
        {"clip_low": 0.05, "clip_high": 0.1, "minibatches": 3, "overlong_buffer": 3},
        {"clip_low": INF, "clip_high": INF, "scale_std": False, "overlong_penalty": 0.0},
        {"max_rounds": 1, "epochs": 2, "minibatches": 1},
    ), lab=("--overlong-penalty 0",)),
    "reinforce_pp": Algorithm("grpo", 64, (
        {"normalize_scores": False},
        {"whiten": False},
        {"clip_scores": 0.5},
        {"normalize_scores": False, "whiten": False},
    ), lab=("--no-normalize-scores --no-whiten", ""), least_k=1),
    "reinforce_pp_baseline": Algorithm("reinforce_pp", 32, (
        {"whiten": False},
        {"beta": 0.0, "minibatches": 3, "epochs": 2},
    ), lab=("--no-whiten", "")),
    "vanilla_pg": Algorithm("rloo", 65, ({"critic_lr": 0.2},), critic=True, least_k=1),
    "ppo": Algorithm("vanilla_pg", 88, (
        {"lam": 0.5, "gamma": 0.9},
        {"whiten": False},
        {"lam": 0.0, "whiten": False},
        {"lam": 1.0, "whiten": False, "clip": INF, "value_clip": INF},
        {"value_clip": 0.02, "epochs": 2, "critic_lr": 0.2},
        {"value_clip": INF, "epochs": 2},
    ), lab=("--lam 1 --no-whiten", "--lam 0.95 --no-whiten", "--lam 0 --no-whiten", ""),
       critic=True, least_k=1),
    "raft": Algorithm("rloo", 30, ({"rank_by": "score", "beta": 2.0}, {"beta": 2.0})),
    "dpo": Algorithm("rloo", 102, (
        {"beta": 1.0, "temperature": 1.0, "microbatch_tokens": 1},
        {"max_grad_norm": 0.01, "batch_size": 5, "lr_schedule": "cosine", "warmup_updates": 1},
        {"lr": 0.2, "lr_schedule": "constant", "max_grad_norm": 1e9, "microbatch_tokens": 10_000},
    ), samples=False),
}
SAMPLING = [name for name, algorithm in FAMILY.items() if algorithm.samples]
SCRIPTS = [*FAMILY, "sft", "reward_model"]  # all that train
