"""REINFORCE++-baseline, the later variant of REINFORCE++ (Hu et al. 2025, arXiv:2501.03262).

    A_t  = r - mean(r_1 ... r_k), the same for all tokens, then whitened over all of the batch's
    loss = sum_t [ - min( ratio_t A_t, clip(ratio_t, 1 +- clip) A_t ) + beta k2_t ]
    k2_t = 1/2 ( log pi(y_t) - log pi_ref(y_t) )^2

    python reinforce_pp_baseline.py

What differs from reinforce_pp.py: the baseline is the mean of the prompt's k scores, and the KL is
a term of the loss (k2), not part of the reward.

This has two biases. The prompt's mean includes the response itself, which scales the gradient by (k
- 1) / k. And k2 in the loss lacks the KL-to-go (the fact that a token leads to prefixes with more
or less KL), so the optimum of E[r] - beta KL is not a fixed point. Whitening adds its own, as in
reinforce_pp.py. tests/test_exact.py has the numbers.

Because the advantages are divided by their std, beta is relative to a reward of size 1, whatever
the reward's scale.

What to watch: policy/clipfrac (a few percent at most); objective/frac_reward_zero_std;
objective/kl.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, minibatches, no_grad_logprobs, rollout,
                        rollout_metrics, score, token_kl, token_logprobs, token_rewards)
    from plumbing import (Count, CountOrZero, Limit, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, require, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def center_scores(scores, k):
    """r - mean of the prompt's k scores. Args: scores (N,), prompt-major; k. Returns: (N,)."""
    groups = scores.view(-1, k)  # (B, k)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def compute_advantages(rewards, response_mask, whiten=True):
    """A_t = sum of the rewards from token t on, whitened over all tokens in the batch.

    Args: rewards (N, T), 0 where masked; response_mask (N, T); whiten (False: return the returns
    unchanged).
    Returns: advantages (N, T), 0 where masked.
    """
    returns = rewards.flip(1).cumsum(1).flip(1) * response_mask  # (N, T), KL-to-go and score
    if not whiten:
        return returns
    tokens = returns[response_mask]  # all real tokens
    std = tokens.var(correction=0).clamp(min=1e-8).sqrt()
    return (returns - tokens.mean()) / std * response_mask


def compute_loss(logprobs, old_logprobs, advantages, clip):
    """- sum_t min( ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t ),  ratio_t = pi(y_t) /
    pi_old(y_t).

    A sum: the caller divides by the number of rows in the whole mini-batch.

    Args: logprobs, old_logprobs and advantages (n, T), 0 where masked; clip (inf: no clipping).
    Returns: scalar, and the number of clipped tokens.
    """
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (n, T)
    return -torch.min(free, bounded).sum(), (bounded < free).sum()


def compute_kl_loss(logprobs, ref_logprobs):
    """sum_t k2_t = 1/2 ( log pi - log pi_ref )^2. Args: logprobs, ref_logprobs (n, T), 0 where
    masked."""
    return (logprobs - ref_logprobs).square().sum() / 2


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    whiten: bool = True
    """normalize the advantages over all tokens in the batch"""
    k: Count = 4
    """responses per prompt, at least 2"""
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
    minibatches: Count = 2
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
        rewards = token_rewards(center_scores(scores, args.k), kl, 0.0,
                                batch.response_mask)  # (N, T)

        # 4. advantages: each token's reward-to-go, compared with all tokens in the batch
        advantages = compute_advantages(rewards, batch.response_mask, args.whiten)  # (N, T)

        # 5. update: several optimizer steps, each on a mini-batch, in micro-batches
        clipped = grad_clipped = 0
        for minibatch in minibatches(len(batch), args.epochs, args.minibatches):  # row numbers
            loss = 0.0
            optimizer.zero_grad()
            for rows in microbatches(policy, args.microbatch_tokens, batch, rows=minibatch):
                logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
                part, outside = compute_loss(logprobs, batch.old_logprobs[rows], advantages[rows],
                                             args.clip)
                part = part + args.beta * compute_kl_loss(logprobs, ref_logprobs[rows])
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
