"""DPO, direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    loss = - log sigma( beta [ log pi(y+|x)/pi_ref(y+|x) - log pi(y-|x)/pi_ref(y-|x) ] )

for pairs of a chosen response y+ and a rejected one y-, collected beforehand. beta log(pi/pi_ref) is the reward that
the policy stands for: the one for which it would be the optimum of E[r] - beta KL.

    python dpo.py

What differs from rloo.py: the data are preference pairs (--dataset, with prompt, chosen and rejected), and the
evaluation has a dataset of its own (--eval-dataset); the reward model only measures. Log-probs are summed over the
response, EOS included, as in the paper; some implementations average them, which is another loss. The logits of policy
and reference are divided by --temperature, so that the policy of the loss is the one that is evaluated; the paper and TRL
do not divide (--temperature 1).

The gradient at pi = pi_ref is beta/2 times that of log pi(y-) - log pi(y+). Nothing in the loss holds up the
probability of the chosen response: only the difference counts, and both often fall (rewards/chosen below 0 is normal).

What to watch: rewards/margins rises, rewards/accuracies leaves 0.5; eval/length, since DPO tends to longer responses;
eval/kl, which nothing but the loss's shape bounds.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from common import encode, evaluate, frozen_logprobs, load_measures, microbatches, rehearse, token_logprobs
from plumbing import (add_up, batches, check_args, check_finite, checkpoint, clip_gradients, close, load_model,
                      load_reference, load_rows, load_tokenizer, log, log_evaluation, open_run, parse, pick_device,
                      report, save, total)


def compute_loss(chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs, beta):
    """- log sigma of the difference of the two responses' rewards beta log(pi/pi_ref), summed over pairs.

    A sum: the caller divides by the pairs of the whole batch, whatever the micro-batch.

    Args: four (n, T) tensors of token log-probs, 0 where masked; beta.
    Returns: scalar, and the rewards of the chosen and the rejected responses, (n,) each.
    """
    chosen = beta * (chosen_logprobs - chosen_ref_logprobs).sum(1)  # (n,)
    rejected = beta * (rejected_logprobs - rejected_ref_logprobs).sum(1)  # (n,)
    return -F.logsigmoid(chosen - rejected).sum(), chosen.detach(), rejected.detach()


@dataclass
class Args:
    beta: float = 0.1
    """how much the policy's log-ratio to the reference counts as reward: higher stays closer to the reference"""
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
    """optimizer steps"""
    batch_size: int = 32
    """preference pairs of one step"""
    max_prompt_length: int = 512
    """evaluation prompts with more tokens are left out"""
    max_length: int = 512
    """pairs with more tokens, prompt and longer response together, are left out"""
    truncate_prompts: bool = False
    """cut longer prompts off at their beginning, instead of leaving them out"""
    max_new_tokens: int = 32
    """a response is cut off after this many tokens"""
    microbatch_tokens: int = 8192
    """tokens, padding included, that go through a model at once: changes memory and time, never the gradient"""
    model: str = "tasks/mini_tldr-sft"
    """the policy to start from: a hub name or a folder"""
    reference: str | None = None
    """the policy that the KL is measured to; by default a frozen copy of --model"""
    reward: tuple[str, ...] = ("tasks/mini_tldr-reward",)
    """only measured, in evaluations: a one-label classifier (hub name or folder), or path/to/file.py:function; several
    are added"""
    reward_weights: tuple[float, ...] = ()
    """what each of several rewards is multiplied by; by default 1"""
    gold: str = "auto"
    """a second reward that is only measured, in evaluations, where it judges the win rate; "auto": the function
    gold_reward of the python file that --dataset names, if it has one; "none": none"""
    dataset: str = "tasks/mini_tldr.py:comparisons"
    """rows with the columns prompt, chosen and rejected: hub name, path, or file.py:function"""
    dataset_config: str | None = None
    """configuration of a hub dataset that has several (of both datasets)"""
    prompt_column: str | None = None
    """the datasets' column of prompts, where it has another name"""
    completion_column: str | None = None
    """the dataset's column of reference texts, where it has another name"""
    chosen_column: str | None = None
    """the dataset's column of better responses, where it has another name"""
    rejected_column: str | None = None
    """the dataset's column of worse responses, where it has another name"""
    chat: bool = False
    """make prompts that are plain text the user's message of the tokenizer's chat template"""
    system_prompt: str | None = None
    """the system's message before every prompt (and --chat)"""
    train_split: str = "train"
    """split that the pairs are taken from"""
    eval_dataset: str = "tasks/mini_tldr.py:prompts"
    """rows with the column prompt, and completion (a reference text) for the win rate, like rloo.py's --dataset"""
    test_split: str = "test"
    """split that the evaluations take their prompts from"""
    eval_every: int = 10
    """updates between two evaluations; 0 evaluates before and after training only"""
    eval_prompts: int = 256
    """held-out prompts of an evaluation, with one sampled response each"""
    eval_batch_size: int = 256
    """responses sampled at once in an evaluation"""
    seed: int = 1
    """of the order of the pairs and of the sampling"""
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
    measures = load_measures(args, tokenizer, device)  # "score", and "gold" if there is one: both only measured
    names, length = ["prompt", "chosen", "rejected"], args.max_prompt_length
    train = load_rows(args, args.dataset, args.train_split, tokenizer, names, args.max_length)
    test = load_rows(args, args.eval_dataset, args.test_split, tokenizer, ["prompt"], length, args.eval_prompts)
    rehearse(policy, tokenizer, [test, train], measures, args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)
    saved = {"policy": (policy, optimizer, scheduler)}  # what checkpoints hold, besides the state
    folder, writer, state = open_run(args, "dpo", saved)
    if not state:  # a new run
        before = evaluate(policy, reference, tokenizer, measures, test, args)
        log_evaluation(writer, 0, before)
        state = {"step": 0, "samples": 0, "seconds": 0.0, "before": before, "after": before}

    updates = range(state["step"] + 1, args.num_updates + 1)
    bar = tqdm(updates, desc="dpo", unit="update", disable=writer is None)
    for step, columns in zip(bar, batches(train, args.batch_size, args.seed, state["step"])):
        start = time.perf_counter()

        # 1. pairs, instead of a rollout
        chosen = encode(tokenizer, columns["prompt_ids"], columns["chosen"], device)  # N rows each
        rejected = encode(tokenizer, columns["prompt_ids"], columns["rejected"], device)

        # 2. score, 3. shape: the reference's log-probs are all that is needed
        chosen_ref_logprobs = frozen_logprobs(reference, chosen, args.temperature, args.microbatch_tokens)  # (N, T)
        rejected_ref_logprobs = frozen_logprobs(reference, rejected, args.temperature, args.microbatch_tokens)

        # 4. advantages: none. 5. update: one step on the whole batch, which goes through the model in micro-batches
        loss = 0.0
        optimizer.zero_grad()
        chosen_rewards, rejected_rewards = torch.zeros(2, len(chosen), device=device)  # (N,) each
        for rows in microbatches(args.microbatch_tokens, chosen, rejected):
            chosen_logprobs = token_logprobs(policy, chosen[rows], args.temperature)  # (n, T)
            rejected_logprobs = token_logprobs(policy, rejected[rows], args.temperature)  # (n, T)
            part, chosen_rewards[rows], rejected_rewards[rows] = compute_loss(
                chosen_logprobs, rejected_logprobs, chosen_ref_logprobs[rows], rejected_ref_logprobs[rows], args.beta)
            (part / len(chosen)).backward()
            loss += part.item() / len(chosen)
        loss, grad_norm = total(loss), clip_gradients(policy, args.max_grad_norm)
        check_finite(step, folder, columns, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()

        # 6. log
        elapsed = time.perf_counter() - start
        chosen_rewards, rejected_rewards = add_up(chosen_rewards), add_up(rejected_rewards)  # of all processes
        state["step"] = step
        state["samples"] += 2 * len(chosen)
        state["seconds"] += elapsed
        metrics = {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
            "policy/loss": loss,
            "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_norm > args.max_grad_norm,
            "policy/lr": lr,
            "time/samples": state["samples"],
            "time/seconds": state["seconds"],
        }
        log(writer, step, metrics)
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{metrics['rewards/accuracies']:.2f}", refresh=False)
        if step == args.num_updates or (args.eval_every and step % args.eval_every == 0):
            state["after"] = after = evaluate(policy, reference, tokenizer, measures, test, args)
            check_finite(step, folder, columns, kl=after[0]["kl"].mean())
            log_evaluation(writer, step, after)
            save(folder / "model", policy, tokenizer)
        checkpoint(args, folder, writer, tokenizer, saved, state)
    report(folder, test, state["before"], state["after"])
    close(writer)
    return policy


if __name__ == "__main__":
    main(parse(Args))
