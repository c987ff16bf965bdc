"""Stage 1: supervised fine-tuning. Cross-entropy on the demonstrations' responses, EOS included, not on the prompts.

    loss = - sum over response tokens of log pi(y_t | x, y_<t) / number of response tokens

The defaults train the policy that ships in tasks/mini_tldr-sft:

    python sft.py --output runs/sft
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import get_scheduler

from common import encode, microbatches, no_grad_logprobs, token_logprobs
from plumbing import (check_positions, clip_gradients, leave, load_model, load_rows, load_tokenizer,
                      rank_and_world_size, sum_over_ranks)
from runs import DataArgs, Run, SystemArgs, parse, setup


def compute_loss(logprobs):
    """Negative log-likelihood. A sum: the caller divides by the number of response tokens in the whole batch.

    Args: logprobs (n, T), of the response tokens, 0 where masked. Returns: scalar.
    """
    return -logprobs.sum()


@dataclass
class Args(DataArgs, SystemArgs):  # data, memory, devices, checkpoints (see runs.py)
    model: str = "tasks/mini_tldr.py:new_model"
    """initial model: hub name, folder, or path/to/file.py:function that returns (model, tokenizer)"""
    dataset: str = "tasks/mini_tldr.py:demonstrations"
    """demonstrations (prompt, completion): hub name, path, or path/to/file.py:function"""
    completion_column: str | None = None
    """column of responses, if it is not called completion"""
    num_updates: int = 600
    """optimizer steps"""
    batch_size: int = 64
    """rows per step"""
    lr: float = 3e-3
    """AdamW's peak learning rate (for a pretrained model with billions of parameters: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """learning-rate schedule after the warm-up"""
    warmup_updates: int = 30
    """linear warm-up updates"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """maximum gradient norm"""
    max_length: int = 512
    """drop rows with more tokens than this (prompt plus completion)"""
    eval_every: int = 100
    """updates between evaluations; 0 evaluates only at the end"""
    eval_rows: int = 500
    """number of held-out rows per evaluation"""
    seed: int = 1
    """random seed for initial weights and row order"""


def main(args):
    device = setup(args)
    tokenizer = load_tokenizer(args.model)
    policy = load_model(args.model, device, args.dtype, args.shard, args.gradient_checkpointing)
    names = ["prompt", "completion"]
    train = load_rows(args, args.train_split, tokenizer, names, args.max_length)
    held_out = load_rows(args, args.test_split, tokenizer, names, args.max_length, args.eval_rows)[:]
    check_positions(policy, max(train["num_tokens"][:] + held_out["num_tokens"]))
    test = encode(tokenizer, held_out["prompt_ids"], held_out["completion"], device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)

    run = Run(__file__, args, tokenizer, policy=(policy, optimizer, scheduler))  # --resume restores all three
    for examples in run.updates(train, args.batch_size):
        batch = encode(tokenizer, examples["prompt_ids"], examples["completion"], device)
        num_tokens = batch.response_mask.sum()
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(policy, args.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], temperature=1.0)  # (n, T)
            part = compute_loss(logprobs) / num_tokens
            part.backward()
            loss += part.item()
        loss, grad_norm = sum_over_ranks(loss), clip_gradients(policy, args.max_grad_norm)
        run.check_finite(examples, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        run.log({"loss": loss, "grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]})
        scheduler.step()
        if run.evaluation_is_due():
            logprobs = no_grad_logprobs(policy, test, 1.0, args.microbatch_tokens)  # (N, T)
            run.state["perplexity"] = perplexity = torch.exp(-logprobs.sum() / test.response_mask.sum()).item()
            run.check_finite(examples, perplexity=perplexity)
            run.log({"eval/perplexity": perplexity})
            run.save_model(policy)
        run.checkpoint()  # if due; also exits after Ctrl-C or SIGTERM

    run.finish()
    if rank_and_world_size()[0] == 0:
        print(f"\nheld-out perplexity {run.state['perplexity']:.3f}; policy and logs are in {run.folder}")
    return policy


if __name__ == "__main__":
    main(parse(Args))
    leave()
