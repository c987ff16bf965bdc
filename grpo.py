"""GRPO, group relative policy optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300,
equations 3 and 4).

    A_i  = ( r_i - mean(r_1 ... r_k) ) / std(r_1 ... r_k)
    loss = - 1/k sum_i 1/|y_i| sum_t [ min( ratio A_i, clip(ratio, 1 +- clip) A_i ) - beta k3_t ]
    k3_t = pi_ref / pi - log( pi_ref / pi ) - 1

    python grpo.py
    python grpo.py --no-scale-std --no-length-mean      # mean-centred: "Dr. GRPO", Liu et al. 2025

What differs from rloo.py: the baseline is the group mean, which includes the response itself and so
scales the gradient by (k - 1) / k; advantages are divided by the group's std; a response's tokens
are averaged, not summed; the ratio to the sampling policy is clipped per token, so a rollout can be
used for several steps; and the KL is a term of the loss (k3), not part of the reward.

All of these except the ratio change the expected gradient, not just its variance. Dividing by the
std gives more weight to prompts whose responses have similar rewards; averaging over the length
favours short good and long bad responses. Token by token, with the prefix held fixed, the gradient
of k3 in the loss is that of the opposite KL(pi_ref || pi). It lacks the KL-to-go: the fact that a
token leads to prefixes with more or less KL. So it is not the gradient of either KL over whole
sequences, and the optimum of E[r] - beta KL is not a fixed point. tests/test_exact.py has the
numbers.

Where published code differs: implementations divide by std + 1e-4 (as here) or std + 1e-8. The
official Dr. GRPO code has no KL (--beta 0) and divides by a constant, the maximum length, which
here is absorbed into the learning rate. Where TRL has a KL (its beta is 0 by default), it
multiplies k3 by the ratio, with a gradient through it, by default since version 1.10 (equation 7 of
DeepSeek-V3.2, arXiv:2512.02556). Token by token, that is the gradient of KL(pi || pi_ref); it lacks
the KL-to-go all the same (lab/kl.py).

Because the advantages are divided by the std, beta is relative to a reward of size 1, whatever the
reward's scale. At rloo.py's 0.05 the policy strays far from the reference on mini TL;DR (KL 69,
gold 1.05), hence the larger default.

What to watch: objective/frac_reward_zero_std, the share of prompts with no signal; objective/kl;
rollout/length.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, minibatches, no_grad_logprobs, rollout,
                        rollout_metrics, score, token_kl, token_logprobs)
    from plumbing import (Count, CountOrZero, Limit, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, require, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_advantages(rewards, k, scale_std=True):
    """A_i = (r_i - mean) / (std + 1e-4), with mean and std (k - 1 in the denominator) over the
    prompt's k rewards.

    Args: rewards (N,), N = B * k, prompt-major; k >= 2; scale_std (False: do not divide by the
    std).
    Returns: advantages (N,).
    """
    rewards = rewards.view(-1, k)  # (B, k)
    advantages = rewards - rewards.mean(1, keepdim=True)  # (B, k)
    if scale_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def compute_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip, beta,
                 length_mean=True):
    """sum_i 1/|y_i| sum_t [ - min( ratio_t A_i, clip(ratio_t, 1 - clip, 1 + clip) A_i ) + beta k3_t
    ].

    A sum: the caller divides by the number of rows in the whole mini-batch.

    Args: logprobs, old_logprobs, ref_logprobs (n, T), 0 where masked; advantages (n,);
    response_mask (n, T); clip (inf: no clipping); beta; length_mean (False: sum over tokens).
    Returns: scalar, and the number of clipped tokens.
    """
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    advantages = advantages.unsqueeze(1) * response_mask  # (n, T)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (n, T)
    log_ratio = ref_logprobs - logprobs  # (n, T)
    k3 = log_ratio.exp() - log_ratio - 1  # (n, T), 0 where masked
    losses = beta * k3 - torch.min(free, bounded)  # (n, T)
    lengths = response_mask.sum(1, keepdim=True) if length_mean else 1  # (n, 1)
    return (losses / lengths).sum(), (bounded < free).sum()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    k: Count = 4
    """responses per prompt, at least 2"""
    scale_std: bool = True
    """divide the advantages by the std of the prompt's rewards"""
    length_mean: bool = True
    """average the loss over a response's tokens instead of summing it"""
    beta: NotNegative = 0.3
    """weight of the KL penalty in the loss, relative to advantages of size 1; 0 disables it"""
    temperature: Positive = 0.7
    """sampling temperature; all log-probs are under softmax(logits / temperature)"""
    lr: Positive = 1e-3
    """Adam's peak learning rate (for a pretrained model of billions of parameters: 1e-6 to 3e-6)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """learning-rate schedule after the warm-up"""
    warmup_updates: CountOrZero = 0
    """linear warm-up updates"""
    max_grad_norm: Positive = 1.0
    """maximum gradient norm; policy/grad_clipped logs how often gradients are clipped"""
    num_updates: Count = 80
    """rollouts, each used for epochs * minibatches optimizer steps"""
    epochs: Count = 1
    """passes over each rollout"""
    minibatches: Count = 1
    """optimizer steps per epoch, each on an equal share of the rollout's responses"""
    clip: Limit = 0.2
    """PPO clip range of the ratio pi / pi_old; "inf" disables clipping"""
    prompts_per_step: Count = 16
    """prompts per rollout, with k responses each"""
    max_new_tokens: Count = 32
    """maximum response length in tokens"""
    missing_eos_penalty: NotNegative = 1.0
    """subtracted from the score of a response without EOS"""
    model: str = "tasks/mini_tldr-sft"
    """initial policy: hub name, folder, or path/to/file.py:function"""
    reference: str | None = None
    """reference policy for the KL; default: a frozen copy of --model"""
    reward: tuple[str, ...] = ("tasks/mini_tldr-reward",)
    """reward to maximize: one-label classifier (hub name or folder) or path/to/file.py:function;
    several are summed"""
    dataset: str = "tasks/mini_tldr.py:prompts"
    """prompts, and reference responses (completion) for the win rate: hub name, path, or
    path/to/file.py:function"""
    seed: Seed = 1
    """random seed for prompt order and sampling"""


def main(args):
    require(args.k >= 2, f"--k {args.k}: the baseline is the mean of the k responses; use at "
                         "least 2")
    responses = args.prompts_per_step * args.k
    require(args.minibatches <= responses, f"--minibatches {args.minibatches}: a rollout has only "
                                           f"{responses} responses to divide")
    device = setup(args)
    tokenizer = load_tokenizer(args.model)
    policy = load_policy(args, device)
    reference = load_reference(args, tokenizer, device, policy)
    reward_fns = load_rewards(args, device, args.reward_noise)  # maximized, or only logged
    train = load_rows(args, args.train_split, tokenizer)
    test = load_rows(args, args.test_split, tokenizer, first=args.eval_prompts)
    dry_run(policy, tokenizer, [train, test], reward_fns, args, reference)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)

    run = Run(__file__, args, tokenizer, policy=(policy, optimizer, scheduler))
    if run.step == 0:
        run.log_evaluation(evaluate(policy, reference, tokenizer, reward_fns, test, args))
    for examples in run.updates(train, args.prompts_per_step):
        # 1. rollout: k responses per prompt, with the sampler's own log-probs
        batch = rollout(policy, tokenizer, examples["prompt_ids"], args.k, args.temperature,
                        args.max_new_tokens, args.rollout_batch_size)  # N rows

        # 2. score: one number per response
        parts = score(reward_fns, tokenizer, batch, examples)  # name -> (N,): the score, its parts
        scores = parts["score"] - args.missing_eos_penalty * ~batch.ended  # (N,)

        # 3. shape: the KL to the reference is part of the loss, not of the reward
        ref_logprobs = no_grad_logprobs(reference, batch, args.temperature,
                                        args.microbatch_tokens)  # (N, T)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        rewards = scores  # (N,)

        # 4. advantages: how much better each response is than the others for the same prompt
        advantages = compute_advantages(rewards, args.k, args.scale_std)  # (N,)

        # 5. update: several optimizer steps, each on a mini-batch, in micro-batches
        clipped = grad_clipped = 0
        for minibatch in minibatches(len(batch), args.epochs, args.minibatches):  # row numbers
            loss = 0.0
            optimizer.zero_grad()
            for rows in microbatches(policy, args.microbatch_tokens, batch, rows=minibatch):
                logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
                part, outside = compute_loss(logprobs, batch.old_logprobs[rows], ref_logprobs[rows],
                                             advantages[rows], batch.response_mask[rows], args.clip,
                                             args.beta, args.length_mean)
                (part / len(minibatch)).backward()
                loss += part.item() / len(minibatch)
                clipped += outside.item()
            loss = sum_over_ranks(loss)
            sum_gradients(policy)  # over all processes
            grad_norm = clip_gradients(policy, args.max_grad_norm)
            run.check_finite(examples, scores=scores, kl=kl, loss=loss, grad_norm=grad_norm)
            optimizer.step()
            grad_clipped += (grad_norm > args.max_grad_norm) / (args.epochs * args.minibatches)

        # 6. log, evaluate, save
        metrics = rollout_metrics(batch, parts, scores, kl, rewards, args.k) | {
            "policy/loss": loss, "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_clipped, "policy/lr": scheduler.get_last_lr()[0],
            "policy/clipfrac": sum_over_ranks(clipped) / (args.epochs * batch.response_mask.sum()),
        }
        run.log(metrics, samples=len(batch), tokens=batch.response_mask.sum())
        scheduler.step()
        if run.evaluation_is_due():
            run.log_evaluation(evaluate(policy, reference, tokenizer, reward_fns, test, args))
            run.log_samples(examples, batch, scores, kl, advantages)
            run.save_model(policy)
        run.checkpoint()  # if due; also exits after Ctrl-C or SIGTERM

    run.finish(test)
    return policy


if __name__ == "__main__":
    main(parse(Args))
    leave()
