"""CISPO, clipped importance sampling policy optimization (MiniMax-M1, 2025, arXiv:2506.13585,
section 3.1).

    A_i  = ( r_i - mean(r_1 ... r_k) ) / std(r_1 ... r_k)
    w_t  = stop-gradient( min( pi(y_t) / pi_old(y_t), max_ratio ) )
    loss = - 1/sum_i |y_i| sum_i sum_t [ w_t A_i log pi(y_t) - beta k3_t ]
    k3_t = pi_ref / pi - log( pi_ref / pi ) - 1

    python cispo.py

What differs from grpo.py: there, a token whose ratio has left the clip range in the direction of
its advantage has no gradient any more. Here, the ratio is a weight on grad log pi, cut off above:
every token keeps its gradient, also the rare ones whose probability moves most. And the mean is
over all tokens of the mini-batch, so that a token counts the same in a short and in a long response
(the "token mean" of DAPO), not over each response's tokens first.

That mean makes the two differ at the first step already, unless all responses have the same length.
The weights make a difference from the second mini-batch of a rollout on; hence the default of four.
A ratio above 5 is rare, one token in 10,000 on mini math: the limit is there for tokens that a few
steps make much more likely.

Implementation details, and what others do:
- The paper clips to 1 + eps_high, and has no effective bound below; it does not say how large
  eps_high is. max_ratio is the bound itself: 5, as in ScaleRL (arXiv:2510.13786).
- The same flag means different things. TRL 1.16 cuts at epsilon_high itself, not 1 + epsilon_high,
  and unset it is 0.2, so that nearly every weight is 0.2. verl has 1 - 0.2 to 1 + 0.2, on both
  sides. open-instruct cuts at 1.272, SkyRL at 1 + 4.
- The paper has no KL. --beta is grpo.py's default, for the reason given there; 0 disables it.
- The value of the loss means nothing, since log pi is not a ratio; only its gradient matters.

What to watch: policy/clipfrac, the share of tokens with a ratio above max_ratio (near 0; they are
not lost); objective/kl; objective/entropy.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (dry_run, evaluate, microbatches, minibatches, no_grad_logprobs, rollout,
                        rollout_metrics, score, token_kl, token_logprobs)
    from plumbing import (Count, CountOrZero, Limit, NotNegative, Positive, Run, RunArgs, Seed,
                          clip_gradients, get_scheduler, leave, load_policy, load_reference,
                          load_rewards, load_rows, load_tokenizer, parse, require, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_advantages(rewards, k, scale_std=True):
    """A_i = (r_i - mean) / (std + 1e-4), with mean and std (k - 1 in the denominator) over the
    prompt's k rewards.

    Args: rewards (N,), N = B * k, prompt-major; k >= 2; scale_std (False: do not divide by the
    std).
    Returns: advantages (N,).
    """
    rewards = rewards.view(-1, k)  # (B, k)
    advantages = rewards - rewards.mean(1, keepdim=True)  # (B, k)
    if scale_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def compute_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, max_ratio, beta):
    """sum_i sum_t [ - stop-gradient( min(ratio_t, max_ratio) ) A_i log pi(y_t) + beta k3_t ].

    A sum: the caller divides by the number of tokens in the whole mini-batch.

    Args: logprobs, old_logprobs, ref_logprobs (n, T), 0 where masked; advantages (n,);
    response_mask (n, T); max_ratio (inf: no limit); beta.
    Returns: scalar, and the number of tokens whose ratio is above the limit.
    """
    ratio = (logprobs - old_logprobs).exp().detach()  # (n, T)
    advantages = advantages.unsqueeze(1) * response_mask  # (n, T)
    gain = ratio.clamp(max=max_ratio) * advantages * logprobs  # (n, T)
    log_ratio = ref_logprobs - logprobs  # (n, T)
    k3 = log_ratio.exp() - log_ratio - 1  # (n, T), 0 where masked
    return (beta * k3 - gain).sum(), ((ratio > max_ratio) & response_mask).sum()


@dataclass
class Args(RunArgs):  # data, evaluation, memory, devices, checkpoints: see plumbing/flags.py
    k: Count = 4
    """responses per prompt, at least 2"""
    scale_std: bool = True
    """divide the advantages by the std of the prompt's rewards"""
    beta: NotNegative = 0.3
    """weight of the KL penalty in the loss, relative to advantages of size 1; 0 disables it"""
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
    max_ratio: Limit = 5.0
    """largest weight pi / pi_old of a token's gradient; "inf" for no limit"""
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
    require(args.k >= 2, f"--k {args.k}: the baseline is the mean of the k responses; use at "
                         "least 2")
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

        # 3. shape: the KL to the reference is part of the loss, not of the reward
        ref_logprobs = no_grad_logprobs(reference, batch, args.temperature,
                                        args.microbatch_tokens)  # (N, T)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        rewards = scores  # (N,)

        # 4. advantages: how much better each response is than the others for the same prompt
        advantages = compute_advantages(rewards, args.k, args.scale_std)  # (N,)

        # 5. update: several optimizer steps, each on a mini-batch, in micro-batches
        clipped = grad_clipped = 0
        for minibatch in minibatches(len(batch), args.epochs, args.minibatches):  # row numbers
            loss, tokens = 0.0, batch.response_mask[minibatch].sum()
            optimizer.zero_grad()
            for rows in microbatches(policy, args.microbatch_tokens, batch, rows=minibatch):
                logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
                part, outside = compute_loss(logprobs, batch.old_logprobs[rows], ref_logprobs[rows],
                                             advantages[rows], batch.response_mask[rows],
                                             args.max_ratio, args.beta)
                (part / tokens).backward()
                loss += part.item() / tokens
                clipped += outside.item()
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
            "policy/clipfrac": sum_over_ranks(clipped) / (args.epochs * batch.response_mask.sum()),
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
