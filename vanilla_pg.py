"""Vanilla policy gradient with a learned value baseline (Ahmadian et al. 2024, sections 3.1 to 3.3, arXiv:2402.14740).

    gradient = sum_t [ G_t - V(x, y_<t) ] grad log pi(y_t | x, y_<t),    G_t = r - beta sum_{i >= t} kl_i

Every token is an action, every prefix a state, and a critic of the policy's size learns each state's value. It is
PPO with lambda = 1, and without the ratio and the clipping; the paper finds that it beats PPO, and that RLOO,
which does without the critic, beats it.

    python vanilla_pg.py

What differs from rloo.py: the baseline V depends on the state, is learned by regression on G, and costs a second model
with its optimizer. It is read before the token is chosen, so it cannot bias the gradient, however wrong it is; a bad
critic only makes it noisier. The critic starts from the reward model unless --critic names another.

Where published code deviates: reading V at the token itself, which has seen the action, is a common slip, and biased.

What to watch: value/explained_variance should climb from near 0 (or below) towards 1 within some dozens of updates.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from common import (evaluate, frozen_logprobs, frozen_values, load_measures, log_samples, microbatches, rehearse,
                    rollout, rollout_metrics, token_kl, token_logprobs, token_rewards, token_values)
from plumbing import (batches, check_args, check_finite, checkpoint, clip_gradients, close, load_critic, load_model,
                      load_reference, load_rows, load_tokenizer, log, log_evaluation, open_run, parse, pick_device,
                      report, save, show, total, watch)


def compute_advantages(rewards, values, response_mask):
    """A_t = G_t - V_t, with G_t the sum of the rewards from token t on.

    Args: rewards (N, T), 0 where masked; values (N, T), of the state before each token; response_mask (N, T).
    Returns: advantages and returns G (N, T), 0 where masked.
    """
    returns = rewards.flip(1).cumsum(1).flip(1) * response_mask  # (N, T), the KL-to-go and the score
    return (returns - values) * response_mask, returns


def compute_loss(logprobs, advantages):
    """- sum_t A_t log pi(y_t | x, y_<t). A sum: the caller divides by the rows of the whole batch.

    Args: logprobs (n, T) and advantages (n, T), both 0 where masked. Returns: scalar.
    """
    return -(advantages * logprobs).sum()


def compute_value_loss(values, returns):
    """1/2 sum_t ( V_t - G_t )^2. Args: values (n, T), with gradients, and returns (n, T), 0 where masked."""
    return (values - returns).square().sum() / 2


def explained_variance(values, returns, response_mask):
    """1 - Var(G - V) / Var(G) over the real tokens: 1 is a perfect critic, 0 one that might as well be a constant."""
    values, returns = values[response_mask], returns[response_mask]
    return 1 - (returns - values).var() / returns.var()


@dataclass
class Args:
    k: int = 1
    """responses per prompt"""
    critic: str | None = None
    """where the critic starts: a one-label classifier or a policy (hub name or folder); by default the --reward, or
    the --model where the reward is a function"""
    critic_lr: float = 1e-3
    """Adam's peak learning rate for the critic"""
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
    prompts_per_step: int = 64
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
    check_args(args)
    device = pick_device(args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    policy = load_model(args.model, device, args.dtype, args.shard, args.gradient_checkpointing)
    reference = load_reference(args, tokenizer, device)
    critic = load_critic(args, tokenizer, device)
    measures = load_measures(args, tokenizer, device)  # "score" is trained on; "gold", if there is one, only measured
    length = args.max_prompt_length
    train = load_rows(args, args.dataset, args.train_split, tokenizer, ["prompt"], length)
    test = load_rows(args, args.dataset, args.test_split, tokenizer, ["prompt"], length, args.eval_prompts)
    rehearse(policy, tokenizer, [train, test], measures, args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr)
    critic_scheduler = get_scheduler(args.lr_schedule, critic_optimizer, args.warmup_updates, args.num_updates)
    saved = {"policy": (policy, optimizer, scheduler), "critic": (critic, critic_optimizer, critic_scheduler)}
    folder, writer, state = open_run(args, "vanilla_pg", saved)
    if not state:  # a new run
        before = evaluate(policy, reference, tokenizer, measures, test, args)
        log_evaluation(writer, 0, before)
        state = {"step": 0, "samples": 0, "seconds": 0.0, "before": before, "after": before}

    updates = range(state["step"] + 1, args.num_updates + 1)
    bar = tqdm(updates, desc="vanilla_pg", unit="update", disable=writer is None)
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
        rewards = token_rewards(scores, kl, args.beta, batch.response_mask)  # (N, T)

        # 4. advantages: how much better it went from each token on than the critic expected
        old_values = frozen_values(critic, batch, args.microbatch_tokens)  # (N, T)
        advantages, returns = compute_advantages(rewards, old_values, batch.response_mask)  # (N, T)

        # 5. update: one step on the whole batch, which goes through the model in micro-batches
        loss = value_loss = 0.0
        optimizer.zero_grad()
        critic_optimizer.zero_grad()
        for rows in microbatches(args.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], args.temperature)  # (n, T)
            part = compute_loss(logprobs, advantages[rows]) / len(batch)
            part.backward()
            loss += part.item()
            values = token_values(critic, batch[rows])  # (n, T)
            part = compute_value_loss(values, returns[rows]) / len(batch)
            part.backward()
            value_loss += part.item()
        loss, grad_norm = total(loss), clip_gradients(policy, args.max_grad_norm)
        value_loss, critic_grad_norm = total(value_loss), clip_gradients(critic, args.max_grad_norm)
        check_finite(step, folder, columns, loss=loss + value_loss, grad_norm=grad_norm + critic_grad_norm)
        optimizer.step()
        critic_optimizer.step()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()
        critic_scheduler.step()

        # 6. log
        elapsed = time.perf_counter() - start
        state["step"] = step
        state["samples"] += len(batch)
        state["seconds"] += elapsed
        metrics = rollout_metrics(batch, parts, scores, kl, rewards.sum(1), args.k)
        metrics |= {
            "value/loss": value_loss,
            "value/explained_variance": explained_variance(old_values, returns, batch.response_mask),
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
            log_samples(writer, step, columns, tokenizer, batch, scores, kl, advantages[:, 0])
            save(folder / "model", policy, tokenizer)
        checkpoint(args, folder, writer, tokenizer, saved, state)
    report(folder, test, state["before"], state["after"])
    close(writer)
    return policy


if __name__ == "__main__":
    main(parse(Args))
