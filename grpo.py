"""GRPO, group relative policy optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, equations 3 and 4).

    A_i  = ( r_i - mean(r_1 ... r_k) ) / std(r_1 ... r_k)
    loss = - 1/k sum_i 1/|y_i| sum_t [ min( ratio A_i, clip(ratio, 1 +- clip) A_i ) - beta k3_t ]
    k3_t = pi_ref / pi - log( pi_ref / pi ) - 1

    python grpo.py
    python grpo.py --no-scale-std --no-length-mean      # the mean-centred variant: "Dr. GRPO", Liu et al. 2025

What differs from rloo.py: the group's mean, the response itself included, is the baseline, which scales the gradient
by (k - 1) / k; the advantages are divided by the group's std; a response's tokens are averaged, not summed; the ratio
to the sampling policy is clipped token by token, so that a rollout can serve several steps; and the KL stands in the
loss (k3), not in the reward.

Each of these but the ratio changes the expected gradient, not only its variance: dividing by the std weighs prompts by
how alike their responses' rewards are, and averaging over the length favours short good and long bad responses. The
gradient of k3 in the loss is, token by token and with the prefixes held fixed, that of KL(pi_ref || pi), the other
direction. It lacks the KL to go: that a token leads to prefixes with more or less KL. So it is the gradient of neither
KL of the whole sequence, and the optimum of E[r] - beta KL is no fixed point. tests/test_exact.py has the numbers.

Where published code deviates: implementations divide by std + 1e-4 (as here) or + 1e-8. The official Dr. GRPO has no KL
(--beta 0) and divides by a constant, the longest possible length, which here is a part of the learning rate.

Since the advantages are divided by the std, beta weighs against a reward of size 1, whatever the reward's own size: at
rloo.py's 0.05 this script runs away from the reference on mini TL;DR (KL 69, gold reward 1.05), hence its own default.

What to watch: objective/frac_reward_zero_std, the share of prompts without any signal; objective/kl; rollout/length.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from common import (evaluate, frozen_logprobs, load_measures, log_samples, microbatches, minibatches, rehearse, rollout,
                    rollout_metrics, token_kl, token_logprobs)
from plumbing import (batches, check_args, check_finite, checkpoint, clip_gradients, close, load_model, load_reference,
                      load_rows, load_tokenizer, log, log_evaluation, open_run, parse, pick_device, report, require,
                      save, show, total, watch)


def compute_advantages(rewards, k, scale_std=True):
    """A_i = (r_i - mean) / (std + 1e-4), mean and std (k - 1 in its denominator) over the k rewards of the prompt.

    Args: rewards (N,), N = B * k, prompt-major; k >= 2; scale_std (False: not divided by the std).
    Returns: advantages (N,).
    """
    rewards = rewards.view(-1, k)  # (B, k)
    advantages = rewards - rewards.mean(1, keepdim=True)  # (B, k)
    if scale_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def compute_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, clip, beta, length_mean=True):
    """sum_i 1/|y_i| sum_t [ - min( ratio_t A_i, clip(ratio_t, 1 - clip, 1 + clip) A_i ) + beta k3_t ].

    A sum over rows: the caller divides by the rows of the whole mini-batch.

    Args: logprobs, old_logprobs, ref_logprobs (n, T), 0 where masked; advantages (n,); response_mask (n, T);
    clip (inf: none); beta; length_mean (False: the tokens are summed). Returns: scalar, and the number of tokens that
    the clipping touched.
    """
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    advantages = advantages.unsqueeze(1) * response_mask  # (n, T)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (n, T)
    log_ratio = ref_logprobs - logprobs  # (n, T)
    k3 = log_ratio.exp() - log_ratio - 1  # (n, T), 0 where masked
    losses = beta * k3 - torch.min(free, bounded)  # (n, T)
    lengths = response_mask.sum(1, keepdim=True) if length_mean else 1  # (n, 1)
    return (losses / lengths).sum(), (bounded < free).sum()


@dataclass
class Args:
    k: int = 4
    """responses per prompt, 2 or more"""
    scale_std: bool = True
    """divide the advantages by the std of the group's rewards"""
    length_mean: bool = True
    """average the loss over the tokens of a response, rather than sum it"""
    beta: float = 0.3
    """weight of the KL penalty in the loss, against advantages of size 1; 0 switches it off"""
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
    minibatches: int = 1
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
    require(args.k >= 2, f"--k {args.k}: the baseline is the mean of the k responses; use 2 or more")
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
    folder, writer, state = open_run(args, "grpo", saved)
    if not state:  # a new run
        before = evaluate(policy, reference, tokenizer, measures, test, args)
        log_evaluation(writer, 0, before)
        state = {"step": 0, "samples": 0, "seconds": 0.0, "before": before, "after": before}

    updates = range(state["step"] + 1, args.num_updates + 1)
    bar = tqdm(updates, desc="grpo", unit="update", disable=writer is None)
    for step, columns in zip(bar, batches(train, args.prompts_per_step, args.seed, state["step"])):
        start = time.perf_counter()

        # 1. rollout: k responses for each prompt, with the sampler's own log-probs
        batch = rollout(policy, tokenizer, columns["prompt_ids"], args.k, args.temperature, args.max_new_tokens,
                        args.rollout_batch_size)  # N rows

        # 2. score: one number per response
        parts = measures["score"](batch, columns)  # name -> (N,): the score, and its parts where there are several
        scores = parts["score"] - args.missing_eos_penalty * ~batch.ended  # (N,)

        # 3. shape: the KL to the reference is part of the loss, not of the reward
        ref_logprobs = frozen_logprobs(reference, batch, args.temperature, args.microbatch_tokens)  # (N, T)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        check_finite(step, folder, columns, scores=scores, kl=kl)
        rewards = scores  # (N,)

        # 4. advantages: how much better each response is than the others of its prompt
        advantages = compute_advantages(rewards, args.k, args.scale_std)  # (N,)

        # 5. update: several steps, each on a part of the batch, which goes through the model in micro-batches
        clipped = grad_clipped = 0
        for minibatch in minibatches(len(batch), args.epochs, args.minibatches):  # row numbers
            loss = 0.0
            optimizer.zero_grad()
            for rows in microbatches(args.microbatch_tokens, batch, rows=minibatch):
                logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
                policy_loss, outside = compute_loss(
                    logprobs, batch.old_logprobs[rows], ref_logprobs[rows], advantages[rows],
                    batch.response_mask[rows], args.clip, args.beta, args.length_mean)
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
        metrics = rollout_metrics(batch, parts, scores, kl, rewards, args.k)
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
            log_samples(writer, step, columns, tokenizer, batch, scores, kl, advantages)
            save(folder / "model", policy, tokenizer)
        checkpoint(args, folder, writer, tokenizer, saved, state)
    report(folder, test, state["before"], state["after"])
    close(writer)
    return policy


if __name__ == "__main__":
    main(parse(Args))
