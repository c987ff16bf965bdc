"""RLOO, REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740).

For each prompt x, sample k responses y_1 ... y_k from the policy, score them, and push the
log-probability of each up or down by how much better it is than the mean of the others:

    gradient = 1/k sum_i [ R(y_i, x) - 1/(k-1) sum_{j != i} R(y_j, x) ] grad log pi(y_i | x)
    R(y, x)  = r(x, y) - beta log( pi(y|x) / pi_ref(y|x) )                  (sections 2.3 and 2)

The whole response is one action: log pi(y|x) is the sum over its tokens. The mean of the other
samples does not depend on y_i, so it changes the variance of the gradient but not its expectation.
Each rollout is used for a single on-policy optimizer step, so there is no ratio pi/pi_old and
nothing to clip.

    python rloo.py --k 4

Implementation details, and what others do:
- The KL term is part of R, so it enters the baseline too (as in the paper and TRL; OpenRLHF leaves
  it out of the baseline; both are unbiased).
- Log-probs are summed over the response, not averaged: dividing by the length would bias the
  gradient.
- One optimizer step per rollout. TRL's RLOO can take several, and then clips the sequence-level
  ratio.
- The value of the loss means nothing; only its gradient matters. Watch objective/scores and
  objective/kl.
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
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


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
        rewards = sequence_rewards(scores, kl, args.beta)  # (N,)

        # 4. advantages: how much better each response is than the others for the same prompt
        advantages = compute_advantages(rewards, args.k)  # (N,)

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
