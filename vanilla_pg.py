"""Vanilla policy gradient with a learned value baseline.

As in Ahmadian et al. 2024 (arXiv:2402.14740), sections 3.1 to 3.3:

    gradient = sum_t [ G_t - V(x, y_<t) ] grad log pi(y_t | x, y_<t)
    G_t      = r - beta sum_{i >= t} kl_i

Each token is an action, each prefix a state, and a critic the size of the policy learns the value
of each state. This is PPO with lambda = 1 and without the ratio and the clipping. The paper finds
that it beats PPO, and that RLOO, which needs no critic, beats it in turn.

    python vanilla_pg.py

What differs from rloo.py: the baseline V depends on the state, is learned by regression on G, and
takes a second model and optimizer. V is read before the token is chosen, so it cannot bias the
gradient, however wrong it is; a bad critic only adds variance. The critic is initialized from the
reward model unless --critic names another.

Where published code differs: a common bug is to read V at the token itself, after the action, which
adds bias.

What to watch: value/explained_variance should climb from near 0 (or below) towards 1 within a few
dozen updates.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, no_grad_logprobs, no_grad_values, rollout,
                        rollout_metrics, score, token_kl, token_logprobs, token_rewards,
                        token_values)
    from plumbing import (Count, CountOrZero, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_critic, load_policy,
                          load_reference, load_rewards, load_rows, load_tokenizer, parse, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_advantages(rewards, values, response_mask):
    """A_t = G_t - V_t, where G_t is the sum of the rewards from token t on.

    Args: rewards (N, T), 0 where masked; values (N, T), of the state before each token;
    response_mask (N, T).
    Returns: advantages and returns G (N, T), 0 where masked.
    """
    returns = rewards.flip(1).cumsum(1).flip(1) * response_mask  # (N, T), KL-to-go and score
    return (returns - values) * response_mask, returns


def compute_loss(logprobs, advantages):
    """- sum_t A_t log pi(y_t | x, y_<t). A sum: the caller divides by the number of rows.

    Args: logprobs (n, T) and advantages (n, T), both 0 where masked. Returns: scalar.
    """
    return -(advantages * logprobs).sum()


def compute_value_loss(values, returns):
    """1/2 sum_t ( V_t - G_t )^2. Args: values (n, T), with gradients, and returns (n, T), 0 where
    masked."""
    return (values - returns).square().sum() / 2


def explained_variance(values, returns, response_mask):
    """1 - Var(G - V) / Var(G) over real tokens: 1 for a perfect critic, 0 for a constant one."""
    values, returns = values[response_mask], returns[response_mask]
    return 1 - (returns - values).var() / returns.var()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    k: Count = 1
    """responses per prompt"""
    critic: str | None = None
    """initial critic: one-label classifier or policy (hub name or folder); default: the --reward,
    or the --model if the reward is a function"""
    critic_lr: Positive = 1e-3
    """Adam's peak learning rate for the critic"""
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
    critic = load_critic(args, tokenizer, device)
    reward_fns = load_rewards(args, device, args.reward_noise)  # maximized, or only logged
    train = load_rows(args, args.train_split, tokenizer)
    test = load_rows(args, args.test_split, tokenizer, first=args.eval_prompts)
    dry_run(policy, tokenizer, [train, test], reward_fns, args, reference, critic)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr)
    critic_scheduler = get_scheduler(args.lr_schedule, critic_optimizer, args.warmup_updates,
                                     args.num_updates)

    run = Run(__file__, args, tokenizer, policy=(policy, optimizer, scheduler),
              critic=(critic, critic_optimizer, critic_scheduler))  # --resume restores all six
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

        # 4. advantages: how much better each token's reward-to-go is than the critic expected
        old_values = no_grad_values(critic, batch, args.microbatch_tokens)  # (N, T)
        advantages, returns = compute_advantages(rewards, old_values, batch.response_mask)  # (N, T)

        # 5. update: one optimizer step on the whole batch, in micro-batches
        loss = value_loss = 0.0
        optimizer.zero_grad()
        critic_optimizer.zero_grad()
        for rows in microbatches(policy, args.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
            part = compute_loss(logprobs, advantages[rows]) / len(batch)
            part.backward()
            loss += part.item()
            values = token_values(critic, batch[rows])  # (n, T)
            part = compute_value_loss(values, returns[rows]) / len(batch)
            part.backward()
            value_loss += part.item()
        loss, value_loss = sum_over_ranks(loss), sum_over_ranks(value_loss)
        sum_gradients(policy)  # over all processes
        sum_gradients(critic)
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        critic_grad_norm = clip_gradients(critic, args.max_grad_norm)
        run.check_finite(examples, scores=scores, kl=kl, loss=loss + value_loss,
                         grad_norm=grad_norm + critic_grad_norm)
        optimizer.step()
        critic_optimizer.step()

        # 6. log, evaluate, save
        metrics = rollout_metrics(batch, parts, scores, kl, rewards, args.k) | {
            "value/loss": value_loss,
            "value/explained_variance": explained_variance(old_values, returns,
                                                           batch.response_mask),
            "policy/loss": loss, "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_norm > args.max_grad_norm,
            "policy/lr": scheduler.get_last_lr()[0],
        }
        run.log(metrics, samples=len(batch), tokens=batch.response_mask.sum())
        scheduler.step()
        critic_scheduler.step()
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
