"""What TRL, verl and OpenRLHF compute under the same names, as rows of `python -m lab.gradient`.

    python -m lab.dialects                                        # the list, with sources
    python -m lab.gradient rloo.py lab/dialects.py:trl-rloo "lab/dialects.py:verl-rloo --beta 0"
    python -m lab.gradient "lab/dialects.py:*-rloo" --stale 0.01  # all names that match; "*": all

A dialect is a script of this project with flags, in which some functions are replaced. Sampling,
scores and optimizer steps stay the script's, and a mini-batch is the whole rollout.
docs/dialects.md has the results; tools/check_dialects.py compares loss and gradient of the rows
with what the libraries themselves compute.

A script that divides by the number of rows gets a mean over tokens by scaled advantages, since
clipping commutes with a positive factor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import dapo
import reinforce_pp

NOT_COUNTED = torch.tensor(0)  # clipped tokens, which scripts only log

# ------------------------------------------------------------------- one number for each response


def centred(rewards, k):
    """r_i - mean of the prompt's k. Args: rewards (N,), prompt-major; k. Returns: (N,)."""
    groups = rewards.view(-1, k)  # (B, k)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def leave_one_out(rewards, k):
    """r_i - mean of the other k - 1: the same times k / (k - 1)."""
    return centred(rewards, k) * k / (k - 1)


def over_group_std(rewards, k, epsilon):
    """GRPO's: (r_i - mean) / (std + epsilon), k - 1 in the denominator of the variance."""
    std = rewards.view(-1, k).std(1).repeat_interleave(k)  # (N,)
    return centred(rewards, k) / (std + epsilon)


def over_batch_std(rewards, k, scale_std=True):
    """The group's mean, but the std of all rewards in the batch ("Lite PPO", arXiv:2508.08221)."""
    return centred(rewards, k) / (rewards.std() + 1e-4)


def normalized(advantages):
    """Over the responses of the batch, as TRL's RLOO with normalize_advantages."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-4)


def optimal_baseline(rewards, lengths, k, leave_out=False):
    """OPO (arXiv:2505.23585): r_i - sum_j |y_j| r_j / sum_j |y_j| over the prompt's k.

    Args: rewards and lengths (N,); k; leave_out (whether j runs over the other k - 1 only: then the
    baseline does not depend on y_i, and the bias is gone). Returns: (N,).
    """
    rewards, lengths = rewards.view(-1, k), lengths.view(-1, k)  # (B, k)
    own = lengths if leave_out else 0 * lengths
    weighted = (lengths * rewards).sum(1, keepdim=True) - own * rewards  # (B, k)
    return (rewards - weighted / (lengths.sum(1, keepdim=True) - own)).flatten()


# ------------------------------------------------------------------------ one number for each token


def each_token(advantages, response_mask):
    """The response's advantage for all of its tokens. Args: (N,), (N, T). Returns: (N, T)."""
    return advantages.unsqueeze(1) * response_mask


def to_go(rewards, response_mask):
    """Sum of the rewards from each token on: KL-to-go and score. Args: (N, T), (N, T)."""
    return reinforce_pp.compute_advantages(rewards, response_mask, whiten=False)


def verl_whitened(advantages, response_mask):
    """Mean 0 and variance 1 over the batch's n tokens, n - 1 in the denominator (masked_whiten)."""
    tokens = advantages[response_mask]  # (n,)
    return (advantages - tokens.mean()) * (tokens.var() + 1e-8).rsqrt() * response_mask


def openrlhf_whitened(advantages, response_mask):
    """The same with n in the denominator, and a variance of at least 1e-8."""
    tokens = advantages[response_mask]  # (n,)
    std = tokens.var(correction=0).clamp(min=1e-8).sqrt()
    return (advantages - tokens.mean()) / std * response_mask


def token_mean(advantages, response_mask):
    """Turn the script's mean over responses (of sums over tokens) into one over all tokens."""
    return advantages * len(response_mask) / response_mask.sum()


# ------------------------------------------------------------------------------------------- losses


def clipped(ratio, advantages, clip_low, clip_high):
    """PPO's gain: min( ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A )."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def dual_clipped(ratio, advantages, clip_low, clip_high, c=3.0):
    """verl's gain: where A < 0, never below c A (arXiv:1912.09729)."""
    gain = clipped(ratio, advantages, clip_low, clip_high)  # (n, T)
    return torch.where(advantages < 0, gain.maximum(c * advantages), gain)


def k3(logprobs, ref_logprobs):
    """pi_ref / pi - log(pi_ref / pi) - 1 of each token, 0 where masked."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def k3_kl(logprobs, ref_logprobs, response_mask):
    """In the place of token_kl, which is k1: k3 as a part of the reward, cut off at 10."""
    return k3(logprobs, ref_logprobs).clamp(max=10) * response_mask


def sequence_loss(logprobs, old_logprobs, advantages, clip):
    """TRL's RLOO: the ratio is that of the whole response, the product over its tokens."""
    ratio = (logprobs - old_logprobs).sum(1).exp()  # (n,)
    return -clipped(ratio, advantages, clip, clip).sum(), NOT_COUNTED


def verl_loss(logprobs, old_logprobs, advantages, clip):
    """verl's default policy loss "vanilla", for scripts that have the KL in the reward."""
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    return -dual_clipped(ratio, advantages, clip, clip).sum(), NOT_COUNTED


def verl_grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip_low,
                   clip_high, beta, c=3.0):
    """The same with k3 in the loss (use_kl_loss, kl_loss_type low_var_kl)."""
    ratio, advantages = (logprobs - old_logprobs).exp(), each_token(advantages, response_mask)
    gain = dual_clipped(ratio, advantages, clip_low, clip_high, c)  # (n, T)
    return (beta * k3(logprobs, ref_logprobs) - gain).sum(), NOT_COUNTED


def verl_gspo_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip_low,
                   clip_high, beta):
    """The sequence's ratio, its gradient by each token's own: sg(s) pi / sg(pi)."""
    lengths = response_mask.sum(1, keepdim=True)  # (n, 1)
    log_ratio = (logprobs - old_logprobs).sum(1, keepdim=True) / lengths  # (n, 1)
    ratio = (logprobs - logprobs.detach() + log_ratio.detach()).exp()  # (n, T)
    gain = clipped(ratio, each_token(advantages, response_mask), clip_low, clip_high)  # (n, T)
    kl = token_mean(k3(logprobs, ref_logprobs), response_mask)  # (n, T); the KL's mean is another
    return (beta * kl - gain / lengths).sum(), NOT_COUNTED


def verl_cispo_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, _, beta):
    """The weight is bounded on both sides, 1 - 0.2 and 1 + 0.2."""
    weight = (logprobs - old_logprobs).exp().clamp(0.8, 1.2).detach()  # (n, T)
    gain = weight * each_token(advantages, response_mask) * logprobs  # (n, T)
    return (beta * k3(logprobs, ref_logprobs) - gain).sum(), NOT_COUNTED


def trl_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip_low, clip_high,
             beta):
    """TRL's GRPO summed over tokens; since 1.10, k3 is multiplied by the ratio."""
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    gain = clipped(ratio, each_token(advantages, response_mask), clip_low, clip_high)  # (n, T)
    return (beta * ratio * k3(logprobs, ref_logprobs) - gain).sum(), NOT_COUNTED


def trl_gspo_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip_low,
                  clip_high, beta, by_length=True):
    """importance_sampling_level="sequence": s_i for every token of the response.

    With the default loss_type "dapo" the sum over tokens weights a response by its length
    (by_length), with "grpo" it is their mean.
    """
    lengths = response_mask.sum(1, keepdim=True)  # (n, 1)
    ratio = ((logprobs - old_logprobs).sum(1, keepdim=True) / lengths).exp()  # (n, 1)
    gain = clipped(ratio, each_token(advantages, response_mask), clip_low, clip_high)  # (n, T)
    losses = beta * ratio * k3(logprobs, ref_logprobs) - gain  # (n, T)
    return (losses if by_length else losses / lengths).sum(), NOT_COUNTED


def trl_cispo_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, max_ratio,
                   beta):
    """epsilon_high is the largest weight itself; it is not added to 1."""
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    gain = ratio.clamp(max=max_ratio).detach() * each_token(advantages, response_mask) * logprobs
    return (beta * ratio * k3(logprobs, ref_logprobs) - gain).sum(), NOT_COUNTED


def without_ratio(logprobs, _, ref_logprobs, advantages, response_mask, clip, beta, length_mean):
    """TRL 0.14 and 0.15, and later ones while an optimizer step takes the whole rollout.

    The ratio is pi / sg(pi), 1: whatever policy has sampled, it passes for the current one.
    """
    gain = (logprobs - logprobs.detach()).exp() * each_token(advantages, response_mask)  # (n, T)
    losses = (beta * k3(logprobs, ref_logprobs) - gain) / response_mask.sum(1, keepdim=True)
    return losses.sum(), NOT_COUNTED


def over_groups(compute_loss, k):
    """A mean over the tokens of each prompt's k responses, then over prompts: the DAPO paper's.

    For a script that divides by all tokens, and a mini-batch that is the whole rollout.
    """
    def run(logprobs, *inputs):
        mask, prompts = inputs[3], len(logprobs) // k
        loss = sum(compute_loss(*(x[k * i : k * i + k] if torch.is_tensor(x) else x
                                  for x in (logprobs, *inputs)))[0] / mask[k * i : k * i + k].sum()
                   for i in range(prompts))
        return loss / prompts * mask.sum(), NOT_COUNTED

    return run


def over_constant(compute_loss, length):
    """Dr. GRPO: the sum over tokens divided by a constant, for a script that divides by rows."""
    def run(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip, beta, _):
        loss, clipped = compute_loss(logprobs, old_logprobs, ref_logprobs, advantages,
                                     response_mask, clip, clip, beta)
        return loss / length, clipped

    return run


# ---------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Dialect:
    """One row."""

    script: str
    flags: str
    functions: Callable  # (the script's Args) -> dict name of a function -> what takes its place
    source: str  # library, version, file


def trl_rloo(advantages_of):
    """Functions of reinforce_pp.py: one advantage and one ratio for each response.

    Args: advantages_of (function (R (N,)) -> (N,), where R is the score less beta times the KL).
    """
    return {"compute_advantages": lambda rewards, *_: advantages_of(rewards.sum(1)),
            "compute_loss": sequence_loss}


def verl(advantages_of):
    """Functions of reinforce_pp.py: verl's token loss, a mean over the tokens of the mini-batch.

    Args: advantages_of (function (rewards (N, T), response_mask) -> (N, T)).
    """
    def compute_advantages(rewards, response_mask, _):
        return token_mean(advantages_of(rewards, response_mask), response_mask)

    return {"compute_advantages": compute_advantages, "compute_loss": verl_loss}


def verl_group(advantages_of):
    """The same for an advantage of whole responses. Args: advantages_of (function (R (N,)))."""
    return verl(lambda rewards, mask: each_token(advantages_of(rewards.sum(1)), mask))


def openrlhf(baseline, whitened=False):
    """Functions of reinforce_pp.py: a baseline for the score, then the KL-to-go of each token.

    What is left of the score is cut off at 10, and the mean is over the tokens of the step.
    """
    def compute_advantages(rewards, response_mask, _):
        advantages = reinforce_pp.compute_advantages(rewards, response_mask, whitened)
        return token_mean(advantages, response_mask)

    return {"normalize_scores": lambda scores, _: baseline(scores).clamp(-10, 10),
            "compute_advantages": compute_advantages}


def opo(k, leave_out):
    """Functions of reinforce_pp.py: OPO, a sum over tokens."""
    def compute_advantages(rewards, response_mask, _):
        lengths = response_mask.sum(1)  # (N,)
        return each_token(optimal_baseline(rewards.sum(1), lengths, k, leave_out), response_mask)

    return {"compute_advantages": compute_advantages}


def group_std(epsilon):
    """compute_advantages of grpo.py with another epsilon."""
    def compute_advantages(rewards, k, scale_std):
        return over_group_std(rewards, k, epsilon) if scale_std else centred(rewards, k)

    return {"compute_advantages": compute_advantages}


def of_tokens(whitened):
    """Functions of ppo.py: another whitening, and a mean over tokens."""
    def whiten_advantages(advantages, response_mask):
        return token_mean(whitened(advantages, response_mask), response_mask)

    return {"whiten_advantages": whiten_advantages}


def remax_tokens(rewards, baseline, response_mask):
    """compute_advantages of remax.py, but a mean over tokens."""
    return token_mean(to_go(rewards, response_mask) - each_token(baseline, response_mask),
                      response_mask)


RLOO = "reinforce_pp.py", "--no-normalize-scores"
BASELINE = "reinforce_pp.py", ""  # in the place of its normalize_scores
ONE_ROUND = "--max-rounds 1 --overlong-penalty 0"
TOKENS = "dapo.py", f"{ONE_ROUND} --clip-high 0.2"  # a mean over all tokens
CONSTANT = "grpo.py", "--no-scale-std --no-length-mean"
WIDE, NARROW = "--clip-low 0.2 --clip-high 0.2", "--clip-low 3e-4 --clip-high 4e-4"
TRL_RLOO = "TRL 1.16.0, trl/trainer/rloo_trainer.py"
TRL_GRPO = "TRL 1.16.0, trl/trainer/grpo_trainer.py"
VERL = "verl 0.9.0, verl/trainer/ppo/core_algos.py"
OPENRLHF = "OpenRLHF 0.11.0, trainer/ppo_utils/experience_maker.py and models/loss.py"

DIALECTS = {
    "trl-rloo": Dialect(
        *RLOO, lambda args: trl_rloo(partial(leave_one_out, k=args.k)), TRL_RLOO),
    "verl-rloo": Dialect(
        *RLOO, lambda args: verl_group(partial(leave_one_out, k=args.k)), VERL),
    "openrlhf-rloo": Dialect(
        *BASELINE, lambda args: openrlhf(partial(leave_one_out, k=args.k)), OPENRLHF),
    "openrlhf-rloo-k3": Dialect(
        *BASELINE, lambda args: openrlhf(partial(leave_one_out, k=args.k)) | {"token_kl": k3_kl},
        f"{OPENRLHF}, --algo.kl.estimator k3"),

    "trl-reinforce-pp": Dialect(
        *RLOO, lambda args: trl_rloo(lambda R: normalized(leave_one_out(R, args.k))),
        f"{TRL_RLOO}, normalize_advantages=True"),
    "verl-reinforce-pp": Dialect(
        *RLOO, lambda args: verl(lambda rewards, mask: verl_whitened(to_go(rewards, mask), mask)),
        VERL),
    "openrlhf-reinforce-pp": Dialect(
        *BASELINE, lambda args: openrlhf(lambda scores: scores, whitened=True), OPENRLHF),
    "verl-reinforce-pp-baseline": Dialect(
        *RLOO, lambda args: verl(lambda rewards, mask: verl_whitened(
            each_token(centred(rewards.sum(1), args.k), mask), mask)), VERL),
    "openrlhf-reinforce-pp-baseline": Dialect(
        *BASELINE, lambda args: openrlhf(partial(centred, k=args.k), whitened=True), OPENRLHF),

    "trl-grpo": Dialect(*TOKENS, lambda args: {"compute_loss": trl_loss}, TRL_GRPO),
    "trl-grpo-1.9": Dialect(*TOKENS, lambda args: {}, "TRL 0.22.0 to 1.9.0, loss_type dapo"),
    "trl-grpo-0.15": Dialect(
        "grpo.py", "", lambda args: {"compute_loss": without_ratio}, "TRL 0.14.0 and 0.15.2"),
    "trl-grpo-batch": Dialect(
        *TOKENS, lambda args: {"compute_loss": trl_loss, "compute_advantages": over_batch_std},
        f"{TRL_GRPO}, scale_rewards=batch"),
    "verl-grpo": Dialect(
        *TOKENS, lambda args: group_std(1e-6) | {"compute_loss": verl_grpo_loss}, VERL),
    "openrlhf-grpo": Dialect(
        *BASELINE, lambda args: openrlhf(partial(over_group_std, k=args.k, epsilon=1e-9)),
        OPENRLHF),

    "trl-dr-grpo": Dialect(
        *CONSTANT, lambda args: {"compute_loss": over_constant(trl_loss, args.max_new_tokens)},
        f"{TRL_GRPO}, loss_type=dr_grpo, scale_rewards=none"),
    "trl-dr-grpo-std": Dialect(
        "grpo.py", "--no-length-mean",
        lambda args: {"compute_loss": over_constant(trl_loss, args.max_new_tokens)},
        f"{TRL_GRPO}, loss_type=dr_grpo alone"),
    "verl-dr-grpo": Dialect(
        *CONSTANT, lambda args: {"compute_loss": over_constant(verl_grpo_loss,
                                                               args.max_new_tokens)},
        f"{VERL}, norm_adv_by_std_in_grpo=False, loss_agg_mode=seq-mean-token-sum-norm"),
    "verl-dr-grpo-tokens": Dialect(
        TOKENS[0], f"{TOKENS[1]} --no-scale-std", lambda args: {"compute_loss": verl_grpo_loss},
        f"{VERL}, norm_adv_by_std_in_grpo=False alone"),
    "openrlhf-dr-grpo": Dialect(
        *BASELINE, lambda args: openrlhf(partial(centred, k=args.k)), OPENRLHF),

    "trl-dapo": Dialect(
        "dapo.py", ONE_ROUND, lambda args: {"compute_loss": trl_loss},
        f"{TRL_GRPO}, epsilon_high=0.28"),
    "verl-dapo": Dialect(
        "dapo.py", ONE_ROUND,
        lambda args: group_std(1e-6) | {"compute_loss": partial(verl_grpo_loss, c=10.0)},
        f"{VERL}, clip_ratio_high=0.28, clip_ratio_c=10"),
    "paper-dapo": Dialect(
        "dapo.py", ONE_ROUND, lambda args: {"compute_loss": over_groups(dapo.compute_loss, args.k)},
        "arXiv:2503.14476, equation 8"),

    "trl-gspo": Dialect(
        "dapo.py", f"{ONE_ROUND} {WIDE}", lambda args: {"compute_loss": trl_gspo_loss},
        f"{TRL_GRPO}, importance_sampling_level=sequence alone"),
    "trl-gspo-grpo": Dialect(
        "gspo.py", NARROW, lambda args: {"compute_loss": partial(trl_gspo_loss, by_length=False)},
        f"{TRL_GRPO}, and loss_type=grpo, epsilon=3e-4, epsilon_high=4e-4"),
    "verl-gspo": Dialect(
        "gspo.py", WIDE, lambda args: group_std(1e-6) | {"compute_loss": verl_gspo_loss}, VERL),
    "openrlhf-gspo": Dialect(
        "gspo.py", f"{WIDE} --beta 0", lambda args: group_std(1e-9), OPENRLHF),

    "trl-cispo": Dialect(
        "cispo.py", "--max-ratio 0.2", lambda args: {"compute_loss": trl_cispo_loss},
        f"{TRL_GRPO}, loss_type=cispo alone"),
    "trl-cispo-5": Dialect(
        "cispo.py", "--max-ratio 5",
        lambda args: {"compute_loss": trl_cispo_loss, "compute_advantages": over_batch_std},
        f"{TRL_GRPO}, epsilon_high=5, scale_rewards=batch"),
    "verl-cispo": Dialect(
        "cispo.py", "", lambda args: group_std(1e-6) | {"compute_loss": verl_cispo_loss}, VERL),

    "verl-remax": Dialect(
        "remax.py", "", lambda args: {"compute_advantages": remax_tokens},
        f"{VERL}; on policy only, its ratio and clip are left out here"),

    "trl-ppo": Dialect(
        "ppo.py", "--lam 0.95", lambda args: of_tokens(verl_whitened),
        "TRL 1.12.0, the last with it, trl/experimental/ppo/ppo_trainer.py"),
    "verl-ppo": Dialect(
        "ppo.py", "--lam 1", lambda args: of_tokens(verl_whitened) | {"compute_loss": verl_loss},
        VERL),
    "openrlhf-ppo": Dialect(
        "ppo.py", "--lam 1", lambda args: of_tokens(openrlhf_whitened), OPENRLHF),

    "paper-opo": Dialect(*RLOO, lambda args: opo(args.k, False), "arXiv:2505.23585"),
    "paper-opo-leave-one-out": Dialect(
        *RLOO, lambda args: opo(args.k, True), "the same, its baseline without the sample itself"),
    "verl-opo": Dialect(
        *RLOO, lambda args: verl(lambda rewards, mask: opo(args.k, False)["compute_advantages"](
            rewards, mask, None)), VERL),
}


def main():
    for name, dialect in DIALECTS.items():
        print(f"{name:<32}{dialect.script} {dialect.flags}\n{'':<32}{dialect.source}")


if __name__ == "__main__":
    main()
