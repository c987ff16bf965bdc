"""DAPO, decoupled clip and dynamic sampling policy optimization (Yu et al. 2025, arXiv:2503.14476,
section 3).

    A_i  = ( r_i - mean(r_1 ... r_k) ) / std(r_1 ... r_k),  for prompts whose k rewards differ
    loss = - 1/sum_i |y_i| sum_i sum_t [ min( ratio A_i, bounded A_i ) - beta k3_t ]
    bounded = clip(ratio, 1 - clip_low, 1 + clip_high)
    r_i  = score_i - overlong_penalty * min( 1, max( 0, ( |y_i| - L + C ) / C ) )

    python dapo.py
    python dapo.py --max-rounds 1 --clip-high 0.2 --overlong-penalty 0        # only the token mean

What differs from grpo.py are four things. Dynamic sampling: where all k rewards of a prompt are
equal its advantages are 0, so further prompts are sampled until the batch is full of others. The
mean is over all tokens of the mini-batch, not over each response's tokens first. Clip-higher: the
range of the ratio reaches further up, so that rare tokens can grow. The soft overlong penalty:
within the last C tokens below the maximum length L, the score falls by up to overlong_penalty.

The token mean and the penalty make a difference from the first step on, dynamic sampling once a
prompt's rewards are all equal (often for rewards of 0 and 1, nearly never for a reward model's),
clip-higher from the second mini-batch of a rollout on; hence the default of four.

Implementation details, and what others do:
- Further prompts are drawn at random from the training data, by the random state that checkpoints
  hold. After max_rounds rollouts, prompts whose rewards are all equal fill what is still missing:
  they have no advantage, but count as tokens. The paper has no such limit.
- If more than enough prompts have rewards that differ, the first are kept and the others are thrown
  away. time/samples counts all that was sampled. Scores are compared after the penalties.
- It selects prompts by how hard they are for the policy, which changes their weights: those that
  are nearly always or never solved are rare in the batches.
- The paper's penalty is 1 beyond L, where there is nothing here: sampling ends at L. Its C is a
  fifth of L. It takes the place of grpo.py's --missing-eos-penalty, which is 0 by default.
- The mean is over the mini-batch as in verl. In TRL 1.16 it is over the whole generation batch,
  rescaled to the step, in OpenRLHF 0.11 over the optimizer step, and the paper's is per group.
  clip-higher has to be asked for in all three: their default range is 0.2 on both sides.
- The paper has no KL. --beta is grpo.py's default, for the reason given there; 0 disables it.

What to watch: rollout/rounds, rollouts per update (it grows as prompts are solved);
objective/frac_reward_zero_std, which stays 0 as long as the batch can be filled; policy/clipfrac.
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import (concatenate, dry_run, evaluate, microbatches, minibatches, no_grad_logprobs,
                        rollout, rollout_metrics, score, token_kl, token_logprobs)
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


def fill(rounds, size, k, pad_id):
    """`size` prompts: first those whose k scores differ, in the order of the rounds, then others.

    Args: rounds (list of (examples, batch, parts, scores)); size; k; pad_id. Returns: the same.
    """
    examples, batches, parts, scores = zip(*rounds)
    least, most = torch.cat(scores).view(-1, k).aminmax(dim=1)  # (all prompts,)
    chosen = (least == most).int().argsort(stable=True)[:size]  # (B,)
    rows = (chosen.unsqueeze(1) * k + torch.arange(k).to(chosen)).flatten()  # (N,)
    columns = {name: sum((list(part[name]) for part in examples), []) for name in examples[0]}
    return ({name: [values[i] for i in chosen.tolist()] for name, values in columns.items()},
            concatenate(batches, pad_id)[rows],
            {name: torch.cat([part[name] for part in parts])[rows] for name in parts[0]},
            torch.cat(scores)[rows])


def compute_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip_low,
                 clip_high, beta):
    """sum_it [ - min( ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i ) + beta k3_t
    ].

    A sum: the caller divides by the number of tokens in the whole mini-batch.

    Args: logprobs, old_logprobs, ref_logprobs (n, T), 0 where masked; advantages (n,);
    response_mask (n, T); clip_low and clip_high (inf: no clipping); beta.
    Returns: scalar, and the number of clipped tokens.
    """
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    advantages = advantages.unsqueeze(1) * response_mask  # (n, T)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    log_ratio = ref_logprobs - logprobs  # (n, T)
    k3 = log_ratio.exp() - log_ratio - 1  # (n, T), 0 where masked
    losses = beta * k3 - torch.min(free, bounded)  # (n, T)
    return losses.sum(), (bounded < free).sum()


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
    clip_low: Limit = 0.2
    """how far below 1 a token's ratio counts; "inf" disables this clip"""
    clip_high: Limit = 0.28
    """how far above 1 a token's ratio counts; "inf" disables this clip"""
    max_rounds: Count = 4
    """most rollouts to fill a batch with prompts whose rewards differ; 1 disables it"""
    overlong_penalty: NotNegative = 1.0
    """subtracted from the score of a response of the maximum length, and in part shortly below"""
    overlong_buffer: Count | None = None
    """tokens below the maximum within which that penalty grows; default: a fifth of the maximum"""
    prompts_per_step: Count = 16
    """prompts per rollout, with k responses each"""
    max_new_tokens: Count = 32
    """maximum response length in tokens"""
    missing_eos_penalty: NotNegative = 0.0
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
        rounds, count, differ = [], args.prompts_per_step, 0
        while differ < count and len(rounds) < args.max_rounds:
            if rounds:  # further prompts, the same on all processes
                examples = train[torch.randint(len(train), (count,)).tolist()]
            # 1. rollout: k responses per prompt, with the sampler's own log-probs
            batch = rollout(policy, tokenizer, examples["prompt_ids"], args.k, args.temperature,
                            args.max_new_tokens, args.rollout_batch_size)  # N rows

            # 2. score: one number per response
            parts = score(reward_fns, tokenizer, batch, examples)  # name -> (N,): score, its parts
            scores = parts["score"] - args.missing_eos_penalty * ~batch.ended  # (N,)
            buffer = args.overlong_buffer or max(1, args.max_new_tokens // 5)
            late = batch.response_mask.sum(1) - args.max_new_tokens + buffer  # (N,)
            scores -= args.overlong_penalty * late.clamp(min=0) / buffer
            rounds.append((examples, batch, parts, scores))
            differ += sum(len(set(group)) > 1 for group in scores.view(-1, args.k).tolist())
        if len(rounds) > 1:
            examples, batch, parts, scores = fill(rounds, count, args.k, tokenizer.pad_token_id)

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
                                             args.clip_low, args.clip_high, args.beta)
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
            "rollout/rounds": len(rounds),
        }
        run.log(metrics, samples=sum(len(found[1]) for found in rounds),
                tokens=sum(found[1].response_mask.sum() for found in rounds))
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
