"""REINFORCE with a baseline from past rewards (Williams 1992).

As in Ahmadian et al. 2024 (arXiv:2402.14740), section 2.2:

    gradient = [ R(y, x) - b ] grad log pi(y | x)
    R(y, x)  = r(x, y) - beta log( pi(y|x) / pi_ref(y|x) )

As in rloo.py, the whole response is one action. One response per prompt is enough, because the
baseline comes from past steps:

    --baseline none             b = 0
    --baseline moving-average   b = mean of R over all past steps, or over the last --window of them
    --baseline ema              b <- decay * b + (1 - decay) * mean R of the step

    python reinforce.py --baseline moving-average

What differs from rloo.py: the baseline, a single number for all prompts. It is unbiased because it
is fixed before the step's responses are sampled; a baseline that included the step's own rewards
would not be. But it is weaker: it tracks how well the policy does on average and knows nothing
about the prompt. The EMA starts at the first step's mean reward (if it started at 0, it would lag
for about 1 / (1 - decay) steps).

What to watch: objective/baseline should track objective/rewards closely. While it lags, most
advantages in a step have the same sign, which shows up in policy/grad_norm.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, no_grad_logprobs, rollout, rollout_metrics,
                        score, sequence_rewards, token_kl, token_logprobs)
    from plumbing import (Count, CountOrZero, NotNegative, Positive, Range, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, setup, sum_gradients,
                          sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_baseline(history, kind, window, decay):
    """The baseline b, from the mean rewards of past steps; 0 at the first step.

    Args: history (list of float, one for each past step); kind ("none", "moving-average" or "ema");
    window (number of recent steps in the moving average, 0 for all); decay (of the EMA). Returns:
    float.
    """
    if kind == "none" or not history:
        return 0.0
    if kind == "moving-average":
        return sum(history[-window:]) / len(history[-window:])
    baseline = history[0]
    for reward in history[1:]:
        baseline = decay * baseline + (1 - decay) * reward
    return baseline


def compute_loss(logprobs, advantages):
    """- sum_i A_i log pi(y_i | x). A sum: the caller divides by the number of rows.

    Args: logprobs (n, T), 0 where masked; advantages (n,). Returns: scalar.
    """
    return -(advantages * logprobs.sum(1)).sum()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    baseline: Literal["none", "moving-average", "ema"] = "moving-average"
    """what to subtract from the rewards: nothing, or an average over past updates"""
    window: CountOrZero = 0
    """number of past updates in the moving average; 0 for all"""
    decay: Annotated[float, Range(lambda value: 0 <= value < 1,
                                  "must be at least 0 and below 1")] = 0.9
    """decay of the exponential moving average (usually 0.9 or 0.99)"""
    k: Count = 1
    """responses per prompt"""
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
    prompts_per_step: Count = 64
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
        rewards = sequence_rewards(scores, kl, args.beta)  # (N,)

        # 4. advantages: how much better each response is than those of past updates
        history = run.state.setdefault("history", [])  # the mean reward of each past update
        baseline = compute_baseline(history, args.baseline, args.window, args.decay)
        advantages = rewards - baseline  # (N,)
        history.append(rewards.mean().item())

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
            "objective/baseline": baseline,
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
