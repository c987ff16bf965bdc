"""REINFORCE++ (Hu 2024, a blog post; Hu et al. 2025, arXiv:2501.03262): PPO's tricks without a critic.

    A_t  = r - beta sum_{i >= t} kl_i,  then whitened over all tokens of the whole batch
    loss = - sum_t min( ratio_t A_t, clip(ratio_t, 1 +- clip) A_t )

with r normalised over the batch and clipped, several mini-batches per rollout, and

    python reinforce_pp.py --baseline group --beta 0.3

the later variant: r less its prompt's mean, the same for all tokens, whitened over the batch; the KL is then a
separate term of the loss, beta k2_t = beta/2 ( log pi - log pi_ref )^2, and not in the reward.

What differs from rloo.py: the baseline is the mean of the whole batch, not of the prompt, so one response per prompt
would do; the KL is a token-level reward; each rollout serves several clipped steps.

Whitening subtracts a mean and divides by a std that contain the response itself: a small bias, which shrinks as the
batch grows, and a change of scale that makes the learning rate mean the same for every reward. Mean and std are those
of the tokens of the global batch, never of a micro-batch or a prompt. tests/test_exact.py has the numbers.

The group variant is biased even without whitening: its mean contains the response itself, which scales the gradient by
(k - 1) / k, and k2 in the loss lacks the KL to go, so that the optimum of E[r] - beta KL is no fixed point.

Where published code deviates: OpenRLHF divides by the std with N in its denominator and clamps the variance at 1e-8
(as here), verl takes N - 1. OpenRLHF clips the raw rewards and does not normalise them over the batch, and it averages
the loss over the batch's tokens, where here a row's tokens are summed. The post's settings for large models: KL 0.01 with a learned reward model and 0.001 with
rules, 4 samples per prompt, rollouts of 256 in mini-batches of 128, lr 5e-7.

Since the scores are divided by their std, beta weighs against a reward of size 1: at rloo.py's 0.05 the KL on mini
TL;DR grows to 12 and the gold reward stays at 4.8, hence this script's own default.

What to watch: policy/clipfrac (a few percent at most); objective/kl.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from common import (evaluate, frozen_logprobs, load_measures, log_samples, microbatches, minibatches, rehearse, rollout,
                    rollout_metrics, token_kl, token_logprobs, token_rewards)
from plumbing import (batches, check_args, check_finite, checkpoint, clip_gradients, close, load_model, load_reference,
                      load_rows, load_tokenizer, log, log_evaluation, open_run, parse, pick_device, report, require,
                      save, show, total, watch)


def normalize_scores(scores, clip):
    """( r - mean ) / std over the batch (N in its denominator), clipped to +- clip; 0 where all scores are equal.

    Args: scores (N,); clip. Returns: (N,).
    """
    if scores.amax() == scores.amin():
        return torch.zeros_like(scores)  # or the rounding error of their mean would be scaled up to a signal
    return ((scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-4)).clamp(-clip, clip)


def center_scores(scores, k):
    """r - mean of the k scores of the prompt. Args: scores (N,), prompt-major; k. Returns: (N,)."""
    groups = scores.view(-1, k)  # (B, k)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def compute_advantages(rewards, response_mask, whiten=True):
    """A_t = sum of the rewards from token t on, whitened over all tokens of the batch.

    Args: rewards (N, T), 0 where masked; response_mask (N, T); whiten (False: the returns as they are).
    Returns: advantages (N, T), 0 where masked.
    """
    returns = rewards.flip(1).cumsum(1).flip(1) * response_mask  # (N, T), the KL-to-go and the score
    if not whiten:
        return returns
    tokens = returns[response_mask]  # all real tokens
    return (returns - tokens.mean()) / tokens.var(correction=0).clamp(min=1e-8).sqrt() * response_mask


def compute_loss(logprobs, old_logprobs, advantages, clip):
    """- sum_t min( ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t ),  ratio_t = pi(y_t) / pi_old(y_t).

    A sum: the caller divides by the rows of the whole mini-batch.

    Args: logprobs, old_logprobs and advantages (n, T), 0 where masked; clip (inf: none).
    Returns: scalar, and the number of tokens that the clipping touched.
    """
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (n, T)
    return -torch.min(free, bounded).sum(), (bounded < free).sum()


def compute_kl_loss(logprobs, ref_logprobs):
    """sum_t k2_t = 1/2 ( log pi - log pi_ref )^2. Args: logprobs, ref_logprobs (n, T), 0 where masked."""
    return (logprobs - ref_logprobs).square().sum() / 2


@dataclass
class Args:
    baseline: Literal["none", "group"] = "none"
    """"group" is the later variant: subtract the prompt's mean score, and put the KL into the loss"""
    normalize_scores: bool = True
    """normalise the scores over the batch (--baseline none)"""
    clip_scores: float = 10.0
    """normalised scores are clipped to +- this; among N responses none exceeds sqrt(N - 1), 7.9 by default"""
    whiten: bool = True
    """normalise the advantages over all tokens of the batch"""
    k: int = 4
    """responses per prompt"""
    beta: float = 0.15
    """weight of the KL penalty, in the reward (--baseline none) or the loss; 0 switches it off"""
    temperature: float = 0.7
    """the policy, and the reference, are softmax(logits / temperature): sampled and scored with the same"""
    lr: float = 1e-3
    """Adam's peak learning rate (for a pretrained model of a billion parameters: 1e-6 to 3e-6)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rate falls after the warm-up"""
    warmup_updates: int = 0
    """updates over which the learning rate rises from 0"""
    max_grad_norm: float = 1.0
    """the gradient's norm is clipped to this; policy/grad_clipped logs how often"""
    num_updates: int = 150
    """rollouts, each of which is used for epochs * minibatches optimizer steps"""
    epochs: int = 1
    """times that each rollout is gone through"""
    minibatches: int = 2
    """optimizer steps of one epoch, each on its share of the rollout's responses"""
    clip: float = 0.2
    """the ratio pi / pi_old of a token earns nothing beyond 1 +- this; "inf" switches it off"""
    prompts_per_step: int = 16
    """prompts of one rollout; it has k times as many responses"""
    max_prompt_length: int = 512
    """prompts with more tokens are left out"""
    truncate_prompts: bool = False
    """cut longer prompts off at their beginning, instead of leaving them out"""
    max_new_tokens: int = 32
    """a response is cut off after this many tokens"""
    missing_eos_penalty: float = 1.0
    """subtracted from the score of a response that was cut off before it ended"""
    microbatch_tokens: int = 8192
    """tokens, padding included, that go through a model at once in scoring and update: changes memory and time, never
    the gradient"""
    rollout_batch_size: int = 256
    """responses that one process samples at once: their keys and values are what a rollout keeps in memory"""
    model: str = "tasks/mini_tldr-sft"
    """the policy to start from: a hub name or a folder"""
    reference: str | None = None
    """the policy that the KL is measured to; by default a frozen copy of --model"""
    reward: tuple[str, ...] = ("tasks/mini_tldr-reward",)
    """what is maximized: a one-label classifier (hub name or folder), or path/to/file.py:function; several are added"""
    reward_weights: tuple[float, ...] = ()
    """what each of several rewards is multiplied by; by default 1"""
    gold: str = "auto"
    """a second reward that is only measured, in evaluations, where it judges the win rate; "auto": the function
    gold_reward of the python file that --dataset names, if it has one; "none": none"""
    dataset: str = "tasks/mini_tldr.py:prompts"
    """rows with the column prompt, and completion (a reference text) for the win rate: hub name, path, or
    file.py:function"""
    dataset_config: str | None = None
    """configuration of a hub dataset that has several"""
    prompt_column: str | None = None
    """the dataset's column of prompts, where it has another name"""
    completion_column: str | None = None
    """the dataset's column of reference texts, where it has another name"""
    chat: bool = False
    """make prompts that are plain text the user's message of the tokenizer's chat template"""
    system_prompt: str | None = None
    """the system's message before every prompt (and --chat)"""
    train_split: str = "train"
    """split that the rollouts take their prompts from"""
    test_split: str = "test"
    """split that the evaluations take their prompts from"""
    eval_every: int = 10
    """updates between two evaluations; 0 evaluates before and after training only"""
    eval_prompts: int = 256
    """held-out prompts of an evaluation, with one sampled response each"""
    eval_batch_size: int = 256
    """responses sampled at once in an evaluation"""
    seed: int = 1
    """of the order of the prompts and of the sampling"""
    output: str | None = None
    """run folder: args.json, TensorBoard logs, model/, checkpoints/; by default runs/<script>-seed<seed>-<time>"""
    save_every: int = 10
    """updates between two checkpoints; 0 writes one only at the end, or where SIGTERM or Ctrl-C ends the run"""
    keep: int = 2
    """checkpoints that are kept, the last ones"""
    resume: str | None = None
    """folder of a run that was ended: go on after its last checkpoint, with its flags, as if nothing had happened"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32, or bfloat16 (autocast; the weights and Adam stay in float32)"""
    shard: bool = False
    """with torchrun: spread the weights over the processes (FSDP2), for models that do not fit one device"""
    gradient_checkpointing: bool = False
    """keep only the layers' inputs for the backward pass, and compute the rest again there: less memory, more time"""


def main(args):
    require(args.k >= 2 or args.baseline == "none", f"--k {args.k}: --baseline group needs 2 or more responses")
    check_args(args)
    device = pick_device(args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    policy = load_model(args.model, device, args.dtype, args.shard, args.gradient_checkpointing)
    reference = load_reference(args, tokenizer, device)
    measures = load_measures(args, tokenizer, device)  # "score" is trained on; "gold", if there is one, only measured
    length = args.max_prompt_length
    train = load_rows(args, args.dataset, args.train_split, tokenizer, ["prompt"], length)
    test = load_rows(args, args.dataset, args.test_split, tokenizer, ["prompt"], length, args.eval_prompts)
    rehearse(policy, tokenizer, [train, test], measures, args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)
    saved = {"policy": (policy, optimizer, scheduler)}  # what checkpoints hold, besides the state
    folder, writer, state = open_run(args, "reinforce_pp", saved)
    if not state:  # a new run
        before = evaluate(policy, reference, tokenizer, measures, test, args)
        log_evaluation(writer, 0, before)
        state = {"step": 0, "samples": 0, "seconds": 0.0, "before": before, "after": before}

    updates = range(state["step"] + 1, args.num_updates + 1)
    bar = tqdm(updates, desc="reinforce_pp", unit="update", disable=writer is None)
    for step, columns in zip(bar, batches(train, args.prompts_per_step, args.seed, state["step"])):
        start = time.perf_counter()

        # 1. rollout: k responses for each prompt, with the sampler's own log-probs
        batch = rollout(policy, tokenizer, columns["prompt_ids"], args.k, args.temperature, args.max_new_tokens,
                        args.rollout_batch_size)  # N rows

        # 2. score: one number per response
        parts = measures["score"](batch, columns)  # name -> (N,): the score, and its parts where there are several
        scores = parts["score"] - args.missing_eos_penalty * ~batch.ended  # (N,)

        # 3. shape: the KL to the reference becomes part of the reward, or with --baseline group of the loss
        ref_logprobs = frozen_logprobs(reference, batch, args.temperature, args.microbatch_tokens)  # (N, T)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        check_finite(step, folder, columns, scores=scores, kl=kl)
        if args.baseline == "group":  # the KL is part of the loss
            shaped = center_scores(scores, args.k)  # (N,)
        else:
            shaped = normalize_scores(scores, args.clip_scores) if args.normalize_scores else scores  # (N,)
        beta = 0.0 if args.baseline == "group" else args.beta
        rewards = token_rewards(shaped, kl, beta, batch.response_mask)  # (N, T)

        # 4. advantages: each token's reward-to-go, compared with all tokens of the batch
        advantages = compute_advantages(rewards, batch.response_mask, args.whiten)  # (N, T)

        # 5. update: several steps, each on a part of the batch, which goes through the model in micro-batches
        clipped = grad_clipped = 0
        for minibatch in minibatches(len(batch), args.epochs, args.minibatches):  # row numbers
            loss = 0.0
            optimizer.zero_grad()
            for rows in microbatches(args.microbatch_tokens, batch, rows=minibatch):
                logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
                policy_loss, outside = compute_loss(logprobs, batch.old_logprobs[rows], advantages[rows], args.clip)
                if args.baseline == "group":
                    policy_loss = policy_loss + args.beta * compute_kl_loss(logprobs, ref_logprobs[rows])
                (policy_loss / len(minibatch)).backward()
                loss += policy_loss.item() / len(minibatch)
                clipped += outside.item()
            loss, grad_norm = total(loss), clip_gradients(policy, args.max_grad_norm)
            grad_clipped += (grad_norm > args.max_grad_norm) / (args.epochs * args.minibatches)
            check_finite(step, folder, columns, loss=loss, grad_norm=grad_norm)
            optimizer.step()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()

        # 6. log
        elapsed = time.perf_counter() - start
        state["step"] = step
        state["samples"] += len(batch)
        state["seconds"] += elapsed
        metrics = rollout_metrics(batch, parts, scores, kl, rewards.sum(1), args.k)
        metrics |= {
            "policy/loss": loss,
            "policy/clipfrac": total(clipped) / (args.epochs * batch.response_mask.sum()),
            "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_clipped,
            "policy/lr": lr,
            "time/samples": state["samples"],
            "time/seconds": state["seconds"],
            "time/tokens_per_second": batch.response_mask.sum() / elapsed,
        }
        log(writer, step, metrics)
        show(bar, metrics)
        watch(state, metrics, args.max_new_tokens)
        if step == args.num_updates or (args.eval_every and step % args.eval_every == 0):
            state["after"] = after = evaluate(policy, reference, tokenizer, measures, test, args)
            check_finite(step, folder, columns, kl=after[0]["kl"].mean())
            log_evaluation(writer, step, after)
            log_samples(writer, step, columns, tokenizer, batch, scores, kl, advantages[:, 0])
            save(folder / "model", policy, tokenizer)
        checkpoint(args, folder, writer, tokenizer, saved, state)
    report(folder, test, state["before"], state["after"])
    close(writer)
    return policy


if __name__ == "__main__":
    main(parse(Args))
