"""MaxRL, maximum likelihood reinforcement learning (2026, arXiv:2602.02710, algorithm 1).

Rewards are 0 or 1, and p is the probability that a response to the prompt x gets a 1. RLOO climbs
p. MaxRL climbs log p, as maximum likelihood would, as far as k responses can see it:

    A_i = ( r_i - mean(r_1 ... r_k) ) / mean(r_1 ... r_k), or 0 if all are 0
    gradient = 1/k sum_i [ A_i - beta log( pi(y_i|x) / pi_ref(y_i|x) ) ] grad log pi(y_i | x)

Without the KL its expectation is exactly

    grad p * sum_{j=1}^{k-1} (1 - p)^{j-1}   =   grad p * ( 1 - (1 - p)^(k-1) ) / p

The sum for j = 1, 2, ... is 1 / p, so this is grad log p cut off after k - 1 terms. A prompt that
is hardly ever solved counts up to k - 1 times as much as in rloo.py, one that is nearly always
solved counts the same.

    python maxrl.py --k 8

What differs from rloo.py: advantages are divided by the prompt's mean, so scores have to be 0 or 1,
and the default task is tasks/mini_math.py. The KL is not part of the reward, where it would be
divided too, but a term of its own, without a baseline; by default there is none. At k = 2 the sum
has a single term, and MaxRL without a KL is rloo.py, number for number: both have A = 1 and -1, or
0. From k = 3 on they differ at the first step.

Implementation details, and what others do:
- The mean includes the response itself. That is not a bias here: it is what ends the sum at k - 1.
- If all responses of a prompt fail, it has no gradient, as in rloo.py; the same if all succeed.
- grpo.py divides by the std, which is smallest at both ends: it favours solved prompts as much as
  hard ones. For a large k it climbs 2 arcsin sqrt(p) (arXiv:2510.13651).
- A response without EOS counts as what the reward says of it; there is no further penalty.

What to watch: objective/scores, which is the mean of p; objective/frac_reward_zero_std, the share
of prompts with no signal; and pass@k, which evaluate.py prints.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, no_grad_logprobs, rollout, rollout_metrics,
                        score, sequence_rewards, token_kl, token_logprobs)
    from plumbing import (Count, CountOrZero, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, require, require_binary,
                          setup, sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_advantages(rewards, k):
    """A_i = (r_i - mean) / mean, with the mean over the prompt's k rewards; 0 if all are 0.

    Args: rewards (N,) of 0 and 1, N = B * k, prompt-major (row = prompt * k + sample); k >= 2.
    Returns: advantages (N,), which sum to 0 for each prompt.
    """
    rewards = rewards.view(-1, k)  # (B, k)
    mean = rewards.mean(1, keepdim=True)  # (B, 1)
    return ((rewards - mean) / mean.clamp(min=1 / k)).flatten()  # 1 / k is the least mean but 0


def compute_loss(logprobs, advantages):
    """- sum_i A_i log pi(y_i | x). A sum: the caller divides by the number of rows.

    Args: logprobs (n, T), 0 where masked; advantages (n,). Returns: scalar.
    """
    return -(advantages * logprobs.sum(1)).sum()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    k: Count = 4
    """responses per prompt, at least 2"""
    beta: NotNegative = 0.0
    """weight of the KL penalty; 0 disables it"""
    temperature: Positive = 1.0
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
    max_new_tokens: Count = 5
    """maximum response length in tokens"""
    missing_eos_penalty: NotNegative = 0.0
    """subtracted from the score of a response without EOS"""
    model: str = "tasks/mini_math-sft"
    """initial policy: hub name, folder, or path/to/file.py:function"""
    reference: str | None = None
    """reference policy for the KL; default: a frozen copy of --model"""
    reward: tuple[str, ...] = ("tasks/mini_math.py:accuracy",)
    """reward to maximize: one-label classifier (hub name or folder) or path/to/file.py:function;
    several are summed"""
    dataset: str = "tasks/mini_math.py:prompts"
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
    tried = dry_run(policy, tokenizer, [train, test], reward_fns, args, reference)
    require_binary(tried["score"], args)
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
        require_binary(scores, args)

        # 3. shape: the KL to the reference is subtracted from the advantages, not divided by them
        ref_logprobs = no_grad_logprobs(reference, batch, args.temperature,
                                        args.microbatch_tokens)  # (N, T)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        rewards = sequence_rewards(scores, kl, args.beta)  # (N,), only logged

        # 4. advantages: how much better each response is than the others for the same prompt
        advantages = compute_advantages(scores, args.k) - args.beta * kl.sum(1)  # (N,)

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
