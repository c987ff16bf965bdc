"""PPO, proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347), token by token.

As used in RLHF (Ziegler et al. 2019; Ahmadian et al. 2024, section 2.1):

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = sum_l (gamma lambda)^l delta_{t+l}                                          (GAE)
    loss    = - sum_t min( ratio_t A_t, clip(ratio_t, 1 +- clip) A_t )
    ratio_t = pi(y_t) / pi_old(y_t)
    value   = 1/2 sum_t max( (V_t - G_t)^2, (clip(V_t, V_old +- value_clip) - G_t)^2 )
    G_t     = A_t + V_old

    python ppo.py

This is vanilla_pg.py with

    python ppo.py --lam 1 --clip inf --value-clip inf --no-whiten --minibatches 1

What differs from rloo.py: each token is an action, with a learned critic (a second trained model);
each rollout is used for several steps, kept close to the sampling policy by the clipped ratio; and
the advantages bootstrap from the critic, so for lambda < 1 they are biased by its errors. Whitening
the advantages over the tokens in the batch changes their scale and adds a small bias.

Where published code differs: the "N implementation details" code puts the score one position after
EOS, sets the score of a response without EOS to -1 (here a penalty is subtracted), whitens with n
in the std's denominator (here n - 1), averages the losses over the tokens in the batch (here a
response's tokens are summed) and weights the value loss by 0.1 (here the critic is a separate
model, so --critic-lr does that). Both read V at the state before each token. Whitening must leave
out masked positions. Its settings for 1B parameters: KL 0.05, lambda 0.95, gamma 1, clips 0.2, 4
epochs of 1 mini-batch, lr 3e-6, Adam eps 1e-5 (here 1e-8), temperature 0.7.

What to watch: policy/clipfrac (the paper: under 5 percent on average), value/explained_variance,
objective/kl.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, minibatches, no_grad_logprobs,
                        no_grad_values, rollout, rollout_metrics, score, token_kl, token_logprobs,
                        token_rewards, token_values)
    from plumbing import (Between, Count, CountOrZero, Limit, NotNegative, Positive, Run, RunArgs,
                          Seed, clip_gradients, get_scheduler, leave, load_critic, load_policy,
                          load_reference, load_rewards, load_rows, load_tokenizer, parse, require,
                          setup, sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_advantages(rewards, values, response_mask, gamma, lam):
    """GAE: A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t; V and A are 0
    after the last token.

    Args: rewards and values (N, T), 0 where masked; response_mask (N, T); gamma; lam.
    Returns: advantages and returns A + V (N, T), 0 where masked.
    """
    advantages = torch.zeros_like(rewards)  # (N, T)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])  # (N,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]  # (N,)
        advantages[:, t] = delta + gamma * lam * following_advantage
        following_value, following_advantage = values[:, t], advantages[:, t]
    return advantages * response_mask, (advantages + values) * response_mask


def whiten_advantages(advantages, response_mask):
    """Normalize to mean 0 and std 1 (n - 1 in the denominator) over the batch's n real tokens; 0 if
    all are equal.

    Args: advantages and response_mask (N, T). Returns: (N, T), 0 where masked.
    """
    tokens = advantages[response_mask]  # (n,)
    if tokens.amax() == tokens.amin():  # for example a single token: no std to divide by
        return torch.zeros_like(advantages)
    return (advantages - tokens.mean()) / (tokens.std() + 1e-8) * response_mask


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


def compute_value_loss(values, old_values, returns, value_clip):
    """1/2 sum_t max( (V_t - G_t)^2, (V_old + clip(V_t - V_old, +- value_clip) - G_t)^2 ).

    Args: values (n, T), with gradients, old_values and returns (n, T), 0 where masked; value_clip
    (inf: no clipping).
    """
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)  # (n, T)
    return torch.max((values - returns).square(), (bounded - returns).square()).sum() / 2


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
    gamma: Annotated[float, Between(0, 1)] = 1.0
    """discount factor"""
    lam: Annotated[float, Between(0, 1)] = 0.95
    """GAE lambda: 1 is unbiased, lower values trust the critic more"""
    value_clip: Limit = 0.2
    """clip range of the value loss around the old values; "inf" disables clipping"""
    whiten: bool = True
    """normalize the advantages over all tokens in the batch"""
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
    clip: Limit = 0.2
    """PPO clip range of the ratio pi / pi_old; "inf" disables clipping"""
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
    responses = args.prompts_per_step * args.k
    require(args.minibatches <= responses, f"--minibatches {args.minibatches}: a rollout has only "
                                           f"{responses} responses to divide")
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
        advantages, returns = compute_advantages(rewards, old_values, batch.response_mask,
                                                 args.gamma, args.lam)  # (N, T)
        if args.whiten:
            advantages = whiten_advantages(advantages, batch.response_mask)  # (N, T)

        # 5. update: several optimizer steps, each on a mini-batch, in micro-batches
        clipped = grad_clipped = 0
        for minibatch in minibatches(len(batch), args.epochs, args.minibatches):  # row numbers
            loss = value_loss = 0.0
            optimizer.zero_grad()
            critic_optimizer.zero_grad()
            for rows in microbatches(policy, args.microbatch_tokens, batch, rows=minibatch):
                logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
                part, outside = compute_loss(logprobs, batch.old_logprobs[rows], advantages[rows],
                                             args.clip)
                (part / len(minibatch)).backward()
                loss += part.item() / len(minibatch)
                clipped += outside.item()
                values = token_values(critic, batch[rows])  # (n, T)
                part = compute_value_loss(values, old_values[rows], returns[rows],
                                          args.value_clip) / len(minibatch)
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
            grad_clipped += (grad_norm > args.max_grad_norm) / (args.epochs * args.minibatches)

        # 6. log, evaluate, save
        metrics = rollout_metrics(batch, parts, scores, kl, rewards, args.k) | {
            "value/loss": value_loss,
            "value/explained_variance": explained_variance(old_values, returns,
                                                           batch.response_mask),
            "policy/loss": loss, "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_clipped, "policy/lr": scheduler.get_last_lr()[0],
            "policy/clipfrac": sum_over_ranks(clipped) / (args.epochs * batch.response_mask.sum()),
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
