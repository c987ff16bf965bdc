"""Are the rows of lab/dialects.py what the libraries compute? Theirs and ours on one rollout.

TRL is not a requirement of this project, so its check runs in an environment of its own:

    python -m venv trl-env && . trl-env/bin/activate
    pip install -r requirements.txt trl==1.16.0
    python -m tools.check_dialects

verl and OpenRLHF, which want GPUs, are read from checkouts, in the project's own environment:

    git clone --depth 1 --branch v0.9.0 https://github.com/verl-project/verl
    git clone --depth 1 --branch v0.11.0 https://github.com/OpenRLHF/OpenRLHF
    python -m tools.check_dialects --verl verl
    python -m tools.check_dialects --openrlhf OpenRLHF

A rollout of six responses, with the scores and log-probs that are written down below, goes through
their functions, and through the `main` of the script that the row names, with the row's functions
in it. Of TRL's trainers, only what samples and what runs the model is replaced (`_generate` and
`_get_per_token_logps_and_entropies`); advantages and loss are those of
`_generate_and_score_completions` and `_compute_loss`. Of verl and OpenRLHF, the functions for
KL, advantages and loss are taken out of their files, and called here as their trainers do.

The table has both losses, the norm of their gradient with respect to the tokens' log-probs, and its
largest difference from ours. Where a library computes in float32, 1e-7 is rounding.
docs/dialects.md has the tables, and tests/test_dialects.py keeps the numbers.
"""

import __future__
import ast
import io
import itertools
import logging
import tempfile
import warnings
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import tyro
from datasets import Dataset

from lab import blackbox, gradient
from lab.dialects import ONE_ROUND
from plumbing import require

K, BETA = 3, 0.3
FLAGS = gradient.Args(k=K, length=3, beta=BETA, temperature=1.0, missing_eos_penalty=0.0)
# Of each response: its row in the lab's world, its score, and for each token the log-probs under
# the policy, the policy that sampled and the reference.
ROLLOUT = [
    (0, 1.0, [(-0.9, -1.2, -1.0)]),
    (1, -0.5, [(-0.5, -0.55, -0.4), (-1.1, -0.7, -0.9)]),
    (3, 0.25, [(-0.6, -0.8, -0.7), (-0.3, -0.3002, -0.5), (-2.0, -1.7, -1.5)]),
    (6, 2.0, [(-0.4, -0.45, -0.4), (-0.8, -0.6, -1.2), (-0.7, -1.0, -0.6)]),
    (7, -1.25, [(-0.3, -0.31, -0.2), (-1.1, -2.6, -1.3), (-0.2, -0.25, -0.3)]),
    (5, 0.5, [(-1.0, -1.4, -1.1), (-0.6, -0.5, -0.8)]),
]
CLIPS = "--clip-low 0.2 --clip-high 0.2"
TRL = {  # command -> trainer, and what its config is asked for
    "lab/dialects.py:trl-rloo": ("RLOO", {}),
    "lab/dialects.py:trl-reinforce-pp": ("RLOO", {"normalize_advantages": True}),
    "lab/dialects.py:trl-grpo": ("GRPO", {}),
    "lab/dialects.py:trl-grpo-1.9": ("GRPO", {"use_bias_correction_kl": False}),
    "lab/dialects.py:trl-grpo-0.15": ("GRPO", {"loss_type": "grpo", "num_iterations": 1,
                                               "use_bias_correction_kl": False}),
    "lab/dialects.py:trl-grpo-batch": ("GRPO", {"scale_rewards": "batch"}),
    "lab/dialects.py:trl-dr-grpo": ("GRPO", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "lab/dialects.py:trl-dr-grpo-std": ("GRPO", {"loss_type": "dr_grpo"}),
    "lab/dialects.py:trl-dapo": ("GRPO", {"epsilon_high": 0.28}),
    "lab/dialects.py:trl-gspo": ("GRPO", {"importance_sampling_level": "sequence"}),
    "lab/dialects.py:trl-gspo-grpo": ("GRPO", {
        "importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4,
        "epsilon_high": 4e-4}),
    "lab/dialects.py:trl-cispo": ("GRPO", {"loss_type": "cispo"}),
    "lab/dialects.py:trl-cispo-5": ("GRPO", {"loss_type": "cispo", "epsilon_high": 5.0,
                                             "scale_rewards": "batch"}),
    "grpo.py": ("GRPO", {"loss_type": "grpo", "use_bias_correction_kl": False}),
    f"dapo.py {ONE_ROUND}": ("GRPO", {"epsilon_high": 0.28, "use_bias_correction_kl": False}),
    f"gspo.py {CLIPS} --beta 0": ("GRPO", {"importance_sampling_level": "sequence", "beta": 0.0,
                                           "loss_type": "grpo"}),
    "cispo.py --max-ratio 1.2 --beta 0": ("GRPO", {"loss_type": "cispo", "epsilon_high": 1.2,
                                                   "beta": 0.0}),
}


def given(world):
    """The rollout as a Batch of the world's rows, its log-probs and ref_logprobs (N, T), scores."""
    rows, scores, tokens = zip(*ROLLOUT)
    batch = world.batch[list(rows)]
    columns = torch.zeros(3, *batch.responses.shape)  # (3, N, T)
    for row, of_tokens in enumerate(tokens):
        columns[:, row, : len(of_tokens)] = torch.tensor(of_tokens).T
    logprobs, old_logprobs, ref_logprobs = columns
    return replace(batch, old_logprobs=old_logprobs), logprobs, ref_logprobs, torch.tensor(scores)


def values_of(batch):
    """What a critic says of each token's state; any numbers will do. (N, T), 0 where masked."""
    return -batch.old_logprobs


def on_last_token(scores, response_mask):
    """Token rewards (N, T): the score on the last token."""
    rewards = torch.zeros(response_mask.shape)
    rewards[range(len(scores)), response_mask.sum(1) - 1] = scores
    return rewards


def ours(command):
    """Loss and its gradient with respect to the log-probs (N, T) of a command's `main`."""
    batch, logprobs, ref_logprobs, scores = given(gradient.make_world(FLAGS))
    logprobs.requires_grad_()
    losses = []

    def note(run, examples, **numbers):
        losses.append(numbers["loss"])

    with patch.object(blackbox.BlackBox, "check_finite", note):
        blackbox.run(command, lambda *_: batch, **gradient.settings(FLAGS), replace={
            "token_logprobs": lambda *_: logprobs, "no_grad_logprobs": lambda *_: ref_logprobs,
            "no_grad_values": lambda *_: values_of(batch),
            "token_values": lambda *_: values_of(batch).requires_grad_(),
            "compute_value_loss": lambda values, *_: 0 * values.sum(),  # only the policy's
            "score": lambda *_: {"score": scores}})
    return float(losses[0]), logprobs.grad * batch.response_mask


def trls(name, flags):
    """Loss and gradient of a trainer's own methods. Args: "GRPO" or "RLOO"; flags of its config."""
    with tempfile.TemporaryDirectory() as folder:
        return of_trainer(name, flags, folder)


def of_trainer(name, flags, folder):
    """The same, with a folder for the model that the trainer wants."""
    import trl

    world = gradient.make_world(FLAGS)
    world.tokenizer.pad_token = world.tokenizer.eos_token
    world.policy.save_pretrained(folder)
    batch, logprobs, ref_logprobs, scores = given(world)
    logprobs.requires_grad_()
    config = getattr(trl, f"{name}Config")(**dict(
        output_dir=folder, per_device_train_batch_size=len(batch), num_generations=K, beta=BETA,
        max_completion_length=batch.responses.shape[1], num_iterations=2, bf16=False, use_cpu=True,
        report_to="none", disable_tqdm=True) | flags)
    trainer = getattr(trl, f"{name}Trainer")(
        folder, lambda prompts, **_: scores.tolist(), config, processing_class=world.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": world.prompts}))
    trainer.current_gradient_accumulation_steps = 1
    lists = [[ids[mask].tolist() for ids, mask in zip(*pair)] for pair in
             ((batch.prompts, batch.prompt_mask), (batch.responses, batch.response_mask))]
    texts = world.tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
    # RLOO: ids of prompts and completions, and texts. GRPO: tool masks, log-probs, images besides.
    trainer._generate = lambda _: ((*lists, texts) if name == "RLOO" else
                                   (*lists, None, texts, None, {}, None, None))

    def forward(model, *_, **__):
        """Log-probs and entropies; without gradients, they are those of old policy or reference."""
        fixed = ref_logprobs if model is trainer.ref_model else batch.old_logprobs
        return logprobs if torch.is_grad_enabled() else fixed, torch.zeros_like(fixed), None

    trainer._get_per_token_logps_and_entropies = forward
    rows = [{"prompt": prompt} for prompt in world.prompts for _ in range(K)]
    loss = trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows))
    loss.backward()
    return loss.item(), logprobs.grad * batch.response_mask


# ------------------------------------------------------------------- verl and OpenRLHF, from source


def extract(path, names, namespace):
    """Definitions of a source file, without their decorators, evaluated in `namespace`.

    Args: path; names (of functions and classes; "Class.method" for a method alone); namespace.
    """
    require(Path(path).is_file(), f"{path}: no such file; --verl and --openrlhf are the folders of "
                                  "checkouts")
    tree = ast.parse(Path(path).read_text())
    nodes = {node.name: node for node in tree.body if hasattr(node, "name")}
    for name in list(nodes):
        nodes |= {f"{name}.{part.name}": part for part in nodes[name].body if hasattr(part, "name")}
    for name in names:
        require(name in nodes, f"{path}: has no {name}; the versions are those of docs/dialects.md")
        nodes[name].decorator_list = []
    module = ast.Module([nodes[name] for name in names], [])
    exec(compile(module, str(path), "exec", __future__.annotations.compiler_flag), namespace)
    return namespace


class Config(dict):
    """A dict whose keys are attributes too."""

    __getattr__ = dict.__getitem__


def verl_functions(folder):
    algorithms = f"{folder}/verl/trainer/ppo/core_algos.py"
    tools = extract(f"{folder}/verl/utils/torch_functional.py",
                    ["masked_sum", "masked_mean", "masked_var", "masked_whiten"], {"torch": torch})
    names = [f"compute_{name}_outcome_advantage" for name in
             ("rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "grpo", "opo")]
    names += [f"compute_policy_loss_{name}" for name in ("vanilla", "gspo", "cispo")]
    return extract(algorithms, [*names, "compute_gae_advantage_return", "agg_loss", "kl_penalty",
                                "kl_penalty_forward"],
                   {"torch": torch, "defaultdict": defaultdict, "ActorConfig": Config,
                    "AlgoConfig": (), "verl_F": SimpleNamespace(**tools)})


def verls(estimator, flags, functions):
    """Loss and gradient, put together as in verl's trainer (ray_trainer.py) and ppo_loss.

    The KL is part of the reward (use_kl_in_reward) or of the loss (use_kl_loss).
    """
    flags = Config({"loss": "vanilla", "mean": "token-mean", "in_reward": True, "std": True,
                    "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2,
                    "global_batch_info": {}, "gamma": 1.0} | flags)
    batch, logprobs, ref_logprobs, scores = given(gradient.make_world(FLAGS))
    old_logprobs, mask = batch.old_logprobs, batch.response_mask.double()
    logprobs.requires_grad_()
    rewards = on_last_token(scores, batch.response_mask)
    if flags.in_reward:
        rewards -= BETA * mask * functions["kl_penalty"](old_logprobs, ref_logprobs, "kl")
    if estimator == "gae":
        advantages, _ = functions["compute_gae_advantage_return"](
            rewards, values_of(batch), mask, 1.0, 1.0)
    else:
        more = {"norm_adv_by_std_in_grpo": flags.std} if estimator == "grpo" else {}
        prompts = {} if estimator == "reinforce_plus_plus" else {"index": [0, 0, 0, 1, 1, 1]}
        advantages, _ = functions[f"compute_{estimator}_outcome_advantage"](
            rewards, mask, **prompts, config=flags, **more)
    loss, _ = functions[f"compute_policy_loss_{flags.loss}"](
        old_logprobs, logprobs, advantages, mask, flags.mean, flags)
    if not flags.in_reward:
        kl = functions["kl_penalty"](logprobs, ref_logprobs, "low_var_kl")
        loss = loss + BETA * functions["agg_loss"](kl, mask, flags.mean)
    loss.backward()
    return loss.item(), logprobs.grad * mask


VERL = {  # row of lab/dialects.py -> estimator, and what the configuration is asked for
    "verl-rloo": ("rloo", {}),
    "verl-reinforce-pp": ("reinforce_plus_plus", {}),
    "verl-reinforce-pp-baseline": ("reinforce_plus_plus_baseline", {}),
    "verl-grpo": ("grpo", {"in_reward": False}),
    "verl-dr-grpo": ("grpo", {"in_reward": False, "std": False,
                              "mean": "seq-mean-token-sum-norm"}),
    "verl-dr-grpo-tokens": ("grpo", {"in_reward": False, "std": False}),
    "verl-dapo": ("grpo", {"in_reward": False, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}),
    "verl-gspo": ("grpo", {"in_reward": False, "loss": "gspo"}),
    "verl-cispo": ("grpo", {"in_reward": False, "loss": "cispo"}),
    "verl-ppo": ("gae", {}),
    "verl-opo": ("opo", {}),
}


def openrlhf_functions(folder):
    models = f"{folder}/openrlhf/models"
    known = extract(f"{models}/utils.py", ["compute_approx_kl", "compute_reward", "masked_mean"],
                    {"torch": torch})
    known = extract(f"{models}/loss.py", ["aggregate_loss", "PolicyLoss"],
                    known | {"nn": torch.nn})
    known |= {"itertools": itertools, "apply_length_penalties": lambda *_: None}
    maker = "RemoteExperienceMaker"
    return extract(f"{folder}/openrlhf/trainer/ppo_utils/experience_maker.py",
                   [f"{maker}.{name}" for name in ("compute_advantages_and_returns",
                                                   "get_advantages_and_returns",
                                                   "get_cumulative_returns")], known)


def openrlhfs(estimator, flags, functions):
    """Loss and gradient, by the experience maker's advantages and PolicyLoss."""
    flags = {"kl": "k1", "beta": BETA, "loss": "ppo"} | flags
    batch, logprobs, ref_logprobs, scores = given(gradient.make_world(FLAGS))
    mask = batch.response_mask.double()
    logprobs.requires_grad_()
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False)
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=K), algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=(-10, 10)))
    maker = SimpleNamespace(
        strategy=SimpleNamespace(args=args), advantage_estimator=estimator,
        kl_ctl=SimpleNamespace(value=flags["beta"]),
        **{name: partial(functions[name], None) for name in ("get_advantages_and_returns",
                                                             "get_cumulative_returns")})
    experience = SimpleNamespace(
        index=list(range(len(batch))), rewards=scores, action_mask=mask, values=values_of(batch),
        kl=functions["compute_approx_kl"](batch.old_logprobs, ref_logprobs, flags["kl"]), info={})
    functions["compute_advantages_and_returns"](maker, [experience])
    loss, *_ = functions["PolicyLoss"](policy_loss_type=flags["loss"])(
        logprobs, batch.old_logprobs, experience.advantages, mask, batch_num_tokens=mask.sum(),
        global_batch_size=len(batch))
    loss.backward()
    return loss.item(), logprobs.grad * mask


OPENRLHF = {  # row of lab/dialects.py -> estimator, and what the flags are
    "openrlhf-rloo": ("rloo", {}),
    "openrlhf-rloo-k3": ("rloo", {"kl": "k3"}),
    "openrlhf-reinforce-pp": ("reinforce", {}),
    "openrlhf-reinforce-pp-baseline": ("reinforce_baseline", {}),
    "openrlhf-grpo": ("group_norm", {}),
    "openrlhf-dr-grpo": ("dr_grpo", {}),
    "openrlhf-gspo": ("group_norm", {"loss": "gspo", "beta": 0.0}),
    "openrlhf-ppo": ("gae", {}),
}


# --------------------------------------------------------------------------------------------- main


@dataclass
class Args:
    verl: str | None = None
    """folder of a checkout of verl v0.9.0, instead of TRL"""
    openrlhf: str | None = None
    """folder of a checkout of OpenRLHF v0.11.0, instead of TRL"""


def theirs(args):
    """What is compared: dict command -> function () -> (loss, gradient)."""
    if args.verl:
        functions = verl_functions(args.verl)
        return {f"lab/dialects.py:{name}": partial(verls, *row, functions)
                for name, row in VERL.items()}
    if args.openrlhf:
        functions = openrlhf_functions(args.openrlhf)
        return {f"lab/dialects.py:{name}": partial(openrlhfs, *row, functions)
                for name, row in OPENRLHF.items()}
    try:
        import trl
    except ModuleNotFoundError as missing:
        raise SystemExit(f"error: {missing}; the top of tools/check_dialects.py says how to "
                         "install it")
    print(f"TRL {trl.__version__}\n")
    return {command: partial(trls, *row) for command, row in TRL.items()}


def main(args):
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    compared, worst = theirs(args), 0.0
    print("| row | their loss | ours | difference | norm of their gradient | largest difference |\n"
          + "|---" * 6 + "|")
    for command, other in compared.items():
        with redirect_stdout(io.StringIO()):
            (loss, grad), (our_loss, our_grad) = other(), ours(command)
        far = (grad - our_grad).abs().max().item()
        worst = max(worst, far, abs(loss - our_loss))
        print(f"| `{command}` | {loss:.7f} | {our_loss:.7f} | {abs(loss - our_loss):.0e} | "
              f"{grad.norm():.7f} | {far:.0e} |", flush=True)
    require(worst < 1e-6, f"a difference of {worst:.0e} is more than rounding")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    main(tyro.cli(Args))
