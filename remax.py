"""ReMax (Li et al. 2023, arXiv:2310.10505, algorithm 1): the greedy response's reward as baseline.

    gradient = sum_t [ r(x, y) - beta sum_{i >= t} kl_i - r(x, y_greedy) ] grad log pi(y_t | x,y_<t)
    kl_i     = log( pi(y_i | x, y_<i) / pi_ref(y_i | x, y_<i) )

    python remax.py

What differs from rloo.py: one response per prompt is enough, because the baseline is the score of
the policy's greedy response to the same prompt. That takes a second rollout, which counts towards
time/samples and time/seconds. The KL is a token-level reward: each token is charged only for the KL
from its own position on, since it cannot change the KL before it. Both keep the gradient unbiased:
the greedy response does not depend on the sample.

Where published code differs: the official code overwrites the cumulative KL instead of adding to
it, samples with top-p 0.9 but scores under the full softmax, clips r - r_greedy to +-5, and
averages over the tokens in the batch. Here the KL accumulates, sampling and scoring use the same
distribution, nothing is clipped, and a response's tokens are summed.

What to watch: objective/baseline, the greedy response's score. If it stays above objective/scores
for long, most samples are pushed down, which costs diversity (objective/entropy).
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, no_grad_logprobs, rollout, rollout_metrics,
                        score, token_kl, token_logprobs, token_rewards)
    from plumbing import (Count, CountOrZero, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, setup, sum_gradients,
                          sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_advantages(rewards, baseline, response_mask):
    """A_t = sum of the rewards from token t on, minus the greedy response's score.

    Args: rewards (N, T), 0 where masked; baseline (N,), the score of the greedy response to the
    same prompt, without KL; response_mask (N, T). Returns: advantages (N, T), 0 where masked.
    """
    returns = rewards.flip(1).cumsum(1).flip(1)  # (N, T), KL-to-go and score
    return (returns - baseline.unsqueeze(1)) * response_mask


def compute_loss(logprobs, advantages):
    """- sum_t A_t log pi(y_t | x, y_<t). A sum: the caller divides by the number of rows.

    Args: logprobs (n, T) and advantages (n, T), both 0 where masked. Returns: scalar.
    """
    return -(advantages * logprobs).sum()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    k: Count = 1
    """sampled responses per prompt, in addition to the greedy one"""
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
    prompts_per_step: Count = 32
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

        # 4. advantages: how much better each response is than the greedy one
        greedy = rollout(policy, tokenizer, examples["prompt_ids"], 1, args.temperature,
                         args.max_new_tokens, args.rollout_batch_size, greedy=True)  # B rows
        greedy_scores = (score(reward_fns, tokenizer, greedy, examples)["score"]
                         - args.missing_eos_penalty * ~greedy.ended)  # (B,)
        baseline = greedy_scores.repeat_interleave(args.k)  # (N,)
        advantages = compute_advantages(rewards, baseline, batch.response_mask)  # (N, T)

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
            "objective/baseline": baseline.mean(),
            "policy/loss": loss, "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_norm > args.max_grad_norm,
            "policy/lr": scheduler.get_last_lr()[0],
        }
        run.log(metrics, samples=len(batch) + len(greedy), tokens=batch.response_mask.sum())
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
