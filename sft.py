"""Stage 1: supervised fine-tuning. Cross-entropy on the demonstrations' responses, EOS included,
not on the prompts.

    loss = - sum over response tokens of log pi(y_t | x, y_<t) / number of response tokens

The defaults train the policy that ships in tasks/mini_tldr-sft:

    python sft.py --output runs/sft
"""

from dataclasses import dataclass
from typing import Literal

import torch

try:
    from common import make_batch, microbatches, no_grad_logprobs, token_logprobs
    from plumbing import (Count, CountOrZero, DataArgs, NotNegative, Positive, Run, Seed,
                          SystemArgs, clip_gradients, get_scheduler, is_first, leave, load_policy,
                          load_rows, load_tokenizer, parse, setup, sum_gradients, sum_over_ranks,
                          try_out)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_loss(logprobs):
    """Negative log-likelihood. A sum: the caller divides by the number of response tokens.

    Args: logprobs (n, T), of the response tokens, 0 where masked. Returns: scalar.
    """
    return -logprobs.sum()


@dataclass
class Args(DataArgs, SystemArgs):  # see plumbing/flags.py
    model: str = "tasks/mini_tldr.py:new_model"
    """initial model: hub name, folder, or path/to/file.py:function that returns (model,
    tokenizer)"""
    dataset: str = "tasks/mini_tldr.py:demonstrations"
    """demonstrations (prompt, completion): hub name, path, or path/to/file.py:function"""
    completion_column: str | None = None
    """column of responses, if it is not called completion"""
    num_updates: Count = 600
    """optimizer steps"""
    batch_size: Count = 64
    """rows per step"""
    lr: Positive = 3e-3
    """AdamW's peak learning rate (for a pretrained model with billions of parameters: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """learning-rate schedule after the warm-up"""
    warmup_updates: CountOrZero = 30
    """linear warm-up updates"""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay"""
    max_grad_norm: Positive = 1.0
    """maximum gradient norm"""
    max_length: Count = 512
    """drop rows with more tokens than this (prompt plus completion)"""
    eval_every: CountOrZero = 100
    """updates between evaluations; 0 evaluates only at the end"""
    eval_rows: Count = 500
    """number of held-out rows per evaluation"""
    seed: Seed = 1
    """random seed for initial weights and row order"""


def main(args):
    device = setup(args)
    tokenizer = load_tokenizer(args.model)
    policy = load_policy(args, device)
    names = ["prompt", "completion"]
    train = load_rows(args, args.train_split, tokenizer, names, args.max_length)
    held_out = load_rows(args, args.test_split, tokenizer, names, args.max_length, args.eval_rows)
    try_out(policy, [train, held_out], args)
    held_out = held_out[:]
    test = make_batch(tokenizer, held_out["prompt_ids"], held_out["completion_ids"], device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)

    run = Run(__file__, args, tokenizer, policy=(policy, optimizer, scheduler))
    for examples in run.updates(train, args.batch_size):
        batch = make_batch(tokenizer, examples["prompt_ids"], examples["completion_ids"], device)
        num_tokens = batch.response_mask.sum()
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(policy, args.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], temperature=1.0)  # (n, T)
            part = compute_loss(logprobs) / num_tokens
            part.backward()
            loss += part.item()
        loss = sum_over_ranks(loss)
        sum_gradients(policy)  # over all processes
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(examples, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        run.log({"loss": loss, "grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]})
        scheduler.step()
        if run.evaluation_is_due():
            logprobs = no_grad_logprobs(policy, test, 1.0, args.microbatch_tokens)  # (N, T)
            perplexity = torch.exp(-logprobs.sum() / test.response_mask.sum()).item()
            run.state["perplexity"] = perplexity
            run.check_finite(examples, perplexity=perplexity)
            run.log({"eval/perplexity": perplexity})
            run.save_model(policy)
        run.checkpoint()  # if due; also exits after Ctrl-C or SIGTERM

    run.finish()
    if is_first():
        print(f"\nheld-out perplexity {run.state['perplexity']:.3f}; policy and logs are in "
              f"{run.folder}")
    return policy


if __name__ == "__main__":
    main(parse(Args))
    leave()
