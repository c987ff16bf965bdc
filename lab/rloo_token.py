"""RLOO with tokens as actions: a copy of rloo.py, and docs/lab.md's example of your own algorithm.

Ahmadian et al. 2024 (arXiv:2402.14740) leave it open in section 7: leave-one-out with intermediate
rewards. Here these are the KL of each token. A token is credited with its reward to go, and the
baseline is what the other k - 1 responses to the prompt still get from the same position on:

    gradient = 1/k sum_i sum_t A_it grad log pi(y_it | x, y_i,<t)
    A_it     = G_it - 1/(k-1) sum_{j != i} G_j,min(t, last_j)
    G_it     = sum_{s >= t} r_is
    r_t      = -beta log( pi(y_t|..) / pi_ref(y_t|..) ), and r(x, y) on the last token

    python -m lab.rloo_token --k 4

A response that has ended counts with the return of its last token, which is mostly its score. With
0 instead, the baseline would fall when others end. Since the others do not depend on y_i, both are
unbiased.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, no_grad_logprobs, rollout, rollout_metrics,
                        score, token_kl, token_logprobs, token_rewards)
    from plumbing import (Count, CountOrZero, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, require, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; run this in the project's folder, as python -m "
                     "lab.rloo_token, and install requirements.txt")


def compute_advantages(rewards, response_mask, k):
    """A_it = G_it - mean of the other k - 1 returns from t, or from a response's last token.

    Args: rewards (N, T), 0 where masked, N = B * k, prompt-major (row = prompt * k + sample);
    response_mask (N, T); k >= 2.
    Returns: advantages (N, T), 0 where masked.
    """
    returns = rewards.flip(1).cumsum(1).flip(1)  # (N, T), 0 where masked
    last = returns.gather(1, response_mask.sum(1, keepdim=True) - 1)  # (N, 1)
    groups = torch.where(response_mask, returns, last).view(-1, k, rewards.shape[1])  # (B, k, T)
    baseline = (groups.sum(1, keepdim=True) - groups) / (k - 1)  # (B, k, T)
    return (returns - baseline.flatten(0, 1)) * response_mask


def compute_loss(logprobs, advantages):
    """- sum_t A_t log pi(y_t | x, y_<t). A sum: the caller divides by the number of rows.

    Args: logprobs (n, T) and advantages (n, T), both 0 where masked. Returns: scalar.
    """
    return -(advantages * logprobs).sum()


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
    """optimizer steps, each on a fresh rollout"""
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
        rewards = token_rewards(scores, kl, args.beta, batch.response_mask)  # (N, T)

        # 4. advantages: how much better each token's reward to go is than that of the others
        advantages = compute_advantages(rewards, batch.response_mask, args.k)  # (N, T)

        # 5. update: one optimizer step on the whole batch, in micro-batches
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(policy, args.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
            part = compute_loss(logprobs, advantages[rows]) / len(batch)
            part.backward()
            loss += part.item()
        loss = sum_over_ranks(loss)
        sum_gradients(policy)  # over all processes
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(examples, scores=scores, kl=kl, loss=loss, grad_norm=grad_norm)
        optimizer.step()

        # 6. log, evaluate, save
        metrics = rollout_metrics(batch, parts, scores, kl, rewards, args.k) | {
            "policy/loss": loss, "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_norm > args.max_grad_norm,
            "policy/lr": scheduler.get_last_lr()[0],
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
