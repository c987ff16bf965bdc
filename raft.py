"""RAFT, reward-ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767; Ahmadian et al. 2024, section 2.4).

    best = argmax_i R(y_i, x) over the k responses of a prompt
    loss = - log pi(y_best | x), per token

    python raft.py
    python raft.py --rank-by score

What differs from rloo.py: of the k responses only the best one is used, as if it were a demonstration; there is no
negative signal and no size of an advantage, only a rank. It is no estimator of the policy gradient of E[R]. --rank-by
reward ranks by the KL-shaped R, score by r alone (the KL is then only measured).

Where published code differs: the papers and TRL's SFT take the cross-entropy at temperature 1. Here the logits are divided
by --temperature, as in sampling, so that the policy that is trained is the one that is sampled.

Ahmadian et al. find it more sensitive than RLOO to noise in the reward and to a strong KL penalty, since both change
who is best.

What to watch: objective/best_score, the chosen responses' score; its distance from objective/scores is what there is
to learn.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from common import (evaluate, frozen_logprobs, load_measures, log_samples, microbatches, rehearse, rollout,
                    rollout_metrics, sequence_rewards, token_kl, token_logprobs)
from plumbing import (batches, check_args, check_finite, checkpoint, clip_gradients, close, load_model, load_reference,
                      load_rows, load_tokenizer, log, log_evaluation, open_run, parse, pick_device, report, require,
                      save, show, total, watch)


def select_best(rewards, k):
    """The row of each prompt's best response. Args: rewards (N,), prompt-major; k. Returns: rows (B,)."""
    best = rewards.view(-1, k).argmax(1)  # (B,)
    return torch.arange(len(best), device=best.device) * k + best


def compute_loss(logprobs):
    """Negative log-likelihood, summed over rows and tokens; the caller divides by the tokens of the whole batch.

    Args: logprobs (n, T), 0 where masked. Returns: scalar.
    """
    return -logprobs.sum()


@dataclass
class Args:
    k: int = 4
    """responses per prompt, 2 or more"""
    rank_by: Literal["reward", "score"] = "reward"
    """best by the KL-shaped reward R, or by the score r"""
    beta: float = 0.05
    """weight of the KL penalty in the reward; 0 switches it off"""
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
    """optimizer steps, each on a rollout of its own"""
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
    require(args.k >= 2, f"--k {args.k}: the best of the k responses is kept; use 2 or more")
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
    folder, writer, state = open_run(args, "raft", saved)
    if not state:  # a new run
        before = evaluate(policy, reference, tokenizer, measures, test, args)
        log_evaluation(writer, 0, before)
        state = {"step": 0, "samples": 0, "seconds": 0.0, "before": before, "after": before}

    updates = range(state["step"] + 1, args.num_updates + 1)
    bar = tqdm(updates, desc="raft", unit="update", disable=writer is None)
    for step, columns in zip(bar, batches(train, args.prompts_per_step, args.seed, state["step"])):
        start = time.perf_counter()

        # 1. rollout: k responses for each prompt, with the sampler's own log-probs
        batch = rollout(policy, tokenizer, columns["prompt_ids"], args.k, args.temperature, args.max_new_tokens,
                        args.rollout_batch_size)  # N rows

        # 2. score: one number per response
        parts = measures["score"](batch, columns)  # name -> (N,): the score, and its parts where there are several
        scores = parts["score"] - args.missing_eos_penalty * ~batch.ended  # (N,)

        # 3. shape: the KL to the reference becomes part of the reward
        ref_logprobs = frozen_logprobs(reference, batch, args.temperature, args.microbatch_tokens)  # (N, T)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)  # (N, T)
        check_finite(step, folder, columns, scores=scores, kl=kl)
        rewards = sequence_rewards(scores, kl, args.beta)  # (N,)

        # 4. the best response of each prompt, instead of advantages
        best = select_best(rewards if args.rank_by == "reward" else scores, args.k)  # (B,)
        num_tokens = batch.response_mask[best].sum()

        # 5. update: one step on the best responses, which go through the model in micro-batches
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(args.microbatch_tokens, batch[best]):
            logprobs = token_logprobs(policy, batch[best[rows]], args.temperature)  # (n, T)
            part = compute_loss(logprobs) / num_tokens
            part.backward()
            loss += part.item()
        loss, grad_norm = total(loss), clip_gradients(policy, args.max_grad_norm)
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
            "objective/best_score": scores[best].mean(),
            "policy/loss": loss,
            "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_norm > args.max_grad_norm,
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
            chosen = torch.zeros_like(scores).index_fill(0, best, 1.0)  # (N,), 1 for the best of each prompt
            log_samples(writer, step, columns, tokenizer, batch, scores, kl, chosen)
            save(folder / "model", policy, tokenizer)
        checkpoint(args, folder, writer, tokenizer, saved, state)
    report(folder, test, state["before"], state["after"])
    close(writer)
    return policy


if __name__ == "__main__":
    main(parse(Args))
