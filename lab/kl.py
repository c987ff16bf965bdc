"""Where the KL goes: into the reward or the loss, and as which estimate of it. A copy of
lab/importance.py, in which nothing but the KL can have a bias.

    k1 = log pi - log pi_ref      k2 = 1/2 k1^2      k3 = pi_ref / pi - 1 + k1      (of a token)

    --kl reward-k1        R = r - beta sum_t k1_t: this is lab/importance.py, on policy rloo.py
    --kl reward-k3        R = r - beta sum_t k3_t
    --kl loss-k2          R = r; beta sum_t k2_t is added to the loss (reinforce_pp_baseline.py)
    --kl loss-k3          R = r; beta sum_t k3_t is added to the loss (grpo.py)
    --kl loss-ratio-k3    R = r; beta sum_t pi / pi_old k3_t, where the ratio has a gradient too
                          (DeepSeek-V3.2, arXiv:2512.02556, equation 7)
    --kl loss-whole-k2    R = r; beta 1/2 (sum_t k1_t)^2, with the response as a single action

    python -m lab.kl --kl loss-k3 --k 4
    python -m lab.gradient "lab/kl.py --kl loss-k3" "lab/kl.py --kl loss-ratio-k3"

k1, k3 and ratio k3 have the same mean, and different gradients. On policy, that of the mean of
sum_t k2_t and of sum_t ratio_t k3_t is sum_t k1_t grad log pi(y_t): for each token the gradient of
KL(pi || pi_ref) of the next token, with the prefix held fixed. What is missing is the KL-to-go, the
KL at the tokens that it leads to. With k3 it is sum_t (1 - pi_ref / pi) grad log pi(y_t), that of
the opposite KL(pi_ref || pi). docs/algorithms.md has the numbers.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, no_grad_logprobs, rollout, rollout_metrics,
                        score, sequence_rewards, token_kl, token_logprobs)
    from plumbing import (Count, CountOrZero, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, require, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; run this in the project's folder, as python -m lab.kl, "
                     "and install requirements.txt")


def compute_advantages(rewards, k):
    """A_i = R_i - mean of the other k - 1 rewards for the same prompt.

    Args: rewards (N,), N = B * k, prompt-major (row = prompt * k + sample); k >= 2.
    Returns: advantages (N,), which sum to 0 for each prompt.
    """
    rewards = rewards.view(-1, k)  # (B, k)
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)  # (B, k)
    return (rewards - baseline).flatten()


def compute_loss(logprobs, advantages):
    """- sum_i A_i log pi(y_i | x). A sum: the caller divides by the number of rows.

    Args: logprobs (n, T), 0 where masked; advantages (n,). Returns: scalar.
    """
    return -(advantages * logprobs.sum(1)).sum()


def k3(logprobs, ref_logprobs):
    """pi_ref / pi - 1 - log(pi_ref / pi). Args: both (n, T), 0 where masked. Returns: (n, T)."""
    log_ratio = ref_logprobs - logprobs  # (n, T)
    return log_ratio.exp() - 1 - log_ratio


def compute_kl_loss(logprobs, old_logprobs, ref_logprobs, kl):
    """The sum over rows and tokens of the estimate that --kl names; 0 if it is in the reward.

    Args: logprobs, old_logprobs, ref_logprobs (n, T), 0 where masked; kl (see Args). Returns:
    scalar.
    """
    k1 = logprobs - ref_logprobs  # (n, T)
    if kl == "loss-k2":
        return k1.square().sum() / 2
    if kl == "loss-k3":
        return k3(logprobs, ref_logprobs).sum()
    if kl == "loss-ratio-k3":
        return ((logprobs - old_logprobs).exp() * k3(logprobs, ref_logprobs)).sum()
    if kl == "loss-whole-k2":
        return k1.sum(1).square().sum() / 2
    return logprobs.new_zeros(())


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    kl: Literal["reward-k1", "reward-k3", "loss-k2", "loss-k3", "loss-ratio-k3",
                "loss-whole-k2"] = "reward-k1"
    """where the KL goes, and which estimate of it"""
    k: Count = 4
    """responses per prompt, at least 2"""
    beta: NotNegative = 0.05
    """weight of the KL penalty, in the reward or the loss; 0 disables it"""
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

        # 3. shape: the KL of the policy, not of the sampler, in the reward if it goes there
        ref_logprobs = no_grad_logprobs(reference, batch, args.temperature,
                                        args.microbatch_tokens)  # (N, T)
        logprobs = no_grad_logprobs(policy, batch, args.temperature,
                                    args.microbatch_tokens)  # (N, T)
        kl = token_kl(logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        penalty = k3(logprobs, ref_logprobs) if args.kl == "reward-k3" else kl  # (N, T)
        beta = args.beta if args.kl.startswith("reward") else 0.0
        rewards = sequence_rewards(scores, penalty, beta)  # (N,)

        # 4. advantages: how much better each response is than the others, times its weight
        weights = (logprobs - batch.old_logprobs).sum(1).exp()  # (N,)
        advantages = weights * compute_advantages(rewards, args.k)  # (N,)

        # 5. update: one optimizer step on the whole batch, in micro-batches
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(policy, args.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
            part = compute_loss(logprobs, advantages[rows])
            part = part + args.beta * compute_kl_loss(logprobs, batch.old_logprobs[rows],
                                                      ref_logprobs[rows], args.kl)
            (part / len(batch)).backward()
            loss += part.item() / len(batch)
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
