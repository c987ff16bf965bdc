"""Stage 1: supervised fine-tuning. Cross-entropy on the demonstrations' responses, EOS included, never on the prompt.

    loss = - sum over response tokens of log pi(y_t | x, y_<t) / number of response tokens

The defaults make the policy that is shipped in tasks/mini_tldr-sft:

    python sft.py --output runs/sft
"""

from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from common import encode, frozen_logprobs, microbatches, token_logprobs
from plumbing import (batches, check_args, check_finite, check_positions, checkpoint, clip_gradients, close, load_model,
                      load_rows, load_tokenizer, log, open_run, parse, pick_device, save, total)


def compute_loss(logprobs):
    """Negative log-likelihood, summed over rows and tokens; the caller divides by the whole batch's tokens.

    Args: logprobs (n, T), of the response tokens, 0 where masked. Returns: scalar.
    """
    return -logprobs.sum()


@dataclass
class Args:
    model: str = "tasks/mini_tldr.py:new_model"
    """where to start: a hub name, a folder, or path/to/file.py:function that returns a (model, tokenizer)"""
    dataset: str = "tasks/mini_tldr.py:demonstrations"
    """rows with the columns prompt and completion: a hub name, folder, file, or file.py:function"""
    dataset_config: str | None = None
    """configuration of a hub dataset that has several"""
    prompt_column: str | None = None
    """the dataset's column of prompts, where it has another name"""
    completion_column: str | None = None
    """the dataset's column of responses, where it has another name"""
    chat: bool = False
    """make prompts that are plain text the user's message of the tokenizer's chat template"""
    system_prompt: str | None = None
    """the system's message before every prompt (and --chat)"""
    train_split: str = "train"
    """split to train on"""
    test_split: str = "test"
    """split for the held-out perplexity"""
    num_updates: int = 600
    """optimizer steps"""
    batch_size: int = 64
    """rows per step"""
    lr: float = 3e-3
    """AdamW's peak learning rate (for a pretrained model of a billion parameters: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the learning rate falls after the warm-up"""
    warmup_updates: int = 30
    """steps over which the learning rate rises from 0"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """the gradient's norm is clipped to this"""
    microbatch_tokens: int = 8192
    """tokens, padding included, that go through the model at once: memory, never the result"""
    max_length: int = 512
    """rows whose prompt and completion together are longer are left out"""
    truncate_prompts: bool = False
    """cut longer prompts off at their beginning, instead of leaving them out"""
    eval_every: int = 100
    """updates between two evaluations; 0 evaluates at the end only"""
    eval_rows: int = 500
    """held-out rows that an evaluation uses"""
    seed: int = 1
    """of the initial weights and the order of the rows"""
    output: str | None = None
    """run folder; by default runs/sft-seed<seed>-<time>"""
    save_every: int = 10
    """updates between two checkpoints; 0 writes one only at the end, or where SIGTERM or Ctrl-C ends the run"""
    keep: int = 2
    """checkpoints that are kept, the last ones"""
    resume: str | None = None
    """folder of a run that was ended: go on after its last checkpoint, with its flags, as if nothing had happened"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32, or bfloat16 (autocast; the weights stay in float32)"""
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
    names = ["prompt", "completion"]
    train = load_rows(args, args.dataset, args.train_split, tokenizer, names, args.max_length)
    columns = load_rows(args, args.dataset, args.test_split, tokenizer, names, args.max_length, args.eval_rows)[:]
    check_positions(policy, max(train["num_tokens"][:] + columns["num_tokens"]))
    test = encode(tokenizer, columns["prompt_ids"], columns["completion"], device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)
    saved = {"policy": (policy, optimizer, scheduler)}  # what checkpoints hold, besides the state
    folder, writer, state = open_run(args, "sft", saved)
    state = state or {"step": 0}

    updates = range(state["step"] + 1, args.num_updates + 1)
    bar = tqdm(updates, desc="sft", unit="update", disable=writer is None)
    for step, columns in zip(bar, batches(train, args.batch_size, args.seed, state["step"])):
        batch = encode(tokenizer, columns["prompt_ids"], columns["completion"], device)
        num_tokens = batch.response_mask.sum()
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(args.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], temperature=1.0)  # (n, T)
            part = compute_loss(logprobs) / num_tokens
            part.backward()
            loss += part.item()
        loss, grad_norm = total(loss), clip_gradients(policy, args.max_grad_norm)
        check_finite(step, folder, columns, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        log(writer, step, {"loss": loss, "grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]})
        scheduler.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if step == args.num_updates or (args.eval_every and step % args.eval_every == 0):
            logprobs = frozen_logprobs(policy, test, 1.0, args.microbatch_tokens)  # (N, T)
            state["perplexity"] = perplexity = torch.exp(-logprobs.sum() / test.response_mask.sum()).item()
            check_finite(step, folder, columns, perplexity=perplexity)
            log(writer, step, {"eval/perplexity": perplexity})
            save(folder / "model", policy, tokenizer)
        state["step"] = step
        checkpoint(args, folder, writer, tokenizer, saved, state)
    if writer:
        print(f"\nheld-out perplexity {state['perplexity']:.3f}; policy and logs are in {folder}")
    close(writer)
    return policy


if __name__ == "__main__":
    main(parse(Args))
