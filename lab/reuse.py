"""RLOO with several optimizer steps per rollout: a copy of rloo.py, for what a ratio is worth.

From the second step on, the policy is no longer the one that sampled. --ratio says what to do about
it, with the same advantages, KL and loss for all four, so that nothing else differs:

    none      A_i sum_t grad log pi_t                           as if nothing had happened
    token     A_i sum_t w_t grad log pi_t                       w_t = pi / pi_old of the token
    clip      as token, but 0 where w_t has left 1 +- --clip in the direction of A_i   (PPO's clip)
    sequence  A_i (prod_t w_t) sum_t grad log pi_t              unbiased without a KL

    python -m lab.reuse --k 4 --minibatches 16 --ratio none

The KL that is part of the rewards is the sampler's, and stays as it was at the rollout;
lab/importance.py takes that of the policy, and is unbiased with a KL too.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, minibatches, no_grad_logprobs, rollout,
                        rollout_metrics, score, sequence_rewards, token_kl, token_logprobs)
    from plumbing import (Count, CountOrZero, Limit, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, require, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; run this in the project's folder, as python -m "
                     "lab.reuse, and install requirements.txt")


def compute_advantages(rewards, k):
    """A_i = R_i - mean of the other k - 1 rewards for the same prompt.

    Args: rewards (N,), N = B * k, prompt-major (row = prompt * k + sample); k >= 2.
    Returns: advantages (N,), which sum to 0 for each prompt.
    """
    rewards = rewards.view(-1, k)  # (B, k)
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)  # (B, k)
    return (rewards - baseline).flatten()


def compute_loss(logprobs, old_logprobs, advantages, response_mask, kind, clip):
    """- sum_i A_i sum_t w_t log pi_t, with the weights w of --ratio. A sum: the caller divides.

    Args: logprobs, old_logprobs (n, T), 0 where masked; advantages (n,); response_mask (n, T);
    kind (a value of --ratio); clip. Returns: scalar.
    """
    advantages = advantages[:, None]  # (n, 1)
    log_ratio = logprobs.detach() - old_logprobs  # (n, T)
    if kind == "none":
        weights = torch.ones_like(log_ratio)  # (n, T)
    elif kind == "sequence":
        weights = log_ratio.sum(1, keepdim=True).exp()  # (n, 1)
    else:
        weights = log_ratio.exp()  # (n, T)
    if kind == "clip":
        outside = torch.where(advantages > 0, weights > 1 + clip, weights < 1 - clip)  # (n, T)
        weights = weights.masked_fill(outside, 0.0)
    return -(advantages * weights * logprobs * response_mask).sum()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    k: Count = 4
    """responses per prompt, at least 2"""
    beta: NotNegative = 0.05
    """weight of the KL penalty in the reward; 0 disables it"""
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
    minibatches: Count = 4
    """optimizer steps per epoch, each on an equal share of the rollout's responses"""
    ratio: Literal["none", "token", "clip", "sequence"] = "none"
    """what weights the gradient of a response, or of a token, that another policy has sampled"""
    clip: Limit = 0.2
    """range of the ratio with --ratio clip"""
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
    require(args.k >= 2, f"--k {args.k}: the baseline is the mean of the other k - 1 responses; "
                         "use at least 2")
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

        # 3. shape: the KL to the reference becomes part of the reward
        ref_logprobs = no_grad_logprobs(reference, batch, args.temperature,
                                        args.microbatch_tokens)  # (N, T)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        rewards = sequence_rewards(scores, kl, args.beta)  # (N,)

        # 4. advantages: how much better each response is than the others for the same prompt
        advantages = compute_advantages(rewards, args.k)  # (N,)

        # 5. update: several optimizer steps, each on a mini-batch, in micro-batches
        grad_clipped = 0
        for minibatch in minibatches(len(batch), args.epochs, args.minibatches):  # row numbers
            loss = 0.0
            optimizer.zero_grad()
            for rows in microbatches(policy, args.microbatch_tokens, batch, rows=minibatch):
                logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
                part = compute_loss(logprobs, batch.old_logprobs[rows], advantages[rows],
                                    batch.response_mask[rows], args.ratio, args.clip)
                (part / len(minibatch)).backward()
                loss += part.item() / len(minibatch)
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
