"""Stage 2: a reward model trained on preference pairs (Bradley-Terry).

    loss = - log sigma(r(x, y_chosen) - r(x, y_rejected)) + c * (r(x, y_chosen) + r(x, y_rejected))^2

The first term is the negative log-likelihood of the annotators' choices (Stiennon et al. 2020, equation 1). It leaves
an additive constant free; the small second term keeps rewards centred near 0 (Eisenstein et al. 2023, section 3).
After training, the head is divided by the standard deviation of the rewards on the held-out pairs, to make it 1.

The defaults train the reward model that ships in tasks/mini_tldr-reward:

    python reward_model.py --output runs/reward
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import get_scheduler

from common import classifier_scores, encode, microbatches
from plumbing import (check_positions, clip_gradients, leave, load_classifier, load_rows, load_tokenizer,
                      rank_and_world_size, sum_over_ranks)
from runs import DataArgs, Run, SystemArgs, find_gold, load_reward, parse, setup


def compute_loss(chosen, rejected, center):
    """Bradley-Terry loss plus the centring term, summed over pairs.

    Args: chosen, rejected (n,), the rewards of each pair's two responses; center, the coefficient c.
    Returns: scalar.
    """
    return (-F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2).sum()


@dataclass
class Args(DataArgs, SystemArgs):  # data, memory, devices, checkpoints (see runs.py)
    model: str = "tasks/mini_tldr-sft"
    """initial model, usually the SFT policy: hub name or folder; it gets a new head with one output"""
    dataset: str = "tasks/mini_tldr.py:preferences"
    """preference pairs (prompt, chosen, rejected): hub name, path, or path/to/file.py:function"""
    chosen_column: str | None = None
    """column of preferred responses, if it is not called chosen"""
    rejected_column: str | None = None
    """column of dispreferred responses, if it is not called rejected"""
    gold: str = "auto"
    """true reward to compare with, for logging only: path/to/file.py:function; auto: the function gold_reward in the
    --dataset file, if there is one; none: no gold reward"""
    num_updates: int = 3000
    """optimizer steps"""
    batch_size: int = 32
    """pairs per step"""
    lr: float = 6e-4
    """AdamW's peak learning rate (for a pretrained model with billions of parameters: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """learning-rate schedule after the warm-up"""
    warmup_updates: int = 30
    """linear warm-up updates"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    center: float = 0.01
    """coefficient c of the centring term"""
    max_grad_norm: float = 1.0
    """maximum gradient norm"""
    microbatch_tokens: int = 16384
    """maximum tokens per micro-batch, padding included; affects memory and speed, never the gradient"""
    max_length: int = 512
    """drop pairs with more tokens than this (prompt plus longer response)"""
    eval_every: int = 250
    """updates between evaluations; 0 evaluates only at the end"""
    eval_rows: int = 2000
    """number of held-out pairs per evaluation"""
    seed: int = 1
    """random seed for the new head and the pair order"""


def spearman(x, y):
    """Rank correlation of x and y (M,); ties get their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - counts / 2)[inverse].double())  # (M,)
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@torch.no_grad()
def evaluate_pairs(model, tokenizer, pairs, gold, args):
    """Metrics on M held-out pairs: agreement with the annotator, and with the gold reward if there is one."""
    examples = pairs[:]
    rewards, golds = [], []
    for name in ("chosen", "rejected"):
        batch = encode(tokenizer, examples["prompt_ids"], examples[name], model.device)
        scores = torch.zeros(len(batch), device=model.device)
        for rows in microbatches(model, args.microbatch_tokens, batch):
            scores[rows] = classifier_scores(model, batch[rows])
        rewards.append(sum_over_ranks(scores).cpu())
        if gold:
            golds.append(gold(batch, examples).cpu())
    rewards = torch.stack(rewards, 1)  # (M, 2)
    right = rewards[:, 0] > rewards[:, 1]  # (M,)
    metrics = {"accuracy": right.float().mean().item(), "mean": rewards.mean().item(), "std": rewards.std().item()}
    if gold:
        golds = torch.stack(golds, 1)  # (M, 2)
        differ = golds[:, 0] != golds[:, 1]
        metrics["gold_accuracy"] = (right == (golds[:, 0] > golds[:, 1]))[differ].float().mean().item()
        metrics["gold_spearman"] = spearman(rewards.flatten(), golds.flatten())
    return metrics


def main(args):
    device = setup(args)
    tokenizer = load_tokenizer(args.model)
    model = load_classifier(args.model, device, args.dtype, args.shard, args.gradient_checkpointing, new_head=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    gold = find_gold(args.gold, args.dataset)
    gold = gold and load_reward(gold, tokenizer, device, args.dtype, args.microbatch_tokens)
    names = ["prompt", "chosen", "rejected"]
    train = load_rows(args, args.train_split, tokenizer, names, args.max_length)
    test = load_rows(args, args.test_split, tokenizer, names, args.max_length, args.eval_rows)
    check_positions(model, max(train["num_tokens"][:] + test["num_tokens"][:]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)

    run = Run(__file__, args, tokenizer, reward=(model, optimizer, scheduler))  # --resume restores all three
    for examples in run.updates(train, args.batch_size):
        chosen = encode(tokenizer, examples["prompt_ids"], examples["chosen"], device)
        rejected = encode(tokenizer, examples["prompt_ids"], examples["rejected"], device)
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(model, args.microbatch_tokens, chosen, rejected):
            rewards = [classifier_scores(model, batch[rows]) for batch in (chosen, rejected)]
            part = compute_loss(*rewards, args.center) / args.batch_size  # rewards: two of (n,)
            part.backward()
            loss += part.item()
        loss, grad_norm = sum_over_ranks(loss), clip_gradients(model, args.max_grad_norm)
        run.check_finite(examples, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        run.log({"loss": loss, "grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]})
        scheduler.step()
        if run.evaluation_is_due():
            run.state["metrics"] = metrics = evaluate_pairs(model, tokenizer, test, gold, args)
            run.check_finite(examples, mean=metrics["mean"], std=metrics["std"])
            run.log({f"eval/{name}": value for name, value in metrics.items()})
        run.checkpoint()  # if due; also exits after Ctrl-C or SIGTERM

    with torch.no_grad():
        model.score.weight /= run.state["metrics"]["std"]
    metrics = evaluate_pairs(model, tokenizer, test, gold, args)
    run.save_model(model)
    run.finish()
    if rank_and_world_size()[0] == 0:
        print("\n" + "\n".join(f"{name:<16}{value:>8.3f}" for name, value in metrics.items()))
        (run.folder / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"\nreward model and logs are in {run.folder}")
    return model


if __name__ == "__main__":
    main(parse(Args))
    leave()
