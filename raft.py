"""RAFT, reward-ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767; Ahmadian et al. 2024,
section 2.4).

    best = argmax_i R(y_i, x) over the k responses of a prompt
    loss = - log pi(y_best | x), per token

    python raft.py
    python raft.py --rank-by score

What differs from rloo.py: only the best of the k responses is used, as if it were a demonstration.
There is no negative signal, and only the rank of a response matters, not its margin. This does not
estimate the policy gradient of E[R]. --rank-by reward ranks by the KL-shaped R, --rank-by score by
r alone (the KL is then only logged).

Where published code differs: the papers and TRL's SFT compute the cross-entropy at temperature 1.
Here the logits are divided by --temperature, as in sampling, so that the policy being trained is
the one being sampled.

Ahmadian et al. find it more sensitive than RLOO to noise in the reward and to a strong KL penalty,
since both change which response is best.

What to watch: objective/best_score, the mean score of the selected responses; its gap to
objective/scores is what the policy can still learn from.
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


def select_best(rewards, k):
    """The row number of each prompt's best response. Args: rewards (N,), prompt-major; k. Returns:
    rows (B,)."""
    best = rewards.view(-1, k).argmax(1)  # (B,)
    return torch.arange(len(best), device=best.device) * k + best


def compute_loss(logprobs):
    """Negative log-likelihood. A sum: the caller divides by the number of response tokens.

    Args: logprobs (n, T), 0 where masked. Returns: scalar.
    """
    return -logprobs.sum()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    k: Count = 4
    """responses per prompt, at least 2"""
    rank_by: Literal["reward", "score"] = "reward"
    """rank responses by the KL-shaped reward R, or by the score r"""
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
    require(args.k >= 2, f"--k {args.k}: the best of the k responses is kept; use at least 2")
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

        # 4. instead of advantages: the best response to each prompt
        best = select_best(rewards if args.rank_by == "reward" else scores, args.k)  # (B,)
        num_tokens = batch.response_mask[best].sum()

        # 5. update: one optimizer step on the best responses, in micro-batches
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(policy, args.microbatch_tokens, batch[best]):
            logprobs = token_logprobs(policy, batch[best[rows]], args.temperature)  # (n, T)
            part = compute_loss(logprobs) / num_tokens
            part.backward()
            loss += part.item()
        loss = sum_over_ranks(loss)
        sum_gradients(policy)  # over all processes
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(examples, scores=scores, kl=kl, loss=loss, grad_norm=grad_norm)
        optimizer.step()

        # 6. log, evaluate, save
        metrics = rollout_metrics(batch, parts, scores, kl, rewards, args.k) | {
            "objective/best_score": scores[best].mean(),
            "policy/loss": loss, "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_norm > args.max_grad_norm,
            "policy/lr": scheduler.get_last_lr()[0],
        }
        run.log(metrics, samples=len(batch), tokens=batch.response_mask.sum())
        scheduler.step()
        if run.evaluation_is_due():
            run.log_evaluation(evaluate(policy, reference, tokenizer, reward_fns, test, args))
            chosen = torch.zeros_like(scores).index_fill(0, best,
                                                         1.0)  # (N,), 1 for each prompt's best
            run.log_samples(examples, batch, scores, kl, chosen)
            run.save_model(policy)
        run.checkpoint()  # if due; also exits after Ctrl-C or SIGTERM

    run.finish(test)
    return policy


if __name__ == "__main__":
    main(parse(Args))
    leave()
